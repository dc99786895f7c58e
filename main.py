"""Tell Iterable about every pro customer who looked at the pricing or settings page in the last 7 days.

One run: settings, the rows of Query 2, both calls for each user, a results file and a log. README.md has the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import json
import logging
import mmap
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

try:
    from dotenv.parser import parse_stream

    import iterable_client as api
    import logger_config
    from db_connection import DatabaseConnection, DatabaseError, Record, read_query
    from iterable_client import CallResult, IterableClient
    from logger_config import FILE_ONLY, ResultsFile, lock_folder, read_memory, redactor, setup_logger
except ModuleNotFoundError as missing:
    advice = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt, then .venv/bin/python main.py"
    sys.stderr.write(f"The package {missing.name} is not installed for {sys.executable}: {advice}\n")
    sys.exit(2)

HERE = Path(__file__).resolve().parent
QUERIES = HERE / "phase2_queries.sql"
SUCCESS, NOT_ALL, BAD_SETTINGS, BAD_DATABASE, GIVEN_UP, LOCKED = 0, 1, 2, 3, 4, 75  # exit codes (contract 3)
EXIT_CODES = {DatabaseError: BAD_DATABASE, BlockingIOError: LOCKED, MemoryError: NOT_ALL, ConnectionError: GIVEN_UP}
UNUSABLE_IN_A_ROW = 20  # users without a usable answer, after which the run is given up
ROOM = 200_000_000  # bytes of addresses to be free for a new thread: it hangs or crashes where there are none
MOST_IN_FLIGHT = 10_000  # users of a run in bulk: more would only wait for their turn, and take room
MANY, LARGE = 100, 5000  # users, above which the console shows progress, and above which --bulk is recommended
SHOWN_FAILURES, SHOWN_REASONS, SHOWN_PAYLOADS = 20, 10, 3

log = logging.getLogger(__name__)


# Settings


class SettingsError(Exception):
    """Settings are missing, empty, malformed or of no use. The text names them all, and no value of a setting."""


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
    """The settings of `environ`, else of the file (contract 2). Raises OSError, or SettingsError for all complaints."""
    complaints: list[str] = []
    values = {**read_env_file(env_file, complaints), **environ}
    read_secret("DB_PASSWORD", values, complaints)
    read_secret("ITERABLE_API_KEY", values, complaints if needs_key else [])  # which a dry run does without

    def get(name: str, default: str | None = None, parse: Callable[[str], Any] = str, *, blank: bool = False) -> Any:
        text = values.get(name) if blank else (values.get(name) or "").strip() or default
        try:
            if text is None:
                raise ValueError("is empty" if name in values else "is missing")
            if re.search("[\0\ud800-\udfff]", text):
                raise ValueError("is not text")
            return parse(text)
        except (ValueError, argparse.ArgumentTypeError) as complaint:
            complaints.append(f"{name} {complaint}")

    settings = Settings(
        db_host=get("DB_HOST"),
        db_user=get("DB_USER"),
        db_password=get("DB_PASSWORD", blank=True),
        db_name=get("DB_NAME"),
        db_port=get("DB_PORT", "3306", number(1, 65535)),
        db_ssl_ca=get("DB_SSL_CA", "", ca_file),
        iterable_api_key=get("ITERABLE_API_KEY", None if needs_key else "", api.api_key),
        iterable_api_base_url=get("ITERABLE_API_BASE_URL", "https://api.iterable.com", api.base_url),
        iterable_rate_limit=get("ITERABLE_RATE_LIMIT", "450", number(1, 100_000)),
        iterable_max_attempts=get("ITERABLE_MAX_ATTEMPTS", "5", number(1, 100)),
        iterable_timeout=get("ITERABLE_TIMEOUT", "30", number(0.1, 3600, float)),
        max_workers=get("MAX_WORKERS", "300", number(1, 2000)),
        log_level=get("LOG_LEVEL", "INFO", level),
        log_file=get("LOG_FILE", "iterable_integration.log", HERE.joinpath),
        results_dir=get("RESULTS_DIR", ".", HERE.joinpath),
    )
    if complaints:
        raise SettingsError(f"Settings: {'; '.join(complaints)}. Set them in {env_file} (see .env.example)")
    return settings


def read_env_file(env_file: Path, complaints: list[str]) -> dict[str, str | None]:
    """What the file sets; ${...} is left, for a password may hold it. There need be no `.env`. Raises OSError."""
    if env_file == HERE / ".env" and not env_file.exists():
        return {}
    with env_file.open(encoding="utf-8", errors="surrogateescape") as lines:
        bindings = list(parse_stream(lines))
    bad = (each for each in bindings if each.error or not (each.key or "").isprintable())
    complaints += [f"line {each.original.line} of {env_file} cannot be read" for each in bad]
    return {each.key: each.value for each in bindings if each.key}


def read_secret(name: str, values: dict[str, str | None], complaints: list[str]) -> None:
    """Take a secret from the file that `<name>_FILE` names, if it is set: without one line break at the end."""
    file = (values.get(f"{name}_FILE") or "").strip()
    if file and values.get(name):
        complaints.append(f"{name} and {name}_FILE are both set: keep one of them")
    elif file:
        try:
            values[name] = re.sub(r"\r?\n\Z", "", HERE.joinpath(file).read_bytes().decode())
        except (OSError, ValueError) as error:
            complaints.append(f"{name}_FILE cannot be read ({getattr(error, 'strerror', None) or 'it is not text'})")
            values[name] = "-"  # or it would be called missing as well


def level(text: str) -> str:
    if text not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
    return text


def number(low: float, high: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        plausible = re.fullmatch(r"\d{1,9}" if kind is int else r"\d{1,9}(\.\d{1,9})?", text, re.ASCII)
        if not plausible or not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number from {low} to {high}")
        return kind(text)

    return parse


def ca_file(text: str) -> str:
    if text and not os.path.isfile(HERE / text):  # Path.is_file raises for a name that is too long
        raise ValueError("is no file")
    return text and str(HERE / text)


# A user's delivery


class Reason(NamedTuple):
    """Why a user failed. `endpoint` is None for what was not sent, `status` for a call that got no answer."""

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


@dataclass(slots=True)
class Delivery:
    """One user of this run: what is to be sent, then what became of it. A call that was not made is None."""

    record: int  # its number, from 1
    user_id: int | str | None
    email: Any  # as the row has it, and once it is to be sent, the address
    event_id: str | None = None
    fingerprint: str | None = None
    user: str = ""  # its payload in JSON, which is made once: to be sent, measured, hashed and shown
    event: str = ""  # likewise
    problem: str = ""  # why the row cannot be sent
    without_calls: str = "not_attempted"  # the status while no call was made: also would_send and unchanged
    users_update: CallResult | None = None
    events_track: CallResult | None = None
    hidden: bool = False  # from a quiet console, which had the same failure before

    @property
    def calls(self) -> list[CallResult]:
        return [call for call in (self.users_update, self.events_track) if call is not None]

    @property
    def status(self) -> str:
        """One of contract 7, or `unchanged`."""
        if self.users_update is None:
            return "total_failure" if self.problem else self.without_calls
        if any(call.forgotten for call in self.calls):
            return "forgotten"
        return ("total_failure", "partial_failure", "success")[sum(call.ok for call in self.calls)]

    @property
    def reasons(self) -> list[Reason]:
        """Why the user failed, one for each call that did."""
        if self.problem:
            return [Reason(None, None, None, self.problem)]
        reasons = [Reason(call.endpoint, call.status, call.code, call.reason) for call in self.calls if not call.ok]
        return reasons or [Reason(None, None, None, "events/track not sent: the run ended before")]

    def as_line(self) -> dict[str, Any]:
        """The user's line in the results file (contract 7)."""
        names = ("record", "user_id", "email", "event_id", "status", "users_update", "events_track", "fingerprint")
        line = {name: getattr(self, name) for name in names} | ({"problem": self.problem} if self.problem else {})
        return line | {name: call.as_json for name, call in line.items() if isinstance(call, CallResult)}


