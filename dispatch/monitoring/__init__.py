"""Monitoring: a running plan watched, and products taken back before their error hurts."""

if __name__ != "loka.dispatch.monitoring":
    raise ImportError(
        "this folder is the package loka.dispatch.monitoring: write 'import loka.dispatch.monitoring' instead of "
        "'import monitoring'"
    )
