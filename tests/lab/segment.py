"""Customers who come into the segment and leave it, and the runs that deliver them.

The segment is what query 2 finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lab.database import DatabaseServer
from lab.expected import address, user_fields
from lab.process import CreateCustomers, Ended, Running, StartMain
from lab.standin_handle import (
    EVENTS_TRACK,
    EVENTS_TRACK_BULK,
    USERS_BULK_UPDATE,
    USERS_UPDATE,
    StandIn,
)

SINGLE_ENDPOINTS = {
    USERS_UPDATE: USERS_UPDATE,
    USERS_BULK_UPDATE: USERS_UPDATE,
    EVENTS_TRACK: EVENTS_TRACK,
    EVENTS_TRACK_BULK: EVENTS_TRACK,
}


class Way(NamedTuple):
    """How a run names its users, and whether it sends them in groups."""

    identify_by: str
    bulk: bool = False

    def __str__(self) -> str:
        name = self.identify_by
        return f"{name} in bulk" if self.bulk else f"{name} singly"

    @property
    def options(self) -> tuple[str, ...]:
        """The option of the command line."""
        return ("--bulk",) if self.bulk else ()

    def identity(self, number: int) -> str:
        """The identity of the customer with this number."""
        return str(number) if self.identify_by == "userId" else address(number)

    def user_fields(self, number: int, **changes: Any) -> dict[str, Any]:
        """What Iterable holds of a delivered customer, with these differences."""
        if self.identify_by == "userId":
            return user_fields(email=address(number), **changes)
        return user_fields(**changes)


SINGLE_WAYS = [Way("email"), Way("userId")]
WAYS = [*SINGLE_WAYS, Way("email", bulk=True), Way("userId", bulk=True)]


class Segment:
    """The customers of a database, an Iterable project, and runs from one to the other.

    The customers are those of the fixture `create_customers`.
    """

    def __init__(
        self,
        way: Way,
        *,
        database: dict[str, str],
        server: DatabaseServer,
        standin: StandIn,
        start_main: StartMain,
    ) -> None:
        self.way = way
        self.database = database
        self._server = server
        self._standin = standin
        self._start_main = start_main
        self._calls_before = 0
        standin.configure(identify_by=way.identify_by)

    def run(self, *options: str, **settings: Any) -> Ended:
        """Run the program to the end."""
        return self.start(*options, **settings).wait()

    def start(self, *options: str, **settings: Any) -> Running:
        """Start the program."""
        self._calls_before = len(self._standin.state()["journal"])
        settings = {"ITERABLE_IDENTIFY_BY": self.way.identify_by, **settings}
        options = (*self.way.options, *options)
        return self._start_main(*options, database=self.database, **settings)

    def change(self, sql: str) -> None:
        """Change the tables by a statement."""
        self.query(sql)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query of the tables."""
        return self._server.query(sql, self.database["DB_NAME"])

    def leave(self, *numbers: int) -> None:
        """Let the views of customers become too old."""
        self._move_views(numbers, days=-30)

    def come_back(self, *numbers: int) -> None:
        """Undo `leave`, so that the same payloads are to be sent again."""
        self._move_views(numbers, days=30)

    def _move_views(self, numbers: tuple[int, ...], *, days: int) -> None:
        ids = ", ".join(str(number) for number in numbers)
        self.change(
            f"UPDATE page_views SET event_time = event_time + INTERVAL {days} DAY"
            f" WHERE user_id IN ({ids})"
        )

    def sent(self) -> list[tuple[str, str]]:
        """The updates and events of the latest run, in order of arrival.

        Each is (endpoint, user), with the single endpoint also for those in groups.
        """
        sent = []
        for call in self._standin.state()["journal"][self._calls_before :]:
            endpoint = SINGLE_ENDPOINTS[call["endpoint"]]
            sent += [(endpoint, user) for user in call["users"]]
        return sent

    def deliveries(self, *numbers: int) -> list[tuple[str, str]]:
        """What `sent` is, sorted, when these users were delivered, each once."""
        users = [self.way.identity(number) for number in numbers]
        updates = [(USERS_UPDATE, user) for user in users]
        events = [(EVENTS_TRACK, user) for user in users]
        return sorted(updates + events)

    def resets(self, *numbers: int) -> list[tuple[str, str]]:
        """What `sent` is, sorted, when these users were reset, each once."""
        return sorted((USERS_UPDATE, self.way.identity(number)) for number in numbers)

    def set_users(self) -> set[str]:
        """The users whose field is true in Iterable."""
        return self._users_with(recent_page_view=True)

    def reset_users(self) -> set[str]:
        """The users whose field is false in Iterable."""
        return self._users_with(recent_page_view=False)

    def _users_with(self, *, recent_page_view: bool) -> set[str]:
        users = self._standin.state()["users"]
        return {
            name
            for name, fields in users.items()
            if fields.get("recent_page_view") is recent_page_view
        }

    def identities(self, *numbers: int) -> set[str]:
        """The identities of customers."""
        return {self.way.identity(number) for number in numbers}


class CreateSegment:
    """Type and value of a fixture: creates customers, whom no run has sent yet."""

    def __init__(
        self,
        *,
        create_customers: CreateCustomers,
        server: DatabaseServer,
        standin: StandIn,
        start_main: StartMain,
    ) -> None:
        self._create_customers = create_customers
        self._server = server
        self._standin = standin
        self._start_main = start_main

    def __call__(
        self, way: Way, rows: int | Sequence[Mapping[str, Any]] = 3
    ) -> Segment:
        """Create customers; `rows` are those of `create_customers`."""
        return Segment(
            way,
            database=self._create_customers(rows),
            server=self._server,
            standin=self._standin,
            start_main=self._start_main,
        )
