"""The advice for each error of a database: by phase, and by who reported it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest
import trustme
from hypothesis import example, given, settings
from hypothesis import strategies as st

import db_connection
from db_connection import DatabaseError, read_query
from lab.database import (
    DATABASE,
    QUERIES,
    SETUP,
    DatabaseServer,
    build_connection,
    find_servers,
)
from lab.database_network import FakeServer, ask_for_password, frame, greet

QUERY_2 = read_query(QUERIES, "query_2")
PASSWORD = "none of your business"
SLOW_QUERY = (
    "SELECT SUM(a.id) FROM page_views AS a, page_views AS b, page_views AS c,"
    " page_views AS d, page_views AS e, page_views AS f, page_views AS g"
)


class Certificates:
    """ca.pem, what it issued for servers, and other.pem, a stranger's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
        usual = authority.issue_cert("localhost")
        long_ago = datetime(2020, 1, 1, tzinfo=timezone.utc)
        expired = authority.issue_cert("localhost", not_after=long_ago)
        usual.private_key_and_cert_chain_pem.write_to_path(str(folder / "usual.pem"))
        expired.private_key_and_cert_chain_pem.write_to_path(
            str(folder / "expired.pem")
        )

    def list_options(self, name: str) -> list[str]:
        """The options of a server that has the certificate of this name."""
        return [
            f"--ssl-ca={self.folder / 'ca.pem'}",
            f"--ssl-cert={self.folder / name}",
            f"--ssl-key={self.folder / name}",
        ]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module", params=sorted(find_servers()))
def own_server(
    request: pytest.FixtureRequest, certificates: Certificates
) -> Iterator[DatabaseServer]:
    """A server of each kind, with the sample and with TLS for the name localhost."""
    options = certificates.list_options("usual.pem")
    with DatabaseServer(find_servers()[request.param], *options) as server:
        server.load(SETUP)
        yield server


@pytest.fixture
def reader(own_server: DatabaseServer) -> dict[str, str]:
    """The settings of an account that may read the sample."""
    return own_server.create_reader(password=PASSWORD)


def explain(settings: Mapping[str, str], sql: str = QUERY_2) -> str:
    """What is said of settings or a query that do not work."""
    with (
        pytest.raises(DatabaseError) as caught,
        build_connection(settings) as connection,
    ):
        connection.read_page_views(sql)
    words = str(caught.value)
    assert "\n" not in words
    assert PASSWORD not in words
    return words


def explain_shortly(settings: Mapping[str, str], sql: str = QUERY_2) -> str:
    """The same without the words of server or driver, but with their number."""
    advice, _, details = explain(settings, sql).partition(" (")
    number = details.split(" ")[0].rstrip(":")
    return f"{number}: {advice}"


def address(port: int, host: str = "127.0.0.1") -> dict[str, str]:
    return {
        "DB_HOST": host,
        "DB_PORT": str(port),
        "DB_USER": "me",
        "DB_PASSWORD": PASSWORD,
        "DB_NAME": DATABASE,
    }


# Connecting


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port on which nothing listens, and which is given to no other process."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


NO_SERVER = (
    "No MySQL or MariaDB server answers there: check DB_HOST and DB_PORT, that the"
    " server runs, and whether a proxy or firewall is in between"
)


def test_a_port_without_a_server(free_port: int) -> None:
    assert explain_shortly(address(free_port)) == f"2003: {NO_SERVER}"


def test_a_socket_without_a_server() -> None:
    settings = address(3306, host="/nowhere/socket")

    assert explain_shortly(settings) == f"2002: {NO_SERVER}"


def test_an_unknown_host_name() -> None:
    words = explain(address(3306, host="database.invalid"))

    assert words.startswith(
        "The host name is not known: check DB_HOST, and this computer's DNS ("
    )


def test_an_impossible_host_name() -> None:
    words = explain(address(3306, host="..example.com"))

    assert words.startswith(NO_SERVER)


NO_ANSWER_IN_TIME = (
    "No database answers within 0.2 s: check DB_HOST and DB_PORT, whether a firewall"
    " is in between, and whether the server hangs"
)


