"""`loka report --watch`: look, show, wait, until the run is over or Ctrl-C is pressed."""

import time
from typing import TYPE_CHECKING, Final

import typer
from rich.console import Console
from rich.live import Live

from loka.errors import ArgumentError

if TYPE_CHECKING:
    from loka.bounds import Bound
    from loka.reports.live import Follower

INTERVAL_S: Final[float] = 2.0
_SHORTEST_S: Final[float] = 0.1


def checked_interval(interval: float | None) -> float:
    """Return the seconds between two looks; raise ArgumentError for none, or too few."""
    seconds = INTERVAL_S if interval is None else interval
    if not seconds >= _SHORTEST_S:
        raise ArgumentError(
            f"--interval {seconds:g}: the seconds between two looks, {_SHORTEST_S:g} at least, e.g. --interval 5."
        )
    return seconds


def watch(db: str, bound: "Bound", run: str | None, interval_s: float) -> None:
    """Show a run as it goes, on standard output; return when it has ended, or when it is interrupted."""
    from loka.reports.live import Follower

    follower = Follower(db, bound, run)
    console = Console(highlight=False)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            _on_screen(follower, console, db, interval_s)
        else:
            _in_lines(follower, interval_s)
    except KeyboardInterrupt:
        return  # how one leaves
    finally:
        follower.close()


def _on_screen(follower: "Follower", console: Console, db: str, interval_s: float) -> None:
    from loka.reports.live_view import Screen

    screen = Screen(db)
    with Live(screen, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            look = follower.look()
            screen.show(look)
            live.refresh()
            if look.over:
                return
            time.sleep(interval_s)


def _in_lines(follower: "Follower", interval_s: float) -> None:
    from loka.reports.live_view import Lines

    lines = Lines()
    while True:
        look = follower.look()
        for line in lines.of(look):
            typer.echo(line)
        if look.over:
            return
        time.sleep(interval_s)
