"""A stand-in for Iterable: a server that stores, answers, refuses and limits as the API does, and fails when told to.

    python tests/standin.py [--port 0] [--tls CERT.pem KEY.pem] [--latency SECONDS] [--key KEY] ...

It prints one JSON line, {"port": ..., "control_port": ...}, when it is ready, and ends with its stdin or at SIGTERM, so
that it never outlives the process that started it. Tests and the demo hold it by `standin_handle.StandIn`.

Where no source says what the API does, it refuses: what passes here is documented. Not modelled: mergeNestedObjects,
createNewFields, field names with a dot, and identities changed by `email` or `userId` inside dataFields.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import http
import json
import os
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

USERS_UPDATE = "users/update"
EVENTS_TRACK = "events/track"
ANY = "*"
KEY = "0123456789abcdef0123456789abcdef"

_FIELDS = {  # of a body: its name, and the type that the JSON value must have
    USERS_UPDATE: {
        "email": str,
        "userId": str,
        "dataFields": dict,
        "preferUserId": bool,
        "mergeNestedObjects": bool,
        "createNewFields": bool,
    },
    EVENTS_TRACK: {
        "email": str,
        "userId": str,
        "eventName": str,
        "id": str,
        "createdAt": int,
        "dataFields": dict,
        "campaignId": int,
        "templateId": int,
        "createNewFields": bool,
    },
}
_EXPECTED = {str: "String value", dict: "Object", bool: "Boolean value", int: "Number value"}
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
_MOST_VIOLATIONS = 100  # that are kept


@dataclass(frozen=True)
class Settings:
    """`others` calls a second of each limit are used up by other programs of the project; latency is in seconds."""

    key: str = KEY
    latency: float = 0.0
    limit_users: int = 500
    limit_events: int = 2000
    others: int = 0
    retry_after: str | None = None
    forgotten: frozenset[str] = frozenset()
    journal: bool = True

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """Raises TypeError when a name is unknown."""
        if "forgotten" in changes:
            changes = {**changes, "forgotten": frozenset(map(str.lower, changes["forgotten"]))}
        return dataclasses.replace(self, **changes)


@dataclass
class Fault:
    """What goes wrong with the calls of `endpoint` and `email`: the first `skip` of them pass, the next `times` do not.

    reply         the answer of `status`, `headers` and `body`; without a status the API's own, after `latency` seconds
    drip          the same, one byte every `interval` seconds; drip_body sends the head at once
    cut           the same, but the connection closes after half of the body
    raw           `body` as it is in place of an answer, then the connection closes, unless `keep_open`
    silence       no answer, until the client leaves
    reset_before  no answer but a TCP reset; with reset_after the call is processed
    echo_headers  400 with the request's headers, Api-Key included, in `msg`

    `processed` asks for the call to be processed although its answer is another.
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
    body: str = ""
    body_base64: str | None = None
    interval: float = 0.05
    keep_open: bool = False

    def __post_init__(self) -> None:
        if self.action not in _ACTIONS or self.endpoint not in (USERS_UPDATE, EVENTS_TRACK, ANY):
            raise ValueError(f"no such fault: {self}")
        self.content = self.body.encode() if self.body_base64 is None else base64.b64decode(self.body_base64)
        own_answer = self.status is None and self.action in ("reply", "drip", "drip_body", "cut")
        self.processed = self.processed or own_answer or self.action == "reset_after"

    def strikes(self, call: Call) -> bool:
        """Whether this call is one of its calls. Counts it."""
        if self.endpoint not in (ANY, call.endpoint) or self.times == 0:
            return False
        if self.email is not None and self.email.lower() != (call.email or "").lower():
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
    try:
        reason = http.HTTPStatus(status).phrase
    except ValueError:
        reason = "Unknown"
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name.title()}: {value}" for name, value in all_headers.items())]
    return Answer(status, "\r\n".join([*lines, "", ""]).encode("latin-1"), body)


def make_json_answer(status: int, document: Any, headers: Mapping[str, str] | None = None) -> Answer:
    return make_answer(status, _encode(document).encode(), headers)


_encode = json.JSONEncoder(separators=(",", ":")).encode
SUCCESS = make_json_answer(200, {"msg": "", "code": "Success", "params": None})


