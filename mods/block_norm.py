"""BlockNorm: LayerNorm and RMSNorm become a parameter-free RMS norm over blocks of features.

    y[..., block] = x[..., block] / sqrt(mean(x[..., block]^2) + eps)

No mean is subtracted, so nothing cancels; a block is normalised on its own, so one loud feature no longer silences the
whole row, and a GEMM tile can be normalised while it is on chip, because no block reaches beyond it. Blocks start at
feature 0. Where the width is no multiple of the block, the last block is shorter and normalised over its own elements.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.kernel_registry.norm_act import NORM_BLOCK, block_norm
from loka.mods.claims import Claim, Mod, listing, walk
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
    """Replace nn.LayerNorm and nn.RMSNorm over exactly the last dimension by `BlockRMSNorm`, with their eps.

    `only`: patterns (see `loka.selection`) of the norms to replace, all by default. Other norms (batch, group, over
    several dimensions, subclasses with a forward of their own) are left alone, and refused when `only` selects them.

    Checkpoints: the keys `...weight` and `...bias` of the replaced norms are gone from the state_dict. An old
    checkpoint loads before `apply`, or after it with `load_state_dict(..., strict=False)`. The learned scale and shift
    are dropped and the model has to be trained further.
    """

    block: int = DEFAULT_BLOCK
    only: str | Sequence[str] | None = None

    kind: ClassVar[Literal["equivalent", "architectural"]] = "architectural"

    def __post_init__(self) -> None:
        """Refuse a block or pattern that cannot be meant."""
        _checked_block(self.block)
        Selection(self.only or ())

    def claims(self, model: nn.Module) -> Iterable[Claim]:
        """Claim each norm. Raises ArgumentError for an `only` pattern that matches no norm."""
        norms = {fqn: module for fqn, module in walk(model) if _is_norm(module)}
        chosen = norms if self.only is None else select(self.only, norms, what="norm", inside=True)
        for fqn in chosen:
            module = norms[fqn]
            refusal = _unsupported(module)
            if refusal and self.only is None:
                continue
            yield Claim(
                mod=self.name,
                fqn=fqn,
                module=module,
                build=lambda module=module: self._replacement(module),  # type: ignore[misc]
                reason=refusal or self._reason(module),
                refusal=refusal,
            )

    def nothing_found(self, model: nn.Module) -> str:
        """Name norms of other kinds, or say that the mod is applied already."""
        applied = [fqn for fqn, module in walk(model) if isinstance(module, BlockRMSNorm)]
        if applied:
            return f"It is applied already: {listing(applied)} are BlockRMSNorm."
        other = [
            f"{fqn} ({type(module).__name__})"
            for fqn, module in walk(model)
            if _is_norm(module) or "norm" in type(module).__name__.lower()
        ]
        near = f"has norms of another kind: {listing(other)}" if other else "has no norm"
        return f"It looks for nn.LayerNorm and nn.RMSNorm over the last dimension; the model {near}."

    def _replacement(self, module: nn.Module) -> BlockRMSNorm:
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        return BlockRMSNorm(module.normalized_shape[-1], self.block, module.eps)

    def _reason(self, module: nn.Module) -> str:
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        blocks, tail = divmod(module.normalized_shape[-1], self.block)
        sizes = [f"{blocks} of {self.block}"] if blocks else []
        if tail:
            short = ", too short for a stable RMS" if tail < MIN_COLUMNS else ""
            sizes.append(f"one of {tail}{short}")
        return f"RMS per block of features: {' and '.join(sizes)}"


def _is_norm(module: nn.Module) -> bool:
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, kinds)


def _unsupported(module: nn.Module) -> str:
    """Return why a norm cannot become a BlockRMSNorm, or an empty string."""
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return f"unsupported norm: {type(module).__name__} is not over features alone. Take it out of `only`."
    if len(module.normalized_shape) != 1:
        return f"unsupported norm: it spans the last {len(module.normalized_shape)} dimensions. Take it out of `only`."
    if type(module).forward not in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return f"unsupported norm: {type(module).__name__} has a forward of its own. Take it out of `only`."
    return ""


def _checked_block(block: int) -> int:
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ArgumentError(f"block={block!r}: a block is a positive number of features, e.g. {DEFAULT_BLOCK}.")
    return block
