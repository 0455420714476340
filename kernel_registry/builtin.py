"""LoKA's own kernels in one table, a line per kernel.

Baselines come first: `torch.mm.*` computes a linear layer's product in one dtype; `torch.native.*` stands for any other
product, which stays as the model wrote it. Then the definition, `emulated`, which runs everywhere; then the libraries.
"""

from dataclasses import replace
from typing import Any, Final

from loka.formats import PASSES, Pass
from loka.hardware import BLACKWELL_CAPABILITY, FP8_CAPABILITY, HOPPER_CAPABILITY
from loka.kernel_registry.spec import ANYWHERE, KernelSpec, Op
from loka.torch_release import ROW_SCALES_ON_CPU

_HERE: Final[str] = "loka.kernel_registry"
_FPROP: Final[tuple[Pass, ...]] = ("fprop",)


def _baseline(name: str, op: Op, function: str, dtypes: tuple[str, ...] = ()) -> KernelSpec:
    return KernelSpec(
        name=f"torch.{name}",
        op=op,
        recipe=None,
        implementation=f"{_HERE}.torch_mm:{function}",
        dtypes=dtypes,
        device_types=ANYWHERE,
    )


def _emulated(op: Op, recipe: str) -> KernelSpec:
    function = f"{_HERE}.emulated:{recipe}"
    return KernelSpec(
        name=f"emulated.{op}.{recipe}",
        op=op,
        recipe=recipe,
        implementation=function,
        prepared=f"{function}_halves" if op == "linear" else "",
        device_types=ANYWHERE,
    )


def _baseline_of(module: str, name: str, op: Op, dtypes: tuple[str, ...] = ()) -> KernelSpec:
    """Return the baseline of an op that has a module of its own; the function is the last part of its name."""
    return KernelSpec(
        name=f"torch.{name}",
        op=op,
        recipe=None,
        implementation=f"{_HERE}.{module}:{name.rpartition('.')[2] if dtypes else 'native'}",
        passes=("fprop",) if op == "linear_norm_act" else PASSES,
        dtypes=dtypes,
        device_types=ANYWHERE,
        # Below 9.0, and on a CPU, torch multiplies expert by expert, which waits for the routing.
        traceable=op != "grouped_linear",
    )


def _defined(module: str, op: Op, recipe: str) -> KernelSpec:
    """Return the definition of an op that has a module of its own."""
    return KernelSpec(
        name=f"emulated.{op}.{recipe}",
        op=op,
        recipe=recipe,
        implementation=f"{_HERE}.{module}:{recipe}",
        fused=f"{_HERE}.{module}:{recipe}_layer" if op == "linear_norm_act" else "",
        stored=f"{_HERE}.{module}:{recipe}_stored" if op == "grouped_linear" else "",
        passes=("fprop",) if op == "linear_norm_act" else PASSES,
        device_types=ANYWHERE,
        traceable=op != "grouped_linear",  # it reads the offsets
    )


def _scaled_mm(recipe: str, **facts: Any) -> KernelSpec:
    shared: dict[str, Any] = {
        "min_capability": FP8_CAPABILITY,
        "pads_to": 16,
        "source": "torch 2.13, aten/src/ATen/native/cuda/ScaledBlas.cpp and torch/_meta_registrations.py",
    }
    return KernelSpec(
        name=f"torch.scaled_mm.{recipe}",
        op="linear",
        recipe=recipe,
        implementation=f"{_HERE}.torch_scaled_mm:{recipe}",
        prepared=f"{_HERE}.torch_scaled_mm:{recipe}_halves",
        **{**shared, **facts},
    )


def _library(module: str, recipe: str, **facts: Any) -> KernelSpec:
    """Return the row of another library's product; what is stated here is explained in the adapter's first lines."""
    return KernelSpec(
        name=f"{module}.linear.{recipe}",
        op="linear",
        recipe=recipe,
        implementation=f"{_HERE}.{module}:{recipe}",
        prepared=f"{_HERE}.{module}:{recipe}_halves",
        **facts,
    )


def _triton(kernel: str, op: Op, recipe: str, function: str) -> KernelSpec:
    return KernelSpec(
        name=f"triton.{kernel}.{recipe}",
        op=op,
        recipe=recipe,
        implementation=f"{_HERE}.triton.{function}",
        prepared=f"{_HERE}.triton.{function}_halves" if op == "linear" else "",
        stored=f"{_HERE}.triton.{function}_stored" if op == "grouped_linear" else "",
        min_capability=FP8_CAPABILITY,
        module="triton",
        interpreter="TRITON_INTERPRET",
        source="FP8 tensor cores: compute capability 8.9, PTX ISA, mma with e4m3 and e5m2",
    )


def _fused(recipe: str | None) -> KernelSpec:
    """Return our row of a linear layer with norm and activation; without a recipe, in the dtype of its operands."""
    apart = _triton("linear_norm_act", "linear_norm_act", "rowwise", f"norm_act:{recipe or 'native'}")
    return replace(
        apart,
        name=f"triton.linear_norm_act.{recipe}" if recipe is not None else "triton.native.linear_norm_act",
        recipe=recipe,
        passes=_FPROP,
        fused=f"{apart.implementation}_layer",
    )


