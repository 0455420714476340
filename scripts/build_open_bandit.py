"""Rebuild loka/workloads/data/open_bandit.npz from the package that publishes the Open Bandit log.

    pip install --no-deps obp==0.4.1
    python scripts/build_open_bandit.py            # write the file
    python scripts/build_open_bandit.py --check    # write nothing; exit 1 unless package, file and constant agree

Only the CSV files of the package are read; it is never imported. The result is the same on every machine.
"""

import argparse
import csv
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loka.workloads import open_bandit
from loka.workloads.open_bandit import ARRAYS, CAMPAIGNS, CONTENT_SHA256, POLICIES

Array = NDArray[Any]

OUTPUT = Path(__file__).parents[1] / "loka" / "workloads" / "data" / "open_bandit.npz"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NUM_USER_FEATURES = 4
ITEM_FEATURES = ("item_feature_1", "item_feature_2", "item_feature_3")


def source_folder() -> Path:
    """Return the folder of the log inside the installed obp package."""
    spec = importlib.util.find_spec("obp")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The package obp is not installed here. Run: pip install --no-deps obp==0.4.1")
    return Path(spec.submodule_search_locations[0]) / "dataset" / "obd"


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of one file."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def by_first_appearance(values: Iterable[str]) -> list[int]:
    """Return the code of each value, numbered from 0 in order of first appearance."""
    codes: dict[str, int] = {}
    return [codes.setdefault(value, len(codes)) for value in values]


def build_items(folder: Path) -> dict[str, Array]:
    """Return the item arrays, campaign after campaign."""
    campaign: list[int] = []
    feature_0: list[float] = []
    features: list[list[int]] = []
    offsets = [0] * len(ITEM_FEATURES)
    for index, name in enumerate(CAMPAIGNS):
        contexts = [read_csv(folder / policy / name / "item_context.csv") for policy in POLICIES]
        coded = [[by_first_appearance(row[key] for row in context) for key in ITEM_FEATURES] for context in contexts]
        if coded[0] != coded[1] or any(int(row["item_id"]) != i for c in contexts for i, row in enumerate(c)):
            sys.exit(f"The items of campaign {name} differ between the policies: this is not the log of obp 0.4.1.")
        campaign += [index] * len(contexts[0])
        feature_0 += [float(row["item_feature_0"]) for row in contexts[0]]
        features += [
            [code + offset for code, offset in zip(codes, offsets, strict=True)]
            for codes in zip(*coded[0], strict=True)
        ]
        offsets = [max(column) + 1 for column in zip(*features, strict=True)]
    return {
        "item_campaign": np.array(campaign),
        "item_feature_0": np.array(feature_0),
        "item_features": np.array(features),
    }


def read_rows(folder: Path) -> list[tuple[int, int, dict[str, str]]]:
    """Return (policy, campaign, row) of all impressions in order of time."""
    rows = [
        (policy, campaign, row)
        for policy, policy_name in enumerate(POLICIES)
        for campaign, name in enumerate(CAMPAIGNS)
        for row in read_csv(folder / policy_name / name / f"{name}.csv")
    ]
    return sorted(rows, key=lambda entry: entry[2]["timestamp"])  # equally long ISO times; the sort is stable


def user_codes(rows: Sequence[dict[str, str]]) -> Array:
    """Return the user features [rows, 4], each hash as its rank."""
    columns = []
    for index in range(NUM_USER_FEATURES):
        values = [row[f"user_feature_{index}"] for row in rows]
        rank = {value: code for code, value in enumerate(sorted(set(values)))}
        columns.append([rank[value] for value in values])
    return np.array(columns).T


def affinities(rows: Sequence[dict[str, str]], first_item: Sequence[int]) -> dict[str, Array]:
    """Return the non-zero user-item affinities as triples. `first_item` is the offset of each row's campaign."""
    prefix = "user-item_affinity_"
    triples = [
        (index, first_item[index] + int(key.removeprefix(prefix)), float(value))
        for index, row in enumerate(rows)
        for key, value in row.items()
        if key.startswith(prefix) and float(value) != 0.0
    ]
    row, item, value = (np.array(column) for column in zip(*triples, strict=True))
    return {"affinity_row": row, "affinity_item": item, "affinity_value": value}


def build(folder: Path) -> dict[str, Array]:
    """Return all arrays of the bundle, in the order and with the dtypes of ARRAYS."""
    items = build_items(folder)
    entries = read_rows(folder)
    rows = [row for _, _, row in entries]
    campaign = np.array([campaign for _, campaign, _ in entries])
    offset = np.searchsorted(items["item_campaign"], campaign)
    arrays = {
        "timestamp_us": np.array(
            [(datetime.fromisoformat(row["timestamp"]) - EPOCH) // timedelta(microseconds=1) for row in rows]
        ),
        "policy": np.array([policy for policy, _, _ in entries]),
        "campaign": campaign,
        "item": np.array([int(row["item_id"]) for row in rows]) + offset,
        "position": np.array([int(row["position"]) for row in rows]),
        "click": np.array([int(row["click"]) for row in rows]),
        "propensity": np.array([float(row["propensity_score"]) for row in rows]),
        "user_features": user_codes(rows),
        **affinities(rows, offset.tolist()),
        **items,
    }
    return narrowed(arrays)


def narrowed(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Cast to the dtypes of ARRAYS; stop where that would change a value."""
    small = {name: arrays[name].astype(dtype) for name, (dtype, _) in ARRAYS.items()}
    for name, array in small.items():
        if not np.array_equal(array, arrays[name]):
            sys.exit(f"{name} does not fit {array.dtype}: this is not the log of obp 0.4.1.")
    return small


def main() -> None:
    """Write or check the bundle."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled Open Bandit log from the installed obp package.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; compare package, bundled file and constant"
    )
    check = parser.parse_args().check
    arrays = build(source_folder())
    open_bandit.check_schema(arrays)
    digests = {"package": open_bandit.content_sha256(arrays)}
    if check:
        digests["bundled file"] = open_bandit.content_sha256(open_bandit.read_arrays())
    else:
        OUTPUT.parent.mkdir(exist_ok=True)
        columns: dict[str, Any] = dict(arrays)  # numpy types its flags and the arrays as one **kwargs
        np.savez_compressed(OUTPUT, **columns)
        print(f"wrote {OUTPUT}, {OUTPUT.stat().st_size:,} bytes")
    for source, digest in digests.items():
        print(f"{digest}  {source}")
    if any(digest != CONTENT_SHA256 for digest in digests.values()):
        sys.exit(f"{CONTENT_SHA256}  is what loka/workloads/open_bandit.py expects: the contents differ.")


if __name__ == "__main__":
    main()
