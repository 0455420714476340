"""Every exception of LoKA: one base class, so that `except loka.LokaError` catches all of them.

A message is one paragraph of three parts: what was asked, what is possible, what to do next. Wrong arguments are also
`ValueError`, so that code which knows nothing of LoKA handles them as usual.
"""

import difflib
from collections.abc import Iterable


class LokaError(Exception):
    """Base of every exception that LoKA raises on purpose."""


class ArgumentError(LokaError, ValueError):
    """An argument is outside what the function accepts."""


class DatabaseError(LokaError):
    """A probe database cannot be opened, read or written."""


class EvidenceError(LokaError):
    """The evidence asked for does not exist: nothing was captured, or not of this kind."""


class PlanError(LokaError, ValueError):
    """A plan or device profile is malformed, or does not belong to this model, shape, schema or device."""


class KernelError(LokaError):
    """A kernel is unknown, registered twice, unavailable here, or cannot serve the request."""


class ModError(LokaError, ValueError):
    """A model rewrite was refused; the model is as it was."""


class LokaWarning(UserWarning):
    """Something the user should know that does not stop the work."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause naming the known entries closest to `name`, or an empty string when there is none."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f" Nearest: {', '.join(repr(match) for match in close)}." if close else ""
