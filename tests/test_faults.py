"""Issue 4's fault list for Iterable: what main.py says of each, how it counts it, and how it exits."""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

import harness
from standin_handle import EVENTS_TRACK, USERS_UPDATE, Certificate, StandIn, Trap

Program = Callable[..., harness.Ended]
Started = Callable[..., harness.Running]
Customers = Callable[..., dict[str, str]]

FIRST = "user1@example.com"
CHECK_URL = "check ITERABLE_API_BASE_URL and the network"
BROKE = f"the connection broke before the answer was whole: {CHECK_URL}"
SILENT = "no answer in time: Iterable is slow or out of reach; ITERABLE_TIMEOUT is the time it gets"
TROUBLE = "Iterable is in trouble: run again later, and see https://status.iterable.com"
NOT_ITERABLE = "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
REDIRECT = f"a redirect, which is never followed: {NOT_ITERABLE}"
IDENTITY = "another user of the project has this identity: merge the two in Iterable"
UNTRACKED = "tracking is switched off for this user or event: see the project's settings in Iterable"
KEY_REFUSED = (
    "Iterable refused the API key: check ITERABLE_API_KEY (a server-side key of this project, not disabled), and that "
    "ITERABLE_API_BASE_URL is that of its region: https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
PAGE = "<html><body><h1>Bad\n gateway</h1></body></html>"
PAGE_SHOWN = "<html><body><h1>Bad gateway</h1></body></html>"
TYPES = {
    "validationErrors": {
        "first_name": {"expectedType": "long", "incomingTypes": ["string", "keyword"], "offendingValue": "Ann"}
    }
}
MISMATCH = "field first_name: Iterable expects long, but string or keyword was sent"
MISMATCH_SHOWN = "field first_name: Iterable expects long, but string or keyword, 'Ann', was sent"


def document(code: str, msg: str = "", params: Any = None) -> str:
    """A body of the API's form, written as the log shows it."""
    return json.dumps({"msg": msg, "code": code, "params": params})


def told(ended: harness.Ended) -> dict[str, Any]:
    """The summary in the results file, without its times and without what is zero."""
    times = ("duration_seconds", "users_per_second")
    return {key: value for key, value in ended.results["summary"].items() if value and key not in times}


def by_record(ended: harness.Ended) -> dict[int, dict[str, Any]]:
    return {line["record"]: line for line in ended.results["results"]}


def arrivals(standin: StandIn, endpoint: str, email: str = FIRST) -> list[float]:
    """When the user's calls arrived, in seconds of time.monotonic()."""
    journal = standin.state()["journal"]
    return [call["t"] for call in journal if (call["endpoint"], call["email"]) == (endpoint, email)]


@pytest.fixture(scope="module")
def two(customers: Customers) -> dict[str, str]:
    """A database with two users."""
    return customers(2)


# What is final: the first user's users/update fails, the event and the second user get through.


@dataclass(frozen=True)
class Final:
    """A fault, and what is to be said of the call that met nothing else. `shown` is what follows `Response: `."""

    fault: dict[str, Any]
    reason: str
    status: int | None = None
    code: str | None = None
    message: str | None = None  # as the reason
    shown: str = ""
    attempts: int = 1  # of 2 that there may be
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        if self.status is None:
            return "No answer from users/update"
        kind = {2: "Unusable answer", 3: "Redirect", 4: "4xx Client Error", 5: "5xx Server Error"}[self.status // 100]
        return f"{kind} from users/update: Status {self.status}"


def no_answer(reason: str, action: str, **rule: Any) -> Final:
    return Final({"action": action, **rule}, reason, attempts=2, settings={"ITERABLE_TIMEOUT": "1"})


def answer(
    status: int,
    body: str,
    reason: str,
    code: str | None = None,
    message: str = "",
    shown: str | None = None,
    **more: Any,
) -> Final:
    fault = {"status": status, "body": body}
    return Final(fault, reason, status, code, message, body if shown is None else shown, **more)


FINAL = {
    "reset before the call is processed": no_answer(BROKE, "reset_before"),
    "reset after the call was processed": no_answer(BROKE, "reset_after"),
    "connection closed in mid-answer": no_answer(BROKE, "cut"),
    "not HTTP": no_answer(BROKE, "raw", body="SSH-2.0-OpenSSH_9.2\r\n"),
    "no answer": no_answer(SILENT, "silence"),
    "head drips": no_answer(SILENT, "drip", interval=0.1),
    "body drips": no_answer(SILENT, "drip_body", interval=0.1),
    "408": answer(408, document("Timeout"), TROUBLE, "Timeout", attempts=2),
    "500 for ever": answer(500, document("GenericError", "Oops"), TROUBLE, "GenericError", "Oops", attempts=2),
    "502 with HTML": answer(502, PAGE, TROUBLE, shown=PAGE_SHOWN, attempts=2),
    "503 without a body": answer(503, "", TROUBLE, attempts=2),
    "504": answer(504, document("DatabaseError"), TROUBLE, "DatabaseError", attempts=2),
    "501": answer(501, PAGE, NOT_ITERABLE, shown=PAGE_SHOWN),
    "200 with HTML": answer(200, PAGE, NOT_ITERABLE, shown=PAGE_SHOWN),
    "200 with broken JSON": answer(200, '{"msg": "", "code": "Succ', NOT_ITERABLE),
    "200 without a body": answer(200, "", NOT_ITERABLE),
    "200 with JSON of another kind": answer(200, "[]", NOT_ITERABLE),
    "200 that is not a success": answer(200, document("BadParams", "No"), "No", "BadParams", "No"),
    "200 that is a refusal": answer(
        200,
        document("Success", "Event is disallowed from tracking"),
        UNTRACKED,
        "Success",
        "Event is disallowed from tracking",
    ),
    "400 with code Success": answer(400, document("Success"), "Iterable does not say why", "Success"),
    "400 for the address": answer(
        400,
        document("InvalidEmailAddressError", "Invalid email: 000"),
        "Iterable refuses the address as invalid: correct it in the customers table",
        "InvalidEmailAddressError",
        "Invalid email: 000",
    ),
    "400 for too many fields": answer(
        400,
        document("UniqueFieldsLimitExceeded"),
        "the project has no room for new fields: delete unused ones in Iterable",
        "UniqueFieldsLimitExceeded",
    ),
    "404 of another server": answer(404, PAGE, NOT_ITERABLE, shown=PAGE_SHOWN),
    "404 of Iterable": answer(404, document("NotFound", "No such thing"), "No such thing", "NotFound", "No such thing"),
    "409 for another identity": answer(409, document("ExternalKeyConflict"), IDENTITY, "ExternalKeyConflict"),
    **{
        f"{status} for a field's type": answer(
            status,
            document("RequestFieldsTypesMismatched", "Wrong", TYPES),
            f"{MISMATCH}: correct the column, or the field's type in Iterable",
            "RequestFieldsTypesMismatched",
            f"Wrong: {MISMATCH_SHOWN}: correct the column, or the field's type in Iterable",
        )
        for status in (400, 500)
    },
}


@pytest.mark.parametrize("case", FINAL.values(), ids=FINAL)
def test_a_call_that_fails_costs_one_user_and_says_why(
    program: Program, two: dict[str, str], standin: StandIn, case: Final
) -> None:
    standin.fault(endpoint=USERS_UPDATE, email=FIRST, **case.fault)
    ended = program(database=two, ITERABLE_MAX_ATTEMPTS="2", **case.settings)
    reason = {"endpoint": USERS_UPDATE, "status": case.status, "code": case.code, "message": case.reason, "count": 1}
    assert (ended.exit_code, ended.errors) == (1, "")
    assert told(ended) == {
        "outcome": "completed",
        "exit_code": 1,
        "total_users": 2,
        "success": 1,
        "partial_failures": 1,
        "calls": 3 + case.attempts,
        **({"retries": case.attempts - 1} if case.attempts > 1 else {}),
        "failure_reasons": [reason],
    }
    assert by_record(ended)[1]["users_update"] == {
        "ok": False,
        "status": case.status,
        "code": case.code,
        "message": case.reason if case.message is None else case.message,
        "attempts": case.attempts,
    }
    block = ended.console.split("Processing record 1/2\n")[1].split("\n\n")[0].splitlines()
    assert block == [
        f"{case.headline} (record 1/2, {FIRST})",
        *([f"Response: {case.shown}"] if case.shown else []),
        f"⚠ Partially processed user: {FIRST}: users/update: {case.reason}",
    ]
    assert len(arrivals(standin, USERS_UPDATE)) == case.attempts


def test_a_400_that_echoes_the_headers_is_shown_without_the_key(
    program: Program, two: dict[str, str], standin: StandIn
) -> None:
    standin.fault("echo_headers", endpoint=USERS_UPDATE, email=FIRST)
    ended = program(database=two)
    assert (ended.exit_code, told(ended)["partial_failures"]) == (1, 1)
    assert "4xx Client Error from users/update: Status 400 (record 1/2, user1@example.com)\n" in ended.console
    assert re.search(r"\nResponse: .*'api-key': '\[secret\]'", ended.console)
    assert harness.KEY not in ended.everything


# What another try puts right


@dataclass(frozen=True)
class Passing:
    """A fault of a call's first attempt. `wait` is the least time until the second, in seconds."""

    fault: dict[str, Any]
    processed: bool = False  # so that the call has its effect twice
    wait: float = 0.0


PASSING = {
    "reset before the call is processed": Passing({"action": "reset_before"}),
    "reset after the call was processed": Passing({"action": "reset_after"}, processed=True),
    "connection closed in mid-answer": Passing({"action": "cut"}, processed=True),
    "no answer": Passing({"action": "silence"}),
    "408": Passing({"status": 408}),
    "429 without Retry-After": Passing({"status": 429}, wait=0.2),
    "429 with seconds": Passing({"status": 429, "headers": {"Retry-After": "1"}}, wait=1.0),
    "429 with nonsense": Passing({"status": 429, "headers": {"Retry-After": "soon"}}, wait=0.2),
    "429 with a time that is over": Passing({"status": 429, "headers": {"Retry-After": "-5"}}),
    "500": Passing({"status": 500, "body": document("GenericError")}),
    "502": Passing({"status": 502, "body": PAGE}),
    "503 with seconds": Passing({"status": 503, "headers": {"Retry-After": "1"}}, wait=1.0),
    "504": Passing({"status": 504}),
}


@pytest.mark.parametrize("case", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_costs_a_second_try_and_nobody(
    program: Program, two: dict[str, str], standin: StandIn, case: Passing
) -> None:
    standin.fault(endpoint=EVENTS_TRACK, email=FIRST, times=1, **case.fault)
    ended = program(database=two, ITERABLE_MAX_ATTEMPTS="2", ITERABLE_TIMEOUT="2")
    assert (ended.exit_code, ended.errors) == (0, "")
    assert told(ended) == {"outcome": "completed", "total_users": 2, "success": 2, "calls": 5, "retries": 1}
    state = standin.state()
    assert state["accepted"][EVENTS_TRACK] == {"page-view-1": 1 + case.processed, "page-view-2": 1}
    assert sorted(state["events"]) == ["page-view-1", "page-view-2"]
    first, second = arrivals(standin, EVENTS_TRACK)
    assert second - first >= case.wait


def test_a_retry_after_may_be_a_date(program: Program, two: dict[str, str], standin: StandIn) -> None:
    at = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(seconds=3)
    header = {"Retry-After": format_datetime(at, usegmt=True)}
    standin.fault(endpoint=USERS_UPDATE, email=FIRST, times=1, status=429, headers=header)
    assert program(database=two).exit_code == 0
    _, second = arrivals(standin, USERS_UPDATE)
    assert second >= time.monotonic() + (at - datetime.now(timezone.utc)).total_seconds() - 0.05


def test_a_429_uses_up_no_try_and_the_pauses_between_double(
    program: Program, two: dict[str, str], standin: StandIn
) -> None:
    standin.fault(endpoint=USERS_UPDATE, email=FIRST, times=3, status=429)
    ended = program("--limit", "1", database=two, ITERABLE_MAX_ATTEMPTS="1")
    assert told(ended) == {"outcome": "completed", "total_users": 1, "success": 1, "calls": 5, "retries": 3}
    times = arrivals(standin, USERS_UPDATE)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert [pause >= least for pause, least in zip(pauses, (0.24, 0.49, 0.99), strict=True)] == [True] * 3


def test_a_429_for_a_day_is_waited_for_two_minutes_at_most_and_a_signal_cuts_that(
    started: Started, customers: Customers, standin: StandIn
) -> None:
    standin.fault(endpoint=USERS_UPDATE, status=429, headers={"Retry-After": "86400"})
    running = started(database=customers(3), MAX_WORKERS="1")
    standin.wait_for_calls(1)
    wait_until(lambda: "429: pause of 120.0 s" in (running.folder / "run.log").read_text("utf-8"))
    before = time.monotonic()
    running.signal(signal.SIGTERM)
    ended = running.wait()
    assert time.monotonic() - before < 5
    assert ended.exit_code == 143
    assert told(ended) == {
        "outcome": "interrupted",
        "exit_code": 143,
        "total_users": 3,
        "partial_failures": 1,
        "not_attempted": 2,
        "calls": 2,
        "failure_reasons": [
            {
                "endpoint": USERS_UPDATE,
                "status": 429,
                "code": None,
                "message": "the project's rate limit was used up for too long: lower ITERABLE_RATE_LIMIT, or run when"
                " less else writes",
                "count": 1,
            }
        ],
    }


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# What ends the run


@pytest.mark.parametrize(
    ("status", "code"), [(401, "BadApiKey"), (401, "InvalidJwtPayload"), (401, "Success"), (403, "Forbidden")]
)
def test_a_refused_key_ends_the_run_at_once_and_says_what_to_check(
    program: Program, customers: Customers, standin: StandIn, status: int, code: str
) -> None:
    standin.fault(status=status, body=document(code, "Invalid API key"))
    ended = program(database=customers(30), MAX_WORKERS="1")
    assert (ended.exit_code, ended.errors) == (4, "")
    assert f"\nThe run is given up: {KEY_REFUSED}\n\nINTEGRATION SUMMARY\n" in ended.console
    assert "\nNot attempted: 29\n" in ended.console
    reason = {"endpoint": USERS_UPDATE, "status": status, "code": code, "message": KEY_REFUSED, "count": 1}
    assert told(ended) == {
        "outcome": "aborted",
        "exit_code": 4,
        "total_users": 30,
        "total_failures": 1,
        "not_attempted": 29,
        "calls": 1,
        "failure_reasons": [reason],
    }
    assert by_record(ended)[1]["events_track"] is None
    assert standin.counters()["calls"] == {USERS_UPDATE: 1}


def test_after_a_refused_key_only_the_calls_on_the_wire_end(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    """The key is refused from the 10th users/update on, after 0.1 s in which others start."""
    standin.configure(latency=0.1)
    standin.fault(endpoint=USERS_UPDATE, skip=9, status=401, body=document("BadApiKey"))
    ended = program(database=customers(1000))
    assert ended.exit_code == 4
    summary, lines = told(ended), by_record(ended).values()
    assert summary["calls"] == len(standin.state()["journal"]) < 500
    counted = {
        "success": summary.get("success", 0),
        "partial_failure": summary.get("partial_failures", 0),
        "total_failure": summary["total_failures"],
        "not_attempted": summary["not_attempted"],
    }
    assert counted == {status: sum(line["status"] == status for line in lines) for status in counted}
    assert sum(counted.values()) == 1000


def test_a_forgotten_user_is_no_failure_and_gets_no_event(
    program: Program, two: dict[str, str], standin: StandIn
) -> None:
    body = document("ForgottenUserError", "User has been forgotten")
    standin.fault(endpoint=USERS_UPDATE, email=FIRST, status=409, body=body)
    ended = program(database=two)
    assert ended.exit_code == 0
    assert told(ended) == {"outcome": "completed", "total_users": 2, "success": 1, "forgotten": 1, "calls": 3}
    assert (by_record(ended)[1]["status"], by_record(ended)[1]["events_track"]) == ("forgotten", None)


UNUSABLE = {
    "500": ({"status": 500, "body": document("GenericError")}, TROUBLE),
    "HTML of another server": ({"status": 200, "body": PAGE}, NOT_ITERABLE),
    "404 of another server": ({"status": 404, "body": PAGE}, NOT_ITERABLE),
    "redirect": ({"status": 302, "headers": {"Location": "/login"}}, REDIRECT),
    "reset": ({"action": "reset_before"}, BROKE),
}


@pytest.mark.parametrize(("fault", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_twenty_users_in_a_row_without_a_usable_answer_end_the_run(
    program: Program, customers: Customers, standin: StandIn, fault: dict[str, Any], reason: str
) -> None:
    standin.fault(**fault)
    ended = program(database=customers(100), MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")
    assert (ended.exit_code, ended.errors) == (4, "")
    last = f"\nThe run is given up: 20 users in a row got no usable answer: {reason}\n\nINTEGRATION SUMMARY\n"
    assert last in ended.console
    summary, sent = told(ended), standin.counters()["calls"]
    assert {item["message"] for item in summary.pop("failure_reasons")} == {reason}
    failures = sent[USERS_UPDATE]
    assert 20 <= failures < 60  # some may be on their way when the 20th is known
    assert summary == {
        "outcome": "aborted",
        "exit_code": 4,
        "total_users": 100,
        "total_failures": failures,
        "not_attempted": 100 - failures,
        "calls": failures + sent[EVENTS_TRACK],
    }


def test_nineteen_users_without_a_usable_answer_do_not_end_the_run(
    program: Program, customers: Customers, standin: StandIn
) -> None:
    for endpoint in (USERS_UPDATE, EVENTS_TRACK):
        standin.fault(endpoint=endpoint, times=19, status=500)
    ended = program(database=customers(21), MAX_WORKERS="1", ITERABLE_MAX_ATTEMPTS="1")
    assert ended.exit_code == 1
    assert (told(ended)["total_failures"], told(ended)["success"]) == (19, 2)


def test_a_refusal_of_iterables_own_is_a_usable_answer(program: Program, customers: Customers) -> None:
    ended = program(database=customers([{"email": f"user{number}@nowhere"} for number in range(25)]))
    assert (ended.exit_code, told(ended)["outcome"], told(ended)["total_failures"]) == (1, "completed", 25)


@pytest.fixture(scope="module")
def closed_port() -> Iterator[int]:
    """A port of this machine on which nobody listens, and that nobody else is given."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_dead_host_takes_no_longer_than_the_retries_of_a_few_users(
    program: Program, customers: Customers, closed_port: int
) -> None:
    """With as many users at once as by default."""
    ended = program(database=customers(1000), url=f"http://127.0.0.1:{closed_port}", ITERABLE_MAX_ATTEMPTS="3")
    why = f"20 users in a row got no usable answer: no connection (Connection refused): {CHECK_URL}"
    assert f"\nThe run is given up: {why}\n" in ended.console
    summary = told(ended)
    assert (ended.exit_code, summary["outcome"]) == (4, "aborted")
    assert 20 <= summary["total_failures"] <= 300
    assert summary["total_failures"] + summary["not_attempted"] == 1000
    assert ended.results["summary"]["duration_seconds"] < 10  # the waits of three attempts of both calls: 3 s at most


# Wrong hosts


def fails_both(ended: harness.Ended, reason: str, *, attempts: int) -> None:
    """Both users fail for one reason, without an answer and without the run being given up."""
    reasons = {"status": None, "code": None, "message": reason, "count": 2}
    assert (ended.exit_code, ended.errors) == (1, "")
    assert told(ended) == {
        "outcome": "completed",
        "exit_code": 1,
        "total_users": 2,
        "total_failures": 2,
        "calls": 4 * attempts,
        **({"retries": 4 * (attempts - 1)} if attempts > 1 else {}),
        "failure_reasons": [{"endpoint": endpoint, **reasons} for endpoint in (USERS_UPDATE, EVENTS_TRACK)],
    }
    assert f"✗ Failed user: {FIRST}: users/update: {reason}; events/track: {reason}\n" in ended.console


def test_a_refused_connection_is_tried_again_and_named(program: Program, two: dict[str, str], closed_port: int) -> None:
    ended = program(database=two, url=f"http://127.0.0.1:{closed_port}", ITERABLE_MAX_ATTEMPTS="2")
    fails_both(ended, f"no connection (Connection refused): {CHECK_URL}", attempts=2)


def test_an_unknown_host_name_is_named_as_such(program: Program, two: dict[str, str]) -> None:
    quick = {"RES_OPTIONS": "timeout:1 attempts:1"}  # should a resolver be out of reach
    ended = program(database=two, url="https://iterable.invalid", ITERABLE_MAX_ATTEMPTS="1", **quick)
    fails_both(ended, f"the host name is unknown (DNS): {CHECK_URL}", attempts=1)


def test_a_proxy_that_does_not_work_is_named_without_its_password(
    program: Program, two: dict[str, str], closed_port: int
) -> None:
    proxy = f"http://me:proxy-secret@127.0.0.1:{closed_port}"
    ended = program(database=two, url="https://iterable.invalid", HTTPS_PROXY=proxy, ITERABLE_MAX_ATTEMPTS="1")
    assert (ended.exit_code, told(ended)["total_failures"]) == (1, 2)
    assert f"✗ Failed user: {FIRST}: users/update: the proxy does not work: check HTTPS_PROXY (" in ended.console
    assert "proxy-secret" not in ended.everything


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(program: Program, two: dict[str, str], standin: StandIn, status: int) -> None:
    """The other host receives no connection, and so not a byte of the key."""
    with Trap() as trap:
        standin.fault(status=status, headers={"Location": f"{trap.url}/api/users/update"})
        ended = program(database=two)
        assert (trap.connections, trap.received) == (0, b"")
    assert (ended.exit_code, told(ended)["calls"]) == (1, 4)
    assert told(ended)["failure_reasons"] == [
        {"endpoint": endpoint, "status": status, "code": None, "message": REDIRECT, "count": 2}
        for endpoint in (USERS_UPDATE, EVENTS_TRACK)
    ]
    assert f"\nRedirect from users/update: Status {status} (record 1/2, {FIRST})\n" in ended.console


# TLS

NOT_TRUSTED: dict[Certificate, str] = {
    "expired": "certificate has expired",
    "self-signed": "self-signed certificate",
    "wrong-name": "Hostname mismatch, certificate is not valid for 'localhost'.",
}


@pytest.mark.parametrize(("certificate", "complaint"), NOT_TRUSTED.items(), ids=NOT_TRUSTED)
def test_a_certificate_that_is_not_good_gets_no_call(
    program: Program, two: dict[str, str], certificate: Certificate, complaint: str
) -> None:
    with StandIn(key=harness.KEY, tls=certificate) as standin:
        ended = program(database=two, url=standin.url, REQUESTS_CA_BUNDLE=str(standin.ca_file))
        assert standin.counters()["calls"] == {}
    advice = f"{CHECK_URL}; a company's own authority goes into REQUESTS_CA_BUNDLE"
    fails_both(ended, f"the server's certificate is not trusted ({complaint}): {advice}", attempts=1)


def test_an_authority_of_ones_own_is_trusted_when_it_is_named(program: Program, two: dict[str, str]) -> None:
    with StandIn(key=harness.KEY, tls="good") as standin:
        ended = program(database=two, url=standin.url, REQUESTS_CA_BUNDLE=str(standin.ca_file))
        assert (ended.exit_code, len(standin.state()["users"])) == (0, 2)
        ended = program(database=two, url=standin.url)
        assert (ended.exit_code, "certificate is not trusted" in ended.console) == (1, True)


def test_a_ca_file_that_is_not_there_is_a_settings_error(program: Program, two: dict[str, str], folder: Path) -> None:
    ended = program(database=two, REQUESTS_CA_BUNDLE=str(folder / "none.pem"))
    assert ended.exit_code == 2
    assert f"\nThe CA file {folder}/none.pem (REQUESTS_CA_BUNDLE) cannot be read: " in ended.console


class Plain(socketserver.BaseRequestHandler):
    """A web server without TLS, as it answers a client that begins with it."""

    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def test_a_server_that_speaks_no_tls_is_named_as_such(program: Program, two: dict[str, str]) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        ended = program(database=two, url=f"https://127.0.0.1:{server.server_address[1]}", ITERABLE_MAX_ATTEMPTS="1")
        server.shutdown()
    complaint = re.escape(CHECK_URL)  # behind OpenSSL's word for it, which is another in each version
    [reason] = {item["message"] for item in told(ended)["failure_reasons"]}
    assert re.fullmatch(rf"no encrypted connection \([A-Z_]+\): {complaint}", reason)
    fails_both(ended, reason, attempts=1)
