"""IterableClient against a real server: what it sends, what an answer means, when it tries again, and when it stops."""

from __future__ import annotations

import contextlib
import gzip
import heapq
import html
import itertools
import json
import os
import resource
import select
import socket
import socketserver
import ssl
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from datetime import datetime, timedelta, timezone
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

from iterable_client import CallResult, IterableClient, RateLimiter, RetryPolicy, interpret
from logger_config import Redactor
from standin_handle import EVENTS_TRACK, KEY, USERS_UPDATE, StandIn, Trap

USER = {"email": "ann@example.com", "dataFields": {"first_name": "Zoë 😀", "recent_page_view": True}}
EVENT = {"email": "ann@example.com", "eventName": "page_view", "id": "page-view-1", "createdAt": 1_768_314_645}
SUCCESS = '{"msg":"","code":"Success","params":null}'
AGAIN = (408, 429, 500, 502, 503, 504)
LONG = 40.0  # seconds that a test never takes: a wait that was not cut is seen by it
PROMPT = 10.0  # seconds within which a call comes back whose wait was cut, on however busy a machine

CHECK_URL = "check ITERABLE_API_BASE_URL and the network"
NOT_ITERABLE = "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
REDIRECT = f"a redirect, which is never followed: {NOT_ITERABLE}"
IN_TROUBLE = "Iterable is in trouble: run again later, and see https://status.iterable.com"
KEY_REFUSED = (
    "Iterable refused the API key: check ITERABLE_API_KEY (a server-side key of this project, not disabled), and that "
    "ITERABLE_API_BASE_URL is that of its region: https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
THROTTLED = "the project's rate limit was used up for too long: lower ITERABLE_RATE_LIMIT, or run when less else writes"
BAD_ADDRESS = "Iterable refuses the address as invalid: correct it in the customers table"
IDENTITY = "another user of the project has this identity: merge the two in Iterable"
NO_TRACKING = "tracking is switched off for this user or event: see the project's settings in Iterable"
TOO_SLOW = "no answer in time: Iterable is slow or out of reach; ITERABLE_TIMEOUT is the time it gets"
BROKEN = f"the connection broke before the answer was whole: {CHECK_URL}"


def answer(code: str | None, msg: str = "", params: Any = None) -> str:
    return json.dumps({"msg": msg, "code": code, "params": params})


def no_answer(words: str, *, attempts: int, endpoint: str = USERS_UPDATE, again: bool = True) -> CallResult:
    return CallResult(endpoint, False, message=words, reason=words, attempts=attempts, retryable=again)


@pytest.fixture(scope="module")
def secure_server() -> Iterator[StandIn]:
    with StandIn(tls="good", limit_users=100_000, limit_events=400_000) as standin:
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


Connect = Callable[..., IterableClient]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """`connect(standin or URL, **options)`: a client that loses no time by itself."""
    clients = []

    def make(server: StandIn | Trap | str, *, attempts: int = 3, throttling: float = 300, **options: Any) -> Any:
        retry = RetryPolicy(attempts, first_wait=0.001, longest_throttling=throttling)
        defaults: dict[str, Any] = {"rate": 10_000, "timeout": PROMPT, "retry": retry, "redact": Redactor([KEY])}
        url = server if isinstance(server, str) else server.url
        clients.append(IterableClient(url, KEY, **{**defaults, **options}))
        return clients[-1]

    yield make
    for client in clients:
        client.__exit__()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


# What is sent


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, EVENTS_TRACK])
def test_a_call_is_this_request_and_nothing_else(connect: Connect, endpoint: str) -> None:
    payload = USER if endpoint == USERS_UPDATE else EVENT
    with Trap() as trap:
        client = connect(trap, attempts=1, timeout=0.2)
        call = client.update_user if endpoint == USERS_UPDATE else client.track_event
        assert call(payload) == no_answer(TOO_SLOW, attempts=1, endpoint=endpoint)
        head, _, body = trap.received.partition(b"\r\n\r\n")
    request_line, *headers = head.decode("ascii").split("\r\n")
    assert request_line == f"POST /api/{endpoint} HTTP/1.1"
    assert sorted(headers) == [
        "Accept-Encoding: identity",
        f"Api-Key: {KEY}",
        f"Content-Length: {len(body)}",
        "Content-Type: application/json",
        f"Host: 127.0.0.1:{trap.port}",
        "User-Agent: iterable-integration/1.0",
    ]
    assert json.loads(body) == payload


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_both_calls_arrive_whole(standin: StandIn, secure: StandIn, connect: Connect, scheme: str) -> None:
    server = standin if scheme == "http" else secure
    client = connect(server)
    assert client.update_user(USER) == CallResult(USERS_UPDATE, True, 200, "Success")
    tracked = CallResult(EVENTS_TRACK, True, 200, "Success", "Event with id: page-view-1 tracked.")
    assert client.track_event(EVENT) == tracked
    state = server.state()
    assert state["users"] == {"ann@example.com": USER["dataFields"]}
    assert state["events"] == {"page-view-1": {key: value for key, value in EVENT.items() if key != "id"}}
    assert state["violations"] == []
    assert state["last_headers"] == {
        "host": server.url.partition("//")[2],
        "accept-encoding": "identity",
        "content-length": str(len(json.dumps(EVENT, separators=(",", ":")))),
        "api-key": KEY,
        "content-type": "application/json",
        "user-agent": "iterable-integration/1.0",
    }


def test_a_call_in_turn_is_sent_at_once_and_its_retries_wait(standin: StandIn, connect: Connect) -> None:
    standin.fault(status=503, times=1, skip=1)
    stop = threading.Event()
    client = connect(standin, rate=2, stop=stop)
    assert client.take_turn() == 0
    assert 0.4 < client.take_turn() < 0.55
    began = time.monotonic()
    assert client.update_user(USER, in_turn=True) == CallResult(USERS_UPDATE, True, 200, "Success")
    assert time.monotonic() - began < 0.4
    assert client.update_user(USER, in_turn=True) == CallResult(USERS_UPDATE, True, 200, "Success", attempts=2)
    assert time.monotonic() - began > 0.4
    stop.set()
    assert client.update_user(USER, in_turn=True) is None
    assert standin.counters()["calls"] == {USERS_UPDATE: 3}


# What an answer means

Row = tuple[int, str, CallResult]


def success(status: int, text: str, message: str = "") -> Row:
    return status, text, CallResult(USERS_UPDATE, True, status, "Success", message)


def failure(
    status: int, text: str, reason: str, code: str | None = None, message: str = "", *, again: bool = False
) -> Row:
    body = " ".join(text.split())
    return status, text, CallResult(USERS_UPDATE, False, status, code, message, reason, body, retryable=again)


def refusal(status: int, code: str, message: str, reason: str, *, again: bool = False) -> Row:
    return failure(status, answer(code, message), reason, code, message, again=again)


