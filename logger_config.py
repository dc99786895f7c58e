"""What a run leaves behind: console, log file, and the folder of the results files.

Every thread may log. Only the main thread uses the results folder and its memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import logging.handlers
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypedDict
from urllib.parse import quote, quote_plus

# Each of these is the `extra` of a log call.
FILE_ONLY = {"destination": "file"}
CONSOLE_ONLY = {"destination": "console"}  # for blank lines
PROGRESS = {"is_progress": True}  # on a terminal, the next line replaces this one

SHORTEST_SECRET = 4  # characters
LOG_SIZE = 10_000_000  # bytes, at which the log is rotated
OLD_LOGS = 5  # files kept
SYNC_INTERVAL = 1.0  # seconds between two syncs of a results file, while lines arrive

# Their warnings are logged by our modules, with an advice.
MUTED_PACKAGES = ("urllib3", "mysql.connector")

# Under systemd these are sockets, which cannot be opened by name.
STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}

ERASE_LINE = "\x1b[K"  # a terminal clears what is right of the cursor

LOCK_NAME = ".integration_results.lock"
NAME_FORMAT = "integration_results_%Y%m%d_%H%M%S.json"
RESULTS_NAME = re.compile(r"integration_results_.*\.json(\.partial)?")

# What the system says when a disk does not take what is written.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EFBIG,  # the limit of `ulimit -f`
}

# What reading a damaged or foreign line can raise.
MALFORMED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)

Redactor = Callable[[str], str]

log = logging.getLogger(__name__)


class LogNotWritable(Exception):
    """LOG_FILE cannot be opened."""


class FolderNotUsable(Exception):
    """RESULTS_DIR is no folder that this account can write to and lock."""


class FolderInUse(Exception):
    """Another run holds the lock of RESULTS_DIR."""


class ResultsNotWritable(Exception):
    """The disk does not take the results: it is full or broken."""


class EarlierResultsUnreadable(Exception):
    """A results file is there and cannot be read, so the memory would have a gap."""


# Redaction


def build_redactor(*secrets: str) -> Redactor:
    """Return a function that replaces the secrets in a text by `[secret]`.

    It finds them as they are, JSON-escaped and URL-encoded. A secret of fewer than 4
    characters is not looked for, because ordinary words may contain it.
    """
    patterns = []
    # The longest first, because one secret may be the beginning of another.
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            characters = [_match_character(character) for character in secret]
            patterns.append("".join(characters))
    if not patterns:
        return str
    return partial(re.compile("|".join(patterns)).sub, "[secret]")


def _match_character(character: str) -> str:
    """Return a pattern for the ways in which a character of a secret is written."""
    encoded = quote(character, safe="")
    if encoded.isalnum():
        return character
    forms = [
        encoded,
        encoded.lower(),
        quote_plus(character),
        json.dumps(character)[1:-1],
        f"\\u{ord(character):04x}",  # some JSON has this for < > & = and others
        f"\\u{ord(character):04X}",
        "\\" + character,  # some JSON has this for a slash
        character,  # last, because other forms may begin with it
    ]
    alternatives = "|".join(map(re.escape, forms))
    return f"(?:{alternatives})"


# Console and log file


def setup_logger(
    level: str = "INFO",
    log_file: Path | None = None,
    *,
    quiet: bool = False,
    redact: Redactor = str,
) -> None:
    """Configure console and log file for all loggers of the process.

    The console is standard output and shows INFO and above, with `quiet` WARNING and
    above. `level` is that of the log file. Exceptions that nobody catches are logged.
    A second call replaces what the first one configured.

    A log call may pass FILE_ONLY, CONSOLE_ONLY or PROGRESS as its `extra`.

    Raises:
        LogNotWritable: the console is configured all the same.
    """
    # Standard output is None if it was closed before the start.
    console = _Console(sys.stdout or open(os.devnull, "w"))  # noqa: SIM115
    console.stream.reconfigure(errors="backslashreplace")
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    console.addFilter(partial(_is_for, "console"))
    console.setFormatter(_LineFormatter("%(message)s", redact))
    logging.basicConfig(level=console.level, handlers=[console], force=True)
    for package in MUTED_PACKAGES:
        logging.getLogger(package).setLevel(logging.ERROR)
    sys.excepthook = _log_uncaught_exception
    if log_file is not None:
        file = _open_log_file(log_file)
        file.setLevel(level)
        file.addFilter(partial(_is_for, "file"))
        layout = "%(asctime)s %(levelname)-7s %(module)s: %(message)s"
        file.setFormatter(_LineFormatter(layout, redact))
        root = logging.getLogger()
        root.addHandler(file)
        root.setLevel(min(console.level, file.level))


def _open_log_file(path: Path) -> _LogFile:
    """Return the handler of the log file. Raises LogNotWritable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _LogFile(path)
    except OSError as error:
        raise LogNotWritable(
            f"LOG_FILE {path} cannot be written ({error.strerror}):"
            " set it to a file that this account may write, or to /dev/null"
        ) from error


