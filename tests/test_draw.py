"""The page "Draw a digit": its JavaScript is held to what Python proves, and the page to its word.

The page is opened from disk, without a network, and the images are the book's own hundred digits.
"""

import base64
import json
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

import crcbook as crc
from crcbook.book.draw import NETWORK, SCRIPT, draw_page, network_script, read_digits
from crcbook.networks import read_network
from crcbook.proof.arithmetic import OUTWARD
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.rounding import MarginFacts

BOOK = Path(__file__).parents[1] / "book"
PAGE = '<!doctype html><html lang="en" data-content_root="./"><meta charset="utf-8">{}</html>'

# What the page answers for images: quickly, or as fully as once the pen rests, with the nearest
# adversary of the class that limits the radius and attacks that spend the whole radius.
ANSWER = """([images, quick]) => images.map((image) => {
    const { prover, pack } = crcTest, x0 = Float64Array.from(image), view = prover.look(x0);
    const radius = prover.raise(view, () => quick ? { steps: 6, gain: 1e-3 } : {});
    const rows = view.rows.sort((a, b) => a.radius - b.radius);
    const packed = (found) => found && { ...found, point: pack(found.point) };
    const answer = { label: view.label, radius, rows: rows.map(packed) };
    if (quick) return answer;
    const attack = (row) => prover.attack(x0, row, radius, row.point);
    return { ...answer, attacks: rows.slice(0, 3).map(attack).map(packed),
        adversary: packed(prover.adversary(x0, rows[0], rows[0].point)) };
})"""
EVALUATE = """([points, pair]) => points.map((point) => {
    const c = Float64Array.from(point), { margin, gradient } = crcTest.prover.evaluate(c, pair);
    const errors = crcTest.prover.errors(pair, CrcProof.norm(c));
    return { margin, gradient: crcTest.pack(gradient), errors };
})"""
# The numerics alone, and floats without a digit lost on their way.
TOOLS = """window.crcTest = {
    prover: new CrcProof.Prover(window.crcDrawNetwork),
    pack: (floats) => btoa(String.fromCharCode(...new Uint8Array(floats.slice().buffer))),
}"""


@pytest.fixture(scope="module")
def model():
    return crc.load_model(BOOK / NETWORK)


@pytest.fixture(scope="module")
def images():
    """The hundred digits, as MNIST's images are loaded: float32 pixels in [0, 1]."""
    return torch.from_numpy(read_digits(BOOK / "digits.png").reshape(100, 784)) / 255


@pytest.fixture(scope="module")
def script(model):
    return network_script(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, script):
    """The page as a file, with its script beside it."""
    folder = tmp_path_factory.mktemp("draw")
    digits = read_digits(BOOK / "digits.png")
    (folder / "page.html").write_text(PAGE.format(draw_page(model, digits).data), "utf-8")
    (folder / "_static").mkdir()
    (folder / "_static" / SCRIPT).write_text(script)
    return folder


