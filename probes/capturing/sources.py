"""Who wrote what a linear layer reads: a norm or another linear, whether unchanged, and whether somebody else reads it.

A scale can move from an input into its weight only where the input was written by something that can take the inverse,
and nobody else reads it. That is seen on a run's first sampled steps, operator by operator (`loka.value_flow`), and not
read from the model's code; `loka advise` holds what it says to it.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from loka.calls import forward_of
from loka.naming import clean_fqn
from loka.probes.distributions.stored import Stored
from loka.scaled_norms import is_scaled_norm, unlike
from loka.value_flow import ValueFlow, argument_of, read_by

logger = logging.getLogger("loka.probe")

# Sampled steps that are looked at: a second one shows what a first step alone would do, such as filling a buffer.
STEPS: Final[int] = 2
# What a dispatch mode costs per aten op; charged to the probe.
MODE_COST_S: Final[float] = 3e-6
# What an op costs that is looked at, with the modules around it, likewise. On a small Llama 13 us more than without, of
# which global hooks and the modes of a sampled step are there anyway.
_COST_S: Final[float] = 1.2e-5
_PLAIN_TYPES: Final[frozenset[type]] = frozenset({Tensor, nn.Parameter})


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What wrote the input of one linear layer; without a `writer`, nothing that a scale can move into."""

    writer: str = ""  # norm with a scale, or linear
    scaled: bool = False  # whether the linear reads a product of the writer's output with something else
    why: str = ""  # why no scale can move into the writer: in words, who else reads its output

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is kept."""
        return 4 * (len(self.writer) + len(self.why)) + 1

    def merge(self, other: Self) -> Self:
        """Return what both have seen of one layer; the order does not matter."""
        if self.writer != other.writer:
            return type(self)()
        return replace(self, scaled=self.scaled or other.scaled, why=max(self.why, other.why))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state as plain arrays."""
        return {
            "names": np.asarray([self.writer, self.why], dtype=np.str_),
            "scaled": np.asarray(int(self.scaled)),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Restore what `arrays` gave. Raises ArgumentError for anything else."""
        stored = Stored(cls.__name__, arrays)
        writer, why = stored.texts("names", 2)
        return cls(writer=writer, why=why, scaled=stored.flag("scaled"))


def watch_for(model: nn.Module, steps: int) -> "SourceWatch | None":
    """Return what follows the next step, None where so many steps are enough, or parameters are no plain tensors."""
    if steps >= STEPS or not all(type(parameter) in _PLAIN_TYPES for parameter in model.parameters()):
        return None
    try:
        return SourceWatch(model)
    except Exception as error:  # modules of a user may be anything; their sources are not told then
        logger.debug("what writes the inputs of layers is not known", exc_info=error)
        return None


class SourceWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Follows the values of one step's forward. Backward and recomputations do not count.

    What goes wrong in here ends the watch, and nothing is told of the step: the model's own result is not affected.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        names: dict[int, str] = {}
        linears, norms = set(), set()
        for raw, module in model.named_modules():
            names[id(module)] = clean_fqn(raw)
            if isinstance(module, nn.Linear) and forward_of(module) is nn.Linear.forward:
                linears.add(id(module))
            elif is_scaled_norm(module):
                norms.add(id(module))
        self.failure = ""
        self._flow = ValueFlow(names=names, linears=linears, sources=linears | norms)
        self._spent_s = 0.0

    def entered(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module's forward begins."""
        if self._counts():
            self._note(lambda: self._flow.entered(module, argument_of(args, {})))

    def left(self, module: nn.Module, output: Any, *, outermost: bool) -> None:
        """A module's forward ended; `outermost`: what it returns goes to the user."""
        if self._counts():
            self._note(lambda: self._flow.left(module, output))
            if outermost:
                self._note(lambda: self._flow.returned(output))
                self._flow.stack.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _PLAIN_TYPES.issuperset(types):
            return func(*args, **kwargs) if FakeTensor in types else NotImplemented
        result = func(*args, **kwargs)
        looked_at = bool(self._flow.stack) and self._counts()
        self._spent_s += _COST_S if looked_at else MODE_COST_S
        if looked_at:
            self._note(lambda: self._ran(func, args, kwargs, result))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping every dispatch, as `Capture` does: nothing can be compiled in here."""
        return False

    def _ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for tensor, views in read_by(func, args, kwargs, result):
            self._flow.ran(func, tensor, result, views=views)

    def _counts(self) -> bool:
        return not self.failure and torch._C._current_autograd_node() is None

    def _note(self, at: Callable[[], object]) -> None:
        try:
            at()
        except Exception as error:  # noqa: BLE001 - a probe must never stop the training it watches; this much is not told
            self.failure = f"{type(error).__name__}: {error}"

    def owed_s(self) -> float:
        """Return the time that was spent since this was asked before."""
        spent, self._spent_s = self._spent_s, 0.0
        return spent

    def sources(self) -> dict[str, Source]:
        """Return the source of every linear that ran, by the name of its weight; empty where looking failed."""
        if self.failure:
            return {}
        flow, found = self._flow, {}
        refused: dict[int, str] = {}
        for linear, values in flow.read.items():
            producers = {id(value.producer): value.producer for value in values}
            producer = next(iter(producers.values())) if len(producers) == 1 else None
            name = f"{flow.names[linear]}.weight"
            if producer is None:
                found[name] = Source()
                continue
            writer = id(producer)
            if writer not in refused:
                refused[writer] = flow.readers(writer, exact=False)[1] or _unlike(producer)
            scaled = not all(value.readers.get(linear, True) for value in values)
            found[name] = Source(writer=flow.names[writer], scaled=scaled, why=refused[writer])
        return found


def _unlike(producer: nn.Module) -> str:
    """Say why no scale can move into a norm that computes something of its own; run as it is, not compiled."""
    if not is_scaled_norm(producer):
        return ""
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eager:
        return unlike(producer)
