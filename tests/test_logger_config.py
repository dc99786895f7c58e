"""Console, log file, results file, its memory and its lock: what a run leaves behind (contract 2, 3, 6 and 7)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lab.process import BARE, ROOT, settings_for
from logger_config import ResultsFile, lock_folder, read_memory, redactor, setup_logger, verdict

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (\w+) +\w+: (.*)")
log = logging.getLogger("some.module")


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test configures is gone after it."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def lines(*paths: Path) -> list[tuple[str, str]]:
    """Level and text of each line of these logs."""
    found = [LINE.fullmatch(line) for path in paths for line in path.read_text("utf-8").split("\n")[:-1]]
    assert all(found), [path.read_text("utf-8")[:2000] for path in paths]
    return [(line[1], line[2]) for line in found if line]


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


# Console and log file


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_the_level_is_that_of_the_file_and_the_console_shows_info_or_if_quiet_warning_and_above(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str, quiet: bool
) -> None:
    setup_logger(level, tmp_path / "run.log", quiet=quiet)
    levels = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    for name in levels:
        log.log(getattr(logging, name), "a %s word", name)
    logging.getLogger("urllib3.connectionpool").warning("what iterable_client says in better words")
    assert lines(tmp_path / "run.log") == [(name, f"a {name} word") for name in levels[levels.index(level) :]]
    shown = levels[2:] if quiet else levels[1:]
    assert capsys.readouterr() == ("".join(f"a {name} word\n" for name in shown), "")


def test_the_log_is_rotated_at_10_mb_and_5_old_ones_are_kept_and_all_are_private(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in ("run.log", *(f"run.log.{number}" for number in range(1, 6)))]
    for part in (range(250), range(250, 650)):  # set up anew in between, as by the next run
        setup_logger(log_file=parts[0], quiet=True)
        assert modes(tmp_path) == {0o600}
        for number in part:
            log.info("%d %s", number, "x" * 100_000)
    assert (sorted(tmp_path.iterdir()), modes(tmp_path)) == (parts, {0o600})
    kept = [int(text.split()[0]) for _, text in lines(*reversed(parts))]
    assert kept == [*range(650 - len(kept), 650)]
    new, *old = (part.stat().st_size for part in parts)
    assert all(9_800_000 < size <= 10_000_000 for size in old) and new <= 10_000_000


def test_a_console_that_lacks_characters_loses_marks_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1"))
    setup_logger(redact=redactor("geheim"))
    log.info("✓ Gruß an geheim: 😀")
    assert shown.getvalue() == "Gruß an [secret]: \\U0001f600\n".encode("latin-1")


def test_a_full_disk_for_the_log_is_told_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(log_file=Path("/dev/full"))
    for number in (1, 2, 3):
        log.info("line %d", number)
    told = "The log file /dev/full cannot be written: [Errno 28] No space left on device"
    assert capsys.readouterr() == (f"line 1\n{told}\nline 2\nline 3\n", "")


NO_DATABASE = {"DB_HOST": "/nowhere", "DB_USER": "reader", "DB_PASSWORD": "", "DB_NAME": "shop"}


@pytest.mark.parametrize("console", ["<&- >&- 2>&-", "> /dev/full", "> /dev/full 2>&1", "| true"])
def test_a_console_that_is_closed_full_or_gone_stops_nothing(tmp_path: Path, console: str) -> None:
    shell = ["bash", "-o", "pipefail", "-c", f'"$0" "$1" --env-file /dev/null {console}', sys.executable]
    environ = {**BARE, **settings_for(NO_DATABASE, "http://localhost", tmp_path)}
    done = subprocess.run([*shell, ROOT / "main.py"], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")  # and not 120, for a flush that fails at exit
    said = [text.split(":")[0] for _, text in lines(tmp_path / "run.log")]
    assert (len(said), said[-1]) == (4, "No database answers on this socket")


def test_no_text_can_forge_a_line_or_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(log_file=tmp_path / "run.log")
    log.info("%s", "one\ntwo\r\x1b[31ma\tb\x00\x7f\x85\x9b\u2028\u202e\udcff Zoë 😀 ✓ %s")
    shown = "one\\x0atwo\\x0d\\x1b[31ma\\x09b\\x00\\x7f\\x85\\x9b\\x2028\\x202e\\xdcff Zoë 😀 ✓ %s"
    assert (capsys.readouterr().out, lines(tmp_path / "run.log")) == (f"{shown}\n", [("INFO", shown)])


# Secrets


@hypothesis_settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=4))  # main.py takes no other
@example('Pa"ss \\w%rd/ü+=&')
def test_any_secret_is_redacted_as_it_is_json_escaped_or_url_encoded(secret: str) -> None:
    in_json = [json.dumps(secret, ensure_ascii=only_ascii)[1:-1] for only_ascii in (True, False)]
    in_json += [text.replace("/", r"\/") for text in in_json]
    in_url = [quote(secret), quote(secret, safe=""), quote(secret, safe="!'()*"), quote_plus(secret)]
    in_url += [re.sub("%..", lambda code: code[0].lower(), text) for text in in_url]
    redact = redactor("another", secret)
    for form in (secret, *in_json, *in_url):
        assert redact(f"<{form}> {form}") == "<[secret]> [secret]"


def test_a_secret_within_another_leaves_no_rest_and_one_of_fewer_than_four_characters_is_left() -> None:
    assert redactor("open", "open sesame", "sesame")("say open sesame now") == "say [secret] now"
    assert redactor("", "say", "sesame")("say sesame") == "say [secret]"


def test_no_secret_is_in_a_message_argument_or_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "tab\tand\nline"  # which would be escaped, and so no longer be found
    setup_logger("DEBUG", tmp_path / "run.log", redact=redactor(secret))
    log.info("argument %s", secret)
    log.info("message " + json.dumps(secret))
    try:
        raise RuntimeError(secret) from ValueError(secret)
    except RuntimeError:
        sys.excepthook(*sys.exc_info())  # as for an error that nobody caught
    for shown in (capsys.readouterr().out, (tmp_path / "run.log").read_text("utf-8")):
        assert "argument [secret]\n" in shown and 'message "[secret]"\n' in shown
        assert "Unexpected error\n" in shown and "\nValueError: [secret]\n" in shown
        assert shown.endswith("\nRuntimeError: [secret]\n")


# The results file

STARTED = datetime(2026, 1, 13, 14, 30, 45, tzinfo=timezone.utc)
OK = {"endpoint": "users/update", "ok": True, "status": 200, "code": "Success", "message": "", "attempts": 1}
REFUSED = {**OK, "ok": False, "status": 400, "code": "BadParams", "message": "no"}
CALLS = {
    "success": (OK, OK),
    "partial_failure": (OK, REFUSED),
    "total_failure": (REFUSED, REFUSED),
    "forgotten": ({**REFUSED, "status": 409, "code": "ForgottenUserError"}, None),
    "not_attempted": (None, None),
}


def line(user_id: Any, status: str = "success", fingerprint: str | None = "f", **more: Any) -> dict[str, Any]:
    """A user's line, without the keys that are nobody's memory."""
    users_update, events_track = CALLS[status]
    known = {"user_id": user_id, "status": status, "users_update": users_update, "events_track": events_track}
    return {**known, "fingerprint": fingerprint, **more}


def write(folder: Path, *users: dict[str, Any], mode: str = "send", whole: bool = True) -> Path:
    """The results file of one more run, with these users."""
    results = ResultsFile(folder, {"mode": mode}, STARTED)
    for user in users:
        results.add(json.dumps(user))
    if whole:
        results.finish({"outcome": "completed"})
    return results.path


def test_a_results_file_is_a_document_that_grows_by_lines_and_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path, {"mode": "send", "database": "ü"}, STARTED)
    partial = tmp_path / "integration_results_20260113_143045.json.partial"
    for number in (1, 2):
        results.add(f'{{"record": {number}}}')
        assert partial.read_text("utf-8").endswith(f'{{"record": {number}}}')  # at once
    results.add('{"name": "half a pair \ud83d"}', at_once=False)
    assert ([*tmp_path.iterdir()], modes(tmp_path)) == ([partial], {0o600})
    results.finish({"outcome": "completed", "exit_code": 1})
    whole = tmp_path / "integration_results_20260113_143045.json"
    assert ([*tmp_path.iterdir()], results.path, modes(tmp_path)) == ([whole], whole, {0o600})
    document = """\
{
"run": {"number": 1, "started_at": "2026-01-13T14:30:45+00:00", "mode": "send", "database": "ü"},
"results": [
{"record": 1},
{"record": 2},
{"name": "half a pair \\ud83d"}
],
"summary": {"outcome": "completed", "exit_code": 1}
}
"""
    assert whole.read_text("utf-8") == document


def test_a_runs_number_is_one_more_than_the_highest_and_two_of_one_second_have_two_names(tmp_path: Path) -> None:
    first, second, third = write(tmp_path, whole=False), write(tmp_path, mode="dry-run"), write(tmp_path)
    second.unlink()
    runs = {path.name: json.loads(path.read_text("utf-8"))["run"]["number"] for path in (third, write(tmp_path))}
    assert first.name == "integration_results_20260113_143045.json.partial"
    assert runs == {"integration_results_20260113_143047.json": 3, "integration_results_20260113_143046.json": 4}


@contextlib.contextmanager
def room(most: int) -> Iterator[None]:
    """No file of this process can have more bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_nothing_from_the_start_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with room(10), pytest.raises(OSError, match=r"^RESULTS_DIR cannot be written: .*File too large"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_after_a_line_that_failed_none_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = ResultsFile(tmp_path, {"mode": "send"}, STARTED)
    results.add(json.dumps(line(1)))
    with room(results.path.stat().st_size + 100), pytest.raises(OSError, match="File too large"):
        results.add(json.dumps(line(2)))
    with pytest.raises(OSError, match="File too large"):  # although there is room again
        results.add(json.dumps(line(3)))
    with pytest.raises(OSError, match=r"\.json\.partial cannot be written .*File too large.*: make room"):
        results.finish({})
    del results
    assert (set(read_memory(tmp_path)) - {"2"}, caplog.messages) == ({"1"}, [])  # as of a run that was killed


# The memory


def test_a_verdict_is_the_fingerprint_or_what_failed_and_why() -> None:
    def failure(fingerprint: str = "f", **answer: Any) -> str | None:
        return verdict(line(1, "partial_failure", fingerprint, events_track={**REFUSED, **answer}))

    changes = [{}, {"endpoint": "events/track"}, {"status": None}, {"status": 500}, {"code": "C"}, {"message": "m"}]
    verdicts = [failure(**change) for change in changes] + [failure("g"), verdict(line(1, "total_failure"))]
    verdicts += [verdict(line(1, "total_failure", None, problem=words)) for words in "pq"]
    verdicts += [verdict(line(1, status)) for status in ("forgotten", "not_attempted")]
    assert (len({*verdicts, "f"}), verdict(line(1))) == (len(changes) + 7, "f")
    stopped = {**line(1), "events_track": None}  # a failure without a call that failed
    assert len({verdict({**stopped, "status": each}) for each in ("partial_failure", "forgotten")}) == 2
    assert failure(attempts=5) == failure()


def test_the_last_word_on_a_user_counts(tmp_path: Path) -> None:
    write(tmp_path, *(line(user_id) for user_id in range(1, 9)), *(line(n, "total_failure") for n in (9, 10, 11)))
    write(tmp_path, line(1, "total_failure", "g"), line(12), mode="dry-run")  # which told nobody
    write(
        tmp_path,
        line(2, fingerprint="g"),
        line(3, "forgotten"),
        line(4, "partial_failure"),
        line(5, "not_attempted"),
        line(6, "not_attempted", "g"),  # who may have been told it in a group whose answer was lost
        line(7, "not_attempted", None),
        line(9),
        line(10, "not_attempted"),
        line(11, "not_attempted", "g"),
    )
    write(tmp_path, line(8, "total_failure"), whole=False)  # killed
    last = [line(3, "forgotten"), line(4, "partial_failure"), line(6, "not_attempted", "g")]
    last += [line(8, "total_failure"), line(10, "total_failure"), line(11, "not_attempted", "g")]
    others = {str(each["user_id"]): verdict(each) for each in last}
    assert read_memory(tmp_path) == {**dict.fromkeys("1579", "f"), "2": "g", **others}


def test_files_are_read_in_the_order_of_their_numbers_and_before_them_by_their_start(tmp_path: Path) -> None:
    """File n tells users 0 to n. Here the last word comes first, as do the names."""
    heads = [
        '"number": 10, "started_at": "2020-01-01T00:00:00+00:00"',
        '"number": 9, "started_at": "2021-01-01T00:00:00+00:00"',
        '"started_at": "2026-01-01T00:00:00+00:00"',
        '"started_at": "2026-01-01T00:30:00+01:00"',
    ]
    for place, head in enumerate(heads):
        users = [f"{json.dumps(line(user_id, fingerprint=str(place)))},\n" for user_id in range(place + 1)]
        text = f'{{\n"run": {{"mode": "send", {head}}},\n"results": [\n{"".join(users)}],\n'
        (tmp_path / f"integration_results_{place}.json").write_text(text)
    assert read_memory(tmp_path) == {str(place): str(place) for place in range(len(heads))}


DAMAGE: dict[str, tuple[bool, Any, str, int]] = {  # whether it is whole, the change, who is known, lines told
    "a line of zeros": (True, lambda text: [*text[:4], "\0" * 90, *text[5:]], "13", 0),
    "half a line": (True, lambda text: [*text[:4], text[4][:50], *text[5:]], "13", 1),
    "lines of something else": (True, lambda text: [*text[:3], "[]", '{"user_id": 1}', "7", *text[5:]], "3", 1),
    "two lines joined": (True, lambda text: [*text[:3], text[3] + text[4], *text[5:]], "13", 0),
    "its end is missing": (True, lambda text: [*text[:4], text[4][:50]], "1", 1),
    "killed": (False, lambda text: text, "123", 0),
    "killed in a line": (False, lambda text: [*text[:5], text[5][:50]], "12", 0),
    "killed before a line": (False, lambda text: [*text[:5], f"{text[5]},", ""], "123", 0),
    "killed, and a line of zeros": (False, lambda text: [*text[:4], "\0" * 90, text[5]], "13", 0),
    "killed, and half a line": (False, lambda text: [*text[:4], text[4][:50], text[5]], "13", 1),
}


@pytest.mark.parametrize(("whole", "change", "known", "damaged"), DAMAGE.values(), ids=DAMAGE)
def test_damage_costs_the_users_of_its_lines_and_is_told_but_a_torn_last_line_of_a_killed_run_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: bool, change: Any, known: str, damaged: int
) -> None:
    path = write(tmp_path, line(1), line(2), line(3), whole=whole)
    path.write_text("\n".join(change(path.read_text("utf-8").split("\n"))), "utf-8")
    assert "".join(read_memory(tmp_path)) == known
    told = f"{path} is used as memory in part: {damaged} line(s) are damaged"
    assert caplog.messages == [told] * bool(damaged)


