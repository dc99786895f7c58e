"""iterable_client.py: payloads, what an answer means, when a call is tried again, how fast calls start, and stopping.

The rules are run as pure functions and in virtual time, what happens on the wire against real servers.
"""

from __future__ import annotations

import contextlib
import gzip
import heapq
import itertools
import json
import math
import os
import resource
import select
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import astuple, replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import pytest
import trustme
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import iterable_client as iterable
from db_connection import Record
from iterable_client import CallResult, IterableClient, Payload, RateLimiter, RetryPolicy, interpret, interpret_bulk
from lab import answers
from lab.answers import CHECK_URL, GROUP, SUCCESS, TOO_SLOW, Answer, BulkAnswer, Passing, document
from lab.standin_handle import EVENTS_TRACK, EVENTS_TRACK_BULK, KEY, USERS_BULK_UPDATE, USERS_UPDATE, StandIn, Trap
from logger_config import redactor

ENDPOINTS = (USERS_UPDATE, EVENTS_TRACK, USERS_BULK_UPDATE, EVENTS_TRACK_BULK)
LONG = 40.0  # seconds that a test never takes: a wait that was not cut is seen by it
PROMPT = 10.0  # seconds within which a call comes back whose wait was cut, on however busy a machine
UPDATED = CallResult(USERS_UPDATE, True, 200, "Success")
AT = datetime.fromisoformat("2026-01-13 14:30:45")
ROW = Record(2, "Sarah", GROUP[0], "pro", 37, "pricing", "desktop", "San Francisco, US", AT)
USER = {
    "email": "user1@example.com",
    "dataFields": {"first_name": "Sarah", "plan_type": "pro", "recent_page_view": True, "candidate": "yes"},
}
EVENT = {
    "email": "user1@example.com",
    "eventName": "page_view",
    "id": "page-view-37",
    "createdAt": 1_768_314_645,
    "dataFields": {
        "page": "pricing",
        "browser": "desktop",
        "location": "San Francisco, US",
        "timestamp": "2026-01-13 14:30:45",
        "candidate": "yes",
    },
}


def by_id(case: Any) -> str:
    return str(case.id)


# Payloads


def payloads(**change: Any) -> list[Any]:
    """Both payloads of ROW with other values, as Iterable gets them."""
    row = ROW._replace(**change)
    return [json.loads(iterable.to_json(make(row))) for make in (iterable.user_payload, iterable.event_payload)]


def test_a_row_becomes_these_two_payloads() -> None:
    assert payloads() == [USER, EVENT]
    assert payloads(email="\u00a0USER1@Example.com\t\n", event_time=AT.replace(microsecond=999_999)) == [USER, EVENT]
    user, event = payloads(first_name="", plan_type=None, page=None)
    assert user["dataFields"] == {"first_name": "", "recent_page_view": True, "candidate": "yes"}
    assert [*event["dataFields"]] == ["browser", "location", "timestamp", "candidate"]
    assert payloads(view_id="x" * 502) == [USER, {**EVENT, "id": "page-view-" + "x" * 502}]


@pytest.fixture
def local_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1000-01-01 00:00:00", -30_610_224_000),
        ("1969-12-31 23:59:59.999999", -1),
        ("2026-03-29 02:30:00", 1_774_751_400),  # when it is no time in Berlin
        ("9999-12-31 23:59:59", 253_402_300_799),
    ],
)
@pytest.mark.parametrize("local_time", ["UTC", "Europe/Berlin"], indirect=True)
def test_a_time_is_utc_wherever_the_program_runs(local_time: None, text: str, seconds: int) -> None:
    event = payloads(event_time=datetime.fromisoformat(text))[1]
    assert (event["createdAt"], event["dataFields"]["timestamp"]) == (seconds, text[:19])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (1.5, "1.5"),
        (Decimal("1.50"), "1.50"),
        (Decimal("0.0000001"), "0.0000001"),
        (Decimal("1" + "0" * 40), "1" + "0" * 40),
        (date(2026, 1, 13), "2026-01-13"),
        (AT, "2026-01-13 14:30:45"),
        (bytearray("Zoë 😀".encode()), "Zoë 😀"),
    ],
)
def test_a_column_of_another_type_is_sent_as_text(value: Any, text: str) -> None:
    user, event = payloads(first_name=value, location=value)
    assert (user["dataFields"]["first_name"], event["dataFields"]["location"]) == (text, text)


NO_ADDRESS = "no usable e-mail address: correct it in the customers table"
NO_TIME = "event_time is not a date with a time: correct the column in page_views"
NO_ID = "an event in Iterable cannot have the id page-view-{}: correct the id in page_views"
NO_TEXT = "a column holds a value that is no text ({}): change the column's type"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *(({"email": email}, NO_ADDRESS) for email in (None, "", " \t\n", "sarah.johnson", 5)),
        *(({"event_time": at}, NO_TIME) for at in (None, date(2026, 1, 13), "2026-01-13 14:30:45", 1_768_314_645)),
        *(({"view_id": id}, NO_ID.format(id)) for id in ("a b", "ä", "37\n", Decimal("37.5"), "x" * 503)),
        *(({"view_id": id}, NO_ID.format("?")) for id in (None, "")),
        ({"email": b"\xff@example.com"}, NO_TEXT.format("bytes")),
        ({"first_name": [1]}, NO_TEXT.format("list")),
        ({"location": timedelta(hours=1)}, NO_TEXT.format("timedelta")),
    ],
)
def test_a_row_that_cannot_be_sent_says_why(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(iterable.UnusableRow) as problem:
        payloads(**change)
    assert str(problem.value) == reason


TEXTS = st.text(max_size=255) | st.sampled_from(["", " ", "'", '"', "\\", "\x00", "NULL", "😀" * 255, "\u202e", "%s"])
NUMBERS = st.integers(-(2**63), 2**64) | st.decimals(-(10**35), 10**35, places=30)
COLUMNS = st.none() | TEXTS | TEXTS.map(str.encode) | NUMBERS | st.binary(max_size=20)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("first_name", "plan_type", "page", "browser", "location"), COLUMNS),
        "email": COLUMNS | st.builds("{}@{}".format, TEXTS, TEXTS) | st.emails(),
        "view_id": st.integers(0, 2**64) | st.uuids().map(str) | TEXTS,
        "event_time": st.datetimes(datetime(1000, 1, 1)) | st.just(date(2026, 1, 13)),  # noqa: DTZ001
    },
)


def shown(row: dict[str, Any], *columns: str) -> dict[str, Any]:
    """Columns as the server's own client shows them, without those that are NULL. Raises UnicodeDecodeError."""
    texts = {name: row[name].decode() if isinstance(row[name], bytes) else row[name] for name in columns}
    return {name: f"{v:f}" if isinstance(v, Decimal) else str(v) for name, v in texts.items() if v is not None}


