"""The rows, on each kind of server that the machine has, and what is said when there are none (contract 1 to 3)."""

from __future__ import annotations

import contextlib
import re
import socket
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import db_connection
from db_connection import DatabaseConnection, DatabaseError, Record, read_query
from lab import database
from lab.database import DATABASE, DatabaseServer, find_servers
from lab.process import Started
from lab.standin_handle import StandIn

KINDS = sorted(find_servers())
QUERY_2 = read_query(database.QUERIES, "query_2")
NO_CONNECTION = "There is no connection to the database: check DB_HOST, DB_PORT and DB_SSL_CA"
BROKE_OFF = "The database connection broke: check that the server runs, and DB_SSL_CA if set"
NO_TLS = "The encrypted connection to the database failed: check DB_SSL_CA and the server's certificate"
LOAD = "check DB_NAME, or load database_setup.sql"
NOBODY = {"DB_USER": "me", "DB_PASSWORD": "none of your business", "DB_NAME": DATABASE}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, server.pem for a server that is called localhost and nothing else, and other.pem, a stranger's."""
    folder, authority = tmp_path_factory.mktemp("certificates"), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def own(request: pytest.FixtureRequest, certificates: Path) -> Iterator[DatabaseServer]:
    """A server of each kind, with the sample and TLS, that a test may stop, kill and set up as it likes."""
    files = {"ca": "ca.pem", "cert": "server.pem", "key": "server.pem"}
    options = [f"--ssl-{name}={certificates / file}" for name, file in files.items()]
    with DatabaseServer(find_servers()[request.param], *options) as server:
        server.load(database.SETUP)
        yield server


def connection(settings: Mapping[str, str]) -> DatabaseConnection:
    host, port, ca_file = settings["DB_HOST"], int(settings.get("DB_PORT", "3306")), settings.get("DB_SSL_CA", "")
    return DatabaseConnection(host, port, *(settings[f"DB_{name}"] for name in ("USER", "PASSWORD", "NAME")), ca_file)


def rows(settings: Mapping[str, str], sql: str = QUERY_2) -> list[Record]:
    with connection(settings) as opened:
        return opened.read_records(sql)


def refusal(settings: Mapping[str, str], sql: str = QUERY_2, **changes: str) -> str:
    """What is said of settings or a query that do not work."""
    with pytest.raises(DatabaseError) as error:
        rows({**settings, **changes}, sql)
    return str(error.value)


def is_said(text: str, words: str, number: int | str = "") -> bool:
    """Whether it is these words and the server's or driver's own in one line."""
    begins = rf"{number}\b" if number else ""
    return bool(re.fullmatch(rf"{re.escape(words)} \({begins}.*\)", text))


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_record_is_a_row_of_query_2_and_a_query_of_other_columns_is_refused(own: DatabaseServer) -> None:
    reader = own.create_reader()
    records = rows(reader)
    assert [tuple(record) for record in records] == [(*row[:8], str(row[8])) for row in own.query(QUERY_2)]
    assert (records[0].first_name, records[0].event_time[10:]) == ("Sarah", " 14:30:45")
    columns = "first_name, user_id, email, plan_type, view_id, page, browser, location, event_time"
    said = refusal(reader, f"SELECT {columns} FROM ({QUERY_2}) AS query_2")
    wanted = "user_id, first_name, email, plan_type, view_id, page, browser, location, event_time"
    assert said == f"Query 2 must return {wanted}: restore phase2_queries.sql"


def test_a_value_of_any_type_is_read_as_the_server_writes_it(own: DatabaseServer) -> None:
    values = {
        "-5": -5,
        "'007'": "007",
        "NULL": None,
        "'Zoë 😀'": "Zoë 😀",
        "1.50": "1.50",
        "CAST('2026-01-13' AS DATE)": "2026-01-13",
        "CAST('2026-01-13 14:30:45.5' AS DATETIME(3))": "2026-01-13 14:30:45.500",
        "CAST('Zoë' AS BINARY)": "Zoë",
        "X'4AE9'": "J\udce9",
    }
    columns = ", ".join(f"{sql} AS {column}" for sql, column in zip(values, Record._fields, strict=True))
    assert rows(own.create_reader(), f"SELECT {columns}") == [Record(*values.values())]


def test_rows_are_read_in_parts_and_a_text_that_many_have_is_kept_once(own: DatabaseServer) -> None:
    """All packets of 20 000 rows would take some 10 MB on top of the records, and a text for each row 4 MB."""
    columns = "c.id + 0 AS user_id, first_name, email, plan_type, a.id AS view_id, a.page, a.browser, a.location"
    sql = f"SELECT {columns}, a.event_time FROM customers c, page_views a, page_views b LIMIT 20000"
    with connection(own.create_reader()) as opened:
        tracemalloc.start()
        records = opened.read_records(sql)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (len(records), peak < 9_000_000) == (20_000, True), peak