ANSWERS: list[Row] = [
    success(200, SUCCESS),
    success(201, answer("Success", "Event with id: 1234 tracked."), "Event with id: 1234 tracked."),
    success(299, answer("Success", "", {"id": "1234"})),
    success(200, answer("Success", "x" * 600), "x" * 500),
    refusal(200, "Success", "Event e is disallowed from tracking.", NO_TRACKING),
    refusal(200, "BadParams", "no such campaign", "no such campaign"),
    refusal(200, "success", "", "Iterable does not say why"),
    failure(200, "<html>\n <h1>Sign\tin</h1>\r\n</html>", NOT_ITERABLE),
    failure(200, '{"msg":"","code":"Suc', NOT_ITERABLE),
    failure(200, "", NOT_ITERABLE),
    failure(200, '["Success"]', NOT_ITERABLE),
    failure(200, '{"msg":5,"code":["Success"]}', NOT_ITERABLE),
    failure(204, "", NOT_ITERABLE),
    *(failure(status, "", REDIRECT) for status in (300, 301, 302, 303, 304, 307, 308)),
    failure(302, SUCCESS, REDIRECT, "Success"),
    refusal(400, "InvalidEmailAddressError", "Invalid email: 000", BAD_ADDRESS),
    refusal(400, "BadJsonBody", "[/api/users/update] Invalid JSON body", "[/api/users/update] Invalid JSON body"),
    refusal(400, "Success", "an error all the same", "an error all the same"),
    refusal(
        400,
        "UniqueFieldsLimitExceeded",
        "too many",
        "the project has no room for new fields: delete unused ones in Iterable",
    ),
    refusal(401, "BadApiKey", "Invalid API key", KEY_REFUSED),
    refusal(401, "Success", "", KEY_REFUSED),
    failure(401, "", KEY_REFUSED),
    refusal(403, "Forbidden", "", KEY_REFUSED),
    failure(404, "<h1>Not found</h1>", NOT_ITERABLE),
    failure(405, "", NOT_ITERABLE),
    refusal(409, "ForgottenUserError", "User x has been forgotten", "User x has been forgotten"),
    refusal(409, "ExternalKeyConflict", "", IDENTITY),
    refusal(409, "EmailAlreadyExists", "", IDENTITY),
    refusal(409, "UserIdAlreadyExists", "", IDENTITY),
    failure(413, "too large", NOT_ITERABLE),
    failure(501, "", NOT_ITERABLE),
    failure(505, "", NOT_ITERABLE),
    *(failure(status, "", IN_TROUBLE, again=True) for status in (408, 500, 502, 503, 504)),
    failure(502, "<h1>Bad Gateway</h1>", IN_TROUBLE, again=True),
    refusal(500, "GenericError", "try later", IN_TROUBLE, again=True),
    refusal(503, "Success", "", IN_TROUBLE, again=True),
    refusal(429, "RateLimitExceeded", "Rate limit exceeded", THROTTLED, again=True),
    failure(429, "<h1>Slow down</h1>", THROTTLED, again=True),
    failure(
        500,
        answer("RequestFieldsTypesMismatched", "Types!"),
        "a field has another type: correct the column, or the field's type in Iterable",
        "RequestFieldsTypesMismatched",
        "Types!: a field has another type: correct the column, or the field's type in Iterable",
    ),
]


def row_name(value: Any) -> str:
    return str(value)[:40] if isinstance(value, int | str) else ""


@pytest.mark.parametrize(("status", "text", "expected"), ANSWERS, ids=row_name)
def test_an_answer_means_what_the_contract_says(status: int, text: str, expected: CallResult) -> None:
    assert interpret(USERS_UPDATE, status, text) == expected


@pytest.mark.parametrize(("status", "text", "expected"), ANSWERS, ids=row_name)
def test_a_call_that_is_answered_so_is_tried_again_or_not(
    standin: StandIn, connect: Connect, status: int, text: str, expected: CallResult
) -> None:
    standin.fault(status=status, body=text)
    client = connect(standin, attempts=2, throttling=0)  # so that a 429 is not waited for
    attempts = 2 if status in AGAIN and status != 429 and "RequestFields" not in text else 1
    assert client.update_user(USER) == replace(expected, attempts=attempts)
    assert standin.counters()["answers"] == {USERS_UPDATE: {status: attempts}}
    assert client.stopped == (status in (401, 403))


def test_the_log_names_a_call_so() -> None:
    def headline(endpoint: str, status: int, text: str = "") -> str:
        return interpret(endpoint, status, text).headline

    assert [
        headline(USERS_UPDATE, 200, SUCCESS),
        headline(EVENTS_TRACK, 200, "<html>"),
        headline(USERS_UPDATE, 400, answer("Success")),
        headline(EVENTS_TRACK, 502),
        headline(USERS_UPDATE, 307),
        no_answer(TOO_SLOW, attempts=5).headline,
    ] == [
        "users/update call successful: Success",
        "Unusable answer from events/track: Status 200",
        "4xx Client Error from users/update: Status 400",
        "5xx Server Error from events/track: Status 502",
        "Redirect from users/update: Status 307",
        "No answer from users/update",
    ]


@pytest.mark.parametrize(
    ("status", "text", "usable", "forgotten", "key_refused"),
    [
        (200, SUCCESS, True, False, False),
        (400, answer("BadParams"), True, False, False),
        (409, answer("ForgottenUserError"), True, True, False),
        (409, answer("ExternalKeyConflict"), True, False, False),
        (400, answer("ForgottenUserError"), True, False, False),
        (401, "", False, False, True),
        (403, answer("Forbidden"), True, False, True),
        (404, "<html>", False, False, False),
        (503, answer("GenericError"), False, False, False),
    ],
)
def test_an_answer_is_usable_forgotten_or_the_keys_end(
    status: int, text: str, usable: bool, forgotten: bool, key_refused: bool
) -> None:
    result = interpret(USERS_UPDATE, status, text)
    assert (result.usable, result.forgotten, result.key_refused) == (usable, forgotten, key_refused)


def mismatch(field: str, **facts: Any) -> str:
    return answer("RequestFieldsTypesMismatched", "Types!", {"validationErrors": {field: facts}})


def test_a_type_mismatch_is_a_sentence_on_field_expectation_and_what_was_sent(
    standin: StandIn, connect: Connect
) -> None:
    client = connect(standin)
    client.update_user({"email": "ann@example.com", "dataFields": {"plan_type": 5, "first_name": "Ann"}})
    result = client.update_user({"email": "bob@example.com", "dataFields": {"plan_type": "pro"}})
    assert result is not None
    assert (result.status, result.code, result.attempts) == (400, "RequestFieldsTypesMismatched", 1)
    cure = "correct the column, or the field's type in Iterable"
    assert result.reason == f"field plan_type: Iterable expects long, but string or keyword was sent: {cure}"
    assert result.message.endswith(
        f": field plan_type: Iterable expects long, but string or keyword, 'pro', was sent: {cure}"
    )


