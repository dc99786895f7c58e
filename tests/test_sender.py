"""Many users: threads, groups with the single calls behind them, outages and poison."""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterable_client
from iterable_client import (
    EVENTS_TRACK,
    EVENTS_TRACK_BULK,
    USERS_BULK_UPDATE,
    USERS_GET_FIELDS,
    USERS_UPDATE,
    Call,
    HttpAnswer,
    IdentifyBy,
    IterableClient,
    IterableUnavailable,
    KeyRefused,
    NoRoomForThread,
    Sender,
    UserCalls,
)
from lab.clients import (
    LOST,
    OUTAGE,
    PROMPT,
    SUCCESS,
    Reply,
    Script,
    ScriptedTransport,
    identify_number,
    make_answer,
    make_event,
    make_group_answer,
    make_update,
    make_user,
    script_client,
    succeed,
)

UPDATE = USERS_UPDATE.path
TRACK = EVENTS_TRACK.path
BULK_UPDATE = USERS_BULK_UPDATE.path
BULK_TRACK = EVENTS_TRACK_BULK.path
IN_A_ROW = iterable_client.UNUSABLE_IN_A_ROW
POISON = make_answer(500, "GenericError", "An error occurred")
FORGOTTEN = make_answer(409, "ForgottenUserError")
BAD_PARAMS = make_answer(400, "BadParams")
REFUSED_KEY = make_answer(401, "BadApiKey", "Invalid API key")
BOTH_WAYS = pytest.mark.parametrize("bulk", [False, True], ids=["singly", "bulk"])


def make_users(count: int, **options: Any) -> list[UserCalls]:
    return [make_user(number, **options) for number in range(1, count + 1)]


def name(number: int) -> str:
    """Return the identity of user `number`."""
    return identify_number(number).value


def ignore(users: Sequence[UserCalls]) -> None:
    """Announce nothing."""


def send_all(
    client: IterableClient, users: Iterable[UserCalls], *, bulk: bool = False
) -> list[UserCalls]:
    """Send users as a run does. Return them in the order in which they were finished.

    Those of a group that was never handed over do not come back.
    """
    finished = []
    with Sender(client, ignore, bulk=bulk) as sender:
        for user in users:
            sender.submit(user)
            finished += sender.collect()
            while sender.is_full:
                finished += sender.collect(0.1)
        sender.flush()
        while not sender.is_idle:
            finished += sender.collect(0.1)
    return finished


def send_singly(client: IterableClient, count: int) -> list[UserCalls]:
    return send_all(client, make_users(count))


def send_in_bulk(client: IterableClient, count: int) -> list[UserCalls]:
    return send_all(client, make_users(count), bulk=True)


def list_statuses(users: Iterable[UserCalls]) -> list[str]:
    """Return how update and event of each user ended, in the order of their numbers."""
    in_order = sorted(users, key=get_number)
    return [" ".join(map(describe, user.calls)) for user in in_order]


def get_number(user: UserCalls) -> int:
    return user.number


def describe(call: Call) -> str:
    """Return the status of a call, or why it has none."""
    if call.result is None:
        return "none"
    return str(call.result.status or "lost")


# Single calls


def test_a_user_gets_the_update_and_then_the_event() -> None:
    client, transport = script_client()
    finished = send_singly(client, 1)

    assert list_statuses(finished) == ["200 200"]
    assert transport.calls == [
        "users/update user1@example.com",
        "events/track user1@example.com",
    ]


def test_a_user_by_user_id_gets_the_same_calls() -> None:
    client, transport = script_client()
    send_all(client, [make_user(1, IdentifyBy.USER_ID)])

    assert transport.calls == ["users/update u1", "events/track u1"]


def test_a_user_without_an_event_gets_the_update_alone() -> None:
    client, transport = script_client()
    finished = send_all(client, make_users(1, has_event=False))

    assert list_statuses(finished) == ["200"]
    assert transport.calls == ["users/update user1@example.com"]


@pytest.mark.parametrize("answer", [BAD_PARAMS, OUTAGE, POISON])
def test_the_event_is_sent_although_the_update_failed(answer: HttpAnswer) -> None:
    client, transport = script_client(answer, SUCCESS, max_attempts=1)
    finished = send_singly(client, 1)

    assert list_statuses(finished) == [f"{answer.status} 200"]
    assert transport.calls == [
        "users/update user1@example.com",
        "events/track user1@example.com",
    ]


