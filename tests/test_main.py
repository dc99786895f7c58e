"""main.py in its parts: the settings, and what becomes of any rows, of any answers, and where something runs out."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import dotenv
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import iterable_client
import main
from db_connection import DatabaseConnection, Record
from iterable_client import CallResult, IterableClient
from lab import process
from logger_config import ResultsFile
from main import Report, Settings, SettingsError, Stop, parse_arguments, prepare

KEY = "fedcba9876543210fedcba9876543210"
NOWHERE = Path(os.devnull)
NEEDED = {"DB_HOST": "db.example.com", "DB_USER": "reader", "DB_PASSWORD": "open sesame", "DB_NAME": "shop"}
NEEDED |= {"ITERABLE_API_KEY": KEY}
DEFAULTS = {"DB_PORT": "3306", "DB_SSL_CA": "", "ITERABLE_API_BASE_URL": "https://api.iterable.com"}
DEFAULTS |= {"ITERABLE_RATE_LIMIT": "450", "ITERABLE_MAX_ATTEMPTS": "5", "ITERABLE_TIMEOUT": "30", "MAX_WORKERS": "300"}
DEFAULTS |= {"LOG_LEVEL": "INFO", "LOG_FILE": "iterable_integration.log", "RESULTS_DIR": "."}
SETTINGS = Settings(
    *("db.example.com", "reader", "open sesame", "shop", 3306, ""),
    *(KEY, "https://api.iterable.com", 450, 5, 30.0, 300),
    *("INFO", process.ROOT / "iterable_integration.log", process.ROOT),
)
SECRETS = ("DB_PASSWORD", "ITERABLE_API_KEY")
NO_PORT = "DB_PORT must be a whole number from 1 to 65535"
NO_KEY = "ITERABLE_API_KEY has a character that no key has: copy it again"

File = Callable[[str | bytes], Path]


@pytest.fixture
def file(tmp_path: Path) -> File:
    """`file(content)`: a file with it."""

    def make(content: str | bytes) -> Path:
        path = tmp_path / f"file{len(list(tmp_path.iterdir()))}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def load(env_file: Path = NOWHERE, *, needs_key: bool = True, **environ: str | None) -> Settings:
    """The settings of a file and of the needed variables with these changes; None takes one away."""
    values = {name: value for name, value in {**NEEDED, **environ}.items() if value is not None}
    return main.load_environment_variables(env_file, values, needs_key=needs_key)


def complaints(env_file: Path = NOWHERE, **environ: str | None) -> list[str]:
    """What is said against them, without the advice at the end."""
    with pytest.raises(SettingsError) as error:
        load(env_file, **environ)
    said, _, advice = str(error.value).partition(f". Set them in {env_file} (see .env.example)")
    assert advice == ""
    return said.removeprefix("Settings: ").split("; ")


# Settings


def test_what_is_not_set_or_blank_has_the_default_of_the_contract() -> None:
    assert load() == load(**dict.fromkeys(DEFAULTS, "")) == load(**dict.fromkeys(DEFAULTS, " \t")) == SETTINGS


def test_every_setting_is_read_under_its_name_and_there_need_be_no_file_beside_main() -> None:
    texts = ["/run/db.sock", " u\t", " p ", "n", " 1 ", "requirements.txt"]
    texts += ["!~", "https://api.eu.iterable.com", "500", "1", "0.25", "7"]
    texts += ["DEBUG", "/var/x.log", "out/here"]
    environ = dict(zip(map(str.upper, vars(SETTINGS)), texts, strict=True)) | {f"{name}_FILE": "" for name in SECRETS}
    assert main.load_environment_variables(environ=environ) == Settings(
        *("/run/db.sock", "u", " p ", "n", 1, str(process.ROOT / "requirements.txt")),
        *("!~", "https://api.eu.iterable.com", 500, 1, 0.25, 7),
        *("DEBUG", Path("/var/x.log"), process.ROOT / "out" / "here"),
    )


def test_a_dry_run_needs_no_key() -> None:
    for missing in (None, "", " "):
        assert load(needs_key=False, ITERABLE_API_KEY=missing) == replace(SETTINGS, iterable_api_key="")
    gone = load(needs_key=False, ITERABLE_API_KEY=None, ITERABLE_API_KEY_FILE="/nowhere/key")
    assert gone.db_host == SETTINGS.db_host


LIMITS = {"DB_PORT": (1, 65535), "ITERABLE_RATE_LIMIT": (1, 100_000), "ITERABLE_MAX_ATTEMPTS": (1, 100)}
LIMITS |= {"ITERABLE_TIMEOUT": (0.1, 3600), "MAX_WORKERS": (1, 2000)}


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_has_its_bounds_and_no_other_form(name: str) -> None:
    lowest, highest = LIMITS[name]
    for value in (lowest, highest):
        assert getattr(load(**{name: str(value)}), name.lower()) == value
    kind, fraction = ("number", []) if name == "ITERABLE_TIMEOUT" else ("whole number", ["5.0"])
    for text in ("0", str(highest + 1), "-1", "1e2", "1_000", "five", "nan", "١", "9" * 5000, *fraction):
        assert complaints(**{name: text}) == [f"{name} must be a {kind} from {lowest} to {highest}"]


LOOPBACK, OTHERS = ("localhost:80", "127.1.2.3", "[::1]"), ("x", "localhost.x", "127.0.0.1.x", "127.0.0.256")
NO_HOST = "must be a host's address such as https://api.iterable.com, without path, query or user"
IN_THE_CLEAR = "must begin with https://, or the API key would travel in the clear"


def test_a_base_url_may_end_in_a_slash_or_api_and_be_http_to_a_loopback_host() -> None:
    for host in ("https://api.eu.iterable.com:1", *(f"http://{host}" for host in LOOPBACK)):
        for text in (host, host.upper(), f"{host}/", f"{host}/api", f"{host}/api//"):
            assert load(ITERABLE_API_BASE_URL=text) == replace(SETTINGS, iterable_api_base_url=host)


@pytest.mark.parametrize(
    ("name", "texts", "why"),
    [
        ("LOG_LEVEL", ["info", "CRITICAL", "10"], "must be DEBUG, INFO, WARNING or ERROR"),
        ("ITERABLE_API_KEY", [f"{KEY} {KEY}", "schlüssel"], NO_KEY.removeprefix("ITERABLE_API_KEY ")),
        ("DB_PASSWORD", ["a\0b", "a\udcff"], "is not text"),
        ("DB_SSL_CA", ["ca.pem", "tests", "x" * 5000], "is no file"),
        ("ITERABLE_API_BASE_URL", ["api.iterable.com", "ftp://x", "https://[::::]", f"https://ann:{KEY}@x"], NO_HOST),
        ("ITERABLE_API_BASE_URL", [f"https://x{rest}" for rest in ("/v2", "?x=1", "\nX: y", ":99999")], NO_HOST),
        ("ITERABLE_API_BASE_URL", [f"http://{host}" for host in OTHERS], IN_THE_CLEAR),
    ],
)
def test_a_value_of_another_form_is_a_complaint_that_does_not_show_it(name: str, texts: list[str], why: str) -> None:
    for text in texts:
        assert complaints(**{name: text}) == [f"{name} {why}"]


def test_all_complaints_come_in_one_message(file: File) -> None:
    said = complaints(file("DB_HOST=\nDB_PORT=one\n"), DB_HOST=None, DB_PASSWORD=None, ITERABLE_API_KEY="two words")
    assert said == ["DB_HOST is empty", "DB_PASSWORD is missing", NO_PORT, NO_KEY]
    assert complaints(file(b"# \xff\nDB_PORT=\xff"), DB_USER=" ") == ["DB_USER is empty", "DB_PORT is not text"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):  # as Windows saves what it calls Unicode
        path = file("RESULTS_DIR=results".encode(encoding))
        assert complaints(path) == [f"line 1 of {path} cannot be read"]
    path = file("DB_PORT=1\nDB_SSL_CA: ca.pem\nRESULTS_DIR='out\n")
    assert complaints(path) == [f"line {number} of {path} cannot be read" for number in (2, 3)]
    assert complaints(**dict.fromkeys(NEEDED)) == [f"{name} is missing" for name in NEEDED]


ODD_TEXTS = st.text() | st.text(st.characters()) | st.sampled_from([*DEFAULTS.values(), *NEEDED.values(), "a\x00b"])
NAMES = st.sampled_from([*NEEDED, *DEFAULTS, *(f"{name}_FILE" for name in SECRETS)])


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.dictionaries(NAMES, ODD_TEXTS), st.text(min_size=1), st.booleans())
def test_any_texts_are_settings_or_complaints_without_a_secret(values: Any, odd: str, needs_key: bool) -> None:
    secret = f"s3cr3t{odd}s3cr3t"
    environ = {**NEEDED, **values, **dict.fromkeys(SECRETS, secret)}
    try:
        settings = main.load_environment_variables(NOWHERE, environ, needs_key=needs_key)
    except SettingsError as error:
        shown = ascii(str(error))  # pytest-xdist cannot report half a surrogate pair
        assert [name for name in environ if f" {name} " in shown]
    else:
        shown = repr(settings)
        assert (settings.db_password, settings.iterable_api_key) == (secret, secret.strip())
        assert settings.log_file.is_absolute() and settings.results_dir.is_absolute()
    assert "s3cr3t" not in shown


# Secrets in files


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_may_stand_in_a_file_beside_an_empty_variable(name: str, file: File) -> None:
    path, expected = file("s3cr3t#"), replace(SETTINGS, **{name.lower(): "s3cr3t#"})
    for form, empty in itertools.product((f" {path} ", os.path.relpath(path, process.ROOT)), (None, "")):
        assert load(**{name: empty, f"{name}_FILE": form}) == expected
    assert load(**{f"{name}_FILE": " "}) == SETTINGS


def test_one_line_break_at_the_end_of_the_file_is_no_part_of_the_secret(file: File) -> None:
    for text in ("", "a\n", "\ra", " a\tb\nc ", "\ufeffpä😀ss"):
        for end in ("\n", "\r\n"):
            assert load(DB_PASSWORD=None, DB_PASSWORD_FILE=str(file(text + end))).db_password == text


@pytest.mark.parametrize("name", SECRETS)
def test_a_file_beside_a_value_or_of_no_use_is_one_complaint(name: str, file: File, tmp_path: Path) -> None:
    both = {name: "a-secret", f"{name}_FILE": str(file("another secret")), "DB_PORT": "many"}
    assert complaints(**both) == [f"{name} and {name}_FILE are both set: keep one of them", NO_PORT]
    no_text = [(str(file(b"\xff\xfe")), "it is not text"), ("a\0b", "it is not text")]
    for path, why in [*no_text, (str(tmp_path / "no"), "No such file or directory"), ("x" * 300, "File name too long")]:
        assert complaints(**{name: None, f"{name}_FILE": path}) == [f"{name}_FILE cannot be read ({why})"]
    assert complaints(ITERABLE_API_KEY=None, ITERABLE_API_KEY_FILE=str(file("two words"))) == [NO_KEY]


# The .env file


def test_a_variable_of_the_environment_wins_over_the_file(file: File) -> None:
    path = file("DB_HOST=file.example.com\nDB_NAME=of_file\nDB_PORT=1\nMAX_WORKERS=7\n")
    own = load(path, DB_NAME=None, DB_PORT="2", MAX_WORKERS="")  # set to nothing is set, too
    assert own == replace(SETTINGS, db_name="of_file", db_port=2)


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ("export DB_PASSWORD = pä😀ss  ", "pä😀ss"),
        ("DB_PASSWORD=", ""),
        ("DB_PASSWORD=a b#c # comment", "a b#c"),
        ("DB_PASSWORD='a # no comment '", "a # no comment "),
        ('DB_PASSWORD="${HOME:-x} \\"quoted\\""', '${HOME:-x} "quoted"'),
        ("DB_USER=x\r\nDB_PASSWORD=lines of Windows\r\n", "lines of Windows"),
    ],
)
def test_a_value_of_the_file_is_taken_as_it_is(file: File, line: str, password: str) -> None:
    """Also behind the mark that Windows puts at the beginning."""
    for mark in ("", "\ufeff"):
        assert load(file(f"{mark}{line}\n# a comment\n"), DB_PASSWORD=None).db_password == password


def test_another_file_is_found_from_the_folder_of_main(tmp_path: Path, file: File) -> None:
    relative = os.path.relpath(file("DB_PORT=from the file\n"), process.ROOT)
    with process.Running("--env-file", relative, settings=NEEDED, folder=tmp_path) as running:
        ended = running.wait()
    said = f"Settings: {NO_PORT}. Set them in {process.ROOT}/{relative} "
    assert (ended.exit_code, ended.errors, ended.console.startswith(said)) == (2, "", True)


@pytest.mark.parametrize(("name", "why"), [("no.env", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, why: str) -> None:
    path = tmp_path / name
    with process.Running("--env-file", str(path), settings=NEEDED, folder=tmp_path) as running:
        ended = running.wait()
    assert (ended.exit_code, ended.errors) == (2, "")
    assert re.fullmatch(rf"\[Errno \d+\] {why}: '{path}': check LOG_FILE, RESULTS_DIR or --env-file\n", ended.console)


def test_env_example_holds_every_setting_with_its_default() -> None:
    path = process.ROOT / ".env.example"
    own = {"DB_HOST": "localhost", "DB_NAME": "iterable_challenge", **dict.fromkeys(("DB_USER", *SECRETS), "")}
    assert dict(dotenv.dotenv_values(path, interpolate=False)) == {**own, **DEFAULTS}
    assert re.findall("^# ([A-Z_]+)=$", path.read_text("utf-8"), re.MULTILINE) == [f"{name}_FILE" for name in SECRETS]


def test_a_number_of_users_is_a_whole_number_from_1(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--limit=0", "--at-least=-1", "--limit=ten"):
        with pytest.raises(SystemExit, match="2"):
            parse_arguments([argument])
        assert "must be a whole number from 1 to 999999999" in capsys.readouterr().err


# Any rows

ROW = Record(1, "Ann", "ann@x", "pro", 1, "pricing", None, None, "2026-01-13 14:30:45")
SAME = st.fixed_dictionaries({"email": st.sampled_from(["a@x", " A@X", "b@x"]), "view_id": st.integers(1, 5)})
ODD = st.text(max_size=5) | st.sampled_from([None, "\udcff", "2026-01-13", 0])
ODDLY = st.dictionaries(st.sampled_from(Record._fields), ODD, max_size=1)


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(SAME, ODDLY), max_size=6))
def test_any_row_becomes_a_line_and_the_first_of_an_address_and_a_view_is_to_be_sent(changes: list[Any]) -> None:
    seen: dict[str, Any] = {}
    taken: set[str | None] = set()
    rows = [ROW._replace(**{**same, **oddly}) for same, oddly in changes]
    deliveries = [prepare(number, row, KEY, seen) for number, row in enumerate(rows, 1)]
    for number, delivery in enumerate(deliveries, 1):
        line = json.loads(json.dumps(delivery.as_line()))
        usable = delivery.fingerprint is not None and taken.isdisjoint((delivery.email, delivery.event_id))
        assert (line["record"], line["status"]) == (number, "not_attempted" if usable else "total_failure")
        assert bool(delivery.problem) == (not usable)
        if usable:
            taken |= {delivery.email, delivery.event_id}
    payloads = {(each.fingerprint, each.user, each.event) for each in deliveries if each.fingerprint}
    assert len(payloads) == len({each.fingerprint for each in deliveries} - {None})


# Any answers, and whatever runs out

CALLS = UPDATE, TRACK = "users/update", "events/track"
CODES = {200: "Success", 400: "BadParams", 409: "ForgottenUserError"}
ENDINGS = {  # a user's status by the answers to both calls; None is no answer, and 0 no call
    (200, 200): "success",
    (200, 400): "partial_failure",
    (None, 200): "partial_failure",
    (400, None): "total_failure",
    (200, 0): "partial_failure",  # the run was given up before the event
    (409, 0): "forgotten",
    (200, 409): "forgotten",
    (0, 0): "total_failure",  # a row without an address
}
User = tuple[tuple[Any, Any], set[str]]  # the answers, and the endpoints of which a bulk answer does not confirm them


class Answering:
    """In Iterable's place, and after `stop_after` calls the run is to stop. `sent` are the users of each call."""

    def __init__(self, users: Sequence[User], stop_after: int = 1000) -> None:
        self.users, self._stop_after, self._lock = users, stop_after, threading.Lock()
        self.stop = Stop()
        self.sent: list[tuple[str, list[int]]] = []

    def settles(self, endpoint: str, number: int) -> bool:
        """Whether a user has a verdict after a group's call."""
        answers, unconfirmed = self.users[number - 1]
        return answers[endpoint == TRACK] == 200 and endpoint not in unconfirmed

    def answer(self, endpoint: str, bodies: Mapping[str, str]) -> dict[str, CallResult]:
        if endpoint == UPDATE and self.stop.is_set():
            return {}
        numbers = [int(email.split("@")[0]) for email in bodies]
        with self._lock:
            self.sent += [(endpoint, numbers)] if numbers else []
            if len(self.sent) >= self._stop_after:
                self.stop.ask("interrupted", 143, "Stopped by SIGTERM")
        statuses = [self.users[number - 1][0][endpoint == TRACK] for number in numbers]
        results = [CallResult(endpoint, status == 200, status, CODES.get(status)) for status in statuses]
        settled = [len(numbers) == 1 or self.settles(endpoint, number) for number in numbers]
        verdicts = zip(bodies, results, settled, strict=True)
        return {email: each for email, each, known in verdicts if each.status != 0 and known}


