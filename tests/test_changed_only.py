"""--changed-only: what was delivered as it is is left out, and everything else is sent (contract 3 and 7)."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import harness
import main
from database import DatabaseServer
from standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

Program = Callable[..., harness.Ended]
Started = Callable[..., harness.Running]
Customers = Callable[..., dict[str, str]]
Change = Callable[[str], None]

FIRST = "user1@example.com"
DAY = 86_400


@pytest.fixture
def three(customers: Customers) -> dict[str, str]:
    return customers(3)


@pytest.fixture
def change(server: DatabaseServer, three: dict[str, str]) -> Change:
    """`change(sql)` changes the three customers' tables."""

    def run(sql: str) -> None:
        server.query(sql, three["DB_NAME"])

    return run


def sent(standin: StandIn) -> list[str]:
    """The addresses of all calls that arrived, in order of address. Forgets the calls, not what they brought about."""
    found = sorted(call["email"] for call in standin.state()["journal"])
    standin.reset()
    return found


def both(*numbers: int) -> list[str]:
    """What `sent` gives when these users got both calls."""
    return sorted(f"user{number}@example.com" for number in numbers for _ in range(2))


def told(ended: harness.Ended) -> dict[str, Any]:
    """The summary in the results file, without its times and without what is zero."""
    times = ("duration_seconds", "users_per_second")
    return {key: value for key, value in ended.results["summary"].items() if value and key not in times}


def results_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("integration_results_*"))


# What is left out


def test_a_second_run_sends_nothing_and_counts_everyone_as_unchanged(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    assert program(database=three).exit_code == 0
    assert sent(standin) == both(1, 2, 3)
    ended = program("--changed-only", database=three)
    assert (ended.exit_code, ended.errors, ended.results["results"]) == (0, "", [])
    assert told(ended) == {"outcome": "completed", "total_users": 3, "unchanged": 3}
    assert ended.results["run"]["options"] == {"limit": None, "changed_only": True}
    assert "Total users processed: 3\n✓ Successful (both API calls): 0\n" in ended.console
    assert "Unchanged since they were delivered, not sent again: 3\n" in ended.console
    assert "Processing record" not in ended.console + ended.log.split("[STEP 5]")[-1]
    assert standin.counters()["connections"] == 0


def test_a_quiet_run_that_has_nothing_to_send_prints_nothing(program: Program, three: dict[str, str]) -> None:
    program(database=three)
    ended = program("--quiet", "--changed-only", database=three)
    assert (ended.exit_code, ended.console, ended.errors) == (0, "", "")


def test_without_the_option_everyone_is_sent_again(program: Program, three: dict[str, str], standin: StandIn) -> None:
    program(database=three)
    program(database=three)
    assert sent(standin) == sorted(both(1, 2, 3) * 2)


def test_the_memory_goes_through_runs_that_had_nothing_to_send(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    program(database=three)
    sent(standin)
    for _ in range(2):
        assert told(program("--changed-only", database=three))["unchanged"] == 3
    assert sent(standin) == []


def test_a_column_that_is_not_sent_is_no_change(
    program: Program, three: dict[str, str], change: Change, standin: StandIn
) -> None:
    program(database=three)
    sent(standin)
    change("UPDATE customers SET last_name = 'Other' WHERE id = 2")
    program("--changed-only", database=three)
    assert sent(standin) == []


def test_the_same_address_of_iterable_in_other_words_is_no_change(
    program: Program, three: dict[str, str], standin: StandIn
) -> None:
    program(database=three)
    sent(standin)
    program("--changed-only", database=three, url=f"{standin.url}/api/")
    assert sent(standin) == []


# What is sent again


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE customers SET first_name = 'Eve' WHERE id = 2",
        "UPDATE customers SET first_name = NULL WHERE id = 2",
        "UPDATE page_views SET location = 'Rome' WHERE user_id = 2",
        "UPDATE page_views SET event_time = event_time + INTERVAL 1 SECOND WHERE user_id = 2",
        "INSERT INTO page_views (user_id, page, event_time) VALUES (2, 'settings', CURDATE() - INTERVAL 1 DAY)",
    ],
    ids=["name", "name removed", "location", "time", "new view"],
)
def test_a_changed_field_is_sent_again_and_nothing_else_is(
    program: Program, three: dict[str, str], change: Change, standin: StandIn, sql: str
) -> None:
    program(database=three)
    sent(standin)
    change(sql)
    ended = program("--changed-only", database=three)
    assert told(ended) == {"outcome": "completed", "total_users": 3, "success": 1, "unchanged": 2, "calls": 2}
    assert [(line["record"], line["user_id"], line["status"]) for line in ended.results["results"]] == [
        (2, 2, "success")
    ]
    assert sent(standin) == both(2)
    assert told(program("--changed-only", database=three))["unchanged"] == 3


