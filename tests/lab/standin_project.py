"""What one Iterable project holds, and how it answers a request.

It is as strict as Iterable's API. Where no source says what the API does, a request
is refused, so what passes here is documented:
https://api.iterable.com/api/docs and
https://support.iterable.com/hc/en-us/articles/9216719179796

Not modelled, so refused as unknown parameters: preferUserId, mergeNestedObjects,
createNewFields, campaignId, templateId.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

USERS_UPDATE = "users/update"
USERS_BULK_UPDATE = "users/bulkUpdate"
USERS_GET_FIELDS = "users/getFields"
EVENTS_TRACK = "events/track"
EVENTS_TRACK_BULK = "events/trackBulk"
WRITING_ENDPOINTS = (USERS_UPDATE, EVENTS_TRACK, USERS_BULK_UPDATE, EVENTS_TRACK_BULK)
ENDPOINTS = (*WRITING_ENDPOINTS, USERS_GET_FIELDS)
BULK_LISTS = {USERS_BULK_UPDATE: "users", EVENTS_TRACK_BULK: "events"}
"""The name of the list in the body of a bulk endpoint."""

KEY = "0123456789abcdef0123456789abcdef"

JsonObject = dict[str, Any]

EMAIL = "email"
USER_ID = "userId"
HYBRID = "hybrid"

USER_PARAMETERS: dict[str, type] = {
    EMAIL: str,
    USER_ID: str,
    "dataFields": dict,
}
EVENT_PARAMETERS: dict[str, type] = {
    EMAIL: str,
    USER_ID: str,
    "eventName": str,
    "id": str,
    "createdAt": int,
    "dataFields": dict,
}
PARAMETERS = {
    USERS_UPDATE: USER_PARAMETERS,
    USERS_BULK_UPDATE: USER_PARAMETERS,
    EVENTS_TRACK: EVENT_PARAMETERS,
    EVENTS_TRACK_BULK: EVENT_PARAMETERS,
}
"""Every documented key of a user or event, and the type that its value must have."""

TYPES_IN_WORDS = {
    str: "String value",
    dict: "Object",
    int: "Number value",
    list: "Array",
}
USER = "user"  # the category of a user's fields; that of an event's is its name
FIELD_TYPES: dict[type, tuple[str, ...]] = {
    bool: ("boolean",),
    int: ("long", "double"),
    float: ("double",),
    dict: ("object",),
}
TEXT_TYPES = ("string", "keyword")

EVENT_FAILURES = ("invalid", "notFound", "forgotten")
USER_FAILURES = (*EVENT_FAILURES, "invalidData", "conflict")
PLURALS = {EMAIL: "Emails", USER_ID: "UserIds"}

MOST_BYTES = 4_000_000
MOST_ITEMS = 1000
LATEST_SECOND = 253_402_300_799  # year 9999: what is above is no number of seconds

EMAIL_FORM = re.compile(
    r"[^\s@\x00-\x1f\x7f]+@([^\s@.\x00-\x1f\x7f]+\.)+[^\s@.\x00-\x1f\x7f]{2,}"
)
USER_ID_FORM = re.compile(r"[!-~]([ -~]{0,50}[!-~])?")
EVENT_ID_FORM = re.compile(r"[A-Za-z0-9-]{1,512}")
DATE_FORM = re.compile(
    r"(?a)\d{4}-\d\d-\d\d"
    r"( \d\d:\d\d:\d\d( [+-]\d\d:\d\d)?"
    r"|T\d\d:\d\d:\d\d\.\d{3}(Z|[+-]\d\d:\d\d))?"
)
LIBRARY_FORM = re.compile(r"(python|urllib|requests|aiohttp|httpx|curl|wget)", re.I)
JSON_TYPE_FORM = re.compile(r"application/json(;\s*charset=utf-8)?", re.I)


@dataclass
class Settings:
    """What kind of project it is, and how fast it answers.

    Times are in seconds. Limits are calls in any one second.
    """

    key: str = KEY

    identify_by: str = EMAIL
    """`email`, `userId` or `hybrid`, see `Project._check_kind`."""

    latency: float = 0.0
    limit_users: int = 500
    limit_events: int = 2000
    limit_users_bulk: int = 5
    limit_events_bulk: int = 10
    limit_fields: int = 3

    others: int = 0
    """Calls that other programs use up of the limits of the single endpoints."""

    field_types: dict[str, str] = field(default_factory=dict)
    """The user fields that the project has from the start, and their types."""

    event_field_types: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same for events, by the event's name."""

    drop_unknown_fields: bool = False
    """Fields that the project does not have are not stored, instead of created."""

    forgotten: Sequence[str] = ()
    """Users whom every endpoint refuses. Addresses are in lower case."""

    disallowed: Sequence[str] = ()
    """Names of events that are not tracked, although the answer is a 200."""

    type_clash: str = "refuse"
    """`refuse` a whole group for one field of another type, or `list` that user."""

    list_unknown: bool = True
    """Whether trackBulk refuses events of users it does not know, as notFound."""

    refused: dict[str, dict[str, tuple[str, str] | None]] = field(default_factory=dict)
    """{bulk endpoint: {user: [name of a list, entry there]}}: users who are refused.

    null in place of the pair: the user is refused and named nowhere.
    """

    idle_timeout: float = 0.0
    """A connection without a request is closed after this time. 0: never."""

    upload_rate: int = 0
    """Bytes of a body that are read a second. 0: as they come. Fixed at the start."""

    greeting: str = ""
    """What each new connection gets before it asked for anything."""

    journal: bool = True

    def __post_init__(self) -> None:
        if self.identify_by not in (EMAIL, USER_ID, HYBRID):
            raise ValueError(f"no such kind of project: {self.identify_by}")
        self.limits = {
            USERS_UPDATE: self.limit_users - self.others,
            EVENTS_TRACK: self.limit_events - self.others,
            USERS_BULK_UPDATE: self.limit_users_bulk,
            EVENTS_TRACK_BULK: self.limit_events_bulk,
            USERS_GET_FIELDS: self.limit_fields,
        }


