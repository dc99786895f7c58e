"""Console, log file, results file, its memory and its lock: what a run leaves behind (contract 2, 3, 6 and 7)."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import HealthCheck, assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lab.process import BARE, ROOT
from logger_config import (
    FILE_ONLY,
    AlreadyRunning,
    ResultsFile,
    lock_folder,
    read_memory,
    redactor,
    setup_logger,
    verdict,
)

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


def lines(*paths: Path) -> list[tuple[str, str]]:
    """Level and text of each line of these logs."""
    found = [LINE.fullmatch(line) for path in paths for line in path.read_text("utf-8").split("\n")[:-1]]
    assert all(found), [path.read_text("utf-8")[:2000] for path in paths]
    return [(line[2], line[4]) for line in found if line]


Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script(tmp_path: Path, log_file: Path) -> Script:
    """`script(code, redirection, **environ)`: a process that has `log`, `log_file` and SECRET. Its exit code is 7."""

    def run(code: str, redirection: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        head = (
            "import logging, os, sys, time\n"
            "from pathlib import Path\n"
            "from logger_config import redactor, setup_logger\n"
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


# Who sees what


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_the_level_is_that_of_the_file_only(
    log_file: Path, capsys: pytest.CaptureFixture[str], level: str, quiet: bool
) -> None:
    setup_logger(level, log_file, quiet=quiet)
    levels = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    for name in levels:
        log.log(getattr(logging, name), "a %s word", name)
    assert lines(log_file) == [(name, f"a {name} word") for name in levels[levels.index(level) :]]
    shown = levels[2:] if quiet else levels[1:]
    assert capsys.readouterr() == ("".join(f"a {name} word\n" for name in shown), "")


def test_a_line_of_the_file_has_time_level_and_module(log_file: Path) -> None:
    setup_logger(log_file=log_file)
    log.info("hello")
    [line] = log_file.read_text("utf-8").splitlines()
    found = LINE.fullmatch(line)
    assert found and found.groups()[1:] == ("INFO", Path(__file__).stem, "hello")
    assert abs(datetime.strptime(found[1], "%Y-%m-%dT%H:%M:%S%z") - datetime.now().astimezone()) < timedelta(minutes=1)


def test_some_lines_are_for_the_file_only_and_empty_ones_for_the_console(
    log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logger(log_file=log_file)
    log.error("for the file", extra=FILE_ONLY)
    log.info("")
    log.error("for both")
    assert lines(log_file) == [("ERROR", "for the file"), ("ERROR", "for both")]
    assert capsys.readouterr().out == "\nfor both\n"


def test_setting_up_again_takes_the_place_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger("DEBUG", tmp_path / "first.log")
    setup_logger("DEBUG")  # without a file there is the console
    log.info("once")
    log.debug("never")
    assert (tmp_path / "first.log").read_text("utf-8") == ""
    assert capsys.readouterr().out == "once\n"


def test_packages_below_are_silent_unless_in_error(log_file: Path) -> None:
    setup_logger("DEBUG", log_file)
    for package in ("urllib3.connectionpool", "mysql.connector"):
        logging.getLogger(package).warning("a password, perhaps")
        logging.getLogger(package).error("broken")
    assert lines(log_file) == [("ERROR", "broken")] * 2


# The log file


def test_the_file_is_private_also_when_it_was_not_before(tmp_path: Path) -> None:
    new, old = tmp_path / "deep" / "new.log", tmp_path / "old.log"
    old.write_text("2026-01-13T14:30:45+0000 INFO    main: before\n")
    old.chmod(0o644)
    umask = os.umask(0)
    try:
        for path in (new, old):
            setup_logger(log_file=path)
            log.info("now")
    finally:
        os.umask(umask)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (new, old)] == [0o600, 0o600]
    assert lines(old) == [("INFO", "before"), ("INFO", "now")]


def test_the_file_is_rotated_at_10_mb_and_5_private_old_ones_are_kept(log_file: Path) -> None:
    text = "x" * 100_000
    for part in (range(250), range(250, 650)):  # set up anew in between, as by the next run
        setup_logger(log_file=log_file, quiet=True)
        for number in part:
            log.info("%d %s", number, text)
    parts = [*(log_file.with_name(f"run.log.{number}") for number in range(5, 0, -1)), log_file]
    assert sorted(log_file.parent.iterdir()) == sorted(parts)
    kept = [int(line.split()[0]) for _, line in lines(*parts)]
    assert kept == [*range(650 - len(kept), 650)]
    sizes = [part.stat().st_size for part in parts]
    assert all(9_800_000 < size <= 10_000_000 for size in sizes[:-1]) and sizes[-1] <= 10_000_000
    assert {stat.S_IMODE(part.stat().st_mode) for part in parts} == {0o600}


def test_a_file_that_cannot_be_renamed_grows_and_the_console_says_so_once(
    log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file.with_name("run.log.4").touch()
    log_file.with_name("run.log.5").mkdir()
    setup_logger(log_file=log_file, quiet=True)
    for number in range(120):
        log.info("%d %s", number, "x" * 100_000)
    kept = [int(words.split()[0]) for level, words in lines(log_file) if level == "INFO"]
    assert (len(kept), kept[-1], len(capsys.readouterr().out.splitlines())) == (119, 119, 1)


def test_a_file_that_cannot_be_opened_is_an_error_and_the_console_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x.log"):
        with pytest.raises(OSError, match=rf"^LOG_FILE cannot be written: .*{tmp_path}"):
            setup_logger(log_file=path)
        log.info("hello")
    assert capsys.readouterr().out == "hello\nhello\n"


def test_a_full_disk_is_told_once_and_stops_nothing(script: Script) -> None:
    mode = Path("/dev/full").stat().st_mode
    done = script("setup_logger(log_file=Path('/dev/full'))\nfor n in range(5): log.info('line %d', n)")
    told = "The log file /dev/full cannot be written: [Errno 28] No space left on device"
    assert sorted(done.stdout.splitlines()) == sorted([told, *(f"line {number}" for number in range(5))])
    assert (done.returncode, done.stderr, Path("/dev/full").stat().st_mode) == (7, "", mode)


def test_the_log_may_go_to_a_pipe(script: Script) -> None:
    """Such as /dev/stderr, where containers like it."""
    done = script("setup_logger(log_file=Path('/dev/stderr'))\nlog.info('hello')")
    assert (done.stdout, bool(LINE.fullmatch(done.stderr.rstrip("\n")))) == ("hello\n", True)


def test_control_characters_are_escaped_in_file_and_console(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(log_file=log_file)
    log.info("%s", "one\ntwo\r\x1b[31ma\tb\x00\x7f\x85\x9b\u2028\u202e Zoë 😀 ✓ %s")
    shown = "one\\x0atwo\\x0d\\x1b[31ma\\x09b\\x00\\x7f\\x85\\x9b\\x2028\\x202e Zoë 😀 ✓ %s"
    assert (capsys.readouterr().out, lines(log_file)) == (f"{shown}\n", [("INFO", shown)])


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(), min_size=1))
def test_any_text_is_one_line(log_file: Path, text: str) -> None:
    log_file.unlink(missing_ok=True)
    setup_logger(log_file=log_file, quiet=True)
    log.info("%s", text)
    content = log_file.read_text("utf-8")
    assert content.count("\n") == 1 and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", content)
    assert LINE.fullmatch(content[:-1])


# Secrets


def forms(secret: str) -> list[str]:
    """As it is, JSON-escaped, and URL-encoded in a query, a path and a form."""
    in_url = [quote(secret, safe="", errors="replace"), quote(secret, errors="replace")]
    in_json = [json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
    return [secret, *in_json, *in_url, quote_plus(secret, errors="replace")]


@hypothesis_settings(deadline=None)
@given(st.text(st.characters(), min_size=4))
@example(SECRET)
@example("half a pair \udcff")
def test_any_secret_is_redacted_in_every_form(secret: str) -> None:
    redact = redactor("another", secret)
    for form in forms(secret):
        assert ascii(redact(f"<{form}> {form}")) == "'<[secret]> [secret]'"  # half a pair cannot be reported


def test_a_secret_within_another_leaves_no_rest() -> None:
    assert redactor("open", "open sesame", "sesame")("say open sesame now") == "say [secret] now"


def test_secrets_of_fewer_than_four_characters_are_left() -> None:
    text = "a word of the program"
    assert [redactor(*secrets)(text) for secrets in ([], [""], ["a", "wor"], ["word"])] == [
        *[text] * 3,
        "a [secret] of the program",
    ]


def test_a_secret_is_redacted_in_messages_arguments_and_tracebacks(
    log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "tab\tand\nline"  # which would be escaped, and so no longer be found
    setup_logger("DEBUG", log_file, redact=redactor(secret))
    log.info("as argument %s", secret)
    log.info("in a message " + secret)
    log.debug("in JSON %s", json.dumps(secret))
    try:
        raise RuntimeError(f"in an exception {secret}")
    except RuntimeError:
        log.exception("with a traceback")
    out, text = capsys.readouterr().out, log_file.read_text("utf-8")
    for shown in (out, text):
        assert "as argument [secret]\n" in shown and "in a message [secret]\n" in shown
        assert "RuntimeError: in an exception [secret]\n" in shown
    assert 'in JSON "[secret]"\n' in text


def test_an_error_that_nobody_caught_is_logged_without_a_secret(script: Script, log_file: Path) -> None:
    code = "setup_logger(log_file=log_file, quiet=True, redact=redactor(SECRET))\n"
    done = script(f"{code}raise RuntimeError(SECRET) from ValueError(SECRET)")
    for shown in (done.stdout, log_file.read_text("utf-8")):
        assert "Unexpected error\n" in shown and "Traceback (most recent call last):\n" in shown
        assert shown.endswith("RuntimeError: [secret]\n") and "w%rd" not in shown.replace("raise", "")
    assert (done.returncode, done.stderr) == (1, "")


# The console

TALK = "setup_logger(log_file=log_file)\nfor mark in '✓⚠✗': log.info('%s Zoë %s', mark, mark)"
TALKED = [("INFO", f"{mark} Zoë {mark}") for mark in "✓⚠✗"]
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    ("environ", "shown"), [({}, "✓ Zoë ✓\n⚠ Zoë ⚠\n✗ Zoë ✗\n"), (ASCII, "Zo\\xeb \n" * 3)], ids=["UTF-8", "ASCII"]
)
def test_a_console_without_marks_loses_them_with_their_space_and_never_the_run(
    script: Script, log_file: Path, environ: dict[str, str], shown: str
) -> None:
    done = script(TALK, **environ)
    assert (done.returncode, done.stdout, done.stderr) == (7, shown, "")
    assert lines(log_file) == TALKED


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-", "> /dev/full", "> /dev/full 2>&1", "| true"])
def test_a_console_that_is_closed_full_or_gone_changes_neither_log_nor_exit_code(
    script: Script, log_file: Path, redirection: str
) -> None:
    done = script(TALK, redirection)
    assert lines(log_file) == TALKED
    assert (done.returncode, "Traceback" in done.stderr) == (7, False)  # and not 120, for a flush that fails at exit


# The results file

STARTED = datetime(2026, 1, 13, 14, 30, 45, tzinfo=timezone.utc)
SEND, DRY_RUN = {"mode": "send"}, {"mode": "dry-run"}
OK = {"endpoint": "users/update", "ok": True, "status": 200, "code": "Success", "message": "", "attempts": 1}
REFUSED = {**OK, "ok": False, "status": 400, "code": "BadParams", "message": "no"}
FORGOTTEN = {**REFUSED, "status": 409, "code": "ForgottenUserError"}
CALLS = {
    "success": (OK, OK),
    "partial_failure": (OK, REFUSED),
    "total_failure": (REFUSED, REFUSED),
    "forgotten": (FORGOTTEN, None),
    "not_attempted": (None, None),
}


def line(user_id: Any, status: str = "success", fingerprint: str | None = "f", **more: Any) -> dict[str, Any]:
    """A user's line; Contract 7 has more keys, which are nobody's memory."""
    users_update, events_track = CALLS[status]
    known = {"user_id": user_id, "status": status, "users_update": users_update, "events_track": events_track}
    return {**known, "fingerprint": fingerprint, **more}


def remembered(folder: Path) -> dict[int, str]:
    """The memory, in which user ids are texts."""
    return {int(user): said for user, said in read_memory(folder).items()}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(*lines)`: the results file of one more run, with these users."""

    def make(*users: dict[str, Any], run: dict[str, str] = SEND, whole: bool = True, folder: Path = tmp_path) -> Path:
        results = ResultsFile(folder, run, STARTED)
        for user in users:
            results.add(json.dumps(user, ensure_ascii=False))
        if whole:
            results.finish({"outcome": "completed"})
        return results.path

    return make


