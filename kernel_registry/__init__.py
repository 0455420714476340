"""Kernels: rows in one table, a registry, one adapter file per library."""

if __name__ != "loka.kernel_registry":
    raise ImportError(
        "this folder is the package loka.kernel_registry: write 'import loka.kernel_registry', "
        "not 'import kernel_registry'"
    )
