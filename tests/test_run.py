"""main.py as a process: from a server's rows to console, log, results and Iterable."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from lab import process
from lab.database import DatabaseServer, find_servers
from lab.expected import address, find_delivered, list_calls, user_fields
from lab.process import CreateCustomers, Ended, RunMain, RunSettings
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

KINDS = sorted(find_servers()) or ["mariadb or mysql"]
CORRECT_ADDRESS = "no usable e-mail address: correct it in the customers table"
NOTHING_FAILED = """\
⚠ Partial failures (one call failed): 0
✗ Total failures (both calls failed): 0
"""
END_OF_SUMMARY = """\
Results: FILE
Time: N s, N users a second
"""


# The sample, on each kind of server

SAMPLE_CONSOLE = f"""\
Starting Iterable Integration - Phase 3
[STEP 1] Loading environment variables...
[STEP 2] Connecting to database...
[STEP 3] Executing Phase 2 Query 2...
Found 3 pro user(s) with recent engagement
[STEP 4] Initializing Iterable API client...
[STEP 5] Processing user records...

Processing record 1/3
✓ Successfully processed user: sarah.johnson@email.com

Processing record 2/3
✓ Successfully processed user: olivia.brown@email.com

Processing record 3/3
✓ Successfully processed user: mia.harris@email.com

INTEGRATION SUMMARY
Total users processed: 3
✓ Successful (both API calls): 3
{NOTHING_FAILED}{END_OF_SUMMARY}"""
SAMPLE_CALLS = [
    "users/update call successful: Success (record 1/3, sarah.johnson@email.com)",
    "events/track call successful: Success (record 1/3, sarah.johnson@email.com)",
    "users/update call successful: Success (record 2/3, olivia.brown@email.com)",
    "events/track call successful: Success (record 2/3, olivia.brown@email.com)",
    "users/update call successful: Success (record 3/3, mia.harris@email.com)",
    "events/track call successful: Success (record 3/3, mia.harris@email.com)",
]


@dataclass(frozen=True)
class Sample:
    """A run on the sample, and what it ran against."""

    ended: Ended
    server: DatabaseServer
    standin: StandIn


@pytest.fixture(scope="module", params=KINDS)
def sample(
    request: pytest.FixtureRequest,
    servers: dict[str, DatabaseServer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Sample]:
    server = servers[request.param]
    folder = tmp_path_factory.mktemp("sample")
    with StandIn() as standin:
        settings = process.settings_for(server.create_reader(), standin.url, folder)
        ended = process.run(settings=settings, folder=folder)
        yield Sample(ended, server, standin)


def test_sample_console(sample: Sample) -> None:
    assert sample.ended.exit_code == 0
    assert sample.ended.errors == ""
    assert sample.ended.console_without_times == SAMPLE_CONSOLE


def test_sample_log_has_the_console_and_the_calls(sample: Sample) -> None:
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"
    texts = re.findall(rf"(?m)^{time} INFO    \w+: (.*)$", sample.ended.log)

    shown = [line for line in sample.ended.console.splitlines() if line]
    assert len(texts) == len(sample.ended.log.splitlines())
    assert [text for text in texts if "call successful" in text] == SAMPLE_CALLS
    assert [text for text in texts if text not in SAMPLE_CALLS] == shown


def test_sample_users_in_iterable(sample: Sample) -> None:
    assert sample.standin.state()["users"] == {
        "sarah.johnson@email.com": user_fields(first_name="Sarah"),
        "olivia.brown@email.com": user_fields(first_name="Olivia"),
        "mia.harris@email.com": user_fields(first_name="Mia"),
    }


def test_sample_events_in_iterable(sample: Sample) -> None:
    assert sample.standin.state()["events"] == {
        "page-view-37": expected_event(sample, 37, "sarah.johnson@email.com"),
        "page-view-34": expected_event(sample, 34, "olivia.brown@email.com"),
        "page-view-32": expected_event(sample, 32, "mia.harris@email.com"),
    }


def expected_event(sample: Sample, view_id: int, email: str) -> dict[str, Any]:
    """What Iterable holds of a page view. Its time in the database is UTC."""
    columns = "page, browser, location, event_time"
    sql = f"SELECT {columns} FROM page_views WHERE id = {view_id}"
    [(page, browser, location, viewed_at)] = sample.server.query(sql)
    in_utc = viewed_at.replace(tzinfo=timezone.utc)
    fields = {
        "page": page,
        "browser": browser,
        "location": location,
        "timestamp": str(viewed_at),
        "candidate": "yes",
    }
    return {
        "email": email,
        "eventName": "page_view",
        "createdAt": int(in_utc.timestamp()),
        "dataFields": fields,
    }


def test_sample_calls_are_an_update_then_an_event(sample: Sample) -> None:
    calls = list_calls(sample.standin)

    emails = sorted(sample.standin.state()["users"])
    assert len(calls) == 2 * len(emails)
    for email in emails:
        endpoints = [endpoint for endpoint, user in calls if user == email]
        assert endpoints == [USERS_UPDATE, EVENTS_TRACK]
    assert sample.standin.state()["violations"] == []


def test_sample_files_are_private(sample: Sample) -> None:
    [results] = sample.ended.folder.glob("integration_results_*")

    assert re.fullmatch(r"integration_results_\d{8}_\d{6}\.json", results.name)
    for path in (results, sample.ended.folder / "run.log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_sample_run_in_results(sample: Sample) -> None:
    run = sample.ended.results["run"]

    del run["options"]
    started_at = run.pop("started_at")
    assert datetime.fromisoformat(started_at).tzinfo
    assert run == {
        "number": 1,
        "mode": "send",
        "database": "iterable_challenge on 127.0.0.1",
        "iterable": sample.standin.url,
        "identify_by": "email",
    }


def test_sample_options_in_results(sample: Sample) -> None:
    options = sample.ended.results["run"]["options"]

    assert options.pop("env_file") == str(sample.ended.folder / "empty.env")
    assert options == {
        "dry_run": False,
        "limit": None,
        "at_least": None,
        "changed_only": False,
        "reset_left": False,
        "bulk": False,
        "check": False,
        "quiet": False,
    }


def test_sample_users_in_results(sample: Sample) -> None:
    lines = sample.ended.lines

    fingerprints = {line.pop("fingerprint") for line in lines.values()}
    assert len(fingerprints) == 3
    assert lines == {
        1: expected_line(1, 2, "sarah.johnson@email.com", "page-view-37"),
        2: expected_line(2, 7, "olivia.brown@email.com", "page-view-34"),
        3: expected_line(3, 12, "mia.harris@email.com", "page-view-32"),
    }


def expected_line(
    record: int, user_id: int, email: str, event_id: str
) -> dict[str, Any]:
    """A delivered user's line in the results file, without the fingerprint."""
    tracked = f"Event with id: {event_id} tracked."
    return {
        "record": record,
        "user_id": user_id,
        "email": email,
        "event_id": event_id,
        "status": "success",
        "users_update": expected_call(USERS_UPDATE),
        "events_track": expected_call(EVENTS_TRACK, message=tracked),
    }


