"""PadToAlignment: linears of odd sizes are filled up with zeros, once, so that FP8 kernels that demand a multiple run.

Zeros change no product and no scale: they raise no largest element, and their gradients are zero, so padding stays zero
in training. The linear inside has the full size and is a site of its own, with the sizes that kernels want to see; the
state_dict has the old keys and shapes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from loka.errors import ArgumentError
from loka.mods.claims import Claim
from loka.mods.trial.equivalent import EquivalentMod, Place, Proposal, Refusal, linears, make_linear, unsuited
from loka.mods.trial.observe import Traffic
from loka.mods.trial.wrapping import LinearWrapper, multiply
from loka.selection import Selection


class PaddedLinear(LinearWrapper):
    """A linear of `in_features` and `out_features`, computed by a larger one with zeros at the ends."""

    def __init__(self, inner: nn.Linear, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.inner = inner
        self._missing, self._full_out = inner.in_features - in_features, inner.out_features
        self.register_state_dict_post_hook(_cut)  # type: ignore[no-untyped-call]  # torch does not annotate it

    def forward(self, input: Tensor) -> Tensor:
        """Return what the linear returns for [..., in_features]."""
        if input.shape[-1] != self.in_features:
            raise ArgumentError(
                f"PaddedLinear got an input of shape {tuple(input.shape)}; its last dimension has to be "
                f"{self.in_features}. It is filled up inside."
            )
        output: Tensor = self.inner(F.pad(input, (0, self._missing)) if self._missing else input)
        return output[..., : self.out_features]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear that stood here, as a view."""
        held: Tensor | None = self.inner.bias
        return None if held is None else held[: self.out_features]

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product of [..., in_features] without bias."""
        return multiply(self.inner, F.pad(x, (0, self._missing)))[..., : self.out_features]

    def held(self, weight: Tensor, bias: Tensor | None) -> Mapping[str, Tensor]:
        """Fill a weight up; a shape that is not that of the linear ends as an error of load_state_dict."""
        rows = self._full_out - self.out_features
        filled = {"inner.weight": F.pad(weight, (0, self._missing, 0, rows))}
        return filled if bias is None else {**filled, "inner.bias": F.pad(bias, (0, rows))}


def _cut(module: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> None:
    """Give the state_dict the keys and shapes of the linear that was padded; views, as they are otherwise."""
    assert isinstance(module, PaddedLinear)
    if not isinstance(module.inner, nn.Linear):
        return  # rewritten in turn: what it holds is no longer the weight
    weight, bias = state_dict.pop(f"{prefix}inner.weight", None), state_dict.pop(f"{prefix}inner.bias", None)
    if weight is not None:
        state_dict[f"{prefix}weight"] = weight[: module.out_features, : module.in_features]
    if bias is not None:
        state_dict[f"{prefix}bias"] = bias[: module.out_features]


@dataclass(frozen=True, slots=True)
class PadToAlignment(EquivalentMod):
    """Fill the sizes of nn.Linear up to a multiple of `multiple`, where they are none.

    A linear `x` becomes a module with `x.inner`, an nn.Linear of the full size: a site of its own, and the name under
    which parameters and optimizers know the weight. The state_dict keeps `x.weight` and `x.bias` with their shapes, so
    checkpoints from before and after the rewrite load on either side. What the padding costs is (k' n' - k n) / (k n)
    of the weight's memory and of the product. A head with fewer outputs than `multiple` is left alone unless `only`
    selects it: padding it would multiply its cost.
    """

    multiple: int = 16
    only: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse a multiple that cannot be meant."""
        Selection(self.only or ())
        if not isinstance(self.multiple, int) or isinstance(self.multiple, bool) or self.multiple < 2:
            raise ArgumentError(f"multiple={self.multiple!r}: give what sizes have to be a multiple of, such as 16.")

    def proposals(self, model: nn.Module, traffic: Traffic) -> Iterable[Proposal]:
        """Propose each linear of odd sizes."""
        for fqn, linear in linears(model, self.only).items():
            missing = (-linear.in_features % self.multiple, -linear.out_features % self.multiple)
            if not any(missing) or (self.only is None and linear.out_features < self.multiple):
                continue
            reader = traffic.foreign.get(id(linear))
            why = f"its weight is also read by {reader}" if reader else unsuited(linear)
            yield Refusal(fqn=fqn, mod=self.name, reason=why) if why else self._place(fqn, linear, missing)

    def nothing_found(self, model: nn.Module) -> str:
        """Say what was looked for."""
        return (
            f"It looks for nn.Linear with sizes that are no multiple of {self.multiple} and at least {self.multiple} "
            "outputs; the model has none. Name smaller ones in `only`."
        )

    def _place(self, fqn: str, linear: nn.Linear, missing: tuple[int, int]) -> Place:
        sizes = (linear.in_features + missing[0], linear.out_features + missing[1])

        def build() -> PaddedLinear:
            weight = F.pad(linear.weight.detach(), (0, missing[0], 0, missing[1]))
            bias = None if linear.bias is None else F.pad(linear.bias.detach(), (0, missing[1]))
            inner = make_linear(linear, weight, bias, sizes)
            return PaddedLinear(inner, linear.in_features, linear.out_features)

        reason = f"{linear.in_features} -> {linear.out_features} becomes {sizes[0]} -> {sizes[1]}"
        claim = Claim(mod=self.name, fqn=fqn, module=linear, build=build, reason=reason)
        return Place(mod=self.name, fqn=fqn, claims=(claim,))
