"""main.py in its parts: settings, arguments, deliveries and their groups, the report (contract 2 to 7)."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dotenv
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import logger_config
import main
from db_connection import Record
from iterable_client import CallResult, Payload
from lab import process
from logger_config import ResultsFile
from main import Delivery, Report, Settings, SettingsError, Stop, in_groups, parse_arguments, prepare

KEY = "fedcba9876543210fedcba9876543210"
PASSWORD = "open sesame"
NOWHERE = Path(os.devnull)
NEEDED = {
    "DB_HOST": "db.example.com",
    "DB_USER": "reader",
    "DB_PASSWORD": PASSWORD,
    "DB_NAME": "shop",
    "ITERABLE_API_KEY": KEY,
}
DEFAULTS = {
    "DB_PORT": "3306",
    "DB_SSL_CA": "",
    "ITERABLE_API_BASE_URL": "https://api.iterable.com",
    "ITERABLE_RATE_LIMIT": "450",
    "ITERABLE_MAX_ATTEMPTS": "5",
    "ITERABLE_TIMEOUT": "30",
    "MAX_WORKERS": "300",
    "LOG_LEVEL": "INFO",
    "LOG_FILE": "iterable_integration.log",
    "RESULTS_DIR": ".",
}
SECRETS = ("DB_PASSWORD", "ITERABLE_API_KEY")
HOST = "https://api.iterable.com"
LOG = process.ROOT / "iterable_integration.log"
SETTINGS = Settings(
    *("db.example.com", "reader", PASSWORD, "shop", 3306, ""),
    *(KEY, HOST, 450, 5, 30.0, 300),
    *("INFO", LOG, process.ROOT),
)

File = Callable[[str | bytes], Path]


@pytest.fixture
def file(tmp_path: Path) -> File:
    """`file(content)`: a file with it."""
    numbers = itertools.count(1)

    def make(content: str | bytes) -> Path:
        path = tmp_path / f"file{next(numbers)}"
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
    said, _, advice = str(error.value).partition(f". Set them in {env_file} ")
    assert advice == (
        "(cp .env.example .env, then fill it in) or in the environment. To see a run without any: bash tests/demo.sh"
    )
    return said.removeprefix("Settings: ").split("; ")


# Settings


def test_what_is_not_set_or_blank_has_the_default_of_the_contract() -> None:
    assert load() == SETTINGS
    assert load(**dict.fromkeys(DEFAULTS, "")) == load(**dict.fromkeys(DEFAULTS, " \t")) == SETTINGS


def test_every_setting_is_read_under_its_name() -> None:
    own: dict[str, tuple[str, Any]] = {
        "DB_HOST": ("/run/mysqld/mysqld.sock", "/run/mysqld/mysqld.sock"),
        "DB_USER": ("u", "u"),
        "DB_PASSWORD": ("", ""),
        "DB_NAME": ("n", "n"),
        "DB_PORT": ("65535", 65535),
        "DB_SSL_CA": ("requirements.txt", str(process.ROOT / "requirements.txt")),
        "ITERABLE_API_KEY": ("!~", "!~"),
        "ITERABLE_API_BASE_URL": ("https://api.eu.iterable.com", "https://api.eu.iterable.com"),
        "ITERABLE_RATE_LIMIT": ("100000", 100_000),
        "ITERABLE_MAX_ATTEMPTS": ("1", 1),
        "ITERABLE_TIMEOUT": ("0.25", 0.25),
        "MAX_WORKERS": ("2000", 2000),
        "LOG_LEVEL": ("DEBUG", "DEBUG"),
        "LOG_FILE": ("/var/log/x.log", Path("/var/log/x.log")),
        "RESULTS_DIR": ("out/here", process.ROOT / "out" / "here"),
    }
    settings = load(**{name: text for name, (text, _) in own.items()})
    assert vars(settings) == {name.lower(): value for name, (_, value) in own.items()}


def test_blanks_around_a_value_do_not_count_but_in_a_password() -> None:
    own = load(DB_HOST=" db.example.com\t", DB_PORT=" 1 ", DB_PASSWORD=" p ")
    assert own == replace(SETTINGS, db_port=1, db_password=" p ")


def test_a_dry_run_needs_no_key() -> None:
    for missing in (None, "", " "):
        assert load(needs_key=False, ITERABLE_API_KEY=missing) == replace(SETTINGS, iterable_api_key="")
    assert load(needs_key=False) == SETTINGS
    gone = load(needs_key=False, ITERABLE_API_KEY=None, ITERABLE_API_KEY_FILE="/nowhere/key")
    assert gone.db_host == SETTINGS.db_host


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("DB_PORT", 1, 65535),
        ("ITERABLE_RATE_LIMIT", 1, 100_000),
        ("ITERABLE_MAX_ATTEMPTS", 1, 100),
        ("ITERABLE_TIMEOUT", 0.1, 3600),
        ("MAX_WORKERS", 1, 2000),
    ],
)
def test_a_number_has_its_bounds_and_no_other_form(name: str, lowest: float, highest: float) -> None:
    for value in (lowest, highest):
        assert getattr(load(**{name: str(value)}), name.lower()) == value
    kind, fraction = ("number", []) if name == "ITERABLE_TIMEOUT" else ("whole number", ["5.0"])
    forms = ["-1", "+1", "1e2", "0x10", "1_000", "1.", ".5", "1,5", "five", "nan", "inf", "١", "1 2", "9" * 5000]
    for text in ("0", str(highest + 1), *forms, *fraction):
        assert complaints(**{name: text}) == [f"{name} must be a {kind} from {lowest} to {highest}"]


def test_a_log_level_is_one_of_four() -> None:
    levels = ["DEBUG", "INFO", "WARNING", "ERROR"]
    assert [load(LOG_LEVEL=level).log_level for level in levels] == levels
    for text in ("info", "INFOS", "CRITICAL", "10"):
        assert complaints(LOG_LEVEL=text) == ["LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR"]


def test_a_base_url_may_end_in_a_slash_or_api_and_be_http_to_a_loopback_host() -> None:
    for host in ("https://api.eu.iterable.com", "https://proxy.example.com:8443", "https://[2001:db8::1]:443"):
        for text in (host, host.upper(), f"{host}/", f"{host}/api", f"{host}/api//"):
            assert load(ITERABLE_API_BASE_URL=text) == replace(SETTINGS, iterable_api_base_url=host)
    for host in ("http://localhost:8080", "http://127.1.2.3", "http://[::1]:80"):
        assert load(ITERABLE_API_BASE_URL=host) == replace(SETTINGS, iterable_api_base_url=host)


NO_HOST = "must be a host's address such as https://api.iterable.com, without path, query or user"
IN_THE_CLEAR = "must begin with https://, or the API key would travel in the clear"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *((f"https://{rest}", NO_HOST) for rest in ("", "/api", "api.iterable.com/v2", "api.iterable.com/api/users")),
        *((f"https://api.iterable.com{rest}", NO_HOST) for rest in ("?x=1", "#x", "\nX: y", ":port", ":99999", ":")),
        *((f"https://{user}@api.iterable.com", NO_HOST) for user in ("ann", f"ann:{KEY}")),
        *((text, NO_HOST) for text in ("api.iterable.com", "https://api iterable.com", "https://[::1", "ftp://x", "/")),
        *((f"http://{host}", IN_THE_CLEAR) for host in ("api.iterable.com", "localhost.example.com", "0.0.0.0")),
        *((f"http://{host}", IN_THE_CLEAR) for host in ("127.0.0.1.example.com", "127.0.0.256", "[::2]")),
    ],
)
def test_a_base_url_is_no_more_than_a_host_and_http_to_no_other(text: str, why: str) -> None:
    assert complaints(ITERABLE_API_BASE_URL=text) == [f"ITERABLE_API_BASE_URL {why}"]


@pytest.mark.parametrize("odd", ["abc def", "abc\n", "schlüssel", "abc\u200b", "a\udcff"])
def test_a_key_is_printable_ascii(odd: str) -> None:
    why = "ITERABLE_API_KEY has a character that no key has: copy it again"
    assert complaints(ITERABLE_API_KEY=f"{KEY}{odd}{KEY}") == [why]


@pytest.mark.parametrize("name", ["DB_HOST", "DB_PASSWORD", "DB_SSL_CA", "LOG_FILE"])
def test_a_nul_character_which_a_file_may_hold_is_a_complaint(name: str) -> None:
    assert complaints(**{name: "a\0b"}) == [f"{name} has a NUL character"]


def test_no_secret_stands_in_a_repr() -> None:
    text = repr(load())
    assert "db.example.com" in text
    assert KEY not in text and PASSWORD not in text


def test_all_complaints_come_in_one_message(file: File) -> None:
    env_file = file("DB_HOST=\nDB_PORT=one\nITERABLE_RATE_LIMIT=0\nLOG_LEVEL=verbose\n")
    assert complaints(env_file, DB_HOST=None, DB_USER=" ", DB_PASSWORD=None, ITERABLE_API_KEY=f"{KEY} {KEY}") == [
        "DB_HOST is empty",
        "DB_USER is empty",
        "DB_PASSWORD is missing",
        "DB_PORT must be a whole number from 1 to 65535",
        "ITERABLE_API_KEY has a character that no key has: copy it again",
        "ITERABLE_RATE_LIMIT must be a whole number from 1 to 100000",
        "LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR",
    ]
    assert complaints(**dict.fromkeys(NEEDED)) == [f"{name} is missing" for name in NEEDED]


ODD_TEXTS = st.text() | st.text(st.characters()) | st.sampled_from([*DEFAULTS.values(), *NEEDED.values(), "a\x00b"])
NAMES = st.sampled_from([*NEEDED, *DEFAULTS, *(f"{name}_FILE" for name in SECRETS)])


@hypothesis_settings(deadline=None, max_examples=300)
@given(st.dictionaries(NAMES, ODD_TEXTS), st.text(min_size=1), st.booleans())
def test_any_texts_are_settings_or_a_complaint_without_a_secret(
    values: dict[str, str], odd: str, needs_key: bool
) -> None:
    secret = f"s3cr3t{odd}s3cr3t"
    environ = {**NEEDED, **values, **dict.fromkeys(SECRETS, secret)}
    settings = None
    try:
        settings = main.load_environment_variables(NOWHERE, environ, needs_key=needs_key)
        shown = repr(settings)
    except SettingsError as error:
        shown = ascii(str(error))  # pytest-xdist cannot report half a surrogate pair
    assert "s3cr3t" not in shown
    if settings:
        assert (settings.db_password, settings.iterable_api_key) == (secret, secret.strip())
        assert settings.log_file.is_absolute() and settings.results_dir.is_absolute()
    else:
        assert [name for name in environ if f" {name} " in shown]


# Secrets in files


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_may_stand_in_a_file(name: str, file: File) -> None:
    """An empty variable beside it, as .env.example leaves it, is not set."""
    path, expected = file("s3cr3t#"), replace(SETTINGS, **{name.lower(): "s3cr3t#"})
    for form, empty in itertools.product((f" {path} ", os.path.relpath(path, process.ROOT)), (None, "")):
        assert load(**{name: empty, f"{name}_FILE": form}) == expected
    assert load(**{f"{name}_FILE": " "}) == SETTINGS


def test_one_line_break_at_the_end_of_the_file_is_no_part_of_the_secret(file: File) -> None:
    for text in ("", "a", "a\n", "\ra", " a\tb ", "a\nb", "\ufeffpä😀ss"):
        for end in ("\n", "\r\n", "" if text != "a\n" else "\n"):
            path = str(file(text + end))
            assert load(DB_PASSWORD=None, DB_PASSWORD_FILE=path).db_password == text
    assert load(ITERABLE_API_KEY="", ITERABLE_API_KEY_FILE=str(file(f"{KEY}\n"))) == SETTINGS


@pytest.mark.parametrize("name", SECRETS)
def test_both_forms_of_a_secret_are_a_complaint(name: str, file: File) -> None:
    said = complaints(**{name: KEY, f"{name}_FILE": str(file("another secret")), "DB_PORT": KEY})
    port = "DB_PORT must be a whole number from 1 to 65535"
    assert said == [f"{name} and {name}_FILE are both set: keep one of them", port]


@pytest.mark.parametrize("name", SECRETS)
def test_a_file_that_is_of_no_use_is_one_complaint(name: str, file: File, tmp_path: Path) -> None:
    no_text = [(str(file(b"\xff\xfe")), "it is not text"), ("a\0b", "it is not text")]
    no_file = [(str(tmp_path / "no"), "No such file or directory"), (str(tmp_path), "Is a directory")]
    for path, why in [*no_text, *no_file, ("x" * 300, "File name too long")]:
        assert complaints(**{name: None, f"{name}_FILE": path}) == [f"{name}_FILE cannot be read ({why})"]


def test_what_a_file_holds_has_to_be_a_key_and_is_not_shown(file: File) -> None:
    own = {"ITERABLE_API_KEY": None, "ITERABLE_API_KEY_FILE": str(file("two words")), "DB_PORT": "two words"}
    port = "DB_PORT must be a whole number from 1 to 65535"
    assert complaints(**own) == [port, "ITERABLE_API_KEY has a character that no key has: copy it again"]
    assert complaints(ITERABLE_API_KEY="", ITERABLE_API_KEY_FILE=str(file("\n"))) == ["ITERABLE_API_KEY is empty"]


# The .env file


def test_a_variable_of_the_environment_wins_over_the_file(file: File) -> None:
    path = file("DB_HOST=file.example.com\nDB_NAME=of_file\nDB_PORT=1\nMAX_WORKERS=7\n")
    own = load(path, DB_NAME=None, DB_PORT="2", MAX_WORKERS="")  # set to nothing is set, too
    assert own == replace(SETTINGS, db_name="of_file", db_port=2)


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ("DB_PASSWORD=pä😀ss", "pä😀ss"),
        ("DB_PASSWORD=", ""),
        ("export DB_PASSWORD = spaced  ", "spaced"),
        ("DB_PASSWORD=a b#c", "a b#c"),
        ("DB_PASSWORD=a # comment", "a"),
        ("DB_PASSWORD='a # no comment '", "a # no comment "),
        ('DB_PASSWORD="a \\"quoted\\" word"', 'a "quoted" word'),
        ("DB_PASSWORD=${HOME}", "${HOME}"),
        ('DB_PASSWORD="${HOME:-x}"', "${HOME:-x}"),
        ("DB_PASSWORD=first\nDB_PASSWORD=last", "last"),
        ("DB_USER=x\r\nDB_PASSWORD=lines of Windows\r\n", "lines of Windows"),
    ],
)
def test_a_value_of_the_file_is_taken_as_it_is(file: File, line: str, password: str) -> None:
    """Also behind the mark that Windows puts at the beginning."""
    for mark in ("", "\ufeff"):
        assert load(file(f"{mark}{line}\n# a comment\n"), DB_PASSWORD=None).db_password == password


def test_lines_that_cannot_be_understood_are_told_without_what_they_hold(
    file: File, caplog: pytest.LogCaptureFixture
) -> None:
    load(file("DB_HOST=x\nthis is no setting\nDB_PORT=3306\nDB_PASSWORD='geheim\n"))
    assert caplog.messages == [f"python-dotenv could not parse statement starting at line {line}" for line in (2, 4)]


def test_a_file_that_is_asked_for_has_to_be_there_and_readable(file: File, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.env", tmp_path / ("x" * 300), file(b"DB_PORT=\xff")):
        said = complaints(path, MAX_WORKERS="0")
        assert said[0].startswith(f"{path} cannot be read (") and said[1].startswith("MAX_WORKERS must be")


def test_the_file_beside_main_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "HERE", tmp_path)
    assert load(tmp_path / ".env").results_dir == tmp_path


def test_another_file_is_found_from_the_folder_of_main(tmp_path: Path, file: File) -> None:
    relative = os.path.relpath(file("DB_PORT=from the file\n"), process.ROOT)
    arguments = ["--env-file", relative, "--dry-run"]
    with process.Running(*arguments, settings=NEEDED, folder=tmp_path, cwd=tmp_path) as running:
        ended = running.wait()
    said = f"DB_PORT must be a whole number from 1 to 65535. Set them in {process.ROOT}/{relative} "
    assert (ended.exit_code, ended.errors, said in ended.console) == (2, "", True)


def test_env_example_holds_every_setting_with_its_default_and_what_it_is_for(file: File) -> None:
    path = process.ROOT / ".env.example"
    own = {"DB_HOST": "localhost", "DB_NAME": "iterable_challenge", **dict.fromkeys(("DB_USER", *SECRETS), "")}
    assert dict(dotenv.dotenv_values(path, interpolate=False)) == {**own, **DEFAULTS}
    lines = path.read_text("utf-8").splitlines()
    assert [line for line in lines if re.match("# [A-Z_]+=", line)] == [f"# {name}_FILE=" for name in SECRETS]
    settings = [at for at, line in enumerate(lines) if re.match("(# )?[A-Z_]+=", line)]
    assert [lines[at] for at in settings if not re.match("# .* ", lines[at - 1])] == []
    filled_in = "\n".join(f"{line}{NEEDED[line[:-1]]}" if line[:-1] in NEEDED else line for line in lines)
    path = file(filled_in.replace("localhost", NEEDED["DB_HOST"]).replace("iterable_challenge", NEEDED["DB_NAME"]))
    assert main.load_environment_variables(path, {}) == SETTINGS


# Arguments, and what a run costs


def test_without_arguments_a_run_sends_everything_singly_and_talks() -> None:
    switches = dict.fromkeys(("dry_run", "changed_only", "bulk", "check", "quiet"), False)
    assert vars(parse_arguments([])) == {**switches, "limit": None, "at_least": None, "env_file": ".env"}


@pytest.mark.parametrize("option", ["--limit", "--at-least"])
def test_a_number_of_users_is_a_whole_number_from_1(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vars(parse_arguments([option, "010"]))[option[2:].replace("-", "_")] == 10
    for text, words in (("0", "take"), ("-1", "take"), ("1.0", "invalid"), ("ten", "invalid"), ("", "invalid")):
        with pytest.raises(SystemExit, match="2"):
            parse_arguments([f"{option}={text}"])
        assert words in capsys.readouterr().err


def test_a_run_costs_two_calls_a_user_or_group_at_the_share_of_the_limit() -> None:
    for users, bulk, calls, groups_a_second in ((0, False, 0, 450), (900, False, 1800, 450), (0, True, 0, 4.5)):
        assert main.cost(users, SETTINGS, bulk=bulk) == (calls, pytest.approx(calls / 2 / groups_a_second))
    for users, calls in ((1, 2), (1000, 2), (1001, 4)):
        assert main.cost(users, SETTINGS, bulk=True) == (calls, pytest.approx(calls / 2 / 4.5))


# A user's delivery

ROW = Record(
    user_id=2,
    first_name="Sarah",
    email=" Sarah.Johnson@email.com ",
    plan_type="pro",
    view_id=37,
    page="pricing",
    browser="desktop",
    location=None,
    event_time=datetime.fromisoformat("2026-01-13 14:30:45"),
)
SARAH = "sarah.johnson@email.com"
NO_ADDRESS = "no usable e-mail address: correct it in the customers table"


def test_a_row_becomes_a_delivery_of_both_payloads_in_compact_json() -> None:
    delivery = prepare(7, ROW, SETTINGS, {})
    user = (
        '{"email":"%s","dataFields":{"first_name":"Sarah","plan_type":"pro","recent_page_view":true,"candidate":"yes"}}'
    )
    event = (
        '{"email":"%s","eventName":"page_view","id":"page-view-37","createdAt":1768314645,"dataFields":'
        '{"page":"pricing","browser":"desktop","timestamp":"2026-01-13 14:30:45","candidate":"yes"}}'
    )
    payloads = {"user": Payload(SARAH, user % SARAH), "event": Payload(SARAH, event % SARAH)}
    assert delivery == Delivery(7, 2, SARAH, "page-view-37", delivery.fingerprint, **payloads)
    assert (delivery.to_send, delivery.status) == (True, "not_attempted")


def test_a_row_that_cannot_be_sent_is_a_failure_with_the_values_of_the_row() -> None:
    delivery = prepare(7, ROW._replace(email="nobody"), SETTINGS, {})
    assert delivery == Delivery(7, 2, "nobody", problem=NO_ADDRESS)
    assert (delivery.to_send, delivery.status) == (False, "total_failure")
    assert delivery.reasons == [main.Reason(None, None, None, NO_ADDRESS)]


def test_of_two_customers_of_one_address_or_two_rows_of_one_view_the_first_is_sent() -> None:
    seen: dict[str, Any] = {}
    rows = [
        ROW,
        ROW._replace(user_id=3, view_id=38, email=SARAH.upper()),
        ROW._replace(user_id=4, view_id=37, email="x@example.com"),
        ROW._replace(user_id=5, view_id=38, email="x@example.com"),  # what the rows before did not get
        ROW._replace(user_id=6, view_id=39, email=None),
        ROW._replace(user_id=7, view_id=39, email="y@example.com"),
    ]
    assert [prepare(number, row, SETTINGS, seen).problem for number, row in enumerate(rows)] == [
        "",
        "customer 2 has the same address: merge the two",
        "customer 2 has the same page view: make page_views.id unique",
        "",
        NO_ADDRESS,
        "",
    ]


def test_another_payload_or_project_has_another_fingerprint() -> None:
    columns = {"first_name": "Sara", "email": "sarah@email.com", "plan_type": "Pro", "view_id": 38, "page": "settings"}
    columns |= {"browser": "", "location": "Boston, US", "event_time": datetime.fromisoformat("2026-01-13 14:30:46")}
    project = {"iterable_api_base_url": "https://api.eu.iterable.com", "iterable_api_key": KEY[::-1]}
    made = [prepare(1, ROW, SETTINGS, {}), prepare(1, ROW._replace(first_name=None), SETTINGS, {})]
    made += [prepare(1, ROW._replace(**{name: value}), SETTINGS, {}) for name, value in columns.items()]
    made += [prepare(1, ROW, replace(SETTINGS, **{name: value}), {}) for name, value in project.items()]
    fingerprints = {delivery.fingerprint or "" for delivery in made}
    assert len(fingerprints) == len(made) == 12
    assert {len(bytes.fromhex(fingerprint)) for fingerprint in fingerprints} == {32}


def test_what_is_not_sent_does_not_change_the_fingerprint() -> None:
    row = ROW._replace(user_id=3, email=SARAH, event_time=ROW.event_time.replace(microsecond=5))
    settings = replace(SETTINGS, iterable_rate_limit=1, db_host="elsewhere", db_password="secret", log_level="DEBUG")
    assert prepare(9, row, settings, {}).fingerprint == prepare(1, ROW, SETTINGS, {}).fingerprint


VALUES = st.text(max_size=20) | st.sampled_from(["", "\x00", "😀", "\u202e", "\udcff"]) | st.binary(max_size=5)
COLUMNS = VALUES | st.none() | st.integers() | st.decimals() | st.floats() | st.lists(st.none(), max_size=1)
TIMES = st.datetimes(datetime(1000, 1, 1)) | st.just(date(2026, 1, 13)) | COLUMNS  # noqa: DTZ001
EMAILS = st.sampled_from(["a@x", " A@X", "b@x", b"b@x", "c@x", "d@x"])
ROWS = st.builds(
    Record, COLUMNS, COLUMNS, EMAILS | COLUMNS, COLUMNS, st.integers(1, 5) | COLUMNS, COLUMNS, COLUMNS, COLUMNS, TIMES
)


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.lists(ROWS, max_size=6))
def test_any_rows_become_lines_and_no_address_or_view_is_to_be_sent_twice(rows: list[Record]) -> None:
    seen: dict[str, Any] = {}
    deliveries = [prepare(number, row, SETTINGS, seen) for number, row in enumerate(rows, 1)]
    for number, delivery in enumerate(deliveries, 1):
        line = json.loads(logger_config.to_json(delivery.as_line()))
        assert (line["record"], line["status"]) == (number, "not_attempted" if delivery.to_send else "total_failure")
        assert delivery.to_send == (not delivery.problem)
        if delivery.to_send:
            user, event = json.loads(delivery.user.json), json.loads(delivery.event.json)
            assert (user["email"], event["email"], event["id"]) == (line["email"], line["email"], line["event_id"])
    to_send = [delivery for delivery in deliveries if delivery.to_send]
    assert len({each.email for each in to_send}) == len({each.event_id for each in to_send}) == len(to_send)
    payloads = {(each.fingerprint, each.user, each.event) for each in deliveries if each.fingerprint}
    assert len(payloads) == len({each.fingerprint for each in deliveries} - {None})


CODES = {200: "Success", 400: "BadParams", 409: "ForgottenUserError", None: None}


def call(endpoint: str, status: int | None) -> CallResult:
    ok = status == 200
    return CallResult(endpoint, ok, status, CODES[status], "message", "" if ok else f"reason {status}", "body")


def delivered(record: int, update: int | None = 0, event: int | None = 0, **values: Any) -> Delivery:
    """A user who got these answers; 0 is a call that was not made, None one without an answer."""
    email = f"user{record}@example.com"
    payloads = (Payload(email, '{"user":1}'), Payload(email, '{"event":1}'))
    delivery = Delivery(record, record, email, f"page-view-{record}", f"fingerprint {record}", *payloads, **values)
    delivery.users_update = None if update == 0 else call("users/update", update)
    delivery.events_track = None if event == 0 else call("events/track", event)
    return delivery


REFUSED = (400, "BadParams", "reason 400")
UNSENT = "the run ended before the event was sent"


@pytest.mark.parametrize(
    ("delivery", "status", "reasons"),
    [
        (delivered(1), "not_attempted", None),
        (delivered(1, without_calls="would_send"), "would_send", None),
        (delivered(1, problem="p"), "total_failure", [(None, None, None, "p")]),
        (delivered(1, 200, 200), "success", None),
        (delivered(1, 409), "forgotten", None),
        (delivered(1, 200, 409), "forgotten", None),
        (delivered(1, 200, 400), "partial_failure", [("events/track", *REFUSED)]),
        (delivered(1, 400, 200), "partial_failure", [("users/update", *REFUSED)]),
        (delivered(1, 400, 400), "total_failure", [("users/update", *REFUSED), ("events/track", *REFUSED)]),
        (delivered(1, None, 200), "partial_failure", [("users/update", None, None, "reason None")]),
        (delivered(1, 200), "partial_failure", [("events/track", None, None, UNSENT)]),
    ],
)
def test_status_and_reasons_of_a_user_follow_from_the_calls(delivery: Delivery, status: str, reasons: Any) -> None:
    assert (delivery.status, delivery.reasons if status.endswith("failure") else None) == (status, reasons)


# Groups and their delivery


@hypothesis_settings(deadline=None)
@given(st.lists(st.sampled_from([0, 1, 499_996, 499_997, 999_996, 999_997, 2_000_000])), st.integers(1, 4))
def test_groups_are_as_large_as_they_may_be_and_hold_everyone_once_in_order(sizes: list[int], most: int) -> None:
    """Size 0 is a row that is not to be sent: alone, and in nobody's way."""
    everyone = [
        replace(delivered(n), user=Payload("", "u" * size), event=Payload("", "ev")) for n, size in enumerate(sizes)
    ]
    groups = list(in_groups(iter(everyone), most))
    assert sorted(each.record for group in groups for each in group) == [each.record for each in everyone]
    assert [each for group in groups for each in group if each.to_send] == [each for each in everyone if each.to_send]
    assert all(len(group) == 1 or all(each.to_send for each in group) for group in groups)
    weights = [[len(each.user.json) + 4 for each in group] for group in groups if group[0].to_send]
    assert all(len(group) <= most and (len(group) == 1 or sum(group) <= 1_000_000) for group in weights)
    for group, (first, *_) in itertools.pairwise(weights):
        assert len(group) == most or sum(group) + first > 1_000_000


