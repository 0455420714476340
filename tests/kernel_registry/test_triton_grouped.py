"""Grouped products of experts against the numpy model of the recipes; interpreted on a CPU, compiled on a GPU."""

import itertools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from loka.errors import ArgumentError, KernelError
from loka.formats import RECIPES
from loka.kernel_registry.triton.launch import CODES, Key
from loka.kernel_registry.triton.launches import TUNABLES
from loka.quantize import quantize
from tests.kernel_registry.made_devices import SHARED_KIB, TENSOR_CORES, needs_interpreter, triton_devices
from tests.kernel_registry.made_gemm import heavy_tailed, normal, with_zero_rows
from tests.kernel_registry.made_triton import assert_product, coded, compiled_elsewhere, model

pytest.importorskip("triton")
gemm = pytest.importorskip("loka.kernel_registry.triton.gemm")
grouped = pytest.importorskip("loka.kernel_registry.triton.grouped")
experts = pytest.importorskip("loka.kernel_registry.triton.grouped_linear")
operands = pytest.importorskip("loka.kernel_registry.triton.grouped_operands")

# numpy, which the interpreter computes with, warns of the NaN and Inf that some tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton")
on_devices = pytest.mark.parametrize("device", triton_devices())
of_recipes = pytest.mark.parametrize("recipe", experts.GROUPED_RECIPES)
of_draws = pytest.mark.parametrize("draw", [normal, heavy_tailed, with_zero_rows])

# tokens per expert, rows that belong to none, n, k: ragged; experts without tokens at every place; all tokens at one
# expert; one token; a few tokens each; more than one block of 128 along the tokens, along k and along n.
ROUTINGS = {
    "ragged": ((5, 17, 2), 0, 40, 13),
    "empty_experts": ((0, 0, 6, 0, 9, 0), 3, 33, 429),
    "all_at_one": ((0, 23, 0), 0, 24, 65),
    "one_token": ((0, 1), 0, 16, 130),
    "nobody": ((0, 0), 4, 8, 16),
    "few_each": ((1, 3, 2, 4, 1, 1, 2, 2), 0, 48, 32),
    "several_blocks": ((150, 129), 5, 140, 20),
}
of_routings = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


def made(draw, routing, device="cpu"):
    """x [tokens, k], weight [experts, n, k], grad_output [tokens, n] and the offsets."""
    counts, unused, n, k = routing
    tokens = sum(counts) + unused
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, k), (len(counts), n, k), (tokens, n))
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    return (*(draw(generator, shape).to(device) for shape in shapes), offsets.to(device))


def spans(offsets):
    ends = [0, *offsets.tolist()]
    return list(enumerate(itertools.pairwise(ends)))


# --- the three passes ---


@on_devices
@of_recipes
@of_draws
@of_routings
def test_each_expert_gets_the_modelled_product(device, recipe, draw, routing):
    x, weight, _, offsets = made(draw, routing, device)
    out = experts.grouped_linear(x, weight, offsets, recipe)
    assert out.shape == (len(x), weight.shape[1])
    assert out.dtype == x.dtype
    for e, (start, end) in spans(offsets):
        assert_product(
            out[start:end], model(x[start:end], recipe, "input"), model(weight[e], recipe, "weight"), x.shape[1]
        )
    assert not out[int(offsets[-1]) :].any()


@on_devices
@of_recipes
@pytest.mark.parametrize("draw", [normal, heavy_tailed])
@pytest.mark.parametrize("routing", ["ragged", "empty_experts", "nobody", "several_blocks"])
def test_gradients_are_the_modelled_products(device, recipe, draw, routing):
    x, weight, grad, offsets = made(draw, ROUTINGS[routing], device)
    n, k = weight.shape[1:]
    x.requires_grad_(), weight.requires_grad_()
    experts.grouped_linear(x, weight, offsets, recipe).backward(grad)
    for e, (start, end) in spans(offsets):
        own = grad[start:end]
        assert_product(x.grad[start:end], model(own, recipe, "grad_output"), model(weight[e].mT, recipe, "weight"), n)
        assert_product(weight.grad[e], model(own.mT, recipe, "grad_output"), model(x[start:end].mT, recipe, "input"), k)
    assert not x.grad[int(offsets[-1]) :].any()


@on_devices
@of_recipes
@of_draws
def test_codes_that_come_as_bytes_are_the_same_codes(monkeypatch, device, recipe, draw):
    x, weight, grad, offsets = made(draw, ROUTINGS["several_blocks"], device)
    gradients = []
    for as_bytes in (False, True):
        monkeypatch.setattr(grouped, "_as_bytes", lambda device, given=as_bytes: given)
        leaf = weight.clone().requires_grad_()
        experts.grouped_linear(x, leaf, offsets, recipe).backward(grad)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)


@on_devices
@of_recipes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once_to_16_bits(device, recipe, dtype):
    x, weight, _, offsets = made(normal, ROUTINGS["ragged"], device)
    out = experts.grouped_linear(x.to(dtype), weight.to(dtype), offsets, recipe)
    exact = experts.grouped_linear(x.to(dtype).float(), weight.to(dtype).float(), offsets, recipe)
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))


