"""What the tests share: private servers, the stand-in, tables to send from, and the program as a process."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import database, process
from lab.standin_handle import StandIn

COUNTER = itertools.count(1)
for number in (signal.SIGINT, signal.SIGHUP):  # which nohup, or a script's background, has us ignore and hand down
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # a handler, other than this, is not inherited
DEFAULTS = {"first_name": "Ann", "plan_type": "pro", "page": "pricing", "browser": "desktop", "location": "Berlin"}
DEFAULTS |= {"event_time": None}  # two days ago, by the server's own day: no test depends on the date or on midnight
INSERTS = {
    "customers": "(id, first_name, email, plan_type) VALUES (%(id)s, %(first_name)s, %(email)s, %(plan_type)s)",
    "page_views": "(id, user_id, page, browser, location, event_time) VALUES (%(id)s, %(id)s, %(page)s, %(browser)s,"
    " %(location)s, COALESCE(%(event_time)s, CURDATE() - INTERVAL 2 DAY))",
}


def pytest_sessionstart(session: pytest.Session) -> None:
    if status := session.config.pluginmanager.get_plugin("terminaldistreporter"):  # "bringing up nodes..."
        status.ensure_show_status = status.setstatus = lambda *_, **__: None


@pytest.fixture(scope="session")
def server() -> Iterator[database.DatabaseServer]:
    """One started server with the sample, where the kind makes no difference."""
    with database.DatabaseServer(next(iter(database.find_servers().values()))) as server:
        server.load(database.SETUP)
        yield server


@pytest.fixture(scope="session")
def servers(server: database.DatabaseServer) -> Iterator[dict[str, database.DatabaseServer]]:
    """A started server of each kind that the machine has, with the sample loaded."""
    with contextlib.ExitStack() as until_the_end:
        started = {server.kind: server}
        for kind, program in database.find_servers().items():
            if kind not in started:  # MySQL takes seconds, so only the tests wait that ask for it
                started[kind] = until_the_end.enter_context(database.DatabaseServer(program))
                started[kind].load(database.SETUP)
        yield started


@pytest.fixture(scope="session")
def _standin() -> Iterator[StandIn]:
    limits = {"limit_users": 100_000, "limit_events": 400_000, "limit_users_bulk": 1000, "limit_events_bulk": 1000}
    with StandIn(key=process.KEY, **limits) as standin:
        yield standin


@pytest.fixture
def standin(_standin: StandIn) -> StandIn:
    """A stand-in without users, events or faults, and with room for as many calls as come."""
    _standin.reset()
    return _standin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where results and log go."""
    return tmp_path


@pytest.fixture(scope="session")
def customers(server: database.DatabaseServer) -> Callable[..., dict[str, str]]:
    """`customers(3)` or `customers([{"email": None}, ...])`: settings for a database of its own that may only be read,
    with these pro customers, user<n>@example.com, each with a recent view of pricing. Both have the id n, from 1."""

    def make(rows: int | Sequence[Mapping[str, Any]]) -> dict[str, str]:
        name = f"customers_{next(COUNTER)}"
        server.query(f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci", database="")
        people = [{}] * rows if isinstance(rows, int) else rows
        values = [{**DEFAULTS, "id": n, "email": f"user{n}@example.com", **row} for n, row in enumerate(people, 1)]
        with server.connect(name) as connection, connection.cursor() as cursor:
            for table, insert in INSERTS.items():
                cursor.execute(f"CREATE TABLE {table} LIKE {database.DATABASE}.{table}")
                cursor.executemany(f"INSERT INTO {table} {insert}", values)
        return server.create_reader(user=f"reader_{name}", database=name)

    return make


@pytest.fixture
def settings(standin: StandIn, folder: Path) -> Callable[..., dict[str, str]]:
    """`settings(database, **more)`: all settings of a run against the stand-in."""
    return lambda database, **more: process.settings_for(database, more.pop("url", standin.url), folder, **more)


@pytest.fixture
def started(settings: Callable[..., dict[str, str]], folder: Path) -> Iterator[Callable[..., process.Running]]:
    """`started("--quiet", database=..., **settings)`: a run under way; `how` goes to process.Running."""
    with contextlib.ExitStack() as until_the_end:

        def start(*arguments: str, database: Mapping[str, str], how: Any = None, **more: str) -> process.Running:
            run = process.Running(*arguments, settings=settings(database, **more), folder=folder, **(how or {}))
            return until_the_end.enter_context(run)  # which kills it

        yield start


@pytest.fixture
def program(started: Callable[..., process.Running]) -> Callable[..., process.Ended]:
    """As `started`, but the run is whole."""
    return lambda *arguments, seconds=60, **settings: started(*arguments, **settings).wait(seconds)