def test_reasons_of_different_users_are_equal(standin: StandIn, connect: Connect) -> None:
    client = connect(standin)
    for email, event_id in (("ann@example.com", "page-view-1"), ("bob@example.com", "page-view-2")):
        standin.fault(status=400, body=answer("BadParams", f"{event_id} of {email}: no"), times=1)
        result = client.track_event({**EVENT, "email": email, "id": event_id})
        assert result is not None
        assert (result.message, result.reason) == (f"{event_id} of {email}: no", "<id> of <email>: no")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CODES = st.sampled_from(["Success", "RequestFieldsTypesMismatched", "BadApiKey", "ForgottenUserError"])
MISMATCHES = st.fixed_dictionaries(
    {"expectedType": JSON, "incomingTypes": st.lists(JSON, max_size=3) | JSON, "offendingValue": JSON}
)
DOCUMENTS = JSON | st.fixed_dictionaries(
    {},
    optional={
        "code": CODES | JSON,
        "msg": st.sampled_from(["", "e is disallowed from tracking."]) | JSON,
        "params": st.fixed_dictionaries({"validationErrors": st.dictionaries(st.text(), MISMATCHES | JSON)}) | JSON,
    },
)
STATUSES = st.sampled_from([200, 302, 400, 401, 403, 409, 501, *AGAIN]) | st.integers(200, 599)


def meaning(status: int, text: str) -> tuple[bool, bool]:
    """Whether contract 5 calls it a success, and whether it says to try again."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    document = document if isinstance(document, dict) else {}
    if status // 100 == 2:
        message = document.get("msg")
        disallowed = isinstance(message, str) and "is disallowed from tracking" in message
        return document.get("code") == "Success" and not disallowed, False
    return False, status in AGAIN and document.get("code") != "RequestFieldsTypesMismatched"


@hypothesis_settings(deadline=None, max_examples=150)
@given(status=STATUSES, text=DOCUMENTS.map(json.dumps) | st.text(), end=st.integers(1, 300) | st.none())
def test_any_answer_has_a_meaning_and_is_tried_again_exactly_by_contract(
    status: int, text: str, end: int | None
) -> None:
    text = text[:end]
    result = interpret(EVENTS_TRACK, status, text)
    assert (result.ok, result.retryable) == meaning(status, text)
    assert (result.endpoint, result.status, result.attempts) == (EVENTS_TRACK, status, 1)
    assert result.ok or result.reason
    assert max(map(len, (result.message, result.body))) <= 500


def test_of_all_texts_of_an_answer_500_characters_are_kept() -> None:
    result = interpret(USERS_UPDATE, 400, answer("C" * 600, "m" * 600))
    assert [len(text or "") for text in (result.code, result.message, result.reason, result.body)] == [500] * 4


def test_an_answer_may_be_nested_as_deep_as_it_likes() -> None:
    for depth in range(0, 2000, 7):
        value = "[" * depth + "]" * depth
        text = mismatch("x", offendingValue="?").replace('"?"', value or '""')
        assert not interpret(USERS_UPDATE, 400, text).retryable


RAW = st.binary(max_size=200) | st.builds(
    lambda version, status, headers, body: (
        f"HTTP/{version} {status}\r\n".encode() + b"\r\n".join([*headers, b"", body])
    ),
    st.sampled_from(["1.1", "1.0", "2", "9.9", ""]),
    STATUSES.map(str) | st.sampled_from(["100 Continue", "101", "099", "1000", "abc", "204 None", "304 Same", ""]),
    st.lists(
        st.sampled_from(
            [
                b"Content-Length: 43",
                b"Content-Length: -1",
                b"Content-Length: 1, 2",
                b"Content-Length: x",
                b"Transfer-Encoding: chunked",
                b"Content-Encoding: gzip",
                b"Content-Encoding: deflate, br, zstd",
                b"Content-Type: \xff\xfe",
                b"Location: http://127.0.0.1:1/",
                b"Retry-After: \xb2",
                b"Connection: close",
                b"no colon",
                b" folded: yes",
                b"X: " + b"x" * 70_000,
                b"\r\n".join(b"X-%d: x" % number for number in range(200)),
            ]
        )
        | st.binary(max_size=20),
        max_size=4,
    ),
    DOCUMENTS.map(lambda document: json.dumps(document).encode())
    | st.binary(max_size=100)
    | st.sampled_from([b"5\r\nhello\r\n0\r\n\r\n", b"ffffffff\r\nx", b"-1\r\n", gzip.compress(b"x")[:-3]]),
)


@hypothesis_settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=RAW)
def test_any_bytes_from_the_server_make_a_result(standin: StandIn, connect: Connect, content: bytes) -> None:
    standin.reset()
    standin.fault("raw", body=content)
    with connect(standin, attempts=1, throttling=0, timeout=LONG) as client:
        result = client.update_user(USER)
    assert result is not None
    assert result.attempts == 1
    assert not result.ok or b"Success" in content
    assert result.reason or result.ok
    if result.status is None:
        assert result.retryable
    elif result.retryable:
        assert result.status in AGAIN


# How often and how soon it is tried again


@pytest.mark.parametrize(("failures", "attempts"), [(0, 1), (1, 2), (4, 5), (9, 5)])
def test_a_call_is_tried_so_often(standin: StandIn, connect: Connect, failures: int, attempts: int) -> None:
    standin.fault(status=500, body="{}", times=failures)
    succeeded = CallResult(USERS_UPDATE, True, 200, "Success", attempts=attempts)
    failed = CallResult(USERS_UPDATE, False, 500, None, "", IN_TROUBLE, "{}", attempts, True)
    assert connect(standin, attempts=5).update_user(USER) == (succeeded if failures < 5 else failed)
    assert standin.counters()["calls"] == {USERS_UPDATE: attempts}


@pytest.mark.parametrize("fault", ["reset_before", "reset_after", "cut"])
def test_a_broken_connection_is_tried_again_and_its_event_is_still_one(
    standin: StandIn, connect: Connect, fault: str
) -> None:
    standin.fault(fault, times=2)
    result = connect(standin).track_event(EVENT)
    assert result == CallResult(EVENTS_TRACK, True, 200, "Success", "Event with id: page-view-1 tracked.", attempts=3)
    assert len(standin.state()["events"]) == 1


@pytest.mark.parametrize("action", ["cut", "drip_body"])
def test_a_refusal_is_known_by_its_status_although_its_body_never_ends(
    standin: StandIn, connect: Connect, action: str
) -> None:
    """Above all, nothing is sent after a 401."""
    standin.fault(action, status=401, body=answer("BadApiKey", "Invalid API key"))
    client = connect(standin, timeout=0.5)
    result = client.update_user(USER)
    assert result is not None
    assert (result.status, result.attempts, client.stopped) == (401, 1, True)
    assert standin.counters()["calls"] == {USERS_UPDATE: 1}


def test_waits_double_from_half_a_second_to_30_with_full_jitter() -> None:
    policy = RetryPolicy()
    for failures, most in [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 30), (8, 30), (10_000, 30)]:
        waits = [policy.wait(failures) for _ in range(500)]
        assert 0 <= min(waits) < 0.1 * most < 0.9 * most < max(waits) <= most


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0),
        ("7", 7),
        ("0.5", 0.5),
        ("120", 120),
        ("86400", 120),
        ("9" * 5000, 120),
        ("inf", 120),
        ("-5", 0),
        ("-inf", 0),
        ("nan", None),
        ("", None),
        ("soon", None),
        ("1 2", None),
        ("1, 2", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 120),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 120),
        ("Fri, 99 Dec 9999 23:59:59 GMT", None),
    ],
)
def test_retry_after_is_honoured_up_to_two_minutes(header: str | None, seconds: float | None) -> None:
    assert RetryPolicy().retry_after(header) == seconds


DATES: list[Callable[[datetime], str]] = [  # the three forms that RFC 9110 asks every client to know
    lambda at: format_datetime(at, usegmt=True),
    lambda at: at.strftime("%A, %d-%b-%y %H:%M:%S GMT"),
    lambda at: at.strftime("%a %b %d %H:%M:%S %Y"),
]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("form", DATES)
def test_retry_after_may_be_a_date_and_is_then_utc(
    monkeypatch: pytest.MonkeyPatch, form: Callable[[datetime], str], zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        seconds = RetryPolicy().retry_after(form(datetime.now(timezone.utc) + timedelta(seconds=60)))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert seconds is not None
    assert 50 < seconds <= 60


@hypothesis_settings(deadline=None)
@given(st.text() | st.floats().map(str) | st.datetimes().map(lambda at: at.strftime("%a, %d %b %Y %H:%M:%S %z")))
def test_any_retry_after_is_ignored_or_within_two_minutes(header: str) -> None:
    seconds = RetryPolicy().retry_after(header)
    assert seconds is None or 0 <= seconds <= 120


def test_a_call_waits_as_long_as_retry_after_says(standin: StandIn, connect: Connect) -> None:
    standin.fault(status=503, headers={"Retry-After": "0.4"}, times=2)
    assert connect(standin).update_user(USER) == CallResult(USERS_UPDATE, True, 200, "Success", attempts=3)
    times = [call["t"] for call in standin.state()["journal"]]
    assert all(0.4 <= after - before < PROMPT for before, after in itertools.pairwise(times))


def test_a_429_uses_up_no_try(standin: StandIn, connect: Connect) -> None:
    standin.fault(status=429, headers={"Retry-After": "0.01"}, times=3)
    standin.fault(status=500, times=1)
    standin.fault(status=429, headers={"Retry-After": "0.01"}, times=1)
    result = connect(standin, attempts=2).update_user(USER)
    assert result == CallResult(USERS_UPDATE, True, 200, "Success", attempts=6)


def test_nothing_but_429_for_too_long_is_a_failure(standin: StandIn, connect: Connect) -> None:
    standin.fault(status=429, headers={"Retry-After": "0.1"}, body=answer("RateLimitExceeded", "slow down"))
    began = time.monotonic()
    result = connect(standin, attempts=1, throttling=0.3).update_user(USER)
    assert 0.3 <= time.monotonic() - began < PROMPT
    assert result is not None
    assert result.attempts > 2
    assert result == replace(
        interpret(USERS_UPDATE, 429, answer("RateLimitExceeded", "slow down")), attempts=result.attempts
    )


def test_the_five_minutes_of_429_begin_anew_after_any_other_answer(standin: StandIn, connect: Connect) -> None:
    for status in (429, 500, 429):
        standin.fault(status=status, headers={"Retry-After": "0.3"}, times=1)
    result = connect(standin, throttling=0.5).update_user(USER)
    assert result == CallResult(USERS_UPDATE, True, 200, "Success", attempts=4)


# How fast calls may start


class VirtualTime:
    """A clock that stands still while a thread works. Of the threads only one works at a time, the others sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._asleep: list[tuple[float, int, threading.Event]] = []
        self._counter = itertools.count()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        mine = self._go_to_bed(seconds)
        self._wake_the_next()
        mine.wait()

    def run(self, *works: Callable[[], None]) -> None:
        """Run each in a thread of its own, until all have ended."""

        def run(mine: threading.Event, work: Callable[[], None]) -> None:
            mine.wait()
            try:
                work()
            finally:
                self._wake_the_next()

        with ThreadPoolExecutor(len(works)) as pool, mock.patch("iterable_client.monotonic", self.monotonic):
            done = [pool.submit(run, self._go_to_bed(0), work) for work in works]
            self._wake_the_next()
            for future in done:
                future.result()

    def wait_for(self, awoken: threading.Event) -> None:
        """Sleep until another thread, which then calls `wake`, is so kind."""
        self._wake_the_next()
        awoken.wait()

    def wake(self, awoken: threading.Event) -> None:
        heapq.heappush(self._asleep, (self.now, next(self._counter), awoken))

    def _go_to_bed(self, seconds: float) -> threading.Event:
        mine = threading.Event()
        heapq.heappush(self._asleep, (self.now + seconds, next(self._counter), mine))
        return mine

    def _wake_the_next(self) -> None:
        if self._asleep:
            self.now, _, sleeper = heapq.heappop(self._asleep)
            sleeper.set()


