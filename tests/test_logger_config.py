"""Console and log file, and the secrets that neither shows."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import pty
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lab.process import ROOT
from lab.results import file_modes
from logger_config import (
    CONSOLE_ONLY,
    ERASE_LINE,
    FILE_ONLY,
    LOG_SIZE,
    PROGRESS,
    LogNotWritable,
    build_redactor,
    setup_logger,
)

Captured = pytest.CaptureFixture[str]

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (\w+) +\w+: (.*)")
LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
log = logging.getLogger("some.module")


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test configures is gone after it."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    for handler in root.handlers:
        with contextlib.suppress(OSError):  # of a full disk
            handler.close()


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


def read_log(path: Path) -> list[tuple[str, str]]:
    """Level and text of each line of a log."""
    lines = []
    for text in path.read_text("utf-8").split("\n")[:-1]:
        line = LOG_LINE.fullmatch(text)
        assert line, text[:200]
        lines.append((line[1], line[2]))
    return lines


def read_texts(path: Path) -> list[str]:
    """The texts of a log's lines, all of which are INFO."""
    lines = read_log(path)
    assert {level for level, _ in lines} == {"INFO"}
    return [text for _, text in lines]


# Levels and destinations


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_level_is_that_of_the_log_file(log_file: Path, level: str) -> None:
    setup_logger(level, log_file)
    for name in LEVELS:
        log.log(logging.getLevelName(name), "text")
    logged = [name for name, _ in read_log(log_file)]
    assert logged == LEVELS[LEVELS.index(level) :]


@pytest.mark.parametrize(
    ("quiet", "first"),
    [
        (False, "INFO"),
        (True, "WARNING"),
    ],
)
def test_console_shows_info_or_if_quiet_warnings(
    log_file: Path, capsys: Captured, quiet: bool, first: str
) -> None:
    setup_logger("DEBUG", log_file, quiet=quiet)
    for name in LEVELS:
        log.log(logging.getLevelName(name), name)
    shown = capsys.readouterr().out
    assert shown.splitlines() == LEVELS[LEVELS.index(first) :]


def test_a_record_can_be_for_one_destination(log_file: Path, capsys: Captured) -> None:
    setup_logger(log_file=log_file)
    log.info("detail", extra=FILE_ONLY)
    log.info("", extra=CONSOLE_ONLY)
    assert capsys.readouterr().out == "\n"
    assert read_texts(log_file) == ["detail"]


def test_warnings_of_the_packages_are_muted(capsys: Captured) -> None:
    setup_logger()
    logging.getLogger("urllib3.connectionpool").warning("Retrying")
    logging.getLogger("mysql.connector").warning("Lost connection")
    assert capsys.readouterr().out == ""


def test_setup_again_replaces_what_was_set_up(log_file: Path, capsys: Captured) -> None:
    setup_logger()
    setup_logger(log_file=log_file)
    log.info("text")
    assert capsys.readouterr().out == "text\n"
    assert read_texts(log_file) == ["text"]


def test_an_uncaught_exception_is_logged(log_file: Path) -> None:
    setup_logger(log_file=log_file)
    error = RuntimeError("sudden")
    sys.excepthook(RuntimeError, error, None)
    assert "CRITICAL logger_config: Unexpected error\n" in log_file.read_text("utf-8")
    assert log_file.read_text("utf-8").endswith("\n  RuntimeError: sudden\n")


# The console


def test_a_console_without_marks_loses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1"))
    setup_logger(redact=build_redactor("geheim"))
    log.info("✓ Gruß an geheim: 😀")
    assert shown.getvalue() == "Gruß an [secret]: \\U0001f600\n".encode("latin-1")


