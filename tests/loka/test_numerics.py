"""The error metrics against loops in float64, and what they say where a ratio has no meaning."""

import math

import pytest
import torch
from torch import Tensor

from loka.numerics import MERE_FLOOR, MIN_COLUMNS, gate_for, product_error, product_errors

INF, NAN = float("inf"), float("nan")


def by_loops(actual: Tensor, reference: Tensor) -> dict[str, float]:
    """Every metric from its definition, over rows that have something to compare."""
    a, r = actual.double().tolist(), reference.double().tolist()
    ratios = []
    error_square = norm_square = 0.0
    for got, want in zip(a, r, strict=True):
        error = sum((x - y) ** 2 for x, y in zip(got, want, strict=True))
        norm = sum(y * y for y in want)
        error_square, norm_square = error_square + error, norm_square + norm
        if norm > 0:
            ratios.append(math.sqrt(error / norm))
    elements = len(r) * len(r[0])
    floor = MERE_FLOOR * math.sqrt(norm_square / elements)
    pairs = [(x, y) for got, want in zip(a, r, strict=True) for x, y in zip(got, want, strict=True)]
    relative = math.sqrt(error_square / norm_square)
    ratios.sort()
    position = 0.99 * (len(ratios) - 1)
    low, share = int(position), position - int(position)
    return {
        "row_error": sum(ratios) / len(ratios),
        "row_error_p99": ratios[low] + share * (ratios[min(low + 1, len(ratios) - 1)] - ratios[low]),
        "relative_error": relative,
        "sqnr_db": -20 * math.log10(relative),
        "mere": sum(abs(x - y) / max(abs(y), floor) for x, y in pairs) / elements,
        "rows": len(ratios),
    }


def metrics(error) -> dict[str, float]:
    names = ("row_error", "row_error_p99", "relative_error", "sqnr_db", "mere", "rows")
    return {name: getattr(error, name) for name in names}


def pair(rows: int, columns: int, *, loud: float = 1.0) -> tuple[Tensor, Tensor]:
    reference = torch.randn(rows, columns)
    reference[0] *= loud
    return reference + 0.03 * reference.abs() * torch.randn(rows, columns), reference


@pytest.mark.parametrize(("rows", "columns", "loud"), [(1, 1, 1), (7, 1, 1), (40, 33, 1), (40, 33, 1e6), (200, 8, 1)])
def test_every_metric_equals_its_definition(rows: int, columns: int, loud: float) -> None:
    actual, reference = pair(rows, columns, loud=loud)
    assert metrics(product_error(actual, reference)) == pytest.approx(by_loops(actual, reference), rel=2e-5)


def test_one_loud_row_hides_damage_from_the_whole_tensor_and_not_from_row_error() -> None:
    _, reference = pair(100, 64, loud=1e4)
    actual = reference.clone()
    actual[1:] *= 1.5
    error = product_error(actual, reference)
    assert error.relative_error < 1e-2
    assert error.row_error == pytest.approx(0.5 * 99 / 100, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-34, 1e-3, 1e3, 1e30, 1e37])
def test_errors_do_not_depend_on_the_size_of_the_numbers(scale: float) -> None:
    actual, reference = pair(30, 16)
    expected = metrics(product_error(actual, reference))
    assert metrics(product_error(actual * scale, reference * scale)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0])
def test_an_output_of_zeros_is_an_error_of_one_however_small_the_reference(scale: float) -> None:
    reference = torch.randn(20, 16) * scale
    error = product_error(torch.zeros_like(reference), reference)
    assert error.row_error == error.row_error_p99 == pytest.approx(1)
    assert error.relative_error == pytest.approx(1)
    assert error.sqnr_db == pytest.approx(0, abs=1e-6)
    assert 0.9 < error.mere <= 1  # below the floor, an element counts for less


def test_equal_outputs_have_no_error() -> None:
    reference = torch.randn(20, 16)
    error = product_error(reference.clone(), reference)
    assert (error.row_error, error.relative_error, error.mere, error.sqnr_db) == (0, 0, 0, INF)


