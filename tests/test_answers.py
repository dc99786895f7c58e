"""What an answer means for a call, singly and for a group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterable_client import (
    EVENTS_TRACK,
    USERS_BULK_UPDATE,
    USERS_GET_FIELDS,
    USERS_UPDATE,
    CallResult,
    HttpAnswer,
    IdentifyBy,
    Identity,
    interpret,
    interpret_fields,
    interpret_group,
)
from lab import answers
from lab.answers import (
    GROUP,
    ONE,
    SUCCESS,
    THREE,
    TWO,
    USERID_GROUP,
    Answer,
    GroupAnswer,
    make_body,
)
from lab.clients import LOST, make_update, script_client
from lab.clients import make_answer as make_http_answer
from logger_config import build_redactor

# Single calls


@pytest.mark.parametrize("answer", answers.ANSWERED, ids=str)
def test_an_answer(answer: Answer) -> None:
    assert interpret(USERS_UPDATE, answer.status, answer.body) == answer.result


@pytest.mark.parametrize(
    ("result", "headline"),
    [
        (
            CallResult("users/update", ok=True, status=200, code="Success"),
            "users/update call successful: Success",
        ),
        (
            CallResult("users/bulkUpdate", ok=True, status=200),
            "users/bulkUpdate call successful",
        ),
        (
            CallResult("users/update", ok=False, status=200),
            "No success from users/update: Status 200",
        ),
        (
            CallResult("users/update", ok=False, status=302),
            "Redirect from users/update: Status 302",
        ),
        (
            CallResult("users/update", ok=False, status=400),
            "4xx Client Error from users/update: Status 400",
        ),
        (
            CallResult("events/track", ok=False, status=502),
            "5xx Server Error from events/track: Status 502",
        ),
        (CallResult("events/track", ok=False), "No answer from events/track"),
        (
            CallResult("users/update", ok=False, is_unexpected=True),
            "Unexpected error in users/update",
        ),
    ],
)
def test_a_headline(result: CallResult, headline: str) -> None:
    assert result.headline == headline


@pytest.mark.parametrize("status", [200, 400, 401, 409])
def test_an_answer_with_a_code_is_usable(status: int) -> None:
    assert interpret(USERS_UPDATE, status, make_body("BadParams")).is_usable


@pytest.mark.parametrize("status", answers.RETRIED_STATUSES)
def test_an_answer_that_is_retried_is_not_usable(status: int) -> None:
    assert not interpret(USERS_UPDATE, status, make_body("GenericError")).is_usable


@pytest.mark.parametrize("status", [200, 400, 403, 404, 503])
def test_a_page_is_not_usable(status: int) -> None:
    assert not interpret(USERS_UPDATE, status, answers.PAGE).is_usable


def test_a_success_is_usable() -> None:
    assert interpret(USERS_UPDATE, 200, SUCCESS).is_usable


def test_a_group_that_was_taken_is_usable() -> None:
    text = '{"successCount": 3, "failCount": 0}'

    assert interpret_group(USERS_BULK_UPDATE, 200, text, GROUP).is_usable


def test_a_forgotten_user() -> None:
    body = make_body("ForgottenUserError")

    assert interpret(USERS_UPDATE, 409, body).is_forgotten
    assert interpret(EVENTS_TRACK, 409, body).is_forgotten


@pytest.mark.parametrize(
    ("status", "code"), [(409, "EmailAlreadyExists"), (400, "ForgottenUserError")]
)
def test_another_conflict_is_not_a_forgotten_user(status: int, code: str) -> None:
    assert not interpret(USERS_UPDATE, status, make_body(code)).is_forgotten


CLASH = '{"code": "RequestFieldsTypesMismatched", "params": {"validationErrors": %s}}'


@pytest.mark.parametrize("errors", ["[]", "5", '{"x": {}}', '{"x": []}', "null"])
def test_a_type_clash_may_have_any_form(errors: str) -> None:
    result = interpret(USERS_UPDATE, 400, CLASH % errors)

    assert result.reason == (
        "a field has another type: correct the column, or the field's type in Iterable"
    )


@pytest.mark.parametrize("depth", [*range(1, 2000, 77), 100_000])
def test_an_answer_may_be_nested_deep(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    text = CLASH % f'{{"x": {{"incomingTypes": {nested}}}}}'

    assert not interpret(USERS_UPDATE, 400, text).ok
    assert not interpret_group(USERS_BULK_UPDATE, 200, text, GROUP).ok


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("IP address 192.0.2.1 is not allowed", "IP address 192.0.2.1 is not allowed"),
        ("JWT token is missing", "JWT token is missing"),
    ],
)
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_has_iterables_own_sentence(
    status: int, message: str, reason: str
) -> None:
    result = interpret(USERS_UPDATE, status, make_body("Forbidden", message))

    assert result.is_refused_key
    assert result.reason.startswith(f'Iterable refused the API key ("{reason}"): check')


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    "body", ["", answers.PAGE, '{"code": "BadApiKey"}', '{"msg": "Forbidden"}', "[]"]
)
def test_only_iterables_json_refuses_the_key(status: int, body: str) -> None:
    assert not interpret(USERS_UPDATE, status, body).is_refused_key


# Groups


@pytest.mark.parametrize("answer", [*answers.BULK, *answers.BULK_USERID], ids=str)
def test_an_answer_to_a_group(answer: GroupAnswer) -> None:
    result = interpret_group(
        USERS_BULK_UPDATE, answer.status, answer.body, answer.identities
    )

    assert result == answer.result


def test_a_group_is_never_forgotten() -> None:
    body = make_body("ForgottenUserError")

    assert not interpret_group(USERS_BULK_UPDATE, 409, body, GROUP).is_forgotten


def confirm(group: Sequence[Identity], *, failed: int, **lists: Any) -> set[str] | None:
    """Return whom an answer to the group confirms, None if it is not believed."""
    succeeded = len(group) - failed
    text = json.dumps({"successCount": succeeded, "failCount": failed, **lists})
    result = interpret_group(USERS_BULK_UPDATE, 200, text, group)
    return set(result.confirmed) if result.ok else None


def test_a_conflict_names_the_user_who_was_there() -> None:
    failed_updates = {"invalidEmails": [TWO], "conflictEmails": [ONE]}

    confirmed = confirm(GROUP, failed=1, failedUpdates=failed_updates)

    assert confirmed == {ONE, THREE}


def test_a_conflict_at_the_top_level_names_the_user_who_was_there() -> None:
    confirmed = confirm(GROUP, failed=1, invalidEmails=[TWO], conflictEmails=[ONE])

    assert confirmed == {ONE, THREE}


def test_user_ids_are_compared_exactly() -> None:
    confirmed = confirm(USERID_GROUP, failed=1, invalidUserIds=["A", "b"])

    assert confirmed == {"a", "7"}


def test_a_conflict_of_user_ids_names_the_user_who_was_there() -> None:
    failed_updates = {"forgottenUserIds": ["7"], "conflictUserIds": ["a"]}

    confirmed = confirm(USERID_GROUP, failed=1, failedUpdates=failed_updates)

    assert confirmed == {"a", "A"}


def test_lists_of_addresses_name_no_user_id() -> None:
    assert confirm(USERID_GROUP, failed=1, invalidEmails=["a"]) is None


EMAIL_LISTS = ["invalidEmails", "forgottenEmails", "notFoundEmails"]
USER_ID_LISTS = ["invalidUserIds", "forgottenUserIds", "notFoundUserIds"]
# The users of a group, each with the list that names them, None for one who is taken.
ADDRESSES = st.dictionaries(
    st.text("ab12", min_size=1, max_size=3),
    st.sampled_from([None, *EMAIL_LISTS]),
    min_size=1,
)
USER_IDS = st.dictionaries(
    st.text("abAB12", min_size=1, max_size=3),
    st.sampled_from([None, *USER_ID_LISTS]),
    min_size=1,
)


def confirm_unnamed(
    identify_by: IdentifyBy, users: dict[str, str | None]
) -> set[str] | None:
    """Return whom an answer confirms that names these users in these lists."""
    lists: dict[str, list[str]] = {}
    for user, list_name in users.items():
        if list_name is not None:
            lists.setdefault(list_name, []).append(user)
    failed = sum(len(names) for names in lists.values())
    group = [Identity(identify_by, user) for user in users]
    return confirm(group, failed=failed, failedUpdates=lists)


def find_unnamed(users: dict[str, str | None]) -> set[str]:
    return {user for user, list_name in users.items() if list_name is None}


@given(users=ADDRESSES)
def test_an_address_in_a_list_is_not_confirmed(users: dict[str, str | None]) -> None:
    assert confirm_unnamed(IdentifyBy.EMAIL, users) == find_unnamed(users)


@given(users=USER_IDS)
def test_a_user_id_in_a_list_is_not_confirmed(users: dict[str, str | None]) -> None:
    assert confirm_unnamed(IdentifyBy.USER_ID, users) == find_unnamed(users)


NAMED = st.sets(st.sampled_from([ONE, TWO, THREE]))


@given(failed=st.integers(-1, 5), named=NAMED)
def test_counts_and_lists_must_add_up(failed: int, named: set[str]) -> None:
    confirmed = confirm(GROUP, failed=failed, invalidEmails=sorted(named))

    if failed == len(named):
        assert confirmed == {ONE, TWO, THREE} - named
    else:
        assert confirmed is None


# Any answer

WORDS = st.sampled_from([ONE, "Success", "RequestFieldsTypesMismatched"])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=9),
    WORDS,
)


def nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner) | st.dictionaries(st.text(max_size=9), inner)


JSON = st.recursive(LEAVES, nest, max_leaves=9)
KEYS = st.sampled_from(
    [
        "code",
        "msg",
        "params",
        "successCount",
        "failCount",
        "failedUpdates",
        "invalidEmails",
        "filteredOutFields",
        "disallowedEventNames",
    ]
)
DOCUMENTS = st.dictionaries(KEYS, JSON)
BODIES = st.one_of(
    DOCUMENTS.map(json.dumps),
    JSON.map(json.dumps),
    st.text(),
)


@given(status=st.integers(200, 599), body=BODIES)
def test_any_answer_to_a_call_has_a_result(status: int, body: str) -> None:
    result = interpret(USERS_UPDATE, status, body)

    assert result.status == status
    assert result.ok == (result.reason == "")
    assert not result.ok or result.code == "Success"
    assert not (result.ok and result.is_retryable)


@given(status=st.integers(200, 599), body=BODIES)
def test_any_answer_to_a_group_has_a_result(status: int, body: str) -> None:
    result = interpret_group(USERS_BULK_UPDATE, status, body, GROUP)

    assert result.status == status
    assert result.ok == (result.reason == "")
    assert result.ok or result.confirmed == frozenset()
    assert result.confirmed <= {ONE, TWO, THREE}
    assert result.is_usable == result.ok


# users/getFields


def test_the_fields_of_a_project() -> None:
    result = interpret_fields(200, '{"fields": {"first_name": "string", "a": "date"}}')

    assert result == CallResult(
        USERS_GET_FIELDS.path,
        ok=True,
        status=200,
        fields={"first_name": "string", "a": "date"},
    )


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, '{"fields": []}'),
        (200, "{}"),
        (200, answers.PAGE),
        (403, '{"fields": {"first_name": "string"}}'),
        (401, make_body("BadApiKey", "Invalid API key")),
        (503, ""),
    ],
)
def test_another_answer_has_no_fields(status: int, body: str) -> None:
    result = interpret_fields(status, body)

    assert result == interpret(USERS_GET_FIELDS, status, body)
    assert not result.ok


def test_a_success_without_fields_is_not_believed() -> None:
    result = interpret_fields(200, make_body("Success"))

    assert not result.ok
    assert result.reason == answers.NOT_ITERABLE


# What a result keeps


def test_a_reason_does_not_name_the_user() -> None:
    answer = make_http_answer(400, "BadParams", f"{ONE} is odd")
    client, _ = script_client(answer)

    result = client.post([make_update(1)])

    assert result.message == f"{ONE} is odd"
    assert result.reason == "<email> is odd"


def test_equal_refusals_of_two_users_have_one_reason() -> None:
    client, _ = script_client(
        make_http_answer(400, "BadParams", "user1@example.com is odd"),
        make_http_answer(400, "BadParams", "user2@example.com is odd"),
    )

    first = client.post([make_update(1)])
    second = client.post([make_update(2)])

    assert first.reason == second.reason


ODD_KEY = 'Abc"\\d%e/F+1=234&<567>'


def list_pieces(text: str) -> list[str]:
    """Return each part of the text that has ten characters."""
    ends = range(10, len(text) + 1)
    return [text[end - 10 : end] for end in ends]


@pytest.mark.parametrize(
    "body", ["x" * 490 + ODD_KEY, make_body(f"Bad{ODD_KEY}", "x" * 490 + ODD_KEY)]
)
def test_no_piece_of_an_echoed_key_is_kept(body: str) -> None:
    client, _ = script_client(
        HttpAnswer(400, body, None, sent_at=0.0),
        api_key=ODD_KEY,
        redact=build_redactor(ODD_KEY),
    )

    result = client.post([make_update()])

    kept = repr(astuple(result))
    assert "x" * 490 in kept
    in_json = json.dumps(ODD_KEY).strip('"')
    for piece in [*list_pieces(ODD_KEY), *list_pieces(in_json)]:
        assert piece not in kept
        assert repr(piece).strip("'") not in kept


def test_a_long_answer_is_cut() -> None:
    client, _ = script_client(make_http_answer(400, "x" * 600, "y" * 600))

    result = client.post([make_update()])

    assert result.code == "x" * answers.MAX_KEPT_TEXT
    assert result.message == "y" * answers.MAX_KEPT_TEXT
    assert len(result.body) == answers.MAX_KEPT_TEXT


def test_a_lost_call_has_no_status() -> None:
    client, _ = script_client(LOST, max_attempts=2)

    assert client.post([make_update()]) == CallResult(
        USERS_UPDATE.path,
        ok=False,
        message="the connection broke",
        reason="the connection broke",
        attempts=2,
        is_retryable=True,
    )


def test_a_group_result_says_how_many_attempts() -> None:
    client, _ = script_client(
        LOST, HttpAnswer(200, '{"successCount":2,"failCount":0}', None, sent_at=0.0)
    )

    result = client.post([make_update(1), make_update(2)])

    assert result == CallResult(
        USERS_BULK_UPDATE.path,
        ok=True,
        status=200,
        attempts=2,
        confirmed=frozenset({ONE, TWO}),
    )
