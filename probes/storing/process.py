"""Whether the process that writes a run still lives, so that a killed run is not shown as running for ever."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """The process that writes a run. `start` tells it from a later process of the same id; "" where unknown."""

    host: str
    pid: int
    start: str


def this_process() -> Process:
    """Return the identity of the calling process."""
    return Process(host=socket.gethostname(), pid=os.getpid(), start=_start_of(os.getpid()))


def _start_of(pid: int) -> str:
    """Return `boot pid-namespace ticks` of a live process (Linux); "" where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "ended" if state in "ZX" else f"{boot} {os.readlink('/proc/self/ns/pid')} {fields[18]}"
    except (OSError, ValueError, IndexError):
        return ""


def is_gone(process: Process) -> bool:
    """Return whether a process is known to have ended; False when it lives, or cannot be seen from here."""
    if process.host != socket.gethostname() or os.name != "posix" or process.pid <= 0:
        return False
    here, there = _start_of(os.getpid()).split(), process.start.split()
    if len(here) == len(there) == 3:
        if here[0] != there[0]:
            return True  # the machine was started again
        if here[1] != there[1]:
            return False  # another container
        now = _start_of(process.pid)
        if now:
            return now != process.start
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
