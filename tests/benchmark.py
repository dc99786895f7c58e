"""Measures what the README's table says, side by side in one run: `bash tests/benchmark.sh [PART ...]`.

Everything goes over HTTPS to the stand-in, a process of its own that allows 500 users/update and 2000 events/track
calls in any one second and answers 429 to the rest. Parts: speed cpu shared slow memory query (all without arguments).
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import requests

import database
import harness
from standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

LIMIT = 500
USERS = 10_000
WARM_AFTER = 4.0  # seconds
BARE_THREADS = 400
PROGRESS = re.compile(r"Progress: (\d+)/")


@dataclass
class Measured:
    """A whole run of main.py: seconds from start to exit, CPU seconds, MB at the peak, users a second once warm."""

    seconds: float
    cpu: float
    memory: float
    warm: float
    summary: dict[str, Any]


def measure(server: database.DatabaseServer, standin: StandIn, *arguments: str, **settings: str) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        own = {"REQUESTS_CA_BUNDLE": str(standin.ca_file), "ITERABLE_RATE_LIMIT": str(LIMIT), **settings}
        environment = harness.settings_for(server.create_reader(), standin.url, Path(folder), **own)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-u", str(harness.ROOT / "main.py"), "--env-file", "/dev/null", *arguments],
            env={**harness.BARE, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        progress = [(time.monotonic(), int(found[1])) for line in process.stdout if (found := PROGRESS.match(line))]
        _, _, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        document = json.loads(next(Path(folder).glob("integration_results_*.json")).read_text("utf-8"))
    warm = [(when, done) for when, done in progress if when > began + WARM_AFTER] or [(0.0, 0)]
    (first, done_first), (last, done_last) = warm[0], warm[-1]
    speed = (done_last - done_first) / (last - first) if last > first else 0.0
    memory = usage.ru_maxrss / 1024
    return Measured(seconds, usage.ru_utime + usage.ru_stime, memory, speed, document["summary"])


def bodies(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    email = f"bare{number}@example.com"
    user = {"email": email, "dataFields": {"first_name": "Ann", "plan_type": "pro", "recent_page_view": True}}
    fields = {"page": "pricing", "browser": "desktop", "location": "Berlin", "timestamp": "2026-01-13 14:30:45"}
    event = {"email": email, "eventName": "page_view", "id": f"bare-{number}", "createdAt": 1768314645}
    return user, {**event, "dataFields": fields}


def bare_loop(url: str, ca_file: str, users: int, threads: int) -> float:
    """Both calls for each user with a `requests.Session` a thread, and nothing else. Returns users a second."""
    own = local()

    def send(number: int) -> None:
        if not hasattr(own, "session"):
            own.session = requests.Session()
            own.session.headers.update({"Api-Key": harness.KEY, "User-Agent": "bare-loop/1.0"})
        for endpoint, body in zip((USERS_UPDATE, EVENTS_TRACK), bodies(number), strict=True):
            own.session.post(f"{url}/api/{endpoint}", json=body, timeout=30, verify=ca_file).raise_for_status()

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(send, range(users)))
    return users / (time.monotonic() - began)


def bare(standin: StandIn, users: int, threads: int) -> tuple[float, float]:
    """The bare loop in a process of its own: users a second, and CPU milliseconds a user, start-up included."""
    command = [sys.executable, __file__, "bare-loop", standin.url, str(standin.ca_file), str(users), str(threads)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(done.stdout), 1000 * cpu / users


def describe(run: Measured, standin: StandIn) -> str:
    counters = standin.counters()
    calls = sum(counters["calls"].values())
    return (
        f"{run.summary['success']} of {run.summary['total_users']} delivered; {calls} calls over "
        f"{counters['connections']} connections, {counters['throttled']} answered 429 "
        f"({100 * counters['throttled'] / calls:.2f} %), busiest second "
        f"{counters['busiest_second'][USERS_UPDATE]} users/update; "
        f"CPU {1000 * run.cpu / run.summary['total_users']:.2f} ms a user, peak memory {run.memory:.0f} MB"
    )


def speed(server: database.DatabaseServer) -> None:
    """Users a second beside the one-by-one loop, at three latencies."""
    database.fill(server, USERS, USERS, all_qualify=True)
    print("| ms a call | seconds | of the floor | users/s, warm | of the limit | one by one, users/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for latency in (0.05, 0.1, 0.3):
        with StandIn(tls="good", latency=latency, limit_users=LIMIT, journal=False) as standin:
            single, _ = bare(standin, max(8, int(4 / latency)), 1)
            standin.reset()
            run = measure(server, standin)
            row = [f"{1000 * latency:.0f}", f"{run.seconds:.1f}", f"{run.seconds / (USERS / LIMIT):.3f}"]
            row += [f"{run.warm:.0f}", f"{100 * run.warm / LIMIT:.1f} %", f"{single:.2f}"]
            row.append(f"{run.summary['total_users'] / run.seconds / single:.0f}")
            print(f"| {' | '.join(row)} |  {describe(run, standin)}", flush=True)


def cpu(server: database.DatabaseServer) -> None:
    """CPU time a user, beside a bare loop of the same two calls without any limit."""
    users = 5000
    database.fill(server, users, users, all_qualify=True)
    with StandIn(tls="good", latency=0.3, limit_users=100_000, limit_events=100_000, journal=False) as standin:
        bare_speed, bare_cpu = bare(standin, users, BARE_THREADS)
        standin.reset()
        run = measure(server, standin)
    own = 1000 * run.cpu / users
    print(
        f"CPU a user: {own:.2f} ms at {run.warm:.0f} users/s; bare loop in {BARE_THREADS} threads: {bare_cpu:.2f} ms "
        f"at {bare_speed:.0f} users/s; ratio {own / bare_cpu:.2f}"
    )


def shared(server: database.DatabaseServer) -> None:
    """A project of which other programs use 300 of the 500."""
    others = 300
    database.fill(server, USERS, USERS, all_qualify=True)
    with StandIn(tls="good", latency=0.3, limit_users=LIMIT, others=others, journal=False) as standin:
        run = measure(server, standin)
        average = run.summary["total_users"] / run.seconds
        print(
            f"Others use {others} of {LIMIT}: {average:.0f} users/s, {100 * average / (LIMIT - others):.0f} % of "
            f"what is left; {describe(run, standin)}"
        )


def slow(server: database.DatabaseServer) -> None:
    """A limit of 50 a second, with errors that make retries."""
    database.fill(server, 1000, 1000, all_qualify=True)
    with StandIn(tls="good", latency=0.1, limit_users=LIMIT, journal=False) as standin:
        standin.fault("reply", endpoint=USERS_UPDATE, status=503, times=100, skip=200)
        run = measure(server, standin, ITERABLE_RATE_LIMIT="50")
        print(f"ITERABLE_RATE_LIMIT=50: {run.summary['retries']} retries; {describe(run, standin)}")


def memory(server: database.DatabaseServer) -> None:
    """Peak memory of 100 000 users."""
    database.fill(server, 100_000, 100_000, all_qualify=True)
    with StandIn(tls="good", latency=0.1, limit_users=LIMIT, journal=False) as standin:
        run = measure(server, standin)
        print(f"100 000 users in {run.seconds:.0f} s: {describe(run, standin)}")


def query() -> None:
    """Query 2 on 100 000 customers and 2 million page views, with and without its index, on each kind of server."""
    sql = re.search(r"^-- name: query_2$(.*?);$", database.QUERIES.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert sql
    for kind, program in database.find_servers().items():
        with database.DatabaseServer(program, *database.LARGE[kind]) as server:
            server.load(database.SETUP)
            database.fill(server, 100_000, 2_000_000)
            times = {}
            for index in ("with", "without"):
                if index == "without":
                    server.query("ALTER TABLE page_views DROP KEY page_views_recent")
                server.query("ANALYZE TABLE page_views, customers")
                runs = []
                for _ in range(3):
                    began = time.monotonic()
                    rows = len(server.query(sql[1]))
                    runs.append(time.monotonic() - began)
                times[index] = min(runs)
        print(
            f"Query 2 on {kind} {server.version}, {rows} rows: {times['with']:.2f} s with index, "
            f"{times['without']:.2f} s without, ratio {times['without'] / times['with']:.0f}",
            flush=True,
        )


def main() -> None:
    if sys.argv[1:2] == ["bare-loop"]:
        print(bare_loop(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
        return
    parts = {"speed": speed, "cpu": cpu, "shared": shared, "slow": slow, "memory": memory}
    wanted = sys.argv[1:] or [*parts, "query"]
    with database.DatabaseServer(next(iter(database.find_servers().values()))) as server:
        server.load(database.SETUP)
        for name in wanted:
            if name in parts:
                print(f"\n{name}: {parts[name].__doc__}", flush=True)
                parts[name](server)
    if "query" in wanted:
        print(f"\nquery: {query.__doc__}", flush=True)
        query()


if __name__ == "__main__":
    main()
