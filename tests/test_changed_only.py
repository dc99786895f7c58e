"""--changed-only: what was delivered as it is is left out, everything else is sent (contract 3 and 7), and under
--quiet a failure that is known is not told again. Which files say what is tested in test_logger_config.py."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.database import DatabaseServer
from lab.process import Customers, Ended, Program, Started
from lab.standin_handle import EVENTS_TRACK, StandIn

Change = Callable[[str], None]

FIRST = "user1@example.com"
REFUSED = "users/update 400 InvalidEmailAddressError"
BOTH_REFUSED = f"✗ Failed user: x@nowhere: {REFUSED}, events/track 400 InvalidEmailAddressError"
NO_ADDRESS = "no usable e-mail address: correct it in the customers table"
INVALID = "Iterable refuses the address as invalid: correct it in the customers table"


@pytest.fixture
def three(customers: Customers) -> dict[str, str]:
    return customers(3)


@pytest.fixture
def change(server: DatabaseServer, three: dict[str, str]) -> Change:
    """`change(sql)` changes the three customers' tables."""
    return lambda sql: server.query(sql, three["DB_NAME"]) and None


def sent(standin: StandIn) -> list[str]:
    """The addresses of all calls that arrived, in order of address. Forgets the calls, not what they brought about."""
    found = sorted(call["email"] for call in standin.state()["journal"])
    standin.reset()
    return found


def both(*numbers: int) -> list[str]:
    """What `sent` gives when these users got both calls."""
    return sorted(f"user{number}@example.com" for number in numbers for _ in range(2))


# What is left out, and what is sent again


