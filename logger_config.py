"""What a run leaves behind: console, log file, and the folder of the results files.

The folder has a lock, and is the memory of --changed-only and --reset-left. Every
thread may log; only the main thread uses the folder.
"""

from __future__ import annotations

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
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypedDict
from urllib.parse import quote, quote_plus

# Each of these is the `extra` of a log call.
FILE_ONLY = {"destination": "file"}
CONSOLE_ONLY = {"destination": "console"}  # for blank lines
PROGRESS = {"is_progress": True}  # on a terminal, the next line replaces this one

SHORTEST_SECRET = 4  # characters
LOG_SIZE = 10_000_000  # bytes, at which the log is rotated
OLD_LOGS = 5  # files kept
SYNC_INTERVAL = 1.0  # seconds between two syncs of a results file, while lines arrive

# These log errors only. Our modules report the same troubles, with a cure.
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

Redactor = Callable[[str], str]  # the function `str` is one that redacts nothing

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
    characters is not looked for, because ordinary words may contain it. UTF-8 must be
    able to express the secrets.
    """
    patterns = []
    # The longest first, because one secret may be the beginning of another.
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            characters = map(_match_character, secret)
            patterns.append("".join(characters))
    if not patterns:
        return str
    pattern = re.compile("|".join(patterns))
    return partial(pattern.sub, "[secret]")


def _match_character(character: str) -> str:
    """Return a pattern for the ways in which a character of a secret is written."""
    if character.isascii() and character.isalnum():
        return character  # which nothing escapes
    forms = [
        quote(character, safe=""),
        quote_plus(character),
        json.dumps(character)[1:-1],
        f"\\u{ord(character):04x}",  # some JSON has this for < > & = and others
        "\\" + character,  # some JSON has this for a slash
        character,  # last, because other forms may begin with it
    ]
    alternatives = "|".join(map(re.escape, forms))
    return f"(?i:{alternatives})"  # hex digits may be in upper or lower case


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
    above. `level` is that of the log file. Exceptions that nobody catches in the main
    thread are logged. A second call replaces what the first one configured.

    A log call may pass FILE_ONLY, CONSOLE_ONLY or PROGRESS as its `extra`.

    Raises:
        LogNotWritable: the console is configured all the same.
    """
    if sys.stdout is None:  # it was closed before the start
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    console = _Console(sys.stdout)
    console.stream.reconfigure(errors="backslashreplace")
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    console.addFilter(partial(_is_for, "console"))
    console.setFormatter(_LineFormatter("%(message)s", redact))
    logging.basicConfig(level=logging.DEBUG, handlers=[console], force=True)
    for package in MUTED_PACKAGES:
        muted = logging.getLogger(package)
        muted.setLevel(logging.ERROR)
    sys.excepthook = _log_uncaught_exception
    if log_file is not None:
        file = _open_log_file(log_file)
        file.setLevel(level)
        file.addFilter(partial(_is_for, "file"))
        layout = "%(asctime)s %(levelname)-7s %(module)s: %(message)s"
        file.setFormatter(_LineFormatter(layout, redact))
        logging.getLogger().addHandler(file)


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
    """Whether a record goes there. One without a destination goes everywhere."""
    return getattr(record, "destination", destination) == destination


class _LineFormatter(logging.Formatter):
    """Formats a record as one line, without secrets and control characters.

    So no text from a row or an answer can forge a line or command a terminal. Only a
    traceback has several lines, which are indented.

    Secrets are replaced before control characters are escaped: they may hold some.
    """

    def __init__(self, layout: str, redact: Redactor) -> None:
        super().__init__(layout, "%Y-%m-%dT%H:%M:%S%z")
        self._redact = redact

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        text = self._redact(record.message)
        record.message = _escape(text)
        return super().formatMessage(record)

    def formatException(self, exc_info: Any) -> str:  # noqa: N802 - logging's
        text = super().formatException(exc_info)
        lines = self._redact(text).split("\n")
        return "\n".join(f"  {_escape(line)}" for line in lines)


