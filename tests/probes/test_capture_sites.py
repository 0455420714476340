"""Which products of a model are seen, under which site and pass, whatever way the model multiplies."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loka.probes.sites import SiteMap
from tests.probes.made_probe import probed, product, seen


def sampled(model, tmp_path, *inputs, steps=2, **options):
    """Train a model for two steps, each sampled; return the second, when everything has its final name."""

    def loop():
        for _ in range(steps):
            output = model(*inputs)
            output.float().sum().backward()

    run, found = probed(model, tmp_path, loop, every=1, **options)
    assert run.progress.status == "complete", run.progress.reason
    assert run.progress.unattributed == 0
    return found[-1]


def all_passes(*sites, calls=1, without=()):
    counts = {(site, which): calls for site in sites for which in ("fprop", "dgrad", "wgrad")}
    return Counter({key: count for key, count in counts.items() if key not in without})


def shape(entry):
    return entry.batch, entry.m, entry.n, entry.k


class Using(nn.Module):
    """A module whose forward is a given function of itself and the input."""

    def __init__(self, function, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def x_input(*shape):
    return torch.randn(*shape, requires_grad=True)


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


@pytest.mark.parametrize("layout", ["row-major", "transposed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast-off-inside"])
def test_grouped_products(tmp_path, layout, autocast):
    weight = parameter(3, 16, 32) if layout == "row-major" else parameter(3, 32, 16)
    model = Using(
        lambda self, x: (
            F.grouped_mm(x, self.experts if layout == "row-major" else self.experts.mT, offs=self.ends) * 1.0
        ),
        experts=nn.Parameter(weight.detach().bfloat16()),
    )
    model.register_buffer("ends", torch.tensor([8, 8, 24], dtype=torch.int32))  # the second expert has no token
    x = torch.randn(24, 16).bfloat16().requires_grad_()

    def loop():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().sum().backward()

    run, steps = probed(model, tmp_path, loop)
    assert run.progress.status == "complete", run.progress.reason
    assert seen(steps[0]) == all_passes("experts")
    assert shape(product(steps[0], "experts", "fprop")) == (1, 24, 32, 16)
    assert shape(product(steps[0], "experts", "dgrad")) == (1, 24, 16, 32)
    assert shape(product(steps[0], "experts", "wgrad")) == (1, 32, 16, 24)
    for entry in steps[0].products:
        assert {name: round(error.row_error, 2) for name, error in entry.errors.items()} != {}
        assert all(0 < error.row_error < 0.1 for error in entry.errors.values()) or entry.product != "fprop"
    roles = {op.role: op.amax for op in product(steps[0], "experts", "wgrad").operands}
    assert roles == {"grad_output": 1.0, "input": pytest.approx(float(x.detach().abs().max()))}


@pytest.mark.parametrize(
    ("layer", "x", "fprop"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 10), (1, 20, 6, 12)),
        (nn.Conv2d(4, 6, 3, stride=2), (2, 4, 9, 7), (1, 2 * 4 * 3, 6, 36)),
        (nn.Conv3d(2, 6, 2), (2, 2, 4, 4, 4), (1, 2 * 27, 6, 16)),
    ],
    ids=["1d", "2d", "3d"],
)
def test_convolutions_are_the_products_of_their_windows(tmp_path, layer, x, fprop):
    step = sampled(nn.Sequential(layer), tmp_path, x_input(*x))
    assert seen(step) == all_passes("0")
    batch, m, n, k = fprop
    assert shape(product(step, "0", "fprop")) == fprop
    assert shape(product(step, "0", "dgrad")) == (batch, m, k, n)
    assert shape(product(step, "0", "wgrad")) == (batch, n, k, m)
    assert len(product(step, "0").errors) == 4
    assert "one fused operator" in product(step, "0", "wgrad").unmeasured


@pytest.mark.parametrize(
    ("layer", "fprop", "reason"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (2, 2 * 8, 3, 6), "a grouped convolution is not measured"),
        (nn.ConvTranspose1d(4, 6, 3), (1, 2 * 10, 18, 4), "a transposed convolution is not measured"),
    ],
    ids=["grouped", "transposed"],
)
@pytest.mark.parametrize("samples", [2, 0], ids=["batch", "empty"])
def test_unusual_convolutions_are_recorded_with_the_reason(tmp_path, layer, fprop, reason, samples):
    step = sampled(nn.Sequential(layer), tmp_path, x_input(samples, 4, 10))
    assert seen(step) == all_passes("0")
    entry = product(step, "0")
    assert shape(entry) == (fprop[0], fprop[1] * samples // 2, *fprop[2:])
    assert (entry.unmeasured, dict(entry.errors)) == (reason, {})
    if samples:
        macs = layer.weight.numel() * (16 if layer.groups == 2 else 20)
        assert entry.flops == 2 * macs


class TwoProducts(torch.autograd.Function):
    """An MLP as one node: two forward products, recomputed in backward, and four gradients."""

    @staticmethod
    def forward(ctx, x, w1, w2):
        ctx.save_for_backward(x, w1, w2)
        return torch.relu(x @ w1) @ w2

    @staticmethod
    def backward(ctx, grad):
        x, w1, w2 = ctx.saved_tensors
        h = torch.relu(x @ w1)
        dh = (grad @ w2.T) * (h > 0)
        return dh @ w1.T, x.T @ dh, h.T @ grad


def test_a_custom_function_with_two_products(tmp_path):
    model = Using(lambda self, x: TwoProducts.apply(x, self.w1, self.w2), w1=parameter(8, 8), w2=parameter(8, 8))
    step = sampled(model, tmp_path, x_input(8, 8))
    assert seen(step) == all_passes("w1", "w2")


def test_matrix_times_vector(tmp_path):
    step = sampled(Using(lambda self, x: torch.mv(self.W, x), W=parameter(12, 8)), tmp_path, x_input(8))
    assert seen(step) == Counter({("W", "fprop"): 1, ("W", "dgrad"): 1})  # the weight's gradient is an outer product
    assert shape(product(step, "W")) == (1, 1, 12, 8)


def test_one_by_one_matrices_have_all_three_passes(tmp_path):
    step = sampled(nn.Sequential(nn.Linear(1, 1)), tmp_path, x_input(1, 1))
    assert seen(step) == all_passes("0")


@pytest.mark.parametrize("size", [1, 4, 8])
def test_square_products_where_shapes_tell_nothing(tmp_path, size):
    model = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
    assert seen(sampled(model, tmp_path, x_input(size, size))) == all_passes("0", "2")


def test_recurrent_layers_made_of_products(tmp_path):
    gru = nn.GRU(8, 4)
    step = sampled(Using(lambda self, x: self.gru(x)[0], gru=gru), tmp_path, x_input(3, 2, 8))
    found = seen(step)
    assert found["gru.weight_ih_l0", "fprop"] == 1
    assert found["gru.weight_hh_l0", "fprop"] == 3
    assert found["gru.weight_hh_l0", "wgrad"] == 3


@pytest.mark.parametrize("kind", ["integer", "complex"])
def test_products_of_other_numbers_are_ignored(tmp_path, kind):
    other = torch.ones(6, 6, dtype=torch.int32 if kind == "integer" else torch.complex64)
    model = Using(lambda self, x: self.lin(x) + (other @ other).abs().float()[:, :4] * 0, lin=nn.Linear(8, 4))
    assert seen(sampled(model, tmp_path, X)) == Counter({("lin", "fprop"): 1, ("lin", "wgrad"): 1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_dtype_is_measured(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(8, 16).to(dtype))
    step = sampled(model, tmp_path, X.to(dtype))
    assert product(step, "0").dtype == str(dtype).removeprefix("torch.")
    assert all(0.005 < error.row_error < 0.1 for error in product(step, "0").errors.values())


def test_an_empty_batch_is_recorded_without_errors(tmp_path):
    step = sampled(nn.Sequential(nn.Linear(8, 16)), tmp_path, X[:0])
    entry = product(step, "0")
    assert shape(entry) == (1, 0, 16, 8)
    assert dict(entry.errors) == {}
    assert {op.role: op.elements for op in entry.operands} == {"input": 0, "weight": 128}


def test_zero_weights_are_recorded_as_zero_rows(tmp_path):
    layer = nn.Linear(8, 16, bias=False)
    nn.init.zeros_(layer.weight)
    step = sampled(nn.Sequential(layer), tmp_path, X)
    for error in product(step, "0").errors.values():
        assert (error.rows, error.zero_rows, error.bad_rows) == (0, 6, 0)
        assert error.row_error != error.row_error
    assert {op.role: op.zeros for op in product(step, "0").operands}["weight"] == 1.0


def test_nan_and_inf_in_one_row_leave_the_others_measured_and_are_told_once(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16))

    def loop():
        for step in range(4):
            x = X.clone()
            if step >= 1:
                x[2, 3], x[4, 0] = float("nan"), float("inf")
            with torch.no_grad():
                model(x)

    run, steps = probed(model, tmp_path, loop, every=1)
    clean, dirty = product(steps[0], "0"), product(steps[1], "0")
    for name, error in dirty.errors.items():
        assert (error.rows, error.bad_rows) == (4, 2)
        assert error.row_error == pytest.approx(clean.errors[name].row_error, rel=0.35)
    (event,) = run.events
    assert (event.step, event.kind, event.message) == (1, "nonfinite", "0 fprop: input holds 1 NaN and 1 Inf")


def test_operands_on_the_meta_device_are_counted_and_not_read(tmp_path):
    with torch.device("meta"):
        model = Using(lambda self, x: self.conv(self.lin(x)), lin=nn.Linear(8, 16), conv=nn.Conv1d(4, 6, 3))

    def loop():
        model(torch.empty(2, 4, 8, device="meta")).sum().backward()

    run, steps = probed(model, tmp_path, loop)
    assert run.progress.status == "complete", run.progress.reason
    assert seen(steps[0]) == all_passes("lin", "conv", without=[("lin", "dgrad")])
    assert shape(product(steps[0], "lin")) == (1, 8, 16, 8)
    assert shape(product(steps[0], "conv")) == (1, 28, 6, 12)
    for entry in steps[0].products:
        assert "meta device" in entry.unmeasured or entry.op == "convolution_backward"
        assert [op.elements > 0 for op in entry.operands] == [True, True]


def test_operands_in_fp8_are_counted_and_not_measured(tmp_path):
    def forward(self, x):
        one = torch.ones(())
        data, weight = x.to(torch.float8_e4m3fn), self.weight.to(torch.float8_e4m3fn)
        return torch._scaled_mm(data, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    model = Using(forward, weight=parameter(16, 16))

    def loop():
        with torch.no_grad():
            model(torch.randn(16, 16))

    run, steps = probed(model, tmp_path, loop)
    assert run.progress.status == "complete", run.progress.reason
    (entry,) = steps[0].products
    assert (entry.op, entry.dtype, entry.unmeasured) == ("_scaled_mm", "float8_e4m3fn", "its operands are FP8 already")


def test_a_model_without_parameters(tmp_path):
    model = Using(lambda self, x: x @ x.T)
    assert seen(sampled(model, tmp_path, x_input(6, 8))) == all_passes("Using")


def test_channels_last_and_strided_operands(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 7)
    plain = sampled(nn.Sequential(nn.Conv2d(4, 6, 3)).requires_grad_(), tmp_path, x)
    assert len(product(plain, "0").errors) == 4
    step = sampled(model, tmp_path, x.to(memory_format=torch.channels_last))
    assert len(product(step, "0").errors) == 4


@pytest.mark.parametrize("admitted", ["up", "W", "module-type"])
def test_the_filter_decides_by_module_or_name(tmp_path, admitted):
    model = Using(lambda self, x: self.up(x) @ self.W, up=nn.Linear(8, 8), W=parameter(8, 8))
    asked = []

    def admits(module, fqn):
        asked.append(fqn)
        return isinstance(module, nn.Linear) if admitted == "module-type" else fqn == admitted

    step = sampled(model, tmp_path, x_input(6, 8), filter_fn=admits)
    assert seen(step) == all_passes("W" if admitted == "W" else "up")
    assert "_orig_mod" not in "".join(asked)


def test_sites_of_a_compiled_wrapped_model_have_the_users_names():
    inner = nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Linear(8, 8), backend="eager"))
    sites = SiteMap(inner)
    sites.refresh()
    assert sites.find(inner[1]._orig_mod.weight).site == "1"
    assert sites.find(inner[0].weight.t()).site == "0"
    assert sites.find(torch.randn(8, 8)) is None


def test_a_freed_parameters_identity_is_not_given_to_another_tensor():
    model = nn.Sequential(nn.Linear(64, 64))
    sites = SiteMap(model)
    sites.refresh()
    model[0].weight = None
    assert all(sites.find(torch.randn(64, 64)) is None for _ in range(50))
