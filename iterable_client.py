"""Iterable: what it is sent, how fast and how often, and what its answers mean.

An `IterableClient` makes one call at a time, with its retries. A `Sender` makes the
calls of many users, in threads and groups. The facts about the API come from
https://api.iterable.com/api/docs, unless another page is named.
"""

from __future__ import annotations

import contextlib
import http.client
import io
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from functools import partial
from ipaddress import ip_address
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
from urllib3.connection import (
    HTTPConnection,
    HTTPSConnection,
    ProxyConfig,
    port_by_scheme,
)
from urllib3.util import parse_url

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
    finishes_user: bool = False  # a user's last call: made even when the run is ending


USERS_UPDATE = Endpoint("users/update", limit=500)
EVENTS_TRACK = Endpoint("events/track", limit=2000, finishes_user=True)
USERS_BULK_UPDATE = Endpoint("users/bulkUpdate", limit=5, items_key="users")
EVENTS_TRACK_BULK = Endpoint(
    "events/trackBulk", limit=10, items_key="events", finishes_user=True
)
USERS_GET_FIELDS = Endpoint("users/getFields", limit=3, method="GET")

ENDPOINTS = (
    USERS_UPDATE,
    EVENTS_TRACK,
    USERS_BULK_UPDATE,
    EVENTS_TRACK_BULK,
    USERS_GET_FIELDS,
)
BULK_ENDPOINTS = {USERS_UPDATE: USERS_BULK_UPDATE, EVENTS_TRACK: EVENTS_TRACK_BULK}


# Payloads


class IdentifyBy(str, Enum):
    """How a project identifies its users: the key in each payload.

    https://support.iterable.com/hc/en-us/articles/9216719179796
    """

    EMAIL = "email"
    USER_ID = "userId"


class Identity(NamedTuple):
    """Who a user is for Iterable: the key of the payload, and its value."""

    identify_by: IdentifyBy
    value: str


# A row of Query 2 (a PageViewRow) by its columns: user_id, first_name, email,
# plan_type, view_id, page, browser, location, and event_time in UTC.
Row = Mapping[str, int | str | None]


class UnusableRow(Exception):
    """A row cannot be sent. The text says why, and then what to correct."""

    def __init__(self, problem: str, cure: str) -> None:
        super().__init__(f"{problem}: {cure}")
        self.brief = problem  # without the cure, for the line of each such user


# The database module returns a byte that is not UTF-8 as half a surrogate pair.
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
# https://support.iterable.com/hc/en-us/articles/9216719179796: at most 52 characters
_USER_ID = re.compile(r"[!-~]([ -~]{0,50}[!-~])?")
# The id of an event has at most 512 bytes: letters, digits and hyphens.
_EVENT_ID = re.compile(r"page-view-[A-Za-z0-9-]{1,502}")
_EVENT_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(\.\d+)?")

# The fields that are sent of a user, with the types that users/getFields should name.
USER_FIELD_TYPES = {
    "first_name": "string",
    "plan_type": "string",
    "recent_page_view": "boolean",
    "candidate": "string",
}

# Returns a payload as JSON. It is ASCII, so its length is its number of bytes.
encode_payload = json.JSONEncoder(separators=(",", ":")).encode


def identify(row: Row, identify_by: IdentifyBy) -> Identity:
    """Return the identity of a row's user. Raises UnusableRow."""
    if identify_by is IdentifyBy.USER_ID:
        user_id = str(row["user_id"])
        if row["user_id"] is None or not _USER_ID.fullmatch(user_id):
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
    if email is None:
        return ""
    return str(email).strip().lower()


