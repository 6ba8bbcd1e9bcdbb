"""Curvature bounds hold every Hessian, and are attained where theory says so."""

from fractions import Fraction

import pytest
import torch
from conftest import EVERY, SMOOTH, bent_lines, margin_hessian, random_networks, worst_on_a_line
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.checks import as_box
from crcbook.networks import deepen, read_network
from crcbook.proof.curvature import Link, local_curvature
from crcbook.proof.intervals import Region
from crcbook.proof.rounding import RoundingModel


@given(random_networks(activations=EVERY), st.sampled_from([0.1, 1.0, 5.0]))
def test_every_hessian_lies_between_the_bounds(case, spread):
    model, generator = case
    inputs = model[1].in_features
    low, high = crc.curvature_bounds(model, 0, 1)
    assert low <= 0 <= high
    for _ in range(8):
        x = spread * torch.randn(inputs, generator=generator, dtype=torch.float64)
        eigenvalues = torch.linalg.eigvalsh(margin_hessian(model, x, 0, 1))
        slack = 1e-12 * (1 + high - low)  # the rounding of the reference
        assert low - slack <= eigenvalues[0] and eigenvalues[-1] <= high + slack


@pytest.mark.parametrize("activation", SMOOTH)
def test_bounds_are_the_extreme_eigenvalues_of_the_bounding_matrices(activation):
    model = crc.mlp([7, 20, 3], activation, seed=2).double()
    weight = model[1].weight.detach()
    w = (model[3].weight[2] - model[3].weight[0]).detach()
    z = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    bend = crc.ACTIVATIONS[activation].bend(z)
    ends = torch.stack([w * bend.min(), w * bend.max()])
    below, above = (weight.T @ (d[:, None] * weight) for d in (ends.amin(0), ends.amax(0)))
    low, high = crc.curvature_bounds(model, 2, 0)
    assert low.item() == pytest.approx(torch.linalg.eigvalsh(below)[0].item(), rel=1e-6)
    assert high.item() == pytest.approx(torch.linalg.eigvalsh(above)[-1].item(), rel=1e-6)


def test_one_softplus_unit_attains_its_bound():
    model = crc.mlp([1, 1, 2], "softplus").double()
    with torch.no_grad():
        for parameter, value in zip(
            model.parameters(), (3.0, 0.0, [[2.0], [0.0]], 0.0), strict=True
        ):
            parameter.copy_(torch.tensor(value, dtype=torch.float64))
    low, high = crc.curvature_bounds(model, 0, 1)  # f = 2 softplus(3x), f'' <= 2 * 9 / 4 at 0
    assert low == 0
    assert high.item() == pytest.approx(4.5, rel=1e-10)  # rounded outward
    assert margin_hessian(model, torch.zeros(1), 0, 1).item() == pytest.approx(4.5, rel=1e-12)


def paper_bound(model, label, target):
    """The published deep bound: products of spectral norms and absolute weights."""
    layers = read_network(model).layers
    g, h = layers[0].activation.max_slope, layers[0].activation.max_bend
    reach, total = torch.linalg.matrix_norm(layers[0].weight, 2), 0.0
    paths = [(layers[-1].weight[label] - layers[-1].weight[target]).abs()]
    for layer in layers[-2:0:-1]:
        paths.insert(0, g * paths[0] @ layer.weight.abs())
    for layer, path in zip(layers[1:], paths, strict=True):
        total += h * reach**2 * path.max()
        reach = g * torch.linalg.matrix_norm(layer.weight, 2) * reach
    return total.item()


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("sizes", [[6, 20, 10, 3], [6, 15, 15, 15, 3]])
def test_deep_bounds_are_well_below_the_published_one(activation, sizes):
    model = crc.mlp(sizes, activation, seed=1)
    low, high = crc.curvature_bounds(model, 0, 1)
    assert max(-low, high).item() < 0.5 * paper_bound(model, 0, 1)


def test_a_linear_layer_between_changes_nothing():
    model = crc.mlp([4, 6, 3], "tanh", seed=0).double()
    first, last = model[1], model[3]
    split = torch.nn.Linear(4, 4).double()
    with torch.no_grad():
        split.weight.copy_(torch.eye(4))
        split.bias.zero_()
    longer = torch.nn.Sequential(split, first, model[2], last)
    expected, got = (crc.curvature_bounds(net, 0, 1) for net in (model, longer))
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert got[1].item() == pytest.approx(expected[1].item(), rel=1e-5)


def test_bounds_of_opposite_pairs_mirror_each_other():
    model = crc.mlp([5, 9, 4], "tanh", seed=1)
    low, high = crc.curvature_bounds(model, torch.tensor([0, 2]), torch.tensor([3, 1]))
    mirrored_low, mirrored_high = crc.curvature_bounds(
        model, torch.tensor([3, 1]), torch.tensor([0, 2])
    )
    assert torch.equal(low, -mirrored_high) and torch.equal(high, -mirrored_low)


