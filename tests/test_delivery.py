"""What is to be sent to a user, and what became of it: plan, status, reasons, line."""

from __future__ import annotations

import errno
import json
import logging
import signal
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import db_connection
import iterable_client
import logger_config
from db_connection import PageViewRow
from iterable_client import (
    Call,
    CallResult,
    IdentifyBy,
    IterableUnavailable,
    KeyRefused,
    NoRoomForThread,
    UnusableRow,
    UserCalls,
)
from lab.clients import (
    ROW,
    make_event,
    make_update,
)
from lab.runs import make_planner
from logger_config import (
    FolderInUse,
    Memory,
    ResultsNotWritable,
    Status,
)
from main import (
    CheckFailed,
    Delivery,
    DeliveryPlanner,
    Ending,
    ExitCode,
    Interrupted,
    Leaver,
    Reason,
    SettingsError,
    TooFewUsers,
    explain_ending,
    make_reason,
)

# Errors and exit codes


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (SettingsError(), 2),
        (db_connection.QueryFileError(), 2),
        (logger_config.LogNotWritable(), 2),
        (logger_config.FolderNotUsable(), 2),
        (logger_config.EarlierResultsUnreadable(), 2),
        (iterable_client.NetworkSettingsError(), 2),
        (db_connection.DatabaseError(), 3),
        (TooFewUsers(), 3),
        (KeyRefused(), 4),
        (IterableUnavailable(), 4),
        (FolderInUse(), 75),
        (ResultsNotWritable(), 1),
        (NoRoomForThread(), 1),
        (CheckFailed(), 1),
        (MemoryError(), 1),
        (Interrupted(signal.SIGHUP), 129),
        (Interrupted(signal.SIGINT), 130),
        (Interrupted(signal.SIGTERM), 143),
    ],
    ids=repr,
)
def test_an_exit_code(error: Exception, exit_code: int) -> None:
    assert explain_ending(error).exit_code == exit_code


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        PermissionError(errno.EACCES, "Permission denied"),
        KeyError("x"),
        ValueError("x"),
    ],
    ids=repr,
)
def test_a_built_in_error_has_no_exit_code_of_its_own(error: Exception) -> None:
    assert explain_ending(error).exit_code == ExitCode.NOT_ALL_DELIVERED


def test_a_subclass_has_the_exit_code_of_its_class() -> None:
    class OwnError(KeyRefused):
        """More particular than the known one."""

    assert explain_ending(OwnError()).exit_code == ExitCode.GIVEN_UP


def test_a_signal_interrupts_a_run() -> None:
    ending = explain_ending(Interrupted(signal.SIGTERM))

    assert ending == Ending("interrupted", 143, "Stopped by SIGTERM")


def test_a_known_error_says_all(caplog: pytest.LogCaptureFixture) -> None:
    ending = explain_ending(KeyRefused("check the key"))

    assert ending == Ending("aborted", 4, "check the key")
    assert caplog.records == []


def test_an_unforeseen_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    error = KeyError("x")

    ending = explain_ending(error)

    [record] = caplog.records
    why = "unexpected error KeyError('x'): see the log file"
    assert ending == Ending("aborted", 1, why)
    assert record.levelno == logging.CRITICAL
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_memory_that_runs_out_has_a_cure() -> None:
    ending = explain_ending(MemoryError())

    assert ending.why == "out of memory: raise ulimit -v, or lower MAX_WORKERS"


# Status and reasons

UPDATED = CallResult("users/update", ok=True, status=200, code="Success")
TRACKED = CallResult("events/track", ok=True, status=200, code="Success")
REFUSED = CallResult(
    "users/update", ok=False, status=400, code="BadParams", reason="correct it"
)
LOST_EVENT = CallResult("events/track", ok=False, reason="check the network")
FORGOTTEN = CallResult(
    "users/update", ok=False, status=409, code="ForgottenUserError", reason="forgotten"
)
UNCLEAR = CallResult("users/bulkUpdate", ok=False, is_provisional=True)
NO_EVENT = "no event"

Outcome = CallResult | str | None


def set_outcome(call: Call, outcome: Outcome) -> Call:
    if isinstance(outcome, CallResult):
        call.result = outcome
    return call


def make_delivery(
    update: Outcome = UPDATED, event: Outcome = TRACKED, *, number: int = 1
) -> Delivery:
    """Return a delivery whose calls ended like this; None: they were not made."""
    calls = [set_outcome(make_update(number), update)]
    event_id = None
    if event != NO_EVENT:
        calls.append(set_outcome(make_event(number), event))
        event_id = f"page-view-{number}"
    return Delivery(
        number=number,
        user_id=number,
        email=f"user{number}@example.com",
        event_id=event_id,
        fingerprint="f" * 64,
        calls=UserCalls(number, calls),
    )


