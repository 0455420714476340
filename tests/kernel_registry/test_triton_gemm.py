"""Our Triton product against the numpy model and the definition; interpreted on a CPU, as compiled code on a GPU."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from loka.errors import KernelError
from loka.formats import FORMATS, PASS_OPERANDS, PASSES, RECIPES
from loka.hardware import DeviceInfo
from loka.kernel_registry import emulated
from loka.kernel_registry import operands as kernel_operands
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.triton import launches
from loka.kernel_registry.triton.launch import CODES, Key, Launch
from loka.kernel_registry.triton.tuned import forced
from loka.quantize import quantize
from tests.kernel_registry.made_devices import SHARED_KIB, needs_interpreter, triton_devices
from tests.kernel_registry.made_gemm import DRAWS, SHAPES, normal, operands
from tests.kernel_registry.made_triton import assert_product, compiled_elsewhere, model

pytest.importorskip("triton")
gemm = pytest.importorskip("loka.kernel_registry.triton.gemm")
scaled = pytest.importorskip("loka.kernel_registry.triton.scaled")
casts = pytest.importorskip("loka.kernel_registry.triton.quantize")

RECIPE_NAMES = ("tensorwise", "rowwise", "blockwise", "mxfp8")
on_devices = pytest.mark.parametrize("device", triton_devices())
of_recipes = pytest.mark.parametrize("recipe", RECIPE_NAMES)


def multiply(recipe, a, b, product="fprop", out_dtype=torch.float32):
    return getattr(scaled, recipe)(a, b, product=product, out_dtype=out_dtype)


def codes(recipe, a, b, product="fprop"):
    """FP8 codes and scales of both operands, as `scaled_gemm` takes them."""
    specs = [RECIPES[recipe].operand(role) for role in PASS_OPERANDS[product]]
    (data_a, scale_a), (data_b, scale_b) = quantize(a, specs[0]), quantize(b, specs[1])
    return data_a, data_b, scale_a, scale_b


def assert_modelled(got, recipe, a, b, product):
    """Compare with the numpy model, within what an fp32 sum in any order may be off."""
    left, right = (model(x, recipe, role) for x, role in zip((a, b), PASS_OPERANDS[product], strict=True))
    assert_product(got, left, right, a.shape[1])


# --- the product ---


@on_devices
@pytest.mark.parametrize(
    ("draw", "product"),
    [(draw, product) for draw in DRAWS for product in (PASSES if draw in ("normal", "heavy_tailed") else PASSES[2:])],
)
@of_recipes
def test_the_product_equals_the_numpy_model(recipe, draw, product, device):
    for m, n, k in SHAPES:
        a, b = (x.to(device) for x in operands(DRAWS[draw], m, n, k))
        got = multiply(recipe, a, b, product)
        assert got.dtype == torch.float32
        assert_modelled(got, recipe, a, b, product)


@on_devices
@pytest.mark.parametrize("product", PASSES)
@of_recipes
def test_the_product_equals_the_definition(recipe, product, device):
    a, b = (x.to(device) for x in operands(normal, 70, 150, 300))
    want = getattr(emulated, recipe)(a, b, product=product, out_dtype=torch.float32)
    tolerance = 1e-6 if device == "cpu" else 2.0**-12
    torch.testing.assert_close(multiply(recipe, a, b, product), want, rtol=1e-5, atol=tolerance * 300)


@on_devices
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operand_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@of_recipes
def test_operands_and_result_have_the_dtypes_asked_for(recipe, operand_dtype, out_dtype, device):
    a, b = (x.to(device, operand_dtype) for x in operands(normal, 20, 24, 200))
    got = multiply(recipe, a, b, "wgrad", out_dtype)
    assert got.dtype == out_dtype
    assert_modelled(got, recipe, a.float(), b.float(), "wgrad")


def untuned(m, n, k, programs):
    return launches.TUNABLES["gemm"].untuned(Key("gemm", "rowwise", "fprop", CODES, m, n, k), programs)


@on_devices
@pytest.mark.parametrize("m", [1, 4])
@of_recipes
def test_a_long_ragged_reduction_is_split_and_right(recipe, m, device, monkeypatch):
    a, b = (x.to(device) for x in operands(normal, m, 5, 10413))
    monkeypatch.setattr(gemm, "program_count", lambda device: 4)
    assert untuned(m, 5, 10413, 4).splits == 4
    assert_modelled(multiply(recipe, a, b), recipe, a, b, "fprop")


@on_devices
@pytest.mark.parametrize("row", range(len(launches.GEMM)))
@pytest.mark.parametrize("recipe", ["rowwise", "mxfp8"])
def test_every_launch_computes_the_product(recipe, row, device):
    launch = (launches.GEMM_MX if recipe == "mxfp8" else launches.GEMM)[row].launch
    a, b = (x.to(device) for x in operands(normal, launch.block_m + 3, launch.block_n + 5, 144))
    with forced("gemm", launch):
        assert_modelled(multiply(recipe, a, b), recipe, a, b, "fprop")


@on_devices
@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
@pytest.mark.parametrize("programs", [1, 3, 100])
def test_every_tile_is_written_once_in_any_order(group_m, programs, device, monkeypatch):
    monkeypatch.setattr(gemm, "program_count", lambda device: programs)
    a, b = (x.to(device) for x in operands(normal, 77, 70, 40))
    with forced("gemm", Launch(block_m=16, block_n=32, num_warps=4, num_stages=4, group_m=group_m)):
        assert_modelled(multiply("rowwise", a, b), "rowwise", a, b, "fprop")


def test_every_product_has_a_launch():
    for table in (launches.GEMM, launches.GEMM_MX):
        assert min(table[-1].max_m, table[-1].max_n) >= 2**62
        assert all(row.launch.block_m * row.launch.block_n <= 128 * 128 for row in table)


@on_devices
@pytest.mark.parametrize("product", PASSES)
@of_recipes
def test_who_quantises_changes_no_bit(recipe, product, device, monkeypatch):
    a, b = (x.to(device) for x in operands(normal, 20, 140, 200))
    got = []
    for devices in (("cuda", "cpu"), ()):
        monkeypatch.setattr(kernel_operands, "_TRITON_QUANTISES", devices)
        got.append(multiply(recipe, a.t().contiguous().t(), b, product))
    assert torch.equal(*got)


# --- layouts ---


def layouts(x):
    """The same codes under other strides: transposed, a column apart, cut out of a wider tensor, by an odd offset."""
    rows, depth = x.shape
    yield x.t().contiguous().t()
    yield x.repeat_interleave(2, 1)[:, ::2]
    wide = x.new_zeros((rows + 1, depth + 16), dtype=torch.float32).to(x.dtype)
    wide[1:, 16:] = x
    yield wide[1:, 16:]
    shifted = x.new_zeros(rows * depth + 1, dtype=torch.float32).to(x.dtype)
    shifted[1:] = x.flatten()
    yield shifted[1:].view(rows, depth)


@on_devices
@of_recipes
def test_codes_of_any_strides_give_the_same_bits(recipe, device):
    a, b = (x.to(device) for x in operands(normal, 20, 24, 144))
    data_a, data_b, scale_a, scale_b = codes(recipe, a, b)
    before = data_a.view(torch.uint8).clone(), data_b.view(torch.uint8).clone()
    want = gemm.scaled_gemm(data_a, data_b, scale_a, scale_b, out_dtype=torch.float32)
    assert_modelled(want, recipe, a, b, "fprop")
    scales = (scale_a.t().contiguous().t(), scale_b.t().contiguous().t())
    for view_a, view_b in zip(layouts(data_a), layouts(data_b), strict=True):
        assert torch.equal(gemm.scaled_gemm(view_a, view_b, *scales, out_dtype=torch.float32), want)
    assert torch.equal(data_a.view(torch.uint8), before[0])
    assert torch.equal(data_b.view(torch.uint8), before[1])


@on_devices
def test_expanded_codes_are_read_as_they_stand(device):
    a, b = (x.to(device) for x in operands(normal, 1, 24, 144))
    data_a, data_b, scale_a, scale_b = codes("tensorwise", a, b)
    one = gemm.scaled_gemm(data_a, data_b, scale_a, scale_b, out_dtype=torch.float32)
    many = gemm.scaled_gemm(data_a.expand(20, 144), data_b, scale_a, scale_b, out_dtype=torch.float32)
    torch.testing.assert_close(many, one.expand(20, 24), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@on_devices
def test_transposed_operands_and_their_copies_give_the_same_bits(recipe, device):
    a, b = (x.to(device) for x in operands(normal, 34, 30, 70))
    viewed = multiply(recipe, a.t().contiguous().t(), b.t().contiguous().t(), "wgrad")
    assert torch.equal(multiply(recipe, a, b, "wgrad"), viewed)


def test_tma_is_taken_where_a_layout_allows_it(monkeypatch):
    monkeypatch.setattr(gemm, "_has_tma", lambda device: True)
    x = torch.zeros(20, 144, dtype=FORMATS["e4m3"].dtype)
    transposed, apart, wide, shifted = layouts(x)
    assert [gemm._takes_tma(view) for view in (x, transposed, apart, wide, shifted)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert not gemm._takes_tma(x[:1].expand(20, 144))
    assert not gemm._takes_tma(torch.zeros(20, 13, dtype=x.dtype))
    monkeypatch.setattr(gemm, "_has_tma", lambda device: False)
    assert not gemm._takes_tma(x)


@on_devices
@of_recipes
def test_tma_and_pointers_read_the_same(recipe, device, monkeypatch):
    a, b = (x.to(device) for x in operands(normal, 40, 72, 208))
    arguments = codes(recipe, a, b)
    taken = []
    takes_tma = gemm._takes_tma

    def noted(x):
        taken.append(takes_tma(x))
        return taken[-1]

    monkeypatch.setattr(gemm, "_takes_tma", noted)
    with_tma = gemm.scaled_gemm(*arguments, out_dtype=torch.float32)
    monkeypatch.setattr(gemm, "_takes_tma", lambda x: False)
    without = gemm.scaled_gemm(*arguments, out_dtype=torch.float32)
    assert all(taken) or device == "cuda"
    assert torch.equal(with_tma, without)


# --- split k ---


@on_devices
@of_recipes
def test_splitting_k_changes_rounding_only_and_repeats_bit_for_bit(recipe, device):
    a, b = (x.to(device) for x in operands(normal, 7, 9, 1000))
    arguments = codes(recipe, a, b)
    whole = gemm.scaled_gemm(*arguments, out_dtype=torch.float32, splits=1)
    assert_modelled(whole, recipe, a, b, "fprop")
    for splits in (2, 3, 5, 64):  # 8 blocks of 128: even, ragged, with an empty part, and more parts than blocks
        first = gemm.scaled_gemm(*arguments, out_dtype=torch.float32, splits=splits)
        torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-4)
        assert torch.equal(gemm.scaled_gemm(*arguments, out_dtype=torch.float32, splits=splits), first)


@pytest.mark.parametrize(
    ("shape", "programs", "splits"),
    [
        ((2048, 1024, 12320), 132, 1),  # enough tiles
        ((16, 64, 123200), 132, 16),  # one tile, long: the most there are
        ((16, 64, 2048), 132, 4),  # 16 blocks of k, at least four for each
        ((16, 64, 512), 132, 1),  # too short
        ((64, 1024, 10413), 132, 8),  # 16 tiles
    ],
)
def test_k_is_split_where_tiles_are_few(shape, programs, splits):
    m, n, k = shape
    assert untuned(m, n, k, programs).splits == splits


# --- bad values and bad arguments ---


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@on_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("product", ["fprop", "wgrad"])
@of_recipes
def test_a_bad_element_spoils_its_own_row_only(recipe, product, bad, device):
    a, b = (x.to(device) for x in operands(normal, 8, 40, 200))
    clean = multiply(recipe, a, b, product)
    a[3, 5] = bad
    got = multiply(recipe, a, b, product)
    assert not torch.isfinite(got[3]).any()
    others = torch.arange(8, device=device) != 3
    assert torch.isfinite(got[others]).all()
    if recipe != "tensorwise":  # where the bad element may have been the largest of all
        assert torch.equal(got[others], clean[others])
    a[3, 5], b[7, 2] = 0.0, bad
    got = multiply(recipe, a, b, product)
    assert not torch.isfinite(got[:, 7]).any()
    assert torch.isfinite(got[:, torch.arange(40, device=device) != 7]).all()


@on_devices
@of_recipes
def test_zero_rows_and_columns_are_zero(recipe, device):
    a, b = (x.to(device) for x in operands(normal, 6, 40, 200))
    a[2], b[9] = 0, 0
    got = multiply(recipe, a, b)
    assert not got[2].any()
    assert not got[:, 9].any()
    assert got[3, 8] != 0


@on_devices
@pytest.mark.parametrize(
    "shape", [(0, 16, 16), (16, 0, 16), (16, 16, 0)], ids=["no_rows", "no_columns", "no_reduction"]
)
@pytest.mark.parametrize("product", PASSES)
@of_recipes
def test_an_empty_product_has_its_shape_and_zeros(recipe, product, shape, device):
    a, b = (x.to(device) for x in operands(normal, *shape))
    for out_dtype in (torch.float32, torch.bfloat16):
        got = multiply(recipe, a, b, product, out_dtype)
        assert torch.equal(got, torch.zeros(shape[0], shape[1], dtype=out_dtype, device=device))


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def fp8(*shape, name="e4m3"):
    return torch.ones(shape).to(FORMATS[name].dtype)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((fp8(4, 8), fp8(5, 9), ones(4, 1), ones(5, 1)), r"a \[m, k\] and b \[n, k\]"),
        ((fp8(4, 8), fp8(8), ones(4, 1), ones(5, 1)), r"a \[m, k\] and b \[n, k\]"),
        ((ones(4, 8), fp8(5, 8), ones(4, 1), ones(5, 1)), "loka.quantize"),
        ((fp8(4, 8, name="e4m3fnuz"), fp8(5, 8), ones(4, 1), ones(5, 1)), "loka.quantize"),
        ((fp8(4, 8), fp8(5, 8), ones(3, 1), ones(5, 1)), r"float32 \[3, 1\]"),
        ((fp8(4, 8), fp8(5, 8), ones(4), ones(5, 1)), r"float32 \[4\]"),
        ((fp8(4, 8), fp8(5, 8), ones(4, 1, dtype=torch.float64), ones(5, 1)), "float64"),
        ((fp8(4, 300), fp8(5, 300), ones(4, 3), ones(5, 10)), "same groups of k"),
        ((fp8(4, 300), fp8(5, 300), ones(4, 4), ones(5, 4)), r"\[4, 4\]"),
        ((fp8(4, 8), fp8(5, 8), torch.ones(4, 1, device="meta"), ones(5, 1)), "on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_words(arguments, words):
    with pytest.raises(KernelError, match=words):
        gemm.scaled_gemm(*arguments, out_dtype=torch.float32)


def test_an_unknown_result_dtype_is_refused():
    with pytest.raises(KernelError, match="float64"):
        gemm.scaled_gemm(fp8(4, 8), fp8(5, 8), ones(4, 1), ones(5, 1), out_dtype=torch.float64)


@on_devices
def test_a_negative_number_of_parts_is_refused(device):
    arguments = [x.to(device) for x in (fp8(4, 8), fp8(5, 8), ones(4, 1), ones(5, 1))]
    with pytest.raises(KernelError, match="-2 parts"):
        gemm.scaled_gemm(*arguments, out_dtype=torch.float32, splits=-2)


@on_devices
@pytest.mark.parametrize("has_tma", [True, False])
@pytest.mark.parametrize("k", [13, 429, 130])
@of_recipes
def test_rows_that_end_anywhere_are_read_many_bytes_at_once(recipe, k, has_tma, device, monkeypatch):
    a, b = (x.to(device) for x in operands(DRAWS["heavy_tailed"], 20, 24, k))
    if device == "cpu" or not has_tma:
        monkeypatch.setattr(gemm, "_has_tma", lambda device: has_tma)
    want = multiply(recipe, a, b)
    assert_modelled(want, recipe, a, b, "fprop")
    data_a, data_b, scale_a, scale_b = codes(recipe, a, b)
    for given in ((data_a.contiguous(), data_b.contiguous()), (data_a.contiguous(), data_b.t().contiguous().t())):
        torch.testing.assert_close(
            gemm.scaled_gemm(*given, scale_a, scale_b, out_dtype=torch.float32), want, rtol=1e-6, atol=1e-5
        )


@needs_interpreter
def test_only_codes_whose_rows_begin_anywhere_are_copied_for_tma(monkeypatch):
    monkeypatch.setattr(gemm, "_has_tma", lambda device: True)
    spec = RECIPES["rowwise"].operand("input")
    ours = casts.quantize(torch.randn(20, 429), spec)[0]
    plain = ours.contiguous()
    assert (ours.stride(0), plain.stride(0)) == (432, 429)
    for x in gemm._loadable(ours, plain):
        assert x.shape == (20, 429)
        assert gemm._takes_tma(x)
        assert torch.equal(x.view(torch.uint8), plain.view(torch.uint8))
    assert gemm._loadable(ours, plain)[0] is ours


# --- tracing ---


@on_devices
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_dynamo_traces_the_kernel_in_one_graph_for_any_number_of_rows(recipe, device):
    compiled = torch.compile(getattr(scaled, recipe), backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (40, 7):
        for product, shape in (("fprop", (batch, 48, 130)), ("wgrad", (48, 24, batch))):
            a, b = (x.to(device) for x in operands(normal, *shape))
            want = multiply(recipe, a, b, product)
            torch.testing.assert_close(compiled(a, b, product=product, out_dtype=torch.float32), want)


@on_devices
def test_the_op_keeps_the_rules_of_custom_ops(device):
    # All of them but the check for mutated arguments, which multiplies them: there is no such kernel for FP8.
    rules = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for recipe in RECIPE_NAMES:
        a, b = (x.to(device) for x in operands(normal, 20, 24, 144))
        arguments = codes(recipe, a, b)
        torch.library.opcheck(gemm.scaled_gemm, arguments, {"out_dtype": torch.bfloat16}, test_utils=rules)


@on_devices
@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_tracers_outside_of_dynamo_find_nothing_that_reads_a_value(recipe, device):
    a, b = (x.to(device) for x in operands(normal, 20, 24, 130))
    want = multiply(recipe, a, b)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda a, b: multiply(recipe, a, b), tracing_mode=mode)(a, b)
        torch.testing.assert_close(graph(a, b), want)


def test_every_recipe_compiles_for_each_architecture_with_its_instructions(tmp_path):
    found = compiled_elsewhere(tmp_path, "compiled_gemm")
    for capability, block_m, group_k, shared, counts in found["rows"]:
        assert shared <= SHARED_KIB[capability] * 1024
        assert (counts["cp.async.bulk.tensor"] > 0) == (capability >= 90)
        assert not counts["ld.global.b8"]
        if block_m == 128:
            name = {89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
            assert counts[name] > 0
        if capability == 90 and block_m == 128 and group_k == 0:
            # The running sum, 128 x 128 numbers over 256 threads, is promoted to fp32 once every 128 elements of k.
            assert counts["add.f32"] + counts["add.rn.f32"] == 64
    for counts in found["odd"]:  # no code is loaded by itself
        assert counts["cp.async.bulk.tensor"] > 0
        assert not counts["ld.global.b8"]
    # Inductor sees the kernel itself, and that it writes to nothing but its result.
    assert found["traced"] == [["triton_kernel_wrapper_functional"]] * 3


# --- the registry ---

ROWS = [spec for spec in KERNELS if spec.name.startswith("triton.gemm.")]


def test_every_row_is_covered_here():
    assert [spec.name for spec in ROWS] == [f"triton.gemm.{recipe}" for recipe in RECIPE_NAMES]
    for spec, recipe in zip(ROWS, RECIPE_NAMES, strict=True):
        assert spec.recipe == recipe
        assert spec.load() is getattr(scaled, recipe)


@pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.name)
def test_a_row_says_where_it_runs(spec, monkeypatch):
    cpu = DeviceInfo(type="cpu", name="test")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs cuda" in spec.unavailable(cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in spec.unavailable(cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert spec.unavailable(cpu) is None
    assert "8.9" in spec.unavailable(DeviceInfo(type="cuda", name="A100", capability=(8, 0)))
    assert "8.9" in spec.unavailable(DeviceInfo(type="cuda", name="MI300X", capability=None))
    assert spec.unavailable(DeviceInfo(type="cuda", name="H200", capability=(9, 0))) is None
