"""Models and training states as safetensors files: data, never code.

Every file is written beside its place and moved there in one step, so that what is found under a
name is whole.
"""

import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from crcbook.activations import ACTIVATIONS
from crcbook.networks import Network, architecture, mlp, read_network
from crcbook.networks.modules import module_of, row_facts
from crcbook.networks.onnx_files import load_onnx

_STATE = (
    "a state dict does not say what its tensors belong to: give the module as well, "
    "load_model(path, module), or --module FILE.py:NAME on the command line"
)
_PROGRAM = (
    "torch unpickles parts of a saved program, which can run code: if you trust it, load it with "
    "torch.export.load and write what is to be certified with crcbook.save_model"
)
_COUNT = "n_averaged"  # beside the weights in an averaged model's state
_OTHERS = dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _STATE) | {".pt2": _PROGRAM}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Args:
        path: where to; its folder is created.
        content: the bytes.

    Raises:
        RuntimeError: where the folder or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RuntimeError(f"cannot write {path}: {error}") from error


def write_json(path: Path, facts: dict) -> None:
    """Write facts as a JSON file.

    Args:
        path: where to; its folder is created.
        facts: anything JSON can hold.

    Raises:
        RuntimeError: where the folder or the file cannot be written.
    """
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read what :func:`write_json` wrote.

    Args:
        path: the file.

    Returns:
        The facts.

    Raises:
        RuntimeError: where the file cannot be read or holds no JSON object.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise RuntimeError(f"cannot read {path}: {error}") from error


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write named tensors and a few JSON facts about them.

    Args:
        path: where to.
        tensors: the tensors.
        facts: anything JSON can hold.
    """
    # Tied weights are written twice: a file of tensors holds none that share their memory.
    whole = {name: torch.clone(tensor.detach().cpu(), memory_format=torch.contiguous_format)
             for name, tensor in tensors.items()}  # fmt: skip
    write_atomically(path, save(whole, metadata={"crcbook": json.dumps(facts)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read what :func:`save_tensors` wrote.

    Args:
        path: the file.

    Returns:
        The tensors and the facts.

    Raises:
        RuntimeError: where the file is missing or is not one of crcbook's.
    """
    if not path.exists():
        raise RuntimeError(f"cannot read {path}: {no_such_file(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            # Copied to where torch would put them: sums depend on it, in a resumed training too.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            facts = (file.metadata() or {}).get("crcbook")
            if facts is None:
                raise RuntimeError(f"{path} is none of crcbook's: {_STATE}")
            return tensors, json.loads(facts)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"cannot read {path} as a crcbook file ({error}): is it whole, and of save_model?"
        ) from error


def no_such_file(path: Path) -> str:
    """What to say of a file that is not there: what lies where it should be.

    Args:
        path: the file.

    Returns:
        A clause for a message.
    """
    folder = path.parent
    if not folder.is_dir():
        return f"there is no such file, and no folder {folder}: name another"
    alike = sorted(one.name for one in folder.glob(f"*{path.suffix}") if one.is_file())
    kind = f"{path.suffix} files" if path.suffix else "files"
    place = "here" if folder == Path() else f"in {folder}"
    return f"there is no such file; the {kind} {place}: {_some(alike)}"


