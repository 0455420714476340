"""Tables that lose no figure on a narrow terminal: names fold onto a second line, everything else keeps its width."""

from typing import Final

from rich.table import Table
from rich.text import Text

# A name is not folded into less than this.
_LEAST: Final[int] = 12


def keep_figures(table: Table, *names: str) -> Table:
    """Let only these columns of a finished table give way, by default the first; return the table.

    Rich would otherwise cut the figures of every column alike, and end them in an ellipsis.
    """
    for index, column in enumerate(table.columns):
        header = column.header if isinstance(column.header, str) else ""
        natural = max(_width(cell) for cell in (column.header, *column.cells))
        if header in names or (not names and index == 0):
            column.no_wrap, column.overflow, column.min_width = False, "fold", min(natural, _LEAST)
        else:
            column.no_wrap, column.min_width = True, natural
    return table


def _width(cell: object) -> int:
    text = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
    return max((len(line) for line in text.plain.splitlines()), default=0)
