"""FuseEpilogue: a linear layer, the BlockNorm behind it and the activation behind that become one module.

The linear layer changes its class and keeps its place, its name and its parameters; norm and activation become
nn.Identity, so that what calls them stays as it is, and an activation that is called as a function hands on its input.
`chains` tells where the three are found.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import nn

from loka.mods.block_norm import BlockRMSNorm
from loka.mods.chains import Chain, chains_in
from loka.mods.claims import CLASS_SLOT, Claim, Mod, listing, walk
from loka.mods.fused_linear import FusedLinearNormAct, fused_class
from loka.mods.source.calls import Call, Rewrite, exchanged
from loka.mods.source.methods import written_as
from loka.selection import Selection, select


@dataclass(frozen=True, slots=True)
class Part:
    """Builds one of the replacements that make sense together only: of `together`, all claims or none."""

    make: Callable[[], object]
    together: tuple[str, ...]

    def __call__(self) -> object:
        """Return the replacement."""
        return self.make()


@dataclass(frozen=True, slots=True)
class FuseEpilogue(Mod):
    """Fuse nn.Linear, BlockRMSNorm and, where it follows, nn.Hardswish or relu(x)^2 into one `FusedLinearNormAct`.

    It is carried out after all other mods of the same `apply`, so [BlockNorm(256), HardSwish(), FuseEpilogue()] is one
    call. A linear layer whose output goes elsewhere too, one that is parametrized, and modules that are shared or have
    hooks are left alone. With HardSwish and blocks of 256 there is a fused kernel on GPUs with FP8; in all other cases
    the numbers are those of the three modules.

    `only`: patterns (see `loka.selection`) of the linear layers, all by default.

    Checkpoints: no key changes; the weights are the same objects, so every checkpoint loads either way.
    """

    only: str | Sequence[str] | None = None

    kind: ClassVar[Literal["equivalent", "architectural"]] = "architectural"
    last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a malformed pattern here, not at the time of use."""
        Selection(self.only or ())

    def claims(self, model: nn.Module) -> Iterable[Claim]:
        """Claim the modules of each chain. Raises ArgumentError for an `only` pattern that matches no linear layer."""
        names: dict[int, list[str]] = {}
        for fqn, module in walk(model):
            names.setdefault(id(module), []).append(fqn)
        chains = {name: chain for chain in chains_in(model) for name in names[id(chain.linear)]}
        chosen = chains if self.only is None else select(self.only, chains, what="linear with a BlockNorm", inside=True)
        for fqn in chosen:
            yield from self._of_chain(fqn, chains[fqn], names)
        yield from self._of_owners([chains[fqn] for fqn in chosen], names)

    def _of_chain(self, fqn: str, chain: Chain, names: Mapping[int, Sequence[str]]) -> Iterator[Claim]:
        at = names[id(chain.linear)].index(fqn)
        places = [names[id(module)][at] for module in chain.modules]
        calls = [_forward(names[id(chain.owner)][at])] if isinstance(chain.activation, Call) else []
        together = (_forward(fqn), *places[1:], *calls)
        made = partial(fused_class, chain.norm.block, chain.activation_name, chain.norm.eps)
        for module, place in zip(chain.modules, places, strict=True):
            is_linear = module is chain.linear
            yield Claim(
                mod=self.name,
                fqn=place,
                module=module,
                slot=CLASS_SLOT if is_linear else "",
                build=Part(made if is_linear else nn.Identity, together),
                reason=f"one module with {listing(together[1:])}" if is_linear else f"now a part of {fqn!r}",
            )

    def _of_owners(self, chains: Sequence[Chain], names: Mapping[int, Sequence[str]]) -> Iterator[Claim]:
        """Claim the methods that call an activation which is a part of a linear layer now."""
        taken: dict[int, tuple[nn.Module, dict[Call, nn.Linear]]] = {}
        for chain in chains:
            if isinstance(chain.activation, Call) and chain.owner is not None:
                taken.setdefault(id(chain.owner), (chain.owner, {}))[1][chain.activation] = chain.linear
        for owner, linears in taken.values():
            calls = tuple(replace(each, stand_in="unchanged") if each in linears else each for each in exchanged(owner))
            for at, name in enumerate(names[id(owner)]):
                parts = [names[id(linear)][at] for linear in linears.values()]
                yield Claim(
                    mod=self.name,
                    fqn=name,
                    module=owner,
                    slot=CLASS_SLOT,
                    build=Part(Rewrite(written_as(owner), calls), tuple(map(_forward, parts))),
                    reason=f"its activation is now a part of {listing(parts)}",
                )

    def nothing_found(self, model: nn.Module) -> str:
        """Say that it is applied already, or what is missing."""
        text = "It looks for an nn.Linear and a BlockRMSNorm that follow each other."
        fused = [fqn for fqn, module in walk(model) if isinstance(module, FusedLinearNormAct)]
        if fused:
            return f"{text} It is applied already: {listing(fused)} are FusedLinearNormAct."
        norms = [fqn for fqn, module in walk(model) if isinstance(module, BlockRMSNorm)]
        if norms:
            return f"{text} The model has {listing(norms)}, behind none of its linears alone."
        return f"{text} The model has no BlockRMSNorm: apply BlockNorm first, or in the same call."


def _forward(fqn: str) -> str:
    """Return the name of the claim on the class of a module."""
    return f"{fqn}.forward" if fqn else "forward"
