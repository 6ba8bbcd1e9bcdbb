"""Recording what a model computes: its forward pass, run on a tensor that notes every operation.

The tensor has a shape and no numbers. What is known to be affine or an activation is noted with
its arguments; what asks for numbers, or is not known, is refused. So it does not matter how a
model is written: as a Sequential, as a module with a ``forward`` of its own, with parametrized,
nested, shared or hooked layers. Python code that looks at shapes runs as it always does; code that
looks at values cannot.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crcbook.activations import Activation
from crcbook.networks.affine import Affine
from crcbook.networks.operations import (
    Head,
    Piece,
    Step,
    Unreadable,
    gives_statistics,
    join,
    makes_constant,
    may_be_view,
    multiplies,
    name_of,
    reader_of,
    refusal,
    takes_apart,
    works_in_place,
)
from crcbook.networks.written_out import written_out

_BATCH, _OTHER_BATCH = 3, 5  # items that the recorded tensor holds, and a number to compare with


class Recorded(Tensor):
    """A tensor of a shape without numbers, with the steps that lead to it.

    Attributes:
        steps: what was done to the input, in order.
        start: the shape of an item of the input.
        memory: what it shares with the tensors that are views of the same numbers.
        version: how often those numbers had been written when it was made.
        refused: the errors of what could not be noted, of all tensors of a recording; a model may
            catch them, and goes another way then than it does with numbers.
    """

    steps: tuple[Step, ...]
    start: tuple[int, ...]
    memory: "_Memory"
    version: int
    refused: list[Exception]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device,
        steps: tuple = (),
        start: Sequence[int] | None = None,
        refused: list[Exception] | None = None,
        memory: "_Memory | None" = None,
    ):
        """A tensor that other code takes for an ordinary one."""
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made.steps = steps
        made.start = tuple(shape[1:] if start is None else start)
        made.memory = _Memory() if memory is None else memory
        made.version = made.memory.version
        made.refused = [] if refused is None else refused
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Note an operation, or answer what is asked about the shape."""
        with torch._C.DisableTorchFunctionSubclass():  # what is asked below is no operation
            try:
                return cls._note(func, args, kwargs or {})
            except Exception as error:
                inputs = list(_recorded((args, (kwargs or {}).values())))
                # What a piece of no activation came to is not what is wrong.
                reason = next(_unfinished(inputs), None)
                for x in inputs:
                    x.refused.append(reason or error)
                if reason is not None:
                    raise reason from error
                raise

    @classmethod
    def _note(cls, func: Callable, args: tuple, kwargs: dict) -> Any:
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        if kwargs.get("out") is not None:
            raise Unreadable(f"{name_of(func)} writes into another tensor: leave out= away")
        reader = reader_of(func)
        inputs = list(_recorded((args, kwargs.values())))
        for x in inputs:
            if x.version != x.memory.version:
                raise Unreadable(
                    f"{name_of(func)} takes what was written into through another view of it: "
                    "write into a clone(), or add without writing"
                )
        if len(inputs) == 1 and makes_constant(func, bool(args) and args[0] is inputs[0]):
            # Of one item, which goes with any number of them.
            shape = (1, *inputs[0].shape[1:])
            like = torch.empty(shape, dtype=inputs[0].dtype, device=inputs[0].device)
            args = tuple(like if one is inputs[0] else one for one in args)
            return func(*args, **{k: like if v is inputs[0] else v for k, v in kwargs.items()})
        if len(inputs) > 1:
            result = _joined(func, inputs, args, kwargs)
            if works_in_place(func, args, kwargs):
                inputs[0]._write(result.steps)
                return inputs[0]
            return result
        if reader is None:
            return _about_shape(func, args, kwargs)
        steps = reader(func, inputs[0], args, kwargs)
        memory = inputs[0].memory if may_be_view(func) else None
        if gives_statistics(func):
            return _extended(inputs[0], *steps), None, None
        if takes_apart(func):
            return tuple(_extended(inputs[0], step, memory=memory) for step in steps)
        result = _extended(inputs[0], *steps, memory=memory)
        if works_in_place(func, args, kwargs):
            if args[0] is not inputs[0]:
                raise Unreadable(f"{name_of(func)} writes the input into a constant")
            inputs[0]._write(result.steps)
            return inputs[0]
        return result

    def _write(self, steps: tuple[Step, ...]) -> None:
        """Take over what an operation in place has made; other views of the same are stale."""
        self.memory.version += 1
        self.steps, self.version = steps, self.memory.version

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Refuse whatever would need numbers."""
        raise _NoNumbers(str(func))


class _Memory:
    """Numbers that several recorded tensors may be views of.

    Attributes:
        version: how often they were written.
    """

    version = 0


class _NoNumbers(RuntimeError):
    """An operation reached the recorded tensor's numbers, of which there are none."""


