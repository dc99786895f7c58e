"""Runs that are stopped, killed, started twice, or short of disk, memory or threads: the record is true in the end.

KILL_ROUNDS=60 makes so many rounds of `kill -9`. What was measured is printed (pytest -rP).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab import process
from lab.database import DatabaseServer
from lab.process import Customers, Program, Settings, Started
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn, Trap

ROUNDS = int(os.environ.get("KILL_ROUNDS", "3"))
USERS = 300
CALLS = {"users_update": USERS_UPDATE, "events_track": EVENTS_TRACK}
SOON = 3.0  # seconds that an end may take here: about one, and the machine is busy with other tests
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def address(number: int) -> str:
    return f"user{number}@example.com"


def shell(commands: str) -> dict[str, Any]:
    """How to start main.py from a shell, after these commands."""
    return {"wrapper": ("sh", "-c", f'{commands}; exec "$@"', "sh")}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The users' lines of a file that may have no end. Each must be whole."""
    head, *rest = path.read_text("utf-8").split('"results": [\n')
    assert head.startswith('{\n"run": {')
    users = rest[0].split("\n],\n")[0].split("\n") if rest else []
    return [json.loads(line.rstrip(",")) for line in users if line]


def stop(running: process.Running, number: signal.Signals) -> tuple[process.Ended, float]:
    """Send the signal; how the run ended, and how many seconds later."""
    before = time.monotonic()
    running.signal(number)
    ended = running.wait()
    return ended, time.monotonic() - before


def assert_record_is_true(ended: process.Ended, standin: StandIn) -> None:
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
        for key, endpoint in CALLS.items()
        if line[key]
    }
    assert recorded == Counter((call["email"], call["endpoint"]) for call in state["journal"])
    assert summary["calls"] == len(state["journal"])
    for line in lines:
        first, second = line["email"] in state["users"], line["event_id"] in state["events"]
        touched = any((line["email"], endpoint) in recorded for endpoint in CALLS.values())
        failed = ("total_failure", "partial_failure", "success")[first + second]
        assert line["status"] == (failed if touched else "not_attempted")
        assert [bool(line[key] and line[key]["ok"]) for key in CALLS] == [first, second]
    assert list(ended.folder.glob("*.partial")) == []


def assert_stopped(ended: process.Ended, number: signal.Signals) -> None:
    """Exit code, outcome and words of a run that one signal stopped."""
    summary = ended.results["summary"]
    assert ended.exit_code == summary["exit_code"] == 128 + number
    assert (summary["outcome"], ended.errors) == ("interrupted", "")
    assert f"The run ended early: Stopped by {number.name}\n" in ended.console
    assert f"The run ended early: Stopped by {number.name}\n" in ended.log


# kill -9


@pytest.fixture(scope="module")
def three_hundred(customers: Customers) -> dict[str, str]:
    return customers(USERS)


def kill_after(running: process.Running, standin: StandIn, calls: int) -> bool:
    """Kill it when so many more calls have arrived; whether it was still running."""
    target = calls + sum(standin.counters()["calls"].values())
    while running.process.poll() is None:
        with contextlib.suppress(TimeoutError):
            standin.wait_for_calls(target, timeout=0.1)
            running.process.kill()
    return running.wait().exit_code == 128 + signal.SIGKILL


def accepted(standin: StandIn) -> dict[str, tuple[int, int]]:
    """How often each user's two calls were a success."""
    users, events = (standin.state()["accepted"][endpoint] for endpoint in CALLS.values())
    return {address(n): (users.get(address(n), 0), events.get(f"page-view-{n}", 0)) for n in range(1, USERS + 1)}


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
    assert (ended.exit_code, state["violations"]) == (0, [])
    assert ended.results["summary"]["success"] + ended.results["summary"]["unchanged"] == USERS
    assert "damaged" not in ended.console  # the torn line of a killed run is no news
    assert {who: counts[who] for who in on_record} == on_record
    assert sorted(state["users"]) == sorted(map(address, range(1, USERS + 1)))
    assert {view: event["email"] for view, event in state["events"].items()} == {
        f"page-view-{number}": address(number) for number in range(1, USERS + 1)
    }
    twice = sum(max(both) > 1 for both in counts.values())
    print(f"killed {kills} times; {twice} users were on the wire or between file and answer then, and told again")


