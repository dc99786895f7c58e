"""Measures what the README's section Speed says: `bash tests/benchmark.sh [PART ...]`.

Everything goes over HTTPS to the stand-in, a process of its own. In any one second it
allows 500 users/update, 2000 events/track, 5 users/bulkUpdate and 10 events/trackBulk
calls, and answers 429 to the rest.

Parts: singly bulk shared slow far dry_run memory query (all, if none is named).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from threading import local
from typing import Any

import requests

from db_connection import read_query
from lab import database, process
from lab.far_network import FarNetwork
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn
from logger_config import CallLine, Status, UserLine, lock_results_folder

LIMIT = 500  # users a second, singly
BULK_LIMIT = 5000  # users a second, in bulk
USERS = 10_000
WARM_AFTER = 4.0  # seconds
BARE_THREADS = 400
PROGRESS = re.compile(r"Progress: (\d+)/")
SUMMARY = '"summary": '  # begins the summary's line in the results file
URL = "https://iterable.example"  # in results files that are only read
COLD_ALLOWANCE = 2.5  # seconds that start and end of a run may take on a far network


@dataclass(frozen=True)
class Measured:
    """A whole run of main.py."""

    seconds: float  # from start to exit
    cpu: float  # seconds
    memory: float  # MB at the peak
    warm: float  # users a second, after the first seconds
    summary: dict[str, Any]

    @property
    def users(self) -> int:
        """How many users the run had."""
        return int(self.summary["total_users"])

    @property
    def cpu_per_user(self) -> float:
        """CPU milliseconds."""
        return 1000 * self.cpu / self.users

    @property
    def speed(self) -> float:
        """Users a second, of the whole run."""
        return self.users / self.seconds


def measure(
    server: database.DatabaseServer,
    standin: StandIn,
    *arguments: str,
    url: str | None = None,
    rate_limit: int = LIMIT,
) -> Measured:
    """Run main.py on the server's customers against the stand-in."""
    with tempfile.TemporaryDirectory() as folder:
        settings = process.settings_for(
            server.create_reader(),
            url or standin.url,
            Path(folder),
            REQUESTS_CA_BUNDLE=str(standin.ca_file),
            ITERABLE_RATE_LIMIT=str(rate_limit),
        )
        options = ["--env-file", "/dev/null"]
        started = time.monotonic()
        running = subprocess.Popen(
            [sys.executable, "-u", *process.MAIN, *options, *arguments],
            env={**process.BARE_ENVIRONMENT, **settings},
            stdout=subprocess.PIPE,
            text=True,
        )
        warm = follow_progress(running, started + WARM_AFTER)
        _, _, usage = os.wait4(running.pid, 0)
        return Measured(
            seconds=time.monotonic() - started,
            cpu=usage.ru_utime + usage.ru_stime,
            memory=usage.ru_maxrss / 1024,
            warm=warm,
            summary=read_summary(Path(folder)),
        )


def follow_progress(running: subprocess.Popen[str], warm_from: float) -> float:
    """Read the console to its end. Return users a second from then on."""
    assert running.stdout
    reports = []
    for line in running.stdout:
        now = time.monotonic()
        found = PROGRESS.match(line)
        if found and now > warm_from:
            reports.append((now, int(found[1])))
    if len(reports) < 2:
        return 0.0
    first_time, first_count = reports[0]
    last_time, last_count = reports[-1]
    return (last_count - first_count) / (last_time - first_time)


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the one results file, of which nothing else is parsed."""
    [path] = folder.glob("integration_results_*.json")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(SUMMARY):
                summary: dict[str, Any] = json.loads(line.removeprefix(SUMMARY))
                return summary
    raise ValueError(f"{path} has no summary")


def print_row(*facts: str) -> None:
    """Print what was measured."""
    print("-", "; ".join(facts), flush=True)


def describe(run: Measured, standin: StandIn) -> str:
    """What the README's table has of a run."""
    counters = standin.counters()
    calls = sum(counters["calls"].values())
    connections = counters["connections"]
    throttled = counters["throttled"]
    share = 100 * throttled / calls
    delivered = f"{run.summary['success']} of {run.users} delivered"
    facts = [
        f"{delivered} in {run.seconds:.1f} s, {run.warm:.0f} users/s once warm",
        f"CPU {run.cpu_per_user:.3f} ms a user, peak memory {run.memory:.0f} MB",
        f"{calls} calls over {connections} connections",
        f"{run.summary['retries']} retries",
        f"{throttled} answered 429 ({share:.2f} %)",
        f"busiest second {counters['busiest_second']}",
    ]
    return "; ".join(facts)


def build_bodies(number: int) -> dict[str, dict[str, Any]]:
    """The bodies that the bare loop sends for a user, by endpoint."""
    email = f"bare{number}@example.com"
    user_fields = {"first_name": "Ann", "plan_type": "pro", "recent_page_view": True}
    event_fields = {
        "page": "pricing",
        "browser": "desktop",
        "location": "Berlin",
        "timestamp": "2026-01-13 14:30:45",
    }
    return {
        USERS_UPDATE: {"email": email, "dataFields": user_fields},
        EVENTS_TRACK: {
            "email": email,
            "eventName": "page_view",
            "id": f"bare-{number}",
            "createdAt": 1768314645,
            "dataFields": event_fields,
        },
    }


