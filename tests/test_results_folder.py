"""The results folder: its lock, the results file of a run, and the earlier ones."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import logger_config
from lab.results import FIRST_NAME, STARTED, file_modes, make_line, write_run
from logger_config import (
    LOCK_NAME,
    EarlierResultsUnreadable,
    FolderInUse,
    FolderNotUsable,
    ResultsFile,
    ResultsFolder,
    ResultsNotWritable,
    SentUser,
    Status,
    lock_results_folder,
)

Logged = pytest.LogCaptureFixture

ANOTHER_ACCOUNT = 65534  # nobody's
BAD_DISK = [
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
]
NOT_SUPPORTED = [
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
]


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As an account that does not own the files, even if root runs the tests."""
    account = os.geteuid()
    if account == 0:
        os.seteuid(ANOTHER_ACCOUNT)
    try:
        yield
    finally:
        os.seteuid(account)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As on a disk that is full: no file of this process can have more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Fail:
    """Lets functions fail as a disk does that no test can have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, owner: object, name: str, code: int, ending: str = "") -> None:
        """Let a function fail with this error if its first argument ends so."""
        real = getattr(owner, name)

        def function(target: object, *arguments: Any, **more: Any) -> Any:
            if str(target).endswith(ending):
                raise OSError(code, os.strerror(code))
            return real(target, *arguments, **more)

        self._monkeypatch.setattr(owner, name, function)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    return Fail(monkeypatch)


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that any account can reach and list, but not write."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def enter(folder: Path) -> None:
    with lock_results_folder(folder):
        pass


def create(folder: Path) -> ResultsFile:
    with lock_results_folder(folder) as results_folder:
        return results_folder.create_results_file({"mode": "send"}, STARTED)


def list_names(folder: Path) -> list[str]:
    """The names in the folder, without those of hidden files."""
    return sorted(path.name for path in folder.glob("integration*"))


def list_numbers(folder: Path) -> list[int]:
    """The numbers of the folder's runs."""
    return [run.number for run in list_runs(folder)]


def list_runs(folder: Path) -> list[logger_config.EarlierRun]:
    return ResultsFolder(folder).runs


# The lock


def test_one_run_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    enter(tmp_path)
    holder = rf"process {os.getpid()}, since [\d-]{{10}} [\d:]{{8}} [+-]\d{{4}}"
    message = f"^Another run holds {tmp_path}: {holder}$"
    with lock_results_folder(tmp_path), pytest.raises(FolderInUse, match=message):
        enter(tmp_path)


def test_another_folder_is_free(tmp_path: Path) -> None:
    with lock_results_folder(tmp_path / "one"), lock_results_folder(tmp_path / "two"):
        assert file_modes(tmp_path / "two") == {"-rw-------"}


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    enter(tmp_path)
    enter(tmp_path)


def test_a_refused_run_leaves_the_lock_held(tmp_path: Path) -> None:
    with lock_results_folder(tmp_path):
        for _ in range(2):
            with pytest.raises(FolderInUse):
                enter(tmp_path)


@pytest.mark.parametrize("code", NOT_SUPPORTED)
def test_a_file_system_without_locks_is_not_usable(
    tmp_path: Path, fail: Fail, code: int
) -> None:
    fail(fcntl, "flock", code)
    message = (
        rf"^RESULTS_DIR {tmp_path} is on .* gives no locks \({os.strerror(code)}\)"
    )
    with pytest.raises(FolderNotUsable, match=message):
        enter(tmp_path)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_both_errors_of_a_held_lock_are_known(
    tmp_path: Path, fail: Fail, code: int
) -> None:
    fail(fcntl, "flock", code)
    with pytest.raises(FolderInUse):
        enter(tmp_path)


