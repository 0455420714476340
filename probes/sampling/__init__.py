"""Sampling: which steps are looked at, what that may cost, and what is measured of each."""

if __name__ != "loka.probes.sampling":
    raise ImportError(
        "this folder is the package loka.probes.sampling: write 'import loka.probes.sampling' instead of "
        "'import sampling'"
    )
