"""The guide: the project on paper, as a PDF.

Every fact in it comes from its one home, or from a run made for it. guide.typ is the
document and asks for its pieces by name. A missing piece ends the build with its name.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fontpkg_ibm_plex_mono
import fontpkg_ibm_plex_sans
import mermaid_render
import typst

from db_connection import PageViewRow, read_query
from lab import database, process, standin_handle

FONTS = [
    package.ROOT / "files" for package in (fontpkg_ibm_plex_sans, fontpkg_ibm_plex_mono)
]
MODULES = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py")
DEFAULT_FILE = process.ROOT / "iterable_integration_guide.pdf"
FLOWCHART_CAPTION = "A run, from the rows to what it leaves"
LONG_TEXT = 50  # characters; a column with longer cells takes part of the spare width
POINTS_PER_PIXEL = 0.56  # of a diagram; its text has 16 pixels
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
RUN_HERE = "\0"  # stands in a section for the output that takes its code block's place

SEQUENCE = """%%{init: {"sequence": {"mirrorActors": false}}}%%
sequenceDiagram
    participant M as main.py
    participant I as Iterable"""
SINGLE_CALLS = f"""{SEQUENCE}
    M->>I: POST users/update
    I-->>M: 200, code Success
    M->>I: POST events/track
    I-->>M: 200, code Success
    alt 429 to either call, perhaps with Retry-After
        Note over M,I: the endpoint pauses and gets slower, then the call is repeated
    else 408, 500, 502, 503, 504 or no answer
        Note over M,I: the call is repeated after a wait that doubles, up to its limit
    else 400 InvalidEmailAddressError, or a 200 that says tracking is disallowed
        Note over M,I: this call has failed, the other one is made all the same
    else 401 or 403 from Iterable
        Note over M,I: the run ends, no further call is made
    end
"""
BULK_CALLS = f"""{SEQUENCE}
    M->>I: POST users/bulkUpdate, a group of users
    alt 200 with counts that add up
        I-->>M: 200, with the users that were not accepted
        M->>I: POST events/trackBulk, for the accepted users
        I-->>M: 200, read in the same way
    else 400, 413, no answer after all attempts, or counts that do not add up
        Note over M,I: no user of the group has a result yet
    end
    loop each user without a result
        M->>I: POST users/update, POST events/track, unless bulk confirmed it
        I-->>M: the same status and reason as in a run without bulk
    end
"""
COLUMNS = f"""
SELECT table_name, column_name, column_type, column_key, column_comment,
    referenced_table_name
FROM columns
LEFT JOIN key_column_usage USING (table_schema, table_name, column_name)
WHERE table_schema = '{database.DATABASE}'
ORDER BY table_name, columns.ordinal_position
"""
INDEXES = f"""
SELECT table_name, index_name,
    GROUP_CONCAT(column_name ORDER BY seq_in_index SEPARATOR ', '),
    IF(index_name = 'PRIMARY', 'primary key', IF(MIN(non_unique), 'index', 'unique'))
FROM statistics
WHERE table_schema = '{database.DATABASE}'
GROUP BY table_name, index_name
ORDER BY table_name, MIN(non_unique), index_name
"""
INDEX_HEAD = ("table", "name", "columns", "kind")
# What Typst writes in another way, and the text between: a code block with its
# language, the lines of a table, code in a line, text.
MARKDOWN = re.compile(
    r"^```(?P<language>\w*)\n(?P<block>.*?)^```$"
    r"|(?P<table>(?:^\|[^\n]*\n)+)"
    r"|`(?P<code>[^`]+)`"
    r"|(?P<text>[^`|]+)",
    re.MULTILINE | re.DOTALL,
)
CODE_BLOCK = re.compile(r"^```$.*?^```$", re.MULTILINE | re.DOTALL)
QUERY = re.compile(
    r"^-- name: (?P<name>\w+)\n(?P<comment>(?:--[^\n]*\n)*)(?P<sql>.*?;)$",
    re.MULTILINE | re.DOTALL,
)
TYPST_CHARACTERS = re.compile(r"[\\#$@<>\[\]_~/=*]")
# Between a number and its unit, and between the thousands of a number.
UNBREAKABLE_SPACE = re.compile(r"(?<=[0-9]) (?=[0-9]{3}|(?:ms|s|KB|MB)[^a-z]|%)")
# What makes a string in JSON makes it in Typst, too.
quote = json.JSONEncoder(ensure_ascii=False).encode

Pieces = dict[str, str]
"""Text in Typst's language, by name."""


def main(arguments: Sequence[str]) -> None:
    """Write the guide to the file that is named, or to the default one."""
    file = Path(arguments[0]) if arguments else DEFAULT_FILE
    try:
        file.write_bytes(typeset(collect_pieces(process.ROOT, make_runs())))
    except typst.TypstError as error:
        sys.exit(f"No guide was written: {error}")
    print(f"The guide: {file}")


