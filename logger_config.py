"""All that a run leaves behind: console and log file without secrets; the results folder, its lock and its memory."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import logging.handlers
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

FILE_ONLY = {"file_only": True}  # the `extra` of a log record that is not for the console

log = logging.getLogger(__name__)


# Console and log file


def redactor(*secrets: str) -> Callable[[str], str]:
    """A function that replaces the secrets in a text, as they are, JSON-escaped or URL-encoded.

    Secrets of fewer than 4 characters are left: they stand inside ordinary words, and the gaps would spell them out.
    """
    forms: set[str] = set()
    for secret in (each for each in secrets if len(each) >= 4):
        in_json = [json.dumps(secret, ensure_ascii=only_ascii)[1:-1] for only_ascii in (True, False)]
        in_json += [text.replace("/", "\\/") for text in in_json]
        unquoted = ("/", "", "!'()*")  # as Python, most others, and JavaScript leave them
        in_url = [quote_plus(secret), *(quote(secret, safe=left) for left in unquoted)]
        in_url += [re.sub("%..", lambda code: code[0].lower(), text) for text in in_url]
        forms |= {secret, *in_json, *in_url}
    longest_first = sorted(forms, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # which is found nowhere
    return functools.partial(pattern.sub, "[secret]")


def setup_logger(
    level: str = "INFO", log_file: Path | None = None, *, quiet: bool = False, redact: Callable[[str], str] = str
) -> None:
    """Configure logging for the whole process, at the root (contract 2 and 6). Modules use `getLogger(__name__)`.

    `level` is that of the log file; the console (standard output) shows INFO and above, with `quiet` WARNING and
    above. An exception that nobody caught is logged, too. Raises OSError when the log file cannot be opened; then,
    and without `log_file`, there is only the console.
    """
    console = _Console(sys.stdout)
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    console.addFilter(lambda record: not getattr(record, "file_only", False))
    has_marks = "utf" in str(getattr(console.stream, "encoding", "")).lower()
    shown = redact if has_marks else lambda text: re.sub("[✓✗⚠] ", "", redact(text))
    console.setFormatter(_Formatter("%(message)s", shown))
    with contextlib.suppress(AttributeError):  # not a real console, or none
        console.stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, handlers=[console], force=True)
    for package in ("urllib3", "mysql.connector"):  # what they tell is said again, in better words, by our modules
        logging.getLogger(package).setLevel(logging.ERROR)
    sys.excepthook = lambda kind, error, trace: log.critical("Unexpected error", exc_info=(kind, error, trace))
    if log_file:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file = _PrivateLogFile(log_file, maxBytes=10_000_000, backupCount=5)
        file.setLevel(level)
        file.addFilter(lambda record: record.msg != "")  # empty lines are for the console
        file.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(module)s: %(message)s", redact))
        logging.getLogger().addHandler(file)
        logging.getLogger().setLevel(min(file.level, console.level))


class _Formatter(logging.Formatter):
    """One line a record: no secret, and no control character by which a row or reply could forge lines."""

    def __init__(self, layout: str, redact: Callable[[str], str]) -> None:
        super().__init__(layout, "%Y-%m-%dT%H:%M:%S%z")
        self._redact = redact

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = self._redact(record.message)
        if not record.message.isprintable():
            record.message = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in record.message)
        return super().formatMessage(record)

    def formatException(self, exc_info: Any) -> str:
        return self._redact(super().formatException(exc_info))


class _Console(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 has no StreamHandler[...]
    """A console that may go away (`| head`, a closed terminal): the run goes on without."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        # What is left in its buffer would fail once more at exit, and make the exit code 120.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


_open_private = functools.partial(os.open, mode=0o600)  # for `open`: a new file is its owner's alone


