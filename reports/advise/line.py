"""The line of code that a suggestion is told with: one record, from which it is written and from which it is tried."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import loka.mods
from loka.mods.claims import FilterFn, Mod


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A mod with its arguments; what it cannot limit itself is in `passes`, the modules that a filter lets through."""

    mod: str
    first: int | None = None  # argument without a name
    options: Mapping[str, Any] = field(default_factory=dict)
    alone: str = ""  # what the filter limits it to
    passes: str | tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it as one would write it."""
        first = [] if self.first is None else [repr(self.first)]
        given = ", ".join([*first, *(f"{name}={value!r}" for name, value in self.options.items())])
        call = f"loka.mods.{self.mod}({given})"
        if not self.passes:
            return call
        test = f"== {self.passes!r}" if isinstance(self.passes, str) else f"in {list(self.passes)!r}"
        return f"{call}  # for {self.alone} alone: filter_fn=lambda module, fqn: fqn {test}"

    def made(self) -> Mod:
        """Return the mod."""
        mod: Mod = getattr(loka.mods, self.mod)(*([] if self.first is None else [self.first]), **self.options)
        return mod

    def filter_fn(self) -> FilterFn | None:
        """Return the filter, if it names one."""
        names = (self.passes,) if isinstance(self.passes, str) else self.passes
        return (lambda module, fqn: fqn in names) if names else None

    def with_all(self, others: "list[Line]") -> "Line | None":
        """Return one line for this and others; None where they differ in more than in the places they name."""
        lines = [self, *others]
        rest = [{**line.options, "only": None} for line in lines]
        if any(line.passes or "only" not in line.options for line in lines) or any(each != rest[0] for each in rest):
            return None
        only = list(dict.fromkeys(name for line in lines for name in line.options["only"]))
        return replace(self, options={**self.options, "only": only})
