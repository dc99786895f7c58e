"""`--bulk`: groups of users, whose account in the end is that of a run without (contract 5)."""

from __future__ import annotations

import json
import os
import random
import signal
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from lab import process
from lab.database import DatabaseServer
from lab.process import Customers, Program, Started
from lab.standin_handle import EVENTS_TRACK, EVENTS_TRACK_BULK, USERS_BULK_UPDATE, USERS_UPDATE, StandIn

BULK = {USERS_UPDATE: USERS_BULK_UPDATE, EVENTS_TRACK: EVENTS_TRACK_BULK}
CALLS = {"users_update": USERS_UPDATE, "events_track": EVENTS_TRACK}
MAY_DIFFER = ("calls", "retries")
QUICKLY = {"ITERABLE_MAX_ATTEMPTS": "2", "ITERABLE_TIMEOUT": "2"}
ROUNDS = int(os.environ.get("KILL_ROUNDS", "2"))


def address(number: int) -> str:
    return f"user{number}@example.com"


# The same account as without


GOOD = {"first_name": "2024-02-29", "location": None}  # Iterable takes the first name for a date, see `play`
KINDS: dict[str, dict[str, Any]] = {
    "good": GOOD,
    "invalid address": {**GOOD, "email": "bad@nowhere"},
    "forgotten": {**GOOD, "email": "forgotten@example.com"},
    "no address": {**GOOD, "email": None},
    "same address": {**GOOD, "email": " User1@example.com"},
    "type clash of the user": {**GOOD, "first_name": "Ann"},
    "type clash of the event": {**GOOD, "location": "Berlin"},
    "conflict": {**GOOD, "email": "conflict@example.com"},
    "unknown to trackBulk": {**GOOD, "email": "unknown@example.com"},
}


def play(standin: StandIn, **more: Any) -> None:
    """Let it be a project with types of its own, a user forgotten, and one whose identity another has."""
    standin.reset()
    for endpoint, fields in ((USERS_UPDATE, {"first_name": "2020-01-01"}), (EVENTS_TRACK, {"location": "2020-01-01"})):
        item = {"email": "first@example.com", "dataFields": fields}
        item |= {"eventName": "page_view", "id": "first", "createdAt": 1} if endpoint == EVENTS_TRACK else {}
        headers = {"Api-Key": standin.key, "Content-Type": "application/json", "User-Agent": "the-tests"}
        request = urllib.request.Request(f"{standin.url}/api/{endpoint}", json.dumps(item).encode(), headers)
        urllib.request.urlopen(request).close()
    refused = {
        USERS_BULK_UPDATE: {"conflict@example.com": ["conflictEmails", "conflict@example.com"]},
        EVENTS_TRACK_BULK: {"unknown@example.com": ["notFoundEmails", "unknown@example.com"]},
    }
    for endpoint, to in more.get("refused", {}).items():
        refused[endpoint] |= to
    standin.configure(**{"forgotten": ["forgotten@example.com"], "type_clash": "list", **more, "refused": refused})
    conflict = json.dumps({"msg": "Email is taken", "code": "EmailAlreadyExists", "params": None})
    standin.fault(endpoint=USERS_UPDATE, email="conflict@example.com", status=409, body=conflict)


def account(ended: process.Ended, standin: StandIn) -> dict[str, Any]:
    """Exit code, what became of each user and why, and what Iterable has: what --bulk may not change."""

    def verdict(call: dict[str, Any] | None) -> Any:
        return call and (call["ok"] or (call["endpoint"], call["status"], call["code"], call["message"]))

    state = standin.state()
    assert state["violations"] == []
    assert ended.errors == ""
    return {
        "exit code": ended.exit_code,
        "users": {
            number: (line["status"], *(verdict(line[key]) for key in CALLS), line.get("problem"), line["fingerprint"])
            for number, line in ended.users.items()
        },
        "counts": {
            key: value for key, value in ended.summary.items() if isinstance(value, int) and key not in MAY_DIFFER
        },
        "reasons": sorted(map(str, ended.results["summary"]["failure_reasons"])),
        "in Iterable": (state["users"], state["events"]),
    }


