"""Probe: see every matrix product of a running training loop and measure what FP8 would do to it."""

if __name__ != "loka.probes":
    raise ImportError("this folder is the package loka.probes: write 'import loka.probes' instead of 'import probes'")
