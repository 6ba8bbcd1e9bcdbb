"""Each page of the built book in a browser whose every request beyond this machine fails a test."""

import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlparse

import browser as book
import pytest
from axe_playwright_python.sync_playwright import Axe

# Every page: the chapters, and what the builder adds, such as the search.
PAGES = sorted(
    path.relative_to(book.HTML).with_suffix("").as_posix()
    for path in book.HTML.rglob("*.html")
    if "_static" not in path.parts and path != book.HTML / "index.html"  # it only leads on
)
EXPLORERS = ["book/index", "book/decision_boundaries"]
SCREENS = [(theme, width) for theme in ("light", "dark") for width in (1300, 400)]

# Formulas within a line do not break and do not scroll: those that leave their paragraph.
CUT_OFF = """() => [...document.querySelectorAll("article mjx-container:not([display])")]
    .filter(formula => {
        const line = formula.closest("p, li, dd")?.getBoundingClientRect();
        return line?.width && formula.getBoundingClientRect().right > line.right + 2;
    }).map(formula => formula.textContent)"""

# Full stops and commas that a line begins with, after a formula or as the end of one, and brackets
# that it may end with, before a formula; what is folded away has no lines.
STRAY = """() => [...document.querySelectorAll("article span.math")].filter(formula => {
    const next = formula.nextSibling, range = document.createRange();
    const end = formula.querySelector("mjx-math > mjx-mtext:last-child");
    if (/\\($/.test(formula.previousSibling?.data)) return true;
    if (/^[.,;:!?)]/.test(next?.data)) {
        range.setStart(next, 0);
        range.setEnd(next, 1);
    } else if (end) range.selectNode(end);
    else return false;
    const line = formula.closest("p, li, dd")?.getBoundingClientRect();
    return line?.width && range.getBoundingClientRect().left < line.left + 2;
}).map(formula => formula.textContent)"""


def test_every_chapter_has_its_page():
    assert set(book.CHAPTERS) | {"search", "404"} <= set(PAGES)


@pytest.fixture(scope="module")
def address():
    """The built book, served on localhost."""
    with book.serve() as address:
        yield address


@pytest.fixture
def open_page(browser, address):
    """Open a page of the book; afterwards, nothing may have failed or left this machine."""
    complaints, contexts = [], []

    def open_page(name, width=1300, theme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, has_touch=width < 500
        )
        contexts.append(context)
        page = context.new_page()
        page.route(lambda url: not url.startswith((address, "data:")), refuse)
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("console", lambda line: line.type == "error" and complaints.append(line.text))
        page.goto(f"{address}{name}.html")
        page.wait_for_load_state("networkidle")
        return page

    def refuse(route):
        complaints.append(f"request to {route.request.url}")
        route.abort()

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def violations(page, *rules):
    """What axe finds: broken rules, each with the elements that break it."""
    options = {"runOnly": rules, "resultTypes": ["violations"], "preload": False}
    found = Axe().run(page, options=options).response["violations"]
    return {rule["id"]: [node["target"] for node in rule["nodes"]] for rule in found}


def radius(page):
    return page.locator(".crc-radius output").first.inner_text()


def text_contrast(page, selector):
    """The contrast ratio (WCAG 2) of an element's text against what lies behind it."""
    colours = page.evaluate(
        """selector => {
            const element = document.querySelector(selector);
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)")
                behind = behind.parentElement;
            return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        }""",
        selector,
    )
    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("theme", "width"), SCREENS, ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_whole_without_a_network(open_page, name, theme, width):
    page = open_page(name, width, theme)
    assert page.locator("h1:visible").count() == 1
    formulas = page.locator(".math")
    assert formulas.count() == page.locator(".math mjx-container").count()
    assert page.locator("mjx-merror").count() == 0
    broken = "() => [...document.images].filter(image => !image.naturalWidth).map(i => i.src)"
    assert page.evaluate(broken) == []
    for figure in page.locator(".js-plotly-plot").all():
        assert figure.locator(".main-svg").first.bounding_box()["height"] > 100
    draws = page.locator(".js-plotly-plot").count() > 0
    assert page.evaluate("typeof Plotly !== 'undefined'") == draws  # 4 MB, only where needed
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(STRAY) == []
    assert page.evaluate("document.documentElement.dataset.theme") == theme


