"""A call on the wire: the request, the connection, and answers that do not arrive."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest

import iterable_client
from iterable_client import (
    MAX_ANSWER,
    USERS_UPDATE,
    CallResult,
    IdentifyBy,
    IterableClient,
    NameCache,
    NetworkSettingsError,
    NoAnswer,
    RateLimiter,
    Transport,
    TurnCancelled,
)
from lab import answers
from lab.answers import Answer
from lab.clients import (
    NO_AUTHORITIES,
    PROMPT,
    build_client,
    make_event,
    make_update,
)
from lab.process import KEY
from lab.standin_handle import (
    EVENTS_TRACK_BULK,
    UNASKED_ANSWER,
    USERS_BULK_UPDATE,
    Certificate,
    StandIn,
    Trap,
)

CHECK_PROXY = "check HTTPS_PROXY and ALL_PROXY"
UPDATED = CallResult("users/update", ok=True, status=200, code="Success")
# Bytes, more than the kernels keep of what nobody reads.
LARGE = 30_000_000


@pytest.fixture(scope="module")
def secure() -> Iterator[StandIn]:
    """A stand-in at https://localhost."""
    with StandIn(tls="good") as standin:
        yield standin


def trust(standin: StandIn) -> dict[str, str]:
    """Return the environment in which the stand-in's certificate is trusted."""
    return {"REQUESTS_CA_BUNDLE": str(standin.ca_file)}


def build_transport(
    url: str,
    *,
    timeout: float = PROMPT,
    environment: Mapping[str, str] | None = None,
) -> Transport:
    variables = {"REQUESTS_CA_BUNDLE": NO_AUTHORITIES, **(environment or {})}
    with mock.patch.dict(os.environ, variables, clear=True):
        return Transport(url, {"Api-Key": KEY}, timeout=timeout)


# A server of one connection after the other, in the hands of the test

REPLY = b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"code":"Success"}'


class Peer(contextlib.AbstractContextManager["Peer"]):
    """A server that does only what the test says, over TLS if there is a context."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PROMPT)
        self._threads = ThreadPoolExecutor(4)
        self._sockets: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.port}"

    def __exit__(self, *_: object) -> None:
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes up a thread that reads
            connection.close()
        self._listener.close()
        self._threads.shutdown()

    def accept(self) -> socket.socket:
        """Return the next connection."""
        connection, _ = self._listener.accept()
        connection.settimeout(PROMPT)
        if self._context is not None:
            connection = self._context.wrap_socket(connection, server_side=True)
        return self.keep(connection)

    def keep(self, connection: socket.socket) -> socket.socket:
        """Close the connection at the end."""
        self._sockets.append(connection)
        return connection

    def start(self, action: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Do something in another thread."""
        return self._threads.submit(action, *arguments)

    def serve(self, reply: bytes = REPLY) -> socket.socket:
        """Answer one request of the next connection. Return the connection."""
        connection = self.accept()
        connection.recv(65_536)
        connection.sendall(reply)
        return connection


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


# The request


def read_request(trap: Trap) -> tuple[list[str], str]:
    """Return the lines of the request's head, sorted, and its body."""
    head, _, body = trap.received.decode("ascii").partition("\r\n\r\n")
    return sorted(head.split("\r\n")), body


def build_impatient_client(trap: Trap) -> IterableClient:
    return build_client(trap.url, max_attempts=1, timeout=0.2)


def test_a_single_call() -> None:
    call = make_update()
    with Trap() as trap:
        build_impatient_client(trap).post([call])
        head, body = read_request(trap)

    assert body == call.payload
    assert head == [
        "Accept-Encoding: identity",
        f"Api-Key: {KEY}",
        f"Content-Length: {len(body)}",
        "Content-Type: application/json",
        f"Host: 127.0.0.1:{trap.port}",
        "POST /api/users/update HTTP/1.1",
        "User-Agent: iterable-integration/3",
    ]


