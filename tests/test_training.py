"""Training does what its recipe says, can be interrupted, and pays off in certified radii."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import crcbook as crc
from crcbook.checkpoints import save_tensors
from crcbook.networks import read_network
from crcbook.training import METHODS, best_epoch, knows_bfloat16
from crcbook.training import loop as module
from crcbook.training.augmentation import augmented, mirrored
from crcbook.training.losses import trained_layers

RECIPE = crc.Recipe(radius=0.5, gamma=0.02, epochs=4, batch_size=64, attack_steps=3)


def without_seconds(history):
    return [{name: epoch[name] for name in epoch if name != "seconds"} for epoch in history]


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("crt", "gamma"), [("crt", 0.5), ("crt-published", 2.0)])
def test_gamma_buys_low_curvature_and_robust_training_radius(digits, crt, gamma):
    radii, curvatures = [], []
    for method, weight in [("standard", 0.0), (crt, 0.002), (crt, gamma)]:
        model = crc.mlp([64, 32, 10], seed=0)
        recipe = replace(RECIPE, method=method, gamma=weight, epochs=8)
        curvatures.append(crc.train(model, digits.train, recipe)[-1]["curvature"])
        radii.append(crc.certify(model, digits.test.x, digits.test.y).radius.mean().item())
    assert curvatures[2] < 0.7 * curvatures[1]
    assert radii[1] > radii[0] and radii[2] > radii[0]


@pytest.fixture(scope="module")
def certified_accuracy(digits):
    """Of a method's network on the bundled digits, by curvature and by the Lipschitz constant."""

    def of(method):
        model = crc.mlp([64, 32, 10], "tanh", seed=0)
        # The bounds are loose until the network has learned to live with small balls.
        recipe = crc.Recipe(method, radius=0.8, gamma=0.02, epochs=20, batch_size=64,
                            ramp_epochs=10, attack_steps=4)  # fmt: skip
        crc.train(model, digits.train, recipe)
        x, y = digits.test.x, digits.test.y
        robust = crc.verify(model, x, y, radius=0.8).robust
        lipschitz = crc.certify(model, x, y, method="lipschitz").radius >= 0.8
        return robust.double().mean().item(), lipschitz.double().mean().item()

    return of


@pytest.fixture(scope="module")
def standard_accuracy(certified_accuracy):
    return certified_accuracy("standard")


@pytest.mark.parametrize("method", METHODS[1:])
def test_every_method_certifies_more_than_standard_training(
    method, certified_accuracy, standard_accuracy
):
    robust, lipschitz = certified_accuracy(method)
    assert robust > standard_accuracy[0] + 0.05
    if method in ("crown-ibp", "lipschitz"):
        assert lipschitz > standard_accuracy[1] + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_network_can_be_trained(digits, method):
    model = crc.mlp([64, 10], seed=0)
    history = crc.train(model, digits.train, replace(RECIPE, method=method))
    assert history[-1]["curvature"] == 0
    assert (model(digits.test.x).argmax(1) == digits.test.y).double().mean() > 0.7


