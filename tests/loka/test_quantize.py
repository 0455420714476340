"""The casts, bit for bit against ml_dtypes; the scales, against exact arithmetic; the groups, against loops."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loka import pieces
from loka import quantize as definition
from loka.formats import FORMATS, RECIPES, ROLES, Format, OperandSpec
from loka.quantize import (
    cast,
    dequantize,
    fake_quantize,
    quantize,
    round_stochastically,
    round_to_format,
    saturated_share,
    scale_from_amax,
)
from tests.dispatch.made_conversion import needs_a_compiler

INF, NAN = float("inf"), float("nan")
NUMPY_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
# Every way in which a recipe quantises an operand, once.
SPECS = {f"{name}-{role}": RECIPES[name].operand(role) for name in RECIPES for role in ROLES}


def by_ml_dtypes(x: np.ndarray, fmt: Format) -> np.ndarray:
    """fp32 values to FP8 by ml_dtypes: finite ones saturated first, Inf as the format has it."""
    saturated = np.clip(x, -fmt.max, fmt.max)
    values = np.where(np.isfinite(x), saturated, np.where(np.isinf(x) & fmt.has_infinity, x, np.float32(NAN)))
    with np.errstate(invalid="ignore"):
        return values.astype(np.float32).astype(NUMPY_DTYPES[fmt.name])


def every_bf16() -> np.ndarray:
    return (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)


def log_uniform(count: int) -> np.ndarray:
    """fp32 of both signs over all its decades, its subnormals included."""
    generator = np.random.default_rng(0)
    magnitude = np.exp2(generator.uniform(-150, 128, count))
    return (magnitude * generator.choice((-1, 1), count)).astype(np.float32)


def boundaries(fmt: Format) -> np.ndarray:
    """Every value of the format, every midpoint of neighbours, and the fp32 numbers on either side of both."""
    codes = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPES[fmt.name]).astype(np.float64)
    values = np.unique(codes[np.isfinite(codes)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    return np.concatenate([points, np.nextafter(points, np.float32(INF)), np.nextafter(points, np.float32(-INF))])


CORPUS = {"every_bf16": lambda fmt: every_bf16(), "log_uniform": lambda fmt: log_uniform(10**6), "ties": boundaries}


@pytest.mark.parametrize("draw", CORPUS.values(), ids=CORPUS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_casts_equal_ml_dtypes_bit_for_bit(fmt: Format, draw) -> None:
    x = draw(fmt)
    expected = by_ml_dtypes(x, fmt)
    got = cast(torch.from_numpy(x), fmt)
    assert got.dtype == fmt.dtype
    is_nan = np.isnan(expected.astype(np.float32))
    assert np.isnan(got.float().numpy()[is_nan]).all()  # which NaN is not defined
    assert np.array_equal(got.view(torch.uint8).numpy()[~is_nan], expected.view(np.uint8)[~is_nan])


@pytest.mark.parametrize("draw", CORPUS.values(), ids=CORPUS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_rounding_in_fp32_equals_the_cast(fmt: Format, draw) -> None:
    x = torch.from_numpy(draw(fmt))
    expected = cast(x, fmt).float()
    torch.testing.assert_close(round_to_format(x, fmt), expected, rtol=0, atol=0, equal_nan=True)
    # The two short ways are for values of which no finite one rounds to more than the maximum.
    short, expected = (t[(x.abs() <= fmt.max * (1 + 2.0**-20)) | ~x.isfinite()] for t in (x, expected))
    torch.testing.assert_close(definition.round_in_range(short, fmt), expected, rtol=0, atol=0, equal_nan=True)
    assert definition._round_in_place(short, fmt).data_ptr() == short.data_ptr()
    torch.testing.assert_close(short, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_infinity_stays_where_the_format_has_it_and_is_nan_elsewhere(fmt: Format) -> None:
    x = torch.tensor([INF, -INF, NAN, 3e38, -3e38])
    expected = [INF, -INF] if fmt.has_infinity else [NAN, NAN]
    wanted = torch.tensor([*expected, NAN, fmt.max, -fmt.max])
    for got in (cast(x, fmt).float(), round_to_format(x, fmt)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_negative_zero_has_its_code_where_the_format_has_one(fmt: Format) -> None:
    code = cast(torch.tensor([-0.0]), fmt).view(torch.uint8).item()
    assert code == (0 if fmt.name.endswith("fnuz") else 0x80)
    assert round_to_format(torch.tensor([-0.0]), fmt).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_cast_through_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(4096).mul(100).to(dtype)
    for fmt in FORMATS.values():
        assert torch.equal(cast(x, fmt).view(torch.uint8), cast(x.float(), fmt).view(torch.uint8))


# --- scales ---


def amaxes(fmt: Format) -> list[float]:
    """Powers of two, the format's maximum times them, their fp32 neighbours, subnormals, the largest fp32, others."""
    points = [2.0**e for e in range(-149, 128, 7)] + [fmt.max * 2.0**e for e in range(-140, 100, 9)]
    x = np.array(points, np.float32)
    near = np.concatenate([x, np.nextafter(x, np.float32(INF)), np.nextafter(x, np.float32(0))])
    rest = np.array([1e-45, 2.0**-126, np.finfo(np.float32).max, 448.0, 57344.0], np.float32)
    values = np.concatenate([near, rest, np.abs(log_uniform(300))])
    return sorted({float(value) for value in values if 0 < value < INF})


