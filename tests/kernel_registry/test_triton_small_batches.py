"""Batches of small products, kernels of the registry, against the definition; interpreted, or compiled on a GPU."""

import pytest
import torch

from loka.errors import KernelError
from loka.formats import PASSES
from loka.kernel_registry import emulated
from loka.kernel_registry.builtin import KERNELS
from tests.kernel_registry.made_devices import triton_devices

pytest.importorskip("triton")
small = pytest.importorskip("loka.kernel_registry.triton.small")

on_devices = pytest.mark.parametrize("device", triton_devices())
of_recipes = pytest.mark.parametrize("recipe", small.SMALL_RECIPES)


@pytest.fixture
def launches(monkeypatch):
    """Count kernel launches."""
    made = []
    wrap = small.wrap_triton
    monkeypatch.setattr(small, "wrap_triton", lambda kernel: made.append(kernel) or wrap(kernel))
    return made


def batch_of(shape, device="cpu"):
    batch, m, n, k = shape
    return torch.randn(batch, m, k).to(device), torch.randn(batch, n, k).to(device)


@on_devices
@pytest.mark.parametrize("product", PASSES)
@of_recipes
def test_a_batch_is_products_with_scales_of_their_own(recipe, product, device):
    a, b = batch_of((3, 20, 140, 150), device)
    a[1] *= 1000
    got = getattr(small, recipe)(a, b, product=product, out_dtype=torch.float32)
    wanted = getattr(emulated, recipe)(a, b, product=product, out_dtype=torch.float32)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-1 if device == "cuda" else 1e-2)


@on_devices
@of_recipes
def test_a_batch_takes_one_launch_and_any_strides_without_a_copy(recipe, device, launches):
    a, b = batch_of((4, 6, 10, 24), device)
    kernel = getattr(small, recipe)
    wanted = kernel(a, b, product="wgrad", out_dtype=torch.bfloat16)
    views = (
        a.transpose(1, 2).contiguous().transpose(1, 2),
        b.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert torch.equal(kernel(*views, product="wgrad", out_dtype=torch.bfloat16), wanted)
    shared = kernel(a[:1].expand(4, -1, -1), b, product="wgrad", out_dtype=torch.bfloat16)
    assert torch.equal(shared[0], wanted[0])
    assert len(launches) == 3
    assert wanted.dtype == torch.bfloat16


@on_devices
@of_recipes
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_a_batch_of_nothing_has_its_shape_and_zeros(recipe, shape, device):
    a, b = batch_of(shape, device)
    got = getattr(small, recipe)(a, b, product="fprop", out_dtype=torch.float16)
    assert torch.equal(got, torch.zeros(shape[:3], dtype=torch.float16, device=device))


@pytest.mark.parametrize(
    ("a", "b", "out_dtype", "said"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.float32, "batch"),
        (torch.zeros(2, 2, 3), torch.zeros(1, 4, 3), torch.float32, "batch"),
        (torch.zeros(2, 2, 3), torch.zeros(2, 4, 5), torch.float32, "transpose"),
        (torch.zeros(2, 2, 3), torch.zeros(2, 4, 3), torch.float64, "float64"),
        (torch.zeros(2, 2, 3), torch.zeros(2, 4, 3).half(), torch.float32, "one dtype"),
    ],
)
def test_batches_that_do_not_fit_are_refused_in_words(a, b, out_dtype, said):
    with pytest.raises(KernelError, match=said):
        small.rowwise(a, b, product="fprop", out_dtype=out_dtype)


@on_devices
@of_recipes
def test_the_op_keeps_the_rules_of_custom_ops(recipe, device):
    a, b = batch_of((2, 5, 6, 20), device)
    table = [2, 5, 6, 20, 0, 0, 0, 20, 1, 20, 1, 100, 120]
    rules = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (a, b, table, recipe == "blockwise", 1, torch.bfloat16)
    torch.library.opcheck(torch.ops.loka.small_products.default, arguments, test_utils=rules)


# --- the registry ---

ROWS = [spec for spec in KERNELS if spec.name.startswith("triton.small.")]


def test_every_row_is_covered_here():
    assert [spec.name for spec in ROWS] == [f"triton.small.{recipe}" for recipe in small.SMALL_RECIPES]
    for spec, recipe in zip(ROWS, small.SMALL_RECIPES, strict=True):
        assert (spec.op, spec.recipe) == ("bmm", recipe)
        assert spec.load() is getattr(small, recipe)
