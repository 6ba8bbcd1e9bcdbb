"""Certified l2 radii and verdicts, against every class.

The mathematics is in :mod:`crcbook.proof.quadratic`; here inputs are checked, classes compared and
batches cut to size.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from crcbook.attacks import crossings, descend
from crcbook.checks import LARGEST, SMALLEST_RADIUS, as_box, as_classes, as_inputs, as_radius
from crcbook.networks import read_network
from crcbook.proof.arithmetic import OUTWARD
from crcbook.proof.box import Box, clip
from crcbook.proof.curvature import downward_curvature
from crcbook.proof.lines import crown_radius
from crcbook.proof.lipschitz import lipschitz_radius
from crcbook.proof.quadratic import Pairs, Prover, parabola_margin, parabola_radius
from crcbook.stages.balls import Balls
from crcbook.stages.search import POLISH_STEPS, SEARCH_STEPS, search
from crcbook.stages.single import Margins, Sieve

METHODS = ("dual", "closed-form", "lipschitz", "crown")
EXACT = 1e-6
_REFINE_STEPS = 8
_FIRST = 0.8  # of the longest step, 1/k: full ones overshoot
_AT_BOUNDARY = 1e-2  # of the bound at the input: a margin this small has reached zero
_LOCAL_STEPS = 5
_LOCAL_GAP = 1e-3  # of the distance; closer than that, local curvature is not worth its price
_ATTACK_STEPS, _CROSSING_STEPS = 4, 3
_CHUNK_VALUES = 2**23
_CACHED_VALUES = 2**20  # looked at together where a processor's cache is what counts


@dataclass(frozen=True)
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
        nearest: ``(batch, n)`` float64, the closest adversarial point proved; NaN where none was.
        method: for each input, the method whose bound won.
        targets: ``"all"``, or ``"runner-up"`` where only that class was considered.
    """

    radius: Tensor
    target: Tensor
    exact: Tensor
    nearest: Tensor
    method: tuple[str, ...]
    targets: str


@dataclass(frozen=True)
class Verdict:
    """Whether the label is certain in a ball of a fixed radius.

    Attributes:
        robust: ``(batch,)`` bool: proved for every point of the ball. False is no proof of the
            opposite.
        margin: ``(batch,)`` float64 lower bound of the smallest margin in the ball.
        target: ``(batch,)`` int64, the class that is in the way: of those not proved the one with
            the largest logit; where all are proved, the class with the smallest margin.
        targets: ``"all"``, or ``"runner-up"`` where only that class was considered.
    """

    robust: Tensor
    margin: Tensor
    target: Tensor
    targets: str


def certify(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    targets: str = "all",
    box: tuple | None = None,
    curvature: str = "global",
    method: str = "dual",
    progress: bool = False,
) -> Certificate:
    r"""Certified l2 radii: how far each input can move before its label can change.

    Proved for the network in real arithmetic with its stored weights; every evaluation has its
    rounding error subtracted (see :mod:`crcbook.proof.rounding`, and :mod:`crcbook.stages.single`
    for classes far away, where it is in float32). The radius is the largest one found for each
    class, and the smallest of these over the classes.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        targets: ``"all"`` other classes, or only the ``"runner-up"`` (the second largest logit),
            which is no guarantee against the others.
        box: the lowest and the highest valid value of an input, numbers or tensors of an input's
            shape, such as ``(0.0, 1.0)``: the adversary must stay inside. None for no box.
        curvature: ``"global"``, over all of R^n, or ``"local"``: over balls around the inputs,
            for those that the global bound leaves short of the nearest adversarial point found.
            Local bounds are never smaller and take an eigenvalue problem an input and class each.
        method: ``"dual"``, the best minorant found; ``"closed-form"``, the one at the input
            (Entesari et al. 2024); ``"lipschitz"``, the margin over a global Lipschitz constant;
            ``"crown"``, linear relaxations (Zhang et al. 2018), slow; or ``"best"`` of them all.
        progress: show a progress bar.

    Returns:
        The radii, in the units of the input, with the classes and points that limit them.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer that cannot be certified, a wrong shape or range, NaN or infinity,
            an unknown option, or a box or local curvature with a method other than the first and
            the last.
    """
    problem = _Problem.of(model, x, y, targets, box, curvature, method)
    parts = [problem.certify(chunk) for chunk in problem.chunks(progress, "certify")]
    *columns, won = (torch.cat(column) for column in zip(*parts, strict=True))
    return Certificate(*columns, tuple(METHODS[index] for index in won.tolist()), targets)


