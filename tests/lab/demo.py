"""The demo: the unchanged main.py against a private database server and a local stand-in for Iterable."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import database, standin_handle
from lab import process as harness

MAIN = [sys.executable, str(harness.ROOT / "main.py")]
BARE = {**harness.BARE, "LC_ALL": "C.UTF-8"}


def main(arguments: list[str]) -> int:
    """The exit code is main.py's."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        if (code := answer_to_arguments(arguments, folder)) is not None:
            return code
        with (
            database.DatabaseServer(next(iter(database.find_servers().values()))) as server,
            standin_handle.StandIn(key=harness.KEY) as iterable,
        ):
            server.load(database.SETUP)
            settings = harness.settings_for(server.create_reader(), iterable.url, Path(folder))
            print(f"A private {server.kind} {server.version} holds database_setup.sql's sample;", end=" ")
            print("a stand-in plays Iterable.\n\n$ python3 main.py", *arguments, flush=True)
            signal.signal(signal.SIGINT, lambda *_: None)  # a Ctrl-C is for main.py, which gets it, too
            command = [*MAIN, "--env-file", "/dev/null", *arguments]
            code = subprocess.run(command, env={**BARE, **settings}).returncode
            print(f"\nexit code {code}\n\nWhat the stand-in for Iterable holds now:\n")
            print(standin_handle.describe(iterable.state()))
        for results in sorted(Path(folder).glob("integration_results_*")):
            print("\nThe results file, which is removed now, together with the demo's folder:\n")
            print(results.read_text("utf-8"), end="")
    return code


def answer_to_arguments(arguments: list[str], folder: str) -> int | None:
    """The exit code when main.py has its say on the arguments alone, which it then prints: usage, or --help."""
    # Settings that cannot be right come after the arguments, and nothing after them.
    settings = {"DB_PORT": "none", "LOG_FILE": f"{folder}/run.log"}
    asked = subprocess.run(
        [*MAIN, *arguments, "--env-file", "/dev/null"], env={**BARE, **settings}, capture_output=True, text=True
    )
    if asked.returncode and not asked.stderr.startswith("usage:"):
        return None
    print(asked.stdout, end="")
    print(asked.stderr, end="", file=sys.stderr)
    return asked.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
