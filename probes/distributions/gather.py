"""Bring the statistics of all ranks together as plain bytes: nothing that a rank receives can run code.

Payloads differ in length and may be empty, so the lengths go first and the payloads follow, padded to the longest.
A state that knows `arrays`, `from_arrays` and `merge` is reduced by sending it to everyone and merging in rank order:
every rank then does the same arithmetic on the same numbers and holds the same result, bit for bit.
"""

import io
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from loka.errors import ArgumentError
from loka.probes.distributions.moments import Arrays

# Beyond this many bytes over all ranks, states travel one rank at a time instead of all at once.
AT_ONCE_BYTES: Final[int] = 64 * 2**20
# What zipfile, zlib and numpy raise on bytes that are not what they claim to be.
_BROKEN: Final = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError, OverflowError, LookupError),
    *(SyntaxError, tokenize.TokenError, TypeError, MemoryError, NotImplementedError),
)


class Mergeable(Protocol):
    """A statistic that ranks can reduce."""

    def arrays(self) -> Arrays:
        """Return the state as arrays."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], /) -> Self:
        """Restore what `arrays` gave."""

    def merge(self, other: Self, /) -> Self:
        """Return the statistic of both parts together."""


State = TypeVar("State", bound=Mergeable)


def gather_bytes(payload: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return the payloads of all ranks of the group, in rank order; every rank of it has to call.

    Payloads may differ in length and be empty. Without torch.distributed, the own payload alone. Works over the CPU
    where the group can (gloo), else over the current accelerator device (NCCL).
    """
    if _world_size(group) == 1:
        return [payload]
    device = _device(group)
    return _at_once(payload, _sizes(len(payload), group, device), group, device)


def gather_arrays(arrays: Mapping[str, npt.NDArray[Any]], group: dist.ProcessGroup | None = None) -> list[Arrays]:
    """Return the arrays of all ranks, in rank order; names and shapes may differ, and a rank may have none.

    Raises ArgumentError for arrays of Python objects, which only pickle could carry.
    """
    return [unpacked(payload) for payload in gather_bytes(packed(arrays), group)]


def reduced(
    state: State, group: dist.ProcessGroup | None = None, *, arrays: Callable[[State], Arrays] | None = None
) -> State:
    """Return the merge of the states of all ranks, in rank order, on the CPU; the state itself on a single process.

    A rank with nothing to add passes an empty state of the same features. `arrays` says what travels, by default what
    `state.arrays()` gives; with `keep_rows` in it, quantiles merge as exactly as in one process.
    """
    if _world_size(group) == 1:
        return state
    kind = type(state)
    total: State | None = None
    for payload in _in_turn(packed(arrays(state) if arrays is not None else state.arrays()), group):
        part = kind.from_arrays(unpacked(payload))
        total = part if total is None else total.merge(part)
    assert total is not None  # a group has a first rank
    return total


def packed(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return named arrays as the bytes of an uncompressed `.npz`. Raises ArgumentError for arrays of objects."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            if array.dtype.hasobject:
                raise ArgumentError(
                    f"The array {name!r} of Python objects was to be sent: only plain numbers and text are, since "
                    "objects need pickle. Convert it to a numeric dtype."
                )
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


def unpacked(payload: bytes) -> Arrays:
    """Return the arrays in the bytes that `packed` has made. Raises ArgumentError for any others."""
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            if sum(info.file_size for info in archive.infolist()) > len(payload):
                raise ArgumentError("Bytes that unpack to more than they are were not packed here.")
        with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except _BROKEN as error:
        raise ArgumentError(f"These bytes hold no arrays: {type(error).__name__}: {error}.") from error


def _at_once(payload: bytes, sizes: list[int], group: dist.ProcessGroup | None, device: torch.device) -> list[bytes]:
    """Exchange the payloads in one collective."""
    if not any(sizes):
        return [b""] * len(sizes)
    own = _tensor(payload, max(sizes), device)
    everyone = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(everyone, own, group=group)
    return [_bytes(buffer[:size]) for buffer, size in zip(everyone, sizes, strict=True)]


def _in_turn(payload: bytes, group: dist.ProcessGroup | None) -> Iterator[bytes]:
    """Yield the payload of each rank; large ones are held one at a time."""
    device = _device(group)
    sizes = _sizes(len(payload), group, device)
    if max(sizes) * len(sizes) <= AT_ONCE_BYTES:
        yield from _at_once(payload, sizes, group, device)
        return
    own = dist.get_rank(group)
    for rank, size in enumerate(sizes):
        buffer = _tensor(payload, size, device) if rank == own else torch.empty(size, dtype=torch.uint8, device=device)
        if size:
            dist.broadcast(buffer, group=group, group_src=rank)
        yield payload if rank == own else _bytes(buffer)


def _world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in the group; 1 without torch.distributed. Raises ArgumentError on a rank outside of the group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ArgumentError(
            "Statistics were to be gathered over a process group that this rank is no member of: every member calls, "
            "and nobody else. Pass the group that this rank belongs to."
        )
    return size


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors of this group live: the CPU where it has a backend for it, else the current accelerator."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())


def _sizes(size: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    own = torch.tensor([size], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return [int(value) for value in torch.cat(everyone).tolist()]


def _tensor(payload: bytes, length: int, device: torch.device) -> Tensor:
    """Return the payload as uint8, padded with zeros to `length`."""
    buffer = torch.zeros(length, dtype=torch.uint8, device="cpu")
    if payload:
        buffer[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return buffer.to(device)


def _bytes(buffer: Tensor) -> bytes:
    return buffer.cpu().numpy().tobytes()
