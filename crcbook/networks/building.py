"""Building networks: fresh ones, and deeper ones that go on from a trained one."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from crcbook.activations import ACTIVATIONS
from crcbook.networks.modules import activation_module
from crcbook.networks.network import Layer
from crcbook.networks.reading import read_network, submodules

_FAR_RIGHT, _CLOSE_TO_ZERO = 12.0, 0.1  # where the activations are nearly lines
_RIGHT, _SMALL = 5.0, 0.5  # where they bend a little: a bias, or what a layer's norms are


def mlp(sizes: Sequence[int], activation: str = "softplus", seed: int = 0) -> nn.Sequential:
    """A fully connected classifier with torch's default initialisation.

    Args:
        sizes: the widths, from the number of inputs to the number of classes.
        activation: a name from the table of activations.
        seed: the seed of the initialisation; the global generator is left untouched.

    Returns:
        ``Flatten, Linear, activation, ..., Linear``; it takes ``(batch, *input_shape)``.

    Raises:
        ValueError: for fewer than two widths, a width below 1, fewer than two classes, or an
            unknown activation.
    """
    sizes = list(sizes)
    if len(sizes) < 2 or min(sizes) < 1 or sizes[-1] < 2:
        raise ValueError(
            f"sizes must be at least two positive widths, the last one at least 2; got {sizes}"
        )
    activation_module(activation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linears = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)]
    modules: list[nn.Module] = [nn.Flatten()]
    for linear in linears[:-1]:
        modules += [linear, activation_module(activation)]
    return nn.Sequential(*modules, linears[-1])


def nearly_linear(model: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """A random network of the same widths in which one hidden layer bends, to train from.

    A bound of the curvature multiplies how far the slopes of one layer can vary by the norms of the
    others. Hidden layers after the first one are orthogonal here (Saxe, McClelland & Ganguli 2014),
    so that they stretch no direction more than another, and work where the activation is nearly a
    line: to the right of the bend for those that grow, close to 0 for those that saturate. The
    layer after takes their mean away; the first and the last are torch's default otherwise.

    Args:
        model: an :func:`mlp` with two hidden layers or more.
        seed: the seed of the initialisation; the global generator is left untouched.

    Returns:
        The network, in the model's dtype, on its device.

    Raises:
        ValueError: for a model that ``mlp`` would not build, or with fewer hidden layers.
    """
    facts = architecture(model)
    first, *late, last = read_network(mlp(facts["sizes"], facts["activation"], seed)).layers
    if not late:
        raise ValueError(f"expected two hidden layers or more; got {facts['sizes']}")
    row, generator = first.activation, torch.Generator().manual_seed(seed)
    centre, scale = (_RIGHT, 1.0) if row.slope_limits[1] == 1 else (0.0, _SMALL)
    value, weights = row.value(first.bias.new_tensor(centre)), [(first.weight, first.bias)]
    mean = last.bias.new_zeros(())
    for layer in late:
        weight = nn.init.orthogonal_(torch.empty_like(layer.weight), scale, generator)
        weights.append((weight, centre - mean * weight.sum(1)))
        mean = value
    weights.append((last.weight, last.bias - mean * last.weight.sum(1)))
    return mlp_of(weights, facts["activation"], next(model.parameters()))


def mlp_of(
    weights: Sequence[tuple[Tensor, Tensor]], activation: str, like: Tensor
) -> nn.Sequential:
    """The :func:`mlp` that has given weights.

    Args:
        weights: of each layer the weight, ``(outputs, inputs)``, and the bias, ``(outputs,)``.
        activation: a name from the table of activations.
        like: a tensor of the dtype and on the device that the network is to have.

    Returns:
        The network.
    """
    sizes = [weights[0][0].shape[1], *(len(weight) for weight, _ in weights)]
    model = mlp(sizes, activation).to(like)
    values = [value for pair in weights for value in pair]
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


def architecture(model: nn.Module) -> dict:
    """The widths and the activation of an :func:`crcbook.mlp`.

    Args:
        model: the network.

    Returns:
        ``{"sizes": [...], "activation": name}``.

    Raises:
        ValueError: for a model ``mlp`` would not build.
    """
    list(submodules(model))  # nothing is hooked in that the modules' names do not say
    layers = read_network(model).layers
    sizes = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
    rows = {layer.activation.name: layer.activation for layer in layers[:-1]}
    name = next(iter(rows), "softplus")
    twin = mlp(sizes, name) if name in ACTIVATIONS else None
    if len(rows) > 1 or twin is None or repr(twin) != repr(model):
        raise ValueError(f"expected a network that crcbook.mlp builds; got {model}")
    return {"sizes": sizes, "activation": name}


def deepen(model: nn.Sequential, layers: int) -> nn.Sequential:
    """A deeper network that computes almost the same, to train on from there.

    Hidden layers that copy their input are put before the last one ("Net2Net", Chen, Goodfellow &
    Shlens 2016). A smooth activation has no identity, so they work where it is nearly a line: far
    to the right for those that grow, close to 0 for those that saturate.

    Args:
        model: an :func:`mlp` with a hidden layer.
        layers: how many linear layers the deeper one has.

    Returns:
        The network, in the model's dtype, on its device.

    Raises:
        ValueError: for a model that ``mlp`` would not build, without a hidden layer, or with more
            layers.
    """
    facts = architecture(model)
    *hidden, last = read_network(model).layers
    if not 1 <= len(hidden) < layers:
        raise ValueError(f"cannot make {layers} layers of a network with {len(hidden) + 1}")
    row = hidden[-1].activation
    centre, scale = (_FAR_RIGHT, 1.0) if row.slope_limits[1] == 1 else (0.0, _CLOSE_TO_ZERO)
    value, slope = (end(last.bias.new_tensor(centre)) for end in (row.value, row.slope))
    weights = [(layer.weight, layer.bias) for layer in hidden]
    units = len(hidden[-1].bias)
    shrink, shift = torch.ones_like(slope), torch.zeros_like(slope)  # what undoes the last copy
    for _ in range(layers - len(hidden) - 1):
        identity = torch.eye(units).to(last.weight)
        weights.append((scale * shrink * identity, (centre + scale * shift).expand(units)))
        shrink = 1 / (scale * slope)
        shift = -value * shrink
    weights.append((shrink * last.weight, last.bias + shift * last.weight.sum(1)))
    return mlp_of(weights, facts["activation"], next(model.parameters()))


def mean_of(models: Sequence[nn.Sequential]) -> nn.Sequential:
    """The network whose logits are the mean of others' logits, to train on from there.

    Their hidden units stand side by side. The Hessian of a mean is the mean of the Hessians, so its
    curvature is at most the mean of theirs, and where the networks bend in different directions it
    is less.

    Args:
        models: :func:`mlp` networks with the same inputs, classes, activation and number of layers.

    Returns:
        The network, as wide as all of them together, in the first one's dtype, on its device.

    Raises:
        ValueError: without a model, for one that ``mlp`` would not build, without a hidden layer,
            or that does not go with the others.
    """
    facts = [architecture(model) for model in models]
    alike = {(len(f["sizes"]), f["sizes"][0], f["sizes"][-1], f["activation"]) for f in facts}
    if len(alike) != 1 or len(facts[0]["sizes"]) < 3:
        raise ValueError(
            "expected networks with a hidden layer and the same inputs, classes, activation and "
            f"number of layers; got {facts}"
        )
    first, *inner, last = zip(*(read_network(model).layers for model in models), strict=True)
    weights = [(torch.cat([layer.weight for layer in first]), _joined(first))]
    weights += [(torch.block_diag(*(layer.weight for layer in place)), _joined(place))
                for place in inner]  # fmt: skip
    weights.append((
        torch.cat([layer.weight for layer in last], dim=1) / len(models),
        torch.stack([layer.bias for layer in last]).mean(0),
    ))  # fmt: skip
    return mlp_of(weights, facts[0]["activation"], next(models[0].parameters()))


def _joined(layers: Sequence[Layer]) -> Tensor:
    return torch.cat([layer.bias for layer in layers])
