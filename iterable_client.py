"""Iterable: what it is sent, how fast and how often, and what its answers mean.

An `IterableClient` makes one call at a time, with its retries. A `Sender` makes the
calls of many users, in threads and groups. The facts about the API come from
https://api.iterable.com/api/docs, unless another page is named.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import itertools
import json
import logging
import math
import mmap
import os
import queue
import random
import re
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import unquote

import urllib3
from requests.utils import (
    DEFAULT_CA_BUNDLE_PATH,
    get_environ_proxies,
    select_proxy,
)
from urllib3 import exceptions as urllib3_errors
from urllib3.connection import HTTPConnection, HTTPSConnection

log = logging.getLogger(__name__)

# The `extra` of a log line that the console does not show.
FILE_ONLY = {"destination": "file"}


# Endpoints


@dataclass(frozen=True)
class Endpoint:
    """A path of the API."""

    path: str
    limit: int  # calls a second that Iterable allows a project
    method: str = "POST"
    items_key: str = ""  # of the list in the body of a bulk call
    starts_user: bool = False  # so no call may begin when the run is ending


USERS_UPDATE = Endpoint("users/update", limit=500, starts_user=True)
EVENTS_TRACK = Endpoint("events/track", limit=2000)
USERS_BULK_UPDATE = Endpoint(
    "users/bulkUpdate", limit=5, items_key="users", starts_user=True
)
EVENTS_TRACK_BULK = Endpoint("events/trackBulk", limit=10, items_key="events")
USERS_GET_FIELDS = Endpoint("users/getFields", limit=3, method="GET")

ENDPOINTS = (
    USERS_UPDATE,
    EVENTS_TRACK,
    USERS_BULK_UPDATE,
    EVENTS_TRACK_BULK,
    USERS_GET_FIELDS,
)
BULK_ENDPOINTS = {USERS_UPDATE: USERS_BULK_UPDATE, EVENTS_TRACK: EVENTS_TRACK_BULK}

# Iterable states no number of items; a thousand is what its own clients send.
MAX_GROUP_USERS = 1000
# Of both bodies of a group together. Iterable takes 4 MB of users, and states no limit
# for events.
MAX_GROUP_BYTES = 1_000_000
# Users of a bulk run in flight. More would only wait for their turn, and take memory.
MAX_BULK_IN_FLIGHT = 10_000


# Payloads


class IdentifyBy(str, Enum):
    """How a project identifies its users, by the key that a payload has for it.

    https://support.iterable.com/hc/en-us/articles/9216719179796
    """

    EMAIL = "email"
    USER_ID = "userId"


class Identity(NamedTuple):
    """Who a user is for Iterable: the key of the payload, and its value."""

    identify_by: IdentifyBy
    value: str


# A row of Query 2: user_id, first_name, email, plan_type, view_id, page, browser,
# location, and event_time in UTC.
Row = Mapping[str, int | str | None]


class UnusableRow(Exception):
    """A row cannot be sent. The text says why, and then what to correct."""

    def __init__(self, problem: str, cure: str) -> None:
        super().__init__(f"{problem}: {cure}")
        self.brief = problem


# Half a surrogate pair, as which the database module returns a byte that is not UTF-8.
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
# https://support.iterable.com/hc/en-us/articles/9216719179796: at most 52 characters
_USER_ID = re.compile(r"[!-~]([ -~]{0,50}[!-~])?")
# The id of an event has at most 512 bytes: letters, digits and hyphens.
_EVENT_ID = re.compile(r"page-view-[A-Za-z0-9-]{1,502}")
_EVENT_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(\.\d+)?")

# The types of the fields of a user, by the names that users/getFields has for them.
USER_FIELD_TYPES = {
    "first_name": "string",
    "plan_type": "string",
    "recent_page_view": "boolean",
    "candidate": "string",
}

# In ASCII, so the length of a payload is its number of bytes.
to_compact_json = json.JSONEncoder(separators=(",", ":")).encode


def identify(row: Row, identify_by: IdentifyBy) -> Identity:
    """Return the identity of a row's user. Raises UnusableRow."""
    if identify_by is IdentifyBy.USER_ID:
        user_id = "" if row["user_id"] is None else str(row["user_id"])
        if not _USER_ID.fullmatch(user_id):
            cure = "it needs 1 to 52 printable ASCII characters, no space at either end"
            raise UnusableRow("customers.id cannot be a user ID", cure)
        return Identity(identify_by, user_id)
    email = normalize_email(row["email"])
    if "@" not in email or _NOT_UTF8.search(email):
        cure = "correct it in the customers table"
        raise UnusableRow("no usable e-mail address", cure)
    return Identity(identify_by, email)


def normalize_email(email: object) -> str:
    """Return an address as Iterable stores it; empty for NULL."""
    return "" if email is None else str(email).strip().lower()


def make_user_payload(row: Row, identity: Identity) -> dict[str, Any]:
    """Return the body of users/update for a row. Raises UnusableRow."""
    fields: dict[str, Any] = {}
    email = normalize_email(row["email"])
    if email and identity.identify_by is IdentifyBy.USER_ID:
        fields["email"] = _check_text("email", email)
    fields |= _pick_texts(row, "first_name", "plan_type")
    fields["recent_page_view"] = True
    fields["candidate"] = "yes"
    return {identity.identify_by.value: identity.value, "dataFields": fields}


def make_event_payload(row: Row, identity: Identity) -> dict[str, Any]:
    """Return the body of events/track for a row. Raises UnusableRow.

    `id` and `createdAt` make a repeat harmless: it is the same event at the same time.
    """
    event_id = f"page-view-{row['view_id']}"
    if row["view_id"] is None or not _EVENT_ID.fullmatch(event_id):
        problem = "the view's id cannot be an event's (letters, digits and - only)"
        raise UnusableRow(problem, "correct it in page_views")
    viewed_at = _parse_event_time(row["event_time"])
    fields = _pick_texts(row, "page", "browser", "location")
    fields["timestamp"] = viewed_at.strftime("%Y-%m-%d %H:%M:%S")
    fields["candidate"] = "yes"
    return {
        identity.identify_by.value: identity.value,
        "eventName": "page_view",
        "id": event_id,
        "createdAt": int(viewed_at.timestamp()),
        "dataFields": fields,
    }


def make_reset_payload(identity: Identity) -> dict[str, Any]:
    """Return the body of users/update for a user who left the segment."""
    fields = {"recent_page_view": False}
    return {identity.identify_by.value: identity.value, "dataFields": fields}


def _parse_event_time(text: object) -> datetime:
    found = _EVENT_TIME.fullmatch(str(text))
    if found:
        try:
            return datetime.fromisoformat(f"{found[1]}+00:00")
        except ValueError:
            pass  # a date that no calendar has, such as 0000-00-00
    cure = "correct the column in page_views"
    raise UnusableRow("event_time is not a date with a time", cure)


