"""A stand-in for Iterable: a server that stores, answers, refuses and limits as the API does, and fails when told to.

    python tests/lab/standin.py '{"latency": 0.3, "tls": ["CERT.pem", "KEY.pem"], ...}'  # and the rest of Settings

It prints {"port": ...} when it is ready, answers what is asked on stdin, see `Project.ask`, and ends with its stdin, so
that it never outlives the process that started it. Tests and the demo hold it by `standin_handle.StandIn`.

Where no source says what the API does, it refuses: what passes here is documented. Not modelled, so refused as unknown
parameters: userId, preferUserId, mergeNestedObjects, createNewFields, campaignId, templateId.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import http.client
import json
import math
import re
import signal
import socket
import ssl
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
_FAILED = ("invalid", "notFound", "forgotten", "invalidData", "conflict")  # trackBulk has the first three
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
_DATE = re.compile(r"(?a)\d{4}-\d\d-\d\d( \d\d:\d\d:\d\d( [+-]\d\d:\d\d)?|T\d\d:\d\d:\d\d\.\d{3}(Z|[+-]\d\d:\d\d))?")
_LIBRARY = re.compile(r"(python|urllib|requests|aiohttp|httpx|curl|wget)", re.IGNORECASE)
_JSON_TYPE = re.compile(r"application/json(;\s*charset=utf-8)?", re.IGNORECASE)
_KEEPING = ("reply", "drip_body", "echo_headers")
_ANSWERING = (*_KEEPING, "cut")
_ACTIONS = (*_ANSWERING, "raw", "silence", "reset_before", "reset_after")


@dataclass
class Settings:
    """Times are in seconds, limits are calls in any second."""

    key: str = KEY
    latency: float = 0.0
    limit_users: int = 500
    limit_events: int = 2000
    limit_users_bulk: int = 5
    limit_events_bulk: int = 10
    others: int = 0  # calls of the limits of the single endpoints that other programs use up
    forgotten: Sequence[str] = ()  # addresses, in lower case, that every endpoint refuses
    disallowed: Sequence[str] = ()  # event names that are not tracked, although the answer is a 200
    type_clash: str = "refuse"  # a whole group for the wrong type of one item's field, or "list" that item
    list_unknown: bool = True  # trackBulk refuses the events of users who are not there, as notFoundEmails
    # {bulk endpoint: {address: [list, address that the list names]}}; null for the pair: in no list
    refused: dict[str, dict[str, tuple[str, str] | None]] = field(default_factory=dict)
    journal: bool = True

    def __post_init__(self) -> None:
        single = (self.limit_users - self.others, self.limit_events - self.others)
        self.limits = dict(zip(ENDPOINTS, (*single, self.limit_users_bulk, self.limit_events_bulk), strict=True))


@dataclass
class Fault:
    """What goes wrong with the calls of `endpoint` that have `email`: the first `skip` pass, the next `times` do not.

    reply         `status`, `headers` and `content`, after `latency` seconds; without a status the API's own answer
    drip_body     the same, but each byte of the body takes `interval` seconds
    cut           the same, but the connection closes before the last byte
    raw           `content` as it is in place of an answer, then the connection closes, unless `keep_open`
    silence       no answer, until the client leaves
    reset_before  no answer but a TCP reset; with reset_after the call is processed
    echo_headers  400 with the request's headers, Api-Key included, in `msg`

    `alter` replaces values in the API's own answer, and takes away those for which it has None. `processed` asks for
    the call to be processed although its answer is another. `content` has a character for each byte.
    """

    action: str = "reply"
    endpoint: str = ANY
    email: str | None = None
    times: float = math.inf
    skip: int = 0
    processed: bool = False
    latency: float | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content: str = ""
    alter: dict[str, Any] = field(default_factory=dict)
    interval: float = 0.05
    keep_open: bool = False

    def __post_init__(self) -> None:
        if self.action not in _ACTIONS or self.endpoint not in (*ENDPOINTS, ANY):
            raise ValueError(f"no such fault: {self}")
        own_answer = self.status is None and self.action in ("reply", "drip_body", "cut")
        self.processed = self.processed or own_answer or self.action == "reset_after"

    def strikes(self, request: Request) -> bool:
        """Whether this request is one of its own. Counts it."""
        if self.endpoint not in (ANY, request.endpoint) or self.times == 0:
            return False
        if self.email is not None and self.email.lower() not in map(str.lower, request.emails):
            return False
        passes = self.skip > 0
        self.skip, self.times = (self.skip - 1, self.times) if passes else (0, self.times - 1)
        return not passes

    def change(self, answer: bytes, request: Request) -> bytes:
        """What is answered in place of the API's own answer."""
        if self.action == "echo_headers":
            return make_answer(400, make_document("BadJsonBody", f"Invalid JSON body, headers: {request.headers}"))
        if self.status is not None:
            return make_answer(self.status, self.content.encode("latin-1"), self.headers)
        if self.alter:
            altered = json.loads(answer.partition(b"\r\n\r\n")[2]) | self.alter
            return make_answer(int(answer[9:12]), {key: value for key, value in altered.items() if value is not None})
        return answer