def _log_uncaught_exception(*exc_info: Any) -> None:
    log.critical("Unexpected error", exc_info=exc_info)


def _is_for(destination: str, record: logging.LogRecord) -> bool:
    return getattr(record, "destination", destination) == destination


class _LineFormatter(logging.Formatter):
    """Formats a record as one line, without secrets and control characters.

    So no text from a row or an answer can forge a line or command a terminal. Only a
    traceback has several lines.
    """

    def __init__(self, layout: str, redact: Redactor) -> None:
        super().__init__(layout, "%Y-%m-%dT%H:%M:%S%z")
        self._redact = redact

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        record.message = self._clean(record.message)
        return super().formatMessage(record)

    def formatException(self, exc_info: Any) -> str:  # noqa: N802 - logging's
        return self._clean(super().formatException(exc_info), kept="\n")

    def _clean(self, text: str, kept: str = "") -> str:
        """Return the text with `[secret]` and escapes; `kept` are not escaped."""
        # Once its control characters are escaped, a secret would not be found.
        text = self._redact(text)
        if text.isprintable():
            return text
        return "".join(
            character
            if character.isprintable() or character in kept
            else f"\\x{ord(character):02x}"
            for character in text
        )


# Python 3.10 has no StreamHandler[...].
class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Standard output. When it goes away (`| head`), the run goes on without it.

    On a terminal, a line of progress is replaced by the next line. A console that is
    not UTF-8 loses the marks.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if "utf" not in self.stream.encoding.lower():
            text = re.sub("[✓✗⚠] ", "", text)
        self.terminator = "\n"
        if not self.stream.isatty():
            return text
        if hasattr(record, "is_progress"):
            # The next line is written over this one, which therefore must not wrap.
            self.terminator = "\r"
            columns = shutil.get_terminal_size().columns
            text = text[: columns - 1]
        return ERASE_LINE + text

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's
        # From now on all output goes nowhere. Otherwise Python would try to write the
        # rest of it at its end, and end with 120.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())


class _LogFile(logging.handlers.RotatingFileHandler):
    """The log file, which is rotated, if it is neither a link nor a device.

    When it cannot be rotated or written, the console says so, and the run goes on.
    """

    def __init__(self, path: Path) -> None:
        is_other = path.is_symlink() or (path.exists() and not path.is_file())
        size = 0 if is_other else LOG_SIZE  # with 0 it is never rotated
        super().__init__(path, maxBytes=size, backupCount=OLD_LOGS)
        # If it is so large at the start, an earlier run could not rotate it, and has
        # warned of that.
        self._was_too_large = path.stat().st_size >= LOG_SIZE
        self._has_failed = False

    def _open(self) -> Any:
        target: int | str = self.baseFilename
        if target in STANDARD_STREAMS:
            target = os.dup(STANDARD_STREAMS[target])
        return open(
            target,
            "a",
            encoding="utf-8",
            errors="backslashreplace",
            opener=_open_private,
        )

    def doRollover(self) -> None:  # noqa: N802 - logging's
        try:
            super().doRollover()
        except OSError as error:
            self.maxBytes = 0
            log.log(
                logging.INFO if self._was_too_large else logging.WARNING,
                "The log file %s cannot be rotated (%s), so this one file grows:"
                " let this account write to its folder",
                self.baseFilename,
                error.strerror,
            )

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's
        if not self._has_failed:
            self._has_failed = True
            error = sys.exc_info()[1]
            log.error("The log file %s cannot be written: %s", self.baseFilename, error)


