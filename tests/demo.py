"""The demo: the unchanged main.py against a private database server and a local stand-in for Iterable."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import database
import harness
import standin_handle


def main() -> int:
    servers = database.find_servers()
    with (
        tempfile.TemporaryDirectory(prefix="demo-") as folder,
        database.DatabaseServer(next(iter(servers.values()))) as server,
        standin_handle.StandIn(key=harness.KEY) as iterable,
    ):
        server.load(database.SETUP)
        settings = harness.settings_for(server.create_reader(), iterable.url, Path(folder))
        print(
            f"A private {server.kind} {server.version} holds database_setup.sql's sample; a stand-in plays Iterable.\n"
        )
        print("$ python3 main.py", *sys.argv[1:], flush=True)
        done = subprocess.run(
            [sys.executable, str(harness.ROOT / "main.py"), "--env-file", "/dev/null", *sys.argv[1:]],
            env={**harness.BARE, "LC_ALL": "C.UTF-8", **settings},
        )
        print(f"\nexit code {done.returncode}\n\nWhat the stand-in for Iterable holds now:\n")
        print(standin_handle.describe(iterable.state()))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
