"""NoBias: no additive bias anywhere but in the prediction heads.

Biases are among the parameters that never settle in long training; the large ones push later activations out of the
range of FP8, where clamping and rounding then erase the small values. LoKA removes all of them except in the final
prediction layer, where the bias carries the base rate.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from torch import Tensor, nn

from loka.errors import LokaWarning
from loka.mods.claims import Claim, Mod, listing, walk
from loka.mods.fused_linear import FusedLinearNormAct
from loka.mods.heads import CONVOLUTIONS, TRANSPOSED, Heads, find_heads
from loka.numerics import MIN_COLUMNS
from loka.selection import Selection, select

_BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS: Final = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Modules whose own forward takes None for the bias, and the name of that bias. The extra key and value tokens of
# attention, bias_k and bias_v, are not added to anything and stay.
_SLOTS: Final[Mapping[type[nn.Module], str]] = {
    nn.MultiheadAttention: "in_proj_bias",
    **dict.fromkeys((nn.Linear, nn.Bilinear, FusedLinearNormAct, *CONVOLUTIONS, *TRANSPOSED), "bias"),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, *_BATCH_NORMS, *_INSTANCE_NORMS), "bias"),
}
# The same by the name of the class whose forward a module runs, for those who know no more of it.
BIAS_SLOTS: Final[Mapping[str, str]] = {kind.__name__: slot for kind, slot in _SLOTS.items()}


@dataclass(frozen=True, slots=True)
class NoBias(Mod):
    """Remove the bias of linears, convolutions, norms and attention projections, except in prediction heads.

    `keep`: patterns (see `loka.selection`) of modules that keep theirs; a pattern that names a container keeps all
    inside it, `[]` keeps nothing. By default the heads are found: the layers whose output reaches the output of the
    model without another product, in a symbolic trace of the model or, if `example` is given (the arguments of its
    forward as a tuple or a dict), in a run on that. Where the model cannot be traced, they are guessed from sizes. The
    reason in each replacement says what was kept, and how it was found. A bias in a module of another kind (an nn.LSTM,
    your own) stays, as does one that the trace has seen code outside of its layer read, with a LokaWarning that names
    it; name it in `keep` if that is intended.

    Weights stay the same objects. Checkpoints: the removed `...bias` and `...in_proj_bias` keys are gone from the
    state_dict. An old checkpoint loads before `apply`, or after it with `load_state_dict(..., strict=False)`. Either
    way the model computes something else without its biases and has to be trained further.
    """

    keep: str | Sequence[str] | None = None
    example: object = field(default=None, repr=False, compare=False)

    kind: ClassVar[Literal["equivalent", "architectural"]] = "architectural"

    def __post_init__(self) -> None:
        """Refuse a malformed pattern here, not at the time of use."""
        Selection(self.keep or ())

    def claims(self, model: nn.Module) -> Iterable[Claim]:
        """Claim each bias that is there and not kept. Raises ArgumentError if a `keep` pattern matches nothing."""
        known = list(_known(model))
        unknown = _unknown(model)
        heads = find_heads(model, self.example) if self.keep is None else Heads()
        names = [_join(fqn, slot) for fqn, _, slot in known] + list(unknown)
        kept = set(select(self.keep or (), names, what="module with a bias", inside=True))
        stays = [*heads.layers.values()] or [name for name in names if name in kept]
        which = f"{listing(stays) or 'none'}{f', {heads.how}' if heads.how else ''}"
        strangers = [
            name
            for name, parameter in unknown.items()
            if name not in kept
            and id(parameter) not in heads.parameters
            and not (self.keep is None and parameter.numel() < MIN_COLUMNS)
        ]
        _warn_of(strangers, "a bias in a module of a kind it does not know")
        for fqn, module, slot in known:
            if getattr(module, slot) is None or id(module) in heads.layers or _join(fqn, slot) in kept:
                continue
            refusal = _refusal(module, slot)
            if not refusal and id(getattr(module, slot)) in heads.elsewhere:
                _warn_of([_join(fqn, slot)], "code outside of its layer reads it")
                continue
            yield Claim(
                mod=self.name,
                fqn=fqn,
                module=module,
                slot=slot,
                reason=f"bias removed, kept: {which}",
                refusal=refusal,
            )

    def nothing_found(self, model: nn.Module) -> str:
        """Name the biases that are kept, or say that there are none."""
        places = {_join(fqn, slot): getattr(module, slot) is not None for fqn, module, slot in _known(model)}
        left = [name for name, present in places.items() if present]
        if left:
            others = f"; the other {len(places) - len(left)} have none" if len(left) < len(places) else ""
            return f"All {len(left)} biases there are kept: {listing(left)}{others}. {self._why_kept(model, len(left))}"
        if places:
            return f"None of the {len(places)} linears, convolutions and norms has a bias: it is applied already."
        kinds = listing(type(module).__name__ for module in model.modules())
        return f"It looks for linears, convolutions, norms and attention; this model consists of {kinds}."

    def _why_kept(self, model: nn.Module, left: int) -> str:
        if self.keep is not None:
            return "Narrow `keep`, or it is applied already."
        heads = find_heads(model, self.example)
        read = [
            _join(fqn, slot)
            for fqn, module, slot in _known(model)
            if id(getattr(module, slot)) in heads.elsewhere and id(module) not in heads.layers
        ]
        of_heads = f"are those of layers {heads.how}" if heads.how else "belong to prediction heads"
        which = f"They {of_heads}"
        if read:
            others = f"; the others {of_heads}" if len(read) < left else ""
            which = f"Code outside of its layer reads {listing(read)}{others}"
        return f"{which}. Name in `keep` those that are heads, [] if none is; or it is applied already."


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for fqn, module in walk(model):
        slot = next((slot for kind, slot in _SLOTS.items() if isinstance(module, kind)), None)
        if slot is not None:
            yield fqn, module, slot


def _unknown(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters that are called bias and belong to a module of another kind."""
    known = {id(module) for _, module, _ in _known(model)}
    return {
        _join(fqn, key): parameter
        for fqn, module in walk(model)
        for key, parameter in module._parameters.items()
        if parameter is not None and "bias" in _own_name(fqn, key).split("_") and id(module) not in known
    }


def _own_name(fqn: str, key: str) -> str:
    """Return what a parameter is called; one in a list is called what the list is."""
    parts = [part for part in (*fqn.split("."), key) if part and not part.isdigit()]
    return parts[-1] if parts else key


def _refusal(module: nn.Module, slot: str) -> str:
    if not isinstance(module._parameters.get(slot), Tensor):
        return "its bias is not a plain parameter (parametrized or pruned). Remove that first, or name it in `keep`."
    if not any(type(module).forward is kind.forward for kind in _SLOTS):
        return (
            f"{type(module).__name__} has a forward of its own, which may need the bias. Name it in `keep`, and leave "
            "the bias out where the model is built."
        )
    return ""


def _warn_of(names: Iterable[str], why: str) -> None:
    left = list(names)
    if left:
        warnings.warn(
            f"NoBias leaves {listing(left)}: {why}. Remove it where the model is built, or name it in `keep` if it is "
            "meant to stay.",
            LokaWarning,
            stacklevel=6,
        )


def _join(fqn: str, slot: str) -> str:
    return f"{fqn}.{slot}" if fqn else slot
