"""Print the built book: ``make pdf``.

The browser puts the pages one after the other into a single document, so that page numbers run on
and links between chapters lead within the file, and prints that.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from browser import CHAPTERS, HTML, launch, serve
from playwright.sync_api import Page
from pypdf import PdfWriter
from pypdf.generic import DictionaryObject, NameObject, TextStringObject

_ASSEMBLE = Path(__file__).with_suffix(".js").read_text()
_FOOTER = """<div style="width:100%;text-align:center;font-size:8pt;color:#555">
<span class="pageNumber"></span></div>"""


def assemble(page: Page, address: str) -> list[str]:
    """Make one document of the book's pages.

    Args:
        page: a fresh page of the browser; it holds the document afterwards.
        address: where the book is served.

    Returns:
        The document's headings.
    """
    page.emulate_media(media="print", color_scheme="light")
    # A page with mathematics brings MathJax along.
    page.goto(f"{address}book/notation.html")
    page.wait_for_load_state("networkidle")
    page.add_script_tag(url=f"{address}_static/plotly.min.js")
    return page.evaluate(_ASSEMBLE, CHAPTERS)


def name_bookmarks(path: Path, headings: Sequence[str]) -> None:
    """Name each bookmark as its heading; Chromium runs a heading's lines together.

    Args:
        path: the file; it is changed.
        headings: one a bookmark, in their order.
    """
    writer = PdfWriter(clone_from=path)
    bookmarks = _below(writer.root_object["/Outlines"])
    for bookmark, heading in zip(bookmarks, headings, strict=True):
        bookmark[NameObject("/Title")] = TextStringObject(heading)
    writer.write(path)


def _below(bookmark: DictionaryObject) -> Iterator[DictionaryObject]:
    child = bookmark.get("/First")
    while child is not None:
        yield child.get_object()
        yield from _below(child.get_object())
        child = child.get_object().get("/Next")


def print_book(path: Path) -> None:
    """Write the book as one PDF with bookmarks.

    Args:
        path: the file.
    """
    with serve() as address, launch() as browser:
        page = browser.new_page(viewport={"width": 774, "height": 900})
        headings = assemble(page, address)
        page.pdf(
            path=path,
            format="A4",
            scale=0.85,
            margin=dict.fromkeys(("top", "bottom", "left", "right"), "18mm"),
            print_background=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=_FOOTER,
            outline=True,
            tagged=True,
        )
    name_bookmarks(path, headings)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HTML / "crcbook.pdf"
    print_book(target)
    print(f"Printed the book to {target}")
