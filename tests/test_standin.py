"""The stand-in is as strict as Iterable, and fails as it is told to."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import requests

from lab.standin import find_busiest_second
from lab.standin_handle import (
    EVENTS_TRACK,
    EVENTS_TRACK_BULK,
    KEY,
    UNASKED_ANSWER,
    USERS_BULK_UPDATE,
    USERS_GET_FIELDS,
    USERS_UPDATE,
    StandIn,
)

ANN = "ann@example.com"
BOB = "bob@example.com"
CAT = "cat@example.com"
USER = {"email": ANN}
EVENT = {
    "eventName": "page_view",
    "id": "page-view-1",
    "createdAt": 1_768_314_645,
}
NAME = {"first_name": "Ann"}
NO_DATE = "2020-04-13T13:37:19"  # Iterable wants milliseconds
SUCCESS = {
    "msg": "",
    "code": "Success",
    "params": None,
}
HEADERS = {
    "Api-Key": KEY,
    "Content-Type": "application/json",
    "User-Agent": "test/1.0",
}
WRONG_KEY = {"Api-Key": "wrong"}
RAW_UPDATE = (
    b"POST /api/users/update HTTP/1.1\r\n"
    b"Api-Key: 0123456789abcdef0123456789abcdef\r\n"
    b"Content-Type: application/json\r\n"
    b"User-Agent: test/1.0\r\n"
    b"Content-Length: 18\r\n"
    b"\r\n"
    b'{"email":"a@b.co"}'
)


class Answer(NamedTuple):
    """An answer of the stand-in."""

    status: int
    document: Any

    @property
    def brief(self) -> str:
        """The status and Iterable's code, `400 BadParams`."""
        code = self.document["code"]
        return f"{self.status} {code}"


class GroupAnswer(NamedTuple):
    """What a bulk answer says. Lists without an entry are left out."""

    successes: int
    failures: int
    lists: dict[str, list[str]]


class Client:
    """Makes calls to the stand-in. A name with @ is an `email`, another a `userId`."""

    def __init__(self, standin: StandIn) -> None:
        self.standin = standin

    def call(
        self,
        endpoint: str,
        document: Any = None,
        *,
        method: str = "POST",
        **headers: str,
    ) -> Answer:
        """Make one call. `document` is bytes, or becomes JSON."""
        body = document
        if not isinstance(body, bytes):
            body = json.dumps(document)
        answer = requests.request(
            method,
            f"{self.standin.url}/api/{endpoint}",
            data=body,
            headers=HEADERS | headers,
            timeout=5,
        )
        content = answer.json() if answer.content else None
        return Answer(answer.status_code, content)

    def update(self, user: str, **fields: Any) -> Answer:
        """Update one user."""
        document = make_user(user, **fields)
        return self.call(USERS_UPDATE, document)

    def track(self, user: str, **changes: Any) -> Answer:
        """Track one event, which has these changes."""
        event = make_event(user, **changes)
        return self.call(EVENTS_TRACK, event)

    def send_users(self, *users: Any) -> Answer:
        """Update a group of users."""
        return self.call(USERS_BULK_UPDATE, {"users": users})

    def send_events(self, *events: Any) -> Answer:
        """Track a group of events."""
        return self.call(EVENTS_TRACK_BULK, {"events": events})

    def update_group(self, *names: str, **fields: Any) -> GroupAnswer:
        """Update a group of users, all with the same fields."""
        users = [make_user(name, **fields) for name in names]
        answer = self.send_users(*users)
        return read_group_answer(answer)

    def track_group(self, *names: str) -> GroupAnswer:
        """Track an event for each user, `event-0` and so on."""
        events = []
        for number, name in enumerate(names):
            event = make_event(name, id=f"event-{number}")
            events.append(event)
        answer = self.send_events(*events)
        return read_group_answer(answer)

    def get_fields(self, **headers: str) -> Answer:
        """Ask for the fields of users."""
        return self.call(USERS_GET_FIELDS, method="GET", **headers)

    def users(self) -> Any:
        """Return the users that are stored."""
        return self.standin.state()["users"]

    def events(self) -> Any:
        """Return the events that are stored."""
        return self.standin.state()["events"]

    def count_violations(self) -> int:
        """Return how many requests no correct program sends."""
        return len(self.standin.state()["violations"])


def find_key(user: str) -> str:
    return "email" if "@" in user else "userId"


