r"""Training networks that are easy to certify.

Curvature-based robust training (CRT; Singla & Feizi 2020, section 6) minimises

.. math:: \mathrm{CE}(z(x'), y) + \gamma K,

where :math:`x'` attacks the label in the l2 ball around x and K bounds the curvature of the
margins. Here x' is attacked towards all classes at once, by projected gradient steps on the
cross-entropy, and K is the largest :math:`|m|` over all pairs of classes, followed by power
iteration: an estimate, good enough to train with and never certified with.

As published, x' is attacked towards the runner-up only, by the paper's dual, and K is that pair's
own, averaged over the batch. ``"crt-published"`` is that objective, not the authors' release: the
release bisects the dual's multiplier, follows norms by 50 power steps at a time and keeps the epoch
with the best clean test accuracy; here the attack is a fixed point, K is :math:`|m|` by this
package's formula, one power step at a time, and the schedule and the choice of the epoch are those
of the other methods.

The rivals take the cross-entropy of the worst margins that intervals, lines or a Lipschitz constant
leave possible in the ball. All objectives are in :mod:`crcbook.training.losses`.
"""

import copy
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from crcbook.certificate import verify
from crcbook.checkpoints import load_tensors, save_model, save_tensors
from crcbook.checks import as_box, as_classes, as_inputs
from crcbook.datasets import Split
from crcbook.networks import architecture, read_network
from crcbook.training.augmentation import augmented, is_image, mirrored
from crcbook.training.centring import centred_step, mean_inputs
from crcbook.training.losses import (
    CurvatureEstimate,
    LipschitzEstimate,
    crown_ibp_margins,
    generalised_cross_entropy,
    ibp_margins,
    runner_up,
    runner_up_points,
    trained_layers,
    worst_points,
)
from crcbook.training.recipe import Recipe

_LOCAL_ITEMS = 500  # that a validation asks for local curvature, which takes eigenvalues of each
_PEAK = 0.3  # of the training: when the learning rate is highest
_WORST_MARGINS = {"ibp": ibp_margins, "crown-ibp": crown_ibp_margins}
_ESTIMATES: dict[str, Callable[[nn.Sequential, int], Any]] = {
    "crt": CurvatureEstimate,
    "crt-published": CurvatureEstimate,
    "lipschitz": LipschitzEstimate,
}


def train(
    model: nn.Sequential,
    data: Split,
    recipe: Recipe,
    validation: Split | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
    about: dict | None = None,
) -> list[dict]:
    """Train a model in place.

    With a validation split, the weights kept are those of :func:`best_epoch`; otherwise the last
    ones.

    Args:
        model: a Sequential that :func:`crcbook.certify` accepts, and for a folder an
            :func:`crcbook.mlp`; it stays on its device.
        data: the training items.
        recipe: how to train.
        validation: items to choose the epoch with, never the test set.
        folder: where to write a checkpoint after each epoch; None for none.
        resume: go on from the folder's checkpoint, to the same weights bit for bit on the same
            machine; without one, start afresh.
        progress: show a progress bar.
        about: what else the training depends on, as JSON values: a checkpoint must agree with it,
            with the recipe and with the model's widths and activation.

    Returns:
        A dictionary an epoch: ``loss``, ``curvature``, ``seconds`` without the validation and,
        where it was validated, ``clean_accuracy`` and ``certified_accuracy``.

    Raises:
        TypeError: where the model is no Sequential, or the items are no tensors of the right kind.
        ValueError: where the model or the items cannot be trained with, the model cannot be saved,
            or the loss is no number.
        RuntimeError: where a checkpoint cannot be written or read, or belongs to another training.
    """
    trainer = _Trainer(model, data, recipe, validation)
    checkpoint, identity = None, {"recipe": asdict(recipe), "about": about or {}}
    if folder is not None:
        checkpoint = Path(folder) / "checkpoint.safetensors"
        identity["model"] = architecture(model)
    if resume and checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint, identity)
    first = len(trainer.history)
    bar = tqdm(total=recipe.epochs * trainer.steps, initial=first * trainer.steps,
               desc=recipe.method, disable=not progress, unit="step")  # fmt: skip
    with bar:
        for epoch in range(first, recipe.epochs):
            trainer.epoch(epoch, bar)
            if checkpoint is not None:
                trainer.save(checkpoint, identity)
    trainer.keep_best()
    if folder is not None:
        save_model(Path(folder) / "model.safetensors", model)
    return trainer.history


