"""main.py as a process: from the rows of a real server to console, log, results file and the stand-in for Iterable."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

import pytest

from lab import answers, process
from lab.answers import Answer
from lab.database import DatabaseServer, find_servers
from lab.process import KEY, Customers, Ended, Program, Settings, Started
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

KINDS = sorted(find_servers()) or ["mariadb or mysql"]
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
FIRST = "user1@example.com"
BY_ID = {answer.id: answer for answer in (*answers.ANSWERED, *answers.ON_THE_WAY)}


def calls(standin: StandIn) -> list[tuple[str, str | None]]:
    """Endpoint and address of each call that arrived, in order."""
    return [(call["endpoint"], call["email"]) for call in standin.state()["journal"]]


def statuses(ended: Ended) -> dict[int, str]:
    return {record: line["status"] for record, line in sorted(ended.users.items())}


def refuse(standin: StandIn, endpoint: str, number: int, msg: str = "No, user") -> None:
    body = json.dumps({"msg": msg, "code": "BadParams", "params": None}, separators=(",", ":"))
    standin.fault(endpoint=endpoint, email=f"user{number}@example.com", status=400, body=body)


# The sample, on each kind of server


class Sample(NamedTuple):
    ended: Ended
    state: dict[str, Any]  # the stand-in's
    url: str
    server: DatabaseServer


@pytest.fixture(scope="module", params=KINDS)
def sample(
    request: pytest.FixtureRequest, servers: dict[str, DatabaseServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sample]:
    """A run on the sample."""
    server, folder = servers[request.param], tmp_path_factory.mktemp("sample")
    with StandIn(key=KEY) as standin:
        ended = process.run(settings=process.settings_for(server.create_reader(), standin.url, folder), folder=folder)
        yield Sample(ended, standin.state(), standin.url, server)


THE_THREE = [  # user, view, page, browser, location, days before the day of loading, time
    (2, "Sarah", "sarah.johnson@email.com", 37, "pricing", "desktop", "San Francisco, US", 1, "14:30:45"),
    (7, "Olivia", "olivia.brown@email.com", 34, "settings", "tablet", "Toronto, CA", 2, "16:48:12"),
    (12, "Mia", "mia.harris@email.com", 32, "settings", "mobile", "Sydney, AU", 2, "09:20:31"),
]


def test_the_sample_gives_the_console_of_the_contract_line_for_line(sample: Sample) -> None:
    users = "".join(
        f"\nProcessing record {record}/3\n✓ Successfully processed user: {row[2]}\n"
        for record, row in enumerate(THE_THREE, 1)
    )
    shown = STEPS.format(found=3) + users + SUMMARY.format(3, 3, 0, 0, "")
    assert (sample.ended.exit_code, sample.ended.shown, sample.ended.errors) == (0, shown, "")


def test_the_sample_gives_iterable_three_users_and_their_latest_views(sample: Sample) -> None:
    [(yesterday,)] = sample.server.query("SELECT DATE(event_time) FROM page_views WHERE id = 37")
    users, events = {}, {}
    for _, first_name, email, view, page, browser, location, days, time in THE_THREE:
        timestamp = f"{yesterday - timedelta(days=days - 1)} {time}"
        users[email] = {"first_name": first_name, "plan_type": "pro", "recent_page_view": True, "candidate": "yes"}
        fields = {"page": page, "browser": browser, "location": location, "timestamp": timestamp, "candidate": "yes"}
        at = int(datetime.fromisoformat(f"{timestamp}+00:00").timestamp())
        events[f"page-view-{view}"] = {"email": email, "eventName": "page_view", "createdAt": at, "dataFields": fields}
    state = sample.state
    assert (state["users"], state["events"], state["violations"]) == (users, events, [])
    headers = {name: state["last_headers"][name] for name in ("api-key", "content-type", "user-agent")}
    assert headers.pop("user-agent").startswith("iterable-integration/")
    assert headers == {"api-key": KEY, "content-type": "application/json"}
    for email in users:  # the update comes before the event
        endpoints = [call["endpoint"] for call in state["journal"] if call["email"] == email]
        assert endpoints == [USERS_UPDATE, EVENTS_TRACK]


def test_the_sample_gives_a_results_document_of_exactly_the_contracts_keys(sample: Sample) -> None:
    document = sample.ended.results
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", document["run"].pop("started_at"))
    prints = [line.pop("fingerprint") for line in document["results"]]
    assert (len(set(prints)), {len(value) for value in prints}) == (3, {64})
    seconds, speed = (document["summary"].pop(key) for key in ("duration_seconds", "users_per_second"))
    assert speed == pytest.approx(3 / seconds, abs=0.051)
    document["results"].sort(key=lambda line: line["record"])
    call = {"ok": True, "status": 200, "code": "Success", "message": "", "attempts": 1}
    update = {"endpoint": USERS_UPDATE, **call}
    lines = []
    for record, (user_id, _, email, view, *_) in enumerate(THE_THREE, 1):
        track = {"endpoint": EVENTS_TRACK, **call, "message": f"Event with id: page-view-{view} tracked."}
        line = {"record": record, "user_id": user_id, "email": email, "event_id": f"page-view-{view}"}
        lines.append({**line, "status": "success", "users_update": update, "events_track": track})
    zeros = ("partial_failures", "total_failures", "forgotten", "unchanged", "not_attempted", "retries")
    counts = {"total_users": 3, "success": 3, "calls": 6, **dict.fromkeys(zeros, 0)}
    assert document == {
        "run": {
            "number": 1,
            "mode": "send",
            "database": f"iterable_challenge on 127.0.0.1:{sample.server.port}",
            "iterable": sample.url,
            "options": {"limit": None, "at_least": None, "changed_only": False, "bulk": False},
        },
        "results": lines,
        "summary": {"outcome": "completed", "exit_code": 0, **counts, "failure_reasons": []},
    }


def test_the_results_file_has_one_line_a_user_and_is_private_like_the_log(sample: Sample) -> None:
    [path] = sample.ended.folder.glob("integration_results_*")
    assert re.fullmatch(r"integration_results_\d{8}_\d{6}\.json", path.name)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, sample.ended.folder / "run.log")] == [0o600] * 2
    lines = path.read_text("utf-8").splitlines()
    assert sorted(json.loads(line.rstrip(","))["user_id"] for line in lines[3:6]) == [2, 7, 12]
    frame = [lines[0], lines[1][:7], lines[2], lines[6], lines[7][:11], *lines[8:]]
    assert frame == ["{", '"run": ', '"results": [', "],", '"summary": ', "}"]


def test_the_log_says_what_the_console_says_and_the_calls_with_record_and_address(sample: Sample) -> None:
    form = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} INFO    main: (.*)")
    texts = [found[1] if (found := form.fullmatch(line)) else line for line in sample.ended.log.splitlines()]
    own = [text for text in texts if "call successful" in text]
    assert own == [
        f"{endpoint} call successful: Success (record {record}/3, {row[2]})"
        for record, row in enumerate(THE_THREE, 1)
        for endpoint in (USERS_UPDATE, EVENTS_TRACK)
    ]
    assert [text for text in texts if text not in own] == [line for line in sample.ended.console.splitlines() if line]


# Answers


def told_of(answer: Answer, email: str) -> str:
    """The console's line of a user whose users/update was answered so, and nothing else went wrong."""
    if answer.result.ok:
        return f"✓ Successfully processed user: {email}"
    if answer.result.forgotten:
        return f"Forgotten at the user's own request, so not told: {email}"
    short = f"{USERS_UPDATE} {answer.result.status or 'no answer'} {answer.result.code or ''}".strip()
    return f"⚠ Partially processed user: {email}: {short}"