@on_devices
@of_recipes
def test_any_strides_give_the_same_bits(device, recipe):
    x, weight, _, offsets = made(normal, ROUTINGS["empty_experts"], device)
    codes, weight_codes, scale, weight_scale = coded(recipe, x, weight)
    plain = grouped.grouped_gemm(codes, weight_codes, offsets, scale, weight_scale, out_dtype=torch.float32)
    strided = grouped.grouped_gemm(
        codes.t().contiguous().t(),
        weight_codes.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        offsets,
        torch.stack([scale, scale], -1)[..., 0],
        weight_scale.mT.contiguous().mT,
        out_dtype=torch.float32,
    )
    assert torch.equal(plain, strided)


@on_devices
def test_rowwise_scales_need_no_last_dimension(device):
    x, weight, _, offsets = made(normal, ROUTINGS["ragged"], device)
    codes, weight_codes, scale, weight_scale = coded("rowwise", x, weight)
    both = [
        grouped.grouped_gemm(codes, weight_codes, offsets, *scales, out_dtype=torch.bfloat16)
        for scales in ((scale, weight_scale), (scale.squeeze(-1), weight_scale.squeeze(-1)))
    ]
    assert torch.equal(*both)


@on_devices
@of_recipes
def test_bad_values_stay_with_their_token(device, recipe):
    x, weight, grad, offsets = made(normal, ROUTINGS["ragged"], device)
    clean = experts.grouped_linear(x, weight, offsets, recipe)
    broken = x.clone()
    broken[6, 3], broken[9, 0] = float("nan"), float("inf")
    out = experts.grouped_linear(broken, weight, offsets, recipe)
    bad = torch.zeros(len(x), dtype=torch.bool, device=device)
    bad[[6, 9]] = True
    assert out[bad].isnan().all()
    assert torch.equal(out[~bad], clean[~bad])
    weight.requires_grad_()
    experts.grouped_linear(broken, weight, offsets, recipe).backward(grad)
    nan = weight.grad.isnan()
    assert nan[1, :, [0, 3]].all()  # expert 1 had the two tokens
    assert nan.sum() == 2 * weight.shape[1]


@on_devices
@of_recipes
def test_rows_of_nobody_stay_zero_whatever_is_in_them(device, recipe):
    x, weight, grad, offsets = made(normal, ROUTINGS["several_blocks"], device)
    last = int(offsets[-1])
    with torch.no_grad():
        x[last:], grad[last:] = float("nan"), float("inf")
    x.requires_grad_(), weight.requires_grad_()
    out = experts.grouped_linear(x, weight, offsets, recipe)
    out.backward(grad)
    assert not out[last:].any()
    assert not x.grad[last:].any()
    assert weight.grad.isfinite().all()


@on_devices
@pytest.mark.parametrize("sizes", [(0, 2, 8, 8), (5, 0, 8, 8), (5, 2, 0, 8), (5, 2, 8, 0)])
def test_nothing_to_multiply_gives_zeros(device, sizes):
    tokens, count, n, k = sizes
    x = torch.ones(tokens, k, device=device, requires_grad=True)
    weight = torch.ones(count, n, k, device=device, requires_grad=True)
    offsets = torch.full((count,), tokens, dtype=torch.int32, device=device)
    out = experts.grouped_linear(x, weight, offsets, "rowwise")
    out.sum().backward()
    assert out.shape == (tokens, n)
    assert not out.any()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


# --- quantising along the tokens ---


@of_recipes
def test_scales_along_tokens_are_those_of_each_expert_alone(recipe):
    x, _, _, offsets = made(heavy_tailed, ROUTINGS["several_blocks"])
    spec = RECIPES[recipe].operand("input")
    codes, scale = experts.quantize_tokens(x, offsets, spec)
    blockwise = recipe == "blockwise"
    assert scale.shape == (operands.token_groups(len(x), len(offsets), blockwise=blockwise), x.shape[1])
    for e, (start, end) in spans(offsets):
        own_codes, own_scale = quantize(x[start:end].t(), spec)
        first = start // 128 + e if blockwise else e
        assert torch.equal(codes[start:end].view(torch.uint8), own_codes.t().view(torch.uint8))
        assert torch.equal(scale[first : first + own_scale.shape[1]], own_scale.t())


