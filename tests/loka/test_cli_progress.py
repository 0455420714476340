"""What a command shows while it runs long, on a terminal and elsewhere; and that its output stays its own."""

import io
import os
import pty
import re
import subprocess
import sys
import textwrap
import time

import pytest

from loka.cli import shared

SCRIPT = textwrap.dedent(
    """
    import time
    from loka.cli import shared
    shared._QUIET_S = 0.2
    with shared.progress("measuring [kernels]") as tick:
        for done in range(12):
            tick(done, 12, f"[kernel {done}] fprop")
            time.sleep(0.1)
    print('{"json": 1}')
    """
)


def test_a_terminal_shows_what_is_done_and_the_time_left():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-c", SCRIPT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            if not (more := os.read(ours, 4096)):
                break
        except OSError:  # the other end is closed
            break
        shown += more
    out, _ = process.communicate()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert out == '{"json": 1}\n'
    assert "measuring [kernels]" in text
    assert re.search(r"0:00:0\d left", text)
    assert re.search(r"\[kernel 1?\d\] fprop", text)
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80


def test_elsewhere_nothing_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(shared, "_QUIET_S", 0.01)
    with shared.progress("measuring") as tick:
        for done in range(3):
            tick(done, 3, "a kernel")
            time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_what_is_over_soon_shows_nothing_and_an_error_passes(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="no luck"), shared.progress("reading") as tick:
        tick(1, 2, "here")
        raise RuntimeError("no luck")
    assert time.monotonic() - started < shared._QUIET_S
    assert sys.stderr.getvalue() == ""
