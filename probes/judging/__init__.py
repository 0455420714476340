"""Judging: from samples to intervals and verdicts, and how errors drift."""

if __name__ != "loka.probes.judging":
    raise ImportError(
        "this folder is the package loka.probes.judging: write 'import loka.probes.judging' instead of 'import judging'"
    )
