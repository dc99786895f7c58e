"""`--bulk`: groups of users, whose account in the end is that of a run without (contract 5)."""

from __future__ import annotations

import json
import os
import random
import signal
import urllib.request
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from lab.answers import PAGE, SUCCESS, document
from lab.database import DatabaseServer
from lab.process import Customers, Ended, Program, Started
from lab.standin_handle import EVENTS_TRACK, EVENTS_TRACK_BULK, USERS_BULK_UPDATE, USERS_UPDATE, StandIn

BOTH = (USERS_BULK_UPDATE, EVENTS_TRACK_BULK)
BULK = {USERS_UPDATE: USERS_BULK_UPDATE, EVENTS_TRACK: EVENTS_TRACK_BULK}
CALLS = {"users_update": USERS_UPDATE, "events_track": EVENTS_TRACK}


def address(number: int) -> str:
    return f"user{number}@example.com"


@pytest.fixture(scope="module")
def thousands(customers: Customers) -> dict[str, str]:
    return customers(2500)


# The same account as without


GOOD = {"first_name": "2024-02-29", "location": None}  # a date, as the first name is in this project, see `play`
KINDS: dict[str, dict[str, Any]] = {
    "good": GOOD,
    "invalid address": {**GOOD, "email": "bad@nowhere"},
    "forgotten": {**GOOD, "email": "forgotten@example.com"},
    "no address": {**GOOD, "email": None},
    "same address": {**GOOD, "email": " User1@example.com"},
    "unknown to trackBulk": {**GOOD, "email": "unknown@example.com"},
    "type clash of the user": {**GOOD, "first_name": "Ann"},
    "type clash of the event": {**GOOD, "location": "Berlin"},
    "conflict": {**GOOD, "email": "conflict@example.com"},
}
EVENT = {"eventName": "page_view", "id": "first", "createdAt": 1}
FIRST = {  # what came before, and gave the fields their types
    USERS_UPDATE: {"email": "first@example.com", "dataFields": {"first_name": "2020-01-01"}},
    EVENTS_TRACK: {"email": "first@example.com", "dataFields": {"location": "2020-01-01"}, **EVENT},
}


def play(standin: StandIn, refused: Any = None, **more: Any) -> None:
    """Let it be a project with types of its own, a user forgotten, and one whose identity another has."""
    standin.reset()
    headers = {"Api-Key": standin.key, "Content-Type": "application/json", "User-Agent": "the-tests"}
    for endpoint, item in FIRST.items():
        request = urllib.request.Request(f"{standin.url}/api/{endpoint}", json.dumps(item).encode(), headers)
        urllib.request.urlopen(request).close()
    conflict, unknown = "conflict@example.com", "unknown@example.com"
    names = {USERS_BULK_UPDATE: {conflict: ["conflictEmails", conflict], **(refused or {})}}
    names[EVENTS_TRACK_BULK] = {unknown: ["notFoundEmails", unknown], **(refused or {})}
    standin.configure(**{"forgotten": ["forgotten@example.com"], "type_clash": "list", "refused": names, **more})
    standin.fault(endpoint=USERS_UPDATE, email=conflict, status=409, body=document("EmailAlreadyExists", "taken"))


def account(ended: Ended, standin: StandIn) -> Any:
    """Exit code, each user's line and why, counts, and what Iterable has: what --bulk may not change."""
    state, users = standin.state(), {}
    assert (state["violations"], ended.errors) == ([], "")
    for number, line in ended.users.items():  # where a success comes from may differ
        users[number] = {**line, **{key: line[key] and (line[key]["ok"] or line[key]) for key in CALLS}}
    summary = {key: value for key, value in ended.summary.items() if key not in ("calls", "retries")}
    reasons = sorted(map(str, summary.pop("failure_reasons", [])))
    return ended.exit_code, users, summary, reasons, state["users"], state["events"]