def test_the_session_is_read_only_in_utc_and_utf8mb4(own: DatabaseServer) -> None:
    with connection(own.create_reader(user="writer", right="ALL")) as opened:
        [session] = opened.execute_query(
            "SELECT @@session.time_zone AS zone, @@collation_connection AS collation, DATABASE() AS name, 'ü😀' AS text"
        )
        assert session == {"zone": "+00:00", "collation": "utf8mb4_unicode_ci", "name": DATABASE, "text": "ü😀"}
        with pytest.raises(DatabaseError, match="1792"):
            opened.execute_query("UPDATE customers SET plan_type = 'free'")


def test_a_unix_socket_may_be_the_host(own: DatabaseServer) -> None:
    assert len(rows({"DB_HOST": own.socket, "DB_USER": "root", "DB_PASSWORD": "", "DB_NAME": DATABASE})) == 3


def test_it_is_closed_before_the_first_call(own: DatabaseServer, started: Started, standin: StandIn) -> None:
    standin.fault("silence")
    started(database=own.create_reader(user="watched"))
    standin.wait_for_calls(1)
    wait_until(lambda: not own.query("SELECT id FROM information_schema.processlist WHERE user = 'watched'"))


def test_a_query_is_what_stands_under_its_name_up_to_the_semicolon(tmp_path: Path) -> None:
    path = tmp_path / "queries.sql"
    path.write_text("-- name: one\nSELECT ';'\nFROM ü;\n\n-- name: two\n-- a comment\nSELECT 2;\n-- name: end\nSELECT")
    assert [read_query(path, name) for name in ("one", "two")] == ["SELECT ';'\nFROM ü", "-- a comment\nSELECT 2"]
    for name in ("on", "three", "end"):
        with pytest.raises(DatabaseError, match=f"^{path} has no query under '-- name: {name}': restore the file"):
            read_query(path, name)


def test_with_a_ca_file_the_server_is_verified(own: DatabaseServer, certificates: Path) -> None:
    reader = own.create_reader()
    own.query("ALTER USER reader@127.0.0.1 REQUIRE SSL")
    with connection({**reader, "DB_HOST": "localhost", "DB_SSL_CA": str(certificates / "ca.pem")}) as opened:
        assert opened.execute_query("SHOW STATUS LIKE 'Ssl_cipher'")[0]["Value"]
    for host, authority in (("127.0.0.1", "ca.pem"), ("localhost", "other.pem")):
        assert is_said(refusal(reader, DB_HOST=host, DB_SSL_CA=str(certificates / authority)), BROKE_OFF, 2055)
    assert "DB_SSL_CA" in refusal(reader, DB_SSL_CA=__file__)


def test_a_server_without_tls_is_refused_when_a_ca_file_is_set(certificates: Path) -> None:
    option = {"mariadb": "--skip-ssl", "mysql": "--tls-version="}[KINDS[0]]
    with DatabaseServer(find_servers()[KINDS[0]], option) as server:
        server.query(f"CREATE DATABASE {DATABASE}", "")
        assert is_said(refusal(server.create_reader(), DB_SSL_CA=str(certificates / "ca.pem")), NO_TLS)


def broken(server: DatabaseServer, name: str, change: str) -> dict[str, str]:
    """The settings for a database whose table of views is changed so."""
    server.query(f"CREATE DATABASE {name}", "")
    for table in ("customers", "page_views"):
        server.query(f"CREATE TABLE {name}.{table} LIKE {DATABASE}.{table}", "")
    server.query(change, name)
    return server.create_reader(user=name, database=name)


def test_what_the_server_refuses_is_told_in_one_line_with_its_cure_and_no_password(own: DatabaseServer) -> None:
    writer, everywhere = own.create_reader(user="writer", right="INSERT"), own.create_reader(user="everywhere")
    own.query("GRANT SELECT ON *.* TO everywhere@127.0.0.1")
    no_column = broken(own, "no_column", "ALTER TABLE page_views DROP KEY page_views_recent, DROP COLUMN browser")
    cure = "GRANT SELECT on it to the user"
    for number, words, settings in (
        (1044, f"DB_USER may not use this database: check DB_NAME, or {cure}", {**writer, "DB_NAME": "mysql"}),
        (1045, "The database refused the login: check DB_USER and DB_PASSWORD", own.settings("no", "geheim")),
        (1049, f"There is no such database: {LOAD}", {**everywhere, "DB_NAME": "nowhere"}),
        (1054, "A column is missing: compare the tables with database_setup.sql", no_column),
        (1142, f"DB_USER may not read a table: {cure}", writer),
        (1146, f"A table is missing: {LOAD}", broken(own, "no_table", "DROP TABLE page_views")),
    ):
        said = refusal(settings)
        assert is_said(said, words, number)
        assert settings["DB_PASSWORD"] not in said


