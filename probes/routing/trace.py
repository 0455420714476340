"""Where the tokens went: how many each expert got, per request, phase and layer, and the file that keeps it.

A routing trace holds counts and no text. It is a compressed `.npz` that numpy reads without pickle:

    counts        [request, phase, layer, expert], uint16 or uint32; phase 0 = prefill, 1 = decode
    domain        [request], text: what kind of request it was
    layers        [layer], integers: the model's own numbers of its mixture-of-experts layers
    decode_steps  [request], integers, optional: decode steps of the request
    hidden_size, top_k, model                   optional: width of a token, experts per token, name of the model

A file comes from elsewhere, so it is read as hostile: sizes are taken from the zip directory and from the array headers
and checked before anything is unpacked, and what is wrong is said in a sentence.

What is legal, and what it means: an expert that no request uses is a load of zero and stays in every measure; one
request, or one domain, is a trace (what needs several refuses in words); decode counts that are all zero are a trace of
prefill alone; a request without any token is kept, and left out where a share of its tokens would be needed.
"""

import math
import os
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

import numpy as np

from loka.errors import ArgumentError

PREFILL: Final[int] = 0
DECODE: Final[int] = 1
PHASES: Final[tuple[str, str]] = ("prefill", "decode")
MAX_BYTES: Final[int] = 4 * 2**30  # unpacked; 100,000 requests of 58 layers with 256 experts need `max_bytes`

