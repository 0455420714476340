"""What it costs to know which of twenty linears the loss feels most, in plain training steps.

A probe weighs its second sampled step by the loss, and every fourth after it: two steps are one weighed batch, six are
two (what ranks from one and from two are worth: see `impact`). The whole of it is timed: attach, forward and backward
with everything measured in them, backward products too, detach, the database read back. Taken in turns with plain
steps, in process CPU time.
"""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loka
from loka.formats import DEFAULT_RECIPES
from loka.probes.capturing.sites import FilterFn
from loka.probes.judging.evidence import load_evidence
from loka.timing import interleaved_ratio
from loka.workloads.open_bandit import batches, load_open_bandit
from loka.workloads.wukong import Wukong, WukongConfig

BATCH_SIZES: Final[tuple[int, ...]] = (512, 2048)
# Steps that hold one and two weighed ones.
_STEPS: Final[dict[int, int]] = {1: 2, 2: 6}
# Weighed batches, recipes, linears only: the first is what ModelOpt does, linears and one format.
_VARIANTS: Final[tuple[tuple[int, tuple[str, ...], bool], ...]] = (
    (1, ("rowwise",), True),
    (2, ("rowwise",), True),
    (1, DEFAULT_RECIPES, False),
)
# ModelOpt's auto_quantize on a model of 20 linears, one FP8 format, 8 + 8 batches, in plain steps; measured by the
# authors of this study on two cores of a CPU with nvidia-modelopt 0.47, torch 2.13, batches of 512 and 2048.
MODELOPT_STEPS: Final[tuple[float, float]] = (21.0, 23.0)
_LAYERS: Final[int] = 8


def twenty_linears() -> tuple[nn.Module, int, Any]:
    """Return a Wukong of eight layers, how many linears it has, and the log it learns."""
    log = load_open_bandit()
    config = WukongConfig(
        cardinalities=log.cardinalities, num_dense=log.dense.shape[1], num_layers=_LAYERS, base_rate=0.005
    )
    model = Wukong(config)
    return model, sum(isinstance(module, nn.Linear) for module in model.modules()), log


def sensitivities(advance: Callable[[], None], *, rounds: int) -> dict[str, Any]:
    """Return the time of a probe of two weighed batches, in plain steps, by batch size and recipes."""
    model, linears, log = twenty_linears()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    result: dict[str, Any] = {"linears": linears, "ModelOpt auto_quantize, plain steps": MODELOPT_STEPS}
    for size in BATCH_SIZES:
        categorical, dense, click = next(iter(batches(log, size, seed=0)))

        def loss(ids: Tensor = categorical, numbers: Tensor = dense, label: Tensor = click) -> Tensor:
            return F.binary_cross_entropy_with_logits(model(ids, numbers), label)

        def plain(loss: Callable[[], Tensor] = loss) -> None:
            optimizer.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            optimizer.step()

        for weighed, recipes, linears_only in _VARIANTS:
            sites = _is_linear if linears_only else None
            with tempfile.TemporaryDirectory() as folder:
                probe = _Probe(
                    model=model, loss=loss, folder=Path(folder), weighed=weighed, recipes=recipes, sites=sites
                )
                ratio = interleaved_ratio(probe, plain, rounds=rounds, warmup=1, clock=process_time)
            what = f"batch {size}, {'linears' if linears_only else 'all products'}, {len(recipes)} of 4 recipes"
            result[f"{what}, {weighed} weighed, plain steps"] = ratio
            advance()
    return result


def _is_linear(module: nn.Module, _name: str) -> bool:
    return isinstance(module, nn.Linear)


@dataclass(kw_only=True)
class _Probe:
    """A probe of so many weighed batches, from beginning to end, each into a database of its own."""

    model: nn.Module
    loss: Callable[[], Tensor]
    folder: Path
    weighed: int
    recipes: tuple[str, ...]
    sites: FilterFn | None
    runs: int = 0

    def __call__(self) -> None:
        self.runs += 1
        database = self.folder / f"{self.runs}.db"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", loka.LokaWarning)
            options: dict[str, Any] = {"recipes": self.recipes, "filter_fn": self.sites, "loss": "bce"}
            with loka.probe(self.model, database, every=1, overhead=1e6, **options):
                for _ in range(_STEPS[self.weighed]):
                    self.model.zero_grad()
                    self.loss().backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        load_evidence(database)
