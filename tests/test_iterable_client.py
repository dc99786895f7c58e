"""iterable_client.py as functions, in virtual time, and on the wire: payloads, answers, retries, rate and stopping."""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import astuple, replace
from datetime import datetime, timedelta, timezone
from operator import attrgetter
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterable_client as iterable
from db_connection import Record
from iterable_client import CallResult, IterableClient, RateLimiter, RetryPolicy, interpret, interpret_bulk
from lab import answers
from lab.answers import BROKEN, GROUP, ONE, SUCCESS, TOO_SLOW, Answer, BulkAnswer, document
from lab.standin_handle import EVENTS_TRACK, EVENTS_TRACK_BULK, KEY, USERS_BULK_UPDATE, USERS_UPDATE, StandIn, Trap
from logger_config import redactor

Patch = pytest.MonkeyPatch
ENDPOINTS = (USERS_UPDATE, EVENTS_TRACK, USERS_BULK_UPDATE, EVENTS_TRACK_BULK)
PROMPT = 10.0  # seconds within which a call comes back whose wait was cut, on however busy a machine
WAITS = {"Retry-After": "40"}  # longer than a test takes
UPDATED = CallResult(USERS_UPDATE, True, 200, "Success")
AT = "2026-01-13 14:30:45"
ROW = Record(2, "Sarah", GROUP[0], "pro", 37, "pricing", "desktop", "San Francisco, US", AT)
ZONED = ("2026-01-13 14:30:45+02:00", "2026-01-13 02:30:45 PM")
NO_TIMES = (None, "", "0000-00-00 00:00:00", "2026-01-13", "2026-W03-2", 1_768_012_341_230, *ZONED)
PROFILE = {"first_name": "Sarah", "plan_type": "pro", "recent_page_view": True, "candidate": "yes"}
VIEW = {"page": "pricing", "browser": "desktop", "location": "San Francisco, US", "timestamp": AT}
USER: dict[str, Any] = {"email": GROUP[0], "dataFields": PROFILE}
EVENT: dict[str, Any] = {"email": GROUP[0], "eventName": "page_view", "id": "page-view-37", "createdAt": 1_768_314_645}
EVENT |= {"dataFields": {**VIEW, "candidate": "yes"}}


# A client and what it meets


@pytest.fixture(scope="module")
def secure() -> Iterator[StandIn]:
    """As `standin`, over TLS; its authority is the only one that is trusted here."""
    with StandIn(tls="good") as standin:
        yield standin


