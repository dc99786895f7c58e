"""Tell Iterable about every pro customer who looked at the pricing or settings page in the last 7 days.

One run: settings, the rows of Query 2, both calls for each user, a results file and a log. README.md has the rest.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() listens, Ctrl-C ends the program without a traceback

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import io
import json
import logging
import os
import queue
import re
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote
from urllib.request import getproxies

import dotenv.parser

from db_connection import DatabaseConnection, DatabaseError, read_query
from iterable_client import CallResult, IterableClient, RetryPolicy
from logger_config import FILE_ONLY, FILE_ONLY_MORE, PRIVATE, Redactor, setup_logger

HERE = Path(__file__).resolve().parent
QUERIES = HERE / "phase2_queries.sql"
SUCCESS, NOT_ALL, BAD_SETTINGS, DATABASE_FAILED, GIVEN_UP, LOCKED = 0, 1, 2, 3, 4, 75  # exit codes (contract 3)
ITERABLE_LIMIT = 500  # users/update calls a second, for a whole project
UNUSABLE_IN_A_ROW = 20  # users without a usable answer, after which the run is given up
MANY = 100  # users, above which the console shows progress instead of each success
PROGRESS_SECONDS = 2.0
LONGEST_PAUSE = 0.1  # seconds after which a stop is seen
MEMORY = timedelta(days=8)  # a view stays in the 7-day window to the end of its last day
SHOWN_REASONS = 10
RESULTS = "integration_results_"

T = TypeVar("T")
log = logging.getLogger(__name__)


class SettingsError(Exception):
    """Settings are missing, empty, malformed or of no use. The text names them all, and no secret's value."""

    log_file: Path | None = None


class AlreadyRunning(Exception):
    """Another run holds the results folder."""


class Interrupted(Exception):
    """A stop was asked for before anything was sent."""


class IterableFailed(Exception):
    """A check of Iterable failed."""


class UnusableRow(ValueError):
    """The row cannot be sent. The text says why."""


