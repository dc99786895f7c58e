"""The stand-in answers, refuses and limits as the API does, and each of its faults is what it says."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from standin import LastSecond, field_types
from standin_handle import EVENTS_TRACK, KEY, USERS_UPDATE, StandIn, Trap, describe

HEADERS = {"Api-Key": KEY, "Content-Type": "application/json", "User-Agent": "test/1.0"}
SUCCESS = {"msg": "", "code": "Success", "params": None}
USER = {"email": "ann@example.com", "dataFields": {"plan_type": "pro"}}
EVENT = {"email": "ann@example.com", "eventName": "page_view", "id": "page-view-1", "createdAt": 1_768_314_645}
OTHERS_CERTIFICATES = {
    "expired": "certificate has expired",
    "self-signed": "self-signed certificate",
    "wrong-name": "Hostname mismatch, certificate is not valid for 'localhost'.",
}


@pytest.fixture(scope="module")
def running() -> Iterator[StandIn]:
    with StandIn() as standin:
        yield standin


@pytest.fixture
def standin(running: StandIn) -> StandIn:
    running.reset()
    return running


@pytest.fixture
def client(standin: StandIn) -> Iterator[Client]:
    client = Client(standin)
    yield client
    client.close()


class Client(http.client.HTTPConnection):
    """One kept-alive connection to a stand-in."""

    def __init__(self, standin: StandIn) -> None:
        super().__init__("127.0.0.1", standin.port, timeout=5)

    def send_call(self, endpoint: str, body: Any, headers: dict[str, str] = HEADERS, method: str = "POST") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.request(method, f"/api/{endpoint}", content, headers)

    def call(self, endpoint: str, body: Any, **options: Any) -> tuple[int, Any]:
        """The status and the JSON of the answer."""
        self.send_call(endpoint, body, **options)
        response = self.getresponse()
        return response.status, json.loads(response.read())

    def everything(self) -> bytes:
        """What arrives until the server closes."""
        content = b""
        while data := self.sock.recv(65536):
            content += data
        return content


def user(email: str = "ann@example.com", **fields: Any) -> dict[str, Any]:
    return {"email": email, "dataFields": fields}


def event(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**EVENT, **changes}.items() if value is not ...}


def refusal(code: str, msg: str, params: Any = None) -> dict[str, Any]:
    return {"msg": msg, "code": code, "params": params}


def test_fields_of_a_user_merge_and_null_removes(standin: StandIn, client: Client) -> None:
    """A field left out keeps its value; the address is stored in lower case."""
    answers = [
        client.call(USERS_UPDATE, user("Ann@Example.com", first_name="Ann", plan_type="free")),
        client.call(USERS_UPDATE, user("ann@example.com", plan_type="pro", first_name=None)),
        client.call(USERS_UPDATE, {"email": "bob@example.com"}),
    ]
    assert answers == [(200, SUCCESS)] * 3
    assert standin.state()["users"] == {"ann@example.com": {"plan_type": "pro"}, "bob@example.com": {}}


def test_an_event_is_stored_under_its_id(standin: StandIn, client: Client) -> None:
    """The answer names the id, and what is sent again under it replaces the event."""
    tracked = {"msg": "Event with id: page-view-1 tracked.", "code": "Success", "params": {"id": "page-view-1"}}
    assert client.call(EVENTS_TRACK, event(dataFields={"page": "pricing"})) == (200, tracked)
    assert client.call(EVENTS_TRACK, event(email="Ann@Example.com", dataFields={"page": "settings"})) == (200, tracked)
    state = standin.state()
    stored = {"email": "ann@example.com", "eventName": "page_view", "createdAt": 1_768_314_645}
    assert state["events"] == {"page-view-1": {**stored, "dataFields": {"page": "settings"}}}
    assert state["accepted"] == {USERS_UPDATE: {}, EVENTS_TRACK: {"page-view-1": 2}}


def test_an_event_without_id_and_time_happens_now(standin: StandIn, client: Client) -> None:
    """Each such event is another one."""
    before = int(time.time())
    assert client.call(EVENTS_TRACK, event(id=..., createdAt=...)) == (200, SUCCESS)
    assert client.call(EVENTS_TRACK, event(id=..., createdAt=...)) == (200, SUCCESS)
    events = list(standin.state()["events"].values())
    assert len(events) == 2
    assert all(before <= stored["createdAt"] <= time.time() for stored in events)


@pytest.mark.parametrize(
    ("endpoint", "body", "expected"),
    [
        (USERS_UPDATE, {}, refusal("BadParams", "[/api/users/update] email or userId is required")),
        (USERS_UPDATE, [], refusal("BadJsonBody", "[/api/users/update] Invalid JSON body", {"obj": "Object expected"})),
        (USERS_UPDATE, b"{", refusal(
            "BadJsonBody",
            "[/api/users/update] Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        )),
        (USERS_UPDATE, b'{"email": NaN}', refusal("BadJsonBody", "[/api/users/update] NaN is not JSON")),
        (USERS_UPDATE, {**USER, "name": "Ann"}, refusal("BadParams", "[/api/users/update] Unknown parameter: name")),
        (USERS_UPDATE, {"email": None}, refusal(
            "BadJsonBody", "[/api/users/update] Invalid JSON body", {"obj.email": "String value expected"}
        )),
        (USERS_UPDATE, {**USER, "dataFields": "pro"}, refusal(
            "BadJsonBody", "[/api/users/update] Invalid JSON body", {"obj.dataFields": "Object expected"}
        )),
        (USERS_UPDATE, {**USER, "preferUserId": 1}, refusal(
            "BadJsonBody", "[/api/users/update] Invalid JSON body", {"obj.preferUserId": "Boolean value expected"}
        )),
        (USERS_UPDATE, {**USER, "id": "1"}, refusal("BadParams", "[/api/users/update] Unknown parameter: id")),
        *(
            (endpoint, {**body, "email": email}, refusal("InvalidEmailAddressError", f"Invalid email: {email}"))
            for endpoint, body in ((USERS_UPDATE, USER), (EVENTS_TRACK, EVENT))
            for email in ("000", "bad@", "", "ann@localhost", "an n@example.com", "ann@example.com ", "a@b@example.com")
        ),
        (EVENTS_TRACK, event(eventName=...), refusal("BadParams", "[/api/events/track] eventName is required")),
        (EVENTS_TRACK, event(eventName=""), refusal("BadParams", "[/api/events/track] eventName is required")),
        (EVENTS_TRACK, event(email=...), refusal("BadParams", "[/api/events/track] email or userId is required")),
        *(
            (EVENTS_TRACK, event(id=event_id), refusal(
                "BadParams", "[/api/events/track] id must be letters, digits and hyphens, at most 512 bytes"
            ))
            for event_id in ("", "page_view", "page view", "ä", "1\n", "x" * 513)
        ),
        (EVENTS_TRACK, event(createdAt=1_768_314_645_000), refusal(
            "BadParams", "[/api/events/track] createdAt must be in seconds"
        )),
        *(
            (EVENTS_TRACK, event(createdAt=created_at), refusal(
                "BadJsonBody", "[/api/events/track] Invalid JSON body", {"obj.createdAt": "Number value expected"}
            ))
            for created_at in (True, 1_768_314_645.0, "1768314645", None)
        ),
    ],
)  # fmt: skip
def test_a_body_that_the_api_refuses(
    standin: StandIn, client: Client, endpoint: str, body: Any, expected: dict[str, Any]
) -> None:
    """It is a 400 that says what is wrong, nothing is stored, and the connection stays usable."""
    assert client.call(endpoint, body) == (400, expected)
    state = standin.state()
    assert (state["users"], state["events"]) == ({}, {})
    in_the_data = expected["code"] == "InvalidEmailAddressError" or body == {}
    assert state["violations"] == ([] if in_the_data else [f"POST /api/{endpoint}: {expected['msg']}"])
    assert client.call(USERS_UPDATE, USER) == (200, SUCCESS)
    assert standin.counters()["connections"] == 1


def test_limits_of_an_event_id_and_a_time(client: Client) -> None:
    """512 bytes and the last second of the year 9999 pass."""
    assert client.call(EVENTS_TRACK, event(id="x" * 512, createdAt=253_402_300_799))[0] == 200


@pytest.mark.parametrize(
    ("options", "expected", "violates"),
    [
        ({"headers": {**HEADERS, "Api-Key": "wrong"}}, (401, refusal("BadApiKey", "Invalid API key")), False),
        ({"headers": {"User-Agent": "test/1.0"}}, (401, refusal("BadApiKey", "Invalid API key")), False),
        (
            {"headers": {**HEADERS, "Content-Type": "text/plain"}},
            (400, refusal("BadJsonBody", "Content-Type must be application/json")),
            True,
        ),
        (
            {"headers": {"Api-Key": KEY, "Content-Type": "application/json"}},
            (400, refusal("BadParams", "User-Agent must name the program")),
            True,
        ),
        (
            {"headers": {**HEADERS, "User-Agent": "python-requests/2.34.2"}},
            (400, refusal("BadParams", "User-Agent must name the program")),
            True,
        ),
        ({"method": "GET"}, (405, refusal("BadParams", "Method not allowed: GET")), True),
    ],
)
def test_a_request_that_the_api_refuses(
    standin: StandIn, client: Client, options: dict[str, Any], expected: tuple[int, Any], violates: bool
) -> None:
    """Key, headers and method are looked at before the body."""
    assert client.call(USERS_UPDATE, USER, **options) == expected
    state = standin.state()
    assert state["users"] == {}
    assert bool(state["violations"]) == violates


def test_another_path_is_not_found(standin: StandIn, client: Client) -> None:
    """It is a 404 with JSON, counted under its own name."""
    missing = refusal("NotFound", "No such endpoint: /api/users/bulkUpdate")
    assert client.call("users/bulkUpdate", USER) == (404, missing)
    state = standin.state()
    assert state["counters"]["answers"] == {"users/bulkUpdate": {404: 1}}
    assert state["violations"] == ["POST /api/users/bulkUpdate: No such endpoint: /api/users/bulkUpdate"]


def test_what_is_not_http_is_refused(standin: StandIn, client: Client) -> None:
    """The connection is closed, and the violation remembered."""
    client.connect()
    client.sock.sendall(b"hello\r\n\r\n")
    assert client.everything().startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert len(standin.state()["violations"]) == 1


def test_a_request_in_many_pieces_and_two_requests_in_one(standin: StandIn, client: Client) -> None:
    """TCP keeps no boundaries."""
    client.connect()
    body = json.dumps(USER)
    head = "\r\n".join(f"{name}: {value}" for name, value in HEADERS.items())
    request = f"POST /api/users/update HTTP/1.1\r\n{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    closing = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(0, len(request), 40):
        client.sock.sendall(request[at : at + 40])
        time.sleep(0.002)
    client.sock.sendall(request + closing)
    assert client.everything().count(b"HTTP/1.1 200 OK\r\n") == 3
    assert standin.state()["accepted"][USERS_UPDATE] == {"ann@example.com": 3}


def test_a_field_keeps_the_type_of_its_first_value(standin: StandIn, client: Client) -> None:
    """Another type refuses the whole call, with the API's own answer. Events have fields of their own."""
    assert client.call(USERS_UPDATE, user(signupDate="2020-04-13", age=5)) == (200, SUCCESS)
    expected = refusal(
        "RequestFieldsTypesMismatched",
        "Project 1: The request does not have the same data types as the data previously submitted. Field 'signupDate' "
        "already exists for type 'user' and has a data type of 'date' but possible types 'string, keyword' in the "
        "request.",
        {
            "validationErrors": {
                "signupDate": {
                    "incomingTypes": ["string", "keyword"],
                    "expectedType": "date",
                    "category": "user",
                    "offendingValue": "GGG",
                    "_type": "UnexpectedType",
                }
            }
        },
    )
    assert client.call(USERS_UPDATE, user(signupDate="GGG", age=6, new="x")) == (400, expected)
    assert client.call(USERS_UPDATE, user(signupDate=None, age=7, new=1)) == (200, SUCCESS)
    assert client.call(EVENTS_TRACK, event(id=..., dataFields={"signupDate": "GGG"})) == (200, SUCCESS)
    assert client.call(EVENTS_TRACK, event(id=..., dataFields={"signupDate": 1}))[0] == 400
    state = standin.state()
    assert state["users"] == {"ann@example.com": {"age": 7, "new": 1}}
    assert state["violations"] == []


