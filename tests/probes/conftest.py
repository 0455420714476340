"""Databases for tests that hold for each kind: `new_db` is an SQLite file in one run of the test, a server in another.

A server is started from what is installed, once per process. LOKA_TEST_POSTGRESQL names one to use instead, by the URL
of a database where schemas may be made.
"""

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from loka.probes.storing.database import resolve_url
from tests.probes.made_server import Server, find_binaries
from tests.requirements_of_ci import missing


@pytest.fixture(scope="session")
def own_server() -> Iterator[Server]:
    """A server that a test may stop and kill; the test leaves it running."""
    binaries = find_binaries()
    if binaries is None:
        missing("postgresql", "no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    server = Server(binaries)
    yield server
    server.remove()


@pytest.fixture
def server_db(request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """Return URLs, each of an empty place of its own on a server."""
    address = os.environ.get("LOKA_TEST_POSTGRESQL", "")
    url = resolve_url(address or request.getfixturevalue("own_server").url)
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    made: list[str] = []

    def new() -> str:
        name = f"loka_{uuid.uuid4().hex[:12]}"
        with engine.connect() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        made.append(name)
        return url.set(query={"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)

    yield new
    with engine.connect() as connection:
        for name in made:  # one by one: the server locks every table of what one statement drops
            connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
    engine.dispose()


@pytest.fixture(params=["file", "server"])
def new_db(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Return addresses of databases that do not exist yet, of one kind."""
    if request.param == "server":
        return request.getfixturevalue("server_db")
    numbers = itertools.count()
    return lambda: str(tmp_path / f"run{next(numbers)}.db")


@pytest.fixture
def db(new_db: Callable[[], str]) -> str:
    """Return the address of one such database."""
    return new_db()
