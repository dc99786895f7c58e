"""--changed-only: what was delivered as it is is left out, everything else is sent (contract 3 and 7), and under
--quiet a failure that is known is not told again."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.database import DatabaseServer
from lab.process import Customers, Ended, Program, Started
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

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


def results_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("integration_results_*"))


# What is left out


def test_a_second_run_sends_nothing_counts_everyone_as_unchanged_and_lists_nobody(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    assert program(database=three).exit_code == 0
    assert sent(standin) == both(1, 2, 3)
    ended = program("--changed-only", database=three)
    assert (ended.exit_code, ended.errors, ended.results["results"]) == (0, "", [])
    assert ended.summary == {"outcome": "completed", "total_users": 3, "unchanged": 3}
    assert ended.results["run"]["options"] == {"limit": None, "at_least": None, "changed_only": True, "bulk": False}
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


def test_without_the_option_everyone_is_sent_again_as_the_same_event(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    program(database=three)
    assert program(database=three).summary["success"] == 3
    state = standin.state()
    assert state["accepted"][EVENTS_TRACK] == {f"page-view-{number}": 2 for number in (1, 2, 3)}
    assert sorted(state["events"]) == [f"page-view-{number}" for number in (1, 2, 3)]


def test_a_column_that_is_not_sent_and_iterables_address_in_other_words_are_no_change(
    program: Program, three: dict[str, str], change: Change, standin: StandIn
) -> None:
    program(database=three)
    change("UPDATE customers SET last_name = 'Other' WHERE id = 2")
    assert program("--changed-only", database=three, url=f"{standin.url}/api/").summary["unchanged"] == 3


def test_a_view_that_is_dated_ahead_is_not_told_again_after_any_time(
    program: Program, customers: Customers, folder: Path
) -> None:
    database = customers([{"event_time": "2099-01-01 00:00:00"}])
    program(database=database)
    [path] = results_files(folder)
    edit(path, started_at="2020-01-01T00:00:00+00:00")
    os.utime(path, times=(0, 0))
    assert program("--changed-only", database=database).summary["unchanged"] == 1


# What is sent again


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE customers SET first_name = 'Eve' WHERE id = 2",
        "UPDATE customers SET first_name = NULL WHERE id = 2",
        "UPDATE page_views SET location = 'Rome' WHERE user_id = 2",
        "UPDATE page_views SET event_time = event_time + INTERVAL 1 SECOND WHERE user_id = 2",
        "INSERT INTO page_views (user_id, page, event_time) VALUES (2, 'settings', CURDATE() - INTERVAL 1 DAY)",
    ],
    ids=["name", "name removed", "location", "time", "new view"],
)
def test_a_changed_field_is_sent_again_and_nothing_else_is(
    program: Program, three: dict[str, str], change: Change, standin: StandIn, sql: str
) -> None:
    program(database=three)
    sent(standin)
    change(sql)
    ended = program("--changed-only", database=three)
    assert ended.summary == {"outcome": "completed", "total_users": 3, "success": 1, "unchanged": 2, "calls": 2}
    assert {record: (line["user_id"], line["status"]) for record, line in ended.users.items()} == {2: (2, "success")}
    assert sent(standin) == both(2)


def test_what_was_changed_and_changed_back_is_sent_each_time(
    program: Program, three: dict[str, str], change: Change, standin: StandIn
) -> None:
    for name in ("Ann", "Eve", "Ann"):
        change(f"UPDATE customers SET first_name = '{name}' WHERE id = 1")
        program("--changed-only", database=three)
        assert FIRST in sent(standin), name


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, EVENTS_TRACK])
def test_what_may_have_reached_iterable_in_between_makes_the_earlier_delivery_stale(
    program: Program, three: dict[str, str], change: Change, standin: StandIn, endpoint: str
) -> None:
    program(database=three)
    change("UPDATE customers SET first_name = 'Eve' WHERE id = 1")
    standin.fault("reset_after", endpoint=endpoint, email=FIRST)  # processed, though the run cannot know
    assert program("--changed-only", database=three, ITERABLE_MAX_ATTEMPTS="1").exit_code == 1
    sent(standin)
    change("UPDATE customers SET first_name = 'Ann' WHERE id = 1")
    program("--changed-only", database=three)
    assert sent(standin) == both(1)


@pytest.mark.parametrize(
    ("endpoint", "status"),
    [("*", "total_failure"), (USERS_UPDATE, "partial_failure"), (EVENTS_TRACK, "partial_failure")],
    ids=["both calls failed", "users/update failed", "events/track failed"],
)
def test_a_user_who_failed_is_sent_again_with_both_calls(
    program: Program, three: dict[str, str], standin: StandIn, endpoint: str, status: str
) -> None:
    standin.fault(endpoint=endpoint, email=FIRST, status=400)
    assert program(database=three).users[1]["status"] == status
    sent(standin)
    assert program("--changed-only", database=three).exit_code == 0
    assert sent(standin) == both(1)


def test_a_user_who_was_forgotten_is_asked_for_again_each_time(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    program("--limit", "1", database=three)
    for option in ([], ["--changed-only"]):
        standin.configure(forgotten=[FIRST])
        assert program("--limit", "1", *option, database=three).summary["forgotten"] == 1
        assert FIRST in sent(standin)
    assert program("--limit", "1", "--changed-only", database=three).summary["success"] == 1


def test_users_whom_an_interrupted_run_left_out_keep_what_is_known_of_them(
    started: Started, program: Program, three: dict[str, str], change: Change, standin: StandIn
) -> None:
    program("--limit", "2", database=three)
    sent(standin)
    standin.fault(endpoint=EVENTS_TRACK, email=FIRST, latency=0.5)
    running = started(database=three, MAX_WORKERS="1")
    standin.wait_for_calls(1, EVENTS_TRACK)
    running.signal(signal.SIGTERM)
    assert running.wait().summary["not_attempted"] == 2
    sent(standin)
    assert program("--changed-only", database=three).summary["unchanged"] == 2
    assert sent(standin) == both(3)


def test_another_project_is_another_memory(program: Program, three: dict[str, str], standin: StandIn) -> None:
    key = "f" * 32
    program(database=three)
    sent(standin)
    standin.configure(key=key)
    assert program("--changed-only", database=three, ITERABLE_API_KEY=key).exit_code == 0
    assert sent(standin) == both(1, 2, 3)
    other = standin.url.replace("127.0.0.1", "localhost")
    assert program("--changed-only", database=three, url=other).exit_code == 0
    assert sent(standin) == both(1, 2, 3)


def test_a_limit_counts_unchanged_users_too(program: Program, three: dict[str, str], standin: StandIn) -> None:
    program("--limit", "1", database=three)
    sent(standin)
    ended = program("--changed-only", "--limit", "2", database=three)
    assert ended.summary == {"outcome": "completed", "total_users": 2, "success": 1, "unchanged": 1, "calls": 2}
    assert sent(standin) == both(2)


# Which files are the memory, and in which order


def test_a_dry_run_is_no_memory_and_uses_it(program: Program, three: dict[str, str], standin: StandIn) -> None:
    program("--limit", "1", database=three)
    sent(standin)
    program("--dry-run", database=three)
    ended = program("--dry-run", "--changed-only", database=three)
    assert ended.summary == {"outcome": "completed", "total_users": 3, "unchanged": 1, "not_attempted": 2}
    assert "\nWould send: 2\nCannot be sent: 0\nUnchanged since they were delivered, not sent again: 1\n" in ended.shown
    assert "A run would make 4 calls" in ended.console
    program("--changed-only", database=three)
    assert sent(standin) == both(2, 3)


def edit(path: Path, number: int | None = None, started_at: str = "") -> None:
    """Take a file's run number away, or put another start into its head."""
    text = path.read_text("utf-8")
    if started_at:
        text = re.sub(r'"started_at": "[^"]*"', f'"started_at": "{started_at}"', text, count=1)
    if number is not None:
        text = text.replace(f'"number": {number}, ', "", 1)
    path.write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("without_number", "clock", "unchanged"),
    [
        pytest.param((), "set back", True, id="by run number"),
        pytest.param((1, 2), "right", True, id="no numbers, by time"),
        pytest.param((1, 2), "set back", False, id="no numbers, by a time that is wrong"),
        pytest.param((1,), "set back", True, id="the one without number comes first"),
        pytest.param((2,), "right", False, id="the one without number comes first, although it is later"),
    ],
)
def test_the_last_word_on_a_user_is_that_of_the_highest_run_number(
    program: Program,
    three: dict[str, str],
    change: Change,
    standin: StandIn,
    folder: Path,
    without_number: tuple[int, ...],
    clock: str,
    unchanged: bool,
) -> None:
    """In a copy of the folder, with names and times in the wrong order. Run 1 told Ann, run 2 Eve, and she is Eve."""
    copied = folder / "copied"
    copied.mkdir()
    for number, name in enumerate(("Ann", "Eve"), 1):
        change(f"UPDATE customers SET first_name = '{name}'")
        assert program(database=three).results["run"]["number"] == number
        copy = copied / f"integration_results_2027010{3 - number}_000000.json"
        shutil.copy(results_files(folder)[-1], copy)
        year = 2020 - number if clock == "set back" else 2020 + number
        edit(copy, number if number in without_number else None, f"{year}-01-01T00:00:00+00:00")
        os.utime(copy, times=(3 - number,) * 2)
    sent(standin)
    assert program("--changed-only", database=three, RESULTS_DIR=str(copied)).exit_code == 0
    assert sent(standin) == ([] if unchanged else both(1, 2, 3))