def run(iterable: Answering, *arguments: str, most: int = 1000) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The users' lines in their order, and the summary, of a run in this process with groups of at most `most`."""
    emails = [None if answers[0] == 0 else f"{n}@example.com" for n, (answers, _) in enumerate(iterable.users, 1)]
    rows = [ROW._replace(user_id=n, email=email, view_id=n) for n, email in enumerate(emails, 1)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatabaseConnection, "__enter__", lambda self: self)
        patch.setattr(DatabaseConnection, "__exit__", lambda *_: None)
        patch.setattr(DatabaseConnection, "read_records", lambda *_: rows)
        patch.setattr(IterableClient, "post", lambda _, endpoint, bodies: iterable.answer(endpoint, bodies))
        patch.setattr(iterable_client, "MOST_ITEMS", most)
        patch.setenv("REQUESTS_CA_BUNDLE", folder)  # an empty one: to load all authorities takes longer than the run
        settings = replace(SETTINGS, results_dir=Path(folder), max_workers=3)
        exit_code = main.run_integration(settings, parse_arguments(arguments), iterable.stop)
        gc.unfreeze()
        [path] = Path(folder).glob("*.json")
        document = json.loads(path.read_text("utf-8"))
    lines, summary = sorted(document["results"], key=lambda line: line["record"]), document["summary"]
    assert [line["record"] for line in lines] == list(range(1, len(rows) + 1))
    counts = Counter(line["status"].replace("failure", "failures") for line in lines)
    expected = {**counts, "total_users": len(rows), "exit_code": exit_code}
    assert {key: summary[key] for key in expected} == expected
    return lines, summary


