"""What one may give the public calls: items, labels, radii and boxes of many kinds."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import one_hot

import crcbook as crc
from crcbook.checks import as_box
from crcbook.networks import read_network
from crcbook.proof.prover import Prover

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def model():
    return crc.mlp([12, 20, 4], seed=3)


@pytest.fixture(scope="module")
def x():
    return torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))


def calls(model, x, y=None, **options):
    """The radii and the margins of all public calls, to compare."""
    certificate, radius = crc.certify(model, x, y, **options), options.pop("radius", 0.3)
    verdict = crc.verify(model, x, y, radius=radius, **options)
    found = crc.attack(model, x, y, radius=radius, **options)
    return torch.cat([certificate.radius, verdict.margin, found.margin])


def test_labels_are_the_predictions_where_none_are_given(model, x):
    expected = calls(model, x, model(x).argmax(1))
    assert torch.equal(calls(model, x), expected) and (expected[:6] > 0).all()


@pytest.mark.parametrize(
    "kind",
    [
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        lambda y: y.numpy().astype(">i2"),
        lambda y: one_hot(y, 4),
        lambda y: one_hot(y, 4).float(),
        lambda y: one_hot(y, 4).bool().numpy(),
    ],
    ids=["list", "array", "other bytes", "one-hot", "float one-hot", "bool one-hot array"],
)
def test_labels_may_be_lists_arrays_and_one_hot_rows(model, x, kind):
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.equal(calls(model, x, kind(y)), calls(model, x, y))


@pytest.mark.parametrize(
    "kind", [int, lambda y: y, lambda y: y[None], lambda y: one_hot(y, 4), lambda y: None]
)
def test_one_item_is_a_batch_of_one(model, x, kind):
    y = model(x).argmax(1)
    assert torch.equal(calls(model, x[2], kind(y[2])), calls(model, x[2:3], y[2:3]))
    assert torch.equal(calls(model, x[2:3], one_hot(y[2], 4)), calls(model, x[2:3], y[2:3]))
    found = crc.certify(model, x[2], kind(y[2]))
    assert found.radius.shape == (1,) and found.nearest.shape == (1, 3, 4)
    assert crc.attack(model, x[2].flatten(), kind(y[2])).point.shape == (1, 12)


def test_one_image_of_a_convolution_is_no_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(72, 3)).eval()
    image = torch.rand(1, 8, 8)
    alone, batch = crc.certify(model, image), crc.certify(model, image[None])
    assert torch.equal(alone.radius, batch.radius)
    assert alone.nearest.shape == batch.nearest.shape == (1, 1, 8, 8)


def test_arrays_are_as_good_as_tensors(model, x):
    expected = calls(model, x)
    for array in (x.numpy(), x.numpy().astype(">f4"), x.numpy()[::-1][::-1]):
        assert torch.equal(calls(model, array), expected)
    assert crc.certify(model, x.double().numpy()).nearest.dtype == torch.float64


def test_radii_may_be_one_an_item(model, x):
    y = model(x).argmax(1)
    radius = crc.certify(model, x, y).radius
    for kind in (torch.Tensor.tolist, torch.Tensor.numpy, lambda r: r):
        assert crc.verify(model, x, y, kind(0.99 * radius)).robust.all()
    beyond = crc.verify(model, x, y, 1.5 * radius + 0.1)
    assert torch.equal(beyond.radius, 1.5 * radius + 0.1)
    mixed = torch.where(torch.arange(6) < 3, 0.5 * radius, 9.0)
    verdict, found = crc.verify(model, x, y, mixed), crc.attack(model, x, y, mixed)
    assert verdict.robust[:3].all() and not verdict.robust[3:].any()
    assert (found.distance <= mixed).all() and not found.success[:3].any()
    for item in range(6):
        one = crc.verify(model, x[item], y[item], mixed[item])
        assert one.robust[0] == verdict.robust[item]


def test_boxes_may_be_one_an_item_or_of_any_shape_that_broadcasts(model, x):
    low, high = x - 0.2, x + 0.1
    radius = crc.certify(model, x, box=(low, high)).radius
    verdict = crc.verify(model, x, radius=0.3, box=(low, high))
    local = crc.certify(model, x, box=(low, high), curvature="local").radius
    assert (local >= radius).all()
    for item in range(6):
        box = low[item], high[item]
        one = crc.certify(model, x[item], box=box)
        torch.testing.assert_close(one.radius[0], radius[item], rtol=1e-6, atol=0)
        assert crc.verify(model, x[item], radius=0.3, box=box).robust[0] == verdict.robust[item]
        flat = crc.certify(model, x[item], box=(low[item].flatten(), high[item].numpy()))
        assert torch.equal(flat.radius, one.radius)
    for found in (
        crc.attack(model, x, box=(low, high)),
        crc.attack(model, x, None, 0.3, (low, high)),
    ):
        point = found.point[found.success]
        assert (point >= low[found.success]).all() and (point <= high[found.success]).all()
    free = crc.certify(model, x).radius
    assert (radius >= free).all() and (radius > free).any()
    column = torch.tensor([1.0, 1.0, 1.0, 2.0])
    rows, whole = (0.0, column), (torch.zeros(3, 4), column.expand(3, 4))
    assert torch.equal(
        crc.certify(model, x, box=rows).radius, crc.certify(model, x, box=whole).radius
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("mean", "deviation"), [(0.1307, 0.3081), (0.485, 0.229), (0.4914, 0.2023), (0.4822, 0.1994)]
)
def test_standardised_pixels_lie_in_their_exact_box(mean, deviation, dtype):
    pixels = torch.arange(256, dtype=dtype) / 255
    box = (0 - mean) / deviation, (1 - mean) / deviation
    for x in (
        (pixels - mean) / deviation,
        (pixels - torch.tensor(mean, dtype=dtype)) / torch.tensor(deviation, dtype=dtype),
        (pixels - mean) * (1 / deviation),
    ):
        found = as_box(box, x[None].double(), dtype=dtype)
        assert (x >= found.lower).all() and (x <= found.upper).all()
        assert (found.lower <= box[0]).all() and (found.upper >= box[1]).all()
    outside = pixels - 4e-2
    with pytest.raises(ValueError, match="hold every input"):
        as_box((0.0, 1.0), outside[None].double(), dtype=dtype)


@given(st.sampled_from(DTYPES), st.sampled_from([1.0, 30.0]), st.booleans(), st.integers(0, 99))
def test_points_come_back_as_they_went_in_and_what_is_said_of_them_holds(dtype, size, boxed, seed):
    generator = torch.Generator().manual_seed(seed)
    model = crc.mlp([12, 20, 4], seed=seed)
    x = (size * torch.rand(5, 3, 4, generator=generator)).to(dtype)
    box = (0.0, size) if boxed else None
    network, y = read_network(model), model(x.float()).argmax(1)
    y[0] = (y[0] + 1) % 4
    certificate = crc.certify(model, x, y, box=box)
    radius = 1.2 * certificate.radius.clamp(max=5 * size) + 0.01
    verdict = crc.verify(model, x, y, radius, box=box)
    near, inside = crc.attack(model, x, y, box=box), crc.attack(model, x, y, radius, box=box)
    assert (inside.distance <= radius).all()
    for point, found in (
        (certificate.nearest, certificate.distance.isfinite()),
        (verdict.nearest, ~verdict.nearest.flatten(1).isnan().any(1)),
        (near.point, near.success),
        (inside.point, inside.success),
    ):
        assert point.dtype == dtype and point.shape == x.shape
        reached = point[found].flatten(1).double()
        logits = network.logits(reached)
        assert (logits.scatter(1, y[found][:, None], -torch.inf).amax(1) >= logits.gather(
            1, y[found][:, None])[:, 0]).all()  # fmt: skip
        if boxed:
            assert (point[found] >= 0).all() and (point[found] <= size).all()
        away = (reached - x[found].flatten(1).double()).norm(dim=1)
        assert (away >= certificate.radius[found]).all()
        if point is certificate.nearest:
            assert (away <= certificate.distance[found]).all()
        elif point is verdict.nearest:
            assert (away <= radius[found]).all() and not verdict.robust[found].any()
    assert certificate.distance[0] == 0 and torch.equal(verdict.nearest[0], x[0])
    assert torch.equal(near.point[0], x[0])


def test_an_adversary_of_a_verdict_is_proved(digits, digits_model):
    part = digits.test.take(slice(0, 80))
    verdict = crc.verify(digits_model, part.x, part.y, 0.9)
    found = ~verdict.nearest.flatten(1).isnan().any(1)
    assert not (found & verdict.robust).any()
    attacked = crc.attack(digits_model, part.x, part.y, 0.9)
    assert found.sum() >= 0.9 * attacked.success.sum() > 5
    prover = Prover.of(read_network(digits_model))
    point, y = verdict.nearest[found].flatten(1).double(), part.y[found]
    logits = prover.network.logits(point)
    target = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    margin = logits.gather(1, y[:, None]) - logits.gather(1, target[:, None])
    assert (margin[:, 0] + prover.margin_error(y, target, point) <= 1e-12).all()


X, Y = torch.rand(4, 12), torch.tensor([0, 1, 2, 3])
CALLS = [
    crc.certify,
    lambda model, x, y, **options: crc.verify(model, x, y, 0.5, **options),
    crc.attack,
]


@pytest.mark.parametrize("call", CALLS, ids=["certify", "verify", "attack"])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X.to("meta"), Y, TypeError, "x must hold numbers; got a tensor on the device meta"),
        (X.to_sparse(), Y, TypeError, r"x must be a dense tensor; .* call x.to_dense\(\)"),
        (X.to(torch.float8_e4m3fn), Y, TypeError, "float32 or float64; got torch.float8_e4m3fn"),
        (X.to(torch.complex64), Y, TypeError, "got torch.complex64: give its real part"),
        (X.byte(), Y, TypeError, "got torch.uint8: pixels from 0 to 255 are given as x / 255"),
        (X.numpy().astype(int), Y, TypeError, "got int64: convert it to float32"),
        (torch.nested.nested_tensor([X, X]), Y, TypeError, "x must be a plain torch.Tensor"),
        (crc.load("digits"), Y, TypeError, "got Dataset: give the items of a part of it"),
        (crc.load("digits").test, Y, TypeError, "got Split: give its items and labels"),
        ((X, Y), None, TypeError, "got tuple: torch.stack"),
        (None, Y, TypeError, "x must be a floating-point tensor or NumPy array; got NoneType"),
        (X, Y.to("meta"), TypeError, "y must be a dense tensor that holds numbers"),
        (X, Y.double(), TypeError, "y must hold integers, the indices of classes; got a tensor of"),
        (X, "cats", TypeError, "y must hold integers; got 'cats'"),
        (X, torch.ones(4, 4), ValueError, "rows of zeros and a single one"),
        (X, one_hot(Y, 5), ValueError, r"or \(4, 4\) one-hot rows; got \(4, 5\)"),
        (X, 1, ValueError, r"y must be \(4,\), one class an item"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_sentence(model, call, x, y, error, message):
    with pytest.raises(error, match=message):
        call(model, x, y)


@pytest.mark.parametrize("call", [crc.verify, crc.attack])
@pytest.mark.parametrize(
    ("radius", "error", "message"),
    [
        (torch.ones(3), ValueError, r"a number, or \(4,\), one an item; got \(3,\)"),
        (torch.ones(4, 1), ValueError, r"a number, or \(4,\), one an item; got \(4, 1\)"),
        (torch.tensor([1.0, 1, 1, torch.nan]), ValueError, "positive and finite; got nan"),
        (torch.tensor([1.0, 1, 1, -2]), ValueError, "positive and finite; got -2"),
        (torch.tensor([1.0, 1, 1, 1e101], dtype=torch.float64), ValueError, "from 1e-100 to"),
        (torch.ones(4, device="meta"), TypeError, "radius must be a real number"),
        (torch.ones(4, dtype=torch.complex64), TypeError, "radius must be a real number"),
        (1j, TypeError, "radius must be a real number; got 1j"),
        (True, TypeError, "radius must be a real number; got True"),
        (["a"], TypeError, "radius must be a real number"),
    ],
)
def test_radii_that_are_none_are_refused(model, call, radius, error, message):
    with pytest.raises(error, match=message):
        call(model, X, Y, radius)


def test_a_verdict_needs_a_radius(model):
    with pytest.raises(TypeError, match="radius must be a real number, or one an item; got None"):
        crc.verify(model, X, Y)


@pytest.mark.parametrize(
    ("box", "error", "message"),
    [
        ((torch.zeros(4), 1.0), ValueError, r"or broadcast to the shape \(4, 12\)"),
        ((torch.zeros(4, device="meta"), 1.0), TypeError, "must be a pair"),
        ((torch.tensor([torch.nan]), 1.0), ValueError, "must be a number, not NaN"),
        ((0, 1, 2), TypeError, r"must be a pair \(lowest, highest\); got \(0, 1, 2\)"),
        ((X + 0.1, 2.0), ValueError, "hold every input; 4 of 4 lie outside"),
    ],
)
def test_boxes_that_are_none_are_refused(model, box, error, message):
    for call in CALLS:
        with pytest.raises(error, match=message):
            call(model, X, Y, box=box)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": torch.tensor([2, 3])}, TypeError, "steps must be an integer; got a tensor"),
        ({"steps": 2.5}, TypeError, "steps must be an integer; got 2.5"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1"),
        ({"seed": "a"}, TypeError, "seed must be an integer"),
        ({"seed": 2**80}, ValueError, "seed must be at least 0 and below"),
    ],
)
def test_settings_of_an_attack_are_checked(model, options, error, message):
    with pytest.raises(error, match=message):
        crc.attack(model, X, Y, **options)


def test_a_split_is_what_is_trained_on():
    data = crc.load("digits")
    for given_, message in ((data, "got Dataset: give a part of it"), (X, "got Tensor")):
        with pytest.raises(TypeError, match=message):
            crc.train(crc.mlp([64, 8, 10]), given_, crc.Recipe("standard", epochs=1))


def test_no_option_depends_on_the_order_of_the_others(model, x):
    for box, curvature, method in itertools.product(
        (None, (0.0, 1.0)), ("global", "local"), ("dual", "best")
    ):
        options = {"box": box, "curvature": curvature, "method": method}
        radius = crc.certify(model, x, **options).radius
        shrunk = crc.verify(model, x, radius=0.999 * radius.clamp(max=1e6), **options)
        assert shrunk.robust.all()


def test_bounds_of_curvature_refuse_the_same(model):
    for bad, error in ((X.to("meta"), TypeError), (X.to_sparse(), TypeError), (X / 0, ValueError)):
        with pytest.raises(error, match="x must"):
            crc.curvature_bounds(model, 0, 1, bad, 0.5)
    low, high = crc.curvature_bounds(model, 0, 1, X.numpy(), 0.5)
    assert (low <= 0).all() and (high >= 0).all()
