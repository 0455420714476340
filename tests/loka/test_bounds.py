"""Bounds: exactly one limit, and words for everything else."""

import math
from pathlib import Path

import pytest

from loka import document
from loka.bounds import DEFAULT_ROW_ERROR, GRADIENT_BIAS, Bound, Limit, SiteBound, parse_bound
from loka.errors import ArgumentError, LokaError
from loka.reports.advise.report import advise
from loka.reports.build import report_of


def test_a_bound_limits_exactly_one_thing() -> None:
    assert Bound(row_error=0.05).row_error == 0.05
    assert Bound(sqnr_db=30).sqnr_db == 30
    for kwargs in ({}, {"row_error": 0.05, "loss": 1e-4}, {"row_error": 0.05, "sqnr_db": 30}):
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
    [
        ("0.05", Bound(row_error=0.05)),
        ("row_error=1e-2", Bound(row_error=0.01)),
        ("sqnr_db=30", Bound(sqnr_db=30.0)),
        ("loss=2e-4", Bound(loss=2e-4)),
    ],
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


@pytest.mark.parametrize("given", [0.05, "row_error=0.05", None])
def test_what_is_no_bound_is_refused_where_one_is_an_argument(given: object, tmp_path: Path) -> None:
    for takes in (report_of, advise):
        with pytest.raises(ArgumentError, match=r"is not a bound\. Write loka\.Bound\(row_error=0\.05\)"):
            takes(tmp_path / "none.db", given)  # type: ignore[arg-type]


# --- bounds per site ---

OWN = Bound(row_error=0.05, per_site={"head*": Bound(row_error=0.01), "re:.*experts.*": Bound(sqnr_db=40)})


@pytest.mark.parametrize(
    ("site", "metric", "value", "pattern"),
    [
        ("body.0", "row_error", 0.05, None),
        ("head", "row_error", 0.01, "head*"),
        ("head.experts", "row_error", 0.01, "head*"),
        ("body.experts.3", "sqnr_db", 40, "re:.*experts.*"),
    ],
)
def test_the_first_pattern_that_covers_a_site_says_what_it_is_held_to(site, metric, value, pattern) -> None:
    for product in ("fprop", "dgrad", "wgrad"):
        assert OWN.limit(product, site) == Limit(metric=metric, value=value, pattern=pattern)


def test_a_pattern_that_names_a_container_covers_what_lies_in_it() -> None:
    assert Bound(loss=1e-4, per_site={"mlp": Bound(row_error=0.01)}).limit("fprop", "mlp.up").value == 0.01


def test_a_ratio_in_decibels_is_a_relative_error_written_otherwise() -> None:
    limit = Bound(sqnr_db=40).limit("fprop", "up")
    assert limit.most == pytest.approx(0.01)
    assert (limit.words, str(limit)) == ("0.01 (40 dB)", "sqnr_db >= 40 dB")


def test_a_budget_of_loss_is_for_forward_products_and_gradients_have_the_default_bound() -> None:
    bound = Bound(loss=1e-4, per_site={"head": Bound(row_error=0.01)})
    assert bound.limit("fprop", "up") == Limit(metric="loss", value=1e-4)
    assert bound.limit("wgrad", "up") == Limit(metric="row_error", value=DEFAULT_ROW_ERROR, bias=GRADIENT_BIAS)
    assert (
        bound.limit("fprop", "head")
        == bound.limit("dgrad", "head")
        == Limit(metric="row_error", value=0.01, pattern="head")
    )


def test_a_pattern_that_covers_no_site_is_an_error_that_names_the_nearest() -> None:
    OWN.check_sites(["head.0", "a.experts.1"])
    with pytest.raises(ArgumentError, match=r"'head\*' matches no site.*Nearest.*'haed'"):
        OWN.check_sites(["haed", "a.experts.1"])


def test_a_bound_is_hashable_readable_and_comes_back_from_json() -> None:
    assert str(OWN) == (
        "row_error <= 0.05 (row_error <= 0.01 on 'head*', sqnr_db >= 40 dB on 're:.*experts.*') at 95 % confidence"
    )
    again = document.decode(Bound, document.encode(OWN), "a plan")
    assert again == OWN
    assert hash(again) == hash(OWN)
    assert again.per_site[0] == SiteBound(pattern="head*", row_error=0.01)
    assert document.decode(Bound, {"confidence": 0.9, "loss": None, "row_error": 0.05}, "an older plan") == Bound(
        row_error=0.05, confidence=0.9
    )


@pytest.mark.parametrize(
    ("per_site", "message"),
    [
        ({"a": Bound(loss=1e-4)}, "one budget that all sites share"),
        ({"a": Bound(row_error=0.1, per_site={"b": Bound(row_error=0.2)})}, "bounds per site of its own"),
        ({"a": Bound(row_error=0.1, confidence=0.8)}, "confidence of its own"),
        ({"a": 0.1}, "is no bound"),
        ({"": Bound(row_error=0.1)}, "not a pattern"),
        ({"re:(": Bound(row_error=0.1)}, "not a valid regular expression"),
        ((SiteBound(pattern="a", row_error=0.1), SiteBound(pattern="a", sqnr_db=3)), "twice"),
        (("a",), "maps patterns to bounds"),
    ],
)
def test_what_no_site_can_be_held_to_is_refused(per_site, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        Bound(row_error=0.05, per_site=per_site)


@pytest.mark.parametrize("limits", [{}, {"row_error": 0.1, "sqnr_db": 30}, {"row_error": -1.0}, {"sqnr_db": math.nan}])
def test_a_bound_of_some_sites_limits_exactly_one_thing_too(limits) -> None:
    with pytest.raises(ArgumentError, match="head"):
        SiteBound(pattern="head", **limits)


def test_bounds_of_some_sites_are_parsed_with_any_pattern() -> None:
    parsed = parse_bound("loss=1e-4", ["head*=row_error=0.01", "re:(?=x)y.*=sqnr_db=35", "a.b=0.02"])
    assert parsed == Bound(
        loss=1e-4,
        per_site={"head*": Bound(row_error=0.01), "re:(?=x)y.*": Bound(sqnr_db=35), "a.b": Bound(row_error=0.02)},
    )


@pytest.mark.parametrize("entry", ["head", "=0.1", "head=", "head=five", "head=loss=1e-4", "head=row_error=nan"])
def test_other_text_for_some_sites_is_an_error_that_shows_how_to_write_it(entry) -> None:
    with pytest.raises(ArgumentError, match=r"--bound-for .*Write '.*=row_error=0\.01'"):
        parse_bound("0.05", [entry])


def test_one_pattern_is_bounded_once() -> None:
    with pytest.raises(ArgumentError, match="twice"):
        parse_bound("0.05", ["head=0.1", "head=0.2"])
