"""Freezing: weights stored in FP8 once, for inference."""

if __name__ != "loka.dispatch.freezing":
    raise ImportError(
        "this folder is the package loka.dispatch.freezing: write 'import loka.dispatch.freezing' instead of "
        "'import freezing'"
    )
