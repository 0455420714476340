"""tensordot and einsum with a weight give what torch gives, or are left alone."""

import pytest
import torch

from loka.dispatch.running.contractions import einsum, tensordot

HIGH = ("", "", "")


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "weight_is_left"),
    [
        ("bk,kn->bn", (5, 7), (7, 3), False),
        ("bk,nk->bn", (5, 7), (3, 7), False),
        ("btk,kn->btn", (2, 5, 7), (7, 3), False),
        ("bkt,kn->bnt", (2, 7, 5), (7, 3), False),
        ("bkt, nk -> bnt", (2, 7, 5), (3, 7), False),
        ("bkt,kn->btn", (2, 7, 5), (7, 3), False),
        ("...k,kn->...n", (2, 4, 7), (7, 3), False),
        ("...kt,nk->...nt", (2, 4, 7, 6), (3, 7), False),
        ("nk,bk->bn", (5, 7), (3, 7), True),
        ("kn,btk->btn", (2, 5, 7), (7, 3), True),
    ],
)
def test_einsum_equals_torch(equation: str, x_shape: tuple, w_shape: tuple, weight_is_left: bool) -> None:
    x, w = torch.randn(x_shape, dtype=torch.float64), torch.randn(w_shape, dtype=torch.float64)
    operands = (w, x) if weight_is_left else (x, w)
    torch.testing.assert_close(
        einsum(equation, *operands, HIGH, weight_is_left=weight_is_left), torch.einsum(equation, *operands)
    )


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape"),
    [
        ("bk,kn", (5, 7), (7, 3)),  # no output: order is implied
        ("bk,bn->bkn", (5, 7), (5, 3)),  # an outer product
        ("bk,bk->b", (5, 7), (5, 7)),  # both labels shared
        ("btk,kn->tbn", (2, 5, 7), (7, 3)),  # another order of x's axes
        ("bk,kn->b", (5, 7), (7, 3)),  # summed over n
        ("bk,kk->bk", (5, 7), (7, 7)),
        ("bbk,kn->bbn", (5, 5, 7), (7, 3)),
        ("bk,bk,kn->bn", (5, 7), (7, 3)),
    ],
)
def test_other_equations_are_left_alone(equation: str, x_shape: tuple, w_shape: tuple) -> None:
    assert einsum(equation, torch.randn(x_shape), torch.randn(w_shape), HIGH, weight_is_left=False) is None


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "dims", "weight_is_left"),
    [
        ((5, 7), (7, 3), 1, False),
        ((2, 5, 7), (7, 3), 1, False),
        ((2, 5, 7), (7, 3), ([2], [0]), False),
        ((2, 5, 7), (3, 7), ([-1], [-1]), False),
        ((2, 7, 5), (7, 3), ((1,), (0,)), False),
        ((2, 7, 5), (3, 7), (1, 1), False),
        ((7, 5, 2), (3, 7), 1, True),
        ((2, 7, 5), (7, 3), ([0], [1]), True),
    ],
)
def test_tensordot_equals_torch(x_shape: tuple, w_shape: tuple, dims: object, weight_is_left: bool) -> None:
    x, w = torch.randn(x_shape, dtype=torch.float64), torch.randn(w_shape, dtype=torch.float64)
    operands = (w, x) if weight_is_left else (x, w)
    plain = dims if not (isinstance(dims, tuple) and isinstance(dims[0], int)) else ([dims[0]], [dims[1]])
    torch.testing.assert_close(
        tensordot(*operands, dims, HIGH, weight_is_left=weight_is_left), torch.tensordot(*operands, dims=plain)
    )


@pytest.mark.parametrize("dims", [0, 2, ([0, 1], [0, 1]), None, ([0],)])
def test_tensordot_over_other_than_one_axis_is_left_alone(dims: object) -> None:
    assert tensordot(torch.randn(7, 3), torch.randn(7, 3), dims, HIGH, weight_is_left=False) is None
