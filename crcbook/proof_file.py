r"""Certificates as files that a program without this package can check.

A certified radius rests on a point c and a curvature k for each other class
(:mod:`crcbook.proof.quadratic`). Both fit in a few kilobytes an image, and whoever has them, the
weights and the image can verify the radius without trusting the program that found it: the folder
``crcbook_checker`` does so in ball arithmetic.

Any c proves something, so :math:`c - x` is rounded to as few digits to the base 16 as leave the
image's radius what it was: none where c = x will do, one or two for most classes, and five or six
for the class that limits the radius.
"""

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from crcbook.acceleration import Acceleration
from crcbook.activations import ACTIVATIONS
from crcbook.certificate import certify
from crcbook.certificate.question import Radius
from crcbook.checkpoints import default_activation, write_atomically
from crcbook.checks import as_box, as_labels, read_items
from crcbook.deployed import deployed_prover
from crcbook.networks import Network
from crcbook.proof.arithmetic import INSIDE, TINY
from crcbook.proof.box import Box
from crcbook.proof.curvature import downward_curvature, local_curvature
from crcbook.proof.intervals import Region
from crcbook.proof.prover import Entries, Prover, evaluate
from crcbook.stages.dual import SEARCH_STEPS
from crcbook.stages.search import next_point, search

FORMAT = "crcbook proofs 1"
_MOST_DIGITS = 6
_LOSS = 5e-7  # of the radius, that rounding c may cost: shorter files are not worth more
_ROOM = 2e-3  # of the radius, that searches leave above it, so that one or two digits will do
# Arb keeps 30 bits of the radius of a ball, so a checker's bounds may exceed ours by a little where
# intervals pass through several layers, and by more where they were narrow; and a unit that cannot
# bend a margin down may seem to, by as little of what it can bend it up.
_WIDER, _WIDER_IN_BALLS, _OTHER_WAY = 1 + 2.0**-22, 1 + 2.0**-20, 2.0**-26
_BALLS = 6  # tried an input, by bisection
_WORTH = 1e-4  # of the radius: a ball that gains less is left
_SHORT = 1e-6  # of the radius: what is missing more is counted
_CHUNK_PAIRS = 2048
_STEPS = 20  # gradients in double precision, at most


@dataclass(frozen=True, repr=False)
class Written:
    """What a proof file holds.

    Attributes:
        radius: ``(batch,)`` float64 l2 radii claimed against every other class; 0 where the file
            says nothing of an input.
        certified: ``(batch,)`` float64 radii of :func:`crcbook.certify`, to compare; in a box at
            most the distance across. The claims can be larger by a hair, as their searches go on
            for longer.
        summary: the counts written into the file.
    """

    radius: Tensor
    certified: Tensor
    summary: dict

    def __repr__(self) -> str:
        """A few lines: the counts."""
        counts = "".join(f"\n  {name}: {number}" for name, number in self.summary.items())
        return f"Written (fields: radius, certified, summary){counts}"


