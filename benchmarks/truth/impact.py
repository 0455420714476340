"""What a probe says a rounded product does to the loss, against what rounding it really does on later batches.

The prediction is the probe's own: `loka.probe(..., loss=...)` over the early batches, read back as a report would. The
measurement rounds the operands of one forward product at a time and leaves everything else as it is: the divergence of
the model's output from what it was, and the change of the loss, batch by batch.
"""

import itertools
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import loka
from benchmarks.truth.judge import spearman
from benchmarks.truth.materials import Material
from benchmarks.truth.rounded import Call, find_calls, run_rounded
from loka.formats import RECIPES
from loka.probes.judging.evidence import LossEvidence, RunEvidence, load_evidence
from loka.probes.sampling.losses import logits_of

# A probe weighs one sampled step in so many by the loss: each early batch comes so often in a row, and counts once.
PASSES: Final[int] = 4
CONFIDENCE: Final[float] = 0.95
# Numbers of batches that ought to be enough to rank sites.
_FEW: Final[tuple[int, ...]] = (1, 2)
# Items whose divergence is computed at a time, in double precision: 50,000 classes of each are 100 MB.
_ITEMS: Final[int] = 128

Forward = Callable[[nn.Module, Any], Tensor]  # the mean loss of a batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Impact:
    """One (site, recipe): what the probe said, relative to the mean loss, and what later batches showed, likewise."""

    material: str
    site: str
    recipe: str
    samples: int
    labels: str
    kl: float
    kl_of_few: tuple[float, ...]  # from the first early batch alone, from the first two
    kl_low: float
    kl_high: float
    first_order: float
    low: float
    high: float
    later_kl: tuple[float, ...]  # by batch
    later_change: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Impacts:
    """Everything that one material gave."""

    material: str
    mean_loss: float  # of the early batches
    seconds: float  # CPU, all of it
    not_rounded: tuple[str, ...]  # sites whose products cannot be told apart or rounded here
    not_weighed: tuple[str, ...]  # sites that the probe never weighed by the loss
    rows: tuple[Impact, ...]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load_impacts(path: Path) -> Impacts:
    """Read what `Impacts.save` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    series = ("kl_of_few", "later_kl", "later_change")
    rows = tuple(Impact(**{**row, **{name: tuple(row[name]) for name in series}}) for row in data.pop("rows"))
    names = ("not_rounded", "not_weighed")
    return Impacts(**{**data, **{name: tuple(data[name]) for name in names}}, rows=rows)


def study_impacts(material: Material, advance: Callable[[], None], limit: int | None = None) -> Impacts:
    """Probe the early batches, round one product after the other on the later ones; `advance` is called per site."""
    plan = material.weighing
    if plan is None:
        raise ValueError(f"The material {material.name} has no loss that a probe could weigh errors by.")
    started = process_time()
    split = material.splits["exchangeable"]
    early, later = split.early[:limit][: plan.early], split.later[:limit][: plan.later]
    evidence = probed(material, early)
    less = [evidence if len(early) <= few else probed(material, early[:few]) for few in _FEW]
    model = material.model
    calls = find_calls(model, lambda: material.loss(model, later[0]), material.admits(plan.sites))
    found = _losses(evidence)
    of_few = [{name: loss.kl * run.mean_loss for name, loss in _losses(run).items()} for run in less]
    sites = [product.site for product in evidence.products if product.product == "fprop"]
    weighed = [site for site in sites if any((site, name) in found for name in plan.recipes)]
    references = [run_model(material, batch) for batch in later]
    rows: list[Impact] = []
    for site in weighed:
        if site in calls:
            for name in plan.recipes:
                measured = [
                    _measure(material, batch, exact, calls[site], name)
                    for batch, exact in zip(later, references, strict=True)
                ]
                row = _row((material.name, site, name), found[site, name], measured, evidence.mean_loss)
                kls = tuple(kl[site, name] / evidence.mean_loss for kl in of_few)
                rows.append(replace(row, kl_of_few=kls))
        advance()
    return Impacts(
        material=material.name,
        mean_loss=evidence.mean_loss,
        seconds=process_time() - started,
        not_rounded=tuple(site for site in weighed if site not in calls),
        not_weighed=tuple(site for site in sites if site not in weighed),
        rows=tuple(rows),
    )


def probed(material: Material, batches: Sequence[Any]) -> RunEvidence:
    """Run the model's own forward and backward on these batches under a probe that knows the loss."""
    plan = material.weighing
    assert plan is not None
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "run.db"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", loka.LokaWarning)  # such as: so few steps are hardly evidence
            with loka.probe(
                material.model,
                database,
                every=1,
                overhead=1e6,
                recipes=plan.recipes,
                filter_fn=material.admits(plan.sites),
                loss=plan.hook,
            ):
                for batch in batches:
                    for _ in range(PASSES):
                        material.loss(material.model, batch).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
                        material.model.zero_grad()
        return load_evidence(database, confidence=CONFIDENCE)


