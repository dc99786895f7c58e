"""Runs that are stopped, killed, started twice, or short of disk, memory or threads: the record is true in the end.

KILL_ROUNDS=60 makes so many rounds of `kill -9`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import process
from lab.database import DatabaseServer
from lab.process import Customers, Program, Started
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

ROUNDS = int(os.environ.get("KILL_ROUNDS", "2"))
USERS = 150
CALLS = {"users_update": USERS_UPDATE, "events_track": EVENTS_TRACK}
SOON = 3.0  # seconds that an end may take here: about one, and the machine is busy with other tests
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(scope="module")
def many(customers: Customers) -> dict[str, str]:
    return customers(USERS)


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
    return [json.loads(line.rstrip(",")) for line in path.read_text("utf-8").split("\n") if line.startswith('{"rec')]


def told(standin: StandIn) -> set[str]:
    """Who got both calls; no one may have got only one."""
    state = standin.state()
    assert sorted(state["users"]) == sorted(event["email"] for event in state["events"].values())
    return set(state["users"])


def stop(running: process.Running, number: signal.Signals) -> process.Ended:
    """Send the signal. The run has to end soon."""
    before = time.monotonic()
    running.signal(number)
    ended = running.wait()
    assert time.monotonic() - before < SOON
    return ended


def assert_counts_add_up(ended: process.Ended) -> None:
    lines, summary = ended.results["results"], ended.results["summary"]
    assert Counter(line["status"] for line in lines) == Counter(
        success=summary["success"],
        partial_failure=summary["partial_failures"],
        total_failure=summary["total_failures"],
        not_attempted=summary["not_attempted"],
    )
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


def assert_stopped(ended: process.Ended, number: signal.Signals) -> None:
    """Exit code, outcome and words of a run that one signal stopped."""
    summary = ended.results["summary"]
    assert ended.exit_code == summary["exit_code"] == 128 + number
    assert (summary["outcome"], ended.errors) == ("interrupted", "")
    assert f"The run ended early: Stopped by {number.name}\n" in ended.console
    assert f"The run ended early: Stopped by {number.name}\n" in ended.log


# kill -9


def accepted(standin: StandIn) -> dict[str, tuple[int, int]]:
    """How often each user's two calls were a success."""
    users, events = (standin.state()["accepted"][endpoint] for endpoint in CALLS.values())
    return {address(n): (users.get(address(n), 0), events.get(f"page-view-{n}", 0)) for n in range(1, USERS + 1)}


@pytest.mark.parametrize("number", range(ROUNDS))
def test_runs_that_are_killed_lose_nobody_and_nobody_on_record_is_told_again(
    started: Started, many: dict[str, str], standin: StandIn, folder: Path, number: int
) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    standin.configure(latency=chance.choice([0.0, 0.02, 0.1]))
    on_record: dict[str, tuple[int, int]] = {}  # the user's accepted calls when first seen with a line of success

    def arrived() -> int:
        return sum(standin.counters()["calls"].values())

    for kill in (True, True, False):
        enough = arrived() + chance.randrange(2 * (USERS - len(on_record)) + 1)
        running = started("--changed-only", database=many, ITERABLE_RATE_LIMIT="2000", MAX_WORKERS="50")
        if kill:
            wait_until(lambda run=running, most=enough: arrived() >= most or run.process.poll() is not None)
            running.process.kill()
        ended = running.wait()
        now = accepted(standin)
        for path in folder.glob("integration_results_*"):
            for line in lines_of(path):
                if line["status"] == "success":
                    on_record.setdefault(line["email"], now[line["email"]])
    assert (ended.exit_code, standin.state()["violations"]) == (0, [])
    assert ended.results["summary"]["success"] + ended.results["summary"]["unchanged"] == USERS
    assert "damaged" not in ended.console  # the torn line of a killed run is no news
    assert {email: accepted(standin)[email] for email in on_record} == on_record
    assert told(standin) == set(map(address, range(1, USERS + 1)))
    views = {view: event["email"] for view, event in standin.state()["events"].items()}
    assert views == {f"page-view-{number}": address(number) for number in range(1, USERS + 1)}


# One signal


