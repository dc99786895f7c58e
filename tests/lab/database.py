"""A private MySQL or MariaDB server for tests: a real one on a temporary folder, gone with whoever started it."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import mysql.connector

ROOT = Path(__file__).resolve().parent.parent.parent
MYSQL9 = ROOT / ".venv" / "mysql9"  # where mysql9.sh unpacks
SETUP = ROOT / "database_setup.sql"
QUERIES = ROOT / "phase2_queries.sql"
DATABASE = "iterable_challenge"
ADD_INDEX = "ALTER TABLE page_views ADD " + re.findall(r"KEY page_views_recent \(.*\)", SETUP.read_text("utf-8"))[0]
DROP_INDEX = "ALTER TABLE page_views DROP KEY page_views_recent"
_POOL = "--innodb-buffer-pool-size=1G"  # options for a server with millions of rows
LARGE = {"mariadb": (_POOL, "--innodb-log-file-size=512M"), "mysql": (_POOL, "--innodb-redo-log-capacity=1G")}
START_TIMEOUT = 120.0  # seconds: a start takes under one, but not on every machine

_FOLDERS = (*os.get_exec_path(), "/usr/sbin", "/usr/libexec", "/usr/local/mysql/bin", str(MYSQL9 / "bin"))
_SMALL_AND_FAST = ["--bind-address=127.0.0.1", "--skip-name-resolve", "--skip-log-bin", "--performance-schema=OFF"]
_SMALL_AND_FAST += ["--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"]
_OF_KIND = {
    "mariadb": ["--innodb-log-file-size=8M"],
    "mysql": ["--innodb-redo-log-capacity=8M", "--mysqlx=OFF", "--secure-file-priv=NULL"],
}


class ServerProgram(NamedTuple):
    """An installed server: `kind` is mariadb or mysql, `version` such as 10.11.6, `client` its command-line client."""

    kind: str
    version: str
    path: Path
    client: Path


def find_servers() -> dict[str, ServerProgram]:
    """The servers that this machine has, at most one of each kind, by kind: what TEST_MARIADBD and TEST_MYSQLD name,
    else what is in PATH, the usual folders or where mysql9.sh unpacks. Raises LookupError for a name of no use."""
    servers = {}
    for kind, variable in (("mariadb", "TEST_MARIADBD"), ("mysql", "TEST_MYSQLD")):
        path = os.environ.get(variable)
        places = [Path(folder, name) for folder in _FOLDERS for name in ("mariadbd", "mysqld")]
        programs = map(_identify, [Path(path)] if path else places)
        if program := next((found for found in programs if found and found.kind == kind), None):
            servers[kind] = program
        elif path:
            raise LookupError(f"{variable} names no {kind} server that runs and has its client beside it: {path}")
    return servers


def _identify(path: Path) -> ServerProgram | None:
    kind, version = _kind_and_version(path)
    folders = (path.parent, path.parent.parent / "bin", *map(Path, os.get_exec_path()))
    clients = (folder / name for folder in folders for name in ("mariadb", "mysql"))
    client = next((client for client in clients if kind and _kind_and_version(client)[0] == kind), None)
    return ServerProgram(kind, version, path, client) if client else None


@functools.cache
def _kind_and_version(path: Path) -> tuple[str, str]:
    # By what it says: Debian's mysqld and mysql are links to MariaDB's programs.
    if not os.access(path, os.X_OK) or path.is_dir():
        return "", ""
    done = subprocess.run([path, "--no-defaults", "--version"], check=False, capture_output=True, text=True, timeout=60)
    said = re.search(r"(?:Ver|from) .*?(\d+\.\d+\.\d+)(-MariaDB)?", done.stdout)
    return ("mariadb" if said[2] else "mysql", said[1]) if said else ("", "")


class DatabaseServer(contextlib.AbstractContextManager["DatabaseServer"]):
    """A `with` block around a private server on a fresh data folder; further options go to it as they are.

    It listens on a free port of 127.0.0.1 and on a socket in its own folder. `root` has no password and gets in by the
    socket only, which no other account of the machine can reach. The server dies with the thread that started it.
    Raises RuntimeError, with the end of the server's log, when it does not start.
    """

    def __init__(self, program: ServerProgram, *options: str) -> None:
        self.kind, self.version = program.kind, program.version
        self._program, self._options = program, options
        self._folder = tempfile.TemporaryDirectory(dir=_all_folders()[0])
        self.socket = str(Path(self._folder.name) / "socket")
        self.port = _free_port()

    def __enter__(self) -> DatabaseServer:
        shutil.copytree(_template(self._program), self._folder.name, dirs_exist_ok=True)
        self.start()
        # mariadb-install-db lets root in by TCP as well, without a password.
        for (host,) in self.query("SELECT host FROM mysql.user WHERE user = 'root' AND host <> 'localhost'", ""):
            self.query(f"DROP USER root@'{host}'", "")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Start, again on the same data and port, and return when the server takes connections."""
        own = [f"--socket={self.socket}", f"--port={self.port}", f"--pid-file={self.socket}.pid", *self._options]
        command = [*_command(self._program.path, self.kind, self._folder.name), *own]
        log = Path(self._folder.name, "log")
        with log.open("w") as output:  # in a session of its own: a Ctrl-C is for the program that is tested
            self._process = subprocess.Popen(command, stderr=output, start_new_session=True)
        end = time.monotonic() + START_TIMEOUT
        while "ready for connections" not in log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"{self._program.path} does not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End at once, as in a power cut; the data stays, for `start`."""
        self._process.kill()
        self._process.wait(START_TIMEOUT)

    def settings(self, user: str, password: str, database: str = DATABASE) -> dict[str, str]:
        """The program's DB_ variables for a connection by TCP."""
        account = {"DB_USER": user, "DB_PASSWORD": password, "DB_NAME": database}
        return {"DB_HOST": "127.0.0.1", "DB_PORT": str(self.port), **account}

    def create_reader(
        self, user: str = "reader", password: str = "reader's secret", database: str = DATABASE, right: str = "SELECT"
    ) -> dict[str, str]:
        """Make (again) an account for connections by TCP that has one right on one database; its settings."""
        account = f"'{user}'@'127.0.0.1'"
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"DROP USER IF EXISTS {account}")
            cursor.execute(f"CREATE USER {account} IDENTIFIED BY %s", (password,))
            cursor.execute(f"GRANT {right} ON `{database}`.* TO {account}")
        return self.settings(user, password, database)

    def connect(self, database: str = "", **options: Any) -> Any:
        """A connection as root, in UTC, each statement committed on its own."""
        session = {"charset": "utf8mb4", "collation": "utf8mb4_unicode_ci", "time_zone": "+00:00", "autocommit": True}
        account = {"user": "root", "unix_socket": self.socket, "database": database}
        return mysql.connector.connect(**(account | session | options))

    def query(self, sql: str, database: str = DATABASE) -> list[tuple[Any, ...]]:
        """Run one statement as root; its rows, if it has any."""
        with self.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.with_rows else []

    def load(self, script: Path, *arguments: str) -> str:
        """What the command-line client prints for a file, as root unless `arguments` say otherwise, or RuntimeError."""
        command = [self._program.client, "--no-defaults", "--user=root", f"--socket={self.socket}", *arguments]
        sql, environment = script.read_bytes(), {**os.environ, "MYSQL_PWD": ""}
        done = subprocess.run(command, input=sql, capture_output=True, env=environment, timeout=START_TIMEOUT)
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace").strip())
        return done.stdout.decode()


