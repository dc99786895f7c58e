"""Runs that are killed, stopped or started twice: nobody lost, nobody told twice, and the record is true (issue 4).

KILL_ROUNDS=60 makes as many rounds of `kill -9` as the issue asks for. What was measured is printed (pytest -rP).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import harness
from database import DatabaseServer
from standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn, Trap

Program = Callable[..., harness.Ended]
Started = Callable[..., harness.Running]
Customers = Callable[..., dict[str, str]]
Settings = Callable[..., dict[str, str]]

ROUNDS = int(os.environ.get("KILL_ROUNDS", "4"))
USERS = 300
ENDPOINTS = {"users_update": USERS_UPDATE, "events_track": EVENTS_TRACK}
SOON = 3.0  # seconds that an end may take here: about one, and the machine is busy with other tests
NOTHING_SENT = {  # the summary of a run that was stopped before it had any rows
    "total_users": 0,
    "success": 0,
    "partial_failures": 0,
    "total_failures": 0,
    "forgotten": 0,
    "unchanged": 0,
    "not_attempted": 0,
    "calls": 0,
    "retries": 0,
    "users_per_second": 0.0,
    "failure_reasons": [],
}


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def address(number: int) -> str:
    return f"user{number}@example.com"


def process(*wrapper: str, settings: dict[str, str], stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    """main.py, started by another program, as nohup does."""
    coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return subprocess.Popen(
        [*wrapper, sys.executable, str(harness.ROOT / "main.py"), "--env-file", "/dev/null"],
        env={**harness.BARE, **coverage, **settings},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


# kill -9


@pytest.fixture(scope="module")
def three_hundred(customers: Customers) -> dict[str, str]:
    return customers(USERS)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The users' lines of a file that may have no end. Each must be whole."""
    head, *rest = path.read_text("utf-8").split('"results": [\n')
    assert head.startswith('{\n"run": {')
    users = rest[0].split("\n],\n")[0].split("\n") if rest else []
    return [json.loads(line.rstrip(",")) for line in users if line]


def kill_after(running: harness.Running, standin: StandIn, calls: int) -> bool:
    """Kill it when so many more calls have arrived; whether it was still running."""
    target = calls + sum(standin.counters()["calls"].values())
    while running.process.poll() is None:
        with contextlib.suppress(TimeoutError):
            standin.wait_for_calls(target, timeout=0.1)
            running.process.kill()
    return running.wait().exit_code == 128 + signal.SIGKILL


def accepted(standin: StandIn) -> dict[str, tuple[int, int]]:
    """How often each user's two calls were a success."""
    calls = standin.state()["accepted"]
    return {
        address(number): (
            calls[USERS_UPDATE].get(address(number), 0),
            calls[EVENTS_TRACK].get(f"page-view-{number}", 0),
        )
        for number in range(1, USERS + 1)
    }


@pytest.mark.parametrize("number", range(ROUNDS))
def test_runs_that_are_killed_lose_nobody_and_nobody_on_record_is_told_again(
    started: Started, three_hundred: dict[str, str], standin: StandIn, folder: Path, number: int
) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    standin.configure(latency=chance.choice([0.0, 0.02, 0.1]))
    on_record: dict[str, tuple[int, int]] = {}  # the user's accepted calls when first seen with a line of success
    kills = 0
    for may_kill in (1.0, 0.5, 0.5, 0.0):
        left = 2 * (USERS - len(on_record))
        running = started("--changed-only", database=three_hundred) if kills else started(database=three_hundred)
        if chance.random() < may_kill:
            kills += kill_after(running, standin, chance.randrange(left + 1))
        running.wait()
        now = accepted(standin)
        for path in folder.glob("integration_results_*"):
            for line in lines_of(path):
                if line["status"] == "success":
                    on_record.setdefault(line["email"], now[line["email"]])
    ended = running.wait()
    state, counts = standin.state(), accepted(standin)
    assert ended.exit_code == 0
    assert ended.results["summary"]["success"] + ended.results["summary"]["unchanged"] == USERS
    assert {who: counts[who] for who in on_record} == on_record
    assert sorted(state["users"]) == sorted(map(address, range(1, USERS + 1)))
    assert {view: event["email"] for view, event in state["events"].items()} == {
        f"page-view-{number}": address(number) for number in range(1, USERS + 1)
    }
    assert state["violations"] == []
    twice = sum(max(both) > 1 for both in counts.values())
    print(f"killed {kills} times; {twice} users were on the wire or between file and answer then, and told again")


