"""`--reset-left`: users who left the segment get `recent_page_view` false.

Most promises are tested with either identity, singly and in bulk.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lab.expected import address, assert_counts_add_up
from lab.process import CreateCustomers, Ended, RunMain
from lab.segment import SINGLE_WAYS, WAYS, CreateSegment, Segment, Way
from lab.standin_handle import (
    ANY,
    EVENTS_TRACK,
    USERS_BULK_UPDATE,
    USERS_UPDATE,
    StandIn,
)

REFUSAL = json.dumps({"msg": "No", "code": "BadParams", "params": None})
RESET_LINE = "Left the segment, recent_page_view reset"


def create_delivered(create_segment: CreateSegment, way: Way) -> Segment:
    """Create three customers, of whom all were delivered."""
    segment = create_segment(way)
    assert segment.run().exit_code == 0
    return segment


@pytest.fixture(params=WAYS, ids=str)
def delivered(request: pytest.FixtureRequest, create_segment: CreateSegment) -> Segment:
    """Three customers who were delivered, in each way."""
    return create_delivered(create_segment, request.param)


@pytest.fixture(params=SINGLE_WAYS, ids=str)
def delivered_singly(
    request: pytest.FixtureRequest, create_segment: CreateSegment
) -> Segment:
    """Three customers who were delivered singly, with either identity."""
    return create_delivered(create_segment, request.param)


@pytest.fixture
def by_email(create_segment: CreateSegment) -> Segment:
    """Three customers who were delivered singly by their addresses."""
    return create_delivered(create_segment, Way("email"))


@pytest.fixture
def by_user_id(create_segment: CreateSegment) -> Segment:
    """Three customers who were delivered singly by their user IDs."""
    return create_delivered(create_segment, Way("userId"))


def list_statuses(ended: Ended) -> dict[int, str]:
    """Return the statuses of all users on record, by customer."""
    return {line["user_id"]: line["status"] for line in ended.results["results"]}


# What is sent


def test_a_user_who_left_is_reset(delivered: Segment, standin: StandIn) -> None:
    delivered.leave(2)

    ended = delivered.run("--reset-left")

    assert ended.exit_code == 0
    assert ended.errors == ""
    way = delivered.way
    assert standin.state()["violations"] == []
    assert standin.state()["users"] == {
        way.identity(1): way.user_fields(1),
        way.identity(2): way.user_fields(2, recent_page_view=False),
        way.identity(3): way.user_fields(3),
    }
    sent = delivered.deliveries(1, 3) + delivered.resets(2)
    assert sorted(delivered.sent()) == sorted(sent)


def test_a_user_of_another_plan_is_reset(delivered_singly: Segment) -> None:
    delivered_singly.change("UPDATE customers SET plan_type = 'basic' WHERE id = 2")

    ended = delivered_singly.run("--reset-left")

    assert ended.summary["reset"] == 1
    assert delivered_singly.reset_users() == delivered_singly.identities(2)


def test_without_the_option_nobody_is_reset(delivered_singly: Segment) -> None:
    delivered_singly.leave(2)

    ended = delivered_singly.run()

    assert ended.summary["total_users"] == 2
    assert delivered_singly.reset_users() == set()


def test_resets_come_after_the_rows(delivered: Segment) -> None:
    delivered.leave(1)

    delivered.run("--reset-left", MAX_WORKERS="1")

    updates = [call for call in delivered.sent() if call[0] == USERS_UPDATE]
    assert updates[-1:] == delivered.resets(1)


def test_a_user_is_reset_once(delivered: Segment) -> None:
    delivered.leave(2)
    delivered.run("--reset-left", "--changed-only")

    ended = delivered.run("--reset-left", "--changed-only")

    assert ended.summary == {"outcome": "completed", "total_users": 2, "unchanged": 2}
    assert delivered.sent() == []


def test_thousands_of_users_are_reset_in_groups(
    create_segment: CreateSegment, standin: StandIn
) -> None:
    segment = create_segment(Way("email", bulk=True), rows=2500)
    segment.run()
    segment.change("UPDATE customers SET plan_type = 'basic' WHERE id > 1")

    ended = segment.run("--reset-left", "--changed-only")

    assert ended.summary == {
        "outcome": "completed",
        "total_users": 2500,
        "unchanged": 1,
        "reset": 2499,
        "calls": 3,
    }
    assert len(segment.reset_users()) == 2499
    assert segment.set_users() == {address(1)}


# What is on record and on the console


def test_the_line_of_a_reset(by_email: Segment) -> None:
    by_email.leave(2)

    ended = by_email.run("--reset-left", "--changed-only")

    line = ended.lines[3]
    assert len(line.pop("fingerprint")) == 64
    assert line == {
        "record": 3,
        "user_id": 2,
        "email": address(2),
        "event_id": None,
        "status": "reset",
        "users_update": {
            "endpoint": USERS_UPDATE,
            "ok": True,
            "status": 200,
            "code": "Success",
            "message": "",
            "attempts": 1,
        },
        "events_track": None,
    }


def test_a_reset_in_bulk_names_its_endpoint(create_segment: CreateSegment) -> None:
    segment = create_delivered(create_segment, Way("userId", bulk=True))
    segment.leave(1, 2)

    ended = segment.run("--reset-left", "--changed-only")

    assert ended.lines[2]["users_update"] == {
        "endpoint": USERS_BULK_UPDATE,
        "ok": True,
        "status": 200,
        "code": None,
        "message": "",
        "attempts": 1,
    }


def test_the_summary_counts_resets(delivered: Segment) -> None:
    delivered.leave(1, 2)

    ended = delivered.run("--reset-left")

    summary = ended.summary
    calls = summary.pop("calls")
    assert calls == delivered_calls(delivered, resets=2)
    assert summary == {
        "outcome": "completed",
        "total_users": 3,
        "success": 1,
        "reset": 2,
    }
    assert_counts_add_up(ended)


def delivered_calls(segment: Segment, *, resets: int) -> int:
    """Return the calls for one user who is delivered, and some who are reset."""
    # A group of one user goes to the single endpoints.
    return 2 if segment.way.bulk else 2 + resets


def test_the_console_counts_resets(delivered_singly: Segment) -> None:
    delivered_singly.leave(1, 2)

    ended = delivered_singly.run("--reset-left", "--changed-only")

    before, after = ended.console.split("[STEP 5] Processing user records...")
    assert "Found 1 pro user(s) with recent engagement\n" in before
    assert "Found 2 user(s) who left the segment\n" in before
    assert "\nTotal users processed: 3\n" in after
    assert f"\n{RESET_LINE}: 2\n" in after
    assert f"\n✓ {RESET_LINE}: {address(2)}\n" in after


def test_many_resets_have_no_line_each(create_segment: CreateSegment) -> None:
    segment = create_segment(Way("email", bulk=True), rows=101)
    segment.run()
    segment.change("UPDATE customers SET plan_type = 'basic'")

    ended = segment.run("--reset-left")

    assert f"\n{RESET_LINE}: 101\n" in ended.console
    assert "Processing record" not in ended.console
    assert f"{RESET_LINE}: {address(101)}" not in ended.console
    assert ended.log.count(f"{RESET_LINE}: user") == 101


def test_a_quiet_run_says_nothing_of_resets(delivered_singly: Segment) -> None:
    delivered_singly.leave(1)

    ended = delivered_singly.run("--reset-left", "--quiet")

    assert ended.exit_code == 0
    assert ended.console == ""
    assert delivered_singly.reset_users() == delivered_singly.identities(1)


# Who is left alone


def test_deleted_customers_are_left_alone(delivered_singly: Segment) -> None:
    delivered_singly.change("DELETE FROM customers WHERE id = 2")

    ended = delivered_singly.run("--reset-left", "--changed-only")

    assert ended.exit_code == 0
    assert ended.summary["total_users"] == 2
    assert delivered_singly.sent() == []


@pytest.mark.parametrize("email", ["'new@example.com'", "NULL", "''"])
def test_old_addresses_are_left_alone(by_email: Segment, email: str) -> None:
    by_email.leave(2)
    by_email.change(f"UPDATE customers SET email = {email} WHERE id = 2")

    ended = by_email.run("--reset-left", "--changed-only")

    assert ended.exit_code == 0
    assert ended.summary["total_users"] == 2
    assert by_email.sent() == []


def test_an_address_in_another_case_is_the_same(by_email: Segment) -> None:
    by_email.leave(2)
    by_email.change("UPDATE customers SET email = ' User2@Example.COM ' WHERE id = 2")

    by_email.run("--reset-left", "--changed-only")

    assert by_email.sent() == by_email.resets(2)


def test_an_address_that_another_took_over_is_left(by_email: Segment) -> None:
    by_email.leave(2)
    by_email.change("UPDATE customers SET email = NULL WHERE id = 2")
    by_email.change(f"UPDATE customers SET email = '{address(2)}' WHERE id = 3")

    by_email.run("--reset-left", "--changed-only")

    assert by_email.sent() == [
        (USERS_UPDATE, address(2)),
        (EVENTS_TRACK, address(2)),
    ]


def test_a_user_id_is_reset_at_any_address(by_user_id: Segment) -> None:
    by_user_id.leave(2)
    by_user_id.change("UPDATE customers SET email = NULL WHERE id = 2")

    by_user_id.run("--reset-left", "--changed-only")

    assert by_user_id.sent() == by_user_id.resets(2)


def test_a_row_that_cannot_be_sent_has_not_left(delivered_singly: Segment) -> None:
    delivered_singly.change("UPDATE page_views SET id = 10 WHERE id = 2")
    delivered_singly.change(
        "ALTER TABLE page_views MODIFY id VARCHAR(50), DROP PRIMARY KEY"
    )
    delivered_singly.change("UPDATE page_views SET id = 'no id' WHERE user_id = 2")

    ended = delivered_singly.run("--reset-left", "--changed-only")

    assert list_statuses(ended) == {2: "total_failure"}
    assert delivered_singly.sent() == []


def test_runs_of_another_url_are_no_memory(
    delivered_singly: Segment, standin: StandIn
) -> None:
    delivered_singly.leave(2)
    other_url = standin.url.replace("127.0.0.1", "localhost")

    ended = delivered_singly.run("--reset-left", url=other_url)

    assert ended.summary["total_users"] == 2
    assert delivered_singly.reset_users() == set()


@pytest.mark.parametrize(("first", "second"), [SINGLE_WAYS, SINGLE_WAYS[::-1]], ids=str)
def test_runs_of_another_identity_are_no_memory(
    create_segment: CreateSegment, standin: StandIn, first: Way, second: Way
) -> None:
    segment = create_delivered(create_segment, first)
    segment.leave(2)
    standin.configure(identify_by="hybrid")

    ended = segment.run("--reset-left", ITERABLE_IDENTIFY_BY=second.identify_by)

    assert ended.summary["total_users"] == 2
    assert segment.reset_users() == set()


def test_runs_with_another_key_are_memory(by_email: Segment, standin: StandIn) -> None:
    by_email.leave(2)
    standin.configure(key="f" * 32)

    by_email.run("--reset-left", ITERABLE_API_KEY="f" * 32)

    assert by_email.reset_users() == {address(2)}


# An emptied table


def test_at_least_guards_an_emptied_table(delivered_singly: Segment) -> None:
    delivered_singly.change("DELETE FROM page_views")

    ended = delivered_singly.run("--reset-left", "--at-least", "1")

    assert ended.exit_code == 3
    assert "0 users found, fewer than --at-least 1" in ended.console
    assert delivered_singly.sent() == []
    assert len(ended.documents) == 1


def test_at_least_does_not_count_resets(by_email: Segment) -> None:
    by_email.leave(2)

    ended = by_email.run("--reset-left", "--at-least", "3")

    assert ended.exit_code == 3
    assert by_email.sent() == []


def test_with_a_limit_it_is_a_usage_error(
    run_main: RunMain, create_customers: CreateCustomers, standin: StandIn
) -> None:
    ended = run_main("--reset-left", "--limit", "1", database=create_customers(1))

    assert ended.exit_code == 2
    assert "--limit" in ended.errors
    assert standin.counters()["connections"] == 0


# A dry run


def test_a_dry_run_shows_whom_a_run_would_reset(delivered: Segment) -> None:
    delivered.leave(2, 3)

    ended = delivered.run(
        "--reset-left", "--changed-only", "--dry-run", ITERABLE_API_KEY=""
    )

    assert ended.exit_code == 0
    assert delivered.sent() == []
    assert "Found 2 user(s) who left the segment\n" in ended.console
    way = delivered.way
    assert list_reset_payloads(ended) == [
        {way.identify_by: way.identity(2), "dataFields": {"recent_page_view": False}},
        {way.identify_by: way.identity(3), "dataFields": {"recent_page_view": False}},
    ]


def list_reset_payloads(ended: Ended) -> list[dict[str, Any]]:
    """Return the updates in a dry run's file of users who get no event, sorted."""
    payloads = [line["payloads"] for line in ended.lines.values()]
    resets = [
        payload["users_update"] for payload in payloads if not payload["events_track"]
    ]
    return sorted(resets, key=str)