def spec_with(fmt: Format, rule: str) -> OperandSpec:
    return OperandSpec(format=fmt, group_rows=1, group_k=None, scale_rule=rule)


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def ceil_log2(x: Fraction) -> int:
    exponent = floor_log2(x)
    return exponent if Fraction(2) ** exponent == x else exponent + 1


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_fp32_scale_is_the_nearest_fp32_to_amax_over_max(fmt: Format) -> None:
    values = amaxes(fmt)
    scales = scale_from_amax(torch.tensor(values), spec_with(fmt, "fp32")).tolist()
    for amax, scale in zip(values, scales, strict=True):
        exact = max(Fraction(amax) / Fraction(fmt.max), Fraction(2) ** -126)
        ulp = Fraction(float(np.spacing(np.float32(scale))))
        assert abs(Fraction(scale) - exact) <= ulp / 2, amax


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_scale_rounded_up_is_the_smallest_power_of_two_that_does_not_saturate(fmt: Format) -> None:
    values = amaxes(fmt)
    scales = scale_from_amax(torch.tensor(values), spec_with(fmt, "pow2_up")).tolist()
    for amax, scale in zip(values, scales, strict=True):
        exponent = max(ceil_log2(Fraction(amax) / Fraction(fmt.max)), -126)
        assert Fraction(scale) == Fraction(2) ** exponent, amax


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_floor_rule_is_that_of_the_ocp_specification(fmt: Format) -> None:
    values = amaxes(fmt)
    scales = scale_from_amax(torch.tensor(values), spec_with(fmt, "pow2_floor")).tolist()
    for amax, scale in zip(values, scales, strict=True):
        exponent = max(floor_log2(Fraction(amax)) - floor_log2(Fraction(fmt.max)), -126)
        assert Fraction(scale) == Fraction(2) ** exponent, amax


@pytest.mark.parametrize("rule", ["fp32", "pow2_up", "pow2_floor"])
def test_a_group_of_zeros_has_scale_one_and_every_scale_has_a_finite_reciprocal(rule: str) -> None:
    spec = spec_with(FORMATS["e4m3"], rule)
    scales = scale_from_amax(torch.tensor([0.0, 1e-45, 2.0**-126, 3e38]), spec)
    assert scales[0] == 1
    assert scales.reciprocal().isfinite().all()


# --- groups ---


