"""What a mod is: a frozen config that claims places of an untouched model and changes nothing itself.

A claim says: this module, or this parameter of that module, shall become what `build` returns. `loka.mods.rewrite`
collects the claims of all mods, `loka.mods.checks` refuses what cannot be done as a whole, and only then is the model
touched.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from torch import nn

from loka.naming import clean_fqn

FilterFn = Callable[[nn.Module, str], bool]

# Hooks that belong to the place in the model: the replacement gets them, as the same dicts, so that a handle the user
# holds still removes its hook. `_is_full_backward_hook` says how `_backward_hooks` is to be called.
CARRIED_HOOKS: Final[tuple[str, ...]] = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)

# The slot of a claim on the methods of a module: it gets another class, and stays the module it is.
CLASS_SLOT: Final[str] = "__class__"


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What one mod wants of one place in the model.

    The whole `module` is replaced, wherever it is registered, or with `slot` only that parameter or plain attribute of
    it. `build` makes the new value and may not touch the model; None empties the slot. A claim with a `refusal` stops
    `apply` with these words, unless `filter_fn` lets go of it. One claim per name: see `walk`.
    """

    mod: str
    fqn: str  # of `module`
    module: nn.Module
    reason: str
    slot: str = ""
    build: Callable[[], object] | None = None
    refusal: str = ""

    @property
    def name(self) -> str:
        """Name of what is replaced: the FQN of the module, parameter, attribute or `forward`."""
        slot = "forward" if self.slot == CLASS_SLOT else self.slot
        return ".".join(part for part in (self.fqn, slot) if part)

    @property
    def before(self) -> object:
        """What is there now."""
        return getattr(self.module, self.slot) if self.slot else self.module


class Mod(ABC):
    """A model rewrite. Subclasses are frozen dataclasses of their options."""

    __slots__ = ()

    # "equivalent" keeps the function of the model, "architectural" needs training.
    kind: ClassVar[Literal["equivalent", "architectural"]]
    # Whether it looks for what the other mods of the same `apply` put in.
    last: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name in messages and replacements."""
        return type(self).__name__

    @abstractmethod
    def claims(self, model: nn.Module) -> Iterable[Claim]:
        """Yield what this mod wants to replace, one claim per name of a module; the model must not be changed."""

    @abstractmethod
    def nothing_found(self, model: nn.Module) -> str:
        """Return what was looked for and what the model has that comes nearest: the message when nothing is claimed."""


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under every name it is registered by, names without wrapper parts."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield clean_fqn(name), module


def listing(names: Iterable[str], limit: int = 3) -> str:
    """Return e.g. `'a', 'b', 'c' and 4 more`."""
    known = list(dict.fromkeys(names))
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(repr(name) for name in known[:limit]) + more