def make_user_payload(row: Row, identity: Identity) -> dict[str, Any]:
    """Return the body of users/update for a row. Raises UnusableRow."""
    fields: dict[str, Any] = {}
    email = normalize_email(row["email"])
    if email and identity.identify_by is IdentifyBy.USER_ID:
        fields["email"] = _check_text("email", email)
    fields.update(_pick_texts(row, "first_name", "plan_type"))
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
    texts = {}
    for column in columns:
        value = row[column]
        if value is not None:
            texts[column] = _check_text(column, str(value))
    return texts


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
    """How a call ended, all its attempts included.

    The client takes out secrets, and shortens the texts, before it returns one.
    """

    endpoint: str  # its path
    # The call was accepted. Of a group: its answer is clear, and `confirmed` says who
    # was accepted.
    ok: bool
    status: int | None = None  # None if there was no answer
    code: str | None = None
    message: str = ""  # Iterable's `msg`, or what happened instead
    # Why it failed and what to do, without the user's name: the summary counts users
    # who have the same reason.
    reason: str = ""
    body: str = ""  # the answer, if the call failed
    attempts: int = 1  # also those answered 429, which `max_attempts` does not count
    is_retryable: bool = False
    retry_after: float | None = None  # seconds that Iterable asks to wait
    is_refused_key: bool = False  # by Iterable itself, and not by a firewall
    is_unexpected: bool = False  # an error of this program
    was_sent: bool = True  # False if no attempt had a connection
    # The result of a group whose answer is unclear. A single call follows, unless the
    # run ends first: then the user is not attempted, but may have been updated.
    is_provisional: bool = False
    confirmed: frozenset[str] = frozenset()  # of a group: the users who were accepted
    dropped_fields: frozenset[str] = frozenset()  # those the project does not take
    fields: Mapping[str, str] | None = None  # types by name; of users/getFields only

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
        kind = kinds.get(self.status // 100, "No success")
        return f"{kind} from {self.endpoint}: Status {self.status}"

    @property
    def is_forgotten(self) -> bool:
        """Whether the user asked Iterable to forget them: every write is refused."""
        return self.status == 409 and self.code == "ForgottenUserError"

    @property
    def is_usable(self) -> bool:
        """Whether Iterable gave a final answer about the user.

        Its own answers have a code, those of firewalls have none.
        """
        return self.ok or (self.code is not None and not self.is_retryable)

    @property
    def is_unclear(self) -> bool:
        """Whether the call may have been accepted, although it is not `ok`.

        A 5xx is taken for a refusal: there are users to whom Iterable answers 500 for
        ever.
        """
        has_refusal = self.status is not None and self.status >= 300
        return not (self.ok or has_refusal)


def interpret(
    endpoint: Endpoint,
    status: int,
    text: str,
    identity: Identity | None = None,
) -> CallResult:
    """Return what an answer means. The reason does not name the user, if there is one.

    A call is accepted by a 2xx with the code Success, if `msg` does not say that
    tracking is disallowed.
    """
    answer = _parse_object(text)
    code = _get_text(answer, "code")
    message = _get_text(answer, "msg")
    ok = status // 100 == 2 and code == "Success" and DISALLOWED not in message
    result = CallResult(endpoint.path, ok, status, code or None, message)
    if ok:
        return result
    words = message
    if identity is not None:
        words = _hide(identity, message)
    return replace(
        result,
        reason=_explain_refusal(status, answer, words),
        body=_unescape(text, answer),
        # Iterable has answered type clashes with a 500.
        is_retryable=status in RETRYABLE_STATUSES and code != TYPE_CLASH,
        is_refused_key=_is_key_refused(status, answer),
    )


def interpret_group(
    endpoint: Endpoint,
    status: int,
    text: str,
    identities: Sequence[Identity],
) -> CallResult:
    """Return what the answer to a bulk call means for these users.

    It is believed only when its counts agree with the users that its lists name.
    """
    if status // 100 != 2:
        # Without the code: `is_usable` must not take it for an answer about each user.
        return replace(interpret(endpoint, status, text), code=None)
    answer = _parse_object(text)
    sent = {identity.value for identity in identities}
    failed = sent & _find_named_users(answer, identities[0].identify_by)
    confirmed = sent - failed
    counts = (answer.get("successCount"), answer.get("failCount"))
    is_clear = (
        counts == (len(confirmed), len(failed))
        and answer.get("code", "Success") == "Success"
        and not answer.get("disallowedEventNames")
        and DISALLOWED not in text
    )
    result = CallResult(endpoint.path, is_clear, status)
    if is_clear:
        dropped = _as_texts(answer.get("filteredOutFields"))
        return replace(
            result,
            confirmed=frozenset(confirmed),
            dropped_fields=frozenset(dropped),
        )
    return replace(
        result,
        message=_get_text(answer, "msg"),
        reason="the answer does not add up",
        body=_unescape(text, answer),
    )


def interpret_fields(status: int, text: str) -> CallResult:
    """Return what the answer of users/getFields means."""
    endpoint = USERS_GET_FIELDS
    fields = _parse_object(text).get("fields")
    if status // 100 == 2 and isinstance(fields, dict):
        return CallResult(endpoint.path, ok=True, status=status, fields=fields)
    result = interpret(endpoint, status, text)
    # A 2xx without fields is a failure, too.
    return replace(result, ok=False, reason=result.reason or NOT_ITERABLE)


def _find_named_users(answer: dict[str, Any], identify_by: IdentifyBy) -> set[str]:
    """Return the users whom the lists of a bulk answer name.

    The lists "conflict..." are left out, because they name the other user of a
    conflict, who may be in this group and accepted. Without them `failCount` disagrees,
    so that the whole group is sent singly.
    """
    named: set[str] = set()
    failed_updates = _as_object(answer.get("failedUpdates"))
    for key, value in [*answer.items(), *failed_updates.items()]:
        if key.startswith("conflict"):
            continue
        texts = _as_texts(value)
        if identify_by is IdentifyBy.EMAIL:
            named.update(text.lower() for text in texts)
        elif key.endswith("UserIds"):  # any text could be a user ID
            named.update(texts)
    return named


def _parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in a text, or an empty one."""
    try:
        return _as_object(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _as_object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_texts(value: object) -> set[str]:
    """Return the texts in a list; none if it is no list."""
    if not isinstance(value, list):
        return set()
    return {item for item in value if isinstance(item, str)}


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
    # Not as a part of a longer word or address; the full stop of a sentence may follow.
    name = rf"(?<![\w.@-]){re.escape(identity.value)}(?!\.?[\w@-])"
    return re.sub(name, f"<{identity.identify_by.value}>", text)


def _is_key_refused(status: int, answer: dict[str, Any]) -> bool:
    """Whether this is Iterable refusing the key. A firewall answers 401 and 403, too.

    Iterable's own JSON has a code, and a `msg` that may be empty.
    """
    has_message = isinstance(answer.get("msg"), str)
    is_from_iterable = has_message and _get_text(answer, "code") != ""
    return status in (401, 403) and is_from_iterable


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
    if not code or status in (401, 403):  # the answer of a firewall or proxy
        return NOT_ITERABLE
    return message or "Iterable does not say why"


def _explain_type_clash(answer: dict[str, Any]) -> str:
    """Return which field has another type in Iterable than the value that was sent."""
    params = _as_object(answer.get("params"))
    errors = _as_object(params.get("validationErrors"))
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
        #: The run is ending: no user may start, and no call of any kind is tried again.
        #: A user whose update has ended, well or not, still gets the event.
        self.no_new_users = threading.Event()
        #: No call at all may start.
        self.nothing_more = threading.Event()
        #: Users are being sent. Before that, a signal ends the process at once.
        self.has_begun = threading.Event()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._is_closed = False

    def end(self, error: Exception) -> None:
        """End the run early because of an error. Only the first one counts."""
        with self._lock:
            if not self._is_closed:
                self._error = self._error or error
                self.no_new_users.set()

    def abort(self, error: Exception) -> None:
        """End the run, and let not even the users who have started get their events."""
        self.nothing_more.set()
        self.end(error)

    @property
    def is_ending(self) -> bool:
        """Whether the run has been ended early."""
        return self.no_new_users.is_set()

    def close(self) -> Exception | None:
        """Return the error that ended the run early, if any. No later one counts."""
        with self._lock:
            self._is_closed = True
            return self._error

    def get_stop(self, endpoint: Endpoint) -> threading.Event:
        """Return which of `no_new_users` and `nothing_more` forbids a call when set."""
        return self.nothing_more if endpoint.finishes_user else self.no_new_users


class KeyRefused(Exception):
    """Iterable refused the API key."""


class IterableUnavailable(Exception):
    """Iterable takes no call at present."""


class TurnCancelled(Exception):
    """The run ended before a call was sent."""


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
        doubled = self.first_wait * 2 ** (failed_attempts - 1)
        longest = min(self.longest_wait, doubled)
        return random.uniform(0, longest)  # noqa: S311 - jitter is no secret

    def parse_retry_after(self, header: str | None) -> float | None:
        """Return the seconds that a Retry-After header asks for.

        It is a number of seconds or an HTTP date. None if it is neither, or is past.
        """
        try:
            seconds = urllib3.Retry().parse_retry_after(header or "")
        except (urllib3_errors.InvalidHeader, ValueError, OverflowError):
            return None
        if seconds <= 0:
            return None
        return min(seconds, self.longest_retry_after)


class RateLimiter:
    """Spaces the calls of an endpoint evenly in time, whichever threads make them.

    After a 429 none starts for a while, and the rate falls to 70 %. It climbs back by
    1 % of the full rate a second, because others write to the project as well.
    """

    # By this share the rate stays below the limit: Iterable counts arrivals, and some
    # calls take longer than others to arrive.
    MARGIN = 0.02
    # The same at 10 calls a second or fewer, where one too early matters more.
    SLOW_MARGIN = 0.05
    SLACK = 0.005  # seconds that a thread which woke up late may make up for
    PAUSE = 0.25  # seconds after a 429 that does not ask for any
    FALL = 0.7  # of the rate, after a 429
    CLIMB = 0.01  # of the full rate, each second

    def __init__(self, rate: float, no_new_users: threading.Event) -> None:
        margin = self.MARGIN
        if rate <= 10:
            margin = self.SLOW_MARGIN
        self._full_rate = rate / (1 + margin)
        self._fallen_to = self._full_rate
        self._no_new_users = no_new_users
        # One thread waits for its turn, the others for this lock. If all of them slept,
        # those that wake up late would start together.
        self._turnstile = threading.Lock()
        self._lock = threading.Lock()  # of the numbers below, never held while waiting
        self._next_turn = 0.0  # monotonic seconds, as the next two
        self._paused_until = 0.0
        self._fell_at = 0.0

    def wait_for_turn(self, cancelled: threading.Event) -> None:
        """Wait until a call may start. Raises TurnCancelled if `cancelled` is set."""
        with self._turnstile:
            while True:
                if cancelled.is_set():
                    raise TurnCancelled
                wait = self._take_turn()
                if wait <= 0:
                    return
                # Wake up when the run ends, because a pause is void then; after that,
                # when this call is cancelled.
                is_ending = self._no_new_users.is_set()
                stop = cancelled if is_ending else self._no_new_users
                stop.wait(wait)

    def slow_down(self, sent_at: float, retry_after: float | None) -> None:
        """Pause after a 429 to a call that was sent at `sent_at` (monotonic seconds).

        One that was sent before the end of the last pause changes nothing, unless it
        asks for a longer one. The rate falls once a second at most.
        """
        with self._lock:
            now = monotonic()
            is_news = sent_at >= self._paused_until
            if is_news and now - self._fell_at >= 1:
                self._fallen_to = self.FALL * self._compute_rate(now)
                self._fell_at = now
            if is_news or retry_after:
                pause = retry_after or self.PAUSE
                self._paused_until = max(self._paused_until, now + pause)
            rate = self._compute_rate(now)
        log.debug("429: from now on %.1f calls a second", rate)

    def _take_turn(self) -> float:
        """Take the turn and return 0, or return the seconds until it may be taken."""
        with self._lock:
            now = monotonic()
            start = self._next_turn
            # The end of a run does not wait for a pause, which may take two minutes.
            if not self._no_new_users.is_set():
                start = max(start, self._paused_until)
            if start > now:
                return start - now
            turn = max(start, now - self.SLACK)
            self._next_turn = turn + 1 / self._compute_rate(now)
            return 0.0

    def _compute_rate(self, now: float) -> float:
        seconds = now - self._fell_at
        climbed = self.CLIMB * self._full_rate * seconds
        return min(self._full_rate, self._fallen_to + climbed)


# The connections

CONNECT_TIMEOUT = 10.0  # seconds, or the time-out of a call if that is less
BLOCK_SIZE = 16_384  # bytes that are sent at once: what one TLS record holds
LOOK_UP_SECONDS = 30.0  # for which a name's addresses are used again
LOOK_UP_INTERVAL = 1.0  # seconds until the next look-up, if there is no connection
MAX_INTERIM_ANSWERS = 10  # 1xx answers in front of the true one
# So many bytes of an answer are read, and twice those of the request: users/getFields
# names thousands of fields, and the answer to a group may name each of its users twice.
MAX_ANSWER = 1_000_000


class NoAnswer(Exception):
    """A call got no answer. The text says why, in words that a person can act on."""

    was_sent = True  # or a part of it

    def __init__(self, reason: str, *, is_retryable: bool = True) -> None:
        super().__init__(reason)
        self.is_retryable = is_retryable


class NoConnection(NoAnswer):
    """A call was not sent, because no connection could be opened."""

    was_sent = False


class NetworkSettingsError(Exception):
    """The proxy or the CA file of the environment cannot be used."""


class NameCache:
    """Looks up a host's addresses once for many connections. Safe in any thread.

    A resolver loses answers when hundreds of threads ask at once. All connections of a
    run are to one host: Iterable, or the proxy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._addresses: list[str] = []
        self._problem = ""
        self._valid_until = -math.inf  # monotonic seconds

    def connect(self, host: str, port: int, timeout: float) -> socket.socket:
        """Open a socket to one of the host's addresses, within `timeout` seconds each.

        Raises socket.gaierror if it has none, else the OSError of the last one.
        """
        for address in self._look_up(host, port):
            try:
                sock = socket.create_connection((address, port), timeout)
            except OSError as error:
                failure = error
                self._put_last(address)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
        self._look_up_soon()
        raise failure

    def _look_up(self, host: str, port: int) -> list[str]:
        # Threads that wait here share the outcome.
        with self._lock:
            if monotonic() >= self._valid_until:
                self._ask_resolver(host, port)
            if not self._addresses:
                raise socket.gaierror(self._problem)
            return list(self._addresses)

    def _ask_resolver(self, host: str, port: int) -> None:
        """Look up. If that fails, old addresses are better than none."""
        valid_for = LOOK_UP_SECONDS
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # The last part of each is the address with the port.
            self._addresses = [str(each[-1][0]) for each in found]
        except (OSError, UnicodeError) as error:
            self._problem = str(error)
            valid_for = LOOK_UP_INTERVAL
        self._valid_until = monotonic() + valid_for

    def _put_last(self, address: str) -> None:
        """Let other addresses be tried first next time."""
        with self._lock:
            if address in self._addresses:
                self._addresses.remove(address)
                self._addresses.append(address)

    def _look_up_soon(self) -> None:
        with self._lock:
            soon = monotonic() + LOOK_UP_INTERVAL
            self._valid_until = min(self._valid_until, soon)


def _set_deadline(sock: socket.socket, deadline: float) -> None:
    """Let the socket wait until then, in monotonic seconds, and no longer."""
    seconds_left = deadline - monotonic()
    sock.settimeout(max(seconds_left, 0.001))  # 0 would mean not to wait at all


class _AnswerReader(io.RawIOBase):
    """The bytes of an answer, which must all come within the time-out of its socket.

    The socket's own time-out begins anew with each byte, so an answer that drips would
    hold its thread for ever.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        timeout = sock.gettimeout() or 0.0  # it always has one
        self._deadline = monotonic() + timeout
        self.is_stopped = False  # then it gives no more bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.is_stopped:
            return 0
        _set_deadline(self._sock, self._deadline)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _AnswerBuffer(io.BufferedReader):
    """Reads an answer, and closes a connection on which more than the answer came."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = _AnswerReader(sock)
        super().__init__(self._reader)

    def close(self) -> None:
        if not self.closed:
            # `peek` gives what is in the buffer then, and does not wait for more.
            self._reader.is_stopped = True
            if self.peek():
                self._sock.close()  # which `has_lapsed` finds
        super().close()


class _FinalResponse(http.client.HTTPResponse):
    """An answer without the informational ones (1xx) in front of it.

    A firewall or CDN may send one. http.client would take a 103 for the answer, and
    from then on each request would get the answer to the one before.
    """

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        self.fp = _AnswerBuffer(sock)

    def begin(self) -> None:
        for _ in range(MAX_INTERIM_ANSWERS):
            super().begin()
            if self.status >= 200 or self.status == 101:  # 101 is final, too
                return
            self.headers = None  # type: ignore[assignment]  # else begin() does nothing
        raise http.client.HTTPException("too many 1xx answers")


class _Connection(HTTPConnection):
    """A connection of urllib3 that finds its address in the `names`.

    `timeout` (seconds) is at first that for opening it, then that for each request and
    each answer. urllib3 gives it to the socket before each of these.
    """

    response_class = _FinalResponse
    timeout: float

    def __init__(self, host: str, *, names: NameCache, **options: Any) -> None:
        super().__init__(host, **options)
        self._names = names

    def __del__(self) -> None:
        self.close()  # its thread has ended

    def _new_conn(self) -> socket.socket:
        return self._names.connect(self.host, self.port, self.timeout)

    def send(self, data: Any) -> None:
        """Send bytes within the time-out, however many TLS records they take.

        The socket's own time-out begins anew with each record.
        """
        deadline = monotonic() + self.timeout
        for start in range(0, len(data), BLOCK_SIZE):
            _set_deadline(self.sock, deadline)
            super().send(data[start : start + BLOCK_SIZE])

    def has_lapsed(self) -> bool:
        """Whether the server closed it, or sent what no call asked for."""
        try:
            self.sock.settimeout(0)
            self.sock.recv(1)  # takes in the tickets that a TLS server sends by itself
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            return True
        return True


class _SecureConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


class HttpAnswer(NamedTuple):
    """An answer as it came. `sent_at` is when its call was sent, monotonic seconds."""

    status: int
    text: str
    retry_after: str | None
    sent_at: float


class _OfThread(threading.local):
    """What each thread has for itself."""

    connection: _Connection | None = None


class Transport:
    """Sends requests to Iterable. Each thread that does has a connection of its own.

    `timeout` is in seconds, for a request to be sent and again for its answer. Proxy
    and CA file are those of the environment. The constructor raises
    NetworkSettingsError, the methods NoAnswer.
    """

    def __init__(
        self,
        base_url: str,
        headers: dict[str, str],
        *,
        timeout: float,
    ) -> None:
        self._headers = headers
        self._timeout = timeout
        self._is_secure = base_url.startswith("https:")
        self._host = base_url.partition("://")[2]
        self._proxy = _find_proxy(base_url)
        self._tls_context = _make_tls_context()
        self._names = NameCache()
        self._of_thread = _OfThread()

    def prepare(self) -> None:
        """Open the connection of this thread, unless it is open.

        To be called before a call takes its turn. Opening takes three round trips, and
        after the turn they would make calls arrive bunched, some of which Iterable
        would answer with 429.
        """
        connection = self._of_thread.connection
        if connection is None or connection.is_closed:
            self._open_connection()

    def exchange(self, endpoint: Endpoint, body: bytes) -> HttpAnswer:
        """Send one request, after `prepare`, and return its answer."""
        connection = self._of_thread.connection
        # It is looked at once, right before it is used.
        if connection is None or connection.has_lapsed():
            connection = self._open_connection()
        sent_at = monotonic()
        try:
            self._send(connection, endpoint, body)
            response = connection.getresponse()
            text = self._read(connection, response, MAX_ANSWER + 2 * len(body))
        except Exception as error:
            connection.close()  # or the next call may get the rest of this answer
            if isinstance(error, (TimeoutError, urllib3_errors.TimeoutError)):
                raise NoAnswer(TOO_SLOW) from error
            if isinstance(error, _CONNECTION_ERRORS):
                raise NoAnswer(BROKEN) from error
            raise
        retry_after = response.headers.get("Retry-After")
        return HttpAnswer(response.status, text, retry_after, sent_at)

    def _open_connection(self) -> _Connection:
        """Open a connection, and keep it for this thread."""
        connection = self._make_connection()
        try:
            connection.connect()
        except _CONNECTION_ERRORS as error:
            reached_proxy = connection.has_connected_to_proxy
            connection.close()
            failure = self._explain_no_connection(error, reached_proxy=reached_proxy)
            raise failure from error
        connection.timeout = self._timeout
        self._of_thread.connection = connection
        return connection

    def _make_connection(self) -> _Connection:
        options: dict[str, Any] = {
            "names": self._names,
            "timeout": min(self._timeout, CONNECT_TIMEOUT),
        }
        if not self._is_secure:
            return _Connection(self._host, **options)
        options["ssl_context"] = self._tls_context
        proxy = self._proxy
        if proxy is None:
            return _SecureConnection(self._host, **options)
        options["proxy_config"] = ProxyConfig(
            ssl_context=self._tls_context,
            use_forwarding_for_https=False,
            assert_hostname=None,
            assert_fingerprint=None,
        )
        connection = _SecureConnection(proxy.host, port=proxy.port, **options)
        connection.set_tunnel(self._host, headers=proxy.login, scheme=proxy.scheme)
        return connection

    def _send(self, connection: _Connection, endpoint: Endpoint, body: bytes) -> None:
        # A server may answer, and close, before it has read the whole request.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(
                endpoint.method,
                f"/api/{endpoint.path}",
                body,
                self._headers,
                preload_content=False,
            )

    def _read(
        self,
        connection: _Connection,
        response: urllib3.HTTPResponse,
        max_bytes: int,
    ) -> str:
        """Return the body, or the beginning of one that is too long.

        If a refusal breaks off, its beginning is enough, too.
        """
        content = b""
        is_whole = False
        try:
            while not is_whole and len(content) < max_bytes:
                block = response.read1(65_536)
                content += block
                is_whole = not block
        except urllib3_errors.HTTPError:
            if response.status < 300:
                raise
        if not is_whole:
            connection.close()
        return content.decode("utf-8", "replace")

    def _explain_no_connection(
        self, error: Exception, *, reached_proxy: bool
    ) -> NoConnection:
        """Return in words why no connection could be opened."""
        place = self._host
        advice = CHECK_URL
        if self._proxy is not None:
            place = f"the proxy {self._proxy.host}:{self._proxy.port}"
            advice = "check HTTPS_PROXY and ALL_PROXY"
        refusal = re.search(r"Tunnel connection failed: ((\d+).*)", str(error))
        if refusal:
            reason = f"{place} refuses the connection ({refusal[1].strip()}): {advice}"
            return NoConnection(reason, is_retryable=refusal[2].startswith("5"))
        if isinstance(error, ssl.SSLCertVerificationError):
            if reached_proxy:  # it is Iterable's
                place = self._host
                advice = CHECK_URL
            reason = (
                f"the certificate of {place} is not trusted ({error.verify_message}):"
                f" {advice}; REQUESTS_CA_BUNDLE is for a company's own CA"
            )
            return NoConnection(reason, is_retryable=False)
        if isinstance(error, socket.gaierror):
            return NoConnection(f"the host name of {place} is unknown (DNS): {advice}")
        detail = getattr(error, "strerror", None) or str(error)
        if isinstance(error, TimeoutError):
            detail = "no answer in time"
        elif isinstance(error, ssl.SSLError):
            detail = f"TLS failed: {error}"
        return NoConnection(f"no connection to {place} ({detail}): {advice}")


