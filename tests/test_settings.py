"""Settings, secrets and command line: where they are read, and what is a complaint."""

from __future__ import annotations

import os
import pwd
import re
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import dotenv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import main
from iterable_client import IdentifyBy
from lab.process import ROOT, CreateCustomers, Ended, RunMain
from lab.standin_handle import StandIn
from main import Settings, SettingsError, parse_arguments

API_KEY = "fedcba9876543210fedcba9876543210"
NO_FILE = Path(os.devnull)
NEEDED = {
    "DB_HOST": "db.example.com",
    "DB_USER": "reader",
    "DB_PASSWORD": "open sesame",
    "DB_NAME": "shop",
    "ITERABLE_API_KEY": API_KEY,
}
DEFAULTS = {
    "DB_PORT": "3306",
    "DB_SSL_CA": "",
    "ITERABLE_API_BASE_URL": "https://api.iterable.com",
    "ITERABLE_IDENTIFY_BY": "email",
    "ITERABLE_RATE_LIMIT": "450",
    "ITERABLE_MAX_ATTEMPTS": "5",
    "ITERABLE_TIMEOUT": "30",
    "MAX_WORKERS": "300",
    "LOG_LEVEL": "INFO",
    "LOG_FILE": "iterable_integration.log",
    "RESULTS_DIR": ".",
}
SETTINGS = Settings(
    db_host="db.example.com",
    db_user="reader",
    db_password="open sesame",
    db_name="shop",
    db_port=3306,
    db_ssl_ca="",
    iterable_api_key=API_KEY,
    iterable_api_base_url="https://api.iterable.com",
    iterable_identify_by=IdentifyBy.EMAIL,
    iterable_rate_limit=450,
    iterable_max_attempts=5,
    iterable_timeout=30.0,
    max_workers=300,
    log_level="INFO",
    log_file=ROOT / "iterable_integration.log",
    results_dir=ROOT,
)
SECRETS = ("DB_PASSWORD", "ITERABLE_API_KEY")
PATHS = ("DB_SSL_CA", "LOG_FILE", "RESULTS_DIR", *(f"{name}_FILE" for name in SECRETS))

# Permissions do not stop root, unless it gives its rights away.
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-all") if os.getuid() == 0 else ()