@hypothesis_settings(deadline=None, max_examples=200)
@given(CHANGES)
def test_any_row_becomes_json_equal_to_what_it_says_or_is_unusable(change: dict[str, Any]) -> None:
    row = {**ROW._asdict(), **change}
    expected = sent = None
    event_id, at = f"page-view-{row['view_id']}", row["event_time"]
    id_fits = event_id.isascii() and event_id.replace("-", "").isalnum() and 10 < len(event_id) <= 512
    with contextlib.suppress(UnicodeDecodeError):
        email = shown(row, "email").get("email", "").strip().lower()
        user = {**shown(row, "first_name", "plan_type"), "recent_page_view": True, "candidate": "yes"}
        event = {**shown(row, "page", "browser", "location"), "timestamp": str(at)[:19], "candidate": "yes"}
        if "@" in email and id_fits and isinstance(at, datetime):
            created = (at.replace(microsecond=0) - datetime(1970, 1, 1)) // timedelta(seconds=1)  # noqa: DTZ001
            more = {"eventName": "page_view", "id": event_id, "createdAt": created}
            expected = [{"email": email, "dataFields": user}, {"email": email, **more, "dataFields": event}]
    with contextlib.suppress(iterable.UnusableRow):
        sent = payloads(**change)
    assert sent == expected


# What an answer means


@pytest.mark.parametrize("answer", answers.ANSWERED, ids=by_id)
def test_an_answer_means_what_the_table_says(answer: Answer) -> None:
    assert interpret(USERS_UPDATE, answer.fault["status"], answer.fault["body"]) == answer.result


def test_the_log_names_a_call_so() -> None:
    by_status = {status: interpret(USERS_UPDATE, status, SUCCESS).headline for status in (200, 307, 400, 502)}
    assert by_status == {
        200: "users/update call successful: Success",
        307: "Redirect from users/update: Status 307",
        400: "4xx Client Error from users/update: Status 400",
        502: "5xx Server Error from users/update: Status 502",
    }
    assert interpret(EVENTS_TRACK, 200, "<html>").headline == "Unusable answer from events/track: Status 200"
    assert CallResult(USERS_BULK_UPDATE, True, 200).headline == "users/bulkUpdate call successful"
    assert answers.ON_THE_WAY[0].result.headline == "No answer from users/update"


@pytest.mark.parametrize("code", ["", "Success", "ForgottenUserError", "ExternalKeyConflict"])
@pytest.mark.parametrize("status", [200, 400, 401, 409, 503])
def test_an_answer_is_usable_or_forgotten(status: int, code: str) -> None:
    """Usable: a success, or a refusal of Iterable's own."""
    result = interpret(USERS_UPDATE, status, document(code))
    assert result.usable == (status != 503 and code != "")
    assert result.forgotten == (status == 409 and code == "ForgottenUserError")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CODES = st.sampled_from(["Success", "RequestFieldsTypesMismatched", "BadApiKey", "ForgottenUserError"])
CLASHES = st.fixed_dictionaries({"expectedType": JSON, "incomingTypes": st.lists(JSON, max_size=3) | JSON})
MESSAGES = st.sampled_from(["", "e is disallowed from tracking."])
PARAMS = st.fixed_dictionaries({"validationErrors": st.dictionaries(st.text(), CLASHES | JSON)})
DOCUMENTS = JSON | st.fixed_dictionaries(
    {}, optional={"code": CODES | JSON, "msg": MESSAGES | JSON, "params": PARAMS | JSON}
)
STATUSES = st.sampled_from([200, 302, 400, 401, 403, 409, 501, *answers.AGAIN]) | st.integers(200, 599)


@hypothesis_settings(deadline=None, max_examples=200)
@given(STATUSES, DOCUMENTS.map(json.dumps) | st.text())
def test_any_answer_has_a_meaning_and_is_tried_again_exactly_by_contract(status: int, text: str) -> None:
    answer: Any = {}
    with contextlib.suppress(ValueError):
        answer = json.loads(text)
    code, message = (answer.get("code"), answer.get("msg")) if isinstance(answer, dict) else (None, None)
    disallowed = isinstance(message, str) and "is disallowed from tracking" in message
    result = interpret(EVENTS_TRACK, status, text)
    assert result.ok == (200 <= status < 300 and code == "Success" and not disallowed)
    assert result.retryable == (status in answers.AGAIN and code != "RequestFieldsTypesMismatched")
    assert (result.endpoint, result.status, bool(result.reason)) == (EVENTS_TRACK, status, not result.ok)


def test_an_answer_may_be_nested_as_deep_as_it_likes() -> None:
    params = {"validationErrors": {"x": {**answers.CLASH, "incomingTypes": "?"}}}
    for depth in [*range(1, 2000, 7), 100_000]:
        text = document("RequestFieldsTypesMismatched", "", params).replace('"?"', "[" * depth + "]" * depth)
        assert not interpret(USERS_UPDATE, 400, text).ok
        assert not interpret_bulk(USERS_BULK_UPDATE, 200, text, GROUP).ok


# What a bulk answer means


@pytest.mark.parametrize("answer", answers.BULK, ids=by_id)
def test_a_bulk_answer_means_what_the_table_says(answer: BulkAnswer) -> None:
    result = interpret_bulk(USERS_BULK_UPDATE, answer.fault["status"], answer.fault["body"], GROUP)
    assert (result if result.ok else replace(result, named=frozenset())) == answer.result


ENTRIES = [*GROUP, *map(str.upper, GROUP), "stranger@example.com", "", None, 5]
LISTS = st.dictionaries(
    st.sampled_from(["invalidEmails", "conflictEmails", "x"]), st.lists(st.sampled_from(ENTRIES)) | JSON, max_size=2
)
DISALLOWED = st.sampled_from([{}, {}, {"disallowedEventNames": []}, {"disallowedEventNames": ["page_view"]}])
COUNTS: st.SearchStrategy[Any] = st.sampled_from([-1, 0, 1, 2, 3, 4, 2.5, True, False, None, "3", []])


@hypothesis_settings(deadline=None, max_examples=400)
@given(st.just(200) | STATUSES, LISTS, LISTS | JSON, DISALLOWED, st.none() | st.tuples(COUNTS, COUNTS), st.booleans())
def test_a_bulk_answer_is_believed_exactly_when_it_adds_up(
    status: int, top: dict[str, Any], nested: Any, disallowed: dict[str, Any], counts: Any, cut: bool
) -> None:
    keys = [*top.items(), ("failedUpdates", nested), *(nested.items() if isinstance(nested, dict) else ())]
    lists = [value for key, value in keys if isinstance(value, list) and not key.startswith("conflict")]
    named = {entry.lower() for each in lists for entry in each if isinstance(entry, str)} & set(GROUP)
    true_counts = (len(GROUP) - len(named), len(named))
    successes, failures = counts or true_counts
    answer = {"successCount": successes, "failCount": failures, **top, "failedUpdates": nested, **disallowed}
    adds_up = (successes, failures) == true_counts and all(type(count) is int for count in (successes, failures))
    text = json.dumps(answer)[: -1 if cut else None]
    result = interpret_bulk(EVENTS_TRACK_BULK, status, text, [email.title() for email in GROUP])
    assert result.ok == (200 <= status < 300 and not cut and adds_up and not disallowed.get("disallowedEventNames"))
    assert result.retryable == (status in answers.AGAIN)
    assert not result.ok or result.named == named


