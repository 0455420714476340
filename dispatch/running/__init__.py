"""Running: a model converted in place, and the ops that send each product to its planned kernel."""

if __name__ != "loka.dispatch.running":
    raise ImportError(
        "this folder is the package loka.dispatch.running: write 'import loka.dispatch.running' instead of "
        "'import running'"
    )
