"""Draw the book's pictures from its own pages: ``make pictures``.

``book/explorer.png`` and ``book/draw.png`` are in the README, the latter is also what is printed of
the page to draw on; ``book/social.png`` is what a link to the book shows.
"""

import base64

from browser import CONFIG, ROOT, launch, serve
from playwright.sync_api import Page

_CARD = """
<body style="margin:0;width:1200px;height:630px;background:#fff;display:flex;
  align-items:center;font-family:'DejaVu Sans',sans-serif;color:#222832">
  <div style="width:500px;padding-left:60px">
    <h1 style="font-size:60px;line-height:1.2;margin:0">{title}</h1>
    <p style="font-size:27px;line-height:1.45">A book with live figures,<br>
      and the package it runs on</p>
  </div>
  <img style="width:600px;margin-left:20px"
    src="data:image/png;base64,{plot}">
</body>"""


def picture_sheet(page: Page, address: str) -> None:
    """Draw ``book/draw.png``: a digit, its certificate and an attack that fails.

    Args:
        page: a page of the browser.
        address: where the book is served.
    """
    page.goto(f"{address}book/draw_a_digit.html")
    page.wait_for_selector(".crc-draw[data-state=settled]")
    page.locator(".crc-draw").screenshot(path=ROOT / "book" / "draw.png")


def main() -> None:
    """Draw the pictures."""
    with serve() as address, launch() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 900}, device_scale_factor=2)
        picture_sheet(page, address)
        page.goto(f"{address}book/decision_boundaries.html")
        page.wait_for_load_state("networkidle")
        explorer = page.locator(".crc-explorer").first
        # As wide as no column of a page is, so that the plot is no smaller than its panel.
        explorer.evaluate("e => { document.body.replaceChildren(e); e.style.width = '58rem' }")
        explorer.get_by_role("button", name="exact").click()
        explorer.screenshot(path=ROOT / "book" / "explorer.png")
        plot = explorer.locator(".crc-plot > svg").screenshot()
        card = browser.new_page(viewport={"width": 1200, "height": 630})
        card.set_content(
            _CARD.format(
                title=CONFIG["title"],
                plot=base64.b64encode(plot).decode(),
            )
        )
        card.screenshot(path=ROOT / "book" / "social.png")


if __name__ == "__main__":
    main()
