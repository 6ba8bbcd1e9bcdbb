"""The catalogue: every network of the book's tables, by name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from crcbook.training import Recipe

PROFILES = ("quick", "full")
_CONTROL = "mnist-2-softplus-crt-control"
# The bounds that certify best what was trained for them.
BOUNDS = {"ibp": "crown", "crown-ibp": "crown", "lipschitz": "lipschitz"}


@dataclass(frozen=True)
class Experiment:
    """A network to train and what to certify it for.

    Attributes:
        dataset: a name that :func:`crcbook.load` knows.
        layers: linear layers; 2 is one hidden layer.
        activation: a name from the table of activations.
        recipe: how it is trained; its radius is also the one its accuracies are for.
        width: units of a hidden layer.
        seed: the seed of the initialisation; the recipe has its own.
        box: also confine an adversary to pixels in [0, 1].
        test_images: how many, from the first, are evaluated; None for all. Where a network
            bends strongly, its local certificates take seconds an image.
        crown_images: how many of them, from the first, also get a radius by CROWN.
        start: the experiment with as many layers or fewer whose trained network, deepened by
            :func:`crcbook.networks.deepen`, this one goes on from; of several, the mean
            (:func:`crcbook.networks.mean_of`), as wide as all together; None for a random start.
        initial: how a random start is drawn, ``"default"`` by torch or ``"nearly linear"`` by
            :func:`crcbook.networks.nearly_linear`.
    """

    dataset: str
    layers: int
    activation: str
    recipe: Recipe
    width: int = 1024
    seed: int = 0
    box: bool = True
    test_images: int | None = None
    crown_images: int = 0
    start: "Experiment | tuple[Experiment, ...] | None" = None
    initial: str = "default"

    @property
    def starts(self) -> "tuple[Experiment, ...]":
        """The experiments that this one goes on from."""
        if self.start is None:
            return ()
        return self.start if isinstance(self.start, tuple) else (self.start,)

    def with_starts(self, change: "Callable[[Experiment], Experiment]") -> "Experiment":
        """This experiment going on from others in the place of its own.

        Args:
            change: what to go on from in the place of a start.

        Returns:
            The experiment; itself where it has a random start.
        """
        starts = tuple(map(change, self.starts))
        if not starts:
            return self
        return replace(self, start=starts if isinstance(self.start, tuple) else starts[0])


def drawn_anew(experiment: Experiment, seed: int) -> Experiment:
    """An experiment with all of its stages from another seed.

    Args:
        experiment: what to train.
        seed: the seed of the initialisation and of the recipe.

    Returns:
        The experiment.
    """
    found = replace(experiment, recipe=replace(experiment.recipe, seed=seed), seed=seed)
    return found.with_starts(lambda start: drawn_anew(start, seed))


def experiments(profile: str = "full") -> dict[str, Experiment]:
    """The experiments of a profile, in the order of their worth.

    Args:
        profile: ``"full"``, the book's tables, or ``"quick"``, the same code on the digits.

    Returns:
        Experiments by name.

    Raises:
        ValueError: for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}; got {profile!r}")
    return full() if profile == "full" else quick()


