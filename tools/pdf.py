"""Print the built book: ``make pdf``.

The browser puts the pages one after the other into a single document, so that page numbers run on
and links between chapters lead within the file, and prints that.
"""

import sys
from pathlib import Path

from browser import CHAPTERS, HTML, launch, serve
from playwright.sync_api import Page

_ASSEMBLE = Path(__file__).with_suffix(".js").read_text()
_FOOTER = """<div style="width:100%;text-align:center;font-size:8pt;color:#555">
<span class="pageNumber"></span></div>"""


def assemble(page: Page, address: str) -> None:
    """Make one document of the book's pages.

    Args:
        page: a fresh page of the browser; it holds the document afterwards.
        address: where the book is served.
    """
    page.emulate_media(media="print", color_scheme="light")
    # A page with mathematics brings MathJax along.
    page.goto(f"{address}book/notation.html")
    page.wait_for_load_state("networkidle")
    page.add_script_tag(url=f"{address}_static/plotly.min.js")
    page.evaluate(_ASSEMBLE, CHAPTERS)


def print_book(path: Path) -> None:
    """Write the book as one PDF with bookmarks.

    Args:
        path: the file.
    """
    with serve() as address, launch() as browser:
        page = browser.new_page(viewport={"width": 774, "height": 900})
        assemble(page, address)
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


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HTML / "crcbook.pdf"
    print_book(target)
    print(f"Printed the book to {target}")