encode = json.JSONEncoder(separators=(",", ":")).encode
decode = json.JSONDecoder(parse_constant=int).decode
"""int raises ValueError for NaN and Infinity, which are not JSON."""


def make_answer(
    status: int, body: Any, headers: Mapping[str, str] | None = None
) -> bytes:
    """Return a whole answer. `body` is bytes, or a document to become JSON."""
    content = body
    if not isinstance(body, bytes):
        content = encode(body).encode()
    fields = {"Content-Type": "application/json", **(headers or {})}
    fields["Content-Length"] = str(len(content))
    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    head = "\r\n".join(lines) + "\r\n\r\n"
    answer: bytes = head.encode("latin-1") + content
    return answer


def make_document(code: str, msg: str, params: Any = None) -> JsonObject:
    """Return the JSON document of a single endpoint, or of any refusal."""
    return {"msg": msg, "code": code, "params": params}


SUCCESS = make_answer(200, make_document("Success", ""))


class Identity(NamedTuple):
    """Who a user or an event's user is, by a request."""

    key: str  # `email` or `userId`
    sent: str
    name: str  # as the project keeps it: an address is in lower case

    @property
    def plural(self) -> str:
        """The end of the names of lists in bulk answers."""
        return PLURALS[self.key]


def read_identity(item: Mapping[str, Any]) -> Identity | None:
    """Return the identity of a user or event of a request, None if it has none."""
    email = item.get(EMAIL)
    if isinstance(email, str):
        return Identity(EMAIL, email, email.lower())
    user_id = item.get(USER_ID)
    if isinstance(user_id, str):
        return Identity(USER_ID, user_id, user_id)
    return None


class Failure(NamedTuple):
    """Where a bulk answer names a user who was refused."""

    list_name: str | None  # None: the user is counted, and named nowhere
    entry: str = ""


class Refusal(Exception):
    """An answer that is not Success.

    `failure` says where a bulk answer names the user; None: the whole group is refused.
    """

    def __init__(
        self,
        status: int,
        code: str,
        msg: str,
        *,
        params: Any = None,
        failure: Failure | None = None,
    ) -> None:
        super().__init__(msg)
        self.code = code
        self.failure = failure
        self.answer = make_answer(status, make_document(code, msg, params))


class Violation(Refusal):
    """The answer to a request which no correct program sends."""


def demand(
    condition: object,
    msg: str,
    *,
    status: int = 400,
    code: str = "BadParams",
    params: Any = None,
) -> None:
    """Raise Violation unless the condition is true."""
    if not condition:
        raise Violation(status, code, msg, params=params)


