"""The op that runs a plan, against float64 products of operands quantised by ml_dtypes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from loka.dispatch.deciding.by_rows import by_rows
from loka.dispatch.running import linear as op
from loka.dispatch.running.linear import linear
from loka.errors import KernelError
from tests.dispatch.made_conversion import Calls, emulated
from tests.kernel_registry.test_gemm_kernels import EMULATED, accumulation_bound, modelled

HIGH = ("", "", "")
# Every recipe in every pass, and three at once.
KERNELS = [(name, name, name) for name in EMULATED] + [("rowwise", "tensorwise", "blockwise")]
# (M, K, N): plain, ragged against every group, wider than a block, one row, one column.
SHAPES = [(32, 64, 48), (17, 45, 33), (130, 257, 131), (1, 40, 24), (40, 24, 1)]


def named(recipes: tuple[str, str, str]) -> tuple[str, str, str]:
    fprop, dgrad, wgrad = (emulated(recipe) if recipe else "" for recipe in recipes)
    return fprop, dgrad, wgrad


def heavy_tailed(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.exp(2 * torch.randn(shape))


def operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K], bias [N], grad [M, N]; heavy-tailed, as operands of a recommendation model are."""
    x, weight, bias, grad = heavy_tailed(m, k), heavy_tailed(n, k), torch.randn(n), heavy_tailed(m, n)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad


def assert_product(got: Tensor, a: np.ndarray, b: np.ndarray, *, plus: np.ndarray | float = 0.0) -> None:
    """got = a b^T, both [.., k] in float64, up to the rounding of an fp32 sum."""
    limit = accumulation_bound(a, b, a.shape[1], torch.float32) + 2.0**-22 * np.abs(plus)
    assert (np.abs(got.detach().double().numpy() - (a @ b.T + plus)) <= limit).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipes", KERNELS, ids="-".join)
def test_each_pass_is_its_quantised_product(recipes: tuple[str, str, str], shape: tuple[int, int, int]) -> None:
    x, weight, bias, grad = operands(*shape)
    y = linear(x, weight, bias, *named(recipes))
    y.backward(grad)
    x_n, w_n, g_n = (t.detach().numpy() for t in (x, weight, grad))
    fprop, dgrad, wgrad = recipes
    plus = bias.detach().double().numpy()
    assert_product(y, modelled(x_n, fprop, "input"), modelled(w_n, fprop, "weight"), plus=plus)
    assert_product(x.grad, modelled(g_n, dgrad, "grad_output"), modelled(w_n.T, dgrad, "weight"))
    assert_product(weight.grad, modelled(g_n.T, wgrad, "grad_output"), modelled(x_n.T, wgrad, "input"))
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_each_pass_runs_on_its_own_kernel(calls: Calls) -> None:
    x, weight, bias, grad = operands(5, 7, 3)
    linear(x, weight, bias, *named(("rowwise", "tensorwise", "mxfp8"))).backward(grad)
    assert calls.log == [
        ("fprop", "emulated.linear.rowwise", (5, 7), (3, 7)),
        ("dgrad", "emulated.linear.tensorwise", (5, 3), (7, 3)),
        ("wgrad", "emulated.linear.mxfp8", (3, 5), (7, 5)),
    ]


@pytest.mark.parametrize("one", range(3))
def test_an_unnamed_pass_stays_in_high_precision(calls: Calls, one: int) -> None:
    recipes = tuple("rowwise" if i == one else "" for i in range(3))
    x, weight, bias, grad = operands(8, 16, 12)
    y = linear(x, weight, bias, *named(recipes))
    y.backward(grad)
    assert len(calls.log) == 1
    exact = x @ weight.T + bias, grad @ weight, grad.T @ x
    near = [
        torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        for got, want in zip((y, x.grad, weight.grad), exact, strict=True)
    ]
    assert near == [i != one for i in range(3)]