class Answering:
    """In the client's place: has a verdict for each user alone, and for a group without those in `unconfirmed`.

    User 13 is an error that nobody thought of. After `stop_after` calls the run is to stop.
    """

    retries, refused = 0, None

    def __init__(self, stop: Stop, unconfirmed: dict[str, set[int]], refused: set[int], stop_after: int) -> None:
        self._stop, self._unconfirmed, self._refused, self._stop_after = stop, unconfirmed, refused, stop_after
        self._lock = threading.Lock()
        self.sent: list[tuple[str, list[int]]] = []

    @property
    def calls(self) -> int:
        return len(self.sent)

    def update_users(self, users: Sequence[Payload]) -> list[CallResult | None]:
        return [None] * len(users) if self._stop.is_set() else self._answer("users/update", users)

    def track_events(self, events: Sequence[Payload]) -> list[CallResult | None]:
        return self._answer("events/track", events)

    def _answer(self, endpoint: str, payloads: Sequence[Payload]) -> list[CallResult | None]:
        numbers = [int(payload.email[4:].split("@")[0]) for payload in payloads]
        if 13 in numbers:
            raise ZeroDivisionError("what nobody thought of")
        with self._lock:
            self.sent += [(endpoint, numbers)] if numbers else []
            if self.calls >= self._stop_after:
                self._stop.set()
        group = numbers if len(numbers) > 1 else []
        unconfirmed = self._refused.union(self._unconfirmed[endpoint]).intersection(group)
        return [
            None if number in unconfirmed else call(endpoint, 400 if number in self._refused else 200)
            for number in numbers
        ]


