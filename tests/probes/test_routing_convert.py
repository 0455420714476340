"""Token-level traces of other programs, in every form, against counts made one by one; and what is refused."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.errors import ArgumentError
from loka.probes.routing.convert import convert

RECORDS = [
    {"request": "a", "phase": "prefill", "layer": 7, "expert": 0, "domain": "code", "token": 0},
    {"request": "a", "phase": "prefill", "layer": 3, "experts": [1, 2], "token": 0},
    {"request": "a", "phase": "decode", "layer": 3, "experts": [2, 1], "token": 1},
    {"request": "a", "phase": "decode", "layer": 7, "expert": 2, "token": 1},
    {"request": 5, "phase": 0, "layer": 3, "expert": 1, "domain": "chat", "token": 0},
    {"request": 5, "phase": 1, "layer": 3, "expert": 4, "token": 9, "something": "else"},
]


def write_json(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")


def write_json_lines(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")


def write_csv(path, records):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(
            file, ["token", "request", "phase", "layer", "experts", "domain"], extrasaction="ignore"
        )
        writer.writeheader()
        for record in records:
            experts = record.get("experts", [record.get("expert")])
            writer.writerow({**record, "experts": ";".join(map(str, experts))})


WRITERS = {".json": write_json, ".jsonl": write_json_lines, ".ndjson": write_json_lines, ".csv": write_csv}


def counted(records, experts):
    """Counts one by one."""
    names = list(dict.fromkeys(str(record["request"]) for record in records))
    layers = sorted({record["layer"] for record in records})
    counts = np.zeros((len(names), 2, len(layers), experts), int)
    for record in records:
        for expert in record.get("experts", [record.get("expert")]):
            phase = {"prefill": 0, "decode": 1}.get(record["phase"], record["phase"])
            counts[names.index(str(record["request"])), phase, layers.index(record["layer"]), expert] += 1
    return counts


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_form_gives_the_same_trace(tmp_path, suffix):
    path = tmp_path / f"tokens{suffix}"
    WRITERS[suffix](path, RECORDS)
    found = convert(path)
    assert np.array_equal(found.counts, counted(RECORDS, 5))
    assert (found.domain, found.layers) == (("code", "chat"), (3, 7))
    assert found.decode_steps.tolist() == [1, 1]
    assert convert(path, experts=16).experts == 16


records_of = st.lists(
    st.fixed_dictionaries(
        {
            "request": st.integers(0, 3),
            "phase": st.sampled_from(["prefill", "decode"]),
            "layer": st.integers(0, 40),
            "experts": st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True),
        }
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=30)
@given(records_of, st.sampled_from(sorted(WRITERS)))
def test_any_records_count_as_one_by_one(tmp_path_factory, records, suffix):
    path = tmp_path_factory.mktemp("convert") / f"t{suffix}"
    WRITERS[suffix](path, records)
    found = convert(path, experts=7)
    assert np.array_equal(found.counts, counted(records, 7))
    assert found.domains == ("unknown",)
    decoded = any(record["phase"] == "decode" for record in records)
    assert (found.decode_steps is None) == decoded  # without tokens, steps are only known where there are none


def test_an_object_may_hold_the_records(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"model": "x", "records": RECORDS}))
    assert np.array_equal(convert(tmp_path / "t.json").counts, counted(RECORDS, 5))


@pytest.mark.parametrize("experts", ["1 3", "1;3", "1,3", "[1, 3]", " 1 ; 3 "])
def test_several_experts_in_a_csv_field(tmp_path, experts):
    (tmp_path / "t.csv").write_text(f'request,phase,layer,expert\na,decode,0,"{experts}"\n')
    assert convert(tmp_path / "t.csv").counts[0, 1, 0].tolist() == [0, 1, 0, 1]


def changed(**change):
    record = {**RECORDS[1], **change}
    return [RECORDS[0], {key: value for key, value in record.items() if value != "gone"}]


# what is wrong -> words of the message
WRONG = {
    "no request": (changed(request="gone"), "request is missing"),
    "request list": (changed(request=[1]), "must be a text or an integer"),
    "request truth": (changed(request=True), "must be a text or an integer"),
    "phase": (changed(phase="prefil"), "phase is 'prefil'"),
    "phase number": (changed(phase=2), "phase is 2"),
    "phase truth": (changed(phase=True), "phase is True"),
    "layer": (changed(layer=-1), "layer is -1"),
    "layer float": (changed(layer=1.0), r"layer is 1\.0"),
    "layer huge": (changed(layer=10**30), "layer is 1000"),
    "expert": (changed(experts=[1, -2]), "expert is -2"),
    "expert text": (changed(experts=["x"]), "expert is 'x'"),
    "expert truth": (changed(experts=[True]), "expert is True"),
    "expert huge": (changed(experts=[2**15]), "from 0 to 32,767"),
    "expert twice": (changed(experts=[1, 1]), "names one twice"),
    "no expert": (changed(experts=[]), "experts is empty"),
    "expert gone": (changed(experts="gone"), "expert is missing"),
    "domain": (changed(domain="chat"), "is of domain 'chat' here and 'code' before"),
    "domain number": (changed(domain=3), "domain is 3"),
    "domain escape": (changed(request="b", domain="\x1b[2J"), "not a printable text"),
    "token": (changed(phase="decode", token="x"), "token is 'x'"),
    "nothing": ([], "no record in it"),
    "no object": ([1], "record 1 is no object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record_is_refused_with_its_place(tmp_path, name):
    records, words = WRONG[name]
    write_json(tmp_path / "t.json", records)
    with pytest.raises(ArgumentError, match=words) as raised:
        convert(tmp_path / "t.json")
    assert str(tmp_path / "t.json") in str(raised.value)
    if name not in ("nothing", "no object", "domain escape"):
        assert "record 2" in str(raised.value)


# file name -> (content, words)
BROKEN = {
    "t.json": (b'{"a": 1}', "not a list of records"),
    "u.json": (b"[{", "is not JSON"),
    "deep.json": (b"[" * 100_000, "is not JSON"),
    "t.jsonl": (b'{"request": 1}\n\n[', "line 1: phase is missing"),
    "u.jsonl": (b"nonsense\n", "line 1 is not JSON"),
    "long.jsonl": (b" " * (2**20 + 2), "longer than"),
    "bytes.jsonl": (b"\xff\xfe", "must be text in UTF-8"),
    "t.csv": (b"request,phase,expert\n", "no column layer"),
    "u.csv": (b"request,phase,layer\n", "no column expert"),
    "none.csv": (b"", "names none"),
    "short.csv": (b"request,phase,layer,expert\na,0,1\n", "line 2 does not have 4 fields"),
    "wide.csv": (b"request,phase,layer,expert\na,0,1,2,3\n", "line 2 does not have 4 fields"),
    "twice.csv": (b"request,phase,layer,expert,layer\n", "names a column twice"),
    "quote.csv": (b'request,phase,layer,expert\n"a"b,0,1,2\n', "cannot be read"),
    "t.txt": (b"", "ends in .txt"),
    "t": (b"", "ends in nothing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(tmp_path, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=words):
        convert(tmp_path / name)


def test_sizes_are_checked_before_anything_is_allocated(tmp_path, monkeypatch):
    rows = [{"request": at, "phase": 0, "layer": at, "expert": 32767} for at in range(300)]
    write_json(tmp_path / "t.json", rows)
    with pytest.raises(ArgumentError, match=r"300 x 2 x 300 x 32768 take 23,592,960,000 bytes"):
        convert(tmp_path / "t.json")
    monkeypatch.setattr("loka.probes.routing.convert._MOST_JSON", 10)
    with pytest.raises(ArgumentError, match="JSON Lines"):
        convert(tmp_path / "t.json")


def test_too_few_experts_and_files_that_are_not_there_are_refused(tmp_path):
    write_json(tmp_path / "t.json", RECORDS)
    with pytest.raises(ArgumentError, match="expert 4 is used, so there are more than 4"):
        convert(tmp_path / "t.json", experts=4)
    with pytest.raises(ArgumentError, match="cannot have 0 experts"):
        convert(tmp_path / "t.json", experts=0)
    with pytest.raises(ArgumentError, match="Cannot read"):
        convert(tmp_path / "u.json")
