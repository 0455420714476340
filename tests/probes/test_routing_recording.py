"""Whose requests the tokens of a forward are: rows, conversations, caches, scopes, phases, endings."""

import importlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import loka
from loka.errors import LokaWarning
from loka.probes.routing.trace import RoutingTrace
from tests.made_processes import ranks
from tests.probes.made_recording import NONE, attached, check, generate, seeded_model, tokens
from tests.probes.made_routing import EXPERTS, LAYERS, TOP_K, WIDTH, Cache, MadeLayer, MadeModel


@pytest.fixture
def model():
    return seeded_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "routing.npz"


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
        assert attached(model)
        model(tokens(1, 3))
    assert not attached(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError):
        with loka.trace_routing(model, path.with_name("other.npz")):
            raise KeyError
    assert not attached(model)
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


@pytest.mark.parametrize("stop_tokens", [(), [2]])
def test_the_last_step_counts_where_an_embedding_takes_tokens_as_a_model_does(model, path, stop_tokens):
    class TokenEmbedding(nn.Embedding):
        def forward(self, input_ids):
            return super().forward(input_ids)

    importlib.import_module("torch._dynamo")  # then steps that are like the one before are recognised
    model.embedding.__class__ = TokenEmbedding
    prompt, answer = tokens(2, 3), tokens(2, 5)
    cache = Cache()
    with loka.trace_routing(model, path, stop_tokens=stop_tokens), torch.no_grad():
        for fed in (prompt, *answer.split(1, dim=1)):
            model(input_ids=fed, past_key_values=cache)
    found = RoutingTrace.load(path)
    check(found, model, (prompt[0], answer[0]), (prompt[1], answer[1]))
    assert found.decode_steps.tolist() == [5, 5]


@pytest.mark.parametrize("masks", ["left out", "none", "causal"])
@pytest.mark.parametrize("positional", [False, True])
def test_padding_is_not_counted_where_layers_are_handed_the_tokens(path, masks, positional):
    class Layer(MadeLayer):
        def forward(self, hidden, attention_mask=None, input_ids=None):  # as layers are that route by the token itself
            return super().forward(hidden)

    class Model(MadeModel):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embedding(input_ids)
            seen = torch.ones(input_ids.shape[1:] * 2).tril().bool()[None, None]
            if attention_mask is not None:
                seen = attention_mask[:, None, None, :].bool() & seen
            given = {"left out": {}, "none": {"attention_mask": None}, "causal": {"attention_mask": seen}}[masks]
            for layer in self.layers:
                hidden = layer(hidden, input_ids=input_ids, **given)
            return hidden

    model, prompt = Model().eval(), tokens(2, 5)
    for layer in model.layers:
        layer.__class__ = Layer
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with loka.trace_routing(model, path):
        if positional:
            model(prompt, mask)
        else:
            model(input_ids=prompt, attention_mask=mask)
    check(RoutingTrace.load(path), model, (prompt[0], NONE), (prompt[1, 2:], NONE))


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


def test_choices_of_experts_that_a_layer_is_not_known_to_have_are_told(model, path):
    for layer in model.layers:
        layer.experts.num_experts = 4
    with pytest.warns(LokaWarning, match="choices are of no expert that is known"):
        with loka.trace_routing(model, path), torch.no_grad():
            model(tokens(2, 6))
    found = RoutingTrace.load(path)
    chosen = [torch.bincount(layer.router.chosen[-1].flatten(), minlength=EXPERTS)[:4] for layer in model.layers]
    assert found.prefill.sum(0).tolist() == [counts.tolist() for counts in chosen]


def test_experts_that_lie_on_several_ranks_are_counted_as_the_model_names_them(tmp_path):
    (counts,) = ranks(1, _traced_as_dtensors, tmp_path)
    assert counts.shape == (2, LAYERS, EXPERTS)
    assert counts.sum() == 2 * 6 * TOP_K * LAYERS


def _traced_as_dtensors(folder, rank, group):
    """Trace experts as expert parallelism makes them: a DTensor of all, and the number of those that are here."""
    model, mesh = seeded_model(), init_device_mesh("cpu", (1,))
    for layer in model.layers:
        experts = layer.experts
        experts.weight = nn.Parameter(distribute_tensor(experts.weight.detach(), mesh, [Shard(0)]))
        experts.num_experts = EXPERTS // 2
        plain = type(experts).forward
        experts.forward = partial(_with_local_weight, experts, plain)
    with loka.trace_routing(model, folder / "routing.npz"), torch.no_grad():
        model(tokens(2, 6))
    return RoutingTrace.load(folder / "routing.npz").prefill


def _with_local_weight(experts, forward, hidden, top_k_index, top_k_weights):
    return forward(SimpleNamespace(weight=experts.weight.to_local()), hidden, top_k_index, top_k_weights)