@dataclass(slots=True)
class Call:
    """A line of the journal. `t` is time.monotonic() at its arrival; `status` stays None when no answer was sent."""

    t: float
    endpoint: str
    email: str | None
    event_id: str | None
    status: int | None = None
    fault: str | None = None


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
        self.field_types: dict[tuple[str, str], str] = {}
        self.faults: list[Fault] = []
        self.journal: list[Call] = []
        self.calls: Counter[str] = Counter()
        self.answers: dict[str, Counter[int]] = {}
        self.arrivals = {USERS_UPDATE: LastSecond(), EVENTS_TRACK: LastSecond()}
        self.within_limit = {USERS_UPDATE: LastSecond(), EVENTS_TRACK: LastSecond()}
        self.accepted: dict[str, Counter[str]] = {USERS_UPDATE: Counter(), EVENTS_TRACK: Counter()}
        self.violations: list[str] = []
        self.connections = 0
        self.last_headers: Mapping[str, str] = {}
        self._arrived = asyncio.Event()

    def arrive(self, request: Request, document: Any) -> Call:
        """Count a call, whatever it is."""
        self.last_headers = request.headers
        endpoint = request.path.removeprefix("/api/")
        email, event_id = (document.get("email"), document.get("id")) if isinstance(document, dict) else (None, None)
        call = Call(
            time.monotonic(),
            endpoint,
            email if isinstance(email, str) else None,
            event_id if isinstance(event_id, str) else None,
        )
        self.calls[endpoint] += 1
        if endpoint in self.arrivals:
            self.arrivals[endpoint].add(call.t)
        if self.settings.journal:
            self.journal.append(call)
        self._arrived.set()
        return call

    async def wait_for_calls(self, count: int, endpoint: str) -> None:
        while (self.calls.total() if endpoint == ANY else self.calls[endpoint]) < count:
            self._arrived.clear()
            await self._arrived.wait()

    def note_answer(self, call: Call, status: int) -> None:
        call.status = status
        self.answers.setdefault(call.endpoint, Counter())[status] += 1

    def answer(self, call: Call, request: Request, document: Any) -> Answer:
        """Process a call as the API would."""
        try:
            self._check_request(call, request, document)
            if call.endpoint == USERS_UPDATE:
                return self._update_user(document)
            return self._track_event(document)
        except Refusal as refusal:
            if refusal.violation:
                self.note_violation(f"{request.method} {request.path}: {refusal}")
            headers = {}
            if refusal.status == 429 and self.settings.retry_after is not None:
                headers["Retry-After"] = self.settings.retry_after
            return make_json_answer(refusal.status, refusal.document, headers)

    def note_violation(self, text: str) -> None:
        if len(self.violations) < _MOST_VIOLATIONS:
            self.violations.append(text)

    def _check_request(self, call: Call, request: Request, document: Any) -> None:
        headers = request.headers
        if call.endpoint not in _FIELDS:
            raise Refusal(404, "NotFound", f"No such endpoint: {request.path}", violation=True)
        if request.method != "POST":
            raise Refusal(405, "BadParams", f"Method not allowed: {request.method}", violation=True)
        if headers.get("api-key") != self.settings.key:
            raise Refusal(401, "BadApiKey", "Invalid API key")
        self._check_limit(call)
        if not _JSON_TYPE.fullmatch(headers.get("content-type", "")):
            raise Refusal(400, "BadJsonBody", "Content-Type must be application/json", violation=True)
        if _LIBRARY.match(headers.get("user-agent") or "python"):
            raise Refusal(400, "BadParams", "User-Agent must name the program", violation=True)
        if isinstance(document, ValueError):
            raise Refusal(400, "BadJsonBody", f"[/api/{call.endpoint}] {document}", violation=True)
        _check_body(call.endpoint, document)
        email = document.get("email")
        if email is not None:
            if not _EMAIL.fullmatch(email):
                raise Refusal(400, "InvalidEmailAddressError", f"Invalid email: {email}")
            if email.lower() in self.settings.forgotten:
                raise Refusal(409, "ForgottenUserError", f"User {email} has been forgotten")

    def _check_limit(self, call: Call) -> None:
        limit = self.settings.limit_users if call.endpoint == USERS_UPDATE else self.settings.limit_events
        if self.within_limit[call.endpoint].count(call.t) >= limit - self.settings.others:
            raise Refusal(429, "RateLimitExceeded", f"Rate limit of {call.endpoint} exceeded")
        self.within_limit[call.endpoint].add(call.t)

    def _update_user(self, document: dict[str, Any]) -> Answer:
        fields = document.get("dataFields", {})
        self._fix_types("user", fields)
        identity = document["email"].lower() if "email" in document else document["userId"]
        user = self.users.setdefault(identity, {})
        for name, value in fields.items():
            if value is None:
                user.pop(name, None)
            else:
                user[name] = value
        self.accepted[USERS_UPDATE][identity] += 1
        return SUCCESS

    def _track_event(self, document: dict[str, Any]) -> Answer:
        self._fix_types(document["eventName"], document.get("dataFields", {}))
        event = {"createdAt": int(time.time()), **document}
        if "email" in event:
            event["email"] = event["email"].lower()
        event_id = event.pop("id", None)
        stored_id = event_id or uuid.uuid4().hex
        self.events[stored_id] = event
        self.accepted[EVENTS_TRACK][stored_id] += 1
        if event_id is None:
            return SUCCESS
        msg = f"Event with id: {event_id} tracked."
        return make_json_answer(200, {"msg": msg, "code": "Success", "params": {"id": event_id}})

    def _fix_types(self, category: str, fields: dict[str, Any]) -> None:
        """A field has the type of the first value ever sent. `category` is `user` or the event's name."""
        new, errors = {}, {}
        for name, value in fields.items():
            types = field_types(value)
            expected = self.field_types.get((category, name))
            if expected is None and types:
                new[category, name] = types[0]
            elif types and expected not in types:
                errors[name] = {
                    "incomingTypes": types,
                    "expectedType": expected,
                    "category": "user" if category == "user" else "customEvent",
                    "offendingValue": value,
                    "_type": "UnexpectedType",
                }
        if errors:
            sentences = [
                f"Field '{name}' already exists for type '{category}' and has a data type of '{error['expectedType']}' "
                f"but possible types '{', '.join(error['incomingTypes'])}' in the request."
                for name, error in errors.items()
            ]
            msg = "Project 1: The request does not have the same data types as the data previously submitted. "
            params = {"validationErrors": errors}
            raise Refusal(400, "RequestFieldsTypesMismatched", msg + " ".join(sentences), params)
        self.field_types.update(new)

    def counters(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "answers": self.answers,
            "throttled": sum(statuses[429] for statuses in self.answers.values()),
            "connections": self.connections,
            "busiest_second": {endpoint: last.most for endpoint, last in self.arrivals.items()},
        }

    def state(self) -> dict[str, Any]:
        keys = [field.name for field in dataclasses.fields(Call)]
        return {
            "users": self.users,
            "events": self.events,
            "journal": [{key: getattr(call, key) for key in keys} for call in self.journal],
            "counters": self.counters(),
            "accepted": self.accepted,
            "violations": self.violations,
            "last_headers": self.last_headers,
        }