def run_bare_loop(url: str, ca_file: str, users: int, threads: int) -> float:
    """Make both calls for each user with a `requests.Session` a thread.

    Returns users a second.
    """
    thread = local()

    def send(number: int) -> None:
        if not hasattr(thread, "session"):
            thread.session = requests.Session()
            thread.session.headers["Api-Key"] = process.KEY
            thread.session.headers["User-Agent"] = "bare-loop/1.0"
        for endpoint, body in build_bodies(number).items():
            answer = thread.session.post(
                f"{url}/api/{endpoint}", json=body, timeout=30, verify=ca_file
            )
            answer.raise_for_status()

    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(send, range(users)))
    return users / (time.monotonic() - started)


def measure_bare_loop(
    standin: StandIn, users: int, threads: int
) -> tuple[float, float]:
    """Run the bare loop in a process of its own.

    Returns users a second, and CPU milliseconds a user with those of the start.
    """
    arguments = [standin.url, str(standin.ca_file), str(users), str(threads)]
    running = subprocess.Popen(
        [sys.executable, "-m", "lab.benchmark", "bare-loop", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout
    speed = float(running.stdout.read())
    _, _, usage = os.wait4(running.pid, 0)
    return speed, 1000 * (usage.ru_utime + usage.ru_stime) / users


def singly(server: database.DatabaseServer) -> None:
    """10 000 users by single calls.

    Beside bare `requests` loops: one by one, and in 400 threads without a limit.
    """
    database.fill(server, USERS, USERS, all_qualify=True)
    for latency in (0.05, 0.3):
        measure_singly(server, latency)


def measure_singly(server: database.DatabaseServer, latency: float) -> None:
    """Print the two rows for one latency."""
    with StandIn(tls="good", latency=latency, journal=False) as standin:
        few = max(8, int(4 / latency))
        one_by_one, _ = measure_bare_loop(standin, few, threads=1)
        standin.reset()
        run = measure(server, standin)
        print_row(f"{1000 * latency:.0f} ms a call", describe(run, standin))
    with StandIn(
        tls="good",
        latency=latency,
        journal=False,
        limit_users=100_000,
        limit_events=100_000,
    ) as standin:
        bare_speed, bare_cpu = measure_bare_loop(standin, USERS // 2, BARE_THREADS)
    times_faster = run.speed / one_by_one
    share_of_cpu = run.cpu_per_user / bare_cpu
    print_row(
        describe_speed(run, LIMIT),
        f"{times_faster:.0f} times one by one ({one_by_one:.2f} users/s)",
        f"{share_of_cpu:.2f} of the CPU of the bare loop ({bare_cpu:.2f} ms a user)",
        f"the bare loop without a limit: {bare_speed:.0f} users/s",
    )


def describe_speed(run: Measured, limit: int) -> str:
    """How near a run came to the limit, in users a second."""
    share = 100 * run.warm / limit
    least_seconds = run.users / limit
    times_least = run.seconds / least_seconds
    return f"{share:.1f} % of the limit once warm, {times_least:.3f} of the least time"


def bulk(server: database.DatabaseServer) -> None:
    """100 000 users in bulk, 300 ms a call."""
    users = 100_000
    database.fill(server, users, users, all_qualify=True)
    with StandIn(tls="good", latency=0.3, journal=False) as standin:
        run = measure(server, standin, "--bulk")
        print_row(describe(run, standin), describe_speed(run, BULK_LIMIT))


def shared(server: database.DatabaseServer) -> None:
    """A project of which other programs use 300 of the 500."""
    others = 300
    database.fill(server, USERS, USERS, all_qualify=True)
    with StandIn(tls="good", latency=0.3, others=others, journal=False) as standin:
        run = measure(server, standin)
        share = 100 * run.speed / (LIMIT - others)
        print_row(
            f"{run.speed:.0f} users/s, {share:.0f} % of the rest",
            describe(run, standin),
        )


def slow(server: database.DatabaseServer) -> None:
    """A limit of 50 a second, with errors that make retries."""
    database.fill(server, 1000, 1000, all_qualify=True)
    with StandIn(tls="good", latency=0.1, journal=False) as standin:
        standin.fault("reply", endpoint=USERS_UPDATE, status=503, times=100, skip=200)
        run = measure(server, standin, rate_limit=50)
        print_row(describe(run, standin))


def far(server: database.DatabaseServer) -> None:
    """A far network: 75 ms each way, and connections take a round trip more.

    4000 users singly; ten times as many in bulk, which takes as long.
    """
    users = 40_000
    database.fill(server, users, users, all_qualify=True)
    for rate_limit, jitter in ((450, 0.040), (500, 0.004)):
        measure_far(server, "--limit", "4000", rate_limit=rate_limit, jitter=jitter)
        measure_far(server, "--bulk", rate_limit=rate_limit, jitter=jitter)


def measure_far(
    server: database.DatabaseServer, *arguments: str, rate_limit: int, jitter: float
) -> None:
    """Print the row of a run on a far network."""
    with (
        StandIn(tls="good", latency=0.05, journal=False) as standin,
        FarNetwork(standin.url, jitter=jitter) as network,
    ):
        run = measure(
            server, standin, *arguments, url=network.url, rate_limit=rate_limit
        )
        users_per_second = rate_limit
        if "--bulk" in arguments:
            users_per_second = rate_limit * BULK_LIMIT // LIMIT
        allowed = 1.1 * run.users / users_per_second + COLD_ALLOWANCE
        print_row(
            f"{users_per_second} users/s, jitter {1000 * jitter:.0f} ms",
            f"{run.seconds:.1f} s of {allowed:.1f} s allowed",
            describe(run, standin),
        )


def dry_run(server: database.DatabaseServer) -> None:
    """1 000 000 users in a dry run."""
    users = 1_000_000
    database.fill(server, users, users, all_qualify=True)
    with StandIn(tls="good", journal=False) as standin:
        run = measure(server, standin, "--dry-run")
    print_row(
        f"{run.seconds:.1f} s, CPU {run.cpu_per_user:.3f} ms a user",
        f"peak memory {run.memory:.0f} MB",
    )


def memory(_: database.DatabaseServer) -> None:
    """The memory of --changed-only: 20 results files of 100 000 users each."""
    users = 2_000_000
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, users, 100_000):
            write_results_file(Path(folder), range(first, first + 100_000))
        started = time.monotonic()
        with lock_results_folder(Path(folder)) as results:
            known = results.read_memory(iterable=URL, identify_by="email")
        seconds = time.monotonic() - started
    assert known.has_delivered(users - 1, build_fingerprint(users - 1))
    print_row(f"{users} users read in {seconds:.1f} s")


def write_results_file(path: Path, users: range) -> None:
    """Write what a run leaves that has delivered these users."""
    run = {"mode": "send", "iterable": URL, "identify_by": "email"}
    with lock_results_folder(path) as folder:
        results = folder.create_results_file(run, datetime.now(timezone.utc))
        for user in users:
            results.add(build_line(user), sent=False)
        results.finish({})


def build_line(user: int) -> UserLine:
    """A delivered user's line in a results file."""
    return {
        "record": 1,
        "user_id": user,
        "email": "user@example.com",
        "event_id": "page-view-1",
        "status": Status.SUCCESS,
        "users_update": build_call(USERS_UPDATE),
        "events_track": build_call(EVENTS_TRACK),
        "fingerprint": build_fingerprint(user),
    }


def build_call(endpoint: str) -> CallLine:
    """A successful call in a user's line."""
    return {
        "endpoint": endpoint,
        "ok": True,
        "status": 200,
        "code": "Success",
        "message": "",
        "attempts": 1,
    }


def build_fingerprint(user: int) -> str:
    """A fingerprint of the usual length."""
    return f"{user:064x}"


def query(_: database.DatabaseServer) -> None:
    """Query 2 on 100 000 customers and 2 million page views, on each kind of server."""
    for kind, program in database.find_servers().items():
        with database.DatabaseServer(program, *database.LARGE[kind]) as server:
            server.load(database.SETUP)
            database.fill(server, 100_000, 2_000_000)
            time_query(server, "with its index")
            server.query(database.DROP_INDEX)
            time_query(server, "without its index")


def time_query(server: database.DatabaseServer, how: str) -> None:
    """Print the shortest of three times."""
    sql = read_query(database.QUERIES, "query_2")
    server.query("ANALYZE TABLE page_views, customers")
    times = []
    for _ in range(3):
        started = time.monotonic()
        rows = len(server.query(sql))
        times.append(time.monotonic() - started)
    name = f"{server.kind} {server.version}"
    print_row(f"{name}, {rows} rows: {min(times):.2f} s {how}")


PARTS = {
    part.__name__: part
    for part in (singly, bulk, shared, slow, far, dry_run, memory, query)
}


def measure_parts(names: list[str]) -> None:
    """Measure these parts, on one server."""
    program = next(iter(database.find_servers().values()))
    with database.DatabaseServer(program, *database.LARGE[program.kind]) as server:
        server.load(database.SETUP)
        for name in names:
            part = PARTS[name]
            print(f"\n{name}: {part.__doc__}", flush=True)
            part(server)


def main(arguments: list[str]) -> int:
    """Measure what the arguments name; `bare-loop` is for measure_bare_loop."""
    if arguments[:1] == ["bare-loop"]:
        _, url, ca_file, users, threads = arguments
        print(run_bare_loop(url, ca_file, int(users), int(threads)))
        return 0
    unknown = [name for name in arguments if name not in PARTS]
    if unknown:
        print(f"There is no part {' '.join(unknown)}; there are: {' '.join(PARTS)}")
        return 2
    measure_parts(arguments or list(PARTS))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
