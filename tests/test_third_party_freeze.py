"""Mixture-of-experts models of transformers, frozen as they are: experts stored in FP8, exported, saved, compiled."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loka
from loka.dispatch.deciding.plan import Plan
from tests.dispatch.made_conversion import decision, plan_for
from tests.made_moe_families import FAMILIES, untrained

pytestmark = pytest.mark.third_party("transformers")

TOKENS = torch.arange(2, 26).reshape(2, 12)
# Those in bf16 ask for `torch._grouped_mm` where Dynamo does not hide it, the other for an operator of their library.
STORED = {"Mixtral": torch.float32, "Qwen3-MoE": torch.bfloat16, "GPT-OSS": torch.bfloat16}


def experts_plan(model: nn.Module, experts: str, recipe: str, kept: tuple[int, ...] = ()) -> Plan:
    """Plan the forward products of a layer of experts."""
    module = model.get_submodule(experts)
    made = []
    for name in ("gate_up_proj", "down_proj"):
        shape = getattr(module, name).shape
        n, k = shape[-2:] if not module.is_transposed else shape[:-3:-1]
        kernel = f"emulated.grouped_linear.{recipe}"
        one = decision(f"{experts}.{name}", "fprop", recipe, kernel=kernel)
        request = replace(one.request, op="grouped_linear", n=n, k=k, batch=shape[0])
        made.append(replace(one, request=request, kept_experts=kept))
    return plan_for(model, [], decisions=tuple(made))


class Logits(nn.Module):
    """What is exported: logits of tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens).logits


@pytest.mark.parametrize("family", STORED)
def test_a_family_with_stored_experts_is_exported_saved_and_compiled(family: str, tmp_path: Path) -> None:
    experts = FAMILIES[family][2]
    model = untrained(family).to(STORED[family]).eval()
    plan = experts_plan(model, experts, "rowwise", kept=(1,))
    other = copy.deepcopy(model)
    converted = loka.convert(copy.deepcopy(model), plan)
    frozen = loka.freeze(model, plan)
    assert set(frozen.kernels) == {f"{experts}.gate_up_proj", f"{experts}.down_proj"}, frozen
    with torch.no_grad():
        want = Logits(converted)(TOKENS)
        assert torch.equal(Logits(model)(TOKENS), want)

        program = torch.export.export(Logits(model), (TOKENS,))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        assert loaded.state_dict[f"model.{experts}.down_proj"].dtype == torch.float8_e4m3fn
        assert torch.equal(loaded.module()(TOKENS), want)

        compiled = torch.compile(Logits(model), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(TOKENS), want, rtol=1e-2, atol=1e-2)

        save_file(
            {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "frozen.safetensors"
        )
        for parameter in other.parameters():
            parameter.mul_(0.5)
        loka.freeze(other, plan)
        assert not torch.equal(Logits(other)(TOKENS), want)
        other.load_state_dict(load_file(tmp_path / "frozen.safetensors"))
        assert torch.equal(Logits(other)(TOKENS), want)
