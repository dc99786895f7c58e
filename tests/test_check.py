"""main.py --check: a line for each item of the checklist, and no user data sent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.answers import BROKEN, IN_TROUBLE, NOT_ITERABLE, REDIRECT, SUCCESS
from lab.database import DatabaseServer, find_servers
from lab.process import MAIN, ROOT, CreateCustomers, Ended, RunMain, StartMain
from lab.standin_handle import USERS_GET_FIELDS, USERS_UPDATE, StandIn, Trap

KINDS = sorted(find_servers()) or ["mariadb or mysql"]
ITEMS = {
    "settings": "Settings are complete",
    "log": "Log file can be written",
    "folder": "Results folder can be written and locked",
    "database": "Database can be reached and is new enough",
    "columns": "Tables and columns of the query are usable",
    "times": "The latest page view is not in the future",
    "iterable": "Iterable can be reached",
    "key": "API key is accepted",
    "fields": "Iterable's user fields have the types that are sent",
}
WRONG_KEY = "0" * 32
Database = dict[str, str]  # settings

# Permissions do not stop root, unless it gives its rights away.
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-all") if os.getuid() == 0 else ()
UNWRITABLE = "/proc"  # not even root can make a file there
ALL_FIELDS = {
    "first_name": "string",
    "plan_type": "string",
    "recent_page_view": "boolean",
    "candidate": "string",
}


class Checklist(NamedTuple):
    """What a check found, by the keys of ITEMS: `failed` and `passed` with details."""

    passed: dict[str, str]
    failed: dict[str, str]
    unchecked: dict[str, str]


def read_checklist(ended: Ended) -> Checklist:
    """The items, each with the text behind it. All are there, and nothing else is."""
    found = Checklist({}, {}, {})
    lines = ended.console.splitlines()
    for (key, words), line in zip(ITEMS.items(), lines, strict=True):
        mark, item, details = line[0], line[2 : 2 + len(words)], line[2 + len(words) :]
        assert item == words
        if mark == "✓":
            found.passed[key] = details.strip(" ()")
        elif mark == "✗":
            found.failed[key] = details.removeprefix(": ")
        else:
            assert details.startswith(": not checked")
            found.unchecked[key] = details.removeprefix(": not checked").strip(" ()")
    return found


@pytest.fixture(scope="module")
def two_users(create_customers: CreateCustomers) -> Database:
    """The settings of a database with two users."""
    return create_customers(2)


@pytest.fixture(autouse=True)
def _nothing_is_sent(standin: StandIn) -> Iterator[None]:
    """Whatever is checked, no user arrives, and nothing is stored."""
    yield
    state = standin.state()
    calls = {(call["endpoint"], call["user"]) for call in state["journal"]}
    assert calls <= {(USERS_UPDATE, None), (USERS_GET_FIELDS, None)}
    assert state["users"] == {}
    assert state["events"] == {}
    assert state["violations"] == []


# All is well


@pytest.mark.parametrize("kind", KINDS)
def test_each_item_has_its_line(
    servers: dict[str, DatabaseServer], run_main: RunMain, standin: StandIn, kind: str
) -> None:
    standin.configure(field_types=ALL_FIELDS)

    ended = run_main("--check", database=servers[kind].create_reader())

    assert ended.exit_code == 0
    assert ended.errors == ""
    checklist = read_checklist(ended)
    assert list(checklist.passed) == list(ITEMS)
    assert servers[kind].version in checklist.passed["database"]
    assert standin.url in checklist.passed["iterable"]


def test_iterable_is_asked_two_questions(
    run_main: RunMain, standin: StandIn, two_users: Database
) -> None:
    run_main("--check", database=two_users)

    assert standin.counters()["answers"] == {
        USERS_UPDATE: {400: 1},
        USERS_GET_FIELDS: {200: 1},
    }


def test_nothing_but_log_and_lock_are_left(
    run_main: RunMain, two_users: Database, folder: Path
) -> None:
    results = folder / "results"

    run_main("--check", database=two_users, RESULTS_DIR=str(results))

    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert left == {
        "empty.env",
        "results",
        "results/.integration_results.lock",
        "run.log",
    }


def test_a_quiet_check_prints_nothing(run_main: RunMain, two_users: Database) -> None:
    ended = run_main("--check", "--quiet", database=two_users)

    assert ended.exit_code == 0
    assert ended.console == ""
    assert ended.errors == ""


def test_a_quiet_check_prints_what_fails(
    run_main: RunMain, two_users: Database
) -> None:
    ended = run_main(
        "--check", "--quiet", database=two_users, ITERABLE_API_KEY=WRONG_KEY
    )

    assert ended.exit_code == 4
    [line] = ended.console.splitlines()
    assert line.startswith(f"✗ {ITEMS['key']}: Iterable refused the API key")


def test_a_check_may_run_beside_a_run(
    run_main: RunMain, start_main: StartMain, two_users: Database, folder: Path
) -> None:
    with Trap() as silent:
        database = {**two_users, "DB_PORT": str(silent.port)}
        running = start_main(database=database, LOG_FILE=str(folder / "other.log"))
        running.wait_for("[STEP 2]")

        ended = run_main("--check", database=two_users)

    assert ended.exit_code == 0
    assert "Another run" in read_checklist(ended).unchecked["folder"]


# Settings, log and results folder


def test_missing_settings_are_all_named(run_main: RunMain, standin: StandIn) -> None:
    ended = run_main("--check", database={"DB_PORT": "many"}, ITERABLE_API_KEY="")

    assert ended.exit_code == 2
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["settings"]
    complaints = checklist.failed["settings"]
    for name in ("DB_HOST", "DB_USER", "DB_PASSWORD", "DB_NAME"):
        assert f"{name} is missing; " in complaints
    assert "DB_PORT must be a whole number from 1 to 65535; " in complaints
    assert "ITERABLE_API_KEY is empty. " in complaints
    assert set(checklist.unchecked.values()) == {""}
    assert standin.counters()["connections"] == 0


def test_a_log_that_cannot_be_written_fails(
    run_main: RunMain, two_users: Database, folder: Path
) -> None:
    ended = run_main("--check", database=two_users, LOG_FILE=str(folder))

    assert ended.exit_code == 2
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["log"]
    assert f"LOG_FILE {folder} " in checklist.failed["log"]
    assert checklist.unchecked == {}


def test_a_folder_that_cannot_be_written_fails(
    run_main: RunMain, two_users: Database
) -> None:
    ended = run_main("--check", database=two_users, RESULTS_DIR=UNWRITABLE)

    assert ended.exit_code == 2
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["folder"]
    assert f"RESULTS_DIR {UNWRITABLE} " in checklist.failed["folder"]
    assert checklist.unchecked == {}


def test_a_folder_that_takes_no_new_file_fails(
    run_main: RunMain, two_users: Database, folder: Path
) -> None:
    """The lock of an earlier run is there, but the folder's owner has changed."""
    results = folder / "results"
    results.mkdir()
    (results / ".integration_results.lock").touch()
    results.chmod(0o555)

    ended = run_main(
        "--check",
        database=two_users,
        RESULTS_DIR=str(results),
        wrapper=WITHOUT_RIGHTS,
    )

    assert ended.exit_code == 2
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["folder"]
    assert f"RESULTS_DIR {results} " in checklist.failed["folder"]


