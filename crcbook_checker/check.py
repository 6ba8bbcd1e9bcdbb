r"""Check certified radii, trusting nothing of the program that found them.

A proof file holds, for images and every class but their label, a point c, a curvature k and a
radius r. Let f be the label's logit less the other's. If no eigenvalue of f's Hessian is below -k,
Taylor's theorem at c, expanded again at the image x, gives for every displacement d

    f(x + d) >= q - s.d - (k/2)|d|^2,   q = f(c) + g.(x-c) - (k/2)|x-c|^2,   s = k (x-c) - g,

where g is the gradient of f at c. So f is positive at every point closer to x than r if q > 0 and
q - r |s| - (k/2) r^2 >= 0. Whatever c is, and whoever chose it, that is a proof. Where k holds in a
ball around x alone, c must lie in that ball and r must not exceed its radius. In a box f is at
least the minimum of q - s.d + (m-k)/2 |d|^2 there, for any m > k, less (m/2) r^2.

Everything is decided in ball arithmetic (Arb, by python-flint): a number is known to lie in a ball,
and a comparison is true only if it holds for all numbers of the balls. Weights, images and points
are float64 numbers, hence exact. NumPy computes guesses, of which none is trusted.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import add, mul, sub
from pathlib import Path

import flint
import numpy as np
from flint import arb, arb_mat, arb_series, ctx
from safetensors import SafetensorError, safe_open

ctx.prec = 128  # bits
real = partial(np.ndarray.astype, dtype=float, casting="safe")  # float64, or a TypeError
Vector = list[arb]
Ends = tuple[arb, arb]  # an interval
Ranges = list[list[list[Ends]]]  # of a unit's slopes and bends, a list a unit, a list a layer


def require(condition: bool, message: str) -> None:
    """Refuse a file."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Activation:
    """An activation as a function of power series, which gives its derivatives, and where it turns.

    ``turns`` holds where the function and its first two derivatives have local extrema, of two that
    mirror each other the right one: bounds on an interval are at those inside and at its ends.
    ``limits`` are those of the first derivative at minus and plus infinity (the second one's are
    0); ``jump`` bounds how far torch's function can be: its softplus is the identity above 20.
    """

    function: Callable[[arb_series], arb_series]
    turns: list[Vector]
    limits: tuple[int, int]
    jump: arb = arb(0)

    def derivatives(self, z: arb, count: int = 3) -> Vector:
        """The value at z and ``count - 1`` derivatives, at most 2."""
        terms = self.function(arb_series([z, 1], count)).coeffs() + [arb(0)] * count
        return [*terms[:2], *(2 * term for term in terms[2:])][:count]

    def bounds(self, low: arb, high: arb) -> list[Ends]:
        """Bounds on [low, high] of the function and of its first two derivatives."""
        found = []
        for order, turns in enumerate(self.turns):
            inside = [p for t in turns for p in (t, -t) if not (p < low or high < p)]
            found.append(hull(self.derivatives(p)[order] for p in (low, high, *inside)))
        return found

    @cached_property
    def line(self) -> list[Ends]:
        """Bounds on the whole line of the first two derivatives."""
        rows = [[self.derivatives(p) for t in turns for p in (t, -t)] for turns in self.turns[1:]]
        ends = [*(row[1] for row in rows[0]), *map(arb, self.limits)]
        return [hull(ends), hull([arb(0), *(row[2] for row in rows[1])])]


def hull(values: Iterable[arb]) -> Ends:
    """The least and the largest number, exact, rounded outward."""
    values = list(values)
    return reduce(arb.min, values).lower(), reduce(arb.max, values).upper()


# Balls around points where a derivative vanishes: the first, second and third one of SiLU, ...
SILU1, SILU2 = arb("-1.2784645427610737951 +/- 1e-18"), arb("2.3993572805154676678 +/- 1e-18")
SILU3, GELU1 = arb("3.4358409935351106890 +/- 1e-18"), arb("-0.75179152469356445746 +/- 1e-18")
JUMP, ZERO, ROOT, SHARP = arb(-20).exp().log1p(), arb(0), arb(2).sqrt(), (2 + arb(3).sqrt()).log()
GELU = [[GELU1], [ROOT], [ZERO, arb(2)]]
ACTIVATIONS = {
    "softplus": Activation(lambda z: (1 + z.exp()).log(), [[], [], [ZERO]], (0, 1), JUMP),
    "sigmoid": Activation(lambda z: 1 / (1 + (-z).exp()), [[], [ZERO], [SHARP]], (0, 0)),
    "tanh": Activation(lambda z: 1 - 2 / (1 + (2 * z).exp()), [[], [ZERO], [SHARP / 2]], (0, 0)),
    "silu": Activation(lambda z: z / (1 + (-z).exp()), [[SILU1], [SILU2], [ZERO, SILU3]], (0, 1)),
    "gelu": Activation(lambda z: z * (1 + (z / ROOT).erf()) / 2, GELU, (0, 1)),
    "arctan": Activation(lambda z: z.atan(), [[], [ZERO], [1 / arb(3).sqrt()]], (0, 0)),
}


