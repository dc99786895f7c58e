"""DatabaseConnection, and main.py with a database that fails, on each kind of server that the machine has."""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import database
import harness
from database import DATABASE, DatabaseServer, find_servers
from db_connection import DatabaseConnection, DatabaseError, read_query
from standin_handle import StandIn

Program = Callable[..., harness.Ended]
Started = Callable[..., harness.Running]
Customers = Callable[..., dict[str, str]]

KINDS = sorted(find_servers()) or ["mariadb or mysql"]
STEPS = """\
Starting Iterable Integration - Phase 3
[STEP 1] Loading environment variables...
[STEP 2] Connecting to database...
"""
THE_THREE = ["mia.harris@email.com", "olivia.brown@email.com", "sarah.johnson@email.com"]


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, servers: dict[str, DatabaseServer]) -> DatabaseServer:
    """A server of each kind, with the sample."""
    return servers[request.param]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, the certificate of a server that is called localhost and nothing else, and other.pem, a stranger."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "certificate.pem"))
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def own(request: pytest.FixtureRequest, certificates: Path) -> Iterator[DatabaseServer]:
    """A server of each kind, with the sample and TLS, that a test may stop, kill and set up as it likes."""
    files = (("ca", "ca.pem"), ("cert", "certificate.pem"), ("key", "key.pem"))
    options = (f"--ssl-{name}={certificates / file}" for name, file in files)
    with DatabaseServer(find_servers()[request.param], *options) as server:
        server.load(database.SETUP)
        yield server


def connection(settings: dict[str, str]) -> DatabaseConnection:
    return DatabaseConnection(
        host=settings["DB_HOST"],
        port=int(settings.get("DB_PORT", "3306")),
        user=settings["DB_USER"],
        password=settings["DB_PASSWORD"],
        database=settings["DB_NAME"],
        ssl_ca=settings.get("DB_SSL_CA", ""),
        stop=threading.Event(),
    )


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# The connection


def test_the_session_is_in_utc_and_utf8mb4(loaded: DatabaseServer) -> None:
    with connection(loaded.create_reader()) as opened:
        [session] = opened.execute_query(
            "SELECT @@session.time_zone AS zone, @@character_set_client AS client, @@character_set_results AS results,"
            " @@collation_connection AS collation, DATABASE() AS name, CHAR_LENGTH('ü😀') AS length, 'ü😀' AS text"
        )
        assert opened.server == f"{'MariaDB' if loaded.kind == 'mariadb' else 'MySQL'} {loaded.version}"
    assert session == {
        "zone": "+00:00",
        "client": "utf8mb4",
        "results": "utf8mb4",
        "collation": "utf8mb4_unicode_ci",
        "name": DATABASE,
        "length": 2,
        "text": "ü😀",
    }


def test_the_session_can_only_read_whatever_the_account_may(loaded: DatabaseServer) -> None:
    writer = loaded.create_reader(user="writer", right="ALL")
    with connection(writer) as opened, pytest.raises(DatabaseError, match="1792"):
        opened.execute_query("UPDATE customers SET plan_type = 'free'")
    with connection(writer) as opened:
        assert len(opened.execute_query(read_query(database.QUERIES, "query_2"))) == 3


def test_a_statement_without_rows_gives_no_rows(loaded: DatabaseServer) -> None:
    with connection(loaded.create_reader()) as opened:
        assert opened.execute_query("DO 0") == []
        assert opened.execute_query("SELECT id FROM customers WHERE id < 0") == []


def test_the_connection_is_closed_before_the_first_call(
    loaded: DatabaseServer, started: Started, standin: StandIn
) -> None:
    reader = loaded.create_reader(user="watched")
    open_connections = "SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'watched'"
    standin.fault("silence")
    started(database=reader)
    standin.wait_for_calls(1)
    wait_until(lambda: loaded.query(open_connections) == [(0,)], seconds=5)  # the calls are not answered meanwhile


def test_a_servers_own_zone_modes_and_character_set_make_no_difference(
    own: DatabaseServer, program: Program, standin: StandIn
) -> None:
    modes = "'ONLY_FULL_GROUP_BY,ANSI,TRADITIONAL,NO_BACKSLASH_ESCAPES'"
    others = {"time_zone": "'-11:00'", "sql_mode": modes, "character_set_server": "latin1"}
    for name, value in others.items():
        own.query(f"SET GLOBAL {name} = {value}")
    ended = program(database=own.create_reader())
    for name in others:
        own.query(f"SET GLOBAL {name} = DEFAULT")
    assert (ended.exit_code, sorted(standin.state()["users"])) == (0, THE_THREE)
    timestamp = standin.state()["events"]["page-view-37"]["dataFields"]["timestamp"]
    assert timestamp.endswith(" 14:30:45")


