"""Loss hooks: from a model's output to the gradient of a loss whose labels the model itself draws.

The curvature that an error meets is the Fisher information, and that is the square of gradients for labels drawn from
the model's own prediction, never from the data: with true labels an outlier row overstates it up to tenfold. Where one
logit decides an item the expectation over its two labels is taken in closed form, which is the Gauss-Newton term.

    bce             one logit per item and task, or the probability behind a sigmoid
    cross_entropy   logits [..., classes]
    a callable      (output, generator) -> loss per item, for labels it draws itself
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from loka.errors import ArgumentError
from loka.probes.capturing.storage import stands_for_many

Labels = Literal["closed", "sampled", "empirical"]
LossHook = Callable[[Any, torch.Generator], Tensor]
# Probabilities are kept so far from 0 and 1 that their logits stay finite.
_MARGIN: Final[float] = 1e-6
# Names of autograd nodes.
_PRODUCTS: Final[tuple[str, ...]] = ("Addmm", "Mm", "Bmm", "Baddbmm", "Addmv", "Mv", "Linear")
_LAST: Final[tuple[str, ...]] = (*_PRODUCTS, "Sigmoid")  # what models end with
_LAST_OF_TERMS: Final[tuple[str, ...]] = (*_LAST, "Add", "Div", "Tanh")  # a sum of them, with a temperature or a cap
_RESHAPES: Final[tuple[str, ...]] = (
    *("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice", "Transpose", "TBackward", "Permute"),
    *("Expand", "Alias", "Clone", "ToCopy"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoss:
    """What is known of the loss of one batch without its labels."""

    items: int
    expected: float  # mean loss per item under the model's own prediction, its entropy
    labels: Labels


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnLoss:
    """A loss for labels that the model drew; its backward starts at `root` with `gradient`."""

    root: Tensor
    gradient: Tensor  # of the loss summed over items
    facts: ModelLoss


def logits_of(output: Any) -> Tensor:
    """Return the tensor that a loss is taken of: the output, its `logits`, or the first tensor in it.

    A single number beside other tensors, or made of a whole batch, is the loss that the model has computed itself.
    What a mapping holds beside one, under other names, need not be logits: log-probabilities, entropies.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits", _named_otherwise(output))
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, list | tuple):
        found = next((value for value in output if _is_of_items(value)), None)
    if _is_of_items(found) or (_is_floating(found) and _is_made_by(found, _LAST)):
        return found  # type: ignore[no-any-return]  # narrowed above
    raise ArgumentError(
        f"The loss hook found no logits in the model's output, {_kind_of(output)}. Return the logits beside it, show "
        "them to `with probe.forward() as returned: ... returned(logits)`, or give probe(loss=...) a callable of "
        "(output, generator) that returns the loss of each item."
    )


def _named_otherwise(output: Mapping[Any, Any]) -> Any:
    """Return the first tensor of items; beside a loss of the model's own the first that is named or made as logits."""
    numbers = {name: value for name, value in output.items() if _is_floating(value)}
    has_loss = any(value.dim() == 0 for value in numbers.values())
    is_recorded = any(value.requires_grad for value in numbers.values())
    for name, value in numbers.items():
        if _is_of_items(value) and not (has_loss and is_recorded):
            return value
        if _is_of_items(value) and value.requires_grad and ("logit" in str(name) or _is_made_by(value, _LAST_OF_TERMS)):
            return value
    return None


def _kind_of(output: Any) -> str:
    if isinstance(output, Tensor) and output.dim() == 0:
        return "a single number: its loss, perhaps"
    return f"a {type(output).__name__}"


def items_of(output: Any) -> int:
    """Return how many items a model's output holds where no hook says so: all but the last dimension; 0: unknown."""
    try:
        logits = logits_of(output)
    except ArgumentError:
        return 0
    return logits.numel() if logits.dim() < 2 else logits.numel() // max(logits.shape[-1], 1)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_of_items(value: Any) -> bool:
    return _is_floating(value) and value.dim() > 0


def _is_made_by(root: Tensor, makers: tuple[str, ...]) -> bool:
    """Whether a tensor is the result of such an operator, seen through what only changes its shape or dtype."""
    node = root.grad_fn
    while node is not None and node.name().startswith(_RESHAPES) and node.next_functions:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(makers)


