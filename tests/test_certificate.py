"""Certificates: sound against attacks, tight where the distance is known, clear about bad input."""

import importlib.util
import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import EVERY, SMOOTH, examples, random_networks
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize, minimize_scalar
from torch import nn

import crcbook as crc
from crcbook.attacks import smallest_margin
from crcbook.networks import read_network


def with_parameters(model, *values):
    """Overwrite a model's parameters."""
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype))
    return model


def inputs_and_predictions(model, generator, count=4):
    x = torch.randn(count, model[1].in_features, generator=generator, dtype=torch.float64)
    return x, model(x).argmax(1)


@given(random_networks(activations=EVERY))
def test_no_attack_beats_a_certificate(case):
    model, generator = case
    x, y = inputs_and_predictions(model, generator)
    certificate = crc.certify(model, x, y)
    attacked = crc.attack(model, x, y, restarts=3)
    assert (attacked.distance >= certificate.radius).all()
    inside = certificate.radius.clamp(max=1e6)[:, None] * (1 - 1e-9)
    for _ in range(50):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        point = x + inside * nn.functional.normalize(direction, dim=1)
        assert (smallest_margin(read_network(model), point, y) > -1e-9).all()


@given(random_networks(activations=EVERY), st.sampled_from([0.05, 0.5, 2.0]))
def test_no_attack_beats_a_verdict(case, radius):
    model, generator = case
    x, y = inputs_and_predictions(model, generator)
    verdict = crc.verify(model, x, y, radius)
    attacked = crc.attack(model, x, y, radius=radius, restarts=3)
    assert not (verdict.robust & attacked.success).any()
    assert (verdict.margin <= attacked.margin).all()
    assert torch.equal(verdict.robust, verdict.margin > 0)


@given(random_networks(activations=EVERY))
def test_exact_radii_have_an_adversary_at_that_distance(case):
    model, generator = case
    x, y = inputs_and_predictions(model, generator, count=8)
    certificate = crc.certify(model, x, y)
    distance = (certificate.nearest - x).norm(dim=1)
    margin = smallest_margin(read_network(model), certificate.nearest, y)
    exact = certificate.exact
    assert (distance[exact] <= certificate.radius[exact] * (1 + 1e-6)).all()
    found = ~certificate.nearest.isnan().any(1)
    assert found[exact].all() and (margin[found] <= 0).all()
    assert (distance[found] >= certificate.radius[found]).all()


@given(random_networks(activations=EVERY))
def test_runner_up_is_never_below_all(case):
    model, generator = case
    x, y = inputs_and_predictions(model, generator)
    every, runner_up = (crc.certify(model, x, y, targets=t) for t in ("all", "runner-up"))
    assert (runner_up.radius >= every.radius).all()
    assert (every.targets, runner_up.targets) == ("all", "runner-up")


def test_linear_networks_get_their_exact_distance():
    model = crc.mlp([6, 4], seed=0).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(0), count=20)
    weight, logits = model[1].weight.detach(), model(x).detach()
    gap = logits.gather(1, y[:, None]) - logits
    distance = gap / (weight[y][:, None] - weight).norm(dim=2)
    distance[gap == 0] = torch.inf
    certificate = crc.certify(model, x, y)
    torch.testing.assert_close(certificate.radius, distance.amin(1), rtol=1e-9, atol=0)
    assert torch.equal(certificate.target, distance.argmin(1))
    assert certificate.exact.all()


@pytest.mark.parametrize("activation", SMOOTH)
def test_one_dimension_matches_root_finding(activation):
    model = crc.mlp([1, 6, 2], activation, seed=5).double()
    with torch.no_grad():
        model[1].weight.mul_(0.6)
    grid = torch.linspace(-30, 30, 6001, dtype=torch.float64)[:, None]
    network = read_network(model)

    def margin(point):
        logits = network.logits(torch.tensor([[point]], dtype=torch.float64))[0]
        return (logits[0] - logits[1]).item()

    values = network.logits(grid) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    crossings = (values[:-1] * values[1:] < 0).nonzero().flatten().tolist()
    roots = [brentq(margin, grid[i].item(), grid[i + 1].item(), xtol=1e-13) for i in crossings]
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    certificate = crc.certify(model, x, model(x).argmax(1))
    for point, radius, exact in zip(x, certificate.radius, certificate.exact, strict=True):
        distance = min((abs(point.item() - root) for root in roots), default=math.inf)
        assert radius <= distance * (1 + 1e-9)
        if exact:
            assert radius.item() == pytest.approx(distance, rel=2e-6)


def dual_radius(model, x, label, target):
    """The paper's dual, solved by scipy: max over eta of min_x |x - x0|^2 / 2 + eta f(x)."""
    network = read_network(model)
    m = crc.curvature_bounds(model, label, target)[0].item()
    label, target = torch.tensor([label]), torch.tensor([target])

    def inner(eta):
        def objective(point):
            point = torch.tensor(point)[None]
            f, g = network.margin_and_gradient(point, label, target)
            away = point - x
            value = (away**2).sum() / 2 + eta * f[0]
            return value.item(), (away + eta * g)[0].numpy()

        start = x.numpy().ravel()
        return minimize(objective, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-15}).fun

    best = minimize_scalar(lambda eta: -inner(eta), bounds=(0, 1 / -m), method="bounded",
                           options={"xatol": 1e-10 / -m})  # fmt: skip
    return math.sqrt(2 * max(0.0, -best.fun))


