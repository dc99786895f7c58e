"""A private MySQL or MariaDB server for tests, gone with the process that started it.

It is a real server on a temporary folder.
"""

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mysql.connector

from db_connection import DatabaseConnection

ROOT = Path(__file__).resolve().parent.parent.parent
MYSQL9 = ROOT / ".venv" / "mysql9"  # where mysql9.sh unpacks
SETUP = ROOT / "database_setup.sql"
QUERIES = ROOT / "phase2_queries.sql"
DATABASE = "iterable_challenge"

_INDEXES = re.findall(r"KEY page_views_recent \(.*\)", SETUP.read_text("utf-8"))
ADD_INDEX = f"ALTER TABLE page_views ADD {_INDEXES[0]}"
DROP_INDEX = "ALTER TABLE page_views DROP KEY page_views_recent"

# Options for a server with millions of rows.
LARGE = {
    "mariadb": ("--innodb-buffer-pool-size=1G", "--innodb-log-file-size=512M"),
    "mysql": ("--innodb-buffer-pool-size=1G", "--innodb-redo-log-capacity=1G"),
}
START_TIMEOUT = 120.0  # seconds: a start takes under one, but not on every machine

_FOLDERS = (
    *os.get_exec_path(),
    "/usr/sbin",
    "/usr/libexec",
    "/usr/local/mysql/bin",
    str(MYSQL9 / "bin"),
)
_SMALL_AND_FAST = (
    "--bind-address=127.0.0.1",
    "--skip-name-resolve",
    "--skip-log-bin",
    "--performance-schema=OFF",
    "--innodb-buffer-pool-size=32M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
)
_OPTIONS_OF_KIND = {
    "mariadb": ("--innodb-log-file-size=8M",),
    "mysql": (
        "--innodb-redo-log-capacity=8M",
        "--mysqlx=OFF",
        "--secure-file-priv=NULL",
    ),
}


class ServerProgram(NamedTuple):
    """An installed server."""

    kind: str  # mariadb or mysql
    version: str  # such as 10.11.6
    path: Path
    client: Path  # its command-line client


def find_servers() -> dict[str, ServerProgram]:
    """Return the servers of this machine by kind, at most one of each.

    TEST_MARIADBD and TEST_MYSQLD may name them. Otherwise they are looked for in PATH,
    in the usual folders and where mysql9.sh unpacks. Raises LookupError where such a
    variable names no server.
    """
    servers = {}
    for kind, variable in (("mariadb", "TEST_MARIADBD"), ("mysql", "TEST_MYSQLD")):
        named = os.environ.get(variable)
        program = _find_server(kind, named)
        if program:
            servers[kind] = program
        elif named:
            raise LookupError(
                f"{variable} names no {kind} server that runs and has its client"
                f" beside it: {named}"
            )
    return servers


def _find_server(kind: str, named: str | None) -> ServerProgram | None:
    if named:
        places = [Path(named)]
    else:
        names = ("mariadbd", "mysqld")
        places = [Path(folder, name) for folder in _FOLDERS for name in names]
    for path in places:
        found_kind, version = _read_kind_and_version(path)
        if found_kind == kind:
            client = _find_client(kind, path)
            if client:
                return ServerProgram(kind, version, path, client)
    return None


def _find_client(kind: str, server: Path) -> Path | None:
    folders = [server.parent, server.parent.parent / "bin"]
    folders += [Path(folder) for folder in os.get_exec_path()]
    for folder in folders:
        for name in ("mariadb", "mysql"):
            if _read_kind_and_version(folder / name)[0] == kind:
                return folder / name
    return None


@functools.cache
def _read_kind_and_version(path: Path) -> tuple[str, str]:
    """Return what a program says it is, or two empty texts.

    Its name does not say it: Debian's mysqld and mysql are links to MariaDB's programs.
    """
    if not os.access(path, os.X_OK) or path.is_dir():
        return "", ""
    command = [str(path), "--no-defaults", "--version"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60
    )
    words = re.search(r"(?:Ver|from) .*?(\d+\.\d+\.\d+)(-MariaDB)?", done.stdout)
    if words is None:
        return "", ""
    kind = "mariadb" if words[2] else "mysql"
    return kind, words[1]