def verify(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    radius: float,
    targets: str = "all",
    box: tuple | None = None,
    curvature: str = "global",
    progress: bool = False,
) -> Verdict:
    """Decide whether each label is certain in the l2 ball of a given radius.

    The search for a class stops as soon as its margin is proved positive, and by global curvature
    no other class is searched where the runner-up's is not: ``margin`` is a valid lower bound but
    not the best one.

    Args:
        model: a Sequential that :func:`crcbook.networks.read_network` accepts.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        radius: the l2 radius of the ball, in the units of the input.
        targets: ``"all"`` or ``"runner-up"``, as in :func:`certify`.
        box: the valid inputs, as in :func:`certify`.
        curvature: ``"global"``, or ``"local"`` over the ball for margins the global bound leaves
            undecided.
        progress: show a progress bar.

    Returns:
        The verdicts.

    Raises:
        TypeError: for a model or tensors of the wrong kind.
        ValueError: for a layer that cannot be certified, a wrong shape or range, NaN or infinity,
            or an unknown option.
    """
    problem, radius = _Problem.of(model, x, y, targets, box, curvature), as_radius(radius)
    parts = [problem.verify(chunk, radius) for chunk in problem.chunks(progress, "verify")]
    margin, target = (torch.cat(column) for column in zip(*parts, strict=True))
    return Verdict(margin > 0, margin, target, targets)