Database = dict[str, str]  # settings
WriteFile = Callable[[str | bytes], Path]
RunWithFile = Callable[..., Ended]


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    """`write_file(content)` returns the path of a new file with it."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / f"file{len(list(tmp_path.iterdir()))}"
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)
        return path

    return write


def load(env_file: Path = NO_FILE, /, **changes: str | None) -> Settings:
    """The settings of a file and of NEEDED with these changes; None removes one."""
    return main.load_environment_variables(env_file, make_environ(changes))


def make_environ(changes: Mapping[str, str | None]) -> dict[str, str]:
    environ = {**NEEDED, **changes}
    return {name: text for name, text in environ.items() if text is not None}


def list_complaints(env_file: Path = NO_FILE, /, **changes: str | None) -> list[str]:
    """The complaints about them, without the advice at the end."""
    with pytest.raises(SettingsError) as error:
        load(env_file, **changes)
    message = str(error.value).removeprefix("Settings: ")
    complaints, _, rest = message.partition(
        f". Set them in the environment or in {env_file}"
    )
    assert rest == " (see .env.example)"
    return complaints.split("; ")


def settings_with(**changes: Any) -> Settings:
    """SETTINGS with these changes."""
    return replace(SETTINGS, **changes)


# Values


def test_unset_settings_have_defaults() -> None:
    assert load() == SETTINGS


@pytest.mark.parametrize("blank", ["", " \t"])
def test_blank_settings_have_defaults(blank: str) -> None:
    assert load(**dict.fromkeys(DEFAULTS, blank)) == SETTINGS


def test_every_setting_is_read() -> None:
    environ = {
        "DB_HOST": "/run/db.sock",
        "DB_USER": " user\t",
        "DB_PASSWORD": " p ",
        "DB_NAME": "name",
        "DB_PORT": " 1 ",
        "DB_SSL_CA": "requirements.txt",
        "ITERABLE_API_KEY": "!~",
        "ITERABLE_API_BASE_URL": "https://api.eu.iterable.com",
        "ITERABLE_IDENTIFY_BY": "userId",
        "ITERABLE_RATE_LIMIT": "500",
        "ITERABLE_MAX_ATTEMPTS": "1",
        "ITERABLE_TIMEOUT": "0.25",
        "MAX_WORKERS": "7",
        "LOG_LEVEL": "DEBUG",
        "LOG_FILE": "/var/x.log",
        "RESULTS_DIR": "out/here",
        "DB_PASSWORD_FILE": "",
        "ITERABLE_API_KEY_FILE": "",
    }

    assert main.load_environment_variables(environ=environ) == Settings(
        db_host="/run/db.sock",
        db_user="user",
        db_password=" p ",
        db_name="name",
        db_port=1,
        db_ssl_ca=str(ROOT / "requirements.txt"),
        iterable_api_key="!~",
        iterable_api_base_url="https://api.eu.iterable.com",
        iterable_identify_by=IdentifyBy.USER_ID,
        iterable_rate_limit=500,
        iterable_max_attempts=1,
        iterable_timeout=0.25,
        max_workers=7,
        log_level="DEBUG",
        log_file=Path("/var/x.log"),
        results_dir=ROOT / "out" / "here",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"ITERABLE_API_KEY": None},
        {"ITERABLE_API_KEY": ""},
        {"ITERABLE_API_KEY": " "},
        {"ITERABLE_API_KEY": None, "ITERABLE_API_KEY_FILE": "/nowhere/key"},
    ],
)
def test_a_dry_run_needs_no_key(changes: dict[str, str | None]) -> None:
    environ = make_environ(changes)

    loaded = main.load_environment_variables(NO_FILE, environ, needs_key=False)

    assert loaded == settings_with(iterable_api_key="")


LIMITS = {
    "DB_PORT": (1, 65535),
    "ITERABLE_RATE_LIMIT": (1, 100_000),
    "ITERABLE_MAX_ATTEMPTS": (1, 100),
    "ITERABLE_TIMEOUT": (0.1, 3600),
    "MAX_WORKERS": (1, 2000),
}
NO_NUMBERS = ("0", "-1", "1e2", "1_000", "five", "nan", "١", "9" * 5000)
NO_PORT = "DB_PORT must be a whole number from 1 to 65535"
NO_KEY = "ITERABLE_API_KEY has a character that no key has: copy it again"


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_a_number_are_taken(name: str) -> None:
    for limit in LIMITS[name]:
        loaded = load(**{name: str(limit)})

        assert loaded == settings_with(**{name.lower(): limit})


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_has_one_form(name: str) -> None:
    lowest, highest = LIMITS[name]
    kind = "number" if name == "ITERABLE_TIMEOUT" else "whole number"
    complaint = f"{name} must be a {kind} from {lowest} to {highest}"

    for text in (*NO_NUMBERS, str(highest + 1)):
        assert list_complaints(**{name: text}) == [complaint]


def test_a_whole_number_has_no_fraction() -> None:
    assert list_complaints(DB_PORT="5.0") == [NO_PORT]


@pytest.mark.parametrize(
    "host",
    [
        "https://api.eu.iterable.com:1",
        "http://localhost:80",
        "http://127.1.2.3",
        "http://[::1]",
    ],
)
def test_a_base_url_may_have_another_ending(host: str) -> None:
    for text in (host, host.upper(), f"{host}/", f"{host}/api", f"{host}/api//"):
        loaded = load(ITERABLE_API_BASE_URL=text)

        assert loaded == settings_with(iterable_api_base_url=host)


# Complaints

NO_LEVEL = "LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR"
NO_KIND = "ITERABLE_IDENTIFY_BY must be one of email, userId"
NO_HOST = (
    "ITERABLE_API_BASE_URL must be a host's address such as https://api.iterable.com,"
    " without path, query or user"
)
UNENCRYPTED = (
    "ITERABLE_API_BASE_URL must begin with https://,"
    " or the API key would travel in the clear"
)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("LOG_LEVEL", "info", NO_LEVEL),
        ("LOG_LEVEL", "CRITICAL", NO_LEVEL),
        ("LOG_LEVEL", "10", NO_LEVEL),
        ("ITERABLE_IDENTIFY_BY", "userid", NO_KIND),
        ("ITERABLE_IDENTIFY_BY", "hybrid", NO_KIND),
        ("ITERABLE_API_KEY", f"{API_KEY} {API_KEY}", NO_KEY),
        ("ITERABLE_API_KEY", "schlüssel", NO_KEY),
        ("DB_PASSWORD", "a\0b", "DB_PASSWORD is not text"),
        ("DB_PASSWORD", "a\udcff", "DB_PASSWORD is not text"),
        ("DB_SSL_CA", "ca.pem", "DB_SSL_CA is no file"),
        ("DB_SSL_CA", "tests", "DB_SSL_CA is no file"),
        ("DB_SSL_CA", "x" * 5000, "DB_SSL_CA is no file"),
        ("ITERABLE_API_BASE_URL", "api.iterable.com", NO_HOST),
        ("ITERABLE_API_BASE_URL", "ftp://x", NO_HOST),
        ("ITERABLE_API_BASE_URL", "https://[::::]", NO_HOST),
        ("ITERABLE_API_BASE_URL", f"https://ann:{API_KEY}@x", NO_HOST),
        ("ITERABLE_API_BASE_URL", "https://x/v2", NO_HOST),
        ("ITERABLE_API_BASE_URL", "https://x?x=1", NO_HOST),
        ("ITERABLE_API_BASE_URL", "https://x\nX: y", NO_HOST),
        ("ITERABLE_API_BASE_URL", "https://x:99999", NO_HOST),
        ("ITERABLE_API_BASE_URL", "http://x", UNENCRYPTED),
        ("ITERABLE_API_BASE_URL", "http://localhost.x", UNENCRYPTED),
        ("ITERABLE_API_BASE_URL", "http://127.0.0.1.x", UNENCRYPTED),
        ("ITERABLE_API_BASE_URL", "http://127.0.0.256", UNENCRYPTED),
    ],
)
def test_another_value_is_a_complaint(name: str, text: str, complaint: str) -> None:
    assert list_complaints(**{name: text}) == [complaint]


def test_missing_settings_are_named() -> None:
    missing = [f"{name} is missing" for name in NEEDED]

    assert list_complaints(**dict.fromkeys(NEEDED)) == missing


def test_all_complaints_come_in_one_message(write_file: WriteFile) -> None:
    path = write_file("DB_HOST=\nDB_PORT=one\n")

    complaints = list_complaints(
        path, DB_HOST=None, DB_PASSWORD=None, ITERABLE_API_KEY="two words"
    )

    assert complaints == [
        "DB_HOST is empty",
        "DB_PASSWORD is missing",
        NO_PORT,
        NO_KEY,
    ]


NAMES = [*NEEDED, *DEFAULTS, *(f"{name}_FILE" for name in SECRETS)]
ODD_TEXTS = st.one_of(
    st.text(),
    st.text(st.characters()),
    st.sampled_from([*DEFAULTS.values(), *NEEDED.values(), "a\x00b", "~", "~x", "$"]),
)


@settings(deadline=None, max_examples=200)
@given(
    values=st.dictionaries(st.sampled_from(NAMES), ODD_TEXTS),
    odd_text=st.text(min_size=1),
    needs_key=st.booleans(),
)
def test_no_secret_is_shown(
    values: dict[str, str], odd_text: str, needs_key: bool
) -> None:
    secret = f"s3cr3t{odd_text}s3cr3t"
    environ = {**NEEDED, **values, **dict.fromkeys(SECRETS, secret)}

    try:
        loaded = main.load_environment_variables(NO_FILE, environ, needs_key=needs_key)
    except SettingsError as error:
        # In ASCII, because pytest-xdist cannot report half a surrogate pair.
        shown = ascii(str(error))
        assert any(f" {name} " in shown for name in environ)
    else:
        shown = repr(loaded)
        assert loaded.db_password == secret
        assert loaded.iterable_api_key in (secret.strip(), "")
        assert loaded.log_file.is_absolute()
        assert loaded.results_dir.is_absolute()
    assert "s3cr3t" not in shown


# Secrets


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("variable", [None, ""])
def test_a_secret_may_stand_in_a_file(
    write_file: WriteFile, name: str, variable: str | None
) -> None:
    path = write_file("s3cr3t#")
    expected = settings_with(**{name.lower(): "s3cr3t#"})

    for form in (f" {path} ", os.path.relpath(path, ROOT)):
        assert load(**{name: variable, f"{name}_FILE": form}) == expected


@pytest.mark.parametrize("name", SECRETS)
def test_a_blank_path_is_no_file(name: str) -> None:
    assert load(**{f"{name}_FILE": " "}) == SETTINGS


@pytest.mark.parametrize("secret", ["", "a\n", "\ra", " a\tb\nc ", "pä😀ss"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_one_line_break_is_no_part_of_a_secret(
    write_file: WriteFile, secret: str, ending: str
) -> None:
    path = write_file(secret + ending)

    loaded = load(DB_PASSWORD=None, DB_PASSWORD_FILE=str(path))

    assert loaded == settings_with(db_password=secret)


@pytest.mark.parametrize("name", SECRETS)
def test_both_forms_of_a_secret_are_a_complaint(
    write_file: WriteFile, name: str
) -> None:
    path = write_file("another secret")

    complaints = list_complaints(**{name: "a-secret", f"{name}_FILE": str(path)})

    assert complaints == [f"{name} and {name}_FILE are both set: keep one of them"]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nowhere/secret", "No such file or directory"),
        ("tests", "Is a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_an_unreadable_secret_file_is_one_complaint(
    name: str, path: str, reason: str
) -> None:
    complaints = list_complaints(**{name: None, f"{name}_FILE": path})

    assert complaints == [f"{name}_FILE cannot be read ({reason})"]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_file_must_hold_text(write_file: WriteFile, name: str) -> None:
    path = write_file(b"\xff\xfe")

    complaints = list_complaints(**{name: None, f"{name}_FILE": str(path)})

    assert complaints == [f"{name} is not text"]


def test_an_empty_file_of_the_key_is_a_complaint(write_file: WriteFile) -> None:
    path = write_file("\n")

    complaints = list_complaints(ITERABLE_API_KEY=None, ITERABLE_API_KEY_FILE=str(path))

    assert complaints == ["ITERABLE_API_KEY_FILE names an empty file"]


def test_a_key_in_a_file_is_checked(write_file: WriteFile) -> None:
    path = write_file("two words")

    complaints = list_complaints(ITERABLE_API_KEY=None, ITERABLE_API_KEY_FILE=str(path))

    assert complaints == [NO_KEY]


WRAPPED_SECRETS = {
    '"s3cr3t"': "is in quotes",  # docker --env-file keeps them
    "'s3cr3t'": "is in quotes",
    "\ufeffs3cr3t": "has a byte-order mark",  # editors of Windows write it
}


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("text", WRAPPED_SECRETS)
def test_quotes_and_marks_are_no_part_of_a_secret(name: str, text: str) -> None:
    [complaint] = list_complaints(**{name: text})

    assert complaint.startswith(f"{name} {WRAPPED_SECRETS[text]}")
    assert "s3cr3t" not in complaint


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("text", WRAPPED_SECRETS)
def test_quotes_and_marks_are_no_part_of_a_file(
    write_file: WriteFile, name: str, text: str
) -> None:
    path = write_file(text)

    [complaint] = list_complaints(**{name: None, f"{name}_FILE": str(path)})

    assert complaint.startswith(f"{name} {WRAPPED_SECRETS[text]}")
    assert "s3cr3t" not in complaint


@pytest.mark.parametrize("password", ["\"it's", "a'b'", "'", "''x\""])
def test_a_password_may_hold_quotes(password: str) -> None:
    assert load(DB_PASSWORD=password) == settings_with(db_password=password)


# Paths


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    "path", ["$HOME/x", "${HOME}/x", "%h/x", "%APPDATA%", '"/tmp/x"', "'/tmp/x'"]
)
def test_a_path_is_not_taken_literally(name: str, path: str) -> None:
    """What a shell, systemd or cmd.exe would have replaced."""
    without_secret = {name.removesuffix("_FILE"): None, name: path}

    complaints = list_complaints(**without_secret)

    assert len(complaints) == 1
    assert complaints[0].startswith(f"{name} ")


def test_a_tilde_is_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ca.pem", "password", "key"):
        (tmp_path / name).write_text(f"the {name}".replace(" ", "-"))

    loaded = load(
        DB_SSL_CA="~/ca.pem",
        DB_PASSWORD=None,
        DB_PASSWORD_FILE="~/password",
        ITERABLE_API_KEY=None,
        ITERABLE_API_KEY_FILE="~/key",
        LOG_FILE="~/logs/run.log",
        RESULTS_DIR="~",
    )

    assert loaded == settings_with(
        db_ssl_ca=str(tmp_path / "ca.pem"),
        db_password="the-password",
        iterable_api_key="the-key",
        log_file=tmp_path / "logs" / "run.log",
        results_dir=tmp_path,
    )


def test_a_tilde_works_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under cron and systemd: the folder is that of the passwd entry."""
    monkeypatch.delenv("HOME", raising=False)
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)

    assert load(RESULTS_DIR="~/results").results_dir == home / "results"


