"""What every command shares: options, one paragraph for an error, where output goes, a bar while something runs."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from loka.errors import ArgumentError, LokaError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_ERROR: Final[int] = 2  # something went wrong
EXIT_GATE: Final[int] = 1  # --fail-on found what it looks for

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
    return text.replace("[", r"\[")


def write(text: str, output: Path | None) -> None:
    """Write a text to a file, or to the terminal; raise ArgumentError where that fails."""
    if output is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"Cannot write {output}: {error.strerror}. Give --output a file in a writable folder."
        ) from error


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar on stderr while something long runs."""
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, now="")

        def tick(done: int, total: int, now: str) -> None:
            progress.update(task, completed=done, total=total, now=plain(now))

        yield tick
