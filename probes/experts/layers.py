"""Which part a site plays in a layer of experts, told from the shapes of the model's parameters alone.

A stack of weights [experts, rows, columns] makes its module a layer of experts. Beside it, the matrix with as many rows
as there are experts is the router, whatever it is called, and what has `shared` in its name is run by every token.
"""

import re
from collections.abc import Collection, Mapping
from typing import Final, Literal

Part = Literal["router", "shared", "expert"]

_SHARED: Final = re.compile(r"(^|[._])shared([._]|$)")
# Layers that keep their experts as modules of their own: `experts.3.w1`, `experts.expert_3.wi`.
_NUMBERED: Final = re.compile(r"^(?P<layer>.*experts?)\.(expert_)?(?P<expert>\d+)\.")


def parts_of(fingerprint: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """Return the part of each parameter that has one: parameter FQN -> part."""
    layers: dict[str, int] = {}  # the module that holds router and experts -> experts
    stacks: set[str] = set()  # modules that hold the experts' weights
    found: dict[str, Part] = {}
    for name, shape in fingerprint.items():
        numbered = _NUMBERED.match(name)
        if numbered is not None:
            layer = _above(numbered["layer"])
            layers[layer] = max(layers.get(layer, 0), int(numbered["expert"]) + 1)
            found[name] = "expert"
        elif len(shape) == 3 and shape[0] > 1 and "expert" in _above(name).rpartition(".")[2]:
            layers[_above(_above(name))] = shape[0]
            stacks.add(_above(name))
            found[name] = "expert"
    for name, shape in fingerprint.items():
        around = next((each for each in _enclosing(name) if each in layers), None)
        if around is None or name in found:
            continue
        if _above(name) in stacks:
            found[name] = "expert"  # a bias
        elif _SHARED.search(name.removeprefix(around)):
            found[name] = "shared"
        elif len(shape) == 2 and layers[around] in shape:
            found[name] = "router"
    return found


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
    """Return the modules around a parameter, the nearest three: a router may be wrapped."""
    result = []
    for _ in range(3):
        name = _above(name)
        result.append(name)
        if not name:
            break
    return result
