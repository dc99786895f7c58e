"""database_setup.sql and phase2_queries.sql on each kind of server that the machine has."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from db_connection import read_query
from lab.database import ADD_INDEX, DATABASE, DROP_INDEX, QUERIES, ROOT, SETUP, DatabaseServer, fill, find_servers

LATEST_VIEWS = ("query_1", "query_2", "query_3")
DAY = datetime.fromisoformat("2027-02-28")  # no test depends on today: the servers are told what time it is
NOON = DAY.replace(hour=12)
COLUMNS = ("user_id", "first_name", "email", "plan_type", "view_id", "page", "browser", "location", "event_time")
OWN_CUSTOMERS = (
    "CREATE TABLE customers (id BIGINT PRIMARY KEY, first_name TEXT, last_name TEXT, email TEXT, plan_type TEXT)"
)
OWN_VIEWS = (
    "CREATE TABLE page_views (id BIGINT PRIMARY KEY, user_id BIGINT, page TEXT, browser TEXT, location TEXT,"
    " event_time DATETIME)"
)


@pytest.fixture(scope="module", params=sorted(find_servers()) or ["mariadb or mysql"])
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
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
    load(empty)
    return empty


def load(server: DatabaseServer, at: datetime = NOON, *options: str) -> None:
    assert server.load(SETUP, f"--init-command=SET timestamp = {seconds(at)}", *options) == ""


def seconds(at: datetime) -> int:
    return int((at - datetime.fromisoformat("1970-01-01")).total_seconds())


def ask(server: DatabaseServer, sql: str, at: datetime = NOON) -> list[tuple[Any, ...]]:
    """The rows of a query at some time, on a connection in UTC such as the program's."""
    with server.connect(DATABASE) as connection, connection.cursor() as cursor:
        cursor.execute(f"SET timestamp = {seconds(at)}")
        cursor.execute(sql)
        return list(cursor)


def the_three(day: datetime = DAY) -> list[tuple[Any, ...]]:
    """What the queries find in a sample that was loaded on `day`."""
    sarah = ("Sarah", "sarah.johnson@email.com", "pro"), ("pricing", "desktop", "San Francisco, US")
    olivia = ("Olivia", "olivia.brown@email.com", "pro"), ("settings", "tablet", "Toronto, CA")
    mia = ("Mia", "mia.harris@email.com", "pro"), ("settings", "mobile", "Sydney, AU")
    return [
        (2, *sarah[0], 37, *sarah[1], day - timedelta(days=1) + timedelta(hours=14, minutes=30, seconds=45)),
        (7, *olivia[0], 34, *olivia[1], day - timedelta(days=2) + timedelta(hours=16, minutes=48, seconds=12)),
        (12, *mia[0], 32, *mia[1], day - timedelta(days=2) + timedelta(hours=9, minutes=20, seconds=31)),
    ]


def as_printed(day: datetime) -> str:
    """What the command-line client prints for phase2_queries.sql with a sample that was loaded on `day`."""
    return "".join("\t".join(map(str, row)) + "\n" for row in [COLUMNS, *the_three(day)]) * 3 + "latest\nNULL\n"


def dump(server: DatabaseServer) -> dict[str, Any]:
    """Schema and rows of all that is in the database."""
    found = {}
    with server.connect(DATABASE, sql_mode="TRADITIONAL") as connection, connection.cursor() as cursor:
        cursor.execute(f"SHOW CREATE DATABASE {DATABASE}")
        found[DATABASE] = cursor.fetchall()
        cursor.execute("SHOW TABLES")
        for (table,) in cursor.fetchall():
            cursor.execute(f"SHOW CREATE TABLE {table}")
            found[table] = cursor.fetchall()
            cursor.execute(f"SELECT * FROM {table} ORDER BY id")
            found[table] += cursor.fetchall()
    return found


# The sample


