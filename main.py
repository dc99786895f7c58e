"""Tell Iterable about every pro customer who looked at the pricing or settings page in the last 7 days.

One run: settings, the rows of Query 2, both calls for each user, a results file and a log. README.md has the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import mmap
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
from _thread import start_new_thread
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote
from urllib.request import getproxies

try:
    import dotenv.parser

    import iterable_client as iterable
    import logger_config as trace
    from db_connection import DatabaseConnection, DatabaseError, Record, read_query
    from iterable_client import CallResult, IterableClient, Payload
    from logger_config import FILE_ONLY, AlreadyRunning, ResultsFile, lock_folder, read_memory, redactor, setup_logger
except ModuleNotFoundError as missing:
    advice = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt, then .venv/bin/python main.py"
    sys.stderr.write(f"The package {missing.name} is not installed for {sys.executable}: {advice}\n")
    sys.exit(2)

HERE = Path(__file__).resolve().parent
QUERIES = HERE / "phase2_queries.sql"
SUCCESS, NOT_ALL, BAD_SETTINGS, DATABASE_FAILED, GIVEN_UP, LOCKED = 0, 1, 2, 3, 4, 75  # exit codes (contract 3)
UNUSABLE_IN_A_ROW = 20  # users without a usable answer, after which the run is given up
ROOM = 64_000_000  # bytes of memory that must be free for a thread to start
MOST_IN_FLIGHT = 20_000  # users: more would only wait for their turn, and take room
MANY, LARGE = 100, 5000  # users, above which the console shows progress, and above which --bulk is recommended
SHOWN_FAILURES, SHOWN_REASONS, SHOWN_PAYLOADS = 20, 10, 3

log = logging.getLogger(__name__)


# Settings


class SettingsError(Exception):
    """Settings are missing, empty, malformed or of no use. The text names them all, and no secret's value."""


@dataclass(frozen=True)
class Settings:
    """Contract 2: each field is the variable of that name. Paths are absolute, times in seconds."""

    db_host: str
    db_user: str
    db_password: str = field(repr=False)
    db_name: str
    db_port: int
    db_ssl_ca: str
    iterable_api_key: str = field(repr=False)
    iterable_api_base_url: str
    iterable_rate_limit: int
    iterable_max_attempts: int
    iterable_timeout: float
    max_workers: int
    log_level: str
    log_file: Path
    results_dir: Path


def load_environment_variables(
    env_file: Path = HERE / ".env", environ: Mapping[str, str] = os.environ, *, needs_key: bool = True
) -> Settings:
    """The settings of `environ`, else of the `.env` file (contract 2). Raises SettingsError, all complaints at once."""
    complaints: list[str] = []
    values = {**read_env_file(env_file, complaints), **environ}
    secrets = [read_secret("DB_PASSWORD", values, complaints)]
    secrets += [read_secret("ITERABLE_API_KEY", values, complaints if needs_key else [])]

    def get(name: str, default: str | None = None, parse: Callable[[str], Any] = plain, *, blank: bool = False) -> Any:
        text = values.get(name) if blank else values.get(name, "").strip() or default
        try:
            if text is None:
                raise ValueError("is empty" if name in values else "is missing")
            return parse(text)
        except ValueError as complaint:
            complaints.append(f"{name} {complaint}")

    settings = Settings(
        db_host=get("DB_HOST"),
        db_user=get("DB_USER"),
        db_password=get("DB_PASSWORD", blank=True),
        db_name=get("DB_NAME"),
        db_port=get("DB_PORT", "3306", number(1, 65535)),
        db_ssl_ca=get("DB_SSL_CA", "", readable_file),
        iterable_api_key=get("ITERABLE_API_KEY", None if needs_key else "", api_key),
        iterable_api_base_url=get("ITERABLE_API_BASE_URL", "https://api.iterable.com", base_url),
        iterable_rate_limit=get("ITERABLE_RATE_LIMIT", "450", number(1, 100_000)),
        iterable_max_attempts=get("ITERABLE_MAX_ATTEMPTS", "5", number(1, 100)),
        iterable_timeout=get("ITERABLE_TIMEOUT", "30", number(0.1, 3600, float)),
        max_workers=get("MAX_WORKERS", "300", number(1, 2000)),
        log_level=get("LOG_LEVEL", "INFO", level),
        log_file=get("LOG_FILE", "iterable_integration.log", path),
        results_dir=get("RESULTS_DIR", ".", path),
    )
    if complaints:
        advice = f"Set them in {env_file} (cp .env.example .env, then fill it in) or in the environment"
        said = redactor(*secrets)(f"Settings: {'; '.join(complaints)}")
        raise SettingsError(f"{said}. {advice}. To see a run without any: bash tests/demo.sh")
    return settings