_CONNECTION_ERRORS = (OSError, http.client.HTTPException, urllib3_errors.HTTPError)


class _Proxy(NamedTuple):
    """A proxy, with the headers that log in to it."""

    scheme: str
    host: str
    port: int
    login: dict[str, str]


def _find_proxy(base_url: str) -> _Proxy | None:
    """Return the proxy that the environment names. Raises NetworkSettingsError."""
    text = select_proxy(base_url, get_environ_proxies(base_url))
    # Plain http is for this machine only, and would show the key to a proxy.
    if not text or base_url.startswith("http:"):
        return None
    if "://" not in text:
        text = f"http://{text}"
    try:
        url = parse_url(text)
        scheme = url.scheme or ""
        default_port = port_by_scheme[scheme]
        login = urllib3.make_headers(proxy_basic_auth=unquote(url.auth or ""))
    except (ValueError, KeyError):
        raise NetworkSettingsError(_UNUSABLE_PROXY) from None
    # A password with one of / ? # in it looks like these parts.
    has_other_parts = url.path not in (None, "/") or url.query or url.fragment
    if not url.host or has_other_parts:
        raise NetworkSettingsError(_UNUSABLE_PROXY)
    return _Proxy(scheme, url.host, url.port or default_port, login)


_UNUSABLE_PROXY = (
    "HTTPS_PROXY or ALL_PROXY cannot be used: it must be like"
    " http://user:password@host:port, with / ? # @ in the password as %2F %3F %23 %40"
)


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
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse_api_key(text: str) -> str:
    """Return the key, or "" for none. Raises ValueError if it cannot be a header."""
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


