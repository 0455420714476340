"""Storing: the probe database, its writer and its readers."""

if __name__ != "loka.probes.storing":
    raise ImportError(
        "this folder is the package loka.probes.storing: write 'import loka.probes.storing' instead of 'import storing'"
    )