def test_what_was_changed_and_changed_back_is_sent_each_time(
    program: Program, three: dict[str, str], change: Change, standin: StandIn
) -> None:
    for name in ("Ann", "Eve", "Ann", "Eve"):
        change(f"UPDATE customers SET first_name = '{name}' WHERE id = 1")
        program("--changed-only", database=three)
        assert FIRST in sent(standin), name
    program("--changed-only", database=three)
    assert sent(standin) == []


@pytest.mark.parametrize("endpoint", [USERS_UPDATE, EVENTS_TRACK])
def test_what_may_have_reached_iterable_in_between_makes_the_earlier_delivery_stale(
    program: Program, three: dict[str, str], change: Change, standin: StandIn, endpoint: str
) -> None:
    program(database=three)
    change("UPDATE customers SET first_name = 'Eve' WHERE id = 1")
    standin.fault("reset_after", endpoint=endpoint, email=FIRST)  # processed, though the run cannot know
    assert program("--changed-only", database=three, ITERABLE_MAX_ATTEMPTS="1").exit_code == 1
    sent(standin)
    change("UPDATE customers SET first_name = 'Ann' WHERE id = 1")
    program("--changed-only", database=three)
    assert sent(standin) == both(1)


@pytest.mark.parametrize(
    ("endpoint", "status"),
    [("*", "total_failure"), (USERS_UPDATE, "partial_failure"), (EVENTS_TRACK, "partial_failure")],
    ids=["both calls failed", "users/update failed", "events/track failed"],
)
def test_a_user_who_failed_is_sent_again_with_both_calls(
    program: Program, three: dict[str, str], standin: StandIn, endpoint: str, status: str
) -> None:
    standin.fault(endpoint=endpoint, email=FIRST, status=400)
    ended = program(database=three)
    assert {line["record"]: line["status"] for line in ended.results["results"]} == {
        1: status,
        2: "success",
        3: "success",
    }
    sent(standin)
    assert program("--changed-only", database=three).exit_code == 0
    assert sent(standin) == both(1)


def test_a_forgotten_user_is_asked_for_again(program: Program, three: dict[str, str], standin: StandIn) -> None:
    for _ in range(2):
        standin.configure(forgotten=[FIRST])
        assert told(program("--changed-only", database=three))["forgotten"] == 1
        assert FIRST in sent(standin)


def test_a_row_that_cannot_be_sent_fails_each_time(
    program: Program, three: dict[str, str], change: Change, standin: StandIn
) -> None:
    change("UPDATE customers SET email = 'nowhere' WHERE id = 1")
    for unchanged in (0, 2):
        ended = program("--changed-only", database=three)
        assert (ended.exit_code, told(ended)["total_failures"], told(ended).get("unchanged", 0)) == (1, 1, unchanged)


def test_users_whom_an_interrupted_run_left_out_are_sent(
    started: Started, program: Program, three: dict[str, str], standin: StandIn
) -> None:
    standin.fault(endpoint=EVENTS_TRACK, email=FIRST, latency=1.0)
    running = started(database=three, MAX_WORKERS="1")
    standin.wait_for_calls(1, EVENTS_TRACK)
    running.signal(signal.SIGTERM)
    assert told(running.wait())["not_attempted"] == 2
    assert sent(standin) == both(1)
    assert told(program("--changed-only", database=three))["unchanged"] == 1
    assert sent(standin) == both(2, 3)


