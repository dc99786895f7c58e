"""A stand-in for Iterable: a server in front of a `Project`, which fails when told to.

    cd tests; python -m lab.standin '{"latency": 0.3, "tls": ["CERT.pem", "KEY.pem"]}'

The keywords are those of `Settings`. It prints {"port": ...} when it is ready, answers
what is asked on stdin, see `Server.ask`, and ends with its stdin, so that it never
outlives the process that started it. Tests and demo hold it by
`standin_handle.StandIn`.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import math
import signal
import socket
import ssl
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lab.standin_project import (
    EMAIL,
    ENDPOINTS,
    SUCCESS,
    USER_ID,
    Project,
    Request,
    Settings,
    encode,
    make_answer,
    make_document,
)

ANY = "*"

KEEPING_ACTIONS = ("reply", "drip_body", "echo_headers")
"""After these the connection stays open."""
ANSWERING_ACTIONS = (*KEEPING_ACTIONS, "cut", "hang_up")
ACTIONS = (*ANSWERING_ACTIONS, "raw", "silence", "reset_before", "reset_after")
OWN_ANSWER_ACTIONS = ("reply", "drip_body", "cut", "hang_up")
"""Without a status these give the project's own answer."""

BUFFER_BYTES = 2**23  # more than any request that a correct program sends
SLOW_BUFFER_BYTES = 4096
SLOW_PACKET_BYTES = 1448
READS_PER_SECOND = 20  # of a slow uplink


