"""Runs the unchanged main.py as a process, as cron would.

The environment of a run holds its settings and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "0123456789abcdef0123456789abcdef"
MAIN = (str(ROOT / "main.py"),)
BARE_ENVIRONMENT = {
    "HOME": "/tmp",
    "PATH": "/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
}
CONSOLE_LIMIT = 10_000_000  # bytes that are read of a console
POLL_INTERVAL = 0.01  # seconds


@dataclass(frozen=True)
class Ended:
    """How a run ended, and what it left in its folder.

    `exit_code` is what a shell would say: 143 after SIGTERM. `console` is standard
    output, `errors` standard error.
    """

    exit_code: int
    console: str
    errors: str
    folder: Path

    @property
    def log(self) -> str:
        """The text of the log file, after that of the rotated ones."""
        oldest_first = sorted(self.folder.glob("run.log*"), reverse=True)
        return "".join(path.read_text("utf-8") for path in oldest_first)

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The complete results files of the folder, the oldest first."""
        paths = sorted(self.folder.glob("integration_results_*.json"))
        return [json.loads(path.read_text("utf-8")) for path in paths]

    @property
    def results(self) -> dict[str, Any]:
        """The newest of `documents`."""
        return self.documents[-1]

    @property
    def summary(self) -> dict[str, Any]:
        """The summary of `results` without times, zeros and empty lists."""
        summary = self.results["summary"]
        return {
            key: value
            for key, value in summary.items()
            if value and "second" not in key
        }

    @property
    def lines(self) -> dict[int, dict[str, Any]]:
        """The users' lines of `results`, by their record number."""
        return {line["record"]: line for line in self.results["results"]}

    @property
    def console_without_times(self) -> str:
        """The console without what differs from run to run: file name and times."""
        text = re.sub(
            r"(?m)^Results: \S+/integration_results_\d{8}_\d{6}\.json$",
            "Results: FILE",
            self.console,
        )
        return re.sub(
            r"(?m)^Time: \d+\.\d s, \d+\.\d users", "Time: N s, N users", text
        )

    @property
    def everything(self) -> str:
        """The text of the console and of every file in the folder."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        texts = [path.read_text("utf-8", "replace") for path in files]
        return "\n".join([self.console, self.errors, *texts])


class Running(contextlib.AbstractContextManager["Running"]):
    """A run under way, which the end of the `with` block kills.

    `wrapper` is a command in front of Python's, such as `in_shell` makes. `program`
    is what Python gets in place of the path of main.py.
    """

    def __init__(
        self,
        *arguments: str,
        settings: Mapping[str, str],
        folder: Path,
        wrapper: Sequence[str] = (),
        program: Sequence[str] = MAIN,
    ) -> None:
        self.folder = folder
        self._output = tempfile.TemporaryFile()
        self._errors = tempfile.TemporaryFile()
        environment = {**BARE_ENVIRONMENT, **settings}
        if not wrapper:  # whose limits are not meant for coverage's files and memory
            environment |= coverage_variables()
        env_file = folder / "empty.env"
        env_file.touch()
        options = ["--env-file", str(env_file)]
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, *program, *options, *arguments],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
        )

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()
        self._errors.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    def console(self) -> str:
        """What stands on standard output so far."""
        # The process shares the file's position, so reading must not move it.
        return os.pread(self._output.fileno(), CONSOLE_LIMIT, 0).decode()

    def errors(self) -> str:
        """What stands on standard error so far."""
        return os.pread(self._errors.fileno(), CONSOLE_LIMIT, 0).decode()

    def wait_for(self, text: str, seconds: float = 30) -> None:
        """Return when the console has the text. Fails if it never will."""
        deadline = time.monotonic() + seconds
        is_alive = True
        while text not in self.console():
            assert is_alive, f"ended without {text!r}:\n{self.console()}"
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.console()}"
            time.sleep(POLL_INTERVAL)
            is_alive = self.process.poll() is None  # and looks once more if not

    def wait(self, seconds: float = 60) -> Ended:
        """Return how the run ended. Raises subprocess.TimeoutExpired."""
        code = self.process.wait(seconds)
        if code < 0:  # ended by a signal
            code = 128 - code
        return Ended(code, self.console(), self.errors(), self.folder)


class CreateCustomers(Protocol):
    """Type of the fixture `create_customers`."""

    def __call__(self, rows: int | Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Create a database and return the settings of its reader."""


class RunSettings(Protocol):
    """Type of the fixture `run_settings`."""

    def __call__(
        self, database: Mapping[str, str], *, url: str | None = None, **settings: str
    ) -> dict[str, str]:
        """Return all settings of a run."""


class StartMain(Protocol):
    """Type of the fixture `start_main`."""

    def __call__(
        self,
        *arguments: str,
        database: Mapping[str, str],
        url: str | None = None,
        wrapper: Sequence[str] = (),
        program: Sequence[str] = MAIN,
        **settings: str,
    ) -> Running:
        """Start a run."""


class RunMain(Protocol):
    """Type of the fixture `run_main`."""

    def __call__(
        self,
        *arguments: str,
        database: Mapping[str, str],
        seconds: float = 60,
        url: str | None = None,
        wrapper: Sequence[str] = (),
        program: Sequence[str] = MAIN,
        **settings: str,
    ) -> Ended:
        """Run to the end."""


def coverage_variables() -> dict[str, str]:
    """The variables by which coverage measures processes that are started."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("COVERAGE_")
    }


def in_shell(commands: str) -> tuple[str, ...]:
    """A wrapper: main.py is started by a shell, after these commands."""
    return ("sh", "-c", f'{commands}; exec "$@"', "sh")


def settings_for(
    database: Mapping[str, str], url: str, folder: Path, **settings: str
) -> dict[str, str]:
    """All settings of a run that leaves its results and run.log in the folder."""
    return {
        **database,
        "ITERABLE_API_KEY": KEY,
        "ITERABLE_API_BASE_URL": url,
        "RESULTS_DIR": str(folder),
        "LOG_FILE": str(folder / "run.log"),
        **settings,
    }


def run(
    *arguments: str, settings: Mapping[str, str], folder: Path, seconds: float = 60
) -> Ended:
    """Run main.py to the end, where the fixtures are out of reach."""
    with Running(*arguments, settings=settings, folder=folder) as running:
        return running.wait(seconds)