def test_a_killed_run_leaves_every_finished_user_on_record(
    started: Started, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", email=address(7))
    running = started(database=customers(9))
    wait_until(lambda: len(standin.state()["journal"]) == 17)  # both calls of all but one, and its first
    [partial] = folder.glob("*.partial")
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    wait_until(lambda: len(lines_of(partial)) == 8)
    running.process.kill()
    running.wait()
    told = {line["email"]: line["status"] for line in lines_of(partial)}
    assert told == {address(number): "success" for number in (1, 2, 3, 4, 5, 6, 8, 9)}


# A signal before the first user


@contextlib.contextmanager
def waiting(
    stage: str, customers: Customers, server: DatabaseServer, folder: Path
) -> Iterator[tuple[dict[str, str], Callable[[process.Running], Any]]]:
    """The settings with which a run gets stuck there, and how to see that it is."""
    database = customers(1)
    name = database["DB_NAME"]
    if stage == "in the imports":
        yield database, lambda run: "_ssl." in Path(f"/proc/{run.process.pid}/maps").read_text()
    elif stage == "for a silent server":
        with Trap() as trap:
            yield {**database, "DB_PORT": str(trap.port)}, lambda _: trap.connections
    elif stage == "for a closed port":
        with socket.socket() as bound:  # and not listening
            bound.bind(("127.0.0.1", 0))
            yield {**database, "DB_PORT": str(bound.getsockname()[1])}, lambda run: "next try in 1 s" in run.console()
    elif stage == "in the query":
        sql = f"SELECT 1 FROM information_schema.processlist WHERE db = '{name}' AND info LIKE '%page_views%'"
        with server.connect(name) as connection, connection.cursor() as cursor:
            cursor.execute("LOCK TABLES page_views WRITE")
            yield database, lambda _: server.query(sql, "")
    else:
        head = '"run": {"number": 1, "mode": "send", "started_at": "2026-01-01T00:00:00+00:00"}'
        line = '{"record": 1, "user_id": 1, "status": "success", "fingerprint": "0", "users_update": null}'
        (folder / "large").write_text(f'{{\n{head},\n"results": [\n' + f"{line},\n" * 100_000)
        for copy in range(100):  # 20 s and more in all
            (folder / f"integration_results_{copy}.json").hardlink_to(folder / "large")
        yield database, lambda run: "[STEP 5]" in run.console()


WAITS = {
    "in the imports": [TERM],
    "for a silent server": [INT],
    "for a closed port": [TERM, HUP],
    "in the query": [INT, TERM],
    "in a large memory": [HUP],
}


@pytest.mark.parametrize(
    ("stage", "number"), [(stage, number) for stage, numbers in WAITS.items() for number in numbers]
)
def test_a_signal_before_the_first_user_ends_the_run_at_once_and_leaves_no_results(
    started: Started,
    customers: Customers,
    server: DatabaseServer,
    standin: StandIn,
    folder: Path,
    stage: str,
    number: signal.Signals,
) -> None:
    with waiting(stage, customers, server, folder) as (database, reached):
        running = started("--changed-only", database=database)
        wait_until(lambda: reached(running))
        ended, seconds = stop(running, number)
    print(f"ended after {seconds:.2f} s")
    assert seconds < SOON
    assert (ended.exit_code, ended.errors) == (128 + number, "")
    assert "imports" in stage or f"Stopped by {number.name} before the first user: nothing was sent" in ended.log
    assert list(folder.glob("integration_results_*_*")) == []
    assert standin.counters()["connections"] == 0


# A signal while users are sent


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
    attempts: int | None = 1  # of each call that was made


SLOWLY = {"Retry-After": "120"}
THREE_WAITS = r"(next try in 120\.0 s(.|\n)*){3}"
STAGES = {
    "waiting for the rate limit": Stage({"success", "not_attempted"}, settings={"ITERABLE_RATE_LIMIT": "1"}, users=30),
    "in a backoff": Stage(
        {"partial_failure"},
        [{"endpoint": USERS_UPDATE, "status": 503}],
        {"ITERABLE_MAX_ATTEMPTS": "100"},
        words=r"next try in ([2-9]|\d\d)\.\d s",
        users=30,
        attempts=None,
    ),
    "in a Retry-After": Stage(
        {"partial_failure"}, [{"endpoint": USERS_UPDATE, "status": 503, "headers": SLOWLY}], calls=3, words=THREE_WAITS
    ),
    "in the event's Retry-After": Stage(
        {"partial_failure"},
        [{"endpoint": EVENTS_TRACK, "status": 503, "headers": SLOWLY}],
        calls=3,
        endpoint=EVENTS_TRACK,
        words=THREE_WAITS,
    ),
    "in a 429's pause": Stage(
        {"partial_failure", "not_attempted"},
        [{"endpoint": USERS_UPDATE, "status": 429, "headers": SLOWLY}],
        words=r"429: a pause of 120\.0 s",
        users=30,
    ),
    "in the event's 429's pause": Stage(
        {"partial_failure", "success", "not_attempted"},
        [{"endpoint": EVENTS_TRACK, "status": 429, "headers": SLOWLY, "times": 1}],
        {"ITERABLE_RATE_LIMIT": "20"},
        calls=5,
        words=r"429: a pause of 120\.0 s",
        users=30,
    ),
    "with calls on the wire": Stage(
        {"success", "not_attempted"}, [{"latency": 0.6}], {"ITERABLE_RATE_LIMIT": "20"}, calls=5, latency=0.6, users=60
    ),
    "with a call on the wire that fails": Stage(
        {"partial_failure"}, [{"endpoint": USERS_UPDATE, "status": 503, "latency": 0.6}], calls=3
    ),
    "with the first call answered and the second on the wire": Stage(
        {"success"}, [{"endpoint": EVENTS_TRACK, "latency": 0.6}], calls=3, endpoint=EVENTS_TRACK, latency=0.6
    ),
    "with a call on the wire that never gets an answer": Stage(
        {"partial_failure", "success"},
        [{"action": "silence", "endpoint": USERS_UPDATE, "email": address(2)}],
        {"ITERABLE_TIMEOUT": "1"},
        calls=3,
    ),
}


@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, TERM) for name in STAGES), ("with calls on the wire", INT), ("in a Retry-After", HUP)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_while_sending_leaves_each_user_whole_or_untouched_and_the_record_true(
    started: Started, customers: Customers, standin: StandIn, name: str, number: signal.Signals
) -> None:
    stage = STAGES[name]
    for fault in stage.faults:
        standin.fault(**fault)
    running = started(database=customers(stage.users), LOG_LEVEL="DEBUG", **stage.settings)
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
    made = [line[key] for line in lines for key in CALLS if line[key]]
    assert all((line["users_update"] is None) == (line["events_track"] is None) for line in lines)
    assert {call["attempts"] for call in made} == {stage.attempts} or stage.attempts is None


