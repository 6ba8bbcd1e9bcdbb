"""What the curvature of a ball proves ends at the ball, and no adversary lies inside."""

import pytest
import torch

import crcbook as crc
from crcbook.networks import read_network
from crcbook.proof.quadratic import Prover
from crcbook.stages.balls import Balls


def cases(hidden, count=6):
    """Bent networks of the plane with inputs, their classes in order, and attacks."""
    for seed in range(count):
        model = crc.mlp([2, *hidden, 3], ("tanh", "softplus")[seed % 2], seed=seed).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        order = read_network(model).logits(x).argsort(1, descending=True)
        distance = crc.attack(model, x, order[:, 0], restarts=3).distance
        yield model, x, order[:, 0], order[:, 1:], distance


def raised(model, x, label, targets, radii, bounds, radius=None):
    network = read_network(model)
    searched = Prover.of(network), x, label, targets, radii, bounds, radius
    return Balls(*searched, box=None).raised()


@pytest.mark.parametrize("hidden", [[8], [8, 8]], ids=str)
def test_a_radius_ends_at_the_ball_whose_curvature_proved_it(hidden):
    grown = 0
    for model, x, label, targets, distance in cases(hidden):
        for share in (0.2, 0.5, 1.5):
            radii = (share * distance).clamp(max=5)
            before = torch.full(targets.shape, 1e-6, dtype=torch.float64)
            bound = raised(model, x, label, targets, radii, before)
            assert (bound <= radii[:, None].maximum(before)).all()
            assert (bound >= before).all() and (bound.amin(1) <= distance).all()
            grown += int((bound > before).sum())
    assert grown > 30


@pytest.mark.parametrize("hidden", [[8], [8, 8]], ids=str)
def test_no_margin_is_proved_in_a_ball_that_holds_an_adversary(hidden):
    proved = 0
    for model, x, label, targets, distance in cases(hidden):
        for item in distance.isfinite().nonzero().squeeze(1).tolist():
            one = tuple(part[item : item + 1] for part in (x, label, targets))
            nothing = torch.full((1, 2), -1e-300, dtype=torch.float64)
            for share in (0.5, 1 + 1e-6):
                radius = share * distance[item].item()
                radii = torch.tensor([radius], dtype=torch.float64)
                robust = bool((raised(model, *one, radii, nothing, radius) > 0).all())
                assert share < 1 or not robust
                proved += robust
    assert proved > 10
