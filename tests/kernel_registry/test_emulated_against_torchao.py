"""Emulated FP8 where torchao's breaks on a CPU, and the same numbers where recipes agree."""

import logging

import pytest
import torch
from torch import Tensor, nn

import loka
from loka.dispatch.running.linear import linear
from loka.formats import PASS_OPERANDS, PASSES, RECIPES
from loka.kernel_registry import emulated
from loka.quantize import dequantize, quantize
from tests.dispatch.made_conversion import plan_for
from tests.kernel_registry.made_gemm import heavy_tailed as draw
from tests.kernel_registry.made_gemm import operands

NAMES = ("tensorwise", "rowwise")
KERNELS = {name: getattr(emulated, name) for name in NAMES}
NAN, INF = float("nan"), float("inf")


def heavy_tailed(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.exp(3 * torch.randn(shape))


def three(name: str) -> tuple[str, str, str]:
    return (f"emulated.linear.{name}",) * 3


@pytest.fixture
def peer():
    return pytest.importorskip("torchao.float8")


def converted_by(peer, name: str, model: nn.Module) -> nn.Module:
    config = peer.Float8LinearConfig.from_recipe_name(name)
    object.__setattr__(config, "emulate", True)  # `from_recipe_name` takes no such argument
    return peer.convert_to_float8_training(model, config=config)


# --- what torchao cannot do here ---


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_an_empty_output_and_zero_gradients(name: str) -> None:
    x, weight = torch.randn(0, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    y = linear(x, weight, torch.randn(8), *three(name))
    y.sum().backward()
    assert y.shape == (0, 8)
    assert x.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros(8, 16))


@pytest.mark.third_party("torchao")
def test_torchao_refuses_an_empty_batch(peer) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        converted_by(peer, "tensorwise", nn.Sequential(nn.Linear(16, 8)))(torch.randn(0, 16))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_bad_element_spoils_its_own_row_and_leaves_the_others_as_they_were(
    name: str, dtype: torch.dtype, bad: float
) -> None:
    x, weight = torch.randn(32, 16).to(dtype), torch.randn(8, 16).to(dtype)
    x[3, 5] = 0
    expected = linear(x, weight, None, *three(name))
    x[3, 5] = bad
    got = linear(x, weight, None, *three(name))
    assert not got[3].isfinite().any()
    others = torch.arange(32) != 3
    assert torch.equal(got[others], expected[others])


@pytest.mark.third_party("torchao")
def test_torchao_spoils_every_row_under_tensorwise(peer) -> None:
    x = torch.randn(32, 16)
    x[3, 5] = NAN
    assert converted_by(peer, "tensorwise", nn.Sequential(nn.Linear(16, 8)))(x).isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_forward_hooks_put_on_before_the_conversion_still_run(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    seen: list[torch.Size] = []
    model[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    loka.convert(model, plan_for(model, {"0": dict.fromkeys(PASSES, name)}))
    model(torch.randn(4, 16))
    assert seen == [(4, 8)]


class Experts(nn.Module):
    """A mixture of experts that holds their weights in bare parameters, as Qwen3-MoE does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(16, 24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up.t()) @ self.down.t()


def test_weights_used_without_a_linear_layer_are_converted_too() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Experts())
    x = torch.randn(8, 16)
    high = model(x)
    loka.convert(model, plan_for(model, {site: dict.fromkeys(PASSES, "rowwise") for site in ("1.up", "1.down")}))
    hidden = torch.relu(linear(model[0](x), model[1].up, None, *three("rowwise")))
    low = linear(hidden, model[1].down, None, *three("rowwise"))
    assert torch.equal(model(x), low)
    assert not torch.equal(low, high)


# --- the same numbers ---


@pytest.mark.third_party("torchao")
@pytest.mark.parametrize("product", PASSES)
def test_tensorwise_products_equal_those_of_torchao(peer, product: str) -> None:
    """Both scales are amax / max there and here; torchao's is rounded in another order."""
    a, b = operands(draw, 33, 24, 70)
    got = emulated.tensorwise(a, b, product=product, out_dtype=torch.float32)
    values = [
        _by_torchao(x, role, RECIPES["tensorwise"], round_up=False)
        for x, role in zip((a, b), PASS_OPERANDS[product], strict=True)
    ]
    near = values[0] @ values[1].T
    room = values[0].abs() @ values[1].abs().T
    # A scale that differs in its last bit moves a number that lies on a tie by a step: seldom, and by that at most.
    assert float(((got - near).abs() / room).max()) < 2.0**-4
    assert float(((got - near).abs() / room).median()) < 1e-6


@pytest.mark.third_party("torchao")
def test_rowwise_differs_from_torchao_by_its_powers_of_two_alone(peer) -> None:
    config = peer.Float8LinearConfig.from_recipe_name("rowwise")
    assert config.round_scales_to_power_of_2
    x = heavy_tailed(33, 70)
    theirs = _by_torchao(x, "input", RECIPES["rowwise"], round_up=True)
    spec = RECIPES["mxfp8"].operand("input")  # scales rounded up ...
    spec = type(spec)(format=spec.format, group_rows=1, group_k=None, scale_rule="pow2_up")  # ... over whole rows
    ours = dequantize(*quantize(x, spec), spec)
    assert torch.equal(ours, theirs)


def _by_torchao(x: Tensor, role: str, recipe, *, round_up: bool) -> Tensor:
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    spec = recipe.operand(role)
    by_rows = spec.group_rows == 1
    scale = tensor_to_scale(
        x,
        spec.format.dtype,
        scaling_granularity=ScalingGranularity.AXISWISE if by_rows else ScalingGranularity.TENSORWISE,
        axiswise_dim=-1 if by_rows else None,
        round_scales_to_power_of_2=round_up,
    )
    return to_fp8_saturated(x * scale, spec.format.dtype).float() / scale


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("torchao").setLevel(logging.ERROR)