def assert_calls_are_true(ended: process.Ended, standin: StandIn) -> None:
    """The file counts the calls as the stand-in does, and nobody was sent again after a verdict."""
    journal = [call for call in standin.state()["journal"] if call["emails"] != ["first@example.com"]]
    equal = Counter((call["endpoint"], *call["emails"]) for call in journal)
    summary = ended.results["summary"]
    assert (summary["calls"], summary["retries"]) == (len(journal), len(journal) - len(equal))
    for line in ended.users.values():
        for key, single in CALLS.items():
            asked = [call["endpoint"] for call in journal if line["email"] in call["emails"] and line["event_id"]]
            asked = [endpoint for endpoint in asked if endpoint in (single, BULK[single])]
            if line[key]:
                assert asked[-1] == line[key]["endpoint"]
                assert asked.count(asked[-1]) == line[key]["attempts"]
                assert line[key]["ok"] or line[key]["endpoint"] == single
                assert (line[key]["code"] is None) == (line[key]["endpoint"] == BULK[single] or not line[key]["status"])


SUCCESS = '{"msg":"","code":"Success","params":null}'
BAD_BODY = '{"msg":"obj.users[1].email: String value expected","code":"BadJsonBody","params":null}'
LATE = {"Retry-After": "0"}
BOTH = (USERS_BULK_UPDATE, EVENTS_TRACK_BULK)
FAULTS: dict[str, list[dict[str, Any]]] = {  # of a bulk endpoint, one after the other
    "an answer as it should be": [],
    "more were taken than were sent": [{"alter": {"successCount": 99}}],
    "no failCount": [{"alter": {"failCount": None}}],
    "all are said to be taken": [{"alter": {"successCount": 7, "failCount": 0}}],
    "the deprecated lists alone": [{"alter": {"failedUpdates": None}}],
    "lists that are no lists": [{"alter": {"failedUpdates": [[1]], "invalidEmails": {"a": 1}}}],
    "the answer of a single call": [{"status": 200, "body": SUCCESS}],
    "an empty object": [{"status": 200, "body": "{}"}],
    "HTML with 200": [{"status": 200, "body": "<html>login</html>", "headers": {"Content-Type": "text/html"}}],
    "a redirect": [{"status": 302, "headers": {"Location": "https://login.example.com/"}}],
    "400 for all": [{"status": 400, "body": BAD_BODY}],
    "413 in HTML": [{"status": 413, "body": "<html>too large</html>", "headers": {"Content-Type": "text/html"}}],
    "500 for ever": [{"status": 500, "body": '{"code":"GenericError"}', "headers": LATE}],
    "503 for ever, but taken": [{"status": 503, "processed": True, "headers": LATE}],
    "a reset for ever": [{"action": "reset_before"}],
    "an answer cut short, but taken": [{"action": "cut"}],
    "an answer lost once, but taken": [{"action": "reset_after", "times": 1}],
    "429, then an answer": [{"status": 429, "headers": LATE, "times": 1}],
    "reset, then 503": [{"action": "reset_before", "times": 1}, {"status": 503, "headers": LATE, "times": 1}],
    "429, then a lost answer": [{"status": 429, "headers": LATE, "times": 1}, {"action": "reset_after", "times": 1}],
    "503, then counts that do not add up": [
        {"status": 503, "headers": LATE, "times": 1},
        {"alter": {"successCount": 1}, "times": 1},
    ],
}
SETTINGS: dict[str, dict[str, Any]] = {  # of the stand-in
    "failures are named in another case": {
        "refused": {bulk: {address(1): ["invalidEmails", "USER1@Example.COM"]} for bulk in BOTH}
    },
    "a failure is not named": {"refused": {bulk: {address(1): None} for bulk in BOTH}},
    "a conflict names the other user": {
        "refused": {USERS_BULK_UPDATE: {"conflict@example.com": ["conflictEmails", "another@example.com"]}},
    },
    "a conflict names the other user, who is in the group": {
        "refused": {USERS_BULK_UPDATE: {"conflict@example.com": ["conflictEmails", address(1)]}},
    },
    "the type of one item refuses the group": {"type_clash": "refuse"},
    "the type of one item is listed": {},
    "the event is disallowed": {"disallowed": ["page_view"]},
}
Compare = Callable[[StandIn, Program], None]


@pytest.fixture(scope="module")
def mixed(customers: Customers) -> dict[str, str]:
    """A user of each kind, but for those because of whom a group may be refused or believed in nothing."""
    return customers([row for kind, row in KINDS.items() if "clash" not in kind and kind != "conflict"])


SINGLY: dict[str, dict[str, Any]] = {}  # what became of runs without --bulk, which many tests compare with