def test_the_worst_margins_of_a_linear_network_are_one_objective(digits):
    losses = [
        [record["loss"] for record in crc.train(crc.mlp([64, 10]), digits.train, recipe)]
        for recipe in (replace(RECIPE, method=m) for m in ("ibp", "crown-ibp", "lipschitz"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_interval_training_refuses_activations_that_are_not_monotone(digits, method, tmp_path):
    model = crc.mlp([64, 8, 10], "gelu")
    with pytest.raises(ValueError, match="monotone"):
        crc.train(model, digits.train, replace(RECIPE, method=method), folder=tmp_path)


def test_training_is_reproducible(digits):
    models = [crc.mlp([64, 16, 10], seed=0) for _ in range(2)]
    histories = [crc.train(model, digits.train, RECIPE) for model in models]
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert without_seconds(histories[0]) == without_seconds(histories[1])
    other = crc.mlp([64, 16, 10], seed=0)
    crc.train(other, digits.train, replace(RECIPE, seed=1))
    assert not torch.equal(weights(models[0]), weights(other))


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_resumes_to_the_same_weights(method, digits, tmp_path, monkeypatch):
    training, validation = crc.split_validation(digits.train, 200)
    recipe = replace(RECIPE, method=method, average=0.9, augment=True, mirror=True, centred=True)
    whole = crc.mlp([64, 16, 12, 10], seed=0)
    history = crc.train(whole, training, recipe, validation)

    epoch = module._Trainer.epoch

    def interrupted(self, number, bar):
        if number == 2:
            raise KeyboardInterrupt
        epoch(self, number, bar)

    monkeypatch.setattr(module._Trainer, "epoch", interrupted)
    model = crc.mlp([64, 16, 12, 10], seed=0)
    with pytest.raises(KeyboardInterrupt):
        crc.train(model, training, recipe, validation, folder=tmp_path)
    monkeypatch.undo()
    model = crc.mlp([64, 16, 12, 10], seed=5)
    resumed = crc.train(model, training, recipe, validation, folder=tmp_path, resume=True)
    assert torch.equal(weights(model), weights(whole))
    assert without_seconds(resumed) == without_seconds(history)
    assert torch.equal(weights(crc.load_model(tmp_path / "model.safetensors")), weights(whole))


def test_the_best_epoch_on_validation_is_kept(digits):
    training, validation = crc.split_validation(digits.train, 300)
    model = crc.mlp([64, 16, 10], seed=0)
    history = crc.train(model, training, RECIPE, validation)
    kept = crc.verify(model, validation.x, validation.y, RECIPE.radius).robust.double().mean()
    assert kept.item() == max(record["certified_accuracy"] for record in history)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "lipschitz"])
def test_other_bounds_are_validated_by_the_bound_they_train(digits, method):
    fitted, validation = crc.split_validation(digits.train, 300)
    model = crc.mlp([64, 16, 10], "tanh", seed=0)
    recipe = replace(RECIPE, method=method, epochs=8, ramp_epochs=4)
    history = crc.train(model, fitted, recipe, validation)
    kept = history[best_epoch(history, recipe)]
    rival = "lipschitz" if method == "lipschitz" else "crown"
    proved = crc.certify(model, validation.x, validation.y, method=rival).radius >= recipe.radius
    assert 0.1 < kept["certified_accuracy"] <= kept["clean_accuracy"]
    assert kept["certified_accuracy"] <= proved.double().mean() + 1e-9  # CROWN's is no looser
    if method == "lipschitz":
        assert kept["certified_accuracy"] == proved.double().mean()


def epoch(clean=None, certified=None):
    if clean is None:
        return {"loss": 1.0}
    return {"loss": 1.0, "clean_accuracy": clean, "certified_accuracy": certified}


@pytest.mark.parametrize(
    ("history", "ramp", "kept"),
    [
        ([epoch(0.9, 0.5), epoch(0.8, 0.6), epoch(0.9, 0.4)], 0, 1),
        ([epoch(0.9, 0.0), epoch(0.8, 0.0), epoch(0.7, 0.0)], 0, 0),  # nothing certified
        ([epoch(0.9, 0.0), epoch(0.8, 0.0), epoch(0.7, 0.0)], 1, 1),  # the first balls grew
        ([epoch(0.9, 0.9), epoch(0.8, 0.1)], 1.5, 0),  # all of them did
        ([epoch(0.9, 0.5), epoch(0.9, 0.5)], 0, 1),  # the later one
        ([epoch(), epoch(0.1, 0.0), epoch()], 2, 1),  # not validated
        ([epoch(), epoch()], 0, 1),
    ],
)
def test_the_epoch_to_keep(history, ramp, kept):
    assert best_epoch(history, replace(RECIPE, ramp_epochs=ramp)) == kept


def test_standard_training_keeps_the_epoch_that_classifies_best():
    history = [epoch(0.8, 0.6), epoch(0.9, 0.4), epoch(0.85, 0.5)]
    assert best_epoch(history, replace(RECIPE, method="standard", ramp_epochs=0)) == 1


def test_averaged_weights_lag_behind(digits):
    plain, averaged, still = (crc.mlp([64, 16, 10], seed=0) for _ in range(3))
    start = weights(plain)
    for model, average in ((plain, 0.0), (averaged, 0.9), (still, 1 - 1e-9)):
        crc.train(model, digits.train, replace(RECIPE, average=average))
    torch.testing.assert_close(weights(still), start, rtol=0, atol=1e-5)
    moved = (weights(averaged) - weights(plain)).norm()
    assert 0 < moved < 0.2 * (weights(plain) - start).norm()


def test_only_some_epochs_are_validated_and_the_last_one_is(digits):
    training, validation = crc.split_validation(digits.train, 100)
    recipe = replace(RECIPE, validate_every=3)
    history = crc.train(crc.mlp([64, 8, 10]), training, recipe, validation)
    assert ["clean_accuracy" in record for record in history] == [False, False, True, True]


def test_augmented_images_are_anew_in_each_epoch_and_close_to_the_images(digits):
    x, shape = digits.train.x[:200].flatten(1), digits.train.x.shape[1:]
    first, again, other = (augmented(x, shape, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == x.shape and first.min() >= 0 and first.max() <= x.max() + 1e-6
    change = (first - x).norm(dim=1) / x.norm(dim=1)
    assert 0.05 < change.median() < 0.7
    # An image of one colour keeps it, but for the zeros that come in from outside.
    grey = torch.ones(5, 3 * 8 * 8)
    inner = augmented(grey, torch.Size((3, 8, 8)), 0).reshape(5, 3, 8, 8)[:, :, 2:-2, 2:-2]
    assert torch.allclose(inner, torch.ones_like(inner))


def test_half_of_the_images_are_mirrored_anew_in_each_epoch(digits):
    x, shape = digits.train.x[:400].flatten(1), digits.train.x.shape[1:]
    first, again, other = (mirrored(x, shape, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    flipped = digits.train.x[:400].flip(-1).flatten(1)
    kept, turned = ((first == of).all(1) for of in (x, flipped))
    assert (kept | turned).all() and 150 < turned.sum() < 250
    colours = torch.arange(24.0).reshape(1, 3, 2, 4).expand(50, -1, -1, -1)
    found = mirrored(colours.flatten(1), colours.shape[1:], 0).reshape(colours.shape)
    assert {tuple(one[:, 0, 0].tolist()) for one in found} == {(0, 8, 16), (3, 11, 19)}


def test_augmentation_trains_on_other_images_and_needs_some(digits, monkeypatch):
    recipe, seen = replace(RECIPE, epochs=2, augment=True, gamma=0.0), []
    monkeypatch.setattr(module, "augmented", lambda x, *of: seen.append(of) or augmented(x, *of))
    crc.train(crc.mlp([64, 8, 10]), digits.train, recipe)
    assert [of[0] for of in seen] == [digits.train.x.shape[1:]] * 2 and seen[0][1] != seen[1][1]
    flat = replace(digits.train, x=digits.train.x.flatten(1))
    with pytest.raises(ValueError, match=r"augment needs images; got items of shape \(64,\)"):
        crc.train(crc.mlp([64, 8, 10]), flat, recipe)
    with pytest.raises(ValueError, match=r"mirror needs images; got items of shape \(64,\)"):
        crc.train(crc.mlp([64, 8, 10]), flat, replace(recipe, augment=False, mirror=True))


def test_a_centred_step_is_that_of_a_network_whose_inputs_have_mean_0(digits):
    recipe = replace(RECIPE, method="standard", epochs=1, batch_size=len(digits.train))
    x, y = digits.train.x.flatten(1), digits.train.y
    centred, plain = crc.mlp([64, 8, 10], seed=0), crc.mlp([64, 8, 10], seed=0)
    mean = plain[2](plain[1](x[:1000])).mean(0).detach()
    crc.train(centred, digits.train, replace(recipe, centred=True))

    def logits():  # the same function, of weights that meet activations of mean 0
        return plain[3](plain[2](plain[1](x)) - mean)

    with torch.no_grad():
        plain[3].bias += plain[3].weight @ mean
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.04 * recipe.learning_rate)
    torch.nn.functional.cross_entropy(logits(), y).backward()
    optimizer.step()
    assert torch.allclose(centred[1].weight, plain[1].weight, atol=1e-7)
    assert torch.allclose(centred[3].weight, plain[3].weight, atol=1e-7)
    assert torch.allclose(centred[3].bias, plain[3].bias - plain[3].weight @ mean, atol=1e-6)


def test_a_checkpoint_of_another_training_is_refused(digits, tmp_path):
    recipe = replace(RECIPE, epochs=1)
    here = {"dataset": "digits"}
    crc.train(crc.mlp([64, 8, 10]), digits.train, recipe, folder=tmp_path, about=here)
    for model, changed, about, differing in (
        (crc.mlp([64, 8, 10]), replace(recipe, gamma=1, seed=1), here, "recipe gamma, recipe seed"),
        (crc.mlp([64, 8, 10], "tanh"), recipe, here, "model activation"),
        (crc.mlp([64, 8, 8, 10]), recipe, here, "model sizes"),
        (crc.mlp([64, 8, 10]), recipe, {"dataset": "others"}, "about dataset"),
        (crc.mlp([64, 8, 10]), recipe, None, "about dataset"),
    ):
        before = weights(model)
        with pytest.raises(RuntimeError, match=f"another training: its {differing} differs"):
            crc.train(model, digits.train, changed, folder=tmp_path, resume=True, about=about)
        assert torch.equal(weights(model), before)


def test_a_checkpoint_that_does_not_say_what_it_belongs_to_is_refused(digits, tmp_path):
    old = {"recipe": asdict(RECIPE), "history": []}
    save_tensors(tmp_path / "checkpoint.safetensors", {"model.w": torch.zeros(1)}, old)
    with pytest.raises(RuntimeError, match="does not say what it belongs to"):
        crc.train(crc.mlp([64, 8, 10]), digits.train, RECIPE, folder=tmp_path, resume=True)


def test_training_takes_the_models_that_are_certified(digits):
    torch.manual_seed(0)
    few, act = digits.train.take(slice(0, 500)), nn.Tanh()
    inner = nn.Sequential(nn.Linear(64, 16, bias=False), act, nn.Linear(16, 12), act)
    model = nn.Sequential(inner, nn.Identity(), nn.Linear(12, 10, bias=False)).double()
    rows = [layer.activation.name for layer in trained_layers(model)]
    assert rows == [layer.activation.name for layer in read_network(model).layers]
    for method in METHODS:
        nested = copy.deepcopy(model)
        history = crc.train(nested, few, replace(RECIPE, method=method, ramp_epochs=0))
        assert history[-1]["loss"] < history[0]["loss"]
        assert (history[-1]["curvature"] > 0) == method.startswith("crt")


ONES = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(0, 64), ONES[:0], "at least one item"),
        (torch.rand(3, 63), ONES, "64 values an item"),
        (torch.rand(3, 64) * torch.nan, ONES, "x must be finite"),
        (torch.rand(3, 64), 10 * ONES, r"y must be in 0\.\.9"),
        (torch.rand(3, 64), ONES[:2], "y must be"),
        (torch.rand(3, 64) - 1, ONES, "the box must hold every input"),
    ],
)
def test_items_that_cannot_be_trained_with_are_refused(digits, x, y, message):
    split = crc.Split(x, y)
    recipe = replace(RECIPE, attack_box=True)
    for splits in ((split, None), (digits.train, split)):
        with pytest.raises(ValueError, match=message):
            crc.train(crc.mlp([64, 8, 10]), splits[0], recipe, splits[1])


def test_models_that_cannot_be_trained_or_saved_are_refused_at_once(digits, tmp_path):
    relu = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    with pytest.raises(ValueError, match="cannot certify ReLU"):
        crc.train(relu, digits.train, RECIPE)
    foreign = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    before = weights(foreign)
    with pytest.raises(ValueError, match="crcbook.mlp builds"):
        crc.train(foreign, digits.train, RECIPE, folder=tmp_path)
    assert torch.equal(weights(foreign), before)


@pytest.mark.parametrize(
    ("machine", "onednn", "units", "known"),
    [
        ("x86_64", True, {"_is_avx512_bf16_supported": True}, True),
        ("AMD64", True, {"_is_amx_tile_supported": True}, True),
        ("x86_64", True, {}, False),  # AVX-512 without the unit, where oneDNN imitates it
        ("x86_64", True, None, False),  # a torch that cannot tell
        ("x86_64", False, {"_is_avx512_bf16_supported": True}, False),
        ("aarch64", True, {}, True),
    ],
)
def test_a_processor_that_imitates_bfloat16_does_not_know_it(
    machine, onednn, units, known, monkeypatch
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if units is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            has = units.get(name, False)
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
    assert knows_bfloat16("cpu") == known


@pytest.mark.parametrize(
    ("capability", "hip", "known"),
    [((7, 5), None, False), ((8, 0), None, True), ((9, 0), None, True), ((7, 0), "6.2", True)],
)
def test_a_gpu_that_imitates_bfloat16_does_not_know_it(capability, hip, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert knows_bfloat16("cuda:0") == known


def test_a_step_does_what_its_recipe_says(digits, monkeypatch):
    recipe = crc.Recipe(
        radius=0.4, reach=1.5, epochs=1, batch_size=64, ramp_epochs=0, attack_steps=5,
        attack_box=True, attack_dtype="bfloat16", curvature="local", ball=0.75, curvature_every=2,
        loss_q=0.3,
    )  # fmt: skip
    model, few = crc.mlp([64, 8, 10], seed=0), digits.train.take(slice(0, 192))
    monkeypatch.setattr(module, "knows_bfloat16", lambda device: True)
    seen = {}

    def spied(owner, name):
        original = getattr(owner, name)

        def spy(*arguments, **options):
            seen.setdefault(name, []).append(arguments + tuple(options.values()))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, spy)

    for name in ("worst_points", "generalised_cross_entropy", "verify"):
        spied(module, name)
    spied(module.CurvatureEstimate, "__call__")
    crc.train(model, few, recipe, validation=few)
    radius = pytest.approx(0.6)
    assert [call[3:] for call in seen["worst_points"]] == [(radius, 5, True)] * 3
    assert all(call[0][0].weight.dtype == torch.bfloat16 for call in seen["worst_points"])
    assert [call[2] for call in seen["generalised_cross_entropy"]] == [0.3] * 3
    # A call of no point draws the first directions; then every second of three steps.
    assert [call[2:] for call in seen["__call__"]] == [(), *[(pytest.approx(0.45),)] * 2]
    assert [call[3:] for call in seen["verify"]] == [(0.4, "local", "dual")]


@pytest.mark.parametrize(
    ("curvature", "asked", "validated"),
    [("global", {}, "global"), ("pointwise", {"x"}, "local"), ("local", {"x", "radius"}, "local")],
)
def test_curvature_is_bounded_where_the_recipe_says(
    digits, monkeypatch, curvature, asked, validated
):
    recipe = crc.Recipe(radius=0.4, epochs=1, curvature=curvature, curvature_every=3)
    model, few = crc.mlp([64, 8, 10], seed=0), digits.train.take(slice(0, 64))
    calls, verdicts = [], []
    call, verify = module.CurvatureEstimate.__call__, module.verify

    def asking(self, **options):
        calls.append(options)
        return call(self, **options)

    def verifying(*arguments, **options):
        verdicts.append(options["curvature"])
        return verify(*arguments, **options)

    monkeypatch.setattr(module.CurvatureEstimate, "__call__", asking)
    monkeypatch.setattr(module, "verify", verifying)
    crc.train(model, few, recipe, validation=few)
    assert [set(options) for options in calls] == [set(), set(asked)]  # the first one draws
    assert verdicts == [validated]


@pytest.mark.parametrize(
    "change",
    [
        {"method": "magic"},
        {"radius": 0},
        {"gamma": -1},
        {"epochs": 0},
        {"learning_rate": torch.nan},
        {"average": 1.0},
        {"validate_every": 0},
        {"curvature": "none"},
        {"attack_dtype": "int8"},
        {"loss_q": 1.1},
        {"loss_q": -0.1},
        {"ball": 0.0},
        {"attack_box": True, "method": "standard"},
    ],
)
def test_impossible_recipes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(RECIPE, **change)


@pytest.mark.parametrize(
    "change",
    [
        *({name: 1.5} for name in ("epochs", "batch_size", "attack_steps", "seed")),
        {"curvature_every": 2.0},
        {"validate_every": True},
        {"radius": "0.5"},
        {"gamma": None},
        {"attack_box": 1},
    ],
)
def test_recipes_of_another_type_are_refused(change):
    [name] = change
    with pytest.raises(TypeError, match=f"{name} must be of type"):
        replace(RECIPE, **change)
