"""What tracing the routing costs: a mixture of experts that reads prompts and generates, with the trace and without.

The models are those of transformers, built from their configurations with random weights; a trace sees the same work
whatever the weights are. Runs with and without take turns, one thread, process CPU time: the ratio then holds on a busy
machine. Opening and finishing the file is part of it, as it is of a recording.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

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
_SMALLEST = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8}


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


def works(model: Any, rows: int, prompt: int, answer: int) -> dict[str, Callable[[], object]]:
    """Return what is timed: prompts that are read, and answers that are generated after a short prompt."""
    ids = torch.randint(3, 1024, (rows, prompt))

    def read() -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False)

    def generate() -> object:
        mask = torch.ones(rows, 4, dtype=torch.long)
        return model.generate(input_ids=ids[:, :4], attention_mask=mask, max_new_tokens=answer, do_sample=False)

    return {f"read {rows} x {prompt}": read, f"generate {rows} x {answer}": generate}


def study(work: Callable[[], object], model: nn.Module, *, folder: Path, times: int, rounds: int) -> Ratio:
    """Return the time of `times` runs that are traced, over that of as many that are not."""
    names = (folder / f"{number}.npz" for number in itertools.count())

    def traced() -> None:
        with loka.trace_routing(model, next(names)):
            for _ in range(times):
                work()

    def plain() -> None:
        for _ in range(times):
            work()

    return interleaved_ratio(traced, plain, rounds=rounds, warmup=1, clock=process_time)


def main() -> None:
    """Run the study on both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, without meaning")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"rows": 4, "prompt": 128, "answer": 32, "times": 8, "rounds": 5}
    if quick:
        settings |= {"prompt": 8, "answer": 4, "times": 1, "rounds": 1}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in ({"smallest": _SMALLEST} if quick else _SIZES).items():
            model = build(sizes)
            for what, work in works(model, settings["rows"], settings["prompt"], settings["answer"]).items():
                place = Path(folder) / f"{name}-{len(results)}"
                place.mkdir()
                ratio = study(work, model, folder=place, times=settings["times"], rounds=settings["rounds"])
                results[f"{name}: {what}, traced / plain"] = ratio
    write_record("routing_overhead", {**settings, "sizes": _SIZES}, results)


if __name__ == "__main__":
    main()
