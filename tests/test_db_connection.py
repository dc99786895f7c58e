"""The rows, the session and the login, on each kind of server that the machine has."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import db_connection
from db_connection import (
    DatabaseError,
    PageViewRow,
    QueryFileError,
    Value,
    read_query,
)
from lab.database import (
    DATABASE,
    QUERIES,
    SETUP,
    DatabaseServer,
    build_connection,
    find_servers,
)
from lab.database_network import (
    FakeServer,
    RecordingProxy,
    ask_for_method,
    ask_for_password,
    greet,
)
from lab.process import StartMain
from lab.standin_handle import StandIn

QUERY_2 = read_query(QUERIES, "query_2")
CHECK_COLUMNS = read_query(QUERIES, "columns")
CUSTOMERS_BY_ID = read_query(QUERIES, "customers_by_id")
NAME_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module", params=sorted(find_servers()))
def own_server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server of each kind with the sample, which a test may change as it likes."""
    with DatabaseServer(find_servers()[request.param]) as server:
        server.load(SETUP)
        yield server


@pytest.fixture
def reader(own_server: DatabaseServer) -> dict[str, str]:
    """The settings of an account that may read the sample."""
    return own_server.create_reader()


def read_rows(settings: Mapping[str, str], sql: str = QUERY_2) -> list[PageViewRow]:
    with build_connection(settings) as connection:
        return connection.read_page_views(sql)


def query_one(settings: Mapping[str, str], sql: str) -> dict[str, Any]:
    with build_connection(settings) as connection:
        [row] = connection.execute_query(sql)
    return row


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


TYPES = {
    "customers.id": "BIGINT",
    "customers.first_name": "VARCHAR(255)",
    "customers.email": "VARCHAR(255)",
    "customers.plan_type": "VARCHAR(50)",
    "page_views.id": "BIGINT",
    "page_views.user_id": "BIGINT",
    "page_views.page": "VARCHAR(100)",
    "page_views.browser": "VARCHAR(255)",
    "page_views.location": "VARCHAR(255)",
    "page_views.event_time": "DATETIME",
}


def create_tables(server: DatabaseServer, types: Mapping[str, str]) -> str:
    """Create a database whose columns have these types, and return its name."""
    name = f"types_{next(NAME_NUMBERS)}"
    server.query(
        f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci",
        database="",
    )
    for table in ("customers", "page_views"):
        columns = []
        for column, usual in TYPES.items():
            of_table, column_name = column.split(".")
            if of_table == table:
                columns.append(f"{column_name} {types.get(column, usual)}")
        server.query(f"CREATE TABLE {table} ({', '.join(columns)})", database=name)
    return name


def insert_one(server: DatabaseServer, database: str, customer: str, view: str) -> None:
    """Insert a customer and a page view of today, in SQL."""
    server.query(f"INSERT INTO customers VALUES ({customer})", database=database)
    server.query(f"INSERT INTO page_views VALUES ({view}, NOW())", database=database)


# Rows