def test_a_second_run_sends_nothing_counts_everyone_as_unchanged_and_lists_nobody(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    assert program(database=three).exit_code == 0
    assert sent(standin) == both(1, 2, 3)
    ended = program("--changed-only", database=three)
    assert (ended.exit_code, ended.errors, ended.results["results"]) == (0, "", [])
    assert ended.summary == {"outcome": "completed", "total_users": 3, "unchanged": 3}
    assert ended.results["run"]["options"]["changed_only"]
    assert ended.shown.split("[STEP 5] Processing user records...\n")[1] == (
        """
INTEGRATION SUMMARY
Total users processed: 3
✓ Successful (both API calls): 0
⚠ Partial failures (one call failed): 0
✗ Total failures (both calls failed): 0
Unchanged since they were delivered, not sent again: 3
Results: FILE
Time: N s, N users a second
"""
    )
    # The memory goes through a run that had nothing to send, and a quiet one prints nothing.
    quiet = program("--quiet", "--changed-only", database=three)
    assert (quiet.exit_code, quiet.console, quiet.errors, quiet.summary["unchanged"]) == (0, "", "", 3)
    assert standin.counters()["connections"] == 0
    assert program(database=three).summary["success"] == 3  # without the option everyone is sent again


def test_whoever_changed_is_sent_again_and_nobody_else(
    program: Program, three: dict[str, str], change: Change, standin: StandIn
) -> None:
    program(database=three)
    new_view = "INSERT INTO page_views (user_id, page, event_time) VALUES (3, 'settings', CURDATE() - INTERVAL 1 DAY)"
    for sql, users in (
        ("UPDATE customers SET last_name = 'Other'", []),  # which is not sent
        ("UPDATE customers SET first_name = 'Eve' WHERE id = 2", [2]),
        ("UPDATE customers SET first_name = 'Ann' WHERE id = 2", [2]),  # as it was before
        (new_view, [3]),
    ):
        sent(standin)
        change(sql)
        ended = program("--changed-only", database=three)
        assert ([*ended.users], ended.summary["unchanged"], sent(standin)) == (users, 3 - len(users), both(*users))


def test_another_project_is_another_memory(program: Program, three: dict[str, str], standin: StandIn) -> None:
    program(database=three)
    sent(standin)
    standin.configure(key="f" * 32)
    for project in ({"ITERABLE_API_KEY": "f" * 32}, {"url": standin.url.replace("127.0.0.1", "localhost")}):
        assert program("--changed-only", database=three, **project).exit_code == 0
        assert sent(standin) == both(1, 2, 3)


def test_whoever_failed_or_was_forgotten_last_is_sent_again_with_both_calls(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    program(database=three)
    standin.configure(forgotten=[FIRST])
    standin.fault(endpoint=EVENTS_TRACK, email="user2@example.com", status=400)
    ended = program(database=three)
    assert [line["status"] for _, line in sorted(ended.users.items())] == ["forgotten", "partial_failure", "success"]
    sent(standin)
    assert program("--changed-only", database=three).summary["success"] == 2
    assert sent(standin) == both(1, 2)


def test_users_whom_an_interrupted_run_left_out_keep_what_is_known_of_them(
    started: Started, program: Program, three: dict[str, str], standin: StandIn
) -> None:
    program("--limit", "2", database=three)
    standin.reset()
    standin.fault(endpoint=EVENTS_TRACK, email=FIRST, latency=0.5)
    running = started(database=three, MAX_WORKERS="1")
    standin.wait_for_calls(1, EVENTS_TRACK)
    running.signal(signal.SIGTERM)
    assert running.wait().summary["not_attempted"] == 2
    sent(standin)
    assert program("--changed-only", database=three).summary["unchanged"] == 2
    assert sent(standin) == both(3)


def test_a_dry_run_is_no_memory_and_uses_it_and_a_limit_counts_unchanged_users_too(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    program("--limit", "1", database=three)
    sent(standin)
    program("--dry-run", database=three)
    ended = program("--dry-run", "--changed-only", database=three)
    assert ended.summary == {"outcome": "completed", "total_users": 3, "unchanged": 1, "not_attempted": 2}
    assert "\nWould send: 2\nCannot be sent: 0\nUnchanged since they were delivered, not sent again: 1\n" in ended.shown
    assert "A run would make 4 calls" in ended.console
    ended = program("--changed-only", "--limit", "2", database=three)
    assert ended.summary == {"outcome": "completed", "total_users": 2, "success": 1, "unchanged": 1, "calls": 2}
    assert sent(standin) == both(2)


def test_what_a_killed_run_left_is_memory_and_its_torn_last_line_is_no_cause_for_a_warning(
    started: Started, program: Program, three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", email="user3@example.com", times=1)
    running = started(database=three)
    running.wait_for("Processing record 2/3")
    standin.wait_for_calls(5)
    running.process.kill()
    running.wait()
    sent(standin)
    [partial] = folder.glob("*.json.partial")
    with partial.open("a", encoding="utf-8") as file:
        file.write(',\n{"record": 3, "user_id": 3, "email": "user3@exam')
    before = partial.read_bytes()
    ended = program("--quiet", "--changed-only", database=three)
    assert ended.summary == {"outcome": "completed", "total_users": 3, "success": 1, "unchanged": 2, "calls": 2}
    assert (ended.console, ended.errors, partial.read_bytes()) == ("", "", before)
    assert sent(standin) == both(3)


# Known failures


def told(ended: Ended) -> list[str]:
    """What a console says of users who failed and of the reasons, sorted: equally frequent ones come in any order."""
    return sorted(re.findall(r"^(?:✗ Failed|⚠ Partially|  \d+ user).*$", ended.console, re.MULTILINE))


def test_a_known_failure_is_not_told_again_under_quiet_and_stays_on_record(
    program: Program, customers: Customers
) -> None:
    same_address = f"{FIRST}: customer 1 has the same address"
    database = customers([{}, {"email": None}, {"email": "x@nowhere"}, {"email": f" {FIRST.upper()}"}])
    again = [
        f"  1 user: {same_address.removeprefix(f'{FIRST}: ')}: merge the two",
        f"  1 user: {NO_ADDRESS}",
        f"  1 user: {REFUSED}: {INVALID}",
        "✗ Failed user: customer 2: no usable e-mail address",
        f"✗ Failed user: {same_address}",
        BOTH_REFUSED,
    ]
    first = program("--quiet", "--changed-only", database=database)
    assert (first.exit_code, told(first)) == (1, again)
    for _ in range(2):
        ended = program("--quiet", "--changed-only", database=database)
        assert (ended.exit_code, ended.console, ended.errors) == (1, "", "")
        assert [line["status"] for line in ended.users.values()] == ["total_failure"] * 3
        reasons = [sorted(map(str, run.summary["failure_reasons"])) for run in (first, ended)]
        assert reasons[0] == reasons[1]
    assert [ended.log.count(words) for words in again] == [3] * 6
    loud = program("--changed-only", database=database)
    assert [line for line in again if line not in loud.console] == []
    assert told(program("--quiet", database=database)) == again  # without the memory, nothing is known


def test_a_new_failure_is_told_and_the_known_one_beside_it_is_not(
    server: DatabaseServer, program: Program, customers: Customers, standin: StandIn
) -> None:
    database = customers([{"email": None}, {}, {"email": "x@nowhere"}])
    program("--quiet", "--changed-only", database=database)
    refused = {"endpoint": EVENTS_TRACK, "email": "user2@example.com"}
    standin.fault(**refused, times=1, status=400, body='{"msg": "No", "code": "BadParams"}')
    server.query("UPDATE customers SET first_name = 'Eve' WHERE id = 2", database["DB_NAME"])
    reason = "events/track 400 BadParams"
    ended = program("--quiet", "--changed-only", database=database)
    assert told(ended) == [f"  1 user: {reason}: No", f"⚠ Partially processed user: user2@example.com: {reason}"]
    assert "✗ Total failures (both calls failed): 2\n" in ended.console
    assert [item["count"] for item in ended.summary["failure_reasons"]] == [1, 1, 1]
    # Another reason is new, and other payloads are, whatever the reason.
    standin.fault(**refused, times=1, status=400, body='{"msg": "No longer", "code": "BadParams"}')
    server.query("UPDATE customers SET first_name = 'Eve' WHERE id = 3", database["DB_NAME"])
    assert told(program("--quiet", "--changed-only", database=database)) == [
        f"  1 user: {reason}: No longer",
        f"  1 user: {REFUSED}: {INVALID}",
        f"⚠ Partially processed user: user2@example.com: {reason}",
        BOTH_REFUSED,
    ]


def test_known_failures_take_no_place_of_the_first_20_that_a_large_run_tells(
    server: DatabaseServer, program: Program, customers: Customers
) -> None:
    database = customers([{"email": None}] * 25 + [{}] * 76)
    assert len(told(program("--quiet", "--changed-only", database=database))) == 21
    server.query("UPDATE customers SET email = 'no at sign' WHERE id = 101", database["DB_NAME"])
    assert told(program("--quiet", "--changed-only", database=database)) == [
        f"  1 user: {NO_ADDRESS}",
        "✗ Failed user: no at sign (record 101/101): no usable e-mail address",
    ]