def prove(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    path: Path | str,
    curvature: str = "global",
    index: Tensor | None = None,
    box: tuple | None = None,
    deployed: str | None = None,
) -> Written:
    """Certify inputs and write what the certificates rest on to a file.

    The file holds for each input and other class the point c, the curvature k and the radius they
    prove, and hashes of the network and of the inputs. What :func:`crcbook.certify` owes to slabs,
    to curvature followed along paths, to a ball's own eigenvalue problems, or to a range of the
    last activation in which a class can never win has no such proof: the file claims what one
    quadratic a class gives, and its summary counts the radii that were larger. CROWN and Lipschitz
    constants are not asked for: what they would add is not counted either.

    Args:
        model: a module that :func:`crcbook.networks.read_network` accepts, with one kind of
            activation in its default setting.
        x: ``(batch, *input_shape)`` inputs.
        y: ``(batch,)`` int64 labels.
        path: where to write, ``.safetensors`` by custom.
        curvature: ``"global"``, over all of R^n, or ``"local"``: over balls where that gives more.
        index: ``(batch,)`` positions of the inputs in the data that a checker will be given; 0, 1,
            ... where None.
        box: the valid inputs, as in :func:`crcbook.certify`: the claims are about these alone.
        deployed: as in :func:`crcbook.certify`. The file then claims of each margin, up to its
            radius, not that it is positive but that it is larger than what ``"float32"`` can change
            (:mod:`crcbook.deployed`); the checker proves that, and takes this number for given.

    Returns:
        The radii claimed, with the counts.

    Raises:
        TypeError: as :func:`crcbook.certify`.
        ValueError: as :func:`crcbook.certify`, and for a network with several activations.
        RuntimeError: where the file cannot be written.
    """
    network, items = read_items(copy.deepcopy(model).cpu(), x)
    digest, held = network_digest(network), as_box(box, items.x, items.shape, items.dtype)
    if held is not None and held.lower.dim() + held.upper.dim() > 2:
        raise ValueError("a proof file holds one box for all inputs; got one each")
    ask = partial(certify, model, x, y, box=box, method="dual", deployed=deployed)
    certificate = everywhere = ask(curvature=curvature)
    if curvature == "local":
        everywhere = ask()
    certified, alone, nearest = (
        row.cpu() for row in (certificate.radius, everywhere.radius, everywhere.target)
    )
    x, y = items.x, as_labels(y, network, items)
    if held is not None:  # farther than across the box there is no point
        alone, certified = (row.minimum(held.around(x).longest()) for row in (alone, certified))
    rows = ((certified > 0) & alone.isfinite()).nonzero().squeeze(1)
    prover = deployed_prover(model, network) if deployed else Prover.of(network)
    images = _Images.of(prover, x[rows], y[rows], alone[rows], held)
    images = images.in_balls(certified[rows]) if curvature == "local" else images
    claims = images.claims(nearest[rows])
    tensors = {
        "index": (rows if index is None else index[rows]).numpy().astype(np.int64),
        "label": y[rows].numpy(),
        "image_sha256": _image_digests(x[rows].numpy()),
        **claims,
    }
    radius = torch.zeros_like(certified)
    radius[rows] = torch.from_numpy(claims["radius"]).amin(1)
    further = certified[rows] > radius[rows] * (1 + _SHORT)
    where = "" if box is None else ", in a box"
    summary = {
        "images": len(x),
        f"curvature over all of R^n{where}": int(images.valid.isinf().sum()),
        f"curvature over a ball{where}": int(images.valid.isfinite().sum()),
        "not certified": int((certified == 0).sum()),
        "certified at any distance: not expressed": int(alone.isinf().sum()),
        "certified further by slabs, paths or sharper balls: not expressed": int(further.sum()),
    }
    write_proofs(Path(path), tensors, {"model": digest, **summary})
    return Written(radius, certified, summary)


def write_proofs(path: Path, tensors: dict[str, np.ndarray], facts: dict) -> None:
    """Write a proof file, sealed with a hash of all it holds.

    Args:
        path: where to.
        tensors: the arrays, named as the checker's ``Proofs`` says.
        facts: anything JSON can hold.

    Raises:
        RuntimeError: where the file cannot be written.
    """
    seal = sha256([facts], (tensors[name] for name in sorted(tensors)))
    write_atomically(path, save(tensors, {FORMAT: json.dumps({**facts, "seal": seal})}))


def sha256(words: list, arrays: Iterable[np.ndarray]) -> str:
    """The hash of words and arrays: of their types, shapes and bytes, little end first.

    Args:
        words: anything JSON can hold.
        arrays: the arrays.

    Returns:
        64 hexadecimal digits.
    """
    state = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    for array in arrays:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        state.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return state.hexdigest()


