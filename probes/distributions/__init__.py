"""Learned distributions: what the values of an operand look like, in numbers that ranks and steps can merge."""

if __name__ != "loka.probes.distributions":
    raise ImportError(
        "this folder is the package loka.probes.distributions: write 'import loka.probes.distributions' instead of "
        "'import distributions'"
    )
