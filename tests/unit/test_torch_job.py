"""Training with PyTorch over the backend "mpicoll", in which a rank dies: jobs of their own."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from .rank_jobs import Job, needs_ulfm, running

NRANKS, VICTIM = 3, 1
PROMPT = 10.0  # seconds within which the others know, and can end what they have begun

pytestmark = [needs_ulfm, pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")]

PROGRAM = f"""
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import mpicoll.torch

VICTIM = {VICTIM}
torch.set_num_threads(1)
mpicoll.torch.init()
layers = [torch.nn.Linear(30, 30) for _ in range(6)]
network = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.005)  # buckets of a layer
optimizer = torch.optim.SGD(network.parameters(), 0.01)

def step():
    optimizer.zero_grad()
    network(torch.randn(5, 30)).square().mean().backward()
    optimizer.step()

def steps(number):
    for _ in range(number):
        step()

def failing(work):
    try:
        work()
    except RuntimeError as error:
        write(f"error {{world}}", f"{{type(error).__name__}}: {{error}}")
        try:
            dist.barrier()
        except RuntimeError as again:
            write(f"again {{world}}", type(again).__name__)
        dist.destroy_process_group()
        write(f"end {{world}}", time.monotonic())
    # Nobody before all have told: the others would learn of this one, too.
    while len(list(folder.glob("end ?"))) < {NRANKS - 1}:
        time.sleep(0.002)
    os._exit(0)

steps(3)
write(f"begun {{world}}", None)
"""


def check(job: Job, since: float) -> None:
    for rank in {0, NRANKS - 1}:
        # DDP waits for futures in C++, which makes every error a RuntimeError, with the other one's name.
        assert re.search(rf"RankFailedError: .*rank {VICTIM}\b.*has ended", job.said(f"error {rank}"))
        assert job.said(f"again {rank}") == "RankFailedError"
        assert job.said(f"end {rank}") - since < PROMPT


def test_a_rank_is_killed_while_it_trains(tmp_path: Path) -> None:
    with running(tmp_path, NRANKS, PROGRAM + "failing(lambda: steps(10_000_000))", elastic=True) as job:
        for rank in range(NRANKS):
            job.said(f"begun {rank}")
        time.sleep(random.Random(1).uniform(0.01, 0.3))
        killed = time.monotonic()
        os.kill(job.pid(VICTIM), signal.SIGKILL)
        check(job, killed)


def test_a_backward_pass_fails(tmp_path: Path) -> None:
    """Nobody catches its exception. Of the others one is in the backward pass, one waits for a message."""
    text = """
if world == VICTIM:
    layers[3].weight.register_hook(lambda _: write("gone", time.monotonic()) or 1 / 0)
    step()
failing(lambda: dist.recv(torch.zeros(3), VICTIM) if world == 0 else step())
"""
    with running(tmp_path, NRANKS, PROGRAM + text, elastic=True) as job:
        check(job, job.said("gone"))
        assert "ZeroDivisionError" in job.output()
