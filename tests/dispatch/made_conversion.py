"""Plans made by hand for a model at hand, and real kernels that keep a record of their calls."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from torch import nn

from loka.bounds import Bound
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.plan import Plan
from loka.formats import PASSES
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.probes.capturing.sites import fingerprint

# A recipe of its own for every pass, so that a kernel in the wrong place shows.
MIXED = {"fprop": "rowwise", "dgrad": "tensorwise", "wgrad": "blockwise"}


needs_a_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="Inductor needs a C++ compiler"
)


def emulated(recipe):
    return f"emulated.linear.{recipe}"


def decision(site, product, recipe, *, kernel=None, dtype="float32", rejected=()):
    """One decision; recipe None is high precision. Sizes are those of no product: nothing here depends on them."""
    request = GemmRequest(site=site, product=product, op="linear", m=8, n=8, k=8, dtype=dtype)
    baseline = "torch.mm.fp32"
    return Decision(
        request=request,
        m_min=8,
        m_max=8,
        kernel=kernel or (baseline if recipe is None else emulated(recipe)),
        recipe=recipe,
        why="made by hand",
        baseline=baseline,
        baseline_time_us=1.3,
        time_us=1.0,
        time_source="assumed 1.3x",
        error_upper=0.01,
        horizon=None,
        rejected=rejected,
    )


def plan_for(model: nn.Module, recipes: Mapping[str, Mapping[str, str | None]] | list[str], **changes) -> Plan:
    """Plan sites of a model: site -> pass -> recipe, or a list of sites that get MIXED."""
    if not isinstance(recipes, Mapping):
        recipes = dict.fromkeys(recipes, MIXED)
    fields = {
        "created": "2026-01-01T00:00:00+00:00",
        "model": type(model).__name__,
        "fingerprint": fingerprint(model),
        "environment": {},
        "bound": Bound(row_error=0.05),
        "decisions": tuple(
            decision(site, product, of_pass.get(product)) for site, of_pass in recipes.items() for product in PASSES
        ),
    }
    return Plan(**{**fields, **changes})


@dataclass
class Calls(dict):
    """Stands in for the table of loaded kernels: the real ones, each call of which is noted before it runs."""

    log: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def __contains__(self, name):
        if not super().__contains__(name):
            self[name] = self._noting(name, default_registry().get(name).load())
        return True

    def _noting(self, name, kernel):
        def noted(a, b, *offsets, product, out_dtype):
            self.log.append((product, name, tuple(a.shape), tuple(b.shape)))
            return kernel(a, b, *offsets, product=product, out_dtype=out_dtype)

        return noted

    def passes(self):
        """Passes that ran, in order."""
        return [product for product, *_ in self.log]

    def taken(self):
        """(pass, recipe) of every call so far, sorted; and forget them."""
        found = sorted((product, name.rpartition(".")[2]) for product, name, *_ in self.log)
        self.log.clear()
        return found