def number(low: float, high: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not re.fullmatch(r"\d{1,9}" if kind is int else r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
            raise ValueError(f"must be a {'whole ' * (kind is int)}number, not {text!r}")
        if not low <= kind(text) <= high:
            raise ValueError(f"must be from {low} to {high}, not {text}")
        return kind(text)

    return parse


def matching(pattern: str, complaint: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(complaint)
        return text

    return parse


plain = matching(r"[^\0\ud800-\udfff]*", "has bytes that are not text")


def path(text: str) -> Path:
    return HERE / plain(text)


def readable_file(text: str) -> str:
    if text and not (os.path.isfile(path(text)) and os.access(path(text), os.R_OK)):
        raise ValueError(f"must be a file that can be read, unlike {path(text)}")
    return text and str(path(text))


def base_url(text: str) -> str:
    text = text.lower().rstrip("/").removesuffix("/api").rstrip("/")
    parts = re.fullmatch(r"(https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", text)
    if not parts or int((parts[3] or ":443")[1:]) > 65535:
        raise ValueError("must be a host's address such as https://api.iterable.com, without path, query or user")
    if parts[1] == "http" and not re.fullmatch(r"localhost|127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}|\[::1\]", parts[2]):
        raise ValueError("must begin with https://, or the API key would travel in the clear")
    return text


def setting(parse: Callable[[str], Any] = plain, default: str | None = None, *, secret: bool = False) -> Any:
    return field(repr=not secret, metadata={"parse": parse, "default": default})


@dataclass(frozen=True)
class Settings:
    """Contract 2: each field is the environment variable of that name in capitals.

    Paths are absolute, times in seconds, the rate in users/update calls a second.
    """

    db_host: str = setting()
    db_user: str = setting()
    db_password: str = setting(secret=True)
    db_name: str = setting()
    db_port: int = setting(number(1, 65535), "3306")
    db_ssl_ca: str = setting(readable_file, "")
    iterable_api_key: str = setting(matching("[!-~]*", "has a character that no key has: copy it again"), secret=True)
    iterable_api_base_url: str = setting(base_url, "https://api.iterable.com")
    iterable_rate_limit: int = setting(number(1, 100_000), "450")
    iterable_max_attempts: int = setting(number(1, 100), "5")
    iterable_timeout: float = setting(number(0.1, 3600, float), "30")
    max_workers: int = setting(number(1, 2000), "300")
    log_level: str = setting(matching("DEBUG|INFO|WARNING|ERROR", "must be DEBUG, INFO, WARNING or ERROR"), "INFO")
    log_file: Path = setting(path, "iterable_integration.log")
    results_dir: Path = setting(path, ".")


def load_environment_variables(
    env_file: Path = HERE / ".env", environ: Mapping[str, str] = os.environ, *, needs_key: bool = True
) -> Settings:
    """The settings of `environ` and, for what is not set there, of the `.env` file (contract 2).

    Raises SettingsError with every complaint at once.
    """
    complaints: list[str] = []
    values = {**read_env_file(env_file, complaints), **environ}
    parsed: dict[str, Any] = {}
    for item in dataclasses.fields(Settings):
        name, default = item.name.upper(), item.metadata["default"]
        text = values.get(name, "").strip() or default
        if name == "DB_PASSWORD":
            text = values.get(name)  # may be empty, and blanks count
        elif name == "ITERABLE_API_KEY" and not needs_key:
            text = text or ""
        try:
            if text is None:
                raise ValueError("is empty" if name in values else "is missing")
            parsed[item.name] = item.metadata["parse"](text)
        except ValueError as complaint:
            complaints.append(f"{name} {complaint}")
    if complaints:
        redact = Redactor(values.get(item.name.upper(), "") for item in dataclasses.fields(Settings) if not item.repr)
        error = SettingsError(
            redact(f"Settings: {'; '.join(complaints)}. ")
            + f"Set them in {env_file} (cp .env.example .env, then fill it in) or in the environment. "
            "To see a run without any: bash tests/demo.sh"
        )
        error.log_file = parsed.get("log_file")
        raise error
    return Settings(**parsed)


def read_env_file(env_file: Path, complaints: list[str]) -> dict[str, str]:
    try:
        text = env_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if not (isinstance(error, FileNotFoundError) and env_file == HERE / ".env"):
            complaints.append(f"{env_file} cannot be read ({getattr(error, 'strerror', None) or error})")
        return {}
    lines = list(dotenv.parser.parse_stream(io.StringIO(text)))  # nothing is interpolated: a password may hold ${...}
    complaints += [f"{env_file} cannot be understood from line {line.original.line} on" for line in lines if line.error]
    return {line.key: line.value or "" for line in lines if line.key}


@dataclass(frozen=True, slots=True)
class Record:
    """A row of Query 2, built by keyword, so that a column that moved fails on the first row. No value is trusted."""

    user_id: Any
    first_name: Any
    email: Any
    plan_type: Any
    view_id: Any
    page: Any
    browser: Any
    location: Any
    event_time: Any


def user_payload(record: Record) -> dict[str, Any]:
    """The body of users/update (contract 4). Raises UnusableRow."""
    fields = {**texts(record, "first_name", "plan_type"), "recent_page_view": True, "candidate": "yes"}
    return {"email": address(record), "dataFields": fields}


def event_payload(record: Record) -> dict[str, Any]:
    """The body of events/track (contract 4); `event_time` is UTC. Raises UnusableRow."""
    if not isinstance(record.event_time, datetime):
        raise UnusableRow("event_time is not a date with a time: correct the column in page_views")
    at = record.event_time.replace(microsecond=0, tzinfo=timezone.utc)
    event_id = f"page-view-{text_of(record.view_id) or '?'}"
    if not re.fullmatch(r"[A-Za-z0-9-]{1,512}", event_id):
        raise UnusableRow("the view has no id, or one with a character that an event id in Iterable may not have")
    return {
        "email": address(record),
        "eventName": "page_view",
        "id": event_id,
        "createdAt": int(at.timestamp()),
        "dataFields": {
            **texts(record, "page", "browser", "location"),
            "timestamp": at.replace(tzinfo=None).isoformat(sep=" "),
            "candidate": "yes",
        },
    }


def address(record: Record) -> str:
    email = (text_of(record.email) or "").strip().lower()
    if "@" not in email:
        raise UnusableRow("no usable e-mail address: correct it in the customers table")
    return email


def texts(record: Record, *columns: str) -> dict[str, str]:
    """The columns as text, without those that are NULL: a null would delete the field in Iterable."""
    values = {column: text_of(getattr(record, column)) for column in columns}
    return {column: value for column, value in values.items() if value is not None}


def text_of(value: Any) -> str | None:
    if isinstance(value, bytes | bytearray):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise UnusableRow("a column holds bytes that are not text") from None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, set):
        return ",".join(sorted(value))
    if isinstance(value, timedelta):
        seconds = abs(value) // timedelta(seconds=1)
        sign = "-" if value < timedelta() else ""
        return f"{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    if isinstance(value, int | float | date):
        return str(value)
    raise UnusableRow(f"a column holds a {type(value).__name__}, which has no text")


@dataclass(slots=True)
class Delivery:
    """One user of this run: what is to be sent, then what became of it. A call that was not made is None."""

    number: int
    user_id: Any
    email: Any
    event_id: str | None = None
    fingerprint: str | None = None
    payloads: tuple[dict[str, Any], ...] = ()  # of users/update and events/track
    problem: str = ""
    rehearsed: bool = False
    users_update: CallResult | None = None
    events_track: CallResult | None = None

    @property
    def calls(self) -> list[CallResult]:
        return [call for call in (self.users_update, self.events_track) if call is not None]

    @property
    def status(self) -> str:
        """One of contract 7."""
        if not self.calls:
            return "total_failure" if self.problem else "would_send" if self.rehearsed else "not_attempted"
        if any(call.forgotten for call in self.calls):
            return "forgotten"
        return ("total_failure", "partial_failure", "success")[sum(call.ok for call in self.calls)]

    def as_json(self) -> str:
        """The user's line in the results file."""
        line = {"record": self.number, "user_id": self.user_id, "email": self.email, "event_id": self.event_id}
        line |= {"status": self.status}
        for name in ("users_update", "events_track"):
            call = getattr(self, name)
            line[name] = call and {key: getattr(call, key) for key in ("ok", "status", "code", "message", "attempts")}
        if self.problem:
            line["problem"] = self.problem
        if self.rehearsed and self.payloads:
            line["payloads"] = dict(zip(("users_update", "events_track"), self.payloads, strict=True))
        return to_json({**line, "fingerprint": self.fingerprint})


def prepare(number: int, record: Record, settings: Settings) -> Delivery:
    """Its fingerprint is a SHA-256 of both payloads and of the project that they go to (contract 7)."""
    delivery = Delivery(number, shown(record.user_id), shown(record.email))
    try:
        user, event = delivery.payloads = user_payload(record), event_payload(record)
    except UnusableRow as problem:
        delivery.problem = str(problem)
        return delivery
    told = json.dumps([user, event, settings.iterable_api_base_url, settings.iterable_api_key])
    delivery.email, delivery.event_id = user["email"], event["id"]
    delivery.fingerprint = hashlib.sha256(told.encode()).hexdigest()
    return delivery


def shown(value: Any) -> Any:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes | bytearray) else value


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


class ResultsFile:
    """The document of contract 7: it grows line by line as `….json.partial` and takes its name when it is whole.

    The line of a user who was told reaches the kernel at once, so that a killed process loses none, and the disk within
    about a second.
    Raises OSError when folder or disk do not take it.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], started: datetime) -> None:
        while True:
            self.path = folder / f"{RESULTS}{started:%Y%m%d_%H%M%S}.json"
            self._partial = self.path.with_suffix(".json.partial")
            if not self.path.exists() and not self._partial.exists():  # only one run at a time gets here
                break
            started += timedelta(seconds=1)
        descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
        # A reply may hold half a surrogate pair, which UTF-8 cannot: backslashreplace makes it JSON's own escape.
        self._file = open(descriptor, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._separator = ""
        self._broken: OSError | None = None
        self._synced = time.monotonic()
        try:
            self._write(f'{{\n"run": {to_json(run)},\n"results": [\n')
        except OSError:
            self._partial.unlink()
            raise

    def add(self, delivery: Delivery) -> None:
        self._write(self._separator + delivery.as_json(), at_once=bool(delivery.calls))
        self._separator = ",\n"

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._write(f'\n],\n"summary": {to_json(summary)}\n}}\n')
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)

    def _write(self, text: str, *, at_once: bool = True) -> None:
        if self._broken:
            raise self._broken
        try:
            self._file.write(text)
            if at_once:
                self._file.flush()
            if at_once and time.monotonic() - self._synced > 1:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:  # nothing is written after a gap
            self._broken = error
            with contextlib.suppress(OSError):
                self._file.close()
            raise


TEXT = r'"[^"\\]*(?:\\.[^"\\]*)*"'  # of JSON; linear, for damaged lines
RESULT_LINE = re.compile(
    rf'\{{"record": \d+, "user_id": ({TEXT}|[^",]+), "email": (?:{TEXT}|[^",]+), "event_id": [^,]+, '
    r'"status": "(\w+)", .*"fingerprint": (?:"([0-9a-f]{64})"|null)\},?\n?'.encode()
)


def read_memory(folder: Path, stop: threading.Event) -> dict[bytes, bytes]:
    """Fingerprints by user id (both as in JSON) of the users whose last calls succeeded in the last 8 days.

    Read from the results files, the oldest first, partial ones too. What cannot be read is skipped with a warning: its
    users are sent again, which is harmless.
    """
    memory: dict[bytes, bytes] = {}
    files = []
    for file in folder.glob(f"{RESULTS}*.json*"):
        with contextlib.suppress(OSError):  # gone by now
            files += [(file.stat().st_mtime, file)] if file.is_file() else []
    for changed, path in sorted(files):
        if changed >= time.time() - MEMORY.total_seconds() and not stop.is_set():
            try:
                problem = remember(path, memory)
            except OSError as error:
                problem = str(error)
            if problem:
                log.warning("%s is not used as memory, in part or whole: %s", path.name, problem)
    return memory


def remember(path: Path, memory: dict[bytes, bytes]) -> str:
    """Add what one results file says to the memory; what is wrong with the file, or nothing."""
    with path.open("rb") as lines:
        head = [lines.readline() for _ in range(3)]
        try:
            sent = json.loads(b"{" + head[1].rstrip(b",\n") + b"}")["run"]["mode"] == "send"
        except (ValueError, KeyError, TypeError, RecursionError):
            return "it is not a results file of this program"
        damaged, whole = 0, path.suffix == ".partial"
        for line in lines:
            found = RESULT_LINE.fullmatch(line)
            if line == b"],\n":
                whole = True
                break
            if not found:
                damaged += line != b"\n"
            elif sent and found[2] == b"success":
                memory[found[1]] = found[3]
            elif sent and found[3] and found[2] != b"not_attempted" and memory.get(found[1]) != found[3]:
                memory.pop(found[1], None)  # Iterable may hold something newer than what was delivered before
    return f"{damaged} damaged line(s)" if damaged else "" if whole else "its end is missing"


class Stop(threading.Event):
    """Set when no new user may start: by a signal, whose number it then holds, or because the run is given up."""

    signum: int | None = None


def listen_for_signals() -> Stop:
    """The first SIGINT or SIGTERM sets the Stop, a second one ends the process at once.

    A thread waits for them: no line of the program is interrupted, and none that blocks in C delays them.
    """
    stop = Stop()
    # Under nohup, or in the background of a script, SIGINT is ignored and stays so.
    signals = {one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads that start later inherit it

    def listen() -> None:
        stop.signum = signal.sigwait(signals)
        stop.set()
        said = f"{signal.Signals(stop.signum).name}: no new user starts, those already started are finished"
        threading.Thread(target=log.warning, args=(said,), daemon=True).start()  # a console may block it
        os._exit(128 + signal.sigwait(signals))

    threading.Thread(target=listen, daemon=True).start()
    return stop


def in_background(stop: Stop, work: Callable[[], T]) -> T:
    """Do `work` in a thread of its own, for it may block where no stop reaches it. Raises Interrupted on a signal."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again below
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not (wait([future], timeout=0.1).done or stop.signum):
        pass
    if stop.signum:
        raise Interrupted
    return future.result()


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases with the process. Raises AlreadyRunning, OSError."""
    descriptor = os.open(folder / ".integration_results.lock", os.O_RDWR | os.O_CREAT, PRIVATE)
    with open(descriptor, "r+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"Another run holds {folder}: {lock.read() or 'just begun'}") from None
        lock.truncate()
        lock.write(f"process {os.getpid()}, since {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}")
        lock.flush()
        yield


def connect(settings: Settings, stop: Stop) -> DatabaseConnection:
    return DatabaseConnection(
        host=settings.db_host,
        user=settings.db_user,
        password=settings.db_password,
        database=settings.db_name,
        port=settings.db_port,
        ssl_ca=settings.db_ssl_ca,
        stop=stop,
    )


def read_rows(settings: Settings, stop: Stop) -> deque[dict[str, Any]]:
    """The rows of Query 2, one a user, in the order of customer id. Raises DatabaseError."""
    query = read_query(QUERIES, "query_2")
    with connect(settings, stop) as database:
        log.info("[STEP 3] Executing Phase 2 Query 2...")
        rows = database.execute_query(query)
    columns = {column.name for column in dataclasses.fields(Record)}
    if rows and set(rows[0]) != columns:
        raise DatabaseError(f"Query 2 must return {', '.join(sorted(columns))}, not {', '.join(sorted(rows[0]))}")
    return deque(rows)


def send(delivery: Delivery, client: IterableClient, done: queue.SimpleQueue[Delivery | BaseException]) -> None:
    """Both calls of one user, in a thread of the pool."""
    try:
        user, event = delivery.payloads
        delivery.users_update = client.update_user(user, in_turn=True)
        if delivery.users_update and not delivery.users_update.forgotten:
            delivery.events_track = client.track_event(event)
        delivery.payloads = ()  # what waits for its turn to be reported is small
        done.put(delivery)
    except BaseException as error:  # noqa: BLE001 - raised again in the main thread
        done.put(error)


def deliver(deliveries: Iterator[Delivery], client: IterableClient, workers: int) -> Iterator[Delivery | None]:
    """Send everything, many users at once, and yield each user as it is done; None when none was for a while.

    A user is given to the pool when its turn at the rate limit has come. So the pool grows to as many threads as are
    busy at that rate, which is rate times latency, and nothing piles up behind the limit.
    """
    done: queue.SimpleQueue[Delivery | BaseException] = queue.SimpleQueue()
    in_flight = 0
    upcoming = next(deliveries, None)
    with ThreadPoolExecutor(workers) as pool:
        while upcoming or in_flight:
            pause = LONGEST_PAUSE
            while upcoming and (in_flight < workers or client.stopped):
                if upcoming.problem or client.stopped:
                    yield upcoming
                elif wait := client.take_turn():
                    pause = min(wait, pause)
                    break
                else:
                    try:
                        pool.submit(send, upcoming, client, done)
                    except RuntimeError as error:  # no further thread, but the delivery is queued for those there are
                        if not in_flight:
                            raise SettingsError("No thread can be started: raise the limit of processes") from error
                    in_flight += 1
                upcoming = next(deliveries, None)
            if upcoming or in_flight:
                try:
                    ended = done.get(timeout=pause)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(ended, BaseException):
                    raise ended
                in_flight -= 1
                yield ended


class Report:
    """Counts what became of the users, and tells console and log in the order of the records (contract 6)."""

    def __init__(self) -> None:
        self.total = 0
        self.outcome, self.why, self._exit_code = "completed", "", SUCCESS
        self.off_record = False  # the results file takes no more, so console and log have to name who was told
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[tuple[str | None, int | None, str | None, str]] = Counter()
        self.calls = self.retries = self.unusable_in_a_row = 0
        self._waiting: dict[int, Delivery | None] = {}
        self._next = 1
        self._began = time.monotonic()
        self._trail = deque([(self._began, 0)], maxlen=6)  # (when, users done) of the last progress lines

    def unchanged(self, number: int) -> None:
        self.counts["unchanged"] += 1
        self._waiting[number] = None

    def add(self, delivery: Delivery) -> None:
        self.counts[delivery.status] += 1
        for call in delivery.calls:
            self.calls += call.attempts
            self.retries += call.attempts - 1
            if not call.ok and not call.forgotten:
                self.reasons[call.endpoint, call.status, call.code, call.reason] += 1
        if delivery.problem:
            self.reasons[None, None, None, delivery.problem] += 1
        if delivery.calls:
            usable = any(call.usable for call in delivery.calls)
            self.unusable_in_a_row = 0 if usable else self.unusable_in_a_row + 1
        self._waiting[delivery.number] = delivery
        while self._next in self._waiting:
            if ready := self._waiting.pop(self._next):
                self._tell(ready)
            self._next += 1

    @property
    def failures(self) -> int:
        return self.counts["partial_failure"] + self.counts["total_failure"]

    def _tell(self, delivery: Delivery) -> None:
        status, who = delivery.status, delivery.email
        if status in ("not_attempted", "would_send"):
            return
        where = f"(record {delivery.number}/{self.total}, {who})"
        unseen = self.total > MANY and status in ("success", "forgotten")
        quietly, last = (FILE_ONLY_MORE, FILE_ONLY) if unseen else ({}, {})
        if not unseen:
            log.info("")
        log.info("Processing record %d/%d", delivery.number, self.total, extra=quietly)
        for call in delivery.calls:
            weight = logging.INFO if call.ok or call.forgotten else logging.ERROR
            log.log(weight, "%s %s", call.headline, where, extra=FILE_ONLY_MORE if call.ok else quietly)
            if call.body:
                log.log(weight, "Response: %s", call.body, extra=quietly)
        if status == "success" and self.off_record:
            log.warning("✓ Successfully processed user: %s (perhaps not in the results file)", who)
        elif status == "success":
            log.info("✓ Successfully processed user: %s", who, extra=last)
        elif status == "forgotten":
            log.info("Forgotten at the user's own request, so not told: %s", who, extra=last)
        else:
            mark = "⚠ Partially processed" if status == "partial_failure" else "✗ Failed"
            reasons = [f"{call.endpoint}: {call.reason}" for call in delivery.calls if not call.ok]
            log.error("%s user: %s: %s", mark, who, "; ".join(reasons) or delivery.problem or "the run was given up")

    def progress(self) -> None:
        """A line every 2 seconds in a long run. The speed is that of the last 10 seconds."""
        now = time.monotonic()
        if self.total <= MANY or now - self._trail[-1][0] < PROGRESS_SECONDS:
            return
        done = sum(self.counts.values())
        then, done_then = self._trail[0]
        speed = (done - done_then) / (now - then)
        left = f"{(self.total - done) / speed:.0f} s left" if speed else f"no user done for {now - then:.0f} s"
        self._trail.append((now, done))
        text = "Progress: %d/%d (%d %%), %.1f users/s, %s, failures: %d"
        log.info(text, done, self.total, 100 * done // self.total, speed, left, self.failures)

    def end(self, outcome: str, exit_code: int, why: str) -> None:
        """The run does not complete. The first reason counts."""
        if self.outcome == "completed":
            self.outcome, self._exit_code, self.why = outcome, exit_code, why

    @property
    def attempted(self) -> int:
        return sum(self.counts[status] for status in ("success", "partial_failure", "total_failure", "forgotten"))

    @property
    def exit_code(self) -> int:
        return self._exit_code or (NOT_ALL if self.failures else SUCCESS)

    def summary(self) -> dict[str, Any]:
        """The summary of contract 7. In a dry run nobody is attempted."""
        seconds = round(time.monotonic() - self._began, 3)
        counts = self.counts
        keys = ("endpoint", "status", "code", "message")
        return {
            "outcome": self.outcome,
            "exit_code": self.exit_code,
            "total_users": self.total,
            "success": counts["success"],
            "partial_failures": counts["partial_failure"],
            "total_failures": counts["total_failure"],
            "forgotten": counts["forgotten"],
            "unchanged": counts["unchanged"],
            "not_attempted": counts["not_attempted"] + counts["would_send"],
            "calls": self.calls,
            "retries": self.retries,
            "duration_seconds": seconds,
            "users_per_second": round(self.attempted / seconds, 1) if seconds else 0.0,
            "failure_reasons": [
                {**dict(zip(keys, reason, strict=True)), "count": count} for reason, count in self.reasons.most_common()
            ],
        }


def tell_summary(summary: Mapping[str, Any], results: str) -> None:
    """The summary of contract 6; a run that went wrong shows it under --quiet, too."""
    lines = [
        "",
        "INTEGRATION SUMMARY",
        f"Total users processed: {summary['total_users']}",
        f"✓ Successful (both API calls): {summary['success']}",
        f"⚠ Partial failures (one call failed): {summary['partial_failures']}",
        f"✗ Total failures (both calls failed): {summary['total_failures']}",
    ]
    for key, words in (
        ("forgotten", "Forgotten at their own request"),
        ("unchanged", "Unchanged since they were delivered, not sent again"),
        ("not_attempted", "Not attempted"),
    ):
        lines += [f"{words}: {summary[key]}"] if summary[key] else []
    reasons = summary["failure_reasons"]
    for reason in reasons[:SHOWN_REASONS]:
        what = [str(reason[key]) for key in ("endpoint", "status", "code") if reason[key] is not None]
        lines.append(f"  {reason['count']} x {' '.join(what) or 'row'}: {reason['message']}")
    if len(reasons) > SHOWN_REASONS:
        lines.append(f"  and {len(reasons) - SHOWN_REASONS} other reasons, all in the results file")
    if summary["exit_code"] in (BAD_SETTINGS, DATABASE_FAILED):
        lines = []  # there is nothing to sum up
    lines.append(f"Results: {results}")
    lines.append(f"Time: {summary['duration_seconds']:.1f} s, {summary['users_per_second']:.1f} users a second")
    for line in lines:
        log.log(logging.WARNING if summary["exit_code"] else logging.INFO, line)


def describe_run(settings: Settings, options: argparse.Namespace, started: datetime) -> dict[str, Any]:
    """The head of the results file."""
    server = settings.db_host if settings.db_host.startswith("/") else f"{settings.db_host}:{settings.db_port}"
    return {
        "started_at": started.isoformat(timespec="seconds"),
        "mode": "dry-run" if options.dry_run else "send",
        "database": f"{settings.db_name} on {server}",
        "iterable": settings.iterable_api_base_url,
        "options": {"limit": options.limit, "changed_only": options.changed_only},
    }


def redactor(settings: Settings) -> Redactor:
    """For the settings' secrets and the passwords in proxy addresses."""
    proxies = re.findall(r"//(?:[^:\s]*:)?(\S+)@", " ".join(getproxies().values()))
    return Redactor([settings.iterable_api_key, settings.db_password, *proxies, *map(unquote, proxies)])


def make_client(settings: Settings, stop: Stop) -> IterableClient:
    """Raises SettingsError when a CA file or a proxy of the environment is of no use."""
    if settings.iterable_rate_limit > ITERABLE_LIMIT:
        log.warning("ITERABLE_RATE_LIMIT is over the %d a second that Iterable allows a project", ITERABLE_LIMIT)
    try:
        return IterableClient(
            settings.iterable_api_base_url,
            settings.iterable_api_key,
            rate=settings.iterable_rate_limit,
            timeout=settings.iterable_timeout,
            workers=settings.max_workers,
            retry=RetryPolicy(settings.iterable_max_attempts),
            stop=stop,
            redact=redactor(settings),
        )
    except OSError as error:
        raise SettingsError(f"{error}") from error


def changed(
    rows: deque[dict[str, Any]], settings: Settings, options: argparse.Namespace, stop: Stop, report: Report
) -> Iterator[Delivery]:
    """A delivery for each row, with --changed-only for each that was not yet delivered as it is. Uses up the rows."""
    memory = read_memory(settings.results_dir, stop) if options.changed_only else {}
    if options.changed_only and not settings.iterable_api_key:
        log.warning("Without ITERABLE_API_KEY nobody counts as told: what was told is remembered for each key")
    for count in range(1, len(rows) + 1):
        row = rows.popleft()
        if stop.is_set():
            yield Delivery(count, shown(row["user_id"]), shown(row["email"]))
            continue
        delivery = prepare(count, Record(**row), settings)
        known = memory.get(to_json(delivery.user_id).encode())
        if known and delivery.fingerprint and known == delivery.fingerprint.encode():
            report.unchanged(count)
        else:
            delivery.rehearsed = options.dry_run
            yield delivery


def process(
    deliveries: Iterator[Delivery | None], client: IterableClient, stop: Stop, report: Report, results: ResultsFile
) -> None:
    """Record each user as it is done, and give the run up when going on is of no use."""
    for delivery in deliveries:
        report.progress()
        if delivery is None:
            continue
        try:
            results.add(delivery)
        except OSError as error:
            report.off_record = True
            advice = (
                "make room, or change RESULTS_DIR; whom console and log alone name is told once more by the next run"
            )
            report.end("aborted", NOT_ALL, f"{results.path} cannot be written, so the run stops ({error}): {advice}")
            stop.set()
        report.add(delivery)
        if refused := [call.reason for call in delivery.calls if call.key_refused]:
            report.end("aborted", GIVEN_UP, f"The run is given up: {refused[0]}")
        elif report.unusable_in_a_row >= UNUSABLE_IN_A_ROW and not stop.is_set():
            client.halt()
            why = f"{UNUSABLE_IN_A_ROW} users in a row got no usable answer"
            report.end("aborted", GIVEN_UP, f"The run is given up: {why}: {delivery.calls[-1].reason}")


def run_integration(settings: Settings, options: argparse.Namespace, stop: Stop) -> int:
    """One run, from the rows to the results file; returns the exit code (contract 3).

    Raises AlreadyRunning, and SettingsError when the results folder takes no file. Nothing is sent then.
    """
    started = datetime.now().astimezone()
    report = Report()
    with contextlib.ExitStack() as until_the_end:
        try:
            settings.results_dir.mkdir(parents=True, exist_ok=True)
            until_the_end.enter_context(only_run(settings.results_dir))
            results = ResultsFile(settings.results_dir, describe_run(settings, options, started), started)
        except OSError as error:
            raise SettingsError(f"RESULTS_DIR cannot be written: {error}") from error
        try:
            log.info("[STEP 2] Connecting to database...")
            rows = in_background(stop, lambda: read_rows(settings, stop))
            log.info("Found %d pro user(s) with recent engagement", len(rows))
            while options.limit is not None and len(rows) > options.limit:
                rows.pop()
            report.total = len(rows)
            gc.freeze()  # the rows are no garbage; to look through them again and again would stop every thread
            log.info("[STEP 4] Initializing Iterable API client...")
            with make_client(settings, stop) as client:
                log.info("[STEP 5] Processing user records...")
                users = changed(rows, settings, options, stop, report)
                done = rehearse(users, settings) if options.dry_run else deliver(users, client, settings.max_workers)
                process(done, client, stop, report, results)
        except DatabaseError as error:
            report.end("aborted", DATABASE_FAILED, str(error))
        except SettingsError as error:
            report.end("aborted", BAD_SETTINGS, str(error))
        except Interrupted:
            pass  # as at any other time, said below
        if stop.signum:
            report.end("interrupted", 128 + stop.signum, f"Stopped by {signal.Signals(stop.signum).name}")
        return conclude(report, results)


def conclude(report: Report, results: ResultsFile) -> int:
    try:
        results.finish(report.summary())
        place = str(results.path)
    except OSError as error:
        report.end("aborted", NOT_ALL, f"{results.path} cannot be written: {error}")
        place = f"{results.path}.partial, without its end"
    if report.why:
        log.info("")
        log.error("%s", report.why)
    tell_summary(report.summary(), place)
    return report.exit_code


def rehearse(deliveries: Iterator[Delivery], settings: Settings) -> Iterator[Delivery]:
    """A dry run's `deliver`: shows the first three users' payloads and what a run would cost. Nothing is sent."""
    count = 0
    for delivery in deliveries:
        if delivery.payloads:
            count += 1
            if count <= 3:
                for endpoint, payload in zip(("users/update", "events/track"), delivery.payloads, strict=True):
                    log.info("%s %s", endpoint, to_json(payload))
        yield delivery
    seconds = count / settings.iterable_rate_limit
    log.info(
        "Dry run, nothing was sent. A run would send %d users: %d calls, %.1f s or more", count, 2 * count, seconds
    )


def check(settings: Settings, log_problem: OSError | None, stop: Stop) -> int:
    """The deployment checklist: a line an item, and the exit code of the first that fails. Sends no user data."""

    def log_file() -> None:
        if log_problem:
            raise log_problem

    def results_folder() -> None:
        settings.results_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.results_dir).close()

    with contextlib.ExitStack() as until_the_end:
        open_once = until_the_end.enter_context
        database = functools.cache(lambda: open_once(connect(settings, stop)))
        reply = functools.cache(lambda: open_once(make_client(settings, stop)).update_user({}))

        def tables() -> None:
            query = read_query(QUERIES, "query_2")  # no EXPLAIN: an account that may read views only must not use it
            database().execute_query(f"SELECT * FROM ({query}) AS query_2 WHERE FALSE")  # noqa: S608 - our own file

        def answer(fits: Callable[[CallResult], bool]) -> None:
            result = reply()
            if result is None or not fits(result):
                unexpected = "Iterable answered a request without a user as if it had one"
                raise IterableFailed(result.reason or unexpected if result else "stopped")

        return check_each(
            ("Settings are complete", lambda: None),
            ("Log file can be written", log_file),
            ("Results folder can be written", results_folder),
            ("Database can be reached and is new enough", lambda: f": {database().server}"),
            ("Tables and columns of the query are there", tables),
            (f"Iterable can be reached at {settings.iterable_api_base_url}", lambda: answer(lambda got: got.usable)),
            ("API key is accepted", lambda: answer(lambda got: got.usable and got.status == 400)),
        )