def typeset(pieces: Pieces) -> bytes:
    """Return the PDF, which the compiler checks against PDF/UA-1.

    Raises TypstError, also for a missing piece.
    """
    entries = [f"{quote(name)}: [{piece}]" for name, piece in pieces.items()]
    document = Path(__file__).with_suffix(".typ").read_text("utf-8")
    source = f"#let pieces = ({', '.join(entries)})\n{document}"
    return typst.compile(
        source.encode(),
        font_paths=FONTS,
        ignore_system_fonts=True,
        pdf_standards=["ua-1"],
    )


# Pieces from runs


def make_runs() -> Pieces:
    """What the program and the database say, on the sample and beside a stand-in."""
    program = next(iter(database.find_servers().values()))
    with (
        database.DatabaseServer(program) as server,
        standin_handle.StandIn(key=process.KEY) as standin,
    ):
        server.load(database.SETUP)
        return describe_database(server) | describe_runs(server, standin)


def describe_database(server: database.DatabaseServer) -> Pieces:
    """What the server says of its tables and of what Query 2 finds."""
    name = "MariaDB" if server.kind == "mariadb" else "MySQL"
    users = server.query(read_query(database.QUERIES, "query_2"))
    indexes = server.query(INDEXES, "information_schema")
    return {
        "server": escape_text(f"{name} {server.version}"),
        "diagram of the tables": draw_diagram(describe_tables(server)),
        "users found by Query 2": format_values([PageViewRow._fields, *users]),
        "keys and indexes": format_values([INDEX_HEAD, *indexes]),
    }


def describe_tables(server: database.DatabaseServer) -> str:
    """The entity-relationship diagram, in Mermaid."""
    lines = ["erDiagram"]
    for row in server.query(COLUMNS, "information_schema"):
        table, column, column_type, column_key, comment, parent = row
        key = {"PRI": "PK", "UNI": "UK"}.get(column_key, "")
        if parent:
            key = "FK"
            label = f"{column} is {parent}.id"
            lines.append(f'{parent} ||--o{{ {table} : "{label}"')
        # The width of an integer limits nothing, and not all servers give it.
        column_type = re.sub(r"int\(\d+\)", "int", column_type)
        words = comment.replace("<", "#lt;").replace(">", "#gt;").replace('"', "'")
        lines.append(f'{table} {{\n{column_type} {column} {key} "{words}"\n}}')
    return "\n".join(lines)


def describe_runs(
    server: database.DatabaseServer, standin: standin_handle.StandIn
) -> Pieces:
    """What a dry run, a check and a run print and leave.

    The pieces that are named after a section of README.md are shown in it.
    """
    with tempfile.TemporaryDirectory(prefix="guide-") as name:
        folder = Path(name)
        settings = process.settings_for(server.create_reader(), standin.url, folder)
        dry_run = run_main("--dry-run", settings=settings, folder=folder)
        payloads = dry_run.lines[1]["payloads"]
        check = run_main("--check", settings=settings, folder=folder)
        run = run_main(settings=settings, folder=folder)
        line = run.lines[1]
    return {
        "payload of users/update": format_json(payloads["users_update"]),
        "payload of events/track": format_json(payloads["events_track"]),
        "check": format_code(f"$ .venv/bin/python main.py --check\n{check.console}"),
        "What a run prints": format_code(run.console),
        "Results": format_code(quote(line), "json"),
    }


def run_main(
    *arguments: str, settings: Mapping[str, str], folder: Path
) -> process.Ended:
    """Run main.py, and put other names in place of those that differ by run."""
    ended = process.run(*arguments, settings=settings, folder=folder)
    assert ended.exit_code == 0, f"main.py {arguments}: {ended.console}{ended.errors}"
    url = settings["ITERABLE_API_BASE_URL"]
    console = ended.console.replace(str(folder), "/srv/iterable")
    console = console.replace(url, "http://127.0.0.1:8080")
    return dataclasses.replace(ended, console=console)


# Pieces from files


def collect_pieces(root: Path, runs: Pieces) -> Pieces:
    """The pieces from the runs, and those from the files in `root`."""
    return {
        **runs,
        "diagram of single calls": draw_diagram(SINGLE_CALLS),
        "diagram of bulk calls": draw_diagram(BULK_CALLS),
        **collect_code(root),
        **collect_queries((root / database.QUERIES.name).read_text("utf-8")),
        **collect_sections((root / "README.md").read_text("utf-8"), runs),
    }


def collect_code(root: Path) -> Pieces:
    """What the modules define, and the first line of each."""
    pieces = {}
    for name in MODULES:
        source = (root / name).read_text("utf-8")
        module = ast.parse(source)
        docstring = ast.get_docstring(module) or ""
        pieces[f"first line of {name}"] = convert_markdown(docstring.split("\n")[0])
        lines = source.splitlines()
        for node in module.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                pieces[f"{node.name} in the modules"] = format_code(code, "python")
    return pieces