def _pick_texts(row: Row, *columns: str) -> dict[str, str]:
    """Return columns as text, without NULL: a null would delete Iterable's field."""
    values = {column: row[column] for column in columns}
    return {
        column: _check_text(column, str(value))
        for column, value in values.items()
        if value is not None
    }


def _check_text(column: str, text: str) -> str:
    if _NOT_UTF8.search(text):
        raise UnusableRow(f"{column} is no text in UTF-8", "change the column's type")
    return text


# What an answer means

MAX_KEPT_TEXT = 500  # characters of an answer that log and results file keep
RETRYABLE_STATUSES = {408, 429, 500, 502, 503, 504}
DISALLOWED = "is disallowed from tracking"  # stands in the `msg` of a 200
TYPE_CLASH = "RequestFieldsTypesMismatched"

CHECK_URL = "check ITERABLE_API_BASE_URL and the network"
CHECK_KEY = (
    "check ITERABLE_API_KEY (a server-side key of this project, not disabled),"
    " and that ITERABLE_API_BASE_URL is that of its region:"
    " https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
NOT_ITERABLE = (
    "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
)
BROKEN = f"the connection broke before the answer was whole: {CHECK_URL}"
TOO_SLOW = (
    "no answer in time: Iterable is slow or out of reach;"
    " ITERABLE_TIMEOUT is the time it gets"
)
SAME_IDENTITY = (
    "another user of the project has this identity: merge the two in Iterable"
)
ADVICE_BY_CODE = {
    "InvalidEmailAddressError": (
        "Iterable refuses the address as invalid: correct it in the customers table"
    ),
    "UniqueFieldsLimitExceeded": (
        "the project has no room for new fields: delete unused ones in Iterable"
    ),
    "ExternalKeyConflict": SAME_IDENTITY,
    "EmailAlreadyExists": SAME_IDENTITY,
    "UserIdAlreadyExists": SAME_IDENTITY,
}


@dataclass(frozen=True, slots=True)
class CallResult:
    """How a call ended, all its attempts included. It holds no secret."""

    endpoint: str
    ok: bool
    status: int | None = None  # None if there was no answer
    code: str | None = None
    message: str = ""  # Iterable's `msg`, or what happened instead
    # Why it failed and what to do. The user is not in it, so equal ones are counted.
    reason: str = ""
    body: str = ""  # the beginning of the answer to a call that failed
    attempts: int = 1  # also those answered 429, which `max_attempts` does not count
    is_retryable: bool = False
    is_refused_key: bool = False  # in Iterable's own words
    is_unexpected: bool = False  # an error of this program
    # The identities that the answer to a group confirms. The others were not delivered
    # if it is `ok`; if not, nothing is known about any of them.
    confirmed: frozenset[str] = frozenset()
    dropped_fields: frozenset[str] = frozenset()  # those the project does not take
    fields: tuple[tuple[str, str], ...] = ()  # of users/getFields, with their types

    @property
    def headline(self) -> str:
        """The call as the log names it."""
        if self.ok:
            code = f": {self.code}" if self.code else ""
            return f"{self.endpoint} call successful{code}"
        if self.is_unexpected:
            return f"Unexpected error in {self.endpoint}"
        if self.status is None:
            return f"No answer from {self.endpoint}"
        kinds = {3: "Redirect", 4: "4xx Client Error", 5: "5xx Server Error"}
        kind = kinds.get(self.status // 100, "Unusable answer")
        return f"{kind} from {self.endpoint}: Status {self.status}"

    @property
    def is_forgotten(self) -> bool:
        """Whether the user asked Iterable to forget them: every write is refused."""
        return self.status == 409 and self.code == "ForgottenUserError"

    @property
    def is_usable(self) -> bool:
        """Whether Iterable itself gave a final answer, even if a refusal."""
        return self.ok or (self.code is not None and not self.is_retryable)


def interpret(
    endpoint: Endpoint, status: int, text: str, identities: Sequence[Identity] = ()
) -> CallResult:
    """Return what an answer means. The reason does not name these `identities`.

    A success is a 2xx with the code Success, whose `msg` does not say "disallowed".
    Some refusals have one or two of these.
    """
    answer = _parse_object(text)
    code = _get_text(answer, "code")
    message = _get_text(answer, "msg")
    ok = status // 100 == 2 and code == "Success" and DISALLOWED not in message
    result = CallResult(endpoint.path, ok, status, code or None, message)
    if ok:
        return result
    for identity in identities:
        message = _hide(identity, message)
    return replace(
        result,
        reason=_explain_refusal(status, answer, message),
        body=_unescape(text, answer),
        # Iterable has answered type clashes with a 500.
        is_retryable=status in RETRYABLE_STATUSES and code != TYPE_CLASH,
        is_refused_key=_is_key_refused(status, answer),
    )


def interpret_group(
    endpoint: Endpoint, status: int, text: str, identities: Sequence[Identity]
) -> CallResult:
    """Return what the answer to a bulk call means for these users.

    It is believed only when its counts add up with the users that its lists name.
    """
    if status // 100 != 2:
        # Without the code, which would be taken for an answer about each user.
        return replace(interpret(endpoint, status, text), code=None)
    answer = _parse_object(text)
    sent = {identity.value for identity in identities}
    failed = sent & _find_named_users(answer, identities[0].identify_by)
    counts = (answer.get("successCount"), answer.get("failCount"))
    adds_up = counts == (len(sent) - len(failed), len(failed))
    if answer.get("disallowedEventNames") or DISALLOWED in text:
        adds_up = False
    if answer.get("code", "Success") != "Success":
        adds_up = False
    result = CallResult(endpoint.path, adds_up, status)
    if adds_up:
        confirmed = frozenset(sent - failed)
        dropped = frozenset(_get_texts(answer.get("filteredOutFields")))
        return replace(result, confirmed=confirmed, dropped_fields=dropped)
    message = _get_text(answer, "msg")
    reason = "the answer does not add up"
    body = _unescape(text, answer)
    return replace(result, message=message, reason=reason, body=body)


def interpret_fields(status: int, text: str) -> CallResult:
    """Return what the answer of users/getFields means."""
    fields = _parse_object(text).get("fields")
    if status // 100 == 2 and isinstance(fields, dict):
        types = tuple((name, str(type_name)) for name, type_name in fields.items())
        return CallResult(USERS_GET_FIELDS.path, ok=True, status=status, fields=types)
    return interpret(USERS_GET_FIELDS, status, text)


def _find_named_users(answer: dict[str, Any], identify_by: IdentifyBy) -> set[str]:
    """Return the users whom the lists of a bulk answer name.

    Lists whose key begins with "conflict" are left out. They name the other user of a
    conflict, who may be in this group and delivered.
    """
    named: set[str] = set()
    failed_updates = _as_object(answer.get("failedUpdates"))
    for key, value in [*answer.items(), *failed_updates.items()]:
        if key.startswith("conflict"):
            continue
        texts = _get_texts(value)
        if identify_by is IdentifyBy.EMAIL:
            named |= {text.lower() for text in texts}
        elif key.endswith("UserIds"):  # any text could be a user ID
            named |= texts
    return named


def _parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in a text, or an empty one."""
    try:
        return _as_object(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _as_object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _get_texts(value: object) -> set[str]:
    """Return the texts in a list; none if it is no list."""
    items = value if isinstance(value, list) else []
    return {item for item in items if isinstance(item, str)}


def _get_text(answer: dict[str, Any], key: str) -> str:
    value = answer.get(key)
    return value if isinstance(value, str) else ""


def _unescape(text: str, answer: dict[str, Any]) -> str:
    """Return the answer without JSON's escapes, which could hide a secret in it."""
    if answer and "\\" in text:
        return json.dumps(answer, ensure_ascii=False)
    return text


def _hide(identity: Identity, text: str) -> str:
    """Return a text without the user, so that equal ones can be counted together."""
    name = rf"(?<![\w.@-]){re.escape(identity.value)}(?!\.?[\w@-])"
    return re.sub(name, f"<{identity.identify_by.value}>", text)


def _is_key_refused(status: int, answer: dict[str, Any]) -> bool:
    """Whether Iterable refuses the key, and not a firewall the request."""
    is_from_iterable = _get_text(answer, "code") and isinstance(answer.get("msg"), str)
    return status in (401, 403) and bool(is_from_iterable)


def _explain_refusal(status: int, answer: dict[str, Any], message: str) -> str:
    """Return in words why a call failed, from the most to the least specific."""
    code = _get_text(answer, "code")
    if code == TYPE_CLASH:
        return _explain_type_clash(answer)
    if DISALLOWED in message:
        return (
            "tracking is switched off for this user or event: see the project's"
            " settings in Iterable"
        )
    if code in ADVICE_BY_CODE:
        return ADVICE_BY_CODE[code]
    if 300 <= status < 400:
        return f"a redirect, which is never followed: {NOT_ITERABLE}"
    if status == 429:
        return (
            "the project's rate limit was used up: lower ITERABLE_RATE_LIMIT,"
            " or run when less else writes"
        )
    if status in RETRYABLE_STATUSES:
        advice = "run again later, and see https://status.iterable.com"
        return f"Iterable is in trouble: {advice}"
    if _is_key_refused(status, answer):
        words = f' ("{message}")' if message else ""
        return f"Iterable refused the API key{words}: {CHECK_KEY}"
    if not code or status in (401, 403):
        return NOT_ITERABLE
    return message or "Iterable does not say why"


def _explain_type_clash(answer: dict[str, Any]) -> str:
    """Return which field has another type in Iterable than the value that was sent."""
    errors = _as_object(_as_object(answer.get("params")).get("validationErrors"))
    clashes = []
    for field, error in errors.items():
        facts = _as_object(error)
        expected = facts.get("expectedType")
        sent = facts.get("incomingTypes")
        if expected and isinstance(sent, list):
            types = " or ".join(str(type_name) for type_name in sent)
            clashes.append(
                f"field {field}: Iterable expects {expected}, but {types} was sent"
            )
    found = "; ".join(clashes) or "a field has another type"
    return f"{found}: correct the column, or the field's type in Iterable"


# Who may still start what


class RunControl:
    """Says which calls a run may still start. Safe in any thread.

    The first `end` decides how the run ends. `close` freezes that, so that console,
    results file and exit code agree.
    """

    def __init__(self) -> None:
        #: No update may start, and no call is retried. Users whose update has ended, be
        #: it with a failure, still get their events.
        self.no_new_users = threading.Event()
        #: No call at all may start.
        self.nothing_more = threading.Event()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._is_closed = False

    def end(self, error: Exception, *, abandon_started: bool = False) -> None:
        """End the run early because of an error. Only the first one counts."""
        with self._lock:
            if self._is_closed:
                return
            if self._error is None:
                self._error = error
                if abandon_started:
                    self.nothing_more.set()
            self.no_new_users.set()

    def close(self) -> Exception | None:
        """Return the error that ended the run early, if any. No later one counts."""
        with self._lock:
            self._is_closed = True
            return self._error

    def get_stop(self, endpoint: Endpoint) -> threading.Event:
        """Return the event that forbids a call to start, when it is set."""
        return self.no_new_users if endpoint.starts_user else self.nothing_more


class KeyRefused(Exception):
    """Iterable refused the API key. Nothing more is sent."""


class IterableUnavailable(Exception):
    """Iterable takes no call at present. Nothing more is sent."""


# How often, and how fast


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon a call is tried again. Times are in seconds.

    The waits double, with full jitter:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
    """

    max_attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_retry_after: float = 120.0
    longest_throttling: float = 300.0  # with nothing but 429s

    def compute_wait(self, failed_attempts: int, retry_after: float | None) -> float:
        """Return the wait after so many failed attempts."""
        if retry_after is not None:
            return retry_after
        doublings = min(failed_attempts - 1, 30)  # more would overflow a float
        longest = min(self.longest_wait, self.first_wait * 2**doublings)
        return random.uniform(0, longest)  # noqa: S311 - jitter is no secret

    def parse_retry_after(self, header: str | None) -> float | None:
        """Return the seconds that a Retry-After header asks for, or None.

        It is a number of seconds or an HTTP date.
        """
        try:
            seconds = urllib3.Retry().parse_retry_after(header or "")
        except (urllib3_errors.InvalidHeader, ValueError, OverflowError):
            return None
        return min(seconds, self.longest_retry_after) if seconds > 0 else None


class RateLimiter:
    """Spaces the calls of an endpoint evenly over all threads.

    After a 429 none starts for a while, and the rate falls to 70 %. It climbs back by
    1 % of the full rate a second, because others write to the project as well.
    """

    # Seconds added to each second's worth of calls: Iterable counts arrivals, and some
    # calls take longer than others to arrive.
    MARGIN = 0.02
    SLOW_MARGIN = 0.05  # for 10 calls a second or fewer: one of them weighs more
    SLACK = 0.005  # seconds that a thread which woke up late may make up for
    PAUSE = 0.25  # seconds after a 429 that does not ask for any
    LONGEST_SLEEP = 0.1  # seconds until a thread looks whether the run is ending

    def __init__(self, rate: float, run_is_ending: threading.Event) -> None:
        margin = self.MARGIN if rate > 10 else self.SLOW_MARGIN
        self._full_rate = rate / (1 + margin)
        self._fallen_to = self._full_rate
        self._run_is_ending = run_is_ending
        # Held by the one thread that waits for the next turn: of many, some would wake
        # up late and start together.
        self._turnstile = threading.Lock()
        self._lock = threading.Lock()
        self._next_turn = 0.0  # monotonic seconds, as the next two
        self._paused_until = 0.0
        self._fell_at = 0.0

    def wait_for_turn(self, cancelled: threading.Event) -> bool:
        """Wait until a call may start. Returns False soon after `cancelled` is set."""
        with self._turnstile:
            while not cancelled.is_set():
                wait = self._take_turn()
                if wait <= 0:
                    return True
                cancelled.wait(min(wait, self.LONGEST_SLEEP))
        return False

    def slow_down(self, sent_at: float, retry_after: float | None) -> None:
        """Pause after a 429 to a call that was sent at `sent_at` (monotonic seconds).

        Calls that were in flight when the pause began do not lower the rate again.
        """
        with self._lock:
            now = monotonic()
            is_news = sent_at >= self._paused_until
            if is_news and now - self._fell_at >= 1:
                self._fallen_to = 0.7 * self._compute_rate(now)
                self._fell_at = now
            pause = self.PAUSE if is_news else 0.0
            if retry_after is not None:
                pause = retry_after
            self._paused_until = max(self._paused_until, now + pause)
            rate = self._compute_rate(now)
        log.debug("429: a pause of %.1f s, then %.1f calls a second", pause, rate)

    def _take_turn(self) -> float:
        """Take the turn and return 0, or return the seconds until it may be taken."""
        with self._lock:
            now = monotonic()
            start = self._next_turn
            if not self._run_is_ending.is_set():  # the end cuts the pause
                start = max(start, self._paused_until)
            if start > now:
                return start - now
            earliest = max(self._next_turn, now - self.SLACK)
            self._next_turn = earliest + 1 / self._compute_rate(now)
            return 0.0

    def _compute_rate(self, now: float) -> float:
        climbed = 0.01 * self._full_rate * (now - self._fell_at)
        return min(self._full_rate, self._fallen_to + climbed)


# The connections

CONNECT_TIMEOUT = 10.0  # seconds, or the time-out of a call if that is less
BLOCK_SIZE = 16_384  # bytes that are sent at once: what one TLS record holds
LOOK_UP_SECONDS = 30.0  # for which a name's addresses are used again
LOOK_UP_INTERVAL = 1.0  # seconds until the next look-up, if there is no connection
MAX_INTERIM_ANSWERS = 10  # 1xx answers in front of the true one
MAX_LAPSED_CONNECTIONS = 5  # in a row, before a call is sent
# Bytes of an answer that are read, besides twice those of the request: the answer to a
# group may name each of its users twice. users/getFields names thousands of fields.
MAX_ANSWER = 1_000_000


class NoAnswer(Exception):
    """A call got no answer. The text says why, in words that a person can act on."""

    def __init__(self, reason: str, *, is_retryable: bool = True) -> None:
        super().__init__(reason)
        self.is_retryable = is_retryable


class TurnCancelled(Exception):
    """The run ended before a call was sent."""


class _ConnectionLapsed(Exception):
    """The server closed a connection, or sent bytes, before a call was sent on it."""


class NameCache:
    """Looks up a host's addresses once for many connections. Safe in any thread.

    A resolver loses answers when hundreds of threads ask at once. All connections of a
    pool are to one host: Iterable, or the proxy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._addresses: list[str] = []
        self._problem = ""
        self._valid_until = -math.inf  # monotonic seconds

    def look_up(self, host: str, port: int) -> list[str]:
        """Return the host's addresses; those that did not answer come last.

        Raises socket.gaierror. Threads that wait for a look-up share its outcome.
        """
        with self._lock:
            if monotonic() >= self._valid_until:
                self._ask_resolver(host, port)
            if not self._addresses:
                raise socket.gaierror(self._problem)
            return list(self._addresses)

    def put_last(self, address: str) -> None:
        """Let other addresses be tried first next time."""
        with self._lock:
            if address in self._addresses:
                self._addresses.remove(address)
                self._addresses.append(address)

    def forget(self) -> None:
        """Look up again soon, because no address can be reached."""
        with self._lock:
            soon = monotonic() + LOOK_UP_INTERVAL
            self._valid_until = min(self._valid_until, soon)

    def _ask_resolver(self, host: str, port: int) -> None:
        """Look up. If that fails, old addresses are better than none."""
        family = urllib3.util.connection.allowed_gai_family()
        valid_for = LOOK_UP_SECONDS
        try:
            found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
            self._addresses = [str(address[0]) for *_, address in found]
        except (OSError, UnicodeError) as error:
            self._problem = str(error)
            valid_for = LOOK_UP_INTERVAL
        self._valid_until = monotonic() + valid_for


class _AnswerReader(io.RawIOBase):
    """The bytes of an answer, which must all come within the time-out of its socket.

    The socket's own time-out begins anew with each byte, so an answer that drips would
    hold its thread for ever.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._deadline = monotonic() + (sock.gettimeout() or 0.0)
        self._is_first = True
        self.has_ended = False  # then nothing more is read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.has_ended:
            return 0
        if not self._is_first:  # most answers come at once
            self._sock.settimeout(max(self._deadline - monotonic(), 0.001))
        self._is_first = False
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _AnswerBuffer(io.BufferedReader):
    """Reads an answer, and ends a connection on which more than the answer came."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = _AnswerReader(sock)
        super().__init__(self._reader)

    def close(self) -> None:
        if not self.closed:
            self._reader.has_ended = True
            if self.peek():
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
        super().close()


class _FinalResponse(http.client.HTTPResponse):
    """An answer without the informational ones (1xx) in front of it.

    A firewall or CDN may send one. http.client would take a 103 for the answer, and
    each later answer for that to the next request.
    """

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        self.fp = _AnswerBuffer(sock)

    def begin(self) -> None:
        super().begin()
        interim = 0
        while 100 <= self.status < 200 and self.status != 101:
            interim += 1
            if interim > MAX_INTERIM_ANSWERS:
                raise http.client.HTTPException("too many 1xx answers")
            self.headers = self.msg = None  # type: ignore[assignment]  # begin again
            super().begin()


class _Connection(HTTPConnection):
    """A connection that is open before a call takes its turn.

    Opening takes three round trips. After the turn, they would make calls arrive
    bunched, and Iterable would answer some with 429.
    """

    response_class = _FinalResponse

    def __init__(self, *arguments: Any, transport: Transport, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._transport = transport

    def connect(self) -> None:
        try:
            super().connect()
        except (OSError, urllib3_errors.HTTPError, http.client.HTTPException) as error:
            raise self._transport.explain_no_connection(error) from error

    def request(self, *arguments: Any, **options: Any) -> None:
        if self.is_closed:
            self.connect()
        self._transport.take_turn()
        if self._has_lapsed():
            raise _ConnectionLapsed
        # Else urllib3 would send with the time-out for connecting.
        self.timeout = self._transport.timeout
        super().request(*arguments, **options)

    def send(self, data: Any) -> None:
        """Send bytes within the time-out, however many TLS records they take.

        The socket's own time-out begins anew with each record.
        """
        deadline = monotonic() + self._transport.timeout
        for start in range(0, len(data), BLOCK_SIZE):
            if start > 0:
                self.sock.settimeout(max(deadline - monotonic(), 0.001))
            try:
                super().send(data[start : start + BLOCK_SIZE])
            except TimeoutError:
                raise NoAnswer(TOO_SLOW) from None

    def _has_lapsed(self) -> bool:
        """Whether the server closed the connection, or sent what no call asked for.

        A TLS server sends tickets first, so it is not enough that there are bytes.
        """
        is_decrypted = isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0
        # For urllib3, connected means that no bytes wait in the socket.
        if self.is_connected and not is_decrypted:
            return False
        self.sock.settimeout(0)
        try:
            self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            return True
        return True

    def _new_conn(self) -> socket.socket:
        """Open a socket to one of the host's addresses; TLS still verifies its name.

        urllib3 connects to `_dns_host` here, and derives from it what TLS verifies.
        """
        name = self._dns_host
        names = self._transport.names
        failure: Exception = urllib3_errors.NewConnectionError(self, "no address")
        try:
            addresses = names.look_up(name, self.port)
        except socket.gaierror as error:
            raise urllib3_errors.NameResolutionError(name, self, error) from error
        for address in addresses:
            self._dns_host = address
            try:
                return super()._new_conn()
            except urllib3_errors.HTTPError as error:
                failure = error
                names.put_last(address)
            finally:
                self._dns_host = name
        names.forget()
        raise failure


class _SecureConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


class HttpAnswer(NamedTuple):
    """An answer as it came. `sent_at` is when its call was sent, monotonic seconds."""

    status: int
    text: str
    retry_after: str | None
    sent_at: float


class Transport:
    """The connections to Iterable: one pool for `size` threads.

    `timeout` is in seconds, for a request to be sent and again for its answer. Proxy
    and CA file are those of the environment. Raises NetworkSettingsError.
    """

    def __init__(
        self, base_url: str, headers: dict[str, str], *, timeout: float, size: int
    ) -> None:
        self.timeout = timeout
        self.names = NameCache()
        self._headers = headers
        self._host = base_url.partition("://")[2]
        # Of this thread, for `_Connection.request`: urllib3 passes it nothing of ours.
        self._call = threading.local()
        self._pool = _open_pool(base_url, size)
        is_secure = base_url.startswith("https:")
        connection_class = _SecureConnection if is_secure else _Connection
        make_connection: Any = functools.partial(connection_class, transport=self)
        self._pool.ConnectionCls = make_connection

    def take_turn(self) -> None:
        """Wait for the turn of this thread's call, once. Raises TurnCancelled."""
        if self._call.sent_at is None:
            if not self._call.wait_for_turn():
                raise TurnCancelled
            self._call.sent_at = monotonic()

    def exchange(
        self, endpoint: Endpoint, body: bytes, wait_for_turn: Callable[[], bool]
    ) -> HttpAnswer:
        """Send one request and return its answer.

        `wait_for_turn` is called when the connection is open; the request is sent only
        if it returns True. Raises NoAnswer, TurnCancelled.
        """
        self._call.wait_for_turn = wait_for_turn
        self._call.sent_at = None
        for _ in range(MAX_LAPSED_CONNECTIONS):
            try:
                response = self._open_response(endpoint, body)
                text = self._read(response, MAX_ANSWER + 2 * len(body))
            except _ConnectionLapsed:
                continue  # on another connection, with the same turn
            except urllib3_errors.TimeoutError as error:
                raise NoAnswer(TOO_SLOW) from error
            except (urllib3_errors.HTTPError, OSError) as error:
                raise NoAnswer(BROKEN) from error
            retry_after = response.headers.get("Retry-After")
            return HttpAnswer(response.status, text, retry_after, self._call.sent_at)
        raise NoAnswer(f"connections close before a call is sent: {CHECK_URL}")

    def _open_response(
        self, endpoint: Endpoint, body: bytes
    ) -> urllib3.BaseHTTPResponse:
        connect_timeout = min(self.timeout, CONNECT_TIMEOUT)
        return self._pool.urlopen(
            endpoint.method,
            f"/api/{endpoint.path}",
            body=body,
            headers=self._headers,
            redirect=False,
            retries=False,
            timeout=urllib3.Timeout(connect=connect_timeout, read=self.timeout),
            preload_content=False,
        )

    def _read(self, response: urllib3.BaseHTTPResponse, max_bytes: int) -> str:
        """Return the body, or its beginning: the status of a refusal is enough."""
        content = b""
        # Leaving the block closes a connection that is not in the pool again, because
        # the answer was not read to its end.
        with response:
            try:
                while len(content) < max_bytes:
                    block = response.read1(65_536)
                    if not block:
                        break
                    content += block
            except urllib3_errors.HTTPError:
                if response.status < 300:
                    raise
        return content.decode("utf-8", "replace")

    def explain_no_connection(self, error: Exception) -> NoAnswer:
        """Return in words why no connection could be opened, and to what."""
        proxy = self._pool.proxy
        host = self._pool.host
        place = self._host
        advice = CHECK_URL
        if proxy is not None:
            host = str(proxy.host)
            place = f"the proxy {proxy.host}:{proxy.port}"
            advice = "check HTTPS_PROXY and ALL_PROXY"
        refusal = re.search(r"Tunnel connection failed: ((\d+).*)", str(error))
        if refusal:
            reason = f"{place} refuses the connection ({refusal[1].strip()}): {advice}"
            return NoAnswer(reason, is_retryable=refusal[2].startswith("5"))
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = (
                f"the certificate of {self._host} is not trusted"
                f" ({error.verify_message}): {CHECK_URL};"
                " REQUESTS_CA_BUNDLE is for a company's own CA"
            )
            return NoAnswer(reason, is_retryable=False)
        if isinstance(error, urllib3_errors.NameResolutionError):
            return NoAnswer(f"the host name {host} is unknown (DNS): {advice}")
        detail = str(error)
        if isinstance(error, urllib3_errors.NewConnectionError):
            detail = getattr(error.__cause__, "strerror", None) or detail
        elif isinstance(error, (TimeoutError, urllib3_errors.TimeoutError)):
            detail = "no answer in time"
        elif isinstance(error, ssl.SSLError):
            detail = f"not encrypted: {error}"
        return NoAnswer(f"no connection to {place} ({detail}): {advice}")


class NetworkSettingsError(Exception):
    """The proxy or the CA file of the environment cannot be used."""


def _open_pool(base_url: str, size: int) -> urllib3.HTTPConnectionPool:
    context = _make_tls_context()
    options: dict[str, Any] = {"ssl_context": context, "maxsize": size}
    proxy = select_proxy(base_url, get_environ_proxies(base_url))
    if not proxy or base_url.startswith("http:"):
        # Plain http is for this machine only, and would show the key to a proxy.
        return urllib3.PoolManager(**options).connection_from_url(base_url)
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    try:
        url = urllib3.util.parse_url(proxy)
        if url.path not in (None, "/") or url.query or url.fragment:
            raise ValueError  # noqa: TRY301 - the same sentence as for other forms
        headers = urllib3.make_headers(proxy_basic_auth=unquote(url.auth or ""))
        options.update(proxy_headers=headers, proxy_ssl_context=context)
        return urllib3.ProxyManager(proxy, **options).connection_from_url(base_url)
    except ValueError:
        raise NetworkSettingsError(
            "HTTPS_PROXY or ALL_PROXY cannot be used: it must be like"
            " http://user:password@host:port, with / ? # @ in the password as"
            " %2F %3F %23 %40"
        ) from None


def _make_tls_context() -> ssl.SSLContext:
    path = os.getenv("REQUESTS_CA_BUNDLE") or os.getenv("CURL_CA_BUNDLE")
    path = path or DEFAULT_CA_BUNDLE_PATH
    try:
        if os.path.isdir(path):
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        raise NetworkSettingsError(
            f"The CA file {path} (REQUESTS_CA_BUNDLE) cannot be read: {error}"
        ) from error


# The client


def parse_base_url(text: str) -> str:
    """Return the address of the API without a trailing `/` or `/api`.

    Raises ValueError for what is no address, or would send the key in the clear.
    """
    url = text.lower().rstrip("/").removesuffix("/api").rstrip("/")
    found = re.fullmatch(
        r"(?P<scheme>https?)://(?P<host>[a-z0-9._-]+|\[::1\])(:(?P<port>[0-9]{1,5}))?",
        url,
    )
    if not found or int(found["port"] or 443) > 65535:
        raise ValueError(
            "must be a host's address such as https://api.iterable.com,"
            " without path, query or user"
        )
    if found["scheme"] == "http" and not _is_loopback(found["host"]):
        raise ValueError(
            "must begin with https://, or the API key would travel in the clear"
        )
    return url


def _is_loopback(host: str) -> bool:
    byte = r"(25[0-5]|2[0-4]\d|1?\d?\d)"
    return bool(re.fullmatch(rf"localhost|127(\.{byte}){{3}}|\[::1\]", host))


def parse_api_key(text: str) -> str:
    """Return the key if it can be a header. Raises ValueError."""
    if not re.fullmatch("[!-~]*", text):
        raise ValueError("has a character that no key has: copy it again")
    return text


@dataclass(slots=True)
class Call:
    """A call that a user needs, and how it ended."""

    endpoint: Endpoint  # the single one, also if the call is made with a group
    identity: Identity
    payload: str  # JSON
    result: CallResult | None = None
    is_cancelled: bool = False  # the run ended before it was sent, or sent singly

    @property
    def is_open(self) -> bool:
        """Whether the call is still to be made."""
        return self.result is None and not self.is_cancelled


@dataclass(slots=True)
class UserCalls:
    """The calls that one user needs."""

    number: int  # the caller's, to know the user again
    update: Call
    event: Call | None  # None for a user who gets none

    @property
    def calls(self) -> list[Call]:
        """Both calls in their order, or the one that is needed."""
        return [self.update] if self.event is None else [self.update, self.event]

    @property
    def open_calls(self) -> list[Call]:
        """The calls that are still to be made."""
        return [call for call in self.calls if call.is_open]

    @property
    def made(self) -> list[CallResult]:
        """The results that there are."""
        return [call.result for call in self.calls if call.result is not None]

    @property
    def size(self) -> int:
        """Bytes that the user adds to the bodies of a group."""
        return sum(len(call.payload) for call in self.calls)

    def cancel(self) -> None:
        """Cancel the calls that are still to be made."""
        for call in self.open_calls:
            call.is_cancelled = True


Announce = Callable[[Sequence[UserCalls]], None]


class _Request(NamedTuple):
    """What is sent for a call, and about whom."""

    endpoint: Endpoint
    body: bytes
    identities: Sequence[Identity] = ()

    def interpret(self, status: int, text: str) -> CallResult:
        """Return what an answer to the request means."""
        if self.endpoint is USERS_GET_FIELDS:
            return interpret_fields(status, text)
        if self.endpoint.items_key:
            return interpret_group(self.endpoint, status, text, self.identities)
        return interpret(self.endpoint, status, text, self.identities)


_GET_FIELDS = _Request(USERS_GET_FIELDS, b"")


def _make_request(calls: Sequence[Call]) -> _Request:
    """Return the request of a call, or one bulk request in place of several."""
    endpoint = calls[0].endpoint
    body = calls[0].payload
    if len(calls) > 1:
        endpoint = BULK_ENDPOINTS[endpoint]
        items = ",".join(call.payload for call in calls)
        body = f'{{"{endpoint.items_key}":[{items}]}}'
    return _Request(endpoint, body.encode(), [call.identity for call in calls])


class IterableClient:
    """The calls of one Iterable project, for many threads at once.

    `rate` is the number of users/update calls a second; each other endpoint gets the
    same share of its own limit. `timeout` is in seconds. `redact` takes the secrets out
    of a text. Raises NetworkSettingsError.
    """

    PROBE_ATTEMPTS = 2  # of `is_available`: 20 users have failed with all of theirs

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        rate: float,
        timeout: float,
        workers: int,
        retry: RetryPolicy,
        control: RunControl,
        redact: Callable[[str], str],
    ) -> None:
        self.workers = workers
        self.control = control
        self._retry = retry
        self._redact = redact
        self._share = rate / USERS_UPDATE.limit
        self._limiters = {
            endpoint: RateLimiter(endpoint.limit * self._share, control.no_new_users)
            for endpoint in ENDPOINTS
        }
        headers = {
            "Api-Key": api_key,
            "Content-Type": "application/json",
            "User-Agent": "iterable-integration/3",
        }
        size = workers + 1  # one for `is_available`
        self._transport = Transport(base_url, headers, timeout=timeout, size=size)
        #: Of all calls.
        self.attempts_made = 0
        self.retries_made = 0
        self._lock = threading.Lock()
        self._has_warned_of_dropped_fields = False

    def count_calls(self, updates: int, events: int, *, bulk: bool) -> int:
        """Return how many calls a run makes in which none is made again."""
        if not bulk:
            return updates + events
        groups = math.ceil(updates / MAX_GROUP_USERS)
        return groups + math.ceil(events / MAX_GROUP_USERS)

    def estimate_seconds(self, users: int, *, bulk: bool) -> float:
        """Return how long the updates of a run take at the rate limit, in seconds."""
        endpoint = USERS_BULK_UPDATE if bulk else USERS_UPDATE
        calls = self.count_calls(users, 0, bulk=bulk)
        return calls / (self._share * endpoint.limit)

    def sender(self, announce: Announce, *, bulk: bool) -> Sender:
        """Return a sender for the users of a run, singly or in groups.

        `announce` is called with users in the moment before they are sent.
        """
        return Sender(self, announce, bulk=bulk)

    def check_key(self) -> CallResult:
        """Make a users/update call without a user. A 400 means the key is accepted."""
        result = self._call(_Request(USERS_UPDATE, b"{}"))
        return result or _make_failure(USERS_UPDATE, "stopped")

    def get_fields(self) -> CallResult:
        """Ask users/getFields for the fields of users. It changes nothing."""
        return self._call(_GET_FIELDS) or _make_failure(USERS_GET_FIELDS, "stopped")

    def is_available(self, good_call: Call | None) -> bool:
        """Whether Iterable takes an update that it accepted before in this run.

        Without one, users/getFields is asked. True as well if the run ended meanwhile.
        """
        request = _GET_FIELDS if good_call is None else _make_request([good_call])
        result = self._call(request, max_attempts=self.PROBE_ATTEMPTS)
        is_ending = self.control.no_new_users.is_set()
        return is_ending or result is None or result.is_usable

    def post_one(self, call: Call) -> CallResult | None:
        """Make a call about one user. None if the run ended before it was sent."""
        return self._post([call])

    def post_group(self, calls: Sequence[Call]) -> CallResult | None:
        """Make one bulk call in place of several of one endpoint, as `post_one`."""
        return self._post(calls)

    def _post(self, calls: Sequence[Call]) -> CallResult | None:
        """Make a call whose answer concerns the run. A refused key ends it."""
        result = self._call(_make_request(calls))
        if result is None:
            return None
        if result.is_refused_key:
            # Not by `abandon_started`: it has no effect if the run is ending already.
            self.control.nothing_more.set()
            self.control.end(KeyRefused(result.reason))
        if result.dropped_fields:
            self._warn_of_dropped_fields(result.dropped_fields)
        return result

    def _call(
        self, request: _Request, max_attempts: int | None = None
    ) -> CallResult | None:
        """Make a call, and again as the retry policy says. None if nothing was sent.

        A 429 is no failed attempt, unless there is nothing else for too long.
        """
        no_new_users = self.control.no_new_users
        cancelled = self.control.get_stop(request.endpoint)
        max_attempts = max_attempts or self._retry.max_attempts
        result = None
        failures = 0
        throttled_since = None
        for number in itertools.count(1):
            try:
                result, retry_after = self._attempt(request, number, cancelled)
            except TurnCancelled:
                break
            cancelled = no_new_users  # no retry is worth delaying the end
            if result.status == 429:
                throttled_since = throttled_since or monotonic()
                if monotonic() - throttled_since >= self._retry.longest_throttling:
                    break
                continue  # the limiter pauses
            throttled_since = None
            failures += 1
            if not result.is_retryable or failures >= max_attempts:
                break
            wait = self._retry.compute_wait(failures, retry_after)
            log.debug("%s: next attempt in %.1f s", result.headline, wait)
            if no_new_users.wait(wait):
                break
        return result

    def _attempt(
        self, request: _Request, number: int, cancelled: threading.Event
    ) -> tuple[CallResult, float | None]:
        """Return the result of attempt `number`, and its Retry-After in seconds.

        Raises TurnCancelled.
        """
        if cancelled.is_set():
            raise TurnCancelled
        endpoint = request.endpoint
        limiter = self._limiters[endpoint]
        wait_for_turn = functools.partial(limiter.wait_for_turn, cancelled)
        retry_after = None
        try:
            answer = self._transport.exchange(endpoint, request.body, wait_for_turn)
            retry_after = self._retry.parse_retry_after(answer.retry_after)
            if answer.status == 429:
                limiter.slow_down(answer.sent_at, retry_after)
            result = request.interpret(answer.status, answer.text)
        except TurnCancelled:
            raise
        except NoAnswer as error:
            result = _make_failure(endpoint, str(error))
            result = replace(result, is_retryable=error.is_retryable)
        except Exception as error:  # costs this call, and not the run
            log.exception("Unexpected error", extra=FILE_ONLY)
            reason = f"an unexpected error ({type(error).__name__}): see the log file"
            result = replace(_make_failure(endpoint, reason), is_unexpected=True)
        with self._lock:
            self.attempts_made += 1
            if number > 1:
                self.retries_made += 1
        return self._redact_result(replace(result, attempts=number)), retry_after

    def _warn_of_dropped_fields(self, fields: frozenset[str]) -> None:
        with self._lock:
            is_first = not self._has_warned_of_dropped_fields
            self._has_warned_of_dropped_fields = True
        if is_first:
            log.warning(
                "⚠ Iterable drops fields that the project does not take: %s."
                " Create them in Iterable, or allow new fields in its settings",
                self._shorten(", ".join(sorted(fields))),
            )

    def _redact_result(self, result: CallResult) -> CallResult:
        return replace(
            result,
            code=self._shorten(result.code or "") or None,
            message=self._shorten(result.message),
            reason=self._shorten(result.reason),
            body=self._shorten(result.body),
        )

    def _shorten(self, text: str) -> str:
        return self._redact(text)[:MAX_KEPT_TEXT]


def _make_failure(endpoint: Endpoint, reason: str) -> CallResult:
    """Return the result of a call that got no answer."""
    return CallResult(endpoint.path, ok=False, message=reason, reason=reason)


# Sending many users

UNUSABLE_IN_A_ROW = 20  # users without a usable answer: Iterable may be down
# Bytes of addresses that must be free, or a new thread may hang or crash for lack of a
# stack and a memory arena.
THREAD_ROOM = 200_000_000


def require_thread_room() -> None:
    """Raise OSError if there are no addresses left for another thread."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mmap.mmap(-1, THREAD_ROOM, flags, mmap.PROT_READ).close()


class NoRoomForThread(Exception):
    """The machine has no memory, or no thread, for another worker."""


class Sender(AbstractContextManager["Sender"]):
    """Sends users in threads, and hands each back when its calls are finished.

    With `bulk` they go in groups, and those whom the answer to their group does not
    confirm get the single calls. A `with` block, whose end waits for the calls in
    flight. One thread, the caller's, uses it; the workers only make calls.
    """

    def __init__(
        self, client: IterableClient, announce: Announce, *, bulk: bool
    ) -> None:
        self._client = client
        self._announce = announce
        self._max_group = MAX_GROUP_USERS if bulk else 1
        # Twice the workers, so that none waits for the caller.
        self._max_in_flight = MAX_BULK_IN_FLIGHT if bulk else 2 * client.workers
        self._group: list[UserCalls] = []
        self._group_bytes = 0
        self._in_flight = 0  # users handed to a worker
        # No SimpleQueue: in Python 3.10 its time-out may never end.
        self._done: queue.Queue[Future[list[UserCalls]]] = queue.Queue()
        self._workers = ThreadPoolExecutor(client.workers)
        self._outages = _OutageWatch(client)

    def __exit__(self, *_: object) -> None:
        """Wait for the calls in flight."""
        self._workers.shutdown()
        self._outages.shutdown()

    @property
    def is_full(self) -> bool:
        """Whether no further user should be submitted now."""
        return self._in_flight >= self._max_in_flight or self._outages.is_asking

    @property
    def is_idle(self) -> bool:
        """Whether no user is in flight, apart from those that `flush` would send."""
        return self._in_flight == 0 and not self._outages.is_asking

    def submit(self, user: UserCalls) -> None:
        """Add a user to the open group, and flush that when it is full."""
        if self._group_bytes + user.size > MAX_GROUP_BYTES:
            self.flush()
        self._group.append(user)
        self._group_bytes += user.size
        if len(self._group) >= self._max_group:
            self.flush()

    def flush(self) -> None:
        """Hand the open group to a worker, full or not. Raises NoRoomForThread."""
        group = self._group
        self._group = []
        self._group_bytes = 0
        if group:
            self._announce(group)
            self._in_flight += len(group)
            self._start(group)

    def collect(self, seconds: float = 0.0) -> list[UserCalls]:
        """Return the users who are finished, after up to `seconds` for the first.

        Raises NoRoomForThread, and what a worker raised that nobody foresaw.
        """
        finished: list[UserCalls] = []
        wait = seconds
        while True:
            try:
                future = self._done.get(block=wait > 0, timeout=wait)
            except queue.Empty:
                break
            wait = 0.0
            finished += self._take_back(future.result())
        self._outages.look()
        return finished

    def _start(self, group: list[UserCalls]) -> None:
        try:
            require_thread_room()
            future = self._workers.submit(self._send, group)
        except (OSError, RuntimeError, MemoryError) as error:
            raise NoRoomForThread(
                f"no memory or thread for another worker ({error}): lower MAX_WORKERS,"
                " or raise ulimit -v or -u"
            ) from error
        future.add_done_callback(self._done.put)

    def _take_back(self, group: list[UserCalls]) -> list[UserCalls]:
        """Return the finished users of a group, and send each other one singly."""
        finished = []
        for user in group:
            # A user whose update has ended still gets the event, if it may be sent.
            if any(self._forbids(call) for call in user.open_calls):
                user.cancel()
            if user.open_calls:
                self._start([user])
                continue
            self._in_flight -= 1
            self._outages.note(user)
            finished.append(user)
        return finished

    def _forbids(self, call: Call) -> bool:
        """Whether the call may not start any more."""
        return self._client.control.get_stop(call.endpoint).is_set()

    def _send(self, group: list[UserCalls]) -> list[UserCalls]:
        """Make the calls of a group that are still open. Runs in a worker."""
        self._make_calls([user.update for user in group if user.update.is_open])
        events: list[Call] = []  # of users whose update was made
        for user in group:
            result = user.update.result
            if user.update.is_cancelled:
                user.cancel()
            elif result is not None and result.is_forgotten:
                user.event = None  # Iterable would refuse it, too
            elif result is not None:
                events += user.open_calls
        self._make_calls(events)
        return group

    def _make_calls(self, calls: list[Call]) -> None:
        """Make calls of one endpoint, together if there are several.

        A call that a group's answer does not confirm stays open.
        """
        if not calls:
            return
        is_group = len(calls) > 1
        if is_group:
            result = self._client.post_group(calls)
        else:
            result = self._client.post_one(calls[0])
        if result is None:
            for call in calls:
                call.is_cancelled = True
            return
        if is_group and result.ok:
            confirmed = result.confirmed
            calls = [call for call in calls if call.identity.value in confirmed]
        elif is_group and not self._forbids(calls[0]):  # else this is their result
            text = "%s: %s; its %d users are sent singly"
            log.info(text, result.headline, result.reason, len(calls), extra=FILE_ONLY)
            return
        for call in calls:
            call.result = result


class _OutageWatch:
    """Tells an outage from single users whom Iterable answers with errors for ever.

    After many users in a row without a usable answer, it asks whether Iterable takes a
    call that is known to be good. If not, the run is given up.
    """

    def __init__(self, client: IterableClient) -> None:
        self._client = client
        self._unusable_in_a_row = 0
        self._good_call: Call | None = None
        self._question: Future[bool] | None = None
        # A thread of its own, because the workers are busy with calls that fail.
        self._asker = ThreadPoolExecutor(1)

    @property
    def is_asking(self) -> bool:
        """Whether the answer is still to come."""
        return self._question is not None

    def note(self, user: UserCalls) -> None:
        """Count a finished user, in the order in which they are collected."""
        if self._client.control.no_new_users.is_set() or not user.made:
            return
        update = user.update
        if update.result is not None and update.result.ok:
            self._good_call = update
        self._unusable_in_a_row += 1
        if any(result.is_usable for result in user.made):
            self._unusable_in_a_row = 0
        if self._unusable_in_a_row >= UNUSABLE_IN_A_ROW and not self.is_asking:
            ask = self._client.is_available
            self._question = self._asker.submit(ask, self._good_call)

    def look(self) -> None:
        """End the run if the answer has come and is no."""
        if self._question is None or not self._question.done():
            return
        is_available = self._question.result()
        self._question = None
        self._unusable_in_a_row = 0
        if not is_available:
            error = IterableUnavailable(
                f"{UNUSABLE_IN_A_ROW} users in a row got no usable answer, and Iterable"
                " takes no call that is known to be good either"
            )
            self._client.control.end(error, abandon_started=True)

    def shutdown(self) -> None:
        """Wait for the thread."""
        self._asker.shutdown()