STATUSES = {
    (UPDATED, TRACKED): Status.SUCCESS,
    (UPDATED, LOST_EVENT): Status.PARTIAL_FAILURE,
    (UPDATED, FORGOTTEN): Status.FORGOTTEN,
    (UPDATED, None): Status.PARTIAL_FAILURE,
    (UPDATED, NO_EVENT): Status.RESET,
    (REFUSED, TRACKED): Status.PARTIAL_FAILURE,
    (REFUSED, LOST_EVENT): Status.TOTAL_FAILURE,
    (REFUSED, FORGOTTEN): Status.FORGOTTEN,
    (REFUSED, None): Status.TOTAL_FAILURE,
    (REFUSED, NO_EVENT): Status.TOTAL_FAILURE,
    (FORGOTTEN, NO_EVENT): Status.FORGOTTEN,
    (UNCLEAR, None): Status.NOT_ATTEMPTED,
    (UPDATED, UNCLEAR): Status.PARTIAL_FAILURE,
    (None, None): Status.NOT_ATTEMPTED,
    (None, NO_EVENT): Status.NOT_ATTEMPTED,
}


@pytest.mark.parametrize(("outcomes", "status"), STATUSES.items(), ids=str)
def test_a_status(outcomes: tuple[Outcome, Outcome], status: Status) -> None:
    assert make_delivery(*outcomes).status is status


@pytest.mark.parametrize("outcomes", STATUSES, ids=str)
def test_a_problem_is_a_total_failure(outcomes: tuple[Outcome, Outcome]) -> None:
    delivery = make_delivery(*outcomes)
    delivery.problem = UnusableRow("no address", "correct it")

    assert delivery.status is Status.TOTAL_FAILURE
    assert delivery.reasons == [Reason("no address", "no address: correct it")]


@pytest.mark.parametrize("status", [Status.UNCHANGED, Status.WOULD_SEND])
def test_a_user_who_is_skipped_has_no_reasons(status: Status) -> None:
    delivery = Delivery(1, 1, "a@x", skipped_as=status)

    assert delivery.status is status
    assert delivery.reasons == []
    assert delivery.results == []


def test_an_unclear_group_is_on_record() -> None:
    line = make_delivery(UNCLEAR, None).make_line()

    assert line["status"] == "not_attempted"
    assert line["users_update"] is not None
    assert line["users_update"]["endpoint"] == "users/bulkUpdate"


def test_a_user_without_calls_is_not_attempted() -> None:
    assert Delivery(1, 1, "a@x").status is Status.NOT_ATTEMPTED


REFUSED_REASON = Reason(
    "users/update 400 BadParams", "correct it", "users/update", 400, "BadParams"
)
LOST_REASON = Reason("events/track no answer", "check the network", "events/track")
NOT_SENT = "events/track not sent: the run ended before"


def test_each_failed_call_has_its_reason() -> None:
    delivery = make_delivery(REFUSED, LOST_EVENT)

    assert delivery.reasons == [REFUSED_REASON, LOST_REASON]


def test_an_event_that_was_not_sent_is_the_reason() -> None:
    delivery = make_delivery(UPDATED, None)

    assert delivery.reasons == [Reason(NOT_SENT, NOT_SENT)]


def test_a_refused_update_is_the_reason_when_no_event_was_sent() -> None:
    assert make_delivery(REFUSED, None).reasons == [REFUSED_REASON]


UPDATES: list[Outcome] = [UPDATED, REFUSED, FORGOTTEN, None]
EVENTS: list[Outcome] = [TRACKED, LOST_EVENT, FORGOTTEN, None, NO_EVENT]


@given(
    update=st.sampled_from(UPDATES),
    event=st.sampled_from(EVENTS),
    problem=st.none() | st.just(UnusableRow("no address", "correct it")),
    skipped_as=st.sampled_from([None, Status.UNCHANGED, Status.WOULD_SEND]),
)
def test_only_failures_have_reasons(
    update: Outcome,
    event: Outcome,
    problem: UnusableRow | None,
    skipped_as: Status | None,
) -> None:
    delivery = make_delivery(update, event)
    delivery.problem = problem
    delivery.skipped_as = skipped_as

    reasons = delivery.reasons

    assert bool(reasons) == delivery.status.is_failure
    assert delivery.make_line()["status"] == delivery.status.value
    for reason in reasons:
        assert reason.brief
        assert reason.text


# The line of the results file


