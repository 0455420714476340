"""The routing trace: what fits together, what its file keeps, and how files that are wrong or hostile are refused."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.errors import ArgumentError
from loka.probes.routing.trace import RoutingTrace
from tests.probes.made_routing import made_trace

COUNTS = np.ones((2, 2, 3, 4), np.uint16)
PARTS = {"counts": COUNTS, "domain": np.array(["a", "b"]), "layers": np.arange(3)}


@st.composite
def traces(draw):
    requests, layers, experts = (draw(st.integers(1, most)) for most in (4, 3, 5))
    largest = draw(st.sampled_from([1, 2**16 - 1, 2**16, 2**32 - 1]))
    cells = st.lists(st.integers(0, largest), min_size=requests * 2 * layers * experts)
    size = requests * 2 * layers * experts
    counts = np.array(draw(cells.map(lambda values: values[:size])), np.int64).reshape(requests, 2, layers, experts)
    texts = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=12)
    return RoutingTrace(
        counts=counts,
        domain=tuple(draw(texts) for _ in range(requests)),
        layers=tuple(draw(st.lists(st.integers(0, 2**40), min_size=layers, max_size=layers, unique=True))),
        decode_steps=draw(st.none() | st.just(np.arange(requests))),
        hidden_size=draw(st.none() | st.integers(1, 2**20)),
        top_k=draw(st.none() | st.integers(1, experts)),
        model=draw(texts),
    )


@settings(max_examples=40)
@given(traces())
def test_a_file_gives_back_what_was_saved(trace):
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loka.probes.routing.trace.whole_file", lambda path: _Kept(file))
        trace.save("x.npz")
    with zipfile.ZipFile(io.BytesIO(file.getvalue())) as archive:
        assert {name.removesuffix(".npy") for name in archive.namelist()} >= {"counts", "domain", "layers"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loka.probes.routing.trace.Path", lambda _: io.BytesIO(file.getvalue()))
        found = RoutingTrace.load("x.npz")
    assert np.array_equal(found.counts, trace.counts)
    assert found.counts.dtype == trace.counts.dtype == (np.uint16 if trace.counts.max() < 2**16 else np.uint32)
    assert (found.domain, found.layers, found.model) == (trace.domain, trace.layers, trace.model)
    assert (found.hidden_size, found.top_k) == (trace.hidden_size, trace.top_k)
    assert np.array_equal(found.decode_steps, trace.decode_steps) or found.decode_steps is trace.decode_steps is None


class _Kept:
    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self.file

    def __exit__(self, *_):
        return None


def test_numpy_reads_the_file_without_pickle(tmp_path):
    trace = made_trace(5)
    trace.save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz", allow_pickle=False) as file:
        assert set(file.files) == {"counts", "domain", "layers", "decode_steps", "hidden_size", "top_k", "model"}
        assert np.array_equal(file["counts"], trace.counts)
        assert file["counts"].dtype == np.uint16
        assert tuple(file["domain"]) == trace.domain
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<u2", ">u4", "<i8", "u1"])
def test_files_that_numpy_wrote_are_read(tmp_path, save, dtype):
    counts = np.asfortranarray(np.arange(48).reshape(2, 2, 3, 4).astype(dtype))
    save(tmp_path / "t.npz", **{**PARTS, "counts": counts, "a_key_of_tomorrow": np.array("x")})
    found = RoutingTrace.load(tmp_path / "t.npz")
    assert np.array_equal(found.counts, counts)
    assert found.counts.dtype == np.dtype("u2")


# name -> (what is changed, words of the message)
MALFORMED = {
    "negative": ({"counts": -COUNTS.astype(int)}, "48 negative numbers"),
    "float": ({"counts": COUNTS.astype(float)}, "float64"),
    "truth values": ({"counts": COUNTS.astype(bool)}, "of type bool"),
    "overflow": ({"counts": COUNTS.astype(np.uint64) << 40}, "do not fit into uint32"),
    "rank": ({"counts": COUNTS[0]}, "3 dimensions, not 4"),
    "phases": ({"counts": np.ones((2, 3, 3, 4), int)}, "3 phases"),
    "no requests": ({"counts": COUNTS[:0], "domain": np.array([], "U1")}, "no requests"),
    "no layers": ({"counts": COUNTS[:, :, :0], "layers": np.array([], int)}, "no layers"),
    "no experts": ({"counts": COUNTS[..., :0]}, "no experts"),
    "domain length": ({"domain": np.array(["a"])}, "1 entries, and there are 2 requests"),
    "domain rank": ({"domain": np.array("a")}, "domain has 0 dimensions"),
    "domain type": ({"domain": np.array([1, 2])}, "must hold text"),
    "domain bytes": ({"domain": np.array([b"a", b"b"])}, "must hold text"),
    "domain escape": ({"domain": np.array(["a\x1b[2J", "b"])}, "not a printable text"),
    "layers length": ({"layers": np.arange(4)}, "layers names 4"),
    "layers twice": ({"layers": np.array([1, 2, 1])}, "names 1 more than once"),
    "layers negative": ({"layers": np.array([-1, 2, 1])}, "whole numbers from 0"),
    "layers type": ({"layers": np.array(["a", "b", "c"])}, "must hold integers"),
    "steps length": ({"decode_steps": np.arange(3)}, "shape (3,), and there are 2 requests"),
    "steps negative": ({"decode_steps": np.array([0, -1])}, "must lie in 0"),
    "steps float": ({"decode_steps": np.array([0.0, 1.0])}, "must hold integers"),
    "top_k": ({"top_k": np.array(5)}, "whole number from 1 to 4"),
    "hidden_size": ({"hidden_size": np.array(0)}, "hidden_size is 0"),
    "hidden_size rank": ({"hidden_size": np.array([8])}, "hidden_size has 1 dimensions, not 0"),
    "model": ({"model": np.array("x" * 300)}, "at most 256 characters"),
    "records": ({"counts": np.zeros((2, 2, 3, 4), [("a", "u2")])}, "must hold integers"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_in_words(tmp_path, name):
    change, words = MALFORMED[name]
    np.savez(tmp_path / "t.npz", **{**PARTS, **change})
    with pytest.raises(ArgumentError, match=re.escape(words)) as raised:
        RoutingTrace.load(tmp_path / "t.npz")
    assert str(tmp_path / "t.npz") in str(raised.value)


@pytest.mark.parametrize("missing", sorted(PARTS))
def test_a_missing_array_is_named(tmp_path, missing):
    np.savez(tmp_path / "t.npz", **{name: value for name, value in PARTS.items() if name != missing})
    with pytest.raises(ArgumentError, match=f"{missing} missing"):
        RoutingTrace.load(tmp_path / "t.npz")


@pytest.mark.parametrize("name", ["counts", "domain"])
def test_objects_are_never_unpickled(tmp_path, name):
    objects = np.array([[1, 2], [3]], dtype=object)
    np.savez(tmp_path / "t.npz", **{**PARTS, name: objects}, allow_pickle=True)
    with pytest.raises(ArgumentError, match="Python objects"):
        RoutingTrace.load(tmp_path / "t.npz")


def test_ragged_counts_are_refused():
    for ragged in ([[[[1, 2]], [[1]]]], np.array([[1], [1, 2]], dtype=object)):
        with pytest.raises(ArgumentError, match="ragged"):
            RoutingTrace(counts=ragged, domain=("a",), layers=(0,))


def test_one_text_is_not_taken_for_a_list_of_letters():
    with pytest.raises(ArgumentError, match="one per request"):
        RoutingTrace(counts=COUNTS, domain="ab", layers=(0, 1, 2))


@settings(max_examples=60)
@given(st.data())
def test_a_file_with_a_flipped_or_missing_part_is_refused_or_right(data):
    file = io.BytesIO()
    np.savez_compressed(file, **PARTS)
    raw = bytearray(file.getvalue())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loka.probes.routing.trace.Path", lambda _: io.BytesIO(bytes(raw)))
        try:
            found = RoutingTrace.load("t.npz")
        except ArgumentError:
            return
    assert np.array_equal(found.counts, COUNTS)  # a byte that means nothing, as the date of a member


def test_what_is_no_zip_and_what_is_not_there_are_said(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"not a zip")
    with pytest.raises(ArgumentError, match=r"cannot be read as an \.npz"):
        RoutingTrace.load(tmp_path / "t.npz")
    with pytest.raises(ArgumentError, match="There is no routing trace"):
        RoutingTrace.load(tmp_path / "other.npz")
    with pytest.raises(ArgumentError):
        RoutingTrace.load(tmp_path)


def test_a_size_bomb_is_refused_before_it_is_unpacked(tmp_path):
    bomb = tmp_path / "t.npz"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 70)
    text = b"{'descr': '<u2', 'fortran_order': False, 'shape': (250000, 2, 10, 10)}"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("counts.npy", "w") as member:
            member.write(header + text)
            for _ in range(100):
                member.write(bytes(10**6))
    assert bomb.stat().st_size < 2**20
    with pytest.raises(ArgumentError, match=r"unpack to 100,000,080 bytes, more than the 1,000,000 allowed"):
        RoutingTrace.load(bomb, max_bytes=10**6)


def test_a_header_that_claims_more_than_its_member_holds_is_refused(tmp_path):
    np.savez(tmp_path / "good.npz", **PARTS)
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "t.npz", "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            if name == "counts.npy":
                data = data.replace(b"(2, 2, 3, 4), }", b"(2,2,3,4000),} ")
            bad.writestr(name, data)
    with pytest.raises(ArgumentError, match=r"claims shape \(2, 2, 3, 4000\)"):
        RoutingTrace.load(tmp_path / "t.npz")


def test_two_members_of_one_name_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", **PARTS)
    with zipfile.ZipFile(tmp_path / "t.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("domain.npy", archive.read("domain.npy"))
    with pytest.raises(ArgumentError, match="several members of one name"):
        RoutingTrace.load(tmp_path / "t.npz")


def test_a_file_that_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(ArgumentError, match="Cannot write"):
        made_trace(2).save(tmp_path / "nowhere" / "t.npz")
    (tmp_path / "t.npz").mkdir()
    with pytest.raises(ArgumentError, match="Cannot write"):
        made_trace(2).save(tmp_path / "t.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_a_trace_cannot_be_changed_and_the_callers_array_can():
    mine = np.ones((2, 2, 3, 4), np.uint16)
    trace = RoutingTrace(counts=mine, domain=("a", "b"), layers=(0, 1, 2))
    with pytest.raises(ValueError, match="read-only"):
        trace.counts[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        trace.prefill[0] = 0
    mine[0] = 2
    assert int(trace.counts.sum()) == mine[1:].size * 2


def test_select_takes_requests_and_layers_in_the_order_asked_for():
    trace = made_trace(10)
    found = trace.select(requests=[7, 2], layers=[5, 1])
    assert np.array_equal(found.counts, trace.counts[[7, 2]][:, :, [2, 0]])
    assert (found.domain, found.layers) == ((trace.domain[7], trace.domain[2]), (5, 1))
    assert (found.requests, found.experts, found.model, found.top_k) == (2, 8, "Made", 1)
    mask = np.array([name == "code" for name in trace.domain])
    assert set(trace.select(requests=mask).domain) == {"code"}
    assert trace.select().domain == trace.domain


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"layers": [2]}, r"layers \[2\] are not in this trace\. Its layers are 1, 3, 5"),
        ({"layers": []}, r"no layer is named\. Its"),
        ({"requests": []}, "select some"),
        ({"requests": [10]}, "there are 0 to 9"),
        ({"requests": [-1]}, "there are 0 to 9"),
        ({"requests": np.zeros(10, bool)}, "select some"),
        ({"requests": np.zeros(9, bool)}, "select some"),
    ],
)
def test_select_refuses_what_is_not_there(asked, words):
    with pytest.raises(ArgumentError, match=words):
        made_trace(10).select(**asked)
