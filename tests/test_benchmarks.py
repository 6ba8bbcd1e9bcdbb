"""What the benchmarks count and ask, in small."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_devices import Elsewhere
from torch import nn

import crcbook as crc
from crcbook.datasets import Split
from crcbook.experiments import encode_bits, encode_radii
from crcbook.networks import deepen, read_network

ROOT = Path(__file__).parents[1]
TSV = """idx\tlabel\tpredict\tradius\tcorrect\ttime
0\t7\t7\t1.91\t1\t0:00:01
1\t2\t2\t1.58\t1\t0:00:01
2\t1\t-1\t0.0\t0\t0:00:01
3\t0\t8\t1.91\t0\t0:00:01
4\t0\t0\t0.5\t1\t0:00:01
"""


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark by name, as its own program does."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def recount(benchmark):
    return benchmark("recount")


@pytest.fixture
def released(recount, monkeypatch, tmp_path):
    """A folder of clones with one released file in it."""
    file = replace(recount.RELEASED[0], repository="someone/theirs", path="a/noise_0.5.tsv")
    path = tmp_path / "theirs" / file.path
    path.parent.mkdir(parents=True)
    path.write_bytes(TSV.encode())
    file = replace(file, blob=recount.git_hash(path))
    monkeypatch.setattr(recount, "RELEASED", (file,))
    return path


def test_a_released_file_is_counted_from_both_sides(recount, released, tmp_path):
    [row] = recount.recount(tmp_path)
    assert (row["images"], row["correct"]) == (5, 3)
    assert row["at least"] == {"0.5": 3, "1": 2, "1.5": 2, "1.58": 2, "2": 0}
    assert row["more than"] == {"0.5": 2, "1": 2, "1.5": 2, "1.58": 1, "2": 0}


def test_a_record_is_compared_with_it_image_by_image(recount, released, tmp_path):
    radius = torch.tensor([2.0, 1.5, 1.6, 0.0, 0.0], dtype=torch.float64)
    record = {"name": "ours", "dataset": "mnist", "radius": 1.58, "images": 5,
              "radii": encode_radii(radius)}  # fmt: skip
    [row] = recount.recount(tmp_path, record)
    found = row["paired"]["at least"]
    assert [found[name] for name in ("both", "first", "second", "neither")] == [1, 1, 1, 2]
    found = row["paired"]["more than"]
    assert [found[name] for name in ("both", "first", "second", "neither")] == [1, 1, 0, 3]
    certified = torch.tensor([True, True, False, False, False])
    record["bits"] = {"certified": encode_bits(certified)}
    [row] = recount.recount(tmp_path, record)
    assert row["paired"]["at least"]["both"] == 2
    with pytest.raises(ValueError, match="another order"):
        recount.recount(tmp_path, record | {"dataset": "fashion-mnist"})


def test_another_file_than_the_one_counted_is_refused(recount, released, tmp_path):
    hashed = ["git", "hash-object", "--no-filters", str(released)]
    expected = subprocess.run(hashed, check=True, capture_output=True, text=True).stdout.strip()
    assert recount.git_hash(released) == expected
    released.write_text(TSV.replace("1.58", "1.59"))
    with pytest.raises(ValueError, match="has git's hash"):
        recount.recount(tmp_path)
    lines = TSV.splitlines(keepends=True)
    released.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="each image once"):
        recount.read_radii(released)


@pytest.fixture
def gpu(benchmark):
    return benchmark("gpu")


def rounded(bits):
    """A product of matrices whose entries keep only so many bits, as TF32 keeps 11."""

    def keep(matrix):
        fraction, exponent = torch.frexp(matrix)
        return torch.ldexp((fraction * 2**bits).round() / 2**bits, exponent)

    return lambda a, b: keep(a) @ keep(b)


@pytest.mark.parametrize("bits", [8, 11, 16, 20])
def test_products_that_drop_bits_are_caught(gpu, monkeypatch, bits):
    honest = gpu.probes("cpu")
    assert len(honest) == 2 * len(gpu.PRODUCTS) and max(honest.values()) <= 1
    monkeypatch.setattr(gpu, "PRODUCTS", {"coarse": rounded(bits)})
    assert min(gpu.probes("cpu").values()) > 1


def test_a_contradiction_between_two_devices_is_counted(gpu, digits, digits_model, monkeypatch):
    test = digits.test.take(slice(0, 20))
    found = gpu.compared(digits_model, test, 0.5, "cpu")
    assert found["contradictions"] == found["verdicts that differ"] == 0
    assert found["largest difference of radii"] == 0
    answers, asked = gpu._answers, []

    def boastful(*arguments):
        certificate, robust = answers(*arguments)
        asked.append(certificate)
        if len(asked) == 2:
            certificate = replace(certificate, radius=2 * certificate.radius)
        return certificate, robust

    monkeypatch.setattr(gpu, "_answers", boastful)
    found = gpu.compared(digits_model, test, 0.5, "cpu")
    known = asked[0].distance.isfinite() & (asked[0].radius > 0)
    assert found["contradictions"] >= int((known & asked[0].exact).sum()) > 0


def test_certificates_are_challenged_where_the_device_is(gpu, monkeypatch):
    name, model, x = next(gpu.random_cases(seed=3))
    monkeypatch.setattr(gpu, "random_cases", lambda seed: [(name, model, x[:6])])
    monkeypatch.setattr(gpu, "thin_cases", lambda seed: [])
    monkeypatch.setattr(
        "crcbook.networks.reading.check_modes", lambda: None
    )  # ours changes nothing
    with Elsewhere():
        found = gpu.soundness("cuda", seconds=1e9)
        assert max(gpu.probes("cuda").values()) <= 1
    classes = model[-1].out_features
    assert found == {"certificates": 6 * (classes - 1) * len(gpu.SETTINGS), "violations": 0}


def test_everything_is_asked_on_a_processor_in_small(gpu, tmp_path, capsys):
    path = tmp_path / "found.json"
    words = ["--quick", "--device", "cpu", "--seeds", "0", "1", "--soundness", "1"]
    assert gpu.main([*words, "--json", str(path), "--runs", str(tmp_path)]) == 0
    record = json.loads(path.read_text())
    assert [row["seed"] for row in record["networks"]] == [0, 1]
    test = crc.load("digits").test
    for row in record["networks"]:
        assert row["images"] == len(test) and row["violations"] == 0
        assert 0.3 < row["certified_accuracy"] <= row["empirical_accuracy"]
        assert min(row["seconds"].values()) > 0
    radii = [crc.certify(crc.load_model(tmp_path / f"seed-{seed}"), test.x, test.y).radius
             for seed in (0, 1)]  # fmt: skip
    assert not torch.equal(*radii)
    assert record["soundness"]["certificates"] > 0
    assert "WRONG" not in capsys.readouterr().out
    record["networks"][1]["violations"] = 1
    assert gpu.wrong(record) == ["a broken certificate"]
    record["probes"]["float32, bmm"] = 1.5
    assert gpu.wrong(record)[0] == "float32, bmm: 1.5"


def test_the_spread_over_seeds_and_the_pairs_of_gammas(benchmark):
    controls = benchmark("controls")

    def record(gamma, seed, certified):
        bits = encode_bits(torch.arange(8) < certified)
        accuracies = dict.fromkeys(controls.ACCURACIES.values(), certified / 8)
        return {"recipe": {"gamma": gamma}, "seed": seed, "images": 8,
                "bits": {"certified": bits}} | accuracies  # fmt: skip

    records = {f"control-{g}-{s}": record(g, s, n)
               for g, s, n in ((0.1, 0, 6), (0.0, 1, 4), (0.0, 0, 2), (0.1, 2, 8))}  # fmt: skip
    groups = controls.by_gamma(records | {"other": record(9.0, 0, 1)}, "control-")
    assert [(gamma, [row["seed"] for row in rows]) for gamma, rows in groups.items()] == [
        (0.0, [0, 1]),
        (0.1, [0, 2]),
    ]
    mean, deviation = controls.spread(groups[0.0])["certified"]
    assert (mean, deviation) == (37.5, pytest.approx(12.5 * 2**0.5))
    assert controls.spread(groups[0.1][:1])["certified"] == (75.0, None)
    [(low, high, seed, found)] = controls.comparisons(groups)
    assert (low, high, seed, found.first, found.second) == (0.0, 0.1, 0, 0, 4)
    assert found.p_value == 0.125


def test_two_versions_are_asked_the_same(benchmark, digits_model, tmp_path):
    """Here a version and itself: it certifies what it certifies."""
    versions, path = benchmark("versions"), tmp_path / "model.safetensors"
    crc.save_model(path, digits_model)
    words = ["--network", str(path), "--dataset", "digits", "--images", "30", "--radius", "0.3"]
    rows = versions.compare(ROOT, words, turns=1)
    assert list(rows)[:2] == ["certify", "verify"] and len(rows) == 6
    for row in rows.values():
        assert row["certified, here"] == row["certified, other"] <= row["images"]
        assert row["seconds, here"] > 0 and row["seconds, other"] > 0
    assert rows["certify"]["certified, here"] > 0


class Peer:
    """What the comparison asks of auto_LiRPA, answered by the gradient at the input alone."""

    __version__ = "0"
    asked: ClassVar[list[str]] = []

    def __init__(self, model, x, verbose):
        self.model = model

    def set_bound_opts(self, options):
        assert options["optimize_bound_args"]["iteration"] > 0

    def compute_bounds(self, x, C, method, bound_upper):  # noqa: N803
        Peer.asked.append(method)
        [(point, radius)] = x
        jacobian = torch.func.vmap(torch.func.jacrev(self.model))(point)
        steepest = (C @ jacobian).norm(dim=2)
        return (C @ self.model(point)[:, :, None])[:, :, 0] - radius * steepest, None

    BoundedTensor = staticmethod(lambda x, ball: (x, ball))
    PerturbationLpNorm = staticmethod(lambda norm, eps: eps)


def missing(self, **_):
    raise NotImplementedError("no relaxation of this activation")


def test_a_peer_is_asked_about_the_same_images(benchmark, digits, digits_model, monkeypatch):
    peers = benchmark("peers")
    Peer.BoundedModule = Peer
    Peer.asked.clear()
    right = (digits_model(digits.test.x).argmax(1) == digits.test.y).nonzero().squeeze(1)[:5]
    x, y = digits.test.x[right].double(), digits.test.y[right]
    row = peers.compare(digits_model, x, y, Peer)
    first = peers.HALVINGS  # to see whether it knows the activation
    plain, optimised = map(Peer.asked.count, ("CROWN", "CROWN-Optimized"))
    for asked in (plain - first, optimised):
        assert asked >= peers.TURNS * peers.HALVINGS and asked % peers.HALVINGS == 0
    assert row["images"] == 5 and row["widths"][-1] == 10
    assert 0 < row["lines"] <= row["default"] * 1.001 and row["default"] <= row["attack"]
    monkeypatch.setattr(Peer, "compute_bounds", missing)
    unknown = peers.compare(digits_model, x, y, Peer)
    assert unknown["peer"] is unknown["optimised"] is None
    # Where a margin is all but linear, its gradient says how far it reaches.
    assert row["peer"] == pytest.approx(row["attack"], rel=0.5)
    assert min(row[f"{name}, s"] for name in ("default", "lines", "peer")) > 0


def test_without_the_peer_a_line_says_where_it_is(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    assert benchmark("peers").main(["net.onnx", "--json", str(tmp_path / "record.json")]) == 1
    assert "github.com/Verified-Intelligence/auto_LiRPA" in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


def test_adversaries_are_judged_in_the_ball_and_in_the_box(benchmark):
    """A plane at distance 0.1: points beyond it count if they are in the ball, and in the box."""
    attacked = benchmark("attacked")
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        model[1].bias.copy_(torch.tensor([0.1, -0.1]))
    x = torch.tensor([[0.0, 0.5]]).double().expand(4, 2)
    items = crc.datasets.Split(x, torch.zeros(4, dtype=torch.int64))
    point = torch.tensor([[-0.2, 0.5], [-0.05, 0.5], [-0.9, 0.5], [-0.30001, 0.5]]).double()
    network = read_network(model)
    found = attacked.broken(network, items, point, 0.3, box=False)
    assert found.tolist() == [True, False, False, True]
    assert not attacked.broken(network, items, point, 0.3, box=True).any()
    zoomed = attacked.Zoomed(model, 0.3)
    assert torch.allclose(zoomed(zoomed.shrink(x)), model(x))


@pytest.mark.parametrize(
    ("more", "where"),
    [([], "over all of R^n"), (["--curvature", "local", "--layers", "3"], "in any ball")],
)
def test_proofs_are_checked_part_by_part_and_kept(
    benchmark, tmp_path, digits_model, monkeypatch, more, where
):
    pytest.importorskip("flint", reason="the checker needs python-flint: crcbook[check]")
    proofs = benchmark("proofs")
    monkeypatch.setattr(proofs, "PART", 3)
    model, path = tmp_path / "small.safetensors", tmp_path / "record.json"
    crc.save_model(model, digits_model)
    words = [str(model), "--dataset", "digits", "--images", "8", "--seed", "1",
             "--runs", str(tmp_path / "runs"), "--json", str(path), *more]  # fmt: skip
    assert proofs.main(words) == 0
    record = json.loads(path.read_text())
    assert record["summary"]["images"] == 8 and record[f"curvatures {where}"] == 90
    assert record["images claimed"] == record["images proved"]
    assert record["images claimed"] + record["summary"]["not certified"] == 8
    monkeypatch.setattr(proofs, "prove", lambda *_: pytest.fail("proved again"))
    assert proofs.main(words) == 0
    [part] = (tmp_path / "runs").glob("*/2-2.json")
    facts = json.loads(part.read_text())
    part.write_text(json.dumps(facts | {"proved": facts["proved"] - 1}))
    assert proofs.main(words) == 1


def test_a_certificate_of_the_program_is_compared_with_that_of_the_network(
    benchmark, tmp_path, digits_model
):
    model, path = tmp_path / "small.safetensors", tmp_path / "record.json"
    crc.save_model(model, digits_model)
    words = [str(model), "--dataset", "digits", "--images", "30", "--radius", "0.1"]
    assert benchmark("deployed").main([*words, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["images"] == 30
    assert 0.5 < record["mean share of the radius left"] < 1
    assert 0 < record["certified, float32 program"] <= record["certified"]


def test_a_vote_has_the_radius_of_its_confidence_bound(benchmark):
    smoothing = benchmark("smoothing")
    # All of n copies agree: the share p with p^n = alpha.
    share = smoothing.ALPHA ** (1 / 1000)
    expected = 0.5 * float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
    assert smoothing.radius_of(1000, 1000, 0.5) == pytest.approx(expected)
    radii = [smoothing.radius_of(hits, 1000, 0.5) for hits in range(0, 1001, 20)]
    assert radii == sorted(radii) and radii[25] == 0.0 < radii[30]


def test_a_linear_vote_keeps_the_distance_to_the_boundary(benchmark):
    """A smoothed linear classifier is the classifier, whose distances are known."""
    smoothing = benchmark("smoothing")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]]))
        model[1].bias.zero_()
    distance = torch.tensor([0.3, 0.6, 0.9, -0.3])
    items = crc.datasets.Split(distance[:, None] * torch.tensor([0.6, 0.8, 0.0]),
                               torch.zeros(4, dtype=torch.int64))  # fmt: skip
    found = smoothing.certified(model, items, 0.5, 20_000, seed=0)
    for radius, exact in zip(found, distance.tolist(), strict=True):
        assert radius <= max(exact, 0.0)
        assert radius >= 0.9 * exact


def test_smoothing_is_recorded(benchmark, tmp_path, capsys):
    words = "--dataset digits --noises 0.25 0.4 --seeds 0 1 --epochs 100 --width 32 --images 20"
    path = tmp_path / "smoothing.json"
    command = [*words.split(), "--copies", "2000", "--radius", "0.3", "--json", str(path)]
    assert benchmark("smoothing").main(command) == 0
    record = json.loads(path.read_text())
    assert record["validated"][f"{record['noise']:g}"] == max(record["validated"].values())
    by_seed = record["certified, by seed"]
    assert set(by_seed) == {"0", "1"}
    for row in by_seed.values():
        assert sorted(row.values(), reverse=True) == list(row.values())
        assert row["0.5"] > 0
    mean, deviation = record["certified, mean and deviation"]["0.5"]
    assert mean == pytest.approx((by_seed["0"]["0.5"] + by_seed["1"]["0.5"]) / 2)
    assert deviation >= 0


@pytest.mark.parametrize("activation", ["softplus", "tanh", "sigmoid"])
@pytest.mark.parametrize("sizes", [[4, 6, 3], [4, 6, 5, 3], [4, 5, 6, 5, 3]])
def test_other_works_curvatures_bound_the_hessian(benchmark, activation, sizes):
    tightness = benchmark("tightness")
    model = crc.mlp(sizes, activation, seed=len(sizes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    network = read_network(model)
    label, target = torch.tensor([0, 1]), torch.tensor([2, 0])
    composed = tightness.composed_bound(network, label, target)
    published = tightness.published_bound(network, label, target)
    x = 2 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(2):

        def margin(point, i=i):
            logits = network.logits(point[None])[0]
            return logits[label[i]] - logits[target[i]]

        norms = torch.linalg.matrix_norm(torch.func.vmap(torch.func.hessian(margin))(x), 2)
        assert norms.max() <= composed[i] and norms.max() <= published[i]
        if len(sizes) == 3:  # where ours is exact
            bounds = crc.curvature_bounds(model, int(label[i]), int(target[i]))
            ours = max(abs(float(bound)) for bound in bounds)
            assert ours <= composed[i] * (1 + 1e-9)


@pytest.mark.parametrize("activation", ["softplus", "tanh", "sigmoid", "silu"])
def test_a_prefix_is_as_steep_as_its_steepest_point(benchmark, activation):
    tightness = benchmark("tightness")
    network = read_network(crc.mlp([4, 6, 5, 3], activation, seed=1).double())
    one = torch.ones((), dtype=torch.float64)
    steepest = network.layers[0].activation.max_slope
    first = steepest * torch.linalg.matrix_norm(network.layers[0].weight, 2)
    found = tightness._lip_lt(network, 1, [one, first])
    product = steepest * network.layers[1].weight @ network.layers[0].weight
    norm = torch.linalg.matrix_norm(network.layers[1].weight, 2) * first
    assert torch.linalg.matrix_norm(product, 2) <= found <= norm * (1 + 1e-9)


def test_the_composed_radius_is_a_certificate(benchmark):
    tightness = benchmark("tightness")
    model = crc.mlp([4, 8, 6, 3], "tanh", seed=1).double()
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model(x).argmax(1)
    found = tightness.composed_radius(read_network(model), x, y)
    assert (found > 0).all() and (found <= crc.attack(model, x, y).distance).all()
    assert (found <= crc.certify(model, x, y).radius * (1 + 1e-9)).all()
    wrong = tightness.composed_radius(read_network(model), x, (y + 1) % 3)
    assert (wrong == 0).all()


@pytest.mark.parametrize("activation", ["softplus", "tanh"])
def test_inserted_layers_fold_away(benchmark, activation):
    deepened = benchmark("deepened")
    model, x = crc.mlp([6, 9, 4], activation, seed=1), torch.randn(50, 6)
    folded = deepened.linearised(deepen(model, 4), x)
    assert len(read_network(folded).layers) == 2
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0.02)
    again = deepened.linearised(model, x)
    torch.testing.assert_close(again(x), model(x))


def test_only_units_that_vary_bend(benchmark):
    deepened, x = benchmark("deepened"), torch.zeros(3, 6)
    assert deepened.bends(crc.mlp([6, 9, 4]), x, 0.5) == {}
    still = deepened.bends(deepen(crc.mlp([6, 9, 4], seed=1), 3), x, 0.1)
    fresh = deepened.bends(crc.mlp([6, 9, 9, 4], seed=1), x, 0.1)
    assert still["bends"] == 0 and still["varies"] < 1e-3
    assert fresh["bends"] > 0.5
    assert 0.01 < fresh["varies"] < deepened.bends(crc.mlp([6, 9, 9, 4], seed=1), x, 1)["varies"]


def test_copies_are_recorded_beside_their_original(benchmark, tmp_path, monkeypatch):
    shallow = crc.mlp([64, 16, 10], seed=0)
    crc.train(shallow, crc.load("digits").train, crc.Recipe(radius=0.4, epochs=12, batch_size=64))
    crc.save_model(tmp_path / "two.safetensors", shallow)
    crc.save_model(tmp_path / "three.safetensors", deepen(shallow, 3))
    files = [str(tmp_path / name) for name in ("two.safetensors", "three.safetensors")]
    words = ["--dataset", "digits", "--radius", "0.3", "--images", "40"]
    path = tmp_path / "record.json"
    assert benchmark("deepened").main([*files, *words, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["networks"]
    assert list(rows) == ["shallow", "untrained, 3 layers", "untrained, 4 layers", "three",
                          "three, linearised"]  # fmt: skip
    assert rows["three"] == rows["untrained, 3 layers"]
    assert rows["shallow"]["certified, local"] > 0.3
    for row in rows.values():
        assert row["answers as the shallow one"] > 0.9
        gained = row["certified alone"] - row["shallow alone"]
        assert row["certified, local"] - rows["shallow"]["certified, local"] == pytest.approx(
            gained / 40
        )


@pytest.fixture
def bars():
    """Small data in the shape of MNIST: bright rows or bright columns."""
    generator = torch.Generator().manual_seed(0)
    x = 0.2 * torch.rand(512, 28, 28, generator=generator)
    y = torch.arange(512) % 2
    x[y == 0, ::4] += 0.5
    x[y == 1, :, ::4] += 0.5
    return Split(x, y)


def test_the_penalty_of_a_convolutional_network_makes_its_default_tight(
    benchmark, bars, monkeypatch, tmp_path, capsys
):
    convolutional, path = benchmark("convolutional"), tmp_path / "record.json"
    monkeypatch.setattr(crc, "load", lambda _: SimpleNamespace(train=bars, test=bars))
    options = ["--strengths", "0", "0.3", "--seeds", "0", "--epochs", "20", "--images", "6"]
    assert convolutional.main([*options, "--json", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    free, bound = json.loads(path.read_text())["rows"]
    for row in free, bound:
        assert row["images"] == 6 and row["clean accuracy"] > 0.9
        assert 0 < row["default"] <= row["attack"] and sum(row["methods"].values()) == 6
    assert bound["default over attack"] > free["default over attack"]


def test_attacked_points_stay_in_their_balls_and_raise_the_loss(benchmark, bars):
    convolutional = benchmark("convolutional")
    torch.manual_seed(0)
    model, x, y = convolutional.network(), bars.x[:8], bars.y[:8]
    points = convolutional.attacked(model, x, y, 0.7)
    assert ((points - x).flatten(1).norm(dim=1) <= 0.7 * (1 + 1e-5)).all()
    loss = nn.functional.cross_entropy
    assert (loss(model(points), y, reduction="none") > loss(model(x), y, reduction="none")).all()


def test_at_other_radii_no_certificate_is_moved_and_none_is_lost(benchmark, digits, digits_model):
    items = digits.test.take(slice(0, 40))
    found = [benchmark("other_radii").at_radius(digits_model, items, r) for r in (0.1, 0.4, 2.0)]
    for row in found:
        assert row["violations"] == 0 and row["global"] <= row["local"] <= row["survived"]
    assert [row["local"] for row in found] == sorted((r["local"] for r in found), reverse=True)
    radius = crc.certify(digits_model, items.x, items.y).radius
    assert found[0]["global"] >= int((radius >= 0.1).sum()) > 0
