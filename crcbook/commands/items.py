"""What ``certify`` and ``verify`` are about: a network, items with their labels, the threat."""

import argparse
import hashlib
import inspect
import json
import sys
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from os.path import realpath
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from crcbook import checks
from crcbook.certificate import certify
from crcbook.certificate.table import METHODS
from crcbook.checkpoints import load_model, no_such_file
from crcbook.checks import as_box, as_labels, as_radius
from crcbook.commands.arguments import add_device, code, count, path, radius
from crcbook.datasets import DATASETS, load
from crcbook.deployed import float32_holds
from crcbook.networks import Network, read_network

_DEFAULTS = {name: one.default for name, one in inspect.signature(certify).parameters.items()}
_ADVICE = "write one with numpy.savez(path, x=x, y=y)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that ``certify`` and ``verify`` share.

    Args:
        parser: the command's.
    """
    add_network_and_items(parser)
    add = parser.add_argument
    add("--radius", type=radius, nargs="+", metavar="R",
        help="l2 radii to answer for; that of the run where not given")  # fmt: skip
    add("--method", choices=(*METHODS, "best"), default=_DEFAULTS["method"], help="which bounds")
    add("--targets", choices=("all", "runner-up"), default=_DEFAULTS["targets"],
        help="the classes to hold out against; the runner-up alone is no guarantee")  # fmt: skip
    add("--rows", type=path, metavar="FILE",
        help="a .csv or .json for a row an item; given again, it goes on or is found")  # fmt: skip
    add("--json", type=path, metavar="FILE", help="write the summary here")


def add_network_and_items(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is certified, and against whom.

    Args:
        parser: the command's.
    """
    add = parser.add_argument
    add("run_folder", type=path, metavar="run", nargs="?",
        help="folder of a run of `train`, or its model.safetensors")  # fmt: skip
    add("--model", type=path, metavar="FILE",
        help="a network of one's own in its place: .onnx, or of crcbook.save_model")  # fmt: skip
    add("--module", type=code, metavar="FILE.py:NAME",
        help="code that builds the network, run as any program is: a module, or what returns one; "
        "--model is then its state dict, of safetensors or torch.save")  # fmt: skip
    add("--dataset", choices=DATASETS, help="whose test images; that of the run where not given")
    add("--data", type=path, metavar="FILE",
        help="items of one's own in its place: an .npz with arrays x, (items, *input_shape) floats "
        "as the network takes them, and y, the labels; or an .npy with x. Without labels, what the "
        "network answers is certified")  # fmt: skip
    add("--labels", type=path, metavar="FILE", help="an .npy with the labels of --data")
    add("--limit", type=count, metavar="N", help="only the first N items")
    add("--curvature", choices=("global", "local"), default=_DEFAULTS["curvature"],
        help="over all of space, or also over the ball around each item")  # fmt: skip
    add("--box", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="confine the adversary to values in this range")  # fmt: skip
    add("--deployed", choices=("float32",),
        help="certify the float32 program that torch runs, rounding and all")  # fmt: skip
    add_device(parser)


