"""Disks that are full, fill up or may not be written: the run says so, and who was told stays known (issue 4)."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from standin_handle import EVENTS_TRACK, USERS_UPDATE, StandIn

Program = Callable[..., harness.Ended]
Started = Callable[..., harness.Running]
Customers = Callable[..., dict[str, str]]
Settings = Callable[..., dict[str, str]]

USERS = 400
# What follows runs on a disk of its own, whose contents are copied out in the end.
ON_SMALL_DISK = 'mount -t tmpfs -o "$OPTIONS" none "$DISK" && { "$@"; code=$?; cp -a "$DISK/." "$OUT"; exit $code; }'


def run(*wrapper: str, settings: dict[str, str], folder: Path, **more: str) -> harness.Ended:
    """main.py, started by another program. Its console is a pipe: a limit to the size of files is none to it."""
    coverage = {} if "ulimit" in " ".join(wrapper) else os.environ  # whose file is one, too
    coverage = {name: value for name, value in coverage.items() if name.startswith("COVERAGE_")}
    done = subprocess.run(
        [*wrapper, sys.executable, str(harness.ROOT / "main.py"), "--env-file", "/dev/null"],
        env={**harness.BARE, **coverage, **settings, **more},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return harness.Ended(done.returncode, done.stdout, done.stderr, folder)


@functools.cache
def may_mount() -> bool:
    """Whether this account may have mounts of its own: root, and others where the kernel lets them."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def on_small_disk(settings: Settings, folder: Path) -> Callable[..., harness.Ended]:
    """`on_small_disk("size=1m", database=..., RESULTS_DIR=..., ...)`: a run for which `folder / "disk"` is a disk of
    its own. What is left on it is in `folder / "out"`, the folder of the run that is returned."""
    if not may_mount():
        pytest.skip("this account may not mount a disk")
    disk, out = folder / "disk", folder / "out"
    disk.mkdir()
    out.mkdir()

    def start(options: str, *, database: dict[str, str], **more: str) -> harness.Ended:
        where = {"OPTIONS": options, "DISK": str(disk), "OUT": str(out)}
        wrapper = ("unshare", "-rm", "sh", "-c", ON_SMALL_DISK, "sh")
        return run(*wrapper, settings=settings(database, **more), folder=out, **where)

    return start


@pytest.fixture(scope="module")
def many(customers: Customers) -> dict[str, str]:
    return customers(USERS)


def long_answers(standin: StandIn) -> None:
    """Let each user take 4 kB in the results file, and much less in the log."""
    body = json.dumps({"msg": "\N{GRINNING FACE}" * 480, "code": "Success", "params": None})
    for endpoint in (USERS_UPDATE, EVENTS_TRACK):
        standin.fault(endpoint=endpoint, status=200, processed=True, body=body, latency=0.02)


def told(standin: StandIn) -> set[str]:
    """Who got both calls; no one may have got only one."""
    state = standin.state()
    users, events = state["users"], state["events"].values()
    assert sorted(users) == sorted(event["email"] for event in events)
    return set(users)


def on_record(ended: harness.Ended, log: str) -> set[str]:
    """Who was told according to the log and the whole lines of the one unfinished results file."""
    [partial] = ended.folder.glob("integration_results_*")
    assert partial.suffix == ".partial"
    known = set(re.findall(r"Successfully processed user: (\S+)", log))
    for line in partial.read_bytes().splitlines()[3:]:
        try:
            user = json.loads(line.rstrip(b","))
        except ValueError:  # at the end, where the disk was full
            continue
        if user["status"] == "success":
            known.add(user["email"])
    return known


def assert_stopped_by_disk(ended: harness.Ended, standin: StandIn, error: str) -> None:
    """It stopped early, said why, and counted truly."""
    assert (ended.exit_code, ended.errors) == (1, "")
    assert re.search(rf"integration_results_\d+_\d+\.json cannot be written.*{re.escape(error)}", ended.console)
    assert len(told(standin)) < USERS
    assert f"Successful (both API calls): {len(told(standin))}\n" in ended.console
    assert f"Not attempted: {USERS - len(told(standin))}\n" in ended.console
    assert re.search(r"^Results: \S+\.json\.partial, without its end$", ended.console, re.MULTILINE)


# A disk that fills up in mid-run