# A client and what it meets


@pytest.fixture(scope="module")
def secure_server() -> Iterator[StandIn]:
    with StandIn(tls="good", limit_users=100_000, limit_users_bulk=1000, limit_events_bulk=1000) as standin:
        yield standin


@pytest.fixture
def secure(secure_server: StandIn) -> StandIn:
    """As `standin`, over TLS; its authority is the only one that is trusted here."""
    secure_server.reset()
    return secure_server


@pytest.fixture(autouse=True)
def environment(secure_server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, whatever this machine has, and a small CA file."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(secure_server.ca_file))


def payload(document: dict[str, Any]) -> Payload:
    return Payload(document["email"], iterable.to_json(document))


USERS = [payload({**USER, "email": email}) for email in GROUP]
EVENTS = [payload({**EVENT, "email": email, "id": f"page-view-{n}"}) for n, email in enumerate(GROUP, 37)]


class Client(IterableClient):
    """One that loses no time by itself. Its calls are those of one user or event, unless they are given others."""

    def __init__(
        self, server: StandIn | Trap | str, attempts: int = 3, throttling: float = 300, **options: Any
    ) -> None:
        retry = RetryPolicy(attempts, first_wait=0.001, longest_throttling=throttling)
        self.stop = threading.Event()
        defaults = {"api_key": KEY, "rate": 10_000, "timeout": PROMPT, "workers": 16, "retry": retry, "stop": self.stop}
        super().__init__(server if isinstance(server, str) else server.url, **{**defaults, **options})
        self.redact = redactor(options.get("api_key", KEY), "geheim")  # as main.py does

    def update(self, *users: Payload) -> Any:
        return self.update_users(users or USERS[:1])[0]

    def track(self, *events: Payload) -> Any:
        return self.track_events(events or EVENTS[:1])[0]

    def call(self, endpoint: str) -> Any:
        """The verdict on the first of three when it is a bulk endpoint."""
        size = 3 if "ulk" in endpoint else 1
        return self.update(*USERS[:size]) if endpoint.startswith("users") else self.track(*EVENTS[:size])


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


@contextlib.contextmanager
def serving(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that treats each connection so; its address without a scheme."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            handle(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"localhost:{server.server_address[1]}"
        server.shutdown()


# What is sent


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_call_is_this_request_and_nothing_else(endpoint: str) -> None:
    with Trap() as trap:
        Client(trap, attempts=1, timeout=0.2).call(endpoint)
        head, _, content = trap.received.partition(b"\r\n\r\n")
    request_line, *headers = head.decode("ascii").split("\r\n")
    assert request_line == f"POST /api/{endpoint} HTTP/1.1"
    assert sorted(headers) == [
        "Accept-Encoding: identity",
        f"Api-Key: {KEY}",
        f"Content-Length: {len(content)}",
        "Content-Type: application/json",
        f"Host: 127.0.0.1:{trap.port}",
        "User-Agent: iterable-integration/2",
    ]
    assert (
        content.decode()
        == {
            USERS_UPDATE: USERS[0].json,
            EVENTS_TRACK: EVENTS[0].json,
            USERS_BULK_UPDATE: '{"users":[' + ",".join(user.json for user in USERS) + "]}",
            EVENTS_TRACK_BULK: '{"events":[' + ",".join(event.json for event in EVENTS) + "]}",
        }[endpoint]
    )


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_all_calls_arrive_whole_and_each_has_its_verdict(standin: StandIn, secure: StandIn, scheme: str) -> None:
    server = standin if scheme == "http" else secure
    client = Client(server)
    assert client.update_users([]) == client.track_events([]) == []
    assert client.update() == UPDATED
    assert client.track() == CallResult(EVENTS_TRACK, True, 200, "Success", "Event with id: page-view-37 tracked.")
    assert client.update_users(USERS) == [CallResult(USERS_BULK_UPDATE, True, 200)] * 3
    assert client.track_events(EVENTS) == [CallResult(EVENTS_TRACK_BULK, True, 200)] * 3
    state = server.state()
    assert state["users"] == dict.fromkeys(GROUP, USER["dataFields"])
    assert list(state["events"]) == ["page-view-37", "page-view-38", "page-view-39"]
    assert (state["counters"]["calls"], state["violations"]) == (dict.fromkeys(ENDPOINTS, 1), [])
    assert (client.calls, client.retries, client.refused) == (4, 0, None)


# What comes of a call


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, EVENTS_TRACK_BULK])
@pytest.mark.parametrize("answer", answers.ON_THE_WAY, ids=by_id)
def test_a_call_without_an_answer_is_tried_again_and_told(standin: StandIn, answer: Answer, endpoint: str) -> None:
    standin.fault(**answer.fault)
    client = Client(standin, attempts=2, timeout=0.3 if answer.result.reason == TOO_SLOW else PROMPT)
    assert client.call(endpoint) == (answer.after(2) if endpoint == USERS_UPDATE else None)
    assert (standin.counters()["calls"], client.calls) == ({endpoint: 2}, 2)


@pytest.mark.parametrize("passing", answers.PASSING, ids=by_id)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_faults_that_pass_cost_tries_and_nobody(standin: StandIn, endpoint: str, passing: Passing) -> None:
    standin.configure(list_unknown=False)
    for fault in passing.faults:
        standin.fault(**fault, times=1)
    client = Client(standin, attempts=4)
    result = client.call(endpoint)
    assert (result.ok, result.endpoint, result.attempts) == (True, endpoint, passing.attempts)
    assert (client.calls, client.retries) == (passing.attempts, passing.attempts - 1)
    assert len(standin.state()["events"]) == {EVENTS_TRACK: 1, EVENTS_TRACK_BULK: 3}.get(endpoint, 0)


@pytest.mark.parametrize(("failures", "attempts"), [(0, 1), (1, 2), (4, 5), (9, 5)])
def test_a_call_is_tried_so_often(standin: StandIn, failures: int, attempts: int) -> None:
    standin.fault(status=500, body="{}", times=failures)
    failed = CallResult(USERS_UPDATE, False, 500, None, "", answers.IN_TROUBLE, "{}", attempts, True)
    assert Client(standin, attempts=5).update() == (replace(UPDATED, attempts=attempts) if failures < 5 else failed)


