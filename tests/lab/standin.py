"""A stand-in for Iterable: a server that stores, answers, refuses and limits as the API does, and fails when told to.

    python tests/lab/standin.py '{"port": 8080, "latency": 0.3, "tls": ["CERT.pem", "KEY.pem"], ...}'

The argument has the fields of Settings. It prints {"port": ...} when it is ready, then answers what is asked on stdin,
see `Api.ask`, and ends with its stdin, so that it never outlives the process that started it. Tests and the demo hold
it by `standin_handle.StandIn`.

Where no source says what the API does, it refuses: what passes here is documented. Not modelled, so refused as unknown
parameters: userId, preferUserId, mergeNestedObjects, createNewFields, campaignId, templateId.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import http
import json
import re
import signal
import socket
import ssl
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

USERS_UPDATE, USERS_BULK_UPDATE = "users/update", "users/bulkUpdate"
EVENTS_TRACK, EVENTS_TRACK_BULK = "events/track", "events/trackBulk"
ENDPOINTS = (USERS_UPDATE, EVENTS_TRACK, USERS_BULK_UPDATE, EVENTS_TRACK_BULK)
ANY = "*"
KEY = "0123456789abcdef0123456789abcdef"

_USER: dict[str, type] = {"email": str, "dataFields": dict}  # names, and the type that the JSON value must have
_EVENT: dict[str, type] = {"email": str, "eventName": str, "id": str, "createdAt": int, "dataFields": dict}
_FIELDS = {USERS_UPDATE: _USER, EVENTS_TRACK: _EVENT, USERS_BULK_UPDATE: _USER, EVENTS_TRACK_BULK: _EVENT}
_ITEMS = {USERS_BULK_UPDATE: "users", EVENTS_TRACK_BULK: "events"}  # the list in a bulk body
_EXPECTED = {str: "String value", dict: "Object", int: "Number value", list: "Array"}
_FAILED = {
    USERS_BULK_UPDATE: ("invalid", "notFound", "forgotten", "invalidData", "conflict"),
    EVENTS_TRACK_BULK: ("invalid", "notFound", "forgotten"),
}
_LISTS = {
    "InvalidEmailAddressError": "invalidEmails",
    "ForgottenUserError": "forgottenEmails",
    "RequestFieldsTypesMismatched": "invalidDataEmails",
}
_TYPES = {bool: ("boolean",), int: ("long", "double"), float: ("double",), dict: ("object",)}
_MOST_BYTES = 4_000_000
_MOST_ITEMS = 1000
_LATEST_SECOND = 253_402_300_799  # the year 9999: whatever is above is no number of seconds
_EMAIL = re.compile(r"[^\s@\x00-\x1f\x7f]+@([^\s@.\x00-\x1f\x7f]+\.)+[^\s@.\x00-\x1f\x7f]{2,}")
_EVENT_ID = re.compile(r"[A-Za-z0-9-]{1,512}")
_DATE = re.compile(
    r"\d{4}-\d\d-\d\d( \d\d:\d\d:\d\d( [+-]\d\d:\d\d)?|T\d\d:\d\d:\d\d\.\d{3}(Z|[+-]\d\d:\d\d))?", re.ASCII
)
_LIBRARY = re.compile(r"(python|urllib|requests|aiohttp|httpx|curl|wget)", re.IGNORECASE)
_JSON_TYPE = re.compile(r"application/json(;\s*charset=utf-8)?", re.IGNORECASE)
_ANSWERING = {"reply", "drip", "drip_body", "cut", "echo_headers"}
_ACTIONS = _ANSWERING | {"raw", "silence", "reset_before", "reset_after"}
_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
_MOST_VIOLATIONS = 100  # that are kept


@dataclass
class Settings:
    """Times are in seconds, limits are calls in any second; `others` of the single ones are used up by other programs.

    forgotten      addresses that every endpoint refuses
    disallowed     event names that are not tracked, although the answer is a 200
    type_clash     what bulk does when the type of one item's field is wrong: "refuse" them all, or "list" that one
    list_unknown   whether trackBulk refuses the events of users who are not there, as notFoundEmails
    refused        {bulk endpoint: {address: [list, address that the list names]}}; null for the pair: in no list
    """

    key: str = KEY
    latency: float = 0.0
    limit_users: int = 500
    limit_events: int = 2000
    limit_users_bulk: int = 5
    limit_events_bulk: int = 10
    others: int = 0
    retry_after: str | None = None
    forgotten: frozenset[str] = frozenset()
    disallowed: frozenset[str] = frozenset()
    type_clash: str = "refuse"
    list_unknown: bool = True
    refused: dict[str, dict[str, tuple[str, str] | None]] = field(default_factory=dict)
    journal: bool = True

    def __post_init__(self) -> None:
        if self.type_clash not in ("refuse", "list") or self.refused.keys() - _ITEMS:
            raise ValueError(f"no such setting: {self}")
        self.forgotten = frozenset(map(str.lower, self.forgotten))
        self.disallowed = frozenset(self.disallowed)
        self.refused = {bulk: {email.lower(): to for email, to in each.items()} for bulk, each in self.refused.items()}
        self.limits = {
            USERS_UPDATE: self.limit_users - self.others,
            EVENTS_TRACK: self.limit_events - self.others,
            USERS_BULK_UPDATE: self.limit_users_bulk,
            EVENTS_TRACK_BULK: self.limit_events_bulk,
        }


@dataclass
class Fault:
    """What goes wrong with the calls of `endpoint` that have `email`: the first `skip` pass, the next `times` do not.

    reply         the answer of `status`, `headers` and `body`; without a status the API's own, after `latency` seconds
    drip          the same, one byte every `interval` seconds; drip_body sends the head at once
    cut           the same, but the connection closes after half of the body
    raw           `body` as it is in place of an answer, then the connection closes, unless `keep_open`
    silence       no answer, until the client leaves
    reset_before  no answer but a TCP reset; with reset_after the call is processed
    echo_headers  400 with the request's headers, Api-Key included, in `msg`

    `alter` replaces values in the API's own answer, and takes away those for which it has None. `processed` asks for
    the call to be processed although its answer is another.
    """

    action: str = "reply"
    endpoint: str = ANY
    email: str | None = None
    times: int | None = None
    skip: int = 0
    processed: bool = False
    latency: float | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""  # base64
    alter: dict[str, Any] = field(default_factory=dict)
    interval: float = 0.05
    keep_open: bool = False

    def __post_init__(self) -> None:
        if self.action not in _ACTIONS or self.endpoint not in (*ENDPOINTS, ANY):
            raise ValueError(f"no such fault: {self}")
        self.content = base64.b64decode(self.body)
        own_answer = self.status is None and self.action in ("reply", "drip", "drip_body", "cut")
        self.processed = self.processed or own_answer or self.action == "reset_after"

    def strikes(self, call: Call) -> bool:
        """Whether this call is one of its calls. Counts it."""
        if self.endpoint not in (ANY, call.endpoint) or self.times == 0:
            return False
        if self.email is not None and self.email.lower() not in map(str.lower, call.emails):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Refusal(Exception):
    """An answer that is not Success. `violation`: no correct program sends a request that is answered so."""

    def __init__(self, status: int, code: str, msg: str, params: Any = None, *, violation: bool = False) -> None:
        super().__init__(msg)
        self.status = status
        self.code = code
        self.violation = violation
        self.document = {"msg": msg, "code": code, "params": params}


class Answer(NamedTuple):
    status: int
    head: bytes
    body: bytes


def make_answer(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    """Its Content-Type is JSON and its Content-Length that of the body, unless `headers` say otherwise."""
    all_headers = {"content-type": "application/json", "content-length": str(len(body))}
    all_headers |= {name.lower(): value for name, value in (headers or {}).items()}
    lines = [f"{name.title()}: {value}" for name, value in all_headers.items()]
    head = "\r\n".join([f"HTTP/1.1 {status} {_PHRASES.get(status, 'Unknown')}", *lines, "", ""])
    return Answer(status, head.encode("latin-1"), body)


def make_json_answer(status: int, document: Any, headers: Mapping[str, str] | None = None) -> Answer:
    return make_answer(status, _encode(document).encode(), headers)


_encode = json.JSONEncoder(separators=(",", ":")).encode
SUCCESS = make_json_answer(200, {"msg": "", "code": "Success", "params": None})


class Call:
    """A line of the journal. `t` is time.monotonic() at its arrival; `status` stays None when no answer was sent.

    `emails` are the addresses of all its items; `email` and `event_id` are those of a call that is not bulk.
    """

    def __init__(self, endpoint: str, document: Any) -> None:
        body = document if isinstance(document, dict) else {}
        items = body.get(_ITEMS[endpoint]) if endpoint in _ITEMS else [body]
        objects = filter(lambda item: isinstance(item, dict), items if isinstance(items, list) else ())
        self.t = time.monotonic()
        self.endpoint = endpoint
        self.emails = [email for item in objects if isinstance(email := item.get("email"), str)]
        self.email = self.emails[0] if self.emails and endpoint not in _ITEMS else None
        self.event_id = body.get("id")
        self.status: int | None = None


class LastSecond:
    """The times of what happened within the last second, and the most that ever were."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self.most = 0

    def count(self, now: float) -> int:
        times = self._times
        while times and times[0] <= now - 1:
            times.popleft()
        return len(times)

    def add(self, now: float) -> None:
        self._times.append(now)
        self.most = max(self.most, self.count(now))