FOREIGN = [
    "\0" * 100,
    '"run": {"started_at": "2026-01-13T14:30:45+00:00"},',
    '"run": {"mode": "send", "number": Infinity, "started_at": "2026-01-13T14:30:45+00:00"},',
    '"run": ' + "[" * 100_000,
]


def test_what_is_no_results_file_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, link, *files = (tmp_path / f"integration_results_{n}.json" for n in range(len(FOREIGN) + 2))
    folder.mkdir()
    link.symlink_to("nowhere")
    for path, head in zip(files, FOREIGN, strict=True):
        path.write_text(f'{{\n{head}\n"results": [\n{json.dumps(line(2))}\n],\n"summary": {{}}\n}}\n')
    (tmp_path / "integration_results_9.json.partial").touch()  # a run that was killed at once: no cause for a warning
    write(tmp_path, line(1))
    assert list(read_memory(tmp_path)) == ["1"]
    told = [message.split(" is not a results file of this program, and not used: ")[0] for message in caplog.messages]
    assert told == [str(path) for path in (folder, link, *files)]


BYTES = st.binary(max_size=60) | st.sampled_from([b"\n", b"],\n", b",\n", b'"', b"}", b"[" * 3000, b"1e999", b"null"])


@hypothesis_settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 300), BYTES), min_size=1, max_size=3))
def test_whatever_bytes_of_a_file_change_nobody_is_remembered_who_was_not_told(changes: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name), *(line(status, status, f"that of {status}") for status in CALLS))
        content = bytearray(path.read_bytes())
        for start, length, put in changes:
            content[start : start + length] = put
        path.write_bytes(content)
        memory = read_memory(Path(name))
    assert [user for user in CALLS if user != "success" and memory.get(user) == f"that of {user}"] == []


# The lock


def test_one_run_at_a_time_holds_a_folder_and_another_folder_is_free(tmp_path: Path) -> None:
    for _ in range(2):  # again after the first has ended
        with lock_folder(tmp_path / "one"), lock_folder(tmp_path / "other"):
            with pytest.raises(BlockingIOError, match=rf"^Another run holds {tmp_path}/one: process \d+, since 2"):
                lock_folder(tmp_path / "one").__enter__()
            assert modes(tmp_path / "one") == {0o600}
