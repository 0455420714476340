"""What the page shows beyond the report: read from the database, kept out of the JSON that programs read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loka.reports.advise.advice import Advice, Suggestion
from loka.reports.advise.text import suggestion_lines
from loka.reports.page.worth import Worth

MOST_SITES: Final[int] = 4000
# Sites over the bound whose inputs advice looks at; each takes some milliseconds.
MOST_READ: Final[int] = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """Histories and histograms by site (`histories`, `operands`), the advice, and how sure the times are.

    Of a model with more than MOST_SITES, those sites have histograms that need attention first, and the advice is left
    to its own command; so it is where it would have to read more than MOST_READ operands.
    """

    histories: Mapping[str, Any] = field(default_factory=dict)
    histograms: Mapping[str, Any] = field(default_factory=dict)
    advice: Advice | None = None
    worth: Worth | None = None
    partial: bool = False  # the model has more than MOST_SITES
    unadvised: bool = False  # the advice is left to its own command


def advice_view(advice: Advice | None) -> list[dict[str, Any]]:
    """Return the suggestions as plain data: {"mod", "where", "sites", "lines"}."""
    return [] if advice is None else [_suggestion(each) for each in advice.suggestions]


def _suggestion(suggestion: Suggestion) -> dict[str, Any]:
    return {
        "mod": suggestion.mod,
        "where": list(suggestion.targets),
        "sites": _sites(suggestion),
        "lines": list(suggestion_lines(suggestion)),
    }


def _sites(suggestion: Suggestion) -> Sequence[str]:
    return list(dict.fromkeys([*(each.site for each in suggestion.sites), *suggestion.targets]))
