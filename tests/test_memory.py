"""What the results files say about users: delivered, failed, updated, reset."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lab.results import (
    CALLS,
    ITERABLE,
    STARTED,
    make_call,
    make_line,
    write_run,
)
from logger_config import (
    Memory,
    ResultsFolder,
    SentUser,
    UserLine,
    lock_results_folder,
)

Logged = pytest.LogCaptureFixture

FIRST = SentUser(1, "user1@example.com")
SECOND = SentUser(2, "user2@example.com")


class Runs:
    """The runs that have used a folder, and what their results files say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, *lines: UserLine, **more: Any) -> Path:
        """Write the results file of one more run."""
        return write_run(self.folder, *lines, **more)

    def users_list(self) -> Path:
        """The list of announced users of the run that was killed."""
        [path] = self.folder.glob(".*.started")
        return path

    def memory(self, *, identify_by: str = "email") -> Memory:
        """The memory of a run that follows."""
        return ResultsFolder(self.folder).read_memory(
            iterable=ITERABLE,
            identify_by=identify_by,
        )

    def delivered(self, fingerprint: str = "f") -> list[int]:
        """The users below 10 to whom these payloads were delivered."""
        memory = self.memory()
        return [user for user in range(10) if memory.has_delivered(user, fingerprint)]

    def know(self, line: UserLine) -> bool:
        """Whether this failure is known."""
        return self.memory().knows_failure(line)

    def left(self, present: Container[str] = ()) -> list[SentUser]:
        """The users who were updated and are not present."""
        return self.memory().find_absent(present)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


# Histories of a user: in each run a status and the payloads' fingerprint, `-` for None.
# A run that only announced the user was killed before the line was written.


def write_history(runs: Runs, history: str) -> None:
    for step in history.split(", "):
        if step == "announced":
            runs.write(announced=[FIRST], complete=False)
        else:
            status, letter = step.split()
            fingerprint = None if letter == "-" else letter
            line = make_line(1, status, fingerprint=fingerprint)
            runs.write(line, announced=[FIRST])


DELIVERED = {
    "success f": True,
    "success g": False,
    "success f, success g": False,
    "success g, success f": True,
    "success f, partial_failure f": False,
    "success f, total_failure f": False,
    "success f, forgotten f": False,
    "success f, total_failure f, success f": True,
    # Not attempted: other payloads may have been sent in a group without an answer.
    "success f, not_attempted f": True,
    "success f, not_attempted -": True,
    "success f, not_attempted g": False,
    "success f, not_attempted g, not_attempted f": False,
    # Whoever returns after a reset is sent, whatever became of the reset.
    "success f, reset r": False,
    "success f, total_failure r": False,
    "success f, not_attempted r": False,
    "success f, reset r, success f": True,
    # Killed.
    "announced": False,
    "success f, announced": False,
    "success f, announced, not_attempted f": False,
    "announced, success f": True,
}


@pytest.mark.parametrize(("history", "delivered"), DELIVERED.items())
def test_what_was_delivered_last_is_known(
    runs: Runs, history: str, delivered: bool
) -> None:
    write_history(runs, history)
    memory = runs.memory()
    assert memory.has_delivered(1, "f") == delivered


KNOWN_FAILURES = {
    "partial_failure f": True,
    "partial_failure g": False,
    "total_failure f": False,
    "success f": False,
    "partial_failure f, success f": False,
    "partial_failure f, forgotten f": False,
    "partial_failure f, total_failure f": False,
    "partial_failure f, not_attempted f": True,
    "partial_failure f, not_attempted -": True,
    "partial_failure f, not_attempted g": False,
    "partial_failure f, reset r": False,
    "partial_failure f, announced": False,
}


@pytest.mark.parametrize(("history", "known"), KNOWN_FAILURES.items())
def test_the_last_failure_is_known(runs: Runs, history: str, known: bool) -> None:
    write_history(runs, history)
    memory = runs.memory()
    assert memory.knows_failure(make_line(1, "partial_failure")) == known


UPDATED = {
    "success f": True,
    "partial_failure f": True,
    "total_failure f": False,
    "forgotten f": False,
    "not_attempted f": False,
    "success f, total_failure f": True,
    "success f, not_attempted f": True,
    "success f, forgotten f": False,
    "success f, reset r": False,
    "success f, reset r, total_failure f": False,
    "success f, reset r, success f": True,
    "success f, total_failure r": True,
    "success f, total_failure r, reset r": False,
    # Killed: perhaps updated, or perhaps not yet reset.
    "announced": True,
    "success f, reset r, announced": True,
    "announced, total_failure f": True,
    "announced, reset r": False,
}


