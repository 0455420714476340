"""A linear layer with BlockNorm and HardSwish as one product: kernels against float64, and against the modules."""

import numpy as np
import pytest
import torch

from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.norm_act import NORM_BLOCK
from loka.kernel_registry.spec import GemmRequest
from loka.mods.block_norm import DEFAULT_BLOCK, BlockRMSNorm
from tests.kernel_registry.made_devices import interprets_triton
from tests.kernel_registry.made_gemm import heavy_tailed, modelled, normal, operands, with_zero_rows

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
SPECS = {spec.name: spec for spec in KERNELS if spec.op == "linear_norm_act"}
BASELINE = "torch.native.linear_norm_act"
HERE = [name for name in SPECS if interprets_triton() or not name.startswith("triton.")]
# One block and less, more with a ragged tail; odd k.
SHAPES = [(5, 40, 13), (7, 300, 429), (3, 512, 130)]


def run(name, a, b, out_dtype=torch.float32):
    return SPECS[name].load()(a, b, product="fprop", out_dtype=out_dtype)


def modelled_norm_act(a, b):
    """hard_swish(block_norm(a . b^T)) in float64, blocks of 256 columns, eps that of fp32."""
    y = a @ b.T
    for start in range(0, y.shape[1], 256):
        block = y[:, start : start + 256]
        block /= np.sqrt((block**2).mean(axis=1, keepdims=True) + np.finfo(np.float32).eps)
    return y * np.clip(y + 3, 0, 6) / 6


@pytest.mark.parametrize("draw", [normal, heavy_tailed, with_zero_rows])
@pytest.mark.parametrize("name", HERE)
def test_norm_and_activation_follow_the_modelled_product(name, draw):
    recipe = SPECS[name].recipe
    for m, n, k in SHAPES:
        a, b = operands(draw, m, n, k)
        left, right = (x.double().numpy() for x in (a, b))
        if recipe is not None:
            left, right = modelled(a.numpy(), recipe, "input"), modelled(b.numpy(), recipe, "weight")
        wanted = modelled_norm_act(left, right)
        got = run(name, a, b).double().numpy()
        # Sums of k products in another order, as far as the norm lets them count: every block has an RMS of one.
        sums = (np.abs(left) @ np.abs(right).T).max(axis=1, keepdims=True)
        size = np.sqrt(((left @ right.T) ** 2).mean(axis=1, keepdims=True)) + 1e-3
        assert (np.abs(got - wanted) <= (k + 10) * 2.0**-22 * (1 + sums / size) * (1 + np.abs(wanted))).all(), (m, n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_baseline_is_what_the_modules_compute(dtype):
    a, b = (x.to(dtype) for x in operands(normal, 9, 300, 65))
    modules = torch.nn.Sequential(torch.nn.Linear(65, 300, bias=False), BlockRMSNorm(300), torch.nn.Hardswish())
    modules[0].weight = torch.nn.Parameter(b)
    assert torch.equal(run(BASELINE, a, b, dtype), modules(a))
    assert NORM_BLOCK == DEFAULT_BLOCK


@pytest.mark.parametrize("name", [name for name in HERE if name != BASELINE])
def test_results_are_rounded_once(name):
    a, b = (x.bfloat16() for x in operands(normal, 4, 40, 20))
    assert torch.equal(run(name, a, b, torch.bfloat16), run(name, a.float(), b.float()).bfloat16())


@pytest.mark.parametrize("shape", [(0, 8, 4), (4, 8, 0), (4, 0, 8)])
@pytest.mark.parametrize("name", [name for name in HERE if name != BASELINE])
def test_nothing_normalised_is_nothing(name, shape):
    m, n, k = shape
    assert torch.equal(run(name, torch.ones(m, k), torch.ones(n, k)), torch.zeros(m, n))


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_products_of_another_op(name):
    request = GemmRequest(site="up", product="dgrad", op="linear_norm_act", m=8, n=16, k=16, dtype="bfloat16")
    assert SPECS[name].cannot(request) == "serves fprop, not dgrad"
