"""What `Bound(loss=B)` costs in the end: a Wukong on real clicks, probed while it trains, planned, converted, measured.

Per seed and budget: what the plan spends, and the mean KL from the unrounded model that the converted one really has on
later impressions, which the probe never saw. Both are shares of the loss. KL is the expected change of the loss; the
change on the clicks that happened to fall is given beside it, and is mostly noise.
"""

import argparse
import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loka
from benchmarks.record import write_record
from loka.workloads.open_bandit import ClickLog, batches, load_open_bandit, split_by_time
from loka.workloads.wukong import Wukong, WukongConfig

BUDGETS = (2e-4, 5e-5, 1e-5, 1e-6)
BATCH = 512
LEARNING_RATE = 1e-3


def trained(train: ClickLog, database: Path, *, seed: int, steps: int) -> Wukong:
    """Train from nothing under the probe."""
    torch.manual_seed(seed)
    base_rate = max(train.click_rate, 1e-4)
    model = Wukong(WukongConfig(cardinalities=train.cardinalities, num_dense=train.dense.shape[1], base_rate=base_rate))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    done = 0
    with loka.probe(model, database, every=5, overhead=2.0, loss="bce"):
        while done < steps:
            for categorical, dense, click in batches(train, BATCH, seed=seed + done):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(model(categorical, dense), click).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break
    return model


@torch.no_grad()
def logits_of(model: nn.Module, part: ClickLog) -> tuple[Tensor, Tensor]:
    """Return logits and clicks of a part of the log in float64."""
    pairs = [(model(categorical, dense), click) for categorical, dense, click in batches(part, BATCH, drop_last=False)]
    return torch.cat([logits for logits, _ in pairs]).double(), torch.cat([click for _, click in pairs]).double()


def divergence(before: Tensor, after: Tensor) -> float:
    """Return the mean KL of two Bernoulli predictions given as logits."""
    p = before.sigmoid()
    true = p * (F.logsigmoid(before) - F.logsigmoid(after))
    false = (1 - p) * (F.logsigmoid(-before) - F.logsigmoid(-after))
    return float((true + false).mean())


def study(train: ClickLog, test: ClickLog, database: Path, *, seed: int, steps: int) -> dict[str, Any]:
    """Spend every budget on one training."""
    model = trained(train, database, seed=seed, steps=steps)
    logits, click = logits_of(model, test)
    loss = float(F.binary_cross_entropy_with_logits(logits, click))
    found = {}
    for budget in BUDGETS:
        plan = loka.plan(database, bound=loka.Bound(loss=budget), assume_speedup=1.3, measure=False)
        paid = [decision.loss for decision in plan.decisions if decision.loss is not None]
        rounded = copy.deepcopy(model)
        loka.convert(rounded, plan)
        after, _ = logits_of(rounded, test)
        found[f"seed {seed}, budget {budget:g}"] = {
            "products": len(paid),
            "spent": math.fsum(cost.cost for cost in paid),
            "added kl": divergence(logits, after) / loss,
            "change of the loss": float(F.binary_cross_entropy_with_logits(after, click)) / loss - 1,
        }
    return found


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed")
    seeds = (0,) if parser.parse_args().quick else (0, 1, 2)
    torch.set_num_threads(1)
    train, _, test = split_by_time(load_open_bandit())
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            results |= study(train, test, Path(folder) / f"{seed}.db", seed=seed, steps=240)
    settings = {"steps": 240, "learning rate": LEARNING_RATE, "batch": BATCH, "impressions judged": len(test.click)}
    write_record("loss_budget", settings, results)


if __name__ == "__main__":
    main()
