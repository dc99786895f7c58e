"""Runs that are stopped, killed, started twice, or short of disk, memory or threads: the record is true in the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lab import process
from lab.database import DatabaseServer
from lab.process import Customers, Program, Started
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

ROUNDS = int(os.environ.get("KILL_ROUNDS", "2"))  # of kill -9
USERS = 150
CALLS = {"users_update": USERS_UPDATE, "events_track": EVENTS_TRACK}
SOON = 3.0  # seconds that an end may take here: about one, and the machine is busy with other tests
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(scope="module")
def many(customers: Customers) -> dict[str, str]:
    return customers(USERS)


def address(number: int) -> str:
    return f"user{number}@example.com"


def shell(commands: str) -> dict[str, Any]:
    """How to start main.py from a shell, after these commands."""
    return {"wrapper": ("sh", "-c", f'{commands}; exec "$@"', "sh")}


def told(standin: StandIn) -> set[str]:
    """Who got both calls; no one may have got only one."""
    state = standin.state()
    assert sorted(state["users"]) == sorted(event["email"] for event in state["events"].values())
    return set(state["users"])


def successes(folder: Path) -> set[str]:
    """Who is on record as told, also in files that have no end. Each user's line must be whole."""
    lines = [line for path in folder.glob("integration_results_*") for line in path.read_text("utf-8").split("\n")]
    users = [json.loads(line.rstrip(",")) for line in lines if line.startswith('{"rec')]
    return {user["email"] for user in users if user["status"] == "success"}


def stop(running: process.Running, number: signal.Signals) -> process.Ended:
    """Send the signal. The run has to end soon."""
    before = time.monotonic()
    running.signal(number)
    ended = running.wait()
    assert time.monotonic() - before < SOON
    return ended


def assert_counts_add_up(ended: process.Ended) -> None:
    lines, summary = ended.results["results"], ended.results["summary"]
    counts = Counter(line["status"] + "s" * line["status"].endswith("failure") for line in lines)
    names = ("success", "partial_failures", "total_failures", "not_attempted")
    assert counts == Counter({name: summary[name] for name in names})
    assert sorted(line["record"] for line in lines) == list(range(1, summary["total_users"] + 1))
    assert list(ended.folder.glob("*.partial")) == []


def assert_record_is_true(ended: process.Ended, standin: StandIn) -> None:
    """The document is whole, its counts add up, and it says of each user and call what the stand-in saw."""
    assert_counts_add_up(ended)
    lines, state = ended.results["results"], standin.state()
    calls = {(line["email"], CALLS[key]): line[key] for line in lines for key in CALLS if line[key]}
    arrived = Counter((call["email"], call["endpoint"]) for call in state["journal"])
    assert {each: call["attempts"] for each, call in calls.items()} == arrived
    assert ended.results["summary"]["calls"] == arrived.total()
    for line in lines:
        has = [line["email"] in state["users"], line["event_id"] in state["events"]]
        untouched = not {(line["email"], endpoint) for endpoint in CALLS.values()} & calls.keys()
        status = "not_attempted" if untouched else ("total_failure", "partial_failure", "success")[sum(has)]
        assert (line["status"], [bool(line[key] and line[key]["ok"]) for key in CALLS]) == (status, has)


# kill -9


@pytest.mark.parametrize("number", range(ROUNDS))
def test_runs_that_are_killed_lose_nobody_and_nobody_on_record_is_told_again(
    started: Started, many: dict[str, str], standin: StandIn, folder: Path, number: int
) -> None:
    print("seed", seed := random.randrange(1_000_000))
    chance = random.Random(seed)
    standin.configure(latency=chance.choice([0.0, 0.02, 0.1]))
    calls_when_on_record: dict[str, int] = {}

    def calls() -> Counter[str]:
        return Counter(call["email"] for call in standin.state()["journal"])

    for kill in (True, True, False):
        enough = calls().total() + chance.randrange(2 * (USERS - len(calls_when_on_record)) + 1)
        running = started("--changed-only", database=many, ITERABLE_RATE_LIMIT="2000", MAX_WORKERS="50")
        if kill:
            standin.wait_for_calls(enough, timeout=30)
            running.process.kill()
        ended, now = running.wait(), calls()
        for email in successes(folder) - calls_when_on_record.keys():
            calls_when_on_record[email] = now[email]
    assert (ended.exit_code, standin.state()["violations"]) == (0, [])
    assert ended.results["summary"]["success"] + ended.results["summary"]["unchanged"] == USERS
    assert "damaged" not in ended.console  # the torn line of a killed run is no news
    assert told(standin) == set(map(address, range(1, USERS + 1))) == calls_when_on_record.keys()
    assert calls() == calls_when_on_record


