"""torch modules that read what belongs to their children, instead of calling them.

In eval mode without gradients `nn.TransformerEncoderLayer` hands the weights of its linears and norms to one fused
kernel, and the activation as a flag. A replaced norm or activation would be passed over without a word, a removed bias
would crash. Each such module has a switch that sends it the ordinary way, through its children; `side_claims` turns it
wherever something below is rewritten, so that the change is recorded and undone with the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from torch import nn

from loka.errors import ModError
from loka.mods.claims import Claim, walk

# (module, attribute, value that keeps it off the fused kernel). The encoder converts padded batches to nested tensors,
# which only the fused kernel of its layers can read.
_SWITCHES: Final[tuple[tuple[type[nn.Module], str, object], ...]] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


@contextmanager
def through_children(model: nn.Module) -> Iterator[None]:
    """Send every such module the ordinary way, for as long as the scope lasts: its children are then called."""
    turned = [
        (module, attribute, getattr(module, attribute), value)
        for module in model.modules()
        for kind, attribute, value in _SWITCHES
        if isinstance(module, kind) and getattr(module, attribute, None)
    ]
    for module, attribute, _, value in turned:
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, before, _ in turned:
            setattr(module, attribute, before)


def side_claims(model: nn.Module, claims: Sequence[Claim]) -> list[Claim]:
    """Return the switches to turn for these claims. Raises ModError where a module has none."""
    by_module = {id(claim.module): claim for claim in reversed(claims)}
    places = {(id(claim.module), claim.slot): claim for claim in claims}
    switches: dict[int, Claim] = {}
    for fqn, module in walk(model):
        if isinstance(module, nn.MultiheadAttention):
            _check_attention(fqn, module, places)
        for kind, attribute, value in _SWITCHES:
            if not isinstance(module, kind) or not getattr(module, attribute, None) or id(module) in switches:
                continue
            cause = next((by_module[id(inner)] for inner in module.modules() if id(inner) in by_module), None)
            if cause is not None and (cause.module is not module or cause.slot):
                switches[id(module)] = Claim(
                    mod=cause.mod,
                    fqn=fqn,
                    module=module,
                    slot=attribute,
                    build=lambda value=value: value,  # type: ignore[misc]
                    reason=f"its fused inference path would pass over {cause.name!r}",
                )
    return list(switches.values())


def _check_attention(fqn: str, attention: nn.MultiheadAttention, places: Mapping[tuple[int, str], Claim]) -> None:
    whole = places.get((id(attention.out_proj), ""))
    if whole is not None:
        raise ModError(
            f"{whole.mod} cannot replace {whole.name!r}: nn.MultiheadAttention reads the weight of its output "
            "projection and never calls it. Leave it out with filter_fn. Nothing was changed."
        )
    removed = places.get((id(attention.out_proj), "bias"))
    if removed and attention.in_proj_bias is not None and (id(attention), "in_proj_bias") not in places:
        raise ModError(
            f"{removed.mod} cannot remove {removed.name!r} alone: the fused kernel of nn.MultiheadAttention {fqn!r} "
            "needs both of its biases or neither. Keep both or remove both (with filter_fn: let it pass the attention "
            "itself, too). Nothing was changed."
        )