@pytest.mark.parametrize("activation", ["softplus", "sigmoid", "tanh"])
@pytest.mark.parametrize("scale", [0.7, 1.5, 3.0])
def test_radius_matches_an_independent_dual_solver(activation, scale):
    model = crc.mlp([4, 10, 2], activation, seed=8).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(2), count=6)
    certificate = crc.certify(model, x, y, method="dual")
    for point, label, radius in zip(x, y, certificate.radius, strict=True):
        if radius < math.inf:
            reference = dual_radius(model, point[None], int(label), 1 - int(label))
            assert radius.item() == pytest.approx(reference, rel=1e-3)


def test_radius_is_at_least_the_closed_form(digits, digits_model):
    x, y = digits.test.x[:100], digits.test.y[:100]
    certificate = crc.certify(digits_model, x, y)
    network = read_network(digits_model)
    closed = torch.full((100,), torch.inf, dtype=torch.float64)
    for target in range(10):
        targets = torch.full_like(y, target)
        f, g = network.margin_and_gradient(x.flatten(1).double(), y, targets)
        k = -crc.curvature_bounds(digits_model, y, targets)[0]
        radius = 2 * f / (g.norm(dim=1) + (g.square().sum(1) + 2 * k * f).sqrt())
        closed = torch.where(y == target, closed, torch.minimum(closed, radius))
    assert (certificate.radius >= closed.nan_to_num(0).clamp(min=0) * (1 - 1e-9)).all()


def test_trained_digits_are_nearly_all_exact(digits, digits_model):
    x, y = digits.test.x, digits.test.y
    certificate = crc.certify(digits_model, x, y)
    attacked = crc.attack(digits_model, x, y)
    assert certificate.exact.double().mean() > 0.9
    assert (attacked.distance >= certificate.radius).all()
    reached = certificate.exact & (certificate.radius > 0)
    ratio = attacked.distance[reached] / certificate.radius[reached]
    assert ratio.max() < 1.25 and ratio.median() < 1.001
    robust = crc.verify(digits_model, x, y, 0.5).robust
    assert (robust == (certificate.radius > 0.5)).double().mean() > 0.995


def test_a_third_class_can_be_closer_than_the_runner_up():
    # Logits 1, 0.9 and -2 + 10 x_2: the runner-up's boundary is at x_1 = -1, the third class's
    # at x_2 = 0.3.
    model = with_parameters(
        crc.mlp([2, 3]).double(), [[0.1, 0.0], [0.0, 0.0], [0.0, 10.0]], [1.0, 0.9, -2.0]
    )
    x, y = torch.zeros(1, 2), torch.tensor([0])
    every, runner_up = (crc.certify(model, x, y, targets=t) for t in ("all", "runner-up"))
    assert runner_up.radius.item() == pytest.approx(1.0) and runner_up.target == 1
    assert every.radius.item() == pytest.approx(0.3, rel=1e-3) and every.target == 2


def test_misclassified_and_tied_images_have_radius_zero():
    model = with_parameters(crc.mlp([2, 3]).double(), torch.zeros(3, 2), [0.0, 0.0, -1.0])
    x, y = torch.zeros(2, 2), torch.tensor([0, 2])
    certificate = crc.certify(model, x, y)
    assert certificate.radius.tolist() == [0, 0]
    assert certificate.target.tolist() == [1, 0]
    # Rounding could have made the tie; no rounding made the other one.
    assert certificate.exact.tolist() == [False, True]
    assert certificate.nearest[0].isnan().all() and not certificate.nearest[1].any()
    assert not crc.verify(model, x, y, 0.1).robust.any()


def test_radius_is_infinite_where_no_adversary_exists():
    constant = with_parameters(crc.mlp([2, 2]).double(), torch.zeros(2, 2), [1.0, 0.0])
    bounded = crc.mlp([2, 4, 2], "tanh", seed=0).double()
    with torch.no_grad():
        bounded[3].bias.copy_(torch.tensor([100.0, 0.0]))
    x, y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0])
    for model in (constant, bounded):
        certificate = crc.certify(model, x, y)
        assert (certificate.radius == torch.inf).all()
        assert not certificate.exact.any() and certificate.nearest.isnan().all()
        assert crc.verify(model, x, y, 5).robust.all()


