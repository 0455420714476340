"""Equivalent mods on models as others write them: transformers, torch's own encoder, a recommendation model."""

import pytest
import torch
from torch import nn

import loka.mods
from loka.mods import FoldNorm, FuseParallelLinears, Hadamard, KeepRowsHigh, PadToAlignment, Smooth
from loka.workloads.wukong import Wukong, WukongConfig
from tests.mods.made_blocks import make_blocks, make_input


def relative(actual, reference):
    return float(((actual - reference).norm() / reference.norm()).detach())


@pytest.mark.third_party("transformers")
@torch.no_grad()
def test_a_llama_of_transformers_is_rewritten_and_put_back():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.exp2(2 * torch.randn(48)))
    batches = [{"input_ids": torch.randint(0, 64, (2, 24)), "use_cache": False} for _ in range(3)]
    output, keys = model(**batches[0]).logits, list(model.state_dict())
    mods = [Smooth(alpha=None), FoldNorm(), FuseParallelLinears(), KeepRowsHigh(), Hadamard(), PadToAlignment()]
    applied = loka.mods.apply(model, mods, inputs=batches)
    assert {each.mod for each in applied.replacements} >= {"FoldNorm", "FuseParallelLinears", "KeepRowsHigh"}
    folded = {each.fqn for each in applied.replacements if each.mod == "FoldNorm"}
    assert {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")
    } <= folded
    first = model.model.layers[0]
    assert first.self_attn.q_proj.shared is first.self_attn.v_proj.shared
    assert first.mlp.gate_proj.shared is first.mlp.up_proj.shared
    assert any(refusal.fqn == "lm_head" and "tied" in refusal.reason for refusal in applied.refused)
    assert relative(model(**batches[0]).logits, output) < 1e-4
    applied.undo()
    assert torch.equal(model(**batches[0]).logits, output)
    assert list(model.state_dict()) == keys


def test_the_feed_forward_part_of_torchs_encoder_is_reached_past_its_fused_kernel():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 48, norm_first=True, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(3, 7, 32)
    with torch.no_grad():
        output = model(x)
        applied = loka.mods.apply(model, [KeepRowsHigh(columns=0.25)], inputs=[x])
        assert {each.fqn for each in applied.replacements if "linear" in each.fqn} == {
            f"layers.{index}.{name}" for index in (0, 1) for name in ("linear1", "linear2")
        }
        assert all("not called" in refusal.reason or "also read" in refusal.reason for refusal in applied.refused)
        seen = []
        model.layers[0].linear1.rest.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        assert relative(model(x), output) < 1e-5
        assert seen  # in evaluation mode and without gradients, where the fused kernel would pass it over
    applied.undo()
    assert model.layers[0].activation_relu_or_gelu


def test_a_recommendation_model_takes_them_all():
    torch.manual_seed(0)
    model = Wukong(WukongConfig(cardinalities=(10, 20), num_dense=5, num_layers=2))
    batches = [(torch.randint(0, 10, (64, 2)), torch.randn(64, 5)) for _ in range(2)]
    model.eval()
    output = model(*batches[0])
    mods = [FoldNorm(), Smooth(), FuseParallelLinears(), KeepRowsHigh(), Hadamard(), PadToAlignment()]
    applied = loka.mods.apply(model, mods, inputs=batches)
    assert applied.replacements
    assert relative(model(*batches[0]), output) < 1e-4
    model.train()
    model(*batches[0]).sum().backward()
    applied.undo()
    model.eval()
    assert torch.equal(model(*batches[0]), output)


def test_rewritten_models_compile_whole_and_for_other_batch_sizes():
    model, x = make_blocks(), make_input(loud_rows=1)
    output = model(x)
    split = KeepRowsHigh(rows=4.0, recipe="tensorwise", only=["*up", "*down"])
    mods = [PadToAlignment(24, only="head"), FuseParallelLinears(only=["*.q", "*.v"]), split]
    rotated = Hadamard(balance="full", keep=0.5, only=["*down", "*gate"])
    applied = loka.mods.apply(model, [*mods, rotated, Hadamard()], inputs=[x])
    assert len({each.mod for each in applied.replacements}) == 4
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (96, 50, 7):
        assert relative(compiled(x[:rows]), output[:rows]) < 1e-4
    assert len(graphs) <= 2


def test_a_rewritten_model_runs_under_autocast():
    model, x = make_blocks(), make_input(loud_rows=1)
    output = model(x)
    mods = [FuseParallelLinears(), KeepRowsHigh(rows=4.0, recipe="tensorwise"), Hadamard(balance="full", keep=0.25)]
    loka.mods.apply(model, mods, inputs=[x])
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x).float(), output) < 0.1
