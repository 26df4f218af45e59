"""A stand-in for CuPy, for machines without a GPU: arrays in memory of a `FakeLibrary`, computed by NumPy.

What CuPy launches is written on the thread of a fake stream here, in the stream's order and after a while:
who looks at an array's memory in another way finds what was there before, or poison. So a collective that
does not keep to the stream's order, or an MPI that knows nothing of GPUs, comes to wrong numbers.

Like CuPy, it computes with arrays of its own and with numbers alone, no array becomes NumPy's unless `get` is
called, and memory comes from large allocations, to which it returns when an array is gone.
"""

from __future__ import annotations

import ctypes
import gc
import operator
import sys
import threading
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mpicoll.kernels import packing

from mpicoll.gpu import driver

from . import fake_cuda
from .fake_cuda import FakeLibrary

Host = npt.NDArray[Any]

CHUNK = 8 << 20  # bytes that are allocated at once
UNIT = 512  # bytes of which all memory is a multiple
STREAM = 1  # CUDA's default stream, as ``__cuda_array_interface__`` names it
OPERATORS = "add sub mul truediv floordiv mod pow matmul and_ or_ xor rshift lshift".split()
VIEWS = (
    "reshape",
    "ravel",
    "swapaxes",
    "transpose",
    "astype",
)  # what may come back is a view, which needs no data
HOSTS_OWN = "ctypes", "data", "base", "tobytes", "tofile"  # of NumPy's arrays, not of these
COMPARISONS = "eq ne lt le gt ge".split()


def stream() -> Any:
    """The stream that everything is put on."""
    return fake_cuda.in_use().stream(STREAM)


# -- memory