def test_a_forgotten_user_gets_no_event() -> None:
    client, transport = script_client(FORGOTTEN)
    finished = send_singly(client, 1)

    assert list_statuses(finished) == ["409 none"]
    assert transport.calls == ["users/update user1@example.com"]


def test_users_are_announced_before_they_are_sent() -> None:
    client, transport = script_client()
    announced = []

    def announce(users: Sequence[UserCalls]) -> None:
        announced.append([user.number for user in users])
        assert transport.calls == []

    with Sender(client, announce, bulk=True) as sender:
        sender.submit(make_user(1))
        sender.submit(make_user(2))
        sender.flush()

    assert announced == [[1, 2]]


def test_the_end_of_the_block_waits_for_the_calls() -> None:
    client, transport = script_client()
    users = make_users(20)

    with Sender(client, ignore, bulk=False) as sender:
        for user in users:
            sender.submit(user)

    assert list_statuses(users) == ["200 200"] * 20
    assert len(transport.calls) == 40


# Groups


def test_a_group_gets_two_calls() -> None:
    client, transport = script_client()
    finished = send_in_bulk(client, 3)

    names = "user1@example.com user2@example.com user3@example.com"
    assert transport.calls == [
        f"users/bulkUpdate {names}",
        f"events/trackBulk {names}",
    ]
    assert list_statuses(finished) == ["200 200"] * 3


def test_a_group_of_one_gets_single_calls() -> None:
    client, transport = script_client()
    send_in_bulk(client, 1)

    assert transport.calls == [
        "users/update user1@example.com",
        "events/track user1@example.com",
    ]


def test_a_group_without_events_gets_one_call() -> None:
    client, transport = script_client()
    send_all(client, make_users(2, has_event=False), bulk=True)

    assert transport.calls == [
        "users/bulkUpdate user1@example.com user2@example.com",
    ]


def script_group(failed: Sequence[str], single: HttpAnswer) -> Script:
    """Answer that these users failed in a group, and their single calls like this."""

    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        if len(users) == 1:
            return single
        return make_group_answer(users, [user for user in users if user in failed])

    return script


def test_who_is_not_confirmed_is_sent_singly() -> None:
    script = script_group(failed=[name(2)], single=SUCCESS)
    client, transport = script_client(script=script)
    finished = send_in_bulk(client, 3)

    assert list_statuses(finished) == ["200 200"] * 3
    assert "users/update user2@example.com" in transport.calls
    assert "events/track user2@example.com" in transport.calls
    assert len(transport.calls) == 4


def test_who_is_not_confirmed_is_sent_by_user_id() -> None:
    script = script_group(failed=["u2"], single=SUCCESS)
    client, transport = script_client(script=script)
    users = make_users(3, identify_by=IdentifyBy.USER_ID)
    send_all(client, users, bulk=True)

    assert "users/update u2" in transport.calls
    assert "events/trackBulk u1 u3" in transport.calls


def test_the_single_call_says_why_a_user_failed() -> None:
    script = script_group(failed=[name(2)], single=BAD_PARAMS)
    client, _ = script_client(script=script)
    finished = send_in_bulk(client, 3)

    assert list_statuses(finished) == ["200 200", "400 400", "200 200"]


@pytest.mark.parametrize(
    "reply",
    [
        make_answer(400, "BatchTooLarge"),
        HttpAnswer(413, "<h1>too large</h1>", None, sent_at=0.0),
        HttpAnswer(200, "{}", None, sent_at=0.0),
        OUTAGE,
        LOST,
    ],
    ids=["400", "413", "no counts", "503", "no answer"],
)
def test_a_group_that_is_refused_is_sent_singly(reply: Reply) -> None:
    def script(endpoint: str, users: Sequence[str]) -> Reply:
        return SUCCESS if len(users) == 1 else reply

    client, transport = script_client(script=script, max_attempts=1)
    finished = send_in_bulk(client, 3)

    assert list_statuses(finished) == ["200 200"] * 3
    updates = [call for call in transport.calls if call.startswith("users/update ")]
    assert sorted(updates) == [
        "users/update user1@example.com",
        "users/update user2@example.com",
        "users/update user3@example.com",
    ]


def test_a_refused_key_is_the_result_of_the_whole_group() -> None:
    client, transport = script_client(REFUSED_KEY)
    finished = send_in_bulk(client, 3)

    assert list_statuses(finished) == ["401 none"] * 3
    assert transport.calls == [
        "users/bulkUpdate user1@example.com user2@example.com user3@example.com",
    ]
    assert isinstance(client.control.close(), KeyRefused)


