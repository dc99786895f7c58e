"""Runs that are killed, stopped or started twice: the record is true in the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import process
from lab.database import DatabaseServer
from lab.expected import (
    CALLS,
    address,
    assert_counts_add_up,
    assert_record_is_true,
    find_delivered,
)
from lab.process import CreateCustomers, Ended, RunMain, Running, StartMain, in_shell
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn, Trap

KILL_ROUNDS = int(os.environ.get("KILL_ROUNDS", "2"))
USERS = 150
LONG_RETRY_AFTER = {"Retry-After": "120"}
SOON = 60.0  # seconds: a run whose waits are not cut short takes longer
KEY_REFUSED_BODY = '{"msg":"Invalid API key","code":"BadApiKey","params":null}'
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(scope="module")
def many(create_customers: CreateCustomers) -> dict[str, str]:
    return create_customers(USERS)


@pytest.fixture(scope="module")
def three(create_customers: CreateCustomers) -> dict[str, str]:
    return create_customers(3)


def stop(running: Running, number: signal.Signals) -> Ended:
    running.signal(number)
    return running.wait(SOON)


def find_recorded(folder: Path) -> set[str]:
    """The users on record as delivered, in files without an end as well."""
    found = set()
    for path in folder.glob("integration_results_*"):
        for line in path.read_text("utf-8").split("\n"):
            if line.startswith('{"record"'):
                user = json.loads(line.rstrip(","))
                if user["status"] == "success":
                    found.add(user["email"])
    return found


# kill -9


def count_calls(standin: StandIn) -> Counter[str]:
    """How many single calls arrived for each user."""
    return Counter(call["user"] for call in standin.state()["journal"])


@pytest.mark.parametrize("number", range(KILL_ROUNDS))
def test_killed_runs_lose_nobody_and_repeat_nobody_on_record(
    start_main: StartMain,
    many: dict[str, str],
    standin: StandIn,
    folder: Path,
    number: int,
) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed, "in round", number)
    chance = random.Random(seed)
    standin.configure(latency=chance.choice([0.0, 0.02, 0.1]))
    calls_when_recorded: dict[str, int] = {}

    for will_be_killed in (True, True, False):
        find_absent = USERS - len(calls_when_recorded)
        enough_calls = standin.count_calls() + chance.randrange(2 * find_absent + 1)
        running = start_main(
            "--changed-only",
            database=many,
            ITERABLE_RATE_LIMIT="2000",
            MAX_WORKERS="50",
        )
        if will_be_killed:
            standin.wait_for_calls(enough_calls, timeout=30)
            running.process.kill()
        ended = running.wait()
        calls = count_calls(standin)
        for user in find_recorded(folder) - calls_when_recorded.keys():
            calls_when_recorded[user] = calls[user]

    assert ended.exit_code == 0
    assert "damaged" not in ended.console  # the last line of a killed run may be torn
    assert standin.state()["violations"] == []
    assert len(find_delivered(standin)) == USERS
    assert count_calls(standin) == calls_when_recorded


# Signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_user_leaves_no_results(
    start_main: StartMain,
    three: dict[str, str],
    server: DatabaseServer,
    standin: StandIn,
    folder: Path,
    number: signal.Signals,
) -> None:
    connection = server.connect(three["DB_NAME"])
    with connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLES page_views WRITE")
        running = start_main(database=three)
        running.wait_for("[STEP 3]")
        ended = stop(running, number)

    assert ended.exit_code == 128 + number
    assert ended.errors == ""
    assert list(folder.glob("integration_results_*")) == []
    assert standin.counters()["connections"] == 0


def assert_interrupted(ended: Ended, number: signal.Signals, standin: StandIn) -> None:
    """Console, log, results file, exit code and Iterable agree."""
    words = f"The run ended early: Stopped by {number.name}\n"
    assert ended.exit_code == 128 + number
    assert ended.errors == ""
    assert f"\n{words}" in ended.console
    assert words in ended.log
    assert ended.summary["outcome"] == "interrupted"
    assert ended.summary["exit_code"] == 128 + number
    assert_record_is_true(ended, standin)


def find_statuses(ended: Ended) -> set[str]:
    return {line["status"] for line in ended.lines.values()}


def assert_one_attempt_each(ended: Ended) -> None:
    for line in ended.lines.values():
        for name in CALLS:
            if line[name] is not None:
                assert line[name]["attempts"] == 1


def test_a_signal_lets_started_users_end_and_starts_no_other(
    start_main: StartMain, many: dict[str, str], standin: StandIn
) -> None:
    standin.configure(latency=0.3)
    running = start_main(database=many, ITERABLE_RATE_LIMIT="20")
    standin.wait_for_calls(3)

    ended = stop(running, signal.SIGINT)

    assert_interrupted(ended, signal.SIGINT, standin)
    assert find_statuses(ended) == {"success", "not_attempted"}


def test_a_failed_update_is_not_repeated_after_a_signal(
    start_main: StartMain, three: dict[str, str], standin: StandIn
) -> None:
    standin.fault(endpoint=USERS_UPDATE, status=503, latency=1.0)
    running = start_main(database=three)
    standin.wait_for_calls(3)

    ended = stop(running, signal.SIGTERM)

    assert_interrupted(ended, signal.SIGTERM, standin)
    assert find_statuses(ended) == {"partial_failure"}
    assert_one_attempt_each(ended)


def test_a_signal_cuts_the_wait_for_the_next_attempt(
    start_main: StartMain, three: dict[str, str], standin: StandIn
) -> None:
    standin.fault(endpoint=USERS_UPDATE, status=503, headers=LONG_RETRY_AFTER)
    running = start_main(database=three)
    standin.wait_for_calls(3)

    ended = stop(running, signal.SIGHUP)

    assert_interrupted(ended, signal.SIGHUP, standin)
    assert find_statuses(ended) == {"partial_failure"}
    assert_one_attempt_each(ended)


def test_a_signal_cuts_the_pause_after_a_429(
    start_main: StartMain, many: dict[str, str], standin: StandIn
) -> None:
    standin.fault(endpoint=EVENTS_TRACK, status=429, headers=LONG_RETRY_AFTER, times=1)
    running = start_main(database=many, ITERABLE_RATE_LIMIT="20")
    standin.wait_for_calls(5, USERS_UPDATE)

    ended = stop(running, signal.SIGTERM)

    assert_interrupted(ended, signal.SIGTERM, standin)
    assert find_statuses(ended) == {"success", "partial_failure", "not_attempted"}
    assert_one_attempt_each(ended)


def test_signals_ignored_at_the_start_stay_ignored(
    start_main: StartMain, three: dict[str, str], standin: StandIn
) -> None:
    standin.configure(latency=0.3)
    standin.fault(endpoint=EVENTS_TRACK, latency=1.0)
    running = start_main(database=three, wrapper=in_shell("trap '' INT HUP"))
    standin.wait_for_calls(3)

    running.signal(signal.SIGINT)
    running.signal(signal.SIGHUP)
    standin.wait_for_calls(6)
    ended = stop(running, signal.SIGTERM)

    assert ended.exit_code == 143
    assert ended.summary["success"] == 3


def test_a_second_signal_ends_the_run_at_once(
    start_main: StartMain,
    run_main: RunMain,
    create_customers: CreateCustomers,
    standin: StandIn,
    folder: Path,
) -> None:
    standin.fault("silence", user=address(5), times=1)
    database = create_customers(5)
    running = start_main(database=database)
    running.wait_for("Processing record 4/5")
    standin.wait_for_calls(9)

    running.signal(signal.SIGTERM)
    time.sleep(0.2)  # two at once could be taken in either order
    assert running.process.poll() is None
    ended = stop(running, signal.SIGINT)

    assert ended.exit_code == 130
    assert ended.errors == ""
    assert ended.documents == []
    assert find_recorded(folder) == {address(number) for number in range(1, 5)}
    next_run = run_main("--changed-only", database=database)
    assert next_run.summary["success"] == 1
    assert next_run.summary["unchanged"] == 4


@pytest.fixture
def full_console(folder: Path) -> Iterator[Path]:
    """A pipe that nobody reads, and that takes no byte more."""
    path = folder / "console"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, bytes(select.PIPE_BUF))
    yield path
    os.close(descriptor)


def test_signals_end_a_run_whose_console_nobody_reads(
    start_main: StartMain, three: dict[str, str], full_console: Path
) -> None:
    running = start_main(database=three, wrapper=in_shell(f"exec > '{full_console}'"))
    wait_until_blocked(running)

    running.signal(signal.SIGTERM)
    ended = stop(running, signal.SIGINT)  # two equal signals could become one

    assert ended.exit_code in (130, 143)


def wait_until_blocked(running: Running) -> None:
    """Return when the program has written to a pipe that takes nothing more."""
    function = Path("/proc", str(running.process.pid), "wchan")
    for _ in range(3000):
        if "pipe" in function.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("the program does not write to its console")


# How a run ends is settled once

# main.py, which sends itself SIGTERM when its results file is being completed: before
# or after that, as WHEN says.
SIGNAL_AT_THE_END = """
import os, signal, sys, time
import logger_config

