"""What LoKA does on an accelerator, of which nothing but a simulation is at hand: no operand on the CPU, no waiting.

Each test runs in a process of its own, on the CPU and on the simulated device, from the same seeds.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loka
from loka.bounds import Bound
from loka.dispatch.deciding.plan import Plan
from loka.probes.judging.evidence import load_evidence
from loka.probes.records import Event, RunInfo, RunProgress, StepRecord
from tests.device import made_device
from tests.made_processes import Started
from tests.probes.made_probe import places

EVERY = 4
STEPS = 3 * EVERY
# Of a loop's own: none, as it keeps its losses on the device.
NO_WAITS: Counter[str] = Counter()


class Net(nn.Module):
    """Towers, an attention and a bare Parameter, as recommendation models have them."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, 16) for _ in range(4))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16), nn.LayerNorm(16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.Parameter(0.1 * torch.randn(80, 80))
        self.top = nn.Sequential(nn.Linear(80, 128), nn.LayerNorm(128), nn.SiLU(), nn.Linear(128, 64), nn.Linear(64, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        looked_up = [table(sparse[:, at]) for at, table in enumerate(self.tables)]
        found = torch.stack([self.bottom(dense), *looked_up], dim=1)
        found = (found + self.attention(found, found, found)[0]).flatten(1)
        return self.top(found + found @ self.cross).squeeze(-1)


def batch(number: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    dense = torch.randn(96, 13, generator=generator) * torch.logspace(-1, 1, 13)
    sparse = torch.randint(0, 50, (96, 4), generator=generator)
    wanted = (dense[:, 0] + 0.1 * torch.randn(96, generator=generator) > 0).float()
    return dense.to(device), sparse.to(device), wanted.to(device)


class Training:
    """A loop that never reads its loss, and what made the CPU wait in each of its steps."""

    def __init__(self, device: str, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = Net().to(device) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.losses: list[Tensor] = []
        self.waits: list[Counter[str]] = []

    def step(self) -> None:
        dense, sparse, wanted = batch(len(self.losses), self.device)
        self.optimizer.zero_grad()
        made_device.waits()
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(dense, sparse), wanted)
        loss.backward()
        self.optimizer.step()
        self.waits.append(made_device.waits())
        self.losses.append(loss.detach())

    def run(self, steps: int = STEPS) -> "Training":
        for _ in range(steps):
            self.step()
        return self

    @property
    def ended_with(self) -> list[Tensor]:
        return [torch.stack(self.losses).cpu(), *(value.cpu() for value in self.model.state_dict().values())]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the device, built once for all workers."""
    return made_device.build(tmp_path_factory.getbasetemp().parent)


def on_device(work, library: Path, *arguments):
    """Return what a function returns in a process that has the device."""
    ended = Started(_with_device, work, library, *arguments).end(limit_s=300)
    assert ended.code == 0, ended.error
    return ended.result


def _with_device(work, library: Path, *arguments):
    made_device.load(library)
    return work(*arguments)


def bound() -> Bound:
    """Return a bound that every product keeps, so that all of them are converted."""
    return Bound(row_error=0.5)


def probed(device: str, db: Path) -> "Heard":
    heard = Heard(Training(device))
    probe = loka.probe(heard.training.model, db=db, every=EVERY, overhead=10.0)
    probe.subscribe(heard)
    with probe:
        heard.training.run()
    return heard


def made_plan(db: Path, recipe: str) -> Plan:
    """Return a plan for all products with weights, of a run that every recipe is safe in."""
    training = Training("cpu")
    with loka.probe(training.model, db=db, every=1, overhead=10.0, recipes=(recipe,)):
        training.run(24)
    made = loka.plan(db, bound(), assume_speedup=3.0, measure=False, device="cpu")
    assert sum(decision.recipe == recipe for decision in made.decisions) > 15
    return made


# --- the simulation itself


def test_the_device_refuses_what_lies_on_the_cpu_and_counts_what_waits(library):
    on_device(_refuses_and_counts, library)


def _refuses_and_counts():
    x = torch.randn(8, 4)
    there = x.to("simulated")
    assert torch.equal((there @ there.mT).cpu(), x @ x.mT)
    with pytest.raises(RuntimeError, match="same device"):
        there @ x.mT
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([there, x])
    made_device.waits()
    there[:2] += 1.0
    there.sum()
    torch.where(there > 0, there, 0.0)
    assert made_device.waits() == NO_WAITS
    for read in (lambda: there.sum().item(), lambda: bool(there.isnan().any()), there.tolist, lambda: there[there > 0]):
        read()
        assert made_device.waits() != NO_WAITS


# --- the probe


def test_a_probe_waits_in_sampled_steps_alone_and_changes_nothing(library, tmp_path):
    on_device(_waits_where_it_samples, library, tmp_path / "run.db")


def _waits_where_it_samples(db: Path):
    plain = Training("simulated").run()
    assert plain.waits == [NO_WAITS] * STEPS
    watched = probed("simulated", db).training
    assert all(map(torch.equal, watched.ended_with, plain.ended_with))
    sampled = places(EVERY, STEPS)
    assert all(watched.waits[step] != NO_WAITS for step in sampled)
    # Half a dozen times per product, whatever the number of recipes, where no row is left out.
    assert watched.waits[0].total() < 7 * len(load_evidence(db).products)
    # What a sampled step leaves to be read, such as biases, is read as the next one begins.
    others = [step for step in range(STEPS) if step not in sampled and step - 1 not in sampled]
    assert [watched.waits[step] for step in others] == [NO_WAITS] * len(others)


def test_a_device_has_the_errors_of_the_cpu(library, tmp_path):
    on_device(_has_the_errors, library, tmp_path)


class Heard:
    """A listener that keeps the errors of products that sum over anything, by step."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.errors: dict[tuple[int, str, str, str], float] = {}

    def write(self, step: StepRecord, progress: RunProgress) -> None:
        for product in step.products:
            for recipe, error in product.errors.items() if product.k > 1 else ():
                self.errors[step.step, product.site, product.product, recipe] = error.row_error

    def begin(self, info: RunInfo) -> None: ...
    def event(self, event: Event) -> None: ...
    def finish(self, progress: RunProgress) -> None: ...


def _has_the_errors(folder: Path):
    found = {device: probed(device, folder / f"{device}.db").errors for device in ("cpu", "simulated")}
    both = found["cpu"].keys() & found["simulated"].keys()
    assert len(both) > 200  # a busy machine may leave some products of a step to the next one
    for key in both:
        assert found["simulated"][key] == pytest.approx(found["cpu"][key], rel=0.02), key


# --- dispatch


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_a_converted_model_trains_there_as_on_the_cpu_and_never_waits(library, tmp_path, recipe):
    on_device(_trains_converted, library, tmp_path / "run.db", recipe)


def _trains_converted(db: Path, recipe: str):
    plan = made_plan(db, recipe)
    losses = {}
    for device in ("cpu", "simulated"):
        training = Training(device)
        before = {name: value.clone() for name, value in training.model.state_dict().items()}
        loka.convert(training.model, plan, emulate=True)
        training.run(6)
        losses[device] = torch.stack(training.losses).cpu()
        assert training.waits == [NO_WAITS] * 6
        loka.revert(training.model)
        training.model.load_state_dict(before)
        again = Training(device, training.model).run(2)
        assert torch.equal(torch.stack(again.losses).cpu(), torch.stack(Training(device).run(2).losses).cpu())
    plain = torch.stack(Training("cpu").run(6).losses)
    # Sums of another order round a few values the other way, which grows with the steps.
    between, of_fp8 = (losses["simulated"] - losses["cpu"]).abs(), (losses["cpu"] - plain).abs()
    assert of_fp8[0] > 1e-4
    assert between[0] < of_fp8[0] / 4
    assert between.max() < 2e-3


def test_a_monitor_waits_in_monitored_steps_alone(library, tmp_path):
    on_device(_monitors, library, tmp_path)


def _monitors(folder: Path):
    plan = made_plan(folder / "run.db", "blockwise")
    training = Training("simulated")
    loka.convert(training.model, plan, emulate=True)
    with loka.monitor(training.model, plan, every=EVERY, overhead=10.0):
        training.run()
    waiting = [step for step, waits in enumerate(training.waits) if waits != NO_WAITS]
    assert waiting
    assert set(waiting) <= set(places(EVERY, STEPS))


def test_a_frozen_model_serves_there_without_waiting(library, tmp_path):
    on_device(_serves_frozen, library, tmp_path)


def _serves_frozen(folder: Path):
    plan = made_plan(folder / "run.db", "rowwise")
    results = {}
    dense, sparse, _ = batch(0, "cpu")
    for device in ("cpu", "simulated", "moved"):
        torch.manual_seed(0)
        here = "simulated" if device == "moved" else device
        model = Net() if device == "moved" else Net().to(here)
        frozen = loka.freeze(model.eval(), plan, emulate=True)
        assert frozen.bytes_after < 0.6 * frozen.bytes_before
        model.to(here)
        given = dense.to(here), sparse.to(here)
        made_device.waits()
        with torch.no_grad():
            out = model(*given)
        assert made_device.waits() == NO_WAITS
        results[device] = out.cpu()
    assert torch.equal(results["moved"], results["simulated"])
    assert (results["simulated"] - results["cpu"]).norm() < 1e-2 * results["cpu"].norm()


# --- mods


@pytest.mark.parametrize(
    "mod",
    [loka.mods.Smooth(), loka.mods.Hadamard(), loka.mods.KeepRowsHigh(), loka.mods.PadToAlignment(16)],
    ids=lambda mod: type(mod).__name__,
)
def test_a_mod_is_fitted_there_as_on_the_cpu(library, mod):
    on_device(_fits, library, mod)


def _fits(mod):
    found = {}
    for device in ("cpu", "simulated"):
        torch.manual_seed(0)
        layers = nn.Linear(61, 256), nn.LayerNorm(256), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 8)
        model = nn.Sequential(*layers).to(device)
        with torch.no_grad():
            model[1].weight.copy_(torch.logspace(-1, 1, 256))
        inputs = [(torch.randn(64, 61) * torch.logspace(-1, 1.5, 61)).to(device) for _ in range(4)]
        applied = loka.mods.apply(model, [mod], inputs=inputs)
        with torch.no_grad():
            found[device] = model(inputs[0]).cpu(), sorted(each.fqn for each in applied.replacements)
    assert found["cpu"][1] == found["simulated"][1]
    assert found["cpu"][1]
    assert torch.allclose(found["cpu"][0], found["simulated"][0], rtol=1e-4, atol=1e-5)