def test_the_line_of_a_user() -> None:
    assert make_delivery(UPDATED, LOST_EVENT).make_line() == {
        "record": 1,
        "user_id": 1,
        "email": "user1@example.com",
        "event_id": "page-view-1",
        "status": "partial_failure",
        "users_update": {
            "endpoint": "users/update",
            "ok": True,
            "status": 200,
            "code": "Success",
            "message": "",
            "attempts": 1,
        },
        "events_track": {
            "endpoint": "events/track",
            "ok": False,
            "status": None,
            "code": None,
            "message": "",
            "attempts": 1,
        },
        "fingerprint": "f" * 64,
    }


def test_the_line_of_a_row_that_cannot_be_sent() -> None:
    delivery = Delivery(3, 7, None, problem=UnusableRow("no address", "correct it"))

    assert delivery.make_line() == {
        "record": 3,
        "user_id": 7,
        "email": None,
        "event_id": None,
        "status": "total_failure",
        "users_update": None,
        "events_track": None,
        "fingerprint": None,
        "problem": "no address: correct it",
    }


def test_an_error_of_our_own_is_not_called_no_answer() -> None:
    result = CallResult("users/update", ok=False, is_unexpected=True, reason="see log")

    assert "no answer" not in make_reason(result).brief


def test_a_call_that_was_not_made_has_no_line() -> None:
    line = make_delivery(UPDATED, None).make_line()

    assert line["events_track"] is None


# Plans


class Plan(NamedTuple):
    """A planner with what it is made of."""

    planner: DeliveryPlanner
    memory: Memory

    def plan(
        self, number: int = 1, user: PageViewRow | Leaver | None = None, **changes: Any
    ) -> Delivery:
        """Return the delivery of a user, by default of ROW with these changes."""
        return self.planner.plan(number, user or ROW._replace(**changes))


def start_plan(*arguments: str, memory: Memory | None = None, **changes: str) -> Plan:
    """Return a plan of a run with these arguments and settings."""
    memory = memory or Memory()
    return Plan(make_planner(*arguments, memory=memory, **changes), memory)


def read_payloads(delivery: Delivery) -> list[Any]:
    """Return the payloads of the calls."""
    assert delivery.calls is not None
    return [json.loads(call.payload) for call in delivery.calls.calls]


def test_a_row_has_two_calls() -> None:
    delivery = start_plan().plan(email=" User1@Example.com")

    update, event = read_payloads(delivery)
    assert delivery.status is Status.NOT_ATTEMPTED
    assert delivery.email == "user1@example.com"
    assert delivery.event_id == "page-view-37"
    assert update["email"] == "user1@example.com"
    assert event["id"] == "page-view-37"


def test_a_row_by_user_id_has_two_calls() -> None:
    delivery = start_plan(ITERABLE_IDENTIFY_BY="userId").plan()

    update, event = read_payloads(delivery)
    assert delivery.email == "user1@example.com"
    assert update["userId"] == "2"
    assert update["dataFields"]["email"] == "user1@example.com"
    assert event["userId"] == "2"
    assert "email" not in update.keys() | event.keys()


@pytest.mark.parametrize(
    ("identify_by", "payload"),
    [
        (
            IdentifyBy.EMAIL,
            {"email": "a@x", "dataFields": {"recent_page_view": False}},
        ),
        (
            IdentifyBy.USER_ID,
            {"userId": "7", "dataFields": {"recent_page_view": False}},
        ),
    ],
)
def test_a_user_who_left_has_one_call(
    identify_by: IdentifyBy, payload: dict[str, Any]
) -> None:
    plan = start_plan(ITERABLE_IDENTIFY_BY=identify_by.value)

    delivery = plan.plan(user=Leaver(7, " A@x"))

    assert read_payloads(delivery) == [payload]
    assert delivery.email == "a@x"
    assert delivery.event_id is None
    assert delivery.fingerprint is not None


def test_a_row_that_cannot_be_sent_has_no_calls() -> None:
    delivery = start_plan().plan(email=None)

    assert delivery.calls is None
    assert str(delivery.problem) == (
        "no usable e-mail address: correct it in the customers table"
    )


def test_the_second_customer_of_an_address_is_not_sent() -> None:
    plan = start_plan()
    plan.plan(1, user_id=7, email="ann@x", view_id=1)

    second = plan.plan(2, user_id=8, email=" ANN@X", view_id=2)

    assert second.calls is None
    assert str(second.problem) == "customer 7 has the same address: merge the two"


def test_two_customers_by_user_id_may_have_one_address() -> None:
    plan = start_plan(ITERABLE_IDENTIFY_BY="userId")
    plan.plan(1, user_id=7, email="ann@x", view_id=1)

    second = plan.plan(2, user_id=8, email="ann@x", view_id=2)

    assert second.problem is None


