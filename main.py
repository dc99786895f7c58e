"""Send every pro customer's latest view of the pricing or settings page to Iterable.

One run reads the rows of Query 2, updates each user and sends the view as an event, and
leaves a results file and a log. README.md tells how to use it; its section Development
is the map of the code.
"""

from __future__ import annotations

import signal

# Until `listen_for_signals`, Ctrl-C ends the process without a traceback. Where it is
# ignored, as in the background job of a script, it stays so.
if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import difflib
import functools
import gc
import hashlib
import importlib
import io
import logging
import os
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import IntEnum
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


# Installation

# The packages with the module that is imported, and the oldest version that works.
PACKAGES = {
    "mysql-connector-python": ("mysql.connector", "9.2"),
    "python-dotenv": ("dotenv.parser", "1.0"),
    "urllib3": ("urllib3", "2.2"),
    "requests": ("requests", "2.32"),
}
INSTALL = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt,"
    " then .venv/bin/python main.py"
)


def find_installation_fault() -> str | None:
    """Return what keeps the program from starting, and the cure."""
    if sys.version_info < (3, 10):  # noqa: UP036 - older ones come this far
        return f"Python 3.10 or newer is needed; {sys.executable} is older"
    if sys.platform == "win32":
        return "This program runs on Linux and macOS; on Windows, start it under WSL"
    for module in ("fcntl", "ssl", "zlib"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{sys.executable} lacks a part ({error}): use another Python"
    for module in ("db_connection", "iterable_client", "logger_config"):
        if not (HERE / f"{module}.py").is_file():
            return f"{module}.py is missing in {HERE}: copy the whole folder"
    for package, (module, oldest) in PACKAGES.items():
        try:
            # It is None if pip was interrupted.
            version = metadata.version(package) or "(unknown)"
            if parse_version(version) < parse_version(oldest):
                fault = f"{package} {version} is installed"
                return f"{fault}, {oldest} or newer is needed: {INSTALL}"
            importlib.import_module(module)
        except metadata.PackageNotFoundError:
            python = sys.executable
            return f"The package {package} is not installed for {python}: {INSTALL}"
        except ImportError as error:
            return f"{package} cannot be imported ({error}): {INSTALL}"
    return None


def parse_version(text: str) -> list[int]:
    """Return the numbers of a version."""
    numbers = re.findall("[0-9]+", text)
    return [int(number) for number in numbers]


if __name__ == "__main__":
    installation_fault = find_installation_fault()
    if installation_fault is not None:
        sys.stderr.write(f"{installation_fault}\n")
        sys.exit(2)
    if str(HERE) not in sys.path:  # python -P or -I leaves it out
        sys.path.insert(0, str(HERE))

import resource  # which Windows lacks, so it comes after the check

from dotenv.parser import parse_stream

from db_connection import (
    DatabaseConnection,
    DatabaseError,
    PageViewRow,
    QueryFileError,
    read_query,
)
from iterable_client import (
    EVENTS_TRACK,
    USER_FIELD_TYPES,
    USERS_UPDATE,
    Call,
    CallResult,
    IdentifyBy,
    Identity,
    IterableClient,
    IterableUnavailable,
    KeyRefused,
    NetworkSettingsError,
    NoRoomForThread,
    RetryPolicy,
    RunControl,
    Sender,
    UnusableRow,
    UserCalls,
    encode_payload,
    explaining_no_thread,
    identify,
    make_event_payload,
    make_reset_payload,
    make_user_payload,
    normalize_email,
    parse_api_key,
    parse_base_url,
    require_thread_room,
)
from logger_config import (
    CONSOLE_ONLY,
    FILE_ONLY,
    PROGRESS,
    CallLine,
    EarlierResultsUnreadable,
    FolderInUse,
    FolderNotUsable,
    LogNotWritable,
    Memory,
    ResultsFile,
    ResultsNotWritable,
    SentUser,
    Status,
    UserLine,
    build_redactor,
    lock_results_folder,
    setup_logger,
    to_json,
)

QUERIES = HERE / "phase2_queries.sql"

log = logging.getLogger(__name__)


# How a run ends


class ExitCode(IntEnum):
    """How the process ends. A run that a signal stops ends with 128 + its number."""

    SUCCESS = 0
    NOT_ALL_DELIVERED = 1
    SETTINGS = 2
    DATABASE = 3
    GIVEN_UP = 4
    LOCKED = 75


class SettingsError(Exception):
    """Settings are missing or wrong. The text names all of them, and no secret."""


class TooFewUsers(Exception):
    """The query found fewer users than --at-least."""


class Interrupted(Exception):
    """A signal stopped the run."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"Stopped by {name}")
        self.number = number


class CheckFailed(Exception):
    """An item of the checklist is not as a run needs it."""


# The errors that end a run, or keep it from starting. Their text says all.
EXIT_CODES: dict[type[Exception], ExitCode] = {
    SettingsError: ExitCode.SETTINGS,
    QueryFileError: ExitCode.SETTINGS,
    LogNotWritable: ExitCode.SETTINGS,
    FolderNotUsable: ExitCode.SETTINGS,
    EarlierResultsUnreadable: ExitCode.SETTINGS,
    NetworkSettingsError: ExitCode.SETTINGS,
    DatabaseError: ExitCode.DATABASE,
    TooFewUsers: ExitCode.DATABASE,
    KeyRefused: ExitCode.GIVEN_UP,
    IterableUnavailable: ExitCode.GIVEN_UP,
    FolderInUse: ExitCode.LOCKED,
    ResultsNotWritable: ExitCode.NOT_ALL_DELIVERED,
    NoRoomForThread: ExitCode.NOT_ALL_DELIVERED,
    CheckFailed: ExitCode.NOT_ALL_DELIVERED,
}


class Ending(NamedTuple):
    """How a run ended. `why` is empty unless something ended it early."""

    outcome: str
    exit_code: int
    why: str = ""


def explain_ending(error: Exception) -> Ending:
    """Return how a run ends because of an error. An unforeseen one is logged."""
    if isinstance(error, Interrupted):
        return Ending("interrupted", 128 + error.number, str(error))
    for error_class, exit_code in EXIT_CODES.items():
        if isinstance(error, error_class):
            return Ending("aborted", exit_code, str(error))
    log.critical("Unexpected error", exc_info=error, extra=FILE_ONLY)
    why = f"unexpected error {error!r}: see the log file"
    if isinstance(error, MemoryError):
        why = "out of memory: raise ulimit -v, or lower MAX_WORKERS"
    return Ending("aborted", ExitCode.NOT_ALL_DELIVERED, why)


# Settings

Parser = Callable[[str], Any]  # raises ValueError for a text that it does not take


def check_text(text: str) -> None:
    """Raise ValueError if it is in quotes, has a byte-order mark, or is not text."""
    # Half a surrogate pair stands for a byte that is not UTF-8.
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError("is not text")
    if "\ufeff" in text:
        raise ValueError("has a byte-order mark in it: save it as UTF-8 without one")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        raise ValueError("is in quotes, which would be part of it: leave them out")


def parse_choice(*choices: str) -> Parser:
    """Return a parser that takes one of these texts."""

    def parse(text: str) -> str:
        for choice in choices:
            if text == choice:
                return choice
        names = ", ".join(choices)
        raise ValueError(f"must be one of {names}")

    return parse


def parse_path(text: str) -> Path:
    """Return a path; a relative one begins at the folder of main.py.

    Raises ValueError for what would not be expanded. `text` is not empty.
    """
    check_text(text)
    if text[0] in "$%'\"":  # as in $HOME, in %S of systemd, or in quotes
        raise ValueError(f"begins with {text[0]}, which would be taken as it stands")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError("begins with ~, but there is no such home: write it in full")
    return HERE / expanded


def parse_ca_file(text: str) -> str:
    """Return the path of a CA file, or "" for none. Raises ValueError."""
    if not text:
        return ""
    path = str(parse_path(text))
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise ValueError("is no file")
    return path


def parse_whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser that takes whole numbers between these."""

    def parse(text: str) -> int:
        is_number = re.fullmatch("[0-9]{1,9}", text)
        if not is_number or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def parse_seconds(text: str) -> float:
    """Return a number of seconds. Raises ValueError."""
    is_number = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text)
    if not is_number or not 0.1 <= float(text) <= 3600:
        raise ValueError("must be a number from 0.1 to 3600")
    return float(text)


