"""The explorer shows what ``certify`` proved at its grid points, and nothing else."""

import base64
import json
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import crcbook as crc
from crcbook.book.explorer import (
    _towards,
    draw_ball,
    draw_data,
    draw_field,
    explorer,
    radius_field,
    radius_fields,
)

ARRAYS = ("radius", "distance", "nearest", "predicted", "exact", "boundary")
XS, YS = np.linspace(-2, 2, 21), np.linspace(-1.5, 1.5, 16)


@pytest.fixture(scope="module")
def model():
    model = crc.mlp([2, 12, 3], "softplus", seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def field(model):
    return radius_field(model, XS, YS)


@pytest.fixture
def line(line_model):
    """The field of a network whose boundary is the line x1 = 1/4."""
    return radius_field(line_model, XS, YS)


def payload(html):
    text = re.search(r'<script type="application/json">(.*?)</script>', html.data, re.S)[1]
    return json.loads(text)


def unpack(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def test_the_field_holds_what_certify_says(model, field):
    points = torch.from_numpy(np.stack(np.meshgrid(XS, YS), -1).reshape(-1, 2))
    label = model.double()(points).argmax(1)
    certificate = crc.certify(model, points, label, method="dual")
    assert np.array_equal(field.predicted.ravel(), label)
    assert np.array_equal(field.radius.ravel(), certificate.radius)
    assert np.array_equal(field.exact.ravel(), certificate.exact)
    assert field.radius.shape == (len(YS), len(XS))
    assert len(np.unique(field.predicted)) > 1


def test_rows_are_y_and_columns_are_x(line):
    assert line.radius == pytest.approx(np.broadcast_to(abs(XS - 0.25), (16, 21)), rel=1e-5)
    assert np.array_equal(line.predicted, np.broadcast_to(XS < 0.25, (16, 21)))
    assert line.nearest[..., 0] == pytest.approx(0.25, abs=1e-4)
    assert line.exact.all()


def test_every_adversarial_point_lies_outside_its_ball(model, field):
    nearest = torch.from_numpy(field.nearest.reshape(-1, 2))
    known = ~nearest.isnan().any(1)
    logits = model.double()(nearest[known])
    label = torch.from_numpy(field.predicted.ravel())[known]
    others = logits.scatter(1, label[:, None], -torch.inf).amax(1)
    assert known.double().mean() > 0.9
    assert (others >= logits.gather(1, label[:, None])[:, 0] - 1e-9).all()
    assert (field.distance.ravel()[known] >= field.radius.ravel()[known]).all()


def test_the_boundary_is_where_two_classes_tie(model, field):
    points = torch.from_numpy(np.concatenate(field.boundary))
    top = model.double()(points).topk(2, dim=1).values
    assert (top[:, 0] - top[:, 1]).max() < 0.02


def test_a_grid_of_one_point_needs_no_boundary(model):
    single = radius_field(model, [0.3], [-0.2])
    assert single.radius.shape == (1, 1) and single.boundary == ()


@pytest.mark.parametrize("xs", [[1.0, 0.0], [0.0, 0.0], [0.0, np.nan], [], [[0.0, 1.0]]])
def test_coordinates_that_make_no_grid_are_refused(model, xs):
    with pytest.raises(ValueError, match="xs must"):
        radius_field(model, xs, YS)


def test_a_network_of_images_is_refused():
    with pytest.raises(ValueError, match="takes 64 inputs"):
        radius_field(crc.mlp([64, 10]), XS, YS)


@pytest.mark.parametrize("values", [[0.1, 1 / 3, 0.0, np.inf, np.nan, 1e-50, 2.5]])
def test_rounding_never_promises_more(values):
    values = np.array(values)
    down, up = _towards(values, 0.0), _towards(values, np.inf)
    finite = np.isfinite(values)
    assert (down[finite] <= values[finite]).all() and (up[finite] >= values[finite]).all()
    assert down[finite] == pytest.approx(values[finite], rel=1e-6, abs=1e-44)
    assert np.array_equal(np.isnan(down), np.isnan(values)) and down[3] == up[3] == np.inf


def test_the_figure_carries_the_field_rounded_to_the_safe_side(field):
    data = payload(explorer(field, start=(0.5, -0.5)))
    shown = {name: data["arrays"][data["fields"][0][name]] for name in ARRAYS}
    radius = unpack(shown["radius"], "<f4").reshape(field.radius.shape)
    distance = unpack(shown["distance"], "<f4").reshape(field.radius.shape)
    assert (radius <= field.radius).all() and radius == pytest.approx(field.radius, rel=1e-6)
    known = ~np.isnan(field.distance)
    assert (distance[known] >= field.distance[known]).all()
    assert np.array_equal(unpack(shown["predicted"], "u1"), field.predicted.ravel())
    assert np.array_equal(unpack(shown["exact"], "u1"), field.exact.ravel())
    assert data["xs"] == XS.tolist() and data["ys"] == YS.tolist()
    [view] = data["views"]
    column, row = view["place"]
    assert abs(XS[column] - 0.5) <= 0.1 and abs(YS[row] + 0.5) <= 0.1
    assert "<button" not in explorer(field, start=(0.5, -0.5)).data


def test_each_start_with_a_name_has_a_button_and_names_a_field(field):
    start = {"here": (0.5, -0.5, "b"), "<there>": (-2.0, 1.5, "a")}
    html = explorer({"a": field, "b": field}, start=start)
    assert re.findall(r"<button[^>]*>(.*?)</button>", html.data) == ["here", "&lt;there&gt;"]
    here, there = payload(html)["views"]
    assert here["key"] == ["b"] and there == {"key": ["a"], "place": [0, len(YS) - 1]}
    with pytest.raises(ValueError, match="name one of the fields; got .'c',"):
        explorer({"a": field}, start={"here": (0.0, 0.0, "c")})


def test_the_figure_needs_no_network_and_stays_small(field):
    """Four fields of 121 by 91 points, values and lines as long as those of a real field."""
    ys, xs = np.mgrid[0:91, 0:121]
    large = replace(
        field,
        xs=np.linspace(-2, 2, 121),
        ys=np.linspace(-1.5, 1.5, 91),
        predicted=field.predicted[ys % 16, xs % 21],
        radius=abs(np.sin(xs / 9) * np.cos(ys / 7)),
        exact=field.exact[ys % 16, xs % 21],
        nearest=field.nearest[ys % 16, xs % 21],
    )
    html = explorer({str(number): large for number in range(4)}).data
    assert len(html) < 2_000_000
    assert not re.search(r'(src|href)="?(https?:)?//', html)


def test_names_cannot_break_out_of_the_page(field):
    html = explorer(
        {"</script><b>": field},
        classes=("<i>", "b", "c"),
        choices=("<q>",),
        alt='"><s>',
    )
    assert payload(html)["fields"][0]["key"] == ["</script><b>"]
    for tag in ("<b>", "<i>", "<q>", "<s>"):
        assert tag not in html.data.replace(payload_text(html), "")
    assert "<" not in payload_text(html)


def payload_text(html):
    return re.search(r'<script type="application/json">(.*?)</script>', html.data, re.S)[1]


def test_infinite_radii_survive(line):
    endless = replace(line, radius=np.full_like(line.radius, np.inf))
    data = payload(explorer(endless))
    assert np.isinf(unpack(data["arrays"][data["fields"][0]["radius"]], "<f4")).all()
    assert data["largest"] == 1.0


def test_a_runner_up_field_says_so(model, field):
    weak = radius_field(model, XS, YS, targets="runner-up")
    assert (weak.radius >= field.radius).all()
    shown = payload(explorer({"all": field, "runner-up": weak}))["fields"]
    assert [entry["all"] for entry in shown] == [True, False]


def test_several_certificates_share_what_an_attack_found(model, field):
    ways = {"dual": {}, "Lipschitz": {"method": "lipschitz"}}
    shared = radius_fields(model, XS, YS, ways)
    assert np.array_equal(shared["dual"].radius, field.radius)
    points = torch.from_numpy(np.stack(np.meshgrid(XS, YS), -1).reshape(-1, 2))
    label = torch.from_numpy(field.predicted.ravel())
    lipschitz = crc.certify(model, points, label, method="lipschitz")
    assert np.array_equal(shared["Lipschitz"].radius.ravel(), lipschitz.radius)
    assert shared["Lipschitz"].nearest is shared["dual"].nearest
    near = shared["dual"].distance[~np.isnan(field.distance)]
    assert (near <= field.distance[~np.isnan(field.distance)] + 1e-12).all()
    shown = payload(explorer({("net", name): f for name, f in shared.items()}, choices=("a", "b")))
    dual, lipschitz = shown["fields"]
    assert [name for name in ARRAYS if dual[name] == lipschitz[name]] == [
        "distance", "nearest", "predicted", "boundary"
    ]  # fmt: skip


def test_a_box_holds_for_the_attack_as_for_the_certificate(model, field):
    """Without its box, an attack's point may lie inside the ball certified in the box."""
    box = ((-2.0, -1.5), (2.0, 1.5))
    boxed = radius_field(model, XS, YS, box=box)
    known = ~np.isnan(boxed.distance)
    assert (boxed.radius >= field.radius).all() and (boxed.radius > field.radius).any()
    assert (boxed.distance[known] >= boxed.radius[known]).all()
    assert (abs(boxed.nearest[known]) <= np.array([2.0, 1.5])).all()


def test_choices_must_be_complete(field):
    with pytest.raises(ValueError, match="2 names each"):
        explorer({"a": field}, choices=("network", "certificate"))
    keys = [("a", "c"), ("a", "d"), ("b", "c")]
    with pytest.raises(ValueError, match="all 4 combinations; got 3"):
        explorer(dict.fromkeys(keys, field), choices=("network", "certificate"))


def test_fields_that_do_not_belong_together_are_refused(model, field, line):
    other = radius_field(model, XS + 1, YS)
    uneven = radius_field(model, [0.0, 1.0, 3.0], YS)
    for fields, message in [
        ({}, "at least one"),
        ({"a": field, "b": other}, "same grid"),
        ({"a": field, "b": line}, "same number of classes"),
        (uneven, "evenly spaced xs"),
    ]:
        with pytest.raises(ValueError, match=message):
            explorer(fields)
    with pytest.raises(ValueError, match="name 3 classes; got 2"):
        explorer(field, classes=("a", "b"))


def test_matplotlib_draws_the_same_ball(line):
    figure, axes = plt.subplots()
    draw_field(axes, line)
    draw_data(axes, (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])))
    draw_ball(axes, line, row=3, column=2)
    circle = axes.patches[0]
    assert circle.center == (XS[2], YS[3])
    assert circle.radius == line.radius[3, 2]
    assert axes.get_aspect() == 1.0
    plt.close(figure)
