"""How a file is spoiled: bytes as a disk or a transfer would, JSON, arrays and tables as somebody hostile would.

Every mutation takes a generator and the original and returns bytes; the same seed makes the same file.
"""

import io
import json
import random
import sqlite3
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

HOSTILE_NAMES = (
    "</script><script>alert(1)</script>",
    "a\x00b",
    "\x1b[2Jcleared",
    "\u202egnp.exe",
    "x" * 5000,
    "'; DROP TABLE runs; --",
    "{{ 7 * 7 }}",
    "[bold red]",
    "%s%n",
    "../../etc/passwd",
    "",
)
HOSTILE_NUMBERS = (
    *(0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 10**30, True),
    *(0.5, -0.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
)


def _hostile(rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(HOSTILE_NUMBERS)
    if kind < 5:
        return rng.choice(HOSTILE_NAMES)
    return [None, [], {}, [[]], {"a": [1]}, [1] * 1000, "\ud800"][rng.randrange(7)]


# ---- bytes


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    """Turn over one bit or a few."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Replace a stretch by zeros, ones or noise."""
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 100, 4096))
    fill = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return (data[:at] + fill + data[at + length :])[: len(data)]


def cut(rng: random.Random, data: bytes) -> bytes:
    """Cut the file off."""
    return data[: rng.choice((0, 1, 4, 99, 100, rng.randrange(len(data)), rng.randrange(len(data)), len(data) - 1))]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Put something in, or after."""
    at = rng.choice((0, len(data), rng.randrange(len(data))))
    return data[:at] + rng.choice((rng.randbytes(rng.choice((1, 4, 512))), b"\x00", b"\n", b"9")) + data[at:]


def remove(rng: random.Random, data: bytes) -> bytes:
    """Take a stretch out."""
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 2, 16, 512, 4096)) :]


def swap(rng: random.Random, data: bytes) -> bytes:
    """Exchange two stretches, of a page at most."""
    length = rng.choice((1, 4, 64, 512, 4096))
    a, b = sorted(rng.randrange(max(1, len(data) - length)) for _ in range(2))
    if b < a + length:
        return data
    return data[:a] + data[b : b + length] + data[a + length : b] + data[a : a + length] + data[b + length :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """Say something twice."""
    at, length = rng.randrange(len(data)), rng.choice((1, 16, 256, 4096))
    return data[: at + length] + data[at:]


BYTES: tuple[Mutation, ...] = (flip_bits, flip_bits, overwrite, cut, insert, remove, swap, repeat)


# ---- JSON


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        _places(inner, found)


def json_values(rng: random.Random, data: bytes) -> bytes:
    """Put hostile values in some places, leave keys out, add unknown ones, exchange subtrees."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places: list[tuple[Any, Any]] = []
        _places(document, places)
        if not places:
            break
        (holder, key), (other, other_key) = rng.choice(places), rng.choice(places)
        action = rng.randrange(8)
        if action < 4:
            holder[key] = _hostile(rng)
        elif action == 4:
            del holder[key]
        elif action == 5 and isinstance(holder, dict):
            holder[rng.choice((*HOSTILE_NAMES, str(key) + " "))] = holder[key]
        elif action == 6:
            holder[key] = json.loads(json.dumps(other[other_key]))
        else:
            holder[key] = _changed_type(holder[key])
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _changed_type(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int | float):
        return str(value) if value != value // 1 else float(min(value, 1e300))
    return [value] if isinstance(value, str | dict) else {str(at): each for at, each in enumerate(value)}


