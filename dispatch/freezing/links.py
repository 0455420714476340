"""Which layers of a frozen model hand FP8 to another one in the model's own code, where a plan says that they may.

A plan knows from the run that it rests on what goes from one layer to another one and to nothing else. Here it is asked
of the model at hand: both are layers that run their stored weight themselves, the kernel of the first can quantise its
result by the recipe of the second, and the second one's takes codes. Neighbours in an nn.Sequential, whose forward
hands on by itself (`chained`), need none of it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from loka.dispatch.freezing.frozen_modules import frozen_kind
from loka.dispatch.freezing.handing import storage_of, takes_codes, writer_of
from loka.dispatch.running.convert import FROZEN
from loka.kernel_registry.norm_act import can_write


def link(modules: Mapping[str, nn.Module], planned: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """Have layers of a frozen model hand on codes as planned; return all that do, each with who reads them.

    `modules` by site, as `planned` and `known` have them; the latter hand on already.
    """
    found = dict(known)
    for site, reader in planned.items():
        first, then = modules.get(site), modules.get(reader)
        if site in known or first is None or then is None or first is then:
            continue
        recipe = _recipe(first, then)
        if recipe:
            frozen = cast("dict[str, Any]", getattr(first, FROZEN))
            frozen["weight"] = replace(frozen["weight"], hands=recipe, reader=reader)
            found[site] = reader
    return found


def _recipe(first: nn.Module, then: nn.Module) -> str:
    """Return the recipe under which one layer can write what another one reads, "" where it cannot."""
    if frozen_kind(first) != "Joint" or frozen_kind(then) is None:
        return ""
    layer, features, reads = writer_of(first), storage_of(first).shape[0], storage_of(then).reads
    fits = bool(reads) and storage_of(then).shape[1] == features and takes_codes(then)
    return reads if layer is not None and fits and can_write(layer, reads, features) else ""