def test_another_project_is_another_memory(program: Program, three: dict[str, str], standin: StandIn) -> None:
    key = "f" * 32
    program(database=three)
    sent(standin)
    standin.configure(key=key)
    assert program("--changed-only", database=three, ITERABLE_API_KEY=key).exit_code == 0
    assert sent(standin) == both(1, 2, 3)
    other = standin.url.replace("127.0.0.1", "localhost")
    assert program("--changed-only", database=three, url=other).exit_code == 0
    assert sent(standin) == both(1, 2, 3)


def test_a_limit_counts_unchanged_users_too(program: Program, three: dict[str, str], standin: StandIn) -> None:
    program("--limit", "1", database=three)
    sent(standin)
    ended = program("--changed-only", "--limit", "2", database=three)
    assert told(ended) == {"outcome": "completed", "total_users": 2, "success": 1, "unchanged": 1, "calls": 2}
    assert sent(standin) == both(2)


# Which files are the memory


def test_a_dry_run_is_no_memory_and_uses_it(program: Program, three: dict[str, str], standin: StandIn) -> None:
    program("--limit", "1", database=three)
    sent(standin)
    ended = program("--dry-run", "--changed-only", database=three)
    assert told(ended) == {"outcome": "completed", "total_users": 3, "unchanged": 1, "not_attempted": 2}
    assert "A run would send 2 users: 4 calls" in ended.console
    program("--changed-only", database=three)
    assert sent(standin) == both(2, 3)