def above(number: arb) -> arb:
    """A number of 40 bits that is no smaller: few bits make products of matrices cheap."""
    with ctx.workprec(40):
        return number.upper()


def each(operation: Callable[[arb, arb], arb], a: Vector, b: Vector) -> Vector:
    """Entry by entry, the sums, differences or products."""
    return [operation(x, y) for x, y in zip(a, b, strict=True)]


def dot(a: Vector, b: Vector) -> arb:
    """The inner product."""
    return sum(each(mul, a, b), arb(0))


def length(a: Vector) -> arb:
    """An upper bound of the l2 norm, exact."""
    return dot(a, a).abs_upper().sqrt().upper()


def vector(array: np.ndarray) -> Vector:
    """Float64 numbers, exactly."""
    return [arb(entry) for entry in array.tolist()]


def images(matrix: arb_mat, vectors: list[Vector]) -> list[Vector]:
    """The products of a matrix with vectors."""
    return (matrix * arb_mat(vectors).transpose()).transpose().tolist()


class Matrix:
    """A matrix in balls, with float64 numbers close to it for guesses."""

    def __init__(self, floats: np.ndarray, balls: arb_mat | None = None):
        """Take float64 numbers as they are, or as close to ``balls``."""
        self.floats, self.balls = floats, arb_mat(floats.tolist()) if balls is None else balls
        self.transposed, self.rows = self.balls.transpose(), self.balls.tolist()
        self.squares = [dot(row, row) for row in self.rows]

    def scaled(self, factors: Vector) -> "Matrix":
        """The matrix times diag(factors)."""
        floats = self.floats * np.array([float(factor) for factor in factors])
        return Matrix(floats, arb_mat([each(mul, row, factors) for row in self.rows]))

    def image(self, ends: list[Ends], transposed: bool = False) -> list[Ends]:
        """Bounds of the product with vectors between some ends."""
        balls = [[low.union(high) for low, high in ends]]
        (image,) = images(self.transposed if transposed else self.balls, balls)
        return [(entry.lower(), entry.upper()) for entry in image]

    def top(self, depths: Vector) -> arb:
        """A bound of the largest eigenvalue of M^T diag(d) M, d the positive part of depths.

        With S = diag(sqrt d) M it is that of G = S^T S, and of S S^T. For any number k and any L
        let k I - G = L L^T + R. As L L^T has no negative eigenvalue, none of G exceeds k + |R|,
        with the Frobenius norm of R. Both k and L are guessed, in float64; R is formed in balls.
        """
        kept = [i for i, depth in enumerate(depths) if not depth <= 0]
        if not kept:
            return arb(0)
        roots = [above(depths[i].sqrt()) for i in kept]
        floats = self.floats[kept] * np.array([[float(root)] for root in roots])
        balls = arb_mat([[r * x for x in self.rows[i]] for r, i in zip(roots, kept, strict=True)])
        if balls.nrows() < balls.ncols():
            floats, balls = floats.T, balls.transpose()
        k, guess = cholesky(floats.T @ floats)
        factor, size = arb_mat(guess.tolist()), balls.ncols()
        rest = arb_mat(size, size, arb(k)) - balls.transpose() * balls - factor * factor.transpose()
        return (k + length(rest.entries())).upper()


def cholesky(gram: np.ndarray) -> tuple[float, np.ndarray]:
    """A number k and a matrix L of few bits for which k I - L L^T is close to a matrix."""
    try:
        k = float(np.linalg.eigvalsh(gram)[-1] * (1 + 1e-11))
        factor = np.linalg.cholesky(k * np.eye(len(gram)) - gram)
        step = np.ldexp(1.0, np.frexp(np.abs(factor).max())[1] - 48)
        return k, np.round(factor / step) * step
    except np.linalg.LinAlgError:
        return 0.0, np.zeros_like(gram)


