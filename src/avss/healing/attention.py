"""Attention as CPUs compute it best: the same in less time.

Shape letters: B batch, H query head, K key head, T query token, S key token, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MAX_SCORES = 1024 * 1024
"""Scores of one head up to which attention is computed as products: they are kept for the backward pass."""
_CHUNK = 256
"""Queries whose scores lie side by side: what is later than all of them is not computed."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, without dropout, as products of matrices.

    PyTorch's own kernel for CPUs does not multiply in bfloat16 units; matrix products do. Softmax is in float32.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, K, S, D]`, where K divides H.
        value: `[B, K, S, D]`, the last dimension of any size.
        attn_mask: True where a key is seen, or numbers added to the scores; broadcast to `[B, H, T, S]`.
        dropout_p: 0.
        is_causal: Whether query t sees the keys up to t.
        scale: Of the scores; None for one over the root of D.
        enable_gqa: Without effect: whether keys are shared is told by their number.
    """
    assert dropout_p == 0
    num_batch, num_heads, num_queries, width = query.shape
    num_groups, num_keys = key.shape[1:3]
    shared = num_heads // num_groups
    factor = width**-0.5 if scale is None else scale
    step = _CHUNK if is_causal else num_queries
    outputs = []
    for start in range(0, num_queries, step):
        count = min(step, num_queries - start)
        stop = min(start + count, num_keys) if is_causal else num_keys
        rows_BKMD = query[:, :, start : start + count].reshape(num_batch, num_groups, shared * count, width)
        scores_BKMS = rows_BKMD @ key[:, :, :stop].transpose(-1, -2)
        scores_BHTS = scores_BKMS.view(num_batch, num_heads, count, stop).float() * factor
        if is_causal:
            later_TS = torch.ones(count, stop, dtype=torch.bool, device=query.device).triu(start + 1)
            scores_BHTS = scores_BHTS.masked_fill(later_TS, float("-inf"))
        elif attn_mask is not None:
            scores_BHTS = (
                scores_BHTS.masked_fill(~attn_mask, torch.finfo(torch.float32).min)
                if attn_mask.dtype == torch.bool
                else scores_BHTS + attn_mask.float()
            )
        shares_BKMS = scores_BHTS.softmax(-1).to(value.dtype).reshape(num_batch, num_groups, shared * count, stop)
        outputs.append((shares_BKMS @ value[:, :, :stop]).view(num_batch, num_heads, count, -1))
    return torch.cat(outputs, 2)


class ProductAttention(TorchFunctionMode):
    """While it is entered, attention on a CPU is computed by `attention`.

    Whatever architecture asks for it: those that call PyTorch's attention. Long sequences keep PyTorch's kernel, which
    holds no scores.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls what was asked for, or `attention` in its place."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and _suits(*args, **kwargs):
            return attention(*args, **kwargs)
        return func(*args, **kwargs)


def _suits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> bool:
    if query.device.type != "cpu" or dropout_p or query.dim() != 4:
        return False
    if is_causal and (attn_mask is not None or query.shape[2] != key.shape[2]):
        return False
    return query.shape[1] % key.shape[1] == 0 and query.shape[2] * key.shape[2] <= MAX_SCORES