def _escape(text: str) -> str:
    """Return the text with escapes for what cannot be printed."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else f"\\x{ord(character):02x}"
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
        self.terminator = "\n"  # `emit` adds it to what this method returns
        if not self.stream.isatty():
            return text
        if hasattr(record, "is_progress"):
            # The next line is written over this one, which therefore must not wrap.
            self.terminator = "\r"
            columns = shutil.get_terminal_size().columns
            text = text[: columns - 1]
        return ERASE_LINE + text

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)  # a wrong log call, which is reported
            return
        # From now on all output goes nowhere. Otherwise Python would try to write the
        # rest of it when it exits, and change the exit code to 120.
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())


class _LogFile(logging.handlers.RotatingFileHandler):
    """The log file, which is rotated, if it is neither a link nor a device.

    When it cannot be rotated or written, the console says so, and the run goes on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, backupCount=OLD_LOGS)
        if path.is_file() and not path.is_symlink():
            self.maxBytes = LOG_SIZE  # without it, the log is not rotated
        self._was_too_large = path.stat().st_size >= LOG_SIZE
        self._has_failed = False

    def _open(self) -> Any:
        return _open_text(self.baseFilename, "a")

    def doRollover(self) -> None:  # noqa: N802 - logging's
        try:
            super().doRollover()
        except OSError as error:
            self.maxBytes = 0  # first, because the next line goes to this file, too
            # A log that was too large at the start had its warning in an earlier run.
            level = logging.INFO if self._was_too_large else logging.WARNING
            log.log(
                level,
                "The log file %s cannot be rotated (%s), so this one file grows:"
                " let this account write to its folder",
                self.baseFilename,
                error.strerror,
            )

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)  # a wrong log call, which is reported
        elif not self._has_failed:
            self._has_failed = True
            log.error("The log file %s cannot be written: %s", self.baseFilename, error)


def _open_text(path: str | Path, mode: str) -> IO[str]:
    """Open a file in UTF-8. If it is made, it is for its owner alone."""
    return open(
        path,
        mode,
        encoding="utf-8",
        # An answer may hold half a surrogate pair, which UTF-8 cannot express: it
        # becomes JSON's own escape.
        errors="backslashreplace",
        opener=_open_private,
    )


def _open_private(path: str, flags: int) -> int:
    """Open a file or a standard stream. A new file is for its owner alone."""
    if path in STANDARD_STREAMS:
        return os.dup(STANDARD_STREAMS[path])
    return os.open(path, flags, 0o600)


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
    status: int | None  # of HTTP; None: no answer
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
    email: int | str | None  # an address, or what the row has in its place
    event_id: str | None
    status: str  # a Status
    users_update: CallLine | None
    events_track: CallLine | None
    fingerprint: str | None  # of the payloads, the project and its key


class SentUser(NamedTuple):
    """A user for whom an update is sent, or was sent by an earlier run."""

    user_id: int | str
    identity: str  # the address or user ID in the update


# Returns a value as one line of JSON.
to_json = json.JSONEncoder(ensure_ascii=False).encode

# Returns the value at the beginning of a text, and where it ends.
_decode = json.JSONDecoder().raw_decode


# The results folder


def _announced_path(results: Path) -> Path:
    """Return the path of the list of announced users, a hidden file beside the results.

    A user is announced before anything is sent. If the run is killed before the user
    has a line in the results, the next run knows by the list who may have been updated.
    """
    return results.with_name(f".{results.name}.started")


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


