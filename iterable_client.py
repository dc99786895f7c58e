"""Iterable's REST API: how fast calls may start, what is tried again, and what an answer means (contract 4 and 5)."""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import itertools
import json
import logging
import math
import os
import random
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from time import monotonic
from typing import Any

import requests
import urllib3
from requests.adapters import DEFAULT_CA_BUNDLE_PATH, HTTPAdapter
from urllib3.exceptions import (
    HTTPError,
    LocationParseError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    SSLError,
    TimeoutError,
)

USERS_UPDATE = "users/update"
EVENTS_TRACK = "events/track"
EVENTS_PER_UPDATE = 4
"""Iterable takes 500 users/update and 2000 events/track calls a second."""

_LONGEST_BODY = 65_536  # bytes of an answer that are read
_LONGEST_TEXT = 500  # characters of an answer that are kept
_LONGEST_CONNECT = 10.0  # seconds
_TRY_AGAIN = {408, 429, 500, 502, 503, 504}
_CHECK_URL = "check ITERABLE_API_BASE_URL and the network"
_NOT_ITERABLE = "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
_KEY = (
    "Iterable refused the API key: check ITERABLE_API_KEY (a server-side key of this project, not disabled), and that "
    "ITERABLE_API_BASE_URL is that of its region: https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
_IDENTITY = "another user of the project has this identity: merge the two in Iterable"
_ADVICE: dict[str | int | None, str] = {
    "InvalidEmailAddressError": "Iterable refuses the address as invalid: correct it in the customers table",
    "UniqueFieldsLimitExceeded": "the project has no room for new fields: delete unused ones in Iterable",
    "ExternalKeyConflict": _IDENTITY,
    "EmailAlreadyExists": _IDENTITY,
    "UserIdAlreadyExists": _IDENTITY,
    401: _KEY,
    403: _KEY,
    429: "the project's rate limit was used up for too long: lower ITERABLE_RATE_LIMIT, or run when less else writes",
}

_FILE_ONLY = {"file_only": True}  # what happens inside a call is for the log, not for the console

_CODES = {"Success", "ForgottenUserError", "RequestFieldsTypesMismatched", *filter(None, map(str, _ADVICE))}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon a call is tried again (contract 5). Times in seconds."""

    max_attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_retry_after: float = 120.0
    longest_throttling: float = 300.0

    def wait(self, failures: int) -> float:
        """The wait after so many failures: doubled each time, with full jitter."""
        return random.uniform(0, min(self.longest_wait, self.first_wait * 2 ** min(failures - 1, 30)))  # noqa: S311

    def retry_after(self, header: str | None) -> float | None:
        """The seconds that a `Retry-After` asks for (a number or an HTTP date), at most `longest_retry_after`."""
        if header is None:
            return None
        try:
            seconds = float(header)
        except ValueError:
            try:
                date = parsedate_to_datetime(header)
                now = datetime.now(timezone.utc)
                seconds = (date.replace(tzinfo=date.tzinfo or timezone.utc) - now).total_seconds()
            except (ValueError, TypeError, OverflowError):
                return None
        return None if math.isnan(seconds) else min(max(seconds, 0.0), self.longest_retry_after)


@dataclass(frozen=True, slots=True)
class CallResult:
    """How one call ended, all its attempts included. Nothing in it holds a secret.

    `status` is None when no answer came. `message` is Iterable's own text, or what happened on the way. `reason` says
    the same for a person, without what is particular to this user, so that equal reasons can be counted.
    """

    endpoint: str
    ok: bool
    status: int | None = None
    code: str | None = None
    message: str = ""
    reason: str = ""
    body: str = ""
    attempts: int = 1
    retryable: bool = False

    @property
    def headline(self) -> str:
        """The call as the log names it (contract 5)."""
        if self.ok:
            return f"{self.endpoint} call successful: {self.code}"
        if self.status is None:
            return f"No answer from {self.endpoint}"
        kind = {3: "Redirect", 4: "4xx Client Error", 5: "5xx Server Error"}.get(self.status // 100, "Unusable answer")
        return f"{kind} from {self.endpoint}: Status {self.status}"

    @property
    def key_refused(self) -> bool:
        return self.status in (401, 403)

    @property
    def forgotten(self) -> bool:
        return self.status == 409 and self.code == "ForgottenUserError"

    @property
    def usable(self) -> bool:
        """Whether it is an answer of Iterable's, be it a refusal, and not one of an outage or of another server."""
        return self.code is not None and not self.retryable


class RateLimiter:
    """Spaces the starts of calls evenly over all threads: never more than `rate` in a second.

    After a 429 nothing starts for a while, and the rate falls by 30 %. It climbs back along the curve of CUBIC (RFC
    9438): fast at first, slowly near the rate that was refused, then faster again, for the limit is shared and what
    the others leave changes.
    """

    _SHARE = 0.98  # the rest is for calls that take longer to arrive than those after them
    _SLACK = 0.005  # seconds that a late thread may make up for
    _FALL = 0.3
    _RECOVERY = 7.0  # seconds until the refused rate is reached again
    _FIRST_PAUSE = 0.25  # seconds, doubled while there is nothing but 429
    _LONGEST_PAUSE = 30.0

    def __init__(self, rate: float, stop: threading.Event) -> None:
        self._full = rate * self._SHARE
        self._stop = stop
        self._turn = threading.Lock()  # of the one thread whose turn is next: when all are late, none goes with another
        self._lock = threading.Lock()
        self._next = 0.0  # when the next call may start; all times are monotonic seconds
        self._open_at = 0.0  # nothing starts before: the end of a 429's pause
        self._refused_rate = self._full
        self._fell_at = -math.inf
        self._pause = self._FIRST_PAUSE

    def take(self) -> float:
        """Take a turn: 0 when it has come, else the seconds until one may come."""
        with self._lock:
            now = monotonic()
            if (wait := max(self._next, self._open_at) - now) > 0:
                return wait
            self._next = max(self._next, now - self._SLACK) + 1 / self.rate(now)
            return 0.0

    def acquire(self) -> bool:
        """Wait for a turn. False, at once, when a stop is asked for."""
        with self._turn:
            while not self._stop.is_set():
                if not (wait := self.take()):
                    return True
                self._stop.wait(wait)
        return False

    def rate(self, now: float) -> float:
        """Calls a second at this time."""
        progress = (now - self._fell_at) / self._RECOVERY
        return min(self._full, self._refused_rate * (1 + self._FALL * (progress - 1) ** 3))

    def throttled(self, sent_at: float, retry_after: float | None) -> None:
        """A call that was sent then was answered 429."""
        with self._lock:
            now = monotonic()
            if sent_at >= self._open_at:  # else it was on the wire before the last pause, and says nothing new
                if now - self._fell_at >= 1:
                    self._refused_rate, self._fell_at = max(self.rate(now), 1.0), now
                if retry_after is None:
                    retry_after = self._pause
                    self._pause = min(2 * self._pause, self._LONGEST_PAUSE)
                log.info("429: pause of %.1f s, then %.0f calls/s", retry_after, self.rate(now), extra=_FILE_ONLY)
            self._open_at = max(self._open_at, now + (retry_after or 0.0))

    def accepted(self, sent_at: float) -> None:
        """A call that was sent then was answered with anything but a 429."""
        if sent_at >= self._open_at:
            self._pause = self._FIRST_PAUSE


class IterableClient:
    """The two calls of one Iterable project, for many threads at once.

    `rate` is that of users/update in calls a second; events/track gets four times as many. `timeout` is in seconds,
    for a whole answer. `workers` is the number of threads, and so of connections. `stop` cuts every wait: a call that
    has not begun is not made, and none is tried again. `redact` takes the secrets out of whatever the API answers.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        rate: float = 450,
        timeout: float = 30.0,
        workers: int = 1,
        retry: RetryPolicy | None = None,
        stop: threading.Event | None = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._retry = retry or RetryPolicy()
        self._stop = stop or threading.Event()
        self._redact = redact
        self._halted = False
        self._limiters = {
            USERS_UPDATE: RateLimiter(rate, self._stop),
            EVENTS_TRACK: RateLimiter(rate * EVENTS_PER_UPDATE, self._stop),
        }
        self._headers = {
            "Api-Key": api_key,
            "Content-Type": "application/json",
            "User-Agent": "iterable-integration/1.0",
        }
        self._timeout = urllib3.Timeout(connect=min(timeout, _LONGEST_CONNECT), read=timeout)
        self._adapter, self._pool, self._urls = _connect(base_url, workers)
        self._pool.ConnectionCls = _connection_class(self._pool.ConnectionCls, lambda: self._halted)

    def __enter__(self) -> IterableClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._adapter.close()

    @property
    def stopped(self) -> bool:
        """Whether no new user may be started."""
        return self._halted or self._stop.is_set()

    def halt(self) -> None:
        """Nothing is sent from now on; the calls on the wire end by themselves."""
        self._halted = True
        self._stop.set()

    def take_turn(self) -> float:
        """Take a turn at users/update: 0 when it has come, else the seconds until one may come."""
        return self._limiters[USERS_UPDATE].take()

    def update_user(self, payload: Mapping[str, Any], *, in_turn: bool = False) -> CallResult | None:
        """POST users/update, without a wait when `in_turn`, after `take_turn`. None when a stop came first."""
        return self._call(USERS_UPDATE, payload, in_turn=in_turn)

    def track_event(self, payload: Mapping[str, Any]) -> CallResult | None:
        """POST events/track, once even after a stop, so that a started user is whole. None after `halt`."""
        return self._call(EVENTS_TRACK, payload, although_stopping=True)

    def _call(
        self,
        endpoint: str,
        payload: Mapping[str, Any],
        *,
        in_turn: bool = False,
        although_stopping: bool = False,
    ) -> CallResult | None:
        body = json.dumps(payload, separators=(",", ":")).encode()
        limiter, policy = self._limiters[endpoint], self._retry
        result: CallResult | None = None
        tries, throttled_since = 0, None
        for attempt in itertools.count(1):
            first = attempt == 1
            may_start = not self._stop.is_set() if in_turn and first else limiter.acquire()
            if self._halted or not (may_start or (although_stopping and first)):
                break
            sent_at = monotonic()
            log.debug("%s, attempt %d: %s", endpoint, attempt, body)
            try:
                answer, retry_after = self._exchange(endpoint, body)
            except _Halted:
                break
            result = replace(answer, attempts=attempt)
            if result.key_refused:
                self.halt()
            if result.retryable and result.status == 429:
                limiter.throttled(sent_at, retry_after)
                throttled_since = throttled_since or sent_at
                if monotonic() - throttled_since >= policy.longest_throttling:
                    break
                continue
            limiter.accepted(sent_at)
            tries, throttled_since = tries + 1, None
            if not result.retryable or tries >= policy.max_attempts:
                break
            wait = policy.wait(tries) if retry_after is None else retry_after
            log.info("%s: %s; next try in %.1f s", endpoint, result.reason, wait, extra=_FILE_ONLY)
            if self._stop.wait(wait):
                break
        return result and (result if result.ok else _without_user(result, payload))

    def _exchange(self, endpoint: str, body: bytes) -> tuple[CallResult, float | None]:
        """One request and its answer, with the seconds of its Retry-After."""
        try:
            response = self._pool.urlopen(
                "POST",
                self._urls[endpoint],
                body=body,
                headers=self._headers,
                redirect=False,
                retries=False,
                assert_same_host=False,
                timeout=self._timeout,
                preload_content=False,
            )
            text = _read(response)
        except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            retryable, words = _describe(error)
            words = self._redact(words)
            return CallResult(endpoint, False, message=words, reason=words, retryable=retryable), None
        retry_after = self._retry.retry_after(response.headers.get("Retry-After"))
        return interpret(endpoint, response.status, text, self._redact), retry_after


def _read(response: urllib3.BaseHTTPResponse) -> str:
    """The body. That of a refusal may break off: the status says enough. Raises what urllib3 does."""
    try:
        if response.status < 200:
            return ""  # and close the connection, for the real answer may follow
        return response.read(_LONGEST_BODY).decode("utf-8", "replace")
    except (HTTPError, OSError):
        if response.status < 300:
            raise
        return ""
    finally:
        response.close()  # a connection whose answer was read to its end is in the pool by now, and stays open


def interpret(endpoint: str, status: int, text: str, redact: Callable[[str], str] = str) -> CallResult:
    """What an answer means: the HTTP status first, then Iterable's `code` (contract 5)."""
    try:
        answer = json.loads(text)
        if "\\" in text:  # a secret could hide in escapes
            text = json.dumps(answer, ensure_ascii=False)
    except (ValueError, RecursionError):
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    code, message = (answer[key] if isinstance(answer.get(key), str) else "" for key in ("code", "msg"))
    ok = 200 <= status < 300 and code == "Success" and "is disallowed from tracking" not in message
    reason, retryable = "" if ok else _reason(status, code, message), status in _TRY_AGAIN
    if code == "RequestFieldsTypesMismatched":
        message = f"{message}: {_mismatches(answer, values=True)}"
        reason, retryable = _mismatches(answer, values=False), False
    code = code if code in _CODES else redact(code)  # a password may be a word of the API's
    texts = (code, redact(message), redact(reason), "" if ok else " ".join(redact(text).split()))
    code, message, reason, body = (one[:_LONGEST_TEXT] for one in texts)
    return CallResult(endpoint, ok, status, code or None, message, reason, body, retryable=retryable)


def _without_user(result: CallResult, payload: Mapping[str, Any]) -> CallResult:
    """The same, with a reason that does not name the user or the event."""
    reason = result.reason
    for key in ("email", "id"):
        if payload.get(key):
            reason = reason.replace(str(payload[key]), f"<{key}>")
    return replace(result, reason=reason)


def _reason(status: int, code: str | None, message: str) -> str:
    if advice := _ADVICE.get(code) or _ADVICE.get(status):
        return advice
    if "is disallowed from tracking" in message:
        return "tracking is switched off for this user or event: see the project's settings in Iterable"
    if 300 <= status < 400:
        return f"a redirect, which is never followed: {_NOT_ITERABLE}"
    if status in _TRY_AGAIN:
        return "Iterable is in trouble: run again later, and see https://status.iterable.com"
    return (message or "Iterable does not say why") if code else _NOT_ITERABLE


def _mismatches(answer: Mapping[str, Any], *, values: bool) -> str:
    """RequestFieldsTypesMismatched as a sentence: which field, what Iterable expects, what was sent."""
    params = answer.get("params")
    errors = params.get("validationErrors") if isinstance(params, dict) else None
    sentences = []
    for field, facts in errors.items() if isinstance(errors, dict) else ():
        facts = facts if isinstance(facts, dict) else {}
        sent = facts.get("incomingTypes")
        sent = " or ".join(map(str, sent)) if isinstance(sent, list) else sent
        value = f", {facts.get('offendingValue')!r}," if values else ""
        sentences.append(f"field {field}: Iterable expects {facts.get('expectedType')}, but {sent}{value} was sent")
    return f"{'; '.join(sentences) or 'a field has another type'}: correct the column, or the field's type in Iterable"


def _describe(error: Exception) -> tuple[bool, str]:
    """Whether a call that got no answer is worth another try, and what happened in plain words."""
    if isinstance(error, ProxyError):
        return True, f"the proxy does not work: check HTTPS_PROXY ({error.original_error})"
    cause = error.args[0] if isinstance(error, SSLError) and error.args else None
    if isinstance(cause, ssl.SSLCertVerificationError):
        advice = f"{_CHECK_URL}; a company's own authority goes into REQUESTS_CA_BUNDLE"
        return False, f"the server's certificate is not trusted ({cause.verify_message}): {advice}"
    if isinstance(error, SSLError):
        return True, f"no encrypted connection ({getattr(cause, 'reason', error)}): {_CHECK_URL}"
    if isinstance(error, NameResolutionError | LocationParseError):
        return True, f"the host name is unknown (DNS): {_CHECK_URL}"
    if isinstance(error, NewConnectionError) and getattr(error.__cause__, "errno", None) == errno.EMFILE:
        return True, "too many open connections: lower MAX_WORKERS, or raise the limit of open files (ulimit -n)"
    if isinstance(error, NewConnectionError):
        return True, f"no connection ({getattr(error.__cause__, 'strerror', None) or 'refused'}): {_CHECK_URL}"
    if isinstance(error, TimeoutError):
        return True, "no answer in time: Iterable is slow or out of reach; ITERABLE_TIMEOUT is the time it gets"
    return True, f"the connection broke before the answer was whole: {_CHECK_URL}"


class _Adapter(HTTPAdapter):
    """Requests' adapter with one TLS context for all connections: by itself it loads the CA file for each of them."""

    def __init__(self, context: ssl.SSLContext, size: int) -> None:
        self._context = context
        super().__init__(pool_maxsize=size)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=self._context, proxy_ssl_context=self._context, **kwargs)


