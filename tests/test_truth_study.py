"""The arithmetic of the study benchmarks/truth, on made-up rows whose figures are known."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.truth.collect import TRUTH_ROWS, collect
from benchmarks.truth.judge import FLOOR, actual, gap, gaps, judge, prediction, variation
from benchmarks.truth.materials import MATERIALS, Material, Split, missing
from benchmarks.truth.promises import coverage, false_safe, judge_promises, promises
from benchmarks.truth.roads import OBSERVATIONS
from benchmarks.truth.rows import Collected, Cost, Row, load

ROW = Row(
    material="made",
    split="exchangeable",
    site="layer",
    product="fprop",
    recipe="rowwise",
    op="mm",
    m=256,
    n=64,
    k=64,
    group="body",
    gate="row_error",
    hard=False,
    early=(0.02,) * 8,
    early_full=(0.021,) * 8,
    later=(0.025,) * 12,
    later_mere=(0.1, 0.3) * 6,
    predictions={"guess": 0.03},
)


def noisy(number: int, seed: int = 0, spread: float = 0.05) -> list[Row]:
    """Rows whose early and later errors come from one log-normal distribution."""
    generator = np.random.default_rng(seed)
    return [
        replace(
            ROW,
            site=f"layer{index}",
            early=tuple(0.02 * np.exp(spread * generator.standard_normal(8))),
            later=tuple(0.02 * np.exp(spread * generator.standard_normal(12))),
        )
        for index in range(number)
    ]


def test_a_gap_is_predicted_over_actual_minus_one() -> None:
    assert actual(ROW) == pytest.approx(0.025)
    assert gap(ROW, "direct") == pytest.approx(0.02 / 0.025 - 1)
    assert gap(ROW, FLOOR) == pytest.approx(0.021 / 0.025 - 1)
    assert gap(ROW, "guess") == pytest.approx(0.03 / 0.025 - 1)
    assert math.isnan(gap(ROW, "a road that does not lead here"))
    assert math.isnan(gap(replace(ROW, later=(0.0, 0.0)), "direct"))


def test_steps_without_a_number_do_not_count() -> None:
    row = replace(ROW, early=(0.02, math.nan, 0.04), later=(math.nan, 0.02))
    assert prediction(row, "direct") == pytest.approx(0.03)
    assert actual(row) == pytest.approx(0.02)


def test_gaps_name_the_worst_row() -> None:
    rows = [
        replace(ROW, site=site, predictions={"guess": 0.025 * factor})
        for site, factor in (("a", 1.01), ("b", 0.7), ("c", 1.02))
    ]
    found = gaps(rows, "guess")
    assert (found["rows"], found["worst_at"]) == (3, "made: b, fprop, rowwise")
    assert found["median"] == pytest.approx(0.02)
    assert found["worst"] == pytest.approx(0.3)


def test_a_coefficient_of_variation_is_free_of_units() -> None:
    assert variation([1.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert variation([10.0, 20.0, 30.0]) == pytest.approx(0.5)
    assert math.isnan(variation([1.0]))


def test_saturating_recipes_are_pooled_with_none() -> None:
    rows = [
        ROW,
        replace(ROW, recipe="mxfp8_floor", early=(0.05,) * 8),
        replace(ROW, group="head", early=(0.9,) * 8),
    ]
    collected = Collected(material="made", split="exchangeable", step_s=1.0, rows=tuple(rows), costs=())
    tables = judge([collected])["gaps, exchangeable"]
    assert tables["by_pass"]["fprop"]["direct"]["rows"] == 1
    assert tables["by_pass"]["fprop"]["direct"]["worst"] == pytest.approx(0.2)
    assert tables["by_pass_and_recipe"]["fprop mxfp8_floor"]["direct"]["worst"] == pytest.approx(1.0)


def test_ranks_are_taken_within_a_material() -> None:
    def of(material: str, levels: list[float], order: list[float]) -> list[Row]:
        return [
            replace(ROW, material=material, site=str(index), later=(level,) * 12, predictions={"guess": guess})
            for index, (level, guess) in enumerate(zip(levels, order, strict=True))
        ]

    levels = [0.01 * (index + 1) for index in range(8)]
    rows = of("right", levels, levels) + of("wrong", levels, levels[::-1])
    found = judge([Collected(material="x", split="exchangeable", step_s=1.0, rows=tuple(rows), costs=())])
    assert found["spearman, exchangeable"]["fprop rowwise"]["guess"] == {
        "materials": 2,
        "median": pytest.approx(0.0),
        "lowest": pytest.approx(-1.0),
    }


def test_costs_are_summed_over_products_and_given_in_plain_steps() -> None:
    cost = Cost(material="made", split="exchangeable", product="fprop", name="direct", per_step_s=0.5, once_s=0.1)
    collected = Collected(material="made", split="exchangeable", step_s=2.0, rows=(ROW,), costs=(cost, cost))
    assert judge([collected])["costs"]["made"]["direct"] == pytest.approx(
        {"per sampled step, s": 1.0, "in plain steps": 0.5, "once, s": 0.2}
    )


def test_intervals_of_one_row_cover_as_often_as_they_say() -> None:
    found = [promise for row in noisy(400) for promise in promises([row], confidence=0.95)]
    figures = coverage(found)
    assert figures["two_sample"] == pytest.approx(0.95, abs=0.03)
    assert figures["later steps above the tolerance bound"] < 0.01
    assert figures["rows with a later mean above it"] == 0


def test_a_family_promises_more_than_a_single_row() -> None:
    rows = noisy(50)
    together = promises(rows, confidence=0.95)
    alone = [promise for row in rows for promise in promises([row], confidence=0.95)]
    assert all(one.upper > other.upper for one, other in zip(together, alone, strict=True))
    assert coverage(together)["interval has the later mean"] == 1.0


def test_false_safe_counts_rows_above_the_bound_that_were_called_safe() -> None:
    drifted = [replace(row, later=tuple(3 * value for value in row.later)) for row in noisy(20)]
    found = promises(noisy(20, seed=1) + drifted, confidence=0.95)
    figures = false_safe(found)
    bound = figures["bound 0.05"]
    assert (bound["safe"], bound["admissible"], bound["false_safe"]) == (40, 20, 20)
    assert figures["tightest"]["false_safe"] == 20
    assert figures["bound 0.01"]["safe"] == 0


def test_rows_with_too_few_early_steps_promise_nothing() -> None:
    assert promises([replace(ROW, early=(0.02,) * 7)], confidence=0.95) == []
    assert "coverage" not in " ".join(judge_promises([]))


def test_collected_rows_survive_a_file(tmp_path: Path) -> None:
    cost = Cost(material="made", split="domain", product="wgrad", name="direct", per_step_s=0.5, once_s=0.1)
    collected = Collected(
        material="made",
        split="domain",
        step_s=1.0,
        rows=(replace(ROW, later=(math.nan, 0.1)), ROW),
        costs=(cost,),
    )
    collected.save(tmp_path / "rows.json")
    again = load(tmp_path / "rows.json")
    assert again.costs == collected.costs
    assert again.rows[1] == ROW
    assert math.isnan(again.rows[0].later[0])


def test_collecting_measures_every_product_of_every_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch)
        return out.square().mean()

    split = Split(
        early=tuple(torch.randn(TRUTH_ROWS, 32) for _ in range(2)),
        later=tuple(torch.randn(TRUTH_ROWS, 32) for _ in range(3)),
    )
    material = Material(name="made", model=model, loss=loss, splits={"exchangeable": split}, hard=("0",))
    steps = []
    found = collect(material, "exchangeable", (), lambda: steps.append(1))
    assert len(steps) == 5
    assert {(row.site, row.product, row.group) for row in found.rows} == {
        ("0", "fprop", "body"),
        ("0", "wgrad", "body"),
        ("2", "fprop", "head"),
        ("2", "dgrad", "exact"),
        ("2", "wgrad", "head"),
    }
    for row in found.rows:
        assert (len(row.early), len(row.early_full), len(row.later)) == (2, 2, 3)
        assert row.hard == (row.site == "0")
    rowwise = next(row for row in found.rows if row.site == "0" and row.recipe == "rowwise")
    assert 0.01 < actual(rowwise) < 0.06
    assert abs(gap(rowwise, "direct")) < 0.1


def test_every_road_leads_to_the_truth_where_the_data_are_as_simple_as_it_assumes() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 48, bias=False)
    nn.init.normal_(layer.weight, generator=generator)
    model = nn.Sequential(layer)
    batches = [torch.randn(256, 64, generator=generator) for _ in range(4)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch)
        return (out * torch.randn(256, 48, generator=generator)).sum()

    splits = {"exchangeable": Split(early=tuple(batches[:2]), later=tuple(batches[2:]))}
    material = Material(name="made", model=model, loss=loss, splits=splits)
    found = collect(material, "exchangeable", tuple(OBSERVATIONS), lambda: None)
    roads = {road for row in found.rows for road in row.predictions}
    assert len(roads) == 6
    for row in found.rows:
        named = roads - {"closed form x alignment"} if row.recipe == "mxfp8_floor" else roads
        assert set(row.predictions) == named - ({"gaussian, matrix normal"} if row.product == "wgrad" else set())
        for road in row.predictions:
            assert abs(gap(row, road)) < 0.1, (row.product, row.recipe, road)
    assert {cost.name for cost in found.costs} == roads | {"direct", *OBSERVATIONS}


def test_a_missing_package_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MATERIALS, "made", replace(MATERIALS["wukong"], packages=("no_such_package",)))
    assert "no_such_package" in missing("made")
    assert "pip install --no-deps -r requirements/truth.txt" in missing("made")
    assert missing("wukong") == ""