def headline_of(answer: Answer) -> str:
    """The log's line of the call, without record and address."""
    if answer.result.ok:
        return "users/update call successful: Success"
    if answer.result.status is None:
        return "No answer from users/update"
    kinds = {2: "Unusable answer", 3: "Redirect", 4: "4xx Client Error", 5: "5xx Server Error"}
    return f"{kinds[answer.result.status // 100]} from users/update: Status {answer.result.status}"


def test_each_answer_is_told_on_the_console_in_the_log_in_the_results_and_in_the_reasons(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    """One run, in which each user meets another answer to users/update, at each of two tries."""
    table = [each for each in BY_ID.values() if each.result.status not in (401, 403, 429)]  # these stop the others
    for number, each in enumerate(table, 1):
        standin.fault(endpoint=USERS_UPDATE, email=f"user{number}@example.com", **each.fault)
    ended = program(database=customers(len(table)), ITERABLE_MAX_ATTEMPTS="2", ITERABLE_TIMEOUT="1")
    assert (ended.exit_code, ended.errors) == (1, "")
    for number, each in enumerate(table, 1):
        result, line, email = each.after(2), ended.users[number], f"user{number}@example.com"
        status = "success" if result.ok else "forgotten" if result.forgotten else "partial_failure"
        assert (line["status"], line["users_update"]) == (status, result.as_json), each.id
        assert (line["events_track"] is None) is result.forgotten, each.id
        place = f"record {number}/{len(table)}"
        _, block = ended.console.split(f"\nProcessing {place}\n")
        assert block.split("\n")[0] == told_of(each, email), each.id
        in_log = [text.split(": ", 1)[1] for text in ended.log.split(f"Processing {place}\n")[1].splitlines()[:2]]
        response = [f"Response: {result.body}"] if not result.ok and result.status else []
        assert in_log[: 1 + len(response)] == [f"{headline_of(each)} ({place}, {email})", *response], each.id
    failed = [each.after(2) for each in table if not (each.result.ok or each.result.forgotten)]
    reasons = Counter((each.status, each.code, each.reason) for each in failed)
    told = {(e["status"], e["code"], e["message"]): e["count"] for e in ended.summary["failure_reasons"]}
    assert told == reasons
    assert [e["count"] for e in ended.summary["failure_reasons"]] == sorted(reasons.values(), reverse=True)
    shown = [line for line in ended.console.splitlines() if line.startswith("  ")]
    assert (len(shown), shown[-1]) == (11, f"  {len(reasons) - 10} more reasons stand in the results file")


def test_faults_that_pass_cost_tries_and_nobody(program: Program, customers: Customers, standin: StandIn) -> None:
    for number, each in enumerate(answers.PASSING, 1):
        for fault in each.faults:
            standin.fault(endpoint=EVENTS_TRACK, email=f"user{number}@example.com", times=1, **fault)
    users = len(answers.PASSING)
    ended = program(database=customers(users))
    retries = sum(each.attempts - 1 for each in answers.PASSING)
    success = {"outcome": "completed", "total_users": users, "success": users}
    assert (ended.exit_code, ended.summary) == (0, {**success, "calls": 2 * users + retries, "retries": retries})
    assert [line["events_track"]["attempts"] for _, line in sorted(ended.users.items())] == [
        each.attempts for each in answers.PASSING
    ]
    assert sorted(standin.state()["events"]) == [f"page-view-{number}" for number in range(1, users + 1)]


@pytest.mark.parametrize("name", ["401 BadApiKey", "403 Forbidden"])
def test_a_refused_key_ends_the_run_at_once_and_its_words_stand_once(
    program: Program, customers: Customers, standin: StandIn, name: str
) -> None:
    standin.fault(**BY_ID[name].fault)
    ended = program(database=customers(30), MAX_WORKERS="1")
    assert (ended.exit_code, ended.errors) == (4, "")
    assert ended.console.count(answers.KEY_REFUSED) == 1
    status, code = name.split()
    assert f"\n✗ Failed user: {FIRST}: users/update {status} {code}\n" in ended.console
    assert "\n✗ Total failures (both calls failed): 1\nNot attempted: 29\n" in ended.console
    reason = {"status": int(status), "code": code, "message": answers.KEY_REFUSED, "count": 1}
    counts = {"total_users": 30, "total_failures": 1, "not_attempted": 29, "calls": 1}
    reasons = [{"endpoint": USERS_UPDATE, **reason}]
    assert ended.summary == {"outcome": "aborted", "exit_code": 4, **counts, "failure_reasons": reasons}
    assert (ended.users[1]["events_track"], ended.users[2]["users_update"]) == (None, None)
    assert calls(standin) == [(USERS_UPDATE, FIRST)]


@pytest.mark.parametrize("name", ["500 without a body", "200 with a page", "302", "reset before the call is processed"])
def test_twenty_users_in_a_row_without_a_usable_answer_end_the_run(
    program: Program, customers: Customers, standin: StandIn, name: str
) -> None:
    answer = BY_ID[name]
    standin.fault(**answer.fault)
    ended = program(database=customers(100), MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")
    assert (ended.exit_code, ended.errors) == (4, "")
    assert "\nThe run ended early: 20 users in a row got no usable answer\n\nINTEGRATION SUMMARY\n" in ended.console
    [reason] = ended.summary["failure_reasons"]  # it is the same for both calls, so the user counts once
    failures = reason["count"]
    assert 20 <= failures <= 22  # the next may be on its way when the 20th is known
    words = f"{USERS_UPDATE} {answer.result.status or 'no answer'}: {answer.result.reason}"
    assert f"\n  {failures} users: {words}\n" in ended.console
    counts = {"total_users": 100, "total_failures": failures, "not_attempted": 100 - failures}
    counts |= {"calls": len(calls(standin))}
    assert ended.summary == {"outcome": "aborted", "exit_code": 4, **counts, "failure_reasons": [reason]}


def test_nineteen_without_a_usable_answer_or_any_number_of_refusals_do_not(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    for endpoint in (USERS_UPDATE, EVENTS_TRACK):
        standin.fault(endpoint=endpoint, times=19, status=500)
    rows = [{}] * 20 + [{"email": f"user{number}@nowhere"} for number in range(25)]
    ended = program(database=customers(rows), MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")
    assert (ended.exit_code, ended.summary["total_failures"], ended.summary["success"]) == (1, 44, 1)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine on which nobody listens, and that nobody else is given."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_dead_host_takes_no_longer_than_the_retries_of_the_users_in_flight(
    program: Program, customers: Customers, closed_port: int
) -> None:
    dead = f"http://127.0.0.1:{closed_port}"
    ended = program(database=customers(1000), url=dead, ITERABLE_MAX_ATTEMPTS="2")
    assert (ended.exit_code, ended.summary["outcome"]) == (4, "aborted")
    assert 20 <= ended.summary["total_failures"] < 500
    assert ended.summary["total_failures"] + ended.summary["not_attempted"] == 1000
    assert f"users/update no answer: no connection (Connection refused): {answers.CHECK_URL}\n" in ended.console


# Rows


def test_a_row_that_cannot_be_sent_costs_no_call_and_names_the_customer(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    emails = [None, "", " \t ", "no at sign", " Ann@Example.COM\n"]
    ended = program(database=customers([{"email": email} for email in emails]))
    names = re.findall(rf"✗ Failed user: (.*): {NO_ADDRESS}\n", ended.console)
    assert names == ["customer 1", "customer 2", "customer 3", "no at sign"]
    line = {"status": "total_failure", "event_id": None, "users_update": None, "events_track": None}
    line |= {"problem": CORRECT_IT, "fingerprint": None}
    assert [ended.users[number] for number in (1, 2, 3, 4)] == [
        {"record": number, "user_id": number, "email": email, **line} for number, email in enumerate(emails[:4], 1)
    ]
    reason = {"endpoint": None, "status": None, "code": None, "message": CORRECT_IT, "count": 4}
    counts = {"total_users": 5, "success": 1, "total_failures": 4, "calls": 2}
    assert ended.summary == {"outcome": "completed", "exit_code": 1, **counts, "failure_reasons": [reason]}
    assert ended.shown.endswith(SUMMARY.format(5, 1, 0, 4, f"  4 users: {CORRECT_IT}\n"))
    # The address that is usable is stripped and in lower case.
    assert calls(standin) == [(USERS_UPDATE, "ann@example.com"), (EVENTS_TRACK, "ann@example.com")]


def test_of_two_customers_with_one_address_or_view_the_first_is_sent(
    server: DatabaseServer, program: Program, customers: Customers, standin: StandIn
) -> None:
    database = customers([{}, {"email": f" {FIRST.upper()}"}, {}, {}])
    server.query("ALTER TABLE page_views MODIFY id BIGINT NOT NULL, DROP PRIMARY KEY", database["DB_NAME"])
    server.query("UPDATE page_views SET id = 3 WHERE user_id = 4", database["DB_NAME"])
    ended = program(database=database)
    problems = {
        2: "customer 1 has the same address: merge the two",
        4: "customer 3 has the same page view: make page_views.id unique",
    }
    assert {record: line["problem"] for record, line in ended.users.items() if "problem" in line} == problems
    assert (ended.exit_code, ended.summary["success"], ended.summary["total_failures"]) == (1, 2, 2)
    assert f"✗ Failed user: {FIRST}: customer 1 has the same address\n" in ended.console
    assert sorted(calls(standin)) == [
        (endpoint, f"user{number}@example.com") for endpoint in (EVENTS_TRACK, USERS_UPDATE) for number in (1, 3)
    ]


def test_a_null_is_left_out_of_the_payload(program: Program, customers: Customers, standin: StandIn) -> None:
    rows = [{"first_name": None, "browser": None, "location": None}]
    assert program(database=customers(rows)).exit_code == 0
    state = standin.state()
    assert state["users"][FIRST] == {"plan_type": "pro", "recent_page_view": True, "candidate": "yes"}
    assert sorted(state["events"]["page-view-1"]["dataFields"]) == ["candidate", "page", "timestamp"]


def test_a_forgotten_user_gets_no_event_and_is_no_failure(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    standin.configure(forgotten=["user2@example.com"])
    ended = program(database=customers(3))
    assert (ended.exit_code, statuses(ended)) == (0, {1: "success", 2: "forgotten", 3: "success"})
    assert ended.summary == {"outcome": "completed", "total_users": 3, "success": 2, "forgotten": 1, "calls": 5}
    assert ended.shown.endswith(SUMMARY.format(3, 2, 0, 0, "Forgotten at their own request: 1\n"))
    assert (EVENTS_TRACK, "user2@example.com") not in calls(standin)


def test_no_rows_is_nothing_to_do(program: Program, customers: Customers, standin: StandIn) -> None:
    ended = program(database=customers(0))
    shown = STEPS.format(found=0) + SUMMARY.format(0, 0, 0, 0, "")
    assert (ended.exit_code, ended.shown, ended.errors) == (0, shown, "")
    assert (ended.results["results"], ended.summary) == ([], {"outcome": "completed"})
    assert standin.counters()["connections"] == 0


# Console and log


def test_the_summary_counts_the_users_under_each_reason_the_most_frequent_first(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    """A user who fails twice for one reason counts once, and one who fails for two reasons under each."""
    for number in (1, 2):
        refuse(standin, "*", number)
    refuse(standin, USERS_UPDATE, 3)
    refuse(standin, EVENTS_TRACK, 3, "No event for user3@example.com")
    refuse(standin, EVENTS_TRACK, 4, "No event for user4@example.com")
    ended = program(database=customers([{}, {}, {}, {}, {"email": None}, {}]))
    assert statuses(ended) == {**dict.fromkeys((1, 2, 3, 5), "total_failure"), 4: "partial_failure", 6: "success"}
    update, track = f"{USERS_UPDATE} 400 BadParams", f"{EVENTS_TRACK} 400 BadParams"
    assert re.findall("^[✗⚠] .* user: (.*)", ended.console, re.MULTILINE) == [
        *(f"user{number}@example.com: {update}, {track}" for number in (1, 2, 3)),
        f"user4@example.com: {track}",
        f"customer 5: {NO_ADDRESS}",
    ]
    reasons = [
        f"  3 users: {update}: No, user\n",
        f"  2 users: {track}: No event for <email>\n",
        f"  1 user: {CORRECT_IT}\n",
    ]
    assert ended.shown.endswith(SUMMARY.format(6, 1, 1, 4, "".join(reasons)))
    texts = [(e["endpoint"], e["message"], e["count"]) for e in ended.summary["failure_reasons"]]
    assert texts == [(USERS_UPDATE, "No, user", 3), (EVENTS_TRACK, "No event for <email>", 2), (None, CORRECT_IT, 1)]


def test_records_are_reported_in_their_order_whatever_order_they_finish_in(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    for number, latency in ((1, 0.6), (3, 0.3)):
        standin.fault(endpoint=USERS_UPDATE, email=f"user{number}@example.com", latency=latency)
    ended = program(database=customers(5))
    assert re.findall(r"^Processing record (\d)/5$", ended.console, re.MULTILINE) == list("12345")
    finished = [line["record"] for line in ended.results["results"]]
    assert (set(finished[:3]), finished[3:]) == ({2, 4, 5}, [3, 1])


def test_many_users_show_progress_and_the_first_20_failures_and_the_log_has_everyone(
    program: Program, customers: Customers
) -> None:
    rows = [{"email": None}] * 22 + [{"email": "bad@nowhere"}] + [{}] * 107
    ended = program(database=customers(rows), ITERABLE_RATE_LIMIT="50")
    progress = re.compile(r"Progress: (\d+)/130 \((\d+) %\), (\d+\.\d) users/s, (\d+) s left, failures: (\d+)\n")
    found = progress.findall(ended.console)
    assert 1 <= len(found) <= ended.results["summary"]["duration_seconds"] / 2
    for done, percent, speed, left, failures in found:
        assert (int(percent), int(failures)) == (100 * int(done) // 130, 23)
        assert int(left) == pytest.approx((130 - int(done)) / float(speed), abs=0.6)
    names = [*(f"customer {number} (record {number}/130): {NO_ADDRESS}" for number in range(1, 23))]
    refused = "400 InvalidEmailAddressError"
    names.append(f"bad@nowhere (record 23/130): {USERS_UPDATE} {refused}, {EVENTS_TRACK} {refused}")
    failures = [f"✗ Failed user: {name}\n" for name in names]
    reasons = f"  22 users: {CORRECT_IT}\n  1 user: {USERS_UPDATE} {refused}: {answers.BAD_ADDRESS}\n"
    assert progress.sub("", ended.shown) == (
        STEPS.format(found=130) + "".join(failures[:20]) + SUMMARY.format(130, 107, 0, 23, reasons)
    )
    assert [line for line in failures if line not in ended.log] == []
    assert len(progress.findall(ended.log)) == len(found)
    successes = [line.split(": ", 1)[1] for line in ended.log.splitlines() if re.search(r"user\d+@example", line)]
    assert successes == [
        f"✓ Successfully processed user: user{number}@example.com (record {number}/130)" for number in range(24, 131)
    ]


def test_a_run_that_stood_still_starts_no_more_calls_in_any_second_than_its_limit(
    started: Started, customers: Customers, standin: StandIn
) -> None:
    standin.fault(endpoint=USERS_UPDATE, status=503, skip=30, times=20)
    run = started(database=customers(150), ITERABLE_RATE_LIMIT="100")
    for count in (40, 80):
        standin.wait_for_calls(count, USERS_UPDATE)
        run.signal(signal.SIGSTOP)
        sleep(0.3)
        run.signal(signal.SIGCONT)
    ended = run.wait()
    assert (ended.exit_code, ended.summary["success"], ended.summary["retries"]) == (0, 150, 20)
    assert standin.counters()["busiest_second"][USERS_UPDATE] <= 102  # two may have been late on their way


def test_a_quiet_run_prints_nothing_at_all_when_all_is_well(program: Program, customers: Customers) -> None:
    ended = program("--quiet", database=customers(3))
    assert (ended.exit_code, ended.console, ended.errors) == (0, "", "")
    assert "✓ Successfully processed user: user3@example.com\n" in ended.log


def test_a_quiet_run_shows_failures_reasons_and_summary_when_not(program: Program, customers: Customers) -> None:
    ended = program("--quiet", database=customers([{}, {"email": None}]))
    failure = f"✗ Failed user: customer 2: {NO_ADDRESS}\n"
    shown = failure + SUMMARY.format(2, 1, 0, 1, f"  1 user: {CORRECT_IT}\n")
    assert (ended.exit_code, ended.shown, ended.errors) == (1, shown, "")


NOT_ASCII = pytest.mark.skipif(not str(process.ROOT).isascii(), reason="Python itself cannot import from there then")


@pytest.mark.parametrize(
    "locale",
    [
        pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, marks=NOT_ASCII),
        {"PYTHONIOENCODING": "ascii"},
    ],
    ids=["C locale", "ASCII pipe"],
)
def test_a_console_without_the_marks_loses_them_and_never_the_run(
    program: Program, customers: Customers, locale: Mapping[str, str]
) -> None:
    ended = program(database=customers([{"email": "jürgen@example.com"}]), **locale)
    user = "\nProcessing record 1/1\nSuccessfully processed user: j\\xfcrgen@example.com\n"
    shown = STEPS.format(found=1) + user + re.sub("[✓⚠✗] ", "", SUMMARY.format(1, 1, 0, 0, ""))
    assert (ended.exit_code, ended.shown, ended.errors) == (0, shown, "")
    assert "✓ Successfully processed user: jürgen@example.com" in ended.log


@pytest.mark.parametrize(
    "console",
    ['"$@" >&- 2>&- <&-', '"$@" > /dev/full', '{ "$@"; echo $? > "$CODE"; } | true; exit "$(cat "$CODE")"'],
    ids=["closed", "full", "broken pipe"],
)
def test_a_console_that_goes_away_does_not_stop_the_run(
    settings: Settings, customers: Customers, folder: Path, standin: StandIn, console: str
) -> None:
    coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    done = subprocess.run(
        ["sh", "-c", console, "sh", sys.executable, str(process.ROOT / "main.py"), "--env-file", "/dev/null"],
        env={**process.BARE, **coverage, **settings(customers(3)), "CODE": str(folder / "exit_code")},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    ended = Ended(done.returncode, "", "", folder)
    assert ended.summary == {"outcome": "completed", "total_users": 3, "success": 3, "calls": 6}
    assert len(standin.state()["users"]) == 3
    assert "✓ Successfully processed user: user3@example.com" in ended.log


# Options


@pytest.mark.parametrize(
    ("option", "cost"), [([], "8 calls, in 2.0 s or more"), (["--bulk"], "2 calls, in 50.0 s or more")]
)
def test_a_dry_run_needs_no_key_sends_nothing_and_shows_what_a_run_would_send_and_cost(
    settings: Settings, customers: Customers, folder: Path, standin: StandIn, option: list[str], cost: str
) -> None:
    own = settings(customers([{}, {}, {}, {"email": None}, {}]), ITERABLE_RATE_LIMIT="2")
    del own["ITERABLE_API_KEY"]
    ended = process.run("--dry-run", *option, settings=own, folder=folder)
    failure = f"\nProcessing record 4/5\n✗ Failed user: customer 4: {NO_ADDRESS}\n"
    payloads = {record: line["payloads"] for record, line in ended.users.items() if record != 4}
    shown = [
        f"{name} {json.dumps(payloads[record][key])}\n"
        for record in (1, 2, 3)
        for name, key in ((USERS_UPDATE, "users_update"), (EVENTS_TRACK, "events_track"))
    ]
    frame = SUMMARY.format(5, 0, 0, 0, f"  1 user: {CORRECT_IT}\n").split("✓")[0]
    counts = f"Would send: 4\nCannot be sent: 1\n  1 user: {CORRECT_IT}\nResults: FILE\nTime: N s, N users a second\n"
    last = f"Dry run, nothing was sent. A run would make {cost}\n"
    assert (ended.exit_code, ended.errors) == (1, "")
    console = re.sub(r"(?<=^\S{12} )\{.*", lambda found: json.dumps(json.loads(found[0])), ended.shown, flags=re.M)
    assert console == STEPS.format(found=5) + "".join(shown) + failure + frame + counts + last
    assert statuses(ended) == {**dict.fromkeys(range(1, 6), "would_send"), 4: "total_failure"}
    assert (ended.users[1]["users_update"], ended.users[1]["events_track"]) == (None, None)
    assert (ended.results["run"]["mode"], ended.summary["not_attempted"]) == ("dry-run", 4)
    assert standin.counters()["connections"] == 0


def test_a_dry_run_rehearses_what_a_run_sends(program: Program, customers: Customers, standin: StandIn) -> None:
    database = customers(3)
    rehearsed, sent = (program(*option, database=database).users for option in (["--dry-run"], []))
    assert {n: line["fingerprint"] for n, line in rehearsed.items()} == {n: e["fingerprint"] for n, e in sent.items()}
    state = standin.state()
    for line in rehearsed.values():
        user, event = line["payloads"]["users_update"], line["payloads"]["events_track"]
        assert state["users"][user["email"]] == user["dataFields"]
        assert {"id": event["id"], **state["events"][event["id"]]} == event


def test_a_limit_sends_the_first_users_only(program: Program, customers: Customers, standin: StandIn) -> None:
    database = customers(5)
    ended = program("--limit", "2", database=database)
    assert f"{STEPS.format(found=5)}\nProcessing record 1/2\n" in ended.console
    assert ended.summary == {"outcome": "completed", "total_users": 2, "success": 2, "calls": 4}
    assert ended.results["run"]["options"]["limit"] == 2
    assert sorted(standin.state()["users"]) == [FIRST, "user2@example.com"]
    assert program("--limit", "9", "--at-least", "5", database=database).summary["success"] == 5


def test_a_large_run_says_once_what_bulk_would_save(program: Program, customers: Customers) -> None:
    database = customers(5001)
    hint = "5001 users take 11 s or more; with --bulk 1 s or more\n"
    assert program("--dry-run", database=database).console.count(hint) == 1
    for option in (["--bulk"], ["--limit", "5000"]):
        assert "with --bulk" not in program("--dry-run", *option, database=database).console


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--limit", "0"], "--limit and --at-least take a whole number from 1"),
        (["--at-least", "1.5"], "argument --at-least: invalid int value: '1.5'"),
        (["--limit"], "argument --limit: expected one argument"),
        (["--dry"], "unrecognized arguments: --dry"),
    ],
)
def test_a_usage_error_says_how_to_call_it(
    settings: Settings, folder: Path, arguments: list[str], complaint: str
) -> None:
    ended = process.run(*arguments, settings=settings({}), folder=folder)
    options = (
        "[-h] [--dry-run] [--limit N] [--at-least N] [--changed-only] [--bulk] [--check] [--quiet] [--env-file PATH]"
    )
    usage, _, said = " ".join(ended.errors.split()).partition(" main.py: error: ")
    assert (ended.exit_code, ended.console, usage, said) == (2, "", f"usage: main.py {options}", complaint)
    assert sorted(path.name for path in folder.iterdir()) == ["empty.env"]


# Runs that end before their first user


@pytest.mark.parametrize(
    ("arguments", "changes", "exit_code", "steps", "words"),
    [
        (["--env-file", "/no.env"], {}, 2, 0, "Settings: /no.env cannot be read (No such file or directory)."),
        ([], {"LOG_FILE": "{folder}"}, 2, 0, "LOG_FILE cannot be written: [Errno 21]"),
        ([], {"RESULTS_DIR": "{folder}/empty.env/x"}, 2, 2, "RESULTS_DIR cannot be written: [Errno 20]"),
        (
            [],
            {"REQUESTS_CA_BUNDLE": "{folder}/no"},
            2,
            6,
            "The CA file {folder}/no (REQUESTS_CA_BUNDLE) cannot be read",
        ),
        (
            [],
            {"ALL_PROXY": "socks5://127.0.0.1:9"},
            2,
            6,
            "HTTPS_PROXY or ALL_PROXY is of no use: it must be like http://",
        ),
        ([], {"DB_PASSWORD": "wrong"}, 3, 3, "The database refused the login: check DB_USER and DB_PASSWORD (1045"),
        (["--at-least", "4"], {}, 3, 5, "Nothing is sent: 3 users found, fewer than the 4 of --at-least\n"),
    ],
)
def test_a_run_that_ends_before_its_first_user_says_why_and_leaves_no_results_file(
    settings: Settings,
    customers: Customers,
    folder: Path,
    standin: StandIn,
    arguments: list[str],
    changes: dict[str, str],
    exit_code: int,
    steps: int,
    words: str,
) -> None:
    own = settings(customers(3)) | {name: value.format(folder=folder) for name, value in changes.items()}
    own |= {"ITERABLE_API_BASE_URL": "https://iterable.invalid"} if "ALL_PROXY" in changes else {}
    ended = process.run(*arguments, settings=own, folder=folder)
    assert (ended.exit_code, ended.errors) == (exit_code, "")
    said = "".join(STEPS.format(found=3).splitlines(keepends=True)[:steps]) + words.format(folder=folder)
    assert ended.console.startswith(said) and len(ended.console.splitlines()) == steps + 1
    assert list(folder.glob("integration_results_*")) == []
    assert standin.counters()["connections"] == 0


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The program in a folder of its own, where nobody has a .env."""
    folder = tmp_path / "program"
    folder.mkdir()
    for name in PROGRAM:
        shutil.copy(process.ROOT / name, folder)
    return folder


def run_copy(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As `env -i`: with nothing in the environment."""
    return subprocess.run([sys.executable, *command], env={}, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("options", [["-S"], ["-I", "-S"]])
def test_without_the_packages_one_line_says_how_to_install_them(copy: Path, options: list[str]) -> None:
    done = run_copy(*options, str(copy / "main.py"), cwd=Path("/"))
    advice = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt, then .venv/bin/python main.py"
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"The package \w+ is not installed for {sys.executable}: {re.escape(advice)}\n", done.stderr)


def test_cron_may_start_it_with_nothing_in_the_environment_from_another_folder(
    settings: Settings, customers: Customers, copy: Path, standin: StandIn, tmp_path: Path
) -> None:
    """The .env beside main.py is read, and its relative paths start there."""
    own = {**settings(customers(2)), "LOG_FILE": "logs/run.log", "RESULTS_DIR": "results"}
    assert own["DB_PASSWORD"] == "reader's secret"  # with a quote and a space: a .env must take them
    (copy / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in own.items()))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run_copy("-OO", "../program/main.py", cwd=elsewhere)  # it needs no docstrings either
    assert (done.returncode, done.stderr) == (0, "")
    [results] = (copy / "results").glob("*.json")
    assert json.loads(results.read_text("utf-8"))["summary"]["success"] == 2
    assert "Successfully processed user: user2@example.com" in (copy / "logs" / "run.log").read_text("utf-8")
    assert list(elsewhere.iterdir()) == []
    assert sorted(standin.state()["users"]) == [FIRST, "user2@example.com"]


# Secrets

PASSWORD = 'pass "word" \\ü/%41'


def forms(secret: str) -> set[str]:
    """A secret as it is, JSON-escaped, and URL-encoded."""
    in_json = {json.dumps(secret, ensure_ascii=only_ascii)[1:-1] for only_ascii in (True, False)}
    return {secret, *in_json, quote(secret), quote(secret, safe=""), quote_plus(secret)}


def test_no_secret_is_written_anywhere_even_at_debug_when_the_api_echoes_it(
    server: DatabaseServer, program: Program, customers: Customers, standin: StandIn
) -> None:
    secrets = forms(KEY) | forms(PASSWORD)
    in_escapes = "".join(f"\\u{ord(character):04x}" for character in KEY)
    bodies = {
        2: (400, json.dumps({"msg": f"{KEY} {PASSWORD}", "code": KEY, "params": None})),
        3: (400, f'{{"msg":"{in_escapes}","code":"BadParams","params":null}}'),
        4: (502, f"<html>{' '.join(sorted(secrets))}</html>"),
        5: (200, json.dumps({"msg": f"{KEY} {PASSWORD}", "code": "Success"}, ensure_ascii=False)),
    }
    standin.fault("echo_headers", email=FIRST)
    for number, (status, body) in bodies.items():
        standin.fault(email=f"user{number}@example.com", status=status, body=body)
    own = customers(5)
    own = server.create_reader(user=own["DB_USER"], password=PASSWORD, database=own["DB_NAME"])
    proxy = {"HTTPS_PROXY": "http://me:proxy%20secret@127.0.0.1:9"}
    ended = program(database=own, LOG_LEVEL="DEBUG", ITERABLE_MAX_ATTEMPTS="2", **proxy)
    assert statuses(ended) == {**dict.fromkeys(range(1, 5), "total_failure"), 5: "success"}
    assert " DEBUG   iterable_client: users/update: " in ended.log and "\nusers/update: " not in ended.console
    lines = ended.everything.splitlines()
    assert len([line for line in lines if "Response: " in line and "[secret]" in line]) >= 6
    assert [line for line in lines for secret in secrets if secret in line] == []


def test_a_proxy_that_does_not_work_is_named_without_its_password(
    program: Program, customers: Customers, closed_port: int
) -> None:
    proxy = f"http://me:proxy%20secret@127.0.0.1:{closed_port}"
    own = {"url": "https://iterable.invalid", "HTTPS_PROXY": proxy, "LOG_LEVEL": "DEBUG"}
    ended = program(database=customers(2), ITERABLE_MAX_ATTEMPTS="1", **own)
    assert (ended.exit_code, ended.summary["total_failures"]) == (1, 2)
    assert "no answer: the proxy does not work: check HTTPS_PROXY and ALL_PROXY (" in ended.console
    assert "secret" not in ended.everything.replace("[secret]", "")


# Shape


def imports(name: str) -> set[str]:
    """The top-level names of the modules that a module imports, the standard library left out."""
    tree = ast.walk(ast.parse((process.ROOT / name).read_text("utf-8")))
    found = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return found - sys.stdlib_module_names


def test_main_imports_the_other_three_and_they_import_nothing_of_ours() -> None:
    assert {name: imports(name) for name in PROGRAM if name.endswith(".py")} == {
        "main.py": {"db_connection", "iterable_client", "logger_config", "dotenv"},
        "db_connection.py": {"mysql"},
        "iterable_client.py": {"requests", "urllib3", "certifi"},  # the latter two are what requests is made of
        "logger_config.py": set(),
    }


def test_the_runtime_packages_are_the_three_of_the_contract() -> None:
    lines = (process.ROOT / "requirements.txt").read_text("utf-8").split()
    assert {re.split("[=<>~!]", line)[0] for line in lines} == {"mysql-connector-python", "requests", "python-dotenv"}


def test_the_top_of_the_repository_holds_what_the_contract_allows_and_no_more() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=process.ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    visible = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    assert visible == {*PROGRAM, "database_setup.sql", "requirements.txt", "README.md", "tests"}