def full() -> dict[str, Experiment]:
    """The book's tables.

    Returns:
        Experiments by name.
    """
    broad = Recipe(gamma=0.03, reach=1.1, epochs=40, average=0.99, attack_dtype="bfloat16",
                   loss_q=0.3)  # fmt: skip
    fine = replace(broad, gamma=0.06, epochs=6, learning_rate=5e-4, ramp_epochs=0.0)
    boxed = replace(fine, epochs=8, learning_rate=1e-3, attack_box=True, validate_every=4)
    patient = replace(broad, epochs=120, validate_every=10)
    tuned = replace(fine, epochs=4, learning_rate=1e-3, validate_every=4)
    brief = replace(broad, gamma=0.06, epochs=12)
    first = Experiment("mnist", 2, "softplus", broad)
    two = replace(first, recipe=fine, start=first)
    long = replace(two, recipe=replace(tuned, gamma=0.1), start=replace(first, recipe=patient))
    found = {
        "mnist-2-softplus-crt": two,
        "mnist-2-softplus-crt-box": replace(two, recipe=boxed),
        "mnist-2-softplus-crt-long": long,
        "mnist-2-softplus-crt-augmented": _in_all_stages(long, augment=True),
        "mnist-2-softplus-crt-wide-augmented": _in_all_stages(_wide(long), augment=True),
        **_seeds_and_mean("mnist-2-softplus-crt", long),
        "mnist-3-softplus-crt": _deeper(two, 3),
        "mnist-4-softplus-crt": _deeper(two, 4),
    }
    found |= _long_rivals(patient.epochs + tuned.epochs)
    for layers in (2, 3, 4):
        found |= _rivals(layers)
        for dataset, activation in (
            ("mnist", "sigmoid"), ("mnist", "tanh"), ("fashion-mnist", "softplus"),
        ):  # fmt: skip
            experiment = _deeper(Experiment(dataset, 2, activation, brief), layers)
            found[f"{dataset}-{layers}-{activation}-crt"] = experiment
        for gamma in (0.003, 0.01, 0.03, 0.1, 0.3) if layers == 2 else ():
            recipe = replace(tuned, gamma=gamma)
            found[f"mnist-2-softplus-crt-gamma-{gamma:g}"] = replace(two, recipe=recipe, box=False)
        found |= _small_radius(layers)
    for radius in (1.0, 0.5):
        found[f"mnist-2-softplus-crt-radius-{radius:g}"] = _for_radius(long, radius)
    clothes = _on("fashion-mnist", long)
    found["fashion-mnist-2-softplus-crt-long"] = clothes
    found |= _seeds_and_mean("fashion-mnist-2-softplus-crt", clothes)
    found |= _colours(replace(brief, epochs=20))
    return found | _random_starts(broad) | _controls(two, long)


def _seeds_and_mean(name: str, long: Experiment) -> dict[str, Experiment]:
    """A long training from two more seeds, and the mean of all three networks."""
    seeds = [drawn_anew(long, seed) for seed in range(3)]
    found = {f"{name}-long-seed-{seed}": seeds[seed] for seed in (1, 2)}
    mean = replace(long, width=3 * long.width, start=tuple(seeds))
    return found | {f"{name}-mean-of-three": mean}


def _for_radius(experiment: Experiment, radius: float) -> Experiment:
    """A training with all of its stages for another radius.

    What a curvature K takes from a margin is K r^2 / 2, so gamma goes with the radius squared.
    """
    own = experiment.recipe
    recipe = replace(own, radius=radius, gamma=own.gamma * (radius / own.radius) ** 2)
    found = replace(experiment, recipe=recipe, box=False)
    return found.with_starts(lambda start: _for_radius(start, radius))


def _on(dataset: str, experiment: Experiment) -> Experiment:
    """A training with all of its stages on another dataset."""
    found = replace(experiment, dataset=dataset)
    return found.with_starts(lambda start: _on(dataset, start))


def _colours(shallow: Recipe) -> dict[str, Experiment]:
    """CIFAR-10, and its copies as JPEG, at the middle one of the three radii in use there.

    In a ball so much smaller than MNIST's, the same curvature takes a thirtieth of the margin.
    Longer, such a network needs more images: half of them are mirrored, anew in every epoch.
    """
    recipe = replace(shallow, radius=72 / 255, gamma=0.001)
    longer = replace(recipe, gamma=0.0003, epochs=2 * recipe.epochs, mirror=True)
    return {
        f"{name}-2-softplus-crt{ending}": Experiment(name, 2, "softplus", chosen)
        for name in ("cifar10", "cifar10-jpeg")
        for ending, chosen in (("", recipe), ("-mirrored", longer))
    }


