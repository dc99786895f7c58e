"""Runs the unchanged main.py as a process, as cron would: its settings, and nothing else, in the environment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "0123456789abcdef0123456789abcdef"
MAIN = (str(ROOT / "main.py"),)
BARE = {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Ended:
    """How a run ended: exit code as a shell sees it, console, and what it left in its folder."""

    exit_code: int
    console: str
    errors: str
    folder: Path

    @property
    def log(self) -> str:
        return "".join(path.read_text("utf-8") for path in sorted(self.folder.glob("run.log*"), reverse=True))

    @property
    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text("utf-8")) for path in sorted(self.folder.glob("integration_results_*.json"))]

    @property
    def results(self) -> dict[str, Any]:
        return self.documents[-1]

    @property
    def summary(self) -> dict[str, Any]:
        """That of the last results document, without its times and without what is zero or empty."""
        return {key: value for key, value in self.results["summary"].items() if value and "second" not in key}

    @property
    def users(self) -> dict[int, dict[str, Any]]:
        return {line["record"]: line for line in self.results["results"]}

    @property
    def shown(self) -> str:
        """The console without what differs from run to run: the results file's name, and times."""
        text = re.sub(r"(?m)^Results: \S+/integration_results_\d{8}_\d{6}\.json$", "Results: FILE", self.console)
        return re.sub(r"(?m)^Time: \d+\.\d s, \d+\.\d users", "Time: N s, N users", text)

    @property
    def everything(self) -> str:
        files = [path.read_text("utf-8", "replace") for path in self.folder.rglob("*") if path.is_file()]
        return "\n".join([self.console, self.errors, *files])


class Running(contextlib.AbstractContextManager["Running"]):
    """A run under way. `wrapper` is a command that starts it, `program` what Python runs in place of main.py."""

    def __init__(self, *arguments: str, settings: Any, folder: Path, wrapper: Any = (), program: Any = MAIN) -> None:
        self.folder = folder
        self._streams = out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        # A wrapper's limits are not meant for the files and memory of coverage.
        coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_") and not wrapper}
        env = {**BARE, **coverage, **settings}
        (folder / "empty.env").touch()
        command = [*wrapper, sys.executable, *program, "--env-file", str(folder / "empty.env"), *arguments]
        self.process = subprocess.Popen(command, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self.signal = self.process.send_signal

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def console(self, stream: int = 0) -> str:
        return os.pread(self._streams[stream].fileno(), 10_000_000, 0).decode()  # a read would move where it writes

    def wait_for(self, text: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while text not in self.console():
            assert time.monotonic() < end and self.process.poll() is None, f"no {text!r} in:\n{self.console()}"
            time.sleep(0.01)

    def wait(self, seconds: float = 60) -> Ended:
        code = self.process.wait(seconds)
        return Ended(code if code >= 0 else 128 - code, self.console(0), self.console(1), self.folder)


Program = Callable[..., Ended]  # the types of conftest's fixtures
Started = Callable[..., Running]
Customers = Settings = Callable[..., dict[str, str]]


def settings_for(database: Mapping[str, str], url: str, folder: Path, **more: str) -> dict[str, str]:
    own = {"ITERABLE_API_KEY": KEY, "ITERABLE_API_BASE_URL": url}
    return {**database, **own, "RESULTS_DIR": str(folder), "LOG_FILE": str(folder / "run.log"), **more}


def run(*arguments: str, settings: Mapping[str, str], folder: Path, seconds: float = 60) -> Ended:
    with Running(*arguments, settings=settings, folder=folder) as running:
        return running.wait(seconds)