def test_dropped_fields_are_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    text = '{"successCount": 2, "failCount": 0, "filteredOutFields": ["b", "a"]}'
    client, _ = script_client(HttpAnswer(200, text, None, sent_at=0.0))

    send_in_bulk(client, 2)

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == [
        "⚠ Iterable drops fields that the project does not take: a, b."
        " Create them in Iterable, or allow new fields in its settings"
    ]


SIZES = st.integers(100, 400_000) | st.just(333_332)


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(SIZES, max_size=20), max_users=st.integers(1, 5))
def test_a_group_has_room_for_users_and_bytes(sizes: list[int], max_users: int) -> None:
    users = [
        UserCalls(number, [make_update(number, size=size), make_event(number)])
        for number, size in enumerate(sizes, 1)
    ]
    groups: list[list[UserCalls]] = []
    client, _ = script_client()

    with (
        mock.patch.object(iterable_client, "MAX_GROUP_USERS", max_users),
        Sender(client, lambda group: groups.append([*group]), bulk=True) as sender,
    ):
        for user in users:
            sender.submit(user)
        sender.flush()

    assert [user for group in groups for user in group] == users
    for group in groups:
        assert 0 < len(group) <= max_users
        assert sum(user.size for user in group) <= iterable_client.MAX_GROUP_BYTES
    for group, following in itertools.pairwise(groups):
        size = sum(user.size for user in [*group, following[0]])
        has_most_users = len(group) == max_users
        assert has_most_users or size > iterable_client.MAX_GROUP_BYTES


def test_a_user_larger_than_a_group_is_sent_alone() -> None:
    large = UserCalls(2, [make_update(2, size=2_000_000), make_event(2)])
    client, transport = script_client()
    finished = send_all(client, [make_user(1), large, make_user(3)], bulk=True)

    assert len(finished) == 3
    assert "users/update user2@example.com" in transport.calls


# What the caller sees


def test_an_open_group_is_not_in_flight() -> None:
    client, transport = script_client()

    with (
        mock.patch.object(iterable_client, "MAX_BULK_IN_FLIGHT", 1),
        Sender(client, ignore, bulk=True) as sender,
    ):
        sender.submit(make_user(1))
        sender.submit(make_user(2))

        assert sender.is_idle
        assert not sender.is_full
        assert sender.collect() == []

    assert transport.calls == []


def hold(event: threading.Event) -> Script:
    """Answer only when the event has come."""

    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        assert event.wait(PROMPT)
        return succeed(endpoint, users)

    return script


def test_a_sender_is_full_with_two_users_a_worker() -> None:
    answered = threading.Event()
    client, _ = script_client(script=hold(answered), workers=2)

    with Sender(client, ignore, bulk=False) as sender:
        for number in range(1, 4):
            sender.submit(make_user(number))
            assert not sender.is_full
        sender.submit(make_user(4))
        is_full = sender.is_full
        answered.set()

    assert is_full
    assert len(sender.collect()) == 4
    assert not sender.is_full
    assert sender.is_idle


def test_collect_waits_for_the_first_user() -> None:
    answered = threading.Event()
    client, _ = script_client(script=hold(answered))

    with Sender(client, ignore, bulk=False) as sender:
        sender.submit(make_user(1))
        assert sender.collect() == []
        assert sender.collect(0.01) == []
        answered.set()
        [user] = sender.collect(PROMPT)

    assert user.number == 1


def test_collect_raises_what_a_worker_raised() -> None:
    client, _ = script_client()
    with (
        mock.patch.object(client, "post", side_effect=KeyError("x")),
        Sender(client, ignore, bulk=False) as sender,
    ):
        sender.submit(make_user(1))
        with pytest.raises(KeyError):
            sender.collect(PROMPT)


@pytest.mark.parametrize(
    ("owner", "method", "error"),
    [
        (ThreadPoolExecutor, "submit", RuntimeError("can't start new thread")),
        (mmap, "mmap", OSError("Cannot allocate memory")),
        (mmap, "mmap", MemoryError("out of memory")),
    ],
)
def test_no_room_for_a_thread_says_so(
    owner: Any, method: str, error: Exception
) -> None:
    client, transport = script_client()
    words = f"no memory or thread for another worker ({error}): lower MAX_WORKERS"

    with (
        mock.patch.object(owner, method, side_effect=error),
        Sender(client, ignore, bulk=False) as sender,
        pytest.raises(NoRoomForThread) as raised,
    ):
        sender.submit(make_user(1))

    assert str(raised.value) == f"{words}, or raise ulimit -v or -u"
    assert transport.calls == []


