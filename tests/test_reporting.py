"""What is counted and shown of a run: tally, users on the console, summary."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterable_client import CallResult, UnusableRow, UserCalls
from lab.clients import build_client, make_event, make_update
from logger_config import Status, setup_logger
from main import Delivery, Ending, Narrator, Tally

UPDATED = CallResult("users/update", ok=True, status=200, code="Success")
TRACKED = CallResult("events/track", ok=True, status=200, code="Success")
BAD_PARAMS = CallResult(
    "users/update",
    ok=False,
    status=400,
    code="BadParams",
    reason="correct it",
    body='{"msg": "no\n such user"}',
)
LOST = CallResult(
    "events/track", ok=False, message="it broke", reason="check the network"
)
FORGOTTEN = CallResult(
    "users/update", ok=False, status=409, code="ForgottenUserError", body="{}"
)
COMPLETED = Ending("completed", 0, "")
RESULTS = Path("/results/integration_results_20260113_143045.json")


def make_delivery(
    number: int = 1, update: CallResult = UPDATED, event: CallResult | None = TRACKED
) -> Delivery:
    """Return the delivery of a user; None: without an event."""
    update_call = make_update(number)
    update_call.result = update
    calls = [update_call]
    event_id = None
    if event is not None:
        event_call = make_event(number)
        event_call.result = event
        calls.append(event_call)
        event_id = f"page-view-{number}"
    return Delivery(
        number=number,
        user_id=number,
        email=f"user{number}@example.com",
        event_id=event_id,
        calls=UserCalls(number, calls),
    )


def make_failure(number: int = 1, reason: str = "correct it") -> Delivery:
    """Return the delivery of a user whose update failed for this reason."""
    update = CallResult(
        "users/update", ok=False, status=400, code="BadParams", reason=reason
    )
    return make_delivery(number, update)


def make_total_failure(number: int = 1) -> Delivery:
    """Return the delivery of a user both of whose calls failed."""
    return make_delivery(number, BAD_PARAMS, LOST)


def make_forgotten(number: int = 1) -> Delivery:
    return make_delivery(number, FORGOTTEN, None)


def make_reset(number: int = 1) -> Delivery:
    return make_delivery(number, UPDATED, None)


def make_untried(number: int = 1) -> Delivery:
    return Delivery(number, number, f"user{number}@example.com")


def make_problem(number: int = 1) -> Delivery:
    """Return the delivery of a row that cannot be sent."""
    problem = UnusableRow("no address", "correct it")
    return Delivery(number, number, None, problem=problem)


def list_deliveries(count: int) -> list[Delivery]:
    return [make_delivery(number) for number in range(1, count + 1)]


def list_failures(first: int, last: int) -> list[Delivery]:
    return [make_failure(number) for number in range(first, last + 1)]


def skip(number: int, status: Status) -> Delivery:
    return Delivery(number, number, f"user{number}@example.com", skipped_as=status)


def make_known(delivery: Delivery) -> Delivery:
    delivery.is_known = True
    return delivery


# Console and log


class Screen:
    """What console and log file show of a run."""

    def __init__(self, capture: pytest.CaptureFixture[str], log_file: Path) -> None:
        self._capture = capture
        self._log_file = log_file

    def start(self, *, quiet: bool = False) -> None:
        """Begin anew."""
        self._capture.readouterr()
        self._log_file.write_text("")
        setup_logger("INFO", self._log_file, quiet=quiet)

    def read(self) -> str:
        """Return what the console has shown since then."""
        return self._capture.readouterr().out

    def read_log(self) -> list[str]:
        """Return the lines of the log, level and message."""
        lines = self._log_file.read_text("utf-8").splitlines()
        return [" ".join(line.split()[1:2] + line.split()[3:]) for line in lines]


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Screen]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    level = root.level
    hook = sys.excepthook
    yield Screen(capsys, tmp_path / "run.log")
    for handler in root.handlers:
        handler.close()
    root.handlers = handlers
    root.setLevel(level)
    sys.excepthook = hook


def count_all(deliveries: Sequence[Delivery], total: int | None = None) -> Tally:
    """Return the tally of these users."""
    tally = Tally(len(deliveries) if total is None else total)
    for delivery in deliveries:
        tally.count(delivery)
    return tally


def narrate(
    screen: Screen,
    deliveries: Sequence[Delivery],
    *,
    total: int = 0,
    is_dry_run: bool = False,
) -> Narrator:
    """Count and show these users, in a run of `total` users or of these only."""
    screen.start()
    tally = count_all(deliveries, total or len(deliveries))
    narrator = Narrator(tally, is_dry_run=is_dry_run)
    for delivery in deliveries:
        narrator.show(delivery)
    return narrator


# Counting


def make_summary(tally: Tally, ending: Ending = COMPLETED) -> dict[str, Any]:
    client = build_client()
    client.attempts_made = 7
    client.retries_made = 2
    return tally.make_summary(ending, client, seconds=2.0)


def test_a_summary() -> None:
    tally = count_all(
        [
            make_delivery(1),
            make_failure(2),
            make_total_failure(3),
            make_forgotten(4),
            make_reset(5),
            skip(6, Status.UNCHANGED),
            make_untried(7),
            skip(8, Status.WOULD_SEND),
            make_problem(9),
        ]
    )

    assert make_summary(tally, Ending("aborted", 4, "refused")) == {
        "outcome": "aborted",
        "exit_code": 4,
        "total_users": 9,
        "success": 1,
        "partial_failures": 1,
        "total_failures": 2,
        "forgotten": 1,
        "reset": 1,
        "unchanged": 1,
        "not_attempted": 2,
        "calls": 7,
        "retries": 2,
        "duration_seconds": 2.0,
        "users_per_second": 3.5,
        "failure_reasons": [
            {
                "endpoint": "users/update",
                "status": 400,
                "code": "BadParams",
                "message": "correct it",
                "count": 2,
            },
            {
                "endpoint": "events/track",
                "status": None,
                "code": None,
                "message": "check the network",
                "count": 1,
            },
            {
                "endpoint": None,
                "status": None,
                "code": None,
                "message": "no address: correct it",
                "count": 1,
            },
        ],
    }


def test_two_calls_that_failed_for_one_reason_count_once() -> None:
    event = CallResult("events/track", ok=False, status=400, reason="correct it")

    tally = count_all([make_delivery(1, BAD_PARAMS, event)])

    assert tally.new_reasons.total() == 1


def test_users_who_would_get_no_event_are_counted_apart() -> None:
    row = skip(1, Status.WOULD_SEND)
    row.event_id = "page-view-1"
    leaver = skip(2, Status.WOULD_SEND)

    tally = count_all([row, leaver])

    assert tally.counts[Status.WOULD_SEND] == 2
    assert tally.events_to_send == 1


def test_known_reasons_are_counted_apart() -> None:
    tally = count_all([make_known(make_failure(1)), make_failure(2)])

    [reason] = make_summary(tally)["failure_reasons"]
    assert tally.known_reasons.total() == 1
    assert tally.new_reasons.total() == 1
    assert reason["count"] == 2


def test_no_time_has_no_speed() -> None:
    assert count_all([make_delivery()]).compute_speed(0.0) == 0.0


def test_users_who_were_not_tried_have_no_speed() -> None:
    tally = count_all([skip(1, Status.UNCHANGED), make_untried(2)])

    assert tally.compute_speed(1.0) == 0.0


DELIVERIES = st.sampled_from(
    [
        make_delivery(),
        make_failure(1),
        make_total_failure(1),
        make_forgotten(),
        make_reset(),
        make_problem(),
        skip(1, Status.UNCHANGED),
        skip(1, Status.WOULD_SEND),
        make_untried(),
    ]
)
COUNTS = [
    "success",
    "partial_failures",
    "total_failures",
    "forgotten",
    "reset",
    "unchanged",
    "not_attempted",
]


@given(deliveries=st.lists(DELIVERIES, max_size=30))
def test_the_counts_of_a_summary_add_up(deliveries: list[Delivery]) -> None:
    tally = count_all(deliveries)
    summary = make_summary(tally)

    failures = [each for each in deliveries if each.status.is_failure]
    reasons = sum(reason["count"] for reason in summary["failure_reasons"])
    assert sum(summary[name] for name in COUNTS) == len(deliveries)
    assert summary["total_users"] == len(deliveries)
    assert tally.failures == len(failures)
    assert reasons >= len(failures)


# A few users


def test_each_user_has_two_lines(screen: Screen) -> None:
    narrate(
        screen,
        [
            make_delivery(1),
            make_failure(2),
            make_total_failure(3),
            make_forgotten(4),
            make_reset(5),
            make_problem(6),
        ],
    )

    assert (
        screen.read()
        == """
