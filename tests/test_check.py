"""main.py --check: a line for each item of the deployment checklist, and nothing sent but an empty body."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lab import process
from lab.database import DatabaseServer, find_servers
from lab.process import Customers, Ended, Program, Settings, Started
from lab.standin_handle import USERS_UPDATE, StandIn

KINDS = sorted(find_servers()) or ["mariadb or mysql"]
ITEMS = {
    "settings": "Settings are complete",
    "log": "Log file can be written",
    "results": "Results folder can be written",
    "database": "Database can be reached and is new enough",
    "tables": "Tables and columns of the query are there",
    "times": "The latest page view is not in the future",
    "iterable": r"Iterable can be reached at http://127\.0\.0\.1:\d+",
    "key": "API key is accepted",
}
NOT_ITERABLE = "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
KEY_REFUSED = (
    "Iterable refused the API key: check ITERABLE_API_KEY (a server-side key of this project, not disabled), and that "
    "ITERABLE_API_BASE_URL is that of its region: https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
LOGIN = "The database refused the login: check DB_USER and DB_PASSWORD (1045"


@pytest.fixture(scope="module")
def two(customers: Customers) -> dict[str, str]:
    """A database with two users."""
    return customers(2)


def failing(ended: Ended) -> dict[str, str]:
    """The items that fail, with their reasons. All others are there, in order, and well; nothing else is printed."""
    reasons = {}
    for (key, item), line in zip(ITEMS.items(), ended.console.splitlines(), strict=True):
        parts = re.fullmatch(rf"([✓✗]) {item}(?:: (.*))?", line)
        assert parts, line
        if parts[1] == "✗":
            reasons[key] = parts[2]
    return reasons


@pytest.fixture(autouse=True)
def _nothing_is_sent(standin: StandIn) -> Any:
    """Whatever is checked, nothing arrives but empty users/update bodies, and nothing is stored."""
    yield
    state = standin.state()
    calls = {(call["endpoint"], call["email"], call["event_id"]) for call in state["journal"]}
    assert calls - {(USERS_UPDATE, "user1@example.com", None)} <= {(USERS_UPDATE, None, None)}  # hers is of a run
    assert (state["users"], state["events"], state["violations"]) == ({}, {}, [])


@pytest.mark.parametrize("kind", KINDS)
def test_each_item_has_its_line_when_all_is_well(
    servers: dict[str, DatabaseServer], program: Program, standin: StandIn, kind: str
) -> None:
    server = servers[kind]
    ended = program("--check", database=server.create_reader())
    assert (ended.exit_code, ended.errors) == (0, "")
    assert ended.console == (
        f"""\
