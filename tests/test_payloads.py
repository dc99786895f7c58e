"""The payloads of a row, for projects that identify users by e-mail and by userId."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterable_client import (
    IdentifyBy,
    Identity,
    UnusableRow,
    identify,
    make_event_payload,
    make_reset_payload,
    make_user_payload,
    normalize_email,
    encode_payload,
)
from lab.clients import ROW

EMAIL = Identity(IdentifyBy.EMAIL, "user1@example.com")
USER_ID = Identity(IdentifyBy.USER_ID, "2")
BOTH = pytest.mark.parametrize("identity", [EMAIL, USER_ID], ids=["email", "userId"])


def make_row(**changes: Any) -> dict[str, Any]:
    return ROW._replace(**changes)._asdict()


def make_fields(**changes: Any) -> dict[str, Any]:
    """Return the user's fields of a row with these changes."""
    payload = make_user_payload(make_row(**changes), EMAIL)
    fields: dict[str, Any] = payload["dataFields"]
    return fields


# Both identities, whole payloads


def test_a_user_by_email() -> None:
    assert make_user_payload(make_row(), EMAIL) == {
        "email": "user1@example.com",
        "dataFields": {
            "first_name": "Sarah",
            "plan_type": "pro",
            "recent_page_view": True,
            "candidate": "yes",
        },
    }


def test_a_user_by_user_id_has_the_address_as_a_field() -> None:
    assert make_user_payload(make_row(), USER_ID) == {
        "userId": "2",
        "dataFields": {
            "email": "user1@example.com",
            "first_name": "Sarah",
            "plan_type": "pro",
            "recent_page_view": True,
            "candidate": "yes",
        },
    }


@BOTH
def test_an_event(identity: Identity) -> None:
    assert make_event_payload(make_row(), identity) == {
        identity.identify_by.value: identity.value,
        "eventName": "page_view",
        "id": "page-view-37",
        "createdAt": 1_768_314_645,
        "dataFields": {
            "page": "pricing",
            "browser": "desktop",
            "location": "San Francisco, US",
            "timestamp": "2026-01-13 14:30:45",
            "candidate": "yes",
        },
    }


@BOTH
def test_a_reset(identity: Identity) -> None:
    assert make_reset_payload(identity) == {
        identity.identify_by.value: identity.value,
        "dataFields": {"recent_page_view": False},
    }


# Identities


def test_an_address_is_stripped_and_in_lower_case() -> None:
    row = make_row(email="\u00a0USER1@Example.com\t\n")

    assert identify(row, IdentifyBy.EMAIL) == EMAIL


@pytest.mark.parametrize(
    "email", ["नि\u200dक@example.com", "a\tb@example.com", "\U0001fae8@example.com"]
)
def test_an_odd_address_is_iterables_to_judge(email: str) -> None:
    assert identify(make_row(email=email), IdentifyBy.EMAIL).value == email


@pytest.mark.parametrize("email", [None, "", " \t\n", "sarah.johnson", 5, "jos\udce9@"])
def test_an_address_that_cannot_be_used_says_so(email: int | str | None) -> None:
    cure = "no usable e-mail address: correct it in the customers table"
    with pytest.raises(UnusableRow, match=cure):
        identify(make_row(email=email), IdentifyBy.EMAIL)


@pytest.mark.parametrize("user_id", ["~", "!", "a b", "x" * 52, "Ann@example.com"])
def test_a_user_id_is_taken_as_it_is(user_id: str) -> None:
    identity = identify(make_row(user_id=user_id), IdentifyBy.USER_ID)

    assert identity == Identity(IdentifyBy.USER_ID, user_id)


@pytest.mark.parametrize("user_id", [0, 7, -5, 2**64])
def test_a_number_is_a_user_id(user_id: int) -> None:
    identity = identify(make_row(user_id=user_id), IdentifyBy.USER_ID)

    assert identity == Identity(IdentifyBy.USER_ID, str(user_id))


@pytest.mark.parametrize(
    "user_id",
    [None, "", " ", " a", "a ", "a\n", "a\tb", "\x7f", "ä", "\udcff", "x" * 53],
)
def test_an_id_that_is_no_user_id_says_so(user_id: str | None) -> None:
    with pytest.raises(UnusableRow) as error:
        identify(make_row(user_id=user_id), IdentifyBy.USER_ID)

    assert str(error.value) == (
        "customers.id cannot be a user ID: it needs 1 to 52 printable ASCII"
        " characters, no space at either end"
    )


@given(user_id=st.text(st.characters(max_codepoint=130), max_size=55))
def test_a_user_id_is_1_to_52_printable_characters(user_id: str) -> None:
    is_ascii = user_id.isascii() and user_id.isprintable()
    has_length = 1 <= len(user_id) <= 52
    is_stripped = user_id == user_id.strip(" ")
    is_user_id = is_ascii and has_length and is_stripped

    try:
        identity = identify(make_row(user_id=user_id), IdentifyBy.USER_ID)
    except UnusableRow:
        assert not is_user_id
    else:
        assert is_user_id
        assert identity.value == user_id


def test_a_user_by_user_id_needs_no_address() -> None:
    for email in (None, "", " \t"):
        payload = make_user_payload(make_row(email=email), USER_ID)

        assert "email" not in payload["dataFields"]


def test_the_address_among_the_fields_is_in_lower_case() -> None:
    payload = make_user_payload(make_row(email=" USER1@Example.com"), USER_ID)

    assert payload["dataFields"]["email"] == "user1@example.com"


def test_the_address_among_the_fields_must_be_text() -> None:
    with pytest.raises(UnusableRow, match="email is no text in UTF-8"):
        make_user_payload(make_row(email="jos\udce9@example.com"), USER_ID)


