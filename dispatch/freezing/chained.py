"""FP8 from one frozen layer to the next: one with norm and activation writes the codes that the next multiplies.

Where an nn.Sequential runs such a layer and then a product, and nothing in between, nobody else sees what goes from the
one to the other. The kernel of the first then quantises its result by the recipe of the second: FP8 is written once and
read once, in place of a result in high precision that a kernel of its own reads and quantises. The numbers are those of
quantising that result, rounded to the type of the model. The sequence decides with every call: under autocast, where a
hook watches one of the modules, or where one was replaced, each runs by itself, as it does when it is called alone.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from loka.dispatch.freezing.frozen_modules import frozen_kind
from loka.dispatch.freezing.handed import Handed, read_by
from loka.dispatch.freezing.handing import Passed, is_bare, is_ready, runs_apart, storage_of, takes_codes, writer_of
from loka.dispatch.freezing.handing import run as _run
from loka.made_classes import make_class


def chain(model: nn.Module) -> dict[str, str]:
    """Have every nn.Sequential of a frozen model hand on codes where it can; return sites and those that read them."""
    found: dict[str, str] = {}
    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        children = list(module)
        pairs = {}
        for at in range(len(children)):
            reader = _reader(children, at, while_training=True)
            if reader is not None:
                pairs[storage_of(children[at]).site] = storage_of(reader).site
        if pairs and "forward" not in vars(module):
            module.__class__ = _chained_class(type(module))
            found |= pairs
    return found


# --- the sequence ---


def _chained_class(base: Any) -> Any:
    """Make the class that a sequence of class `base` becomes."""
    members = {"forward": _forward, "__module__": __name__, "__doc__": None}
    return make_class(f"Chained{base.__name__}", base, members, _chained_class, base)


def _forward(self: Any, input: Any) -> Any:
    modules = list(self)
    value, apart = input, runs_apart(input)
    for at, module in enumerate(modules):
        if isinstance(value, Passed) and _hands_on(module):
            continue
        reader = None if apart else _reader(modules, at)
        if reader is not None:
            value = read_by(module, value) if isinstance(value, Handed) else value
            value = _run(module, value, storage_of(reader).reads)
        elif isinstance(value, Passed):
            value = _run(module, value, storage_of(module).hands if is_bare(module) else "")
            value = Handed.of(value, module) if isinstance(value, Passed) else value  # for a layer behind the sequence
        else:
            value = module(value)
    return value


def _reader(modules: Sequence[nn.Module], at: int, *, while_training: bool = False) -> nn.Module | None:
    """Return the module that takes the result of one of a sequence as codes, None where that is not so."""
    writer = modules[at]
    if frozen_kind(writer) != "Joint" or not is_ready(writer):
        return None
    storage, layer = storage_of(writer), writer_of(writer)
    if layer is None:
        return None
    for module in modules[at + 1 :]:
        if _hands_on(module, while_training=while_training):
            continue
        if frozen_kind(module) is None or not is_ready(module):
            return None
        reads, fits = storage_of(module).reads, storage_of(module).shape[1] == storage.shape[0]
        return module if fits and reads and layer.writes(reads, storage.shape[0]) and takes_codes(module) else None
    return None


def _hands_on(module: nn.Module, *, while_training: bool = False) -> bool:
    """Whether a module returns what it is given, and nobody watches it do so."""
    same = type(module) is nn.Identity or (type(module) is nn.Dropout and (while_training or not module.training))
    return same and is_bare(module)
