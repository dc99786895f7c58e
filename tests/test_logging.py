"""Console and log file: who sees what, in one line each, without a secret, whatever becomes of terminal and disk."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import logger_config
from harness import BARE, ROOT
from logger_config import FILE_ONLY, FILE_ONLY_MORE, Redactor, setup_logger

SECRET = 'Pa"ss \\w%rd/ü+=&'
LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}) (\w+) +(\w+): (.*)")
log = logging.getLogger("some.module")


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    """What a test configures is gone after it."""
    root, hook = logging.getLogger(), sys.excepthook
    level, handlers = root.level, root.handlers[:]
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, sys.excepthook = handlers, hook
    root.setLevel(level)


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


def lines(path: Path) -> list[tuple[str, str]]:
    """Level and text of each line of a log."""
    found = [LINE.fullmatch(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    assert all(found), path.read_text("utf-8")
    return [(line[2], line[4]) for line in found if line]


Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script(tmp_path: Path, log_file: Path) -> Script:
    """`script(code, redirection, **environ)`: a process that has `log`, `log_file` and SECRET. Its exit code is 7."""

    def run(code: str, redirection: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        head = (
            "import logging, os, sys, time\n"
            "from pathlib import Path\n"
            "from logger_config import Redactor, setup_logger\n"
            f"SECRET = {SECRET!r}\nlog_file = Path({str(log_file)!r})\nlog = logging.getLogger('some.module')\n"
        )
        path = tmp_path / "script.py"
        path.write_text(f"{head}{code}\nsys.exit(7)\n", "utf-8")
        utf8 = {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", f'"$0" "$1" {redirection}', sys.executable, str(path)],
            env={**BARE, **utf8, **environ},
            capture_output=True,
            text=True,
        )

    return run


def say_something_at_every_level() -> None:
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(log, level)("a %s word", level)


# Who sees what


@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("DEBUG", ["debug", "info", "warning", "error", "critical"]),
        ("INFO", ["info", "warning", "error", "critical"]),
        ("WARNING", ["warning", "error", "critical"]),
        ("ERROR", ["error", "critical"]),
    ],
)
@pytest.mark.parametrize("quiet", [False, True])
def test_the_level_is_that_of_the_file_only(
    log_file: Path, capsys: pytest.CaptureFixture[str], level: str, words: list[str], quiet: bool
) -> None:
    assert setup_logger(level, log_file, quiet=quiet) is None
    say_something_at_every_level()
    assert lines(log_file) == [(word.upper(), f"a {word} word") for word in words]
    shown = ["warning", "error", "critical"] if quiet else ["info", "warning", "error", "critical"]
    assert capsys.readouterr() == ("".join(f"a {word} word\n" for word in shown), "")


def test_a_line_of_the_file_has_time_level_and_module(log_file: Path) -> None:
    setup_logger(log_file=log_file)
    log.info("hello")
    found = LINE.fullmatch(log_file.read_text("utf-8").rstrip("\n"))
    assert found
    assert found.groups()[1:] == ("INFO", Path(__file__).stem, "hello")


def test_what_is_for_the_file_only_is_not_on_the_console(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(log_file=log_file)
    log.error("for the file", extra=FILE_ONLY)
    log.error("for both")
    assert lines(log_file) == [("ERROR", "for the file"), ("ERROR", "for both")]
    assert capsys.readouterr().out == "for both\n"


def test_a_line_that_more_lines_follow_is_written_with_the_last_of_them(
    log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logger(log_file=log_file)
    log.info("first", extra=FILE_ONLY_MORE)
    log.info("second", extra=FILE_ONLY_MORE)
    assert lines(log_file) == []
    log.info("last", extra=FILE_ONLY)
    assert lines(log_file) == [("INFO", "first"), ("INFO", "second"), ("INFO", "last")]
    assert capsys.readouterr().out == ""


def test_a_line_that_nothing_follows_is_written_at_the_end(script: Script, log_file: Path) -> None:
    code = "from logger_config import FILE_ONLY_MORE\nsetup_logger(log_file=log_file)\n"
    assert script(f"{code}log.info('alone', extra=FILE_ONLY_MORE)").returncode == 7
    assert lines(log_file) == [("INFO", "alone")]


def test_an_empty_line_is_for_the_console_only(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(log_file=log_file)
    log.info("")
    log.info("%s", "")
    assert capsys.readouterr().out == "\n\n"
    assert lines(log_file) == [("INFO", "")]


def test_without_a_file_there_is_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup_logger("DEBUG") is None
    say_something_at_every_level()
    assert capsys.readouterr().out == "a info word\na warning word\na error word\na critical word\n"


def test_setting_up_again_takes_the_place_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(log_file=tmp_path / "first.log")
    setup_logger(log_file=tmp_path / "second.log")
    log.info("once")
    assert (tmp_path / "first.log").read_text("utf-8") == ""
    assert lines(tmp_path / "second.log") == [("INFO", "once")]
    assert capsys.readouterr().out == "once\n"


def test_packages_below_are_silent_unless_in_error(log_file: Path) -> None:
    setup_logger("DEBUG", log_file)
    for package in ("urllib3.connectionpool", "mysql.connector"):
        logging.getLogger(package).warning("a password, perhaps")
        logging.getLogger(package).error("broken")
    assert lines(log_file) == [("ERROR", "broken")] * 2


# The file


def test_the_file_is_private_also_when_it_was_not_before(tmp_path: Path) -> None:
    new, old = tmp_path / "deep" / "new.log", tmp_path / "old.log"
    old.write_text("2026-01-13T14:30:45+0000 INFO    main: before\n")
    old.chmod(0o644)
    umask = os.umask(0)
    try:
        for path in (new, old):
            assert setup_logger(log_file=path) is None
            log.info("now")
    finally:
        os.umask(umask)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (new, old)] == [0o600, 0o600]
    assert lines(old) == [("INFO", "before"), ("INFO", "now")]


def test_the_file_is_rotated_at_10_mb_and_5_old_ones_are_kept() -> None:
    assert (logger_config.MAX_BYTES, logger_config.OLD_FILES) == (10_000_000, 5)


def test_rotation_keeps_the_newest_lines_in_private_files(log_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger_config, "MAX_BYTES", 1000)
    monkeypatch.setattr(logger_config, "OLD_FILES", 2)
    text = "ü" * 40
    for part in (range(30), range(30, 100)):  # set up anew in between, as by the next run
        setup_logger(log_file=log_file)
        for number in part:
            log.info("%d %s", number, text)
    parts = [log_file.with_name("run.log.2"), log_file.with_name("run.log.1"), log_file]
    assert sorted(log_file.parent.iterdir()) == sorted(parts)
    kept = [line for part in parts for line in lines(part)]
    assert kept == [("INFO", f"{number} {text}") for number in range(100 - len(kept), 100)]
    sizes = [part.stat().st_size for part in parts]
    length = len(log_file.read_bytes().split(b"\n")[0]) + 1
    assert all(1000 <= size < 1000 + length for size in sizes[:2])
    assert sizes[2] <= 1000 + length
    assert [stat.S_IMODE(part.stat().st_mode) for part in parts] == [0o600] * 3


def test_a_file_that_cannot_be_rotated_loses_no_line(
    log_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a folder like /var/log, where the account may write the file but not rename it."""
    monkeypatch.setattr(logger_config, "MAX_BYTES", 1000)
    for number in range(1, 6):
        (log_file.with_name(f"run.log.{number}") / "full").mkdir(parents=True)
    setup_logger(log_file=log_file, quiet=True)
    for number in range(100):
        log.info("%d of a hundred", number)
    kept = [text for _, text in lines(log_file)]
    assert [text for text in kept if "hundred" in text] == [f"{number} of a hundred" for number in range(100)]
    told = capsys.readouterr().out.splitlines()
    assert [str(log_file) in line for line in told] == [True]