def test_a_tilde_without_a_home_folder_is_a_complaint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container whose user has no passwd entry."""

    def find_nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", find_nobody)

    [complaint] = list_complaints(RESULTS_DIR="~/results")

    assert complaint.startswith("RESULTS_DIR ")
    assert "home" in complaint


def test_the_home_folder_of_nobody_is_a_complaint() -> None:
    [complaint] = list_complaints(LOG_FILE="~no-such-account/run.log")

    assert complaint.startswith("LOG_FILE ")


# The .env file


def test_the_environment_wins(write_file: WriteFile) -> None:
    path = write_file(
        "DB_HOST=file.example.com\nDB_NAME=of_file\nDB_PORT=1\nMAX_WORKERS=7\n"
    )

    # A variable that is set to nothing is set, too.
    loaded = load(path, DB_NAME=None, DB_PORT="2", MAX_WORKERS="")

    assert loaded == settings_with(db_name="of_file", db_port=2)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
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
def test_a_value_of_the_file_is_taken_as_it_is(
    write_file: WriteFile, mark: str, line: str, password: str
) -> None:
    path = write_file(f"{mark}{line}\n# a comment\n")

    assert load(path, DB_PASSWORD=None).db_password == password


def test_bytes_that_are_no_text_are_a_complaint(write_file: WriteFile) -> None:
    path = write_file(b"# \xff\nDB_PORT=\xff")

    assert list_complaints(path) == ["DB_PORT is not text"]


def test_lines_of_another_form_are_named(write_file: WriteFile) -> None:
    path = write_file("DB_PORT=1\nDB_SSL_CA: ca.pem\nRESULTS_DIR='out\n")

    complaints = list_complaints(path)

    assert complaints == [
        f"line 2 of {path} cannot be read",
        f"line 3 of {path} cannot be read",
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_in_utf16_is_one_complaint(write_file: WriteFile, encoding: str) -> None:
    """As Windows saves what it calls Unicode."""
    lines = [f"{name}={text}\r\n" for name, text in NEEDED.items()]
    path = write_file("".join(lines).encode(encoding))

    with pytest.raises(SettingsError) as error:
        main.load_environment_variables(path, {})

    message = str(error.value)
    assert "UTF-16" in message
    assert "UTF-8" in message
    assert f"{path} is not in UTF-8" in message
    assert "line 1" not in message
    assert "is missing" not in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no.env", "No such file or directory"), (".", "Is a directory")],
)
def test_an_env_file_that_cannot_be_read_is_named(
    run_main: RunMain, tmp_path: Path, name: str, reason: str
) -> None:
    path = tmp_path / name

    ended = run_main("--env-file", str(path), database={})

    assert ended.exit_code == 2
    assert ended.errors == ""
    assert ended.console.count("\n") == 1
    assert str(path) in ended.console
    assert reason in ended.console
    assert "--env-file" in ended.console


def test_an_env_file_of_another_account_is_named(
    run_main: RunMain, tmp_path: Path
) -> None:
    path = tmp_path / "private.env"
    path.touch(mode=0)

    ended = run_main("--env-file", str(path), database={}, wrapper=WITHOUT_RIGHTS)

    assert ended.exit_code == 2
    assert ended.console.count("\n") == 1
    assert "Permission denied" in ended.console
    assert str(path) in ended.console


def test_an_env_file_is_relative_to_main(
    run_main: RunMain, write_file: WriteFile
) -> None:
    relative = os.path.relpath(write_file("DB_PORT=from the file\n"), ROOT)

    ended = run_main("--env-file", relative, database=NEEDED)

    assert ended.exit_code == 2
    assert ended.errors == ""
    assert (
        f"Settings: {NO_PORT}. Set them in the environment or in {ROOT}/{relative} "
        in ended.console
    )


def test_an_env_file_may_be_in_the_home_folder(
    run_main: RunMain, tmp_path: Path
) -> None:
    (tmp_path / "run.env").write_text("DB_PORT=from the file\n")

    ended = run_main("--env-file=~/run.env", database=NEEDED, HOME=str(tmp_path))

    assert ended.exit_code == 2
    assert (
        f"{NO_PORT}. Set them in the environment or in {tmp_path}/run.env "
        in ended.console
    )


def test_env_example_has_every_setting() -> None:
    path = ROOT / ".env.example"
    values = {
        **DEFAULTS,
        "DB_HOST": "localhost",
        "DB_USER": "",
        "DB_PASSWORD": "",
        "DB_NAME": "iterable_challenge",
        "ITERABLE_API_KEY": "",
    }

    assert dotenv.dotenv_values(path, interpolate=False) == values


def test_env_example_has_the_other_variables() -> None:
    text = (ROOT / ".env.example").read_text("utf-8")

    commented = re.findall("^# ([A-Z_]+)=$", text, re.MULTILINE)

    assert commented == [
        "DB_PASSWORD_FILE",
        "ITERABLE_API_KEY_FILE",
        "HTTPS_PROXY",
        "NO_PROXY",
        "REQUESTS_CA_BUNDLE",
    ]


# Names that resemble a setting's

RESEMBLING = {
    "ITERABLE_BASE_URL": "ITERABLE_API_BASE_URL",
    "MAX_WORKER": "MAX_WORKERS",
    "DB_HOSTNAME": "DB_HOST",
    "db_port": "DB_PORT",
    "ITERABLE_APIKEY": "ITERABLE_API_KEY",
    "LOGLEVEL": "LOG_LEVEL",
}
OTHER_PROGRAMS = (
    "TZ",
    "LANG",
    "DEBUG",
    "COMPOSE_PROJECT_NAME",
    "MYSQL_ROOT_PASSWORD",
    "SENTRY_DSN",
    "PYTHONUNBUFFERED",
)


@pytest.fixture(scope="module")
def customer(create_customers: CreateCustomers) -> Database:
    """The settings of a database with one user."""
    return create_customers(1)


@pytest.fixture
def misspelt(write_file: WriteFile) -> str:
    """The path of an `.env` with names that are no settings."""
    names = [*RESEMBLING, *OTHER_PROGRAMS]
    return str(write_file("".join(f"{name}=s3cr3t\n" for name in names)))


def find_named(ended: Ended) -> dict[str, str]:
    """The names that a run says it does not know, with those that they resemble."""
    named = {}
    for name in (*RESEMBLING, *OTHER_PROGRAMS):
        for line in ended.console.splitlines():
            if re.search(rf"\b{name}\b", line):
                named[name] = line
    return named


@pytest.mark.parametrize("option", ["--check", "--dry-run"])
def test_names_that_resemble_a_setting_are_named(
    run_main: RunMain, customer: Database, misspelt: str, option: str
) -> None:
    ended = run_main(option, "--env-file", misspelt, database=customer)

    assert ended.exit_code == 0
    assert "s3cr3t" not in ended.console + ended.log
    named = find_named(ended)
    assert set(named) == set(RESEMBLING)
    for name, setting in RESEMBLING.items():
        assert re.search(rf"\b{setting}\b", named[name])


def test_a_name_that_may_hold_a_secret_is_not_shown(
    run_main: RunMain, customer: Database, write_file: WriteFile
) -> None:
    path = write_file("DB_PASSWORD:s3cr3t=word\nITERABLE_API_KEY:s3cr3t=\n")

    ended = run_main("--check", "--env-file", str(path), database=customer)

    assert "s3cr3t" not in ended.everything.replace(path.read_text(), "")


@pytest.mark.parametrize("option", ["--check", "--dry-run"])
def test_a_quiet_run_does_not_name_them(
    run_main: RunMain, customer: Database, misspelt: str, option: str
) -> None:
    ended = run_main(option, "--quiet", "--env-file", misspelt, database=customer)

    assert ended.exit_code == 0
    assert ended.console == ""


# Proxies and certificates


class Proxy(socketserver.ThreadingTCPServer):
    """A proxy that makes tunnels. `requests` are the first lines that it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Tunnel(socketserver.StreamRequestHandler):
    """A connection of the proxy, from CONNECT on."""

    def handle(self) -> None:
        """Pass on bytes in both directions."""
        request, _, _ = self.rfile.readline().decode().partition(" HTTP/")
        while self.rfile.readline().strip():
            pass  # a header
        assert isinstance(self.server, Proxy)
        self.server.requests.append(request)
        host, _, port = request.split()[1].partition(":")
        with socket.create_connection((host, int(port))) as target:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pump, args=(target, self.connection))
            back.start()
            pump(self.connection, target)
            back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on what arrives, until either side closes."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def secure() -> Iterator[StandIn]:
    """A stand-in by https, with a certificate of its own authority."""
    with StandIn(tls="good") as standin:
        yield standin


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy
        proxy.shutdown()