# A run that ends early


@BOTH_WAYS
def test_after_a_stop_no_user_starts(bulk: bool) -> None:
    client, transport = script_client()
    client.control.end(ValueError("stop"))
    finished = send_all(client, make_users(3), bulk=bulk)

    assert list_statuses(finished) == ["none none"] * 3
    assert transport.calls == []


@pytest.mark.parametrize(
    ("bulk", "statuses"),
    [
        (False, ["200 200", "none none", "none none"]),
        (True, ["200 200", "200 200", "200 200"]),
    ],
)
def test_after_a_stop_a_started_user_gets_the_event(
    bulk: bool, statuses: list[str]
) -> None:
    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        client.control.end(ValueError("stop"))
        return succeed(endpoint, users)

    client, _ = script_client(script=script, workers=1)
    finished = send_all(client, make_users(3), bulk=bulk)

    assert list_statuses(finished) == statuses


@pytest.mark.parametrize(
    ("bulk", "statuses"),
    [
        (False, ["200 none", "none none", "none none"]),
        (True, ["200 none", "200 none", "200 none"]),
    ],
)
def test_an_abandoned_user_gets_no_event(bulk: bool, statuses: list[str]) -> None:
    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        client.control.abort(IterableUnavailable("outage"))
        return succeed(endpoint, users)

    client, transport = script_client(script=script, workers=1)
    finished = send_all(client, make_users(3), bulk=bulk)

    assert list_statuses(finished) == statuses
    assert len(transport.calls) == 1


def test_after_a_stop_no_user_of_a_group_is_sent_singly() -> None:
    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        client.control.end(ValueError("stop"))
        return make_group_answer(users, failed=[name(2)])

    client, transport = script_client(script=script)
    finished = send_in_bulk(client, 2)

    assert list_statuses(finished)[1] == "none none"
    assert "users/update user2@example.com" not in transport.calls


def test_after_a_stop_no_worker_gets_a_user_again() -> None:
    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        client.control.end(ValueError("stop"))
        return make_group_answer(users, failed=users)

    client, _ = script_client(script=script)
    with mock.patch.object(
        Sender, "_send", autospec=True, side_effect=Sender._send
    ) as send:
        send_in_bulk(client, 9)

    assert send.call_count == 1


# How the two users end whose single calls a stop prevents.
UNTOUCHED = "none none"
PERHAPS_UPDATED = {LOST: "lost none", SUCCESS: "200 none"}


@pytest.mark.parametrize("answer", [BAD_PARAMS, OUTAGE, *PERHAPS_UPDATED], ids=str)
def test_after_a_stop_no_user_of_a_failed_group_starts(answer: Reply) -> None:
    def script(endpoint: str, users: Sequence[str]) -> Reply:
        if endpoint == BULK_UPDATE:
            return answer
        client.control.end(ValueError("stop"))
        return succeed(endpoint, users)

    client, transport = script_client(script=script, max_attempts=1, workers=1)
    finished = send_in_bulk(client, 3)

    status = PERHAPS_UPDATED.get(answer, UNTOUCHED)
    assert list_statuses(finished) == ["200 200", status, status]
    assert [len(user.results) for user in finished] == [2, 0, 0]
    assert transport.calls[1:] == [
        "users/update user1@example.com",
        "events/track user1@example.com",
    ]


def test_an_event_that_no_answer_confirms_is_sent_singly_after_a_stop() -> None:
    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        if endpoint == BULK_TRACK:
            client.control.end(ValueError("stop"))
            return make_group_answer(users, failed=[name(2)])
        return succeed(endpoint, users)

    client, transport = script_client(script=script)
    finished = send_in_bulk(client, 2)

    assert list_statuses(finished) == ["200 200"] * 2
    assert transport.calls[-1] == "events/track user2@example.com"


# Outages and poison


def poison(*numbers: int) -> Script:
    """Answer 500 to each call that has one of these users."""
    poisoned = {name(number) for number in numbers}

    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        return succeed(endpoint, users) if poisoned.isdisjoint(users) else POISON

    return script


POISONED = [
    range(1, 31),
    range(50, 80),
    range(71, 101),
    range(3, 100, 3),
    range(1, 101),
]
IDS = ["first in line", "neighbours", "last in line", "scattered", "everybody"]


