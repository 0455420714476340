"""Models that return their loss, alone or beside their logits: a single number is never taken for a logit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
from loka.errors import ArgumentError
from loka.probes.sampling.losses import items_of, logits_of
from tests.probes.made_probe import recorded

RETURNS = {
    "logits": lambda loss, z: z,
    "loss": lambda loss, z: loss,
    "loss_first": lambda loss, z: (loss, z),
    "named": lambda loss, z: {"loss": loss, "y_pred": z},
}


class Clicks(nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 1)
        self.returns = returns

    def forward(self, x, y):
        z = self.down(torch.relu(self.up(x))).squeeze(-1)
        self.loss = F.binary_cross_entropy_with_logits(z, y)
        return RETURNS[self.returns](self.loss, z)


def impacts(path, returns, hook):
    torch.manual_seed(0)
    model = Clicks(returns)
    with loka.probe(model, path, every=1, overhead=1000.0, loss=hook):
        for _ in range(8):
            x = torch.randn(16, 32)
            model(x, (x[:, 0] > 0).float())
            model.loss.backward()
    run, steps = recorded(path)
    entries = [(step.step, entry) for step in steps for entry in step.products if entry.impacts]
    found = {(step, entry.site): entry.impacts["rowwise"].kl for step, entry in entries}
    return found, {step.labels for step in steps} - {""}, [event.kind for event in run.events]


@pytest.mark.parametrize("returns", ["loss_first", "named"])
def test_logits_beside_a_loss_are_weighed_as_logits_alone(tmp_path, returns):
    plain, labels, _ = impacts(tmp_path / "a.db", "logits", "bce")
    found, same_labels, events = impacts(tmp_path / "b.db", returns, "bce")
    assert plain
    assert found == pytest.approx(plain, rel=1e-6)
    assert labels == same_labels == {"closed"}
    assert "loss_hook" not in events


def test_a_model_that_returns_its_loss_alone_is_weighed_by_true_labels_and_says_so(tmp_path):
    _, labels, events = impacts(tmp_path / "run.db", "loss", "bce")
    assert labels == {"empirical"}
    assert events.count("loss_hook") == 1


def test_without_a_hook_a_returned_loss_does_not_make_the_batch_one_item(tmp_path):
    plain, *_ = impacts(tmp_path / "a.db", "logits", None)
    found, *_ = impacts(tmp_path / "b.db", "loss", None)
    assert plain
    assert found == pytest.approx(plain, rel=1e-6)


def test_what_a_model_returns_beside_its_loss_is_weighed_as_logits_only_where_it_may_be_some():
    z = nn.Linear(8, 5)(torch.randn(4, 8))
    loss, log_probs = F.cross_entropy(z, torch.arange(4)), z.log_softmax(-1)
    # What TRL's trainers make a language model return: log-probabilities of the labels, entropies, and no logits.
    others = {"log_probs": log_probs[:, 1:3], "entropy": -(log_probs.exp() * log_probs).sum(-1)}
    with torch.no_grad():
        others["mean_logits"] = z.mean(-1, keepdim=True)
    with pytest.raises(ArgumentError, match="found no logits"):
        logits_of({"loss": loss, **others})
    assert items_of({"loss": loss, **others}) == 0
    for given in ({"y": z}, {"y": z.view(2, 2, 5)}, {"y": z / 0.7}, {"y": z + z.detach()}, {"logits_per_image": z * 2}):
        (wanted,) = given.values()
        assert logits_of({"loss": loss, **others, **given}) is wanted
    assert logits_of({"y": log_probs}) is log_probs  # with no loss beside it, it is what there is


def test_a_single_number_is_a_loss_unless_a_layer_made_it():
    z = torch.randn(4, 3)
    for output in ((z.mean(), z), [z.mean(), z], {"loss": z.mean(), "y": z}):
        assert logits_of(output) is z
        assert items_of(output) == 4
    for output in (z.mean(), (z.mean(), "text"), {"loss": z.mean()}):
        assert items_of(output) == 0
        with pytest.raises(ArgumentError, match=r"found no logits in the model's output, .*probe\.forward\(\)"):
            logits_of(output)
    one = nn.Linear(8, 1)(torch.randn(8)).squeeze(-1)
    for output in (one, one.sigmoid()):
        assert logits_of(output) is output
        assert items_of(output) == 1
