"""What several tests expect, each in its one place.

The users are those of the fixture `create_customers`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from lab.process import Ended
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

# The calls in a user's line of the results file, with their endpoints.
CALLS = {"users_update": USERS_UPDATE, "events_track": EVENTS_TRACK}
# Where the summary counts the users of a status.
COUNTED_AS = {
    "success": "success",
    "partial_failure": "partial_failures",
    "total_failure": "total_failures",
    "forgotten": "forgotten",
    "reset": "reset",
    "not_attempted": "not_attempted",
}


def address(number: int) -> str:
    """The address of the customer with this number."""
    return f"user{number}@example.com"


def user_fields(**changes: Any) -> dict[str, Any]:
    """What Iterable holds of a customer who was delivered, with these differences."""
    return {
        "first_name": "Ann",
        "plan_type": "pro",
        "recent_page_view": True,
        "candidate": "yes",
        **changes,
    }


def list_calls(standin: StandIn) -> list[tuple[str, str]]:
    """(endpoint, user) of each single call that arrived, in the order of arrival."""
    return [
        (call["endpoint"], call["user"])
        for call in standin.state()["journal"]
        if call["user"] is not None
    ]


def find_delivered(standin: StandIn) -> set[str]:
    """The users that Iterable holds. Fails if their events are not theirs, one each."""
    state = standin.state()
    owners = [
        event.get("email") or event["userId"] for event in state["events"].values()
    ]
    assert sorted(owners) == sorted(state["users"])
    return set(owners)


def assert_counts_add_up(ended: Ended) -> None:
    """Check that each user has one line, and that the summary counts the lines."""
    document = ended.results
    summary = document["summary"]
    lines = document["results"]
    counted = Counter(COUNTED_AS[line["status"]] for line in lines)
    assert counted == Counter(
        {name: summary.get(name, 0) for name in COUNTED_AS.values()}
    )
    assert summary["total_users"] == len(lines) + summary["unchanged"]
    assert len(ended.lines) == len(lines)
    assert list(ended.folder.glob("*.partial")) == []


def assert_record_is_true(ended: Ended, standin: StandIn) -> None:
    """Check each user's line, after a run of single calls, by what the stand-in saw."""
    assert_counts_add_up(ended)
    state = standin.state()
    attempts: Counter[tuple[str, str]] = Counter()
    for line in ended.lines.values():
        for name, endpoint in CALLS.items():
            call = line[name]
            if call is not None:
                attempts[line["email"], endpoint] = call["attempts"]
        has_update = line["email"] in state["users"]
        has_event = line["event_id"] in state["events"]
        assert was_accepted(line["users_update"]) == has_update
        assert was_accepted(line["events_track"]) == has_event
        assert line["status"] == expected_status(
            line, has_update=has_update, has_event=has_event
        )
    arrived = Counter((call["user"], call["endpoint"]) for call in state["journal"])
    assert attempts == arrived
    assert ended.results["summary"]["calls"] == arrived.total()


def was_accepted(call: dict[str, Any] | None) -> bool:
    """Whether a call of a user's line was made and succeeded."""
    return call is not None and call["ok"]


def expected_status(line: dict[str, Any], *, has_update: bool, has_event: bool) -> str:
    """The status of a user of whom Iterable has this."""
    if line["users_update"] is None and line["events_track"] is None:
        return "not_attempted"
    if has_update and has_event:
        return "success"
    if has_update or has_event:
        return "partial_failure"
    return "total_failure"