class VirtualStop(threading.Event):
    """A stop that nobody asks for. Whoever waits for it wakes up a little late, as threads do."""

    def __init__(self, clock: VirtualTime, late: Iterator[float]) -> None:
        super().__init__()
        self._clock, self._late = clock, late

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.sleep(timeout + next(self._late))
        return self.is_set()


class VirtualLock(contextlib.AbstractContextManager[None]):
    """Goes to those who wait for it in the order in which they came."""

    def __init__(self, clock: VirtualTime) -> None:
        self._clock, self._held, self._waiting = clock, False, deque[threading.Event]()

    def __enter__(self) -> None:
        if self._held:
            self._waiting.append(threading.Event())
            self._clock.wait_for(self._waiting[-1])
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = bool(self._waiting)
        if self._waiting:
            self._clock.wake(self._waiting.popleft())


def virtual_limiter(clock: VirtualTime, rate: float, late: Iterable[float] = (0.0,)) -> RateLimiter:
    limiter = RateLimiter(rate, VirtualStop(clock, itertools.cycle(late)))
    limiter._turn = VirtualLock(clock)
    return limiter


TIMES = st.lists(st.floats(0, 0.02) | st.floats(0, 3), min_size=1, max_size=20)
LATE = st.lists(st.floats(0, 0.02) | st.floats(0, 3), min_size=1, max_size=20)


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    rate=st.integers(1, 40),
    threads=st.integers(1, 6),
    busy=TIMES,
    late=LATE,
    answers=st.lists(st.sampled_from([None, "429", 0.1, 2.5]), min_size=1, max_size=30),
)
def test_never_more_than_rate_calls_start_in_any_second_and_none_in_a_pause(
    rate: int, threads: int, busy: list[float], late: list[float], answers: list[Any]
) -> None:
    clock = VirtualTime()
    limiter = virtual_limiter(clock, rate, late)
    works, replies = itertools.cycle(busy), itertools.cycle(answers)
    starts: list[float] = []
    pauses: list[tuple[float, float]] = []

    def worker() -> None:
        while len(starts) < 3 * rate + 5:
            assert limiter.acquire()
            sent_at = clock.now
            starts.append(sent_at)
            clock.sleep(next(works))
            reply = next(replies)
            if reply is None:
                limiter.accepted(sent_at)
            else:
                asked = None if reply == "429" else reply
                limiter.throttled(sent_at, asked)
                if asked and not any(begin < sent_at < end for begin, end in pauses):
                    pauses.append((clock.now, clock.now + asked))

    clock.run(*[worker] * threads)
    assert all(later - first >= 1 - 1e-9 for first, later in zip(starts, starts[rate:], strict=False))
    for begin, end in pauses:
        assert not [start for start in starts if begin < start < end - 1e-9]


