"""The probe as a Lightning callback, with the real Trainer, against loops written by hand."""

import copy
import csv
import importlib.util
import warnings

import pytest
import torch
from torch import nn

import loka
from loka.errors import ArgumentError, LokaWarning
from tests.integrations.made_training import evidence_of, runs_of
from tests.probes.made_probe import places

pytestmark = pytest.mark.third_party("pytorch_lightning")

if importlib.util.find_spec("pytorch_lightning") is not None:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import CSVLogger

    from loka.integrations.lightning import ProbeCallback

    Module = pl.LightningModule
else:
    Module = nn.Module

OPTIONS = {"every": 2, "overhead": 100.0, "recipes": ["tensorwise", "rowwise"]}
BATCHES = 8


class Net(Module):
    """One that is called, as `self(x)`, or whose training step goes past its forward."""

    def __init__(self, style="call"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
        self.style = style
        self.validated = 0
        self.fails_at = None

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        if index == self.fails_at:
            raise KeyboardInterrupt if self.style == "interrupt" else RuntimeError("out of luck")
        x, y = batch
        logits = self.net(x) if self.style == "past" else self(x)
        return nn.functional.binary_cross_entropy_with_logits(logits, y)

    def validation_step(self, batch, index):
        self.validated += 1
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    made = torch.Generator().manual_seed(7)
    x = torch.randn(BATCHES * 32, 16, generator=made)
    y = (x.sum(dim=1, keepdim=True) > 0).float()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)


def trainer(tmp_path, callback, **options):
    return pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "callbacks": [callback],
            "logger": False,
            "default_root_dir": tmp_path,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


def fit(tmp_path, model, callback, validate=True, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
        made = trainer(tmp_path, callback, **options)
        made.fit(model, data(), data() if validate else None)
    return made


def by_hand(model, db, *, accumulate=1, epochs=2, **options):
    """The same training without Lightning: what its evidence has to be."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with loka.probe(model, db, **OPTIONS, **options):
        for _ in range(epochs):
            for index, (x, y) in enumerate(data()):
                loss = nn.functional.binary_cross_entropy_with_logits(model(x), y) / accumulate
                loss.backward()
                if (index + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_its_evidence_is_that_of_a_loop_by_hand(tmp_path, accumulate):
    model, twin = Net(), None
    twin = copy.deepcopy(model)
    callback = ProbeCallback(tmp_path / "run.db", loss="bce", **OPTIONS)
    fit(tmp_path, model, callback, accumulate_grad_batches=accumulate, val_check_interval=3)
    by_hand(twin, tmp_path / "hand.db", accumulate=accumulate, loss="bce")
    assert model.validated > 2 * BATCHES  # in the midst of both epochs, and none of it a step
    assert evidence_of(tmp_path / "run.db") == evidence_of(tmp_path / "hand.db")
    (run,) = runs_of(tmp_path / "run.db")
    assert (run.progress.status, run.progress.steps) == ("complete", 2 * BATCHES)
    assert torch.equal(model.net[0].weight, twin.net[0].weight)


def test_a_training_step_that_goes_past_forward_is_seen(tmp_path):
    model = Net("past")
    twin = copy.deepcopy(model)
    fit(tmp_path, model, ProbeCallback(tmp_path / "run.db", **OPTIONS))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Net, "forward", lambda self, x: self.net(x))
        by_hand(twin, tmp_path / "hand.db")
    seen, hand = evidence_of(tmp_path / "run.db"), evidence_of(tmp_path / "hand.db")
    assert [[product["errors"] for product in step[3]] for step in seen] == [
        [product["errors"] for product in step[3]] for step in hand
    ]


def test_a_submodule_is_probed_under_its_own_names(tmp_path):
    model = Net("past")
    twin = copy.deepcopy(model).net
    fit(tmp_path, model, ProbeCallback(tmp_path / "run.db", module="net", loss="bce", **OPTIONS))
    by_hand(twin, tmp_path / "hand.db", loss="bce")
    assert evidence_of(tmp_path / "run.db") == evidence_of(tmp_path / "hand.db")


@pytest.mark.parametrize(("style", "error"), [("call", RuntimeError), ("interrupt", SystemExit)])
def test_a_training_that_breaks_closes_the_run_and_lets_go(tmp_path, style, error):
    model = Net(style)
    model.fails_at = 5
    callback = ProbeCallback(tmp_path / "run.db", **OPTIONS)
    with pytest.raises(error):
        fit(tmp_path, model, callback)
    (run,) = runs_of(tmp_path / "run.db")
    assert run.progress.status == "failed"
    assert run.progress.steps == 6
    assert "_compiled_call_impl" not in model.__dict__

    model.fails_at = None  # and the same callback serves again
    made = fit(tmp_path, model, callback)
    assert [run.progress.status for run in runs_of(tmp_path / "run.db")] == ["failed", "complete"]
    assert "training_step" not in made.strategy.__dict__


def test_numbers_go_to_the_loggers_of_the_trainer(tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version=0)
    callback = ProbeCallback(tmp_path / "run.db", log_every=2, **OPTIONS)
    fit(tmp_path, Net(), callback, logger=logger, validate=False, log_every_n_steps=1)
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row.get("loka/step")]
    steps = {step: products for step, _, _, products in evidence_of(tmp_path / "run.db")}
    assert [float(row["loka/step"]) for row in logged] == sorted(steps)[::2]
    for row in logged:
        errors = [
            product["errors"]["rowwise"]["row_error"]
            for product in steps[int(float(row["loka/step"]))]
            if product["product"] == "fprop"
        ]
        assert float(row["loka/all/worst/fprop/rowwise/row_error"]) == pytest.approx(max(errors), rel=1e-6)


def test_manual_optimization_is_watched_too(tmp_path):
    class Manual(Net):
        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    model = Manual()
    model.automatic_optimization = False
    fit(tmp_path, model, ProbeCallback(tmp_path / "run.db", **OPTIONS))
    seen = evidence_of(tmp_path / "run.db")
    assert [step for step, *_ in seen] == places(2, 2 * BATCHES)
    assert {product["product"] for product in seen[-1][3]} == {"fprop", "dgrad", "wgrad"}


def test_training_goes_on_from_a_checkpoint_with_a_run_of_its_own(tmp_path):
    callback = ProbeCallback(tmp_path / "run.db", **OPTIONS)
    made = fit(tmp_path, Net(), callback, max_epochs=1, enable_checkpointing=True)
    made.save_checkpoint(tmp_path / "half.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
        trainer(tmp_path, callback).fit(Net(), data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert [run.progress.steps for run in runs_of(tmp_path / "run.db")] == [BATCHES, BATCHES]


def test_nothing_to_see_warns_and_does_not_stop_the_end_of_training(tmp_path):
    callback = ProbeCallback(tmp_path / "run.db", module="net.1", **OPTIONS)
    with pytest.warns(LokaWarning, match="no floating-point matrix product"):
        fit(tmp_path, Net(), callback)


def test_wrong_arguments_are_told_at_once(tmp_path):
    with pytest.raises(ArgumentError, match="log_every=-1"):
        ProbeCallback(tmp_path / "run.db", log_every=-1)
    with pytest.raises(ArgumentError, match=r"'nett'.*Nearest: 'net'"):
        fit(tmp_path, Net(), ProbeCallback(tmp_path / "run.db", module="nett"))
