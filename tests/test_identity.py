"""`ITERABLE_IDENTIFY_BY=userId`: projects that know their users by a user ID."""

from __future__ import annotations

from typing import Any

import pytest

from lab.database import DatabaseServer
from lab.expected import address, assert_counts_add_up, find_delivered
from lab.process import CreateCustomers, RunMain
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

BY_USER_ID: dict[str, Any] = {"ITERABLE_IDENTIFY_BY": "userId"}
WAYS = [(), ("--bulk",)]
WAY_NAMES = ["singly", "in bulk"]
LONGEST_USER_ID = "a" * 52

in_each_way = pytest.mark.parametrize("options", WAYS, ids=WAY_NAMES)


@pytest.fixture
def user_id_project(standin: StandIn) -> StandIn:
    """A project that takes no address as identity."""
    standin.configure(identify_by="userId")
    return standin


@pytest.fixture
def hybrid_project(standin: StandIn) -> StandIn:
    """A project that takes either identity, and each address once."""
    standin.configure(identify_by="hybrid")
    return standin


def allow_any_value(server: DatabaseServer, database: dict[str, str]) -> None:
    """Let customers have ids that are texts, and addresses of others."""
    name = database["DB_NAME"]
    text = "VARCHAR(100) COLLATE utf8mb4_bin NOT NULL"
    server.query(f"ALTER TABLE customers MODIFY id {text}", name)
    server.query(f"ALTER TABLE page_views MODIFY user_id {text}", name)
    server.query("ALTER TABLE customers DROP KEY customers_email", name)


def rename_customer(
    server: DatabaseServer, database: dict[str, str], number: int, user_id: str
) -> None:
    name = database["DB_NAME"]
    text = user_id.replace("\\", "\\\\").replace("'", "''")
    server.query(f"UPDATE customers SET id = '{text}' WHERE id = '{number}'", name)
    server.query(
        f"UPDATE page_views SET user_id = '{text}' WHERE user_id = '{number}'", name
    )


# What is sent


@in_each_way
def test_users_and_events_have_the_user_id(
    run_main: RunMain,
    create_customers: CreateCustomers,
    user_id_project: StandIn,
    options: tuple[str, ...],
) -> None:
    database = create_customers([{}, {"id": 70, "view_id": 9, "email": " X@Y.Org "}])

    ended = run_main(*options, database=database, **BY_USER_ID)

    assert ended.exit_code == 0
    assert ended.errors == ""
    state = user_id_project.state()
    assert state["violations"] == []
    fields = {
        "first_name": "Ann",
        "plan_type": "pro",
        "recent_page_view": True,
        "candidate": "yes",
    }
    assert state["users"] == {
        "1": {"email": "user1@example.com", **fields},
        "70": {"email": "x@y.org", **fields},
    }
    owners = {name: event["userId"] for name, event in state["events"].items()}
    assert owners == {"page-view-1": "1", "page-view-9": "70"}


def test_the_results_file_names_the_identity(
    run_main: RunMain, create_customers: CreateCustomers, user_id_project: StandIn
) -> None:
    ended = run_main(database=create_customers(1), **BY_USER_ID)

    assert ended.results["run"]["identify_by"] == "userId"
    assert ended.lines[1]["user_id"] == 1
    assert ended.lines[1]["email"] == address(1)
    assert find_delivered(user_id_project) == {"1"}


def test_addresses_are_the_default(
    run_main: RunMain, create_customers: CreateCustomers, standin: StandIn
) -> None:
    ended = run_main(database=create_customers(1))

    assert ended.results["run"]["identify_by"] == "email"
    assert find_delivered(standin) == {address(1)}


def test_a_dry_run_shows_the_user_id(
    run_main: RunMain, create_customers: CreateCustomers
) -> None:
    ended = run_main("--dry-run", database=create_customers(1), **BY_USER_ID)

    payloads = ended.lines[1]["payloads"]
    assert payloads["users_update"]["userId"] == "1"
    assert payloads["users_update"]["dataFields"]["email"] == address(1)
    assert payloads["events_track"]["userId"] == "1"
    assert 'users/update {"userId": "1"' in ended.console


# Addresses are a field


