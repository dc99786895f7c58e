"""The demo: the unchanged main.py between a private database and a local stand-in."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import database, process, standin_handle

COMMAND = [sys.executable, *process.MAIN]
ENVIRONMENT = {**process.BARE_ENVIRONMENT, "LC_ALL": "C.UTF-8"}


def main(arguments: list[str]) -> int:
    """Run main.py with the arguments, and show what comes of it. Returns its exit code.

    Where main.py has its say on the arguments alone (a usage error, --help), nothing
    is started.
    """
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        parsed = parse_only(arguments, Path(folder))
        if parsed.returncode == 0 or parsed.stderr.startswith("usage:"):
            print(parsed.stdout, end="")
            print(parsed.stderr, end="", file=sys.stderr)
            return parsed.returncode
        exit_code = show_run(arguments, Path(folder))
        show_results(Path(folder))
    return exit_code


def parse_only(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Let main.py look at the arguments, with settings that let it do no more."""
    settings = {"DB_PORT": "none", "LOG_FILE": str(folder / "run.log")}
    return subprocess.run(
        [*COMMAND, *arguments, "--env-file", "/dev/null"],
        env={**ENVIRONMENT, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def show_run(arguments: list[str], folder: Path) -> int:
    """Run main.py on the sample, then print what the stand-in holds."""
    program = next(iter(database.find_servers().values()))
    with (
        database.DatabaseServer(program) as server,
        standin_handle.StandIn(key=process.KEY) as iterable,
    ):
        server.load(database.SETUP)
        settings = process.settings_for(server.create_reader(), iterable.url, folder)
        print(
            f"A private {server.kind} {server.version} holds the sample of"
            " database_setup.sql; a stand-in plays Iterable."
        )
        print("\n$ python3 main.py", *arguments, flush=True)
        # A Ctrl-C is for main.py, which gets it too.
        signal.signal(signal.SIGINT, lambda *_: None)
        done = subprocess.run(
            [*COMMAND, "--env-file", "/dev/null", *arguments],
            env={**ENVIRONMENT, **settings},
            check=False,
        )
        print(f"\nexit code {done.returncode}")
        print("\nWhat the stand-in for Iterable holds now:\n")
        print(standin_handle.describe(iterable.state()))
    return done.returncode


def show_results(folder: Path) -> None:
    """Print the results files."""
    for results in sorted(folder.glob("integration_results_*")):
        print("\nThe results file, which is removed with the demo's folder:\n")
        print(results.read_text("utf-8"), end="")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
