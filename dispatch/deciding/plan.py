"""The plan: one decision per (site, pass) of one model, as versioned JSON that is reviewed, diffed and shipped.

A plan is untrusted input. Loading checks all of it, schema, types, ranges, before anything uses it; `check_model`
compares its fingerprint with the model it is to be applied to, and `kernel_problems` its kernels with those there are.
The same decisions make the same bytes, whatever order they come in, and the same `hash` on every rank.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from torch import nn

from loka import document
from loka.bounds import Bound
from loka.dispatch.deciding.by_rows import by_rows, depends_on_rows
from loka.dispatch.deciding.decide import Decision
from loka.errors import PlanError, nearest
from loka.formats import PASSES, Pass, pass_name
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import Registry
from loka.naming import clean_fqn, unwrap

SCHEMA = 1
KIND: Final[str] = "loka-plan"
_MAX_DIFFERENCES: Final[int] = 3


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Plan:
    """Decisions for one model.

    `fingerprint` maps parameter FQNs to shapes; `environment` says where times and evidence come from; `created` is the
    one field that is not part of the `hash`. Raises PlanError for two decisions on one (site, pass).
    """

    created: str
    model: str
    fingerprint: Mapping[str, tuple[int, ...]]
    environment: Mapping[str, str]  # device, torch, loka, time_source, run
    bound: Bound
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...] = field(default=())  # e.g. "nothing to gain here: ..."
    # Sites whose result goes to one other site alone -> that site: frozen, the first may write the FP8 that it reads.
    chains: Mapping[str, str] = field(default_factory=dict)
    # Sites whose weight is multiplied with by another module's forward -> that module: the way to reach them.
    outsides: Mapping[str, str] = field(default_factory=dict)
    _index: dict[tuple[str, Pass], Decision] = field(init=False, repr=False, compare=False)
    _hash: list[str] = field(init=False, repr=False, compare=False, default_factory=list)  # empty until it is asked for

    def __post_init__(self) -> None:
        """Sort the decisions by site and pass, and refuse what no plan can say."""
        decisions = tuple(sorted(self.decisions, key=_position))
        index: dict[tuple[str, Pass], Decision] = {}
        for decision in decisions:
            request = decision.request
            key = (request.site, request.product)
            problem = _problem(decision) if key not in index else "it is decided twice; keep one decision"
            if problem:
                raise PlanError(f"The plan's decision on {request.site}.{request.product} cannot be: {problem}.")
            index[key] = decision
        for first, then in self.chains.items():
            if first == then or any((site, "fprop") not in index for site in (first, then)):
                raise PlanError(f"The plan's chain of {first!r} and {then!r} cannot be: it decides no two such sites.")
        decided = {site for site, _ in index}
        for site in self.outsides:
            if site not in decided:
                raise PlanError(f"The plan says who multiplies with the weight of {site!r}, and decides nothing on it.")
        object.__setattr__(self, "decisions", decisions)
        object.__setattr__(self, "_index", index)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, one line per decision; a reader never sees half of it."""
        document.write_atomically(path, self.text())

    def text(self) -> str:
        """Return the plan as JSON, one line per decision; raise PlanError where no plan could be read from it again."""
        names = dict.fromkeys((*self.fingerprint, *(site for site, _ in self._index)))
        odd = next((name for name in names if not name.isprintable()), None)
        if odd is not None:
            raise PlanError(
                f"The name {odd!r} of this model holds control characters, which no plan file may. Rename the module "
                "or parameter and probe again, or use the plan in the process that has made it."
            )
        return self._text(created=True)

    @classmethod
    def parse(cls, raw: bytes, where: str) -> "Plan":
        """Read a plan from bytes that came from `where`; raise PlanError for anything that is not one."""
        return document.decode(cls, document.parse(raw, where, kind=KIND, schema=SCHEMA), where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan; raise PlanError for anything that is not one. Unknown kernels pass: see `kernel_problems`."""
        return document.decode(cls, document.read(path, kind=KIND, schema=SCHEMA), str(path))

    def __repr__(self) -> str:
        """Say what it is for; the decisions, thousands of lines, are in `text()`."""
        sites = len({decision.request.site for decision in self.decisions})
        share = f"{self.fp8_share():.0%} of the operations in FP8"
        return f"<Plan for {self.model}: {len(self.decisions)} decisions on {sites} sites, {share}, bound {self.bound}>"

    @property
    def hash(self) -> str:
        """SHA-256, in hex, of everything but `created`."""
        if not self._hash:
            self._hash.append(hashlib.sha256(self._text(created=False).encode()).hexdigest())
        return self._hash[0]

    def decision(self, site: str, product: str) -> Decision:
        """Return the decision on one site and pass (or torchao's name of it); raise PlanError when there is none."""
        key = (clean_fqn(site), pass_name(product))
        if key not in self._index:
            sites = {decision.request.site for decision in self.decisions}
            passes = [product for product in PASSES if (key[0], product) in self._index]
            known = f" It has {', '.join(passes)} of this site." if passes else nearest(key[0], sites)
            raise PlanError(f"The plan has no decision on {key[1]} of {key[0]!r}.{known}")
        return self._index[key]

    def fp8_share(self) -> float:
        """Return the share of floating-point operations, in 0..1, that the plan runs in FP8.

        Of one call per decision; where few rows and many are decided apart, one of either.
        """
        parts = [(part.request.flops, part.recipe) for decision in self.decisions for part in decision.parts]
        total = sum(flops for flops, _ in parts)
        low = sum(flops for flops, recipe in parts if recipe is not None)
        return low / total if total else 0.0

    def check_model(self, model: nn.Module) -> None:
        """Raise PlanError, naming up to three differences, when the model's parameters are not those planned for."""
        shapes: dict[str, tuple[int, ...]] = {}
        aliases: dict[int, list[str]] = {}
        for name, parameter in unwrap(model).named_parameters(remove_duplicate=False):
            fqn = clean_fqn(name)
            shapes[fqn] = tuple(parameter.shape)
            aliases.setdefault(id(parameter), []).append(fqn)
        differences = [
            f"{fqn} is {list(shapes[fqn])}, planned for {list(shape)}"
            for fqn, shape in self.fingerprint.items()
            if fqn in shapes and shapes[fqn] != tuple(shape)
        ]
        differences += [
            f"{fqn} is missing.{nearest(fqn, shapes)}".removesuffix(".")
            for fqn in self.fingerprint
            if fqn not in shapes
        ]
        # A shared parameter has several names, and a fingerprint may hold any one of them.
        differences += [
            f"{names[0]} is not in the plan"
            for names in aliases.values()
            if not any(name in self.fingerprint for name in names)
        ]
        if differences:
            more = len(differences) - _MAX_DIFFERENCES
            shown = "; ".join(differences[:_MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise PlanError(
                f"This plan was made for another model ({self.model}): {shown}. "
                "Load the plan of this model, or probe and plan it again."
            )

    def kernel_problems(self, registry: Registry, device: DeviceInfo) -> tuple[str, ...]:
        """Return one sentence per planned kernel that is unknown here, another one, or cannot run on `device`."""
        problems = []
        planned = {(part.kernel, part.recipe) for decision in self.decisions for part in decision.parts}
        for name, recipe in sorted(planned, key=lambda each: (each[0], each[1] or "")):
            if name not in registry:
                problems.append(f"the kernel {name} is unknown here.{nearest(name, registry.names())}")
            elif registry.get(name).recipe != recipe:
                problems.append(f"the kernel {name} has the recipe {registry.get(name).recipe} here, not {recipe}.")
            elif reason := registry.unavailable(registry.get(name), device):
                problems.append(f"the kernel {name} cannot run here: {reason}.")
        return tuple(problems)

    def _text(self, *, created: bool) -> str:
        head = {
            "kind": KIND,
            "schema": SCHEMA,
            **({"created": self.created} if created else {}),
            "model": self.model,
            "environment": dict(self.environment),
            "bound": document.encode(self.bound),
            "fingerprint": document.encode(self.fingerprint),
            "notes": list(self.notes),
            **({"chains": dict(self.chains)} if self.chains else {}),
            **({"outsides": dict(self.outsides)} if self.outsides else {}),
        }
        lines = [f'"{key}":{document.compact(value)},\n' for key, value in head.items()]
        decisions = ",\n".join(document.compact(document.encode(decision)) for decision in self.decisions)
        return "{" + "".join(lines) + '"decisions":[\n' + decisions + "\n]}\n"


def _position(decision: Decision) -> tuple[str, int]:
    return decision.request.site, PASSES.index(decision.request.product)


def _problem(decision: Decision) -> str:
    """Return what contradicts itself inside one decision, or ""."""
    request = decision.request
    if not request.site or not decision.kernel:
        return "it names no site" if not request.site else "it names no kernel"
    if not decision.m_min <= request.m <= decision.m_max:
        return f"m is {request.m}, outside of {decision.m_min} to {decision.m_max}"
    if decision.recipe is None and decision.kernel != decision.baseline:
        return f"{decision.kernel} has no recipe and is not the baseline {decision.baseline}"
    if decision.time_us == 0 or decision.baseline_time_us == 0:
        return "a kernel takes no time"
    kept = decision.kept_experts
    if kept and (decision.recipe is None or kept[0] < 0 or any(b <= a for a, b in pairwise(kept))):
        return "kept_experts are ascending numbers of experts, beside a kernel with a recipe"
    return _problem_of_ranges(decision)


def _problem_of_ranges(decision: Decision) -> str:
    """Return what contradicts itself in a decision on few rows and many, or in one that names two kernels; or ""."""
    request, ranges = decision.request, decision.ranges
    if ranges is None:
        return (
            "its kernel is one of few rows and one of many, without ranges" if depends_on_rows(decision.kernel) else ""
        )
    if len(ranges) != 2 or any(part.ranges is not None or depends_on_rows(part.kernel) for part in ranges):
        return "ranges are two, of few rows and of many, with a kernel each"
    few, many = ranges
    if request.product != "fprop" or few.kernel == many.kernel:
        return "ranges are those of a forward product on two kernels"
    for part in ranges:
        if replace(part.request, m=request.m) != request or part.baseline != decision.baseline:
            return "a range is of another product"
        if problem := _problem(part):
            return f"of one of its ranges, {problem}"
    if (few.m_min, few.m_max + 1, many.m_max) != (decision.m_min, many.m_min, decision.m_max):
        return "its ranges do not follow on each other from the least rows to the most"
    if len({part.kept_experts for part in ranges if part.recipe is not None}) > 1 or decision.kept_experts:
        return "its ranges keep different experts"
    recipes = dict.fromkeys(str(part.recipe) for part in ranges if part.recipe is not None)
    if decision.kernel != by_rows(few.kernel, few.m_max, many.kernel) or decision.recipe != ", ".join(recipes):
        return "its kernel and recipe are not those of its ranges"
    return ""