def fill(server: DatabaseServer, customers: int, views: int, *, all_qualify: bool = False) -> None:
    """Replace all customers and page views by made-up ones with the ids 1, 2, ...: the same in every call on one day.

    A quarter of the customers is pro, and the views are spread over 90 days and 8 pages. With `all_qualify` Query 2
    finds every customer, for days to come; that takes at least as many views as customers.
    """
    plans, pages, days = (1, 2, 2) if all_qualify else (4, 8, 90)
    user = "(n - 1)" if all_qualify else "CRC32(CONCAT('user', n))"
    plan = f"ELT(1 + CRC32(n) MOD {plans}, 'pro', 'basic', 'free', 'enterprise')"
    page = (
        f"ELT(1 + CRC32(CONCAT('page', n)) MOD {pages}, 'pricing', 'settings', 'home', 'docs', 'blog', 'a', 'b', 'c')"
    )
    time = f"CURDATE() - INTERVAL 1 + CRC32(CONCAT('time', n)) MOD (86400 * {days}) SECOND"
    most = "max_recursive_iterations" if server.kind == "mariadb" else "cte_max_recursion_depth"
    numbers = "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {})"
    statements = f"""
        SET foreign_key_checks = 0, {most} = 4294967295;
        {DROP_INDEX};
        TRUNCATE page_views;
        TRUNCATE customers;
        INSERT INTO customers (id, first_name, last_name, email, plan_type) {numbers.format(customers)}
            SELECT n, CONCAT('First', n), CONCAT('Last', n), CONCAT('user', n, '@example.com'), {plan} FROM numbers;
        INSERT INTO page_views (id, user_id, page, browser, location, event_time) {numbers.format(views)}
            SELECT n, 1 + {user} MOD {customers}, {page}, 'desktop', 'Berlin, DE', {time} FROM numbers;
        {ADD_INDEX}"""
    with server.connect(DATABASE) as connection, connection.cursor() as cursor:
        for statement in statements.split(";"):
            cursor.execute(statement)
    server.query("ANALYZE TABLE customers, page_views")


def _command(program: Path, kind: str, folder: str) -> list[str]:
    # A tmpdir of its own, because MariaDB begins with removing there what looks like its own temporary tables, those
    # of other servers included.
    folders = [f"--datadir={folder}/data", f"--tmpdir={folder}/tmp"]
    as_root = ["--user=root"] if os.geteuid() == 0 else []  # neither server runs as root without being told so
    dying_with_its_parent = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    options = ["--no-defaults", *as_root, *folders, *_SMALL_AND_FAST, *_OF_KIND[kind]]
    return [*dying_with_its_parent, str(program), *options]


@functools.cache
def _template(program: ServerProgram) -> str:
    """A folder for a new server, made once in a process, because that takes MySQL seconds, and copied for each."""
    folder = tempfile.mkdtemp(dir=_all_folders()[0])
    (Path(folder) / "tmp").mkdir()
    tool, options = str(program.path), ["--initialize-insecure"]
    if program.kind == "mariadb":
        above = program.path.parent.parent
        path = os.pathsep.join(map(str, (program.path.parent, above / "bin", above / "scripts", *os.get_exec_path())))
        tool = shutil.which("mariadb-install-db", path=path) or "mysql_install_db"
        options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
    command = [*_command(Path(tool), program.kind, folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=START_TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{tool} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder


@functools.cache
def _all_folders() -> tuple[str, subprocess.Popen[bytes]]:
    """A folder for everything of this process, and a shell that removes it when the process has ended in any way."""
    folder = tempfile.mkdtemp(prefix="database-", dir="/tmp")  # the path of a socket may have 107 bytes
    # The pipe ends with this process. A server that is being killed may still write for a moment.
    command = ["sh", "-c", 'cat; rm -rf "$0" || { sleep 1; rm -rf "$0"; }', folder]
    return folder, subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def _free_port() -> int:
    # Below the ports that the system gives to outgoing connections, which could take this one while a server is down.
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
