"""What every stage promises, whatever points it chose: no adversary is ever inside of a bound.

A stage is asked both questions, with and without a box, about networks of every activation whose
inputs and logits have sizes from 1e-40 to 1e40; the adversaries are the points of an attack, of its
rays and of random directions.
"""

import functools
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from conftest import (
    EVERY,
    bent_lines,
    examples,
    random_networks,
    thin_model,
    worst_on_a_line,
)
from hypothesis import given
from hypothesis import strategies as st

import crcbook as crc
from crcbook.attacks import Aim, boundary_points
from crcbook.certificate import certificate as module
from crcbook.certificate.plan import Plan
from crcbook.certificate.question import Margin, Radius
from crcbook.checks import as_box
from crcbook.networks import read_network
from crcbook.proof.box import clip
from crcbook.proof.prover import Entries, Prover
from crcbook.proof.sketches import Glance
from crcbook.stages import __path__ as path
from crcbook.stages import dual, single, slabs
from crcbook.stages.closed_form import ClosedForm
from crcbook.stages.dual import Dual, Sharp, curvature_in_reach
from crcbook.stages.lines import Crown
from crcbook.stages.lipschitz import Lipschitz
from crcbook.stages.local import Local
from crcbook.stages.parabolas import Parabolas
from crcbook.stages.paths import Paths
from crcbook.stages.single import Single
from crcbook.stages.slabs import Slabs

ANYWHERE = {
    "closed form": ClosedForm,
    "dual": Dual,
    "lines": Crown,
    "lipschitz": Lipschitz,
    "parabolas": Parabolas,
}
IN_BALLS = {
    "paths": Paths,
    "sharp": Sharp,
    "sharp, shared": functools.partial(Sharp, solve="balls"),
    "slabs": Slabs,
    "dual in balls": Dual,
}


def test_every_stage_is_tested_here():
    modules = [import_module(f"crcbook.stages.{found.name}") for found in iter_modules(path)]
    kinds = {kind for module in modules for kind in vars(module).values() if is_dataclass(kind)}
    stages = {kind for kind in kinds if "method" in {field.name for field in fields(kind)}}
    tested = {getattr(kind, "func", kind) for kind in (*ANYWHERE.values(), *IN_BALLS.values())}
    assert stages == {*tested, Single, Local}


def attacked(prover, entries, box, generator, rho=None):
    """Points that an adversary may use: along the way to the boundary, and about."""
    crossing = boundary_points(Aim.of(prover, entries, box), steps=20)
    way = (crossing - entries.x).nan_to_num(nan=0.0)
    length = way.norm(dim=1, keepdim=True)
    if rho is not None:
        length = torch.full_like(length, 1.0) * rho[:, None]
    for share in (0.3, 1.0, 1 + 1e-9, 1.5):
        yield clip(box, entries.x + share * way)
    for _ in range(12):
        noise = torch.randn(way.shape, generator=generator, dtype=torch.float64)
        noise = torch.nn.functional.normalize(noise + way / (length + 1e-300), dim=1)
        yield clip(box, entries.x + torch.rand(1, generator=generator) * length * noise)


def assert_sound(prover, question, entries, bound, box, generator):
    """No point contradicts a bound."""
    assert bound.shape == (len(entries),) and not bound.isnan().any()
    rho = question.radius[entries.image] if isinstance(question, Margin) else None
    for point in attacked(prover, entries, box, generator, rho):
        margin, error = prover.margin_at(entries, point)
        distance = (point - entries.x).norm(dim=1)
        if rho is None:
            assert (bound <= distance * (1 + 1e-12))[margin + error < 0].all()
        else:
            assert (bound <= margin + error)[distance <= rho * (1 - 1e-12)].all()


def scaled(model, unit, logits):
    """The same network in other units of its inputs and logits."""
    with torch.no_grad():
        model[1].weight.div_(unit)
        model[-1].weight.mul_(logits)
        model[-1].bias.mul_(logits)
    return model


def problem(case, unit, logits, boxed):
    model, generator = case
    model = scaled(model, unit, logits)
    x = unit * torch.rand(3, model[1].in_features, generator=generator, dtype=torch.float64)
    prover = Prover.of(read_network(model, x))
    order = prover.network.logits(x).argsort(1, descending=True)
    box = as_box((0.0, unit), x) if boxed else None
    allowed = None if box is None else box.around(x)
    return prover, Entries.of(prover, x, order[:, 0], order[:, -1], allowed), box, generator


def in_ball(prover, entries, radius):
    """Entries whose curvature is that of their balls."""
    entries = replace(entries, valid=radius)
    return replace(entries, curvature=curvature_in_reach(prover, entries))


def questions(prover, entries):
    """Both, the second with balls about as large as certified ones."""
    quadratic, _ = prover.prove(entries, torch.zeros_like(entries.x))
    rho = 1.5 * quadratic.radius().clamp(1e-60, 1e60)
    return Radius(), Margin(rho)


UNITS, LOGITS = st.sampled_from([1.0, 2.0**-133, 2.0**133]), st.sampled_from([1.0, 1e-40, 1e40])


@pytest.mark.parametrize("name", ANYWHERE)
@given(random_networks(max_width=8, activations=EVERY), UNITS, LOGITS, st.booleans())
@examples(1 / 3)
def test_no_adversary_is_inside_of_a_bound(name, case, unit, logits, boxed):
    prover, entries, box, generator = problem(case, unit, logits, boxed)
    for question in questions(prover, entries):
        bound, _ = ANYWHERE[name](prover, box=boxed)(question, entries)
        assert_sound(prover, question, entries, bound, box, generator)