finish = logger_config.ResultsFile.finish


def signal_myself():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)  # until the signal was taken


def finish_with_signal(*arguments, **keywords):
    if os.environ["WHEN"] == "before":
        signal_myself()
    finish(*arguments, **keywords)
    if os.environ["WHEN"] == "after":
        signal_myself()


logger_config.ResultsFile.finish = finish_with_signal
import main

sys.exit(main.main())
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_at_the_end_leaves_no_contradiction(
    run_main: RunMain, three: dict[str, str], standin: StandIn, when: str
) -> None:
    ended = run_main(
        database=three,
        program=("-c", SIGNAL_AT_THE_END),
        PYTHONPATH=str(process.ROOT),
        WHEN=when,
    )

    has_ended_early = "The run ended early: Stopped by SIGTERM" in ended.console
    assert ended.exit_code == ended.results["summary"]["exit_code"]
    assert (ended.exit_code == 143) == has_ended_early
    assert (ended.summary["outcome"] == "interrupted") == has_ended_early
    assert "\nINTEGRATION SUMMARY\n" in ended.console
    assert ended.errors == ""
    assert_record_is_true(ended, standin)


def test_a_signal_before_a_refused_key_is_how_the_run_ends(
    start_main: StartMain, three: dict[str, str], standin: StandIn
) -> None:
    standin.fault(status=401, body=KEY_REFUSED_BODY, latency=1.0)
    running = start_main(database=three)
    standin.wait_for_calls(3)

    ended = stop(running, signal.SIGTERM)

    assert_interrupted(ended, signal.SIGTERM, standin)
    assert ended.console.count("The run ended early: ") == 1