def test_reasons_of_different_users_are_equal(standin: StandIn) -> None:
    client = Client(standin)
    for user in USERS:
        standin.fault(status=400, body=document("BadParams", f"{user.email}: no"), times=1)
        result = client.update(user)
        assert (result.message, result.reason) == (f"{user.email}: no", "<email>: no")


@pytest.mark.parametrize("answer", answers.BULK, ids=by_id)
def test_who_is_not_confirmed_by_a_bulk_answer_has_no_verdict(standin: StandIn, answer: BulkAnswer) -> None:
    standin.fault(**answer.fault)
    verdicts = Client(standin, attempts=1).update_users(USERS)
    assert verdicts == [answer.result if email in answer.confirmed else None for email in GROUP]


def test_a_bulk_answer_that_names_a_thousand_addresses_twice_is_read_whole(standin: StandIn) -> None:
    group = [payload({**USER, "email": f"{'x' * 40}{number}@example.com"}) for number in range(1000)]
    standin.configure(refused={USERS_BULK_UPDATE: {user.email: ["invalidEmails", user.email] for user in group[1:]}})
    verdicts = Client(standin).update_users(group)
    assert [bool(verdict) for verdict in verdicts] == [True] + [False] * 999


@pytest.mark.parametrize("action", ["cut", "drip_body"])
def test_a_refusal_is_known_by_its_status_although_its_body_never_ends(standin: StandIn, action: str) -> None:
    """Above all, nothing is sent after a 401."""
    standin.fault(action, status=401, body=document("BadApiKey", "Invalid API key"))
    client = Client(standin, timeout=0.3)
    result = client.update()
    assert (result.status, result.attempts, client.refused) == (401, 1, result)
    assert (client.update(), standin.counters()["calls"]) == (None, {USERS_UPDATE: 1})


# How soon it is tried again


def test_waits_double_from_half_a_second_to_30_with_full_jitter() -> None:
    policy = RetryPolicy()
    for failures, most in [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 30), (8, 30), (10_000, 30)]:
        waits = [policy.wait(failures) for _ in range(500)]
        assert 0 <= min(waits) < 0.1 * most < 0.9 * most < max(waits) <= most


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *((header, None) for header in (None, "", "soon", "-5", "1, 2", "32 Dec 2026")),
        *((header, 0) for header in ("0", "Wed, 21 Oct 2015 07:28:00 GMT")),
        (" 7 ", 7),
        *((header, 120) for header in ("120", "86400", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT")),
    ],
)
def test_retry_after_is_honoured_up_to_two_minutes(header: str | None, seconds: float | None) -> None:
    assert RetryPolicy().retry_after(header) == seconds


DATES: list[Callable[[datetime], str]] = [  # the three forms that RFC 9110 asks every client to know
    lambda at: format_datetime(at, usegmt=True),
    lambda at: at.strftime("%A, %d-%b-%y %H:%M:%S GMT"),
    lambda at: at.strftime("%a %b %d %H:%M:%S %Y"),
]


@pytest.mark.parametrize("local_time", ["Asia/Tokyo", "America/New_York"], indirect=True)
@pytest.mark.parametrize("form", DATES)
def test_retry_after_may_be_a_date_and_is_then_utc(local_time: None, form: Callable[[datetime], str]) -> None:
    seconds = RetryPolicy().retry_after(form(datetime.now(timezone.utc) + timedelta(seconds=60)))
    assert seconds is not None
    assert 50 < seconds <= 60


@hypothesis_settings(deadline=None)
@given(st.text() | st.floats().map(str) | st.datetimes().map(lambda at: at.strftime("%a, %d %b %Y %H:%M:%S %z")))
def test_any_retry_after_is_ignored_or_within_two_minutes(header: str) -> None:
    seconds = RetryPolicy().retry_after(header)
    assert seconds is None or 0 <= seconds <= 120


def test_a_call_waits_as_long_as_retry_after_says(standin: StandIn) -> None:
    standin.fault(status=503, headers={"Retry-After": "1"}, times=1)
    assert Client(standin).update() == replace(UPDATED, attempts=2)
    first, second = (call["t"] for call in standin.state()["journal"])
    assert 1 <= second - first < PROMPT


def test_nothing_but_429_for_five_minutes_is_a_failure(standin: StandIn) -> None:
    assert RetryPolicy().longest_throttling == 300
    slow_down = document("RateLimitExceeded", "slow down")
    standin.fault(status=429, body=slow_down, headers={"Retry-After": "1"})
    result = Client(standin, attempts=1, throttling=0.9).update()
    assert result == replace(interpret(USERS_UPDATE, 429, slow_down), attempts=2)


def test_the_five_minutes_of_429_begin_anew_after_any_other_answer(standin: StandIn) -> None:
    for status, seconds in ((429, "1"), (500, "0"), (429, "0")):
        standin.fault(status=status, headers={"Retry-After": seconds}, times=1)
    assert Client(standin, throttling=0.9).update() == replace(UPDATED, attempts=4)


# How fast calls may start


class Simulation(threading.Event):
    """Threads that call as fast as a limiter lets them, in virtual time. They need not exist, since only one of them
    at a time waits for its turn. What it waits for is this object: it never comes, and ends a little `late`.

    A reply is None for anything but a 429, "429", or a 429 with so many seconds of Retry-After.
    """

    def __init__(self, rate: float, margin: float = 0.02, workers: int = 1, late: Iterable[float] = (0.0,)) -> None:
        super().__init__()
        self.now, self.stop = 1000.0, threading.Event()
        self.starts: list[float] = []
        self.pauses: list[tuple[float, float]] = []
        self._limiter = RateLimiter(rate, margin, self.stop)
        self._workers, self._late = workers, itertools.cycle(late)
        self._on_the_wire: list[tuple[float, float, Any]] = []

    def run(self, seconds: float, reply: Callable[[float], tuple[float, Any]]) -> list[float]:
        """When calls start, counted from now. `reply` is asked at each: after how many seconds it gets which."""
        begin = self.now
        with mock.patch("iterable_client.monotonic", self._monotonic):
            while self.now < begin + seconds and len(self.starts) < 10_000:
                if len(self._on_the_wire) == self._workers:
                    self._work_until(self._on_the_wire[0][0])
                assert self._limiter.acquire(self)
                self.starts.append(self.now - begin)
                latency, answer = reply(self.now - begin)
                heapq.heappush(self._on_the_wire, (self.now + latency, self.now, [answer]))
        return self.starts

    def wait(self, timeout: float | None = None) -> bool:
        self._work_until(self.now + (timeout or 0) + next(self._late))
        return False

    def _monotonic(self) -> float:
        return self.now

    def _work_until(self, end: float) -> None:
        while self._on_the_wire and self._on_the_wire[0][0] <= end:
            answered_at, sent_at, [answer] = heapq.heappop(self._on_the_wire)
            self.now = max(self.now, answered_at)
            if answer == "429":
                self._limiter.throttled(sent_at, None)
            elif answer is not None:
                self._limiter.throttled(sent_at, answer)
                self.pauses.append((self.now - 1000, self.now - 1000 + answer))
        self.now = max(self.now, end)


