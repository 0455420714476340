"""What a recorder reads of models and modules of other kinds, and what it refuses to guess."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
from loka.errors import ArgumentError, EvidenceError, LokaWarning
from loka.probes.routing.trace import RoutingTrace
from tests.dispatch.made_conversion import plan_for
from tests.probes.made_recording import NONE, check, seeded_model, tokens
from tests.probes.made_routing import EXPERTS, LAYERS, TOP_K, WIDTH, Cache, MadeExperts, MadeModel


@pytest.fixture
def model():
    return seeded_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "routing.npz"


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
    with pytest.warns(LokaWarning, match=r"^1 choices are of no expert"), loka.trace_routing(model, path):
        model(torch.randn(2, WIDTH))
    assert RoutingTrace.load(path).counts[0, 0, 0].tolist() == [1, 0, 1, 0, 0, 0]


def test_a_layer_of_fewer_experts_is_counted_in_its_own(path):
    model = nn.ModuleList(MadeModel().layers[:2])
    for layer in model:
        layer.experts.forward = lambda hidden, top_k_index, top_k_weights: hidden
    model[1].experts.num_experts = EXPERTS - 2
    index = torch.tensor([[0, EXPERTS - 3], [EXPERTS - 1, EXPERTS]])
    model.forward = lambda hidden: [layer.experts(hidden, index, None) for layer in model]
    with pytest.warns(LokaWarning, match=r"^3 choices are of no expert"), loka.trace_routing(model, path):
        model(torch.randn(2, WIDTH))
    assert RoutingTrace.load(path).counts[0, 0].tolist() == [[1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 0]]


def test_inference_mode_inside_the_model_is_traced_as_it_is(model, path):
    prompt = tokens(2, 4)
    inner = model.layers[1].forward
    model.layers[1].forward = torch.inference_mode()(lambda hidden: inner(hidden))
    with loka.trace_routing(model, path), torch.no_grad():
        model(prompt)
    del model.layers[1].forward
    check(RoutingTrace.load(path), model, (prompt[0], NONE), (prompt[1], NONE))


def test_a_model_without_data_routes_nothing(path):
    with torch.device("meta"):
        model = MadeModel()
    for layer in model.layers:
        layer.router.forward = lambda hidden: (
            hidden[:, :TOP_K],
            torch.zeros(3, TOP_K, dtype=torch.long, device="meta"),
        )
    with pytest.raises(EvidenceError, match="No token was routed"):
        with loka.trace_routing(model, path), torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long, device="meta"))


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