@pytest.mark.parametrize("identify_by", IdentifyBy)
def test_a_group_of_users(identify_by: IdentifyBy) -> None:
    calls = [make_update(1, identify_by), make_update(2, identify_by)]
    with Trap() as trap:
        build_impatient_client(trap).post(calls)
        head, body = read_request(trap)

    first, second = json.loads(body)["users"]
    assert first == json.loads(calls[0].payload)
    assert second == json.loads(calls[1].payload)
    assert f"POST /api/{USERS_BULK_UPDATE} HTTP/1.1" in head


def test_a_group_of_events() -> None:
    calls = [make_event(1), make_event(2)]
    with Trap() as trap:
        build_impatient_client(trap).post(calls)
        head, body = read_request(trap)

    first, second = json.loads(body)["events"]
    assert first == json.loads(calls[0].payload)
    assert second == json.loads(calls[1].payload)
    assert f"POST /api/{EVENTS_TRACK_BULK} HTTP/1.1" in head


def test_the_fields_are_read() -> None:
    with Trap() as trap:
        build_impatient_client(trap).get_fields()
        head, body = read_request(trap)

    assert body == ""
    assert "GET /api/users/getFields HTTP/1.1" in head
    assert f"Api-Key: {KEY}" in head


def test_the_key_is_checked_with_an_empty_object() -> None:
    with Trap() as trap:
        build_impatient_client(trap).check_key()
        head, body = read_request(trap)

    assert body == "{}"
    assert "POST /api/users/update HTTP/1.1" in head


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(standin: StandIn, status: int) -> None:
    with Trap() as trap:
        target = f"{trap.url}/api/users/update"
        standin.fault(status=status, headers={"Location": target})
        result = build_client(standin.url).post([make_update()])

        assert trap.connections == 0

    assert result == CallResult(
        "users/update", ok=False, status=status, reason=answers.REDIRECT
    )
    assert standin.count_calls() == 1


# Answers that do not arrive

NO_CHUNK = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"
BROKEN_OFF = [
    *answers.BROKEN_OFF,
    answers.lose("not a chunk", answers.BROKEN, "raw", body=NO_CHUNK),
    answers.lose("not HTTP", answers.BROKEN, "raw", body="\0" * 70_000),
    answers.lose("too many 1xx", answers.BROKEN, "reply", informational=[103] * 11),
]


@pytest.mark.parametrize("answer", BROKEN_OFF, ids=str)
def test_an_answer_that_breaks_off(standin: StandIn, answer: Answer) -> None:
    standin.fault(**answer.fault, interval=0)

    result = build_client(standin.url, max_attempts=2).post([make_update()])

    assert result == answer.result_after(2)
    assert standin.count_calls() == 2


@pytest.mark.parametrize("answer", answers.TIMED_OUT, ids=str)
def test_an_answer_that_takes_too_long(standin: StandIn, answer: Answer) -> None:
    standin.fault(**answer.fault)
    client = build_client(standin.url, max_attempts=2, timeout=0.3)

    result = client.post([make_update()])

    assert result == answer.result_after(2)
    assert standin.count_calls() == 2


@pytest.mark.parametrize("action", ["cut", "drip_body"])
def test_a_refusal_is_known_by_its_status(standin: StandIn, action: str) -> None:
    standin.fault(action, status=400, body=answers.make_body("BadParams", "no"))

    result = build_client(standin.url, timeout=0.3).post([make_update()])

    assert result.status == 400
    assert result.attempts == 1


def test_a_head_that_drips_takes_too_long(peer: Peer) -> None:
    finished = threading.Event()

    def drip() -> None:
        connection = peer.accept()
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        with contextlib.suppress(OSError):
            while not finished.wait(0.05):
                connection.sendall(b"a")

    peer.start(drip)
    transport = build_transport(peer.url, timeout=0.3)

    with pytest.raises(NoAnswer, match="no answer in time"):
        transport.exchange(USERS_UPDATE, b"{}")

    finished.set()