_MOST: Final[int] = 2**32 - 1
_LONGEST_TEXT: Final[int] = 256
_KEYS: Final[tuple[str, ...]] = ("counts", "domain", "layers", "decode_steps", "hidden_size", "top_k", "model")
_REQUIRED: Final[tuple[str, ...]] = _KEYS[:3]
_RANKS: Final[dict[str, int]] = {"counts": 4, "domain": 1, "layers": 1, "decode_steps": 1}  # the rest: one value
# What zipfile, zlib and numpy raise on bytes that are not what they claim to be.
_BROKEN: Final = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError, OverflowError),
    *(SyntaxError, tokenize.TokenError),  # numpy parses a header as Python's literals
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTrace:
    """Tokens per expert, per request, phase and layer. Raises ArgumentError when the parts do not fit together.

    Any array of integers is taken for `counts` and kept, read-only, in the smaller of uint16 and uint32 that holds it.
    """

    counts: np.ndarray  # [request, phase, layer, expert], uint16 or uint32; phase 0 = prefill, 1 = decode
    domain: tuple[str, ...]  # one per request
    layers: tuple[int, ...]  # the model's layer numbers
    decode_steps: np.ndarray | None = None  # per request
    hidden_size: int | None = None
    top_k: int | None = None
    model: str = ""

    def __post_init__(self) -> None:
        counts = _counts(self.counts)
        requests, _, layers, experts = counts.shape
        values: dict[str, Any] = {
            "counts": counts,
            "domain": _texts("domain", self.domain, requests),
            "layers": _layers(self.layers, layers),
            "decode_steps": None if self.decode_steps is None else _steps(self.decode_steps, requests),
            "hidden_size": _size("hidden_size", self.hidden_size, _MOST),
            "top_k": _size("top_k", self.top_k, experts),
            "model": _text("model", self.model),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return int(self.counts.shape[0])

    @property
    def experts(self) -> int:
        """How many experts a layer has."""
        return int(self.counts.shape[3])

    @property
    def domains(self) -> tuple[str, ...]:
        """The distinct domains, in the order in which they first occur."""
        return tuple(dict.fromkeys(self.domain))

    @property
    def prefill(self) -> np.ndarray:
        """Counts of the prefill, [request, layer, expert]; a read-only view."""
        return self.counts[:, PREFILL]

    @property
    def decode(self) -> np.ndarray:
        """Counts of the decode, [request, layer, expert]; a read-only view."""
        return self.counts[:, DECODE]

    def select(
        self, *, requests: Sequence[int] | np.ndarray | None = None, layers: Sequence[int] | None = None
    ) -> Self:
        """Return the trace of some requests (positions, or a mask) and some layers (the model's numbers), in order.

        Raises ArgumentError where one is not there, or none is left.
        """
        rows = np.arange(self.requests) if requests is None else _positions(requests, self.requests)
        wanted = self.layers if layers is None else tuple(layers)
        unknown = [layer for layer in wanted if layer not in self.layers]
        if unknown or not wanted:
            wrong = f"layers {unknown} are not in this trace" if unknown else "no layer is named"
            raise ArgumentError(f"Cannot select: {wrong}. Its layers are {_listed(self.layers)}; give their numbers.")
        columns = [self.layers.index(layer) for layer in wanted]
        return type(self)(
            counts=self.counts[rows][:, :, columns],
            domain=tuple(self.domain[row] for row in rows),
            layers=wanted,
            decode_steps=None if self.decode_steps is None else self.decode_steps[rows],
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            model=self.model,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Self:
        """Read a trace. Raises ArgumentError when the file is missing, malformed or more than `max_bytes` unpacked."""
        path = Path(path)
        try:
            parts = _read(path, max_bytes)
        except FileNotFoundError as error:
            raise ArgumentError(f"There is no routing trace at {path}. Give the path of an .npz file.") from error
        except ArgumentError as error:
            raise ArgumentError(f"{path} is not a routing trace: {error}") from error
        except (*_BROKEN, NotImplementedError, MemoryError) as error:
            raise ArgumentError(
                f"{path} cannot be read as an .npz file: {type(error).__name__}: {error}. It may be cut off or of "
                "another kind; write it again with RoutingTrace.save, loka.trace_routing or `loka moe convert`."
            ) from error
        try:
            return cls(**parts)
        except ArgumentError as error:
            raise ArgumentError(f"{path} is not a routing trace: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace, all of it or nothing. Raises ArgumentError where the file cannot be written."""
        arrays: dict[str, Any] = {
            "counts": self.counts,
            "domain": np.array(self.domain, dtype=np.str_),
            "layers": np.array(self.layers, dtype=np.int64),
        }
        optional = {name: getattr(self, name) for name in ("decode_steps", "hidden_size", "top_k")}
        arrays |= {name: np.asarray(value) for name, value in optional.items() if value is not None}
        if self.model:
            arrays["model"] = np.array(self.model, dtype=np.str_)
        save_arrays(path, arrays)


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a compressed `.npz`: the file appears complete or not at all. Raises ArgumentError."""
    with whole_file(Path(path)) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write that takes its place at `path` when the block ends, and never does where that raises.

    Raises ArgumentError where it cannot be written.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise ArgumentError(
            f"Cannot write {path}: {error.strerror or error}. Give a file in a writable folder."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- reading a file that may be hostile


def _read(path: Path, max_bytes: int) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ArgumentError("it holds several members of one name. Write it again.")
        if total := _too_large([info.file_size for info in members.values()], max_bytes):
            raise ArgumentError(
                f"it would unpack to {total:,} bytes, more than the {max_bytes:,} allowed. If you trust it, read it "
                "with RoutingTrace.load(path, max_bytes=...)."
            )
        missing = [name for name in _REQUIRED if f"{name}.npy" not in members]
        if missing:
            raise ArgumentError(f"{' and '.join(missing)} missing. It needs {', '.join(_REQUIRED)}.")
        parts: dict[str, Any] = {}
        for name in _KEYS:
            info = members.get(f"{name}.npy")
            if info is not None:
                with archive.open(info) as file:
                    parts[name] = _member(name, file, info.file_size)
    return parts


def _too_large(sizes: Sequence[int], most: int) -> int:
    total = sum(sizes)
    return total if total > most else 0


def _member(name: str, file: IO[bytes], size: int) -> Any:
    """Return one array of the file, as what the record wants, once its header has been found plausible."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ArgumentError(f"{name} is of .npy version {version}; 1.0 and 2.0 can be read. Save it again with numpy.")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ArgumentError(f"{name} holds Python objects, which are never read. Save plain numbers or text.")
    if dtype.names is not None or dtype.kind not in ("U" if name in ("domain", "model") else "iu"):
        raise ArgumentError(f"{name} is of type {dtype}; {_KINDS[name]}.")
    if len(shape) != _RANKS.get(name, 0):
        raise ArgumentError(f"{name} has {len(shape)} dimensions, not {_RANKS.get(name, 0)}. {_SHAPES}")
    bytes_of_data = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not bytes_of_data < size <= bytes_of_data + 2**16:
        raise ArgumentError(
            f"{name} claims shape {shape} of {dtype}, which its {size:,} bytes do not hold. Write it again."
        )
    data = file.read(bytes_of_data)
    if len(data) != bytes_of_data or file.read(1):
        raise ArgumentError(f"{name} is cut off or followed by other data. Write it again.")
    if dtype.kind == "U" and int(np.frombuffer(data, _CODE.newbyteorder(dtype.byteorder)).max(initial=0)) > 0x10FFFF:
        raise ArgumentError(f"{name} holds what is no character. Write it again.")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    if name in _RANKS:
        return tuple(array.tolist()) if name in ("domain", "layers") else array
    return array.item()


_CODE: Final = np.dtype(np.uint32)  # of a character
_KINDS: Final[dict[str, str]] = {
    **dict.fromkeys(("counts", "layers", "decode_steps", "hidden_size", "top_k"), "it must hold integers"),
    **dict.fromkeys(("domain", "model"), "it must hold text (a numpy array of unicode strings)"),
}
_SHAPES: Final[str] = "counts are [request, phase, layer, expert]; domain and layers are lists."


# ---- what fits together


def _counts(value: Any) -> np.ndarray:
    array = _integers("counts", value)
    if array.ndim != 4:
        raise ArgumentError(f"counts has {array.ndim} dimensions, not 4. {_SHAPES}")
    if array.shape[1] != len(PHASES):
        raise ArgumentError(
            f"counts has {array.shape[1]} phases in its second dimension; there are two, prefill and decode, of which "
            "either may be all zero."
        )
    if 0 in array.shape:
        empty = ("requests", "phases", "layers", "experts")[array.shape.index(0)]
        raise ArgumentError(f"counts has no {empty} (shape {array.shape}). A trace has at least one of each.")
    most = int(array.max())
    if int(array.min()) < 0:
        raise ArgumentError(f"counts has {int((array < 0).sum())} negative numbers. They are numbers of tokens.")
    if most > _MOST:
        raise ArgumentError(f"counts has a number of {most:,}; more than {_MOST:,} tokens do not fit into uint32.")
    kept = array.astype(np.uint16 if most < 2**16 else np.uint32, copy=array.flags.writeable)[...]
    kept.flags.writeable = False
    return kept


def _integers(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ArgumentError(f"{name} is ragged: its rows differ in length. Give one rectangular array.") from error
    if array.dtype == object:
        raise ArgumentError(f"{name} is ragged or holds Python objects. Give one rectangular array of integers.")
    if array.dtype.kind not in "iu":
        raise ArgumentError(f"{name} is of type {array.dtype}. It holds numbers of tokens: give integers.")
    return array


def _steps(value: Any, requests: int) -> np.ndarray:
    array = _integers("decode_steps", value)
    if array.shape != (requests,):
        raise ArgumentError(f"decode_steps has shape {array.shape}, and there are {requests} requests. Give one each.")
    if int(array.min()) < 0 or int(array.max()) > _MOST:
        raise ArgumentError(f"decode_steps must lie in 0 to {_MOST:,}; found {int(array.min())} to {int(array.max())}.")
    kept = array.astype(np.int64)
    kept.flags.writeable = False
    return kept


def _layers(value: Any, length: int) -> tuple[int, ...]:
    layers = tuple(value)
    wrong = [layer for layer in layers if isinstance(layer, bool) or not isinstance(layer, int | np.integer)]
    if wrong or any(layer < 0 for layer in layers):
        raise ArgumentError(f"layers must be whole numbers from 0, found {_listed(wrong or layers)}.")
    if len(layers) != length:
        raise ArgumentError(f"layers names {len(layers)}, and counts has {length} in its third dimension.")
    twice = sorted({int(layer) for layer in layers if layers.count(layer) > 1})
    if twice:
        raise ArgumentError(f"layers names {_listed(twice)} more than once. Every layer has its own row of counts.")
    return tuple(int(layer) for layer in layers)


def _texts(name: str, value: Any, length: int) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ArgumentError(f"{name} is the one text {value!r}. Give one per request, as a tuple.")
    texts = tuple(_text(name, text) for text in value)
    if len(texts) != length:
        raise ArgumentError(f"{name} has {len(texts)} entries, and there are {length} requests. Give one each.")
    return texts


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        raise ArgumentError(
            f"{name} {str(value)[:40]!r} is not a printable text of at most {_LONGEST_TEXT} characters. Shorten it."
        )
    return str(value)


def _size(name: str, value: Any, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= most:
        raise ArgumentError(f"{name} is {value!r}. It must be a whole number from 1 to {most:,}.")
    return int(value)


def _positions(value: Any, requests: int) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype == bool and array.shape == (requests,):
        array = np.flatnonzero(array)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ArgumentError("requests must be positions, or a mask with one truth value per request, and select some.")
    if int(array.min()) < 0 or int(array.max()) >= requests:
        raise ArgumentError(f"requests goes from {array.min()} to {array.max()}; there are 0 to {requests - 1}.")
    return array


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values[:20]) + (", ..." if len(values) > 20 else "")