@pytest.mark.parametrize(
    ("value", "types"),
    [
        ("2020-04-13", ("date", "string", "keyword")),
        ("2020-04-13 13:37:19", ("date", "string", "keyword")),
        ("2020-04-13 13:37:19 -04:00", ("date", "string", "keyword")),
        ("2020-04-13T13:37:19.039Z", ("date", "string", "keyword")),
        ("2020-04-13T13:37:19.039+02:00", ("date", "string", "keyword")),
        ("2020-04-13T13:37:19", ("string", "keyword")),
        ("2020-04-13 13:37:19.039", ("string", "keyword")),
        ("", ("string", "keyword")),
        (True, ("boolean",)),
        (1, ("long", "double")),
        (1.5, ("double",)),
        ({}, ("object",)),
        ([1], ("long", "double")),
        ([], ()),
        (None, ()),
    ],
)
def test_types_of_values(value: Any, types: tuple[str, ...]) -> None:
    """Text is a date in the forms that Iterable documents, and in no other."""
    assert field_types(value) == types


def test_a_forgotten_user_is_refused_everything(standin: StandIn, client: Client) -> None:
    """409 for both calls, in whatever case the address is written."""
    standin.configure(forgotten=["Ann@example.com"])
    expected = (409, refusal("ForgottenUserError", "User ann@EXAMPLE.com has been forgotten"))
    assert client.call(USERS_UPDATE, user("ann@EXAMPLE.com")) == expected
    assert client.call(EVENTS_TRACK, event(email="ann@EXAMPLE.com")) == expected
    assert client.call(USERS_UPDATE, user("bob@example.com")) == (200, SUCCESS)
    assert list(standin.state()["users"]) == ["bob@example.com"]