@contextmanager
def lock_results_folder(path: Path) -> Iterator[ResultsFolder]:
    """Make the folder if it is missing, and hold its lock for the block.

    The lock ends with the process, however that ends.

    Raises:
        FolderInUse: another run holds the lock.
        FolderNotUsable: this account cannot write or lock there.
        ResultsNotWritable: the disk is full or broken.
        EarlierResultsUnreadable: the heads of earlier files are read, for the number
            of this run.
    """
    with _creating_in(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = open(  # noqa: SIM115 - closed below
            path / LOCK_NAME,
            "a+b",
            buffering=0,
            opener=_open_private,
        )
    with lock:
        _take_lock(lock, path)
        now = datetime.now().astimezone()
        holder = f"process {os.getpid()}, since {now:%F %T %z}"
        with _creating_in(path):
            lock.truncate(0)
            lock.write(holder.encode())
            # The lock file may be an old one. Is another file possible, too?
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"\n")
        yield ResultsFolder(path)


def _take_lock(lock: IO[bytes], folder: Path) -> None:
    """Lock the file. Raises FolderInUse, FolderNotUsable."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on a Windows share
        holder = "an unknown process"
        with suppress(OSError):  # such a share may refuse that, too
            lock.seek(0)
            holder = lock.read().decode(errors="replace") or holder
        raise FolderInUse(f"Another run holds {folder}: {holder}") from None
    except OSError as error:
        raise FolderNotUsable(
            f"RESULTS_DIR {folder} is on a file system that gives no locks"
            f" ({error.strerror}), and two runs at once would not be noticed:"
            " set it to a folder on a local disk, or mount this one with locks"
        ) from error


class ResultsFolder:
    """RESULTS_DIR, the memory of the runs. Get it from `lock_results_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = _read_heads(path)

    def read_memory(self, *, iterable: str, identify_by: str) -> Memory:
        """Return what the earlier runs say about their users.

        `iterable` (base URL) and `identify_by` are those of this run. Only runs with
        the same ones say who was updated. Dry runs do not count. A line that is damaged
        is skipped with a warning.

        Raises:
            EarlierResultsUnreadable
        """
        memory = Memory()
        for run in self.runs:
            has_same_users = run.iterable == iterable and run.identify_by == identify_by
            if run.mode == "send":
                _read_run(run, memory, has_same_users=has_same_users)
        return memory

    def create_results_file(
        self, head: Mapping[str, Any], started: datetime
    ) -> ResultsFile:
        """Return the new results file of a run. Number and start are added to its head.

        It is named by the start, or by a later second if there is a file of that name.

        Raises:
            FolderNotUsable
            ResultsNotWritable
        """
        last_number = self.runs[-1].number if self.runs else 0
        whole_head = {
            "number": last_number + 1,
            "started_at": started.isoformat(timespec="seconds"),
            **head,
        }
        name = started.strftime(NAME_FORMAT)
        while any(self.path.glob(f"{name}*")):
            started += timedelta(seconds=1)
            name = started.strftime(NAME_FORMAT)
        path = self.path / f"{name}.partial"
        with _creating_in(self.path):
            self._remove_orphans()
            return ResultsFile(path, whole_head)

    def _remove_orphans(self) -> None:
        """Remove lists of announced users whose results file was deleted."""
        for announced in self.path.glob(".integration_results_*.started"):
            name = announced.stem.removeprefix(".")
            results = self.path / name
            if not results.exists():
                announced.unlink()


@contextmanager
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


@contextmanager
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


def _read_heads(folder: Path) -> list[EarlierRun]:
    """Return the heads of all results files, partial ones too, in run order.

    A file of another form is skipped with a warning. Raises EarlierResultsUnreadable.
    """
    with _reading(folder):
        # Path.glob would find nothing, without an error, in a folder that this account
        # may not list.
        paths = list(folder.iterdir())
    runs = []
    for path in paths:
        if not RESULTS_NAME.fullmatch(path.name):
            continue
        run = _read_head(path)
        if run is not None:
            runs.append(run)
    return sorted(runs)


def _read_head(path: Path) -> EarlierRun | None:
    """Return the head of a results file, None if it has none.

    It is the second line: `"run": {...},`. Raises EarlierResultsUnreadable.
    """
    with _reading(path), path.open(encoding="utf-8", errors="replace") as lines:
        lines.readline()
        text = lines.readline()
    if _is_torn(path, text):
        return None
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


def _is_torn(path: Path, text: str) -> bool:
    """Whether a line is the last one of a killed run, which may be incomplete."""
    return path.suffix == ".partial" and not text.endswith("\n")


def _read_run(run: EarlierRun, memory: Memory, *, has_same_users: bool) -> None:
    """Read the users' lines of a run into the memory.

    Raises:
        EarlierResultsUnreadable
    """
    identity_key = "user_id" if run.identify_by == "userId" else "email"
    announced = _read_announced(run.path)
    damaged = 0
    for text in _read_lines(run.path):
        try:
            # What follows the object is ignored: a comma, or what a power failure left
            # of another line.
            line, _ = _decode(text)
            # If the row could not be sent, this is no identity, and nobody uses it.
            user = SentUser(line["user_id"], str(line[identity_key]))
            memory.add_result(line)  # of any project: the fingerprint tells which
            if has_same_users:
                memory.add_update(user, line)
            announced.pop(user, None)
        except MALFORMED:
            if not _is_torn(run.path, text):
                damaged += 1
    for user in announced:  # who have no line, because the run was killed
        memory.add_announced(user, has_same_users=has_same_users)
    if damaged:
        log.warning(
            "%s is used as memory in part: %d line(s) are damaged", run.path, damaged
        )


def _read_announced(results: Path) -> dict[SentUser, None]:
    """Return the announced users of a run, in order; none if its file is complete.

    A kill may have torn the last line. Nothing was sent for its user by then.
    """
    users: dict[SentUser, None] = {}
    path = _announced_path(results)
    if path.exists():
        for text in _read_lines(path):
            with suppress(*MALFORMED):
                line = json.loads(text)
                users[SentUser(**line)] = None
    return users


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines about users. Raises EarlierResultsUnreadable.

    Only they begin with {". A line that a power failure filled with zeros is left out,
    without a warning.
    """
    with _reading(path), path.open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            if text.startswith('{"'):
                yield text


# The results file of this run


class ResultsFile:
    """The results of a run, a JSON document that grows line by line.

    It is named `….json.partial` until it is complete. Beside it, until then, is the
    list of announced users.

    A line survives the end of the process as soon as it is flushed, and a power failure
    as soon as it is synced.

    Raises:
        OSError: a file cannot be made.
        ResultsNotWritable: the head cannot be written. The files are removed.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self._announced = _open_text(_announced_path(path), "x")
        self._file = _open_text(path, "x")
        self._synced_at = time.monotonic()
        self._separator = ""
        self._failure: ResultsNotWritable | None = None
        try:
            self._write(f'{{\n"run": {to_json(head)},\n"results": [\n')
        except ResultsNotWritable:
            _remove_file(self._file)
            _remove_file(self._announced)
            raise

    def announce(self, users: Iterable[SentUser]) -> None:
        """List these users before anything is sent for them.

        Raises:
            ResultsNotWritable: lines may be added all the same.
        """
        try:
            for user in users:
                line = to_json(user._asdict())
                self._announced.write(f"{line}\n")
            self._announced.flush()
        except OSError as error:
            raise _not_writable(self.path, error) from error

    def add(self, line: UserLine, *, sent: bool = True) -> None:
        """Add a user's line. It is flushed at once if the user was `sent`.

        Otherwise it need not survive a kill: the next run will find the user again.

        Raises:
            ResultsNotWritable: this time and from now on, so the file has no gap.
        """
        text = self._separator + to_json(line)
        self._write(text, flush=sent)
        self._separator = ",\n"

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Complete the document and give it its name. Raises ResultsNotWritable."""
        self._write(f'\n],\n"summary": {to_json(summary)}\n}}\n')
        complete = self.path.with_suffix("")
        with self._writing():
            self._sync()
            self._file.close()
            self.path.rename(complete)
        self.path = complete
        _remove_file(self._announced)

    def _write(self, text: str, *, flush: bool = True) -> None:
        """Add the text to the document. With `flush` it is also synced now and then."""
        with self._writing():
            self._file.write(text)
            if flush:
                self._file.flush()
                if time.monotonic() - self._synced_at > SYNC_INTERVAL:
                    self._sync()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise ResultsNotWritable for an OSError of the block, and from then on."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
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


def _remove_file(file: IO[str]) -> None:
    """Delete the file, and close it, as far as the disk allows that."""
    with suppress(OSError), file:
        os.unlink(file.name)


def _not_writable(path: Path, error: OSError) -> ResultsNotWritable:
    return ResultsNotWritable(
        f"{path} cannot be written ({error.strerror}): make room, or set RESULTS_DIR to"
        " another disk; users who have no line there are sent by the next run"
    )


# The memory of --changed-only and --reset-left


class _LastResult(NamedTuple):
    """What became of a user in the last run that attempted something."""

    fingerprint: str | None
    is_delivered: bool
    failed_calls: tuple[object, ...]


class Memory:
    """What the results files say about the users of earlier runs.

    The `add` methods are called in the order of the runs.
    """

    def __init__(self) -> None:
        self._last: dict[str, _LastResult] = {}  # by user ID as text
        self._problems: dict[str, str] = {}  # of rows that cannot be sent, likewise
        self._updated: dict[str, SentUser] = {}  # by identity

    def has_delivered(self, user_id: int | str | None, fingerprint: str) -> bool:
        """Whether these payloads were delivered, and no others were sent since."""
        last = self._last.get(str(user_id))
        return last == _LastResult(fingerprint, is_delivered=True, failed_calls=())

    def knows_failure(self, line: UserLine) -> bool:
        """Whether the user's last failure had the same payloads and reasons."""
        user = str(line["user_id"])
        problem = line.get("problem")
        if problem is not None:
            return self._problems.get(user) == problem
        return self._last.get(user) == _make_result(line)

    def find_absent(self, present: Container[str]) -> list[SentUser]:
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
        """Take in what became of a user."""
        user = str(line["user_id"])
        problem = line.get("problem")
        if problem is not None:  # nothing was sent, so what was delivered still is
            self._problems[user] = problem
            return
        self._problems.pop(user, None)
        if line["status"] != Status.NOT_ATTEMPTED:
            self._last[user] = _make_result(line)
            return
        # The user's group may have been sent, without a clear answer. If that was with
        # other payloads, it is not known any more that the last ones are in Iterable.
        last = self._last.get(user)
        fingerprint = line["fingerprint"]
        if last and fingerprint not in (None, last.fingerprint):
            del self._last[user]

    def add_update(self, user: SentUser, line: UserLine) -> None:
        """Take in whether Iterable has set or reset the field recent_page_view."""
        update = line["users_update"]
        if line["status"] in (Status.RESET, Status.FORGOTTEN):
            self._updated.pop(user.identity, None)
        elif update is not None:
            # Without an answer, or with an unclear one to a group, it may have been
            # accepted.
            status = update["status"]
            is_bulk = update["endpoint"] == "users/bulkUpdate"
            is_unclear = status is None or (is_bulk and status < 300)
            if update["ok"] or is_unclear:
                self._updated[user.identity] = user

    def add_announced(self, user: SentUser, *, has_same_users: bool) -> None:
        """Take in a user who was perhaps updated or reset when the run was killed."""
        self._last.pop(str(user.user_id), None)
        if has_same_users:
            self._updated[user.identity] = user


def _make_result(line: UserLine) -> _LastResult:
    fingerprint = line["fingerprint"]
    if line["status"] == Status.SUCCESS:
        return _LastResult(fingerprint, is_delivered=True, failed_calls=())
    failed_calls = []
    for call in (line["users_update"], line["events_track"]):
        if call is not None and not call["ok"]:
            failed_calls.append({**call, "attempts": None})  # their number may differ
    return _LastResult(
        fingerprint, is_delivered=False, failed_calls=tuple(failed_calls)
    )