def collect_queries(text: str) -> Pieces:
    """The queries of phase2_queries.sql, and their comments."""
    pieces = {}
    for query in QUERY.finditer(text):
        name = query["name"]
        comment = re.sub("^-- ?", "", query["comment"], flags=re.MULTILINE)
        pieces[f"{name} in phase2_queries.sql"] = format_code(query["sql"], "sql")
        pieces[f"comment of {name}"] = convert_markdown(comment)
    return pieces


def collect_sections(readme: str, runs: Pieces) -> Pieces:
    """The sections of README.md, and its first lines."""
    top, *parts = re.split(r"^## (.+)\n", readme, flags=re.MULTILINE)
    title, _, introduction = top.removeprefix("# ").partition("\n")
    pieces = {
        "title": escape_text(title),
        "top of README.md": convert_markdown(introduction),
    }
    headings = parts[::2]
    texts = parts[1::2]
    for heading, text in zip(headings, texts, strict=True):
        kind, section = convert_section(text, runs.get(heading))
        pieces[f"{kind} '{heading}' in README.md"] = section
    return pieces


def convert_section(text: str, run: str | None) -> tuple[str, str]:
    """Convert a section. A run takes the place of its first code block.

    Returns its kind, too: guide.typ asks for a section in which a run is shown.
    """
    if run is not None and CODE_BLOCK.search(text):
        around_run = convert_markdown(CODE_BLOCK.sub(RUN_HERE, text, count=1))
        return "section with a code block", around_run.replace(RUN_HERE, run)
    return "section", convert_markdown(text)


# Typst


def escape_text(value: object) -> str:
    """Text in which no line ends between a number and its unit, or within a number."""
    text = UNBREAKABLE_SPACE.sub(NO_BREAK_SPACE, str(value))
    return TYPST_CHARACTERS.sub(r"\\\g<0>", text)


def convert_markdown(text: str) -> str:
    """Markdown in Typst, where paragraphs and lists look the same."""
    return MARKDOWN.sub(convert_element, text)


def convert_element(element: re.Match[str]) -> str:
    """Convert what the pattern MARKDOWN has found."""
    if element["table"]:
        return convert_table(element["table"])
    if element["language"] == "mermaid":
        source = element["block"].replace("flowchart LR", "flowchart TB", 1)
        caption = FLOWCHART_CAPTION
        return f"#figure([{draw_diagram(source)}], caption: [{caption}])\n\n"
    if element["block"]:
        return format_code(element["block"], element["language"])
    if element["code"]:
        code = " ".join(element["code"].split())
        return f"#raw({quote(code)});"
    return escape_text(element["text"]).replace(r"\*\*", "*")


def convert_table(text: str) -> str:
    """Convert a table of Markdown."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines()]
    del rows[1]  # the line of dashes below the head
    return format_table([[convert_markdown(cell) for cell in row] for row in rows])


def format_values(rows: Iterable[Sequence[Any]]) -> str:
    """A table of these values."""
    return format_table([[escape_text(value) for value in row] for row in rows])


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of cells in Typst, of which the first row is the head.

    Long columns share the width that short ones leave.
    """
    widths = []
    for column in zip(*rows, strict=True):
        longest = max(len(cell) for cell in column)
        widths.append("1fr" if longest > LONG_TEXT else "auto")
    widths[-1] = "1fr"
    head, *others = [", ".join(f"[{cell}]" for cell in row) for row in rows]
    columns = ", ".join(widths)
    body = ", ".join(others)
    return f"#table(columns: ({columns}), table.header({head}), {body})\n\n"


def format_json(value: object) -> str:
    """A value as indented JSON."""
    return format_code(json.dumps(value, indent=2), "json")


def format_code(text: str, language: str = "") -> str:
    """A block of code, with colours if a language is given."""
    lang = quote(language) if language else "none"
    code = text.strip("\n")
    return f"#raw({quote(code)}, lang: {lang}, block: true)\n\n"


def draw_diagram(source: str) -> str:
    """A diagram in Mermaid as an image, in the fonts and colours of guide.typ."""
    svg = mermaid_render.convert(source, theme="neutral").decode()
    svg = re.sub("font:16px sans-serif;|;font-family:Noto Sans", "", svg)
    svg = re.sub("#F3F3F3|#E6E6E6", "#EDF2F7", svg)
    svg = svg.replace("#888888", "#7C8FA3")
    svg = svg.replace("<svg ", "<svg font-family='IBM Plex Sans' font-size='16' ", 1)
    found = re.search(' width="([0-9.]+)"', svg)
    assert found, "a diagram has no width"
    width = POINTS_PER_PIXEL * float(found[1])
    texts = re.findall("<text.*?</text>", svg)
    words = "; ".join(re.sub("<[^>]*>", " ", text).strip() for text in texts)
    description = quote(html.unescape(words))
    size = f"width: calc.min(174mm, {width:.1f}pt)"
    return f"#image(bytes({quote(svg)}), {size}, alt: {description})"


if __name__ == "__main__":
    main(sys.argv[1:])
