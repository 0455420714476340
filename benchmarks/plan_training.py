"""Does a model that trains as planned end where high precision ends? A Wukong on real clicks, next to what others run.

Per seed: a training under the probe; a plan from it; then training goes on from the same weights, optimiser state and
batches, once per arm, all FP8 in emulated numerics:

    fp32            what the others are compared with, seed by seed
    plan            LoKA, row_error <= 0.05 in every pass; emulated kernels counted as 1.3 times faster
    loss plan       LoKA, Bound(loss=2e-4)
    tensorwise      every linear layer, all passes: what is tried first
    torchao ...     torchao's own conversion under its recipes, emulate=True
    modelopt        tensorwise on the layers that ModelOpt's auto_quantize gives up first, as many as `plan` has

Told are the relative log loss on later impressions against fp32, paired by seed, its 95 % interval over seeds, and the
smallest difference that this many seeds could have shown. Arms whose library is not installed are left out.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import loka
from benchmarks.loss_budget import BATCH, logits_of
from benchmarks.paired import paired
from benchmarks.record import write_record
from loka.dispatch.deciding.plan import Plan
from loka.workloads.open_bandit import ClickLog, batches, load_open_bandit, split_by_time
from loka.workloads.quality import log_loss
from loka.workloads.wukong import Wukong, WukongConfig

LEARNING_RATE = 5e-5
SPEEDUP = 1.3
Arm = Callable[[nn.Module, Path], nn.Module]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, log: ClickLog, *, seed: int, steps: int) -> None:
    """Train for some steps, on batches whose order the seed decides."""
    done = 0
    while done < steps:
        for categorical, dense, click in batches(log, BATCH, seed=1000 * seed + done):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(categorical, dense), click).backward()
            optimizer.step()
            done += 1
            if done == steps:
                return


def planned(bound: loka.Bound) -> Arm:
    """Return the arm that runs LoKA's plan under a bound."""

    def arm(model: nn.Module, db: Path) -> nn.Module:
        return loka.convert(model, loka.plan(db, bound, assume_speedup=SPEEDUP))

    return arm


def uniform(plan: Plan, recipe: str, sites: set[str]) -> Plan:
    """Return the plan with one recipe for all passes of these sites, and high precision elsewhere."""
    decisions = []
    for each in plan.decisions:
        chosen = each.request.op == "linear" and each.request.site in sites
        kernel, name = (f"emulated.linear.{recipe}", recipe) if chosen else (each.baseline, None)
        decisions.append(replace(each, kernel=kernel, recipe=name))
    return replace(plan, decisions=tuple(decisions))


def tensorwise(model: nn.Module, db: Path) -> nn.Module:
    """Run every linear layer in tensorwise FP8."""
    plan = loka.plan(db, assume_speedup=SPEEDUP)
    return loka.convert(model, uniform(plan, "tensorwise", linears(model)))


