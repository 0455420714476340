"""A PostgreSQL server: connected to without waiting for ever, told away from broken, its address shown without secrets.

A server is restarted, failed over or cut off now and then. What it says meanwhile is no verdict on the database: trying
again later can help, and a run that is being recorded does.
"""

import re
from typing import Final

from sqlalchemy import URL, Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from loka.errors import DatabaseError

# Unless the URL says otherwise: how long connecting may take, and after how long without an answer a server counts as
# cut off (a packet that nobody answers would otherwise hold up a connection for a quarter of an hour).
_CONNECT_ARGUMENTS: Final[dict[str, int]] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # ms
}
# After how long the server ends a transaction whose client fell silent, and with it the locks that others wait for; how
# long a lock is waited for before the transaction is begun anew.
_SESSION: Final = "SET idle_in_transaction_session_timeout = '60s'; SET lock_timeout = '20s'"
# Conditions that pass, by the start of their SQLSTATE.
_PASSING: Final[tuple[str, ...]] = (
    "08",  # connection exceptions
    "57P",  # being shut down, crashed, starting up
    "53300",  # too many connections
    "25006",  # read-only: a standby that is about to be promoted
    *("40001", "40P01", "55P03"),  # serialization failure, deadlock, lock not available
)
_SECRET: Final = "hidden"  # in the place of a password; stars would be escaped in a query


def server_engine(url: URL) -> Engine:
    """Return an engine on a server; nothing is connected to yet. Raises DatabaseError without the driver."""
    arguments = {name: value for name, value in _CONNECT_ARGUMENTS.items() if name not in url.query}
    try:
        return create_engine(url, pool_pre_ping=True, connect_args=arguments)
    except ModuleNotFoundError as error:
        raise DatabaseError(
            f"{shown(url)} needs the package {error.name!r}. Install it with `pip install 'psycopg[binary]'`, or give "
            "a path, which is an SQLite file."
        ) from error
    except SQLAlchemyError as error:  # an unknown driver, e.g. postgresql+nonsense
        raise DatabaseError(f"{shown(url)} cannot be used: {error}. Write postgresql+psycopg://host/name.") from error


def prepare_writing(connection: Connection) -> None:
    """Let no transaction of this connection hold up others for ever, should its client be cut off."""
    connection.execute(text(_SESSION))
    connection.commit()


def is_passing(error: DBAPIError) -> bool:
    """Return whether a server said no for now: it is away, or another transaction was in the way."""
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # never connected, or cut off
        return isinstance(error, OperationalError | InterfaceError)
    return str(state).startswith(_PASSING)


def shown(url: URL) -> str:
    """Return a URL as it may be printed: without any password."""
    secret = {name: _SECRET for name in url.query if "password" in name.lower()}
    return url.update_query_dict(secret).render_as_string(hide_password=True)


def shown_text(spelled: str) -> str:
    """Return what was given as a URL, but is none, as it may be printed."""
    spelled = re.sub(r"(://[^:@/]*:).*@", r"\1***@", spelled)
    return re.sub(r"(?i)(password=)[^&]*", rf"\1{_SECRET}", spelled)