def _open_private(path: str, flags: int) -> int:
    """Open a file; make it for its owner alone if it is missing."""
    return os.open(path, flags | os.O_CREAT, 0o600)


# A user's line in the results file


class Status(str, Enum):
    """What became of a user in a run."""

    SUCCESS = "success"
    PARTIAL_FAILURE = "partial_failure"
    TOTAL_FAILURE = "total_failure"
    FORGOTTEN = "forgotten"
    RESET = "reset"
    NOT_ATTEMPTED = "not_attempted"
    WOULD_SEND = "would_send"  # in a dry run
    UNCHANGED = "unchanged"  # counted, and not in the results file

    @property
    def is_failure(self) -> bool:
        """Whether a call failed, or the row cannot be sent."""
        return self in (Status.PARTIAL_FAILURE, Status.TOTAL_FAILURE)


class CallLine(TypedDict):
    """The result of a call in a user's line."""

    endpoint: str
    ok: bool
    status: int | None  # None: no answer
    code: str | None
    message: str
    attempts: int


# Python 3.10 has no NotRequired.
class _OptionalKeys(TypedDict, total=False):
    problem: str  # why the row cannot be sent
    payloads: Mapping[str, Any]  # of a dry run


class UserLine(_OptionalKeys):
    """A user's line in the results file. A call that was not made is None."""

    record: int  # from 1
    user_id: int | str | None
    email: int | str | None
    event_id: str | None
    status: str  # a Status
    users_update: CallLine | None
    events_track: CallLine | None
    fingerprint: str | None  # of the payloads, the project and its key


# Returns a value as one line of JSON.
to_json = json.JSONEncoder(ensure_ascii=False).encode

# Returns the value at the beginning of a text and where it ends: the comma after a
# user's line does no harm.
_decode = json.JSONDecoder().raw_decode


# The results folder


class EarlierRun(NamedTuple):
    """The head of a results file. Runs are ordered by their number, then their start.

    The time stamps of the files do not count: a copy changes them. Files without a
    number, of the program's first versions, have 0.
    """

    number: int
    started: float  # seconds since 1970
    path: Path
    mode: str  # "send" or "dry-run"
    iterable: str | None  # base URL; not known of the program's first versions
    identify_by: str  # "email" or "userId"

    @property
    def is_partial(self) -> bool:
        """Whether the run ended before its file was complete."""
        return self.path.suffix == ".partial"


