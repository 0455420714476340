import math

import pytest
import torch

from loka.errors import ArgumentError
from loka.workloads.quality import log_loss, normalized_entropy


def test_log_loss_equals_the_sum_written_out():
    logits, labels = [0.3, -2.0, 1.5], [1.0, 0.0, 0.0]
    probabilities = [1 / (1 + math.exp(-logit)) for logit in logits]
    expected = -(math.log(probabilities[0]) + math.log(1 - probabilities[1]) + math.log(1 - probabilities[2])) / 3
    assert log_loss(torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)) == pytest.approx(
        expected, rel=1e-14
    )


def test_log_loss_is_computed_in_float64_whatever_the_input():
    logits = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    labels = (torch.rand(100_000, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    assert log_loss(logits, labels) == log_loss(logits.double(), labels.double())


def test_log_loss_stays_finite_for_certain_predictions():
    assert log_loss(torch.tensor([-200.0, 200.0]), torch.tensor([1.0, 0.0])) == 200.0


@pytest.mark.parametrize("clicks", [1, 5, 700])
def test_the_constant_base_rate_predictor_has_normalized_entropy_one(clicks):
    labels = torch.zeros(1_000)
    labels[:clicks] = 1.0
    logits = torch.full((1_000,), math.log(clicks / (1_000 - clicks)), dtype=torch.float64)
    assert normalized_entropy(logits, labels) == pytest.approx(1.0, rel=1e-12)


def test_knowing_more_or_less_than_the_base_rate_shows():
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert normalized_entropy(torch.tensor([2.0, -2.0, -2.0, -2.0]), labels) < 1.0
    assert normalized_entropy(torch.tensor([-2.0, 2.0, 2.0, 2.0]), labels) > 1.0


def test_a_given_base_rate_replaces_that_of_the_labels():
    labels, logits = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    entropy = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert normalized_entropy(logits, labels, base_rate=0.1) == pytest.approx(log_loss(logits, labels) / entropy)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_of_one_class_have_no_normalized_entropy_of_their_own(label):
    logits, labels = torch.zeros(4), torch.full((4,), label)
    with pytest.raises(ArgumentError, match="all of one class"):
        normalized_entropy(logits, labels)
    assert normalized_entropy(logits, labels, base_rate=0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("base_rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_base_rate_without_entropy_is_refused(base_rate):
    with pytest.raises(ArgumentError, match="strictly between 0 and 1"):
        normalized_entropy(torch.zeros(2), torch.tensor([0.0, 1.0]), base_rate=base_rate)


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        (torch.zeros(3, 1), torch.zeros(3), "same shape"),
        (torch.zeros(0), torch.zeros(0), "no labels"),
        (torch.zeros(2), torch.tensor([0.0, 2.0]), "0..1"),
        (torch.zeros(2), torch.tensor([0.0, float("nan")]), "0..1"),
    ],
)
def test_what_has_no_log_loss_is_refused(logits, labels, match):
    with pytest.raises(ArgumentError, match=match):
        log_loss(logits, labels)