def setting(
    parse: Parser, default: str | None = None, *, is_secret: bool = False
) -> Any:
    """Return a field of Settings. A variable without a default is required."""
    facts = {"parse": parse, "default": default, "is_secret": is_secret}
    return field(repr=not is_secret, metadata=facts)


@dataclass(frozen=True)
class Settings:
    """Each field has the value of the variable of that name, in capitals.

    Times are in seconds, paths absolute.
    """

    db_host: str = setting(str)
    db_user: str = setting(str)
    db_password: str = setting(str, is_secret=True)
    db_name: str = setting(str)
    db_port: int = setting(parse_whole_number(1, 65535), "3306")
    db_ssl_ca: str = setting(parse_ca_file, "")
    iterable_api_key: str = setting(parse_api_key, is_secret=True)
    iterable_api_base_url: str = setting(parse_base_url, "https://api.iterable.com")
    # IdentifyBy is a str: the parser returns its member.
    iterable_identify_by: IdentifyBy = setting(parse_choice(*IdentifyBy), "email")
    iterable_rate_limit: int = setting(parse_whole_number(1, 100_000), "450")
    iterable_max_attempts: int = setting(parse_whole_number(1, 100), "5")
    iterable_timeout: float = setting(parse_seconds, "30")
    max_workers: int = setting(parse_whole_number(1, 2000), "300")
    log_level: str = setting(parse_choice("DEBUG", "INFO", "WARNING", "ERROR"), "INFO")
    log_file: Path = setting(parse_path, "iterable_integration.log")
    results_dir: Path = setting(parse_path, ".")


# By the names of their variables. Each secret may also be <NAME>_FILE.
SETTINGS = {each.name.upper(): each for each in fields(Settings)}
SECRETS = [name for name, each in SETTINGS.items() if each.metadata["is_secret"]]
# Proxies and CA files may be set in the file, too.
NETWORK_VARIABLES: dict[str, Parser] = {
    "HTTPS_PROXY": str,
    "ALL_PROXY": str,
    "NO_PROXY": str,
    "REQUESTS_CA_BUNDLE": parse_path,
    "CURL_CA_BUNDLE": parse_path,
}


def read_env_file(path: Path, complaints: list[str]) -> dict[str, str]:
    """Return what the file sets. A ${...} in it stays as it is.

    A line that cannot be read is added to the complaints. Raises SettingsError if no
    line can.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(
            f"The settings in {path} cannot be read ({error.strerror}):"
            " check --env-file and the file's permissions"
        ) from error
    if b"\0" in content:
        raise SettingsError(f"{path} is not in UTF-8 (in UTF-16?): save it as UTF-8")
    text = content.decode("utf-8-sig", "surrogateescape")
    values = {}
    for binding in parse_stream(io.StringIO(text)):
        name = binding.key or ""
        # Bytes that are not UTF-8, or a no-break space, are not printable.
        if binding.error or not name.isprintable():
            line = binding.original.line
            complaints.append(f"line {line} of {path} cannot be read")
        elif name and binding.value is not None:
            values[name] = binding.value
    return values


def read_secret(name: str, values: Mapping[str, str]) -> str | None:
    """Return a secret, from the file that <NAME>_FILE names if that is set.

    One line break at the end of the file is no part of it. Raises ValueError.
    """
    variable = f"{name}_FILE"
    secret = values.get(name)
    file = values.get(variable, "").strip()
    if not file:
        return secret
    if secret:
        raise ValueError(f"{name} and {variable} are both set: keep one of them")
    try:
        content = parse_path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{variable} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{variable} {error}") from None
    text = content.decode("utf-8", "surrogateescape")  # other bytes are found later
    if not text.strip() and name != "DB_PASSWORD":
        raise ValueError(f"{variable} names an empty file")
    return re.sub(r"\r?\n\Z", "", text)


def read_setting(name: str, values: Mapping[str, str]) -> Any:
    """Return the parsed value of a variable. Raises ValueError."""
    facts = SETTINGS[name].metadata
    text = values.get(name)
    if facts["is_secret"]:
        text = read_secret(name, values)
    if name != "DB_PASSWORD":  # which may be empty, or have spaces around it
        text = (text or "").strip() or facts["default"]
    if text is None:
        state = "empty" if name in values else "missing"
        raise ValueError(f"{name} is {state}")
    try:
        check_text(text)
        return facts["parse"](text)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def find_network_variables(
    from_file: Mapping[str, str], environ: Mapping[str, str], complaints: list[str]
) -> dict[str, str]:
    """Return the proxy and CA variables that only the file sets.

    They may be in lower case. What is wrong with one is added to the complaints.
    """
    set_already = {name.upper() for name in environ}
    found = {}
    for name, text in from_file.items():
        variable = name.upper()
        parse = NETWORK_VARIABLES.get(variable)
        if parse is None or not text or variable in set_already:
            continue
        try:
            found[name] = str(parse(text))
        except ValueError as error:
            complaints.append(f"{name} {error}")
    return found


# From this ratio of difflib on, a name counts as a setting's, misspelt.
MIN_LIKENESS = 0.72
# A name of so many characters counts if it contains a setting's, or is a part of one.
# Shorter ones are parts of too many.
MIN_LENGTH = 6


def find_misspelt_names(names: Iterable[str]) -> list[str]:
    """Return a sentence for each name that resembles a setting's and is none."""
    secret_files = [f"{name}_FILE" for name in SECRETS]
    known = [*SETTINGS, *NETWORK_VARIABLES, *secret_files]
    hints = []
    for name in names:
        upper = name.upper()
        if name in known or upper in NETWORK_VARIABLES:
            continue
        # In a line DB_PASSWORD:c2VjcmV0= the name holds the secret: no hint shows it.
        if not re.fullmatch("[A-Z0-9_]+", upper):
            continue
        similar = difflib.get_close_matches(upper, known, 1, MIN_LIKENESS)
        if len(name) >= MIN_LENGTH:
            parts = [each for each in known if each in upper or upper in each]
            similar = parts + similar
        if similar:
            hints.append(f"{name} is no setting: did you mean {similar[0]}?")
    return hints