def network_digest(network: Network) -> str:
    """The hash of a network's activation and of its weights, as float64 numbers.

    Args:
        network: the float64 network.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: for a network with several activations, or one in another setting than the
            table's.
    """
    name = default_activation(network)
    if name is None and len(network.layers) > 1:
        rows = {
            (row.name, row.settings)
            for row in (hidden.activation for hidden in network.layers[:-1])
        }
        kinds = " and ".join(
            f"{kind} with {dict(settings)}" if settings else kind for kind, settings in sorted(rows)
        )
        raise ValueError(
            f"a proof file names one activation of {', '.join(ACTIVATIONS)} in its default setting "
            f"for all layers; got {kinds}"
        )
    names = [name or "softplus"]
    weights, biases = ([getattr(layer, part).cpu().numpy() for layer in network.layers]
                       for part in ("weight", "bias"))  # fmt: skip
    return sha256(names, [*weights, *biases])


def _image_digests(x: np.ndarray) -> np.ndarray:
    rows = [np.frombuffer(bytes.fromhex(sha256([], [row])), np.uint8) for row in x]
    return np.stack(rows) if rows else np.zeros((0, 32), np.uint8)


@dataclass(frozen=True)
class _Images:
    """Inputs to make claims about.

    Attributes:
        prover: the network, prepared for proofs.
        x: ``(inputs, n)``.
        label: ``(inputs,)``.
        target: ``(inputs, targets)`` the classes but the label, in increasing order.
        aim: ``(inputs,)`` radii to be proved.
        curvature: ``(inputs, targets)`` bounds k.
        valid: ``(inputs,)`` radii of the balls where they hold.
        box: where the adversary must stay; None for everywhere.
    """

    prover: Prover
    x: Tensor
    label: Tensor
    target: Tensor
    aim: Tensor
    curvature: Tensor
    valid: Tensor
    box: Box | None

    @classmethod
    def of(
        cls, prover: Prover, x: Tensor, label: Tensor, aim: Tensor, box: Box | None
    ) -> "_Images":
        """Inputs with the curvature over all of R^n."""
        network = prover.network
        target = torch.arange(network.classes).expand(len(label), -1)
        target = target[target != label[:, None]].reshape(len(label), network.classes - 1)
        labels = label[:, None].expand_as(target)
        curvature = downward_curvature(network, labels, target)
        if len(network.layers) > 2:
            upward = downward_curvature(network, target, labels)
            curvature = curvature * _WIDER + upward * _OTHER_WAY
        everywhere = torch.full_like(aim, torch.inf)
        return cls(prover, x, label, target, aim, curvature, everywhere, box)

    @property
    def network(self) -> Network:
        """The float64 network."""
        return self.prover.network

    def entries(self, item: Tensor, target: Tensor) -> Entries:
        """The margins of inputs over the targets at some places."""
        x, label, valid = self.x[item], self.label[item], self.valid[item]
        allowed = None if self.box is None else self.box.around(x)
        entries = Entries.of(self.prover, x, label, self.target[item, target], allowed)
        return replace(entries, curvature=self.curvature[item, target], valid=valid)

    @property
    def everything(self) -> tuple[Tensor, Tensor]:
        """The places of all pairs."""
        item, target = torch.ones_like(self.target).nonzero(as_tuple=True)
        return item, target

    def in_balls(self, most: Tensor) -> "_Images":
        """The same with curvatures of balls where they prove more; the balls' radii by bisection.

        Args:
            most: ``(inputs,)`` radii not worth exceeding.
        """
        best, low, high = self, self.aim, most * (1 + _SHORT)
        for _ in range(_BALLS if len(self.network.layers) > 2 else 0):
            middle = (low + high) / 2
            trial = self._in_balls(middle)
            item, target = self.everything
            entries = trial.entries(item, target)
            found = _radius(self.prover, entries, find_points(self.prover, entries, middle[item]))
            reached = found.reshape(self.target.shape).amin(1)
            best = best._where(reached > best.aim * (1 + _WORTH), replace(trial, aim=reached))
            filled = reached >= middle * (1 - _LOSS)
            low, high = low.where(~filled, middle), high.where(filled, middle)
        return best

    def _in_balls(self, radius: Tensor) -> "_Images":
        item, target = self.everything
        pairs = self.label[item], self.target[item, target]
        allowed = None if self.box is None else self.box.around(self.x)
        region = Region(self.x, radius, allowed)
        curvature = local_curvature(self.prover.rounding, region, item, *pairs)
        upward = downward_curvature(self.network, *pairs[::-1])
        curvature = curvature * _WIDER_IN_BALLS + upward * _OTHER_WAY
        return replace(self, curvature=curvature.reshape(self.target.shape), valid=radius)

    def _where(self, better: Tensor, other: "_Images") -> "_Images":
        aim, valid = (
            torch.where(better, getattr(other, name), getattr(self, name))
            for name in ("aim", "valid")
        )
        curvature = torch.where(better[:, None], other.curvature, self.curvature)
        return replace(self, aim=aim, valid=valid, curvature=curvature)

    def claims(self, nearest: Tensor) -> dict[str, np.ndarray]:
        """The claims as arrays ``(inputs, targets)``, and the digits of their points.

        Args:
            nearest: ``(inputs,)`` the targets that limit the radii.
        """
        item, target = self.everything
        parts = []
        for part in torch.arange(len(item)).split(_CHUNK_PAIRS):
            entries, aim = self.entries(item[part], target[part]), self.aim[item[part]]
            limits = (entries.target == nearest[item[part]]) | entries.valid.isfinite()
            parts.append(_encode(self.prover, entries, aim, limits))
        shape = tuple(self.target.shape)
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        found |= {name: found[name].reshape(shape) for name in found if name != "steps"}
        if self.valid.isfinite().any():
            found["valid"] = self.valid.numpy()
        if any(self.prover.rounding.gap):
            start = self.prover.rounding.gap_at(self.x).numpy()
            found["margin"] = self.prover.rounding.gap[0] * found["radius"] + start[:, None]
        if self.box is None:
            del found["multiplier"]
        else:
            found["box"] = torch.stack([self.box.lower, self.box.upper]).numpy()
        return found