def test_what_a_killed_run_left_is_memory(
    started: Started, program: Program, three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    standin.fault("silence", email="user3@example.com", times=1)
    running = started(database=three)
    running.wait_for("Processing record 2/3")
    standin.wait_for_calls(5)
    running.process.kill()
    running.wait()
    sent(standin)
    [partial] = folder.glob("*.json.partial")
    before = partial.read_bytes()
    ended = program("--changed-only", database=three)
    assert told(ended) == {"outcome": "completed", "total_users": 3, "success": 1, "unchanged": 2, "calls": 2}
    assert "is not used as memory" not in ended.console
    assert sent(standin) == both(3)
    assert partial.read_bytes() == before


@pytest.mark.parametrize(("days", "unchanged"), [(8 - 0.01, 3), (8 + 0.01, 0)], ids=["just within", "just past"])
def test_files_of_the_last_8_days_are_the_memory(
    program: Program, three: dict[str, str], standin: StandIn, folder: Path, days: float, unchanged: int
) -> None:
    program(database=three)
    [path] = results_files(folder)
    os.utime(path, times=(time.time() - days * DAY,) * 2)
    assert told(program("--changed-only", database=three)).get("unchanged", 0) == unchanged


def test_of_several_files_the_last_one_about_a_user_counts(
    program: Program, three: dict[str, str], change: Change, standin: StandIn, folder: Path
) -> None:
    for age, name in enumerate(("Ann", "Eve", "Ann")):
        change(f"UPDATE customers SET first_name = '{name}'")
        program(database=three)
        # Neither the names nor the order in the folder tell which is the last, but the time does.
        for path in results_files(folder):
            if path.name.startswith("integration_results_2"):
                path.rename(folder / f"integration_results_{'bca'[age]}.json")
    sent(standin)
    program("--changed-only", database=three)
    assert sent(standin) == []
    os.utime(folder / "integration_results_c.json")
    program("--changed-only", database=three)
    assert sent(standin) == both(1, 2, 3)


def test_two_hundred_files_are_read_whole(
    program: Program, customers: Customers, standin: StandIn, folder: Path
) -> None:
    """As a run every hour leaves in 8 days: each file is about other users."""
    database = customers(200)
    program(database=database)
    [path] = results_files(folder)
    head, lines, end = parts(path)
    path.unlink()
    for number, line in enumerate(lines):
        others = [line.replace(b'"user_id": ', b'"user_id": 99') for line in lines[:20]]
        write(folder / f"integration_results_19990101_{number:06}.json", head, [*others, line], end)
    sent(standin)
    ended = program("--changed-only", database=database)
    assert told(ended) == {"outcome": "completed", "total_users": 200, "unchanged": 200}
    assert sent(standin) == []


def parts(path: Path) -> tuple[bytes, list[bytes], bytes]:
    """A results file's head, its users' lines without commas, and its end."""
    head, rest = path.read_bytes().split(b'"results": [\n')
    users, end = rest.split(b"\n],\n")
    return head + b'"results": [\n', users.split(b",\n"), b"\n],\n" + end


def write(path: Path, head: bytes, lines: list[bytes], end: bytes) -> None:
    path.write_bytes(head + b",\n".join(lines) + end)


# Files that are damaged, foreign or half-written


NO_RESULTS = "it is not a results file of this program"
FOREIGN = {
    "empty": b"",
    "blank": b"\n\n\n\n",
    "binary": random.Random(0).randbytes(10_000),
    "text": b"Hello\nthere,\n" * 100,
    "zeros, as a power cut leaves them": bytes(4096),
    "JSON of another program": b'{\n"results": [\n{"user_id": 1, "status": "success"}\n]}\n',
    "JSON in one line": b'{"run": {"mode": "send"}, "results": [{"user_id": 1, "status": "success"}]}',
    "JSON that is nested deeply": b"{\n" + b"[" * 100_000 + b"\n",
    "JSON of other types": b'{\n"run": ["mode", "send"],\n"results": [\n],\n"summary": {}\n}\n',
    "JSON without its mode": b'{\n"run": {},\n"results": [\n],\n"summary": {}\n}\n',
}


@pytest.mark.parametrize("suffix", ["json", "json.partial"])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_skipped_with_a_warning(
    program: Program, three: dict[str, str], standin: StandIn, folder: Path, content: bytes, suffix: str
) -> None:
    foreign = folder / f"integration_results_20260101_000000.{suffix}"
    foreign.write_bytes(content)
    ended = program("--quiet", "--changed-only", database=three)
    assert (ended.exit_code, ended.errors) == (0, "")
    assert ended.console == f"{foreign.name} is not used as memory, in part or whole: {NO_RESULTS}\n"
    assert sent(standin) == both(1, 2, 3)
    assert foreign.read_bytes() == content


def damaged(path: Path, how: str) -> None:
    """Damage a file with three users: the second one's line, or what `how` says."""
    head, lines, end = parts(path)
    first, second, third = lines = sorted(lines)
    if how == "end missing":
        end = b""
    elif how == "cut in a line":
        lines, end = [first, third, second[: len(second) // 2]], b""
    elif how == "a line without its end":
        lines[1] = second[:-20]
    elif how == "a line with other bytes":
        lines[1] = b"\xff\x00\xfe" + second[3:]
    elif how == "a line's fingerprint cut":
        lines[1] = second.replace(b'"fingerprint": "', b'"fingerprint": "0', 1)
    elif how == "a line gone":
        lines = [first, third]
    write(path, head, lines, end)


@pytest.mark.parametrize(
    ("how", "again", "problem"),
    [
        ("end missing", [], "its end is missing"),
        ("cut in a line", [2], "1 damaged line(s)"),
        ("a line without its end", [2], "1 damaged line(s)"),
        ("a line with other bytes", [2], "1 damaged line(s)"),
        ("a line's fingerprint cut", [2], "1 damaged line(s)"),
        ("a line gone", [2], None),
    ],
)
def test_a_damaged_file_costs_the_users_whose_lines_it_lost_and_no_others(
    program: Program,
    three: dict[str, str],
    standin: StandIn,
    folder: Path,
    how: str,
    again: list[int],
    problem: str | None,
) -> None:
    program(database=three)
    [path] = results_files(folder)
    damaged(path, how)
    sent(standin)
    ended = program("--quiet", "--changed-only", database=three)
    warning = f"{path.name} is not used as memory, in part or whole: {problem}\n" if problem else ""
    assert (ended.exit_code, ended.console, ended.errors) == (0, warning, "")
    assert sent(standin) == both(*again)


def test_what_only_looks_like_a_results_file_stops_nothing(
    program: Program, three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    program(database=three)
    [path] = results_files(folder)
    sent(standin)
    (folder / "integration_results_folder.json").mkdir()
    os.mkfifo(folder / "integration_results_pipe.json")  # reading it would wait for ever
    (folder / "integration_results_nowhere.json").symlink_to(folder / "nowhere")
    (folder / "integration_results_loop.json").symlink_to(folder / "integration_results_loop.json")
    path.with_suffix(".json.gz").write_bytes(b"\x1f\x8b")
    ended = program("--quiet", "--changed-only", database=three)
    warning = f"{path.name}.gz is not used as memory, in part or whole: {NO_RESULTS}\n"
    assert (ended.exit_code, ended.console, ended.errors) == (0, warning, "")
    assert sent(standin) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_skipped_with_a_warning(
    program: Program, three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    program(database=three)
    [path] = results_files(folder)
    path.chmod(0)
    sent(standin)
    ended = program("--quiet", "--changed-only", database=three)
    assert f"{path.name} is not used as memory, in part or whole: [Errno 13]" in ended.console
    assert sent(standin) == both(1, 2, 3)


def test_a_file_that_is_removed_while_the_memory_is_read_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a cron job that clears the folder. In this process: the moment can be hit only from within."""
    gone, left = folder / "integration_results_1.json", folder / "integration_results_2.json"
    line = b'{"record": 1, "user_id": 7, "email": "a@b.c", "event_id": "page-view-1", "status": "success", '
    line += b'"users_update": {}, "events_track": {}, "fingerprint": "%s"}' % (b"0" * 64)
    for path in (gone, left):
        write(path, b'{\n"run": {"mode": "send"},\n"results": [\n', [line], b'\n],\n"summary": {}\n}\n')
    is_file = Path.is_file

    def and_then_it_goes(path: Path) -> bool:
        there = is_file(path)
        if path == gone:
            gone.unlink()
        return there

    monkeypatch.setattr(Path, "is_file", and_then_it_goes)
    assert main.read_memory(folder, Event()) == {b"7": b"0" * 64}  # type: ignore[arg-type]


def test_no_damage_takes_a_user_who_failed_for_delivered(
    program: Program, customers: Customers, standin: StandIn, folder: Path
) -> None:
    """2000 damaged files, read in this process, where that takes no minutes."""
    standin.fault(endpoint=EVENTS_TRACK, email=FIRST, status=400)
    ended = program(database=customers([{}, {"email": 'odd"\\,{}@example.com'}, {"email": None}, {}]))
    prints = {line["user_id"]: line["fingerprint"] for line in ended.results["results"]}
    [path] = results_files(folder)
    whole = path.read_bytes()
    memory: dict[bytes, bytes] = {}
    assert main.remember(path, memory) == ""
    assert memory == {str(user).encode(): prints[user].encode() for user in (2, 4)}
    chance = random.Random(20)
    for _ in range(2000):
        path.write_bytes(damage(whole, chance))
        memory = {}
        main.remember(path, memory)
        assert memory.get(b"1") != prints[1].encode(), path.read_bytes()


def damage(whole: bytes, chance: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(1, len(content))
        match chance.choice(["another byte", "bytes gone", "bytes twice", "end gone"]):
            case "another byte":
                content[at] = chance.randrange(256)
            case "bytes gone":
                del content[at : at + chance.randrange(200)]
            case "bytes twice":
                content[at:at] = content[at : at + chance.randrange(200)]
            case "end gone":
                del content[at:]
    return bytes(content)


# Names


def test_runs_of_the_same_second_have_files_of_their_own(program: Program, three: dict[str, str], folder: Path) -> None:
    now = datetime.now(timezone.utc)
    names = [f"integration_results_{now + timedelta(seconds=after):%Y%m%d_%H%M%S}.json" for after in range(60)]
    for number, name in enumerate(names):
        (folder / (name if number % 2 else f"{name}.partial")).write_text("taken")
    assert program(database=three, TZ="UTC").exit_code == 0
    taken, own = [], []
    for path in results_files(folder):
        (taken if path.read_text("utf-8") == "taken" else own).append(path)
    assert [path.name for path in own] == [f"integration_results_{now + timedelta(seconds=60):%Y%m%d_%H%M%S}.json"]
    assert len(taken) == 60
    assert stat.S_IMODE(own[0].stat().st_mode) == 0o600


def test_runs_in_quick_succession_each_leave_a_document(program: Program, three: dict[str, str], folder: Path) -> None:
    for _ in range(3):
        program(database=three)
    assert [json.loads(path.read_text("utf-8"))["summary"]["success"] for path in results_files(folder)] == [3] * 3