def load_environment_variables(
    env_file: Path | str | None = None,
    environ: MutableMapping[str, str] = os.environ,
    *,
    needs_key: bool = True,
) -> Settings:
    """Return the settings of the environment, else of the file.

    `env_file` is relative to the folder of main.py; without it `.env` is read, if it
    exists. The proxy and CA variables of the file are added to the environment, where
    requests looks for them. Raises SettingsError for all complaints together.
    """
    path = HERE / ".env"
    if env_file is not None:
        path = HERE / os.path.expanduser(env_file)
    from_file: dict[str, str] = {}
    complaints: list[str] = []
    if env_file is not None or path.exists():
        from_file = read_env_file(path, complaints)
    values = {**from_file, **environ}
    parsed: dict[str, Any] = {}
    for name in SETTINGS:
        try:
            parsed[name.lower()] = read_setting(name, values)
        except ValueError as complaint:
            if name == "ITERABLE_API_KEY" and not needs_key:
                parsed["iterable_api_key"] = ""
            else:
                complaints.append(str(complaint))
    network_variables = find_network_variables(from_file, environ, complaints)
    hints = find_misspelt_names(from_file)
    if complaints:
        text = "; ".join(complaints + hints)
        place = f"in the environment or in {path}"
        raise SettingsError(f"Settings: {text}. Set them {place} (see .env.example)")
    for hint in hints:
        # No warning, which cron would mail. The log file is not open yet.
        log.info("⚠ %s", hint)
    environ.update(network_variables)
    return Settings(**parsed)


# The command line


class Options(argparse.Namespace):
    """The options of the command line."""

    dry_run: bool
    limit: int | None
    at_least: int | None
    changed_only: bool
    reset_left: bool
    bulk: bool
    check: bool
    quiet: bool
    env_file: str | None


def parse_count(text: str) -> int:
    """Return a number of users. Raises argparse.ArgumentTypeError."""
    parse = parse_whole_number(1, 999_999_999)
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(argv: Sequence[str] | None) -> Options:
    """Return the options. Ends the process with 2 and a sentence if they are wrong."""
    parser = argparse.ArgumentParser(
        description="Send every pro customer's latest view of the pricing or settings"
        " page to Iterable.",
        allow_abbrev=False,
    )
    add_flag = functools.partial(parser.add_argument, action="store_true")
    add_count = functools.partial(parser.add_argument, type=parse_count, metavar="N")
    add_flag("--dry-run", help="do everything except sending; needs no API key")
    add_count("--limit", help="send the first N users only (a careful first real run)")
    add_count("--at-least", help="send nothing when fewer than N users are found")
    add_flag("--changed-only", help="skip users to whom the same was delivered already")
    add_flag("--reset-left", help="also reset the field of users who left the segment")
    add_flag("--bulk", help="send groups of up to 1000 users: for large runs")
    add_flag("--check", help="check the deployment; send no user data")
    add_flag(
        "--quiet",
        help="show warnings and errors only; with --changed-only, no failure that an"
        " earlier run had already",
    )
    parser.add_argument(
        "--env-file",
        metavar="PATH",
        help="read the settings from this file, relative to main.py, and not from .env",
    )
    options = parser.parse_args(argv, Options())
    if options.reset_left and options.limit is not None:
        parser.error(
            "--reset-left and --limit exclude each other: the users beyond the limit"
            " would look as if they had left"
        )
    if options.check:
        for name, value in vars(options).items():
            if value and name not in ("check", "quiet", "env_file"):
                parser.error("--check goes with --quiet and --env-file only")
    return options


# A user's delivery

Value = int | str | None  # of a column


class Reason(NamedTuple):
    """Why a user failed. The summary counts users who have the same reason.

    `brief` is for the user's line: the call with its answer, or what is wrong with the
    row. `text` is for the summary: what happened, and what to do. `endpoint` is None if
    no call failed, `status` if there was no answer.
    """

    brief: str
    text: str
    endpoint: str | None = None
    status: int | None = None
    code: str | None = None


def make_reason(result: CallResult) -> Reason:
    """Return why a call failed."""
    answer = "no answer"
    if result.is_unexpected:
        answer = "unexpected error"
    if result.status is not None:
        answer = str(result.status)
    brief = f"{result.endpoint} {answer}"
    if result.code:
        brief += f" {result.code}"
    return Reason(brief, result.reason, result.endpoint, result.status, result.code)


def make_call_line(result: CallResult | None) -> CallLine | None:
    """Return a call's part of a user's line; None if the call was not made."""
    if result is None:
        return None
    return {
        "endpoint": result.endpoint,
        "ok": result.ok,
        "status": result.status,
        "code": result.code,
        "message": result.message,
        "attempts": result.attempts,
    }


