"""The result of a frozen layer as FP8 codes on their way to the next one: a tensor to everybody else.

    h = self.a(x)        y = self.b(h)

Where nothing but `b` reads what `a` returns, `a` quantises it by the recipe of `b`, and `h` is codes and scales. It has
the shape, the dtype and the device of what it stands for. A frozen layer of that recipe multiplies the codes as they
are. Whatever else is done to `h` is done to the numbers that they stand for, in the model's dtype: a model that goes
another way than it was seen to go computes with values rounded to FP8, once. It is told in the log, and from then on
that layer returns high precision, as it does under autocast, while a hook watches it, and when its kernel has failed.

Who may write to the numbers, itself or by a view of them, makes them what `h` is from then on: `h` is open, and the
next layer multiplies what was written. In code that is traced, too: they are one of the tensors of `h` there.
"""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Self, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.utils._pytree import tree_leaves, tree_map

from loka.dispatch.freezing.exported import leaves_as, recorder
from loka.dispatch.freezing.handing import Passed, is_bare, is_usable, run, runs_apart, storage_of, takes_codes
from loka.dispatch.running.convert import FROZEN
from loka.formats import RECIPES
from loka.kernel_registry.operands import Operand
from loka.quantize import dequantize
from loka.torch_release import being_compiled

log: Final = logging.getLogger("loka.dispatch")

# By name, for Dynamo has functions of its own in their place: what tells of a tensor and reads none of its numbers.
# Of attributes, `__get__`, those that are numbers are operators, and come by as such.
_TELLING: Final[frozenset[str]] = frozenset(
    ("__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size")
    + ("is_floating_point", "is_complex", "is_inference", "is_contiguous", "get_device", "__len__", "__hash__")
    + ("is_conj", "is_neg", "_is_view")
)
# What returns a tensor as it is where there is nothing to do.
_CONVERSIONS: Final[frozenset[str]] = frozenset(
    ("contiguous", "to", "type_as", "float", "half", "bfloat16", "double", "cpu", "cuda")
)


class Handed(Tensor):
    """Codes [rows, k] and scales that stand for a tensor [.., k]; see above."""

    codes: Tensor
    scale: Tensor
    recipe: str
    # Its numbers, once somebody may write to them.
    opened: Tensor | None = None
    # Not of code that is traced: whose result it is.
    writer: "weakref.ref[nn.Module] | None" = None
    # Whether it came to code that is traced from outside.
    given: bool = False

    @staticmethod
    def __new__(
        cls: type[Self], codes: Tensor, scale: Tensor, leading: Sequence[int], dtype: torch.dtype, recipe: str
    ) -> Self:
        """Make a tensor without memory of its own."""
        shape = (*leading, codes.shape[-1])
        make: Any = Tensor._make_wrapper_subclass
        made: Self = make(cls, shape, dtype=dtype, device=codes.device)
        return made

    def __init__(self, codes: Tensor, scale: Tensor, leading: Sequence[int], dtype: torch.dtype, recipe: str) -> None:
        self.codes, self.scale, self.recipe = codes, scale, recipe
        leaves_as(self, _opened)

    @classmethod
    def of(cls, passed: Passed, writer: nn.Module) -> "Handed":
        """Return what a layer hands on, as a tensor."""
        codes, scale, _ = passed.operand
        made = cls(codes, scale, passed.leading, passed.dtype, storage_of(writer).hands)
        if not torch.compiler.is_compiling():
            made.writer = weakref.ref(writer)
        return made

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, str, bool]]:
        is_open = self.opened is not None
        return ["codes", "scale", *(["opened"] if is_open else [])], (self.dtype, self.recipe, is_open)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], kept: tuple[torch.dtype, str, bool], size: torch.Size, stride: Any
    ) -> "Handed":
        made = Handed(inner["codes"], inner["scale"], tuple(size[:-1]), *kept[:2])
        made.opened, made.given = inner.get("opened"), True
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's shows the numbers
        return f"Handed({list(self.shape)}, {self.dtype}, {self.codes.dtype} {self.recipe})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in _TELLING or (name == "untyped_storage" and TracingContext.try_get() is not None):
            # Before torch 2.12 Dynamo asks for the storage of what it describes this way, and writes nothing to it.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        if _changes_nothing(name, func, args, options):
            return args[0]
        if _is_traced(args, options) and recorder() is None:
            # What a function comes to are operators, which say what they write to: they come by below.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        return _applied(func, args, options)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates it otherwise
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if _is_traced(args, options):
            _open_shared(func, args, options)
        return _applied(func, args, options)


