"""main.py --check: a line for each item of the deployment checklist, and nothing sent but an empty body."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lab import process
from lab.answers import BROKEN, IN_TROUBLE, KEY_REFUSED, NOT_ITERABLE, REDIRECT, SUCCESS
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
    ended = program("--check", database=servers[kind].create_reader())
    assert (ended.exit_code, ended.errors, failing(ended)) == (0, "", {})
    assert f" at {standin.url}\n" in ended.console
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
    said = f"✗ Settings: {missing}; DB_PORT must be a whole number from 1 to 65535; ITERABLE_API_KEY is empty. Set "
    assert (ended.exit_code, ended.console.startswith(said), ended.console.count("\n")) == (2, True, 1)
    assert standin.counters()["connections"] == 0


def test_a_place_that_cannot_be_written_fails_alone_and_one_that_is_missing_is_made(
    program: Program, two: dict[str, str], folder: Path
) -> None:
    log = program("--check", database=two, LOG_FILE=str(folder))  # this ends the check
    assert log.console == f"✗ [Errno 21] Is a directory: '{folder}': check LOG_FILE, RESULTS_DIR or --env-file\n"
    results = program("--check", database=two, RESULTS_DIR="/proc")  # not even root can write there
    assert (list(failing(results)), "/proc" in failing(results)["results"]) == (["results"], True)
    made = program("--check", database=two, RESULTS_DIR=str(folder / "new" / "results"))
    assert (failing(made), list((folder / "new" / "results").iterdir())) == ({}, [])
    assert (log.exit_code, results.exit_code, made.exit_code) == (2, 2, 0)


def test_all_that_fails_is_told_and_the_exit_code_is_that_of_the_first(program: Program, two: dict[str, str]) -> None:
    own = {"database": {**two, "DB_PASSWORD": "not the password"}, "ITERABLE_API_KEY": "0" * 32}
    refused, all_wrong = program("--check", **own), program("--check", **own, RESULTS_DIR="/proc")
    assert (list(failing(refused)), refused.exit_code) == (["database", "tables", "times", "key"], 3)
    assert (list(failing(all_wrong)), all_wrong.exit_code) == (["results", "database", "tables", "times", "key"], 2)
    assert refused.console.count(": The database refused the login: check DB_USER and DB_PASSWORD (1045") == 3
    assert "not the password" not in refused.everything


def test_a_view_in_the_future_and_a_column_or_table_that_is_missing_are_told(
    server: DatabaseServer, customers: Customers, program: Program
) -> None:
    [(ahead,)] = server.query("SELECT CAST(UTC_TIMESTAMP() + INTERVAL 1 HOUR AS CHAR)", "")
    database = customers([{"event_time": ahead}, {}])
    future = program("--check", database=database)
    times = {"times": f"{ahead} is in the future: event_time must be UTC, and not local time"}
    assert (failing(future), future.exit_code) == (times, 3)
    server.query("ALTER TABLE customers DROP COLUMN first_name", database["DB_NAME"])
    column = failing(program("--check", database=database))
    assert column.pop("tables").startswith("A column is missing: compare the tables with database_setup.sql (1054")
    assert column == times
    server.query("DROP TABLE page_views", database["DB_NAME"])
    table = failing(program("--check", database=database))
    assert {item: why[:19] for item, why in table.items()} == dict.fromkeys(("tables", "times"), "A table is missing:")


@pytest.mark.parametrize(
    ("failed", "fault", "words"),
    [
        (["iterable", "key"], {"status": 200, "body": "<html></html>"}, NOT_ITERABLE),
        (["iterable", "key"], {"status": 307, "headers": {"Location": "/elsewhere"}}, REDIRECT),
        (["iterable", "key"], {"status": 503}, IN_TROUBLE),
        (["iterable", "key"], {"action": "reset_before"}, BROKEN),
        (["key"], {"status": 200, "body": SUCCESS}, "Iterable answered a request without a user as if it had one"),
    ],
)
def test_an_answer_that_is_no_refusal_of_the_empty_body_fails_with_its_reason(
    program: Program, two: dict[str, str], standin: StandIn, failed: list[str], fault: dict[str, Any], words: str
) -> None:
    standin.fault(**fault)
    ended = program("--check", database=two, ITERABLE_MAX_ATTEMPTS="1")
    assert (failing(ended), ended.exit_code) == (dict.fromkeys(failed, words), 4)


def test_a_check_may_run_beside_a_run(
    program: Program, started: Started, two: dict[str, str], standin: StandIn
) -> None:
    standin.fault("silence", email="user1@example.com")
    started("--limit", "1", database=two)
    standin.wait_for_calls(1)
    ended = program("--check", database=two)
    assert (ended.exit_code, failing(ended)) == (0, {})


@pytest.mark.parametrize("option", ["--dry-run", "--limit=1", "--at-least=1", "--changed-only", "--bulk"])
def test_a_check_with_an_option_that_is_about_sending_is_a_usage_error(
    settings: Settings, folder: Path, option: str
) -> None:
    ended = process.run("--check", option, settings=settings({}), folder=folder)
    assert (ended.exit_code, ended.console) == (2, "")
    assert ended.errors.endswith("main.py: error: --check goes with --quiet and --env-file only\n")