# Two signals, and signals that do not count


@pytest.mark.parametrize("how", ["ulimit -v 2000000", "true"], ids=["short of memory", "plain"])
def test_a_second_signal_ends_the_run_at_once_and_leaves_the_partial_file_intact(
    started: Started, program: Program, customers: Customers, standin: StandIn, folder: Path, how: str
) -> None:
    standin.fault("silence", email=address(5), times=1)
    database = customers(5)
    running = started(database=database, how=shell(how))
    running.wait_for("Processing record 4/5")
    standin.wait_for_calls(9)
    running.signal(TERM)
    time.sleep(0.2)  # two at once could be taken in either order
    assert running.process.poll() is None
    ended, seconds = stop(running, INT)
    print(f"ended after {seconds:.2f} s")
    assert (ended.exit_code, ended.errors, ended.documents) == (130, "", [])
    assert seconds < SOON
    [partial] = folder.glob("*.partial")
    told = {line["email"]: line["status"] for line in lines_of(partial)}
    assert told == {address(number): "success" for number in range(1, 5)}
    again = program("--changed-only", database=database).summary
    assert (again["success"], again["unchanged"]) == (1, 4)


@pytest.mark.parametrize("log", ["run.log", "/dev/full"])
def test_signals_end_a_run_whose_console_nobody_reads(
    settings: Settings, customers: Customers, folder: Path, log: str
) -> None:
    read, write = os.pipe()
    with open(read, "rb"), open(write, "wb", buffering=0) as console:
        os.set_blocking(write, False)
        while console.write(bytes(select.PIPE_BUF)):  # None when it is full
            pass
        os.set_blocking(write, True)
        environment = {**process.BARE, **settings(customers(1), LOG_FILE=str(folder / log))}
        command = [sys.executable, str(process.ROOT / "main.py"), "--env-file", "/dev/null"]
        run = subprocess.Popen(command, env=environment, stdout=console)
        try:
            wait_until(lambda: len(os.listdir(f"/proc/{run.pid}/task")) == 2)  # it listens
            time.sleep(0.3)  # now it stands still at its first line
            assert run.poll() is None
            run.send_signal(TERM)
            run.send_signal(INT)  # another signal: two equal ones could become one
            assert -run.wait(10) % 128 in (INT, TERM) or run.returncode in (130, 143)
        finally:
            run.kill()
            run.wait()