@BOTH_WAYS
@pytest.mark.parametrize("poisoned", POISONED, ids=IDS)
@pytest.mark.parametrize("workers", [1, 8])
def test_poison_ends_no_run(poisoned: range, workers: int, bulk: bool) -> None:
    client, _ = script_client(script=poison(*poisoned), max_attempts=1, workers=workers)
    finished = send_all(client, make_users(100), bulk=bulk)

    expected = ["200 200"] * 100
    for number in poisoned:
        expected[number - 1] = "500 500"
    assert client.control.close() is None
    assert list_statuses(finished) == expected


OUTAGES = pytest.mark.parametrize(
    "failure",
    [OUTAGE, LOST, HttpAnswer(200, "<html>Sign in</html>", None, sent_at=0.0)],
    ids=["503", "no answer", "a page"],
)


@OUTAGES
def test_an_outage_ends_the_run(failure: Reply) -> None:
    client, transport = script_client(failure, max_attempts=1, workers=1)
    finished = send_singly(client, 100)

    reason = client.control.close()
    assert isinstance(reason, IterableUnavailable)
    assert str(reason) == (
        "20 users in a row got no usable answer, and Iterable takes no call that is"
        " known to be good either"
    )
    assert client.control.nothing_more.is_set()
    assert len(finished) == 100
    assert "users/getFields" in transport.calls
    assert len(transport.calls) < 2 * IN_A_ROW + 10


@OUTAGES
def test_an_outage_ends_a_bulk_run(failure: Reply) -> None:
    client, _ = script_client(failure, max_attempts=1, workers=1)
    finished = send_in_bulk(client, 100)

    assert isinstance(client.control.close(), IterableUnavailable)
    assert len(finished) == 100


def test_the_good_call_is_the_last_accepted_update() -> None:
    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        if len(transport.calls) > 20:
            return OUTAGE
        return SUCCESS

    client, transport = script_client(script=script, max_attempts=1, workers=1)
    send_singly(client, 100)

    repeated = {call for call in transport.calls if transport.calls.count(call) > 1}
    assert isinstance(client.control.close(), IterableUnavailable)
    assert repeated == {"users/update user10@example.com"}


def test_a_run_goes_on_when_an_outage_is_over() -> None:
    client, _ = script_client(
        *[OUTAGE] * 2 * IN_A_ROW, make_answer(), max_attempts=1, workers=1
    )
    finished = send_singly(client, 100)

    assert client.control.close() is None
    delivered = list_statuses(finished).count("200 200")
    assert delivered >= 100 - IN_A_ROW - 2


@pytest.mark.parametrize("answer", [SUCCESS, BAD_PARAMS, FORGOTTEN])
def test_a_usable_answer_begins_a_new_row(answer: HttpAnswer) -> None:
    few = [LOST] * 2 * (IN_A_ROW - 1)
    client, transport = script_client(
        *few, answer, answer, *few, max_attempts=1, workers=1
    )
    send_singly(client, 2 * IN_A_ROW - 1)

    assert client.control.close() is None
    assert "users/getFields" not in transport.calls


def test_while_iterable_is_asked_no_user_is_submitted() -> None:
    asked = threading.Event()
    answered = threading.Event()

    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        if endpoint == USERS_GET_FIELDS.path:
            asked.set()
            assert answered.wait(PROMPT)
            return succeed(endpoint, users)
        return OUTAGE

    client, _ = script_client(script=script, max_attempts=1, workers=IN_A_ROW)
    with Sender(client, ignore, bulk=False) as sender:
        submit_and_collect(sender, IN_A_ROW, asked)
        assert sender.is_full
        assert not sender.is_idle
        answered.set()

    sender.collect()
    assert not sender.is_full
    assert sender.is_idle


def submit_and_collect(sender: Sender, count: int, asked: threading.Event) -> None:
    """Submit so many users, and collect until the question was asked."""
    for user in make_users(count):
        sender.submit(user)
    finished = 0
    while finished < count:
        finished += len(sender.collect(0.1))
    assert asked.wait(PROMPT)


def test_a_run_that_is_ending_does_not_ask() -> None:
    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        client.control.end(ValueError("stop"))
        return OUTAGE

    client, transport = script_client(script=script, max_attempts=1, workers=IN_A_ROW)
    send_singly(client, 3 * IN_A_ROW)

    assert "users/getFields" not in transport.calls


# Any users and any answers

SINGLE_REPLIES: dict[str, Reply] = {
    "success": SUCCESS,
    "refused": BAD_PARAMS,
    "forgotten": FORGOTTEN,
    "poison": POISON,
    "lost": LOST,
}
REPLIES = st.sampled_from([*SINGLE_REPLIES, *["success"] * 3])