def prepare(number: int, record: Record, project: str, seen: dict[str, Any]) -> Delivery:
    """The delivery of a row. Two customers of one address, or two rows of one view, would race each other.

    The fingerprint is a SHA-256 of both payloads and of the `project`, its base URL and API key (contract 7).
    """
    delivery = Delivery(number, record.user_id, record.email)
    try:
        user, event = api.user_payload(record), api.event_payload(record)
        email, event_id = delivery.email, delivery.event_id = user["email"], event["id"]
        delivery.user, delivery.event = api.compact_json(user), api.compact_json(event)
        delivery.fingerprint = hashlib.sha256(f"{delivery.user} {delivery.event} {project}".encode()).hexdigest()
        if email in seen:
            raise ValueError(f"customer {seen[email]} has the same address: merge the two")
        if event_id in seen:
            raise ValueError(f"customer {seen[event_id]} has the same page view: make page_views.id unique")
        seen[email] = seen[event_id] = delivery.user_id
    except ValueError as problem:
        delivery.problem = str(problem)
    return delivery


# Sending


class Stop(threading.Event):
    """Set when no new user may start. The first reason for it is how the run ends, in the words of contract 7."""

    outcome, exit_code, why = "completed", SUCCESS, ""
    sending = False  # while it is False, a signal ends the process at once

    def ask(self, outcome: str, exit_code: int, why: str) -> None:
        if not self.why:
            self.outcome, self.exit_code, self.why = outcome, exit_code, why
        self.set()


