"""What the tests of our Triton kernels share: the numpy model of tensors, its bounds, and compiling for elsewhere."""

import importlib
import os

import numpy as np

from loka.formats import RECIPES
from loka.quantize import quantize
from tests.kernel_registry.made_gemm import accumulation_bound, modelled
from tests.made_processes import processes


def model(x, recipe, role):
    """What an operand becomes under a recipe, in float64."""
    return modelled(x.detach().cpu().float().numpy(), recipe, role)


def product_bound(a, b, k, got):
    """How far `got` may be from a @ b.T, by what a sum of k products in any order, on tensor cores, may be off."""
    bound = accumulation_bound(a, b, k, got.dtype)
    if got.is_cuda:  # tensor cores keep about 14 bits of a partial sum
        bound = bound + 2.0**-12 * (np.abs(a) @ np.abs(b).T)
    return bound


def assert_product(got, a, b, k):
    """Compare with a @ b.T in float64."""
    error = np.abs(got.detach().double().cpu().numpy() - a @ b.T)
    bound = product_bound(a, b, k, got)
    assert got.shape == error.shape
    assert (error <= bound).all(), (error - bound).max()


def coded(recipe, x, weight):
    """Codes of an input and a weight, then their scales."""
    (codes, scale), (weight_codes, weight_scale) = (
        quantize(t, RECIPES[recipe].operand(role)) for t, role in ((x, "input"), (weight, "weight"))
    )
    return codes, weight_codes, scale, weight_scale


def compiled_elsewhere(cache, program, *arguments):
    """Let one of the modules `compiled_*` find out, in a process without the interpreter; return what it found."""
    environment = {"TRITON_INTERPRET": "", "TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    (done,) = processes(_found, [(cache, program, arguments)], limit_s=240, **environment)
    said = (cache / "stderr").read_text()
    assert done.code == 0, done.error + said
    # Inductor has to see what a kernel writes to.
    assert "assuming every input is mutated" not in said
    return done.result


def _found(cache, program, arguments):
    with open(cache / "stderr", "w") as said:
        os.dup2(said.fileno(), 2)
    return importlib.import_module(f"tests.kernel_registry.{program}").found(*arguments)
