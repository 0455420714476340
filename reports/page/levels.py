"""Where the energy of operands lies, as the page holds it: of every octave two levels in whole decibels, as a text.

Most of the data of a page are these levels. Neighbours differ by a few decibels, so a text holds the differences, one
character for each bin: it deflates to three bits a level. `levels_of` reads it back, as the page's script does.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loka.probes.distributions.histograms import AMAX_BIN, BELOW, BINS_PER_OCTAVE, OCTAVES

# Bins of a page's histogram in an octave; a database has eight.
BINS_OF_AN_OCTAVE: Final[int] = 2
# Below this a share is no more to be seen.
FLOOR_DB: Final[float] = -120.0
# The character of an empty bin, and that of a level that is the level before; the first is told against 0 dB.
_EMPTY: Final[str] = " "
_SAME: Final[int] = 75
# A rise so steep that it would have a character below this has one that is so much further up.
_FIRST: Final[int] = 33
_STEEP: Final[int] = 512


def level_texts(energy: NDArray[np.float64]) -> list[str]:
    """Return the levels of histograms [n, BINS] as a text each: the largest elements, octaves downwards, the rest.

    Empty bins at the end are left out.
    """
    octaves = energy[:, AMAX_BIN + 1 : BELOW].reshape(
        len(energy), OCTAVES * BINS_OF_AN_OCTAVE, BINS_PER_OCTAVE // BINS_OF_AN_OCTAVE
    )
    shares = np.concatenate([energy[:, [AMAX_BIN]], octaves.sum(axis=2), energy[:, [BELOW]]], axis=1)
    total = energy.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        levels = 10.0 * np.log10(shares / np.where(total > 0, total, 1.0))
    known = levels > FLOOR_DB
    bins = np.arange(known.shape[1])
    # Of an empty bin, the level of the last one that is not.
    last = np.maximum.accumulate(np.where(known, bins, -1), axis=1)
    whole = np.where(known, np.rint(np.where(known, levels, 0.0)), 0.0)
    held = np.where(last >= 0, np.take_along_axis(whole, np.maximum(last, 0), axis=1), 0.0)
    before = np.concatenate([np.zeros((len(held), 1)), held[:, :-1]], axis=1)
    codes = _SAME + before - held
    codes = np.where(known, np.where(codes < _FIRST, codes + _STEEP, codes), ord(_EMPTY)).astype("<u2")
    length = np.where(known.any(axis=1), last[:, -1] + 1, 0).tolist()
    width = codes.shape[1]
    text = codes.tobytes().decode("utf-16-le")
    return [text[at * width : at * width + count] for at, count in enumerate(length)]


def levels_of(text: str) -> Sequence[int | None]:
    """Return the levels in a text, None where a bin is empty."""
    result: list[int | None] = []
    level = 0
    for character in text:
        code = ord(character)
        level += 0 if character == _EMPTY else _SAME - (code - _STEEP if code > _STEEP // 2 else code)
        result.append(None if character == _EMPTY else level)
    return result