@pytest.mark.parametrize("identify_by", ["email", "userId"])
def test_a_customer_with_two_rows_is_sent_once(identify_by: str) -> None:
    plan = start_plan(ITERABLE_IDENTIFY_BY=identify_by)
    plan.plan(1, user_id=7, view_id=1)

    second = plan.plan(2, user_id="7", view_id=2)

    assert second.calls is None
    assert "make customers.id unique" in str(second.problem)


def test_the_second_row_of_a_view_is_not_sent() -> None:
    plan = start_plan()
    plan.plan(1, user_id=7, email="ann@x", view_id=1)

    second = plan.plan(2, user_id=8, email="ben@x", view_id="1")

    assert second.calls is None
    assert str(second.problem) == (
        "customer 7 has the same page view: make page_views.id unique"
    )


def test_a_row_that_cannot_be_sent_takes_no_address() -> None:
    plan = start_plan()
    plan.plan(1, user_id=7, email="ann@x", event_time=None)

    second = plan.plan(2, user_id=8, email="ann@x")

    assert second.problem is None


def deliver(plan: Plan, delivery: Delivery) -> None:
    """Let the memory know of a success."""
    assert delivery.calls is not None
    update, event = delivery.calls.calls
    update.result = UPDATED
    event.result = TRACKED
    plan.memory.add_result(delivery.make_line())


def test_what_was_delivered_is_unchanged() -> None:
    first = start_plan("--changed-only")
    deliver(first, first.plan())

    second = start_plan("--changed-only", memory=first.memory).plan()

    assert second.status is Status.UNCHANGED
    assert second.calls is None


def test_without_the_option_it_is_sent_again() -> None:
    first = start_plan()
    deliver(first, first.plan())

    second = start_plan(memory=first.memory).plan()

    assert second.calls is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"first_name": "Sara"},
        {"view_id": 38},
        {"event_time": "2026-01-14 14:30:45"},
        {"page": None},
    ],
)
def test_a_changed_row_has_another_fingerprint(changes: dict[str, Any]) -> None:
    changed = start_plan().plan(**changes)

    assert changed.fingerprint != start_plan().plan().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"ITERABLE_API_KEY": "another"},
        {"ITERABLE_API_BASE_URL": "https://api.eu.iterable.com"},
        {"ITERABLE_IDENTIFY_BY": "userId"},
    ],
)
def test_another_project_has_other_fingerprints(changes: dict[str, Any]) -> None:
    elsewhere = start_plan(**changes).plan()

    assert elsewhere.fingerprint != start_plan().plan().fingerprint


def test_a_column_that_is_not_sent_changes_nothing() -> None:
    changed = start_plan().plan(user_id=99)

    assert changed.fingerprint == start_plan().plan().fingerprint


def test_a_dry_run_has_payloads_and_no_calls() -> None:
    delivery = start_plan("--dry-run").plan()

    line = delivery.make_line()
    assert delivery.calls is None
    assert line["status"] == "would_send"
    assert line["payloads"]["users_update"]["email"] == "user1@example.com"
    assert line["payloads"]["events_track"]["id"] == "page-view-37"


ODD_VALUES = st.none() | st.text(max_size=5) | st.sampled_from(["\udcff", 0])
SIMILAR = st.fixed_dictionaries(
    {
        "user_id": st.integers(1, 5),
        "email": st.sampled_from(["a@x", " A@X", "b@x"]),
        "view_id": st.integers(1, 5),
    }
)
ODD_COLUMN = st.dictionaries(
    st.sampled_from(PageViewRow._fields), ODD_VALUES, max_size=1
)


@settings(deadline=None, max_examples=100)
@given(
    changes=st.lists(st.tuples(SIMILAR, ODD_COLUMN), max_size=6),
    identify_by=st.sampled_from(IdentifyBy),
)
def test_any_row_is_sent_once_or_has_a_problem(
    changes: list[tuple[dict[str, Any], dict[str, Any]]], identify_by: IdentifyBy
) -> None:
    plan = start_plan(ITERABLE_IDENTIFY_BY=identify_by.value)

    deliveries = [
        plan.plan(number, **{**similar, **odd})
        for number, (similar, odd) in enumerate(changes, 1)
    ]

    sent = [delivery for delivery in deliveries if delivery.calls is not None]
    identities = [read_payloads(each)[0][identify_by.value] for each in sent]
    assert len(set(identities)) == len(sent)
    assert len({delivery.event_id for delivery in sent}) == len(sent)
    assert len({delivery.fingerprint for delivery in sent}) == len(sent)
    for delivery in deliveries:
        json.dumps(delivery.make_line())
        assert (delivery.problem is None) == (delivery.calls is not None)