@dataclass
class Fault:
    """What goes wrong with a call.

    Actions:

    reply         `status`, `headers` and `content`; without a status the project's
                  own answer
    drip_body     the same, but each byte of the body takes `interval` seconds
    cut           the same, but the connection closes before the last byte
    hang_up       the same, but after `interval` seconds the connection closes
    raw           `content` as it is in place of an answer, then the connection closes,
                  unless `keep_open`
    silence       no answer, until the client leaves
    reset_before  no answer but a TCP reset
    reset_after   the same, but the call is processed
    echo_headers  400 with the request's headers, Api-Key included, in `msg`

    Which calls:

    endpoint      calls of this one only
    users         calls that have one of these users only, singly or in a group
    skip          so many of them pass first
    times         so many of them fail then
    seconds       so long after the first one that failed, others fail, too

    Further keywords:

    latency        in place of that of the settings, in seconds
    processed      the call is processed although its answer is another
    alter          values to replace in the project's own answer; None: to take away
    informational  statuses (103, 102, 100) that are sent `interval` seconds in front of
                   the answer
    extra          what is sent `interval` seconds behind the answer

    `content` and `extra` have a character for each byte.
    """

    action: str = "reply"
    endpoint: str = ANY
    users: Sequence[str] | None = None
    skip: int = 0
    times: float = math.inf
    seconds: float = math.inf
    latency: float | None = None
    processed: bool = False
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content: str = ""
    alter: dict[str, Any] = field(default_factory=dict)
    informational: Sequence[int] = ()
    extra: str = ""
    interval: float = 0.05
    keep_open: bool = False

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"no such action: {self.action}")
        if self.endpoint not in (*ENDPOINTS, ANY):
            raise ValueError(f"no such endpoint: {self.endpoint}")
        gives_own_answer = self.status is None and self.action in OWN_ANSWER_ACTIONS
        if gives_own_answer or self.action == "reset_after":
            self.processed = True
        self._ends = math.inf
        self._identities: set[tuple[str, str]] = set()
        for user in self.users or ():
            self._identities.add((EMAIL, user.lower()))
            self._identities.add((USER_ID, user))

    def strikes(self, request: Request) -> bool:
        """Return whether this call fails. Counts it."""
        if not self._concerns(request):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times <= 0 or request.arrived > self._ends:
            return False
        self.times -= 1
        self._ends = min(self._ends, request.arrived + self.seconds)
        return True

    def _concerns(self, request: Request) -> bool:
        if self.endpoint not in (ANY, request.endpoint):
            return False
        if self.users is None:
            return True
        identities = request.identities
        return any((user.key, user.name) in self._identities for user in identities)

    def change_answer(self, answer: bytes, request: Request) -> bytes:
        """Return what is answered in place of the project's own answer."""
        if self.action == "echo_headers":
            msg = f"Invalid JSON body, headers: {request.headers}"
            return make_answer(400, make_document("BadJsonBody", msg))
        if self.status is not None:
            return make_answer(
                self.status, self.content.encode("latin-1"), self.headers
            )
        if self.alter:
            body = answer.partition(b"\r\n\r\n")[2]
            altered = json.loads(body) | self.alter
            kept = {
                name: altered[name] for name in altered if altered[name] is not None
            }
            return make_answer(read_status(answer), kept)
        return answer

    async def send(
        self,
        answer: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Put the fault on the wire. The caller closes the connection."""
        for status in self.informational:
            writer.write(make_informational_answer(status))
            await self._pause()
        match self.action:
            case "reply" | "echo_headers":
                writer.write(answer)
            case "drip_body":
                await self._drip_body(answer, writer)
            case "cut":
                writer.write(answer[:-1])
            case "hang_up":
                writer.write(answer)
                await self._pause()
            case "raw":
                writer.write(self.content.encode("latin-1"))
            case "reset_before" | "reset_after":
                reset_connection(writer)
        if self.extra:
            await self._pause()
            writer.write(self.extra.encode("latin-1"))
        if self.keep_open or self.action == "silence":
            await reader.read()

    async def _pause(self) -> None:
        if self.interval:
            await asyncio.sleep(self.interval)

    async def _drip_body(self, answer: bytes, writer: asyncio.StreamWriter) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        for byte in body:
            if writer.is_closing():
                return
            writer.write(bytes([byte]))
            await asyncio.sleep(self.interval)


def make_informational_answer(status: int) -> bytes:
    """Return an answer that says that the true one is still to come."""
    line = f"HTTP/1.1 {status} Wait\r\nLink: </style.css>; rel=preload\r\n\r\n"
    return line.encode()


def read_status(answer: bytes) -> int:
    """Return the status of a whole answer."""
    return int(answer[len("HTTP/1.1 ") :][:3])


def reset_connection(writer: asyncio.StreamWriter) -> None:
    """Close the connection by a TCP reset."""
    connection = writer.get_extra_info("socket")
    no_lingering = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_lingering)
    writer.transport.abort()


class Server:
    """Answers the calls of all clients, and keeps what became known of them."""

    def __init__(self, settings: Settings) -> None:
        self._first_settings = settings
        self.reset()

    # What may be asked on stdin

    def ask(self, line: bytes) -> str:
        """Answer a question, [method, keywords] as a line of JSON.

        The answer is [true, result], or [false, text] when it cannot be done.
        """
        method, keywords = json.loads(line)
        try:
            return encode([True, getattr(self, method)(**keywords)])
        except (TypeError, ValueError) as error:
            return encode([False, str(error)])

    def reset(self) -> None:
        """Begin with an empty project, and the settings of the start."""
        self.project = Project(self._first_settings)
        self.faults: list[Fault] = []
        self.journal: list[dict[str, Any]] = []
        self.arrivals: defaultdict[str, list[float]] = defaultdict(list)
        self.answers: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.connections = 0
        self.last_headers: Mapping[str, str] = {}

    def configure(self, **changes: Any) -> None:
        """Change some settings."""
        self.project.configure(**changes)

    def fault(self, **keywords: Any) -> None:
        """Add a fault. Of all that concern a call the first one strikes."""
        self.faults.append(Fault(**keywords))

    def clear_faults(self) -> None:
        """Remove all faults."""
        self.faults.clear()

    def counters(self) -> dict[str, Any]:
        """Return the counts, see `StandIn.counters`."""
        calls = {}
        busiest = {}
        for endpoint, times in self.arrivals.items():
            calls[endpoint] = len(times)
            busiest[endpoint] = find_busiest_second(times)
        throttled = sum(statuses[429] for statuses in self.answers.values())
        return {
            "calls": calls,
            "answers": self.answers,
            "throttled": throttled,
            "connections": self.connections,
            "busiest_second": busiest,
        }

    def state(self) -> dict[str, Any]:
        """Return all that is known but the counts, see `StandIn.state`."""
        return {
            "users": self.project.users,
            "events": self.project.events,
            "journal": self.journal,
            "accepted": self.project.accepted,
            "violations": self.project.violations,
            "last_headers": self.last_headers,
        }

    # The connections

    async def connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer the requests of one client, one after the other."""
        self.connections += 1
        settings = self.project.settings
        if settings.upload_rate and hasattr(writer.transport, "set_read_buffer_limits"):
            # TLS in Python 3.11 or newer, which would take half a megabyte at once
            writer.transport.set_read_buffer_limits(SLOW_BUFFER_BYTES)
        if settings.greeting:
            writer.write(settings.greeting.encode("latin-1"))
        gone = (asyncio.IncompleteReadError, asyncio.TimeoutError, ConnectionError)
        ended = asyncio.CancelledError  # the stand-in ends before the client leaves
        with contextlib.suppress(*gone, ended):
            while await self._answer_next(reader, writer):
                pass
        writer.close()

    async def _answer_next(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request. Return whether the connection stays open."""
        settings = self.project.settings
        try:
            request = await read_request(reader, settings)
        except ValueError as error:
            self.project.violations.append(str(error))
            return False
        answers = self.answers  # a reset while this call is answered makes new ones
        self._record_arrival(request)
        fault = self._find_fault(request)
        answer = await self._prepare_answer(request, fault)
        if fault:
            await fault.send(answer, reader, writer)
        else:
            writer.write(answer)
        client_has_left = reader.at_eof() or writer.is_closing()
        if client_has_left:
            return False
        if fault is None or fault.action in ANSWERING_ACTIONS:
            status = read_status(answer)
            request.line["status"] = status
            answers[request.endpoint][status] += 1
        return fault is None or fault.action in KEEPING_ACTIONS

    async def _prepare_answer(self, request: Request, fault: Fault | None) -> bytes:
        """Process a request unless a fault prevents it, and wait for the latency."""
        answer = SUCCESS
        if fault is None or fault.processed:
            answer = self.project.answer(request)
        latency = self.project.settings.latency
        if fault and fault.latency is not None:
            latency = fault.latency
        if latency:
            await asyncio.sleep(latency)
        if fault:
            answer = fault.change_answer(answer, request)
        return answer

    def _record_arrival(self, request: Request) -> None:
        self.last_headers = request.headers
        self.arrivals[request.endpoint].append(request.arrived)
        if self.project.settings.journal:
            self.journal.append(request.line)

    def _find_fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.strikes(request):
                return fault
        return None


async def read_request(reader: asyncio.StreamReader, settings: Settings) -> Request:
    """Return the next request of a connection.

    Raises:
        ValueError: It is not HTTP/1.1.
        asyncio.IncompleteReadError: The client has left.
        asyncio.TimeoutError: The connection was idle for too long.
    """
    reading = reader.readuntil(b"\r\n\r\n")
    if settings.idle_timeout:
        head = await asyncio.wait_for(reading, settings.idle_timeout)
    else:
        head = await reading
    request_line, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, path, version = request_line.split(" ")
    if version != "HTTP/1.1":
        raise ValueError(f"not HTTP/1.1: {request_line!r}")
    headers = {}
    for line in lines:
        name, value = line.split(": ", 1)
        headers[name.lower()] = value
    size = int(headers.get("content-length", "0"))
    if settings.upload_rate:
        body = await read_slowly(reader, size, settings.upload_rate)
    else:
        body = await reader.readexactly(size)
    return Request(method, path, headers, body)


async def read_slowly(reader: asyncio.StreamReader, size: int, rate: int) -> bytes:
    """Return a body of `size` bytes, of which `rate` are read a second."""
    most = max(1, rate // READS_PER_SECOND)
    body = b""
    while len(body) < size:
        part = await reader.read(min(most, size - len(body)))
        if not part:
            raise asyncio.IncompleteReadError(body, size)
        body += part
        await asyncio.sleep(len(part) / rate)
    return body


def make_kernel_slow(listening: socket.socket) -> None:
    """Let the kernels of both sides take little that nobody has read yet.

    They would else take a megabyte at once: the client's takes more when the packets
    are larger, and 64 KB are usual on a machine's own network.
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SLOW_PACKET_BYTES)


def find_busiest_second(times: Sequence[float]) -> int:
    """Return the most calls that arrived within any one second. Times ascend."""
    most = 0
    for number, arrived in enumerate(times, start=1):
        earlier = bisect.bisect(times, arrived - 1)
        most = max(most, number - earlier)
    return most


async def serve(settings: Settings, tls: tuple[str, str] | None = None) -> None:
    """Serve until stdin ends."""
    server = Server(settings)
    context = None
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*tls)
    buffer = SLOW_BUFFER_BYTES if settings.upload_rate else BUFFER_BYTES
    listener = await asyncio.start_server(
        server.connect, "127.0.0.1", 0, ssl=context, backlog=1024, limit=buffer
    )
    listening = listener.sockets[0]
    if settings.upload_rate:
        make_kernel_slow(listening)
    print(encode({"port": listening.getsockname()[1]}), flush=True)
    questions = asyncio.StreamReader(limit=2**30)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(questions), sys.stdin
    )
    while question := await questions.readline():
        print(server.ask(question), flush=True)


def main(options: dict[str, Any]) -> None:
    """Serve with these settings, and perhaps `tls`, the files of a certificate."""
    # Ctrl-C is for the program under test, which still needs its answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tls = options.pop("tls", None)
    asyncio.run(serve(Settings(**options), tls))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
