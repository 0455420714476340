"""Emulated FP8 on the bf16 units of a CPU: the same sums, and no other product of the process is touched."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from loka import hardware
from loka.dispatch.measuring.measure import tried
from loka.formats import BLOCK, PASS_OPERANDS, PASSES, RECIPES
from loka.hardware import device_info
from loka.kernel_registry import bf16_units, emulated
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import GemmRequest
from loka.quantize import dequantize, held_codes, quantize
from tests.dispatch.made_conversion import needs_a_compiler
from tests.kernel_registry.made_gemm import heavy_tailed as draw
from tests.kernel_registry.made_gemm import operands

NAMES = ("tensorwise", "rowwise")
BLOCKS = ("blockwise",)
POWERS = ("blockwise_pow2", "mxfp8", "mxfp8_floor")
EVERY = (*NAMES, *BLOCKS, *POWERS)
KERNELS = {name: getattr(emulated, name) for name in EVERY}
CODES = (torch.bfloat16, torch.float32)
needs_bf16 = pytest.mark.skipif(not hardware.multiplies_bf16("cpu"), reason="this CPU does not multiply bf16")


def precision() -> str:
    return torch._C._get_fp32_precision_getter("mkldnn", "matmul")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else multiplies, whatever threads a test runner has."""
    monkeypatch.setattr(bf16_units, "_is_alone", lambda: True)


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The precision of fp32 inside of each product; afterwards it is what it was."""
    found: list[str] = []
    product, before = bf16_units.matmul, precision()
    monkeypatch.setattr(bf16_units, "matmul", lambda a, b: found.append(precision()) or product(a, b))
    yield found
    assert precision() == before


def definition(a: Tensor, b: Tensor, name: str, product: str) -> tuple[Tensor, Tensor]:
    """The product of the values that operands stand for in float64, and that of their magnitudes."""
    specs = (RECIPES[name].operand(role) for role in PASS_OPERANDS[product])
    left, right = (dequantize(*quantize(x, spec), spec).double() for x, spec in zip((a, b), specs, strict=True))
    return left @ right.T, left.abs() @ right.abs().T


@needs_bf16
@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("shape", [(64, 48, 80), (1, 40, 300), (40, 1, 300), (5, 7, 3), (17, 33, 4096)], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_an_fp32_product_is_as_near_to_the_sum_as_fp32_additions_are(name, shape, product, alone, precisions) -> None:
    a, b = operands(draw, *shape)
    a = a.t().contiguous().t() if product == "wgrad" else a
    exact, magnitude = definition(a, b, name, product)
    got = KERNELS[name](a, b, product=product, out_dtype=torch.float32)
    assert precisions == ["bf16"] * (-(-shape[2] // BLOCK) if name in BLOCKS else 1)
    assert got.dtype == torch.float32
    # The additions of the sum, and one rounding for each scale; under blocks, of each block.
    scales = magnitude if name in BLOCKS else exact.abs()
    assert ((got.double() - exact).abs() <= shape[2] * 2.0**-24 * magnitude + 2.0**-23 * scales).all()
    half = KERNELS[name](a, b, product=product, out_dtype=torch.float16)
    assert torch.equal(half, got.half())


@needs_bf16
@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("shape", [(64, 48, 80), (1, 40, 300), (40, 1, 300), (5, 7, 3), (17, 33, 4096)], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_bf16_product_is_within_one_and_a_half_ulp_of_the_definition(name: str, shape, product: str) -> None:
    a, b = (x.bfloat16() for x in operands(draw, *shape))
    a, b = (a.t().contiguous().t(), b) if product == "wgrad" else (a, b)
    exact, magnitude = (x.numpy() for x in definition(a, b, name, product))
    got = KERNELS[name](a, b, product=product, out_dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    ulp = np.exp2(np.floor(np.log2(np.abs(exact).clip(1e-30))) - 7)
    roundings = 1.5 if name in NAMES else 0.5  # before and after the scales, or once
    # An fp32 sum is itself not exact where its terms cancel: eight bits below the largest of them are left to it.
    assert (np.abs(got.float().numpy() - exact) <= roundings * ulp + shape[2] * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("name", EVERY)
def test_without_bf16_units_the_definition_is_rounded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bf16_units._AVAILABLE, "cpu", False)
    a, b = operands(draw, 9, 12, 50)
    exact = KERNELS[name](a, b, product="fprop", out_dtype=torch.float32)
    assert torch.equal(KERNELS[name](a, b, product="fprop", out_dtype=torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("name", NAMES)
def test_codes_that_are_held_are_the_codes_of_fp8(name: str, dtype: torch.dtype) -> None:
    for role in ("input", "grad_output"):
        spec = RECIPES[name].operand(role)
        x = torch.randn(40, 70) * torch.exp(3 * torch.randn(40, 70))
        data, scale = quantize(x, spec)
        for source in (x, x.requires_grad_()):
            codes, of_codes = held_codes(source, spec, dtype)
            assert codes.dtype == dtype
            assert torch.equal(codes.detach().float(), data.float())
            assert torch.equal(of_codes.detach(), scale.reshape(of_codes.shape))


def test_a_code_and_a_scale_may_be_far_apart_where_the_result_is_not() -> None:
    a, b = torch.randn(6, 32) * 1e34, torch.randn(5, 32) * 1e-33
    a[2], b[1] = a[2] * 1e-60, b[1] * 1e30
    for name in EVERY:
        exact, magnitude = definition(a, b, name, "fprop")
        got = KERNELS[name](a, b, product="fprop", out_dtype=torch.float32)
        fits = magnitude < torch.finfo(torch.float32).max
        assert fits.sum() > 20
        assert ((got.double() - exact).abs() <= 1e-5 * magnitude + 2.0**-125)[fits].all()


@needs_bf16
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("exponents", [(-60, -60), (-115, 60), (-130, 0), (0, -130), (100, -110), (60, -60)], ids=str)
@pytest.mark.parametrize("name", POWERS)
def test_where_a_product_would_be_subnormal_the_sum_is_taken_in_fp32(name, exponents, dtype, alone, precisions) -> None:
    """These units take subnormal numbers for zero: not in a value, nor in the product of two."""
    a, b = (x.to(dtype) * 2.0**exponent for x, exponent in zip(operands(draw, 9, 12, 150), exponents, strict=True))
    exact, magnitude = definition(a, b, name, "fprop")
    smallest = [
        (quantize(x, RECIPES[name].operand("input"))[1].double() * RECIPES[name].operand("input").format.min_subnormal)
        for x in (a, b)
    ]
    fits = min(x.min() for x in smallest) >= 2.0**-126 and smallest[0].min() * smallest[1].min() >= 2.0**-126
    got = KERNELS[name](a, b, product="fprop", out_dtype=dtype)
    in_fp32 = dtype == torch.float32
    assert precisions == (["bf16"] if in_fp32 and fits else [])
    ulp = 0.0 if in_fp32 else 2.0**-8 * exact.abs()
    assert ((got.double() - exact).abs() <= 150 * 2.0**-24 * magnitude + ulp + 150 * 2.0**-149).all()


@needs_bf16
@pytest.mark.parametrize("name", BLOCKS)
def test_block_scales_near_the_ends_of_fp32_meet_values_and_not_sums(name: str, alone, precisions) -> None:
    for exponents in ((-60, 60), (60, -60), (-120, 20), (100, -90)):
        a, b = (x * 2.0**exponent for x, exponent in zip(operands(draw, 9, 12, 300), exponents, strict=True))
        exact, magnitude = definition(a, b, name, "fprop")
        got = KERNELS[name](a, b, product="fprop", out_dtype=torch.float32)
        assert "bf16" not in precisions
        assert ((got.double() - exact).abs() <= 300 * 2.0**-24 * magnitude + 300 * 2.0**-149).all()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("name", EVERY)
def test_a_bad_value_reaches_no_other_row(name: str, dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in operands(draw, 9, 12, 300))
    want = KERNELS[name](a, b, product="fprop", out_dtype=dtype)
    a[3, 200], b[5, 17] = float("nan"), float("inf")
    got = KERNELS[name](a, b, product="fprop", out_dtype=dtype)
    assert got[3].isnan().all()
    assert got[:, 5].isnan().all()
    if name not in ("tensorwise", "blockwise", "blockwise_pow2"):  # whose scales are of several rows
        rest = [row for row in range(9) if row != 3], [column for column in range(12) if column != 5]
        assert torch.equal(got[rest[0]][:, rest[1]], want[rest[0]][:, rest[1]])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("empty", [(0, 8, 16), (8, 0, 16), (8, 8, 0)], ids=str)
def test_an_empty_operand_has_an_empty_product(name: str, empty: tuple[int, int, int]) -> None:
    m, n, k = empty
    got = KERNELS[name](torch.ones(m, k), torch.ones(n, k), product="fprop", out_dtype=torch.float32)
    assert torch.equal(got, torch.zeros(m, n))


# --- the setting of the process ---


@needs_bf16
def test_after_a_product_that_fails_the_precision_is_what_it_was(alone, precisions) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        bf16_units.exact_matmul(torch.ones(2, 3), torch.ones(2, 4))
    assert precisions == ["bf16"]


@pytest.mark.parametrize("chosen", ["ieee", "bf16"])
def test_a_precision_that_the_process_has_chosen_stays(chosen, alone, precisions) -> None:
    before = precision()
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", chosen)
    try:
        bf16_units.exact_matmul(torch.ones(2, 3), torch.ones(2, 3))
        assert (precisions, precision()) == ([chosen], chosen)
    finally:
        torch._C._set_fp32_precision_setter("mkldnn", "matmul", before)


@needs_bf16
def test_units_that_are_left_idle_compute_nothing(alone, precisions) -> None:
    with bf16_units.left_idle():
        bf16_units.exact_matmul(torch.ones(2, 3), torch.ones(2, 3))
    bf16_units.exact_matmul(torch.ones(2, 3), torch.ones(2, 3))
    assert precisions == [precision(), "bf16"]


@needs_bf16
@pytest.mark.parametrize("name", BLOCKS)
def test_while_they_are_idle_blocks_are_multiplied_as_without_them(name: str, alone, monkeypatch) -> None:
    """One product of values: block after block would cost more, and nothing would be had for it."""
    a, b = operands(draw, 40, 24, 300)
    with bf16_units.left_idle():
        idle = KERNELS[name](a, b, product="fprop", out_dtype=torch.float32)
    quick = KERNELS[name](a, b, product="fprop", out_dtype=torch.float32)
    monkeypatch.setitem(bf16_units._AVAILABLE, "cpu", False)
    assert torch.equal(KERNELS[name](a, b, product="fprop", out_dtype=torch.float32), idle)
    assert not torch.equal(quick, idle)


@needs_bf16
def test_a_plan_times_emulation_without_them(alone, precisions) -> None:
    request = GemmRequest(site="a", product="fprop", op="linear", m=4, n=8, k=16, dtype="float32")
    call = emulated.rowwise

    def load(_: int = 0) -> object:
        return call(torch.ones(4, 16), torch.ones(8, 16), product="fprop", out_dtype=torch.float32)

    found = tried({"emulated.linear.rowwise": lambda: load}, request, default_registry(), device_info("cpu"))
    found["emulated.linear.rowwise"](0)
    assert precisions == [precision()] * 2


def waiting(ended: threading.Event) -> None:
    ended.wait()


def with_thread(thread: threading.Thread, ended: threading.Event, ask: Callable[[], bool]) -> bool:
    thread.start()
    try:
        return ask()
    finally:
        ended.set()
        thread.join()


def test_beside_a_thread_that_might_multiply_products_are_computed_as_always(monkeypatch) -> None:
    own = set(threading.enumerate()) - {threading.current_thread()}  # of the test runner
    monkeypatch.setattr(bf16_units, "_compiling", lambda: own)
    assert bf16_units._is_alone()
    ended = threading.Event()
    assert not with_thread(threading.Thread(target=waiting, args=(ended,)), ended, bf16_units._is_alone)
    ended.clear()

    class Monitor(threading.Thread):
        __module__ = "tqdm._monitor"

        def run(self) -> None:
            waiting(ended)

    assert with_thread(Monitor(), ended, bf16_units._is_alone)
    # Off the main thread, that one may multiply.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert not pool.submit(bf16_units._is_alone).result()


def test_the_threads_of_this_project_and_of_the_compiler_do_not_multiply(monkeypatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    from loka.integrations.courier import Courier
    from loka.probes.storing.writer import RunWriter

    for work in (Courier._deliver, RunWriter._work):
        assert bf16_units._module(threading.Thread(target=work)).startswith(bf16_units._QUIET)
    AsyncCompile.pool.cache_clear()
    with monkeypatch.context() as patch, torch._inductor.config.patch(compile_threads=2), AsyncCompile.pool() as pool:
        assert pool.submit(threading.current_thread).result() in bf16_units._compiling()
        patch.setattr(threading, "enumerate", lambda: [threading.current_thread(), *pool._threads])
        assert bf16_units._is_alone()
    AsyncCompile.pool.cache_clear()
    assert not bf16_units._compiling()


def squares() -> TensorDataset:
    return TensorDataset(torch.arange(8.0).square())


def test_the_workers_of_a_data_loader_do_not_multiply_in_this_process(monkeypatch) -> None:
    before = set(threading.enumerate())
    batches = iter(DataLoader(squares(), batch_size=2, num_workers=1))
    next(batches)
    fed = set(threading.enumerate()) - before
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread(), *fed])
    assert fed
    assert bf16_units._is_alone()
    assert len(list(batches)) == 3


# --- graphs ---


@pytest.mark.parametrize("name", [*NAMES, *BLOCKS, "mxfp8"])
@pytest.mark.parametrize("dtype", CODES)
def test_dynamo_traces_it_in_one_graph_for_any_number_of_rows(name: str, dtype: torch.dtype) -> None:
    compiled = torch.compile(KERNELS[name], backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (40, 7):
        a, b = torch.randn(m, 130).to(dtype), torch.randn(48, 130).to(dtype)
        want = KERNELS[name](a, b, product="fprop", out_dtype=dtype)
        got = compiled(a, b, product="fprop", out_dtype=dtype)
        assert torch.equal(got, want)


@needs_bf16
def test_a_compiled_graph_calls_it_and_an_exported_one_has_torchs_own_product() -> None:
    class Product(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return emulated.rowwise(a, b, product="fprop", out_dtype=torch.float32)

    graphs = []
    compiled = torch.compile(Product(), backend=lambda graph, _: graphs.append(str(graph.graph)) or graph)
    inputs = (torch.randn(5, 32), torch.randn(7, 32))
    got = compiled(*inputs)
    exported = torch.export.export(Product(), inputs)
    assert "exact_matmul" in graphs[0]
    assert "exact_matmul" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(*inputs), got, rtol=1e-6, atol=1e-5)


@needs_a_compiler
@pytest.mark.parametrize("name", ["blockwise", "mxfp8"])
def test_inductor_compiles_the_products_of_a_layer_whose_sizes_are_multiples_of_the_groups(name: str) -> None:
    """On these its C++ has failed where a graph has two casts, and something else reads their scales."""

    def products(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        pairs = {"fprop": (x, weight), "dgrad": (grad, weight.t()), "wgrad": (grad.t(), x.t())}
        return tuple(KERNELS[name](*pairs[each], product=each, out_dtype=torch.float32) for each in PASSES)

    torch._dynamo.reset()
    tensors = torch.randn(256, 128), torch.randn(384, 128), torch.randn(256, 384)
    for got, want in zip(torch.compile(products, fullgraph=True)(*tensors), products(*tensors), strict=True):
        assert torch.equal(got, want)
