"""LoKA's own Triton kernels. One convention for operands: codes and scales as `loka.quantize.quantize` lays them out.

    data    [m, k] row-major, FP8
    scale   [m / group_rows, k / group_k] row-major, fp32, powers of two too; a ragged end is a group

A product is out[m, n] = sum_k a[m, k] * b[n, k], so both operands are quantised along their rows, and the second copy
that a backward pass needs is the transpose, quantised along its own rows: `quantize.quantize_both` writes both at once.

Importing a module of this package imports triton, and it needs a CUDA device, or TRITON_INTERPRET=1 set before triton
is imported; importing the package alone needs neither.
"""

if __name__ != "loka.kernel_registry.triton":
    raise ImportError(
        "this folder is the package loka.kernel_registry.triton: write 'import loka.kernel_registry.triton', "
        "not 'import kernel_registry.triton'"
    )
