from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from loka.errors import ArgumentError
from loka.workloads.open_bandit import batches, load_open_bandit
from loka.workloads.quality import normalized_entropy
from loka.workloads.wukong import Mlp, Wukong, WukongConfig, WukongLayer

SMALL = WukongConfig(
    cardinalities=(7, 11, 3),
    num_dense=5,
    embedding_dim=8,
    num_dense_embeddings=2,
    num_layers=2,
    num_fmb_embeddings=4,
    num_lcb_embeddings=3,
    fm_rank=3,
    dense_hidden=(16,),
    fmb_hidden=(24, 16),
    head_hidden=(16,),
)


def sample(config: WukongConfig, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(size, (rows,), generator=generator) for size in config.cardinalities]
    return torch.stack(ids, dim=1), torch.randn(rows, config.num_dense, generator=generator)


def build(config: WukongConfig) -> Wukong:
    torch.manual_seed(0)
    return Wukong(config)


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def reference_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight.double() + norm.bias.double()


def reference_mlp(x: Tensor, mlp: Mlp, hidden: int) -> Tensor:
    for index in range(hidden):
        linear, norm = getattr(mlp, f"linear{index}"), getattr(mlp, f"norm{index}")
        x = reference_norm(x @ linear.weight.double().T + linear.bias.double(), norm)
        x = x / (1 + torch.exp(-x))
    return x @ mlp.out.weight.double().T + mlp.out.bias.double()


def reference_layer(x: Tensor, layer: WukongLayer, hidden: int) -> Tensor:
    """Compute LN(concat(FMB, LCB) + X) from the paper's formulas, in float64 and with explicit sums."""
    pairs = torch.einsum("bid,bjd->bij", x, x)
    interactions = torch.einsum("bij,jk->bik", pairs, layer.fmb.projection.double())
    flat = reference_norm(interactions.flatten(1), layer.fmb.norm)
    fmb = reference_mlp(flat, layer.fmb.mlp, hidden).view(len(x), -1, x.shape[-1])
    lcb = torch.einsum("mn,bnd->bmd", layer.lcb.weight.double(), x)
    residual = x
    if not isinstance(layer.residual, nn.Identity):
        residual = torch.einsum("mn,bnd->bmd", layer.residual.weight.double(), x)
    return reference_norm(torch.cat((fmb, lcb), dim=1) + residual, layer.norm)


def test_the_factorization_machine_equals_x_xt_y():
    fmb = build(SMALL).interaction[0].fmb
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("bid,bjd,jk->bik", x.double(), x.double(), fmb.projection.double())
    torch.testing.assert_close(fmb.interactions(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1], ids=["residual projected, 5 to 7", "residual as it is, 7 to 7"])
def test_a_layer_equals_the_formulas_of_the_paper_in_float64(index):
    layer = build(SMALL).interaction[index]
    assert isinstance(layer.residual, nn.Identity) == (index == 1)
    x = torch.randn(6, (5, 7)[index], 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x).double(), reference_layer(x.double(), layer, hidden=2), rtol=1e-4, atol=1e-5)


def test_the_model_equals_its_parts_in_float64():
    model = build(SMALL)
    categorical, dense = sample(SMALL, 9)
    rows = [table.weight.double()[categorical[:, index]] for index, table in enumerate(model.embedding.tables)]
    from_dense = reference_mlp(dense.double(), model.embedding.dense_mlp, hidden=1).view(9, 2, 8)
    x = torch.cat((torch.stack(rows, dim=1), from_dense), dim=1)
    for layer in model.interaction:
        x = reference_layer(x, layer, hidden=2)
    expected = reference_mlp(x.flatten(1), model.head, hidden=1).squeeze(-1)
    logits = model(categorical, dense)
    assert logits.shape == (9,)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    model = build(SMALL)
    model(*sample(SMALL, 64)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert without == []


@pytest.mark.parametrize("gradients", [True, False])
def test_mixtures_are_single_products_and_only_the_factorization_machine_is_batched(gradients):
    model = build(SMALL)
    with torch.set_grad_enabled(gradients), CountOps() as ops:
        model(*sample(SMALL, 16))
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert ops.counts["addmm"] == linears
    assert ops.counts["bmm"] == SMALL.num_layers
    assert ops.counts["mm"] == 2 * SMALL.num_layers + 1  # Xt Y and W X per layer, and one projected residual


def test_an_empty_batch_gives_no_logits():
    assert build(SMALL)(*sample(SMALL, 0)).shape == (0,)


@pytest.mark.parametrize("base_rate", [0.0048, 0.5])
def test_an_untrained_model_predicts_the_base_rate(base_rate):
    model = build(replace(SMALL, base_rate=base_rate))
    assert torch.sigmoid(model(*sample(SMALL, 200))).mean().item() == pytest.approx(base_rate, rel=0.2)


def test_a_model_without_dense_features_takes_an_empty_matrix():
    config = replace(SMALL, num_dense=0)
    model = build(config)
    assert model.embedding.dense_mlp is None
    assert model(*sample(config, 4)).shape == (4,)


def test_two_full_graphs_serve_every_batch_size():
    model = build(replace(SMALL, num_layers=1, fmb_hidden=(16,)))
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for rows in (8, 24, 16, 40):
        inputs = sample(SMALL, rows)
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert len(graphs) <= 2  # one for the first batch size, one for all others


def test_a_short_training_on_the_click_log_beats_the_base_rate_on_what_it_saw():
    log = load_open_bandit(verify=False).part(0, 4_096)
    config = replace(SMALL, cardinalities=log.cardinalities, num_dense=len(log.dense_fields), base_rate=log.click_rate)
    model = build(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = normalized_entropy(model(log.categorical, log.dense), log.click)
    for epoch in range(8):
        for categorical, dense, click in batches(log, 512, seed=epoch):
            optimizer.zero_grad()
            functional.binary_cross_entropy_with_logits(model(categorical, dense), click).backward()
            optimizer.step()
    after = normalized_entropy(model(log.categorical, log.dense), log.click)
    assert after < 0.95 < before < 1.1


@pytest.mark.parametrize(
    "change",
    [
        {"cardinalities": ()},
        {"cardinalities": (3, 0)},
        {"embedding_dim": 0},
        {"num_layers": 0},
        {"num_fmb_embeddings": 0},
        {"fmb_hidden": (8, 0)},
        {"num_dense": -1},
        {"num_dense_embeddings": 0},
        {"base_rate": 0.0},
        {"base_rate": 1.0},
    ],
    ids=str,
)
def test_sizes_that_make_no_model_are_refused(change):
    with pytest.raises(ArgumentError, match=next(iter(change))):
        replace(SMALL, **change)