@pytest.mark.parametrize("hour", ["00:00:00", "12:00:00", "23:59:59"])
@pytest.mark.parametrize("date", ["2027-02-28", "2028-02-29", "2029-12-31"])
def test_the_same_three_qualify_at_any_hour_for_days(empty: DatabaseServer, date: str, hour: str) -> None:
    day, at = datetime.fromisoformat(date), datetime.fromisoformat(f"{date} {hour}")
    load(empty, at)
    assert [row[0] for row in empty.query("SELECT id FROM customers ORDER BY id")] == list(range(1, 16))
    assert [row[0] for row in empty.query("SELECT id FROM page_views ORDER BY id")] == list(range(1, 41))
    assert ask(empty, "SELECT id FROM page_views WHERE event_time > NOW()", at) == []
    query = read_query(QUERIES, "query_2")
    for days in range(6):
        for clock in ({}, {"hours": 11}, {"hours": 23, "minutes": 59, "seconds": 59}):
            assert ask(empty, query, day + timedelta(days, **clock)) == the_three(day)


@pytest.mark.parametrize(
    ("part", "instead", "further"),
    [
        ("customers.plan_type = 'pro'", "TRUE", [1, 3, 5, 6, 9, 10, 14]),
        ("page IN ('pricing', 'settings')", "TRUE", [4, 15]),
        ("page IN ('pricing', 'settings')", "page = 'pricing'", []),
        ("page IN ('pricing', 'settings')", "page = 'settings'", []),
        ("event_time >= DATE_SUB(CURDATE(), INTERVAL 7 DAY)", "TRUE", [8, 11, 15]),
        ("INTERVAL 7 DAY", "INTERVAL '7 0:0:1' DAY_SECOND", [8]),
        ("event_time DESC, id DESC", "event_time DESC, id", []),
        ("event_time DESC, id DESC", "id DESC", []),
        ("event_time DESC, id DESC", "event_time, id DESC", []),
        ("recent_views.recency = 1", "TRUE", []),
    ],
)
def test_each_part_of_query_2_decides_on_some_row_of_the_sample(
    loaded: DatabaseServer, part: str, instead: str, further: list[int]
) -> None:
    """A near miss of the query finds further customers, or other views of the same."""
    query = read_query(QUERIES, "query_2")
    assert part in query
    found = ask(loaded, query.replace(part, instead))
    assert found != the_three()
    assert sorted({row[0] for row in found}) == sorted([2, 7, 12, *further])


def test_the_sample_has_views_on_either_side_of_the_edge_of_the_window(loaded: DatabaseServer) -> None:
    edge = DAY - timedelta(days=7)
    before = edge - timedelta(seconds=1)
    at_the_edge = f"event_time BETWEEN '{before}' AND '{edge}'"
    found = loaded.query(f"SELECT user_id, page, event_time FROM page_views WHERE {at_the_edge} ORDER BY id")
    assert found == [(8, "pricing", before), (7, "pricing", edge), (10, "pricing", edge), (15, "home", edge)]


# Nothing of the user's is touched


@pytest.mark.parametrize(
    ("own", "error"),
    [
        ([OWN_CUSTOMERS, OWN_VIEWS], "Table 'customers' already exists"),
        ([OWN_CUSTOMERS], "Table 'customers' already exists"),
        ([OWN_VIEWS], "page_views already exists"),
        (
            [OWN_VIEWS.replace("page_views", "v"), "CREATE VIEW page_views AS SELECT * FROM v"],
            "page_views already exists",
        ),
        ([], "Table 'customers' already exists"),  # the sample itself, a second time
    ],
    ids=["both", "customers", "page_views", "a view", "the sample"],
)
def test_over_tables_that_are_there_it_stops_and_has_changed_nothing(
    empty: DatabaseServer, own: list[str], error: str
) -> None:
    """Though the sample would fit in: same columns, no id or address that clashes. A client that goes on after an error
    may add an empty customers table where there is none, and changes no table that was there."""
    if own:
        empty.query(f"CREATE DATABASE {DATABASE} CHARACTER SET latin1", database="")
        for statement in own:
            empty.query(statement)
        for table in [name for name, kind in empty.query("SHOW FULL TABLES") if kind == "BASE TABLE"]:
            empty.query(f"INSERT INTO {table} (id) VALUES (1000)")
    else:
        load(empty)
    before = dump(empty)
    with pytest.raises(RuntimeError, match=error):
        load(empty, DAY + timedelta(days=1))
    assert dump(empty) == before
    load(empty, DAY + timedelta(days=1), "--force")
    after = dump(empty)
    assert {name: after.pop(name) for name in before} == before
    assert all(len(schema_and_rows) == 1 for schema_and_rows in after.values())


