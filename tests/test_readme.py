"""The README says what is true: its tables, its console and its commands are compared with the program."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
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


def done(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**process.BARE, "PYTHONPATH": str(process.ROOT / "tests"), "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, cwd=process.ROOT, env=environment, capture_output=True, text=True)


def test_the_settings_table_has_every_setting_with_its_default_and_each_secrets_file_form() -> None:
    expected = {}
    for name, value in vars(main.load_environment_variables(Path("/dev/null"), NEEDED)).items():
        value = value.relative_to(process.ROOT) if isinstance(value, Path) else value
        value = f"{value:g}" if isinstance(value, float) else value
        expected[name.upper()] = "needed" if name.upper() in NEEDED else f"`{value}`"
    assert {row[0].strip("`"): row[1].split(",")[0] or "``" for row in table("Settings")} == expected
    assert re.findall(r"or `(\w+)_FILE`", section("Settings")) == ["DB_PASSWORD", "ITERABLE_API_KEY"]


def test_the_options_are_those_of_the_program_and_the_exit_codes_those_of_the_contract() -> None:
    options = re.findall(r"^  (--[a-z-]+(?: [A-Z]+)?)", done(sys.executable, "main.py", "--help").stdout, re.MULTILINE)
    assert {row[0].strip("`") for row in table("Set it up")} == set(options)
    assert [row[0] for row in table("Exit codes")] == ["0", "1", "2", "3", "4", "75", "129, 130, 143"]


def test_the_console_is_what_a_run_on_the_sample_prints(
    server: database.DatabaseServer, program: process.Program
) -> None:
    ended = program(database=server.create_reader())
    documented = process.Ended(0, section("What a run prints").split("```\n")[1], "", Path())
    assert (ended.exit_code, ended.shown) == (0, documented.shown)


def test_its_scripts_and_the_index_for_tables_of_ones_own_are_there() -> None:
    named = set(re.findall(r"bash (tests/\w+\.sh)", README))
    assert named == {f"tests/{name}.sh" for name in ("demo", "run", "guide", "benchmark")}
    assert [name for name in named if not (process.ROOT / name).is_file()] == []
    assert " ".join(section("Your own tables").split()).count(database.ADD_INDEX) == 1


def test_each_complaint_of_the_troubleshooting_is_one_that_the_program_makes() -> None:
    modules = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py")
    source = "".join((process.ROOT / name).read_text("utf-8") for name in modules)
    said = [row[0].strip("`").split("...")[0].strip(": ") for row in table("Troubleshooting") if row[0].startswith("`")]
    assert [words for words in said if words.split(":")[0] not in source] == []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_systemd_units_are_valid(tmp_path: Path) -> None:
    units = section("Cron and systemd").split("```ini\n")[1].split("```")[0]
    found = re.findall(r"^# \S+/(iterable\.\w+)\n(.*?)(?=^# /|\Z)", units, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == ["iterable.service", "iterable.timer"]
    for name, unit in found:
        (tmp_path / name).write_text(unit.replace("/srv/iterable/.venv/bin/python", sys.executable))
    verified = done("systemd-analyze", "verify", *(str(tmp_path / name) for name, _ in found))
    assert (verified.returncode, [line for line in verified.stderr.splitlines() if "iterable." in line]) == (0, [])


def test_the_demo_shows_the_console_what_the_stand_in_received_and_the_results_file() -> None:
    demo = done(sys.executable, "-m", "lab.demo", "--limit", "1")
    order = 'Processing record 1/1.*Users in the stand-in.*page-view-37: page_view.*"status": "success"'
    assert (demo.returncode, demo.stderr, bool(re.search(order, demo.stdout, re.DOTALL))) == (0, "", True)


def test_the_demo_complains_of_an_unknown_option_before_it_starts_anything() -> None:
    demo = done(sys.executable, "-m", "lab.demo", "--bogus")
    assert (demo.returncode, demo.stdout, "unrecognized arguments: --bogus" in demo.stderr) == (2, "", True)


def test_it_is_the_only_markdown_file() -> None:
    assert done("git", "ls-files", "*.md").stdout.split() in (["README.md"], [])  # nothing where there is no git