class ResultsFolder:
    """RESULTS_DIR, which one run at a time may use. It is the memory of the runs.

    A `with` block makes the folder if it is missing, and holds its lock. The lock ends
    with the process, however that ends.

    Raises:
        FolderInUse: another run holds the lock.
        FolderNotUsable: this account cannot write or lock there.
        ResultsNotWritable: the disk is full or broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _hold_lock(path)
        self._runs: list[EarlierRun] | None = None

    def __enter__(self) -> ResultsFolder:
        self._lock.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__(None, None, None)

    def check_writable(self) -> None:
        """Raise FolderNotUsable or ResultsNotWritable if no file can be made."""
        with _creating_in(self.path), tempfile.TemporaryFile(dir=self.path) as file:
            file.write(b"\n")

    def earlier_runs(self) -> list[EarlierRun]:
        """Return the heads of all results files, partial ones too, in run order.

        The files are read once. A file of another form is skipped with a warning.

        Raises:
            EarlierResultsUnreadable
        """
        if self._runs is None:
            # Path.glob finds nothing, without an error, in a folder that this account
            # may not list.
            with _reading(self.path):
                paths = list(self.path.iterdir())
            heads = [
                _read_head(path) for path in paths if RESULTS_NAME.fullmatch(path.name)
            ]
            self._runs = sorted(head for head in heads if head)
        return self._runs

    def read_memory(
        self,
        *,
        iterable: str,
        identify_by: str,
        for_changes: bool = True,
        for_resets: bool = True,
    ) -> Memory:
        """Return what the earlier runs say about their users.

        `for_changes` reads deliveries and failures. `for_resets` reads updated users,
        only from runs with the same `iterable` (base URL) and `identify_by`. With
        neither, only the heads are read. Dry runs do not count. Damaged lines are
        skipped with a warning.

        Raises:
            EarlierResultsUnreadable
        """
        memory = Memory()
        for run in self.earlier_runs():
            # Only the same project and identity have users whom this run may reset.
            can_reset = (
                for_resets
                and run.iterable == iterable
                and run.identify_by == identify_by
            )
            if run.mode == "send" and (for_changes or can_reset):
                _read_run(run, memory, for_changes=for_changes, for_resets=can_reset)
        return memory

    def create_results_file(
        self, head: Mapping[str, Any], started: datetime
    ) -> ResultsFile:
        """Return the new results file of a run. Number and start are added to its head.

        It is named by the start, or by a later second if there is a file of that name.

        Raises:
            EarlierResultsUnreadable: the number cannot be found.
            FolderNotUsable
            ResultsNotWritable
        """
        numbers = [run.number for run in self.earlier_runs()]
        whole_head = {
            "number": max(numbers, default=0) + 1,
            "started_at": started.isoformat(timespec="seconds"),
            **head,
        }
        while any(self.path.glob(f"{started:{NAME_FORMAT}}*")):
            started += timedelta(seconds=1)
        name = f"{started:{NAME_FORMAT}}.partial"
        with _creating_in(self.path):
            self._remove_old_lists()
            return ResultsFile(self.path / name, whole_head)

    def _remove_old_lists(self) -> None:
        """Remove lists of announced users whose partial results file is gone."""
        for announced in self.path.glob(".integration_results_*.started"):
            results = self.path / announced.stem.removeprefix(".")
            if not results.exists():
                announced.unlink()


@contextlib.contextmanager
def _hold_lock(folder: Path) -> Iterator[None]:
    """Make the folder if it is missing, and hold its lock."""
    with _creating_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(  # noqa: SIM115 - closed below
            folder / LOCK_NAME,
            "r+b",
            buffering=0,
            opener=_open_private,
        )
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on a Windows share
            holder = lock.read().decode() or "a process that has just started"
            raise FolderInUse(f"Another run holds {folder}: {holder}") from None
        except OSError as error:
            raise FolderNotUsable(
                f"RESULTS_DIR {folder} is on a file system that gives no locks"
                f" ({error.strerror}), and two runs at once would not be noticed:"
                " set it to a folder on a local disk, or mount this one with locks"
            ) from error
        now = datetime.now().astimezone()
        # On a full disk the lock holds as well, without this text.
        with contextlib.suppress(OSError):
            lock.truncate()
            lock.write(f"process {os.getpid()}, since {now:%F %T %z}".encode())
        yield


@contextlib.contextmanager
def _creating_in(folder: Path) -> Iterator[None]:
    """Raise ResultsNotWritable or FolderNotUsable for an OSError of the block."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise _not_writable(folder, error) from error
        raise FolderNotUsable(
            f"RESULTS_DIR {folder} cannot be used ({error}):"
            " let this account write there, or set it to another folder"
        ) from error


# Earlier results files


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise EarlierResultsUnreadable for an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise EarlierResultsUnreadable(
            f"{path} cannot be read ({error.strerror}), so this run would not know what"
            " an earlier one sent: let this account read it (chown), or restore it, or"
            " move it out of RESULTS_DIR if it is lost"
        ) from error


def _read_head(path: Path) -> EarlierRun | None:
    """Return the head of a results file, None if it has none.

    It is the second line: `"run": {...},`. Raises EarlierResultsUnreadable.
    """
    with _reading(path), path.open(encoding="utf-8", errors="replace") as lines:
        lines.readline()
        text = lines.readline()
    if path.suffix == ".partial" and not text.endswith("\n"):
        return None  # the run was killed before its head was complete
    try:
        head, _ = _decode(text.removeprefix('"run": '))
        return EarlierRun(
            number=int(head.get("number", 0)),
            started=datetime.fromisoformat(head["started_at"]).timestamp(),
            path=path,
            mode=head["mode"],
            iterable=head.get("iterable"),
            identify_by=head.get("identify_by", "email"),
        )
    except MALFORMED as error:
        log.warning(
            "%s is not a results file of this program and is not used: %r", path, error
        )
        return None


