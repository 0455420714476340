"""Kernels of grouped products against a float64 model, expert by expert: nothing of one expert reaches the next."""

import sys

import pytest
import torch

from loka.errors import KernelError
from loka.formats import PASSES, RECIPES
from loka.hardware import DeviceInfo
from loka.kernel_registry import torch_grouped
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.emulated import emulate
from loka.kernel_registry.grouped_tokens import spread
from loka.kernel_registry.spec import GemmRequest
from loka.numerics import product_errors
from loka.probes.capturing.products import Draw, Factors, gemm
from loka.probes.sampling.measure import measure
from loka.torch_release import release
from tests.kernel_registry.made_devices import interprets_triton
from tests.kernel_registry.made_gemm import heavy_tailed, normal, subnormal, with_zero_rows
from tests.kernel_registry.made_grouped import (
    ROUTINGS,
    as_deep_gemm,
    as_scaled_grouped_mm,
    assert_modelled,
    each_expert,
    made,
)

# numpy, which Triton's interpreter computes with, warns of the NaN and Inf that some tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
SPECS = {spec.name: spec for spec in KERNELS if spec.op == "grouped_linear"}
DEFINITIONS = [name for name in SPECS if name.startswith("emulated.")]
BASELINES = [name for name, spec in SPECS.items() if spec.recipe is None]
TRITON = [name for name in SPECS if name.startswith("triton.")] if interprets_triton() else []
HERE = [*DEFINITIONS, *BASELINES, *TRITON]
of_passes = pytest.mark.parametrize("product", PASSES)
of_routings = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


def run(name, a, b, offsets, product, out_dtype=torch.float32):
    return SPECS[name].load_grouped()(a, b, offsets, product=product, out_dtype=out_dtype)


@of_passes
@of_routings
@pytest.mark.parametrize("draw", [normal, heavy_tailed, with_zero_rows, subnormal])
@pytest.mark.parametrize("name", [*DEFINITIONS, "torch.native.grouped_linear", "torch.grouped_mm.fp32"])
def test_every_expert_gets_the_modelled_product(name, draw, routing, product):
    a, b, offsets = made(draw, routing, product)
    assert_modelled(run(name, a, b, offsets, product), a, b, offsets, product, SPECS[name].recipe)


@of_passes
@of_routings
@pytest.mark.parametrize("name", TRITON)
def test_our_kernels_compute_the_definition_from_high_precision_operands(name, routing, product):
    a, b, offsets = made(heavy_tailed, routing, product)
    for dtype in (torch.float32, torch.bfloat16):
        got = run(name, a.to(dtype), b.to(dtype), offsets, product, dtype)
        assert got.dtype == dtype
        assert_modelled(got, a.to(dtype), b.to(dtype), offsets, product, SPECS[name].recipe)


@of_passes
@pytest.mark.parametrize("routing", ["ragged", "empty_experts", "nobody", "no_tokens"])
@pytest.mark.parametrize("name", ["torch.grouped_mm.bf16", "torch.grouped_mm.fp16"])
def test_baselines_of_16_bits_serve_any_shape(name, routing, product):
    dtype = torch.bfloat16 if "bf16" in name else torch.float16
    a, b, offsets = (x if x.dtype == torch.int32 else x.to(dtype) for x in made(normal, ROUTINGS[routing], product))
    got = run(name, a, b, offsets, product, dtype)
    assert got.dtype == dtype
    assert_modelled(got, a, b, offsets, product, None)


@of_passes
@pytest.mark.parametrize("name", DEFINITIONS)
def test_an_expert_is_a_product_of_its_own(name, product):
    a, b, offsets = made(heavy_tailed, ROUTINGS["ragged"], product)
    got = run(name, a, b, offsets, product)
    for where, left, right in each_expert(a, b, offsets, product):
        alone = emulate(RECIPES[SPECS[name].recipe], left, right, product=product, out_dtype=torch.float32)
        assert torch.equal(got[where], alone)


@of_passes
@pytest.mark.parametrize("name", HERE)
def test_a_loud_expert_does_not_change_its_neighbours(name, product):
    a, b, offsets = made(normal, ROUTINGS["ragged"], product)
    before = run(name, a, b, offsets, product)
    a, b = a.clone(), b.clone()
    a[5:22] *= 1e4
    b[5 : 22 if product == "wgrad" else 1] *= 1e4
    if product != "wgrad":
        b[1] *= 1e4
    after = run(name, a, b, offsets, product)
    first, loud, last = (where for where, *_ in each_expert(a, b, offsets, product))
    assert torch.equal(before[first], after[first])
    assert torch.equal(before[last], after[last])
    assert not torch.equal(before[loud], after[loud])


