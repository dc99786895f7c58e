"""Too little disk, memory, threads or files, and errors that nobody foresaw.

The record is true all the same: who was delivered is on record.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import process
from lab.expected import (
    CALLS,
    address,
    assert_counts_add_up,
    assert_record_is_true,
    find_delivered,
)
from lab.process import CreateCustomers, Ended, RunMain, Running, StartMain, in_shell
from lab.standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

USERS = 150


@pytest.fixture(scope="module")
def many(create_customers: CreateCustomers) -> dict[str, str]:
    return create_customers(USERS)


@pytest.fixture(scope="module")
def thirty(create_customers: CreateCustomers) -> dict[str, str]:
    return create_customers(30)


# Disk


def test_a_full_disk_when_the_results_file_is_made_ends_with_1(
    run_main: RunMain, thirty: dict[str, str], standin: StandIn, folder: Path
) -> None:
    # The name makes the file's first line longer than a file may be.
    env_file = folder / ("long" * 50)
    env_file.touch()

    ended = run_main(
        "--quiet",
        "--env-file",
        str(env_file),
        database=thirty,
        wrapper=in_shell("ulimit -f 1"),
        LOG_FILE="/dev/null",
    )

    assert ended.exit_code == 1
    assert ended.errors == ""
    assert "integration_results_" in ended.console
    assert "File too large" in ended.console
    assert len(ended.console.splitlines()) == 1
    assert list(ended.folder.glob("integration_results_*")) == []
    assert standin.count_calls() == 0


@pytest.fixture
def wordy_standin(standin: StandIn) -> StandIn:
    """A stand-in whose answers take 4 kB of a user in the results file."""
    message = "\N{GRINNING FACE}" * 480
    body = json.dumps({"msg": message, "code": "Success", "params": None})
    for endpoint in CALLS.values():
        standin.fault(
            endpoint=endpoint, status=200, processed=True, body=body, latency=0.02
        )
    return standin


def run_on_small_disk(run_main: RunMain, database: dict[str, str]) -> Ended:
    blocks = 400  # of 512 bytes, so the results file may have 200 kB
    wrapper = in_shell(f"ulimit -f {blocks}")
    return run_main(database=database, wrapper=wrapper, MAX_WORKERS="10")


def test_a_disk_that_fills_up_stops_the_run(
    run_main: RunMain, many: dict[str, str], wordy_standin: StandIn
) -> None:
    ended = run_on_small_disk(run_main, many)

    delivered = find_delivered(wordy_standin)
    words = (
        r"(?m)^The run ended early: \S+/integration_results_\d+_\d+\.json\.partial"
        r" cannot be written.*File too large"
    )
    logged = re.findall(r"Successfully processed user: (\S+)", ended.log)
    assert ended.exit_code == 1
    assert ended.errors == ""
    assert re.search(words, ended.console)
    assert 0 < len(delivered) < USERS
    assert f"Successful (both API calls): {len(delivered)}\n" in ended.console
    assert f"Not attempted: {USERS - len(delivered)}\n" in ended.console
    assert set(logged) == delivered


def test_the_next_run_goes_on_after_a_full_disk(
    run_main: RunMain, many: dict[str, str], wordy_standin: StandIn
) -> None:
    run_on_small_disk(run_main, many)
    calls_before = wordy_standin.count_calls()

    ended = run_main("--changed-only", database=many)

    assert ended.exit_code == 0
    assert len(find_delivered(wordy_standin)) == USERS
    assert ended.summary["unchanged"] > 0
    assert wordy_standin.count_calls() == calls_before + ended.summary["calls"]


# Open files


def test_few_open_files_deliver_everybody_and_are_said_once(
    run_main: RunMain, many: dict[str, str], standin: StandIn
) -> None:
    standin.configure(latency=0.2)

    ended = run_main(
        database=many, wrapper=in_shell("ulimit -n 80"), ITERABLE_RATE_LIMIT="2000"
    )

    assert ended.exit_code == 0
    assert ended.errors == ""
    assert len(find_delivered(standin)) == USERS
    assert standin.counters()["connections"] < 80
    assert ended.console.count("ulimit -n") == 1


def test_a_soft_limit_of_open_files_is_raised(
    run_main: RunMain, many: dict[str, str], standin: StandIn
) -> None:
    standin.configure(latency=0.3)

    ended = run_main(
        database=many, wrapper=in_shell("ulimit -Sn 40"), ITERABLE_RATE_LIMIT="2000"
    )

    assert ended.exit_code == 0
    assert len(find_delivered(standin)) == USERS
    assert standin.counters()["connections"] > 40
    assert "ulimit" not in ended.console


# Memory

# How much an interpreter takes differs from one to the next, so no size is written
# down: they are found by trying, from what a run takes downwards.
LARGE_STEP = 0.5
SMALL_STEP = 0.9


@pytest.fixture
def secure() -> Iterator[StandIn]:
    """A stand-in with TLS, which takes more memory than a connection without."""
    with StandIn(tls="good", latency=0.02) as standin:
        yield standin


def start_secure(
    start_main: StartMain, database: dict[str, str], secure: StandIn, *wrapper: str
) -> Running:
    return start_main(
        database=database,
        url=secure.url,
        wrapper=wrapper,
        REQUESTS_CA_BUNDLE=str(secure.ca_file),
    )


def measure_memory(running: Running) -> int:
    """The most kB of addresses that a run takes."""
    most = 0
    status = Path("/proc", str(running.process.pid), "status")
    while running.process.poll() is None:
        found = re.search(r"VmPeak:\s+(\d+) kB", status.read_text())
        if found:
            most = int(found[1])
        time.sleep(0.005)
    return most


def limit_memory(size: int) -> tuple[str, ...]:
    return in_shell(f"ulimit -v {size}")


@functools.cache
def can_load(size: int) -> bool:
    """Whether main.py gets as far as its options with so many kB."""
    command = [*limit_memory(size), sys.executable, *process.MAIN, "--help"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_sizes(most: int) -> Iterator[int]:
    """Sizes in kB that are too small for a run, to the last that loads main.py."""
    size = int(LARGE_STEP * most)
    while can_load(size):
        yield size
        smaller = int(LARGE_STEP * size)
        size = smaller if can_load(smaller) else int(SMALL_STEP * size)


def test_with_little_memory_the_record_is_true(
    start_main: StartMain, thirty: dict[str, str], secure: StandIn, folder: Path
) -> None:
    most = measure_memory(start_secure(start_main, thirty, secure))
    exit_codes = []
    for size in find_sizes(most):
        secure.reset()
        for path in folder.glob("*integration_results*"):
            path.unlink()

        ended = start_secure(start_main, thirty, secure, *limit_memory(size)).wait()

        print(size, "kB:", ended.console, ended.errors)
        exit_codes.append(ended.exit_code)
        assert ended.errors == ""
        assert_is_true_or_untouched(ended, secure)

    assert exit_codes[-1] == 1


def assert_is_true_or_untouched(ended: Ended, standin: StandIn) -> None:
    """The record of a run that may have ended for lack of memory is true."""
    if not ended.documents:
        assert ended.exit_code == 1
        assert "memory" in ended.console.splitlines()[-1]
        assert standin.count_calls() == 0
        return
    assert_record_is_true(ended, standin)
    if ended.exit_code == 0:
        assert ended.summary["success"] == 30
    else:
        assert ended.exit_code == 1
        assert ended.summary["outcome"] == "aborted"
        [reason] = re.findall("(?m)^The run ended early: (.*)", ended.console)
        assert "memory" in reason


# Threads


def limit_threads(number: int) -> tuple[str, ...]:
    """A wrapper: an account of its own, which may have so many processes and threads.

    It has root's right to read files.
    """
    account = 50_000 + os.getpid() % 10_000
    return (
        "setpriv",
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=-all,+dac_override",
        "--bounding-set=-all,+dac_override",
        f"--reuid={account}",
        "--regid=54321",
        "--clear-groups",
        "prlimit",
        f"--nproc={number}",
    )


def may_become_another_account() -> bool:
    if shutil.which("setpriv") is None:
        return False
    command = [*limit_threads(2), sys.executable, "-c", ""]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("threads", [2, 3, 20])
def test_with_few_threads_the_record_is_true(
    run_main: RunMain, thirty: dict[str, str], standin: StandIn, threads: int
) -> None:
    if not may_become_another_account():
        pytest.skip("this account may not become another one")
    standin.configure(latency=0.5)

    ended = run_main(database=thirty, wrapper=limit_threads(threads))

    assert ended.exit_code == 1
    assert ended.errors == ""
    assert "The run ended early: no memory or thread for another worker" in (
        ended.console
    )
    assert ended.summary["not_attempted"] > 0
    assert_record_is_true(ended, standin)


def test_without_a_thread_for_signals_nothing_is_sent(
    run_main: RunMain, thirty: dict[str, str], standin: StandIn
) -> None:
    if not may_become_another_account():
        pytest.skip("this account may not become another one")

    ended = run_main(database=thirty, wrapper=limit_threads(1))

    assert ended.exit_code == 1
    assert ended.errors == ""
    assert re.fullmatch(
        r"no memory or thread for another worker \(.*\): lower .*\n", ended.console
    )
    assert standin.count_calls() == 0


# Errors that nobody foresaw

# main.py, in which the function that BREAKS raises ERROR once: when it gets WORDS.
BROKEN_MAIN = """
import builtins, importlib, os, sys