def test_a_file_that_cannot_be_opened_is_told_and_the_console_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "file" / "x.log"):
        (tmp_path / "file").touch()
        problem = setup_logger(log_file=path)
        assert isinstance(problem, OSError)
        assert str(tmp_path) in str(problem)
        log.info("hello")
    assert capsys.readouterr().out == "hello\nhello\n"


def test_devices_keep_their_mode() -> None:
    before = {path: path.stat().st_mode for path in (Path("/dev/null"), Path("/dev/full"))}
    for path in before:
        assert setup_logger(log_file=path) is None
    assert {path: path.stat().st_mode for path in before} == before


def test_a_full_disk_is_told_once_and_stops_nothing(script: Script) -> None:
    done = script("setup_logger(log_file=Path('/dev/full'))\nfor n in range(5): log.info('line %d', n)")
    told = "The log file /dev/full cannot be written: [Errno 28] No space left on device"
    assert sorted(done.stdout.splitlines()) == sorted([told, *(f"line {number}" for number in range(5))])
    assert (done.returncode, done.stderr) == (7, "")


def test_the_log_may_go_to_a_pipe(script: Script) -> None:
    """Such as /dev/stderr, where containers like it."""
    done = script("setup_logger(log_file=Path('/dev/stderr'))\nlog.info('hello')")
    assert done.stdout == "hello\n"
    assert LINE.fullmatch(done.stderr.rstrip("\n"))