def expected_call(endpoint: str, message: str = "") -> dict[str, Any]:
    return {
        "endpoint": endpoint,
        "ok": True,
        "status": 200,
        "code": "Success",
        "message": message,
        "attempts": 1,
    }


def test_sample_summary_in_results(sample: Sample) -> None:
    summary = sample.ended.results["summary"]

    seconds = summary.pop("duration_seconds")
    speed = summary.pop("users_per_second")
    assert speed == pytest.approx(3 / seconds, abs=0.051)
    assert summary == {
        "outcome": "completed",
        "exit_code": 0,
        "total_users": 3,
        "success": 3,
        "partial_failures": 0,
        "total_failures": 0,
        "forgotten": 0,
        "reset": 0,
        "unchanged": 0,
        "not_attempted": 0,
        "calls": 6,
        "retries": 0,
        "failure_reasons": [],
    }


# What Iterable refuses


INVALID_BODY = (
    '{"msg":"Invalid email: x","code":"InvalidEmailAddressError","params":null}'
)
BROKEN = (
    "the connection broke before the answer was whole:"
    " check ITERABLE_API_BASE_URL and the network"
)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An answer to users/update, and what a run makes of it.

    `shown` stands behind the address on the console, `reason` in the summary.
    `headline` and `response` are lines of the log.
    """

    fault: dict[str, Any]
    shown: str
    reason: str
    headline: str
    response: str
    status: int | None = None
    code: str | None = None
    message: str = ""
    attempts: int = 1


INVALID_ADDRESS = Refusal(
    fault={"status": 400, "body": INVALID_BODY},
    shown="users/update 400 InvalidEmailAddressError",
    reason="Iterable refuses the address as invalid: correct it in the customers table",
    headline="4xx Client Error from users/update: Status 400",
    response=INVALID_BODY,
    status=400,
    code="InvalidEmailAddressError",
    message="Invalid email: x",
)
BAD_GATEWAY = Refusal(
    fault={"status": 502, "body": "<html>\n Bad\tGateway</html>"},
    shown="users/update 502",
    reason=(
        "Iterable is in trouble: run again later, and see https://status.iterable.com"
    ),
    headline="5xx Server Error from users/update: Status 502",
    response="<html> Bad Gateway</html>",
    status=502,
    attempts=2,
)
REDIRECT = Refusal(
    fault={"status": 302, "headers": {"Location": "https://example.com/"}},
    shown="users/update 302",
    reason=(
        "a redirect, which is never followed: this is not Iterable's API:"
        " check ITERABLE_API_BASE_URL, and any proxy between"
    ),
    headline="Redirect from users/update: Status 302",
    response="",
    status=302,
)
RESET = Refusal(
    fault={"action": "reset_before"},
    shown="users/update no answer",
    reason=BROKEN,
    headline="No answer from users/update",
    response=BROKEN,
    message=BROKEN,
    attempts=2,
)


@pytest.mark.parametrize("refusal", [INVALID_ADDRESS, BAD_GATEWAY, REDIRECT, RESET])
def test_a_refused_update_is_a_partial_failure(
    create_customers: CreateCustomers,
    run_main: RunMain,
    standin: StandIn,
    refusal: Refusal,
) -> None:
    standin.fault(endpoint=USERS_UPDATE, **refusal.fault)

    ended = run_main(database=create_customers(1), ITERABLE_MAX_ATTEMPTS="2")

    failure = f"⚠ Partially processed user: {address(1)}: {refusal.shown}"
    headline = f"{refusal.headline} (record 1/1, {address(1)})"
    line = ended.lines[1]
    assert ended.exit_code == 1
    assert f"\n{failure}\n" in ended.console
    assert list_reasons(ended) == [f"1 user: {refusal.shown}: {refusal.reason}"]
    assert f" ERROR   main: {headline}\n" in ended.log
    assert f" ERROR   main: Response: {refusal.response}\n" in ended.log
    assert line["status"] == "partial_failure"
    assert line["users_update"] == {
        "endpoint": USERS_UPDATE,
        "ok": False,
        "status": refusal.status,
        "code": refusal.code,
        "message": refusal.message,
        "attempts": refusal.attempts,
    }
    reason = {
        "endpoint": USERS_UPDATE,
        "status": refusal.status,
        "code": refusal.code,
        "message": refusal.reason,
        "count": 1,
    }
    assert ended.summary["failure_reasons"] == [reason]


def test_a_forgotten_user_gets_no_event_and_is_no_failure(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    standin.configure(forgotten=[address(2)])

    ended = run_main(database=create_customers(3))

    assert ended.exit_code == 0
    assert ended.lines[2]["status"] == "forgotten"
    assert ended.lines[2]["events_track"] is None
    assert "\nForgotten at their own request: 1\n" in ended.console
    assert find_delivered(standin) == {address(1), address(3)}
    assert ended.summary == {
        "outcome": "completed",
        "total_users": 3,
        "success": 2,
        "forgotten": 1,
        "calls": 5,
    }


def test_a_user_with_two_failed_calls_counts_under_each_reason(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    refuse_with_message(standin, USERS_UPDATE, user=address(1), message="No user")
    refuse_with_message(standin, EVENTS_TRACK, user=address(1), message="No event")

    ended = run_main(database=create_customers(1))

    assert list_reasons(ended) == [
        "1 user: users/update 400 BadParams: No user",
        "1 user: events/track 400 BadParams: No event",
    ]


def test_two_calls_that_failed_for_one_reason_count_once(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    refuse_with_message(standin, USERS_UPDATE, user=address(1), message="No")
    refuse_with_message(standin, EVENTS_TRACK, user=address(1), message="No")

    ended = run_main(database=create_customers(1))

    assert list_reasons(ended) == ["1 user: users/update 400 BadParams: No"]


def test_reasons_that_differ_in_the_address_alone_are_equal(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    for number in (1, 2):
        message = f"No {address(number)}"
        refuse_with_message(
            standin, EVENTS_TRACK, user=address(number), message=message
        )

    ended = run_main(database=create_customers(2))

    assert list_reasons(ended) == ["2 users: events/track 400 BadParams: No <email>"]


def test_the_console_shows_the_ten_most_frequent_reasons(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    for number in range(1, 14):
        message = f"No {min(number, 12)}"  # the 12th reason has two users
        refuse_with_message(
            standin, EVENTS_TRACK, user=address(number), message=message
        )

    ended = run_main(database=create_customers(13))

    reasons = list_reasons(ended)
    assert len(reasons) == 11
    assert reasons[0] == "2 users: events/track 400 BadParams: No 12"
    assert reasons[10] == "More reasons, in the results file: 2"
    assert len(ended.summary["failure_reasons"]) == 12


def refuse_with_message(
    standin: StandIn, endpoint: str, *, user: str, message: str
) -> None:
    body = json.dumps({"msg": message, "code": "BadParams", "params": None})
    standin.fault(endpoint=endpoint, user=user, status=400, body=body)


def list_reasons(ended: Ended) -> list[str]:
    """The reasons of failure in the summary on the console."""
    _, summary = ended.console.split("\nINTEGRATION SUMMARY\n")
    return re.findall("(?m)^  (.*)$", summary)


# Rows that cannot be sent


def test_a_row_without_an_address_costs_no_call(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    database = create_customers([{"email": " \t "}, {"email": None}, {"email": "no"}])

    ended = run_main(database=database)

    assert ended.exit_code == 1
    assert list_calls(standin) == []
    assert list_failed(ended) == [
        "customer 1: no usable e-mail address",
        "customer 2: no usable e-mail address",
        "no: no usable e-mail address",
    ]
    assert list_reasons(ended) == [f"3 users: {CORRECT_ADDRESS}"]
    assert ended.lines[1] == {
        "record": 1,
        "user_id": 1,
        "email": " \t ",
        "event_id": None,
        "status": "total_failure",
        "users_update": None,
        "events_track": None,
        "fingerprint": None,
        "problem": CORRECT_ADDRESS,
    }


def test_the_second_customer_of_an_address_is_not_sent(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    ended = run_main(database=create_customers([{}, {"email": " USER1@Example.com\n"}]))

    problem = "customer 1 has the same address: merge the two"
    assert ended.exit_code == 1
    assert ended.lines[2]["problem"] == problem
    assert list_failed(ended) == [f"{address(1)}: customer 1 has the same address"]
    assert list_calls(standin) == [
        (USERS_UPDATE, address(1)),
        (EVENTS_TRACK, address(1)),
    ]


def test_the_second_customer_of_a_view_is_not_sent(
    server: DatabaseServer,
    create_customers: CreateCustomers,
    run_main: RunMain,
    standin: StandIn,
) -> None:
    database = create_customers(2)
    name = database["DB_NAME"]
    server.query(
        "ALTER TABLE page_views MODIFY id INT NOT NULL, DROP PRIMARY KEY", name
    )
    server.query("UPDATE page_views SET id = 1", name)

    ended = run_main(database=database)

    problem = "customer 1 has the same page view: make page_views.id unique"
    assert ended.exit_code == 1
    assert ended.lines[2]["problem"] == problem
    assert list_failed(ended) == [f"{address(2)}: customer 1 has the same page view"]
    assert find_delivered(standin) == {address(1)}


def list_failed(ended: Ended) -> list[str]:
    """The users who failed wholly, and why, as the console shows them."""
    return re.findall("(?m)^✗ Failed user: (.*)$", ended.console)


def test_an_address_is_stripped_and_in_lower_case(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    run_main(database=create_customers([{"email": " Ann@Example.COM\n"}]))

    assert list_calls(standin) == [
        (USERS_UPDATE, "ann@example.com"),
        (EVENTS_TRACK, "ann@example.com"),
    ]


def test_a_null_column_is_left_out(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    row = {"first_name": None, "browser": None, "location": None}

    run_main(database=create_customers([row]))

    fields = user_fields()
    del fields["first_name"]
    assert standin.state()["users"] == {address(1): fields}
    event = standin.state()["events"]["page-view-1"]
    assert sorted(event["dataFields"]) == ["candidate", "page", "timestamp"]


def test_no_rows_is_nothing_to_do(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    ended = run_main(database=create_customers(0))

    assert ended.exit_code == 0
    assert "\nFound 0 pro user(s) with recent engagement\n" in ended.console
    assert ended.console_without_times.endswith(
        "\nTotal users processed: 0\n✓ Successful (both API calls): 0\n"
        f"{NOTHING_FAILED}{END_OF_SUMMARY}"
    )
    assert ended.results["results"] == []
    assert ended.summary == {"outcome": "completed"}
    assert list_calls(standin) == []


# The console of a long run


@pytest.fixture(scope="module")
def long_run(
    create_customers: CreateCustomers, tmp_path_factory: pytest.TempPathFactory
) -> Ended:
    """A run of 130 users, of whom 22 failed, at 35 users a second."""
    folder = tmp_path_factory.mktemp("long_run")
    rows: list[dict[str, Any]] = [{} for _ in range(130)]
    for row in rows[1:23]:
        row["email"] = None
    database = create_customers(rows)
    with StandIn() as standin:
        settings = process.settings_for(
            database, standin.url, folder, ITERABLE_RATE_LIMIT="35"
        )
        return process.run(settings=settings, folder=folder)


def test_a_long_run_shows_twenty_failures(long_run: Ended) -> None:
    assert list_failed(long_run) == [
        f"customer {number} (record {number}/130): no usable e-mail address"
        for number in range(2, 22)
    ]


def test_a_long_run_shows_no_successes(long_run: Ended) -> None:
    assert "Successfully processed" not in long_run.console
    assert "Processing record" not in long_run.console


def test_a_long_run_shows_progress(long_run: Ended) -> None:
    progress_form = (
        r"Progress: (\d+)/130 \((\d+) %\), (\d+\.\d) users/s, (\d+) s left,"
        r" failures: 22\n"
    )
    shown = re.findall(progress_form, long_run.console)

    assert 1 <= len(shown) == long_run.console.count("Progress: ")
    assert len(shown) <= long_run.results["summary"]["duration_seconds"] / 2
    for done, percent, speed, left in shown:
        assert int(percent) == 100 * int(done) // 130
        seconds_left = (130 - int(done)) / float(speed)
        assert int(left) == pytest.approx(seconds_left, abs=0.6)


def test_the_log_of_a_long_run_has_everyone(long_run: Ended) -> None:
    logged = re.findall(r"main: ([✓✗] .*) \(record (\d+)/130\)", long_run.log)

    assert [int(record) for _, record in logged] == list(range(1, 131))
    assert logged[129][0] == f"✓ Successfully processed user: {address(130)}"


def test_a_long_run_keeps_its_rate(long_run: Ended) -> None:
    assert long_run.results["summary"]["duration_seconds"] > 107 / 35


# --quiet


def test_a_quiet_run_without_failures_shows_nothing(
    create_customers: CreateCustomers, run_main: RunMain
) -> None:
    ended = run_main("--quiet", database=create_customers(1))

    assert ended.exit_code == 0
    assert ended.console == ""
    assert ended.errors == ""
    assert f"✓ Successfully processed user: {address(1)}\n" in ended.log


def test_a_quiet_run_shows_failures_and_summary(
    create_customers: CreateCustomers, run_main: RunMain
) -> None:
    ended = run_main("--quiet", database=create_customers([{}, {"email": "jürgen"}]))

    assert ended.exit_code == 1
    assert ended.console_without_times == (
        "✗ Failed user: jürgen: no usable e-mail address\n"
        "\n"
        "INTEGRATION SUMMARY\n"
        "Total users processed: 2\n"
        "✓ Successful (both API calls): 1\n"
        "⚠ Partial failures (one call failed): 0\n"
        "✗ Total failures (both calls failed): 1\n"
        f"  1 user: {CORRECT_ADDRESS}\n"
        f"{END_OF_SUMMARY}"
    )


def test_a_console_of_ascii_loses_the_marks_alone(
    create_customers: CreateCustomers, run_main: RunMain
) -> None:
    database = create_customers([{}, {"email": "jürgen"}])

    ended = run_main(database=database, PYTHONIOENCODING="ascii")

    assert ended.exit_code == 1
    assert ended.errors == ""
    assert f"\nSuccessfully processed user: {address(1)}\n" in ended.console
    assert "\nFailed user: j\\xfcrgen: no usable e-mail address\n" in ended.console
    assert " main: ✗ Failed user: jürgen: no usable e-mail address\n" in ended.log


# --dry-run, --limit, --at-least and --bulk


@pytest.fixture
def keyless_dry_run(
    create_customers: CreateCustomers, run_settings: RunSettings, folder: Path
) -> Ended:
    """A dry run without a key for five users, of whom the fourth has no address."""
    database = create_customers([{}, {}, {}, {"email": None}, {}])
    settings = run_settings(database, ITERABLE_RATE_LIMIT="2")
    del settings["ITERABLE_API_KEY"]
    return process.run("--dry-run", settings=settings, folder=folder)


def test_a_dry_run_sends_nothing(keyless_dry_run: Ended, standin: StandIn) -> None:
    assert standin.counters()["connections"] == 0
    assert keyless_dry_run.exit_code == 1
    assert keyless_dry_run.errors == ""
    assert keyless_dry_run.results["run"]["mode"] == "dry-run"
    assert keyless_dry_run.summary["not_attempted"] == 4
    for record in (1, 2, 3, 5):
        assert keyless_dry_run.lines[record]["status"] == "would_send"


def test_a_dry_run_shows_three_payloads_and_the_cost(keyless_dry_run: Ended) -> None:
    shown = []
    for record in (1, 2, 3):
        payloads = keyless_dry_run.lines[record]["payloads"]
        shown.append(f"users/update {json.dumps(payloads['users_update'])}\n")
        shown.append(f"events/track {json.dumps(payloads['events_track'])}\n")
    _, users = keyless_dry_run.console_without_times.split("user records...\n")
    assert users == (
        "".join(shown) + "\n"
        "Processing record 4/5\n"
        "✗ Failed user: customer 4: no usable e-mail address\n"
        "Dry run, nothing was sent. A run would make 8 calls, in 2.0 s or more\n"
        "\n"
        "INTEGRATION SUMMARY\n"
        "Total users processed: 5\n"
        "Would send: 4\n"
        "Cannot be sent: 1\n"
        f"  1 user: {CORRECT_ADDRESS}\n"
        f"{END_OF_SUMMARY}"
    )


def test_a_run_sends_the_payloads_of_the_dry_run(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    database = create_customers(1)

    payloads = run_main("--dry-run", database=database).lines[1]["payloads"]
    run_main(database=database)

    update = payloads["users_update"]
    assert standin.state()["users"] == {update["email"]: update["dataFields"]}
    event = payloads["events_track"]
    assert standin.state()["events"] == {event.pop("id"): event}


def test_limit_sends_the_first_users_only(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    ended = run_main("--limit", "2", "--at-least", "3", database=create_customers(3))

    assert ended.exit_code == 0
    assert find_delivered(standin) == {address(1), address(2)}
    assert ended.summary["total_users"] == 2
    assert ended.results["run"]["options"]["limit"] == 2
    assert ended.results["run"]["options"]["at_least"] == 3


def test_fewer_users_than_at_least_send_nothing(
    create_customers: CreateCustomers, run_main: RunMain, standin: StandIn
) -> None:
    ended = run_main("--at-least", "4", database=create_customers(3))

    assert ended.exit_code == 3
    assert ended.console.endswith(
        "\nNothing is sent: 3 users found, fewer than --at-least 4\n"
    )
    assert ended.documents == []
    assert list_calls(standin) == []


@pytest.fixture(scope="module")
def many(create_customers: CreateCustomers) -> dict[str, str]:
    """A database with the first number of users that makes a run large."""
    return create_customers(5001)


def test_a_large_run_says_once_what_bulk_would_save(
    many: dict[str, str], run_main: RunMain
) -> None:
    ended = run_main("--dry-run", database=many)

    hint = "5001 users take 11 s or more; with --bulk 1 s or more\n"
    assert ended.console.count(hint) == 1
    assert "\nWould send: 5001\nCannot be sent: 0\n" in ended.console


@pytest.mark.parametrize("arguments", [["--bulk"], ["--limit", "5000"]])
def test_other_runs_say_nothing_about_bulk(
    many: dict[str, str], run_main: RunMain, arguments: list[str]
) -> None:
    ended = run_main("--dry-run", *arguments, database=many)

    assert "with --bulk" not in ended.console