NUMBERS = st.sets(st.integers(1, 12))


@hypothesis_settings(deadline=None, max_examples=150)
@given(st.integers(1, 5), NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.integers(1, 40))
def test_everyone_is_delivered_once_and_who_has_no_verdict_after_a_group_singly(
    most: int, unusable: set[int], updates: set[int], events: set[int], refused: set[int], stop_after: int
) -> None:
    """Also when the run is to stop on the way: then whoever has the update has the event, and no other user begins."""
    stop = Stop()
    client = Answering(stop, {"users/update": updates, "events/track": events}, refused, stop_after)
    everyone = [delivered(number, problem="p" if number in unusable else "") for number in range(1, 13)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(3) as threads:
        report = report_of(12, Path(folder), stop=stop)
        done = []
        for delivery in main.delivered(in_groups(opened(report, everyone), most), most + 1, client, threads, report):  # type: ignore[arg-type]
            if delivery:
                del report.open[delivery.record]
                done.append(delivery)
    assert sorted(delivery.record for delivery in done) == list(range(1, 13))
    for delivery in done:
        verdict = 400 if delivery.record in refused else 200
        begun = delivery.users_update is not None
        assert [one.status for one in delivery.calls] == [verdict] * 2 * begun
        assert begun or stop.is_set() or delivery.record in unusable
        for endpoint, unconfirmed in (("users/update", updates | refused), ("events/track", events | refused)):
            calls = [len(numbers) for name, numbers in client.sent if name == endpoint and delivery.record in numbers]
            singly_too = begun and calls[0] > 1 and delivery.record in unconfirmed
            assert [size > 1 for size in calls] == ([True, False] if singly_too else [size > 1 for size in calls[:1]])


def opened(report: Report, deliveries: Sequence[Delivery]) -> Iterator[Delivery]:
    """As main.prepared() does it."""
    for delivery in deliveries:
        report.open[delivery.record] = delivery
        yield delivery


def report_of(
    total: int, folder: Path, *arguments: str, memory: dict[str, str] | None = None, stop: Stop | None = None
) -> Report:
    results = ResultsFile(folder, {"mode": "send"}, datetime(2026, 1, 13, tzinfo=timezone.utc))
    return Report(total, parse_arguments(arguments), memory or {}, results, stop or Stop())


def finished(report: Report) -> dict[str, Any]:
    """The document of its results file, when it is told that all is done."""
    client: Any = Answering(report.stop, {}, set(), 1)
    report.finish(client)
    return dict(json.loads(report.results.path.read_text("utf-8")))


@pytest.mark.parametrize("trouble", ["a worker fails", "no thread starts", "no memory for a row"])
def test_whatever_goes_wrong_who_was_told_is_on_record_and_the_rest_is_not_attempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def out_of_memory(number: int, *rest: Any) -> Delivery:
        if number == 13:
            raise MemoryError
        return prepare(number, *rest)

    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    if trouble == "no thread starts":
        monkeypatch.setattr(threading.Thread, "start", no_thread)
    if trouble == "no memory for a row":
        monkeypatch.setattr(main, "prepare", out_of_memory)
    records = deque(ROW._replace(user_id=n, view_id=n, email=f"user{n}@example.com") for n in range(1, 31))
    report = report_of(30, tmp_path)
    client = Answering(report.stop, {"users/update": set(), "events/track": set()}, set(), 1000)
    main.deliver(records, client, replace(SETTINGS, max_workers=2), report)  # type: ignore[arg-type]
    monkeypatch.undo()
    told = {number for endpoint, [number] in client.sent if endpoint == "events/track"}
    assert (told != set(), told <= {*range(1, 31)} - {13}) == (trouble != "no thread starts", True)
    document, broken = finished(report), int(trouble == "a worker fails")
    keys = ("outcome", "exit_code", "total_users", "success", "total_failures", "not_attempted")
    expected_counts = ["aborted", 1, 30, len(told), broken, 30 - len(told) - broken]
    assert [document["summary"][key] for key in keys] == expected_counts
    expected = {number: "success" if number in told else "not_attempted" for number in range(1, 31)}
    statuses = {line["record"]: line["status"] for line in document["results"]}
    assert statuses == expected | ({13: "total_failure"} if broken else {})


# The report

ENDINGS = {
    "success": (200, 200),
    "partial_failures": (200, 400),
    "total_failures": (None, None),
    "forgotten": (409, 0),
    "not_attempted": (0, 0),
    "unchanged": (0, 0),
}


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([*ENDINGS]), max_size=12), st.randoms(use_true_random=False))
def test_users_are_counted_whatever_order_they_finish_in_and_told_in_their_order(
    endings: list[str], order: Any
) -> None:
    users = [delivered(number, *ENDINGS[ending]) for number, ending in enumerate(endings, 1)]
    for user, ending in zip(users, endings, strict=True):
        user.without_calls = "unchanged" if ending == "unchanged" else "not_attempted"
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.log, "log", lambda level, text, *values, **_: told.append(text % values))
        report = report_of(len(users), Path(folder))
        record(report, order.sample(users, len(users)))
        document = finished(report)
    counts, summary = Counter(endings), document["summary"]
    assert {ending: summary[ending] for ending in ENDINGS} == {ending: counts[ending] for ending in ENDINGS}
    assert (summary["total_users"], summary["exit_code"]) == (len(users), int(report.failures > 0))
    assert Counter(line["status"] for line in document["results"]) == Counter(
        user.status for user in users if user.status != "unchanged"
    )
    named = [int(number) for text in told for number in re.findall(r"user: user(\d+)@", text)]
    wanted = ("success", "partial_failures", "total_failures")
    assert named == [number for number, ending in enumerate(endings, 1) if ending in wanted]