class Project:
    """What one Iterable project holds, and what became known of the calls to it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.users: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.field_types: dict[str, dict[str, str]] = {}  # by `user` or the event's name
        self.faults: list[Fault] = []
        self.journal: list[Call] = []
        self.calls: Counter[str] = Counter()
        self.answers: dict[str, Counter[int]] = {}
        self.arrivals = {endpoint: LastSecond() for endpoint in ENDPOINTS}
        self.within_limit = {endpoint: LastSecond() for endpoint in ENDPOINTS}
        self.accepted: dict[str, Counter[str]] = {endpoint: Counter() for endpoint in ENDPOINTS}
        self.violations: list[str] = []
        self.connections = 0
        self.last_headers: Mapping[str, str] = {}

    def arrive(self, request: Request, document: Any) -> Call:
        """Count a call, whatever it is."""
        self.last_headers = request.headers
        call = Call(request.path.removeprefix("/api/"), document)
        self.calls[call.endpoint] += 1
        if call.endpoint in self.arrivals:
            self.arrivals[call.endpoint].add(call.t)
        if self.settings.journal:
            self.journal.append(call)
        return call

    def note_answer(self, call: Call, status: int) -> None:
        call.status = status
        self.answers.setdefault(call.endpoint, Counter())[status] += 1

    def note_violation(self, text: str) -> None:
        if len(self.violations) < _MOST_VIOLATIONS:
            self.violations.append(text)

    def answer(self, call: Call, request: Request, document: Any) -> Answer:
        """Process a call as the API would."""
        try:
            self._check_request(call, request)
            if isinstance(document, ValueError):
                raise Refusal(400, "BadJsonBody", f"[/api/{call.endpoint}] {document}", violation=True)
            return (self._take_group if call.endpoint in _ITEMS else self._take_one)(call.endpoint, document)
        except Refusal as refusal:
            if refusal.violation:
                self.note_violation(f"{request.method} {request.path}: {refusal}")
            retry_after = self.settings.retry_after if refusal.status == 429 else None
            return make_json_answer(
                refusal.status, refusal.document, {} if retry_after is None else {"Retry-After": retry_after}
            )

    def _check_request(self, call: Call, request: Request) -> None:
        headers = request.headers
        if call.endpoint not in ENDPOINTS:
            raise Refusal(404, "NotFound", f"No such endpoint: {request.path}", violation=True)
        if request.method != "POST":
            raise Refusal(405, "BadParams", f"Method not allowed: {request.method}", violation=True)
        if headers.get("api-key") != self.settings.key:
            raise Refusal(401, "BadApiKey", "Invalid API key")
        within_limit = self.within_limit[call.endpoint]
        if within_limit.count(call.t) >= self.settings.limits[call.endpoint]:
            raise Refusal(429, "RateLimitExceeded", f"Rate limit of {call.endpoint} exceeded")
        within_limit.add(call.t)
        if not _JSON_TYPE.fullmatch(headers.get("content-type", "")):
            raise Refusal(400, "BadJsonBody", "Content-Type must be application/json", violation=True)
        if _LIBRARY.match(headers.get("user-agent") or "python"):
            raise Refusal(400, "BadParams", "User-Agent must name the program", violation=True)
        if len(request.body) > _MOST_BYTES:
            raise Refusal(413, "RequestEntityTooLarge", "Request entity too large", violation=True)

    def _take_one(self, endpoint: str, item: Any) -> Answer:
        check_item(endpoint, item, "obj")
        self._check_item(item)
        event = item.get("eventName")
        if event in self.settings.disallowed:
            msg = f"Event {event} is disallowed from tracking"
            return make_json_answer(200, {"msg": msg, "code": "Success", "params": None})
        self._store(endpoint, item)
        if "id" not in item:
            return SUCCESS
        msg = f"Event with id: {item['id']} tracked."
        return make_json_answer(200, {"msg": msg, "code": "Success", "params": {"id": item["id"]}})

    def _take_group(self, endpoint: str, body: Any) -> Answer:
        items, known, fields, taken = check_group(endpoint, body), dict(self.field_types), self._field_names(), []
        lists: dict[str, list[str]] = {f"{why}{who}": [] for why in _FAILED[endpoint] for who in ("Emails", "UserIds")}
        try:
            for item in items:
                if failure := self._find_failure(endpoint, item):
                    lists.setdefault(failure[0], []).append(failure[1])
                else:
                    taken.append(item)
        except Refusal:
            self.field_types = known
            raise
        lists.pop("", None)
        disallowed = self.settings.disallowed & {item.get("eventName") for item in items}
        for item in taken:
            if item.get("eventName") not in disallowed:
                self._store(endpoint, item)
        document = {
            "successCount": len(taken),
            "failCount": len(items) - len(taken),
            "invalidEmails": lists["invalidEmails"],
            "invalidUserIds": [],
            "createdFields": sorted(self._field_names() - fields),
            "filteredOutFields": [],
            "failedUpdates": lists,
        }
        if endpoint == EVENTS_TRACK_BULK:
            document["disallowedEventNames"] = [*disallowed]
        return make_json_answer(200, document)

    def _field_names(self) -> set[str]:
        return {name for types in self.field_types.values() for name in types}

    def _find_failure(self, endpoint: str, item: dict[str, Any]) -> tuple[str, str] | None:
        """Why an item of a group fails: the list, or "" for none, and the address that stands there."""
        email = item["email"].lower()
        refused = self.settings.refused.get(endpoint, {})
        if email in refused:
            return refused[email] or ("", email)
        try:
            self._check_item(item)
        except Refusal as refusal:
            if refusal.code == "RequestFieldsTypesMismatched" and self.settings.type_clash == "refuse":
                raise
            return _LISTS[refusal.code], email
        if endpoint == EVENTS_TRACK_BULK and self.settings.list_unknown and email not in self.users:
            return "notFoundEmails", email
        return None

    def _check_item(self, item: dict[str, Any]) -> None:
        """Raises Refusal for what is wrong with the data: here the program has done all that it could."""
        email = item["email"]
        if not _EMAIL.fullmatch(email):
            raise Refusal(400, "InvalidEmailAddressError", f"Invalid email: {email}")
        if email.lower() in self.settings.forgotten:
            raise Refusal(409, "ForgottenUserError", f"User {email} has been forgotten")
        self._fix_types(item.get("eventName", "user"), item.get("dataFields", {}))

    def _store(self, endpoint: str, item: dict[str, Any]) -> None:
        email = item["email"].lower()
        if "eventName" in item:
            event = {"createdAt": int(time.time()), **item, "email": email}
            identity = event.pop("id", f"without-id-{len(self.events)}")
            self.events[identity] = event
        else:
            identity, user = email, self.users.setdefault(email, {})
            for name, value in item.get("dataFields", {}).items():
                if value is None:
                    user.pop(name, None)
                else:
                    user[name] = value
        self.accepted[endpoint][identity] += 1

    def _fix_types(self, category: str, fields: dict[str, Any]) -> None:
        """A field has the type of the first value ever sent. `category` is `user` or the event's name."""
        known, errors = dict(self.field_types.get(category, {})), {}
        for name, value in fields.items():
            types = field_types(value)
            if types and known.setdefault(name, types[0]) not in types:
                errors[name] = {
                    "incomingTypes": types,
                    "expectedType": known[name],
                    "category": "user" if category == "user" else "customEvent",
                    "offendingValue": value,
                    "_type": "UnexpectedType",
                }
        if errors:
            msg = "Project 1: The request does not have the same data types as the data previously submitted."
            raise Refusal(400, "RequestFieldsTypesMismatched", msg, {"validationErrors": errors})
        self.field_types[category] = known

    def counters(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "answers": self.answers,
            "throttled": sum(statuses[429] for statuses in self.answers.values()),
            "connections": self.connections,
            "busiest_second": {endpoint: last.most for endpoint, last in self.arrivals.items()},
        }

    def state(self) -> dict[str, Any]:
        return {
            "users": self.users,
            "events": self.events,
            "journal": [vars(call) for call in self.journal],
            "counters": self.counters(),
            "accepted": self.accepted,
            "violations": self.violations,
            "last_headers": self.last_headers,
        }


