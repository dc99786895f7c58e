"""main.py as a process: from the rows of a real server to console, log, results file and the stand-in for Iterable."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import unquote

import pytest

import harness
from database import DatabaseServer, find_servers
from standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

Program = Callable[..., harness.Ended]
Started = Callable[..., harness.Running]
Customers = Callable[..., dict[str, str]]
Settings = Callable[..., dict[str, str]]

KINDS = sorted(find_servers()) or ["mariadb or mysql"]
PROGRAM = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py", "phase2_queries.sql")
THE_THREE = [  # of the sample: user, view, page, browser, location, days before the day of loading, time
    (2, "Sarah", "sarah.johnson@email.com", 37, "pricing", "desktop", "San Francisco, US", 1, "14:30:45"),
    (7, "Olivia", "olivia.brown@email.com", 34, "settings", "tablet", "Toronto, CA", 2, "16:48:12"),
    (12, "Mia", "mia.harris@email.com", 32, "settings", "mobile", "Sydney, AU", 2, "09:20:31"),
]
STEPS = """\
Starting Iterable Integration - Phase 3
[STEP 1] Loading environment variables...
[STEP 2] Connecting to database...
[STEP 3] Executing Phase 2 Query 2...
Found {found} pro user(s) with recent engagement
[STEP 4] Initializing Iterable API client...
[STEP 5] Processing user records...
"""
SAMPLE_CONSOLE = f"""\
{STEPS.format(found=3)}
Processing record 1/3
✓ Successfully processed user: sarah.johnson@email.com

Processing record 2/3
✓ Successfully processed user: olivia.brown@email.com

Processing record 3/3
✓ Successfully processed user: mia.harris@email.com

INTEGRATION SUMMARY
Total users processed: 3
✓ Successful (both API calls): 3
⚠ Partial failures (one call failed): 0
✗ Total failures (both calls failed): 0
Results: FILE
Time: N s, N users a second
"""
INVALID = "Iterable refuses the address as invalid: correct it in the customers table"
NO_ADDRESS = "no usable e-mail address: correct it in the customers table"


def masked(text: str) -> str:
    """A console with what differs from run to run taken out: the results file's name, and times."""
    text = re.sub(r"^Results: \S+/integration_results_\d{8}_\d{6}\.json$", "Results: FILE", text, flags=re.MULTILINE)
    return re.sub(r"^Time: \d+\.\d s, \d+\.\d users", "Time: N s, N users", text, flags=re.MULTILINE)


def told(ended: harness.Ended) -> dict[str, Any]:
    """The summary in the results file, without its times and without what is zero."""
    times = ("duration_seconds", "users_per_second")
    return {key: value for key, value in ended.results["summary"].items() if value and key not in times}


def statuses(ended: harness.Ended) -> dict[int, str]:
    return {line["record"]: line["status"] for line in ended.results["results"]}


def calls(standin: StandIn) -> list[tuple[str, str | None]]:
    """Endpoint and address of each call that arrived, in order."""
    return [(call["endpoint"], call["email"]) for call in standin.state()["journal"]]


def user_fields(first_name: str = "Ann") -> dict[str, Any]:
    return {"first_name": first_name, "plan_type": "pro", "recent_page_view": True, "candidate": "yes"}


# The sample, on each kind of server


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, servers: dict[str, DatabaseServer]) -> DatabaseServer:
    """A server of each kind, with the sample."""
    return servers[request.param]


@pytest.fixture
def sample(loaded: DatabaseServer, program: Program) -> harness.Ended:
    """A run on the sample."""
    return program(database=loaded.create_reader())