def test_an_endless_answer_is_cut(peer: Peer) -> None:
    beginning = b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 5_000_000
    peer.start(peer.serve, beginning)

    answer = build_transport(peer.url).exchange(USERS_UPDATE, b"{}")

    assert MAX_ANSWER <= len(answer.text) < 2 * MAX_ANSWER
    assert set(answer.text) == {"x"}


def test_an_answer_may_name_each_user_of_a_large_group_twice(peer: Peer) -> None:
    body = b"x" * 1_000_000
    text = b"y" * 3_000_000
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n".encode()

    def serve() -> None:
        connection = peer.accept()
        received = 0
        while received < len(body):
            received += len(connection.recv(65_536))
        connection.sendall(head + text)

    peer.start(serve)
    answer = build_transport(peer.url).exchange(USERS_UPDATE, body)

    assert len(answer.text) == len(text)


def test_an_error_of_our_own_is_unexpected(standin: StandIn) -> None:
    client = build_client(standin.url)

    with mock.patch.object(Transport, "_read", side_effect=KeyError("x")):
        result = client.post([make_update()])

    reason = "an unexpected error (KeyError): see the log file"
    assert result == CallResult(
        "users/update", ok=False, message=reason, reason=reason, is_unexpected=True
    )


# Answers that belong to no call, or come in several parts


@pytest.mark.parametrize("interval", [0, 0.01], ids=["at once", "before"])
def test_informational_answers_are_skipped(standin: StandIn, interval: float) -> None:
    standin.fault(informational=[103, 102, 100], interval=interval, times=1)
    client = build_client(standin.url)

    first = client.post([make_update(1)])
    second = client.post([make_update(2)])

    assert first == UPDATED
    assert second == UPDATED
    assert standin.counters()["connections"] == 1


@pytest.fixture(params=["http", "https"])
def either_peer(secure: StandIn, request: pytest.FixtureRequest) -> Iterator[Peer]:
    """A server without TLS, then one with TLS."""
    context = make_server_context(secure) if request.param == "https" else None
    with Peer(context) as peer:
        yield peer