def _encode(prover: Prover, entries: Entries, aim: Tensor, limits: Tensor) -> dict[str, np.ndarray]:
    """Points that prove the radii ``aim`` within ``_LOSS``, in as few digits as that takes."""
    goal, curvature = aim * (1 - _LOSS), entries.curvature
    bound = _radius(prover, entries, torch.zeros_like(entries.x))
    scale = torch.zeros(len(aim))
    digits: list[list[Tensor]] = [[] for _ in aim]
    todo = (bound < goal).nonzero().squeeze(1)
    enough = (aim * (1 + _ROOM)).masked_fill(limits, torch.inf).minimum(entries.valid)
    few, d = entries.take(todo), torch.zeros_like(entries.x)
    shift = find_points(prover, few, enough[todo])
    for count in range(1, _MOST_DIGITS + 1):
        scales, rows = to_digits(shift, count)
        moved = from_digits(rows, scales)
        found = _radius(prover, few, moved)
        # Rounded, a point may leave the ball; fewer digits, or none, then prove more.
        for place in (found > bound[todo]).nonzero().squeeze(1).tolist():
            i = int(todo[place])
            scale[i], d[i], bound[i] = scales[place], moved[place], found[place]
            digits[i] = list(rows[place])
        left = (bound[todo] < goal[todo]).nonzero().squeeze(1)
        todo, few, shift = todo[left], few.take(left), shift[left]
    flat = [row for rows in digits for row in rows]
    quadratic, _ = prover.prove(entries, _in_box(entries, d))
    multiplier = quadratic.multiplier(bound, fixed=True).maximum(curvature * (1 + 2.0**-40) + TINY)
    return {
        "radius": bound.numpy(),
        "multiplier": multiplier.numpy(),
        "curvature": curvature.numpy(),
        "digits": np.array([len(rows) for rows in digits], np.uint8),
        "scale": scale.numpy(),
        "steps": _packed(torch.stack(flat) if flat else torch.zeros(0, entries.x.shape[1])),
    }


