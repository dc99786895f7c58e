"""The stand-in for Iterable as tests, demo and benchmark hold it: started, told what to do, asked, and closed."""

from __future__ import annotations

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


class StandIn(contextlib.AbstractContextManager["StandIn"]):
    """A stand-in in a process of its own. `url` is its base URL, `ca_file` the authority of its certificate."""

    def __init__(self, *, tls: Certificate | None = None, key: str = KEY, **settings: Any) -> None:
        self.key = key
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="standin-")
        self.ca_file = Path(self._folder.name, "ca.pem")
        if tls:
            settings["tls"] = [str(write_certificates(tls, self.ca_file))]
        command = [sys.executable, str(Path(__file__).with_name("standin.py")), json.dumps({"key": key, **settings})]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = json.loads(self._process.stdout.readline())["port"]
        self.url = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=10)
        self._folder.cleanup()

    def _ask(self, method: str, **keywords: Any) -> Any:
        """Raises ValueError with the stand-in's text when it cannot be done."""
        with self._lock:
            print(json.dumps([method, keywords]), file=self._process.stdin, flush=True)
            done, answer = json.loads(self._process.stdout.readline())
        if not done:
            raise ValueError(answer)
        return answer

    def reset(self) -> None:
        """Forget users, events, calls and faults; the settings are those of the start again."""
        self._ask("reset")

    def configure(self, **settings: Any) -> None:
        """Change some of standin.Settings."""
        self._ask("configure", **settings)

    def fault(self, action: str = "reply", *, body: str | bytes = "", **rule: Any) -> None:
        """Let calls go wrong as standin.Fault says; `body` is its content.

        Of several rules for one call the first that strikes is the only one, so rules with `times=1` are a sequence.
        """
        content = body.encode() if isinstance(body, str) else body
        self._ask("fault", action=action, content=content.decode("latin-1"), **rule)

    def state(self) -> dict[str, Any]:
        """Everything it holds.

        users, events   {address: fields}, {id: {"email", "eventName", "createdAt", "dataFields", ...}}
        journal         in the order of arrival, {"t", "endpoint", "email", "event_id", "emails", "status"}
        accepted        {endpoint: {address or event id: how often it was taken}}, of bulk endpoints too
        violations      sentences, one for each request that no correct program sends
        last_headers    of the last request, names in lower case
        counters        what `counters` gives
        """
        return {**self._ask("state"), "counters": self.counters()}

    def counters(self) -> dict[str, Any]:
        """`calls`, {endpoint: number}; `answers`, {endpoint: {status: number}}; `throttled`, those of status 429;
        `connections`; `busiest_second`, {endpoint: the most calls that ever arrived within one second}."""
        counters = self._ask("counters")
        answers = counters["answers"].items()  # JSON has made texts of the statuses
        return {**counters, "answers": {endpoint: {int(s): n for s, n in each.items()} for endpoint, each in answers}}

    def wait_for_calls(self, count: int, endpoint: str = ANY, timeout: float = 10.0) -> None:
        """Return when so many calls have arrived since the start or reset. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while sum(n for each, n in self._ask("counters")["calls"].items() if endpoint in (ANY, each)) < count:
            if time.monotonic() > end:
                raise TimeoutError(f"fewer than {count} calls of {endpoint} in {timeout} s")
            time.sleep(0.005)


def write_certificates(kind: Certificate, ca_file: Path) -> Path:
    """Write the authority that clients trust, and a file with the server's key and certificate, which is returned."""
    import trustme  # here, because the demo has none of the tests' packages

    authority = trustme.CA()
    ca_file.write_bytes(authority.cert_pem.bytes())
    names = ["elsewhere.example"] if kind == "wrong-name" else ["localhost", "127.0.0.1"]
    end = datetime.now(timezone.utc) + timedelta(days=-1 if kind == "expired" else 30)
    leaf = authority.issue_cert(*names, not_before=end - timedelta(days=90), not_after=end)
    content = leaf.private_key_and_cert_chain_pem.bytes()
    if kind == "self-signed":  # as is the certificate of every authority
        stranger = trustme.CA()
        content = stranger.private_key_pem.bytes() + stranger.cert_pem.bytes()
    ca_file.with_name("server.pem").write_bytes(content)
    return ca_file.with_name("server.pem")


class Trap(socketserver.ThreadingTCPServer):
    """A TCP server that keeps each byte it gets in `received`, and never answers: where a redirect must not lead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.received, self.connections, self.port = b"", 0, self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError):
            while data := request.recv(65536):
                self.received += data

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


def describe(state: dict[str, Any]) -> str:
    """The users and events of a state, as text for a newcomer."""
    lines = [f"Users in the stand-in for Iterable: {len(state['users'])}"]
    for email, fields in state["users"].items():
        lines += ["", f"  {email}", *in_columns(fields)]
    lines += ["", f"Events in the stand-in for Iterable: {len(state['events'])}"]
    for event_id, event in state["events"].items():
        at = datetime.fromtimestamp(event["createdAt"], timezone.utc)
        lines += ["", f"  {event_id}: {event['eventName']} of {event['email']} at {at:%Y-%m-%d %H:%M:%S} UTC"]
        lines += in_columns(event.get("dataFields", {}))
    return "\n".join(lines)


def in_columns(fields: dict[str, Any]) -> list[str]:
    width = max(map(len, fields), default=0)
    return [f"    {name:<{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