def test_calls_start_evenly_and_close_to_the_rate() -> None:
    clock, starts = VirtualTime(), []
    limiter = virtual_limiter(clock, 50)

    def worker() -> None:
        for _ in range(100):
            assert limiter.acquire()
            starts.append(clock.now)
            clock.sleep(0.3)

    clock.run(*[worker] * 20)
    gaps = [after - before for before, after in itertools.pairwise(starts[2:])]
    assert min(gaps) == pytest.approx(max(gaps), abs=1e-6)
    assert 1 / 50 <= gaps[0] <= 1 / (0.95 * 50)


def starts_a_second(refused_at: list[float], seconds: int) -> list[int]:
    """How many calls of a limiter of 100 a second start in each second, when those at such times get a 429."""
    clock = VirtualTime()
    limiter, begin, starts = virtual_limiter(clock, 100), clock.now, [0] * seconds
    refusals = [begin + at for at in refused_at]

    def worker() -> None:
        while limiter.acquire() and clock.now < begin + seconds:
            starts[int(clock.now - begin)] += 1
            if refusals and clock.now >= refusals[0]:
                refusals.pop(0)
                limiter.throttled(clock.now, 0.0)
            else:
                limiter.accepted(clock.now)

    clock.run(worker)
    return starts


def test_a_429_lowers_the_rate_by_30_percent_and_it_climbs_back() -> None:
    starts = starts_a_second([2], 30)
    full = starts[1]
    assert 95 <= full <= 100
    assert 0.69 * full <= starts[2] <= 0.85 * full
    assert starts[2:20] == sorted(starts[2:20])
    assert starts[20:] == pytest.approx([full] * 10, abs=1)


def test_the_rate_falls_at_most_once_a_second() -> None:
    once = starts_a_second([2], 5)
    assert starts_a_second([2, 2.1, 2.2, 2.3, 2.4], 5) == pytest.approx(once, abs=2)
    assert starts_a_second([2, 3.1], 5)[4] <= 0.8 * once[4]


def pauses(refusals: list[int], latency: float = 0.3) -> list[float]:
    """The pauses of an endpoint that refuses so many calls in a row, accepts one, refuses again so many, and so on."""
    clock = VirtualTime()
    limiter, waits = virtual_limiter(clock, 1000), []

    def worker() -> None:
        for in_a_row in refusals:
            for _ in range(in_a_row):
                assert limiter.acquire()
                sent_at = clock.now
                clock.sleep(latency)
                answered_at = clock.now
                limiter.throttled(sent_at, None)
                assert limiter.acquire()
                waits.append(clock.now - answered_at)
            limiter.accepted(clock.now)

    clock.run(worker)
    return waits


@pytest.mark.parametrize("latency", [0.0, 0.05, 1.0])
def test_the_pause_doubles_up_to_30_seconds_while_there_is_nothing_but_429(latency: float) -> None:
    waits = pauses([12, 3], latency)
    first = waits[0]
    assert 0.1 <= first <= 1
    doubled = [min(first * 2**number, 30) for number in range(12)]
    assert waits == pytest.approx([*doubled, *doubled[:3]], abs=0.03)


def test_refusals_of_calls_from_before_the_pause_count_as_one() -> None:
    clock = VirtualTime()
    limiter = virtual_limiter(clock, 1000)

    def worker() -> None:
        sent_at = clock.now
        for _ in range(50):
            limiter.throttled(sent_at, None)
            clock.sleep(0.001)
        assert limiter.acquire()
        assert clock.now - sent_at == pytest.approx(pauses([1])[0], abs=0.03)

    clock.run(worker)


def test_events_may_start_four_times_as_fast(standin: StandIn, connect: Connect, threads: ThreadPoolExecutor) -> None:
    client = connect(standin, rate=50, workers=8)
    began = time.monotonic()
    updates = list(threads.map(client.update_user, [USER] * 51))
    between = time.monotonic()
    events = list(threads.map(client.track_event, [EVENT] * 101))
    assert all(result and result.ok for result in [*updates, *events])
    assert between - began >= 0.95
    assert 0.45 <= time.monotonic() - between < 1.5
    assert standin.counters()["busiest_second"][USERS_UPDATE] <= 51


def test_a_429_pauses_every_worker_of_its_endpoint_and_no_other(
    standin: StandIn, connect: Connect, threads: ThreadPoolExecutor
) -> None:
    standin.fault(status=429, headers={"Retry-After": "0.6"}, endpoint=USERS_UPDATE, skip=20, times=1)
    client = connect(standin, rate=200, workers=16)
    updating = [threads.submit(lambda: [client.update_user(USER) for _ in range(12)]) for _ in range(8)]
    while not all(future.done() for future in updating):
        assert client.track_event(EVENT)
    results = [result for future in updating for result in future.result()]
    assert sorted(result.attempts for result in results if result and result.ok) == [1] * 95 + [2]
    journal = standin.state()["journal"]
    times = [call["t"] for call in journal if call["endpoint"] == USERS_UPDATE]
    pause, first = max((after - before, number) for number, (before, after) in enumerate(itertools.pairwise(times), 1))
    assert pause >= 0.5
    others = [call for call in journal if call["endpoint"] == EVENTS_TRACK]
    assert [call for call in others if times[first - 1] + 0.1 < call["t"] < times[first] - 0.1]
    assert times[first + 50] - times[first] >= 0.3  # 50 calls at 70 % of the rate take 0.36 s, at the whole 0.26


# Stopping


@pytest.mark.parametrize(
    "reply",
    [
        {"action": "reset_before"},
        {"status": 503},
        {"status": 503, "headers": {"Retry-After": str(LONG)}},
        {"status": 429, "headers": {"Retry-After": str(LONG)}},
    ],
    ids=["backoff without answer", "backoff", "retry-after", "pause"],
)
def test_a_stop_cuts_the_wait_for_the_next_try(
    standin: StandIn, connect: Connect, threads: ThreadPoolExecutor, reply: dict[str, Any]
) -> None:
    standin.fault(**reply)
    stop = threading.Event()
    retry = RetryPolicy(first_wait=1e9, longest_wait=1e9)  # of which full jitter never takes less than seconds
    client = connect(standin, stop=stop, retry=retry)
    calling = threads.submit(client.update_user, USER)
    standin.wait_for_calls(1)
    stop.set()
    result = calling.result(PROMPT)
    assert result is not None
    assert (result.ok, result.status, result.attempts) == (False, reply.get("status"), 1)
    assert standin.counters()["calls"] == {USERS_UPDATE: 1}