def test_a_unix_socket_may_be_the_host(loaded: DatabaseServer, program: Program) -> None:
    account = {"DB_USER": "root", "DB_PASSWORD": ""}
    ended = program(database={"DB_HOST": loaded.socket, "DB_NAME": DATABASE, **account})
    assert (ended.exit_code, ended.results["summary"]["success"]) == (0, 3)
    assert ended.results["run"]["database"] == f"{DATABASE} on {loaded.socket}"


def test_a_server_that_is_just_starting_is_waited_for(own: DatabaseServer, started: Started) -> None:
    reader = own.create_reader()
    own.stop()
    try:
        running = started(database=reader)
        running.wait_for("The database does not answer yet, next try in 1 s (2003")
    finally:
        own.start()
    ended = running.wait()
    assert (ended.exit_code, ended.results["summary"]["success"]) == (0, 3)


# TLS


def test_with_a_ca_file_the_connection_is_encrypted_and_server_and_name_are_verified(
    own: DatabaseServer, certificates: Path
) -> None:
    reader = {**own.create_reader(), "DB_SSL_CA": str(certificates / "ca.pem")}
    own.query("ALTER USER reader@127.0.0.1 REQUIRE SSL")
    with connection({**reader, "DB_HOST": "localhost"}) as opened:
        [status] = opened.execute_query("SHOW STATUS LIKE 'Ssl_cipher'")
    assert status["Value"] != ""


@pytest.mark.parametrize(
    ("host", "authority"), [("127.0.0.1", "ca.pem"), ("localhost", "other.pem")], ids=["wrong name", "wrong authority"]
)
def test_a_server_that_is_not_the_one_it_should_be_gets_no_password(
    own: DatabaseServer, certificates: Path, host: str, authority: str
) -> None:
    settings = {**own.create_reader(), "DB_HOST": host, "DB_SSL_CA": str(certificates / authority)}
    words = "The encrypted connection to the database failed: check DB_SSL_CA and the server's certificate ("
    with pytest.raises(DatabaseError, match=re.escape(words)), connection(settings):
        pass


def test_a_server_without_tls_is_refused_when_a_ca_file_is_set(certificates: Path) -> None:
    program, options = find_servers(), {"mariadb": "--skip-ssl", "mysql": "--tls-version="}
    kind = next(iter(program))
    with DatabaseServer(program[kind], options[kind]) as server:
        server.query(f"CREATE DATABASE {DATABASE}", "")
        settings = {**server.create_reader(), "DB_SSL_CA": str(certificates / "ca.pem")}
        with (
            pytest.raises(DatabaseError, match="The encrypted connection to the database failed"),
            connection(settings),
        ):
            pass


# Whatever fails is one line that says what to do, and exit code 3


def assert_aborted(ended: harness.Ended, cure: str, number: int | str, steps: str = STEPS) -> None:
    """The console has the steps so far, then what failed and what to do in one line; a results document is there."""
    [results] = ended.folder.glob("integration_results_*")
    found = re.fullmatch(
        rf"{re.escape(steps)}\n(.*)\nResults: {re.escape(str(results))}\nTime: \d+\.\d s, 0\.0 users a second\n",
        ended.console,
    )
    assert found, ended.console
    assert re.fullmatch(rf"{re.escape(cure)} \({number}\b.*\)", found[1]), found[1]
    assert (ended.exit_code, ended.errors) == (3, "")
    document = ended.results
    assert document["results"] == []
    summary = {key: value for key, value in document["summary"].items() if value and key != "duration_seconds"}
    assert summary == {"outcome": "aborted", "exit_code": 3}
    assert f"ERROR   main: {found[1]}\n" in ended.log


def with_table(server: DatabaseServer, name: str, *changes: str) -> str:
    """A database of that name whose tables are those of the sample with some changes."""
    server.query(f"DROP DATABASE IF EXISTS {name}", "")
    server.query(f"CREATE DATABASE {name}", "")
    for table in ("customers", "page_views"):
        server.query(f"CREATE TABLE {name}.{table} LIKE {DATABASE}.{table}", "")
    for change in changes:
        server.query(change, name)
    return name


