"""The guide holds what it promises, and a piece that is missing ends it with the name of the piece."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typst
from pypdf import PdfReader

from lab import database, guide, process

PARTS = ("What it does", "Architecture", "Database", "The query", "API flow", "Code", "Deployment", "Running it")
PARTS += ("When something is wrong",)
README = process.ROOT.joinpath("README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def runs() -> guide.Pieces:
    return guide.from_runs()


@pytest.fixture(scope="module")
def pdf(runs: guide.Pieces) -> bytes:
    return guide.typeset(guide.from_files(process.ROOT, runs))


@pytest.fixture(scope="module")
def reader(pdf: bytes) -> PdfReader:
    return PdfReader(io.BytesIO(pdf))


def without_spaces(text: str) -> str:
    """Lines and gaps are the page's, not the text's."""
    return re.sub(r"\s", "", text)


def test_it_is_at_most_ten_a4_pages_with_its_parts_in_their_order_in_the_contents_of_the_file(reader: Any) -> None:
    sizes = {tuple(round(float(side)) for side in page.mediabox[2:]) for page in reader.pages}
    assert (sizes, len(reader.pages) <= 10) == ({(595, 842)}, True)
    parts = [entry for entry in reader.outline if not isinstance(entry, list)]
    assert [entry.title for entry in parts] == [f"{number} {part}" for number, part in enumerate(PARTS, 1)]
    links = [link.get_object()["/Dest"].get_object() for page in reader.pages for link in page.get("/Annots", [])]
    headings = [(reader.get_destination_page_number(entry), round(float(entry["/Top"]))) for entry in parts]
    assert [(reader.get_page_number(page.get_object()), round(float(top))) for page, _, _, top, _ in links] == headings


def test_it_is_tagged_and_has_title_and_language(reader: Any) -> None:
    root, title = reader.root_object, README.split("\n")[0].removeprefix("# ") + ": the guide"
    assert (root["/MarkInfo"]["/Marked"], root["/Lang"], reader.metadata.title) == (True, "en-GB", title)
    assert "<pdfuaid:part>1</pdfuaid:part>" in root["/Metadata"].get_data().decode()


def test_it_holds_what_its_sources_hold_and_the_runs_printed(reader: PdfReader) -> None:
    modules = ["SUCCESS, NOT_ALL, ", "def user_payload(", "def event_payload(", "def interpret(", "def interpret_bulk("]
    queries = ["WITH recent_views AS (", "ORDER BY user_id;", "page, event_time, user_id, browser, location"]
    printed = ["Successfully processed user: sarah.johnson@email.com", "$ .venv/bin/python main.py --check ✓"]
    printed += ['"eventName": "page_view", "id": "page-view-37"', '"record": 1, "user_id": 2, "email": "sarah.johnson']
    expected = [*modules, *queries, *printed, *re.findall("^## (.+)$", README, re.MULTILINE)]
    text = without_spaces("".join(page.extract_text() for page in reader.pages))
    assert [passage for passage in expected if without_spaces(passage) not in text] == []


def test_it_is_byte_for_byte_the_same_from_the_same_runs(pdf: bytes, runs: guide.Pieces) -> None:
    assert guide.typeset(guide.from_files(process.ROOT, runs)) == pdf


@pytest.mark.parametrize(
    ("file", "old", "new", "name"),
    [
        ("README.md", "\n## Settings\n", "\n## Configuration\n", "section 'Settings' in README.md"),
        ("README.md", "\nflowchart LR\n", "\ngraph LR\n", "section with a flowchart 'How it behaves' in README.md"),
        ("iterable_client.py", "def interpret_bulk(", "def read_bulk(", "interpret_bulk in the modules"),
        ("phase2_queries.sql", "-- name: query_2", "-- name: query_two", "query_2 in phase2_queries.sql"),
    ],
)
def test_a_missing_piece_ends_it_with_its_name(
    file: str, old: str, new: str, name: str, runs: guide.Pieces, tmp_path: Path
) -> None:
    for source in ("README.md", database.QUERIES.name, *guide.MODULES):
        shutil.copy(process.ROOT / source, tmp_path)
    whole = (tmp_path / file).read_text("utf-8")
    assert whole.count(old) == 1
    (tmp_path / file).write_text(whole.replace(old, new), "utf-8")
    with pytest.raises(typst.TypstError, match=f"there is no {name}"):
        guide.typeset(guide.from_files(tmp_path, runs))