_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder(parse_constant=int).decode  # int raises ValueError for NaN and Infinity, which are not JSON


def make_answer(status: int, body: Any, headers: Mapping[str, str] | None = None) -> bytes:
    """`body` is bytes, or a document to become JSON."""
    content = body if isinstance(body, bytes) else _encode(body).encode()
    lines = {"Content-Type": "application/json", **(headers or {}), "Content-Length": len(content)}.items()
    head = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}", *(f"{k}: {v}" for k, v in lines), "", ""]
    return "\r\n".join(head).encode("latin-1") + content


def make_document(code: str, msg: str, params: Any = None) -> dict[str, Any]:
    return {"msg": msg, "code": code, "params": params}


class Refusal(Exception):
    """An answer that is not Success."""

    def __init__(self, status: int, code: str, msg: str, params: Any = None) -> None:
        super().__init__(msg)
        self.code = code
        self.answer = make_answer(status, make_document(code, msg, params))


class Violation(Refusal):
    """That to a request which no correct program sends."""


def demand(truth: object, status: int, code: str, msg: str, params: Any = None) -> None:
    if not truth:
        raise Violation(status, code, msg, params)


SUCCESS = make_answer(200, make_document("Success", ""))


class Request:
    """Names of `headers` are in lower case; `document` is the body's JSON, or the ValueError that says why it is none.

    `line` is that of the journal: `t` is time.monotonic() at its arrival; `status` stays None when it gets no answer.
    `emails` are the addresses of all its items; `email` and `event_id` are those of a call that is not bulk.
    """

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.t = time.monotonic()
        self.method, self.headers, self.size = method, headers, len(body)
        self.endpoint = path.removeprefix("/api/")
        self.document: Any
        try:
            self.document = _decode(body.decode())
        except ValueError as error:
            self.document = error
        whole = self.document if isinstance(self.document, dict) else {}
        items = whole.get(_ITEMS[self.endpoint]) if self.endpoint in _ITEMS else [whole]
        objects = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
        self.emails = [item["email"] for item in objects if isinstance(item.get("email"), str)]
        email = self.emails[0] if self.emails and self.endpoint not in _ITEMS else None
        self.line = {"t": self.t, "endpoint": self.endpoint, "email": email, "event_id": whole.get("id")}
        self.line |= {"emails": self.emails, "status": None}


async def read_request(reader: asyncio.StreamReader) -> Request:
    """The next one. Raises ValueError for what is not HTTP/1.1, IncompleteReadError when the client has left."""
    head = await reader.readuntil(b"\r\n\r\n")
    request_line, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, path, version = request_line.split(" ")
    if version != "HTTP/1.1":
        raise ValueError(f"not HTTP/1.1: {request_line!r}")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


