"""What equivalent mods do to trained language models on real text: the same output, and a smaller error in FP8.

    python -m benchmarks.mods.equivalent [--quick] [--material smollm2] [--split domain]

Each mod, and each combination, is applied to the model as it is, on early batches, and judged on later ones that share
no text with them, of the same domains or, with --split domain, of another (code first, chat later): how far the fp32
output moves; the row_error of every site, all products of it rounded and everything before it exact, 99th percentile
and mean over rows, at the five sites that were worst before; and the divergence (KL) of the model's output when the
products of all studied sites are rounded at once: of SmolLM2 the 42 linears of six layers, of MiniLM all 36. Everything
else stays in high precision. Beside it stands what that costs: the multiply-adds of the studied sites in high
precision, a full basis among them, and in FP8, in units of their products. `KeepShareHigh` is given the sites that are
among the ten worst on early text, of either recipe.
"""

import argparse
import gc
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from time import process_time
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import loka.mods
from benchmarks.record import write_record
from benchmarks.truth.language import HALF, SCALE
from benchmarks.truth.materials import SPLITS, Material, Split, build, missing
from loka.formats import Recipe, recipe
from loka.mods import FoldNorm, FuseParallelLinears, Hadamard, KeepRowsHigh, KeepShareHigh, Smooth
from loka.mods.claims import Mod
from loka.mods.trial.gain import rounded_product
from loka.mods.trial.wrapping import KeptLinear, LinearWrapper
from loka.numerics import product_error

RECIPES: Final[tuple[str, ...]] = ("rowwise", "tensorwise")
WORST: Final[int] = 5
# Moments of a full basis need several times k rows, a 99th percentile some hundred that the moments leave out, of each
# batch 50; everything else is settled by less.
_FITTED: Final[int] = 2
_FITTED_LONGER: Final[int] = 4
# Later batches whose sites, and whose output, are judged: a batch of minilm is 16 rows of logits.
_JUDGED: Final[dict[str, tuple[int, int]]] = {"smollm2": (2, 2), "minilm": (2, 4)}