@pytest.fixture
def open_page(browser, folder):
    """Open the page from disk; nothing may fail, and nothing is asked of a network."""
    complaints, contexts = [], []

    def open_page(address=None, state="settled", **options):
        address = address or f"{folder.as_uri()}/page.html"
        here = (address.removesuffix("page.html"), "blob:")
        context = browser.new_context(viewport={"width": 1000, "height": 1000}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith(here)
                or complaints.append(request.url))  # fmt: skip
        page.goto(address)
        page.wait_for_selector(f".crc-draw[data-state={state}]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture(scope="module")
def numerics(browser, folder):
    """A page with the numerics alone."""
    page = browser.new_page()
    page.goto("about:blank")
    page.add_script_tag(path=folder / "_static" / SCRIPT)
    page.add_script_tag(path=Path(crc.__file__).parent / "book" / "draw_proof.js")
    page.evaluate("() => { window.CrcProof = CrcProof; " + TOOLS + " }")
    yield page
    page.close()


def unpacked(found):
    return torch.stack([unpack(each["point"]) for each in found])


def unpack(text):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f8").copy())


def answers(page, images, quick):
    """What the page answers for the images, ten at a time."""
    parts = images.double().split(10)
    return [each for part in parts for each in page.evaluate(ANSWER, [part.tolist(), quick])]


@pytest.fixture(scope="module")
def quick(numerics, images):
    return answers(numerics, images, True)


@pytest.fixture(scope="module")
def full(numerics, images):
    return answers(numerics, images, False)


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


# --- What Python hands over ----------------------------------------------------------------------


def test_the_digits_are_a_row_a_class(images, model):
    labels = torch.arange(10).repeat_interleave(10)
    assert (model(images).argmax(1) == labels).double().mean() > 0.95
    assert (BOOK / "digits.LICENSE").read_text().count("Creative Commons") == 1


def test_a_picture_of_another_size_holds_no_digits(tmp_path):
    import matplotlib.pyplot as plt

    plt.imsave(tmp_path / "small.png", np.zeros((28, 28)))
    with pytest.raises(ValueError, match="280 by 280"):
        read_digits(tmp_path / "small.png")


def test_the_script_holds_the_weights_and_what_is_proved_of_them(model, script):
    assert len(script) < 4.5e6
    data = json.loads(re.fullmatch(r"window.crcDrawNetwork = (.*);\n", script)[1])
    parameters = torch.cat([parameter.flatten() for parameter in model.parameters()]).detach()
    weights = np.frombuffer(base64.b64decode(data["weights"]), "<f4")
    assert np.array_equal(weights, parameters.numpy())
    table = torch.tensor(data["curvature"], dtype=torch.float64)
    for label in (0, 7):
        target = torch.tensor([t for t in range(10) if t != label])
        m, _ = crc.curvature_bounds(model, label, target)
        assert torch.equal(table[label, target], -m)
    assert data["spectralNorm"] >= torch.linalg.matrix_norm(model[1].weight.double(), 2)


@pytest.mark.parametrize(
    "other",
    [
        crc.mlp([4, 8, 2], "tanh"),
        crc.mlp([4, 8, 8, 2]),
        crc.mlp([4, 2]),
        crc.mlp([4, 7, 2]),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Softplus(beta=2), nn.Linear(8, 2)),
        crc.mlp([4, 8, 2]).double(),
    ],
    ids=["tanh", "deep", "linear", "seven units", "beta", "double"],
)
def test_a_network_that_the_page_would_not_compute_is_refused(other):
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 / 3)
    with pytest.raises(ValueError, match="the page"):
        network_script(other)


# --- Numerics ------------------------------------------------------------------------------------


def test_the_functions_err_far_less_than_is_assumed(numerics):
    """Exp and log1p where the page uses them: exp(-|z|), and log(1 + that)."""
    generator = np.random.default_rng(0)
    z = -np.abs(np.concatenate([generator.normal(0, 5, 2000), generator.uniform(-40, 40, 500)]))
    powers, values, assumed = numerics.evaluate(
        "(z) => { const p = z.map(Math.exp); return [p, p.map(Math.log1p), CrcProof.FUNCTIONS]; }",
        z.tolist(),
    )
    with mpmath.workdps(40):
        for point, power, value in zip(z.tolist(), powers, values, strict=True):
            assert abs(power / mpmath.exp(point) - 1) < assumed / 4
            assert abs(value / mpmath.log1p(power) - 1) < assumed / 4