@pytest.mark.parametrize(
    "words", [[b""], [greet()]], ids=["before its greeting", "after it"]
)
def test_a_port_that_says_nothing(
    words: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db_connection, "CONNECT_TIMEOUT", 0.2)

    with FakeServer(words, stays=True) as server:
        explanation = explain(address(server.port))

    assert explanation == NO_ANSWER_IN_TIME


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue of connections is full, so it acknowledges none."""
    monkeypatch.setattr(db_connection, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
            explanation = explain(address(port))

    assert explanation == NO_ANSWER_IN_TIME


def test_a_port_that_hangs_up() -> None:
    with FakeServer([]) as server:
        explanation = explain_shortly(address(server.port))

    assert explanation == f"2013: {NO_SERVER}"


GREETING_OF_33060 = b"\x05\x00\x00\x00\x0b\x08\x05\x1a\x00"  # MySQL's other port


@pytest.mark.parametrize("words", [frame(0, b"Hello"), GREETING_OF_33060])
def test_a_server_of_another_kind(words: bytes) -> None:
    with FakeServer([words]) as server:
        explanation = explain(address(server.port))

    assert explanation.startswith(NO_SERVER)


ACCEPTED = frame(2, b"\0\0\0\2\0\0\0")
any_packet = st.binary(max_size=80).map(lambda payload: frame(0, payload))
usual_packet = st.sampled_from([greet(), ask_for_password(), ACCEPTED])


@settings(deadline=None, max_examples=200)
@given(words=st.lists(st.binary() | any_packet | usual_packet, max_size=5))
@example(words=[frame(0, b"")])
@example(words=[frame(0, b"\x0a8.0\0")])
@example(words=[frame(0, b"\x0a\xff\0" + bytes(50))])
@example(words=[greet("x")])
@example(words=[greet(), ACCEPTED, ACCEPTED, b"x"])
def test_whatever_a_port_says_is_an_error_of_the_database(words: list[bytes]) -> None:
    with FakeServer([b"".join(words)]) as server:
        explain(address(server.port))


LIMIT = (
    "A limit of the database is reached: try again later, or raise max_connections,"
    " max_user_connections or the limits of the account"
)


def test_a_server_without_a_connection_left(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    with (
        own_server.global_variables(max_connections="10"),
        contextlib.ExitStack() as stack,
    ):
        for _ in range(11):
            with contextlib.suppress(DatabaseError):
                stack.enter_context(build_connection(reader))
        explanation = explain_shortly(reader)

    assert explanation == f"1040: {LIMIT}"


def test_a_computer_without_an_account(own_server: DatabaseServer) -> None:
    accounts = own_server.query("SELECT user FROM mysql.user WHERE host = '127.0.0.1'")
    for (user,) in accounts:
        own_server.query(f"DROP USER '{user}'@'127.0.0.1'")

    assert explain_shortly(address(own_server.port)) == (
        "1130: The database takes no connection from this computer: CREATE USER for"
        " this computer's address"
    )


def test_a_computer_that_is_blocked() -> None:
    """A server that knows no host names blocks none, so this one is not real."""
    refusal = frame(0, b"\xff\x69\x04Host 'x' is blocked because of many errors")

    with FakeServer([refusal]) as server:
        explanation = explain_shortly(address(server.port))

    assert explanation == (
        "1129: The database has blocked this computer after failed connections: run"
        " mysqladmin flush-hosts"
    )


# TLS


def explain_tls(server: DatabaseServer, host: str, ca_file: Path) -> str:
    settings = server.create_reader(password=PASSWORD)
    explanation = explain({**settings, "DB_HOST": host, "DB_SSL_CA": str(ca_file)})
    return explanation.split(" (")[0]


def test_a_verified_connection_is_encrypted(
    own_server: DatabaseServer, certificates: Certificates
) -> None:
    settings = {
        **own_server.create_reader(),
        "DB_HOST": "localhost",
        "DB_SSL_CA": str(certificates.folder / "ca.pem"),
    }
    own_server.query("ALTER USER reader@127.0.0.1 REQUIRE SSL")

    with build_connection(settings) as connection:
        [row] = connection.execute_query("SHOW STATUS LIKE 'Ssl_cipher'")

    assert row["Value"]


def test_a_certificate_for_another_name(
    own_server: DatabaseServer, certificates: Certificates
) -> None:
    ca_file = certificates.folder / "ca.pem"

    assert explain_tls(own_server, "127.0.0.1", ca_file) == (
        "The server's certificate is for another name: set DB_HOST to a name that it"
        " has, or issue it for this one"
    )


def test_a_certificate_of_another_authority(
    own_server: DatabaseServer, certificates: Certificates
) -> None:
    ca_file = certificates.folder / "other.pem"

    assert explain_tls(own_server, "localhost", ca_file) == (
        "The server's certificate is not trusted: put the certificate of the authority"
        " that issued it into DB_SSL_CA"
    )


def test_an_expired_certificate(certificates: Certificates) -> None:
    program = next(iter(find_servers().values()))
    options = certificates.list_options("expired.pem")
    with DatabaseServer(program, *options) as server:
        explanation = explain_tls(server, "localhost", certificates.folder / "ca.pem")

    assert explanation == "The server's certificate has expired: renew it"


def test_a_server_without_tls(certificates: Certificates) -> None:
    with FakeServer([greet()]) as server:
        settings = address(server.port)
        settings["DB_SSL_CA"] = str(certificates.folder / "ca.pem")
        explanation = explain_shortly(settings)

    assert explanation == (
        "2026: DB_SSL_CA is set, but the database server offers no TLS: set TLS up on"
        " the server"
    )


@pytest.mark.parametrize("ca_file", [__file__, "/nowhere/ca.pem"])
def test_a_file_without_certificates(own_server: DatabaseServer, ca_file: str) -> None:
    assert explain_tls(own_server, "localhost", Path(ca_file)) == (
        "The encrypted connection failed: check that DB_SSL_CA is a readable"
        " file of certificates in PEM, and the server's TLS versions"
    )


# Logging in

REFUSED = (
    "1045: The database refused the login: check DB_USER and DB_PASSWORD, whether the"
    " account is for this computer's address, and whether it REQUIREs TLS or a"
    " certificate"
)


def test_a_wrong_password(reader: dict[str, str]) -> None:
    assert explain_shortly({**reader, "DB_PASSWORD": "wrong"}) == REFUSED


def test_an_account_that_needs_a_certificate(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    own_server.query("ALTER USER reader@127.0.0.1 REQUIRE X509")

    assert explain_shortly(reader) == REFUSED


def test_an_account_for_another_host(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    own_server.query(f"CREATE USER far@192.0.2.1 IDENTIFIED BY '{PASSWORD}'")

    explanation = explain_shortly({**reader, "DB_USER": "far"})

    own_server.query("DROP USER far@192.0.2.1")
    assert explanation == REFUSED


def test_a_locked_account(own_server: DatabaseServer, reader: dict[str, str]) -> None:
    own_server.query("ALTER USER reader@127.0.0.1 ACCOUNT LOCK")

    number = {"mariadb": 4151, "mysql": 3118}[own_server.kind]
    assert explain_shortly(reader) == (
        f"{number}: The account DB_USER is locked: ALTER USER ... ACCOUNT UNLOCK"
    )


def test_an_expired_password(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    own_server.query("ALTER USER reader@127.0.0.1 PASSWORD EXPIRE")

    number = {"mariadb": 1820, "mysql": 1862}[own_server.kind]
    assert explain_shortly(reader) == (
        f"{number}: The password of DB_USER has expired: set a new one with ALTER USER"
    )


def test_an_account_with_a_used_up_quota(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    own_server.query("ALTER USER reader@127.0.0.1 WITH MAX_QUERIES_PER_HOUR 1")

    assert explain_shortly(reader) == f"1226: {LIMIT}"


def test_an_account_of_the_operating_system(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    if own_server.kind != "mariadb":
        pytest.skip("the MySQL for tests has not this login method")
    own_server.query("ALTER USER reader@127.0.0.1 IDENTIFIED VIA unix_socket")

    assert explain_shortly(reader) == (
        "1698: The database refused the login: DB_USER is for an operating system"
        " account only, so create one with a password"
    )


def test_an_init_connect_that_fails(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    with own_server.global_variables(init_connect="'SELECT nonsense'"):
        explanation = explain(reader)

    assert explanation.startswith("The database refused the login (1184 ")
    assert "init_connect command failed" in explanation


def test_a_server_that_hangs_up_during_the_login() -> None:
    with FakeServer([greet()]) as server:
        explanation = explain_shortly(address(server.port))

    assert explanation == (
        "2013: The login broke off: see the log of the database server"
    )


def test_a_refusal_that_is_not_known() -> None:
    refusal = frame(2, b"\xff\x0f\x27#HY000Not\n  today")

    with FakeServer([greet(), refusal]) as server:
        explanation = explain(address(server.port))

    assert explanation == "The database refused the login (9999 (HY000): Not today)"


def test_a_database_that_is_not_there(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    own_server.query("GRANT SELECT ON *.* TO reader@127.0.0.1")

    assert explain_shortly({**reader, "DB_NAME": "nowhere"}) == (
        "1049: There is no such database: check DB_NAME, or load database_setup.sql"
    )


NOT_ALLOWED = (
    "DB_USER may not read the database, table or column: check DB_NAME, or GRANT SELECT"
    " on it to the user"
)


def test_a_database_without_rights(reader: dict[str, str]) -> None:
    settings = {**reader, "DB_NAME": "mysql"}

    assert explain_shortly(settings) == f"1044: {NOT_ALLOWED}"


# The query


def change_tables(server: DatabaseServer, name: str, *changes: str) -> dict[str, str]:
    """The settings of a database with both tables, after these changes in SQL."""
    server.query(f"DROP DATABASE IF EXISTS {name}", database="")
    server.query(f"CREATE DATABASE {name}", database="")
    for table in ("customers", "page_views"):
        server.query(f"CREATE TABLE {table} LIKE {DATABASE}.{table}", database=name)
    for change in changes:
        server.query(change, database=name)
    return server.create_reader(user=name, password=PASSWORD, database=name)


def test_a_missing_table(own_server: DatabaseServer) -> None:
    settings = change_tables(own_server, "no_table", "DROP TABLE page_views")

    assert explain_shortly(settings) == (
        "1146: A table or column is missing: check DB_NAME, and compare the tables with"
        " database_setup.sql"
    )


def test_a_table_that_may_not_be_read(own_server: DatabaseServer) -> None:
    settings = own_server.create_reader(right="INSERT")

    assert explain_shortly(settings) == f"1142: {NOT_ALLOWED}"


def test_a_column_that_may_not_be_read(own_server: DatabaseServer) -> None:
    settings = own_server.create_reader(right="INSERT")
    own_server.query(f"GRANT SELECT (id) ON {DATABASE}.customers TO reader@127.0.0.1")
    own_server.query(f"GRANT SELECT ON {DATABASE}.page_views TO reader@127.0.0.1")

    assert explain_shortly(settings) == f"1143: {NOT_ALLOWED}"


BROKEN_VIEW = (
    "A view is broken, or the account that defined it is gone: create the view again"
)


def test_a_view_whose_definer_is_gone(own_server: DatabaseServer) -> None:
    settings = change_tables(
        own_server,
        "no_definer",
        "RENAME TABLE page_views TO hidden",
        "CREATE USER leaver@localhost",
        "GRANT SELECT ON *.* TO leaver@localhost",
        "CREATE DEFINER = leaver@localhost VIEW page_views AS SELECT * FROM hidden",
        "DROP USER leaver@localhost",
    )

    assert explain_shortly(settings) == f"1045: {BROKEN_VIEW}"


def test_a_view_of_a_table_that_is_gone(own_server: DatabaseServer) -> None:
    settings = change_tables(
        own_server,
        "no_base",
        "RENAME TABLE page_views TO hidden",
        "CREATE VIEW page_views AS SELECT * FROM hidden",
        "DROP TABLE hidden",
    )

    assert explain_shortly(settings) == f"1356: {BROKEN_VIEW}"


def test_an_unknown_error_of_the_server(reader: dict[str, str]) -> None:
    words = explain(reader, "SELECT (SELECT id FROM customers)")

    assert words.startswith("The database refused the query (1242 (21000): ")


def test_a_time_limit_of_the_server(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    limits = {
        "mariadb": (1969, "max_statement_time", "0.2"),
        "mysql": (3024, "max_execution_time", "200"),
    }
    number, variable, value = limits[own_server.kind]

    with own_server.global_variables(**{variable: value}):
        explanation = explain_shortly(reader, SLOW_QUERY)

    assert explanation == (
        f"{number}: The database ended the query at its own time limit: look for a"
        " missing index, or raise max_execution_time of MySQL, or max_statement_time of"
        " MariaDB"
    )


def test_a_query_without_an_answer(
    reader: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db_connection, "QUERY_TIMEOUT", 1)

    assert explain(reader, "SELECT SLEEP(60)") == (
        "The database was silent for 1 s: look for locks, and for a missing index"
    )


def explain_interrupted(
    server: DatabaseServer, user: str, interrupt: Callable[[int], None]
) -> str:
    """What is said of a query that is interrupted, given its connection's number."""
    reader = server.create_reader(user, password=PASSWORD)
    running = (
        "SELECT id FROM information_schema.processlist"
        f" WHERE user = '{user}' AND info LIKE 'SELECT SUM%'"
    )
    with ThreadPoolExecutor(1) as threads:
        explanation = threads.submit(explain_shortly, reader, SLOW_QUERY)
        end = time.monotonic() + 30
        while not (found := server.query(running)):
            assert time.monotonic() < end
            time.sleep(0.01)
        interrupt(found[0][0])
        return explanation.result()


def test_a_query_that_is_cancelled(own_server: DatabaseServer) -> None:
    def cancel(number: int) -> None:
        own_server.query(f"KILL QUERY {number}")

    assert explain_interrupted(own_server, "cancelled", cancel) == (
        "1317: The database cannot do it at this time: try again later"
    )


BROKEN_CONNECTION = "2013: The database connection broke: check that the server runs"


def test_a_connection_that_is_ended(own_server: DatabaseServer) -> None:
    def end(number: int) -> None:
        own_server.query(f"KILL {number}")

    assert explain_interrupted(own_server, "ended", end) == BROKEN_CONNECTION


def test_a_server_that_dies(own_server: DatabaseServer) -> None:
    def restart(_: int) -> None:
        own_server.kill()
        own_server.start()

    assert explain_interrupted(own_server, "bereft", restart) == BROKEN_CONNECTION
