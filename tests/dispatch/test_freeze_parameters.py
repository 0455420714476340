"""Freezing what no linear layer holds: Parameters that code multiplies by, in every form, and experts of a layer."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.freezing.stored_grouped import Experts as StoredExperts
from loka.dispatch.freezing.stored_grouped import quantize_stack, stored_grouped
from loka.dispatch.freezing.stored_weight import StoredWeight
from loka.dispatch.running.convert import convert
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.dispatch.running.grouped import grouped
from loka.errors import KernelError
from loka.formats import RECIPES
from loka.kernel_registry.registry import default_registry
from tests.dispatch.made_conversion import decision, needs_a_compiler, plan_for
from tests.dispatch.made_converted import FORMS, Bypassing, Form, Mlp, Written
from tests.dispatch.made_experts import FORMS as GROUPED_FORMS
from tests.dispatch.made_experts import Experts, K, N, offsets_of
from tests.kernel_registry.made_devices import needs_interpreter

KERNEL = "torch.scaled_mm.rowwise"
COUNTS = (5, 0, 14, 2)
ENDS = offsets_of(COUNTS)
TOKENS = sum(COUNTS)
SLOW = "emulated.linear.rowwise"


def plan_of(
    model: nn.Module, site: str, sizes: tuple[int, int], kernel: str = KERNEL, kept: tuple[int, ...] = ()
) -> Plan:
    """Plan the forward products of one site, with n x k."""
    spec = default_registry().get(kernel)
    one = decision(site, "fprop", spec.recipe, kernel=kernel)
    request = replace(one.request, op=spec.op, n=sizes[0], k=sizes[1])
    return plan_for(model, [], decisions=(replace(one, request=request, kept_experts=kept),))


# Forms of a product with a part that is not quantised by itself when the whole is, or with a weight that is no matrix.
LEFT = {"x @ w.view": r"torch\.float32 \[192\]"}


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "tensorwise"])
@pytest.mark.parametrize("form", FORMS)
def test_a_parameter_in_any_form_has_the_numbers_of_the_converted_model(form: str, recipe: str) -> None:
    torch.manual_seed(0)
    model = Written(FORMS[form].shape, FORMS[form].product)
    plan = plan_of(model, "w", (12, 16), f"emulated.linear.{recipe}")
    converted = convert(copy.deepcopy(model), plan)
    frozen = freeze(model, plan)
    if frozen.left:
        part = form == "x @ half of w" and recipe != "rowwise"
        assert part or form in LEFT, frozen.left
        return
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(model(x), converted(x))
    assert isinstance(model.w, StoredWeight)
    assert model.w.shape == FORMS[form].shape
    assert model.w.dtype == torch.float32
    assert model.w.codes.dtype == torch.float8_e4m3fn
    assert not any(name == "w" for name, _ in model.named_parameters())


def test_what_cannot_be_stored_as_a_whole_is_left() -> None:
    model = Written(FORMS["x @ half of w"].shape, FORMS["x @ half of w"].product)
    frozen = freeze(model, plan_of(model, "w", (12, 16), "emulated.linear.tensorwise"))
    assert "its products, of 12 x 16, are with parts of it" in frozen.left["w"]
    assert model(torch.randn(3, 16)).isfinite().all()
    model = Written((192,), FORMS["x @ w.view"].product)
    assert "[192]" in freeze(model, plan_of(model, "w", (12, 16))).left["w"]


SQUARE = {
    "nk": lambda m, x: F.linear(x, m.w),
    "kn": lambda m, x: x @ m.w,
    "w @ x": lambda m, x: torch.matmul(m.w, x.mT),
}


@pytest.mark.parametrize("form", SQUARE)
def test_a_square_parameter_is_frozen_once_its_products_were_seen(form: str) -> None:
    torch.manual_seed(0)
    model = Written((16, 16), SQUARE[form])
    plan = plan_of(model, "w", (16, 16))
    fresh = copy.deepcopy(model)
    assert "convert the model, run it once" in freeze(fresh, plan).left["w"]
    x = torch.randn(5, 16)
    convert(model, plan)
    with torch.no_grad():
        want = model(x)
    frozen = freeze(model, plan)
    assert list(frozen.kernels) == ["w"]
    assert model.w.storage.turned == (form == "kn")
    assert torch.equal(model(x), want)
    # Where scales are of square blocks, it does not matter.
    fresh = Written((16, 16), SQUARE[form])
    plan = plan_of(fresh, "w", (16, 16), "emulated.linear.blockwise")
    converted = convert(copy.deepcopy(fresh), plan)
    freeze(fresh, plan)
    with torch.no_grad():
        assert torch.equal(fresh(x), converted(x))


class Cross(nn.Module):
    """DCN's cross layers: one list of Parameters, no linear layer."""

    def __init__(self, layers: int = 2, width: int = 16) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(nn.Parameter(torch.randn(width, width) / 4) for _ in range(layers))
        self.bias = nn.ParameterDict({str(layer): nn.Parameter(torch.randn(width)) for layer in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer, kernel in enumerate(self.kernels):
            out = x * (torch.matmul(out, kernel) + self.bias[str(layer)]) + out
        return out


def test_lists_of_parameters_are_frozen_exported_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Cross(), torch.randn(5, 16)
    made = [plan_of(model, f"kernels.{layer}", (16, 16)).decisions[0] for layer in range(2)]
    plan = plan_for(model, [], decisions=tuple(made))
    other = copy.deepcopy(model)
    convert(model, plan)
    with torch.no_grad():
        want = model(x)
    freeze(model, plan)
    assert torch.equal(model(x), want)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    torch.export.save(program, tmp_path / "cross.pt2")
    loaded = torch.export.load(tmp_path / "cross.pt2").module()
    more = torch.randn(9, 16)
    assert torch.equal(loaded(x), want)
    assert torch.equal(loaded(more), model(more))

    save_file(model.state_dict(), tmp_path / "cross.safetensors")
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    convert(other, plan)(x)
    freeze(other, plan)
    assert not torch.equal(other(x), want)
    other.load_state_dict(load_file(tmp_path / "cross.safetensors"))
    assert torch.equal(other(x), want)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.weight, self.bias)


@pytest.mark.parametrize("make", [lambda: Scaled(16, 12), Bypassing], ids=["a forward of its own", "bypassed"])
def test_a_linear_layer_that_others_read_is_frozen_for_them(make) -> None:
    torch.manual_seed(0)
    model = make()
    site = "weight" if isinstance(model, Scaled) else "lin"
    frozen = freeze(reference := copy.deepcopy(model), plan_of(model, site, (12, 16)))
    assert list(frozen.kernels) == [site]
    layer = model if isinstance(model, Scaled) else model.lin
    x = torch.randn(5, 16)
    plain = nn.Linear(16, 12)
    plain.load_state_dict(layer.state_dict())
    freeze(plain, plan_of(plain, "weight", (12, 16)))
    assert torch.equal(reference(x), plain(2 * x if isinstance(model, Scaled) else x))


def test_fused_layers_of_torch_run_on_stored_weights() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    sites = {
        "linear1": (32, 16),
        "linear2": (16, 32),
        "self_attn.in_proj_weight": (48, 16),
        "self_attn.out_proj": (16, 16),
    }
    made = [
        plan_of(model, f"layers.{layer}.{site}", sizes, SLOW).decisions[0]
        for site, sizes in sites.items()
        for layer in range(2)
    ]
    plan = plan_for(model, [], decisions=tuple(made))
    converted = convert(copy.deepcopy(model), plan)
    frozen = freeze(model, plan)
    assert len(frozen.kernels) == 8, frozen
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(model(x), converted(x))


# --- what it is not ---


@pytest.mark.parametrize(
    ("use", "word"),
    [
        (lambda m, x: x * m.w.t(), "mul"),
        (lambda m, x: m.w.sum(), "sum"),
        (lambda m, x: torch.cat([m.w, m.w]), "cat"),
        (lambda m, x: x @ m.w.t().exp(), "exp"),
        (lambda m, x: F.linear(x[..., :8], m.w[:, :8]), r"a product with \[12, 8\] of it"),
        (lambda m, x: x[..., :12] @ m.w, r"a product with \[16, 12\] of it"),
        (lambda m, x: m.w[::2], "every so many rows"),
        (lambda m, x: m.w[torch.tensor([0, 1])], "not by Tensor"),
        (lambda m, x: torch.bmm(x[None], m.w.t()[None]), "indexed by"),
    ],
    ids=["mul", "sum", "cat", "exp", "columns", "the other way", "steps", "gather", "bmm"],
)
def test_numbers_that_are_gone_are_an_error_and_never_other_numbers(use, word: str) -> None:
    model = Written((12, 16), use)
    freeze(model, plan_of(model, "w", (12, 16)))
    with pytest.raises((KernelError, AttributeError, TypeError), match=word):
        model(torch.randn(3, 16))


def test_views_that_do_not_exist_are_errors_as_they_are_of_tensors() -> None:
    model = Written((12, 16), lambda m, x: F.linear(x, m.w))
    freeze(model, plan_of(model, "w", (12, 16)))
    for wrong in (lambda w: w[12], lambda w: w.select(2, 0), lambda w: w.narrow(0, 8, 8), lambda w: w.transpose(0, 2)):
        with pytest.raises(IndexError):
            wrong(model.w)
    assert [len(each) for each in model.w.split(5)] == [5, 5, 2]
    assert [len(each) for each in model.w.chunk(5)] == [3, 3, 3, 3]
    assert len(list(model.w)) == 12
    assert model.w[..., None:].shape == (12, 16)
    assert model.w.T.permute(1, 0).shape == model.w.size() == torch.Size([12, 16])
    with pytest.raises(KernelError, match=r"wants a gradient.*'w' is frozen|'w' is frozen \(16 to 12 features\)"):
        model(torch.randn(3, 16, requires_grad=True))


# --- experts ---

GROUPED = sorted(spec.name for spec in default_registry().candidates("grouped_linear") if spec.library == "emulated")
# Of a part of a stack, tensorwise scales are another.
PART = "a part of the parameter"


def grouped_model(form: str, dtype: torch.dtype = torch.float32) -> Experts:
    torch.manual_seed(0)
    return Experts(form, dtype=dtype)


@pytest.mark.parametrize("kernel", GROUPED)
@pytest.mark.parametrize("form", GROUPED_FORMS)
def test_experts_in_any_form_have_the_numbers_of_the_converted_model(form: str, kernel: str) -> None:
    model = grouped_model(form)
    plan = plan_of(model, "w", (N, K), kernel)
    converted = convert(copy.deepcopy(model), plan)
    frozen = freeze(model, plan)
    spec = RECIPES[default_registry().get(kernel).recipe or ""].operand("weight")
    if form == PART and spec.group_rows not in (1,):
        assert "are with parts of it" in frozen.left["w"]
        return
    x = torch.randn(TOKENS + 2, K)
    reset_kernel_executions()
    with torch.no_grad():
        got = model(x, ENDS)
        assert kernel_executions() == {kernel: 1}
        assert torch.equal(got, converted(x, ENDS))
    assert model.w.codes.shape == (4, *((2 * N if form == PART else N), K))
    assert frozen.bytes_after < 0.5 * frozen.bytes_before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_of_two_bytes_take_half_the_memory(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(4, 64, 256).to(dtype))
    model.forward = None
    frozen = freeze(model, plan_of(model, "w", (64, 256), "emulated.grouped_linear.rowwise"))
    assert frozen.bytes_after / frozen.bytes_before == pytest.approx(0.5 + 4 / (2 * 256))


@pytest.mark.parametrize(
    "form", ["F.grouped_mm, transposed view", "F.grouped_mm, stored transposed", "weights on the left"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_experts_stay_in_high_precision(form: str, dtype: torch.dtype) -> None:
    model = grouped_model(form, dtype)
    plan = plan_of(model, "w", (N, K), "emulated.grouped_linear.rowwise", kept=(1, 2))
    converted = convert(copy.deepcopy(model), plan)
    plain = convert(copy.deepcopy(model), plan_of(model, "w", (N, K), "emulated.grouped_linear.rowwise"))
    x = torch.randn(TOKENS, K).to(dtype)
    freeze(model, plan)
    assert model.state_dict()["w_kept"].dtype == dtype
    with torch.no_grad():
        assert torch.equal(model(x, ENDS), converted(x, ENDS))
        assert not torch.equal(model(x, ENDS), plain(x, ENDS))
        if dtype == torch.bfloat16:  # torch traces no other grouped product
            program = torch.export.export(model, (x, ENDS))
            assert torch.equal(program.module()(x, ENDS), converted(x, ENDS))


def test_a_loop_over_experts_runs_on_stored_weights_too() -> None:
    def loop(m: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, m.w[index]) for index in (torch.tensor(2), 0, -1)])

    torch.manual_seed(0)
    model = Written((4, 12, 16), loop)
    plan = plan_of(model, "w", (12, 16), kept=(2,))
    converted = convert(copy.deepcopy(model), plan)
    freeze(model, plan)
    x = torch.randn(5, 16)
    with torch.no_grad():
        assert torch.equal(model(x), converted(x))


@needs_interpreter
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_our_grouped_kernels_have_their_numbers_on_stored_experts(recipe: str) -> None:
    kernel = f"triton.grouped.{recipe}"
    x, weight = torch.randn(TOKENS + 2, 32), torch.randn(4, 160, 32)
    codes, scale = quantize_stack(weight, RECIPES[recipe].operand("weight"))
    got = stored_grouped(kernel, x, StoredExperts(codes, scale), ENDS, traceable=True)
    assert torch.equal(got, grouped(x, weight, ENDS, kernel, "", ""))
    part = stored_grouped(
        kernel, x, StoredExperts(codes[:, 128:], scale[:, -scale.shape[1] // 5 :]), ENDS, traceable=True
    )
    assert torch.equal(part, grouped(x, weight[:, 128:], ENDS, kernel, "", ""))


def test_experts_go_through_a_file_and_a_checkpoint_in_high_precision(tmp_path: Path) -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Experts("F.grouped_mm, stored transposed")
        plan = plan_of(model, "w", (N, K), "emulated.grouped_linear.blockwise", kept=(3,))
        high = copy.deepcopy(model.state_dict())
        freeze(model, plan)
        made.append((model, high))
    (first, high), (second, _) = made
    x = torch.randn(TOKENS, K)
    assert not torch.equal(first(x, ENDS), second(x, ENDS))
    save_file(first.state_dict(), tmp_path / "experts.safetensors")
    second.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    assert torch.equal(first(x, ENDS), second(x, ENDS))
    third = copy.deepcopy(second)
    for tensor in third.buffers():
        tensor.zero_()
    third.load_state_dict(high)
    assert torch.equal(first(x, ENDS), third(x, ENDS))
    with pytest.raises(
        RuntimeError, match=r"w is torch\.float32 \[4, 24, 16\].*takes .*\[4, 24, 16\], or high precision \[4, 16, 24\]"
    ):
        third.load_state_dict({"w": high["w"].mT})


def test_a_stored_weight_follows_its_model_in_dtype_alone() -> None:
    model = grouped_model("F.grouped_mm, transposed view", torch.float32)
    freeze(model, plan_of(model, "w", (N, K), "emulated.grouped_linear.rowwise", kept=(0,)))
    codes, scale = model.w.codes.clone(), model.w.scale.clone()
    model.bfloat16()
    assert model.w.dtype == model.w.high.dtype == torch.bfloat16
    assert torch.equal(model.w.codes.float(), codes.float())
    assert torch.equal(model.w.scale, scale)
    assert model(torch.randn(TOKENS, K).bfloat16(), ENDS).dtype == torch.bfloat16
    with pytest.raises(KernelError, match="grouped"):
        model(torch.randn(TOKENS, K), ENDS)


# --- compiled and exported ---

# A trace takes a second or so: one form of each kind.
EXPORTED = ["F.linear with bias", "x @ w", "w @ x", "x @ w[i]"]
COMPILED = ["x @ w", "w @ x", "x @ half of w", "einsum"]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("form", EXPORTED)
def test_a_parameter_is_exported(form: str, strict: bool) -> None:
    torch.manual_seed(0)
    chosen: Form = FORMS[form]
    model = Written(chosen.shape, chosen.product)
    freeze(model, plan_of(model, "w", (12, 16)))
    x = torch.randn(2, 5, 16)
    program = torch.export.export(model, (x,), strict=strict)
    assert program.state_dict["w"].dtype == torch.float8_e4m3fn
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("form", COMPILED)
def test_a_parameter_compiles_in_one_graph(form: str) -> None:
    torch.manual_seed(0)
    model = Written(FORMS[form].shape, FORMS[form].product)
    freeze(model, plan_of(model, "w", (12, 16)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3):
            x = torch.randn(batch, 5, 16)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("form", ["w @ x", "x @ w"])
def test_operands_that_dynamo_may_have_swapped_are_never_guessed(form: str) -> None:
    product = (lambda m, x: m.w @ x) if form == "w @ x" else (lambda m, x: x @ m.w)
    model = Written((16, 16), product)
    plan = plan_of(model, "w", (16, 16), "emulated.linear.blockwise")
    freeze(model, plan)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        x = torch.randn(16, 5) if form == "w @ x" else torch.randn(5, 16)
        torch.testing.assert_close(compiled(x), model(x))
        with pytest.raises(Exception, match="does not tell `x @ w` from `w @ x`"):
            compiled(torch.randn(16, 16))


@needs_a_compiler
def test_inductor_compiles_a_parameter() -> None:
    model = Written((12, 16), FORMS["F.linear with bias"].product)
    freeze(model, plan_of(model, "w", (12, 16)))
    x = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_frozen_model_is_frozen_too(tmp_path: Path) -> None:
    model = Mlp()
    model.w = nn.Parameter(torch.randn(12, 16))
    freeze(model, plan_of(model, "w", (12, 16)))
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other.w.codes.float(), model.w.codes.float())
        assert other.w.codes.data_ptr() != model.w.codes.data_ptr()
        other.bfloat16()
        assert (other.w.dtype, model.w.dtype) == (torch.bfloat16, torch.float32)
