"""What the probe says of experts, routers and shared experts of transformers' families, against what their step holds.

The weights were trained here (`made_moe_families`). One batch of unseen text is probed again and again with weights
that stay as they are, so every figure of an expert is that of one step, which is computed once more from the tensors of
that step, in float64 and with casts that are not ours.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import loka
from loka.formats import PASSES
from loka.probes.experts.layers import parts_of
from loka.probes.experts.statistics import MIN_MEASURED
from loka.probes.judging.evidence import RunEvidence, load_evidence
from loka.probes.records import StepRecord
from loka.probes.storing.database import open_database, read_steps
from loka.reports.experts import expert_notes
from loka.reports.record import build_report
from loka.torch_release import release
from tests.made_expert_products import Slice, captured
from tests.made_moe_families import EXPERTS, FAMILIES, SIZES, STEPS, batches, trained, training_losses

pytestmark = pytest.mark.third_party("transformers")

RECIPES = ("tensorwise", "rowwise")
# Experts are measured a few at a time; what has none in a stack is there as a whole each time.
PROBED, PROBED_WHOLE = 16, 3
TOKENS = 10
STACKED = tuple(name for name in FAMILIES if name != "Switch")
# A cast that lands on the other side of a tie moves the mean over few rows by so much.
CLOSE = 5e-3


@dataclass(frozen=True)
class Probed:
    """A family, what the probe has found of it, and the products of the same step."""

    layers: dict[str, list[Slice]]  # by parameter
    evidence: RunEvidence
    steps: list[StepRecord]
    report: dict[str, Any]


@pytest.fixture(scope="module", params=FAMILIES)
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    return _probed(request.param, tmp_path_factory.mktemp("experts") / "run.db")


def _probed(family: str, path: Path) -> Probed:
    model, batch = trained(family).eval(), batches(1, TOKENS)[0].contiguous()
    layers = captured(model, batch)
    with loka.probe(model, path, every=1, overhead=1000.0, recipes=list(RECIPES)):
        for _ in range(PROBED if family in STACKED else PROBED_WHOLE):
            model(input_ids=batch, labels=batch).loss.backward()
            model.zero_grad()
    evidence = load_evidence(str(path))
    engine = open_database(path, create=False)
    steps = list(read_steps(engine))
    engine.dispose()
    report = dict(build_report(evidence, loka.Bound(row_error=0.05)))
    return Probed(
        {name: layers[name] for name in parts_of(evidence.info.fingerprint) if name in layers}, evidence, steps, report
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_were_trained(family: str) -> None:
    losses = training_losses(family)
    assert len(losses) == STEPS
    # A uniform guess costs 5.5 nats per byte; torch 2.11 comes to 3.64.
    assert losses[0] > 5.3
    assert sum(losses[-5:]) / 5 < (3.5 if release() >= (2, 13) else 4)


def test_every_part_of_a_layer_is_told(probed: Probed) -> None:
    parts = parts_of(probed.evidence.info.fingerprint)
    names = {part: [name for name, own in parts.items() if own == part] for part in ("router", "expert", "shared")}
    assert names["router"]
    assert names["expert"]
    routers = [name for name in probed.layers if parts[name] == "router"]
    assert all(probed.layers[name][0].weight.shape[0] == EXPERTS for name in routers)
    for row in probed.report["sites"]:
        assert row["part"] == parts.get(row["parameter"])
        assert ("experts" in row) == (row["part"] == "expert" and probed.layers[row["parameter"]][1:] != [])


def stacks(probed: Probed) -> list[tuple[str, str, list[Slice]]]:
    layers = {name: slices for name, slices in probed.layers.items() if len(slices) > 1}
    return [(name, product, slices) for (name, slices), product in itertools.product(layers.items(), PASSES)]


def tokens_of(slices: list[Slice]) -> list[int]:
    return [len(each.x[each.own]) for each in slices]


def test_tokens_are_counted_for_every_expert_and_those_without_any_are_named(probed: Probed) -> None:
    for name, product, slices in stacks(probed):
        found, tokens = probed.evidence.experts[name, product], tokens_of(slices)
        assert (found.tokens / found.steps).tolist() == tokens, (name, product)
        assert found.idle == tuple(expert for expert, count in enumerate(tokens) if not count)
        assert found.idle  # a batch of ten tokens leaves some out
        assert found.imbalance == pytest.approx(max(tokens) * len(tokens) / sum(tokens))
        (row,) = [each for each in probed.report["sites"] if (each["site"], each["pass"]) == (name, product)]
        assert row["experts"]["idle"] == list(found.idle)
        assert row["experts"]["tokens"] == tokens


def test_experts_of_their_own_that_ran_in_no_step_are_named(probed: Probed) -> None:
    numbered = {name for name in probed.evidence.info.fingerprint if ".experts.expert_" in name}
    unseen = probed.report["run"].get("unseen_experts", {})
    assert bool(unseen) == bool(numbered)
    for layer, experts in unseen.items():
        ran = {expert for expert in range(EXPERTS) if f"{layer}.expert_{expert}.wi.weight" in probed.layers}
        assert 0 < len(ran) < EXPERTS
        assert experts == sorted(set(range(EXPERTS)) - ran)
        listed = ", ".join(map(str, experts[:5]))
        assert any(f"{layer}: {len(experts)} ({listed}" in note for note in expert_notes(probed.report))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_error_of_every_expert_is_that_of_its_own_product(probed: Probed, recipe: str) -> None:
    for name, product, slices in stacks(probed):
        found = probed.evidence.experts[name, product]
        busy = {expert for expert, count in enumerate(tokens_of(slices)) if count}
        at = found.recipes.index(recipe)
        measured = {expert for expert in busy if found.measured[expert, at] >= MIN_MEASURED}
        errors = {each.expert: each for each in found.errors(recipe)}
        assert set(errors) == measured, (name, product)
        assert len(measured) >= min(len(busy), 4)
        right = {expert: slices[expert].error(product, recipe)[0] for expert in busy}
        for expert, each in errors.items():
            assert each.mean == pytest.approx(right[expert], rel=CLOSE, abs=1e-6), (name, product, expert)
            assert each.worst == pytest.approx(each.mean, rel=1e-5, abs=1e-6)  # the same step each time
        rare = [right[expert] for expert in busy - measured]
        pooled = found.pooled(recipe)
        assert (pooled is None) == (not rare)
        if pooled is not None and pooled.samples:
            assert min(rare) * (1 - CLOSE) <= pooled.mean <= max(rare) * (1 + CLOSE)
        worst = max(measured, key=lambda expert: right[expert])
        (row,) = [each for each in probed.report["sites"] if (each["site"], each["pass"]) == (name, product)]
        (told,) = [each for each in row["experts"]["recipes"] if each["recipe"] == recipe]
        assert right[told["worst"]["expert"]] == pytest.approx(right[worst], rel=CLOSE)
        assert told["worst"]["row_error"]["mean"] == pytest.approx(right[worst], rel=CLOSE, abs=1e-6)


def test_the_error_of_a_layer_is_that_of_all_rows_of_the_experts_measured_in_a_step(probed: Probed) -> None:
    """Four experts are measured in a step: their rows together, of one such choice or another."""
    compared = 0
    for name, product, slices in stacks(probed):
        busy = [each for each in slices if len(each.x[each.own])]
        for recipe in RECIPES:
            each_own = [each.error(product, recipe) for each in busy]
            totals = [
                sum(error * rows for error, rows in some) / sum(rows for _, rows in some)
                for some in itertools.combinations(each_own, min(4, len(busy)))
            ]
            for step in probed.steps:
                for record in step.products:
                    if (record.site, record.product) == (name, product) and record.errors:
                        error = record.errors[recipe].row_error
                        assert any(math.isclose(error, total, rel_tol=CLOSE, abs_tol=1e-6) for total in totals), name
                        compared += 1
    assert compared or not stacks(probed)


def test_routers_shared_experts_and_experts_of_their_own_have_their_own_errors(probed: Probed) -> None:
    """Of Switch, that is every expert: a linear layer each."""
    found = {(each.site, each.product): each for each in probed.evidence.products}
    compared = set()
    for name, slices in probed.layers.items():
        if len(slices) > 1:
            continue
        for product, recipe in itertools.product(PASSES, RECIPES):
            evidence = found[name.removesuffix(".weight"), product]
            (own,) = [each for each in evidence.recipes if each.recipe == recipe]
            if product == "wgrad" and len(slices[0].x) == 1:
                assert math.isnan(own.error.mean)  # a reduction of length 1 shows nothing
                continue
            right = slices[0].error(product, recipe)[0]
            assert own.error.mean == pytest.approx(right, rel=CLOSE), (name, product)
            compared.add(parts_of(probed.evidence.info.fingerprint)[name])
    assert "router" in compared


def test_totals_of_a_layer_are_those_of_its_experts(probed: Probed) -> None:
    for name, _, slices in stacks(probed):
        fprop = next(each for each in probed.evidence.products if (each.site, each.product) == (name, "fprop"))
        tokens = sum(tokens_of(slices))
        rows = TOKENS * EXPERTS if fprop.op == "bmm" else tokens  # the one sends every token through every expert
        assert fprop.m * fprop.batch == rows
        assert tokens == TOKENS * (1 if fprop.op == "bmm" else SIZES["num_experts_per_tok"])
        assert fprop.flops == 2.0 * rows * fprop.n * fprop.k