@pytest.mark.parametrize("path", sorted(book.ROOT.glob("book/*.ipynb")), ids=lambda path: path.stem)
def test_a_page_prints_what_its_notebook_keeps(open_page, path):
    cells = json.loads(path.read_text())["cells"]
    kept = [output for cell in cells for output in cell.get("outputs", [])]
    texts = ["".join(o["text"] if "text" in o else o["data"]["text/plain"]) for o in kept]
    page = open_page(f"book/{path.stem}")
    shown = [text.strip() for text in page.locator(".cell_output pre").all_text_contents()]
    assert [text for text in texts if text.strip() not in shown] == []


# Each theme and each width once; axe takes seconds on a long page.
@pytest.mark.parametrize(("theme", "width"), [("light", 1300), ("dark", 400)], ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_contrast_and_names(open_page, name, theme, width):
    page = open_page(name, width, theme)
    assert violations(page, "wcag2a", "wcag2aa") == {}


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_and_moves_every_slider(open_page, name):
    page = open_page(name)
    sliders = page.locator("input[type=range]")
    page.evaluate("document.querySelectorAll('input[type=range]').forEach((s, i) => s.place = i)")
    reached = set()
    for _ in range(page.locator("a, button, input, select, summary, [tabindex]").count()):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.toggle-hidden .toggle-button')"):
            page.keyboard.press("Enter")  # an answer is folded
        place = page.evaluate("document.activeElement.place ?? -1")
        if place < 0 or place in reached:
            continue
        reached.add(place)
        figure = page.locator("figure, .crc-explorer").filter(has=page.locator(":focus")).last
        before = sliders.nth(place).get_attribute("aria-valuetext"), figure.inner_html()
        page.keyboard.press("ArrowRight")
        after = sliders.nth(place).get_attribute("aria-valuetext"), figure.inner_html()
        assert before[0] != after[0] and before[1] != after[1]
    assert reached == set(range(sliders.count()))


def test_a_chapter_typesets_mathematics(open_page):
    assert open_page("book/decision_boundaries").locator(".math mjx-container").count() > 20


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_light_beside_what_all_pages_share(name):
    """Everything a page brings along itself is inside its file: data, drawings, no pictures."""
    text = (book.HTML / f"{name}.html").read_text()
    pictures = set(re.findall(r'src="([^"]*_images/[^"]+)"', text))
    weights = [(book.HTML / name).parent.joinpath(picture).stat().st_size for picture in pictures]
    assert len(text.encode()) + sum(weights) < 2e6


class Links(HTMLParser):
    """Where a page leads to, and the names of its parts."""

    def __init__(self, text):
        super().__init__()
        self.links, self.parts = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.parts.add(attributes.get("id"))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])


def test_every_link_inside_the_book_leads_somewhere():
    pages = {f"{book.PREFIX}{name}.html": Links((book.HTML / f"{name}.html").read_text())
             for name in PAGES}  # fmt: skip
    for path, page in pages.items():
        for link in page.links:
            target = urlparse(urljoin(f"book:{path}", link))
            if target.scheme != "book" or not link.strip("#"):
                continue
            file = book.HTML / target.path.removeprefix(book.PREFIX)
            assert file.is_file(), f"{path} leads to {link}"
            part = unquote(target.fragment)
            if part and target.path in pages:
                assert part in pages[target.path].parts, f"{path} leads to {link}"