@dataclass(slots=True)
class Delivery:
    """A user of this run: what is to be sent, and what became of it.

    `calls` is None when none are to be made: the row cannot be sent (`problem`), the
    user is skipped (`skipped_as`), or the run is ending.
    """

    number: int  # from 1
    user_id: int | str
    email: Value  # normalised; of a row that cannot be sent, as the row has it
    event_id: str | None = None
    fingerprint: str | None = None
    calls: UserCalls | None = None
    problem: UnusableRow | None = None
    skipped_as: Status | None = None
    payloads: Mapping[str, Any] | None = None  # of a dry run, by the calls' names
    # An earlier run had this failure, too. Only with --quiet and --changed-only.
    is_known: bool = False

    @property
    def results(self) -> list[CallResult]:
        """The results of the user's calls, without those of an unclear group."""
        if self.calls is None:
            return []
        return self.calls.results

    @property
    def status(self) -> Status:
        """What became of the user, by the results that there are."""
        if self.problem is not None:
            return Status.TOTAL_FAILURE
        if self.skipped_as is not None:
            return self.skipped_as
        results = self.results
        if not results:
            return Status.NOT_ATTEMPTED
        if any(result.is_forgotten for result in results):
            return Status.FORGOTTEN
        if not any(result.ok for result in results):
            return Status.TOTAL_FAILURE
        if self.event_id is None:  # the user left the segment
            return Status.RESET
        if len(results) == 2 and all(result.ok for result in results):
            return Status.SUCCESS
        return Status.PARTIAL_FAILURE

    @property
    def reasons(self) -> list[Reason]:
        """Why the user failed, one for each call that did; none for the others."""
        if self.problem is not None:
            return [Reason(self.problem.brief, str(self.problem))]
        if not self.status.is_failure:
            return []
        reasons = [make_reason(result) for result in self.results if not result.ok]
        if not reasons:  # the update was accepted, and the event never sent
            not_sent = "events/track not sent: the run ended before"
            reasons.append(Reason(not_sent, not_sent))
        return reasons

    def make_line(self) -> UserLine:
        """Return the user's line in the results file."""
        line: UserLine = {
            "record": self.number,
            "user_id": self.user_id,
            "email": self.email,
            "event_id": self.event_id,
            "status": self.status.value,
            "users_update": None,
            "events_track": None,
            "fingerprint": self.fingerprint,
        }
        if self.calls is not None:
            # With the provisional ones, of which the memory must know.
            results = {call.endpoint: call.result for call in self.calls.calls}
            line["users_update"] = make_call_line(results.get(USERS_UPDATE))
            line["events_track"] = make_call_line(results.get(EVENTS_TRACK))
        if self.problem is not None:
            line["problem"] = str(self.problem)
        if self.payloads is not None:
            line["payloads"] = self.payloads
        return line


class Leaver(NamedTuple):
    """A user who left the segment and is still a customer."""

    user_id: int | str
    email: Value


User = PageViewRow | Leaver


@dataclass
class DeliveryPlanner:
    """Decides what is to be sent to a user.

    Two customers with one identity, or two rows of one view, would overwrite each
    other: only the first is sent.
    """

    settings: Settings
    memory: Memory
    options: Options
    # The customers of the rows so far.
    customer_by_identity: dict[Identity, int | str] = field(default_factory=dict)
    customer_by_event: dict[str, int | str] = field(default_factory=dict)

    def plan(self, number: int, user: User) -> Delivery:
        """Return what is to be sent to a user, or why nothing can be."""
        row = user._asdict()
        user_id = user.user_id
        identify_by = self.settings.iterable_identify_by
        event = None
        try:
            identity = identify(row, identify_by)
            if isinstance(user, Leaver):
                update = make_reset_payload(identity)
            else:
                update = make_user_payload(row, identity)
                event = make_event_payload(row, identity)
                self._claim(identity, event["id"], user_id)
        except UnusableRow as problem:
            return Delivery(number, user_id, user.email, problem=problem)
        calls = [Call(USERS_UPDATE, identity, encode_payload(update))]
        if event is not None:
            calls.append(Call(EVENTS_TRACK, identity, encode_payload(event)))
        email = normalize_email(user.email) or None
        delivery = Delivery(number, user_id, email)
        if event is not None:
            delivery.event_id = event["id"]
        fingerprint = self._compute_fingerprint(calls)
        delivery.fingerprint = fingerprint
        is_delivered = self.memory.has_delivered(user_id, fingerprint)
        if self.options.changed_only and is_delivered:
            delivery.skipped_as = Status.UNCHANGED
        elif self.options.dry_run:
            delivery.skipped_as = Status.WOULD_SEND
            delivery.payloads = {"users_update": update, "events_track": event}
        else:
            delivery.calls = UserCalls(number, calls)
        return delivery

    def _claim(self, identity: Identity, event_id: str, user_id: int | str) -> None:
        """Note whose the identity and the view are. Raises UnusableRow if taken."""
        if identity in self.customer_by_identity:
            other = self.customer_by_identity[identity]
            if str(other) == str(user_id):
                raise UnusableRow("it has two rows", "make customers.id unique")
            raise UnusableRow(f"customer {other} has the same address", "merge the two")
        if event_id in self.customer_by_event:
            other = self.customer_by_event[event_id]
            problem = f"customer {other} has the same page view"
            raise UnusableRow(problem, "make page_views.id unique")
        self.customer_by_identity[identity] = user_id
        self.customer_by_event[event_id] = user_id

    def _compute_fingerprint(self, calls: list[Call]) -> str:
        """Return a hash of the payloads, the project and its key."""
        settings = self.settings
        payloads = [call.payload for call in calls]
        project = [settings.iterable_api_base_url, settings.iterable_api_key]
        content = " ".join(payloads + project)
        return hashlib.sha256(content.encode()).hexdigest()


# Counting and reporting

MANY_USERS = 100  # with more, the console shows progress and not each success
LARGE_RUN = 5000  # with more users, a run without --bulk says how long it will take
PROGRESS_SECONDS = 2.0  # between two lines of progress
MAX_SHOWN_FAILURES = 20  # on the console, of many users
MAX_SHOWN_REASONS = 10  # in the summary
MAX_SHOWN_PAYLOADS = 3  # users of a dry run
MAX_SHOWN_NAME = 320  # characters of an address, the most that one has

EVERYWHERE: dict[str, str] = {}  # the `extra` of a line for console and log file

# A user's line on the console and in the log. With any other status a user has none.
LINE_WORDS = {
    Status.SUCCESS: "✓ Successfully processed user",
    Status.PARTIAL_FAILURE: "⚠ Partially processed user",
    Status.TOTAL_FAILURE: "✗ Failed user",
    Status.FORGOTTEN: "Forgotten at the user's own request, so not sent",
    Status.RESET: "✓ Left the segment, recent_page_view reset",
}
# The counts that the summary of a real run shows even if they are 0. The words are from
# the exercise: the last count has also rows that cannot be sent, and failed resets.
RUN_WORDS = {
    Status.SUCCESS: "✓ Successful (both API calls)",
    Status.PARTIAL_FAILURE: "⚠ Partial failures (one call failed)",
    Status.TOTAL_FAILURE: "✗ Total failures (both calls failed)",
}
# The counts that the summary of a dry run shows even if they are 0.
DRY_RUN_WORDS = {
    Status.WOULD_SEND: "Would send",
    Status.TOTAL_FAILURE: "Cannot be sent",
}
# The counts that both show unless they are 0.
OTHER_WORDS = {
    Status.FORGOTTEN: "Forgotten at their own request",
    Status.RESET: "Left the segment, recent_page_view reset",
    Status.UNCHANGED: "Unchanged since they were delivered, not sent again",
    Status.NOT_ATTEMPTED: "Not attempted",
}