def test_the_readmes_statement_adds_the_index_to_tables_of_ones_own(loaded: DatabaseServer) -> None:
    fresh = dump(loaded)
    assert ADD_INDEX in " ".join((ROOT / "README.md").read_text("utf-8").split())
    loaded.query(DROP_INDEX)
    loaded.query(ADD_INDEX)
    assert dump(loaded) == fresh


# Servers and clients of every setting


@pytest.mark.parametrize(
    ("mode", "zone"),
    [
        ("", "-12:00"),
        ("ONLY_FULL_GROUP_BY", "+00:00"),
        ("TRADITIONAL", "+13:00"),
        ("ANSI,ONLY_FULL_GROUP_BY,NO_BACKSLASH_ESCAPES,HIGH_NOT_PRECEDENCE", "-03:30"),
        ("NO_AUTO_VALUE_ON_ZERO,NO_UNSIGNED_SUBTRACTION,PAD_CHAR_TO_FULL_LENGTH", "+12:45"),
    ],
)
def test_both_files_run_in_the_client_with_any_sql_mode_time_zone_and_character_set(
    empty: DatabaseServer, mode: str, zone: str
) -> None:
    usual = empty.query("SELECT @@global.sql_mode", database="")[0][0]
    empty.query(f"SET GLOBAL sql_mode = '{mode}', time_zone = '{zone}', autocommit = 0", database="")
    try:
        load(empty, NOON, "--default-character-set=latin1")
        before = dump(empty)
        with pytest.raises(RuntimeError, match="already exists"):
            load(empty)
        last_day = f"--init-command=SET timestamp = {seconds(DAY + timedelta(days=5, hours=23))}"
        printed = empty.load(QUERIES, "--default-character-set=utf8mb4", last_day)
    finally:
        empty.query(f"SET GLOBAL sql_mode = '{usual}', time_zone = 'SYSTEM', autocommit = 1", database="")
    assert (printed, dump(empty)) == (as_printed(DAY), before)
    assert empty.query("SELECT location FROM page_views WHERE id = 1") == [("Köln, DE",)]


def test_an_account_that_may_only_read_can_run_the_queries(loaded: DatabaseServer) -> None:
    reader = loaded.create_reader()
    now = f"--init-command=SET timestamp = {seconds(NOON)}"
    assert loaded.load(QUERIES, now, settings=reader) == as_printed(DAY)
    with pytest.raises(RuntimeError, match="denied"):
        loaded.load(SETUP, settings=reader)


# Plans


@pytest.mark.parametrize("rows", ["the sample", "few recent", "all recent"])
def test_query_2_reads_page_views_from_the_index_alone(loaded: DatabaseServer, rows: str) -> None:
    if rows != "the sample":
        fill(loaded, customers=1000, views=8000, all_qualify=rows == "all recent")
    step = step_of_page_views(loaded, "query_2")
    assert (step["key"], "Using index" in step["Extra"].split("; ")) == ("page_views_recent", True)
    if rows == "few recent":
        assert (step["type"], int(step["rows"]) < 1000) == ("range", True)


def test_future_views_reads_the_end_of_the_index(loaded: DatabaseServer) -> None:
    fill(loaded, customers=1000, views=8000)
    step = step_of_page_views(loaded, "future_views")
    assert (step["key"], step["type"], int(step["rows"]) <= 10) == ("page_views_recent", "range", True)