class Project:
    """What one Iterable project holds, what became known of the calls to it, and how they are answered."""

    def __init__(self, settings: Settings) -> None:
        self._first_settings = settings
        self.reset()

    def reset(self) -> None:
        """An empty project, with the settings of the start."""
        self.settings = self._first_settings
        self.users: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.field_types: dict[str, dict[str, str]] = {}  # by `user` or the event's name
        self.faults: list[Fault] = []
        self.journal: list[dict[str, Any]] = []
        self.arrivals: defaultdict[str, list[float]] = defaultdict(list)  # the times, by endpoint
        self.within_limit: defaultdict[str, list[float]] = defaultdict(list)
        self.answers: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.accepted: dict[str, Counter[str]] = {endpoint: Counter() for endpoint in ENDPOINTS}
        self.violations: list[str] = []
        self.connections = 0
        self.last_headers: Mapping[str, str] = {}

    def configure(self, **changes: Any) -> None:
        self.settings = dataclasses.replace(self.settings, **changes)

    def fault(self, **rule: Any) -> None:
        self.faults.append(Fault(**rule))

    def counters(self) -> dict[str, Any]:
        return {
            "calls": {endpoint: len(times) for endpoint, times in self.arrivals.items()},
            "answers": self.answers,
            "throttled": sum(statuses[429] for statuses in self.answers.values()),
            "connections": self.connections,
            "busiest_second": {endpoint: most_in_a_second(times) for endpoint, times in self.arrivals.items()},
        }

    def state(self) -> dict[str, Any]:
        names = ("users", "events", "journal", "accepted", "violations", "last_headers")
        return {name: getattr(self, name) for name in names}

    def ask(self, line: bytes) -> str:
        """[method, keywords] as a line of JSON is answered [true, result], or [false, text] when it cannot be done."""
        method, keywords = json.loads(line)
        try:
            return _encode([True, getattr(self, method)(**keywords)])
        except (TypeError, ValueError) as error:
            return _encode([False, str(error)])

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one client, one after the other."""
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._answer_next(reader, writer):
                pass
        writer.close()

    async def _answer_next(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        try:
            request = await read_request(reader)
        except ValueError as error:
            self.violations.append(str(error))
            return False
        answers = self.answers  # those of before a reset
        self.last_headers = request.headers
        self.arrivals[request.endpoint].append(request.t)
        if self.settings.journal:
            self.journal.append(request.line)
        fault = next((fault for fault in self.faults if fault.strikes(request)), None)
        answer = self.answer(request) if fault is None or fault.processed else SUCCESS
        latency = self.settings.latency if fault is None or fault.latency is None else fault.latency
        if latency:
            await asyncio.sleep(latency)
        if fault:
            answer = fault.change(answer, request)
            await misbehave(fault, answer, reader, writer)
        else:
            writer.write(answer)
        if reader.at_eof() or writer.is_closing():  # the client has left
            return False
        if fault is None or fault.action in _ANSWERING:
            request.line["status"] = status = int(answer[9:12])  # after HTTP/1.1
            answers[request.endpoint][status] += 1
        return fault is None or fault.action in _KEEPING

    def answer(self, request: Request) -> bytes:
        """Process a request as the API would."""
        known = dict(self.field_types)
        try:
            self._check_request(request)
            take = self._take_group if request.endpoint in _ITEMS else self._take_one
            return take(request.endpoint, request.document)
        except Refusal as refusal:
            self.field_types = known
            if isinstance(refusal, Violation):
                self.violations.append(f"{request.method} {request.endpoint}: {refusal}")
            return refusal.answer

    def _check_request(self, request: Request) -> None:
        headers, endpoint = request.headers, request.endpoint
        demand(endpoint in ENDPOINTS, 404, "NotFound", "No such endpoint")
        demand(request.method == "POST", 405, "BadParams", "Method not allowed")
        if headers.get("api-key") != self.settings.key:
            raise Refusal(401, "BadApiKey", "Invalid API key")
        times, limit = self.within_limit[endpoint], self.settings.limits[endpoint]
        if len(times) >= limit and times[-limit] > request.t - 1:
            raise Refusal(429, "RateLimitExceeded", f"Rate limit of {endpoint} exceeded")
        times.append(request.t)
        json_type, agent = headers.get("content-type", ""), headers.get("user-agent", "")
        demand(_JSON_TYPE.fullmatch(json_type), 400, "BadJsonBody", "Content-Type must be application/json")
        demand(not _LIBRARY.match(agent or "python"), 400, "BadParams", "User-Agent must name the program")
        demand(request.size <= _MOST_BYTES, 413, "RequestEntityTooLarge", "Request entity too large")
        demand(not isinstance(request.document, ValueError), 400, "BadJsonBody", str(request.document))

    def _take_one(self, endpoint: str, item: Any) -> bytes:
        check_item(endpoint, item, "obj")
        self._check_data(item)
        if item.get("eventName") in self.settings.disallowed:
            return make_answer(200, make_document("Success", f"Event {item['eventName']} is disallowed from tracking"))
        self._store(endpoint, item)
        if "id" not in item:
            return SUCCESS
        return make_answer(200, make_document("Success", f"Event with id: {item['id']} tracked.", {"id": item["id"]}))

    def _take_group(self, endpoint: str, body: Any) -> bytes:
        items = check_group(endpoint, body)
        names = [f"{why}{who}" for why in _FAILED[: 3 if "events" in body else 5] for who in ("Emails", "UserIds")]
        lists: dict[str, list[str]] = {name: [] for name in names}
        failures = [self._find_failure(endpoint, item) for item in items]
        for name, email in filter(None, failures):
            lists.setdefault(name, []).append(email)
        lists.pop("", None)
        taken = [item for item, failure in zip(items, failures, strict=True) if not failure]
        disallowed = {item.get("eventName") for item in items}.intersection(self.settings.disallowed)
        for item in taken:
            if item.get("eventName") not in disallowed:
                self._store(endpoint, item)
        answer = {"successCount": len(taken), "failCount": len(items) - len(taken), "failedUpdates": lists}
        answer |= {"invalidEmails": lists["invalidEmails"], "invalidUserIds": []}  # deprecated, and given all the same
        answer |= {"createdFields": [], "filteredOutFields": []}
        if endpoint == EVENTS_TRACK_BULK:
            answer["disallowedEventNames"] = [*disallowed]
        return make_answer(200, answer)

    def _find_failure(self, endpoint: str, item: dict[str, Any]) -> tuple[str, str] | None:
        """Why an item of a group fails: the list, or "" for none, and the address that stands there."""
        email, refused = item["email"].lower(), self.settings.refused.get(endpoint, {})
        if email in refused:
            return refused[email] or ("", email)
        try:
            self._check_data(item)
        except Refusal as refusal:
            if refusal.code == "RequestFieldsTypesMismatched" and self.settings.type_clash == "refuse":
                raise
            return _LISTS[refusal.code], email
        unknown = endpoint == EVENTS_TRACK_BULK and self.settings.list_unknown and email not in self.users
        return ("notFoundEmails", email) if unknown else None

    def _check_data(self, item: dict[str, Any]) -> None:
        """Raises Refusal for what is wrong with the data: here the program has done all that it could."""
        email = item["email"]
        if not _EMAIL.fullmatch(email):
            raise Refusal(400, "InvalidEmailAddressError", f"Invalid email: {email}")
        if email.lower() in self.settings.forgotten:
            raise Refusal(409, "ForgottenUserError", f"User {email} has been forgotten")
        self._fix_types(item.get("eventName", "user"), item.get("dataFields", {}))

    def _fix_types(self, category: str, fields: dict[str, Any]) -> None:
        """A field has the type of the first value ever sent. `category` is `user` or the event's name."""
        known, errors = dict(self.field_types.get(category, {})), {}
        for name, value in fields.items():
            types = field_types(value)
            if types and known.setdefault(name, types[0]) not in types:
                errors[name] = {"incomingTypes": types, "expectedType": known[name], "offendingValue": value}
        if errors:
            msg = "Project 1: The request does not have the same data types as the data previously submitted."
            raise Refusal(400, "RequestFieldsTypesMismatched", msg, {"validationErrors": errors})
        self.field_types[category] = known

    def _store(self, endpoint: str, item: dict[str, Any]) -> None:
        email = item["email"].lower()
        if "eventName" in item:
            event = {"createdAt": int(time.time()), **item, "email": email}
            identity = event.pop("id", f"without-id-{len(self.events)}")
            self.events[identity] = event
        else:
            identity, merged = email, {**self.users.get(email, {}), **item.get("dataFields", {})}
            self.users[email] = {name: value for name, value in merged.items() if value is not None}
        self.accepted[endpoint][identity] += 1