def test_calls_beyond_the_limit_are_answered_429(standin: StandIn, client: Client) -> None:
    """Each endpoint has its limit, less what others use up; Retry-After is there only when told."""
    standin.configure(limit_users=5, limit_events=7, others=2)
    exceeded = (429, refusal("RateLimitExceeded", "Rate limit of users/update exceeded"))
    assert [client.call(USERS_UPDATE, USER) for _ in range(5)] == [(200, SUCCESS)] * 3 + [exceeded] * 2
    assert [client.call(EVENTS_TRACK, EVENT)[0] for _ in range(6)] == [200] * 5 + [429]
    for retry_after in (None, "7"):
        standin.configure(retry_after=retry_after)
        client.send_call(USERS_UPDATE, USER)
        response = client.getresponse()
        response.read()
        assert (response.status, response.getheader("Retry-After")) == (429, retry_after)
    assert standin.counters() == {
        "calls": {USERS_UPDATE: 7, EVENTS_TRACK: 6},
        "answers": {USERS_UPDATE: {200: 3, 429: 4}, EVENTS_TRACK: {200: 5, 429: 1}},
        "throttled": 5,
        "connections": 1,
        "busiest_second": {USERS_UPDATE: 7, EVENTS_TRACK: 6},
    }


def test_the_second_slides() -> None:
    """What counts is any second, not that of the clock."""
    last = LastSecond()
    for now in (0.25, 0.5, 1.0, 1.125, 1.5, 1.75):
        last.add(now)
    assert last.most == 4
    assert [last.count(now) for now in (1.875, 2.0, 2.125, 2.75)] == [4, 3, 2, 0]


