"""The whole path on real models: train under the probe, report, plan, save, load, convert or compile, train on."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loka
from loka.dispatch.running.convert import planned_sites, unreached
from loka.reports.build import report_of
from loka.reports.render import FORMATS
from loka.workloads.wukong import Wukong, WukongConfig
from tests.dispatch.made_conversion import needs_a_compiler

# Wide enough for most products of a model with random weights, so that most of them run in FP8.
BOUND = loka.Bound(row_error=0.1)
PROBED_STEPS = 160  # of which one in four is sampled
FIELDS, ROWS = 3, 20


class TwoTower(nn.Module):
    """Both towers' outputs are multiplied with each other: a product in which no parameter takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.mix, self.item = nn.Linear(16, 24), nn.Parameter(torch.randn(24, 16) / 4), nn.Linear(16, 16)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (F.silu(self.user(user)) @ self.mix) @ self.item(item).T


def small_wukong() -> Wukong:
    config = WukongConfig(
        cardinalities=(ROWS,) * FIELDS,
        num_dense=4,
        embedding_dim=16,
        num_layers=1,
        fmb_hidden=(32,),
        head_hidden=(32,),
        dense_hidden=(16,),
    )
    return Wukong(config)


def clicks(generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    categorical = torch.randint(0, ROWS, (64, FIELDS), generator=generator)
    dense = torch.randn(64, 4, generator=generator)
    return (categorical, dense), (categorical[:, 0] + 5 * dense[:, 0] > 10).float()


def pairs(generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    user = torch.randn(32, 16, generator=generator)
    return (user, user + 0.1 * torch.randn(32, 16, generator=generator)), torch.arange(32)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], tuple[tuple[Tensor, ...], Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    kept: tuple[str, ...]  # sites that no plan can move: products of activations


CASES = {
    "wukong": Case(small_wukong, clicks, F.binary_cross_entropy_with_logits, ("interaction.0.fmb",)),
    "two_tower": Case(TwoTower, pairs, F.cross_entropy, ("TwoTower",)),
}


def data(case: Case, steps: int, seed: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield case.draw(generator)


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    losses = []
    for inputs, target in data(case, steps, seed):
        loss = case.loss(model(*inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@dataclass(frozen=True)
class Probed:
    """A model that was trained under the probe, with its optimiser's state and its database."""

    case: Case
    model: nn.Module
    optimizer: torch.optim.Optimizer
    database: Path

    def go_on(self, prepare: Callable[[nn.Module], nn.Module], steps: int = 10) -> tuple[nn.Module, list[float]]:
        """Train a copy further from here, after preparing it."""
        prepared = prepare(copy.deepcopy(self.model))
        optimizer = torch.optim.Adam(prepared.parameters())
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))  # it keeps the tensors it is given
        return prepared, train(self.case, prepared, optimizer, steps, seed=1)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    torch.manual_seed(0)
    case: Case = request.param
    model = case.make()
    optimizer = torch.optim.Adam(model.parameters())
    database = tmp_path_factory.mktemp("run") / "run.db"
    with loka.probe(model, database, every=4, overhead=100.0):
        train(case, model, optimizer, PROBED_STEPS, seed=0)
    return Probed(case, model, optimizer, database)


@pytest.fixture(scope="module")
def plan(probed: Probed) -> loka.Plan:
    return loka.plan(probed.database, BOUND, assume_speedup=1.3)


def high_precision(model: nn.Module) -> nn.Module:
    return model


def test_the_plan_names_products_of_the_model_and_says_what_it_rests_on(probed: Probed, plan: loka.Plan) -> None:
    plan.check_model(probed.model)
    in_fp8 = {decision.request.site for decision in plan.decisions if decision.recipe}
    sites = {decision.request.site for decision in plan.decisions}
    assert len(in_fp8) >= 2
    assert set(probed.case.kept) <= sites - in_fp8
    assert plan.fp8_share() > 0.3
    assert "Assumed times" in " ".join(plan.notes)
    assert all(decision.error_upper <= 0.1 for decision in plan.decisions if decision.recipe)


def test_the_same_database_makes_the_same_plan_and_a_saved_one_comes_back(
    probed: Probed, plan: loka.Plan, tmp_path: Path
) -> None:
    assert loka.plan(probed.database, BOUND, assume_speedup=1.3).hash == plan.hash
    plan.save(tmp_path / "plan.json")
    assert loka.Plan.load(tmp_path / "plan.json") == plan


def test_the_report_and_the_plan_agree_on_what_is_safe(probed: Probed, plan: loka.Plan) -> None:
    report = report_of(probed.database, BOUND)
    verdicts = {
        (row["site"], row["pass"], recipe["recipe"]): recipe["verdict"]
        for row in report["sites"]
        for recipe in row["recipes"]
    }
    chosen = [(d.request.site, d.request.product, d.recipe) for d in plan.decisions if d.recipe]
    assert {verdicts[key] for key in chosen} == {"safe"}
    for render in FORMATS.values():
        assert probed.case.kept[0] in render(report)


def test_a_converted_model_goes_on_training_with_every_planned_product_in_fp8(probed: Probed, plan: loka.Plan) -> None:
    _, exact = probed.go_on(high_precision)
    converted, losses = probed.go_on(lambda model: loka.convert(model, plan))
    assert planned_sites(converted).keys() == {d.request.site for d in plan.decisions if d.recipe}
    assert unreached(converted) == ()
    assert losses != exact
    assert sum(losses) == pytest.approx(sum(exact), rel=0.1)
    # What it learned is a plain checkpoint: it runs in a model that has never heard of the plan.
    plain = probed.case.make()
    plain.load_state_dict(converted.state_dict())
    inputs, _ = next(data(probed.case, 1, seed=2))
    with torch.no_grad():
        high, low = plain(*inputs), converted(*inputs)
    assert 0 < (high - low).norm() / high.norm() < 0.2


@needs_a_compiler
def test_a_compiled_model_goes_on_as_the_converted_one(probed: Probed, plan: loka.Plan, tmp_path: Path) -> None:
    # A few sites are enough to compile; which ones the others are changes nothing here.
    sites = sorted({decision.request.site for decision in plan.decisions if decision.recipe})[-2:]
    plan = loka.plan(probed.database, BOUND, assume_speedup=1.3, filter=sites)
    plan.save(tmp_path / "plan.json")
    options = {"plan": str(tmp_path / "plan.json")}
    _, converted = probed.go_on(lambda model: loka.convert(model, plan), steps=4)
    _, compiled = probed.go_on(
        lambda model: torch.compile(model, backend="loka", options=options, fullgraph=True), steps=4
    )
    assert compiled == pytest.approx(converted, rel=1e-3)


def test_a_plan_of_one_model_is_refused_by_the_other(probed: Probed, plan: loka.Plan) -> None:
    other = next(case for case in CASES.values() if case is not probed.case).make()
    with pytest.raises(loka.LokaError, match="made for another model"):
        loka.convert(other, plan)
