"""Expert placement: which device holds which expert, and which device serves which request, from a routing trace."""

if __name__ != "loka.dispatch.placement":
    raise ImportError(
        "this folder is the package loka.dispatch.placement: write 'import loka.dispatch.placement' instead of "
        "'import placement'"
    )