@pytest.mark.parametrize("ignored", [(INT, HUP), (INT, TERM, HUP)], ids=["not TERM", "all"])
def test_signals_that_were_ignored_at_the_start_stay_ignored(
    started: Started, customers: Customers, standin: StandIn, ignored: tuple[signal.Signals, ...]
) -> None:
    standin.fault(latency=0.5)
    trap = f"trap '' {' '.join(number.name.removeprefix('SIG') for number in ignored)}"
    running = started(database=customers(3), how=shell(trap))
    standin.wait_for_calls(3)
    for number in ignored:
        running.signal(number)
    if TERM in ignored:
        ended = running.wait()
        assert (ended.exit_code, ended.errors, ended.summary["success"]) == (0, "", 3)
        assert "Stopped" not in ended.console + ended.log
    else:
        assert_stopped(stop(running, TERM)[0], TERM)


# Two runs


@pytest.fixture
def holder(started: Started, customers: Customers, standin: StandIn) -> process.Running:
    """A run that holds the folder: its first of two users is told, its second gets no answer."""
    standin.fault("silence", email=address(2), times=1)
    running = started(database=customers(2))
    running.wait_for("Successfully processed user: user1@example.com")
    standin.wait_for_calls(3)
    return running


def contents(folder: Path) -> dict[str, tuple[float, bytes]]:
    """Every results file of a folder, and its lock: when it changed, and what is in it."""
    return {path.name: (path.stat().st_mtime, path.read_bytes()) for path in folder.glob("*integration_results*")}


def test_a_second_run_says_who_holds_the_folder_and_touches_nothing_until_the_first_is_dead(
    holder: process.Running, program: Program, customers: Customers, standin: StandIn, folder: Path
) -> None:
    before, calls, database = contents(folder), standin.counters(), customers(1)
    for arguments in (["--changed-only"], ["--dry-run"], ["--quiet"]):
        ended = program(*arguments, database=database)
        assert (ended.exit_code, ended.errors) == (75, "")
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
        said = f"Another run holds {re.escape(str(folder))}: process {holder.process.pid}, since {since}"
        assert re.fullmatch(said, ended.console.splitlines()[-1])
        assert re.search(said, ended.log)
    assert len(ended.console.splitlines()) == 1
    assert (contents(folder), standin.counters()) == (before, calls)
    assert program(database=database, RESULTS_DIR=str(folder / "other")).exit_code == 0
    assert program("--check", database=database).exit_code == 0
    holder.process.kill()
    holder.wait()
    (folder / ".integration_results.lock").write_text(f"process {'9' * 50}, since long ago")
    ended = program(database=database)
    assert (ended.exit_code, ended.summary["success"]) == (0, 1)
    lock = (folder / ".integration_results.lock").read_text("utf-8")
    assert re.fullmatch(r"process \d{1,8}, since [-+: \d]{25}", lock)


# A disk that is full


ON_SMALL_DISK = 'mount -t tmpfs -o "{}" none "{}" && {{ "$@"; code=$?; cp -a "{}/." "{}"; exit $code; }}'