Processing record 1/6
✓ Successfully processed user: user1@example.com

Processing record 2/6
⚠ Partially processed user: user2@example.com: users/update 400 BadParams

Processing record 3/6
✗ Failed user: user3@example.com: users/update 400 BadParams, events/track no answer

Processing record 4/6
Forgotten at the user's own request, so not sent: user4@example.com

Processing record 5/6
✓ Left the segment, recent_page_view reset: user5@example.com

Processing record 6/6
✗ Failed user: customer 6: no address
"""
    )


def test_who_was_not_sent_has_no_line(screen: Screen) -> None:
    narrate(screen, [skip(1, Status.UNCHANGED), make_untried(2)])

    assert screen.read() == ""


@given(order=st.permutations(range(1, 7)))
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_users_are_shown_in_their_order(screen: Screen, order: list[int]) -> None:
    deliveries = [make_delivery(number) for number in order]
    deliveries[0].skipped_as = Status.UNCHANGED  # it has no line, and holds up nobody

    narrate(screen, deliveries)

    shown = re.findall(r"Processing record (\d)/6", screen.read())
    expected = [str(number) for number in range(1, 7)]
    expected.remove(str(order[0]))
    assert shown == expected


def test_a_user_waits_for_those_before(screen: Screen) -> None:
    narrate(screen, [make_delivery(2), make_delivery(3)], total=3)

    assert screen.read() == ""


def test_the_log_has_the_calls_and_the_answers(screen: Screen) -> None:
    narrate(screen, [make_total_failure(1), make_delivery(2)])

    assert screen.read_log() == [
        "INFO Processing record 1/2",
        "ERROR 4xx Client Error from users/update: Status 400"
        " (record 1/2, user1@example.com)",
        'ERROR Response: {"msg": "no such user"}',
        "ERROR No answer from events/track (record 1/2, user1@example.com)",
        "ERROR Response: it broke",
        "ERROR ✗ Failed user: user1@example.com: users/update 400 BadParams,"
        " events/track no answer",
        "INFO Processing record 2/2",
        "INFO users/update call successful: Success (record 2/2, user2@example.com)",
        "INFO events/track call successful: Success (record 2/2, user2@example.com)",
        "INFO ✓ Successfully processed user: user2@example.com",
    ]


def test_a_known_failure_is_in_the_log_only(screen: Screen) -> None:
    narrate(screen, [make_known(make_failure(1))])

    line = "⚠ Partially processed user: user1@example.com: users/update 400 BadParams"
    assert screen.read() == ""
    assert f"ERROR {line}" in screen.read_log()


def test_a_long_name_is_cut(screen: Screen) -> None:
    delivery = make_problem()
    delivery.email = "x" * 400

    narrate(screen, [delivery])

    assert f"✗ Failed user: {'x' * 320}: no address\n" in screen.read()


@pytest.mark.parametrize("email", [None, "", "  "])
def test_a_user_without_an_address_is_named_by_the_id(
    screen: Screen, email: str | None
) -> None:
    delivery = make_problem()
    delivery.email = email

    narrate(screen, [delivery])

    assert "✗ Failed user: customer 1: no address\n" in screen.read()


# Many users


def test_many_users_have_a_line_each_in_the_log(screen: Screen) -> None:
    narrate(screen, list_deliveries(101))

    assert screen.read() == ""
    lines = screen.read_log()
    first = "✓ Successfully processed user: user1@example.com (record 1/101)"
    assert len(lines) == 101
    assert lines[0] == f"INFO {first}"


def test_of_many_users_twenty_failures_are_shown(screen: Screen) -> None:
    narrate(screen, list_failures(1, 101))

    lines = screen.read().splitlines()
    name = "user20@example.com (record 20/101)"
    assert len(lines) == 20
    assert lines[19] == (
        f"⚠ Partially processed user: {name}: users/update 400 BadParams"
    )


def test_known_failures_take_no_room_from_new_ones(screen: Screen) -> None:
    known = list_failures(1, 50)
    for delivery in known:
        delivery.is_known = True
    new = list_failures(51, 101)

    narrate(screen, [*known, *new])

    lines = screen.read().splitlines()
    assert len(lines) == 20
    assert "user51@example.com" in lines[0]


def test_a_hundred_users_are_not_many(screen: Screen) -> None:
    narrate(screen, list_deliveries(100))

    assert screen.read().count("Processing record") == 100


class Timer(NamedTuple):
    """The time that main.py sees."""

    clock: mock.Mock

    def set(self, seconds: float) -> None:
        """Let it be so many seconds later than at the beginning."""
        self.clock.return_value = 1000.0 + seconds


@pytest.fixture
def timer() -> Iterator[Timer]:
    with mock.patch("main.time.monotonic", return_value=1000.0) as clock:
        yield Timer(clock)


def test_progress_is_shown_every_two_seconds(screen: Screen, timer: Timer) -> None:
    deliveries = [make_delivery(number) for number in range(1, 51)]
    narrator = narrate(screen, [*deliveries, make_failure(51)], total=204)
    screen.start()

    for seconds in (1.9, 2.0, 3.9, 4.0):
        timer.set(seconds)
        narrator.show_progress()

    assert screen.read() == (
        "Progress: 51/204 (25 %), 25.5 users/s, 6 s left, failures: 1\n"
        "Progress: 51/204 (25 %), 12.8 users/s, 12 s left, failures: 1\n"
    )


def test_progress_begins_with_nobody(screen: Screen, timer: Timer) -> None:
    narrator = narrate(screen, [], total=200)

    timer.set(2)
    narrator.show_progress()

    assert screen.read() == (
        "Progress: 0/200 (0 %), 0.0 users/s, nobody done yet, failures: 0\n"
    )


def test_a_few_users_have_no_progress(screen: Screen, timer: Timer) -> None:
    narrator = narrate(screen, [], total=100)

    timer.set(60)
    narrator.show_progress()

    assert screen.read() == ""


# A dry run


def test_a_dry_run_shows_the_payloads_of_three_users(screen: Screen) -> None:
    deliveries = [skip(number, Status.WOULD_SEND) for number in range(1, 5)]
    for delivery in deliveries:
        delivery.payloads = {
            "users_update": {"email": delivery.email},
            "events_track": {"id": f"page-view-{delivery.number}"},
        }
    deliveries[1].payloads = {"users_update": {"email": "é"}, "events_track": None}

    narrate(screen, deliveries, is_dry_run=True)

    assert screen.read() == (
        'users/update {"email": "user1@example.com"}\n'
        'events/track {"id": "page-view-1"}\n'
        'users/update {"email": "é"}\n'
        'users/update {"email": "user3@example.com"}\n'
        'events/track {"id": "page-view-3"}\n'
    )


def test_the_summary_of_a_dry_run(screen: Screen) -> None:
    narrator = narrate(
        screen,
        [
            skip(1, Status.WOULD_SEND),
            skip(2, Status.UNCHANGED),
            make_problem(3),
        ],
        is_dry_run=True,
    )
    screen.start()

    narrator.show_summary(COMPLETED, RESULTS, seconds=0.5)

    assert (
        screen.read()
        == f"""
