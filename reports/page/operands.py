"""Where operands lie, for the page: the energy of each by octaves below the largest element of its scaling group.

A large model has thousands of histograms of every operand. They are read as stacked arrays, hundreds of products at a
time; a record that is not like the others is read by itself, and one that is damaged is left out with a warning.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, Pass, Role
from loka.probes.distributions.alike import stacked
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.histograms import BINS, PHASES
from loka.probes.distributions.moments import Arrays
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import STATISTICS, restore
from loka.probes.storing.database import learned_parts
from loka.reports.page.levels import level_texts

logger = logging.getLogger("loka.reports")

# The forward product has both of its operands; the gradient of the result is first seen in dgrad. wgrad has no operand
# of its own.
_SEEN_IN: Final[tuple[Pass, ...]] = ("fprop", "dgrad")
# Records held at a time, some 15 KB each.
_AT_ONCE: Final[int] = 512
_PARTS: Final[tuple[str, str]] = ("a.", "b.")
_SAMPLES: Final[int] = 3  # where `ProductStatistics` has them in its shape
_NAMES: Final[tuple[str, ...]] = (
    "shape",
    *(part + name for part in _PARTS for name in ("counts", "kinds", "energy", "phase")),
)
# (rows, k) of the groups of one operand, 0 is all of them; and the histograms of each, as texts.
_Groups = tuple[Sequence[Sequence[int]], Sequence[str]]


def histograms(engine: Engine, run_id: str, sites: frozenset[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return site -> role -> {"samples", "groups": {words: the energy by octave}}, as `loka.reports.page.levels` says.

    sites: those that are wanted; None is all.
    """
    result: dict[str, dict[str, Any]] = {}
    for part in learned_parts(engine, run_id, kind=STATISTICS, products=_SEEN_IN, size=_AT_ONCE):
        wanted = [record for record in part if sites is None or record.site in sites]
        for record, (samples, operands) in zip(wanted, _read(wanted), strict=True):
            if samples is None:
                continue
            seen = result.setdefault(record.site, {})
            roles: tuple[Role, Role] = PASS_OPERANDS[record.product]
            for role, (kinds, texts) in zip(roles, operands, strict=True):
                if role not in seen and texts:
                    seen[role] = {"samples": samples, "groups": _named(kinds, texts)}
    return result


def _read(records: Sequence[LearnedRecord]) -> list[tuple[int | None, Sequence[_Groups]]]:
    """Return samples and both operands of each record; no samples where it is damaged."""
    result: dict[int, tuple[int | None, Sequence[_Groups]]] = {}
    for places, arrays in stacked([record.data for record in records], _NAMES):
        if not _fit(arrays):
            continue
        sound = np.logical_and(*(_sound(arrays, part) for part in _PARTS)) & (arrays["shape"] >= 0).all(axis=1)
        operands = [_texts(arrays[part + "energy"]) for part in _PARTS]
        kinds = [arrays[part + "kinds"].tolist() for part in _PARTS]
        samples = arrays["shape"][:, _SAMPLES].tolist()
        for at in np.flatnonzero(sound).tolist():
            result[places[at]] = samples[at], [(kinds[part][at], operands[part][at]) for part in range(len(_PARTS))]
    return [result[at] if at in result else _read_alone(record) for at, record in enumerate(records)]


def _fit(arrays: Arrays) -> bool:
    """Whether stacked arrays are of the shapes and kinds that histograms have."""
    shapes: dict[str, tuple[int, ...]] = {"shape": (4,)}
    kinds = {"shape": "iu"}
    for part in _PARTS:
        groups = arrays[part + "kinds"].shape[1] if arrays[part + "kinds"].ndim > 1 else -1
        shapes |= {part + "counts": (3,), part + "kinds": (groups, 2)}
        shapes |= {part + "energy": (groups, BINS), part + "phase": (groups, PHASES)}
        kinds |= {part + "counts": "iu", part + "kinds": "iu", part + "energy": "f", part + "phase": "f"}
    return all(arrays[name].shape[1:] == shapes[name] and arrays[name].dtype.kind in kinds[name] for name in shapes)


def _sound(arrays: Arrays, part: str) -> NDArray[np.bool_]:
    """Return which records hold an operand that `OperandHistograms.from_arrays` would take as well."""
    counts, kinds, energy, phase = (arrays[part + name] for name in ("counts", "kinds", "energy", "phase"))
    groups = kinds.shape[1]
    numbers = [np.isfinite(each).all(axis=(1, 2)) & (each >= 0).all(axis=(1, 2)) for each in (energy, phase)]
    with np.errstate(invalid="ignore", over="ignore"):
        alike = np.isclose(energy.sum(axis=2), phase.sum(axis=2), rtol=1e-6, atol=0).all(axis=1)
    ordered = np.sort(kinds[:, :, 0] * (np.abs(kinds).max(initial=0) + 1) + kinds[:, :, 1], axis=1)
    different = (ordered[:, 1:] != ordered[:, :-1]).all(axis=1)
    used = (counts[:, 0] > 0) == (groups > 0)
    found: NDArray[np.bool_] = (counts >= 0).all(axis=1) & (kinds >= 0).all(axis=(1, 2)) & alike & different & used
    return found & numbers[0] & numbers[1]


def _texts(energy: NDArray[np.float64]) -> list[list[str]]:
    """Return the texts of histograms [records, groups, BINS]."""
    groups = energy.shape[1]
    texts = level_texts(energy.astype(np.float64, copy=False).reshape(-1, BINS))
    return [texts[at : at + groups] for at in range(0, groups * len(energy), groups or 1)] or [[]] * len(energy)


def _read_alone(record: LearnedRecord) -> tuple[int | None, Sequence[_Groups]]:
    try:
        statistics: ProductStatistics = restore(record)
    except ArgumentError as error:
        logger.warning("no histograms of %s %s: %s", record.site, record.product, error)
        return None, ()
    found = []
    for operand in (statistics.a, statistics.b):
        energy = np.array([each.energy for each in operand.by_group.values()]).reshape(-1, BINS)
        found.append(([(rows or 0, k or 0) for rows, k in operand.by_group], level_texts(energy)))
    return statistics.samples, found


def _named(kinds: Sequence[Sequence[int]], texts: Sequence[str]) -> Mapping[str, str]:
    """Return the histograms by their groups in words; groups that come to the same, as all wider than K do, are one."""
    named: dict[str, list[str]] = {}
    for (rows, width), text in zip(kinds, texts, strict=True):
        named.setdefault(text, []).append(_words(rows, width))
    return {", ".join(words): text for text, words in named.items()}


def _words(rows: int, width: int) -> str:
    """Return a kind of group in words: `tensor`, `row`, `128 x 128`."""
    if not rows and not width:
        return "tensor"
    return "row" if (rows, width) == (1, 0) else f"{rows or 'all'} x {width or 'all'}"
