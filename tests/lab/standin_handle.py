"""The stand-in for Iterable as tests, demo and benchmark hold it."""

from __future__ import annotations

import contextlib
import json
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from lab.standin import ANY
from lab.standin_project import (
    EVENTS_TRACK,
    EVENTS_TRACK_BULK,
    KEY,
    USERS_BULK_UPDATE,
    USERS_GET_FIELDS,
    USERS_UPDATE,
    make_answer,
    make_document,
)

__all__ = [
    "ANY",
    "EVENTS_TRACK",
    "EVENTS_TRACK_BULK",
    "KEY",
    "UNASKED_ANSWER",
    "USERS_BULK_UPDATE",
    "USERS_GET_FIELDS",
    "USERS_UPDATE",
    "StandIn",
    "Trap",
    "describe",
]

Certificate = Literal["good", "expired", "self-signed", "wrong-name"]
IdentifyBy = Literal["email", "userId", "hybrid"]

TESTS = Path(__file__).resolve().parent.parent

UNASKED_ANSWER = make_answer(
    409, make_document("ForgottenUserError", "The answer to no call")
).decode("latin-1")
"""A whole answer that no call asked for: `fault(extra=UNASKED_ANSWER)`."""


class StandIn(contextlib.AbstractContextManager["StandIn"]):
    """A stand-in in a process of its own.

    Args:
        tls: The kind of certificate. None: no TLS.
        key: The API key that it takes.
        identify_by: The kind of project.
        settings: Those of `standin_project.Settings`.

    Attributes:
        url: The base URL.
        ca_file: The authority of its certificate.
    """

    def __init__(
        self,
        *,
        tls: Certificate | None = None,
        key: str = KEY,
        identify_by: IdentifyBy = "email",
        **settings: Any,
    ) -> None:
        self.key = key
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="standin-")
        self.ca_file = Path(self._folder.name, "ca.pem")
        options = {"key": key, "identify_by": identify_by, **settings}
        if tls:
            options["tls"] = [str(write_certificates(tls, self.ca_file))]
        command = [sys.executable, "-m", "lab.standin", json.dumps(options)]
        self._process = subprocess.Popen(
            command,
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._questions = self._process.stdin
        self._answers = self._process.stdout
        self.port: int = json.loads(self._answers.readline())["port"]
        host = "https://localhost" if tls else "http://127.0.0.1"
        self.url = f"{host}:{self.port}"

    def __exit__(self, *_: object) -> None:
        self._questions.close()
        self._answers.close()
        self._process.wait(timeout=10)
        self._folder.cleanup()

    def _ask(self, method: str, **keywords: Any) -> Any:
        """Raise ValueError with the stand-in's text when it cannot be done."""
        question = json.dumps([method, keywords])
        with self._lock:
            print(question, file=self._questions, flush=True)
            done, answer = json.loads(self._answers.readline())
        if not done:
            raise ValueError(answer)
        return answer

    def reset(self) -> None:
        """Forget users, events, calls and faults; take the settings of the start."""
        self._ask("reset")

    def configure(self, **settings: Any) -> None:
        """Change some of `standin_project.Settings`."""
        self._ask("configure", **settings)

    def fault(
        self,
        action: str = "reply",
        *,
        body: str | bytes = "",
        user: str | None = None,
        users: Sequence[str] | None = None,
        **keywords: Any,
    ) -> None:
        """Let calls go wrong, see `standin.Fault`.

        Of all faults that concern a call the first one strikes, and no other. So
        faults with `times=1` are a sequence.

        Args:
            action: See `standin.Fault`.
            body: Its content.
            user: Short for `users=[user]`.
            users: Only calls that have one of these are concerned.
            keywords: See `standin.Fault`.
        """
        content = body.encode() if isinstance(body, str) else body
        if user is not None:
            users = [user]
        self._ask(
            "fault",
            action=action,
            content=content.decode("latin-1"),
            users=users,
            **keywords,
        )

    def poison(self, *users: str, status: int = 500) -> None:
        """Answer each call that has one of these users with an error, for ever."""
        document = make_document("GenericError", "An error occurred")
        self.fault(status=status, users=users, body=json.dumps(document))

    def clear_faults(self) -> None:
        """Let nothing go wrong any more."""
        self._ask("clear_faults")

    def state(self) -> dict[str, Any]:
        """Return everything it holds.

        A user's name is the address in lower case, or the userId.

        users         {name: fields}
        events        {id: {"email" or "userId", "eventName", "createdAt", ...}}
        journal       in the order of arrival, {"t": time.monotonic(), "endpoint",
                      "user", "event_id": None for groups, "users", "status"}; users
                      as they were sent
        accepted      {endpoint: {name or event id: how often it was taken}}, also for
                      bulk endpoints
        violations    a sentence for each request that no correct program sends
        last_headers  of the last request, names in lower case
        counters      see `counters`
        """
        state: dict[str, Any] = self._ask("state")
        return {**state, "counters": self.counters()}

    def counters(self) -> dict[str, Any]:
        """Return how often it was called.

        calls           {endpoint: number}
        answers         {endpoint: {status: number}}
        throttled       the number of answers 429
        connections     the number of connections
        busiest_second  {endpoint: the most calls that arrived within any one second}
        """
        counters: dict[str, Any] = self._ask("counters")
        answers = {}
        for endpoint, statuses in counters["answers"].items():
            # JSON has made texts of the statuses.
            answers[endpoint] = {int(status): statuses[status] for status in statuses}
        return {**counters, "answers": answers}

    def count_calls(self, endpoint: str = ANY) -> int:
        """Return how many calls have arrived since the start or reset."""
        calls: dict[str, int] = self._ask("counters")["calls"]
        if endpoint == ANY:
            return sum(calls.values())
        return calls.get(endpoint, 0)

    def wait_for_calls(
        self, count: int, endpoint: str = ANY, timeout: float = 10.0
    ) -> None:
        """Return when so many calls have arrived. Raise TimeoutError."""
        end = time.monotonic() + timeout
        while self.count_calls(endpoint) < count:
            if time.monotonic() > end:
                raise TimeoutError(f"{endpoint}: not {count} calls in {timeout} s")
            time.sleep(0.005)


def write_certificates(kind: Certificate, ca_file: Path) -> Path:
    """Write the certificate of the authority that clients trust into `ca_file`.

    Return a file beside it with the server's key and certificate.
    """
    import trustme  # noqa: PLC0415  The demo has none of the tests' packages.

    authority = trustme.CA()
    ca_file.write_bytes(authority.cert_pem.bytes())
    names = ["localhost", "127.0.0.1"]
    if kind == "wrong-name":
        names = ["elsewhere.example"]
    days_left = -1 if kind == "expired" else 30
    end = datetime.now(timezone.utc) + timedelta(days=days_left)
    start = end - timedelta(days=90)
    leaf = authority.issue_cert(*names, not_before=start, not_after=end)
    content = leaf.private_key_and_cert_chain_pem.bytes()
    if kind == "self-signed":  # as is the certificate of every authority
        stranger = trustme.CA()
        content = stranger.private_key_pem.bytes() + stranger.cert_pem.bytes()
    server_file = ca_file.with_name("server.pem")
    server_file.write_bytes(content)
    return server_file


class Trap(socketserver.ThreadingTCPServer):
    """A TCP server that never answers: where a redirect must not lead.

    Attributes:
        received: Each byte that it got.
        connections: The number of connections.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.received = b""
        self.connections = 0
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        serving = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        serving.start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Keep what a client sends, until it leaves."""
        self.connections += 1
        with contextlib.suppress(ConnectionError):
            while data := request.recv(65536):
                self.received += data

    def server_close(self) -> None:
        """End the thread as well."""
        self.shutdown()
        super().server_close()


def describe(state: dict[str, Any]) -> str:
    """Return the users and events of a state, as text for a newcomer."""
    users = state["users"]
    events = state["events"]
    lines = [f"Users in the stand-in for Iterable: {len(users)}"]
    for name, fields in users.items():
        lines += ["", f"  {name}", *format_fields(fields)]
    lines += ["", f"Events in the stand-in for Iterable: {len(events)}"]
    for event_id, event in events.items():
        lines += ["", f"  {event_id}: {format_event(event)}"]
        lines += format_fields(event.get("dataFields", {}))
    return "\n".join(lines)


def format_event(event: dict[str, Any]) -> str:
    user = event.get("email") or event["userId"]
    at = datetime.fromtimestamp(event["createdAt"], timezone.utc)
    return f"{event['eventName']} of {user} at {at:%Y-%m-%d %H:%M:%S} UTC"


def format_fields(fields: dict[str, Any]) -> list[str]:
    """Return a line for each field, in columns."""
    width = max(map(len, fields), default=0)
    lines = []
    for name, value in fields.items():
        shown = json.dumps(value, ensure_ascii=False)
        lines.append(f"    {name:<{width}}  {shown}")
    return lines