INTEGRATION SUMMARY
Total users processed: 3
Would send: 1
Cannot be sent: 1
Unchanged since they were delivered, not sent again: 1
  1 user: no address: correct it
Results: {RESULTS}
Time: 0.5 s, 4.0 users a second
"""
    )


# The summary


def show_summary(
    screen: Screen,
    deliveries: Sequence[Delivery],
    ending: Ending = COMPLETED,
    *,
    quiet: bool = False,
) -> str:
    """Return what the console shows at the end of a run."""
    narrator = narrate(screen, deliveries)
    screen.start(quiet=quiet)
    narrator.show_summary(ending, RESULTS, seconds=2.0)
    return screen.read()


def test_the_summary_of_a_success(screen: Screen) -> None:
    shown = show_summary(screen, [make_delivery(1), make_delivery(2)])

    assert (
        shown
        == f"""
INTEGRATION SUMMARY
Total users processed: 2
✓ Successful (both API calls): 2
⚠ Partial failures (one call failed): 0
✗ Total failures (both calls failed): 0
Results: {RESULTS}
Time: 2.0 s, 1.0 users a second
"""
    )


def test_the_summary_of_everything(screen: Screen) -> None:
    deliveries = [
        make_delivery(1),
        make_failure(2),
        make_failure(3),
        make_total_failure(4),
        make_forgotten(5),
        make_reset(6),
        skip(7, Status.UNCHANGED),
        make_untried(8),
        make_problem(9),
    ]

    shown = show_summary(screen, deliveries, Ending("interrupted", 143, "Stopped"))

    assert (
        shown
        == f"""