# One line a record


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\ntwo\r\nthree", "one\\x0atwo\\x0d\\x0athree"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\tb\x00c\x07d\x7fe\x85f\x9bg", "a\\x09b\\x00c\\x07d\\x7fe\\x85f\\x9bg"),
        ("Zoë 😀 ✓", "Zoë 😀 ✓"),
        ("%s %d", "%s %d"),
    ],
)
def test_control_characters_are_escaped_in_file_and_console(
    log_file: Path, capsys: pytest.CaptureFixture[str], text: str, shown: str
) -> None:
    setup_logger(log_file=log_file)
    log.info("<%s>", text)
    assert capsys.readouterr().out == f"<{shown}>\n"
    assert lines(log_file) == [("INFO", f"<{shown}>")]


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(), min_size=1))
def test_any_text_is_one_line(log_file: Path, text: str) -> None:
    log_file.unlink(missing_ok=True)
    setup_logger(log_file=log_file, quiet=True)
    log.info("%s", text)
    content = log_file.read_bytes()
    assert content.count(b"\n") == 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", content.decode())
    assert LINE.fullmatch(content.decode()[:-1])


# Secrets


FORMS = {
    "plain": SECRET,
    "in other case": SECRET.swapcase(),
    "in JSON": json.dumps(SECRET),
    "in JSON as it is": json.dumps(SECRET, ensure_ascii=False),
    "in Python": repr([SECRET]),
    "in a URL": quote(SECRET, safe=""),
    "in a URL in small letters": quote(SECRET, safe="").lower(),
    "in a URL's path": quote(SECRET),
    "in a form": quote_plus(SECRET),
    "in HTML": html.escape(SECRET),
    "twice": SECRET * 2,
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_secret_is_redacted_in_every_form(text: str) -> None:
    redacted = Redactor(["other", SECRET])(f"<{text}>")
    assert re.sub(r"[\"'\[\]<>]", "", redacted) in ("secret", "secretsecret")


def test_a_secret_within_another_leaves_no_rest() -> None:
    assert Redactor(["open", "open sesame", "sesame"])("say open sesame now") == "say [secret] now"


@pytest.mark.parametrize("length", [16, 32, 72, 300])
def test_a_long_secret_that_breaks_off_is_redacted_from_its_half_on(length: int) -> None:
    secret = "".join(chr(0x4E00 + number) for number in range(length))
    redact, half = Redactor([secret]), length // 2
    for shown in range(half, min(length, half + 64)):
        assert redact(f"{secret[:shown]}...") == "[secret]..."
    assert redact(secret[: half - 1]) == secret[: half - 1]
    assert Redactor([secret[:15]])(secret[:14]) == secret[:14]


def test_short_secrets_and_none_at_all_change_nothing() -> None:
    text = "a word of the program"
    assert [Redactor(secrets)(text) for secrets in ([], [""], ["a", "wor"])] == [text] * 3
    assert Redactor(["word"])(text) == "a [secret] of the program"


@hypothesis_settings(deadline=None)
@given(st.text(st.characters(), min_size=4))
@example("half a pair \udcff")
def test_any_secret_can_be_redacted(secret: str) -> None:
    redact = Redactor([secret])
    for form in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]):
        assert ascii(redact(f"<{form}>")) == "'<[secret]>'"  # pytest-xdist cannot report half a surrogate pair


