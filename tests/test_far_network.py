"""The far network of the benchmark delays, and changes nothing else."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest
import requests

from lab.far_network import FarNetwork
from lab.standin_handle import USERS_UPDATE, StandIn

TIMEOUT = 30  # seconds


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets."""

    def handle(self) -> None:
        """Serve one connection."""
        while data := self.request.recv(65536):
            self.request.sendall(data)


@pytest.fixture(scope="module")
def echo_url() -> Iterator[str]:
    """The URL of a server that sends back what it gets."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def connect(network: FarNetwork) -> socket.socket:
    return socket.create_connection(("127.0.0.1", network.port), timeout=TIMEOUT)


def receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer if the connection ends."""
    with connection.makefile("rb") as file:
        return file.read(size)


def test_it_delays_opening_and_both_directions(echo_url: str) -> None:
    with FarNetwork(echo_url, delay=0.05) as network, connect(network) as connection:
        durations = []
        for _ in range(2):
            started = time.monotonic()
            connection.sendall(b"word")
            assert receive(connection, 4) == b"word"
            durations.append(time.monotonic() - started)

    # One round trip takes 0.1 s, and the first word waits for the opening as well.
    assert durations[0] > 0.19
    assert durations[1] > 0.09


def test_bytes_keep_their_order(echo_url: str) -> None:
    words = [b"%4d" % number for number in range(1000)]

    network = FarNetwork(echo_url, delay=0.02, jitter=0.02)
    with network, connect(network) as connection:
        for word in words:
            connection.sendall(word)
        assert receive(connection, 4000) == b"".join(words)


def test_the_end_of_a_connection_is_passed_on(echo_url: str) -> None:
    with FarNetwork(echo_url, delay=0.0) as network, connect(network) as connection:
        connection.sendall(b"last word")
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection, 100) == b"last word"


def test_tls_passes_through_and_connections_are_counted() -> None:
    with StandIn(tls="good") as standin, FarNetwork(standin.url, delay=0) as network:
        url = f"{network.url}/api/{USERS_UPDATE}"
        for _ in range(3):
            answer = requests.post(url, verify=str(standin.ca_file), timeout=TIMEOUT)
            assert answer.status_code == 401
        assert network.count_connections() == 3
