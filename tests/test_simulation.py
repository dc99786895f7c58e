"""A month of runs, while users come, leave and return, and while runs are killed.

After each complete run Iterable holds what the database says: `recent_page_view` is
true for each user of the segment, false for each who was in it, and nobody else is
known. Deleted customers, old addresses and forgotten users are left as they were.

SIMULATION_RUNS is the number of runs, SIMULATION_SEED the seed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any, NamedTuple

import pytest

from lab.process import Ended, Running
from lab.segment import WAYS, CreateSegment, Segment, Way
from lab.standin_handle import StandIn

RUNS = int(os.environ.get("SIMULATION_RUNS", "20"))
SEED = int(os.environ.get("SIMULATION_SEED", "1"))
CUSTOMERS = 12
OPTIONS = ("--changed-only", "--reset-left")
SETTINGS = {"ITERABLE_MAX_ATTEMPTS": "2", "MAX_WORKERS": "3"}
LATENCY = 0.02  # seconds, so that a kill finds calls in flight
# The stand-in reads what lies in its sockets between the answers to so many questions.
SETTLING_QUESTIONS = 20

CUSTOMERS_NOW = """
SELECT id, email, first_name, EXISTS (
    SELECT * FROM page_views
    WHERE user_id = customers.id
        AND page IN ('pricing', 'settings')
        AND event_time >= CURDATE() - INTERVAL 7 DAY
) AND plan_type = 'pro'
FROM customers
"""
LATEST_VIEWS = """
SELECT user_id, MAX(id) FROM page_views
WHERE page IN ('pricing', 'settings')
GROUP BY user_id
"""


class Customer(NamedTuple):
    """A customer as the database has them now."""

    number: int
    identity: str
    email: str
    first_name: str
    is_in_segment: bool


class Month:
    """The customers and what happens to them, the runs, and what must come of it."""

    def __init__(self, segment: Segment, standin: StandIn, seed: int) -> None:
        self._segment = segment
        self._standin = standin
        self._chance = random.Random(seed)
        self._next_number = CUSTOMERS + 1
        # What Iterable held of a user from whom on nothing may be changed.
        self._left_alone: dict[str, dict[str, Any] | None] = {}
        self._forgotten: set[str] = set()
        # Identities that were in the segment at the time of a run, or of a killed one.
        self._seen: set[str] = set()
        self._seen_by_killed: set[str] = set()

    # The database

    def list_customers(self) -> list[Customer]:
        """Return all customers."""
        customers = []
        rows = self._segment.query(CUSTOMERS_NOW)
        for number, email, first_name, is_in_segment in rows:
            identity = email
            if self._segment.way.identify_by == "userId":
                identity = str(number)
            customers.append(
                Customer(
                    number=number,
                    identity=identity,
                    email=email,
                    first_name=first_name,
                    is_in_segment=bool(is_in_segment),
                )
            )
        return customers

    def change_something(self) -> None:
        """Let one thing happen to a customer."""
        customer = self._chance.choice(self.list_customers())
        changes = [
            (30, self._look),
            (25, self._leave),
            (10, self._downgrade),
            (10, self._upgrade),
            (10, self._rename),
            (8, self._move),
            (3, self._delete),
            (2, self._forget),
            (4, self._join),
        ]
        weights = [weight for weight, _ in changes]
        [(_, change)] = self._chance.choices(changes, weights)
        change(customer)

    def _look(self, customer: Customer, page: str = "") -> None:
        if not page:
            page = self._chance.choice(["pricing", "settings", "home"])
        self._segment.change(
            "INSERT INTO page_views (user_id, page, event_time)"
            f" VALUES ({customer.number}, '{page}', UTC_TIMESTAMP())"
        )

    def _leave(self, customer: Customer) -> None:
        self._segment.leave(customer.number)

    def _downgrade(self, customer: Customer) -> None:
        self._update(customer, "plan_type = 'basic'")

    def _upgrade(self, customer: Customer) -> None:
        self._update(customer, "plan_type = 'pro'")

    def _rename(self, customer: Customer) -> None:
        self._update(customer, f"first_name = 'Ann {self._chance.randrange(100)}'")

    def _update(self, customer: Customer, assignment: str) -> None:
        self._segment.change(
            f"UPDATE customers SET {assignment} WHERE id = {customer.number}"
        )

    def _move(self, customer: Customer) -> None:
        """Give the customer another address, which may be one from before."""
        email = f"{self._chance.randrange(3)}.of.{customer.number}@example.com"
        self._update(customer, f"email = '{email}'")
        if self._segment.way.identify_by == "email" and email != customer.email:
            self._leave_alone(customer)
            if email not in self._forgotten:
                self._left_alone.pop(email, None)

    def _delete(self, customer: Customer) -> None:
        self._segment.change(f"DELETE FROM customers WHERE id = {customer.number}")
        self._leave_alone(customer)

    def _forget(self, customer: Customer) -> None:
        """Let Iterable forget the user, at the user's own request."""
        self._leave_alone(customer)
        self._forgotten.add(customer.identity)
        self._standin.configure(forgotten=sorted(self._forgotten))

    def _leave_alone(self, customer: Customer) -> None:
        users = self._standin.state()["users"]
        identity = customer.identity
        self._left_alone.setdefault(identity, users.get(identity))

    def _join(self, _: Customer) -> None:
        number = self._next_number
        self._next_number += 1
        self._segment.change(
            "INSERT INTO customers (id, first_name, email, plan_type)"
            f" VALUES ({number}, 'New', 'new{number}@example.com', 'pro')"
        )

    # The runs

    def run(self) -> None:
        """Run to the end, without anything going wrong."""
        self._note_segment()
        ended = self._segment.run(*OPTIONS, **SETTINGS)
        assert ended.exit_code == 0, ended.console
        assert ended.errors == ""

    def run_with_refusals(self) -> None:
        """Run while Iterable refuses a changed user, and loses an answer.

        The user leaves before the next run.
        """
        customers = self.list_customers()
        present = [each for each in customers if each.is_in_segment]
        customer = self._chance.choice(present or customers)
        self._rename(customer)
        self._note_segment()
        self._standin.fault(status=400, user=customer.identity)
        self._standin.fault("cut", skip=self._chance.randrange(5), times=1)
        self._segment.run(*OPTIONS, **SETTINGS)
        self._standin.clear_faults()
        self._leave(customer)

    def run_and_stop(self) -> None:
        """Stop a run after some calls by SIGTERM."""
        self._note_segment()
        running = self._start_slowly()
        running.signal(signal.SIGTERM)
        assert self._end(running).exit_code in (0, 143)

    def run_and_kill(self) -> None:
        """Kill a run after some calls.

        Some users come just before the run, and some leave just after it, so there are
        users in flight who are not there any more when the next run starts.
        """
        self._let_some_come()
        self._note_segment()
        running = self._start_slowly()
        running.process.kill()
        assert self._end(running).exit_code in (0, 137)
        for customer in self.list_customers():
            if customer.is_in_segment:
                self._seen_by_killed.add(customer.identity)
                if self._chance.random() < 0.6:
                    self._leave(customer)

    def _let_some_come(self) -> None:
        """Let some users who are not in the segment look at the pricing page."""
        others = [each for each in self.list_customers() if not each.is_in_segment]
        for customer in self._chance.sample(others, min(5, len(others))):
            self._upgrade(customer)
            self._look(customer, "pricing")

    def _note_segment(self) -> None:
        for customer in self.list_customers():
            if customer.is_in_segment:
                self._seen.add(customer.identity)

    def _start_slowly(self) -> Running:
        """Start a run, and return when it has made some calls or has ended."""
        self._standin.configure(latency=LATENCY)
        calls = self._chance.randrange(3 if self._segment.way.bulk else 10)
        expected = self._standin.count_calls() + calls
        running = self._segment.start(*OPTIONS, **SETTINGS)
        running.wait_for("[STEP 5] Processing user records...")
        while self._standin.count_calls() < expected:
            if running.process.poll() is not None:
                break
            time.sleep(0.002)
        return running

    def _end(self, running: Running) -> Ended:
        """Wait for the run, and until Iterable has processed all that was sent."""
        ended = running.wait()
        self._standin.configure(latency=0)
        for _ in range(SETTLING_QUESTIONS):
            self._standin.count_calls()
        return ended

    def live_for_an_hour(self) -> None:
        """Let some things happen, and run. Check Iterable if the run was complete."""
        for _ in range(self._chance.randrange(1, 5)):
            self.change_something()
        runs = [
            (50, self.run),
            (15, self.run_with_refusals),
            (10, self.run_and_stop),
            (25, self.run_and_kill),
        ]
        weights = [weight for weight, _ in runs]
        [(_, run)] = self._chance.choices(runs, weights)
        run()
        if run == self.run:
            self.check()

    # What must come of it

    def check(self) -> None:
        """Compare Iterable with the database."""
        state = self._standin.state()
        users = state["users"]
        assert state["violations"] == []
        assert users.keys() <= self._seen
        for identity, fields in self._left_alone.items():
            assert users.get(identity) == fields, identity
        for customer in self.list_customers():
            if customer.identity in self._left_alone:
                continue
            if customer.is_in_segment:
                assert users[customer.identity] == self._expected_fields(customer)
            elif customer.identity in users:
                self._check_reset(customer, users[customer.identity])
        self._check_events(state["events"])

    def _expected_fields(self, customer: Customer) -> dict[str, Any]:
        fields = {
            "first_name": customer.first_name,
            "plan_type": "pro",
            "recent_page_view": True,
            "candidate": "yes",
        }
        if self._segment.way.identify_by == "userId":
            fields["email"] = customer.email
        return fields

    def _check_reset(self, customer: Customer, fields: dict[str, Any]) -> None:
        assert fields["recent_page_view"] is False, customer
        # Nobody knows whether the update of a user in flight at a kill arrived.
        if fields == {"recent_page_view": False}:
            assert customer.identity in self._seen_by_killed

    def _check_events(self, events: dict[str, dict[str, Any]]) -> None:
        """Check that the latest view of each user of the segment has arrived."""
        latest = dict(self._segment.query(LATEST_VIEWS))
        key = self._segment.way.identify_by
        for customer in self.list_customers():
            is_left_alone = customer.identity in self._left_alone
            if customer.is_in_segment and not is_left_alone:
                event = events[f"page-view-{latest[customer.number]}"]
                assert event[key] == customer.identity

    def check_nothing_is_left(self) -> None:
        """Check that one more run sends nothing but to users who were forgotten."""
        self.run()
        assert {user for _, user in self._segment.sent()} <= self._forgotten


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_month_of_runs(
    create_segment: CreateSegment, standin: StandIn, way: Way
) -> None:
    segment = create_segment(way, CUSTOMERS)
    month = Month(segment, standin, SEED)

    for _ in range(RUNS):
        month.live_for_an_hour()
    month.run()

    month.check()
    month.check_nothing_is_left()