def test_duplicate_classes_tie_everywhere():
    model = crc.mlp([3, 6, 3], seed=1).double()
    with torch.no_grad():
        model[3].weight[1], model[3].bias[1] = model[3].weight[0], model[3].bias[0]
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    certificate = crc.certify(model, x, torch.zeros(20, dtype=torch.int64))
    assert (certificate.radius == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", SMOOTH)
def test_extreme_scales_stay_sound(scale, dtype, activation):
    model = crc.mlp([5, 9, 3], activation, seed=6).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(3), dtype=dtype)
    y = read_network(model).logits(x.double()).argmax(1)
    certificate = crc.certify(model, x, y)
    attacked = crc.attack(model, x, y, restarts=3)
    assert not certificate.radius.isnan().any()
    assert (attacked.distance >= certificate.radius).all()


def test_radii_scale_with_the_inputs():
    model = crc.mlp([4, 9, 3], seed=3).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(1))
    shrunk = crc.mlp([4, 9, 3], seed=3).double()
    with torch.no_grad():
        shrunk[1].weight.mul_(8)  # a power of two: the same network on x / 8, exactly
    radius, small = crc.certify(model, x, y).radius, crc.certify(shrunk, x / 8, y).radius
    torch.testing.assert_close(small * 8, radius, rtol=1e-5, atol=0)


def test_an_overflowing_image_leaves_the_others_alone():
    model = crc.mlp([3, 8, 3], seed=0).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(0))
    alone = crc.certify(model, x, y)
    x[1] = 1e308
    together = crc.certify(model, x, y)
    assert together.radius[1] == 0
    others = [0, 2, 3]
    torch.testing.assert_close(together.radius[others], alone.radius[others], rtol=1e-9, atol=0)


def test_order_and_company_of_images_do_not_matter(digits, digits_model):
    x, y = digits.test.x[:40], digits.test.y[:40]
    radius = crc.certify(digits_model, x, y).radius
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = crc.certify(digits_model, x[order], y[order]).radius
    torch.testing.assert_close(shuffled, radius[order], rtol=1e-7, atol=0)
    for index in range(5):
        alone = crc.certify(digits_model, x[index : index + 1], y[index : index + 1]).radius
        torch.testing.assert_close(alone[0], radius[index], rtol=1e-7, atol=0)


@pytest.mark.parametrize("values", [1, 2**9])
def test_how_many_are_looked_at_together_does_not_matter(digits, digits_model, monkeypatch, values):
    part = digits.test.take(slice(0, 40))
    whole = crc.certify(digits_model, part.x, part.y)
    verdict = crc.verify(digits_model, part.x, part.y, 0.5)
    monkeypatch.setattr("crcbook.certificate.table._CACHED_VALUES", values)
    monkeypatch.setattr("crcbook.certificate.certificate._CHUNK_VALUES", 100 * values)
    parts = crc.certify(digits_model, part.x, part.y)
    torch.testing.assert_close(parts.radius, whole.radius, rtol=1e-6, atol=0)
    assert torch.equal(parts.target, whole.target) and torch.equal(parts.exact, whole.exact)
    again = crc.verify(digits_model, part.x, part.y, 0.5)
    assert torch.equal(again.robust, verdict.robust)


def test_a_saturated_plateau_is_no_certificate_of_safety():
    # sigmoid(40 (x - 1)): at x = 0 value and gradient have all but vanished, the boundary is at 1.
    model = with_parameters(
        crc.mlp([1, 1, 2], "sigmoid").double(), [[40.0]], [-40.0], [[0.0], [1.0]], [0.5, 0.0]
    )
    certificate = crc.certify(model, torch.zeros(1, 1), torch.tensor([0]))
    assert 0 < certificate.radius.item() <= 1
    assert certificate.nearest.item() == pytest.approx(1, rel=1e-6)


def test_an_edited_model_is_certified_again():
    model = crc.mlp([4, 8, 3], seed=0).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(0))
    before = crc.certify(model, x, y).radius
    with torch.no_grad():
        model[1].weight.mul_(2)
        model[1].bias.mul_(2)
    after = crc.certify(model, x, model(x).argmax(1)).radius
    fresh = crc.certify(crc.mlp([4, 8, 3]).double(), x, y).radius  # unrelated: fills the cache
    assert len(fresh) == 4 and not torch.allclose(before, after)
    attacked = crc.attack(model, x, model(x).argmax(1), restarts=3)
    assert (attacked.distance >= after).all()


def test_images_in_any_shape_are_flattened(digits):
    # A network of its own: which curvatures are computed together shows in their last digits.
    model = crc.mlp([64, 24, 10], seed=3)
    x, y = digits.test.x[:5], model(digits.test.x[:5]).argmax(1)
    assert x.shape == (5, 8, 8)
    flat = crc.certify(model, x.flatten(1), y)
    assert torch.equal(crc.certify(model, x, y).radius, flat.radius)
    assert flat.nearest.shape == (5, 64) and flat.radius.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_labels_are_integers_of_any_kind(dtype):
    model = crc.mlp([4, 8, 3], seed=0).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(0))
    assert torch.equal(crc.certify(model, x, y.to(dtype)).radius, crc.certify(model, x, y).radius)