@in_each_way
def test_a_user_needs_no_address(
    run_main: RunMain,
    create_customers: CreateCustomers,
    user_id_project: StandIn,
    options: tuple[str, ...],
) -> None:
    addresses = [None, "  ", address(3)]
    database = create_customers([{"email": email} for email in addresses])

    ended = run_main(*options, database=database, **BY_USER_ID)

    assert ended.exit_code == 0
    users = user_id_project.state()["users"]
    assert "email" not in users["1"]
    assert "email" not in users["2"]
    assert users["3"]["email"] == address(3)


def test_a_changed_address_stays_the_same_user(
    run_main: RunMain,
    create_customers: CreateCustomers,
    server: DatabaseServer,
    user_id_project: StandIn,
) -> None:
    database = create_customers(2)
    run_main(database=database, **BY_USER_ID)
    server.query(
        "UPDATE customers SET email = 'new@example.com' WHERE id = 2",
        database["DB_NAME"],
    )

    ended = run_main("--changed-only", database=database, **BY_USER_ID)

    assert ended.summary["success"] == 1
    users = user_id_project.state()["users"]
    assert {name: user["email"] for name, user in users.items()} == {
        "1": address(1),
        "2": "new@example.com",
    }


@in_each_way
def test_two_customers_may_have_one_address(
    run_main: RunMain,
    create_customers: CreateCustomers,
    server: DatabaseServer,
    user_id_project: StandIn,
    options: tuple[str, ...],
) -> None:
    database = create_customers(2)
    allow_any_value(server, database)
    server.query(f"UPDATE customers SET email = '{address(1)}'", database["DB_NAME"])

    ended = run_main(*options, database=database, **BY_USER_ID)

    assert ended.exit_code == 0
    assert find_delivered(user_id_project) == {"1", "2"}


@in_each_way
def test_a_hybrid_project_refuses_a_second_address(
    run_main: RunMain,
    create_customers: CreateCustomers,
    server: DatabaseServer,
    hybrid_project: StandIn,
    options: tuple[str, ...],
) -> None:
    database = create_customers(2)
    run_main("--limit", "1", database=database, **BY_USER_ID)
    allow_any_value(server, database)
    server.query(f"UPDATE customers SET email = '{address(1)}'", database["DB_NAME"])

    ended = run_main(*options, database=database, **BY_USER_ID)

    assert ended.exit_code == 1
    assert ended.lines[1]["status"] == "success"
    assert ended.lines[2]["users_update"]["code"] == "EmailAlreadyExists"
    [reason] = ended.summary["failure_reasons"]
    assert reason["endpoint"] == USERS_UPDATE
    assert "another user of the project has this identity" in reason["message"]
    assert "2" not in hybrid_project.state()["users"]
    assert_counts_add_up(ended)


@in_each_way
def test_an_invalid_address_fails_the_update(
    run_main: RunMain,
    create_customers: CreateCustomers,
    user_id_project: StandIn,
    options: tuple[str, ...],
) -> None:
    database = create_customers([{"email": "x@nowhere"}, {}])

    ended = run_main(*options, database=database, **BY_USER_ID)

    assert ended.exit_code == 1
    assert ended.lines[1]["users_update"]["code"] == "InvalidEmailAddressError"
    assert ended.lines[2]["status"] == "success"
    assert set(user_id_project.state()["users"]) == {"2"}


# Which ids are user IDs


def create_customers_with_ids(
    create_customers: CreateCustomers, server: DatabaseServer, user_ids: list[str]
) -> dict[str, str]:
    """Create a customer for each of the ids, which are texts."""
    database = create_customers(len(user_ids))
    allow_any_value(server, database)
    for number, user_id in enumerate(user_ids, 1):
        rename_customer(server, database, number, user_id)
    return database


@in_each_way
def test_printable_ids_are_sent_as_they_are(
    run_main: RunMain,
    create_customers: CreateCustomers,
    server: DatabaseServer,
    user_id_project: StandIn,
    options: tuple[str, ...],
) -> None:
    user_ids = ["0", "007", "a b", "O'Neil\\n", "{}~", "Ann", "ann", LONGEST_USER_ID]
    database = create_customers_with_ids(create_customers, server, user_ids)

    ended = run_main(*options, database=database, **BY_USER_ID)

    assert ended.exit_code == 0
    assert user_id_project.state()["violations"] == []
    assert find_delivered(user_id_project) == set(user_ids)


