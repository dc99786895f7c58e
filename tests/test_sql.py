"""database_setup.sql and phase2_queries.sql on each kind of server that the machine has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from database import DATABASE, QUERIES, SETUP, DatabaseServer, fill, find_servers
from db_connection import read_query

QUERY_NAMES = ("query_1", "query_2", "query_3")
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


def load(server: DatabaseServer, at: datetime = NOON) -> None:
    assert server.load(SETUP, f"--init-command=SET timestamp = {seconds(at)}") == ""


def seconds(at: datetime) -> int:
    return int((at - datetime.fromisoformat("1970-01-01")).total_seconds())


def ask(server: DatabaseServer, sql: str, at: datetime = NOON) -> list[tuple[Any, ...]]:
    """The rows of a query at some time, on a connection in UTC such as the program's."""
    with server.connect(DATABASE) as connection, connection.cursor() as cursor:
        cursor.execute(f"SET timestamp = {seconds(at)}")
        cursor.execute(sql)
        return list(cursor)


def the_three(day: datetime = DAY, first: int = 0, first_view: int = 0) -> list[tuple[Any, ...]]:
    """What the queries find in a sample that was loaded on `day`; ids begin after the given ones."""
    yesterday, before = day - timedelta(days=1), day - timedelta(days=2)
    sarah = ("Sarah", "sarah.johnson@email.com", "pro"), ("pricing", "desktop", "San Francisco, US")
    olivia = ("Olivia", "olivia.brown@email.com", "pro"), ("settings", "tablet", "Toronto, CA")
    mia = ("Mia", "mia.harris@email.com", "pro"), ("settings", "mobile", "Sydney, AU")
    return [
        (first + 2, *sarah[0], first_view + 37, *sarah[1], yesterday.replace(hour=14, minute=30, second=45)),
        (first + 7, *olivia[0], first_view + 34, *olivia[1], before.replace(hour=16, minute=48, second=12)),
        (first + 12, *mia[0], first_view + 32, *mia[1], before.replace(hour=9, minute=20, second=31)),
    ]


def as_printed(rows: list[tuple[Any, ...]]) -> str:
    """What the command-line client prints for a query's rows."""
    return "".join("\t".join(map(str, row)) + "\n" for row in [COLUMNS, *rows])


def dump(server: DatabaseServer, where: str = "TRUE") -> tuple[list[Any], list[Any]]:
    """All customers and page views, or those for which the condition holds."""
    return (
        server.query(f"SELECT * FROM customers WHERE {where} ORDER BY id"),
        server.query(f"SELECT * FROM page_views WHERE {where} ORDER BY id"),
    )


# The sample


@pytest.mark.parametrize("zone", ["-12:00", "+00:00", "+13:00"])
def test_a_first_load_makes_the_sample_whatever_the_servers_time_zone(empty: DatabaseServer, zone: str) -> None:
    empty.query(f"SET GLOBAL time_zone = '{zone}'", database="")
    load(empty)
    last_day = DAY + timedelta(days=5, hours=23)
    printed = empty.load(QUERIES, f"--init-command=SET timestamp = {seconds(last_day)}")
    empty.query("SET GLOBAL time_zone = 'SYSTEM'", database="")
    customers, views = dump(empty)
    assert [row[0] for row in customers] == list(range(1, 16))
    assert [row[0] for row in views] == list(range(1, 41))
    assert printed == as_printed(the_three()) * 3


@pytest.mark.parametrize("hour", ["00:00:00", "12:00:00", "23:59:59"])
@pytest.mark.parametrize("date", ["2027-02-28", "2028-02-29", "2029-12-31"])
def test_the_same_three_qualify_at_any_hour_for_four_days(empty: DatabaseServer, date: str, hour: str) -> None:
    day, at = datetime.fromisoformat(date), datetime.fromisoformat(f"{date} {hour}")
    load(empty, at)
    assert ask(empty, "SELECT id FROM page_views WHERE event_time > NOW()", at) == []
    query = read_query(QUERIES, "query_2")
    for days in range(5):
        for clock in ({}, {"hours": 11}, {"hours": 23, "minutes": 59, "seconds": 59}):
            assert ask(empty, query, day + timedelta(days, **clock)) == the_three(day)