@pytest.fixture(autouse=True)
def environment(secure: StandIn, monkeypatch: Patch) -> Iterator[None]:
    """No proxy, whatever this machine has, a small CA file, and a local time that is not UTC."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name == "CURL_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(secure.ca_file))
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(9) as pool:
        yield pool


USERS = {email: iterable.compact_json({**USER, "email": email}) for email in GROUP}
EVENTS = {email: iterable.compact_json({**EVENT, "email": email}) for email in GROUP}


class Client(IterableClient):
    """One that loses no time by itself."""

    def __init__(self, server: Any, attempts: int = 3, throttling: float = 300, **options: Any) -> None:
        retry = RetryPolicy(attempts, first_wait=0.001, longest_throttling=throttling)
        self.stop = threading.Event()
        defaults = {"api_key": KEY, "rate": 10_000, "timeout": PROMPT, "workers": 8, "retry": retry, "stop": self.stop}
        super().__init__(server if isinstance(server, str) else server.url, **{**defaults, **options})
        self.redact = redactor(options.get("api_key", KEY), "geheim")  # as main.py does

    def call(self, endpoint: str = USERS_UPDATE) -> Any:
        """The verdict on one, or on the first of three when it is a bulk endpoint."""
        single, bodies = (USERS_UPDATE, USERS) if endpoint.startswith("users") else (EVENTS_TRACK, EVENTS)
        return self.post(single, bodies if "ulk" in endpoint else {ONE: bodies[ONE]}).get(ONE)


def told(verdict: Any) -> Any:
    return verdict and (verdict.ok, verdict.status, verdict.attempts)


# Payloads


def payloads(**change: Any) -> list[Any]:
    """Both payloads of ROW with other values, as Iterable gets them."""
    row = ROW._replace(**change)
    return [json.loads(iterable.compact_json(make(row))) for make in (iterable.user_payload, iterable.event_payload)]


def test_a_row_becomes_these_two_payloads() -> None:
    assert payloads() == [USER, EVENT]
    assert payloads(email="\u00a0USER1@Example.com\t\n", event_time=f"{AT}.999999") == [USER, EVENT]
    assert payloads(view_id="x" * 502) == [USER, {**EVENT, "id": "page-view-" + "x" * 502}]
    user, event = payloads(first_name="", plan_type=None, page=None)
    assert user["dataFields"] == {"first_name": "", "recent_page_view": True, "candidate": "yes"}
    assert [*event["dataFields"]] == ["browser", "location", "timestamp", "candidate"]


def test_a_time_is_utc_wherever_the_program_runs() -> None:
    seconds = {
        "1000-01-01 00:00:00": -30_610_224_000,
        "1969-12-31 23:59:59.999999": -1,
        "2026-03-29 02:30:00": 1_774_751_400,  # which no clock in Berlin shows
        "9999-12-31 23:59:59": 253_402_300_799,
    }
    assert {text: payloads(event_time=text)[1]["createdAt"] for text in seconds} == seconds


def test_an_address_that_is_odd_is_iterables_to_judge() -> None:
    for email in ("नि\u200dक@example.com", "a\tb@example.com", "\U0001fae8@example.com"):
        assert [payload["email"] for payload in payloads(email=email)] == [email, email]


@pytest.mark.parametrize("value", ["\0 '\"\\\u202e", "Zoë 😀", "1.50", 0, -5])
def test_a_value_is_sent_as_text(value: str | int) -> None:
    assert payloads(first_name=value)[0]["dataFields"]["first_name"] == str(value)
    assert payloads(location=value)[1]["dataFields"]["location"] == str(value)


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        (
            "email",
            (None, "", " \t\n", "sarah.johnson", 5, "jos\udce9@x"),
            "no usable e-mail address: correct it in the customers",
        ),
        ("event_time", NO_TIMES, "event_time is not a date with a time: correct the column in page_views"),
        ("view_id", (None, "", "a b", "ä", "37\n", "37.5", "x" * 503), "the view's id cannot be an event's"),
        ("location", ("Jos\udce9",), "location is no text in UTF-8: change the column's type"),
    ],
)
def test_a_row_that_cannot_be_sent_says_why(column: str, values: tuple[Any, ...], reason: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
            payloads(**{column: value})


# What an answer means


@pytest.mark.parametrize("answer", answers.ANSWERED, ids=attrgetter("id"))
def test_an_answer_means_what_the_table_says(answer: Answer) -> None:
    assert interpret(USERS_UPDATE, answer.fault["status"], answer.fault["body"]) == answer.result


def test_a_clash_of_types_may_be_told_in_any_form_and_nested_as_deep_as_it_likes() -> None:
    clash = '{"code":"RequestFieldsTypesMismatched","params":{"validationErrors":%s}}'
    nested = (f'{{"x":{{"incomingTypes":{"[" * depth + "]" * depth}}}}}' for depth in [*range(1, 2000, 7), 100_000])
    for fields in ("[]", '{"x":{}}', *nested):
        assert not interpret(USERS_UPDATE, 400, clash % fields).ok
        assert not interpret_bulk(USERS_BULK_UPDATE, 200, clash % fields, GROUP).ok


@pytest.mark.parametrize(
    ("status", "headline"),
    [
        (200, "users/update call successful: Success"),
        (302, "Redirect from users/update: Status 302"),
        (400, "4xx Client Error from users/update: Status 400"),
        (502, "5xx Server Error from users/update: Status 502"),
    ],
)
def test_an_answer_is_named_in_the_log_and_usable_with_a_code_but_in_an_outage(status: int, headline: str) -> None:
    assert interpret(USERS_UPDATE, status, SUCCESS).headline == headline
    usable = [interpret(USERS_UPDATE, status, document(code)).usable for code in ("Success", "BadParams", "")]
    assert usable == [status != 502, status != 502, False]


def test_forgotten_is_said_of_one_user_and_not_of_a_whole_group() -> None:
    assert interpret(USERS_UPDATE, 409, document("ForgottenUserError")).forgotten
    assert not interpret_bulk(USERS_BULK_UPDATE, 409, document("ForgottenUserError"), GROUP).forgotten


@pytest.mark.parametrize("answer", answers.BULK, ids=attrgetter("id"))
def test_a_bulk_answer_is_a_verdict_for_whom_the_table_says(standin: StandIn, answer: BulkAnswer) -> None:
    result = interpret_bulk(USERS_BULK_UPDATE, answer.fault["status"], answer.fault["body"], GROUP)
    assert result == answer.result
    standin.fault(**answer.fault)
    verdicts = Client(standin, attempts=1).post(USERS_UPDATE, USERS)
    assert verdicts == dict.fromkeys(answer.confirmed, answer.result)


# What is sent, and what comes of it


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_call_is_this_request_and_nothing_else(endpoint: str) -> None:
    with Trap() as trap:
        Client(trap, attempts=1, timeout=0.2).call(endpoint)
        head, _, content = trap.received.decode("ascii").partition("\r\n\r\n")
    users, events = (",".join(bodies.values()) for bodies in (USERS, EVENTS))
    bodies = (USERS[ONE], EVENTS[ONE], f'{{"users":[{users}]}}', f'{{"events":[{events}]}}')
    assert content == bodies[ENDPOINTS.index(endpoint)]
    assert sorted(head.split("\r\n")) == [
        "Accept-Encoding: identity",
        f"Api-Key: {KEY}",
        f"Content-Length: {len(content)}",
        "Content-Type: application/json",
        f"Host: 127.0.0.1:{trap.port}",
        f"POST /api/{endpoint} HTTP/1.1",
        "User-Agent: iterable-integration/2",
    ]


ON_THE_WAY = [
    *answers.ON_THE_WAY,
    answers.no_answer("a body that drips", TOO_SLOW, "drip_body", interval=0.1),
    answers.no_answer("not a chunk", BROKEN, "raw", body="HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"),
]


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, EVENTS_TRACK_BULK])
@pytest.mark.parametrize("answer", ON_THE_WAY, ids=attrgetter("id"))
def test_a_call_without_an_answer_is_tried_again_and_told(standin: StandIn, answer: Answer, endpoint: str) -> None:
    standin.fault(**answer.fault)
    client = Client(standin, attempts=2, timeout=0.3 if answer.result.reason == TOO_SLOW else PROMPT)
    assert client.call(endpoint) == (answer.after(2) if endpoint == USERS_UPDATE else None)
    assert (standin.counters()["calls"], client.attempts) == ({endpoint: 2}, [1, 2])


@pytest.mark.parametrize(("failures", "tries"), [(0, 1), (1, 2), (4, 5), (9, 5)])
def test_a_call_is_tried_so_often_and_a_429_uses_up_no_try(standin: StandIn, failures: int, tries: int) -> None:
    standin.fault(status=429, headers={"Retry-After": "0"}, times=2)
    standin.fault(status=500, body="{}", times=failures)
    client = Client(standin, attempts=5)
    failed = CallResult(USERS_UPDATE, False, 500, None, "", answers.IN_TROUBLE, "{}", 2 + tries, True)
    assert client.call() == (replace(UPDATED, attempts=2 + tries) if failures < 5 else failed)
    assert client.attempts == [*range(1, 3 + tries)]


@pytest.mark.parametrize("action", ["cut", "drip_body"])
def test_a_refusal_is_known_by_its_status_although_its_body_never_ends(standin: StandIn, action: str) -> None:
    standin.fault(action, status=401, body=document("BadApiKey", "Invalid API key"))
    client = Client(standin, timeout=0.3)
    result = client.call()
    assert (result.status, result.attempts, client.refused) == (401, 1, result.reason)
    assert (client.call(), standin.counters()["calls"]) == (None, {USERS_UPDATE: 1})


def test_an_echoed_key_is_in_no_field_of_a_result_wherever_that_is_cut(standin: StandIn) -> None:
    key = 'Abc"\\d%e/F+1=234&<567>'
    client = Client(standin, api_key=key)
    pieces = {way[at : at + 10] for way in (key, json.dumps(key)[1:-1]) for at in range(len(way) - 9)}
    for body in ("x" * 490 + key, document(f"Bad{key}", "x" * 490 + key)):
        standin.fault(status=400, body=body, times=1)
        fields = "\n".join(map(str, astuple(client.call())))
        assert "x" * 490 in fields
        assert [piece for piece in pieces if piece in fields] == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(standin: StandIn, status: int) -> None:
    with Trap() as trap:
        standin.fault(status=status, headers={"Location": f"{trap.url}/api/users/update"})
        client = Client(standin)
        assert client.call() == CallResult(USERS_UPDATE, False, status, reason=answers.REDIRECT)
        assert client.call(USERS_BULK_UPDATE) is None
        assert (trap.connections, trap.received) == (0, b"")
    assert standin.counters()["calls"] == {USERS_UPDATE: 1, USERS_BULK_UPDATE: 1}


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("getaddrinfo", socket.gaierror(socket.EAI_NONAME, ""), "the host name is unknown (DNS): check ITERABLE_API"),
        ("socket", OSError(errno.ECONNREFUSED, "Refused"), "no connection (Refused): check ITERABLE_API_BASE_URL"),
    ],
)
def test_why_there_is_no_connection_is_told(monkeypatch: Patch, function: str, error: OSError, words: str) -> None:
    monkeypatch.setattr(socket, function, mock.Mock(side_effect=error))
    result = Client("https://localhost", attempts=2).call()
    assert (told(result), result.reason[: len(words)]) == ((False, None, 2), words)


@pytest.mark.parametrize("kind", ["expired", "self-signed", "wrong-name"])
def test_a_server_that_is_not_trusted_does_not_get_the_key(monkeypatch: Patch, kind: Any) -> None:
    with StandIn(tls=kind) as standin:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(standin.ca_file))
        result = Client(standin).call()
        assert told(result) == (False, None, 3)
        assert re.match(r"no encrypted connection \(.*VERIFY_FAILED.*\): .*REQUESTS_CA_BUNDLE", result.reason)
        assert standin.counters()["calls"] == {}


# How soon it is tried again


def test_waits_double_from_half_a_second_to_30_with_full_jitter() -> None:
    policy = RetryPolicy()
    for failures, most in [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 30), (8, 30), (10_000, 30)]:
        waits = [policy.wait(failures) for _ in range(500)]
        assert 0 <= min(waits) < 0.1 * most < 0.9 * most < max(waits) <= most


def test_retry_after_is_a_number_or_a_date_in_utc_and_honoured_up_to_two_minutes() -> None:
    seconds = {
        **dict.fromkeys((None, "", "soon", "-5", "1, 2", "\xb2", "32 Dec 2026")),
        **dict.fromkeys(("0", "Wed, 21 Oct 2015 07:28:00 GMT"), 0),
        " 7 ": 7,
        **dict.fromkeys(("120", "86400", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"), 120),
    }
    assert {header: RetryPolicy().retry_after(header) for header in seconds} == seconds
    at = datetime.now(timezone.utc) + timedelta(seconds=60)
    for form in ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"):
        assert 50 < (RetryPolicy().retry_after(at.strftime(form)) or 0) <= 60


def test_a_call_waits_as_long_as_retry_after_says_but_not_for_five_minutes_of_nothing_but_429(standin: StandIn) -> None:
    assert RetryPolicy().longest_throttling == 300
    client = Client(standin, attempts=2, throttling=0.9)
    for status, seconds in ((429, "1"), (500, "1"), (429, "0")):
        standin.fault(status=status, headers={"Retry-After": seconds}, times=1)
    assert client.call() == replace(UPDATED, attempts=4)
    times = [call["t"] for call in standin.state()["journal"]]
    assert times[2] - 1 >= times[1] >= times[0] + 1
    standin.fault(status=429, headers={"Retry-After": "1"})
    assert told(client.call()) == (False, 429, 2)


# How fast calls may start


class Clock(threading.Event):
    """Virtual time, and what the callers of a limiter wait for: it never comes, and each wait ends a little `late`."""

    def __init__(self, rate: float, late: Sequence[float] = (0.0,)) -> None:
        super().__init__()
        self.now, self.stop, self._late = 1000.0, threading.Event(), itertools.cycle(late)
        self.limiter = RateLimiter(rate, self.stop)

    def wait(self, timeout: float | None = None) -> bool:
        self.now += (timeout or 0) + next(self._late)
        return False

    def starts(self, seconds: float) -> Iterator[float]:
        """Starts calls as soon as they may, for so long, and yields when."""
        end = self.now + seconds
        while self.now < end:
            assert self.limiter.acquire(self)
            yield self.now


@contextlib.contextmanager
def virtual(*limiter: Any) -> Iterator[Clock]:
    clock = Clock(*limiter)
    with mock.patch("iterable_client.monotonic", side_effect=lambda: clock.now):
        yield clock


BUSY = st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.02]) | st.floats(0, 3), min_size=1, max_size=20)
REPLIES = st.lists(st.sampled_from([None, None, 0.0, 0.1, 2.5]), min_size=1, max_size=30)  # Retry-After of a 429
RATES = st.integers(1, 60) | st.floats(0.2, 10)


@settings(deadline=None, max_examples=200)
@given(RATES, BUSY, BUSY, REPLIES, st.floats(0, 20))
def test_never_more_than_rate_calls_start_in_any_second_and_none_in_a_pause_before_a_stop(
    rate: float, busy: list[float], late: list[float], replies: list[float | None], stop_after: float
) -> None:
    latencies, refusals = itertools.cycle(busy), itertools.cycle(replies)
    starts, pauses = [], []
    with virtual(rate, late) as clock:
        for start in clock.starts(20):
            starts.append(start)
            clock.now += next(latencies)
            if start - starts[0] > stop_after:
                clock.stop.set()
            elif (retry_after := next(refusals)) is not None:
                clock.limiter.throttled(start, retry_after)
                pauses.append((start, clock.now + retry_after))
    assert all(later - first >= 1 - 1e-9 for first, later in zip(starts, starts[math.ceil(rate) :], strict=False))
    assert not [start for start in starts for begin, end in pauses if begin < start < end - 1e-9]


def test_a_429_lowers_the_rate_by_30_percent_at_most_once_a_second_and_it_climbs_by_1_percent_a_second() -> None:
    with virtual(100) as clock:
        speeds = []
        for second in range(50):
            for _ in range({2: 3, 4: 1}.get(second, 0)):
                clock.limiter.throttled(clock.now, 0.0)
            speeds.append(len([*clock.starts(1)]))
    assert speeds == pytest.approx([98, 98, 70, 71, *range(50, 96)], abs=2)


def test_calls_start_evenly_and_refusals_of_those_from_before_a_pause_count_as_one() -> None:
    with virtual(50) as clock:
        [gap] = {round(after - before, 6) for before, after in itertools.pairwise([*clock.starts(20)][2:])}
        assert 1 / 50 <= gap <= 1 / (0.95 * 50)
        before = clock.now
        for _ in range(3):
            clock.limiter.throttled(before, None)
            clock.now += 0.05
        assert next(clock.starts(1)) == pytest.approx(before + 0.25)


def test_a_run_costs_two_calls_a_user_or_a_group_that_need_not_be_full() -> None:
    client = Client("https://localhost", rate=250)
    assert [client.cost(users, bulk=False) for users in (0, 1, 1001)] == [(0, 0), (2, 1 / 250), (2002, 1001 / 250)]
    assert [client.cost(users, bulk=True) for users in (0, 1, 1000, 1001)] == [(0, 0), (2, 0.4), (2, 0.4), (4, 0.8)]


def test_each_endpoint_has_the_same_share_of_its_own_limit() -> None:
    with mock.patch("iterable_client.RateLimiter") as limiter:
        limiters = Client("https://localhost", rate=450)._limiters
    rates = [call.args[0] for call in limiter.call_args_list]
    assert dict(zip(limiters, rates, strict=True)) == dict(zip(ENDPOINTS, (450, 1800, 4.5, 9), strict=True))


@pytest.mark.parametrize(("rate", "spread"), [(2.5, 1.05), (10, 1.05), (10.5, 1.02), (150, 1.02)])
def test_the_few_calls_of_a_slow_endpoint_are_spread_wider(rate: float, spread: float) -> None:
    with virtual(rate) as clock:
        starts = [*clock.starts(20)]
    assert starts[-1] - starts[1] == pytest.approx((len(starts) - 2) * spread / rate)  # the first may be late


@given(st.lists(st.integers(1, 700_000) | st.just(499_998), max_size=20), st.integers(1, 5))
def test_a_group_has_as_many_as_are_allowed_and_go_into_a_megabyte(lengths: list[int], most: int) -> None:
    users = [argparse.Namespace(user="1" * (length // 2), event="2" * (length - length // 2)) for length in lengths]
    groups = [*iterable.in_groups(users, most)]
    assert list(itertools.chain.from_iterable(groups)) == users
    sizes = [sum(len(each.user) + len(each.event) + 2 for each in group) for group in groups]
    assert all(
        0 < len(group) <= most and (size <= 1_000_000 or len(group) == 1)
        for group, size in zip(groups, sizes, strict=True)
    )
    for group, size, following in zip(groups, sizes, groups[1:], strict=False):
        assert len(group) == most or size + len(following[0].user) + len(following[0].event) + 2 > 1_000_000


def test_a_429_pauses_every_worker_of_its_endpoint_and_no_other(standin: StandIn, threads: ThreadPoolExecutor) -> None:
    standin.fault(status=429, headers={"Retry-After": "1"}, times=1)
    standin.configure(latency=0.1)
    client = Client(standin, throttling=0)  # so that the first call comes back at once
    client.call()
    wait([threads.submit(client.call, endpoint) for endpoint in [USERS_UPDATE] * 5 + [*ENDPOINTS]])
    first, *calls = standin.state()["journal"]
    assert {call["endpoint"] for call in calls[:3]} == {EVENTS_TRACK, USERS_BULK_UPDATE, EVENTS_TRACK_BULK}
    assert [call["endpoint"] for call in calls[3:]] == [USERS_UPDATE] * 6
    assert calls[2]["t"] - first["t"] < 1 <= calls[3]["t"] - first["t"]
    assert standin.counters()["connections"] <= 6  # as many as were in use at once


# Stopping


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, USERS_BULK_UPDATE, EVENTS_TRACK_BULK])
@pytest.mark.parametrize(
    "fault",
    [{"action": "reset_before"}, {"status": 503}, {"status": 503, "headers": WAITS}, {"status": 429, "headers": WAITS}],
)
def test_a_stop_cuts_the_wait_for_the_next_try(
    standin: StandIn, threads: ThreadPoolExecutor, fault: dict[str, Any], endpoint: str
) -> None:
    standin.fault(**fault)
    client = Client(standin, retry=RetryPolicy(first_wait=1e9, longest_wait=1e9))  # full jitter of which is seconds
    calling = threads.submit(client.call, endpoint)
    standin.wait_for_calls(1)
    client.stop.set()
    once = (False, fault.get("status"), 1)
    assert told(calling.result(PROMPT)) == (None if endpoint == EVENTS_TRACK_BULK else once)
    assert (standin.counters()["calls"], client.attempts) == ({endpoint: 1}, [1])


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, USERS_BULK_UPDATE, EVENTS_TRACK])
@pytest.mark.parametrize(("rate", "refusals"), [(0.02, 0), (10_000, 1)], ids=["its turn", "the end of a pause"])
def test_a_stop_cuts_the_wait_before_the_first_try_and_a_refused_key_that_of_an_event(
    standin: StandIn, threads: ThreadPoolExecutor, rate: float, refusals: int, endpoint: str
) -> None:
    standin.fault(status=429, headers=WAITS, times=refusals)
    client = Client(standin, throttling=0, rate=rate)
    client.call(endpoint)
    calling = [threads.submit(client.call, endpoint) for _ in range(8)]
    assert not any(future.done() for future in calling)
    (client.halted if endpoint == EVENTS_TRACK else client.stop).set()
    assert [future.result(PROMPT) for future in calling] == [None] * 8
    assert standin.counters()["calls"] == {endpoint: 1}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_after_a_stop_events_alone_are_sent_at_once_and_not_again_and_after_a_refused_key_nothing(
    standin: StandIn, threads: ThreadPoolExecutor, endpoint: str
) -> None:
    standin.fault(status=429, headers=WAITS, times=1)
    standin.fault(status=503, headers=WAITS)
    client = Client(standin, throttling=0)
    client.call(endpoint)
    calling = threads.submit(client.call, endpoint)
    time.sleep(0.1)  # until it waits for the end of the pause
    client.stop.set()
    assert told(calling.result(PROMPT)) == {EVENTS_TRACK: (False, 503, 1)}.get(endpoint)
    client.halted.set()
    assert client.call(endpoint) is None
    assert standin.counters()["calls"] == {endpoint: 2 if "events" in endpoint else 1}


@pytest.mark.parametrize(("status", "endpoint"), [(401, USERS_UPDATE), (403, USERS_BULK_UPDATE)])
def test_a_refused_key_ends_every_wait_and_lets_the_calls_on_the_wire_end(
    standin: StandIn, threads: ThreadPoolExecutor, status: int, endpoint: str
) -> None:
    client = Client(standin)
    standin.fault(latency=0.5, times=1)
    standin.fault(status=503, headers=WAITS, times=1)
    standin.fault(status=status)
    calling = [threads.submit(client.call, EVENTS_TRACK) for _ in range(2)]
    standin.wait_for_calls(2)
    refused = client.call(endpoint)
    assert (client.refused, *told(refused)) == (refused.reason, False, status, 1)
    assert (client.stop.is_set(), client.call(), client.call(EVENTS_TRACK)) == (True, None, None)
    assert sorted(told(future.result(PROMPT)) for future in calling) == [(False, 503, 1), (True, 200, 1)]
    assert sum(standin.counters()["calls"].values()) == 3


# Connections


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_the_environment_may_name_a_companys_own_authority(secure: StandIn, monkeypatch: Patch, variable: str) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert "VERIFY_FAILED" in Client(secure).call().reason
    monkeypatch.setenv(variable, str(secure.ca_file))
    assert Client(secure).call() == UPDATED


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_tunnels_and_the_environment_is_asked_for_it_once(
    secure: StandIn, monkeypatch: Patch, threads: ThreadPoolExecutor, variable: str
) -> None:
    def pump(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            target.sendall(data)

    def tunnel() -> str:
        client, _ = listening.accept()
        request = client.recv(65536).decode()
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        server = socket.create_connection(("localhost", secure.port))
        for ends in ((client, server), (server, client)):
            threading.Thread(target=pump, args=ends, daemon=True).start()
        return request

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PROMPT)
        request = threads.submit(tunnel)
        monkeypatch.setenv(variable, f"http://ann:p%40ss@127.0.0.1:{listening.getsockname()[1]}")
        client = Client(secure)
        monkeypatch.delenv(variable)
        assert [client.call() for _ in range(3)] == [UPDATED] * 3
    assert request.result().startswith(f"CONNECT localhost:{secure.port} HTTP/1.")
    assert "Proxy-Authorization: Basic YW5uOnBAc3M=" in request.result() and KEY not in request.result()


def test_a_proxy_is_not_asked_for_a_host_of_no_proxy_nor_by_plain_http_where_it_would_read_the_key(
    secure: StandIn, standin: StandIn, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert Client(standin).call() == UPDATED
    for spared in ("localhost", "*"):
        monkeypatch.setenv("NO_PROXY", spared)
        assert Client(secure).call() == UPDATED


def test_a_proxy_that_does_not_work_is_told_without_its_password(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:geheim@127.0.0.1:1")
    result = Client("https://localhost", attempts=2).call()
    assert told(result) == (False, None, 2)
    assert result.reason.endswith("refused): check HTTPS_PROXY and ALL_PROXY")
    assert "geheim" not in repr(result)


@pytest.mark.parametrize("address", ["http://ann:gehe/im@proxy:1", "http://ann:gehe@im@proxy:1", "socks5://gehe:x@p:1"])
def test_a_proxy_address_of_no_use_is_an_error_that_says_how_it_must_be(monkeypatch: Patch, address: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", address)
    with pytest.raises(OSError, match=r"HTTPS_PROXY or ALL_PROXY is of no use: .*@ in the password as .* %40") as error:
        Client("https://localhost")
    assert "gehe" not in str(error.value)