def _connect(base_url: str, workers: int) -> tuple[HTTPAdapter, Any, dict[str, str]]:
    """The adapter, its pool of connections to the base URL, and what to ask that pool for at each endpoint.

    Requests reads proxies and CA files from the environment at every call. Here it does so once, and each call is one
    `urlopen` on the pool: that takes a third of the CPU time of `Session.post`. Raises OSError when a proxy's address
    or the CA file is of no use.
    """
    environment = requests.Session().merge_environment_settings(base_url, {}, None, None, None)
    authorities = DEFAULT_CA_BUNDLE_PATH if environment["verify"] is True else str(environment["verify"])
    context = urllib3.util.create_urllib3_context()
    try:
        context.load_verify_locations(**{"capath" if os.path.isdir(authorities) else "cafile": authorities})
    except OSError as error:
        raise OSError(f"The CA file {authorities} (REQUESTS_CA_BUNDLE) cannot be read: {error}") from error
    # Plain http is allowed to this machine only, and would hand the key to a proxy.
    adapter, proxies = _Adapter(context, workers), environment["proxies"] if base_url.startswith("https:") else {}
    calls = {
        name: requests.Request("POST", f"{base_url}/api/{name}").prepare() for name in (USERS_UPDATE, EVENTS_TRACK)
    }
    try:
        pool: Any = adapter.get_connection_with_tls_context(calls[USERS_UPDATE], verify=True, proxies=proxies)
    except (OSError, ValueError, HTTPError) as error:
        advice = "a / or @ in its password is written %2F or %40"
        raise OSError(f"The address of the proxy in HTTPS_PROXY is of no use: {advice}") from error
    return adapter, pool, {name: adapter.request_url(call, proxies) for name, call in calls.items()}


