"""Recording routing: whose token is whose, which phase it is of, and what survives exceptions, reuse and a crash."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
from loka.errors import ArgumentError, EvidenceError, LokaWarning
from loka.probes.routing.spill import recover
from loka.probes.routing.trace import RoutingTrace
from tests.dispatch.made_conversion import plan_for
from tests.probes.made_routing import EXPERTS, LAYERS, TOP_K, VOCABULARY, WIDTH, Cache, MadeExperts, MadeModel


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MadeModel().eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "routing.npz"


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


def generate(model, prompt, answer, mask=None):
    """A prefill and a decode step for each token of the answer, as `generate` would run them."""
    cache = Cache()
    model(prompt, attention_mask=mask, past_key_values=cache)
    for step in range(answer.shape[1]):
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        model(answer[:, step : step + 1], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def check(trace, model, *requests):
    """Compare every request with (prefill tokens, decode tokens) that were run alone."""
    assert trace.requests == len(requests)
    for at, phases in enumerate(requests):
        for phase, expected in enumerate(phases):
            assert np.array_equal(trace.counts[at, phase], model.expected(expected)), (at, phase)


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


NONE = torch.tensor([], dtype=torch.long)


def test_every_row_is_a_request_and_padding_is_not_counted(model, path):
    prompt, answer = tokens(3, 5), tokens(3, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    with loka.trace_routing(model, path) as trace, torch.no_grad():
        generate(model, prompt, answer, mask)
    found = RoutingTrace.load(path)
    check(found, model, *((row[keep.bool()], made) for row, keep, made in zip(prompt, mask, answer, strict=True)))
    assert found.decode_steps.tolist() == [4, 4, 4]
    assert (found.hidden_size, found.top_k, found.model) == (WIDTH, TOP_K, "MadeModel")
    assert (found.layers, found.experts, found.domains) == ((0, 1, 2), EXPERTS, ("unknown",))
    assert trace.requests == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_holds_with_and_without_gradients_and_the_output_stays_the_same(model, path, mode):
    prompt = tokens(2, 6)
    with mode():
        before = model(prompt)["logits"]
        with loka.trace_routing(model, path):
            inside = model(prompt)["logits"]
            if inside.requires_grad:
                inside.sum().backward()
    assert torch.equal(before, inside)
    check(RoutingTrace.load(path), model, (prompt[0], NONE), (prompt[1], NONE))


def test_nothing_of_it_is_left_on_the_model(model, path):
    names = [name for name, _ in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with loka.trace_routing(model, path):
        assert hooks(model)
        model(tokens(1, 3))
    assert not hooks(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError):
        with loka.trace_routing(model, path.with_name("other.npz")):
            raise KeyError
    assert not hooks(model)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_conversations_that_take_turns_are_told_apart_by_their_caches(model, path):
    first, second = tokens(1, 4), tokens(1, 7)
    caches = Cache(), Cache()
    with loka.trace_routing(model, path), torch.no_grad():
        model(first[:, :3], past_key_values=caches[0])
        model(second[:, :5], past_key_values=caches[1])
        model(first[:, 3:], past_key_values=caches[0])
        model(second[:, 5:6], past_key_values=caches[1])
        model(second[:, 6:], past_key_values=caches[1])
    check(RoutingTrace.load(path), model, (first[0, :3], first[0, 3:]), (second[0, :5], second[0, 5:]))


def test_a_cache_that_the_model_made_is_followed_too(model, path):
    prompt, answer = tokens(2, 3), tokens(2, 1)
    with loka.trace_routing(model, path), torch.no_grad():
        cache = model(prompt)["past_key_values"]
        model(answer, past_key_values=cache)
    check(RoutingTrace.load(path), model, (prompt[0], answer[0]), (prompt[1], answer[1]))


def test_a_cache_that_is_emptied_begins_other_requests(model, path):
    a, b = tokens(1, 3), tokens(1, 4)
    cache = Cache()
    with loka.trace_routing(model, path), torch.no_grad():
        model(a, past_key_values=cache)
        cache.length = 0
        model(b, past_key_values=cache)
    check(RoutingTrace.load(path), model, (a[0], NONE), (b[0], NONE))


def test_requests_close_when_nobody_keeps_their_cache(model, path):
    with loka.trace_routing(model, path) as trace, torch.no_grad():
        for done in range(4):
            generate(model, tokens(2, 3), tokens(2, 2))
            assert trace.requests == 2 * done  # the last ones close with the next forward
    assert trace.requests == 8


def test_without_a_cache_every_forward_is_a_request_of_its_own(model, path):
    rows = tokens(3, 4)
    with loka.trace_routing(model, path) as trace, torch.no_grad():
        model(rows[:2], use_cache=False)
        assert trace.requests == 2
        model(rows[2:], use_cache=False)
        assert trace.requests == 3
    check(RoutingTrace.load(path), model, *((row, NONE) for row in rows))


def test_a_scope_holds_forwards_together_where_there_is_no_cache(model, path):
    row = tokens(1, 6)
    with loka.trace_routing(model, path) as trace, torch.no_grad():
        with trace.request(domain="code"):
            model(row[:, :4], use_cache=False)
            model(row[:, 4:5], use_cache=False)
            model(row[:, 5:], use_cache=False)
            assert trace.requests == 0
        assert trace.requests == 1
        model(row, use_cache=False)
    found = RoutingTrace.load(path)
    check(found, model, (row[0, :4], row[0, 4:]), (row[0], NONE))
    assert found.domain == ("code", "unknown")


def test_domains_come_from_the_innermost_scope(model, path):
    with loka.trace_routing(model, path, domain="rest") as trace, torch.no_grad():
        with trace.domain("code"):
            model(tokens(2, 3))
            with trace.domain("python"):
                model(tokens(1, 3))
            with trace.request():
                model(tokens(1, 3))
        with trace.request(domain=["chat", "maths"]):
            model(tokens(2, 3))
        model(tokens(1, 3))
    assert RoutingTrace.load(path).domain == ("code", "code", "python", "code", "chat", "maths", "rest")


def test_a_phase_can_be_said(model, path):
    row, cache = tokens(1, 9), Cache()
    with loka.trace_routing(model, path) as trace, torch.no_grad():
        model(row[:, :4], past_key_values=cache)
        with trace.phase("prefill"):
            model(row[:, 4:7], past_key_values=cache)
        model(row[:, 7:], past_key_values=cache)  # several tokens with a cache, as a guess of tokens gives
        with trace.phase("decode"):
            model(row[:, :2])
    check(RoutingTrace.load(path), model, (row[0, :7], row[0, 7:]), (NONE, row[0, :2]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("stop_tokens", [[2], [1000, 2, 1001, 1002]])
def test_a_row_that_was_fed_a_stop_token_has_ended(model, path, mode, stop_tokens):
    prompt, answer = tokens(2, 3), tokens(2, 5)
    answer[0, 2], answer[1, 4], prompt[1, 0] = 2, 2, 2
    with loka.trace_routing(model, path, stop_tokens=stop_tokens), mode():
        generate(model, prompt, answer)
    found = RoutingTrace.load(path)
    check(found, model, (prompt[0], answer[0, :2]), (prompt[1], answer[1, :4]))
    assert found.decode_steps.tolist() == [2, 4]


def test_flat_tokens_are_one_request(path):
    torch.manual_seed(0)
    experts = MadeModel().layers[0]
    hidden = torch.randn(11, WIDTH)
    with loka.trace_routing(experts, path):
        experts(hidden)
    found = RoutingTrace.load(path)
    (index,) = experts.router.chosen
    assert np.array_equal(found.counts[0, 0, 0], np.bincount(index.flatten(), minlength=EXPERTS))
    assert found.counts.shape == (1, 2, 1, EXPERTS)


@pytest.mark.parametrize("many", [3, 4096])
def test_it_counts_the_same_however_often_it_counts(model, path, monkeypatch, many):
    monkeypatch.setattr("loka.probes.routing.requests._MOST_CHOICES", many)
    prompt, answer = tokens(2, 5), tokens(2, 6)
    with loka.trace_routing(model, path), torch.no_grad():
        generate(model, prompt, answer)
    check(RoutingTrace.load(path), model, (prompt[0], answer[0]), (prompt[1], answer[1]))


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
    assert not hooks(model)


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
    assert not hooks(model)
    # Cut off in the middle of its last record, it gives those before it.
    partial.write_bytes(partial.read_bytes()[:-3])
    assert recover(partial).domain == ("d0", "d0", "d1", "d1")


_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("damage", [b"", b"LOKA-ROUTING-1\n", b"LOKA-ROUTING-1\n" + b"\xff" * 40])
def test_a_damaged_file_of_a_recording_is_refused(tmp_path, damage):
    (tmp_path / "x.partial").write_bytes(damage)
    with pytest.raises(ArgumentError):
        recover(tmp_path / "x.partial")


def test_a_converted_model_is_traced_with_its_planned_kernels(model, path):
    prompt = tokens(2, 5)
    with torch.no_grad():
        before = model(prompt)["logits"]
        loka.convert(model, plan_for(model, ["layers.0.router", "head"]))
        with loka.trace_routing(model, path, experts="*.experts"):
            inside = model(prompt)["logits"]
        after = model(prompt)["logits"]
    assert torch.equal(inside, after)
    assert not torch.equal(inside, before)
    check(RoutingTrace.load(path), model, (prompt[0], NONE), (prompt[1], NONE))


def test_a_compiled_model_is_traced_and_compiled_again_afterwards(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), _Mixture())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, WIDTH)
    expected = compiled(x)
    with loka.trace_routing(compiled, path):
        assert torch.allclose(compiled(x), expected)
    index = model[1].choose(model[0](x))[1]
    found = RoutingTrace.load(path)
    assert np.array_equal(found.counts[0, 0, 0], np.bincount(index.flatten(), minlength=EXPERTS))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), expected)


class _Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS), MadeExperts()

    def choose(self, hidden):
        return self.gate(hidden).softmax(-1).topk(TOP_K, dim=-1)

    def forward(self, hidden):
        weights, index = self.choose(hidden)
        return self.experts(hidden, index, weights)


class _Scores(nn.Linear):
    """A router of a model that nobody named: logits, of which somebody else takes the best."""

    num_experts, top_k = EXPERTS, TOP_K


class _Mask(nn.Linear):
    num_experts = EXPERTS

    def forward(self, hidden):
        return F.one_hot(super().forward(hidden).argmax(-1), EXPERTS)


class _Nothing(nn.Linear):
    def forward(self, hidden):
        return "no tensor"


@pytest.mark.parametrize("kind", [_Scores, _Mask])
def test_a_module_that_the_user_names_is_read_by_what_it_gives(path, kind):
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": nn.ModuleDict({"chooser": kind(WIDTH, EXPERTS)})})
    model.forward = lambda hidden: model["block"]["chooser"](hidden)
    x = torch.randn(2, 7, WIDTH)
    with pytest.raises(EvidenceError, match="No mixture of experts was found"):
        loka.trace_routing(model, path)
    with loka.trace_routing(model, path, experts="*.chooser"):
        model(x)
    chooser = model["block"]["chooser"]
    scores = F.linear(x, chooser.weight, chooser.bias)
    best = scores.argsort(-1, descending=True)[..., : TOP_K if kind is _Scores else 1]
    expected = [np.bincount(row.flatten(), minlength=EXPERTS) for row in best]
    assert np.array_equal(RoutingTrace.load(path).counts[:, 0, 0], expected)


def test_what_cannot_be_read_or_told_apart_is_refused(model, path):
    with pytest.raises(ArgumentError, match=r"'\*\.experst' matches no module.*experts"):
        loka.trace_routing(model, path, experts="*.experst")
    nothing = nn.Sequential(_Nothing(WIDTH, EXPERTS))
    with pytest.raises(ArgumentError, match="neither takes nor gives integers"):
        with loka.trace_routing(nothing, path, experts="0"):
            nothing(torch.randn(3, WIDTH))
    with pytest.raises(ArgumentError, match="names 2 domains, and the batch has 3 rows"):
        with loka.trace_routing(model, path) as trace, trace.request(domain=["a", "b"]):
            model(tokens(3, 2))
    with pytest.raises(ArgumentError, match="began with 3 rows, and now a forward has 2"):
        with loka.trace_routing(model, path) as trace, trace.request():
            model(tokens(3, 2))
            model(tokens(2, 2))
    for scope in ("request", "phase"):
        with pytest.raises(ArgumentError):
            with loka.trace_routing(model, path) as trace, trace.request():
                with getattr(trace, scope)("neither"):
                    pass
    assert not path.exists() or path.unlink() is None
    assert [each.name for each in path.parent.iterdir()] == []


class _Packed(MadeModel):
    """Takes the padding out before its experts, so that rows cannot be told apart."""

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)[input_ids > 10]
        return self.layers[0](hidden)


def test_tokens_that_fit_no_row_are_refused(path):
    model = _Packed()
    with pytest.raises(ArgumentError, match=r"got 3 tokens, and the batch has 2 rows of 3"):
        with loka.trace_routing(model, path, experts="layers.0.experts"):
            model(torch.tensor([[11, 12, 1], [13, 1, 1]]))
    with loka.trace_routing(model, path, experts="layers.0.experts"):
        model(torch.tensor([[11, 12, 1]]))
    assert int(RoutingTrace.load(path).counts.sum()) == 2 * TOP_K


def test_a_mask_that_hides_the_padding_is_told(model, path):
    with pytest.warns(LokaWarning, match="padding is counted"):
        with loka.trace_routing(model, path), torch.no_grad():
            model(tokens(2, 3), attention_mask=torch.ones(2, 3, 3))
            model(tokens(2, 3), attention_mask=torch.ones(2, 3, 3))


@pytest.mark.parametrize("kind", ["bool", "additive", "named"])
def test_a_causal_mask_shows_the_padding_of_a_prompt(model, path, kind):
    prompt = tokens(2, 4)
    valid = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    mask = valid[:, None, None, :] & torch.ones(4, 4).tril().bool()
    mask = torch.where(mask, 0.0, -1e9) if kind == "additive" else mask
    with loka.trace_routing(model, path), torch.no_grad():
        model(prompt, attention_mask={"full_attention": mask} if kind == "named" else mask)
    check(RoutingTrace.load(path), model, (prompt[0, 1:], NONE), (prompt[1], NONE))


def test_nothing_seen_is_an_error_and_a_layer_that_never_ran_a_warning(model, path):
    with pytest.raises(EvidenceError, match="No token was routed"):
        with loka.trace_routing(model, path):
            pass
    assert not list(path.parent.iterdir())
    skipped = copy.deepcopy(model)
    skipped.layers[1].forward = lambda hidden: hidden
    with pytest.warns(LokaWarning, match=r"1 of 3 sites never ran.*layers\.1\.experts"):
        with loka.trace_routing(skipped, path), torch.no_grad():
            skipped(tokens(1, 3))
    assert RoutingTrace.load(path).counts.sum(axis=(0, 1, 3)).tolist() == [3 * TOP_K, 0, 3 * TOP_K]


def _zero(module, args, output):
    args[1].zero_()


class _Overwrites(MadeModel):
    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.experts.register_forward_hook(_zero)


def test_experts_that_overwrite_their_choice_are_refused_and_not_counted_wrong(path):
    model = _Overwrites()
    with pytest.raises(ArgumentError, match="overwrites its chosen experts"):
        with loka.trace_routing(model, path), torch.no_grad():
            model(tokens(1, 3), past_key_values=Cache())
    assert not list(path.parent.iterdir())


def test_choices_out_of_range_are_given_to_no_expert(path):
    model = MadeModel().layers[0]
    model.experts.forward = lambda hidden, top_k_index, top_k_weights: hidden
    index = torch.tensor([[0, EXPERTS], [-1, 2]])
    model.forward = lambda hidden: model.experts(hidden, index, None)
    with loka.trace_routing(model, path):
        model(torch.randn(2, WIDTH))
    assert RoutingTrace.load(path).counts[0, 0, 0].tolist() == [1, 0, 1, 0, 0, 0]


def test_no_choice_is_an_empty_batch(model, path):
    with loka.trace_routing(model, path), torch.no_grad():
        model(tokens(0, 3), use_cache=False)
        model(tokens(2, 3), use_cache=False)
    assert RoutingTrace.load(path).counts.shape == (2, 2, LAYERS, EXPERTS)


def test_a_recorder_records_once(model, path):
    recorder = loka.trace_routing(model, path)
    with recorder:
        model(tokens(1, 2))
    with pytest.raises(ArgumentError, match="has been recorded"):
        recorder.__enter__()