def listen_for_signals() -> Stop:
    """The first SIGINT, SIGTERM or SIGHUP while users are sent asks for a stop, any other ends the process at once.

    A thread waits for them: no line of the program is interrupted, and none that blocks in C delays them.
    """
    stop = Stop()
    every = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    signals = {one for one in every if signal.getsignal(one) != signal.SIG_IGN}  # nohup's and a script's stay ignored
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads that start later inherit it

    def listen() -> None:
        received = signal.sigwait(signals)
        if stop.sending:
            stop.ask("interrupted", 128 + received, f"Stopped by {signal.Signals(received).name}")
            received = signal.sigwait(signals)
        os._exit(128 + received)  # without a word: the console may block, or the log

    threading.Thread(target=listen, daemon=True).start()
    return stop


def send(group: list[Delivery], client: IterableClient) -> list[Delivery]:
    """Both calls of a group, as far as they are still to be made. Runs in many threads."""
    updated = client.post(api.USERS_UPDATE, {each.email: each.user for each in group if not each.users_update})
    for each in group:
        each.users_update = each.users_update or updated.get(each.email)
    events = {each.email: each.event for each in group if each.users_update and not each.users_update.forgotten}
    tracked = client.post(api.EVENTS_TRACK, events)
    for each in group:
        each.events_track = tracked.get(each.email)
    return group


def to_send(records: deque[Record], project: str, report: Report, collect: Callable[[int], None]) -> Iterator[Delivery]:
    """The deliveries to be sent, until a stop; the others are put on record. Uses up the records."""
    seen: dict[str, Any] = {}  # addresses and event ids: only an address has an @
    while records and not report.stop.is_set():
        delivery = prepare(report.total - len(records) + 1, records[0], project, seen)
        if delivery.fingerprint and report.memory.get(str(delivery.user_id)) == delivery.fingerprint:
            delivery.without_calls = "unchanged"
        elif report.options.dry_run:
            delivery.without_calls = "would_send"
        report.open[delivery.record] = delivery
        records.popleft()
        if delivery.status == "not_attempted":
            yield delivery
        else:
            report.record(delivery)
            collect(report.total + 1)  # no wait: who is done by now, for many may be left out between two


