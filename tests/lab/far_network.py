"""A network between the program and the stand-in that takes time, as a TCP proxy.

Run as a script it is the proxy, a process of its own; FarNetwork starts it:

    with StandIn(tls="good") as standin, FarNetwork(standin.url) as network:
        ... network.url in place of standin.url ...

It sees bytes only, so TLS passes through as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

DELAY = 0.075  # seconds each way, as from Europe to the east of North America
BACKLOG = 1024  # connections that wait to be accepted


class FarNetwork(contextlib.AbstractContextManager["FarNetwork"]):
    """A proxy before a server; `url` is the server's, with the port of the proxy.

    `delay` is in seconds, for each direction. The delay of each piece of data differs
    from it by up to `jitter`, but no byte overtakes another of its connection. The
    opening of a connection takes a round trip more.
    """

    def __init__(self, url: str, *, delay: float = DELAY, jitter: float = 0.0) -> None:
        server = urlsplit(url)
        settings = {
            "host": server.hostname,
            "port": server.port,
            "delay": delay,
            "jitter": jitter,
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = self._read_number()
        self.url = f"{server.scheme}://{server.hostname}:{self.port}"

    def __exit__(self, *_: object) -> None:
        # The end of its standard input ends the process.
        self._process.communicate(timeout=10)

    def count_connections(self) -> int:
        """How many connections were opened so far."""
        assert self._process.stdin
        print("count", file=self._process.stdin, flush=True)
        return self._read_number()

    def _read_number(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())


class Proxy:
    """What the connections share."""

    def __init__(self, *, host: str, port: int, delay: float, jitter: float) -> None:
        self.host = host
        self.port = port
        self.delay = delay
        self.jitter = jitter
        self.connections = 0

    def choose_delay(self) -> float:
        """Return how long the next piece of data travels, in seconds."""
        return self.delay + random.uniform(-self.jitter, self.jitter)


class End(asyncio.Protocol):
    """One end of a connection. What it receives is written to `peer` later."""

    transport: asyncio.Transport
    peer: asyncio.Transport | None = None

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.loop = asyncio.get_running_loop()
        self.last_arrival = 0.0
        self.under_way: deque[Callable[[asyncio.Transport], object]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport. Small packets are not held back."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Pass the data on."""
        self.do_later(lambda peer: peer.write(data))

    def eof_received(self) -> bool:
        """Pass on that nothing more comes. The other direction stays open."""
        self.do_later(lambda peer: peer.write_eof())
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """Close the other end when the last data has arrived there."""
        self.do_later(lambda peer: peer.close())

    def do_later(self, action: Callable[[asyncio.Transport], object]) -> None:
        """Let this happen at the other end after the delay, and after all before it."""
        arrival = self.loop.time() + self.proxy.choose_delay()
        self.last_arrival = max(arrival, self.last_arrival)
        # The loop keeps no order among timers of one moment, the queue does.
        self.under_way.append(action)
        self.loop.call_at(self.last_arrival, self.do_next)

    def do_next(self) -> None:
        """Let the oldest action that is under way happen."""
        action = self.under_way.popleft()
        if self.peer is not None and not self.peer.is_closing():
            action(self.peer)


class ClientEnd(End):
    """The end at the client."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the connection to the server be opened."""
        super().connection_made(transport)
        self.proxy.connections += 1
        # Before Python 3.11 a transport starts to read after this, whatever it is told.
        self.loop.call_soon(self.transport.pause_reading)
        self.opening = self.loop.create_task(self.open_peer())

    async def open_peer(self) -> None:
        """Connect to the server, a round trip later, and let the client's data pass.

        The client's system takes the connection for open at once. As nothing is read
        for a round trip, the first data arrives as late as if it were not.
        """
        await asyncio.sleep(2 * self.proxy.delay)
        server_end = End(self.proxy)
        server_end.peer = self.transport
        try:
            self.peer, _ = await self.loop.create_connection(
                lambda: server_end, self.proxy.host, self.proxy.port
            )
        except OSError:
            self.transport.close()
        else:
            self.transport.resume_reading()


async def serve(settings: dict[str, Any]) -> None:
    """Print the port, and answer each line of input with the count, to its end."""
    proxy = Proxy(**settings)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: ClientEnd(proxy), "127.0.0.1", 0, backlog=BACKLOG
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()

    def answer() -> None:
        if os.read(sys.stdin.fileno(), 1024):
            print(proxy.connections, flush=True)
        else:
            ended.set()

    loop.add_reader(sys.stdin.fileno(), answer)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