def best_epoch(history: list[dict], recipe: Recipe) -> int:
    """The epoch to keep: the one that certified the most of the validation split.

    Epochs whose balls were still growing count less than any other, for they would win wherever
    nothing is certified. Then comes the certified accuracy, which standard training ignores, then
    the clean one, then the later epoch.

    Args:
        history: what :func:`train` returned.
        recipe: how it was trained.

    Returns:
        The epoch's position; the last one where none was validated.
    """

    def worth(epoch: int) -> tuple:
        record = history[epoch]
        names = ("clean",) if recipe.method == "standard" else ("certified", "clean")
        figures = (record.get(f"{name}_accuracy", -1.0) for name in names)
        return "clean_accuracy" in record, epoch >= recipe.ramp_epochs, *figures, epoch

    return max(range(len(history)), key=worth)


def knows_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 matrices itself; one that does not is far slower.

    Args:
        device: a torch device.

    Returns:
        Whether it has a unit for that; False where this torch cannot tell.
    """
    if torch.device(device).type == "cuda":
        # Older ones imitate it, and count as supported for torch.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # There oneDNN says yes wherever AVX-512 lets it imitate the unit.
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, unit, lambda: False)() for unit in units)


class _Trainer:
    """A training under way: everything a checkpoint must hold."""

    def __init__(
        self, model: nn.Sequential, data: Split, recipe: Recipe, validation: Split | None
    ) -> None:
        self.model, self.recipe = model, recipe
        self.mean = copy.deepcopy(model) if recipe.average else model  # what is validated
        self.x, self.y = _checked(data, model, recipe)
        self.shape = data.x.shape[1:]
        self.centres = mean_inputs(model, self.x) if recipe.centred else []
        self.validation = None if validation is None else _checked(validation, model, recipe)
        self.optimizer = torch.optim.Adam(model.parameters())
        estimate = _ESTIMATES.get(recipe.method)
        self.estimate: Any = estimate and estimate(model, recipe.seed)  # that of the method
        self.curvatures = torch.empty(0)  # of all pairs, as last seen by crt-published
        self.pull: tuple[float, list[Tensor | None]]  # the curvature, and its gradients
        self.pull = 0.0, [None] * len(list(model.parameters()))
        self.steps = math.ceil(len(self.y) / recipe.batch_size)
        self.history: list[dict] = []
        self.best: dict[str, Tensor] = {}

    def epoch(self, epoch: int, bar: tqdm) -> None:
        seed = 1_000_003 * self.recipe.seed + epoch
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.y), generator=generator, device="cpu").to(self.y.device)
        losses, curvature, started = [], 0.0, time.perf_counter()
        x = augmented(self.x, self.shape, seed) if self.recipe.augment else self.x
        x = mirrored(x, self.shape, seed) if self.recipe.mirror else x
        for step, index in enumerate(order.split(self.recipe.batch_size)):
            done = epoch + step / self.steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * _one_cycle(done / self.recipe.epochs)
            loss, curvature = self.step(step, x[index], self.y[index], done)
            losses.append(loss)
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss:.3f}", K=f"{curvature:.3g}", **_shown(self.history))
        seconds = round(time.perf_counter() - started, 2)
        record = {"loss": sum(losses) / len(losses), "curvature": curvature, "seconds": seconds}
        if not math.isfinite(record["loss"]):
            raise ValueError(f"the loss became {record['loss']} in epoch {epoch + 1}")
        last = epoch + 1 == self.recipe.epochs
        if last or (epoch + 1) % self.recipe.validate_every == 0:
            record |= _validated(self.mean, self.validation, self.recipe)
        self.history.append(record)
        if not self.best or best_epoch(self.history, self.recipe) == epoch:
            self.best = {name: value.clone() for name, value in self.mean.state_dict().items()}

    def step(self, step: int, x: Tensor, y: Tensor, done: float) -> tuple[float, float]:
        recipe = self.recipe
        radius = (
            recipe.radius * recipe.reach * min(1.0, (done + 1e-3) / max(recipe.ramp_epochs, 1e-3))
        )
        if recipe.method.startswith("crt") and step % recipe.curvature_every == 0:
            self._follow_curvature(x, y, radius)
        curvature, gradients = self.pull
        loss = generalised_cross_entropy(self._logits(x, y, radius), y, recipe.loss_q)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            if gradient is not None:
                known = parameter.grad
                parameter.grad = gradient if known is None else known + gradient
        centred_step(self.optimizer, self.model, self.centres)
        if recipe.average:
            with torch.no_grad():
                weights = zip(self.mean.parameters(), self.model.parameters(), strict=True)
                for mean, value in weights:
                    mean.lerp_(value, 1 - recipe.average)
        return float(loss.detach()), curvature

    def _follow_curvature(self, x: Tensor, y: Tensor, radius: float) -> None:
        """Evaluate the curvature and its gradients, which serve until the next time."""
        if self.recipe.method == "crt":
            item: dict[str, Any] = {"x": x[0]}
            where = {"global": {}, "local": item | {"radius": self.recipe.ball * radius},
                     "pointwise": item}  # fmt: skip
            curvature = self.estimate(**where[self.recipe.curvature])
        else:
            table = self.estimate.table()
            self.curvatures = table.detach()
            curvature = table[y, runner_up(self.model, x, y)].mean()
        self.optimizer.zero_grad()
        if curvature.requires_grad:  # a linear network has none
            (self.recipe.gamma * curvature).backward()
        self.pull = float(curvature.detach()), [p.grad for p in self.model.parameters()]

    def _logits(self, x: Tensor, y: Tensor, radius: float) -> Tensor:
        """The logits whose cross-entropy is the loss: at a point, or the worst in the balls."""
        method, model = self.recipe.method, self.model
        steps, dtype = self.recipe.attack_steps, torch.float32
        if self.recipe.attack_dtype == "bfloat16" and knows_bfloat16(x.device):
            dtype = torch.bfloat16
        if method in _WORST_MARGINS:
            return -_WORST_MARGINS[method](trained_layers(model), x, y, radius)
        if method == "lipschitz":
            return -self.estimate.margins(x, y, radius)
        if method == "crt-published":
            target = runner_up(model, x, y)
            curvature = self.curvatures[y, target]
            layers = trained_layers(model, dtype)
            x = runner_up_points(layers, x, (y, target), radius, curvature, steps)
        elif method != "standard":
            layers = trained_layers(model, dtype)
            x = worst_points(layers, x, y, radius, steps, self.recipe.attack_box)
        return model(x)

    def keep_best(self) -> None:
        kept = self.best if self.validation is not None and self.best else self.mean.state_dict()
        self.model.load_state_dict(kept)

    def save(self, path: Path, identity: dict[str, dict]) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.mean is not self.model:
            tensors |= {f"mean.{name}": value for name, value in self.mean.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"centre.{place}": value for place, value in enumerate(self.centres)}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        if self.estimate:
            tensors |= {f"vectors.{key}": v for key, v in self.estimate.power.vectors.items()}
        save_tensors(path, tensors, {**identity, "history": self.history})

    def load(self, path: Path, identity: dict[str, dict]) -> None:
        tensors, facts = load_tensors(path)
        _check_identity(path, identity, facts)
        self.history = facts["history"]
        self.model.load_state_dict(_under("model.", tensors))
        self.mean.load_state_dict(_under("mean.", tensors) or _under("model.", tensors))
        device = self.y.device
        centres = _under("centre.", tensors)
        self.centres = [centres[str(place)].to(device) for place in range(len(centres))]
        self.best = {name: value.to(device) for name, value in _under("best.", tensors).items()}
        state: dict[int, dict] = {}
        for name, value in _under("adam.", tensors).items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.estimate:
            vectors = _under("vectors.", tensors)
            self.estimate.power.vectors = {key: v.to(device) for key, v in vectors.items()}


def _check_identity(path: Path, identity: dict[str, dict], facts: dict) -> None:
    """Raise RuntimeError where a checkpoint belongs to another training."""
    if "about" not in facts:
        raise RuntimeError(
            f"{path} does not say what it belongs to, as older ones do not: train in another folder"
        )
    differing = [
        f"{part} {name}"
        for part, mine in identity.items()
        for name in mine | facts[part]
        if mine.get(name) != facts[part].get(name)
    ]
    if differing:
        raise RuntimeError(
            f"{path} belongs to another training: its {', '.join(differing)} differs"
        )


def _checked(split: Split, model: nn.Sequential, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Inputs and labels, where the model is and in its precision."""
    if not (hasattr(split, "x") and hasattr(split, "y")):
        part = ": give a part of it, as in data.train" if hasattr(split, "train") else ""
        raise TypeError(f"data must be a Split, with x and y; got {type(split).__name__}{part}")
    network, weight = read_network(model), next(model.parameters())
    x = as_inputs(split.x, network)
    if recipe.attack_box:
        as_box((0.0, 1.0), x)
    for name in ("augment", "mirror"):
        if getattr(recipe, name) and not is_image(split.x.shape[1:]):
            raise ValueError(f"{name} needs images; got items of shape {tuple(split.x.shape[1:])}")
    return x.to(weight), as_classes("y", split.y, network, len(x)).to(weight.device)


