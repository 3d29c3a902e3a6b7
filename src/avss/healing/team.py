"""The processes that heal together, one a device: launched by `torchrun` or `accelerate launch`, or a single one."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import accelerate
import torch
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, reduce
from torch import Tensor

_Item = TypeVar("_Item")


class Team:
    """What the processes tell each other. Alone, every method gives back what it was given.

    Attributes:
        size: Number of processes.
        rank: Number of this one, from 0 on.
        device: The accelerator that is this process's own, where there is one.
    """

    def __init__(self) -> None:
        wants_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        state = accelerate.PartialState(cpu=wants_cpu)
        self.size, self.rank, self.device = state.num_processes, state.process_index, state.device

    @property
    def leads(self) -> bool:
        """Whether this process writes and decides."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """This process's part of the items."""
        return items[self.rank :: self.size]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its sum over the processes."""
        if self.size == 1:
            return
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = _tensor(reduce(gradient, reduction="sum"))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        if self.size == 1:
            return list(values)
        everyone: list[list[float]] = gather_object([list(values)])
        return [sum(column) for column in zip(*everyone, strict=True)]

    def agree(self, value: float) -> float:
        """The leading process's value."""
        if self.size == 1:
            return value
        box = [value]
        broadcast_object_list(box)
        return box[0]


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value