def read_env_file(env_file: Path, complaints: list[str]) -> dict[str, str]:
    try:
        text = env_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if not (isinstance(error, FileNotFoundError) and env_file == HERE / ".env"):
            complaints.append(f"{env_file} cannot be read ({getattr(error, 'strerror', None) or error})")
        return {}
    lines = list(dotenv.parser.parse_stream(io.StringIO(text)))  # nothing is interpolated: a password may hold ${...}
    complaints += [f"{env_file} has a line that cannot be understood"] if any(line.error for line in lines) else []
    return {line.key: line.value or "" for line in lines if line.key}


def read_secret(name: str, values: dict[str, str], complaints: list[str]) -> str:
    """A secret of `values`, where that of the file that `<name>_FILE` names is put, without a line break at its end."""
    if file := values.get(f"{name}_FILE", "").strip():
        if values.get(name):
            complaints.append(f"{name} and {name}_FILE are both set: keep one of them")
        try:
            values[name] = values.get(name) or re.sub(r"\r?\n\Z", "", path(file).read_bytes().decode())
        except (OSError, ValueError) as error:
            complaints.append(f"{name}_FILE cannot be read ({getattr(error, 'strerror', None) or 'it is not text'})")
            values[name] = "unknown"
    return values.get(name, "")


def matching(pattern: str, complaint: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(complaint)
        return text

    return parse


plain = matching(r"[^\0\ud800-\udfff]*", "has bytes that are not text")
api_key = matching("[!-~]*", "has a character that no key has: copy it again")
level = matching("DEBUG|INFO|WARNING|ERROR", "must be DEBUG, INFO, WARNING or ERROR")


def path(text: str) -> Path:
    return HERE / plain(text)


def readable_file(text: str) -> str:
    if text and not (path(text).is_file() and os.access(path(text), os.R_OK)):
        raise ValueError(f"must be a file that can be read, unlike {path(text)}")
    return text and str(path(text))


def number(low: float, high: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        plausible = re.fullmatch(r"\d{1,9}" if kind is int else r"\d{1,9}(\.\d{1,9})?", text, re.ASCII)
        if not plausible or not low <= kind(text) <= high:
            raise ValueError(f"must be a {'whole ' * (kind is int)}number from {low} to {high}, not '{text}'")
        return kind(text)

    return parse


def base_url(text: str) -> str:
    text = text.lower().rstrip("/").removesuffix("/api").rstrip("/")
    parts = re.fullmatch(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", text)
    if not parts or int((parts[3] or ":443")[1:]) > 65535:
        raise ValueError("must be a host's address such as https://api.iterable.com, without path, query or user")
    if parts[1] == "http" and not re.fullmatch(r"localhost|127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}|\[::1\]", parts[2]):
        raise ValueError("must begin with https://, or the API key would travel in the clear")
    return text


# A user's delivery


class Reason(NamedTuple):
    """Why a user failed. `endpoint` is None for a row that cannot be sent, `status` for a call that got no answer."""

    endpoint: str | None
    status: int | None
    code: str | None
    message: str

    @property
    def short(self) -> str:
        """Which call, status and code; the advice stands in the summary."""
        if not self.endpoint:
            return self.message.split(":")[0]
        return " ".join(map(str, filter(None, (self.endpoint, self.status or "no answer", self.code))))


NOTHING = Payload("", "")


@dataclass(slots=True)
class Delivery:
    """One user of this run: what is to be sent, then what became of it. A call that was not made is None."""

    record: int
    user_id: int | str | None
    email: str | None
    event_id: str | None = None
    fingerprint: str | None = None
    user: Payload = NOTHING
    event: Payload = NOTHING
    problem: str = ""  # why the row cannot be sent
    without_calls: str = "not_attempted"  # the status while no call was made: also would_send and unchanged
    users_update: CallResult | None = None
    events_track: CallResult | None = None
    known: bool = False  # whether it failed before, with the same payloads and for the same reason

    @property
    def calls(self) -> list[CallResult]:
        return [call for call in (self.users_update, self.events_track) if call is not None]

    @property
    def status(self) -> str:
        """One of contract 7, or `unchanged`."""
        if not self.calls:
            return "total_failure" if self.problem else self.without_calls
        if any(call.forgotten for call in self.calls):
            return "forgotten"
        return ("total_failure", "partial_failure", "success")[sum(call.ok for call in self.calls)]

    @property
    def to_send(self) -> bool:
        return bool(self.user.json) and not self.problem and self.without_calls == "not_attempted"

    @property
    def reasons(self) -> list[Reason]:
        """Why the user failed, one for each call that did."""
        if self.problem:
            return [Reason(None, None, None, self.problem)]
        reasons = [Reason(call.endpoint, call.status, call.code, call.reason) for call in self.calls if not call.ok]
        return reasons or [Reason("events/track", None, None, "the run ended before the event was sent")]

    def as_line(self) -> dict[str, Any]:
        """The user's line in the results file (contract 7)."""
        line: dict[str, Any] = {
            name: getattr(self, name) for name in ("record", "user_id", "email", "event_id", "status")
        }
        for name, call in (("users_update", self.users_update), ("events_track", self.events_track)):
            line[name] = call and call.as_json
        line |= {"problem": self.problem} if self.problem else {}
        return {**line, "fingerprint": self.fingerprint}


def prepare(number: int, record: Record, settings: Settings, seen: dict[str, Any]) -> Delivery:
    """The delivery of a row. Two customers of one address, or two rows of one view, would race each other.

    The fingerprint is a SHA-256 of both payloads and of the project that they go to (contract 7).
    """
    delivery = Delivery(number, printable(record.user_id), printable(record.email))
    try:
        user, event = iterable.user_payload(record), iterable.event_payload(record)
    except iterable.UnusableRow as problem:
        delivery.problem = str(problem)
        return delivery
    email, event_id = delivery.email, delivery.event_id = user["email"], event["id"]
    delivery.user, delivery.event = Payload(email, iterable.to_json(user)), Payload(email, iterable.to_json(event))
    project = f"{settings.iterable_api_base_url} {settings.iterable_api_key}"
    told = f"{delivery.user.json} {delivery.event.json} {project}"
    delivery.fingerprint = hashlib.sha256(told.encode()).hexdigest()
    if email in seen:
        delivery.problem = f"customer {seen[email]} has the same address: merge the two"
    elif event_id in seen:
        delivery.problem = f"customer {seen[event_id]} has the same page view: make page_views.id unique"
    else:
        seen[email] = seen[event_id] = delivery.user_id
    return delivery


def printable(value: Any) -> Any:
    """A value of a row as JSON can have it."""
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "backslashreplace")
    return value if value is None or isinstance(value, int | str) else str(value)


# Sending


class Stop(threading.Event):
    """Set when no new user may start. The first reason for it is how the run ends, in the words of contract 7."""

    outcome, exit_code, why = "completed", SUCCESS, ""
    sending = False  # before, a signal simply ends the process

    def ask(self, outcome: str, exit_code: int, why: str) -> None:
        if not self.why:
            self.outcome, self.exit_code, self.why = outcome, exit_code, why
        self.set()


def listen_for_signals() -> Stop:
    """The first SIGINT, SIGTERM or SIGHUP asks for a stop, a second one ends the process at once.

    A thread waits for them: no line of the program is interrupted, and none that blocks in C delays them. For the
    second it needs no further thread, and no console that takes its words.
    """
    stop = Stop()
    every = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    signals = {one for one in every if signal.getsignal(one) != signal.SIG_IGN}  # nohup's and a script's stay ignored
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads that start later inherit it
    if signal.SIGINT in signals:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # and not Python's, which waits for the main thread

    def listen() -> None:
        first = signal.Signals(signal.sigwait(signals))
        if not stop.sending:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # a second one ends what a console may block
            log.warning("Stopped by %s before the first user: nothing was sent", first.name, extra=FILE_ONLY)
            os._exit(128 + first)
        stop.ask("interrupted", 128 + first, f"Stopped by {first.name}")
        os._exit(128 + signal.sigwait(signals))

    try:
        threading.Thread(target=listen, daemon=True).start()
    except RuntimeError as error:
        raise MemoryError("no thread can be started: raise ulimit -u or -v") from error
    return stop


class Crew:
    """Threads that do `work` on groups of deliveries: `most` of them, or as many as there can be.

    Not threading.Thread: its start() waits for ever for a thread that dies at birth for want of memory. Raises
    RuntimeError when none comes alive.
    """

    def __init__(self, work: Callable[[list[Delivery]], None], most: int) -> None:
        self._work = work
        self._todo, self._done = queue.SimpleQueue[list[Delivery]](), queue.SimpleQueue[Any]()
        self._threads = self.groups = self.users = 0  # the latter two in flight
        with contextlib.suppress(RuntimeError, OSError, queue.Empty):
            while self._threads < most:
                mmap.mmap(-1, ROOM).close()  # where nothing is left for the calls, libraries crash
                start_new_thread(self._run, ())
                self._done.get(timeout=10)  # it is alive
                self._threads += 1
        if not self._threads:
            raise RuntimeError("no thread can be started: raise ulimit -u or -v")
        if self._threads < most:
            log.warning("Only %d thread(s) can be started: lower MAX_WORKERS, or raise ulimit -u or -v", self._threads)

    @property
    def has_room(self) -> bool:
        return self.groups < self._threads and self.users < MOST_IN_FLIGHT

    def give(self, group: list[Delivery]) -> None:
        self._todo.put(group)
        self.groups += 1
        self.users += len(group)

    def take(self, timeout: float) -> list[Delivery]:
        """A group that is done, or nothing after `timeout` seconds. Raises what the work raised."""
        try:
            group, error = self._done.get(timeout=timeout)
        except queue.Empty:
            return []
        self.groups -= bool(group)  # a thread that came alive late has none
        self.users -= len(group)
        if error:
            raise error
        return list(group)

    def _run(self) -> None:
        self._done.put(([], None))
        while True:
            self._done.put(self._do(self._todo.get()))  # no name here, which would keep a group that is done

    def _do(self, group: list[Delivery]) -> tuple[list[Delivery], BaseException | None]:
        try:
            self._work(group)
        except BaseException as error:  # noqa: BLE001 - raised again by take()
            return group, error
        return group, None


def send(group: Sequence[Delivery], client: IterableClient) -> None:
    """Both calls of a group, as far as they are still to be made. Runs in a thread of the crew."""
    update = [each for each in group if each.users_update is None]
    make(update, "users_update", lambda: client.update_users([each.user for each in update]))
    track = [each for each in group if each.users_update and not each.users_update.forgotten]
    make(track, "events_track", lambda: client.track_events([each.event for each in track]))


def make(group: Sequence[Delivery], name: str, call: Callable[[], iterable.Verdicts]) -> None:
    """Make a call. Should it raise, it is on record as one without an answer, for the users may have been told."""
    broken = CallResult(name.replace("_", "/"), False, reason="an unexpected error: see the log file")
    results: iterable.Verdicts = [broken] * len(group)
    try:
        results = call()
    finally:
        for delivery, result in zip(group, results, strict=True):
            setattr(delivery, name, result)


def in_groups(deliveries: Iterable[Delivery], most: int) -> Iterator[list[Delivery]]:
    """Groups of at most `most` users and 1 MB of payloads. Who is not to be sent makes a group alone."""
    group: list[Delivery] = []
    size = 0
    for delivery in deliveries:
        if not delivery.to_send:
            yield [delivery]
            continue
        length = len(delivery.user.json) + len(delivery.event.json) + 2
        if group and (len(group) == most or size + length > iterable.MOST_BYTES):
            yield group
            group, size = [], 0
        group.append(delivery)
        size += length
    if group:
        yield group


def deliver(groups: Iterator[list[Delivery]], crew: Crew, stop: Stop) -> Iterator[Delivery | None]:
    """Send the groups, and yield each user when it is done; None when none was for a while.

    Who has no verdict after a bulk call comes back as a group of one. Who has the update gets the event after a stop.
    """
    singly: deque[list[Delivery]] = deque()
    upcoming = next(groups, None)
    while singly or upcoming or crew.groups:
        pause = 0.1  # seconds after which a stop is seen
        if (singly or upcoming) and crew.has_room:
            pause = 0.0
            group = singly.popleft() if singly else upcoming or []
            upcoming = next(groups, None) if group is upcoming else upcoming
            if group[0].to_send and (group[0].users_update or not stop.is_set()):
                crew.give(group)
            else:
                yield from group
        if crew.groups:
            done = crew.take(pause)
            for delivery in done:
                if delivery.events_track or len(done) == 1:
                    yield delivery
                else:
                    singly.append([delivery])
            if not done:
                yield None


def deliver_all(
    records: deque[Record], client: IterableClient, settings: Settings, options: argparse.Namespace, report: Report
) -> None:
    """Send all that is to be sent, record each user when it is done, and give up when going on is of no use.

    Whatever goes wrong on the way, who was told is on record in the end, and the rest is not attempted.
    """
    stop, crew = report.stop, None
    groups = in_groups(prepared(records, settings, options, report), iterable.MOST_ITEMS if options.bulk else 1)
    try:
        crew = Crew(functools.partial(send, client=client), min(settings.max_workers, max(report.total, 1)))
        for delivery in deliver(groups, crew, stop):
            report.progress()
            if delivery:
                report.record(delivery)
            if report.unusable_in_a_row >= UNUSABLE_IN_A_ROW and not stop.is_set():
                client.halt()
                stop.ask("aborted", GIVEN_UP, f"{UNUSABLE_IN_A_ROW} users in a row got no usable answer")
            if client.refused:
                stop.ask("aborted", GIVEN_UP, client.refused.reason)
    except Exception as error:  # out of memory or of threads, or what nobody thought of
        log.critical("Unexpected error", exc_info=True, extra=FILE_ONLY)
        why = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        stop.ask("aborted", NOT_ALL, f"{why}; the log file has the details")
        while crew and crew.groups:
            with contextlib.suppress(Exception):
                crew.take(0.1)
        for delivery in itertools.chain([*report.open.values()], prepared(records, settings, options, report)):
            report.record(delivery)


def prepared(
    records: deque[Record], settings: Settings, options: argparse.Namespace, report: Report
) -> Iterator[Delivery]:
    """A delivery for each record. Uses up the records; what is left at a stop is not prepared."""
    seen: dict[str, Any] = {}
    while records:
        number = report.total - len(records) + 1
        if report.stop.is_set():
            delivery = Delivery(number, printable(records[0].user_id), printable(records[0].email))
        else:
            delivery = prepare(number, records[0], settings, seen)
            if delivery.fingerprint and report.memory.get(delivery.user_id) == delivery.fingerprint:
                delivery.without_calls = "unchanged"
            elif options.dry_run:
                delivery.without_calls = "would_send"
        report.open[number] = delivery
        records.popleft()
        yield delivery


# Reporting

TOLD = {
    "success": (logging.INFO, "✓ Successfully processed user"),
    "forgotten": (logging.INFO, "Forgotten at the user's own request, so not told"),
    "partial_failure": (logging.ERROR, "⚠ Partially processed user"),
    "total_failure": (logging.ERROR, "✗ Failed user"),
}
COUNTED = {
    "success": "✓ Successful (both API calls)",
    "partial_failure": "⚠ Partial failures (one call failed)",
    "total_failure": "✗ Total failures (both calls failed)",
}
COUNTED_IN_DRY_RUN = {"would_send": "Would send", "total_failure": "Cannot be sent"}
COUNTED_IF_ANY = {
    "forgotten": "Forgotten at their own request",
    "unchanged": "Unchanged since they were delivered, not sent again",
    "not_attempted": "Not attempted",
}


class Report:
    """What becomes of the users: counted, on record, and told in the order of the records (contract 6 and 7)."""

    def __init__(
        self, total: int, options: argparse.Namespace, memory: Mapping[Any, str], results: ResultsFile, stop: Stop
    ) -> None:
        self.total, self.options, self.memory, self.results, self.stop = total, options, memory, results, stop
        self.open: dict[int, Delivery] = {}  # not yet on record
        self.counts: Counter[str] = Counter()  # by status
        self.unusable_in_a_row = self._told = self._told_failures = 0
        self._reasons, self._known_reasons = Counter[Reason](), Counter[Reason]()  # each with the number of users
        self._untold: dict[int, Delivery] = {}
        self._began = time.monotonic()
        self._trail = deque([(self._began, 0)], maxlen=6)  # (when, users done) of the last progress lines

    @property
    def failures(self) -> int:
        return self.counts["partial_failure"] + self.counts["total_failure"]

    def record(self, delivery: Delivery) -> None:
        """Put a user on record who is done, and tell whose turn it is."""
        line, status = delivery.as_line(), delivery.status
        text = trace.to_json(line)
        if status == "would_send":
            payloads = f'{{"users_update": {delivery.user.json}, "events_track": {delivery.event.json}}}'
            text = f'{text[:-1]}, "payloads": {payloads}}}'
        delivery.known = status.endswith("failure") and self.memory.get(delivery.user_id) == trace.verdict(line)
        try:
            if status != "unchanged":
                self.results.add(text, at_once=bool(delivery.calls))
        except OSError as error:
            advice = "make room, or change RESULTS_DIR; whom the log alone names is told once more by the next run"
            self.stop.ask("aborted", NOT_ALL, f"{self.results.path} cannot be written ({error}): {advice}")
        del self.open[delivery.record]
        self.counts[status] += 1
        if delivery.calls:
            self.unusable_in_a_row = 0 if any(call.usable for call in delivery.calls) else self.unusable_in_a_row + 1
        if status.endswith("failure"):
            once = {reason.message: reason for reason in reversed(delivery.reasons)}  # both calls may fail for it
            self._reasons.update(once.values())
            self._known_reasons.update(once.values() if delivery.known else ())
        self._untold[delivery.record] = delivery
        while ready := self._untold.pop(self._told + 1, None):
            self._told += 1
            self._tell(ready)

    def _tell(self, delivery: Delivery) -> None:
        """Above 100 users the console has progress and the first failures, and the log one line a success."""
        many, status = self.total > MANY, delivery.status
        if status == "would_send" and self.counts[status] <= SHOWN_PAYLOADS:
            log.info("users/update %s", trace.to_json(json.loads(delivery.user.json)))
            log.info("events/track %s", trace.to_json(json.loads(delivery.event.json)))
        if status not in TOLD:
            return
        level, words = TOLD[status]
        who = str(delivery.email or "").strip()[:320] or f"customer {delivery.user_id}"
        place = f"record {delivery.record}/{self.total}"
        known = delivery.known and self.options.quiet
        self._told_failures += level == logging.ERROR and not known
        hidden = known or (many and (level == logging.INFO or self._told_failures > SHOWN_FAILURES))
        extra = FILE_ONLY if hidden else {}
        if not many:
            log.info("", extra=extra)
            log.info("Processing record %d/%d", delivery.record, self.total, extra=extra)
        for call in delivery.calls:
            weight = logging.DEBUG if call.ok and many else logging.INFO if call.ok else level
            log.log(weight, "%s (%s, %s)", call.headline, place, who, extra=FILE_ONLY)
            if not call.ok:
                log.log(weight, "Response: %s", call.body or call.message, extra=FILE_ONLY)
        why = f": {', '.join(reason.short for reason in delivery.reasons)}" if level == logging.ERROR else ""
        log.log(level, "%s: %s%s%s", words, who, f" ({place})" if many else "", why, extra=extra)

    def progress(self) -> None:
        """A line every 2 seconds in a long run. The speed is that of the last 10 seconds."""
        now = time.monotonic()
        if self.total > MANY and now - self._trail[-1][0] >= 2 and not self.stop.is_set():
            done, (then, done_then) = self.counts.total(), self._trail[0]
            speed = (done - done_then) / (now - then)
            left = f"{(self.total - done) / speed:.0f} s left" if speed else f"no user done for {now - then:.0f} s"
            self._trail.append((now, done))
            text = "Progress: %d/%d (%d %%), %.1f users/s, %s, failures: %d"
            log.info(text, done, self.total, 100 * done // self.total, speed, left, self.failures)

    def summary(self, client: IterableClient) -> dict[str, Any]:
        """The summary of contract 7. In a dry run nobody is attempted."""
        counts, seconds = self.counts, round(time.monotonic() - self._began, 3)
        done = counts["success"] + self.failures + counts["forgotten"]
        return {
            "outcome": self.stop.outcome,
            "exit_code": self.stop.exit_code or (NOT_ALL if self.failures else SUCCESS),
            "total_users": self.total,
            "success": counts["success"],
            "partial_failures": counts["partial_failure"],
            "total_failures": counts["total_failure"],
            "forgotten": counts["forgotten"],
            "unchanged": counts["unchanged"],
            "not_attempted": counts["not_attempted"] + counts["would_send"],
            "calls": client.calls,
            "retries": client.retries,
            "duration_seconds": seconds,
            "users_per_second": round(done / seconds, 1) if seconds else 0.0,
            "failure_reasons": [{**reason._asdict(), "count": count} for reason, count in self._reasons.most_common()],
        }

    def tell_summary(self, summary: Mapping[str, Any]) -> None:
        """The summary of contract 6; under --quiet only when something is wrong that no earlier run has told."""
        news = self._reasons - self._known_reasons if self.options.quiet else self._reasons
        lines = ["", "INTEGRATION SUMMARY", f"Total users processed: {self.total}"]
        counted = COUNTED_IN_DRY_RUN if self.options.dry_run else COUNTED
        lines += [f"{words}: {self.counts[status]}" for status, words in counted.items()]
        lines += [f"{words}: {self.counts[status]}" for status, words in COUNTED_IF_ANY.items() if self.counts[status]]
        for reason, count in news.most_common(SHOWN_REASONS):
            words = [reason.short] * bool(reason.endpoint) + [reason.message] * (reason.message not in self.stop.why)
            lines.append(f"  {count} user{'s' * (count > 1)}: {': '.join(words)}")
        if len(news) > SHOWN_REASONS:
            lines.append(f"  and {len(news) - SHOWN_REASONS} other reasons, all in the results file")
        lines.append(f"Results: {self.results.place}")
        lines.append(f"Time: {summary['duration_seconds']:.1f} s, {summary['users_per_second']:.1f} users a second")
        if why := self.stop.why:
            log.info("")
            log.error("The run ended early: %s", why)
        for line in lines:
            log.log(logging.WARNING if why or news else logging.INFO, line)
        for reason, count in (self._reasons - news).items():
            log.info("As an earlier run has told, %d of %s: %s", count, reason.short, reason.message, extra=FILE_ONLY)


# The run


def run_integration(settings: Settings, options: argparse.Namespace, stop: Stop) -> int:
    """One run, from the rows to the results file; returns the exit code (contract 3).

    Raises AlreadyRunning, DatabaseError, and OSError for a setting that is of no use. Nothing was sent then.
    """
    started = datetime.now().astimezone()
    with lock_folder(settings.results_dir):
        records = read_records(settings, options)
        log.info("[STEP 4] Initializing Iterable API client...")
        client = iterable_client(settings, stop)
        log.info("[STEP 5] Processing user records...")
        memory = read_memory(settings.results_dir) if options.changed_only else {}
        if len(records) > LARGE and not (options.bulk or memory):
            singly, in_bulk = (cost(len(records), settings, bulk=bulk)[1] for bulk in (False, True))
            log.info("%d users take %.0f s or more; with --bulk %.0f s or more", len(records), singly, in_bulk)
        stop.sending = True
        results = ResultsFile(settings.results_dir, describe_run(settings, options), started)
        report = Report(len(records), options, memory, results, stop)
        deliver_all(records, client, settings, options, report)
        summary = report.summary(client)
        try:
            results.finish(summary)
        except OSError as error:
            stop.ask("aborted", NOT_ALL, f"{results.path} cannot be written: {error}")
            summary = report.summary(client)
        report.tell_summary(summary)
    if options.dry_run:
        calls, seconds = cost(report.counts["would_send"], settings, bulk=options.bulk)
        log.info("Dry run, nothing was sent. A run would make %d calls, in %.1f s or more", calls, seconds)
    return int(summary["exit_code"])


def read_records(settings: Settings, options: argparse.Namespace) -> deque[Record]:
    """The rows of Query 2, one a user, in the order of customer id. Raises DatabaseError, also for too few."""
    query = read_query(QUERIES, "query_2")
    log.info("[STEP 2] Connecting to database...")
    with database_connection(settings) as database:
        log.info("[STEP 3] Executing Phase 2 Query 2...")
        records = deque(database.read_records(query))
    log.info("Found %d pro user(s) with recent engagement", len(records))
    if len(records) < (options.at_least or 0):
        raise DatabaseError(
            f"Nothing is sent: {len(records)} users found, fewer than the {options.at_least} of --at-least"
        )
    while options.limit is not None and len(records) > options.limit:
        records.pop()
    gc.freeze()  # the rows are no garbage; to look through them again and again would stop every thread
    return records


def database_connection(settings: Settings) -> DatabaseConnection:
    s = settings
    return DatabaseConnection(s.db_host, s.db_port, s.db_user, s.db_password, s.db_name, s.db_ssl_ca)


def iterable_client(settings: Settings, stop: Stop) -> IterableClient:
    s, retry = settings, iterable.RetryPolicy(settings.iterable_max_attempts)
    rate, timeout, workers = s.iterable_rate_limit, s.iterable_timeout, s.max_workers
    client = IterableClient(s.iterable_api_base_url, s.iterable_api_key, rate, timeout, workers, retry, stop)
    client.redact = redactor(s.iterable_api_key, s.db_password)
    return client


def describe_run(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """The head of the results file, as far as it is known before."""
    server = settings.db_host if settings.db_host.startswith("/") else f"{settings.db_host}:{settings.db_port}"
    return {
        "mode": "dry-run" if options.dry_run else "send",
        "database": f"{settings.db_name} on {server}",
        "iterable": settings.iterable_api_base_url,
        "options": {name: getattr(options, name) for name in ("limit", "at_least", "changed_only", "bulk")},
    }


def cost(users: int, settings: Settings, *, bulk: bool) -> tuple[int, float]:
    """How many calls so many users take, and how many seconds at the rate limit."""
    groups = math.ceil(users / iterable.MOST_ITEMS) if bulk else users
    endpoint = iterable.USERS_BULK_UPDATE if bulk else iterable.USERS_UPDATE
    return 2 * groups, groups / endpoint.rate(settings.iterable_rate_limit)


# The checklist


class IterableFailed(Exception):
    """A check of Iterable failed."""


def check(settings: Settings, options: argparse.Namespace, stop: Stop) -> int:
    """The deployment checklist: a line an item, and the exit code of the first that fails. Sends no user data."""
    codes = []

    def item(what: str, test: Callable[[], Any]) -> None:
        try:
            log.info("✓ %s%s", what, test() or "")
        except tuple(EXIT_CODES) as error:
            codes.append(exit_code_of(error))
            log.error("✗ %s: %s", what, error)

    def results_folder() -> None:
        settings.results_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.results_dir).close()

    def tables() -> None:  # no EXPLAIN: an account that may read views only must not use it
        database().execute_query(f"SELECT * FROM ({read_query(QUERIES, 'query_2')}) AS query_2 WHERE FALSE")  # noqa: S608

    def times() -> None:
        [row] = database().execute_query(read_query(QUERIES, "future_views"))
        if row["latest"]:
            raise DatabaseError(f"{row['latest']} is in the future: event_time must be UTC, and not local time")

    def answers(*, key: bool = False) -> None:
        result = answer()
        if result and not (result.usable and (result.status == 400 or not key)):
            raise IterableFailed(result.reason or "Iterable answered a request without a user as if it had one")

    with contextlib.ExitStack() as closing:
        database = functools.cache(lambda: closing.enter_context(database_connection(settings)))
        answer = functools.cache(lambda: iterable_client(settings, stop).update_users([Payload("", "{}")])[0])
        item("Settings are complete", lambda: None)
        item("Log file can be written", lambda: start_logging(settings, options))
        item("Results folder can be written", results_folder)
        item("Database can be reached and is new enough", lambda: f": {database().server}")
        item("Tables and columns of the query are there", tables)
        item("The latest page view is not in the future", times)
        item(f"Iterable can be reached at {settings.iterable_api_base_url}", answers)
        item("API key is accepted", lambda: answers(key=True))
    return codes[0] if codes else SUCCESS


# The command line

EXIT_CODES = {
    SettingsError: BAD_SETTINGS,
    DatabaseError: DATABASE_FAILED,
    IterableFailed: GIVEN_UP,
    AlreadyRunning: LOCKED,
    OSError: BAD_SETTINGS,  # of a file or folder that a setting names
    MemoryError: NOT_ALL,
}


def exit_code_of(error: BaseException) -> int:
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def at_least_one(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number from 1")
    return int(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="everything except the sending; needs no API key")
    add("--limit", type=at_least_one, metavar="N", help="the first N users only (a careful first real run)")
    add("--at-least", type=at_least_one, metavar="N", help="send nothing when the query finds fewer than N users")
    add("--changed-only", action="store_true", help="leave out users to whom the same was delivered already")
    add("--bulk", action="store_true", help="send groups of up to 1000 users: for large runs")
    add("--check", action="store_true", help="check the deployment and send no user data")
    add("--quiet", action="store_true", help="show warnings and errors only, and no failure that is known already")
    add("--env-file", default=".env", metavar="PATH", help="read the settings from another file than .env")
    options = parser.parse_args(argv)
    if options.check and any((options.dry_run, options.limit, options.at_least, options.changed_only, options.bulk)):
        parser.error("--check goes with --quiet and --env-file only")
    return options


def start_logging(settings: Settings, options: argparse.Namespace) -> None:
    """To console and log file, from now on without the key, the password and the passwords of proxies."""
    proxies = re.findall("://[^:]*:(.+)@", "\n".join(getproxies().values()))
    redact = redactor(settings.iterable_api_key, settings.db_password, *proxies, *map(unquote, proxies))
    setup_logger(settings.log_level, settings.log_file, quiet=options.quiet, redact=redact)


def main(argv: Sequence[str] | None = None) -> int:
    """The program: arguments and environment become settings, errors become exit codes (contract 3)."""
    options = parse_arguments(argv)
    setup_logger(quiet=options.quiet)
    try:
        stop = listen_for_signals()
        settings = load_environment_variables(HERE / options.env_file, needs_key=not options.dry_run)
        if options.check:
            return check(settings, options, stop)
        start_logging(settings, options)
        log.info("Starting Iterable Integration - Phase 3")
        log.info("[STEP 1] Loading environment variables...")
        return run_integration(settings, options, stop)
    except tuple(EXIT_CODES) as error:
        log.error("%s%s", "✗ " * options.check, str(error) or "out of memory")
        return exit_code_of(error)


if __name__ == "__main__":
    sys.exit(main())
