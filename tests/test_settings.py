"""Settings: where they come from, what each may be, and the one message that names all that is wrong (contract 2)."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dotenv
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from harness import BARE, ROOT
from main import Settings, SettingsError, load_environment_variables

KEY = "fedcba9876543210fedcba9876543210"
PASSWORD = "open sesame"
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
SETTINGS = Settings(
    db_host="db.example.com",
    db_user="reader",
    db_password=PASSWORD,
    db_name="shop",
    db_port=3306,
    db_ssl_ca="",
    iterable_api_key=KEY,
    iterable_api_base_url="https://api.iterable.com",
    iterable_rate_limit=450,
    iterable_max_attempts=5,
    iterable_timeout=30.0,
    max_workers=300,
    log_level="INFO",
    log_file=ROOT / "iterable_integration.log",
    results_dir=ROOT,
)

EnvFile = Callable[[str | bytes], Path]


@pytest.fixture
def env_file(tmp_path: Path) -> EnvFile:
    """`env_file(content)`: a file with it."""

    def make(content: str | bytes) -> Path:
        path = tmp_path / "settings.env"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def load(env_file: Path = Path(os.devnull), *, needs_key: bool = True, **environ: str | None) -> Settings:
    """The settings of a file and of the needed variables with these changes; None takes one away."""
    values = {**NEEDED, **environ}
    set_ = {name: value for name, value in values.items() if value is not None}
    return load_environment_variables(env_file, set_, needs_key=needs_key)


def complaint(env_file: Path = Path(os.devnull), **environ: str | None) -> str:
    """What is said against them, without the advice at its end."""
    with pytest.raises(SettingsError) as error:
        load(env_file, **environ)
    said, _, advice = str(error.value).partition(f". Set them in {env_file} ")
    assert advice == (
        "(cp .env.example .env, then fill it in) or in the environment. To see a run without any: bash tests/demo.sh"
    )
    return said.removeprefix("Settings: ")


# Values


def test_what_is_not_set_has_the_default_of_the_contract() -> None:
    assert load() == SETTINGS


def test_what_is_empty_or_blank_has_its_default_too() -> None:
    assert load(**dict.fromkeys(DEFAULTS, "")) == load(**dict.fromkeys(DEFAULTS, " \t")) == SETTINGS


def test_every_setting_is_read_under_its_name() -> None:
    own = {
        "DB_HOST": "/run/mysqld/mysqld.sock",
        "DB_USER": "u",
        "DB_PASSWORD": "",
        "DB_NAME": "n",
        "DB_PORT": "65535",
        "DB_SSL_CA": "requirements.txt",
        "ITERABLE_API_KEY": "!~",
        "ITERABLE_API_BASE_URL": "https://api.eu.iterable.com",
        "ITERABLE_RATE_LIMIT": "100000",
        "ITERABLE_MAX_ATTEMPTS": "1",
        "ITERABLE_TIMEOUT": "0.25",
        "MAX_WORKERS": "2000",
        "LOG_LEVEL": "DEBUG",
        "LOG_FILE": "/var/log/x.log",
        "RESULTS_DIR": "out/here",
    }
    expected = Settings(
        db_host="/run/mysqld/mysqld.sock",
        db_user="u",
        db_password="",
        db_name="n",
        db_port=65535,
        db_ssl_ca=str(ROOT / "requirements.txt"),
        iterable_api_key="!~",
        iterable_api_base_url="https://api.eu.iterable.com",
        iterable_rate_limit=100_000,
        iterable_max_attempts=1,
        iterable_timeout=0.25,
        max_workers=2000,
        log_level="DEBUG",
        log_file=Path("/var/log/x.log"),
        results_dir=ROOT / "out" / "here",
    )
    assert load(**own) == expected
    assert set(own) == {*NEEDED, *DEFAULTS}


def test_blanks_around_a_value_do_not_count_but_in_a_password() -> None:
    settings = load(DB_HOST=" db.example.com\t", DB_PORT=" 1 ", LOG_LEVEL=" INFO", DB_PASSWORD=" p ")
    assert (settings.db_host, settings.db_port, settings.log_level) == ("db.example.com", 1, "INFO")
    assert settings.db_password == " p "


def test_a_dry_run_needs_no_key() -> None:
    assert load(needs_key=False, ITERABLE_API_KEY=None).iterable_api_key == ""
    assert load(needs_key=False, ITERABLE_API_KEY="").iterable_api_key == ""
    assert load(needs_key=False) == SETTINGS


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
    field = name.lower()
    for value in (lowest, highest):
        assert getattr(load(**{name: str(value)}), field) == value
    for value in ("0", str(highest + 1), "999999999"):
        assert complaint(**{name: value}) == f"{name} must be from {lowest} to {highest}, not {value}"
    kind = "number" if name == "ITERABLE_TIMEOUT" else "whole number"
    for text in ("-1", "+1", "1e2", "0x10", "1_000", "1.", ".5", "1,5", "five", "nan", "inf", "١", "1 2", "9" * 5000):
        assert complaint(**{name: text}) == f"{name} must be a {kind}, not {text!r}"
    if kind == "whole number":
        assert complaint(**{name: "5.0"}) == f"{name} must be a whole number, not '5.0'"


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_a_log_level_is_one_of_four(level: str) -> None:
    assert load(LOG_LEVEL=level).log_level == level
    for text in (level.lower(), f"{level}S", "CRITICAL", "10"):
        assert complaint(LOG_LEVEL=text) == "LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://api.iterable.com", "https://api.iterable.com"),
        ("https://api.iterable.com/", "https://api.iterable.com"),
        ("https://api.iterable.com/api", "https://api.iterable.com"),
        ("https://api.eu.iterable.com/api/", "https://api.eu.iterable.com"),
        ("https://proxy.example.com:8443/api//", "https://proxy.example.com:8443"),
        ("https://[2001:db8::1]:443", "https://[2001:db8::1]:443"),
        ("http://localhost:8080/api", "http://localhost:8080"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://127.1.2.3", "http://127.1.2.3"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_a_base_url_may_end_in_a_slash_or_api_and_be_http_to_a_loopback_host(text: str, url: str) -> None:
    assert load(ITERABLE_API_BASE_URL=text).iterable_api_base_url == url


@pytest.mark.parametrize(
    "text",
    [
        "api.iterable.com",
        "https://",
        "https:///api",
        "https://api.iterable.com/v2",
        "https://api.iterable.com/api/users/update",
        "https://api.iterable.com?x=1",
        "https://api.iterable.com#x",
        "https://ann:geheim@api.iterable.com",
        "https://ann@api.iterable.com",
        "https://api iterable.com",
        "https://api.iterable.com\nX: y",
        "https://api.iterable.com:port",
        "https://api.iterable.com:99999",
        "https://api.iterable.com:",
        "https://[::1",
        "ftp://api.iterable.com",
        "/api",
    ],
)
def test_a_base_url_is_a_host_without_user_path_or_query(text: str) -> None:
    assert complaint(ITERABLE_API_BASE_URL=text) == (
        "ITERABLE_API_BASE_URL must be a host's address such as https://api.iterable.com, without path, query or user"
    )


@pytest.mark.parametrize(
    "host", ["api.iterable.com", "localhost.example.com", "127.0.0.1.example.com", "127.0.0.256", "0.0.0.0", "[::2]"]
)
def test_a_base_url_is_http_to_no_other_host(host: str) -> None:
    assert complaint(ITERABLE_API_BASE_URL=f"http://{host}") == (
        "ITERABLE_API_BASE_URL must begin with https://, or the API key would travel in the clear"
    )


@pytest.mark.parametrize("key", ["abc def", "abc\n", "abc\x00", "schlüssel", "abc\u200b", "a\udcff"])
def test_a_key_is_printable_ascii(key: str) -> None:
    said = complaint(ITERABLE_API_KEY=f"{KEY}{key}{KEY}")
    assert said == "ITERABLE_API_KEY has a character that no key has: copy it again"


def test_a_ca_file_is_a_file_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    for unusable in (path, tmp_path, tmp_path / ("x" * 300)):
        assert complaint(DB_SSL_CA=str(unusable)) == f"DB_SSL_CA must be a file that can be read, unlike {unusable}"
    path.touch()
    assert load(DB_SSL_CA=str(path)).db_ssl_ca == str(path)


def test_no_secret_stands_in_a_repr() -> None:
    text = repr(load())
    assert "db.example.com" in text
    assert KEY not in text
    assert PASSWORD not in text


# Complaints


def test_without_any_settings_the_message_names_all_that_are_needed() -> None:
    assert complaint(**dict.fromkeys(NEEDED)) == (
        "DB_HOST is missing; DB_USER is missing; DB_PASSWORD is missing; DB_NAME is missing; "
        "ITERABLE_API_KEY is missing"
    )


def test_what_is_needed_may_not_be_empty_but_the_password() -> None:
    assert complaint(**dict.fromkeys(NEEDED, " ")) == (
        "DB_HOST is empty; DB_USER is empty; DB_NAME is empty; ITERABLE_API_KEY is empty"
    )
    assert load(DB_PASSWORD="").db_password == ""


def test_all_complaints_come_in_one_message_without_a_secret(env_file: EnvFile) -> None:
    path = env_file("DB_HOST=\nDB_PORT=one\n")
    wrong = {
        "DB_HOST": None,
        "DB_USER": "",
        "DB_PASSWORD": None,
        "DB_SSL_CA": "/nowhere",
        "ITERABLE_API_KEY": f"{KEY} {KEY}",
        "ITERABLE_API_BASE_URL": f"https://me:{PASSWORD}@api.iterable.com",
        "ITERABLE_RATE_LIMIT": "0",
        "ITERABLE_MAX_ATTEMPTS": "many",
        "ITERABLE_TIMEOUT": "1h",
        "MAX_WORKERS": "2001",
        "LOG_LEVEL": "verbose",
    }
    said = complaint(path, **wrong)
    assert said.split("; ") == [
        "DB_HOST is empty",
        "DB_USER is empty",
        "DB_PASSWORD is missing",
        "DB_PORT must be a whole number, not 'one'",
        "DB_SSL_CA must be a file that can be read, unlike /nowhere",
        "ITERABLE_API_KEY has a character that no key has: copy it again",
        "ITERABLE_API_BASE_URL must be a host's address such as https://api.iterable.com, without path, query or user",
        "ITERABLE_RATE_LIMIT must be from 1 to 100000, not 0",
        "ITERABLE_MAX_ATTEMPTS must be a whole number, not 'many'",
        "ITERABLE_TIMEOUT must be a number, not '1h'",
        "MAX_WORKERS must be from 1 to 2000, not 2001",
        "LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR",
    ]
    assert KEY not in said
    assert PASSWORD not in said


ODD_TEXTS = st.text() | st.text(st.characters()) | st.sampled_from([*DEFAULTS.values(), *NEEDED.values(), "a\x00b"])
NAMES = st.sampled_from([*NEEDED, *DEFAULTS])


@hypothesis_settings(deadline=None, max_examples=300)
@given(st.dictionaries(NAMES, ODD_TEXTS | NAMES.map(DEFAULTS.get).filter(bool)), st.text(min_size=1), st.booleans())
def test_any_texts_are_settings_or_a_complaint_without_a_secret(
    values: dict[str, str], odd: str, needs_key: bool
) -> None:
    secret = f"s3cr3t{odd}s3cr3t"
    environ = {**NEEDED, **values, "DB_PASSWORD": secret, "ITERABLE_API_KEY": secret}
    settings = None
    try:
        settings = load_environment_variables(Path(os.devnull), environ, needs_key=needs_key)
        shown = repr(settings)
    except SettingsError as error:
        shown = ascii(str(error))  # pytest-xdist cannot report half a surrogate pair
    assert "s3cr3t" not in shown
    if settings:
        assert settings.db_password == secret
        assert settings.log_file.is_absolute()
    else:
        assert [name for name in environ if f" {name} " in shown]


# The .env file


def test_a_variable_of_the_environment_wins_over_the_file(env_file: EnvFile) -> None:
    path = env_file("DB_HOST=file.example.com\nDB_NAME=of_file\nDB_PORT=1\nMAX_WORKERS=7\n")
    settings = load(path, DB_NAME=None, DB_PORT="2", MAX_WORKERS="")
    assert (settings.db_host, settings.db_name, settings.db_port) == ("db.example.com", "of_file", 2)
    assert settings.max_workers == 300  # set to nothing is set, too


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ("DB_PASSWORD=plain", "plain"),
        ("DB_PASSWORD=", ""),
        ("DB_PASSWORD", ""),
        ("export DB_PASSWORD=exported", "exported"),
        ("  DB_PASSWORD = spaced  ", "spaced"),
        ("DB_PASSWORD=a b#c", "a b#c"),
        ("DB_PASSWORD=a # comment", "a"),
        ("DB_PASSWORD='a # no comment'", "a # no comment"),
        ('DB_PASSWORD="a \\"quoted\\" word"', 'a "quoted" word'),
        ("DB_PASSWORD=${HOME}", "${HOME}"),
        ("DB_PASSWORD='${HOME:-x}'", "${HOME:-x}"),
        ('DB_PASSWORD="$HOME"', "$HOME"),
        ("DB_PASSWORD=pä😀ss", "pä😀ss"),
        ("DB_PASSWORD=crlf\r", "crlf"),
        ("DB_PASSWORD=first\nDB_PASSWORD=last", "last"),
        ("DB_USER=x\r\nDB_PASSWORD=lines of Windows\r\n", "lines of Windows"),
    ],
)
def test_a_value_of_the_file_is_taken_as_it_is(
    env_file: EnvFile, monkeypatch: pytest.MonkeyPatch, line: str, password: str
) -> None:
    monkeypatch.setenv("HOME", "/interpolated")
    assert load(env_file(f"# a comment\n\n{line}\n"), DB_PASSWORD=None).db_password == password


def test_a_mark_that_windows_puts_at_the_beginning_is_no_part_of_a_name(env_file: EnvFile) -> None:
    assert load(env_file("\ufeffDB_PASSWORD=after the mark"), DB_PASSWORD=None).db_password == "after the mark"


def test_lines_that_cannot_be_understood_are_complaints_without_what_they_hold(
    env_file: EnvFile, capfd: pytest.CaptureFixture[str]
) -> None:
    path = env_file("DB_HOST=x\nthis is no setting\nDB_PORT=3306\nDB_PASSWORD='geheim\n")
    said = complaint(path)
    assert said == f"{path} cannot be understood from line 2 on; {path} cannot be understood from line 4 on"
    assert capfd.readouterr() == ("", "")


def test_a_secret_that_stands_in_another_setting_too_is_not_shown() -> None:
    said = complaint(Path(os.devnull), DB_PORT="s3cr3t key", ITERABLE_API_KEY="s3cr3t key", DB_SSL_CA="/x/geheim!")
    assert "s3cr3t" not in said
    assert "DB_PORT must be a whole number, not '[secret]'" in said


def test_a_file_that_is_not_utf8_is_a_complaint_beside_the_others(env_file: EnvFile) -> None:
    path = env_file("DB_PASSWORD=schlüssel".encode("latin-1"))
    said = complaint(path, DB_PORT="one")
    assert said == (
        f"{path} cannot be read ('utf-8' codec can't decode byte 0xfc in position 16: invalid start byte); "
        "DB_PORT must be a whole number, not 'one'"
    )


def test_a_folder_in_place_of_the_file_is_a_complaint(tmp_path: Path) -> None:
    """It is what Docker makes of a file to mount that is not there."""
    assert str(tmp_path) in complaint(tmp_path)


@pytest.mark.parametrize("name", ["nowhere.env", "x" * 300])
def test_a_file_that_is_asked_for_has_to_be_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert complaint(path).startswith(f"{path} cannot be read (")


def test_a_file_in_a_closed_folder_is_a_complaint(tmp_path: Path) -> None:
    """Asked for by an account that may not look into the folder; root may."""
    script = (
        "import os, sys, pathlib, main\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: main.load_environment_variables(pathlib.Path(sys.argv[1]), {})\n"
        "except main.SettingsError as error: print(error)"
    )
    (tmp_path / "closed").mkdir(mode=0)
    path = tmp_path / "closed" / "x.env"
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, env=BARE, capture_output=True, text=True)
    assert done.stderr == ""
    assert str(path) in done.stdout


# As a program


def run_copy(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a copy of the program in `folder`/program, from another folder."""
    for module in ("main", "db_connection", "iterable_client", "logger_config"):
        (folder / "program").mkdir(exist_ok=True)
        shutil.copy(ROOT / f"{module}.py", folder / "program")
    (folder / "elsewhere").mkdir()
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder / "elsewhere",
        env={**BARE, "PYTHONPATH": str(folder / "program"), **environ},
        capture_output=True,
        text=True,
    )


