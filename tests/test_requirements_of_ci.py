"""What CI has promised to install is there, or tests fail: nothing is skipped there without a word."""

import pytest

from tests.requirements_of_ci import VARIABLE, is_required, missing


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("", False),
        ("browser", False),
        ("postgresql", True),
        ("browser,postgresql", True),
        ("browser, postgresql", True),
    ],
)
def test_what_is_missing_is_skipped_unless_it_was_promised(monkeypatch, value, wanted):
    monkeypatch.setenv(VARIABLE, value)
    assert is_required("postgresql") == wanted
    outcome = pytest.fail.Exception if wanted else pytest.skip.Exception
    with pytest.raises(outcome, match="no server is installed"):
        missing("postgresql", "no server is installed")
