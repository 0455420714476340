"""The parts of the study benchmarks/truth that look at the loss and at training, against brute force on tiny models."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import record
from benchmarks.truth.impact import (
    Impact,
    Impacts,
    divergence,
    judge_impacts,
    load_impacts,
    probed,
    run_model,
    study_impacts,
)
from benchmarks.truth.materials import Material, Split, Weighing
from benchmarks.truth.numbers import numbers_to_hold
from benchmarks.truth.recommendation import Batch, Setup, Table
from benchmarks.truth.rounded import deviation, find_calls, run_rounded
from benchmarks.truth.training import (
    Course,
    judge_training,
    load_courses,
    outlooks,
    save_courses,
    train_probed,
)
from loka.formats import RECIPES
from loka.quantize import fake_quantize
from tests.probes.made_probe import places

ROWWISE = RECIPES["rowwise"]


class Mixed(nn.Module):
    """A linear called twice, a bare parameter that comes first in its product, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.mix = nn.Parameter(torch.randn(6, 4))
        self.head = nn.Linear(96, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, 16]
        x = self.up(torch.relu(self.up(x)))
        out: Tensor = self.head((self.mix @ x).flatten(1)).squeeze(-1)
        return out


def material(recipes: tuple[str, ...] = ("tensorwise", "rowwise")) -> Material:
    """A frozen model that answers what another one asks."""
    torch.manual_seed(0)
    model, teacher = Mixed(), Mixed()

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(128, 4, 16) * torch.randn(128, 1, 1).exp()
        return x, torch.bernoulli(teacher(x).detach().sigmoid())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]).double(), batch[1].double())

    split = Split(early=tuple(batch() for _ in range(4)), later=tuple(batch() for _ in range(4)))
    return Material(
        name="made",
        model=model,
        loss=loss,
        splits={"exchangeable": split},
        weighing=Weighing(hook="bce", recipes=recipes),
    )


def test_products_are_found_by_site_and_rounded_one_at_a_time() -> None:
    made = material()
    x = made.splits["exchangeable"].later[0][0]
    model = made.model
    assert isinstance(model, Mixed)
    calls = find_calls(model, lambda: model(x))
    assert {site: len(found) for site, found in calls.items()} == {"up": 2, "mix": 1, "head": 1}

    def up(x: Tensor, recipe_on: bool) -> Tensor:
        if not recipe_on:
            return model.up(x)  # type: ignore[no-any-return]  # a module's call is Any
        rows = fake_quantize(x.flatten(0, -2), ROWWISE.operand("input"))
        weight = fake_quantize(model.up.weight, ROWWISE.operand("weight"))
        return F.linear(rows, weight, model.up.bias).view_as(x)

    def mixed(x: Tensor, recipe_on: bool) -> Tensor:
        if not recipe_on:
            return model.mix @ x
        # Each column of x is a row of the product's input, and the parameter is its weight.
        columns = fake_quantize(x.mT.reshape(-1, 4), ROWWISE.operand("input")).view(x.shape[0], 16, 4)
        return fake_quantize(model.mix, ROWWISE.operand("weight")) @ columns.mT

    def by_hand(which: int) -> Tensor:
        y = up(torch.relu(up(x, which == 0)), which == 1)
        out: Tensor = model.head(mixed(y, which == 2).flatten(1)).squeeze(-1)
        return out

    wanted = [*calls["up"], *calls["mix"]]
    for which, call in enumerate(wanted):
        found = run_rounded(lambda: model(x), [call], ROWWISE)
        torch.testing.assert_close(found, by_hand(which), rtol=1e-4, atol=1e-5)
        assert float((found - model(x)).detach().abs().max()) > 1e-4
    both = run_rounded(lambda: model(x), calls["up"], ROWWISE)
    by_both = model.head(mixed(up(torch.relu(up(x, True)), True), False).flatten(1)).squeeze(-1)
    torch.testing.assert_close(both, by_both, rtol=1e-4, atol=1e-5)