class _PrivateLogFile(logging.handlers.RotatingFileHandler):
    """A rotating log. When it cannot be written, the console says so, once, and the run goes on."""

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=_open_private)

    def handleError(self, record: logging.LogRecord) -> None:
        if self.maxBytes:
            self.maxBytes = 0  # where it cannot be renamed, one file that grows rather than lines that are lost
            log.error("The log file %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])


# The results folder


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases with the process. Raises OSError, BlockingIOError if in use."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".integration_results.lock", "a+", errors="replace", opener=_open_private) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise BlockingIOError(f"Another run holds {folder}: {lock.read() or 'just begun'}") from None
        with contextlib.suppress(OSError):  # on a full disk it holds as well, without these words
            lock.truncate(0)
            os.write(lock.fileno(), f"process {os.getpid()}, since {datetime.now().astimezone():%F %T %z}".encode())
        yield


to_json = json.JSONEncoder(ensure_ascii=False).encode
raw_decode = json.JSONDecoder().raw_decode  # json.loads takes a third longer


class ResultsFile:
    """The document of contract 7: it grows line by line as `….json.partial` and takes its name when it is whole.

    A line reaches the kernel at once, so that a killed process loses none, and the disk within about a second.
    Raises OSError when folder or disk do not take it; after that nothing is written, so that there is no gap.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], started: datetime) -> None:
        number = 1 + max((number for number, *_ in _earlier_runs(folder)), default=0)
        run = {"number": number, "started_at": started.isoformat(timespec="seconds"), **run}
        while any(folder.glob(f"integration_results_{started:%Y%m%d_%H%M%S}.json*")):
            started += timedelta(seconds=1)
        self.path = folder / f"integration_results_{started:%Y%m%d_%H%M%S}.json.partial"
        self._separator, self._synced = "", time.monotonic()
        self._failure: OSError | None = None
        try:
            self._file = open(self.path, "xb", opener=_open_private)  # noqa: SIM115
            self._write(f'{{\n"run": {to_json(run)},\n"results": [\n')
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise OSError(f"RESULTS_DIR cannot be written: {error}") from error

    def add(self, line: str, *, at_once: bool = True) -> None:
        """Add a user's line. Where nobody was told, it need not be written at once."""
        self._write(self._separator + line, at_once=at_once)
        self._separator = ",\n"

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._write(f'\n],\n"summary": {to_json(summary)}\n}}\n')
        os.fsync(self._file.fileno())
        self._file.close()
        self.path = self.path.rename(self.path.with_suffix(""))

    def _write(self, text: str, *, at_once: bool = True) -> None:
        if self._failure:
            raise self._failure
        try:
            # A reply may hold half a surrogate pair, which UTF-8 cannot: backslashreplace makes it JSON's own escape.
            self._file.write(text.encode("utf-8", "backslashreplace"))
            if at_once:
                self._file.flush()
            if at_once and time.monotonic() - self._synced > 1:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            advice = "make room, or change RESULTS_DIR; users whom only the log names are sent again by the next run"
            self._failure = OSError(f"{self.path} cannot be written ({error}): {advice}")
            raise self._failure from error


# The memory of --changed-only: what the results files of the folder say


def verdict(line: Mapping[str, Any]) -> str:
    """What the memory keeps of a user's line: the fingerprint after a success, else also the status and why."""
    if line["status"] == "success":
        return str(line["fingerprint"])
    calls = [line[name] for name in ("users_update", "events_track") if line[name] and not line[name]["ok"]]
    reasons = [[call[key] for key in ("endpoint", "status", "code", "message")] for call in calls]
    return to_json([line["status"], line["fingerprint"], line.get("problem"), reasons])


def read_memory(folder: Path) -> dict[str, str]:
    """The last verdict on each user id. What is damaged is skipped with a warning: its users are sent again.

    Dry runs told nobody. A user who was not attempted keeps the verdict there was, unless that is of other payloads: a
    bulk call may have told these. Raises OSError for a file that can be read in part only.
    """
    memory: dict[str, str] = {}
    for _, _, path, mode in _earlier_runs(folder, complain=True):
        if mode != "send":
            continue
        killed, damaged = path.suffix == ".partial", 0
        with path.open(encoding="utf-8", errors="surrogateescape") as lines:
            for text in lines:
                if text.startswith('{"') and not _remember(text, memory):  # only a user's line begins so
                    damaged += text.endswith("\n") or not killed  # a run that was killed leaves its last line torn
        if damaged:
            log.warning("%s is used as memory in part: %d line(s) are damaged", path, damaged)
    return memory


def _remember(text: str, memory: dict[str, str]) -> bool:
    """Take a user's line into the memory; False where it is damaged."""
    try:
        line, _ = raw_decode(text)  # what follows it, but for a comma, is the rest of a lost line
        user, fingerprint = str(line["user_id"]), line["fingerprint"]
        if line["status"] != "not_attempted" or (fingerprint and fingerprint not in memory.get(user, "")):
            memory[user] = verdict(line)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def _earlier_runs(folder: Path, *, complain: bool = False) -> list[tuple[int, float, Path, str]]:
    """Number, start, path and mode of each results file, in the order of the runs: a copy changes every time stamp."""
    runs = []
    paths = [*folder.glob("integration_results_*.json"), *folder.glob("integration_results_*.json.partial")]
    for path in sorted(paths):
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                lines.readline()
                run = json.loads("{" + lines.readline().rstrip(",\n") + "}")["run"]
            started = datetime.fromisoformat(run["started_at"]).timestamp()
            runs.append((int(run.get("number", 0)), started, path, str(run["mode"])))
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if complain and path.suffix != ".partial":  # that may be of a run that was killed at once
                log.warning("%s is not a results file of this program, and not used: %s", path, error)
    return sorted(runs)
