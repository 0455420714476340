"""The contract between collecting and judging: plain records of numbers, one per (site, pass, recipe), and costs.

They cross processes and rest in files as JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from loka.formats import Pass
from loka.numerics import Gate

# body        a product with a parameter, wide enough for row norms
# head        a site whose output has fewer than 8 columns, with its gradients: judged by relative_error
# activation  a product of two activations
# exact       reduction length 1: exact by construction, no evidence
Group = Literal["body", "head", "activation", "exact"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One (site, pass, recipe): what each road predicted from early steps, and what later steps showed."""

    material: str
    split: str
    site: str  # with [1], [2] .. where one step calls it several times
    product: Pass
    recipe: str
    op: str
    m: int
    n: int
    k: int
    group: Group
    gate: Gate
    hard: bool
    early: tuple[float, ...]  # gated error per early step, 64 rows: what a probe would have
    early_full: tuple[float, ...]  # the same on as many rows as the truth: the floor of what any road can reach
    later: tuple[float, ...]  # gated error per later step, many rows: the truth
    later_mere: tuple[float, ...]
    predictions: Mapping[str, float]  # by road


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """CPU seconds at one (site, pass), all recipes together: to take an observation in a step, to predict by a road."""

    material: str
    split: str
    product: Pass
    name: str  # of the observation, or of the road
    per_step_s: float  # per sampled step
    once_s: float  # to predict from what was collected


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """Everything that one material and split gave."""

    material: str
    split: str
    step_s: float  # median CPU seconds of a plain step
    rows: tuple[Row, ...]
    costs: tuple[Cost, ...]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load(path: Path) -> Collected:
    """Read what `save` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    series = ("early", "early_full", "later", "later_mere")
    rows = tuple(Row(**{**row, **{name: tuple(row[name]) for name in series}}) for row in data["rows"])
    costs = tuple(Cost(**cost) for cost in data["costs"])
    return Collected(material=data["material"], split=data["split"], step_s=data["step_s"], rows=rows, costs=costs)
