"""How good click predictions are, in the two numbers recommendation teams gate on: log loss and normalized entropy.

Both are computed in float64, because the differences that matter are far below what float32 sums resolve: a relative
change of 2e-4 of the log loss already counts.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from loka.errors import ArgumentError


def log_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the mean binary cross-entropy in nats.

    `logits` and `labels` have the same shape; labels are in 0..1. NaN logits give NaN.
    """
    if logits.shape != labels.shape:
        raise ArgumentError(
            f"log_loss got logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}. "
            "Both must have the same shape. Drop the extra axis, e.g. with logits.squeeze(-1)."
        )
    _check_labels(labels)
    loss = functional.binary_cross_entropy_with_logits(logits.detach().double(), labels.detach().double())
    return loss.item()


def normalized_entropy(logits: Tensor, labels: Tensor, base_rate: float | None = None) -> float:
    """Return the log loss over the entropy of the base rate.

    1 is a model that only knows the click rate; less is better. `base_rate` is the click rate to compare with, by
    default that of `labels`. Source: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", 2014,
    section 2.1. ArgumentError where the entropy is 0.
    """
    loss = log_loss(logits, labels)
    rate = labels.detach().double().mean().item() if base_rate is None else base_rate
    if not 0.0 < rate < 1.0:
        source = "the labels are all of one class" if base_rate is None else "base_rate was given"
        raise ArgumentError(
            f"normalized_entropy needs a base rate strictly between 0 and 1, and it is {rate} ({source}): the entropy "
            "to divide by is 0. Evaluate on more rows, or pass the base rate of the training data."
        )
    return loss / -(rate * math.log(rate) + (1.0 - rate) * math.log1p(-rate))


def _check_labels(labels: Tensor) -> None:
    if labels.numel() == 0:
        raise ArgumentError("There are no labels, so no log loss. Pass at least one row.")
    low, high = (bound.item() for bound in torch.aminmax(labels))
    if not (low >= 0.0 and high <= 1.0):
        raise ArgumentError(
            f"Labels range from {low} to {high}. The log loss is defined for labels in 0..1. "
            "Map the classes to 0 and 1 first."
        )