def test_errors_are_within_what_is_subtracted(numerics, model, images):
    """Judged in 40 digits, at a point as a search passes through."""
    noise = torch.randn(784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    point = images[90].double() + 0.07 * noise
    [found] = numerics.evaluate(EVALUATE, [[point.tolist()], {"label": 4, "target": 9}])
    errors, gradient = found["errors"], unpack(found["gradient"]).tolist()
    network = read_network(model)
    [row] = network.margin_weights(torch.tensor([4]), torch.tensor([9]))
    offset = network.layers[1].bias[4] - network.layers[1].bias[9]
    # No smaller than Python's, whose functions are assumed to be four times as exact.
    for bound, python in zip((errors["value"], errors["gradient"]), python_errors(network, point),
                             strict=True):  # fmt: skip
        assert python <= bound <= 6 * python
    with mpmath.workdps(40):
        margin, units = exactly(network.layers[0], point.tolist(), row.tolist())
        assert abs(margin + mpmath.mpf(offset.item()) - found["margin"]) <= errors["value"]
        columns = network.layers[0].weight.T.tolist()
        far = [mpmath.fdot(column, units) - g for column, g in zip(columns, gradient, strict=True)]
        assert mpmath.norm(far) <= errors["gradient"]


def python_errors(network, point):
    """Python's bounds of what rounding does to the margin of 4 over 9 and to its gradient."""
    rounding = Prover.of(network).rounding
    facts = MarginFacts.of(rounding, torch.tensor([4]), torch.tensor([9]))
    forward = rounding.forward(*rounding.first(point.norm()[None]))
    value = forward.value_error(facts, forward.size + forward.error)
    return value, forward.gradient_errors(facts)[1]


def exactly(layer, point, row):
    """A margin without its bias and its derivatives by preactivations, in mpmath's precision."""
    weights, bias = layer.weight.tolist(), layer.bias.tolist()
    z = [mpmath.fdot(weight, point) + b for weight, b in zip(weights, bias, strict=True)]
    margin = mpmath.fdot(row, [mpmath.log1p(mpmath.exp(entry)) for entry in z])
    return margin, [w / (1 + mpmath.exp(-entry)) for w, entry in zip(row, z, strict=True)]


@pytest.mark.parametrize(("speed", "least_share"), [("quick", 0.98), ("full", 0.9999)])
def test_no_radius_is_above_what_python_proves(request, model, images, speed, least_share):
    """At the very points that the page found, and nearly all of what ``certify`` finds itself."""
    found = request.getfixturevalue(speed)
    label = torch.tensor([view["label"] for view in found])
    assert torch.equal(label, model.double()(images.double()).argmax(1))
    index = torch.arange(100).repeat_interleave(9)
    rows = [row for view in found for row in view["rows"]]
    target = torch.tensor([row["target"] for row in rows])
    assert all(
        len({row["target"] for row in view["rows"]} - {view["label"]}) == 9 for view in found
    )
    radius, points = numbers([row["radius"] for row in rows]), unpacked(rows)
    proved = python_radius(model, images[index].double(), label[index], target, points)
    assert (radius <= proved * (1 + 1e-9)).all()
    assert (radius >= proved * (1 - 1e-6) - 1e-6).all()
    least = radius.reshape(100, 9).amin(1)
    assert torch.equal(least, numbers([view["radius"] for view in found]))
    certificate = crc.certify(model, images, label)
    assert (least / certificate.radius).mean() > least_share
    distance = (certificate.nearest - images.double()).norm(dim=1)
    assert (least <= distance * OUTWARD)[~distance.isnan()].all()


def python_radius(model, x, label, target, points):
    """What Python proves when it is given the point c, one a margin."""
    prover = Prover.of(read_network(model))
    quadratic, _ = prover.prove(Entries.of(prover, x, label, target), points - x)
    return quadratic.radius()


def test_adversaries_are_what_they_are_said_to_be(full, model, images):
    rows = [i for i, view in enumerate(full) if view["adversary"]]
    assert len(rows) >= 98
    points = unpacked([full[i]["adversary"] for i in rows])
    distance = (points - images[rows].double()).norm(dim=1)
    shown = numbers([full[i]["adversary"]["distance"] for i in rows])
    assert ((shown >= distance) & (shown <= distance * (1 + 1e-9))).all()
    label = torch.tensor([full[i]["label"] for i in rows])
    target = torch.tensor([full[i]["rows"][0]["target"] for i in rows])
    logits = model.double()(points)
    margin = logits.gather(1, label[:, None]) - logits.gather(1, target[:, None])
    assert (margin <= 0).all() and (margin > -1e-3).all()
    assert (distance >= numbers([full[i]["radius"] for i in rows])).all()
    # As near as Python's.
    nearest = crc.certify(model, images[rows], label).nearest
    assert (distance / (nearest - images[rows].double()).norm(dim=1)).nanmean() < 1.02


def test_no_attack_succeeds_inside_a_ball(full, model, images):
    for image, view in zip(images.double(), full, strict=True):
        points = unpacked(view["attacks"])
        distance = (points - image).norm(dim=1)
        assert (distance <= view["radius"]).all() and (distance > 0.9 * view["radius"]).any()
        assert (model.double()(points).argmax(1) == view["label"]).all()
        assert all(attack["margin"] > 0 for attack in view["attacks"])


# --- The page ------------------------------------------------------------------------------------


def state(page, name="settled"):
    page.wait_for_selector(f".crc-draw[data-state={name}]")


def read(page):
    """The digit and the radius that the page shows."""
    return page.locator(".crc-draw-class").inner_text(), float(
        page.locator(".crc-draw-radius").inner_text()
    )


def sheet(page):
    return torch.tensor(
        page.evaluate("[...document.querySelector('.crc-draw').page.editor.sheet.ink]")
    )


def on_screen(page, x, y):
    """Where the middle of a pixel of the sheet is on the screen."""
    box = page.locator(".crc-draw-sheet").bounding_box()
    return box["x"] + box["width"] * (x + 0.5) / 28, box["y"] + box["height"] * (y + 0.5) / 28


def draw(page, *lines):
    """Draw lines with the mouse, in pixels of the sheet."""
    for line in lines:
        places = [on_screen(page, *place) for place in line]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place)
        page.mouse.up()