def test_no_address_is_an_empty_one() -> None:
    assert normalize_email(None) == ""


# Values


def test_a_null_is_left_out() -> None:
    fields = make_fields(first_name=None, plan_type=None)

    assert fields == {"recent_page_view": True, "candidate": "yes"}


def test_a_null_of_the_view_is_left_out() -> None:
    row = make_row(page=None, browser=None, location=None)
    fields = make_event_payload(row, EMAIL)["dataFields"]

    assert fields == {"timestamp": "2026-01-13 14:30:45", "candidate": "yes"}


def test_an_empty_text_is_sent() -> None:
    assert make_fields(first_name="")["first_name"] == ""


@pytest.mark.parametrize("value", ["\0 '\"\\\u202e", "Zoë 😀", "1.50", 0, -5])
def test_a_value_is_sent_as_text(value: int | str) -> None:
    assert make_fields(first_name=value)["first_name"] == str(value)


@pytest.mark.parametrize("column", ["page", "browser", "location"])
def test_a_value_of_the_view_is_sent_as_text(column: str) -> None:
    payload = make_event_payload(make_row(**{column: 7}), EMAIL)

    assert payload["dataFields"][column] == "7"


@pytest.mark.parametrize("column", ["first_name", "plan_type"])
def test_bytes_of_a_user_that_are_no_text_say_so(column: str) -> None:
    problem = f"{column} is no text in UTF-8: change the column's type"
    with pytest.raises(UnusableRow, match=problem):
        make_user_payload(make_row(**{column: "Jos\udce9"}), EMAIL)


@pytest.mark.parametrize("column", ["page", "browser", "location"])
def test_bytes_of_a_view_that_are_no_text_say_so(column: str) -> None:
    problem = f"{column} is no text in UTF-8: change the column's type"
    with pytest.raises(UnusableRow, match=problem):
        make_event_payload(make_row(**{column: "Jos\udce9"}), EMAIL)


# Events


@pytest.mark.parametrize("view_id", [0, "x" * 502, "a-B-9"])
def test_the_id_of_a_view_is_that_of_the_event(view_id: int | str) -> None:
    payload = make_event_payload(make_row(view_id=view_id), EMAIL)

    assert payload["id"] == f"page-view-{view_id}"


@pytest.mark.parametrize("view_id", [None, "", "a b", "ä", "37\n", "37.5", "x" * 503])
def test_an_id_that_no_event_can_have_says_so(view_id: str | None) -> None:
    problem = (
        "the view's id cannot be an event's (letters, digits and - only):"
        " correct it in page_views"
    )
    with pytest.raises(UnusableRow, match=re.escape(problem)):
        make_event_payload(make_row(view_id=view_id), EMAIL)


@pytest.mark.parametrize(
    "event_time",
    [
        None,
        "",
        "0000-00-00 00:00:00",
        "2026-01-13",
        "2026-W03-2",
        "1768012341230",
        "2026-01-13 14:30:45+02:00",
        "2026-01-13 02:30:45 PM",
        "2026-01-13 14:30:45\n",
    ],
)
def test_what_is_no_time_says_so(event_time: str | None) -> None:
    problem = "event_time is not a date with a time: correct the column in page_views"
    with pytest.raises(UnusableRow, match=problem):
        make_event_payload(make_row(event_time=event_time), EMAIL)


def test_a_fraction_of_a_second_is_dropped() -> None:
    row = make_row(event_time="2026-01-13 14:30:45.999999")

    payload = make_event_payload(row, EMAIL)

    assert payload == make_event_payload(make_row(), EMAIL)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The local time is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("event_time", "seconds"),
    [
        ("1000-01-01 00:00:00", -30_610_224_000),
        ("1969-12-31 23:59:59.999999", -1),
        ("2026-03-29 02:30:00", 1_774_751_400),  # no clock in Berlin shows it
        ("9999-12-31 23:59:59", 253_402_300_799),
    ],
)
def test_a_time_is_utc_wherever_the_program_runs(event_time: str, seconds: int) -> None:
    payload = make_event_payload(make_row(event_time=event_time), EMAIL)

    assert payload["createdAt"] == seconds
    assert payload["dataFields"]["timestamp"] == event_time[:19]


# Any row

TEXTS = st.text(max_size=60)
NOT_TEXT = st.just("a\udce9")
VALUES = st.one_of(st.none(), st.integers(), TEXTS, NOT_TEXT)
DATES = st.datetimes().map(str)
NUMBERS = st.integers(1, 9)
ROWS = st.fixed_dictionaries(
    {
        "user_id": VALUES | NUMBERS,
        "first_name": VALUES,
        "email": VALUES | st.emails(),
        "plan_type": VALUES,
        "view_id": VALUES | NUMBERS,
        "page": VALUES,
        "browser": VALUES,
        "location": VALUES,
        "event_time": VALUES | DATES,
    }
)


@given(row=ROWS, identify_by=st.sampled_from(IdentifyBy))
def test_any_row_has_payloads_or_is_unusable(
    row: dict[str, Any], identify_by: IdentifyBy
) -> None:
    try:
        identity = identify(row, identify_by)
        user = make_user_payload(row, identity)
        event = make_event_payload(row, identity)
    except UnusableRow:
        return

    for payload in (user, event):
        text = encode_payload(payload)
        assert text.isascii()
        assert json.loads(text) == payload
        assert payload[identify_by.value] == identity.value
        assert None not in payload["dataFields"].values()
    assert user.keys() == {identify_by.value, "dataFields"}


def test_json_has_no_spaces_and_is_ascii() -> None:
    assert encode_payload({"a": ["ä", 1]}) == '{"a":["\\u00e4",1]}'
