"""The guide: the project on paper, as a PDF. Every fact in it comes from its one home, or from a run made for it.

guide.typ is the document, and asks for its pieces by name. A piece that is not to be had ends the build with its name.
"""

from __future__ import annotations

import ast
import html
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fontpkg_ibm_plex_mono
import fontpkg_ibm_plex_sans
import mermaid_render
import typst
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from lab import database, process, standin_handle

FILE = "iterable_integration_guide.pdf"
DOCUMENT = Path(__file__).with_suffix(".typ")
FONTS = [package.ROOT / "files" for package in (fontpkg_ibm_plex_sans, fontpkg_ibm_plex_mono)]
MODULES = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py")
LANGUAGES = {"": "bash", "Set it up": "bash", "Results": "json", "Your own tables": "sql"}  # of plain code blocks

SINGLY = """%%{init: {"sequence": {"mirrorActors": false}}}%%
sequenceDiagram
    participant M as main.py
    participant I as Iterable
    M->>I: POST users/update
    I-->>M: 200, code Success
    M->>I: POST events/track
    I-->>M: 200, code Success
    alt instead, to either call: 429
        I-->>M: 429, perhaps with Retry-After
        Note over M,I: all calls of the endpoint pause, its rate falls, then this call again
    else 408, 500, 502, 503, 504 or no answer
        I--xM: nothing that can be used
        Note over M,I: a wait that doubles, then this call again, until its tries are used up
    else 400
        I-->>M: 400 InvalidEmailAddressError
        Note over M,I: final: this call failed. The other call is made all the same
    else a 200 that refuses
        I-->>M: 200, but its text says that tracking is disallowed
        Note over M,I: final: this call failed, whatever the status says
    else 401 or 403
        I-->>M: 401 BadApiKey
        Note over M,I: nothing more is sent to anyone, the run is given up
    end
"""
IN_BULK = """%%{init: {"sequence": {"mirrorActors": false}}}%%
sequenceDiagram
    participant M as main.py
    participant I as Iterable
    M->>I: POST users/bulkUpdate, a group of users
    alt a 200 whose numbers add up
        I-->>M: 200, with the addresses that were not taken
        Note over M,I: who is not named was told
        M->>I: POST events/trackBulk, for those
        I-->>M: 200, read in the same way
    else 400, 413, no answer after all tries, or numbers that do not add up
        I-->>M: 400
        Note over M,I: it tells nothing about anybody
    end
    loop each user without a verdict
        M->>I: POST users/update, POST events/track: what bulk did not confirm
        I-->>M: the same status and reason as in a run without bulk
    end
"""
LOOK = {  # the diagrams in the guide's typeface and colours
    "<svg ": "<svg font-family='IBM Plex Sans' font-size='16' ",
    "font:16px sans-serif;": "",
    ";font-family:Noto Sans": "",
    "#F3F3F3": "#EDF2F7",
    "#E6E6E6": "#EDF2F7",
    "#888888": "#7C8FA3",
}

Rows = Callable[[str], list[dict[str, Any]]]
Pieces = dict[str, str]  # in Typst, by name


def main() -> int:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else process.ROOT / FILE
    return write(file, process.ROOT, from_runs())


def write(file: Path, root: Path, runs: Pieces) -> int:
    """The guide of what is in `root`. Where a piece is missing, no file is written, and the exit code is 1."""
    try:
        file.write_bytes(typeset(from_files(root, runs)))
    except typst.TypstError as error:
        print(f"No guide was written: {error}", file=sys.stderr)
        return 1
    print(f"The guide: {file}")
    return 0


def typeset(pieces: Pieces) -> bytes:
    """The PDF, tagged as PDF/UA-1 asks for, which the compiler checks. Raises TypstError."""
    source = f"#let pieces = ({', '.join(f'{quote(name)}: [{piece}]' for name, piece in pieces.items())})\n"
    return typst.compile(
        (source + DOCUMENT.read_text("utf-8")).encode(),
        font_paths=FONTS,
        ignore_system_fonts=True,
        pdf_standards=["ua-1"],
    )