def _read_run(
    run: EarlierRun,
    memory: Memory,
    *,
    for_changes: bool,
    for_resets: bool,
) -> None:
    """Take the users' lines of a run into the memory.

    Raises:
        EarlierResultsUnreadable
    """
    identity_key = "user_id" if run.identify_by == "userId" else "email"
    unrecorded = _read_announced(run)
    damaged = 0
    for text in _read_lines(run.path):
        try:
            # A comma follows, and after a power failure perhaps the rest of another
            # line, whose beginning was not saved.
            line, _ = _decode(text)
            user = UpdatedUser(line["user_id"], str(line[identity_key]))
            unrecorded.pop(user, None)
            if for_changes:
                memory.add_result(line)
            if for_resets:
                memory.add_update(user, line)
        except MALFORMED:
            is_torn_by_kill = run.is_partial and not text.endswith("\n")
            if not is_torn_by_kill:
                damaged += 1
    for user in unrecorded:
        memory.add_unrecorded(user, for_resets=for_resets)
    if damaged:
        log.warning(
            "%s is used as memory in part: %d line(s) are damaged", run.path, damaged
        )


def _read_announced(run: EarlierRun) -> dict[UpdatedUser, None]:
    """Return the announced users of a run, in order; none if its file is complete.

    A kill may have torn the last line. Nothing was sent for its user by then.
    """
    users: dict[UpdatedUser, None] = {}
    path = _announced_path(run.path)
    if path.exists():
        for text in _read_lines(path):
            with contextlib.suppress(*MALFORMED):
                line = json.loads(text)
                user = UpdatedUser(line["user_id"], line["identity"])
                users[user] = None
    return users


def _announced_path(results: Path) -> Path:
    """Return the path of the list of announced users beside a partial results file."""
    return results.with_name(f".{results.name}.started")


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines about users. Raises EarlierResultsUnreadable."""
    with _reading(path), path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for text in lines:
            if text.startswith('{"'):  # as no other line does
                yield text


# The results file of this run


class ResultsFile:
    """The results of a run, a JSON document that grows line by line.

    It is named `….json.partial` until it is complete. The line of a user who was sent
    survives the end of the process at once, and a power failure from the next line on
    that is written a second later.

    Raises:
        OSError: the file cannot be made.
        ResultsNotWritable: its first lines cannot be written. No file is left.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self._announced = _create_file(_announced_path(path))
        self._file = _create_file(path)
        self._synced_at = time.monotonic()
        self._separator = ""
        self._failure: ResultsNotWritable | None = None
        try:
            self._write(f'{{\n"run": {to_json(head)},\n"results": [\n')
        except ResultsNotWritable:
            _remove_file(self._file)
            _remove_file(self._announced)
            raise

    def announce(self, users: Iterable[tuple[int | str | None, str]]) -> None:
        """Note the user ID and identity of users before anything is sent for them.

        If the run is killed before their lines are written, Iterable may have accepted
        their updates. The memory learns that from this list, a hidden file beside the
        results. It is removed when they are complete.

        Raises:
            ResultsNotWritable
        """
        try:
            for user_id, identity in users:
                line = to_json({"user_id": user_id, "identity": identity})
                self._announced.write(f"{line}\n")
            self._announced.flush()
        except OSError as error:
            raise _not_writable(self.path, error) from error

    def add(self, line: UserLine, *, sent: bool = True) -> None:
        """Add a user's line. One that was not `sent` may stay in memory for a while.

        Raises:
            ResultsNotWritable: this time and from now on, so the file has no gap.
        """
        self._write(self._separator + to_json(line), flush=sent)
        self._separator = ",\n"

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Complete the document and give it its name. Raises ResultsNotWritable."""
        self._write(f'\n],\n"summary": {to_json(summary)}\n}}\n')
        complete = self.path.with_suffix("")
        try:
            self._sync()
            self._file.close()
            self.path.rename(complete)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        self.path = complete
        _remove_file(self._announced)

    def _write(self, text: str, *, flush: bool = True) -> None:
        """Add the text to the document; with `flush` it survives this process."""
        if self._failure is not None:
            raise self._failure
        try:
            self._file.write(text)
            if flush:
                self._file.flush()
                if time.monotonic() - self._synced_at > SYNC_INTERVAL:
                    self._sync()
        except OSError as error:
            self._failure = _not_writable(self.path, error)
            raise self._failure from error

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            # Other errors say that the file system has no fsync.
            if error.errno in DISK_ERRORS:
                raise
        self._synced_at = time.monotonic()


def _create_file(path: Path) -> TextIO:
    """Return a new file for its owner alone."""
    # An answer may hold half a surrogate pair, which UTF-8 cannot express: it becomes
    # JSON's own escape.
    return open(
        path,
        "x",
        encoding="utf-8",
        errors="backslashreplace",
        opener=_open_private,
    )


def _remove_file(file: TextIO) -> None:
    """Delete the file, and close it, as far as the disk allows that."""
    with contextlib.suppress(OSError):
        os.unlink(file.name)
        file.close()


def _not_writable(path: Path, error: OSError) -> ResultsNotWritable:
    return ResultsNotWritable(
        f"{path} cannot be written ({error.strerror}): make room, or set RESULTS_DIR to"
        " another disk; users who have no line there are sent by the next run"
    )


# The memory of --changed-only and --reset-left


class UpdatedUser(NamedTuple):
    """A user whose update Iterable accepted, or may have accepted."""

    user_id: int | str
    identity: str  # the address or user ID that was sent


class _LastResult(NamedTuple):
    """What is remembered of a user's last delivery."""

    fingerprint: str | None
    reasons: list[object] | None  # of the failure; None: it succeeded


