"""The stand-in is as strict as the API, and does what it is told to: else other tests would prove nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lab.standin import LastSecond, field_types
from lab.standin_handle import EVENTS_TRACK, EVENTS_TRACK_BULK, KEY, USERS_BULK_UPDATE, USERS_UPDATE, StandIn

HEADERS = {"Api-Key": KEY, "Content-Type": "application/json", "User-Agent": "test/1.0"}
ANN, BOB, CAT = "ann@example.com", "bob@example.com", "cat@example.com"
USER = {"email": ANN, "dataFields": {"plan_type": "pro"}}
EVENT = {"email": ANN, "eventName": "page_view", "id": "page-view-1", "createdAt": 1_768_314_645}
BODIES = {USERS_UPDATE: USER, EVENTS_TRACK: EVENT, USERS_BULK_UPDATE: {"users": [USER]}}
BODIES[EVENTS_TRACK_BULK] = {"events": [EVENT]}


@pytest.fixture
def client(standin: StandIn) -> Iterator[Client]:
    standin.configure(key=KEY, limit_users=500, limit_events=2000)
    with contextlib.closing(Client("127.0.0.1", standin.port, timeout=5)) as client:
        yield client


class Client(http.client.HTTPConnection):
    def call(self, endpoint: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any]:
        """The status, and the JSON of the answer."""
        content = body if isinstance(body, bytes) else json.dumps(body)
        self.request(method, f"/api/{endpoint}", content, HEADERS | headers)
        response = self.getresponse()
        return response.status, json.loads(response.read())

    def update(self, *emails: str, **fields: Any) -> tuple[int, Any]:
        return self.call(USERS_BULK_UPDATE, {"users": [{"email": email, "dataFields": fields} for email in emails]})

    def track(self, *emails: str) -> tuple[int, Any]:
        return self.call(EVENTS_TRACK_BULK, {"events": [{**EVENT, "email": e, "id": e[:3]} for e in emails]})


def counts(success: int, fail: int, created: tuple[str, ...] = (), *, events: bool = False, **failed: Any) -> Any:
    """A whole answer of a bulk endpoint."""
    names = ("invalid", "notFound", "forgotten") if events else ("invalid", "notFound", "forgotten", "invalidData")
    lists = {
        f"{name}{who}": [] for name in (*names, *(() if events else ("conflict",))) for who in ("Emails", "UserIds")
    }
    answer = {"successCount": success, "failCount": fail, "invalidEmails": failed.get("invalidEmails", [])}
    answer |= {"invalidUserIds": [], "createdFields": [*created], "filteredOutFields": []}
    return 200, {**answer, "failedUpdates": lists | failed} | ({"disallowedEventNames": []} if events else {})


def test_single_calls_are_stored_under_address_and_id(standin: StandIn, client: Client) -> None:
    """A field left out keeps its value, null removes it."""
    client.call(USERS_UPDATE, {"email": "Ann@Example.com", "dataFields": {"first_name": "Ann", "page": "x"}})
    assert (
        client.call(USERS_UPDATE, {"email": ANN, "dataFields": {"plan_type": "pro", "page": None}})[1]["params"] is None
    )
    assert [client.call(EVENTS_TRACK, EVENT)[1]["params"] for _ in range(2)] == [{"id": "page-view-1"}] * 2
    state = standin.state()
    assert state["users"] == {ANN: {"first_name": "Ann", "plan_type": "pro"}}
    assert state["events"] == {"page-view-1": {key: value for key, value in EVENT.items() if key != "id"}}
    counted = {USERS_UPDATE: {ANN: 2}, EVENTS_TRACK: {"page-view-1": 2}}
    assert state["accepted"] == {USERS_BULK_UPDATE: {}, EVENTS_TRACK_BULK: {}, **counted}


WRONG_ITEMS: list[tuple[str, Any, str, Any]] = [
    (USERS_UPDATE, [], "BadJsonBody", {"": "Object expected"}),
    (USERS_UPDATE, {**USER, "name": "Ann"}, "BadParams", None),
    (USERS_UPDATE, {"email": None}, "BadJsonBody", {".email": "String value expected"}),
    (EVENTS_TRACK, {**EVENT, "eventName": ""}, "BadParams", None),
    (EVENTS_TRACK, {**EVENT, "createdAt": 1_768_314_645_000}, "BadParams", None),
    (EVENTS_TRACK, {**EVENT, "createdAt": 1.0}, "BadJsonBody", {".createdAt": "Number value expected"}),
    *((EVENTS_TRACK, {**EVENT, "id": i}, "BadParams", None) for i in ("", "page_view", "1\n", "x" * 513)),
]


@pytest.mark.parametrize(("endpoint", "item", "code", "params"), WRONG_ITEMS)
def test_a_wrong_item_is_a_violation_alone_and_in_a_group(
    standin: StandIn, client: Client, endpoint: str, item: Any, code: str, params: dict[str, str] | None
) -> None:
    """A group's answer tells its index, and nobody of the group is stored."""
    bulk, name = (USERS_BULK_UPDATE, "users") if endpoint == USERS_UPDATE else (EVENTS_TRACK_BULK, "events")
    for where, body, path in (
        (endpoint, item, "obj"),
        (bulk, {name: [{**BODIES[endpoint], "email": BOB}, item]}, f"obj.{name}[1]"),
    ):
        status, answer = client.call(where, body)
        assert (status, answer["code"]) == (400, code)
        assert answer["params"] == (params and {path + key: text for key, text in params.items()})
    state = standin.state()
    assert (state["users"], state["events"], len(state["violations"])) == ({}, {}, 2)


