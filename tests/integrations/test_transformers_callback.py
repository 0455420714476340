"""The probe as a callback of Hugging Face's Trainer, the real one, against loops written by hand."""

import copy
import importlib.util
import os
import warnings

import pytest
import torch
from torch import nn

import loka
from loka.errors import LokaWarning
from tests.integrations.made_training import evidence_of, runs_of
from tests.made_processes import ranks

pytestmark = pytest.mark.third_party("transformers", "accelerate")

HERE = all(importlib.util.find_spec(name) is not None for name in ("transformers", "accelerate"))
if HERE:
    import transformers

    from loka.integrations.transformers import ProbeCallback, loss_of

OPTIONS = {"every": 2, "overhead": 100.0, "recipes": ["tensorwise", "rowwise"]}
ROWS, BATCH, LENGTH, VOCAB = 16, 4, 8, 64
BATCHES = ROWS // BATCH


def small_llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def tokens():
    made = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in made]


class InOrder(transformers.Trainer if HERE else object):
    """Takes the batches as they come, so that a loop by hand can do the same."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(tmp_path, model, callback, *, kind=InOrder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "out",
        **{
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 2,
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            **options,
        },
    )
    return kind(
        model=model,
        args=arguments,
        train_dataset=tokens(),
        eval_dataset=tokens(),
        callbacks=[callback] * bool(callback),
    )


def by_hand(model, db, *, accumulate=1, epochs=2, **options):
    """The same training without a Trainer: what its evidence has to be."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, model = tokens(), model.train()
    batches = [torch.stack([row["input_ids"] for row in rows[at : at + BATCH]]) for at in range(0, ROWS, BATCH)]
    with loka.probe(model, db, **OPTIONS, **options):
        for _ in range(epochs):
            for first in range(0, BATCHES, accumulate):
                together = batches[first : first + accumulate]
                items = torch.tensor(sum(batch.shape[0] * (LENGTH - 1) for batch in together))
                for batch in together:
                    model(input_ids=batch, labels=batch, num_items_in_batch=items).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 3])  # four batches: the last step of an epoch has fewer
def test_its_evidence_is_that_of_a_loop_by_hand(tmp_path, accumulate):
    model = small_llama()
    twin = copy.deepcopy(model)
    made = trainer(
        tmp_path,
        model,
        ProbeCallback(tmp_path / "run.db", **OPTIONS),
        gradient_accumulation_steps=accumulate,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    made.train()
    by_hand(twin, tmp_path / "hand.db", accumulate=accumulate, loss="cross_entropy")
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight)
    assert evidence_of(tmp_path / "run.db") == evidence_of(tmp_path / "hand.db")
    (run,) = runs_of(tmp_path / "run.db")
    assert (run.progress.status, run.progress.steps) == ("complete", 2 * BATCHES)  # no evaluation among them


def test_numbers_go_through_the_log_of_the_trainer(tmp_path):
    made = trainer(tmp_path, small_llama(), ProbeCallback(tmp_path / "run.db", log_every=2, **OPTIONS))
    made.train()
    logged = [entry for entry in made.state.log_history if "loka/step" in entry]
    steps = {step: products for step, _, _, products in evidence_of(tmp_path / "run.db")}
    assert [entry["loka/step"] for entry in logged] == sorted(steps)[::2]
    for entry in logged:
        errors = [
            product["errors"]["tensorwise"]["row_error"]
            for product in steps[entry["loka/step"]]
            if product["product"] == "dgrad" and "tensorwise" in product["errors"]
        ]
        assert entry["loka/all/worst/dgrad/tensorwise/row_error"] == max(errors)


def own_logs(made):
    """What a Trainer has logged by itself, without times."""
    ours = ("epoch", "step", "loss", "grad_norm", "learning_rate", "gathered")
    logs = [{key: entry[key] for key in ours if key in entry} for entry in made.state.log_history]
    return [entry for entry in logs if "loss" in entry]


def test_what_the_trainer_logs_by_itself_is_logged_as_ever(tmp_path):
    logged = []
    for callback in (None, ProbeCallback(tmp_path / "run.db", **OPTIONS)):
        torch.manual_seed(0)
        made = trainer(tmp_path, small_llama(), callback, logging_strategy="steps", logging_steps=1)
        made.train()
        logged.append(own_logs(made))
    assert any("loka/step" in entry for entry in made.state.log_history)
    assert len(logged[0]) == 2 * BATCHES
    assert logged[1] == logged[0]