def json_text(rng: random.Random, data: bytes) -> bytes:
    """Do to the text what no encoder would: keys twice, deep nesting, endless numbers, other encodings."""
    text = data.decode()
    colon = rng.choice([at for at, letter in enumerate(text) if letter == ":"])
    value = rng.choice(
        ("[" * 100_000, "[" * 3000 + "]" * 3000, '{"a":' * 20_000, "9" * 100_000, "1e999999", "-Infinity", "NaN")
        + ("0x10", "1_000", "01", "'single'", '"\\ud800"', '"\\u0000"', "/* */ 1", "tru")
    )
    return rng.choice(
        (
            (text[: colon + 1] + value + "," + text[colon + 1 :]).encode(),
            (text[: colon + 1] + value + text[colon + 1 :]).encode(),
            (text[:1] + '"schema": 1, "kind": "loka-plan", ' + text[1:]).encode(),
            (text[:1] + text[1 : text.index(",") + 1] + text[1:]).encode(),
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + data,
            data + data,
            text.replace("true", "false").replace("null", "0").encode(),
        )
    )


JSON: tuple[Mutation, ...] = (json_values, json_values, json_values, json_text)


# ---- .npz

_HEADERS = (
    "{'descr': '<u2', 'fortran_order': False, 'shape': (%d, 2, 99999999, 99999999), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (-1, 2, 2, %d), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (%d,), }",
    "{'descr': '<U%d99999', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<f8', 'fortran_order': True, 'shape': (%d,), }",
    "{'descr': [('a', '<u2'), ('b', '|O')], 'fortran_order': False, 'shape': (%d,), }",
    "{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (%d,), }",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (%d,), }",
    "{'descr': '|b1', 'fortran_order': False, 'shape': (%d, 2, 3, 4), }",
    "{'descr': '>i8', 'fortran_order': False, 'shape': (%d,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': %d, }",
    "{'descr': '<u2', 'fortran_order': 7, 'shape': (), 'more': %d}",
    "{'descr': '<u2'}%d",
    "__import__('os').abort() or %d",
    "(" * 150 + "%d" + ")" * 150,
)


def _npy(header: str, payload: bytes, version: int) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + payload


def npz_members(rng: random.Random, data: bytes) -> bytes:
    """Write the archive again with one member of another header, size, name or content."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    action = rng.randrange(8)
    if action < 3:
        header = rng.choice(_HEADERS) % rng.choice((0, 1, 3, 8, 2**31, 2**62))
        content = _npy(header, content[rng.choice((0, 10, 64, 128)) :], rng.choice((1, 1, 2, 3, 9)))
    elif action < 5:
        content = rng.choice(BYTES)(rng, content)
    elif action == 5:
        content += bytes(rng.choice((1, 2**16, 2**25)))  # unpacks to far more than it takes
    elif action == 6:
        name = rng.choice(("../" + name, name.upper(), "counts", members[0][0], "x.npy"))
    members[at] = (name, content)
    if action == 7:
        members.insert(rng.randrange(len(members)), (name, rng.choice(members)[1]))
    out = io.BytesIO()
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new,
    ):
        warnings.simplefilter("ignore")  # of two members of one name
        for each, content in members:
            new.writestr(zipfile.ZipInfo(each), content, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return out.getvalue()


NPZ: tuple[Mutation, ...] = (npz_members, npz_members, npz_members)


# ---- SQLite


def sql_values(rng: random.Random, data: bytes) -> bytes:
    """Put values of any kind into a table's rows, leave rows out, put others in their place."""
    return _rewritten(rng, data, _spoil_rows)


def sql_schema(rng: random.Random, data: bytes) -> bytes:
    """Change the tables themselves."""
    return _rewritten(rng, data, _spoil_schema)


_FOLDER: list[Path] = []  # where a database is rewritten; set by whoever runs the mutations


def rewrite_in(folder: Path) -> None:
    """Set the folder in which databases are rewritten."""
    _FOLDER[:] = [folder]


def _rewritten(rng: random.Random, data: bytes, spoil: Callable[[random.Random, sqlite3.Connection], None]) -> bytes:
    path = _FOLDER[0] / "rewritten.db"
    path.write_bytes(data)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(
            "PRAGMA journal_mode = DELETE; PRAGMA synchronous = OFF; PRAGMA foreign_keys = OFF;"
            "PRAGMA ignore_check_constraints = ON; PRAGMA writable_schema = ON"
        )
        for _ in range(rng.choice((1, 1, 1, 3))):
            # What SQLite itself does not take, or what an earlier change has left nothing of.
            with suppress(sqlite3.Error, IndexError):
                spoil(rng, connection)
    return path.read_bytes()