def test_who_is_done_is_looked_for_at_each_row_that_is_not_sent(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path, {"mode": "send"}, datetime.now().astimezone())
    report = Report(3, parse_arguments([]), {}, results, Stop())
    looked: list[int] = []
    rows = deque([ROW, ROW._replace(email=None), ROW])
    assert [each.record for each in main.to_send(rows, KEY, report, looked.append)] == [1]
    assert (report.counts, looked) == ({"total_failure": 2}, [4, 4])


def test_a_run_that_is_given_up_sends_nothing_more_and_one_that_is_stopped_is_not_given_up(tmp_path: Path) -> None:
    class Stopped(Report):
        """A signal arrives in the moment in which the run would be given up."""

        def record(self, delivery: main.Delivery) -> None:
            super().record(delivery)
            if self.hopeless:
                self.stop.ask("interrupted", 143, "Stopped by SIGTERM")

    results = ResultsFile(tmp_path, {"mode": "send"}, datetime.now().astimezone())
    rows = [ROW._replace(email=f"{number}@x", view_id=number) for number in range(200)]
    for kind, halted, exit_code in ((Report, True, 4), (Stopped, False, 143)):
        client: Any = mock.Mock(halted=threading.Event(), refused="")
        client.post = lambda endpoint, bodies: {email: CallResult(endpoint, False) for email in bodies}
        report = kind(200, parse_arguments([]), {}, results, Stop())
        main.deliver(deque(rows), client, replace(SETTINGS, max_workers=30), report)
        assert (client.halted.is_set(), report.stop.exit_code, report.counts.total()) == (halted, exit_code, 200)


