"""The README is true: tables, examples and commands are compared with the program."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import main
from lab import database
from lab.process import BARE_ENVIRONMENT, ROOT, Ended, RunMain
from main import ExitCode, parse_arguments

README = (ROOT / "README.md").read_text("utf-8")
MODULES = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py")
NO_FILE = Path("/dev/null")
STOPPED_BY_SIGNAL = {129, 130, 143}  # SIGHUP, SIGINT, SIGTERM
DOCUMENTED_PYTHON = "/srv/iterable/.venv/bin/python"
HIGHEST_EXPOSURE = 30  # tenths, of systemd-analyze security
SHORTEST_MEMORY = 30  # days that --reset-left looks back

systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="needs systemd-analyze"
)


# The README's parts


def find_section(heading: str) -> str:
    """The text under a heading, up to the next one of its level."""
    _, _, text = README.partition(f"\n## {heading}\n")
    assert text, f"no section {heading}"
    return text.split("\n## ")[0]


def list_rows(heading: str) -> list[list[str]]:
    """The cells of each row of the first table under a heading."""
    rows = []
    for line in find_section(heading).splitlines():
        if line.startswith("| "):
            cells = line.split("|")[1:-1]
            rows.append([cell.strip() for cell in cells])
    return rows[2:]  # without headings and rule


def list_first_cells(heading: str) -> list[str]:
    """The first cell of each row of that table."""
    return [row[0] for row in list_rows(heading)]


def find_blocks(heading: str, language: str = "") -> list[str]:
    """The code blocks of a language under a heading."""
    blocks = []
    text = find_section(heading)
    for name, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text):
        if name == language:
            blocks.append(code)
    return blocks


def find_quoted(text: str) -> list[str]:
    """What stands in backticks, in one line."""
    without_blocks = re.sub(r"(?ms)^```.*?^```$", "", text)
    return re.findall(r"`([^`\n]+)`", without_blocks)


def run_command(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **BARE_ENVIRONMENT,
        "PYTHONPATH": str(ROOT / "tests"),
        "LC_ALL": "C.UTF-8",
    }
    return subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


# The program's parts


def list_settings() -> dict[str, str]:
    """The names of all settings, with their defaults as the table writes them."""
    defaults = {}
    for name, setting in main.SETTINGS.items():
        default = setting.metadata["default"]
        if default is None:
            defaults[name] = "required"
        else:
            defaults[name] = f"`{default}`" if default else ""
    return defaults


def list_variables() -> set[str]:
    """The names of all settings, and of the files of secrets."""
    files = [f"{name}_FILE" for name in main.SECRETS]
    return {*main.SETTINGS, *files}


def list_options(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The options as `--help` writes them, without `--help` itself."""
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    return re.findall(r"(?m)^  (--[a-z-]+(?: [A-Z]+)?)", text)


def read_modules() -> str:
    """The source of the modules."""
    return "\n".join((ROOT / name).read_text("utf-8") for name in MODULES)