class Memory:
    """What the results files say about the users of earlier runs."""

    def __init__(self) -> None:
        self._last: dict[str, _LastResult] = {}  # by user ID
        self._updated: dict[str, UpdatedUser] = {}  # by identity

    def has_delivered(self, user_id: int | str | None, fingerprint: str) -> bool:
        """Whether these payloads were delivered, and no others were sent since."""
        return self._last.get(str(user_id)) == _LastResult(fingerprint, None)

    def knows_failure(self, line: UserLine) -> bool:
        """Whether the user's last failure had the same payloads and reasons."""
        return self._last.get(str(line["user_id"])) == _find_failure(line)

    def users_left(self, present: Container[str]) -> list[UpdatedUser]:
        """Return who left the segment: updated, not reset since, and not `present`.

        `present` are identities. Users without a user ID, and those whom Iterable has
        forgotten, are left out.
        """
        return [
            user
            for identity, user in self._updated.items()
            if identity not in present and isinstance(user.user_id, int | str)
        ]

    def add_result(self, line: UserLine) -> None:
        """Take in a user's line. Lines come in the order of the runs."""
        user = str(line["user_id"])
        status = line["status"]
        fingerprint = line["fingerprint"]
        last = self._last.get(user)
        if status == Status.SUCCESS:
            self._last[user] = _LastResult(fingerprint, None)
        elif status in (Status.PARTIAL_FAILURE, Status.TOTAL_FAILURE):
            self._last[user] = _find_failure(line)
        elif status != Status.NOT_ATTEMPTED:
            self._last.pop(user, None)  # reset or forgotten: sent again who returns
        elif last and fingerprint not in (None, last.fingerprint):
            # Other payloads may have been sent with a group when the run ended.
            del self._last[user]

    def add_update(self, user: UpdatedUser, line: UserLine) -> None:
        """Take in whether Iterable has set or reset the field recent_page_view."""
        update = line["users_update"]
        if line["status"] in (Status.RESET, Status.FORGOTTEN):
            self._updated.pop(user.identity, None)
        elif update is not None and (update["ok"] or update["status"] is None):
            # Without an answer it may have been accepted all the same.
            self._updated[user.identity] = user

    def add_unrecorded(self, user: UpdatedUser, *, for_resets: bool) -> None:
        """Take in a user who was perhaps updated or reset when the run was killed."""
        self._last.pop(str(user.user_id), None)
        if for_resets:
            self._updated[user.identity] = user


def _find_failure(line: UserLine) -> _LastResult:
    reasons: list[object] = [line.get("problem")]
    for call in (line["users_update"], line["events_track"]):
        if call is not None and not call["ok"]:
            reasons.append({**call, "attempts": None})  # their number is no reason
    return _LastResult(line["fingerprint"], reasons)