def step_of_page_views(server: DatabaseServer, query: str) -> dict[str, Any]:
    """How the server reads page_views for a query."""
    with server.connect(DATABASE) as connection, connection.cursor(dictionary=True) as cursor:
        cursor.execute(f"EXPLAIN FORMAT = TRADITIONAL {read_query(QUERIES, query)}")
        (step,) = [step for step in cursor if step["table"] == "page_views"]
    return step


# What the queries find in any data

WINDOW = DAY - timedelta(days=7)
AHEAD = NOON + timedelta(minutes=1)
# Few values of each, so that the same second, the edge of the window and a filter that just fails come up all the time.
text = st.none() | st.text("aé😀' ", max_size=3)
customer = st.tuples(st.sampled_from(["pro", "PRO", "prof"]), text)
view = st.tuples(
    st.integers(1, 4),
    st.sampled_from(["pricing", "Settings", "home"]),
    st.sampled_from([None, "desktop", "mobile"]),
    text,
    st.sampled_from([WINDOW - timedelta(seconds=1), WINDOW, NOON, AHEAD, AHEAD + timedelta(seconds=1)]),
)


def expected(customers: list[Any], views: list[Any]) -> list[tuple[Any, ...]]:
    """The latest matching view of each pro customer, found without SQL. Ids count from 1."""
    latest: dict[int, tuple[Any, ...]] = {}
    for id_, (user, page, browser, location, time) in enumerate(views, 1):
        if page.lower() in ("pricing", "settings") and time >= WINDOW:
            latest[user] = max(latest.get(user, (WINDOW,)), (time, id_, page, browser, location))
    rows = []
    for user, (plan, name) in enumerate(customers, 1):
        if plan.lower() == "pro" and user in latest:
            time, id_, page, browser, location = latest[user]
            rows.append((user, name, None, plan, id_, page, browser, location, time))
    return rows


@pytest.fixture(scope="module")
def session(server: DatabaseServer) -> Iterator[Any]:
    """A cursor at NOON in a database with empty tables, where views may be of customers that are not there."""
    server.query(f"DROP DATABASE IF EXISTS {DATABASE}", database="")
    load(server)
    server.query("CREATE DATABASE own_tables CHARACTER SET utf8mb4", database="")
    for table in ("customers", "page_views"):
        server.query(f"CREATE TABLE own_tables.{table} LIKE {DATABASE}.{table}")
    with server.connect("own_tables", autocommit=False) as connection, connection.cursor() as cursor:
        cursor.execute(f"SET timestamp = {seconds(NOON)}")
        yield cursor


@hypothesis_settings(max_examples=150, deadline=None)
@example([("pro", "Ann")], [(1, "pricing", None, None, WINDOW), (1, "home", None, None, WINDOW)])
@given(customers=st.lists(customer, max_size=3), views=st.lists(view, max_size=10))
def test_the_queries_find_what_they_say_in_any_data(session: Any, customers: list[Any], views: list[Any]) -> None:
    """The three give the same rows. A view is in the future when it is of the two pages and over a minute ahead."""
    own = [(id_, *row) for id_, row in enumerate(customers, 1)]
    session.executemany("INSERT INTO customers (id, plan_type, first_name) VALUES (%s, %s, %s)", own)
    own = [(id_, *row) for id_, row in enumerate(views, 1)]
    columns = "id, user_id, page, browser, location, event_time"
    session.executemany(f"INSERT INTO page_views ({columns}) VALUES (%s, %s, %s, %s, %s, %s)", own)
    found = {}
    for name in (*LATEST_VIEWS, "future_views"):
        session.execute(read_query(QUERIES, name))
        found[name] = session.column_names, session.fetchall()
    session.execute("ROLLBACK")
    ahead = [time for _, page, _, _, time in views if page != "home" and time > AHEAD]
    assert found == {
        **dict.fromkeys(LATEST_VIEWS, (COLUMNS, expected(customers, views))),
        "future_views": (("latest",), [(max(ahead, default=None),)]),
    }
