"""A forward product with rounded operands and everything else as it is: what FP8 there does to the model's output.

Products are told apart by their number within a forward pass, which is the same in every pass of a frozen model. A
first pass under the probe's own capture says which site each of them belongs to.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loka.formats import Recipe
from loka.probes.capturing.capture import Capture, Sighting
from loka.probes.capturing.products import FACTORS, factors_of
from loka.probes.capturing.scope import capture_scope
from loka.probes.capturing.sites import FilterFn, SiteKey, SiteMap
from loka.probes.sampling.measure import exact_arithmetic, is_plain_product
from loka.quantize import fake_quantize

# Products whose output is their result plus something else, so that a change of the one is the change of the other.
_LINEAR: Final[frozenset[str]] = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One product of a forward pass: its number, and whether its first factor is the input rather than the weight."""

    number: int
    a_is_p: bool


class Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Round both operands of some products; without any, only count them all."""

    def __init__(self, calls: Sequence[Call] = (), recipe: Recipe | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.calls, self.recipe = {call.number: call for call in calls}, recipe
        self.number = -1  # of the newest product
        self.second = 0  # where the second factor of the newest product lies

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket not in FACTORS:
            return result
        self.number += 1
        factors = factors_of(func._overloadpacket, args, kwargs)
        self.second = factors.q.data_ptr()
        call = self.calls.get(self.number)
        if call is not None and self.recipe is not None:
            changed = deviation(factors.p, factors.q, self.recipe, a_is_p=call.a_is_p)
            result.add_(changed.reshape(result.shape).to(result.dtype), alpha=kwargs.get("alpha", 1))
        return result


def deviation(p: Tensor, q: Tensor, recipe: Recipe, *, a_is_p: bool) -> Tensor:
    """Return what rounding both factors does to P @ Q, in fp32."""
    a, b = (p, q.mT) if a_is_p else (q.mT, p)
    leading = a.shape[:-1]
    if a.dim() == 3 and b.stride(0) == 0:
        # One matrix broadcast over the batch: a plain product of all the batch's rows, with one scale per tensor.
        a, b = a.reshape(1, -1, a.shape[-1]), b[:1]
    a, b = a.float(), b.float()
    rounded = fake_quantize(a, recipe.operand("input")), fake_quantize(b, recipe.operand("weight"))
    with exact_arithmetic():
        changed = (rounded[0] @ rounded[1].mT - a @ b.mT).reshape(*leading, b.shape[-2])
    return changed if a_is_p else changed.mT


class _Finder:
    """Receives the sightings of one forward pass (`capture.Observer`)."""

    def __init__(self, counter: Rounded) -> None:
        self.counter = counter
        self.calls: defaultdict[SiteKey, list[Call]] = defaultdict(list)

    def saw(self, sighting: Sighting) -> None:
        """Remember which product this is, where rounding it can be emulated."""
        found = sighting.gemm
        if sighting.product == "fprop" and is_plain_product(found) and found.op in _LINEAR and found.k > 1:
            a_is_p = found.b.data_ptr() == self.counter.second
            self.calls[sighting.key].append(Call(number=self.counter.number, a_is_p=a_is_p))

    def lost(self) -> None:
        """Ignore it."""

    def hidden(self, site: str, op: str) -> None:
        """Ignore it."""

    def failed(self, error: Exception) -> None:
        """Let the study fail."""
        raise error


def find_calls(
    model: nn.Module, forward: Callable[[], Any], admits: FilterFn | None = None
) -> Mapping[str, Sequence[Call]]:
    """Run one forward pass; return the plain forward products of every site, by its name."""
    sites = SiteMap(model, admits)
    sites.refresh()
    counter = Rounded()
    finder = _Finder(counter)
    with counter, capture_scope(Capture(sites, finder)):
        forward()
    sites.clear()
    names = sites.finish_names(iter(finder.calls))
    return {names[key]: tuple(calls) for key, calls in finder.calls.items()}


def run_rounded(forward: Callable[[], Tensor], calls: Sequence[Call], recipe: Recipe) -> Tensor:
    """Run one forward pass with these products rounded; raise ValueError where one did not come by."""
    mode = Rounded(calls, recipe)
    with mode:
        result = forward()
    last = max(call.number for call in calls)
    if mode.number < last:
        raise ValueError(f"Product {last} was to be rounded, and the pass had {mode.number + 1}.")
    return result
