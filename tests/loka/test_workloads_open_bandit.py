import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loka.errors import ArgumentError, LokaError
from loka.workloads import open_bandit
from loka.workloads.open_bandit import ClickLog, batches, load_open_bandit, read_arrays, split_by_time

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def log() -> ClickLog:
    return load_open_bandit()


@pytest.fixture(scope="module")
def arrays() -> Mapping[str, np.ndarray]:
    return read_arrays()


def small_log(timestamps: list[int]) -> ClickLog:
    rows = len(timestamps)
    return ClickLog(
        categorical=torch.arange(rows).unsqueeze(1),
        dense=torch.zeros(rows, 1),
        click=torch.zeros(rows),
        timestamp=torch.tensor(timestamps),
        fields=("row",),
        cardinalities=(rows,),
        dense_fields=("zero",),
    )


def test_the_log_has_sixty_thousand_rows_and_the_published_click_rates(log, arrays):
    assert len(log) == 60_000
    for policy in range(2):
        for campaign in range(3):
            rows = (arrays["policy"] == policy) & (arrays["campaign"] == campaign)
            assert rows.sum() == 10_000
            assert 0.0038 <= arrays["click"][rows].mean() <= 0.0069
    assert log.click.sum() == 287
    assert log.click_rate == 287 / 60_000


def test_every_row_is_within_its_week_and_in_order(log):
    first, last = 1_574_553_600_000_000, 1_575_158_400_000_000  # 2019-11-24 and 2019-12-01, midnight UTC
    assert bool((log.timestamp.diff() >= 0).all())
    assert first <= log.timestamp[0] < log.timestamp[-1] < last


def test_every_id_fits_its_table_and_every_table_is_used_in_full(log):
    assert log.categorical.dtype == torch.int64
    assert len(log.fields) == len(log.cardinalities) == log.categorical.shape[1]
    for field, column, cardinality in zip(log.fields, log.categorical.T, log.cardinalities, strict=True):
        assert column.unique().tolist() == list(range(cardinality)), field
    sizes = dict(zip(log.fields, log.cardinalities, strict=True))
    users = [sizes[f"user_feature_{index}"] for index in range(4)]
    assert users == [3, 5, 9, 10]
    assert (sizes["item_id"], sizes["position"], sizes["policy"], sizes["hour"]) == (160, 3, 2, 24)


def test_item_features_belong_to_the_item_and_do_not_cross_campaigns(log):
    index = {field: position for position, field in enumerate(log.fields)}
    for field in ("item_feature_1", "item_feature_2", "item_feature_3"):
        pairs = log.categorical[:, [index["item_id"], index[field]]].unique(dim=0)
        assert len(pairs) == 160
        by_campaign = log.categorical[:, [index[field], index["campaign"]]].unique(dim=0)
        assert len(by_campaign) == log.cardinalities[index[field]]


def test_dense_features_equal_their_definition_on_rows_computed_by_hand(log, arrays):
    items = (80, 34, 46)
    checked = [0, 12_345, 59_999, *arrays["affinity_row"][:40].tolist()]
    for row in checked:
        of_user = arrays["affinity_row"] == row
        of_item = of_user & (arrays["affinity_item"] == arrays["item"][row])
        expected = (
            arrays["item_feature_0"][arrays["item"][row]],
            np.log1p(float(arrays["affinity_value"][of_item].sum())),
            np.log1p(float(arrays["affinity_value"][of_user].sum())),
            np.log(arrays["propensity"][row] * items[arrays["campaign"][row]]),
        )
        np.testing.assert_allclose(log.dense[row].numpy(), expected, rtol=1e-6, atol=1e-6)
    assert log.dense[:, log.dense_fields.index("item_affinity")].count_nonzero() == 79


def test_under_the_random_policy_every_item_is_equally_likely(log):
    random = log.categorical[:, log.fields.index("policy")] == open_bandit.POLICIES.index("random")
    assert log.dense[random, log.dense_fields.index("relative_propensity")].abs().max() < 1e-6


def test_the_bundled_file_is_small():
    assert (ROOT / "loka" / "workloads" / "data" / "open_bandit.npz").stat().st_size < 2_000_000


