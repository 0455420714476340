"""Weights kept for the micro-batches of a step, under the real trainers of other libraries."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.dispatch.made_cached import SITES, Counted, converted

ACCUMULATED, STEPS = 3, 5
ONCE = 2 * len(SITES)  # forward, and the gradient of the input


def rows() -> Tensor:
    return torch.randn(8 * ACCUMULATED * STEPS, 16, generator=torch.Generator().manual_seed(3))


def after_lightning(model: nn.Sequential, counted: Counted, folder: Path) -> list[int]:
    """Train as Lightning does; return what each micro-batch quantised."""
    import pytorch_lightning as pl

    counts: list[int] = []

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.first = model, nn.Linear(16, 16)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.model(self.first(batch[0])).square().mean()

        def on_train_batch_end(self, *_: object) -> None:
            counts.append(counted.taken())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(Task(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows()), batch_size=8))
    return counts


def after_transformers(model: nn.Sequential, counted: Counted, folder: Path) -> list[int]:
    """Train as transformers' Trainer does, which clips once per step; return what each micro-batch quantised."""
    from transformers import Trainer, TrainingArguments

    counts: list[int] = []

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.first = model, nn.Linear(16, 16)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            counts.append(counted.taken())  # of the micro-batch before
            return {"loss": self.model(self.first(x)).square().mean()}

    arguments = TrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=ACCUMULATED,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"x": row, "labels": row[0]} for row in rows()]
    Trainer(Task(), arguments, train_dataset=data).train()  # type: ignore[arg-type]  # a list serves as a dataset
    return [*counts[1:], counted.taken()]


@pytest.mark.parametrize(
    ("train", "cache_weights"),
    [
        # Lightning zeroes gradients behind the first forward of a step, which an update by hand may look like.
        pytest.param(after_lightning, True, marks=pytest.mark.third_party("pytorch_lightning")),
        pytest.param(after_transformers, None, marks=pytest.mark.third_party("transformers")),
    ],
)
def test_a_weight_is_quantised_once_per_pass_and_step(
    train, cache_weights: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    for cached in (cache_weights, False):
        torch.manual_seed(0)
        model = converted(cache_weights=cached)
        counted = Counted(model, monkeypatch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(1)
            counts = train(model, counted, tmp_path)
        each = [sum(counts[at : at + ACCUMULATED]) for at in range(0, len(counts), ACCUMULATED)]
        assert each[1:] == (STEPS - 1) * [ACCUMULATED * ONCE if cached is False else ONCE]
        trained.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*trained, strict=True))
