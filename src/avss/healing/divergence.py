"""The KL divergence between two models' predictions, with logits of a bounded number of tokens in memory at a time.

Shape letters: M places, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
"""Hidden states `[1, M, D]` -> logits `[1, M, V]`."""

_VALUES_AT_ONCE = {"cpu": 2**23}
_VALUES_ON_ACCELERATOR = 2**27


class _Divergence(torch.autograd.Function):
    r"""$\sum_v p_v (\ln p_v - \ln q_v)$ a row; its gradient $q - p$ is made on the way and kept in place of the logits.

    Plain autograd would hold five arrays of the logits' size for it.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, dense_MV: Tensor) -> Tensor:
        log_q, log_p = logits_MV.log_softmax(-1), dense_MV.log_softmax(-1)
        p = log_p.exp()
        difference = log_p.sub_(log_q)
        rows = torch.linalg.vecdot(p, difference)
        if not bool(rows.isfinite().all()):
            # A token that the dense model rules out (-inf) adds nothing, whatever the other makes of it.
            rows = torch.where(p == 0, 0.0, p * difference).sum(-1)
        ctx.save_for_backward(log_q.exp_().sub_(p))
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference_MV,) = ctx.saved_tensors
        # In place: the largest tensor of a step. The graph is gone after one backward pass, so nobody reads it again.
        return difference_MV.mul_(grads[0][:, None]), None


def divergence(logits_MV: Tensor, dense_MV: Tensor, temperature: float = 1.0) -> Tensor:
    r"""KL divergence of each row from the dense model's, `[M]`, in nats, times the temperature squared.

    Both rows of logits are divided by the temperature $\tau$ first; the factor $\tau^2$ keeps the size of the gradient
    (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531). No gradient reaches `dense_MV`.
    """
    logits, dense = logits_MV.float(), dense_MV.float()
    if temperature != 1:
        logits, dense = logits / temperature, dense / temperature
    rows: Tensor = _Divergence.apply(logits, dense)  # type: ignore[assignment]
    return rows * temperature**2


def chunk_size(num_values: int, device: torch.device) -> int:
    """How many rows of `num_values` logits are held at a time."""
    return max(1, _VALUES_AT_ONCE.get(device.type, _VALUES_ON_ACCELERATOR) // num_values)