@pytest.fixture
def check_secure(
    run_main: RunMain,
    customer: Database,
    write_file: WriteFile,
    secure: StandIn,
) -> RunWithFile:
    """`check_secure(text, **SETTINGS)`: --check with this `.env` against `secure`."""

    def check(text: str, **more: Any) -> Ended:
        path = write_file(f"REQUESTS_CA_BUNDLE={secure.ca_file}\n{text}\n")
        arguments = ("--check", "--env-file", str(path))
        return run_main(*arguments, database=customer, url=secure.url, **more)

    return check


def test_a_certificate_authority_of_the_file_is_trusted(
    check_secure: RunWithFile,
) -> None:
    ended = check_secure("")

    assert ended.exit_code == 0


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY", "https_proxy"])
def test_a_proxy_of_the_file_is_used(
    check_secure: RunWithFile, secure: StandIn, proxy: Proxy, variable: str
) -> None:
    ended = check_secure(f"{variable}={proxy.url}")

    assert ended.exit_code == 0
    assert set(proxy.requests) == {f"CONNECT localhost:{secure.port}"}


def test_a_host_of_no_proxy_in_the_file_is_spared(
    check_secure: RunWithFile, proxy: Proxy
) -> None:
    ended = check_secure(f"HTTPS_PROXY={proxy.url}\nNO_PROXY=example.com,localhost")

    assert ended.exit_code == 0
    assert proxy.requests == []


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
def test_a_proxy_of_the_environment_wins(
    check_secure: RunWithFile, proxy: Proxy, variable: str
) -> None:
    ended = check_secure("HTTPS_PROXY=http://127.0.0.1:1", **{variable: proxy.url})

    assert ended.exit_code == 0
    assert proxy.requests != []


