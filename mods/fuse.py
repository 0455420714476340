"""FuseParallelLinears: linears that read one tensor become one product, and its input is rounded once for all of them.

The parent's forward still calls each of them. The first one to be called computes the results of all and keeps them;
each of the others takes its own, if it is given the very same tensor, unchanged, under the same grad and autocast mode.
Otherwise it multiplies with its own rows of the weight. So results are right whatever the parent does, and the product
is one where it does what it did on the inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.autocasting import is_cast
from loka.mods.claims import CARRIED_HOOKS, Claim, listing
from loka.mods.trial.equivalent import EquivalentMod, Place, Proposal, Refusal, linears, make_linear, unsuited
from loka.mods.trial.observe import Traffic
from loka.mods.trial.wrapping import LinearWrapper, multiply
from loka.selection import Selection

Named = tuple[str, nn.Linear]


class JoinedLinear(nn.Module):
    """The product of several linears, and what it came to for those that have not asked yet."""

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = tuple(sizes)
        self.starts = (0, *accumulate(sizes))
        self._input: Tensor | None = None
        self._mode: tuple[object, ...] = ()
        self._parts: list[Tensor | None] = []

    @property
    def is_plain(self) -> bool:
        """Whether the linear is one whose rows can be taken out."""
        return isinstance(self.linear, nn.Linear) and type(self.linear).forward is nn.Linear.forward

    def first(self, input: Tensor) -> Tensor:
        """Multiply for all, return the first result and keep the others."""
        output = self.linear(input)
        parts = [self._part(output, index) for index in range(len(self.sizes))]
        self._input, self._mode = input, self._now(input)
        self._parts = [None, *parts[1:]]
        return parts[0]

    def later(self, input: Tensor, index: int) -> Tensor:
        """Return the result of one of the others, from what is kept if it is of this very tensor."""
        part = self._parts[index] if self._input is input and self._parts else None
        if part is not None and self._mode == self._now(input):
            self._parts[index] = None
            if all(each is None for each in self._parts):
                self._input, self._parts = None, []
            return part
        if self.is_plain:
            return F.linear(input, self.rows(self.linear.weight, index), self.rows(self.linear.bias, index))
        return self._part(self.linear(input), index)

    def multiply(self, x: Tensor, index: int) -> Tensor:
        """Return the product of one of the linears alone, without bias."""
        if self.is_plain:
            return F.linear(x, self.rows(self.linear.weight, index))
        return self._part(multiply(self.linear, x), index)

    def rows(self, parameter: Any, index: int) -> Any:
        """Return what one of the linears holds of the weight or bias of all, as a view."""
        return None if parameter is None else parameter[self.starts[index] : self.starts[index + 1]]

    def _part(self, output: Tensor, index: int) -> Tensor:
        # In memory of its own, as every linear returns it: it may be viewed or changed in place.
        return output.narrow(-1, self.starts[index], self.sizes[index]).clone(memory_format=torch.contiguous_format)

    def _now(self, input: Tensor) -> tuple[object, ...]:
        """Return all that a result depends on beside the identity of the input."""
        if torch.compiler.is_compiling():
            return ()  # one graph: what changes in between is another tensor there
        dtype = torch.get_autocast_dtype(input.device.type) if is_cast(input) else None
        versions = tuple(
            -1 if tensor.is_inference() else tensor._version for tensor in (input, *self.linear.parameters())
        )
        return (*versions, torch.is_grad_enabled(), dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is kept between calls: neither a copy nor a saved model needs it."""
        return {**self.__dict__, "_input": None, "_mode": (), "_parts": []}