class Gathering(InOrder):
    """Logs the mean of what its steps have gathered since the last log, as the trainers of TRL do."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.gathered = [*getattr(self, "gathered", []), float(loss)]
        return loss

    def log(self, logs, *args, **kwargs):
        if self.gathered:
            logs["gathered"] = (len(self.gathered), sum(self.gathered))
        super().log(logs, *args, **kwargs)
        self.gathered.clear()


def test_what_a_trainer_gathers_between_its_logs_stays_with_its_logs(tmp_path):
    logged = []
    for callback in (None, ProbeCallback(tmp_path / "run.db", **OPTIONS)):
        torch.manual_seed(0)
        made = trainer(tmp_path, small_llama(), callback, kind=Gathering, logging_strategy="steps", logging_steps=4)
        made.train()
        logged.append(own_logs(made))
    assert [entry["gathered"][0] for entry in logged[0]] == [4, 4]
    assert logged[1] == logged[0]
    assert all("gathered" not in entry for entry in made.state.log_history if "loka/step" in entry)


def work_in_a_job(folder, rank, group):
    """Train on one of two ranks, without the callback and with it; logging needs both of them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, and not used: the job is there
    found = []
    for callback in (None, ProbeCallback(folder / "run.db", **OPTIONS)):
        torch.manual_seed(0)
        made = trainer(folder / str(rank), small_llama(), callback, logging_strategy="steps", logging_steps=2)
        made.train()
        found.append((own_logs(made), made.model.lm_head.weight.tolist()))
    return found


def test_ranks_of_a_job_log_and_train_as_ever(tmp_path):
    logs = []
    for without, probed in ranks(2, work_in_a_job, tmp_path):
        assert len(without[0]) == BATCHES // 2
        assert probed == without
        logs.append(without)
    assert logs[0][1] == logs[1][1]  # they trained together
    (run,) = runs_of(tmp_path / "run.db")
    assert (run.progress.status, run.progress.steps, run.info.world_size) == ("complete", BATCHES, 2)


def test_a_training_that_breaks_closes_the_run_and_lets_go(tmp_path):
    class Breaks(transformers.TrainerCallback):
        broken = False

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.broken:
                self.broken = True
                raise KeyboardInterrupt("out of luck")

    model = small_llama()
    made = trainer(tmp_path, model, ProbeCallback(tmp_path / "run.db", **OPTIONS))
    made.add_callback(Breaks())
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert "_compiled_call_impl" not in model.__dict__
    (run,) = runs_of(tmp_path / "run.db")
    assert (run.progress.status, run.progress.steps) == ("failed", 4)
    assert "out of luck" in run.progress.reason

    made.train()
    assert [run.progress.status for run in runs_of(tmp_path / "run.db")] == ["failed", "complete"]


def test_a_callback_added_later_serves_as_well(tmp_path):
    made = trainer(tmp_path, small_llama(), None)
    made.add_callback(ProbeCallback(tmp_path / "run.db", **OPTIONS))
    made.train()
    (run,) = runs_of(tmp_path / "run.db")
    assert run.progress.steps == 2 * BATCHES
    assert any("loka/step" in entry for entry in made.state.log_history)


def test_one_callback_serves_two_trainers_in_turn(tmp_path):
    callback = ProbeCallback(tmp_path / "run.db", **OPTIONS)
    first, second = (trainer(tmp_path, small_llama(), callback, num_train_epochs=1) for _ in range(2))
    for each in (first, second, first):
        each.train()
    assert [run.progress.steps for run in runs_of(tmp_path / "run.db")] == [BATCHES] * 3
    assert [len([entry for entry in each.state.log_history if "loka/step" in entry]) for each in (first, second)] == [
        2,
        2,
    ]


def test_training_goes_on_from_a_checkpoint_with_a_run_of_its_own(tmp_path):
    options = {"save_strategy": "steps", "save_steps": BATCHES, "num_train_epochs": 2}
    made = trainer(tmp_path, small_llama(), ProbeCallback(tmp_path / "run.db", **OPTIONS), **options)
    made.train()
    again = trainer(tmp_path, small_llama(), ProbeCallback(tmp_path / "run.db", **OPTIONS), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{BATCHES}"))
    assert [run.progress.steps for run in runs_of(tmp_path / "run.db")] == [2 * BATCHES, BATCHES]


def test_nothing_to_see_warns_and_does_not_stop_the_end_of_training(tmp_path):
    callback = ProbeCallback(tmp_path / "run.db", filter_fn=lambda module, name: name == "model.norm", **OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = trainer(tmp_path, small_llama(), callback).train()
    assert output.global_step == 2 * BATCHES
    assert [entry for entry in caught if entry.category is LokaWarning and "no floating-point" in str(entry.message)]


def test_the_loss_hook_is_that_of_the_model():
    small = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    classifier = transformers.BertConfig(intermediate_size=16, num_labels=3, **small)
    assert loss_of(small_llama()) == "cross_entropy"
    for problem, hook in (
        ("single_label_classification", "cross_entropy"),
        ("multi_label_classification", "bce"),
        ("regression", None),
        (None, None),
    ):
        config = copy.deepcopy(classifier)
        config.problem_type = problem
        assert loss_of(transformers.BertForSequenceClassification(config)) == hook
    assert loss_of(nn.Linear(2, 2)) is None
