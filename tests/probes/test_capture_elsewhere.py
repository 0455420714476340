"""Traces, threads, foreign tensors and precisions: what is none of the probe's business."""

import threading
import warnings

import pytest
import torch
from torch import nn

from tests.probes.made_probe import Two, probed, product, seen, train
from tests.probes.made_situations import assert_as_eager


def test_a_jit_trace_inside_the_block_is_left_alone(tmp_path):
    model = Two()

    def loop():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, torch.randn(8, 16), check_trace=False)
        assert str(traced.graph).count("prim::CallMethod") == 2
        assert torch.export.export(Two(), (torch.randn(8, 16),))
        train(model)

    assert_as_eager(*probed(model, tmp_path, loop))


def test_forwards_of_another_thread_are_left_alone(tmp_path):
    model, other = Two(), Two(32)

    class Busy(nn.Module):
        def forward(self, x):
            worker = threading.Thread(target=lambda: other(x))
            worker.start()
            worker.join()
            return x

    model.busy = Busy()
    model.up.register_forward_hook(lambda module, args, output: model.busy(output))
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)


def test_functional_call_with_other_parameters(tmp_path):
    model = Two()
    others = {name: torch.randn_like(p, requires_grad=True) for name, p in model.named_parameters()}
    run, steps = probed(model, tmp_path, lambda: train(lambda x: torch.func.functional_call(model, others, (x,))))
    assert_as_eager(run, steps)


def test_fused_recurrent_layers_are_reported_as_unseen(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model = Recurrent()

    def loop():
        for _ in range(4):
            model(torch.randn(2, 3, 8)).sum().backward()

    run, steps = probed(model, tmp_path, loop)
    assert ("head", "fprop") in seen(steps[0])
    if torch.backends.mkldnn.is_available():
        (event,) = run.events
        assert event.kind == "fused"
        assert (
            event.message
            == "lstm: mkldnn_rnn_layer computes its products out of sight; they are no part of the evidence"
        )


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("how", ["layer", "sparse.mm", "matmul"])
def test_a_weight_that_multiplies_a_sparse_tensor_is_reported_as_unseen(how, layout, tmp_path):
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(32, 16), nn.Linear(16, 8)
            self.hops = torch.eye(6).roll(1, 0).to_sparse(layout=layout)

        def forward(self, x):
            if how == "layer":
                x = self.first(x)
            else:
                multiply = torch.sparse.mm if how == "sparse.mm" else torch.matmul
                x = multiply(x, self.first.weight.t()) + self.first.bias
            return self.head(torch.sparse.mm(self.hops, x))  # no weight takes part in the inner product

    model = Bags()
    batches = [(torch.randn(6, 32) * (torch.rand(6, 32) < 0.2)).to_sparse(layout=layout) for _ in range(4)]

    def loop():
        for batch in batches:
            model(batch).square().sum().backward()

    run, steps = probed(model, tmp_path, loop)
    assert {site for site, _ in seen(steps[0])} == {"head"}
    op = {"layer": "addmm", "sparse.mm": "_sparse_addmm", "matmul": "mm"}[how]
    assert [(event.kind, event.message) for event in run.events] == [
        ("fused", f"first: {op} computes its products out of sight; they are no part of the evidence")
    ]


def test_tensor_subclasses_without_a_dispatch_of_their_own(tmp_path):
    class Image(torch.Tensor):
        pass

    model = Two()
    assert_as_eager(
        *probed(model, tmp_path, lambda: train(lambda x: model(x.as_subclass(Image)).as_subclass(torch.Tensor)))
    )


@pytest.mark.parametrize("how", ["generic", "mkldnn", "legacy"])
def test_reduced_fp32_precision_is_kept_out_of_the_measurement_and_restored(tmp_path, how):
    model = Two(64, 64)
    settings = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    _, exact = probed(model, tmp_path, lambda: train(model, 1, width=64))
    try:
        if how == "generic":
            torch.backends.fp32_precision = "tf32"
        elif how == "mkldnn":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision("medium")
        before = [setting.fp32_precision for setting in settings]
        run, steps = probed(model, tmp_path, lambda: train(model, 1, width=64))
        assert [setting.fp32_precision for setting in settings] == before
        if how == "legacy":
            assert torch.get_float32_matmul_precision() == "medium"
        assert run.progress.status == "complete"
        mine, theirs = (product(step[0], "up").errors["rowwise"].row_error for step in (exact, steps))
        assert theirs == pytest.approx(mine, rel=1e-6)
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for setting in settings:
            setting.fp32_precision = "none"