@dataclass(slots=True)
class UserCalls:
    """The calls that one user needs, in the order in which they are made."""

    number: int  # the caller's, to know the user again
    calls: list[Call]  # users/update, then events/track unless the user left

    @property
    def results(self) -> list[CallResult]:
        """The results that there are, without provisional ones."""
        results = [call.result for call in self.calls if call.result is not None]
        return [result for result in results if not result.is_provisional]

    @property
    def size(self) -> int:
        """Bytes that the user adds to the bodies of a group."""
        return sum(len(call.payload) for call in self.calls)


class _Request(NamedTuple):
    """What is sent for a call, and what reads its answer: status and text."""

    endpoint: Endpoint
    body: bytes
    interpret: Callable[[int, str], CallResult]


_GET_FIELDS = _Request(USERS_GET_FIELDS, b"", interpret_fields)
_UPDATE_NOBODY = _Request(USERS_UPDATE, b"{}", partial(interpret, USERS_UPDATE))


def _make_request(calls: Sequence[Call]) -> _Request:
    """Return the request of a call, or one bulk request in place of several."""
    first = calls[0]
    endpoint = first.endpoint
    if len(calls) == 1:
        read = partial(interpret, endpoint, identity=first.identity)
        return _Request(endpoint, first.payload.encode(), read)
    bulk = BULK_ENDPOINTS[endpoint]
    items = ",".join(call.payload for call in calls)
    identities = [call.identity for call in calls]
    read = partial(interpret_group, bulk, identities=identities)
    return _Request(bulk, f'{{"{bulk.items_key}":[{items}]}}'.encode(), read)


