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
from lab.database import DATABASE, QUERIES, SETUP, DatabaseServer, fill, find_servers

DAY = datetime.fromisoformat("2027-02-28")  # no test depends on today: the servers are told what time it is
NOON = DAY.replace(hour=12)
COLUMNS = ("user_id", "first_name", "email", "plan_type", "view_id", "page", "browser", "location", "event_time")


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
    found = {DATABASE: server.query(f"SHOW CREATE DATABASE {DATABASE}")}
    for (table,) in server.query("SHOW TABLES"):
        found[table] = server.query(f"SHOW CREATE TABLE {table}") + server.query(f"SELECT * FROM {table} ORDER BY id")
    return found


@pytest.mark.parametrize("at", ["2027-02-28 00:00:00", "2028-02-29 12:00:00", "2029-12-31 23:59:59"])
def test_the_same_three_qualify_at_any_hour_for_days(empty: DatabaseServer, at: str) -> None:
    loaded_at = datetime.fromisoformat(at)
    load(empty, loaded_at)
    assert empty.query("SELECT (SELECT COUNT(*) FROM customers), (SELECT COUNT(*) FROM page_views)") == [(15, 40)]
    assert ask(empty, "SELECT id FROM page_views WHERE event_time > NOW()", loaded_at) == []
    day = loaded_at.replace(hour=0, minute=0, second=0)
    for hours in (0, 23.99, 5 * 24, 6 * 24 - 0.01):
        assert ask(empty, read_query(QUERIES, "query_2"), day + timedelta(hours=hours)) == the_three(day)


@pytest.mark.parametrize(
    ("part", "instead", "further"),
    [
        ("customers.plan_type = 'pro'", "TRUE", [1, 3, 5, 6, 9, 10, 14]),
        ("page IN ('pricing', 'settings')", "TRUE", [4, 15]),
        ("page IN ('pricing', 'settings')", "page = 'pricing'", []),
        ("event_time >= DATE_SUB(CURDATE(), INTERVAL 7 DAY)", "TRUE", [8, 11, 15]),
        ("INTERVAL 7 DAY", "INTERVAL '7 0:0:1' DAY_SECOND", [8]),
        ("event_time DESC, id DESC", "event_time DESC, id", []),
        ("event_time DESC, id DESC", "id DESC", []),
        ("recent_views.recency = 1", "TRUE", []),
    ],
)
def test_each_part_of_query_2_decides(loaded: DatabaseServer, part: str, instead: str, further: list[int]) -> None:
    """In the sample, a near miss of the query finds further customers, or other views of the same."""
    query = read_query(QUERIES, "query_2")
    found = ask(loaded, query.replace(part, instead))
    assert found != the_three()
    assert sorted({row[0] for row in found}) == sorted([2, 7, 12, *further])


@pytest.mark.parametrize("own", ["customers page_views", "customers", "page_views", "a_view"])
def test_over_tables_that_are_there_it_stops_and_has_changed_nothing(empty: DatabaseServer, own: str) -> None:
    """A client that goes on after an error may add an empty customers table where there is none, and no more."""
    empty.query(f"CREATE DATABASE {DATABASE} CHARACTER SET latin1", database="")
    for table in own.split():
        empty.query(f"CREATE TABLE {table} (id BIGINT PRIMARY KEY) SELECT 1000 AS id")
    if own == "a_view":
        empty.query("CREATE VIEW page_views AS SELECT * FROM a_view")
    before = dump(empty)
    with pytest.raises(RuntimeError, match="already exists"):
        load(empty, DAY + timedelta(days=1))
    assert dump(empty) == before
    load(empty, DAY + timedelta(days=1), "--force")
    after = dump(empty)
    assert {name: after.pop(name) for name in before} == before
    assert all(len(schema_and_rows) == 1 for schema_and_rows in after.values())


