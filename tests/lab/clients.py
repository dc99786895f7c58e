"""Rows, calls and clients for the tests that run parts of the program in this process.

A `ScriptedTransport` takes the place of the network: no socket, no waiting.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import iterable_client
from db_connection import PageViewRow
from iterable_client import (
    Call,
    Endpoint,
    HttpAnswer,
    IdentifyBy,
    Identity,
    IterableClient,
    NoAnswer,
    RetryPolicy,
    RunControl,
    UserCalls,
)
from lab.expected import address
from lab.process import KEY, ROOT
from lab.standin_project import make_document

# Seconds within which a thread comes back that waits for nothing, on a busy machine.
PROMPT = 10.0
# No certificate is in it, so it is loaded at once.
NO_AUTHORITIES = str(ROOT)

ROW = PageViewRow(
    user_id=2,
    first_name="Sarah",
    email="user1@example.com",
    plan_type="pro",
    view_id=37,
    page="pricing",
    browser="desktop",
    location="San Francisco, US",
    event_time="2026-01-13 14:30:45",
)


def build_client(
    url: str = "http://127.0.0.1:1",
    *,
    control: RunControl | None = None,
    max_attempts: int = 3,
    longest_wait: float = 0.001,
    longest_throttling: float = 300.0,
    rate: float = 100_000,
    timeout: float = PROMPT,
    workers: int = 8,
    api_key: str = KEY,
    redact: Callable[[str], str] = str,
    environment: Mapping[str, str] | None = None,
) -> IterableClient:
    """Return a client that is fast, and sees no environment but the given one."""
    variables = {"REQUESTS_CA_BUNDLE": NO_AUTHORITIES, **(environment or {})}
    retry = RetryPolicy(
        max_attempts,
        first_wait=longest_wait,
        longest_wait=longest_wait,
        longest_throttling=longest_throttling,
    )
    with mock.patch.dict(os.environ, variables, clear=True):
        return IterableClient(
            url,
            api_key,
            rate=rate,
            timeout=timeout,
            workers=workers,
            retry=retry,
            control=control or RunControl(),
            redact=redact,
        )


# Calls


def identify_number(
    number: int, identify_by: IdentifyBy = IdentifyBy.EMAIL
) -> Identity:
    """Return the identity of user `number`."""
    value = address(number) if identify_by is IdentifyBy.EMAIL else f"u{number}"
    return Identity(identify_by, value)


def make_update(
    number: int = 1, identify_by: IdentifyBy = IdentifyBy.EMAIL, *, size: int = 0
) -> Call:
    """Return a users/update call. Its payload has `size` bytes, if that is more."""
    identity = identify_number(number, identify_by)
    payload = json.dumps({identify_by.value: identity.value})
    return Call(iterable_client.USERS_UPDATE, identity, payload.ljust(size))


def make_event(
    number: int = 1, identify_by: IdentifyBy = IdentifyBy.EMAIL, *, size: int = 0
) -> Call:
    """Return an events/track call, as `make_update`."""
    identity = identify_number(number, identify_by)
    payload = json.dumps(
        {identify_by.value: identity.value, "id": f"page-view-{number}"}
    )
    return Call(iterable_client.EVENTS_TRACK, identity, payload.ljust(size))


def make_user(
    number: int = 1,
    identify_by: IdentifyBy = IdentifyBy.EMAIL,
    *,
    has_event: bool = True,
) -> UserCalls:
    """Return the calls of user `number`."""
    calls = [make_update(number, identify_by)]
    if has_event:
        calls.append(make_event(number, identify_by))
    return UserCalls(number, calls)


# Answers


def make_answer(
    status: int = 200,
    code: str = "Success",
    message: str = "",
    *,
    retry_after: str | None = None,
) -> HttpAnswer:
    """Return Iterable's answer to a single call."""
    text = json.dumps(make_document(code, message))
    return HttpAnswer(status, text, retry_after, sent_at=0.0)


def make_group_answer(sent: Sequence[str], failed: Sequence[str] = ()) -> HttpAnswer:
    """Return the answer to a bulk call that names the `failed` users."""
    key = "invalidEmails" if "@" in "".join(failed) else "invalidUserIds"
    document = {
        "successCount": len(sent) - len(failed),
        "failCount": len(failed),
        "failedUpdates": {key: list(failed)},
    }
    return HttpAnswer(200, json.dumps(document), None, sent_at=0.0)


SUCCESS = make_answer()
OUTAGE = HttpAnswer(503, "", None, sent_at=0.0)
LOST = NoAnswer("the connection broke")


def succeed(endpoint: str, users: Sequence[str]) -> HttpAnswer:
    """Accept every call."""
    if endpoint == iterable_client.USERS_GET_FIELDS.path:
        return HttpAnswer(200, '{"fields": {}}', None, sent_at=0.0)
    return make_group_answer(users) if "ulk" in endpoint else SUCCESS


# An exception is raised in place of an answer.
Reply = HttpAnswer | Exception
Script = Callable[[str, Sequence[str]], Reply]


class ScriptedTransport:
    """Answers as `script` says, which gets the endpoint's path and the call's users.

    Attributes:
        calls: Each call that was sent: its path, then its users, with spaces between.
    """

    def __init__(self, script: Script = succeed) -> None:
        self.calls: list[str] = []
        self._script = script
        self._changed = threading.Condition()

    def prepare(self) -> None:
        """Take the place of `Transport.prepare`."""

    def exchange(self, endpoint: Endpoint, body: bytes) -> HttpAnswer:
        """Take the place of `Transport.exchange`."""
        sent_at = iterable_client.monotonic()  # type: ignore[attr-defined]
        users = find_users(endpoint, body)
        with self._changed:
            self.calls.append(" ".join([endpoint.path, *users]))
            self._changed.notify_all()
        reply = self._script(endpoint.path, users)
        if isinstance(reply, Exception):
            raise reply
        return reply._replace(sent_at=sent_at)

    def wait_for_calls(self, count: int) -> None:
        """Return when so many calls were sent."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: len(self.calls) >= count, PROMPT)
        assert arrived


def find_users(endpoint: Endpoint, body: bytes) -> list[str]:
    """Return the users of a call, in their order."""
    document: dict[str, Any] = json.loads(body or b"{}")
    items = document[endpoint.items_key] if endpoint.items_key else [document]
    users = [item.get("email", item.get("userId")) for item in items]
    return [user for user in users if user is not None]


def play(*replies: Reply) -> Script:
    """Return a script of single calls: one reply a call, and the last one for ever."""
    left = list(replies)

    def script(endpoint: str, users: Sequence[str]) -> Reply:
        return left.pop(0) if len(left) > 1 else left[0]

    return script


def script_client(
    *replies: Reply, script: Script = succeed, **options: Any
) -> tuple[IterableClient, ScriptedTransport]:
    """Return a client whose calls get these replies, and its transport.

    The last reply is for all further calls. Without any, `script` is asked for them.
    """
    client = build_client(**options)
    transport = ScriptedTransport(play(*replies) if replies else script)
    client._transport = transport  # type: ignore[assignment]
    return client, transport