TIMES = st.lists(st.floats(0, 0.02) | st.floats(0, 3), min_size=1, max_size=20)
REPLIES = st.lists(st.sampled_from([None, "429", 0.1, 2.5]), min_size=1, max_size=30)
RATES = st.tuples(st.integers(1, 60), st.just(0.02)) | st.tuples(st.floats(0.2, 10), st.just(0.05))


@hypothesis_settings(deadline=None, max_examples=200)
@given(RATES, st.integers(1, 40), TIMES, TIMES, REPLIES, st.floats(0, 20))
def test_never_more_than_rate_calls_start_in_any_second_and_none_in_a_pause_before_a_stop(
    rate: tuple[float, float], workers: int, busy: list[float], late: list[float], replies: list[Any], stop_at: float
) -> None:
    simulation = Simulation(*rate, workers, late)
    latencies, answered, stopped = itertools.cycle(busy), itertools.cycle(replies), [math.inf]

    def reply(now: float) -> tuple[float, Any]:
        if now >= stop_at and not simulation.stop.is_set():
            simulation.stop.set()
            stopped[0] = now
        return next(latencies), next(answered)

    starts = simulation.run(20, reply)
    assert all(later - first >= 1 - 1e-9 for first, later in zip(starts, starts[math.ceil(rate[0]) :], strict=False))
    for begin, end in simulation.pauses:
        assert not [start for start in starts if begin < start < min(end, stopped[0]) - 1e-9]


def test_calls_start_evenly_and_close_to_the_rate() -> None:
    starts = Simulation(50, workers=20).run(20, lambda _: (0.3, None))
    gaps = [after - before for before, after in itertools.pairwise(starts[2:])]
    assert min(gaps) == pytest.approx(max(gaps), abs=1e-6)
    assert 1 / 50 <= gaps[0] <= 1 / (0.95 * 50)


def starts_a_second(refused_at: list[float], seconds: int) -> list[int]:
    """How many calls of a limiter of 100 a second start in each second, when those at such times get a 429."""

    def reply(now: float) -> tuple[float, Any]:
        refused = bool(refused_at) and now >= refused_at[0]
        return 0.0, 0.0 if refused and refused_at.pop(0) else None

    starts = Simulation(100).run(seconds, reply)
    return [sum(second <= start < second + 1 for start in starts) for second in range(seconds)]


def test_a_429_lowers_the_rate_by_30_percent_and_it_climbs_by_1_percent_of_the_full_rate_a_second() -> None:
    starts = starts_a_second([2], 40)
    assert 97 <= starts[1] <= 100
    assert starts[2:] == pytest.approx([min(starts[1], 0.7 * starts[1] + second) for second in range(38)], abs=2)


def test_the_rate_falls_at_most_once_a_second() -> None:
    once = starts_a_second([2], 5)
    assert starts_a_second([2, 2.1, 2.2, 2.3, 2.4], 5) == pytest.approx(once, abs=2)
    assert starts_a_second([2, 3.1], 5)[4] <= 0.8 * once[4]


def test_a_project_that_takes_nothing_is_soon_asked_at_a_fraction_of_the_rate() -> None:
    starts = Simulation(1000, workers=300).run(30, lambda _: (0.05, "429"))
    asked = [sum(second <= start < second + 1 for start in starts) for second in range(5, 30)]
    assert 1 <= min(asked) <= max(asked) <= 0.06 * 1000


def test_refusals_of_calls_from_before_the_pause_count_as_one() -> None:
    starts = Simulation(1000, workers=50).run(0.6, lambda now: (0.2, "429") if now < 0.2 else (0.0, None))
    assert starts[50] - starts[0] == pytest.approx(0.2 + 0.25, abs=0.01)
    assert len(starts) == pytest.approx(50 + 700 * 0.15, abs=10)


def test_each_endpoint_has_the_same_share_of_its_own_limit(standin: StandIn) -> None:
    endpoints = [iterable.USERS_UPDATE, iterable.EVENTS_TRACK, iterable.USERS_BULK_UPDATE, iterable.EVENTS_TRACK_BULK]
    assert [(each.path, each.rate(450)) for each in endpoints] == list(zip(ENDPOINTS, (450, 1800, 4.5, 9), strict=True))
    client = Client(standin, rate=500)
    for endpoint, calls, seconds in zip(ENDPOINTS, (101, 401, 2, 3), (0.2, 0.2, 0.2, 0.2), strict=True):
        assert all(client.call(endpoint) for _ in range(calls))
        times = [call["t"] for call in standin.state()["journal"] if call["endpoint"] == endpoint]
        assert 0.9 * seconds < times[-1] - times[0] < PROMPT


@pytest.mark.parametrize("throttled", [USERS_UPDATE, EVENTS_TRACK_BULK])
def test_a_429_pauses_every_worker_of_its_endpoint_and_no_other(
    standin: StandIn, threads: ThreadPoolExecutor, throttled: str
) -> None:
    standin.configure(list_unknown=False)
    standin.fault(status=429, headers={"Retry-After": "1"}, endpoint=throttled, times=1)
    client = Client(standin, throttling=0)  # so that the first call comes back at once
    client.call(throttled)
    calling = [threads.submit(client.call, throttled) for _ in range(8)]
    others = [endpoint for endpoint in ENDPOINTS if endpoint != throttled]
    assert all(client.call(endpoint) for endpoint in others)
    assert all(future.result(PROMPT).ok for future in calling)
    journal = [(call["endpoint"], call["t"]) for call in standin.state()["journal"]]
    assert [endpoint for endpoint, _ in journal] == [throttled, *others, *[throttled] * 8]
    assert journal[4][1] - journal[0][1] >= 1


# Stopping


def told(verdicts: Iterable[Any]) -> list[Any]:
    return [verdict and (verdict.ok, verdict.status, verdict.attempts) for verdict in verdicts]