def _in_all_stages(experiment: Experiment, **choices: Any) -> Experiment:
    """A training with the same choices in the recipe of each of its stages."""
    found = replace(experiment, recipe=replace(experiment.recipe, **choices))
    return found.with_starts(lambda start: _in_all_stages(start, **choices))


def _wide(long: Experiment) -> Experiment:
    """Three times the width for half of the epochs, with a larger gamma for its curvature."""
    first = replace(long.starts[0], width=3 * long.width)
    first = replace(first, recipe=replace(first.recipe, gamma=0.06, epochs=60))
    recipe = replace(long.recipe, gamma=0.15, epochs=6, validate_every=6)
    return replace(long, width=first.width, recipe=recipe, start=first)


def _random_starts(shallow: Recipe) -> dict[str, Experiment]:
    """Networks of three and four layers that go on from no other, and what the curvature adds.

    Only a ball's curvature is worth following there: that of all space counts slopes that no layer
    has at once. The late layers start nearly linear, and the gradients are centred, because what
    such a layer answers has a mean far from 0. The long training of three layers takes the price
    that was the best in short ones. With four layers the same fell apart near the largest learning
    rate, after 27 epochs of 100; it takes half of that rate, and the price of the short training.
    """
    recipe = replace(shallow, epochs=16, validate_every=16, curvature="local", curvature_every=2,
                     ball=1.0, centred=True)  # fmt: skip
    found = {}
    for layers, gammas in ((3, (0.1, 0.0, 0.2, 0.03)), (4, (0.1,))):
        recipes = {f"gamma-{gamma:g}": replace(recipe, gamma=gamma) for gamma in gammas}
        long = replace(recipe, gamma=0.03, epochs=100, validate_every=100)
        if layers == 4:
            long = replace(long, gamma=0.1, learning_rate=1.5e-3, epochs=60, validate_every=60)
        recipes["long"] = long
        for end, chosen in recipes.items():
            found[f"mnist-{layers}-softplus-crt-random-start-{end}"] = Experiment(
                "mnist", layers, "softplus", chosen, box=False, initial="nearly linear"
            )
    return found


def _controls(headline: Experiment, long: Experiment) -> dict[str, Experiment]:
    """The headline recipe with both of its stages at one gamma: what does the curvature add?

    In short, 10 and 2 epochs with no choice among them, so that several seeds can be afforded, and
    with attacks in float32, for bfloat16 takes longer where a processor has to imitate it. As long
    as the headline, without the curvature. And the longest training without it, kept as it ends:
    the choice of an epoch by what the curvature of all space certifies would stop it after ten.
    """
    seeds = {0.0: 3, 0.03: 3, 0.1: 3, 0.01: 3, 0.3: 1, 0.003: 1}
    short = _in_all_stages(_with_epochs(headline, 10, 2), attack_dtype="float32")
    found = {
        f"{_CONTROL}-gamma-{gamma:g}{f'-seed-{seed}' if seed else ''}": _at_gamma(
            short, gamma, seed
        )
        for gamma, count in seeds.items()
        for seed in range(count)
    }
    as_it_ends = _with_epochs(long, long.starts[0].recipe.epochs, long.recipe.epochs)
    return found | {
        f"{_CONTROL}-whole-gamma-0": _at_gamma(headline, 0.0, 0),
        f"{_CONTROL}-long-gamma-0": replace(_at_gamma(as_it_ends, 0.0, 0), test_images=500),
    }


def _with_epochs(experiment: Experiment, *epochs: int) -> Experiment:
    """A training in stages of so many epochs, the last of which alone is validated, and kept."""
    *before, own = epochs
    recipe = replace(experiment.recipe, epochs=own, validate_every=own)
    return replace(experiment, recipe=recipe).with_starts(
        lambda start: _with_epochs(start, *before)
    )