def most_in_a_second(times: Sequence[float]) -> int:
    return max(number - bisect.bisect(times, time - 1) for number, time in enumerate(times, 1))


def check_group(endpoint: str, body: Any) -> list[dict[str, Any]]:
    """The items of a bulk body. Raises Violation unless it is as documented, and each address stands in it once."""
    name = _ITEMS[endpoint]
    check_object({name: list}, body, "obj")
    demand(name in body, 400, "BadJsonBody", "Invalid JSON body", {f"obj.{name}": "Array expected"})
    items: list[dict[str, Any]] = body[name]
    demand(items or name == "events", 400, "InvalidEmailAddressError", "Emails invalid: ")
    demand(len(items) <= _MOST_ITEMS, 400, "BatchTooLarge", f"More than {_MOST_ITEMS} {name}")
    for index, item in enumerate(items):
        check_item(endpoint, item, f"obj.{name}[{index}]")
    demand(len({item["email"].lower() for item in items}) == len(items), 400, "BadParams", "The same address twice")
    return items


def check_item(endpoint: str, item: Any, where: str) -> None:
    """Raises Violation unless it is an object with documented keys only, each with a value of its type."""
    fields = _FIELDS[endpoint]
    check_object(fields, item, where)
    if not item and endpoint not in _ITEMS:  # so a key is tried
        raise Refusal(400, "BadParams", "email or userId is required")
    demand("email" in item, 400, "BadParams", "email or userId is required")
    demand(item.get("eventName") or fields is _USER, 400, "BadParams", "eventName is required")
    demand(_EVENT_ID.fullmatch(item.get("id", "none")), 400, "BadParams", "id must be letters, digits and hyphens")
    demand(item.get("createdAt", 0) <= _LATEST_SECOND, 400, "BadParams", "createdAt must be in seconds")