class Tally:
    """Counts what became of the users of a run."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.counts: Counter[Status] = Counter()
        self.events_to_send = 0  # in a dry run
        # How many users failed for which reason. Those whose failure an earlier run had
        # already are counted separately.
        self.new_reasons: Counter[Reason] = Counter()
        self.known_reasons: Counter[Reason] = Counter()
        self._began = time.monotonic()

    @property
    def failures(self) -> int:
        """How many users failed."""
        counts = self.counts
        return counts[Status.PARTIAL_FAILURE] + counts[Status.TOTAL_FAILURE]

    @property
    def seconds(self) -> float:
        """How long the run has taken so far."""
        return time.monotonic() - self._began

    def count(self, delivery: Delivery) -> None:
        """Count a user. Two calls that failed for the same reason count once."""
        status = delivery.status
        self.counts[status] += 1
        if status is Status.WOULD_SEND and delivery.event_id is not None:
            self.events_to_send += 1
        reasons: dict[str, Reason] = {}
        for reason in delivery.reasons:
            reasons.setdefault(reason.text, reason)
        counter = self.new_reasons
        if delivery.is_known:
            counter = self.known_reasons
        counter.update(reasons.values())

    def compute_speed(self, seconds: float) -> float:
        """Return how many users a second there were, without those left alone."""
        if seconds == 0:
            return 0.0
        counts = self.counts
        left_alone = counts[Status.UNCHANGED] + counts[Status.NOT_ATTEMPTED]
        done = counts.total() - left_alone
        return round(done / seconds, 1)

    def make_summary(
        self, ending: Ending, client: IterableClient, seconds: float
    ) -> dict[str, Any]:
        """Return the summary of the results file."""
        counts = self.counts
        untried = counts[Status.NOT_ATTEMPTED]
        untried += counts[Status.WOULD_SEND]  # a dry run attempts nobody
        return {
            "outcome": ending.outcome,
            "exit_code": ending.exit_code,
            "total_users": self.total,
            "success": counts[Status.SUCCESS],
            "partial_failures": counts[Status.PARTIAL_FAILURE],
            "total_failures": counts[Status.TOTAL_FAILURE],
            "forgotten": counts[Status.FORGOTTEN],
            "reset": counts[Status.RESET],
            "unchanged": counts[Status.UNCHANGED],
            "not_attempted": untried,
            "calls": client.attempts_made,  # retries included
            "retries": client.retries_made,
            "duration_seconds": seconds,
            "users_per_second": self.compute_speed(seconds),
            "failure_reasons": self._list_reasons(),
        }

    def _list_reasons(self) -> list[dict[str, Any]]:
        """Return the reasons of failure, the most frequent first."""
        all_reasons = self.new_reasons + self.known_reasons
        lines = []
        for reason, count in all_reasons.most_common():
            line = {
                "endpoint": reason.endpoint,
                "status": reason.status,
                "code": reason.code,
                "message": reason.text,
                "count": count,
            }
            lines.append(line)
        return lines


def log_call(result: CallResult, label: str, level: int) -> None:
    """Write a call to the log file. `level` is for a failure, which has its answer."""
    if result.ok:
        level = logging.INFO
    log.log(level, "%s (%s)", result.headline, label, extra=FILE_ONLY)
    if not result.ok:
        answer = result.body or result.message
        answer = " ".join(answer.split())  # in one line
        log.log(level, "Response: %s", answer, extra=FILE_ONLY)


class Narrator:
    """Says on console and log what happens: users in their order, then the summary."""

    def __init__(self, tally: Tally, *, is_dry_run: bool) -> None:
        self._tally = tally
        self._is_dry_run = is_dry_run
        self._has_many = tally.total > MANY_USERS
        self._waiting: dict[int, Delivery] = {}  # by number
        self._next_number = 1
        self._shown_users = 0
        self._shown_payloads = 0
        self._last_progress = time.monotonic()

    def show(self, delivery: Delivery) -> None:
        """Show a finished user as soon as all users before are shown."""
        self._waiting[delivery.number] = delivery
        while self._next_number in self._waiting:
            next_one = self._waiting.pop(self._next_number)
            self._show_user(next_one)
            self._next_number += 1

    def _show_user(self, delivery: Delivery) -> None:
        status = delivery.status
        if status is Status.WOULD_SEND:
            self._show_payloads(delivery)
        if status not in LINE_WORDS:
            return
        destination = FILE_ONLY
        if self._is_for_console(delivery):
            destination = EVERYWHERE
            self._shown_users += 1
        record = f"record {delivery.number}/{self._tally.total}"
        address = normalize_email(delivery.email)[:MAX_SHOWN_NAME]
        name = address or f"customer {delivery.user_id}"
        line = f"{LINE_WORDS[status]}: {name}"
        if self._has_many:
            line += f" ({record})"
        else:
            if destination is EVERYWHERE:
                log.info("", extra=CONSOLE_ONLY)
            log.info("Processing %s", record, extra=destination)
        level = logging.INFO
        if status.is_failure:
            level = logging.ERROR
            briefs = ", ".join(reason.brief for reason in delivery.reasons)
            line += f": {briefs}"
        # Of many users, a success has one line in the log and not three.
        if not self._has_many or status is not Status.SUCCESS:
            for result in delivery.results:
                log_call(result, f"{record}, {name}", level)
        log.log(level, "%s", line, extra=destination)

    def _is_for_console(self, delivery: Delivery) -> bool:
        """Whether the console shows a user: of many, only the first failures."""
        if delivery.is_known:
            return False
        if not self._has_many:
            return True
        return delivery.status.is_failure and self._shown_users < MAX_SHOWN_FAILURES

    def _show_payloads(self, delivery: Delivery) -> None:
        self._shown_payloads += 1
        if self._shown_payloads > MAX_SHOWN_PAYLOADS or delivery.payloads is None:
            return
        for name, payload in delivery.payloads.items():
            if payload is not None:
                endpoint = name.replace("_", "/")  # users_update is users/update
                text = to_json(payload)
                log.info("%s %s", endpoint, text)

    def show_progress(self) -> None:
        """Show how far a long run is, about every two seconds."""
        now = time.monotonic()
        waited = now - self._last_progress
        if not self._has_many or waited < PROGRESS_SECONDS:
            return
        self._last_progress = now
        tally = self._tally
        done = tally.counts.total()
        # Skipped users count, because there may be such among those to come.
        speed = done / tally.seconds
        left = "nobody done yet"
        if done:
            seconds_left = (tally.total - done) / speed
            left = f"{seconds_left:.0f} s left"
        percent = 100 * done // tally.total
        share = f"{done}/{tally.total} ({percent} %)"
        text = f"{share}, {speed:.1f} users/s, {left}, failures: {tally.failures}"
        log.info("Progress: %s", text, extra=PROGRESS)

    def show_summary(self, ending: Ending, results: Path, seconds: float) -> None:
        """Show how the run ended. Under --quiet that is shown only if it is news."""
        tally = self._tally
        level = logging.INFO
        if ending.why or tally.new_reasons:
            level = logging.WARNING
        log.log(level, "", extra=CONSOLE_ONLY)
        if ending.why:
            log.error("The run ended early: %s", ending.why)
        # In the words of the exercise: users who were not attempted are counted, too.
        lines = ["INTEGRATION SUMMARY", f"Total users processed: {tally.total}"]
        words = RUN_WORDS
        if self._is_dry_run:
            words = DRY_RUN_WORDS
        for status, text in words.items():
            lines.append(f"{text}: {tally.counts[status]}")
        for status, text in OTHER_WORDS.items():
            count = tally.counts[status]
            if count:
                lines.append(f"{text}: {count}")
        lines += describe_reasons(tally.new_reasons, ending)
        for line in lines:
            log.log(level, "%s", line)
        for line in describe_reasons(tally.known_reasons, ending):
            log.info("%s", line, extra=FILE_ONLY)
        log.log(level, "Results: %s", results)
        speed = tally.compute_speed(seconds)
        log.log(level, "Time: %.1f s, %.1f users a second", seconds, speed)


def describe_reasons(reasons: Counter[Reason], ending: Ending) -> list[str]:
    """Return a line for each of the most frequent reasons of failure."""
    lines = []
    for reason, count in reasons.most_common(MAX_SHOWN_REASONS):
        users = f"{count} users"
        if count == 1:
            users = "1 user"
        text = reason.text
        if reason.text in ending.why:  # it is shown already
            text = reason.brief
        elif reason.endpoint is not None:  # the text does not name the call
            text = f"{reason.brief}: {text}"
        lines.append(f"  {users}: {text}")
    hidden = len(reasons) - MAX_SHOWN_REASONS
    if hidden > 0:
        lines.append(f"  More reasons, in the results file: {hidden}")
    return lines


# The machine

# Open files that a run needs besides the connections to Iterable.
OTHER_OPEN_FILES = 32


def limit_workers(max_workers: int) -> int:
    """Ask for the open files that are needed; return how many workers they allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_workers + OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return max_workers
    allowed = needed
    if hard != resource.RLIM_INFINITY:
        allowed = min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):
        allowed = soft
    workers = min(max_workers, allowed - OTHER_OPEN_FILES)
    workers = max(1, workers)
    if workers < max_workers:
        text = f"{workers} calls in flight instead of MAX_WORKERS={max_workers}"
        cause = f"this account may open {allowed} files only (ulimit -n)"
        log.info("⚠ %s: %s", text, cause)
    return workers


