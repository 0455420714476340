"""What tracing the routing costs: a mixture of experts that reads prompts and generates, with the trace and without.

The models are those of transformers, built from their configurations with random weights; a trace sees the same work
whatever the weights are. The traced model and its plain twin share their weights and take turns, one batch of requests
each, one thread, process CPU time: the median over rounds then holds on a busy machine. What a trace costs once, to
open and to finish it, comes apart.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any, Final

import torch
from torch import nn

import loka
from benchmarks.record import write_record
from loka.timing import Ratio, interleaved_ratio

# The first has layers so small that nobody would run them; it shows what a step costs at most.
_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 4, "num_experts": 16},
    "medium": {"hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 8, "num_experts": 64},
}
_ROUNDS: dict[str, int] = {"small": 101, "medium": 21}
_SMALLEST = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8}
_OPENED: Final[int] = 9  # traces; the cheapest counts


def build(sizes: dict[str, Any]) -> nn.Module:
    """Return a Qwen3-MoE of these sizes, four experts for each token."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        **sizes,
        vocab_size=1024,
        intermediate_size=sizes["hidden_size"],
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: nn.Module = transformers.Qwen3MoeForCausalLM(config).eval()
    return model


def twin_of(model: nn.Module) -> nn.Module:
    """Return the same model on the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def works(rows: int, prompt: int, answer: int) -> dict[str, Callable[[Any], object]]:
    """Return what is timed: prompts that are read, and answers that are generated after a short prompt."""
    ids = torch.randint(3, 1024, (rows, prompt))

    def read(model: Any) -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False)

    def generate(model: Any) -> object:
        mask = torch.ones(rows, 4, dtype=torch.long)
        return model.generate(input_ids=ids[:, :4], attention_mask=mask, max_new_tokens=answer, do_sample=False)

    return {f"read {rows} x {prompt}": read, f"generate {rows} x {answer}": generate}


def study(work: Callable[[Any], object], model: nn.Module, path: Path, rounds: int) -> Ratio:
    """Return the time of a traced run over that of a plain one."""
    traced = twin_of(model)
    with loka.trace_routing(traced, path):
        return interleaved_ratio(lambda: work(traced), lambda: work(model), rounds=rounds, clock=process_time)


def opening(work: Callable[[Any], object], model: nn.Module, folder: Path) -> float:
    """Return the milliseconds that opening and finishing a trace of one run takes, beside the run."""
    found = []
    for number in range(_OPENED):
        begin = process_time()
        with loka.trace_routing(model, folder / f"{number}.npz"):
            before = process_time()
            work(model)
            after = process_time()
        found.append(process_time() - after + before - begin)
    return round(1000 * min(found), 2)


def main() -> None:
    """Run the study on both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"rows": 4, "prompt": 128, "answer": 32, "rounds": _ROUNDS}
    sizes = _SIZES
    if quick:
        settings |= {"prompt": 8, "answer": 4, "rounds": {"smallest": 1}}
        sizes = {"smallest": _SMALLEST}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in sizes.items():
            model = build(size)
            for what, work in works(settings["rows"], settings["prompt"], settings["answer"]).items():
                path = Path(folder) / f"{name}-{len(results)}.npz"
                results[f"{name}: {what}, traced / plain"] = study(work, model, path, settings["rounds"][name])
            results[f"{name}: opening and finishing a trace, ms"] = opening(work, model, Path(folder))
    write_record("routing_overhead", {**settings, "sizes": sizes}, results)


if __name__ == "__main__":
    main()