def _tables(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]


def _sql_value(rng: random.Random) -> Any:
    number = rng.choice(HOSTILE_NUMBERS)
    text = rng.choice(
        (*HOSTILE_NAMES, "[1, 2", "{}", "[]", "null", '{"a": 1}', "1", "NaN", '{"up.weight": 5}', "[[1]]")
    )
    number = max(-(2**63), min(number, 2**63 - 1)) if isinstance(number, int) else number
    return rng.choice((number, number, text, None, b"", b"\xff\xfe", rng.randbytes(40)))


def _spoil_rows(rng: random.Random, connection: sqlite3.Connection) -> None:
    table = rng.choice(_tables(connection))
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    keys = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[5]]
    rows = connection.execute(f"SELECT {', '.join(keys)} FROM {table}").fetchall()
    if not rows:
        return
    which = " AND ".join(f"{key} IS ?" for key in keys)
    row, column, action = rng.choice(rows), rng.choice(columns), rng.randrange(10)
    if action < 5:
        connection.execute(f"UPDATE OR REPLACE {table} SET {column} = ? WHERE {which}", (_sql_value(rng), *row))
    elif action == 5:
        connection.execute(f"UPDATE OR IGNORE {table} SET {column} = ?", (_sql_value(rng),))
    elif action == 6:
        connection.execute(f"DELETE FROM {table} WHERE {which}", row)
    elif action == 7:
        connection.execute(f"DELETE FROM {table}")
    elif action == 8 and table == "distributions":
        (blob,) = connection.execute(f"SELECT data FROM {table} WHERE {which}", row).fetchone()
        spoiled = rng.choice((*NPZ, *BYTES))(rng, blob)
        connection.execute(f"UPDATE {table} SET data = ? WHERE {which}", (spoiled, *row))
    else:
        other = rng.choice(columns)
        connection.execute(f"UPDATE OR REPLACE {table} SET {column} = {other} WHERE {which}", row)


def _spoil_schema(rng: random.Random, connection: sqlite3.Connection) -> None:
    table = rng.choice(_tables(connection))
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    column = rng.choice(columns)
    connection.execute(
        rng.choice(
            (
                f"DROP TABLE {table}",
                f"ALTER TABLE {table} RENAME TO somebody",
                f"ALTER TABLE {table} RENAME COLUMN {column} TO somebody",
                f"ALTER TABLE {table} DROP COLUMN {column}",
                f"ALTER TABLE {table} ADD COLUMN somebody BLOB DEFAULT x'00'",
                f"CREATE VIEW somebody AS SELECT * FROM {table}",
                f"UPDATE sqlite_master SET sql = replace(sql, 'TEXT', 'BLOB') WHERE name = '{table}'",
                f"UPDATE sqlite_master SET rootpage = {rng.randrange(60)} WHERE name = '{table}'",
                f"UPDATE sqlite_master SET sql = 'CREATE TABLE {table} (x)' WHERE name = '{table}'",
                "UPDATE meta SET value = '" + rng.choice(("99", "-1", "three", "2", "\u0663", "3.0", "9" * 5000)) + "'",
                "PRAGMA user_version = 7",
                "PRAGMA application_id = 7",
            )
        )
    )


SQL: tuple[Mutation, ...] = (sql_values, sql_values, sql_values, sql_schema)


def mutate(seed: int, originals: tuple[bytes, ...], mutations: tuple[Mutation, ...]) -> bytes:
    """Return what this seed makes of one of the originals."""
    rng = random.Random(seed)
    original = rng.choice(originals)
    spoiled = rng.choice(mutations)(rng, original)
    return rng.choice(BYTES)(rng, spoiled) if spoiled and rng.random() < 0.1 else spoiled