def test_a_single_changed_value_changes_the_content_hash(arrays):
    for name in open_bandit.ARRAYS:
        changed = dict(arrays)
        changed[name] = arrays[name].copy()
        changed[name].flat[-1] += 1
        assert open_bandit.content_sha256(changed) != open_bandit.CONTENT_SHA256, name
    assert open_bandit.content_sha256(arrays) == open_bandit.CONTENT_SHA256


def test_a_log_with_changed_clicks_is_refused_unless_told_otherwise(arrays, monkeypatch):
    changed = {**arrays, "click": 1 - arrays["click"]}
    monkeypatch.setattr(open_bandit, "read_arrays", lambda: changed)
    with pytest.raises(LokaError, match="content hash"):
        load_open_bandit()
    assert load_open_bandit(verify=False).click.sum() == 60_000 - 287


def test_a_log_of_another_shape_or_type_is_refused_by_name(arrays):
    with pytest.raises(LokaError, match="in click, item"):
        open_bandit.check_schema({**arrays, "click": arrays["click"][:-1], "item": arrays["item"].astype("<i4")})
    with pytest.raises(LokaError, match="in position"):
        open_bandit.check_schema({name: array for name, array in arrays.items() if name != "position"})


@pytest.mark.parametrize("content", [None, b"", b"not a zip file", b"PK\x03\x04cut"])
def test_a_missing_or_broken_file_says_what_to_do(content, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data" / "open_bandit.npz").write_bytes(content)
    monkeypatch.setattr(open_bandit.resources, "files", lambda _package: tmp_path)
    with pytest.raises(LokaError, match="Reinstall LoKA"):
        load_open_bandit()


def test_parts_are_disjoint_in_time_and_together_the_whole(log):
    train, validation, test = split_by_time(log)
    assert train.timestamp.max() < validation.timestamp.min()
    assert validation.timestamp.max() < test.timestamp.min()
    assert (len(train), len(validation), len(test)) == (42_000, 9_000, 9_000)
    assert torch.equal(torch.cat([part.categorical for part in (train, validation, test)]), log.categorical)
    assert train.cardinalities == test.cardinalities == log.cardinalities


def test_rows_of_equal_time_stay_in_one_part():
    parts = split_by_time(small_log([0, 1, 2, 2, 2, 2, 2, 3, 4, 5]), train=0.4, validation=0.4)
    assert [part.timestamp.tolist() for part in parts] == [[0, 1, 2, 2, 2, 2, 2], [3], [4, 5]]


@pytest.mark.parametrize(("train", "validation"), [(0.0, 0.5), (0.9, 0.1), (0.5, -0.1), (float("nan"), 0.1)])
def test_shares_that_leave_nothing_are_refused(train, validation):
    with pytest.raises(ArgumentError, match="sum to less than 1"):
        split_by_time(small_log(list(range(10))), train, validation)


def test_a_log_of_one_moment_cannot_be_split():
    with pytest.raises(ArgumentError, match="different times"):
        split_by_time(small_log([7] * 10))


def test_batches_without_a_seed_keep_the_order_of_time():
    rows = [categorical.flatten().tolist() for categorical, _, _ in batches(small_log(list(range(10))), 4)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]
    kept = [len(click) for _, _, click in batches(small_log(list(range(10))), 4, drop_last=False)]
    assert kept == [4, 4, 2]


def test_batches_with_a_seed_are_a_reproducible_permutation_of_whole_rows(log):
    part = log.part(0, 1_000)
    numbered = replace(part, categorical=torch.arange(1_000).unsqueeze(1))
    orders = []
    for seed in (3, 3, 4):
        rows = list(batches(numbered, 100, seed=seed))
        for row, dense, click in rows:
            assert torch.equal(dense, part.dense[row.flatten()])
            assert torch.equal(click, part.click[row.flatten()])
        orders.append([index for row, _, _ in rows for index in row.flatten().tolist()])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(1_000))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_that_the_log_cannot_fill_is_refused_at_once(batch_size):
    with pytest.raises(ArgumentError, match="batch_size"):
        batches(small_log(list(range(10))), batch_size)


@pytest.mark.third_party
@pytest.mark.skipif(importlib.util.find_spec("obp") is None, reason="the obp package, the source of the log, is absent")
def test_the_bundle_equals_what_the_published_package_holds():
    script = ROOT / "scripts" / "build_open_bandit.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