def assert_calls_are_true(ended: Ended, standin: StandIn) -> None:
    """The file counts the calls as the stand-in does, and nobody was sent again after a verdict."""
    journal = [call for call in standin.state()["journal"] if call["emails"] != ["first@example.com"]]
    equal = Counter((call["endpoint"], *call["emails"]) for call in journal)
    summary = ended.results["summary"]
    assert (summary["calls"], summary["retries"]) == (len(journal), len(journal) - len(equal))
    made = [(line["email"], name, line[key]) for line in ended.users.values() for key, name in CALLS.items()]
    for email, single, call in made:
        if call:
            both = (single, BULK[single])
            asked = [each["endpoint"] for each in journal if email in each["emails"] and each["endpoint"] in both]
            assert (asked[-1], asked.count(asked[-1])) == (call["endpoint"], call["attempts"])
            assert call["ok"] or call["endpoint"] == single
            assert (call["code"] is None) == (call["endpoint"] != single or call["status"] is None)


SINGLY: dict[Any, Any] = {}  # what became of runs without --bulk, which many tests compare with
QUICKLY = {"ITERABLE_MAX_ATTEMPTS": "2", "ITERABLE_TIMEOUT": "2"}


def assert_same_with_bulk(
    program: Program, standin: StandIn, database: dict[str, str], faults: Any = (), **project: Any
) -> None:
    key = database["DB_NAME"], "disallowed" in project
    if key not in SINGLY:
        play(standin, **project)
        SINGLY[key] = account(program(database=database, **QUICKLY), standin)
    play(standin, **project)
    for fault in faults:
        standin.fault(**fault)
    ended = program("--bulk", database=database, **QUICKLY)
    assert account(ended, standin) == SINGLY[key]
    assert_calls_are_true(ended, standin)


LATE: dict[str, Any] = {"headers": {"Retry-After": "0"}}
FAULTS: dict[str, list[dict[str, Any]]] = {  # of a bulk endpoint, one after the other
    "an answer as it should be": [],
    "more were taken than were sent": [{"alter": {"successCount": 99}}],
    "the answer of a single call": [{"status": 200, "body": SUCCESS}],
    "a page with 200": [{"status": 200, "body": PAGE}],
    "413 for all": [{"status": 413, "body": PAGE}],
    "503 for ever, but taken": [{"status": 503, "processed": True, **LATE}],
    "an answer cut short, but taken": [{"action": "cut"}],
    "429, then a lost answer": [{"status": 429, "times": 1, **LATE}, {"action": "reset_after", "times": 1}],
}
PROJECTS: dict[str, dict[str, Any]] = {
    "the type of one item is listed": {},
    "the type of one item refuses the group": {"type_clash": "refuse"},
    "a conflict names another of the group": {"refused": {"conflict@example.com": ["conflictEmails", address(1)]}},
    "the event is disallowed": {"disallowed": ["page_view"]},
}


@pytest.fixture(scope="module")
def mixed(customers: Customers) -> dict[str, str]:
    """A user of each kind, but for those because of whom a group may be refused or believed in nothing."""
    return customers([row for kind, row in KINDS.items() if "clash" not in kind and kind != "conflict"])


@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize("name", FAULTS)
def test_whatever_a_bulk_endpoint_answers_each_user_ends_as_without_bulk(
    program: Program, standin: StandIn, mixed: dict[str, str], endpoint: str, name: str
) -> None:
    assert_same_with_bulk(program, standin, mixed, [{"endpoint": endpoint, **fault} for fault in FAULTS[name]])


@pytest.mark.parametrize("name", PROJECTS)
def test_whoever_a_bulk_endpoint_refuses_each_user_ends_as_without_bulk(
    program: Program, standin: StandIn, customers: Customers, name: str
) -> None:
    rows = [row for kind, row in KINDS.items() if kind != "conflict" or kind in name]
    assert_same_with_bulk(program, standin, customers([*rows, GOOD]), **PROJECTS[name])


USERS = st.lists(st.sampled_from([*KINDS, "good", "good"]), min_size=1, max_size=8)
SEQUENCES = st.lists(st.tuples(st.sampled_from(BOTH), st.sampled_from([*FAULTS])), max_size=3)


