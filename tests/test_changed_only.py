"""`--changed-only`: what was delivered is left out, and everything else is sent.

Under `--quiet` a failure that is known is not shown again. Which files are read as
memory is tested in test_logger_config.py.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from lab.database import DatabaseServer
from lab.expected import address
from lab.process import CreateCustomers, Ended, RunMain
from lab.segment import WAYS, CreateSegment, Segment, Way
from lab.standin_handle import EVENTS_TRACK, EVENTS_TRACK_BULK, StandIn

REFUSED = "users/update 400 InvalidEmailAddressError"
BOTH_REFUSED = f"{REFUSED}, events/track 400 InvalidEmailAddressError"
NO_ADDRESS = "no usable e-mail address"
NEW_VIEW = """
INSERT INTO page_views (user_id, page, event_time)
VALUES (3, 'settings', CURDATE() - INTERVAL 1 DAY)
"""


@pytest.fixture(params=WAYS, ids=str)
def any_segment(
    request: pytest.FixtureRequest, create_segment: CreateSegment
) -> Segment:
    """Three customers, sent in each way."""
    return create_segment(request.param)


@pytest.fixture
def segment(create_segment: CreateSegment) -> Segment:
    """Three customers, sent singly by their addresses."""
    return create_segment(Way("email"))


# What is left out, and what is sent again


def test_nobody_is_sent_twice(any_segment: Segment) -> None:
    assert any_segment.run().exit_code == 0

    ended = any_segment.run("--changed-only")

    assert ended.exit_code == 0
    assert ended.summary == {"outcome": "completed", "total_users": 3, "unchanged": 3}
    assert ended.results["results"] == []
    assert ended.results["run"]["options"]["changed_only"] is True
    assert any_segment.sent() == []


def test_the_console_counts_unchanged_users(segment: Segment) -> None:
    segment.run()

    ended = segment.run("--changed-only")

    step = "[STEP 5] Processing user records...\n"
    assert ended.console_without_times.split(step)[1] == (
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


def test_runs_without_news_keep_the_memory(segment: Segment) -> None:
    segment.run()
    segment.run("--changed-only")

    ended = segment.run("--changed-only", "--quiet")

    assert ended.exit_code == 0
    assert ended.console == ""
    assert ended.errors == ""
    assert ended.summary["unchanged"] == 3


def test_without_the_option_everyone_is_sent_again(segment: Segment) -> None:
    segment.run()
    segment.run("--changed-only")

    ended = segment.run()

    assert ended.summary["success"] == 3
    assert sorted(segment.sent()) == segment.deliveries(1, 2, 3)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("UPDATE customers SET last_name = 'Other'", []),  # which is not sent
        ("UPDATE customers SET first_name = 'Eve' WHERE id = 2", [2]),
        (NEW_VIEW, [3]),
    ],
)
def test_only_changed_users_are_sent(
    any_segment: Segment, change: str, changed: list[int]
) -> None:
    any_segment.run()
    any_segment.change(change)

    ended = any_segment.run("--changed-only")

    assert list(ended.lines) == changed
    assert ended.summary["unchanged"] == 3 - len(changed)
    assert sorted(any_segment.sent()) == any_segment.deliveries(*changed)


def test_a_name_that_was_changed_back_is_sent(segment: Segment) -> None:
    segment.run()
    segment.change("UPDATE customers SET first_name = 'Eve' WHERE id = 2")
    segment.run("--changed-only")
    segment.change("UPDATE customers SET first_name = 'Ann' WHERE id = 2")

    segment.run("--changed-only")

    assert sorted(segment.sent()) == segment.deliveries(2)


def test_a_new_key_starts_everyone_anew(segment: Segment, standin: StandIn) -> None:
    segment.run()
    new_key = "f" * 32
    standin.configure(key=new_key)

    ended = segment.run("--changed-only", ITERABLE_API_KEY=new_key)

    assert ended.exit_code == 0
    assert sorted(segment.sent()) == segment.deliveries(1, 2, 3)


def test_another_url_starts_everyone_anew(segment: Segment, standin: StandIn) -> None:
    segment.run()
    other_url = standin.url.replace("127.0.0.1", "localhost")

    ended = segment.run("--changed-only", url=other_url)

    assert ended.exit_code == 0
    assert sorted(segment.sent()) == segment.deliveries(1, 2, 3)


def test_failed_and_forgotten_users_are_sent_again(
    any_segment: Segment, standin: StandIn
) -> None:
    any_segment.run()
    first, second, _ = [any_segment.way.identity(number) for number in (1, 2, 3)]
    standin.configure(forgotten=[first], refused={EVENTS_TRACK_BULK: {second: None}})
    standin.fault(endpoint=EVENTS_TRACK, user=second, status=400)
    ended = any_segment.run()
    statuses = {number: line["status"] for number, line in ended.lines.items()}
    assert statuses == {1: "forgotten", 2: "partial_failure", 3: "success"}
    standin.clear_faults()
    standin.configure(forgotten=[], refused={})

    ended = any_segment.run("--changed-only")

    assert ended.summary["success"] == 2
    assert sorted(any_segment.sent()) == any_segment.deliveries(1, 2)


def test_an_interrupted_run_keeps_the_memory(
    segment: Segment, standin: StandIn
) -> None:
    segment.run("--limit", "2")
    standin.fault(endpoint=EVENTS_TRACK, user=address(1), latency=0.5)
    running = segment.start(MAX_WORKERS="1")
    standin.wait_for_calls(3, EVENTS_TRACK)
    running.signal(signal.SIGTERM)
    assert running.wait().summary["not_attempted"] == 2

    ended = segment.run("--changed-only")

    assert ended.summary["unchanged"] == 2
    assert sorted(segment.sent()) == segment.deliveries(3)


def test_a_dry_run_is_no_memory(segment: Segment) -> None:
    segment.run("--dry-run")

    ended = segment.run("--changed-only")

    assert ended.summary["success"] == 3


def test_a_dry_run_uses_the_memory(segment: Segment) -> None:
    segment.run("--limit", "1")

    ended = segment.run("--dry-run", "--changed-only")

    assert ended.summary == {
        "outcome": "completed",
        "total_users": 3,
        "unchanged": 1,
        "not_attempted": 2,
    }
    assert "\nWould send: 2\nCannot be sent: 0\n" in ended.console
    assert "\nUnchanged since they were delivered, not sent again: 1\n" in ended.console
    assert "A run would make 4 calls" in ended.console


def test_a_limit_counts_unchanged_users(segment: Segment) -> None:
    segment.run("--limit", "1")

    ended = segment.run("--changed-only", "--limit", "2")

    assert ended.summary == {
        "outcome": "completed",
        "total_users": 2,
        "success": 1,
        "unchanged": 1,
        "calls": 2,
    }
    assert sorted(segment.sent()) == segment.deliveries(2)


def test_the_partial_file_of_a_killed_run_is_memory(
    segment: Segment, standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", user=address(3), times=1)
    running = segment.start()
    running.wait_for("Processing record 2/3")
    standin.wait_for_calls(5)
    running.process.kill()
    running.wait()
    [partial] = folder.glob("*.json.partial")
    with partial.open("a", encoding="utf-8") as file:
        file.write(',\n{"record": 3, "user_id": 3, "email": "user3@exam')
    before = partial.read_bytes()

    ended = segment.run("--quiet", "--changed-only")

    assert ended.summary == {
        "outcome": "completed",
        "total_users": 3,
        "success": 1,
        "unchanged": 2,
        "calls": 2,
    }
    assert ended.console == ""
    assert ended.errors == ""
    assert partial.read_bytes() == before
    assert sorted(segment.sent()) == segment.deliveries(3)


# Known failures


def list_shown(ended: Ended) -> list[str]:
    """Return what the console says of failed users and of reasons, sorted."""
    pattern = r"^(?:✗ Failed|⚠ Partially|  \d+ user).*$"
    return sorted(re.findall(pattern, ended.console, re.MULTILINE))


@pytest.fixture
def failing(create_customers: CreateCustomers) -> dict[str, str]:
    """Customers without an address, with an invalid one, and with that of another."""
    same_address = f" {address(1).upper()}"
    addresses = [address(1), None, "x@nowhere", same_address]
    return create_customers([{"email": email} for email in addresses])


FAILURES = [
    "  1 user: customer 1 has the same address: merge the two",
    f"  1 user: {NO_ADDRESS}: correct it in the customers table",
    f"  1 user: {REFUSED}: Iterable refuses the address as invalid:"
    " correct it in the customers table",
    f"✗ Failed user: customer 2: {NO_ADDRESS}",
    "✗ Failed user: user1@example.com: customer 1 has the same address",
    f"✗ Failed user: x@nowhere: {BOTH_REFUSED}",
]


@pytest.mark.parametrize("options", [(), ("--bulk",)], ids=["singly", "in bulk"])
def test_new_failures_are_shown_under_quiet(
    run_main: RunMain, failing: dict[str, str], options: tuple[str, ...]
) -> None:
    ended = run_main("--quiet", "--changed-only", *options, database=failing)

    assert ended.exit_code == 1
    assert list_shown(ended) == FAILURES


@pytest.mark.parametrize("options", [(), ("--bulk",)], ids=["singly", "in bulk"])
def test_known_failures_are_not_shown_under_quiet(
    run_main: RunMain, failing: dict[str, str], options: tuple[str, ...]
) -> None:
    run_main("--quiet", "--changed-only", *options, database=failing)
    run_main("--quiet", "--changed-only", *options, database=failing)

    ended = run_main("--quiet", "--changed-only", *options, database=failing)

    assert ended.exit_code == 1
    assert ended.console == ""
    assert ended.errors == ""


def test_known_failures_stay_on_record(
    run_main: RunMain, failing: dict[str, str]
) -> None:
    first = run_main("--quiet", "--changed-only", database=failing)
    first_reasons = first.summary["failure_reasons"]

    ended = run_main("--quiet", "--changed-only", database=failing)

    statuses = [line["status"] for line in ended.lines.values()]
    assert statuses == ["total_failure"] * 3
    reasons = ended.summary["failure_reasons"]
    assert sorted(map(str, reasons)) == sorted(map(str, first_reasons))
    for words in FAILURES:
        assert ended.log.count(words) == 2


def test_known_failures_are_shown_without_quiet(
    run_main: RunMain, failing: dict[str, str]
) -> None:
    run_main("--changed-only", database=failing)

    ended = run_main("--changed-only", database=failing)

    assert list_shown(ended) == FAILURES


def test_nothing_is_known_without_changed_only(
    run_main: RunMain, failing: dict[str, str]
) -> None:
    run_main("--quiet", database=failing)

    ended = run_main("--quiet", database=failing)

    assert list_shown(ended) == FAILURES


@pytest.fixture
def segment_with_failures(create_segment: CreateSegment) -> Segment:
    """Customer 2 is delivered, and the others fail; all that is known."""
    addresses = [None, address(2), "x@nowhere"]
    rows = [{"email": email} for email in addresses]
    segment = create_segment(Way("email"), rows)
    segment.run("--quiet", "--changed-only")
    return segment


def refuse_event(standin: StandIn, message: str) -> None:
    standin.fault(
        endpoint=EVENTS_TRACK,
        user=address(2),
        times=1,
        status=400,
        body=f'{{"msg": "{message}", "code": "BadParams"}}',
    )


def test_only_the_new_failure_is_shown(
    segment_with_failures: Segment, standin: StandIn
) -> None:
    segment = segment_with_failures
    refuse_event(standin, "No")
    segment.change("UPDATE customers SET first_name = 'Eve' WHERE id = 2")

    ended = segment.run("--quiet", "--changed-only")

    assert list_shown(ended) == [
        "  1 user: events/track 400 BadParams: No",
        f"⚠ Partially processed user: {address(2)}: events/track 400 BadParams",
    ]
    assert "✗ Total failures (both calls failed): 2\n" in ended.console
    assert [item["count"] for item in ended.summary["failure_reasons"]] == [1, 1, 1]


def test_a_failure_with_another_reason_is_new(
    segment_with_failures: Segment, standin: StandIn
) -> None:
    segment = segment_with_failures
    refuse_event(standin, "No")
    segment.change("UPDATE customers SET first_name = 'Eve' WHERE id = 2")
    segment.run("--quiet", "--changed-only")
    refuse_event(standin, "No longer")

    ended = segment.run("--quiet", "--changed-only")

    assert list_shown(ended) == [
        "  1 user: events/track 400 BadParams: No longer",
        f"⚠ Partially processed user: {address(2)}: events/track 400 BadParams",
    ]


def test_a_failure_with_other_payloads_is_new(segment_with_failures: Segment) -> None:
    segment = segment_with_failures
    segment.change("UPDATE customers SET first_name = 'Eve' WHERE id = 3")

    ended = segment.run("--quiet", "--changed-only")

    assert list_shown(ended) == [
        FAILURES[2],
        f"✗ Failed user: x@nowhere: {BOTH_REFUSED}",
    ]


def test_known_failures_are_not_among_the_first_20(
    server: DatabaseServer, run_main: RunMain, create_customers: CreateCustomers
) -> None:
    rows: list[dict[str, Any]] = [{"email": None}] * 25 + [{}] * 76
    database = create_customers(rows)
    first = run_main("--quiet", "--changed-only", database=database)
    assert len(list_shown(first)) == 21
    server.query(
        "UPDATE customers SET email = 'no at sign' WHERE id = 101", database["DB_NAME"]
    )

    ended = run_main("--quiet", "--changed-only", database=database)

    assert list_shown(ended) == [
        f"  1 user: {NO_ADDRESS}: correct it in the customers table",
        f"✗ Failed user: no at sign (record 101/101): {NO_ADDRESS}",
    ]