class Request:
    """A request as it arrived.

    endpoint    the path without `/api/`
    headers     names are in lower case
    document    the body's JSON, or the ValueError that says why it is none
    arrived     time.monotonic()
    identities  of all its users or events
    line        its line of the journal; `status` stays None when it gets no answer
    """

    def __init__(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        self.arrived = time.monotonic()
        self.method = method
        self.endpoint = path.removeprefix("/api/")
        self.headers = headers
        self.size = len(body)
        self.document = parse_body(body)
        items = find_items(self.endpoint, self.document)
        found = [read_identity(item) for item in items]
        self.identities = [identity for identity in found if identity]
        self.line = self._make_journal_line()

    def _make_journal_line(self) -> JsonObject:
        users = [identity.sent for identity in self.identities]
        line: JsonObject = {
            "t": self.arrived,
            "endpoint": self.endpoint,
            "user": None,
            "event_id": None,
            "users": users,
            "status": None,
        }
        if self.endpoint in BULK_LISTS or not isinstance(self.document, dict):
            return line
        line["event_id"] = self.document.get("id")
        if users:
            line["user"] = users[0]
        return line


def parse_body(body: bytes) -> Any:
    """Return the JSON document of a body, or the ValueError that says what is wrong."""
    try:
        return decode(body.decode())
    except ValueError as error:
        return error


def find_items(endpoint: str, document: Any) -> list[JsonObject]:
    """Return all objects of a request that may be a user or an event."""
    if not isinstance(document, dict):
        return []
    if endpoint not in BULK_LISTS:
        return [document]
    items = document.get(BULK_LISTS[endpoint])
    if not isinstance(items, list):
        return []
    return [item for item in items if isinstance(item, dict)]


class Project:
    """What one Iterable project holds, and how it answers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.users: dict[str, JsonObject] = {}
        self.events: dict[str, JsonObject] = {}
        self.accepted: dict[str, Counter[str]] = {
            endpoint: Counter() for endpoint in WRITING_ENDPOINTS
        }
        self.violations: list[str] = []
        self._field_types: dict[str, dict[str, str]] = {}
        self._preset_field_types()
        self._owners: dict[str, str] = {}  # of addresses, in a hybrid project
        self._within_limit: defaultdict[str, list[float]] = defaultdict(list)

    def configure(self, **changes: Any) -> None:
        """Change some settings. New types of fields replace all that are known."""
        self.settings = dataclasses.replace(self.settings, **changes)
        if changes.keys() & {"field_types", "event_field_types", "identify_by"}:
            self._preset_field_types()

    def _preset_field_types(self) -> None:
        user_fields = {EMAIL: "string"}
        if self.settings.identify_by != EMAIL:
            user_fields[USER_ID] = "string"
        self._field_types = {
            USER: user_fields | self.settings.field_types,
            **self.settings.event_field_types,
        }

    def answer(self, request: Request) -> bytes:
        """Process a request as Iterable would, and return the answer."""
        types_before = dict(self._field_types)
        try:
            self._check_request(request)
            return self._process(request)
        except Refusal as refusal:
            self._field_types = types_before
            if isinstance(refusal, Violation):
                sentence = f"{request.method} {request.endpoint}: {refusal}"
                self.violations.append(sentence)
            return refusal.answer

    # Checks of a request as a whole

    def _check_request(self, request: Request) -> None:
        endpoint = request.endpoint
        is_get = endpoint == USERS_GET_FIELDS
        method = "GET" if is_get else "POST"
        known = endpoint in ENDPOINTS
        demand(known, "No such endpoint", status=404, code="NotFound")
        demand(request.method == method, "Method not allowed", status=405)
        if request.headers.get("api-key") != self.settings.key:
            raise Refusal(401, "BadApiKey", "Invalid API key")
        self._count_for_limit(endpoint, request.arrived)
        agent = request.headers.get("user-agent", "python")
        names_program = not LIBRARY_FORM.match(agent)
        demand(names_program, "User-Agent must name the program")
        if not is_get:
            check_body(request)

    def _count_for_limit(self, endpoint: str, arrived: float) -> None:
        times = self._within_limit[endpoint]
        limit = self.settings.limits[endpoint]
        if len(times) >= limit and times[-limit] > arrived - 1:
            msg = f"Rate limit of {endpoint} exceeded"
            raise Refusal(429, "RateLimitExceeded", msg)
        times.append(arrived)

    def _process(self, request: Request) -> bytes:
        if request.endpoint == USERS_GET_FIELDS:
            return make_answer(200, {"fields": self._field_types[USER]})
        if request.endpoint in BULK_LISTS:
            return self._take_group(request)
        return self._take_one(request)

    # One user or event, and groups of them

    def _take_one(self, request: Request) -> bytes:
        check_item(request.endpoint, request.document, "obj")
        identity = request.identities[0]
        item, _ = self._drop_unknown_fields(request.document)
        self._check_data(identity, item)
        event_name = item.get("eventName")
        if event_name in self.settings.disallowed:
            msg = f"Event {event_name} is disallowed from tracking"
            return make_answer(200, make_document("Success", msg))
        self._store(request.endpoint, identity, item)
        if "id" not in item:
            return SUCCESS
        msg = f"Event with id: {item['id']} tracked."
        params = {"id": item["id"]}
        return make_answer(200, make_document("Success", msg, params))

    def _take_group(self, request: Request) -> bytes:
        endpoint = request.endpoint
        items = check_group(request)
        taken: list[tuple[Identity, JsonObject]] = []
        failures: list[Failure] = []
        dropped: set[str] = set()
        disallowed: set[str] = set()
        for identity, sent_item in zip(request.identities, items, strict=True):
            item, unknown = self._drop_unknown_fields(sent_item)
            dropped |= unknown
            if item.get("eventName") in self.settings.disallowed:
                disallowed.add(item["eventName"])
            failure = self._find_failure(endpoint, identity, item)
            if failure:
                failures.append(failure)
            else:
                taken.append((identity, item))
        for identity, item in taken:
            if item.get("eventName") not in disallowed:
                self._store(endpoint, identity, item)
        answer = {
            "successCount": len(taken),
            "failCount": len(failures),
            **name_failures(endpoint, failures),
            "createdFields": [],
            "filteredOutFields": sorted(dropped),
        }
        if endpoint == EVENTS_TRACK_BULK:
            answer["disallowedEventNames"] = sorted(disallowed)
        return make_answer(200, answer)

    def _find_failure(
        self, endpoint: str, identity: Identity, item: JsonObject
    ) -> Failure | None:
        """Return why a user or event of a group fails. Raise Refusal of all of it."""
        refused = self.settings.refused.get(endpoint, {})
        if identity.name in refused:
            pair = refused[identity.name]
            return Failure(*pair) if pair else Failure(None)
        try:
            self._check_data(identity, item)
        except Refusal as refusal:
            is_clash = refusal.code == "RequestFieldsTypesMismatched"
            if is_clash and self.settings.type_clash == "refuse":
                raise
            if refusal.failure is None:
                raise
            return refusal.failure
        if endpoint != EVENTS_TRACK_BULK or not self.settings.list_unknown:
            return None
        if self._find_user(identity) in self.users:
            return None
        return Failure(f"notFound{identity.plural}", identity.name)

    # Checks of what a correct program cannot know. Each raises Refusal.

    def _check_data(self, identity: Identity, item: JsonObject) -> None:
        self._check_kind(identity)
        if identity.key == EMAIL:
            check_email(identity.sent)
        if identity.name in self.settings.forgotten:
            msg = f"User {identity.sent} has been forgotten"
            failure = Failure(f"forgotten{identity.plural}", identity.name)
            raise Refusal(409, "ForgottenUserError", msg, failure=failure)
        fields = item.get("dataFields", {})
        if "eventName" in item:
            self._fix_types(item["eventName"], fields, identity)
        else:
            self._fix_types(USER, fields, identity)
            self._check_address(identity, fields)

    def _check_kind(self, identity: Identity) -> None:
        """Refuse an identity that this kind of project does not take.

        A userID-based project takes no address. An email-based one takes a userId,
        but creates no user for it, and no user of ours has one there.
        """
        if self.settings.identify_by == USER_ID and identity.key == EMAIL:
            msg = "This project identifies users by userId: email is not supported"
            raise Refusal(400, "BadParams", msg)
        if self.settings.identify_by == EMAIL and identity.key == USER_ID:
            msg = f"No user has the userId {identity.sent}: email is required"
            failure = Failure("notFoundUserIds", identity.name)
            raise Refusal(400, "BadParams", msg, failure=failure)

    def _check_address(self, identity: Identity, fields: JsonObject) -> None:
        """Check the address that an update sets as a field."""
        address = fields.get(EMAIL)
        if address is None:
            return
        check_email(address)
        if self.settings.identify_by != HYBRID:
            return
        user = self._find_user(identity)
        owner = self._owners.get(address.lower(), user)
        if owner != user:
            msg = f"Email {address} already exists"
            failure = Failure("conflictEmails", address.lower())
            raise Refusal(409, "EmailAlreadyExists", msg, failure=failure)

    def _drop_unknown_fields(self, item: JsonObject) -> tuple[JsonObject, set[str]]:
        """Return the user or event without what is dropped, and the names of that."""
        if not self.settings.drop_unknown_fields:
            return item, set()
        fields = item.get("dataFields", {})
        category = item.get("eventName", USER)
        known = self._field_types.get(category, {})
        unknown = fields.keys() - known.keys()
        kept = {name: fields[name] for name in fields if name not in unknown}
        return {**item, "dataFields": kept}, unknown

    def _fix_types(self, category: str, fields: JsonObject, identity: Identity) -> None:
        """Give each new field the type of its first value, and check the others."""
        known = self._field_types.get(category, {})
        new = {}
        errors = {}
        for name, value in fields.items():
            types = find_field_types(value)
            if not types:
                continue
            expected = known.get(name)
            if expected is None:
                new[name] = types[0]
            elif expected not in types:
                errors[name] = {
                    "incomingTypes": types,
                    "expectedType": expected,
                    "offendingValue": value,
                }
        if errors:
            raise Refusal(
                400,
                "RequestFieldsTypesMismatched",
                "Project 1: The request does not have the same data types"
                " as the data previously submitted.",
                params={"validationErrors": errors},
                failure=Failure(f"invalidData{identity.plural}", identity.name),
            )
        if new:
            self._field_types[category] = known | new

    # What the project holds

    def _find_user(self, identity: Identity) -> str:
        """Return the name under which the user is kept, known or not."""
        if identity.key == EMAIL:
            return self._owners.get(identity.name, identity.name)
        return identity.name

    def _store(self, endpoint: str, identity: Identity, item: JsonObject) -> None:
        if "eventName" in item:
            name = self._store_event(identity, item)
        else:
            name = self._store_user(identity, item.get("dataFields", {}))
        self.accepted[endpoint][name] += 1

    def _store_event(self, identity: Identity, item: JsonObject) -> str:
        event = {"createdAt": int(time.time()), **item}
        event[identity.key] = identity.name
        event_id: str = event.pop("id", f"without-id-{len(self.events)}")
        self.events[event_id] = event
        return event_id

    def _store_user(self, identity: Identity, fields: JsonObject) -> str:
        """Merge the fields into those of the user. null removes a field."""
        user = self._find_user(identity)
        before = self.users.get(user, {})
        merged = {**before, **fields}
        after = {name: value for name, value in merged.items() if value is not None}
        if EMAIL in after:
            after[EMAIL] = after[EMAIL].lower()
        self.users[user] = after
        if self.settings.identify_by == HYBRID:
            self._own_address(identity, before, after)
        return user

    def _own_address(
        self, identity: Identity, before: JsonObject, after: JsonObject
    ) -> None:
        """Note which user has which address, after an update."""
        user = self._find_user(identity)
        self._owners.pop(before.get(EMAIL, ""), None)
        if EMAIL in after:
            self._owners[after[EMAIL]] = user
        elif identity.key == EMAIL:
            self._owners[identity.name] = user


def check_body(request: Request) -> None:
    """Raise Violation unless the request has a JSON body that is not too large."""
    content_type = request.headers.get("content-type", "")
    is_json = JSON_TYPE_FORM.fullmatch(content_type)
    demand(is_json, "Content-Type must be application/json", code="BadJsonBody")
    demand(
        request.size <= MOST_BYTES,
        "Request entity too large",
        status=413,
        code="RequestEntityTooLarge",
    )
    if isinstance(request.document, ValueError):
        raise Violation(400, "BadJsonBody", str(request.document))


def check_group(request: Request) -> list[JsonObject]:
    """Return the users or events of a bulk body.

    Raise Violation unless all are as documented, and each user stands there once.
    """
    endpoint = request.endpoint
    body = request.document
    name = BULK_LISTS[endpoint]
    check_object({name: list}, body, "obj")
    demand(
        name in body,
        "Invalid JSON body",
        code="BadJsonBody",
        params={f"obj.{name}": "Array expected"},
    )
    items: list[JsonObject] = body[name]
    if endpoint == USERS_BULK_UPDATE:
        demand(items, "Emails invalid: ", code="InvalidEmailAddressError")
    few = len(items) <= MOST_ITEMS
    demand(few, f"More than {MOST_ITEMS} {name}", code="BatchTooLarge")
    for index, item in enumerate(items):
        check_item(endpoint, item, f"obj.{name}[{index}]")
    different = {(user.key, user.name) for user in request.identities}
    demand(len(different) == len(items), "The same user twice")
    return items


def check_item(endpoint: str, item: Any, where: str) -> None:
    """Raise Violation unless it is a user or an event as documented."""
    parameters = PARAMETERS[endpoint]
    check_object(parameters, item, where)
    msg = "Provide an email or a userId (but not both)"
    if not item and endpoint not in BULK_LISTS:
        raise Refusal(400, "BadParams", msg)  # this is how a program tries its key
    has_one = (EMAIL in item) != (USER_ID in item)
    demand(has_one, msg)
    if USER_ID in item:
        msg = "userId must be 1 to 52 printable ASCII characters, no space at an end"
        demand(USER_ID_FORM.fullmatch(item[USER_ID]), msg)
    if parameters is EVENT_PARAMETERS:
        check_event(item)
    else:
        check_user(item)


def check_user(item: Mapping[str, Any]) -> None:
    """Raise Violation if its fields would change the user's identity.

    With userId the address is a field like any other.
    """
    fields = item.get("dataFields", {})
    changes = USER_ID in fields or (EMAIL in fields and EMAIL in item)
    demand(not changes, "dataFields must not change the identity")


def check_event(item: Mapping[str, Any]) -> None:
    """Raise Violation unless name, id and time are values that may be sent."""
    demand(item.get("eventName"), "eventName is required")
    valid_id = EVENT_ID_FORM.fullmatch(item.get("id", "none"))
    demand(valid_id, "id must be letters, digits and hyphens")
    in_seconds = item.get("createdAt", 0) <= LATEST_SECOND
    demand(in_seconds, "createdAt must be in seconds")


def check_object(parameters: Mapping[str, type], document: Any, where: str) -> None:
    """Raise Violation unless it is an object with these keys and types only."""
    is_object = type(document) is dict
    demand(
        is_object,
        "Invalid JSON body",
        code="BadJsonBody",
        params={where: "Object expected"},
    )
    for name, value in document.items():
        if name not in parameters:
            raise Violation(400, "BadParams", f"Unknown parameter: {name}")
        expected = parameters[name]
        if type(value) is not expected:
            words = TYPES_IN_WORDS[expected]
            params = {f"{where}.{name}": f"{words} expected"}
            raise Violation(400, "BadJsonBody", "Invalid JSON body", params=params)


def check_email(address: str) -> None:
    """Raise Refusal unless Iterable would take it as an address."""
    if not EMAIL_FORM.fullmatch(address):
        msg = f"Invalid email: {address}"
        failure = Failure("invalidEmails", address.lower())
        raise Refusal(400, "InvalidEmailAddressError", msg, failure=failure)


def find_field_types(value: Any) -> tuple[str, ...]:
    """Return the types that Iterable takes a value for, the likeliest first.

    None for null.
    """
    if not isinstance(value, str):
        return FIELD_TYPES.get(type(value), ())
    if DATE_FORM.fullmatch(value):
        return ("date", *TEXT_TYPES)
    return TEXT_TYPES


def name_failures(endpoint: str, failures: Sequence[Failure]) -> JsonObject:
    """Return the lists of a bulk answer that name the users who were refused."""
    reasons = EVENT_FAILURES if endpoint == EVENTS_TRACK_BULK else USER_FAILURES
    lists: dict[str, list[str]] = {}
    for reason in reasons:
        for plural in PLURALS.values():
            lists[reason + plural] = []
    for failure in failures:
        if failure.list_name:
            lists.setdefault(failure.list_name, []).append(failure.entry)
    return {
        "invalidEmails": lists["invalidEmails"],  # deprecated, and given all the same
        "invalidUserIds": lists["invalidUserIds"],
        "failedUpdates": lists,
    }
