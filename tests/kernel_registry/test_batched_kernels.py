"""Kernels of batched products: every matrix of the batch is a product of its own, as a probe measures it."""

import numpy as np
import pytest
import torch

from loka.formats import PASS_OPERANDS, PASSES, RECIPES
from loka.kernel_registry.builtin import KERNELS
from loka.numerics import product_errors
from loka.probes.capturing.products import Draw, Factors, gemm
from loka.probes.sampling.measure import measure
from tests.kernel_registry.made_gemm import accumulation_bound, heavy_tailed, modelled, normal, with_zero_rows

DEFINITIONS = {spec.recipe: spec for spec in KERNELS if spec.op == "bmm" and spec.library == "emulated"}
BATCH, M, N, K = 3, 19, 33, 150


def made(draw):
    """Matrices of very different loudness, so that a scale that spans two of them shows."""
    generator = torch.Generator().manual_seed(0)
    loudness = torch.tensor([1.0, 1e3, 1e-3]).view(3, 1, 1)
    return draw(generator, (BATCH, M, K)) * loudness, draw(generator, (BATCH, N, K)) * loudness.flip(0)


def test_the_recipes_that_a_probe_measures_are_defined():
    assert set(DEFINITIONS) == {"tensorwise", "rowwise", "blockwise", "mxfp8"}


@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("draw", [normal, heavy_tailed, with_zero_rows])
@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_every_matrix_gets_the_modelled_product(recipe, draw, product):
    a, b = made(draw)
    got = DEFINITIONS[recipe].load()(a, b, product=product, out_dtype=torch.float32)
    assert got.shape == (BATCH, M, N)
    for index in range(BATCH):
        left, right = (
            modelled(x[index].numpy(), recipe, role) for x, role in zip((a, b), PASS_OPERANDS[product], strict=True)
        )
        bound = accumulation_bound(left, right, K, torch.float32)
        assert (np.abs(got[index].double().numpy() - left @ right.T) <= bound).all()


@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_a_probe_measures_the_error_of_the_definition(recipe, product):
    a, b = made(heavy_tailed)
    draw = Draw(rows=10_000, generator=torch.Generator().manual_seed(0))
    found = measure(gemm(Factors("bmm", a, b.mT), a_is_p=True), product, [RECIPES[recipe]], draw)
    rounded = DEFINITIONS[recipe].load()(a, b, product=product, out_dtype=torch.float32)
    (error,) = product_errors(rounded.flatten(0, 1)[None], (a @ b.mT).flatten(0, 1))
    assert found.errors[recipe].row_error == pytest.approx(error.row_error, rel=1e-4)


@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_what_is_not_finite_stays_in_its_row(recipe):
    a, b = made(normal)
    clean = DEFINITIONS[recipe].load()(a, b, product="fprop", out_dtype=torch.float32)
    a[1, 4, 7] = torch.nan
    got = DEFINITIONS[recipe].load()(a, b, product="fprop", out_dtype=torch.float32)
    assert got[1, 4].isnan().all()
    assert got.isfinite().sum() == got.numel() - N
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_empty_operands_are_empty_products(recipe, shape):
    batch, m, k = shape
    out = DEFINITIONS[recipe].load()(torch.ones(shape), torch.ones(batch, 5, k), product="fprop", out_dtype=torch.half)
    assert out.dtype == torch.half
    assert torch.equal(out, torch.zeros(batch, m, 5).half())
