"""main.py as a process: from the rows of a real server to console, log, results file and the stand-in for Iterable."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from lab import answers, process
from lab.database import DatabaseServer, find_servers
from lab.process import KEY, Customers, Ended, Program, Settings
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

KINDS = sorted(find_servers()) or ["mariadb or mysql"]
Sample = tuple[Ended, DatabaseServer, StandIn]
PROGRAM = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py", "phase2_queries.sql")
STEPS = """\
Starting Iterable Integration - Phase 3
[STEP 1] Loading environment variables...
[STEP 2] Connecting to database...
[STEP 3] Executing Phase 2 Query 2...
Found {found} pro user(s) with recent engagement
[STEP 4] Initializing Iterable API client...
[STEP 5] Processing user records...
"""
SUMMARY = """
INTEGRATION SUMMARY
Total users processed: {0}
✓ Successful (both API calls): {1}
⚠ Partial failures (one call failed): {2}
✗ Total failures (both calls failed): {3}
{4}Results: FILE
Time: N s, N users a second
"""
NO_ADDRESS = "no usable e-mail address"
CORRECT_IT = f"{NO_ADDRESS}: correct it in the customers table"


def address(number: int) -> str:
    return f"user{number}@example.com"


def calls(standin: StandIn) -> list[tuple[str, str]]:
    return [(call["endpoint"], call["email"]) for call in standin.state()["journal"]]


# The sample, on each kind of server


@pytest.fixture(scope="module", params=KINDS)
def sample(
    request: pytest.FixtureRequest, servers: dict[str, DatabaseServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sample]:
    """A run on the sample, and what it ran against."""
    server, folder = servers[request.param], tmp_path_factory.mktemp("sample")
    with StandIn(key=KEY) as standin:
        settings = process.settings_for(server.create_reader(), standin.url, folder)
        yield process.run(settings=settings, folder=folder), server, standin


THE_THREE = [  # user, view, page, browser, location, days before the day of loading, time
    (2, "Sarah", "sarah.johnson@email.com", 37, "pricing", "desktop", "San Francisco, US", 1, "14:30:45"),
    (7, "Olivia", "olivia.brown@email.com", 34, "settings", "tablet", "Toronto, CA", 2, "16:48:12"),
    (12, "Mia", "mia.harris@email.com", 32, "settings", "mobile", "Sydney, AU", 2, "09:20:31"),
]


def test_the_sample_gives_the_console_of_the_contract_and_the_log_has_the_calls_besides(sample: Sample) -> None:
    ended, _, _ = sample
    users, made = "", []
    for record, (_, _, email, *_) in enumerate(THE_THREE, 1):
        users += f"\nProcessing record {record}/3\n✓ Successfully processed user: {email}\n"
        words = f"call successful: Success (record {record}/3, {email})"
        made += [f"{endpoint} {words}" for endpoint in (USERS_UPDATE, EVENTS_TRACK)]
    shown = STEPS.format(found=3) + users + SUMMARY.format(3, 3, 0, 0, "")
    assert (ended.exit_code, ended.shown, ended.errors) == (0, shown, "")
    form = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} INFO    main: (.*)")
    texts = [found[1] if (found := form.fullmatch(line)) else line for line in ended.log.splitlines()]
    assert [text for text in texts if "call successful" in text] == made
    assert [text for text in texts if text not in made] == [line for line in ended.console.splitlines() if line]


def test_the_sample_gives_iterable_three_users_and_then_their_latest_views(sample: Sample) -> None:
    _, server, standin = sample
    [(yesterday,)] = server.query("SELECT DATE(event_time) FROM page_views WHERE id = 37")
    users, events = {}, {}
    for _, first_name, email, view, page, browser, location, days, time in THE_THREE:
        timestamp = f"{yesterday - timedelta(days=days - 1)} {time}"
        users[email] = {"first_name": first_name, "plan_type": "pro", "recent_page_view": True, "candidate": "yes"}
        fields = {"page": page, "browser": browser, "location": location, "timestamp": timestamp, "candidate": "yes"}
        at = int(datetime.fromisoformat(f"{timestamp}+00:00").timestamp())
        events[f"page-view-{view}"] = {"email": email, "eventName": "page_view", "createdAt": at, "dataFields": fields}
    state, made = standin.state(), calls(standin)
    assert (state["users"], state["events"], state["violations"]) == (users, events, [])
    assert sorted(made) == sorted((endpoint, email) for endpoint in (USERS_UPDATE, EVENTS_TRACK) for email in users)
    assert all(made.index((USERS_UPDATE, email)) < made.index((EVENTS_TRACK, email)) for email in users)


def test_the_sample_gives_a_private_results_document_of_exactly_the_contracts_keys(sample: Sample) -> None:
    ended, _, standin = sample
    [path] = ended.folder.glob("integration_results_*")
    assert re.fullmatch(r"integration_results_\d{8}_\d{6}\.json", path.name)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, ended.folder / "run.log")] == [0o600] * 2
    document = ended.results
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", document["run"].pop("started_at"))
    assert len({line.pop("fingerprint") for line in document["results"]}) == 3
    seconds, speed = (document["summary"].pop(key) for key in ("duration_seconds", "users_per_second"))
    assert speed == pytest.approx(3 / seconds, abs=0.051)
    document["results"].sort(key=lambda line: line["record"])
    call = {"ok": True, "status": 200, "code": "Success", "message": "", "attempts": 1}
    lines = []
    for record, (user_id, _, email, view, *_) in enumerate(THE_THREE, 1):
        track = {"endpoint": EVENTS_TRACK, **call, "message": f"Event with id: page-view-{view} tracked."}
        made = {"users_update": {"endpoint": USERS_UPDATE, **call}, "events_track": track}
        ids = {"record": record, "user_id": user_id, "email": email, "event_id": f"page-view-{view}"}
        lines.append({**ids, "status": "success", **made})
    zeros = ("partial_failures", "total_failures", "forgotten", "unchanged", "not_attempted", "retries")
    counts = {"total_users": 3, "success": 3, "calls": 6, **dict.fromkeys(zeros, 0)}
    place = {"database": "iterable_challenge on 127.0.0.1", "iterable": standin.url}
    options = dict.fromkeys(("dry_run", "changed_only", "bulk", "check", "quiet"), False)
    options |= {"limit": None, "at_least": None, "env_file": str(ended.folder / "empty.env")}
    assert document == {
        "run": {"number": 1, "mode": "send", **place, "options": options},
        "results": lines,
        "summary": {"outcome": "completed", "exit_code": 0, **counts, "failure_reasons": []},
    }


# Answers

ANSWERS = [*answers.ON_THE_WAY, *answers.ANSWERED]  # who are first finish last
TOLD = {
    "success": "✓ Successfully processed user: {}",
    "forgotten": "Forgotten at the user's own request, so not told: {}",
    "partial_failure": "⚠ Partially processed user: {}: users/update ",
}


def test_each_answer_is_told_in_every_place(program: Program, customers: Customers, standin: StandIn) -> None:
    """One run, in which each user meets another answer to users/update, at each of two tries."""
    table = [each for each in ANSWERS if each.result.status not in (401, 403, 429)]  # these stop the others
    for number, each in enumerate(table, 1):
        standin.fault(endpoint=USERS_UPDATE, email=address(number), **each.fault)
    ended = program(database=customers(len(table)), ITERABLE_MAX_ATTEMPTS="2", ITERABLE_TIMEOUT="1")
    assert (ended.exit_code, ended.errors) == (1, "")
    log = re.sub(r"(?m)^\S+ [A-Z]+ +main: ", "", ended.log)
    on_console, in_log = (text.split("Processing record ")[1:] for text in (ended.console, log))
    reasons = set()
    for number, (each, shown, logged) in enumerate(zip(table, on_console, in_log, strict=True), 1):
        result, line, place = each.after(2), ended.users[number], f"{number}/{len(table)}"
        status = "success" if result.ok else "forgotten" if result.forgotten else "partial_failure"
        made = (line["status"], line["users_update"], line["events_track"] is None)
        assert made == (status, result.as_json, result.forgotten), each.id
        short = f"{result.status or 'no answer'} {result.code or ''}".strip() if status == "partial_failure" else ""
        assert shown.startswith(f"{place}\n{TOLD[status].format(address(number))}{short}\n"), each.id
        response = f"Response: {' '.join(result.body.split())}\n" if not result.ok and result.status else ""
        headline = f"{result.headline} (record {place}, {address(number)})"
        assert logged.startswith(f"{place}\n{headline}\n{response}"), each.id
        reasons |= {(result.status, result.code, result.reason)} if short else set()
    assert {(e["status"], e["code"], e["message"]) for e in ended.summary["failure_reasons"]} == reasons
    listed = re.findall("^  .*", ended.console, re.MULTILINE)
    assert (len(listed), listed[-1]) == (11, f"  {len(reasons) - 10} more reasons stand in the results file")


def test_a_refused_key_ends_the_run_at_once(program: Program, customers: Customers, standin: StandIn) -> None:
    ended = program(database=customers(30), MAX_WORKERS="1", ITERABLE_API_KEY="0" * 32)
    assert (ended.exit_code, ended.errors, ended.console.count(answers.KEY_REFUSED)) == (4, "", 1)
    assert f"\n✗ Failed user: {address(1)}: users/update 401 BadApiKey\n" in ended.console
    assert "\n✗ Total failures (both calls failed): 1\nNot attempted: 29\n" in ended.console
    reason = {"endpoint": USERS_UPDATE, "status": 401, "code": "BadApiKey", "message": answers.KEY_REFUSED, "count": 1}
    counts = {"total_users": 30, "total_failures": 1, "not_attempted": 29, "calls": 1}
    assert ended.summary == {"outcome": "aborted", "exit_code": 4, **counts, "failure_reasons": [reason]}
    assert calls(standin) == [(USERS_UPDATE, address(1))]


@pytest.mark.parametrize("name", ["503", "200 with a page", "reset before the call is processed"])
def test_twenty_users_in_a_row_without_a_usable_answer_end_the_run(
    program: Program, customers: Customers, standin: StandIn, name: str
) -> None:
    [answer] = [each for each in ANSWERS if each.id == name]
    standin.fault(**answer.fault)
    ended = program(database=customers(100), MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")
    assert (ended.exit_code, ended.errors) == (4, "")
    assert "\nThe run ended early: 20 users in a row got no usable answer\n\nINTEGRATION SUMMARY\n" in ended.console
    [reason] = ended.summary["failure_reasons"]  # it is the same for both calls, so the user counts once
    failures = reason["count"]
    assert 20 <= failures <= 22  # the next may be on its way when the 20th is known
    assert (reason["status"], reason["message"]) == (answer.result.status, answer.result.reason)
    counts = {"total_users": 100, "total_failures": failures, "not_attempted": 100 - failures}
    counts |= {"calls": len(calls(standin))}
    assert ended.summary == {"outcome": "aborted", "exit_code": 4, **counts, "failure_reasons": [reason]}


def test_nineteen_or_any_with_a_usable_answer_do_not(program: Program, customers: Customers, standin: StandIn) -> None:
    standin.fault(status=500, times=38)  # both calls of 19 users, and of 19 more after one whose event is taken
    standin.fault(status=500, skip=2, times=38)
    standin.fault(endpoint=USERS_UPDATE, status=500)  # then each event is refused
    rows = [{}] * 39 + [{"email": f"user{number}@nowhere"} for number in range(25)]
    ended = program(database=customers(rows), MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")
    assert (ended.exit_code, ended.summary["total_failures"], ended.summary["partial_failures"]) == (1, 63, 1)


# Rows


def test_a_row_that_cannot_be_sent_costs_no_call_and_says_why_and_nulls_are_left_out(
    server: DatabaseServer, program: Program, customers: Customers, standin: StandIn
) -> None:
    sparse = {"email": " Ann@Example.COM\n", "first_name": None, "browser": None, "location": None}
    emails = ["ANN@example.com", None, " \t ", "no at sign"]
    database = customers([sparse, *({"email": email} for email in emails), {}])
    server.query("ALTER TABLE page_views MODIFY id BIGINT NOT NULL, DROP PRIMARY KEY", database["DB_NAME"])
    server.query("UPDATE page_views SET id = 1 WHERE user_id = 6", database["DB_NAME"])
    ended = program(database=database)
    one_profile = "customer 1 has the same address: merge the two"
    one_event = "customer 1 has the same page view: make page_views.id unique"
    problems = [one_profile, CORRECT_IT, CORRECT_IT, CORRECT_IT, one_event]
    failed = dict.fromkeys(("event_id", "users_update", "events_track", "fingerprint")) | {"status": "total_failure"}
    assert ended.users[4] == {"record": 4, "user_id": 4, "email": " \t ", **failed, "problem": CORRECT_IT}
    assert [ended.users[number].get("problem") for number in range(1, 7)] == [None, *problems]
    names = ["ann@example.com", "customer 3", "customer 4", "no at sign", address(6)]
    shown = [f"✗ Failed user: {who}: {why.split(':')[0]}" for who, why in zip(names, problems, strict=True)]
    assert re.findall(r"✗ Failed .*", ended.console) == shown
    reasons = f"  3 users: {CORRECT_IT}\n  1 user: {one_profile}\n  1 user: {one_event}\n"
    assert (ended.exit_code, ended.shown.endswith(SUMMARY.format(6, 1, 0, 5, reasons))) == (1, True)
    assert calls(standin) == [(USERS_UPDATE, "ann@example.com"), (EVENTS_TRACK, "ann@example.com")]
    state = standin.state()
    assert state["users"] == {"ann@example.com": {"plan_type": "pro", "recent_page_view": True, "candidate": "yes"}}
    assert sorted(state["events"]["page-view-1"]["dataFields"]) == ["candidate", "page", "timestamp"]


def test_no_rows_is_nothing_to_do(program: Program, customers: Customers, standin: StandIn) -> None:
    ended = program(database=customers(0))
    shown = STEPS.format(found=0) + SUMMARY.format(0, 0, 0, 0, "")
    assert (ended.exit_code, ended.shown, ended.errors) == (0, shown, "")
    assert (ended.results["results"], ended.summary, calls(standin)) == ([], {"outcome": "completed"}, [])


# Console


def test_many_users_show_progress_and_20_failures(program: Program, customers: Customers, standin: StandIn) -> None:
    """The log has everyone. Who fails twice for one reason counts once there, who fails for two under each."""
    rows = [{"email": None}] * 18 + [{"email": f"bad{number}@nowhere"} for number in range(3)] + [{}] * 109
    for endpoint, number, msg in ((EVENTS_TRACK, 22, "No"), (EVENTS_TRACK, 23, "No"), (USERS_UPDATE, 23, "No, user")):
        body = json.dumps({"msg": f"{msg} {address(number)}", "code": "BadParams", "params": None})
        standin.fault(endpoint=endpoint, email=address(number), status=400, body=body)
    ended = program(database=customers(rows), ITERABLE_RATE_LIMIT="35")
    update, track = (f"{endpoint} 400 BadParams" for endpoint in (USERS_UPDATE, EVENTS_TRACK))
    twice = f"{USERS_UPDATE} 400 InvalidEmailAddressError, {EVENTS_TRACK} 400 InvalidEmailAddressError"
    failed = [f"✗ Failed user: customer {number} (record {number}/130): {NO_ADDRESS}" for number in range(1, 19)]
    failed += [f"✗ Failed user: bad{number}@nowhere (record {number + 19}/130): {twice}" for number in range(3)]
    failed += [f"⚠ Partially processed user: {address(22)} (record 22/130): {track}"]
    failed += [f"✗ Failed user: {address(23)} (record 23/130): {update}, {track}"]
    reasons = [f"18 users: {CORRECT_IT}", f"3 users: {twice.split(',')[0]}: {answers.BAD_ADDRESS}"]
    reasons += [f"2 users: {track}: No <email>", f"1 user: {update}: No, user <email>"]
    summary = SUMMARY.format(130, 107, 1, 22, "".join(f"  {reason}\n" for reason in reasons))
    first = "".join(f"{line}\n" for line in failed[:20])
    progress = re.compile(r"Progress: (\d+)/130 \((\d+) %\), (\d+\.\d) users/s, (\d+) s left, failures: [12]\d\n")
    assert progress.sub("", ended.shown) == STEPS.format(found=130) + first + summary
    assert 1 <= len(progress.findall(ended.console)) <= ended.results["summary"]["duration_seconds"] / 2
    for done, percent, speed, left in progress.findall(ended.console):
        assert int(percent) == 100 * int(done) // 130
        assert int(left) == pytest.approx((130 - int(done)) / float(speed), abs=0.6)
    assert standin.counters()["busiest_second"][USERS_UPDATE] <= 40  # a few may have been late on their way
    others = [f"✓ Successfully processed user: {address(n)} (record {n}/130)" for n in range(24, 131)]
    assert re.findall(r" main: ([✓✗⚠] .* \(record .*)", ended.log) == [*failed, *others]


def test_a_quiet_run_shows_what_is_wrong_or_nothing(program: Program, customers: Customers, standin: StandIn) -> None:
    """Here on a console that knows only ASCII: it loses the marks, and never the run."""
    ended = program("--quiet", database=customers([{}, {"email": "jürgen"}]), PYTHONIOENCODING="ascii")
    summary = re.sub("[✓⚠✗] ", "", SUMMARY.format(2, 1, 0, 1, f"  1 user: {CORRECT_IT}\n"))
    shown = f"Failed user: j\\xfcrgen: {NO_ADDRESS}\n{summary}"
    assert (ended.exit_code, ended.shown, ended.errors) == (1, shown, "")
    assert f"ERROR   main: ✗ Failed user: jürgen: {NO_ADDRESS}\n" in ended.log
    standin.configure(forgotten=[address(2)])  # which is no failure
    well = program("--quiet", database=customers(3))
    assert (well.exit_code, well.console, well.errors) == (0, "", "")
    assert well.summary == {"outcome": "completed", "total_users": 3, "success": 2, "forgotten": 1, "calls": 5}
    assert " INFO    main: Forgotten at their own request: 1\n" in well.log


# Options


def test_a_dry_run_needs_no_key_and_shows_the_payloads_that_a_run_sends_and_what_it_costs(
    settings: Settings, customers: Customers, folder: Path, standin: StandIn
) -> None:
    own = settings(customers([{}, {}, {}, {"email": None}, {}]), ITERABLE_RATE_LIMIT="2")
    keyless = {name: value for name, value in own.items() if name != "ITERABLE_API_KEY"}
    ended = process.run("--dry-run", settings=keyless, folder=folder)
    assert (ended.exit_code, ended.errors, standin.counters()["connections"]) == (1, "", 0)
    payloads = [ended.users[number]["payloads"] for number in (1, 2, 3, 5)]
    three = [f"{name.replace('_', '/')} {json.dumps(one)}\n" for both in payloads[:3] for name, one in both.items()]
    failure = f"\nProcessing record 4/5\n✗ Failed user: customer 4: {NO_ADDRESS}\n"
    counts = f"Would send: 4\nCannot be sent: 1\n  1 user: {CORRECT_IT}\nResults: FILE\nTime: N s, N users a second\n"
    last = "Dry run, nothing was sent. A run would make 8 calls, in 2.0 s or more\n"
    summary = last + SUMMARY.format(5, 0, 0, 0, "").split("✓")[0] + counts
    assert ended.shown == STEPS.format(found=5) + "".join(three) + failure + summary
    lines = [(line["status"], line["users_update"], line["events_track"]) for _, line in sorted(ended.users.items())]
    assert lines == [("total_failure" if record == 4 else "would_send", None, None) for record in range(1, 6)]
    assert (ended.results["run"]["mode"], ended.summary["not_attempted"]) == ("dry-run", 4)
    process.run(settings={**own, "ITERABLE_RATE_LIMIT": "450"}, folder=folder)
    state, (users, events) = standin.state(), zip(*(both.values() for both in payloads), strict=True)
    assert {user["email"]: user["dataFields"] for user in users} == state["users"]
    assert {event.pop("id"): event for event in events} == state["events"]


def test_the_first_users_only_or_nobody_of_too_few(program: Program, customers: Customers, standin: StandIn) -> None:
    database = customers(3)
    ended = program("--at-least", "4", database=database)
    said = "Nothing is sent: 3 users found, fewer than --at-least 4\n"
    assert (ended.exit_code, ended.console.endswith(f"engagement\n{said}"), ended.documents) == (3, True, [])
    ended = program("--limit", "2", "--at-least", "3", database=database)
    assert ended.summary == {"outcome": "completed", "total_users": 2, "success": 2, "calls": 4}
    assert [ended.results["run"]["options"][name] for name in ("limit", "at_least")] == [2, 3]
    assert sorted(standin.state()["users"]) == [address(1), address(2)]


def test_a_large_run_says_once_what_bulk_would_save(program: Program, customers: Customers) -> None:
    database = customers(5001)
    hint = "5001 users take 11 s or more; with --bulk 1 s or more\n"
    dry = program("--dry-run", database=database)
    assert (dry.console.count(hint), dry.console.count("\nWould send: 5001\nCannot be sent: 0\nResults: ")) == (1, 1)
    for option in (["--bulk"], ["--limit", "5000"]):
        assert "with --bulk" not in program("--dry-run", *option, database=database).console


# Runs that end before their first user


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"DB_PORT": "0"}, 2, "Settings: DB_PORT must be a whole number from 1 to 65535. Set them in "),
        ({"LOG_FILE": "/"}, 2, "[Errno 21] Is a directory: '/'"),
        ({"RESULTS_DIR": "/dev/null/x"}, 2, "[Errno 20] Not a directory: '/dev/null/x'"),
        ({"REQUESTS_CA_BUNDLE": "/no/ca"}, 2, "The CA file /no/ca (REQUESTS_CA_BUNDLE) cannot be read"),
        ({"DB_PASSWORD": "wrong"}, 3, "The database refused the login: check DB_USER and DB_PASSWORD (1045"),
    ],
)
def test_a_run_that_ends_before_its_first_user_says_why_and_leaves_no_results_file(
    program: Program, customers: Customers, standin: StandIn, change: dict[str, str], code: int, words: str
) -> None:
    ended = program(**{"database": customers(3), **change})
    *steps, last = ended.console.splitlines()
    assert (ended.exit_code, ended.errors, last[: len(words)]) == (code, "", words)
    assert steps == STEPS.format(found=3).splitlines()[: len(steps)]
    assert (list(ended.folder.glob("integration_results_*")), standin.counters()["connections"]) == ([], 0)


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python, as `env -i` starts it: with nothing in the environment."""
    return subprocess.run([sys.executable, *command], env={}, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_without_the_packages_one_line_says_how_to_install_them() -> None:
    done = run("-S", str(process.ROOT / "main.py"), cwd=Path("/"))
    advice = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt, then .venv/bin/python main.py"
    said = rf"The package \w+ is not installed for {sys.executable}: {re.escape(advice)}\n"
    assert (done.returncode, done.stdout, bool(re.fullmatch(said, done.stderr))) == (2, "", True)


def test_cron_may_start_it_with_nothing_in_the_environment_from_another_folder(
    settings: Settings, customers: Customers, standin: StandIn, tmp_path: Path
) -> None:
    """The .env beside main.py is read, and its relative paths start there."""
    copy, elsewhere = tmp_path / "program", tmp_path / "elsewhere"
    for folder in (copy, elsewhere):
        folder.mkdir()
    for name in PROGRAM:
        shutil.copy(process.ROOT / name, copy)
    own = {**settings(customers(2)), "LOG_FILE": "logs/run.log", "RESULTS_DIR": "results"}
    (copy / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in own.items()))
    done = run("-OO", "../program/main.py", cwd=elsewhere)  # it needs no docstrings either
    assert (done.returncode, done.stderr, list(elsewhere.iterdir())) == (0, "", [])
    assert Ended(0, "", "", copy / "results").summary["success"] == 2
    assert f"Successfully processed user: {address(2)}" in (copy / "logs" / "run.log").read_text("utf-8")
    assert sorted(standin.state()["users"]) == [address(1), address(2)]