def tune_interpreter() -> None:
    """Let the threads of a long run hinder each other less."""
    # The rows are no garbage. To look through a million of them again and again stops
    # every thread for seconds.
    gc.freeze()
    # A thread that has an answer may have to wait this long for a busy one. With
    # Python's 5 ms, calls start bunched: one bulk run in five met a 429.
    sys.setswitchinterval(0.0005)


def listen_for_signals(control: RunControl) -> None:
    """Wait in a thread for SIGINT, SIGTERM and SIGHUP.

    Before the run has begun, the first one ends the process at once. Afterwards the
    first one stops the run in order, and the second ends the process. No other thread
    gets them: they interrupt nothing, and are heard even while the main thread blocks.
    Signals that are ignored, as under nohup, stay ignored. Raises NoRoomForThread.
    """
    signals = []
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signals.append(number)

    def listen() -> None:
        received = signal.sigwait(signals)
        if control.has_begun.is_set():
            control.end(Interrupted(received))
            received = signal.sigwait(signals)
        os._exit(128 + received)  # without a word: console or log may block

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # all later threads inherit it
    with explaining_no_thread():
        require_thread_room()  # with less, a thread may start and then hang
        threading.Thread(target=listen, daemon=True).start()


# The database and Iterable


def make_connection(settings: Settings) -> DatabaseConnection:
    """Return a connection to the database; a `with` block opens it."""
    return DatabaseConnection(
        host=settings.db_host,
        port=settings.db_port,
        user=settings.db_user,
        password=settings.db_password,
        database=settings.db_name,
        ssl_ca=settings.db_ssl_ca,
    )


def build_client(settings: Settings, control: RunControl) -> IterableClient:
    """Return the client for the project. Raises NetworkSettingsError."""
    workers = limit_workers(settings.max_workers)
    return IterableClient(
        settings.iterable_api_base_url,
        settings.iterable_api_key,
        rate=settings.iterable_rate_limit,
        timeout=settings.iterable_timeout,
        workers=workers,
        retry=RetryPolicy(settings.iterable_max_attempts),
        control=control,
        redact=build_redactor(settings.iterable_api_key, settings.db_password),
    )


def find_identity(user: User, identify_by: IdentifyBy) -> str:
    """Return the address or user ID of a user; empty if it is not usable."""
    try:
        return identify(user._asdict(), identify_by).value
    except UnusableRow:
        return ""


def find_leavers(
    database: DatabaseConnection,
    settings: Settings,
    memory: Memory,
    rows: Iterable[PageViewRow],
) -> list[Leaver]:
    """Return the users who were updated, are in no row, and are still customers.

    Deleted customers and old addresses are left alone: users/update would create a
    profile that somebody removed.
    """
    identify_by = settings.iterable_identify_by
    present = {find_identity(row, identify_by) for row in rows}
    absent = memory.find_absent(present)
    ids = [user.user_id for user in absent]
    query = read_query(QUERIES, "customers_by_id")
    addresses = database.find_customers(query, ids)
    leavers = []
    for user in absent:
        customer_id = str(user.user_id)
        if customer_id in addresses:
            leaver = Leaver(user.user_id, addresses[customer_id])
            if find_identity(leaver, identify_by) == user.identity:
                leavers.append(leaver)
    return leavers


def read_database(settings: Settings, options: Options, memory: Memory) -> deque[User]:
    """Return the users of this run: the rows of Query 2, then those to be reset.

    Raises DatabaseError, QueryFileError, TooFewUsers.
    """
    log.info("[STEP 2] Connecting to database...")
    with make_connection(settings) as database:
        log.info("[STEP 3] Executing Phase 2 Query 2...")
        columns = read_query(QUERIES, "columns")
        database.check_columns(columns)
        query = read_query(QUERIES, "query_2")
        rows = database.read_page_views(query)
        found = len(rows)
        log.info("Found %d pro user(s) with recent engagement", found)
        at_least = options.at_least
        if at_least is not None and found < at_least:
            few = f"{found} users found, fewer than --at-least {at_least}"
            raise TooFewUsers(f"Nothing is sent: {few}")
        users: deque[User] = deque(rows[: options.limit])
        if options.reset_left:
            leavers = find_leavers(database, settings, memory, rows)
            log.info("Found %d user(s) who left the segment", len(leavers))
            users.extend(leavers)
        return users


