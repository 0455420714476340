"""The Open Bandit click log: 60,000 real impressions of fashion banners on ZOZOTOWN, 0.48 % of them clicked.

Three campaigns (all, men, women) under two policies (random, bts), 10,000 impressions each, over one week of November
2019; CC BY 4.0, see NOTICE. The bundled `data/open_bandit.npz` keeps every column of the six source files, in small
types. Three things differ from the sources:

- user features are hashes there and the rank of the hash here; the hashes are the same in all files;
- item features are hashes there too, salted per file. Here they are numbered by first appearance over the items of a
  campaign, which makes the two policies of one campaign agree. Items of different campaigns cannot be matched, so
  item ids and feature codes run on from campaign to campaign;
- user-item affinities, 99.94 % of them zero, are stored as (row, item, value) triples.

There are 287 clicks in all, too few to learn much that generalises. On the validation part, neither Wukong nor a
regularised logistic regression beats the constant click rate (normalized entropy above 1 for every setting tried),
while the loss of the train part falls. So the log serves real operand distributions and comparing the numerics of one
training with another's; it cannot rank models.

`scripts/build_open_bandit.py` rebuilds the file from the package that publishes the log.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loka.errors import ArgumentError, LokaError

Array = NDArray[Any]

POLICIES = ("random", "bts")
CAMPAIGNS = ("all", "men", "women")

NUM_ROWS = 60_000
NUM_ITEMS = 160  # 80 + 34 + 46, campaign by campaign
NUM_AFFINITIES = 3_124

# Everything in the file, in the order it is hashed in: name -> (dtype, shape). Rows are sorted by time.
ARRAYS: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType(
    {
        "timestamp_us": ("<i8", (NUM_ROWS,)),  # since 1970, UTC
        "policy": ("|u1", (NUM_ROWS,)),  # index into POLICIES
        "campaign": ("|u1", (NUM_ROWS,)),  # index into CAMPAIGNS
        "item": ("|u1", (NUM_ROWS,)),  # index into the item_* arrays
        "position": ("|u1", (NUM_ROWS,)),  # 1 left, 2 centre, 3 right
        "click": ("|u1", (NUM_ROWS,)),
        "propensity": ("<f8", (NUM_ROWS,)),  # probability with which the policy showed this item at this position
        "user_features": ("|u1", (NUM_ROWS, 4)),
        "affinity_row": ("<i4", (NUM_AFFINITIES,)),
        "affinity_item": ("|u1", (NUM_AFFINITIES,)),
        "affinity_value": ("|u1", (NUM_AFFINITIES,)),
        "item_campaign": ("|u1", (NUM_ITEMS,)),
        "item_feature_0": ("<f8", (NUM_ITEMS,)),  # standardised by the publisher, per campaign
        "item_features": ("|u1", (NUM_ITEMS, 3)),  # item_feature_1 to item_feature_3 of the sources
    }
)
CONTENT_SHA256 = "e7d6dc27530737d77dbab57e9c6028d579d8d134d73e1f5c825312ff22be47ba"

_FIELDS = (
    *(f"user_feature_{index}" for index in range(4)),
    "item_id",
    "position",
    *(f"item_feature_{index}" for index in range(1, 4)),
    "campaign",
    "policy",
    # No weekday: the log is one week long, so the weekdays of the test part never occur in the train part.
    "hour",
)
_DENSE_FIELDS = ("item_feature_0", "item_affinity", "total_affinity", "relative_propensity")
_HOUR_US = 3_600_000_000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClickLog:
    """Impressions in order of time."""

    categorical: Tensor  # int64 [rows, fields]
    dense: Tensor  # float32 [rows, dense fields]
    click: Tensor  # float32 [rows], 0 or 1
    timestamp: Tensor  # int64 [rows], microseconds since 1970, UTC
    fields: tuple[str, ...]
    cardinalities: tuple[int, ...]  # of each field, the same for every part of a log
    dense_fields: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.click)

    @property
    def click_rate(self) -> float:
        """Share of impressions that were clicked."""
        return self.click.double().mean().item()

    def part(self, start: int, stop: int) -> "ClickLog":
        """Return rows `start` to `stop` as views."""
        return ClickLog(
            categorical=self.categorical[start:stop],
            dense=self.dense[start:stop],
            click=self.click[start:stop],
            timestamp=self.timestamp[start:stop],
            fields=self.fields,
            cardinalities=self.cardinalities,
            dense_fields=self.dense_fields,
        )


def load_open_bandit(*, verify: bool = True) -> ClickLog:
    """Return the bundled log. `verify` compares the content with the hash it was published with (some milliseconds)."""
    arrays = read_arrays()
    if verify and (digest := content_sha256(arrays)) != CONTENT_SHA256:
        raise LokaError(
            f"The bundled Open Bandit log has content hash {digest}, and {CONTENT_SHA256} was expected. Only the "
            "published log can be loaded. Reinstall LoKA, or rebuild the file with scripts/build_open_bandit.py."
        )
    categorical = _categorical(arrays)
    return ClickLog(
        categorical=torch.from_numpy(categorical),
        dense=torch.from_numpy(_dense(arrays)),
        click=torch.from_numpy(arrays["click"].astype(np.float32)),
        timestamp=torch.from_numpy(arrays["timestamp_us"].astype(np.int64)),
        fields=_FIELDS,
        # All values of every field occur in the log, so the largest id tells the cardinality.
        cardinalities=tuple(int(largest) + 1 for largest in categorical.max(axis=0)),
        dense_fields=_DENSE_FIELDS,
    )


def split_by_time(log: ClickLog, train: float = 0.7, validation: float = 0.15) -> tuple[ClickLog, ClickLog, ClickLog]:
    """Return (train, validation, test), each strictly earlier than the next; test is the rest.

    `train` and `validation` are shares of the rows, met up to rows of equal time, which stay together.
    """
    if not (train > 0.0 and validation > 0.0 and train + validation < 1.0):
        raise ArgumentError(
            f"split_by_time got train={train} and validation={validation}. Both must be positive and leave something "
            "for the test part. Choose shares that sum to less than 1."
        )
    cuts = [_cut(log.timestamp, round(len(log) * share)) for share in (train, train + validation)]
    parts = (log.part(0, cuts[0]), log.part(cuts[0], cuts[1]), log.part(cuts[1], len(log)))
    if not all(len(part) for part in parts):
        raise ArgumentError(
            f"split_by_time cannot cut {len(log)} rows into three parts of different times: they have "
            f"{tuple(len(part) for part in parts)} rows. Pass a longer log or other shares."
        )
    return parts


def batches(
    log: ClickLog, batch_size: int, *, seed: int | None = None, drop_last: bool = True
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (categorical, dense, click) once through the log: in order of time, or shuffled where a seed is given.

    Pass another seed for every epoch. `drop_last` leaves out an incomplete last batch.
    """
    if batch_size < 1 or (drop_last and batch_size > len(log)):
        raise ArgumentError(
            f"batches got batch_size={batch_size} for a log of {len(log)} rows. At least 1 and, with drop_last, at "
            "most the rows of the log are possible. Pass a smaller batch, or drop_last=False."
        )
    return _batches(log, batch_size, seed, drop_last)


