"""How a run starts: from anywhere, and with one sentence if it cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab import process
from lab.expected import address, find_delivered
from lab.process import CreateCustomers, Ended, RunMain, RunSettings
from lab.standin_handle import StandIn

PROGRAM_FILES = (
    "main.py",
    "db_connection.py",
    "iterable_client.py",
    "logger_config.py",
    "phase2_queries.sql",
)
STEPS = """\
Starting Iterable Integration - Phase 3
[STEP 1] Loading environment variables...
[STEP 2] Connecting to database...
[STEP 3] Executing Phase 2 Query 2...
Found 2 pro user(s) with recent engagement
[STEP 4] Initializing Iterable API client...
"""


@pytest.fixture(scope="module")
def database(create_customers: CreateCustomers) -> dict[str, str]:
    return create_customers(2)


@pytest.mark.parametrize(
    ("change", "exit_code", "words"),
    [
        ({"DB_PORT": "0"}, 2, "Settings: DB_PORT must be a whole number from 1 to"),
        ({"LOG_FILE": "/"}, 2, "LOG_FILE / cannot be written (Is a directory)"),
        ({"RESULTS_DIR": "/dev/null/x"}, 2, "RESULTS_DIR /dev/null/x cannot be used"),
        ({"REQUESTS_CA_BUNDLE": "/no/ca"}, 2, "The CA file /no/ca (REQUESTS_CA_BUND"),
        ({"DB_PASSWORD": "wrong"}, 3, "The database refused the login: check DB_USER"),
    ],
)
def test_a_run_that_cannot_start_says_why_and_leaves_no_results(
    run_main: RunMain,
    database: dict[str, str],
    standin: StandIn,
    change: dict[str, str],
    exit_code: int,
    words: str,
) -> None:
    ended = run_main(**{"database": database, **change})  # type: ignore[arg-type]

    *steps, last_line = ended.console.splitlines(keepends=True)
    assert ended.exit_code == exit_code
    assert ended.errors == ""
    assert last_line.startswith(words)
    assert STEPS.startswith("".join(steps))
    assert list(ended.folder.glob("integration_results_*")) == []
    assert standin.counters()["connections"] == 0


def test_cron_may_start_it_from_another_folder(
    run_settings: RunSettings,
    database: dict[str, str],
    standin: StandIn,
    tmp_path: Path,
) -> None:
    """The .env beside main.py is read, and its relative paths start there."""
    home = tmp_path / "program"
    elsewhere = tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    for name in PROGRAM_FILES:
        shutil.copy(process.ROOT / name, home)
    settings = run_settings(database)
    settings["LOG_FILE"] = "logs/run.log"
    settings["RESULTS_DIR"] = "results"
    lines = [f'{name}="{value}"\n' for name, value in settings.items()]
    (home / ".env").write_text("".join(lines))

    done = subprocess.run(
        [sys.executable, "../program/main.py"],
        env={},
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    log = (home / "logs" / "run.log").read_text("utf-8")
    assert done.returncode == 0
    assert done.stderr == ""
    assert list(elsewhere.iterdir()) == []
    assert Ended(0, "", "", home / "results").summary["success"] == 2
    assert f"Successfully processed user: {address(2)}" in log
    assert find_delivered(standin) == {address(1), address(2)}