def _is_traced(args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a graph is made of code that calls this, and not of this: Dynamo traces what runs between two graphs."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return any(being_compiled(each.codes) for each in tree_leaves((args, options)) if isinstance(each, Handed))


def _applied(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Apply a function to numbers; what it wrote to and returns is as it was handed over."""
    if torch.compiler.is_dynamo_compiling():
        return _untraced(func, args, options)
    out = func(*tree_map(_opened, tuple(args)), **tree_map(_opened, dict(options)))
    given = (each for each in (*args, *options.values()) if isinstance(each, Handed))
    return next((each for each in given if each.opened is out), out)


_untraced: Final[Any] = _disable_dynamo(_applied)


def _open_shared(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Open what an operator of code that is traced writes to, or returns a view of.

    Not what comes from outside, where it would stay as it was: the graph ends before such an operator.
    """
    schema = getattr(func, "_schema", None)
    for at, argument in enumerate(schema.arguments if schema is not None else ()):
        value = args[at] if at < len(args) else options.get(argument.name)
        for each in value if isinstance(value, list | tuple) else (value,):
            if argument.alias_info is None or not isinstance(each, Handed):
                continue
            if each.given:
                raise UnsupportedOperatorException(func)
            if each.opened is None:
                each.opened = numbers_of(each)


def _changes_nothing(name: str, func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a function returns its first argument as it is: a dropout that drops nothing, a cast to the same type."""
    if name == "dropout":
        return not options.get("training", args[2] if len(args) > 2 else True)
    if name not in _CONVERSIONS or not args or not isinstance(args[0], Handed):
        return False
    like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
    others = [torch.empty(0, dtype=each.dtype) if isinstance(each, Handed) else each for each in args[1:]]
    return func(like, *others, **options) is like


def passed_of(handed: Handed) -> Passed:
    """Return codes and scales, for a layer that multiplies them. A function: Dynamo takes properties for constants."""
    operand = Operand(handed.codes, handed.scale, RECIPES[handed.recipe].operand("input"))
    return Passed(operand, tuple(handed.shape[:-1]), handed.dtype)


def numbers_of(handed: Handed) -> Tensor:
    """Return what codes and scales stand for, as a plain tensor."""
    values = dequantize(handed.codes, handed.scale, RECIPES[handed.recipe].operand("input"))
    return values.to(handed.dtype).reshape(handed.shape)


def _opened(value: Any) -> Any:
    """Return the numbers of what was handed to somebody who asks for them; that layer hands nothing on any more."""
    if not isinstance(value, Handed):
        return value
    if being_compiled(value.codes):
        if value.opened is None and recorder() is not None:
            value.opened = numbers_of(value)  # what is recorded are functions, that do not say what they write to
        return numbers_of(value) if value.opened is None else value.opened
    writer = None if value.writer is None else value.writer()
    if writer is not None and storage_of(writer).hands:
        storage = storage_of(writer)
        stops_handing(writer)
        log.warning(
            "%r handed FP8 to something other than %r, which this model was not seen to do before: that computed with "
            "numbers rounded to FP8, and from here on %r returns high precision.",
            storage.site,
            storage.reader,
            storage.site,
        )
    if value.opened is None:
        value.opened = numbers_of(value)
    return value.opened


def stops_handing(writer: nn.Module) -> None:
    """Have a layer return high precision from here on."""
    frozen = cast("dict[str, Any]", getattr(writer, FROZEN))
    frozen["weight"] = replace(frozen["weight"], hands="", reader="")


def read_by(module: Any, handed: Handed, *, alone: bool = False) -> Tensor | Passed:
    """Return what a frozen layer reads of what it is handed: the codes, where its kernel takes them, else numbers."""
    if handed.opened is not None:
        return handed.opened
    reads = not alone and handed.recipe == storage_of(module).reads and takes_codes(module)
    return passed_of(handed) if reads else numbers_of(handed)


def in_flow(module: Any, input: Tensor, apart: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Run a frozen layer that is handed codes, or hands codes on; where neither can be, run it `apart`."""
    storage = storage_of(module)
    alone = runs_apart(input) or not is_usable(module)
    value = read_by(module, input, alone=alone) if isinstance(input, Handed) else input
    writes = "" if alone or not is_bare(module) else storage.hands
    if not writes and not isinstance(value, Passed):
        return apart(module, value)
    out = run(module, value, writes)
    return Handed.of(out, module) if isinstance(out, Passed) else out