@pytest.mark.parametrize("name", IN_BALLS)
@given(
    random_networks(max_inputs=4, max_width=6, activations=EVERY),
    UNITS,
    st.booleans(),
    st.sampled_from([1, 3.0]),
)
@examples(1 / 4)
def test_nor_of_a_bound_in_a_ball_which_ends_there(name, case, unit, boxed, share):
    prover, entries, box, generator = problem(case, unit, 1.0, boxed)
    radius, margin = questions(prover, entries)
    entries = in_ball(prover, entries, share * margin.radius)
    for question in (radius, Margin(entries.valid)):
        bound, _ = IN_BALLS[name](prover, box=boxed)(question, entries)
        assert_sound(prover, question, entries, bound, box, generator)
        if question is radius:
            assert (bound <= entries.valid).all()


@pytest.mark.parametrize("question", [Radius(), Margin], ids=["radius", "margin"])
@given(
    st.sampled_from([[8, 12, 3], [8, 10, 6, 3]]),
    st.sampled_from(EVERY),
    st.sampled_from([1e-2, 1.0, 30.0]),
    st.integers(0, 99),
)
@examples(1 / 3)
def test_nor_of_one_in_few_directions_and_digits(question, sizes, activation, scale, seed):
    model, generator = thin_model(sizes, activation, scale, seed)
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    prover = Prover.of(read_network(model))
    stage = Single.of(prover, Glance.of(prover).sketch)
    order = prover.network.logits(x).argsort(1, descending=True)
    entries = Entries.of(prover, x, order[:, 0], order[:, 1])
    quadratic, _ = prover.prove(entries, torch.zeros_like(x))
    reach = 1.2 * quadratic.radius()
    if question is Margin:
        question, goal = Margin(reach), torch.zeros_like(reach)
    else:
        goal = reach
    _, gradient = prover.network.margin_and_gradient(x, order[:, 0], order[:, 1])
    entries = replace(entries, goal=goal, way=gradient @ stage.reduced.basis.double(), bound=goal)
    bound, start = stage(question, entries)
    assert_sound(prover, question, entries, bound, None, generator)
    full, _ = Dual(prover)(question, replace(entries, start=start))
    # Beyond the goal no search goes on, and each may end elsewhere.
    assert (bound.minimum(goal) <= full + 1e-3 * full.abs()).all()


@pytest.mark.parametrize("box", [False, True], ids=["", "box"])
def test_on_a_line_a_grid_sees_all_of_a_ball(box):
    proved = 0
    for model, x in bent_lines(12):
        prover = Prover.of(read_network(model))
        where = as_box((x.item() - 10, x.item() + 10), x[None]) if box else None
        allowed = where.around(x[None]) if box else None
        entries = Entries.of(prover, x[None], torch.tensor([0]), torch.tensor([1]), allowed)
        for radius in (0.1, 0.3, 1.0):
            worst, bend = worst_on_a_line(model, x, radius)
            ball = in_ball(prover, entries, torch.tensor([radius]).double())
            assert bend <= ball.curvature * (1 + 1e-9)
            assert bend <= curvature_in_reach(prover, ball, "entries") * (1 + 1e-9)
            for stage in (
                Local(prover, where is not None),
                Dual(prover),
                ClosedForm(prover),
                Crown(prover),
                Parabolas(prover),
            ):
                question = Margin(torch.tensor([radius]).double())
                bound, _ = stage(question, entries)
                assert bound <= worst + 1e-9
                proved += bool(bound > 0)
    assert proved > 8


CASES = {"digits": {}, "in a box": {"box": (0.0, 1.0)}, "in balls": {"curvature": "local"}}


def all_radii(model, part, **options):
    return crc.certify(model, part.x, part.y, method="dual", **options).radius


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_any_stage_can_be_deleted(digits, bent_model, monkeypatch, options):
    part = digits.test.take(slice(0, 12))
    whole = all_radii(bent_model, part, **options)
    stages = Plan.stages.func
    everywhere, in_balls = stages(problem_of(bent_model, part, options).plan)
    for number in range(len(everywhere) + len(in_balls)):

        def fewer(self, number=number):
            first, second = stages(self)
            kept = [s for place, s in enumerate(first + second) if place != number]
            cut = len(first) - (number < len(first))
            return kept[:cut], kept[cut:]

        patched = functools.cached_property(fewer)
        patched.__set_name__(Plan, "stages")
        with monkeypatch.context() as patch:
            patch.setattr(Plan, "stages", patched)
            # Searches end where a ten-thousandth is left to gain, some from one side.
            assert (all_radii(bent_model, part, **options) <= whole * (1 + 1e-4)).all()


def problem_of(model, part, options):
    box, curvature = options.get("box"), options.get("curvature", "global")
    return module._Problem.of(model, part.x, part.y, module._Asked("all", box, curvature, "dual"))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_random_points_shrink_radii_and_break_nothing(digits, digits_model, monkeypatch, options):
    part = digits.test.take(slice(0, 40))
    whole, generator = all_radii(digits_model, part, **options), torch.Generator().manual_seed(0)
    distance = crc.attack(digits_model, part.x, part.y, box=options.get("box")).distance

    def anywhere(network, question, entries, start, steps, rough=False):
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        return (0.3 * noise / start.shape[1] ** 0.5).to(network.dtype)

    for user in (dual, single, slabs):
        monkeypatch.setattr(user, "search", anywhere)
    misled = all_radii(digits_model, part, **options)
    assert (misled <= distance).all()
    assert (misled <= whole * (1 + 1e-6)).all() and misled.sum() < 0.999 * whole.sum()
