"""What a test needs beyond Python packages: skipped where it is missing, a failure where it was promised.

LOKA_TEST_REQUIRE lists what must be there, e.g. "browser,postgresql". CI sets it after it has installed these, so that
a test which cannot run there fails, rather than be skipped without a word for ever after.
"""

import os
from collections.abc import Mapping
from typing import NoReturn

import pytest

VARIABLE = "LOKA_TEST_REQUIRE"


def is_required(what: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether LOKA_TEST_REQUIRE names this, e.g. "browser" or "postgresql"."""
    return what in environment.get(VARIABLE, "").replace(",", " ").split()


def missing(what: str, reason: str) -> NoReturn:
    """Skip the running test or fixture because `what` is not here; fail it where `what` is required."""
    if is_required(what):
        pytest.fail(f"{VARIABLE} promises {what}, but {reason}", pytrace=False)
    pytest.skip(reason)
