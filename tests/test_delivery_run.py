"""A run between the database and the exit code: every user once, whatever happens."""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import main
from iterable_client import HttpAnswer, NoRoomForThread, RunControl, Sender
from lab.clients import (
    LOST,
    ROW,
    SUCCESS,
    Reply,
    Script,
    make_answer,
    make_group_answer,
)
from lab.runs import (
    Users,
    assert_adds_up,
    make_rows,
    run_deliveries,
)
from logger_config import Memory, ResultsFile, ResultsNotWritable
from main import (
    DeliveryPlanner,
    ExitCode,
    Interrupted,
    Leaver,
)

# The deliveries of a run


def test_users_are_numbered_in_their_order() -> None:
    users = make_rows(2)
    users.append(Leaver(9, "left@example.com"))

    recorded = run_deliveries(users=users)

    numbers = {number: line["user_id"] for number, line in recorded.lines.items()}
    assert numbers == {1: 1, 2: 2, 3: 9}


def test_when_a_run_is_ending_no_row_is_looked_at() -> None:
    control = RunControl()
    control.end(Interrupted(signal.SIGINT))

    recorded = run_deliveries(users=deque([ROW._replace(email=None)]), control=control)

    assert recorded.statuses == ["not_attempted"]


# Any replies

SINGLE_REPLIES: dict[str, Reply] = {
    "success": SUCCESS,
    "refused": make_answer(400, "BadParams", "correct it"),
    "forgotten": make_answer(409, "ForgottenUserError"),
    "lost": LOST,
}
EXPECTED = {
    ("success", "success"): "success",
    ("success", "refused"): "partial_failure",
    ("success", "lost"): "partial_failure",
    ("success", "forgotten"): "forgotten",
    ("refused", "success"): "partial_failure",
    ("refused", "refused"): "total_failure",
    ("refused", "lost"): "total_failure",
    ("refused", "forgotten"): "forgotten",
    ("lost", "success"): "partial_failure",
    ("lost", "refused"): "total_failure",
    ("lost", "lost"): "total_failure",
    ("lost", "forgotten"): "forgotten",
    ("forgotten", "success"): "forgotten",
    ("forgotten", "refused"): "forgotten",
    ("forgotten", "lost"): "forgotten",
    ("forgotten", "forgotten"): "forgotten",
}
GROUP_SIZES = st.integers(2, 5)
ARGUMENTS = st.sampled_from([(), ("--bulk",)])
REPLIES = st.sampled_from([*EXPECTED, *[("success", "success")] * 8])


def script_replies(pairs: Sequence[tuple[str, str]], unconfirmed: set[int]) -> Script:
    """Answer by what each user gets; some users no answer to a group confirms."""

    def find_reply(endpoint: str, user: str) -> tuple[str, bool]:
        number = int(user.removeprefix("user").partition("@")[0])
        reply = pairs[number - 1][endpoint.startswith("events")]
        return reply, reply == "success" and number not in unconfirmed

    def script(endpoint: str, users: Sequence[str]) -> Reply:
        if len(users) == 1:
            return SINGLE_REPLIES[find_reply(endpoint, users[0])[0]]
        failed = [user for user in users if not find_reply(endpoint, user)[1]]
        return make_group_answer(users, failed)

    return script


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.lists(REPLIES, max_size=12),
    unconfirmed=st.sets(st.integers(1, 12)),
    arguments=ARGUMENTS,
    max_group=GROUP_SIZES,
)
def test_any_replies_add_up(
    pairs: list[tuple[str, str]],
    unconfirmed: set[int],
    arguments: tuple[str, ...],
    max_group: int,
) -> None:
    recorded = run_deliveries(
        *arguments,
        users=make_rows(len(pairs)),
        max_group=max_group,
        script=script_replies(pairs, unconfirmed),
        max_attempts=1,
    )

    expected = [EXPECTED[pair] for pair in pairs]
    failures = [status for status in expected if status.endswith("failure")]
    assert_adds_up(recorded, len(pairs))
    assert recorded.statuses == expected
    assert recorded.exit_code == bool(failures)
    assert recorded.summary["outcome"] == "completed"


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 10),
    stop_after=st.integers(1, 12),
    arguments=ARGUMENTS,
    max_group=GROUP_SIZES,
)
def test_a_stop_anywhere_adds_up(
    count: int, stop_after: int, arguments: tuple[str, ...], max_group: int
) -> None:
    control = RunControl()
    calls = []

    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        calls.append(endpoint)
        if len(calls) >= stop_after:
            control.end(Interrupted(signal.SIGTERM))
        return make_group_answer(users) if len(users) > 1 else SUCCESS

    recorded = run_deliveries(
        *arguments,
        users=make_rows(count),
        max_group=max_group,
        script=script,
        control=control,
    )

    is_stopped = len(calls) >= stop_after
    assert_adds_up(recorded, count)
    assert set(recorded.statuses) <= {"success", "not_attempted"}
    assert recorded.exit_code == (143 if is_stopped else 0)


