"""What every command shares: options, one paragraph for an error, where output goes, a bar while something runs."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from loka.document import refuse_database
from loka.errors import ArgumentError, LokaError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_ERROR: Final[int] = 2  # something went wrong
EXIT_GATE: Final[int] = 1  # --fail-on found what it looks for

# What is over sooner needs no bar.
_QUIET_S: Final[float] = 1.0

debugging: Final[dict[str, bool]] = {"on": False}


class ReportFormat(StrEnum):
    """What `loka report` can write."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"
    HTML = "html"


class TableFormat(StrEnum):
    """What the listing commands can write."""

    TABLE = "table"
    JSON = "json"


class FailOn(StrEnum):
    """What makes `loka report` fail."""

    UNSAFE = "unsafe"
    UNDECIDED = "undecided"


Database = Annotated[str, typer.Argument(metavar="DB", help="Probe database: a path or a database URL.")]
RunOption = Annotated[str | None, typer.Option("--run", help="Run id or its beginning; the newest by default.")]
BoundOption = Annotated[
    str,
    typer.Option(
        "--bound",
        help="row_error=0.05 (or 0.05) or sqnr_db=30 for each product, or loss=2e-4, a share of the loss for all fprop "
        "products.",
    ),
]
BoundForOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bound-for",
        metavar="PATTERN=BOUND",
        help="A bound of their own for some sites, e.g. 'head*=row_error=0.01' or 're:.*experts.*=sqnr_db=35'; may be "
        "repeated, the first that matches counts.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Device, e.g. cpu or cuda:0; CUDA where there is one.")
]
ProfileOption = Annotated[
    Path | None, typer.Option("--device-profile", help="Take times from this JSON profile instead of this machine.")
]
AssumeOption = Annotated[
    float | None,
    typer.Option("--assume-speedup", help="Count every emulated kernel as so many times faster than its baseline."),
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of to the terminal.")]


def told(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a LokaError into one paragraph and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except LokaError as error:
            if debugging["on"]:
                raise
            Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {plain(str(error))}", soft_wrap=True)
            raise typer.Exit(EXIT_ERROR) from error

    return run


def plain(text: str) -> str:
    """Return text that Rich prints as it is."""
    return escape(text)


def write(text: str, output: Path | None) -> None:
    """Write a text to a file, or to the terminal; raise ArgumentError where that fails."""
    if output is None:
        ended = text if text.endswith("\n") else text + "\n"
        try:
            sys.stdout.write(ended)
        except UnicodeEncodeError:  # a pipe whose encoding is narrower than what a page says of itself
            sys.stdout.buffer.write(ended.encode())
        return
    if not output.is_dir():
        refuse_database(output)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"Cannot write {output}: {error.strerror}. Give --output a file in a writable folder."
        ) from error


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show on stderr how far something is, and how long it will go on, once it has taken a second.

    Nothing is shown where stderr is no terminal. What is yielded is called with (done, total, what is done now), or
    not at all where that is not known.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn(what, markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[now]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None, now="", left="")

    def tick(done: int, total: int, now: str) -> None:
        bar.update(task, completed=done, total=total, now=now)
        left = bar.tasks[task].time_remaining
        bar.update(task, left="" if left is None else f"{timedelta(seconds=round(left))} left")

    begins = threading.Timer(_QUIET_S, bar.start)
    begins.daemon = True
    begins.start()
    try:
        yield tick
    finally:
        begins.cancel()
        begins.join()
        bar.stop()