@pytest.mark.parametrize(
    ("filter_", "instead", "further"),
    [
        ("customers.plan_type = 'pro'", "TRUE", [1, 3, 5, 6, 9, 10, 14]),
        ("page IN ('pricing', 'settings')", "TRUE", [4, 15]),
        ("page IN ('pricing', 'settings')", "page = 'pricing'", []),
        ("event_time >= DATE_SUB(CURDATE(), INTERVAL 7 DAY)", "TRUE", [8, 11, 15]),
        ("INTERVAL 7 DAY", "INTERVAL '7 0:0:1' DAY_SECOND", [8]),
        ("event_time DESC, id DESC", "event_time DESC, id", []),
        ("event_time DESC, id DESC", "id DESC", []),
        ("event_time DESC, id DESC", "event_time, id DESC", []),
        ("recent_views.recency = 1", "TRUE", []),
    ],
)
def test_each_part_of_the_query_decides_on_some_row(
    loaded: DatabaseServer, filter_: str, instead: str, further: list[int]
) -> None:
    """A near miss of the query finds further customers, or other views of the same."""
    query = read_query(QUERIES, "query_2")
    assert filter_ in query
    found = ask(loaded, query.replace(filter_, instead))
    assert found != the_three()
    assert sorted({row[0] for row in found}) == sorted([2, 7, 12, *further])


def test_views_lie_on_either_side_of_the_edge_of_the_window(loaded: DatabaseServer) -> None:
    edge = DAY - timedelta(days=7)
    sql = "SELECT user_id, page, event_time FROM page_views WHERE event_time BETWEEN %r AND %r ORDER BY id"
    rows = loaded.query(sql % (str(edge - timedelta(seconds=1)), str(edge)))
    assert rows == [
        (8, "pricing", edge - timedelta(seconds=1)),
        (7, "pricing", edge),
        (10, "pricing", edge),
        (15, "home", edge),
    ]


# Loading it again


def test_loading_again_changes_nothing(loaded: DatabaseServer) -> None:
    before = dump(loaded)
    load(loaded)
    assert dump(loaded) == before


def test_loading_again_brings_the_times_up_to_date(loaded: DatabaseServer) -> None:
    customers, views = dump(loaded)
    load(loaded, DAY + timedelta(days=30))
    moved = [(*view[:5], view[5] + timedelta(days=30), view[6]) for view in views]
    assert dump(loaded) == (customers, moved)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM customers",
        "DELETE FROM customers WHERE email = 'sarah.johnson@email.com'",
        "DELETE FROM page_views WHERE id IN (31, 37, 40)",
        "UPDATE customers SET first_name = 'X', last_name = NULL, email = CONCAT('x', id), plan_type = 'x'",
        "UPDATE page_views SET user_id = 1, page = 'x', browser = NULL, location = 'x', event_time = '2099-01-01'",
        "ALTER TABLE customers DROP COLUMN sample_no",
        "ALTER TABLE page_views DROP KEY page_views_recent",
        "DROP TABLE page_views",
    ],
)
def test_loading_again_puts_the_sample_back(loaded: DatabaseServer, damage: str) -> None:
    before = dump(loaded), index(loaded)
    loaded.query(damage)
    load(loaded)
    assert (dump(loaded), index(loaded)) == before


def index(server: DatabaseServer) -> list[tuple[Any, ...]]:
    return server.query(
        "SELECT column_name FROM information_schema.statistics WHERE table_schema = DATABASE()"
        " AND index_name = 'page_views_recent' ORDER BY seq_in_index"
    )