def test_linear_networks_and_equal_classes_have_no_curvature():
    assert crc.curvature_bounds(crc.mlp([4, 3]), 0, 2) == (0, 0)
    assert crc.curvature_bounds(crc.mlp([4, 8, 3]), 1, 1) == (0, 0)


def test_an_edited_model_is_bounded_again():
    model = crc.mlp([4, 8, 3], seed=0)
    _, before = crc.curvature_bounds(model, 0, 1)
    with torch.no_grad():
        model[1].weight.mul_(2)
    _, after = crc.curvature_bounds(model, 0, 1)
    assert after.item() == pytest.approx(4 * before.item(), rel=1e-6)


def test_bad_classes_are_refused():
    model = crc.mlp([4, 8, 3])
    with pytest.raises(ValueError, match=r"target must be in 0\.\.2"):
        crc.curvature_bounds(model, 0, 3)
    for label in (0.5, "zero"):
        with pytest.raises(TypeError, match="label must hold integers"):
            crc.curvature_bounds(model, label, 1)
    with pytest.raises(ValueError, match="one length"):
        crc.curvature_bounds(model, torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="one length"):
        crc.curvature_bounds(model, torch.tensor([0, 1]), 2, x=torch.zeros(3, 4), radius=1.0)
    for classes in [([[0, 1]], 2), (2, [[0, 1]])]:
        with pytest.raises(ValueError, match=r"\(pairs,\) of them; got .*\(1, 2\)"):
            crc.curvature_bounds(model, *map(torch.tensor, classes))


@given(
    random_networks(activations=EVERY),
    st.sampled_from([1e-40, 0.01, 0.5, 3.0, 1e40]),
    st.booleans(),
)
def test_local_bounds_hold_every_hessian_of_the_region(case, radius, boxed):
    model, generator = case
    inputs = model[1].in_features
    x = torch.rand(2, inputs, generator=generator, dtype=torch.float64)
    box = (0.0, 1.0) if boxed else None
    low, high = crc.curvature_bounds(model, 0, 1, x=x, radius=radius, box=box)
    wide_low, wide_high = crc.curvature_bounds(model, 0, 1)
    assert (low >= wide_low).all() and (high <= wide_high).all()
    for _ in range(5):
        step = torch.randn(2, inputs, generator=generator, dtype=torch.float64)
        length = torch.rand(2, 1, generator=generator, dtype=torch.float64) ** (1 / inputs)
        points = x + radius * length * torch.nn.functional.normalize(step, dim=1)
        for i, point in enumerate(points.clamp(0, 1) if boxed else points):
            eigenvalues = torch.linalg.eigvalsh(margin_hessian(model, point, 0, 1))
            slack = 1e-12 * (1 + high[i] - low[i])
            assert low[i] - slack <= eigenvalues[0] and eigenvalues[-1] <= high[i] + slack


@pytest.mark.parametrize("activation", SMOOTH)
def test_local_bounds_close_in_on_the_hessian_of_two_layers(activation):
    model = crc.mlp([5, 12, 3], activation, seed=4).double()
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(margin_hessian(model, x[0], 1, 2))
    low, high = crc.curvature_bounds(model, 1, 2, x=x, radius=1e-7)
    assert low.item() == pytest.approx(eigenvalues[0].clamp(max=0).item(), rel=1e-4, abs=1e-6)
    assert high.item() == pytest.approx(eigenvalues[-1].clamp(min=0).item(), rel=1e-4, abs=1e-6)


def test_local_bounds_widen_with_the_ball_and_narrow_with_the_box():
    model = crc.mlp([5, 12, 8, 3], "softplus", seed=4)
    x = torch.full((1, 5), 0.5)
    lows = [crc.curvature_bounds(model, 0, 1, x=x, radius=r)[0].item() for r in (0.1, 1.0, 10.0)]
    assert lows[0] > lows[1] > lows[2]
    boxed = crc.curvature_bounds(model, 0, 1, x=x, radius=10.0, box=(0.4, 0.6))[0].item()
    assert boxed > lows[2]


def test_half_a_region_is_refused():
    model, x = crc.mlp([4, 8, 3]), torch.zeros(1, 4)
    for region in ({"x": x}, {"radius": 1.0}, {"box": (0, 1)}):
        with pytest.raises(ValueError, match="needs both x and radius"):
            crc.curvature_bounds(model, 0, 1, **region)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_product_of_links_is_within_its_error(scale):
    generator = torch.Generator().manual_seed(0)
    link, exact = None, None
    for shape in [(25, 30), (20, 25), (40, 20)]:
        weight = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        link = Link(weight, 1.0, link)
        wide = [[Fraction(value) for value in row] for row in weight.tolist()]
        exact = wide if exact is None else _product(wide, exact)
        difference = [
            [float(Fraction(value) - true) for value, true in zip(*rows, strict=True)]
            for rows in zip(link.matrix.tolist(), exact, strict=True)
        ]
        error = torch.linalg.matrix_norm(torch.tensor(difference, dtype=torch.float64), 2).item()
        assert error <= link.error <= 1e-10 * link.matrix.norm().item()
    assert error > 0 and [m.shape for m in link.matrices] == [(40, 20), (20, 25), (25, 30)]


