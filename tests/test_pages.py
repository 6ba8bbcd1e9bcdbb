"""Each page of the built book in a browser whose every request beyond this machine fails a test."""

import functools
import http.server
import re
import threading
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(chapter["file"] for chapter in TOC["chapters"])]
EXPLORERS = ["book/index", "book/decision_boundaries"]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    """The built book, served on localhost."""
    if not (ROOT / "_build" / ".built").exists():
        pytest.fail("the book is not built: make book")
    handler = functools.partial(QuietHandler, directory=HTML)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


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


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_whole_without_a_network(open_page, name):
    page = open_page(name)
    assert page.locator("article h1").count() == 1
    formulas = page.locator(".math")
    assert formulas.count() == page.locator(".math mjx-container").count()
    assert page.locator("mjx-merror").count() == 0
    broken = "() => [...document.images].filter(image => !image.naturalWidth).map(i => i.src)"
    assert page.evaluate(broken) == []
    for figure in page.locator(".js-plotly-plot").all():
        assert figure.locator(".main-svg").first.bounding_box()["height"] > 100


def test_a_chapter_typesets_mathematics(open_page):
    assert open_page("book/decision_boundaries").locator(".math mjx-container").count() > 20


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_fits_a_telephone(open_page, name, theme):
    page = open_page(name, width=400, theme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert text_contrast(page, "article h1") > 7


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
    box = page.locator(".crc-plot svg").first.bounding_box()
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
    page.locator(".crc-explorer select").first.select_option(index=2)
    assert radius(page) != before[0]
    assert picture.get_attribute("href") != before[1]


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
    dual, shown = radius(page), texts.all_inner_texts()
    explorer.locator("select").last.select_option("Lipschitz")
    assert f"Lipschitz {radius(page)}" in shown
    assert f"dual {dual}" in texts.all_inner_texts()


def test_the_fields_of_a_page_stay_below_two_megabytes(open_page):
    for name in EXPLORERS:
        fields = open_page(name).locator(".crc-explorer script[type='application/json']")
        assert 0 < sum(len(field.text_content()) for field in fields.all()) < 2_000_000


def test_the_explorer_is_readable_in_either_theme(open_page):
    for theme in ("light", "dark"):
        page = open_page("book/index", theme=theme)
        for selector in (".crc-radius output", ".crc-verdict", ".crc-plot svg text"):
            assert text_contrast(page, selector) > 7


def test_plotly_is_loaded_only_where_it_draws(open_page):
    for name in PAGES:
        page = open_page(name)
        draws = page.locator(".js-plotly-plot").count() > 0
        assert page.evaluate("typeof Plotly !== 'undefined'") == draws
