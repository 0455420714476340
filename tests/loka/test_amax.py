"""The largest finite magnitude of groups, against numpy: every layout, dtype and way to cut it in pieces."""

import itertools

import numpy as np
import pytest
import torch
from functorch.compile import aot_function
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from loka import amax, pieces
from loka.amax import finite_amax, readable
from loka.formats import RECIPES, ROLES
from loka.quantize import _grouped

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {
    "as it lies": lambda x: x,
    "turned": lambda x: x.transpose(-1, -2),
    "dimensions in another order": lambda x: x.permute(2, 0, 1),
    "every other": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(4, *x.shape[1:]),
    "from the middle": lambda x: x[1:, 1:, 1:],
}


def by_numpy(x: Tensor, dim: tuple[int, ...]) -> np.ndarray:
    values = np.abs(x.detach().double().numpy())
    return np.where(np.isfinite(values), values, 0).max(axis=dim, keepdims=True, initial=0)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of many decades, both signs, either zero, and the smallest that there are."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-12, 12, shape))
    x.view(-1)[::7] = -0.0
    x.view(-1)[3::11] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize(("piece", "few"), [(2**17, 0), (64, 0), (2**17, 2**12)], ids=["one piece", "pieces", "few"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_and_dimension_has_the_largest_of_numpy(monkeypatch, dtype, layout, piece, few) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    monkeypatch.setattr(amax, "_FEW", few)
    for shape in ((3, 5, 7), (2, 4, 130), (4, 70, 32), (2, 1, 1), (6, 1, 66)):
        x = layout(drawn(shape, dtype))
        if not x.numel():
            continue
        for count in (1, 2, 3):
            for dim in itertools.combinations(range(3), count):
                found = finite_amax(x, dim, keepdim=True)
                assert found.dtype == dtype
                assert np.array_equal(found.double().numpy(), by_numpy(x, dim)), (shape, dim)
                negative = tuple(d - 3 for d in dim)
                assert torch.equal(finite_amax(x, negative), found.squeeze(dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_belongs_to_no_group(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -3.0], [NAN, 2.0], [-INF, 0.5], [NAN, INF]], dtype=dtype)
    for same in (x, x.t().contiguous().t()):
        assert finite_amax(same, (-1,)).tolist() == [3.0, 2.0, 0.5, 0.0]
        assert finite_amax(same, (-1,), keepdim=True).shape == (4, 1)
        assert finite_amax(same, (-2, -1)).item() == 3.0


def test_that_of_nothing_is_zero() -> None:
    assert finite_amax(torch.zeros(3, 0), (-1,)).tolist() == [0, 0, 0]
    assert finite_amax(torch.zeros(0, 5), (-2, -1), keepdim=True).shape == (1, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_scales_lie_as_the_groups_of_a_turned_operand_do(name: str) -> None:
    """In another order than that of memory, every operation with them would walk through memory in leaps."""
    for role in ROLES:
        grouped = _grouped(torch.randn(256, 384).t(), RECIPES[name].operand(role))
        scales = finite_amax(grouped, (-3, -1), keepdim=True)
        longer = [d for d in range(4) if scales.shape[d] > 1]
        order = sorted(longer, key=grouped.stride, reverse=True)
        assert order == sorted(longer, key=scales.stride, reverse=True)


@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_bits_of_sixteen(bits: list[int], dtype: torch.dtype) -> None:
    x = torch.from_numpy(np.array(bits, np.uint16).view(np.int16)).view(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amax, "_FEW", 0)
        assert finite_amax(x, (0,)).double().item() == by_numpy(x, (0,)).item()


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_any_bits_of_thirty_two(bits: list[int]) -> None:
    x = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amax, "_FEW", 0)
        assert finite_amax(x, (0,)).double().item() == by_numpy(x, (0,)).item()


def test_a_parameter_is_read_as_what_it_holds() -> None:
    x = drawn((40, 96), torch.float32)
    assert readable(nn.Parameter(x))
    with torch.no_grad():
        assert torch.equal(finite_amax(nn.Parameter(x), (-1,)), finite_amax(x, (-1,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_autograd_records_the_largest_element_has_the_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -4.0, 2.0], [3.0, 0.5, -1.0]], dtype=dtype, requires_grad=True)
    finite_amax(x, (-1,)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]


def test_a_tensor_of_a_class_of_its_own_is_not_read() -> None:
    class Stands(Tensor):
        pass

    assert not readable(torch.randn(3).as_subclass(Stands))
    assert readable(torch.randn(3))


def test_values_are_read_where_operations_are_counted_and_not_where_they_are_traced() -> None:
    found = []

    def ask(x: Tensor) -> Tensor:
        found.append(readable(x))
        return x + 1

    with FlopCounterMode(display=False):
        ask(torch.randn(3))
    assert found == [True]
    found.clear()
    for mode in ("real", "fake", "symbolic"):
        make_fx(ask, tracing_mode=mode)(torch.randn(3))
    aot_function(ask, fw_compiler=lambda graph, _: graph)(torch.randn(3))
    torch.func.vmap(ask)(torch.randn(3, 2))
    assert len(found) >= 5
    assert not any(found)
