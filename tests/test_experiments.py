"""Experiments are run once, recorded whole, and shared among processes."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.experiments import (
    RADIUS_UNIT,
    Experiment,
    certified_shares,
    decode_bits,
    decode_radii,
    drawn_anew,
    encode_bits,
    encode_radii,
    environment,
    evaluate,
    experiments,
    paired,
    reproduce,
    run_training,
    summary,
)
from crcbook.experiments import records as records_module
from crcbook.networks import deepen
from crcbook.training import METHODS, loop

# The package's attribute of that name is the function.
reproducing = importlib.import_module("crcbook.experiments.reproduce")

TINY = Experiment(
    "digits",
    2,
    "softplus",
    crc.Recipe(radius=0.4, gamma=0.02, epochs=2, batch_size=64),
    width=16,
)
ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "book" / "results").glob("*.json"))


@given(st.lists(st.floats(0, 6.5), min_size=1, max_size=50))
def test_recorded_radii_are_rounded_down_by_less_than_a_unit(values):
    radius = torch.tensor(values, dtype=torch.float64)
    decoded = decode_radii(encode_radii(radius))
    assert (decoded <= radius * (1 + 1e-15)).all()
    assert (decoded > radius - RADIUS_UNIT * (1 + 1e-9)).all()


def test_an_infinite_radius_is_recorded_as_the_largest():
    assert decode_radii(encode_radii(torch.tensor([torch.inf]))) == 65535 * RADIUS_UNIT


@given(st.lists(st.floats(0, 6.5), min_size=1, max_size=50), st.floats(0, 7))
def test_certified_shares_count_the_recorded_radii_from_a_distance_on(values, distance):
    radii = encode_radii(torch.tensor(values, dtype=torch.float64))
    record = {"radii": radii, "clean_accuracy": 0.75}
    far = sum(float(radius) >= distance for radius in decode_radii(radii)) / len(values)
    expected = far if distance > 0 else 0.75
    assert certified_shares(record, np.array([distance])) == pytest.approx([expected])


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_recorded_bits_are_the_column(values):
    column = torch.tensor(values)
    assert torch.equal(decode_bits(encode_bits(column), len(column)), column)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_the_paired_p_value_counts_the_outcomes_of_a_coin(items):
    first, second = torch.tensor(items, dtype=torch.bool).reshape(-1, 2).T
    found = paired(first, second)
    assert found.both == sum(a and b for a, b in items)
    assert found.neither == len(items) - found.both - found.first - found.second
    ups = [a for a, b in items if a != b]
    assert (found.first, found.second) == (sum(ups), len(ups) - sum(ups))
    uneven = abs(2 * sum(ups) - len(ups))
    outcomes = list(itertools.product((0, 1), repeat=len(ups)))
    as_uneven = sum(abs(2 * sum(outcome) - len(ups)) >= uneven for outcome in outcomes)
    assert found.p_value == pytest.approx(as_uneven / len(outcomes), rel=1e-12)


def test_a_paired_comparison_of_ten_thousand_images_is_exact():
    first, second = torch.zeros(2, 10_000, dtype=torch.bool)
    first[:163], second[163:223] = True, True
    found = paired(first, second)
    assert (found.first, found.second) == (163, 60)
    assert found.p_value == pytest.approx(2 * mpmath_tail(60, 223), rel=1e-12)
    first[:], second[:] = True, False
    assert paired(first, second).p_value == 0.0  # 2^-9999, below what a float holds
    with pytest.raises(ValueError, match="two bool columns of one length"):
        paired(first, second[1:])


def mpmath_tail(least, tosses):
    """How likely at most so many heads are, by the regularised incomplete beta function."""
    return float(mpmath.betainc(tosses - least, least + 1, 0, 0.5, regularized=True))


def test_what_is_recorded_is_not_run_again(tmp_path):
    results, runs = tmp_path / "results", tmp_path / "runs"
    tiny = replace(TINY, crown_images=10)
    [path] = reproduce({"tiny": tiny}, results, runs)
    record = json.loads(path.read_text())
    check_record(record)
    model = crc.load_model(runs / "tiny" / "model.safetensors")
    test = crc.load("digits").test
    radius = crc.certify(model, test.x, test.y).radius
    assert (decode_radii(record["radii"]) <= radius).all()
    for name, figure in (("certified", "certified_accuracy"), ("survived", "empirical_accuracy")):
        bits = decode_bits(record["bits"][name], record["images"])
        assert bits.double().mean().item() == pytest.approx(record[figure], abs=1e-6)
    assert record["certified_accuracy_global"] == pytest.approx(
        (radius >= 0.4).double().mean().item(), abs=1e-6
    )
    first = test.take(slice(0, 10))
    crown = crc.certify(model, first.x, first.y, method="crown").radius
    correct = model(first.x).argmax(1) == first.y
    assert record["mean_radius_crown"] == pytest.approx(crown[correct].mean().item())
    assert record["mean_radius_crown_images"] == pytest.approx(radius[:10][correct].mean().item())
    assert reproduce({"tiny": tiny}, results, runs) == []
    other = replace(tiny, width=17)
    with pytest.raises(RuntimeError, match="another experiment of this name .its width differs"):
        reproduce({"tiny": other}, results, runs)


@pytest.fixture
def stops_after(monkeypatch):
    """Have evaluations stop after so many parts; the items of each part are noted."""

    def limit(parts):
        items = []

        def interrupted(model, test, *rest, **options):
            if len(items) == parts:
                raise KeyboardInterrupt
            items.append(len(test))
            return evaluate(model, test, *rest, **options)

        monkeypatch.setattr(reproducing, "evaluate", interrupted)
        return items

    return limit


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, stops_after):
    tiny, runs = {"tiny": replace(TINY, crown_images=7)}, tmp_path / "runs"
    [path] = reproduce(tiny, tmp_path / "whole", runs)
    whole = json.loads(path.read_text())
    items = stops_after(1)
    with pytest.raises(KeyboardInterrupt):
        reproduce(tiny, tmp_path / "parted", runs)
    rest = stops_after(9)
    [path] = reproduce(tiny, tmp_path / "parted", runs)
    parted = json.loads(path.read_text())
    assert len(items) == 1 and sum(items + rest) == whole["images"]
    assert parted.pop("seconds_to_certify") > 0 and whole.pop("seconds_to_certify") > 0
    assert parted == whole
    assert not list(runs.rglob("evaluation-*"))


def test_what_another_program_has_evaluated_is_not_taken_over(tmp_path, stops_after, monkeypatch):
    program = tmp_path / "package" / "proof" / "core.py"
    program.parent.mkdir(parents=True)
    program.write_text("")
    monkeypatch.setattr(reproducing, "PACKAGE", tmp_path / "package")
    items = stops_after(1)
    with pytest.raises(KeyboardInterrupt):
        reproduce({"tiny": TINY}, tmp_path, tmp_path / "runs")
    assert len(items) == 1
    items = stops_after(9)
    program.write_text("another")
    reproduce({"tiny": TINY}, tmp_path, tmp_path / "runs")
    assert sum(items) == len(crc.load("digits").test)


def check_record(record):
    """What a reader of a record relies on."""
    names = (
        "name dataset layers activation method radius clean_accuracy certified_accuracy "
        "certified_accuracy_runner_up certified_accuracy_global empirical_accuracy mean_radius "
        "exact_fraction radii history seconds_an_epoch seconds_to_certify seed environment "
        "training_environment command images rival"
    )
    assert not set(names.split()) - set(record)
    assert record["violations"] == 0
    assert record["certified_accuracy"] <= record["empirical_accuracy"] <= record["clean_accuracy"]
    if record["box"]:
        assert record["violations_box"] == 0
        assert record["certified_accuracy_box"] <= record["empirical_accuracy_box"]
        assert record["certified_accuracy"] <= record["certified_accuracy_box"]
    if record["rival"]:
        assert record["certified_accuracy_rival"] <= record["certified_accuracy"]
    if record["crown_images"]:
        assert record["mean_radius_crown"] > 0 and record["mean_radius_crown_images"] > 0
    assert record["certified_accuracy_global"] <= record["certified_accuracy"]
    assert record["certified_accuracy"] <= record["certified_accuracy_runner_up"]
    radii = decode_radii(record["radii"])
    assert len(radii) == record["images"]
    assert (radii > 0).double().mean() <= record["clean_accuracy"] + 1e-6
    robust = (radii >= record["radius"]).double().mean()
    assert robust <= record["certified_accuracy_global"] + 1e-6
    assert len(record["history"]) == record["recipe"]["epochs"]
    assert record["command"].startswith("python -m crcbook reproduce")


def test_a_training_of_another_experiment_is_not_taken_for_this_one(tmp_path):
    trained = replace(TINY, dataset="moons")
    run_training(trained, tmp_path / "tiny")
    for other, differing in (
        (replace(trained, dataset="circles"), "about dataset"),
        (replace(trained, seed=1), "about seed"),
        (replace(trained, activation="tanh"), "model activation"),
        (replace(trained, start=trained), "about start"),
    ):
        with pytest.raises(RuntimeError, match=f"its {differing} differs"):
            run_training(other, tmp_path / "tiny")


def test_a_run_keeps_the_environment_it_was_trained_in(tmp_path, monkeypatch):
    trained = replace(TINY, dataset="moons")
    _, facts = run_training(trained, tmp_path)
    monkeypatch.setattr(reproducing, "environment", lambda device: {"python": "4"})
    assert run_training(trained, tmp_path)[1] == facts
    assert json.loads((tmp_path / "run.json").read_text()) == facts
    _, anew = run_training(trained, tmp_path, resume=False)
    assert anew["environment"] == {"python": "4"}


def test_a_commit_is_that_of_the_checkout_the_package_belongs_to(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    copy = tmp_path / "package.py"
    copy.write_text("")
    monkeypatch.setattr(records_module, "PACKAGE", tmp_path)
    git("init")
    git("commit", "--allow-empty", "-m", "Another project")
    assert environment("cpu")["commit"] is None
    git("add", copy.name)
    git("commit", "-m", "This package")
    assert re.fullmatch("[0-9a-f]{12}", environment("cpu")["commit"])


def test_a_deeper_experiment_goes_on_from_a_shallower_one(tmp_path):
    deeper = replace(TINY, layers=3, start=TINY, recipe=replace(TINY.recipe, epochs=1))
    model, facts = run_training(deeper, tmp_path / "deep")
    [start] = tmp_path.glob("start-digits-2-softplus-*")
    shallow = crc.load_model(start / "model.safetensors")
    assert len(model) == len(shallow) + 2
    assert len(facts["history"]) == 1
    near = (deepen(shallow, 3)[1].weight - model[1].weight).norm() / model[1].weight.norm()
    assert 0 < near < 0.5


def test_an_experiment_goes_on_from_the_mean_of_others(tmp_path):
    starts = tuple(drawn_anew(TINY, seed) for seed in (0, 1))
    still = replace(TINY.recipe, epochs=1, learning_rate=1e-9)
    wide = replace(TINY, width=2 * TINY.width, start=starts, recipe=still)
    model, _ = run_training(wide, tmp_path / "wide", names={starts[1]: "one"})
    [zero] = tmp_path.glob("start-digits-2-softplus-*")
    models = [crc.load_model(path / "model.safetensors") for path in (zero, tmp_path / "one")]
    x = crc.load("digits").test.x
    expected = torch.stack([start(x) for start in models]).mean(0)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=0)
    assert drawn_anew(wide, 5).starts == (drawn_anew(TINY, 5),) * 2


def test_a_random_start_may_be_nearly_linear(tmp_path):
    still = replace(TINY.recipe, epochs=1, learning_rate=1e-9)
    deep = replace(TINY, layers=3, recipe=still, initial="nearly linear")
    model, _ = run_training(deep, tmp_path / "deep")
    stretch = torch.linalg.svdvals(model[3].weight.detach())
    torch.testing.assert_close(stretch, torch.ones_like(stretch), atol=1e-4, rtol=0)
    plain, _ = run_training(replace(deep, initial="default"), tmp_path / "plain")
    assert torch.linalg.svdvals(plain[3].weight.detach()).std() > 0.1


def test_the_first_test_images_alone_are_evaluated_where_an_experiment_says_so(tmp_path):
    few, all_of_them = replace(TINY, test_images=40), tmp_path / "runs"
    [path] = reproduce({"few": few}, tmp_path, all_of_them)
    record = json.loads(path.read_text())
    model = crc.load_model(all_of_them / "few")
    first = crc.load("digits").test.take(slice(0, 40))
    radius = crc.certify(model, first.x, first.y, method="dual").radius
    assert record["images"] == 40
    assert record["certified_accuracy_global"] == (radius >= 0.4).double().mean().item()
    assert not reproduce({"few": few}, tmp_path, all_of_them)
    with pytest.raises(RuntimeError, match="test_images"):
        reproduce({"few": TINY}, tmp_path, all_of_them)


def test_experiments_with_one_start_train_it_once(tmp_path, monkeypatch):
    epochs, epoch = [], loop._Trainer.epoch

    def counted(self, *rest):
        epochs.append(self.recipe.gamma)
        epoch(self, *rest)

    monkeypatch.setattr(loop._Trainer, "epoch", counted)
    for gamma in (0.1, 0.2):
        tuned = replace(TINY, recipe=replace(TINY.recipe, gamma=gamma, epochs=1), start=TINY)
        run_training(tuned, tmp_path / f"tiny-{gamma}")
    assert epochs == [TINY.recipe.gamma, TINY.recipe.gamma, 0.1, 0.2]
    run_training(replace(TINY, start=replace(TINY, seed=1)), tmp_path / "other")
    assert len(list(tmp_path.glob("start-*"))) == 2
    epochs.clear()
    wanted = {
        "tiny": TINY,
        "tuned": replace(TINY, recipe=replace(TINY.recipe, gamma=0.1), start=TINY),
    }
    reproduce(wanted, tmp_path / "results", tmp_path / "runs")
    assert epochs == [TINY.recipe.gamma] * TINY.recipe.epochs + [0.1] * TINY.recipe.epochs


@pytest.mark.parametrize(("method", "rival"), [("crown-ibp", "crown"), ("lipschitz", "lipschitz")])
def test_what_is_trained_for_another_bound_is_certified_by_it_too(digits, method, rival):
    model, radius = crc.mlp([64, 24, 10], "tanh", seed=0), 0.5
    recipe = crc.Recipe(method, radius=radius, epochs=12, batch_size=64, ramp_epochs=6)
    crc.train(model, digits.train, recipe)
    test = digits.test.take(slice(0, 100))
    columns = evaluate(model, test, radius, rival=rival)
    expected = crc.certify(model, test.x, test.y, method=rival).radius
    decided = (expected - radius).abs() > 1e-3  # where the search for a radius stops
    assert torch.equal(columns["certified_rival"][decided], (expected >= radius)[decided])
    assert torch.equal(
        columns["certified"], columns["certified_rival"] | (columns["radius"] >= radius)
    )
    figures = summary(columns, radius)
    assert 0.2 < figures["certified_accuracy_rival"] <= figures["certified_accuracy"]
    assert figures["violations"] == 0


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_books_records_are_whole_and_belong_to_its_experiments(path):
    record = json.loads(path.read_text())
    check_record(record)
    assert record["name"] == path.stem
    wanted = experiments("full")[path.stem]
    assert reproducing._is_recorded(path, wanted)
    assert record["images"] == (wanted.test_images or 10_000)


def test_the_readme_prints_the_records():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(mnist-.*?)` \|(.*)\|$", text, flags=re.MULTILINE)
    wanted = [f"mnist-2-softplus-crt{end}" for end in ("-mean-of-three", "-long", "", "-box")]
    assert [name for name, _ in rows] == wanted
    runner_up = re.search(r"in its order, (.*?) %", text, flags=re.DOTALL)[1]
    for name, figures in rows:
        record = json.loads((ROOT / "book" / "results" / f"{name}.json").read_text())
        columns = ("clean_accuracy", "certified_accuracy", "empirical_accuracy",
                   "certified_accuracy_box", "empirical_accuracy_box")  # fmt: skip
        printed = [float(figure) for figure in re.findall(r"[\d.]+", figures)]
        assert printed == [pytest.approx(100 * record[column], abs=5e-3) for column in columns]
        assert f"{100 * record['certified_accuracy_runner_up']:.2f}" in runner_up


def test_certificates_and_attacks_agree_item_by_item(digits, digits_model):
    test = digits.test.take(slice(0, 60))
    columns = evaluate(digits_model, test, radius=0.5, box=True, local=True)
    assert set(columns) == {
        "correct", "exact", "radius", "certified", "certified_runner_up", "survived",
        "certified_box", "survived_box",
    }  # fmt: skip
    assert (columns["certified"] | (columns["radius"] < 0.5)).all()
    assert (columns["survived"] | ~columns["certified"]).all()
    assert (columns["survived_box"] | ~columns["certified_box"]).all()
    assert (columns["certified_box"] | ~columns["certified"]).all()
    assert (columns["certified_runner_up"] | ~columns["certified"]).all()
    assert (columns["correct"] | ~columns["certified_runner_up"]).all()
    figures = summary(columns, 0.5)
    assert figures["images"] == 60 and figures["violations"] == 0


def test_local_curvature_certifies_more_with_and_without_a_box(digits, bent_model):
    test, radius = digits.test.take(slice(0, 60)), 0.3

    def proved(**options):
        return crc.verify(bent_model, test.x, test.y, radius, **options).robust

    columns = evaluate(bent_model, test, radius, box=True, local=True)
    everywhere, local = columns["radius"] >= radius, proved(curvature="local")
    box, local_box = proved(box=(0, 1)), proved(box=(0, 1), curvature="local")
    assert (local & ~everywhere).any() and (local_box & ~local & ~box).any()
    assert torch.equal(columns["certified"], everywhere | local)
    assert torch.equal(columns["certified_box"], everywhere | local | box | local_box)
    # What the attack moved into the runner-up class is not asked for, and would have failed.
    runner_up = proved(targets="runner-up", curvature="local")
    assert (~columns["survived"] & columns["correct"]).any()
    assert torch.equal(columns["certified_runner_up"], everywhere | local | runner_up)


def test_a_box_that_does_not_hold_the_items_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("crcbook.experiments.evaluation.certify", None)
    with pytest.raises(ValueError, match="the box must hold every input"):
        evaluate(crc.mlp([2, 4, 2]), crc.load("moons").test, 0.1, box=True)


def test_two_processes_share_the_work(tmp_path):
    alone = [sys.executable, "-m", "crcbook"]
    team = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "crcbook"]
    names = ["digits-2-softplus-standard", "digits-2-softplus-ibp"]
    records = []
    for program, folder in ((alone, tmp_path / "alone"), (team, tmp_path / "team")):
        words = ["reproduce", "--profile", "quick", "--only", *names, "--device", "cpu",
                 "--results", str(folder), "--runs", str(folder / "runs")]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*program, *words], check=True, env=environment, capture_output=True)
        records.append([json.loads((folder / f"{name}.json").read_text()) for name in names])
    for one, two in zip(*records, strict=True):
        assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
        for figure in ("clean_accuracy", "certified_accuracy", "empirical_accuracy_box"):
            assert one[figure] == pytest.approx(two[figure], abs=0.01)
        for figure in ("mean_radius_crown", "mean_radius_crown_images"):
            assert one[figure] == pytest.approx(two[figure], abs=0.01)
        difference = decode_radii(one["radii"]) - decode_radii(two["radii"])
        assert difference.abs().max() <= 0.01


def test_profiles_are_named_and_unknown_ones_refused():
    for profile in ("quick", "full"):
        for name, experiment in experiments(profile).items():
            assert name.startswith(
                f"{experiment.dataset}-{experiment.layers}-{experiment.activation}"
                f"-{experiment.recipe.method}"
            )
    with pytest.raises(ValueError, match="profile must be one of quick, full; got 'slow'"):
        experiments("slow")


def test_the_full_profile_has_every_row_of_the_tables():
    found = experiments("full")
    facts = list(found.values())
    assert not any(one == other for i, one in enumerate(facts) for other in facts[:i])
    for layers in (2, 3, 4):
        rows = [f"mnist-{layers}-softplus-{method}" for method in METHODS]
        rows += [f"mnist-{layers}-{activation}-crt" for activation in ("sigmoid", "tanh")]
        rows += [f"mnist-{layers}-sigmoid-{method}-0.5" for method in ("crt", "standard")]
        assert {*rows, f"fashion-mnist-{layers}-softplus-crt"} <= set(found)
        for name in rows[:3]:
            assert (found[name].layers, found[name].recipe.radius) == (layers, 1.58)
    for experiment in found.values():
        if experiment.recipe.method in ("ibp", "crown-ibp", "lipschitz"):
            first = (experiment.start or experiment).recipe
            assert first.ramp_epochs == first.epochs / 2
    gammas = [e.recipe.gamma for name, e in found.items() if "crt-gamma-" in name]
    assert gammas == sorted(set(gammas)) and len(gammas) == 5
