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
from collections.abc import Iterable
from pathlib import Path

import fontpkg_ibm_plex_mono
import fontpkg_ibm_plex_sans
import mermaid_render
import typst

from db_connection import Record, read_query
from lab import database, process, standin_handle

FONTS = [package.ROOT / "files" for package in (fontpkg_ibm_plex_sans, fontpkg_ibm_plex_mono)]
MODULES = ("main.py", "db_connection.py", "iterable_client.py", "logger_config.py")

SEQUENCE = """%%{init: {"sequence": {"mirrorActors": false}}}%%
sequenceDiagram
    participant M as main.py
    participant I as Iterable"""
SINGLY = f"""{SEQUENCE}
    M->>I: POST users/update
    I-->>M: 200, code Success
    M->>I: POST events/track
    I-->>M: 200, code Success
    alt instead, to either call: 429, perhaps with Retry-After
        Note over M,I: all calls of the endpoint pause, its rate falls, then this call again
    else 408, 500, 502, 503, 504 or no answer
        Note over M,I: a wait that doubles, then this call again, until its tries are used up
    else 400 InvalidEmailAddressError, or a 200 that says tracking is disallowed
        Note over M,I: final: this call failed. The other call is made all the same
    else 401 BadApiKey or 403
        Note over M,I: nothing more is sent to anyone, the run is given up
    end
"""
IN_BULK = f"""{SEQUENCE}
    M->>I: POST users/bulkUpdate, a group of users
    alt a 200 whose numbers add up, so who is not named was told
        I-->>M: 200, with the addresses that were not taken
        M->>I: POST events/trackBulk, for those
        I-->>M: 200, read in the same way
    else 400, 413, no answer after all tries, or numbers that do not add up
        Note over M,I: it tells nothing about anybody
    end
    loop each user without a verdict
        M->>I: POST users/update, POST events/track: what bulk did not confirm
        I-->>M: the same status and reason as in a run without bulk
    end
"""
COLUMNS = f"""
SELECT table_name, column_name, column_type, column_key, column_comment, referenced_table_name
FROM columns LEFT JOIN key_column_usage USING (table_schema, table_name, column_name)
WHERE table_schema = '{database.DATABASE}' ORDER BY table_name, columns.ordinal_position
"""
INDEXES = f"""
SELECT table_name, index_name, GROUP_CONCAT(column_name ORDER BY seq_in_index SEPARATOR ', '),
    IF(index_name = 'PRIMARY', 'primary key', IF(MIN(non_unique), 'index', 'unique'))
FROM statistics WHERE table_schema = '{database.DATABASE}'
GROUP BY table_name, index_name ORDER BY table_name, MIN(non_unique), index_name
"""
# Code blocks, tables and code in a line, which Typst writes in another way, and the text between them.
MARKDOWN = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^\|[^\n]*\n)+)|`([^`]+)`|([^`|]+)", re.MULTILINE | re.DOTALL)
quote = json.JSONEncoder(ensure_ascii=False).encode  # which of a string makes a string in Typst, too
Pieces = dict[str, str]  # in Typst, by name


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else process.ROOT / "iterable_integration_guide.pdf"
    try:
        file.write_bytes(typeset(from_files(process.ROOT, from_runs())))
    except typst.TypstError as error:
        sys.exit(f"No guide was written: {error}")
    print(f"The guide: {file}")


def typeset(pieces: Pieces) -> bytes:
    """The PDF, tagged as PDF/UA-1 asks for, which the compiler checks. Raises TypstError, also for a missing piece."""
    source = f"#let pieces = ({', '.join(f'{quote(name)}: [{piece}]' for name, piece in pieces.items())})\n"
    source += Path(__file__).with_suffix(".typ").read_text("utf-8")
    return typst.compile(source.encode(), font_paths=FONTS, ignore_system_fonts=True, pdf_standards=["ua-1"])


def from_runs() -> Pieces:
    """What the program and the database say: a private server with the sample, and a stand-in for Iterable."""
    with (
        tempfile.TemporaryDirectory(prefix="guide-") as folder,
        database.DatabaseServer(next(iter(database.find_servers().values()))) as server,
        standin_handle.StandIn(key=process.KEY) as iterable,
    ):
        server.load(database.SETUP)
        settings = process.settings_for(server.create_reader(), iterable.url, Path(folder))

        def run(*arguments: str) -> process.Ended:
            ended = process.run(*arguments, settings=settings, folder=Path(folder))
            assert ended.exit_code == 0, f"main.py {arguments} has failed:\n{ended.console}{ended.errors}"
            ended.console = ended.console.replace(folder, "/srv/iterable").replace(f":{iterable.port}", ":8080")
            return ended

        payloads, check, sent = run("--dry-run").users[1]["payloads"], run("--check").console, run()
        users = [Record._fields, *server.query(read_query(database.QUERIES, "query_2"))]
        indexes = [("table", "name", "columns", "kind"), *server.query(INDEXES, "information_schema")]
        return {
            "server": plain(f"{'MariaDB' if server.kind == 'mariadb' else 'MySQL'} {server.version}"),
            "users whom Query 2 finds": table(map(plain, row) for row in users),
            "diagram of the tables": diagram(entities(server)),
            "payload of users/update": listing(json.dumps(payloads["users_update"], indent=2), "json"),
            "payload of events/track": listing(json.dumps(payloads["events_track"], indent=2), "json"),
            "check": listing(f"$ .venv/bin/python main.py --check\n{check}"),
            "What a run prints": listing(sent.console),
            "Results": listing(quote(sent.users[1]), "json"),
            **{f"index {name}": table(map(plain, row) for row in indexes) for _, name, *_ in indexes[1:]},
        }