# The run


@dataclass
class DeliveryRun:
    """Sends the users of a run, and records each of them once.

    It belongs to the main thread, which alone writes results, counts and reports. The
    sender's workers only make calls, and log.
    """

    users: deque[User]  # those without a delivery
    planner: DeliveryPlanner
    client: IterableClient
    results: ResultsFile
    memory: Memory
    options: Options

    def __post_init__(self) -> None:
        self.tally = Tally(len(self.users))
        is_dry_run = self.options.dry_run
        self._narrator = Narrator(self.tally, is_dry_run=is_dry_run)
        self._unrecorded: dict[int, Delivery] = {}  # by number

    def send(self) -> None:
        """Send and record all users, or record them as not attempted.

        An error ends the run. What was delivered by then is recorded all the same.
        """
        # Not in one `with` in parentheses: Python 3.8 must be able to compile this, and
        # come as far as the installation check.
        with Sender(self.client, self._announce, bulk=self.options.bulk) as sender:  # noqa: SIM117
            # An error ends the run before the sender waits for its workers.
            with self._ending_at_error():
                self._send_users(sender)
        # After an error only: users who were in flight, and users who have no delivery.
        for delivery in list(self._unrecorded.values()):
            with self._ending_at_error():
                self._record(delivery)
        # Not `while self.users`: if planning one raises, the user stays there.
        for _ in range(len(self.users)):
            with self._ending_at_error():
                self._record(self._plan_next())

    @contextlib.contextmanager
    def _ending_at_error(self) -> Iterator[None]:
        """End the run at an error in the block, which is not raised.

        So the users after it are recorded, too.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001 - explained by explain_ending
            self.client.control.end(error)

    def _send_users(self, sender: Sender) -> None:
        while self.users:
            delivery = self._plan_next()
            if delivery.calls is None:
                self._record(delivery)
            else:
                sender.submit(delivery.calls)
            self._record_finished(sender)
            while sender.is_full:
                self._record_finished(sender, wait=0.1)
        sender.flush()  # a last group that is not full
        while not sender.is_idle:
            self._record_finished(sender, wait=0.1)

    def _plan_next(self) -> Delivery:
        """Return the next user's delivery; it has no calls when the run is ending.

        The user leaves the queue when the delivery is in `_unrecorded`, so that no
        error loses one.
        """
        number = self.tally.total - len(self.users) + 1
        user = self.users[0]
        if self.client.control.is_ending:
            delivery = Delivery(number, user.user_id, user.email)
        else:
            delivery = self.planner.plan(number, user)
        self._unrecorded[number] = delivery
        self.users.popleft()
        return delivery

    def _announce(self, group: Iterable[UserCalls]) -> None:
        """Put on record that these users are about to be sent.

        The sender calls this in `submit` and `flush`, so it is the main thread that
        writes. After kill -9 the next run knows by it who may have been updated.
        """
        announced = []
        for user_calls in group:
            user_id = self._unrecorded[user_calls.number].user_id
            identity = user_calls.calls[0].identity
            announced.append(SentUser(user_id, identity.value))
        self.results.announce(announced)

    def _record_finished(self, sender: Sender, wait: float = 0.0) -> None:
        """Record the users who are finished; wait up to so many seconds for one."""
        for user_calls in sender.collect(wait):
            delivery = self._unrecorded[user_calls.number]
            self._record(delivery)
        self._narrator.show_progress()

    def _record(self, delivery: Delivery) -> None:
        line = delivery.make_line()
        hides_known = self.options.quiet and self.options.changed_only
        if hides_known and delivery.status.is_failure:
            delivery.is_known = self.memory.knows_failure(line)
        if delivery.status is not Status.UNCHANGED:
            has_results = bool(delivery.results)  # then the line must survive kill -9
            try:
                self.results.add(line, sent=has_results)
            except ResultsNotWritable as error:  # the user counts all the same
                self.client.control.end(error)
        del self._unrecorded[delivery.number]
        self.tally.count(delivery)
        self._narrator.show(delivery)

    def finish(self) -> int:
        """Complete the results file, show the summary and return the exit code."""
        tally = self.tally
        seconds = round(tally.seconds, 3)
        error = self.client.control.close()  # what ended the run early, if anything
        if error is not None:
            ending = explain_ending(error)
        elif tally.failures:
            ending = Ending("completed", ExitCode.NOT_ALL_DELIVERED)
        else:
            ending = Ending("completed", ExitCode.SUCCESS)
        summary = tally.make_summary(ending, self.client, seconds)
        try:
            self.results.finish(summary)
        except ResultsNotWritable as disk_error:
            why = str(disk_error)
            if ending.why not in ("", why):
                why = f"{ending.why}; {why}"
            ending = explain_ending(disk_error)._replace(why=why)
        self._narrator.show_summary(ending, self.results.path, seconds)
        return ending.exit_code


def show_duration(client: IterableClient, users: int) -> None:
    """Say how long a large run takes singly, and in bulk."""
    singly = client.estimate_seconds(users, bulk=False)
    in_bulk = client.estimate_seconds(users, bulk=True)
    text = "%d users take %.0f s or more; with --bulk %.0f s or more"
    log.info(text, users, singly, in_bulk)


def show_cost(client: IterableClient, tally: Tally, *, bulk: bool) -> None:
    """Say after a dry run what a real run would cost."""
    updates = tally.counts[Status.WOULD_SEND]
    events = tally.events_to_send
    calls = client.count_calls(updates, events, bulk=bulk)
    seconds = client.estimate_seconds(updates, bulk=bulk)
    text = "Dry run, nothing was sent. A run would make %d calls, in %.1f s or more"
    log.info(text, calls, seconds)


def describe_run(settings: Settings, options: Options) -> dict[str, Any]:
    """Return the head of the results file."""
    mode = "send"
    if options.dry_run:
        mode = "dry-run"
    return {
        "mode": mode,
        "database": f"{settings.db_name} on {settings.db_host}",
        "iterable": settings.iterable_api_base_url,
        "identify_by": settings.iterable_identify_by.value,
        "options": vars(options),
    }


def run_integration(settings: Settings, options: Options, control: RunControl) -> int:
    """Run once, from the rows to the results file, and return the exit code.

    An error before the first user is raised; nothing was sent then.
    """
    iterable = settings.iterable_api_base_url
    identify_by = settings.iterable_identify_by.value
    with lock_results_folder(settings.results_dir) as folder:
        memory = Memory()
        if options.changed_only or options.reset_left:
            memory = folder.read_memory(iterable=iterable, identify_by=identify_by)
        users = read_database(settings, options, memory)
        log.info("[STEP 4] Initializing Iterable API client...")
        client = build_client(settings, control)
        log.info("[STEP 5] Processing user records...")
        total = len(users)
        if total > LARGE_RUN and not options.bulk:
            show_duration(client, total)
        tune_interpreter()
        control.has_begun.set()
        now = datetime.now().astimezone()
        head = describe_run(settings, options)
        results = folder.create_results_file(head, now)
        planner = DeliveryPlanner(settings, memory, options)
        run = DeliveryRun(users, planner, client, results, memory, options)
        run.send()
        if options.dry_run and not control.is_ending:
            show_cost(client, run.tally, bulk=options.bulk)
        return run.finish()


# The checklist


class NotChecked(Exception):
    """An item of the checklist cannot be looked at. The text says why."""


class Checklist:
    """The deployment checklist: a line an item.

    It sends no user data; log file and results folder are made if missing. An item that
    needs a failed one is not checked, so each cause is shown once.
    """

    settings: Settings
    database: DatabaseConnection
    client: IterableClient
    key_result: CallResult

    def __init__(self, options: Options, control: RunControl) -> None:
        self._options = options
        self._control = control
        self._stack = contextlib.ExitStack()  # closes the connection to the database
        self._exit_code = 0

    def run(self) -> int:
        """Check everything, and return the exit code of the first item that fails."""
        # An item needs those before it in its chain, and each chain needs the settings.
        log_chain = [("Log file can be written", self._open_log)]
        folder_chain = [("Results folder can be written and locked", self._use_folder)]
        database_chain = [
            ("Database can be reached and is new enough", self._connect),
            ("Tables and columns of the query are usable", self._check_columns),
            ("The latest page view is not in the future", self._check_latest_view),
        ]
        iterable_chain = [
            ("Iterable can be reached", self._call_iterable),
            ("API key is accepted", self._check_key),
            ("Iterable's user fields have the types that are sent", self._check_fields),
        ]
        with self._stack:
            has_settings = self._check("Settings are complete", self._load)
            for chain in (log_chain, folder_chain, database_chain, iterable_chain):
                is_good = has_settings
                for words, action in chain:
                    is_good = self._check(words, action, can_check=is_good)
        return self._exit_code

    def _check(
        self, words: str, action: Callable[[], str | None], *, can_check: bool = True
    ) -> bool:
        """Check an item and log its line. Returns whether it is as it should be."""
        if not can_check:
            log.info("- %s: not checked", words)
            return False
        try:
            finding = action()
        except NotChecked as reason:
            log.info("- %s: not checked (%s)", words, reason)
            return False
        except Exception as error:  # noqa: BLE001 - the item fails, whatever it is
            ending = explain_ending(error)
            log.error("✗ %s: %s", words, ending.why)  # noqa: TRY400 - that says all
            self._exit_code = self._exit_code or ending.exit_code
            return False
        if finding:
            words += f" ({finding})"
        log.info("✓ %s", words)
        return True

    def _load(self) -> None:
        self.settings = load_environment_variables(self._options.env_file)

    def _open_log(self) -> str:
        open_log_file(self.settings, self._options)
        return str(self.settings.log_file)

    def _use_folder(self) -> str:
        path = self.settings.results_dir
        try:
            with lock_results_folder(path):
                return str(path)
        except FolderInUse as error:
            raise NotChecked(str(error)) from None

    def _connect(self) -> str:
        connection = make_connection(self.settings)
        self.database = self._stack.enter_context(connection)
        return self.database.version

    def _check_columns(self) -> None:
        columns = read_query(QUERIES, "columns")
        self.database.check_columns(columns)
        query = read_query(QUERIES, "query_2")
        # No EXPLAIN, which an account with rights on SQL views only may not use.
        self.database.execute_query(f"SELECT * FROM ({query}) AS query_2 WHERE FALSE")  # noqa: S608

    def _check_latest_view(self) -> None:
        query = read_query(QUERIES, "future_views")
        [row] = self.database.execute_query(query)
        latest = row["latest"]  # of the views in the future, if there are any
        if latest is not None:
            cause = "event_time must be UTC, and not local time"
            raise DatabaseError(f"{latest} is in the future: {cause}")

    def _call_iterable(self) -> str:
        self.client = build_client(self.settings, self._control)
        self.key_result = self.client.check_key()
        if not self.key_result.is_usable:
            raise IterableUnavailable(self.key_result.reason)
        return self.settings.iterable_api_base_url

    def _check_key(self) -> None:
        # The call had no user. With a good key Iterable answers 400, else 401.
        if self.key_result.status != 400:
            no_refusal = "Iterable answered a request without a user as if it had one"
            raise KeyRefused(self.key_result.reason or no_refusal)

    def _check_fields(self) -> str:
        result = self.client.get_fields()
        if not result.ok:
            raise NotChecked(result.reason)
        sent = dict(USER_FIELD_TYPES)
        if self.settings.iterable_identify_by is IdentifyBy.USER_ID:
            sent["email"] = "string"
        types = result.fields or {}
        clashes = []
        missing = []
        for name, kind in sent.items():
            if name not in types:
                missing.append(name)
            elif types[name] != kind:
                there = types[name]
                clashes.append(f"{name} is {there} there, and {kind} is sent")
        if clashes:
            raise CheckFailed(
                f"{'; '.join(clashes)}: every update would be refused;"
                " change the type in Iterable, or the name of the field"
            )
        if missing:
            names = ", ".join(missing)
            return f"not there yet: {names}"
        return ""


# The program


def open_log_file(settings: Settings, options: Options) -> None:
    """Log to the file as well, without secrets. Raises LogNotWritable."""
    setup_logger(
        settings.log_level,
        settings.log_file,
        quiet=options.quiet,
        redact=build_redactor(settings.iterable_api_key, settings.db_password),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    options = parse_arguments(argv)
    setup_logger(quiet=options.quiet)
    control = RunControl()
    try:
        listen_for_signals(control)
        if options.check:
            return Checklist(options, control).run()
        needs_key = not options.dry_run
        settings = load_environment_variables(options.env_file, needs_key=needs_key)
        open_log_file(settings, options)
        log.info("Starting Iterable Integration - Phase 3")
        # Said late, because the log file's name is one of these settings.
        log.info("[STEP 1] Loading environment variables...")
        return run_integration(settings, options, control)
    except Exception as error:  # noqa: BLE001 - each has an exit code
        ending = explain_ending(error)
        log.error("%s", ending.why)  # noqa: TRY400 - that says all
        return ending.exit_code


if __name__ == "__main__":
    sys.exit(main())