WAITS = {"Retry-After": "40"}


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, EVENTS_TRACK_BULK])
@pytest.mark.parametrize(
    "fault",
    [{"action": "reset_before"}, {"status": 503}, {"status": 503, "headers": WAITS}, {"status": 429, "headers": WAITS}],
)
def test_a_stop_cuts_the_wait_for_the_next_try(
    standin: StandIn, threads: ThreadPoolExecutor, fault: dict[str, Any], endpoint: str
) -> None:
    standin.fault(**fault)
    retry = RetryPolicy(first_wait=1e9, longest_wait=1e9)  # of which full jitter never takes less than seconds
    client = Client(standin, retry=retry)
    calling = threads.submit(client.call, endpoint)
    standin.wait_for_calls(1)
    client.stop.set()
    once = (False, fault.get("status"), 1)
    assert told([calling.result(PROMPT)]) == [once if endpoint == USERS_UPDATE else None]
    assert (standin.counters()["calls"], client.calls) == ({endpoint: 1}, 1)


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, USERS_BULK_UPDATE])
@pytest.mark.parametrize("waiting_for", ["its turn", "the end of a pause"])
def test_a_stop_cuts_the_wait_before_the_first_try(
    standin: StandIn, threads: ThreadPoolExecutor, waiting_for: str, endpoint: str
) -> None:
    if waiting_for == "the end of a pause":
        standin.fault(status=429, headers=WAITS)
    client = Client(standin, throttling=0, rate=0.02 if waiting_for == "its turn" else 10_000)
    client.call(endpoint)
    calling = [threads.submit(client.call, endpoint) for _ in range(8)]
    assert not any(future.done() for future in calling)
    client.stop.set()
    assert [future.result(PROMPT) for future in calling] == [None] * 8
    assert standin.counters()["calls"] == {endpoint: 1}


@pytest.mark.parametrize("size", [1, 3])
def test_after_a_stop_a_started_group_gets_the_second_call_once_and_no_other_gets_any(
    standin: StandIn, threads: ThreadPoolExecutor, size: int
) -> None:
    client, users, events = Client(standin, throttling=0), USERS[:size], EVENTS[:size]
    assert all(client.update_users(USERS))
    standin.fault(status=429, headers=WAITS, times=1)
    calling = [threads.submit(client.track_events, events)]
    wait(calling)
    calling += [threads.submit(client.track_events, events)]
    time.sleep(0.1)  # until it waits for the end of the pause
    client.stop.set()
    assert client.update_users(users) == [None] * size
    standin.fault(status=503, headers=WAITS, times=1, skip=1)
    calling += [threads.submit(client.track_events, events) for _ in range(3)]
    ends = sorted([told(future.result(PROMPT)) for future in calling], key=str)
    failures = [(False, 429, 1)], [(False, 503, 1)]
    assert ends == sorted([*(failures if size == 1 else [[None] * 3] * 2), *[[(True, 200, 1)] * size] * 3], key=str)
    assert sum(standin.counters()["calls"].values()) == 1 + 5


@pytest.mark.parametrize("size", [1, 3])
def test_after_halt_nothing_is_sent(standin: StandIn, threads: ThreadPoolExecutor, size: int) -> None:
    client = Client(standin, rate=0.02)
    assert client.track_events(EVENTS[:size])
    waiting = threads.submit(client.track_events, EVENTS[:size])
    client.halt()
    assert waiting.result(PROMPT) == [None] * size
    assert client.update_users(USERS[:size]) == client.track_events(EVENTS[:size]) == [None] * size
    assert (client.stop.is_set(), sum(standin.counters()["calls"].values())) == (True, 1)


@pytest.mark.parametrize(("status", "endpoint"), [(401, USERS_UPDATE), (403, USERS_BULK_UPDATE)])
def test_a_refused_key_ends_every_wait_and_lets_the_calls_on_the_wire_end(
    standin: StandIn, threads: ThreadPoolExecutor, status: int, endpoint: str
) -> None:
    client = Client(standin)
    standin.fault(email="slow@example.com", latency=0.5)
    standin.fault(email="late@example.com", status=503, headers=WAITS)
    standin.fault(email=GROUP[0], status=status)
    on_the_wire = threads.submit(client.update, payload({**USER, "email": "slow@example.com"}))
    in_a_wait = threads.submit(client.track, payload({**EVENT, "email": "late@example.com"}))
    standin.wait_for_calls(2)
    client.call(endpoint)
    assert client.refused
    assert (client.refused.endpoint, told([client.refused])) == (endpoint, [(False, status, 1)])
    assert (client.stop.is_set(), client.update(), client.track()) == (True, None, None)
    assert told([on_the_wire.result(PROMPT), in_a_wait.result(PROMPT)]) == [(True, 200, 1), (False, 503, 1)]
    assert sum(standin.counters()["calls"].values()) == 3


# Secrets

ODD_KEY = 'Abc"\\d%e/F+1=234&<567>'
CLASH_WITH_KEY = {"validationErrors": {ODD_KEY: {**answers.CLASH, "incomingTypes": [ODD_KEY]}}}
ECHOES: dict[str, str] = {
    "as it is": f"<p>bad key {ODD_KEY}</p>",
    "as JSON text": document("BadParams", f"Api-Key: {ODD_KEY}"),
    "as code": document(f"Bad{ODD_KEY}"),
    "percent-encoded": document("BadParams", f"?api_key={quote(ODD_KEY, safe='')}"),
    "where the text is cut": document("BadParams", "x" * 490 + ODD_KEY),
    "where the body is cut": "x" * 490 + ODD_KEY,
    "as a field that clashes": document("RequestFieldsTypesMismatched", "", CLASH_WITH_KEY),
}


