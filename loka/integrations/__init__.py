"""LoKA where people already look: what a probe sees, in the tools a training is watched with anyway.

    probe.subscribe(jsonl.Sink("steps.jsonl"))             one JSON object per sampled step
    probe.subscribe(tensorboard.Sink("runs/probe"))        scalars of TensorBoard
    probe.subscribe(wandb.Sink(run.log))                   flat dicts: Weights & Biases, MLflow, Comet, a function
    Trainer(callbacks=[lightning.ProbeCallback("run.db")])
    Trainer(callbacks=[transformers.ProbeCallback("run.db")])

Each library is imported by its own module only, and by none of LoKA's other code.
"""
