"""What the mods that exchange one activation for another share: modules, functions in attributes, calls in methods."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from loka.mods.claims import Claim, Mod, listing, walk
from loka.mods.fused_linear import FusedLinearNormAct
from loka.mods.source import stand_ins
from loka.mods.source.calls import Pattern, call_claim, calls_in, exchanged
from loka.selection import Selection, select


@dataclass(frozen=True, slots=True)
class ActivationMod(Mod):
    """Base of the mods that replace one activation by another. `only`: patterns of the modules to replace it in."""

    only: str | Sequence[str] | None = None

    kind: ClassVar[Literal["equivalent", "architectural"]] = "architectural"
    looks_for: ClassVar[str]
    pattern: ClassVar[Pattern]
    replacement: ClassVar[type[nn.Module]]
    stand_ins: ClassVar[tuple[str, ...]]  # functions of `stand_ins` that calls go to, first the activation itself

    def __post_init__(self) -> None:
        """Refuse a malformed pattern here, not at the time of use."""
        Selection(self.only or ())

    @abstractmethod
    def takes(self, module: nn.Module) -> bool:
        """Return whether the module is the activation to replace."""

    @abstractmethod
    def takes_function(self, value: object) -> bool:
        """Return whether a function that a module holds in an attribute is the activation to replace."""

    @abstractmethod
    def done(self, module: nn.Module) -> bool:
        """Return whether the module computes what the replacement does, though its code calls the activation."""

    @abstractmethod
    def build(self, module: nn.Module) -> nn.Module:
        """Return the new activation for one module."""

    def claims(self, model: nn.Module) -> Iterable[Claim]:
        """Claim each place. Raises ArgumentError for an `only` pattern that matches none."""
        looked: dict[int, list[Claim]] = {}
        found: dict[str, list[Claim]] = {}
        for fqn, module in walk(model):
            if id(module) not in looked:
                looked[id(module)] = list(self._of_module(fqn, module))
            if looked[id(module)]:
                found[fqn] = [replace(claim, fqn=fqn) for claim in looked[id(module)]]
        for claim in self.of_gates(model):
            found.setdefault(claim.fqn, []).append(claim)
        chosen = found if self.only is None else select(self.only, found, what=self.looks_for, inside=True)
        for fqn in chosen:
            yield from found[fqn]

    def of_gates(self, model: nn.Module) -> Iterable[Claim]:
        """Claim what is no activation by itself, and part of one where it is called; nothing by default."""
        return ()

    def hard_gates(self, model: nn.Module) -> Iterable[str]:
        """Return the names of those that have been replaced; none by default."""
        return ()

    def _of_module(self, fqn: str, module: nn.Module) -> Iterator[Claim]:
        if self.takes(module):
            yield Claim(
                mod=self.name,
                fqn=fqn,
                module=module,
                build=lambda: self.build(module),
                reason=f"{type(module).__name__} becomes {self.replacement.__name__}",
            )
            return
        for key, value in vars(module).items():
            if self.takes_function(value):
                yield Claim(
                    mod=self.name,
                    fqn=fqn,
                    module=module,
                    slot=key,
                    build=lambda: self._function,
                    reason=f"the function becomes {self.stand_ins[0]}",
                )
        calls, refusal = calls_in(module, self.pattern)
        if (calls or refusal) and not self.done(module):
            yield call_claim(self.name, fqn, module, calls, refusal)

    def nothing_found(self, model: nn.Module) -> str:
        """Say that the mod is applied already, or which activations there are."""
        text = f"It looks for {self.looks_for}, as modules and as calls."
        applied = [fqn or "the model" for fqn, module in walk(model) if self._applied(module)]
        applied += self.hard_gates(model)
        if applied:
            return f"{text} It is applied already, in {listing(applied)}."
        other = [
            f"{fqn} ({type(module).__name__})"
            for fqn, module in walk(model)
            if type(module).__module__ == "torch.nn.modules.activation"
        ]
        return f"{text} The model has {listing(other) if other else 'no activation module'}."

    @property
    def _function(self) -> object:
        return getattr(stand_ins, self.stand_ins[0])

    def _applied(self, module: nn.Module) -> bool:
        held = any(value is self._function for value in vars(module).values())
        calls = any(call.stand_in in self.stand_ins for call in exchanged(module))
        fused = isinstance(module, FusedLinearNormAct) and module.activation == self.stand_ins[0]
        return isinstance(module, self.replacement) or held or calls or fused or self.done(module)
