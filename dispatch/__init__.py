"""Dispatch: from evidence to a plan, and from a plan to a model that runs it."""

if __name__ != "loka.dispatch":
    raise ImportError(
        "this folder is the package loka.dispatch: write 'import loka.dispatch' instead of 'import dispatch'"
    )