def by_loops(x: Tensor, spec: OperandSpec) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix, group by group; scales from `scale_from_amax`, which is tested above."""
    values = x.float().numpy()
    rows, k = values.shape
    height, width = spec.group_rows or max(rows, 1), spec.group_k or max(k, 1)
    codes = np.zeros(values.shape, np.uint8)
    scales = np.ones((-(-rows // height), -(-k // width)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            group = values[part]
            amax = np.abs(group[np.isfinite(group)]).max(initial=0)
            scales[i, j] = scale_from_amax(torch.tensor(float(amax)), spec).item()
            scaled = group * (np.float32(1) / scales[i, j])
            codes[part] = by_ml_dtypes(scaled, spec.format).view(np.uint8)
    return codes, scales


def heavy_tailed(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.exp(3 * torch.randn(shape))


# One group and a part, exact multiples, ragged both ways, one row, one column, one element.
SHAPES = [(3, 40), (128, 256), (130, 257), (1, 129), (7, 1), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_quantising_equals_a_loop_over_groups(spec: OperandSpec, shape: tuple[int, int]) -> None:
    x = heavy_tailed(*shape)
    x[0] = 0
    codes, scales = by_loops(x, spec)
    data, scale = quantize(x, spec)
    assert data.dtype == spec.format.dtype
    assert scale.dtype == torch.float32
    assert np.array_equal(scale.numpy(), scales)
    assert np.array_equal(data.view(torch.uint8).numpy(), codes)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_three_ways_to_the_fp8_values_agree(spec: OperandSpec) -> None:
    """Codes times scales; arithmetic rounding; arithmetic rounding where autograd forbids working in place."""
    for shape in SHAPES:
        x = heavy_tailed(*shape)
        values = dequantize(*quantize(x, spec), spec)
        assert torch.equal(fake_quantize(x, spec), values)
        assert torch.equal(fake_quantize(x.requires_grad_(), spec).detach(), values)


@pytest.mark.parametrize("exponent", [-140, -118, -100, -82, -78, 70, 78, 84, 100, 120])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_they_agree_near_the_ends_of_fp32_and_in_pieces(monkeypatch, spec: OperandSpec, exponent: int) -> None:
    monkeypatch.setattr(pieces, "PIECE", 512)
    monkeypatch.setattr(definition, "_FEW_SCALES", 1)
    x = torch.randn(70, 150) * 2.0**exponent
    x[5, 40:80], x[6, 7], x[7, 8] = 0, NAN, INF
    x[:, 100] *= 2.0**-20
    for same in (x, x.t().contiguous().t()):
        assert torch.equal(fake_quantize(same, spec).nan_to_num(1), dequantize(*quantize(x, spec), spec).nan_to_num(1))
        recorded = fake_quantize(same.clone().requires_grad_(), spec).detach()
        assert torch.equal(recorded.nan_to_num(1), fake_quantize(x, spec).nan_to_num(1))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_layout_and_dtype_do_not_change_the_values(spec: OperandSpec) -> None:
    x = heavy_tailed(70, 150).bfloat16()
    expected = fake_quantize(x.float(), spec)
    wide = torch.randn(70, 300).bfloat16()
    wide[:, ::2] = x
    for same in (x, x.t().contiguous().t(), wide[:, ::2], x.double()):
        assert torch.equal(fake_quantize(same, spec), expected)
    row = heavy_tailed(1, 150)
    assert torch.equal(fake_quantize(row.expand(5, 150), spec), fake_quantize(row.repeat(5, 1), spec))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_operands_of_a_batch_are_quantised_apart(spec: OperandSpec) -> None:
    x = heavy_tailed(2, 3, 33, 70) * torch.logspace(-3, 3, 6).reshape(2, 3, 1, 1)
    data, scale = quantize(x, spec)
    for i, j in np.ndindex(2, 3):
        alone, alone_scale = quantize(x[i, j], spec)
        assert torch.equal(data[i, j].view(torch.uint8), alone.view(torch.uint8))
        assert torch.equal(scale[i, j], alone_scale)
    assert torch.equal(dequantize(data, scale, spec), fake_quantize(x, spec))


@pytest.mark.parametrize("shape", [(0, 40), (5, 0), (0, 0), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_empty_operands_have_empty_values(spec: OperandSpec, shape: tuple[int, ...]) -> None:
    data, scale = quantize(torch.zeros(shape), spec)
    assert data.shape == fake_quantize(torch.zeros(shape), spec).shape == dequantize(data, scale, spec).shape == shape


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_zeros_and_subnormals_come_out_finite_and_near(spec: OperandSpec) -> None:
    assert not fake_quantize(torch.zeros(5, 70), spec).any()
    x = torch.full((5, 70), 1e-45)
    x[0, 0], x[1] = 3e-40, 0
    got = fake_quantize(x, spec)
    assert got.isfinite().all()
    assert 3e-40 * 0.875 <= got.abs().max() <= 3e-40 * 1.125  # two mantissa bits
    assert not got[1].any()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_bad_value_stays_where_it_is_and_changes_nothing_else(spec: OperandSpec) -> None:
    x = heavy_tailed(140, 300)
    bad = {(0, 3): NAN, (1, 7): INF, (70, 280): -INF, (139, 299): NAN}
    x[3] = 0
    x[3, 5] = NAN  # a group with nothing else in it
    bad[3, 5] = NAN
    clean = x.nan_to_num(nan=0.0)
    for place, value in bad.items():
        x[place], clean[place] = value, 0.0
    expected = fake_quantize(clean, spec)
    for place, value in bad.items():
        expected[place] = value if spec.format.has_infinity else NAN
    before = x.clone()
    for got in (fake_quantize(x, spec), dequantize(*quantize(x, spec), spec)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(x.isnan(), before.isnan())  # operands are never modified
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_operand_is_never_modified(spec: OperandSpec) -> None:
    x = heavy_tailed(64, 128)
    before = x.clone()
    fake_quantize(x, spec)
    quantize(x, spec)
    assert torch.equal(x, before)


def test_a_given_amax_stands_for_that_of_the_whole_tensor() -> None:
    whole = heavy_tailed(50, 70)
    for role in ROLES:
        spec = RECIPES["tensorwise"].operand(role)
        data, scale = quantize(whole, spec)
        part, part_scale = quantize(whole[:5], spec, whole.abs().max())
        assert torch.equal(part_scale, scale)
        assert torch.equal(part.view(torch.uint8), data[:5].view(torch.uint8))
        assert torch.equal(fake_quantize(whole[:5], spec, whole.abs().max()), fake_quantize(whole, spec)[:5])
        assert torch.equal(dequantize(part, part_scale, spec), fake_quantize(whole, spec)[:5])


def test_the_saturated_share_counts_finite_elements_above_the_maximum() -> None:
    spec = RECIPES["mxfp8_floor"].operand("input")
    x = torch.full((1, 32), 1.0)
    x[0, :4] = torch.tensor([1.99, -1.9, 1.74, INF])  # scale 2^-8: 509, 486, 445
    assert saturated_share(x, spec) == 2 / 32
    assert saturated_share(x[:, 2:3], spec) == 0
    assert saturated_share(torch.zeros(0, 32), spec) == 0


def test_recipes_that_are_not_saturating_clip_nothing() -> None:
    x = heavy_tailed(128, 256)
    for name, recipe in RECIPES.items():
        shares = [saturated_share(x, recipe.operand(role)) for role in ROLES]
        if name == "mxfp8_floor":
            assert min(shares) > 0.001
        elif recipe.scale_rule == "pow2_up":
            assert shares == [0, 0, 0]


# --- properties ---

# Far from where fp32 itself ends, so that powers of two are exact: values 0 or 2^-40 .. 2^40.
ELEMENT = st.one_of(
    st.just(0.0),
    st.builds(
        lambda mantissa, exponent, sign: sign * mantissa * 2.0**exponent,
        st.floats(1, 2, width=32, exclude_max=True),
        st.integers(-40, 40),
        st.sampled_from((-1, 1)),
    ),
)


@st.composite
def matrices(draw) -> Tensor:
    rows, k = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    values = draw(st.lists(ELEMENT, min_size=8, max_size=8))
    order = draw(st.permutations(range(8)))
    # Eight drawn numbers, laid out over the matrix with period 8: the search stays small.
    return torch.tensor([values[order[i % 8]] for i in range(rows * k)]).reshape(rows, k)


EVERY_SPEC = st.sampled_from(list(SPECS.values()))


@given(x=matrices(), spec=EVERY_SPEC)
def test_quantising_twice_is_quantising_once(x: Tensor, spec: OperandSpec) -> None:
    once = fake_quantize(x, spec)
    twice = fake_quantize(once, spec)
    if spec.scale_rule == "fp32":  # the scale is rounded, so the values may move by an fp32 ulp; the codes do not
        torch.testing.assert_close(twice, once, rtol=4e-7, atol=0)
        assert torch.equal(quantize(once, spec)[0].float(), quantize(x, spec)[0].float())
    else:
        assert torch.equal(twice, once)


@given(x=matrices(), spec=EVERY_SPEC, exponent=st.integers(-20, 20))
def test_powers_of_two_go_through(x: Tensor, spec: OperandSpec, exponent: int) -> None:
    assert torch.equal(fake_quantize(x * 2.0**exponent, spec), fake_quantize(x, spec) * 2.0**exponent)


@given(x=matrices(), spec=EVERY_SPEC)
def test_the_sign_goes_through(x: Tensor, spec: OperandSpec) -> None:
    assert torch.equal(fake_quantize(-x, spec), -fake_quantize(x, spec))


@given(x=matrices(), spec=EVERY_SPEC)
def test_order_is_kept_within_a_group(x: Tensor, spec: OperandSpec) -> None:
    row = x[:1, : spec.group_k or x.shape[1]]
    ordered = row[:, row[0].argsort()]
    assert (fake_quantize(ordered, spec).diff() >= 0).all()


@given(x=matrices(), spec=EVERY_SPEC)
def test_no_element_moves_by_more_than_half_a_step(x: Tensor, spec: OperandSpec) -> None:
    data, scale = quantize(x, spec)
    per_element = dequantize(torch.ones_like(x).to(spec.format.dtype), scale, spec)
    limit = torch.maximum(
        x.abs() * 2.0 ** -(spec.format.mantissa_bits + 1), per_element * spec.format.min_subnormal / 2
    )
    moved = (dequantize(data, scale, spec) - x).abs()
    clipped = x.abs() > per_element * spec.format.max
    # Saturating recipes clip to the maximum on top; fp32 scales are rounded themselves, by 2^-24.
    assert (moved <= torch.where(clipped, x.abs(), limit) * (1 + 2.0**-18) + x.abs() * 2.0**-22).all()


@given(x=matrices(), spec=EVERY_SPEC, value=st.sampled_from([1e-6, 1.0, 1e6]))
def test_rows_below_change_nothing_unless_the_group_spans_them(x: Tensor, spec: OperandSpec, value: float) -> None:
    taller = torch.cat([x, torch.full((1, x.shape[1]), value)])
    if spec.group_rows == 1:
        assert torch.equal(fake_quantize(taller, spec)[:-1], fake_quantize(x, spec))


# --- stochastic rounding ---


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_is_right_on_average(name):
    fmt = FORMATS[name]
    scales = torch.logspace(-3, torch.tensor(fmt.max).log2().item(), 60, base=2.0)
    x = torch.cat([scales, -scales, scales * fmt.min_subnormal]).clamp(-fmt.max, fmt.max)
    draws = round_stochastically(x.expand(4000, -1).contiguous(), fmt, torch.Generator().manual_seed(0))
    values = all_values(fmt)
    below = values[(torch.bucketize(x, values, right=True) - 1).clamp_min(0)]
    above = values[torch.bucketize(x, values).clamp_max(len(values) - 1)]
    assert bool(((draws == below) | (draws == above)).all())
    width = (above - below).clamp_min(1e-30)
    assert float(((draws.double().mean(0) - x.double()) / width).abs().max()) < 4.5 * 0.5 / 4000**0.5


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_keeps_values_of_the_format_and_treats_the_rest_as_the_cast_does(name):
    fmt = FORMATS[name]
    values = all_values(fmt)
    assert round_stochastically(values, fmt, torch.Generator()).equal(values)
    odd = torch.tensor([NAN, INF, -INF, 1e9, -1e9])
    torch.testing.assert_close(
        round_stochastically(odd, fmt, torch.Generator()), cast(odd, fmt).float(), equal_nan=True, rtol=0, atol=0
    )


def test_stochastic_quantisation_is_seeded_and_costs_twice_the_squared_error():
    x, spec = torch.randn(256, 512), RECIPES["rowwise"].operand("grad_output")
    one, two = (fake_quantize(x, spec, stochastic=torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.equal(two)
    ratio = (one - x).square().mean() / (fake_quantize(x, spec) - x).square().mean()
    assert float(ratio) == pytest.approx(2.0, rel=0.03)  # E[d (1 - d)] against E[min(d, 1 - d)^2] of a step


def all_values(fmt):
    """Every finite value of a format, in order, each once."""
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
    return codes[codes.isfinite()].unique()


# --- compiled ---

# Several groups both ways, the last one ragged; and one group alone, which is a graph of its own.
RAGGED = [(130, 200), (150, 129), (300, 257)]
LESS_THAN_A_GROUP = (33, 30)
# By the size of a group; input and weight of mxfp8 scale alike.
GROUPED = {
    "1x128": RECIPES["blockwise"].operand("input"),
    "128x128": RECIPES["blockwise"].operand("weight"),
    "1x32": RECIPES["mxfp8"].operand("input"),
}


@needs_a_compiler
@pytest.mark.parametrize("spec", GROUPED.values(), ids=GROUPED)
def test_compiled_casts_are_the_eager_ones_at_ragged_ends(spec: OperandSpec) -> None:
    """Inductor's C++ once left the elements of a ragged last group uncomputed: nothing but their values shows it."""

    def both(x: Tensor, stored: Tensor, of_stored: Tensor) -> tuple[Tensor, ...]:
        codes, scale = quantize(x, spec)
        return fake_quantize(x, spec), dequantize(stored, of_stored, spec), codes.float(), scale

    everything = spec.group_rows != 1  # groups of one row are ragged one way alone: each layout once is enough
    for dynamic, shapes in ((False, RAGGED[:1]), (True, [*RAGGED, LESS_THAN_A_GROUP])):
        torch._dynamo.reset()
        compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
        for shape in shapes:
            one_group = shape == LESS_THAN_A_GROUP
            plain = [torch.randn(shape) * torch.exp(2 * torch.randn(shape))]
            transposed = [torch.randn(shape[::-1]).t()]
            for of in plain + transposed if everything and not one_group else transposed if dynamic else plain:
                expected, scales = quantize(of, spec)
                with torch._dynamo.config.patch(error_on_recompile=dynamic and shape in RAGGED[1:]):
                    values, stored, codes, scale = compiled(of, expected, scales)
                assert torch.equal(values, fake_quantize(of, spec)), (shape, dynamic)
                assert torch.equal(stored, dequantize(expected, scales, spec)), (shape, dynamic)
                assert torch.equal(codes, expected.float())
                rows, depth = scales.shape
                assert torch.equal(scale[:rows, :depth], scales)  # of dynamic extents there are groups of zeros behind