def test_a_table_without_the_samples_column_gets_it_and_keeps_its_rows(loaded: DatabaseServer) -> None:
    loaded.query("ALTER TABLE page_views DROP COLUMN sample_no")
    before = loaded.query("SELECT * FROM page_views ORDER BY id")
    load(loaded)
    assert loaded.query("SELECT * FROM page_views WHERE sample_no IS NULL ORDER BY id") == [
        (*row, None) for row in before
    ]
    assert loaded.query("SELECT id, sample_no FROM page_views WHERE sample_no IS NOT NULL ORDER BY id") == [
        (40 + number, number) for number in range(1, 41)
    ]


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    customers=st.sets(st.integers(1, 40), max_size=4),
    views=st.sets(st.integers(1, 90), max_size=6),
    lost_customers=st.sets(st.integers(1, 15), max_size=3),
    lost_views=st.sets(st.integers(1, 40), max_size=3),
)
def test_rows_that_are_not_the_samples_stay_as_they_are(
    server: DatabaseServer, customers: set[int], views: set[int], lost_customers: set[int], lost_views: set[int]
) -> None:
    """Whatever ids they have, whatever is missing from the sample; and the three still come in their order."""
    if not server.query(f"SHOW DATABASES LIKE '{DATABASE}'", database=""):
        load(server)
    server.query("DELETE FROM customers")
    for id_ in sorted(customers):
        server.query(f"INSERT INTO customers (id, email, plan_type) VALUES ({id_}, 'own{id_}@example.com', 'pro')")
    for id_ in sorted(views if customers else ()):
        server.query(
            "INSERT INTO page_views (id, user_id, page, event_time)"
            f" VALUES ({id_}, {min(customers)}, 'home', '2099-01-01')"
        )
    own = dump(server)
    load(server)
    first = max(customers) if customers and min(customers) <= 15 else 0
    first_view = max(views) if customers and views and min(views) <= 40 else 0
    whole = dump(server)
    assert dump(server, "sample_no IS NULL") == own
    assert ask(server, read_query(QUERIES, "query_2")) == the_three(DAY, first, first_view)
    for number in lost_customers:
        server.query(f"DELETE FROM customers WHERE sample_no = {number}")
    for number in lost_views:
        server.query(f"DELETE FROM page_views WHERE sample_no = {number}")
    load(server)
    assert dump(server) == whole


def test_an_own_row_keeps_an_id_that_was_the_samples(loaded: DatabaseServer) -> None:
    loaded.query("DELETE FROM customers WHERE id = 13")
    loaded.query("DELETE FROM page_views WHERE id = 1")
    loaded.query("INSERT INTO customers (id, email) VALUES (13, 'own@example.com')")
    loaded.query("INSERT INTO page_views (id, user_id, page, event_time) VALUES (1, 13, 'home', '2027-01-01')")
    own = dump(loaded, "sample_no IS NULL")
    for _ in range(2):
        load(loaded)
        assert dump(loaded, "sample_no IS NULL") == own
        assert loaded.query("SELECT id, email FROM customers WHERE sample_no = 13") == [(16, "noah.anderson@email.com")]
        assert loaded.query("SELECT id FROM page_views WHERE sample_no = 1") == [(41,)]
        assert ask(loaded, read_query(QUERIES, "query_2")) == the_three()


# Servers and clients of every setting


@pytest.mark.parametrize(
    "mode",
    [
        "",
        "ONLY_FULL_GROUP_BY",
        "TRADITIONAL",
        "ANSI,ONLY_FULL_GROUP_BY,NO_BACKSLASH_ESCAPES,HIGH_NOT_PRECEDENCE",
        "NO_AUTO_VALUE_ON_ZERO,NO_UNSIGNED_SUBTRACTION,PAD_CHAR_TO_FULL_LENGTH",
    ],
)
def test_both_files_run_in_the_client_with_any_sql_mode_and_character_set(empty: DatabaseServer, mode: str) -> None:
    usual = empty.query("SELECT @@global.sql_mode", database="")[0][0]
    empty.query(f"SET GLOBAL sql_mode = '{mode}'", database="")
    for _ in range(2):
        assert empty.load(SETUP, "--default-character-set=latin1") == ""
    printed = empty.load(QUERIES, "--default-character-set=utf8mb4")
    empty.query(f"SET GLOBAL sql_mode = '{usual}'", database="")
    today = empty.query("SELECT CURDATE()")[0][0]
    rows = the_three(datetime.combine(today, datetime.min.time()))
    assert printed == as_printed(rows) * 3
    assert empty.query("SELECT location FROM page_views WHERE id = 1") == [("Köln, DE",)]


def test_an_account_that_may_only_read_can_run_the_queries(loaded: DatabaseServer) -> None:
    reader = loaded.create_reader()
    assert loaded.load(QUERIES, settings=reader) == loaded.load(QUERIES) != ""
    with pytest.raises(RuntimeError, match="denied"):
        loaded.load(SETUP, settings=reader)


def test_each_query_has_its_name_and_says_what_it_shows() -> None:
    text = QUERIES.read_text(encoding="utf-8")
    assert tuple(re.findall(r"^-- name: (.*)\n-- \w", text, re.MULTILINE)) == QUERY_NAMES
    assert [text.count("ROW_NUMBER()"), text.count("GROUP BY")] == [2, 2]