class IterableClient:
    """The calls of one Iterable project, for many threads at once.

    `rate` is the number of users/update calls a second; each other endpoint gets the
    same share of its own limit. `timeout` is in seconds. `workers` is how many threads
    a Sender uses. `redact` takes the secrets out of a text. The constructor raises
    NetworkSettingsError; calls raise TurnCancelled if the run ended before they were
    sent.
    """

    PROBE_ATTEMPTS = 2  # of `is_available`, after many users with all their attempts

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
        self._transport = Transport(base_url, headers, timeout=timeout)
        self.attempts_made = 0  # of all calls
        self.retries_made = 0  # attempts after the first of a call
        self._lock = threading.Lock()
        self._has_warned_of_dropped_fields = False

    def count_calls(self, updates: int, events: int, *, bulk: bool) -> int:
        """Return how many calls a run makes, not counting retries."""
        if not bulk:
            return updates + events
        groups = math.ceil(updates / MAX_GROUP_USERS)
        return groups + math.ceil(events / MAX_GROUP_USERS)

    def estimate_seconds(self, users: int, *, bulk: bool) -> float:
        """Return how many seconds the updates take at the rate limit.

        The events take less, because their limit is higher.
        """
        limit = USERS_BULK_UPDATE.limit if bulk else USERS_UPDATE.limit
        calls = self.count_calls(users, 0, bulk=bulk)
        return calls / (self._share * limit)

    def check_key(self) -> CallResult:
        """Make a users/update call without a user.

        With a good key Iterable answers 400, because there is no user, else 401.
        """
        return self._call(_UPDATE_NOBODY)

    def get_fields(self) -> CallResult:
        """Ask users/getFields for the fields of users. It changes nothing."""
        return self._call(_GET_FIELDS)

    def is_available(self, good_call: Call | None) -> bool:
        """Whether Iterable answers an update that it accepted before in this run.

        Without one, users/getFields is asked. True as well if the run ended meanwhile.
        """
        request = _GET_FIELDS
        if good_call is not None:
            request = _make_request([good_call])
        try:
            result = self._call(request, max_attempts=self.PROBE_ATTEMPTS)
        except TurnCancelled:
            return True
        return result.is_usable or self.control.is_ending

    def post(self, calls: Sequence[Call]) -> CallResult:
        """Make a call, or one bulk call in place of several of one endpoint.

        A refused key ends the run.
        """
        result = self._call(_make_request(calls))
        if result.is_refused_key:
            self.control.abort(KeyRefused(result.reason))
        if result.dropped_fields:
            self._warn_of_dropped_fields(result.dropped_fields)
        return result

    def _call(self, request: _Request, max_attempts: int | None = None) -> CallResult:
        """Make a call, and again as the retry policy says.

        A 429 is no failed attempt, unless there is nothing else for too long.
        """
        no_new_users = self.control.no_new_users
        cancelled = self.control.get_stop(request.endpoint)
        max_attempts = max_attempts or self._retry.max_attempts
        result = None
        number = 0
        was_sent = False
        failures = 0
        throttled_since = None
        while True:
            try:
                attempt = self._attempt(request, cancelled)
            except TurnCancelled:
                if result is None or not was_sent:
                    raise
                return result
            number += 1
            self._count_attempt(number)
            was_sent = was_sent or attempt.was_sent
            result = replace(attempt, attempts=number, was_sent=was_sent)
            cancelled = no_new_users  # no retry is worth delaying the end
            if result.status == 429:
                throttled_since = throttled_since or monotonic()
                if monotonic() - throttled_since >= self._retry.longest_throttling:
                    return result
                continue  # the limiter pauses
            throttled_since = None
            failures += 1
            if not result.is_retryable or failures >= max_attempts:
                return result
            wait = self._retry.compute_wait(failures, result.retry_after)
            log.debug("%s: next attempt in %.1f s", result.headline, wait)
            no_new_users.wait(wait)

    def _attempt(self, request: _Request, cancelled: threading.Event) -> CallResult:
        """Send a request once, when its turn comes."""
        if cancelled.is_set():  # so that no connection is opened
            raise TurnCancelled
        endpoint = request.endpoint
        limiter = self._limiters[endpoint]
        try:
            self._transport.prepare()
            limiter.wait_for_turn(cancelled)
            answer = self._transport.exchange(endpoint, request.body)
            retry_after = self._retry.parse_retry_after(answer.retry_after)
            if answer.status == 429:
                limiter.slow_down(answer.sent_at, retry_after)
            result = request.interpret(answer.status, answer.text)
            result = replace(result, retry_after=retry_after)
        except TurnCancelled:
            raise
        except NoAnswer as error:
            result = replace(
                _make_failure(endpoint, str(error)),
                is_retryable=error.is_retryable,
                was_sent=error.was_sent,
            )
        except Exception as error:  # costs this call, and not the run
            log.exception("Unexpected error", extra=FILE_ONLY)
            reason = f"an unexpected error ({type(error).__name__}): see the log file"
            result = replace(_make_failure(endpoint, reason), is_unexpected=True)
        return replace(
            result,
            code=result.code and self._clean(result.code),
            message=self._clean(result.message),
            reason=self._clean(result.reason),
            body=self._clean(result.body),
        )

    def _count_attempt(self, number: int) -> None:
        with self._lock:
            self.attempts_made += 1
            if number > 1:
                self.retries_made += 1

    def _warn_of_dropped_fields(self, fields: frozenset[str]) -> None:
        with self._lock:
            is_first = not self._has_warned_of_dropped_fields
            self._has_warned_of_dropped_fields = True
        if is_first:
            log.warning(
                "⚠ Iterable drops fields that the project does not take: %s."
                " Create them in Iterable, or allow new fields in its settings",
                self._clean(", ".join(sorted(fields))),
            )

    def _clean(self, text: str) -> str:
        """Return a text without secrets, and not too long."""
        return self._redact(text)[:MAX_KEPT_TEXT]


