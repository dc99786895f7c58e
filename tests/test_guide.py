"""The guide holds what it promises, and a piece that is missing ends it with the name of the piece."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfReader
from pypdf.generic import Destination

from lab import database, guide, process

PARTS = (
    "What it does",
    "Architecture",
    "Database",
    "The query",
    "API flow",
    "Code",
    "Deployment",
    "Running it",
    "When something is wrong",
)


@pytest.fixture(scope="module")
def runs() -> guide.Pieces:
    return guide.from_runs()


@pytest.fixture(scope="module")
def pdf(runs: guide.Pieces, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("guide") / "guide.pdf"
    assert guide.write(file, process.ROOT, runs) == 0
    return file.read_bytes()


@pytest.fixture(scope="module")
def reader(pdf: bytes) -> PdfReader:
    return PdfReader(io.BytesIO(pdf))


@pytest.fixture(scope="module")
def text(reader: PdfReader) -> str:
    return without_spaces("".join(page.extract_text() for page in reader.pages))


def without_spaces(text: str) -> str:
    """Lines and gaps are the page's, not the text's."""
    return re.sub(r"\s", "", text)


def test_it_is_at_most_ten_a4_pages(reader: PdfReader) -> None:
    sizes = {tuple(round(float(side)) for side in page.mediabox[2:]) for page in reader.pages}
    assert (sizes, len(reader.pages) <= 10) == ({(595, 842)}, True)


def test_its_parts_are_in_the_contents_of_the_file_in_their_order(reader: PdfReader) -> None:
    parts = [entry.title for entry in reader.outline if isinstance(entry, Destination)]
    assert parts == [f"{number} {part}" for number, part in enumerate(PARTS, 1)]


def test_each_link_leads_to_its_heading_or_to_a_page_over_https(reader: PdfReader) -> None:
    links: list[Any] = [link.get_object() for page in reader.pages for link in page.get("/Annots", [])]
    inside = [link["/Dest"].get_object() for link in links if "/Dest" in link]
    addresses = [str(link["/A"]["/URI"]) for link in links if "/Dest" not in link]
    headings = [
        (reader.get_destination_page_number(entry), round(float(entry["/Top"])))
        for entry in reader.outline
        if isinstance(entry, Destination)
    ]
    assert [(reader.get_page_number(target[0].get_object()), round(float(target[3]))) for target in inside] == headings
    assert [address for address in addresses if not address.startswith("https://")] == []


def test_it_is_tagged_and_has_title_and_language(reader: PdfReader) -> None:
    root: Any = reader.root_object
    assert reader.metadata is not None
    assert (root["/MarkInfo"]["/Marked"], root["/Lang"], reader.metadata.title) == (True, "en-GB", title_of_the_guide())
    assert "<pdfuaid:part>1</pdfuaid:part>" in root["/Metadata"].get_data().decode()


def title_of_the_guide() -> str:
    return process.ROOT.joinpath("README.md").read_text("utf-8").split("\n")[0].removeprefix("# ") + ": the guide"


@pytest.mark.parametrize(
    ("file", "passages"),
    [
        ("main.py", ["SUCCESS, NOT_ALL, "]),
        ("iterable_client.py", ["def user_payload(", "def event_payload(", "def interpret(", "def interpret_bulk("]),
        ("phase2_queries.sql", ["WITH recent_views AS (", "ORDER BY user_id;"]),
        ("README.md", [*re.findall("^## (.+)$", process.ROOT.joinpath("README.md").read_text("utf-8"), re.MULTILINE)]),
    ],
)
def test_it_holds_what_its_sources_hold(file: str, passages: list[str], text: str) -> None:
    source = (process.ROOT / file).read_text("utf-8")
    assert [passage for passage in passages if passage not in source] == []
    assert [passage for passage in passages if without_spaces(passage) not in text] == []


def test_it_holds_what_the_runs_printed(text: str) -> None:
    expected = [
        "Successfully processed user: sarah.johnson@email.com",
        "$ .venv/bin/python main.py --check ✓",
        '"eventName": "page_view", "id": "page-view-37"',
        '"record": 1, "user_id": 2, "email": "sarah.johnson@email.com"',
        "page, event_time, user_id, browser, location",
    ]
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
    file: str, old: str, new: str, name: str, runs: guide.Pieces, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in ("README.md", database.QUERIES.name, *guide.MODULES):
        shutil.copy(process.ROOT / source, tmp_path)
    whole = (tmp_path / file).read_text("utf-8")
    assert whole.count(old) == 1
    (tmp_path / file).write_text(whole.replace(old, new), "utf-8")
    assert guide.write(tmp_path / "guide.pdf", tmp_path, runs) == 1
    assert f"there is no {name}" in capsys.readouterr().err
    assert not (tmp_path / "guide.pdf").exists()
