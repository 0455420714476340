"""The blocks of the integrations page that need a library run, after those that do not."""

import re
import warnings
from pathlib import Path

import pytest
import torch

import loka
from loka.bounds import Bound
from loka.dispatch.running.executions import reset_kernel_executions
from loka.reports.build import report_of

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


@pytest.mark.third_party("pytorch_lightning", "transformers", "accelerate", "tensorboard")
def test_every_block_of_the_page_runs_with_the_libraries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    found = re.findall(r"^```(?:python|py)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) == 5
    reset_kernel_executions()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
        torch.manual_seed(0)
        for text in found:
            exec(compile(text, str(PAGE), "exec"), names)
    for db, steps in (("run.db", 60), ("lightning.db", 4 * 10), ("trainer.db", 3 * 12)):
        report = report_of(tmp_path / db, Bound(row_error=0.05))
        assert (report["run"]["status"], report["run"]["steps"]) == ("complete", steps)
        assert report["sites"]
    planned = [decision for decision in names["plan"].decisions if decision.recipe is not None]
    assert planned
    assert sum(loka.kernel_executions().values()) == 3 * 12 * len(planned)