def payloads(loaded: DatabaseServer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The bodies of contract 4 for the sample's three users."""
    [(yesterday,)] = loaded.query("SELECT DATE(event_time) FROM page_views WHERE sample_no = 37")
    bodies = []
    for _, first_name, email, view, page, browser, location, days, time in THE_THREE:
        timestamp = f"{yesterday - timedelta(days=days - 1)} {time}"
        fields = {"page": page, "browser": browser, "location": location, "timestamp": timestamp, "candidate": "yes"}
        event = {
            "email": email,
            "eventName": "page_view",
            "id": f"page-view-{view}",
            "createdAt": int(datetime.fromisoformat(f"{timestamp}+00:00").timestamp()),
            "dataFields": fields,
        }
        bodies.append(({"email": email, "dataFields": user_fields(first_name)}, event))
    return bodies


def test_the_sample_gives_the_console_of_the_contract_line_for_line(sample: harness.Ended) -> None:
    assert (sample.exit_code, masked(sample.console), sample.errors) == (0, SAMPLE_CONSOLE, "")


def test_the_sample_gives_iterable_three_users_and_their_latest_views(
    loaded: DatabaseServer, sample: harness.Ended, standin: StandIn
) -> None:
    state, bodies = standin.state(), payloads(loaded)
    assert state["users"] == {user["email"]: user["dataFields"] for user, _ in bodies}
    assert state["events"] == {
        event["id"]: {key: value for key, value in event.items() if key != "id"} for _, event in bodies
    }
    assert state["violations"] == []
    headers = ("api-key", "content-type", "user-agent")
    sent = [state["last_headers"][name] for name in headers]
    assert sent == [harness.KEY, "application/json", "iterable-integration/1.0"]


def test_each_user_is_updated_before_the_event_is_sent(sample: harness.Ended, standin: StandIn) -> None:
    by_user: dict[str | None, list[str]] = {}
    for endpoint, email in calls(standin):
        by_user.setdefault(email, []).append(endpoint)
    assert by_user == {row[2]: [USERS_UPDATE, EVENTS_TRACK] for row in THE_THREE}


def test_the_sample_gives_a_results_document_of_exactly_the_contracts_keys(
    loaded: DatabaseServer, sample: harness.Ended, standin: StandIn
) -> None:
    document = sample.results
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", document["run"].pop("started_at"))
    prints = [line.pop("fingerprint") for line in document["results"]]
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in prints)
    assert len(set(prints)) == 3
    seconds, speed = (document["summary"].pop(key) for key in ("duration_seconds", "users_per_second"))
    assert 0 < seconds < 30
    assert speed == pytest.approx(3 / seconds, abs=0.051)
    document["results"].sort(key=lambda line: line["record"])
    success = {"ok": True, "status": 200, "code": "Success", "message": "", "attempts": 1}
    assert document == {
        "run": {
            "mode": "send",
            "database": f"iterable_challenge on 127.0.0.1:{loaded.port}",
            "iterable": standin.url,
            "options": {"limit": None, "changed_only": False},
        },
        "results": [
            {
                "record": record,
                "user_id": user_id,
                "email": email,
                "event_id": f"page-view-{view}",
                "status": "success",
                "users_update": success,
                "events_track": {**success, "message": f"Event with id: page-view-{view} tracked."},
            }
            for record, (user_id, _, email, view, *_) in enumerate(THE_THREE, 1)
        ],
        "summary": {
            "outcome": "completed",
            "exit_code": 0,
            "total_users": 3,
            "success": 3,
            "partial_failures": 0,
            "total_failures": 0,
            "forgotten": 0,
            "unchanged": 0,
            "not_attempted": 0,
            "calls": 6,
            "retries": 0,
            "failure_reasons": [],
        },
    }


def test_the_results_file_has_one_line_a_user_and_is_private(sample: harness.Ended) -> None:
    [path] = sample.folder.glob("integration_results_*")
    assert re.fullmatch(r"integration_results_\d{8}_\d{6}\.json", path.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = path.read_text("utf-8").splitlines()
    users = [json.loads(line.rstrip(","))["email"] for line in lines[3:6]]
    assert sorted(users) == sorted(row[2] for row in THE_THREE)
    assert [lines[0], lines[1][:7], lines[2], lines[6], lines[7][:11], *lines[8:]] == [
        "{",
        '"run": ',
        '"results": [',
        "],",
        '"summary": ',
        "}",
    ]


def test_the_log_says_what_the_console_says_with_time_level_and_module(sample: harness.Ended) -> None:
    form = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} INFO    main: (.*)")
    found = [form.fullmatch(line) for line in sample.log.splitlines()]
    texts = [line[1] if line else "" for line in found]
    own = [text for text in texts if "call successful" in text]  # what the log has beyond the console
    assert own == [
        f"{endpoint} call successful: Success (record {record}/3, {row[2]})"
        for record, row in enumerate(THE_THREE, 1)
        for endpoint in (USERS_UPDATE, EVENTS_TRACK)
    ]
    assert [text for text in texts if text not in own] == [line for line in sample.console.splitlines() if line]
    assert stat.S_IMODE((sample.folder / "run.log").stat().st_mode) == 0o600


# Console and log


