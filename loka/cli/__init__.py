"""The command line: parse arguments, call one function per command, print. No logic of its own.

A `LokaError` becomes one paragraph on stderr and exit code 2; a traceback appears only with `--debug`.
"""

import atexit
import gc
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from loka.cli.advising import advise
from loka.cli.deciding import demo, plan
from loka.cli.kernels import bench, env, kernels
from loka.cli.moe import app as moe
from loka.cli.reading import diff, explain, report
from loka.cli.shared import debugging
from loka.version import VERSION

__all__ = ["app", "main"]

app: Final = typer.Typer(
    name="loka",
    help="FP8 where it usually fails: which GEMMs of your model are safe, which are faster, which kernel should run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What these say when torchao is imported on a machine without its CUDA parts, `loka kernels` says in its own words.
_TALKATIVE: Final[tuple[str, ...]] = ("torchao", "torch.utils._pytree")

# In the order in which `loka --help` lists them.
_COMMANDS: Final[tuple[Callable[..., Any], ...]] = (demo, report, bench, plan, explain, advise, diff, kernels, env)


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logging.")] = False,
) -> None:
    if version:
        typer.echo(f"loka {VERSION}")
        raise typer.Exit()
    debugging["on"] = debug
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s")
    if debug:
        logging.getLogger("loka").setLevel(logging.DEBUG)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.NOTSET if debug else logging.ERROR)


for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(moe)


def main() -> None:
    """Run the command line."""
    atexit.register(_hold_back_the_collector)
    app()


def _hold_back_the_collector() -> None:
    """Spare the process a last walk over all that was made and imported, which takes half a second of a report.

    Triton counts on it: it says that it leaks what nobody has collected.
    """
    if "triton" not in sys.modules:
        gc.freeze()