@pytest.mark.parametrize(("history", "updated"), UPDATED.items())
def test_an_updated_user_has_left_until_reset(
    runs: Runs, history: str, updated: bool
) -> None:
    write_history(runs, history)
    assert runs.left() == ([FIRST] if updated else [])


# Which runs count


def test_an_empty_folder_knows_nothing(runs: Runs) -> None:
    memory = runs.memory()
    assert not memory.has_delivered(1, "f")
    assert not memory.knows_failure(make_line(1, "total_failure"))
    assert memory.find_absent(()) == []


def test_a_dry_run_does_not_count(runs: Runs) -> None:
    runs.write(make_line(1))
    runs.write(
        make_line(1, "total_failure"),
        make_line(2),
        mode="dry-run",
    )
    assert runs.delivered() == [1]
    assert runs.left() == [FIRST]


def test_a_killed_run_counts(runs: Runs) -> None:
    runs.write(make_line(1))
    runs.write(
        make_line(1, "total_failure"),
        make_line(2),
        complete=False,
    )
    assert runs.delivered() == [2]


def test_runs_count_in_the_order_of_their_numbers(runs: Runs) -> None:
    first = runs.write(make_line(1, fingerprint="g"))
    runs.write(make_line(1))
    first.rename(runs.folder / "integration_results_29990101_000000.json")
    assert runs.delivered() == [1]


@pytest.mark.parametrize(
    "head",
    [
        {"identify_by": "userId"},
        {"iterable": "https://api.eu.iterable.com"},
    ],
    ids=str,
)
@pytest.mark.parametrize("status", ["success", "reset", "forgotten"])
def test_runs_elsewhere_neither_set_nor_reset(
    runs: Runs, head: dict[str, str], status: str
) -> None:
    runs.write(make_line(1))
    runs.write(
        make_line(1, status),
        make_line(2),
        **head,
    )
    assert runs.left() == [FIRST]


def test_a_run_killed_elsewhere_sets_nobody(runs: Runs) -> None:
    runs.write(make_line(1))
    runs.write(
        announced=[FIRST, SECOND],
        complete=False,
        iterable="https://api.eu.iterable.com",
    )
    assert runs.delivered() == []
    assert runs.left() == [FIRST]


def test_files_without_an_identity_are_of_addresses(runs: Runs) -> None:
    path = runs.write(make_line(1))
    text = path.read_text("utf-8")
    older = text.replace(', "identify_by": "email"', "")
    path.write_text(older, "utf-8")
    assert runs.left() == [FIRST]


# Users


def test_who_is_present_has_not_left(runs: Runs) -> None:
    runs.write(make_line(1), make_line(2))
    assert runs.left(present={"user2@example.com"}) == [FIRST]


def test_a_user_id_may_be_text(runs: Runs) -> None:
    runs.write(make_line("a-1"))
    memory = runs.memory()
    assert memory.has_delivered("a-1", "f")


def test_a_user_without_an_id_cannot_have_left(runs: Runs) -> None:
    runs.write(make_line(None))
    assert runs.left() == []


def test_an_old_address_is_a_user_of_its_own(runs: Runs) -> None:
    runs.write(make_line(1, email="old@example.com"))
    runs.write(make_line(1, email="new@example.com"))
    old = SentUser(1, "old@example.com")
    assert runs.left(present={"new@example.com"}) == [old]


def test_with_user_ids_the_identity_is_the_id_as_text(runs: Runs) -> None:
    runs.write(
        make_line(1, email=None),
        make_line("b"),
        identify_by="userId",
    )
    memory = runs.memory(identify_by="userId")
    assert memory.find_absent(present={"c"}) == [
        SentUser(1, "1"),
        SentUser("b", "b"),
    ]


def test_an_update_in_bulk_sets_a_user(runs: Runs) -> None:
    update = make_call(endpoint="users/bulkUpdate", code=None)
    runs.write(make_line(1, users_update=update))
    assert runs.left() == [FIRST]


def test_an_announced_user_on_record_is_what_the_line_says(runs: Runs) -> None:
    runs.write(
        make_line(1),
        make_line(2, "total_failure"),
        announced=[FIRST, SECOND],
        complete=False,
    )
    assert runs.delivered() == [1]
    assert runs.left() == [FIRST]


def test_a_damaged_line_puts_nobody_on_record(runs: Runs) -> None:
    runs.write(make_line(1))
    path = runs.write(make_line(1), announced=[FIRST], complete=False)
    text = path.read_text("utf-8")
    path.write_text(text.replace('"status"', '"damaged"'), "utf-8")
    assert runs.delivered() == []
    assert runs.left() == [FIRST]


