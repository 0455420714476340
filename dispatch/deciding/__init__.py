"""Deciding: candidates, what they cost and how wrong they are, and the plan that comes out, one for all ranks."""

if __name__ != "loka.dispatch.deciding":
    raise ImportError(
        "this folder is the package loka.dispatch.deciding: write 'import loka.dispatch.deciding' instead of "
        "'import deciding'"
    )