@functools.cache
def may_mount() -> bool:
    """Whether this account may have mounts of its own: root, and others where the kernel lets them."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def on_small_disk(started: Started, folder: Path) -> Callable[..., process.Ended]:
    """`on_small_disk("size=1m", database=..., RESULTS_DIR=..., ...)`: a run for which `folder / "disk"` is a disk of
    its own. What is left on it is in `folder / "out"`, the folder of the run that is returned."""
    if not may_mount():
        pytest.skip("this account may not mount a disk")
    disk, out = folder / "disk", folder / "out"
    disk.mkdir()
    out.mkdir()

    def start(options: str, *, database: dict[str, str], **more: str) -> process.Ended:
        command = ON_SMALL_DISK.format(options, disk, disk, out)
        ended = started(database=database, how={"wrapper": ("unshare", "-rm", "sh", "-c", command, "sh")}, **more)
        ended.folder = out
        return ended.wait()

    return start


def long_answers(standin: StandIn) -> None:
    """Let each user take 4 kB in the results file, and much less in the log."""
    body = json.dumps({"msg": "\N{GRINNING FACE}" * 480, "code": "Success", "params": None})
    for endpoint in (USERS_UPDATE, EVENTS_TRACK):
        standin.fault(endpoint=endpoint, status=200, processed=True, body=body, latency=0.02)


def told(standin: StandIn) -> set[str]:
    """Who got both calls; no one may have got only one."""
    state = standin.state()
    users, events = state["users"], state["events"].values()
    assert sorted(users) == sorted(event["email"] for event in events)
    return set(users)


def on_record(ended: process.Ended, log: str) -> set[str]:
    """Who was told according to the log and the whole lines of the one unfinished results file."""
    [partial] = ended.folder.glob("integration_results_*")
    assert partial.suffix == ".partial"
    known = set(re.findall(r"Successfully processed user: (\S+)", log))
    for line in partial.read_bytes().splitlines()[3:]:
        with contextlib.suppress(ValueError):  # at the end, where the disk was full
            user = json.loads(line.rstrip(b","))
            known |= {user["email"]} if user["status"] == "success" else set()
    return known


def assert_stopped_by_disk(ended: process.Ended, standin: StandIn, error: str) -> None:
    """It stopped early, said why, and counted truly."""
    assert (ended.exit_code, ended.errors) == (1, "")
    words = rf"The run ended early: \S+/integration_results_\d+_\d+\.json cannot be written.*{re.escape(error)}"
    assert re.search(words, ended.console)
    assert len(told(standin)) < USERS
    assert f"Successful (both API calls): {len(told(standin))}\n" in ended.console
    assert f"Not attempted: {USERS - len(told(standin))}\n" in ended.console
    assert re.search(r"^Results: \S+\.json\.partial, without its end$", ended.console, re.MULTILINE)


def test_when_the_results_file_can_grow_no_more_the_run_stops_and_the_next_one_goes_on(
    started: Started, program: Program, three_hundred: dict[str, str], standin: StandIn
) -> None:
    long_answers(standin)
    half_a_megabyte = shell("ulimit -f 1000")  # of 512 bytes each
    ended = started(database=three_hundred, how=half_a_megabyte, MAX_WORKERS="10").wait()
    assert_stopped_by_disk(ended, standin, "File too large")
    assert on_record(ended, ended.log) == told(standin)
    calls = standin.counters()["calls"]
    again = program("--changed-only", database=three_hundred)
    assert again.exit_code == 0
    assert len(told(standin)) == USERS
    assert again.summary["unchanged"] > 0
    assert sum(standin.counters()["calls"].values()) == sum(calls.values()) + again.summary["calls"]


def test_when_the_disk_of_the_results_is_full_the_run_stops_and_who_was_told_is_known(
    on_small_disk: Callable[..., process.Ended], three_hundred: dict[str, str], standin: StandIn, folder: Path
) -> None:
    long_answers(standin)
    disk = str(folder / "disk")
    ended = on_small_disk("size=800k", database=three_hundred, RESULTS_DIR=disk, MAX_WORKERS="30")
    assert_stopped_by_disk(ended, standin, "No space left on device")
    assert on_record(ended, (folder / "run.log").read_text("utf-8")) == told(standin)


def test_when_the_folder_of_the_results_is_gone_the_run_says_so_and_the_log_has_who_was_told(
    started: Started, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.configure(latency=0.3)
    results = folder / "results"
    running = started(database=customers(3), RESULTS_DIR=str(results))
    standin.wait_for_calls(1, EVENTS_TRACK)
    shutil.rmtree(results)
    ended = running.wait()
    assert (ended.exit_code, ended.errors) == (1, "")
    assert re.search(r"integration_results_\d+_\d+\.json cannot be written: \[Errno 2\]", ended.console)
    assert set(re.findall(r"Successfully processed user: (\S+)", ended.log)) == told(standin)


UNWRITABLE = {
    "below a file": ({"RESULTS_DIR": "file/results"}, "RESULTS_DIR", 20),
    "a log below a file": ({"LOG_FILE": "file/run.log"}, "LOG_FILE", 17),
    "a log that is a folder": ({"LOG_FILE": "."}, "LOG_FILE", 21),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_place_that_cannot_be_written_is_a_settings_error(
    program: Program, customers: Customers, standin: StandIn, folder: Path, name: str
) -> None:
    (folder / "file").write_text("mine")
    places, setting, error = UNWRITABLE[name]
    ended = program("--quiet", database=customers(3), **{key: str(folder / place) for key, place in places.items()})
    assert (ended.exit_code, ended.errors) == (2, "")
    assert re.fullmatch(rf"{setting} cannot be written: \[Errno {error}\] .+: '.+'\n", ended.console)
    assert (folder / "file").read_text() == "mine"
    assert standin.counters()["connections"] == 0


@pytest.mark.parametrize(("options", "error"), [("ro", "[Errno 30]"), ("size=4k", "[Errno 28]")])  # 4k: for the lock
def test_a_disk_that_takes_nothing_from_the_start_is_a_settings_error_and_leaves_no_results(
    on_small_disk: Callable[..., process.Ended],
    customers: Customers,
    standin: StandIn,
    folder: Path,
    options: str,
    error: str,
) -> None:
    ended = on_small_disk(options, database=customers(3), RESULTS_DIR=str(folder / "disk"))
    assert (ended.exit_code, ended.errors) == (2, "")
    assert ended.console.splitlines()[-1].startswith(f"RESULTS_DIR cannot be written: {error}")
    assert list(ended.folder.glob("integration_results_*")) == []
    assert standin.counters()["connections"] == 0


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["plain", "quiet"])
def test_a_log_on_a_full_disk_is_told_once_and_the_run_goes_on(
    program: Program, customers: Customers, standin: StandIn, quiet: list[str]
) -> None:
    ended = program(*quiet, database=customers(3), LOG_FILE="/dev/full")
    said = "The log file /dev/full cannot be written: [Errno 28] No space left on device\n"
    assert (ended.exit_code, ended.errors) == (0, "")
    assert ended.console.count(said) == ended.console.count("cannot be written") == 1
    assert not quiet or ended.console == said
    assert ended.summary["success"] == len(told(standin)) == 3


def test_a_log_of_10_mb_is_rotated_in_mid_run_and_5_old_ones_are_kept(
    program: Program, customers: Customers, folder: Path
) -> None:
    for number in range(1, 6):
        (folder / f"run.log.{number}").write_text(f"old {number}\n")
    (folder / "run.log").write_text("x" * 9_999_000 + "\n")
    ended = program(database=customers(20))
    logs = [folder / name for name in ("run.log", *(f"run.log.{number}" for number in range(1, 6)))]
    assert sorted(folder.glob("run.log*")) == logs
    assert [path.read_text() for path in logs[2:]] == [f"old {number}\n" for number in range(1, 5)]
    assert {path.stat().st_mode & 0o777 for path in logs[:2]} == {0o600}
    assert logs[1].stat().st_size <= 10_000_000
    assert ended.log.count("Successfully processed user: ") == ended.summary["success"] == 20


# A machine that is short of memory or threads, and errors nobody thought of


@pytest.fixture(scope="module")
def encrypted() -> Iterator[StandIn]:
    """A stand-in over TLS, whose library crashes without memory."""
    with StandIn(tls="good", latency=0.02) as standin:
        yield standin


@pytest.mark.parametrize("kilobytes", [60_000, 110_000, 160_000, 220_000, 320_000, 500_000, 700_000, 1_500_000])
def test_with_little_memory_the_account_is_whole(
    started: Started, customers: Customers, encrypted: StandIn, three_hundred: dict[str, str], kilobytes: int
) -> None:
    encrypted.reset()
    little = shell(f"ulimit -v {kilobytes}")
    files = {"REQUESTS_CA_BUNDLE": str(encrypted.ca_file)}
    ended = started("--limit", "100", database=three_hundred, how=little, url=encrypted.url, **files).wait()
    assert ended.errors == ""
    summary = ended.results["summary"]
    if ended.exit_code:
        assert (ended.exit_code, summary["outcome"]) == (1, "aborted")
        assert re.search("^The run ended early: .+", ended.console, re.MULTILINE)
    else:
        assert (summary["success"], len(told(encrypted))) == (100, 100)
        assert re.search(r"Only \d+ thread\(s\) can be started", ended.console)
    assert_record_is_true(ended, encrypted)


def as_another_user(processes: int) -> dict[str, Any]:
    """As an account with a limit of its own to its processes and threads, but with root's right to read files."""
    rights = [f"--{kind}=-all,+dac_override" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    account = ["--reuid=54321", "--regid=54321", "--clear-groups"]
    return {"wrapper": ("setpriv", *rights, *account, "prlimit", f"--nproc={processes}")}


@pytest.mark.parametrize("threads", [1, 2, 4, 20])
def test_with_few_threads_the_account_is_whole(
    started: Started, customers: Customers, standin: StandIn, folder: Path, threads: int
) -> None:
    how = as_another_user(threads)
    if not shutil.which("setpriv") or subprocess.run([*how["wrapper"], sys.executable, "-c", ""]).returncode:
        pytest.skip("this account may not become another one")
    standin.configure(latency=0.05)
    ended = started(database=customers(30), how=how).wait()
    assert ended.errors == ""
    assert "Traceback" not in ended.console
    if ended.exit_code:
        assert len(told(standin)) == 0
        assert re.search("thread|process|lsb_release", ended.console)
    else:
        assert_record_is_true(ended, standin)
        assert len(told(standin)) == 30
    assert (ended.exit_code == 0) == (threads == 20)


def sabotaged(code: str) -> dict[str, Any]:
    """How to start a main.py in which something goes wrong."""
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(process.ROOT)!r})",
        "import main, iterable_client, logger_config",
        code,
    ]
    return {"program": ("-c", "\n".join([*lines, "sys.exit(main.main())"]))}