def wrong_password(server: DatabaseServer) -> dict[str, str]:
    return {**server.create_reader(), "DB_PASSWORD": "not the password"}


def unknown_user(server: DatabaseServer) -> dict[str, str]:
    return server.settings("nobody", "any password")


def no_right_on_the_database(server: DatabaseServer) -> dict[str, str]:
    return {**server.create_reader(), "DB_NAME": "mysql"}


def no_such_database(server: DatabaseServer) -> dict[str, str]:
    server.create_reader(user="everywhere")
    server.query("GRANT SELECT ON *.* TO everywhere@127.0.0.1", "")
    return server.settings("everywhere", "reader's secret", "nowhere")


def table_missing(server: DatabaseServer) -> dict[str, str]:
    return server.create_reader(database=with_table(server, "without_table", "DROP TABLE page_views"))


def column_missing(server: DatabaseServer) -> dict[str, str]:
    changes = "ALTER TABLE page_views DROP KEY page_views_recent", "ALTER TABLE page_views DROP COLUMN browser"
    return server.create_reader(database=with_table(server, "without_column", *changes))


def no_right_to_read(server: DatabaseServer) -> dict[str, str]:
    return server.create_reader(user="inserter", right="INSERT")


def no_right_to_read_a_column(server: DatabaseServer) -> dict[str, str]:
    settings = server.create_reader(user="partial", right="INSERT")
    for table in ("customers", "page_views"):
        server.query(f"GRANT SELECT (id) ON {DATABASE}.{table} TO partial@127.0.0.1")
    return settings


CONNECTING = {
    wrong_password: ("The database refused the login: check DB_USER and DB_PASSWORD", 1045),
    unknown_user: ("The database refused the login: check DB_USER and DB_PASSWORD", 1045),
    no_right_on_the_database: (
        "DB_USER may not use this database: check DB_NAME, or GRANT SELECT on it to the user",
        1044,
    ),
    no_such_database: ("There is no such database: check DB_NAME, or load database_setup.sql", 1049),
}
READING = {
    table_missing: ("A table is missing: check DB_NAME, or load database_setup.sql", 1146),
    column_missing: ("A column is missing: compare the tables with database_setup.sql", 1054),
    no_right_to_read: ("DB_USER may not read a table: GRANT SELECT on it to the user", 1142),
    no_right_to_read_a_column: ("DB_USER may not read a column: GRANT SELECT on it to the user", 1143),
}


@pytest.mark.parametrize("wrong", [*CONNECTING, *READING], ids=lambda wrong: wrong.__name__)
def test_a_database_that_is_not_as_it_should_be_is_told_in_one_line(
    loaded: DatabaseServer, program: Program, standin: StandIn, wrong: Callable[[DatabaseServer], dict[str, str]]
) -> None:
    settings = wrong(loaded)
    ended = program(database=settings, LOG_LEVEL="DEBUG")
    steps = STEPS + "[STEP 3] Executing Phase 2 Query 2...\n" * (wrong in READING)
    assert_aborted(ended, *{**CONNECTING, **READING}[wrong], steps)
    assert settings["DB_PASSWORD"] not in ended.everything
    assert standin.counters()["connections"] == 0


def test_a_quiet_run_shows_that_line_and_where_the_results_are(server: DatabaseServer, program: Program) -> None:
    ended = program("--quiet", database=wrong_password(server))
    why, results, seconds = ended.console.splitlines()
    assert why.startswith("The database refused the login: check DB_USER and DB_PASSWORD (1045")
    assert (results[:9], seconds[:6], ended.exit_code) == ("Results: ", "Time: ", 3)


@pytest.mark.parametrize(
    ("version", "words"),
    [("5.7.40-log", "MySQL 5.7.40-log"), ("10.1.48-MariaDB", "MariaDB 10.1.48-MariaDB")],
    ids=["MySQL 5.7", "MariaDB 10.1"],
)
def test_a_server_that_is_too_old_is_told_so_before_the_query(program: Program, version: str, words: str) -> None:
    if "mariadb" not in find_servers():
        pytest.skip("only a MariaDB can be told to give itself out for another version")
    with DatabaseServer(find_servers()["mariadb"], f"--version={version}") as server:
        server.query(f"CREATE DATABASE {DATABASE}", "")
        ended = program(database=server.create_reader())
    line = f"{words} is too old: the query needs MySQL 8.0 or MariaDB 10.2, or later"
    assert (ended.exit_code, ended.errors) == (3, "")
    assert ended.console.startswith(f"{STEPS}\n{line}\nResults: ")
    assert ended.results["summary"]["outcome"] == "aborted"