def test_no_gradient_leaves_a_certificate():
    model = crc.mlp([4, 8, 3], seed=0).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(0))
    box = tuple(torch.full((4,), end, requires_grad=True) for end in (-9.0, 9.0))
    found = crc.certify(model, x.requires_grad_(), y, box=box)
    assert not found.radius.requires_grad and not found.nearest.requires_grad
    assert not crc.attack(model, x, y, box=box).point.requires_grad


GOOD_X, GOOD_Y = torch.zeros(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize("call", [crc.certify, lambda *a: crc.verify(*a, 0.5), crc.attack])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.full((2, 4), torch.nan), GOOD_Y, ValueError, "x must be finite"),
        (torch.full((2, 4), torch.inf), GOOD_Y, ValueError, "x must be finite"),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ValueError, "at least one item"),
        (torch.zeros(2, 5), GOOD_Y, ValueError, r"4 inputs are needed; got items of shape \(5,\)"),
        (torch.zeros(4), GOOD_Y, ValueError, r"y must be \(1,\), one class an item"),
        (torch.zeros(2, 4, dtype=torch.int64), GOOD_Y, TypeError, "floating-point"),
        (
            [[0.0] * 4] * 2,
            GOOD_Y,
            TypeError,
            "x must be a floating-point tensor or NumPy array; got list",
        ),
        (GOOD_X, torch.tensor([0, 3]), ValueError, r"y must be in 0\.\.2"),
        (GOOD_X, torch.tensor([0, -1]), ValueError, r"y must be in 0\.\.2"),
        (GOOD_X, torch.tensor([0, 1, 1]), ValueError, r"y must be \(2,\)"),
        (GOOD_X, torch.tensor([0.0, 1.0]), TypeError, "y must hold integers"),
    ],
)
def test_bad_input_is_refused(call, x, y, error, message):
    with pytest.raises(error, match=message):
        call(crc.mlp([4, 8, 3]), x, y)


def test_bad_options_are_refused():
    model = crc.mlp([4, 8, 3])
    with pytest.raises(ValueError, match="targets must be one of all, runner-up"):
        crc.certify(model, GOOD_X, GOOD_Y, targets="second")
    with pytest.raises(ValueError, match="curvature must be one of global, local"):
        crc.certify(model, GOOD_X, GOOD_Y, curvature="nearby")
    for radius in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="radius must be positive"):
            crc.verify(model, GOOD_X, GOOD_Y, radius)
    with pytest.raises(TypeError, match="radius must be a real number"):
        crc.verify(model, GOOD_X, GOOD_Y, "wide")
    relu = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="smooth activation"):
        crc.certify(relu, GOOD_X, GOOD_Y)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        crc.certify(torch.relu, GOOD_X, GOOD_Y)


@given(random_networks(activations=EVERY), st.sampled_from([0.0, 0.3, 2.0]))
def test_a_box_helps_and_no_attack_inside_it_beats_a_certificate(case, room):
    model, generator = case
    x, y = inputs_and_predictions(model, generator)
    box = (x.min() - room, x.max() + room)
    free, confined = crc.certify(model, x, y), crc.certify(model, x, y, box=box)
    attacked = crc.attack(model, x, y, box=box, restarts=3)
    assert (confined.radius >= free.radius).all()
    assert (attacked.distance >= confined.radius).all()
    for point in (attacked.point, confined.nearest):
        found = ~point.isnan().any(1)
        assert (point[found] >= box[0]).all() and (point[found] <= box[1]).all()
    for radius in (0.1, 1.0):
        verdict = crc.verify(model, x, y, radius, box=box)
        reached = crc.attack(model, x, y, radius=radius, box=box, restarts=3)
        assert not (verdict.robust & reached.success).any()
        assert (verdict.margin <= reached.margin).all()
        assert (verdict.robust | ~crc.verify(model, x, y, radius).robust).all()