def record(report: Report, users: Sequence[Delivery]) -> None:
    report.open = {user.record: user for user in users}
    for user in users:
        report.record(user)


def test_reasons_count_users_the_most_frequent_first_and_ten_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    users = [delivered(number, None, None) for number in (1, 2)]  # both calls for one reason: one reason of one user
    users += [delivered(3, 200, 400), *(delivered(number, problem=f"problem {number}") for number in range(4, 14))]
    report = report_of(13, tmp_path)
    record(report, users)
    caplog.clear()
    summary = finished(report)["summary"]
    problems = [(None, None, None, f"problem {number}", 1) for number in range(4, 14)]
    answers = [("users/update", None, None, "reason None", 2), ("events/track", *REFUSED, 1)]
    assert [tuple(each.values()) for each in summary["failure_reasons"]] == answers + problems
    assert caplog.messages[6:-2] == [
        "  2 users: users/update no answer: reason None",
        "  1 user: events/track 400 BadParams: reason 400",
        *(f"  1 user: problem {number}" for number in range(4, 12)),
        "  2 more reasons stand in the results file",
    ]


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
@pytest.mark.parametrize("change", [None, "fingerprint", "answer", "user"])
def test_a_failure_is_known_when_user_payloads_and_reason_are_those_of_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quiet: list[str], change: str | None
) -> None:
    """It is told all the same, but not on a quiet console."""
    caplog.set_level("INFO")
    before = delivered(1, 200, 400)
    memory = {"2" if change == "user" else "1": logger_config.verdict(before.as_line()) or ""}
    now = delivered(1, 200, None if change == "answer" else 400)
    now.fingerprint = f"other {now.fingerprint}" if change == "fingerprint" else now.fingerprint
    report = report_of(1, tmp_path, *quiet, memory=memory)
    record(report, [now])
    finished(report)
    assert now.hidden == (change is None and quiet != [])
    on_console = [each for each in caplog.records if each.levelname == "ERROR" and not hasattr(each, "file_only")]
    assert (on_console == []) == now.hidden
    [reason] = [each for each in caplog.records if "reason" in each.message and "events/track" in each.message]
    assert hasattr(reason, "file_only") == now.hidden


def test_progress_is_told_every_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(main, "time", clock)
    report = report_of(1000, tmp_path)
    for second in range(1, 31):
        clock.now += 1
        report.counts["success"] += 10 if second <= 10 else 0
        report.progress()
    assert len(caplog.messages) == 15
    assert caplog.messages[0] == "Progress: 20/1000 (2 %), 10.0 users/s, 98 s left, failures: 0"
    assert caplog.messages[-1] == "Progress: 100/1000 (10 %), 3.3 users/s, 270 s left, failures: 0"
