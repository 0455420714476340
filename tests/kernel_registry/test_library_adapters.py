"""Adapters of libraries that need a GPU, up to the call: padding, codes and scales as the library reads them.

The libraries are models of what their sources say (made_libraries.py); the operands that reach them, and what is made
of their results, are the adapters' own. On a GPU, test_kernel_contract.py has the libraries themselves.
"""

import functools
import importlib
import importlib.util
import re

import numpy as np
import pytest
import torch

from loka.errors import KernelError
from loka.formats import PASS_OPERANDS, PASSES, RECIPES
from loka.hardware import DeviceInfo
from loka.kernel_registry import deepgemm, fbgemm, operands, torch_scaled_mm, torchao, transformer_engine
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.emulated import emulate
from tests.cases import ALL_SHAPES, EMPTY_SHAPES, LAYOUTS, VALUES, heavy_tailed, normal
from tests.cases import operands as drawn
from tests.kernel_registry import made_libraries as made
from tests.kernel_registry.made_devices import interprets_triton
from tests.kernel_registry.made_gemm import accumulation_bound, modelled

HOPPER = DeviceInfo(type="cuda", name="H200", capability=(9, 0))


def use_torch(monkeypatch):
    monkeypatch.setattr(torch_scaled_mm, "scaled_mm", made.cuda_scaled_mm)
    monkeypatch.setattr(torch_scaled_mm, "_PRIVATE", ())
    monkeypatch.setitem(torch_scaled_mm.ALIGNMENT, "cpu", 16)


def use_torchao(monkeypatch):
    kernels = made.BlockwiseKernels()
    names = {name: getattr(kernels, name) for name in dir(kernels) if name.startswith("triton_")}
    module = type("kernels", (), names)
    made.install(
        monkeypatch,
        {
            "torchao": {},
            "torchao.prototype": {},
            "torchao.prototype.blockwise_fp8_training": {"kernels": module},
        },
    )


def use_fbgemm(monkeypatch):
    monkeypatch.setattr(fbgemm, "operators", made.GenAIOperators)


def use_deepgemm(monkeypatch):
    made.install(monkeypatch, {"deep_gemm": {"fp8_gemm_nt": made.fp8_gemm_nt}})


def use_transformer_engine(monkeypatch):
    made.install(monkeypatch, made.transformer_engine(made.general_gemm))


def use_older_transformer_engine(monkeypatch):
    made.install(monkeypatch, made.transformer_engine(made.general_gemm_with_workspace))


# name -> (the kernel, the model of its library, passes, its results are bf16)
ADAPTERS = {
    "torch.tensorwise": (torch_scaled_mm.tensorwise, use_torch, PASSES, False),
    "torch.rowwise": (torch_scaled_mm.rowwise, use_torch, PASSES, False),
    "torch.blockwise": (torch_scaled_mm.blockwise, use_torch, PASSES, False),
    "torch.mxfp8": (torch_scaled_mm.mxfp8, use_torch, PASSES, False),
    "torchao.blockwise": (torchao.blockwise, use_torchao, PASSES, False),
    "fbgemm.tensorwise": (fbgemm.tensorwise, use_fbgemm, ("fprop",), True),
    "fbgemm.rowwise": (fbgemm.rowwise, use_fbgemm, PASSES, True),
    "fbgemm.blockwise": (fbgemm.blockwise, use_fbgemm, ("fprop", "dgrad"), True),
    "deepgemm.blockwise": (deepgemm.blockwise, use_deepgemm, PASSES, True),
    "transformer_engine.tensorwise": (transformer_engine.tensorwise, use_transformer_engine, PASSES, False),
    "older_transformer_engine.tensorwise": (
        transformer_engine.tensorwise,
        use_older_transformer_engine,
        PASSES,
        False,
    ),
}
of_adapters = pytest.mark.parametrize("name", ADAPTERS)


