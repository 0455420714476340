"""Freezing: weights stored in FP8, the numbers of the converted model, and nothing that quietly goes wrong."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.running.convert import convert, planned_sites
from loka.formats import RECIPES
from loka.quantize import dequantize
from loka.torch_release import ROW_SCALES_ON_CPU, release
from tests.dispatch.made_frozen import HERE, Mlp, frozen_mlp, plan_of

ROWS = pytest.mark.skipif(release() < ROW_SCALES_ON_CPU, reason="this torch has no scales of rows on a CPU")

# --- the numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", HERE)
def test_results_are_those_of_the_converted_model_bit_for_bit(kernel: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Mlp(width=144).to(dtype)  # ragged against blocks of 128
    converted = copy.deepcopy(model)
    plan = plan_of(model, ["up", "down", "head"], kernel)
    convert(converted, plan)
    frozen = freeze(model, plan)
    assert dict(frozen.kernels) == dict.fromkeys(["up", "down", "head"], kernel)
    assert frozen.left == {}
    for shape in ((5, 144), (2, 3, 144), (0, 144), (144,)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            want, got = converted(x), model(x)
        assert torch.equal(got, want)
        assert got.dtype == want.dtype


@pytest.mark.third_party("torchao")
@pytest.mark.parametrize("kernel", ["torchao.linear.tensorwise", pytest.param("torchao.linear.rowwise", marks=ROWS)])
def test_products_of_another_library_read_stored_codes_too(kernel: str) -> None:
    torch.manual_seed(0)
    model = Mlp(width=24)
    plan = plan_of(model, ["up", "down"], kernel)
    converted = convert(copy.deepcopy(model), plan)
    assert freeze(model, plan).left == {}
    x = torch.randn(5, 24)
    with torch.no_grad():
        want = converted(x)
        assert torch.equal(model(x), want)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(x), want)


def test_what_is_stored_stands_for_the_quantised_weight() -> None:
    torch.manual_seed(0)
    model = Mlp()
    weight = model.up.weight.detach().clone()
    freeze(model, plan_of(model, ["up"]))
    assert model.up.weight.codes.dtype == RECIPES["rowwise"].operand("weight").format.dtype
    values = dequantize(model.up.weight.codes, model.up.weight_scale, RECIPES["rowwise"].operand("weight"))
    assert (values - weight).abs().max() <= weight.abs().max() * 2.0**-4
    assert not torch.equal(values, weight)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_input_meets_the_stored_weight_and_costs_dense_ones_no_kernel(layout: torch.layout) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 32))
    bias = layer[0].bias.detach().double()
    freeze(layer, plan_of(layer, ["0"], "emulated.linear.blockwise"))
    stored = dequantize(layer[0].weight.codes, layer[0].weight_scale, RECIPES["blockwise"].operand("weight")).double()
    x = torch.randn(16, 48) * (torch.rand(16, 48) < 0.1)
    with torch.no_grad():
        dense = layer(x)
        got = layer(x.to_sparse(layout=layout))
        torch.testing.assert_close(got.double(), x.double() @ stored.T + bias, rtol=1e-5, atol=1e-6)
        assert not torch.equal(got, dense)
        assert torch.equal(layer(x), dense)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_traces_the_stored_weight_in_high_precision_and_takes_no_kernel_out_of_use() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 32))
    bias = layer[0].bias.detach().double()
    freeze(layer, plan_of(layer, ["0"], "emulated.linear.blockwise"))
    stored = dequantize(layer[0].weight.codes, layer[0].weight_scale, RECIPES["blockwise"].operand("weight")).double()
    x = torch.randn(16, 48)
    with torch.no_grad():
        before = layer(x)
        traced = torch.jit.trace(layer, x, check_trace=False)
        for batch in (x, torch.randn(5, 48)):  # no size of the traced batch is in it
            want = batch.double() @ stored.T + bias
            torch.testing.assert_close(traced(batch).double(), want, rtol=1e-5, atol=1e-6)
        assert torch.equal(layer(x), before)


def test_under_autocast_results_have_its_dtype() -> None:
    model, _ = frozen_mlp()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.up(torch.randn(3, 16)).dtype == torch.bfloat16
        assert model(torch.randn(3, 16)).isfinite().all()


def test_memory_is_about_half_of_bf16() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).bfloat16()
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    frozen = freeze(model, plan_of(model, [str(i) for i in range(4)]))
    after = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (frozen.bytes_before, frozen.bytes_after) == (before, after)
    assert 0.5 < after / before < 0.52
    assert [name for name, _ in model.named_parameters()] == [f"{i}.bias" for i in range(4)]


# --- the module that it was ---


def test_hooks_bias_name_and_class_stay() -> None:
    model = Mlp()
    fired: list[str] = []
    model.up.register_forward_hook(lambda *_: fired.append("hook"))
    bias = model.up.bias
    freeze(model, plan_of(model, ["up"]))
    assert model.up.bias is bias
    assert isinstance(model.up, nn.Linear)
    assert "in_features=16, out_features=32" in repr(model.up)
    model(torch.randn(3, 16))
    assert fired == ["hook"]


def test_copies_and_whole_saved_models_are_frozen_too() -> None:
    model, _ = frozen_mlp()
    x = torch.randn(3, 16)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other.up) is type(model.up)
        assert torch.equal(other(x), model(x))


def test_a_cast_of_the_model_leaves_codes_and_scales() -> None:
    model, _ = frozen_mlp()
    codes, scale = model.up.weight.codes, model.up.weight_scale
    for cast in (Mlp.bfloat16, Mlp.half, Mlp.float):
        cast(model)
        assert model.up.weight.codes.dtype == codes.dtype
        assert torch.equal(model.up.weight.codes.float(), codes.float())
        assert torch.equal(model.up.weight_scale, scale)
        assert model(torch.randn(3, 16, dtype=model.up.bias.dtype)).isfinite().all()


def test_parameters_that_are_views_of_one_table_want_no_gradient_through_it() -> None:
    class Slice(nn.Parameter):  # as torchrec shows the tables that it keeps in one tensor
        def __new__(cls, data: Tensor) -> "Slice":
            return data.as_subclass(cls)

        @property
        def grad_fn(self) -> None:  # type: ignore[override]
            return None

    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp(width=16)
            table = nn.Parameter(torch.randn(8, 16))
            self.whole = [table]  # as one of another library's objects holds it
            self.first, self.last = Slice(table[:4]), Slice(table[4:])

        def forward(self, rows: Tensor) -> Tensor:
            return self.mlp(self.whole[0][rows])

    model = Tables()
    assert not model.first.is_leaf
    freeze(model, plan_of(model, ["mlp.up", "mlp.down"], "emulated.linear.rowwise"))
    assert not model(torch.arange(8)).requires_grad


def test_a_converted_model_can_be_frozen() -> None:
    model = Mlp()
    plan = plan_of(model, ["up", "down"])
    convert(model, plan)
    x = torch.randn(3, 16)
    with torch.no_grad():
        want = model(x)
    freeze(model, plan)
    assert planned_sites(model) == {}
    assert torch.equal(model(x), want)


ELSEWHERE = """
import sys
import torch
model = torch.load(sys.argv[1], weights_only=False)
x = torch.ones(3, 16)
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), model(x))
"""


def test_a_frozen_layer_that_was_saved_compiles_in_a_process_that_never_froze_one(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(16, 12))
    freeze(layer, plan_of(layer, ["0"], "emulated.linear.blockwise"))
    torch.save(layer, tmp_path / "layer.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "layer.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)


# --- checkpoints ---


def test_a_frozen_checkpoint_goes_through_a_file_into_a_freshly_frozen_model(tmp_path: Path) -> None:
    for kernel in HERE:
        model, _ = frozen_mlp(kernel)
        other, _ = frozen_mlp(kernel, seed=1)
        x = torch.randn(3, 16)
        assert not torch.equal(model(x), other(x))
        save_file(model.state_dict(), tmp_path / "frozen.safetensors")
        state = load_file(tmp_path / "frozen.safetensors")
        assert state["up.weight"].dtype == model.up.weight.codes.dtype
        other.load_state_dict(state)
        assert torch.equal(model(x), other(x))


def test_no_padding_is_kept_with_a_weight_and_a_whole_model_can_be_saved(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256))  # blocks of 128 pad 64 rows, and cut them off again
    frozen = freeze(layer, plan_of(layer, ["0", "1"], "emulated.linear.blockwise"))
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in layer.buffers())
    assert frozen.bytes_after == 2 * 64 * 256 + 2 * 2 * 4 + (64 + 256) * 4  # codes, scales, biases
    save_model(layer, str(tmp_path / "layer.safetensors"))  # refuses what is part of a larger storage
    saved = load_file(tmp_path / "layer.safetensors")
    assert all(torch.equal(saved[name].float(), each.float()) for name, each in layer.state_dict().items())


class SavesItself(nn.Linear):
    """A layer of a library's own, which saves what it finds under the name of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.data
        destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.data


