"""How often each kernel ran: counted where it runs, so that what is said of a plan cannot contradict what was done.

Eager calls are counted one by one, after the kernel has returned. A graph that the `loka` backend compiled is counted
whenever it runs: its forward products by its call, its backward products by its backward pass. What that computes again
of a forward is not counted apart, for the compiler decides it: eager checkpoints count theirs. What another compiler
made of a converted model is not counted: nothing of ours is called in it any more.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from loka.formats import Pass

# What is counted for a product of a planned site that stays in the operands' own precision.
HIGH_PRECISION_PRODUCTS: Final[str] = "high precision"

_executed: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class GraphKernels:
    """The kernels of one compiled graph: how often each runs in its forward pass, and in its backward pass."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)


# The graph that is being traced, if one is.
_traced: list[GraphKernels] = []


@contextmanager
def graph_kernels() -> Iterator[GraphKernels]:
    """Note the kernels that become part of a graph while AOT autograd traces it."""
    found = GraphKernels()
    _traced.append(found)
    try:
        yield found
    finally:
        _traced.pop()


def record_traced(kernel: str, product: Pass) -> None:
    """Note a kernel that is being traced. Only what a proxy follows reaches the graph: the rest is a rehearsal."""
    if _traced and get_proxy_mode() is not None:
        counter = _traced[-1].forward if product == "fprop" else _traced[-1].backward
        counter[kernel or HIGH_PRECISION_PRODUCTS] += 1


def counted(graph: Callable[..., Any], kernels: GraphKernels) -> Callable[..., Any]:
    """Return a compiled graph that counts its kernels when it runs, and those of its backward when that runs."""
    if not kernels.forward and not kernels.backward:
        return graph

    def run(*args: Any) -> Any:
        outputs = graph(*args)
        if any(isinstance(x, FakeTensor) for x in outputs):
            return outputs  # the next bucket of DistributedDataParallel asks for shapes: nothing has run
        _executed.update(kernels.forward)
        # All outputs of a graph leave through one autograd node.
        node = next((x.grad_fn for x in outputs if isinstance(x, Tensor) and x.grad_fn is not None), None)
        if node is not None and kernels.backward:
            node.register_prehook(lambda _: _executed.update(kernels.backward))
        return outputs

    return run


def record(kernel: str, times: int = 1) -> None:
    """Count a kernel's executions; "" is high precision."""
    _executed[kernel or HIGH_PRECISION_PRODUCTS] += times


def kernel_executions() -> Mapping[str, int]:
    """Return how often each kernel ran in this process, or since the last reset, by name."""
    return dict(sorted(_executed.items()))


def reset_kernel_executions() -> None:
    """Start counting from zero."""
    _executed.clear()