def test_a_stop_just_before_the_end_counts() -> None:
    control = RunControl()
    control.end(Interrupted(signal.SIGINT))

    recorded = run_deliveries(users=make_rows(2), control=control)

    assert recorded.summary["outcome"] == "interrupted"
    assert recorded.exit_code == 130
    assert recorded.statuses == ["not_attempted", "not_attempted"]


def test_a_stop_after_the_end_does_not_count() -> None:
    control = RunControl()
    recorded = run_deliveries(users=make_rows(2), control=control)

    control.end(Interrupted(signal.SIGINT))

    assert recorded.exit_code == 0
    assert control.close() is None


def test_users_who_left_are_counted_as_reset() -> None:
    users = make_rows(1)
    users.append(Leaver(9, "left@example.com"))

    recorded = run_deliveries(users=users)

    assert_adds_up(recorded, 2)
    assert recorded.statuses == ["success", "reset"]
    assert "users/update left@example.com" in recorded.calls
    assert "events/track left@example.com" not in recorded.calls


def test_users_who_left_may_be_in_one_group_with_others() -> None:
    users = make_rows(1)
    users.append(Leaver(9, "left@example.com"))

    recorded = run_deliveries(
        "--bulk",
        users=users,
    )

    assert recorded.statuses == ["success", "reset"]
    assert recorded.calls == [
        "users/bulkUpdate user1@example.com left@example.com",
        "events/track user1@example.com",
    ]


def test_a_refused_key_ends_the_run() -> None:
    recorded = run_deliveries(
        users=make_rows(30),
        script=lambda *_: make_answer(401, "BadApiKey", "Invalid API key"),
        workers=1,
    )

    assert_adds_up(recorded, 30)
    assert recorded.exit_code == ExitCode.GIVEN_UP
    assert recorded.statuses == ["total_failure"] + ["not_attempted"] * 29
    assert recorded.calls == ["users/update user1@example.com"]


def test_what_is_announced_comes_before_what_is_sent() -> None:
    announced: list[str] = []
    not_announced: list[str] = []

    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        not_announced.extend(set(users).difference(announced))
        return make_group_answer(users)

    def announce(_: ResultsFile, users: Sequence[tuple[int, str]]) -> None:
        for user_id, identity in users:
            assert identity == f"user{user_id}@example.com"
            announced.append(identity)

    with mock.patch.object(ResultsFile, "announce", announce):
        run_deliveries("--bulk", users=make_rows(5), script=script)

    assert len(announced) == 5
    assert not_announced == []


# Whatever runs out


def fail_after(count: int, error: Exception, method: Any) -> Callable[..., Any]:
    """Return the method, which works so often and then raises the error."""
    calls = []

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        if len(calls) > count:
            raise error
        return method(*arguments, **keywords)

    return replacement


RUNNING_OUT = [
    (Sender, "_start", NoRoomForThread("no thread"), "no thread"),
    (DeliveryPlanner, "plan", MemoryError(), "out of memory"),
    (DeliveryPlanner, "plan", KeyError("x"), "unexpected error KeyError('x')"),
    (Sender, "collect", RuntimeError("x"), "unexpected error RuntimeError('x')"),
    (main.Narrator, "show", ValueError("x"), "unexpected error ValueError('x')"),
    (main, "Delivery", MemoryError(), "out of memory"),
]