@pytest.mark.parametrize(
    ("endpoint", "status", "is_updated"),
    [
        ("users/bulkUpdate", None, True),
        ("users/bulkUpdate", 200, True),
        ("users/bulkUpdate", 413, False),
        ("users/bulkUpdate", 503, False),
        ("users/update", None, True),
        ("users/update", 200, False),
    ],
)
def test_a_user_without_a_clear_answer_may_be_updated(
    runs: Runs, endpoint: str, status: int | None, is_updated: bool
) -> None:
    update = make_call(ok=False, endpoint=endpoint, status=status)
    runs.write(make_line(1, "not_attempted", users_update=update))

    assert (runs.left() == [FIRST]) is is_updated


def test_announced_user_ids_are_matched_too(runs: Runs) -> None:
    runs.write(
        make_line(1, "total_failure"),
        announced=[SentUser(1, "1"), SentUser("b", "b")],
        complete=False,
        identify_by="userId",
    )
    memory = runs.memory(identify_by="userId")
    assert memory.find_absent(()) == [SentUser("b", "b")]


# Reasons of failures


def make_failure(**answer: Any) -> UserLine:
    call = make_call(ok=False, **answer)
    return make_line(1, "partial_failure", events_track=call)


def make_problem(problem: str) -> UserLine:
    """The line of a row that cannot be sent."""
    return make_line(
        1,
        "total_failure",
        fingerprint=None,
        users_update=None,
        events_track=None,
        problem=problem,
    )


OTHER_FAILURES = {
    "endpoint": make_failure(endpoint="events/track"),
    "no answer": make_failure(status=None),
    "status": make_failure(status=500),
    "code": make_failure(code="Other"),
    "message": make_failure(message="other"),
    "no second call": make_line(1, "partial_failure", events_track=None),
    "another user": make_line(2, "partial_failure"),
    "problem": make_problem("no address"),
    "another problem": make_problem("no user ID"),
}


@pytest.mark.parametrize("other", OTHER_FAILURES.values(), ids=OTHER_FAILURES)
def test_another_reason_is_another_failure(runs: Runs, other: UserLine) -> None:
    runs.write(make_failure())
    assert not runs.know(other)
    runs.write(other)
    assert runs.know(other)


def test_the_number_of_attempts_is_no_reason(runs: Runs) -> None:
    runs.write(make_failure(attempts=1))
    assert runs.know(make_failure(attempts=5))


def test_half_a_surrogate_pair_is_part_of_a_reason(runs: Runs) -> None:
    line = make_failure(message="\ud83d")
    runs.write(line)
    assert runs.know(line)


# A kill at any instant


@dataclass
class Instant:
    """What stands in both files of a run, and which users that concerns."""

    results: str
    announced: str
    sent: list[int]
    recorded: list[int]


def list_instants(runs: Runs) -> list[Instant]:
    """What is there after each step of a run with two groups of two users."""
    head = {"mode": "send", "iterable": ITERABLE, "identify_by": "email"}
    with lock_results_folder(runs.folder) as folder:
        results = folder.create_results_file(head, STARTED)
    sent: list[int] = []
    recorded: list[int] = []

    def look() -> Instant:
        return Instant(
            results=results.path.read_text("utf-8"),
            announced=runs.users_list().read_text("utf-8"),
            sent=[*sent],
            recorded=[*recorded],
        )

    instants = [look()]
    for group in ([1, 2], [3, 4]):
        results.announce([SentUser(user, f"user{user}@example.com") for user in group])
        instants.append(look())
        sent += group
        for user in group:
            results.add(make_line(user))
            recorded.append(user)
            instants.append(look())
    return instants


def tear(before: str, after: str, share: float) -> str:
    """A text that was `before` and was being made `after` when the kill came."""
    added = len(after) - len(before)
    size = len(before) + int(share * added)
    return after[:size]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_kill_at_any_instant_forgets_no_update(runs: Runs, share: float) -> None:
    instants = list_instants(runs)
    [partial] = runs.folder.glob("*.partial")
    for before, after in itertools.pairwise(instants):
        results = tear(before.results, after.results, share)
        announced = tear(before.announced, after.announced, share)
        partial.write_text(results, "utf-8")
        runs.users_list().write_text(announced, "utf-8")
        left = [user.user_id for user in runs.left()]
        assert set(before.sent) <= set(left)
        assert runs.delivered() == before.recorded


# Damaged files