def test_a_dry_run_shows_the_cost_of_resets(by_email: Segment) -> None:
    by_email.leave(2, 3)

    ended = by_email.run("--reset-left", "--dry-run")

    assert "\nWould send: 3\nCannot be sent: 0\n" in ended.console
    assert "A run would make 4 calls" in ended.console


def test_a_dry_run_is_no_memory_of_resets(delivered_singly: Segment) -> None:
    delivered_singly.leave(2)
    delivered_singly.run("--reset-left", "--dry-run")

    ended = delivered_singly.run("--reset-left", "--changed-only")

    assert ended.summary["reset"] == 1


# Users who come back


def test_a_user_who_came_back_is_sent_again(delivered: Segment) -> None:
    delivered.leave(2)
    delivered.run("--reset-left", "--changed-only")
    delivered.come_back(2)

    ended = delivered.run("--reset-left", "--changed-only")

    assert ended.summary["success"] == 1
    assert sorted(delivered.sent()) == delivered.deliveries(2)
    assert delivered.set_users() == delivered.identities(1, 2, 3)


def test_a_user_who_was_not_reset_in_time_is_kept(delivered_singly: Segment) -> None:
    delivered_singly.leave(2)
    delivered_singly.run("--changed-only")
    delivered_singly.come_back(2)

    ended = delivered_singly.run("--reset-left", "--changed-only")

    assert ended.summary["unchanged"] == 3