def _make_failure(endpoint: Endpoint, reason: str) -> CallResult:
    """Return the result of a call that got no answer."""
    return CallResult(endpoint.path, ok=False, message=reason, reason=reason)


# Sending many users

# The users of a group share one users/bulkUpdate and one events/trackBulk. Iterable
# states no number of users; a thousand is what its own clients send.
MAX_GROUP_USERS = 1000
# Of both bodies together. Iterable takes 4 MB of users, and states no limit for events.
MAX_GROUP_BYTES = 1_000_000
# Users of a bulk run in flight. More would only wait for their turn, and take memory.
MAX_BULK_IN_FLIGHT = 10_000
UNUSABLE_IN_A_ROW = 20  # users without a usable answer: Iterable may be down
# Bytes of virtual memory that a new thread needs, for its stack and its heap. With
# less, it may hang or crash.
THREAD_ROOM = 200_000_000


class NoRoomForThread(Exception):
    """The machine has no memory, or no thread, for another worker."""


@contextlib.contextmanager
def explaining_no_thread() -> Iterator[None]:
    """Raise NoRoomForThread if the block cannot start a thread."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        raise NoRoomForThread(
            f"no memory or thread for another worker ({error}): lower MAX_WORKERS,"
            " or raise ulimit -v or -u"
        ) from error


def require_thread_room() -> None:
    """Raise OSError if there is not enough virtual memory for another thread."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mmap.mmap(-1, THREAD_ROOM, flags, mmap.PROT_READ).close()


