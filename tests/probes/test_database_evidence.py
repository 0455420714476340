"""What is concluded does not depend on where a run is kept; and nothing is concluded from what LoKA never writes."""

import random
import re
import sqlite3
from contextlib import closing

import pytest

from loka.errors import DatabaseError
from loka.probes.judging.evidence import load_evidence
from loka.probes.judging.trajectories import read_trajectories
from loka.probes.records import DynamicsRecord, LearnedRecord, LossImpact, StepRecord
from loka.probes.storing.database import list_runs, open_database, read_learned, read_steps
from loka.probes.storing.writer import RunWriter
from tests.probes.made_records import (
    INF,
    NAN,
    made_error,
    made_info,
    made_operand,
    made_product,
    made_progress,
    write_run,
)

RECIPES = ("tensorwise", "rowwise", "somebody's own")


def rich_steps(count=24, ranks=2):
    """Steps of several ranks with all that a step can hold; their values sum up to something else in another order."""
    rng = random.Random(0)
    draw = rng.random
    for index in range(count):
        for rank in range(ranks):
            products = [
                made_product(
                    site=f"layers.{rng.randrange(4)}",
                    product=rng.choice(("fprop", "dgrad", "wgrad")),
                    m=rng.choice((1, 64, 100)),
                    calls=rng.choice((1, 2, 3)),
                    value={name: made_error(rng.choice((draw() / 9, draw(), INF, NAN))) for name in RECIPES},
                    impacts={name: LossImpact(kl=draw() * 1e-5, first_order=draw(), spread=draw()) for name in RECIPES},
                    operands=tuple(
                        made_operand(role, rms=draw(), underflow={name: draw() for name in RECIPES})
                        for role in ("input", "weight")
                    ),
                )
                for _ in range(6)
            ]
            numbers = ("norm", "amax", "cancellation", "crest", "stretched", "output_crest", "underflow")
            parts = [
                DynamicsRecord(
                    name=f"norm{number}",
                    kind="norm",
                    module="LayerNorm",
                    parameters=("weight",),
                    feeds=("layers.1",),
                    **{name: draw() for name in (*numbers, "hard_underflow")},
                )
                for number in range(2)
            ]
            yield StepRecord(
                step=100 * index,
                rank=rank,
                products=tuple(products),
                loss=draw(),
                labels="sampled",
                dynamics=tuple(parts),
            )


def concluded(db):
    engine = open_database(db, create=False)
    try:
        return repr(load_evidence(db)), repr(read_trajectories(engine)), repr(list(read_steps(engine)))
    finally:
        engine.dispose()


def test_a_server_and_a_file_lead_to_the_same_conclusions_to_the_last_bit(server_db, tmp_path):
    info = made_info()
    for db in (address := server_db(), tmp_path / "run.db"):
        write_run(db, rich_steps(), info, made_progress(24, status="complete"))
    assert concluded(address) == concluded(tmp_path / "run.db")


# (what is done to a run, what is said of it)
DAMAGE = {
    "UPDATE products SET site = x'00ff'": "`site` in its table `products` is b'\\\\x00\\\\xff', not a text",
    "UPDATE products SET product = 'sideways'": "`product` in its table `products` is 'sideways', not one of fprop",
    "DELETE FROM products": "a row points at number 1 of its table `products`, which is not there",
    "DELETE FROM recipes WHERE number = 2": "number 2 of its table `recipes`",
    "UPDATE samples SET m = 'wide'": "'wide'",
    "UPDATE samples SET n = -1": "whole number",
    "UPDATE samples SET k = 1.5": "whole number",
    "UPDATE errors SET row_error = 'much'": "'much'",
    "UPDATE errors SET position = 77 WHERE position = 0": "a sample that is not there",
    "UPDATE operands SET role = 'actor'": "is 'actor', not one of input|holds nan where it has whole",
    "UPDATE operand_recipes SET underflow = 'some'": "'some'",
    "UPDATE steps SET step = -100": "whole number",
    "UPDATE runs SET fingerprint = '[1]'": "`fingerprint` in its table `runs` is '\\[1\\]', not shapes by name",
    "UPDATE runs SET fingerprint = '{\"a\": [1, -2]}'": "not shapes by name",
    "UPDATE runs SET recipes = '{'": "not JSON",
    "UPDATE runs SET recipes = '[1]'": "not a list of texts",
    "UPDATE runs SET status = 'well'": "`status` in its table `runs` is 'well', not one of running, complete",
    "UPDATE runs SET weights_changed = 'perhaps'": "not true or false",
    "UPDATE events SET message = x'00'": "`message` in its table `events` is b'\\\\x00', not a text",
    "UPDATE distributions SET data = 1000000000000000": "is 1000000000000000, not bytes",
    "UPDATE parts SET feeds = '7'": "`feeds` in its table `parts` is '7', not a list of texts",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_loka_never_writes_is_refused_and_its_place_is_named(tmp_path, damage):
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info())
    for step in rich_steps(count=2, ranks=1):
        writer.write(step, made_progress(1))
    writer.learned(
        [LearnedRecord(site="up", product="fprop", kind="unheard of", samples=1, step=0, data=b"x")], final=True
    )
    writer.finish(made_progress(2))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("INSERT INTO events (run, step, kind, message) VALUES (1, 0, 'a', 'b')")
        connection.execute(damage)
    refusals = []
    for read in (list_runs, lambda engine: list(read_steps(engine)), read_learned, read_trajectories, None):
        engine = open_database(path, create=False)
        try:
            load_evidence(path) if read is None else read(engine)
        except DatabaseError as error:
            refusals.append(str(error))
        engine.dispose()
    assert refusals
    for refusal in refusals:
        assert str(path) in refusal
        assert "it is damaged, or was changed by something else. Restore a copy" in refusal
        assert re.search(DAMAGE[damage], refusal)