@pytest.mark.parametrize(
    ("mode", "zone"),
    [
        ("", "-12:00"),
        ("TRADITIONAL,ONLY_FULL_GROUP_BY", "+13:00"),
        ("ANSI,NO_BACKSLASH_ESCAPES,HIGH_NOT_PRECEDENCE,NO_AUTO_VALUE_ON_ZERO,NO_UNSIGNED_SUBTRACTION", "-03:30"),
    ],
)
def test_both_files_run_in_any_sql_mode_zone_and_character_set(empty: DatabaseServer, mode: str, zone: str) -> None:
    usual = empty.query("SELECT @@global.sql_mode", database="")[0][0]
    empty.query(f"SET GLOBAL sql_mode = '{mode}', time_zone = '{zone}', autocommit = 0", database="")
    try:
        load(empty, NOON, "--default-character-set=latin1")
        before = dump(empty)
        with pytest.raises(RuntimeError, match="already exists"):
            load(empty)
        last_day = f"--init-command=SET timestamp = {seconds(DAY + timedelta(days=5, hours=23))}"
        printed, after = empty.load(QUERIES, "--default-character-set=utf8mb4", last_day), dump(empty)
    finally:
        empty.query(f"SET GLOBAL sql_mode = '{usual}', time_zone = 'SYSTEM', autocommit = 1", database="")
    assert (printed, after) == (as_printed(DAY), before)
    assert empty.query("SELECT location FROM page_views WHERE id = 1") == [("Köln, DE",)]


@pytest.mark.parametrize("rows", ["the sample", "few recent", "all recent"])
def test_page_views_are_read_from_the_index_alone(loaded: DatabaseServer, rows: str) -> None:
    if rows != "the sample":
        fill(loaded, customers=1000, views=8000, all_qualify=rows == "all recent")
    step = step_of_page_views(loaded, "query_2")
    assert (step["key"], "Using index" in step["Extra"].split("; ")) == ("page_views_recent", True)
    if rows == "few recent":
        assert (step["type"], int(step["rows"]) < 1000) == ("range", True)
        step = step_of_page_views(loaded, "future_views")
        assert (step["key"], step["type"], int(step["rows"]) <= 10) == ("page_views_recent", "range", True)


def step_of_page_views(server: DatabaseServer, query: str) -> dict[str, Any]:
    """How the server reads page_views for a query."""
    with server.connect(DATABASE) as connection, connection.cursor(dictionary=True) as cursor:
        cursor.execute(f"EXPLAIN FORMAT = TRADITIONAL {read_query(QUERIES, query)}")
        return next(step for step in list(cursor) if step["table"] == "page_views")


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
    pros = [(user, name, plan) for user, (plan, name) in enumerate(customers, 1) if plan.lower() == "pro"]
    return [(*pro[:2], None, pro[2], *latest[pro[0]][1:], latest[pro[0]][0]) for pro in pros if pro[0] in latest]


@pytest.fixture(scope="module")
def session(server: DatabaseServer) -> Iterator[Any]:
    """A cursor at NOON in an empty database, where views may be of customers that are not there."""
    server.query(f"DROP DATABASE IF EXISTS {DATABASE}", database="")
    load(server)
    with server.connect(DATABASE, autocommit=False) as connection, connection.cursor() as cursor:
        cursor.execute(f"SET timestamp = {seconds(NOON)}, foreign_key_checks = 0")
        cursor.execute("TRUNCATE page_views")
        cursor.execute("TRUNCATE customers")
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
    for name in ("query_1", "query_2", "query_3", "future_views"):
        session.execute(read_query(QUERIES, name))
        found[name] = session.column_names, session.fetchall()
    session.execute("ROLLBACK")
    ahead = [time for _, page, _, _, time in views if page != "home" and time > AHEAD]
    latest = COLUMNS, expected(customers, views)
    future = ("latest",), [(max(ahead, default=None),)]
    assert found == {"query_1": latest, "query_2": latest, "query_3": latest, "future_views": future}