@hypothesis_settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from([*ENDINGS, *[(200, 200)] * 5]), st.sets(st.sampled_from(CALLS))), max_size=12),
    st.sampled_from([[], ["--bulk"], ["--bulk"]]),
    st.integers(2, 5),
    st.sampled_from([1, 2, 3, 4, 6, 9, 100]),
)
def test_everyone_is_on_record_once_and_told_singly_where_a_group_has_no_verdict(
    users: list[User], option: list[str], most: int, stop_after: int
) -> None:
    """Also when the run is to stop on the way: then whoever has the update has the event, and no other user begins."""
    iterable = Answering(users, stop_after)
    lines, summary = run(iterable, *option, most=most)
    for number, line, (answers, _) in zip(itertools.count(1), lines, users):
        calls = {
            endpoint: [len(group) > 1 for name, group in iterable.sent if name == endpoint and number in group]
            for endpoint in CALLS
        }
        if line["status"] == "not_attempted":
            assert iterable.stop.is_set() and calls in ({UPDATE: [], TRACK: []}, {UPDATE: [True], TRACK: []})
            continue
        made = tuple(line[key]["status"] if line[key] else 0 for key in ("users_update", "events_track"))
        assert (made, line["status"]) == (answers, ENDINGS[answers])
        assert answers != (409, 0) or calls[TRACK] == []
        assert answers != (200, 0) or "events/track not sent: the run ended before" in str(summary["failure_reasons"])
        for answer, (endpoint, in_groups) in zip(answers, calls.items(), strict=True):
            again = [] if iterable.settles(endpoint, number) else [False]
            assert answer == 0 or in_groups in ([False], [True, *again])
    failed = any(line["status"].endswith("failure") for line in lines)
    assert summary["exit_code"] == (143 if iterable.stop.is_set() else int(failed))


@pytest.mark.parametrize(
    ("owner", "name", "error", "at"),
    [
        (threading.Thread, "start", RuntimeError("can't start new thread"), 0),
        (iterable_client, "user_payload", MemoryError(), 12),
    ],
    ids=["no thread that can be started", "no memory for a row"],
)
def test_whatever_runs_out_who_was_told_is_on_record_and_the_rest_is_not_attempted(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, at: int
) -> None:
    whole, calls = getattr(owner, name), itertools.count()

    def broken(*arguments: Any) -> Any:
        if next(calls) >= at:
            raise error
        return whole(*arguments)

    monkeypatch.setattr(owner, name, broken)
    iterable = Answering([((200, 200), set())] * 30)
    lines, summary = run(iterable)
    told = {number for endpoint, [number] in iterable.sent if endpoint == TRACK}
    assert (len(told) > 0, told <= set(range(1, at + 1))) == (at > 0, True)
    assert told == {line["record"] for line in lines if line["status"] == "success"}
    assert [summary[key] for key in ("outcome", "exit_code", "not_attempted")] == ["aborted", 1, 30 - len(told)]
