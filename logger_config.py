"""Logging for the whole program: the console, one rotating file, and no secret in either."""

from __future__ import annotations

import contextlib
import html
import json
import logging
import logging.handlers
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

MAX_BYTES = 10_000_000
OLD_FILES = 5
PRIVATE = 0o600
FILE_ONLY = {"file_only": True}
"""The `extra` of a record that is for the log file and not for the console."""
FILE_ONLY_MORE = {**FILE_ONLY, "more": True}
"""The same, of a record that is written with the next one: each write costs a run of many threads a pause."""

_SHORTEST_SECRET = 4
_LONG_SECRET = 16
_MOST_OPTIONAL = 64  # characters: Python's regular expressions nest to a few hundred
_MARKS = re.compile("[✓✗⚠] ?")
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}

log = logging.getLogger(__name__)


def _forms(secret: str) -> set[str]:
    """A secret as it is, and as JSON, Python, an address, HTML and this log write it."""
    in_json = (json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
    octets = secret.encode("utf-8", "surrogatepass")
    in_address = (quote(octets, safe=""), quote(octets), quote_plus(octets))
    return {secret, *in_json, *in_address, repr(secret)[1:-1], html.escape(secret), secret.translate(_CONTROLS)}


def _beginnings(form: str) -> str:
    """A pattern for the first half of a text and more, as where an answer breaks off."""
    half = len(form) // 2
    tail = ""
    for character in reversed(form[half : half + _MOST_OPTIONAL]):
        tail = f"(?:{re.escape(character)}{tail})?"
    return re.escape(form[:half]) + tail


class Redactor:
    """Replaces every secret in a text, also where it is escaped, in other case, or, when it is long, breaks off.

    Secrets of fewer than 4 characters are left: they stand inside ordinary words, and the gaps would spell them out.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets if len(secret) >= _SHORTEST_SECRET for form in _forms(secret)}
        by_length = sorted(forms, key=len, reverse=True)
        parts = [*map(re.escape, by_length), *(_beginnings(form) for form in by_length if len(form) >= _LONG_SECRET)]
        self._pattern = re.compile("|".join(parts) or r"(?!)", re.IGNORECASE)

    def __call__(self, text: str) -> str:
        return self._pattern.sub("[secret]", text)


def setup_logger(
    level: str = "INFO", log_file: Path | None = None, *, quiet: bool = False, redact: Callable[[str], str] = str
) -> OSError | None:
    """Configure logging for the whole process, at the root (contract 2 and 6). Modules use `getLogger(__name__)`.

    `level` is that of the log file; the console (standard output) shows INFO and above, with `quiet` WARNING and
    above. An exception that nobody caught is logged, too.

    Returns why the log file cannot be opened, if it cannot; then, and without `log_file`, there is only the console.
    """
    console = _Console(sys.stdout)
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    console.addFilter(lambda record: not getattr(record, "file_only", False))
    console.setFormatter(_Formatter("%(message)s", redact, marks=console.shows("✓✗⚠")))
    handlers: list[logging.Handler] = [console]
    problem = None
    try:
        handlers += [_log_file(log_file, level, redact)] if log_file else []
    except OSError as error:
        problem = error
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # facts that no line shows
    logging.basicConfig(level=min(handler.level for handler in handlers), handlers=handlers, force=True)
    for package in ("urllib3", "mysql.connector"):  # what they tell is said again, in better words, by our modules
        logging.getLogger(package).setLevel(logging.ERROR)
    sys.excepthook = lambda kind, error, trace: log.critical("Unexpected error", exc_info=(kind, error, trace))
    return problem


def _log_file(path: Path, level: str, redact: Callable[[str], str]) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _PrivateLogFile(path, maxBytes=MAX_BYTES, backupCount=OLD_FILES, encoding="utf-8")
    handler.setLevel(level)
    handler.addFilter(lambda record: record.msg != "")  # empty lines are for the console
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(module)s: %(message)s", redact))
    return handler


class _Formatter(logging.Formatter):
    """One line a record: no secret, and no control character by which a row or reply could forge lines."""

    default_time_format = "%Y-%m-%dT%H:%M:%S%z"
    default_msec_format = None

    def __init__(self, layout: str, redact: Callable[[str], str], *, marks: bool = True) -> None:
        super().__init__(layout)
        self._redact, self._marks = redact, marks

    def formatMessage(self, record: logging.LogRecord) -> str:
        if not record.message.isprintable():
            record.message = record.message.translate(_CONTROLS)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        text = self._redact(super().format(record))
        return text if self._marks else _MARKS.sub("", text)


class _Console(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 has no StreamHandler[...]
    """A console that may lack characters, or go away (`| head`, a closed terminal): the run goes on without."""

    def shows(self, characters: str) -> bool:
        with contextlib.suppress(AttributeError):  # not a real console, or none
            self.stream.reconfigure(errors="backslashreplace")
        try:
            characters.encode(getattr(self.stream, "encoding", None) or "ascii")
        except UnicodeEncodeError:
            return False
        return True

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        # What is left in its buffer would fail once more at exit, and make the exit code 120.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class _PrivateLogFile(logging.handlers.RotatingFileHandler):
    """A rotating log with mode 0600. When it cannot be written, the console says so, once, and the run goes on."""

    _failed = False
    _more = False

    def emit(self, record: logging.LogRecord) -> None:
        self._more = getattr(record, "more", False)
        super().emit(record)

    def flush(self) -> None:
        if not self._more:
            super().flush()

    def _open(self) -> Any:
        def private(name: str, flags: int) -> int:
            descriptor = os.open(name, flags, PRIVATE)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):  # and not /dev/null
                os.fchmod(descriptor, PRIVATE)
            return descriptor

        return open(self.baseFilename, self.mode, encoding="utf-8", errors="backslashreplace", opener=private)

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        # The original formats every record once more to know its size.
        status = os.fstat(self.stream.fileno()) if self.stream and not self._more else None
        return bool(status and stat.S_ISREG(status.st_mode) and 0 < self.maxBytes <= status.st_size)

    def doRollover(self) -> None:
        try:
            super().doRollover()
        except OSError:
            self.maxBytes = 0  # one file that grows, rather than lines that are lost
            self.handleError(None)

    def handleError(self, record: logging.LogRecord | None) -> None:
        if not self._failed:
            self._failed = True
            log.error("The log file %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])
