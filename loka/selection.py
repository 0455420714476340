"""Patterns over names: the one way in which a user names parts of a model.

    mlp.0               exactly this name
    *lm_head*           a glob: `*` crosses dots, `?` is one character, `[ab]` one of a set
    re:layers\\.[02].*   a regular expression that must match the whole name

A pattern that matches nothing is almost always a typing error, so `select` refuses it and names the nearest names.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Final

from loka.errors import ArgumentError, nearest

_REGEX: Final[str] = "re:"


class Selection:
    """An ordered set of patterns. The first one that matches a name wins; one string stands for one pattern."""

    __slots__ = ("_compiled", "patterns")

    def __init__(self, patterns: str | Iterable[str]) -> None:
        self.patterns: tuple[str, ...] = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self._compiled = tuple(_compile(pattern) for pattern in self.patterns)

    def match(self, fqn: str) -> str | None:
        """Return the first pattern that matches this very name, None where none does."""
        return next(iter(self._hits((fqn,))), None)

    def covers(self, fqn: str) -> str | None:
        """Return the first pattern that matches the name or one of the containers it lies in."""
        return next(iter(self._hits(_lineage(fqn))), None)

    def _hits(self, names: Sequence[str]) -> Iterable[str]:
        for pattern, regex in zip(self.patterns, self._compiled, strict=True):
            if any(name == pattern or regex.fullmatch(name) for name in names):
                yield pattern

    def __repr__(self) -> str:
        return f"Selection({list(self.patterns)})"


def select(
    patterns: str | Iterable[str],
    names: Iterable[str],
    *,
    what: str = "module",
    inside: bool = False,
    allow_unmatched: bool = False,
) -> tuple[str, ...]:
    """Return the names that some pattern matches, in the order of `names`; no pattern selects nothing.

    `inside`: a pattern that names a container also selects what lies inside it. `what` is the word for a name in
    messages. Raises ArgumentError for each pattern that matches nothing, unless `allow_unmatched`.
    """
    selection = Selection(patterns)
    known = tuple(names)
    lineages = [_lineage(name) if inside else (name,) for name in known]
    hits = [set(selection._hits(lineage)) for lineage in lineages]
    idle = [pattern for pattern in selection.patterns if not any(pattern in hit for hit in hits)]
    if idle and not allow_unmatched:
        raise ArgumentError(_unmatched(idle, known, what))
    return tuple(name for name, hit in zip(known, hits, strict=True) if hit)


def _compile(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str) or pattern in ("", _REGEX):
        raise ArgumentError(f"{pattern!r} is not a pattern. Write a name, a glob like '*head*', or 're:' and a regex.")
    if not pattern.startswith(_REGEX):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern.removeprefix(_REGEX))
    except re.error as error:
        raise ArgumentError(
            f"{pattern!r} is not a valid regular expression: {error}. Correct it, or write a glob like '*head*'."
        ) from error


def _lineage(fqn: str) -> tuple[str, ...]:
    """Return the name and every container above it, e.g. a.b.c, a.b, a."""
    parts = fqn.split(".")
    return tuple(".".join(parts[:depth]) for depth in range(len(parts), 0, -1))


def _unmatched(idle: Sequence[str], known: Sequence[str], what: str) -> str:
    hints = []
    parts = dict.fromkeys(part for name in known for part in name.split("."))
    for pattern in idle:
        core = pattern.removeprefix(_REGEX).strip("*?.^$")
        # A short typing error in a long name is far from the whole name but near to one of its parts.
        hints.append(f"Pattern {pattern!r} matches no {what}.{nearest(core, known) or nearest(core, parts)}")
    if not known:
        hints.append(f"There is no {what} to choose from.")
    elif not any("Nearest" in hint for hint in hints):
        shown = ", ".join(repr(name) for name in known[:5])
        hints.append(f"There are {len(known)} to choose from, first {shown}.")
    return " ".join(hints)