def test_a_user_who_left_again_is_reset_again(delivered_singly: Segment) -> None:
    delivered_singly.leave(2)
    delivered_singly.run("--reset-left", "--changed-only")
    delivered_singly.come_back(2)
    delivered_singly.run("--reset-left", "--changed-only")
    delivered_singly.leave(2)

    delivered_singly.run("--reset-left", "--changed-only")

    assert sorted(delivered_singly.sent()) == delivered_singly.resets(2)
    assert delivered_singly.reset_users() == delivered_singly.identities(2)


# Refusals and failures


def test_a_reset_of_a_forgotten_user(delivered: Segment, standin: StandIn) -> None:
    delivered.leave(2)
    standin.configure(forgotten=[delivered.way.identity(2)])

    ended = delivered.run("--reset-left", "--changed-only")

    assert ended.exit_code == 0
    assert list_statuses(ended) == {2: "forgotten"}
    assert ended.summary["forgotten"] == 1


def test_a_refused_reset_is_tried_by_the_next_run(
    delivered: Segment, standin: StandIn
) -> None:
    delivered.leave(2)
    standin.fault(status=400, body=REFUSAL)
    ended = delivered.run("--reset-left", "--changed-only")
    assert ended.exit_code == 1
    assert list_statuses(ended) == {2: "total_failure"}
    standin.clear_faults()

    ended = delivered.run("--reset-left", "--changed-only")

    assert ended.exit_code == 0
    assert ended.summary["reset"] == 1
    assert delivered.reset_users() == delivered.identities(2)


