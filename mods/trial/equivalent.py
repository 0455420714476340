"""What an equivalent mod is: it proposes places from what the model did on real input, and keeps the function.

A place is a group of claims that only make sense together, such as a scale that leaves a norm and enters the linears
behind it. `mods.trial.verify` carries places out, compares the model's output with what it was, and takes back those
that change it. A place that cannot be rewritten, or that would gain nothing, is a refusal in words; it stops nothing.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from loka.errors import ArgumentError
from loka.formats import Recipe, recipe
from loka.mods.claims import Claim, Mod, walk
from loka.mods.trial.wrapping import KeptLinear
from loka.selection import select

if TYPE_CHECKING:
    from loka.mods.trial.observe import Traffic

# One batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
Batch = Tensor | Sequence[object] | Mapping[str, object]
# A mod that is meant to lower the error stays where it lowers it by this share: less is within what a sample can tell,
# and one that costs something in every step has to be worth it.
MIN_GAIN: Final[float] = 0.01
MIN_GAIN_AT_A_COST: Final[float] = 0.05
NOT_CALLED: Final[str] = "it was not called on the inputs, or with no row"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A place that stays as it was, and why. `figure`: what was measured there, where that is the reason."""

    fqn: str
    mod: str
    reason: str
    figure: float | None = None

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.fqn or 'the model'}: stays as it was ({self.mod}: {self.reason})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Claims that are carried out together or not at all.

    Each `build` reads the model as it is when it is called, for an earlier place may have changed the same parameter.
    """

    mod: str
    fqn: str
    claims: tuple[Claim, ...]


Proposal = Place | Refusal


@dataclass(frozen=True, slots=True)
class EquivalentMod(Mod):
    """Base of the mods that keep the function of the model, and are verified on `inputs`."""

    kind: ClassVar[Literal["equivalent", "architectural"]] = "equivalent"

    @abstractmethod
    def proposals(self, model: nn.Module, traffic: "Traffic") -> Iterable[Proposal]:
        """Yield the places to rewrite and those to refuse; the model must not be changed."""

    def measures(self, model: nn.Module) -> Iterable[nn.Linear]:
        """Return the linears whose rows and moments it reads; where it is called, is known of every linear."""
        return ()

    def wants_covariance(self) -> bool:
        """Whether it reads `LinearTraffic.covariance`, k x k numbers per measured linear."""
        return False

    def claims(self, model: nn.Module) -> Iterable[Claim]:
        """Return nothing: what it rewrites depends on the inputs, see `proposals`."""
        return ()


def linears(model: nn.Module, only: str | Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """Return the modules that multiply as nn.Linear does, one FQN each, limited to those that `only` selects.

    A module that is registered under several names, as what was fused is, is selected by any of them.
    """
    found: dict[str, nn.Linear] = {}
    first: dict[int, str] = {}
    names: dict[str, str] = {}  # every name -> the one that is returned
    for fqn, module in walk(model):
        stock = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if isinstance(module, nn.Linear) and stock and not isinstance(module, KeptLinear):
            names[fqn] = first.setdefault(id(module), fqn)
            found.setdefault(names[fqn], module)
    if only is None:
        return found
    chosen = select(only, names, what="nn.Linear", inside=True)
    return {fqn: found[fqn] for fqn in dict.fromkeys(names[name] for name in chosen)}


def unsuited(module: nn.Module) -> str:
    """Return why the parameters of a module cannot be rewritten, in words, or an empty string."""
    if is_parametrized(module):
        return "it is parametrized. Remove the parametrization first, or do without this mod here"
    if any(type(parameter) is not nn.Parameter for parameter in module._parameters.values() if parameter is not None):
        return "its parameters are of a special kind (lazy, sharded or quantised)"
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a plain parameter (weight norm, pruned or quantised)"
    if not weight.dtype.is_floating_point or weight.is_meta:
        return "its weight has no floating-point values at hand"
    if "forward" in vars(module):
        return "its forward was overridden on the instance"
    return ""


def renewed(old: Tensor, values: Tensor) -> nn.Parameter:
    """Return a new parameter with these values, and the dtype, device and gradient flag of an old one."""
    made = values.detach().to(old.device, old.dtype).contiguous().clone()
    return nn.Parameter(made, requires_grad=old.requires_grad)


def make_linear(old: nn.Linear, weight: Tensor, bias: Tensor | None, features: tuple[int, int]) -> nn.Linear:
    """Return a new nn.Linear of (inputs, outputs) `features`, with dtype, device and gradient flags of the old one."""
    made = nn.Linear(*features, bias=bias is not None, device="meta", dtype=old.weight.dtype)
    made.weight = renewed(old.weight, weight)
    if bias is not None:
        made.bias = renewed(old.bias if old.bias is not None else old.weight, bias)
    return made


def checked_recipe(name: str) -> Recipe:
    """Return the recipe that errors are measured under. Raises ArgumentError for an unknown one."""
    if not isinstance(name, str):
        raise ArgumentError(f"recipe={name!r}: give the name of a recipe, such as 'rowwise'.")
    return recipe(name)


def exact(values: Tensor) -> Tensor:
    """Return values in fp64, off the graph: folding is rounded once, when the parameter is made."""
    return values.detach().to(torch.float64) if values.device.type != "mps" else values.detach().float()