def test_the_env_file_beside_main_may_be_missing(tmp_path: Path) -> None:
    done = run_copy(tmp_path, "-c", "import main; print(main.load_environment_variables().db_host)", **NEEDED)
    assert (done.stdout, done.stderr) == ("db.example.com\n", "")


@pytest.mark.parametrize("name", [".env", "conf/other.env"])
def test_relative_paths_are_relative_to_mains_folder(tmp_path: Path, name: str) -> None:
    program = tmp_path / "program"
    (program / "conf").mkdir(parents=True)
    (program / name).write_text("DB_PORT=from the file\nLOG_FILE=logs/run.log\n")
    arguments = ["--env-file", name] if name != ".env" else []
    done = run_copy(tmp_path, str(program / "main.py"), *arguments, **NEEDED)
    assert done.returncode == 2
    assert "DB_PORT must be a whole number, not 'from the file'. Set them in " + str(program / name) in done.stdout
    assert "DB_PORT must be" in (program / "logs" / "run.log").read_text("utf-8")
    assert list((tmp_path / "elsewhere").iterdir()) == []


NO_TEXTS = [
    *itertools.product(["DB_PASSWORD", "DB_USER", "DB_HOST", "DB_NAME", "LOG_FILE", "RESULTS_DIR"], ["\udcff", "\0"]),
    ("DB_HOST", "..example.com"),
    ("DB_HOST", "x" * 64),
]


