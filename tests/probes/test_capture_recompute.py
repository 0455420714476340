"""A probe beside a user's own modes, and products that a checkpoint computes again."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.probes.made_probe import PASSES_OF_TWO, Two, probed, train
from tests.probes.made_situations import assert_as_eager


class Ops(TorchDispatchMode):
    """A user's own mode: counts every op."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [FlopCounterMode, Ops], ids=["flop-counter", "any-mode"])
@pytest.mark.parametrize("around", ["forward", "step"])
def test_a_users_own_mode_sees_its_own_products_and_none_of_ours(tmp_path, mode, around):
    model = Two()

    def counted(watched):
        counts = []

        def step(x):
            with mode(display=False) if mode is FlopCounterMode else mode() as counter:
                y = watched(x)
            counts.append(counter.get_total_flops() if mode is FlopCounterMode else dict(counter.ops))
            return y

        def whole(x):
            with mode(display=False) if mode is FlopCounterMode else mode() as counter:
                loss = watched(x).square().mean()
                loss.backward()
            counts.append(counter.get_total_flops() if mode is FlopCounterMode else dict(counter.ops))

        if around == "forward":
            train(step)
        else:
            for _ in range(4):
                whole(torch.randn(8, 16))
        return counts

    alone = counted(model)
    model.zero_grad()
    results = []
    run, steps = probed(model, tmp_path, lambda: results.append(counted(model)))
    assert_as_eager(run, steps)
    assert results[0] == alone


def test_a_users_mode_inside_the_forward(tmp_path):
    class Counting(Two):
        counts = ()

        def forward(self, x):
            with FlopCounterMode(display=False) as counter:
                y = super().forward(x)
            self.counts = (*self.counts, counter.get_total_flops())
            return y

    model = Counting()
    assert_as_eager(*probed(model, tmp_path, lambda: train(model)))
    assert len(set(model.counts)) == 1


class Checkpointed(Two):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recompute_under_checkpointing_is_not_counted_again(tmp_path, reentrant, autocast):
    model = Checkpointed(reentrant)

    def loop():
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(torch.randn(8, 16, requires_grad=True)).float().sum()
            loss.backward()

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps, PASSES_OF_TWO + Counter({("up", "dgrad"): 1}))
    assert {entry.dtype for entry in steps[0].products} == {"bfloat16" if autocast else "float32"}


class Attention(nn.Module):
    """Products of activations only, in a plain function; square, so that shapes tell nothing."""

    def __init__(self, reentrant, regions=2):
        super().__init__()
        self.reentrant, self.regions = reentrant, regions
        self.scale = nn.Parameter(torch.ones(1))

    def mix(self, x):
        return torch.bmm(torch.softmax(torch.bmm(x, x.mT + 1), -1), x)

    def forward(self, x):
        x = x * self.scale
        for _ in range(self.regions):
            x = self.mix(x) if self.reentrant is None else checkpoint(self.mix, x, use_reentrant=self.reentrant)
        return x


def train_attention(model):
    model(torch.randn(4, 8, 8, requires_grad=True)).square().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputed_products_of_activations_keep_their_site_and_pass(tmp_path, reentrant):
    results = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model = Attention(kind)

        run, steps = probed(model, tmp_path, partial(train_attention, model))
        assert run.progress.unattributed == 0
        results.append({(e.site, e.product): (e.calls, e.errors) for e in steps[0].products})
    plain, recomputed = results
    assert set(plain) == {(f"Attention#{i}", p) for i in range(1, 5) for p in ("fprop", "dgrad", "wgrad")}
    assert recomputed.keys() == plain.keys()
    assert recomputed == plain


def test_root_itself_under_checkpointing_counts_each_step_once(tmp_path):
    model = Two()

    def loop():
        train(lambda x: checkpoint(model, x, use_reentrant=False))

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps)
    assert run.progress.steps == 4


def test_nested_reentrant_checkpoints(tmp_path):
    class Nested(Two):
        def forward(self, x):
            inner = super().forward
            return checkpoint(lambda y: checkpoint(inner, y, use_reentrant=True) * 2, x, use_reentrant=True)

    model = Nested(16, 16)

    def loop():
        for _ in range(4):
            model(torch.randn(16, 16, requires_grad=True)).sum().backward()

    assert_as_eager(*probed(model, tmp_path, loop), PASSES_OF_TWO + Counter({("up", "dgrad"): 1}))


def test_saved_tensors_kept_elsewhere_are_told_apart_by_order(tmp_path):
    """Offloading returns copies from backward's own memory, and with M = N = K no shape tells dgrad from wgrad."""
    model = Two(16, 16)

    def loop():
        for _ in range(4):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(), lambda x: torch.from_numpy(x.copy())):
                loss = model(torch.randn(16, 16)).sum()
            loss.backward()

    with_plain = probed(model, tmp_path, lambda: train(model, batch=16))
    assert_as_eager(*with_plain)
    assert_as_eager(*probed(model, tmp_path, loop))
