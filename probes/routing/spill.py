"""Requests on their way to a routing trace: kept in a file from the moment they close, so that a crash loses few.

The file lies beside the trace that it will become, as `<trace>.partial`. It begins with a magic line and goes on with
records: two lengths, a JSON object, and counts as deflated uint32. The first record has the layers and no counts, every
other one a batch of closed requests. What a process that died has left is read up to its last whole record.
"""

import json
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from loka.errors import ArgumentError
from loka.probes.routing.trace import MAX_BYTES, PHASES, RoutingTrace, whole_file

MAGIC: Final[bytes] = b"LOKA-ROUTING-1\n"
SUFFIX: Final[str] = ".partial"

_LENGTHS: Final = struct.Struct("<II")
_BLOCK: Final = struct.Struct("<HH")  # of a zlib stream (RFC 1950, 1951): bytes that are stored, and their complement
_CHECKSUM: Final = struct.Struct(">I")
_META_BYTES: Final[int] = 2**24
_NARROW: Final[int] = 2**16 - 1  # the largest count that a finished trace keeps in two bytes
_SMALL: Final[int] = 2**14  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedRequests:
    """A batch of requests that have ended: counts [request, phase, layer, expert], and a domain and steps for each."""

    counts: np.ndarray
    domain: tuple[str, ...]
    decode_steps: tuple[int, ...]
    most: int | None = None  # no count is above it; None where nobody has looked


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFacts:
    """What holds for every request of a trace."""

    layers: tuple[int, ...]
    experts: int
    model: str = ""
    hidden_size: int | None = None
    top_k: int | None = None


