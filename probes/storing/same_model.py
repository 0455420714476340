"""Whether two runs or plans are of one model, and the words in which two of different models are refused."""

from collections.abc import Mapping
from typing import Final

from loka.errors import EvidenceError

Fingerprint = Mapping[str, tuple[int, ...]]

_SHOWN: Final[int] = 3


def model_differences(first: Fingerprint, second: Fingerprint) -> tuple[str, ...]:
    """Return one clause per parameter that the two have not in common, or in another shape; empty for one model."""
    names = dict.fromkeys((*first, *second))
    return tuple(
        f"{name} is {list(first[name])} in the first and {list(second[name])} in the second"
        if name in first and name in second
        else f"{name} is only in the {'first' if name in first else 'second'}"
        for name in names
        if name not in first or name not in second or tuple(first[name]) != tuple(second[name])
    )


def check_same_model(first: Fingerprint, second: Fingerprint, *, instead: str) -> None:
    """Raise EvidenceError, naming up to three differences and what to do `instead`, for two different models."""
    differences = model_differences(first, second)
    if differences:
        more = len(differences) - _SHOWN
        shown = "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise EvidenceError(f"These are of two different models: {shown}. Evidence holds for one model only. {instead}")