def assert_same_with_bulk(
    program: Program, standin: StandIn, database: dict[str, str], config: dict[str, Any], faults: list[dict[str, Any]]
) -> process.Ended:
    name = f"{database['DB_NAME']} {config.get('disallowed')}"
    if name not in SINGLY:
        play(standin, **config)
        SINGLY[name] = account(program(database=database, **QUICKLY), standin)
    play(standin, **config)
    for fault in faults:
        standin.fault(**fault)
    ended = program("--bulk", database=database, **QUICKLY)
    assert account(ended, standin) == SINGLY[name]
    assert_calls_are_true(ended, standin)
    return ended


OF_TRACK_BULK = (  # the others are no other there
    "more were taken than were sent",
    "the deprecated lists alone",
    "the answer of a single call",
    "400 for all",
    "503 for ever, but taken",
    "an answer lost once, but taken",
    "429, then a lost answer",
)


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [*((USERS_BULK_UPDATE, name) for name in FAULTS), *((EVENTS_TRACK_BULK, name) for name in OF_TRACK_BULK)],
)
def test_whatever_a_bulk_endpoint_answers_each_user_ends_as_without_bulk(
    program: Program, standin: StandIn, mixed: dict[str, str], endpoint: str, name: str
) -> None:
    faults = [{"endpoint": endpoint, **fault} for fault in FAULTS[name]]
    assert_same_with_bulk(program, standin, mixed, {}, faults)


@pytest.mark.parametrize("name", SETTINGS)
def test_whoever_a_bulk_endpoint_refuses_each_user_ends_as_without_bulk(
    program: Program, standin: StandIn, customers: Customers, name: str
) -> None:
    database = customers([row for kind, row in KINDS.items() if kind != "conflict" or "conflict" in name] + [GOOD])
    assert_same_with_bulk(program, standin, database, SETTINGS[name], [])


USERS = st.lists(st.sampled_from([*KINDS, "good", "good"]), min_size=1, max_size=8)
SEQUENCES = st.lists(
    st.tuples(st.sampled_from(BOTH), st.sampled_from([name for name in FAULTS if FAULTS[name]])), max_size=3
)


@examples(max_examples=6, deadline=None, suppress_health_check=[*HealthCheck])
@given(kinds=USERS, sequence=SEQUENCES, type_clash=st.sampled_from(["refuse", "list"]))
def test_any_users_and_any_faults_of_bulk_end_as_without_bulk(
    program: Program,
    standin: StandIn,
    customers: Customers,
    folder: Path,
    kinds: list[str],
    sequence: list[tuple[str, str]],
    type_clash: str,
) -> None:
    rows = [{"email": address(number), **KINDS[kind]} for number, kind in enumerate(kinds, 1)]
    once = {str(row["email"]): row for row in reversed(rows)}  # of two, the one that is sent first
    faults = [{"endpoint": endpoint, "times": 1, **fault} for endpoint, name in sequence for fault in FAULTS[name]]
    assert_same_with_bulk(program, standin, customers([*once.values()]), {"type_clash": type_clash}, faults)


def test_where_all_is_well_each_group_takes_two_calls_and_the_results_name_the_bulk_endpoints(
    program: Program, standin: StandIn, customers: Customers
) -> None:
    ended = program("--bulk", database=customers(3))
    assert ended.summary == {"outcome": "completed", "total_users": 3, "success": 3, "calls": 2}
    assert [(line["users_update"], line["events_track"]) for line in ended.users.values()] == [
        tuple(
            {"endpoint": endpoint, "ok": True, "status": 200, "code": None, "message": "", "attempts": 1}
            for endpoint in BOTH
        )
    ] * 3
    assert [call["emails"] for call in standin.state()["journal"]] == [[address(n) for n in (1, 2, 3)]] * 2


def test_only_who_is_not_confirmed_is_sent_singly(program: Program, standin: StandIn, customers: Customers) -> None:
    refused = {USERS_BULK_UPDATE: {address(2): ["invalidEmails", "USER2@Example.COM"]}}
    refused[EVENTS_TRACK_BULK] = {address(3): ["notFoundEmails", address(3)]}
    standin.configure(refused=refused)
    ended = program("--bulk", database=customers(4))
    assert ended.summary == {"outcome": "completed", "total_users": 4, "success": 4, "calls": 5}
    sent = {(call["endpoint"], *call["emails"]) for call in standin.state()["journal"]}
    assert sent == {
        (USERS_BULK_UPDATE, *map(address, (1, 2, 3, 4))),
        (EVENTS_TRACK_BULK, *map(address, (1, 3, 4))),
        (USERS_UPDATE, address(2)),
        (EVENTS_TRACK, address(2)),
        (EVENTS_TRACK, address(3)),
    }


