"""Kernels of many linear layers, a call for all: each against the numpy model and, of ours, against `many_linear`."""

import numpy as np
import pytest
import torch

from loka.dispatch.measuring.draws import Source
from loka.dispatch.measuring.shapes import Shape
from loka.dispatch.measuring.verify import verify
from loka.errors import KernelError
from loka.formats import PASS_OPERANDS, PASSES
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest
from tests.kernel_registry.made_devices import FP8_GPU, interprets_triton
from tests.kernel_registry.made_gemm import accumulation_bound, heavy_tailed, modelled, normal, with_zero_rows

SPECS = {spec.name: spec for spec in KERNELS if spec.op == "many_linear"}
BASELINE = "torch.native.many_linear"
OURS = [name for name in SPECS if name.startswith("triton.")]
CASES = [
    pytest.param(name, device, marks=marks, id=f"{name}-{device}")
    for name in SPECS
    for device, marks in (("cpu", ()), ("cuda", FP8_GPU.marks))
    if device == "cuda" or interprets_triton() or name not in OURS
]
of_kernels = pytest.mark.parametrize(("name", "device"), CASES)
of_low_precision = pytest.mark.parametrize(("name", "device"), [case for case in CASES if case.values[0] != BASELINE])
LAYERS, M, N, K = 3, 9, 33, 140


def run(name, a, b, product="fprop", out_dtype=torch.float32):
    return SPECS[name].load()(a, b, product=product, out_dtype=out_dtype)


def made(draw, device="cpu"):
    """Layers of very different loudness, so that a scale that spans two of them shows."""
    generator = torch.Generator().manual_seed(0)
    loudness = torch.tensor([1.0, 1e3, 1e-3]).view(LAYERS, 1, 1)
    a, b = draw(generator, (LAYERS, M, K)) * loudness, draw(generator, (LAYERS, N, K)) * loudness.flip(0)
    return a.to(device), b.to(device)


@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("draw", [normal, heavy_tailed, with_zero_rows])
@of_kernels
def test_every_layer_gets_the_modelled_product(name, device, draw, product):
    a, b = made(draw, device)
    got = run(name, a, b, product)
    recipe = SPECS[name].recipe
    assert got.shape == (LAYERS, M, N)
    for index in range(LAYERS):
        left, right = (x[index].double().cpu().numpy() for x in (a, b))
        if recipe is not None:
            roles = PASS_OPERANDS[product]
            left, right = (
                modelled(x.astype(np.float32), recipe, role) for x, role in zip((left, right), roles, strict=True)
            )
        bound = accumulation_bound(left, right, K, torch.float32)
        if device == "cuda":  # tensor cores keep about 14 bits of a partial sum
            bound = bound + 2.0**-12 * (np.abs(left) @ np.abs(right).T)
        assert (np.abs(got[index].double().cpu().numpy() - left @ right.T) <= bound).all()


@of_kernels
def test_layers_lie_wherever_they_lie(name, device):
    a, b = made(normal, device)
    wanted = run(name, a, b)
    turned = a.mT.contiguous().mT, b.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(run(name, *turned), wanted, rtol=1e-6, atol=1e-3)
    shared = a[:1].expand(LAYERS, -1, -1)
    torch.testing.assert_close(run(name, shared, b), run(name, shared.contiguous(), b), rtol=1e-6, atol=1e-3)


@of_low_precision
def test_results_are_rounded_once_and_bad_values_stay_in_their_row(name, device):
    a, b = (x.bfloat16() for x in made(normal, device))
    torch.testing.assert_close(
        run(name, a, b, out_dtype=torch.bfloat16).float(), run(name, a.float(), b.float()), rtol=2.0**-7, atol=1e-6
    )
    clean = run(name, a, b)
    a[1, 4, 7] = torch.nan
    got = run(name, a, b)
    assert got[1, 4].isnan().all()
    assert got.isfinite().sum() == got.numel() - N
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
@of_kernels
def test_layers_without_anything_to_multiply_are_zeros(name, device, shape):
    layers, m, k = shape
    out = run(name, torch.ones(shape, device=device), torch.ones(layers, 5, k, device=device), out_dtype=torch.half)
    assert torch.equal(out.cpu(), torch.zeros(layers, m, 5).half())


@pytest.mark.parametrize("name", OURS if interprets_triton() else [])
def test_what_does_not_fit_is_refused_in_words(name):
    for a, b, said in (
        (torch.zeros(2, 3), torch.zeros(4, 3), "batch"),
        (torch.zeros(2, 2, 3), torch.zeros(2, 4, 5), "transpose"),
        (torch.zeros(2, 2, 3), torch.zeros(2, 4, 3).half(), "one dtype"),
    ):
        with pytest.raises(KernelError, match=said):
            run(name, a, b)


@pytest.mark.skipif(not interprets_triton(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", OURS)
def test_the_row_computes_what_many_linear_does(name):
    from loka.kernel_registry.triton.small import many_linear

    a, b = made(heavy_tailed)
    wanted = many_linear([*a], [*b], SPECS[name].recipe)
    assert torch.equal(run(name, a, b), torch.stack(wanted))


@pytest.mark.parametrize("product", PASSES)
def test_a_layer_with_the_scales_of_another_is_found(product):
    """Each layer is compared by itself: operands laid out as training has them, a transposed view or not."""
    request = GemmRequest(site="s", product=product, op="many_linear", m=9, n=12, k=40, dtype="float32", batch=5)
    registry = Registry()
    for spec in KERNELS:
        if spec.name in (BASELINE, "emulated.many_linear.rowwise"):
            registry.add(spec, owner="test")
    assert registry.baseline(request).name == BASELINE
    for fault, holds in (("right_batch", True), ("transposed_batch", False)):
        spec = type(spec)(
            name=f"planted.{fault}",
            op="many_linear",
            recipe="rowwise",
            implementation=f"tests.dispatch.faulty_kernels:{fault}",
        )
        registry.add(spec, owner="test")
        found = verify([Shape(request=request, products=(), source=Source())], registry, "cpu")
        assert {one.kernel: one.holds for one in found}[spec.name] is holds
