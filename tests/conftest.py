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
# Started with nohup or in the background of a script, the tests would hand down that they ignore these.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # a handler, other than this, is not inherited
DEFAULTS = {"first_name": "Ann", "plan_type": "pro", "page": "pricing", "browser": "desktop", "location": "Berlin"}


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
    """A stand-in for Iterable without users, events or faults, and with room for as many calls as come."""
    _standin.reset()
    return _standin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where results and log go."""
    return tmp_path


@pytest.fixture(scope="session")
def customers(server: database.DatabaseServer) -> Callable[..., dict[str, str]]:
    """`customers(3)` or `customers([{"email": None}, ...])`: a database of its own with these pro customers, each with
    a recent view of the pricing page, and the settings of an account that may only read it. Customer n is
    user<n>@example.com; ids count from 1, and the view's id is the customer's."""

    def make(rows: int | Sequence[Mapping[str, Any]]) -> dict[str, str]:
        name = f"customers_{next(COUNTER)}"
        server.query(f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci", database="")
        for table in ("customers", "page_views"):
            server.query(f"CREATE TABLE {name}.{table} LIKE {database.DATABASE}.{table}")
        people = [{}] * rows if isinstance(rows, int) else rows
        values = [{**DEFAULTS, "email": f"user{number}@example.com", **row} for number, row in enumerate(people, 1)]
        with server.connect(name) as connection, connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO customers (id, first_name, email, plan_type) VALUES (%s, %s, %s, %s)",
                [(number, row["first_name"], row["email"], row["plan_type"]) for number, row in enumerate(values, 1)],
            )
            # Relative to the server's own day, so that no test depends on today's date or on midnight.
            cursor.executemany(
                "INSERT INTO page_views (id, user_id, page, browser, location, event_time)"
                " VALUES (%s, %s, %s, %s, %s, COALESCE(%s, DATE_SUB(CURDATE(), INTERVAL 2 DAY)))",
                [
                    (number, number, row["page"], row["browser"], row["location"], row.get("event_time"))
                    for number, row in enumerate(values, 1)
                ],
            )
        return server.create_reader(user=f"reader_{name}", database=name)

    return make


@pytest.fixture
def settings(standin: StandIn, folder: Path) -> Callable[..., dict[str, str]]:
    """`settings(database, **more)`: all settings of a run against the stand-in."""

    def make(database: Mapping[str, str], **more: str) -> dict[str, str]:
        return process.settings_for(database, more.pop("url", standin.url), folder, **more)

    return make


@pytest.fixture
def program(settings: Callable[..., dict[str, str]], folder: Path) -> Callable[..., process.Ended]:
    """`program("--quiet", database=..., **settings)`: one whole run of main.py as a process."""

    def run(*arguments: str, database: Mapping[str, str], seconds: float = 60, **more: str) -> process.Ended:
        return process.run(*arguments, settings=settings(database, **more), folder=folder, seconds=seconds)

    return run


@pytest.fixture
def started(settings: Callable[..., dict[str, str]], folder: Path) -> Iterator[Callable[..., process.Running]]:
    """As `program`, but the run is under way, and is killed at the end of the test; `how` goes to process.Running."""
    runs: list[process.Running] = []

    def start(
        *arguments: str, database: Mapping[str, str], how: Mapping[str, Any] | None = None, **more: str
    ) -> process.Running:
        runs.append(process.Running(*arguments, settings=settings(database, **more), folder=folder, **(how or {})))
        return runs[-1]

    yield start
    for run in runs:
        run.__exit__()