def test_without_bulk_no_bulk_endpoint_is_called(program: Program, standin: StandIn, customers: Customers) -> None:
    program(database=customers(3))
    assert standin.counters()["calls"] == {USERS_UPDATE: 3, EVENTS_TRACK: 3}


# Groups and limits


@pytest.fixture(scope="module")
def thousands(customers: Customers) -> dict[str, str]:
    return customers(2500)


def sizes(standin: StandIn, endpoint: str) -> list[int]:
    return sorted(len(call["emails"]) for call in standin.state()["journal"] if call["endpoint"] == endpoint)


def test_groups_have_at_most_1000_users_and_a_last_one_goes_singly(
    program: Program, standin: StandIn, thousands: dict[str, str]
) -> None:
    ended = program("--bulk", "--limit", "2001", database=thousands)
    assert ended.summary == {"outcome": "completed", "total_users": 2001, "success": 2001, "calls": 6}
    assert {bulk: sizes(standin, bulk) for bulk in BOTH} == {bulk: [1000, 1000] for bulk in BOTH}
    assert {single: sizes(standin, single) for single in BULK} == {single: [1] for single in BULK}
    assert Counter(line["users_update"]["endpoint"] for line in ended.users.values()) == {
        USERS_BULK_UPDATE: 2000,
        USERS_UPDATE: 1,
    }
    assert (len(standin.state()["users"]), len(standin.state()["events"])) == (2001, 2001)


@pytest.fixture(scope="module")
def heavy(customers: Customers, server: DatabaseServer) -> Iterator[dict[str, str]]:
    """Twenty users of whom two make a megabyte."""
    database = customers(20)
    server.query("ALTER TABLE page_views DROP KEY page_views_recent, MODIFY location MEDIUMTEXT", database["DB_NAME"])
    server.query("UPDATE page_views SET location = REPEAT('x', 450000)", database["DB_NAME"])
    yield database
    server.query(f"DROP DATABASE {database['DB_NAME']}", "")


def test_groups_have_at_most_a_megabyte(program: Program, standin: StandIn, heavy: dict[str, str]) -> None:
    ended = program("--bulk", "--limit", "5", database=heavy)
    assert ended.summary == {"outcome": "completed", "total_users": 5, "success": 5, "calls": 6}
    assert {bulk: sizes(standin, bulk) for bulk in BOTH} == {bulk: [2, 2] for bulk in BOTH}


@pytest.mark.parametrize(("rate", "users", "most"), [("500", "20", 5), ("250", "10", 3)])
def test_bulk_calls_keep_their_share_of_their_limits(
    program: Program, standin: StandIn, heavy: dict[str, str], rate: str, users: str, most: int
) -> None:
    standin.configure(limit_users_bulk=5, limit_events_bulk=10)
    ended = program("--bulk", "--limit", users, database=heavy, ITERABLE_RATE_LIMIT=rate)
    assert ended.summary["success"] == int(users)
    counters = standin.counters()
    assert counters["throttled"] == 0
    assert counters["busiest_second"][USERS_BULK_UPDATE] <= most


# Runs that end early


@pytest.mark.parametrize(("endpoint", "code"), [(USERS_BULK_UPDATE, 401), (EVENTS_TRACK_BULK, 403)])
def test_a_key_that_a_bulk_endpoint_refuses_ends_the_run(
    program: Program, standin: StandIn, thousands: dict[str, str], endpoint: str, code: int
) -> None:
    standin.fault(endpoint=endpoint, status=code, body='{"msg":"Invalid API key","code":"BadApiKey","params":null}')
    ended = program("--bulk", database=thousands, MAX_WORKERS="1")
    summary, journal = ended.results["summary"], standin.state()["journal"]
    assert (ended.exit_code, summary["outcome"]) == (4, "aborted")
    assert "The run ended early: Iterable refused the API key" in ended.console
    status = "partial_failures" if endpoint == EVENTS_TRACK_BULK else "total_failures"
    assert [call["endpoint"] for call in journal] == [*BOTH][: 1 + BOTH.index(endpoint)]
    assert (summary[status], summary["not_attempted"]) == (1000, 1500)
    [reason] = summary["failure_reasons"]
    assert (reason["endpoint"], reason["status"], reason["code"], reason["count"]) == (
        endpoint,
        code,
        "BadApiKey",
        1000,
    )