def run_model(material: Material, batch: Any) -> tuple[Tensor, float]:
    """Return the model's output as the loss sees it, without its graph, and the loss."""
    with outputs_of(material.model) as kept:
        # With grad mode on, as in the pass that found the products: matmul takes other ways without.
        loss = float(material.loss(material.model, batch).detach())
    return kept[-1], loss


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what a model returns while this is open, the logits only."""
    kept: list[Tensor] = []

    def keep(_model: nn.Module, _args: Any, output: Any) -> None:
        kept.append(logits_of(output).detach())

    handle = model.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def divergence(exact: Tensor, rounded: Tensor, hook: str) -> float:
    """Return the mean over items of KL(exact || rounded) in nats, of two outputs: logits, or chances of a click."""
    if hook == "bce":
        exact, rounded = (torch.stack([z := log_odds(y), torch.zeros_like(z)], dim=-1) for y in (exact, rounded))
    pieces = (torch.split(y.flatten(0, -2), _ITEMS) for y in (exact, rounded))
    pairs = zip(*pieces, strict=True)
    total = 0.0
    for one, other in pairs:
        log_p, log_q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / exact.flatten(0, -2).shape[0]


def log_odds(output: Tensor) -> Tensor:
    """Return the logits of clicks, in double precision, also where the model ends in a sigmoid."""
    z = output.double().flatten()
    return torch.logit(z) if bool(((z >= 0) & (z <= 1)).all()) else z


def _measure(
    material: Material, batch: Any, exact: tuple[Tensor, float], calls: Sequence[Call], recipe: str
) -> tuple[float, float]:
    """Return divergence and change of the loss with every call of a site rounded, as FP8 would."""
    assert material.weighing is not None
    before, loss_before = exact
    with outputs_of(material.model) as kept:
        loss = run_rounded(lambda: material.loss(material.model, batch).detach(), calls, RECIPES[recipe])
    return divergence(before, kept[-1], material.weighing.hook), float(loss) - loss_before


def _losses(evidence: RunEvidence) -> dict[tuple[str, str], LossEvidence]:
    return {
        (product.site, recipe.recipe): recipe.loss
        for product in evidence.products
        for recipe in product.recipes
        if product.product == "fprop" and recipe.loss is not None
    }


def _row(
    name: tuple[str, str, str], found: LossEvidence, measured: Iterable[tuple[float, float]], mean_loss: float
) -> Impact:
    material, site, recipe = name
    kls, changes = zip(*measured, strict=True)
    return Impact(
        material=material,
        site=site,
        recipe=recipe,
        samples=found.samples,
        labels=found.labels,
        kl=found.kl,
        kl_of_few=(),
        kl_low=found.kl_low,
        kl_high=found.kl_high,
        first_order=found.first_order,
        low=found.low,
        high=found.high,
        later_kl=tuple(kl / mean_loss for kl in kls),
        later_change=tuple(change / mean_loss for change in changes),
    )


def judge_impacts(found: Sequence[Impacts]) -> Mapping[str, Any]:
    """Return what the predictions were worth, by material."""
    return {f"loss impact, {study.material}": _judged(study) for study in found if study.rows}


def _judged(study: Impacts) -> dict[str, Any]:
    rows = [row for row in study.rows if fmean(row.later_kl) > 0]
    ratios = np.array([row.kl / fmean(row.later_kl) for row in rows])
    least, most = rows[int(ratios.argmin())], rows[int(ratios.argmax())]
    measured = [fmean(row.later_kl) for row in rows]
    inside = [[row.low <= change <= row.high for change in row.later_change] for row in rows]
    return {
        "rows": len(rows),
        "early batches": max(row.samples for row in rows),
        "later batches": len(rows[0].later_kl),
        "predicted / measured kl": {
            "median": float(np.median(ratios)),
            "p10": float(np.quantile(ratios, 0.1)),
            "p90": float(np.quantile(ratios, 0.9)),
            "lowest": float(ratios.min()),
            "lowest_at": f"{least.site}, {least.recipe}",
            "highest": float(ratios.max()),
            "highest_at": f"{most.site}, {most.recipe}",
        },
        "spearman": spearman([(row.kl, kl) for row, kl in zip(rows, measured, strict=True)]),
        **{
            f"spearman, from {few}": spearman(
                [(row.kl_of_few[index], kl) for row, kl in zip(rows, measured, strict=True)]
            )
            for index, few in enumerate(("one batch", "two batches"))
        },
        "kl_high is above the later mean": fmean(
            kl <= row.kl_high for row, kl in zip(rows, measured, strict=True) if not math.isnan(row.kl_high)
        ),
        "interval has the change on a later batch": fmean(itertools.chain(*inside)),
        "by later batch": [fmean(column) for column in zip(*inside, strict=True)],
        "sites never weighed": study.not_weighed,
        "sites not rounded": study.not_rounded,
        "seconds": study.seconds,
    }
