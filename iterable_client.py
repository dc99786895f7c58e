"""Iterable's REST API: what it is sent, how fast, what is tried again, and what an answer means."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import random
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from threading import Event, Lock
from time import monotonic
from typing import Any

import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies, select_proxy
from urllib3 import exceptions as failures

log = logging.getLogger(__name__)


# What is sent

USERS_UPDATE, USERS_BULK_UPDATE = "users/update", "users/bulkUpdate"
EVENTS_TRACK, EVENTS_TRACK_BULK = "events/track", "events/trackBulk"
BULK = {USERS_UPDATE: USERS_BULK_UPDATE, EVENTS_TRACK: EVENTS_TRACK_BULK}
LIMITS = {USERS_UPDATE: 500, EVENTS_TRACK: 2000, USERS_BULK_UPDATE: 5, EVENTS_TRACK_BULK: 10}  # calls a second
BULK_BODY = {USERS_BULK_UPDATE: '{"users":[%s]}', EVENTS_TRACK_BULK: '{"events":[%s]}'}
MOST_ITEMS = 1000  # of a bulk body
MOST_BYTES = 1_000_000  # of a group: Iterable takes 4 MB of users in a body, and does not say how much of events

NOT_UTF8 = re.compile("[\ud800-\udfff]")  # what stands in a record for bytes that are no text

compact_json = json.JSONEncoder(separators=(",", ":")).encode  # in ASCII: its length is its bytes


def user_payload(record: Any) -> dict[str, Any]:
    """The object of users/update (contract 4) for a row of Query 2. Raises ValueError: why it cannot be sent."""
    fields = {**texts(record, "first_name", "plan_type"), "recent_page_view": True, "candidate": "yes"}
    return {"email": address(record), "dataFields": fields}


def event_payload(record: Any) -> dict[str, Any]:
    """The object of events/track (contract 4) for a row of Query 2, whose `event_time` is UTC. Raises ValueError.

    `id` and `createdAt` make a repeat harmless: the same view is the same event, at its own time.
    """
    time = re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(\.\d+)?", str(record.event_time))
    try:
        at = datetime.fromisoformat(f"{time[1]}+00:00" if time else "")
    except ValueError:
        raise ValueError("event_time is not a date with a time: correct the column in page_views") from None
    event_id = f"page-view-{'?' if record.view_id is None else record.view_id}"
    if not re.fullmatch(r"page-view-[A-Za-z0-9-]{1,502}", event_id):
        raise ValueError("the view's id cannot be an event's (letters, digits and - only): correct it in page_views")
    fields = {**texts(record, "page", "browser", "location"), "timestamp": str(at)[:19], "candidate": "yes"}
    email, seconds = address(record), int(at.timestamp())
    return {"email": email, "eventName": "page_view", "id": event_id, "createdAt": seconds, "dataFields": fields}


def address(record: Any) -> str:
    email = str(record.email or "").strip().lower()
    if "@" not in email or NOT_UTF8.search(email):
        raise ValueError("no usable e-mail address: correct it in the customers table")
    return email


def texts(record: Any, *columns: str) -> dict[str, str]:
    """The columns as text, without those that are NULL: a null would delete the field in Iterable."""
    found = {column: str(value) for column in columns if (value := getattr(record, column)) is not None}
    for column, text in found.items():
        if not text.isascii() and NOT_UTF8.search(text):
            raise ValueError(f"{column} is no text in UTF-8: change the column's type")
    return found


def in_groups(deliveries: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Groups of at most `most` and 1 MB, by the `user` and `event` payloads of each."""
    group: list[Any] = []
    size = 0
    for delivery in deliveries:
        length = len(delivery.user) + len(delivery.event) + 2
        if group and (len(group) == most or size + length > MOST_BYTES):
            yield group
            group, size = [], 0
        group.append(delivery)
        size += length
    if group:
        yield group


# What an answer means