def test_a_missing_folder_is_made(
    run_main: RunMain, two_users: Database, folder: Path
) -> None:
    results = folder / "new" / "results"

    ended = run_main("--check", database=two_users, RESULTS_DIR=str(results))

    assert ended.exit_code == 0
    assert results.is_dir()


def test_a_file_system_without_locks_fails(
    run_main: RunMain, two_users: Database, folder: Path
) -> None:
    """As NFS without its lock daemon."""
    source = f"""
import errno, fcntl, os, runpy, sys

def flock(*arguments):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.flock = fcntl.lockf = flock
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({MAIN[0]!r}, run_name="__main__")
"""

    ended = run_main("--check", database=two_users, program=("-c", source))

    assert ended.exit_code == 2
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["folder"]
    assert "RESULTS_DIR" in checklist.failed["folder"]
    assert str(folder) in checklist.failed["folder"]


def test_earlier_results_that_cannot_be_read_fail(
    run_main: RunMain, two_users: Database, folder: Path
) -> None:
    """As those that a run by hand as root leaves to the service's account."""
    unreadable = folder / "integration_results_20260113_143045.json"
    unreadable.touch(mode=0)

    ended = run_main("--check", database=two_users, wrapper=WITHOUT_RIGHTS)

    assert ended.exit_code == 2
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["folder"]
    assert str(unreadable) in checklist.failed["folder"]