def to_digits(shift: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Round vectors to numbers of few digits to the base 16, from -8 to 7, times a scale.

    Args:
        shift: ``(pairs, n)`` float64 vectors.
        count: how many digits, the first before the point.

    Returns:
        ``(pairs,)`` float32 scales and ``(pairs, count, n)`` digits.
    """
    scale = (shift.abs().amax(1) / 7).float()
    scale = torch.where(scale > 0, scale, 1.0)
    unit = 16 ** (count - 1)  # of the last digit in those of the first
    offset = 8 * sum(16**place for place in range(count))
    whole = (shift / scale[:, None].double() * unit).round() + offset
    whole = whole.clamp(0, 16**count - 1).long()
    digits = [whole // 16 ** (count - 1 - place) % 16 - 8 for place in range(count)]
    return scale, torch.stack(digits, dim=1)


def from_digits(digits: Tensor, scale: Tensor) -> Tensor:
    """The vectors that :func:`to_digits` rounded to.

    Args:
        digits: ``(pairs, count, n)``.
        scale: ``(pairs,)``.

    Returns:
        ``(pairs, n)`` float64.
    """
    units = 16.0 ** -torch.arange(digits.shape[1], dtype=torch.float64)
    return scale.double()[:, None] * (digits * units[:, None]).sum(1)


def _packed(digits: Tensor) -> np.ndarray:
    """Two digits a byte: those of the first half of the coordinates, and 16 times the others."""
    digits = (digits + 8).numpy().astype(np.uint8)
    half = (digits.shape[1] + 1) // 2
    low, high = digits[:, :half].copy(), digits[:, half:]
    low[:, : high.shape[1]] += 16 * high
    return low


def find_points(prover: Prover, entries: Entries, limit: Tensor) -> Tensor:
    """Search for the points of expansion: all that a proof file needs of the search.

    The search of :func:`crcbook.certify` stops where a step gains little. Here, where it has not
    reached its limit, more steps follow in double precision.

    Args:
        prover: the network, prepared for proofs.
        entries: the margins.
        limit: ``(entries,)`` radii that are good enough.

    Returns:
        ``(entries, n)`` displacements; any of them proves something.
    """
    question, best = Radius(), torch.zeros_like(entries.x)
    radius = torch.full_like(limit, -torch.inf)
    d = search(prover.rough, question, replace(entries, goal=limit), best, SEARCH_STEPS).double()
    acceleration, left = Acceleration(), torch.arange(len(limit))
    for _ in range(_STEPS):
        few = entries.take(left)
        most = few.valid * INSIDE
        inside = d * (most / d.norm(dim=1)).nan_to_num(nan=1.0).clamp(max=1)[:, None]
        found = _radius(prover, few, inside)
        better = found > radius[left]
        radius[left[better]], best[left[better]] = found[better], inside[better]
        move = next_point(question, few, evaluate(prover.network, few, d)) - d
        d = d + acceleration.step(d, move)
        keep = (radius[left] < limit[left]).nonzero().squeeze(1)
        if not len(keep):
            break
        d, left, acceleration = d[keep], left[keep], acceleration.take(keep)
    return best


def _radius(prover: Prover, entries: Entries, d: Tensor) -> Tensor:
    """What the quadratics at displaced inputs prove, in the entries' balls and box."""
    d = _in_box(entries, d)
    outside = d.norm(dim=1) > entries.valid * (1 + INSIDE) / 2
    quadratic, _ = prover.prove(entries, d)
    radius = quadratic.radius().minimum(entries.valid)
    if entries.allowed is not None:  # where the whole box is proved, its size is as much as counts
        radius = radius.minimum(entries.allowed.longest())
    return radius.masked_fill(outside, 0.0)


def _in_box(entries: Entries, d: Tensor) -> Tensor:
    return d if entries.allowed is None else entries.allowed.clip(d)
