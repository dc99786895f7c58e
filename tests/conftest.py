"""What the tests share: servers, the stand-in, customers, the program as a process."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import database, process
from lab.process import CreateCustomers, RunMain, RunSettings, StartMain
from lab.segment import CreateSegment
from lab.standin_handle import StandIn

NAME_NUMBERS = itertools.count(1)
CUSTOMER = {"first_name": "Ann", "plan_type": "pro"}
PAGE_VIEW = {
    "page": "pricing",
    "browser": "desktop",
    "location": "Berlin",
    "event_time": None,  # two days ago
}
INSERT_CUSTOMER = """
INSERT INTO customers (id, first_name, email, plan_type)
VALUES (%(id)s, %(first_name)s, %(email)s, %(plan_type)s)
"""
# The server's own day, so that no test depends on the date or on midnight.
INSERT_PAGE_VIEW = """
INSERT INTO page_views (id, user_id, page, browser, location, event_time)
VALUES (%(id)s, %(user_id)s, %(page)s, %(browser)s, %(location)s,
    COALESCE(%(event_time)s, CURDATE() - INTERVAL 2 DAY))
"""


def handle_ignored_signals() -> None:
    """Undo what nohup, or a script's background, does to signals.

    An ignored signal stays ignored in every process that is started. A handler is
    not inherited.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


handle_ignored_signals()


@pytest.fixture(scope="session")
def server() -> Iterator[database.DatabaseServer]:
    """A started server with the sample, where the kind makes no difference."""
    program = next(iter(database.find_servers().values()))
    with database.DatabaseServer(program) as server:
        server.load(database.SETUP)
        yield server


@pytest.fixture(scope="session")
def servers(
    server: database.DatabaseServer,
) -> Iterator[dict[str, database.DatabaseServer]]:
    """A started server of each kind that the machine has, with the sample, by kind.

    MySQL takes seconds to start, so it starts only for the tests that ask for it.
    """
    with contextlib.ExitStack() as stack:
        started = {server.kind: server}
        for kind, program in database.find_servers().items():
            if kind not in started:
                started[kind] = stack.enter_context(database.DatabaseServer(program))
                started[kind].load(database.SETUP)
        yield started


@pytest.fixture(scope="session")
def session_standin() -> Iterator[StandIn]:
    """The process behind `standin`, which lives as long as the session."""
    with StandIn(
        key=process.KEY,
        limit_users=100_000,
        limit_events=400_000,
        limit_users_bulk=1000,
        limit_events_bulk=1000,
    ) as standin:
        yield standin


@pytest.fixture
def standin(session_standin: StandIn) -> StandIn:
    """A stand-in without users, events or faults, and without narrow limits."""
    session_standin.reset()
    return session_standin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where results and log go."""
    return tmp_path


@pytest.fixture(scope="session")
def create_customers(server: database.DatabaseServer) -> CreateCustomers:
    """`create_customers(rows)` creates a database of its own with these customers.

    It returns the settings of an account that may read it. `rows` is how many
    customers to create, or a mapping for each. A customer is Ann, pro, with the
    address user<n>@example.com and a page view of pricing two days ago; customer and
    view have the id n, from 1. A mapping may have other values:

        id, first_name, email, plan_type             of the customer
        view_id, page, browser, location, event_time of the page view
        page_views                                   a list of mappings in place of
                                                     the one view, with `id` and the
                                                     other columns, or an empty list
    """

    def create(rows: int | Sequence[Mapping[str, Any]]) -> dict[str, str]:
        if isinstance(rows, int):
            rows = [{}] * rows
        name = f"customers_{next(NAME_NUMBERS)}"
        server.query(
            f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci",
            database="",
        )
        customers = []
        page_views = []
        for number, row in enumerate(rows, 1):
            customers.append(complete_customer(number, row))
            page_views.extend(list_page_views(number, row))
        with server.connect(name) as connection, connection.cursor() as cursor:
            for table in ("customers", "page_views"):
                cursor.execute(f"CREATE TABLE {table} LIKE {database.DATABASE}.{table}")
            cursor.executemany(INSERT_CUSTOMER, customers)
            cursor.executemany(INSERT_PAGE_VIEW, page_views)
        return server.create_reader(user=f"reader_{name}", database=name)

    return create


def complete_customer(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a row for `customers`."""
    email = f"user{number}@example.com"
    defaults = {**CUSTOMER, "id": number, "email": email}
    return {column: row.get(column, default) for column, default in defaults.items()}


def list_page_views(number: int, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The values of a row for `page_views`: one view, unless the row lists its own."""
    user_id = row.get("id", number)
    if "page_views" in row:
        return [{**PAGE_VIEW, "user_id": user_id, **view} for view in row["page_views"]]
    columns = {key: row.get(key, default) for key, default in PAGE_VIEW.items()}
    return [{"id": row.get("view_id", user_id), "user_id": user_id, **columns}]


@pytest.fixture
def run_settings(standin: StandIn, folder: Path) -> RunSettings:
    """`run_settings(database, **more)`: all settings of a run.

    `url` is that of the stand-in unless another is given.
    """

    def settings(
        database: Mapping[str, str], *, url: str | None = None, **settings: str
    ) -> dict[str, str]:
        return process.settings_for(database, url or standin.url, folder, **settings)

    return settings


@pytest.fixture
def start_main(run_settings: RunSettings, folder: Path) -> Iterator[StartMain]:
    """`start_main("--quiet", database=..., MAX_WORKERS="1")`: a run under way.

    `wrapper` and `program` go to process.Running. The end of the test kills the run.
    """
    with contextlib.ExitStack() as stack:

        def start(
            *arguments: str,
            database: Mapping[str, str],
            url: str | None = None,
            wrapper: Sequence[str] = (),
            program: Sequence[str] = process.MAIN,
            **settings: str,
        ) -> process.Running:
            running = process.Running(
                *arguments,
                settings=run_settings(database, url=url, **settings),
                folder=folder,
                wrapper=wrapper,
                program=program,
            )
            return stack.enter_context(running)

        yield start


@pytest.fixture
def run_main(start_main: StartMain) -> RunMain:
    """`run_main(...)`: as start_main, but waits for the end, and gives it."""

    def run(
        *arguments: str,
        database: Mapping[str, str],
        seconds: float = 60,
        url: str | None = None,
        wrapper: Sequence[str] = (),
        program: Sequence[str] = process.MAIN,
        **settings: str,
    ) -> process.Ended:
        running = start_main(
            *arguments,
            database=database,
            url=url,
            wrapper=wrapper,
            program=program,
            **settings,
        )
        return running.wait(seconds)

    return run


@pytest.fixture
def create_segment(
    create_customers: CreateCustomers,
    server: database.DatabaseServer,
    standin: StandIn,
    start_main: StartMain,
) -> CreateSegment:
    """`create_segment(way, rows)`: customers who come and leave, and their runs."""
    return CreateSegment(
        create_customers=create_customers,
        server=server,
        standin=standin,
        start_main=start_main,
    )