@examples(max_examples=6, deadline=None, suppress_health_check=[*HealthCheck])
@given(kinds=USERS, sequence=SEQUENCES, type_clash=st.sampled_from(["refuse", "list"]))
def test_any_users_and_any_faults_of_bulk_end_as_without_bulk(
    program: Program, standin: StandIn, customers: Customers, kinds: Any, sequence: Any, type_clash: str
) -> None:
    rows = [{"email": address(number), **KINDS[kind]} for number, kind in enumerate(kinds, 1)]
    once = {str(row["email"]): row for row in reversed(rows)}  # of two, the one that is sent first
    faults = [{"endpoint": endpoint, "times": 1, **fault} for endpoint, name in sequence for fault in FAULTS[name]]
    assert_same_with_bulk(program, standin, customers([*once.values()]), faults, type_clash=type_clash)


def test_only_who_is_not_confirmed_is_sent_singly(program: Program, standin: StandIn, customers: Customers) -> None:
    refused = {USERS_BULK_UPDATE: {address(2): ["invalidEmails", "USER2@Example.COM"]}}
    refused[EVENTS_TRACK_BULK] = {address(3): ["notFoundEmails", address(3)]}
    standin.configure(refused=refused)
    ended = program("--bulk", database=customers(4))
    assert ended.summary == {"outcome": "completed", "total_users": 4, "success": 4, "calls": 5}
    told = {"ok": True, "status": 200, "code": None, "message": "", "attempts": 1}
    assert [ended.users[1][key] for key in CALLS] == [{"endpoint": endpoint, **told} for endpoint in BOTH]
    assert {(call["endpoint"], *call["emails"]) for call in standin.state()["journal"]} == {
        (USERS_BULK_UPDATE, *map(address, (1, 2, 3, 4))),
        (EVENTS_TRACK_BULK, *map(address, (1, 3, 4))),
        (USERS_UPDATE, address(2)),
        (EVENTS_TRACK, address(2)),
        (EVENTS_TRACK, address(3)),
    }


def sizes(standin: StandIn) -> Counter[Any]:
    """How many calls of each endpoint there were for so many users."""
    return Counter((call["endpoint"], len(call["emails"])) for call in standin.state()["journal"])


def test_groups_have_at_most_1000_users(program: Program, standin: StandIn, thousands: dict[str, str]) -> None:
    ended = program("--bulk", "--limit", "2001", database=thousands)
    assert ended.summary == {"outcome": "completed", "total_users": 2001, "success": 2001, "calls": 6}
    assert sizes(standin) == {(bulk, 1000): 2 for bulk in BOTH} | {(single, 1): 1 for single in BULK}
    assert (len(standin.state()["users"]), len(standin.state()["events"])) == (2001, 2001)


def test_groups_have_at_most_a_megabyte_and_keep_their_share_of_the_limits(
    program: Program, standin: StandIn, customers: Customers, server: DatabaseServer
) -> None:
    database = customers(8)
    server.query("ALTER TABLE page_views DROP KEY page_views_recent, MODIFY location MEDIUMTEXT", database["DB_NAME"])
    server.query("UPDATE page_views SET location = REPEAT('x', 450000)", database["DB_NAME"])
    ended = program("--bulk", database=database, ITERABLE_RATE_LIMIT="250")
    assert (ended.summary["success"], sizes(standin)) == (8, {(bulk, 2): 4 for bulk in BOTH})
    assert standin.counters()["busiest_second"][USERS_BULK_UPDATE] <= 3  # half of 500 singly is 2.5 of 5 here


# Runs that end early


@pytest.mark.parametrize(("endpoint", "status"), [(USERS_BULK_UPDATE, 401), (EVENTS_TRACK_BULK, 403)])
def test_a_key_that_a_bulk_endpoint_refuses_ends_the_run(
    program: Program, standin: StandIn, thousands: dict[str, str], endpoint: str, status: int
) -> None:
    standin.fault(endpoint=endpoint, status=status, body=document("BadApiKey", "Invalid API key"))
    ended = program("--bulk", database=thousands, MAX_WORKERS="1")
    assert "The run ended early: Iterable refused the API key" in ended.console
    [reason] = ended.summary["failure_reasons"]
    assert (reason["endpoint"], reason["status"], reason["count"]) == (endpoint, status, 1000)
    failures = "total_failures" if endpoint == USERS_BULK_UPDATE else "partial_failures"
    calls = [call["endpoint"] for call in standin.state()["journal"]]
    assert calls == [*BOTH][: 1 + BOTH.index(endpoint)]
    counts = {"total_users": 2500, failures: 1000, "not_attempted": 1500, "calls": len(calls)}
    assert ended.summary == {"outcome": "aborted", "exit_code": 4, **counts, "failure_reasons": [reason]}