# Signals


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_signal_before_the_first_user_ends_the_run_at_once_and_leaves_no_results(
    started: Started, customers: Customers, server: DatabaseServer, standin: StandIn, folder: Path, number: Any
) -> None:
    database = customers(1)
    with server.connect(database["DB_NAME"]) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLES page_views WRITE")
        running = started(database=database)
        running.wait_for("[STEP 3]")
        time.sleep(0.1)  # until the query waits for the lock
        ended = stop(running, number)
    assert (ended.exit_code, ended.errors) == (128 + number, "")
    assert list(folder.glob("integration_results_*")) == []
    assert standin.counters()["connections"] == 0


SLOWLY = {"Retry-After": "120"}
ALL_KINDS = {"partial_failure", "success", "not_attempted"}


@pytest.mark.parametrize(
    ("number", "users", "statuses", "fault"),
    [
        (INT, 60, {"success", "not_attempted"}, {"latency": 0.3}),
        (TERM, 3, {"partial_failure"}, {"endpoint": USERS_UPDATE, "status": 503, "latency": 0.3}),
        (HUP, 3, {"partial_failure"}, {"endpoint": USERS_UPDATE, "status": 503, "headers": SLOWLY}),
        (TERM, 30, ALL_KINDS, {"endpoint": EVENTS_TRACK, "status": 429, "headers": SLOWLY, "times": 1}),
    ],
    ids=["on the wire and in the queue", "on the wire, and fails", "in a Retry-After", "in the event's pause"],
)
def test_a_signal_while_sending_leaves_each_user_whole_or_untouched_and_the_record_true(
    started: Started, customers: Customers, standin: StandIn, number: Any, users: int, statuses: Any, fault: Any
) -> None:
    standin.fault(**fault)
    running = started(database=customers(users), ITERABLE_RATE_LIMIT="20")
    standin.wait_for_calls(3, USERS_UPDATE, timeout=30)
    time.sleep(0.1)  # until there are answers, where they come at once
    ended = stop(running, number)
    assert_record_is_true(ended, standin)
    lines, summary = ended.results["results"], ended.results["summary"]
    assert (summary["outcome"], summary["exit_code"], ended.exit_code) == ("interrupted", 128 + number, 128 + number)
    for shown in (ended.console, ended.log):
        assert f"The run ended early: Stopped by {number.name}\n" in shown
    assert {line["status"] for line in lines} == statuses
    attempts = [[line[key] and line[key]["attempts"] for key in CALLS] for line in lines]
    assert [both for both in attempts if both not in ([1, 1], [None, None])] == []


def test_signals_that_were_ignored_at_the_start_stay_ignored(
    started: Started, customers: Customers, standin: StandIn
) -> None:
    standin.fault(latency=0.3)
    running = started(database=customers(3), how=shell("trap '' INT HUP"))
    standin.wait_for_calls(3)
    running.signal(INT)
    running.signal(HUP)
    standin.wait_for_calls(6)
    ended = stop(running, TERM)
    assert (ended.exit_code, ended.summary["success"]) == (143, 3)


