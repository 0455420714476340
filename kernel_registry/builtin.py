"""LoKA's own kernels in one table, a line per kernel.

Baselines come first: `torch.mm.*` computes a linear layer's product in one dtype; `torch.native.*` stands for any other
product, which stays as the model wrote it. Then the definition, `emulated`, which runs everywhere; then the libraries.
"""

from typing import Final

from loka.kernel_registry.spec import KernelSpec, Op

_HERE: Final[str] = "loka.kernel_registry"


def _baseline(name: str, op: Op, function: str, dtypes: tuple[str, ...] = ()) -> KernelSpec:
    return KernelSpec(
        name=f"torch.{name}", op=op, recipe=None, implementation=f"{_HERE}.torch_mm:{function}", dtypes=dtypes
    )


def _emulated(op: Op, recipe: str) -> KernelSpec:
    return KernelSpec(name=f"emulated.{op}.{recipe}", op=op, recipe=recipe, implementation=f"{_HERE}.emulated:{recipe}")


def _scaled_mm(recipe: str) -> KernelSpec:
    return KernelSpec(
        name=f"torch.scaled_mm.{recipe}",
        op="linear",
        recipe=recipe,
        implementation=f"{_HERE}.torch_scaled_mm:{recipe}",
        min_capability=(8, 9),
        source="FP8 tensor cores: compute capability 8.9, as torch._scaled_mm checks",
    )


def _triton(kernel: str, op: Op, recipe: str, function: str) -> KernelSpec:
    return KernelSpec(
        name=f"triton.{kernel}.{recipe}",
        op=op,
        recipe=recipe,
        implementation=f"{_HERE}.triton.{function}",
        min_capability=(8, 9),
        module="triton",
        interpreter="TRITON_INTERPRET",
        source="FP8 tensor cores: compute capability 8.9, PTX ISA, mma with e4m3 and e5m2",
    )


KERNELS: Final[tuple[KernelSpec, ...]] = (
    _baseline("mm.fp32", "linear", "mm_fp32", ("float32",)),
    _baseline("mm.bf16", "linear", "mm_bf16", ("bfloat16",)),
    _baseline("mm.fp16", "linear", "mm_fp16", ("float16",)),
    _baseline("native.linear", "linear", "native"),
    _baseline("native.bmm", "bmm", "native"),
    _baseline("native.grouped_linear", "grouped_linear", "native"),
    _baseline("native.convolution", "convolution", "native"),
    _baseline("native.other", "other", "native"),
    _emulated("linear", "tensorwise"),
    _emulated("linear", "rowwise"),
    _emulated("linear", "blockwise"),
    _emulated("linear", "mxfp8"),
    _emulated("linear", "mxfp8_floor"),
    _scaled_mm("tensorwise"),
    _scaled_mm("rowwise"),
    _triton("gemm", "linear", "tensorwise", "scaled:tensorwise"),
    _triton("gemm", "linear", "rowwise", "scaled:rowwise"),
    _triton("gemm", "linear", "blockwise", "scaled:blockwise"),
    _triton("gemm", "linear", "mxfp8", "scaled:mxfp8"),
)
