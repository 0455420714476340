"""What the arguments of a forward say of its batch: rows, tokens of a row, padding, and the cache it goes on in."""

import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

# In the order in which they tell how many tokens run: a decoder's before those it was given by an encoder.
_TOKENS: Final[tuple[str, ...]] = ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds")
_CACHES: Final[tuple[str, ...]] = ("past_key_values", "past_key_value", "cache_params", "past")


class Batch(NamedTuple):  # one is made for every step, and that takes a third of a frozen dataclass's time
    """What a forward is given; `length`: tokens of a row, None where the shape does not tell.

    `valid` [rows, length] is false on padding; `hidden`: padding there may be, but not in a form that is understood.
    """

    rows: int
    length: int | None
    tokens: Tensor | None  # [rows, length], integers
    valid: Tensor | None
    hidden: bool
    cache: Any
    cached: int  # tokens in the cache
    encoded: bool  # goes on from what an encoder gave
    given: tuple[Any, Any]  # its tokens and mask as they came; no tokens where another argument tells rows and length


def takes_batches(module: nn.Module) -> bool:
    """Whether a part of a model is given tokens, and so knows its batch."""
    method = getattr(module.forward, "__func__", None)  # of a class, which has many modules
    return _takes_tokens(module.forward) if method is None else _method_takes_tokens(method)


def _takes_tokens(forward: Callable[..., Any]) -> bool:
    return bool({"input_ids", "inputs_embeds"} & set(inspect.signature(forward).parameters))


_method_takes_tokens = lru_cache(maxsize=256)(_takes_tokens)


def batch_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch | None:
    """Return what the arguments of a forward say, None where no tensor is among them."""
    given = _bound(signature, args, kwargs) if args else kwargs  # binding takes as long as all the rest
    tokens = _first_tokens(given)
    if tokens is None or tokens.ndim == 0:
        return None
    cache = None
    for name in _CACHES:
        cache = given.get(name)
        if cache is not None:
            break
    cached = cache_length(cache)
    integers = not tokens.is_floating_point()
    rows, length = _shape(tokens.shape, integers)
    mask = given.get("attention_mask")
    valid, hidden = (None, False) if mask is None else valid_tokens(mask, rows, length, cached=cached)
    return Batch(
        rows=rows,
        length=length,
        tokens=tokens if integers and tokens.ndim == 2 else None,
        valid=valid,
        hidden=hidden,
        cache=cache,
        cached=cached,
        encoded=given.get("encoder_outputs") is not None,
        given=(tokens if given.get("input_ids") is tokens else None, mask),
    )


def _first_tokens(given: Mapping[str, Any]) -> Tensor | None:
    for name in _TOKENS:
        value = given.get(name)
        if isinstance(value, Tensor):
            return value
    return next((value for value in given.values() if isinstance(value, Tensor)), None)


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:  # the forward will say so itself
        return {}
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            flat.update({f"{name}[{at}]": each for at, each in enumerate(value)})
        else:
            flat[name] = value
    return flat


def _shape(shape: torch.Size, integers: bool) -> tuple[int, int | None]:
    """Return rows and tokens of a row: [rows, tokens] or [rows, tokens, features]; without rows it is one request."""
    if len(shape) == (1 if integers else 2):
        return 1, shape[0]
    if len(shape) == (2 if integers else 3):
        return shape[0], shape[1]
    return shape[0], None


def valid_tokens(mask: Any, rows: int, length: int | None, *, cached: int) -> tuple[Tensor | None, bool]:
    """Return which of the new tokens are no padding, and whether that stays hidden."""
    if not isinstance(mask, Tensor) and isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if length is None:
        return None, True
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == rows and mask.shape[1] >= length:
        return (mask.select(1, -1) if length == 1 else mask[:, -length:].reshape(-1)) != 0, False
    if length == 1 and cached:
        return None, False  # a token that was just made
    if not cached and isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[0] == rows and mask.shape[3] >= length:
        last = mask[:, 0, -1, :length]  # the last token sees every other one that is no padding
        return (last if mask.dtype == torch.bool else last == 0).reshape(-1), False
    return None, True


def cache_length(cache: Any) -> int:
    """Return how many tokens a cache holds; of an unknown kind that is there, at least one."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        # The first layer may keep what it has seen in a place of its own (MiniMax): the others know.
        return int(cache.get_seq_length()) or _length_of_layers(getattr(cache, "layers", ()))
    if isinstance(cache, tuple | list):
        first = next(iter(cache), None)
        key = next(iter(first), None) if isinstance(first, tuple | list) else first
        return int(key.shape[-2]) if isinstance(key, Tensor) and key.ndim >= 2 else int(first is not None)
    return 1


def _length_of_layers(layers: Any) -> int:
    """Return how many tokens the first layer has that has any; 0 where these are no layers of a cache."""
    for layer in layers if isinstance(layers, list | tuple) else ():
        if hasattr(layer, "get_seq_length") and (length := int(layer.get_seq_length())):
            return length
    return 0


def cache_in(output: Any) -> Any:
    """Return the cache that a forward gives back, None where there is none."""
    is_mapping = isinstance(output, dict | Mapping)
    for name in _CACHES:
        found = output.get(name) if is_mapping else getattr(output, name, None)
        if found is not None:
            return found
    values = output if isinstance(output, tuple | list) else ()
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def reference(cache: Any) -> "weakref.ref[Any] | None":
    """Return a reference that does not keep the cache, None where the cache is of a kind that has none."""
    try:
        return weakref.ref(cache)
    except TypeError:
        return None
