"""Proof files, and the checker that shares nothing with the package."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import every_pair, margin_hessian, random_networks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from setuptools import find_namespace_packages
from torch import nn

import crcbook as crc
from crcbook.commands import main
from crcbook.deployed import float32_error
from crcbook.networks import read_network
from crcbook.proof.curvature import downward_curvature, local_curvature
from crcbook.proof.intervals import Region
from crcbook.proof.prover import Prover
from crcbook.proof.rounding import RoundingModel
from crcbook.proof.sketches import Glance
from crcbook.proof_file import FORMAT, from_digits, network_digest, prove, to_digits, write_proofs

flint = pytest.importorskip("flint", reason="the checker needs python-flint: crcbook[check]")
check = importlib.import_module("crcbook_checker.check")
arb = flint.arb

CHECKER = Path(__file__).parents[1] / "crcbook_checker" / "check.py"
CHEATS = "radius", "curvature", "point", "label", "image", "weight", "model"
REFUSED = OSError, LookupError, ValueError, TypeError
SAFETENSORS = " as a safetensors file"


def inputs_of(model, count, generator):
    """Random inputs, with the classes that the model gives them."""
    x = torch.randn(count, read_network(model).inputs, generator=generator, dtype=torch.float64)
    return x, model(x).argmax(1)


def checker_network(model):
    """The checker's reading of a model's weights."""
    layers = read_network(model).layers
    arrays = ([getattr(layer, part).numpy() for layer in layers] for part in ("weight", "bias"))
    return check.Network(*arrays, layers[0].activation.name if len(layers) > 1 else "softplus")


def checked(path, network, x, y):
    """What the checker finds wrong with each input of a proof file."""
    rows = check.check(check.Proofs(path), network, x.double().numpy(), y.numpy())
    return {index: wrong for index, _, _, wrong in rows}


def rewrite(path, new, change):
    """Change a proof file and seal it anew, as someone who wants to cheat would."""
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()[FORMAT])
    facts.pop("seal")
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    change(tensors, facts)
    write_proofs(new, tensors, facts)


@pytest.fixture(scope="module")
def proved(tmp_path_factory):
    """A folder with a small model, data and proofs, and what they were made of."""
    folder = tmp_path_factory.mktemp("proofs")
    model = crc.mlp([6, 16, 4], seed=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    x, y = inputs_of(model, 8, torch.Generator().manual_seed(0))
    prove(model, x, y, folder / "proofs.safetensors")
    crc.save_model(folder / "model.safetensors", model)
    save_file({"x": x.numpy(), "y": y.numpy()}, folder / "data.safetensors")
    return folder, model, x, y


# What the checker knows.


def test_the_checker_is_one_short_file_that_imports_nothing_of_the_package():
    lines = CHECKER.read_text().splitlines()
    imports = [
        line.split()[1].split(".")[0] for line in lines if line.startswith(("import", "from"))
    ]
    assert len(lines) <= 500
    assert set(imports) - set(sys.stdlib_module_names) == {"flint", "numpy", "safetensors"}
    assert [path.name for path in CHECKER.parent.glob("**/*.py")] == [CHECKER.name]


def derivatives_of(name, z):
    """An activation of torch and its first two derivatives, by autograd."""
    z = z.double().requires_grad_()
    value = crc.mlp([1, 1, 2], name)[2](z)
    slope = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
    return value.detach(), slope.detach(), torch.autograd.grad(slope.sum(), z)[0]


@given(st.sampled_from(sorted(check.ACTIVATIONS)), st.floats(-6, 6), st.floats(0.0, 12.0))
def test_bounds_of_activations_hold_and_are_attained(name, low, width):
    high = min(low + width, 8.0)
    grid = torch.linspace(low, high, 4001, dtype=torch.float64)
    bounds = check.ACTIVATIONS[name].bounds(arb(low), arb(high))
    for values, (least, most) in zip(derivatives_of(name, grid), bounds, strict=True):
        assert float(least) <= values.min() + 1e-12 and values.max() - 1e-12 <= float(most)
        assert float(least) >= values.min() - 1e-5 and values.max() + 1e-5 >= float(most)


@pytest.mark.parametrize("name", sorted(check.ACTIVATIONS))
def test_bounds_on_the_line_are_the_least_and_the_most(name):
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    _, *values = derivatives_of(name, torch.cat([grid, torch.tensor([-1e6, 1e6])]))
    for row, (least, most) in zip(values, check.ACTIVATIONS[name].line, strict=True):
        assert -1e-12 <= row.min() - float(least) <= 1e-8
        assert -1e-12 <= float(most) - row.max() <= 1e-8


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_eigenvalue_bounds_hold_and_are_close(rows, columns, seed):
    generator = np.random.default_rng(seed)
    matrix, depths = generator.normal(size=(rows, columns)), generator.normal(size=rows)
    bound = check.Matrix(matrix).top([arb(depth) for depth in depths.tolist()])
    gram = matrix.T @ (np.maximum(depths, 0)[:, None] * matrix)
    largest = max(np.linalg.eigvalsh(gram)[-1], 0)
    assert largest * (1 - 1e-12) <= float(bound) <= largest * (1 + 1e-9)


def test_an_eigenvalue_bound_holds_whatever_is_guessed(monkeypatch):
    matrix = np.random.default_rng(0).normal(size=(7, 5))
    largest = np.linalg.eigvalsh(matrix.T @ matrix)[-1]
    for k in (0.0, largest / 2, 2 * largest):
        for size in (0.0, 0.3):
            monkeypatch.setattr(
                check, "cholesky", lambda gram, k=k, s=size: (k, s * np.eye(len(gram)))
            )
            assert float(check.Matrix(matrix).top([arb(1)] * 7)) >= largest * (1 - 1e-12)


@given(random_networks())
def test_margins_and_gradients_are_torchs(case):
    model, generator = case
    x, _ = inputs_of(model, 3, generator)
    x.requires_grad_()
    margin = model(x)[:, 0] - model(x)[:, -1]
    gradient = torch.autograd.grad(margin.sum(), x)[0]
    classes = read_network(model).classes
    points = [check.vector(row) for row in x.detach().numpy()]
    found = checker_network(model).margins(points, [(i, 0, classes - 1) for i in range(3)])
    for value, slope, (f, g) in zip(margin, gradient, found, strict=True):
        assert float(f) == pytest.approx(value.item(), rel=1e-9, abs=1e-9)
        assert [float(entry) for entry in g] == pytest.approx(slope.tolist(), rel=1e-9, abs=1e-9)
        assert max(float(entry.rad()) for entry in [f, *g]) < 1e-25 * (1 + abs(float(f)))


@given(random_networks())
def test_curvature_everywhere_holds_and_is_the_packages(case):
    model, generator = case
    k = float(checker_network(model).everywhere(0, 1))
    for point in 3 * torch.randn(4, read_network(model).inputs, generator=generator).double():
        least = torch.linalg.eigvalsh(margin_hessian(model, point, 0, 1))[0]
        assert -least <= k * (1 + 1e-9) + 1e-12
    network, pair = read_network(model), (torch.tensor([0]), torch.tensor([1]))
    assert k <= float(downward_curvature(network, *pair)) * (1 + 2.0**-22)


@given(random_networks(max_width=6), st.sampled_from([0.01, 0.1, 1.0]))
def test_curvature_in_a_ball_holds_and_is_the_packages(case, radius):
    model, generator = case
    x, _ = inputs_of(model, 1, generator)
    network = checker_network(model)
    ranges = network.ranges(check.vector(x[0].numpy()), arb(radius), [])
    k = float(network.in_ball(0, 1, ranges)) if network.hidden else 0.0
    for _ in range(4):
        away = torch.randn(x.shape[1], generator=generator, dtype=torch.float64)
        point = x[0] + radius * away / away.norm()
        least = torch.linalg.eigvalsh(margin_hessian(model, point, 0, 1))[0]
        assert -least <= k * (1 + 1e-9) + 1e-12
    read, one = read_network(model), torch.tensor([0])
    if len(read.layers) > 2:
        theirs = local_curvature(
            RoundingModel.of(read), Region(x, torch.tensor([radius]).double()), one, one, one + 1
        )
        found = min(k, float(downward_curvature(read, one, one + 1)))
        assert found <= float(theirs) * (1 + 2.0**-20) + 1e-290


def test_the_jump_of_torchs_softplus_is_allowed_for():
    model = crc.mlp([3, 10, 8, 2], "softplus", seed=0).double()
    with torch.no_grad():
        model[1].weight.mul_(30)
    x = 2 * torch.randn(400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = (model(x) - read_network(model).logits(x)).detach()
    gap = (logits[:, 0] - logits[:, 1]).abs().max()
    assert 1e-11 < gap <= float(checker_network(model).gap(0, 1)) < 1e-7
    assert float(checker_network(crc.mlp([3, 10, 2], "tanh")).gap(0, 1)) == 0


# Honest proofs are proved.


@given(random_networks())
@settings(max_examples=60)
def test_proofs_of_any_network_are_proved_and_lose_next_to_nothing(tmp_path_factory, case):
    model, generator = case
    path = tmp_path_factory.mktemp("proofs") / "proofs.safetensors"
    x, y = inputs_of(model, 4, generator)
    written = prove(model, x, y, path)
    finite = written.certified.isfinite() & (written.certified > 0)
    item, label, target = every_pair(read_network(model).classes, y)
    nowhere = torch.zeros(4).index_add(
        0, item, (Glance.of(Prover.of(read_network(model))).lowest(label, target) > 0).float()
    )
    kept = finite & (nowhere == 0)  # no class that is ruled out by the last activation's range
    assert (written.radius[kept] >= written.certified[kept] * (1 - 1e-6)).all()
    assert checked(path, checker_network(model), x, y) == {
        i: [] for i in finite.nonzero().squeeze(1).tolist()
    }


def test_misclassified_inputs_are_left_out_and_counted(proved, tmp_path):
    _, model, x, y = proved
    wrong = torch.where(torch.arange(8) < 3, (y + 1) % 4, y)
    written = prove(model, x, wrong, tmp_path / "proofs.safetensors")
    assert written.summary["not certified"] == 3 and (written.radius[:3] == 0).all()
    found = checked(tmp_path / "proofs.safetensors", checker_network(model), x, wrong)
    assert found == {i: [] for i in range(3, 8)}


def test_inputs_can_be_a_part_of_the_data(proved, tmp_path):
    _, model, x, y = proved
    index = torch.tensor([6, 2])
    prove(model, x[index], y[index], tmp_path / "proofs.safetensors", index=index)
    assert checked(tmp_path / "proofs.safetensors", checker_network(model), x, y) == {6: [], 2: []}


def test_balls_prove_more_where_the_network_is_deep(tmp_path):
    model = crc.mlp([5, 8, 7, 3], seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    x, y = inputs_of(model, 6, torch.Generator().manual_seed(0))
    alone = prove(model, x, y, tmp_path / "global.safetensors")
    written = prove(model, x, y, tmp_path / "local.safetensors", curvature="local")
    balls = written.summary["curvature over a ball"]
    assert balls > 3 and (written.radius > alone.radius * 1.01).sum() >= balls - 1
    assert (written.radius <= written.certified * (1 + 1e-5)).all()
    network = checker_network(model)
    found = checked(tmp_path / "local.safetensors", network, x, y)
    assert found == {i: [] for i in range(6)}

    def everywhere(tensors, _):
        tensors["valid"][:] = np.inf

    rewrite(tmp_path / "local.safetensors", tmp_path / "cheat.safetensors", everywhere)
    found = checked(tmp_path / "cheat.safetensors", network, x, y)
    assert sum(any("curvature" in flaw for flaw in wrong) for wrong in found.values()) == balls


def test_points_that_leave_their_balls_cost_no_claim(tmp_path, monkeypatch):
    """Rounded to few digits a point may lie outside: the input itself still proves something."""
    model = crc.mlp([6, 12, 10, 3], "tanh", seed=2).double()
    x, y = inputs_of(model, 10, torch.Generator().manual_seed(0))

    def far(prover, entries, limit):
        return 3 * entries.valid.clamp(max=1e3)[:, None] * torch.ones_like(entries.x)

    monkeypatch.setattr(importlib.import_module("crcbook.proof_file"), "find_points", far)
    written = prove(model, x, y, tmp_path / "far.safetensors", curvature="local")
    assert ((written.radius > 0) == (written.certified > 0)).all() and written.radius.max() > 0
    found = checked(tmp_path / "far.safetensors", checker_network(model), x, y)
    assert found == dict.fromkeys(range(10), [])


@given(random_networks(max_width=8), st.sampled_from(["global", "local"]))
@settings(max_examples=8)
def test_in_a_box_the_claims_are_about_its_points(tmp_path_factory, case, curvature):
    """The same radii as those certified, proved; and not without the box, or in a wider one."""
    model, generator = case
    folder, network = tmp_path_factory.mktemp("proofs"), checker_network(model)
    x = torch.rand(4, read_network(model).inputs, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    path = folder / "box.safetensors"
    written = prove(model, x, y, path, curvature=curvature, box=(0.0, 1.0))
    found = checked(path, network, x, y)
    assert not any(found.values())
    plain = prove(model, x, y, folder / "plain.safetensors", curvature=curvature)
    claimed = (written.radius > 0) & (plain.radius > 0)
    least = plain.radius.minimum(written.certified)  # at most across the box
    assert (written.radius[claimed] >= least[claimed] * (1 - 1e-5)).all()
    gained = claimed & (written.radius > plain.certified * (1 + 1e-3))

    def wider(tensors, _):
        tensors["box"] = tensors["box"] + np.array([[-1e3], [1e3]])

    rewrite(path, folder / "cheat.safetensors", wider)
    if curvature == "global":  # where k holds everywhere, the box alone makes the difference
        found = checked(folder / "cheat.safetensors", network, x, y)
        assert all(found[i] for i in gained.nonzero().squeeze(1).tolist())


def test_a_box_proves_more(tmp_path):
    model, generator = crc.mlp([6, 16, 3], seed=0).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model[3].bias.zero_()
    x = torch.rand(8, 6, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    path, network = tmp_path / "box.safetensors", checker_network(model)
    certified = crc.certify(model, x, y, method="dual").radius
    written = prove(model, x, y, path, box=(0.0, 1.0))
    assert (written.radius > certified * 1.01).sum() > 3
    assert written.summary["curvature over all of R^n, in a box"] == 8
    assert checked(path, network, x, y) == {i: [] for i in range(8)}
    for name, factor in (("radius", 1.01), ("multiplier", 0.0), ("multiplier", np.nan)):

        def change(tensors, _, name=name, factor=factor):
            tensors[name] = tensors[name] * factor

        rewrite(path, tmp_path / "cheat.safetensors", change)
        found = checked(tmp_path / "cheat.safetensors", network, x, y)
        assert sum(bool(wrong) for wrong in found.values()) > 3


def test_what_float32_can_change_is_left_of_the_margins(tmp_path):
    """The file claims the margins that a float32 program's radius needs."""
    model = crc.mlp([6, 16, 8, 3], seed=0)
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    path, network = tmp_path / "program.safetensors", read_network(model)
    written = prove(model, x, y, path, deployed="float32")
    assert torch.allclose(written.radius, written.certified)
    assert checked(path, checker_network(model), x, y) == {i: [] for i in range(6)}
    claims = load_file(path)
    for i in range(6):
        targets = torch.tensor([t for t in range(3) if t != y[i]])
        rate, start = float32_error(network, y[i].expand(2), targets, x[i].double().expand(2, -1))
        assert (claims["margin"][i] >= (rate.numpy() * claims["radius"][i] + start.numpy())).all()

    def more(tensors, _):
        tensors["margin"] = tensors["margin"] * 2

    rewrite(path, tmp_path / "cheat.safetensors", more)
    found = checked(tmp_path / "cheat.safetensors", checker_network(model), x, y)
    assert all(any("radius" in flaw for flaw in wrong) for wrong in found.values())