class Network:
    """Linear layers with one activation between them: what it computes, and how it curves.

    The curvature bounds are numbers k >= 0 such that no eigenvalue of the Hessian of the margin f
    of a label over a target is below -k. Let J_i be the Jacobian of the preactivations z_i of
    hidden layer i, and F_i the gradient of f in that layer's activations. By the chain rule the
    Hessian is the sum over the layers of J_i^T diag(F_i sigma''(z_i)) J_i. So k can be the sum of
    the largest eigenvalues of J_i^T diag(d_i) J_i, where d_i >= max(0, -F_i sigma''(z_i)).
    """

    def __init__(self, weights: list, biases: list, activation: str, cache: Path | None = None):
        """Take arrays ``(outputs, inputs)`` and ``(outputs,)``; the cache keeps what takes long."""
        require(activation in ACTIVATIONS, f"--activation must be one of {', '.join(ACTIVATIONS)}")
        weights, biases = ([real(array) for array in part] for part in (weights, biases))
        self.digest = digest([activation], [*weights, *biases])
        self.activation, self.layers = ACTIVATIONS[activation], [Matrix(w) for w in weights]
        self.biases, self.hidden = [vector(bias) for bias in biases], range(len(weights) - 1)
        self.slope = hull(abs(end) for end in self.activation.line[0])[1]
        self.line = [[self.activation.line] * len(bias) for bias in biases[:-1]]
        self.cache, key = cache, f"{self.digest} {flint.__version__}"
        self.file = dict(json.loads(cache.read_text())) if cache and cache.exists() else {}
        require({*map(type, self.file.values())} <= {dict}, f"{cache} is no cache of this program")
        self.known: dict[str, float] = self.file.setdefault(key, {})
        self.ball: tuple = ()  # around the last image, in its room, and the ranges there
        self.steepest: dict[tuple[int, int], Vector] = {}  # the d* of in_ball

    @classmethod
    def read(cls, path: Path, activation: str | None, cache: Path | None) -> "Network":
        """Read a safetensors file of tensors named like 1.weight and 1.bias, in that order."""
        tensors, facts = read_tensors(path)
        activation = activation or json.loads(facts.get("crcbook", "{}")).get("activation")
        names = [n for n in tensors if n.endswith(".weight") and n.split(".")[-2].isdecimal()]
        names.sort(key=lambda name: int(name.split(".")[-2]))
        zeros = {name[:-6] + "bias": np.zeros(len(tensors[name])) for name in names}
        biases = [(zeros | tensors)[name] for name in zeros]
        require(set(tensors) <= {*names, *zeros}, f"{path} has more than layers 1.weight, 1.bias")
        return cls([tensors[name] for name in names], biases, activation, cache)

    def values(self, place: int, vectors: list[Vector]) -> list[Vector]:
        """What a layer makes of vectors, before its activation."""
        return [each(add, z, self.biases[place]) for z in images(self.layers[place].balls, vectors)]

    def row(self, label: int, target: int) -> Vector:
        """The last layer's row of the label less that of the target."""
        return each(sub, self.layers[-1].rows[label], self.layers[-1].rows[target])

    def margins(self, points: list[Vector], asked: list[tuple[int, int, int]]) -> Iterable:
        """The margin and its gradient for each (number of the point, label, target)."""
        slopes, derivatives = [], self.activation.derivatives
        for place in self.hidden:
            rows = [[derivatives(z, 2) for z in row] for row in self.values(place, points)]
            points = [[value for value, _ in row] for row in rows]
            slopes.append([[slope for _, slope in row] for row in rows])
        gradients, bias = [self.row(*pair) for _, *pair in asked], self.biases[-1]
        margins = [dot(self.row(y, t), points[i]) + bias[y] - bias[t] for i, y, t in asked]
        for place in reversed(self.hidden):
            rows = [slopes[place][i] for i, *_ in asked]
            rows = [each(mul, *pair) for pair in zip(gradients, rows, strict=True)]
            gradients = images(self.layers[place].transposed, rows)
        return zip(margins, gradients, strict=True)

    def gap(self, label: int, target: int) -> arb:
        """How far from f torch's margin can be, rounding apart, for a unit may jump."""
        error = arb(0)
        for place in self.hidden if self.activation.jump != 0 else ():
            carried = error * self.norm(place) * self.slope if place else error
            error = carried + self.activation.jump * arb(len(self.biases[place])).sqrt()
        return length(self.row(label, target)) * error

    def remembered(self, name: str, prove: Callable[[], arb]) -> arb:
        """A proved bound, rounded up to few bits."""
        if name not in self.known:
            bound = prove()  # 0, or by 2^-1000 more, so that float64 holds what it is rounded to
            self.known[name] = float(above(bound + arb(2) ** -1000)) if bound != 0 else 0.0
            if self.cache:
                self.cache.write_text(json.dumps(self.file, indent=1))
        return arb(self.known[name])

    def norm(self, place: int) -> arb:
        """A bound of the spectral norm of a weight."""
        ones = [arb(1)] * len(self.biases[place])
        return self.remembered(f"norm {place}", lambda: self.layers[place].top(ones).sqrt())

    def depths(self, label: int, target: int, ranges: Ranges) -> list[Vector]:
        """Upper bounds of the -F_i sigma'': intervals of F_i are carried backwards."""
        outer, found = [(entry, entry) for entry in self.row(label, target)], []
        for place in reversed(self.hidden):
            units = list(zip(outer, ranges[place], strict=True))
            found.append([-hull(a * b for a in ends for b in bend)[0] for ends, (_, bend) in units])
            if place:
                inner = [hull(a * b for a in ends for b in slope) for ends, (slope, _) in units]
                outer = self.layers[place].image(inner, transposed=True)
        return found[::-1]

    @cached_property
    def jacobians(self) -> list[list[tuple[Matrix, arb]]]:
        """Links for every hidden layer: |A J_i| <= sum of factor * |A matrix|, for any matrix A.

        J_i = W diag(slopes) J_(i-1) with slopes = c + r e, |e| <= 1, and |A W diag(slopes) J| is at
        most |A W diag(c) J| + |A W diag(sqrt r)| |diag(sqrt r) J|; the links of J are used twice.
        """
        found = [[(self.layers[0], arb(1))]]
        for weight, units in zip(self.layers[1:-1], self.line, strict=False):
            spread = [above((high - low) / 2) for (low, high), _ in units]
            c = weight.scaled([(low + high) / 2 for (low, high), _ in units])
            links = [(Matrix(c.floats @ m.floats, c.balls * m.balls), f) for m, f in found[-1]]
            rest = weight.scaled([above(r.sqrt()) for r in spread])
            found.append([*links, (rest, norm(found[-1], spread))])
        return found

    def everywhere(self, label: int, target: int) -> arb:
        """The bound k over all of R^n."""
        depths = self.depths(label, target, self.line)
        return sum((norm(*pair) ** 2 for pair in zip(self.jacobians, depths, strict=False)), arb(0))

    def in_ball(self, label: int, target: int, ranges: Ranges) -> arb:
        """The bound k over a ball, where the slopes and bends keep to some ranges.

        The first layer's d give at most what the d* do that the largest slopes above it lead to,
        once for all balls, and what d - d* adds.
        """
        weight, lipschitz = self.layers[0], arb(1)
        extreme = [[[(slope[1], slope[1]), bend] for slope, bend in row] for row in self.line]
        first, *others = self.depths(label, target, ranges)
        most = self.steepest.get((label, target)) or self.depths(label, target, extreme)[0]
        self.steepest[label, target] = most
        k = self.remembered(f"steep {label} {target}", lambda: weight.top(most))
        k += self.rough(0, each(sub, first, most))
        for place, depths in enumerate(others, start=1):
            slopes = (abs(end) for slope, _ in ranges[place - 1] for end in slope)
            lipschitz *= self.norm(place - 1) * hull(slopes)[1]
            k += self.rough(place, depths) * lipschitz**2
        return k

    def rough(self, place: int, depths: Vector) -> arb:
        """A bound like ``Matrix.top``, without an eigenvalue problem."""
        depths = [depth.max(arb(0)) for depth in depths]
        total = dot(depths, self.layers[place].squares)
        return total.min(hull(depths)[1] * self.norm(place) ** 2)

    def bound(self, label: int, target: int, k: arb, x: Vector, radius: arb, room: list) -> arb:
        """A proved bound, not above k if one can be found, over the ball around x, in the room."""
        if radius.is_finite():
            if self.ball[:3] != (x, radius, room):
                self.ball = x, radius, room, self.ranges(x, radius, room)
            if k >= (proved := self.in_ball(label, target, self.ball[3])):
                return proved
        return self.remembered(f"k {label} {target}", partial(self.everywhere, label, target))

    def ranges(self, x: Vector, radius: arb, room: list[Vector]) -> Ranges:
        """The ranges over a ball around x, within the room that a box leaves.

        A preactivation moves by at most the radius times its row's norm and the norms and slopes
        below it, and keeps to the interval that those of the layer below, or the room, allow.
        """
        found, points, derivatives = [], [x], self.activation.derivatives
        ends = [(low.max(-radius), high.min(radius)) for low, high in zip(*room, strict=True)]
        for place, layer in enumerate(self.layers[:-1]):
            (z,) = self.values(place, points)
            moves = [radius * square.abs_upper().sqrt() for square in layer.squares]
            reach = [(a - b, a + b) for a, b in zip(z, moves, strict=True)]
            if ends:
                start = self.biases[place] if place else z
                inner = zip(reach, layer.image(ends), start, strict=True)
                reach = [(a.max(c + b), d.min(e + b)) for (a, d), (c, e), b in inner]
            units = [self.activation.bounds(low.lower(), high.upper()) for low, high in reach]
            points, ends = [[derivatives(a, 1)[0] for a in z]], [unit[0] for unit in units]
            found.append([unit[1:] for unit in units])
            radius *= self.norm(place) * self.slope
        return found


