"""What kind of layer a forward product belongs to, where that is not a linear layer like any other.

A mod rewrites what multiplies as `nn.Linear` does, from a weight of its own, and `NoBias` keeps the biases of
prediction heads. What a loop differentiates twice cannot run in FP8: rounding has no second derivative. The numbers of
a product tell none of that, so a run keeps it, of the layers that differ.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from torch import nn

from loka.errors import ArgumentError
from loka.naming import class_of, clean_fqn
from loka.probes.distributions.stored import Stored

LINEAR: Final[str] = "Linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFacts:
    """What one layer is; by default a linear layer whose output further layers multiply."""

    runs: str = LINEAR  # class of torch.nn whose forward it runs; of a forward of its own, its class
    also: str = ""  # another name of its weight, which is shared
    outside: str = ""  # module that multiplies with its weight without calling it, as nn.MultiheadAttention does
    head: bool = False  # whether its output reached the output of the model without another product
    twice: bool = False  # whether a backward pass through it was to be differentiated again (create_graph=True)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is kept."""
        return 4 * (len(self.runs) + len(self.also) + len(self.outside)) + 1

    def merge(self, other: Self) -> Self:
        """Return what both have seen of one layer; the order does not matter."""
        if (self.runs, self.also) != (other.runs, other.also):
            raise ArgumentError(f"{self} and {other} are facts of two layers; merge those of one.")
        outside = max(self.outside, other.outside)
        return replace(self, head=self.head or other.head, outside=outside, twice=self.twice or other.twice)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state as plain arrays."""
        return {
            "names": np.asarray([self.runs, self.also, self.outside], dtype=np.str_),
            "head": np.asarray(int(self.head)),
            **({"twice": np.asarray(1)} if self.twice else {}),  # which older runs do not tell
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Restore what `arrays` gave. Raises ArgumentError for anything else."""
        stored = Stored(cls.__name__, arrays)
        runs, also, outside = stored.texts("names", 3)
        twice = "twice" in arrays and stored.flag("twice")
        return cls(runs=runs, also=also, outside=outside, head=stored.flag("head"), twice=twice)


@dataclass(slots=True)
class LayerNotes:
    """The layers of one model of which there is something to keep, each told once, and again when more is known."""

    facts: dict[str, LayerFacts] | None = None  # parameter -> facts; None: not looked yet
    told: dict[str, LayerFacts] = field(default_factory=dict)

    def news(
        self, model: nn.Module, parameter: str, *, head: bool, outside: str = "", twice: bool = False
    ) -> LayerFacts | None:
        """Return what is to be kept of the layer of a parameter, or None where nothing is, or it is kept already."""
        if self.facts is None:
            self.facts = layer_facts(model)
        told = self.told.get(parameter, LayerFacts())
        facts = self.facts.get(parameter, LayerFacts())
        outside, twice = max(outside, told.outside), twice or told.twice
        found = replace(facts, head=head or told.head, outside=outside, twice=twice)
        if found == told:
            return None
        self.told[parameter] = found
        return found


def layer_facts(model: nn.Module) -> dict[str, LayerFacts]:
    """Return parameter -> facts, for the weights of all modules that are no plain linear layers."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    runs: dict[str, str] = {}
    for raw, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = clean_fqn(f"{raw}.{key}" if raw else key)
                names[id(parameter)].append(name)
                runs[name] = _forward_of(module)
    found = {}
    for same in names.values():
        for name in same:
            also = next((other for other in same if other != name), "")
            facts = LayerFacts(runs=runs[name], also=also)
            if facts != LayerFacts():
                found[name] = facts
    return found


def _forward_of(module: nn.Module) -> str:
    """Return the class of torch.nn whose forward a module runs; of a forward of its own, its class with its home."""
    own = class_of(module)
    home = next((kind for kind in own.__mro__ if "forward" in vars(kind)), nn.Module)
    if "forward" not in vars(module) and home.__module__.startswith("torch.nn."):
        return home.__name__
    return f"{own.__module__}.{own.__qualname__}"
