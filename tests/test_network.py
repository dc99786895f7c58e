"""Names, certificates, proxies and slow uplinks between the program and Iterable."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from lab import process
from lab.database import DatabaseServer
from lab.expected import address, find_delivered
from lab.process import CreateCustomers, Ended, RunMain
from lab.standin_handle import (
    EVENTS_TRACK,
    EVENTS_TRACK_BULK,
    UNASKED_ANSWER,
    USERS_BULK_UPDATE,
    Certificate,
    StandIn,
    Trap,
)

CHECK_URL = "check ITERABLE_API_BASE_URL and the network"
CHECK_PROXY = "check HTTPS_PROXY and ALL_PROXY"


@pytest.fixture(scope="module")
def secure() -> Iterator[StandIn]:
    """A stand-in at https://localhost."""
    with StandIn(tls="good", latency=0.2) as standin:
        yield standin


@pytest.fixture(scope="module")
def database(create_customers: CreateCustomers) -> dict[str, str]:
    return create_customers(50)


def find_update_results(ended: Ended) -> list[tuple[int, str]]:
    """The different (attempts, message) of the users/update calls of a run."""
    found = set()
    for line in ended.lines.values():
        call = line["users_update"]
        if call is not None:
            found.add((call["attempts"], call["message"]))
    return sorted(found)


# Look-ups of the name

# main.py, with a resolver of its own for localhost. ANSWERS has the addresses that it
# finds: at the first look-up, at the second ..., and the last ones from then on. The
# number of look-ups is printed at the end.
RESOLVER = """
import json, os, socket, sys

answers = json.loads(os.environ["ANSWERS"])
get_other_addresses = socket.getaddrinfo
look_ups = 0


def get_addresses(host, port, *arguments, **keywords):
    global look_ups
    if host != "localhost":
        return get_other_addresses(host, port, *arguments, **keywords)
    look_ups += 1
    addresses = answers.pop(0) if len(answers) > 1 else answers[0]
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [
        (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
        for address in addresses
    ]


socket.getaddrinfo = get_addresses
import main

exit_code = main.main()
print(look_ups, file=sys.stderr)
sys.exit(exit_code)
"""
DEAD = "127.0.0.99"  # nothing listens there
ALIVE = "127.0.0.1"


def run_with_resolver(
    run_main: RunMain,
    database: dict[str, str],
    secure: StandIn,
    *answers: list[str],
    attempts: str = "2",
) -> Ended:
    """A run whose resolver finds these addresses, at one look-up after the other."""
    secure.reset()
    return run_main(
        database=database,
        url=secure.url,
        program=("-c", RESOLVER),
        PYTHONPATH=str(process.ROOT),
        REQUESTS_CA_BUNDLE=str(secure.ca_file),
        ITERABLE_MAX_ATTEMPTS=attempts,
        ANSWERS=json.dumps(answers),
    )


def test_many_connections_look_up_the_name_once(
    run_main: RunMain, database: dict[str, str], secure: StandIn
) -> None:
    ended = run_with_resolver(run_main, database, secure, [ALIVE])

    assert ended.exit_code == 0
    assert len(find_delivered(secure)) == 50
    assert secure.counters()["connections"] > 10
    assert int(ended.errors) == 1


def test_a_second_address_is_tried_in_the_same_attempt(
    run_main: RunMain, database: dict[str, str], secure: StandIn
) -> None:
    ended = run_with_resolver(run_main, database, secure, [DEAD, ALIVE])

    assert ended.exit_code == 0
    assert find_update_results(ended) == [(1, "")]


def test_the_name_is_looked_up_again_when_no_address_answers(
    run_main: RunMain, database: dict[str, str], secure: StandIn
) -> None:
    ended = run_with_resolver(
        run_main, database, secure, [DEAD], [ALIVE], attempts="10"
    )

    assert ended.exit_code == 0
    assert len(find_delivered(secure)) == 50
    assert 2 <= int(ended.errors) < 10  # and not once for each connection


def test_an_unknown_name_is_named(
    run_main: RunMain, database: dict[str, str], secure: StandIn
) -> None:
    ended = run_with_resolver(run_main, database, secure, [])

    words = f"the host name of localhost:{secure.port} is unknown (DNS): {CHECK_URL}"
    assert {message for _, message in find_update_results(ended)} == {words}
    assert f": {words}\n" in ended.console
    assert secure.counters()["connections"] == 0


# Certificates


@pytest.mark.parametrize("kind", ["expired", "self-signed", "wrong-name"])
def test_a_certificate_that_is_not_trusted_gets_one_attempt(
    run_main: RunMain, create_customers: CreateCustomers, kind: Certificate
) -> None:
    with StandIn(tls=kind) as standin:
        ended = run_main(
            database=create_customers(2),
            url=standin.url,
            REQUESTS_CA_BUNDLE=str(standin.ca_file),
        )
        assert standin.count_calls() == 0

    [(attempts, message)] = find_update_results(ended)
    assert ended.exit_code == 1
    assert attempts == 1
    assert "the certificate of localhost" in message
    assert "is not trusted" in message
    assert "REQUESTS_CA_BUNDLE is for a company's own CA" in message
    assert message in ended.console


# Proxies


def run_through_proxy(
    run_main: RunMain, database: dict[str, str], secure: StandIn, proxy: str
) -> Ended:
    return run_main(
        "--limit",
        "2",
        database=database,
        url=secure.url,
        HTTPS_PROXY=proxy,
        REQUESTS_CA_BUNDLE=str(secure.ca_file),
        ITERABLE_MAX_ATTEMPTS="2",
        ITERABLE_TIMEOUT="0.5",
    )


