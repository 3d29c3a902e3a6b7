"""How far a smaller model's answers are from the dense model's: what every repair is judged by."""

import contextlib
import dataclasses
import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avss.data.batches import Batches
from avss.models.forward import model_inputs
from avss.models.load import Loaded
from avss.models.shell import HeadShell, KnownBlock, with_blocks

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
    return _distance(dense, truth, found, keep if at is None else keep[:, at])


def _distance(dense: Loaded, truth: Tensor, found: Tensor, keep: Tensor) -> tuple[Tensor, int]:
    if found.dim() == 3:
        here = keep.to(found.device)
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


class Yardstick:
    """The mean divergence a place of many states of one cut on one text, with the dense model run once.

    Held for every token are the dense model's last hidden state, of which its head makes the predictions again each
    time, and the state before the first block that may differ: the blocks before that one answer from memory.

    Args:
        dense: Its predictions are the truth.
        batches: The text.
        num_shared: Leading blocks that are the dense model's in every model that is measured.
    """

    def __init__(self, dense: Loaded, batches: Batches, num_shared: int) -> None:
        self._dense, self._batches, self._num_shared = dense, batches, num_shared
        self._by_head = dense.head in ("causal", "masked")
        self._truths: list[tuple[Tensor, Any]] = []

    @torch.no_grad()
    def __call__(self, smaller: Loaded) -> float:
        """The mean divergence of a model a place."""
        known = [KnownBlock(block) for block in smaller.stack.blocks[: self._num_shared]]
        rest = smaller.stack.blocks[self._num_shared :]
        shell = with_blocks(smaller.model, smaller.stack, [*known, *rest])
        total, places = 0.0, 0
        for (token_ids, keep), (truth, before) in zip(self._batches.tokens(), self._dense_truths(), strict=True):
            for block in known:
                block.output = before
            found = self._answer(smaller, shell, token_ids, keep)
            # A sequence at a time: logits are the largest tensors of all.
            for row in range(len(keep)):
                one = slice(row, row + 1)
                sides = truth[one], found[one]
                if self._by_head:
                    heads = HeadShell(self._dense.model), HeadShell(smaller.model)
                    sides = heads[0](sides[0]), heads[1](sides[1])
                value, count = _distance(self._dense, *sides, keep[one])
                total, places = total + float(value), places + count
        return total / places if places else float("nan")

    def _dense_truths(self) -> list[tuple[Tensor, Any]]:
        """For each batch what the dense model answers, and its output after the last shared block."""
        if self._truths:
            return self._truths
        after: list[Any] = [None]

        def note(_: nn.Module, __: Any, output: Any) -> None:
            after[0] = output

        with contextlib.ExitStack() as hooks:
            if self._num_shared:
                block = self._dense.stack.blocks[self._num_shared - 1]
                hooks.callback(block.register_forward_hook(note).remove)
            for token_ids, keep in self._batches.tokens():
                answer = self._answer(self._dense, self._dense.model, token_ids, keep)
                self._truths.append((answer, after[0]))
        return self._truths

    def _answer(self, loaded: Loaded, model: Any, token_ids: Tensor, keep: Tensor) -> Tensor:
        """Last hidden states of models with a head for words, else what `divergence` compares."""
        if not self._by_head:
            return _outputs(dataclasses.replace(loaded, model=model), token_ids, keep, None)[0]
        body: Any = model.base_model
        return body(**model_inputs(loaded, token_ids, keep, part=body))[0]


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