def test_without_kernels_it_is_a_linear_layer() -> None:
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(linear(x, weight, bias, *HIGH), F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(lambda *tensors: linear(*tensors, *HIGH), (x, weight, bias))


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7)], ids=str)
def test_leading_dimensions_are_rows(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(4, 7, requires_grad=True), torch.randn(4)
    flat = x.detach().reshape(-1, 7).requires_grad_()
    y = linear(x, weight, bias, *named(("rowwise", "rowwise", "rowwise")))
    assert y.shape == F.linear(x, weight, bias).shape
    y.sum().backward()
    by_shape, weight.grad = weight.grad, None
    expected = linear(flat, weight, bias, *named(("rowwise", "rowwise", "rowwise")))
    expected.sum().backward()
    assert torch.equal(y.reshape(-1, 4), expected)
    assert torch.equal(x.grad.reshape(-1, 7), flat.grad)
    assert torch.equal(by_shape, weight.grad)


def test_a_transposed_input_and_gradient_are_read_as_they_are() -> None:
    x, weight, _, grad = operands(9, 20, 12)
    kernels = named(("rowwise", "blockwise", "mxfp8"))
    linear(x, weight, None, *kernels).backward(grad)
    expected = x.grad, weight.grad
    x_t, weight.grad = x.detach().t().contiguous().t().requires_grad_(), None
    linear(x_t, weight, None, *kernels).backward(grad.t().contiguous().t())
    torch.testing.assert_close((x_t.grad, weight.grad), expected, rtol=1e-6, atol=1e-6 * float(expected[1].abs().max()))


def test_only_the_gradients_that_are_wanted_are_computed_and_only_their_operands_kept(calls: Calls) -> None:
    x, weight, bias, grad = operands(8, 16, 12)
    kernels = named(("rowwise", "rowwise", "rowwise"))
    kept: list[tuple[int, ...]] = []

    def run() -> tuple[list[str], list[tuple[int, ...]]]:
        kept.clear()
        with saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
            y = linear(x, weight, bias, *kernels)
        if y.requires_grad:
            y.backward(grad)
        return [product for product, _ in calls.taken()], list(kept)

    assert run() == (["dgrad", "fprop", "wgrad"], [(8, 16), (12, 16)])
    weight.requires_grad_(False)
    assert run() == (["dgrad", "fprop"], [(12, 16)])
    weight.requires_grad_()
    x.requires_grad_(False)
    assert run() == (["fprop", "wgrad"], [(8, 16)])
    with torch.no_grad():
        assert run() == (["fprop"], [])
    with torch.inference_mode():
        assert run() == (["fprop"], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 16, dtype=dtype, requires_grad=True)
    y = linear(x, weight, torch.randn(12, dtype=dtype), *named(("rowwise", "tensorwise", "blockwise")))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == weight.grad.dtype == dtype
    assert 0 < (y - F.linear(x, weight)).abs().mean() / y.abs().mean() < 1


@pytest.mark.parametrize("outside", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_gives_the_dtypes_of_a_linear_layer(outside: torch.dtype) -> None:
    def run(function) -> list[torch.dtype]:
        x = torch.randn(8, 16, dtype=outside, requires_grad=True)
        weight = torch.randn(12, 16, dtype=outside, requires_grad=True)
        bias = torch.randn(12, dtype=outside, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, weight, bias)
        y.float().sum().backward()
        return [t.dtype for t in (y, x.grad, weight.grad, bias.grad)]

    kernels = named(("rowwise", "rowwise", "rowwise"))
    assert run(lambda *tensors: linear(*tensors, *kernels)) == run(F.linear)


def test_under_autocast_the_cast_operands_are_quantised() -> None:
    x, weight, bias, grad = operands(8, 40, 12)
    kernels = named(("rowwise", "tensorwise", "blockwise"))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias, *kernels)
        y.backward(grad.bfloat16())  # inside the scope, too
    low = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias)]
    expected = linear(*low, *kernels)
    expected.backward(grad.bfloat16())
    assert torch.equal(y, expected)
    for got, want in zip((x, weight, bias), low, strict=True):
        assert torch.equal(got.grad, want.grad.float())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_with_the_same_kernels(calls: Calls, reentrant: bool) -> None:
    x, weight, bias, grad = operands(8, 16, 12)
    kernels = named(("rowwise", "tensorwise", "blockwise"))
    linear(x, weight, bias, *kernels).relu().backward(grad)
    expected = [t.grad for t in (x, weight, bias)]
    x.grad = weight.grad = bias.grad = None
    calls.log.clear()
    checkpoint(lambda t: linear(t, weight, bias, *kernels).relu(), x, use_reentrant=reentrant).backward(grad)
    assert calls.passes() == ["fprop", "fprop", "dgrad", "wgrad"]
    assert all(torch.equal(t.grad, want) for t, want in zip((x, weight, bias), expected, strict=True))