def check_group(endpoint: str, body: Any) -> list[dict[str, Any]]:
    """The items of a bulk body. Raises Refusal unless it is as documented, and each address stands in it once."""
    prefix, name = f"[/api/{endpoint}]", _ITEMS[endpoint]
    _check_object(endpoint, {name: list}, body, "obj")
    if name not in body:
        raise _wrong_type(endpoint, f"obj.{name}", list)
    items: list[dict[str, Any]] = body[name]
    if not items and endpoint == USERS_BULK_UPDATE:
        raise Refusal(400, "InvalidEmailAddressError", "Emails invalid: ", violation=True)
    if len(items) > _MOST_ITEMS:
        raise Refusal(400, "BatchTooLarge", f"{prefix} More than {_MOST_ITEMS} {name}", violation=True)
    for index, item in enumerate(items):
        check_item(endpoint, item, f"obj.{name}[{index}]")
    if len({item["email"].lower() for item in items}) < len(items):
        raise Refusal(400, "BadParams", f"{prefix} The same address twice in one group", violation=True)
    return items


def check_item(endpoint: str, item: Any, where: str) -> None:
    """Raises Refusal unless it is an object with documented keys only, each with a value of its type."""
    prefix, fields = f"[/api/{endpoint}]", _FIELDS[endpoint]
    _check_object(endpoint, fields, item, where)
    if "email" not in item:  # an empty body is how a key is tried
        msg = f"{prefix} email or userId is required"
        raise Refusal(400, "BadParams", msg, violation=bool(item) or endpoint in _ITEMS)
    if fields is _USER:
        return
    if not item.get("eventName"):
        raise Refusal(400, "BadParams", f"{prefix} eventName is required", violation=True)
    if "id" in item and not _EVENT_ID.fullmatch(item["id"]):
        msg = f"{prefix} id must be letters, digits and hyphens, at most 512 bytes"
        raise Refusal(400, "BadParams", msg, violation=True)
    if item.get("createdAt", 0) > _LATEST_SECOND:
        raise Refusal(400, "BadParams", f"{prefix} createdAt must be in seconds", violation=True)