def entities(server: database.DatabaseServer) -> str:
    """The entity-relationship diagram, in Mermaid."""
    lines = ["erDiagram"]
    for name, column, kind, key, comment, parent in server.query(COLUMNS, "information_schema"):
        lines += [f'{parent} ||--o{{ {name} : "{column} is {parent}.id"'] if parent else []
        key = "FK" if parent else {"PRI": "PK", "UNI": "UK"}.get(key, "")
        kind = re.sub(r"int\(\d+\)", "int", kind)  # a width that limits nothing, and not all servers tell
        comment = comment.replace("<", "#lt;").replace(">", "#gt;").replace('"', "'")
        lines.append(f'{name} {{\n{kind} {column} {key} "{comment}"\n}}')
    return "\n".join(lines)


def from_files(root: Path, runs: Pieces) -> Pieces:
    """What README.md, the modules and the queries in `root` hold, with what the runs gave."""
    pieces = {**runs, "diagram of single calls": diagram(SINGLY), "diagram of bulk calls": diagram(IN_BULK)}
    for name in MODULES:
        source = (root / name).read_text("utf-8")
        pieces[f"first line of {name}"] = markup(source.split("\n")[0].strip('"'))
        for node in ast.parse(source).body:
            text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
            defined = getattr(node, "name", re.split(r"\W", text)[0])
            pieces[f"{defined} in the modules"] = listing(text, "python")
    queries = (root / database.QUERIES.name).read_text("utf-8")
    for name, comment, sql in re.findall(r"(?ms)^-- name: (\w+)\n((?:--[^\n]*\n)*)(.*?;)$", queries):
        pieces[f"{name} in phase2_queries.sql"] = listing(sql, "sql")
        pieces[f"comment of {name}"] = markup(re.sub("(?m)^-- ?", "", comment))
    top, *rest = re.split("(?m)^## (.+)\n", (root / "README.md").read_text("utf-8"))
    title, _, top = top.removeprefix("# ").partition("\n")
    pieces |= {"title": plain(title), "top of README.md": markup(top)}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        kind = "section with a flowchart" if "\nflowchart" in text else "section"
        if name in runs and (block := re.search(r"(?ms)^```$.*?^```$", text)):  # the run itself takes its place
            kind, text = "section with a code block", text.replace(block[0], "\0")
        pieces[f"{kind} '{name}' in README.md"] = markup(text).replace("\0", runs.get(name, ""))
    return pieces


def plain(text: object) -> str:
    """Text in which no line ends between a number and its unit, or within a number."""
    text = re.sub(r"(?<=[0-9]) (?=[0-9]{3}|(ms|s|KB|MB)[^a-z]|%)", chr(160), str(text))
    return re.sub(r"[\\#$@<>\[\]_~/=*]", r"\\\g<0>", text)


def markup(text: str) -> str:
    """Markdown in Typst, where paragraphs and lists look the same."""
    return MARKDOWN.sub(from_markdown, text)


def from_markdown(part: re.Match[str]) -> str:
    language, block, rows, in_line, text = part.groups()
    if rows:
        head, _, *others = [re.split(r" *\| *", line)[1:-1] for line in rows.splitlines()]
        return table(map(markup, row) for row in (head, *others))
    if language == "mermaid":
        picture = diagram(re.sub("^flowchart LR", "flowchart TB", block))
        return f"#figure([{picture}], caption: [A run, from the rows to what it leaves])\n\n"
    if block:
        return listing(block, language)
    return f"#raw({quote(' '.join(in_line.split()))});" if in_line else plain(text).replace(r"\*\*", "*")


def table(rows: Iterable[Iterable[str]]) -> str:
    """Of cells in Typst, the first row of which is the head. Long columns share the width that short ones leave."""
    cells = [list(row) for row in rows]
    longest = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths = ", ".join("1fr" if length > 50 else "auto" for length in longest[:-1])
    head, *others = [", ".join(f"[{each}]" for each in row) for row in cells]
    return f"#table(columns: ({widths}, 1fr), table.header({head}), {', '.join(others)})\n\n"


def listing(text: str, language: str = "") -> str:
    return f"#raw({quote(text.strip(chr(10)))}, lang: {quote(language) if language else 'none'}, block: true)\n\n"


def diagram(source: str) -> str:
    svg = mermaid_render.convert(source, theme="neutral").decode().replace("#888888", "#7C8FA3")
    svg = re.sub("#F3F3F3|#E6E6E6", "#EDF2F7", re.sub("font:16px sans-serif;|;font-family:Noto Sans", "", svg))
    svg = svg.replace("<svg ", "<svg font-family='IBM Plex Sans' font-size='16' ", 1)  # as in guide.typ
    width = 0.56 * float(svg.split(' width="')[1].split('"')[0])
    words = "; ".join(re.sub("<[^>]*>", " ", text).strip() for text in re.findall("<text.*?</text>", svg))
    return f"#image(bytes({quote(svg)}), width: calc.min(174mm, {width:.1f}pt), alt: {quote(html.unescape(words))})"


if __name__ == "__main__":
    main()