def assert_modelled(name, a, b, product, out_dtype=torch.float32):
    kernel, _, _, is_bf16 = ADAPTERS[name]
    recipe = name.rpartition(".")[2]
    model_a, model_b = (
        modelled(x.numpy(), recipe, role) for x, role in zip((a, b), PASS_OPERANDS[product], strict=True)
    )
    got = kernel(a, b, product=product, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    assert tuple(got.shape) == (a.shape[0], b.shape[0])
    rounded = torch.bfloat16 if is_bf16 else out_dtype
    error = np.abs(got.double().numpy() - model_a @ model_b.T)
    assert (error <= accumulation_bound(model_a, model_b, a.shape[1], rounded)).all(), (name, product, tuple(a.shape))


@of_adapters
def test_operands_reach_the_library_as_it_reads_them(name, monkeypatch):
    ADAPTERS[name][1](monkeypatch)
    for product in ADAPTERS[name][2]:
        for shape in ALL_SHAPES:
            a, b = drawn(heavy_tailed, *shape)
            assert_modelled(name, a, b, product)
            assert_modelled(name, a, b, product, torch.bfloat16)


@of_adapters
def test_values_and_layouts_of_every_kind_do_too(name, monkeypatch):
    ADAPTERS[name][1](monkeypatch)
    product = ADAPTERS[name][2][-1]
    for draw in ("with_zero_rows", "correlated_rows", "all_zero", "both_large"):
        assert_modelled(name, *drawn(VALUES[draw], 9, 140, 150), product)
    for layout in LAYOUTS.values():
        a, b = drawn(normal, 17, 140, 150)
        assert_modelled(name, layout(a), layout(b), product)


@of_adapters
def test_operands_that_are_there_as_codes_give_the_same(name, monkeypatch):
    kernel, use, passes, _ = ADAPTERS[name]
    use(monkeypatch)
    halves, recipe = vars(importlib.import_module(kernel.__module__))[f"{kernel.__name__}_halves"], kernel.__name__
    for product in passes:
        for shape in ((9, 140, 150), (1, 13, 20), (0, 13, 20)):
            a, b = drawn(heavy_tailed, *shape)
            how = {"product": product, "out_dtype": torch.bfloat16}
            wanted = kernel(a, b, **how)
            specs = [RECIPES[recipe].operand(role) for role in PASS_OPERANDS[product]]
            left, right = map(operands.quantize_operand, (a, b), specs)
            there = halves.lay_out(right.data, right.scale, **how)
            assert torch.equal(halves.multiply(a, there, **how), wanted)
            assert torch.equal(halves.multiply(a, halves.prepare(b, **how), **how), wanted)
            assert torch.equal(halves.multiply_codes(left, there, **how), wanted)


@of_adapters
def test_an_empty_product_does_not_reach_the_library(name):
    for m, n, k in EMPTY_SHAPES.values():
        got = ADAPTERS[name][0](*drawn(normal, m, n, k), product="fprop", out_dtype=torch.bfloat16)
        assert torch.equal(got, torch.zeros((m, n), dtype=torch.bfloat16))


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in ("torch.tensorwise", "torch.rowwise")])
def test_a_compiled_model_calls_an_opaque_kernel_as_one_operator(name, monkeypatch):
    ADAPTERS[name][1](monkeypatch)
    kernel = ADAPTERS[name][0]

    def model(a, b):
        return kernel(a * 2, b, product="fprop", out_dtype=torch.float32).relu()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (20, 7):
        a, b = drawn(normal, m, 24, 40)
        torch.testing.assert_close(compiled(a, b), model(a, b))


# --- what is missing ---


def test_fbgemm_without_its_genai_kernels_says_so(monkeypatch, tmp_path):
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location(
        "fbgemm_gpu",
        tmp_path / "fbgemm_gpu" / "__init__.py",
        submodule_search_locations=[str(tmp_path / "fbgemm_gpu")],
    )
    monkeypatch.setattr(importlib.util, "find_spec", {"fbgemm_gpu": spec}.get)
    assert re.match("fbgemm_gpu is installed without its GenAI kernels: pip install", fbgemm.missing())
    with pytest.raises(KernelError, match="without its GenAI kernels"):
        fbgemm.operators()
    (tmp_path / "fbgemm_gpu" / "experimental" / "gen_ai").mkdir(parents=True)
    assert fbgemm.missing() is None


