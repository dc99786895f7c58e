"""database_setup.sql and phase2_queries.sql, on each kind of server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from db_connection import read_query
from lab.database import (
    DATABASE,
    QUERIES,
    SETUP,
    DatabaseServer,
    fill,
    find_servers,
)

Row = tuple[Any, ...]

# No test depends on the date: the servers are given the time.
DAY = datetime.fromisoformat("2027-02-28")
NOON = DAY.replace(hour=12)
WINDOW = DAY - timedelta(days=7)
MINUTE_AHEAD = NOON + timedelta(minutes=1)
SECOND = timedelta(seconds=1)

QUERY_2 = read_query(QUERIES, "query_2")
COLUMNS = (
    "user_id",
    "first_name",
    "email",
    "plan_type",
    "view_id",
    "page",
    "browser",
    "location",
    "event_time",
)


@pytest.fixture(scope="module", params=sorted(find_servers()) or ["mariadb or mysql"])
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server of each kind, which a test may change as it likes."""
    with DatabaseServer(find_servers()[request.param]) as server:
        yield server


@pytest.fixture
def empty(server: DatabaseServer) -> DatabaseServer:
    """A server without the database."""
    server.query(f"DROP DATABASE IF EXISTS {DATABASE}", database="")
    return server


@pytest.fixture
def loaded(empty: DatabaseServer) -> DatabaseServer:
    """A server with the sample, loaded at noon of DAY."""
    load_setup(empty)
    return empty


def load_setup(server: DatabaseServer, *options: str, at: datetime = NOON) -> None:
    printed = server.load(SETUP, set_time_of_client(at), *options)
    assert printed == ""


def set_time_of_client(at: datetime) -> str:
    """The client's option for a session at some time."""
    return f"--init-command=SET timestamp = {count_seconds(at)}"


def count_seconds(at: datetime) -> int:
    return int((at - datetime.fromisoformat("1970-01-01")).total_seconds())


def run_query(server: DatabaseServer, sql: str, at: datetime = NOON) -> list[Row]:
    """The rows of a query at some time, on a connection in UTC like the program's."""
    with server.connect(DATABASE) as connection, connection.cursor() as cursor:
        cursor.execute(f"SET timestamp = {count_seconds(at)}")
        cursor.execute(sql)
        return list(cursor)


def list_expected(loaded_on: datetime = DAY) -> list[Row]:
    """What the queries find in a sample that was loaded on this day."""
    yesterday = loaded_on - timedelta(days=1)
    before = loaded_on - timedelta(days=2)
    sarah = (
        2,
        "Sarah",
        "sarah.johnson@email.com",
        "pro",
        37,
        "pricing",
        "desktop",
        "San Francisco, US",
        yesterday.replace(hour=14, minute=30, second=45),
    )
    olivia = (
        7,
        "Olivia",
        "olivia.brown@email.com",
        "pro",
        34,
        "settings",
        "tablet",
        "Toronto, CA",
        before.replace(hour=16, minute=48, second=12),
    )
    mia = (
        12,
        "Mia",
        "mia.harris@email.com",
        "pro",
        32,
        "settings",
        "mobile",
        "Sydney, AU",
        before.replace(hour=9, minute=20, second=31),
    )
    return [sarah, olivia, mia]


def print_expected(loaded_on: datetime) -> str:
    """What the command-line client prints for phase2_queries.sql."""
    lines = []
    for row in [COLUMNS, *list_expected(loaded_on)]:
        lines.append("\t".join(str(value) for value in row) + "\n")
    one_query = "".join(lines)
    return one_query * 3 + "latest\nNULL\n"


def dump(server: DatabaseServer) -> dict[str, Any]:
    """Schema and rows of all that is in the database, by table."""
    content = {DATABASE: server.query(f"SHOW CREATE DATABASE {DATABASE}")}
    for (table,) in server.query("SHOW TABLES"):
        schema = server.query(f"SHOW CREATE TABLE {table}")
        rows = server.query(f"SELECT * FROM {table} ORDER BY id")
        content[table] = schema + rows
    return content


# database_setup.sql

TIMES_OF_LOADING = ["2027-02-28 00:00:00", "2028-02-29 12:00:00", "2029-12-31 23:59:59"]