def test_a_held_lock_that_cannot_be_read_is_known(
    tmp_path: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_unreadable(path: str, flags: int) -> int:
        return os.open(path, flags & ~os.O_RDWR | os.O_WRONLY | os.O_CREAT)

    fail(fcntl, "flock", errno.EACCES)
    monkeypatch.setattr(logger_config, "_open_private", open_unreadable)
    message = f"^Another run holds {tmp_path}: an unknown process$"
    with pytest.raises(FolderInUse, match=message):
        enter(tmp_path)


# A folder that cannot be used


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    message = rf"^RESULTS_DIR {path} cannot be used \(.*File exists"
    with pytest.raises(FolderNotUsable, match=message):
        enter(path)


def test_a_folder_of_another_account_is_not_usable(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    message = rf"^RESULTS_DIR {open_folder} cannot be used \(.*Permission denied"
    with without_rights(), pytest.raises(FolderNotUsable, match=message):
        enter(open_folder)


def test_a_lock_without_rights_to_its_folder_is_not_usable(open_folder: Path) -> None:
    lock = open_folder / LOCK_NAME
    lock.touch()
    lock.chmod(0o666)
    open_folder.chmod(0o555)
    with (
        without_rights(),
        pytest.raises(FolderNotUsable, match="Permission denied"),
    ):
        enter(open_folder)


def test_a_folder_that_takes_no_results_file_is_not_usable(
    tmp_path: Path, fail: Fail
) -> None:
    fail(os, "open", errno.EACCES, ".json.partial")
    with pytest.raises(FolderNotUsable, match="Permission denied"):
        create(tmp_path)


def test_a_lock_leaves_nothing_else(tmp_path: Path) -> None:
    enter(tmp_path)
    assert os.listdir(tmp_path) == [LOCK_NAME]


@pytest.mark.parametrize("code", BAD_DISK)
@pytest.mark.parametrize("ending", [LOCK_NAME, ".json.partial", ".started"])
def test_a_disk_that_takes_no_file_cannot_take_results(
    tmp_path: Path, fail: Fail, ending: str, code: int
) -> None:
    fail(os, "open", code, ending)
    with pytest.raises(ResultsNotWritable, match=os.strerror(code)):
        create(tmp_path)
    assert list_names(tmp_path) == []


def test_a_disk_that_takes_no_folder_cannot_take_results(
    tmp_path: Path, fail: Fail
) -> None:
    fail(Path, "mkdir", errno.ENOSPC, "results")
    with pytest.raises(ResultsNotWritable, match="No space left on device"):
        create(tmp_path / "results")


def test_a_read_only_file_system_is_not_usable(tmp_path: Path, fail: Fail) -> None:
    fail(os, "open", errno.EROFS, LOCK_NAME)
    with pytest.raises(FolderNotUsable, match="Read-only file system"):
        create(tmp_path)


# The results file

WHOLE = """\
{
"run": {"number": 1, "started_at": "2026-01-13T14:30:45+00:00", "mode": "ü"},
"results": [
{"record": 1},
{"name": "half a pair \\ud83d"}
],
"summary": {"outcome": "completed", "exit_code": 1}
}
"""


def test_a_results_file_is_one_document(tmp_path: Path) -> None:
    with lock_results_folder(tmp_path) as folder:
        results = folder.create_results_file({"mode": "ü"}, STARTED)
    results.add({"record": 1})  # type: ignore[typeddict-item]
    results.add({"name": "half a pair \ud83d"})  # type: ignore[typeddict-item]
    results.finish({"outcome": "completed", "exit_code": 1})
    assert results.path == tmp_path / FIRST_NAME
    assert results.path.read_text("utf-8") == WHOLE


def test_it_is_partial_until_it_is_complete(tmp_path: Path) -> None:
    results = create(tmp_path)
    assert list_names(tmp_path) == [f"{FIRST_NAME}.partial"]
    results.finish({})
    assert list_names(tmp_path) == [FIRST_NAME]


def test_the_files_of_a_run_are_private(tmp_path: Path) -> None:
    results = create(tmp_path)
    results.announce([SentUser(1, "user1@example.com")])
    assert file_modes(tmp_path) == {"-rw-------"}
    results.finish({})
    assert file_modes(tmp_path) == {"-rw-------"}


def test_a_line_of_a_sent_user_is_written_at_once(tmp_path: Path) -> None:
    results = create(tmp_path)
    line = make_line(1)
    results.add(line)
    assert results.path.read_text("utf-8").endswith(f"[\n{json.dumps(line)}")


def test_a_status_is_written_as_its_value(tmp_path: Path) -> None:
    results = create(tmp_path)
    results.add(make_line(1, status=Status.RESET))
    results.finish({})
    document = json.loads(results.path.read_text("utf-8"))
    assert document["results"] == [make_line(1, status="reset")]


def test_two_failures_are_failures() -> None:
    failures = [status.value for status in Status if status.is_failure]
    assert failures == ["partial_failure", "total_failure"]


def test_two_runs_of_one_second_have_two_names(tmp_path: Path) -> None:
    write_run(tmp_path, complete=False)
    write_run(tmp_path)
    assert list_names(tmp_path) == [
        "integration_results_20260113_143045.json.partial",
        "integration_results_20260113_143046.json",
    ]


def test_a_number_is_one_more_than_the_highest(tmp_path: Path) -> None:
    write_run(tmp_path, complete=False)
    second = write_run(tmp_path, mode="dry-run")
    write_run(tmp_path)
    second.unlink()
    write_run(tmp_path)
    assert list_numbers(tmp_path) == [1, 3, 4]


def test_complete_results_leave_no_list_of_users(tmp_path: Path) -> None:
    write_run(tmp_path, announced=[SentUser(1, "user1@example.com")])
    assert sorted(os.listdir(tmp_path)) == [LOCK_NAME, FIRST_NAME]


def test_a_list_goes_after_its_results_file(tmp_path: Path) -> None:
    partial = write_run(tmp_path, complete=False)
    kept = write_run(tmp_path, complete=False)
    partial.unlink()
    write_run(tmp_path)
    [users_list] = tmp_path.glob(".*.started")
    assert users_list.name == f".{kept.name}.started"


# A disk that does not take the results


def test_a_disk_that_is_full_at_the_start_leaves_no_file(tmp_path: Path) -> None:
    # Enough for the lock, and not for the head of the results.
    with file_size_limit(60), pytest.raises(ResultsNotWritable, match="File too large"):
        create(tmp_path)
    assert os.listdir(tmp_path) == [LOCK_NAME]


def test_after_a_line_that_failed_none_is_written(tmp_path: Path) -> None:
    results = create(tmp_path)
    message = r"\.json\.partial cannot be written \(File too large\): make room"
    with (
        file_size_limit(results.path.stat().st_size + 100),
        pytest.raises(ResultsNotWritable, match=message),
    ):
        results.add(make_line(1))
    # There is room again.
    with pytest.raises(ResultsNotWritable, match=message):
        results.add(make_line(2))
    with pytest.raises(ResultsNotWritable, match=message):
        results.finish({})
    assert '"user_id": 2' not in results.path.read_text("utf-8")


def test_after_a_failed_announcement_lines_are_written(tmp_path: Path) -> None:
    results = create(tmp_path)
    with file_size_limit(0), pytest.raises(ResultsNotWritable):
        results.announce([SentUser(1, "user1@example.com")])
    results.add(make_line(3))
    results.finish({})
    assert results.path.name == FIRST_NAME


@pytest.mark.parametrize("code", BAD_DISK)
def test_a_disk_that_cannot_sync_cannot_take_results(
    tmp_path: Path, fail: Fail, code: int
) -> None:
    results = create(tmp_path)
    fail(os, "fsync", code)
    with pytest.raises(ResultsNotWritable, match=os.strerror(code)):
        results.finish({})
    assert results.path.name == f"{FIRST_NAME}.partial"


@pytest.mark.parametrize("code", [*NOT_SUPPORTED, errno.EROFS])
def test_a_file_system_without_sync_takes_results(
    tmp_path: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(logger_config, "SYNC_INTERVAL", 0)
    fail(os, "fsync", code)
    write_run(tmp_path, make_line(1))
    assert list_names(tmp_path) == [FIRST_NAME]


def test_lines_are_synced_now_and_then(
    tmp_path: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = create(tmp_path)
    fail(os, "fsync", errno.EIO)
    results.add(make_line(1))
    monkeypatch.setattr(logger_config, "SYNC_INTERVAL", 0)
    with pytest.raises(ResultsNotWritable):
        results.add(make_line(2))


def test_a_name_that_cannot_be_given_is_an_error(tmp_path: Path, fail: Fail) -> None:
    results = create(tmp_path)
    fail(Path, "rename", errno.EIO, ".partial")
    with pytest.raises(ResultsNotWritable, match="Input/output error"):
        results.finish({})


# Earlier runs


def write_head(folder: Path, name: str, head: str) -> Path:
    path = folder / f"integration_results_{name}"
    path.write_text(f'{{\n{head}\n"results": [\n],\n"summary": {{}}\n}}\n')
    return path


def test_a_head_says_what_a_run_was(tmp_path: Path) -> None:
    head = (
        '"run": {"number": 7, "started_at": "1970-01-01T01:00:01+01:00",'
        ' "mode": "send", "iterable": "https://eu", "identify_by": "userId"},'
    )
    path = write_head(tmp_path, "a.json.partial", head)
    [run] = list_runs(tmp_path)
    assert run == (7, 1.0, path, "send", "https://eu", "userId")


def test_a_head_of_the_first_versions_is_known(tmp_path: Path) -> None:
    head = '"run": {"started_at": "1970-01-01T00:00:01+00:00", "mode": "dry-run"},'
    path = write_head(tmp_path, "a.json", head)
    [run] = list_runs(tmp_path)
    assert run == (0, 1.0, path, "dry-run", None, "email")


def test_runs_are_in_the_order_of_number_and_start(tmp_path: Path) -> None:
    for name, head in (
        ("1", '"number": 10, "started_at": "2020-01-01T00:00:00+00:00"'),
        ("2", '"number": 9, "started_at": "2021-01-01T00:00:00+00:00"'),
        ("3", '"started_at": "2026-01-01T00:00:00+00:00"'),
        ("4", '"started_at": "2026-01-01T00:30:00+01:00"'),
    ):
        write_head(tmp_path, f"{name}.json", f'"run": {{"mode": "send", {head}}},')
    paths = [run.path.name for run in list_runs(tmp_path)]
    assert paths == [f"integration_results_{name}.json" for name in (4, 3, 2, 1)]


FOREIGN = {
    "zeros": "\0" * 100,
    "no mode": '"run": {"started_at": "2026-01-13T14:30:45+00:00"},',
    "a number that is none": '"run": {"mode": "send", "number": Infinity,'
    ' "started_at": "2026-01-13T14:30:45+00:00"},',
    "deep": '"run": ' + "[" * 100_000,
}


@pytest.mark.parametrize("name", ["a.json", "a.json.partial"])
@pytest.mark.parametrize("head", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_form_is_skipped_with_a_warning(
    tmp_path: Path, caplog: Logged, name: str, head: str
) -> None:
    path = write_head(tmp_path, name, head)
    write_run(tmp_path)
    assert list_numbers(tmp_path) == [1]
    warning = f"{path} is not a results file of this program and is not used: "
    assert caplog.text.count(warning) == 2


def test_a_folder_is_read_and_warned_of_once(tmp_path: Path, caplog: Logged) -> None:
    write_head(tmp_path, "a.json", "")
    with lock_results_folder(tmp_path) as folder:
        folder.read_memory(iterable="", identify_by="email")
        folder.create_results_file({}, STARTED)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("text", ["", "{\n", '{\n"run": {"num', "\0" * 100])
def test_a_run_killed_in_its_head_is_no_warning(
    tmp_path: Path, caplog: Logged, text: str
) -> None:
    (tmp_path / "integration_results_a.json.partial").write_text(text)
    assert list_runs(tmp_path) == []
    assert caplog.messages == []


# Earlier results that cannot be read


@pytest.mark.parametrize("complete", [False, True])
def test_a_file_without_permission_is_an_error(
    open_folder: Path, complete: bool
) -> None:
    path = write_run(open_folder, complete=complete)
    path.chmod(0)
    message = rf"^{path} cannot be read \(Permission denied\).*\(chown\)"
    with without_rights(), pytest.raises(EarlierResultsUnreadable, match=message):
        list_runs(open_folder)


def test_a_folder_that_cannot_be_listed_is_an_error(open_folder: Path) -> None:
    write_run(open_folder)
    open_folder.chmod(0o311)
    message = rf"^{open_folder} cannot be read \(Permission denied\)"
    with without_rights(), pytest.raises(EarlierResultsUnreadable, match=message):
        list_runs(open_folder)


FIRST_PARTIAL = f"{FIRST_NAME}.partial"
FIRST_LIST = f".{FIRST_PARTIAL}.started"
# Linux opens this file and then cannot read it.
BROKEN = Path("/proc/self/mem")


def test_a_broken_disk_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "integration_results_a.json"
    path.symlink_to(BROKEN)
    message = rf"^{path} cannot be read \(Input/output error\)"
    with pytest.raises(EarlierResultsUnreadable, match=message):
        enter(tmp_path)


@pytest.mark.parametrize("name", [FIRST_PARTIAL, FIRST_LIST])
def test_a_disk_that_breaks_later_is_an_error(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, complete=False)
    folder = ResultsFolder(tmp_path)
    path = tmp_path / name
    path.unlink()
    path.symlink_to(BROKEN)
    message = rf"^{path} cannot be read \(Input/output error\)"
    with pytest.raises(EarlierResultsUnreadable, match=message):
        folder.read_memory(iterable="", identify_by="email")


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "integration_results_a.json"
    path.symlink_to("nowhere")
    with pytest.raises(EarlierResultsUnreadable, match="No such file"):
        list_runs(tmp_path)