@pytest.mark.parametrize(
    ("missing", "package"),
    [
        (fbgemm.missing, "fbgemm-gpu-genai"),
        (deepgemm.missing, "deep_gemm"),
        (torchao.missing, "torchao"),
        (torchao.lacks_blockwise, "torchao"),
        (transformer_engine.missing, "transformer-engine"),
    ],
)
def test_an_absent_library_is_named_with_what_to_install(missing, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert package in missing()
    assert "install" in missing()


def test_transformer_engine_without_its_pytorch_part_says_so(monkeypatch):
    found = {"transformer_engine": object()}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    assert "without its PyTorch part" in transformer_engine.missing()
    found["transformer_engine_torch"] = object()
    assert transformer_engine.missing() is None


@pytest.mark.parametrize(("version", "is_missing"), [("0.17.0", True), ("0.18.0", False), ("1.0.0.dev2", False)])
def test_blockwise_kernels_of_an_older_torchao_are_not_called(version, is_missing, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torchao.metadata, "version", lambda name: version)
    assert bool(torchao.lacks_blockwise()) == is_missing


@pytest.mark.parametrize(
    ("cuda", "lacks_blocks", "lacks_mx"),
    [(None, True, True), ("12.6", True, True), ("12.8", True, False), ("12.9", False, False), ("13.0", False, False)],
)
def test_block_scales_wait_for_the_cuda_that_has_them(cuda, lacks_blocks, lacks_mx, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert bool(torch_scaled_mm.lacks_block_scaling()) == lacks_blocks
    assert bool(torch_scaled_mm.lacks_mx_scaling()) == lacks_mx


@pytest.mark.parametrize("attributes", [None, {}], ids=["absent", "first_version"])
def test_a_deepgemm_that_cannot_be_called_says_why(attributes, monkeypatch):
    if attributes is not None:
        made.install(monkeypatch, {"deep_gemm": attributes})
    a, b = drawn(normal, 4, 16, 16)
    with pytest.raises(KernelError, match=r"DeepGEMM's product cannot be called: .*Error.*install it from"):
        deepgemm.blockwise(a, b, product="fprop", out_dtype=torch.float32)


def test_every_row_of_a_library_has_an_adapter_under_test_here():
    rows = {f"{spec.library}.{spec.recipe}" for spec in KERNELS if spec.op == "linear" and spec.recipe is not None}
    here = set(ADAPTERS) | {"torchao.tensorwise", "torchao.rowwise"}  # these run on a CPU, under the contract
    assert {row for row in rows if row.split(".")[0] not in ("emulated", "triton")} <= here


# --- operands ---


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("role", ["input", "weight", "grad_output"])
def test_padding_appends_zero_codes_and_unit_scales_and_keeps_the_rest(recipe, role):
    spec = RECIPES[recipe].operand(role)
    x, _ = drawn(heavy_tailed, 133, 1, 70)
    plain = operands.quantize_operand(x, spec)
    padded = operands.pad(plain, rows=16, k=128)
    assert tuple(padded.data.shape) == (144, 128)
    assert padded.data.is_contiguous()
    codes = padded.data.float()
    assert torch.equal(codes[:133, :70], plain.data.float())
    assert not codes[133:].any()
    assert not codes[:, 70:].any()
    rows, depth = plain.scale.shape
    assert torch.equal(padded.scale[:rows, :depth], plain.scale)
    groups = [cover(144, spec.group_rows), cover(128, spec.group_k)]
    assert list(padded.scale.shape) == groups
    assert bool((padded.scale[rows:] == 1).all())
    assert bool((padded.scale[:, depth:] == 1).all())


def cover(extent, group):
    return -(-extent // group) if group else 1


def test_padding_to_what_is_already_met_copies_nothing():
    x = operands.quantize_operand(torch.randn(32, 64), RECIPES["rowwise"].operand("input"))
    padded = operands.pad(x, rows=16, k=16)
    assert padded.data.data_ptr() == x.data.data_ptr()
    assert padded.scale.data_ptr() == x.scale.data_ptr()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 2), (129, 7)])