@pytest.mark.parametrize("text", TIMES_OF_LOADING)
def test_the_sample_has_no_future_views(empty: DatabaseServer, text: str) -> None:
    at = datetime.fromisoformat(text)

    load_setup(empty, at=at)

    assert empty.query("SELECT COUNT(*) FROM customers") == [(15,)]
    assert empty.query("SELECT COUNT(*) FROM page_views") == [(40,)]
    future = "SELECT id FROM page_views WHERE event_time > NOW()"
    assert run_query(empty, future, at=at) == []


@pytest.mark.parametrize("text", TIMES_OF_LOADING)
def test_the_same_three_qualify_for_days(empty: DatabaseServer, text: str) -> None:
    at = datetime.fromisoformat(text)
    day = at.replace(hour=0, minute=0, second=0)

    load_setup(empty, at=at)

    for hours in (0, 23.99, 5 * 24, 6 * 24 - 0.01):
        rows = run_query(empty, QUERY_2, at=day + timedelta(hours=hours))
        assert rows == list_expected(loaded_on=day)


OLD = [8, 11, 15]  # customers whose matching views are not recent


@pytest.mark.parametrize(
    ("part", "replacement", "further_customers"),
    [
        ("customers.plan_type = 'pro'", "TRUE", [1, 3, 5, 6, 9, 10, 14]),
        ("page_views.page IN ('pricing', 'settings')", "TRUE", [4, 15]),
        ("page IN ('pricing', 'settings')", "page = 'pricing'", []),
        ("page_views.event_time >= DATE_SUB(CURDATE(), INTERVAL 7 DAY)", "TRUE", OLD),
        ("INTERVAL 7 DAY", "INTERVAL '7 0:0:1' DAY_SECOND", [8]),
        ("event_time DESC, page_views.id DESC", "event_time DESC, page_views.id", []),
        ("event_time DESC, page_views.id DESC", "id DESC", []),
        ("recent_views.recency = 1", "TRUE", []),
    ],
)
def test_each_part_of_query_2_decides(
    loaded: DatabaseServer, part: str, replacement: str, further_customers: list[int]
) -> None:
    """A near miss of the query finds other customers in the sample, or other views."""
    assert part in QUERY_2

    rows = run_query(loaded, QUERY_2.replace(part, replacement))

    assert rows != list_expected()
    customers = {row[0] for row in rows}
    assert customers == {2, 7, 12, *further_customers}


@pytest.mark.parametrize(
    "tables", [("customers", "page_views"), ("customers",), ("page_views",)]
)
def test_existing_tables_are_kept(
    empty: DatabaseServer, tables: tuple[str, ...]
) -> None:
    empty.query(f"CREATE DATABASE {DATABASE} CHARACTER SET latin1", database="")
    for table in tables:
        empty.query(f"CREATE TABLE {table} (id INT PRIMARY KEY) SELECT 1000 AS id")

    check_that_loading_changes_nothing(empty)


def test_an_existing_view_is_kept(empty: DatabaseServer) -> None:
    empty.query(f"CREATE DATABASE {DATABASE}", database="")
    empty.query("CREATE TABLE views (id INT PRIMARY KEY) SELECT 1000 AS id")
    empty.query("CREATE VIEW page_views AS SELECT * FROM views")

    check_that_loading_changes_nothing(empty)


def check_that_loading_changes_nothing(server: DatabaseServer) -> None:
    before = dump(server)

    with pytest.raises(RuntimeError, match="already exists"):
        load_setup(server)
    assert dump(server) == before

    # A client that goes on after an error may add an empty table, and no more.
    load_setup(server, "--force")
    after = dump(server)
    for table, content in after.items():
        if table in before:
            assert content == before[table]
        else:
            assert len(content) == 1  # its schema


class Defaults(NamedTuple):
    """Of a server, that change the meaning of SQL."""

    sql_mode: str
    time_zone: str