@of_passes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", HERE)
def test_what_is_not_finite_stays_in_its_rows(name, bad, product):
    if name in ("torch.grouped_mm.bf16", "torch.grouped_mm.fp16") and release() < (2, 12):
        pytest.skip("before torch 2.12 oneDNN's products of 16 bits let it into the row before")
    a, b, offsets = made(normal, ROUTINGS["ragged"], product)
    clean = run(name, a, b, offsets, product)
    a = a.clone()
    a[7, 3] = bad  # token 7 is of the second expert
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[(1, 3) if product == "wgrad" else 7] = True
    got = run(name, a, b, offsets, product)
    assert got[~touched].isfinite().all()
    assert not got[touched].isfinite().all()
    if SPECS[name].recipe is None or "tensorwise" not in name:
        assert torch.equal(got[~touched], clean[~touched])


@of_passes
@pytest.mark.parametrize("name", HERE)
def test_operands_of_any_strides_are_served_and_left_alone(name, product):
    a, b, offsets = made(normal, ROUTINGS["ragged"], product)
    plain = run(name, a.contiguous(), b.contiguous(), offsets, product)
    spaced = torch.zeros(len(a), 2 * a.shape[1])
    spaced[:, ::2] = a
    turned = b.mT.contiguous().mT
    kept = spaced.clone(), turned.clone()
    assert torch.allclose(run(name, spaced[:, ::2], turned, offsets, product), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(kept[0], spaced)
    assert torch.equal(kept[1], turned)


@of_passes
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    ("offsets", "word"),
    [
        (torch.tensor([5, 3, 9], dtype=torch.int32), "ascending, from 0 to at most 24 tokens"),
        (torch.tensor([-1, 3, 9], dtype=torch.int32), "ascending"),
        (torch.tensor([5, 9, 25], dtype=torch.int32), "ascending"),
        (torch.tensor([5, 9, 24]), "int32"),
        (torch.tensor([[5, 9, 24]], dtype=torch.int32), "It needs"),
    ],
)
def test_offsets_that_make_no_sense_are_refused(name, product, offsets, word):
    a, b, _ = made(normal, ROUTINGS["ragged"], product)
    with pytest.raises(KernelError, match=word):
        run(name, a, b, offsets, product)


@pytest.mark.parametrize("name", HERE)
def test_operands_that_do_not_fit_are_refused(name):
    a, b, offsets = made(normal, ROUTINGS["ragged"])
    with pytest.raises(KernelError, match="transpose the weight or recount"):
        run(name, a, b.mT, offsets, "fprop")
    with pytest.raises(KernelError, match="sort both by expert first"):
        run(name, a, b, offsets, "wgrad")


# --- what the evidence is about ---


@pytest.mark.parametrize("name", DEFINITIONS)
@of_passes
def test_a_probe_measures_the_error_of_the_definition(name, product):
    recipe = RECIPES[SPECS[name].recipe]
    a, b, offsets = made(heavy_tailed, ((40, 0, 17), 0, 40, 150), product)
    factors = Factors("_grouped_mm", a.t() if product == "wgrad" else a, b if product == "wgrad" else b.mT, offsets)
    found = measure(
        gemm(factors, a_is_p=True), product, [recipe], Draw(rows=10_000, generator=torch.Generator().manual_seed(0))
    )
    exact, rounded = (
        run(kernel, a, b, offsets, product).flatten(0, -2) for kernel in ("torch.native.grouped_linear", name)
    )
    (error,) = product_errors(rounded[None], exact)
    assert found.errors[recipe.name].row_error == pytest.approx(error.row_error, rel=1e-4)


# --- libraries that need a GPU: what they are given, against stand-ins that check it ---


@of_passes
@of_routings
@pytest.mark.parametrize("draw", [normal, heavy_tailed, with_zero_rows])
def test_scaled_grouped_mm_is_given_what_it_wants(monkeypatch, draw, routing, product):
    monkeypatch.setattr(torch_grouped, "scaled_grouped_mm", as_scaled_grouped_mm)
    a, b, offsets = made(draw, routing, product)
    got = run("torch.scaled_grouped_mm.rowwise", a, b, offsets, product, torch.bfloat16)
    assert_modelled(got, a, b, offsets, product, "rowwise")


@pytest.mark.parametrize("product", ["fprop", "dgrad"])
@of_routings
@pytest.mark.parametrize("alignment", [64, 128])
def test_deepgemm_is_given_whole_tiles_of_one_expert_each(monkeypatch, alignment, routing, product):
    for module, stand_in in as_deep_gemm(alignment).items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    a, b, offsets = made(heavy_tailed, routing, product)
    got = run("deepgemm.grouped.blockwise", a, b, offsets, product, torch.bfloat16)
    assert_modelled(got, a, b, offsets, product, "blockwise")