TWICE = {"events": [EVENT, {**EVENT, "email": ANN.upper()}]}
TOO_MANY = {"users": [{"email": f"{n}@example.com"} for n in range(1001)]}
TOO_LARGE = {"users": [USER | {"dataFields": {"a": "x" * 4_000_000}}]}
WRONG_REQUESTS: list[tuple[str, Any, dict[str, str], int, str]] = [
    (USERS_UPDATE, b'{"email": NaN}', {}, 400, "BadJsonBody"),
    (USERS_BULK_UPDATE, {"users": []}, {}, 400, "InvalidEmailAddressError"),
    (USERS_BULK_UPDATE, {"users": USER}, {}, 400, "BadJsonBody"),
    (EVENTS_TRACK_BULK, {"events": [EVENT], "users": []}, {}, 400, "BadParams"),
    (EVENTS_TRACK_BULK, TWICE, {}, 400, "BadParams"),
    (USERS_BULK_UPDATE, TOO_MANY, {}, 400, "BatchTooLarge"),
    (USERS_BULK_UPDATE, TOO_LARGE, {}, 413, "RequestEntityTooLarge"),
    (USERS_UPDATE, USER, {"Content-Type": "text/plain"}, 400, "BadJsonBody"),
    (USERS_UPDATE, USER, {"User-Agent": "python-requests/2.34.2"}, 400, "BadParams"),
    (USERS_UPDATE, USER, {"method": "PUT"}, 405, "BadParams"),
    ("users/delete", USER, {}, 404, "NotFound"),
]


@pytest.mark.parametrize(("endpoint", "body", "headers", "status", "code"), WRONG_REQUESTS)
def test_a_request_that_no_correct_program_sends(
    standin: StandIn, client: Client, endpoint: str, body: Any, headers: dict[str, str], status: int, code: str
) -> None:
    answer = client.call(endpoint, body, **headers)
    assert (answer[0], answer[1]["code"]) == (status, code)
    state = standin.state()
    assert (state["users"], state["events"], len(state["violations"])) == ({}, {}, 1)


def test_what_the_data_or_the_settings_are_to_blame_for_is_no_violation(standin: StandIn, client: Client) -> None:
    standin.configure(forgotten=["Bob@example.com"], disallowed=["spam"])
    bad = ("bad@", "an n@example.com", "ann@localhost", "a@b@example.com", f"{CAT} ", "000", "")
    for endpoint, item in ((USERS_UPDATE, USER), (EVENTS_TRACK, EVENT)):
        codes = [client.call(endpoint, {**item, "email": email})[1]["code"] for email in bad]
        assert codes == ["InvalidEmailAddressError"] * len(bad)
        assert client.call(endpoint, {**item, "email": "BOB@example.com"})[0] == 409
    assert client.call(USERS_UPDATE, {}, **{"Api-Key": "wrong"})[0] == 401
    assert client.call(USERS_UPDATE, {})[0] == 400  # this is how a key is tried
    assert (
        client.call(EVENTS_TRACK, {**EVENT, "eventName": "spam"})[1]["msg"] == "Event spam is disallowed from tracking"
    )
    state = standin.state()
    assert (state["users"], state["events"], state["violations"]) == ({}, {}, [])


def test_a_group_is_taken_but_for_those_whom_the_answer_names(standin: StandIn, client: Client) -> None:
    """In lower case. Unknown users have no events; the journal has every address."""
    standin.configure(forgotten=[BOB], refused={USERS_BULK_UPDATE: {CAT: ["conflictEmails", "old@example.com"]}})
    failed = {"invalidEmails": ["bad@"], "forgottenEmails": [BOB], "conflictEmails": ["old@example.com"]}
    answer = client.update("Ann@example.com", "BAD@", "Bob@example.com", CAT, plan_type="pro")
    assert answer == counts(1, 3, ("plan_type",), **failed)
    assert client.track(ANN, "Cat@example.com", "000") == counts(
        1, 2, events=True, invalidEmails=["000"], notFoundEmails=[CAT]
    )
    assert client.call(EVENTS_TRACK_BULK, {"events": []}) == counts(0, 0, events=True)
    standin.configure(refused={USERS_BULK_UPDATE: {ANN: None}}, list_unknown=False, disallowed=["page_view"])
    assert client.update(ANN, CAT) == counts(1, 1)
    _, answer = client.track("dan@example.com")
    assert (answer["successCount"], answer["disallowedEventNames"]) == (1, ["page_view"])
    state = standin.state()
    assert (state["users"], list(state["events"])) == ({ANN: {"plan_type": "pro"}, CAT: {}}, ["ann"])
    assert (state["accepted"][USERS_BULK_UPDATE], state["accepted"][EVENTS_TRACK_BULK]) == (
        {ANN: 1, CAT: 1},
        {"ann": 1},
    )
    keys = ("endpoint", "email", "event_id", "emails", "status")
    call = [state["journal"][1][key] for key in keys]
    assert call == [EVENTS_TRACK_BULK, None, None, [ANN, "Cat@example.com", "000"], 200]


