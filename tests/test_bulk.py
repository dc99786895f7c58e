"""`--bulk`: groups of users, each of whom ends as in a run of single calls."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lab.database import DatabaseServer
from lab.expected import CALLS, address, find_delivered
from lab.process import CreateCustomers, Ended, RunMain, StartMain, run, settings_for
from lab.standin_handle import (
    EVENTS_TRACK,
    EVENTS_TRACK_BULK,
    USERS_BULK_UPDATE,
    USERS_UPDATE,
    StandIn,
)
from lab.standin_project import make_document

BULK_ENDPOINTS = {USERS_UPDATE: USERS_BULK_UPDATE, EVENTS_TRACK: EVENTS_TRACK_BULK}
BOTH = list(BULK_ENDPOINTS.values())
IDENTITIES = ["email", "userId"]
PAGE = "<html><h1>Sign in</h1></html>"
FEW_ATTEMPTS: dict[str, Any] = {"ITERABLE_MAX_ATTEMPTS": "2", "ITERABLE_TIMEOUT": "2"}


@pytest.fixture(scope="module")
def thousands(create_customers: CreateCustomers) -> dict[str, str]:
    return create_customers(2500)


# Each user ends as in a run of single calls

# In this project, first names and locations are dates, see `prepare_project`.
GOOD: dict[str, Any] = {"first_name": "2024-02-29", "location": None}
KINDS: dict[str, dict[str, Any]] = {
    "good": GOOD,
    "invalid address": {**GOOD, "id": 101, "email": "bad@nowhere"},
    "forgotten": {**GOOD, "id": 102, "email": "forgotten@example.com"},
    "no address": {**GOOD, "id": 103, "email": None},
    "same address": {**GOOD, "id": 104, "email": " User1@example.com"},
    "unknown to trackBulk": {**GOOD, "id": 105, "email": "unknown@example.com"},
    "conflict": {**GOOD, "id": 106, "email": "conflict@example.com"},
    "type clash of the user": {**GOOD, "first_name": "Ann"},
    "type clash of the event": {**GOOD, "location": "Berlin"},
}
FIELD_TYPES = {"first_name": "date"}
EVENT_FIELD_TYPES = {"page_view": {"location": "date"}}
SPECIAL_USERS = {
    "email": {
        "forgotten": "forgotten@example.com",
        "unknown": "unknown@example.com",
        "conflict": "conflict@example.com",
    },
    "userId": {"forgotten": "102", "unknown": "105", "conflict": "106"},
}
LIST_ENDINGS = {"email": "Emails", "userId": "UserIds"}

# Of a bulk endpoint, one after the other.
FAULTS: dict[str, list[dict[str, Any]]] = {
    "no fault": [],
    "more were taken than were sent": [{"alter": {"successCount": 99}}],
    "the answer of a single call": [
        {"status": 200, "body": json.dumps(make_document("Success", ""))}
    ],
    "a page with 200": [{"status": 200, "body": PAGE}],
    "413 for all": [{"status": 413, "body": PAGE}],
    "503 for ever, but taken": [{"status": 503, "processed": True}],
    "an answer cut short, but taken": [{"action": "cut"}],
    "429, then a lost answer": [
        {"status": 429, "times": 1},
        {"action": "reset_after", "times": 1},
    ],
}
PROJECTS: dict[str, dict[str, Any]] = {
    "the type of one user is listed": {"type_clash": "list"},
    "the type of one user refuses the group": {"type_clash": "refuse"},
    "the event is disallowed": {"disallowed": ["page_view"]},
}


def prepare_project(
    standin: StandIn, *, identify_by: str = "email", **settings: Any
) -> None:
    """Let the stand-in be an empty project with types and users of its own."""
    users = SPECIAL_USERS[identify_by]
    not_found = f"notFound{LIST_ENDINGS[identify_by]}"
    conflict = f"conflict{LIST_ENDINGS[identify_by]}"
    refused = {
        USERS_BULK_UPDATE: {users["conflict"]: [conflict, users["conflict"]]},
        EVENTS_TRACK_BULK: {users["unknown"]: [not_found, users["unknown"]]},
    }
    project: dict[str, Any] = {
        "identify_by": identify_by,
        "field_types": FIELD_TYPES,
        "event_field_types": EVENT_FIELD_TYPES,
        "forgotten": [users["forgotten"]],
        "refused": refused,
    }
    standin.reset()
    standin.configure(**{**project, **settings})
    standin.fault(
        endpoint=USERS_UPDATE,
        user=users["conflict"],
        status=409,
        body=json.dumps(make_document("EmailAlreadyExists", "taken")),
    )


class Account(NamedTuple):
    """What a run leaves behind that `--bulk` may not change."""

    exit_code: int
    lines: dict[int, dict[str, Any]]
    counts: dict[str, Any]
    reasons: list[str]
    users: dict[str, Any]
    events: dict[str, Any]


def read_account(ended: Ended, standin: StandIn) -> Account:
    state = standin.state()
    assert state["violations"] == []
    assert ended.errors == ""
    counts = ended.summary
    reasons = counts.pop("failure_reasons", [])
    counts.pop("calls", None)
    counts.pop("retries", None)
    return Account(
        exit_code=ended.exit_code,
        lines={
            number: without_accepted_calls(line) for number, line in ended.lines.items()
        },
        counts=counts,
        reasons=sorted(str(reason) for reason in reasons),
        users=state["users"],
        events=state["events"],
    )


def without_accepted_calls(line: dict[str, Any]) -> dict[str, Any]:
    """Return a user's line with True for a call that was accepted, by any endpoint."""
    line = dict(line)
    for name in CALLS:
        if line[name] and line[name]["ok"]:
            line[name] = True
    return line