@pytest.mark.parametrize("counts", [(0, 0, 300), (300, 0, 0), (127, 1, 172), (128, 128, 44), (1, 257, 1)])
def test_no_two_blocks_of_tokens_share_a_row_of_scales(counts):
    offsets = np.cumsum(counts)
    rows = [
        (end - count) // 128 + e + block
        for e, (count, end) in enumerate(zip(counts, offsets, strict=True))
        for block in range(-(-count // 128))
    ]
    assert len(set(rows)) == len(rows)
    assert max(rows) < operands.token_groups(300, len(counts), blockwise=True)


# --- offsets and misfits ---


@pytest.mark.parametrize("offsets", [[5, 3], [-1, 4], [2, 9]])
def test_offsets_that_make_no_sense_are_refused_on_the_cpu(offsets):
    x, weight = torch.zeros(8, 16), torch.zeros(2, 4, 16)
    with pytest.raises(KernelError, match="ascending, from 0 to at most 8 tokens"):
        experts.grouped_linear(x, weight, torch.tensor(offsets, dtype=torch.int32), "rowwise")


@on_devices
@pytest.mark.parametrize(
    ("given", "meant"), [([5, 3, 8], [5, 5, 8]), ([-4, 2, 900], [0, 2, 9]), ([2**31 - 1, 0, 1], [9, 9, 9])]
)
@of_recipes
def test_unreadable_offsets_are_taken_within_bounds(monkeypatch, device, recipe, given, meant):
    monkeypatch.setattr(operands, "check_offsets", lambda offsets, tokens: None)
    x, weight, grad, _ = made(normal, ((5, 3, 1), 0, 40, 13), device)
    results = []
    for offsets in (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (given, meant)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = experts.grouped_linear(*leaves, offsets, recipe)
        out.backward(grad)
        results.append((out, *(leaf.grad for leaf in leaves)))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def codes_of(*shape):
    return torch.zeros(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": codes_of(8, 17)}, "transpose the weight"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, "recount"),
        ({"offsets": torch.zeros(2, dtype=torch.int64)}, "int32 offsets"),
        ({"x": torch.zeros(8, 16)}, "quantise the operands"),
        ({"x_scale": torch.ones(8, 2)}, "under one recipe"),
        ({"weight_scale": torch.ones(2, 4, dtype=torch.float64)}, "float32 scales"),
        ({"out_dtype": torch.int32}, "not .* into torch.int32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    given = {
        "x": codes_of(8, 16),
        "weight": codes_of(2, 4, 16),
        "offsets": torch.tensor([3, 8], dtype=torch.int32),
        "x_scale": torch.ones(8),
        "weight_scale": torch.ones(2, 4),
        "out_dtype": torch.bfloat16,
    } | change
    with pytest.raises(KernelError, match=message):
        grouped.grouped_gemm(**given)


def test_a_recipe_for_other_products_is_refused():
    with pytest.raises(ArgumentError, match="rowwise, blockwise, not 'mxfp8'"):
        experts.grouped_linear(torch.zeros(8, 16), torch.zeros(2, 4, 16), torch.tensor([3, 8]), "mxfp8")


# --- compiled, and launched ---


@on_devices
@of_recipes
def test_one_graph_serves_all_routings_and_batches(device, recipe):
    def step(x, weight, offsets):
        return torch.relu(experts.grouped_linear(x, weight, offsets, recipe))

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    for routing in ("ragged", "all_at_one"):
        x, weight, grad, offsets = made(normal, (*ROUTINGS[routing][:2], 40, 13), device)
        results = []
        for run in (step, compiled):
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            run(*leaves, offsets).backward(grad)
            results.append([run(x, weight, offsets), *(leaf.grad for leaf in leaves)])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    assert graphs.frame_count <= 2  # with and without gradients


@needs_interpreter
def test_the_op_obeys_the_contract_of_custom_ops():
    x, weight, _, offsets = made(normal, ROUTINGS["ragged"])
    leaves = x.requires_grad_(), weight.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.loka.grouped_linear.default, (*leaves, offsets, "rowwise"), test_utils=tests)


def untuned(tokens, experts):
    key = Key("grouped", "rowwise", "fprop", CODES, tokens, 64, 64, experts)
    return TUNABLES["grouped"].untuned(key, 1)


def test_tiles_are_no_taller_than_experts_have_tokens():
    heights = {tokens: untuned(tokens, 64).block_m for tokens in (1, 64 * 16, 64 * 17, 64 * 64, 64 * 4096)}
    assert list(heights.values()) == [16, 16, 32, 64, 128]


def test_it_compiles_for_each_architecture_and_is_traced(tmp_path):
    found = compiled_elsewhere(tmp_path, "compiled_fused", "grouped")
    for name, capability, shared, counts in found["rows"]:
        assert shared <= SHARED_KIB[capability] * 1024
        if name in ("rowwise", "blockwise"):
            assert counts[TENSOR_CORES[capability]] > 0
        if "few" not in name:
            # The next tiles are on their way (cp.async) while tensor cores multiply, whichever way operands lie.
            assert counts[".shared.global"] > 0
            assert shared > 2 * 128 * 128
        if name == "rowwise":
            # 128 x 128 sums over 256 threads, promoted to fp32 every 128 elements of k.
            assert counts["add.f32"] + counts["add.rn.f32"] >= 64
    # Inductor sees the kernels themselves, forward and backward, and that they write to nothing but their results.
    assert found["traced"] == [1, 2]
    assert "TRITON_INTERPRET=1" in found["refused"]