def test_a_killed_run_leaves_every_finished_user_on_record(
    started: Started, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", email=address(7))
    running = started(database=customers(9))
    running.wait_for("Processing record 6/9")
    wait_until(lambda: len(standin.state()["journal"]) == 17)  # both calls of all but one, and its first
    [partial] = folder.glob("*.partial")
    wait_until(lambda: len(lines_of(partial)) == 8)
    running.process.kill()
    running.wait()
    told = {line["email"]: line["status"] for line in lines_of(partial)}
    assert told == {address(number): "success" for number in (1, 2, 3, 4, 5, 6, 8, 9)}


# One signal


def assert_record_is_true(ended: harness.Ended, standin: StandIn) -> None:
    """The document is whole, its counts add up, and it says of each user and call what the stand-in saw."""
    lines, summary, state = ended.results["results"], ended.results["summary"], standin.state()
    counts = Counter(line["status"] for line in lines)
    assert counts == Counter(
        success=summary["success"],
        partial_failure=summary["partial_failures"],
        total_failure=summary["total_failures"],
        forgotten=summary["forgotten"],
        not_attempted=summary["not_attempted"],
    )
    assert summary["total_users"] == counts.total() + summary["unchanged"]
    assert sorted(line["record"] for line in lines) == list(range(1, len(lines) + 1))
    recorded = {
        (line["email"], endpoint): line[key]["attempts"]
        for line in lines
        for key, endpoint in ENDPOINTS.items()
        if line[key]
    }
    assert recorded == Counter((call["email"], call["endpoint"]) for call in state["journal"])
    assert summary["calls"] == len(state["journal"])
    for line in lines:
        first, second = line["email"] in state["users"], line["event_id"] in state["events"]
        touched = any((line["email"], endpoint) in recorded for endpoint in ENDPOINTS.values())
        failed = ("total_failure", "partial_failure", "success")[first + second]
        assert line["status"] == (failed if touched else "not_attempted")
        assert [bool(line[key] and line[key]["ok"]) for key in ENDPOINTS] == [first, second]
    assert list(ended.folder.glob("*.partial")) == []


def assert_stopped(ended: harness.Ended, number: signal.Signals) -> None:
    """Exit code, outcome and words of a run that one signal stopped."""
    summary = ended.results["summary"]
    assert ended.exit_code == summary["exit_code"] == 128 + number
    assert summary["outcome"] == "interrupted"
    assert ended.errors == ""
    assert f"Stopped by {number.name}" in ended.console
    assert f"{number.name}: no new user starts, those already started are finished" in ended.log


def stop(running: harness.Running, number: signal.Signals) -> tuple[harness.Ended, float]:
    """Send the signal; how the run ended, and how many seconds later."""
    before = time.monotonic()
    running.signal(number)
    ended = running.wait()
    return ended, time.monotonic() - before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_while_the_program_is_starting_ends_it_without_a_traceback(
    started: Started, customers: Customers, standin: StandIn, number: signal.Signals
) -> None:
    running = started(database=customers(3))
    libraries = Path(f"/proc/{running.process.pid}/maps")
    wait_until(lambda: "_ssl." in libraries.read_text())  # in the middle of the imports
    ended, seconds = stop(running, number)
    print(f"ended after {seconds:.2f} s")
    assert (ended.exit_code, ended.errors) == (128 + number, "")
    assert standin.counters()["connections"] == 0


@contextlib.contextmanager
def silent_server(customers: Customers, server: DatabaseServer) -> Iterator[tuple[dict[str, str], Callable[[], Any]]]:
    with Trap() as trap:
        yield {**customers(1), "DB_PORT": str(trap.port)}, lambda: trap.connections


@contextlib.contextmanager
def closed_port(customers: Customers, server: DatabaseServer) -> Iterator[tuple[dict[str, str], str]]:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        yield {**customers(1), "DB_PORT": str(bound.getsockname()[1])}, "next try in 1 s"


@contextlib.contextmanager
def locked_table(customers: Customers, server: DatabaseServer) -> Iterator[tuple[dict[str, str], Callable[[], Any]]]:
    settings = customers(1)
    name = settings["DB_NAME"]
    waiting = f"SELECT 1 FROM information_schema.processlist WHERE db = '{name}' AND info LIKE '%page_views%'"
    with server.connect(name) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLES page_views WRITE")
        yield settings, lambda: server.query(waiting, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("stage", [silent_server, closed_port, locked_table])
def test_a_signal_while_waiting_for_the_database_ends_the_run_with_a_whole_file(
    started: Started,
    customers: Customers,
    server: DatabaseServer,
    standin: StandIn,
    stage: Callable[..., contextlib.AbstractContextManager[tuple[dict[str, str], Any]]],
    number: signal.Signals,
) -> None:
    with stage(customers, server) as (database, reached):
        running = started(database=database)
        if isinstance(reached, str):
            running.wait_for(reached)
        else:
            wait_until(reached)
        ended, seconds = stop(running, number)
    print(f"ended after {seconds:.2f} s")
    assert seconds < SOON
    assert_stopped(ended, number)
    summary = ended.results["summary"]
    assert {key: summary[key] for key in NOTHING_SENT} == NOTHING_SENT
    assert ended.results["results"] == []
    assert standin.counters()["connections"] == 0


def test_a_signal_while_the_memory_is_read_ends_the_run(
    program: Program, started: Started, customers: Customers, standin: StandIn, folder: Path
) -> None:
    database = customers(2)
    program(database=database)
    [memory] = folder.glob("integration_results_*.json")
    head, first, *_ = memory.read_text("utf-8").split("\n")[2:]
    (folder / "large").write_text('{\n"run": {"mode": "send"},\n' + head + "\n" + f"{first}\n" * 20_000, "utf-8")
    for copy in range(400):  # 20 s and more in all
        (folder / f"integration_results_{copy}.json").hardlink_to(folder / "large")
    standin.reset()
    running = started("--changed-only", database=database)
    running.wait_for("[STEP 5]")
    before = time.monotonic()
    running.signal(signal.SIGTERM)
    ended = running.wait()
    seconds = time.monotonic() - before
    print(f"ended after {seconds:.2f} s")
    assert seconds < SOON
    assert ended.exit_code == 143
    document = json.loads(max(folder.glob("integration_results_2*_*.json")).read_text("utf-8"))
    assert [line["status"] for line in document["results"]] == ["not_attempted"] * 2
    assert (document["summary"]["not_attempted"], document["summary"]["outcome"]) == (2, "interrupted")
    assert standin.counters()["connections"] == 0


@dataclass(frozen=True)
class Stage:
    """Where the signal comes: after `calls` of `endpoint` have arrived, and the log shows `words`.

    `statuses` are those that the users may have then, and `latency` the seconds that the last answer takes.
    """

    statuses: set[str]
    faults: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    calls: int = 1
    endpoint: str = USERS_UPDATE
    words: str = ""
    latency: float = 0.0
    users: int = 3
    attempts: int | None = None  # of each call that was made


STAGES = {
    "waiting for the rate limit": Stage(
        {"success", "not_attempted"}, settings={"ITERABLE_RATE_LIMIT": "1"}, users=30, attempts=1
    ),
    "in a backoff": Stage(
        {"partial_failure"},
        [{"endpoint": USERS_UPDATE, "status": 503}],
        {"ITERABLE_MAX_ATTEMPTS": "100"},
        words=r"next try in ([2-9]|\d\d)\.\d s",
        users=30,
    ),
    "in a Retry-After": Stage(
        {"partial_failure"},
        [{"endpoint": USERS_UPDATE, "status": 503, "headers": {"Retry-After": "120"}}],
        calls=3,
        words=r"(next try in 120\.0 s(.|\n)*){3}",
        attempts=1,
    ),
    "in the event's Retry-After": Stage(
        {"partial_failure"},
        [{"endpoint": EVENTS_TRACK, "status": 503, "headers": {"Retry-After": "120"}}],
        calls=3,
        endpoint=EVENTS_TRACK,
        words=r"(next try in 120\.0 s(.|\n)*){3}",
        attempts=1,
    ),
    "in a 429's pause": Stage(
        {"partial_failure", "not_attempted"},
        [{"endpoint": USERS_UPDATE, "status": 429, "headers": {"Retry-After": "100"}}],
        words=r"429: pause of 100\.0 s",
        users=30,
        attempts=1,
    ),
    "in the event's 429's pause": Stage(
        {"partial_failure", "success", "not_attempted"},
        [{"endpoint": EVENTS_TRACK, "status": 429, "headers": {"Retry-After": "100"}, "times": 1}],
        {"ITERABLE_RATE_LIMIT": "20"},
        words=r"429: pause of 100\.0 s",
        users=30,
        attempts=1,
    ),
    "with calls on the wire": Stage(
        {"success", "not_attempted"},
        [{"latency": 0.6}],
        {"ITERABLE_RATE_LIMIT": "20"},
        calls=5,
        latency=0.6,
        users=60,
        attempts=1,
    ),
    "with a call on the wire that fails": Stage(
        {"partial_failure"},
        [{"endpoint": USERS_UPDATE, "status": 503, "latency": 0.6}],
        calls=3,
        attempts=1,
    ),
    "with the first call answered and the second on the wire": Stage(
        {"success"},
        [{"endpoint": EVENTS_TRACK, "latency": 0.6}],
        calls=3,
        endpoint=EVENTS_TRACK,
        latency=0.6,
        attempts=1,
    ),
    "with a call on the wire that never gets an answer": Stage(
        {"partial_failure", "success"},
        [{"action": "silence", "endpoint": USERS_UPDATE, "email": address(2)}],
        {"ITERABLE_TIMEOUT": "1"},
        calls=3,
        attempts=1,
    ),
}


@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, signal.SIGTERM) for name in STAGES), ("with calls on the wire", signal.SIGINT)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_while_sending_leaves_each_user_whole_or_untouched_and_the_record_true(
    started: Started, customers: Customers, standin: StandIn, name: str, number: signal.Signals
) -> None:
    stage = STAGES[name]
    for fault in stage.faults:
        standin.fault(**fault)
    running = started(database=customers(stage.users), **stage.settings)
    standin.wait_for_calls(stage.calls, stage.endpoint, timeout=30)
    wait_until(lambda: re.search(stage.words, (running.folder / "run.log").read_text("utf-8")))
    ended, seconds = stop(running, number)
    finished = time.monotonic()
    last_answer = max(standin.state()["journal"][-1]["t"] + stage.latency, finished - seconds)
    print(f"ended {seconds:.2f} s after the signal, {finished - last_answer:.2f} s after the last answer")
    assert finished - last_answer < SOON + float(stage.settings.get("ITERABLE_TIMEOUT", 0))
    assert_stopped(ended, number)
    assert_record_is_true(ended, standin)
    lines = ended.results["results"]
    assert {line["status"] for line in lines} <= stage.statuses
    made = [line[key] for line in lines for key in ENDPOINTS if line[key]]
    assert all((line["users_update"] is None) == (line["events_track"] is None) for line in lines)
    assert {call["attempts"] for call in made} == {stage.attempts} or stage.attempts is None