def test_a_results_file_is_one_document_with_a_line_a_user_and_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path, {"mode": "send", "database": "ü"}, STARTED)
    partial = tmp_path / "integration_results_20260113_143045.json.partial"
    for number in (1, 2, 3):
        results.add(f'{{"record": {number}}}')
        assert partial.read_text("utf-8").endswith(f'{{"record": {number}}}')  # at once
    results.add('{"name": "half a pair \ud83d"}', at_once=False)
    assert list(tmp_path.iterdir()) == [partial]
    results.finish({"outcome": "completed", "exit_code": 1})
    path = tmp_path / "integration_results_20260113_143045.json"
    assert ([*tmp_path.iterdir()], results.path, stat.S_IMODE(path.stat().st_mode)) == ([path], path, 0o600)
    assert path.read_text("utf-8").splitlines() == [
        "{",
        '"run": {"number": 1, "started_at": "2026-01-13T14:30:45+00:00", "mode": "send", "database": "ü"},',
        '"results": [',
        '{"record": 1},',
        '{"record": 2},',
        '{"record": 3},',
        '{"name": "half a pair \\ud83d"}',
        "],",
        '"summary": {"outcome": "completed", "exit_code": 1}',
        "}",
    ]
    assert json.loads(path.read_text("utf-8"))["results"][-1] == {"name": "half a pair \ud83d"}