def test_the_environment_may_switch_a_proxy_off(
    check_secure: RunWithFile, proxy: Proxy
) -> None:
    ended = check_secure(f"HTTPS_PROXY={proxy.url}", HTTPS_PROXY="")

    assert ended.exit_code == 0
    assert proxy.requests == []


# The command line


def read_usage_error(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said about these arguments, which must be a usage error."""
    with pytest.raises(SystemExit) as error:
        parse_arguments(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.partition("error: ")[2].strip()


@pytest.mark.parametrize("option", ["--limit", "--at-least"])
@pytest.mark.parametrize("number", ["0", "-1", "ten", "1.5", "1000000000"])
def test_a_number_of_users_is_whole_and_positive(
    capsys: pytest.CaptureFixture[str], option: str, number: str
) -> None:
    message = read_usage_error(f"{option}={number}", capsys=capsys)

    assert message == (f"argument {option}: must be a whole number from 1 to 999999999")


@pytest.mark.parametrize(
    "option",
    [
        "--dry-run",
        "--limit=1",
        "--at-least=1",
        "--changed-only",
        "--reset-left",
        "--bulk",
    ],
)
def test_a_check_takes_no_option_about_sending(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    message = read_usage_error("--check", option, capsys=capsys)

    assert message == "--check goes with --quiet and --env-file only"


def test_reset_left_takes_no_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = read_usage_error("--limit=5", "--reset-left", capsys=capsys)

    assert "--reset-left" in message
    assert "--limit" in message


def test_an_option_has_no_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    message = read_usage_error("--dry", capsys=capsys)

    assert message == "unrecognized arguments: --dry"


def test_a_usage_error_reads_no_settings(run_main: RunMain) -> None:
    ended = run_main("--reset-left", "--limit=5", database={"DB_PORT": "many"})

    assert ended.exit_code == 2
    assert ended.console == ""
    assert ended.errors.startswith("usage: main.py ")
    assert "DB_PORT" not in ended.errors
