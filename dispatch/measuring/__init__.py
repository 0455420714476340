"""Measuring: how long each kernel takes on this device, and whether it computes what it should."""

if __name__ != "loka.dispatch.measuring":
    raise ImportError(
        "this folder is the package loka.dispatch.measuring: write 'import loka.dispatch.measuring' instead of "
        "'import measuring'"
    )