def write_three(runs: Runs, *, second: str, **more: Any) -> Path:
    """A run of three users, with this text in place of the second one's line."""
    lines = [make_line(user) for user in (1, 2, 3)]
    path = runs.write(*lines, **more)
    texts = path.read_text("utf-8").split("\n")
    texts[4] = second
    path.write_text("\n".join(texts), "utf-8")
    return path


SECOND_LINE = json.dumps(make_line(2))
DAMAGED_LINES = {
    "half": SECOND_LINE[:50],
    "no status": '{"user_id": 2}',
    "deep": '{"' + "[" * 100_000,
}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("text", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_a_damaged_line_costs_its_user_alone(
    runs: Runs, caplog: Logged, text: str, complete: bool
) -> None:
    path = write_three(runs, second=text, complete=complete)
    assert runs.delivered() == [1, 3]
    warning = f"{path} is used as memory in part: 1 line(s) are damaged"
    assert caplog.messages == [warning]


def test_all_damaged_lines_are_counted(runs: Runs, caplog: Logged) -> None:
    path = write_three(runs, second='{"half\n{"half')
    assert runs.delivered() == [1, 3]
    warning = f"{path} is used as memory in part: 2 line(s) are damaged"
    assert caplog.messages == [warning]


def test_a_line_of_zeros_costs_its_user_alone(runs: Runs) -> None:
    write_three(runs, second="\0" * 90)
    assert runs.delivered() == [1, 3]


def test_of_two_lines_in_one_the_first_counts(runs: Runs, caplog: Logged) -> None:
    write_three(runs, second=f"{SECOND_LINE}{SECOND_LINE[50:]}")
    assert runs.delivered() == [1, 2, 3]
    assert caplog.messages == []


@pytest.mark.parametrize("complete", [True, False])
def test_a_torn_last_line_is_no_damage_after_a_kill(
    runs: Runs, caplog: Logged, complete: bool
) -> None:
    path = runs.write(make_line(1), make_line(2), complete=complete)
    text = path.read_text("utf-8")
    end = text.index("user2")
    path.write_text(text[:end], "utf-8")
    assert runs.delivered() == [1]
    assert len(caplog.messages) == int(complete)


def test_damage_to_the_list_of_users_is_skipped(runs: Runs, caplog: Logged) -> None:
    runs.write(announced=[FIRST, SECOND], complete=False)
    users_list = runs.users_list()
    first, second = users_list.read_text("utf-8").splitlines()
    damaged = [first, '{"x": 1}', "\0\0", second, '{"user_id": 3, "iden']
    users_list.write_text("\n".join(damaged))
    assert runs.left() == [FIRST, SECOND]
    assert caplog.messages == []


PARTS = [
    b"\n",
    b"],\n",
    b",\n",
    b'"',
    b"}",
    b"[" * 3000,
    b"1e999",
    b"null",
]
STARTS = st.integers(min_value=0, max_value=3000)
LENGTHS = st.integers(min_value=0, max_value=300)
INSERTIONS = st.binary(max_size=60) | st.sampled_from(PARTS)
CHANGES = st.tuples(STARTS, LENGTHS, INSERTIONS)


@hypothesis_settings(deadline=None, max_examples=100)
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_no_damage_makes_a_delivery(changes: list[tuple[int, int, bytes]]) -> None:
    lines = [make_line(status, status, fingerprint=status) for status in CALLS]
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name))
        path = runs.write(*lines)
        content = bytearray(path.read_bytes())
        for start, length, inserted in changes:
            content[start : start + length] = inserted
        path.write_bytes(content)
        memory = runs.memory()
    for status in CALLS.keys() - {"success"}:
        assert not memory.has_delivered(status, status)
    # A damaged ID is another ID, but nobody who was not updated counts as updated.
    left = {user.user_id for user in memory.find_absent(())}
    assert left.isdisjoint({"total_failure", "forgotten", "not_attempted"})


# Any history

STEPS = ["announced"]
for status in CALLS:
    STEPS += [f"{status} f", f"{status} g"]


def expect_updated(steps: list[str]) -> bool:
    """Whether the last step that can change the field may have set it to true."""
    for step in reversed(steps):
        if step.startswith(("announced", "success", "partial_failure")):
            return True
        if step.startswith(("reset", "forgotten")):
            return False
    return False


def expect_delivered(steps: list[str]) -> bool:
    """Whether the last step that may have sent something delivered `f`."""
    for step in reversed(steps):
        if step != "not_attempted f":
            return step == "success f"
    return False


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=8))
def test_the_memory_is_right_after_any_history(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name))
        write_history(runs, ", ".join(steps))
        memory = runs.memory()
    assert memory.has_delivered(1, "f") == expect_delivered(steps)
    assert bool(memory.find_absent(())) == expect_updated(steps)