def test_journal_counters_and_headers(standin: StandIn, client: Client) -> None:
    """Every call is on record, answered or not."""
    standin.fault("reset_before", endpoint=EVENTS_TRACK)
    before = time.monotonic()
    client.call(USERS_UPDATE, USER)
    with pytest.raises(ConnectionError):
        client.call(EVENTS_TRACK, EVENT)
    state = standin.state()
    times = [line.pop("t") for line in state["journal"]]
    assert before <= times[0] <= times[1] <= time.monotonic()
    unanswered = {"endpoint": EVENTS_TRACK, "email": "ann@example.com", "event_id": "page-view-1", "status": None}
    assert state == {
        "users": {"ann@example.com": {"plan_type": "pro"}},
        "events": {},
        "journal": [
            {"endpoint": USERS_UPDATE, "email": "ann@example.com", "event_id": None, "status": 200, "fault": None},
            {**unanswered, "fault": "reset_before"},
        ],
        "counters": {
            "calls": {USERS_UPDATE: 1, EVENTS_TRACK: 1},
            "answers": {USERS_UPDATE: {200: 1}},
            "throttled": 0,
            "connections": 1,
            "busiest_second": {USERS_UPDATE: 1, EVENTS_TRACK: 1},
        },
        "accepted": {USERS_UPDATE: {"ann@example.com": 1}, EVENTS_TRACK: {}},
        "violations": [],
        "last_headers": {
            "host": f"127.0.0.1:{standin.port}",
            "accept-encoding": "identity",
            "content-length": str(len(json.dumps(EVENT))),
            "api-key": KEY,
            "content-type": "application/json",
            "user-agent": "test/1.0",
        },
    }


