"""Models of other libraries, unchanged, through the whole path: probe, report, plan, convert, compile.

torchrec's DLRM_DCN keeps most of its dense work in bare Parameters; the DeepCTR-Torch models multiply by slices of
3-d Parameters, by tensordot and in convolutions.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loka
from loka.reports.build import report_of
from loka.torch_release import release

pytestmark = pytest.mark.third_party

BOUND = loka.Bound(row_error=0.2)
BATCH = 64


def dlrm_dcn() -> tuple[nn.Module, Callable[[], tuple[Any, ...]]]:
    if release() != (2, 13):
        pytest.skip("the fbgemm of requirements/third-party.txt loads against torch 2.13 alone")
    pytest.importorskip("torchrec")
    from torchrec.models.dlrm import DLRM_DCN
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    fields = [f"f{i}" for i in range(4)]
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=16, num_embeddings=100, feature_names=[name])
        for name in fields
    ]
    model = DLRM_DCN(
        EmbeddingBagCollection(tables=tables),
        13,
        dense_arch_layer_sizes=[32, 16],
        over_arch_layer_sizes=[64, 32, 1],
        dcn_num_layers=2,
        dcn_low_rank_dim=8,
    )

    def inputs() -> tuple[Any, ...]:
        ids = torch.randint(0, 100, (len(fields) * BATCH,))
        lengths = torch.ones(len(fields) * BATCH, dtype=torch.int32)
        return torch.randn(BATCH, 13), KeyedJaggedTensor(keys=fields, values=ids, lengths=lengths)

    return model, inputs


def deepctr(name: str, **options: Any) -> tuple[nn.Module, Callable[[], tuple[Any, ...]]]:
    pytest.importorskip("deepctr_torch")
    from deepctr_torch import models
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    sparse = [SparseFeat(f"c{i}", vocabulary_size=20, embedding_dim=8) for i in range(5)]
    columns = [*sparse, *(DenseFeat(f"d{i}", 1) for i in range(3))]
    model = getattr(models, name)(columns, columns, dnn_hidden_units=(32, 16), device="cpu", **options)

    def inputs() -> tuple[Any, ...]:
        return (torch.cat([torch.randint(0, 20, (BATCH, 5)).float(), torch.rand(BATCH, 3)], 1),)

    return model, inputs


MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "DLRM_DCN": (dlrm_dcn, {"inter_arch.crossnet.V_kernels.0", "over_arch.model.0._mlp.0._linear"}),
    "DCN": (lambda: deepctr("DCN", cross_parameterization="matrix"), {"crossnet.kernels", "dnn.linears.0"}),
    "DCNMix": (lambda: deepctr("DCNMix", num_experts=2), {"crossnet.U_list", "crossnet.V_list", "crossnet.C_list"}),
    "xDeepFM": (lambda: deepctr("xDeepFM", cin_layer_size=(16, 8)), {"cin.conv1ds.0", "dnn.linears.0"}),
    "AutoInt": (lambda: deepctr("AutoInt"), {"int_layers.0.W_Query", "dnn.linears.0"}),
}
# Compiled with the products of these sites planned, one of each form: Inductor needs seconds for each product. The
# others take the same way through the compiler's own tests.
COMPILED = {
    "DLRM_DCN": ["inter_arch.crossnet.V_kernels.0", "over_arch.model.0._mlp.0._linear"],
    "DCNMix": ["crossnet.U_list"],
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """DeepCTR-Torch asks the network for a newer version of itself when it is imported."""
    requests = pytest.importorskip("requests")
    monkeypatch.setattr(requests, "get", lambda *_, **__: SimpleNamespace(status_code=404))
    yield
    torch._dynamo.reset()


def train(model: nn.Module, batches: list[tuple[tuple[Any, ...], Tensor]], steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        inputs, labels = batches[step % len(batches)]
        loss = F.binary_cross_entropy_with_logits(model(*inputs).reshape(-1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_a_third_party_model_goes_through_unchanged(name: str, tmp_path: Path) -> None:
    make, expected = MODELS[name]
    model, inputs = make()
    batches = [(inputs(), torch.randint(0, 2, (BATCH,)).float()) for _ in range(4)]
    start = copy.deepcopy(model)
    db = tmp_path / "run.db"
    with loka.probe(model, db, every=1, overhead=100.0):
        train(model, batches, 24)

    report = report_of(db, BOUND)
    assert report["run"]["status"] == "complete"
    assert expected <= {entry["site"] for entry in report["sites"]}

    plan = loka.plan(db, BOUND, assume_speedup=1.3)
    plan.save(tmp_path / "plan.json")
    assert plan.fp8_share() > 0.05

    high = train(copy.deepcopy(start), batches, 5)
    converted = copy.deepcopy(start)
    keys = {key: value.shape for key, value in converted.state_dict().items()}
    loka.convert(converted, plan)
    assert {key: value.shape for key, value in converted.state_dict().items()} == keys
    eager = train(converted, batches, 5)
    assert eager != high  # FP8 really ran
    assert eager == pytest.approx(high, rel=0.05)

    if name not in COMPILED:
        return
    plan = loka.plan(db, BOUND, assume_speedup=1.3, filter=COMPILED[name])
    plan.save(tmp_path / "plan.json")
    eager = train(loka.convert(copy.deepcopy(start), plan), batches, 5)
    assert eager != high
    options = {"plan": str(tmp_path / "plan.json")}
    compiled = torch.compile(copy.deepcopy(start), backend="loka", options=options, fullgraph=True)
    assert train(compiled, batches, 5) == pytest.approx(eager, rel=1e-3)