def test_the_rows_are_those_of_query_2(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    rows = read_rows(reader)

    expected = own_server.query(QUERY_2)
    assert rows == [(*row[:8], str(row[8])) for row in expected]
    assert rows[0].first_name == "Sarah"
    assert rows[0].event_time is not None
    assert rows[0].event_time.endswith(" 14:30:45")


def test_a_query_with_other_columns_is_refused(reader: dict[str, str]) -> None:
    columns = "first_name, user_id, email, plan_type, view_id, page, browser, location"
    sql = f"SELECT {columns}, event_time FROM ({QUERY_2}) AS query_2"

    with pytest.raises(QueryFileError) as caught:
        read_rows(reader, sql)

    assert str(caught.value) == (
        "The query query_2 must return user_id, first_name, email, plan_type, view_id,"
        " page, browser, location, event_time: phase2_queries.sql and db_connection.py"
        " must agree"
    )


def test_values_are_read_as_the_server_writes_them(reader: dict[str, str]) -> None:
    sql = """
    SELECT
        -5 AS user_id,
        '007' AS first_name,
        NULL AS email,
        'Zoë 😀' AS plan_type,
        1.50 AS view_id,
        CAST('2026-01-13' AS DATE) AS page,
        CAST('Zoë' AS BINARY) AS browser,
        X'4AE9' AS location,
        CAST('2026-01-13 14:30:45.5' AS DATETIME(3)) AS event_time
    """

    rows = read_rows(reader, sql)

    expected = PageViewRow(
        user_id=-5,
        first_name="007",
        email=None,
        plan_type="Zoë 😀",
        view_id="1.50",
        page="2026-01-13",
        browser="Zoë",
        location="J\udce9",
        event_time="2026-01-13 14:30:45.500",
    )
    assert rows == [expected]


def test_many_rows_take_little_memory(reader: dict[str, str]) -> None:
    """The packets of 20 000 rows would take 10 MB more, a text for each row 4 MB."""
    sql = """
    SELECT
        customers.id + 0 AS user_id, first_name, email, plan_type,
        a.id AS view_id, a.page, a.browser, a.location, a.event_time
    FROM customers, page_views AS a, page_views AS b
    LIMIT 20000
    """
    with build_connection(reader) as connection:
        tracemalloc.start()
        rows = connection.read_page_views(sql)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert len(rows) == 20_000
    assert peak < 9_000_000


def test_a_unix_socket_may_be_the_host(own_server: DatabaseServer) -> None:
    settings = {**own_server.settings("root", ""), "DB_HOST": own_server.socket}

    rows = read_rows(settings)

    assert len(rows) == 3


def test_a_unix_socket_needs_no_tls(own_server: DatabaseServer) -> None:
    settings = {**own_server.settings("root", ""), "DB_HOST": own_server.socket}

    rows = read_rows({**settings, "DB_SSL_CA": "/nowhere/ca.pem"})

    assert len(rows) == 3


def test_a_fault_of_the_program_is_no_error_of_the_database(
    reader: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(db_connection, "_parse_rows", fail)

    with pytest.raises(ValueError, match="a fault"):
        read_rows(reader)


def test_nothing_of_this_computer_is_sent(
    reader: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connector would fail at a long host name, or when lsb_release fails."""
    monkeypatch.setattr("socket.gethostname", lambda: "x" * 250)

    rows = read_rows(reader)

    assert len(rows) == 3


# Queries from the file


@pytest.fixture
def query_file(tmp_path: Path) -> Path:
    path = tmp_path / "queries.sql"
    path.write_text(
        "-- name: one\nSELECT ';'\nFROM ü;\n\n"
        "-- name: two\n-- a comment\nSELECT 2;\n"
        "-- name: open\nSELECT"
    )
    return path


def test_a_query_ends_at_its_semicolon(query_file: Path) -> None:
    assert read_query(query_file, "one") == "SELECT ';'\nFROM ü"
    assert read_query(query_file, "two") == "-- a comment\nSELECT 2"


@pytest.mark.parametrize("name", ["on", "three", "open"])
def test_a_query_that_is_not_there(query_file: Path, name: str) -> None:
    with pytest.raises(QueryFileError) as caught:
        read_query(query_file, name)

    assert str(caught.value) == (
        f"{query_file} has no query '-- name: {name}':"
        " restore it from the program's repository"
    )


def test_a_query_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "queries.sql"

    with pytest.raises(QueryFileError) as caught:
        read_query(path, "one")

    assert str(caught.value) == (
        f"{path} cannot be read (No such file or directory):"
        " restore it from the program's repository"
    )


# The session


def test_the_session_is_read_only(own_server: DatabaseServer) -> None:
    writer = own_server.create_reader(user="writer", right="ALL")

    with (
        build_connection(writer) as connection,
        pytest.raises(DatabaseError, match="1792"),
    ):
        connection.execute_query("UPDATE customers SET plan_type = 'free'")


def test_the_session_is_in_utc_and_utf8(reader: dict[str, str]) -> None:
    row = query_one(
        reader,
        "SELECT @@time_zone AS zone, @@collation_connection AS collation,"
        " DATABASE() AS name, 'ü😀' AS text",
    )

    assert row == {
        "zone": "+00:00",
        "collation": "utf8mb4_unicode_ci",
        "name": DATABASE,
        "text": "ü😀",
    }


@pytest.fixture(scope="module")
def sensitive(own_server: DatabaseServer) -> dict[str, str]:
    """The settings for tables on whose rows many defaults of a server have a say."""
    name = create_tables(
        own_server,
        {
            "customers.id": "VARCHAR(200)",
            "customers.plan_type": "CHAR(10)",
            "page_views.user_id": "VARCHAR(200)",
            "page_views.event_time": "TIMESTAMP NULL",
        },
    )
    if own_server.kind == "mariadb":
        own_server.query("ALTER TABLE customers ADD SYSTEM VERSIONING", database=name)
    same_for_all = "x" * 100
    for number in range(1, 7):
        user_id = f"{same_for_all}{number % 3}"
        insert_view = (
            f"INSERT INTO page_views VALUES ({number}, '{user_id}', 'pricing', 'Zoë',"
            f" NULL, UTC_DATE() - INTERVAL {number} HOUR)"
        )
        own_server.query(insert_view, database=name)
    for number in range(3):
        insert_customer = (
            "INSERT INTO customers VALUES"
            f" ('{same_for_all}{number}', 'Zoë', 'user{number}@example.com', 'pro')"
        )
        own_server.query(insert_customer, database=name)
    return own_server.create_reader(user=name, database=name)


OTHER_DEFAULTS = [
    ("sql_mode", "'PAD_CHAR_TO_FULL_LENGTH'"),
    ("sql_mode", "'ANSI,PIPES_AS_CONCAT,HIGH_NOT_PRECEDENCE,NO_BACKSLASH_ESCAPES'"),
    ("time_zone", "'+13:00'"),
    ("sql_select_limit", "1"),
    ("max_join_size", "1"),
    ("max_sort_length", "4"),
    ("autocommit", "0"),
    ("completion_type", "'RELEASE'"),
    ("init_connect", "'SET NAMES latin1'"),
    ("init_connect", "'SET character_set_results = latin1'"),
    ("init_connect", "'SET timestamp = UNIX_TIMESTAMP() + 864000'"),
    ("init_connect", "'SET sql_select_limit = 1'"),
    ("init_connect", "'USE information_schema'"),
    ("system_versioning_asof", "'2020-01-01 00:00:00'"),
]


@pytest.mark.parametrize(("variable", "value"), OTHER_DEFAULTS)
def test_no_default_of_the_server_changes_the_rows(
    own_server: DatabaseServer, sensitive: dict[str, str], variable: str, value: str
) -> None:
    if variable == "system_versioning_asof" and own_server.kind != "mariadb":
        pytest.skip("a variable of MariaDB alone")
    usual_rows = read_rows(sensitive)
    assert len(usual_rows) == 3

    with own_server.global_variables(**{variable: value}):
        rows = read_rows(sensitive)

    assert rows == usual_rows


def test_uncommitted_rows_are_not_read(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    isolation = (
        "tx_isolation" if own_server.kind == "mariadb" else ("transaction_isolation")
    )
    with (
        own_server.global_variables(**{isolation: "'READ-UNCOMMITTED'"}),
        own_server.connect(DATABASE, autocommit=False) as writing,
        writing.cursor() as cursor,
    ):
        cursor.execute("UPDATE customers SET plan_type = 'pro'")
        rows = read_rows(reader)

    assert len(rows) == 3


def test_an_idle_connection_stays_open(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    with own_server.global_variables(wait_timeout="1"):
        row = query_one(reader, "SELECT @@wait_timeout AS seconds")

    assert row == {"seconds": 28800}


# The version


def test_the_version_is_known(
    own_server: DatabaseServer, reader: dict[str, str]
) -> None:
    with build_connection(reader) as connection:
        version = connection.version

    name = {"mariadb": "MariaDB", "mysql": "MySQL"}[own_server.kind]
    assert version == f"{name} {own_server.version}"


@pytest.fixture
def server_of_version() -> Iterator[Callable[[str], DatabaseServer]]:
    """`server_of_version("5.7.44-log")`: a MariaDB that says it is of that version."""
    if "mariadb" not in find_servers():
        pytest.skip("only a MariaDB can be given another version")
    started = []

    def start(version: str) -> DatabaseServer:
        server = DatabaseServer(find_servers()["mariadb"], f"--version={version}")
        server.__enter__()
        started.append(server)
        server.query(f"CREATE DATABASE {DATABASE}", database="")
        return server

    yield start
    for server in started:
        server.__exit__()


@pytest.mark.parametrize(
    ("kind", "version"), [("MySQL", "5.7.44-log"), ("MariaDB", "10.1.48-MariaDB")]
)
def test_a_server_that_is_too_old(
    server_of_version: Callable[[str], DatabaseServer], kind: str, version: str
) -> None:
    server = server_of_version(version)
    connection = build_connection(server.create_reader(user="watched"))

    with pytest.raises(DatabaseError) as caught:
        connection.__enter__()

    assert str(caught.value) == (
        f"{kind} {version} is too old: the query needs MySQL 8.0 or MariaDB 10.2, or"
        " later"
    )
    wait_until(lambda: not list_connections(server, "watched"))


@pytest.mark.parametrize(
    ("version", "known_as"),
    [("8.0.0-edge", "MySQL 8.0.0"), ("10.2.0-MariaDB", "MariaDB 10.2.0")],
)
def test_the_oldest_usable_versions(
    server_of_version: Callable[[str], DatabaseServer], version: str, known_as: str
) -> None:
    server = server_of_version(version)

    with build_connection(server.create_reader()) as connection:
        assert connection.version == known_as


def list_connections(server: DatabaseServer, user: str) -> list[Any]:
    sql = f"SELECT id FROM information_schema.processlist WHERE user = '{user}'"
    return server.query(sql)


def test_it_is_closed_before_the_first_call(
    own_server: DatabaseServer, start_main: StartMain, standin: StandIn
) -> None:
    standin.fault("silence")

    start_main(database=own_server.create_reader(user="watched"))
    standin.wait_for_calls(1)

    wait_until(lambda: not list_connections(own_server, "watched"))


# Types of columns


def check_columns(server: DatabaseServer, types: Mapping[str, str]) -> None:
    name = create_tables(server, types)
    with build_connection(server.create_reader(user=name, database=name)) as connection:
        connection.check_columns(CHECK_COLUMNS)


def explain_columns(server: DatabaseServer, types: Mapping[str, str]) -> str:
    """What is said of columns that cannot be used, without the cure."""
    with pytest.raises(DatabaseError) as caught:
        check_columns(server, types)
    words, cure = str(caught.value).split(". ")
    assert cure == (
        "Change them, or put a view that converts them in the place of the table"
    )
    return words.removeprefix("Columns cannot be used: ")


def test_the_sample_has_usable_columns(reader: dict[str, str]) -> None:
    with build_connection(reader) as connection:
        connection.check_columns(CHECK_COLUMNS)


USABLE_TYPES: list[dict[str, str]] = [
    {"customers.plan_type": "CHAR(10)", "page_views.page": "CHAR(10)"},
    {"customers.plan_type": "TEXT", "page_views.page": "LONGTEXT"},
    {"customers.plan_type": "SET('pro')", "page_views.page": "SET('pricing')"},
    {"customers.plan_type": "ENUM('pro')", "page_views.page": "ENUM('pricing')"},
    {"page_views.event_time": "DATETIME(3)"},
    {"page_views.event_time": "TIMESTAMP NULL"},
    {"customers.id": "INT UNSIGNED", "page_views.user_id": "SMALLINT"},
    {"customers.id": "CHAR(36)", "page_views.user_id": "VARCHAR(36)"},
    {"customers.id": "DECIMAL(20)", "page_views.user_id": "BIGINT"},
    {"page_views.id": "CHAR(36)"},
    {"customers.email": "VARBINARY(255)", "customers.first_name": "BLOB"},
    {"page_views.browser": "INT", "page_views.location": "DECIMAL(5, 2)"},
]


@pytest.mark.parametrize("types", USABLE_TYPES)
def test_usable_types(own_server: DatabaseServer, types: dict[str, str]) -> None:
    check_columns(own_server, types)


TEXT = "and must be text"
TIME = "and must be a date with a time (DATETIME or TIMESTAMP)"
IDENTIFIER = "and must be a whole number or text"


@pytest.mark.parametrize(
    ("column", "sql_type", "words"),
    [
        ("customers.plan_type", "INT", f"is a whole number {TEXT}"),
        ("customers.plan_type", "TINYINT(1)", f"is a whole number {TEXT}"),
        ("customers.plan_type", "DOUBLE", f"is DOUBLE {TEXT}"),
        ("customers.plan_type", "VARBINARY(50)", f"is binary data {TEXT}"),
        ("page_views.page", "BIT(3)", f"is BIT {TEXT}"),
        ("page_views.page", "BLOB", f"is binary data {TEXT}"),
        ("page_views.event_time", "DATE", f"is DATE {TIME}"),
        ("page_views.event_time", "TIME", f"is TIME {TIME}"),
        ("page_views.event_time", "YEAR", f"is YEAR {TIME}"),
        ("page_views.event_time", "VARCHAR(30)", f"is text {TIME}"),
        ("page_views.event_time", "BIGINT", f"is a whole number {TIME}"),
        ("page_views.id", "BINARY(16)", f"is binary data {IDENTIFIER}"),
        ("page_views.id", "DATETIME", f"is DATETIME {IDENTIFIER}"),
        ("customers.id", "FLOAT", f"is FLOAT {IDENTIFIER}"),
        (
            "page_views.location",
            "POINT",
            "is GEOMETRY and must be text, a number or a date",
        ),
    ],
)
def test_unusable_types(
    own_server: DatabaseServer, column: str, sql_type: str, words: str
) -> None:
    explanation = explain_columns(own_server, {column: sql_type})

    assert explanation == f"{column} {words}"


def test_all_unusable_columns_are_listed(own_server: DatabaseServer) -> None:
    explanation = explain_columns(
        own_server,
        {
            "customers.plan_type": "INT",
            "page_views.event_time": "VARCHAR(30)",
            "page_views.user_id": "CHAR(36)",
        },
    )

    assert explanation == (
        f"customers.plan_type is a whole number {TEXT};"
        f" page_views.event_time is text {TIME};"
        " page_views.user_id is text, but customers.id is a whole number: both must be"
        " numbers, or both text"
    )


def test_ids_of_different_types(own_server: DatabaseServer) -> None:
    """A server finds '12abc' = 12 true."""
    explanation = explain_columns(own_server, {"page_views.user_id": "VARCHAR(36)"})

    assert explanation == (
        "page_views.user_id is text, but customers.id is a whole number: both must be"
        " numbers, or both text"
    )


def test_ids_of_different_collations(own_server: DatabaseServer) -> None:
    types = {
        "customers.id": "VARCHAR(36) COLLATE utf8mb4_general_ci",
        "page_views.user_id": "VARCHAR(36) COLLATE utf8mb4_unicode_ci",
    }

    with pytest.raises(DatabaseError) as caught:
        check_columns(own_server, types)

    assert str(caught.value).startswith(
        "Two columns that are compared have different collations: give"
        " page_views.user_id that of customers.id (1267 "
    )


@pytest.fixture
def create_views(own_server: DatabaseServer) -> Callable[[str], dict[str, str]]:
    """`create_views(plan)`: settings for views of tables that may not be read.

    In the table, plan_type is a whole number; in the view it is the SQL `plan`.
    """

    def create(plan: str) -> dict[str, str]:
        tables = create_tables(own_server, {"customers.plan_type": "INT"})
        views = f"{tables}_views"
        own_server.query(f"CREATE DATABASE {views}", database="")
        own_server.query(
            "CREATE VIEW customers AS"
            f" SELECT id, first_name, email, {plan} AS plan_type"
            f" FROM {tables}.customers",
            database=views,
        )
        own_server.query(
            f"CREATE VIEW page_views AS SELECT * FROM {tables}.page_views",
            database=views,
        )
        return own_server.create_reader(user=views, database=views)

    return create


def test_a_view_may_convert_a_column(
    create_views: Callable[[str], dict[str, str]],
) -> None:
    settings = create_views("IF(plan_type = 1, 'pro', 'free')")

    with build_connection(settings) as connection:
        connection.check_columns(CHECK_COLUMNS)


def test_types_are_seen_through_a_view(
    create_views: Callable[[str], dict[str, str]],
) -> None:
    settings = create_views("plan_type")

    with (
        build_connection(settings) as connection,
        pytest.raises(DatabaseError, match="plan_type is a whole number"),
    ):
        connection.check_columns(CHECK_COLUMNS)


def test_a_missing_column_is_named(
    own_server: DatabaseServer,
) -> None:
    name = create_tables(own_server, {})
    own_server.query("ALTER TABLE page_views DROP COLUMN browser", database=name)
    settings = own_server.create_reader(user=name, database=name)

    with (
        build_connection(settings) as connection,
        pytest.raises(DatabaseError) as caught,
    ):
        connection.check_columns(CHECK_COLUMNS)

    words = str(caught.value)
    assert words.startswith(
        "A table or column is missing: check DB_NAME, and compare the tables with"
        " database_setup.sql (1054"
    )
    assert "'page_views.browser'" in words


def test_a_damaged_query_for_columns(reader: dict[str, str]) -> None:
    with (
        build_connection(reader) as connection,
        pytest.raises(QueryFileError, match="The query columns must return cust"),
    ):
        connection.check_columns("SELECT id FROM customers")


def test_json_text_is_read_without_quotes(own_server: DatabaseServer) -> None:
    if own_server.kind != "mysql":
        pytest.skip("MariaDB stores JSON as text")
    columns = ("customers.plan_type", "page_views.page", "page_views.location")
    name = create_tables(own_server, dict.fromkeys(columns, "JSON"))
    customer = """1, 'Ann', NULL, '"pro"'"""
    view = """2, 1, '"pricing"', NULL, '{"city": "Berlin"}'"""
    insert_one(own_server, name, customer=customer, view=view)
    settings = own_server.create_reader(user=name, database=name)

    with build_connection(settings) as connection:
        connection.check_columns(CHECK_COLUMNS)
        [row] = connection.read_page_views(QUERY_2)

    assert row[:8] == (1, "Ann", None, "pro", 2, "pricing", None, '{"city": "Berlin"}')


# Customers by id


def find_customers(
    settings: Mapping[str, str], ids: Iterable[int | str]
) -> dict[str, Value]:
    with build_connection(settings) as connection:
        return connection.find_customers(CUSTOMERS_BY_ID, ids)


def test_customers_are_found_by_number(reader: dict[str, str]) -> None:
    found = find_customers(reader, [2, 7, 1000])

    assert found == {"2": "sarah.johnson@email.com", "7": "olivia.brown@email.com"}


def test_numbers_may_be_given_as_text(reader: dict[str, str]) -> None:
    found = find_customers(reader, ["2", "7x", "-1", "", "12.5", "\udcff"])

    assert found == {"2": "sarah.johnson@email.com"}


def test_no_ids_find_no_customers(reader: dict[str, str]) -> None:
    assert find_customers(reader, []) == {}


def test_more_ids_than_a_statement_takes(
    reader: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db_connection, "IDS_AT_ONCE", 4)

    found = find_customers(reader, range(1, 100))

    assert len(found) == 15


def test_ids_of_text_are_compared_as_text(own_server: DatabaseServer) -> None:
    name = create_tables(own_server, {"customers.id": "VARCHAR(36)"})
    insert = (
        "INSERT INTO customers VALUES"
        " ('12abc', 'Ann', 'ann@example.com', 'pro'),"
        " ('7', 'Bob', NULL, 'pro'),"
        " ('O''Neill%s', 'Cid', 'cid@example.com', 'free')"
    )
    own_server.query(insert, database=name)
    settings = own_server.create_reader(user=name, database=name)

    found = find_customers(settings, [12, 7, "O'Neill%s"])

    assert found == {"7": None, "O'Neill%s": "cid@example.com"}


@pytest.mark.parametrize("columns", ["email, id", "id, email, plan_type"])
def test_a_query_for_customers_with_other_columns(
    reader: dict[str, str], columns: str
) -> None:
    sql = CUSTOMERS_BY_ID.replace("    id,\n    email\n", f"    {columns}\n")
    assert columns in sql

    with (
        build_connection(reader) as connection,
        pytest.raises(QueryFileError, match="customers_by_id must return id, email:"),
    ):
        connection.find_customers(sql, [2])


# The password is never sent as it is

PASSWORD = "Correct horse, battery staple"
PASSWORD_NOT_SENT = (
    "The password was not sent, because the login method of DB_USER would send it"
    " unencrypted: set up TLS on the database server, or give DB_USER another login"
    " method"
)


@pytest.fixture(scope="module")
def without_tls() -> Iterator[DatabaseServer]:
    """A MySQL without TLS, whose accounts log in with caching_sha2_password."""
    if "mysql" not in find_servers():
        pytest.skip("caching_sha2_password is a login method of MySQL")
    with DatabaseServer(find_servers()["mysql"], "--tls-version=") as server:
        server.load(SETUP)
        yield server


def test_full_authentication_needs_tls(without_tls: DatabaseServer) -> None:
    settings = without_tls.create_reader(user="careful", password=PASSWORD)

    with (
        RecordingProxy(without_tls.port) as proxy,
        pytest.raises(DatabaseError) as caught,
    ):
        read_rows({**settings, "DB_PORT": str(proxy.port)})

    assert str(caught.value) == PASSWORD_NOT_SENT
    assert b"careful" in proxy.heard
    assert PASSWORD.encode() not in proxy.heard


def create_account(server: DatabaseServer, user: str) -> dict[str, str]:
    """The settings of an account for connections by Unix socket and by TCP."""
    server.query(f"CREATE USER {user} IDENTIFIED BY '{PASSWORD}'")
    server.query(f"GRANT SELECT ON {DATABASE}.* TO {user}")
    return server.settings(user, PASSWORD)


def test_a_unix_socket_is_as_good_as_tls(without_tls: DatabaseServer) -> None:
    settings = create_account(without_tls, "local")

    rows = read_rows({**settings, "DB_HOST": without_tls.socket})

    assert len(rows) == 3


def test_a_scramble_may_be_sent_without_tls(without_tls: DatabaseServer) -> None:
    """It is enough, when the server has cached the password of an earlier login."""
    settings = create_account(without_tls, "cached")
    read_rows({**settings, "DB_HOST": without_tls.socket})

    rows = read_rows(settings)

    assert len(rows) == 3


def log_in(server: FakeServer) -> str:
    """What is said of a login to this server, as root whose password is PASSWORD."""
    settings = {
        "DB_HOST": "127.0.0.1",
        "DB_PORT": str(server.port),
        "DB_USER": "root",
        "DB_PASSWORD": PASSWORD,
        "DB_NAME": DATABASE,
    }
    with pytest.raises(DatabaseError) as caught:
        read_rows(settings)
    return str(caught.value)


@pytest.mark.parametrize("method", ["mysql_clear_password", "sha256_password"])
def test_a_method_in_the_clear_needs_tls(method: str) -> None:
    with FakeServer([greet(), ask_for_method(method)]) as server:
        words = log_in(server)

    assert words == f"{PASSWORD_NOT_SENT} ({method} requires SSL)"
    assert b"root" in server.heard
    assert PASSWORD.encode() not in server.heard


@pytest.mark.parametrize("method", ["mysql_clear_password", "sha256_password"])
def test_a_server_that_starts_in_the_clear(method: str) -> None:
    with FakeServer([greet(method)]) as server:
        words = log_in(server)

    assert words == (
        f"{PASSWORD_NOT_SENT} (Failed authentication: {method} requires SSL)"
    )
    assert server.heard == b""


def test_full_authentication_after_another_method() -> None:
    words_of_server = [
        greet("mysql_native_password"),
        ask_for_method("caching_sha2_password"),
        ask_for_password(),
    ]
    with FakeServer(words_of_server) as server:
        words = log_in(server)

    assert words == PASSWORD_NOT_SENT
    assert PASSWORD.encode() not in server.heard


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("client_ed25519", "'client_ed25519' is not supported"),
        ("dialog", "'dialog' is not supported"),
        ("authentication_oci_client", "is not installed"),
    ],
)
def test_a_method_that_is_not_known(method: str, reason: str) -> None:
    with FakeServer([greet(), ask_for_method(method)]) as server:
        words = log_in(server)

    assert words.startswith(
        "DB_USER has a login method that this program cannot use: give the account"
        " mysql_native_password or caching_sha2_password ("
    )
    assert reason in words
    assert PASSWORD.encode() not in server.heard