def _check_object(endpoint: str, fields: Mapping[str, type], document: Any, where: str) -> None:
    if type(document) is not dict:
        raise _wrong_type(endpoint, where, dict)
    for name, value in document.items():
        if name not in fields:
            raise Refusal(400, "BadParams", f"[/api/{endpoint}] Unknown parameter: {name}", violation=True)
        if type(value) is not fields[name]:
            raise _wrong_type(endpoint, f"{where}.{name}", fields[name])


def _wrong_type(endpoint: str, where: str, expected: type) -> Refusal:
    params = {where: f"{_EXPECTED[expected]} expected"}
    return Refusal(400, "BadJsonBody", f"[/api/{endpoint}] Invalid JSON body", params, violation=True)


def field_types(value: Any) -> tuple[str, ...]:
    """The types that Iterable takes a value for, the likeliest first; none for null and the empty list."""
    if isinstance(value, str):
        return ("date", "string", "keyword") if _DATE.fullmatch(value) else ("string", "keyword")
    if isinstance(value, list):
        return field_types(value[0]) if value else ()
    return _TYPES.get(type(value), ())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def parse_json(body: bytes) -> Any:
    """The JSON document, or the ValueError that says why it is none."""
    try:
        return _decode(body.decode())
    except ValueError as error:
        return error