def test_a_second_signal_ends_the_run_at_once_and_leaves_the_partial_file_intact(
    started: Started, program: Program, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", email=address(5), times=1)
    database = customers(5)
    running = started(database=database)
    running.wait_for("Processing record 4/5")
    standin.wait_for_calls(9)
    running.signal(TERM)
    time.sleep(0.2)  # two at once could be taken in either order
    assert running.process.poll() is None
    ended = stop(running, INT)
    assert (ended.exit_code, ended.errors, ended.documents) == (130, "", [])
    assert successes(folder) == {address(number) for number in range(1, 5)}
    again = program("--changed-only", database=database).summary
    assert (again["success"], again["unchanged"]) == (1, 4)


def test_signals_end_a_run_whose_console_nobody_reads_and_whose_log_is_full(
    started: Started, customers: Customers, folder: Path
) -> None:
    console = folder / "console"
    os.mkfifo(console)
    descriptor = os.open(console, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, bytes(select.PIPE_BUF))
    running = started(database=customers(1), how=shell(f"exec > '{console}'"), LOG_FILE="/dev/full")
    while len(os.listdir(f"/proc/{running.process.pid}/task")) < 2:  # it does not listen yet
        time.sleep(0.01)
    time.sleep(0.3)  # now it stands still at its first line
    assert running.process.poll() is None
    running.signal(TERM)
    assert stop(running, INT).exit_code in (130, 143)  # another signal: two equal ones could become one
    os.close(descriptor)


# Two runs, and a disk that is full


def test_a_second_run_says_who_holds_the_folder_and_touches_nothing_until_the_first_is_dead(
    started: Started, program: Program, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", email=address(2), times=1)
    database = customers(2)
    holder = started(database=database)
    holder.wait_for("Successfully processed user: user1@example.com")
    standin.wait_for_calls(3)

    def traces() -> Any:
        return standin.counters(), {path: path.read_bytes() for path in folder.glob("*integration_results*")}

    before = traces()
    for option in ("--dry-run", "--quiet"):
        ended = program(option, database=database)
        said = rf"Another run holds {folder}: process {holder.process.pid}, since [\d-]{{10}} [\d:]{{8}} [+-]\d{{4}}"
        assert re.fullmatch(said, ended.console.splitlines()[-1]) and re.search(said, ended.log)
        assert (ended.exit_code, ended.errors, traces()) == (75, "", before)
    assert len(ended.console.splitlines()) == 1
    holder.process.kill()
    holder.wait()
    ended = program(database=database)
    assert (ended.exit_code, ended.summary["success"]) == (0, 2)


def test_when_the_results_file_can_grow_no_more_the_run_stops_and_the_next_one_goes_on(
    started: Started, program: Program, many: dict[str, str], standin: StandIn, folder: Path
) -> None:
    long = json.dumps({"msg": "\N{GRINNING FACE}" * 480, "code": "Success", "params": None})  # 4 kB in the file a user
    for endpoint in CALLS.values():
        standin.fault(endpoint=endpoint, status=200, processed=True, body=long, latency=0.02)
    ended = started(database=many, how=shell("ulimit -f 400"), MAX_WORKERS="10").wait()  # of 512 bytes each
    assert (ended.exit_code, ended.errors) == (1, "")
    words = r"The run ended early: \S+/integration_results_\d+_\d+\.json\.partial cannot be written.*File too large"
    assert re.search(words, ended.console)
    first = told(standin)
    assert 0 < len(first) < USERS
    for words in (f"Successful (both API calls): {len(first)}\n", f"Not attempted: {USERS - len(first)}\n"):
        assert words in ended.console
    assert set(re.findall(r"Successfully processed user: (\S+)", ended.log)) == first
    before = sum(standin.counters()["calls"].values())
    again = program("--changed-only", database=many)
    assert (again.exit_code, len(told(standin)), again.summary["unchanged"] > 0) == (0, USERS, True)
    assert sum(standin.counters()["calls"].values()) == before + again.summary["calls"]


# A machine that is short of memory or threads, and errors nobody thought of


@pytest.mark.parametrize("limit", ["-v 60000", "-v 300000", "-v 900000", "-v 2800000", "-d 60000", "-d 150000"])
def test_with_little_memory_the_account_is_whole(started: Started, many: dict[str, str], limit: str) -> None:
    with StandIn(tls="good", latency=0.02) as standin:  # for TLS crashes without memory
        own = {"url": standin.url, "REQUESTS_CA_BUNDLE": str(standin.ca_file)}
        ended = started("--limit", "30", database=many, how=shell(f"ulimit {limit}"), **own).wait()
        assert_record_is_true(ended, standin)
    summary = ended.results["summary"]
    if ended.exit_code:
        assert (ended.exit_code, summary["outcome"]) == (1, "aborted")
        assert re.search("^The run ended early: unexpected error .+ lower MAX_WORKERS", ended.console, re.MULTILINE)
    assert ended.errors == ""
    assert ended.exit_code or summary["success"] == 30


@pytest.mark.parametrize("threads", [2, 20])
def test_with_few_threads_the_account_is_whole(
    started: Started, many: dict[str, str], standin: StandIn, threads: int
) -> None:
    # An account with a limit of its own to its processes and threads, but with root's right to read files.
    rights = [f"--{kind}=-all,+dac_override" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    account = [f"--reuid={50_000 + os.getpid() % 10_000}", "--regid=54321", "--clear-groups"]
    wrapper = ("setpriv", *rights, *account, "prlimit", f"--nproc={threads}")
    if not shutil.which("setpriv") or subprocess.run([*wrapper, sys.executable, "-c", ""]).returncode:
        pytest.skip("this account may not become another one")
    standin.configure(latency=0.05)
    ended = started("--limit", "30", database=many, how={"wrapper": wrapper}).wait()
    assert (ended.exit_code, ended.errors) == (1, "")
    words = """The run ended early: unexpected error RuntimeError("can't start new thread"): see the log file"""
    assert words in ended.console
    assert (len(told(standin)) > 0) == (threads == 20)
    assert_record_is_true(ended, standin)


BROKEN = """
import sys
import iterable_client, logger_config
whole, struck = {what}, []
def broken(*arguments, **keywords):
    if not struck and {words!r} in str(arguments):
        struck.append(True)
        raise {error}
    return whole(*arguments, **keywords)
{what} = broken
import main
sys.exit(main.main())
"""
NEW = "ZeroDivisionError('nobody thought of it')"


def test_memory_that_runs_out_before_the_first_user_is_told(started: Started, customers: Customers) -> None:
    how = {"program": ("-c", BROKEN.format(what="logger_config.read_memory", words="", error="MemoryError"))}
    ended = started("--changed-only", "--quiet", database=customers(1), how=how, PYTHONPATH=str(process.ROOT)).wait()
    assert (ended.exit_code, ended.console, ended.errors) == (1, "out of memory\n", "")


@pytest.mark.parametrize(
    ("what", "words", "error", "outcome"),
    [
        ("iterable_client.IterableClient.post", "'events/track', {'user5@", NEW, "aborted"),
        ("iterable_client.interpret", "", NEW, "completed"),
        ("logger_config.verdict", "", "MemoryError", "aborted"),
        ("logger_config.ResultsFile.add", "user5@", NEW, "aborted"),
    ],
    ids=["before a call", "in a call", "in the report", "in the file"],
)
def test_after_an_error_nobody_thought_of_whoever_was_told_is_on_record(
    started: Started, customers: Customers, standin: StandIn, what: str, words: str, error: str, outcome: str
) -> None:
    database = customers([*[{}] * 8, {"email": "bad@nowhere"}, *[{}] * 8])
    how = {"program": ("-c", BROKEN.format(what=what, words=words, error=error))}
    ended = started("--quiet", database=database, how=how, MAX_WORKERS="3", PYTHONPATH=str(process.ROOT)).wait()
    assert (ended.exit_code, ended.errors) == (1, "")
    says = {
        "aborted": r"The run ended early: unexpected error (ZeroDivision|Memory)Error\(",
        "completed": r"error \(ZeroDivisionError\)",
    }
    assert re.search(says[outcome], ended.console)
    assert "Traceback" in ended.log
    assert (ended.summary["outcome"], ended.summary["exit_code"]) == (outcome, 1)
    assert_counts_add_up(ended)
    calls = {(line["email"], CALLS[key]) for line in ended.results["results"] for key in CALLS if line[key]}
    assert calls >= {(call["email"], call["endpoint"]) for call in standin.state()["journal"]}