def test_poison_stops_no_other_reset(delivered: Segment, standin: StandIn) -> None:
    delivered.leave(1, 2, 3)
    standin.poison(delivered.way.identity(2))

    ended = delivered.run("--reset-left", ITERABLE_MAX_ATTEMPTS="2")

    assert ended.exit_code == 1
    assert list_statuses(ended) == {1: "reset", 2: "total_failure", 3: "reset"}
    assert delivered.reset_users() == delivered.identities(1, 3)
    [reason] = ended.summary["failure_reasons"]
    assert reason["endpoint"] == USERS_UPDATE
    assert reason["status"] == 500
    assert_counts_add_up(ended)


def test_a_type_clash_of_the_field_fails_all_resets(
    delivered: Segment, standin: StandIn
) -> None:
    delivered.leave(1, 2, 3)
    standin.configure(field_types={"recent_page_view": "string"})

    ended = delivered.run("--reset-left")

    assert ended.exit_code == 1
    assert ended.summary["total_failures"] == 3
    [reason] = ended.summary["failure_reasons"]
    assert reason["count"] == 3
    assert reason["code"] == "RequestFieldsTypesMismatched"
    assert "field recent_page_view: Iterable expects string" in reason["message"]


def test_an_outage_ends_the_resets(
    create_segment: CreateSegment, standin: StandIn
) -> None:
    segment = create_segment(Way("email"), rows=60)
    segment.run()
    segment.change("UPDATE customers SET plan_type = 'basic'")
    standin.fault(status=503)

    ended = segment.run("--reset-left", MAX_WORKERS="2", ITERABLE_MAX_ATTEMPTS="2")

    assert ended.exit_code == 4
    assert ended.summary["outcome"] == "aborted"
    assert_counts_add_up(ended)
    standin.clear_faults()
    assert segment.run("--reset-left").summary["reset"] == 60