def assert_calls_are_true(ended: Ended, standin: StandIn, *, identify_by: str) -> None:
    """Check the calls on record by the stand-in's journal."""
    journal = standin.state()["journal"]
    different = {(call["endpoint"], *call["users"]) for call in journal}
    summary = ended.results["summary"]
    assert summary["calls"] == len(journal)
    assert summary["retries"] == len(journal) - len(different)
    for line in ended.lines.values():
        user = str(line["user_id"]) if identify_by == "userId" else line["email"]
        arrived = [call["endpoint"] for call in journal if user in call["users"]]
        for name, endpoint in CALLS.items():
            if line[name]:
                assert_call_is_true(line[name], endpoint, arrived)


def assert_call_is_true(call: dict[str, Any], single: str, arrived: list[str]) -> None:
    """Check a call on record by the endpoints of its user's calls, in their order."""
    bulk = BULK_ENDPOINTS[single]
    of_its_kind = [endpoint for endpoint in arrived if endpoint in (single, bulk)]
    assert call["endpoint"] == of_its_kind[-1]
    assert call["attempts"] == of_its_kind.count(call["endpoint"])
    if call["endpoint"] == bulk:
        assert call["ok"]
        assert call["code"] is None


@pytest.fixture(scope="module")
def mixed(create_customers: CreateCustomers) -> dict[str, str]:
    """One user of each kind, without those for whom a whole group may be refused."""
    return create_customers(
        [
            row
            for kind, row in KINDS.items()
            if kind != "conflict" and "clash" not in kind
        ]
    )


@pytest.fixture(scope="module")
def single_accounts(
    session_standin: StandIn,
    mixed: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Account]:
    """What runs of single calls leave of the `mixed` users, by identity."""
    accounts = {}
    for identify_by in IDENTITIES:
        prepare_project(session_standin, identify_by=identify_by)
        folder = tmp_path_factory.mktemp("singly")
        settings = settings_for(
            mixed,
            session_standin.url,
            folder,
            ITERABLE_IDENTIFY_BY=identify_by,
            **FEW_ATTEMPTS,
        )
        ended = run(settings=settings, folder=folder)
        accounts[identify_by] = read_account(ended, session_standin)
    return accounts


