"""BlockNorm: LayerNorm and RMSNorm become a parameter-free RMS norm over blocks of features.

    y[..., block] = x[..., block] / sqrt(mean(x[..., block]^2) + eps)

No mean is subtracted, so nothing cancels; a block is normalised on its own, so one loud feature no longer silences the
whole row, and a GEMM tile can be normalised while it is on chip, because no block reaches beyond it. Blocks start at
feature 0. Where the width is no multiple of the block, the last block is shorter and normalised over its own elements.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.kernel_registry.norm_act import NORM_BLOCK, block_norm
from loka.mods.claims import Claim, Mod, listing, walk
from loka.mods.fused_linear import FusedLinearNormAct
from loka.mods.norms import NormCalls, feature_norm
from loka.mods.source.calls import call_claim, calls_in, exchanged
from loka.mods.source.methods import parameters_read, read_there_alone
from loka.numerics import MIN_COLUMNS
from loka.selection import Selection, select

# The size in the paper; it reports that convergence does not depend on the block where it is large.
DEFAULT_BLOCK: Final[int] = NORM_BLOCK


class BlockRMSNorm(nn.Module):
    """The module form of `block_norm` for inputs of `features` features. It has no parameters."""

    def __init__(self, features: int, block: int = DEFAULT_BLOCK, eps: float | None = None) -> None:
        super().__init__()
        self.features = features
        self.block = _checked_block(block)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [..., features]. Raises ArgumentError for another width."""
        if input.shape[-1] != self.features:
            raise ArgumentError(
                f"BlockRMSNorm({self.features}) got an input of shape {tuple(input.shape)}; "
                f"its last dimension has to be {self.features}."
            )
        return block_norm(input, self.block, self.eps)

    def extra_repr(self) -> str:
        """Return the options."""
        return f"{self.features}, block={self.block}, eps={self.eps}"


@dataclass(frozen=True, slots=True)
class BlockNorm(Mod):
    """Replace norms over exactly the last dimension by the RMS norm per block of features, with their eps.

    Modules are nn.LayerNorm, nn.RMSNorm, and those of other classes that compute the same (LlamaRMSNorm, T5LayerNorm,
    your own), which are recognised by their numbers; they become `BlockRMSNorm`. Calls of F.layer_norm and F.rms_norm
    in methods go to a function that does the same (`mods.source.calls`); one over several dimensions, where only the
    running shows that, computes what it did. Other norms (over the batch, groups, several dimensions), and those whose
    weight another module reads, are left alone, as the reason in each replacement says, and refused when `only` selects
    them.

    `only`: patterns (see `loka.selection`) of the norms, or of the modules that call one, all by default.

    Checkpoints: the keys `...weight` and `...bias` of the replaced norms, and of parameters that only a replaced call
    has read, are gone from the state_dict. An old checkpoint loads before `apply`, or after it with
    `load_state_dict(..., strict=False)`. The learned scale and shift are dropped and the model has to be trained
    further.
    """

    block: int = DEFAULT_BLOCK
    only: str | Sequence[str] | None = None

    kind: ClassVar[Literal["equivalent", "architectural"]] = "architectural"

    def __post_init__(self) -> None:
        """Refuse a block or pattern that cannot be meant."""
        _checked_block(self.block)
        Selection(self.only or ())

    def claims(self, model: nn.Module) -> Iterable[Claim]:
        """Claim each norm and each call of one. Raises ArgumentError for an `only` pattern that matches no norm."""
        read = parameters_read(model)
        looked = {id(module): (module, list(self._of_module(fqn, module, read))) for fqn, module in walk(model)}
        found = {fqn: looked[id(module)] for fqn, module in walk(model) if looked[id(module)][1]}
        left = [
            f"{fqn} ({type(module).__name__})"
            for fqn, (module, claims) in found.items()
            if all(claim.refusal and claim.build is None for claim in claims)
        ]
        note = f"; left alone: {listing(left)}" if left and self.only is None else ""
        chosen = found if self.only is None else select(self.only, found, what="norm", inside=True)
        for fqn in chosen:
            for claim in found[fqn][1]:
                if self.only is None and claim.refusal and claim.build is None and not claim.slot:
                    continue
                yield replace(claim, fqn=fqn, reason=f"{claim.reason}{note}")

    def _of_module(self, fqn: str, module: nn.Module, read: Mapping[int, str]) -> Iterator[Claim]:
        norm = None if isinstance(module, BlockRMSNorm) else feature_norm(module)
        if norm is not None and id(module) in read:
            refusal = f"{read[id(module)]}, and it would have none. Take it out of `only`."
            yield Claim(mod=self.name, fqn=fqn, module=module, reason="", refusal=refusal)
            return
        if norm is not None:
            yield Claim(
                mod=self.name,
                fqn=fqn,
                module=module,
                build=lambda: BlockRMSNorm(norm.features, self.block, norm.eps),
                reason=self._reason(norm.features),
            )
            return
        calls, refusal = calls_in(module, NormCalls(self.block))
        if calls or refusal:
            yield call_claim(self.name, fqn, module, calls, refusal)
            for name in read_there_alone(module, [name for call in calls for name in call.dropped]):
                reason = "it scales or shifts a norm that has become one without parameters"
                yield Claim(mod=self.name, fqn=fqn, module=module, slot=name, reason=reason)
        elif _is_norm(module):
            yield Claim(mod=self.name, fqn=fqn, module=module, reason="", refusal=_unsupported(module))

    def nothing_found(self, model: nn.Module) -> str:
        """Name norms of other kinds, or say that the mod is applied already."""
        applied = [fqn or "the model" for fqn, module in walk(model) if _applied(module)]
        if applied:
            return f"It is applied already: {listing(applied)} are or call BlockRMSNorm or a fused form of it."
        other = [
            f"{fqn} ({type(module).__name__})"
            for fqn, module in walk(model)
            if _is_norm(module) or "norm" in type(module).__name__.lower()
        ]
        near = f"has norms of another kind: {listing(other)}" if other else "has no norm"
        return (
            "It looks for nn.LayerNorm, nn.RMSNorm and what computes the same over the last dimension, as modules and "
            f"as calls; the model {near}."
        )

    def _reason(self, features: int) -> str:
        blocks, tail = divmod(features, self.block)
        sizes = [f"{blocks} of {self.block}"] if blocks else []
        if tail:
            short = ", too short for a stable RMS" if tail < MIN_COLUMNS else ""
            sizes.append(f"one of {tail}{short}")
        return f"RMS per block of features: {' and '.join(sizes)}"


def _is_norm(module: nn.Module) -> bool:
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, kinds)


def _applied(module: nn.Module) -> bool:
    calls = any(call.stand_in in ("block_layer_norm", "block_rms_norm") for call in exchanged(module))
    return calls or isinstance(module, BlockRMSNorm | FusedLinearNormAct)


def _unsupported(module: nn.Module) -> str:
    """Return why a norm cannot become a BlockRMSNorm."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return f"unsupported norm: {kind} takes its statistics over the batch. Take it out of `only`."
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return f"unsupported norm: {kind} is not over features alone. Take it out of `only`."
    if len(module.normalized_shape) != 1:
        return f"unsupported norm: it spans the last {len(module.normalized_shape)} dimensions. Take it out of `only`."
    return f"unsupported norm: {kind} has a forward of its own. Take it out of `only`."


def _checked_block(block: int) -> int:
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ArgumentError(f"block={block!r}: a block is a positive number of features, e.g. {DEFAULT_BLOCK}.")
    return block
