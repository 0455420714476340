"""Where values go: which linear reads which module's output, and who else reads it.

Every tensor is followed by its storage, through views and copies, while the running module is known. So a norm whose
output is also added to a residual stream is known to have another reader, which no look at modules alone would tell.
Values are followed through a product with something else, too: scaling a channel of `up` scales that channel of
`act(gate) * up`. A probe follows the steps that it samples, and mods the inputs that they are given.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_aten = torch.ops.aten
# Their result is their argument, in other memory.
_COPIES: Final = frozenset({_aten.clone, _aten._to_copy, _aten.contiguous, _aten.alias, _aten.detach})
# Their result is their argument, element by element times something that other channels do not enter.
_PRODUCTS: Final = frozenset({_aten.mul, _aten.native_dropout})
# They read how large a tensor is, and none of its values.
_FORMS: Final = frozenset(
    {_aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like, _aten.randn_like}
    | {_aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full}
)


@dataclass(eq=False, slots=True)
class Value:
    """A tensor's storage: what wrote it, and what read it."""

    number: int
    producer: nn.Module | None = None
    readers: dict[int, bool] = field(default_factory=dict)  # id of a linear -> whether it read the very output
    others: dict[str, None] = field(default_factory=dict)  # readers that are no linear, in words


@dataclass(slots=True)
class ValueFlow:
    """What was seen of the values of one model: ids are those of modules."""

    names: Mapping[int, str]
    linears: AbstractSet[int]
    sources: AbstractSet[int]  # whose outputs are followed
    outputs: defaultdict[int, list[Value]] = field(default_factory=lambda: defaultdict(list))  # by source
    read: defaultdict[int, list[Value]] = field(default_factory=lambda: defaultdict(list))  # by linear, call by call
    stack: list[int] = field(default_factory=list)  # modules that run
    _values: dict[int, tuple[StorageWeakRef, Value]] = field(default_factory=dict)
    _products: set[int] = field(default_factory=set)  # storages of products with a value
    _count: int = 0

    # --- what happens ---

    def entered(self, module: nn.Module, x: Tensor | None) -> Value | None:
        """A module's forward begins; return the value that a linear reads."""
        self.stack.append(id(module))
        if id(module) not in self.linears or x is None:
            return None
        value = self._made(x)
        self.read[id(module)].append(value)
        features = _features_of(value.producer)
        if features is None or (x.shape[-1] == features and x.stride(-1) == 1):
            value.readers[id(module)] = value.readers.get(id(module), True) and not self._is_product(x)
        else:
            value.others[f"{self.name(id(module))} in another shape"] = None
        return value

    def left(self, module: nn.Module, output: object) -> None:
        """A module's forward ended: what it returns is a value of its own."""
        if self.stack and self.stack[-1] == id(module):
            self.stack.pop()
        if id(module) in self.sources and isinstance(output, Tensor) and is_followed(output):
            value = self._made(output, fresh=True)
            value.producer = module
            self.outputs[id(module)].append(value)

    def ran(self, func: Any, tensor: Tensor, result: Any, *, views: bool) -> None:
        """An operator read a tensor; `views`: its result is the same memory."""
        value = self._value_of(tensor)
        if value is None or views:
            return
        top = self.stack[-1] if self.stack else 0
        if top in self.linears and top in value.readers:
            return  # the product itself
        packet = func._overloadpacket
        if packet in _FORMS:
            return
        first = result[0] if isinstance(result, tuple | list) and result and packet in _PRODUCTS else result
        if isinstance(first, Tensor) and first.shape == tensor.shape and not func._schema.is_mutable:
            if packet in _COPIES:
                self._follow(first, value, product=self._is_product(tensor))
                return
            if packet in _PRODUCTS and self._value_of(first) is None:
                self._follow(first, value, product=True)
                return
        value.others[f"{packet.__name__} in {self.name(top)}"] = None

    def returned(self, output: object) -> None:
        """The model returned this."""
        for tensor in tensors_in(output):
            value = self._value_of(tensor) if is_followed(tensor) else None
            if value is not None:
                value.others["the model's caller"] = None

    # --- what it comes to ---

    def readers(self, producer: int, *, exact: bool) -> tuple[list[int], str]:
        """Return the ids of the linears that read a module's output, and nothing else does, or why not, in words.

        `exact`: each has to read the very output, and not a product with it.
        """
        values = self.outputs.get(producer, [])
        if not values:
            return [], "it was not called on the inputs"
        found: dict[int, bool] = {}
        for value in values:
            for reader, direct in value.readers.items():
                found[reader] = direct and found.get(reader, True)
        for value in values:
            if value.others:
                return [], f"its output is also read by {next(iter(value.others))}"
            if set(value.readers) != set(found):
                return [], "its output has other readers from call to call"
        if not found:
            return [], "no linear reads its output"
        if exact and not all(found.values()):
            return [], "its output is multiplied with something else before a linear reads it"
        for reader in found:
            if any(value.producer is None or id(value.producer) != producer for value in self.read[reader]):
                return [], "a linear behind it also reads other modules' outputs"
        return list(found), ""

    def reached(self, producer: int) -> set[int]:
        """Return the ids of all linears that read a module's output, whoever else does."""
        return {reader for value in self.outputs.get(producer, ()) for reader in value.readers}

    def name(self, module: int) -> str:
        """Return what a module is called in messages."""
        fqn = self.names.get(module)
        return "code outside of the model" if fqn is None else repr(fqn) if fqn else "the model's own forward"

    # --- tensors ---

    def _follow(self, result: Tensor, value: Value, *, product: bool) -> None:
        storage = result.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._values[storage._cdata] = (reference, value)
        if product:
            self._products.add(storage._cdata)
        else:
            self._products.discard(storage._cdata)

    def _is_product(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._products

    def _value_of(self, tensor: Tensor) -> Value | None:
        """Return the value of a tensor's storage; a weak reference keeps another storage from taking its address."""
        known = self._values.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[1]

    def _made(self, tensor: Tensor, *, fresh: bool = False) -> Value:
        known = None if fresh else self._value_of(tensor)
        if known is not None:
            return known
        self._count += 1
        value = Value(number=self._count)
        self._follow(tensor, value, product=False)
        return value


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists, mappings and dataclass-like outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))


def is_followed(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory of its own kind: no subclass, not sparse, and not standing for others."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    # Under a transform of torch.func it stands for others, and has no storage.
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def argument_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what a linear is given, if it can be followed."""
    x = args[0] if args else kwargs.get("input")
    return x if isinstance(x, Tensor) and is_followed(x) and x.dim() > 0 else None


def read_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Iterator[tuple[Tensor, bool]]:
    """Yield the tensors that an operator reads, and whether its result only views them."""
    results = {tensor.untyped_storage()._cdata for tensor in tensors_in(result) if is_followed(tensor)}
    changes = func._schema.is_mutable
    for tensor in tensors_in((args, kwargs)):
        if is_followed(tensor):
            yield tensor, not changes and tensor.untyped_storage()._cdata in results


def _features_of(producer: nn.Module | None) -> int | None:
    if producer is None:
        return None
    weight = producer._parameters.get("weight")
    return None if weight is None else int(weight.shape[0])