@pytest.mark.parametrize(("at", "number"), [("the query", INT), ("the query", TERM), ("the memory", HUP)])
def test_a_signal_before_the_first_user_ends_the_run_at_once_and_leaves_no_results(
    started: Started, customers: Customers, server: DatabaseServer, standin: StandIn, folder: Path, at: str, number: Any
) -> None:
    head = '"run": {"number": 1, "mode": "send", "started_at": "2026-01-01T00:00:00+00:00"}'
    line = '{"record": 1, "user_id": 1, "status": "success", "fingerprint": "0", "users_update": null}'
    (folder / "large").write_text(f'{{\n{head},\n"results": [\n' + f"{line},\n" * 100_000)
    for copy in range(100):  # 20 s and more in all
        (folder / f"integration_results_{copy}.json").hardlink_to(folder / "large")
    database = customers(1)
    name = database["DB_NAME"]
    waits = f"SELECT 1 FROM information_schema.processlist WHERE db = '{name}' AND info LIKE '%page_views%'"
    with server.connect(name) as connection, connection.cursor() as cursor:
        if at == "the query":
            cursor.execute("LOCK TABLES page_views WRITE")
        running = started("--changed-only", database=database)
        wait_until(lambda: server.query(waits, "") if at == "the query" else "[STEP 5]" in running.console())
        ended = stop(running, number)
    assert (ended.exit_code, ended.errors) == (128 + number, "")
    assert f"Stopped by {number.name} before the first user: nothing was sent" in ended.log
    assert list(folder.glob("integration_results_*_*")) == []
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
    assert_stopped(ended, number)
    assert_record_is_true(ended, standin)
    lines = ended.results["results"]
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
    assert_stopped(stop(running, TERM), TERM)


# Two signals


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
    [partial] = folder.glob("*.partial")
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    finished = {line["email"]: line["status"] for line in lines_of(partial)}
    assert finished == {address(number): "success" for number in range(1, 5)}
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
    wait_until(lambda: len(os.listdir(f"/proc/{running.process.pid}/task")) == 2)  # it listens
    time.sleep(0.3)  # now it stands still at its first line
    assert running.process.poll() is None
    running.signal(TERM)
    ended = stop(running, INT)  # another signal: two equal ones could become one
    assert ended.exit_code in (130, 143)
    os.close(descriptor)


# Two runs


