"""Takes hidden states through the blocks of a model one at a time, as the model's own forward would."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache

from avss.models.forward import run_body
from avss.models.load import Loaded
from avss.models.stack import hidden_from_call, hidden_from_output

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a block."""


@dataclasses.dataclass
class Walk:
    """One batch on its way through the blocks of one model.

    Attributes:
        hidden: The state that enters the next block, `[B, T, D]`.
        keep: `[B, T]`.
        calls: What each block was called with in a plain forward pass (masks, positions), hidden states aside.
    """

    hidden: Tensor
    keep: Tensor
    calls: list[Call]

    @classmethod
    def begin(cls, loaded: Loaded, first: int, inputs: Tensor | Mapping[str, Tensor], keep: Tensor) -> Self:
        """Stands before block `first` of a model's own stack."""
        calls: list[Call] = []
        states: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(calls) == first:
                states.append(hidden_from_call(args, kwargs))
            others = {name: _without_cache(value) for name, value in kwargs.items() if name != "hidden_states"}
            calls.append((tuple(map(_without_cache, args[1:])), others))

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in loaded.stack.blocks]
        try:
            run_body(loaded, inputs, keep)
        finally:
            for handle in handles:
                handle.remove()
        return cls(hidden=states[0], keep=keep, calls=calls)

    @torch.inference_mode()
    def through(self, loaded: Loaded, place: int) -> Tensor:
        """What a block returns for the current state; the walk stays where it is."""
        args, kwargs = self.calls[place]
        return hidden_from_output(loaded.stack.blocks[place](self.hidden, *args, **kwargs))


def _without_cache(value: Any) -> Any:
    """A cache would remember the forward pass that the arguments come from."""
    return None if isinstance(value, Cache) else value
