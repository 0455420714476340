"""Processes for tests, forked from one that has done nothing but import: each costs its work, not seconds of imports.

What a process does is a function of a module, as for `multiprocessing`; it begins with the environment of the test.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    [
        "pytest",
        "scipy.stats",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "loka.dispatch.deciding.planner",
        "loka.probes.sampling.session",
    ]
)


def _serve() -> None:
    """Start the process that others are forked from; Triton, which it imports, is to compile and not to interpret."""
    held = os.environ.pop("TRITON_INTERPRET", None)
    try:
        forkserver.ensure_running()
    finally:
        if held is not None:
            os.environ["TRITON_INTERPRET"] = held


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What is left of a process: its exit code, as of `subprocess`, and what its function returned or raised."""

    code: int | None
    result: Any = None
    error: str = ""


class Started:
    """A process that runs `work(*arguments)`, with changes to the environment of the test."""

    def __init__(self, work: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        _serve()
        self._receiving, sending = _FORKED.Pipe(duplex=False)
        given = sending, work, arguments, {**os.environ, **environment}
        self._process = _FORKED.Process(target=_begin, args=given, daemon=True)
        self._process.start()
        sending.close()  # so that nothing more can come once the process has ended

    @property
    def pid(self) -> int | None:
        """The process id."""
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        self._process.kill()

    def end(self, limit_s: float = 120) -> Ended:
        """Wait for the end; a process that takes longer has no exit code."""
        give_up = time.monotonic() + limit_s
        result, error = None, ""
        with suppress(EOFError):  # it was killed
            if self._receiving.poll(limit_s):
                result, error = self._receiving.recv()
        self._process.join(max(0.0, give_up - time.monotonic()))
        return Ended(code=self._process.exitcode, result=result, error=error)


def processes(
    work: Callable[..., Any], each: Iterable[tuple[Any, ...]], *, limit_s: float = 120, **environment: str
) -> list[Ended]:
    """Run `work` in one process for each tuple of arguments, at once; none is left running."""
    started = [Started(work, *arguments, **environment) for arguments in each]
    give_up = time.monotonic() + limit_s
    try:
        return [one.end(max(0.0, give_up - time.monotonic())) for one in started]
    finally:
        for one in started:
            one.kill()


def job(count: int, work: Callable[..., Any], folder: Path, *arguments: Any, limit_s: float = 120) -> list[Ended]:
    """Run `work(folder, rank, group, *arguments)` as a job of `count` processes, which meet over gloo in `folder`."""
    each = [(rank, count, limit_s, work, folder, *arguments) for rank in range(count)]
    return processes(_member, each, limit_s=limit_s, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")


def ranks(count: int, work: Callable[..., Any], folder: Path, *arguments: Any, limit_s: float = 120) -> list[Any]:
    """Return what each rank of such a job returned; all of them have to succeed."""
    ended = job(count, work, folder, *arguments, limit_s=limit_s)
    assert [one.code for one in ended] == [0] * count, "\n".join(one.error for one in ended)
    return [one.result for one in ended]


def _member(rank: int, count: int, limit_s: float, work: Callable[..., Any], folder: Path, *arguments: Any) -> Any:
    """The body of one rank."""
    patience = timedelta(seconds=limit_s / 2)  # whoever waits in vain says so before all are killed
    dist.init_process_group("gloo", f"file://{folder}/store", patience, world_size=count, rank=rank)
    found = work(folder, rank, dist.group.WORLD, *arguments)
    dist.barrier()  # a rank whose peer has left already aborts
    dist.destroy_process_group()
    return found


def _begin(
    sending: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]
) -> None:
    """The body of a process, which ends without taking the interpreter down: threads of torch may abort that."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        sending.send((work(*arguments), ""))
    except Exception:
        sending.send((None, traceback.format_exc()))
        raise