class JoinedPart(LinearWrapper):
    """One of several linears that are one product; all of them hold the same `shared`."""

    def __init__(self, shared: JoinedLinear, index: int, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, shared.sizes[index]
        self.shared = shared
        self.index = index
        self.register_state_dict_post_hook(_split)  # type: ignore[no-untyped-call]  # torch does not annotate it

    @property
    def weight(self) -> Tensor:
        """The rows of the weight that are this linear's, as a view."""
        rows: Tensor = self.shared.rows(self.shared.linear.weight, self.index)
        return rows

    @property
    def bias(self) -> Tensor | None:
        """The part of the bias that is this linear's, as a view."""
        part: Tensor | None = self.shared.rows(self.shared.linear.bias, self.index)
        return part

    def forward(self, input: Tensor) -> Tensor:
        """Return what the linear returns for [..., in_features]."""
        return self.shared.later(input, self.index) if self.index else self.shared.first(input)

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product of [..., in_features] without bias."""
        return self.shared.multiply(x, self.index)

    def held(self, weight: Tensor, bias: Tensor | None) -> Mapping[str, Tensor]:
        """Put the weight of this linear in its place between the others as they are by now."""
        if not self.shared.is_plain:
            return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return {f"shared.linear.{slot}": self._between(slot, part) for slot, part in given.items()}

    def _between(self, slot: str, part: Tensor) -> Tensor:
        parameter = getattr(self.shared.linear, slot)
        if parameter is None or part.shape != self.shared.rows(parameter, self.index).shape:
            return part  # load_state_dict says what is wrong with it
        rows = [self.shared.rows(parameter.detach(), index) for index in range(len(self.shared.sizes))]
        rows[self.index] = part.to(rows[0].device, rows[0].dtype)
        return torch.cat(rows)


def _split(module: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> None:
    """Give the state_dict the keys that were there before; views, as they are otherwise."""
    assert isinstance(module, JoinedPart)
    if module.shared.is_plain:
        for slot in ("weight", "bias"):
            value = state_dict.pop(f"{prefix}shared.linear.{slot}", None)
            if value is not None:
                state_dict[f"{prefix}{slot}"] = module.shared.rows(value, module.index)


@dataclass(frozen=True, slots=True)
class FuseParallelLinears(EquivalentMod):
    """Make one product of nn.Linear modules that were given the very same tensor in every call on the inputs.

    They have to agree in device, dtype, presence of a bias and what of them trains, and carry no hooks. Gates, towers
    and the projections of attention qualify wherever they lie in the model. `only`: patterns of those that may.

    Each linear `x` becomes a module with the product of all in `x.shared.linear`, one nn.Linear that is registered
    under every name: a probe and a plan know it by the first. The state_dict keeps `x.weight` and `x.bias`, as views of
    the one weight, so checkpoints from before and after load on either side; safetensors wants copies of them. Results
    are copied out, one more pass over the output, for a linear's output may be viewed and changed in place.

    Limits: if the parent leaves a linear out, what was computed for it is kept until the first one is called again. If
    another one is called before the first, it multiplies alone. Linears of different FSDP units do not go together:
    limit `only` to one unit, or apply to each. A product that is rotated (Hadamard) afterwards keeps other keys.
    """

    only: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse a malformed pattern here, not at the time of use."""
        Selection(self.only or ())

    def proposals(self, model: nn.Module, traffic: Traffic) -> Iterable[Proposal]:
        """Propose each group of linears with one input."""
        names = {id(linear): (fqn, linear) for fqn, linear in linears(model, self.only).items()}
        groups: dict[tuple[object, ...], list[Named]] = {}
        for known in traffic.order:
            if known in names and traffic.of(names[known][1]) is not None:
                groups.setdefault(tuple(traffic.linears[known].keys), []).append(names[known])
        for group in groups.values():
            if len(group) > 1:
                yield from self._of_group(group, traffic)

    def nothing_found(self, model: nn.Module) -> str:
        """Say what was looked for."""
        return "It looks for several nn.Linear that are given the very same tensor; there were none on the inputs."

    def _of_group(self, group: list[Named], traffic: Traffic) -> Iterable[Proposal]:
        alike: dict[tuple[object, ...], list[Named]] = {}
        for fqn, linear in group:
            reader = traffic.foreign.get(id(linear))
            why = f"its weight is also read by {reader}" if reader else unsuited(linear) or _hooked(linear)
            if why:
                yield Refusal(fqn=fqn, mod=self.name, reason=why)
            else:
                alike.setdefault(_kind(linear), []).append((fqn, linear))
        for members in alike.values():
            if len(members) > 1:
                yield self._place(members)
            else:
                others = listing(fqn for fqn, _ in group if fqn != members[0][0])
                why = f"it differs in device, dtype, bias or what trains from {others}, which share its input"
                yield Refusal(fqn=members[0][0], mod=self.name, reason=why)

    def _place(self, members: list[Named]) -> Place:
        shared: list[JoinedLinear] = []  # made by the first claim to be built, anew whenever the place is written

        def build(index: int) -> JoinedPart:
            if index == 0:
                shared[:] = [_joined([linear for _, linear in members])]
            return JoinedPart(shared[0], index, members[index][1].in_features)

        claims = tuple(
            Claim(
                mod=self.name,
                fqn=fqn,
                module=linear,
                build=lambda index=index: build(index),  # type: ignore[misc]
                reason=f"one product with {listing(name for name, _ in members if name != fqn)}",
            )
            for index, (fqn, linear) in enumerate(members)
        )
        return Place(mod=self.name, fqn=members[0][0], claims=claims)


def _joined(members: Sequence[nn.Linear]) -> JoinedLinear:
    sizes = [linear.out_features for linear in members]
    weight = torch.cat([linear.weight.detach() for linear in members])
    bias = None if members[0].bias is None else torch.cat([linear.bias.detach() for linear in members])
    one = make_linear(members[0], weight, bias, (members[0].in_features, sum(sizes)))
    one.training = members[0].training
    return JoinedLinear(one, sizes)


def _kind(linear: nn.Linear) -> tuple[object, ...]:
    slots = [parameter for parameter in linear._parameters.values() if parameter is not None]
    return (linear.in_features, len(slots), *((each.device, each.dtype, each.requires_grad) for each in slots))


def _hooked(linear: nn.Linear) -> str:
    hooked = any(vars(linear).get(name) for name in CARRIED_HOOKS if name != "_is_full_backward_hook")
    return "it carries hooks, which would see another product" if hooked else ""