def linears(model: nn.Module) -> set[str]:
    """Return the names of the linear layers."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def torchao(recipe: str) -> Arm:
    """Return the arm that torchao converts under one of its recipes."""

    def arm(model: nn.Module, db: Path) -> nn.Module:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
        converted: nn.Module = convert_to_float8_training(model, config=config)
        return converted

    return arm


def modelopt(log: ClickLog) -> Arm:
    """Return the arm whose layers are ModelOpt's choice, at the FP8 share of LoKA's plan."""

    def arm(model: nn.Module, db: Path) -> nn.Module:
        plan = loka.plan(db, assume_speedup=SPEEDUP)
        work = {each.request.site: each.request.flops for each in plan.decisions if each.request.product == "fprop"}
        share = math.fsum(
            each.request.flops for each in plan.decisions if each.request.product == "fprop" and each.recipe
        )
        sites: set[str] = set()
        for site in ranked(model, log):
            if site in work and math.fsum(work[each] for each in sites) + work[site] <= share * (1 + 1e-9):
                sites.add(site)
        return loka.convert(model, uniform(plan, "tensorwise", sites))

    return arm


def ranked(model: nn.Module, log: ClickLog) -> list[str]:
    """Return the linear layers in the order in which ModelOpt's auto_quantize gives them up."""
    import modelopt.torch.quantization as mtq

    data = [batch for _, batch in zip(range(8), batches(log, BATCH, seed=0), strict=False)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _, state = mtq.auto_quantize(
            copy.deepcopy(model),
            constraints={"effective_bits": 12.0},
            quantization_formats=[mtq.FP8_DEFAULT_CFG],
            data_loader=data,
            forward_step=lambda m, batch: m(batch[0], batch[1]),
            loss_func=lambda out, batch: F.binary_cross_entropy_with_logits(out, batch[2]),
            num_calib_steps=len(data),
            num_score_steps=len(data),
        )
    scores = {
        name.removesuffix(".quant_recipe"): max(each["scores"])
        for name, each in state["candidate_stats"].items()
        if each["scores"]
    }
    return sorted(scores, key=lambda name: (scores[name], name))


def arms_here(log: ClickLog) -> dict[str, Arm]:
    """Return the arms whose libraries are installed."""
    found: dict[str, Arm] = {
        "fp32": lambda model, db: model,
        "plan": planned(loka.Bound(row_error=0.05)),
        "loss plan": planned(loka.Bound(loss=2e-4)),
        "tensorwise": tensorwise,
    }
    if importlib.util.find_spec("torchao"):
        found |= {f"torchao {name}": torchao(name) for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp")}
    if importlib.util.find_spec("modelopt"):
        found["modelopt"] = modelopt(log)
    return found


def study(seed: int, steps: tuple[int, int], parts: tuple[ClickLog, ClickLog], folder: Path) -> dict[str, float]:
    """Train one seed under the probe, then every arm; return the log loss of each on later impressions."""
    log, later = parts
    torch.manual_seed(seed)
    base_rate = max(log.click_rate, 1e-4)
    model = Wukong(WukongConfig(cardinalities=log.cardinalities, num_dense=log.dense.shape[1], base_rate=base_rate))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    db = folder / f"{seed}.db"
    with loka.probe(model, db, every=5, overhead=2.0, loss="bce"):
        train(model, optimizer, log, seed=seed, steps=steps[0])
    found = {}
    for name, arm in arms_here(log).items():
        copied = arm(copy.deepcopy(model), db)
        continued = torch.optim.Adam(copied.parameters(), lr=LEARNING_RATE)
        continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the tensors
        train(copied, continued, log, seed=seed + 100, steps=steps[1])
        found[name] = log_loss(*logits_of(copied, later))
        print(f"seed {seed}, {name}: {found[name]:.6f}", flush=True)
    return found


def summary(losses: list[dict[str, float]]) -> dict[str, Any]:
    """Return, per arm, the paired relative change of the log loss, its interval, and what could have been seen."""
    results: dict[str, Any] = {}
    for name in losses[0]:
        found = paired([100 * (each[name] / each["fp32"] - 1) for each in losses])
        assert found is not None  # there is a seed
        results[name] = {
            "log loss": math.fsum(each[name] for each in losses) / len(losses),
            "relative to fp32, %": found.mean,
            "95 % interval, %": [found.low, found.high],
            "smallest difference seen with 80 % power, %": found.smallest_seen,
        }
    return results


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, without meaning")
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log, _, later = split_by_time(load_open_bandit())
    seeds, steps = (1, (60, 10)) if arguments.quick else (arguments.seeds, (240, 240))
    with tempfile.TemporaryDirectory() as folder:
        losses = [study(seed, steps, (log, later), Path(folder)) for seed in range(seeds)]
    settings = {
        "seeds": seeds,
        "steps under the probe": steps[0],
        "steps per arm": steps[1],
        "batch": BATCH,
        "learning rate": LEARNING_RATE,
        "impressions judged": len(later.click),
        "clicks judged": int(later.click.sum()),
    }
    write_record("plan_training", settings, summary(losses) | {"log losses by seed": losses})


if __name__ == "__main__":
    main()
