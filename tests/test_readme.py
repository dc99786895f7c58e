"""The README says what is true: its tables and its console are compared with the program."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import database
import harness
import main

README = (harness.ROOT / "README.md").read_text("utf-8")


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, a list of cells each."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("| ")][2:]


def test_the_settings_table_has_every_setting_with_its_default() -> None:
    documented = {row[0].strip("`"): row[1] for row in table("Settings")}
    expected = {}
    for item in dataclasses.fields(main.Settings):
        default = item.metadata["default"]
        expected[item.name.upper()] = f"`{default}`" if default else "" if default == "" else "needed"
    needed = {name: default.split(",")[0] for name, default in documented.items()}
    assert needed == expected


def test_the_options_are_those_of_the_program() -> None:
    documented = {row[0].strip("`") for row in table("Set it up")}
    help_text = subprocess.run(
        [sys.executable, "main.py", "--help"], cwd=harness.ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert documented == set(re.findall(r"^  (--[a-z-]+(?: [A-Z]+)?)", help_text, re.MULTILINE))


def test_the_exit_codes_are_those_of_the_program() -> None:
    own = (main.SUCCESS, main.NOT_ALL, main.BAD_SETTINGS, main.DATABASE_FAILED, main.GIVEN_UP, main.LOCKED)
    assert [row[0] for row in table("Exit codes")] == [*map(str, own), "130, 143"]


def test_the_console_is_what_a_run_on_the_sample_prints(
    server: database.DatabaseServer, program: Callable[..., harness.Ended]
) -> None:
    ended = program(database=server.create_reader())
    documented = README.split("## What a run prints\n\n```\n")[1].split("```")[0]
    varying = re.compile(r"^(Results: ).*|^(Time: ).*", re.MULTILINE)
    assert (ended.exit_code, varying.sub(r"\1\2", ended.console)) == (0, varying.sub(r"\1\2", documented))


@pytest.mark.parametrize("script", ["tests/demo.sh", "tests/run.sh", "tests/benchmark.sh"])
def test_each_command_of_the_readme_is_there(script: str) -> None:
    assert f"bash {script}" in README
    assert (harness.ROOT / script).is_file()


def test_each_complaint_of_the_troubleshooting_is_one_that_the_program_makes() -> None:
    source = "".join(
        (harness.ROOT / name).read_text("utf-8") for name in ("main.py", "db_connection.py", "iterable_client.py")
    )
    said = [row[0].strip("`").split("...")[0].strip(": ") for row in table("Troubleshooting") if row[0].startswith("`")]
    missing = [words for words in said if words.split(":")[0].removesuffix(" DB_HOST is missing") not in source]
    assert missing == []


def test_it_is_the_only_markdown_file() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=harness.ROOT, capture_output=True, text=True).stdout
    assert tracked.split() in (["README.md"], [])
    assert Path(harness.ROOT / "README.md").is_file()