class Sender(AbstractContextManager["Sender"]):
    """Sends users in threads, and hands each back when its calls are finished.

    With `bulk` they go in groups, and those whom the answer to their group does not
    confirm get the single calls. `announce` gets users just before they are sent, so
    that they are known if the process is killed. The end of the `with` block waits for
    the calls in flight. One thread, the caller's, uses it; the workers only make calls.

    After an error some users are not given back. Once the block has ended, no worker
    changes them any more, and the caller may look at their results.
    """

    def __init__(
        self,
        client: IterableClient,
        announce: Callable[[Sequence[UserCalls]], None],
        *,
        bulk: bool,
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
        self._threads_left = client.workers  # that the pool may have to start, at most
        self._unusable_in_a_row = 0  # users without a usable answer
        self._good_call: Call | None = None  # the last update that Iterable accepted
        self._question: Future[bool] | None = None  # whether Iterable is available
        # A thread of its own, because the workers may be busy with calls that fail.
        self._asker = ThreadPoolExecutor(1)

    def __exit__(self, *_: object) -> None:
        """Wait for the calls in flight."""
        self._workers.shutdown()
        self._asker.shutdown()

    @property
    def is_full(self) -> bool:
        """Whether no further user should be submitted now."""
        is_asking = self._question is not None
        return is_asking or self._in_flight >= self._max_in_flight

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to collect. An open group is not in flight."""
        return self._question is None and self._in_flight == 0

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
        self._end_at_outage()
        finished: list[UserCalls] = []
        wait = seconds
        while True:
            try:
                future = self._done.get(block=wait > 0, timeout=wait)
            except queue.Empty:
                return finished
            wait = 0.0
            finished += self._take_back(future.result())

    def _start(self, group: list[UserCalls]) -> None:
        with explaining_no_thread():
            if self._threads_left > 0:
                self._threads_left -= 1
                require_thread_room()
            future = self._workers.submit(self._send, group)
        future.add_done_callback(self._done.put)

    def _take_back(self, group: list[UserCalls]) -> list[UserCalls]:
        """Return the finished users of a group. The others are sent on, one by one."""
        finished = []
        for user in group:
            if self._find_due_call(user) is not None:
                self._start([user])
            else:
                self._in_flight -= 1
                self._note(user)
                finished.append(user)
        return finished

    def _find_due_call(self, user: UserCalls) -> Call | None:
        """Return the call that a user needs next; None if the user is finished.

        That is the first one without a result, or with a provisional one, if it may
        start.
        """
        for call in user.calls:
            result = call.result
            if result is None or result.is_provisional:
                return None if self._is_forbidden(call) else call
            if result.is_forgotten:  # the next call would be refused, too
                return None
        return None

    def _is_forbidden(self, call: Call) -> bool:
        """Whether the call may not start any more."""
        return self._client.control.get_stop(call.endpoint).is_set()

    def _send(self, group: list[UserCalls]) -> list[UserCalls]:
        """Make the calls of a group that are due. Runs in a worker."""
        for endpoint in BULK_ENDPOINTS:  # in the order of a user's calls
            self._make_calls(group, endpoint)
        return group

    def _make_calls(self, group: list[UserCalls], endpoint: Endpoint) -> None:
        """Make the calls to an endpoint that are due, together if there are several.

        After a group, a call that must follow singly has no result, or a provisional
        one.
        """
        calls = []
        for user in group:
            call = self._find_due_call(user)
            if call is not None and call.endpoint is endpoint:
                calls.append(call)
        if not calls:
            return
        try:
            result = self._client.post(calls)
        except TurnCancelled:
            return
        is_group = len(calls) > 1
        if is_group and result.ok:
            confirmed = result.confirmed
            calls = [call for call in calls if call.identity.value in confirmed]
        elif is_group and not self._is_forbidden(calls[0]):
            text = "%s: %s; its %d users are sent singly"
            log.info(text, result.headline, result.reason, len(calls), extra=FILE_ONLY)
            if not result.is_unclear:
                return
            result = replace(result, is_provisional=True)
        # If no single call may follow, the answer to the group is the last one.
        for call in calls:
            call.result = result

    def _note(self, user: UserCalls) -> None:
        """Count users in a row without a usable answer, in the order they finish."""
        update = user.calls[0]
        if update.result is not None and update.result.ok:
            self._good_call = update
        if any(result.is_usable for result in user.results):
            self._unusable_in_a_row = 0
        elif user.results:
            self._unusable_in_a_row += 1
        if self._unusable_in_a_row >= UNUSABLE_IN_A_ROW and self._question is None:
            self._ask_for_outage()

    def _ask_for_outage(self) -> None:
        """Ask whether Iterable answers a call that is known to be good.

        If it does, it is up, and the errors are about these users. No further user is
        submitted until the answer has come.
        """
        with explaining_no_thread():
            require_thread_room()
            ask = self._client.is_available
            self._question = self._asker.submit(ask, self._good_call)

    def _end_at_outage(self) -> None:
        """End the run if the answer has come, and is no."""
        if self._question is None or not self._question.done():
            return
        is_available = self._question.result()
        self._question = None
        self._unusable_in_a_row = 0
        if not is_available:
            self._client.control.abort(
                IterableUnavailable(
                    f"{UNUSABLE_IN_A_ROW} users in a row got no usable answer, and"
                    " Iterable takes no call that is known to be good either"
                )
            )