class Spill:
    """The file of closed requests of one trace. Raises ArgumentError where there is one already, or none can be."""

    def __init__(self, path: Path, facts: TraceFacts) -> None:
        self.path = path
        self.partial = path.with_name(path.name + SUFFIX)
        self.requests = 0
        self._domains: list[str] = []
        self._steps: list[int] = []
        self._most = 0
        self._facts = facts
        self._meta: dict[str, Any] = {}
        self._text = b""
        try:
            self._file = self.partial.open("xb")
        except FileExistsError as error:
            raise ArgumentError(
                f"{self.partial} is there already: another trace is being recorded to {path}, or one was cut off. "
                f"Finish that one with `loka moe convert {self.partial} -o OUT.npz` and delete it, or choose another "
                "path."
            ) from error
        except OSError as error:
            raise ArgumentError(
                f"Cannot write {self.partial}: {error.strerror}. Give the trace a path in a writable folder."
            ) from error
        self._file.write(MAGIC)
        header = {"layers": facts.layers, "experts": facts.experts, "model": facts.model}
        self._write(header, b"")

    def append(self, closed: ClosedRequests, facts: TraceFacts) -> None:
        """Keep requests; after this call they survive the process."""
        counts = np.ascontiguousarray(closed.counts, dtype="<u4")
        meta = {
            "domain": closed.domain,
            "decode_steps": closed.decode_steps,
            "hidden_size": facts.hidden_size,
            "top_k": facts.top_k,
        }
        self._write(meta, _deflated(counts))
        self._facts = facts
        self._domains += closed.domain
        self._steps += closed.decode_steps
        if closed.most is None or closed.most > _NARROW:
            self._most = max(self._most, int(counts.max(initial=0)))
        self.requests = len(self._domains)

    def _write(self, meta: dict[str, Any], payload: bytes) -> None:
        if meta != self._meta:  # as a rule they are those of the requests before
            self._meta, self._text = meta, json.dumps(meta).encode()
        self._file.write(_LENGTHS.pack(len(self._text), len(payload)) + self._text + payload)
        self._file.flush()

    def finish(self) -> None:
        """Write the trace, a batch at a time, and remove the file of closed requests."""
        self._file.close()
        facts = self._facts
        dtype = np.dtype("<u2" if self._most <= _NARROW else "<u4")
        shape = (self.requests, len(PHASES), len(facts.layers), facts.experts)
        arrays: dict[str, Any] = {
            "domain": np.array(self._domains, dtype=np.str_),
            "layers": np.array(facts.layers, dtype=np.int64),
            "decode_steps": np.array(self._steps, dtype=np.int64),
        }
        sizes = {"hidden_size": facts.hidden_size, "top_k": facts.top_k}
        arrays |= {name: np.array(value) for name, value in sizes.items() if value is not None}
        if facts.model:
            arrays["model"] = np.array(facts.model)
        with whole_file(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("counts.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for batch in self._batches():
                    member.write(batch.counts.astype(dtype).tobytes())
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        self.discard()

    def _batches(self) -> Iterator[ClosedRequests]:
        with self.partial.open("rb") as file:
            _, batches = _read(file, sys.maxsize)
            for batch, _ in batches:
                yield batch

    def discard(self) -> None:
        """Remove the file of closed requests."""
        self._file.close()
        self.partial.unlink(missing_ok=True)


def _deflated(counts: np.ndarray) -> bytes:
    """Return counts as a zlib stream, of low compression, for the finished trace is compressed again.

    A few bytes are only stored, in one block: for them, a compressor's tables are more work than all the rest.
    """
    if counts.nbytes > _SMALL:
        return zlib.compress(counts.data, 1)
    data = counts.tobytes()
    size = len(data)
    return b"\x78\x01\x01" + _BLOCK.pack(size, size ^ 0xFFFF) + data + _CHECKSUM.pack(zlib.adler32(data))


def is_partial(path: str | os.PathLike[str]) -> bool:
    """Whether a file is what a recording left that did not end. Raises ArgumentError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ArgumentError(f"Cannot read {path}: {error.strerror}. Give the path of a file.") from error


def recover(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> RoutingTrace:
    """Return the trace of the requests that had closed when a recording was cut off.

    Raises ArgumentError where the file is of another kind, holds no request, or unpacks to more than `max_bytes`.
    """
    path = Path(path)
    if not is_partial(path):
        raise ArgumentError(
            f"{path} is not the file of a recording, which begins with {MAGIC!r}. Name a .partial file."
        )
    with path.open("rb") as file:
        try:
            facts, batches = _read(file, max_bytes)
            found = list(batches)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError, zlib.error) as error:
            raise ArgumentError(f"{path} is damaged: {error}. It cannot be recovered.") from error
    if not found:
        raise ArgumentError(f"{path} holds no request that had ended. Record again.")
    last = found[-1][1]
    return RoutingTrace(
        counts=np.concatenate([batch.counts for batch, _ in found]),
        domain=tuple(domain for batch, _ in found for domain in batch.domain),
        layers=facts.layers,
        decode_steps=np.array([steps for batch, _ in found for steps in batch.decode_steps]),
        hidden_size=last["hidden_size"],
        top_k=last["top_k"],
        model=facts.model,
    )


_Batch = tuple[ClosedRequests, dict[str, Any]]


def _read(file: IO[bytes], max_bytes: int) -> tuple[TraceFacts, Iterator[_Batch]]:
    """Return the facts at the head of a file of closed requests, and its batches up to the last whole one."""
    file.seek(len(MAGIC))
    first = next(_records(file), None)
    if first is None:
        raise ArgumentError("the file ends in its first record. Record again.")
    head = first[0]
    facts = TraceFacts(layers=tuple(head["layers"]), experts=int(head["experts"]), model=str(head["model"]))
    if not facts.layers or facts.experts < 1:
        raise ArgumentError("the file names no layers or experts. Record again.")
    return facts, _unpacked(file, facts, max_bytes)


def _unpacked(file: IO[bytes], facts: TraceFacts, left: int) -> Iterator[_Batch]:
    per_request = len(PHASES) * len(facts.layers) * facts.experts * 4
    for meta, payload in _records(file):
        requests = len(meta["domain"])
        size = requests * per_request
        left -= size
        if left < 0:
            raise ArgumentError("it would unpack to more than the bytes allowed. Raise max_bytes if you trust it.")
        data = zlib.decompressobj().decompress(payload, size + 1)
        if len(data) != size or len(meta["decode_steps"]) != requests:
            raise ArgumentError("a batch of requests does not have the size that it states. Record again.")
        counts = np.frombuffer(data, "<u4").reshape(requests, len(PHASES), len(facts.layers), facts.experts)
        yield (
            ClosedRequests(counts=counts, domain=tuple(meta["domain"]), decode_steps=tuple(meta["decode_steps"])),
            {name: meta[name] for name in ("hidden_size", "top_k")},
        )


def _records(file: IO[bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    end = os.fstat(file.fileno()).st_size
    while len(lengths := file.read(_LENGTHS.size)) == _LENGTHS.size:
        text_bytes, payload_bytes = _LENGTHS.unpack(lengths)
        if text_bytes > _META_BYTES:
            raise ArgumentError(f"a record claims {text_bytes:,} bytes of description. The file is damaged.")
        if text_bytes + payload_bytes > end - file.tell():
            return  # cut off here
        yield json.loads(file.read(text_bytes)), file.read(payload_bytes)


def check_domains(domains: Sequence[str]) -> tuple[str, ...]:
    """Return domains as a trace keeps them. Raises ArgumentError on one that is no printable text."""
    probe = RoutingTrace(counts=np.zeros((len(domains), 2, 1, 1), np.uint16), domain=tuple(domains), layers=(0,))
    return probe.domain