# Made anew for each model, from the sites that are studied and those of them that are worst on early text.
Make = Callable[[Sequence[str], Sequence[str]], tuple[Mod, ...]]
COMBINATIONS: Final[dict[str, Make]] = {
    "Hadamard full, keep 1/16": lambda only, _: (Hadamard(balance="full", keep=1 / 16, only=only),),
    "Hadamard full, keep 1/8": lambda only, _: (Hadamard(balance="full", keep=1 / 8, only=only),),
    "Hadamard full, keep 1/4": lambda only, _: (Hadamard(balance="full", keep=1 / 4, only=only),),
    "KeepShareHigh 3 at the worst": lambda _, worst: (KeepShareHigh(times=3, only=worst),),
    "KeepShareHigh 3 at the worst, KeepRowsHigh 1/16": lambda only, worst: (
        KeepShareHigh(times=3, only=worst),
        KeepRowsHigh(only=[name for name in only if name not in worst]),
    ),
    "Hadamard full": lambda only, _: (Hadamard(balance="full", only=only),),
    "KeepRowsHigh 1/16, Hadamard full": lambda only, _: (
        KeepRowsHigh(only=only),
        Hadamard(balance="full", only=[f"re:{re.escape(name)}(\\.rest)?" for name in only]),
    ),
    "Hadamard channel": lambda only, _: (Hadamard(only=only),),
    "KeepRowsHigh 1/16": lambda only, _: (KeepRowsHigh(only=only),),
    "Smooth": lambda only, _: (Smooth(alpha=None, only=only),),
    "FoldNorm, FuseParallelLinears": lambda only, _: (FoldNorm(), FuseParallelLinears(only=only)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A material, with what its output is as logits, and how a batch is given to it."""

    material: Material
    call: Callable[[Any], Mapping[str, Any]]
    logits: Callable[[nn.Module, Any], Tensor]


def smollm2(material: Material) -> Subject:
    """Next-token logits."""

    def call(tokens: Tensor) -> Mapping[str, Any]:
        return {"input_ids": tokens, "use_cache": False, "logits_to_keep": 32}

    return Subject(
        material=material, call=call, logits=lambda model, tokens: model(**call(tokens)).logits.flatten(0, 1)
    )


def minilm(material: Material) -> Subject:
    """Which second half belongs to which first: the logits of its contrastive loss."""

    def call(tokens: Tensor) -> Mapping[str, Any]:
        halves = torch.cat([tokens[:, :HALF], tokens[:, HALF:]])
        return {"input_ids": halves, "attention_mask": torch.ones_like(halves)}

    def logits(model: nn.Module, tokens: Tensor) -> Tensor:
        first, second = F.normalize(model(**call(tokens)).last_hidden_state.mean(1), dim=-1).chunk(2)
        return SCALE * first @ second.T

    return Subject(material=material, call=call, logits=logits)


SUBJECTS: Final[dict[str, Callable[[Material], Subject]]] = {"smollm2": smollm2, "minilm": minilm}


class Rounding:
    """Rounds the operands of every nn.Linear at these sites that may go to FP8, while a recipe is set."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.recipe: Recipe | None = None
        modules = dict(model.named_modules())
        inside = {id(module): module for name in names for module in modules[name].modules()}
        self.handles = [
            module.register_forward_hook(self._round)
            for module in inside.values()
            if isinstance(module, nn.Linear) and not isinstance(module, KeptLinear)
        ]

    def _round(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.recipe is None:
            return None
        assert isinstance(module, nn.Linear)
        product = rounded_product(args[0].flatten(0, -2), module.weight, self.recipe).reshape(output.shape)
        return product if module.bias is None else product + module.bias

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        """Round under this recipe."""
        self.recipe = recipe(name)
        try:
            yield
        finally:
            self.recipe = None

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


@dataclass(slots=True)
class Sites:
    """Errors of every site, judged in one exact forward pass per batch."""

    p99: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # by site and recipe
    mean: dict[tuple[str, str], list[float]] = field(default_factory=dict)


def judge_sites(model: nn.Module, names: Sequence[str], subject: Subject, batches: Sequence[Any]) -> Sites:
    """Measure the error of the whole site, wrapper or linear, with its rounded products, on exact input."""
    sites, rounding, inside = Sites(), Rounding(model, names), [False]
    modules = dict(model.named_modules())

    def judge(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if inside[0]:
                return
            inside[0] = True
            zero = module(torch.zeros_like(args[0][..., :1, :]))  # the bias
            for known in RECIPES:
                with rounding.under(known):
                    rounded = module(args[0])
                error = product_error((rounded - zero).flatten(0, -2), (output - zero).flatten(0, -2))
                sites.p99.setdefault((name, known), []).append(error.row_error_p99)
                sites.mean.setdefault((name, known), []).append(error.row_error)
            inside[0] = False

        return hook

    try:
        run_hooked(subject, batches, [modules[name].register_forward_hook(judge(name)) for name in names])
    finally:
        rounding.remove()
    return sites


def run_hooked(subject: Subject, batches: Sequence[Any], handles: Sequence[RemovableHandle]) -> None:
    """Run a model on batches, and take the hooks away that saw them."""
    try:
        for batch in batches:
            subject.logits(subject.material.model, batch)
    finally:
        for handle in handles:
            handle.remove()


def judge_output(
    model: nn.Module, names: Sequence[str], subject: Subject, batches: Sequence[Any], exact: Sequence[Tensor]
) -> dict[str, float]:
    """Return how far the exact output moved, and KL(exact || rounded) under each recipe, means over batches."""
    rounding = Rounding(model, names)
    found: dict[str, list[float]] = {}
    for batch, before in zip(batches, exact, strict=True):
        now = subject.logits(model, batch)
        found.setdefault("moved", []).append(float((now - before).norm() / before.norm()))
        for known in RECIPES:
            with rounding.under(known):
                found.setdefault(known, []).append(divergence(before, subject.logits(model, batch)))
    rounding.remove()
    return {key: max(values) if key == "moved" else fmean(values) for key, values in found.items()}


def divergence(exact: Tensor, rounded: Tensor) -> float:
    """Return the mean over rows of KL(softmax(exact) || softmax(rounded)), in fp64, some rows at a time."""
    total = 0.0
    for some, other in zip(exact.split(128), rounded.split(128), strict=True):
        p, q = some.double().log_softmax(-1), other.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total / len(exact)


@torch.no_grad()
def study(subject: Subject, titles: Sequence[str], split: Split, *, quick: bool) -> dict[str, Any]:
    """Return the figures of one model, combination by combination."""
    model = subject.material.model
    for_sites, for_output = (split.later[: 1 if quick else count] for count in _JUDGED[subject.material.name])
    assert subject.material.sites is not None
    names = sorted(subject.material.sites)
    exact = [subject.logits(model, batch) for batch in for_output]
    before = judge_sites(model, names, subject, for_sites)
    plain = judge_output(model, names, subject, for_output, exact)
    worst = worst_sites(before, names, WORST)
    early = worst_sites(judge_sites(model, names, subject, split.early[:1]), names, 2 * WORST)
    wanted = sorted({name for some in early.values() for name in some})
    figures: dict[str, Any] = {f"{subject.material.name}: as it is": _figures(before, before, plain, plain, worst)}
    figures[f"{subject.material.name}: as it is"]["worst on early text"] = wanted
    for title in titles:
        started, mods = process_time(), COMBINATIONS[title](names, wanted)
        longer = any(isinstance(mod, KeepShareHigh) or getattr(mod, "balance", "") == "full" for mod in mods)
        inputs = [subject.call(batch) for batch in split.early[: _FITTED_LONGER if longer and not quick else _FITTED]]
        with loka.mods.apply(model, mods, inputs=inputs) as applied:
            seconds = process_time() - started
            fused = any(isinstance(mod, FuseParallelLinears) for mod in mods)
            sites = before if fused else judge_sites(model, names, subject, for_sites)
            output = judge_output(model, names, subject, for_output, exact)
            found = _figures(before, sites, plain, output, worst)
            if not fused:
                places = {name for some in worst.values() for name in some}
                found |= work_of({name: model.get_submodule(name) for name in names}, sorted(places))
            found["sites changed"] = sum(isinstance(model.get_submodule(name), LinearWrapper) for name in names)
            found["replacements"], found["refused"] = len(applied.replacements), len(applied.refused)
            found["apply, CPU seconds"] = round(seconds, 1)
        figures[f"{subject.material.name}: {title}"] = found
        print(f"{subject.material.name}: {title}: {found}", flush=True)
        gc.collect()
    return figures


def worst_sites(sites: Sites, names: Sequence[str], count: int) -> dict[str, list[str]]:
    """Return the sites with the largest p99 of row_error under each recipe, the worst first."""
    return {
        known: sorted(names, key=lambda name: fmean(sites.p99[name, known]), reverse=True)[:count] for known in RECIPES
    }


def work_of(sites: Mapping[str, nn.Module], some: Sequence[str]) -> dict[str, Any]:
    """Return the work in high precision and in FP8, in units of the products; every site has the same rows."""
    high, low, whole = ({name: measure(module) for name, module in sites.items()} for measure in (_high, _low, _whole))
    total = sum(whole.values())
    return {
        "work in high precision": round(sum(high.values()) / total, 3),
        "work in FP8": round(sum(low.values()) / total, 3),
        "work in high precision, in FP8": {
            name: [round(high[name] / whole[name], 3), round(low[name] / whole[name], 3)] for name in some
        },
    }


def _high(site: nn.Module) -> float:
    return sum(module.high_work for module in site.modules() if isinstance(module, LinearWrapper))


def _low(site: nn.Module) -> float:
    return sum(
        module.in_features * module.out_features
        for module in site.modules()
        if isinstance(module, nn.Linear) and not isinstance(module, KeptLinear)
    )


def _whole(site: nn.Module) -> float:
    assert isinstance(site, nn.Linear | LinearWrapper)
    return site.in_features * site.out_features


def _figures(
    before: Sites, after: Sites, plain: Mapping[str, float], output: Mapping[str, float], worst: Mapping[str, list[str]]
) -> dict[str, Any]:
    found: dict[str, Any] = {"output moved by": output["moved"]}
    for known in RECIPES:
        places = {name: (fmean(before.p99[name, known]), fmean(after.p99[name, known])) for name in worst[known]}
        every = [name for name, kind in before.mean if kind == known]
        ratios = [fmean(before.mean[name, known]) / fmean(after.mean[name, known]) for name in every]
        found[known] = {
            "worst five, p99 before and after": {name: [round(x, 4) for x in pair] for name, pair in places.items()},
            "worst five, p99 down by (smallest, mean)": [
                round(min(a / b for a, b in places.values()), 2),
                round(fmean(a / b for a, b in places.values()), 2),
            ],
            "all sites, mean row_error down by (smallest, median)": [round(min(ratios), 2), round(median(ratios), 2)],
            "KL": output[known],
            "KL down by": round(plain[known] / output[known], 2),
        }
    return found


def main() -> None:
    """Study the models whose packages are there, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run on two batches and one mod, without meaning")
    parser.add_argument("--material", choices=SUBJECTS, action="append", help="limit the study to these models")
    parser.add_argument("--mods", choices=COMBINATIONS, action="append", help="limit the study to these combinations")
    parser.add_argument(
        "--split", choices=SPLITS, default=SPLITS[0], help="what later batches have in common with early"
    )
    options = parser.parse_args()
    titles = options.mods or list(COMBINATIONS)[: 1 if options.quick else None]
    torch.set_num_threads(1)
    for name, make in SUBJECTS.items():
        if options.material and name not in options.material:
            continue
        if reason := missing(name):
            print(reason)
            continue
        settings = {
            "recipes": RECIPES,
            "fitted batches": _FITTED,
            "fitted batches, full basis and KeepShareHigh": _FITTED_LONGER,
            "judged batches, sites and output": _JUDGED[name],
        }
        subject = make(build(name))
        figures = study(subject, titles, subject.material.splits[options.split], quick=options.quick)
        chosen = ["--material", name, *(part for title in options.mods or () for part in ("--mods", title))]
        other = options.split != SPLITS[0]
        chosen += ["--split", options.split] if other else []
        command = shlex.join(["python", "-m", "benchmarks.mods.equivalent", *chosen])
        part = ("-part" if options.mods else "") + (f"-{options.split}" if other else "")
        write_record(f"mods-equivalent-{name}{part}", settings, figures, command=command)


if __name__ == "__main__":
    main()
