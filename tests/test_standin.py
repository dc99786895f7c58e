"""The stand-in is as strict as the API, and does what it is told to: else other tests would prove nothing."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import requests

from lab.standin import most_in_a_second
from lab.standin_handle import EVENTS_TRACK, EVENTS_TRACK_BULK, KEY, USERS_BULK_UPDATE, USERS_UPDATE, StandIn

ANN, BOB, CAT = "ann@example.com", "bob@example.com", "cat@example.com"
USER = {"email": ANN, "dataFields": {"plan_type": "pro"}}
EVENT = {"email": ANN, "eventName": "page_view", "id": "page-view-1", "createdAt": 1_768_314_645}
BOBS = {**EVENT, "email": BOB}
USERS, EVENTS = {"users": [USER]}, {"events": [EVENT]}


def call(standin: StandIn, endpoint: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any]:
    """The status, and the JSON of the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body)
    usual = {"Api-Key": KEY, "Content-Type": "application/json", "User-Agent": "test/1.0"}
    answer = requests.request(method, f"{standin.url}/api/{endpoint}", data=content, headers=usual | headers, timeout=5)
    return answer.status_code, answer.json()


def update(standin: StandIn, *emails: str, endpoint: str = USERS_BULK_UPDATE, **fields: Any) -> Any:
    """How many of a group were taken, how many were refused, and the lists of the answer that are not empty."""
    users = [{"email": email, "dataFields": fields} for email in emails]
    events = [{**EVENT, "email": email, "id": email[:3]} for email in emails]
    answer = call(standin, endpoint, {"users": users} if endpoint == USERS_BULK_UPDATE else {"events": events})[1]
    lists = {name: emails for name, emails in answer["failedUpdates"].items() if emails}
    return answer["successCount"], answer["failCount"], lists


track = functools.partial(update, endpoint=EVENTS_TRACK_BULK)


def test_single_calls_are_merged_by_address_and_id_and_null_removes_a_field(standin: StandIn) -> None:
    call(standin, USERS_UPDATE, {"email": "Ann@Example.com", "dataFields": {"first_name": "Ann", "page": "x"}})
    updated = call(standin, USERS_UPDATE, {"email": ANN, "dataFields": {"plan_type": "pro", "page": None}})
    assert updated == (200, {"msg": "", "code": "Success", "params": None})
    assert [call(standin, EVENTS_TRACK, EVENT)[1]["params"] for _ in range(2)] == [{"id": "page-view-1"}] * 2
    state = standin.state()
    assert state["users"] == {ANN: {"first_name": "Ann", "plan_type": "pro"}}
    assert state["events"] == {"page-view-1": {key: value for key, value in EVENT.items() if key != "id"}}
    assert (state["accepted"][USERS_UPDATE], state["accepted"][EVENTS_TRACK]) == ({ANN: 2}, {"page-view-1": 2})