module_name, *names, function_name = os.environ["BREAKS"].split(".")
owner = importlib.import_module(module_name)
for name in names:
    owner = getattr(owner, name)
function = getattr(owner, function_name)
raised = []


def broken_function(*arguments, **keywords):
    if not raised and os.environ["WORDS"] in str(arguments):
        raised.append(True)
        raise getattr(builtins, os.environ["ERROR"])
    return function(*arguments, **keywords)


setattr(owner, function_name, broken_function)
import main

sys.exit(main.main())
"""


def run_broken(
    run_main: RunMain,
    database: dict[str, str],
    *,
    breaks: str,
    words: str,
    error: str = "ZeroDivisionError",
) -> Ended:
    return run_main(
        "--quiet",
        database=database,
        program=("-c", BROKEN_MAIN),
        PYTHONPATH=str(process.ROOT),
        MAX_WORKERS="3",
        BREAKS=breaks,
        WORDS=words,
        ERROR=error,
    )


def assert_all_calls_are_on_record(ended: Ended, standin: StandIn) -> None:
    recorded = set()
    for line in ended.lines.values():
        for name, endpoint in CALLS.items():
            if line[name] is not None:
                recorded.add((endpoint, line["email"]))
    for call in standin.state()["journal"]:
        assert (call["endpoint"], call["user"]) in recorded


@pytest.mark.parametrize(
    ("breaks", "words", "error"),
    [
        ("iterable_client.IterableClient.post", "user5@", "ZeroDivisionError"),
        ("iterable_client.IterableClient.post", "user5@", "MemoryError"),
        ("logger_config.ResultsFile.add", "user5@", "ZeroDivisionError"),
        ("logger_config.ResultsFile.announce", "", "ZeroDivisionError"),
    ],
)
def test_an_unforeseen_error_ends_the_run_with_a_true_record(
    run_main: RunMain,
    thirty: dict[str, str],
    standin: StandIn,
    breaks: str,
    words: str,
    error: str,
) -> None:
    ended = run_broken(run_main, thirty, breaks=breaks, words=words, error=error)

    said = {
        "ZeroDivisionError": "The run ended early: unexpected error ZeroDivisionError",
        "MemoryError": "The run ended early: out of memory",
    }
    assert ended.exit_code == 1
    assert ended.errors == ""
    assert said[error] in ended.console
    assert "Traceback" in ended.log
    assert "Traceback" not in ended.console
    assert ended.summary["outcome"] == "aborted"
    assert_counts_add_up(ended)
    assert_all_calls_are_on_record(ended, standin)


def test_a_row_that_cannot_be_sent_is_on_record_after_an_unforeseen_error(
    run_main: RunMain, create_customers: CreateCustomers
) -> None:
    database = create_customers([{}, {}, {"id": 77, "email": None}])

    ended = run_broken(
        run_main, database, breaks="logger_config.ResultsFile.add", words="77"
    )

    assert ended.exit_code == 1
    assert ended.lines[3]["user_id"] == 77
    assert_counts_add_up(ended)


def test_an_unforeseen_error_in_an_answer_costs_that_call_alone(
    run_main: RunMain, thirty: dict[str, str], standin: StandIn
) -> None:
    ended = run_broken(
        run_main, thirty, breaks="iterable_client.interpret", words="events/track"
    )

    reason = "an unexpected error (ZeroDivisionError): see the log file"
    [failure] = ended.summary["failure_reasons"]
    assert ended.exit_code == 1
    assert ended.summary["outcome"] == "completed"
    assert ended.summary["success"] == 29
    assert ended.summary["partial_failures"] == 1
    assert failure["endpoint"] == EVENTS_TRACK
    assert failure["message"] == reason
    assert f": {reason}\n" in ended.console
    assert "No answer from" not in ended.log
    assert "Traceback" in ended.log
    assert find_delivered(standin) == {address(number) for number in range(1, 31)}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("MemoryError", "out of memory: raise ulimit -v, or lower MAX_WORKERS\n"),
        (
            "ZeroDivisionError",
            "unexpected error ZeroDivisionError(): see the log file\n",
        ),
    ],
)
def test_an_unforeseen_error_before_the_first_user_is_said(
    run_main: RunMain,
    thirty: dict[str, str],
    standin: StandIn,
    error: str,
    sentence: str,
) -> None:
    ended = run_broken(
        run_main,
        thirty,
        breaks="logger_config.lock_results_folder",
        words="",
        error=error,
    )

    assert ended.exit_code == 1
    assert ended.errors == ""
    assert ended.console == sentence
    assert "Traceback" in ended.log
    assert standin.count_calls(USERS_UPDATE) == 0
