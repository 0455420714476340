"""Which part a site plays in a layer of experts, told from the names and shapes of the model's parameters alone.

A stack of weights [experts, rows, columns] makes its module a layer of experts where the module is called so or has a
router beside it. In such a layer what is called a router is one, as is a matrix with as many rows as there are experts,
whatever it is called; what has `shared` in its name, in the layer or beside it, is run by every token.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Final, Literal

Part = Literal["router", "shared", "expert"]

_SHARED: Final = re.compile(r"(^|[._])shared([._]|$)")
# What models call the module that chooses experts.
_ROUTER: Final = re.compile(r"(router|gate|gating)(\.|$)")
# Layers that keep their experts as modules of their own: `experts.3.w1`, `experts.expert_3.wi`.
_NUMBERED: Final = re.compile(r"^(?P<layer>.*experts?)\.(expert_)?(?P<expert>\d+)\.")
# Layers that keep them one below the other in a matrix: `experts.mlp.w1`.
_STACKED_ROWS: Final = re.compile(r"^(?P<layer>.*)\.experts\.")


def parts_of(fingerprint: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """Return the part of each parameter that has one: parameter FQN -> part."""
    routers = _routers(fingerprint)
    layers: dict[str, set[int]] = defaultdict(set)  # the module that holds router and experts -> experts
    stacks: set[str] = set()  # modules that hold the experts' weights
    found: dict[str, Part] = {}
    for name, shape in fingerprint.items():
        numbered = _NUMBERED.match(name)
        if numbered is not None:
            layer = _above(numbered["layer"])
            layers[layer] = {max(*layers[layer], int(numbered["expert"]) + 1, 0)}
            found[name] = "expert"
        elif (stack := _stack(name, shape, routers)) is not None:
            layer, experts = stack
            layers[layer].add(experts)
            stacks.add(_above(name))
            found[name] = "expert"
    beside = {_above(layer) for layer in layers if layer}
    for name, shape in fingerprint.items():
        if name not in found and (part := _part(name, shape, layers, stacks)) is not None:
            found[name] = part
        elif name not in found and _is_shared_in(name, beside):
            found[name] = "shared"
    return found


def _part(name: str, shape: tuple[int, ...], layers: Mapping[str, set[int]], stacks: Collection[str]) -> Part | None:
    """Return the part of a parameter in the layer around it; None where it has none or there is no layer."""
    around = next((each for each in _enclosing(name) if each in layers), None)
    if around is None:
        return None
    inner = name.removeprefix(f"{around}.")
    if _SHARED.search(inner):
        return "shared"
    if _above(name) in stacks and shape[:1] and shape[0] in layers[around] and not _ROUTER.match(inner):
        return "expert"  # a bias
    is_router = len(shape) == 2 and (_ROUTER.match(inner) or not layers[around].isdisjoint(shape))
    return "router" if is_router else None


def _routers(fingerprint: Mapping[str, tuple[int, ...]]) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes of the matrices that are called routers, by the module that they choose experts for."""
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, shape in fingerprint.items():
        for layer in _enclosing(name)[1:] if len(shape) == 2 else ():
            if _ROUTER.match(name.removeprefix(f"{layer}.") if layer else name):
                found[layer].add(shape)
    return found


def _stack(name: str, shape: tuple[int, ...], routers: Mapping[str, set[tuple[int, ...]]]) -> tuple[str, int] | None:
    """Return the layer that a parameter holds all experts of, and how many these are; None for any other parameter."""
    holder = _above(name)
    if len(shape) == 3 and shape[0] > 1:
        if "expert" in holder.rpartition(".")[2]:
            return _above(holder), shape[0]
        # A router tells where nothing else does: it has a row for each of them, and reads what they read.
        return next(
            (
                (layer, shape[0])
                for layer in (holder, _above(holder))
                if any(rows == shape[0] and width in shape[1:] for rows, width in routers.get(layer, ()))
            ),
            None,
        )
    rows = _STACKED_ROWS.match(name)
    if rows is None or len(shape) != 2:
        return None
    fitting = (each for each, width in routers.get(rows["layer"], ()) if width in shape and not shape[0] % each)
    return next(((rows["layer"], each) for each in fitting if shape[0] > each > 1), None)


def _is_shared_in(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter is of something in one of these modules that is called shared."""
    around = next((each for each in _enclosing(name) if each in modules), None)
    return around is not None and _SHARED.match(name.removeprefix(f"{around}.") if around else name) is not None


def unseen_experts(fingerprint: Mapping[str, tuple[int, ...]], seen: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return, by layer, the experts that are modules of their own and of which no parameter was `seen`.

    An expert without tokens does not run, and so leaves no trace of its own. Layers of which no expert was seen are
    left out: they were not looked at.
    """
    experts: dict[str, set[int]] = {}
    active: dict[str, set[int]] = {}
    for name in fingerprint:
        if (numbered := _NUMBERED.match(name)) is not None:
            experts.setdefault(numbered["layer"], set()).add(int(numbered["expert"]))
            if name in seen:
                active.setdefault(numbered["layer"], set()).add(int(numbered["expert"]))
    return {
        layer: tuple(sorted(idle))
        for layer, numbers in experts.items()
        if layer in active and (idle := numbers - active[layer])
    }


def _above(name: str) -> str:
    return name.rpartition(".")[0]


def _enclosing(name: str) -> list[str]:
    """Return the modules around a parameter, the nearest four: a router may be a network."""
    result = []
    for _ in range(4):
        name = _above(name)
        result.append(name)
        if not name:
            break
    return result
