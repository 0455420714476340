"""Hadamard: another basis for the reduction of a product, in which its operands are cheaper to round.

The input is turned on line, or, with `online=False`, where another linear wrote it, in that linear's weight and so for
nothing. `loka.mods.rotation` says which basis, and why it lowers the error.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.formats import Recipe
from loka.mods.claims import Claim, listing
from loka.mods.rotation import BALANCES, Balance, Mixing, Rotation, balanced_basis, channel_scale
from loka.mods.trial.equivalent import (
    MIN_GAIN,
    MIN_GAIN_AT_A_COST,
    NOT_CALLED,
    EquivalentMod,
    Place,
    Proposal,
    Refusal,
    checked_recipe,
    exact,
    linears,
    make_linear,
    renewed,
    unsuited,
)
from loka.mods.trial.gain import error_of, rounded_product, rounding_error
from loka.mods.trial.observe import LinearTraffic, Traffic
from loka.mods.trial.wrapping import KeptLinear, LinearWrapper, multiply
from loka.selection import Selection

Named = tuple[str, nn.Linear]

# What kernels want the width of a product to be a multiple of.
_MULTIPLE: Final[int] = 16


class RotatedLinear(LinearWrapper):
    """A linear that multiplies in another basis: `inner(rotation(x))`, and `loud` for the directions kept high."""

    def __init__(self, rotation: Rotation, inner: nn.Linear, loud: nn.Linear | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.body = inner.in_features
        self.rotation = rotation
        self.inner = inner
        self.loud = loud
        if loud is not None:
            self.in_features += loud.in_features

    def forward(self, input: Tensor) -> Tensor:
        """Return what the linear returns for [..., in_features]."""
        turned = self.rotation(input)
        output: Tensor = self.inner(turned[..., : self.body])
        return output if self.loud is None else output + self.loud(turned[..., self.body :])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear that stood here."""
        held: Tensor | None = self.inner.bias
        return held

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product of [..., in_features] without bias."""
        turned = self.rotation(x)
        product = multiply(self.inner, turned[..., : self.body])
        return product if self.loud is None else product + multiply(self.loud, turned[..., self.body :])

    @property
    def high_work(self) -> float:
        """Multiply-adds of one row that stay in high precision: a full basis, and the directions that are kept."""
        turning = 0 if self.rotation.basis is None else self.rotation.basis.numel()
        return turning + (self.in_features - self.body) * self.out_features

    def held(self, weight: Tensor, bias: Tensor | None) -> Mapping[str, Tensor]:
        """Turn a weight from before the rewrite by the rotation that is there."""
        own = {f"rotation.{name}": value for name, value in self.rotation.state_dict().items()}
        turned = self.rotation.of_weight(weight.to(self.device)).to(weight.dtype)
        parts = {**own, "inner.weight": turned[:, : self.body]}
        if self.loud is not None:
            parts["loud.weight"] = turned[:, self.body :]
        return parts if bias is None else {**parts, "inner.bias": bias}


@dataclass(frozen=True, slots=True)
class Hadamard(EquivalentMod):
    """Multiply in a rotated basis, wherever that lowers the error of the product.

    `block`: features that are mixed with each other, all of them by default; the last block is shorter where k is no
    multiple. `balance`: what goes before the mixing, fitted to the inputs. "none": nothing, the plain rotation.
    "channel" (default): a power of two per feature, one more multiplication. "full": a k x k matrix in place of it
    all, which costs a product of its own in high precision, m k^2 beside the m k n of the site, and lowers the error
    most; fit it on several times k rows. Where n is no larger than k, that is as much work as the product itself: the
    reason of a replacement says how much. `keep`, for "full": the share of the basis that stays in high precision, in a
    linear of its own: the directions that say most. The width of the rest is a multiple of 16.

    `online=False` limits the mod to linears whose input another linear writes, and which alone read it; there all is
    folded into weights, and "full" costs nothing either. `recipe`: under which the error is measured, on rows that were
    not fitted to. A place stays as it was where it does not fall by 5 % (off line, where it is free, by 1 %).

    On line a linear `x` becomes a module with `x.inner`, an nn.Linear and a site of its own; an old checkpoint loads,
    strictly, and is turned on the way. What was fitted is kept in the state_dict, under `x.rotation`. Linears with one
    input are rotated each on its own; fuse them before, and the input is turned once. With `online=False` keys and
    shapes stay, and an old checkpoint, loaded as a whole, brings the old basis back.
    """

    block: int | None = None
    online: bool = True
    balance: Balance = "channel"
    keep: float = 0.0
    recipe: str = "rowwise"
    only: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse options that cannot be meant."""
        Mixing(1, self.block)
        Selection(self.only or ())
        checked_recipe(self.recipe)
        if self.balance not in BALANCES:
            raise ArgumentError(f"balance={self.balance!r}: choose one of {', '.join(map(repr, BALANCES))}.")
        if not isinstance(self.keep, int | float) or isinstance(self.keep, bool) or not 0 <= self.keep < 1:
            raise ArgumentError(f"keep={self.keep!r}: give a share of the basis, from 0 to below 1.")
        if self.keep and (self.balance != "full" or not self.online):
            raise ArgumentError("keep is for directions of a full basis on line: set balance='full', or leave it out.")
        if self.balance == "full" and self.block is not None:
            raise ArgumentError("block is for mixing in blocks; balance='full' mixes all features. Leave one out.")

    def measures(self, model: nn.Module) -> Iterable[nn.Linear]:
        """Measure those that may be rotated, off line with those that share their input."""
        return linears(model, self.only if self.online else None).values()

    def wants_covariance(self) -> bool:
        """Whether it reads second moments."""
        return self.balance == "full"

    def proposals(self, model: nn.Module, traffic: Traffic) -> Iterable[Proposal]:
        """Propose each linear, or each pair of linears, whose product has a smaller error in another basis."""
        chosen = linears(model, self.only)
        if self.online:
            for fqn, linear in chosen.items():
                if linear.in_features < 2:
                    continue
                why = _refusal([linear], traffic)
                yield Refusal(fqn=fqn, mod=self.name, reason=why) if why else self._turned(fqn, linear, traffic)
            return
        names = {id(module): (fqn, module) for fqn, module in linears(model).items()}
        wanted = {id(module) for module in chosen.values()}
        for fqn, producer in names.values():
            ids, why = traffic.readers(producer, exact=True)
            if why or not wanted.intersection(ids):
                continue
            behind = [names[reader] for reader in ids]
            why = _refusal([producer, *(linear for _, linear in behind)], traffic)
            if why:
                yield Refusal(fqn=fqn, mod=self.name, reason=why)
            else:
                yield self._folded(fqn, producer, behind, traffic)

    def nothing_found(self, model: nn.Module) -> str:
        """Say what was looked for."""
        if self.online:
            return "It looks for nn.Linear; the model has none."
        return "With online=False it looks for linears whose output only linears read, as it is; the model has none."

    def _turned(self, fqn: str, linear: nn.Linear, traffic: Traffic) -> Proposal:
        found = self._best([(fqn, linear)], traffic)
        if isinstance(found, Refusal):
            return found
        rotation, figures = found
        body, outputs = rotation.mixing.width, linear.out_features
        if rotation.basis is not None:
            high = rotation.basis.numel() / linear.weight.numel() + 1 - body / linear.in_features
            figures = f"{high:.0%} of the product's work in high precision: {figures}"

        def build() -> RotatedLinear:
            weight = rotation.of_weight(linear.weight)
            inner = make_linear(linear, weight[:, :body], linear.bias, (body, outputs))
            if body == linear.in_features:
                return RotatedLinear(rotation, inner)
            loud = KeptLinear(linear.in_features - body, outputs, bias=False, device="meta")
            loud.weight = renewed(linear.weight, weight[:, body:])
            return RotatedLinear(rotation, inner, loud)

        claim = Claim(mod=self.name, fqn=fqn, module=linear, build=build, reason=figures)
        return Place(mod=self.name, fqn=fqn, claims=(claim,))

    def _folded(self, fqn: str, producer: nn.Linear, behind: list[Named], traffic: Traffic) -> Proposal:
        found = self._best(behind, traffic)
        if isinstance(found, Refusal):
            return found
        rotation, figures = found

        def before(slot: str) -> nn.Parameter:
            parameter = producer._parameters[slot]
            assert parameter is not None
            return renewed(parameter, rotation.matrix(parameter).t() @ exact(parameter))

        into = listing(name for name, _ in behind)
        claims = [
            Claim(
                mod=self.name,
                fqn=fqn,
                module=producer,
                slot=slot,
                build=lambda slot=slot: before(slot),  # type: ignore[misc]
                reason=f"writes what {into} reads in another basis: {figures}",
            )
            for slot, parameter in producer._parameters.items()
            if parameter is not None
        ]
        claims += [
            Claim(
                mod=self.name,
                fqn=name,
                module=linear,
                slot="weight",
                build=lambda linear=linear: renewed(linear.weight, rotation.of_weight(linear.weight)),  # type: ignore[misc]
                reason=f"reads {fqn!r} in another basis",
            )
            for name, linear in behind
        ]
        return Place(mod=self.name, fqn=fqn, claims=tuple(claims))

    def _best(self, behind: list[Named], traffic: Traffic) -> tuple[Rotation, str] | Refusal:
        """Fit a rotation to the input that these linears share, and measure what it is worth."""
        fqn = behind[0][0]
        seen = [traffic.linears[id(linear)] for _, linear in behind]
        weights = [linear.weight.detach() for _, linear in behind]
        rotation = self._fitted(seen[0], torch.cat(weights))
        if rotation is None:
            return Refusal(fqn=fqn, mod=self.name, reason="its input or weight is all zero, or not finite")
        recipe = checked_recipe(self.recipe)
        pairs = list(zip([each.rows for each in seen], [weight.float() for weight in weights], strict=True))
        before = sum(rounding_error(x, w, recipe) for x, w in pairs) / len(pairs)
        after = sum(_turned_error(rotation, x, w, recipe) for x, w in pairs) / len(pairs)
        figures = f"error under {self.recipe} {before:.4f} -> {after:.4f}"
        if not after <= (1 - (MIN_GAIN_AT_A_COST if self.online else MIN_GAIN)) * before:
            return Refusal(fqn=fqn, mod=self.name, reason=f"nothing is gained there: {figures}", figure=after)
        return rotation, figures

    def _fitted(self, seen: LinearTraffic, weight: Tensor) -> Rotation | None:
        mixing = Mixing(self._body(weight.shape[1]), self.block).to(weight.device)
        if self.balance == "channel":
            return Rotation(mixing, scale=channel_scale(seen.energy, weight).to(weight.dtype))
        if self.balance == "full":
            covariance = seen.covariance
            basis = None if covariance is None else balanced_basis(covariance, weight, mixing)
            # Rounded to what it is kept in before the weight is turned by it: the two then belong together.
            return None if basis is None else Rotation(mixing, basis=basis.to(weight.dtype))
        return Rotation(mixing)

    def _body(self, k: int) -> int:
        """Return how many directions go to FP8: all, or a multiple of 16 where that leaves any."""
        rest = k - round(self.keep * k)
        return k if not self.keep else max(rest // _MULTIPLE * _MULTIPLE or rest, 1)


@torch.no_grad()
def _turned_error(rotation: Rotation, x: Tensor, weight: Tensor, recipe: Recipe) -> float:
    turned, other, body = rotation(x), rotation.of_weight(weight).float(), rotation.mixing.width
    product = rounded_product(turned[:, :body], other[:, :body], recipe) + turned[:, body:] @ other[:, body:].t()
    return error_of(product, x, weight)


def _refusal(modules: Sequence[nn.Linear], traffic: Traffic) -> str:
    for linear in modules:
        if traffic.measured(linear) is None:
            return NOT_CALLED
        reader = traffic.foreign.get(id(linear))
        if reader:
            return f"its weight is also read by {reader}"
        if unsuited(linear):
            return unsuited(linear)
        if not bool(torch.isfinite(linear.weight).all()):
            return "its weight is not finite"
    return ""
