"""Which torch module evaluates which row of the table of activations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crcbook.activations import (
    ACTIVATIONS,
    IDENTITY,
    OTHER_ACTIVATIONS,
    Activation,
    Arctan,
    softplus,
)
from crcbook.networks.mixed import Mixed

_MODULES: dict[type[nn.Module], str] = {
    nn.Softplus: "softplus",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    Arctan: "arctan",
    nn.Identity: "identity",
}
_OTHER_MODULES: dict[str, type[nn.Module]] = {
    "gelu-tanh": nn.GELU,
    "mish": nn.Mish,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "logsigmoid": nn.LogSigmoid,
    "softsign": nn.Softsign,
}


def activation_module(name: str) -> nn.Module:
    """A fresh torch module of the named activation.

    Args:
        name: a key of ``ACTIVATIONS``.

    Returns:
        The module, with torch's default settings.

    Raises:
        ValueError: for a name the table lacks.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return next(module for module, key in _MODULES.items() if key == name)()


class MixedActivation(nn.Module):
    """Several activations, each applied to a group of the units, which are the last dimension."""

    def __init__(self, parts: Sequence[tuple[nn.Module, int]]) -> None:
        """Keep the activations.

        Args:
            parts: the module of each group and how many units it has, in order.
        """
        super().__init__()
        self.activations = nn.ModuleList(module for module, _ in parts)
        self.counts = [count for _, count in parts]

    def forward(self, z: Tensor) -> Tensor:
        """Apply each activation to its group."""
        pieces = z.split(self.counts, dim=-1)
        return torch.cat(
            [f(piece) for f, piece in zip(self.activations, pieces, strict=True)], dim=-1
        )


def row_facts(row: Activation) -> list:
    """What tells a row of the table from others, for a file.

    Args:
        row: the row.

    Returns:
        Its name and settings; the groups' names, settings and sizes where it has several.
    """
    if isinstance(row, Mixed):
        return [row.name, [[*row_facts(part), count] for part, count in row.parts]]
    return [row.name, dict(row.settings)]


def module_of(name: str, settings: dict[str, float | str] | list) -> nn.Module:
    """The torch module that a row of any kind comes from.

    Args:
        name: the row's name.
        settings: the row's settings, as :func:`row_facts` gives them.

    Returns:
        The module.

    Raises:
        KeyError: for a name that no row has.
        TypeError: for settings that the module does not take.
    """
    if isinstance(settings, list):
        return MixedActivation([(module_of(*facts), count) for *facts, count in settings])
    modules = {key: module for module, key in _MODULES.items()} | _OTHER_MODULES
    return modules[name](**settings)


def activation_of(module: nn.Module) -> Activation | None:
    """The row a torch module of :func:`crcbook.mlp` evaluates; None where it is none of them.

    Args:
        module: any module.

    Returns:
        The row, or None.

    Raises:
        ValueError: for a softplus whose beta is not positive or out of all proportion, or a GELU
            of a form that torch does not know.
    """
    name = _MODULES.get(type(module))
    if name == "identity":
        return IDENTITY
    if isinstance(module, nn.Softplus) and name:
        return softplus(float(module.beta), float(module.threshold))
    if isinstance(module, nn.GELU) and name:
        return gelu(str(module.approximate))
    return None if name is None else ACTIVATIONS[name]


def gelu(approximate: str = "none") -> Activation:
    """The row of a form of GELU.

    Args:
        approximate: ``"none"`` or ``"tanh"``, as torch calls them.

    Returns:
        The row.

    Raises:
        ValueError: for another form.
    """
    forms = {"none": ACTIVATIONS["gelu"], "tanh": OTHER_ACTIVATIONS["gelu-tanh"]}
    if approximate not in forms:
        raise ValueError(f"GELU has the forms 'none' and 'tanh'; got {approximate!r}")
    return forms[approximate]