def test_other_ids_fail_without_a_call(
    run_main: RunMain,
    create_customers: CreateCustomers,
    server: DatabaseServer,
    user_id_project: StandIn,
) -> None:
    wrong_ids = ["", " 1", "1 ", "a\tb", "Zoë", LONGEST_USER_ID + "a"]
    user_ids = [*wrong_ids, "good"]
    database = create_customers_with_ids(create_customers, server, user_ids)

    ended = run_main(database=database, **BY_USER_ID)

    assert ended.exit_code == 1
    problems = {
        line["user_id"]: line["problem"]
        for line in ended.lines.values()
        if line["status"] == "total_failure"
    }
    assert set(problems) == set(wrong_ids)
    for problem in problems.values():
        assert "cannot be a user ID" in problem
    assert "6 users: customers.id cannot be a user ID" in ended.console
    assert find_delivered(user_id_project) == {"good"}
    assert len(user_id_project.state()["journal"]) == 2


def test_with_addresses_any_id_is_delivered(
    run_main: RunMain,
    create_customers: CreateCustomers,
    server: DatabaseServer,
    standin: StandIn,
) -> None:
    database = create_customers(1)
    allow_any_value(server, database)
    rename_customer(server, database, 1, "Zoë ")

    ended = run_main(database=database)

    assert ended.exit_code == 0
    assert find_delivered(standin) == {address(1)}


# The wrong identity, and a change of it


@in_each_way
@pytest.mark.parametrize(
    ("project", "identify_by", "message"),
    [
        ("userId", "email", "This project identifies users by userId"),
        ("email", "userId", "email is required"),
    ],
)
def test_a_project_of_the_other_kind_says_so(
    run_main: RunMain,
    create_customers: CreateCustomers,
    standin: StandIn,
    options: tuple[str, ...],
    project: str,
    identify_by: str,
    message: str,
) -> None:
    standin.configure(identify_by=project)

    ended = run_main(
        *options, database=create_customers(2), ITERABLE_IDENTIFY_BY=identify_by
    )

    assert ended.exit_code == 1
    assert message in ended.console
    assert ended.summary["total_failures"] == 2
    assert standin.state()["users"] == {}


def test_another_identity_starts_everyone_anew(
    run_main: RunMain, create_customers: CreateCustomers, hybrid_project: StandIn
) -> None:
    database = create_customers(2)
    run_main(database=database, **BY_USER_ID)

    ended = run_main("--changed-only", database=database)

    assert ended.summary["success"] == 2
    assert hybrid_project.count_calls(EVENTS_TRACK) == 4


def test_an_unknown_identity_is_refused(
    run_main: RunMain, create_customers: CreateCustomers, standin: StandIn
) -> None:
    ended = run_main(database=create_customers(1), ITERABLE_IDENTIFY_BY="userid")

    assert ended.exit_code == 2
    assert "ITERABLE_IDENTIFY_BY must be one of email, userId" in ended.console
    assert standin.counters()["connections"] == 0


# Forgotten users


@in_each_way
def test_forgotten_users_are_known_by_user_id(
    run_main: RunMain,
    create_customers: CreateCustomers,
    user_id_project: StandIn,
    options: tuple[str, ...],
) -> None:
    user_id_project.configure(forgotten=["2"])

    ended = run_main(*options, database=create_customers(3), **BY_USER_ID)

    assert ended.exit_code == 0
    assert ended.lines[2]["status"] == "forgotten"
    assert ended.lines[2]["events_track"] is None
    assert find_delivered(user_id_project) == {"1", "3"}


def test_poison_of_a_user_id_stops_no_other(
    run_main: RunMain, create_customers: CreateCustomers, user_id_project: StandIn
) -> None:
    user_id_project.poison("2")

    ended = run_main(
        database=create_customers(3), ITERABLE_MAX_ATTEMPTS="2", **BY_USER_ID
    )

    assert ended.exit_code == 1
    assert ended.lines[2]["users_update"]["status"] == 500
    assert find_delivered(user_id_project) == {"1", "3"}