def read_arrays() -> dict[str, Array]:
    """Return the arrays of the bundled file as they are stored. LokaError where the file is missing or malformed."""
    source = resources.files("loka.workloads") / "data" / "open_bandit.npz"
    try:
        with source.open("rb") as stream, np.load(stream, allow_pickle=False) as bundle:
            arrays = {name: bundle[name] for name in bundle.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LokaError(
            f"The bundled Open Bandit log {source} cannot be read: {error}. It is part of every LoKA installation. "
            "Reinstall LoKA, or rebuild the file with scripts/build_open_bandit.py."
        ) from error
    check_schema(arrays)
    return arrays


def check_schema(arrays: Mapping[str, Array]) -> None:
    """Raise LokaError unless names, dtypes and shapes are those of ARRAYS."""
    found = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    if found != dict(ARRAYS):
        wrong = sorted(name for name in found.keys() | ARRAYS.keys() if found.get(name) != ARRAYS.get(name))
        raise LokaError(
            f"The Open Bandit log differs from its schema in {', '.join(wrong)}. Only the published content can be "
            "loaded. Reinstall LoKA, or rebuild the file with scripts/build_open_bandit.py."
        )


def content_sha256(arrays: Mapping[str, Array]) -> str:
    """Return the SHA-256 over name and bytes of every array, in the order of ARRAYS; zip compression plays no part."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _categorical(arrays: Mapping[str, Array]) -> NDArray[np.int64]:
    item = arrays["item"]
    hour = arrays["timestamp_us"] // _HOUR_US % 24
    columns = (
        *arrays["user_features"].T,
        item,
        arrays["position"] - 1,
        *arrays["item_features"][item].T,
        arrays["campaign"],
        arrays["policy"],
        hour,
    )
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def _dense(arrays: Mapping[str, Array]) -> NDArray[np.float32]:
    item = arrays["item"]
    row, value = arrays["affinity_row"], arrays["affinity_value"].astype(np.float64)
    total_affinity = np.bincount(row, weights=value, minlength=NUM_ROWS)
    of_shown = value * (arrays["affinity_item"] == item[row])
    item_affinity = np.bincount(row, weights=of_shown, minlength=NUM_ROWS)
    items_in_campaign = np.bincount(arrays["item_campaign"])[arrays["campaign"]]
    columns = (
        arrays["item_feature_0"][item],
        np.log1p(item_affinity),
        np.log1p(total_affinity),
        np.log(arrays["propensity"] * items_in_campaign),  # 0 under the random policy
    )
    return np.stack(columns, axis=1).astype(np.float32)


def _cut(timestamp: Tensor, index: int) -> int:
    """Return the first index at or after `index` whose time differs from that of the row before it."""
    if index == 0 or index >= len(timestamp):
        return min(index, len(timestamp))
    return int(torch.searchsorted(timestamp, timestamp[index - 1].item(), right=True))


def _batches(
    log: ClickLog, batch_size: int, seed: int | None, drop_last: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    order = None if seed is None else torch.randperm(len(log), generator=torch.Generator().manual_seed(seed))
    stop = len(log) - len(log) % batch_size if drop_last else len(log)
    for start in range(0, stop, batch_size):
        rows = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        yield log.categorical[rows], log.dense[rows], log.click[rows]
