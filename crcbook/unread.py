"""Differentiable functions that no network can be read from, as an attack sees them."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from crcbook.networks import logit_margin, unchanged_buffers

_TOGETHER = 256  # items evaluated at once


@dataclass(frozen=True)
class Unread:
    """A function, with what an attack asks of a :class:`crcbook.networks.Network`.

    Attributes:
        function: of ``(batch, *shape)``, its values ``(batch, classes)`` logits.
        shape: of an item.
        dtype: the precision that it is evaluated in.
        device: where.
        classes: how many there are.
    """

    function: Callable[[Tensor], Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    classes: int

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], x: Tensor) -> "Unread":
        """Try a function on inputs.

        Args:
            function: the function.
            x: ``(batch, *shape)``.

        Returns:
            It, with the number of its classes.

        Raises:
            ValueError: where it fails, gives no logits or no gradient, or gives an item something
                else the second time or in other company.
        """
        if x.dim() < 2:
            raise ValueError(f"x must be (batch, *input_shape); got {tuple(x.shape)}")
        like = x
        if isinstance(function, nn.Module):
            tensors = chain(function.parameters(), function.buffers())
            like = next((tensor for tensor in tensors if tensor.is_floating_point()), x)
        opened = cls(function, x.shape[1:], like.dtype, like.device, 0)
        few = x[:_TOGETHER].flatten(1).to(opened.device, torch.float64)
        guard = unchanged_buffers(function) if isinstance(function, nn.Module) else nullcontext()
        with guard:
            logits = opened.logits(few)
            opened = cls(function, x.shape[1:], like.dtype, like.device, logits.shape[1])
            again = torch.cat([opened.logits(few[:1]), opened.logits(few)[1:]])
            first, second = logits.topk(2, dim=1).indices.unbind(1)
            _, gradient = opened.margin_and_gradient(few, first, second)
        if not logits.isfinite().all():
            raise ValueError("the model gives NaN or infinity at some of the inputs")
        size = logits.abs().amax(1, keepdim=True) + 1
        if ((logits - again).abs() > torch.finfo(like.dtype).eps ** 0.5 * size).any():
            raise ValueError(
                "the model gives the same item different logits, at random or because of the items "
                "beside it: call model.eval()"
            )
        if not gradient.any():
            raise ValueError(
                f"the gradient of the model's margins is 0 at all {len(few)} inputs tried, and an "
                "attack has nothing to follow: where probabilities are rounded to 0 and 1, give a "
                "function of the logits, and one that does not round"
            )
        _check_logit(opened, few)
        return opened

    @property
    def inputs(self) -> int:
        """The number of input coordinates."""
        return self.shape.numel()

    @property
    def rough(self) -> "Unread":
        """The same: it has one precision."""
        return self

    def logits(self, x: Tensor) -> Tensor:
        """The logits.

        Args:
            x: ``(batch, n)``.

        Returns:
            ``(batch, classes)`` in the precision of ``x``.
        """
        with torch.no_grad():
            return torch.cat([self._evaluate(part) for part in x.split(_TOGETHER)]).to(x.dtype)

    def margin_and_gradient(
        self, x: Tensor, label: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The margin of ``label`` over ``target`` and its gradient.

        Args:
            x: ``(pairs, n)``.
            label: ``(pairs,)`` classes.
            target: ``(pairs,)`` classes.

        Returns:
            ``(pairs,)`` and ``(pairs, n)``, in the precision of ``x``.
        """
        margins, gradients = [], []
        whole = zip(
            x.split(_TOGETHER), label.split(_TOGETHER), target.split(_TOGETHER), strict=True
        )
        with torch.inference_mode(False), torch.enable_grad():
            for part, own, other in whole:
                point = part.detach().clone().requires_grad_()
                logits = self._evaluate(point)
                pair = torch.stack([own, other], dim=1)  # none made in inference mode
                margin = logits.gather(1, pair) @ logits.new_tensor([1.0, -1.0])
                gradient = None
                if margin.requires_grad:  # it may be for the weights' sake alone
                    (gradient,) = torch.autograd.grad(margin.sum(), point, allow_unused=True)
                if gradient is None:
                    raise ValueError(
                        "the model's logits do not depend on its input in a way that torch can "
                        "differentiate: it must not detach, round or leave torch"
                    )
                margins.append(margin.detach().to(x.dtype))
                gradients.append(gradient)
        return torch.cat(margins), torch.cat(gradients).nan_to_num(0.0, 0.0, 0.0)

    def _evaluate(self, x: Tensor) -> Tensor:
        """The logits of ``(batch, n)``, two where there is one."""
        shaped = x.to(self.device, self.dtype).reshape(-1, *self.shape)
        try:
            # A function that works in place must not work on what is differentiated.
            logits = self.function(shaped.clone())
        except Exception as error:  # whatever a function of someone else raises
            raise ValueError(
                f"the model fails on {self.dtype} inputs of shape {tuple(shaped.shape)}: {error}"
            ) from error
        if not isinstance(logits, Tensor):
            raise ValueError(f"the model must give a tensor of logits; got {type(logits).__name__}")
        if logits.shape == (len(x),):
            logits = logits[:, None]
        if logits.dim() != 2 or len(logits) != len(x) or not logits.is_floating_point():
            raise ValueError(
                f"the model must give ({len(x)}, classes) logits for {len(x)} inputs; got "
                f"{tuple(logits.shape)} of {logits.dtype}"
            )
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits


def _check_logit(model: Unread, few: Tensor) -> None:
    """Refuse one output that looks like a probability, which is cut at 1/2 and not at 0."""
    if model.classes != 2:
        return
    spread = torch.randn(few.shape, generator=torch.Generator().manual_seed(0)).to(few)
    whole = torch.cat([few, few + 10 * spread * few.norm(dim=1, keepdim=True), 100 * spread])
    first, second = model.logits(whole).unbind(1)
    if (first == 0).all() and ((second >= 0) & (second <= 1)).all():
        raise ValueError(
            "the model's one output stays between 0 and 1, as a probability does: give a "
            "function of the logit, without the sigmoid, whose classes are told apart at 0"
        )


@dataclass(frozen=True)
class SegmentMargins:
    """Margins on segments, as a function of the fraction of the way.

    Attributes:
        function: what gives the logits.
        begin: ``(pairs, n)`` where the segments begin.
        way: ``(pairs, n)`` to their ends.
        label: ``(pairs,)`` classes.
        target: ``(pairs,)`` classes.
    """

    function: Unread
    begin: Tensor
    way: Tensor
    label: Tensor
    target: Tensor

    def __call__(self, fraction: Tensor) -> Tensor:
        """The margins.

        Args:
            fraction: ``(pairs,)`` fractions of the way.

        Returns:
            ``(pairs,)``.
        """
        logits = self.function.logits(self.begin + fraction[:, None] * self.way)
        return logit_margin(logits, self.label, self.target)

    def take(self, index: Tensor) -> "SegmentMargins":
        """Some of the segments.

        Args:
            index: positions.

        Returns:
            Their margins.
        """
        columns = self.begin, self.way, self.label, self.target
        return SegmentMargins(self.function, *(column[index] for column in columns))
