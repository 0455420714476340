"""Fixtures for tests that run plans."""

import pytest

from loka.dispatch.running import linear as op
from tests.dispatch.made_conversion import Calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The kernels that run, as they run."""
    noted = Calls()
    monkeypatch.setattr(op, "_loaded", noted)
    return noted