def circle(x, y, across, down, start=0, end=360):
    angles = np.radians(np.linspace(start, end, 25))
    return [(x + across * np.sin(a), y - down * np.cos(a)) for a in angles]


DRAWN = {
    0: [circle(14, 14, 5, 8)],
    1: [[(14, 5), (13, 22)]],
    2: [[*circle(13, 10, 5, 4.5, -70, 140), (8, 22), (20, 22)]],
    3: [[*circle(13, 9.5, 4.5, 4.5, -70, 170), *circle(13, 18, 5, 4.5, 10, 250)]],
    4: [[(9, 6), (8, 13), (18, 13)], [(18, 5), (17, 23)]],
    7: [[(8, 7), (19, 7), (13, 23)]],
}


@pytest.mark.parametrize("digit", DRAWN)
def test_a_drawn_digit_looks_like_one_of_mnists_and_is_read(
    open_page, images, digit, record_property
):
    page = open_page()
    draw(page, *DRAWN[digit])
    state(page)
    ink = sheet(page)
    assert read(page)[0] == str(digit) and read(page)[1] > 0.3
    assert ink.min() == 0 and ink.max() == 1
    # As much ink as the book's digits have, and edges as soft: not a picture of black and white.
    assert images.sum(1).min() < ink.sum() < images.sum(1).max()
    soft = ((ink > 0) & (ink < 1)).sum() / (ink > 0).sum()
    assert 0.4 < soft < 0.85
    record_property("ms of the last answer while drawing", page.evaluate(
        "document.querySelector('.crc-draw').page.answer.took"))  # fmt: skip


def test_what_is_drawn_moves_to_the_middle_as_in_mnist(open_page):
    page = open_page()
    draw(page, [(5, 4), (4, 20)])
    page.wait_for_function(
        """() => { const ink = document.querySelector('.crc-draw').page.editor.sheet.ink;
        const total = ink.reduce((a, b) => a + b);
        return Math.abs(ink.reduce((a, v, i) => a + v * (i % 28), 0) / total - 14) <= 0.5; }"""
    )
    state(page)
    middle = sheet(page)
    page.locator(".crc-draw-centre").uncheck()
    page.locator(".crc-draw-clear").click()
    draw(page, [(5, 4), (4, 20)])
    page.wait_for_timeout(1000)
    left = sheet(page)
    assert left.reshape(28, 28)[:, :8].sum() > 0.99 * left.sum()
    assert float(middle.sum()) == pytest.approx(float(left.sum()))


def test_undo_eraser_and_clear(open_page):
    page = open_page()
    draw(page, [(14, 5), (14, 22)])
    before = sheet(page)
    draw(page, [(6, 12), (22, 12)])
    crossed = sheet(page)
    assert crossed.sum() > before.sum() + 10
    page.locator(".crc-draw-undo").click()
    assert torch.equal(sheet(page), before)
    page.locator(".crc-draw-rubber").click()
    draw(page, [(6, 12), (22, 12)])
    assert before.sum() - 10 < sheet(page).sum() < before.sum() - 4
    page.locator(".crc-draw-clear").click()
    assert sheet(page).sum() == 0 and page.locator(".crc-draw-hint").is_visible()


def test_the_keyboard_draws(open_page):
    page = open_page()
    page.locator(".crc-draw-clear").click()
    page.locator(".crc-draw-sheet").focus()
    for key in ["ArrowUp"] * 8 + [" "] + ["ArrowDown"] * 16 + [" "] + ["ArrowRight"] * 9:
        page.keyboard.press(key)
    state(page)
    assert read(page)[0] == "1"
    assert sheet(page).reshape(28, 28)[:, 18:].sum() == 0  # the pen was up
    assert page.locator(".crc-draw-status").inner_text().startswith("Every picture closer than")