def test_a_deepgemm_that_cannot_be_called_says_what_to_do(monkeypatch):
    a, b, offsets = made(normal, ROUTINGS["ragged"])
    monkeypatch.setitem(sys.modules, "deep_gemm", None)  # as where it is not installed
    with pytest.raises(KernelError, match=r"ModuleNotFoundError.*install one from"):
        run("deepgemm.grouped.blockwise", a, b, offsets, "fprop")


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.zeros(9, 16), False),
        (torch.zeros(9, 24)[:, :16], False),
        (torch.zeros(9, 24)[:, 8:], False),
        (torch.zeros(9, 24)[:, 1:17], True),  # rows begin in the middle of 16 bytes
        (torch.zeros(16, 9).t(), True),  # experts would
        (torch.zeros(1, 16).expand(9, 16), True),
        (torch.zeros(9, 13), True),
        (torch.zeros(3, 16, 8), False),
        (torch.zeros(3, 8, 16).mT, False),
        (torch.zeros(3, 8, 13).mT, True),
    ],
)
def test_operands_are_copied_only_where_torch_could_not_read_them(x, copied):
    got = torch_grouped._aligned(x)
    assert got.shape[-1] % 8 == 0
    assert (got.data_ptr() != x.data_ptr()) is copied


@of_routings
@pytest.mark.parametrize("at_least", [0, 16])
def test_rows_are_spread_so_that_every_expert_begins_at_a_tile(routing, at_least):
    counts, unused, *_ = routing
    tokens = sum(counts) + unused
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    found = spread(offsets, tokens, 16, at_least=at_least)
    starts = [0, *found.offsets.tolist()]
    assert all(start % 16 == 0 for start in starts)
    assert starts[-1] <= found.rows
    expected = [start + row for start, count in zip(starts, counts, strict=False) for row in range(count)]
    assert found.place.tolist() == expected + [found.rows] * unused
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert found.owner[expected].tolist() == owners
    assert int((found.owner >= 0).sum()) == sum(counts)


@pytest.mark.skipif(not TRITON, reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n", "end"), [(40, 300, 17), (40, 5, 40), (16, 256, 0), (33, 7, 32), (0, 7, 0)])
def test_rows_of_no_expert_are_zeroed_and_no_others(tokens, n, end, dtype):
    from loka.kernel_registry.triton.unrouted import zero_unrouted_rows

    whole = torch.randn(tokens, n + 3).to(dtype)
    before = whole.clone()
    zero_unrouted_rows(whole[:, :n], torch.tensor([0, end], dtype=torch.int32))
    assert not whole[end:, :n].any()
    assert torch.equal(whole[:end], before[:end])
    assert torch.equal(whole[:, n:], before[:, n:])


@pytest.mark.parametrize("name", ["torch.grouped_mm.fp32", "torch.grouped_mm.bf16"])
def test_offsets_that_cannot_be_read_leave_no_garbage_either(name):
    a, b, offsets = made(normal, ROUTINGS["empty_experts"])
    wanted = run(name, a, b, offsets, "fprop")
    unreadable = torch.nn.Parameter(offsets, requires_grad=False)  # as while a graph is traced: no plain tensor
    assert torch.equal(run(name, a, b, unreadable, "fprop"), wanted)
    assert not wanted[int(offsets[-1]) :].any()


def test_rows_say_where_a_library_runs():
    hopper, blackwell = (DeviceInfo(type="cuda", name="", capability=(major, 0)) for major in (9, 10))
    scaled, deep = SPECS["torch.scaled_grouped_mm.rowwise"], SPECS["deepgemm.grouped.blockwise"]
    assert scaled.unavailable(hopper) is None
    assert "below 10.0" in scaled.unavailable(blackwell)
    assert "below 10.0" in deep.unavailable(blackwell)
    request = GemmRequest(site="up", product="wgrad", op="grouped_linear", m=40, n=13, k=24, dtype="bfloat16", batch=3)
    assert deep.cannot(request) == "serves fprop, dgrad, not wgrad"
    assert scaled.cannot(request) is None


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs capability 9.0"
)
@of_passes
@of_routings
def test_scaled_grouped_mm_computes_the_definition(routing, product):
    a, b, offsets = (x.cuda() for x in made(heavy_tailed, routing, product))
    got = run("torch.scaled_grouped_mm.rowwise", a, b, offsets, product)
    wanted = run("emulated.grouped_linear.rowwise", a, b, offsets, product)
    magnitude = run("torch.native.grouped_linear", a.abs(), b.abs(), offsets, product)
    # Tensor cores keep about 14 bits of a partial sum, and the result is rounded to bf16.
    assert ((got - wanted).abs() <= 2.0**-9 * magnitude + 2.0**-8 * wanted.abs()).all()
