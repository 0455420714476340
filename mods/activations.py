"""What the mods that exchange one activation for another share: which modules they take, and what they cannot reach."""

import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from loka.errors import LokaWarning
from loka.mods.claims import Claim, Mod, listing, walk
from loka.mods.functional import callers
from loka.selection import Selection, select


@dataclass(frozen=True, slots=True)
class ActivationMod(Mod):
    """Base of the mods that replace one activation module by another. `only`: patterns of the modules to replace."""

    only: str | Sequence[str] | None = None

    kind: ClassVar[Literal["equivalent", "architectural"]] = "architectural"
    looks_for: ClassVar[str]
    functions: ClassVar[Collection[object]]  # the functional forms, which are not matched
    replacement: ClassVar[type[nn.Module]]

    def __post_init__(self) -> None:
        """Refuse a malformed pattern here, not at the time of use."""
        Selection(self.only or ())

    @abstractmethod
    def takes(self, module: nn.Module) -> bool:
        """Return whether the module is the activation to replace."""

    @abstractmethod
    def build(self, module: nn.Module) -> nn.Module:
        """Return the new activation for one module."""

    def claims(self, model: nn.Module) -> Iterable[Claim]:
        """Claim each such module. Raises ArgumentError for an `only` pattern that matches none."""
        found = {fqn: module for fqn, module in walk(model) if self.takes(module)}
        chosen = found if self.only is None else select(self.only, found, what=self.looks_for, inside=True)
        functional = callers(model, self.functions) if found and self.only is None else ()
        if functional:
            warnings.warn(
                f"{self.name} replaces modules; functional calls are not matched yet, and these stay as they are: "
                f"{', '.join(functional[:3])}.",
                LokaWarning,
                stacklevel=4,
            )
        for fqn in chosen:
            module = found[fqn]
            yield Claim(
                mod=self.name,
                fqn=fqn,
                module=module,
                build=lambda module=module: self.build(module),  # type: ignore[misc]
                reason=f"{type(module).__name__} becomes {self.replacement.__name__}",
            )

    def nothing_found(self, model: nn.Module) -> str:
        """Name the functional calls, or say that the mod is applied already, or which activations there are."""
        text = f"It looks for modules of kind {self.looks_for}."
        functional = callers(model, self.functions)
        if functional:
            return (
                f"{text} Functional calls are not matched yet; the function is called in {', '.join(functional[:3])}. "
                "Use a module there."
            )
        applied = [fqn for fqn, module in walk(model) if isinstance(module, self.replacement)]
        if applied:
            return f"{text} It is applied already: {listing(applied)} are {self.replacement.__name__}."
        other = [
            f"{fqn} ({type(module).__name__})"
            for fqn, module in walk(model)
            if type(module).__module__ == "torch.nn.modules.activation"
        ]
        return f"{text} The model has {listing(other) if other else 'no activation module'}."