@pytest.mark.parametrize("waiting_for", ["its turn", "the end of a pause"])
def test_a_stop_cuts_the_wait_before_the_first_try(
    standin: StandIn, connect: Connect, threads: ThreadPoolExecutor, waiting_for: str
) -> None:
    stop = threading.Event()
    if waiting_for == "its turn":
        client = connect(standin, stop=stop, rate=1 / LONG)
        assert client.update_user(USER)
    else:
        standin.fault(status=429, headers={"Retry-After": str(LONG)})
        client = connect(standin, stop=stop, throttling=0)
        assert client.update_user(USER)
    calling = [threads.submit(client.update_user, USER) for _ in range(8)]
    assert not any(future.done() for future in calling)
    stop.set()
    assert [future.result(PROMPT) for future in calling] == [None] * 8
    assert standin.counters()["calls"] == {USERS_UPDATE: 1}


def test_after_a_stop_a_started_user_gets_the_second_call_and_no_other_gets_any(
    standin: StandIn, connect: Connect
) -> None:
    stop = threading.Event()
    client = connect(standin, stop=stop, rate=1 / LONG)
    assert client.track_event(EVENT)  # so that the next has to wait
    stop.set()
    assert client.stopped
    assert client.update_user(USER) is None
    result = client.track_event(EVENT)
    assert result is not None
    assert (result.ok, result.attempts) == (True, 1)
    for status in (503, 429):
        standin.fault(status=status, times=1)
        result = client.track_event(EVENT)
        assert result is not None
        assert (result.status, result.attempts) == (status, 1)
    assert standin.counters()["calls"] == {EVENTS_TRACK: 4}


def test_after_halt_nothing_is_sent(standin: StandIn, connect: Connect, threads: ThreadPoolExecutor) -> None:
    client = connect(standin, rate=1 / LONG)
    assert client.track_event(EVENT)
    waiting = threads.submit(client.track_event, EVENT)
    client.halt()
    assert waiting.result(PROMPT) is None
    assert (client.stopped, client.update_user(USER), client.track_event(EVENT)) == (True, None, None)
    assert standin.counters()["calls"] == {EVENTS_TRACK: 1}


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_every_wait_and_lets_the_calls_on_the_wire_end(
    standin: StandIn, connect: Connect, threads: ThreadPoolExecutor, status: int
) -> None:
    client = connect(standin)
    standin.fault(email="slow@example.com", latency=0.5)
    standin.fault(email="late@example.com", status=503, headers={"Retry-After": str(LONG)})
    standin.fault(email="last@example.com", status=status)
    on_the_wire = threads.submit(client.update_user, {"email": "slow@example.com"})
    in_a_wait = threads.submit(client.track_event, {**EVENT, "email": "late@example.com"})
    standin.wait_for_calls(2)
    refused = client.update_user({"email": "last@example.com"})
    assert refused is not None
    assert (refused.status, refused.attempts, refused.key_refused, client.stopped) == (status, 1, True, True)
    assert (client.update_user(USER), client.track_event(EVENT)) == (None, None)
    assert on_the_wire.result(PROMPT) == CallResult(USERS_UPDATE, True, 200, "Success")
    waited = in_a_wait.result(PROMPT)
    assert waited is not None
    assert (waited.status, waited.attempts) == (503, 1)
    assert standin.counters()["calls"] == {USERS_UPDATE: 2, EVENTS_TRACK: 1}


# Secrets

ODD_KEY = 'Abc"\\d%e/F+1=234&<567>'
ECHOES: dict[str, str] = {
    "as it is": f"<p>bad key {ODD_KEY}</p>",
    "in HTML": f"<p>bad key {html.escape(ODD_KEY)}</p>",
    "in other case": answer("BadParams", ODD_KEY.swapcase()),
    "as JSON text": answer("BadParams", f"Api-Key: {ODD_KEY}"),
    "as code": answer(f"Bad{ODD_KEY}"),
    "percent-encoded": answer("BadParams", f"?api_key={quote(ODD_KEY, safe='')}"),
    "percent-encoded in small letters": f"?api_key={quote(ODD_KEY, safe='').lower()}",
    "in Python's way": f"{{'Api-Key': {ODD_KEY!r}}}",
    "as JSON that escapes more than it must": answer("BadParams", ODD_KEY).replace("/", "\\/").replace("=", "\\u003d"),
    "as JSON that escapes everything": answer("BadParams", "?").replace(
        "?", "".join(f"\\u{ord(letter):04x}" for letter in ODD_KEY)
    ),
    "where the text is cut": answer("BadParams", "x" * 490 + ODD_KEY),
    "where the body is cut": "x" * 490 + ODD_KEY,
    "as a field that mismatches": mismatch(ODD_KEY, incomingTypes=[ODD_KEY], offendingValue=ODD_KEY),
}


def leaks(text: str) -> bool:
    """Whether the key, or the most of it, stands in a text in any way that a person could undo."""
    text = text.lower()
    ways = {ODD_KEY, json.dumps(ODD_KEY)[1:-1], quote(ODD_KEY, safe=""), repr(ODD_KEY)[1:-1], html.escape(ODD_KEY)}
    pieces = {way[start : start + 8].lower() for way in ways for start in range(len(way) - 8)}
    return any(piece in text for piece in pieces)