def test_every_chapter_is_found_and_previewed():
    sitemap = (book.HTML / "sitemap.xml").read_text()
    base = book.CONFIG["html"]["baseurl"]
    titles, descriptions = set(), set()
    for name in book.CHAPTERS:
        assert f"<loc>{base}{name}.html</loc>" in sitemap
        text = (book.HTML / f"{name}.html").read_text()
        meta = dict(re.findall(r'<meta (?:name|property)="([^"]+)" content="([^"]*)"', text))
        titles.add(meta["og:title"])
        descriptions.add(meta["description"])
        assert f"<title>{meta['og:title']}" in text
        assert meta["og:description"] == meta["description"]
        assert meta["og:url"] == f"{base}{name}.html"
        picture = meta["og:image"].removeprefix(base)
        assert (book.HTML / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(titles) == len(descriptions) == len(book.CHAPTERS)
    assert all(30 < len(text) <= 300 for text in descriptions)


def test_a_wrong_address_leads_back(open_page):
    page = open_page("404")
    page.locator("article a, main a").filter(has_text="beginning").click()
    page.wait_for_load_state("networkidle")
    assert page.locator("h1:visible").inner_text().startswith(book.CONFIG["title"])


@pytest.mark.parametrize("name", EXPLORERS)
def test_the_explorer_draws_its_field(open_page, name):
    page = open_page(name)
    plot = page.locator(".crc-plot svg").first
    assert plot.bounding_box()["height"] > 150
    assert plot.locator("image").get_attribute("href").startswith("data:image/png")
    assert float(plot.locator(".crc-ball").get_attribute("r")) > 5


@pytest.mark.parametrize("axis", [0, 1])
def test_a_slider_moves_the_point_by_keyboard(open_page, axis):
    page = open_page("book/index")
    ball, before = page.locator(".crc-ball").first, radius(page)
    place = ball.get_attribute(("cx", "cy")[axis])
    page.locator(".crc-explorer input").nth(axis).focus()
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    assert radius(page) != before
    assert ball.get_attribute(("cx", "cy")[axis]) != place


def test_the_pointer_moves_the_point_and_its_ball(open_page):
    page = open_page("book/index")
    plot = page.locator(".crc-plot svg").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    seen = set()
    for part in (0.3, 0.45, 0.6, 0.75):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + 0.4 * box["height"])
        ball = page.locator(".crc-ball").first.get_attribute("r")
        seen.add((radius(page), ball, page.locator(".crc-verdict").first.inner_text()))
    assert len({text for text, _, _ in seen}) == len({ball for _, ball, _ in seen}) == 4


def test_a_tap_moves_the_point(open_page):
    page = open_page("book/index", width=400)
    before = radius(page)
    page.locator(".crc-plot svg").first.tap(position={"x": 300, "y": 40})
    assert radius(page) != before


def test_choosing_a_network_changes_the_field(open_page):
    page = open_page("book/decision_boundaries")
    picture = page.locator(".crc-plot image").first
    before = radius(page), picture.get_attribute("href")
    page.locator(".crc-explorer select").first.select_option(index=1)
    assert radius(page) != before[0]
    assert picture.get_attribute("href") != before[1]


def test_a_button_leads_to_its_point_and_network(open_page):
    page = open_page("book/decision_boundaries")
    explorer = page.locator(".crc-explorer").first
    verdict, seen = explorer.locator(".crc-verdict"), {radius(page)}
    assert "lies between" in verdict.inner_text()  # it starts in the bay, where a gap is
    explorer.get_by_role("button", name="exact").click()
    assert "The radius is exact" in verdict.inner_text()
    seen.add(radius(page))
    explorer.get_by_role("button", name="tanh").click()
    assert explorer.locator("select").nth(1).input_value() == "tanh"
    assert len(seen | {radius(page)}) == 3


def test_the_rivals_follow_the_point(open_page):
    page = open_page("book/decision_boundaries")
    explorer = page.locator(".crc-explorer").first
    rings, texts = explorer.locator(".crc-rival"), explorer.locator(".crc-rivals li")
    assert rings.count() == texts.count() == 2
    before = rings.first.get_attribute("r"), texts.all_inner_texts()
    explorer.locator("input").first.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    assert rings.first.get_attribute("r") != before[0] and texts.all_inner_texts() != before[1]
    # A chosen rival changes places with the certificate: no radius is lost.
    best, shown = radius(page), texts.all_inner_texts()
    explorer.locator("select").last.select_option("Lipschitz")
    assert f"Lipschitz {radius(page)}" in shown
    assert f"best c {best}" in texts.all_inner_texts()


def test_the_explorer_is_readable_in_either_theme(open_page):
    for theme in ("light", "dark"):
        page = open_page("book/index", theme=theme)
        for selector in (".crc-radius output", ".crc-verdict", ".crc-plot svg text"):
            assert text_contrast(page, selector) > 7
