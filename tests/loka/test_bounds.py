"""Bounds: exactly one limit, and words for everything else."""

import math

import pytest

from loka.bounds import Bound, parse_bound
from loka.errors import ArgumentError, LokaError


def test_a_bound_limits_exactly_one_thing() -> None:
    assert Bound(row_error=0.05).row_error == 0.05
    for kwargs in ({}, {"row_error": 0.05, "loss": 1e-4}):
        with pytest.raises(ArgumentError, match="exactly one thing"):
            Bound(**kwargs)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "0.05"])
def test_a_bound_is_a_positive_number(value: object) -> None:
    with pytest.raises(ArgumentError, match="positive number"):
        Bound(row_error=value)


@pytest.mark.parametrize("value", [0.0, -1e-4, math.nan, math.inf])
def test_a_bound_on_the_loss_is_a_positive_number_and_shown_as_one(value: float) -> None:
    with pytest.raises(ArgumentError, match=r"positive number, e\.g\. loss=2e-4"):
        Bound(loss=value)


@pytest.mark.parametrize("confidence", [0.0, 0.4, 1.0, 2.0, math.nan])
def test_confidence_lies_between_one_half_and_one(confidence: float) -> None:
    with pytest.raises(ArgumentError, match="confidence"):
        Bound(row_error=0.05, confidence=confidence)


@pytest.mark.parametrize(
    ("text", "bound"),
    [("0.05", Bound(row_error=0.05)), ("row_error=1e-2", Bound(row_error=0.01)), ("loss=2e-4", Bound(loss=2e-4))],
)
def test_text_parses_to_the_bound_it_says(text: str, bound: Bound) -> None:
    assert parse_bound(text) == bound


@pytest.mark.parametrize(
    "text",
    ["", "five", "error=0.05", "row_error=", "row_error=nan", "0.05=row_error", "loss=nan", "loss=1e-4,row_error=0.05"],
)
def test_other_text_is_an_error_that_shows_how_to_write_it(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"--bound"):
        parse_bound(text)


def test_wrong_arguments_are_also_value_errors() -> None:
    with pytest.raises(ValueError, match="bound") as caught:
        Bound()
    assert isinstance(caught.value, LokaError)
