"""Where releases of torch differ, what LoKA computes does not."""

import pytest
import torch

from loka import torch_release
from loka.torch_release import of_its_own, release


class _Product(torch.autograd.Function):
    """Its result is an intermediate as well: casting to the dtype that a tensor has gives that tensor."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return of_its_own((x @ weight.t()).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


@pytest.mark.parametrize("intermediates", [None, True], ids=["as here", "as before torch 2.12"])
def test_a_compiled_function_whose_result_is_an_intermediate_keeps_its_gradient(intermediates, monkeypatch):
    if intermediates is not None:
        monkeypatch.setattr(torch_release, "_GIVES_INTERMEDIATES", intermediates)
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(lambda x, weight: _Product.apply(x, weight).sin(), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
    want = torch.autograd.grad((x @ weight.t()).sin().sum(), (x, weight))
    torch.testing.assert_close(got, want)


def test_a_result_is_left_as_it_is_where_nothing_is_compiled():
    x = torch.randn(3)
    assert of_its_own(x) is x


@pytest.mark.parametrize("version", ["2.12.1", "2.12.0a0+git1234", "2.12"])
def test_a_release_is_two_numbers_whatever_follows(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert release() == (2, 12)