class Pool:
    """Memory of one device, in pieces. It lives, and the fake that it is of, as long as any of them."""

    def __init__(self) -> None:
        self._library = fake_cuda.in_use()
        self._free: dict[int, list[int]] = defaultdict(list)  # addresses, by size
        self._begin = self._end = 0  # of what has not been used yet
        self._chunks: list[tuple[int, int]] = []
        self._turn = threading.RLock()

    def new(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Host:
        """An array with anything in it."""
        dtype, count = np.dtype(dtype), int(np.prod(shape))
        nbytes = -(-max(count * dtype.itemsize, 1) // UNIT) * UNIT
        with self._turn:
            address = self._free[nbytes].pop() if self._free[nbytes] else self._carved(nbytes)
        memory = (ctypes.c_char * nbytes).from_address(address)
        weakref.finalize(memory, self._give_back, nbytes, address).atexit = False
        array: Host = np.frombuffer(memoryview(memory), dtype, count).reshape(shape)
        return array

    def _give_back(self, nbytes: int, address: int) -> None:
        self._free[nbytes].append(address)

    def _carved(self, nbytes: int) -> int:
        if self._end - self._begin < nbytes:
            size = max(nbytes, CHUNK)
            self._begin = driver.driver().allocate(size, 0)
            self._end = self._begin + size
            self._chunks.append((self._begin, self._end))
        self._begin += nbytes
        return self._begin - nbytes

    def has(self, array: Host) -> bool:
        """Whether an array lies in here."""
        address = array.ctypes.data
        return any(begin <= address < end for begin, end in self._chunks)


# -- arrays


class Array:
    """``host`` is NumPy's view of its memory."""

    __module__ = "cupy"
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: Host) -> None:
        self.host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        host = self.host
        strides = None if host.flags.c_contiguous else host.strides
        data = (host.ctypes.data if host.size else 0, False)
        form = {"shape": host.shape, "typestr": host.dtype.str, "strides": strides}
        return {**form, "data": data, "version": 3, "stream": STREAM}

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an array of CuPy's becomes NumPy's by get() alone")

    def __array_function__(self, function: Callable[..., Any], *rest: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} got an array of CuPy's")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in HOSTS_OWN:
            raise AttributeError(f"cupy.ndarray has no {name}")
        value = getattr(self.host, name)
        if not callable(value):
            return Array(value) if isinstance(value, np.ndarray) else value

        def method(*args: Any, **kwargs: Any) -> Any:
            if name in VIEWS and module().pool.has(view := value(*args, **kwargs)):
                return Array(view)
            return launched(lambda own, *a, **k: getattr(own, name)(*a, **k), self, *args, **kwargs)

        return method

    def __len__(self) -> int:
        return len(self.host)

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Array:
        where = parts(index)
        if all(part is None or part is ... or isinstance(part, (int, slice)) for part in where):
            return Array(self.host[where if ... in where else (*where, ...)])
        found: Array = launched(lambda own, *given: own[unwrapped(index, given)], self, *where)
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        def changed(own: Host, new: Any, *where: Any) -> None:
            own[unwrapped(index, where)] = new

        self._change(changed, value, *parts(index))

    def _change(self, change: Callable[..., Any], *others: Any) -> Array:
        own, *hosts = viewed([self, *others])
        later(lambda: change(own, *hosts))
        return self

    def get(self) -> Host:
        """A copy on the host, which waits for the stream."""
        module().transfers += 1
        copy: Host = waited(self).copy()
        return copy

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()


def _give_operators() -> None:
    def binary(compute: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: launched(compute, self, other)

    def reflected(compute: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: launched(lambda own, given: compute(given, own), self, other)

    def in_place(compute: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: self._change(compute, other)

    for name in OPERATORS:
        bare = name.rstrip("_")
        setattr(Array, f"__{bare}__", binary(getattr(operator, name)))
        setattr(Array, f"__r{bare}__", reflected(getattr(operator, name)))
        setattr(Array, f"__i{bare}__", in_place(getattr(operator, f"i{bare}")))
    for name in COMPARISONS:
        setattr(Array, f"__{name}__", binary(getattr(operator, name)))
    for name in ("neg", "invert", "abs"):
        setattr(Array, f"__{name}__", lambda self, name=name: launched(getattr(operator, name), self))


_give_operators()


# -- what is computed


def later(thing: Callable[[], Any]) -> None:
    """Do it in the stream's order; what it raises, `waited` does."""

    def safely() -> None:
        try:
            thing()
        except Exception as error:
            errors.append(error)

    errors = module().errors
    module().check_device()
    stream().put(safely)


def waited(value: Any) -> Any:
    """The host's views of arrays, when all that is on the stream is done; other values as they are."""
    module().check_device()
    stream().synchronise()
    for error in module().errors:
        raise error
    return viewed(value)


def viewed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        raise TypeError("expected arrays of CuPy's, got one of NumPy's, which asarray() makes one of")
    if isinstance(value, (tuple, list)):
        return type(value)(map(viewed, value))
    return value.host if isinstance(value, Array) else value


def launched(function: Callable[..., Any], *args: Any, out: Array | None = None, **kwargs: Any) -> Any:
    """What NumPy's ``function`` makes of these arrays; views as views, anything else is written later.

    New arrays have the shape of what comes out, so what goes in must be there; with ``out`` it need not.
    """
    if out is not None:
        hosts, target = viewed(args), out.host
        later(lambda: function(*hosts, **kwargs, out=target))
        return out
    return given_back(function(*waited(args), **{name: viewed(value) for name, value in kwargs.items()}))


def given_back(result: Any) -> Any:
    """The same on the device, later; a view of what is there already."""
    if isinstance(result, (tuple, list)):
        return type(result)(map(given_back, result))
    if isinstance(result, np.generic):
        result = np.asarray(result)
    if not isinstance(result, np.ndarray):
        return result
    if module().pool.has(result):
        return Array(result)
    there = module().pool.new(result.shape, result.dtype)
    later(lambda: there.__setitem__(..., result))
    return Array(there)


def parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def unwrapped(index: Any, where: tuple[Any, ...]) -> Any:
    return where if isinstance(index, tuple) else where[0]


class Update:
    """That of `mpicoll.kernels.packing_cuda`, on a thread of the host."""

    def __init__(self, bucket: Array, parameters: list[Array], velocities: list[Array]) -> None:
        hosts = bucket.host, [array.host for array in parameters], [array.host for array in velocities]
        self._update = packing.Update(*hosts)

    def step(self, *settings: Any) -> None:
        later(lambda: self._update.step(*settings))


# -- the module


class Event:
    """When the stream gets somewhere."""

    def __init__(self) -> None:
        self._time = 0.0
        self._done = threading.Event()

    def record(self) -> None:
        stream().put(self._come)

    def _come(self) -> None:
        self._time = perf_counter()
        self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def synchronize(self) -> None:
        self._done.wait()


def get_elapsed_time(begin: Event, end: Event) -> float:
    """Milliseconds; like CUDA's it refuses events that have not come."""
    if not (begin.done and end.done):
        raise RuntimeError("cudaErrorNotReady: device not ready")
    return 1000 * (end._time - begin._time)


class Stream:
    ptr = 0

    def synchronize(self) -> None:
        module().transfers += 1
        stream().synchronise()


class Device:
    def __init__(self, number: int) -> None:
        self.id = number

    def use(self) -> None:
        """From now on the thread has this device's context, as CUDA's runtime leaves it."""
        module().chosen.device = self.id
        found = driver.driver()
        found.call("cuCtxPushCurrent_v2", found._context(self.id))


class FakeCupy(types.ModuleType):
    """Has NumPy's functions, for arrays of its own.

    ``chosen.device`` is the one that the calling thread uses; where none was chosen CUDA takes GPU 0, which
    is an error here. ``transfers``: how often the host has waited for the GPU.
    """

    def __init__(self) -> None:
        super().__init__("cupy")
        self.pool = Pool()
        self.chosen = threading.local()
        self.transfers = 0
        self.errors: list[Exception] = []
        self.ndarray = Array
        self.cuda = types.SimpleNamespace(
            Device=Device, Event=Event, get_current_stream=Stream, get_elapsed_time=get_elapsed_time
        )

    def check_device(self) -> None:
        if not hasattr(self.chosen, "device"):
            raise RuntimeError(f"no device was chosen for the thread {threading.current_thread().name}")

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value
        return lambda *args, **kwargs: launched(value, *args, **kwargs)

    def asarray(self, values: Any, dtype: npt.DTypeLike | None = None) -> Array:
        """The host's memory is read at once, and arrives later."""
        if isinstance(values, Array):
            found: Array = launched(lambda own: np.asarray(own, dtype), values)
            return found
        there: Array = given_back(np.array(values, dtype))
        return there

    def empty(self, shape: Any, dtype: npt.DTypeLike = float) -> Array:
        return Array(self.pool.new(shape if isinstance(shape, tuple) else (shape,), dtype))


def module() -> FakeCupy:
    """The one in use."""
    found = sys.modules["cupy"]
    assert isinstance(found, FakeCupy)
    return found


@contextmanager
def in_use(fake: FakeLibrary | None = None) -> Iterator[FakeCupy]:
    """Everything finds this in place of CuPy, and a fake of CUDA."""
    from mpicoll.kernels import packing_cuda

    gc.collect()  # what is left of another fake's memory and events is given back to that one
    with pytest.MonkeyPatch.context() as patch:
        fake_cuda.use(patch, fake)
        found = FakeCupy()
        patch.setitem(sys.modules, "cupy", found)
        patch.setattr(packing_cuda, "Update", Update)
        yield found
        gc.collect()
        for each in list(fake_cuda.in_use().streams.values()):
            each.synchronise()  # what they still do needs the memory that there is now
