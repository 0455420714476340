"""Power-of-two scales, replayed on dense layers and experts: kernels that are faster and cost some models accuracy.

vLLM's DeepGEMM path rounded the scales of 1x128 and 128x128 blocks to powers of two, which sm_100 computes fastest,
lost accuracy with checkpoints whose weights were stored under fp32 scales, and was fixed by a list of model names
(vllm#37804, #37806, #38083). Here a byte transformer with experts is trained, kept once as it was trained and once as
such an FP8 checkpoint, probed, and planned for a device on which the power-of-two kernel is the faster one. Nothing
names a model: what is chosen follows from the evidence and the bound. Plans are then run, emulated, on text that the
probe never saw: KL is that from the checkpoint as it is.
"""

import argparse
import copy
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loka
from benchmarks.record import write_record
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.deciding.sweep import sweep_evidence
from loka.dispatch.measuring.profile import DeviceProfile
from loka.formats import RECIPES
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import default_registry
from loka.probes.judging.evidence import RunEvidence, load_evidence
from loka.probes.records import Timing
from loka.quantize import fake_quantize
from loka.workloads.transformer import ByteTransformer, ByteTransformerConfig, stdlib_text, text_batches

# Time of a call by the recipe of its kernel, baseline 100: an example, in the order in which a device that scales by
# powers of two in its tensor cores has them.
Times = Mapping[str | None, float]
TIMES_US: Times = {None: 100.0, "blockwise": 80.0, "mxfp8": 75.0, "blockwise_pow2": 60.0}
PROBED = tuple(recipe for recipe in TIMES_US if recipe is not None)
DEVICE = DeviceInfo(type="cuda", name="example that scales by powers of two", capability=(10, 0))
BATCH, LENGTH = 16, 64
SAMPLES = 12


class ExpertMlp(nn.Module):
    """Every token through the expert that its router likes best, [B, T, d] -> [B, T, d]; weights [experts, out, in]."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, dim) / math.sqrt(dim))
        self.down = nn.Parameter(torch.randn(experts, dim, hidden) / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, d]."""
        tokens = x.flatten(0, -2)
        weight, expert = self.router(tokens).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        ends = F.one_hot(expert, self.up.shape[0]).sum(0).cumsum(0).to(torch.int32)
        hidden = F.silu(F.grouped_mm(tokens[order], self.up.mT, offs=ends))
        rows = F.grouped_mm(hidden, self.down.mT, offs=ends) * weight[order, None]
        return torch.zeros_like(tokens).index_copy(0, order, rows).view_as(x)


def trained(*, steps: int, dim: int = 256, layers: int = 2, experts: int = 4) -> ByteTransformer:
    """Train a byte transformer on Python's standard library; the last block has experts, the others a dense MLP."""
    torch.manual_seed(0)
    config = ByteTransformerConfig(dim=dim, num_layers=layers, mlp_hidden=2 * dim, context=LENGTH)
    model = ByteTransformer(config)
    model.blocks[-1].mlp = ExpertMlp(dim, dim, experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for tokens, following in islice(_text(seed=0), steps):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), following.flatten()).backward()
        optimizer.step()
    return model


@torch.no_grad()
def fp8_checkpoint(model: ByteTransformer) -> ByteTransformer:
    """Return the model as a checkpoint whose weights are stored in e4m3 with an fp32 scale per 128x128 block."""
    stored = copy.deepcopy(model)
    spec = RECIPES["blockwise"].operand("weight")
    for name, weight in stored.named_parameters():
        if weight.dim() == 3:
            weight.copy_(torch.stack([fake_quantize(each, spec) for each in weight]))
        elif weight.dim() == 2 and "tokens" not in name and "positions" not in name:
            weight.copy_(fake_quantize(weight, spec))
    return stored


def evidence_of(model: nn.Module, database: Path) -> RunEvidence:
    """Probe the forward passes of a frozen model."""
    with torch.no_grad(), loka.probe(model, database, every=1, overhead=1e3, recipes=PROBED):
        for tokens, _ in islice(_text(seed=1), SAMPLES):
            model(tokens)
    return load_evidence(database)