@dataclass(frozen=True, slots=True)
class CallResult:
    """How one call ended, all its attempts included. No API key is in it.

    `status` is None when no answer came. `message` is Iterable's own text, or what happened on the way. `reason` says
    it in words a person can act on, without what is particular to this user, so that equal reasons can be counted.
    `unconfirmed` are the addresses that a bulk answer does not confirm.
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
    unconfirmed: frozenset[str] = frozenset()

    @property
    def as_json(self) -> dict[str, Any]:
        """The call in the results file (contract 7)."""
        return {key: getattr(self, key) for key in ("endpoint", "ok", "status", "code", "message", "attempts")}

    @property
    def headline(self) -> str:
        """The call as the log names it (contract 5)."""
        if self.ok:
            return f"{self.endpoint} call successful" + (f": {self.code}" if self.code else "")
        if self.status is None:
            return f"No answer from {self.endpoint}"
        kind = {3: "Redirect", 4: "4xx Client Error", 5: "5xx Server Error"}.get(self.status // 100, "Unusable answer")
        return f"{kind} from {self.endpoint}: Status {self.status}"

    @property
    def forgotten(self) -> bool:
        return (self.status, self.code) == (409, "ForgottenUserError")

    @property
    def usable(self) -> bool:
        """Whether Iterable itself answered, be it with a refusal: there is no outage, and no other server answers."""
        return self.ok or (self.code is not None and not self.retryable)


LONGEST_TEXT = 500  # characters of an answer that are kept
TRY_AGAIN = {408, 429, 500, 502, 503, 504}
DISALLOWED = "is disallowed from tracking"
CHECK_URL = "check ITERABLE_API_BASE_URL and the network"
NOT_ITERABLE = "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
KEY_REFUSED = (
    "Iterable refused the API key: check ITERABLE_API_KEY (a server-side key of this project, not disabled), and that "
    "ITERABLE_API_BASE_URL is that of its region: https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
IDENTITY = "another user of the project has this identity: merge the two in Iterable"
ADVICE: dict[str | int, str] = {  # by what Iterable says, else by the status
    DISALLOWED: "tracking is switched off for this user or event: see the project's settings in Iterable",
    "InvalidEmailAddressError": "Iterable refuses the address as invalid: correct it in the customers table",
    "UniqueFieldsLimitExceeded": "the project has no room for new fields: delete unused ones in Iterable",
    **dict.fromkeys(("ExternalKeyConflict", "EmailAlreadyExists", "UserIdAlreadyExists"), IDENTITY),
    **dict.fromkeys((401, 403), KEY_REFUSED),
    **dict.fromkeys(range(300, 400), f"a redirect, which is never followed: {NOT_ITERABLE}"),
    **dict.fromkeys(TRY_AGAIN, "Iterable is in trouble: run again later, and see https://status.iterable.com"),
    429: "the project's rate limit was used up: lower ITERABLE_RATE_LIMIT, or run when less else writes",
}
NO_ANSWER: dict[Any, str] = {  # what happened, by the error of urllib3: the first that fits
    failures.ProxyError: "the proxy does not work ({}): check HTTPS_PROXY and ALL_PROXY",
    failures.SSLError: f"no encrypted connection ({{}}): {CHECK_URL}; REQUESTS_CA_BUNDLE is for a company's own CA",
    (failures.NameResolutionError, failures.LocationParseError): f"the host name is unknown (DNS): {CHECK_URL}",
    failures.NewConnectionError: f"no connection ({{}}): {CHECK_URL}",
    failures.TimeoutError: "no answer in time: Iterable is slow or out of reach; ITERABLE_TIMEOUT is the time it gets",
    failures.HTTPError: f"the connection broke before the answer was whole: {CHECK_URL}",
}


def interpret(endpoint: str, status: int, text: str) -> CallResult:
    """What an answer means: the HTTP status first, then Iterable's `code` (contract 5)."""
    answer = parse(text)
    code, message = (answer[key] if isinstance(answer.get(key), str) else "" for key in ("code", "msg"))
    if status // 100 == 2 and code == "Success" and DISALLOWED not in message:
        return CallResult(endpoint, True, status, code, message)
    clash = code == "RequestFieldsTypesMismatched"
    advice = ADVICE.get(DISALLOWED if DISALLOWED in message else code) or ADVICE.get(status)
    otherwise = (message or "Iterable does not say why") if code else NOT_ITERABLE
    reason = type_clash(answer) if clash else advice or otherwise
    shown = json.dumps(answer, ensure_ascii=False) if "\\" in text and answer else text  # no escapes hide a secret
    retryable = status in TRY_AGAIN and not clash
    return CallResult(endpoint, False, status, code or None, message, reason, shown, retryable=retryable)