# Database


def count_connections(server: DatabaseServer) -> int:
    """How many connections were tried so far, this one included."""
    [(_, number)] = server.query("SHOW GLOBAL STATUS LIKE 'Connections'")
    return int(number)


def test_the_database_is_asked_in_one_connection(
    run_main: RunMain, server: DatabaseServer, two_users: Database
) -> None:
    before = count_connections(server)

    run_main("--check", database=two_users)

    assert count_connections(server) - before == 2  # with that of the last question


def test_a_wrong_password_is_tried_once(
    run_main: RunMain, server: DatabaseServer, two_users: Database
) -> None:
    """An account may be locked after three."""
    before = count_connections(server)

    ended = run_main("--check", database={**two_users, "DB_PASSWORD": "wrong one"})

    assert count_connections(server) - before == 2
    assert ended.exit_code == 3
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["database"]
    assert "DB_PASSWORD" in checklist.failed["database"]
    assert checklist.unchecked == {"columns": "", "times": ""}
    assert ended.console.count("1045") == 1
    assert "wrong one" not in ended.everything


def test_a_view_in_the_future_fails(
    run_main: RunMain, server: DatabaseServer, create_customers: CreateCustomers
) -> None:
    sql = "SELECT CAST(UTC_TIMESTAMP() + INTERVAL 1 HOUR AS CHAR)"
    [(in_an_hour,)] = server.query(sql)
    database = create_customers([{"event_time": in_an_hour}, {}])

    ended = run_main("--check", database=database)

    assert ended.exit_code == 3
    assert read_checklist(ended).failed == {
        "times": f"{in_an_hour} is in the future:"
        " event_time must be UTC, and not local time"
    }


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("ALTER TABLE customers DROP COLUMN first_name", "customers.first_name"),
        ("DROP TABLE page_views", "page_views"),
        ("ALTER TABLE customers MODIFY plan_type INT", "customers.plan_type"),
        (
            "ALTER TABLE page_views MODIFY event_time VARCHAR(30)",
            "page_views.event_time",
        ),
    ],
)
def test_columns_that_cannot_be_used_fail(
    run_main: RunMain,
    server: DatabaseServer,
    create_customers: CreateCustomers,
    *,
    statement: str,
    named: str,
) -> None:
    database = create_customers([{"plan_type": "1"}])
    server.query(statement, database["DB_NAME"])

    ended = run_main("--check", database=database)

    assert ended.exit_code == 3
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["columns"]
    assert named in checklist.failed["columns"]
    assert checklist.unchecked == {"times": ""}


def test_a_plan_that_is_a_number_sends_nobody(
    run_main: RunMain, server: DatabaseServer, create_customers: CreateCustomers
) -> None:
    """For the server, 'pro' = 0 is true."""
    database = create_customers([{"plan_type": "0"}])
    server.query("ALTER TABLE customers MODIFY plan_type INT", database["DB_NAME"])

    ended = run_main(database=database)

    assert ended.exit_code == 3
    assert "customers.plan_type" in ended.console
    assert ended.documents == []


# Iterable


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 200, "body": "<html></html>"}, NOT_ITERABLE),
        ({"status": 307, "headers": {"Location": "/elsewhere"}}, REDIRECT),
        ({"status": 503}, IN_TROUBLE),
        ({"action": "reset_before"}, BROKEN),
    ],
)
def test_an_answer_that_is_not_iterables_fails(
    run_main: RunMain,
    two_users: Database,
    standin: StandIn,
    *,
    fault: dict[str, Any],
    reason: str,
) -> None:
    standin.fault(**fault)

    ended = run_main("--check", database=two_users, ITERABLE_MAX_ATTEMPTS="1")

    assert ended.exit_code == 4
    checklist = read_checklist(ended)
    assert checklist.failed == {"iterable": reason}
    assert checklist.unchecked == {"key": "", "fields": ""}