@pytest.mark.parametrize(
    ("version", "refused"),
    [("5.7.44-log", "MySQL "), ("10.1.48-MariaDB", "MariaDB "), ("8.0.0-edge", ""), ("10.2.0-MariaDB", "")],
)
def test_a_server_that_is_too_old_is_told_so_before_the_query(version: str, refused: str) -> None:
    if "mariadb" not in find_servers():
        pytest.skip("only a MariaDB can be told to give itself out for another version")
    with DatabaseServer(find_servers()["mariadb"], f"--version={version}") as server:
        server.query(f"CREATE DATABASE {DATABASE}", "")
        said = refusal(server.create_reader())
    why = f"{refused}{version} is too old: the query needs MySQL 8.0 or MariaDB 10.2, or later"
    assert said == why if refused else said.startswith("A table is missing")


def test_a_server_without_a_connection_left_is_told(own: DatabaseServer) -> None:
    reader = own.create_reader()
    own.query("SET GLOBAL max_connections = 10")
    with contextlib.ExitStack() as held, pytest.raises(DatabaseError) as error:
        deque(held.enter_context(connection(reader)) for _ in range(11))
    own.query("SET GLOBAL max_connections = DEFAULT")
    words = "The database has no connection left: try again later, or raise max_connections"
    assert is_said(str(error.value), words, 1040)


@pytest.mark.parametrize(
    ("host", "words", "number"),
    [
        ("127.0.0.1", "No database answers there: check DB_HOST and DB_PORT, and that the server runs", 2003),
        ("/nowhere/sock", "No database answers on this socket: check DB_HOST, and that the server runs", 2002),
        ("database.invalid", "No database answers there: check DB_HOST and DB_PORT, and that the server runs", 2003),
        ("..example.com", NO_CONNECTION, ""),
    ],
)
def test_a_database_that_is_not_there_is_told(host: str, words: str, number: int | str) -> None:
    with socket.socket() as held:  # a port on which nobody listens, and that nobody else is given
        held.bind(("127.0.0.1", 0))
        assert is_said(refusal(NOBODY, DB_HOST=host, DB_PORT=str(held.getsockname()[1])), words, number)


@pytest.mark.parametrize("end", ["KILL QUERY", "KILL", "power cut"])
def test_a_query_that_is_broken_off_is_told(own: DatabaseServer, end: str) -> None:
    tables = ", ".join(f"page_views AS t{number}" for number in range(9))  # for hours
    user = end.replace(" ", "_")  # one of its own, for a connection that was killed is listed for a while
    found = f"SELECT id FROM information_schema.processlist WHERE user = '{user}' AND info LIKE 'SELECT SUM%'"
    with ThreadPoolExecutor(1) as beside:
        said = beside.submit(refusal, own.create_reader(user), f"SELECT SUM(t0.id) FROM {tables}")
        wait_until(lambda: own.query(found))
        if end == "power cut":
            own.kill()
            own.start()
        else:
            own.query(f"{end} {own.query(found)[0][0]}")
    words, number = ("The database reported an error", 1317) if end == "KILL QUERY" else (BROKE_OFF, 2013)
    assert is_said(said.result(), words, number)


def test_a_server_that_is_silent_for_too_long_is_told(own: DatabaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db_connection, "QUERY_TIMEOUT", 1)
    said = refusal(own.create_reader(), "SELECT SLEEP(60)")
    assert is_said(said, "The database was silent for 600 s: look for locks, and for a missing index", 3024)


def talk(server: socket.socket, words: bytes) -> None:
    """Say so to whoever comes, and hang up."""
    client, _ = server.accept()
    with client, contextlib.suppress(OSError):
        client.sendall(words)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1000):
            pass


HELLO = (
    b"\x0a8.0\x00\x08\x00\x00\x00salt8888\x00\xff\xf7\xff\x02\x00\xff\xdf\x15" + bytes(10) + b"12bytes.salt\x00x\x00"
)


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.binary(max_size=80).map(lambda body: len(body).to_bytes(3, "little") + b"\x00" + body) | st.binary())
@example(b"")
@example(b"SSH-2.0-OpenSSH_9.2\r\n")
@example(b"\x05\x00\x00\x00\x0b\x08\x05\x1a\x00")  # what a client is told on MySQL's other port, 33060
@example(len(HELLO).to_bytes(3, "little") + b"\x00" + HELLO)
def test_whatever_a_port_says_is_an_error_of_the_database(words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as beside:
        beside.submit(talk, server, words)
        said = refusal(NOBODY, DB_HOST="127.0.0.1", DB_PORT=str(server.getsockname()[1]))
    assert is_said(said, NO_CONNECTION) or is_said(said, BROKE_OFF) or "(2" in said
