"""The model as a picture: its sites in the order in which they ran, as wide as their work, coloured by verdict.

A line holds the sites of one block (`layers.3`: a name up to its first number); lines share one scale, so their lengths
compare. A tile has a band for each pass. Shares of work differ by orders of magnitude: a tile is never too thin to be
seen, and a line of many sites is cut rather than squeezed.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from loka.formats import PASSES
from loka.reports.html import fragment
from loka.reports.words import Report, Row, percent, site_name

HEIGHT: Final[int] = 26
_GAP: Final[int] = 1
# Of the widest line, in percent.
_THINNEST: Final[float] = 0.4
_MOST_LINES: Final[int] = 48
_MOST_TILES: Final[int] = 100


def model_map(report: Report) -> dict[str, Any]:
    """Return the lines of the map, and the passes that are the bands of a tile.

        {"height", "passes", "lines": [{"label", "share", "tiles": [{"fragment", "words", "x", "width", "bands"}]}]}

    Places across are in percent of the picture, those of `bands` (verdict, y, height) in pixels.
    """
    passes = [name for name in PASSES if any(row["pass"] == name for row in report["sites"])]
    sites: dict[str, list[Row]] = {}
    for row in report["sites"]:
        sites.setdefault(row["site"], []).append(row)
    lines = _lines(sites)
    scale = max((_share(rows) for _, members in lines for _, rows in members), default=0.0)
    widest = max((math.fsum(_share(rows) for _, rows in members) for _, members in lines), default=0.0) or scale or 1.0
    return {
        "height": HEIGHT,
        "passes": passes,
        "lines": [
            {
                "label": label,
                "share": percent(math.fsum(_share(rows) for _, rows in members)),
                "tiles": _tiles(members, passes, widest),
            }
            for label, members in lines
        ],
    }


_Site = tuple[str, list[Row]]


def _lines(sites: dict[str, list[Row]]) -> list[tuple[str, list[_Site]]]:
    """Return the lines of the map: a block each, several where there are many; a long block takes several lines."""
    blocks: dict[str, list[_Site]] = {}
    for site, rows in sites.items():
        blocks.setdefault(_block(site_name(rows[0])), []).append((site, rows))
    together = math.ceil(len(blocks) / _MOST_LINES) if blocks else 1
    names = list(blocks)
    lines = []
    for begin in range(0, len(names), together):
        some = names[begin : begin + together]
        label = some[0] if len(some) == 1 else f"{some[0]} to {_last(some[0], some[-1])}"
        members = [member for name in some for member in blocks[name]]
        parts = [members[at : at + _MOST_TILES] for at in range(0, len(members), _MOST_TILES)]
        for index, part in enumerate(parts, start=1):
            lines.append((label if len(parts) == 1 else f"{label} ({index}/{len(parts)})", part))
    return lines


def _block(site: str) -> str:
    parts = site.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: at + 1])


def _last(first: str, last: str) -> str:
    """Return the last name of a range, as its number alone where that is all it differs by."""
    (head, _, _), (again, _, number) = first.rpartition("."), last.rpartition(".")
    return number if head and head == again else last


def _share(rows: Iterable[Row]) -> float:
    return math.fsum(row["flop_share"] or 0.0 for row in rows)


def _tiles(members: Sequence[_Site], passes: Sequence[str], widest: float) -> list[dict[str, Any]]:
    widths = [max(100.0 * _share(rows) / widest, _THINNEST) for _, rows in members]
    scale = min(1.0, 100.0 / math.fsum(widths))
    tiles, x = [], 0.0
    for (site, rows), width in zip(members, widths, strict=True):
        tiles.append(
            {
                "fragment": fragment(site),
                "words": _words(rows),
                "x": round(x, 3),
                "width": round(width * scale, 3),
                "bands": _bands(rows, passes),
            }
        )
        x += width * scale
    return tiles


def _bands(rows: Sequence[Row], passes: Sequence[str]) -> list[tuple[str, float, float]]:
    """Return (verdict, y, height) of the passes of a site, neighbours of one verdict as one band."""
    height = (HEIGHT + _GAP) / len(passes)
    bands: list[tuple[str, float, float]] = []
    for row in sorted(rows, key=lambda row: passes.index(row["pass"])):
        top = passes.index(row["pass"]) * height
        if bands and bands[-1][0] == row["verdict"] and math.isclose(sum(bands[-1][1:]) + _GAP, top):
            bands[-1] = (row["verdict"], bands[-1][1], bands[-1][2] + height)
        else:
            bands.append((row["verdict"], top, height - _GAP))
    return [(verdict, round(y, 2), round(h, 2)) for verdict, y, h in bands]


def _words(rows: Sequence[Row]) -> str:
    verdicts = ", ".join(f"{row['pass']} {row['verdict']}" for row in rows)
    return f"{site_name(rows[0])}: {verdicts}; {percent(_share(rows))} of FLOPs"
