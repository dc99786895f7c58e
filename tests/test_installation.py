"""What a machine may lack: packages, their versions, parts of Python, files of ours."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lab.process import MAIN, ROOT, CreateCustomers, Ended, RunMain

MODULES = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py")
INSTALL = "pip install -r requirements.txt"

Database = dict[str, str]  # settings
Command = tuple[str, ...]

# Those of requirements.txt, and what requests needs itself.
NEEDED_PACKAGES = (
    "mysql-connector-python",
    "python-dotenv",
    "requests",
    "urllib3",
    "certifi",
    "idna",
)
# requests warns where it is missing.
PACKAGES = (*NEEDED_PACKAGES, "charset-normalizer")
SITE_PACKAGES = Path(str(metadata.distribution("requests").locate_file("")))
# Files of a package that hold its version.
FILES_WITH_VERSION = ("METADATA", "__version__.py", "_version.py", "version.py")
# Python without installed packages, and main.py.
WITHOUT_PACKAGES = ("-S", *MAIN)


@pytest.fixture(scope="module")
def customer(create_customers: CreateCustomers) -> Database:
    """The settings of a database with one user."""
    return create_customers(1)


@pytest.fixture
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, to install packages in."""
    return tmp_path_factory.mktemp("packages")


def list_files(name: str) -> list[metadata.PackagePath]:
    """The files of an installed package, without the commands that it brings."""
    files = metadata.files(name) or []
    return [file for file in files if ".." not in file.parts]


def install(folder: Path, name: str) -> None:
    """Install a package in a folder, as links to the installed one."""
    for place in {file.parts[0] for file in list_files(name)}:
        (folder / place).symlink_to(SITE_PACKAGES / place)


def install_version(folder: Path, name: str, version: str) -> None:
    """Install the same package, which says everywhere that it is that version."""
    installed = metadata.version(name)
    for file in list_files(name):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.name in FILES_WITH_VERSION:
            text = file.read_text("utf-8")
            target.write_text(text.replace(installed, version), "utf-8")
        elif file.suffix != ".pyc":
            target.symlink_to(SITE_PACKAGES / file)


def run_after(statements: str) -> Command:
    """A `program`: main.py after these statements."""
    source = f"""
import runpy, sys
import importlib.metadata, logging  # whose own imports are not concerned
{statements}
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({MAIN[0]!r}, run_name="__main__")
"""
    return ("-c", source)


def read_one_line(ended: Ended) -> str:
    """The only line that a run prints, which ends with 2 before it begins."""
    assert ended.exit_code == 2
    assert ended.console == ""
    [line] = ended.errors.splitlines()
    return line


# Packages that are missing


def test_packages_are_to_be_installed(run_main: RunMain) -> None:
    ended = run_main(database={}, program=WITHOUT_PACKAGES)

    line = read_one_line(ended)
    assert PACKAGES[0] in line
    assert INSTALL in line
    assert sys.executable in line


@pytest.mark.parametrize("missing", NEEDED_PACKAGES)
def test_each_package_is_needed(
    run_main: RunMain, packages: Path, missing: str
) -> None:
    for name in PACKAGES:
        if name != missing:
            install(packages, name)

    ended = run_main(database={}, program=WITHOUT_PACKAGES, PYTHONPATH=str(packages))

    line = read_one_line(ended)
    assert re.search(missing.replace("-", "[-_]"), line)
    assert INSTALL in line


def test_a_package_that_cannot_be_imported_is_named(
    run_main: RunMain, packages: Path
) -> None:
    """As after an interrupted installation, or for another kind of processor."""
    for name in PACKAGES:
        install(packages, name)
    (packages / "dotenv").unlink()
    (packages / "dotenv").mkdir()

    ended = run_main(database={}, program=WITHOUT_PACKAGES, PYTHONPATH=str(packages))

    line = read_one_line(ended)
    assert "dotenv" in line
    assert INSTALL in line


def test_a_package_without_its_version_is_named(
    run_main: RunMain, packages: Path
) -> None:
    """As pip leaves it when it is interrupted."""
    for name in NEEDED_PACKAGES:
        install(packages, name)
    described = packages / f"urllib3-{metadata.version('urllib3')}.dist-info"
    described.unlink()
    described.mkdir()

    ended = run_main(database={}, program=WITHOUT_PACKAGES, PYTHONPATH=str(packages))

    line = read_one_line(ended)
    assert line.startswith("urllib3 (unknown) is installed, ")
    assert INSTALL in line


# Parts of Python, and of ours


@pytest.mark.parametrize("minor", [7, 8, 9])
def test_older_pythons_come_as_far_as_the_check(minor: int) -> None:
    ast.parse((ROOT / "main.py").read_text("utf-8"), feature_version=(3, minor))


@pytest.mark.parametrize("module", ["ssl", "_ssl"])
def test_python_needs_tls(run_main: RunMain, module: str) -> None:
    program = run_after(f"sys.modules[{module!r}] = None")

    ended = run_main(database={}, program=program)

    line = read_one_line(ended)
    assert "ssl" in line
    assert "pip" not in line
    assert sys.executable in line


def test_an_older_python_is_named(run_main: RunMain) -> None:
    program = run_after("sys.version_info = (3, 9, 18)")

    ended = run_main(database={}, program=program)

    line = read_one_line(ended)
    assert "Python 3.10" in line
    assert sys.executable in line