def _product(left, right):
    columns = list(zip(*right, strict=True))
    return [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in left
    ]


def lifted(model, generator, size=0.01):
    """A network whose upper layers are nearly linear, and not quite copies."""
    deeper = deepen(model, 4)
    with torch.no_grad():
        for parameter in deeper.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(size * noise)
    return deeper


@pytest.mark.parametrize("solve", ["nothing", "balls", "entries"])
@pytest.mark.parametrize("box", [None, (-0.5, 0.5)])
@pytest.mark.parametrize("activation", SMOOTH)
def test_the_curvature_of_balls_holds_every_hessian_in_them(activation, box, solve):
    generator = torch.Generator().manual_seed(3)
    shallow = crc.mlp([5, 8, 3], activation, seed=1).double()
    deep = crc.mlp([5, 7, 6, 3], activation, seed=2).double()
    for model in (lifted(shallow, generator), deep, shallow):
        x = torch.rand(4, 5, generator=generator, dtype=torch.float64) - 0.5
        allowed = None if box is None else as_box(box, x).around(x)
        radius = torch.tensor([0.05, 0.3, 1.0, 3.0], dtype=torch.float64)
        rounding = RoundingModel.of(read_network(model))
        item = torch.arange(4).repeat(2)
        label = torch.tensor([0, 1, 2, 0, 0, 1, 2, 0])
        target = torch.tensor([1, 2, 0, 2, 2, 0, 1, 1])
        region = Region(x, radius, allowed)
        bounds = local_curvature(rounding, region, item, label, target, solve)
        everywhere = -crc.curvature_bounds(model, label, target)[0]
        assert (bounds <= everywhere).all()
        if solve != "nothing":  # never above what needs no eigenvalue problems
            assert (bounds <= local_curvature(rounding, region, item, label, target)).all()
        for entry, i in enumerate(item.tolist()):
            for _ in range(6):
                away = torch.randn(5, generator=generator, dtype=torch.float64)
                point = x[i] + radius[i] * torch.nn.functional.normalize(away, dim=0)
                point = point if box is None else point.clamp(*box)
                hessian = margin_hessian(model, point, int(label[entry]), int(target[entry]))
                least = torch.linalg.eigvalsh(hessian)[0]
                assert -least <= bounds[entry] + 1e-12 * (1 + bounds[entry])


def test_the_bound_that_certificates_use_is_the_public_one():
    model = crc.mlp([5, 7, 6, 3], "tanh", seed=2).double()
    x = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5)
    items, radius = torch.arange(2), torch.tensor([0.3, 0.3], dtype=torch.float64)
    label, target = torch.tensor([0, 1]), torch.tensor([2, 0])
    low, high = crc.curvature_bounds(model, label, target, x=x, radius=0.3)
    rounding = RoundingModel.of(read_network(model))
    for pair, bound in (((label, target), -low), ((target, label), high)):
        used = local_curvature(rounding, Region(x, radius), items, *pair, "entries")
        assert torch.equal(used, bound)


@pytest.mark.parametrize("radius", [0.1, 0.5, 2.0])
def test_on_a_line_nothing_bends_more_than_the_bounds(radius):
    radii, zero = torch.tensor([radius], dtype=torch.float64), torch.tensor([0])
    for model, x in bent_lines(84):
        _, bend = worst_on_a_line(model, x, radius)
        rounding = RoundingModel.of(read_network(model))
        quick, sharp = (
            local_curvature(rounding, Region(x[None], radii), zero, zero, zero + 1, solve)[0]
            for solve in ("nothing", "entries")
        )
        everywhere, _ = crc.curvature_bounds(model, 0, 1)
        for bound in (quick, sharp, -everywhere[0]):
            assert bend <= bound * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("activation", SMOOTH)
def test_copies_of_a_layer_hardly_add_to_the_curvature_of_a_ball(activation):
    model = crc.mlp([5, 8, 3], activation, seed=1).double()
    shallow = -crc.curvature_bounds(model, 0, 1)[0]
    deeper = deepen(model, 4)
    rounding = RoundingModel.of(read_network(deeper))
    x, radius = torch.zeros(1, 5, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    zero, one = torch.tensor([0]), torch.tensor([1])
    ball = local_curvature(rounding, Region(x, radius), zero, zero, one)
    everywhere = -crc.curvature_bounds(deeper, 0, 1)[0]
    assert ball <= 1.3 * shallow and ball < 0.95 * everywhere
