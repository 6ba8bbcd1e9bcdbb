"""Training does what its recipe says, can be interrupted, and pays off in certified radii."""

from dataclasses import replace

import pytest
import torch

import crcbook as crc
from crcbook.objectives import CurvatureEstimate, worst_points

RECIPE = crc.Recipe(radius=0.5, gamma=0.02, epochs=4, batch_size=64, attack_steps=3)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_worst_points_stay_in_the_ball_and_raise_the_loss(digits, digits_model):
    x, y = digits.test.x[:50].flatten(1), digits.test.y[:50]
    points = worst_points(digits_model, x, y, radius=0.4, steps=5)
    assert ((points - x).norm(dim=1) <= 0.4 * (1 + 1e-5)).all()
    with torch.no_grad():
        before, after = (
            torch.nn.functional.cross_entropy(digits_model(p), y, reduction="none")
            for p in (x, points)
        )
    assert (after > before).all()


@pytest.mark.parametrize("activation", sorted(crc.ACTIVATIONS))
@pytest.mark.parametrize("hidden", [[15], [15, 12], [8, 9, 10]])
def test_the_curvature_estimate_approaches_the_proved_bound_from_below(activation, hidden):
    model = crc.mlp([10, *hidden, 4], activation, seed=1)
    estimate = CurvatureEstimate(model)(steps=300).item()
    label, target = (1 - torch.eye(4)).nonzero().T
    bound = -crc.curvature_bounds(model, label, target)[0].min().item()
    assert estimate == pytest.approx(bound, rel=1e-3) and estimate <= bound * (1 + 1e-5)


def test_gamma_buys_low_curvature_and_robust_training_radius(digits):
    radii, curvatures = [], []
    for method, gamma in [("standard", 0.0), ("crt", 0.002), ("crt", 0.5)]:
        model = crc.mlp([64, 32, 10], seed=0)
        recipe = replace(RECIPE, method=method, gamma=gamma, epochs=8)
        curvatures.append(crc.train(model, digits.train, recipe)[-1]["curvature"])
        radii.append(crc.certify(model, digits.test.x, digits.test.y).radius.mean().item())
    assert curvatures[2] < 0.7 * curvatures[1]
    assert radii[1] > radii[0] and radii[2] > radii[0]


def test_training_is_reproducible(digits):
    models = [crc.mlp([64, 16, 10], seed=0) for _ in range(2)]
    histories = [crc.train(model, digits.train, RECIPE) for model in models]
    assert torch.equal(weights(models[0]), weights(models[1])) and histories[0] == histories[1]
    other = crc.mlp([64, 16, 10], seed=0)
    crc.train(other, digits.train, replace(RECIPE, seed=1))
    assert not torch.equal(weights(models[0]), weights(other))


def test_an_interrupted_training_resumes_to_the_same_weights(digits, tmp_path, monkeypatch):
    training, validation = crc.split_validation(digits.train, 200)
    whole = crc.mlp([64, 16, 10], seed=0)
    history = crc.train(whole, training, RECIPE, validation)

    from crcbook import training as module

    epoch = module._Trainer.epoch

    def interrupted(self, number, bar):
        if number == 2:
            raise KeyboardInterrupt
        epoch(self, number, bar)

    monkeypatch.setattr(module._Trainer, "epoch", interrupted)
    model = crc.mlp([64, 16, 10], seed=0)
    with pytest.raises(KeyboardInterrupt):
        crc.train(model, training, RECIPE, validation, folder=tmp_path)
    monkeypatch.undo()
    model = crc.mlp([64, 16, 10], seed=5)
    resumed = crc.train(model, training, RECIPE, validation, folder=tmp_path, resume=True)
    assert torch.equal(weights(model), weights(whole)) and resumed == history
    assert torch.equal(weights(crc.load_model(tmp_path / "model.safetensors")), weights(whole))


def test_the_best_epoch_on_validation_is_kept(digits):
    training, validation = crc.split_validation(digits.train, 300)
    model = crc.mlp([64, 16, 10], seed=0)
    history = crc.train(model, training, RECIPE, validation)
    kept = crc.verify(model, validation.x, validation.y, RECIPE.radius).robust.double().mean()
    assert kept.item() == max(record["certified_accuracy"] for record in history)


def test_a_checkpoint_of_another_recipe_is_refused(digits, tmp_path):
    recipe = replace(RECIPE, epochs=1)
    crc.train(crc.mlp([64, 8, 10]), digits.train, recipe, folder=tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        crc.train(
            crc.mlp([64, 8, 10]),
            digits.train,
            replace(recipe, gamma=1),
            folder=tmp_path,
            resume=True,
        )


@pytest.mark.parametrize(
    "change",
    [
        {"method": "magic"},
        {"radius": 0},
        {"gamma": -1},
        {"epochs": 0},
        {"learning_rate": torch.nan},
    ],
)
def test_impossible_recipes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(RECIPE, **change)