def test_a_second_run_says_who_holds_the_folder_and_touches_nothing_until_the_first_is_dead(
    started: Started, program: Program, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", email=address(2), times=1)
    database = customers(2)
    holder = started(database=database)
    holder.wait_for("Successfully processed user: user1@example.com")
    standin.wait_for_calls(3)

    def traces() -> Any:
        files = folder.glob("*integration_results*")  # the lock, too
        return standin.counters(), {path: (path.stat().st_mtime, path.read_bytes()) for path in files}

    before = traces()
    for argument in ("--dry-run", "--quiet"):
        ended = program(argument, database=database)
        assert (ended.exit_code, ended.errors) == (75, "")
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
        said = f"Another run holds {re.escape(str(folder))}: process {holder.process.pid}, since {since}"
        assert re.fullmatch(said, ended.console.splitlines()[-1])
        assert re.search(said, ended.log)
    assert len(ended.console.splitlines()) == 1
    assert traces() == before
    holder.process.kill()
    holder.wait()
    ended = program(database=database)
    assert (ended.exit_code, ended.summary["success"]) == (0, 2)


# A disk that is full


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
    assert f"Successful (both API calls): {len(first)}\n" in ended.console
    assert f"Not attempted: {USERS - len(first)}\n" in ended.console
    assert re.search(r"^Results: \S+\.json\.partial$", ended.console, re.MULTILINE)
    [partial] = folder.glob("integration_results_*")
    on_record = set(re.findall(r"Successfully processed user: (\S+)", ended.log))
    for line in partial.read_bytes().splitlines()[3:-1]:  # the last is torn
        on_record.add(json.loads(line.rstrip(b","))["email"])
    assert on_record == first
    before = sum(standin.counters()["calls"].values())
    again = program("--changed-only", database=many)
    assert (again.exit_code, len(told(standin))) == (0, USERS)
    assert again.summary["unchanged"] > 0
    assert sum(standin.counters()["calls"].values()) == before + again.summary["calls"]


def test_when_the_folder_of_the_results_is_gone_the_run_says_so_and_the_log_has_who_was_told(
    started: Started, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.configure(latency=0.2)
    running = started(database=customers(3), RESULTS_DIR=str(folder / "results"))
    standin.wait_for_calls(1, EVENTS_TRACK)
    shutil.rmtree(folder / "results")
    ended = running.wait()
    assert (ended.exit_code, ended.errors) == (1, "")
    assert re.search(r"integration_results_\d+_\d+\.json\.partial' -> ", ended.console)
    assert set(re.findall(r"Successfully processed user: (\S+)", ended.log)) == told(standin)


# A machine that is short of memory or threads, and errors nobody thought of


@pytest.fixture(scope="module")
def encrypted() -> Iterator[StandIn]:
    """A stand-in over TLS, whose library crashes without memory."""
    with StandIn(tls="good", latency=0.02) as standin:
        yield standin


@pytest.mark.parametrize("kilobytes", [60_000, 700_000, 2_800_000])
def test_with_little_memory_the_account_is_whole(
    started: Started, many: dict[str, str], encrypted: StandIn, kilobytes: int
) -> None:
    encrypted.reset()
    how, files = shell(f"ulimit -v {kilobytes}"), {"REQUESTS_CA_BUNDLE": str(encrypted.ca_file)}
    ended = started("--limit", "30", database=many, how=how, url=encrypted.url, **files).wait()
    assert ended.errors == ""
    summary = ended.results["summary"]
    if ended.exit_code:
        assert (ended.exit_code, summary["outcome"]) == (1, "aborted")
        assert re.search("^The run ended early: .+: lower MAX_WORKERS", ended.console, re.MULTILINE)
    else:
        assert (summary["success"], len(told(encrypted))) == (30, 30)
    assert_record_is_true(ended, encrypted)


@pytest.mark.parametrize("threads", [2, 20])
def test_with_few_threads_the_account_is_whole(
    started: Started, many: dict[str, str], standin: StandIn, threads: int
) -> None:
    # An account with a limit of its own to its processes and threads, but with root's right to read files.
    rights = [f"--{kind}=-all,+dac_override" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    account = ["--reuid=54321", "--regid=54321", "--clear-groups"]
    wrapper = ("setpriv", *rights, *account, "prlimit", f"--nproc={threads}")
    if not shutil.which("setpriv") or subprocess.run([*wrapper, sys.executable, "-c", ""]).returncode:
        pytest.skip("this account may not become another one")
    standin.configure(latency=0.05)
    ended = started("--limit", "30", database=many, how={"wrapper": wrapper}).wait()
    assert (ended.exit_code, ended.errors) == (1, "")
    words = "The run ended early: out of memory or threads (RuntimeError: can't start new thread): lower MAX_WORKERS"
    assert words in ended.console
    assert (len(told(standin)) > 0) == (threads == 20)
    assert_record_is_true(ended, standin)


BROKEN = """
import sys
sys.path.insert(0, {root!r})
import iterable_client, logger_config
def once(owner, name, error, words=""):
    whole, struck = getattr(owner, name), []
    def broken(*arguments, **keywords):
        if not struck and words in str(arguments):
            struck.append(True)
            raise error
        return whole(*arguments, **keywords)
    setattr(owner, name, broken)
once({what}, {error})
import main
sys.exit(main.main())
"""
NEW = "ZeroDivisionError('nobody thought of it')"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("iterable_client.IterableClient, 'track_events'", f"{NEW}, 'user5@'"),
        ("iterable_client, 'interpret'", NEW),
        ("logger_config, 'verdict'", "MemoryError()"),
        ("logger_config.ResultsFile, 'add'", f"{NEW}, 'user5@'"),
    ],
    ids=["before a call", "after a call", "in the report", "in the file"],
)
def test_after_an_error_nobody_thought_of_whoever_was_told_is_on_record(
    started: Started, customers: Customers, standin: StandIn, what: str, error: str
) -> None:
    database = customers([*[{}] * 8, {"email": "bad@nowhere"}, *[{}] * 8])
    code = BROKEN.format(root=str(process.ROOT), what=what, error=error)
    ended = started("--quiet", database=database, how={"program": ("-c", code)}, MAX_WORKERS="3").wait()
    assert (ended.exit_code, ended.errors) == (1, "")
    assert re.search(r"^The run ended early: (ZeroDivisionError: nobody|out of memory)", ended.console, re.MULTILINE)
    assert (ended.summary["outcome"], ended.summary["exit_code"]) == ("aborted", 1)
    assert_counts_add_up(ended)
    calls = {(line["email"], CALLS[key]) for line in ended.results["results"] for key in CALLS if line[key]}
    assert calls >= {(call["email"], call["endpoint"]) for call in standin.state()["journal"]}
