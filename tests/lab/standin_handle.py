"""The stand-in for Iterable as tests, demo and benchmark hold it: started, told what to do, asked, and closed."""

from __future__ import annotations

import base64
import contextlib
import json
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from lab.standin import ANY, EVENTS_TRACK, EVENTS_TRACK_BULK, KEY, USERS_BULK_UPDATE, USERS_UPDATE  # noqa: F401

Certificate = Literal["good", "expired", "self-signed", "wrong-name"]


class StandIn:
    """A stand-in in a process of its own. `url` is its base URL, `ca_file` the authority of its certificate.

    `settings` are those of standin.Settings. Raises RuntimeError when it does not start.
    """

    def __init__(self, *, port: int = 0, tls: Certificate | None = None, key: str = KEY, **settings: Any) -> None:
        self.key = key
        self.ca_file: Path | None = None
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="standin-")
        options = {"port": port, "key": key, **settings}
        if tls:
            folder = Path(self._folder.name)
            self.ca_file = folder / "ca.pem"
            write_certificates(tls, folder)
            options["tls"] = [str(folder / "certificate.pem"), str(folder / "key.pem")]
        command = [sys.executable, str(Path(__file__).with_name("standin.py")), json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin and self._process.stdout
        self._questions, self._answers = self._process.stdin, self._process.stdout
        ready = self._answers.readline()
        if not ready:
            self.close()
            raise RuntimeError(f"the stand-in did not start: exit code {self._process.returncode}")
        self.port = json.loads(ready)["port"]
        self.url = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._questions.close()
        self._answers.close()
        self._process.wait(timeout=10)
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        return self._process.pid

    def reset(self) -> None:
        """Forget users, events, calls and faults; the settings are those of the start again."""
        self._ask("reset")

    def configure(self, **settings: Any) -> None:
        """Change settings of standin.Settings: latency, limits, others, forgotten, disallowed, type_clash, refused ...

        `refused={USERS_BULK_UPDATE: {"ann@example.com": ["conflictEmails", "old@example.com"]}}` lets bulkUpdate
        refuse Ann, and name another address for it; None in place of the pair names none at all.
        """
        self._ask("configure", **{name: [*v] if isinstance(v, set | frozenset) else v for name, v in settings.items()})

    def fault(self, action: str = "reply", *, body: str | bytes = "", **rule: Any) -> None:
        """Let calls go wrong as standin.Fault says.

        Of several rules for one call the first that strikes is the only one. So rules with `times=1` are a sequence:
        each takes one call, in the order in which they were given.

        A bulk answer becomes another by `alter`: {"successCount": -1} does not add up, {"failedUpdates": None} leaves
        the deprecated lists only, {"disallowedEventNames": ["page_view"]}, {"invalidEmails": ["ANN@EXAMPLE.COM"]}.
        """
        content = base64.b64encode(body.encode() if isinstance(body, str) else body).decode()
        self._ask("fault", action=action, body=content, **rule)

    def state(self) -> dict[str, Any]:
        """Everything it holds.

        users          {address: fields}
        events         {id: {"email", "eventName", "createdAt", "dataFields", ...}}
        journal        [{"t", "endpoint", "email", "event_id", "emails", "status"}] in the order of arrival; a bulk call
                       has None for `email` and `event_id`, and all its addresses in `emails`
        counters       what `counters` gives
        accepted       {endpoint: {address or event id: how often it was taken}}, of bulk endpoints too
        violations     sentences, one for each request that no correct program sends (at most 100)
        last_headers   of the last request, names in lower case
        """
        state: dict[str, Any] = self._ask("state")
        return {**state, "counters": _with_numbers(state["counters"])}

    def counters(self) -> dict[str, Any]:
        """How often what happened.

        calls            {endpoint: number}
        answers          {endpoint: {status: number}}
        throttled        answers with status 429
        connections      accepted, and their TLS handshake done
        busiest_second   {endpoint: the most calls that ever arrived within one second}
        """
        return _with_numbers(self._ask("counters"))

    def wait_for_calls(self, count: int, endpoint: str = ANY, timeout: float = 10.0) -> None:
        """Return when so many calls have arrived since the start or reset. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while True:
            calls = self._ask("counters")["calls"]
            if (sum(calls.values()) if endpoint == ANY else calls.get(endpoint, 0)) >= count:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"fewer than {count} calls of {endpoint} in {timeout} s")
            time.sleep(0.005)

    def _ask(self, method: str, **keywords: Any) -> Any:
        """Raises ValueError with the stand-in's text when it cannot be done."""
        with self._lock:
            self._questions.write(json.dumps([method, keywords]).encode() + b"\n")
            self._questions.flush()
            done, answer = json.loads(self._answers.readline())
        if not done:
            raise ValueError(answer)
        return answer


def _with_numbers(counters: dict[str, Any]) -> dict[str, Any]:
    """JSON has made texts of the statuses."""
    answers = counters["answers"].items()
    return {**counters, "answers": {endpoint: {int(s): n for s, n in each.items()} for endpoint, each in answers}}


def write_certificates(kind: Certificate, folder: Path) -> None:
    """Write ca.pem, which clients trust, and certificate.pem with key.pem for the server."""
    import trustme  # here, because the demo has none of the tests' packages

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    if kind == "self-signed":  # as is the certificate of every authority
        stranger = trustme.CA()
        certificate, key = stranger.cert_pem, stranger.private_key_pem
    else:
        names = ["elsewhere.example"] if kind == "wrong-name" else ["localhost", "127.0.0.1"]
        end = datetime.now(timezone.utc) + timedelta(days=-1 if kind == "expired" else 30)
        leaf = authority.issue_cert(*names, not_before=end - timedelta(days=90), not_after=end)
        certificate, key = leaf.cert_chain_pems[0], leaf.private_key_pem
    certificate.write_to_path(str(folder / "certificate.pem"))
    key.write_to_path(str(folder / "key.pem"))


class Trap:
    """A TCP server that keeps each byte it gets in `received`, and never answers: where a redirect must not lead."""

    def __init__(self) -> None:
        trap = self
        self.received = b""
        self.connections = 0

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                trap.connections += 1
                with contextlib.suppress(ConnectionError):
                    while data := self.request.recv(65536):
                        trap.received += data

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> Trap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def describe(state: dict[str, Any]) -> str:
    """The users and events of a state, as text for a newcomer."""
    lines = [f"Users in the stand-in for Iterable: {len(state['users'])}"]
    for email, fields in state["users"].items():
        lines += ["", f"  {email}", *_fields(fields)]
    lines += ["", f"Events in the stand-in for Iterable: {len(state['events'])}"]
    for event_id, event in state["events"].items():
        at = datetime.fromtimestamp(event["createdAt"], timezone.utc)
        who = event.get("email") or event["userId"]
        lines += ["", f"  {event_id}: {event['eventName']} of {who} at {at:%Y-%m-%d %H:%M:%S} UTC"]
        lines += _fields(event.get("dataFields", {}))
    return "\n".join(lines)


def _fields(fields: dict[str, Any]) -> list[str]:
    width = max(map(len, fields), default=0)
    return [f"    {name:<{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