@dataclass(frozen=True)
class _Problem:
    """A checked batch and the network it belongs to."""

    prover: Prover
    sieve: Sieve | None  # for what takes few digits
    x: Tensor
    y: Tensor
    targets: str
    box: Box | None
    local: bool
    method: str

    @classmethod
    def of(cls, model, x, y, targets: str, box, curvature: str, method="dual") -> "_Problem":
        network = read_network(model)
        x = as_inputs(x, network)
        y = as_classes("y", y, network, batch=len(x))
        if targets not in ("all", "runner-up"):
            raise ValueError(f"targets must be 'all' or 'runner-up'; got {targets!r}")
        prover = Prover.of(network)
        sieve = Sieve.of(prover)
        if curvature not in ("global", "local"):
            raise ValueError(f"curvature must be 'global' or 'local'; got {curvature!r}")
        if method not in (*METHODS, "best"):
            raise ValueError(f"method must be one of {', '.join(METHODS)}, best; got {method!r}")
        if method in METHODS[1:] and (box is not None or curvature == "local"):
            raise ValueError(f"method {method!r} knows neither a box nor local curvature")
        box, local = as_box(box, x), curvature == "local"
        return cls(prover, sieve, x, y, targets, box, local, method)

    @property
    def width(self) -> int:
        """The most values that an input has on its way through the network."""
        return max(layer.weight.shape[1] for layer in self.prover.network.layers)

    def blocks(self, index: Tensor, each: int = 1) -> tuple[Tensor, ...]:
        """Parts of some indices, ``each`` of which takes so many evaluations."""
        cached = max(1, _CACHED_VALUES // (self.width * each))
        return index.split(cached if index.device.type == "cpu" else max(1, len(index)))

    def chunks(self, progress: bool, description: str):
        """Slices of a fixed size, so that memory is bounded."""
        size = max(1, _CHUNK_VALUES // (self.width * self.prover.network.classes))
        starts = range(0, len(self.x), size)
        for start in tqdm(starts, desc=description, disable=not progress, unit="chunk"):
            yield slice(start, start + size)

    def certify(self, chunk: slice):
        images = self._look(self.x[chunk], self.y[chunk])
        x, y, correct = images.x, images.y, images.correct
        everything = torch.arange(len(x), device=x.device)
        if self.method in METHODS[1:]:
            best = self._rival(self.method, images)
        else:
            best = self._certify(images, None)
        if self.box is not None:
            _improve(best, everything, self._certify(images, self.box))
        nearest = self._nearest(images, best)
        if self.local:
            exact = self._reached(x, y, best, nearest)
            rows = (correct & ~exact & best.bound.isfinite()).nonzero().squeeze(1)
            self._sharpen(images, rows, best, nearest, self.box)
        for harder in self._harder():
            radius, target, _, _, _ = harder.certify(chunk)
            better = radius > best.bound
            best.bound[better] = radius[better]
            if self.targets == "all":
                best.target[better] = target[better]
        for name in METHODS[1:] if self.method == "best" else ():
            _improve(best, everything, self._rival(name, images))
        exact = self._reached(x, y, best, nearest) | (~correct & nearest.isfinite().all(1))
        return best.bound, best.target, exact, nearest, best.method

    def _rival(self, name: str, images: "_Images") -> "_Best":
        """Radii by another method; those of a misclassified image are 0."""
        x, y, order = images.x, images.y, images.order
        best = _Best.of(x, order, METHODS.index(name))
        rows = images.correct.nonzero().squeeze(1)
        # The runner-up comes first: past its radius no other class has to be followed.
        for columns in images.stages:
            targets = order[rows, columns]
            image = rows.repeat_interleave(targets.shape[1])
            pairs = self._pairs(x, y, image, targets.reshape(-1), None)
            limit = best.bound[image] if columns.start else None
            bound = self._rival_radius(name, pairs, limit).reshape(targets.shape)
            bound, column = bound.min(dim=1)
            lower = bound < best.bound[rows] if columns.start else bound >= 0
            best.bound[rows[lower]] = bound[lower]
            best.target[rows[lower]] = targets[lower, column[lower]]
        return best

    def _rival_radius(self, name: str, pairs: Pairs, limit: Tensor | None) -> Tensor:
        margins = (pairs.x0, pairs.label, pairs.target)
        if name == "closed-form":
            return self._prove(pairs, pairs.x0, None).bound
        if name == "lipschitz":
            return lipschitz_radius(self.prover, *margins)
        return crown_radius(self.prover, *margins, limit)

    def _harder(self):
        """Problems with smaller radii, whose searches with local curvature could end up larger."""
        dual = replace(self, method=METHODS[0])
        if self.local and self.box is not None:
            yield replace(dual, box=None)
        if self.local and self.targets == "runner-up":
            yield replace(dual, targets="all")

    def _certify(self, images: "_Images", box: Box | None) -> "_Best":
        """Radii of the images, each with the class that limits it."""
        best = _Best.of(images.x, images.order, 0)
        rows = images.correct.nonzero().squeeze(1)
        limit, glance = torch.full_like(best.bound, torch.inf), self._glance(images, None)
        # The runner-up comes first and alone, so that "all" can only lower its radius.
        for columns in images.stages:
            targets = images.order[rows, columns]
            bound, found, place = self._maximise(
                images, rows, columns, box, glance[rows, columns], limit[rows]
            )
            bound, column = bound.min(dim=1)
            lower = bound < limit[rows] if columns.start else bound >= 0
            changed, column = rows[lower], column[lower]
            best.bound[changed], best.target[changed] = bound[lower], targets[lower, column]
            finite = bound[lower].isfinite()  # where it is not, there was nothing to search
            changed, place = changed[finite], place[lower, column][finite]
            best.displacement[changed] = found.displacement[place]
            best.at_boundary[changed] = found.at_boundary[place]
            limit = best.bound.clone()
        return best

    def verify(self, chunk: slice, radius: float):
        images = self._look(self.x[chunk], self.y[chunk])
        margins = self._margins(images, None, self._glance(images, radius), radius)
        if self.box is not None:
            margins = self._margins(images, self.box, margins, radius)
        doubt = margins <= 0
        position = torch.where(doubt.any(1), doubt.int().argmax(1), margins.argmin(1))
        margin = margins.amin(1)
        margin = torch.where(images.correct, margin, margin.clamp(max=0.0))
        return margin, images.order.gather(1, position[:, None]).squeeze(1)

    def _look(self, x: Tensor, y: Tensor) -> "_Images":
        """What one evaluation tells of the inputs: their classes, in order, and their slopes."""
        everything = torch.arange(len(x), device=x.device)
        blocks = self.blocks(everything, self.prover.network.classes)
        parts = [self._look_at(x[part], y[part]) for part in blocks]
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return _Images(*(torch.cat(column) for column in columns))

    def _look_at(self, x: Tensor, y: Tensor) -> "_Images":
        logits, z, slopes = self.prover.network.logits_and_slopes(x)
        others = logits.scatter(1, y[:, None], -torch.inf)
        others = torch.where(others.isnan(), torch.inf, others)
        order = others.argsort(dim=1, descending=True, stable=True)
        order = order[order != y[:, None]].reshape(len(y), -1)
        own = logits.gather(1, y[:, None])
        correct = (own > others.gather(1, order[:, :1])).squeeze(1)
        order = order if self.targets == "all" else order[:, :1]
        z_error = self.prover.rounding.preactivation_errors(x.norm(dim=1))
        return _Images(
            x, y, order, correct, *self.prover.glance(x, y, order, logits, slopes), z,
            z_error[0] if z_error else torch.zeros_like(x[:, 0]),
        )  # fmt: skip

    def _margins(self, images: "_Images", box: Box | None, margins, radius: float) -> Tensor:
        """``(images, targets)`` better lower bounds of the margins in the balls."""
        x, y, margins = images.x, images.y, margins.clone()
        for columns in images.stages:
            # Without the runner-up there is no verdict; balls may still decide it.
            rows = images.correct if self.local else images.correct & (margins[:, 0] > 0)
            rows = (rows if columns.start else images.correct).nonzero().squeeze(1)
            margins[rows, columns], *_ = self._maximise(
                images, rows, columns, box, margins[rows, columns], radius=radius
            )
        if self.local:
            rows = self._undecided(x, y, images.order, images.correct, margins, box, radius)
            targets, radii = images.order[rows], torch.full_like(x[rows, 0], radius)
            margins[rows] = self._in_balls(x, y, rows, targets, box, radii, margins[rows], radius)
        return margins

    def _sharpen(self, images: "_Images", rows, best: "_Best", nearest, box: Box | None) -> None:
        """Raise radii with the curvature of balls, between what is proved and what is attacked.

        A radius proved with the curvature of a ball is at most the ball's. Bisection looks for the
        ball that its own curvature fills; where no adversary is known, the balls grow first.
        """
        x, y, targets = images.x, images.y, images.order[rows]
        upper = (nearest[rows] - x[rows]).norm(dim=1)
        unknown = upper.isnan()
        upper = torch.where(unknown, 2 * best.bound[rows], upper)
        bounds = self._glance(images, None)[rows]
        for room in (None,) if box is None else (None, box):
            bounds, *_ = self._maximise(images, rows, slice(None), room, bounds, upper)
        trial = upper.clamp(SMALLEST_RADIUS, LARGEST)
        for _ in range(_LOCAL_STEPS):
            wide = ((upper - best.bound[rows]) > _LOCAL_GAP * upper).nonzero().squeeze(1)
            bounds[wide] = self._in_balls(
                x, y, rows[wide], targets[wide], box, trial[wide], bounds[wide]
            )
            radius, position = bounds.min(dim=1)
            filled = radius >= trial
            upper = torch.where(filled, upper, torch.minimum(upper, trial))
            unknown &= filled
            upper = torch.where(unknown, 2 * upper, upper)
            better = radius > best.bound[rows]
            best.bound[rows[better]] = radius[better]
            best.target[rows[better]] = targets[better, position[better]]
            middle = (torch.maximum(best.bound[rows], radius) + upper) / 2
            trial = torch.where(unknown, upper, middle).clamp(SMALLEST_RADIUS, LARGEST)

    def _in_balls(self, x, y, rows, targets, box, radii, bounds, radius: float | None = None):
        """Better bounds of the rows' pairs that are short of their ball's radius (or margin 0)."""
        return Balls(self.prover, x[rows], y[rows], targets, radii, bounds, radius, box).raised()

    def _undecided(self, x, y, order, correct, margins, box, radius: float) -> Tensor:
        """The images without a proof and without an adversary in the ball."""
        row, column = ((margins <= 0) & correct[:, None]).nonzero().T
        pairs = self._pairs(x, y, row, order[row, column], None)
        _, lowest = descend(
            self.prover.network, pairs.x0, pairs.label, pairs.target, radius, pairs.x0,
            _ATTACK_STEPS, box, self.prover.rough,
        )  # fmt: skip
        open_images = torch.zeros_like(correct)
        open_images[row] = True
        open_images[row[lowest <= 0]] = False
        return open_images.nonzero().squeeze(1)

    def _pairs(self, x: Tensor, y: Tensor, image: Tensor, target: Tensor, box) -> Pairs:
        return Pairs.of(self.prover.network, x.index_select(0, image), y[image], target, box)

    def _maximise(
        self, images: "_Images", rows, columns, box, bounds, limit=None, radius: float | None = None
    ):
        """Better bounds of the rows' margins over the targets in some columns of their order.

        They are radii, or margins in the ball of ``radius``. What single precision proves needs no
        more; for the others it chooses points to prove at, and for radii a few steps in double
        precision polish them. A pair is left alone once its bound passes its row's ``limit``
        (margin 0).

        Returns ``(rows, targets)`` bounds, what is proved of the pairs that were searched, and
        ``(rows, targets)`` positions in that.
        """
        x, targets = images.x, images.order[rows, columns]
        bound, target, many = bounds.flatten().clone(), targets.flatten(), targets.shape[1]
        if limit is None:
            limit = torch.full_like(x[rows, 0], torch.inf if radius is None else 0.0)
        image, limit = rows.repeat_interleave(many), limit.repeat_interleave(many)
        left, start = (bound <= limit).nonzero().squeeze(1), None
        if self.sieve is not None and box is None and len(left):
            way = images.way[rows, columns].flatten(0, 1)
            left, start = self._sift(images, image, target, way, bound, limit, radius)
        image, limit = image[left], limit[left]
        pairs = self._pairs(x, images.y, image, target[left], box)
        best = _Proof.start(pairs, bound[left])
        steps = _REFINE_STEPS
        if start is None:
            start, steps = pairs.x0, SEARCH_STEPS
        for part in self.blocks((best.bound <= limit).nonzero().squeeze(1)):
            few = pairs.take(part)
            point, _ = search(self.prover.rough, few, start[part], steps, limit[part], radius)
            _improve(best, part, self._prove(few, point, radius))
        if radius is None:
            # Where the search ended at the boundary there is no gap, and digits to be gained.
            closing = ((best.bound <= limit) & best.at_boundary).nonzero().squeeze(1)
            for part in self.blocks(closing):
                few, exact = pairs.take(part), self.prover.network
                point, _ = search(exact, few, best.point[part], POLISH_STEPS, limit[part])
                _improve(best, part, self._prove(few, point, radius))
        bound[left] = best.bound
        place = torch.zeros_like(target)
        place[left] = torch.arange(len(left), device=left.device)
        return bound.reshape(targets.shape), best, place.reshape(targets.shape)

    def _sift(self, images: "_Images", image, target, way, bound, limit, radius):
        """Raise bounds by single precision; returns the pairs left and where to search on."""
        left, ends, z = (bound <= limit).nonzero().squeeze(1), [], images.z.float()
        for part in self.blocks(left):
            item, most = image[part], limit[part]
            label, to = images.y[item], target[part]
            curvature = downward_curvature(self.prover.network, label, to)
            z_part, error = z.index_select(0, item), images.z_error[item]
            margins = Margins(label, to, curvature, z_part, error, most)
            length = most.where(most.isfinite(), bound[part]) if radius is None else radius
            length = (length / way[part].norm(dim=1)).fmin(_FIRST / curvature).float()
            first = -length[:, None] * way[part]
            if most.isinf().all():  # nothing is good enough
                ends.append((part, self.sieve.search(margins, first)))
                continue
            found, short, end = self.sieve.sift(margins, first, radius)
            bound[part] = bound[part].maximum(found)
            ends.append((part[short], end))
        left, end = (torch.cat(column) for column in zip(*ends, strict=True))
        return left, images.x[image[left]] + end

    def _glance(self, images: "_Images", radius: float | None) -> Tensor:
        """``(images, targets)`` bounds from the inputs themselves.

        The box is left to the pairs that stay open: it takes a search for its multiplier.
        """
        label = images.y[:, None].expand_as(images.order).reshape(-1)
        target, shape = images.order.reshape(-1), images.order.shape
        curvature = downward_curvature(self.prover.network, label, target).reshape(shape)
        floor = self.prover.floor(label, target).reshape(shape)
        if radius is None:
            bound = parabola_radius(images.value, images.slope, curvature)
            everywhere = torch.full_like(floor, torch.inf)
        else:
            bound = parabola_margin(images.value, images.slope, curvature, radius)
            everywhere = floor
        return torch.where(floor > 0, bound.maximum(everywhere), bound)

    def _prove(self, pairs: Pairs, point: Tensor, radius: float | None) -> "_Proof":
        values = self.prover.network.margin_and_gradient(point, pairs.label, pairs.target)
        return self._bound(pairs, point, values, radius)

    def _bound(self, pairs: Pairs, point: Tensor, values, radius: float | None) -> "_Proof":
        """What the margins and gradients at the points prove."""
        minorant = self.prover.minorant(pairs, point, *values)
        at_boundary = values[0].abs() <= _AT_BOUNDARY * minorant.value
        if radius is not None:
            return _Proof(minorant.margin(radius), torch.zeros_like(point), point, at_boundary)
        bound = minorant.radius()
        return _Proof(bound, minorant.nearest(bound), point.clone(), at_boundary)

    def _nearest(self, images: "_Images", best: "_Best") -> Tensor:
        """Adversarial points, NaN where none is proved; a misclassified image is its own.

        Overshooting the radius by a hair, where the bound falls fastest, finds the nearest one
        wherever the radius is exact. For the others it is where an attack starts.
        """
        x, box = images.x, self.box
        nearest, rows = x.clone(), images.correct.nonzero().squeeze(1)
        pairs = self._pairs(x, images.y, rows, best.target[rows], None)
        point = clip(box, x[rows] + (1 + 0.9 * EXACT) * best.displacement[rows])
        distance = (point - pairs.x0).norm(dim=1)
        hit = best.at_boundary[rows] & (distance <= best.bound[rows] * (1 + EXACT))
        reached = hit.nonzero().squeeze(1)
        hit[reached] = self.prover.is_adversarial(pairs.take(reached), point[reached])
        missed = ~hit & best.bound[rows].isfinite()
        begin = images.z[rows[missed]] if len(self.prover.network.layers) > 1 else None
        point[missed] = self._adversaries(pairs.take(missed), point[missed], begin, box)
        point[best.bound[rows].isinf()] = torch.nan
        nearest[rows] = point
        wrong = (~images.correct).nonzero().squeeze(1)
        pairs = self._pairs(x, images.y, wrong, images.order[wrong, 0], None)
        nearest[wrong[~self.prover.is_adversarial(pairs, x[wrong])]] = torch.nan
        return nearest

    def _adversaries(self, pairs: Pairs, start: Tensor, begin, box: Box | None) -> Tensor:
        """Points proved to be adversarial, as near as an attack gets; NaN where it finds none."""
        found = crossings(
            self.prover.network, pairs.x0, pairs.label, pairs.target, start, _CROSSING_STEPS, box,
            self.prover.rough, begin,
        )  # fmt: skip
        # Across the boundary, beyond any doubt.
        found = clip(box, found + 0.5 * EXACT * (found - pairs.x0))
        proved = self.prover.is_adversarial(pairs, found)
        return torch.where(proved[:, None], found, torch.nan)

    def _reached(self, x, y, best: "_Best", nearest) -> Tensor:
        """Whether the nearest point known is adversarial for the target and at the radius."""
        close = (nearest - x).norm(dim=1) * OUTWARD <= best.bound * (1 + EXACT)
        rows = (close & (best.bound > 0)).nonzero().squeeze(1)
        pairs = self._pairs(x, y, rows, best.target[rows], None)
        reached = torch.zeros_like(close)
        reached[rows] = self.prover.is_adversarial(pairs, nearest[rows])
        return reached


@dataclass(frozen=True)
class _Images:
    """A chunk and what one evaluation tells of it.

    ``order`` holds the other classes, largest logit first, and ``correct`` says whether the label
    beats them all; ``value`` and ``slope`` are those of the minorants at the inputs, ``way`` the
    gradients in the subspace and ``z`` the first layer's
    preactivations and ``z_error`` a bound of their error.
    """

    x: Tensor
    y: Tensor
    order: Tensor
    correct: Tensor
    value: Tensor
    slope: Tensor
    way: Tensor
    z: Tensor
    z_error: Tensor

    @property
    def stages(self) -> list[slice]:
        """The columns of ``order`` to look at together: the runner-up, then the others."""
        return [slice(0, 1), slice(1, None)][: 1 + (self.order.shape[1] > 1)]


@dataclass
class _Best:
    """The radii of a batch, the limiting classes, and the method.

    ``displacement`` is the way to where a minorant reaches zero, and ``at_boundary`` says whether
    its margin may do so there too.
    """

    bound: Tensor
    target: Tensor
    displacement: Tensor
    at_boundary: Tensor
    method: Tensor

    @classmethod
    def of(cls, x: Tensor, order: Tensor, method: int) -> "_Best":
        zeros, first = torch.zeros_like(x[:, 0]), order[:, 0].clone()
        nowhere = torch.zeros_like(first, dtype=torch.bool)
        return cls(zeros, first, torch.zeros_like(x), nowhere, torch.full_like(first, method))


@dataclass
class _Proof:
    """What is proved of each pair: a bound, the way to where it ends, and the point it took."""

    bound: Tensor
    displacement: Tensor
    point: Tensor
    at_boundary: Tensor

    @classmethod
    def start(cls, pairs: Pairs, bound: Tensor) -> "_Proof":
        nowhere = torch.zeros_like(bound, dtype=torch.bool)
        return cls(bound, *(torch.zeros_like(pairs.x0) for _ in range(2)), nowhere)


def _improve(best: "_Best | _Proof", index: Tensor, other: "_Best | _Proof") -> None:
    """Overwrite the entries at ``index`` where the other bound is larger."""
    better = other.bound > best.bound[index]
    for field in fields(best):
        getattr(best, field.name)[index[better]] = getattr(other, field.name)[better]