def test_a_finger_draws(open_page):
    page = open_page(has_touch=True)
    page.locator(".crc-draw-clear").tap()
    page.locator(".crc-draw-sheet").tap(position={"x": 100, "y": 100})
    assert 2 < sheet(page).sum() < 12


def test_even_the_empty_sheet_is_certified(open_page):
    """What the page's text says of it."""
    page = open_page()
    page.locator(".crc-draw-clear").click()
    state(page, "drawing")
    state(page)
    assert read(page)[0] == "1" and 1.5 < read(page)[1] < 1.52


def test_each_of_the_hundred_digits_is_at_hand(open_page, images):
    page = open_page()
    for number in range(10):
        label = (3 * number) % 10  # each class and each row once
        page.locator(".crc-draw-digits button").nth(label).click()
        assert torch.equal(sheet(page).float(), images[10 * label + number])
        page.locator(".crc-draw-others").click()


def test_the_page_shows_what_is_proved_rounded_down(open_page, model):
    page = open_page()
    label, radius = read(page)
    proved = crc.certify(model, sheet(page)[None], torch.tensor([int(label)]))
    assert radius <= proved.radius * (1 + 1e-3) and radius > proved.radius - 2e-3
    exact = page.evaluate("document.querySelector('.crc-draw').page.answer.radius")
    assert radius <= exact < radius + 1e-3
    bars = page.locator(".crc-draw-value").all_text_contents()
    assert len(bars) == 9 and min(map(float, bars)) == radius
    assert page.locator(".crc-draw-plot .crc-draw-cross").count() >= 7


@pytest.mark.parametrize("label", [2, 3, 4, 8])
def test_a_budget_fails_inside_the_ball_and_turns_the_digit_beyond(open_page, label):
    page = open_page()
    page.locator(".crc-draw-digits button").nth(label).click()
    state(page, "drawing")
    state(page)
    verdict, answer = page.locator(".crc-draw-verdict"), page.locator(".crc-draw-read")

    def spend(button):
        page.locator(f".crc-draw-{button}").click()
        page.wait_for_function("document.querySelector('.crc-draw').page.result")
        page.wait_for_timeout(50)

    spend("edge")
    assert verdict.get_attribute("data-kind") == "safe"
    assert answer.inner_text() == f"read as {label}"
    spend("break")
    assert verdict.get_attribute("data-kind") == "broken"
    assert answer.inner_text() != f"read as {label}"
    # The slider answers to the keyboard, and back inside the promise holds.
    page.locator(".crc-draw-budget").focus()
    page.keyboard.press("Home")
    assert page.locator(".crc-draw-spent").inner_text() == "0.00"
    page.wait_for_timeout(100)
    assert verdict.get_attribute("data-kind") == "safe"


def test_while_one_draws_the_radius_follows(open_page):
    """From a 4 to a 9, by closing its top: the certificate shrinks, and grows on the other side."""
    page = open_page()
    page.locator(".crc-draw-digits button").nth(4).click()
    seen = []
    for step in range(10):
        page.mouse.move(*on_screen(page, 10.5 + 0.75 * step, 7))
        page.mouse.down()
        page.wait_for_function("document.querySelector('.crc-draw').page.frame === null")
        seen.append(read(page))
    page.mouse.up()
    assert seen[0][0] == "4" and seen[-1][0] == "9"
    radii = [radius for _, radius in seen]
    assert min(radii) < 0.3 < min(radii[0], radii[-1])


def test_without_its_weights_the_page_promises_nothing(open_page, folder, tmp_path):
    (tmp_path / "page.html").write_text((folder / "page.html").read_text())
    page = open_page(f"{tmp_path.as_uri()}/page.html", state="loading")
    page.wait_for_function(
        "document.querySelector('.crc-draw-loading').textContent.includes('nothing is certified')"
    )
    draw(page, [(14, 5), (14, 22)])
    assert page.locator(".crc-draw-radius").inner_text() == "–"


def test_from_a_server_the_progress_is_shown(open_page, folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        page = open_page(f"http://127.0.0.1:{server.server_port}/page.html")
        server.shutdown()
    bar = page.locator(".crc-draw-loading progress")
    assert 0.99 < bar.evaluate("bar => bar.value") <= 1 and not bar.is_visible()
