"""Which site and pass a product belongs to, told by its weight and the running module."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.probes.made_probe import probed, product, seen
from tests.probes.made_sites import Using, X, all_passes, parameter, sampled, shape, x_input


@pytest.mark.parametrize(
    ("function", "fprop"),
    [
        (lambda self, x: F.linear(x, self.W), (1, 6, 12, 8)),
        (lambda self, x: x @ self.W.T, (1, 6, 12, 8)),
        (lambda self, x: x @ self.W.t().contiguous(), (1, 6, 12, 8)),
        (lambda self, x: self.W @ x.T, (1, 6, 12, 8)),
        (lambda self, x: torch.matmul(self.W, x.T), (1, 6, 12, 8)),
        (lambda self, x: torch.einsum("bk,nk->bn", x, self.W), (1, 6, 12, 8)),
        (lambda self, x: torch.addmm(torch.zeros(12), x, self.W.T), (1, 6, 12, 8)),
        (lambda self, x: F.linear(x, self.W.double().float()), (1, 6, 12, 8)),
        (lambda self, x: torch.bmm(x[None], self.W.T[None]), (1, 6, 12, 8)),
        (lambda self, x: F.linear(x, self.W.view(3, 4, 8).flatten(0, 1)), (1, 6, 12, 8)),
    ],
    ids=["linear", "x@W.T", "contiguous", "W@x.T", "matmul", "einsum", "addmm", "cast", "bmm", "view"],
)
def test_a_parameter_used_directly_is_found_by_its_memory(tmp_path, function, fprop):
    step = sampled(Using(function, W=parameter(12, 8)), tmp_path, x_input(6, 8))
    assert seen(step) == all_passes("W")
    m, n, k = fprop[1:]
    assert shape(product(step, "W", "fprop")) == fprop
    assert shape(product(step, "W", "dgrad")) == (1, m, k, n)
    assert shape(product(step, "W", "wgrad")) == (1, n, k, m)
    for entry in step.products:
        assert entry.parameter == "W"
        assert len(entry.errors) == 4
        roles = {"fprop": ["input", "weight"], "dgrad": ["grad_output", "weight"], "wgrad": ["grad_output", "input"]}
        assert [operand.role for operand in entry.operands] == roles[entry.product]


def test_roles_are_those_of_the_operands_not_of_their_order(tmp_path):
    """`W @ x` has the weight first; its amax must still be the weight's."""
    model = Using(lambda self, x: self.W @ x.T, W=nn.Parameter(torch.full((12, 8), 3.0)))
    step = sampled(model, tmp_path, torch.full((6, 8), 0.5, requires_grad=True))
    for which, expected in {
        "fprop": {"input": 0.5, "weight": 3.0},
        "dgrad": {"grad_output": 1.0, "weight": 3.0},
        "wgrad": {"grad_output": 1.0, "input": 0.5},
    }.items():
        assert {op.role: op.amax for op in product(step, "W", which).operands} == expected


def test_parameter_lists_and_nested_owners_have_the_parameters_name(tmp_path):
    cross = Using(None, kernels=nn.ParameterList([parameter(8, 8) for _ in range(3)]))

    def forward(self, x):
        for kernel in self.cross.kernels:
            x = x @ kernel
        return x

    step = sampled(Using(forward, cross=cross), tmp_path, x_input(6, 8))
    assert seen(step) == all_passes("cross.kernels.0", "cross.kernels.1", "cross.kernels.2")


def test_a_module_whose_forward_is_bypassed(tmp_path):
    step = sampled(Using(lambda self, x: F.linear(x, self.lin.weight), lin=nn.Linear(8, 4)), tmp_path, x_input(6, 8))
    assert seen(step) == all_passes("lin")


def test_a_shared_weight_used_twice_counts_two_calls(tmp_path):
    step = sampled(Using(lambda self, x: self.lin(self.lin(x)), lin=nn.Linear(8, 8)), tmp_path, x_input(6, 8))
    assert seen(step) == all_passes("lin", calls=2)


