"""Runs to be advised on, trained once for all tests of a process."""

import pytest
from torch import nn

from tests.reports.made_advice import Healthy, Ill, Outliers, normal, trained, with_loud_row


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("healthy") / "run.db", Healthy(), normal, lr=1e-2)


@pytest.fixture(scope="session")
def ill(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("ill") / "run.db", Ill()
    return trained(path, model, lambda generator: normal(generator, width=13), lr=1e-4)


@pytest.fixture(scope="session")
def outliers(tmp_path_factory):
    model = Outliers()
    return trained(tmp_path_factory.mktemp("outliers") / "run.db", model, normal, lr=1e-15), model


@pytest.fixture(scope="session")
def loud(tmp_path_factory):
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32, bias=False))
    return trained(tmp_path_factory.mktemp("loud") / "run.db", model, with_loud_row, lr=1e-15), model