def norm(links: list[tuple[Matrix, arb]], depths: Vector) -> arb:
    """A bound of |diag(sqrt d) J| for the links of J and the positive part d of depths."""
    return sum((factor * matrix.top(depths).sqrt() for matrix, factor in links), arb(0))


def digest(words: list, arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of words and arrays: of types, shapes and bytes, little end first."""
    state = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    for array in arrays:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        state.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return state.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in [*file.keys()]}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} as a safetensors file: {error}") from error


class Proofs:
    """A proof file: for images, a claim for each class but the label, in increasing order.

    Tensors, with T = classes - 1: ``index`` and ``label`` (images,), ``image_sha256`` (images, 32),
    ``radius`` and ``curvature`` (images, T); where given ``valid`` (images,), the radius of the
    ball where the curvatures hold, ``margin`` (images, T), what f is at least up to the radius, in
    place of 0, and ``box`` (2, inputs) with ``multiplier`` (images, T), m. A point c is x plus
    ``scale`` (images, T) times a number of as many digits to the base 16 as ``digits`` (images, T)
    says, one before the point, moved into the box. A digit is a row of ``steps`` less 8, in turn; a
    byte holds a coordinate and, times 16, the one half of all further.
    """

    def __init__(self, path: Path):
        """Read a proof file."""
        self.tensors, metadata = read_tensors(path)
        facts = json.loads(metadata.get("crcbook proofs 1", "{}"))
        seal, self.model = facts.pop("seal", None), facts.get("model")
        tensors = [self.tensors[name] for name in sorted(self.tensors)]
        require(seal == digest([facts], tensors), f"{path} is no file of proofs, or was altered")
        self.index, self.label = (self.tensors[name].tolist() for name in ("index", "label"))
        self.ends = self.tensors["digits"].cumsum(dtype=int).reshape(self.tensors["digits"].shape)

    def claims(self, i: int, x: np.ndarray, classes: int) -> Iterator["Claim"]:
        """The claims about an image."""
        names = dict(radius=np.nan, curvature=np.nan, margin=0.0, multiplier=np.nan, valid=np.inf)
        rows = [self.tensors[name][i] if name in self.tensors else n for name, n in names.items()]
        digits, scale = self.tensors["digits"][i], self.tensors["scale"][i]
        numbers = map(vector, np.broadcast_arrays(*rows, digits)[:-1])
        box, exact = real(self.tensors.get("box", np.zeros((0, len(x))))), vector(x)
        room = [each(sub, vector(end), exact) for end in box]
        targets = [target for target in range(classes) if target != self.label[i]]
        columns = zip(targets, digits, scale, self.ends[i], *numbers, strict=True)
        for target, count, factor, end, *claim in columns:
            pairs = self.tensors["steps"][end - count : end]
            steps = np.concatenate([pairs & 15, pairs >> 4], axis=1)[:, : len(x)] - 8.0
            c = x + np.float64(factor) * (steps / 16.0 ** np.arange(count)[:, None]).sum(axis=0)
            c = np.clip(c, *box) if room else c
            yield Claim(exact, c, (self.label[i], target), room, claim)


@dataclass(frozen=True)
class Claim:
    """That f is at least some margin closer to x than r; ``room`` is what a box leaves of d."""

    x: Vector
    c: np.ndarray
    pair: tuple[int, int]
    room: list[Vector]
    numbers: Vector

    def flaws(self, network: Network, f: arb, g: Vector) -> Iterator[str]:
        """Why the claim is not proved, by the value f and the gradient g at c."""
        (r, k, margin, m, valid), away = self.numbers, each(sub, self.x, vector(self.c))
        if not (r > 0 and margin >= 0 and length(away) <= valid and r <= valid):
            yield "the radius or the point leaves the ball where the curvature holds"
        proved = network.bound(*self.pair, k, self.x, valid, self.room)
        if not k >= proved:
            yield f"the curvature {k.str(9)} is not proved, but {proved.str(9)} is"
        q = f - network.gap(*self.pair) + dot(g, away) - k / 2 * dot(away, away)
        s = [k * a - b for a, b in zip(away, g, strict=True)]
        least = q - r * length(s) - k / 2 * r * r
        if self.room and m > k and not least >= margin:
            d = each(arb.min, each(arb.max, [a / (m - k) for a in s], self.room[0]), self.room[1])
            least = q - dot(s, d) + (m - k) / 2 * dot(d, d) - m / 2 * r * r
        if not (q > 0 and least >= margin):
            yield f"the radius {r.str(9)} does not follow"


def check(proofs: Proofs, network: Network, x: np.ndarray, y: np.ndarray) -> Iterator[tuple]:
    """For each image of a proof file its index, label, radius and a list of what is wrong."""
    require(proofs.model == network.digest, "the proofs are about another model, or activation")
    for i, (index, label) in enumerate(zip(proofs.index, proofs.label, strict=True)):
        if digest([], [x[index]]) != proofs.tensors["image_sha256"][i].tobytes().hex():
            wrong = ["the proof is about another image"]
        elif label != y[index]:
            wrong = [f"the label of the image is {y[index]}"]
        else:
            wrong, claims = [], [*proofs.claims(i, x[index], len(network.layers[-1].rows))]
            points = {claim.c.tobytes(): vector(claim.c) for claim in claims}  # many are the image
            asked = [(list(points).index(claim.c.tobytes()), *claim.pair) for claim in claims]
            values = network.margins(list(points.values()), asked)
            for claim, value in zip(claims, values, strict=True):
                wrong += [f"class {claim.pair[1]}: {flaw}" for flaw in claim.flaws(network, *value)]
        yield index, label, proofs.tensors["radius"][i].min(), wrong


def read_data(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (images, inputs) and labels (images,): x and y of a file, or MNIST's own files."""
    if path.suffix in (".npz", ".safetensors"):
        tensors = np.load(path) if path.suffix == ".npz" else read_tensors(path)[0]
        return real(tensors["x"]).reshape(len(tensors["y"]), -1), tensors["y"]
    labels = Path(str(path).replace("images-idx3", "labels-idx1"))
    x, y = (np.frombuffer(p.read_bytes(), "u1", offset=n) for p, n in ((path, 16), (labels, 8)))
    return (x / 255).astype(np.float32).astype(float).reshape(len(y), -1), y


def main(arguments: list[str] | None = None) -> int:
    """Check a file, and return 0 if every image in it is proved, else 1; it may be refused."""
    parser = argparse.ArgumentParser(description="Check proofs. Data: x and y, or MNIST's images.")
    for name in ("proofs", "model", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--activation", choices=ACTIVATIONS, help="if the model does not say")
    parser.add_argument("--cache", type=Path, help="keeps the curvatures: a file of yours alone")
    options, count, proved = parser.parse_args(arguments), 0, 0
    network = Network.read(options.model, options.activation, options.cache)
    rows = check(Proofs(options.proofs), network, *read_data(options.data))
    for index, label, radius, wrong in rows:
        verdict = "not proved: " + "; ".join(wrong) if wrong else f"proved, radius {radius:.6f}"
        print(f"image {index}, class {label}, {verdict}", flush=True)
        count, proved = count + 1, proved + (not wrong)
    print(f"{proved} of {count} images proved")
    return int(proved < count or count == 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AttributeError, OSError, LookupError, ValueError, TypeError) as error:
        sys.exit(f"refused: {error}")