def test_gradients_accumulate() -> None:
    x, weight, bias, grad = operands(8, 16, 12)
    kernels = named(("rowwise", "rowwise", "rowwise"))
    linear(x, weight, bias, *kernels).backward(grad)
    once = [t.grad.clone() for t in (x, weight, bias)]
    linear(x, weight, bias, *kernels).backward(grad)
    assert all(torch.equal(t.grad, 2 * first) for t, first in zip((x, weight, bias), once, strict=True))


def test_a_bad_value_reaches_only_its_own_rows() -> None:
    x, weight, _, grad = operands(8, 16, 12)
    for recipe in EMULATED:
        kernels = named((recipe, recipe, recipe))
        bad = x.detach().clone()
        bad[2, 3] = float("nan")
        bad[5, 0] = float("inf")
        bad.requires_grad_()
        y = linear(bad, weight, None, *kernels)
        y.backward(grad)
        assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [2, 5]
        assert bad.grad.isfinite().all()  # dgrad reads grad and weight only
        assert (~weight.grad.isfinite()).any(0).nonzero().flatten().tolist() == [0, 3]
        weight.grad = None


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("recipes", [("rowwise",) * 3, ("rowwise", "tensorwise", "blockwise")], ids="-".join)
def test_a_sparse_input_is_multiplied_in_high_precision_and_costs_dense_ones_no_kernel(
    recipes: tuple[str, str, str], layout: torch.layout
) -> None:
    x, weight, bias, grad = operands(32, 64, 48)
    held = (x.detach() * (torch.rand(32, 64) < 0.1)).requires_grad_()
    with torch.no_grad():
        sparse = held.to_sparse(layout=layout)
    y = linear(sparse, weight, bias, *named(recipes))
    y.backward(grad)
    values, of_weight = held.detach().double().numpy(), weight.detach().double().numpy()
    assert_product(y, values, of_weight, plus=bias.detach().double().numpy())
    assert_product(weight.grad, grad.double().numpy().T, values.T)
    fprop = recipes[0]
    quantised = (modelled(each.detach().numpy(), fprop, role) for each, role in ((held, "input"), (weight, "weight")))
    assert_product(linear(held, weight, None, *named(recipes)), *quantised)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("fprop", ["rowwise", "rowwise up to 16 rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchscript_traces_high_precision_and_takes_no_kernel_out_of_use(fprop: str, dtype: torch.dtype) -> None:
    kernel = by_rows(emulated("rowwise"), 16, emulated("tensorwise")) if "rows" in fprop else emulated(fprop)

    def layer(x: Tensor) -> Tensor:
        return linear(x, weight, bias, kernel, "", "")

    x, weight, bias, _ = (each.detach().to(dtype) for each in operands(32, 64, 48))
    before = layer(x)
    traced = torch.jit.trace(layer, x, check_trace=False)
    for rows in (32, 7):  # no size of the traced batch is in it
        assert torch.equal(traced(x[:rows]), F.linear(x[:rows], weight, bias))
    assert not torch.equal(before, F.linear(x, weight, bias))
    assert torch.equal(layer(x), before)


def test_a_second_derivative_is_an_error() -> None:
    x, weight, bias, _ = operands(8, 16, 12)
    y = linear(x, weight, bias, *named(("rowwise", "rowwise", "rowwise")))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_kernel_is_loaded_once_and_an_unknown_one_is_refused() -> None:
    assert op.load(emulated("rowwise")) is op.load(emulated("rowwise"))
    x, weight, *_ = operands(2, 3, 4)
    with pytest.raises(KernelError, match=r"rowwize.*Nearest: .*emulated.linear.rowwise"):
        linear(x, weight, None, emulated("rowwize"), "", "")
