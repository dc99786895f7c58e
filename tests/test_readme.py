"""The README says what is true: its tables, its console and its commands are compared with the program."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import main
from lab import database, process

README = (process.ROOT / "README.md").read_text("utf-8")
NEEDED = {"DB_HOST": "db", "DB_USER": "reader", "DB_PASSWORD": "", "DB_NAME": "shop", "ITERABLE_API_KEY": "key"}


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, a list of cells each."""
    return [re.split(r" *\| *", line)[1:-1] for line in section(heading).splitlines() if line.startswith("| ")][2:]


def test_the_settings_table_has_every_setting_with_its_default() -> None:
    defaults = main.load_environment_variables(Path("/dev/null"), NEEDED)
    expected = {}
    for item in dataclasses.fields(defaults):
        value = getattr(defaults, item.name)
        value = str(value.relative_to(main.HERE)) if isinstance(value, Path) else value
        name = item.name.upper()
        expected[name] = "needed" if name in NEEDED else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
    documented = {row[0].strip("`"): row[1].split(",")[0] or "``" for row in table("Settings")}
    assert documented == expected


def test_each_secret_has_its_file_form_in_the_readme() -> None:
    assert re.findall(r"or `(\w+)_FILE`", section("Settings")) == ["DB_PASSWORD", "ITERABLE_API_KEY"]


def test_the_options_are_those_of_the_program() -> None:
    documented = {row[0].strip("`") for row in table("Set it up")}
    command = [sys.executable, "main.py", "--help"]
    help_text = subprocess.run(command, cwd=process.ROOT, capture_output=True, text=True, check=True).stdout
    assert documented == set(re.findall(r"^  (--[a-z-]+(?: [A-Z]+)?)", help_text, re.MULTILINE))


def test_the_exit_codes_are_those_of_the_program() -> None:
    own = (main.SUCCESS, main.NOT_ALL, main.BAD_SETTINGS, main.DATABASE_FAILED, main.GIVEN_UP, main.LOCKED)
    assert [row[0] for row in table("Exit codes")] == [*map(str, own), "129, 130, 143"]


def test_the_console_is_what_a_run_on_the_sample_prints(
    server: database.DatabaseServer, program: Callable[..., process.Ended]
) -> None:
    ended = program(database=server.create_reader())
    documented = section("What a run prints").split("```\n")[1]
    varying = re.compile(r"^(Results: ).*|^(Time: ).*", re.MULTILINE)
    assert (ended.exit_code, varying.sub(r"\1\2", ended.console)) == (0, varying.sub(r"\1\2", documented))


@pytest.mark.parametrize("script", ["demo.sh", "run.sh", "guide.sh", "benchmark.sh"])
def test_each_command_of_the_readme_is_there(script: str) -> None:
    assert f"`bash tests/{script}" in README or f"\nbash tests/{script}\n" in README
    assert (process.ROOT / "tests" / script).is_file()


def test_each_complaint_of_the_troubleshooting_is_one_that_the_program_makes() -> None:
    modules = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py")
    source = "".join((process.ROOT / name).read_text("utf-8") for name in modules)
    said = [row[0].strip("`").split("...")[0].strip(": ") for row in table("Troubleshooting") if row[0].startswith("`")]
    missing = [words for words in said if words.split(":")[0].removesuffix(" DB_HOST is missing") not in source]
    assert missing == []


def test_the_index_for_tables_of_ones_own_is_that_of_the_setup() -> None:
    assert " ".join(section("Your own tables").split()).count(database.ADD_INDEX) == 1


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_systemd_units_are_valid(tmp_path: Path) -> None:
    units = section("Cron and systemd").split("```ini\n")[1].split("```")[0]
    found = re.findall(r"^# \S+/(iterable\.\w+)\n(.*?)(?=^# /|\Z)", units, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == ["iterable.service", "iterable.timer"]
    for name, unit in found:
        (tmp_path / name).write_text(unit.replace("/srv/iterable/.venv/bin/python", sys.executable))
    paths = [str(tmp_path / name) for name, _ in found]
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "iterable." in line]) == (0, [])


def test_the_demo_shows_the_console_what_the_stand_in_received_and_the_results_file() -> None:
    command = [sys.executable, "-m", "lab.demo", "--limit", "1"]
    environment = {**process.BARE, "PYTHONPATH": str(process.ROOT / "tests"), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, cwd=process.ROOT, env=environment, capture_output=True, text=True)
    order = ["Processing record 1/1", "Users in the stand-in", "page-view-37: page_view", '"status": "success"']
    assert (done.returncode, done.stderr, sorted(map(done.stdout.find, order))) == (
        0,
        "",
        [found for found in map(done.stdout.find, order) if found >= 0],
    )


def test_the_demo_complains_of_an_unknown_option_before_it_starts_anything() -> None:
    command = [sys.executable, "-m", "lab.demo", "--bogus"]
    environment = {**process.BARE, "PYTHONPATH": str(process.ROOT / "tests")}
    done = subprocess.run(command, cwd=process.ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unrecognized arguments: --bogus" in done.stderr


def test_it_is_the_only_markdown_file() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=process.ROOT, capture_output=True, text=True).stdout
    assert tracked.split() in (["README.md"], [])
    assert Path(process.ROOT / "README.md").is_file()