def interpret_bulk(endpoint: str, status: int, text: str, emails: Sequence[str]) -> CallResult:
    """What a bulk answer means for a group of these addresses, all in lower case (contract 5).

    It is a success when it adds up: then whoever is not `unconfirmed` was told. Else it tells nothing about anybody.
    """
    answer = parse(text)
    nested = answer.get("failedUpdates")
    lists = [*answer.items(), *(nested.items() if isinstance(nested, dict) else ())]
    # The conflict lists name the user who was there first, who may be another one of the group.
    named = [each for key, some in lists if isinstance(some, list) and not key.startswith("conflict") for each in some]
    unconfirmed = frozenset(emails).intersection(each.lower() for each in named if isinstance(each, str))
    counts = answer.get("successCount"), answer.get("failCount")
    refusal = answer.get("disallowedEventNames") or DISALLOWED in text or answer.get("code", "Success") != "Success"
    if status // 100 == 2 and counts == (len(emails) - len(unconfirmed), len(unconfirmed)) and not refusal:
        return CallResult(endpoint, True, status, unconfirmed=unconfirmed)
    result = interpret(endpoint, status, text)
    reason = "the answer does not add up" if status // 100 == 2 else result.reason
    return replace(result, ok=False, code=None, reason=reason)  # a code says nothing about one user