def test_a_linear_network_in_a_box_matches_an_independent_solver():
    model = crc.mlp([3, 2], seed=1).double()
    x = torch.rand(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y = model(x).argmax(1)
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    b = (model[1].bias[0] - model[1].bias[1]).item()
    certificate = crc.certify(model, x, y, box=(0.0, 1.0))
    for point, radius, exact in zip(x, certificate.radius, certificate.exact, strict=True):
        solved = minimize(
            lambda z, point=point: ((z - point.numpy()) ** 2).sum(),
            point.numpy(),
            jac=lambda z, point=point: 2 * (z - point.numpy()),
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda z: z @ w.numpy() + b},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        if solved.success:
            assert exact
            assert radius.item() == pytest.approx(math.sqrt(solved.fun), rel=1e-5)
        else:  # the boundary does not cross the box
            assert radius == math.inf


def test_a_box_of_tensors_bounds_each_coordinate():
    model = with_parameters(crc.mlp([2, 2]).double(), [[-1.0, -1.0], [0.0, 0.0]], [1.0, 0.0])
    x, y = torch.zeros(1, 2), torch.tensor([0])  # the boundary is x_1 + x_2 = 1
    box = (torch.tensor([-1.0, -1.0]), torch.tensor([0.2, 5.0]))
    certificate = crc.certify(model, x, y, box=box)
    assert certificate.radius.item() == pytest.approx(math.hypot(0.2, 0.8), rel=1e-7)
    assert certificate.nearest[0].tolist() == pytest.approx([0.2, 0.8], rel=1e-5)
    assert certificate.exact.all()
    closed = (torch.tensor([-1.0, -1.0]), torch.tensor([0.2, 0.5]))
    assert crc.certify(model, x, y, box=closed).radius == math.inf


def test_a_box_of_python_numbers_is_taken_in_double_precision():
    model = with_parameters(crc.mlp([1, 2]).double(), [[-1.0], [0.0]], [0.9, 0.0])
    x, y = torch.tensor([[0.1]], dtype=torch.float64), torch.tensor([0])
    certificate = crc.certify(model, x, y, box=(0.1, 0.9))  # the boundary is the box's end
    assert certificate.radius.item() == pytest.approx(0.8, rel=1e-9)


@pytest.mark.parametrize(
    ("box", "error", "message"),
    [
        ((0.5, 1.0), ValueError, "hold every input"),
        ((1.0, -1.0), ValueError, "lowest <= highest"),
        ((math.nan, 1.0), ValueError, "not NaN"),
        ((torch.zeros(3), torch.ones(3)), ValueError, "one number or 4, an input's"),
        (0.5, TypeError, "must be a pair"),
        ("ab", TypeError, "must be a pair"),
    ],
)
def test_impossible_boxes_are_refused(box, error, message):
    for call in (crc.certify, crc.attack):
        with pytest.raises(error, match=message):
            call(crc.mlp([4, 8, 3]), GOOD_X, GOOD_Y, box=box)


@given(random_networks(max_inputs=4, max_width=8, activations=EVERY), st.booleans())
@examples(1 / 4)
def test_local_curvature_helps_and_no_attack_beats_it(case, boxed):
    model, generator = case
    x, y = inputs_and_predictions(model, generator)
    box = (x.min() - 0.5, x.max() + 0.5) if boxed else None
    wide, local = (crc.certify(model, x, y, box=box, curvature=c) for c in ("global", "local"))
    attacked = crc.attack(model, x, y, box=box, restarts=3)
    assert (local.radius >= wide.radius).all()
    assert (attacked.distance >= local.radius).all()
    assert (local.exact | ~wide.exact).all()
    radius = float(attacked.distance.nan_to_num(posinf=1.0).median()) + 0.01
    verdicts = [crc.verify(model, x, y, radius, box=box, curvature=c) for c in ("global", "local")]
    reached = crc.attack(model, x, y, radius=radius, box=box, restarts=3)
    assert (verdicts[1].robust | ~verdicts[0].robust).all()
    assert not (verdicts[1].robust & reached.success).any()


@pytest.fixture(scope="module")
def tanh_model(digits):
    """A network of three layers, trained as usual."""
    model = crc.mlp([64, 24, 24, 10], "tanh", seed=0)
    crc.train(model, digits.train, crc.Recipe("standard", epochs=15, batch_size=64))
    return model


def test_box_and_local_curvature_together_are_never_below_either(digits, tanh_model):
    model, x, y = tanh_model, digits.test.x[:8], digits.test.y[:8]
    both = crc.certify(model, x, y, box=(0.0, 1.0), curvature="local").radius
    assert (both >= crc.certify(model, x, y, box=(0.0, 1.0)).radius).all()
    local = crc.certify(model, x, y, curvature="local").radius
    plain = crc.certify(model, x, y).radius
    assert (both >= local).all() and (local >= plain).all()
    assert local.mean() > 1.02 * plain.mean()
    assert (crc.attack(model, x, y, box=(0.0, 1.0), restarts=3).distance >= both).all()


def test_verdicts_given_up_with_many_inputs_are_few(digits, tanh_model):
    model = tanh_model
    # More inputs, which no layer looks at: only what is worth trying changes.
    wide = crc.mlp([200, 24, 24, 10], "tanh", seed=0)
    with torch.no_grad():
        for parameter, mine in zip(wide.parameters(), model.parameters(), strict=True):
            parameter.zero_()[tuple(slice(0, size) for size in mine.shape)] = mine
    x, y = digits.test.x[:120].flatten(1), digits.test.y[:120]
    padded = torch.nn.functional.pad(x, (0, 200 - 64))
    radius = 1.4 * crc.certify(model, x, y).radius.median().item()
    known = crc.verify(wide, padded, y, radius).robust
    few = crc.verify(model, x, y, radius, curvature="local").robust
    many = crc.verify(wide, padded, y, radius, curvature="local").robust
    assert (few | ~many).all() and (many | ~known).all()
    assert known.sum() < many.sum() and few.sum() <= 1.1 * many.sum()


def test_verdicts_with_local_curvature_do_not_depend_on_the_batch():
    # Proving an undecided image against another image's classes once made the second one "robust".
    model = crc.mlp([2, 8, 5], "silu", seed=70).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    x = torch.tensor(
        [[3.932974607481928, 0.8295098203788683], [-0.9372282349656775, 0.36151017470891417]],
        dtype=torch.float64,
    )
    y, radius = torch.tensor([4, 2]), 0.6489731590697022
    both = crc.verify(model, x, y, radius, curvature="local")
    for i in range(2):
        alone = crc.verify(model, x[i : i + 1], y[i : i + 1], radius, curvature="local")
        assert alone.robust == both.robust[i]
        assert alone.margin.item() == pytest.approx(both.margin[i].item(), rel=1e-6)
    assert not both.robust[1]


@given(random_networks(max_inputs=3, max_width=8, activations=EVERY))
@examples(1 / 4)
def test_local_verdicts_agree_with_distances_in_any_batch(case):
    model, generator = case
    x, y = inputs_and_predictions(model, generator, count=12)
    distance = crc.attack(model, x, y, restarts=4).distance
    if distance.isfinite().any():
        radius = distance[distance.isfinite()].median().item() * 1.0001
        verdict = crc.verify(model, x, y, radius, curvature="local")
        assert not (verdict.robust & (distance < radius)).any()


@given(random_networks(max_inputs=2, max_width=5, max_classes=3, activations=EVERY))
@examples(1 / 5)
def test_every_option_that_helps_never_hurts(case):
    model, generator = case
    x = torch.rand(3, model[1].in_features, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    box, local, runner_up = {"box": (0.0, 1.0)}, {"curvature": "local"}, {"targets": "runner-up"}
    plain, confined, near, both, easy = (
        crc.certify(model, x, y, **options).radius
        for options in ({}, box, local, box | local, local | runner_up)
    )
    assert (confined >= plain).all() and (near >= plain).all() and (easy >= near).all()
    assert (both >= near).all() and (both >= confined).all()


@pytest.mark.parametrize("scale", [1e-50, 1e-20, 1e20, 1e49])
def test_the_smallest_and_the_largest_weights_promise_nothing_false(scale):
    x, y = torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([0])
    for depth in (1, 2):
        layers = [nn.Linear(2, 2, bias=False).double() for _ in range(depth)]
        for layer in layers:
            layer.weight.data = torch.eye(2, dtype=torch.float64) * scale
        # Both are nearly lines there; without one the two maps would be read as one.
        between = nn.Tanh() if scale < 1 else nn.Softplus()
        model = nn.Sequential(*layers[:1], *([between, layers[1]] if depth > 1 else []))
        for name in ("dual", "closed-form", "lipschitz", "crown"):
            certificate = crc.certify(model, x, y, method=name)
            assert 0 < certificate.radius.item() <= 0.125**0.5 * (1 + 1e-9)


def test_the_smallest_and_the_largest_radii_are_answered():
    model = crc.mlp([3, 8, 3], seed=0).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(0))
    for box in (None, (-9.0, 9.0)):
        for curvature in ("global", "local"):
            options = {"box": box, "curvature": curvature}
            assert crc.verify(model, x, y, 1e-100, **options).robust.all()
            wide = crc.verify(model, x, y, 1e100, **options)
            assert not (wide.margin.isnan() | wide.robust).any()
            for radius in (1e-101, 1e101):
                with pytest.raises(ValueError, match="radius must be from"):
                    crc.verify(model, x, y, radius, **options)


def test_a_tie_up_to_rounding_gets_a_tiny_radius_at_most():
    """An input whose margin is the last bit of its logits, and one next to 0."""
    line = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    line[0].weight.data = torch.eye(3, 2, dtype=torch.float64)
    line[2].weight.data = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]], dtype=torch.float64)
    for layer in (line[0], line[2]):
        layer.bias.data.zero_()
    x = torch.tensor([[1e-162, 5e-162], [1e-99, 0], [1e-17, 1.0]], dtype=torch.float64)
    for options in ({}, {"box": (-1.0, 1.0)}, {"curvature": "local"}):
        radius = crc.certify(line, x, torch.zeros(3, dtype=torch.int64), **options).radius
        assert (radius <= x[:, 0]).all()


