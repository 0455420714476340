import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.nn import functional

from loka.errors import ArgumentError
from loka.workloads.transformer import ByteTransformer, ByteTransformerConfig, stdlib_text, text_batches

SMALL = ByteTransformerConfig(dim=32, num_layers=2, num_heads=4, mlp_hidden=64, context=32)


def build(config: ByteTransformerConfig) -> ByteTransformer:
    torch.manual_seed(0)
    return ByteTransformer(config)


@pytest.mark.parametrize("length", [1, 17, 32])
def test_logits_cover_every_byte_at_every_position(length):
    tokens = torch.randint(256, (3, length))
    assert build(SMALL)(tokens).shape == (3, length, 256)


def test_a_position_sees_itself_and_the_past_and_nothing_later():
    model = build(SMALL)
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 256
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:12].max() < 1e-6
    assert difference[12:].min() > 1e-5


def test_a_tied_head_shares_the_weight_of_the_tokens_and_an_untied_one_does_not():
    tied, untied = build(replace(SMALL, tied_head=True)), build(SMALL)
    assert tied.head.weight is tied.tokens.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 256 * 32


@pytest.mark.parametrize("tied_head", [False, True])
def test_every_parameter_gets_a_gradient(tied_head):
    model = build(replace(SMALL, tied_head=tied_head))
    tokens = torch.randint(256, (4, 33))
    functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert all(p.grad is not None and bool(p.grad.count_nonzero()) for p in model.parameters())


def test_a_short_training_on_source_code_lowers_the_loss_well_below_that_of_uniform_bytes():
    model = build(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for tokens, targets in islice(text_batches(stdlib_text(100_000), batch_size=16, length=32, seed=0), 60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert sum(losses[-5:]) / 5 < 0.65 * losses[0]


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ArgumentError, match="context 32"):
        build(SMALL)(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize(
    "change", [{"dim": 0}, {"dim": 30}, {"num_layers": 0}, {"context": 0}, {"num_heads": 0}], ids=str
)
def test_sizes_that_make_no_model_are_refused(change):
    with pytest.raises(ArgumentError, match="no model"):
        replace(SMALL, **change)


def test_text_is_python_source_and_the_same_every_time():
    text = stdlib_text(50_000)
    assert len(text) == 50_000
    assert text == stdlib_text(60_000)[:50_000]
    assert b"def " in text
    assert b"import " in text
    assert stdlib_text(0) == b""


@pytest.mark.parametrize("num_bytes", [-1, 1 << 40])
def test_text_that_does_not_exist_is_refused(num_bytes):
    with pytest.raises(ArgumentError, match="Ask for"):
        stdlib_text(num_bytes)


def test_targets_are_the_bytes_that_follow():
    text = bytes(range(200))
    for tokens, targets in islice(text_batches(text, batch_size=8, length=10, seed=0), 20):
        assert tokens.shape == targets.shape == (8, 10)
        assert tokens.dtype == torch.int64
        assert torch.equal(targets, tokens + 1)


def test_batches_reach_the_first_and_the_last_byte_and_repeat_with_the_seed():
    drawn = [
        [targets.tolist() for _, targets in islice(text_batches(b"abcd", batch_size=4, length=2, seed=seed), 8)]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {tuple(row) for batch in drawn[0] for row in batch} == {tuple(b"bc"), tuple(b"cd")}


@pytest.mark.parametrize(("batch_size", "length"), [(0, 2), (1, 0), (1, 4)])
def test_batches_that_the_text_cannot_fill_are_refused_at_once(batch_size, length):
    with pytest.raises(ArgumentError, match="text_batches"):
        text_batches(b"abcd", batch_size=batch_size, length=length, seed=0)