ONCE = """
def once(owner, name, when=lambda *_: True, error=ZeroDivisionError("nobody thought of it"), after=False):
    whole, done = getattr(owner, name), []
    def broken(*arguments, **keywords):
        strike = not done and when(*arguments)
        done.extend([1] * strike)
        if strike and not after:
            raise error
        result = whole(*arguments, **keywords)
        if strike:
            raise error
        return result
    setattr(owner, name, broken)
"""
SABOTAGE = {
    "before a call": 'once(iterable_client.IterableClient, "track_events", lambda _, events: "user5@" in str(events))',
    "after a call": 'once(iterable_client, "interpret", lambda *_: True)',
    "in an answer": 'once(iterable_client, "read", error=MemoryError())',
    "in the limiter": 'once(iterable_client.RateLimiter, "accepted", error=MemoryError())',
    "in the report": 'once(logger_config, "to_json", error=MemoryError(), when=lambda line: line.get("record") == 5)',
    "in the verdict": 'once(logger_config, "verdict", error=MemoryError())',
    "in the file": 'once(logger_config.ResultsFile, "add", when=lambda _, text, **k: "user5@" in text)',
    "in a row": 'once(main, "prepare", when=lambda number, *_: number == 5, error=MemoryError())',
    "when threads are made": 'once(main, "Crew", error=RuntimeError("can\'t start new thread"))',
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_after_an_error_nobody_thought_of_whoever_was_told_is_on_record(
    started: Started, customers: Customers, standin: StandIn, name: str
) -> None:
    rows: list[dict[str, Any]] = [{}] * 8
    ended = started(
        database=customers([*rows, {"email": "bad@nowhere"}, *rows]),
        how=sabotaged(ONCE + SABOTAGE[name]),
        MAX_WORKERS="3",
    ).wait()
    assert (ended.exit_code, ended.errors) == (1, "")
    assert re.search(r"^The run ended early: (ZeroDivisionError: nobody|out of memory|Runtime)", ended.console, re.M)
    summary, lines = ended.results["summary"], ended.results["results"]
    assert (summary["outcome"], summary["exit_code"]) == ("aborted", 1)
    assert sorted(line["record"] for line in lines) == list(range(1, 18))
    counts = Counter(line["status"] for line in lines)
    fields = ("success", "partial_failures", "total_failures", "not_attempted")
    assert [counts[name.removesuffix("s") if "failures" in name else name] for name in fields] == [
        summary[name] for name in fields
    ]
    asked = {(call["email"], call["endpoint"]) for call in standin.state()["journal"]}
    assert {(line["email"], call) for line in lines for key, call in CALLS.items() if line[key]} >= asked
