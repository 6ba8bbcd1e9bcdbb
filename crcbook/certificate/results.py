"""What certificates and verdicts say."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLOSE = 0.8  # of an adversary's distance: radii beyond are not challenged, and need no advice


@dataclass(frozen=True, repr=False)
class Certificate:
    """Certified radii of a batch.

    Attributes:
        radius: ``(batch,)`` float64, l2, in the units of the input: no point closer than this is
            classified differently. 0 where the image is misclassified, infinity where no point at
            all can be.
        target: ``(batch,)`` int64, the class whose boundary limits the radius; the predicted class
            where the image is misclassified.
        exact: ``(batch,)`` bool: an adversarial point within ``(1 + 1e-6) * radius`` is known and
            proved to be one, so the radius is the distance to the boundary.
        nearest: ``(batch, *input_shape)`` in the precision of the inputs, the closest adversarial
            point proved; NaN where none was. Rounding can take it a little further away than the
            point by which a radius is exact.
        distance: ``(batch,)`` float64, how far ``nearest`` is, rounded upward: no certificate can
            be larger. Infinity where there is none.
        method: for each input, the method whose bound won.
        targets: ``"all"``, or ``"runner-up"`` where only that class was considered.
        hint: what may raise the radii, where much is left open.
    """

    radius: Tensor
    target: Tensor
    exact: Tensor
    nearest: Tensor
    distance: Tensor
    method: tuple[str, ...]
    targets: str
    hint: str = ""

    def certified_accuracy(self, radii: float | Sequence[float] | Tensor) -> Tensor:
        """The fraction of the items that are certified at each of some radii.

        Args:
            radii: l2 radii of any shape, at least 0, in the units of the input. At 0 this is the
                fraction that is classified as it should be, ties excepted.

        Returns:
            Float64, of the shape of ``radii``.

        Raises:
            TypeError: where the radii are no real numbers.
            ValueError: where one is negative or NaN.
        """
        try:
            asked = torch.as_tensor(radii, dtype=torch.float64, device=self.radius.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"radii must be real numbers; got {type(radii).__name__}") from error
        if not (asked >= 0).all():
            raise ValueError("radii must be at least 0, and not NaN")
        certified = (self.radius >= asked[..., None]) & (self.radius > 0)
        return certified.double().mean(-1)

    def __repr__(self) -> str:
        """A few lines: how many are certified, how far, by what, and what is left open."""
        positive, found = self.radius > 0, self.distance.isfinite() & (self.distance > 0)
        finite = self.radius[positive & self.radius.isfinite()]
        lines = [
            f"Certificate of {_items(len(self.radius))} against {_classes(self.targets)}",
            f"  certified     {int(positive.sum())}, at an l2 radius of {_extent(finite)}",
        ]
        if int(self.radius.isinf().sum()):
            lines.append(f"  at any radius {int(self.radius.isinf().sum())}")
        if wrong := int((self.distance == 0).sum()):
            lines.append(f"  misclassified {wrong}")
        if near := int((~positive & (self.distance > 0)).sum()):
            lines.append(f"  radius 0      {near} more: a tie, or a margin that rounding may turn")
        won = [name for name, some in zip(self.method, positive.tolist(), strict=True) if some]
        if won:
            names = ", ".join(f"{name} {won.count(name)}" for name in sorted(set(won)))
            lines.append(f"  by            {names}; exact {int((self.exact & positive).sum())}")
        lines.append(
            f"  adversaries   {int(found.sum())}, at a distance of {_extent(self.distance[found])}"
        )
        lines += [f"  {self.hint}"] if self.hint else []
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Verdict:
    """Whether the label is certain in a ball of a fixed radius.

    Attributes:
        robust: ``(batch,)`` bool: proved for every point of the ball. False is no proof of the
            opposite.
        margin: ``(batch,)`` float64 lower bound of the smallest margin in the ball.
        target: ``(batch,)`` int64, the class that is in the way: of those not proved the one with
            the largest logit; where all are proved, the class with the smallest margin.
        nearest: ``(batch, *input_shape)`` in the precision of the inputs, a point of the ball that
            is proved to be adversarial; NaN where none was found. A misclassified image is its own.
        radius: ``(batch,)`` float64, the balls' radii.
        targets: ``"all"``, or ``"runner-up"`` where only that class was considered.
        hint: what may decide more, where much is undecided.
    """

    robust: Tensor
    margin: Tensor
    target: Tensor
    nearest: Tensor
    radius: Tensor
    targets: str
    hint: str = ""

    def __repr__(self) -> str:
        """A few lines: how many are proved, refuted and undecided."""
        count, robust = len(self.robust), int(self.robust.sum())
        refuted = int(self.nearest.flatten(1).isfinite().all(1).sum())
        lines = [
            f"Verdict on {_items(count)} against {_classes(self.targets)}, in l2 balls of radius "
            f"{_extent(self.radius)}",
            f"  robust        {robust}",
            f"  refuted       {refuted}, by adversarial points in the balls",
            f"  undecided     {count - robust - refuted}",
        ]
        lines += [f"  {self.hint}"] if self.hint else []
        return "\n".join(lines)


def hint(open_: int, of: int, left: Sequence[str]) -> str:
    """What may help where proof and attack are far apart.

    Args:
        open_: for how many items they are.
        of: of how many.
        left: the options that were not asked for.

    Returns:
        A sentence; nothing where there is nothing open.
    """
    if not open_:
        return ""
    begin = f"{open_} of {of} are far from what an attack finds: "
    if not left:
        return begin + "training for curvature (crcbook.train) makes networks that certify better"
    return f"{begin}{' or '.join(left)} may prove more"


def untried(method: str, curvature: str, box: object, words: Sequence[str]) -> list[str]:
    """What was not asked for, and may prove more.

    Args:
        method: that was asked for.
        curvature: that was asked for.
        box: that was given; None where there is none.
        words: how to ask for every method of the default, for local curvature, and with a box.

    Returns:
        Those words that say something else than what was asked.
    """
    tried = method == "best", curvature == "local", box is not None
    return [word for word, done in zip(words, tried, strict=True) if not done]


def _items(count: int) -> str:
    return f"{count} item{'s' * (count != 1)}"


def _classes(targets: str) -> str:
    return "all other classes" if targets == "all" else "the runner-up alone"


def _extent(values: Tensor) -> str:
    if not len(values):
        return "none"
    low, high = values.min(), values.max()
    if low == high:
        return f"{low:.4g}"
    return f"{values.mean():.4g} on average, {low:.4g} to {high:.4g}"