@dataclass(frozen=True)
class Request:
    """A network and what it is asked about.

    Attributes:
        model: the network, on its device.
        x: ``(items, *input_shape)``.
        y: ``(items,)`` int64: the labels, or where there are none the network's answers.
        answer: ``(items,)`` int64, what the network answers.
        labelled: whether ``y`` are labels.
        radius: the radii asked for.
        options: those of :func:`crcbook.certify`.
        about: where network and items come from, for the summary.
        hashes: of the network's file and weights, and of the items and their labels.
        chunk: how many to ask about at a time: with several hidden layers, or
            local curvature, one can take seconds.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    answer: Tensor
    labelled: bool
    radius: tuple[float, ...]
    options: dict
    about: dict = field(default_factory=dict)
    hashes: dict = field(default_factory=dict)
    chunk: int = 20


def read_request(options: argparse.Namespace) -> Request:
    """Read the network and the items, and check all that can be checked before the work.

    Args:
        options: what was typed.

    Returns:
        The question.

    Raises:
        RuntimeError: for a file that cannot be read.
        TypeError: for arrays of the wrong kind.
        ValueError: for words that contradict each other, a network that cannot be certified, items
            that it does not take, labels that it does not give, or a box that does not hold them.
    """
    _check_apart(options)
    module = options.module and options.module[0]
    named = [str(one) for one in (options.run_folder, options.model or module) if one]
    if len(named) != 1:
        got = " and ".join(named) or "none"
        raise ValueError(f"name one network: the folder of a run, or --model FILE; got {got}")
    check_source(options)
    model, where = _model(options)
    model = model.to(options.device)
    if options.deployed == "float32":
        model = _in_single(model)
    known = read_run(where)
    dataset = options.dataset or (None if options.data else known.get("dataset"))
    if dataset is None and options.data is None:
        raise ValueError(
            f"{where} does not say what it was trained on: give --data FILE or --dataset NAME"
        )
    x, y = arrays_of(options, dataset)
    x, y = fitting(x, y, model, str(options.data or dataset))
    x, y = x[: options.limit], None if y is None else y[: options.limit]
    network, checked = checks.read_items(model, x)
    answer = network.logits(checked.x).argmax(1).cpu()
    source = str(options.labels or options.data or dataset)
    labels = answer if y is None else checked_labels(y, network, checked, source)
    box = None if options.box is None else tuple(options.box)
    as_box(box, checked.x, checked.shape, checked.dtype)
    radii = options.radius or ([known["radius"]] if known else [])
    asked = {"method": options.method, "curvature": options.curvature, "box": box,
             "targets": options.targets, "deployed": options.deployed}  # fmt: skip
    about = {"model": str(where), "dataset": str(options.data or dataset)}
    if options.labels:
        about["labels"] = str(options.labels)
    hashes = {"model": _model_hash(where, network), "data": _hash([x, labels])}
    quick = len(network.layers) <= 2 and options.curvature == "global"
    return Request(model, x, labels, answer, y is not None, tuple(dict.fromkeys(radii)), asked,
                 about, hashes, 20 if quick else 5)  # fmt: skip


def check_source(options: argparse.Namespace) -> None:
    """Check that the words name one source of items.

    Args:
        options: what was typed.

    Raises:
        ValueError: where they name two, or labels of none.
    """
    if options.data is not None and options.dataset is not None:
        raise ValueError("name one source of items: --dataset NAME or --data FILE")
    if options.labels is not None and options.data is None:
        raise ValueError("--labels belong to --data FILE, which is not given")


def read_run(folder: Path) -> dict:
    """What the folder of a run knows of itself.

    Args:
        folder: the folder, or a file.

    Returns:
        Its ``dataset`` and ``radius``; nothing where it holds no ``run.json``.

    Raises:
        RuntimeError: where that cannot be read, or is not what ``train`` wrote.
    """
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
        found = {"dataset": known["dataset"], "radius": as_radius(known["recipe"]["radius"])}
        if found["dataset"] not in DATASETS:
            raise ValueError(f"dataset {found['dataset']!r} is unknown")
        return found
    except (LookupError, OSError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"cannot read {path} as `train` writes it ({type(error).__name__}: {error}): name "
            f"{folder / 'model.safetensors'}, with --dataset or --data"
        ) from error


def fitting(
    x: Tensor, y: Tensor | None, model: nn.Module, source: str
) -> tuple[Tensor, Tensor | None]:
    """Items of as many values as the network takes, with a label each.

    Args:
        x: the items; one without a batch becomes a batch.
        y: the labels, of one item also a number alone; None where there are none.
        model: the network.
        source: what the items are called.

    Returns:
        They, and the labels or None.

    Raises:
        ValueError: for items of another size, or another number of labels.
    """
    x = _fitting(x, model, source)
    y = y[None] if y is not None and y.dim() == 0 else y
    if y is not None and len(y) != len(x):
        raise ValueError(f"there are {len(y)} labels for {len(x)} items: give one for each")
    return x, y


def checked_labels(y: Tensor, network: Network, items: checks.Items, source: str) -> Tensor:
    """Labels that the network can give.

    Args:
        y: the labels.
        network: the network.
        items: what they are of.
        source: what they are called.

    Returns:
        ``(items,)`` int64 on the CPU.

    Raises:
        TypeError: for anything but integers.
        ValueError: for a wrong shape, or a class that the network lacks.
    """
    try:
        return as_labels(y, network, items).cpu()
    except (TypeError, ValueError) as error:
        raise type(error)(f"the labels of {source} are none of the network's: {error}") from error


def check_is_file(file: Path) -> None:
    """Check that there is something to read.

    Args:
        file: what is to be read.

    Raises:
        RuntimeError: where it is a folder, or not there.
    """
    if not file.is_file():
        reason = "it is a folder, name a file" if file.is_dir() else no_such_file(file)
        raise RuntimeError(f"cannot read {file}: {reason}")


def _check_apart(options: argparse.Namespace) -> None:
    """Check that no result is to be written over what is read."""
    run, module = options.run_folder, options.module[0] if options.module else None
    in_run = [] if run is None else [run / "model.safetensors", run / "run.json"]
    read = [file for file in (run, *in_run, options.model, module, options.data, options.labels)
            if file is not None]  # fmt: skip
    for name in ("rows", "json", "out"):
        file = getattr(options, name, None)
        if file is not None and realpath(file) in map(realpath, read):
            raise ValueError(f"--{name} {file} is read by this command: name another file")


def _model(options: argparse.Namespace) -> tuple[nn.Module, Path]:
    """The network, and where it is."""
    where = options.model or options.run_folder
    if options.module is None:
        return load_model(where), where
    module = build(*options.module)
    return (load_model(where, module), where) if where else (module.eval(), options.module[0])


def _in_single(model: nn.Module) -> nn.Module:
    """A float64 model, as a file gives it, in float32, where that holds its weights."""
    values = [parameter.detach() for parameter in model.parameters()]
    held = all(value.dtype == torch.float64 and float32_holds(value) for value in values)
    return model.float() if held else model


def build(file: Path, name: str) -> nn.Module:
    """Run a Python file, as ``python FILE.py`` would, for the network that it builds.

    Args:
        file: the Python file.
        name: what it calls the network, or what returns one.

    Returns:
        The network.

    Raises:
        RuntimeError: where the code fails, or has no such network.
    """
    if not file.is_file():
        raise RuntimeError(f"cannot run {file}: {no_such_file(file)}")
    spec = spec_from_file_location("crcbook_own_module", file)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot run {file} as Python")
    program = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))  # a program imports what lies beside it
    try:
        spec.loader.exec_module(program)
        made = getattr(program, name, None)
        if callable(made) and not isinstance(made, nn.Module):
            made = made()
    except (Exception, SystemExit) as error:  # whatever someone's code raises
        raise RuntimeError(f"{file}: {type(error).__name__}: {error}{_advice(error)}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(made, nn.Module):
        kind = "is not there" if made is None else f"gives {type(made).__name__}"
        raise RuntimeError(
            f"{name} in {file} {kind}: --module FILE.py:NAME names a torch.nn.Module, or what "
            "returns one"
        )
    return made


def _advice(error: BaseException) -> str:
    """What to do where code fails for how it is run here."""
    if "relative import" in str(error):
        return ": name a file beside the package that imports the network from it"
    if isinstance(error, TypeError) and "required positional argument" in str(error):
        return ": name a function without arguments that returns the network"
    return ""


def _fitting(x: Tensor, model: nn.Module, source: str) -> Tensor:
    """Items of as many values as the network takes; one without a batch becomes a batch."""
    try:
        inputs = read_network(model).inputs
    except ValueError:  # only items tell the shape, or it cannot be read at all
        return x
    if x.dim() and len(x) != 1 and x.numel() == inputs:
        x = x[None]
    values = x[0].numel() if x.dim() > 1 else 1
    if values != inputs:
        raise ValueError(
            f"{source} has {values} values an item, of shape {tuple(x.shape[1:])}, and the network "
            f"takes {inputs}: give items as it was trained on"
        )
    return x


def arrays_of(options: argparse.Namespace, dataset: str | None) -> tuple[Tensor, Tensor | None]:
    """The items and labels that the words name.

    Args:
        options: what was typed.
        dataset: whose test images are meant where no file is named.

    Returns:
        Items, and the labels or None.

    Raises:
        RuntimeError: for a file that cannot be read.
        TypeError: for arrays of the wrong kind.
        ValueError: for a file without items, or labels in two files.
    """
    if options.data is not None:
        return read_arrays(options.data, options.labels)
    test = load(str(dataset)).test
    return test.x, test.y


def read_arrays(data: Path, labels: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """Read items and labels from files of numpy, which are never unpickled.

    Args:
        data: an ``.npz`` with ``x`` and perhaps ``y``, or an ``.npy`` with ``x`` alone.
        labels: an ``.npy`` with the labels, or an ``.npz`` with ``y``; None for those of the
            ``.npz`` with the items.

    Returns:
        Floating-point items, and the labels or None.

    Raises:
        RuntimeError: for a file that cannot be read.
        TypeError: for items that are no floats.
        ValueError: for a file without ``x`` or with no items, and for labels in two files.
    """
    arrays = _read_numpy(data, "x")
    if "x" not in arrays:
        held = ", ".join(arrays) or "nothing"
        raise ValueError(f"{data} has no array x, it holds {held}: {_ADVICE}")
    if labels is not None:
        if "y" in arrays:
            raise ValueError(f"{data} has labels y already: leave --labels out")
        arrays |= {"y": np.array(None)} | _read_numpy(labels, "y")
    x, y = arrays["x"], arrays.get("y")
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise TypeError(
            f"x in {data} must hold floating-point numbers as the network takes them, such as "
            f"(x / 255).astype('float32'); got {x.dtype}"
        )
    if x.size == 0:
        raise ValueError(f"x in {data} has no items; its shape is {x.shape}")
    if y is not None and y.dtype.kind not in "iufb":
        raise TypeError(f"labels must be whole numbers; those of {labels or data} are {y.dtype}")
    return _tensor(x), None if y is None else _tensor(y)


def _read_numpy(file: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``, or the one of an ``.npy`` under a given name."""
    check_is_file(file)
    try:
        read = np.load(file, allow_pickle=False)
        if isinstance(read, np.ndarray):
            return {name: read}
        with read:
            held = {name: read[name] for name in read.files}
            return {name: one for name, one in held.items() if isinstance(one, np.ndarray)}
    except Exception as error:  # those of zip files, of compression, of headers and of pickles
        # What is no array at all numpy takes for a pickle, and says how to run it.
        reason = "it holds something else than arrays" if "pickle" in str(error) else error
        raise RuntimeError(
            f"cannot read {file} as numpy's .npz or .npy without pickles ({reason}): {_ADVICE}"
        ) from error


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind in "iu":
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def _model_hash(where: Path, network: Network) -> str:
    """Of the file, and of the network that was read: a file can refer to others, and to code."""
    file = where / "model.safetensors" if where.is_dir() else where
    return hashlib.sha256(f"{network.key} ".encode() + file.read_bytes()).hexdigest()


def _hash(tensors: list[Tensor]) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + array.tobytes())
    return state.hexdigest()