def test_a_known_failure_of_a_reset_is_not_shown_again(
    delivered: Segment, standin: StandIn
) -> None:
    delivered.leave(2)
    standin.fault(status=400, body=REFUSAL)
    options = ("--reset-left", "--changed-only", "--quiet")
    first = delivered.run(*options)
    assert f"✗ Failed user: {address(2)}: users/update 400 BadParams" in first.console

    ended = delivered.run(*options)

    assert ended.exit_code == 1
    assert ended.console == ""
    assert ended.summary["total_failures"] == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"endpoint": ANY, "status": 400, "body": REFUSAL},
        {"endpoint": EVENTS_TRACK, "status": 400, "body": REFUSAL},
    ],
    ids=["both calls", "the event"],
)
def test_a_later_failure_does_not_unmake_an_update(
    delivered_singly: Segment, standin: StandIn, fault: dict[str, Any]
) -> None:
    standin.fault(user=delivered_singly.way.identity(2), **fault)
    assert delivered_singly.run().exit_code == 1
    standin.clear_faults()
    delivered_singly.leave(2)

    delivered_singly.run("--reset-left", "--changed-only")

    assert delivered_singly.reset_users() == delivered_singly.identities(2)


def test_a_user_without_the_event_is_reset_too(
    create_segment: CreateSegment, standin: StandIn
) -> None:
    segment = create_segment(Way("email"))
    standin.fault(endpoint=EVENTS_TRACK, user=address(2), status=400, body=REFUSAL)
    segment.run()
    segment.leave(2)

    segment.run("--reset-left", "--changed-only")

    assert segment.reset_users() == {address(2)}


@pytest.mark.parametrize("status", [400, 503])
def test_a_user_who_was_never_updated_is_not_reset(
    create_segment: CreateSegment, standin: StandIn, status: int
) -> None:
    segment = create_segment(Way("email"))
    standin.fault(endpoint=USERS_UPDATE, user=address(2), status=status, body=REFUSAL)
    segment.run(ITERABLE_MAX_ATTEMPTS="1")
    segment.leave(2)

    segment.run("--reset-left", "--changed-only")

    assert segment.sent() == []


def test_a_user_whose_update_got_no_answer_is_reset(
    create_segment: CreateSegment, standin: StandIn
) -> None:
    segment = create_segment(Way("email"))
    standin.fault("reset_after", endpoint=USERS_UPDATE, user=address(2), times=1)
    segment.run(ITERABLE_MAX_ATTEMPTS="1")
    segment.leave(2)

    segment.run("--reset-left", "--changed-only")

    assert segment.reset_users() == {address(2)}