def test_when_the_results_file_can_grow_no_more_the_run_stops_and_the_log_has_the_rest(
    settings: Settings, program: Program, many: dict[str, str], standin: StandIn, folder: Path
) -> None:
    long_answers(standin)
    limited = 'ulimit -f 2000; exec "$@"'  # of 512 bytes each
    ended = run("sh", "-c", limited, "sh", settings=settings(many, MAX_WORKERS="10"), folder=folder)
    assert_stopped_by_disk(ended, standin, "File too large")
    assert on_record(ended, ended.log) == told(standin)
    calls = standin.counters()["calls"]
    again = program("--changed-only", database=many)
    assert again.exit_code == 0
    assert len(told(standin)) == USERS
    assert again.results["summary"]["unchanged"] > 0
    assert sum(standin.counters()["calls"].values()) == sum(calls.values()) + again.results["summary"]["calls"]


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_when_the_disk_of_the_results_is_full_the_run_stops_and_who_was_told_is_known(
    on_small_disk: Callable[..., harness.Ended], many: dict[str, str], standin: StandIn, folder: Path, level: str
) -> None:
    long_answers(standin)
    ended = on_small_disk("size=1200k", database=many, RESULTS_DIR=str(folder / "disk"), LOG_LEVEL=level)
    assert_stopped_by_disk(ended, standin, "No space left on device")
    assert on_record(ended, (folder / "run.log").read_text("utf-8")) == told(standin)


def test_when_the_disk_of_results_and_log_is_full_the_run_stops_and_who_was_told_is_known(
    on_small_disk: Callable[..., harness.Ended], many: dict[str, str], standin: StandIn, folder: Path
) -> None:
    """As it is with the defaults, which put both beside main.py."""
    long_answers(standin)
    disk = {"RESULTS_DIR": str(folder / "disk"), "LOG_FILE": str(folder / "disk" / "run.log")}
    ended = on_small_disk("size=1200k", database=many, **disk)
    assert_stopped_by_disk(ended, standin, "No space left on device")
    assert on_record(ended, ended.console + ended.log) == told(standin)


def test_when_the_folder_of_the_results_is_gone_the_run_says_so_and_the_log_has_who_was_told(
    started: Started, customers: Customers, standin: StandIn, folder: Path
) -> None:
    standin.configure(latency=0.5)
    results = folder / "results"
    running = started(database=customers(3), RESULTS_DIR=str(results))
    standin.wait_for_calls(1, EVENTS_TRACK)
    shutil.rmtree(results)
    ended = running.wait()
    assert (ended.exit_code, ended.errors) == (1, "")
    assert re.search(r"integration_results_\d+_\d+\.json cannot be written: \[Errno 2\]", ended.console)
    assert set(re.findall(r"Successfully processed user: (\S+)", ended.log)) == told(standin)


# Folders and files that cannot be written from the start


@pytest.fixture
def three(customers: Customers) -> dict[str, str]:
    return customers(3)


def assert_nothing_began(ended: harness.Ended, standin: StandIn, words: str) -> None:
    assert (ended.exit_code, ended.errors) == (2, "")
    assert re.search(words, ended.console.splitlines()[-1])
    assert "[STEP 2]" not in ended.console
    assert standin.counters()["connections"] == 0


UNWRITABLE = {"below a file": "file/results", "a file": "file", "in /proc": "/proc/results"}


