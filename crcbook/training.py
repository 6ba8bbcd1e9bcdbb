r"""Training networks that are easy to certify.

Curvature-based robust training (Singla & Feizi 2020, section 6) minimises

.. math:: \mathrm{CE}(z(x'), y) + \gamma K,

where :math:`x'` attacks the label in the l2 ball around x and K bounds the curvature of the
margins. Here x' is attacked towards all classes at once, by projected gradient steps on the
cross-entropy, and K is the largest :math:`|m|` over all pairs of classes, followed by power
iteration: an estimate, good enough to train with and never certified with.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm.auto import tqdm

from crcbook.activations import IDENTITY, activation_of
from crcbook.certificate import verify
from crcbook.checkpoints import load_tensors, save_model, save_tensors
from crcbook.curvature import Link, curvature_sum
from crcbook.datasets import Split
from crcbook.networks import Layer
from crcbook.spectral import top_eigenvalue_estimate

METHODS = ("standard", "adversarial", "crt")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        method: ``"standard"`` (cross-entropy at the data), ``"adversarial"`` (at an attacked
            point) or ``"crt"`` (there, plus ``gamma`` times the curvature).
        radius: the l2 radius of the attack and of the validation, in the units of the input.
        gamma: the weight of the curvature; only CRT uses it.
        epochs: passes over the data.
        batch_size: items a step.
        learning_rate: Adam's peak rate; it rises over the first 30 % of the steps and falls to 0.
        ramp_epochs: epochs over which the attack grows to its radius.
        attack_steps: gradients an attack.
        attack_dtype: their precision; ``"bfloat16"`` is faster where the processor knows it.
        curvature: that of CRT: ``"global"``, over all of R^n, or ``"local"``, over a ball of half
            the radius around one item a step: what a local certificate meets on its way.
        curvature_every: steps between two gradients of the curvature, each of which serves until
            the next; more than a few can be unstable.
        loss_q: q of the generalised cross-entropy :math:`(1 - p_y^q)/q` (Zhang & Sabuncu 2018),
            bounded by 1/q, so that hopeless items count less; 0 is the cross-entropy.
        seed: the seed of the order of the data.
    """

    method: str = "crt"
    radius: float = 1.58
    gamma: float = 0.06
    epochs: int = 18
    batch_size: int = 256
    learning_rate: float = 3e-3
    ramp_epochs: float = 2.0
    attack_steps: int = 8
    attack_dtype: str = "float32"
    curvature: str = "global"
    curvature_every: int = 1
    loss_q: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        for name in ("radius", "epochs", "batch_size", "learning_rate", "attack_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        for name in ("gamma", "ramp_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")


def train(
    model: nn.Sequential,
    data: Split,
    recipe: Recipe,
    validation: Split | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
) -> list[dict]:
    """Train a model in place.

    With a validation split, the weights kept are those of the epoch with the largest certified
    accuracy at the recipe's radius (then the largest clean one); otherwise the last ones.

    Args:
        model: an :func:`crcbook.mlp`; it stays on its device.
        data: the training items.
        recipe: how to train.
        validation: items to choose the epoch with, never the test set.
        folder: where to write a checkpoint after each epoch; None for none.
        resume: go on from the folder's checkpoint, to the same weights bit for bit on the same
            machine; without one, start afresh.
        progress: show a progress bar.

    Returns:
        A dictionary an epoch: ``loss``, ``curvature``, ``seconds`` without the validation and,
        with a validation split, ``clean_accuracy`` and ``certified_accuracy``.

    Raises:
        ValueError: where the checkpoint belongs to another recipe, or the loss is no number.
        RuntimeError: where a checkpoint cannot be written or read.
    """
    trainer = _Trainer(model, data, recipe, validation)
    checkpoint = Path(folder) / "checkpoint.safetensors" if folder is not None else None
    if resume and checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint)
    first = len(trainer.history)
    bar = tqdm(total=recipe.epochs * trainer.steps, initial=first * trainer.steps,
               desc=recipe.method, disable=not progress, unit="step")  # fmt: skip
    with bar:
        for epoch in range(first, recipe.epochs):
            trainer.epoch(epoch, bar)
            if checkpoint is not None:
                trainer.save(checkpoint)
    trainer.keep_best()
    if folder is not None:
        save_model(Path(folder) / "model.safetensors", model)
    return trainer.history


