"""Measures what the README's table says, side by side in one run: `bash tests/benchmark.sh [PART ...]`.

Everything goes over HTTPS to the stand-in, a process of its own that allows in any one second 500 users/update, 2000
events/track, 5 users/bulkUpdate and 10 events/trackBulk calls, and answers 429 to the rest.
Parts: singly bulk shared slow dry_run memory query (all without arguments).
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
from datetime import datetime, timezone
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import requests

from db_connection import read_query
from lab import database, process
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn
from logger_config import ResultsFile, read_memory, to_json

LIMIT = 500
USERS = 10_000
WARM_AFTER = 4.0  # seconds
PROGRESS = re.compile(r"Progress: (\d+)/")


class Measured(NamedTuple):
    """A whole run of main.py: seconds from start to exit, CPU seconds, MB at the peak, users a second once warm."""

    seconds: float
    cpu: float
    memory: float
    warm: float
    summary: dict[str, Any]


def measure(server: database.DatabaseServer, standin: StandIn, *arguments: str, **settings: str) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        own = {"REQUESTS_CA_BUNDLE": str(standin.ca_file), "ITERABLE_RATE_LIMIT": str(LIMIT), **settings}
        environment = process.settings_for(server.create_reader(), standin.url, Path(folder), **own)
        began = time.monotonic()
        command = [sys.executable, "-u", str(process.ROOT / "main.py"), "--env-file", "/dev/null", *arguments]
        running = subprocess.Popen(command, env={**process.BARE, **environment}, stdout=subprocess.PIPE, text=True)
        told = ((time.monotonic(), PROGRESS.match(line)) for line in running.stdout)
        progress = [(when, int(found[1])) for when, found in told if found]
        usage = os.wait4(running.pid, 0)[2]
        seconds = time.monotonic() - began
        with next(Path(folder).glob("integration_results_*.json")).open(encoding="utf-8") as lines:
            summary = next(json.loads(line[11:]) for line in lines if line.startswith('"summary": '))
    warm = [(when, done) for when, done in progress if when > began + WARM_AFTER] or [(0.0, 0)]
    (first, done_first), (last, done_last) = warm[0], warm[-1]
    speed = (done_last - done_first) / (last - first) if last > first else 0.0
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, speed, summary)


def bodies(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    email = f"bare{number}@example.com"
    user = {"email": email, "dataFields": {"first_name": "Ann", "plan_type": "pro", "recent_page_view": True}}
    fields = {"page": "pricing", "browser": "desktop", "location": "Berlin", "timestamp": "2026-01-13 14:30:45"}
    event = {"eventName": "page_view", "id": f"bare-{number}", "createdAt": 1768314645}
    return user, {"email": email, **event, "dataFields": fields}


def bare_loop(url: str, ca_file: str, users: int, threads: int) -> float:
    """Both calls for each user with a `requests.Session` a thread, and nothing else. Returns users a second."""
    own = local()

    def send(number: int) -> None:
        if not hasattr(own, "session"):
            own.session = requests.Session()
            own.session.headers.update({"Api-Key": process.KEY, "User-Agent": "bare-loop/1.0"})
        for endpoint, body in zip((USERS_UPDATE, EVENTS_TRACK), bodies(number), strict=True):
            own.session.post(f"{url}/api/{endpoint}", json=body, timeout=30, verify=ca_file).raise_for_status()

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(send, range(users)))
    return users / (time.monotonic() - began)


def bare(standin: StandIn, users: int, threads: int) -> tuple[float, float]:
    """The bare loop in a process of its own: users a second, and CPU milliseconds a user, start-up included."""
    arguments = [standin.url, str(standin.ca_file), str(users), str(threads)]
    command = [sys.executable, "-m", "lab.benchmark", "bare-loop", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    speed, usage = float(running.stdout.read()), os.wait4(running.pid, 0)[2]
    return speed, 1000 * (usage.ru_utime + usage.ru_stime) / users


def describe(run: Measured, standin: StandIn) -> str:
    counters, users = standin.counters(), run.summary["total_users"]
    calls = sum(counters["calls"].values())
    return (
        f"{run.summary['success']} of {users} delivered in {run.seconds:.1f} s, {run.warm:.0f} users/s once warm; "
        f"CPU {1000 * run.cpu / users:.3f} ms a user, peak memory {run.memory:.0f} MB; "
        f"{calls} calls over {counters['connections']} connections, {run.summary['retries']} retries, "
        f"{counters['throttled']} answered 429 ({100 * counters['throttled'] / calls:.2f} %); "
        f"busiest second {counters['busiest_second']}"
    )


def singly(server: database.DatabaseServer) -> None:
    """10 000 users by single calls, beside bare `requests` loops: one by one, and in 400 threads without a limit."""
    database.fill(server, USERS, USERS, all_qualify=True)
    for latency in (0.05, 0.3):
        with StandIn(tls="good", latency=latency, journal=False) as standin:
            one_by_one, _ = bare(standin, max(8, int(4 / latency)), 1)
            standin.reset()
            run = measure(server, standin)
            print(f"- {1000 * latency:.0f} ms a call: {describe(run, standin)}")
        with StandIn(tls="good", latency=latency, journal=False, limit_users=100_000, limit_events=100_000) as standin:
            bare_speed, bare_cpu = bare(standin, USERS // 2, 400)
        print(
            f"  {100 * run.warm / LIMIT:.1f} % of the limit, {run.seconds / (USERS / LIMIT):.3f} of the floor, "
            f"{USERS / run.seconds / one_by_one:.0f} times one by one ({one_by_one:.2f} users/s); "
            f"{1000 * run.cpu / USERS / bare_cpu:.2f} of the CPU of the bare loop ({bare_cpu:.2f} ms a user, "
            f"{bare_speed:.0f} users/s)",
            flush=True,
        )


def bulk(server: database.DatabaseServer) -> None:
    """100 000 users in bulk, 300 ms a call."""
    users, limit = 100_000, 5000
    database.fill(server, users, users, all_qualify=True)
    with StandIn(tls="good", latency=0.3, journal=False) as standin:
        run = measure(server, standin, "--bulk")
        print(f"- {describe(run, standin)}; {100 * run.warm / limit:.1f} % of the limit of {limit}", end=", ")
        print(f"{run.seconds / (users / limit):.3f} of the floor")


def shared(server: database.DatabaseServer) -> None:
    """A project of which other programs use 300 of the 500."""
    database.fill(server, USERS, USERS, all_qualify=True)
    with StandIn(tls="good", latency=0.3, others=300, journal=False) as standin:
        run = measure(server, standin)
        average = USERS / run.seconds
        print(f"- {average:.0f} users/s, {100 * average / (LIMIT - 300):.0f} % of the rest;", describe(run, standin))


def slow(server: database.DatabaseServer) -> None:
    """A limit of 50 a second, with errors that make retries."""
    database.fill(server, 1000, 1000, all_qualify=True)
    with StandIn(tls="good", latency=0.1, journal=False) as standin:
        standin.fault("reply", endpoint=USERS_UPDATE, status=503, times=100, skip=200)
        print("-", describe(measure(server, standin, ITERABLE_RATE_LIMIT="50"), standin))


def dry_run(server: database.DatabaseServer) -> None:
    """1 000 000 users in a dry run."""
    users = 1_000_000
    database.fill(server, users, users, all_qualify=True)
    with StandIn(tls="good", journal=False) as standin:
        run = measure(server, standin, "--dry-run")
    print(f"- {run.seconds:.1f} s, CPU {1000 * run.cpu / users:.3f} ms a user, peak memory {run.memory:.0f} MB")


def memory(_: database.DatabaseServer) -> None:
    """The memory of --changed-only: 20 results files of 100 000 users each."""
    call = {"endpoint": USERS_UPDATE, "ok": True, "status": 200, "code": "Success", "message": "", "attempts": 1}
    line = {"record": 1, "user_id": 0, "email": "user@example.com", "event_id": "page-view-1", "status": "success"}
    line |= {"users_update": call, "events_track": {**call, "endpoint": EVENTS_TRACK}}
    with tempfile.TemporaryDirectory() as folder:
        for file in range(20):
            results = ResultsFile(Path(folder), {"mode": "send"}, datetime.now(timezone.utc))
            for user in range(file * 100_000, (file + 1) * 100_000):
                results.add(to_json({**line, "user_id": user, "fingerprint": f"{user:064x}"}), at_once=False)
            results.finish({})
        began = time.monotonic()
        print(f"- {len(read_memory(Path(folder)))} users read in {time.monotonic() - began:.1f} s")


def query(_: database.DatabaseServer) -> None:
    """Query 2 on 100 000 customers and 2 million page views, with and without its index, on each kind of server."""
    sql = read_query(database.QUERIES, "query_2")
    for kind, program in database.find_servers().items():
        with database.DatabaseServer(program, *database.LARGE[kind]) as server:
            server.load(database.SETUP)
            database.fill(server, 100_000, 2_000_000)
            for index in ("with", "without"):
                if index == "without":
                    server.query(database.DROP_INDEX)
                server.query("ANALYZE TABLE page_views, customers")
                times = []
                for _ in range(3):
                    began = time.monotonic()
                    rows = len(server.query(sql))
                    times.append(time.monotonic() - began)
                print(f"- {kind} {server.version}, {rows} rows: {min(times):.2f} s {index} index", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["bare-loop"]:
        print(bare_loop(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
        return
    parts = {part.__name__: part for part in (singly, bulk, shared, slow, dry_run, memory, query)}
    program = next(iter(database.find_servers().values()))
    with database.DatabaseServer(program, *database.LARGE[program.kind]) as server:
        server.load(database.SETUP)
        for name in sys.argv[1:] or parts:
            print(f"\n{name}: {parts[name].__doc__}", flush=True)
            parts[name](server)


if __name__ == "__main__":
    main()
