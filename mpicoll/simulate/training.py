"""What a training job gains from more GPUs: weak and strong scaling, with gradients under way meanwhile.

Vocabulary
----------
local batch    samples of one GPU in a step. Weak scaling keeps it, strong scaling divides a global batch.
bucket         gradients that are reduced by one allreduce; the last layer's are complete first.
efficiency     the throughput of p GPUs over p times that of one.

The model. A step of one GPU takes c = (local batch) / (samples per second), of which a third is the forward
pass. Gradients of G bytes become ready evenly over the backward pass, in k = ⌈G / bucket⌉ buckets; allreduces
come one after the other, each as soon as its bucket is ready and the one before is done:

    ready(i)  = c/3 + 2c/3 (bytes of buckets 0 to i) / G
    done(i)   = max(ready(i), done(i - 1)) + T(bytes of bucket i)
    step      = max(c, done(k - 1))
    efficiency, weak  = c / step;      strong = (c of the global batch on one GPU) / (p step)

T is what the fastest algorithm takes on the machine (see ``candidates``), and with one GPU 0.

Not in it: the optimiser, reading data, GPUs that wait for the slowest of many, allreduces that slow
computation down (and are slowed down), small batches that fill a GPU badly. So it is an upper bound, which
the published figures beside it are to show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpicoll.simulate import candidates
from mpicoll.simulate.machine import Machine

MIB = 1 << 20
FORWARD = 1 / 3  # of a step's time; the backward pass multiplies twice as many matrices
RANKS = (1, 8, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Job:
    """A model and how it is trained; ``speed``: samples per second of one GPU, ``source``: of that number."""

    name: str
    title: str
    gradient_bytes: int
    speed: float
    local_batch: int
    global_batch: int
    bucket_bytes: int
    source: str


# Parameters as torchvision counts them, and of Llama 2 (arXiv:2307.09288); times 4 bytes, or 2 in bfloat16.
JOBS = {
    job.name: job
    for job in (
        Job(
            "resnet50",
            "ResNet-50, float32 gradients",
            25_557_032 * 4,
            speed=5000,
            local_batch=256,
            global_batch=32768,
            bucket_bytes=25 * MIB,
            source="some 2,600 images/s on an A100 in mixed precision (pytorch-image-models on GitHub, issue "
            "1491), and an H100 trains vision models about twice as fast (lambdalabs.com/blog/"
            "nvidia-h100-gpu-deep-learning-performance-analysis); buckets as in PyTorch's DDP",
        ),
        Job(
            "7b",
            "7B-parameter transformer, bfloat16 gradients",
            6_738_415_616 * 2,
            speed=400e12 / (6 * 6_738_415_616 * 4096),
            local_batch=4,
            global_batch=4096,
            bucket_bytes=256 * MIB,
            source="a sample is 4,096 tokens; 6 operations per parameter and token (arXiv:2001.08361) at "
            "400 TFLOP/s, what Llama 3 reached on H100 (arXiv:2407.21783); the largest global batch of "
            "Llama 3, 16 million tokens",
        ),
    )
}


@dataclass(frozen=True)
class Point:
    """One number of GPUs: seconds of a ``step``, ``efficiency`` of 1, and the algorithm of a whole bucket."""

    nranks: int
    local_batch: float
    compute_seconds: float
    step_seconds: float
    efficiency: float
    algorithm: str


@dataclass(frozen=True)
class Scaling:
    """What `scale` finds. ``strong`` ends where a GPU would have less than one sample."""

    job: Job
    machine: str
    weak: tuple[Point, ...]
    strong: tuple[Point, ...]


def scale(
    job: Job,
    machine: Machine,
    ranks: Sequence[int] = RANKS,
    progress: Callable[[int, int], None] | None = None,
) -> Scaling:
    """Weak and strong scaling of ``job`` over ``ranks``, as far as they fit ``machine``."""
    fitting = [nranks for nranks in ranks if nranks <= machine.capacity]
    weak, strong = [], []
    for done, nranks in enumerate(fitting, start=1):
        best = _bucket_times(job, machine, nranks)
        weak.append(_point(job, nranks, job.local_batch, best))
        if nranks <= job.global_batch:
            strong.append(_point(job, nranks, job.global_batch / nranks, best))
        if progress:
            progress(done, len(fitting))
    return Scaling(job, machine.name, tuple(weak), tuple(strong))


Times = tuple[float, float, str]  # of an allreduce of a whole bucket, and of the last one; and its algorithm


def _bucket_times(job: Job, machine: Machine, nranks: int) -> Times:
    if nranks == 1:
        return 0.0, 0.0, ""
    sizes = _buckets(job)
    found, _ = candidates.predict("allreduce", machine, nranks, [sizes[0], sizes[-1]])
    name = min(found, key=lambda name: found[name][0].seconds)
    return found[name][0].seconds, min(p[1].seconds for p in found.values()), name


def _buckets(job: Job) -> list[int]:
    """Bytes of each bucket; the last one has what is left."""
    whole, rest = divmod(job.gradient_bytes, job.bucket_bytes)
    return [job.bucket_bytes] * whole + [rest] * (rest > 0)


def _point(job: Job, nranks: int, local_batch: float, times: Times) -> Point:
    compute = local_batch / job.speed
    step = step_seconds(compute, _buckets(job), times)
    return Point(nranks, local_batch, compute, step, compute / step, times[2])


def step_seconds(compute: float, buckets: Sequence[int], times: Times) -> float:
    """The equations of the module, for a step that computes for ``compute`` seconds."""
    total, so_far, done = sum(buckets), 0, 0.0
    for i, nbytes in enumerate(buckets):
        so_far += nbytes
        ready = compute * (FORWARD + (1 - FORWARD) * so_far / total)
        done = max(ready, done) + (times[1] if i == len(buckets) - 1 else times[0])
    return max(compute, done)


@dataclass(frozen=True)
class Published:
    """An efficiency that somebody measured, and the job and machine to predict it with."""

    source: str
    job: Job
    machine: str
    nranks: int
    efficiency: float


def _horovod(name: str, parameters: int, speed: float, efficiency: float, source: str) -> Published:
    # 64 MiB was Horovod's fusion buffer, and float32 its gradients; batches of 64 (its docs/benchmarks.rst).
    job = Job(name, f"{name}, float32 gradients", parameters * 4, speed, 64, 64 * 512, 64 * MIB, source)
    return Published("Horovod, docs/benchmarks.rst", job, "pascal-25g", 512, efficiency)


_TENSORFLOW = "images/s of one P100 (tensorflow.org/performance/benchmarks, 2017)"
_ONE_HOUR = Job(
    "ResNet-50", "ResNet-50, float32 gradients", 25_557_032 * 4, 219, 32, 8192, 25 * MIB, _TENSORFLOW
)
PUBLISHED = (
    _horovod("Inception V3", 23_834_568, 142, 0.90, _TENSORFLOW),
    _horovod(
        "ResNet-101",
        44_549_160,
        1656.82 / 16,
        0.90,
        "a 16th of the images/s on 16 GPUs (docs/benchmarks.rst)",
    ),
    _horovod("VGG-16", 138_357_544, 154, 0.68, _TENSORFLOW),
    Published("ImageNet in 1 hour, arXiv:1706.02677", _ONE_HOUR, "big-basin", 256, 0.90),
)


def predict_published(published: Published) -> Point:
    """What the model says of a published figure."""
    machine = Machine.load(published.machine)
    return scale(published.job, machine, [published.nranks]).weak[0]