# Two signals, and signals that do not count


def test_a_second_signal_ends_the_run_at_once_and_leaves_the_partial_file_intact(
    started: Started, program: Program, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", email=address(5), times=1)
    database = customers(5)
    running = started(database=database)
    running.wait_for("Processing record 4/5")
    running.signal(signal.SIGTERM)
    running.wait_for("SIGTERM: no new user starts")
    ended, seconds = stop(running, signal.SIGINT)
    print(f"ended after {seconds:.2f} s")
    assert (ended.exit_code, ended.errors, ended.documents) == (130, "", [])
    assert seconds < SOON
    [partial] = folder.glob("*.partial")
    told = {line["email"]: line["status"] for line in lines_of(partial)}
    assert told == {address(number): "success" for number in range(1, 5)}
    again = program("--changed-only", database=database).results["summary"]
    assert (again["success"], again["unchanged"]) == (1, 4)


def test_a_second_signal_ends_a_run_whose_console_nobody_reads(
    settings: Settings, customers: Customers, folder: Path
) -> None:
    read, write = os.pipe()
    with open(read, "rb"), open(write, "wb", buffering=0) as console:
        os.set_blocking(write, False)
        while console.write(bytes(select.PIPE_BUF)):  # None when it is full
            pass
        os.set_blocking(write, True)
        run = process(settings=settings(customers(1)), stdout=console)
        try:
            wait_until((folder / "run.log").exists)  # from here on its first line waits for the console
            run.send_signal(signal.SIGTERM)
            run.send_signal(signal.SIGINT)  # another signal: two equal ones could become one
            assert run.wait(10) in (130, 143)
        finally:
            run.kill()
            run.communicate()


def test_a_sigint_that_was_ignored_at_the_start_stays_ignored(
    settings: Settings, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.fault(latency=0.6)
    run = process("sh", "-c", 'trap "" INT; exec "$@"', "sh", settings=settings(customers(3)))
    standin.wait_for_calls(3)
    run.send_signal(signal.SIGINT)
    console, errors = run.communicate(timeout=30)
    ended = harness.Ended(run.returncode, console, errors, folder)
    assert (ended.exit_code, ended.errors, ended.results["summary"]["success"]) == (0, "", 3)
    assert "SIGINT" not in ended.console + ended.log


def test_where_sigint_is_ignored_sigterm_still_stops_the_run(
    settings: Settings, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.fault("silence")
    run = process("sh", "-c", 'trap "" INT; exec "$@"', "sh", settings=settings(customers(1), ITERABLE_TIMEOUT="1"))
    standin.wait_for_calls(1)
    run.send_signal(signal.SIGTERM)
    console, errors = run.communicate(timeout=30)
    assert_stopped(harness.Ended(run.returncode, console, errors, folder), signal.SIGTERM)


# A machine that is short of something


def test_a_machine_that_has_no_room_for_another_thread_does_with_those_it_has(
    settings: Settings, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.configure(latency=0.2)
    small = 'ulimit -s 65536; ulimit -v 1500000; exec "$@"'  # 64 MB for each thread, of 1500
    run = process("sh", "-c", small, "sh", settings=settings(customers(150), MALLOC_ARENA_MAX="1"))
    console, errors = run.communicate(timeout=60)
    ended = harness.Ended(run.returncode, console, errors, folder)
    assert (ended.exit_code, ended.errors) == (0, "")
    assert_record_is_true(ended, standin)
    assert ended.results["summary"]["success"] == 150
    assert standin.counters()["connections"] < 30  # it was short of threads


# Overlap


@pytest.fixture
def holder(started: Started, customers: Customers, standin: StandIn) -> harness.Running:
    """A run that holds the folder: its first of two users is told, its second gets no answer."""
    standin.fault("silence", email=address(2), times=1)
    running = started(database=customers(2))
    running.wait_for("Successfully processed user: user1@example.com")
    standin.wait_for_calls(3)
    return running


def contents(folder: Path) -> dict[str, tuple[float, bytes]]:
    """Every results file of a folder, and its lock: when it changed, and what is in it."""
    return {path.name: (path.stat().st_mtime, path.read_bytes()) for path in folder.glob("*integration_results*")}


@pytest.mark.parametrize("arguments", [(), ("--changed-only",), ("--dry-run",)], ids=["plain", "changed-only", "dry"])
def test_a_second_run_says_who_holds_the_folder_since_when_and_touches_nothing(
    holder: harness.Running, program: Program, customers: Customers, standin: StandIn, folder: Path, arguments: Any
) -> None:
    before, calls = contents(folder), standin.counters()
    ended = program(*arguments, database=customers(1))
    assert (ended.exit_code, ended.errors) == (75, "")
    assert contents(folder) == before
    assert standin.counters() == calls
    said = re.search(
        rf"^Another run holds {re.escape(str(folder))}: process {holder.process.pid}, since (.+)$",
        ended.console,
        re.MULTILINE,
    )
    assert said
    since = datetime.strptime(said[1], "%Y-%m-%d %H:%M:%S %z")
    [partial] = folder.glob("*.partial")
    run = partial.read_text("utf-8").split("\n")[1].removeprefix('"run": ').rstrip(",")
    began = datetime.fromisoformat(json.loads(run)["started_at"])
    assert abs(since - began) <= timedelta(seconds=1)
    assert said[0] in ended.log


def test_a_quiet_second_run_says_so_too(holder: harness.Running, program: Program, customers: Customers) -> None:
    ended = program("--quiet", database=customers(1))
    assert (ended.exit_code, len(ended.console.splitlines())) == (75, 1)
    assert ended.console.startswith("Another run holds ")


def test_the_lock_dies_with_its_process(
    holder: harness.Running, program: Program, customers: Customers, folder: Path
) -> None:
    assert program(database=customers(1)).exit_code == 75
    holder.process.kill()
    holder.wait()
    lock = folder / ".integration_results.lock"
    lock.write_text(f"process {'9' * 50}, since long ago")
    ended = program(database=customers(1))
    assert (ended.exit_code, ended.results["summary"]["success"]) == (0, 1)
    assert re.fullmatch(r"process \d{1,8}, since [-+: \d]{25}", lock.read_text("utf-8"))


def test_a_run_with_another_folder_goes_on_beside_it(
    holder: harness.Running, program: Program, customers: Customers, folder: Path
) -> None:
    other = folder / "other"
    assert program(database=customers(1), RESULTS_DIR=str(other)).exit_code == 0
    assert len(list(other.glob("integration_results_*.json"))) == 1
    assert holder.process.poll() is None


def test_of_runs_started_at_once_one_runs(started: Started, customers: Customers, standin: StandIn) -> None:
    standin.fault("silence")
    database = customers(1)
    runs = [started(database=database) for _ in range(4)]
    wait_until(lambda: sum(run.process.poll() is not None for run in runs) == 3)
    standin.wait_for_calls(1)
    [winner] = [run for run in runs if run.process.poll() is None]
    said = {run.wait().console.splitlines()[-1].split(", since")[0] for run in runs if run is not winner}
    assert [run.wait().exit_code for run in runs if run is not winner] == [75] * 3
    assert {words.split(": ")[-1] for words in said} <= {f"process {winner.process.pid}", "just begun"}
    assert standin.counters()["calls"] == {USERS_UPDATE: 1}