def test_a_runs_number_is_one_more_than_the_highest_in_the_folder(
    program: Program, three: dict[str, str], folder: Path
) -> None:
    for _ in range(3):
        program("--limit", "1", database=three)
    first, second, third = results_files(folder)
    assert [document["run"]["number"] for document in program("--dry-run", database=three).documents] == [1, 2, 3, 4]
    for path in (first, second):
        path.unlink()
    third.rename(third.with_name("integration_results_29990101_000000.json.partial"))
    assert sorted(document["run"]["number"] for document in program(database=three).documents) == [4, 5]


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
    assert (ended.console, ended.errors) == ("", "")
    assert sent(standin) == both(3)
    assert partial.read_bytes() == before


def test_a_damaged_line_costs_its_user_and_no_other_and_is_told(
    program: Program, three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    program(database=three)
    [path] = results_files(folder)
    lines = path.read_bytes().split(b"\n")
    [damaged] = [at for at, line in enumerate(lines) if b'"user_id": 2,' in line]
    lines[damaged] = b"\xff\x00" + lines[damaged][20:]
    path.write_bytes(b"\n".join(lines))
    sent(standin)
    ended = program("--quiet", "--changed-only", database=three)
    warning = f"{path} is used as memory in part: 1 line(s) are damaged or missing\n"
    assert (ended.exit_code, ended.console, ended.errors) == (0, warning, "")
    assert sent(standin) == both(2)


FOREIGN = {
    "empty": b"",
    "binary": bytes(range(256)) * 40,
    "zeros, as a power cut leaves them": bytes(4096),
    "JSON of another program": b'{\n"results": [\n{"user_id": 1, "status": "success"}\n]}\n',
    "JSON that is nested deeply": b"{\n" + b"[" * 100_000 + b"\n",
    "JSON of other types": b'{\n"run": ["mode", "send"],\n"results": [\n],\n"summary": {}\n}\n',
    "JSON without its mode": b'{\n"run": {"started_at": "2026-01-01T00:00:00+00:00"},\n"results": [\n',
}


def test_foreign_files_are_skipped_each_with_a_warning(
    program: Program, three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    program(database=three)
    sent(standin)
    for number, content in enumerate(FOREIGN.values()):
        (folder / f"integration_results_1{number}.json").write_bytes(content)
    (folder / "integration_results_18.json").mkdir()
    (folder / "integration_results_19.json").symlink_to(folder / "nowhere")
    (folder / "integration_results_10.json.partial").touch()  # that may be of a run that was killed at once
    ended = program("--quiet", "--changed-only", database=three)
    names = re.findall(r"^\S*/(\S+) is not a results file of this program, and not used: .+$", ended.console, re.M)
    assert names == [f"integration_results_1{number}.json" for number in (*range(len(FOREIGN)), 8, 9)]
    assert (ended.exit_code, len(ended.console.splitlines()), ended.errors) == (0, len(names), "")
    assert sent(standin) == []
    assert [(folder / f"integration_results_1{n}.json").read_bytes() for n in range(len(FOREIGN))] == [
        *FOREIGN.values()
    ]


# Known failures


def told(ended: Ended) -> list[str]:
    """What a console says of users who failed and of the reasons, sorted: equally frequent ones come in any order."""
    return sorted(re.findall(r"^(?:✗ Failed|⚠ Partially|  \d+ user).*$", ended.console, re.MULTILINE))


def test_a_known_failure_is_not_told_again_under_quiet_and_stays_on_record(
    program: Program, customers: Customers
) -> None:
    database = customers([{}, {"email": None}, {"email": "x@nowhere"}])
    again = [
        f"  1 user: {NO_ADDRESS}",
        f"  1 user: {REFUSED}: {INVALID}",
        "✗ Failed user: customer 2: no usable e-mail address",
        BOTH_REFUSED,
    ]
    first = program("--quiet", "--changed-only", database=database)
    assert (first.exit_code, told(first)) == (1, again)
    for _ in range(2):
        ended = program("--quiet", "--changed-only", database=database)
        assert (ended.exit_code, ended.console, ended.errors) == (1, "", "")
        assert [line["status"] for line in ended.users.values()] == ["total_failure"] * 2
        reasons = [sorted(map(str, run.summary["failure_reasons"])) for run in (first, ended)]
        assert reasons[0] == reasons[1]
    assert [ended.log.count(words) for words in (NO_ADDRESS, INVALID, *again[2:])] == [3] * 4
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


def test_a_customer_with_the_address_of_another_is_a_known_failure_while_the_first_is_unchanged(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    database = customers([{}, {"email": f" {FIRST.upper()}"}])
    first = program("--quiet", "--changed-only", database=database)
    assert (first.exit_code, len(told(first)), sent(standin)) == (1, 2, both(1))
    ended = program("--quiet", "--changed-only", database=database)
    assert (ended.exit_code, ended.console, sent(standin)) == (1, "", [])
    assert (ended.summary["unchanged"], ended.summary["total_failures"]) == (1, 1)
