"""main.py --check: a line for each item of the deployment checklist, and nothing sent but an empty body."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import harness
from database import DATABASE, DatabaseServer, find_servers
from standin_handle import USERS_UPDATE, StandIn

Program = Callable[..., harness.Ended]
Customers = Callable[..., dict[str, str]]

KINDS = sorted(find_servers()) or ["mariadb or mysql"]
ITEMS = {
    "settings": "Settings are complete",
    "log": "Log file can be written",
    "results": "Results folder can be written",
    "database": "Database can be reached and is new enough",
    "tables": "Tables and columns of the query are there",
    "iterable": r"Iterable can be reached at http://127\.0\.0\.1:\d+",
    "key": "API key is accepted",
}
NOT_ITERABLE = "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
TROUBLE = "Iterable is in trouble: run again later, and see https://status.iterable.com"
KEY_REFUSED = (
    "Iterable refused the API key: check ITERABLE_API_KEY (a server-side key of this project, not disabled), and that "
    "ITERABLE_API_BASE_URL is that of its region: https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
LOGIN = "The database refused the login: check DB_USER and DB_PASSWORD (1045"


@pytest.fixture(scope="module")
def two(customers: Customers) -> dict[str, str]:
    """A database with two users."""
    return customers(2)


def failing(ended: harness.Ended) -> dict[str, str]:
    """The items that fail, with their reasons. All others are there, in order, and well; nothing else is printed."""
    reasons = {}
    for (key, item), line in zip(ITEMS.items(), ended.console.splitlines(), strict=True):
        parts = re.fullmatch(rf"([✓✗]) {item}(?:: (.*))?", line)
        assert parts, line
        if parts[1] == "✗":
            reasons[key] = parts[2]
    return reasons


def assert_safe(standin: StandIn) -> None:
    """Nothing arrived but empty users/update bodies, and nothing is stored."""
    state = standin.state()
    assert {(call["endpoint"], call["email"], call["event_id"]) for call in state["journal"]} <= {
        (USERS_UPDATE, None, None)
    }
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
✓ Iterable can be reached at {standin.url}
✓ API key is accepted
"""
    )
    assert standin.counters()["answers"] == {USERS_UPDATE: {400: 1}}
    assert_safe(standin)
    assert sorted(path.name for path in ended.folder.iterdir()) == ["empty.env", "run.log"]


def test_a_quiet_check_prints_nothing_when_all_is_well(program: Program, two: dict[str, str]) -> None:
    ended = program("--check", "--quiet", database=two)
    assert (ended.exit_code, ended.console, ended.errors) == (0, "", "")


def test_a_quiet_check_prints_only_what_fails(program: Program, two: dict[str, str]) -> None:
    ended = program("--check", "--quiet", database=two, ITERABLE_API_KEY="0" * 32)
    assert (ended.exit_code, ended.console) == (4, f"✗ API key is accepted: {KEY_REFUSED}\n")


def test_a_host_that_takes_an_empty_request_is_told_as_such(
    program: Program, two: dict[str, str], standin: StandIn
) -> None:
    standin.fault(status=200, body='{"msg": "", "code": "Success", "params": null}')
    ended = program("--check", "--quiet", database=two)
    told = "✗ API key is accepted: Iterable answered a request without a user as if it had one\n"
    assert (ended.exit_code, ended.console) == (4, told)


def test_settings_that_are_missing_are_all_named(program: Program, standin: StandIn) -> None:
    ended = program("--check", database={"DB_PORT": "many"}, ITERABLE_API_KEY="")
    complaints = (
        "DB_HOST is missing; DB_USER is missing; DB_PASSWORD is missing; DB_NAME is missing; "
        "DB_PORT must be a whole number, not 'many'; ITERABLE_API_KEY is empty"
    )
    assert ended.exit_code == 2
    assert ended.console.startswith(f"✗ Settings: {complaints}. Set them in ")
    assert len(ended.console.splitlines()) == 1
    assert standin.counters()["connections"] == 0


def test_a_log_file_that_cannot_be_written_fails_alone(program: Program, two: dict[str, str], folder: Path) -> None:
    ended = program("--check", database=two, LOG_FILE=str(folder))
    assert failing(ended) == {"log": f"[Errno 21] Is a directory: '{folder}'"}
    assert ended.exit_code == 2


def test_a_results_folder_that_cannot_be_written_fails_alone(
    program: Program, two: dict[str, str], folder: Path
) -> None:
    (folder / "file").touch()
    ended = program("--check", database=two, RESULTS_DIR=str(folder / "file" / "results"))
    assert failing(ended) == {"results": f"[Errno 20] Not a directory: '{folder}/file/results'"}
    assert ended.exit_code == 2


def test_a_results_folder_that_is_missing_is_made(program: Program, two: dict[str, str], folder: Path) -> None:
    ended = program("--check", database=two, RESULTS_DIR=str(folder / "new" / "results"))
    assert (ended.exit_code, failing(ended)) == (0, {})
    assert list((folder / "new" / "results").iterdir()) == []


