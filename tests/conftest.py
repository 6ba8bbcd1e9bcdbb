"""What several test files share: random networks, dense Hessians, trained digits, a browser."""

import os

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

import crcbook as crc

settings.register_profile("crcbook", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("crcbook")

SMOOTH = sorted(crc.ACTIVATIONS)


@st.composite
def random_networks(draw, max_inputs=6, max_width=12, max_classes=4, activations=SMOOTH):
    """A network of 2 to 5 layers whose weights are scaled by 1/4 to 4, and its generator."""
    seed = draw(st.integers(0, 2**31 - 1))
    hidden = draw(st.lists(st.integers(1, max_width), min_size=1, max_size=4))
    sizes = [draw(st.integers(1, max_inputs)), *hidden, draw(st.integers(2, max_classes))]
    model = crc.mlp(sizes, draw(st.sampled_from(activations)), seed=seed)
    scale = draw(st.sampled_from([0.25, 1.0, 4.0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.double(), torch.Generator().manual_seed(seed)


def margin_hessian(model, x, label, target):
    """The dense float64 Hessian of ``z_label - z_target`` at one point, by autograd."""

    def margin(point):
        logits = model(point[None])[0]
        return logits[label] - logits[target]

    return torch.autograd.functional.hessian(margin, x.double())


@pytest.fixture(scope="session")
def digits():
    """The bundled digits."""
    return crc.load("digits")


@pytest.fixture(scope="session")
def digits_model(digits):
    """A small network trained for curvature on the bundled digits."""
    model = crc.mlp([64, 48, 10], seed=0)
    recipe = crc.Recipe(radius=0.5, gamma=0.02, epochs=12, batch_size=64, attack_steps=4)
    crc.train(model, digits.train, recipe)
    return model


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    import browser as book

    if book.CHROMIUM is None and not os.environ.get("CRCBOOK_REQUIRE_BROWSER"):
        pytest.skip("no Chromium found; on Debian: apt install chromium")
    # Its event loop must end before the chapters are run: a module at a time.
    with book.launch() as browser:
        yield browser