@pytest.mark.parametrize(("name", "odd"), NO_TEXTS)
def test_a_value_that_nothing_can_be_done_with_gives_no_traceback(
    customers: Callable[..., dict[str, str]], env_file: EnvFile, tmp_path: Path, name: str, odd: str
) -> None:
    """The environment may hold any bytes but NUL, and the file may hold NUL. A name may have a slip of the pen."""
    environ = {**customers(1), "LOG_FILE": str(tmp_path / "run.log"), "RESULTS_DIR": str(tmp_path / "results")}
    value = f"{environ.pop(name)}{odd}"
    path = env_file(f"{name}={value}" if odd == "\0" else "")
    if odd != "\0":
        environ[name] = value
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--dry-run", "--env-file", str(path)],
        env={**BARE, **environ},
        capture_output=True,
    )
    assert b"Traceback" not in done.stdout + done.stderr
    assert done.returncode in (0, 2, 3)  # some of them can be used, or are cut at the NUL


# .env.example


def test_env_example_holds_every_setting_with_its_default() -> None:
    example: dict[str, Any] = dict(dotenv.dotenv_values(ROOT / ".env.example", interpolate=False))
    usual = {"DB_HOST": "localhost", "DB_NAME": "iterable_challenge"}
    assert example == {**dict.fromkeys(NEEDED, ""), **usual, **DEFAULTS}


def test_env_example_filled_in_gives_the_defaults(env_file: EnvFile) -> None:
    text = (ROOT / ".env.example").read_text("utf-8")
    for name, value in NEEDED.items():
        text = "\n".join(f"{name}={value}" if line.startswith(f"{name}=") else line for line in text.splitlines())
    assert load_environment_variables(env_file(text), {}) == SETTINGS


def test_env_example_says_in_the_line_above_what_each_setting_is_for() -> None:
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    silent = [
        line for above, line in itertools.pairwise(lines) if re.match("[A-Z]", line) and not above.startswith("#")
    ]
    assert silent == []