def check_each(*items: tuple[str, Callable[[], str | None]]) -> int:
    codes = []
    for what, test in items:
        try:
            log.info("✓ %s%s", what, test() or "")
        except (SettingsError, OSError, DatabaseError, IterableFailed) as error:
            codes.append({DatabaseError: DATABASE_FAILED, IterableFailed: GIVEN_UP}.get(type(error), BAD_SETTINGS))
            log.error("✗ %s: %s", what, error)
    return codes[0] if codes else SUCCESS


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def at_least_one(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
            raise argparse.ArgumentTypeError("must be a whole number from 1")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="everything except the sending; needs no API key")
    add("--limit", type=at_least_one, metavar="N", help="the first N users only (a careful first real run)")
    add("--changed-only", action="store_true", help="leave out users who were already told the same in the last 8 days")
    add("--check", action="store_true", help="check the deployment and send no user data")
    add("--quiet", action="store_true", help="show warnings and errors only")
    add("--env-file", default=".env", metavar="PATH", help="read the settings from another file than .env")
    options = parser.parse_args(argv)
    if options.check and (options.dry_run or options.limit or options.changed_only):
        parser.error("--check goes with --quiet and --env-file only")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The program: arguments and environment become settings, errors become exit codes (contract 3)."""
    options = parse_arguments(argv)
    stop = listen_for_signals()
    try:
        settings = load_environment_variables(HERE / options.env_file, needs_key=not options.dry_run)
    except SettingsError as error:
        setup_logger(log_file=error.log_file, quiet=options.quiet)
        log.error("%s%s", "✗ " if options.check else "", error)
        return BAD_SETTINGS
    log_problem = setup_logger(settings.log_level, settings.log_file, quiet=options.quiet, redact=redactor(settings))
    try:
        if options.check:
            return in_background(stop, lambda: check(settings, log_problem, stop))
        log.info("Starting Iterable Integration - Phase 3")
        log.info("[STEP 1] Loading environment variables...")
        if log_problem:
            raise SettingsError(f"LOG_FILE cannot be written: {log_problem}")
        return run_integration(settings, options, stop)
    except (AlreadyRunning, SettingsError) as error:
        log.error("%s", error)
        return LOCKED if isinstance(error, AlreadyRunning) else BAD_SETTINGS
    except Interrupted:
        return 128 + (stop.signum or 0)


if __name__ == "__main__":
    sys.exit(main())