def test_of_several_calls_each_is_measured_in_turn(tmp_path):
    """Sampled steps are multiples of `every`: were the turn to follow from the step, it would always be the same."""
    model = Using(lambda self, x: self.lin(x) + self.lin(100 * x), lin=nn.Linear(8, 8, bias=False))

    def loop():
        for _ in range(16):
            model(X).sum().backward()

    _, steps = probed(model, tmp_path, loop, every=4)
    amax = {op.amax for step in steps for op in product(step, "lin").operands if op.role == "input"}
    largest = float(X.abs().max())
    assert sorted(amax) == pytest.approx([largest, 100 * largest])


def test_two_modules_sharing_a_weight_are_two_sites(tmp_path):
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.weight = one.weight
    step = sampled(Using(lambda self, x: self.other(self.one(x)), one=one, other=other), tmp_path, x_input(6, 8))
    assert seen(step) == all_passes("one", "other")


@pytest.mark.parametrize("head", ["module", "functional"])
def test_a_head_tied_to_an_embedding_is_the_heads_product(tmp_path, head):
    embedding, linear = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    linear.weight = embedding.weight

    def forward(self, tokens):
        h = self.embedding(tokens)
        return self.head(h) if head == "module" else F.linear(h, self.embedding.weight)

    model = Using(forward, embedding=embedding, head=linear)
    step = sampled(model, tmp_path, torch.randint(0, 20, (3, 5)))
    assert seen(step) == all_passes("head")
    assert product(step, "head").m == 15


def test_parameters_that_share_one_storage_are_told_apart_by_their_place(tmp_path):
    """As in flattened parameters: a detach of one must not rename the others."""
    flat = torch.randn(3 * 64)
    model = Using(
        lambda self, x: (x @ self.a) @ self.b @ self.c + x @ self.b.detach(),
        a=nn.Parameter(flat[:64].view(8, 8)),
        b=nn.Parameter(flat[64:128].view(8, 8)),
        c=nn.Parameter(flat[128:].view(8, 8)),
    )
    step = sampled(model, tmp_path, x_input(6, 8))
    assert seen(step) == all_passes("a", "c") + Counter({("b", "fprop"): 2, ("b", "dgrad"): 2, ("b", "wgrad"): 1})


def test_frozen_weights_have_no_wgrad_and_lose_no_dgrad(tmp_path):
    """The input of a frozen layer is freed in forward, and its address is soon that of a gradient."""
    layers = nn.Sequential(*(nn.Linear(16, 16, bias=False).requires_grad_(False) for _ in range(6)))
    first = nn.Linear(16, 16)
    step = sampled(
        Using(lambda self, x: self.layers(self.first(x)), first=first, layers=layers), tmp_path, X.repeat(1, 2)
    )
    frozen = {(f"layers.{i}", which): 1 for i in range(6) for which in ("fprop", "dgrad")}
    assert seen(step) == Counter({**frozen, ("first", "fprop"): 1, ("first", "wgrad"): 1})


def test_an_input_without_gradient_has_no_dgrad(tmp_path):
    step = sampled(nn.Sequential(nn.Linear(8, 8)), tmp_path, X)
    assert seen(step) == all_passes("0", without=[("0", "dgrad")])


def test_the_root_itself_may_be_the_layer(tmp_path):
    step = sampled(nn.Linear(8, 4), tmp_path, X)
    assert seen(step) == Counter({("weight", "fprop"): 1, ("weight", "wgrad"): 1})


def test_attention_products_carry_their_modules_name_and_number(tmp_path):
    def attend(self, x):
        scores = torch.bmm(x, x.mT) / 3
        return torch.bmm(scores.softmax(-1), x)

    model = Using(lambda self, x: self.norm(self.attention(x)), attention=Using(attend), norm=nn.LayerNorm(8))
    step = sampled(model, tmp_path, x_input(3, 5, 8))
    assert seen(step) == all_passes("attention#1", "attention#2")
    assert shape(product(step, "attention#1", "fprop")) == (3, 5, 5, 8)
    assert shape(product(step, "attention#1", "dgrad")) == (3, 5, 8, 5)
    assert shape(product(step, "attention#2", "fprop")) == (3, 5, 8, 5)
    assert all(entry.parameter == "" for entry in step.products)