@pytest.mark.parametrize("identify_by", ["email", "userId"])
@pytest.mark.parametrize(
    "fault",
    [
        {"alter": {"successCount": 99}},
        {"status": 413, "body": "<html>"},
        {"status": 503, "processed": True},
        {"action": "cut"},
    ],
    ids=["wrong counts", "413", "503", "cut"],
)
def test_any_answer_to_a_group_resets_all(
    create_segment: CreateSegment,
    standin: StandIn,
    identify_by: str,
    fault: dict[str, Any],
) -> None:
    segment = create_delivered(create_segment, Way(identify_by, bulk=True))
    segment.leave(1, 2, 3)
    standin.configure(forgotten=[segment.way.identity(1)])
    standin.fault(endpoint=USERS_BULK_UPDATE, **fault)

    ended = segment.run("--reset-left", ITERABLE_MAX_ATTEMPTS="2")

    assert ended.exit_code == 0
    assert list_statuses(ended) == {1: "forgotten", 2: "reset", 3: "reset"}
    assert segment.reset_users() == segment.identities(2, 3)
    assert_counts_add_up(ended)


@pytest.mark.parametrize("identify_by", ["email", "userId"])
def test_resets_and_rows_end_in_bulk_as_singly(
    create_segment: CreateSegment, standin: StandIn, folder: Path, identify_by: str
) -> None:
    segment = create_segment(Way(identify_by), rows=7)
    segment.run()
    segment.leave(1, 2, 3, 4)
    identity = segment.way.identity
    standin.configure(forgotten=[identity(1), identity(5)])
    standin.fault(user=identity(2), status=400, body=REFUSAL)
    standin.fault(user=identity(6), status=400, body=REFUSAL)
    standin.poison(identity(3))
    earlier = set(folder.glob("*.json"))
    ended_singly = segment.run("--reset-left", ITERABLE_MAX_ATTEMPTS="2")
    statuses_singly = list_statuses(ended_singly)
    reasons_singly = list_reasons(ended_singly)
    [path] = set(folder.glob("*.json")) - earlier
    path.unlink()

    ended = segment.run("--reset-left", "--bulk", ITERABLE_MAX_ATTEMPTS="2")

    assert list_statuses(ended) == {
        1: "forgotten",
        2: "total_failure",
        3: "total_failure",
        4: "reset",
        5: "forgotten",
        6: "total_failure",
        7: "success",
    }
    assert list_statuses(ended) == statuses_singly
    assert list_reasons(ended) == reasons_singly
    assert_counts_add_up(ended)


def list_reasons(ended: Ended) -> list[str]:
    return sorted(str(reason) for reason in ended.summary["failure_reasons"])


def test_a_reset_that_a_group_refused_is_sent_singly(
    create_segment: CreateSegment, standin: StandIn
) -> None:
    segment = create_delivered(create_segment, Way("userId", bulk=True))
    segment.leave(1, 2, 3)
    standin.configure(refused={USERS_BULK_UPDATE: {"2": ["notFoundUserIds", "2"]}})

    ended = segment.run("--reset-left")

    assert ended.summary["reset"] == 3
    assert sorted(segment.sent()) == sorted(segment.resets(1, 2, 2, 3))


# Runs that end early


def test_resets_that_sigterm_prevents_are_for_the_next_run(
    delivered: Segment, standin: StandIn
) -> None:
    delivered.leave(2, 3)
    standin.fault(user=delivered.way.identity(1), latency=0.5, times=1)
    running = delivered.start("--reset-left", MAX_WORKERS="1")
    calls = standin.count_calls()
    standin.wait_for_calls(calls + 1)
    running.signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.exit_code == 143
    assert_counts_add_up(ended)
    reset_before = delivered.reset_users()
    assert ended.summary.get("reset", 0) == len(reset_before)

    ended = delivered.run("--reset-left", "--changed-only")

    assert ended.exit_code == 0
    assert ended.summary.get("reset", 0) == 2 - len(reset_before)
    assert delivered.reset_users() == delivered.identities(2, 3)


def test_a_killed_run_forgets_no_reset(delivered: Segment, standin: StandIn) -> None:
    delivered.leave(1, 2, 3)
    standin.fault(latency=0.1, times=1)
    running = delivered.start("--reset-left", MAX_WORKERS="1")
    calls = standin.count_calls()
    standin.wait_for_calls(calls + 1)
    running.process.kill()
    running.wait()

    ended = delivered.run("--reset-left", "--changed-only")

    assert ended.exit_code == 0
    assert delivered.reset_users() == delivered.identities(1, 2, 3)