def test_an_outage_in_a_bulk_run_is_given_up(program: Program, standin: StandIn, thousands: dict[str, str]) -> None:
    standin.fault(status=503, headers=LATE)
    ended = program("--bulk", database=thousands, MAX_WORKERS="5", ITERABLE_MAX_ATTEMPTS="2")
    summary = ended.results["summary"]
    assert (ended.exit_code, summary["outcome"]) == (4, "aborted")
    assert summary["total_failures"] >= 20
    assert summary["total_failures"] + summary["not_attempted"] == 2500
    assert standin.state()["users"] == {}


@pytest.mark.parametrize("fault", ["an answer as it should be", "an empty object", "500 for ever"])
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
    assert ended.exit_code == 143
    assert [line["status"] for _, line in sorted(ended.users.items())] == [
        "success",
        "not_attempted",
        "success",
        "success",
    ]
    assert sorted(state["users"]) == sorted(event["email"] for event in state["events"].values())
    assert USERS_UPDATE not in state["counters"]["calls"]
    assert {bulk: state["counters"]["calls"][bulk] for bulk in BOTH} == dict.fromkeys(BOTH, 1)
    assert_calls_are_true(ended, standin)


def lines_of(folder: Path) -> dict[str, str]:
    """The status of each user on record, in a file that may have no end."""
    lines = [line.rstrip(",") for path in folder.glob("integration_*.partial") for line in path.read_text().split("\n")]
    users = [json.loads(line) for line in lines if line.startswith('{"record"')]
    return {line["email"]: line["status"] for line in users}


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_bulk_run_loses_nobody_and_only_groups_in_flight_are_sent_again(
    started: Started, program: Program, standin: StandIn, thousands: dict[str, str], folder: Path, number: int
) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    standin.configure(latency=chance.choice([0.0, 0.03, 0.1]))
    run = started("--bulk", database=thousands, MAX_WORKERS="2")
    standin.wait_for_calls(chance.randrange(1, 7))
    run.process.kill()
    run.wait()
    on_record, before = lines_of(folder), standin.state()["accepted"]
    again = program("--bulk", "--changed-only", database=thousands)
    state = standin.state()
    assert (again.exit_code, again.summary.get("unchanged", 0)) == (0, len(on_record))
    assert set(on_record.values()) <= {"success"}
    assert sorted(state["users"]) == sorted(event["email"] for event in state["events"].values())
    assert len(state["users"]) == 2500
    assert state["violations"] == []
    for bulk in BOTH:
        twice = {identity for identity, times in state["accepted"][bulk].items() if times > 1}
        assert len(twice) <= 2000  # two groups in flight
        assert all(times <= 2 for times in state["accepted"][bulk].values())
        emails = {state["events"][each]["email"] if bulk == EVENTS_TRACK_BULK else each for each in twice}
        assert not emails & on_record.keys()
        assert twice <= before.get(bulk, {}).keys()
    assert program("--bulk", "--changed-only", database=thousands).summary["unchanged"] == 2500


def test_who_was_not_confirmed_before_a_stop_is_sent_again_though_the_row_is_what_it_was(
    started: Started, program: Program, standin: StandIn, customers: Customers, server: DatabaseServer
) -> None:
    database = customers(3)
    assert program("--bulk", database=database).exit_code == 0
    before = standin.state()["users"]
    server.query("UPDATE customers SET first_name = 'New'", database["DB_NAME"])
    standin.fault(endpoint=USERS_BULK_UPDATE, status=503, processed=True, latency=0.5, times=1)
    run = started("--bulk", "--changed-only", database=database)
    standin.wait_for_calls(1 + 2)
    run.signal(signal.SIGTERM)
    assert run.wait().summary["partial_failures"] == 3  # the update has no answer, and may have been made
    assert {fields["first_name"] for fields in standin.state()["users"].values()} == {"New"}
    server.query("UPDATE customers SET first_name = 'Ann'", database["DB_NAME"])
    assert program("--bulk", "--changed-only", database=database).summary["success"] == 3
    assert standin.state()["users"] == before
