"""Products of every kind: grouped, windows, vectors, empty, not finite, of odd dtypes and layouts."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loka.probes.capturing.sites import SiteMap
from tests.probes.made_probe import probed, product, seen
from tests.probes.made_sites import Using, X, all_passes, parameter, sampled, shape, x_input


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
