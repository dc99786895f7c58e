"""The guide holds what it must, and a missing piece ends its build with its name."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typst
from pypdf import PdfReader
from pypdf.generic import Destination

from lab import database, guide, process

PARTS = [
    "1 What it does",
    "2 Architecture",
    "3 Database",
    "4 The query",
    "5 API flow",
    "6 Code",
    "7 Deployment",
    "8 Running it",
    "9 When something is wrong",
]
MOST_PAGES = 14
A4 = (595, 842)  # points
README = process.ROOT.joinpath("README.md").read_text("utf-8")
CODE = [
    "class ExitCode(",
    "def make_user_payload(",
    "def make_event_payload(",
    "def interpret(",
    "def interpret_group(",
]
QUERIES = [
    "WITH recent_views AS (",
    "ORDER BY customers.id;",
    "page, event_time, user_id, browser, location",
]
PRINTED = [
    "Successfully processed user: sarah.johnson@email.com",
    "$ .venv/bin/python main.py --check ✓",
    '"eventName": "page_view", "id": "page-view-37"',
    '"record": 1, "user_id": 2, "email": "sarah.johnson',
]


@pytest.fixture(scope="module")
def runs() -> guide.Pieces:
    """The pieces that come from runs."""
    return guide.make_runs()


@pytest.fixture(scope="module")
def pdf(runs: guide.Pieces) -> bytes:
    """The guide."""
    return guide.typeset(guide.collect_pieces(process.ROOT, runs))


@pytest.fixture(scope="module")
def reader(pdf: bytes) -> PdfReader:
    """The guide, to be read."""
    return PdfReader(io.BytesIO(pdf))


def remove_spaces(text: str) -> str:
    """Lines and gaps are the page's, not the text's."""
    return re.sub(r"\s", "", text)


def list_parts(reader: PdfReader) -> list[Destination]:
    """The first level of the outline."""
    return [entry for entry in reader.outline if isinstance(entry, Destination)]


def list_links(reader: PdfReader) -> list[tuple[int | None, int]]:
    """Page number and height of what the links in the text lead to, in their order."""
    targets = []
    for page in reader.pages:
        for annotation in page.get("/Annots", []):
            target = annotation.get_object()["/Dest"].get_object()
            page_number = reader.get_page_number(target[0].get_object())
            targets.append((page_number, round(float(target[3]))))
    return targets


def test_pages_are_few_and_a4(reader: PdfReader) -> None:
    sizes = {
        (round(page.mediabox.width), round(page.mediabox.height))
        for page in reader.pages
    }

    assert sizes == {A4}
    assert len(reader.pages) <= MOST_PAGES


def test_parts_stand_in_the_outline(reader: PdfReader) -> None:
    assert [part.title for part in list_parts(reader)] == PARTS


def test_contents_lead_to_the_parts(reader: PdfReader) -> None:
    headings = [
        (reader.get_destination_page_number(part), round(part.top or 0))
        for part in list_parts(reader)
    ]

    assert list_links(reader) == headings


def test_it_is_accessible(reader: PdfReader) -> None:
    root: Any = reader.root_object
    title = README.split("\n")[0].removeprefix("# ")

    assert root["/MarkInfo"]["/Marked"]
    assert root["/Lang"] == "en-GB"
    assert reader.metadata
    assert reader.metadata.title == f"{title}: the guide"
    assert b"<pdfuaid:part>1</pdfuaid:part>" in root["/Metadata"].get_data()


def test_it_holds_its_sources_and_the_runs(reader: PdfReader) -> None:
    sections = re.findall("^## (.+)$", README, re.MULTILINE)
    text = remove_spaces("".join(page.extract_text() for page in reader.pages))

    passages = [*CODE, *QUERIES, *PRINTED, guide.FLOWCHART_CAPTION, *sections]
    assert [each for each in passages if remove_spaces(each) not in text] == []


def test_the_same_runs_give_the_same_bytes(pdf: bytes, runs: guide.Pieces) -> None:
    assert guide.typeset(guide.collect_pieces(process.ROOT, runs)) == pdf


def test_a_new_section_is_shown(runs: guide.Pieces) -> None:
    readme = f"{README}\n## Section of tomorrow\n\nIts only sentence.\n"
    pieces = guide.collect_pieces(process.ROOT, runs)
    pieces |= guide.collect_sections(readme, runs)

    reader = PdfReader(io.BytesIO(guide.typeset(pieces)))

    last_page = reader.pages[-1].extract_text()
    assert "Section of tomorrow" in last_page
    assert "Its only sentence." in last_page


@pytest.mark.parametrize(
    ("file", "old", "new", "name"),
    [
        (
            "README.md",
            "\n## Settings\n",
            "\n## Configuration\n",
            "section 'Settings' in README.md",
        ),
        (
            "iterable_client.py",
            "def interpret_group(",
            "def read_group(",
            "interpret_group in the modules",
        ),
        (
            "phase2_queries.sql",
            "-- name: query_2",
            "-- name: query_two",
            "query_2 in phase2_queries.sql",
        ),
    ],
)
def test_a_missing_piece_is_named(
    file: str, old: str, new: str, name: str, runs: guide.Pieces, tmp_path: Path
) -> None:
    for source in ("README.md", database.QUERIES.name, *guide.MODULES):
        shutil.copy(process.ROOT / source, tmp_path)
    path = tmp_path / file
    text = path.read_text("utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), "utf-8")

    with pytest.raises(typst.TypstError, match=f"there is no {name}"):
        guide.typeset(guide.collect_pieces(tmp_path, runs))
