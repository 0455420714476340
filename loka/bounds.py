"""What the user allows: an error bound, and the confidence at which it has to hold.

    Bound(row_error=0.05)   each product: the mean error of its rows
    Bound(sqnr_db=30)       each product: the signal-to-quantisation-noise ratio of the whole tensor
    Bound(loss=2e-4)        all forward products together: one budget, relative to the loss

What rounding does to a backward product changes no loss in the same step, so under a bound on the loss dgrad and wgrad
are judged by what their gradients lose: the default bound on the row error, and a bound on the bias along the gradient.

`per_site` holds some sites to a bound of their own, all their passes alike; under a bound on the loss they leave the
budget. Patterns are those of `loka.selection`, one that names a container covers what lies in it, and the first that
matches counts. A signal-to-noise ratio in dB is a relative error written otherwise, and is judged as one.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Union

from loka.errors import ArgumentError
from loka.formats import Pass
from loka.selection import Selection, select

Metric = Literal["row_error", "sqnr_db", "loss"]

DEFAULT_ROW_ERROR: Final[float] = 0.05
DEFAULT_CONFIDENCE: Final[float] = 0.95
# Under a bound on the loss, the most that a gradient may shrink or grow on average. Rounding to nearest leaves a few
# thousandths; flushing to zero, which does train differently, is far above it.
GRADIENT_BIAS: Final[float] = 0.01
_EXAMPLES: Final[dict[Metric, str]] = {"row_error": "row_error=0.05", "sqnr_db": "sqnr_db=30", "loss": "loss=2e-4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What one product is held to, and by which pattern of the bound; no pattern: by the bound as a whole."""

    metric: Metric
    value: float
    bias: float | None = None  # the most of the absolute bias; None: any
    pattern: str | None = None

    @property
    def most(self) -> float:
        """The limit as the most that may be: a ratio in dB as the relative error that it stands for."""
        return float(10.0 ** (-self.value / 20.0)) if self.metric == "sqnr_db" else self.value

    @property
    def words(self) -> str:
        """The limit as numbers are compared with it, e.g. `0.05`, `0.0316 (30 dB)` or `0.01 of 'head*'`."""
        of = f" of {self.pattern!r}" if self.pattern is not None else ""
        return (f"{self.most:.3g} ({self.value:g} dB)" if self.metric == "sqnr_db" else f"{self.value:g}") + of

    def __str__(self) -> str:
        """Return e.g. `row_error <= 0.05` or `sqnr_db >= 30 dB`."""
        return _shown(self.metric, self.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteBound:
    """A bound on the sites that a pattern covers: exactly one of the two. Raises ArgumentError."""

    pattern: str
    row_error: float | None = None
    sqnr_db: float | None = None

    def __post_init__(self) -> None:
        """Refuse a pattern that is none, and a bound that says nothing or two things."""
        Selection(self.pattern)
        metric, value = _only_limit({"row_error": self.row_error, "sqnr_db": self.sqnr_db}, self.pattern)
        object.__setattr__(self, metric, float(value))

    @property
    def limit(self) -> Limit:
        """What the sites are held to."""
        metric, value = _only_limit({"row_error": self.row_error, "sqnr_db": self.sqnr_db}, self.pattern)
        return Limit(metric=metric, value=value, pattern=self.pattern)

    def __str__(self) -> str:
        """Return e.g. `row_error <= 0.01 on 'head*'`."""
        return f"{self.limit} on {self.pattern!r}"


PerSite = Union[Mapping[str, "Bound"], Iterable[SiteBound]]  # noqa: UP007 - a forward reference


@dataclass(frozen=True, slots=True, init=False)
class Bound:
    """An accuracy bound: `row_error` or `sqnr_db` per GEMM, or `loss`, a share of the model's loss to spend over sites.

    Exactly one of these is given:

    - `row_error`: the most that the mean over output rows of |y_fp8 - y| / |y| may be, of each product by itself.
    - `sqnr_db`: the same as a ratio of signal to noise, the least that it may be, in dB.
    - `loss`: a share of the loss, e.g. 2e-4, for all products of the model together.

    Beside it:

    - `per_site`: patterns (see `loka.selection`) of sites, each with a `row_error` or `sqnr_db` of its own:
      `{"head*": Bound(row_error=0.01)}`.
    - `confidence`: in [0.5, 1), by default 0.95; family-wise over all rows of a report; of a budget of loss, that of
      the sum.

    Raises ArgumentError.
    """

    row_error: float | None = None
    sqnr_db: float | None = None
    loss: float | None = None
    confidence: float = DEFAULT_CONFIDENCE
    per_site: tuple[SiteBound, ...] = ()

    def __init__(
        self,
        *,
        row_error: float | None = None,
        sqnr_db: float | None = None,
        loss: float | None = None,
        confidence: float = DEFAULT_CONFIDENCE,
        per_site: PerSite = (),
    ) -> None:
        """Bounds are checked at once: one that says nothing, or two things, is refused."""
        _only_limit({"row_error": row_error, "sqnr_db": sqnr_db, "loss": loss})
        if not (isinstance(confidence, int | float) and 0.5 <= confidence < 1.0):
            raise ArgumentError(f"Bound(confidence={confidence!r}): confidence lies in [0.5, 1), e.g. 0.95.")
        values = {"row_error": row_error, "sqnr_db": sqnr_db, "loss": loss, "confidence": confidence}
        for name, value in values.items():
            object.__setattr__(self, name, None if value is None else float(value))
        object.__setattr__(self, "per_site", _site_bounds(per_site, confidence))

    @property
    def metric(self) -> Metric:
        """What is bounded where no pattern says otherwise."""
        return self._general[0]

    @property
    def value(self) -> float:
        """The bound on it."""
        return self._general[1]

    @property
    def _general(self) -> tuple[Metric, float]:
        return _the_limit(self.row_error, self.sqnr_db, self.loss)

    def limit(self, product: Pass, site: str) -> Limit:
        """Return what a pass of a site is held to. A limit on the loss is the whole budget."""
        if self.per_site:
            own = _first_covering(tuple(each.pattern for each in self.per_site), site)
            if own is not None:
                return next(each.limit for each in self.per_site if each.pattern == own)
        if self.loss is not None and product != "fprop":
            return _BACKWARD
        return _limit_of_all(*self._general)

    def check_sites(self, sites: Iterable[str]) -> None:
        """Raise ArgumentError, naming the nearest site, for a pattern of `per_site` that covers none of these."""
        select((each.pattern for each in self.per_site), sites, what="site", inside=True)

    def __str__(self) -> str:
        """Return e.g. `row_error <= 0.05 (row_error <= 0.01 on 'head*') at 95 % confidence`."""
        own = f" ({', '.join(map(str, self.per_site))})" if self.per_site else ""
        return f"{_shown(self.metric, self.value)}{own} at {100 * self.confidence:g} % confidence"


_BACKWARD: Final[Limit] = Limit(metric="row_error", value=DEFAULT_ROW_ERROR, bias=GRADIENT_BIAS)


@functools.lru_cache(maxsize=64)  # asked for every product of a model, again and again
def _limit_of_all(metric: Metric, value: float) -> Limit:
    return Limit(metric=metric, value=value)


def checked_bound(bound: object) -> Bound:
    """Return a bound that was given as an argument; raise ArgumentError, with how to write one, for anything else."""
    if not isinstance(bound, Bound):
        raise ArgumentError(
            f"bound={bound!r} is not a bound. Write {', '.join(f'loka.Bound({each})' for each in _EXAMPLES.values())}."
        )
    return bound


def parse_bound(text: str, per_site: Iterable[str] = ()) -> Bound:
    """Parse `0.05`, `row_error=0.05`, `sqnr_db=30` or `loss=2e-4`, and `PATTERN=BOUND` for some sites.

    Raises ArgumentError for anything else.
    """
    parsed = _parse(text)
    if parsed is None:
        usage = f"Write --bound 0.05, {_alternatives(_EXAMPLES.values())}."
        raise ArgumentError(f"--bound {text!r} is not a bound. {usage}")
    own: dict[str, Bound] = {}
    for entry in per_site:
        pattern, bound = _split(entry)
        if pattern in own:
            raise ArgumentError(f"--bound-for bounds {pattern!r} twice. Keep one of the two.")
        own[pattern] = bound
    return _bound(*parsed, own)


def _split(entry: str) -> tuple[str, Bound]:
    """Split `PATTERN=row_error=0.01` or `PATTERN=0.01`; a pattern may hold the sign itself."""
    pattern, _, value = entry.rpartition("=")
    before, equals, name = pattern.rpartition("=")
    if equals and name.strip() in _EXAMPLES:
        pattern, value = before, f"{name}={value}"
    parsed = _parse(value)
    if not pattern or parsed is None or parsed[0] == "loss":
        why = "is not a bound for some sites" if parsed is None or not pattern else "bounds the loss, which all share"
        name = pattern or "head*"
        raise ArgumentError(f"--bound-for {entry!r} {why}. Write '{name}=row_error=0.01' or '{name}=sqnr_db=35'.")
    return pattern, _bound(*parsed, {})


def _parse(text: str) -> tuple[Metric, float] | None:
    name, separator, value = text.partition("=")
    if not separator:
        name, value = "row_error", text
    try:
        number = float(value)
    except ValueError:
        return None
    found: list[Metric] = [metric for metric in _EXAMPLES if metric == name.strip()]
    return None if not found or math.isnan(number) else (found[0], number)


def _bound(metric: Metric, value: float, per_site: Mapping[str, Bound]) -> Bound:
    limits: dict[Metric, float] = {metric: value}
    return Bound(
        row_error=limits.get("row_error"), sqnr_db=limits.get("sqnr_db"), loss=limits.get("loss"), per_site=per_site
    )


@functools.lru_cache(maxsize=64)
def _the_limit(row_error: float | None, sqnr_db: float | None, loss: float | None) -> tuple[Metric, float]:
    return _only_limit({"row_error": row_error, "sqnr_db": sqnr_db, "loss": loss})


def _only_limit(limits: Mapping[Metric, float | None], pattern: str | None = None) -> tuple[Metric, float]:
    """Return the one limit that is given and its value; `pattern`: of the sites that it is for."""
    given = {name: value for name, value in limits.items() if value is not None}
    where = "" if pattern is None else f"per_site[{pattern!r}]: "
    if len(given) != 1:
        choices = _alternatives(f"Bound({_EXAMPLES[name]})" for name in limits)
        raise ArgumentError(
            f"{where}A bound limits exactly one thing, this one limits {' and '.join(given) or 'nothing'}. "
            f"Write {choices}."
        )
    ((name, value),) = given.items()
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ArgumentError(f"{where}Bound({name}={value!r}): a bound is a positive number, e.g. {_EXAMPLES[name]}.")
    return name, value


def _site_bounds(given: PerSite, confidence: float) -> tuple[SiteBound, ...]:
    """Return the bounds of `per_site` in their order; raise ArgumentError for what one site cannot have."""
    if isinstance(given, Mapping):
        return tuple(_site_bound(pattern, bound, confidence) for pattern, bound in given.items())
    found = tuple(given)
    if not all(isinstance(each, SiteBound) for each in found):
        raise ArgumentError("per_site maps patterns to bounds. Write per_site={'head*': Bound(row_error=0.01)}.")
    twice = [each.pattern for index, each in enumerate(found) if each.pattern in {one.pattern for one in found[:index]}]
    if twice:
        raise ArgumentError(f"per_site bounds {twice[0]!r} twice, and the first would count. Keep one of the two.")
    return found


def _site_bound(pattern: str, bound: Bound, confidence: float) -> SiteBound:
    if not isinstance(bound, Bound):
        raise ArgumentError(
            f"per_site[{pattern!r}] is no bound. Write per_site={{{pattern!r}: Bound(row_error=0.01)}}."
        )
    problem = ""
    if bound.loss is not None:
        problem = "bounds the loss, which is one budget that all sites share"
    elif bound.per_site:
        problem = "has bounds per site of its own"
    elif bound.confidence not in (confidence, DEFAULT_CONFIDENCE):
        problem = f"asks for a confidence of its own ({bound.confidence:g}), which is that of the whole bound"
    if problem:
        raise ArgumentError(f"per_site[{pattern!r}] {problem}. Write Bound(row_error=0.01) or Bound(sqnr_db=35) there.")
    return SiteBound(pattern=pattern, row_error=bound.row_error, sqnr_db=bound.sqnr_db)


@functools.lru_cache(maxsize=1 << 14)
def _first_covering(patterns: tuple[str, ...], site: str) -> str | None:
    return _selection(patterns).covers(site)


@functools.lru_cache(maxsize=16)
def _selection(patterns: tuple[str, ...]) -> Selection:
    return Selection(patterns)


def _shown(metric: Metric, value: float) -> str:
    return f"sqnr_db >= {value:g} dB" if metric == "sqnr_db" else f"{metric} <= {value:g}"


def _alternatives(examples: Iterable[str]) -> str:
    *others, last = examples
    return f"{', '.join(others)} or {last}"
