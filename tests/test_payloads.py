"""From a row to the two payloads (contract 4), and from the results files to who was told what (contract 7)."""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from iterable_client import CallResult
from main import (
    Delivery,
    Record,
    ResultsFile,
    Settings,
    UnusableRow,
    event_payload,
    prepare,
    read_memory,
    user_payload,
)

AT = datetime.fromisoformat("2026-01-13 14:30:45")
ROW = Record(
    user_id=2,
    first_name="Sarah",
    email="sarah.johnson@email.com",
    plan_type="pro",
    view_id=37,
    page="pricing",
    browser="desktop",
    location="San Francisco, US",
    event_time=AT,
)
SETTINGS = Settings(
    db_host="localhost",
    db_user="reader",
    db_password="",
    db_name="shop",
    db_port=3306,
    db_ssl_ca="",
    iterable_api_key="0123456789abcdef",
    iterable_api_base_url="https://api.iterable.com",
    iterable_rate_limit=450,
    iterable_max_attempts=5,
    iterable_timeout=30.0,
    max_workers=300,
    log_level="INFO",
    log_file=Path("/dev/null"),
    results_dir=Path("/tmp"),
)
USER = {
    "email": "sarah.johnson@email.com",
    "dataFields": {"first_name": "Sarah", "plan_type": "pro", "recent_page_view": True, "candidate": "yes"},
}
EVENT = {
    "email": "sarah.johnson@email.com",
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
NO_ADDRESS = "no usable e-mail address: correct it in the customers table"
NO_TIME = "event_time is not a date with a time: correct the column in page_views"
NO_ID = "the view has no id, or one with a character that an event id in Iterable may not have"
NO_TEXT = "a column holds bytes that are not text"

# Payloads


def test_a_row_becomes_these_two_payloads() -> None:
    assert (user_payload(ROW), event_payload(ROW)) == (USER, EVENT)


def test_a_null_column_is_left_out_and_an_empty_one_is_not() -> None:
    null = replace(ROW, first_name=None, plan_type=None, page=None, browser=None, location=None)
    assert user_payload(null)["dataFields"] == {"recent_page_view": True, "candidate": "yes"}
    assert event_payload(null)["dataFields"] == {"timestamp": "2026-01-13 14:30:45", "candidate": "yes"}
    empty = replace(ROW, first_name="", page="")
    assert user_payload(empty)["dataFields"] == {**USER["dataFields"], "first_name": ""}
    assert event_payload(empty)["dataFields"] == {**EVENT["dataFields"], "page": ""}


@pytest.mark.parametrize(
    ("email", "sent"),
    [
        (" Sarah.Johnson@EMAIL.com\t\n", "sarah.johnson@email.com"),
        ("\u00a0ann@example.com\u3000", "ann@example.com"),
        ("ÄNN@EXAMPLE.COM", "änn@example.com"),
        (b"Ann@example.com", "ann@example.com"),
        (bytearray(b"Ann@example.com"), "ann@example.com"),
        ("@", "@"),
        ("two words@example.com", "two words@example.com"),
    ],
)
def test_an_address_is_stripped_and_lower_cased_in_both(email: Any, sent: str) -> None:
    row = replace(ROW, email=email)
    assert (user_payload(row), event_payload(row)) == ({**USER, "email": sent}, {**EVENT, "email": sent})


@pytest.mark.parametrize(
    ("event_time", "seconds", "text"),
    [
        (datetime(1970, 1, 1), 0, "1970-01-01 00:00:00"),  # noqa: DTZ001 - as the driver gives them
        (datetime(1000, 1, 1), -30_610_224_000, "1000-01-01 00:00:00"),  # noqa: DTZ001
        (datetime(9999, 12, 31, 23, 59, 59), 253_402_300_799, "9999-12-31 23:59:59"),  # noqa: DTZ001
        (datetime(1969, 12, 31, 23, 59, 59, 999_999), -1, "1969-12-31 23:59:59"),  # noqa: DTZ001
        (datetime(2026, 3, 29, 2, 30, 0, 500_000), 1_774_751_400, "2026-03-29 02:30:00"),  # noqa: DTZ001
        (datetime(2024, 2, 29), 1_709_164_800, "2024-02-29 00:00:00"),  # noqa: DTZ001
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
def test_a_time_is_utc_wherever_the_program_runs(
    monkeypatch: pytest.MonkeyPatch, zone: str, event_time: datetime, seconds: int, text: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        payload = event_payload(replace(ROW, event_time=event_time))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (payload["createdAt"], payload["dataFields"]["timestamp"]) == (seconds, text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (Decimal("1.50"), "1.50"),
        (Decimal("0.0000000"), "0.0000000"),
        (Decimal("0.0000001"), "0.0000001"),
        (Decimal("1" + "0" * 40), "1" + "0" * 40),
        (1.5, "1.5"),
        (date(2026, 1, 13), "2026-01-13"),
        (AT, "2026-01-13 14:30:45"),
        ("Zoë 😀".encode(), "Zoë 😀"),
        ({"b", "a"}, "a,b"),
        (timedelta(hours=1), "01:00:00"),
        (timedelta(hours=100, minutes=2, seconds=3), "100:02:03"),
        (-timedelta(hours=838, minutes=59, seconds=59), "-838:59:59"),
    ],
)
def test_a_column_of_another_type_is_sent_as_the_text_that_the_server_shows(value: Any, text: str) -> None:
    row = replace(ROW, first_name=value, location=value)
    assert user_payload(row)["dataFields"]["first_name"] == text
    assert event_payload(row)["dataFields"]["location"] == text


UNUSABLE = [
    ({"email": None}, NO_ADDRESS),
    ({"email": ""}, NO_ADDRESS),
    ({"email": " \t\n"}, NO_ADDRESS),
    ({"email": "sarah.johnson"}, NO_ADDRESS),
    ({"email": 5}, NO_ADDRESS),
    ({"email": b"\xff@example.com"}, NO_TEXT),
    ({"event_time": None}, NO_TIME),
    ({"event_time": date(2026, 1, 13)}, NO_TIME),
    ({"event_time": "2026-01-13 14:30:45"}, NO_TIME),
    ({"event_time": timedelta(hours=1)}, NO_TIME),
    ({"event_time": 1_768_314_645}, NO_TIME),
    ({"view_id": "a b"}, NO_ID),
    ({"view_id": "ä"}, NO_ID),
    ({"view_id": "37\n"}, NO_ID),
    ({"view_id": Decimal("37.5")}, NO_ID),
    ({"view_id": "x" * 503}, NO_ID),
    ({"first_name": b"\xff"}, NO_TEXT),
    ({"page": b"\xc3"}, NO_TEXT),
    ({"view_id": None}, NO_ID),
    ({"view_id": ""}, NO_ID),
    ({"location": [1]}, "a column holds a list, which has no text"),
]


@pytest.mark.parametrize(("change", "reason"), UNUSABLE)
def test_a_row_that_cannot_be_sent_fails_for_a_reason_and_has_no_payload(change: dict[str, Any], reason: str) -> None:
    delivery = prepare(7, replace(ROW, **change), SETTINGS)
    assert (delivery.problem, delivery.payloads, delivery.fingerprint) == (reason, (), None)
    line = json.loads(delivery.as_json())
    assert (line["status"], line["problem"]) == ("total_failure", reason)
    assert (line["users_update"], line["events_track"], line["fingerprint"]) == (None, None, None)


def test_a_views_id_may_be_as_long_as_iterable_allows() -> None:
    assert event_payload(replace(ROW, view_id="x" * 502))["id"] == "page-view-" + "x" * 502


TEXTS = st.text(max_size=255) | st.sampled_from(["", " ", "'", '"', "\\", "\x00", "NULL", "😀" * 255, "\u202e", "%s"])
COLUMNS = (
    st.none()
    | TEXTS
    | TEXTS.map(str.encode)
    | st.integers(-(2**63), 2**64)
    | st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**35), max_value=10**35, places=30)
    | st.binary(max_size=20)
)
ADDRESSES = COLUMNS | st.builds("{}@{}".format, TEXTS, TEXTS) | st.emails()
MOMENTS = st.datetimes(datetime(1000, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999_999))  # noqa: DTZ001
ROWS = st.builds(
    Record,
    user_id=st.integers(0, 2**64) | TEXTS,
    first_name=COLUMNS,
    email=ADDRESSES,
    plan_type=COLUMNS,
    view_id=st.integers(0, 2**64) | st.uuids().map(str) | TEXTS,
    page=COLUMNS,
    browser=COLUMNS,
    location=COLUMNS,
    event_time=MOMENTS | st.sampled_from([None, date(2026, 1, 13)]),
)


def shown(value: Any) -> str | None:
    """A value as the server's own client shows it. Raises UnicodeDecodeError."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    return f"{value:f}" if isinstance(value, Decimal) else f"{value}"


def fields(row: Record, *columns: str, **others: Any) -> dict[str, Any]:
    return {name: text for name in columns if (text := shown(getattr(row, name))) is not None} | others


@hypothesis_settings(deadline=None, max_examples=200)
@given(ROWS)
def test_any_row_becomes_json_equal_to_what_it_says_or_is_unusable(row: Record) -> None:
    try:
        sent = json.loads(json.dumps([user_payload(row), event_payload(row)]))
    except UnusableRow:
        sent = None
    usable = True
    try:
        email = (shown(row.email) or "").strip().lower()
        user = fields(row, "first_name", "plan_type", recent_page_view=True, candidate="yes")
        event = fields(row, "page", "browser", "location", candidate="yes")
    except UnicodeDecodeError:
        usable = False
    event_id = f"page-view-{row.view_id}"
    id_fits = event_id.isascii() and event_id.replace("-", "").isalnum() and len("page-view-") < len(event_id) <= 512
    if not (usable and "@" in email and id_fits and isinstance(row.event_time, datetime)):
        assert sent is None
        return
    second = row.event_time.replace(microsecond=0)
    created = (second - datetime(1970, 1, 1)) // timedelta(seconds=1)  # noqa: DTZ001
    event["timestamp"] = str(second)
    more = {"eventName": "page_view", "id": event_id, "createdAt": created}
    assert sent == [{"email": email, "dataFields": user}, {"email": email, **more, "dataFields": event}]


# Fingerprints


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"first_name": "Sara"}, {}),
        ({"first_name": None}, {}),
        ({"email": "sarah@email.com"}, {}),
        ({"plan_type": "Pro"}, {}),
        ({"view_id": 38}, {}),
        ({"page": "settings"}, {}),
        ({"browser": ""}, {}),
        ({"location": "San Francisco"}, {}),
        ({"event_time": AT + timedelta(seconds=1)}, {}),
        ({}, {"iterable_api_base_url": "https://api.eu.iterable.com"}),
        ({}, {"iterable_api_key": "0123456789abcdee"}),
    ],
)
def test_another_payload_or_project_has_another_fingerprint(row: dict[str, Any], settings: dict[str, Any]) -> None:
    fingerprint = prepare(1, ROW, SETTINGS).fingerprint
    assert fingerprint
    assert len(bytes.fromhex(fingerprint)) == 32
    assert prepare(1, replace(ROW, **row), replace(SETTINGS, **settings)).fingerprint != fingerprint


def test_what_is_not_sent_does_not_change_the_fingerprint() -> None:
    row = replace(ROW, user_id=3, email=" Sarah.Johnson@email.com ", event_time=AT.replace(microsecond=5))
    settings = replace(SETTINGS, iterable_rate_limit=1, db_host="elsewhere", db_password="secret", log_level="DEBUG")
    assert prepare(9, row, settings).fingerprint == prepare(1, ROW, SETTINGS).fingerprint


@hypothesis_settings(deadline=None)
@given(ROWS, ROWS)
def test_fingerprints_of_two_rows_are_equal_exactly_when_their_payloads_are(one: Record, other: Record) -> None:
    first, second = prepare(1, one, SETTINGS), prepare(2, other, SETTINGS)
    if first.fingerprint and second.fingerprint:
        assert (first.fingerprint == second.fingerprint) == (first.payloads == second.payloads)
    assert prepare(3, one, SETTINGS).fingerprint == first.fingerprint


def test_the_key_stands_in_no_line_of_the_results() -> None:
    assert SETTINGS.iterable_api_key not in prepare(1, ROW, SETTINGS).as_json()


# Results files

STARTED = datetime(2026, 1, 13, 14, 30, 45, tzinfo=timezone.utc)
SEND, DRY_RUN = {"mode": "send"}, {"mode": "dry-run"}
OK = {"ok": True, "status": 200, "code": "Success", "message": "", "attempts": 1}
ENDINGS: dict[str, tuple[int | None, int | None]] = {  # statuses of the two calls
    "success": (200, 200),
    "partial_failure": (200, 400),
    "total_failure": (None, 400),
    "forgotten": (409, None),
    "not_attempted": (None, None),
}


def call(endpoint: str, status: int, message: str = "") -> CallResult:
    code = {200: "Success", 409: "ForgottenUserError"}.get(status, "BadParams")
    return CallResult(endpoint, status == 200, status, code, message)


def delivered(user_id: Any = 2, ending: str = "success", message: str = "", **row: Any) -> Delivery:
    """A user of a run that ended so."""
    delivery = prepare(1, replace(ROW, user_id=user_id, **row), SETTINGS)
    users_update, events_track = ENDINGS[ending]
    if ending == "total_failure":
        users_update = 400
    if users_update:
        delivery.users_update = call("users/update", users_update, message)
    if events_track:
        delivery.events_track = call("events/track", events_track, message)
    assert delivery.status == ending
    return delivery


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(*deliveries)`: a results file that holds them, newer than the ones before."""
    ages = iter(range(100, 0, -1))

    def make(*deliveries: Delivery, run: dict[str, str] = SEND, whole: bool = True) -> Path:
        results = ResultsFile(tmp_path, run, STARTED)
        for delivery in deliveries:
            results.add(delivery)
        if whole:
            results.finish({"outcome": "completed"})
        path = next(path for path in (results.path, Path(f"{results.path}.partial")) if path.exists())
        return aged(path, seconds=next(ages))

    return make


def aged(path: Path, **age: float) -> Path:
    written = time.time() - timedelta(**age).total_seconds()
    os.utime(path, (written, written))
    return path


def remembered(folder: Path) -> dict[Any, str]:
    """Fingerprints by user id."""
    memory = read_memory(folder, threading.Event())
    return {json.loads(user_id): fingerprint.decode() for user_id, fingerprint in memory.items()}


def test_a_results_file_is_this_document(tmp_path: Path) -> None:
    run = {"mode": "send", "database": "shop on /tmp/ü"}
    results = ResultsFile(tmp_path, run, STARTED)
    results.add(delivered())
    results.add(prepare(2, replace(ROW, user_id="b", email=None), SETTINGS))
    results.add(delivered(3, "forgotten", email="x@example.com"))
    summary = {"outcome": "completed", "exit_code": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["integration_results_20260113_143045.json.partial"]
    results.finish(summary)
    assert [path.name for path in tmp_path.iterdir()] == ["integration_results_20260113_143045.json"]
    assert stat.S_IMODE(results.path.stat().st_mode) == 0o600
    text = results.path.read_text("utf-8")
    forgotten = {**OK, "ok": False, "status": 409, "code": "ForgottenUserError"}
    known = prepare(1, ROW, SETTINGS).fingerprint
    one = {"record": 1, "user_id": 2, "email": ROW.email, "event_id": "page-view-37", "status": "success"}
    two = {"record": 2, "user_id": "b", "email": None, "event_id": None, "status": "total_failure"}
    three = {"record": 1, "user_id": 3, "email": "x@example.com", "event_id": "page-view-37", "status": "forgotten"}
    assert json.loads(text) == {
        "run": run,
        "results": [
            {**one, "users_update": OK, "events_track": OK, "fingerprint": known},
            {**two, "users_update": None, "events_track": None, "problem": NO_ADDRESS, "fingerprint": None},
            {
                **three,
                "users_update": forgotten,
                "events_track": None,
                "fingerprint": prepare(1, replace(ROW, email="x@example.com"), SETTINGS).fingerprint,
            },
        ],
        "summary": summary,
    }
    lines = text.splitlines()
    assert [lines[0], lines[2], lines[6], lines[8:]] == ["{", '"results": [', "],", ["}"]]
    assert [json.loads(line.rstrip(","))["user_id"] for line in lines[3:6]] == [2, "b", 3]


def test_each_line_is_on_record_before_the_file_is_whole(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path, SEND, STARTED)
    partial = Path(f"{results.path}.partial")
    for number in range(1, 4):
        results.add(delivered(number))
        assert partial.read_text("utf-8").count('"status": "success"') == number
        assert set(remembered(tmp_path)) == set(range(1, number + 1))


def test_two_files_of_one_second_have_two_names(tmp_path: Path) -> None:
    first, second = ResultsFile(tmp_path, SEND, STARTED), ResultsFile(tmp_path, SEND, STARTED)
    first.finish({})
    third = ResultsFile(tmp_path, SEND, STARTED)
    names = [results.path.name for results in (first, second, third)]
    assert names == [f"integration_results_20260113_1430{second}.json" for second in (45, 46, 47)]


ODD_TEXTS = st.text(st.characters(), max_size=40) | st.sampled_from(
    [
        "\ud83d",
        "\x00\x1f\x7f\x85\u2028\u2029",
        '"}, {"',
        '", "status": "success", ',
        '"fingerprint": "' + "0" * 64 + '"},',
    ]
)


@hypothesis_settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.integers(0, 2**64) | st.text(max_size=20),
        st.tuples(st.sampled_from(list(ENDINGS)), ODD_TEXTS, ODD_TEXTS),
        max_size=5,
    ),
    st.booleans(),
)
def test_any_user_is_one_line_that_is_read_again(users: dict[Any, tuple[str, str, str]], whole: bool) -> None:
    users[-1] = ("success", "", "")  # with whom those not attempted reach the disk, too
    deliveries = [
        delivered(user_id, ending, message, email=f"{email}@x") for user_id, (ending, message, email) in users.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = ResultsFile(Path(folder), SEND, STARTED)
        for delivery in deliveries:
            results.add(delivery)
        if whole:
            results.finish({})
        text = (results.path if whole else Path(f"{results.path}.partial")).read_text("utf-8")
        memory = remembered(Path(folder))
    lines = [json.loads(line.rstrip(",")) for line in text.split("\n") if line.startswith('{"record"')]
    assert [(line["user_id"], line["status"]) for line in lines] == [(key, told[0]) for key, told in users.items()]
    for line, (ending, message, email) in zip(lines, users.values(), strict=True):
        assert joined(line["email"]) == joined(f"{email}@x".strip().lower())
        if ending == "partial_failure":
            assert joined(line["events_track"]["message"]) == joined(message)
    succeeded = [delivery for delivery in deliveries if delivery.status == "success"]
    assert memory == {delivery.user_id: delivery.fingerprint for delivery in succeeded}


def joined(text: str) -> str:
    """The text in ASCII, with two halves of a surrogate pair as one character, as JSON has them."""
    return ascii(text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"))


# The memory


def test_a_dry_run_is_no_memory_and_forgets_nothing(write: Write, tmp_path: Path) -> None:
    write(delivered(1))
    before = remembered(tmp_path)
    write(delivered(1, "total_failure", first_name="new"), delivered(2), run=DRY_RUN)
    assert remembered(tmp_path) == before
    assert set(before) == {1}


def test_the_last_success_counts_in_the_order_of_writing_whatever_the_names(write: Write, tmp_path: Path) -> None:
    first = write(delivered(1), delivered(2))
    second = write(delivered(1, first_name="new"))
    new = prepare(1, replace(ROW, first_name="new"), SETTINGS).fingerprint
    old = prepare(1, ROW, SETTINGS).fingerprint
    assert remembered(tmp_path) == {1: new, 2: old}
    aged(first, seconds=1)
    aged(second, seconds=2)
    assert remembered(tmp_path) == {1: old, 2: old}


@pytest.mark.parametrize("ending", ["partial_failure", "total_failure", "forgotten"])
def test_a_later_failure_with_another_fingerprint_forgets(write: Write, tmp_path: Path, ending: str) -> None:
    write(delivered(1), delivered(2))
    write(delivered(1, ending, first_name="new"))
    assert set(remembered(tmp_path)) == {2}


@pytest.mark.parametrize("ending", ["partial_failure", "total_failure"])
def test_a_later_failure_with_the_same_fingerprint_does_not_forget(write: Write, tmp_path: Path, ending: str) -> None:
    write(delivered(1))
    write(delivered(1, ending))
    assert set(remembered(tmp_path)) == {1}


def test_who_was_not_attempted_or_had_an_unusable_row_is_not_forgotten(write: Write, tmp_path: Path) -> None:
    write(delivered(1), delivered(2))
    unusable = prepare(2, replace(ROW, email=None), SETTINGS)
    write(delivered(1, "not_attempted", first_name="new"), unusable)
    assert set(remembered(tmp_path)) == {1, 2}


def test_files_are_the_memory_of_eight_days(write: Write, tmp_path: Path) -> None:
    aged(write(delivered(1)), days=8, minutes=1)
    aged(write(delivered(2)), days=8, minutes=-1)
    assert set(remembered(tmp_path)) == {2}


def test_a_partial_file_is_memory_without_a_warning(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert write(delivered(1), whole=False).suffix == ".partial"
    write(whole=False)
    write()
    assert set(remembered(tmp_path)) == {1}
    assert caplog.records == []


def test_a_user_id_is_no_other_type_with_the_same_text(write: Write, tmp_path: Path) -> None:
    write(delivered(1), delivered("1"), delivered("null"))
    assert list(remembered(tmp_path)) == [1, "1", "null"]


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_line_that_is_cut_off_costs_this_user_and_a_warning(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    path = write(delivered(1), delivered(2), delivered(3), whole=False)
    path.write_bytes(path.read_bytes()[:-cut])
    assert set(remembered(tmp_path)) == {1, 2}
    assert [path.name in record.getMessage() for record in caplog.records] == [True]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_damaged_line_in_the_middle_costs_this_user_and_a_warning(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(delivered(1), delivered(2), delivered(3))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:4], b"\x00\xff" * 200, *lines[5:]]))
    assert set(remembered(tmp_path)) == {1, 3}
    assert [path.name in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n\n",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe\x00",
        b'{\n"run": {"mode": 5},\n"results": [\n',
        b'{\n"run": "send",\n"results": [\n',
        b'{\n"run": ' + b"[" * 100_000 + b',\n"results": [\n',
        b'{"run": {"mode": "send"}, "results": [{"user_id": 1, "status": "success"}]}',
        b'{\n"run": {"mode": "send"},\n"results": [\n{"user_id": 1, "status": "success", "fingerprint": "0"}\n],\n}',
        b"x" * 1_000_000,
    ],
)
def test_a_file_of_someone_else_is_skipped(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    write(delivered(1))
    foreign = tmp_path / "integration_results_20260101_000000.json"
    foreign.write_bytes(content)
    write(delivered(2))
    assert set(remembered(tmp_path)) == {1, 2}
    if b'"mode": 5' not in content:  # which is one of a mode that this version does not know
        assert [foreign.name in record.getMessage() for record in caplog.records] == [True]


def test_what_is_no_file_is_no_memory(write: Write, tmp_path: Path) -> None:
    write(delivered(1))
    (tmp_path / "integration_results_folder.json").mkdir()
    (tmp_path / "integration_results_link.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "integration_results_fifo.json")
    assert set(remembered(tmp_path)) == {1}


@hypothesis_settings(deadline=None, max_examples=100)
@given(st.data())
def test_whatever_happens_to_a_file_nobody_is_remembered_who_was_not_told(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = ResultsFile(Path(folder), SEND, STARTED)
        for user_id, ending in enumerate(ENDINGS):
            results.add(delivered(f"{ending} of user {user_id}", ending))
        results.finish({})
        content = bytearray(results.path.read_bytes())
        for start in data.draw(st.lists(st.integers(0, len(content)), min_size=1, max_size=3)):
            content[start : start + data.draw(st.integers(0, 50))] = data.draw(st.binary(max_size=10))
        results.path.write_bytes(content)
        known = b" ".join(read_memory(Path(folder), threading.Event()))
    assert not [ending for ending in ENDINGS if ending != "success" and f"{ending} of user".encode() in known]


def test_200_files_of_10_000_users_are_read_in_under_10_seconds(write: Write, tmp_path: Path) -> None:
    """A tenth of them, and in CPU time, so that a busy machine makes no difference."""
    path = write(*(delivered(number, email=f"user{number}@example.com") for number in range(10_000)))
    for number in range(19):
        (tmp_path / f"integration_results_20260101_0000{number:02}.json").write_bytes(path.read_bytes())
    began = time.process_time()
    memory = remembered(tmp_path)
    assert time.process_time() - began < 1
    assert len(memory) == 10_000


def test_a_stop_cuts_the_reading(write: Write, tmp_path: Path) -> None:
    write(delivered(1))
    stop = threading.Event()
    stop.set()
    assert read_memory(tmp_path, stop) == {}