def parse(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(answer := json.loads(text), dict):
            return answer
    return {}


def type_clash(answer: dict[str, Any]) -> str:
    """RequestFieldsTypesMismatched as a sentence: which field, what Iterable expects, what was sent."""
    sentences = []
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # an answer of another form says less
        for field, facts in answer["params"]["validationErrors"].items():
            sent = " or ".join(map(str, facts["incomingTypes"]))
            sentences.append(f"field {field}: Iterable expects {facts['expectedType']}, but {sent} was sent")
    return f"{'; '.join(sentences) or 'a field has another type'}: correct the column, or the field's type in Iterable"


def interpret_error(endpoint: str, error: Exception) -> CallResult:
    """What an error means that came in place of an answer. One that nobody thought of is not worth another try."""
    cause = getattr(error, "original_error", None) or error.__cause__ or next(iter(error.args), error)
    detail = getattr(cause, "strerror", None) or cause
    known = [words.format(detail) for kinds, words in NO_ANSWER.items() if isinstance(error, kinds)]
    if not known:
        log.error("Unexpected error", exc_info=error, extra={"file_only": True})
    words = known[0] if known else f"an unexpected error ({type(error).__name__}): see the log file"
    return CallResult(endpoint, False, message=words, reason=words, retryable=bool(known))


# To whom, and when


def base_url(text: str) -> str:
    """The address of a project's region, without a trailing `/` or `/api`. Raises ValueError."""
    text = text.lower().rstrip("/").removesuffix("/api").rstrip("/")
    parts = re.fullmatch(r"(https?)://([a-z0-9._-]+|\[::1\])(:[0-9]{1,5})?", text)
    if not parts or int((parts[3] or ":443")[1:]) > 65535:
        raise ValueError("must be a host's address such as https://api.iterable.com, without path, query or user")
    if parts[1] == "http" and not re.fullmatch(r"localhost|127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}|\[::1\]", parts[2]):
        raise ValueError("must begin with https://, or the API key would travel in the clear")
    return text


def api_key(text: str) -> str:
    """The key, if it can be a header. Raises ValueError."""
    if not re.fullmatch("[!-~]*", text):
        raise ValueError("has a character that no key has: copy it again")
    return text


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon a call is tried again (contract 5). Times in seconds."""

    max_attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_retry_after: float = 120.0
    longest_throttling: float = 300.0

    def wait(self, failed: int) -> float:
        """The wait after so many tries failed: doubled each time, with full jitter."""
        return random.uniform(0, min(self.longest_wait, self.first_wait * 2 ** min(failed - 1, 30)))  # noqa: S311

    def retry_after(self, header: str | None) -> float | None:
        """The seconds that a `Retry-After` asks for (a number or an HTTP date), at most `longest_retry_after`."""
        with contextlib.suppress(failures.InvalidHeader, ValueError, OverflowError):
            return min(urllib3.Retry().parse_retry_after(header or ""), self.longest_retry_after)
        return None


class RateLimiter:
    """Spaces the starts of an endpoint's calls evenly over all threads: never more than `rate` in a second.

    After a 429 nothing starts for a while, and the rate falls to 70 %. It climbs back by 1 % of the full rate a
    second, for the limit is shared with everything else that writes to the project.
    """

    MARGIN = 0.02  # seconds more for a second's worth of calls, for some take longer to arrive than others
    SLOW_MARGIN = 0.05  # likewise, where that is 10 calls or fewer
    SLACK = 0.005  # seconds that a late thread may make up for
    PAUSE = 0.25  # seconds, where the answer does not ask for a longer one
    LOOK = 0.1  # seconds after which a wait looks whether the run is stopping

    def __init__(self, rate: float, stop: Event) -> None:
        self._full = self._fallen_to = rate / (1 + (self.MARGIN if rate > 10 else self.SLOW_MARGIN))
        self._stop = stop
        self._turn = Lock()  # of the one thread that waits: were many to wake late, they would start together
        self._lock = Lock()
        self._next = self._open_at = self._fell_at = 0.0  # monotonic seconds

    def acquire(self, unless: Event) -> bool:
        """Wait for a turn; False, at once, when `unless` is set. A stop cuts the pause after a 429 for everybody."""
        with self._turn:
            while not unless.is_set():
                with self._lock:
                    now = monotonic()
                    wait = (self._next if self._stop.is_set() else max(self._next, self._open_at)) - now
                    if wait <= 0:
                        self._next = max(self._next, now - self.SLACK) + 1 / self._rate(now)
                        return True
                unless.wait(min(wait, self.LOOK))
        return False

    def _rate(self, now: float) -> float:
        return min(self._full, self._fallen_to + 0.01 * self._full * (now - self._fell_at))

    def throttled(self, sent_at: float, retry_after: float | None) -> None:
        """A call that was sent at `sent_at` was answered 429. The rate falls only if that was after the last pause."""
        with self._lock:
            now, news = monotonic(), sent_at >= self._open_at
            pause = self.PAUSE * news if retry_after is None else retry_after
            if news and now - self._fell_at >= 1:
                self._fallen_to, self._fell_at = 0.7 * self._rate(now), now
            self._open_at = max(self._open_at, now + pause)
            log.debug("429: a pause of %.1f s, then %.1f calls/s", pause, self._rate(now))


class IterableClient:
    """The calls of one Iterable project, for many threads at once.

    `rate` is that of users/update in calls a second; the other endpoints get the same share of their own limits.
    `timeout` is in seconds, for an answer to begin and again for its body. `workers` is the number of threads, and so
    of connections. `stop` cuts every wait: a call that has not begun is not made, and none is tried again. Raises
    OSError when the CA file or the proxy of the environment is of no use.
    """

    def __init__(
        self, base_url: str, api_key: str, rate: float, timeout: float, workers: int, retry: RetryPolicy, stop: Event
    ) -> None:
        self._share, self._timeout, self._retry = rate / LIMITS[USERS_UPDATE], timeout, retry
        self._stop = stop
        self.halted = Event()  # once it is set, nothing more is sent; the calls on the wire end by themselves
        self._limiters = {each: RateLimiter(limit * self._share, stop) for each, limit in LIMITS.items()}
        self._headers = {"Api-Key": api_key, "Content-Type": "application/json", "User-Agent": "iterable-integration/2"}
        self.redact: Callable[[str], str] = lambda text: text.replace(api_key or "\0", "[secret]")
        self._pool = connection_pool(base_url, workers)
        self.attempts: list[int] = []  # one for each request: which of its call's it was
        self.refused = ""  # why, once an answer refused the API key

    def cost(self, users: int, *, bulk: bool) -> tuple[int, float]:
        """How many calls so many users take, and how many seconds at the rate limit."""
        groups = math.ceil(users / MOST_ITEMS) if bulk else users
        return 2 * groups, groups / (self._share * LIMITS[USERS_BULK_UPDATE if bulk else USERS_UPDATE])

    def post(self, endpoint: str, bodies: Mapping[str, str]) -> dict[str, CallResult]:
        """POST the JSON of one address to `endpoint` (users/update or events/track), of more to its bulk endpoint.

        Returns the verdicts by address. Who has none is left out: a stop came first, or the answer to the group does
        not confirm this user. Events are sent once even after a stop, so that a started user is whole.
        """
        unless = self.halted if endpoint == EVENTS_TRACK else self._stop
        result = self._call(endpoint if len(bodies) == 1 else BULK[endpoint], bodies, unless) if bodies else None
        if result is None:
            return {}
        if result.ok or len(bodies) == 1 or unless.is_set():  # then none is sent singly any more
            return dict.fromkeys(bodies.keys() - result.unconfirmed, result)
        log.info("%s: %s; its users are sent singly", result.headline, result.reason, extra={"file_only": True})
        return {}

    def _call(self, endpoint: str, bodies: Mapping[str, str], unless: Event) -> CallResult | None:
        """One call, tried again as often as contract 5 says. `unless` forbids the first try, a stop any other."""
        body = (BULK_BODY.get(endpoint, "%s") % ",".join(bodies.values())).encode()
        limiter, result = self._limiters[endpoint], None
        tries, throttled_since = 0, 0.0  # a 429 is an attempt, and no try
        for attempt in itertools.count(1):
            if not limiter.acquire(unless if attempt == 1 else self._stop):
                break
            self.attempts.append(attempt)
            sent_at = monotonic()
            answer, retry_after = self._exchange(endpoint, body, list(bodies))
            result = replace(answer, attempts=attempt)
            if result.status in (401, 403):
                self.refused = result.reason
                self.halted.set()
                self._stop.set()
            if result.retryable and result.status == 429:
                limiter.throttled(sent_at, retry_after)
                throttled_since = throttled_since or sent_at
                if monotonic() - throttled_since >= self._retry.longest_throttling:
                    break
                continue
            tries, throttled_since = tries + 1, 0.0
            if not result.retryable or tries >= self._retry.max_attempts:
                break
            wait = self._retry.wait(tries) if retry_after is None else retry_after
            log.debug("%s: %s; next try in %.1f s", endpoint, result.reason, wait)
            if self._stop.wait(wait):
                break
        return result

    def _exchange(self, endpoint: str, body: bytes, emails: list[str]) -> tuple[CallResult, float | None]:
        """One request and its answer, with the seconds of its Retry-After. The one place where bytes leave."""
        log.debug("%s: %s", endpoint, body if len(emails) == 1 else f"{len(emails)} in {len(body)} bytes")
        timeout = urllib3.Timeout(connect=min(self._timeout, 10.0), read=self._timeout)
        options: dict[str, Any] = {"redirect": False, "retries": False, "timeout": timeout, "preload_content": False}
        try:
            response = self._pool.urlopen("POST", f"/api/{endpoint}", body=body, headers=self._headers, **options)
            answer = endpoint, response.status, read(response, self._timeout, most=65_536 + 2000 * len(emails))
            result = interpret_bulk(*answer, emails) if endpoint in BULK_BODY else interpret(*answer)
            retry_after = self._retry.retry_after(response.headers.get("Retry-After"))
        except Exception as error:  # noqa: BLE001 - what nobody thought of costs this call, and not the run
            result, retry_after = interpret_error(endpoint, error), None
        reason = result.reason.replace(emails[0] or "\0", "<email>")  # so that equal reasons can be counted
        texts = (result.code or "", result.message, reason, result.body)
        code, message, reason, shown = (self.redact(text)[:LONGEST_TEXT] for text in texts)
        return replace(result, code=code or None, message=message, reason=reason, body=shown), retry_after


def read(response: urllib3.BaseHTTPResponse, timeout: float, most: int) -> str:
    """The body, or its beginning. That of a refusal may break off: the status says enough. Raises what urllib3 does.

    The socket's own time-out starts again with each byte, so an answer that drips would hold a worker for ever.
    """
    content, deadline = b"", monotonic() + timeout
    forgiven = [failures.HTTPError] if response.status >= 300 else []
    # The response closes its connection, unless the answer was read to its end: then it is in the pool by now.
    with response, contextlib.suppress(*forgiven):
        while len(content) < most and (more := response.read1(65_536)):
            content += more
            if monotonic() > deadline:
                raise failures.TimeoutError
    return content.decode("utf-8", "replace")


def connection_pool(base_url: str, workers: int) -> urllib3.HTTPConnectionPool:
    """Connections to Iterable, by the proxy and with the CA file of the environment, as requests would find them.

    It would look for them at every call. To ask urllib3 directly takes a third of its CPU time.
    """
    authorities = os.getenv("REQUESTS_CA_BUNDLE") or os.getenv("CURL_CA_BUNDLE") or DEFAULT_CA_BUNDLE_PATH
    place: dict[str, Any] = {"capath" if os.path.isdir(authorities) else "cafile": authorities}
    try:
        context = ssl.create_default_context(**place)
    except OSError as error:
        raise OSError(f"The CA file {authorities} (REQUESTS_CA_BUNDLE) cannot be read: {error}") from error
    proxy = select_proxy(base_url, get_environ_proxies(base_url))
    if not proxy or base_url.startswith("http:"):  # plain http is for this machine, and would show a proxy the key
        return urllib3.PoolManager(ssl_context=context, maxsize=workers).connection_from_url(base_url)
    try:
        if not re.fullmatch(r"(https?://)?([^@/?#]*@)?[^@/?#]+/?", proxy):
            raise ValueError
        url = proxy if "://" in proxy else f"http://{proxy}"
        adapter = HTTPAdapter(pool_maxsize=workers)
        manager: urllib3.PoolManager = adapter.proxy_manager_for(url, ssl_context=context, proxy_ssl_context=context)
        return manager.connection_from_url(base_url)
    except ValueError:
        form = "http://user:password@host:port, with / ? # @ in the password as %2F %3F %23 %40"
        raise OSError(f"HTTPS_PROXY or ALL_PROXY is of no use: it must be like {form}") from None