def test_a_request_that_no_correct_program_sends_is_a_violation(standin: StandIn) -> None:
    thousand_and_one = [{"email": f"{number}@example.com"} for number in range(1001)]
    rows: list[tuple[int, str, str, Any, dict[str, Any]]] = [
        (400, "BadJsonBody", USERS_UPDATE, [], {}),
        (400, "BadJsonBody", USERS_UPDATE, b'{"email": NaN}', {}),
        (400, "BadParams", USERS_UPDATE, {**USER, "name": "Ann"}, {}),
        (400, "BadParams", EVENTS_TRACK, {**EVENT, "eventName": ""}, {}),
        (400, "BadParams", EVENTS_TRACK, {**EVENT, "id": "page_view"}, {}),
        (400, "BadParams", EVENTS_TRACK_BULK, {"events": [EVENT, {**BOBS, "id": "x" * 513}]}, {}),
        (400, "BadParams", EVENTS_TRACK_BULK, {"events": [EVENT, {**BOBS, "createdAt": 1_768_314_645_000}]}, {}),
        (400, "BadParams", EVENTS_TRACK_BULK, {"events": [EVENT, {**EVENT, "email": ANN.upper()}]}, {}),
        (400, "BadJsonBody", USERS_BULK_UPDATE, {}, {}),
        (400, "InvalidEmailAddressError", USERS_BULK_UPDATE, {"users": []}, {}),
        (400, "BatchTooLarge", USERS_BULK_UPDATE, {"users": thousand_and_one}, {}),
        (413, "RequestEntityTooLarge", USERS_UPDATE, {**USER, "dataFields": {"a": "x" * 4_000_000}}, {}),
        (400, "BadJsonBody", USERS_UPDATE, USER, {"Content-Type": "text/plain"}),
        (400, "BadParams", USERS_UPDATE, USER, {"User-Agent": "python-requests/2.34.2"}),
        (405, "BadParams", USERS_UPDATE, USER, {"method": "PUT"}),
        (404, "NotFound", "users/delete", USER, {}),
    ]
    for number, (status, code, endpoint, body, headers) in enumerate(rows, 1):
        answer = call(standin, endpoint, body, **headers)
        assert (answer[0], answer[1]["code"], len(standin.state()["violations"])) == (status, code, number)
    assert (standin.state()["users"], standin.state()["events"]) == ({}, {})


def test_what_the_data_or_the_settings_are_to_blame_for_is_no_violation(standin: StandIn) -> None:
    standin.configure(forgotten=[BOB], disallowed=["spam"])
    bad = ("bad@", "an n@example.com", "ann@localhost", "a@b@example.com", f"{CAT} ", "000", "")
    for endpoint, item in ((USERS_UPDATE, USER), (EVENTS_TRACK, EVENT)):
        codes = [call(standin, endpoint, {**item, "email": email})[1]["code"] for email in bad]
        assert codes == ["InvalidEmailAddressError"] * len(bad)
        assert call(standin, endpoint, {**item, "email": "BOB@example.com"})[0] == 409
    assert call(standin, USERS_UPDATE, {}, **{"Api-Key": "wrong"})[0] == 401
    assert call(standin, USERS_UPDATE, {})[0] == 400  # this is how a key is tried
    assert "is disallowed from tracking" in call(standin, EVENTS_TRACK, {**EVENT, "eventName": "spam"})[1]["msg"]
    assert [standin.state()[name] for name in ("users", "events", "violations")] == [{}, {}, []]


def test_a_group_is_taken_but_for_those_whom_the_answer_names(standin: StandIn) -> None:
    """In lower case. Unknown users have no events; the journal has every address."""
    standin.configure(forgotten=[BOB], refused={USERS_BULK_UPDATE: {CAT: ["conflictEmails", "old@example.com"]}})
    failed = {"invalidEmails": ["bad@"], "forgottenEmails": [BOB], "conflictEmails": ["old@example.com"]}
    assert update(standin, "Ann@example.com", "BAD@", "Bob@example.com", CAT, plan_type="pro") == (1, 3, failed)
    failed = {"invalidEmails": ["000"], "notFoundEmails": [CAT]}
    assert track(standin, ANN, "Cat@example.com", "000") == (1, 2, failed)
    assert track(standin) == (0, 0, {})
    standin.configure(refused={USERS_BULK_UPDATE: {ANN: None}}, list_unknown=False, disallowed=["page_view"])
    assert update(standin, ANN, CAT) == (1, 1, {})
    assert call(standin, EVENTS_TRACK_BULK, EVENTS)[1]["disallowedEventNames"] == ["page_view"]
    params = call(standin, EVENTS_TRACK_BULK, {"events": [EVENT, {**BOBS, "createdAt": 1.0}]})[1]["params"]
    assert params == {"obj.events[1].createdAt": "Number value expected"}
    state = standin.state()
    assert (state["users"], list(state["events"])) == ({ANN: {"plan_type": "pro"}, CAT: {}}, ["ann"])
    assert [*state["accepted"].values()] == [{}, {}, {ANN: 1, CAT: 1}, {"ann": 1}]
    line = {"endpoint": EVENTS_TRACK_BULK, "email": None, "event_id": None, "emails": [ANN, "Cat@example.com", "000"]}
    assert state["journal"][1] == {"t": state["journal"][1]["t"], **line, "status": 200}


