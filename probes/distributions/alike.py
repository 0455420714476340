"""Many stored states of one layout, read at once: bytes that differ in their numbers alone become stacked arrays.

`packed` writes an uncompressed archive, so the states of products with the same kinds of groups agree in every byte but
those of their arrays and the check sums of these. One is taken apart by the `zipfile` of Python; of the others only the
bytes between the arrays are compared, and each check sum is made anew. What is not alike, or damaged, is left to
`unpacked`, which knows how to say so.
"""

import io
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loka.errors import ArgumentError
from loka.probes.distributions.gather import unpacked
from loka.probes.distributions.moments import Arrays

# Of a local header: its length, where the lengths of name and extra field are, and where the check sum is.
_LOCAL, _LOCAL_LENGTHS, _LOCAL_SUM = 30, 26, 14
# The same of an entry of the central directory, whose three lengths are followed by a comment.
_ENTRY, _ENTRY_LENGTHS, _ENTRY_SUM = 46, 28, 16
_SUM_BYTES: Final[int] = 4
# Layouts that payloads of one length have at most; a database of damaged ones must not take its square in time.
_MOST_LAYOUTS: Final[int] = 32
_NPY_1: Final[tuple[int, int]] = (1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """One array: its place in the payload, and what its bytes are."""

    name: str
    header: int  # where the member begins, `.npy` header included
    begin: int
    end: int
    sums: tuple[int, int]  # where its check sum is written
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def stacked(payloads: Sequence[bytes], names: Sequence[str]) -> Iterator[tuple[list[int], Arrays]]:
    """Yield groups of payloads that are alike: their places, and the named arrays, each [payloads, *shape].

    A payload that is damaged, lacks one of the names, is not as `packed` writes it, or of yet another layout than many
    of its length, is in no group.
    """
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for place, payload in enumerate(payloads):
        by_length[len(payload)].append(place)
    for places in by_length.values():
        rest = places
        for _ in range(_MOST_LAYOUTS):  # of one length: each round takes all that are like the first
            if not rest:
                break
            found = _layout(payloads[rest[0]])
            if found is None or not set(names) <= {member.name for member in found}:
                rest = rest[1:]
                continue
            same = _alike(payloads, rest, found)
            whole = [at for at in rest if at in same and _is_whole(payloads[at], found, names)]
            if whole:
                yield whole, _arrays(payloads, whole, [member for member in found if member.name in names])
            rest = [at for at in rest if at not in same]


def _layout(payload: bytes) -> tuple[_Member, ...] | None:
    """Return where the arrays of a payload are; None where it is not as `packed` writes one."""
    try:
        unpacked(payload)
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            entries, at = archive.infolist(), archive.start_dir
        members = []
        for entry in entries:
            members.append(_member(payload, entry, at + _ENTRY_SUM))
            at += _ENTRY + sum(struct.unpack_from("<3H", payload, at + _ENTRY_LENGTHS))
    except (ArgumentError, ValueError, struct.error):
        return None
    return tuple(members)


def _member(payload: bytes, entry: zipfile.ZipInfo, second_sum: int) -> _Member:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    first_sum = entry.header_offset + _LOCAL_SUM
    header = (
        entry.header_offset + _LOCAL + sum(struct.unpack_from("<2H", payload, entry.header_offset + _LOCAL_LENGTHS))
    )
    member = io.BytesIO(payload[header : header + entry.file_size])
    if np.lib.format.read_magic(member) != _NPY_1:
        raise ValueError(f"{entry.filename} is of another version")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(member)
    begin, end = header + member.tell(), header + entry.file_size
    if (by_columns and len(shape) > 1) or dtype.hasobject or end - begin != dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{entry.filename} is laid out in another way")
    return _Member(
        name=entry.filename.removesuffix(".npy"),
        header=header,
        begin=begin,
        end=end,
        sums=(first_sum, second_sum),
        dtype=dtype,
        shape=shape,
    )


def _alike(payloads: Sequence[bytes], places: Sequence[int], layout: Sequence[_Member]) -> set[int]:
    """Return which payloads agree with the first in every byte that is neither of an array nor of a check sum."""
    gaps = [(member.begin, member.end) for member in layout]
    gaps += [(at, at + _SUM_BYTES) for member in layout for at in member.sums]
    gaps.sort()
    begins, ends = [0, *(end for _, end in gaps)], [*(begin for begin, _ in gaps), len(payloads[places[0]])]
    between = list(map(slice, begins, ends))
    wanted = [payloads[places[0]][each] for each in between]
    return {at for at in places if [payloads[at][each] for each in between] == wanted}


def _is_whole(payload: bytes, layout: Sequence[_Member], names: Sequence[str]) -> bool:
    view = memoryview(payload)
    for member in layout:
        if member.name in names:
            found = zlib.crc32(view[member.header : member.end]).to_bytes(_SUM_BYTES, "little")
            if any(payload[at : at + _SUM_BYTES] != found for at in member.sums):
                return False
    return True


def _arrays(payloads: Sequence[bytes], places: Sequence[int], members: Sequence[_Member]) -> dict[str, NDArray[Any]]:
    return {
        member.name: np.frombuffer(
            b"".join([payloads[at][member.begin : member.end] for at in places]), dtype=member.dtype
        ).reshape(len(places), *member.shape)
        for member in members
    }
