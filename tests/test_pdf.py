"""The printed book: every chapter, bookmarks, answers unfolded, stills in the place of sliders."""

import os
import re

import browser as book
import pdf
import pytest
from pypdf import PdfReader


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    if book.CHROMIUM is None and not os.environ.get("CRCBOOK_REQUIRE_BROWSER"):
        pytest.skip("no Chromium found; on Debian: apt install chromium")
    path = tmp_path_factory.mktemp("pdf") / "book.pdf"
    pdf.print_book(path)
    return PdfReader(path)


@pytest.fixture(scope="module")
def text(reader):
    return "\n".join(page.extract_text() for page in reader.pages)


def test_every_chapter_has_a_bookmark_in_the_order_of_the_book(reader):
    assert reader.metadata.title == book.CONFIG["title"]
    chapters = [entry for entry in reader.outline if not isinstance(entry, list)]
    titles = []
    for name in book.CHAPTERS:
        text = (book.HTML / f"{name}.html").read_text()
        titles.append(re.search(r'property="og:title" content="([^"]+)"', text)[1])
    assert [entry.title for entry in chapters] == titles
    places = [reader.get_destination_page_number(entry) for entry in chapters]
    assert places == sorted(set(places)) and places[0] == 0


def test_links_between_chapters_lead_within_the_file(reader):
    inside, outside = 0, set()
    for page in reader.pages:
        for annotation in page.get("/Annots", []):
            action = annotation.get_object().get("/A", {})
            outside.add(action.get("/URI", ""))
            inside += "/Dest" in annotation.get_object()
    assert inside > 200
    assert not [address for address in outside if "127.0.0.1" in address]


def test_answers_are_unfolded_and_controls_are_gone(text):
    assert text.count("Solution to Exercise") > 20
    assert "Show code cell" not in text and "Click to show" not in text
    assert "certified radius" in text


def test_mathematics_is_typeset(text):
    assert "\\frac" not in text and "\\nabla" not in text
