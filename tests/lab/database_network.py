"""What a client may meet in the place of a database, and a proxy that records."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence

BUFFER = 65_536  # bytes
SSL_CAPABILITY = 0x0800


def frame(number: int, payload: bytes) -> bytes:
    """Return a packet of the protocol: length, number, payload."""
    return len(payload).to_bytes(3, "little") + bytes([number]) + payload


def greet(method: str = "caching_sha2_password") -> bytes:
    """Return the first packet of a server without TLS, with its usual login method.

    https://dev.mysql.com/doc/dev/mysql-server/latest/page_protocol_connection_phase_packets_protocol_handshake_v10.html
    """
    capabilities = 0x81BFF7FF & ~SSL_CAPABILITY
    low = (capabilities & 0xFFFF).to_bytes(2, "little")
    high = (capabilities >> 16).to_bytes(2, "little")
    payload = (
        b"\x0a8.0.40\0"
        + (8).to_bytes(4, "little")
        + b"8 bytes!\0"
        + low
        + b"\xff\x02\0"
        + high
        + bytes([21])
        + bytes(10)
        + b"twelve bytes\0"
        + method.encode()
        + b"\0"
    )
    return frame(0, payload)


def ask_for_method(method: str) -> bytes:
    """Return the packet that asks for another login method."""
    return frame(2, b"\xfe" + method.encode() + b"\0" + b"twenty bytes of salt\0")


def ask_for_password() -> bytes:
    """Return the packet of caching_sha2_password for its full authentication."""
    return frame(2, b"\x01\x04")


class FakeServer(contextlib.AbstractContextManager["FakeServer"]):
    """A `with` block around a port that says something and records what it hears.

    It takes one connection, says the first words at once, and each of the next ones
    when it has heard something. Then it hangs up, unless it `stays`.
    """

    def __init__(self, words: Sequence[bytes], *, stays: bool = False) -> None:
        self.heard = b""
        self._words = words
        self._stays = stays
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            with connection:
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        for number, words in enumerate(self._words):
            if number > 0:
                self.heard += connection.recv(BUFFER)
            connection.sendall(words)
        if not self._stays:
            connection.shutdown(socket.SHUT_WR)
        while received := connection.recv(BUFFER):
            self.heard += received


class RecordingProxy(contextlib.AbstractContextManager["RecordingProxy"]):
    """A `with` block around a port that leads to another one.

    `heard` is all that clients have sent through it.
    """

    def __init__(self, target: int) -> None:
        self.heard = b""
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._relay(client, server, self._record)
                self._relay(server, client, lambda _: None)

    def _record(self, received: bytes) -> None:
        self.heard += received

    def _relay(
        self,
        source: socket.socket,
        target: socket.socket,
        notice: Callable[[bytes], None],
    ) -> None:
        def copy() -> None:
            with contextlib.suppress(OSError):
                while received := source.recv(BUFFER):
                    notice(received)
                    target.sendall(received)
                target.shutdown(socket.SHUT_WR)

        threading.Thread(target=copy, daemon=True).start()