def test_a_proxy_that_is_not_there_is_named(
    run_main: RunMain, database: dict[str, str], secure: StandIn
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    ended = run_through_proxy(
        run_main, database, secure, f"http://name:secret@127.0.0.1:{port}"
    )

    [(_, message)] = find_update_results(ended)
    refused = f"no connection to the proxy 127.0.0.1:{port} (Connection refused)"
    assert ended.exit_code == 1
    assert message == f"{refused}: {CHECK_PROXY}"
    assert "secret" not in ended.everything


def test_a_proxy_that_says_nothing_is_named(
    run_main: RunMain, database: dict[str, str], secure: StandIn
) -> None:
    with Trap() as proxy:
        ended = run_through_proxy(run_main, database, secure, proxy.url)

    [(_, message)] = find_update_results(ended)
    assert ended.exit_code == 1
    assert message.startswith(f"no connection to the proxy 127.0.0.1:{proxy.port}")
    assert "in time" in message
    assert message.endswith(CHECK_PROXY)


class RefusingProxy(socketserver.StreamRequestHandler):
    """A proxy that wants to be told a name and password."""

    def handle(self) -> None:
        """Refuse one connection."""
        while self.rfile.readline().strip():
            pass  # the request and its headers
        self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")


@pytest.fixture
def refusing_proxy() -> Iterator[str]:
    """The URL of a RefusingProxy."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), RefusingProxy) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_proxy_that_refuses_gets_one_attempt(
    run_main: RunMain, database: dict[str, str], secure: StandIn, refusing_proxy: str
) -> None:
    ended = run_through_proxy(run_main, database, secure, refusing_proxy)

    [(attempts, message)] = find_update_results(ended)
    assert ended.exit_code == 1
    assert attempts == 1
    assert "the proxy 127.0.0.1" in message
    assert "(407 Proxy Authentication Required)" in message
    assert CHECK_PROXY in message


# Connections


def test_a_connection_stays_open_while_its_call_waits(
    run_main: RunMain, database: dict[str, str], secure: StandIn
) -> None:
    secure.reset()

    ended = run_main(
        database=database,
        url=secure.url,
        REQUESTS_CA_BUNDLE=str(secure.ca_file),
        MAX_WORKERS="20",
        ITERABLE_RATE_LIMIT="50",
    )

    assert ended.exit_code == 0
    assert ended.summary["success"] == 50
    assert secure.counters()["connections"] <= 20


@pytest.mark.parametrize("interval", [0, 0.05], ids=["at once", "before"])
def test_informational_answers_shift_no_other_answer(
    run_main: RunMain, database: dict[str, str], standin: StandIn, interval: float
) -> None:
    standin.configure(forgotten=[address(9)])
    for number in range(3, 7):
        standin.fault(user=address(number), informational=[103, 102], interval=interval)

    ended = run_main("--limit", "20", database=database, MAX_WORKERS="1")

    assert ended.exit_code == 0
    assert ended.lines[9]["status"] == "forgotten"
    assert ended.summary["success"] == 19
    assert address(9) not in find_delivered(standin)


def test_an_answer_to_no_call_goes_with_its_connection(
    run_main: RunMain, database: dict[str, str], secure: StandIn
) -> None:
    secure.reset()
    secure.fault(endpoint=EVENTS_TRACK, user=address(1), extra=UNASKED_ANSWER)

    ended = run_main(
        "--limit",
        "2",
        database=database,
        url=secure.url,
        REQUESTS_CA_BUNDLE=str(secure.ca_file),
        MAX_WORKERS="1",
        ITERABLE_RATE_LIMIT="1",  # so it arrives before the next call is sent
    )

    assert ended.exit_code == 0
    assert ended.summary["success"] == 2
    assert secure.counters()["connections"] == 2


# Slow uplinks

# main.py, where half a second is the longest time for a connection to be opened.
IMPATIENT = """
import sys
import iterable_client

iterable_client.CONNECT_TIMEOUT = 0.5
import main

sys.exit(main.main())
"""
LONG_NAME = 40_000  # characters, so that 20 users make a body of 800 KB
# Bytes a second. The kernels take half a megabyte of a body at once.
SLOW_UPLINK = 300_000
DEAD_UPLINK = 100


@pytest.fixture(scope="module")
def long_names(
    create_customers: CreateCustomers, server: DatabaseServer
) -> dict[str, str]:
    database = create_customers(20)
    name = database["DB_NAME"]
    server.query("ALTER TABLE customers MODIFY first_name MEDIUMTEXT", name)
    server.query(f"UPDATE customers SET first_name = REPEAT('a', {LONG_NAME})", name)
    return database


def test_sending_may_take_longer_than_connecting(
    run_main: RunMain, long_names: dict[str, str]
) -> None:
    with StandIn(upload_rate=SLOW_UPLINK) as standin:
        ended = run_main(
            "--bulk",
            database=long_names,
            url=standin.url,
            program=("-c", IMPATIENT),
            PYTHONPATH=str(process.ROOT),
        )
        assert len(find_delivered(standin)) == 20
        calls = standin.counters()["calls"]

    assert ended.exit_code == 0
    assert calls == {USERS_BULK_UPDATE: 1, EVENTS_TRACK_BULK: 1}


def test_sending_is_bounded_by_the_timeout(
    run_main: RunMain, long_names: dict[str, str]
) -> None:
    with StandIn(upload_rate=DEAD_UPLINK) as standin:
        ended = run_main(
            "--bulk",
            database=long_names,
            url=standin.url,
            ITERABLE_TIMEOUT="1",
            ITERABLE_MAX_ATTEMPTS="1",
        )

    [(attempts, message)] = find_update_results(ended)
    assert ended.exit_code == 1
    assert ended.summary["total_failures"] == 20
    assert attempts == 1
    assert message.startswith("no answer in time: Iterable is slow or out of reach")