@pytest.mark.parametrize(
    "defaults",
    [
        Defaults("''", "'-12:00'"),
        Defaults("'TRADITIONAL,ONLY_FULL_GROUP_BY'", "'+13:00'"),
        Defaults(
            "'ANSI,NO_BACKSLASH_ESCAPES,HIGH_NOT_PRECEDENCE,NO_AUTO_VALUE_ON_ZERO,"
            "NO_UNSIGNED_SUBTRACTION'",
            "'-03:30'",
        ),
    ],
)
def test_both_files_run_on_servers_with_other_defaults(
    empty: DatabaseServer, defaults: Defaults
) -> None:
    five_days_later = set_time_of_client(DAY + timedelta(days=5, hours=23))

    with empty.global_variables(
        sql_mode=defaults.sql_mode, time_zone=defaults.time_zone, autocommit="0"
    ):
        load_setup(empty, "--default-character-set=latin1")
        with pytest.raises(RuntimeError, match="already exists"):
            load_setup(empty)
        printed = empty.load(
            QUERIES, "--default-character-set=utf8mb4", five_days_later
        )

    assert printed == print_expected(loaded_on=DAY)
    location = empty.query("SELECT location FROM page_views WHERE id = 1")
    assert location == [("Köln, DE",)]


# Use of indexes


def explain(server: DatabaseServer, sql: str, table: str) -> dict[str, Any]:
    """How the server reads a table for a query."""
    with (
        server.connect(DATABASE) as connection,
        connection.cursor(dictionary=True) as cursor,
    ):
        cursor.execute(f"EXPLAIN FORMAT = TRADITIONAL {sql}")
        steps: list[dict[str, Any]] = list(cursor)
    [step] = [step for step in steps if step["table"] == table]
    return step


def test_query_2_reads_the_sample_from_its_index(loaded: DatabaseServer) -> None:
    step = explain(loaded, QUERY_2, table="page_views")

    assert step["key"] == "page_views_recent"
    assert "Using index" in step["Extra"].split("; ")


def test_query_2_reads_recent_views_only(loaded: DatabaseServer) -> None:
    fill(loaded, customers=1000, views=8000)

    step = explain(loaded, QUERY_2, table="page_views")

    assert step["key"] == "page_views_recent"
    assert "Using index" in step["Extra"].split("; ")
    assert step["type"] == "range"
    assert int(step["rows"]) < 1000


def test_query_2_keeps_its_index_where_all_views_are_recent(
    loaded: DatabaseServer,
) -> None:
    fill(loaded, customers=1000, views=8000, all_qualify=True)

    step = explain(loaded, QUERY_2, table="page_views")

    assert step["key"] == "page_views_recent"
    assert "Using index" in step["Extra"].split("; ")


def test_future_views_uses_the_index(loaded: DatabaseServer) -> None:
    fill(loaded, customers=1000, views=8000)

    step = explain(loaded, read_query(QUERIES, "future_views"), table="page_views")

    assert step["key"] == "page_views_recent"
    assert step["type"] == "range"
    assert int(step["rows"]) <= 10


@pytest.mark.parametrize("count", [1, 1000])
def test_customers_by_id_uses_the_primary_key(
    loaded: DatabaseServer, count: int
) -> None:
    fill(loaded, customers=20_000, views=1)
    ids = ", ".join(str(number) for number in range(1, count + 1))
    sql = read_query(QUERIES, "customers_by_id").replace("@customer_ids", ids)

    step = explain(loaded, sql, table="customers")

    assert step["key"] == "PRIMARY"


def test_customers_by_id_can_be_run_by_hand(loaded: DatabaseServer) -> None:
    with loaded.connect(DATABASE) as connection, connection.cursor() as cursor:
        cursor.execute("SET @customer_ids = 2")
        cursor.execute(read_query(QUERIES, "customers_by_id"))
        rows = list(cursor)

    assert rows == [(2, "sarah.johnson@email.com")]


# The queries on any data

# Few values of each, so that the same second, the edge of the window and a filter that
# just fails come up all the time.
text = st.none() | st.text("aé😀' ", max_size=3)
customer = st.tuples(st.sampled_from(["pro", "PRO", "prof"]), text)
view = st.tuples(
    st.integers(1, 4),
    st.sampled_from(["pricing", "Settings", "home"]),
    st.sampled_from([None, "desktop", "mobile"]),
    text,
    st.sampled_from(
        [WINDOW - SECOND, WINDOW, NOON, MINUTE_AHEAD, MINUTE_AHEAD + SECOND]
    ),
)


