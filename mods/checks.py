"""What `apply` refuses, and why: every check runs before the model is touched.

Ready:     the model is neither compiled, wrapped, scripted nor converted, for each of these has looked at the modules
           already and would go on using the old ones.
Gathered:  each mod finds something; a module registered under several names is claimed under all or none of them.
Conflict:  no two claims on one place, none inside a module that is replaced whole. One exception: emptying a parameter
           of a module whose replacement has no such parameter. Both mods get what they asked for.
Built:     a tied parameter leaves all of its places or none; nothing else holds on to a replaced module.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Final

from torch import nn

from loka.calls import is_compiled, is_watched
from loka.errors import ModError
from loka.made_classes import made_in
from loka.mods.claims import CARRIED_HOOKS, Claim, FilterFn, Mod, listing, walk
from loka.naming import clean_fqn

# Class names, for importing FSDP or TorchScript only to know them would cost every user of mods.
_WRAPPERS: Final[Mapping[str, str]] = {
    "DistributedDataParallel": "wrapped in DistributedDataParallel, which has bucketed its parameters",
    "FullyShardedDataParallel": "wrapped in FSDP, which has sharded its parameters",
    "FSDPModule": "sharded by fully_shard",
    "ScriptModule": "a TorchScript module, whose code is fixed",
}
# What nn.Module itself keeps in the instance dict; anything else there is the user's.
_MODULE_INTERNALS: Final[frozenset[str]] = frozenset(vars(nn.Module()))
_STATE_HOOKS: Final[tuple[str, ...]] = tuple(
    name for name in sorted(_MODULE_INTERNALS) if name.endswith("_hooks") and name not in CARRIED_HOOKS
)


def refuse_unready(model: nn.Module) -> None:
    """Raise ModError for a model that something else has taken hold of already."""
    for fqn, module in walk(model):
        why = _taken(module)
        if why:
            where = f"Module {fqn!r}" if fqn else f"The model ({type(module).__name__})"
            raise ModError(
                f"{where} is {why}. Mods are applied to the plain model: apply them first, then wrap, convert or "
                "compile. Nothing was changed."
            )


def _taken(module: nn.Module) -> str:
    if is_watched(module):
        return "watched by a probe or a monitor, which know it as it was when their block began"
    if "_orig_mod" in module._modules or is_compiled(module):
        return "compiled (torch.compile), and the compiled code would go on running the old modules"
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS:
            return _WRAPPERS[kind.__name__]
    if any(home.startswith("loka.dispatch") for home in made_in(type(module))):  # conversion swaps the class
        return "converted (loka.convert), by a plan that was made for the model as it is"
    return ""


def gather(model: nn.Module, mod: Mod, filter_fn: FilterFn | None) -> list[Claim]:
    """Return the claims of one mod that `filter_fn` lets through, one per place. Raises ModError if there is none."""
    claims = list(mod.claims(model))
    if not claims:
        raise ModError(f"{mod.name} found nothing to replace. {mod.nothing_found(model)} Nothing was changed.")
    allowed = [claim for claim in claims if filter_fn is None or filter_fn(claim.module, claim.fqn)]
    if not allowed:
        raise ModError(
            f"{mod.name} found nothing to replace: filter_fn refused all {len(claims)} candidates, "
            f"{listing(claim.name for claim in claims)}. Widen filter_fn or leave {mod.name} out. Nothing was changed."
        )
    for claim in allowed:
        refusal = claim.refusal or irreplaceable(claim)
        if refusal:
            raise ModError(f"{mod.name} cannot rewrite {claim.name!r}: {refusal} Nothing was changed.")
    names: dict[int, list[str]] = {}
    for fqn, module in walk(model):
        names.setdefault(id(module), []).append(fqn)
    groups: dict[tuple[int, str], list[Claim]] = {}
    for claim in allowed:
        groups.setdefault((id(claim.module), claim.slot), []).append(claim)
    for group in groups.values():
        _check_every_name(group, names[id(group[0].module)])
    return [group[0] for group in groups.values()]


def irreplaceable(claim: Claim) -> str:
    """Return why this module or slot cannot be replaced at all, in words, or an empty string."""
    module = claim.module
    if not claim.fqn and not claim.slot:
        return "it is the model itself, which has no parent to hold the replacement. Put it into an nn.Sequential."
    if "forward" in vars(module):
        return (
            "its forward was overridden on the instance (by an offload hook or a patch). Remove the override, or "
            "leave this module out with filter_fn."
        )
    if not claim.slot and any(vars(module).get(name) for name in _STATE_HOOKS):
        return (
            "it has state_dict hooks, which act on keys that would no longer exist. Remove them, or leave this module "
            "out with filter_fn."
        )
    return ""


def _check_every_name(group: Sequence[Claim], names: Sequence[str]) -> None:
    claimed = {claim.fqn: claim for claim in group}
    left = [fqn for fqn in names if fqn not in claimed]
    if left:
        raise ModError(
            f"{type(group[0].module).__name__} is one module registered as {listing(claimed)} and as {listing(left)}, "
            f"and {group[0].mod} would rewrite it under the first name only. Select all of its names or none. "
            "Nothing was changed."
        )


def without_conflicts(claims: Sequence[Claim]) -> tuple[list[Claim], list[tuple[Claim, Claim]]]:
    """Return the claims to carry out, and pairs (removal of a slot, replacement of the whole module).

    Such a pair agrees if the replacement has no such slot. Raises ModError for any other two claims that meet.
    """
    places: dict[tuple[int, str], Claim] = {}
    for claim in claims:
        other = places.setdefault((id(claim.module), claim.slot), claim)
        if other is not claim:
            raise _conflict(other, claim)
    satisfied: list[tuple[Claim, Claim]] = []
    by_module: dict[int, list[Claim]] = {}
    for claim in claims:
        by_module.setdefault(id(claim.module), []).append(claim)
    for whole in (claim for claim in claims if not claim.slot):
        for inner in whole.module.modules():
            for claim in by_module.get(id(inner), ()):
                if claim is whole:
                    continue
                if inner is not whole.module or claim.build is not None:
                    raise _conflict(whole, claim)
                satisfied.append((claim, whole))
    gone = {id(claim) for claim, _ in satisfied}
    return [claim for claim in claims if id(claim) not in gone], satisfied


def _conflict(first: Claim, second: Claim) -> ModError:
    places = f"{first.name!r}" if first.name == second.name else f"{first.name!r}, and with it {second.name!r}"
    return ModError(
        f"{first.mod} and {second.mod} both want to replace {places}. Narrow one of them with its patterns or with "
        "filter_fn, or leave one out. Nothing was changed."
    )


def check_built(
    model: nn.Module, built: Sequence[tuple[Claim, object]], satisfied: Sequence[tuple[Claim, Claim]]
) -> None:
    """Check what only the finished replacements can tell. Raises ModError."""
    after = {id(claim): value for claim, value in built}
    for removal, whole in satisfied:
        if getattr(after[id(whole)], removal.slot, None) is not None:
            raise _conflict(whole, removal)
    _check_tied(model, built)
    replaced = {id(claim.module): claim for claim, _ in built if not claim.slot}
    for fqn, module in walk(model):
        for attribute, value in vars(module).items():
            if attribute in _MODULE_INTERNALS:
                continue
            for held in _held(value):
                if id(held) in replaced:
                    claim = replaced[id(held)]
                    holder = f"{fqn}.{attribute}" if fqn else attribute
                    raise ModError(
                        f"{claim.mod} cannot replace {claim.name!r}: the plain attribute {holder!r} holds the same "
                        "module and would go on using it. Register it as a submodule there, or leave it out with "
                        "filter_fn. Nothing was changed."
                    )


def _held(value: object) -> Iterator[nn.Module]:
    """Yield modules that a plain attribute holds: itself, in a container, or through a bound method."""
    if isinstance(value, dict):
        values: Sequence[object] = tuple(value.values())
    else:
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
    for item in values:
        held = item.__self__ if isinstance(item, MethodType) else item
        if isinstance(held, nn.Module):
            yield held


def _check_tied(model: nn.Module, built: Sequence[tuple[Claim, object]]) -> None:
    going = {place: claim for claim, value in built for place in _leaving(claim, value)}
    homes: dict[int, list[tuple[tuple[int, str], str]]] = {}
    for fqn, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = clean_fqn(f"{fqn}.{key}" if fqn else key)
                homes.setdefault(id(parameter), []).append(((id(module), key), name))
    for places in homes.values():
        leaving = [(place, name) for place, name in places if place in going]
        staying = [name for place, name in places if place not in going]
        if leaving and staying:
            claim = going[leaving[0][0]]
            raise ModError(
                f"{claim.mod} would replace {leaving[0][1]!r}, which is tied to {staying[0]!r}, and leave the latter "
                "as it is. Untie them, or select both or neither. Nothing was changed."
            )


def _leaving(claim: Claim, value: object) -> Iterator[tuple[int, str]]:
    """Yield the (module, key) of each parameter that is no longer used once the claim is carried out."""
    if claim.slot:
        if claim.slot in claim.module._parameters:
            yield id(claim.module), claim.slot
        return
    kept = {id(parameter) for parameter in value.parameters()} if isinstance(value, nn.Module) else set()
    for module in claim.module.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                yield id(module), key
