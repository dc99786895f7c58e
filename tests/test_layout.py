"""The files of the repository, and what its modules import."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys

import pytest

from lab.process import ROOT

MODULES = ("main", "db_connection", "iterable_client", "logger_config")
PACKAGES = {"dotenv", "mysql", "requests", "urllib3"}  # requests is made with urllib3


def find_imports(module: str) -> set[str]:
    """The top-level names that a module imports, besides the standard library."""
    tree = ast.parse((ROOT / f"{module}.py").read_text("utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


def test_main_imports_the_other_modules() -> None:
    assert find_imports("main") == {*MODULES[1:], "dotenv"}


@pytest.mark.parametrize("module", MODULES[1:])
def test_the_other_modules_import_nothing_of_ours(module: str) -> None:
    assert find_imports(module) <= PACKAGES


def test_three_packages_are_required() -> None:
    lines = (ROOT / "requirements.txt").read_text("utf-8").split()

    packages = {re.split("[=<>~!]", line)[0] for line in lines}
    assert packages == {"mysql-connector-python", "requests", "python-dotenv"}


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_no_other_file_is_at_the_top() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")

    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        *(f"{module}.py" for module in MODULES),
        "phase2_queries.sql",
        "database_setup.sql",
        "requirements.txt",
        "README.md",
        "tests",
    }
