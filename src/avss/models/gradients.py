"""Backward passes whose gradients are reduced to numbers one matrix at a time, and then freed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avss.errors import UnsupportedArchitectureError
from avss.models.load import Loaded

OnGradient = Callable[[int, str, Tensor, Tensor], None]
"""Called with (block index, path of the matrix inside the block, the matrix, its gradient)."""


@contextlib.contextmanager
def watched_gradients(
    loaded: Loaded, matrices: Sequence[Mapping[str, nn.Parameter]], on_gradient: OnGradient
) -> Iterator[None]:
    """Hands each gradient over as soon as it is complete, then frees it, while the context is open.

    Only the given matrices ask for a gradient, so that the most that is held is one of them, not a copy of the model.
    A matrix that takes no part in the loss is not reported. Afterwards the model is as it was, `requires_grad` and
    `.grad` of every parameter included, even when the forward raises.

    Raises:
        UnsupportedArchitectureError: A matrix is quantised and has no gradient.
    """
    for block in matrices:
        for path, weight in block.items():
            if not weight.is_floating_point():
                raise UnsupportedArchitectureError(
                    f"`{path}` is stored as {weight.dtype}, which has no gradient. Load the model in a float dtype, or "
                    "use criteria without gradients."
                )
    before = [(weight, weight.requires_grad, weight.grad) for weight in loaded.model.parameters()]
    handles: list[Any] = []

    def watch(index: int, path: str, weight: nn.Parameter) -> None:
        def ready(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            with torch.no_grad():
                on_gradient(index, path, parameter.detach(), gradient)

        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(ready))

    try:
        for weight, _, _ in before:
            weight.grad = None
            weight.requires_grad_(False)
        for index, block in enumerate(matrices):
            for path, weight in block.items():
                watch(index, path, weight)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, asked, gradient in before:
            weight.requires_grad_(asked)
            weight.grad = gradient