def test_a_field_keeps_the_type_of_its_first_value(standin: StandIn, client: Client) -> None:
    """One wrong item refuses its whole group, and fixes no type, unless it is to be listed."""
    client.update(ANN, age=5)
    group = [{"email": BOB, "dataFields": {"new": 1}}, {"email": CAT, "dataFields": {"age": "six"}}]
    error = {
        "incomingTypes": ["string", "keyword"],
        "expectedType": "long",
        "category": "user",
        "offendingValue": "six",
    }
    for endpoint, body in ((USERS_UPDATE, group[1]), (USERS_BULK_UPDATE, {"users": group})):
        status, answer = client.call(endpoint, body)
        assert (status, answer["code"]) == (400, "RequestFieldsTypesMismatched")
        assert answer["params"] == {"validationErrors": {"age": {**error, "_type": "UnexpectedType"}}}
    standin.configure(type_clash="list")
    assert client.update(BOB, new="text") == counts(1, 0, ("new",))
    assert client.call(USERS_BULK_UPDATE, {"users": group[1:]}) == counts(0, 1, invalidDataEmails=[CAT])
    assert standin.state()["users"] == {ANN: {"age": 5}, BOB: {"new": "text"}}
    dates = ["2020-04-13", "2020-04-13 13:37:19", "2020-04-13 13:37:19 -04:00", "2020-04-13T13:37:19.039Z"]
    texts = ["2020-04-13T13:37:19", "2020-04-13 13:37:19.039", ""]
    assert [field_types(text)[0] for text in dates + texts] == ["date"] * 4 + ["string"] * 3
    assert [field_types(value) for value in (True, 1.5, {}, [1], [], None)] == [
        *(("boolean",), ("double",), ("object",), ("long", "double"), (), ())
    ]


def test_calls_beyond_the_limit_are_answered_429(standin: StandIn, client: Client) -> None:
    """Each endpoint has its own; what others use up counts for the single ones. Any second counts, not the clock's."""
    standin.configure(limit_users=3, limit_events=4, others=2, limit_users_bulk=1, limit_events_bulk=3)
    limits = dict(zip(BODIES, (1, 2, 1, 3), strict=True))  # few enough for a second of a busy machine
    for endpoint, limit in limits.items():
        assert [client.call(endpoint, BODIES[endpoint])[0] for _ in range(limit + 1)] == [200] * limit + [429]
    counters = standin.counters()
    assert counters["answers"] == {endpoint: {200: limit, 429: 1} for endpoint, limit in limits.items()}
    assert counters["busiest_second"] == {endpoint: limit + 1 for endpoint, limit in limits.items()}
    assert counters["throttled"] == 4
    last = LastSecond()
    for now in (0.25, 0.5, 1.0, 1.125, 1.5, 1.75):
        last.add(now)
    assert [last.most, *(last.count(now) for now in (1.875, 2.0, 2.125, 2.75))] == [4, 4, 3, 2, 0]


def test_faults_are_a_sequence_for_those_whom_they_name(standin: StandIn, client: Client) -> None:
    """A lost answer, 503, an answer that does not add up, for the groups with Ann; the rest of the calls passes."""
    standin.fault("reset_after", email="Ann@example.com", times=1)
    standin.fault(status=503, email=ANN, body='"busy"', times=1)
    standin.fault(alter={"successCount": -1, "filteredOutFields": None}, email=ANN, endpoint=USERS_BULK_UPDATE)
    with pytest.raises(ConnectionResetError):
        client.update(BOB, "aNN@example.com")
    client.close()
    assert (client.update(BOB)[0], client.update(BOB, ANN)) == (200, (503, "busy"))
    altered = {**counts(-1, 0)[1]}
    del altered["filteredOutFields"]
    assert (client.update(BOB, ANN), client.track(BOB, ANN)[0]) == ((200, altered), 200)
    assert standin.state()["accepted"][USERS_BULK_UPDATE] == {BOB: 3, ANN: 2}
    standin.fault("echo_headers", endpoint=EVENTS_TRACK, skip=1)
    assert [KEY in client.call(EVENTS_TRACK, EVENT)[1]["msg"] for _ in range(2)] == [False, True]