def test_a_runs_number_is_one_more_than_the_highest_and_two_of_one_second_have_two_names(
    write: Write, tmp_path: Path
) -> None:
    first, second, third = write(whole=False), write(run=DRY_RUN), write()
    (tmp_path / "integration_results_20990101_000000.json").write_text("of another program")
    second.unlink()
    runs = {path: json.loads(path.read_text("utf-8"))["run"]["number"] for path in (third, write())}
    names = [f"integration_results_20260113_1430{second}.json" for second in (45, 46, 47)]
    assert first.name == f"{names[0]}.partial"
    assert {path.name: number for path, number in runs.items()} == {names[2]: 3, names[1]: 4}


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """`room(n)`: from now on no file of this process can have more than n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_after_a_failure_nothing_is_written_so_that_there_is_no_gap(
    tmp_path: Path, room: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    results = ResultsFile(tmp_path, SEND, STARTED)
    results.add(json.dumps(line(1)))
    partial = next(tmp_path.iterdir())
    room(partial.stat().st_size + 100)
    for user_id in (2, 3):
        with pytest.raises(OSError, match="File too large"):
            results.add(json.dumps(line(user_id)))
        room(10**9)  # there is room again
    with pytest.raises(OSError, match="File too large"):
        results.finish({})
    del results
    assert (list(tmp_path.iterdir()), '"user_id": 3' in partial.read_text("utf-8")) == ([partial], False)
    assert set(remembered(tmp_path)) - {2} == {1}
    assert caplog.messages == []  # as of a run that was killed


def test_a_results_file_that_cannot_be_begun_is_an_error_and_leaves_nothing(
    tmp_path: Path, room: Callable[[int], None]
) -> None:
    room(10)
    with pytest.raises(OSError, match=r"^RESULTS_DIR cannot be written: .*File too large"):
        ResultsFile(tmp_path, SEND, STARTED)
    room(10**9)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=rf"^RESULTS_DIR cannot be written: .*{tmp_path}/none"):
        ResultsFile(tmp_path / "none", SEND, STARTED)


# The memory


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (line(1), line(2), True),
        (line(1), line(1, fingerprint="g"), False),
        (line(1, "total_failure"), line(1, "total_failure", attempts=5), True),
        (line(1, "total_failure"), line(1, "total_failure", fingerprint="g"), False),
        (line(1, "total_failure"), line(1, "partial_failure"), False),
        (line(1, "partial_failure"), line(1, "partial_failure", events_track={**REFUSED, "attempts": 5}), True),
        *(
            (line(1, "partial_failure"), line(1, "partial_failure", events_track={**REFUSED, **change}), False)
            for change in ({"endpoint": "events/track"}, {"status": None}, {"code": "Other"}, {"message": "other"})
        ),
        (line(1, "total_failure", None, problem="p"), line(1, "total_failure", None, problem="p"), True),
        (line(1, "total_failure", None, problem="p"), line(1, "total_failure", None, problem="q"), False),
        (line(1, "success"), line(1, "total_failure"), False),
    ],
)
def test_a_verdict_is_the_fingerprint_or_why_that_failed(one: Any, other: Any, same: bool) -> None:
    assert (verdict(one) == verdict(other)) == same
    assert (verdict(one) == "f") == (one["status"] == "success")


def test_who_was_forgotten_or_not_attempted_has_no_verdict() -> None:
    assert [verdict(line(1, status)) for status in ("forgotten", "not_attempted")] == [None, None]


def test_the_last_word_on_a_user_counts(write: Write, tmp_path: Path) -> None:
    write(*(line(user_id) for user_id in range(1, 9)), line(9, "total_failure"))
    write(line(10), line(1, "total_failure", "g"), run=DRY_RUN)  # which told nobody
    write(
        line(2, fingerprint="g"),
        line(3, "forgotten"),
        line(4, "partial_failure"),
        line(5, "not_attempted"),
        line(6, "not_attempted", "g"),  # who may have been told it in a group whose answer was lost
        line(7, "not_attempted", None),
        line(9),
    )
    failed = verdict(line(4, "partial_failure"))
    assert remembered(tmp_path) == {1: "f", 2: "g", 4: failed, 5: "f", 7: "f", 8: "f", 9: "f"}


def test_a_failure_that_a_killed_run_may_not_have_told_is_not_known(write: Write, tmp_path: Path) -> None:
    write(line(1), line(2))
    write(line(1, "total_failure"), line(3, "total_failure"), whole=False)
    assert remembered(tmp_path) == {2: "f"}


def test_a_known_failure_stays_known_while_the_user_is_not_attempted(write: Write, tmp_path: Path) -> None:
    write(line(1, "total_failure"), line(2, "total_failure"))
    write(line(1, "not_attempted"), line(2, "not_attempted", "g"))
    assert remembered(tmp_path) == {1: verdict(line(1, "total_failure"))}


def test_a_server_in_trouble_may_say_another_thing_each_time_and_a_refusal_may_not() -> None:
    def failure(status: int, message: str) -> str | None:
        return verdict(line(1, "total_failure", users_update={**REFUSED, "status": status, "message": message}))

    assert [failure(status, "a") == failure(status, "b") for status in (400, 499, 500, 503)] == [
        False,
        False,
        True,
        True,
    ]


def head(path: Path, number: int | None, started_at: str) -> None:
    """Give a results file another head, as by a version without numbers, or a clock that was wrong."""
    run = {"started_at": started_at, "mode": "send"} | ({"number": number} if number else {})
    text = path.read_text("utf-8").split("\n")
    path.write_text("\n".join([text[0], f'"run": {json.dumps(run)},', *text[2:]]))


def test_files_are_read_in_the_order_of_their_numbers_and_before_them_by_their_start(
    write: Write, tmp_path: Path
) -> None:
    """Whatever names and times of a copied folder say."""
    heads = [
        (10, "2020-01-01T00:00:00+00:00"),
        (9, "2021-01-01T00:00:00+00:00"),
        (None, "2026-01-01T00:30:00+01:00"),
        (None, "2026-01-01T00:00:00+00:00"),
        (None, "2025-12-31T23:45:00+00:00"),
    ]
    for place, (number, started_at) in enumerate(heads):
        users = [line(user_id, fingerprint=f"{place}") for user_id in range(place + 1)]
        head(write(*users), number, started_at)
        later = [line(user_id, fingerprint="overwritten") for user_id in range(place)]
        assert later == [] or remembered(tmp_path)[0] == "0"
    assert remembered(tmp_path) == {0: "0", 1: "1", 2: "3", 3: "3", 4: "4"}


@pytest.mark.parametrize(("cut", "known"), [(0, {1, 2, 3}), (2, {1, 2}), (60, {1, 2}), (-2, {1, 2, 3})])
def test_what_a_killed_run_leaves_is_memory_without_a_warning(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int, known: set[int]
) -> None:
    """Also when its last line is torn, ends in a comma, or is none at all."""
    path = write(line(1), line(2), line(3), whole=False)
    content = path.read_bytes()
    path.write_bytes(content[:-cut] if cut > 0 else content + b",\n" * (cut < 0))
    write(whole=False)
    write()  # whole, and without users
    (tmp_path / "integration_results_20260101_000000.json.partial").touch()
    assert (set(remembered(tmp_path)), caplog.messages) == (known, [])


def damaged(path: Path, number: int) -> str:
    return f"{path} is used as memory in part: {number} line(s) are damaged or missing"


@pytest.mark.parametrize(
    ("change", "known", "number"),
    [
        pytest.param(lambda text: [*text[:4], "\0" * 90, *text[5:]], {1, 3}, 1, id="a line of zeros"),
        pytest.param(
            lambda text: [*text[:3], *(["[]", '{"user_id": 1}', "7", '{"user_id": [1]}'] * 2)], set(), 9, id="no lines"
        ),
        pytest.param(lambda text: text[:5], {1, 2}, 1, id="its end is missing"),
        pytest.param(lambda text: [*text[:4], text[4][:50]], {1}, 2, id="it breaks off"),
        pytest.param(lambda text: [*text[:3], text[3] + text[4], *text[5:]], {3}, 1, id="two lines joined"),
    ],
)
def test_damage_costs_the_users_of_its_lines_and_no_other_and_is_told(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, known: set[int], number: int
) -> None:
    path = write(line(1), line(2), line(3))
    path.write_text("\n".join(change(path.read_text("utf-8").split("\n"))), "utf-8")
    assert (set(remembered(tmp_path)), caplog.messages) == (known, [damaged(path, number)])


HEADS = [
    "",
    "[]",
    "null",
    '"run": "send",',
    '"run": {"started_at": "2026-01-13T14:30:45+00:00"},',
    '"run": {"mode": "send"},',
    '"run": {"mode": "send", "started_at": 5},',
    '"run": {"mode": "send", "started_at": "today"},',
    '"run": {"mode": "send", "number": "x", "started_at": "2026-01-13T14:30:45+00:00"},',
    '"run": {"mode": "send", "number": [1], "started_at": "2026-01-13T14:30:45+00:00"},',
    '"run": {"mode": "send", "number": Infinity, "started_at": "2026-01-13T14:30:45+00:00"},',
    '"run": ' + "[" * 100_000,
    "\0" * 100,
    "x" * 1_000_000,
]


@pytest.mark.parametrize("text", HEADS, ids=lambda text: text[:40])
def test_what_is_no_results_file_is_skipped_with_a_warning(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    write(line(1))
    foreign = tmp_path / "integration_results_20260101_000000.json"
    foreign.write_text(f'{{\n{text}\n"results": [\n{json.dumps(line(2))}\n],\n"summary": {{}}\n}}\n')
    write(line(3))
    assert set(remembered(tmp_path)) == {1, 3}
    [said] = caplog.messages
    assert said.startswith(f"{foreign} is not a results file of this program, and not used: ")


def test_what_is_no_file_is_no_memory(write: Write, tmp_path: Path) -> None:
    write(line(1))
    (tmp_path / "integration_results_folder.json").mkdir()
    (tmp_path / "integration_results_link.json").symlink_to("nowhere")
    assert set(remembered(tmp_path)) == {1}


def test_a_compressed_copy_of_a_results_file_is_no_cause_for_a_warning(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(line(1))
    path.with_name(f"{path.name}.gz").write_bytes(b"\x1f\x8b")
    assert (remembered(tmp_path), caplog.messages) == ({1: "f"}, [])


BYTES = st.binary(max_size=60) | st.sampled_from([b"\n", b"],\n", b",\n", b'"', b"}", b"[" * 3000, b"1e999", b"null"])
CHANGES = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 300), BYTES), min_size=1, max_size=3)


@hypothesis_settings(deadline=None, max_examples=200)
@given(CHANGES)
@example([(25, 1, b"1e999")])
def test_whatever_happens_to_a_file_nobody_is_remembered_who_was_not_told(
    changes: list[tuple[int, int, bytes]],
) -> None:
    """Each change puts some bytes in place of others. Who was told something else is sent again, too."""
    with tempfile.TemporaryDirectory() as name:
        results = ResultsFile(Path(name), SEND, STARTED)
        for status in CALLS:
            results.add(json.dumps(line(status, status, f"that of {status}")))
        results.finish({})
        content = bytearray(results.path.read_bytes())
        for start, length, put in changes:
            content[start : start + length] = put
        results.path.write_bytes(content)
        memory = read_memory(Path(name))
        ResultsFile(Path(name), SEND, STARTED)
    assert [user for user in CALLS if user != "success" and memory.get(user) == f"that of {user}"] == []


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*CALLS]), min_size=2, max_size=6), st.integers(0, 9), st.integers(0, 200), BYTES)
def test_damage_in_one_line_changes_no_other_users_verdict(
    statuses: list[str], number: int, start: int, put: bytes
) -> None:
    with tempfile.TemporaryDirectory() as name:
        for fingerprint in ("old", "new"):
            results = ResultsFile(Path(name), SEND, STARTED)
            for user_id, status in enumerate(statuses):
                results.add(json.dumps(line(user_id, "success" if fingerprint == "old" else status, fingerprint)))
            results.finish({})
        whole = read_memory(Path(name))
        lines = results.path.read_bytes().split(b"\n")
        number %= len(statuses)
        lines[3 + number] = lines[3 + number][:start] + put.replace(b"\n", b"")
        assume(lines[3 + number] != b"],")  # which is how the list ends
        results.path.write_bytes(b"\n".join(lines))
        memory = read_memory(Path(name))
    changed = {user for user in (*whole, *memory) if whole.get(user) != memory.get(user)}
    assert changed <= {str(number)}


# The lock


def test_one_run_at_a_time_holds_a_folder_and_the_next_is_told_which(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "of mine"  # which the lock makes
    holder = f"process {os.getpid()}, since {datetime.now().astimezone():%Y-%m-%d}"
    for _ in range(2):  # again after the first has ended
        with (
            lock_folder(folder),
            pytest.raises(AlreadyRunning, match=f"^Another run holds {folder}: {holder} "),
            lock_folder(folder),
        ):
            pass
    [path] = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with lock_folder(folder), lock_folder(tmp_path):
        pass


def test_a_lock_without_words_is_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    with (tmp_path / ".integration_results.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunning, match=r"just begun$"), lock_folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_locked_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OSError, match=rf"^RESULTS_DIR cannot be written: .*{folder}"), lock_folder(folder):
            pass