@pytest.mark.parametrize("identify_by", IDENTITIES)
@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_any_answer_to_a_group_ends_as_singly(
    run_main: RunMain,
    standin: StandIn,
    mixed: dict[str, str],
    single_accounts: dict[str, Account],
    faults: list[dict[str, Any]],
    endpoint: str,
    identify_by: str,
) -> None:
    prepare_project(standin, identify_by=identify_by)
    for fault in faults:
        standin.fault(endpoint=endpoint, **fault)

    ended = run_main(
        "--bulk", database=mixed, ITERABLE_IDENTIFY_BY=identify_by, **FEW_ATTEMPTS
    )

    assert read_account(ended, standin) == single_accounts[identify_by]
    assert_calls_are_true(ended, standin, identify_by=identify_by)


@pytest.mark.parametrize("identify_by", IDENTITIES)
@pytest.mark.parametrize("project", PROJECTS.values(), ids=PROJECTS.keys())
def test_a_refused_user_ends_as_singly(
    run_main: RunMain,
    standin: StandIn,
    create_customers: CreateCustomers,
    project: dict[str, Any],
    identify_by: str,
) -> None:
    rows = [row for kind, row in KINDS.items() if kind != "conflict"]
    database = create_customers([*rows, GOOD])

    assert_same_in_bulk(
        run_main, standin, database, identify_by=identify_by, project=project
    )


def test_a_conflict_may_name_another_of_the_group(
    run_main: RunMain, standin: StandIn, create_customers: CreateCustomers
) -> None:
    database = create_customers([GOOD, KINDS["conflict"], GOOD])
    refused = {
        USERS_BULK_UPDATE: {"conflict@example.com": ["conflictEmails", address(1)]}
    }

    assert_same_in_bulk(run_main, standin, database, project={"refused": refused})


def assert_same_in_bulk(
    run_main: RunMain,
    standin: StandIn,
    database: dict[str, str],
    *,
    identify_by: str = "email",
    project: dict[str, Any],
    faults: list[dict[str, Any]] | None = None,
) -> None:
    """Run singly, then in bulk with the faults, and compare."""
    settings = {"ITERABLE_IDENTIFY_BY": identify_by, **FEW_ATTEMPTS}
    prepare_project(standin, identify_by=identify_by, **project)
    ended_singly = run_main(database=database, **settings)
    account_singly = read_account(ended_singly, standin)
    prepare_project(standin, identify_by=identify_by, **project)
    for fault in faults or []:
        standin.fault(**fault)

    ended = run_main("--bulk", database=database, **settings)

    assert read_account(ended, standin) == account_singly
    assert_calls_are_true(ended, standin, identify_by=identify_by)