class _Halted(Exception):
    """A call ended before anything was sent."""


def _connection_class(of_urllib3: Any, halted: Callable[[], bool]) -> Any:
    class Connection(of_urllib3):  # type: ignore[misc]
        """Sends a request in one piece, where http.client sends head and body by themselves."""

        _unsent = b""

        def send(self, data: bytes) -> None:
            if self.sock is None:
                self.connect()
            self._unsent += data

        def response_class(self, sock: Any, **more: Any) -> http.client.HTTPResponse:
            """The answer to what `send` was given, be it a request or a proxy's CONNECT."""
            data, self._unsent = self._unsent, b""
            if halted():  # while this thread was still connecting
                raise _Halted
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer may have come before
                super().send(data)
            return http.client.HTTPResponse(_Deadline(sock), **more)  # type: ignore[arg-type]

    return Connection


class _Deadline(io.RawIOBase):
    """The bytes of one answer, which must be whole within the socket's time-out.

    The socket's own time-out starts again with each byte, so an answer that drips would hold a worker for ever.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._begun = False
        self._end = monotonic() + (sock.gettimeout() or math.inf)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._begun:  # for most answers, which need one read, the time-out that the socket has is right
            self._sock.settimeout(max(self._end - monotonic(), 0.001))
        self._begun = True
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)