@pytest.mark.parametrize("place", UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_results_folder_that_cannot_be_written_is_a_settings_error(
    program: Program, three: dict[str, str], standin: StandIn, folder: Path, place: str
) -> None:
    (folder / "file").write_text("mine")
    ended = program("--quiet", database=three, RESULTS_DIR=str(folder / place))
    assert_nothing_began(ended, standin, r"^RESULTS_DIR cannot be written: \[Errno \d+\] .+: '.+'$")
    assert len(ended.console.splitlines()) == 1
    assert (folder / "file").read_text() == "mine"


UNWRITABLE_LOG = {"below a file": "file/run.log", "a folder": ".", "in /proc": "/proc/run.log"}


@pytest.mark.parametrize("place", UNWRITABLE_LOG.values(), ids=UNWRITABLE_LOG)
def test_a_log_that_cannot_be_opened_is_a_settings_error(
    program: Program, three: dict[str, str], standin: StandIn, folder: Path, place: str
) -> None:
    (folder / "file").write_text("mine")
    ended = program("--quiet", database=three, LOG_FILE=str(folder / place))
    assert_nothing_began(ended, standin, r"^LOG_FILE cannot be written: \[Errno \d+\] .+: '.+'$")
    assert len(ended.console.splitlines()) == 1
    assert list(folder.glob("*integration_results*")) == []


def test_a_read_only_disk_is_a_settings_error(
    on_small_disk: Callable[..., harness.Ended], three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    ended = on_small_disk("ro", database=three, RESULTS_DIR=str(folder / "disk"))
    assert_nothing_began(ended, standin, r"^RESULTS_DIR cannot be written: \[Errno 30\] Read-only file system: '.+'$")
    ended = on_small_disk("ro", database=three, LOG_FILE=str(folder / "disk" / "run.log"))
    assert_nothing_began(ended, standin, r"^LOG_FILE cannot be written: \[Errno 30\] Read-only file system: '.+'$")


def test_where_no_file_may_grow_nothing_is_sent(
    settings: Settings, three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    ended = run("sh", "-c", 'ulimit -f 0; exec "$@"', "sh", settings=settings(three), folder=folder)
    assert_nothing_began(ended, standin, r"^RESULTS_DIR cannot be written: \[Errno 27\] File too large$")
    assert ended.console.count("The log file ") == 1
    assert list(folder.glob("integration_results_*")) == []


def test_a_disk_that_is_full_from_the_start_is_a_settings_error_and_leaves_no_results(
    on_small_disk: Callable[..., harness.Ended], three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    """Not even an empty file: the runs of the next 8 days with --changed-only would warn of it."""
    ended = on_small_disk("size=4k", database=three, RESULTS_DIR=str(folder / "disk"))  # for the lock, no more
    assert_nothing_began(ended, standin, r"^RESULTS_DIR cannot be written: \[Errno 28\] No space left on device$")
    assert list(ended.folder.glob("integration_results_*")) == []


# The log


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["plain", "quiet"])
def test_a_log_on_a_full_disk_is_told_once_and_the_run_goes_on(
    program: Program, three: dict[str, str], standin: StandIn, quiet: list[str]
) -> None:
    ended = program(*quiet, database=three, LOG_FILE="/dev/full")
    said = "The log file /dev/full cannot be written: [Errno 28] No space left on device\n"
    assert (ended.exit_code, ended.errors) == (0, "")
    assert ended.console.count(said) == ended.console.count("cannot be written") == 1
    assert not quiet or ended.console == said
    assert ended.results["summary"]["success"] == len(told(standin)) == 3


def test_when_the_disk_of_the_log_fills_up_the_run_goes_on(
    on_small_disk: Callable[..., harness.Ended], many: dict[str, str], standin: StandIn, folder: Path
) -> None:
    ended = on_small_disk("size=64k", database=many, LOG_FILE=str(folder / "disk" / "run.log"))
    assert (ended.exit_code, ended.errors) == (0, "")
    assert ended.console.count("cannot be written: [Errno 28]") == 1
    assert 0 < ended.log.count("Successfully processed") < USERS
    [results] = folder.glob("integration_results_*.json")
    assert json.loads(results.read_text("utf-8"))["summary"]["success"] == len(told(standin)) == USERS


# What is made


def test_missing_folders_are_made(program: Program, three: dict[str, str], folder: Path) -> None:
    places = {"RESULTS_DIR": str(folder / "a" / "b" / "results"), "LOG_FILE": str(folder / "c" / "d" / "log.txt")}
    assert program(database=three, **places).exit_code == 0
    assert len(list((folder / "a" / "b" / "results").glob("integration_results_*.json"))) == 1
    assert "Successfully processed" in (folder / "c" / "d" / "log.txt").read_text("utf-8")


@pytest.mark.parametrize("umask", ["000", "777"])
def test_log_results_and_lock_are_private_whatever_the_umask(
    settings: Settings, three: dict[str, str], folder: Path, umask: str
) -> None:
    if umask == "777" and os.geteuid():
        pytest.skip("only root may write what nobody may")
    ended = run("sh", "-c", f'umask {umask}; exec "$@"', "sh", settings=settings(three), folder=folder)
    assert ended.exit_code == 0
    modes: dict[str, Any] = {path.suffix: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()}
    expected = "0o600" if umask == "000" else "0o0"
    assert modes == {".log": "0o600", ".json": expected, ".lock": expected}


def test_the_file_of_a_run_under_way_is_private(
    started: Started, three: dict[str, str], standin: StandIn, folder: Path
) -> None:
    standin.fault("silence")
    started(database=three)
    standin.wait_for_calls(3)
    [partial] = folder.glob("*.partial")
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