def _state_dict(path: Path) -> dict[str, Any]:
    """The tensors of a state dict, or of the only one that a checkpoint holds."""
    if not path.exists():
        raise RuntimeError(no_such_file(path))
    state: Any
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(f"it is no safetensors file: {error}") from error
    else:
        advice = "write it with torch.save(model.state_dict(), path)"
        if reason := _no_state_dict(path):
            raise RuntimeError(f"{reason}: {advice}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # those of zip files, of pickles and of what torch refuses
            raise RuntimeError(
                "it holds more than tensors, such as a whole model, which is never unpickled, or "
                f"is damaged: {advice}"
            ) from error
    if not isinstance(state, dict):
        raise RuntimeError(f"it holds a {type(state).__name__}, not a state dict")
    inner = [name for name, held in state.items() if _is_state_dict(held)]
    if len(inner) > 1:
        raise RuntimeError(
            f"it holds several state dicts, {', '.join(map(str, inner))}: write the one that is "
            f"meant with torch.save(checkpoint[{inner[0]!r}], path)"
        )
    return state[inner[0]] if inner else state


def _no_state_dict(path: Path) -> str:
    """What keeps a file from being read as tensors; nothing where it may well be."""
    if path.stat().st_size == 0:
        return "it is empty"
    if not is_zipfile(path):
        return ""
    with ZipFile(path) as file:
        code = any("/code/" in name for name in file.namelist())
    return "it holds a program of torch.jit, not a state dict" if code else ""


def _is_state_dict(held: Any) -> bool:
    """Whether something beside others in a checkpoint is one; an optimizer's holds other dicts."""
    return isinstance(held, dict) and held != {} and all(map(torch.is_tensor, held.values()))


def _named(state: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A state dict under a module's own names, where wrappers put one prefix before all of them."""
    state = {name: held for name, held in state.items() if name != _COUNT or name in names}
    first = next(iter(names), "")
    for name in state:
        prefix = str(name).removesuffix(first)
        if set(state) == {prefix + own for own in names}:
            return {own: state[prefix + own] for own in names}
    return state


def _check_names(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse tensors of other names or shapes than a module's."""
    lacking = [name for name in own if name not in state]
    foreign = [name for name in state if name not in own]
    if lacking or foreign:
        raise RuntimeError(
            f"the module has {_some(lacking)} that the file lacks, and the file {_some(foreign)} "
            "that the module lacks: give the module that was trained, or none to what save_model "
            "wrote"
        )
    for name, tensor in own.items():
        if torch.is_tensor(tensor) and torch.is_tensor(state[name]):
            found, wanted = tuple(state[name].shape), tuple(tensor.shape)
            if found != wanted:
                raise RuntimeError(
                    f"{name} is of shape {found} in the file and {wanted} in the module: give the "
                    "module the sizes that were trained"
                )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(map(str, names[:3])) or "none") + more


def save_model(path: Path | str, model: nn.Module, at: Tensor | None = None) -> None:
    """Write a network with what is needed to build it again.

    An :func:`crcbook.mlp` comes back as it was. Any other network comes back as the dense layers
    that it is read as, in float64.

    Args:
        path: where to, ``.safetensors`` by custom.
        model: the network.
        at: inputs, as in :func:`crcbook.networks.read_network`.

    Raises:
        TypeError: for the arguments in another order.
        ValueError: for a network that cannot be read, or a file that is named as one of another
            kind.
        RuntimeError: where the file cannot be written.
    """
    if isinstance(path, nn.Module):
        raise TypeError("save_model takes the path first, and then the model")
    suffix = Path(path).suffix.lower()
    if suffix == ".onnx" or suffix in _OTHERS:
        raise ValueError(f"save_model writes safetensors, which {suffix} files are not: rename it")
    try:
        facts, tensors = architecture(model), model.state_dict()
    except ValueError:
        tensors, facts = _dense(read_network(model, at))
    save_tensors(Path(path), tensors, facts)


def default_activation(network: Network) -> str | None:
    """The one activation between all layers, if the table has it in that setting.

    Args:
        network: the network.

    Returns:
        Its name; None without a hidden layer, for several, or in another setting.
    """
    rows = {(row.name, row.settings) for row in (layer.activation for layer in network.layers[:-1])}
    known = rows <= {(row.name, row.settings) for row in ACTIVATIONS.values()}
    return next(iter(rows))[0] if len(rows) == 1 and known else None


def _dense(network: Network) -> tuple[dict[str, Tensor], dict]:
    """The layers of a network, and what stands between them."""
    rows = [layer.activation for layer in network.layers]
    facts: dict = {"activations": [row_facts(row) for row in rows]}
    if name := default_activation(network):
        facts["activation"] = name  # by which whoever checks a proof reads the file
    tensors = {}
    for place, layer in enumerate(network.layers):
        tensors[f"{place}.weight"], tensors[f"{place}.bias"] = layer.weight, layer.bias
    return tensors, facts


def _from_dense(tensors: dict[str, Tensor], facts: dict) -> nn.Sequential:
    modules: list[nn.Module] = [nn.Flatten()]
    for place, (name, settings) in enumerate(facts["activations"]):
        weight, bias = tensors[f"{place}.weight"], tensors[f"{place}.bias"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        linear.load_state_dict({"weight": weight, "bias": bias})
        modules += [linear, module_of(name, settings)]
    return nn.Sequential(*modules[:-1])


def load_model(path: Path | str, module: nn.Module | None = None) -> nn.Module:
    """Read a network that :func:`save_model` wrote, an ONNX file, or a state dict for a module.

    No file is unpickled: none can run code.

    Args:
        path: the file, or the folder of a training, which holds it as ``model.safetensors``. An
            ONNX file ends in ``.onnx``.
        module: what the tensors of a state dict belong to; the file is then one of safetensors, or
            one of ``torch.save``.

    Returns:
        The network, on the CPU; the module, in evaluation mode, where it was given.

    Raises:
        ImportError: for an ONNX file without the ``onnx`` package.
        TypeError: where the module is none.
        RuntimeError: where the file is missing, damaged, none of crcbook's, or not the module's.
        ValueError: for an ONNX file with a network that cannot be certified.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx" and path.exists():
        if module is not None:
            raise ValueError(f"{path} holds a network of its own: load it without a module")
        return load_onnx(path)
    if module is not None:
        if not isinstance(module, nn.Module):
            made = f", as {module.__name__}() makes one" if isinstance(module, type) else ""
            raise TypeError(f"module must be a torch.nn.Module{made}; got {module!r}")
        try:
            state = _named(_state_dict(path), module.state_dict().keys())
            _check_names(state, module.state_dict())
            module.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise RuntimeError(f"cannot load {path} into the module: {error}") from error
        return module.eval()
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix in _OTHERS and path.exists():
        raise RuntimeError(f"cannot read {path}: {_OTHERS[path.suffix]}")
    tensors, facts = load_tensors(path)
    try:
        if "activations" in facts:
            return _from_dense(tensors, facts)
        model = mlp(facts["sizes"], facts["activation"])
        model.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        raise RuntimeError(f"{path} holds no crcbook model: {error}") from error
    return model