def test_a_refused_login_fails_what_needs_the_database(program: Program, two: dict[str, str]) -> None:
    ended = program("--check", database={**two, "DB_PASSWORD": "not the password"})
    reasons = failing(ended)
    assert list(reasons) == ["database", "tables"]
    assert [reason.startswith(LOGIN) for reason in reasons.values()] == [True, True]
    assert ended.exit_code == 3
    assert "not the password" not in ended.everything


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DROP TABLE page_views", "A table is missing: check DB_NAME, or load database_setup.sql (1146"),
        (
            "ALTER TABLE customers DROP COLUMN first_name",
            "A column is missing: compare the tables with database_setup.sql (1054",
        ),
    ],
    ids=["table", "column"],
)
def test_a_table_or_column_that_is_missing_is_found_without_reading_a_row(
    servers: dict[str, DatabaseServer], program: Program, kind: str, change: str, words: str
) -> None:
    server = servers[kind]
    server.query("DROP DATABASE IF EXISTS checked", "")
    server.query("CREATE DATABASE checked", "")
    for table in ("customers", "page_views"):
        server.query(f"CREATE TABLE checked.{table} LIKE {DATABASE}.{table}", "")
    server.query(change, "checked")
    ended = program("--check", database=server.create_reader(database="checked"))
    reasons = failing(ended)
    assert (list(reasons), ended.exit_code) == (["tables"], 3)
    assert reasons["tables"].startswith(words)


def test_a_server_that_is_too_old_fails_the_database(program: Program) -> None:
    if "mariadb" not in find_servers():
        pytest.skip("only a MariaDB can be told to give itself out for another version")
    with DatabaseServer(find_servers()["mariadb"], "--version=5.7.40-log") as server:
        server.query(f"CREATE DATABASE {DATABASE}", "")
        ended = program("--check", database=server.create_reader())
    old = "MySQL 5.7.40-log is too old: the query needs MySQL 8.0 or MariaDB 10.2, or later"
    assert failing(ended) == {"database": old, "tables": old}
    assert ended.exit_code == 3


def test_a_database_that_is_down_fails_after_the_tries_and_the_rest_is_checked(
    program: Program, two: dict[str, str], folder: Path, standin: StandIn
) -> None:
    ended = program("--check", database={**two, "DB_HOST": str(folder / "no.sock")})
    lines = [line for line in ended.console.splitlines() if line.startswith(("✓", "✗"))]
    reasons = failing(harness.Ended(ended.exit_code, "\n".join(lines), "", folder))
    down = "No database answers on this socket: check DB_HOST, and that the server runs (2002"
    assert (list(reasons), ended.exit_code) == (["database", "tables"], 3)
    assert [reason.startswith(down) for reason in reasons.values()] == [True, True]
    assert standin.counters()["answers"] == {USERS_UPDATE: {400: 1}}


UNREACHABLE: dict[str, tuple[Mapping[str, Any], str]] = {
    "HTML of another server": ({"status": 200, "body": "<html></html>"}, NOT_ITERABLE),
    "404 of another server": ({"status": 404, "body": "<html></html>"}, NOT_ITERABLE),
    "redirect": (
        {"status": 307, "headers": {"Location": "/elsewhere"}},
        f"a redirect, which is never followed: {NOT_ITERABLE}",
    ),
    "503": ({"status": 503}, TROUBLE),
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
    assert_safe(standin)


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_fails_alone_for_the_host_is_iterables(
    program: Program, two: dict[str, str], standin: StandIn, status: int
) -> None:
    standin.fault(status=status, body='{"msg":"Invalid API key","code":"BadApiKey","params":null}')
    ended = program("--check", database=two)
    assert (failing(ended), ended.exit_code) == ({"key": KEY_REFUSED}, 4)
    assert_safe(standin)


def test_the_exit_code_is_that_of_the_first_thing_that_fails(
    program: Program, two: dict[str, str], standin: StandIn, folder: Path
) -> None:
    everything = {"LOG_FILE": str(folder), "ITERABLE_API_KEY": "0" * 32}
    wrong_login = {**two, "DB_PASSWORD": "not the password"}
    all_wrong = program("--check", database=wrong_login, **everything)
    assert (list(failing(all_wrong)), all_wrong.exit_code) == (["log", "database", "tables", "key"], 2)
    both_wrong = program("--check", database=wrong_login, ITERABLE_API_KEY="0" * 32)
    assert (list(failing(both_wrong)), both_wrong.exit_code) == (["database", "tables", "key"], 3)
    assert_safe(standin)


def test_a_check_may_run_beside_a_run(
    program: Program, started: Callable[..., harness.Running], two: dict[str, str], standin: StandIn
) -> None:
    standin.fault("silence", email="user1@example.com")
    started(database=two)
    standin.wait_for_calls(1)
    ended = program("--check", database=two)
    assert (ended.exit_code, failing(ended)) == (0, {})


@pytest.mark.parametrize("option", [["--dry-run"], ["--limit", "1"], ["--changed-only"]])
def test_a_check_with_an_option_that_is_about_sending_is_a_usage_error(
    settings: Callable[..., dict[str, str]], folder: Path, standin: StandIn, option: list[str]
) -> None:
    ended = harness.run("--check", *option, settings=settings({}), folder=folder)
    assert (ended.exit_code, ended.console) == (2, "")
    assert ended.errors.endswith("main.py: error: --check goes with --quiet and --env-file only\n")
    assert standin.counters()["connections"] == 0
