"""Fixtures for tests that run plans."""

import gc

import pytest

from loka.dispatch.monitoring import kernel_check, plan_watch
from loka.dispatch.running import linear as op
from loka.dispatch.running import routing, weights
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import KernelSpec
from tests.dispatch.kernels_that_fail_late import Faults
from tests.dispatch.made_conversion import Calls
from tests.dispatch.made_held import NAME


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The kernels that run, as they run."""
    noted = Calls()
    monkeypatch.setattr(op, "_loaded", noted)
    return noted


@pytest.fixture
def nothing_kept() -> None:
    """See that no weight of a test before is kept in FP8; a search for garbage, of seconds, where one still is."""
    if weights.kept_bytes():
        gc.collect()
    assert weights.kept_bytes() == 0


@pytest.fixture
def late_registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A default registry with a kernel that may give NaN; nothing is loaded, and no fault is on."""
    made = Registry()
    for spec in KERNELS:
        made.add(spec, owner="loka")
    where = "tests.dispatch.kernels_that_fail_late:gives_nan"
    made.add(KernelSpec(name=NAME, op="linear", recipe="tensorwise", implementation=where), owner="x")
    for module in (op, routing, kernel_check, plan_watch):
        monkeypatch.setattr(module, "default_registry", lambda: made)
    monkeypatch.setattr(op, "_loaded", {})
    monkeypatch.setattr(Faults, "on", False)
    return made
