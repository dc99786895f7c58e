"""When a run is given up, and when only some users fail: outages, poison, keys.

Poison is a user to whom Iterable answers 500 for ever, which it does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from lab import process
from lab.expected import (
    address,
    assert_counts_add_up,
    assert_record_is_true,
    find_delivered,
    list_calls,
)
from lab.process import CreateCustomers, Ended, RunMain, StartMain
from lab.standin_handle import (
    USERS_BULK_UPDATE,
    USERS_GET_FIELDS,
    USERS_UPDATE,
    StandIn,
)

USERS = 200
GIVEN_UP = (
    "\nThe run ended early: 20 users in a row got no usable answer,"
    " and Iterable takes no call that is known to be good either\n"
)
# The calls of the users in flight and of the question whether Iterable is there may
# follow those of the 20 users.
MOST_CALLS_OF_AN_OUTAGE = 2 * 20 + 10
FIREWALL_PAGE = "<html><h1>Request blocked</h1></html>"
NOT_ALLOWED = "IP address 192.0.2.1 is not allowed"
REFUSED_ADDRESS = json.dumps({"msg": NOT_ALLOWED, "code": "Forbidden", "params": None})


@pytest.fixture(scope="module")
def database(create_customers: CreateCustomers) -> dict[str, str]:
    return create_customers(USERS)


def addresses(numbers: Iterable[int]) -> set[str]:
    return {address(number) for number in numbers}


def everybody() -> set[str]:
    return addresses(range(1, USERS + 1))


# Poison


@pytest.mark.parametrize(
    "poisoned",
    [range(8, USERS, 8), range(100, 125), range(1, 26), range(USERS - 24, USERS + 1)],
    ids=["scattered", "neighbours", "first in line", "last in line"],
)
@pytest.mark.parametrize(("workers", "attempts"), [("300", "2"), ("2", "1")])
def test_poison_stops_no_other_user(
    run_main: RunMain,
    standin: StandIn,
    database: dict[str, str],
    poisoned: range,
    workers: str,
    attempts: str,
) -> None:
    standin.poison(*addresses(poisoned))

    ended = run_main(
        "--quiet",
        database=database,
        MAX_WORKERS=workers,
        ITERABLE_MAX_ATTEMPTS=attempts,
    )

    assert len(poisoned) > 20
    assert ended.exit_code == 1
    assert "The run ended early" not in ended.console
    assert find_delivered(standin) == everybody() - addresses(poisoned)
    assert ended.summary["outcome"] == "completed"
    assert ended.summary["total_failures"] == len(poisoned)
    assert_counts_add_up(ended)


def test_poison_stops_no_other_user_of_its_group(
    run_main: RunMain, standin: StandIn, database: dict[str, str]
) -> None:
    poisoned = range(100, 125)
    standin.poison(*addresses(poisoned))

    ended = run_main("--bulk", database=database, ITERABLE_MAX_ATTEMPTS="1")

    assert ended.exit_code == 1
    assert find_delivered(standin) == everybody() - addresses(poisoned)
    assert ended.summary["outcome"] == "completed"
    assert ended.summary["total_failures"] == len(poisoned)


# Outages


def assert_given_up(ended: Ended) -> None:
    assert ended.exit_code == 4
    assert ended.errors == ""
    assert ended.console.count(GIVEN_UP) == 1
    assert ended.summary["outcome"] == "aborted"
    assert ended.summary["exit_code"] == 4
    assert ended.summary["not_attempted"] > 0
    assert_counts_add_up(ended)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503},
        {"status": 200, "body": "<html>Sign in</html>"},
        {"action": "reset_before"},
    ],
    ids=["503", "a page", "a reset"],
)
def test_an_outage_from_the_start_ends_the_run(
    run_main: RunMain,
    standin: StandIn,
    database: dict[str, str],
    fault: dict[str, str | int],
) -> None:
    standin.fault(**fault)  # type: ignore[arg-type]

    ended = run_main(database=database, MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")

    assert_given_up(ended)
    assert standin.count_calls(USERS_GET_FIELDS) > 0
    assert standin.count_calls() < MOST_CALLS_OF_AN_OUTAGE


def test_an_outage_after_deliveries_ends_the_run(
    run_main: RunMain, standin: StandIn, database: dict[str, str]
) -> None:
    standin.fault(status=503, skip=60)

    ended = run_main(database=database, MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")

    assert_given_up(ended)
    assert find_delivered(standin) == addresses(range(1, 31))
    assert standin.count_calls() < 60 + MOST_CALLS_OF_AN_OUTAGE


def test_the_call_that_is_known_to_be_good_was_accepted_before(
    run_main: RunMain, standin: StandIn, database: dict[str, str]
) -> None:
    standin.fault(status=503, skip=60)

    run_main(database=database, MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")

    calls = list_calls(standin)
    repeated = {user for endpoint, user in calls if calls.count((endpoint, user)) > 1}
    assert repeated
    assert repeated < addresses(range(1, 31))
    assert standin.count_calls(USERS_GET_FIELDS) == 0


def test_a_run_goes_on_when_an_outage_is_over(
    run_main: RunMain, standin: StandIn, database: dict[str, str]
) -> None:
    twenty_users_and_one_call = 41
    standin.fault(status=503, skip=60, times=twenty_users_and_one_call)

    ended = run_main(database=database, MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")

    assert ended.exit_code == 1
    assert ended.summary["outcome"] == "completed"
    assert ended.summary["success"] >= USERS - 21
    for number in range(52, USERS + 1):
        assert ended.lines[number]["status"] == "success"


def count_recorded(folder: Path) -> int:
    """Return how many users have succeeded by the partial results file."""
    [partial] = folder.glob("integration_results_*.partial")
    return partial.read_text("utf-8").count('"status": "success"')


def test_users_go_on_record_while_iterable_is_asked(
    start_main: StartMain, standin: StandIn, database: dict[str, str]
) -> None:
    standin.poison(*addresses(range(USERS - 19, USERS + 1)))
    standin.fault("silence", endpoint=USERS_GET_FIELDS)
    standin.fault(endpoint=USERS_UPDATE, latency=3.0)
    running = start_main(
        database=database, MAX_WORKERS=str(USERS), ITERABLE_MAX_ATTEMPTS="1"
    )
    standin.wait_for_calls(1, USERS_GET_FIELDS)

    deadline = time.monotonic() + 20
    while count_recorded(running.folder) < USERS - 20:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Refusals that are Iterable's, and those of a firewall


def test_a_refused_key_ends_the_run_at_once(
    run_main: RunMain, standin: StandIn, database: dict[str, str]
) -> None:
    ended = run_main(
        database=database, MAX_WORKERS="1", ITERABLE_API_KEY="wrong" + process.KEY
    )

    assert ended.exit_code == 4
    assert ended.errors == ""
    assert list_calls(standin) == [(USERS_UPDATE, address(1))]
    assert ended.summary["outcome"] == "aborted"
    assert ended.summary["total_failures"] == 1
    assert ended.summary["not_attempted"] == USERS - 1
    assert_counts_add_up(ended)


@pytest.mark.parametrize("status", [401, 403])
def test_iterables_sentence_stands_before_the_advice(
    run_main: RunMain, standin: StandIn, database: dict[str, str], status: int
) -> None:
    standin.fault(status=status, body=REFUSED_ADDRESS)

    ended = run_main("--quiet", database=database, MAX_WORKERS="1")

    [line] = [
        line
        for line in ended.console.splitlines()
        if line.startswith("The run ended early: ")
    ]
    assert ended.exit_code == 4
    assert NOT_ALLOWED in line
    assert line.index(NOT_ALLOWED) < line.index("check ITERABLE_API_KEY")


@pytest.mark.parametrize("status", [401, 403])
def test_the_page_of_a_firewall_fails_its_user_alone(
    run_main: RunMain, standin: StandIn, database: dict[str, str], status: int
) -> None:
    standin.fault(user=address(5), status=status, body=FIREWALL_PAGE)

    ended = run_main(database=database, MAX_WORKERS="1")

    assert ended.exit_code == 1
    assert "\nThe run ended early" not in ended.console
    assert "this is not Iterable's API" in ended.console
    assert find_delivered(standin) == everybody() - {address(5)}
    assert_record_is_true(ended, standin)


def test_the_page_of_a_firewall_for_a_group_fails_one_user(
    run_main: RunMain, standin: StandIn, database: dict[str, str]
) -> None:
    standin.fault(user=address(5), status=403, body=FIREWALL_PAGE)

    ended = run_main("--bulk", database=database)

    assert ended.exit_code == 1
    assert find_delivered(standin) == everybody() - {address(5)}
    assert standin.count_calls(USERS_BULK_UPDATE) == 1


COUNT_HANDED_OVER = """
import sys
from concurrent.futures import ThreadPoolExecutor

submit = ThreadPoolExecutor.submit
calls = []


def submit_and_count(*arguments, **keywords):
    calls.append(arguments)
    return submit(*arguments, **keywords)


ThreadPoolExecutor.submit = submit_and_count
import main

exit_code = main.main()
print(len(calls), file=sys.stderr)
sys.exit(exit_code)
"""


def test_a_refused_key_sends_no_group_round_again(
    run_main: RunMain, standin: StandIn, database: dict[str, str]
) -> None:
    ended = run_main(
        "--bulk",
        database=database,
        program=("-c", COUNT_HANDED_OVER),
        PYTHONPATH=str(process.ROOT),
        ITERABLE_API_KEY="wrong" + process.KEY,
    )

    tasks_of_threads = int(ended.errors)
    assert ended.exit_code == 4
    assert tasks_of_threads < 5  # and not one for each of 200 users
    assert standin.count_calls() == 1
    assert ended.summary["total_failures"] == USERS
    assert_counts_add_up(ended)