✓ Settings are complete
✓ Log file can be written
✓ Results folder can be written
✓ Database can be reached and is new enough: {"MariaDB" if kind == "mariadb" else "MySQL"} {server.version}
✓ Tables and columns of the query are there
✓ The latest page view is not in the future
✓ Iterable can be reached at {standin.url}
✓ API key is accepted
"""
    )
    assert standin.counters()["answers"] == {USERS_UPDATE: {400: 1}}
    assert sorted(path.name for path in ended.folder.iterdir()) == ["empty.env", "run.log"]


def test_a_quiet_check_prints_what_fails_and_else_nothing(program: Program, two: dict[str, str]) -> None:
    well = program("--check", "--quiet", database=two)
    assert (well.exit_code, well.console, well.errors) == (0, "", "")
    refused = program("--check", "--quiet", database=two, ITERABLE_API_KEY="0" * 32)
    assert (refused.exit_code, refused.console) == (4, f"✗ API key is accepted: {KEY_REFUSED}\n")


def test_settings_that_are_missing_are_all_named(program: Program, standin: StandIn) -> None:
    ended = program("--check", database={"DB_PORT": "many"}, ITERABLE_API_KEY="")
    missing = "; ".join(f"DB_{name} is missing" for name in ("HOST", "USER", "PASSWORD", "NAME"))
    complaints = f"{missing}; DB_PORT must be a whole number from 1 to 65535; ITERABLE_API_KEY is empty"
    assert (ended.exit_code, len(ended.console.splitlines())) == (2, 1)
    assert ended.console.startswith(f"✗ Settings: {complaints}. Set them in ")
    assert standin.counters()["connections"] == 0


def test_a_place_that_cannot_be_written_fails_alone_and_one_that_is_missing_is_made(
    program: Program, two: dict[str, str], folder: Path
) -> None:
    log = program("--check", database=two, LOG_FILE=str(folder))
    assert failing(log) == {"log": f"LOG_FILE cannot be written: [Errno 21] Is a directory: '{folder}'"}
    results = program("--check", database=two, RESULTS_DIR=str(folder / "empty.env" / "results"))
    assert failing(results) == {"results": f"[Errno 20] Not a directory: '{folder}/empty.env/results'"}
    made = program("--check", database=two, RESULTS_DIR=str(folder / "new" / "results"))
    assert failing(made) == {}
    assert (log.exit_code, results.exit_code, made.exit_code) == (2, 2, 0)
    assert list((folder / "new" / "results").iterdir()) == []


def test_what_the_database_refuses_fails_what_needs_it_and_the_rest_is_checked(
    program: Program, two: dict[str, str], standin: StandIn
) -> None:
    ended = program("--check", database={**two, "DB_PASSWORD": "not the password"})
    reasons = failing(ended)
    assert (list(reasons), ended.exit_code) == (["database", "tables", "times"], 3)
    assert [reason.startswith(LOGIN) for reason in reasons.values()] == [True] * 3
    assert "not the password" not in ended.everything
    assert standin.counters()["answers"] == {USERS_UPDATE: {400: 1}}


@pytest.mark.parametrize(
    ("change", "failed", "words"),
    [
        (
            "DROP TABLE page_views",
            ["tables", "times"],
            "A table is missing: check DB_NAME, or load database_setup.sql (1146",
        ),
        (
            "ALTER TABLE customers DROP COLUMN first_name",
            ["tables"],
            "A column is missing: compare the tables with database_setup.sql (1054",
        ),
    ],
    ids=["table", "column"],
)
def test_a_table_or_column_that_is_missing_is_told(
    server: DatabaseServer, customers: Customers, program: Program, change: str, failed: list[str], words: str
) -> None:
    database = customers(1)
    server.query(change, database["DB_NAME"])
    ended = program("--check", database=database)
    assert (list(failing(ended)), ended.exit_code) == (failed, 3)
    assert failing(ended)["tables"].startswith(words)


@pytest.mark.parametrize(
    ("page", "seconds_ahead", "tells"), [("pricing", 3600, True), ("home", 3600, False), ("pricing", 30, False)]
)
def test_a_latest_view_in_the_future_means_that_times_are_not_utc(
    server: DatabaseServer, customers: Customers, program: Program, page: str, seconds_ahead: int, tells: bool
) -> None:
    [(ahead,)] = server.query(f"SELECT CAST(UTC_TIMESTAMP() + INTERVAL {seconds_ahead} SECOND AS CHAR)", "")
    database = customers([{"page": page, "event_time": ahead}, {}])
    ended = program("--check", database=database)
    words = {"times": f"{ahead} is in the future: event_time must be UTC, and not local time"}
    assert (failing(ended), ended.exit_code) == ((words, 3) if tells else ({}, 0))


def test_a_server_that_is_too_old_fails_the_database(program: Program) -> None:
    if "mariadb" not in find_servers():
        pytest.skip("only a MariaDB can be told to give itself out for another version")
    with DatabaseServer(find_servers()["mariadb"], "--version=5.7.40-log") as server:
        server.query("CREATE DATABASE old", "")
        ended = program("--check", database=server.create_reader(database="old"))
    words = "MySQL 5.7.40-log is too old: the query needs MySQL 8.0 or MariaDB 10.2, or later"
    assert (failing(ended), ended.exit_code) == (dict.fromkeys(("database", "tables", "times"), words), 3)


UNREACHABLE: dict[str, tuple[Mapping[str, Any], str]] = {
    "HTML of another server": ({"status": 200, "body": "<html></html>"}, NOT_ITERABLE),
    "404 of another server": ({"status": 404, "body": "<html></html>"}, NOT_ITERABLE),
    "redirect": (
        {"status": 307, "headers": {"Location": "/elsewhere"}},
        f"a redirect, which is never followed: {NOT_ITERABLE}",
    ),
    "503": ({"status": 503}, "Iterable is in trouble: run again later, and see https://status.iterable.com"),
    "reset": (
        {"action": "reset_before"},
        "the connection broke before the answer was whole: check ITERABLE_API_BASE_URL and the network",
    ),
}


@pytest.mark.parametrize(("fault", "words"), UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_host_that_is_not_iterable_or_does_not_work_fails_with_its_reason(
    program: Program, two: dict[str, str], standin: StandIn, fault: Mapping[str, Any], words: str
) -> None:
    standin.fault(**fault)
    ended = program("--check", database=two, ITERABLE_MAX_ATTEMPTS="1")
    assert (failing(ended), ended.exit_code) == ({"iterable": words, "key": words}, 4)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "BadApiKey", KEY_REFUSED),
        (403, "Forbidden", KEY_REFUSED),
        (200, "Success", "Iterable answered a request without a user as if it had one"),
    ],
)
def test_a_key_that_is_not_known_to_be_accepted_fails_alone_for_the_host_is_iterables(
    program: Program, two: dict[str, str], standin: StandIn, status: int, code: str, words: str
) -> None:
    standin.fault(status=status, body=f'{{"msg": "", "code": "{code}", "params": null}}')
    ended = program("--check", database=two)
    assert (failing(ended), ended.exit_code) == ({"key": words}, 4)


def test_the_exit_code_is_that_of_the_first_thing_that_fails(
    program: Program, two: dict[str, str], folder: Path
) -> None:
    wrong = {"database": {**two, "DB_PASSWORD": "not the password"}, "ITERABLE_API_KEY": "0" * 32}
    all_wrong = program("--check", **wrong, LOG_FILE=str(folder))
    assert (list(failing(all_wrong)), all_wrong.exit_code) == (["log", "database", "tables", "times", "key"], 2)
    assert program("--check", **wrong).exit_code == 3


def test_a_check_may_run_beside_a_run(
    program: Program, started: Started, two: dict[str, str], standin: StandIn
) -> None:
    standin.fault("silence", email="user1@example.com")
    started("--limit", "1", database=two)
    standin.wait_for_calls(1)
    ended = program("--check", database=two)
    assert (ended.exit_code, failing(ended)) == (0, {})


@pytest.mark.parametrize(
    "option", [["--dry-run"], ["--limit", "1"], ["--at-least", "1"], ["--changed-only"], ["--bulk"]]
)
def test_a_check_with_an_option_that_is_about_sending_is_a_usage_error(
    settings: Settings, folder: Path, option: list[str]
) -> None:
    ended = process.run("--check", *option, settings=settings({}), folder=folder)
    assert (ended.exit_code, ended.console) == (2, "")
    assert ended.errors.endswith("main.py: error: --check goes with --quiet and --env-file only\n")