def test_an_outage_in_a_bulk_run_is_given_up(program: Program, standin: StandIn, thousands: dict[str, str]) -> None:
    standin.fault(status=503, **LATE)
    ended = program("--bulk", database=thousands, MAX_WORKERS="5", ITERABLE_MAX_ATTEMPTS="2")
    summary = ended.results["summary"]
    assert (ended.exit_code, summary["outcome"], standin.state()["users"]) == (4, "aborted", {})
    assert summary["total_failures"] >= 20
    assert summary["total_failures"] + summary["not_attempted"] == 2500


@pytest.mark.parametrize("fault", ["an answer as it should be", "a page with 200", "503 for ever, but taken"])
def test_after_a_stop_whoever_has_the_update_gets_the_event_and_nobody_else_is_started(
    started: Started, standin: StandIn, customers: Customers, fault: str
) -> None:
    for each in FAULTS[fault]:
        standin.fault(endpoint=EVENTS_TRACK_BULK, **each)
    standin.fault(endpoint=USERS_BULK_UPDATE, latency=0.5)
    standin.configure(refused={USERS_BULK_UPDATE: {address(2): ["notFoundEmails", address(2)]}})
    run = started("--bulk", database=customers(4))
    standin.wait_for_calls(1)
    run.signal(signal.SIGTERM)
    ended, state = run.wait(), standin.state()
    statuses = [line["status"] for _, line in sorted(ended.users.items())]
    assert (ended.exit_code, statuses) == (143, ["success", "not_attempted", "success", "success"])
    assert sorted(state["users"]) == sorted(event["email"] for event in state["events"].values())
    calls = state["counters"]["calls"]
    assert (USERS_UPDATE in calls, calls[USERS_BULK_UPDATE], calls[EVENTS_TRACK_BULK]) == (False, 1, 1)
    assert_calls_are_true(ended, standin)


@pytest.mark.parametrize("number", range(int(os.environ.get("KILL_ROUNDS", "2"))))
def test_a_killed_bulk_run_loses_nobody_and_only_groups_in_flight_are_sent_again(
    started: Started, program: Program, standin: StandIn, thousands: dict[str, str], number: int
) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    standin.configure(latency=chance.choice([0.0, 0.03, 0.1]))
    run = started("--bulk", database=thousands, MAX_WORKERS="2")
    standin.wait_for_calls(chance.randrange(1, 7))
    run.process.kill()
    run.wait()
    text = "".join(path.read_text() for path in run.folder.glob("integration_results_*"))
    on_record = {json.loads(line.rstrip(","))["email"] for line in text.split("\n") if line.startswith('{"record"')}
    assert text.count('"status": "success"') == len(on_record)
    before = standin.state()["accepted"]
    again = program("--bulk", "--changed-only", database=thousands)
    assert (again.exit_code, again.summary.get("unchanged", 0)) == (0, len(on_record))
    state = standin.state()
    assert sorted(state["users"]) == sorted(event["email"] for event in state["events"].values())
    assert (len(state["users"]), state["violations"]) == (2500, [])
    for bulk in BOTH:
        twice = {identity for identity, times in state["accepted"][bulk].items() if times > 1}
        emails = {state["events"][each]["email"] if bulk == EVENTS_TRACK_BULK else each for each in twice}
        assert (emails & on_record, twice - before[bulk].keys()) == (set(), set())
    assert program("--bulk", "--changed-only", database=thousands).summary["unchanged"] == 2500


def test_who_may_have_been_told_before_a_stop_is_a_failure_so_that_the_next_run_sends_again(
    started: Started, program: Program, standin: StandIn, customers: Customers
) -> None:
    database = customers(3)
    standin.fault(endpoint=USERS_BULK_UPDATE, status=503, processed=True, latency=0.5, times=1)
    run = started("--bulk", database=database)
    standin.wait_for_calls(1)
    run.signal(signal.SIGTERM)
    assert run.wait().summary["partial_failures"] == len(standin.state()["users"]) == 3
    assert program("--bulk", "--changed-only", database=database).summary["success"] == 3