def test_a_field_keeps_the_type_of_its_first_value(standin: StandIn) -> None:
    """One wrong item refuses its whole group, and fixes no type, unless it is to be listed."""
    update(standin, ANN, day="2020-04-13 13:37:19", age=5)
    users = [{"email": BOB, "dataFields": {"new": 1}}, {"email": CAT, "dataFields": {"day": "2020-04-13T13:37:19"}}]
    error = {"incomingTypes": ["string", "keyword"], "expectedType": "date", "offendingValue": "2020-04-13T13:37:19"}
    for endpoint, body in ((USERS_UPDATE, users[1]), (USERS_BULK_UPDATE, {"users": users})):
        status, document = call(standin, endpoint, body)
        assert (status, document["code"]) == (400, "RequestFieldsTypesMismatched")
        assert document["params"] == {"validationErrors": {"day": error}}
    standin.configure(type_clash="list")
    assert update(standin, BOB, new="text", day="2020-04-13T13:37:19.039Z") == (1, 0, {})
    assert update(standin, CAT, age="six") == (0, 1, {"invalidDataEmails": [CAT]})
    assert sorted(standin.state()["users"]) == [ANN, BOB]


def test_calls_beyond_the_limit_are_answered_429(standin: StandIn) -> None:
    """Each endpoint has its own; what others use up counts for the single ones. Any second counts, not the clock's."""
    standin.configure(limit_users=3, limit_events=4, others=2, limit_users_bulk=1, limit_events_bulk=3)
    limits = {USERS_UPDATE: 1, EVENTS_TRACK: 2, USERS_BULK_UPDATE: 1, EVENTS_TRACK_BULK: 3}  # in the second of a test
    for (endpoint, limit), body in zip(limits.items(), (USER, EVENT, USERS, EVENTS), strict=True):
        assert [call(standin, endpoint, body)[0] for _ in range(limit + 1)] == [200] * limit + [429]
    counters = standin.counters()
    assert counters["throttled"] == 4
    assert counters["answers"] == {endpoint: {200: limit, 429: 1} for endpoint, limit in limits.items()}
    assert counters["busiest_second"] == {endpoint: limit + 1 for endpoint, limit in limits.items()}
    assert [most_in_a_second(times) for times in ([0.0, 1.0], [0.5, 1.4, 1.5, 2.3])] == [1, 3]


def test_faults_are_a_sequence_for_those_whom_they_name(standin: StandIn) -> None:
    """A lost answer, 503, an answer that does not add up, for the groups with Ann; the rest of the calls passes."""
    standin.fault("reset_after", email="Ann@example.com", times=1)
    standin.fault(status=503, email=ANN, body='"busy"', times=1, skip=1)
    standin.fault(alter={"successCount": -1, "failedUpdates": {}}, email=ANN, endpoint=USERS_BULK_UPDATE, skip=1)
    with pytest.raises(requests.ConnectionError):
        update(standin, BOB, "aNN@example.com")
    assert [update(standin, BOB), update(standin, BOB, ANN)] == [(1, 0, {}), (2, 0, {})]
    assert call(standin, USERS_BULK_UPDATE, USERS) == (503, "busy")
    assert [update(standin, BOB, ANN), track(standin, BOB, ANN)] == [(-1, 0, {}), (2, 0, {})]
    assert standin.state()["accepted"][USERS_BULK_UPDATE] == {BOB: 4, ANN: 3}