def deliver(records: deque[Record], client: IterableClient, settings: Settings, report: Report) -> None:
    """Send and record everybody, or give up when that is of no use: the rest is then recorded as not attempted."""
    size, most = (api.MOST_ITEMS, MOST_IN_FLIGHT) if report.options.bulk else (1, 2 * settings.max_workers)
    project = f"{settings.iterable_api_base_url} {settings.iterable_api_key}"
    done: queue.SimpleQueue[Future[list[Delivery]]] = queue.SimpleQueue()

    def begin(group: list[Delivery]) -> None:
        """Hand the group to a thread. Raises OSError where there is no room for one."""
        mmap.mmap(-1, ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        threads.submit(send, group, client).add_done_callback(done.put)

    def collect(limit: int) -> None:
        """Record who is done, until fewer than `limit` users are open. Whom a group left open is sent alone."""
        while len(report.open) >= limit or not done.empty():
            report.progress()
            with contextlib.suppress(queue.Empty):
                group = done.get(timeout=0.1).result()
                for each in group:
                    if each.events_track or len(group) == 1:
                        report.record(each)
                    else:
                        begin([each])
            if why := client.refused or ("" if report.stop.is_set() else report.hopeless):
                client.halted.set()
                report.stop.ask("aborted", GIVEN_UP, why)

    with ThreadPoolExecutor(settings.max_workers) as threads:
        try:
            for group in api.in_groups(to_send(records, project, report, collect), size):
                begin(group)
                collect(most)
            collect(1)
        except Exception as error:  # of any kind: who was told goes on record all the same
            log.critical("Unexpected error", exc_info=error, extra=FILE_ONLY)
            advice = "see the log file; if memory or threads ran out, lower MAX_WORKERS, or raise ulimit -v or -u"
            report.stop.ask("aborted", NOT_ALL, f"unexpected error {error!r}: {advice}")
    for delivery in list(report.open.values()):
        report.record(delivery)
    for number, record in enumerate(records, report.total - len(records) + 1):
        report.record(Delivery(number, record.user_id, record.email))


# Reporting

WORDS = {  # for each status: those of a user's line, if there is one, and those of the summary
    "would_send": ("", "Would send"),
    "success": ("✓ Successfully processed user", "✓ Successful (both API calls)"),
    "partial_failure": ("⚠ Partially processed user", "⚠ Partial failures (one call failed)"),
    "total_failure": ("✗ Failed user", "✗ Total failures (both calls failed)"),
    "forgotten": ("Forgotten at the user's own request, so not told", "Forgotten at their own request"),
    "unchanged": ("", "Unchanged since they were delivered, not sent again"),
    "not_attempted": ("", "Not attempted"),
}


class Report:
    """What becomes of the users: counted, on record, and told in the order of the records (contract 6 and 7)."""

    def __init__(
        self, total: int, options: argparse.Namespace, memory: Mapping[Any, str], results: ResultsFile, stop: Stop
    ) -> None:
        self.total, self.options, self.memory, self.results, self.stop = total, options, memory, results, stop
        self.open: dict[int, Delivery] = {}  # not yet on record
        self.counts: Counter[str] = Counter()  # by status
        self.hopeless = ""  # why the run is to be given up
        self.failures = self._unusable_in_a_row = self._last_told = self._new_failures = 0
        self._news, self._hidden = Counter[Reason](), Counter[Reason]()  # each with the number of users
        self._untold: dict[int, Delivery] = {}
        self._began = self._last_progress = time.monotonic()

    def record(self, delivery: Delivery) -> None:
        """Put a user on record who is done, and tell whose turn it is."""
        line = delivery.as_line()
        status, text = line["status"], logger_config.to_json(line)
        if status == "would_send":
            payloads = f'{{"users_update": {delivery.user}, "events_track": {delivery.event}}}'
            text = f'{text[:-1]}, "payloads": {payloads}}}'
        try:
            if status != "unchanged":
                self.results.add(text, at_once=delivery.users_update is not None)
        except OSError as error:
            self.stop.ask("aborted", NOT_ALL, str(error))
        self.open.pop(delivery.record, None)
        self.counts[status] += 1
        if delivery.users_update:
            self._unusable_in_a_row = 0 if any(call.usable for call in delivery.calls) else self._unusable_in_a_row + 1
            if self._unusable_in_a_row == UNUSABLE_IN_A_ROW:
                self.hopeless = f"{UNUSABLE_IN_A_ROW} users in a row got no usable answer"
        if status.endswith("failure"):
            self.failures += 1
            known = self.memory.get(str(delivery.user_id)) == logger_config.verdict(line)
            delivery.hidden = self.options.quiet and known
            once = {reason.message: reason for reason in reversed(delivery.reasons)}  # of both calls, the first
            (self._hidden if delivery.hidden else self._news).update(once.values())
        self._untold[delivery.record] = delivery
        while ready := self._untold.pop(self._last_told + 1, None):
            self._last_told += 1
            self._tell(ready)
        self.progress()

    def _tell(self, delivery: Delivery) -> None:
        """Above MANY users the console has progress and the first failures, and the log one line a success."""
        many, status = self.total > MANY, delivery.status
        failed = status.endswith("failure")
        level = logging.ERROR if failed else logging.INFO
        if status == "would_send" and self.counts[status] <= SHOWN_PAYLOADS:
            log.info("users/update %s", logger_config.to_json(json.loads(delivery.user)))
            log.info("events/track %s", logger_config.to_json(json.loads(delivery.event)))
        if not WORDS[status][0]:
            return
        who = str(delivery.email or "").strip()[:320] or f"customer {delivery.user_id}"
        place = f"record {delivery.record}/{self.total}"
        self._new_failures += failed and not delivery.hidden
        file_only = delivery.hidden or (many and (not failed or self._new_failures > SHOWN_FAILURES))
        extra = FILE_ONLY if file_only else {}
        if not many:
            log.info("", extra=extra)
            log.info("Processing record %d/%d", delivery.record, self.total, extra=extra)
        for call in () if many and status == "success" else delivery.calls:
            log.log(logging.INFO if call.ok else level, "%s (%s, %s)", call.headline, place, who, extra=FILE_ONLY)
            if not call.ok:
                answer = " ".join((call.body or call.message).split())  # once redacted: a secret may hold blanks
                log.log(level, "Response: %s", answer, extra=FILE_ONLY)
        where = f" ({place})" if many else ""
        why = f": {', '.join(reason.short for reason in delivery.reasons)}" if failed else ""
        log.log(level, "%s: %s%s%s", WORDS[status][0], who, where, why, extra=extra)

    def progress(self) -> None:
        """A line every 2 seconds in a long run."""
        now = time.monotonic()
        if self.total > MANY and now - self._last_progress >= 2 and not self.stop.is_set():
            self._last_progress = now
            done = self.counts.total()
            speed = done / (now - self._began)
            left = f"{(self.total - done) / speed:.0f} s left" if speed else "nobody done yet"
            text = "Progress: %d/%d (%d %%), %.1f users/s, %s, failures: %d"
            log.info(text, done, self.total, 100 * done // self.total, speed, left, self.failures)

    def finish(self, client: IterableClient) -> int:
        """Complete the results file and tell the summary (contract 6 and 7); returns the exit code."""
        counts, seconds = self.counts, round(time.monotonic() - self._began, 3)
        done = counts["success"] + self.failures + counts["forgotten"]
        speed = round(done / seconds, 1) if seconds else 0.0
        exit_code = NOT_ALL if self.failures else SUCCESS
        numbers = {status.replace("failure", "failures"): counts[status] for status in WORDS}
        numbers["not_attempted"] += numbers.pop("would_send")  # for which contract 7 has no key
        reasons = (self._news + self._hidden).most_common()
        summary = {
            "outcome": self.stop.outcome,
            "exit_code": self.stop.exit_code or exit_code,
            "total_users": self.total,
            **numbers,
            "calls": len(client.attempts),
            "retries": len(client.attempts) - client.attempts.count(1),
            "duration_seconds": seconds,
            "users_per_second": speed,
            "failure_reasons": [{**reason._asdict(), "count": count} for reason, count in reasons],
        }
        try:
            self.results.finish(summary)
        except OSError as error:
            self.stop.ask("aborted", NOT_ALL, str(error))
        self._tell_summary(seconds, speed)
        return self.stop.exit_code or exit_code

    def _tell_summary(self, seconds: float, speed: float) -> None:
        """Under --quiet only when something is wrong that no earlier run has told."""
        if why := self.stop.why:
            log.info("")
            log.error("The run ended early: %s", why)
        tell = functools.partial(log.log, logging.WARNING if why or self._news else logging.INFO)
        tell("")
        tell("INTEGRATION SUMMARY")
        tell("Total users processed: %d", self.total)
        words, always = WORDS, {"success", "partial_failure", "total_failure"}
        if self.options.dry_run:
            words, always = {**WORDS, "total_failure": ("", "Cannot be sent")}, {"would_send", "total_failure"}
        for status, (_, counted) in words.items():
            if status in always or self.counts[status]:
                tell("%s: %d", counted, self.counts[status])
        for reasons, extra in ((self._news, {}), (self._hidden, FILE_ONLY)):
            for reason, count in reasons.most_common(SHOWN_REASONS):
                texts = [reason.short] * bool(reason.endpoint) + [reason.message] * (reason.message not in why)
                tell("  %d user%s: %s", count, "s" * (count > 1), ": ".join(texts), extra=extra)
        if len(self._news) > SHOWN_REASONS:
            tell("  %d more reasons stand in the results file", len(self._news) - SHOWN_REASONS)
        tell("Results: %s", self.results.path)
        tell("Time: %.1f s, %.1f users a second", seconds, speed)


# The run


def run_integration(settings: Settings, options: argparse.Namespace, stop: Stop) -> int:
    """One run, from the rows to the results file; returns the exit code (contract 3).

    Raises DatabaseError, BlockingIOError for a folder in use, OSError for a useless setting. Nothing was sent then.
    """
    with lock_folder(settings.results_dir):
        log.info("[STEP 2] Connecting to database...")
        with database_connection(settings) as database:
            log.info("[STEP 3] Executing Phase 2 Query 2...")
            rows = database.read_records(read_query(QUERIES, "query_2"))
        log.info("Found %d pro user(s) with recent engagement", len(rows))
        if len(rows) < (options.at_least or 0):
            raise DatabaseError(f"Nothing is sent: {len(rows)} users found, fewer than --at-least {options.at_least}")
        records = deque(rows[: options.limit])
        del rows  # or this list would keep each until the end
        gc.freeze()  # the rows are no garbage; to look through them again and again would stop every thread
        log.info("[STEP 4] Initializing Iterable API client...")
        client = iterable_client(settings, stop)
        log.info("[STEP 5] Processing user records...")
        memory = read_memory(settings.results_dir) if options.changed_only else {}
        if len(records) > LARGE and not options.bulk:
            singly, in_bulk = (client.cost(len(records), bulk=bulk)[1] for bulk in (False, True))
            log.info("%d users take %.0f s or more; with --bulk %.0f s or more", len(records), singly, in_bulk)
        sys.setswitchinterval(0.0005)  # or a busy thread holds up each step of a call by 5 ms, and so its arrival
        stop.sending = True
        place = {"database": f"{settings.db_name} on {settings.db_host}", "iterable": settings.iterable_api_base_url}
        run = {"mode": "dry-run" if options.dry_run else "send", **place, "options": vars(options)}
        results = ResultsFile(settings.results_dir, run, datetime.now().astimezone())
        report = Report(len(records), options, memory, results, stop)
        deliver(records, client, settings, report)
        if options.dry_run:
            calls, seconds = client.cost(report.counts["would_send"], bulk=options.bulk)
            log.info("Dry run, nothing was sent. A run would make %d calls, in %.1f s or more", calls, seconds)
        return report.finish(client)


def database_connection(s: Settings) -> DatabaseConnection:
    return DatabaseConnection(s.db_host, s.db_port, s.db_user, s.db_password, s.db_name, s.db_ssl_ca)


def iterable_client(s: Settings, stop: Stop) -> IterableClient:
    rate, timeout, retry = s.iterable_rate_limit, s.iterable_timeout, api.RetryPolicy(s.iterable_max_attempts)
    client = IterableClient(s.iterable_api_base_url, s.iterable_api_key, rate, timeout, s.max_workers, retry, stop)
    client.redact = redactor(s.iterable_api_key, s.db_password)
    return client


# The checklist


@contextlib.contextmanager
def item(codes: list[int], words: str) -> Iterator[None]:
    """A line of the checklist: ✓ if the block ends well, else ✗ and why, and its exit code for `codes`."""
    try:
        yield
        log.info("✓ %s", words)
    except (OSError, DatabaseError) as error:
        codes.append(EXIT_CODES.get(type(error), BAD_SETTINGS))
        log.error("✗ %s: %s", words, error)


def check(settings: Settings, stop: Stop) -> int:
    """The deployment checklist: a line an item, and the exit code of the first that fails. Sends no user data."""
    codes: list[int] = []
    log.info("✓ Settings are complete")
    log.info("✓ Log file can be written")  # main has done both
    with item(codes, "Results folder can be written"):
        settings.results_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.results_dir) as file:
            file.write(b"\n")
    with item(codes, "Database can be reached and is new enough"), database_connection(settings):
        pass
    with item(codes, "Tables and columns of the query are there"), database_connection(settings) as database:
        query = read_query(QUERIES, "query_2")  # no EXPLAIN: an account that may read views only is not allowed it
        database.execute_query(f"SELECT * FROM ({query}) AS query_2 WHERE FALSE")  # noqa: S608
    with item(codes, "The latest page view is not in the future"), database_connection(settings) as database:
        [row] = database.execute_query(read_query(QUERIES, "future_views"))
        if row["latest"]:
            raise DatabaseError(f"{row['latest']} is in the future: event_time must be UTC, and not local time")
    answer = functools.cache(lambda: iterable_client(settings, stop).post(api.USERS_UPDATE, {"": "{}"}).get(""))
    with item(codes, f"Iterable can be reached at {settings.iterable_api_base_url}"):
        if (result := answer()) and not result.usable:
            raise ConnectionError(result.reason)
    with item(codes, "API key is accepted"):
        if (result := answer()) and not (result.usable and result.status == 400):
            raise ConnectionError(result.reason or "Iterable answered a request without a user as if it had one")
    return codes[0] if codes else SUCCESS


# The command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="everything except the sending; needs no API key")
    add("--limit", type=number(1, 999_999_999), metavar="N", help="the first N users only (a careful first real run)")
    add("--at-least", type=number(1, 999_999_999), metavar="N", help="send nothing when fewer than N users are found")
    add("--changed-only", action="store_true", help="leave out users to whom the same was delivered already")
    add("--bulk", action="store_true", help="send groups of up to 1000 users: for large runs")
    add("--check", action="store_true", help="check the deployment and send no user data")
    add("--quiet", action="store_true", help="show warnings and errors only, and no failure that is known already")
    add("--env-file", default=".env", metavar="PATH", help="read the settings from another file than .env")
    options = parser.parse_args(argv)
    if options.check and any((options.dry_run, options.limit, options.at_least, options.changed_only, options.bulk)):
        parser.error("--check goes with --quiet and --env-file only")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The program: arguments and environment become settings, errors become exit codes (contract 3)."""
    options = parse_arguments(argv)
    setup_logger(quiet=options.quiet)
    try:
        stop = listen_for_signals()
        settings = load_environment_variables(HERE / options.env_file, needs_key=not options.dry_run)
        redact = redactor(settings.iterable_api_key, settings.db_password)
        setup_logger(settings.log_level, settings.log_file, quiet=options.quiet, redact=redact)
        if options.check:
            return check(settings, stop)
        log.info("Starting Iterable Integration - Phase 3")
        log.info("[STEP 1] Loading environment variables...")  # they are: the log file is one
        return run_integration(settings, options, stop)
    except (SettingsError, OSError, DatabaseError, MemoryError) as error:
        advice = ": check LOG_FILE, RESULTS_DIR or --env-file" if getattr(error, "filename", None) else ""
        log.error("%s%s%s", "✗ " * options.check, str(error) or "out of memory", advice)
        return EXIT_CODES.get(type(error), BAD_SETTINGS)


if __name__ == "__main__":
    sys.exit(main())