class Request:
    """The names of the headers are in lower case. Raises ValueError when the head is not HTTP/1.1."""

    def __init__(self, head: bytes) -> None:
        request_line, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, version = request_line.split(" ")
        if version != "HTTP/1.1" or not all(":" in line for line in lines):
            raise ValueError(f"not HTTP/1.1: {request_line!r}")
        fields = (line.partition(":") for line in lines)
        self.headers = {name.lower(): value.strip() for name, _, value in fields}
        self.body = b""


class Connection(asyncio.Protocol):
    """The requests of one client, one after the other.

    Not aiohttp's, because faults need each byte under control, and because a benchmark shares its cores with this
    process: a call over TLS takes two thirds of the CPU time.
    """

    transport: asyncio.Transport

    def __init__(self, api: Api) -> None:
        self._api = api
        self._buffer = bytearray()
        self._request: Request | None = None  # whose body is not here yet
        self._busy = False
        self._last = False  # the client wants no further answer than this one
        self._pending: asyncio.Task[None] | asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._api.project.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        if self._pending:
            self._pending.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._busy:
            self._take_request()

    def _take_request(self) -> None:
        try:
            request = self._read()
        except ValueError as error:  # what came is no request
            self._api.project.note_violation(str(error))
            self._busy = True
            answer = make_json_answer(400, str(error))
            self.transport.write(answer.head + answer.body)
            self.transport.close()
            return
        if request:
            self._busy = True
            self._last = request.headers.get("connection", "").lower() == "close"
            self._serve(request)

    def _read(self) -> Request | None:
        """A whole request off the buffer. Raises ValueError when it is none."""
        if self._request is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return None
            self._request = Request(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
        request, length = self._request, int(self._request.headers.get("content-length", "0"))
        if len(self._buffer) < length:
            return None
        request.body = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._request = None
        return request

    def _serve(self, request: Request) -> None:
        """Answer, unless the client leaves before."""
        loop, project, document = asyncio.get_running_loop(), self._api.project, parse_json(request.body)
        call = project.arrive(request, document)
        if fault := next((fault for fault in project.faults if fault.strikes(call)), None):
            self._pending = loop.create_task(self._fail(fault, project, call, request, document))
            return
        answer = project.answer(call, request, document)
        if project.settings.latency:
            self._pending = loop.call_later(project.settings.latency, self._send, project, call, answer)
        else:
            self._send(project, call, answer)

    def _send(self, project: Project, call: Call, answer: Answer) -> None:
        self.transport.write(answer.head + answer.body)
        project.note_answer(call, answer.status)
        self._finish(keep=True)

    def _finish(self, *, keep: bool) -> None:
        """The answer is written: on to the next request."""
        if keep and not self._last:
            self._busy = False
            self._take_request()
        else:
            self.transport.close()

    async def _fail(self, fault: Fault, project: Project, call: Call, request: Request, document: Any) -> None:
        answer = project.answer(call, request, document) if fault.processed else SUCCESS
        if fault.action == "echo_headers":
            msg = f"[/api/{call.endpoint}] Invalid JSON body, headers: {request.headers}"
            answer = make_json_answer(400, {"msg": msg, "code": "BadJsonBody", "params": None})
        elif fault.status is not None:
            answer = make_answer(fault.status, fault.content, fault.headers)
        elif fault.alter:
            altered = {**json.loads(answer.body), **fault.alter}
            answer = make_json_answer(answer.status, {k: value for k, value in altered.items() if value is not None})
        await asyncio.sleep(project.settings.latency if fault.latency is None else fault.latency)
        await self._misbehave(fault, answer)
        if fault.action in _ANSWERING:
            project.note_answer(call, answer.status)
        whole = fault.action in _ANSWERING - {"cut"}
        self._finish(keep=whole and b"\r\nconnection: close\r\n" not in answer.head.lower())

    async def _misbehave(self, fault: Fault, answer: Answer) -> None:
        """Put a fault on the wire."""
        write, content = self.transport.write, answer.head + answer.body
        match fault.action:
            case "reply" | "echo_headers":
                write(content)
            case "drip" | "drip_body":
                at_once = len(answer.head) if fault.action == "drip_body" else 0
                write(content[:at_once])
                for at in range(at_once, len(content)):
                    write(content[at : at + 1])
                    await asyncio.sleep(fault.interval)
            case "cut":
                write(answer.head + answer.body[: len(answer.body) // 2])
            case "raw":
                write(fault.content)
                if fault.keep_open:
                    await asyncio.Event().wait()
            case "silence":
                await asyncio.Event().wait()
            case "reset_before" | "reset_after":
                linger = struct.pack("ii", 1, 0)  # for no time at all: closing sends RST
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.transport.abort()


class Api:
    """The project behind all connections, and what may be asked of it."""

    def __init__(self, settings: Settings) -> None:
        self._first_settings = settings
        self.reset()

    def ask(self, line: bytes) -> str:
        """[method, keywords] as a line of JSON is answered [true, result], or [false, text] when it cannot be done."""
        method, keywords = json.loads(line)
        try:
            of = self if hasattr(self, method) else self.project
            return _encode([True, getattr(of, method)(**keywords)])
        except (TypeError, ValueError) as error:
            return _encode([False, str(error)])

    def reset(self) -> None:
        """An empty project, the settings of the start, no faults. Calls on the wire end with the old one."""
        self.project = Project(self._first_settings)

    def configure(self, **changes: Any) -> None:
        self.project.settings = dataclasses.replace(self.project.settings, **changes)

    def fault(self, **rule: Any) -> None:
        self.project.faults.append(Fault(**rule))


async def serve(settings: Settings, port: int = 0, tls: tuple[str, str] | None = None) -> None:
    """Serve until stdin ends."""
    loop, context = asyncio.get_running_loop(), None
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*tls)
    api, questions = Api(settings), asyncio.StreamReader(limit=2**30)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    server = await loop.create_server(lambda: Connection(api), "127.0.0.1", port, ssl=context, backlog=1024)
    print(_encode({"port": server.sockets[0].getsockname()[1]}), flush=True)
    while line := await questions.readline():
        print(api.ask(line), flush=True)


def main() -> None:
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    where = {name: options.pop(name) for name in ("port", "tls") if name in options}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which still needs its answers
    asyncio.run(serve(Settings(**options), **where))


if __name__ == "__main__":
    main()