# Query 2 and its index


@pytest.mark.parametrize("rows", ["the sample", "few recent", "all recent"])
def test_query_2_reads_page_views_from_the_index_alone(loaded: DatabaseServer, rows: str) -> None:
    if rows != "the sample":
        fill(loaded, customers=1000, views=8000, all_qualify=rows == "all recent")
    plan = explain(loaded, read_query(QUERIES, "query_2"))
    (step,) = [step for step in plan if step["table"] == "page_views"]
    assert (step["key"], "Using index" in step["Extra"].split("; ")) == ("page_views_recent", True)
    if rows == "few recent":
        assert (step["type"], int(step["rows"]) < 1000) == ("range", True)


def explain(server: DatabaseServer, query: str) -> list[dict[str, Any]]:
    with server.connect(DATABASE) as connection, connection.cursor(dictionary=True) as cursor:
        cursor.execute(f"EXPLAIN FORMAT = TRADITIONAL {query}")
        return list(cursor)


# Three ways to ask the same thing


WINDOW = DAY - timedelta(days=7)
# Few values of each, so that the same second, the edge of the window and a filter that just fails come up all the time.
text = st.none() | st.text("aé😀' ", max_size=3)
customer = st.tuples(st.sampled_from(["pro", "PRO", "prof"]), text, st.booleans())
view = st.tuples(
    st.integers(1, 4),
    st.sampled_from(["pricing", "Settings", "home"]),
    st.sampled_from([None, "desktop", "mobile"]),
    text,
    st.sampled_from([WINDOW - timedelta(seconds=1), WINDOW, NOON, NOON + timedelta(days=1)]),
)


def expected(customers: list[Any], views: list[Any]) -> list[tuple[Any, ...]]:
    """The latest matching view of each pro customer, found without SQL. Ids count from 1."""
    latest: dict[int, tuple[Any, ...]] = {}
    for id_, (user, page, browser, location, time) in enumerate(views, 1):
        if page.lower() in ("pricing", "settings") and time >= WINDOW:
            latest[user] = max(latest.get(user, (WINDOW,)), (time, id_, page, browser, location))
    rows = []
    for user, (plan, name, has_address) in enumerate(customers, 1):
        if plan.lower() == "pro" and user in latest:
            time, id_, page, browser, location = latest[user]
            address = f"{user}@example.com" if has_address else None
            rows.append((user, name, address, plan, id_, page, browser, location, time))
    return rows


@pytest.fixture(scope="module")
def session(server: DatabaseServer) -> Iterator[Any]:
    """A cursor at NOON in a database with empty tables, where views may be of customers that are not there."""
    load(server)
    server.query("CREATE DATABASE own_tables CHARACTER SET utf8mb4", database="")
    for table in ("customers", "page_views"):
        server.query(f"CREATE TABLE own_tables.{table} LIKE {DATABASE}.{table}")
    with server.connect("own_tables", autocommit=False) as connection, connection.cursor() as cursor:
        cursor.execute(f"SET timestamp = {seconds(NOON)}")
        yield cursor


@hypothesis_settings(max_examples=150, deadline=None)
@example([("pro", "Ann", True)], [(1, "pricing", None, None, WINDOW), (1, "home", None, None, WINDOW)])
@given(customers=st.lists(customer, max_size=3), views=st.lists(view, max_size=10))
def test_the_three_queries_give_the_same_rows_on_any_data(session: Any, customers: list[Any], views: list[Any]) -> None:
    session.executemany(
        "INSERT INTO customers (id, plan_type, first_name, email) VALUES (%s, %s, %s, %s)",
        [
            (id_, plan, name, f"{id_}@example.com" if has_address else None)
            for id_, (plan, name, has_address) in enumerate(customers, 1)
        ],
    )
    session.executemany(
        "INSERT INTO page_views (id, user_id, page, browser, location, event_time) VALUES (%s, %s, %s, %s, %s, %s)",
        [(id_, *row) for id_, row in enumerate(views, 1)],
    )
    found = {}
    for name in QUERY_NAMES:
        session.execute(read_query(QUERIES, name))
        found[name] = session.fetchall()
        assert session.column_names == COLUMNS
    session.execute("ROLLBACK")
    assert found == dict.fromkeys(QUERY_NAMES, expected(customers, views))