SCRIPT = """
import logging, sys
from pathlib import Path
from logger_config import setup_logger
setup_logger(log_file=Path(sys.argv[1]))
for number in (1, 2):
    logging.info("line %d", number)
sys.exit(3)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A program that logs two lines and ends with 3. It takes the log's path."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # Without PYTHONUNBUFFERED, with which output is not flushed at the end.
    environment = ["/usr/bin/env", "--ignore-environment", f"PYTHONPATH={ROOT}"]
    return [*environment, sys.executable, "-B", str(script)]


@pytest.mark.parametrize(
    "console", ["<&- >&- 2>&-", "> /dev/full", "> /dev/full 2>&1", "| true"]
)
def test_a_console_that_is_gone_stops_nothing(
    command: list[str], log_file: Path, console: str
) -> None:
    shell = ["bash", "-o", "pipefail", "-c", f'"$0" "$@" {console}']
    ended = subprocess.run(
        [*shell, *command, str(log_file)],
        capture_output=True,
        text=True,
        check=False,
    )
    # Not 120, for output that cannot be flushed at the end.
    assert ended.returncode == 3
    assert ended.stdout == ""
    assert ended.stderr == ""
    assert read_texts(log_file) == ["line 1", "line 2"]


def test_a_wrong_log_call_does_not_silence_the_console(capfd: Captured) -> None:
    setup_logger()
    log.info("%d", "text")
    log.info("next")
    shown = capfd.readouterr()
    assert shown.out == "next\n"
    assert "a real number is required" in shown.err


def read_until(descriptor: int, end: str) -> str:
    shown = ""
    while end not in shown:
        shown += os.read(descriptor, 1000).decode()
    return shown


def test_on_a_terminal_the_next_line_replaces_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    master, slave = pty.openpty()
    with open(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        setup_logger()
        log.info("Progress: 1/2 and more than fits", extra=PROGRESS)
        log.info("Progress: 2/2", extra=PROGRESS)
        log.info("Done")
        log.info("Next")
        shown = read_until(master, "Next\r\n")
    os.close(master)
    lines = ["Progress: 1/2 and m\r", "Progress: 2/2\r", "Done\r\n", "Next\r\n"]
    assert shown == "".join(f"{ERASE_LINE}{line}" for line in lines)


def test_elsewhere_progress_has_its_own_line(log_file: Path, capsys: Captured) -> None:
    setup_logger(log_file=log_file)
    log.info("Progress: 1/2", extra=PROGRESS)
    log.info("Done")
    assert capsys.readouterr().out == "Progress: 1/2\nDone\n"
    assert read_texts(log_file) == ["Progress: 1/2", "Done"]


def test_no_text_can_forge_a_line_or_command_a_terminal(
    log_file: Path, capsys: Captured
) -> None:
    setup_logger(log_file=log_file)
    log.info("%s", "one\ntwo\r\x1b[31ma\tb\x00\x85\x9b\u2028\u202e\udcff Zoë 😀 ✓ %s")
    shown = (
        "one\\x0atwo\\x0d\\x1b[31ma\\x09b\\x00\\x85\\x9b\\x2028\\x202e\\xdcff"
        " Zoë 😀 ✓ %s"
    )
    assert capsys.readouterr().out == f"{shown}\n"
    assert read_texts(log_file) == [shown]


def test_the_text_of_an_exception_cannot_forge_a_line(log_file: Path) -> None:
    setup_logger(log_file=log_file)
    forged = "2026-01-13T14:30:45+0000 INFO    main: forged"
    error = RuntimeError(f"one\n{forged}")
    sys.excepthook(RuntimeError, error, None)
    lines = log_file.read_text("utf-8").split("\n")
    assert forged not in lines


# The log file


def test_the_log_is_private_and_its_folder_is_made(tmp_path: Path) -> None:
    setup_logger(log_file=tmp_path / "new" / "deep" / "run.log")
    assert file_modes(tmp_path / "new" / "deep") == {"-rw-------"}


def test_the_log_is_rotated_and_five_old_ones_are_kept(log_file: Path) -> None:
    numbers = iter(range(650))
    for count in (250, 400):  # of two runs
        setup_logger(log_file=log_file, quiet=True)
        for _ in range(count):
            log.info("%d %s", next(numbers), "x" * 100_000)
    old_logs = [Path(f"{log_file}.{number}") for number in (5, 4, 3, 2, 1)]
    kept = []
    for path in [*old_logs, log_file]:
        kept += [int(text.split()[0]) for text in read_texts(path)]
    assert kept == list(range(650 - len(kept), 650))
    assert set(log_file.parent.iterdir()) == {*old_logs, log_file}
    assert file_modes(log_file.parent) == {"-rw-------"}
    for path in old_logs:
        assert LOG_SIZE - 200_000 < path.stat().st_size <= LOG_SIZE


def fill_log(path: Path, size: int = LOG_SIZE) -> None:
    path.touch()
    os.truncate(path, size)


def refuse_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", rename)


def test_a_log_that_cannot_be_rotated_grows_and_warns_once(
    log_file: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_rename(monkeypatch)
    fill_log(log_file, size=LOG_SIZE - 1)
    setup_logger(log_file=log_file, quiet=True)
    log.info("one")
    log.info("two")
    warning = f"The log file {log_file} cannot be rotated (Permission denied)"
    assert capsys.readouterr().out.count(warning) == 1
    logged = log_file.read_text("utf-8")
    assert logged.count(warning) == 1
    assert logged.count(": one\n") == 1
    assert logged.count(": two\n") == 1


def test_later_runs_do_not_warn_of_it_again(
    log_file: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_rename(monkeypatch)
    fill_log(log_file)
    setup_logger(log_file=log_file, quiet=True)
    log.info("one")
    assert capsys.readouterr().out == ""
    assert "INFO    logger_config: The log file" in log_file.read_text("utf-8")


def test_a_full_disk_for_the_log_is_reported_once(
    capsys: Captured,
) -> None:
    setup_logger(log_file=Path("/dev/full"))
    for number in (1, 2, 3):
        log.info("line %d", number)
    error = "[Errno 28] No space left on device"
    reported = f"The log file /dev/full cannot be written: {error}"
    assert capsys.readouterr().out == f"line 1\n{reported}\nline 2\nline 3\n"


def test_a_linked_log_is_written_and_never_rotated(tmp_path: Path) -> None:
    target = tmp_path / "target.log"
    link = tmp_path / "run.log"
    link.symlink_to(target)
    fill_log(target)
    setup_logger(log_file=link, quiet=True)
    log.info("one")
    assert sorted(tmp_path.iterdir()) == [link, target]
    assert link.is_symlink()
    assert target.read_text("utf-8").endswith(": one\n")


def test_a_named_pipe_is_written_as_it_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "run.log"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    setup_logger(log_file=pipe, quiet=True)
    reading = threading.Thread(
        target=lambda: received.append(read_until(reader, "end\n"))
    )
    reading.start()
    log.info("%s end", "x" * 1_000_000)  # more than a pipe takes at once
    reading.join()
    os.close(reader)
    assert received[0].count("x") == 1_000_000


def test_standard_output_may_be_a_socket(command: list[str]) -> None:
    # As under systemd. A socket cannot be opened by the name /dev/stdout.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run(
            [*command, "/dev/stdout"],
            stdout=theirs.fileno(),
            check=False,
        )
        received = ours.recv(10_000).decode()
    # Each line stands there as one of the console and as one of the log.
    assert received.count("line 1\n") == 2
    assert received.count("line 2\n") == 2


@pytest.mark.parametrize("place", ["/proc/run.log", "/dev/null/run.log", "/"])
def test_a_log_that_cannot_be_opened_is_an_error(capsys: Captured, place: str) -> None:
    message = rf"^LOG_FILE {place} cannot be written \("
    with pytest.raises(LogNotWritable, match=message):
        setup_logger(log_file=Path(place))
    log.info("The console is there")
    assert capsys.readouterr().out == "The console is there\n"


# Secrets


def lower_match(match: re.Match[str]) -> str:
    return match[0].lower()


def upper_digits(match: re.Match[str]) -> str:
    return match[0].upper().replace("U", "u")


@hypothesis_settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=4))
@example('Pa"ss \\w%rd/ü+=&')
@example("word\N{GRINNING FACE}")
def test_a_secret_is_redacted_in_every_written_form(secret: str) -> None:
    in_json = [
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
    ]
    in_php_json = [form.replace("/", r"\/") for form in in_json]
    in_html_safe_json = [
        re.sub("[<>&'=+]", lambda found: f"\\u{ord(found[0]):04x}", form)
        for form in in_json
    ]
    in_url = [
        quote(secret),
        quote(secret, safe=""),
        quote(secret, safe="!'()*"),
        quote_plus(secret),
    ]
    in_url_lower = [re.sub("%..", lower_match, form) for form in in_url]
    in_upper_json = [re.sub(r"\\u....", upper_digits, form) for form in in_json]
    redact = build_redactor("another", secret)
    for form in [
        secret,
        *in_json,
        *in_upper_json,
        *in_php_json,
        *in_html_safe_json,
        *in_url,
        *in_url_lower,
    ]:
        assert redact(f"<{form}> {form}") == "<[secret]> [secret]"


def test_a_secret_within_another_leaves_no_rest() -> None:
    redact = build_redactor("open", "open sesame", "sesame")
    assert redact("say open sesame now") == "say [secret] now"


def test_secrets_of_fewer_than_four_characters_stay() -> None:
    redact = build_redactor("", "say", "sesame")
    assert redact("say sesame") == "say [secret]"


def test_without_secrets_a_text_stays_as_it_is() -> None:
    assert build_redactor("", "abc")("abc") == "abc"


# It would no longer be found once its control characters are escaped.
SECRET = "tab\tand\nline"


@pytest.fixture(params=["console", "log file"])
def shown(request: pytest.FixtureRequest, log_file: Path, capsys: Captured) -> str:
    """What console or log file show of a secret in every part of a record."""
    setup_logger("DEBUG", log_file, redact=build_redactor(SECRET))
    log.info("argument %s", SECRET)
    log.info("message " + json.dumps(SECRET))
    error = RuntimeError(SECRET)
    error.__cause__ = ValueError(f"\x1b{SECRET}")
    sys.excepthook(RuntimeError, error, None)
    if request.param == "console":
        return capsys.readouterr().out
    return log_file.read_text("utf-8")


def test_no_secret_is_in_a_message_or_argument(shown: str) -> None:
    assert "argument [secret]\n" in shown
    assert 'message "[secret]"\n' in shown


def test_no_secret_or_control_is_in_a_traceback(shown: str) -> None:
    assert "\n  ValueError: \\x1b[secret]\n" in shown
    assert shown.endswith("\n  RuntimeError: [secret]\n")