def worst_points(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    radius: float,
    steps: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attack all classes at once: projected gradient ascent on the cross-entropy in an l2 ball.

    Args:
        model: an :func:`crcbook.mlp`.
        x: ``(batch, n)``.
        y: ``(batch,)`` labels.
        radius: the l2 radius of the ball.
        steps: the number of gradients.
        dtype: the precision of the gradients.

    Returns:
        ``(batch, n)`` points of the ball.
    """
    layers = [
        Layer(layer.weight.detach().to(dtype), layer.bias.detach().to(dtype), layer.activation)
        for layer in _layers(model)
    ]
    delta = torch.zeros_like(x)
    for _ in range(steps):
        gradient = _loss_gradient(layers, (x + delta).to(dtype), y).to(x.dtype)
        delta = delta + 2.5 * radius / steps * normalize(gradient, dim=1)
        delta = delta * (radius / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    return x + delta


def _layers(model: nn.Sequential) -> list[Layer]:
    """The layers with the weights being trained."""
    modules = [module for module in model if not isinstance(module, nn.Flatten)]
    rows = [*map(activation_of, modules[1::2]), IDENTITY]
    return [
        Layer(linear.weight, linear.bias, row)
        for linear, row in zip(modules[::2], rows, strict=True)
    ]


def _loss_gradient(layers: Sequence[Layer], x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the cross-entropy in x, by hand: several times faster than autograd."""
    slopes = []
    for layer in layers[:-1]:
        z = torch.addmm(layer.bias, x, layer.weight.T)
        slopes.append(layer.activation.slope(z))
        x = layer.activation.value(z)
    logits = torch.addmm(layers[-1].bias, x, layers[-1].weight.T)
    wrong = logits.softmax(1)
    wrong[torch.arange(len(y), device=y.device), y] -= 1
    gradient = wrong @ layers[-1].weight
    for layer, slope in zip(layers[-2::-1], reversed(slopes), strict=True):
        gradient = (gradient * slope) @ layer.weight
    return gradient


def generalised_cross_entropy(logits: Tensor, y: Tensor, q: float) -> Tensor:
    r"""The mean of :math:`(1 - p_y^q)/q` over a batch (Zhang & Sabuncu 2018).

    Args:
        logits: ``(batch, classes)``.
        y: ``(batch,)`` labels.
        q: from 0, the cross-entropy, to 1, one minus the probability.

    Returns:
        A scalar.
    """
    entropy = cross_entropy(logits, y, reduction="none")
    return entropy.mean() if q == 0 else (-torch.expm1(-q * entropy) / q).mean()


class CurvatureEstimate:
    r"""The largest :math:`|m|` over all pairs of classes, as a differentiable estimate.

    The formula is that of the proved bound, :func:`crcbook.curvature.curvature_sum`. One power
    iteration a call follows each norm's singular vectors while the weights move.
    """

    def __init__(self, model: nn.Sequential, seed: int = 0) -> None:
        """Start from random directions.

        Args:
            model: an :func:`crcbook.mlp`, trained in place elsewhere.
            seed: the seed of the directions.
        """
        self.model = model
        classes = _layers(model)[-1].weight.shape[0]
        self.label, self.target = (1 - torch.eye(classes)).nonzero().T
        self.generator = torch.Generator().manual_seed(seed)
        self.vectors: dict[str, Tensor] = {}
        self()  # draws every direction once, so that a checkpoint finds all of them

    def __call__(self, steps: int = 1, x: Tensor | None = None, radius: float = 0.0) -> Tensor:
        """Estimate the curvature at the current weights.

        Args:
            steps: the number of power iterations.
            x: ``(n,)`` the centre of a ball to look in; None for all of R^n.
            radius: the ball's l2 radius.

        Returns:
            A scalar.
        """
        layers = _layers(self.model)
        weights = layers[-1].weight[self.label] - layers[-1].weight[self.target]
        ranges_of = None if x is None else partial(_ranges, layers, _values(layers, x), radius)
        return curvature_sum(layers, weights, partial(self._top, steps), ranges_of).max()

    def _top(self, steps: int, key: str, link: Link, scales: Tensor) -> Tensor:
        if key not in self.vectors:
            shape = (len(scales), link.matrix.shape[1])
            start = torch.randn(shape, generator=self.generator).to(link.matrix)
            self.vectors[key] = normalize(start, dim=1)
        square, self.vectors[key] = top_eigenvalue_estimate(
            link.matrix, scales, self.vectors[key], steps
        )
        return square + 1e-12  # keeps the gradient of its root finite


def _values(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    values = []
    for layer in layers[:-1]:
        values.append(torch.mv(layer.weight, x) + layer.bias)
        x = layer.activation.value(values[-1])
    return values


def _ranges(layers, values: list[Tensor], radius: float, place: int, links: list[Link]):
    reach = radius * sum(link.factor * link.matrix.norm(dim=1) for link in links)
    ends = values[place] - reach, values[place] + reach
    row = layers[place].activation
    return (*row.slope_interval(*ends), *row.bend_interval(*ends))


class _Trainer:
    """A training under way: everything a checkpoint must hold."""

    def __init__(self, model, data: Split, recipe: Recipe, validation: Split | None) -> None:
        device = next(model.parameters()).device
        self.model, self.recipe = model, recipe
        self.x, self.y = data.x.flatten(1).to(device), data.y.to(device)
        self.validation = validation
        self.optimizer = torch.optim.Adam(model.parameters())
        self.curvature = CurvatureEstimate(model, recipe.seed) if recipe.method == "crt" else None
        self.pull = 0.0, [None] * len(list(model.parameters()))
        self.steps = math.ceil(len(self.y) / recipe.batch_size)
        self.history: list[dict] = []
        self.best: dict[str, Tensor] = {}

    def epoch(self, epoch: int, bar: tqdm) -> None:
        generator = torch.Generator().manual_seed(1_000_003 * self.recipe.seed + epoch)
        order = torch.randperm(len(self.y), generator=generator).to(self.y.device)
        losses, curvature, started = [], 0.0, time.perf_counter()
        for step, index in enumerate(order.split(self.recipe.batch_size)):
            done = epoch + step / self.steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * _one_cycle(done / self.recipe.epochs)
            loss, curvature = self.step(step, self.x[index], self.y[index], done)
            losses.append(loss)
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss:.3f}", K=f"{curvature:.3g}", **self._shown())
        seconds = round(time.perf_counter() - started, 2)
        record = {"loss": sum(losses) / len(losses), "curvature": curvature, "seconds": seconds}
        if not math.isfinite(record["loss"]):
            raise ValueError(f"the loss became {record['loss']} in epoch {epoch + 1}")
        self.history.append(record | self._validate())
        if not self.best or self._score(self.history[-1]) >= self._best_score():
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}

    def step(self, step: int, x: Tensor, y: Tensor, done: float) -> tuple[float, float]:
        recipe, centre = self.recipe, x[0]
        radius = recipe.radius * min(1.0, (done + 1e-3) / max(recipe.ramp_epochs, 1e-3))
        if recipe.method != "standard":
            dtype = getattr(torch, recipe.attack_dtype)
            x = worst_points(self.model, x, y, radius, recipe.attack_steps, dtype)
        if self.curvature and step % recipe.curvature_every == 0:
            self.optimizer.zero_grad()
            local = (centre, radius / 2) if recipe.curvature == "local" else ()
            curvature = self.curvature(1, *local)
            (recipe.gamma * curvature).backward()
            self.pull = float(curvature.detach()), [p.grad for p in self.model.parameters()]
        curvature, gradients = self.pull
        loss = generalised_cross_entropy(self.model(x), y, recipe.loss_q)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter.grad += gradient
        self.optimizer.step()
        return float(loss.detach()), curvature

    def keep_best(self) -> None:
        if self.validation is not None and self.best:
            self.model.load_state_dict(self.best)

    def save(self, path: Path) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        if self.curvature:
            tensors |= {f"vectors.{key}": v for key, v in self.curvature.vectors.items()}
        save_tensors(path, tensors, {"recipe": asdict(self.recipe), "history": self.history})

    def load(self, path: Path) -> None:
        tensors, facts = load_tensors(path)
        if facts["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} belongs to another recipe: {facts['recipe']}")
        self.history = facts["history"]
        self.model.load_state_dict(_under("model.", tensors))
        device = self.y.device
        self.best = {name: value.to(device) for name, value in _under("best.", tensors).items()}
        state: dict[int, dict] = {}
        for name, value in _under("adam.", tensors).items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.curvature:
            vectors = _under("vectors.", tensors)
            self.curvature.vectors = {key: value.to(device) for key, value in vectors.items()}

    def _validate(self) -> dict:
        if self.validation is None:
            return {}
        x, y = self.validation.x, self.validation.y
        with torch.no_grad():
            predicted = self.model(x.to(self.y.device)).argmax(1).cpu()
        robust = verify(self.model, x, y, self.recipe.radius).robust.cpu()
        return {
            "clean_accuracy": float((predicted == y).double().mean()),
            "certified_accuracy": float(robust.double().mean()),
        }

    def _shown(self) -> dict:
        shown = self.history[-1] if self.history and self.validation is not None else {}
        names = {"clean_accuracy": "clean", "certified_accuracy": "certified"}
        return {names[key]: f"{shown[key]:.1%}" for key in names if key in shown}

    def _best_score(self) -> tuple[float, float]:
        return max(map(self._score, self.history))

    @staticmethod
    def _score(record: dict) -> tuple[float, float]:
        return record.get("certified_accuracy", 0.0), record.get("clean_accuracy", 0.0)


def _one_cycle(progress: float, peak: float = 0.3) -> float:
    """A linear rise to 1 and a cosine fall to 0, over the whole training."""
    if progress < peak:
        return 0.04 + 0.96 * progress / peak
    return (1 + math.cos(math.pi * (progress - peak) / (1 - peak))) / 2


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