class DatabaseServer(contextlib.AbstractContextManager["DatabaseServer"]):
    """A `with` block around a private server on a fresh data folder.

    It listens on a free port of 127.0.0.1 and on a socket in its own folder. `root` has
    no password, and logs in by the socket only, which no other account of the machine
    can reach. The server ends with the thread that started it. Further options go to it
    as they are. Raises RuntimeError, with the end of its log, when it does not start.
    """

    def __init__(self, program: ServerProgram, *options: str) -> None:
        self.kind = program.kind
        self.version = program.version
        self._program = program
        self._options = options
        self._folder = tempfile.TemporaryDirectory(dir=_make_common_folder()[0])
        self.socket = str(Path(self._folder.name) / "socket")
        self.port = _find_free_port()

    def __enter__(self) -> DatabaseServer:
        template = _make_template(self._program)
        shutil.copytree(template, self._folder.name, dirs_exist_ok=True)
        self.start()
        # mariadb-install-db lets root in by TCP as well, without a password.
        hosts = (
            "SELECT host FROM mysql.user WHERE user = 'root' AND host <> 'localhost'"
        )
        for (host,) in self.query(hosts, database=""):
            self.query(f"DROP USER root@'{host}'", database="")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Start, again on the same data and port, and wait until it is ready."""
        command = [
            *_build_command(self._program.path, self.kind, self._folder.name),
            f"--socket={self.socket}",
            f"--port={self.port}",
            f"--pid-file={self.socket}.pid",
            *self._options,
        ]
        log = Path(self._folder.name, "log")
        with log.open("w") as output:
            # A session of its own, because a Ctrl-C is for the program that is tested.
            self._process = subprocess.Popen(
                command, stderr=output, start_new_session=True
            )
        end = time.monotonic() + START_TIMEOUT
        while "ready for connections" not in log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                words = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self._program.path} does not start:\n{words}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End at once, as in a power cut; the data stays, for `start`."""
        self._process.kill()
        self._process.wait(START_TIMEOUT)

    def settings(
        self, user: str, password: str, database: str = DATABASE
    ) -> dict[str, str]:
        """Return the program's DB_ variables for a connection by TCP."""
        return {
            "DB_HOST": "127.0.0.1",
            "DB_PORT": str(self.port),
            "DB_USER": user,
            "DB_PASSWORD": password,
            "DB_NAME": database,
        }

    def create_reader(
        self,
        user: str = "reader",
        password: str = "reader's secret",
        database: str = DATABASE,
        right: str = "SELECT",
    ) -> dict[str, str]:
        """Create an account, anew if it is there, and return its settings.

        It connects by TCP, and has one right on one database.
        """
        account = f"'{user}'@'127.0.0.1'"
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"DROP USER IF EXISTS {account}")
            cursor.execute(f"CREATE USER {account} IDENTIFIED BY %s", (password,))
            cursor.execute(f"GRANT {right} ON `{database}`.* TO {account}")
        return self.settings(user, password, database)

    def connect(self, database: str = "", **options: Any) -> Any:
        """Return a connection as root, in UTC, that commits each statement."""
        arguments = {
            "user": "root",
            "unix_socket": self.socket,
            "database": database,
            "charset": "utf8mb4",
            "collation": "utf8mb4_unicode_ci",
            "time_zone": "+00:00",
            "autocommit": True,
            **options,
        }
        return mysql.connector.connect(**arguments)

    def query(self, sql: str, database: str = DATABASE) -> list[tuple[Any, ...]]:
        """Run one statement as root and return its rows, if it has any."""
        with self.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.with_rows else []

    @contextlib.contextmanager
    def global_variables(self, **values: str) -> Iterator[None]:
        """Set global variables, as SQL; afterwards they have their default."""
        for name, value in values.items():
            self.query(f"SET GLOBAL {name} = {value}", database="")
        try:
            yield
        finally:
            for name in values:
                self.query(f"SET GLOBAL {name} = DEFAULT", database="")

    def load(self, script: Path, *arguments: str) -> str:
        """Return what the command-line client prints for a file.

        It logs in as root, unless `arguments` say otherwise. Raises RuntimeError.
        """
        command = [
            str(self._program.client),
            "--no-defaults",
            "--user=root",
            f"--socket={self.socket}",
            *arguments,
        ]
        done = subprocess.run(
            command,
            input=script.read_bytes(),
            capture_output=True,
            check=False,
            env={**os.environ, "MYSQL_PWD": ""},
            timeout=START_TIMEOUT,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace").strip())
        return done.stdout.decode()


def build_connection(settings: Mapping[str, str]) -> DatabaseConnection:
    """Return the program's connection for its DB_ variables, not yet opened."""
    return DatabaseConnection(
        host=settings["DB_HOST"],
        port=int(settings.get("DB_PORT", "3306")),
        user=settings["DB_USER"],
        password=settings["DB_PASSWORD"],
        database=settings["DB_NAME"],
        ssl_ca=settings.get("DB_SSL_CA", ""),
    )


def fill(
    server: DatabaseServer, customers: int, views: int, *, all_qualify: bool = False
) -> None:
    """Replace all customers and page views by made-up ones with the ids 1, 2, ...

    Every call on one day makes the same. A quarter of the customers is pro, and the
    views are spread over 90 days and 8 pages. With `all_qualify` Query 2 finds every
    customer, for days to come; that takes at least as many views as customers.
    """
    if all_qualify:
        plans = 1
        pages = 2
        days = 2
        user = "(n - 1)"
    else:
        plans = 4
        pages = 8
        days = 90
        user = "CRC32(CONCAT('user', n))"
    first_pages = "'pricing', 'settings', 'home', 'docs', 'blog', 'a', 'b', 'c'"
    page = f"ELT(1 + CRC32(CONCAT('page', n)) MOD {pages}, {first_pages})"
    plan = f"ELT(1 + CRC32(n) MOD {plans}, 'pro', 'basic', 'free', 'enterprise')"
    seconds = f"1 + CRC32(CONCAT('time', n)) MOD (86400 * {days})"
    if server.kind == "mariadb":
        limit = "max_recursive_iterations"
    else:
        limit = "cte_max_recursion_depth"
    statements = [
        f"SET foreign_key_checks = 0, {limit} = 4294967295",
        DROP_INDEX,
        "TRUNCATE page_views",
        "TRUNCATE customers",
        f"""
        INSERT INTO customers (id, first_name, last_name, email, plan_type)
        {_count_to(customers)}
        SELECT
            n, CONCAT('First', n), CONCAT('Last', n),
            CONCAT('user', n, '@example.com'), {plan}
        FROM numbers
        """,
        f"""
        INSERT INTO page_views (id, user_id, page, browser, location, event_time)
        {_count_to(views)}
        SELECT
            n, 1 + {user} MOD {customers}, {page}, 'desktop', 'Berlin, DE',
            CURDATE() - INTERVAL {seconds} SECOND
        FROM numbers
        """,
        ADD_INDEX,
    ]
    with server.connect(DATABASE) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
    server.query("ANALYZE TABLE customers, page_views")


def _count_to(last: int) -> str:
    """Return the SQL of a common table expression `numbers` with the rows 1 to last."""
    return f"""
        WITH RECURSIVE numbers (n) AS (
            SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {last}
        )
    """


def _build_command(program: Path, kind: str, folder: str) -> list[str]:
    command = [str(program), "--no-defaults"]
    if shutil.which("setpriv"):  # it dies with its parent
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    if os.geteuid() == 0:  # neither server runs as root unless it is asked to
        command.append("--user=root")
    return [
        *command,
        f"--datadir={folder}/data",
        # At its start MariaDB removes from there what looks like its own temporary
        # tables, even those of other servers.
        f"--tmpdir={folder}/tmp",
        *_SMALL_AND_FAST,
        *_OPTIONS_OF_KIND[kind],
    ]


@functools.cache
def _make_template(program: ServerProgram) -> str:
    """Return a folder for a new server, which each server copies.

    It is made once in a process, because that takes MySQL seconds.
    """
    folder = tempfile.mkdtemp(dir=_make_common_folder()[0])
    (Path(folder) / "tmp").mkdir()
    if program.kind == "mariadb":
        tool = _find_install_script(program)
        options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
    else:
        tool = program.path
        options = ["--initialize-insecure"]
    done = subprocess.run(
        [*_build_command(tool, program.kind, folder), *options],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=START_TIMEOUT,
    )
    if done.returncode:
        words = done.stdout[-2000:] + done.stderr[-2000:]
        raise RuntimeError(f"{tool} failed:\n{words}")
    return folder


def _find_install_script(program: ServerProgram) -> Path:
    above = program.path.parent.parent
    folders = [str(program.path.parent), str(above / "bin"), str(above / "scripts")]
    path = os.pathsep.join([*folders, *os.get_exec_path()])
    return Path(shutil.which("mariadb-install-db", path=path) or "mysql_install_db")


@functools.cache
def _make_common_folder() -> tuple[str, subprocess.Popen[bytes]]:
    """Return a folder for all servers of this process, and what removes it.

    That is a shell which waits for the end of this process, however it ends.
    """
    folder = tempfile.mkdtemp(
        prefix="database-", dir="/tmp"
    )  # a socket's path is short
    # The pipe ends with this process. A server that is being killed may still write.
    script = 'cat; rm -rf "$0" || { sleep 1; rm -rf "$0"; }'
    remover = subprocess.Popen(
        ["sh", "-c", script, folder],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return folder, remover


def _find_free_port() -> int:
    # Below the ports that the system gives to outgoing connections, which could take
    # this one while a server is down.
    while True:
        port = random.randrange(10_000, 32_000)
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
        ):
            return port
