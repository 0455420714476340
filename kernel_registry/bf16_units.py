"""fp32 products of numbers that bf16 holds exactly, on the bf16 units of a CPU: the same sums, in less time.

oneDNN splits no number that has eight significant bits: under its fp32 precision "bf16" every product of two such
numbers is exact and is added in fp32, as without it. Codes of FP8, which have four, are such numbers in fp32 as well.

That precision is a setting of the whole process and not of a call. It is changed for the length of one product, and
only where nobody else can multiply meanwhile: with other threads about than those known never to, and wherever the
process has chosen a precision of its own, the product is computed as always. So it is under `left_idle`.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

import torch
from torch import Tensor

from loka.hardware import multiplies_bf16
from loka.kernel_registry.torch_mm import matmul
from loka.torch_release import being_compiled, is_exporting

# Asked once: Dynamo cannot trace the question.
_AVAILABLE: Final[dict[str, bool]] = {"cpu": multiplies_bf16("cpu")}
_BACKEND: Final = ("mkldnn", "matmul")  # torch.backends.mkldnn.matmul.fp32_precision, without its cost in Python
_NOT_CHOSEN: Final = "none"
# The smallest normal number of fp32, and of bf16.
SMALLEST: Final[float] = torch.finfo(torch.float32).smallest_normal
# Threads that draw, write or pass data on: by the start of the module that their work is defined in.
_QUIET: Final[tuple[str, ...]] = (
    "loka.",
    "multiprocessing.queues",
    "tensorboard.",
    "torch.utils.data.",
    "tqdm.",
    "wandb.",
)
_COMPILER: Final = "torch._inductor.async_compile"


_idle: Final = ContextVar("idle", default=False)


@contextlib.contextmanager
def left_idle() -> Iterator[None]:
    """Have products computed as always, for times that owe nothing to these units."""
    token = _idle.set(True)
    try:
        yield
    finally:
        _idle.reset(token)


def available(device: torch.device) -> bool:
    """Return whether a device has such units."""
    return _AVAILABLE.get(device.type, False)


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a [.., m, k] times b [.., n, k] in fp32; both hold fp32 numbers of at most eight significant bits.

    Neither they nor the product of two may be below SMALLEST, zero aside: these units take subnormal numbers for zero.
    """
    if being_compiled(a):
        return matmul(a, b) if is_exporting() or a.dim() != 2 else _operator(a, b)
    return _matmul(a, b)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if not usable():
        return matmul(a, b)
    try:
        torch._C._set_fp32_precision_setter(*_BACKEND, "bf16")
        return matmul(a, b)
    finally:
        torch._C._set_fp32_precision_setter(*_BACKEND, _NOT_CHOSEN)


def usable() -> bool:
    """Return whether these units may be taken for a product now; not to be asked while code is compiled."""
    return not _idle.get() and torch._C._get_fp32_precision_getter(*_BACKEND) == _NOT_CHOSEN and _is_alone()


def _is_alone() -> bool:
    """Whether no other thread of Python's can be multiplying; on a CPU, autograd runs on the thread that called it."""
    if threading.active_count() == 1:
        return True
    others = set(threading.enumerate()) - {threading.current_thread()}
    return all(_module(thread).startswith(_QUIET) for thread in others - _compiling())


def _module(thread: threading.Thread) -> str:
    """Return where the work of a thread is defined."""
    work = getattr(thread, "_target", None) or type(thread)  # without a target, a class of its own says what is done
    return str(getattr(work, "__module__", ""))


def _compiling() -> set[threading.Thread]:
    """Return the pool of Inductor, which has nothing to do while a graph runs."""
    pool = getattr(getattr(sys.modules.get(_COMPILER), "AsyncCompile", None), "pool", None)
    return set(pool()._threads) if pool is not None and pool.cache_info().currsize else set()


@torch.library.custom_op("loka::exact_matmul", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor")
def _operator(a: Tensor, b: Tensor) -> Tensor:
    return _matmul(a, b).contiguous()


@_operator.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))