def test_a_single_product_of_activations_has_its_modules_plain_name(tmp_path):
    model = Using(lambda self, x: self.gram(x), gram=Using(lambda self, x: x @ x.T))
    assert seen(sampled(model, tmp_path, x_input(6, 8))) == all_passes("gram")


def test_packed_query_key_value_are_told_apart_although_they_share_memory(tmp_path):
    def attend(self, x):
        q, k, v = self.qkv(x).view(6, 3, 8).unbind(1)
        return (q @ k.T).softmax(-1) @ v

    model = Using(attend, qkv=nn.Linear(8, 24))
    step = sampled(model, tmp_path, x_input(6, 8))
    assert seen(step) == all_passes("qkv", "Using#1", "Using#2")


@pytest.mark.parametrize("layer", ["attention", "encoder"])
@pytest.mark.parametrize("mode", ["train", "eval", "inference_mode"])
def test_torchs_own_attention(tmp_path, layer, mode):
    """In evaluation torch takes a fused path that hides the projections; not while it is watched."""
    if layer == "attention":
        attention = nn.MultiheadAttention(16, 2, batch_first=True)
        model = Using(lambda self, x: self.attention(x, x, x, need_weights=False)[0], attention=attention)
        sites = ["attention.in_proj_weight", "attention.out_proj"]
    else:
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        sites = ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    x = x_input(3, 5, 16)
    before = torch.backends.mha.get_fastpath_enabled()
    if mode == "train":
        found = seen(sampled(model, tmp_path, x))
        assert all(found[site, which] == 1 for site in sites for which in ("fprop", "dgrad", "wgrad"))
    else:
        model.eval()

        def loop():
            with torch.no_grad() if mode == "eval" else torch.inference_mode():
                model(x)

        found = seen(probed(model, tmp_path, loop)[1][0])
        assert all(found[site, "fprop"] == 1 for site in sites)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_expert_weights_in_three_dimensions_with_bmm(tmp_path):
    model = Using(lambda self, x: torch.bmm(x, self.experts), experts=parameter(4, 8, 12))
    step = sampled(model, tmp_path, x_input(4, 5, 8))
    assert seen(step) == all_passes("experts")
    assert shape(product(step, "experts", "fprop")) == (4, 5, 12, 8)
    assert shape(product(step, "experts", "dgrad")) == (4, 5, 8, 12)
    assert shape(product(step, "experts", "wgrad")) == (4, 12, 8, 5)


def test_expert_weights_taken_one_by_one(tmp_path):
    def forward(self, x):
        return sum(x[e::3] @ self.experts[e] for e in range(3))

    model = Using(forward, experts=parameter(3, 8, 8))
    step = sampled(model, tmp_path, x_input(6, 8))
    assert seen(step) == all_passes("experts", calls=3)
    assert product(step, "experts").m == 2


def test_calls_with_different_rows_are_counted_with_their_mean(tmp_path):
    """FLOPs are calls times m times n times k; with experts of 1, 2 and 3 tokens m is 2."""

    def forward(self, x):
        return sum((x[: e + 1] @ self.experts[e]).sum() for e in range(3))

    step = sampled(Using(forward, experts=parameter(3, 8, 8)), tmp_path, x_input(6, 8))
    entry = product(step, "experts")
    assert (entry.calls, entry.m, entry.flops) == (3, 2, 2 * (1 + 2 + 3) * 8 * 8)


def test_different_experts_in_different_steps_are_no_change_of_weights(tmp_path):
    model = Using(lambda self, x: sum(x @ self.experts[e] for e in range(3)), experts=parameter(3, 8, 8))

    def loop():
        with torch.no_grad():
            for _ in range(4):
                model(X)

    run, _ = probed(model, tmp_path, loop, every=1)
    assert not run.progress.weights_changed