@pytest.mark.parametrize("text", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_an_echoed_key_is_in_no_field_of_a_result_and_no_line_of_the_log(
    standin: StandIn, caplog: pytest.LogCaptureFixture, status: int, text: str
) -> None:
    caplog.set_level("DEBUG")
    standin.fault(status=status, body=text)
    client = Client(standin, api_key=ODD_KEY, attempts=2)
    results = [client.update(), client.refused, *client.update_users(USERS)]
    fields = [str(field) for result in results if result for field in astuple(result)]
    ways = (ODD_KEY, json.dumps(ODD_KEY)[1:-1], quote(ODD_KEY, safe=""))
    pieces = {way[at : at + 10] for way in ways for at in range(len(way) - 9)}
    assert [piece for piece in pieces if piece in caplog.text or any(piece in field for field in fields)] == []
    assert f"{USERS_UPDATE}: " in caplog.text


def test_what_json_hid_in_escapes_is_redacted_and_so_are_the_other_secrets(standin: StandIn) -> None:
    standin.fault(status=400, body=document("geheim", f"{ODD_KEY} geheim").replace("F", "\\u0046"))
    result = Client(standin, api_key=ODD_KEY).update()
    assert (result.code, result.message, result.reason) == ("[secret]", *["[secret] [secret]"] * 2)
    assert "geheim" not in result.body


def test_the_key_that_iterable_echoes_with_all_headers_is_redacted(standin: StandIn) -> None:
    standin.fault("echo_headers")
    result = Client(standin).track()
    assert (result.status, result.code) == (400, "BadJsonBody")
    assert "'api-key': '[secret]'" in result.message
    assert KEY not in repr(result)


# What goes wrong on the way

LINES = [
    b"HTTP/%s %s" % line for line in itertools.product((b"1.1", b"2", b""), (b"200", b"429", b"101", b"099", b"abc"))
]
HEADERS = [
    *(b"Content-Length: " + value for value in (b"43", b"-1", b"1, 2", b"x")),
    *(b"Content-Encoding: " + value for value in (b"gzip", b"deflate, br, zstd")),
    *(b"Transfer-Encoding: chunked", b"Location: http://127.0.0.1:1/", b"Retry-After: \xb2"),
    *(b"Content-Type: \xff\xfe", b"no colon", b" folded: yes", b"X: " + b"x" * 70_000, b"X: x\r\n" * 200),
]
BODIES = [SUCCESS.encode(), b"5\r\nhello\r\n0\r\n\r\n", b"ffffffff\r\nx", b"-1\r\n", gzip.compress(b"x")[:-3]]
RAW = st.binary(max_size=200) | st.builds(
    lambda line, headers, body: b"\r\n".join([line, *headers, b"", body]),
    st.sampled_from(LINES),
    st.lists(st.sampled_from(HEADERS) | st.binary(max_size=20), max_size=4),
    st.sampled_from(BODIES) | DOCUMENTS.map(lambda document: json.dumps(document).encode()),
)


@hypothesis_settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RAW, st.sampled_from([1, 3]))
def test_any_bytes_from_the_server_make_a_verdict_or_none(standin: StandIn, content: bytes, size: int) -> None:
    standin.reset()
    standin.fault("raw", body=content)
    [verdict, *others] = Client(standin, attempts=1, throttling=0, timeout=LONG).update_users(USERS[:size])
    if size > 1:
        assert [verdict, *others] == [None] * 3
        return
    assert verdict and verdict.attempts == 1
    assert b"Success" in content if verdict.ok else verdict.reason
    assert not verdict.retryable or verdict.status in (None, *answers.AGAIN)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(standin: StandIn, status: int) -> None:
    with Trap() as trap:
        standin.fault(status=status, headers={"Location": f"{trap.url}/api/users/update"})
        client = Client(standin)
        assert client.update() == CallResult(USERS_UPDATE, False, status, reason=answers.REDIRECT)
        assert client.update_users(USERS) == [None] * 3
        assert (trap.connections, trap.received) == (0, b"")
    assert standin.counters()["calls"] == {USERS_UPDATE: 1, USERS_BULK_UPDATE: 1}


def no_answer(words: str, attempts: int = 2, *, again: bool = True) -> CallResult:
    return CallResult(USERS_UPDATE, False, message=words, reason=words, attempts=attempts, retryable=again)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expired", "certificate has expired"),
        ("self-signed", "self-signed certificate"),
        ("wrong-name", "Hostname mismatch, certificate is not valid for 'localhost'."),
    ],
)
def test_a_certificate_that_is_not_trusted_ends_the_call_before_the_key_is_sent(
    monkeypatch: pytest.MonkeyPatch, kind: Any, words: str
) -> None:
    with StandIn(tls=kind) as standin:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(standin.ca_file))
        advice = f"{CHECK_URL}; a company's own authority goes into REQUESTS_CA_BUNDLE"
        message = f"the server's certificate is not trusted ({words}): {advice}"
        assert Client(standin).update() == no_answer(message, attempts=1, again=False)
        assert standin.counters()["calls"] == {}


def test_a_refused_connection_is_tried_again_and_told() -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        result = Client(f"http://127.0.0.1:{taken.getsockname()[1]}", attempts=2).update()
    assert result == no_answer(f"no connection (Connection refused): {CHECK_URL}")


def test_a_limit_on_open_files_is_told(standin: StandIn) -> None:
    client = Client(standin, attempts=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)  # that is free
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        result = client.update()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    words = "too many open connections: lower MAX_WORKERS, or raise the limit of open files (ulimit -n)"
    assert result == no_answer(words)


