"""Capturing: every matrix product of a step, which site and pass it belongs to, and what it reads."""

if __name__ != "loka.probes.capturing":
    raise ImportError(
        "this folder is the package loka.probes.capturing: write 'import loka.probes.capturing' instead of "
        "'import capturing'"
    )
