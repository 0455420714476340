"""LoKA's own kernels: one literal per kernel, one table.

Baselines come first: `torch.mm.*` computes a linear layer's product in one dtype; `torch.native.*` stands for any other
product, which stays as the model wrote it. Then the definition, `emulated`, which runs everywhere; then the libraries.
"""

from typing import Final

from loka.kernel_registry.spec import KernelSpec

KERNELS: Final[tuple[KernelSpec, ...]] = (
    KernelSpec(
        name="torch.mm.fp32",
        op="linear",
        recipe=None,
        implementation="loka.kernel_registry.torch_mm:mm_fp32",
        dtypes=("float32",),
    ),
    KernelSpec(
        name="torch.mm.bf16",
        op="linear",
        recipe=None,
        implementation="loka.kernel_registry.torch_mm:mm_bf16",
        dtypes=("bfloat16",),
    ),
    KernelSpec(
        name="torch.mm.fp16",
        op="linear",
        recipe=None,
        implementation="loka.kernel_registry.torch_mm:mm_fp16",
        dtypes=("float16",),
    ),
    KernelSpec(
        name="torch.native.linear",
        op="linear",
        recipe=None,
        implementation="loka.kernel_registry.torch_mm:native",
        dtypes=(),
    ),
    KernelSpec(
        name="torch.native.bmm",
        op="bmm",
        recipe=None,
        implementation="loka.kernel_registry.torch_mm:native",
        dtypes=(),
    ),
    KernelSpec(
        name="torch.native.grouped_linear",
        op="grouped_linear",
        recipe=None,
        implementation="loka.kernel_registry.torch_mm:native",
        dtypes=(),
    ),
    KernelSpec(
        name="torch.native.convolution",
        op="convolution",
        recipe=None,
        implementation="loka.kernel_registry.torch_mm:native",
        dtypes=(),
    ),
    KernelSpec(
        name="torch.native.other",
        op="other",
        recipe=None,
        implementation="loka.kernel_registry.torch_mm:native",
        dtypes=(),
    ),
    KernelSpec(
        name="emulated.linear.tensorwise",
        op="linear",
        recipe="tensorwise",
        implementation="loka.kernel_registry.emulated:tensorwise",
    ),
    KernelSpec(
        name="emulated.linear.rowwise",
        op="linear",
        recipe="rowwise",
        implementation="loka.kernel_registry.emulated:rowwise",
    ),
    KernelSpec(
        name="emulated.linear.blockwise",
        op="linear",
        recipe="blockwise",
        implementation="loka.kernel_registry.emulated:blockwise",
    ),
    KernelSpec(
        name="emulated.linear.mxfp8",
        op="linear",
        recipe="mxfp8",
        implementation="loka.kernel_registry.emulated:mxfp8",
    ),
    KernelSpec(
        name="emulated.linear.mxfp8_floor",
        op="linear",
        recipe="mxfp8_floor",
        implementation="loka.kernel_registry.emulated:mxfp8_floor",
    ),
    KernelSpec(
        name="torch.scaled_mm.tensorwise",
        op="linear",
        recipe="tensorwise",
        implementation="loka.kernel_registry.torch_scaled_mm:tensorwise",
        min_capability=(8, 9),
        source="FP8 tensor cores: compute capability 8.9, as torch._scaled_mm checks",
    ),
    KernelSpec(
        name="torch.scaled_mm.rowwise",
        op="linear",
        recipe="rowwise",
        implementation="loka.kernel_registry.torch_scaled_mm:rowwise",
        min_capability=(8, 9),
        source="FP8 tensor cores: compute capability 8.9, as torch._scaled_mm checks",
    ),
    KernelSpec(
        name="triton.gemm.tensorwise",
        op="linear",
        recipe="tensorwise",
        implementation="loka.kernel_registry.triton.scaled:tensorwise",
        min_capability=(8, 9),
        module="triton",
        interpreter="TRITON_INTERPRET",
        source="FP8 tensor cores: compute capability 8.9, PTX ISA, mma with e4m3 and e5m2",
    ),
    KernelSpec(
        name="triton.gemm.rowwise",
        op="linear",
        recipe="rowwise",
        implementation="loka.kernel_registry.triton.scaled:rowwise",
        min_capability=(8, 9),
        module="triton",
        interpreter="TRITON_INTERPRET",
        source="FP8 tensor cores: compute capability 8.9, PTX ISA, mma with e4m3 and e5m2",
    ),
    KernelSpec(
        name="triton.gemm.blockwise",
        op="linear",
        recipe="blockwise",
        implementation="loka.kernel_registry.triton.scaled:blockwise",
        min_capability=(8, 9),
        module="triton",
        interpreter="TRITON_INTERPRET",
        source="FP8 tensor cores: compute capability 8.9, PTX ISA, mma with e4m3 and e5m2",
    ),
    KernelSpec(
        name="triton.gemm.mxfp8",
        op="linear",
        recipe="mxfp8",
        implementation="loka.kernel_registry.triton.scaled:mxfp8",
        min_capability=(8, 9),
        module="triton",
        interpreter="TRITON_INTERPRET",
        source="FP8 tensor cores: compute capability 8.9, PTX ISA, mma with e4m3 and e5m2",
    ),
)
