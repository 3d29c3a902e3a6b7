"""How far a smaller model's answers are from the dense model's: what every repair is judged by."""

import inspect
from typing import Any, Literal

import torch
from torch import Tensor

from avss.data.batches import Batches
from avss.models.load import Loaded

Kind = Literal["kl", "cosine"]
"""KL divergence of predictions in nats (models with a head), or cosine distance of hidden states (bare encoders)."""


def kind_of(loaded: Loaded) -> Kind:
    """What is compared for this head."""
    return "cosine" if loaded.head in ("encoder", "other") else "kl"


def divergence(
    dense: Loaded, smaller: Loaded, token_ids: Tensor, keep: Tensor, *, places: Tensor | None = None
) -> tuple[Tensor, int]:
    r"""The divergence of one batch, summed, and the number of places it is summed over. Gradients flow to `smaller`.

    - With logits: $\sum_t \sum_v p_t(v) \ln \frac{p_t(v)}{q_t(v)}$, $p$ the dense model's prediction.
    - Bare encoders: $\sum_t 1 - \cos(h_t, h'_t)$ of the last hidden states.

    Args:
        dense: Its predictions are the truth.
        smaller: The model that is judged.
        token_ids: `[B, T]`.
        keep: `[B, T]`; padding is no place.
        places: Positions `[P]` to compare at, to spare the head the rest; all of them by default.
    """
    with torch.no_grad():
        truth, _ = _outputs(dense, token_ids, keep, places)
    found, at = _outputs(smaller, token_ids, keep, places)
    if found.dim() == 3:
        here = keep.to(found.device) if at is None else keep[:, at].to(found.device)
        truth, found = truth[here], found[here]
    if kind_of(dense) == "cosine":
        values = 1 - torch.nn.functional.cosine_similarity(truth.float(), found.float(), dim=-1)
        return values.sum(), len(values)
    total = found.new_zeros((), dtype=torch.float32)
    # In pieces: a vocabulary's width of float32 for every token would be the largest tensor of the whole run.
    for some_truth, some_found in zip(truth.split(_PIECE), found.split(_PIECE), strict=True):
        log_p, log_q = some_truth.float().log_softmax(-1), some_found.float().log_softmax(-1)
        total = total + torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total, len(found)


_PIECE = 512


@torch.no_grad()
def mean_divergence(dense: Loaded, smaller: Loaded, batches: Batches) -> float:
    """The mean divergence a place over some text."""
    total, places = 0.0, 0
    for token_ids, keep in batches:
        found, count = divergence(dense, smaller, token_ids, keep)
        total, places = total + float(found), places + count
    return total / places if places else float("nan")


def _outputs(loaded: Loaded, token_ids: Tensor, keep: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits or last hidden states, and the positions they stand for (None for all)."""
    inputs: dict[str, Any] = {"input_ids": token_ids.to(loaded.device)}
    if not bool(keep.all()):
        inputs["attention_mask"] = keep.to(loaded.device, torch.long)
    if loaded.head == "causal":
        inputs["use_cache"] = False
    if kind_of(loaded) == "cosine":
        hidden = loaded.model.base_model(**inputs)[0]
        return (hidden, None) if places is None else (hidden[:, places.to(hidden.device)], places)
    if places is not None and "logits_to_keep" in inspect.signature(loaded.model.forward).parameters:
        return loaded.model(**inputs, logits_to_keep=places.to(loaded.device))["logits"], places
    logits = loaded.model(**inputs)["logits"]
    if places is None or logits.dim() < 3:
        return logits, None
    return logits[:, places.to(logits.device)], places