@pytest.mark.parametrize("text", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_an_echoed_key_is_in_no_field_of_a_result_and_no_line_of_the_log(
    standin: StandIn, connect: Connect, caplog: pytest.LogCaptureFixture, status: int, text: str
) -> None:
    caplog.set_level("DEBUG")
    standin.fault(status=status, body=text)
    result = connect(standin, redact=Redactor([ODD_KEY]), attempts=2).update_user(USER)
    assert result is not None
    assert result.status == status
    assert [field for field in astuple(result) if leaks(str(field))] == []
    assert not leaks(caplog.text)


def test_the_key_that_iterable_echoes_with_all_headers_is_redacted(standin: StandIn, connect: Connect) -> None:
    standin.fault("echo_headers")
    result = connect(standin).track_event(EVENT)
    assert result is not None
    assert (result.status, result.code) == (400, "BadJsonBody")
    assert "'api-key': '[secret]'" in result.message
    assert KEY not in repr(result)


@pytest.mark.parametrize("word", ["success", "tracking", "ForgottenUserError", "RequestFieldsTypesMismatched"])
def test_a_secret_that_is_a_word_of_the_api_changes_no_outcome(word: str) -> None:
    redact = Redactor([word])
    assert interpret(USERS_UPDATE, 200, SUCCESS, redact).ok
    assert not interpret(EVENTS_TRACK, 200, answer("Success", "x is disallowed from tracking."), redact).ok
    assert interpret(USERS_UPDATE, 409, answer("ForgottenUserError"), redact).forgotten
    assert not interpret(USERS_UPDATE, 500, mismatch("x"), redact).retryable


# What goes wrong on the way


@contextlib.contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """A server; its port."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(standin: StandIn, connect: Connect, status: int) -> None:
    with Trap() as trap:
        standin.fault(status=status, headers={"Location": f"{trap.url}/api/users/update"})
        result = connect(standin).update_user(USER)
        assert result == CallResult(USERS_UPDATE, False, status, reason=REDIRECT)
        assert (trap.connections, trap.received) == (0, b"")
    assert standin.counters()["calls"] == {USERS_UPDATE: 1}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expired", "certificate has expired"),
        ("self-signed", "self-signed certificate"),
        ("wrong-name", "Hostname mismatch, certificate is not valid for 'localhost'."),
    ],
)
def test_a_certificate_that_is_not_trusted_ends_the_call_before_the_key_is_sent(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, kind: Any, words: str
) -> None:
    with StandIn(tls=kind) as standin:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(standin.ca_file))
        result = connect(standin).update_user(USER)
        advice = f"{CHECK_URL}; a company's own authority goes into REQUESTS_CA_BUNDLE"
        message = f"the server's certificate is not trusted ({words}): {advice}"
        assert result == no_answer(message, attempts=1, again=False)
        assert standin.counters()["calls"] == {}


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_companys_own_authority_is_trusted_when_the_environment_names_it(
    secure: StandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert not connect(secure, attempts=1).update_user(USER).ok
    monkeypatch.setenv(variable, str(secure.ca_file))
    assert connect(secure, attempts=1).update_user(USER).ok


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_ca_file_that_is_of_no_use_is_an_error_that_names_it(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    ca_file = tmp_path / "ca.pem"
    if content:
        ca_file.write_text(content)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca_file))
    with pytest.raises(OSError, match="REQUESTS_CA_BUNDLE") as error:
        connect("https://localhost")
    assert str(ca_file) in str(error.value)


def test_a_refused_connection_is_tried_again_and_told(connect: Connect) -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        result = connect(f"http://127.0.0.1:{taken.getsockname()[1]}").update_user(USER)
    assert result == no_answer(f"no connection (Connection refused): {CHECK_URL}", attempts=3)


def test_a_limit_on_open_files_is_told(standin: StandIn, connect: Connect) -> None:
    client = connect(standin)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)  # that is free
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        result = client.update_user(USER)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    words = "too many open connections: lower MAX_WORKERS, or raise the limit of open files (ulimit -n)"
    assert result == no_answer(words, attempts=3)


@pytest.mark.parametrize("host", ["api.iterable.invalid", "api..iterable.com", f"{'a' * 64}.com"])
def test_an_unknown_host_is_tried_again_and_told(connect: Connect, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Without a real resolver: where there is no internet, the real one takes its time."""

    def resolve(host: str, *_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, f"Name or service not known: {host}")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    result = connect(f"https://{host}").update_user(USER)
    assert result == no_answer(f"the host name is unknown (DNS): {CHECK_URL}", attempts=3)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_host_that_is_silent_from_the_start_costs_the_timeout(connect: Connect, scheme: str) -> None:
    with Trap() as trap:
        began = time.monotonic()
        result = connect(f"{scheme}://localhost:{trap.port}", attempts=2, timeout=0.3).update_user(USER)
        assert 0.6 <= time.monotonic() - began < PROMPT
        assert result == no_answer(TOO_SLOW, attempts=2)
        assert (KEY.encode() in trap.received) == (scheme == "http")


@pytest.mark.parametrize(
    "fault",
    [
        {"action": "silence"},
        {"action": "drip", "interval": 0.1},
        {"action": "drip_body", "interval": 0.1, "body": "x" * 1000, "status": 200},
        {"action": "raw", "body": "HTTP/1.1 200 OK\r\nContent-Length: 41\r\n\r\n{", "keep_open": True},
        {"action": "raw", "body": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe", "keep_open": True},
        {"latency": LONG},
    ],
    ids=["silence", "drip of the head", "drip of the body", "half a body", "half a chunk", "late"],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_answer_has_to_be_whole_within_the_timeout(
    standin: StandIn, secure: StandIn, connect: Connect, scheme: str, fault: dict[str, Any]
) -> None:
    server = standin if scheme == "http" else secure
    server.fault(**fault)
    began = time.monotonic()
    result = connect(server, attempts=1, timeout=0.3).update_user(USER)
    assert 0.3 <= time.monotonic() - began < 3
    assert result == no_answer(TOO_SLOW, attempts=1)


def test_every_call_has_the_whole_timeout_for_itself(standin: StandIn, connect: Connect) -> None:
    standin.configure(latency=0.3)
    client = connect(standin, attempts=1, timeout=0.5)
    assert [client.update_user(USER) for _ in range(3)] == [CallResult(USERS_UPDATE, True, 200, "Success")] * 3
    assert standin.counters()["connections"] == 1


@pytest.mark.parametrize("action", ["reset_before", "reset_after", "cut", "raw"])
def test_an_answer_that_breaks_off_is_told(standin: StandIn, connect: Connect, action: str) -> None:
    standin.fault(action)
    assert connect(standin).update_user(USER) == no_answer(BROKEN, attempts=3)


def test_an_answer_that_comes_before_the_request_is_whole_counts(connect: Connect) -> None:
    """As nginx gives it to a body over its limit, whose rest it refuses."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(100)
            self.request.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.request.shutdown(socket.SHUT_RD)
            self.request.close()

    with serving(Handler) as port:
        result = connect(f"http://127.0.0.1:{port}").update_user({**USER, "dataFields": {"x": "x" * 20_000_000}})
    assert result is not None
    assert (result.status, result.attempts) == (413, 1)


def test_an_answer_after_an_interim_one_is_no_answer_to_the_next_call(connect: Connect) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(65536):
                self.request.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                time.sleep(0.05)
                with contextlib.suppress(OSError):
                    self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with serving(Handler) as port:
        client = connect(f"http://127.0.0.1:{port}", attempts=1)
        assert [client.update_user(USER).status for _ in range(3)] == [103, 103, 103]


def test_a_server_that_speaks_no_tls_is_told(connect: Connect) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            self.request.recv(65536)

    with serving(Handler) as port:
        result = connect(f"https://localhost:{port}").update_user(USER)
    assert result is not None
    assert (result.status, result.retryable, result.attempts) == (None, True, 3)
    assert result.reason.startswith("no encrypted connection (")
    assert result.reason.endswith(CHECK_URL)


def test_of_a_giant_answer_only_the_beginning_is_read(standin: StandIn, connect: Connect) -> None:
    """More than this beginning never comes, and is not waited for."""
    head = f"HTTP/1.1 502 Bad Gateway\r\nContent-Length: {10**12}\r\n\r\n"
    standin.fault("raw", body=head + "x" * 70_000, keep_open=True, times=1)
    began = time.monotonic()
    client = connect(standin, attempts=1, timeout=LONG)
    result = client.update_user(USER)
    assert time.monotonic() - began < PROMPT
    assert result == CallResult(USERS_UPDATE, False, 502, None, "", IN_TROUBLE, "x" * 500, retryable=True)
    assert client.update_user(USER) == CallResult(USERS_UPDATE, True, 200, "Success")


def test_a_compressed_answer_is_read_and_a_bomb_does_not_go_off(standin: StandIn, connect: Connect) -> None:
    client = connect(standin, attempts=1)
    gzipped = {"status": 200, "headers": {"Content-Encoding": "gzip"}, "times": 1}
    standin.fault(body=gzip.compress(SUCCESS.encode()), **gzipped)
    assert client.update_user(USER) == CallResult(USERS_UPDATE, True, 200, "Success")
    standin.fault(body=gzip.compress(b"x" * 100_000_000, 1), **gzipped)
    tracemalloc.start()
    try:
        result = client.update_user(USER)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert result == CallResult(USERS_UPDATE, False, 200, None, "", NOT_ITERABLE, "x" * 500)


# Connections and proxies


def test_a_request_is_sent_in_one_piece(connect: Connect) -> None:
    pieces: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while piece := self.request.recv(65536):
                pieces.append(piece)
                if piece.endswith(b"}"):
                    self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(SUCCESS))
                    self.request.sendall(SUCCESS.encode())

    with serving(Handler) as port:
        client = connect(f"http://127.0.0.1:{port}")
        assert all(client.update_user(USER) for _ in range(50))
    assert [(piece[:4], json.loads(piece.partition(b"\r\n\r\n")[2])) for piece in pieces] == [(b"POST", USER)] * 50


def test_connections_are_reused_one_for_each_busy_thread(
    secure: StandIn, connect: Connect, threads: ThreadPoolExecutor
) -> None:
    secure.configure(latency=0.01)
    secure.fault(status=500, body="{}", skip=7, times=7)
    secure.fault(status=400, body=answer("BadParams"), skip=20, times=7)
    client = connect(secure, workers=16)

    def user(_: int) -> bool:
        return all([client.update_user(USER), client.track_event(EVENT)])

    working = [threads.submit(lambda: all(map(user, range(12)))) for _ in range(16)]
    assert all(future.result() for future in working)
    counters = secure.counters()
    assert sum(counters["calls"].values()) == 16 * 12 * 2 + 7
    assert counters["connections"] <= 16


def test_a_connection_that_the_server_has_closed_costs_no_attempt(standin: StandIn, connect: Connect) -> None:
    standin.fault(status=200, body=SUCCESS, headers={"Connection": "close"})
    client = connect(standin, attempts=1)
    assert [client.update_user(USER) for _ in range(3)] == [CallResult(USERS_UPDATE, True, 200, "Success")] * 3
    assert standin.counters()["connections"] == 3


class Proxy:
    """An HTTP proxy. It opens tunnels, once it is let, or gives everyone the one `reply`; `heads` are the requests that
    it got. With `certificate`, a PEM file of chain and key, it is spoken to over TLS."""

    def __init__(self, reply: str = "", let: threading.Event | None = None, certificate: Path | None = None) -> None:
        heads: list[list[str]] = []

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                if certificate:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(certificate)
                    self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def handle(self) -> None:
                heads.append([])
                while line := self.rfile.readline().decode().strip():
                    heads[-1].append(line)
                if reply:
                    self.wfile.write(reply.encode())
                    return
                assert let is None or let.wait(LONG)
                host, _, port = heads[-1][0].split()[1].rpartition(":")
                with socket.create_connection((host, int(port))) as target:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                    join(self.request, target)

        self.heads = heads
        self._serving = serving(Handler)

    def __enter__(self) -> Proxy:
        self.address = f"127.0.0.1:{self._serving.__enter__()}"
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.__exit__(None, None, None)


def join(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until an end closes."""
    while True:
        for source in select.select([one, other], [], [])[0]:
            data = source.recv(65536)
            if not data:
                return
            (other if source is one else one).sendall(data)


def test_a_proxy_tunnels_and_the_environment_is_asked_for_it_once(
    secure: StandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://ann:p%40ss@{proxy.address}")
        client = connect(secure)
        monkeypatch.delenv("HTTPS_PROXY")
        assert [client.update_user(USER).ok for _ in range(3)] == [True] * 3
    assert secure.counters()["connections"] == 1
    assert len(proxy.heads) == 1
    assert proxy.heads[0][0].startswith(f"CONNECT localhost:{secure.port} HTTP/1.")
    assert "Proxy-Authorization: Basic YW5uOnBAc3M=" in proxy.heads[0]
    assert KEY not in str(proxy.heads)


def test_a_proxy_that_is_spoken_to_over_tls_is_trusted_by_the_same_authority(
    secure: StandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert secure.ca_file
    both = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(both.cert_pem.bytes() + secure.ca_file.read_bytes())
    both.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "proxy.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    with Proxy(certificate=tmp_path / "proxy.pem") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"https://{proxy.address}")
        assert connect(secure, attempts=1).update_user(USER) == CallResult(USERS_UPDATE, True, 200, "Success")
    assert len(proxy.heads) == 1


def test_a_call_that_was_still_connecting_at_the_halt_is_not_sent(
    secure: StandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor
) -> None:
    let = threading.Event()
    with Proxy(let=let) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        client = connect(secure)
        waiting = threads.submit(client.update_user, USER)
        while not proxy.heads:
            time.sleep(0.01)
        client.halt()
        let.set()
        assert waiting.result(LONG) is None
    assert secure.counters()["calls"] == {}


@pytest.mark.parametrize("spared", ["localhost", "*"])
def test_no_proxy_spares_a_host(
    secure: StandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch, spared: str
) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        monkeypatch.setenv("NO_PROXY", spared)
        assert connect(secure).update_user(USER).ok
    assert proxy.heads == []


@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_plain_http_goes_by_no_proxy_which_would_read_the_key(
    standin: StandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv(variable, f"http://{proxy.address}")
        assert connect(standin).update_user(USER).ok
    assert proxy.heads == []


@pytest.mark.parametrize("broken", ["refuses", "is away", "is silent"])
def test_a_proxy_that_does_not_work_is_told_as_such(
    secure: StandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    with Proxy("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n") as proxy, Trap() as trap:
        address = {"refuses": proxy.address, "is away": "127.0.0.1:1", "is silent": f"127.0.0.1:{trap.port}"}[broken]
        monkeypatch.setenv("HTTPS_PROXY", f"http://ann:geheim@{address}")
        result = connect(secure, attempts=2, timeout=0.3).update_user(USER)
    assert result is not None
    assert (result.status, result.retryable, result.attempts) == (None, True, 2)
    assert result.reason == TOO_SLOW if broken == "is silent" else "HTTPS_PROXY" in result.reason
    assert "geheim" not in repr(result)
    assert secure.counters()["calls"] == {}


@pytest.mark.parametrize(
    "address", ["http://[::1", "http://proxy:99999999", "http://:80", "ftp://proxy", "socks5://p:1"]
)
def test_a_proxy_address_that_is_of_no_use_is_an_error_that_names_the_variable(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", address)
    with pytest.raises(OSError, match="HTTPS_PROXY"):
        connect("https://localhost")