def _at_gamma(experiment: Experiment, gamma: float, seed: int) -> Experiment:
    """A training with all of its stages at one gamma, drawn anew from another seed."""
    recipe = replace(experiment.recipe, gamma=gamma)
    found = replace(experiment, recipe=recipe, box=False)
    return drawn_anew(found.with_starts(lambda start: _at_gamma(start, gamma, seed)), seed)


def _deeper(experiment: Experiment, layers: int) -> Experiment:
    """An experiment that goes on from the trained network of a shallower one."""
    if layers == experiment.layers:
        return experiment
    # The copied layers work far from 0, where Adam's steps add up: small ones only.
    recipe = replace(experiment.recipe, epochs=2, learning_rate=5e-5, ramp_epochs=0.0)
    if recipe.method == "crt":
        recipe = replace(recipe, curvature="local", curvature_every=2, validate_every=2)
    return replace(experiment, layers=layers, recipe=recipe, start=experiment)


def _rivals(layers: int) -> dict[str, Experiment]:
    """The other methods, whose balls grow for half of the training where a bound is trained."""
    epochs = {"crt-published": 10, "ibp": 30, "lipschitz": 20, "standard": 8, "adversarial": 8,
              "crown-ibp": 12}  # fmt: skip
    # With more layers the published one ends with curvatures that nothing certifies, if not dearer.
    dear = {3: {"crt-published": 0.05}, 4: {"crt-published": 0.15}}.get(layers, {})
    found = {}
    for method, count in epochs.items():
        recipe = Recipe(method, gamma=dear.get(method, 0.005), epochs=count,
                        attack_dtype="bfloat16")  # fmt: skip
        if method in BOUNDS:
            recipe = replace(recipe, ramp_epochs=count / 2)
        found[f"mnist-{layers}-softplus-{method}"] = Experiment(
            "mnist", layers, "softplus", recipe, box=method == "crt-published"
        )
    if layers > 3:  # from a random start a bound ends with one answer to all images
        shallow = _rivals(3)
        for method in BOUNDS:
            start = shallow[f"mnist-3-softplus-{method}"]
            found[f"mnist-{layers}-softplus-{method}"] = _deeper(start, layers)
    return found


def _long_rivals(epochs: int) -> dict[str, Experiment]:
    """The cheap bounds trained for as many epochs as the headline, with its averaged weights.

    With the usual loss, and with the headline's bounded one: where a bound asks for more than
    most images can have, a bounded loss gives those up and goes on with the others.
    """
    shallow = _rivals(2)
    found = {}
    for method in ("lipschitz", "ibp"):
        short = shallow[f"mnist-2-softplus-{method}"]
        for ending, loss_q in (("", 0.0), ("-bounded-loss", 0.3)):
            recipe = replace(short.recipe, epochs=epochs, ramp_epochs=epochs / 2, average=0.99,
                             loss_q=loss_q, validate_every=epochs)  # fmt: skip
            found[f"mnist-2-softplus-{method}-long{ending}"] = replace(short, recipe=recipe)
    return found


def _small_radius(layers: int) -> dict[str, Experiment]:
    """The setting of the paper's earlier version."""
    recipe = Recipe(radius=0.5, gamma=0.01, epochs=8, attack_dtype="bfloat16", validate_every=4)
    return {
        f"mnist-{layers}-sigmoid-{method}-0.5": Experiment(
            "mnist", layers, "sigmoid", replace(recipe, method=method), box=False, crown_images=150
        )
        for method in ("crt", "standard")
    }


def quick() -> dict[str, Experiment]:
    """The same code on the digits that ship with scikit-learn.

    Returns:
        Experiments by name.
    """
    recipe = partial(Recipe, radius=0.5, epochs=30, batch_size=64)
    return {
        f"digits-{layers}-softplus-{method}": Experiment(
            "digits",
            layers,
            "softplus",
            recipe(method, gamma=0.02, ramp_epochs=15),
            width=64,
            crown_images=20,
        )
        for layers in (2, 3)
        for method in ("crt", "ibp", "adversarial", "standard")
    }