def test_columns_of_scales_start_at_multiples(shape):
    scale = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    for rows in (1, 4, 256):
        got = operands.column_major(scale, rows=rows)
        stride = -(-shape[0] // rows) * rows
        assert torch.equal(got, scale)
        assert got.stride(0) == 1
        raw = made.memory(got)
        for i in range(shape[0]):
            for j in range(shape[1]):
                assert raw[j * stride + i] == scale[i, j]


@pytest.mark.parametrize("shape", [(1, 1), (31, 3), (128, 4), (129, 5), (300, 11)])
def test_swizzled_scales_are_where_a_tensor_core_looks_for_them(shape):
    x = torch.exp2(torch.randint(-120, 120, shape).float())
    raw = operands.swizzled(operands.exponents(x)).numpy()
    rows, groups = -(-shape[0] // 128) * 128, -(-shape[1] // 4) * 4
    want = np.zeros(rows * groups, dtype=np.uint8)
    for i in range(shape[0]):
        for j in range(shape[1]):
            tile = (i // 128) * (groups // 4) + j // 4
            want[tile * 512 + (i % 32) * 16 + (i % 128 // 32) * 4 + j % 4] = int(np.log2(x[i, j].item())) + 127
    assert np.array_equal(raw, want)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_dynamic_extent_is_padded_without_a_guard(recipe):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    spec = RECIPES[recipe].operand("input")

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def padded(x):
        return operands.pad(operands.quantize_operand(x, spec), k=16)

    for k in (40, 48, 130, 256):
        x = torch.randn(9, k)
        got, want = padded(x), operands.quantize_operand(x, spec)
        assert got.data.shape[1] % 16 == 0
        assert torch.equal(got.data[:, :k].float(), want.data.float())
        assert torch.equal(got.scale[:, : want.scale.shape[1]], want.scale)
    assert len(graphs) == 1


def test_a_kernel_of_another_recipe_would_not_pass_for_this_one(monkeypatch):
    """The model of torch's product tells the recipes apart, so the tests above can fail."""
    use_torch(monkeypatch)
    a, b = drawn(heavy_tailed, 17, 140, 150)
    got = torch_scaled_mm.rowwise(a, b, product="fprop", out_dtype=torch.float32)
    other = emulate(RECIPES["blockwise"], a, b, product="fprop", out_dtype=torch.float32)
    assert not torch.allclose(got, other, rtol=1e-3)


# --- torchao's own Triton kernels, interpreted ---


class Untuned:
    """A kernel of torchao with one of the tiles that its tuner tries: there is nothing to time without a GPU."""

    def __init__(self, tuner, tile):
        self.kernel, self.tile = tuner.fn, tile

    def __getitem__(self, grid):
        tiles = {"BLOCK_SIZE_M": self.tile, "BLOCK_SIZE_N": self.tile}
        return functools.partial(self.kernel[grid(tiles)], **tiles)


@pytest.mark.third_party("torchao", "triton")
@pytest.mark.parametrize("tile", [64, 256])
@pytest.mark.parametrize("product", PASSES)
def test_torchao_multiplies_blocks_as_the_recipe_defines(product, tile, monkeypatch):
    if not interprets_triton():
        pytest.skip("needs Triton's interpreter")
    kernels = importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")
    for name in ("triton_fp8_gemm_1x128_128x128_kernel", "triton_fp8_gemm_1x128_128x1_kernel"):
        monkeypatch.setattr(kernels, name, Untuned(getattr(kernels, name), tile))
    monkeypatch.setattr(kernels, "wrap_triton", lambda kernel: kernel)
    for shape in ((17, 13, 13), (1, 140, 429), (130, 131, 257)):
        assert_modelled("torchao.blockwise", *drawn(heavy_tailed, *shape), product)