def _layer(apart: KernelSpec, library: str) -> KernelSpec:
    """Return the row of a linear layer's three products with shared casts; apart they are those of another row."""
    return replace(
        apart,
        name=f"{library}.linear_layer.{apart.recipe}",
        op="linear_layer",
        layer=f"{_HERE}.layers:{library}_{apart.recipe}",
    )


KERNELS: Final[tuple[KernelSpec, ...]] = (
    _baseline("mm.fp32", "linear", "mm_fp32", ("float32",)),
    _baseline("mm.bf16", "linear", "mm_bf16", ("bfloat16",)),
    _baseline("mm.fp16", "linear", "mm_fp16", ("float16",)),
    _baseline("native.linear", "linear", "native"),
    _baseline("native.bmm", "bmm", "native"),
    _baseline("native.many_linear", "many_linear", "one_by_one"),
    _baseline_of("torch_grouped", "grouped_mm.fp32", "grouped_linear", ("float32",)),
    _baseline_of("torch_grouped", "grouped_mm.bf16", "grouped_linear", ("bfloat16",)),
    _baseline_of("torch_grouped", "grouped_mm.fp16", "grouped_linear", ("float16",)),
    _baseline_of("grouped", "native.grouped_linear", "grouped_linear"),
    _baseline_of("norm_act", "native.linear_norm_act", "linear_norm_act"),
    _baseline("native.convolution", "convolution", "native"),
    _baseline("native.other", "other", "native"),
    _emulated("linear", "tensorwise"),
    _emulated("linear", "rowwise"),
    _emulated("linear", "blockwise"),
    _emulated("linear", "blockwise_pow2"),
    _emulated("linear", "mxfp8"),
    _emulated("linear", "mxfp8_floor"),
    _emulated("bmm", "tensorwise"),
    _emulated("bmm", "rowwise"),
    _emulated("bmm", "blockwise"),
    _emulated("bmm", "mxfp8"),
    _emulated("many_linear", "rowwise"),
    _emulated("many_linear", "blockwise"),
    _defined("grouped", "grouped_linear", "tensorwise"),
    _defined("grouped", "grouped_linear", "rowwise"),
    _defined("grouped", "grouped_linear", "blockwise"),
    _defined("grouped", "grouped_linear", "blockwise_pow2"),
    _defined("grouped", "grouped_linear", "mxfp8"),
    _defined("norm_act", "linear_norm_act", "tensorwise"),
    _defined("norm_act", "linear_norm_act", "rowwise"),
    _defined("norm_act", "linear_norm_act", "blockwise"),
    _scaled_mm("tensorwise", layout="a row-major, b column-major"),
    _scaled_mm("rowwise", layout="a row-major, b column-major; bf16 output on CUDA"),
    _scaled_mm(
        "blockwise",
        device_types=("cuda",),
        min_capability=HOPPER_CAPABILITY,
        below_capability=BLACKWELL_CAPABILITY,
        pads_to=128,
        layout="a row-major, b column-major; scales along k column-major, those of 128x128 blocks along k by fours",
        requires=f"{_HERE}.torch_scaled_mm:lacks_block_scaling",
        traceable=False,  # Inductor's lowering drops the types of scales and guesses them from shapes
    ),
    _scaled_mm(
        "mxfp8",
        device_types=("cuda",),
        min_capability=BLACKWELL_CAPABILITY,
        pads_to=32,
        layout="a row-major, b column-major; scales E8M0 in tiles of 128 x 4",
        requires=f"{_HERE}.torch_scaled_mm:lacks_mx_scaling",
        traceable=False,  # Inductor's lowering knows no swizzled scales
    ),
    *(
        _library(
            "torchao",
            recipe,
            min_capability=FP8_CAPABILITY,
            min_torch_on_cpu=since,
            pads_to=16,
            layout=f"a row-major, b column-major{note}",
            requires=f"{_HERE}.torchao:missing",
            source="torchao 0.18, torchao/float8/inference.py, which calls torch._scaled_mm",
        )
        for recipe, note, since in (
            ("tensorwise", "", None),
            ("rowwise", "; bf16 output on CUDA", ROW_SCALES_ON_CPU),
        )
    ),
    _library(
        "torchao",
        "blockwise",
        device_types=("cuda",),
        min_capability=HOPPER_CAPABILITY,
        pads_to=128,
        layout="a row-major, b column-major; scales along k column-major, in memory for whole tiles of 256",
        requires=f"{_HERE}.torchao:lacks_blockwise",
        traceable=False,
        source="torchao 0.18, torchao/prototype/blockwise_fp8_training/kernels.py",
    ),
    *(
        _library(
            "fbgemm",
            recipe,
            passes=passes,
            device_types=("cuda",),
            min_capability=HOPPER_CAPABILITY,
            pads_to=16,
            layout="both row-major; bf16 output",
            requires=f"{_HERE}.fbgemm:missing",
            traceable=False,
            source="MSLK csrc/gemm/gemm_ops.cpp and bench/gemm/gemm_ops.py; CUTLASS kernels for sm_90a and sm_100a",
        )
        for recipe, passes in (("tensorwise", _FPROP), ("rowwise", PASSES))
    ),
    _library(
        "fbgemm",
        "blockwise",
        passes=("fprop", "dgrad"),
        device_types=("cuda",),
        min_capability=HOPPER_CAPABILITY,
        below_capability=BLACKWELL_CAPABILITY,
        pads_to=128,
        layout="both row-major; scales [k / 128, rows] and [k / 128, n / 128]; bf16 output",
        requires=f"{_HERE}.fbgemm:missing",
        traceable=False,
        source="MSLK csrc/gemm/cutlass/f8f8bf16_groupwise.cu and bench/gemm/gemm_ops.py, which lists SM90 alone",
    ),
    _library(
        "deepgemm",
        "blockwise",
        device_types=("cuda",),
        min_capability=HOPPER_CAPABILITY,
        below_capability=BLACKWELL_CAPABILITY,
        pads_to=128,
        layout="both row-major; scales along k TMA-aligned, of weights [n / 128, k / 128]; bf16 output, of wgrad fp32",
        requires=f"{_HERE}.deepgemm:missing",
        traceable=False,
        source="DeepGEMM csrc/apis/gemm.hpp, csrc/apis/layout.hpp and csrc/jit_kernels/impls/sm90_fp8_gemm_1d*d.hpp",
    ),
    _library(
        "transformer_engine",
        "tensorwise",
        device_types=("cuda",),
        min_capability=FP8_CAPABILITY,
        pads_to=16,
        layout="both row-major, as uint8 in a Float8Tensor",
        requires=f"{_HERE}.transformer_engine:missing",
        traceable=False,
        source="Transformer Engine transformer_engine/pytorch/cpp_extensions/gemm.py and tensor/float8_tensor.py",
    ),
    _triton("gemm", "linear", "tensorwise", "scaled:tensorwise"),
    _triton("gemm", "linear", "rowwise", "scaled:rowwise"),
    _triton("gemm", "linear", "blockwise", "scaled:blockwise"),
    _triton("gemm", "linear", "mxfp8", "scaled:mxfp8"),
    _layer(_emulated("linear", "tensorwise"), "emulated"),
    _layer(_emulated("linear", "blockwise"), "emulated"),
    _layer(_scaled_mm("tensorwise", layout="a row-major, b column-major"), "torch"),
    _layer(_triton("gemm", "linear", "tensorwise", "scaled:tensorwise"), "triton"),
    _layer(_triton("gemm", "linear", "rowwise", "scaled:rowwise"), "triton"),
    _layer(_triton("gemm", "linear", "blockwise", "scaled:blockwise"), "triton"),
    _layer(_triton("gemm", "linear", "mxfp8", "scaled:mxfp8"), "triton"),
    _triton("small", "bmm", "rowwise", "small:rowwise"),
    _triton("small", "bmm", "blockwise", "small:blockwise"),
    _triton("many_linear", "many_linear", "rowwise", "many_linear:rowwise"),
    _triton("many_linear", "many_linear", "blockwise", "many_linear:blockwise"),
    _triton("grouped", "grouped_linear", "rowwise", "grouped_linear:rowwise"),
    _triton("grouped", "grouped_linear", "blockwise", "grouped_linear:blockwise"),
    _fused(None),
    _fused("tensorwise"),
    _fused("rowwise"),
    _fused("blockwise"),
    KernelSpec(
        name="torch.scaled_grouped_mm.rowwise",
        op="grouped_linear",
        recipe="rowwise",
        implementation=f"{_HERE}.torch_grouped:rowwise",
        stored=f"{_HERE}.torch_grouped:rowwise_stored",
        device_types=("cuda",),
        min_capability=HOPPER_CAPABILITY,
        below_capability=BLACKWELL_CAPABILITY,
        pads_to=16,
        layout="a row-major, b column-major, strides of 16 bytes; scales [rows], of a weight gradient [experts * rows]",
        source="torch 2.13, aten/src/ATen/native/cuda/GroupedBlas.cpp and torch/_meta_registrations.py",
    ),
    KernelSpec(
        name="deepgemm.grouped.blockwise",
        op="grouped_linear",
        recipe="blockwise",
        implementation=f"{_HERE}.deepgemm_grouped:blockwise",
        stored=f"{_HERE}.deepgemm_grouped:blockwise_stored",
        passes=("fprop", "dgrad"),
        device_types=("cuda",),
        min_capability=HOPPER_CAPABILITY,
        below_capability=BLACKWELL_CAPABILITY,
        pads_to=128,
        layout="every expert begins at a whole tile of rows; scales fp32, along k for rows, per 128x128 for weights",
        requires=f"{_HERE}.deepgemm:missing",
        traceable=False,
        source="deepseek-ai/DeepGEMM, csrc/apis/gemm.hpp and tests/generators.py",
    ),
)