def test_windows_needs_its_linux(run_main: RunMain) -> None:
    program = run_after("sys.modules['fcntl'] = None\nsys.platform = 'win32'")

    ended = run_main(database={}, program=program)

    line = read_one_line(ended)
    assert "Windows" in line
    assert "WSL" in line
    assert "pip" not in line


@pytest.mark.parametrize("module", MODULES[1:])
def test_a_missing_module_of_ours_is_named(
    run_main: RunMain, tmp_path: Path, module: str
) -> None:
    for name in MODULES:
        if name != module:
            shutil.copy(ROOT / name, tmp_path)

    ended = run_main(database={}, program=(str(tmp_path / "main.py"),))

    line = read_one_line(ended)
    assert module in line
    assert str(tmp_path) in line
    assert "pip" not in line


def test_main_alone_in_a_folder_says_so(run_main: RunMain, tmp_path: Path) -> None:
    shutil.copy(ROOT / "main.py", tmp_path)

    ended = run_main(database={}, program=(str(tmp_path / "main.py"),))

    line = read_one_line(ended)
    assert ".py" in line
    assert str(tmp_path) in line
    assert "pip" not in line


def test_missing_queries_are_named(
    run_main: RunMain, customer: Database, tmp_path: Path
) -> None:
    for name in MODULES:
        shutil.copy(ROOT / name, tmp_path)

    ended = run_main("--quiet", database=customer, program=(str(tmp_path / "main.py"),))

    assert ended.exit_code == 2
    assert ended.errors == ""
    assert ended.console.count("\n") == 1
    assert str(tmp_path / "phase2_queries.sql") in ended.console
    assert "LOG_FILE" not in ended.console


# Packages of other versions


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("urllib3", "1.26.20"),
        ("urllib3", "2.0.7"),
        ("requests", "2.25.1"),
        ("python-dotenv", "0.10.0"),
        ("mysql-connector-python", "8.0.33"),
    ],
)
def test_an_older_package_is_to_be_replaced(
    run_main: RunMain, packages: Path, package: str, version: str
) -> None:
    install_version(packages, package, version)

    ended = run_main(database={}, PYTHONPATH=str(packages))

    line = read_one_line(ended)
    assert f"{package} {version}" in line
    assert INSTALL in line


def test_a_package_too_old_to_be_imported_is_named(
    run_main: RunMain, packages: Path
) -> None:
    """What the program imports from it is not there yet."""
    install_version(packages, "urllib3", "1.26.20")
    (packages / "urllib3" / "__init__.py").unlink()

    ended = run_main(database={}, PYTHONPATH=str(packages))

    line = read_one_line(ended)
    assert "urllib3 1.26.20" in line
    assert INSTALL in line


def test_the_versions_of_requirements_are_taken() -> None:
    """They are what the tests run with."""
    for line in (ROOT / "requirements.txt").read_text("utf-8").split():
        name, _, version = line.partition("==")

        assert metadata.version(name) == version


# Options of Python


@pytest.mark.parametrize("flags", [("-I",), ("-s", "-E"), ("-OO",), ("-X", "dev")])
def test_options_of_python_change_nothing(
    run_main: RunMain, customer: Database, flags: Command
) -> None:
    ended = run_main("--check", database=customer, program=(*flags, *MAIN))

    assert ended.exit_code == 0
    assert ended.errors == ""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P came with Python 3.11")
def test_python_may_leave_out_our_folder(run_main: RunMain, customer: Database) -> None:
    ended = run_main("--check", database=customer, program=("-P", *MAIN))

    assert ended.exit_code == 0
    assert ended.errors == ""


def test_a_link_to_main_finds_its_modules(
    run_main: RunMain, customer: Database, tmp_path: Path
) -> None:
    link = tmp_path / "iterable"
    link.symlink_to(ROOT / "main.py")

    ended = run_main("--check", database=customer, program=(str(link),))

    assert ended.exit_code == 0


# A container

# Nothing can be written but the folder $0, and the account is unknown.
IN_CONTAINER = """
mount --bind "$0" "$0" &&
mount -o remount,ro,bind / &&
exec unshare --user --map-user=10001 --map-group=10001 env -u HOME "$@"
"""


@pytest.fixture
def container(folder: Path) -> Command:
    """A `wrapper`: a container with the folder of results and log as its volume."""
    wrapper = ("unshare", "--mount", "sh", "-c", IN_CONTAINER, str(folder))
    tried = subprocess.run((*wrapper, "true"), check=False, capture_output=True)
    if tried.returncode != 0:
        pytest.skip("this account may not have mounts of its own")
    return wrapper


def test_a_container_needs_no_more_than_a_volume(
    run_main: RunMain, customer: Database, container: Command
) -> None:
    ended = run_main(database=customer, wrapper=container, LOG_FILE="/dev/null")

    assert ended.exit_code == 0, ended.console
    assert ended.errors == ""
    assert len(ended.documents) == 1


def test_a_container_has_no_home_folder(
    run_main: RunMain, customer: Database, container: Command
) -> None:
    ended = run_main(database=customer, wrapper=container, RESULTS_DIR="~/results")

    assert ended.exit_code == 2
    assert "RESULTS_DIR begins with ~" in ended.console
    assert ended.console.count("\n") == 1
