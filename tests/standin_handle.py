"""The stand-in for Iterable as tests, demo and benchmark hold it: started, told what to do, asked, and closed."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socketserver
import subprocess
import sys
import tempfile
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from standin import ANY, EVENTS_TRACK, KEY, USERS_UPDATE

__all__ = ["ANY", "EVENTS_TRACK", "KEY", "USERS_UPDATE", "StandIn", "Trap", "describe"]

Certificate = Literal["good", "expired", "self-signed", "wrong-name"]


class StandIn:
    """A stand-in in a process of its own. `url` is its base URL, `ca_file` the authority of its certificate.

    Its settings are those of standin.Settings. Raises RuntimeError when it does not start.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        tls: Certificate | None = None,
        latency: float = 0.0,
        key: str = KEY,
        limit_users: int = 500,
        limit_events: int = 2000,
        others: int = 0,
        retry_after: str | None = None,
        journal: bool = True,
    ) -> None:
        self.key = key
        self._folder = tempfile.TemporaryDirectory(prefix="standin-")
        command = [sys.executable, str(Path(__file__).with_name("standin.py")), f"--port={port}", f"--key={key}"]
        command += [f"--latency={latency}", f"--limit-users={limit_users}", f"--limit-events={limit_events}"]
        command += [f"--others={others}", *([] if journal else ["--no-journal"])]
        if retry_after is not None:
            command.append(f"--retry-after={retry_after}")
        self.ca_file: Path | None = None
        if tls:
            folder = Path(self._folder.name)
            self.ca_file = folder / "ca.pem"
            write_certificates(tls, folder)
            command += ["--tls", str(folder / "certificate.pem"), str(folder / "key.pem")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout
        ready = self._process.stdout.readline()
        if not ready:
            self.close()
            raise RuntimeError(f"the stand-in did not start: exit code {self._process.returncode}")
        ports = json.loads(ready)
        self.port, self._control_port = ports["port"], ports["control_port"]
        self.url = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=10)
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        return self._process.pid

    def reset(self) -> None:
        """Forget users, events, calls and faults; the settings are those of the start again."""
        self._ask("reset")

    def configure(self, **settings: Any) -> None:
        """Change latency, limit_users, limit_events, others, retry_after, forgotten (addresses), key or journal."""
        self._ask("configure", **settings)

    def fault(self, action: str = "reply", *, body: str | bytes = "", **rule: Any) -> None:
        """Let calls go wrong as standin.Fault says. Of several rules for one call the first strikes."""
        content = {"body": body} if isinstance(body, str) else {"body_base64": base64.b64encode(body).decode()}
        self._ask("fault", action=action, **content, **rule)

    def state(self) -> dict[str, Any]:
        """Everything it holds.

        users          {address: fields}
        events         {id: {"email", "eventName", "createdAt", "dataFields", ...}}
        journal        [{"t", "endpoint", "email", "event_id", "status", "fault"}] in the order of arrival
        counters       what `counters` gives
        accepted       {endpoint: {address or event id: how often a call for it was a success}}
        violations     sentences, one for each request that no correct program sends (at most 100)
        last_headers   of the last request, names in lower case
        """
        state: dict[str, Any] = self._ask("state")
        state["counters"] = _with_numbers(state["counters"])
        return state

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
        if not self._ask("wait_for_calls", count=count, endpoint=endpoint, timeout=timeout):
            raise TimeoutError(f"fewer than {count} calls of {endpoint} in {timeout} s")

    def _ask(self, method: str, **arguments: Any) -> Any:
        """Raises ValueError with the stand-in's text when it cannot be done."""
        connection = http.client.HTTPConnection("127.0.0.1", self._control_port, timeout=60)
        try:
            connection.request("POST", f"/{method}", json.dumps(arguments))
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(answer)
        return answer


def _with_numbers(counters: dict[str, Any]) -> dict[str, Any]:
    """JSON has made texts of the statuses."""
    answers = {
        endpoint: {int(status): number for status, number in statuses.items()}
        for endpoint, statuses in counters["answers"].items()
    }
    return {**counters, "answers": answers}


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
