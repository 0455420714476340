"""The routing of the mixture of experts that `router` trains, on held-out text of four domains, as a trace.

    python -m benchmarks.moe.trace OUT.npz [--steps 600] [--weights FILE]

Each request is the beginning of a held-out passage; the model writes on, greedily. What comes out is what
`loka moe report` and `python -m benchmarks.moe_placement OUT.npz` read.
"""

import argparse
from pathlib import Path
from typing import Final

import torch

import loka
from benchmarks.moe.router import HELD_OUT, texts, trained

PROMPT: Final[int] = 96  # bytes
WRITTEN: Final[int] = 48
_BATCH: Final[int] = 8


def main() -> None:
    """Train or read the model, let it write on, and keep which experts the tokens went to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600, help="of training, ten minutes on one core")
    parser.add_argument("--weights", type=Path, help="read the trained weights here, or leave them here")
    options = parser.parse_args()
    data = texts()
    model = trained(data, options.steps, options.weights)
    with torch.no_grad(), loka.trace_routing(model, options.out, stop_tokens=()) as trace:
        for begin in range(0, HELD_OUT, _BATCH):
            for domain, passages in data.held_out.items():
                prompts = passages[begin : begin + _BATCH, :PROMPT]
                with trace.domain(domain):
                    model.generate(prompts, max_new_tokens=WRITTEN, do_sample=False, use_cache=True)
                print(f"{domain}: {begin + len(prompts)} of {HELD_OUT}", flush=True)


if __name__ == "__main__":
    main()