@pytest.mark.parametrize("after", [0, 12])
@pytest.mark.parametrize(("owner", "name", "error", "words"), RUNNING_OUT, ids=str)
def test_whatever_runs_out_every_user_is_on_record(
    owner: Any,
    name: str,
    error: Exception,
    words: str,
    after: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = fail_after(after, error, getattr(owner, name))
    if name == "Delivery":  # it works again for the users who are left
        failing = fail_once(after, error, getattr(owner, name))

    with mock.patch.object(owner, name, failing):
        recorded = run_deliveries(users=make_rows(30))

    delivered = set()
    for call in recorded.calls:
        endpoint, user = call.split(" ")
        if endpoint == "events/track":
            delivered.add(user)
    successes = set()
    for line in recorded.lines.values():
        if line["status"] == "success":
            successes.add(line["email"])
    assert_adds_up(recorded, 30)
    assert recorded.exit_code == 1
    assert recorded.summary["outcome"] == "aborted"
    assert f"The run ended early: {words}" in caplog.text
    assert successes == delivered


def fail_once(count: int, error: Exception, method: Any) -> Callable[..., Any]:
    """Return the method, which raises the error in the call after so many."""
    calls = []

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        if len(calls) == count + 1:
            raise error
        return method(*arguments, **keywords)

    return replacement


def test_a_disk_that_is_full_ends_the_run_with_1(
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = ResultsNotWritable("make room")
    caplog.set_level(logging.INFO)

    with (
        mock.patch.object(ResultsFile, "add", side_effect=full),
        mock.patch.object(ResultsFile, "finish", side_effect=full),
    ):
        recorded = run_deliveries(users=make_rows(30), workers=1)

    assert recorded.exit_code == 1
    assert recorded.run.tally.counts.total() == 30
    assert "The run ended early: make room" in caplog.messages
    assert len(recorded.calls) < 30


def test_a_disk_that_is_full_at_the_end_ends_the_run_with_1(
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = ResultsNotWritable("make room")

    with mock.patch.object(ResultsFile, "finish", side_effect=full):
        recorded = run_deliveries(users=make_rows(3))

    assert recorded.exit_code == 1
    assert "The run ended early: make room" in caplog.messages


def test_a_disk_that_is_full_after_a_stop_is_said_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    control = RunControl()
    control.end(Interrupted(signal.SIGTERM))
    full = ResultsNotWritable("make room")

    with mock.patch.object(ResultsFile, "finish", side_effect=full):
        recorded = run_deliveries(users=make_rows(3), control=control)

    assert recorded.exit_code == 1
    assert "The run ended early: Stopped by SIGTERM; make room" in caplog.messages


# Known failures


def make_memory_of_failure(users: Users, **options: Any) -> Memory:
    """Return the memory of a run in which these users got these replies."""
    memory = Memory()
    recorded = run_deliveries(users=users, **options)
    for line in recorded.document["results"]:
        memory.add_result(line)
    return memory


QUIET_AND_CHANGED = ("--quiet", "--changed-only")
REFUSING: dict[str, Any] = {
    "script": lambda *_: make_answer(400, "BadParams", "correct it")
}


@pytest.mark.parametrize(
    ("arguments", "is_known"),
    [
        (QUIET_AND_CHANGED, True),
        (("--changed-only",), False),
        (("--quiet",), False),
    ],
)
def test_a_known_failure_is_counted_apart(
    arguments: tuple[str, ...], is_known: bool
) -> None:
    memory = make_memory_of_failure(make_rows(2), **REFUSING)

    recorded = run_deliveries(*arguments, users=make_rows(2), memory=memory, **REFUSING)

    tally = recorded.run.tally
    assert recorded.exit_code == 1
    assert tally.failures == 2
    assert bool(tally.known_reasons) == is_known
    assert bool(tally.new_reasons) != is_known


def test_a_failure_for_another_reason_is_new() -> None:
    memory = make_memory_of_failure(make_rows(1), **REFUSING)

    recorded = run_deliveries(
        *QUIET_AND_CHANGED,
        users=make_rows(1),
        memory=memory,
        script=lambda *_: make_answer(400, "UniqueFieldsLimitExceeded"),
    )

    assert not recorded.run.tally.known_reasons


def test_a_known_problem_of_a_row_is_counted_apart() -> None:
    row = ROW._replace(email=None)
    memory = make_memory_of_failure(deque([row]))

    recorded = run_deliveries(*QUIET_AND_CHANGED, users=deque([row]), memory=memory)

    assert not recorded.run.tally.new_reasons
    assert recorded.run.tally.known_reasons.total() == 1