class WeightFirst(nn.Module):
    """Features in rows, samples in columns."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(140, 200))

    def forward(self, x: Tensor) -> Tensor:  # [200, B]
        return torch.mm(self.mix, x)


def test_the_weight_is_rounded_as_a_weight_also_where_it_comes_first() -> None:
    torch.manual_seed(0)
    model, x, recipe = WeightFirst(), torch.randn(200, 70) * torch.randn(70).exp(), RECIPES["blockwise"]
    (call,) = find_calls(model, lambda: model(x))["mix"]
    assert not call.a_is_p
    weight = fake_quantize(model.mix.detach(), recipe.operand("weight"))
    by_hand = weight @ fake_quantize(x.mT, recipe.operand("input")).mT
    torch.testing.assert_close(run_rounded(lambda: model(x), [call], recipe).detach(), by_hand, rtol=1e-4, atol=1e-4)


def test_one_matrix_broadcast_over_a_batch_has_one_scale_per_tensor() -> None:
    torch.manual_seed(0)
    weight, x, recipe = torch.randn(6, 40), torch.randn(3, 40, 5), RECIPES["tensorwise"]
    x[0] *= 50
    rows = fake_quantize(x.mT.reshape(-1, 40), recipe.operand("input")).view(3, 5, 40)
    by_hand = fake_quantize(weight, recipe.operand("weight")) @ rows.mT - weight @ x
    found = deviation(weight.expand(3, 6, 40), x, recipe, a_is_p=False)
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-3)


def test_a_product_that_does_not_come_by_is_no_silent_zero() -> None:
    made = material()
    x = made.splits["exchangeable"].later[0][0]
    (call,) = find_calls(made.model, lambda: made.model(x))["head"]
    with pytest.raises(ValueError, match="was to be rounded"):
        run_rounded(lambda: made.model(x), [replace(call, number=99)], ROWWISE)


def test_divergence_is_that_of_the_distributions() -> None:
    z, w = torch.randn(300), torch.randn(300)
    p, q = z.double().sigmoid(), w.double().sigmoid()
    by_hand = float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())
    assert divergence(z, w, "bce") == pytest.approx(by_hand)
    assert divergence(z.sigmoid(), w.sigmoid(), "bce") == pytest.approx(by_hand, rel=1e-4)
    logits, others = torch.randn(20, 15, 7), torch.randn(20, 15, 7)
    log_p, log_q = logits.double().log_softmax(-1), others.double().log_softmax(-1)
    target = F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean")
    assert divergence(logits, others, "cross_entropy") == pytest.approx(float(target))


def test_impacts_are_predicted_from_early_batches_and_measured_on_later_ones() -> None:
    made = material()
    steps: list[int] = []
    found = study_impacts(made, lambda: steps.append(1))
    assert len(steps) == 3
    assert {(row.site, row.recipe) for row in found.rows} == {
        (site, recipe) for site in ("up", "mix", "head") for recipe in ("tensorwise", "rowwise")
    }
    assert found.mean_loss == pytest.approx(
        sum(run_model(made, batch)[1] for batch in made.splits["exchangeable"].early) / 4, rel=1e-5
    )
    figures = judge_impacts([found])["loss impact, made"]
    assert (figures["rows"], figures["early batches"], figures["later batches"]) == (6, 4, 4)
    assert figures["predicted / measured kl"]["median"] == pytest.approx(1.0, abs=0.4)
    assert figures["spearman"] > 0.7
    assert figures["interval has the change on a later batch"] > 0.7


def test_the_change_of_the_loss_is_that_of_the_rounded_model() -> None:
    made = material(("rowwise",))
    found = study_impacts(made, lambda: None)
    (row,) = (row for row in found.rows if row.site == "head")
    model = made.model
    assert isinstance(model, Mixed)
    exact = model.head.weight.detach().clone()
    for batch, change in zip(made.splits["exchangeable"].later, row.later_change, strict=True):
        before = run_model(made, batch)[1]

        def rounded(_module: nn.Module, args: tuple[Tensor]) -> Tensor:
            return fake_quantize(args[0], ROWWISE.operand("input"))

        handle = model.head.register_forward_pre_hook(rounded)
        model.head.weight.data = fake_quantize(exact, ROWWISE.operand("weight"))
        after = run_model(made, batch)[1]
        model.head.weight.data = exact
        handle.remove()
        assert change * found.mean_loss == pytest.approx(after - before, rel=1e-2, abs=1e-7)


def test_a_prediction_says_what_the_probe_says() -> None:
    made = material(("rowwise",))
    split = made.splits["exchangeable"]
    evidence = probed(made, split.early)
    of_evidence = {product.site: product.recipes[0].loss for product in evidence.products if product.product == "fprop"}
    for row in study_impacts(made, lambda: None).rows:
        loss = of_evidence[row.site]
        assert loss is not None
        assert (row.kl, row.low, row.high, row.samples) == (loss.kl, loss.low, loss.high, 4)


IMPACT = Impact(
    material="made",
    site="a",
    recipe="rowwise",
    samples=2,
    labels="closed",
    kl=2e-5,
    kl_of_few=(1e-5, 2e-5),
    kl_low=1e-5,
    kl_high=4e-5,
    first_order=0.0,
    low=-1e-4,
    high=1e-4,
    later_kl=(1e-5, 3e-5),
    later_change=(0.0, 2e-4),
)


def test_impacts_are_judged_by_ratio_rank_and_coverage(tmp_path: Path) -> None:
    rows = tuple(
        replace(IMPACT, site=str(index), kl=kl, later_kl=(later,) * 2, kl_of_few=(1 / kl, kl))
        for index, (kl, later) in enumerate(((1e-5, 2e-5), (2e-5, 2.5e-5), (4e-5, 2.6e-5)))
    )
    study = Impacts(material="made", mean_loss=0.5, seconds=1.0, not_rounded=(), not_weighed=("conv",), rows=rows)
    study.save(tmp_path / "impact.json")
    assert load_impacts(tmp_path / "impact.json") == study
    figures = judge_impacts([study])["loss impact, made"]
    ratio = figures["predicted / measured kl"]
    assert (ratio["median"], ratio["lowest"], ratio["lowest_at"]) == (
        pytest.approx(0.8),
        pytest.approx(0.5),
        "0, rowwise",
    )
    assert figures["spearman"] == pytest.approx(1.0)
    assert figures["spearman, from one batch"] == pytest.approx(-1.0)
    assert figures["interval has the change on a later batch"] == 0.5
    assert figures["by later batch"] == [1.0, 0.0]


def course(errors: np.ndarray, site: str = "a", every: int = 5) -> Course:
    return Course(
        material="made",
        site=site,
        product="fprop",
        recipe="rowwise",
        gate="row_error",
        steps=tuple(range(0, every * len(errors), every)),
        errors=tuple(errors.tolist()),
    )


def steady(number: int, steps: int = 160) -> list[Course]:
    generator = np.random.default_rng(0)
    return [course(0.02 * np.exp(0.05 * generator.standard_normal(steps)), site=str(index)) for index in range(number)]


def test_an_outlook_sees_nothing_past_its_step_and_is_judged_only_within_its_horizon() -> None:
    (plain,) = steady(1)
    changed = np.array(plain.errors)
    changed[60:] *= 3
    (before,), (after,) = (outlooks([row], 295) for row in (plain, course(changed)))
    assert (before.upper, before.horizon) == (after.upper, after.horizon)
    # Evidence from step 100 on: 195 steps observed, 40 samples, so 97 steps ahead of step 295.
    assert after.horizon == 97
    assert after.later == pytest.approx(changed[60:79].tolist())
    assert all(value < before.upper for value in before.later)
    assert all(value > after.upper for value in after.later)


def test_false_safe_is_counted_under_fixed_bounds_and_under_the_tightest() -> None:
    calm = steady(30)
    assert judge_training(calm, (300,))["training, fprop"]["tightest"]["share"] == 0.0
    risen = [replace(row, errors=(*row.errors[:61], *(2 * one for one in row.errors[61:]))) for row in calm[:10]]
    figures = judge_training([*risen, *calm[10:]], (300,))["training, fprop"]
    assert figures["rows"] == 30
    assert figures["tightest"]["share"] == pytest.approx(1 / 3)
    entry = figures["bound 0.03"]
    assert (entry["safe"], entry["admissible"], entry["false_safe"]) == (30, 20, 10)
    assert figures["bound 0.01"]["safe"] == 0
    assert figures["tightest"]["worst later mean / bound"] > 1.2


def test_courses_survive_a_file(tmp_path: Path) -> None:
    found = steady(3, steps=12)
    save_courses(tmp_path / "courses.json", found)
    assert load_courses(tmp_path / "courses.json") == found


def test_a_training_leaves_the_course_of_every_row() -> None:
    torch.manual_seed(0)
    rows = 2048
    table = Table(
        categorical=torch.zeros(rows, 1, dtype=torch.int64),
        dense=torch.randn(rows, 16),
        label=torch.randint(2, (rows,)).float(),
        domain=torch.zeros(rows, dtype=torch.int64),
        cardinalities=(1,),
        trained=rows,
    )
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[1]).squeeze(-1), batch[2])

    before = model[0].weight.detach().clone()
    steps: list[int] = []
    found = train_probed("made", Setup(model=model, loss=loss, table=table), lambda: steps.append(1), steps=24, every=2)
    assert len(steps) == 24
    assert not torch.equal(before, model[0].weight)
    # The head has one column: its dgrad reduces over one element and is no evidence.
    assert {(row.site, row.product) for row in found} == {
        ("0", "fprop"), ("0", "wgrad"), ("2", "fprop"), ("2", "wgrad")
    }  # fmt: skip
    gates = {(row.site, row.product): row.gate for row in found}
    assert gates["0", "fprop"] == "row_error"
    assert gates["2", "fprop"] == "relative_error"
    for row in found:
        assert len(row.steps) == len(row.errors) >= 10
        assert set(row.steps) <= set(places(2, 24))
        assert not any(map(math.isnan, row.errors))


def test_a_number_is_held_or_missed_by_so_much() -> None:
    direct = {"median": 0.008, "worst": 0.06, "worst_at": "made: a, fprop, rowwise"}
    table = {"direct": direct | {"floor_at_worst": 0.055, "same_steps_at_worst": 0.004}}
    results = {
        "gaps, exchangeable": {"by_pass": {"fprop": table}},
        "training, fprop": {"all bounds": {"share": 0.0}, "tightest": {"share": 0.02, "worst_at": "made: b"}},
    }
    found = {entry["what"]: entry for entry in numbers_to_hold(results)}
    assert found["direct, fprop: gap on later batches, median"]["holds"]
    missed = found["direct, fprop: gap on later batches, worst"]
    assert (missed["holds"], missed["missed by"], missed["at"]) == (
        False,
        pytest.approx(0.01),
        "made: a, fprop, rowwise",
    )
    assert missed["why"].startswith("the error itself differs by 5.5%")
    tightest = "training, within the horizon, unmonitored, fprop: share of `safe` that is false, tightest"
    assert not found[tightest]["holds"]
    assert found["direct, wgrad: gap on later batches, median"]["holds"] is None


def test_a_record_says_the_command_that_anyone_can_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["x", "--rows", str(tmp_path)])
    path = record.write_record("truth", {}, {}, command="make truth")
    assert '"command": "make truth"' in path.read_text(encoding="utf-8")
