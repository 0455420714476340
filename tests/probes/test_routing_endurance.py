"""A recording that is interrupted, killed or long keeps what was whole, and counts the same."""

import os
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch

import loka
from loka.errors import ArgumentError
from loka.probes.routing.spill import recover
from loka.probes.routing.trace import RoutingTrace
from tests.probes.made_recording import NONE, attached, check, generate, seeded_model, tokens
from tests.probes.made_routing import TOP_K, Cache, MadeModel


@pytest.fixture
def model():
    return seeded_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "routing.npz"


@pytest.mark.parametrize(
    ("limit", "many"), [("_MOST_CHOICES", 2), ("_MOST_CHOICES", 3), ("_MOST_CHOICES", 4096), ("_MOST_NUMBERS", 5)]
)
def test_it_counts_the_same_however_often_it_counts(model, path, monkeypatch, limit, many):
    monkeypatch.setattr(f"loka.probes.routing.requests.{limit}", many)
    prompt, answer = tokens(2, 5), tokens(2, 6)
    with loka.trace_routing(model, path), torch.no_grad():
        generate(model, prompt, answer)
    check(RoutingTrace.load(path), model, (prompt[0], answer[0]), (prompt[1], answer[1]))


@pytest.mark.parametrize(("limit", "kept"), [("_MOST_CHOICES", 2), ("_MOST_NUMBERS", 2 * 3 * TOP_K)])
def test_no_more_is_remembered_than_the_limit_also_within_a_forward(path, monkeypatch, limit, kept):
    monkeypatch.setattr(f"loka.probes.routing.requests.{limit}", kept)
    monkeypatch.setattr("tests.probes.made_routing.LAYERS", 7)
    model, alive, most = MadeModel(), weakref.WeakSet(), []

    def saw(module, args):
        alive.add(args[1])
        most.append(len(alive))

    for layer in model.layers:
        layer.router.register_forward_hook(lambda module, args, output: module.chosen.clear())
        layer.experts.register_forward_pre_hook(saw)
    with loka.trace_routing(model, path), torch.no_grad():
        model(tokens(1, 3))
    assert max(most) <= 3  # what is remembered, and the one that runs


def test_many_open_conversations_do_not_pile_up(model, path, monkeypatch):
    monkeypatch.setattr("loka.probes.routing.flow._MOST_OPEN", 3)
    caches = [Cache() for _ in range(5)]
    with loka.trace_routing(model, path) as trace, torch.no_grad():
        for cache in caches:
            model(tokens(1, 2), past_key_values=cache)
        assert trace.requests == 2
    assert RoutingTrace.load(path).requests == 5


def test_a_failed_forward_loses_its_own_requests_only(model, path):
    rows = tokens(3, 4)
    with loka.trace_routing(model, path), torch.no_grad():
        model(rows[:1])
        with pytest.raises(RuntimeError, match="made to fail"):
            model(rows[1:2], fail=True)
        model(rows[2:])
    check(RoutingTrace.load(path), model, (rows[0], NONE), (rows[2], NONE))


def test_an_exception_keeps_the_requests_that_were_whole(model, path):
    rows = tokens(2, 4)

    class Stop(BaseException):  # as KeyboardInterrupt, which no module hook sees
        pass

    def interrupt(*_):
        raise Stop

    with pytest.raises(Stop):
        with loka.trace_routing(model, path), torch.no_grad():
            model(rows[:1])
            model.head.register_forward_pre_hook(interrupt)
            model(rows[1:])
    model.head._forward_pre_hooks.clear()
    check(RoutingTrace.load(path), model, (rows[0], NONE))
    assert not attached(model)


def test_after_an_interrupt_that_was_caught_it_goes_on_in_order(model, path):
    rows = tokens(2, 4)

    def interrupt(*_):
        raise KeyboardInterrupt

    with loka.trace_routing(model, path), torch.no_grad():
        handle = model.head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(rows[:1])
        handle.remove()
        model(rows[1:])
    check(RoutingTrace.load(path), model, (rows[1], NONE))


def test_a_killed_process_loses_its_open_requests_only(tmp_path):
    code = textwrap.dedent(
        """
        import os, signal, sys, torch, loka
        from tests.probes.made_routing import Cache, MadeModel
        torch.manual_seed(0)
        model = MadeModel().eval()
        with loka.trace_routing(model, sys.argv[1]) as trace, torch.no_grad():
            for at in range(3):
                with trace.domain(f"d{at}"):
                    model(torch.full((2, 4), at + 3), use_cache=False)
            open_one = Cache()
            model(torch.full((1, 4), 9), past_key_values=open_one)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    path = tmp_path / "routing.npz"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=_ROOT
    )
    assert ran.returncode == -signal.SIGKILL
    assert not path.exists()
    partial = path.with_name("routing.npz.partial")
    torch.manual_seed(0)
    model = MadeModel().eval()
    found = recover(partial)
    check(found, model, *((torch.full((4,), 3 + at // 2), NONE) for at in range(6)))
    assert found.domain == ("d0", "d0", "d1", "d1", "d2", "d2")
    assert found.top_k == TOP_K
    with pytest.raises(ArgumentError, match="there already"):
        loka.trace_routing(model, path).__enter__()
    assert not attached(model)
    # Cut off in the middle of its last record, it gives those before it.
    partial.write_bytes(partial.read_bytes()[:-3])
    assert recover(partial).domain == ("d0", "d0", "d1", "d1")


_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("damage", [b"", b"LOKA-ROUTING-1\n", b"LOKA-ROUTING-1\n" + b"\xff" * 40])
def test_a_damaged_file_of_a_recording_is_refused(tmp_path, damage):
    (tmp_path / "x.partial").write_bytes(damage)
    with pytest.raises(ArgumentError):
        recover(tmp_path / "x.partial")