def test_without_journal_the_counters_stay(standin: StandIn, client: Client) -> None:
    """As a benchmark wants it."""
    standin.configure(journal=False)
    client.call(USERS_UPDATE, USER)
    state = standin.state()
    assert state["journal"] == []
    assert state["counters"]["calls"] == {USERS_UPDATE: 1}
    assert state["accepted"][USERS_UPDATE] == {"ann@example.com": 1}


def test_a_fault_strikes_after_skip_calls_and_so_many_times(standin: StandIn, client: Client) -> None:
    """Only the calls of its endpoint and address count."""
    standin.fault(status=503, endpoint=USERS_UPDATE, email="Ann@example.com", skip=1, times=2, body="{}")
    bodies = [USER, user("bob@example.com"), USER, USER, USER]
    assert [client.call(USERS_UPDATE, body)[0] for body in bodies] == [200, 200, 503, 503, 200]
    assert client.call(EVENTS_TRACK, EVENT)[0] == 200


@pytest.mark.parametrize("processed", [False, True])
def test_reply(standin: StandIn, client: Client, processed: bool) -> None:
    """Status, headers and bytes are as told; the user changes only when told."""
    body = b"<html>\xff"
    standin.fault(status=502, headers={"Content-Type": "text/html", "X": "y"}, body=body, processed=processed)
    client.send_call(USERS_UPDATE, USER)
    response = client.getresponse()
    assert (response.status, response.reason, response.read()) == (502, "Bad Gateway", body)
    assert dict(response.getheaders()) == {"Content-Type": "text/html", "Content-Length": str(len(body)), "X": "y"}
    state = standin.state()
    assert state["users"] == ({"ann@example.com": {"plan_type": "pro"}} if processed else {})
    assert state["journal"][0]["status"] == 502


def test_redirect(standin: StandIn, client: Client) -> None:
    """Is a reply with a Location; nothing reaches the other host unless the client follows."""
    with Trap() as trap:
        standin.fault(status=307, headers={"Location": f"{trap.url}/api/users/update"})
        client.send_call(USERS_UPDATE, USER)
        response = client.getresponse()
        assert (response.status, response.getheader("Location"), response.read()) == (
            307,
            f"{trap.url}/api/users/update",
            b"",
        )
        assert (trap.connections, trap.received) == (0, b"")


@pytest.mark.parametrize(("action", "users"), [("reset_before", 0), ("reset_after", 1)])
def test_reset(standin: StandIn, client: Client, action: str, users: int) -> None:
    """The client gets a TCP reset, not an end; with reset_after the user is there all the same."""
    standin.fault(action, times=1)
    client.send_call(USERS_UPDATE, USER)
    with pytest.raises(ConnectionResetError):
        client.sock.recv(1)
    client.close()
    assert len(standin.state()["users"]) == users
    assert client.call(USERS_UPDATE, USER) == (200, SUCCESS)


def test_silence_ends_when_the_client_leaves(standin: StandIn, client: Client) -> None:
    """No byte comes; the next call, on a new connection, is answered."""
    standin.fault("silence", times=1)
    client.send_call(USERS_UPDATE, USER)
    client.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.sock.recv(1)
    client.close()
    assert client.call(USERS_UPDATE, USER) == (200, SUCCESS)
    assert [line["status"] for line in standin.state()["journal"]] == [None, 200]