def test_rows_that_are_zero_are_counted_and_left_out_of_the_mean_over_rows() -> None:
    actual, reference = pair(10, 16)
    reference[2:5] = 0
    actual[2:5] = 0
    error = product_error(actual, reference)
    kept = [i for i in range(10) if not 2 <= i < 5]
    assert (error.rows, error.zero_rows, error.bad_rows) == (7, 3, 0)
    assert error.row_error == pytest.approx(product_error(actual[kept], reference[kept]).row_error)


def test_noise_where_the_reference_is_zero_shows_in_the_whole_tensor() -> None:
    actual, reference = pair(10, 16)
    quiet = product_error(actual, reference).relative_error
    reference[3], actual[3] = 0, 1.0
    assert product_error(actual, reference).relative_error > 2 * quiet


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_with_a_reference_that_is_not_finite_are_counted_and_left_out_of_everything(bad: float) -> None:
    actual, reference = pair(10, 16)
    expected = product_error(actual[1:], reference[1:])
    reference[0, 3] = bad
    error = product_error(actual, reference)
    assert error.bad_rows == 1
    assert metrics(error) == pytest.approx(metrics(expected), rel=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("rows", [1, 20])
def test_an_output_that_is_not_finite_is_an_infinite_error_and_never_a_missing_one(bad: float, rows: int) -> None:
    actual, reference = pair(100, 16)
    actual[:rows, 5] = bad
    error = product_error(actual, reference)
    assert (error.row_error, error.relative_error, error.mere, error.sqnr_db) == (INF, INF, INF, -INF)
    assert error.row_error_p99 == INF
    assert error.rows == 100


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_nothing_to_compare_is_nan_and_no_row(shape: tuple[int, int]) -> None:
    error = product_error(torch.zeros(shape), torch.zeros(shape))
    assert all(math.isnan(value) for name, value in metrics(error).items() if name != "rows")
    assert (error.rows, error.zero_rows, error.bad_rows) == (0, 0, 0)


def test_a_reference_of_zeros_or_of_bad_rows_compares_nothing() -> None:
    zeros = product_error(torch.ones(4, 8), torch.zeros(4, 8))
    assert (zeros.rows, zeros.zero_rows) == (0, 4)
    bad = product_error(torch.ones(4, 8), torch.full((4, 8), NAN))
    assert (bad.rows, bad.bad_rows) == (0, 4)
    assert all(math.isnan(error.row_error) and math.isnan(error.relative_error) for error in (zeros, bad))


def test_mere_has_its_denominator_floored_and_settles_where_the_plain_mean_explodes() -> None:
    reference = torch.ones(10, 100)
    reference[0, 0] = 1e-12
    actual = reference + 0.01
    rms = float(reference.square().mean().sqrt())
    expected = (999 * 0.01 + 0.01 / (MERE_FLOOR * rms)) / 1000
    assert product_error(actual, reference).mere == pytest.approx(expected, rel=1e-3)


def test_low_precision_outputs_are_compared_in_fp32() -> None:
    actual, reference = pair(20, 16)
    expected = product_error(actual.bfloat16().float(), reference)
    assert metrics(product_error(actual.bfloat16(), reference)) == metrics(expected)


def test_several_candidates_read_as_each_alone() -> None:
    first, reference = pair(30, 16)
    reference[3], reference[4, 0] = 0, NAN
    candidates = torch.stack([first, reference.nan_to_num(), torch.full_like(first, INF)])
    together = product_errors(candidates, reference)
    assert [metrics(error) for error in together] == [metrics(product_error(one, reference)) for one in candidates]


def test_outputs_and_reference_are_not_modified() -> None:
    actual, reference = pair(10, 16)
    actual[0, 0] = NAN
    before = actual.clone(), reference.clone()
    product_error(actual, reference)
    assert torch.equal(actual.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(reference, before[1])


def test_heads_with_few_columns_are_gated_by_the_whole_tensor() -> None:
    assert {columns: gate_for(columns) for columns in (1, 7, 8, 4096)} == {
        1: "relative_error",
        7: "relative_error",
        8: "row_error",
        4096: "row_error",
    }
    assert MIN_COLUMNS == 8
    error = product_error(*pair(10, 16, loud=100))
    assert error.gated("row_error") == error.row_error
    assert error.gated("relative_error") == error.relative_error