def _check_body(endpoint: str, document: Any) -> None:
    """Raises Refusal unless it is an object with documented keys only, each with a value of its type."""
    prefix = f"[/api/{endpoint}]"
    if not isinstance(document, dict):
        params = {"obj": "Object expected"}
        raise Refusal(400, "BadJsonBody", f"{prefix} Invalid JSON body", params, violation=True)
    expected = _FIELDS[endpoint]
    for name, value in document.items():
        if name not in expected:
            raise Refusal(400, "BadParams", f"{prefix} Unknown parameter: {name}", violation=True)
        if type(value) is not expected[name]:
            params = {f"obj.{name}": f"{_EXPECTED[expected[name]]} expected"}
            raise Refusal(400, "BadJsonBody", f"{prefix} Invalid JSON body", params, violation=True)
    if "email" not in document and "userId" not in document:  # an empty body is how a key is tried
        raise Refusal(400, "BadParams", f"{prefix} email or userId is required", violation=bool(document))
    if endpoint == EVENTS_TRACK:
        _check_event(prefix, document)


def _check_event(prefix: str, document: dict[str, Any]) -> None:
    if not document.get("eventName"):
        raise Refusal(400, "BadParams", f"{prefix} eventName is required", violation=True)
    if "id" in document and not _EVENT_ID.fullmatch(document["id"]):
        msg = f"{prefix} id must be letters, digits and hyphens, at most 512 bytes"
        raise Refusal(400, "BadParams", msg, violation=True)
    if document.get("createdAt", 0) > _LATEST_SECOND:
        raise Refusal(400, "BadParams", f"{prefix} createdAt must be in seconds", violation=True)


def field_types(value: Any) -> tuple[str, ...]:
    """The types that Iterable takes a value for, the likeliest first; none for null and the empty list."""
    if isinstance(value, str):
        return ("date", "string", "keyword") if _DATE.fullmatch(value) else ("string", "keyword")
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int):
        return "long", "double"
    if isinstance(value, float):
        return ("double",)
    if isinstance(value, dict):
        return ("object",)
    return field_types(value[0]) if value else ()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def parse_json(body: bytes) -> Any:
    """The JSON document, or the ValueError that says why it is none."""
    try:
        return _decode(body.decode())
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("nested too deeply")


