"""A mixture-of-experts model of transformers that generates: prefill on one kernel and decode on another."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loka
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.profile import DeviceProfile, at_rows
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.hardware import device_info
from loka.kernel_registry.registry import default_registry
from loka.probes.judging.evidence import load_evidence
from loka.probes.records import Timing
from tests.made_moe_families import batches, experts_of, trained

pytestmark = pytest.mark.third_party("transformers")

PROMPTS, LENGTH, NEW = 2, 12, 6
CHOSEN = 2  # experts per token
FEW, MANY = "tensorwise", "rowwise"
EXPERTS = experts_of("Qwen3-MoE")


@pytest.fixture(autouse=True)
def _from_zero() -> Iterator[None]:
    reset_kernel_executions()
    yield
    reset_kernel_executions()


def generated(model: Any, prompt: Tensor) -> Tensor:
    found: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
    )
    return found


def profile_of(db: Path) -> DeviceProfile:
    """A device on which one recipe costs little to begin with, and the other little for every row."""
    here, times = device_info("cpu"), []
    evidence = load_evidence(str(db))
    for product in evidence.products:
        request = request_of(product, evidence.info.fingerprint)
        if request.op not in ("linear", "grouped_linear"):
            continue
        base = default_registry().baseline(request).name
        kernels = {
            base: (8.0, 1.0),
            f"emulated.{request.op}.{FEW}": (1.0, 0.9),
            f"emulated.{request.op}.{MANY}": (6.0, 0.3),
        }
        for rows in {request.m, *(point.rows for point in product.rows.points)}:
            at = at_rows(request, rows)
            times += [
                Timing(
                    **{name: getattr(at, name) for name in ("product", "batch", "m", "n", "k", "dtype")},
                    **{"kernel": kernel, "device": str(here), "median_us": start + each * rows, "spread_us": 0.01},
                    **{"repetitions": 9, "values": "normal", "created": "2026-01-01"},
                )
                for kernel, (start, each) in kernels.items()
            ]
    unique = {(each.kernel, each.product, each.batch, each.m, each.n, each.k, each.dtype): each for each in times}
    return DeviceProfile(label="made up", source="example", device=here, environment={}, times=tuple(unique.values()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Plan, Plan]:
    """A trained model, and plans from what it does when it generates: with kernels by rows, and with one for all."""
    model, db = trained("Qwen3-MoE").eval(), tmp_path_factory.mktemp("served") / "run.db"
    with loka.probe(model, db, every=1, overhead=1000.0, recipes=[FEW, MANY]):
        for prompt in batches(PROMPTS, LENGTH):
            generated(model, prompt)
    bound, profile = loka.Bound(row_error=0.5), profile_of(db)
    apart, one = (loka.plan(db, bound, device_profile=profile, by_rows=by_rows) for by_rows in (True, False))
    return model, apart, one


def test_a_plan_of_a_server_has_a_kernel_for_decode_and_one_for_prefill(served: tuple[nn.Module, Plan, Plan]) -> None:
    _, plan, _ = served
    for site in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", "model.layers.0.self_attn.q_proj"):
        decision = plan.decision(site, "fprop")
        assert decision.ranges is not None, decision.why
        few, many = decision.ranges
        assert (few.recipe, many.recipe) == (FEW, MANY)
        per_token = CHOSEN if "experts" in site else 1
        assert few.request.m == PROMPTS * per_token
        assert many.request.m == PROMPTS * LENGTH * per_token
        assert few.share == pytest.approx((NEW - 1) / NEW)
    # Only the last token of a prompt is read out: decode and prefill have as many rows there.
    assert plan.decision("lm_head", "fprop").ranges is None
    boundaries = {each.ranges[0].m_max for each in plan.decisions if each.ranges is not None}
    assert len(boundaries) == 1


def test_prefill_and_decode_run_on_their_kernels(served: tuple[nn.Module, Plan, Plan]) -> None:
    model, plan, _ = served
    converted = loka.convert(copy.deepcopy(model), plan)
    tokens = generated(converted, batches(PROMPTS, LENGTH)[0])
    assert tokens.shape == (PROMPTS, LENGTH + NEW)
    ran = kernel_executions()
    assert ran[f"emulated.grouped_linear.{FEW}"] == 2 * (NEW - 1)
    assert ran[f"emulated.grouped_linear.{MANY}"] == 2
    dense = [each for each in plan.decisions if each.request.op == "linear" and each.ranges is not None]
    one = [
        each for each in plan.decisions if each.request.op == "linear" and each.ranges is None and each.recipe == FEW
    ]
    assert ran[f"emulated.linear.{MANY}"] == len(dense)
    assert ran[f"emulated.linear.{FEW}"] == len(dense) * (NEW - 1) + len(one) * NEW


def test_the_numbers_are_those_of_plans_with_one_kernel_for_all(served: tuple[nn.Module, Plan, Plan]) -> None:
    model, plan, _ = served

    def on(which: int) -> nn.Module:
        """Convert with the kernels of one of the ranges for all rows."""
        decisions = tuple(
            each
            if each.ranges is None
            else replace(each, kernel=each.ranges[which].kernel, recipe=each.ranges[which].recipe, ranges=None)
            for each in plan.decisions
        )
        return loka.convert(copy.deepcopy(model), replace(plan, decisions=decisions))

    both, prompt = loka.convert(copy.deepcopy(model), plan), batches(PROMPTS, LENGTH)[0]
    with torch.no_grad():
        for tokens, which in ((prompt, 1), (prompt[:, :1], 0)):
            right = on(which)(input_ids=tokens).logits
            assert torch.equal(both(input_ids=tokens).logits, right)
            assert not torch.equal(on(1 - which)(input_ids=tokens).logits, right)


def test_the_split_takes_less_time_than_any_kernel_for_all(served: tuple[nn.Module, Plan, Plan]) -> None:
    _, apart, one = served
    for decision in apart.decisions:
        single = one.decision(decision.request.site, decision.request.product)
        if decision.ranges is None:
            assert decision == single
            continue
        assert single.time_us is not None
        assert decision.time_us is not None
        assert single.time_us > 1.05 * decision.time_us