The run ended early: Stopped
INTEGRATION SUMMARY
Total users processed: 9
✓ Successful (both API calls): 1
⚠ Partial failures (one call failed): 2
✗ Total failures (both calls failed): 2
Forgotten at their own request: 1
Left the segment, recent_page_view reset: 1
Unchanged since they were delivered, not sent again: 1
Not attempted: 1
  3 users: users/update 400 BadParams: correct it
  1 user: events/track no answer: check the network
  1 user: no address: correct it
Results: {RESULTS}
Time: 2.0 s, 3.5 users a second
"""
    )


def test_an_advice_stands_once(screen: Screen) -> None:
    ending = Ending("aborted", 4, "Iterable refused the key: check it")
    failure = make_failure(reason="Iterable refused the key: check it")

    shown = show_summary(screen, [failure], ending)

    assert shown.count("Iterable refused the key: check it") == 1
    assert "  1 user: users/update 400 BadParams\n" in shown


def test_ten_reasons_are_shown_the_most_frequent_first(screen: Screen) -> None:
    deliveries = [make_failure(1, "frequent"), make_failure(2, "frequent")]
    for number in range(3, 14):
        deliveries.append(make_failure(number, f"reason {number}"))

    shown = show_summary(screen, deliveries)

    lines = [line for line in shown.splitlines() if line.startswith("  ")]
    assert len(lines) == 11
    assert lines[0] == "  2 users: users/update 400 BadParams: frequent"
    assert lines[1] == "  1 user: users/update 400 BadParams: reason 3"
    assert lines[9] == "  1 user: users/update 400 BadParams: reason 11"
    assert lines[10] == "  More reasons, in the results file: 2"


def test_a_quiet_success_shows_nothing(screen: Screen) -> None:
    assert show_summary(screen, [make_delivery()], quiet=True) == ""


def test_a_quiet_failure_shows_the_summary(screen: Screen) -> None:
    shown = show_summary(screen, [make_failure()], quiet=True)

    assert (
        shown
        == f"""
INTEGRATION SUMMARY
Total users processed: 1
✓ Successful (both API calls): 0
⚠ Partial failures (one call failed): 1
✗ Total failures (both calls failed): 0
  1 user: users/update 400 BadParams: correct it
Results: {RESULTS}
Time: 2.0 s, 0.5 users a second
"""
    )


def test_known_failures_show_nothing_under_quiet(screen: Screen) -> None:
    shown = show_summary(screen, [make_known(make_failure())], quiet=True)

    assert shown == ""
    assert "INFO 1 user: users/update 400 BadParams: correct it" in screen.read_log()


def test_one_new_failure_shows_no_known_reason(screen: Screen) -> None:
    known = make_known(make_failure(1, "known"))

    shown = show_summary(screen, [known, make_failure(2, "new")], quiet=True)

    assert "⚠ Partial failures (one call failed): 2\n" in shown
    assert "  1 user: users/update 400 BadParams: new\n" in shown
    assert ": known" not in shown


def test_a_quiet_run_that_ends_early_says_why(screen: Screen) -> None:
    ending = Ending("aborted", 1, "make room")

    shown = show_summary(screen, [make_delivery()], ending, quiet=True)

    assert "\nThe run ended early: make room\nINTEGRATION SUMMARY\n" in shown