def test_a_refused_key_before_a_signal_is_how_the_run_ends(
    start_main: StartMain, three: dict[str, str], standin: StandIn
) -> None:
    standin.fault(user=address(1), status=401, body=KEY_REFUSED_BODY, latency=0.3)
    standin.fault(user=address(2), latency=2.0)
    running = start_main(database=three)
    running.wait_for(f"Failed user: {address(1)}")

    ended = stop(running, signal.SIGTERM)

    assert ended.exit_code == 4
    assert ended.summary["outcome"] == "aborted"
    assert ended.summary["exit_code"] == 4
    assert ended.console.count("The run ended early: ") == 1
    assert "The run ended early: Iterable refused the API key" in ended.console
    assert_counts_add_up(ended)


# Two runs in one folder


@pytest.mark.parametrize("option", ["--dry-run", "--quiet"])
def test_a_second_run_says_who_holds_the_folder_and_touches_nothing(
    start_main: StartMain,
    run_main: RunMain,
    three: dict[str, str],
    standin: StandIn,
    folder: Path,
    option: str,
) -> None:
    standin.fault("silence", user=address(3))
    holder = start_main(database=three)
    holder.wait_for(f"Successfully processed user: {address(2)}")
    standin.wait_for_calls(5)
    calls_before = standin.counters()
    [partial_file] = folder.glob("integration_results_*")
    record_before = partial_file.read_bytes()

    ended = run_main(option, database=three)

    said = (
        rf"Another run holds {folder}: process {holder.process.pid},"
        r" since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
    )
    assert ended.exit_code == 75
    assert ended.errors == ""
    assert re.fullmatch(said, ended.console.splitlines()[-1])
    assert re.search(said, ended.log)
    assert standin.counters() == calls_before
    assert list(folder.glob("integration_results_*")) == [partial_file]
    assert partial_file.read_bytes() == record_before


def test_a_killed_run_holds_the_folder_no_longer(
    start_main: StartMain, run_main: RunMain, three: dict[str, str], standin: StandIn
) -> None:
    standin.fault("silence", user=address(3), times=1)
    holder = start_main(database=three)
    standin.wait_for_calls(5)
    holder.process.kill()
    holder.wait()

    ended = run_main(database=three)

    assert ended.exit_code == 0
    assert ended.summary["success"] == 3


# The first moments


def wait_for_imports(running: Running, count: int) -> None:
    """Return when main.py has imported argparse, its second module, and so many more.

    Python says so with `-X importtime`.
    """
    is_enough = False
    while not is_enough:
        assert running.process.poll() is None
        time.sleep(0.002)
        _, argparse, others = running.errors().partition(" argparse\n")
        is_enough = bool(argparse) and others.count("\n") >= count


@pytest.mark.parametrize("imports", [0, 50, 150])
def test_ctrl_c_while_modules_are_imported_shows_no_traceback(
    start_main: StartMain, three: dict[str, str], imports: int
) -> None:
    with Trap() as silent_database:
        running = start_main(
            database={**three, "DB_PORT": str(silent_database.port)},
            program=("-X", "importtime", *process.MAIN),
        )
        wait_for_imports(running, imports)
        ended = stop(running, signal.SIGINT)

    assert ended.exit_code == 130
    assert "Traceback" not in ended.errors
    assert "KeyboardInterrupt" not in ended.errors