def example_profile(evidence: RunEvidence, times_us: Times = TIMES_US) -> DeviceProfile:
    """Return a device on which every emulated kernel takes what its recipe says; others were never timed."""
    registry = default_registry()
    times: dict[tuple[object, ...], Timing] = {}
    for product in evidence.products:
        request = request_of(product, evidence.info.fingerprint)
        kernels = {registry.baseline(request).name: None}
        kernels |= {spec.name: spec.recipe for spec in registry.candidates(request.op) if spec.library == "emulated"}
        for name, recipe in kernels.items():
            if recipe in times_us:
                timing = Timing(
                    **{"kernel": name, "product": request.product, "batch": request.batch, "m": request.m},
                    **{"n": request.n, "k": request.k, "dtype": request.dtype, "device": str(DEVICE)},
                    **{"median_us": times_us[recipe], "spread_us": 0.1, "repetitions": 9},
                    **{"values": "example", "created": "2026-01-01"},
                )
                times[name, request.product, request.batch, request.m, request.n, request.k] = timing
    return DeviceProfile(
        label="example: powers of two are fastest",
        source="example",
        device=DEVICE,
        environment={},
        times=tuple(times.values()),
    )


def planned(evidence: RunEvidence, bound: loka.Bound, times_us: Times = TIMES_US) -> Plan:
    """Decide all products for the example device."""
    profile = example_profile(evidence, times_us)
    options = PlanOptions(device=torch.device("cpu"), profile=profile)
    return decide_all(evidence, bound, default_registry(), profile.times, options)


def swept(evidence: RunEvidence) -> list[loka.Bound]:
    """Return bounds from where nothing passes to where everything does."""
    profile = example_profile(evidence)
    options = PlanOptions(device=torch.device("cpu"), profile=profile)
    found = sweep_evidence(evidence, loka.Bound(row_error=0.05), default_registry(), profile.times, options, points=12)
    return [point.bound for point in found.points]


def choices(plan: Plan) -> dict[str, str]:
    """Return site -> recipe of the chosen kernel, `baseline` for none."""
    return {decision.request.site: decision.recipe or "baseline" for decision in plan.decisions}


@torch.no_grad()
def divergence(model: nn.Module, plan: Plan) -> float:
    """Return the mean KL per byte, over unseen text, of the model as planned from the model as it is."""
    rounded = copy.deepcopy(model)
    loka.convert(rounded, plan)
    found = []
    for tokens, _ in islice(_text(seed=2), 8):
        exact, actual = model(tokens).log_softmax(-1), rounded(tokens).log_softmax(-1)
        found.append(float((exact.exp() * (exact - actual)).sum(-1).mean()))
    return math.fsum(found) / len(found)


def ratios(evidence: RunEvidence, *, grouped: bool) -> list[float]:
    """Return error under power-of-two scales over that under fp32 scales, of each dense site or each expert site."""
    result = []
    for product in evidence.products:
        errors = {recipe.recipe: recipe.error.mean for recipe in product.recipes}
        if ("grouped" in product.op) is grouped:
            result.append(errors["blockwise_pow2"] / errors["blockwise"])
    return result


def study(model: nn.Module, database: Path) -> dict[str, Any]:
    """Probe one checkpoint, plan it under a range of bounds, and run each plan."""
    evidence = evidence_of(model, database)
    experts = {product.site for product in evidence.products if "grouped" in product.op}
    by_bound = {}
    for bound in swept(evidence):
        plan = planned(evidence, bound)
        chosen = choices(plan)
        by_bound[f"{bound.row_error:g}"] = {
            "dense": dict(Counter(recipe for site, recipe in chosen.items() if site not in experts)),
            "experts": dict(Counter(recipe for site, recipe in chosen.items() if site in experts)),
            "kl": divergence(model, plan),
        }
    anything = loka.Bound(row_error=1.0)
    everywhere = {
        recipe: divergence(model, planned(evidence, anything, {None: 100.0, recipe: 50.0}))
        for recipe in ("blockwise", "blockwise_pow2")
    }
    return {
        "kl of one recipe everywhere": everywhere,
        "error ratio, dense": {"median": median(found := ratios(evidence, grouped=False)), "worst": max(found)},
        "error ratio, experts": {"median": median(found := ratios(evidence, grouped=True)), "worst": max(found)},
        "by bound": by_bound,
    }


def _text(*, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return text_batches(stdlib_text(1_000_000), batch_size=BATCH, length=LENGTH, seed=seed)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    model = trained(steps=steps)
    checkpoints = {"as trained": model, "FP8 checkpoint": fp8_checkpoint(model)}
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: study(checkpoint, Path(folder) / f"{at}.db")
            for at, (name, checkpoint) in enumerate(checkpoints.items())
        }
    write_record(
        "e8m0_replay",
        {"steps": steps, "samples": SAMPLES, "times_us": {str(k): v for k, v in TIMES_US.items()}},
        results,
    )


if __name__ == "__main__":
    main()