def make_server_context(secure: StandIn) -> ssl.SSLContext:
    """Return what a server needs to be https://localhost, as the stand-in is."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(secure.ca_file.with_name("server.pem"))
    return context


def keep_connections(client: IterableClient) -> list[Any]:
    """Return a list to which the client will add each connection that it makes."""
    transport = client._transport
    make_connection = transport._make_connection
    made: list[Any] = []

    def make_and_keep() -> Any:
        made.append(make_connection())
        return made[-1]

    transport._make_connection = make_and_keep  # type: ignore[method-assign]
    return made


def wait_for_bytes(connection: Any) -> None:
    """Return when something has arrived on a connection, be it its end."""
    readable, _, _ = select.select([connection.sock], [], [], PROMPT)
    assert readable


def test_an_answer_to_no_call_is_nobodys(either_peer: Peer, secure: StandIn) -> None:
    client = build_client(either_peer.url, environment=trust(secure))
    connections = keep_connections(client)
    serving = either_peer.start(either_peer.serve)
    client.post([make_update(1)])
    serving.result(PROMPT).sendall(UNASKED_ANSWER.encode("latin-1"))
    wait_for_bytes(connections[0])

    either_peer.start(either_peer.serve)
    result = client.post([make_update(2)])

    assert result == UPDATED


@pytest.mark.parametrize("count", [1, 16_000, 200_000])
def test_bytes_behind_an_answer_are_no_answer(
    either_peer: Peer, secure: StandIn, count: int
) -> None:
    client = build_client(either_peer.url, environment=trust(secure))
    either_peer.start(either_peer.serve, REPLY + b"x" * count)
    client.post([make_update(1)])

    either_peer.start(either_peer.serve)
    result = client.post([make_update(2)])

    assert result == UPDATED


# Connections


def test_a_connection_is_used_again(standin: StandIn) -> None:
    client = build_client(standin.url)

    for number in range(1, 6):
        client.post([make_update(number)])

    assert standin.counters()["connections"] == 1


def wait_for_connections(standin: StandIn, count: int) -> None:
    arrived = threading.Event()
    for _ in range(500):
        if standin.counters()["connections"] >= count:
            return
        arrived.wait(PROMPT / 500)
    raise TimeoutError


@pytest.fixture(params=["http", "https"])
def either_server(
    standin: StandIn, secure: StandIn, request: pytest.FixtureRequest
) -> StandIn:
    """A stand-in without TLS, then one with TLS."""
    server = standin if request.param == "http" else secure
    server.reset()
    return server


def test_the_connection_is_open_before_the_turn(
    either_server: StandIn, secure: StandIn
) -> None:
    client = build_client(either_server.url, environment=trust(secure))
    calls_before_turn = []

    def wait_for_turn(*_: object) -> None:
        wait_for_connections(either_server, 1)
        calls_before_turn.append(either_server.count_calls())

    with mock.patch.object(RateLimiter, "wait_for_turn", wait_for_turn):
        client.post([make_update()])

    assert calls_before_turn == [0]
    assert either_server.count_calls() == 1


def test_a_connection_that_cannot_be_opened_takes_no_turn() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = build_client(f"http://127.0.0.1:{port}", max_attempts=1)

    with mock.patch.object(RateLimiter, "wait_for_turn") as wait_for_turn:
        result = client.post([make_update()])

    assert not result.ok
    wait_for_turn.assert_not_called()


def test_a_cancelled_call_sends_nothing(standin: StandIn) -> None:
    client = build_client(standin.url)

    with (
        mock.patch.object(RateLimiter, "wait_for_turn", side_effect=TurnCancelled),
        pytest.raises(TurnCancelled),
    ):
        client.post([make_update()])

    assert standin.count_calls() == 0


def lapse_by_closing(connection: socket.socket) -> None:
    connection.close()


def lapse_by_speaking(connection: socket.socket) -> None:
    connection.sendall(UNASKED_ANSWER.encode("latin-1"))


@pytest.mark.parametrize("lapse", [lapse_by_closing, lapse_by_speaking])
def test_a_lapsed_connection_costs_no_attempt(
    peer: Peer, lapse: Callable[[socket.socket], None]
) -> None:
    client = build_client(peer.url, max_attempts=1)
    connections = keep_connections(client)
    turns = []

    def wait_for_turn(*_: object) -> None:
        turns.append(1)
        lapse(peer.accept())
        wait_for_bytes(connections[0])
        peer.start(peer.serve)

    with mock.patch.object(RateLimiter, "wait_for_turn", wait_for_turn):
        result = client.post([make_update()])

    assert result == UPDATED
    assert client.attempts_made == 1
    assert turns == [1]


def test_the_tickets_of_a_tls_server_are_no_lapse(secure: StandIn) -> None:
    secure.reset()
    client = build_client(secure.url, environment=trust(secure))
    connections = keep_connections(client)
    turns = []

    def wait_for_turn(*_: object) -> None:
        wait_for_bytes(connections[0])
        turns.append(1)

    with mock.patch.object(RateLimiter, "wait_for_turn", wait_for_turn):
        result = client.post([make_update()])

    assert result == UPDATED
    assert turns == [1]


# How long sending may take


def read_slowly(peer: Peer, before: float, between: float) -> None:
    """Read one request of LARGE bytes, and answer it."""
    pause = threading.Event()
    connection = peer.accept()
    pause.wait(before)
    received = 0
    with contextlib.suppress(OSError):
        while received < LARGE:
            received += len(connection.recv(65_536))
            pause.wait(between)
        connection.sendall(REPLY)


def test_sending_may_take_longer_than_connecting(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterable_client, "CONNECT_TIMEOUT", 0.1)
    peer.start(read_slowly, peer, 0.5, 0)
    transport = build_transport(peer.url)

    answer = transport.exchange(USERS_UPDATE, b"x" * LARGE)

    assert answer.status == 200


def test_sending_to_a_silent_server_is_bounded(peer: Peer) -> None:
    peer.start(peer.accept)
    transport = build_transport(peer.url, timeout=0.3)

    with pytest.raises(NoAnswer, match="no answer in time"):
        transport.exchange(USERS_UPDATE, b"x" * LARGE)


def test_sending_to_a_slow_server_is_bounded_as_a_whole(
    either_peer: Peer, secure: StandIn
) -> None:
    either_peer.start(read_slowly, either_peer, 0, 0.005)
    transport = build_transport(either_peer.url, timeout=0.5, environment=trust(secure))

    with pytest.raises(NoAnswer, match="no answer in time"):
        transport.exchange(USERS_UPDATE, b"x" * LARGE)


# Names


class Resolver:
    """Takes the place of the resolver for names. An address is its own answer."""

    def __init__(self, *answers: list[str] | OSError) -> None:
        self._answers = list(answers)
        self.asked = 0

    def __call__(self, host: str, port: int, *_: object, **__: object) -> list[Any]:
        """Take the place of `socket.getaddrinfo`."""
        if host[0].isdigit():
            return self._list_streams([host], port)
        self.asked += 1
        answer = self._answers[0]
        if len(self._answers) > 1:
            self._answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return self._list_streams(answer, port)

    @staticmethod
    def _list_streams(addresses: list[str], port: int) -> list[Any]:
        stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*stream, (address, port)) for address in addresses]


UNKNOWN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@contextlib.contextmanager
def resolving(*answers: list[str] | OSError) -> Iterator[Resolver]:
    resolver = Resolver(*answers)
    with mock.patch.object(socket, "getaddrinfo", resolver):
        yield resolver


def dial(cache: NameCache, unreachable: Sequence[str] = ()) -> str:
    """Return the address to which the cache opens a connection."""

    def create_connection(place: tuple[str, int], timeout: float) -> mock.Mock:
        if place[0] in unreachable:
            raise ConnectionRefusedError
        return mock.Mock(address=place[0])

    with mock.patch.object(socket, "create_connection", create_connection):
        connection: Any = cache.connect("api.example.com", 443, PROMPT)
    return str(connection.address)


def test_many_threads_look_a_name_up_once() -> None:
    cache = NameCache()

    with (
        resolving(["192.0.2.1", "192.0.2.2"]) as resolver,
        mock.patch.object(socket, "create_connection"),
        ThreadPoolExecutor(20) as threads,
    ):
        for _ in range(20):
            threads.submit(cache.connect, "api.example.com", 443, PROMPT)

    assert resolver.asked == 1


def test_threads_that_waited_share_a_failure() -> None:
    cache = NameCache()

    with (
        mock.patch.object(iterable_client, "monotonic", return_value=1000.0),
        resolving(UNKNOWN) as resolver,
        ThreadPoolExecutor(20) as threads,
    ):
        dialled = [threads.submit(dial, cache) for _ in range(20)]

    assert resolver.asked == 1
    for connection in dialled:
        assert isinstance(connection.exception(), socket.gaierror)


def dial_later(
    seconds: float, *answers: list[str] | OSError, unreachable: Sequence[str] = ()
) -> str:
    """Open a connection, and another one so many seconds later. Return its address.

    The `unreachable` addresses are so at first only.
    """
    cache = NameCache()
    with (
        mock.patch.object(iterable_client, "monotonic", return_value=1000.0) as clock,
        resolving(*answers),
    ):
        with contextlib.suppress(OSError):
            dial(cache, unreachable)
        clock.return_value += seconds
        return dial(cache)


OLD = ["192.0.2.1"]
NEW = ["192.0.2.2"]


@pytest.mark.parametrize(("seconds", "found"), [(29, OLD), (31, NEW)])
def test_a_name_is_looked_up_again_after_30_seconds(
    seconds: float, found: list[str]
) -> None:
    assert [dial_later(seconds, OLD, NEW)] == found


@pytest.mark.parametrize(("seconds", "found"), [(0.5, OLD), (2, NEW)])
def test_addresses_that_fail_are_looked_up_again_soon(
    seconds: float, found: list[str]
) -> None:
    assert [dial_later(seconds, OLD, NEW, unreachable=OLD)] == found


def test_an_unknown_name_is_looked_up_again_soon() -> None:
    assert [dial_later(2, UNKNOWN, NEW)] == NEW


def test_old_addresses_are_better_than_none() -> None:
    assert [dial_later(31, OLD, UNKNOWN)] == OLD


def test_an_address_that_fails_is_tried_last() -> None:
    cache = NameCache()

    with resolving(["192.0.2.1", "192.0.2.2"]):
        assert dial(cache, unreachable=["192.0.2.1"]) == "192.0.2.2"
        assert dial(cache) == "192.0.2.2"


def test_the_next_address_is_tried(standin: StandIn) -> None:
    url = f"http://localhost:{standin.port}"

    with resolving(["127.0.0.99", "127.0.0.1"]):
        result = build_client(url, max_attempts=1).post([make_update()])

    assert result == UPDATED


def test_a_retry_looks_the_name_up_again(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterable_client, "LOOK_UP_INTERVAL", 0.0)
    url = f"http://localhost:{standin.port}"

    with resolving(["127.0.0.99"], ["127.0.0.1"]) as resolver:
        result = build_client(url, max_attempts=2).post([make_update()])

    assert result.ok
    assert result.attempts == 2
    assert resolver.asked == 2


# Why there is no connection


def fail_to_connect(
    url: str = "https://localhost", environment: Mapping[str, str] | None = None
) -> CallResult:
    """Return the result of a call that has two attempts, and gets no answer."""
    client = build_client(url, max_attempts=2, timeout=0.5, environment=environment)
    result = client.post([make_update()])
    assert result.status is None
    assert result.reason == result.message
    return result


def test_an_unknown_name_is_named() -> None:
    with resolving(UNKNOWN):
        result = fail_to_connect("https://api.example.com")

    assert result.attempts == 2
    assert result.reason == (
        f"the host name of api.example.com is unknown (DNS): {answers.CHECK_URL}"
    )


def test_a_refused_connection_names_the_place() -> None:
    refused = OSError(errno.ECONNREFUSED, "Connection refused")
    with mock.patch.object(socket, "socket", side_effect=refused):
        result = fail_to_connect("https://localhost:8443")

    assert result.attempts == 2
    assert result.reason == (
        f"no connection to localhost:8443 (Connection refused): {answers.CHECK_URL}"
    )


def test_a_server_without_tls_is_named(peer: Peer) -> None:
    peer.start(peer.serve, b"SSH-2.0-OpenSSH_9.2\r\n")

    client = build_client(f"https://127.0.0.1:{peer.port}", max_attempts=1)
    result = client.post([make_update()])

    place = f"127.0.0.1:{peer.port}"
    assert result.reason.startswith(f"no connection to {place} (TLS failed: ")
    assert result.reason.endswith(f": {answers.CHECK_URL}")


def test_a_silent_server_is_named(peer: Peer) -> None:
    peer.start(peer.accept)

    result = fail_to_connect(f"https://127.0.0.1:{peer.port}")

    assert result.reason == (
        f"no connection to 127.0.0.1:{peer.port} (no answer in time):"
        f" {answers.CHECK_URL}"
    )


@pytest.mark.parametrize("kind", ["expired", "self-signed", "wrong-name"])
def test_a_certificate_that_is_not_trusted_is_not_retried(kind: Certificate) -> None:
    with StandIn(tls=kind) as standin:
        result = fail_to_connect(standin.url, trust(standin))

        assert standin.count_calls() == 0

    place = f"localhost:{standin.port}"
    assert result.attempts == 1
    assert not result.is_retryable
    assert result.reason.startswith(f"the certificate of {place} is not trusted (")
    assert result.reason.endswith("REQUESTS_CA_BUNDLE is for a company's own CA")


# The environment


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_companys_own_authority_is_trusted(secure: StandIn, variable: str) -> None:
    environment = {"REQUESTS_CA_BUNDLE": "", variable: str(secure.ca_file)}
    client = build_client(secure.url, environment=environment)

    assert client.post([make_update()]) == UPDATED


def test_a_stranger_is_not_trusted(secure: StandIn) -> None:
    result = fail_to_connect(secure.url, {"REQUESTS_CA_BUNDLE": ""})

    assert f"the certificate of localhost:{secure.port}" in result.reason


def test_a_ca_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(NetworkSettingsError, match="The CA file /nowhere"):
        build_client(environment={"REQUESTS_CA_BUNDLE": "/nowhere"})


class Tunnel(Peer):
    """A proxy to one server, which keeps the request that it got."""

    def __init__(self, target: StandIn, context: ssl.SSLContext | None = None) -> None:
        super().__init__(context)
        self._target = target
        scheme = "http" if context is None else "https"
        self.proxy = f"{scheme}://ann:p%40ss@localhost:{self.port}"
        self.request = self.start(self._open_tunnel)

    def _open_tunnel(self) -> str:
        client = self.accept()
        request = client.recv(65_536).decode()
        server = self.keep(socket.create_connection(("127.0.0.1", self._target.port)))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        self.start(self._relay, client, server)
        return request

    @staticmethod
    def _relay(client: socket.socket, server: socket.socket) -> None:
        """Pass bytes both ways, in one thread: a TLS socket is not safe in two."""
        others = {client: server, server: client}
        with contextlib.suppress(OSError, ValueError):
            while True:
                readable, _, _ = select.select(others, [], [])
                for source in readable:
                    data = source.recv(65_536)
                    if not data:
                        return
                    others[source].sendall(data)


@pytest.fixture
def tunnel(secure: StandIn) -> Iterator[Tunnel]:
    secure.reset()
    tunnel = Tunnel(secure)
    with tunnel:
        yield tunnel


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_does_not_see_the_key(
    secure: StandIn, tunnel: Tunnel, variable: str
) -> None:
    environment = {**trust(secure), variable: tunnel.proxy}
    client = build_client(secure.url, environment=environment)

    result = client.post([make_update()])

    request = tunnel.request.result(PROMPT)
    assert result == UPDATED
    assert request.startswith(f"CONNECT localhost:{secure.port} HTTP/1.")
    assert "proxy-authorization: basic yw5uonbac3m=" in request.lower()
    assert KEY not in request


def test_a_proxy_may_be_reached_over_tls(secure: StandIn) -> None:
    secure.reset()
    tunnel = Tunnel(secure, make_server_context(secure))
    with tunnel:
        environment = {**trust(secure), "HTTPS_PROXY": tunnel.proxy}
        client = build_client(secure.url, environment=environment)

        assert client.post([make_update()]) == UPDATED
        assert client.post([make_update()]) == UPDATED

    assert secure.counters()["connections"] == 1


def test_the_certificate_of_a_proxy_is_the_proxys(secure: StandIn) -> None:
    tunnel = Tunnel(secure, make_server_context(secure))
    with tunnel:
        result = fail_to_connect(secure.url, {"HTTPS_PROXY": tunnel.proxy})

    place = f"the proxy localhost:{tunnel.port}"
    assert result.reason.startswith(f"the certificate of {place} is not trusted (")
    assert f": {CHECK_PROXY};" in result.reason


def test_the_tunnel_is_open_before_the_turn(secure: StandIn, tunnel: Tunnel) -> None:
    environment = {**trust(secure), "HTTPS_PROXY": tunnel.proxy}
    client = build_client(secure.url, environment=environment)
    calls_before_turn = []

    def wait_for_turn(*_: object) -> None:
        wait_for_connections(secure, 1)
        calls_before_turn.append(secure.count_calls())

    with mock.patch.object(RateLimiter, "wait_for_turn", wait_for_turn):
        client.post([make_update()])

    assert calls_before_turn == [0]


@pytest.mark.parametrize("spared", ["localhost", "*"])
def test_a_host_of_no_proxy_is_called_directly(secure: StandIn, spared: str) -> None:
    proxy = {"ALL_PROXY": "http://127.0.0.1:1", "NO_PROXY": spared}
    client = build_client(secure.url, environment={**trust(secure), **proxy})

    assert client.post([make_update()]) == UPDATED


def test_a_proxy_never_reads_a_call_of_plain_http(standin: StandIn) -> None:
    environment = {"ALL_PROXY": "http://127.0.0.1:1", "HTTP_PROXY": "http://x"}
    client = build_client(standin.url, environment=environment)

    assert client.post([make_update()]) == UPDATED


def test_a_dead_proxy_is_named_without_its_password() -> None:
    proxy = {"HTTPS_PROXY": "http://ann:geheim@127.0.0.1:1"}

    result = fail_to_connect(environment=proxy)

    assert result.attempts == 2
    assert result.reason == (
        f"no connection to the proxy 127.0.0.1:1 (Connection refused): {CHECK_PROXY}"
    )


def test_an_unknown_proxy_is_named() -> None:
    with resolving(UNKNOWN):
        result = fail_to_connect(environment={"HTTPS_PROXY": "http://proxy.lan:3128"})

    assert result.reason == (
        f"the host name of the proxy proxy.lan:3128 is unknown (DNS): {CHECK_PROXY}"
    )


def test_a_silent_proxy_is_named(peer: Peer) -> None:
    peer.start(peer.accept)

    result = fail_to_connect(environment={"HTTPS_PROXY": peer.url})

    assert result.reason == (
        f"no connection to the proxy 127.0.0.1:{peer.port} (no answer in time):"
        f" {CHECK_PROXY}"
    )


@pytest.mark.parametrize(
    ("status", "attempts"),
    [
        ("403 Forbidden", 1),
        ("407 Proxy Authentication Required", 1),
        ("502 Bad Gateway", 2),
        ("503 Service Unavailable", 2),
    ],
)
def test_the_refusal_of_a_proxy_is_not_retried(
    peer: Peer, status: str, attempts: int
) -> None:
    reply = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()
    for _ in range(attempts):
        peer.start(peer.serve, reply)

    result = fail_to_connect(environment={"HTTPS_PROXY": peer.url})

    place = f"the proxy 127.0.0.1:{peer.port}"
    assert result.attempts == attempts
    assert result.reason == f"{place} refuses the connection ({status}): {CHECK_PROXY}"


@pytest.mark.parametrize(
    "proxy",
    [
        "http://ann:gehe/im@proxy:1",
        "http://ann:gehe?im@proxy:1",
        "http://ann:geheim€@proxy:1",
        "http://:1",
        "socks5://p:1",
    ],
)
def test_a_proxy_that_cannot_be_used_is_an_error(proxy: str) -> None:
    with pytest.raises(NetworkSettingsError) as error:
        build_client("https://localhost", environment={"HTTPS_PROXY": proxy})

    assert str(error.value) == (
        "HTTPS_PROXY or ALL_PROXY cannot be used: it must be like"
        " http://user:password@host:port, with / ? # @ in the password as"
        " %2F %3F %23 %40"
    )