def make_user(user: str, **fields: Any) -> dict[str, Any]:
    key = find_key(user)
    return {key: user, "dataFields": fields}


def make_event(user: str, **changes: Any) -> dict[str, Any]:
    key = find_key(user)
    return {key: user, **EVENT, **changes}


def read_group_answer(answer: Answer) -> GroupAnswer:
    document = answer.document
    lists = {}
    for name, entries in document["failedUpdates"].items():
        if entries:
            lists[name] = entries
    return GroupAnswer(
        document["successCount"],
        document["failCount"],
        lists,
    )


def receive(connection: socket.socket) -> str:
    """Return all that comes until the connection closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received.decode()


@pytest.fixture
def client(standin: StandIn) -> Client:
    """A client of an email-based project."""
    return Client(standin)


@pytest.fixture
def userid_client(standin: StandIn) -> Client:
    """A client of a userID-based project."""
    standin.configure(identify_by="userId")
    return Client(standin)


@pytest.fixture
def hybrid_client(standin: StandIn) -> Client:
    """A client of a hybrid project."""
    standin.configure(identify_by="hybrid")
    return Client(standin)


@pytest.fixture
def connection(standin: StandIn) -> Iterator[socket.socket]:
    """A connection to the stand-in, which is closed in the end."""
    address = ("127.0.0.1", standin.port)
    with socket.create_connection(address, timeout=5) as connection:
        yield connection


# What is stored


def test_updates_of_a_user_are_merged(client: Client) -> None:
    client.update("Ann@Example.com", **NAME)

    answer = client.update(ANN, plan_type="pro")

    assert answer == (200, SUCCESS)
    fields = {"first_name": "Ann", "plan_type": "pro"}
    assert client.users() == {ANN: fields}


def test_null_removes_a_field(client: Client) -> None:
    client.update(ANN, page="pricing")

    client.update(ANN, page=None)

    assert client.users() == {ANN: {}}


def test_an_event_sent_twice_is_one(client: Client) -> None:
    client.track(ANN)

    answer = client.track(ANN)

    assert answer.document["params"] == {"id": "page-view-1"}
    event = {
        "email": ANN,
        "eventName": "page_view",
        "createdAt": 1_768_314_645,
    }
    assert client.events() == {"page-view-1": event}


def test_what_is_taken_is_counted(client: Client) -> None:
    client.update(ANN)
    client.update(ANN)
    client.track(ANN)
    client.update_group(BOB)

    accepted = client.standin.state()["accepted"]

    assert accepted == {
        USERS_UPDATE: {ANN: 2},
        USERS_BULK_UPDATE: {BOB: 1},
        EVENTS_TRACK: {"page-view-1": 1},
        EVENTS_TRACK_BULK: {},
    }


def test_the_journal_has_single_calls(client: Client) -> None:
    client.track("Ann@example.com")

    [line] = client.standin.state()["journal"]

    assert line == {
        "t": line["t"],
        "endpoint": EVENTS_TRACK,
        "user": "Ann@example.com",
        "event_id": "page-view-1",
        "users": ["Ann@example.com"],
        "status": 200,
    }


def test_the_journal_has_groups(client: Client) -> None:
    client.update_group(BOB, "CAT@example.com")

    [line] = client.standin.state()["journal"]

    assert line == {
        "t": line["t"],
        "endpoint": USERS_BULK_UPDATE,
        "user": None,
        "event_id": None,
        "users": [BOB, "CAT@example.com"],
        "status": 200,
    }


def test_a_reset_forgets_everything(userid_client: Client) -> None:
    userid_client.update("7")

    userid_client.standin.reset()

    assert userid_client.users() == {}
    assert userid_client.standin.state()["journal"] == []
    assert userid_client.update(ANN).status == 200


# What no correct program sends

WRONG_UPDATES = {
    "no object": [],
    "no JSON": b'{"email": NaN}',
    "no body": b"",
    "another key": {"email": ANN, "name": "Ann"},
    "no identity": {"dataFields": {}},
    "two identities": {"email": ANN, "userId": "7"},
    "a number as userId": {"userId": 7},
    "a new userId": make_user(ANN, userId="7"),
    "a new address": make_user(ANN, email=BOB),
}
WRONG_EVENTS = {
    "no name": make_event(ANN, eventName=""),
    "an id with _": make_event(ANN, id="page_view"),
    "a long id": make_event(ANN, id="x" * 513),
    "milliseconds": make_event(ANN, createdAt=1_768_314_645_000),
    "a time as text": make_event(ANN, createdAt="1768314645"),
}


@pytest.mark.parametrize("case", WRONG_UPDATES)
def test_a_wrong_update_is_a_violation(client: Client, case: str) -> None:
    document = WRONG_UPDATES[case]

    answer = client.call(USERS_UPDATE, document)

    assert answer.status == 400
    assert client.users() == {}
    assert client.count_violations() == 1


@pytest.mark.parametrize("case", WRONG_EVENTS)
def test_a_wrong_event_is_a_violation(client: Client, case: str) -> None:
    event = WRONG_EVENTS[case]

    answer = client.call(EVENTS_TRACK, event)

    assert answer.status == 400
    assert client.events() == {}
    assert client.count_violations() == 1


@pytest.mark.parametrize("case", WRONG_EVENTS)
def test_a_wrong_event_refuses_its_group(client: Client, case: str) -> None:
    good = make_event(BOB, id="good")
    wrong = WRONG_EVENTS[case]

    answer = client.send_events(good, wrong)

    assert answer.status == 400
    assert client.events() == {}
    assert client.count_violations() == 1


def test_a_wrong_item_of_a_group_is_named(client: Client) -> None:
    good = make_event(BOB)
    wrong = make_event(ANN, createdAt=1.0)

    answer = client.send_events(good, wrong)

    params = {"obj.events[1].createdAt": "Number value expected"}
    assert answer.document["params"] == params


def test_a_group_is_a_list(client: Client) -> None:
    answer = client.call(USERS_BULK_UPDATE, {})

    assert answer.brief == "400 BadJsonBody"
    assert client.count_violations() == 1


def test_a_group_has_users(client: Client) -> None:
    answer = client.send_users()

    assert answer.brief == "400 InvalidEmailAddressError"
    assert client.count_violations() == 1


def test_a_group_has_at_most_1000_users(client: Client) -> None:
    users = [make_user(f"{number}@example.com") for number in range(1001)]

    answer = client.send_users(*users)

    assert answer.brief == "400 BatchTooLarge"
    assert client.count_violations() == 1


def test_a_group_has_each_user_once(client: Client) -> None:
    upper_case = make_user(ANN.upper())

    answer = client.send_users(USER, upper_case)

    assert answer.brief == "400 BadParams"
    assert client.count_violations() == 1


def test_a_body_has_at_most_4_megabytes(client: Client) -> None:
    answer = client.update(ANN, page="x" * 4_000_000)

    assert answer.brief == "413 RequestEntityTooLarge"
    assert client.count_violations() == 1


def test_another_endpoint_is_a_violation(client: Client) -> None:
    answer = client.call("users/delete", USER)

    assert answer.brief == "404 NotFound"
    assert client.count_violations() == 1


@pytest.mark.parametrize(
    ("endpoint", "method"),
    [(USERS_UPDATE, "PUT"), (USERS_GET_FIELDS, "POST")],
)
def test_another_method_is_a_violation(
    client: Client, endpoint: str, method: str
) -> None:
    answer = client.call(endpoint, USER, method=method)

    assert answer.status == 405
    assert client.count_violations() == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"User-Agent": "python-requests/2.34.2"},
    ],
)
def test_a_wrong_header_is_a_violation(client: Client, headers: dict[str, str]) -> None:
    answer = client.call(USERS_UPDATE, USER, **headers)

    assert answer.status == 400
    assert client.count_violations() == 1


# What data or settings are to blame for

INVALID_ADDRESSES = (
    "bad@",
    "an n@example.com",
    "ann@localhost",
    "a@b@example.com",
    "ann@example.com ",
    "@",
)


@pytest.mark.parametrize("address", INVALID_ADDRESSES)
def test_an_invalid_address_is_refused(client: Client, address: str) -> None:
    updated = client.update(address)
    tracked = client.track(address)

    assert updated.brief == "400 InvalidEmailAddressError"
    assert tracked.brief == "400 InvalidEmailAddressError"
    assert client.count_violations() == 0


def test_a_forgotten_user_is_refused(client: Client) -> None:
    client.standin.configure(forgotten=[BOB])

    updated = client.update("BOB@example.com")
    tracked = client.track(BOB)

    assert updated.brief == "409 ForgottenUserError"
    assert tracked.brief == "409 ForgottenUserError"
    assert client.count_violations() == 0


def test_a_wrong_key_is_refused(client: Client) -> None:
    answer = client.call(USERS_UPDATE, {}, **WRONG_KEY)

    assert answer.brief == "401 BadApiKey"


def test_an_empty_update_tries_the_key(client: Client) -> None:
    answer = client.call(USERS_UPDATE, {})

    assert answer.brief == "400 BadParams"
    assert client.count_violations() == 0


def test_a_disallowed_event_is_not_stored(client: Client) -> None:
    client.standin.configure(disallowed=["page_view"])

    answer = client.track(ANN)

    message = "Event page_view is disallowed from tracking"
    assert answer.document["msg"] == message
    assert client.events() == {}


# Groups


def test_a_bulk_answer_names_refused_users(client: Client) -> None:
    client.standin.configure(forgotten=[BOB])

    answer = client.update_group("Ann@example.com", "BAD@", "Bob@example.com")

    lists = {"invalidEmails": ["bad@"], "forgottenEmails": [BOB]}
    assert answer == (1, 2, lists)
    assert client.users() == {ANN: {}}


def test_a_bulk_answer_may_name_another_user(client: Client) -> None:
    refused = {ANN: ["conflictEmails", "old@example.com"]}
    client.standin.configure(refused={USERS_BULK_UPDATE: refused})

    answer = client.update_group(ANN)

    assert answer == (0, 1, {"conflictEmails": ["old@example.com"]})


def test_a_bulk_answer_may_name_nobody(client: Client) -> None:
    refused = {ANN: None}
    client.standin.configure(refused={USERS_BULK_UPDATE: refused})

    answer = client.update_group(ANN, BOB)

    assert answer == (1, 1, {})


def test_events_of_unknown_users_are_refused(client: Client) -> None:
    client.update(ANN)

    answer = client.track_group(ANN, "Cat@example.com", "bad@")

    lists = {"invalidEmails": ["bad@"], "notFoundEmails": [CAT]}
    assert answer == (1, 2, lists)
    assert list(client.events()) == ["event-0"]


def test_events_of_unknown_users_may_be_taken(client: Client) -> None:
    client.standin.configure(list_unknown=False)

    answer = client.track_group(ANN)

    assert answer == (1, 0, {})


def test_a_group_of_no_events_is_taken(client: Client) -> None:
    assert client.track_group() == (0, 0, {})


def test_a_bulk_answer_names_disallowed_events(client: Client) -> None:
    client.standin.configure(disallowed=["page_view"])

    answer = client.send_events(make_event(ANN))

    assert answer.document["disallowedEventNames"] == ["page_view"]
    assert client.events() == {}


# Types of fields


def test_a_field_keeps_its_first_type(client: Client) -> None:
    client.update(ANN, day="2020-04-13 13:37:19")

    answer = client.update(BOB, day=NO_DATE)

    assert answer.brief == "400 RequestFieldsTypesMismatched"
    clash = {
        "incomingTypes": ["string", "keyword"],
        "expectedType": "date",
        "offendingValue": NO_DATE,
    }
    params = {"validationErrors": {"day": clash}}
    assert answer.document["params"] == params


def test_one_clash_refuses_its_group(client: Client) -> None:
    client.update(ANN, day="2020-04-13")
    good = make_user(BOB, new=1)
    clashing = make_user(CAT, day=NO_DATE)

    answer = client.send_users(good, clashing)

    assert answer.brief == "400 RequestFieldsTypesMismatched"
    assert list(client.users()) == [ANN]


def test_a_refused_group_fixes_no_type(client: Client) -> None:
    client.update(ANN, day="2020-04-13")
    clashing = make_user(CAT, new=1, day=NO_DATE)
    client.send_users(make_user(BOB, new=1), clashing)

    answer = client.update(BOB, new="text")

    assert answer.status == 200


def test_a_clash_may_be_named(client: Client) -> None:
    client.standin.configure(type_clash="list")
    client.update(ANN, age=5)

    answer = client.update_group(BOB, age="six")

    assert answer == (0, 1, {"invalidDataEmails": [BOB]})


def test_fields_are_listed_with_types(client: Client) -> None:
    client.update(ANN, age=5)
    client.update(ANN, day="2020-04-13")
    client.update(ANN, **NAME)

    answer = client.get_fields()

    fields = {
        "email": "string",
        "age": "long",
        "day": "date",
        "first_name": "string",
    }
    assert answer == (200, {"fields": fields})


def test_a_project_may_have_fields_already(client: Client) -> None:
    types = {"first_name": "date"}
    client.standin.configure(field_types=types)

    answer = client.update(ANN, **NAME)

    assert answer.brief == "400 RequestFieldsTypesMismatched"


def test_a_wrong_key_gets_no_fields(client: Client) -> None:
    answer = client.get_fields(**WRONG_KEY)

    assert answer.brief == "401 BadApiKey"


def test_unknown_fields_may_be_dropped(client: Client) -> None:
    types = {"first_name": "string"}
    client.standin.configure(drop_unknown_fields=True, field_types=types)

    answer = client.update(ANN, plan_type="pro", **NAME)

    assert answer == (200, SUCCESS)
    assert client.users() == {ANN: NAME}


def test_a_bulk_answer_names_dropped_user_fields(client: Client) -> None:
    client.standin.configure(drop_unknown_fields=True)
    user = make_user(ANN, plan_type="pro")

    answer = client.send_users(user)

    assert answer.document["filteredOutFields"] == ["plan_type"]
    assert client.users() == {ANN: {}}


def test_a_bulk_answer_names_dropped_event_fields(client: Client) -> None:
    client.standin.configure(
        drop_unknown_fields=True,
        event_field_types={"page_view": {"page": "string"}},
        list_unknown=False,
    )
    fields = {"page": "pricing", "browser": "desktop"}
    event = make_event(ANN, dataFields=fields)

    answer = client.send_events(event)

    assert answer.document["filteredOutFields"] == ["browser"]
    stored = client.events()["page-view-1"]
    assert stored["dataFields"] == {"page": "pricing"}


# userID-based projects


def test_userids_are_compared_exactly(userid_client: Client) -> None:
    userid_client.update("a7")
    userid_client.update("A7")

    users = userid_client.users()
    assert list(users) == ["a7", "A7"]


def test_an_address_is_a_field_of_a_userid(userid_client: Client) -> None:
    userid_client.update("7", email="Ann@Example.com")
    userid_client.update("8", email=ANN)

    users = userid_client.users()
    assert users["7"] == {"email": ANN}
    assert users["8"] == {"email": ANN}


def test_an_event_has_a_userid(userid_client: Client) -> None:
    userid_client.track("7")

    event = userid_client.events()["page-view-1"]

    assert event["userId"] == "7"


def test_a_userid_project_takes_no_address(userid_client: Client) -> None:
    updated = userid_client.update(ANN)
    updated_group = userid_client.send_users(USER)
    tracked = userid_client.track(ANN)

    assert updated.brief == "400 BadParams"
    assert updated_group.brief == "400 BadParams"
    assert tracked.brief == "400 BadParams"
    assert userid_client.users() == {}
    assert userid_client.count_violations() == 0


def test_an_email_project_knows_no_userid(client: Client) -> None:
    answer = client.update("7")
    group_answer = client.update_group("7", ANN)

    assert answer.brief == "400 BadParams"
    assert group_answer == (1, 1, {"notFoundUserIds": ["7"]})
    assert client.count_violations() == 0


GOOD_USERIDS = (
    "7",
    "a b",
    "~" * 52,
    "!",
    "ann.example",
)
BAD_USERIDS = (
    "",
    " 7",
    "7 ",
    "x" * 53,
    "é",
    "7\n",
    "\t",
)


@pytest.mark.parametrize("user_id", GOOD_USERIDS)
def test_a_userid_is_printable(userid_client: Client, user_id: str) -> None:
    answer = userid_client.update(user_id)

    assert answer.status == 200


@pytest.mark.parametrize("user_id", BAD_USERIDS)
def test_another_userid_is_a_violation(userid_client: Client, user_id: str) -> None:
    answer = userid_client.update(user_id)

    assert answer.status == 400
    assert userid_client.count_violations() == 1


def test_a_bulk_answer_names_forgotten_userids(userid_client: Client) -> None:
    userid_client.standin.configure(forgotten=["f"])

    answer = userid_client.update_group("F", "f")

    assert answer == (1, 1, {"forgottenUserIds": ["f"]})


def test_a_bulk_answer_names_clashing_userids(userid_client: Client) -> None:
    userid_client.standin.configure(type_clash="list")
    userid_client.update("1", age=5)

    answer = userid_client.update_group("2", age="six")

    assert answer == (0, 1, {"invalidDataUserIds": ["2"]})


def test_a_bulk_answer_names_unknown_userids(userid_client: Client) -> None:
    answer = userid_client.track_group("unknown")

    assert answer == (0, 1, {"notFoundUserIds": ["unknown"]})


def test_an_invalid_field_email_is_refused(userid_client: Client) -> None:
    answer = userid_client.update("7", email="bad@")

    assert answer.brief == "400 InvalidEmailAddressError"


def test_a_bulk_answer_names_invalid_field_emails(userid_client: Client) -> None:
    """It names no user of the group."""
    answer = userid_client.update_group("7", email="bad@")

    assert answer == (0, 1, {"invalidEmails": ["bad@"]})


# Hybrid projects


def test_hybrid_users_of_one_address_clash(hybrid_client: Client) -> None:
    hybrid_client.update("1", email=ANN)

    answer = hybrid_client.update("2", email="ANN@example.com")

    assert answer.brief == "409 EmailAlreadyExists"
    assert list(hybrid_client.users()) == ["1"]


def test_a_bulk_answer_names_the_clashing_address(hybrid_client: Client) -> None:
    hybrid_client.update("1", email=ANN)

    answer = hybrid_client.update_group("2", email=ANN)

    assert answer == (0, 1, {"conflictEmails": [ANN]})


def test_an_address_that_is_given_up_is_free(hybrid_client: Client) -> None:
    hybrid_client.update("1", email=ANN)
    hybrid_client.update("1", email=BOB)

    answer = hybrid_client.update("2", email=ANN)

    assert answer.status == 200


def test_a_hybrid_user_is_found_by_address(hybrid_client: Client) -> None:
    hybrid_client.update("1", email=ANN)

    hybrid_client.update(ANN, plan_type="pro")

    fields = {"email": ANN, "plan_type": "pro"}
    assert hybrid_client.users() == {"1": fields}


# Limits

CALLS: dict[str, tuple[str, Any]] = {
    USERS_UPDATE: ("POST", USER),
    EVENTS_TRACK: ("POST", make_event(ANN)),
    USERS_BULK_UPDATE: ("POST", {"users": [USER]}),
    EVENTS_TRACK_BULK: ("POST", {"events": [make_event(ANN)]}),
    USERS_GET_FIELDS: ("GET", None),
}


@pytest.mark.parametrize("endpoint", CALLS)
def test_calls_beyond_a_limit_are_answered_429(client: Client, endpoint: str) -> None:
    client.standin.configure(
        limit_users=4,
        limit_events=4,
        limit_users_bulk=2,
        limit_events_bulk=2,
        limit_fields=2,
        others=2,
    )
    method, document = CALLS[endpoint]

    for _ in range(3):
        client.call(endpoint, document, method=method)

    counters = client.standin.counters()
    assert counters["throttled"] == 1
    assert counters["answers"] == {endpoint: {200: 2, 429: 1}}
    assert counters["busiest_second"] == {endpoint: 3}


@pytest.mark.parametrize(
    ("times", "most"),
    [
        ([], 0),
        ([0.0, 1.0], 1),
        ([0.5, 1.4, 1.5, 2.3], 3),
    ],
)
def test_a_second_may_begin_at_any_time(times: list[float], most: int) -> None:
    assert find_busiest_second(times) == most


# Which calls a fault concerns


def update_users(client: Client, *users: str) -> list[int]:
    """Update one user after the other. Return the statuses."""
    return [client.update(user).status for user in users]


def test_faults_are_a_sequence(client: Client) -> None:
    client.standin.fault(status=503, times=1)
    client.standin.fault(status=502, times=1)

    statuses = update_users(client, ANN, ANN, ANN)

    assert statuses == [503, 502, 200]


def test_a_fault_may_skip_calls(client: Client) -> None:
    client.standin.fault(status=503, skip=1, times=1)

    statuses = update_users(client, ANN, ANN, ANN)

    assert statuses == [200, 503, 200]


def test_a_fault_may_name_a_user(client: Client) -> None:
    client.standin.fault(status=503, user="Ann@example.com")

    statuses = update_users(client, "ann@EXAMPLE.com", BOB)

    assert statuses == [503, 200]


def test_a_fault_of_a_user_is_one_of_its_group(client: Client) -> None:
    client.standin.fault(status=503, user=ANN)

    other_user = make_user(BOB)

    answer = client.send_users(other_user, USER)

    assert answer.status == 503
    assert client.users() == {}


def test_a_fault_names_a_userid_exactly(userid_client: Client) -> None:
    userid_client.standin.fault(status=503, user="a")

    statuses = update_users(userid_client, "a", "A")

    assert statuses == [503, 200]


def test_a_fault_may_name_an_endpoint(client: Client) -> None:
    client.standin.fault(status=403, endpoint=USERS_GET_FIELDS)

    assert client.update(ANN).status == 200
    assert client.get_fields().status == 403


def test_poisoned_users_are_always_answered_500(client: Client) -> None:
    client.standin.poison(ANN, BOB)

    statuses = update_users(client, ANN, BOB, CAT, ANN)

    assert statuses == [500, 500, 200, 500]


def test_an_outage_may_be_ended(client: Client) -> None:
    client.standin.fault(status=503)
    during = client.update(ANN)

    client.standin.clear_faults()
    after = client.update(ANN)

    assert during.status == 503
    assert after.status == 200


def test_an_outage_may_end_by_itself(client: Client) -> None:
    client.standin.fault(status=503, seconds=0.2)
    during = client.update(ANN)

    time.sleep(0.3)
    after = client.update(ANN)

    assert during.status == 503
    assert after.status == 200


# What a fault does


def test_an_answer_may_be_altered(client: Client) -> None:
    alter = {"successCount": -1, "createdFields": None}
    client.standin.fault(alter=alter)

    answer = client.send_users(USER)

    assert answer.document["successCount"] == -1
    assert "createdFields" not in answer.document


@pytest.mark.parametrize(
    ("action", "users"),
    [
        ("reset_before", {}),
        ("reset_after", {ANN: {}}),
    ],
)
def test_a_connection_may_be_reset(client: Client, action: str, users: Any) -> None:
    client.standin.fault(action)

    with pytest.raises(requests.ConnectionError):
        client.update(ANN)

    assert client.users() == users


def test_informational_answers_come_first(
    standin: StandIn, connection: socket.socket
) -> None:
    standin.fault("hang_up", informational=[103, 100], interval=0)

    connection.sendall(RAW_UPDATE)

    received = receive(connection)
    first, second, answer, body = received.split("\r\n\r\n")
    assert first.startswith("HTTP/1.1 103 ")
    assert second.startswith("HTTP/1.1 100 ")
    assert answer.startswith("HTTP/1.1 200 ")
    assert json.loads(body) == SUCCESS


def test_a_second_answer_may_follow(
    standin: StandIn, connection: socket.socket
) -> None:
    standin.fault("hang_up", extra=UNASKED_ANSWER, interval=0)

    connection.sendall(RAW_UPDATE)

    received = receive(connection)
    assert received.startswith("HTTP/1.1 200 ")
    assert received.endswith('"params":null}' + UNASKED_ANSWER)


def test_an_idle_connection_may_be_closed(standin: StandIn) -> None:
    standin.configure(idle_timeout=0.05)
    address = ("127.0.0.1", standin.port)

    with socket.create_connection(address, timeout=5) as connection:
        received = receive(connection)

    assert received == ""


def test_a_connection_may_begin_with_an_answer(standin: StandIn) -> None:
    standin.configure(greeting=UNASKED_ANSWER, idle_timeout=0.05)
    address = ("127.0.0.1", standin.port)

    with socket.create_connection(address, timeout=5) as connection:
        received = receive(connection)

    assert received == UNASKED_ANSWER


def test_a_body_may_be_read_slowly() -> None:
    with StandIn(upload_rate=100_000) as standin:
        began = time.monotonic()
        answer = Client(standin).update(ANN, page="x" * 50_000)
        seconds = time.monotonic() - began

    assert answer.status == 200
    assert seconds > 0.4


def test_headers_may_be_echoed(client: Client) -> None:
    client.standin.fault("echo_headers")

    answer = client.update(ANN)

    assert answer.brief == "400 BadJsonBody"
    assert KEY in answer.document["msg"]


def test_an_unknown_fault_is_an_error(standin: StandIn) -> None:
    with pytest.raises(ValueError, match="no such action: explode"):
        standin.fault("explode")