@pytest.mark.parametrize("kernel", HERE)
def test_a_module_that_saves_its_weight_by_itself_saves_codes_and_scales(kernel: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = (nn.Sequential(SavesItself(16, 32), nn.Linear(32, 16)) for _ in range(2))
    for each in (model, other):
        freeze(each, plan_of(each, ["0", "1"], kernel))
    state = model.state_dict()
    assert list(state) == ["0.weight", "0.bias", "0.weight_scale", "1.bias", "1.weight", "1.weight_scale"]
    assert model.state_dict(keep_vars=True)["0.weight_scale"] is model[0].weight_scale
    torch.save(state, tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = torch.randn(3, 16)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("order", ["loaded, then frozen", "frozen, then loaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_in_high_precision_is_quantised(order: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = Mlp().to(dtype)
    plan = plan_of(source, ["up", "down"])
    save_file(source.state_dict(), tmp_path / "trained.safetensors")
    freeze(source, plan)
    torch.manual_seed(1)
    model = Mlp().to(dtype)
    if order == "frozen, then loaded":
        freeze(model, plan)
    model.load_state_dict(load_file(tmp_path / "trained.safetensors"))
    if order == "loaded, then frozen":
        freeze(model, plan)
    want = source.state_dict()
    assert all(torch.equal(value.float(), want[name].float()) for name, value in model.state_dict().items())


def test_a_model_made_on_meta_takes_checkpoints_by_assignment() -> None:
    source, x = Mlp(), torch.randn(3, 16)
    plan = plan_of(source, ["up", "down"], "emulated.linear.rowwise")
    frozen = copy.deepcopy(source)
    freeze(frozen, plan)
    for state in (source.state_dict(), frozen.state_dict()):
        with torch.device("meta"):
            made = Mlp()
        freeze(made, plan)
        made.load_state_dict(state, assign=True)
        assert {each.device.type for each in made.state_dict().values()} == {"cpu"}
        assert torch.equal(made(x), frozen(x))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_a_checkpoint_that_is_copied_to_meta_is_told_by_torch() -> None:
    with torch.device("meta"):
        model = Mlp()
    freeze(model, plan_of(model, ["up", "down"], "emulated.linear.rowwise"))
    with pytest.warns(UserWarning, match=r"for up\.weight: copying from a non-meta parameter .* to a meta parameter"):
        model.load_state_dict(Mlp().state_dict())


def test_codes_of_another_format_or_recipe_are_refused() -> None:
    model, _ = frozen_mlp()
    other, _ = frozen_mlp("torch.scaled_mm.tensorwise")
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.weight_scale"):
        model.load_state_dict(other.state_dict())
    state = model.state_dict()
    e5m2 = RECIPES["tensorwise"].operand("grad_output").format.dtype
    with pytest.raises(RuntimeError, match=r"up\.weight is .*takes .* or high precision"):
        model.load_state_dict({**state, "up.weight": state["up.weight"].float().to(e5m2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight_scale"):
        model.load_state_dict({name: value for name, value in state.items() if name != "up.weight_scale"})