def test_a_radius_of_nothing_is_exact_only_where_that_is_proved():
    """Inputs on the boundary, as far as float64 can tell; fractions can."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2)).double()
    with_parameters(model, torch.randn(2, 5, generator=generator), [0.0, 0.0])
    rows = model[0].weight.detach()
    way = rows[0] - rows[1]
    x = torch.randn(300, 5, dtype=torch.float64, generator=generator)
    x = x - (x @ way)[:, None] * way / way.square().sum()
    first, second = ([Fraction(value) for value in row] for row in rows.tolist())
    weights = [a - b for a, b in zip(first, second, strict=True)]
    margin = [sum(w * Fraction(v) for w, v in zip(weights, row, strict=True)) for row in x.tolist()]
    y = torch.tensor([int(value < 0) for value in margin])  # right, if only just
    certificate = crc.certify(model, x, y)
    assert (certificate.radius == 0).sum() > 50
    assert not certificate.exact[certificate.radius == 0].any()
    assert certificate.nearest[certificate.radius == 0].isnan().all()
    wrong = crc.certify(model, x + way, torch.ones_like(y))
    assert wrong.exact.all() and not wrong.radius.any()
    torch.testing.assert_close(wrong.nearest, x + way, rtol=0, atol=0)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.SiLU(), nn.GELU()])
@pytest.mark.parametrize(("size", "weight", "last"), [(1e-163, 1.0, 1.0), (1e-303, 1e-20, 5e49)])
def test_what_underflow_takes_is_no_radius(size, weight, last, activation):
    """Margins that are rounding alone, where squares underflow, or where products do."""
    generator = torch.Generator().manual_seed(0)
    x, row = torch.randn(301, 30, dtype=torch.float64, generator=generator).split([300, 1])
    model = nn.Sequential(nn.Linear(30, 1), activation, nn.Linear(1, 2)).double()
    with_parameters(model, weight * (1 + row.abs()), 0.0, [[last], [-last]], 0.0)
    x[:, -1] = -(x[:, :-1] @ model[0].weight[0, :-1].detach()) / model[0].weight[0, -1].detach()
    x = size * x
    first = [Fraction(value) for value in model[0].weight[0].tolist()]
    exact = [sum(w * Fraction(v) for w, v in zip(first, row, strict=True)) for row in x.tolist()]
    # The activations have the sign of their argument.
    wrong = torch.tensor([int(margin > 0) for margin in exact])
    boxed, local = {"box": (-1.0, 1.0)}, {"curvature": "local"}
    methods = ("closed-form", "lipschitz", "crown", "best")
    for options in ({}, boxed, local, *({"method": method} for method in methods)):
        assert not crc.certify(model, x, wrong, **options).radius.any(), options


def test_logits_beyond_squares_have_no_infinite_radius():
    model = nn.Sequential(nn.Linear(1, 2)).double()
    model[0].weight.data = torch.tensor([[1e50], [0.0]], dtype=torch.float64)
    model[0].bias.data.zero_()
    y = torch.tensor([0])
    for size in (1e20, 1e103, 1e154, 1e258, 1e308):
        x = torch.full((1, 1), size, dtype=torch.float64)
        for box in (None, (-size, size)):
            assert (
                crc.certify(model, x, y, box=box, method="best" if box is None else "dual").radius
                <= size
            )


def test_inference_mode_leaves_the_model_usable():
    model = crc.mlp([3, 8, 3], seed=11).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inside = crc.certify(model, x, y, targets="runner-up").radius
    assert (crc.certify(model, x, y).radius <= inside).all()


# What a search for the largest radius may leave of it, where it ends sooner than the others'.
LEFT = {"dual": 0.0, "closed-form": 0.0, "lipschitz": 0.0, "crown": 0.0, "parabolas": 2e-2}
METHODS = tuple(LEFT)


@given(random_networks(max_width=8, activations=EVERY))
@examples(1 / 3)
def test_no_attack_beats_any_method_and_the_best_is_the_largest(case):
    model, generator = case
    x, y = inputs_and_predictions(model, generator)
    attacked = crc.attack(model, x, y, restarts=3)
    radii = {name: crc.certify(model, x, y, method=name).radius for name in METHODS}
    best = crc.certify(model, x, y, method="best")
    for name, radius in radii.items():
        assert (attacked.distance >= radius).all()
        if name == "parabolas":  # whose search depends on where it begins, or is left out
            continue
        # The rivals are not asked where an adversary is near.
        near = best.radius >= 0.8 * best.distance
        assert ((best.radius >= radius) | near).all()
    # Where a search begins decides its last digits.
    assert (best.radius >= radii["dual"] * (1 - 1e-6)).all()
    assert (radii["dual"] >= radii["closed-form"]).all()
    assert (attacked.distance >= best.radius).all()


@given(random_networks(max_width=8, activations=EVERY), st.sampled_from([None, (-9.0, 9.0)]))
@examples(1 / 3)
def test_the_default_decides_whatever_the_dual_does(case, box):
    model, generator = case
    x, y = inputs_and_predictions(model, generator)
    for curvature in ("global", "local"):
        options = {"box": box, "curvature": curvature}
        dual, best = (crc.certify(model, x, y, method=m, **options) for m in ("dual", "best"))
        assert (best.radius >= dual.radius * (1 - 1e-6)).all()
        for radius in (0.05, 0.5, dual.radius.clamp(1e-3, 5)):
            dual, best = (
                crc.verify(model, x, y, radius, method=m, **options) for m in ("dual", "best")
            )
            assert (best.robust | ~dual.robust).all()


@pytest.mark.parametrize("options", [{"box": (0.0, 1.0)}, {"targets": "runner-up"}], ids=str)
def test_the_best_says_which_it_was_in_balls_too(options):
    model = crc.mlp([5, 10, 10, 10, 3], "sigmoid", seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model(x).argmax(1)
    best = crc.certify(model, x, y, curvature="local", **options)
    crown = crc.certify(model, x, y, method="crown", targets=options.get("targets", "all"))
    dual = crc.certify(model, x, y, curvature="local", method="dual", **options)
    least = torch.maximum(crown.radius, dual.radius)
    assert (best.radius >= least).all() and (crown.radius > dual.radius).any()
    for name, raised, ahead in zip(
        best.method, best.radius > least, crown.radius > dual.radius, strict=True
    ):
        assert name == ("parabolas" if raised else "crown" if ahead else name)


def test_methods_say_who_they_are_and_agree_on_linear_networks():
    model = crc.mlp([6, 4], seed=0).double()
    x, y = inputs_and_predictions(model, torch.Generator().manual_seed(0), count=5)
    exact = crc.certify(model, x, y)
    assert exact.exact.all() and exact.method == ("dual",) * 5
    for name in METHODS[1:]:
        certificate = crc.certify(model, x, y, method=name)
        assert certificate.method == (name,) * 5
        left = max(1e-3, LEFT[name])
        torch.testing.assert_close(certificate.radius, exact.radius, rtol=left, atol=0)


def test_impossible_methods_are_refused():
    model = crc.mlp([4, 8, 3])
    with pytest.raises(ValueError, match="method must be one of dual, closed-form"):
        crc.certify(model, GOOD_X, GOOD_Y, method="magic")
    for option in ({"box": (0.0, 1.0)}, {"curvature": "local"}):
        with pytest.raises(ValueError, match="neither a box nor local curvature"):
            crc.certify(model, GOOD_X, GOOD_Y, method="crown", **option)


@pytest.mark.parametrize("offset", [1.1, 1.2, 1.3, 1.45])
def test_the_search_goes_on_where_its_bound_falls_for_a_while(offset):
    model = crc.mlp([2, 2, 2]).double()
    model[1].weight.data = torch.tensor([[2.0, -1.2], [0.3, 2.0]]).double()
    model[1].bias.data = torch.tensor([0.0, -1.5]).double()
    model[3].weight.data = torch.tensor([[-1.0, -1.0], [0.0, 0.0]]).double()
    model[3].bias.data = torch.tensor([offset, 0.0]).double()
    x, y = torch.tensor([[-0.4, 0.3]]), torch.tensor([0])
    certificate = crc.certify(model, x, y)
    # At the nearest boundary point the gradient is longer than curvature times distance: no gap.
    assert certificate.exact
    assert certificate.radius.item() == pytest.approx(
        crc.attack(model, x, y, restarts=3).distance.item(), rel=1e-5
    )


def test_full_steps_would_cycle_on_a_narrow_valley():
    """About f = 25 x1^2 + 3 x2 from (.1, 0), out of softplus units."""
    model = crc.mlp([2, 4, 2]).double()
    weight = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    last = [[100.0, 100.0, 3.0, -3.0], [0.0, 0.0, 0.0, 0.0]]
    with_parameters(model, weight, torch.zeros(4), last, [-200 * math.log(2), 0.0])
    x, y = torch.tensor([[0.1, 0.0]], dtype=torch.float64), torch.tensor([0])
    certificate = crc.certify(model, x, y)
    # f = g(x1) + 3 x2 exactly, so every boundary point is (x1, -g(x1)/3).
    x1 = torch.linspace(0, 0.1, 1_000_001, dtype=torch.float64)
    g = 100 * (torch.logaddexp(x1, -x1 * 0) + torch.logaddexp(-x1, x1 * 0)) - 200 * math.log(2)
    distance = ((x1 - 0.1) ** 2 + (g / 3) ** 2).sqrt().min().item()
    assert distance * (1 - 1e-4) < certificate.radius.item() <= distance * (1 + 1e-9)


@pytest.fixture(scope="module")
def soundness():
    path = Path(__file__).parents[1] / "benchmarks" / "soundness.py"
    specification = importlib.util.spec_from_file_location("soundness", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_certificate_is_short_only_by_what_the_campaign_says(soundness):
    cases = [
        *itertools.islice(soundness.random_cases(seed=1), 0, 336, 17),
        *itertools.islice(soundness.trained_cases(seed=1), 2),
        *itertools.islice(soundness.thin_cases(seed=1), 0, 48, 9),
    ]
    for _, model, x in cases:
        for options in soundness.SETTINGS.values():
            figures = soundness.challenge(model, x[:4], options, restarts=2, seed=1)
            assert figures["violations"] == 0
            assert figures["radius"] <= figures["distance"] * (1 + 1e-9)
    for _, model, x in cases[::5]:
        for bounds in soundness.VERDICTS.values():
            assert soundness.judge(model, x[:2], bounds, restarts=2, seed=1)["violations"] == 0


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_the_campaign_counts_verdicts_that_are_wrong(soundness, box, monkeypatch):
    monkeypatch.setattr(
        "crcbook.stages.local.Local.raise_bounds",
        lambda local, question, entries, radius: torch.ones_like(entries.bound),
    )
    model, generator = crc.mlp([6, 12, 4], seed=2), torch.Generator().manual_seed(0)
    x = torch.rand(8, 6, generator=generator)
    figures = soundness.judge(model, x, box, restarts=1, seed=0)
    assert figures["violations"] > 0