def from_runs() -> Pieces:
    """What the program and the database say: a private server with the sample, and a stand-in for Iterable."""
    with (
        tempfile.TemporaryDirectory(prefix="guide-") as folder,
        database.DatabaseServer(next(iter(database.find_servers().values()))) as server,
        standin_handle.StandIn(key=process.KEY) as iterable,
    ):
        server.load(database.SETUP)
        settings = process.settings_for(server.create_reader(), iterable.url, Path(folder))
        fixed = {folder: "/srv/iterable", f":{iterable.port}": ":8080", f":{server.port}": ":3306"}

        def run(*arguments: str) -> process.Ended:
            ended = process.run(*arguments, settings=settings, folder=Path(folder))
            if ended.exit_code:
                sys.exit(
                    f"No guide was written: main.py {' '.join(arguments)} has failed:\n{ended.console}{ended.errors}"
                )
            ended.console = re.sub("|".join(map(re.escape, fixed)), lambda found: fixed[found[0]], ended.console)
            return ended

        def rows(sql: str) -> list[dict[str, Any]]:
            with server.connect(database.DATABASE) as connection, connection.cursor(dictionary=True) as cursor:
                cursor.execute(sql)
                return list(cursor.fetchall())

        payloads = re.findall(r'(\{"email": .*\})$', run("--dry-run").console, re.MULTILINE)
        check, sent = run("--check"), run()
        users = rows(dict(named_queries(database.QUERIES))["query_2"][1])
        first = min(sent.results["results"], key=lambda line: line["record"])
        fields = [f"  {quote(key)}: {quote(value)}" for key, value in first.items()]
        result = ",\n".join(
            textwrap.fill(field, 96, subsequent_indent="    ", break_on_hyphens=False) for field in fields
        )
        return {
            "server": plain(f"{server.kind.replace('mariadb', 'MariaDB').replace('mysql', 'MySQL')} {server.version}"),
            "users whom Query 2 finds": table(
                [map(plain, row) for row in (users[0], *(user.values() for user in users))]
            ),
            "diagram of the tables": diagram(entities(rows)),
            **indexes(rows),
            **{
                f"payload of {endpoint}": listing(json.dumps(json.loads(payload), indent=2, ensure_ascii=False), "json")
                for endpoint, payload in zip(("users/update", "events/track"), payloads, strict=False)
            },
            "check": listing(f"$ .venv/bin/python main.py --check\n{check.console}"),
            "What a run prints": listing(sent.console),
            "Results": listing(f"{{\n{result}\n}}", "json"),
        }


def entities(rows: Rows) -> str:
    """The entity-relationship diagram, in Mermaid."""
    references = rows(
        "SELECT table_name AS name, column_name AS field, referenced_table_name AS parent"
        " FROM information_schema.key_column_usage"
        " WHERE table_schema = DATABASE() AND referenced_table_name IS NOT NULL"
    )
    lines = ["erDiagram", *('{parent} ||--o{{ {name} : "{field} is {parent}.id"'.format(**row) for row in references)]
    for name in tables(rows):
        lines.append(f"{name} {{")
        for column in rows(f"SHOW FULL COLUMNS FROM {name}"):
            foreign = any((row["name"], row["field"]) == (name, column["Field"]) for row in references)
            key = "FK" if foreign else {"PRI": "PK", "UNI": "UK"}.get(column["Key"], "")
            kind = re.sub(r"int\(\d+\)", "int", column["Type"])  # a width that limits nothing, and not all servers tell
            comment = column["Comment"].replace("<", "#lt;").replace(">", "#gt;").replace('"', "'")
            lines.append(f'{kind} {column["Field"]} {key} "{comment}"')
        lines.append("}")
    return "\n".join(lines)


