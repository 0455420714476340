"""Our Triton quantise kernels against the definition, bit for bit; interpreted on a CPU, as compiled code on a GPU."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from loka.errors import KernelError
from loka.formats import FORMATS, RECIPES, ROLES, OperandSpec
from loka.kernel_registry.triton import launches
from loka.kernel_registry.triton.launch import MAX_TILE
from loka.quantize import quantize as defined
from tests.kernel_registry.made_devices import triton_devices
from tests.kernel_registry.made_triton import compiled_elsewhere

pytest.importorskip("triton")
kernels = pytest.importorskip("loka.kernel_registry.triton.quantize")

# Every way that a role of a recipe is quantised, once.
SPECS = {
    f"{spec.format.name}-{spec.group_rows}x{spec.group_k}-{spec.scale_rule}": spec
    for spec in (recipe.operand(role) for recipe in RECIPES.values() for role in ROLES)
}
SPANNING = {name: spec for name, spec in SPECS.items() if spec.group_k is None}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMPY_FORMATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}

on_devices = pytest.mark.parametrize("device", triton_devices())
of_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
of_spanning_specs = pytest.mark.parametrize("spec", SPANNING.values(), ids=list(SPANNING))


def heavy_tailed(m, k):
    return torch.randn(m, k) * torch.exp(3 * torch.randn(m, k))


def correlated(m, k):
    return torch.randn(m, 1) * torch.randn(1, k) + 0.01 * torch.randn(m, k)


def with_zero_rows(m, k):
    x = torch.randn(m, k)
    x[::2] = 0
    x[:, ::3] = -0.0
    return x


def subnormal(m, k):
    return torch.randn(m, k) * torch.tensor([1e-39, 1e-7]).repeat(k)[:k]  # of fp32 and bf16, and of fp16


def not_finite(m, k):
    x = heavy_tailed(m, k)
    x.view(-1)[::7] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(m * k)[: len(x.view(-1)[::7])]
    x[-1] = float("nan")
    return x


DRAWS = (heavy_tailed, correlated, with_zero_rows, subnormal, not_finite)


def bits(x):
    """Integers to compare: codes with all NaN as one, since arithmetic on a GPU drops the sign of a NaN."""
    if x.dtype == torch.float32:
        return x.cpu().view(torch.int32)
    codes = x.cpu().view(torch.uint8)
    return torch.where(x.cpu().float().isnan(), 0x7F, codes)


def lies_well(x):
    """Whether scales are row-major, and codes in rows that begin at multiples of 16 bytes, as TMA reads them."""
    if x.dtype == torch.float32:
        return x.is_contiguous()
    in_lines = x.stride(1) == 1 and x.stride(0) == -(-x.shape[1] // 16) * 16 and x.storage_offset() == 0
    return in_lines or not x.numel()


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert lies_well(one)
        torch.testing.assert_close(bits(one), bits(other), rtol=0, atol=0)


def defined_both(x, spec):
    return (*defined(x, spec), *defined(x.t(), spec))


# --- the definition, bit for bit ---


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@of_specs
def test_codes_and_scales_are_those_of_the_definition(spec, dtype, device):
    for draw in DRAWS:
        x = draw(37, 45).to(device, dtype)
        assert_same(kernels.quantize_both(x, spec), defined_both(x, spec))


@on_devices
@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (3, 429), (130, 257), (429, 13)], ids=str)
@of_specs
def test_any_extent_will_do(spec, shape, device):
    x = not_finite(*shape).to(device, torch.bfloat16)
    assert_same(kernels.quantize(x, spec), defined(x, spec))
    assert_same(kernels.quantize_both(x, spec), defined_both(x, spec))


@on_devices
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_a_wide_odd_extent_will_do(recipe, device):
    spec = RECIPES[recipe].operand("input")
    x = heavy_tailed(2, 10413).to(device, torch.bfloat16)
    assert_same(kernels.quantize(x, spec), defined(x, spec))


@on_devices
@of_spanning_specs
def test_two_passes_give_what_one_gives(spec, device, monkeypatch):
    x = not_finite(60, 120).to(device, torch.bfloat16)
    assert kernels.chosen(x, False, (spec.group_rows, spec.group_k))[1] is not None
    monkeypatch.setattr(launches, "sides_of", lambda *_: None)
    assert kernels.chosen(x, False, (spec.group_rows, spec.group_k))[1] is None
    assert_same(kernels.quantize(x, spec), defined(x, spec))
    assert_same(kernels.quantize(x, spec, transposed=True), defined(x.t(), spec))
    assert_same(kernels.quantize_both(x, spec), defined_both(x, spec))


@on_devices
@pytest.mark.parametrize("name", NUMPY_FORMATS)
def test_every_value_and_every_tie_between_two_is_cast_as_ml_dtypes_casts_it(name, device):
    codes = np.arange(256, dtype=np.uint8).view(NUMPY_FORMATS[name]).astype(np.float32)
    values = np.unique(codes[np.isfinite(codes)])
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, ties, np.nextafter(ties, np.float32(-1e9)), np.nextafter(ties, np.float32(1e9))])
    spec = OperandSpec(format=FORMATS[name], group_rows=1, group_k=None)
    data, scale = kernels.quantize(torch.from_numpy(x)[None].to(device), spec)
    assert scale.item() == 1.0  # the format's largest value is among them
    expected = x.astype(NUMPY_FORMATS[name]).astype(np.float32)
    np.testing.assert_array_equal(data[0].cpu().float().numpy(), expected)


# --- layouts ---

VIEWS = {
    "transposed": lambda x: x.t(),
    "every_second_row_and_third_column": lambda x: x[::2, 1::3],
    "of_a_wider_one": lambda x: x[:, 3:50],
    "expanded_rows": lambda x: x[:1].expand(70, -1),
    "expanded_columns": lambda x: x[:, :1].expand(-1, 70),
    "flipped": lambda x: x.flip(0, 1),
    "a_slice_of_three_dimensions": lambda x: x.reshape(-1, 2, x.shape[1])[:, 1],
}


@on_devices
@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
@of_specs
def test_any_strides_will_do(spec, view, device):
    x = view(heavy_tailed(140, 150).to(device, torch.bfloat16))
    before = x.clone()
    assert_same(kernels.quantize(x, spec), defined(x, spec))
    assert torch.equal(x, before)
    if not x.is_contiguous():
        assert_same(kernels.quantize(x, spec, transposed=True), defined(x.t(), spec))


@on_devices
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@of_specs
def test_an_empty_operand_has_empty_codes(spec, shape, device):
    x = torch.empty(shape, device=device)
    assert_same(kernels.quantize_both(x, spec), defined_both(x, spec))


# --- bad values stay where they are ---


@on_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@of_specs
def test_a_bad_value_changes_no_other_code(spec, bad, device):
    x = torch.randn(140, 300).to(device)
    x[5, 7] = 0  # not the largest of its group, in either copy
    spoilt = x.clone()
    spoilt[5, 7] = bad
    clean, got = kernels.quantize_both(x, spec), kernels.quantize_both(spoilt, spec)
    for index in (1, 3):
        assert torch.equal(clean[index], got[index])
    for index, place in ((0, (5, 7)), (2, (7, 5))):
        differs = bits(clean[index]) != bits(got[index])
        assert differs.nonzero().tolist() == [list(place)]
        value = got[index].cpu().float()[place].item()
        assert value == bad if spec.format.has_infinity and bad == bad else value != value


# --- the activation in front ---


def hardswish(x):
    return x * (x + 3).clamp(0, 6) * (1 / 6)


@on_devices
@pytest.mark.parametrize(("name", "function"), [("relu", torch.relu), ("hardswish", hardswish)])
@of_specs
def test_an_activation_in_front_is_that_of_the_fp32_values(spec, name, function, device):
    x = (3 * torch.randn(50, 140)).to(device, torch.bfloat16)
    assert_same(kernels.quantize_both(x, spec, activation=name), defined_both(function(x.float()), spec))


@on_devices
def test_silu_in_front_is_off_by_no_more_than_a_neighbouring_code(device):
    x = (3 * torch.randn(50, 140)).to(device, torch.bfloat16)
    spec = RECIPES["rowwise"].operand("input")
    data, scale = kernels.quantize(x, spec, activation="silu")
    expected, expected_scale = defined(torch.nn.functional.silu(x.float()), spec)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    off = (data.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.01


# --- tracing ---


@on_devices
@of_specs
def test_the_ops_pass_torchs_own_checks(spec, device):
    arguments = spec.format.name, spec.group_rows, spec.group_k, spec.scale_rule, "none"
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op in (torch.ops.loka.quantize.default, torch.ops.loka.quantize_both.default):
        torch.library.opcheck(op, (torch.randn(9, 13, device=device), *arguments), test_utils=checks)


@of_specs
def test_fake_operands_give_the_shapes_of_real_ones(spec):
    for shape in ((3, 200), (0, 7)):
        expected = defined_both(torch.zeros(shape), spec)
        with FakeTensorMode():
            got = kernels.quantize_both(torch.empty(shape, device="cuda", dtype=torch.bfloat16), spec)
        assert [(x.shape, x.dtype, True) for x in expected] == [(x.shape, x.dtype, lies_well(x)) for x in got]


@on_devices
@of_specs
def test_a_compiled_function_traces_them_once_for_all_batches(spec, device):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def run(x):
        return kernels.quantize_both(2 * x, spec)

    for m in (3, 9, 140):
        x = torch.randn(m, 33, device=device)
        torch._dynamo.mark_static(x, 1)
        assert_same(run(x), defined_both(2 * x, spec))
    assert len(graphs) == 1


@on_devices
def test_an_exported_program_holds_the_op(device):
    class Model(torch.nn.Module):
        def forward(self, x):
            return kernels.quantize(x, RECIPES["blockwise"].operand("input"))

    x = torch.randn(5, 140, device=device)
    exported = torch.export.export(Model(), (x,))
    assert torch.ops.loka.quantize.default in [node.target for node in exported.graph.nodes]
    assert_same(exported.module()(x), defined(x, RECIPES["blockwise"].operand("input")))


@on_devices
def test_codes_carry_no_gradient(device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    assert not any(out.requires_grad for out in kernels.quantize_both(x, SPECS["e4m3-1xNone-fp32"]))


# --- what they refuse ---


@pytest.mark.parametrize(
    ("x", "spec", "activation", "said"),
    [
        (torch.zeros(2, 3, 4), SPECS["e4m3-1xNone-fp32"], "none", "matrices"),
        (torch.zeros(2, 3, dtype=torch.float64), SPECS["e4m3-1xNone-fp32"], "none", "float64"),
        (torch.zeros(2, 3), OperandSpec(format=FORMATS["e4m3fnuz"], group_rows=1, group_k=None), "none", "e4m3fnuz"),
        (torch.zeros(2, 3), OperandSpec(format=FORMATS["e4m3"], group_rows=1, group_k=96), "none", "1 x 96"),
        (torch.zeros(2, 3), OperandSpec(format=FORMATS["e4m3"], group_rows=None, group_k=32), "none", "None x 32"),
        (torch.zeros(2, 3), SPECS["e4m3-1xNone-fp32"], "gelu", "gelu"),
    ],
)
def test_what_they_do_not_serve_is_refused_in_words(x, spec, activation, said):
    for function in (kernels.quantize, kernels.quantize_both):
        with pytest.raises(KernelError, match=said):
            function(x, spec, activation=activation)


# --- one pass over memory where a group fits a tile; compiled code for devices that are not here ---


@pytest.mark.parametrize(
    ("shape", "both", "one_pass"),
    [((4096, 10413), False, True), ((4096, 16385), False, False), ((4096, 512), True, False), ((64, 256), True, True)],
)
def test_rows_that_fit_a_tile_take_one_pass(shape, both, one_pass):
    launch, sides = kernels.chosen(torch.empty(shape, device="meta"), both, (1, None))
    assert (sides is not None) == one_pass
    assert launch.block_m * launch.block_n <= MAX_TILE


def test_the_kernels_compile_for_each_architecture(tmp_path):
    found = compiled_elsewhere(tmp_path, "compiled_quantize")
    assert {capability for capability, *_ in found["rows"]} == {89, 90, 100}
    for capability, name, shared, counts in found["rows"]:
        assert shared <= 48 * 1024
        assert ".ftz" not in counts  # subnormals are kept
        assert counts["ld.global.v4.b32"] >= 8  # 16 bytes at a time
        assert {count for count in counts if count.startswith("div") and ".f" in count} <= {"div.rn.f32"}
        if name != "find_amax":
            assert counts["st.global.v4.b32"] >= 4
            casts = {count for count in counts if "e4m3" in count or "e5m2" in count}
            assert casts
            # From fp16 a number would be rounded twice; before 9.0, where it is, it is a value of the format already.
            assert capability < 90 or all(count.endswith(".f32") for count in casts)
    for counts in found["odd"]:  # codes are stored 16 bytes at a time all the same
        assert counts["st.global.v4.b32"] >= 4
        assert not counts.get("st.global.b8")
    assert "TRITON_INTERPRET=1" in found["refusal"]
    # Inductor sees the kernels themselves, and that they write to nothing but their results.
    assert found["traced"]["blockwise"] == ["triton_kernel_wrapper_functional"]
    assert found["traced"]["tensorwise"] == ["triton_kernel_wrapper_functional"] * 2


def test_importing_the_package_imports_no_triton():
    code = "import sys, loka.kernel_registry.triton; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
