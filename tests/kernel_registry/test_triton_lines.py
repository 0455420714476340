"""Operands that are loaded many bytes at once: what is copied, what is filled up, and that nothing of it changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loka.formats import FORMATS

lines = pytest.importorskip("loka.kernel_registry.triton.lines")

E4M3 = FORMATS["e4m3"].dtype
extents = st.integers(1, 70)


def codes(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows * 100 + k)).to(E4M3)


def numbers(x: torch.Tensor) -> torch.Tensor:
    return x.float()


@given(extents, extents)
def test_rows_of_new_codes_begin_at_whole_lines(rows, k):
    x = lines.empty_lines(torch.empty(0), rows, k, E4M3)
    assert (x.shape, x.dtype) == ((rows, k), E4M3)
    assert lines.begins_lines(x)
    assert x.untyped_storage().nbytes() < rows * (k + 16)


@given(extents, extents)
def test_codes_are_copied_only_where_rows_begin_anywhere(rows, k):
    x = codes(rows, k)
    moved = lines.in_lines(x)
    assert lines.begins_lines(moved)
    assert torch.equal(numbers(moved), numbers(x))
    assert (moved is x) == (k % 16 == 0)
    assert lines.in_lines(moved) is moved


@given(extents, extents, extents, st.sampled_from([E4M3, torch.bfloat16, torch.float32]))
def test_rows_are_filled_with_zeros_to_the_end_of_a_line(m, n, k, dtype):
    a, b = numbers(codes(m, k)).to(dtype), numbers(codes(n, k)).to(dtype)
    left, right = lines.in_whole_lines(a, b)
    for filled, x in ((left, a), (right, b)):
        assert filled.dtype == dtype
        assert filled.shape[1] * x.element_size() % 16 == 0
        assert filled.shape[1] * x.element_size() < k * x.element_size() + 16
        assert torch.equal(numbers(filled[:, :k]), numbers(x))
        assert not numbers(filled[:, k:]).any()


def test_operands_that_lie_column_by_column_stay_as_they_are():
    a, b = codes(20, 13), codes(24, 13)
    turned = b.t().contiguous().t()
    assert lines.in_lines(turned) is turned
    assert all(one is other for one, other in zip(lines.in_whole_lines(a, turned), (a, turned), strict=True))
