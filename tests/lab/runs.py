"""The part of a run between the database and the exit code, in this process."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter, deque
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import iterable_client
from db_connection import PageViewRow
from lab.clients import ROW, script_client
from lab.expected import COUNTED_AS, address
from logger_config import Memory, lock_results_folder
from main import (
    DeliveryPlanner,
    DeliveryRun,
    Leaver,
    Settings,
    load_environment_variables,
    parse_arguments,
)

NO_ENV_FILE = Path(os.devnull)
REQUIRED = {
    "DB_HOST": "localhost",
    "DB_USER": "reader",
    "DB_PASSWORD": "",
    "DB_NAME": "shop",
    "ITERABLE_API_KEY": "0123456789abcdef",
}

Users = deque[PageViewRow | Leaver]


def make_settings(**changes: str) -> Settings:
    """Return settings with these variables."""
    return load_environment_variables(NO_ENV_FILE, {**REQUIRED, **changes})


def make_planner(
    *arguments: str, memory: Memory | None = None, **changes: str
) -> DeliveryPlanner:
    """Return the planner of a run with these arguments and settings."""
    options = parse_arguments(arguments)
    return DeliveryPlanner(make_settings(**changes), memory or Memory(), options)


def make_rows(count: int) -> Users:
    """Return rows of different customers, numbered from 1."""
    rows: Users = deque()
    for number in range(1, count + 1):
        row = ROW._replace(user_id=number, email=address(number), view_id=number)
        rows.append(row)
    return rows


@dataclass
class Recorded:
    """What a run left behind.

    `document` is the results file, empty if that was not completed. `calls` are those
    of a ScriptedTransport.
    """

    exit_code: int
    run: DeliveryRun
    document: dict[str, Any]
    calls: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        """The summary of the results file."""
        summary: dict[str, Any] = self.document["summary"]
        return summary

    @property
    def lines(self) -> dict[int, dict[str, Any]]:
        """The users' lines by their record number."""
        return {line["record"]: line for line in self.document["results"]}

    @property
    def statuses(self) -> list[str]:
        """The users' statuses in their order."""
        return [line["status"] for _, line in sorted(self.lines.items())]


def run_deliveries(
    *arguments: str,
    users: Users,
    memory: Memory | None = None,
    max_group: int = 1000,
    **options: Any,
) -> Recorded:
    """Send and record users. `options` are those of `script_client`."""
    client, transport = script_client(**options)
    memory = memory or Memory()
    document = {}
    with (
        tempfile.TemporaryDirectory() as path,
        lock_results_folder(Path(path)) as folder,
        mock.patch.object(iterable_client, "MAX_GROUP_USERS", max_group),
    ):
        results = folder.create_results_file({}, datetime.now(timezone.utc))
        parsed = parse_arguments(arguments)
        planner = make_planner(*arguments, memory=memory)
        run = DeliveryRun(users, planner, client, results, memory, parsed)
        run.send()
        exit_code = run.finish()
        if results.path.suffix == ".json":
            document = json.loads(results.path.read_text("utf-8"))
    return Recorded(exit_code, run, document, transport.calls)


def assert_adds_up(recorded: Recorded, total: int) -> None:
    """Check that each user has one line, and that the summary counts the lines."""
    counted = Counter(COUNTED_AS[status] for status in recorded.statuses)
    assert sorted(recorded.lines) == list(range(1, total + 1))
    assert len(recorded.document["results"]) == total
    assert recorded.summary["total_users"] == total
    assert recorded.summary["exit_code"] == recorded.exit_code
    for name in COUNTED_AS.values():
        assert recorded.summary[name] == counted[name]
