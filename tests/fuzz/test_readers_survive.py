"""Spoiled files are refused with a LokaError or read: some of each kind here, 10,000 in `python -m benchmarks.fuzz`."""

import logging
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from loka.errors import LokaError
from tests.fuzz import campaign, mutations
from tests.fuzz.campaign import LIMIT_S, attempt, file_of, prepare, run, time_limit
from tests.fuzz.readers import READERS, Reader

FILES = {"database, values": 40, "database, bytes": 25}
# Files that a reader once did not survive.
FOUND = {"routing trace": (625, 7984), "routing cut off": (342,)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_spoiled_file_is_refused_in_words_or_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    reader = READERS[name]
    originals, path, known = prepare(reader, tmp_path)
    found, slowest_s = Counter(), 0.0
    for number in (*range(FILES.get(name, 200)), *FOUND.get(name, ())):
        data = file_of(reader, originals, number)
        began = time.process_time()
        with time_limit():
            found[attempt(reader, data, path, known)] += 1
        slowest_s = max(slowest_s, time.process_time() - began)
    assert found["refused"] > 0  # what is spoiled is noticed,
    assert found["same"] + found["other"] > 0  # and not everything is refused
    assert slowest_s < LIMIT_S


def test_the_same_number_makes_the_same_file(tmp_path):
    reader = READERS["routing trace"]
    originals, *_ = prepare(reader, tmp_path)
    first = [file_of(reader, originals, number) for number in range(40)]
    assert [file_of(reader, originals, number) for number in range(40)] == first
    assert len(set(first)) > 30


def broken(path: Path) -> str:
    """A reader with every fault there is, by the first byte of the file."""
    match path.read_bytes():
        case b"":
            return "a"
        case b"\x01":
            raise KeyError("a defect")
        case b"\x02":
            while True:
                pass
        case b"\x03":
            return str(len(bytes(64 * 2**30)))
        case b"\x04":
            os._exit(3)
        case b"\x05":
            raise LokaError("no")
        case b"\x06":
            raise LokaError("")
        case _:
            return "other"


def test_every_fault_of_a_reader_is_seen_and_none_ends_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "LIMIT_S", 0.2)
    monkeypatch.setattr(campaign, "file_of", lambda reader, originals, number: bytes([number]) if number else b"")
    reader = Reader(name="broken", file="x", originals=lambda _: (b"",), mutations=mutations.BYTES, read=broken)
    outcome = run(reader, tmp_path, range(8))
    assert outcome.counts == {"same": 1, "failed": 5, "refused": 1, "other": 1}
    for number, word in ((1, "KeyError"), (2, "TooLongError"), (3, "MemoryError"), (4, "ended with 3"), (6, "word")):
        assert any(word in failure and f" {number}:" in failure for failure in outcome.failures), word