class InBatches(nn.Module):
    """A model that takes so many inputs at a time, as one that takes any number.

    Attributes:
        model: the model.
        batch: how many inputs it takes.
        input_shape: of one input.
    """

    def __init__(self, model: nn.Module, batch: int, input_shape: tuple[int, ...]) -> None:
        """Keep the model and what it takes."""
        super().__init__()
        self.model, self.batch, self.input_shape = model, batch, input_shape

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the model, a batch at a time.

        Args:
            x: ``(batch, *input_shape)``.

        Returns:
            What the model gives for each of the inputs.
        """
        if isinstance(x, Recorded):
            sizes = self.batch, *x.shape[1:]
            shared = x.steps, x.start, x.refused, x.memory
            whole = Recorded(sizes, x.dtype, x.device, *shared)
            whole.version = x.version  # of a view that was written through another, still the old
            return self.model(whole)
        missing = -len(x) % self.batch if len(x) else self.batch
        filler = x[:1] if len(x) else x.new_zeros(1, *x.shape[1:])
        whole = torch.cat([x, filler.expand(missing, *x.shape[1:])])
        return torch.cat([self.model(part) for part in whole.split(self.batch)])[: len(x)]


def record(model: nn.Module, shape: Sequence[int], like: Tensor) -> Recorded:
    """Run a model's forward pass and note what it does.

    Args:
        model: the model.
        shape: of one input.
        like: a tensor of the model's dtype and on its device.

    Returns:
        What the model gives: a tensor with its steps.

    Raises:
        Unreadable: for an operation that is not known, or joins branches.
        ValueError: where the model fails, or gives no tensor that depends on the input.
    """
    x = Recorded((_BATCH, *shape), like.dtype, like.device)
    with torch.no_grad():
        result = model(x)
    if x.refused:
        raise Unreadable(f"the model catches an error, and goes on: {x.refused[0]}")
    if not isinstance(result, Recorded):
        kind = type(result).__name__
        raise ValueError(f"the model must give one tensor of logits that depend on x; got {kind}")
    for error in _unfinished([result]):
        raise error
    return result


def _unfinished(inputs: Iterable[Recorded]) -> Iterator[Unreadable]:
    """Why tensors are refused that pieces lead to, of which no activation was made."""
    steps = (step for x in inputs for step in x.steps)
    return (Unreadable(step.reason) for step in steps if isinstance(step, Piece))


def _recorded(arguments: Iterable) -> Iterator[Recorded]:
    for argument in arguments:
        if isinstance(argument, Recorded):
            yield argument
        elif isinstance(argument, tuple | list | type({}.values())):
            yield from _recorded(argument)


def _joined(func: Callable, inputs: list[Recorded], args: tuple, kwargs: dict) -> Recorded:
    """What a function makes of several branches, from where they part."""
    same = 0
    for steps in zip(*(x.steps for x in inputs), strict=False):
        if any(step is not steps[0] for step in steps):
            break
        same += 1
    common = inputs[0].steps[:same]
    x = Recorded((len(inputs[0]), *inputs[0].start), inputs[0].dtype, inputs[0].device,
                 refused=inputs[0].refused)  # fmt: skip
    x = _extended(x, *common)
    in_order = not kwargs and len(args) == len(inputs)
    if in_order and (one := written_out(name_of(func), [y.steps[same:] for y in inputs])):
        return _extended(x, *one)
    if multiplies(func):
        raise Unreadable(
            f"{name_of(func)} multiplies what depends on the input by what depends on it (as a "
            "gate does): that is neither an affine map nor an activation"
        )
    branches: list[list[Affine | Activation]] = [[] for _ in inputs]
    for y, branch in zip(inputs, branches, strict=True):
        for step in y.steps[same:]:
            if isinstance(step, Head | Piece):
                raise Unreadable(f"{name_of(func)} follows {step.name}, which must be the last")
            branch.append(step)
    return _extended(x, *join(func, inputs, branches, tuple(x.shape[1:]), args, kwargs))


def _about_shape(func: Callable, args: tuple, kwargs: dict) -> Any:
    """What a function says of a shape; anything about numbers is refused."""
    try:
        result = func(*args, **kwargs)
    except _NoNumbers:
        raise Unreadable(refusal(func)) from None
    if isinstance(result, Tensor):
        raise Unreadable(refusal(func))
    return result


def _extended(x: Recorded, *steps: Step, memory: _Memory | None = None) -> Recorded:
    """The tensor after some more steps, in memory of its own where none is given."""
    if steps and any(isinstance(step, Head) for step in x.steps):
        raise Unreadable(f"something follows {x.steps[-1].name}: it must be the last")
    shape = tuple(x.shape[1:])
    for step in steps:
        if isinstance(step, Affine):
            shape = _checked(step, shape)
    whole = (*x.steps, *steps)
    return Recorded((len(x), *shape), x.dtype, x.device, whole, x.start, x.refused, memory)


def _checked(step: Affine, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an item after a step, which must do the same to every item, and to it alone."""
    if step.matrix is not None:
        if step.matrix.shape[1:] != shape:
            raise Unreadable(
                f"{step.matrix.shape[1]} inputs are needed; got items of shape {shape}"
            )
        return tuple(step.matrix.shape[:1])
    size = torch.Size(shape).numel()
    item = torch.arange(1, size + 1, dtype=torch.float64, device="cpu").cos().reshape(1, *shape)
    alone, bound = step.linear(item), step.magnitude(item.abs())
    for batch in (_BATCH, _OTHER_BATCH):
        marks = torch.arange(1, batch + 1, dtype=torch.float64, device="cpu")
        marks = marks.reshape(-1, *(1 for _ in shape))
        images = step.linear(marks * item)
        marks = marks.reshape(-1, *(1 for _ in alone.shape[1:]))
        if (
            images.shape != (batch, *alone.shape[1:])
            or not ((images - marks * alone).abs() <= 1e-9 * batch * bound).all()
        ):
            raise Unreadable(f"{step.name} mixes the items of a batch")
    return tuple(alone.shape[1:])