@pytest.fixture(scope="module")
def session(server: DatabaseServer) -> Iterator[Any]:
    """A cursor at NOON in an empty database.

    Page views may be of customers who are not there.
    """
    server.query(f"DROP DATABASE IF EXISTS {DATABASE}", database="")
    load_setup(server)
    with (
        server.connect(DATABASE, autocommit=False) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(f"SET timestamp = {count_seconds(NOON)}, foreign_key_checks = 0")
        cursor.execute("TRUNCATE page_views")
        cursor.execute("TRUNCATE customers")
        yield cursor


def insert(session: Any, customers: list[Any], views: list[Any]) -> None:
    """Insert rows whose ids count from 1."""
    session.executemany(
        "INSERT INTO customers (id, plan_type, first_name) VALUES (%s, %s, %s)",
        [(number, *row) for number, row in enumerate(customers, 1)],
    )
    session.executemany(
        "INSERT INTO page_views (id, user_id, page, browser, location, event_time)"
        " VALUES (%s, %s, %s, %s, %s, %s)",
        [(number, *row) for number, row in enumerate(views, 1)],
    )


def find_latest_views(customers: list[Any], views: list[Any]) -> list[Row]:
    """The latest matching view of each pro customer, found without SQL."""
    rows = []
    for user_id, (plan, name) in enumerate(customers, 1):
        own = []
        for view_id, (user, page, browser, location, time) in enumerate(views, 1):
            if user == user_id and page.lower() in ("pricing", "settings"):
                own.append((time, view_id, page, browser, location))
        time, *of_view = max(own, default=(WINDOW - SECOND,))
        if plan.lower() == "pro" and time >= WINDOW:
            rows.append((user_id, name, None, plan, *of_view, time))
    return rows


def find_latest_future_view(views: list[Any]) -> datetime | None:
    ahead = []
    for _, page, _, _, time in views:
        if page.lower() in ("pricing", "settings") and time > MINUTE_AHEAD:
            ahead.append(time)
    return max(ahead, default=None)


@pytest.mark.parametrize("name", ["query_1", "query_2", "query_3"])
def test_ids_may_differ_in_case_alone(empty: DatabaseServer, name: str) -> None:
    """In the collation of page_views.user_id they are equal."""
    statements = [
        f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4",
        f"USE {DATABASE}",
        "CREATE TABLE customers (id VARCHAR(9) COLLATE utf8mb4_bin PRIMARY KEY)"
        " SELECT 'ab' AS id, 'pro' AS plan_type, '' AS first_name, '' AS email"
        " UNION ALL SELECT 'AB', 'pro', '', ''",
        "CREATE TABLE page_views (user_id VARCHAR(9) COLLATE utf8mb4_unicode_ci)"
        " SELECT 1 AS id, 'ab' AS user_id, 'pricing' AS page, '' AS browser,"
        f" '' AS location, TIMESTAMP '{NOON}' AS event_time"
        f" UNION ALL SELECT 2, 'AB', 'pricing', '', '', TIMESTAMP '{NOON}'",
    ]
    with empty.connect() as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)

    rows = run_query(empty, read_query(QUERIES, name))

    assert [(row[0], row[4]) for row in rows] == [("AB", 2), ("ab", 1)]


@settings(max_examples=150, deadline=None)
@example(
    customers=[("pro", "Ann")],
    views=[(1, "pricing", None, None, WINDOW), (1, "home", None, None, WINDOW)],
)
@given(
    customers=st.lists(customer, max_size=3),
    views=st.lists(view, max_size=10),
)
def test_the_queries_are_right_on_any_data(
    session: Any, customers: list[Any], views: list[Any]
) -> None:
    insert(session, customers, views)

    found = {}
    for name in ("query_1", "query_2", "query_3", "future_views"):
        session.execute(read_query(QUERIES, name))
        found[name] = (session.column_names, session.fetchall())
    session.execute("ROLLBACK")

    latest = (COLUMNS, find_latest_views(customers, views))
    future = (("latest",), [(find_latest_future_view(views),)])
    assert found == {
        "query_1": latest,
        "query_2": latest,
        "query_3": latest,
        "future_views": future,
    }