@hypothesis_settings(
    max_examples=6, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(
    kinds=st.lists(st.sampled_from([*KINDS, "good"]), min_size=1, max_size=8),
    faults=st.lists(
        st.tuples(st.sampled_from(BOTH), st.sampled_from(sorted(FAULTS))), max_size=3
    ),
    type_clash=st.sampled_from(["refuse", "list"]),
    identify_by=st.sampled_from(IDENTITIES),
)
def test_any_users_and_faults_end_as_singly(
    run_main: RunMain,
    standin: StandIn,
    create_customers: CreateCustomers,
    kinds: list[str],
    faults: list[tuple[str, str]],
    type_clash: str,
    identify_by: str,
) -> None:
    rows = {}
    for number, kind in enumerate(kinds, 1):
        row = {"id": number, "email": address(number), **KINDS[kind]}
        rows[row["id"]] = row
    each_once = [
        {"endpoint": endpoint, "times": 1, **fault}
        for endpoint, name in faults
        for fault in FAULTS[name]
    ]

    assert_same_in_bulk(
        run_main,
        standin,
        create_customers(list(rows.values())),
        identify_by=identify_by,
        project={"type_clash": type_clash},
        faults=each_once,
    )


def test_only_unconfirmed_users_are_sent_singly(
    run_main: RunMain, standin: StandIn, create_customers: CreateCustomers
) -> None:
    standin.configure(
        refused={
            USERS_BULK_UPDATE: {address(2): ["invalidEmails", "USER2@Example.COM"]},
            EVENTS_TRACK_BULK: {address(3): ["notFoundEmails", address(3)]},
        }
    )

    ended = run_main("--bulk", database=create_customers(4))

    assert ended.summary == {
        "outcome": "completed",
        "total_users": 4,
        "success": 4,
        "calls": 5,
    }
    journal = standin.state()["journal"]
    assert {(call["endpoint"], *call["users"]) for call in journal} == {
        (USERS_BULK_UPDATE, address(1), address(2), address(3), address(4)),
        (EVENTS_TRACK_BULK, address(1), address(3), address(4)),
        (USERS_UPDATE, address(2)),
        (EVENTS_TRACK, address(2)),
        (EVENTS_TRACK, address(3)),
    }


def test_user_ids_in_an_answer_are_case_sensitive(
    run_main: RunMain,
    standin: StandIn,
    server: DatabaseServer,
    create_customers: CreateCustomers,
) -> None:
    database = create_customers(2)
    for table, column in (("customers", "id"), ("page_views", "user_id")):
        server.query(
            f"ALTER TABLE {table} MODIFY {column} VARCHAR(9) COLLATE utf8mb4_bin",
            database["DB_NAME"],
        )
        server.query(
            f"UPDATE {table} SET {column} = IF({column} = '1', 'ann', 'Ann')",
            database["DB_NAME"],
        )
    refused = {USERS_BULK_UPDATE: {"Ann": ["notFoundUserIds", "Ann"]}}
    standin.configure(identify_by="userId", refused=refused)

    ended = run_main("--bulk", database=database, ITERABLE_IDENTIFY_BY="userId")

    assert ended.summary["success"] == 2
    assert find_delivered(standin) == {"ann", "Ann"}
    journal = standin.state()["journal"]
    updates = [call for call in journal if call["endpoint"] == USERS_UPDATE]
    assert [call["user"] for call in updates] == ["Ann"]


def test_the_line_of_a_user_delivered_in_bulk(
    run_main: RunMain, create_customers: CreateCustomers
) -> None:
    ended = run_main("--bulk", database=create_customers(2))

    accepted = {"ok": True, "status": 200, "code": None, "message": "", "attempts": 1}
    line = ended.lines[1]
    assert line["users_update"] == {"endpoint": USERS_BULK_UPDATE, **accepted}
    assert line["events_track"] == {"endpoint": EVENTS_TRACK_BULK, **accepted}


# The size of groups


def count_group_sizes(standin: StandIn) -> Counter[tuple[str, int]]:
    """Count the calls by endpoint and number of users."""
    journal = standin.state()["journal"]
    return Counter((call["endpoint"], len(call["users"])) for call in journal)


def test_groups_have_at_most_1000_users(
    run_main: RunMain, standin: StandIn, thousands: dict[str, str]
) -> None:
    ended = run_main("--bulk", "--limit", "2001", database=thousands)

    assert ended.summary["success"] == 2001
    assert ended.summary["calls"] == 6
    assert len(find_delivered(standin)) == 2001
    assert count_group_sizes(standin) == {
        (USERS_BULK_UPDATE, 1000): 2,
        (EVENTS_TRACK_BULK, 1000): 2,
        (USERS_UPDATE, 1): 1,
        (EVENTS_TRACK, 1): 1,
    }


@pytest.fixture
def large_rows(
    create_customers: CreateCustomers, server: DatabaseServer
) -> dict[str, str]:
    """Eight customers whose events have 450 KB each."""
    database = create_customers(8)
    name = database["DB_NAME"]
    server.query("ALTER TABLE page_views DROP KEY page_views_recent", name)
    server.query("ALTER TABLE page_views MODIFY location MEDIUMTEXT", name)
    server.query("UPDATE page_views SET location = REPEAT('x', 450000)", name)
    return database


def test_groups_have_at_most_a_megabyte(
    run_main: RunMain, standin: StandIn, large_rows: dict[str, str]
) -> None:
    ended = run_main("--bulk", database=large_rows, ITERABLE_RATE_LIMIT="250")

    assert ended.summary["success"] == 8
    assert count_group_sizes(standin) == {
        (USERS_BULK_UPDATE, 2): 4,
        (EVENTS_TRACK_BULK, 2): 4,
    }
    # The half of 500 single calls a second is 2.5 of 5 in bulk.
    assert standin.counters()["busiest_second"][USERS_BULK_UPDATE] <= 3


# Fields that a project drops


def test_dropped_fields_are_named_once_under_quiet(
    run_main: RunMain, standin: StandIn, thousands: dict[str, str]
) -> None:
    standin.configure(drop_unknown_fields=True, field_types={"plan_type": "string"})

    ended = run_main("--bulk", "--quiet", "--limit", "2000", database=thousands)

    assert ended.exit_code == 0
    assert ended.summary["success"] == 2000
    warnings = [line for line in ended.console.splitlines() if line]
    assert len(warnings) == 1
    for field in ("first_name", "recent_page_view", "candidate"):
        assert field in warnings[0]
    assert "plan_type" not in warnings[0]


# Runs that end early


@pytest.mark.parametrize(
    ("endpoint", "status", "counted_as", "expected_calls"),
    [
        (USERS_BULK_UPDATE, 401, "total_failures", [USERS_BULK_UPDATE]),
        (EVENTS_TRACK_BULK, 403, "partial_failures", BOTH),
    ],
)
def test_a_key_refused_in_bulk_ends_the_run(
    run_main: RunMain,
    standin: StandIn,
    thousands: dict[str, str],
    endpoint: str,
    status: int,
    counted_as: str,
    expected_calls: list[str],
) -> None:
    refusal = json.dumps(make_document("BadApiKey", "Invalid API key"))
    standin.fault(endpoint=endpoint, status=status, body=refusal)

    ended = run_main("--bulk", database=thousands, MAX_WORKERS="1")

    assert ended.exit_code == 4
    assert "The run ended early: Iterable refused the API key" in ended.console
    calls = [call["endpoint"] for call in standin.state()["journal"]]
    assert calls == expected_calls
    summary = ended.summary
    [reason] = summary.pop("failure_reasons")
    assert reason["endpoint"] == endpoint
    assert reason["status"] == status
    assert reason["count"] == 1000
    assert summary == {
        "outcome": "aborted",
        "exit_code": 4,
        "total_users": 2500,
        counted_as: 1000,
        "not_attempted": 1500,
        "calls": len(calls),
    }


def test_an_outage_ends_a_bulk_run(
    run_main: RunMain, standin: StandIn, thousands: dict[str, str]
) -> None:
    standin.fault(status=503)

    ended = run_main(
        "--bulk", database=thousands, MAX_WORKERS="5", ITERABLE_MAX_ATTEMPTS="2"
    )

    assert ended.exit_code == 4
    summary = ended.results["summary"]
    assert summary["outcome"] == "aborted"
    assert summary["total_failures"] >= 20
    assert summary["total_failures"] + summary["not_attempted"] == 2500
    assert standin.state()["users"] == {}


@pytest.mark.parametrize(
    "name", ["no fault", "a page with 200", "503 for ever, but taken"]
)
def test_sigterm_lets_updated_users_get_their_events(
    start_main: StartMain,
    standin: StandIn,
    create_customers: CreateCustomers,
    name: str,
) -> None:
    for fault in FAULTS[name]:
        standin.fault(endpoint=EVENTS_TRACK_BULK, **fault)
    standin.fault(endpoint=USERS_BULK_UPDATE, latency=0.5)
    refused = {USERS_BULK_UPDATE: {address(2): ["notFoundEmails", address(2)]}}
    standin.configure(refused=refused)
    running = start_main("--bulk", database=create_customers(4))
    standin.wait_for_calls(1)

    running.signal(signal.SIGTERM)
    ended = running.wait()

    assert ended.exit_code == 143
    statuses = {number: line["status"] for number, line in ended.lines.items()}
    assert statuses == {1: "success", 2: "not_attempted", 3: "success", 4: "success"}
    assert find_delivered(standin) == {address(1), address(3), address(4)}
    calls = standin.counters()["calls"]
    assert USERS_UPDATE not in calls
    assert calls[USERS_BULK_UPDATE] == 1
    assert calls[EVENTS_TRACK_BULK] == 1
    assert_calls_are_true(ended, standin, identify_by="email")


def test_users_perhaps_delivered_before_sigterm_are_sent_again(
    start_main: StartMain,
    run_main: RunMain,
    standin: StandIn,
    create_customers: CreateCustomers,
) -> None:
    database = create_customers(3)
    standin.fault(
        endpoint=USERS_BULK_UPDATE, status=503, processed=True, latency=0.5, times=1
    )
    running = start_main("--bulk", database=database)
    standin.wait_for_calls(1)
    running.signal(signal.SIGTERM)
    assert running.wait().exit_code == 143
    assert len(standin.state()["users"]) == 3

    ended = run_main("--bulk", "--changed-only", database=database)

    assert ended.summary["success"] == 3


# Killed runs


def read_users_on_record(folder: Path) -> set[str]:
    """Return the user IDs in the partial file of a killed run."""
    [path] = folder.glob("integration_results_*.json.partial")
    users = set()
    for line in path.read_text("utf-8").split("\n"):
        if line.startswith('{"record"'):
            document = json.loads(line.rstrip(","))
            assert document["status"] == "success"
            users.add(str(document["user_id"]))
    return users


def find_repeated(standin: StandIn, user_ids: dict[str, str]) -> set[str]:
    """Return the user IDs of all users with a call that was accepted twice."""
    state = standin.state()
    owners = {}
    for event_id, event in state["events"].items():
        owners[event_id] = event.get("email") or event["userId"]
    repeated = set()
    for counts in state["accepted"].values():
        for name, times in counts.items():
            if times > 1:
                repeated.add(user_ids[owners.get(name, name)])
    return repeated


@pytest.mark.parametrize("identify_by", IDENTITIES)
@pytest.mark.parametrize("number", range(int(os.environ.get("KILL_ROUNDS", "1"))))
def test_a_killed_bulk_run_is_completed_by_the_next(
    start_main: StartMain,
    run_main: RunMain,
    standin: StandIn,
    thousands: dict[str, str],
    number: int,
    identify_by: str,
) -> None:
    seed = random.randrange(1_000_000)
    print(f"round {number}, seed {seed}")
    chance = random.Random(seed)
    latency = chance.choice([0.0, 0.03, 0.1])
    standin.configure(latency=latency, identify_by=identify_by)
    settings: dict[str, Any] = {"ITERABLE_IDENTIFY_BY": identify_by}
    running = start_main("--bulk", database=thousands, MAX_WORKERS="2", **settings)
    standin.wait_for_calls(chance.randrange(1, 7))
    running.process.kill()
    folder = running.wait().folder
    on_record = read_users_on_record(folder)

    ended = run_main("--bulk", "--changed-only", database=thousands, **settings)

    assert ended.exit_code == 0
    assert ended.summary.get("unchanged", 0) == len(on_record)
    delivered = find_delivered(standin)
    assert len(delivered) == 2500
    assert standin.state()["violations"] == []
    user_ids = {address(number): str(number) for number in range(1, 2501)}
    if identify_by == "userId":
        user_ids = {user_id: user_id for user_id in delivered}
    assert find_repeated(standin, user_ids) & on_record == set()
