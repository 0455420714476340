"""Smooth: SmoothQuant's migration of scales, from the input of a product to its weight, channel by channel.

    x W^T = (x / s) (W * s)^T        s_k = amax|x_k|^alpha / amax|W_k|^(1 - alpha)

The division is folded into what wrote x: a norm's scale, or the rows of the linear before, also through a product with
something else, as in `act(gate) * up`. With scales that are powers of two every number is exactly what it was, times a
power of two, and in fp32 the output is the same bit for bit. Source: Xiao et al., SmoothQuant, ICML 2023.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.mods.claims import Claim, listing, walk
from loka.mods.trial.equivalent import (
    MIN_GAIN,
    NOT_CALLED,
    EquivalentMod,
    Place,
    Proposal,
    Refusal,
    checked_recipe,
    exact,
    linears,
    renewed,
    unsuited,
)
from loka.mods.trial.gain import rounding_error
from loka.mods.trial.observe import Traffic
from loka.scaled_norms import is_scaled_norm, unlike

# What is tried where no alpha is given.
ALPHAS: Final[tuple[float, ...]] = (0.35, 0.5, 0.65, 0.8)
# Scales stay within 2^-12 and 2^12, far from where fp16 ends.
_REACH: Final[float] = 12.0

UNFED: Final[str] = "its input is written by no norm and no linear whose output only linears read: Hadamard needs none"

Named = tuple[str, nn.Linear]


@dataclass(frozen=True, slots=True)
class Smooth(EquivalentMod):
    """Move scales from inputs to weights, wherever that lowers the error of the products behind.

    `alpha`: how much of the inputs' spread moves, 0 to 1; None tries several at each place. `recipe`: under which the
    error is measured, on rows that the linears got. A place stays as it was where the error does not fall by 1 %.
    `power_of_two=False` takes the scales as they come: a little closer to the optimum, at the price of one more
    rounding of every weight. `only`: patterns of the linears whose inputs are smoothed.

    Keys and shapes of the state_dict stay; an old checkpoint, loaded as a whole, brings the old scales back.
    """

    alpha: float | None = 0.5
    recipe: str = "rowwise"
    power_of_two: bool = True
    only: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse an alpha or recipe that cannot be meant."""
        alpha = self.alpha
        if alpha is not None and (not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 <= alpha <= 1):
            raise ArgumentError(f"alpha={alpha!r}: give a number from 0 to 1, or None to have several tried.")
        checked_recipe(self.recipe)

    def measures(self, model: nn.Module) -> Iterable[nn.Linear]:
        """Measure all: linears with one input are smoothed together."""
        return linears(model).values()

    def proposals(self, model: nn.Module, traffic: Traffic) -> Iterable[Proposal]:
        """Propose each norm and linear whose output only linears read."""
        names = {id(module): (fqn, module) for fqn, module in linears(model).items()}
        chosen = {id(module) for module in linears(model, self.only).values()}
        unfed = set(chosen) if self.only is not None else set()
        for fqn, producer in _producers(model):
            ids, why = traffic.readers(producer, exact=False)
            meant = chosen.intersection(traffic.reached(producer)) if self.only is not None else chosen
            if why or not chosen.intersection(ids):
                if why and meant and (self.only is not None or is_scaled_norm(producer)):
                    unfed.difference_update(meant)
                    yield Refusal(fqn=fqn, mod=self.name, reason=why)
                continue
            unfed.difference_update(ids)
            behind = [names[reader] for reader in ids]
            why = _refusal(producer, behind, traffic)
            yield Refusal(fqn=fqn, mod=self.name, reason=why) if why else self._best(fqn, producer, behind, traffic)
        for fqn, module in names.values():
            if id(module) in unfed:
                yield Refusal(fqn=fqn, mod=self.name, reason=UNFED)

    def nothing_found(self, model: nn.Module) -> str:
        """Say what was looked for."""
        return "It looks for norms and linears whose output only linears read; none was found."

    def _best(self, fqn: str, producer: nn.Module, behind: list[Named], traffic: Traffic) -> Proposal:
        """Measure each alpha; propose the best one, or say that none lowers the error."""
        weights = [linear.weight.detach().float() for _, linear in behind]
        seen = [traffic.linears[id(linear)] for _, linear in behind]
        loud = torch.stack([each.amax for each in seen if each.amax is not None]).amax(0)
        rows = [each.rows for each in seen]
        recipe = checked_recipe(self.recipe)
        pairs = list(zip(rows, weights, strict=True))
        before = sum(rounding_error(x, w, recipe) for x, w in pairs) / len(pairs)
        tried = []
        for alpha in ALPHAS if self.alpha is None else (self.alpha,):
            s = scales(loud, torch.stack([w.abs().amax(0) for w in weights]).amax(0), alpha, self.power_of_two)
            errors = [rounding_error(x, w, recipe, lambda x, w, s=s: (x / s, w * s)) for x, w in pairs]  # type: ignore[misc]
            tried.append((sum(errors) / len(errors), alpha, s))
        after, alpha, s = min(tried, key=lambda each: each[0])
        figures = f"error under {self.recipe} {before:.4f} -> {after:.4f} with alpha {alpha}"
        if not after <= (1 - MIN_GAIN) * before:
            return Refusal(fqn=fqn, mod=self.name, reason=f"nothing is gained there: {figures}", figure=after)
        return self._place(fqn, producer, behind, s, figures)

    def _place(self, fqn: str, producer: nn.Module, behind: list[Named], s: Tensor, figures: str) -> Place:
        into = listing(name for name, _ in behind)
        claims = []
        for slot, parameter in producer._parameters.items():
            if parameter is not None:
                claims.append(
                    Claim(
                        mod=self.name,
                        fqn=fqn,
                        module=producer,
                        slot=slot,
                        build=lambda slot=slot: _scaled(producer, slot, 1 / exact(s), rows=True),  # type: ignore[misc]
                        reason=f"scales go into {into}: {figures}",
                    )
                )
        for name, linear in behind:
            claims.append(
                Claim(
                    mod=self.name,
                    fqn=name,
                    module=linear,
                    slot="weight",
                    build=lambda linear=linear: _scaled(linear, "weight", exact(s), rows=False),  # type: ignore[misc]
                    reason=f"takes in scales of {fqn!r}",
                )
            )
        return Place(mod=self.name, fqn=fqn, claims=tuple(claims))


