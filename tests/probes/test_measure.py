"""The numbers: what the probe records is the definition of row_error, worked out again in float64 with ml_dtypes."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loka.formats import DEFAULT_RECIPES, PASS_OPERANDS, PASSES, RECIPES, recipe
from loka.numerics import product_error, product_errors
from loka.probes.capturing.convolution import convolution_gemm
from loka.probes.capturing.products import Draw, Factors, gemm
from loka.probes.sampling import measure as measure_module
from loka.probes.sampling.measure import measure, rows_of
from tests.probes.made_probe import probed, product

DTYPES = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
# Those whose error is that of their operands alone; reduced accumulation has tests of its own.
ALL = tuple(one for one in RECIPES.values() if one.accumulation == "fp32")
NAMES = tuple(one.name for one in ALL)


# --- an independent definition, in numpy ---


def scale_of(amax, maximum, rule):
    amax = np.float32(amax)
    if amax == 0:
        return np.float32(1)
    if rule == "fp32":
        return amax / np.float32(maximum)
    if rule == "pow2_up":
        return np.float32(2.0 ** math.ceil(math.log2(float(amax / np.float32(maximum)))))
    return np.float32(2.0 ** (math.floor(math.log2(float(amax))) - math.floor(math.log2(maximum))))


def rounded(x, name, role, amax=None):
    """The values that the FP8 form of x [rows, k] stands for, group by group."""
    entry = RECIPES[name]
    dtype, maximum = DTYPES[entry.format_of(role).name]
    spans = {"tensorwise": (None, None), "rowwise": (1, None), "blockwise": (1, 128), "mxfp8": (1, 32)}
    rows, columns = (128, 128) if entry.scaling == "blockwise" and role == "weight" else spans[entry.scaling]
    rows, columns = rows or x.shape[0], columns or x.shape[1]
    out = np.empty_like(x, dtype=np.float64)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns].astype(np.float32)
            whole = amax if entry.scaling == "tensorwise" and amax is not None else np.abs(block).max()
            scale = scale_of(whole, maximum, entry.scale_rule)
            data = np.clip(block * (np.float32(1) / scale), -maximum, maximum).astype(dtype)
            out[i : i + rows, j : j + columns] = data.astype(np.float64) * np.float64(scale)
    return out


def expected(a, b, name, which, amax=None):
    """row_error and its neighbours of a [m, k] . b [n, k] under a recipe, in float64."""
    roles = PASS_OPERANDS[which]
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    found = rounded(a, name, roles[0], amax) @ rounded(b, name, roles[1]).T
    rows = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    relative = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    floor = 1e-3 * np.sqrt((exact**2).mean())
    return {
        "row_error": rows.mean(),
        "row_error_p99": np.quantile(rows, 0.99),
        "relative_error": relative,
        "sqnr_db": -20 * np.log10(relative),
        "mere": (np.abs(found - exact) / np.maximum(np.abs(exact), floor)).mean(),
        "bias": ((found - exact) * exact).sum() / (exact**2).sum(),
    }


def heavy_tailed(*shape):
    """Like a trained weight: Student-t elements, columns of very different norm."""
    t = torch.distributions.StudentT(3.0).sample(shape)
    return t * torch.linspace(-2, 2, shape[-1]).exp() / shape[-1] ** 0.5


def correlated(m, k):
    """Like an activation: a few common directions, rows of different loudness, one loud row."""
    x = torch.randn(m, 4) @ torch.randn(4, k) + 0.3 * torch.randn(m, k)
    x = x * torch.rand(m, 1).add(0.2)
    x[m // 2] *= 50
    return x


def assert_close(found, wanted):
    for metric, value in wanted.items():
        # The probe multiplies in fp32: 1e-5 of the error itself; a single element's share of `mere` may be less exact.
        tolerance = 1e-3 if metric == "mere" else 1e-5
        # A bias is a sum of errors that cancel: exact to what fp32 leaves of the result.
        least = 1e-6 if metric == "bias" else 0.0
        assert getattr(found, metric) == pytest.approx(value, rel=tolerance, abs=least), metric


# --- through the whole probe ---


@pytest.mark.parametrize("k", [13, 429])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_recorded_errors_equal_the_definition_when_no_row_is_left_out(tmp_path, k, dtype):
    m, n = 48, 40
    layer = nn.Linear(k, n).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(heavy_tailed(n, k))
    x = correlated(m, k).to(dtype).requires_grad_()
    weight_of_loss = torch.randn(m, n).mul(torch.randn(m, 1).exp()).to(dtype)

    def loop():
        (layer(x) * weight_of_loss).sum().backward()

    _, steps = probed(layer, tmp_path, loop, recipes=NAMES)
    operands = {
        "input": x.detach().float().numpy(),
        "weight": layer.weight.detach().float().numpy(),
        "grad_output": weight_of_loss.float().numpy(),
    }
    pairs = {
        "fprop": (operands["input"], operands["weight"]),
        "dgrad": (operands["grad_output"], operands["weight"].T),
        "wgrad": (operands["grad_output"].T, operands["input"].T),
    }
    for which in PASSES:
        entry = product(steps[0], "weight", which)
        assert set(entry.errors) == set(NAMES)
        for name, found in entry.errors.items():
            assert_close(found, expected(*pairs[which], name, which))
            assert (found.rows, found.zero_rows, found.bad_rows) == (pairs[which][0].shape[0], 0, 0)
        for operand, pair in zip(entry.operands, pairs[which], strict=True):
            assert operand.amax == pytest.approx(np.abs(pair).max(), rel=1e-6)
            assert operand.rms == pytest.approx(np.sqrt((pair.astype(np.float64) ** 2).mean()), rel=1e-5)
            assert (operand.zeros, operand.nan, operand.inf, operand.elements) == (0.0, 0, 0, pair.size)
            for name, share in operand.underflow.items():
                # Of an operand with more than 64 rows, some are counted.
                tolerance = 1e-9 if pair.shape[0] < 128 else 1e-3
                assert share == pytest.approx((rounded(pair, name, operand.role) == 0).mean(), abs=tolerance)


# --- the measurement itself ---


def measured(a, b, which="fprop", recipes=ALL, seed=0):
    """Measure a [m, k] . b [n, k]."""
    found = gemm(Factors("mm", a, b.mT), a_is_p=True)
    return measure(found, which, recipes, Draw(64, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("which", PASSES)
def test_sampled_rows_stand_for_the_whole_product(which):
    a, b = correlated(1000, 200), heavy_tailed(300, 200)
    found = measured(a, b, which)
    for name, error in found.errors.items():
        whole = expected(a.numpy(), b.numpy(), name, which)
        assert error.rows == 64
        assert error.row_error == pytest.approx(whole["row_error"], rel=0.1)


def test_the_scale_of_a_whole_tensor_is_not_that_of_the_sampled_rows():
    a, b = torch.randn(1000, 64), torch.randn(16, 64)
    plain = measured(a, b).errors["tensorwise"].row_error
    a[500, 3] = 1e5  # one element far out of the sampled rows' range leaves the others few values
    found = measured(a, b, recipes=[recipe("tensorwise")]).errors["tensorwise"]
    assert found.row_error > 3 * plain


@pytest.mark.parametrize("slab", [1, 1 << 12, 1 << 30])
def test_numbers_do_not_depend_on_how_the_large_operand_is_walked_through(slab, monkeypatch):
    a, b = correlated(32, 150), heavy_tailed(700, 150)
    usual = measured(a, b)
    monkeypatch.setattr(measure_module, "_SLAB", slab)
    found = measured(a, b)
    for name, error in usual.errors.items():
        assert found.errors[name].row_error == pytest.approx(error.row_error, rel=1e-6)
    assert [op.elements for op in found.operands] == [op.elements for op in usual.operands]


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_of_the_operands_do_not_matter(transposed):
    a, b = correlated(32, 150), heavy_tailed(200, 150)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    strided = torch.empty(32, 300)[:, ::2].copy_(a)
    found, usual = measured(strided, b), measured(a.contiguous(), b.contiguous())
    for name, error in usual.errors.items():
        assert found.errors[name].row_error == pytest.approx(error.row_error, rel=1e-6)
    assert [(op.amax, op.zeros) for op in found.operands] == [(op.amax, op.zeros) for op in usual.operands]


def test_a_very_wide_product_is_measured_on_fewer_rows():
    found = measured(torch.randn(64, 8), torch.randn(50_000, 8), recipes=[recipe("rowwise")])
    assert found.errors["rowwise"].rows == 20  # 2^20 elements
    found = measured(torch.randn(64, 50_000), torch.randn(8, 50_000), recipes=[recipe("rowwise")])
    assert found.errors["rowwise"].rows == 20


def test_saturation_is_counted_where_the_recipe_clips():
    x = torch.full((4, 32), 500.0)  # 500 lies between 448 and 512: the floor rule's scale of 1 clips it
    found = measured(x, torch.ones(4, 32))
    shares = {op.role: op.saturation for op in found.operands}
    assert shares["input"] == {name: 1.0 if name == "mxfp8_floor" else 0.0 for name in NAMES}
    assert shares["weight"] == dict.fromkeys(NAMES, 0.0)


def test_underflow_is_the_share_of_the_non_zero_elements():
    x = torch.zeros(2, 8)
    x[:, 0], x[:, 1], x[:, 2] = 448.0, 1.0, 1e-5  # 1e-5 / 448 * 448 is below half the smallest subnormal
    found = measured(x, torch.ones(4, 8), recipes=[recipe("rowwise")])
    assert found.operands[0].underflow == {"rowwise": pytest.approx(1 / 3)}
    assert found.operands[0].zeros == 5 / 8


def test_batched_products_are_measured_slice_by_slice():
    a, b = torch.randn(3, 10, 40), heavy_tailed(3, 20, 40)
    found = measured(a, b)
    for name, error in found.errors.items():
        per_slice = [expected(x.numpy(), y.numpy(), name, "fprop")["row_error"] for x, y in zip(a, b, strict=True)]
        assert error.row_error == pytest.approx(np.mean(per_slice), rel=1e-5)
    assert found.errors["rowwise"].rows == 30


def test_a_matrix_broadcast_over_the_batch_is_one_product():
    a, b = torch.randn(3, 10, 40), heavy_tailed(20, 40)
    found = gemm(Factors("bmm", a, b.t().expand(3, 40, 20)), a_is_p=True)
    assert (found.batch, found.m, found.n, found.k) == (1, 30, 20, 40)
    errors = measure(found, "fprop", ALL, Draw(64, torch.Generator())).errors
    for name, error in errors.items():
        assert_close(error, expected(a.flatten(0, 1).numpy(), b.numpy(), name, "fprop"))


def test_grouped_products_are_measured_group_by_group():
    x, weight = torch.randn(24, 16).bfloat16(), torch.randn(3, 16, 32).bfloat16()
    ends = torch.tensor([8, 8, 20], dtype=torch.int32)  # the second group is empty, the last rows belong to none
    spans = {0: (0, 8), 2: (8, 20)}
    found = gemm(Factors("_grouped_mm", x, weight, ends), a_is_p=True)
    errors = measure(found, "fprop", ALL, Draw(64, torch.Generator())).errors
    for name, error in errors.items():
        rows = [
            expected(x[i:j].float().numpy(), weight[group].t().float().numpy(), name, "fprop")["row_error"]
            for group, (i, j) in spans.items()
        ]
        assert error.row_error == pytest.approx((8 * rows[0] + 12 * rows[1]) / 20, rel=1e-5)
        assert error.rows == 20
    grad = torch.randn(24, 32).bfloat16()
    found = gemm(Factors("_grouped_mm", x.t(), grad, ends), a_is_p=False)
    assert (found.m, found.n, found.k) == (32, 16, 24)
    errors = measure(found, "wgrad", ALL, Draw(64, torch.Generator())).errors
    for name, error in errors.items():
        pairs = [(grad[i:j].float().t().numpy(), x[i:j].float().t().numpy()) for i, j in spans.values()]
        wanted = np.mean([expected(*pair, name, "wgrad")["row_error"] for pair in pairs])
        assert error.row_error == pytest.approx(wanted, rel=1e-5)
        assert error.rows == 64


@pytest.mark.parametrize(
    ("x", "weight", "options"),
    [
        ((2, 5, 20), (7, 5, 3), {"stride": (2,), "padding": (1,), "dilation": (2,)}),
        ((1, 3, 8, 9), (6, 3, 3, 2), {"stride": (1, 2), "padding": (1, 0), "dilation": (1, 2)}),
        ((1, 3, 8, 9), (6, 3, 1, 1), {}),
    ],
    ids=["1d", "2d", "1x1"],
)
def test_a_convolution_has_the_error_of_its_unfolded_product(x, weight, options):
    x, weight = correlated(math.prod(x[:-1]), x[-1]).view(x), heavy_tailed(*weight)
    dims = weight.dim() - 2
    settings = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims} | options
    args = (x, weight, None, *settings.values(), False, (0,) * dims, 1)
    found = convolution_gemm(args)
    wide = {name: (*((1,) if name != "padding" else (0,)) * (2 - dims), *value) for name, value in settings.items()}
    image = x if dims == 2 else x.unsqueeze(2)
    window = weight.shape[2:] if dims == 2 else (1, *weight.shape[2:])
    unfolded = F.unfold(image, window, dilation=wide["dilation"], padding=wide["padding"], stride=wide["stride"])
    rows = unfolded.mT.flatten(0, 1)
    assert (found.m, found.n, found.k) == (rows.shape[0], weight.shape[0], rows.shape[1])
    errors = measure(found, "fprop", ALL, Draw(10_000, torch.Generator())).errors
    for name, error in errors.items():
        # The scale of the whole tensor is the input's own: unfolding may leave elements out.
        assert_close(error, expected(rows.numpy(), weight.flatten(1).numpy(), name, "fprop", float(x.abs().max())))


def test_a_convolution_of_values_that_are_not_finite_spoils_only_the_windows_that_see_them():
    x = torch.randn(1, 2, 10)
    x[0, 1, 0] = float("inf")  # at the border: a window that lies beyond it must not see it
    args = (x, torch.randn(4, 2, 3), None, (1,), (1,), (1,), False, (0,), 1)
    errors = measure(convolution_gemm(args), "fprop", [recipe("rowwise")], Draw(64, torch.Generator())).errors
    assert (errors["rowwise"].rows, errors["rowwise"].bad_rows) == (8, 2)


def test_operands_grad_mode_autocast_and_random_state_are_left_alone():
    a, b = torch.randn(80, 16, requires_grad=True), torch.randn(16, 16)
    copies = a.detach().clone(), b.clone()
    state = torch.get_rng_state()
    plain = measured(a.detach(), b).errors
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        under_autocast = measured(a, b).errors
        assert (a @ b).dtype == torch.bfloat16
    assert under_autocast == plain
    assert torch.get_rng_state().equal(state)
    assert a.detach().equal(copies[0])
    assert b.equal(copies[1])


def test_the_same_seed_draws_the_same_rows():
    a, b = correlated(500, 32), heavy_tailed(16, 32)
    assert measured(a, b, seed=1).errors == measured(a, b, seed=1).errors
    assert measured(a, b, seed=1).errors != measured(a, b, seed=2).errors


def test_values_beyond_the_range_of_fp32_squares_keep_their_statistics():
    found = measured(torch.full((4, 8), 1e30), torch.full((4, 8), 1e-30), recipes=[recipe("rowwise")])
    assert [op.amax for op in found.operands] == pytest.approx([1e30, 1e-30], rel=1e-5)
    assert found.operands[0].rms == pytest.approx(1e30, rel=1e-5)
    assert found.errors["rowwise"].row_error == pytest.approx(0.0, abs=1e-6)


# --- the comparison of products ---


def test_several_candidates_are_compared_as_each_alone():
    reference = torch.randn(50, 30)
    reference[3], reference[7, 2] = 0.0, float("nan")
    candidates = torch.stack([reference + 10.0**-i * torch.randn(50, 30) for i in range(1, 5)])
    together = product_errors(candidates, reference)
    assert together == [product_error(candidate, reference) for candidate in candidates]
    assert {(error.rows, error.zero_rows, error.bad_rows) for error in together} == {(48, 1, 1)}
    exact, found = reference[0].double().numpy(), candidates[0][0].double().numpy()
    one = product_error(candidates[0][:1], reference[:1])
    assert one.row_error == pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(exact), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_candidate_that_is_not_finite_is_infinitely_wrong_and_never_missing(bad):
    reference = torch.randn(100, 16)
    candidate = reference.clone()
    candidate[::10, 0] = bad
    error = product_error(candidate, reference)
    assert error.row_error == error.row_error_p99 == error.relative_error == error.mere == math.inf
    assert error.sqnr_db == -math.inf
    assert (error.rows, error.bad_rows) == (100, 0)


def test_nothing_to_compare_is_nan():
    for reference in (torch.empty(0, 4), torch.empty(4, 0), torch.zeros(4, 4), torch.full((4, 4), math.nan)):
        error = product_error(reference, reference)
        assert math.isnan(error.row_error)
        assert math.isnan(error.relative_error)
        assert error.rows == 0


@pytest.mark.parametrize("name", DEFAULT_RECIPES)
def test_an_exact_product_has_no_error(name):
    """Small integers are exact in FP8 under scales that are powers of two or divide evenly."""
    x = torch.randint(-4, 5, (20, 32)).float()
    x[:, 0] = 448.0
    found = measured(x, x, recipes=[recipe(name)])
    assert found.errors[name].row_error == 0.0
    assert found.errors[name].sqnr_db == math.inf


def test_reduced_accumulation_adds_its_own_error():
    """Of one sign and exact in FP8: what is left is what adding up loses, and that is a bias."""
    values = torch.rand(80, 4096).mul(400).to(torch.float8_e4m3fn).float()
    values[:, 0] = 448.0
    a, b = values[:64], values[64:]
    names = ("tensorwise", "tensorwise_fast_accum", "rowwise", "rowwise_fast_accum")
    errors = measured(a, b, recipes=[recipe(name) for name in names]).errors
    for exact in ("tensorwise", "rowwise"):
        assert errors[exact].row_error < 1e-6
        assert 1e-3 < errors[f"{exact}_fast_accum"].row_error < 2e-2
        assert errors[f"{exact}_fast_accum"].bias == pytest.approx(-errors[f"{exact}_fast_accum"].row_error, rel=0.05)


@pytest.mark.parametrize("shape", [(64, 16, 2048), (40, 429, 13)])
def test_alignment_is_that_of_the_rows(shape):
    m, n, k = shape
    a, b = correlated(m, k), heavy_tailed(n, k)
    exact = (a.double() @ b.double().T).square().sum(1)
    wanted = (a.double().square() @ b.double().square().sum(0) / exact).sqrt().mean()
    assert measured(a, b).alignment == pytest.approx(float(wanted), rel=1e-5)


def test_alignment_of_nothing_is_nan():
    assert math.isnan(measured(torch.zeros(8, 16), torch.randn(4, 16)).alignment)
    assert math.isnan(measured(torch.full((8, 16), math.nan), torch.randn(4, 16)).alignment)


@pytest.mark.parametrize(
    ("n", "k", "rows"), [(768, 256, 64), (32, 32, 512), (123_200, 1024, 64), (256, 128, 128), (1, 1, 512), (0, 5, 512)]
)
def test_small_products_are_measured_on_more_rows(n, k, rows):
    assert (
        rows_of(gemm(Factors("mm", torch.empty(4, k, device="meta"), torch.empty(k, n, device="meta")), a_is_p=True))
        == rows
    )


def test_a_reduction_longer_than_a_slab_is_the_same_product_in_pieces(monkeypatch):
    a, b = heavy_tailed(20, 2100), heavy_tailed(150, 2100)
    whole = measured(a, b)
    monkeypatch.setattr("loka.probes.sampling.measure._SLAB", 1 << 15)  # pieces of 256 along k, slabs of 128 rows
    pieces = measured(a, b)
    for name, error in whole.errors.items():
        if "fast_accum" not in name:
            assert pieces.errors[name].row_error == pytest.approx(error.row_error, rel=1e-3)
    assert pieces.alignment == pytest.approx(whole.alignment, rel=1e-4)
    assert [operand.underflow for operand in pieces.operands] == [operand.underflow for operand in whole.operands]