@pytest.mark.parametrize("host", ["api.iterable.invalid", "api..iterable.com", f"{'a' * 64}.com"])
def test_an_unknown_host_is_tried_again_and_told(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Without a real resolver: where there is no internet, the real one takes its time."""
    unknown = mock.Mock(side_effect=socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert Client(f"https://{host}", attempts=2).update() == no_answer(f"the host name is unknown (DNS): {CHECK_URL}")


@pytest.mark.parametrize(
    "fault",
    [
        {"action": "drip_body", "interval": 0.1, "body": "x" * 1000, "status": 200},
        {"action": "raw", "body": "HTTP/1.1 200 OK\r\nContent-Length: 41\r\n\r\n{", "keep_open": True},
        {"action": "raw", "body": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe", "keep_open": True},
        {"latency": LONG},
    ],
    ids=["drip of the body", "half a body", "half a chunk", "late"],
)
def test_an_answer_has_to_be_whole_within_the_timeout(secure: StandIn, fault: dict[str, Any]) -> None:
    secure.fault(**fault)
    began = time.monotonic()
    assert Client(secure, attempts=1, timeout=0.3).update() == no_answer(TOO_SLOW, 1)
    assert time.monotonic() - began < PROMPT


def test_a_server_that_speaks_no_tls_is_told() -> None:
    with serving(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address:
        result = Client(f"https://{address}", attempts=2).update()
    assert result == no_answer(result.reason)
    assert result.reason.startswith("no encrypted connection (")
    assert result.reason.endswith(f"): {CHECK_URL}")


def test_an_answer_that_comes_before_the_request_is_whole_counts() -> None:
    """As nginx gives it to a body over its limit, whose rest it refuses."""

    def handle(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.shutdown(socket.SHUT_RD)
        connection.close()

    with serving(handle) as address:
        result = Client(f"http://{address}").update(payload({**USER, "dataFields": {"x": "x" * 20_000_000}}))
    assert (result.status, result.attempts) == (413, 1)


@pytest.mark.parametrize(("interim", "statuses"), [("100 Continue", [400] * 3), ("103 Early Hints", [103] * 3)])
def test_an_answer_after_an_interim_one_is_no_answer_to_the_next_call(interim: str, statuses: list[int]) -> None:
    def handle(connection: socket.socket) -> None:
        while connection.recv(65536):
            connection.sendall(f"HTTP/1.1 {interim}\r\n\r\n".encode())
            time.sleep(0.05)
            with contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with serving(handle) as address:
        client = Client(f"http://{address}", attempts=1)
        assert [client.update().status for _ in range(3)] == statuses


def test_of_a_giant_answer_only_the_beginning_is_read(standin: StandIn) -> None:
    """More than this beginning never comes, and is not waited for."""
    head = f"HTTP/1.1 404 Not Found\r\nContent-Length: {10**12}\r\n\r\n"
    standin.fault("raw", body=head + "x" * 70_000, keep_open=True, times=1)
    client = Client(standin, attempts=1, timeout=LONG)
    began = time.monotonic()
    assert client.update() == CallResult(USERS_UPDATE, False, 404, None, "", answers.NOT_ITERABLE, "x" * 500)
    assert time.monotonic() - began < PROMPT
    assert client.update() == UPDATED


def test_a_compressed_answer_is_read_and_a_bomb_does_not_go_off(standin: StandIn) -> None:
    client = Client(standin, attempts=1)
    gzipped: dict[str, Any] = {"status": 200, "headers": {"Content-Encoding": "gzip"}, "times": 1}
    standin.fault(body=gzip.compress(SUCCESS.encode()), **gzipped)
    assert client.update() == UPDATED
    standin.fault(body=gzip.compress(b"x" * 100_000_000, 1), **gzipped)
    tracemalloc.start()
    try:
        assert client.update() == CallResult(USERS_UPDATE, False, 200, None, "", answers.NOT_ITERABLE, "x" * 500)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


# Connections


def test_connections_are_reused_one_for_each_busy_thread_and_every_call_is_counted(
    secure: StandIn, threads: ThreadPoolExecutor
) -> None:
    secure.configure(latency=0.01, list_unknown=False)
    secure.fault(status=500, body="{}", skip=7, times=7)
    secure.fault(status=400, body=document("BadParams"), skip=20, times=7)
    client = Client(secure, workers=16)

    def user(number: int) -> None:
        client.update(*USERS[: 1 + 2 * (number % 2)])
        client.track(*EVENTS[: 1 + 2 * (number % 2)])

    for future in [threads.submit(lambda: [*map(user, range(8))]) for _ in range(16)]:
        future.result()
    counters = secure.counters()
    assert sum(counters["calls"].values()) == client.calls == 16 * 8 * 2 + 7
    assert client.retries == 7
    assert counters["connections"] <= 16


@pytest.mark.parametrize("header", [b"Connection: close\r\n", b""])
def test_a_connection_that_the_server_has_closed_costs_no_attempt(header: bytes) -> None:
    closed = threading.Semaphore(0)

    def handle(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n" % (header, len(SUCCESS)))
        connection.sendall(SUCCESS.encode())
        connection.close()
        closed.release()

    with serving(handle) as address:
        client = Client(f"http://{address}", attempts=1)
        for _ in range(3):
            assert client.update() == UPDATED
            assert closed.acquire(timeout=PROMPT)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_companys_own_authority_is_trusted_when_the_environment_names_it(
    secure: StandIn, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert "certificate is not trusted" in Client(secure).update().reason
    monkeypatch.setenv(variable, str(secure.ca_file))
    assert Client(secure).update() == UPDATED


def test_the_authorities_may_be_a_folder(secure: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert secure.ca_file
    command = ["openssl", "x509", "-noout", "-hash", "-in", str(secure.ca_file)]
    try:
        name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    (tmp_path / f"{name}.0").write_bytes(secure.ca_file.read_bytes())
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))
    assert Client(secure).update() == UPDATED


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_ca_file_that_is_of_no_use_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    ca_file = tmp_path / "ca.pem"
    if content:
        ca_file.write_text(content)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca_file))
    with pytest.raises(OSError, match=f"The CA file {ca_file} .REQUESTS_CA_BUNDLE. cannot be read"):
        Client("https://localhost")


# Proxies


@contextlib.contextmanager
def proxy(reply: bytes = b"", certificate: Path | None = None) -> Iterator[tuple[str, list[list[str]]]]:
    """An HTTP proxy: its address, and the lines of each request that it gets. It opens tunnels, or gives everyone the
    one `reply`. With `certificate`, a PEM file of chain and key, it is spoken to over TLS."""
    requests: list[list[str]] = []

    def handle(connection: socket.socket) -> None:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            connection = context.wrap_socket(connection, server_side=True)
        requests.append(connection.recv(65536).decode().split("\r\n"))
        if reply:
            connection.sendall(reply)
            return
        host, _, port = requests[-1][0].split()[1].rpartition(":")
        with socket.create_connection((host, int(port))) as target:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            other = {connection: target, target: connection}
            while all(pairs := [(end, end.recv(65536)) for end in select.select([*other], [], [])[0]]):
                for end, data in pairs:
                    if not data:
                        return
                    other[end].sendall(data)

    with serving(handle) as address:
        yield address, requests


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_tunnels_and_the_environment_is_asked_for_it_once(
    secure: StandIn, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with proxy() as (address, requests):
        monkeypatch.setenv(variable, f"http://ann:p%40ss@{address}")
        client = Client(secure)
        monkeypatch.delenv(variable)
        assert [client.update() for _ in range(3)] == [UPDATED] * 3
    assert secure.counters()["connections"] == len(requests) == 1
    assert requests[0][0].startswith(f"CONNECT localhost:{secure.port} HTTP/1.")
    assert "proxy-authorization: Basic YW5uOnBAc3M=".title() in [line.title() for line in requests[0]]
    assert KEY not in str(requests)


def test_a_proxy_that_is_spoken_to_over_tls_is_trusted_by_the_same_authority(
    secure: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert secure.ca_file
    both = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(both.cert_pem.bytes() + secure.ca_file.read_bytes())
    both.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "proxy.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    with proxy(certificate=tmp_path / "proxy.pem") as (address, requests):
        monkeypatch.setenv("HTTPS_PROXY", f"https://{address}")
        assert Client(secure, attempts=1).update() == UPDATED
    assert len(requests) == 1


@pytest.mark.parametrize("spared", ["localhost", "*"])
def test_no_proxy_spares_a_host(secure: StandIn, monkeypatch: pytest.MonkeyPatch, spared: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", spared)
    assert Client(secure).update() == UPDATED


@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_plain_http_goes_by_no_proxy_which_would_read_the_key(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    assert Client(standin).update() == UPDATED


@pytest.mark.parametrize("broken", ["refuses", "is away", "is silent"])
def test_a_proxy_that_does_not_work_is_told_as_such(
    secure: StandIn, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    with proxy(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n") as (address, _), Trap() as trap:
        address = {"refuses": address, "is away": "127.0.0.1:1", "is silent": f"127.0.0.1:{trap.port}"}[broken]
        monkeypatch.setenv("HTTPS_PROXY", f"http://ann:geheim@{address}")
        result = Client(secure, attempts=2, timeout=0.3).update()
    assert result == no_answer(result.reason)
    assert result.reason == TOO_SLOW if broken == "is silent" else "HTTPS_PROXY" in result.reason
    assert "geheim" not in repr(result)
    assert secure.counters()["calls"] == {}


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        *((f"http://ann:gehe{sign}im@proxy:1", "with / ? # @ in the password as %2F %3F %23 %40") for sign in "/?#@"),
        ("http://", "is of no use"),
        ("http://ann:geheim", "is of no use"),
        ("socks5://ann:geheim@p:1", "it must be like http://user:password@host:port"),
    ],
)
def test_a_proxy_address_that_is_of_no_use_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, address: str, words: str
) -> None:
    monkeypatch.setenv(variable, address)
    with pytest.raises(OSError, match=variable) as error:
        Client("https://localhost")
    assert words in str(error.value)
    assert "gehe" not in str(error.value)