def scales(loud: Tensor, weight: Tensor, alpha: float, power_of_two: bool) -> Tensor:
    """Return s [k] from the amax of each feature and of each weight column; 1 where either is zero or not finite."""
    s = (loud**alpha / weight ** (1 - alpha)).log2()
    usable = (loud > 0) & (weight > 0) & s.isfinite()
    if not bool(usable.any()):
        return torch.ones_like(loud)
    s = (s - s[usable].median()).clamp(-_REACH, _REACH)
    return torch.exp2(torch.where(usable, s.round() if power_of_two else s, 0.0))


def _producers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    known = {id(linear) for linear in linears(model).values()}
    for fqn, module in walk(model):
        norm = is_scaled_norm(module)
        if id(module) not in seen and (norm or id(module) in known):
            seen.add(id(module))
            yield fqn, module


def _scaled(module: nn.Module, slot: str, by: Tensor, *, rows: bool) -> nn.Parameter:
    parameter = module._parameters[slot]
    assert parameter is not None
    return renewed(parameter, exact(parameter) * (by.unsqueeze(1) if rows and parameter.dim() == 2 else by))


def _refusal(producer: nn.Module, behind: list[Named], traffic: Traffic) -> str:
    for module in (producer, *(linear for _, linear in behind)):
        reader = traffic.foreign.get(id(module))
        if reader:
            return f"its parameters, or those of a linear behind it, are also read by {reader}"
        if unsuited(module):
            return f"of a module there: {unsuited(module)}"
    if is_scaled_norm(producer) and unlike(producer):
        return unlike(producer)
    weight = producer._parameters["weight"]
    assert weight is not None
    if any(linear.weight.device != weight.device for _, linear in behind):
        return "the linears behind it are on another device"
    return "" if all(traffic.measured(linear) is not None for _, linear in behind) else NOT_CALLED