def check_object(fields: Mapping[str, type], document: Any, where: str) -> None:
    demand(type(document) is dict, 400, "BadJsonBody", "Invalid JSON body", {where: "Object expected"})
    for name, value in document.items():
        demand(name in fields, 400, "BadParams", f"Unknown parameter: {name}")
        if type(value) is not fields[name]:
            params = {f"{where}.{name}": f"{_EXPECTED[fields[name]]} expected"}
            raise Violation(400, "BadJsonBody", "Invalid JSON body", params)


def field_types(value: Any) -> tuple[str, ...]:
    """The types that Iterable takes a value for, the likeliest first; none for null."""
    if isinstance(value, str):
        return ("date", "string", "keyword") if _DATE.fullmatch(value) else ("string", "keyword")
    return _TYPES.get(type(value), ())


async def misbehave(fault: Fault, answer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Put a fault on the wire."""
    match fault.action:
        case "reply" | "echo_headers":
            writer.write(answer)
        case "drip_body":
            at = answer.index(b"\r\n\r\n") + 4
            writer.write(answer[:at])
            while at < len(answer) and not writer.is_closing():
                writer.write(answer[at : at + 1])
                await asyncio.sleep(fault.interval)
                at += 1
        case "cut":
            writer.write(answer[:-1])
        case "raw":
            writer.write(fault.content.encode("latin-1"))
        case "reset_before" | "reset_after":
            linger = struct.pack("ii", 1, 0)  # for no time at all: closing sends RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
    if fault.keep_open or fault.action == "silence":
        await reader.read()


async def serve(settings: Settings, tls: tuple[str, str] | None = None) -> None:
    """Serve until stdin ends."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if tls else None
    if context and tls:
        context.load_cert_chain(*tls)
    project, questions = Project(settings), asyncio.StreamReader(limit=2**30)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    listener = await asyncio.start_server(project.connect, "127.0.0.1", 0, ssl=context, backlog=1024, limit=2**23)
    print(_encode({"port": listener.sockets[0].getsockname()[1]}), flush=True)
    while line := await questions.readline():
        print(project.ask(line), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which still needs its answers
    options = json.loads(sys.argv[1])
    asyncio.run(serve(tls=options.pop("tls", None), settings=Settings(**options)))