def test_drip(standin: StandIn, client: Client) -> None:
    """Every byte, the status line's too, comes by itself."""
    standin.fault("drip", interval=0.001, headers={"Connection": "close"}, status=200, body="ok")
    client.send_call(USERS_UPDATE, USER)
    started, pieces = time.monotonic(), []
    while data := client.sock.recv(65536):
        pieces.append(data)
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
    assert b"".join(pieces) == whole
    assert len(pieces) > 10
    assert time.monotonic() - started >= 0.001 * (len(whole) - 1)


def test_drip_body_sends_the_head_at_once(standin: StandIn, client: Client) -> None:
    """The API's own answer unless told another, and the connection lives on."""
    standin.fault("drip_body", interval=0.01, times=1)
    client.send_call(USERS_UPDATE, USER)
    response = client.getresponse()
    started = time.monotonic()
    assert json.loads(response.read()) == SUCCESS
    assert time.monotonic() - started >= 0.01 * 38
    assert client.call(USERS_UPDATE, USER) == (200, SUCCESS)
    assert standin.counters()["connections"] == 1


@pytest.mark.parametrize("keep_open", [False, True])
def test_raw(standin: StandIn, client: Client, keep_open: bool) -> None:
    """Bytes as they are in place of an answer; then the end, or nothing more."""
    standin.fault("raw", body=b"\x00no HTTP\xff", keep_open=keep_open)
    client.send_call(USERS_UPDATE, USER)
    assert client.sock.recv(65536) == b"\x00no HTTP\xff"
    client.sock.settimeout(0.1)
    if keep_open:
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
    else:
        assert client.sock.recv(1) == b""


def test_cut(standin: StandIn, client: Client) -> None:
    """The body is shorter than its Content-Length, although the call was processed."""
    standin.fault("cut")
    client.send_call(USERS_UPDATE, USER)
    response = client.getresponse()
    with pytest.raises(http.client.IncompleteRead) as error:
        response.read()
    assert (error.value.partial, error.value.expected) == (b'{"msg":"","code":"Su', 21)
    assert standin.state()["accepted"][USERS_UPDATE] == {"ann@example.com": 1}


def test_echo_headers(standin: StandIn, client: Client) -> None:
    """The key comes back in `msg`."""
    standin.fault("echo_headers")
    status, answer = client.call(USERS_UPDATE, USER)
    assert (status, answer["code"], KEY in answer["msg"]) == (400, "BadJsonBody", True)
    assert standin.state()["users"] == {}


def test_latency(standin: StandIn, client: Client) -> None:
    """For all calls by configure, for some by a fault; the call is processed when it arrives."""
    standin.configure(latency=0.3)
    standin.fault(endpoint=EVENTS_TRACK, latency=0)
    started = time.monotonic()
    client.send_call(USERS_UPDATE, USER)
    standin.wait_for_calls(1)
    assert len(standin.state()["users"]) == 1
    assert time.monotonic() - started < 0.3
    assert client.getresponse().read()
    assert time.monotonic() - started >= 0.3
    started = time.monotonic()
    assert client.call(EVENTS_TRACK, EVENT)[0] == 200
    assert time.monotonic() - started < 0.3


def test_a_client_that_leaves_gets_no_answer(standin: StandIn, client: Client) -> None:
    """Its call was processed, but stays without status."""
    standin.configure(latency=0.05)
    client.send_call(USERS_UPDATE, USER)
    standin.wait_for_calls(1, USERS_UPDATE)
    client.close()
    client.call(USERS_UPDATE, USER)
    assert [line["status"] for line in standin.state()["journal"]] == [None, 200]


def test_waiting_for_calls_ends_in_time(standin: StandIn) -> None:
    """When they do not come it is an error, not for ever."""
    with pytest.raises(TimeoutError):
        standin.wait_for_calls(1, EVENTS_TRACK, timeout=0.05)