def _one_cycle(progress: float) -> float:
    """A linear rise to 1 and a cosine fall to 0, over the whole training."""
    if progress < _PEAK:
        return 0.04 + 0.96 * progress / _PEAK
    return (1 + math.cos(math.pi * (progress - _PEAK) / (1 - _PEAK))) / 2


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def _validated(
    model: nn.Sequential, items: tuple[Tensor, Tensor] | None, recipe: Recipe
) -> dict[str, float]:
    """What is recorded of the items of a validation split; nothing without one."""
    if items is None:
        return {}
    x, y = items
    with torch.no_grad():
        predicted = model(x).argmax(1)
    return {
        "clean_accuracy": float((predicted == y).double().mean()),
        "certified_accuracy": float(_robust(model, x, y, recipe).double().mean()),
    }


@torch.no_grad()
def _robust(model: nn.Sequential, x: Tensor, y: Tensor, recipe: Recipe) -> Tensor:
    """Which items the bound that is trained, or else the curvature, certifies."""
    method, radius = recipe.method, recipe.radius
    if method in _WORST_MARGINS:
        layers, size = trained_layers(model), recipe.batch_size
        margins = [
            _WORST_MARGINS[method](layers, *batch, radius)
            for batch in zip(x.split(size), y.split(size), strict=True)
        ]
        return torch.cat(margins).scatter(1, y[:, None], torch.inf).amin(1) > 0
    if method == "lipschitz":
        return verify(model, x, y, radius, method="lipschitz").robust
    curvature = "global"
    if method == "crt" and recipe.curvature != "global":
        curvature, x, y = "local", x[:_LOCAL_ITEMS], y[:_LOCAL_ITEMS]
    return verify(model, x, y, radius, curvature=curvature, method="dual").robust


def _shown(history: list[dict]) -> dict[str, str]:
    """The last figures, for a progress bar."""
    shown = history[-1] if history else {}
    names = {"clean_accuracy": "clean", "certified_accuracy": "certified"}
    return {names[key]: f"{shown[key]:.1%}" for key in names if key in shown}