class Project:
    """Answers by what each user gets from each of the two single endpoints.

    Attributes:
        replies: For each user the words of both replies.
        unconfirmed: The users whom no answer to a group confirms.
    """

    def __init__(
        self, replies: dict[str, tuple[str, str]], unconfirmed: set[str]
    ) -> None:
        self.replies = replies
        self.unconfirmed = unconfirmed

    def find_reply(self, endpoint: str, user: str) -> str:
        """Return the word of a user's reply."""
        return self.replies[user][endpoint in (TRACK, BULK_TRACK)]

    def answer(self, endpoint: str, users: Sequence[str]) -> Reply:
        """Answer a call."""
        if endpoint == USERS_GET_FIELDS.path:
            return succeed(endpoint, users)
        if len(users) == 1:
            return SINGLE_REPLIES[self.find_reply(endpoint, users[0])]
        failed = [
            user
            for user in users
            if user in self.unconfirmed or self.find_reply(endpoint, user) != "success"
        ]
        return make_group_answer(users, failed)


BOOLEANS = st.booleans()
GROUP_SIZES = st.integers(2, 5)
FEW = st.integers(1, 12)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), bulk=BOOLEANS, max_users=GROUP_SIZES)
def test_every_user_comes_back_once_and_as_singly(
    data: st.DataObject, bulk: bool, max_users: int
) -> None:
    pairs = data.draw(st.lists(st.tuples(REPLIES, REPLIES), max_size=12))
    replies = {name(number): pair for number, pair in enumerate(pairs, 1)}
    unconfirmed = data.draw(st.sets(st.sampled_from([*replies, "nobody"])))
    client, transport = script_client(
        script=Project(replies, unconfirmed).answer, max_attempts=2
    )

    with mock.patch.object(iterable_client, "MAX_GROUP_USERS", max_users):
        finished = send_all(client, make_users(len(pairs)), bulk=bulk)

    assert sorted(map(get_number, finished)) == [*range(1, len(pairs) + 1)]
    assert client.control.close() is None
    assert_calls_are_once(transport, replies)
    assert list_statuses(finished) == [
        describe_pair(update, event) for update, event in pairs
    ]


def describe_pair(update: str, event: str) -> str:
    """Return the statuses of a user who gets these replies."""
    words = {
        "success": "200",
        "refused": "400",
        "forgotten": "409",
        "poison": "500",
        "lost": "lost",
    }
    event_status = "none" if update == "forgotten" else words[event]
    return f"{words[update]} {event_status}"


def assert_calls_are_once(
    transport: ScriptedTransport, replies: dict[str, tuple[str, str]]
) -> None:
    """Check that only what failed was sent again, and that no refusal was."""
    retried = ("poison", "lost")
    for user, (update, event) in replies.items():
        most_updates = 2 if update in retried else 1
        most_events = 2 if event in retried else 1
        assert transport.calls.count(f"{UPDATE} {user}") <= most_updates
        assert transport.calls.count(f"{TRACK} {user}") <= most_events
        for endpoint in (BULK_UPDATE, BULK_TRACK):
            assert count_groups(transport, endpoint, user) <= 1


def count_groups(transport: ScriptedTransport, endpoint: str, user: str) -> int:
    """Return in how many groups of an endpoint a user was."""
    count = 0
    for call in transport.calls:
        path, *users = call.split(" ")
        if path == endpoint and user in users:
            count += 1
    return count


@settings(deadline=None, max_examples=60)
@given(
    count=FEW,
    calls=FEW,
    bulk=BOOLEANS,
    aborts=BOOLEANS,
    max_users=GROUP_SIZES,
)
def test_a_run_that_ends_anywhere_gives_every_user_back(
    count: int, calls: int, bulk: bool, aborts: bool, max_users: int
) -> None:
    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        if len(transport.calls) >= calls:
            end = client.control.abort if aborts else client.control.end
            end(ValueError("stop"))
        return succeed(endpoint, users)

    client, transport = script_client(script=script, workers=3)
    with mock.patch.object(iterable_client, "MAX_GROUP_USERS", max_users):
        finished = send_all(client, make_users(count), bulk=bulk)

    statuses = set(list_statuses(finished))
    possible = {"200 200", "none none"}
    if aborts:
        possible.add("200 none")
    assert sorted(map(get_number, finished)) == [*range(1, count + 1)]
    assert statuses <= possible
