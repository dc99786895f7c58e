"""No secret is written anywhere, even at DEBUG when the API echoes it."""

from __future__ import annotations

import json
from urllib.parse import quote, quote_plus

import pytest

from lab.database import DatabaseServer
from lab.expected import address
from lab.process import KEY, CreateCustomers, Ended, RunMain
from lab.standin_handle import StandIn

PASSWORD = 'pass  "word!" \\ü/%41'
KEY_IN_ESCAPES = "".join(f"\\u{ord(letter):04x}" for letter in KEY)


def find_forms(secret: str) -> set[str]:
    """A secret as it is, JSON-escaped, and URL-encoded."""
    return {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        quote_plus(secret),
        quote(secret),
        quote(secret, safe=""),
        quote(secret, safe="!'()*"),
    }


ALL_FORMS = find_forms(KEY) | find_forms(PASSWORD)


@pytest.fixture
def echoed(
    server: DatabaseServer,
    create_customers: CreateCustomers,
    run_main: RunMain,
    standin: StandIn,
) -> Ended:
    """A run in which Iterable echoes the secrets, to each user in another way."""
    both = f"{KEY} {PASSWORD}"
    refusal = json.dumps({"msg": both, "code": KEY, "params": None})
    escaped = f'{{"msg":"{KEY_IN_ESCAPES}","code":"BadParams"}}'
    page = f"<html>{' '.join(sorted(ALL_FORMS))}</html>"
    success = json.dumps({"msg": both, "code": "Success"}, ensure_ascii=False)
    standin.fault("echo_headers", user=address(1))
    standin.fault(user=address(2), status=400, body=refusal)
    standin.fault(user=address(3), status=400, body=escaped)
    standin.fault(user=address(4), status=502, body=page)
    standin.fault(user=address(5), status=200, body=success)
    rows = [{}, {}, {}, {}, {"first_name": KEY}]
    name = create_customers(rows)["DB_NAME"]
    database = server.create_reader(
        user=f"reader_{name}", password=PASSWORD, database=name
    )
    return run_main(database=database, LOG_LEVEL="DEBUG", ITERABLE_MAX_ATTEMPTS="2")


def test_an_echoed_secret_is_written_nowhere(echoed: Ended) -> None:
    secrets = ALL_FORMS | {" ".join(PASSWORD.split())}
    found = [secret for secret in secrets if secret in echoed.everything]
    assert found == []


def test_the_answers_are_logged_without_the_secrets(echoed: Ended) -> None:
    responses = [line for line in echoed.log.splitlines() if "Response: " in line]
    statuses = [echoed.lines[number]["status"] for number in range(1, 6)]
    assert statuses == [*["total_failure"] * 4, "success"]
    assert len(responses) == 8
    for response in responses:
        assert "[secret]" in response


def test_debug_lines_are_for_the_log_alone(echoed: Ended) -> None:
    assert " DEBUG   iterable_client: " in echoed.log
    assert "next attempt in" in echoed.log
    assert "next attempt in" not in echoed.console
