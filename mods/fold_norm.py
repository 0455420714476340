"""FoldNorm: the scale and shift of a norm move into the linears that read it.

    W (n * scale + shift) + b  =  (W * scale) n + (b + W shift)

The norm becomes parameter-free: what enters the products is normalised and nothing else, one multiplication per element
is saved, and the next product can take the norm into its epilogue.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from loka.mods.claims import Claim, listing, walk
from loka.mods.trial.equivalent import EquivalentMod, Place, Proposal, Refusal, exact, linears, renewed, unsuited
from loka.mods.trial.observe import Traffic
from loka.scaled_norms import is_scaled_norm, shift_of, unlike, without_scale


@dataclass(frozen=True, slots=True)
class FoldNorm(EquivalentMod):
    """Fold nn.LayerNorm, nn.RMSNorm and RMS norms of other libraries into the linears behind them.

    A norm is folded where linears are the only readers of its output; a norm that a residual stream or the model's
    caller reads as well stays, with the reason in `Applied.refused`. So does one that trains where its linears are
    frozen, or the other way round.

    Checkpoints: the norm's keys are gone from the state_dict, the weights of the linears mean something else, and a
    linear without a bias gets one where the norm had a shift. Load an old checkpoint before `apply`.
    """

    def proposals(self, model: nn.Module, traffic: Traffic) -> Iterable[Proposal]:
        """Propose each norm that only linears read."""
        names = {id(module): (fqn, module) for fqn, module in linears(model).items()}
        seen: set[int] = set()
        for fqn, norm in walk(model):
            if id(norm) in seen or not is_scaled_norm(norm):
                continue
            seen.add(id(norm))
            ids, why = traffic.readers(norm, exact=True)
            behind = [names[reader] for reader in ids]
            why = why or _refusal(norm, [linear for _, linear in behind], traffic)
            yield Refusal(fqn=fqn, mod=self.name, reason=why) if why else self._place(fqn, norm, behind)

    def nothing_found(self, model: nn.Module) -> str:
        """Say what was looked for."""
        return "It looks for norms with a scale of their own, `weight`, over the last dimension; none was found."

    def _place(self, fqn: str, norm: nn.Module, behind: list[tuple[str, nn.Linear]]) -> Place:
        into = listing(name for name, _ in behind)
        claims = [
            Claim(
                mod=self.name,
                fqn=fqn,
                module=norm,
                build=lambda: without_scale(norm),
                reason=f"scale and shift go into {into}",
            )
        ]
        for name, linear in behind:
            claims.append(_claim(self.name, name, linear, "weight", fqn, lambda linear=linear: _weight(linear, norm)))
            shift = shift_of(norm)
            if shift is not None and bool((shift != 0).any()):
                claims.append(_claim(self.name, name, linear, "bias", fqn, lambda linear=linear: _bias(linear, norm)))
        return Place(mod=self.name, fqn=fqn, claims=tuple(claims))


def _claim(mod: str, fqn: str, module: nn.Module, slot: str, norm: str, build: object) -> Claim:
    return Claim(
        mod=mod,
        fqn=fqn,
        module=module,
        slot=slot,
        build=build,  # type: ignore[arg-type]  # a lambda with a default
        reason=f"takes in {'scale' if slot == 'weight' else 'shift'} of {norm!r}",
    )


def _weight(linear: nn.Linear, norm: nn.Module) -> nn.Parameter:
    scale = norm._parameters["weight"]
    assert scale is not None
    return renewed(linear.weight, exact(linear.weight) * exact(scale))


def _bias(linear: nn.Linear, norm: nn.Module) -> nn.Parameter:
    shift = shift_of(norm)
    assert shift is not None
    added = exact(linear.weight) @ exact(shift)
    old = linear.bias
    return renewed(linear.weight, added) if old is None else renewed(old, exact(old) + added)


def _refusal(norm: nn.Module, behind: list[nn.Linear], traffic: Traffic) -> str:
    for module in (norm, *behind):
        reader = traffic.foreign.get(id(module))
        if reader:
            return f"its parameters, or those of a linear behind it, are also read by {reader}"
        if unsuited(module):
            return f"of a module there: {unsuited(module)}"
    if unlike(norm):
        return unlike(norm)
    own = [parameter for parameter in norm._parameters.values() if parameter is not None]
    inside = [linear.weight for linear in behind]
    if len({parameter.requires_grad for parameter in (*own, *inside)}) > 1:
        return "some of its parameters and of those behind it are frozen and some train"
    if any(parameter.device != own[0].device for parameter in inside):
        return "the linears behind it are on another device"
    if not all(bool(torch.isfinite(parameter).all()) for parameter in own):
        return "its scale or shift is not finite"
    return ""