@given(
    st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**31 - 1), st.sampled_from([1e-6, 1.0])
)
def test_digits_round_to_the_nearest_number_of_their_count(count, size, seed, scale):
    shift = scale * torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).double()
    scales, digits = to_digits(shift, count)
    error = (from_digits(digits, scales) - shift).abs() / scales[:, None]
    assert digits.min() >= -8 and digits.max() <= 7
    assert error.max() <= 0.5 / 16 ** (count - 1) * (1 + 1e-6) + 1e-6


def test_the_checker_reads_the_points_that_were_written(proved):
    folder, model, x, y = proved
    proofs, claims = check.Proofs(folder / "proofs.safetensors"), []
    for i in range(len(x)):
        claims += [claim.c for claim in proofs.claims(i, x[i].numpy(), 4)]
    counts = load_file(folder / "proofs.safetensors")["digits"].ravel()
    moved = [np.abs(c - x[i // 3].numpy()).max() > 0 for i, c in enumerate(claims)]
    assert moved == (counts > 0).tolist() and 0 < counts.astype(bool).sum() < counts.size


def test_a_network_the_file_cannot_name_is_refused(tmp_path):
    x, y = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    linear = [torch.nn.Linear(3, 3) for _ in range(3)]
    mixed = torch.nn.Sequential(
        linear[0], torch.nn.Tanh(), linear[1], torch.nn.Sigmoid(), linear[2]
    )
    sharp = torch.nn.Sequential(linear[0], torch.nn.Softplus(beta=4), linear[1])
    early = torch.nn.Sequential(linear[0], torch.nn.Softplus(threshold=10), linear[1])
    for model in (mixed, sharp, early):
        with pytest.raises(ValueError, match="one activation"):
            prove(model, x, y, tmp_path / "proofs.safetensors")


# Dishonest ones are not.


@given(st.sampled_from(["proofs", "model", "data"]), st.integers(0, 2**31), st.integers(0, 7))
@settings(max_examples=700)
def test_no_flipped_bit_is_accepted(proved, name, place, bit):
    folder, *_ = proved
    content = bytearray((folder / f"{name}.safetensors").read_bytes())
    # The headers of models and data say more than is used of them.
    start = 0 if name == "proofs" else 8 + int.from_bytes(content[:8], "little")
    content[start + place % (len(content) - start)] ^= 1 << bit
    paths = {key: folder / f"{key}.safetensors" for key in ("proofs", "model", "data")}
    paths[name] = folder / "flipped.safetensors"
    paths[name].write_bytes(content)
    try:
        network = check.Network.read(paths["model"], None, None)
        found = list(
            check.check(check.Proofs(paths["proofs"]), network, *check.read_data(paths["data"]))
        )
    except REFUSED:
        return
    assert any(wrong for *_, wrong in found)


@given(
    st.sampled_from(CHEATS),
    st.integers(0, 7), st.floats(1e-6, 1.0), st.integers(0, 2**31 - 1),
)  # fmt: skip
@settings(max_examples=300)
def test_no_false_claim_is_accepted_whatever_hashes_it_carries(proved, kind, i, size, seed):
    folder, model, x, y = proved
    x, y, network = x.clone(), y.clone(), checker_network(model)
    generator, proofs = np.random.default_rng(seed), load_file(folder / "proofs.safetensors")
    j = int(proofs["radius"][i].argmin())  # whose point is the best there is
    count = proofs["digits"].ravel()[: 3 * i + j + 1]
    rows = slice(int(count[:-1].sum()), int(count.sum()))
    arrays = [
        [layer.floats.copy() for layer in network.layers],
        [np.array([float(b) for b in bias]) for bias in network.biases],
    ]
    if kind == "image":
        x[i] = crc.certify(model, x, y).nearest[i]
    elif kind == "label":
        y[i] = (y[i] + 1 + seed % 3) % 4
    elif kind == "weight":  # one of the row that makes the label win
        unit = int(generator.integers(16))
        arrays[0][1][y[i], unit] -= 100 * np.sign(float(arrays[0][1][y[i], unit]) or 1.0)
        arrays[0][1][y[i]] -= 1
    elif kind == "model":
        arrays = [[*part[:-1], -part[-1]] for part in arrays]
    network = check.Network(*arrays, "softplus") if kind in ("weight", "model") else network

    def change(tensors, facts):
        facts["model"] = network.digest
        tensors["label"][i] = y[i]
        digest = bytes.fromhex(check.digest([], [x[i].numpy()]))
        tensors["image_sha256"][i] = np.frombuffer(digest, np.uint8)
        if kind == "radius":
            tensors["radius"][i, j] *= 1 + size
        elif kind == "curvature":
            tensors["curvature"][i, j] *= 1 - size
        elif kind == "point":
            first = tensors["steps"][rows][:1]
            first[:] = first ^ 0x11 << generator.integers(0, 4, first.shape).astype(np.uint8)
            tensors["steps"][rows][:1] = first

    rewrite(folder / "proofs.safetensors", folder / "cheat.safetensors", change)
    found = checked(folder / "cheat.safetensors", network, x, y)
    reason = "curvature" if kind == "curvature" else "radius"
    assert any(reason in flaw for flaw in found[i])
    others = [wrong for place, wrong in found.items() if place != i]
    assert kind in ("weight", "model") or not any(others)


def test_a_ball_must_hold_the_point_and_the_radius(proved, tmp_path):
    folder, model, x, y = proved
    network, radius = checker_network(model), load_file(folder / "proofs.safetensors")["radius"]

    def change(tensors, _):
        tensors["valid"] = radius.min(1) * (1 - 1e-6)

    rewrite(folder / "proofs.safetensors", tmp_path / "cheat.safetensors", change)
    found = checked(tmp_path / "cheat.safetensors", network, x, y)
    assert all(any("ball" in flaw for flaw in wrong) for wrong in found.values())


@pytest.mark.parametrize("name", ["radius", "curvature", "scale"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 0.0])
def test_numbers_that_are_none_prove_nothing(proved, tmp_path, name, value):
    folder, model, x, y = proved

    def change(tensors, _):
        column = tensors["radius"][0].argmin()
        tensors[name][0, column] = value

    rewrite(folder / "proofs.safetensors", tmp_path / "cheat.safetensors", change)
    assert checked(tmp_path / "cheat.safetensors", checker_network(model), x, y)[0]


def test_a_linear_network_needs_no_curvature(tmp_path):
    model = crc.mlp([4, 3], seed=0).double()
    x, y = inputs_of(model, 3, torch.Generator().manual_seed(0))
    written = prove(model, x, y, tmp_path / "proofs.safetensors")
    assert torch.allclose(written.radius, written.certified, rtol=1e-9)
    assert not any(checked(tmp_path / "proofs.safetensors", checker_network(model), x, y).values())


def test_margins_at_a_radius_can_be_claimed(proved, tmp_path):
    """Half way to the radius something of the margin is left, and no more than is claimed."""
    folder, model, x, y = proved
    claims = load_file(folder / "proofs.safetensors")
    c = [
        [
            claim.c
            for claim in check.Proofs(folder / "proofs.safetensors").claims(i, x[i].numpy(), 4)
        ]
        for i in range(8)
    ]
    c = torch.tensor(np.array(c)).requires_grad_()
    target = torch.arange(4).expand(8, -1)
    target = target[target != y[:, None]].reshape(8, 3)
    logits = model(c.reshape(24, 6)).reshape(8, 3, 4)
    f = logits.gather(2, y[:, None, None].expand(8, 3, 1)) - logits.gather(2, target[:, :, None])
    g = torch.autograd.grad(f.sum(), c)[0]
    k, r = (torch.from_numpy(claims[name]) for name in ("curvature", "radius"))
    away = x[:, None] - c.detach()
    q = f.detach().squeeze(2) + (g * away).sum(2) - k / 2 * away.square().sum(2)
    margin = q - r / 2 * (k[:, :, None] * away - g).norm(dim=2) - k / 2 * (r / 2) ** 2
    for share, right in ((1 - 1e-6, True), (1 + 1e-6, False)):

        def change(tensors, _, share=share):
            tensors["radius"] /= 2
            tensors["margin"] = margin.numpy() * share

        rewrite(folder / "proofs.safetensors", tmp_path / "margins.safetensors", change)
        found = checked(tmp_path / "margins.safetensors", checker_network(model), x, y)
        assert all(bool(wrong) != right for wrong in found.values())


# The command line.


def run(folder, *arguments):
    """Run a copy of the checker beside the files, without the package in reach."""
    shutil.copy(CHECKER, folder / "check.py")
    command = [sys.executable, "-I", "check.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_checker_runs_as_one_file_beside_the_weights(proved):
    folder, model, x, y = proved
    files = "proofs.safetensors", "model.safetensors", "data.safetensors"
    done = run(folder, *files, "--cache", "cache.json")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1].startswith("8 of 8 images proved")
    certified = crc.certify(model, x, y).radius
    radii = [float(line.split()[-1]) for line in lines[:-1]]
    assert radii == pytest.approx(certified.tolist(), rel=1e-5)
    assert list(json.loads((folder / "cache.json").read_text()).values())[0]
    assert run(folder, *files, "--cache", "cache.json").stdout.splitlines()[:-1] == lines[:-1]
    swapped = crc.mlp([6, 16, 4], seed=4)
    crc.save_model(folder / "swapped.safetensors", swapped)
    done = run(folder, files[0], "swapped.safetensors", files[2])
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: ") and "another model" in line


def test_a_cache_spares_the_proof_of_curvatures(proved, tmp_path, monkeypatch):
    folder, *_ = proved
    path = folder / "model.safetensors"
    network = check.Network.read(path, None, tmp_path / "cache.json")
    bound = network.bound(0, 1, arb(0), [], arb("inf"), [])
    monkeypatch.setattr(check.Matrix, "top", lambda *_: pytest.fail("proved again"))
    again = check.Network.read(path, None, tmp_path / "cache.json")
    assert again.bound(0, 1, arb(0), [], arb("inf"), []) == bound
    assert network_digest(read_network(crc.load_model(path))) == network.digest


def test_mnists_own_files_are_read_as_the_package_reads_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    labels = np.array([4, 1, 7], np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(bytes(16) + pixels.tobytes())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes(8) + labels.tobytes())
    x, y = check.read_data(tmp_path / "t10k-images-idx3-ubyte")
    theirs = torch.tensor(pixels / 255.0, dtype=torch.float32).flatten(1).double()
    assert (torch.tensor(x) == theirs).all() and y.tolist() == labels.tolist()


def test_prove_and_check_from_the_command_line(tmp_path, capsys):
    model = tmp_path / "model.safetensors"
    crc.save_model(model, crc.mlp([64, 8, 10]))
    proofs, words = tmp_path / "proofs.safetensors", ["--dataset", "digits"]
    assert main(["prove", str(model), *words, "--limit", "30", "--out", str(proofs)]) == 0
    out = capsys.readouterr().out
    claimed = int(re.search(r"curvature over all of R\^n +(\d+)", out)[1])
    assert "images " in out and f"wrote {proofs}" in out and claimed > 0
    cache = tmp_path / "cache.json"
    assert main(["check", str(proofs), str(model), *words, "--cache", str(cache)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"{claimed} of {claimed} images proved" and cache.exists()
    crc.save_model(model, crc.mlp([64, 8, 10], seed=1))
    assert main(["check", str(proofs), str(model), *words]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert "the proofs are about another model" in line and shown.out == ""


@pytest.mark.parametrize("labelled", [True, False])
def test_prove_and_check_take_items_of_ones_own(tmp_path, capsys, labelled):
    """In a folder as training leaves it, with local curvature, for a program in float32."""
    model, run = crc.mlp([4, 8, 6, 3], seed=0), tmp_path / "run"
    run.mkdir()
    crc.save_model(run / "model.safetensors", model)
    x = torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(0))
    data = tmp_path / "data.npz"
    labels = {"y": model(x).argmax(1).numpy()} if labelled else {}
    np.savez(data, x=x.numpy(), **labels)
    words = ["--data", str(data)]
    more = ["--curvature", "local", "--deployed", "float32", "--out", str(tmp_path / "proofs")]
    assert main(["prove", str(run), *words, *more]) == 0
    assert main(["check", str(tmp_path / "proofs"), str(run), *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 of 6 images proved"
    assert (
        main(["prove", str(run), *words, "--box", "-9", "9", "--out", str(tmp_path / "box")]) == 0
    )
    assert "in a box" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "box"), str(run), *words]) == 0


@pytest.mark.parametrize("activation", [nn.Softplus, nn.Sigmoid])
def test_a_network_of_any_layers_is_checked_as_it_is_saved(tmp_path, capsys, activation):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 2), activation(), nn.Flatten(), nn.Linear(18, 5), activation()
    model, x = nn.Sequential(*layers, nn.Linear(5, 3)).eval(), torch.randn(6, 1, 4, 4)
    path, data, out = (str(tmp_path / name) for name in ("net.safetensors", "x.npz", "proofs"))
    crc.save_model(path, model, x)
    np.savez(data, x=x.numpy(), y=model(x).argmax(1).numpy())
    assert main(["prove", "--model", path, "--data", data, "--out", out]) == 0
    assert main(["check", out, path, "--data", data]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 of 6 images proved"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prove", "model", "--dataset", "digits", "--out", "/dev/null/x"], "cannot write"),
        (["check", "proofs", "model"], "model does not say what it was trained on"),
        (["check", "nowhere", "model", "--data", "data.npz"], "cannot read nowhere"),
        (["check", "nowhere", "model", "--data", "x.npy"], "cannot read nowhere"),
        (["check", "p", "model", "--data", "data.npz", "--dataset", "digits"], "name one source"),
        (["check", "p", "model", "--labels", "y.npy"], "--labels belong to --data"),
        (["check", "empty", "model", "--data", "data.npz"], f"cannot read empty{SAFETENSORS}"),
        (["check", "bytes", "model", "--data", "data.npz"], f"cannot read bytes{SAFETENSORS}"),
        (["check", "folder", "model", "--data", "data.npz"], "cannot read folder: it is a folder"),
        (["check", "model", "model", "--data", "data.npz"], "model is no file of proofs"),
        (
            ["check", "proofs", "nowhere", "--data", "data.npz"],
            "cannot read nowhere: there is no such file",
        ),
        (["check", "proofs", "folder", "--data", "data.npz"], "folder/model.safetensors"),
        (["check", "proofs", "proofs", "--data", "data.npz"], "proofs has no layers 1.weight"),
        (["check", "proofs", "named", "--data", "data.npz"], "named has no layers 1.weight"),
        (["check", "proofs", "more", "--data", "data.npz"], "more has more than layers"),
        (["check", "proofs", "other", "--data", "data.npz"], "are about another model"),
        (["check", "proofs", "net.onnx", "--data", "data.npz"], "have crcbook.save_model write"),
        (
            ["check", "proofs", "model", "--data", "one.npz"],
            "about more than the 1 items of one.npz",
        ),
        (["check", "proofs", "model", "--data", "few.npz"], "there are 1 labels for 2 items"),
        (["check", "proofs", "model", "--data", "bytes"], "cannot read bytes"),
        *(
            (["check", "proofs", "model", "--data", "data.npz", "--cache", cache], message)
            for cache, message in (
                ("folder", "cannot write folder"),
                ("cut.json", "cut.json is no whole cache of curvatures: name another --cache"),
                ("bytes", "bytes is no whole cache of curvatures"),
                ("list.json", "list.json is no whole cache of curvatures"),
                ("facts.json", "facts.json is no whole cache of curvatures"),
            )
        ),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, x = crc.mlp([64, 8, 10]), torch.linspace(0, 1, 128).reshape(2, 64)
    y = model(x).argmax(1)
    crc.save_model("model", model)
    crc.save_model("other", crc.mlp([64, 8, 10], seed=1))
    save_file({"first.weight": np.ones((10, 64))}, "named")
    save_file({"0.weight": np.ones((10, 64)), "scale": np.ones(1)}, "more")
    prove(model, x, y, "proofs")
    np.savez("data.npz", x=x.numpy(), y=y.numpy())
    np.savez("one.npz", x=x[:1].numpy(), y=y[:1].numpy())
    np.savez("few.npz", x=x.numpy(), y=y[:1].numpy())
    np.save("x.npy", x.numpy())
    Path("folder").mkdir()
    Path("empty").write_bytes(b"")
    Path("bytes").write_bytes(b"\xff\xfe\xe9")
    for name, text in {
        "cut": '{"a": {"b"',
        "list": "[1]",
        "facts": '{"dataset": "digits"}',
    }.items():
        Path(f"{name}.json").write_text(text)
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert main(words) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("crcbook: ") and message in line and shown.out == ""
    assert all(path.read_bytes() == content for path, content in before.items())


def test_proofs_of_one_item_without_a_batch_are_checked(tmp_path, capsys):
    """And so is a file with items after the last one proved, which nobody looked at."""
    path, proofs = tmp_path / "model", tmp_path / "proofs"
    model, x = crc.mlp([4, 8, 3]), torch.rand(2, 2, generator=torch.Generator().manual_seed(0))
    crc.save_model(path, model)
    np.savez(tmp_path / "one.npz", x=x.numpy())
    np.savez(tmp_path / "more.npz", x=torch.stack([x, x * torch.nan]).numpy())
    assert main(["prove", str(path), "--data", f"{tmp_path}/one.npz", "--out", str(proofs)]) == 0
    for data in ("one", "more"):
        assert main(["check", str(proofs), str(path), "--data", f"{tmp_path}/{data}.npz"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 images proved"


def test_proofs_of_other_items_are_said_not_to_be_proved(tmp_path, capsys):
    model, x = crc.mlp([4, 8, 3]), torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    crc.save_model(tmp_path / "model", model)
    written = prove(model, x, model(x).argmax(1), tmp_path / "proofs")
    assert len(repr(written).splitlines()) == 1 + len(written.summary)
    np.savez(tmp_path / "data.npz", x=x.numpy() / 2)
    words = ("check", "proofs", "model", "--data", "data.npz")
    assert main([word if word[0] in "c-" else str(tmp_path / word) for word in words]) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "0 of 3 images proved"
    (line,) = shown.err.splitlines()
    assert "is not proved, as the lines above say" in line and "that `prove` was given" in line


def test_the_wheel_holds_the_checker():
    found = find_namespace_packages(str(CHECKER.parents[1]), include=["crcbook*"])
    assert "crcbook_checker" in found and "crcbook.commands" in found
    need = [
        sys.executable,
        "-c",
        "import sys, crcbook_checker.check; assert 'torch' not in sys.modules",
    ]
    subprocess.run(need, cwd=CHECKER.parents[1], check=True)


def test_without_python_flint_the_command_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "crcbook_checker.check", None)
    monkeypatch.delattr("crcbook_checker.check")
    assert main(["check", "proofs", "model"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "crcbook[check]" in line and "python-flint" in line