@dataclass(slots=True)
class Request:
    """The names of the headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


def parse_head(head: bytes) -> Request:
    """Raises ValueError when it is not HTTP/1.1."""
    request_line, *lines = head.decode("latin-1").split("\r\n")
    method, path, version = request_line.split(" ")
    if version != "HTTP/1.1" or not all(":" in line for line in lines):
        raise ValueError(f"not HTTP/1.1: {request_line!r}")
    fields = (line.partition(":") for line in lines)
    return Request(method, path, {name.lower(): value.strip() for name, _, value in fields})


class Connection(asyncio.Protocol):
    """The requests of one client, one after the other.

    Not aiohttp's, because faults need each byte of an answer under control, and because a benchmark shares its two
    cores with this process: a call over TLS took 330 µs of CPU time there, and takes 230 here.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._request: Request | None = None  # whose body is not here yet
        self._busy = False
        self._last = False  # the client wants no further answer than this one
        self._pending: asyncio.Task[None] | asyncio.TimerHandle | None = None

    def serve(self, request: Request) -> None:
        """Answer on the transport, then call `finish`. What happens later is `later` or `run`."""
        raise NotImplementedError

    def refuse(self, error: ValueError) -> None:
        """What came is no request."""
        self._busy = True
        answer = make_json_answer(400, str(error))
        self.transport.write(answer.head + answer.body)
        self.finish(keep=False)

    def later(self, delay: float, callback: Callable[..., None], *args: Any) -> None:
        """Call it after so many seconds, unless the client leaves."""
        self._pending = asyncio.get_running_loop().call_later(delay, callback, *args)

    def run(self, function: Callable[..., Awaitable[bool]], *args: Any) -> None:
        """Run it, unless the client leaves. It returns whether the connection stays open."""
        self._pending = asyncio.get_running_loop().create_task(self._run(function, *args))

    async def _run(self, function: Callable[..., Awaitable[bool]], *args: Any) -> None:
        keep = False
        try:
            keep = await function(*args)
        finally:
            self.finish(keep=keep)

    def finish(self, *, keep: bool) -> None:
        """The answer is written: on to the next request."""
        if keep and not self._last:
            self._busy = False
            self._take_request()
        else:
            self.transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

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
        except ValueError as error:
            self.refuse(error)
            return
        if request:
            self._busy = True
            self._last = request.headers.get("connection", "").lower() == "close"
            self.serve(request)

    def _read(self) -> Request | None:
        """A whole request off the buffer. Raises ValueError when it is none."""
        if self._request is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return None
            self._request = parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
        request, length = self._request, int(self._request.headers.get("content-length", "0"))
        if len(self._buffer) < length:
            return None
        request.body = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._request = None
        return request


class Api:
    """The project behind all connections."""

    def __init__(self, settings: Settings) -> None:
        self._first_settings = settings
        self.reset()

    def reset(self) -> None:
        """An empty project, the settings of the start, no faults. Calls on the wire end with the old one."""
        self.project = Project(self._first_settings)