# Secrets

PASSWORD = 'pass  "word!" \\ü/%41'


def forms(secret: str) -> set[str]:
    """A secret as it is, JSON-escaped, and URL-encoded."""
    in_json = {json.dumps(secret, ensure_ascii=only_ascii)[1:-1] for only_ascii in (True, False)}
    return {secret, *in_json, quote_plus(secret), *(quote(secret, safe=left) for left in ("/", "", "!'()*"))}


def test_no_secret_is_written_anywhere_even_at_debug_when_the_api_echoes_it(
    server: DatabaseServer, program: Program, customers: Customers, standin: StandIn
) -> None:
    echoed = forms(KEY) | forms(PASSWORD)
    secrets = echoed | {" ".join(PASSWORD.split())}
    in_escapes = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    bodies = {
        2: (400, json.dumps({"msg": f"{KEY} {PASSWORD}", "code": KEY, "params": None})),
        3: (400, f'{{"msg":"{in_escapes}","code":"BadParams"}}'),
        4: (502, f"<html>{' '.join(sorted(echoed))}</html>"),
        5: (200, json.dumps({"msg": f"{KEY} {PASSWORD}", "code": "Success"}, ensure_ascii=False)),
    }
    standin.fault("echo_headers", email=address(1))
    for number, (status, body) in bodies.items():
        standin.fault(email=address(number), status=status, body=body)
    name = customers([*[{}] * 4, {"first_name": KEY}])["DB_NAME"]
    database = server.create_reader(user=f"reader_{name}", password=PASSWORD, database=name)
    ended = program(database=database, LOG_LEVEL="DEBUG", ITERABLE_MAX_ATTEMPTS="2")
    assert [ended.users[number]["status"] for number in range(1, 6)] == ["total_failure"] * 4 + ["success"]
    assert " DEBUG   iterable_client: users/update: " in ended.log and "\nusers/update: " not in ended.console
    lines = ended.everything.splitlines()
    assert len([line for line in lines if "Response: " in line and "[secret]" in line]) >= 6
    assert [line for line in lines for secret in secrets if secret in line] == []


# Shape


def imports(name: str) -> set[str]:
    """The top-level names of the modules that a module imports, the standard library left out."""
    text = (process.ROOT / name).read_text("utf-8")
    return {*re.findall(r"(?m)^ *(?:import|from) (\w+)(?: as|\.\w+| import|$)", text)} - sys.stdlib_module_names


def test_main_imports_the_other_three_which_import_nothing_of_ours_and_all_need_three_packages() -> None:
    assert {name: imports(name) for name in PROGRAM if name.endswith(".py")} == {
        "main.py": {"db_connection", "iterable_client", "logger_config", "dotenv"},
        "db_connection.py": {"mysql"},
        "iterable_client.py": {"requests", "urllib3"},  # which requests is made of
        "logger_config.py": set(),
    }
    lines = (process.ROOT / "requirements.txt").read_text("utf-8").split()
    assert {re.split("[=<>~!]", line)[0] for line in lines} == {"mysql-connector-python", "requests", "python-dotenv"}


def test_the_top_of_the_repository_holds_what_the_contract_allows_and_no_more() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=process.ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    visible = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    assert visible == {*PROGRAM, "database_setup.sql", "requirements.txt", "README.md", "tests"}
