"""What `loka advise` says, as plain records: which mod, where, which figure calls for it, and what would change.

A prediction without an `after` says in `how` why there is none. No number here is made up: each was measured by the
probe, or computed from what the probe has learned, and `how` names the way.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from loka.reports.advise.case import Case
    from loka.reports.advise.line import Line

Status = Literal["unsafe", "undecided", "slow", "safe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """The number that calls for a mod, against its threshold."""

    name: str
    value: float
    threshold: float
    source: str  # where the threshold comes from
    words: str  # the whole figure, in words


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One number before and after a mod; `after` is None where it cannot be told, and `how` says why."""

    how: str
    before: float | None = None
    after: float | None = None
    recipe: str | None = None  # whose error or underflow it is


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What a mod would change: the error and the underflow of the forward product, the time of it in microseconds."""

    row_error: Prediction
    underflow: Prediction
    time_us: Prediction
    useless: str = ""  # why it is not advised after all: the prediction shows no gain


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteState:
    """A site that a mod concerns, and how it stands: the worst of its passes, or slow where none of them is."""

    site: str
    status: Status
    flop_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """What a detector found in one place, whether or not it reaches the threshold."""

    targets: tuple[str, ...]  # modules, or sites, that the mod would rewrite
    sites: tuple[str, ...]  # whose products it concerns
    value: float
    words: str
    idle: str = ""  # why nothing would be gained there even so


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """One mod in one place."""

    rule: str
    mod: str
    kind: str  # "equivalent" or "architectural"
    targets: tuple[str, ...]
    sites: tuple[SiteState, ...]
    figure: Figure
    predictions: Predictions
    use: str  # as one would write it


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One rule and what it came to, also where it calls for nothing."""

    rule: str
    mod: str
    figure: str
    threshold: float
    source: str
    looked_at: int  # places
    largest: float | None  # figure seen
    at: str  # where that was
    evidence: bool  # whether the run had anything that it could look at
    outcome: str  # in words
    set_aside: tuple[str, ...] = ()  # places that reach the threshold, and why nothing would be gained there


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One row of the table of rules."""

    name: str
    mod: str
    kind: Literal["equivalent", "architectural"]
    figure: str
    threshold: float
    source: str
    lacks: str  # what to do where the run has nothing that this rule could look at
    detect: "Callable[[Case, Sequence[Suggestion]], Iterable[Hit]]"
    predict: "Callable[[Case, Hit], Predictions]"
    use: "Callable[[Case, Hit, Predictions], Line]"
    spared: "Callable[[Case], str]" = lambda case: ""  # why it need not look anywhere


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """All that the evidence of one run calls for."""

    run: str
    model: str
    device: str
    bound: str
    suggestions: tuple[Suggestion, ...]
    checked: tuple[Checked, ...]
    missing: tuple[str, ...]  # evidence that is not there, and what to probe

    @property
    def headline(self) -> str:
        """What it comes to, in a sentence."""
        if not self.suggestions:
            looked = sum(each.evidence for each in self.checked)
            return f"Nothing is called for: {looked} of {len(self.checked)} rules had evidence, and none of it does."
        mods = dict.fromkeys(each.mod for each in self.suggestions)
        counts = [(mod, sum(each.mod == mod for each in self.suggestions)) for mod in mods]
        listed = ", ".join(f"{mod} ({count} place{'s' if count > 1 else ''})" for mod, count in counts)
        return f"The evidence calls for {listed}."

    def __str__(self) -> str:
        lines = [f"{each.mod} on {', '.join(each.targets)}: {each.figure.words}" for each in self.suggestions]
        return "\n".join([self.headline, *lines])


def plain_data(value: Any) -> Any:
    """Return a record as what JSON can say: infinities and NaN are null."""
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, tuple | list):
        return [plain_data(each) for each in value]
    if isinstance(value, dict):
        return {name: plain_data(each) for name, each in value.items()}
    return value