class ApiConnection(Connection):
    """A client of Iterable's API."""

    def __init__(self, api: Api) -> None:
        super().__init__()
        self._api = api

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._api.project.connections += 1

    def refuse(self, error: ValueError) -> None:
        self._api.project.note_violation(str(error))
        super().refuse(error)

    def serve(self, request: Request) -> None:
        project, document = self._api.project, parse_json(request.body)
        call = project.arrive(request, document)
        fault = next((fault for fault in project.faults if fault.strikes(call)), None) if project.faults else None
        if fault:
            self.run(self._fail, fault, project, call, request, document)
            return
        answer = project.answer(call, request, document)
        if project.settings.latency:
            self.later(project.settings.latency, self._send, project, call, answer)
        else:
            self._send(project, call, answer)

    def _send(self, project: Project, call: Call, answer: Answer) -> None:
        self.transport.write(answer.head + answer.body)
        project.note_answer(call, answer.status)
        self.finish(keep=True)

    async def _fail(self, fault: Fault, project: Project, call: Call, request: Request, document: Any) -> bool:
        call.fault = fault.action
        answer = project.answer(call, request, document) if fault.processed else SUCCESS
        if fault.action == "echo_headers":
            msg = f"[/api/{call.endpoint}] Invalid JSON body, headers: {request.headers}"
            answer = make_json_answer(400, {"msg": msg, "code": "BadJsonBody", "params": None})
        elif fault.status is not None:
            answer = make_answer(fault.status, fault.content, fault.headers)
        await asyncio.sleep(project.settings.latency if fault.latency is None else fault.latency)
        keep = await self._misbehave(fault, answer)
        if fault.action in _ANSWERING:
            project.note_answer(call, answer.status)
        return keep and b"\r\nconnection: close\r\n" not in answer.head.lower()

    async def _misbehave(self, fault: Fault, answer: Answer) -> bool:
        """Put a fault on the wire. Returns whether the connection stays open."""
        match fault.action:
            case "reply" | "echo_headers":
                self.transport.write(answer.head + answer.body)
                return True
            case "drip":
                await self._drip(answer.head + answer.body, fault.interval)
                return True
            case "drip_body":
                self.transport.write(answer.head)
                await self._drip(answer.body, fault.interval)
                return True
            case "cut":
                self.transport.write(answer.head + answer.body[: len(answer.body) // 2])
            case "raw":
                self.transport.write(fault.content)
                if fault.keep_open:
                    await asyncio.Event().wait()
            case "silence":
                await asyncio.Event().wait()
            case "reset_before" | "reset_after":
                linger = struct.pack("ii", 1, 0)  # for no time at all: closing sends RST
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.transport.abort()
        return False

    async def _drip(self, content: bytes, interval: float) -> None:
        for at in range(len(content)):
            self.transport.write(content[at : at + 1])
            await asyncio.sleep(interval)


class ControlConnection(Connection):
    """A test that asks something of the stand-in: POST /<method> with its keywords as a JSON object.

    The answer is JSON; 400 with a text when it cannot be done.
    """

    def __init__(self, api: Api) -> None:
        super().__init__()
        self._api = api

    def serve(self, request: Request) -> None:
        self.run(self._answer, request.path.removeprefix("/"), request.body)

    async def _answer(self, method: str, body: bytes) -> bool:
        try:
            if method not in ("reset", "configure", "fault", "state", "counters", "wait_for_calls"):
                raise ValueError(f"no such method: {method}")
            answer = make_json_answer(200, await getattr(self, method)(**json.loads(body)))
        except (TypeError, ValueError) as error:
            answer = make_json_answer(400, str(error))
        self.transport.write(answer.head + answer.body)
        return True

    async def reset(self) -> None:
        self._api.reset()

    async def configure(self, **changes: Any) -> None:
        project = self._api.project
        project.settings = project.settings.changed(changes)

    async def fault(self, **rule: Any) -> None:
        self._api.project.faults.append(Fault(**rule))

    async def state(self) -> dict[str, Any]:
        return self._api.project.state()

    async def counters(self) -> dict[str, Any]:
        return self._api.project.counters()

    async def wait_for_calls(self, count: int, endpoint: str, timeout: float) -> bool:
        """Whether so many calls have arrived within `timeout` seconds."""
        try:
            await asyncio.wait_for(self._api.project.wait_for_calls(count, endpoint), timeout)
        except asyncio.TimeoutError:
            return False
        return True


async def serve(settings: Settings, port: int, tls: tuple[str, str] | None) -> None:
    """Serve until stdin ends or a signal comes."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    context = None
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*tls)
    api = Api(settings)
    listening = await loop.create_server(lambda: ApiConnection(api), "127.0.0.1", port, ssl=context, backlog=1024)
    controlling = await loop.create_server(lambda: ControlConnection(api), "127.0.0.1", 0)
    ports = [server.sockets[0].getsockname()[1] for server in (listening, controlling)]
    print(json.dumps(dict(zip(("port", "control_port"), ports, strict=True))), flush=True)
    threading.Thread(target=_await_end_of_stdin, args=(loop, stop), daemon=True).start()
    await stop.wait()


def _await_end_of_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    loop.call_soon_threadsafe(stop.set)


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for Iterable, for tests.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"), help="PEM files")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--key", default=KEY, help="the API key")
    parser.add_argument("--limit-users", type=int, default=500, help="users/update calls in any second")
    parser.add_argument("--limit-events", type=int, default=2000, help="events/track calls in any second")
    parser.add_argument("--others", type=int, default=0, help="how many of them other programs use up")
    parser.add_argument("--retry-after", help="header of a 429")
    parser.add_argument("--no-journal", dest="journal", action="store_false", help="keep no list of the calls")
    options = vars(parser.parse_args())
    port, tls = options.pop("port"), options.pop("tls")
    asyncio.run(serve(Settings(**options), port, tls))


if __name__ == "__main__":
    main()