def test_reset_forgets_everything(standin: StandIn, client: Client) -> None:
    """Faults and settings too."""
    empty = standin.state()
    standin.configure(latency=0.01, forgotten=["ann@example.com"])
    standin.fault(status=500, skip=1)
    client.call(USERS_UPDATE, user(plan_type=1))
    standin.reset()
    assert standin.state() == empty
    assert [client.call(USERS_UPDATE, USER) for _ in range(2)] == [(200, SUCCESS)] * 2


@pytest.mark.parametrize(
    "mistake",
    [
        lambda standin: standin.fault("sulk"),
        lambda standin: standin.fault(endpoint="users/delete"),
        lambda standin: standin.fault(often=2),
        lambda standin: standin.configure(latenzy=1),
    ],
)
def test_a_mistake_in_a_test_is_an_error(standin: StandIn, mistake: Any) -> None:
    """A fault or setting that does not exist is refused, not ignored."""
    with pytest.raises(ValueError, match=r"no such fault|unexpected keyword argument"):
        mistake(standin)


def test_tls() -> None:
    """A certificate that is all right: calls, faults and resets work as without."""
    with StandIn(tls="good", latency=0.01) as standin:
        assert standin.url == f"https://localhost:{standin.port}"
        context = ssl.create_default_context(cafile=standin.ca_file)
        client = http.client.HTTPSConnection("localhost", standin.port, context=context, timeout=5)
        standin.fault("reset_after", skip=1, times=1)
        client.request("POST", "/api/users/update", json.dumps(USER), HEADERS)
        assert json.loads(client.getresponse().read()) == SUCCESS
        client.request("POST", "/api/users/update", json.dumps(USER), HEADERS)
        with pytest.raises(ConnectionResetError):
            client.getresponse()
        client.close()
        standin.fault("cut")
        client.request("POST", "/api/users/update", json.dumps(USER), HEADERS)
        with pytest.raises(http.client.IncompleteRead):
            client.getresponse().read()
        client.close()
        assert standin.state()["accepted"][USERS_UPDATE] == {"ann@example.com": 3}


@pytest.mark.parametrize(("kind", "message"), OTHERS_CERTIFICATES.items())
def test_certificates_that_no_client_trusts(kind: Any, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is refused for its own reason, and no request arrives."""
    with StandIn(tls=kind) as standin:
        context = ssl.create_default_context(cafile=standin.ca_file)
        with pytest.raises(ssl.SSLCertVerificationError) as error:
            http.client.HTTPSConnection("localhost", standin.port, context=context).connect()
        assert error.value.verify_message == message
        assert standin.counters()["calls"] == {}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("end", ["SIGTERM", "parent"])
def test_the_process_ends(end: str) -> None:
    """At SIGTERM, and when the process that started it is killed."""
    program = "import sys; from standin_handle import StandIn; print(StandIn().pid, flush=True); sys.stdin.read()"
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    process = os.pidfd_open(pid)
    if end == "parent":
        parent.kill()
    else:
        os.kill(pid, signal.SIGTERM)
    readable, _, _ = select.select([process], [], [], 5)
    os.close(process)
    parent.kill()
    parent.communicate()
    assert readable


def test_it_says_when_it_cannot_start(standin: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    """A port that is taken, for example."""
    with pytest.raises(RuntimeError, match="the stand-in did not start: exit code 1"):
        StandIn(port=standin.port)
    assert "address already in use" in capfd.readouterr().err


def test_trap_keeps_what_it_gets() -> None:
    """And never answers."""
    with Trap() as trap, socket.create_connection(("127.0.0.1", trap.port)) as connection:
        connection.sendall(b"the key")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        assert (trap.connections, trap.received) == (1, b"the key")


def test_describe(standin: StandIn, client: Client) -> None:
    """Users and events in words, as the demo shows them."""
    client.call(USERS_UPDATE, user(first_name="Zoë", recent_page_view=True))
    client.call(EVENTS_TRACK, event(dataFields={"page": "pricing"}))
    assert describe(standin.state()) == "\n".join(
        [
            "Users in the stand-in for Iterable: 1",
            "",
            "  ann@example.com",
            '    first_name        "Zoë"',
            "    recent_page_view  true",
            "",
            "Events in the stand-in for Iterable: 1",
            "",
            "  page-view-1: page_view of ann@example.com at 2026-01-13 14:30:45 UTC",
            '    page  "pricing"',
        ]
    )