def binary(output: Any, generator: torch.Generator) -> DrawnLoss:
    """Binary cross-entropy of logits [items] or [items, tasks]; of probabilities where all lie in [0, 1].

    What a matrix product returns is logits, wherever it lies: few items may all be between 0 and 1 by chance.
    """
    root = logits_of(output)
    values = root.detach().double()
    is_probability = bool(((values >= 0) & (values <= 1)).all()) and not _is_made_by(root, _PRODUCTS)
    p = values.clamp(_MARGIN, 1 - _MARGIN) if is_probability else values.sigmoid()
    items = values.shape[0] if values.dim() else 1
    slope = p * (1 - p)
    labels: Labels = "closed" if values.numel() == items else "sampled"
    gradient = slope.sqrt() if labels == "closed" else p - _draw(p, generator)
    if is_probability:
        gradient = gradient / slope
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean()
    # The loss is a mean over tasks as well; the squares of independent labels add up over them, once divided.
    gradient = gradient / math.sqrt(values.numel() / max(items, 1))
    return DrawnLoss(
        root=root,
        gradient=gradient.to(root.dtype),
        facts=ModelLoss(items=items, expected=float(entropy), labels=labels),
    )


def categorical(output: Any, generator: torch.Generator) -> DrawnLoss:
    """Cross-entropy of logits [..., classes]; an item is one row of classes, e.g. one token."""
    root = logits_of(output)
    if root.dim() < 2 or root.shape[-1] < 2:
        raise ArgumentError(
            f"loss='cross_entropy' expects logits [..., classes], the model returned {tuple(root.shape)}. For one "
            "logit per item write loss='bce'."
        )
    log_p = root.detach().float().flatten(0, -2).log_softmax(-1)
    p = log_p.exp()
    drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
    gradient = p.scatter_add(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
    entropy = -(p * log_p.nan_to_num(neginf=0.0)).sum(-1).mean()
    return DrawnLoss(
        root=root,
        gradient=gradient.view(root.shape).to(root.dtype),
        facts=ModelLoss(items=p.shape[0], expected=float(entropy), labels="sampled"),
    )


def custom(hook: LossHook, output: Any, generator: torch.Generator) -> DrawnLoss:
    """Apply a user's hook: it draws labels and returns the loss of each item, with its graph."""
    losses = hook(output, generator)
    if not _is_floating(losses) or losses.dim() == 0 or losses.grad_fn is None:
        shape = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ArgumentError(
            f"The callable given as probe(loss=...) returned {shape}. It is called as loss(output, generator), draws "
            "labels from the model's own prediction, and returns the loss of each item, differentiable, not reduced."
        )
    expected = float(losses.detach().double().mean())
    return DrawnLoss(
        root=losses,
        gradient=torch.ones_like(losses),
        facts=ModelLoss(items=losses.numel(), expected=expected, labels="sampled"),
    )


HOOKS: Final[dict[str, Callable[[Any, torch.Generator], DrawnLoss]]] = {
    "bce": binary,
    "cross_entropy": categorical,
}


def apply_hook(hook: str | LossHook, output: Any, generator: torch.Generator) -> DrawnLoss:
    """Draw labels for an output. Raises ArgumentError where the hook and the output do not fit."""
    return HOOKS[hook](output, generator) if isinstance(hook, str) else custom(hook, output, generator)


def true_scale(root_value: float, loss: ModelLoss) -> float:
    """Return what the tensor that backward began at was multiplied by, relative to the mean loss per item.

    1 for a mean, the number of items for a sum. What fits neither within a factor of ten, such as a gradient scaler's
    65,536, is taken from the entropy, which a calibrated model's loss equals.
    """
    if not (root_value > 0 and loss.expected > 0 and math.isfinite(root_value)):
        return 1.0
    ratio = root_value / loss.expected
    nearest = min((1.0, float(loss.items)), key=lambda scale: abs(math.log(ratio / scale)))
    return nearest if 0.1 <= ratio / nearest <= 10.0 else ratio


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.bernoulli(p.cpu(), generator=generator).to(p.device)


def value_of(root: Any) -> float:
    """Return the value of a loss; NaN for what is none, and under `torch.vmap`, where it stands for many."""
    if not isinstance(root, Tensor) or root.numel() != 1 or root.is_meta or not root.is_floating_point():
        return math.nan
    return math.nan if root.is_nested or stands_for_many(root) else float(root.detach())