def test_a_refused_key_fails(run_main: RunMain, two_users: Database) -> None:
    ended = run_main("--check", database=two_users, ITERABLE_API_KEY=WRONG_KEY)

    assert ended.exit_code == 4
    checklist = read_checklist(ended)
    assert list(checklist.failed) == ["key"]
    assert "ITERABLE_API_KEY" in checklist.failed["key"]
    assert checklist.unchecked == {"fields": ""}


def test_iterables_own_words_are_shown(
    run_main: RunMain, two_users: Database, standin: StandIn
) -> None:
    words = "IP address 1.2.3.4 is not allowed"
    body = f'{{"msg": "{words}", "code": "Forbidden", "params": null}}'
    standin.fault(status=403, body=body)

    ended = run_main("--check", database=two_users)

    assert words in read_checklist(ended).failed["key"]


def test_an_empty_body_must_be_refused(
    run_main: RunMain, two_users: Database, standin: StandIn
) -> None:
    standin.fault(status=200, body=SUCCESS)

    ended = run_main("--check", database=two_users)

    assert ended.exit_code == 4
    assert read_checklist(ended).failed == {
        "key": "Iterable answered a request without a user as if it had one"
    }


def test_the_first_failed_item_has_the_exit_code(
    run_main: RunMain, two_users: Database
) -> None:
    database = {**two_users, "DB_PASSWORD": "not the password"}

    ended = run_main("--check", database=database, ITERABLE_API_KEY=WRONG_KEY)

    assert list(read_checklist(ended).failed) == ["database", "key"]
    assert ended.exit_code == 3


# The project's user fields


def test_a_field_of_another_type_fails(
    run_main: RunMain, two_users: Database, standin: StandIn
) -> None:
    standin.configure(field_types={**ALL_FIELDS, "first_name": "date"})

    ended = run_main("--check", database=two_users)

    assert ended.exit_code != 0
    [(key, reason)] = read_checklist(ended).failed.items()
    assert key == "fields"
    assert re.search(r"\bfirst_name\b.*\bdate\b.*\bstring\b", reason)
    assert "plan_type" not in reason


def test_each_field_of_another_type_is_named(
    run_main: RunMain, two_users: Database, standin: StandIn
) -> None:
    standin.configure(field_types=dict.fromkeys(ALL_FIELDS, "long"))

    ended = run_main("--check", database=two_users)

    reason = read_checklist(ended).failed["fields"]
    for name in ALL_FIELDS:
        assert name in reason


def test_a_missing_field_is_named_and_does_not_fail(
    run_main: RunMain, two_users: Database, standin: StandIn
) -> None:
    standin.configure(field_types={"first_name": "string", "plan_type": "string"})

    ended = run_main("--check", database=two_users)

    assert ended.exit_code == 0
    note = read_checklist(ended).passed["fields"]
    assert "recent_page_view, candidate" in note
    assert "first_name" not in note


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 200, "body": '{"fields": []}'},
        {"status": 200, "body": "[]"},
        {"status": 200, "body": "<html></html>"},
        {"status": 403, "body": '{"msg": "no", "code": "Forbidden"}'},
        {"status": 401, "body": '{"msg": "no", "code": "BadApiKey"}'},
        {"status": 404},
        {"status": 503},
        {"action": "reset_before"},
    ],
)
def test_fields_that_cannot_be_read_are_not_checked(
    run_main: RunMain,
    two_users: Database,
    standin: StandIn,
    fault: dict[str, Any],
) -> None:
    standin.fault(**fault, endpoint=USERS_GET_FIELDS)

    ended = run_main("--check", database=two_users, ITERABLE_MAX_ATTEMPTS="1")

    assert ended.exit_code == 0
    checklist = read_checklist(ended)
    assert list(checklist.unchecked) == ["fields"]
    assert checklist.unchecked["fields"] != ""


@pytest.mark.parametrize(
    ("identify_by", "failed"), [("userId", ["fields"]), ("email", [])]
)
def test_the_address_is_a_field_of_a_project_by_user_id(
    run_main: RunMain,
    two_users: Database,
    standin: StandIn,
    *,
    identify_by: str,
    failed: list[str],
) -> None:
    standin.configure(field_types={**ALL_FIELDS, "email": "long"})

    ended = run_main("--check", database=two_users, ITERABLE_IDENTIFY_BY=identify_by)

    assert list(read_checklist(ended).failed) == failed
