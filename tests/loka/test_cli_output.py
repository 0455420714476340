"""What commands write goes where it should, and never in the place of a probe database."""

import io
import os
import sqlite3

import pytest

from loka.cli.shared import write
from loka.document import write_atomically
from loka.errors import PlanError


@pytest.mark.parametrize("writes", [lambda path: write("{}", path), lambda path: write_atomically(path, "{}")])
def test_a_database_is_left_as_it_is(tmp_path, writes):
    path = tmp_path / "run.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table runs (id)")
    before = path.read_bytes()
    with pytest.raises(PlanError, match="is a database"):
        writes(path)
    assert path.read_bytes() == before
    other = tmp_path / "plan.json"
    other.write_text("old")
    writes(other)
    assert other.read_text().strip() == "{}"


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write("{}", path)
    assert os.read(reader, 8) == b"{}"
    os.close(reader)


def test_a_folder_is_named_as_one():
    with pytest.raises(PlanError, match="is a folder"):
        write_atomically(".", "{}")


def test_a_narrow_pipe_gets_the_page_as_it_says_of_itself(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    write("<meta charset=utf-8> ≤ 0.05", None)
    assert raw.getvalue().decode() == "<meta charset=utf-8> ≤ 0.05\n"
