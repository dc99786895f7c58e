"""The rows, on each kind of server that the machine has, and what is said when there are none (contract 1 to 3)."""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import threading
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
CLOSED = "The database closed the connection: check that the server runs, then run again"


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


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    """For what goes on while the test does something to the server."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def connection(settings: Mapping[str, str], **changes: str) -> DatabaseConnection:
    s = {**settings, **changes}
    port = int(s.get("DB_PORT", "3306"))
    return DatabaseConnection(s["DB_HOST"], port, s["DB_USER"], s["DB_PASSWORD"], s["DB_NAME"], s.get("DB_SSL_CA", ""))


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
    return bool(re.fullmatch(rf"{re.escape(words)} \({number}\b.*\)", text))


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# What it reads


def test_a_record_is_a_row_of_query_2_and_a_query_of_other_columns_is_refused(own: DatabaseServer) -> None:
    reader = own.create_reader()
    records = rows(reader)
    assert [tuple(record) for record in records] == own.query(QUERY_2)
    assert [record.first_name for record in records] == ["Sarah", "Olivia", "Mia"]
    assert str(records[0].event_time)[10:] == " 14:30:45"
    for columns in (
        "*, 1 AS more",
        "first_name, user_id, email, plan_type, view_id, page, browser, location, event_time",
    ):
        said = refusal(reader, f"SELECT {columns} FROM ({QUERY_2}) AS query_2")
        assert said.startswith("Query 2 must return user_id, first_name, email, ") and "not " in said
        assert said.endswith(": restore phase2_queries.sql")


def test_rows_are_read_one_by_one_and_equal_texts_are_held_once(own: DatabaseServer) -> None:
    """All packets of 5000 rows would be 6 MB, on top of what the records take."""
    columns = "c.id + 0 AS user_id, first_name, email, plan_type, a.id AS view_id, a.page, a.browser, a.location"
    sql = f"SELECT {columns}, a.event_time FROM customers c, page_views a, page_views b LIMIT 5000"
    with connection(own.create_reader()) as opened:
        tracemalloc.start()
        records = opened.read_records(sql)
        size, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (len(records), size < 600 * 5000, peak < size + 1_000_000) == (5000, True, True)
    for column in ("plan_type", "page", "browser", "location"):
        texts = [getattr(record, column) for record in records]
        assert len({id(text) for text in texts}) == len(set(texts))


def test_the_session_is_in_utc_and_utf8mb4_and_names_the_server(own: DatabaseServer) -> None:
    with connection(own.create_reader()) as opened:
        [session] = opened.execute_query(
            "SELECT @@session.time_zone AS zone, @@collation_connection AS collation, DATABASE() AS name, 'ü😀' AS text"
        )
        assert opened.server == f"{'MariaDB' if own.kind == 'mariadb' else 'MySQL'} {own.version}"
        assert opened.execute_query("DO 0") == []
    assert session == {"zone": "+00:00", "collation": "utf8mb4_unicode_ci", "name": DATABASE, "text": "ü😀"}


def test_a_servers_own_zone_modes_and_character_set_make_no_difference(own: DatabaseServer) -> None:
    reader = own.create_reader()
    expected = rows(reader)
    modes = "'ONLY_FULL_GROUP_BY,ANSI,TRADITIONAL,NO_BACKSLASH_ESCAPES'"
    others = {"time_zone": "'-11:00'", "sql_mode": modes, "character_set_server": "latin1"}
    for name, value in others.items():
        own.query(f"SET GLOBAL {name} = {value}")
    found = rows(reader)
    for name in others:
        own.query(f"SET GLOBAL {name} = DEFAULT")
    assert found == expected


def test_the_session_can_only_read_whatever_the_account_may(own: DatabaseServer) -> None:
    writer = own.create_reader(user="writer", right="ALL")
    assert len(rows(writer)) == 3
    with connection(writer) as opened, pytest.raises(DatabaseError, match="1792"):
        opened.execute_query("UPDATE customers SET plan_type = 'free'")
    wait_until(lambda: not own.query("SELECT id FROM information_schema.processlist WHERE user = 'writer'"))
    del opened  # which was closed although it was still held


def test_a_unix_socket_may_be_the_host(own: DatabaseServer) -> None:
    assert len(rows({"DB_HOST": own.socket, "DB_USER": "root", "DB_PASSWORD": "", "DB_NAME": DATABASE})) == 3


def test_the_connection_is_closed_before_the_first_call(
    own: DatabaseServer, started: Started, standin: StandIn
) -> None:
    reader = own.create_reader(user="watched")
    standin.fault("silence")
    started(database=reader)
    standin.wait_for_calls(1)
    wait_until(
        lambda: own.query("SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'watched'") == [(0,)]
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"-- name: query_22\nSELECT 1;\n", "has no query under '-- name: query_2': restore the file"),
        (b"-- name: query_2\nSELECT 1", "has no query under '-- name: query_2': restore the file"),
    ],
)
def test_a_file_without_the_query_is_an_error_that_names_it(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "queries.sql"
    path.write_bytes(content)
    with pytest.raises(DatabaseError, match=f"^{path} {why}"):
        read_query(path, "query_2")


def test_a_query_is_what_stands_under_its_name_up_to_the_semicolon(tmp_path: Path) -> None:
    path = tmp_path / "queries.sql"
    path.write_text("-- name: one\nSELECT ';'\nFROM ü;\n\n-- name: two\n-- a comment\nSELECT 2;\n")
    assert [read_query(path, name) for name in ("one", "two")] == ["SELECT ';'\nFROM ü", "-- a comment\nSELECT 2"]


# TLS


def test_with_a_ca_file_the_connection_is_encrypted(own: DatabaseServer, certificates: Path) -> None:
    reader = {**own.create_reader(), "DB_HOST": "localhost", "DB_SSL_CA": str(certificates / "ca.pem")}
    own.query("ALTER USER reader@127.0.0.1 REQUIRE SSL")
    with connection(reader) as opened:
        [status] = opened.execute_query("SHOW STATUS LIKE 'Ssl_cipher'")
    assert status["Value"] != ""


@pytest.mark.parametrize(("host", "authority"), [("127.0.0.1", "ca.pem"), ("localhost", "other.pem")])
def test_a_server_of_another_name_or_authority_is_refused(
    own: DatabaseServer, certificates: Path, host: str, authority: str
) -> None:
    said = refusal(own.create_reader(), DB_HOST=host, DB_SSL_CA=str(certificates / authority))
    assert is_said(
        said, "The encrypted connection to the database failed: check DB_SSL_CA and the server's certificate"
    )


def test_a_server_without_tls_is_refused_when_a_ca_file_is_set(certificates: Path) -> None:
    with DatabaseServer(
        find_servers()[KINDS[0]], "--skip-ssl" if KINDS[0] == "mariadb" else "--tls-version="
    ) as server:
        server.query(f"CREATE DATABASE {DATABASE}", "")
        said = refusal(server.create_reader(), DB_SSL_CA=str(certificates / "ca.pem"))
    assert is_said(
        said, "The encrypted connection to the database failed: check DB_SSL_CA and the server's certificate"
    )


# What fails is one line that says what to do


def broken(server: DatabaseServer, change: str) -> dict[str, str]:
    """The settings for a database whose table of views is changed so."""
    server.query("DROP DATABASE IF EXISTS broken", "")
    server.query("CREATE DATABASE broken", "")
    for table in ("customers", "page_views"):
        server.query(f"CREATE TABLE broken.{table} LIKE {DATABASE}.{table}", "")
    server.query(change, "broken")
    return server.create_reader(database="broken")


def granted(server: DatabaseServer, *rights: str) -> dict[str, str]:
    """The settings of an account that may insert, and these other things."""
    settings = server.create_reader(user="other", right="INSERT")
    for right in rights:
        server.query(f"GRANT {right} TO other@127.0.0.1")
    return settings


NO_COLUMN = "ALTER TABLE page_views DROP KEY page_views_recent, DROP COLUMN browser"
WRONG: dict[str, Callable[[DatabaseServer], dict[str, str]]] = {
    "DB_USER may not use this database: check DB_NAME, or GRANT SELECT on it to the user (1044": lambda server: {
        **server.create_reader(),
        "DB_NAME": "mysql",
    },
    "The database refused the login: check DB_USER and DB_PASSWORD (1045": lambda server: server.settings(
        "no", "geheim"
    ),
    "There is no such database: check DB_NAME, or load database_setup.sql (1049": lambda server: {
        **granted(server, "SELECT ON *.*"),
        "DB_NAME": "nowhere",
    },
    "A column is missing: compare the tables with database_setup.sql (1054": lambda server: broken(server, NO_COLUMN),
    "DB_USER may not read a table: GRANT SELECT on it to the user (1142": granted,
    "A table is missing: check DB_NAME, or load database_setup.sql (1146": lambda server: broken(
        server, "DROP TABLE page_views"
    ),
}


@pytest.mark.parametrize("words", WRONG, ids=lambda words: words[-4:])
def test_what_the_server_refuses_is_told_in_one_line_with_its_cure_and_without_the_password(
    own: DatabaseServer, words: str
) -> None:
    settings = WRONG[words](own)
    said = refusal(settings)
    assert re.fullmatch(rf"{re.escape(words)}\b.*\)", said)
    assert settings["DB_PASSWORD"] not in said


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("5.7.44-log", "MySQL 5.7.44-log"),
        ("10.1.48-MariaDB", "MariaDB 10.1.48-MariaDB"),
        ("8.0.0-edge", ""),
        ("10.2.0-MariaDB", ""),
    ],
)
def test_a_server_that_is_too_old_is_told_so_before_the_query(version: str, refused: str) -> None:
    if "mariadb" not in find_servers():
        pytest.skip("only a MariaDB can be told to give itself out for another version")
    with DatabaseServer(find_servers()["mariadb"], f"--version={version}") as server:
        server.query(f"CREATE DATABASE {DATABASE}", "")
        said = refusal(server.create_reader())
    why = f"{refused} is too old: the query needs MySQL 8.0 or MariaDB 10.2, or later"
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
        *(
            (name, "The database's host name is unknown: check DB_HOST, and the network's DNS", "")
            for name in ("database.invalid", "x" * 64, "..example.com")
        ),
    ],
)
def test_a_database_that_is_not_there_is_told(host: str, words: str, number: int | str) -> None:
    account = {"DB_USER": "me", "DB_PASSWORD": "none of your business", "DB_NAME": DATABASE}
    with socket.socket() as held:  # a port on which nobody listens, and that nobody else is given
        held.bind(("127.0.0.1", 0))
        assert is_said(refusal(account, DB_HOST=host, DB_PORT=str(held.getsockname()[1])), words, number)


@pytest.mark.parametrize("end", ["KILL QUERY", "KILL", "power cut"])
def test_a_query_that_is_broken_off_is_told(own: DatabaseServer, beside: ThreadPoolExecutor, end: str) -> None:
    tables = ", ".join(f"page_views AS t{number}" for number in range(9))  # for hours
    user = end.replace(" ", "_")  # one of its own, for a connection that was killed is listed for a while
    query = beside.submit(refusal, own.create_reader(user), f"SELECT SUM(t0.id) FROM {tables}")
    found = f"SELECT id FROM information_schema.processlist WHERE user = '{user}' AND info LIKE 'SELECT SUM%'"
    wait_until(lambda: own.query(found))
    if end == "power cut":
        own.kill()
        own.start()
    else:
        own.query(f"{end} {own.query(found)[0][0]}")
    words, number = ("The database reported an error", 1317) if end == "KILL QUERY" else (CLOSED, 2013)
    assert is_said(query.result(), words, number)


def test_a_server_that_is_silent_for_too_long_is_told(own: DatabaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db_connection, "QUERY_TIMEOUT", 1)
    said = refusal(own.create_reader(), "SELECT SLEEP(60)")
    assert is_said(said, "The database was silent for 600 s: look for locks, and for a missing index", 3024)


class Talker(socketserver.BaseRequestHandler):
    """Says `words` to everybody who comes, and hangs up."""

    words = b""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.sendall(self.words)
            self.request.shutdown(socket.SHUT_WR)
            while self.request.recv(1000):
                pass


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    """Of this machine, where a Talker listens."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Talker) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield str(server.server_address[1])
        server.shutdown()


GREETING = (
    b"\x0a8.0.36\x00\x08\x00\x00\x00salt8888\x00\xff\xf7\xff\x02\x00\xff\xdf\x15" + bytes(10) + b"12bytes.salt\x00x\x00"
)


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.binary(max_size=80).map(lambda body: len(body).to_bytes(3, "little") + b"\x00" + body) | st.binary())
@example(b"")
@example(b"SSH-2.0-OpenSSH_9.2\r\n")
@example(b"HTTP/1.1 400 Bad Request\r\n\r\n")
@example(b"\x05\x00\x00\x00\x0b\x08\x05\x1a\x00")  # what a client is told on MySQL's other port, 33060
@example(len(GREETING).to_bytes(3, "little") + b"\x00" + GREETING)
def test_whatever_a_port_says_is_an_error_of_the_database(port: str, words: bytes) -> None:
    Talker.words = words
    account = {"DB_USER": "me", "DB_PASSWORD": "none of your business", "DB_NAME": DATABASE}
    said = refusal(account, DB_HOST="127.0.0.1", DB_PORT=port)
    assert is_said(said, "The database reported an error") or is_said(said, CLOSED) or "(2" in said