@pytest.mark.parametrize("secret", [SECRET, "tab\tand\nline", "half a pair \udcff"])
def test_a_secret_is_redacted_in_messages_arguments_and_tracebacks(
    log_file: Path, capsys: pytest.CaptureFixture[str], secret: str
) -> None:
    setup_logger("DEBUG", log_file, redact=Redactor([secret]))
    log.info("as argument %s", secret)
    log.info("in a message " + secret)
    log.debug("in a dict %s", {"key": secret})
    try:
        raise RuntimeError(f"in an exception {secret}")
    except RuntimeError:
        log.exception("with a traceback")
    out, text = capsys.readouterr().out, log_file.read_text("utf-8")
    for shown in (out, text):
        assert "as argument [secret]\n" in shown
        assert "in a message [secret]\n" in shown
        assert "RuntimeError: in an exception [secret]\n" in shown
    assert "in a dict {'key': '[secret]'}\n" in text


@pytest.mark.parametrize("code", ["raise RuntimeError(SECRET)", "raise RuntimeError([SECRET]) from ValueError(SECRET)"])
def test_an_error_that_nobody_caught_is_logged_without_a_secret(script: Script, log_file: Path, code: str) -> None:
    done = script(f"setup_logger(log_file=log_file, quiet=True, redact=Redactor([SECRET]))\n{code}")
    text = log_file.read_text("utf-8")
    for shown in (done.stdout, text):
        assert "Unexpected error\n" in shown
        assert "Traceback (most recent call last):\n" in shown
        assert shown.rstrip().rpartition("\n")[2] in ("RuntimeError: [secret]", "RuntimeError: ['[secret]']")
        assert "w%rd" not in shown
    assert (done.returncode, done.stderr) == (1, "")


# The console


TALK = "setup_logger(log_file=log_file)\nfor n in range(3): log.info('✓ Zoë %d', n)"
TALKED = [("INFO", f"✓ Zoë {number}") for number in range(3)]
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_console_that_shows_marks_shows_them(script: Script, log_file: Path) -> None:
    done = script(TALK)
    assert (done.returncode, done.stdout, done.stderr) == (7, "✓ Zoë 0\n✓ Zoë 1\n✓ Zoë 2\n", "")
    assert lines(log_file) == TALKED


def test_a_console_without_marks_loses_them_and_never_the_run(script: Script, log_file: Path) -> None:
    done = script(TALK, **ASCII)
    assert (done.returncode, done.stdout, done.stderr) == (7, "Zo\\xeb 0\nZo\\xeb 1\nZo\\xeb 2\n", "")
    assert lines(log_file) == TALKED


def test_every_mark_is_lost_with_its_space(script: Script) -> None:
    done = script("setup_logger()\nfor mark in '✓⚠✗': log.info('%s Done: %s', mark, mark)", **ASCII)
    assert done.stdout == "Done: \n" * 3


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "> /dev/full 2>&1"])
def test_a_console_that_is_closed_or_full_changes_neither_log_nor_exit_code(
    script: Script, log_file: Path, redirection: str
) -> None:
    done = script(TALK, redirection)
    assert lines(log_file) == TALKED
    assert done.returncode == 7  # and not 120, for a flush that fails at exit
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_changes_neither_log_nor_exit_code(
    script: Script, log_file: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    talk = (
        "setup_logger(log_file=log_file)\n"
        "log.info('first')\n"
        f"while not os.path.exists({str(gone)!r}): time.sleep(0.001)\n"
        "for n in range(1000): log.info('line %d', n)"
    )
    done = script(talk, f"| (head -n 1; exec <&-; touch {gone})")
    assert (done.returncode, done.stdout, done.stderr) == (7, "first\n", "")
    assert lines(log_file) == [("INFO", "first"), *(("INFO", f"line {number}") for number in range(1000))]