def list_program_texts() -> Iterator[str]:
    """Each text of the modules; {} is where an f-string has a value."""
    for node in ast.walk(ast.parse(read_modules())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(map(write_part, node.values))
        elif isinstance(node, ast.Constant):
            yield str(node.value)


def write_part(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    return "{}"


# Tables


def test_the_settings_are_those_of_the_program() -> None:
    documented = {}
    for name, default, _ in list_rows("Settings"):
        documented[name.strip("`")] = default.split(",")[0]

    assert documented == list_settings()


def test_the_files_of_secrets_are_named() -> None:
    named = re.findall(r"or `(\w+)_FILE`", find_section("Settings"))

    assert named == main.SECRETS


def test_the_variables_of_proxies_are_named() -> None:
    named = find_quoted(find_section("Settings"))

    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE"):
        assert name in named


def test_the_options_are_those_of_the_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    documented = [option.strip("`") for option in list_first_cells("Set it up")]

    assert documented == list_options(capsys)


def test_the_exit_codes_are_those_of_the_program() -> None:
    cells = ", ".join(list_first_cells("Exit codes"))
    documented = [int(code) for code in cells.split(", ")]

    assert set(documented) == {*ExitCode, *STOPPED_BY_SIGNAL}
    assert documented == sorted(documented)


def test_each_complaint_is_one_that_the_program_makes() -> None:
    cells = "\n".join(list_first_cells("Troubleshooting"))
    texts = "\n".join(list_program_texts())

    for complaint in find_quoted(cells):
        beginning = re.split(r"\.\.\.|:", complaint)[0]
        assert beginning.strip() in texts


# Examples


def test_the_console_is_that_of_a_run(
    server: database.DatabaseServer, run_main: RunMain
) -> None:
    example = find_blocks("What a run prints")[0]
    documented = Ended(0, example, "", NO_FILE)

    ended = run_main(database=server.create_reader())

    assert ended.exit_code == 0
    assert ended.console_without_times == documented.console_without_times


def test_the_line_of_a_user_is_that_of_a_run(
    server: database.DatabaseServer, run_main: RunMain
) -> None:
    [example] = find_blocks("Results")
    documented = json.loads(example.replace("{...}", "null"))

    ended = run_main("--limit", "1", database=server.create_reader())

    line = ended.lines[1]
    assert documented.keys() == line.keys()
    assert documented["users_update"] == line["users_update"]


def test_the_index_is_that_of_the_sample() -> None:
    [statement] = find_blocks("Your own tables", "sql")

    assert " ".join(statement.split()) == f"{database.ADD_INDEX};"


def test_each_script_is_named() -> None:
    named = re.findall(r"bash (tests/\w+\.sh)", README)

    scripts = {f"tests/{path.name}" for path in ROOT.glob("tests/*.sh")}
    assert set(named) == scripts


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_it_is_the_only_markdown_file() -> None:
    listed = run_command("git", "ls-files", "*.md")

    # Nothing is listed where there is no git.
    assert listed.stdout in ("README.md\n", "")


def test_the_marketer_finds_each_field(
    server: database.DatabaseServer, run_main: RunMain
) -> None:
    ended = run_main("--dry-run", database=server.create_reader())

    named = find_quoted(find_section("For the marketer"))
    payloads = ended.lines[1]["payloads"]
    event = payloads["events_track"]
    assert event["eventName"] in named
    assert set(named).issuperset(event["dataFields"])
    assert set(named).issuperset(payloads["users_update"]["dataFields"])


# Cron, systemd, Kubernetes


def list_cron_arguments() -> list[list[str]]:
    """The arguments of main.py in each cron line that runs it."""
    section = find_section("Cron and systemd")
    commands = re.findall(r"(?m)^[\d*/]+ [\d* /]+ \S+ \S+main\.py( [^;\n]*)", section)
    return [shlex.split(command) for command in commands]


def find_units() -> dict[str, str]:
    """The units by name; `# /etc/systemd/system/NAME` is in front of each."""
    [block] = find_blocks("Cron and systemd", "ini")
    pattern = r"(?ms)^# \S+/(iterable\.\w+)\n(.*?)(?=^# /|\Z)"
    return dict(re.findall(pattern, block))


def write_units(folder: Path) -> list[str]:
    """Write them, with a program that this machine has; return their paths."""
    paths = []
    for name, unit in find_units().items():
        path = folder / name
        path.write_text(unit.replace(DOCUMENTED_PYTHON, sys.executable))
        paths.append(str(path))
    return paths


def find_manifest() -> str:
    """The Kubernetes CronJob."""
    [manifest] = find_blocks("Containers", "yaml")
    assert "kind: CronJob" in manifest
    return manifest


def find_manifest_variables() -> dict[str, str]:
    """The environment of its container."""
    pattern = r'name: ([A-Z_]+),?\s+value: "?([^"\s}]*)'
    return dict(re.findall(pattern, find_manifest()))


def test_the_cron_lines_are_valid() -> None:
    found = list_cron_arguments()

    assert found
    for arguments in found:
        options = parse_arguments(arguments)
        assert options.quiet
        assert options.changed_only


def test_a_cron_line_that_resets_is_guarded() -> None:
    """An emptied table would look as if everybody had left."""
    found = [parse_arguments(arguments) for arguments in list_cron_arguments()]
    resetting = [options for options in found if options.reset_left]

    assert resetting
    for options in resetting:
        assert options.at_least is not None


def test_the_cron_lines_keep_the_memory() -> None:
    days = re.findall(r"-mtime \+(\d+) -delete", find_section("Cron and systemd"))

    assert days
    assert min(map(int, days)) >= SHORTEST_MEMORY


@systemd
def test_the_systemd_units_are_valid(tmp_path: Path) -> None:
    paths = write_units(tmp_path)

    verified = run_command("systemd-analyze", "verify", *paths)

    assert list(find_units()) == ["iterable.service", "iterable.timer"]
    assert verified.returncode == 0
    assert "iterable." not in verified.stderr


@systemd
def test_the_systemd_service_is_confined(tmp_path: Path) -> None:
    service = write_units(tmp_path)[0]

    rated = run_command(
        "systemd-analyze",
        "security",
        "--no-pager",
        "--offline=yes",
        f"--threshold={HIGHEST_EXPOSURE}",
        service,
    )

    assert rated.returncode == 0, rated.stdout


def test_the_systemd_service_has_settings() -> None:
    service = find_units()["iterable.service"]

    named = re.findall(r"(?m)(?:^Environment=| )([A-Z_]+)=", service)

    assert named
    assert set(named) <= list_variables()


def test_the_systemd_service_has_options() -> None:
    service = find_units()["iterable.service"]

    [arguments] = re.findall(r"(?m)^ExecStart=\S+ \S+main\.py (.*)$", service)

    options = parse_arguments(shlex.split(arguments))
    assert options.changed_only


def test_the_cron_job_has_settings() -> None:
    assert set(find_manifest_variables()) <= list_variables()


def test_the_cron_job_has_options() -> None:
    [command] = re.findall(r"command: \[(.*)\]", find_manifest())

    _, _, *arguments = command.replace('"', "").split(", ")

    options = parse_arguments(arguments)
    assert options.changed_only


def test_the_cron_job_sets_what_is_required(tmp_path: Path) -> None:
    variables = find_manifest_variables()
    for name in main.SECRETS:
        secret = tmp_path / name
        secret.write_text("a-secret")
        variables[f"{name}_FILE"] = str(secret)

    loaded = main.load_environment_variables(NO_FILE, variables)

    assert loaded.db_password == "a-secret"
    assert loaded.iterable_api_key == "a-secret"


def test_the_cron_job_keeps_what_it_writes_and_reads() -> None:
    """Results are its memory, so they are on a volume; secrets are mounted files."""
    manifest = find_manifest()
    variables = find_manifest_variables()
    mounts = tuple(re.findall(r"mountPath: ([^\s,}]+)", manifest))

    assert "concurrencyPolicy: Forbid" in manifest
    assert "readOnlyRootFilesystem: true" in manifest
    assert variables["RESULTS_DIR"].startswith(mounts)
    assert variables["LOG_FILE"].startswith((*mounts, "/dev/null"))
    for name in main.SECRETS:
        assert variables[f"{name}_FILE"].startswith(mounts)
        assert name not in variables


# Development


def is_file_name(text: str) -> bool:
    return bool(re.fullmatch(r"[\w/.]+\.(py|sql|sh|example)", text))


def test_the_files_of_the_map_are_there() -> None:
    named = find_quoted(find_section("Development"))

    files = [text for text in named if is_file_name(text)]

    assert files
    for file in files:
        # The files of the tests are named from their folder.
        assert (ROOT / file).is_file() or (ROOT / "tests" / file).is_file(), file


def test_the_names_of_the_map_are_there() -> None:
    """Functions, classes, settings and queries, and programs of the machine."""
    queries = (ROOT / "phase2_queries.sql").read_text("utf-8")
    known = re.findall(r"\w+", read_modules() + queries)

    for text in find_quoted(find_section("Development")):
        is_name = re.fullmatch(r"[\w.]+(\(\))?", text)
        if is_name and not is_file_name(text) and not shutil.which(text):
            for name in re.findall(r"\w+", text):
                assert name in known, text


def test_the_commands_of_the_map_find_tests() -> None:
    [block] = find_blocks("Development")

    for command in block.splitlines():
        python, *arguments = shlex.split(command, comments=True)
        found = run_command(sys.executable, *arguments, "--collect-only")

        assert python == ".venv/bin/python"
        assert arguments[:2] == ["-m", "pytest"]
        assert found.returncode == 0, found.stdout


# The demo


def test_the_demo_shows_what_arrived() -> None:
    demo = run_command(sys.executable, "-m", "lab.demo", "--limit", "1")

    assert demo.returncode == 0
    assert demo.stderr == ""
    shown = (
        "Processing record 1/1",
        "Users in the stand-in",
        "page-view-37: page_view",
        '"status": "success"',
    )
    assert all(text in demo.stdout for text in shown)
    assert sorted(shown, key=demo.stdout.find) == list(shown)


def test_the_demo_complains_before_it_starts_anything() -> None:
    demo = run_command(sys.executable, "-m", "lab.demo", "--bogus")

    assert demo.returncode == 2
    assert demo.stdout == ""
    assert "unrecognized arguments: --bogus" in demo.stderr