def test_records_are_reported_in_their_order_whatever_order_they_finish_in(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    for number, latency in ((1, 1.0), (3, 0.5)):
        standin.fault(endpoint=USERS_UPDATE, email=f"user{number}@example.com", latency=latency)
    ended = program(database=customers(5))
    assert re.findall(r"^Processing record (\d)/5$", ended.console, re.MULTILINE) == list("12345")
    finished = [line["record"] for line in ended.results["results"]]
    assert (set(finished[:3]), finished[3:]) == ({2, 4, 5}, [3, 1])


def test_a_run_that_stood_still_starts_no_more_calls_in_any_second_than_its_limit(
    started: Started, customers: Customers, standin: StandIn
) -> None:
    standin.fault(endpoint=USERS_UPDATE, status=503, skip=30, times=20)
    run = started(database=customers(120), ITERABLE_RATE_LIMIT="50")
    for calls in (30, 60):
        standin.wait_for_calls(calls, USERS_UPDATE)
        run.signal(signal.SIGSTOP)
        sleep(0.4)
        run.signal(signal.SIGCONT)
    ended = run.wait()
    assert (ended.exit_code, ended.results["summary"]["success"], ended.results["summary"]["retries"]) == (0, 120, 20)
    assert standin.counters()["busiest_second"][USERS_UPDATE] <= 51


def test_many_users_show_progress_and_failures_instead_of_successes(program: Program, customers: Customers) -> None:
    emails = {5: "five@nowhere", 77: None}
    rows = [{"email": emails[number]} if number in emails else {} for number in range(1, 102)]
    ended = program(database=customers(rows), ITERABLE_RATE_LIMIT="45")
    progress = re.compile(r"Progress: (\d+)/101 \((\d+) %\), (\d+\.\d) users/s, (\d+) s left, failures: ([012])\n")
    shown = progress.findall(ended.console)
    assert 1 <= len(shown) <= ended.results["summary"]["duration_seconds"] / 2
    for done, percent, speed, left, _ in shown:
        assert int(percent) == 100 * int(done) // 101
        assert 0 < float(speed) <= 46
        assert int(left) == pytest.approx((101 - int(done)) / float(speed), abs=0.6)
    assert masked(progress.sub("", ended.console)) == (
        f"""\
{STEPS.format(found=101)}
Processing record 5/101
4xx Client Error from users/update: Status 400 (record 5/101, five@nowhere)
Response: {{"msg":"Invalid email: five@nowhere","code":"InvalidEmailAddressError","params":null}}
4xx Client Error from events/track: Status 400 (record 5/101, five@nowhere)
Response: {{"msg":"Invalid email: five@nowhere","code":"InvalidEmailAddressError","params":null}}
✗ Failed user: five@nowhere: users/update: {INVALID}; events/track: {INVALID}

Processing record 77/101
✗ Failed user: None: {NO_ADDRESS}

INTEGRATION SUMMARY
Total users processed: 101
✓ Successful (both API calls): 99
⚠ Partial failures (one call failed): 0
✗ Total failures (both calls failed): 2
  1 x users/update 400 InvalidEmailAddressError: {INVALID}
  1 x events/track 400 InvalidEmailAddressError: {INVALID}
  1 x row: {NO_ADDRESS}
Results: FILE
Time: N s, N users a second
"""
    )
    in_log = re.findall(r"Processing record (\d+)/101|(Successfully processed)", ended.log)
    assert [int(number) for number, _ in in_log if number] == list(range(1, 102))
    assert len([words for _, words in in_log if words]) == 99
    assert len(progress.findall(ended.log)) == len(shown)


def test_a_quiet_run_prints_nothing_at_all_when_all_is_well(program: Program, customers: Customers) -> None:
    ended = program("--quiet", database=customers(3))
    assert (ended.exit_code, ended.console, ended.errors) == (0, "", "")
    assert "Successfully processed user: user3@example.com" in ended.log


def test_a_quiet_run_shows_failures_reasons_and_summary_when_not(program: Program, customers: Customers) -> None:
    ended = program("--quiet", database=customers([{}, {"email": " "}]))
    assert (ended.exit_code, ended.errors) == (1, "")
    assert masked(ended.console) == (
        f"""\
✗ Failed user:  : {NO_ADDRESS}

INTEGRATION SUMMARY
Total users processed: 2
✓ Successful (both API calls): 1
⚠ Partial failures (one call failed): 0
✗ Total failures (both calls failed): 1
  1 x row: {NO_ADDRESS}
Results: FILE
Time: N s, N users a second
"""
    )


@pytest.mark.parametrize(
    "locale",
    [
        pytest.param(
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            marks=pytest.mark.skipif(
                not str(harness.ROOT).isascii(), reason="Python itself cannot import from such a folder then"
            ),
        ),
        {"PYTHONIOENCODING": "ascii"},
    ],
    ids=["C locale", "ASCII pipe"],
)
def test_a_console_without_the_marks_loses_them_and_never_the_run(
    program: Program, customers: Customers, locale: Mapping[str, str]
) -> None:
    ended = program(database=customers([{"email": "jürgen@example.com"}]), **locale)
    assert (ended.exit_code, ended.errors) == (0, "")
    assert masked(ended.console) == (
        f"""\
{STEPS.format(found=1)}
Processing record 1/1
Successfully processed user: j\\xfcrgen@example.com

INTEGRATION SUMMARY
Total users processed: 1
Successful (both API calls): 1
Partial failures (one call failed): 0
Total failures (both calls failed): 0
Results: FILE
Time: N s, N users a second
"""
    )
    assert "✓ Successfully processed user: jürgen@example.com" in ended.log


@pytest.mark.parametrize(
    "console",
    [
        '"$@" >&- 2>&- <&-',
        '"$@" > /dev/full',
        '{ "$@"; echo $? > "$CODE"; } | true; exit "$(cat "$CODE")"',
    ],
    ids=["closed", "full", "broken pipe"],
)
def test_a_console_that_goes_away_does_not_stop_the_run(
    settings: Settings, customers: Customers, folder: Path, standin: StandIn, console: str
) -> None:
    coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    done = subprocess.run(
        ["sh", "-c", console, "sh", sys.executable, str(harness.ROOT / "main.py"), "--env-file", "/dev/null"],
        env={**harness.BARE, **coverage, **settings(customers(3)), "CODE": str(folder / "exit_code")},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    ended = harness.Ended(done.returncode, "", done.stderr, folder)
    assert told(ended) == {"outcome": "completed", "total_users": 3, "success": 3, "calls": 6}
    assert len(standin.state()["users"]) == 3
    assert "✓ Successfully processed user: user3@example.com" in ended.log


# Options


def test_a_dry_run_needs_no_key_sends_nothing_and_shows_what_a_run_would_cost(
    settings: Settings, customers: Customers, folder: Path, standin: StandIn
) -> None:
    own = settings(customers(4), ITERABLE_RATE_LIMIT="2")
    del own["ITERABLE_API_KEY"]
    ended = harness.run("--dry-run", settings=own, folder=folder)
    lines = sorted(ended.results["results"], key=lambda line: line["record"])
    bodies = [line["payloads"] for line in lines]
    shown = [
        f"{name} {json.dumps(body[key])}\n"
        for body in bodies[:3]
        for name, key in ((USERS_UPDATE, "users_update"), (EVENTS_TRACK, "events_track"))
    ]
    assert (ended.exit_code, ended.errors) == (0, "")
    assert masked(ended.console) == (
        f"""\
{STEPS.format(found=4)}{"".join(shown)}Dry run, nothing was sent. A run would send 4 users: 8 calls, 2.0 s or more

INTEGRATION SUMMARY
Total users processed: 4
✓ Successful (both API calls): 0
⚠ Partial failures (one call failed): 0
✗ Total failures (both calls failed): 0
Not attempted: 4
Results: FILE
Time: N s, N users a second
"""
    )
    assert [line["status"] for line in lines] == ["would_send"] * 4
    assert (lines[0]["users_update"], lines[0]["events_track"]) == (None, None)
    assert told(ended) == {"outcome": "completed", "total_users": 4, "not_attempted": 4}
    assert ended.results["run"]["mode"] == "dry-run"
    assert standin.counters()["connections"] == 0


def test_a_dry_run_rehearses_what_a_run_sends(program: Program, customers: Customers, standin: StandIn) -> None:
    database = customers(3)
    rehearsed = {line["record"]: line for line in program("--dry-run", database=database).results["results"]}
    sent = {line["record"]: line for line in program(database=database).results["results"]}
    assert {number: line["fingerprint"] for number, line in rehearsed.items()} == {
        number: line["fingerprint"] for number, line in sent.items()
    }
    state = standin.state()
    for line in rehearsed.values():
        user, event = line["payloads"]["users_update"], line["payloads"]["events_track"]
        assert state["users"][user["email"]] == user["dataFields"]
        assert {"id": event["id"], **state["events"][event["id"]]} == event


def test_a_dry_run_says_which_rows_could_not_be_sent(program: Program, customers: Customers) -> None:
    ended = program("--dry-run", database=customers([{"email": "no at sign"}, {}]))
    assert ended.exit_code == 1
    assert f"✗ Failed user: no at sign: {NO_ADDRESS}\n" in ended.console
    assert "A run would send 1 users: 2 calls, 0.0 s or more\n" in ended.console
    assert statuses(ended) == {1: "total_failure", 2: "would_send"}


def test_a_limit_sends_the_first_users_only(program: Program, customers: Customers, standin: StandIn) -> None:
    ended = program("--limit", "2", database=customers(5))
    assert f"{STEPS.format(found=5)}\nProcessing record 1/2\n" in ended.console
    assert told(ended) == {"outcome": "completed", "total_users": 2, "success": 2, "calls": 4}
    assert ended.results["run"]["options"] == {"limit": 2, "changed_only": False}
    assert sorted(standin.state()["users"]) == ["user1@example.com", "user2@example.com"]


def test_a_limit_above_the_number_of_users_sends_them_all(program: Program, customers: Customers) -> None:
    assert told(program("--limit", "9", database=customers(2)))["success"] == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--limit", "0"], "argument --limit: must be a whole number from 1"),
        (["--limit", "-1"], "argument --limit: must be a whole number from 1"),
        (["--limit", "1.5"], "argument --limit: must be a whole number from 1"),
        (["--limit"], "argument --limit: expected one argument"),
        (["--dry"], "unrecognized arguments: --dry"),
        (["now"], "unrecognized arguments: now"),
    ],
)
def test_a_usage_error_says_how_to_call_it(
    settings: Settings, folder: Path, standin: StandIn, arguments: list[str], complaint: str
) -> None:
    ended = harness.run(*arguments, settings=settings({}), folder=folder)
    assert (ended.exit_code, ended.console) == (2, "")
    assert ended.errors.startswith("usage: main.py [-h] [--dry-run] [--limit N] [--changed-only] [--check]")
    assert ended.errors.endswith(f"main.py: error: {complaint}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["empty.env"]
    assert standin.counters()["connections"] == 0


def test_python_may_leave_out_docstrings(program: Program, customers: Customers) -> None:
    assert program(database=customers(1), PYTHONOPTIMIZE="2").exit_code == 0


# Settings


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The program in a folder of its own, where nobody has a .env."""
    folder = tmp_path / "program"
    folder.mkdir()
    for name in PROGRAM:
        shutil.copy(harness.ROOT / name, folder)
    return folder


def run_copy(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As `env -i`: with nothing in the environment."""
    return subprocess.run([sys.executable, script], env={}, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_without_settings_the_error_names_them_all_and_says_what_to_do(copy: Path) -> None:
    done = run_copy("main.py", cwd=copy)
    needed = "; ".join(
        f"{name} is missing" for name in ("DB_HOST", "DB_USER", "DB_PASSWORD", "DB_NAME", "ITERABLE_API_KEY")
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        f"Settings: {needed}. Set them in {copy}/.env (cp .env.example .env, then fill it in) or in the environment. "
        "To see a run without any: bash tests/demo.sh\n",
        "",
    )


def test_settings_come_from_the_env_file_and_the_environment_wins(
    settings: Settings, customers: Customers, folder: Path, standin: StandIn
) -> None:
    own = settings(customers(2))
    assert own["DB_PASSWORD"] == "reader's secret"  # with a quote and a space: a .env must take them
    lines = [f'{name}="{value}"' for name, value in own.items()]
    (folder / "other.env").write_text("\n".join(["# comment", *lines, "ITERABLE_RATE_LIMIT=none", ""]))
    relative = os.path.relpath(folder / "other.env", harness.ROOT)
    ended = harness.run("--env-file", relative, settings={"ITERABLE_RATE_LIMIT": "400"}, folder=folder)
    assert (ended.exit_code, told(ended)["success"]) == (0, 2)


def test_an_env_file_that_is_not_there_is_a_settings_error(
    settings: Settings, folder: Path, customers: Customers
) -> None:
    ended = harness.run("--env-file", "/nowhere/x.env", settings=settings(customers(1)), folder=folder)
    assert ended.exit_code == 2
    assert ended.console.startswith("Settings: /nowhere/x.env cannot be read (No such file or directory). Set them in")


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("LOG_FILE", "{folder}", "[Errno 21] Is a directory: '{folder}'"),
        ("RESULTS_DIR", "{folder}/empty.env/results", "[Errno 20] Not a directory: '{folder}/empty.env/results'"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_settings_error_and_nothing_is_sent(
    program: Program, customers: Customers, folder: Path, standin: StandIn, name: str, path: str, reason: str
) -> None:
    ended = program(database=customers(1), **{name: path.format(folder=folder)})
    complaint = f"{name} cannot be written: {reason.format(folder=folder)}\n"
    assert (ended.exit_code, ended.errors) == (2, "")
    assert ended.console == "".join(STEPS.splitlines(keepends=True)[:2]) + complaint
    assert standin.counters()["connections"] == 0


def test_cron_may_start_it_with_nothing_in_the_environment_from_another_folder(
    settings: Settings, customers: Customers, copy: Path, standin: StandIn, tmp_path: Path
) -> None:
    own = {**settings(customers(2)), "LOG_FILE": "logs/run.log", "RESULTS_DIR": "results"}
    (copy / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in own.items()))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run_copy("../program/main.py", cwd=elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    [results] = (copy / "results").glob("*.json")
    assert json.loads(results.read_text("utf-8"))["summary"]["success"] == 2
    assert "Successfully processed user: user2@example.com" in (copy / "logs" / "run.log").read_text("utf-8")
    assert list(elsewhere.iterdir()) == []
    assert sorted(standin.state()["users"]) == ["user1@example.com", "user2@example.com"]


def test_a_query_that_returns_other_columns_is_refused_before_anything_is_sent(
    settings: Settings, customers: Customers, copy: Path, standin: StandIn
) -> None:
    query = copy / "phase2_queries.sql"
    query.write_text(query.read_text("utf-8").replace("    recent_views.browser,\n", ""), "utf-8")
    (copy / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in settings(customers(1)).items()))
    done = run_copy("main.py", cwd=copy)
    columns = ["email", "event_time", "first_name", "location", "page", "plan_type", "user_id", "view_id"]
    every = ", ".join(sorted([*columns, "browser"]))
    assert done.returncode == 3
    assert f"\nQuery 2 must return {every}, not {', '.join(columns)}\nResults: " in done.stdout
    assert standin.counters()["connections"] == 0


# Endings


def test_no_rows_is_nothing_to_do(program: Program, customers: Customers, standin: StandIn) -> None:
    ended = program(database=customers(0))
    assert (ended.exit_code, ended.errors) == (0, "")
    assert masked(ended.console) == (
        f"""\
{STEPS.format(found=0)}
INTEGRATION SUMMARY
Total users processed: 0
✓ Successful (both API calls): 0
⚠ Partial failures (one call failed): 0
✗ Total failures (both calls failed): 0
Results: FILE
Time: N s, N users a second
"""
    )
    assert (ended.results["results"], told(ended)) == ([], {"outcome": "completed"})
    assert standin.counters()["connections"] == 0


def refuse(standin: StandIn, endpoint: str, email: str) -> None:
    body = '{"msg":"No, user","code":"BadParams","params":null}'
    standin.fault(endpoint=endpoint, email=email, status=400, body=body)


def test_some_failed_is_told_by_user_by_reason_and_by_exit_code(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    refuse(standin, EVENTS_TRACK, "user2@example.com")
    for endpoint in (USERS_UPDATE, EVENTS_TRACK):
        refuse(standin, endpoint, "user3@example.com")
    ended = program(database=customers(3))
    assert (ended.exit_code, ended.errors) == (1, "")
    response = 'Response: {"msg":"No, user","code":"BadParams","params":null}'
    assert masked(ended.console) == (
        f"""\
{STEPS.format(found=3)}
Processing record 1/3
✓ Successfully processed user: user1@example.com

Processing record 2/3
4xx Client Error from events/track: Status 400 (record 2/3, user2@example.com)
{response}
⚠ Partially processed user: user2@example.com: events/track: No, user

Processing record 3/3
4xx Client Error from users/update: Status 400 (record 3/3, user3@example.com)
{response}
4xx Client Error from events/track: Status 400 (record 3/3, user3@example.com)
{response}
✗ Failed user: user3@example.com: users/update: No, user; events/track: No, user

INTEGRATION SUMMARY
Total users processed: 3
✓ Successful (both API calls): 1
⚠ Partial failures (one call failed): 1
✗ Total failures (both calls failed): 1
  2 x events/track 400 BadParams: No, user
  1 x users/update 400 BadParams: No, user
Results: FILE
Time: N s, N users a second
"""
    )
    assert statuses(ended) == {1: "success", 2: "partial_failure", 3: "total_failure"}
    reason = {"status": 400, "code": "BadParams", "message": "No, user"}
    assert told(ended) == {
        "outcome": "completed",
        "exit_code": 1,
        "total_users": 3,
        "success": 1,
        "partial_failures": 1,
        "total_failures": 1,
        "calls": 6,
        "failure_reasons": [
            {"endpoint": EVENTS_TRACK, **reason, "count": 2},
            {"endpoint": USERS_UPDATE, **reason, "count": 1},
        ],
    }


def test_all_failed_is_exit_code_1_too(program: Program, customers: Customers) -> None:
    ended = program(database=customers([{"email": "a@b"}, {"email": "c@d"}]))
    assert ended.exit_code == 1
    reason = {"status": 400, "code": "InvalidEmailAddressError", "message": INVALID, "count": 2}
    assert told(ended) == {
        "outcome": "completed",
        "exit_code": 1,
        "total_users": 2,
        "total_failures": 2,
        "calls": 4,
        "failure_reasons": [{"endpoint": endpoint, **reason} for endpoint in (USERS_UPDATE, EVENTS_TRACK)],
    }


def test_an_unusable_address_costs_no_call_and_says_why(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    emails = [None, "", " \t ", "no at sign", " Ann@Example.COM\n"]
    ended = program(database=customers([{"email": email} for email in emails]))
    line = {"status": "total_failure", "event_id": None, "users_update": None, "events_track": None}
    line |= {"problem": NO_ADDRESS, "fingerprint": None}
    failed = sorted(ended.results["results"], key=lambda line: line["record"])[:4]
    assert failed == [
        {"record": number, "user_id": number, "email": email, **line} for number, email in enumerate(emails[:4], 1)
    ]
    reason = {"endpoint": None, "status": None, "code": None, "message": NO_ADDRESS, "count": 4}
    assert told(ended) == {
        "outcome": "completed",
        "exit_code": 1,
        "total_users": 5,
        "success": 1,
        "total_failures": 4,
        "calls": 2,
        "failure_reasons": [reason],
    }
    assert f"  4 x row: {NO_ADDRESS}\n" in ended.console
    # The address that is usable is stripped and in lower case.
    assert calls(standin) == [(USERS_UPDATE, "ann@example.com"), (EVENTS_TRACK, "ann@example.com")]


def test_a_forgotten_user_gets_no_event_and_is_no_failure(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    standin.configure(forgotten=["user2@example.com"])
    ended = program(database=customers(3))
    assert ended.exit_code == 0
    assert statuses(ended) == {1: "success", 2: "forgotten", 3: "success"}
    assert told(ended) == {"outcome": "completed", "total_users": 3, "success": 2, "forgotten": 1, "calls": 5}
    assert "\nForgotten at the user's own request, so not told: user2@example.com\n" in ended.console
    assert "\n✗ Total failures (both calls failed): 0\nForgotten at their own request: 1\nResults: " in ended.console
    assert [call for call in calls(standin) if call[1] == "user2@example.com"] == [(USERS_UPDATE, "user2@example.com")]


def test_a_null_is_left_out_of_the_payload(program: Program, customers: Customers, standin: StandIn) -> None:
    rows = [{"first_name": None, "browser": None, "location": None}]
    assert program(database=customers(rows)).exit_code == 0
    state = standin.state()
    assert state["users"]["user1@example.com"] == {"plan_type": "pro", "recent_page_view": True, "candidate": "yes"}
    assert sorted(state["events"]["page-view-1"]["dataFields"]) == ["candidate", "page", "timestamp"]


def test_equal_reasons_are_counted_together_and_the_most_frequent_is_first(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    """Although each names its user: the address and the event's id are not part of the reason."""
    refuse(standin, USERS_UPDATE, "user1@example.com")
    for number in (2, 3, 4):
        body = f'{{"msg":"No event for user{number}@example.com (page-view-{number})","code":"BadParams"}}'
        standin.fault(endpoint=EVENTS_TRACK, email=f"user{number}@example.com", status=400, body=body)
    ended = program(database=customers([{}, {}, {}, {}, {"email": None}, {"email": "x"}]))
    reasons = [line for line in ended.console.splitlines() if line.startswith("  ")]
    assert reasons == [
        "  3 x events/track 400 BadParams: No event for <email> (<id>)",
        f"  2 x row: {NO_ADDRESS}",
        "  1 x users/update 400 BadParams: No, user",
    ]
    assert [reason["count"] for reason in ended.results["summary"]["failure_reasons"]] == [3, 2, 1]


def test_only_the_ten_most_frequent_reasons_are_on_the_console_and_all_are_in_the_results(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    for number in range(1, 13):
        body = f'{{"msg":"Reason {number}","code":"BadParams"}}'
        standin.fault(endpoint=EVENTS_TRACK, email=f"user{number}@example.com", status=400, body=body)
    ended = program(database=customers(12))
    reasons = [line for line in ended.console.splitlines() if line.startswith("  ")]
    assert len(reasons) == 11
    assert reasons[-1] == "  and 2 other reasons, all in the results file"
    assert len(ended.results["summary"]["failure_reasons"]) == 12


def test_a_view_that_two_runs_send_is_one_event(program: Program, customers: Customers, standin: StandIn) -> None:
    database = customers(2)
    first, second = program(database=database), program(database=database)
    assert (first.exit_code, second.exit_code, len(second.documents)) == (0, 0, 2)
    state = standin.state()
    assert state["accepted"][EVENTS_TRACK] == {"page-view-1": 2, "page-view-2": 2}
    assert sorted(state["events"]) == ["page-view-1", "page-view-2"]


# Secrets

PASSWORD = 'pass "word" \\ü/%41'


def unescaped(text: str) -> str:
    """With JSON's and a URL's escapes undone."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), unquote(text)).replace("\\", "")


@pytest.fixture
def with_secrets(server: DatabaseServer, customers: Customers) -> dict[str, str]:
    """Five users, read with a password that is escaped in one way here and in another there."""
    own = customers(5)
    return server.create_reader(user=own["DB_USER"], password=PASSWORD, database=own["DB_NAME"])


def echo(standin: StandIn) -> None:
    """Iterable's answers hold the key, for each user in another form, and the password."""
    escaped = "".join(f"\\u{ord(character):04x}" for character in harness.KEY)
    bodies = {
        2: (400, json.dumps({"msg": f"{harness.KEY.upper()} {PASSWORD}", "code": harness.KEY, "params": None})),
        3: (400, f'{{"msg":"{escaped}","code":"BadParams","params":null}}'),
        4: (502, f"<html>Api-Key: {harness.KEY} {PASSWORD}</html>"),
        5: (200, json.dumps({"msg": "ok", "code": "Success", "params": {"key": harness.KEY}})),
    }
    standin.fault("echo_headers", email="user1@example.com")
    for number, (status, body) in bodies.items():
        standin.fault(email=f"user{number}@example.com", status=status, body=body)


def assert_no_secret(ended: harness.Ended) -> None:
    written = ended.everything
    assert "Response: " in written
    for secret in (harness.KEY, PASSWORD):
        for text, form in ((written, secret), (unescaped(written), unescaped(secret))):
            assert [line for line in text.splitlines() if form.lower() in line.lower()] == []


def test_no_secret_is_written_anywhere_even_at_debug_when_the_api_echoes_it(
    program: Program, with_secrets: dict[str, str], standin: StandIn
) -> None:
    echo(standin)
    ended = program(database=with_secrets, LOG_LEVEL="DEBUG", ITERABLE_MAX_ATTEMPTS="2")
    assert statuses(ended) == {**dict.fromkeys(range(1, 5), "total_failure"), 5: "success"}
    assert "DEBUG   iterable_client: users/update, attempt 1" in ended.log
    assert "attempt 1" not in ended.console
    assert_no_secret(ended)


def test_no_secret_is_in_what_a_killed_run_leaves(
    started: Started, with_secrets: dict[str, str], standin: StandIn
) -> None:
    standin.fault("silence", email="user5@example.com")
    echo(standin)
    running = started(database=with_secrets, LOG_LEVEL="DEBUG", ITERABLE_MAX_ATTEMPTS="1")
    running.wait_for("Processing record 4/5")
    running.process.kill()
    ended = running.wait()
    [partial] = ended.folder.glob("*.partial")
    assert len(partial.read_text("utf-8").splitlines()) == 7  # three lines of head, four users
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    assert_no_secret(ended)


# Shape


def imports(name: str) -> set[str]:
    """The top-level names of the modules that a module imports."""
    found = set()
    for node in ast.walk(ast.parse((harness.ROOT / name).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add((node.module or "").split(".")[0])
    return found - sys.stdlib_module_names


def test_main_imports_the_other_three_and_they_import_nothing_of_ours() -> None:
    assert {name: imports(name) for name in PROGRAM if name.endswith(".py")} == {
        "main.py": {"db_connection", "iterable_client", "logger_config", "dotenv"},
        "db_connection.py": {"mysql"},
        "iterable_client.py": {"requests", "urllib3"},  # urllib3 is what requests is made of
        "logger_config.py": set(),
    }


def test_the_runtime_packages_are_the_three_of_the_contract() -> None:
    lines = (harness.ROOT / "requirements.txt").read_text("utf-8").split()
    names = {re.split("[=<>~!]", line)[0] for line in lines}
    assert names == {"mysql-connector-python", "requests", "python-dotenv"}


def test_the_top_of_the_repository_holds_what_the_contract_allows_and_no_more() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=harness.ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    visible = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    assert visible == {*PROGRAM, "database_setup.sql", "requirements.txt", "README.md", "tests"}