def indexes(rows: Rows) -> Pieces:
    """The table of all of them, by the name of each."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in (row for name in tables(rows) for row in rows(f"SHOW INDEX FROM {name}")):
        kind = "primary key" if row["Key_name"] == "PRIMARY" else "index" if row["Non_unique"] else "unique"
        found.setdefault((row["Table"], row["Key_name"], kind), []).append(row["Column_name"])
    cells = [
        [code(name), code(index), code(", ".join(columns)), kind] for (name, index, kind), columns in found.items()
    ]
    whole = table([["table", "name", "columns", "kind"], *cells])
    return {f"index {index}": whole for _, index, _ in found}


def tables(rows: Rows) -> list[str]:
    return [name for row in rows("SHOW TABLES") for name in row.values()]


def from_files(root: Path, runs: Pieces) -> Pieces:
    """What README.md, the modules and the queries in `root` hold, with what the runs gave."""
    pieces = {**runs, "diagram of single calls": diagram(SINGLY), "diagram of bulk calls": diagram(IN_BULK)}
    for name in MODULES:
        source = (root / name).read_text("utf-8")
        if docstring := ast.get_docstring(ast.parse(source)):
            pieces[f"first line of {name}"] = markdown(docstring.split("\n")[0])
        pieces |= {f"{defined} in the modules": piece for defined, piece in definitions(source)}
    for name, (comment, sql) in named_queries(root / database.QUERIES.name):
        pieces |= {f"{name} in phase2_queries.sql": listing(sql, "sql"), f"comment of {name}": markdown(comment)}
    return pieces | sections((root / "README.md").read_text("utf-8"), runs)


def sections(readme: str, shown: Pieces) -> Pieces:
    """Title, top and sections of README.md. What a run has shown takes the place of the first code block."""
    top, *rest = re.split("^## (.+)\n", readme, flags=re.MULTILINE)
    title, _, top = top.removeprefix("# ").partition("\n")
    pieces = {"title": plain(title), "top of README.md": markdown(top, LANGUAGES[""])}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        kind, language = "section with a flowchart" if "\nflowchart" in text else "section", LANGUAGES.get(name, "")
        piece = markdown(text, language)
        if name in shown and len(around := re.split(r"(?ms)^```\w*$.*?^```$", text, maxsplit=1)) == 2:
            kind, piece = "section with a code block", shown[name].join(markdown(part, language) for part in around)
        pieces[f"{kind} '{name}' in README.md"] = piece
    return pieces


def definitions(source: str) -> Iterator[tuple[str, str]]:
    """What a module defines at its top level, by the first name of each statement."""
    for node in ast.parse(source).body:
        text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
        yield getattr(node, "name", re.split(r"\W", text)[0]), listing(text, "python")


def named_queries(file: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Name, comment and statement of each."""
    pattern = r"^-- name: (\w+)\n((?:--[^\n]*\n)*)(.*?;)$"
    for name, comment, sql in re.findall(pattern, file.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        yield name, (re.sub("^-- ?", "", comment, flags=re.MULTILINE), sql)


def quote(value: object) -> str:
    """A value as JSON, which of a string is a string in Typst, too."""
    return json.dumps(value, ensure_ascii=False)


def plain(text: object) -> str:
    """Text in which no line ends between a number and its unit, or within a number."""
    return f"#{quote(re.sub(r'(?<=[0-9]) (?=[0-9]{3}|(ms|s|KB|MB)[^a-z]|%)', chr(160), str(text)))};"


def code(text: str) -> str:
    return f"#raw({quote(text)});"


def markdown(text: str, language: str = "") -> str:
    parser = MarkdownIt("commonmark", {"typographer": True}).enable(["table", "smartquotes"])
    return from_markdown(SyntaxTreeNode(parser.parse(text)), language)


def from_markdown(node: SyntaxTreeNode, language: str) -> str:
    inner = [from_markdown(child, language) for child in node.children]
    body = "".join(inner)
    match node.type:
        case "text":
            return plain(node.content)
        case "softbreak":
            return " "
        case "code_inline":
            return code(node.content)
        case "strong" | "em":
            return f"#{node.type.replace('em', 'emph')}[{body}]"
        case "link" if str(node.attrs["href"]).startswith("http"):
            return f"#link({quote(str(node.attrs['href']))})[{body}]"
        case "paragraph":
            return f"{body}\n\n"
        case "bullet_list" | "ordered_list":
            return f"#{'list' if node.type[0] == 'b' else 'enum'}({', '.join(f'[{item}]' for item in inner)})\n\n"
        case "heading":
            return f"{'=' * int(node.tag[1])} {body}\n\n"
        case "fence" if node.info == "mermaid":
            picture = diagram(re.sub("^flowchart LR", "flowchart TB", node.content))
            return f"#figure([{picture}], caption: [A run, from the rows to what it leaves])\n\n"
        case "fence":
            return listing(node.content, node.info or language)
        case "table":
            rows = [row for part in node.children for row in part.children]
            return table([[from_markdown(cell, "") for cell in row.children] for row in rows])
    return body


def table(rows: Iterable[Iterable[str]]) -> str:
    """Of cells in Typst, the first row of which is the head. Long columns share the width that short ones leave."""
    rows = [list(row) for row in rows]
    columns = [[re.sub(r'#(raw\()?"|"\)?;|#\w+\[', "", cell) for cell in column] for column in zip(*rows, strict=True)]
    numbers = all(re.fullmatch(r"[\d.,\s]+(%|s|MB)?", text) for column in columns for text in column[1:])
    longest = [max(map(len, column)) for column in columns]
    widths = ["1fr" if numbers else "auto" if length <= 40 else f"{min(length, 110)}fr" for length in longest]
    if set(widths) == {"auto"}:
        widths[-1] = "1fr"
    head, *others = [", ".join(f"[{cell}]" for cell in row) for row in rows]
    options = f"columns: ({', '.join(widths)}), align: {'right' if numbers else 'left'}"
    return f"#table({options}, table.header({head}), {', '.join(others)})\n\n"


def listing(text: str, language: str = "") -> str:
    return f"#raw({quote(text.strip(chr(10)))}, lang: {quote(language) if language else 'none'}, block: true)\n\n"


def diagram(source: str) -> str:
    svg = mermaid_render.convert(source, theme="neutral").decode()
    for old, new in LOOK.items():
        svg = svg.replace(old, new)
    width = 0.56 * float(svg.split(' width="')[1].split('"')[0])
    words = "; ".join(
        html.unescape(re.sub("<[^>]*>", " ", text)).strip() for text in re.findall("<text.*?</text>", svg)
    )
    return f"#image(bytes({quote(svg)}), width: calc.min(174mm, {width:.1f}pt), alt: {quote(words)})"


if __name__ == "__main__":
    sys.exit(main())