def test_only_resets_in_flight_are_repeated(
    create_segment: CreateSegment, standin: StandIn
) -> None:
    segment = create_segment(Way("email"), rows=30)
    segment.run()
    segment.change("UPDATE customers SET plan_type = 'basic'")
    running = segment.start("--reset-left", MAX_WORKERS="2")
    running.wait_for("Processing record 10/30")
    running.process.kill()
    running.wait()
    before = segment.reset_users()

    segment.run("--reset-left", "--changed-only")

    assert len(segment.reset_users()) == 30
    repeated = before & {user for _, user in segment.sent()}
    assert len(repeated) <= 4


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_users_in_flight_at_a_kill_who_left_are_reset(
    create_segment: CreateSegment, standin: StandIn, way: Way
) -> None:
    segment = create_segment(way)
    standin.configure(latency=2)
    running = segment.start()
    standin.wait_for_calls(1 if way.bulk else 3)
    running.process.kill()
    running.wait()
    standin.configure(latency=0)
    assert segment.set_users() == segment.identities(1, 2, 3)
    segment.leave(1, 2, 3)

    ended = segment.run("--reset-left", "--changed-only")

    assert ended.summary["reset"] == 3
    assert segment.reset_users() == segment.identities(1, 2, 3)


def test_users_in_flight_at_two_kills_are_reset(
    create_segment: CreateSegment, standin: StandIn
) -> None:
    segment = create_segment(Way("email"), rows=1)
    standin.configure(latency=2)
    for calls in (1, 2):
        running = segment.start()
        standin.wait_for_calls(calls)
        running.process.kill()
        running.wait()
    standin.configure(latency=0)
    segment.leave(1)

    segment.run("--reset-left")

    assert segment.reset_users() == {address(1)}


# Results files that are damaged, foreign or unreadable


def find_results_file(folder: Path) -> Path:
    [path] = folder.glob("integration_results_*.json")
    return path


def test_users_on_damaged_lines_are_left_alone(
    delivered_singly: Segment, folder: Path
) -> None:
    path = find_results_file(folder)
    text = path.read_text("utf-8")
    path.write_text(text.replace('"user_id": 2', '"user_id" 2'), "utf-8")
    delivered_singly.leave(2, 3)

    ended = delivered_singly.run("--reset-left", "--quiet")

    assert ended.exit_code == 0
    assert f"{path} is used as memory in part" in ended.console
    assert delivered_singly.reset_users() == delivered_singly.identities(3)


def test_a_foreign_file_is_no_memory(by_email: Segment, folder: Path) -> None:
    foreign = folder / "integration_results_of_others.json"
    foreign.write_text('{"results": []}', "utf-8")
    by_email.leave(2)

    ended = by_email.run("--reset-left", "--quiet")

    assert ended.exit_code == 0
    assert str(foreign) in ended.console
    assert by_email.reset_users() == {address(2)}


def test_files_without_an_identity_are_of_addresses(
    by_email: Segment, folder: Path
) -> None:
    path = find_results_file(folder)
    text = path.read_text("utf-8")
    path.write_text(text.replace('"identify_by": "email", ', ""), "utf-8")
    by_email.leave(2)

    by_email.run("--reset-left")

    assert by_email.reset_users() == {address(2)}


# Root may read every file, unless it gives that right away.
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-all") if os.getuid() == 0 else ()


@pytest.mark.parametrize("options", [(), ("--reset-left",), ("--changed-only",)])
def test_nothing_is_sent_without_an_unreadable_file(
    by_email: Segment, folder: Path, options: tuple[str, ...]
) -> None:
    path = find_results_file(folder)
    path.chmod(0)
    by_email.leave(2)

    ended = by_email.run(*options, wrapper=WITHOUT_RIGHTS)

    assert ended.exit_code == 2
    assert f"{path} cannot be read" in ended.console
    assert "chown" in ended.console
    assert by_email.sent() == []


def test_nothing_is_sent_without_an_unreadable_list(
    create_segment: CreateSegment, standin: StandIn, folder: Path
) -> None:
    segment = create_segment(Way("email"))
    standin.configure(latency=2)
    running = segment.start()
    standin.wait_for_calls(1)
    running.process.kill()
    running.wait()
    [path] = folder.glob(".integration_results_*.started")
    path.chmod(0)

    ended = segment.run("--reset-left", wrapper=WITHOUT_RIGHTS)

    assert ended.exit_code == 2
    assert f"{path} cannot be read" in ended.console
    assert segment.sent() == []
