"""Writes results files of earlier runs, with users' lines as main.py makes them."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from logger_config import CallLine, SentUser, UserLine, lock_results_folder

STARTED = datetime(2026, 1, 13, 14, 30, 45, 999_999, tzinfo=timezone.utc)
FIRST_NAME = "integration_results_20260113_143045.json"
ITERABLE = "https://api.iterable.com"


def make_call(*, ok: bool = True, **more: Any) -> CallLine:
    """A call that Iterable accepted, or one that it refused."""
    call: CallLine = {
        "endpoint": "users/update",
        "ok": ok,
        "status": 200 if ok else 400,
        "code": "Success" if ok else "BadParams",
        "message": "" if ok else "no",
        "attempts": 1,
    }
    return cast(CallLine, {**call, **more})


ACCEPTED = make_call()
REFUSED = make_call(ok=False)
FORGOTTEN = make_call(ok=False, status=409, code="ForgottenUserError")
CALLS: dict[str, tuple[CallLine | None, CallLine | None]] = {
    "success": (ACCEPTED, ACCEPTED),
    "partial_failure": (ACCEPTED, REFUSED),
    "total_failure": (REFUSED, REFUSED),
    "forgotten": (FORGOTTEN, None),
    "reset": (ACCEPTED, None),
    "not_attempted": (None, None),
}


def make_line(
    user_id: int | str | None,
    status: str = "success",
    *,
    fingerprint: str | None = "f",
    **more: Any,
) -> UserLine:
    """A user's line with the calls that belong to its status."""
    users_update, events_track = CALLS[status]
    line: UserLine = {
        "record": 1,
        "user_id": user_id,
        "email": f"user{user_id}@example.com",
        "event_id": None if status == "reset" else f"page-view-{user_id}",
        "status": status,
        "users_update": users_update,
        "events_track": events_track,
        "fingerprint": fingerprint,
    }
    return cast(UserLine, {**line, **more})


def write_run(
    folder: Path,
    *lines: UserLine,
    announced: Iterable[SentUser] = (),
    complete: bool = True,
    **head: str,
) -> Path:
    """Write the results file of one more run. One that is not `complete` was killed."""
    run = {"mode": "send", "iterable": ITERABLE, "identify_by": "email", **head}
    with lock_results_folder(folder) as results_folder:
        results = results_folder.create_results_file(run, STARTED)
    results.announce(announced)
    for line in lines:
        results.add(line)
    if complete:
        results.finish({"outcome": "completed"})
    return results.path


def file_modes(folder: Path) -> set[str]:
    """The permissions of the files in the folder, such as `-rw-------`."""
    return {stat.filemode(path.stat().st_mode) for path in folder.iterdir()}