def test_a_server_that_vanishes_in_mid_query_is_told_so(own: DatabaseServer, started: Started) -> None:
    reader = own.create_reader(user="waiting")
    waits = "SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'waiting' AND state LIKE 'Waiting for%'"
    locker = own.connect(DATABASE)
    locker.cursor().execute("LOCK TABLES page_views WRITE, customers WRITE")
    try:
        running = started(database=reader)
        wait_until(lambda: own.query(waits, "") == [(1,)])
    finally:
        own.kill()
        own.start()
        with contextlib.suppress(Exception):
            locker.close()
    cure = "The database closed the connection: check that the server runs, then run again"
    assert_aborted(running.wait(), cure, 2013, f"{STEPS}[STEP 3] Executing Phase 2 Query 2...\n")


def test_a_query_that_the_server_breaks_off_is_told_so(own: DatabaseServer, started: Started) -> None:
    """As an administrator does with KILL, or a limit on the time of a statement."""
    reader = own.create_reader(user="waiting")
    waits = "SELECT id FROM information_schema.processlist WHERE user = 'waiting' AND state LIKE 'Waiting for%'"
    with own.connect(DATABASE) as locker:
        locker.cursor().execute("LOCK TABLES page_views WRITE, customers WRITE")
        running = started(database=reader)
        wait_until(lambda: len(own.query(waits, "")) == 1)
        [(number,)] = own.query(waits, "")
        own.query(f"KILL QUERY {number}", "")
        ended = running.wait()
    assert_aborted(ended, "The database reported an error", 1317, f"{STEPS}[STEP 3] Executing Phase 2 Query 2...\n")


class Closed:
    """A port of this machine on which nobody listens, and that nobody else is given."""

    def __enter__(self) -> int:
        self._held = socket.socket()
        self._held.bind(("127.0.0.1", 0))
        port: int = self._held.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        self._held.close()


def test_a_database_that_is_not_there_is_tried_for_seven_seconds(
    settings: Callable[..., dict[str, str]], folder: Path
) -> None:
    """At a port without a listener, a socket that is not there, and a host name that nobody knows."""
    account = {"DB_USER": "me", "DB_PASSWORD": "none of your business", "DB_NAME": DATABASE}
    with Closed() as port, contextlib.ExitStack() as runs:
        places: dict[str, tuple[dict[str, str], str, Any]] = {
            "port": (
                {"DB_HOST": "127.0.0.1", "DB_PORT": str(port)},
                "No database answers there: check DB_HOST and DB_PORT, and that the server runs",
                2003,
            ),
            "socket": (
                {"DB_HOST": str(folder / "no.sock")},
                "No database answers on this socket: check DB_HOST, and that the server runs",
                2002,
            ),
            "name": (
                {"DB_HOST": "database.invalid", "RES_OPTIONS": "timeout:1 attempts:1"},
                "The database's host name is unknown: check DB_HOST, and the network's DNS",
                2003,
            ),
        }
        running = {}
        for name, (place, _, _) in places.items():
            (folder / name).mkdir()
            own = settings(account, **place, RESULTS_DIR=str(folder / name), LOG_FILE=str(folder / name / "run.log"))
            running[name] = runs.enter_context(harness.Running(settings=own, folder=folder / name))
        ended = {name: run.wait() for name, run in running.items()}
    for name, (_, cure, number) in places.items():
        tries = re.findall(r"^The database does not answer yet, next try in (\d) s .*\n", ended[name].console, re.M)
        assert tries == ["1", "2", "4"]
        shown = re.sub(r"^The database does not answer yet.*\n", "", ended[name].console, flags=re.M)
        without = harness.Ended(ended[name].exit_code, shown, ended[name].errors, folder / name)
        assert_aborted(without, cure, number)


class XProtocol(socketserver.BaseRequestHandler):
    """What a client is told on MySQL's other port, 33060."""

    def handle(self) -> None:
        self.request.sendall(b"\x05\x00\x00\x00\x0b\x08\x05\x1a\x00")
        self.request.recv(1)


def test_a_port_of_another_protocol_is_an_error_of_the_database(program: Program, customers: Customers) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), XProtocol) as other:
        other.daemon_threads = True
        threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.05}).start()
        ended = program(database={**customers(1), "DB_PORT": str(other.server_address[1])})
        other.shutdown()
    assert_aborted(ended, "The database reported an error", "Protocol mismatch")
