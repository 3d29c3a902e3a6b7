"""How far a smaller model's answers are from the dense model's: what every repair is judged by."""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from avss.data.batches import Batches, Inputs
from avss.errors import UnsupportedArchitectureError
from avss.models.forward import last_states, model_inputs, takes
from avss.models.load import Loaded
from avss.models.predictions import answers_of, distance
from avss.models.shell import HeadShell, KnownBlock, with_blocks


def divergence(
    dense: Loaded, smaller: Loaded, inputs: Inputs, keep: Tensor, *, places: Tensor | None = None
) -> tuple[Tensor, int]:
    """The divergence of one batch, summed, and the number of places it is summed over. Gradients flow to `smaller`.

    Of the answers at every place (`avss.models.predictions.distance`), or of the last hidden states of bare encoders.

    Args:
        dense: Its predictions are the truth.
        smaller: The model that is judged.
        inputs: Token ids `[B, T]`, or the model's own keyword arguments (images).
        keep: `[B, T]`; padding is no place.
        places: Positions `[P]` to compare at, to spare the head the rest; all of them by default.
    """
    with torch.no_grad():
        truth, _ = _outputs(dense, inputs, keep, places)
    found, at = _outputs(smaller, inputs, keep, places)
    return _distance(dense, truth, found, keep if at is None else keep[:, at])


def _distance(dense: Loaded, truth: Tensor, found: Tensor, keep: Tensor) -> tuple[Tensor, int]:
    if found.dim() == 3:
        here = keep.to(found.device)
        truth, found = truth[here], found[here]
    answers, total = answers_of(dense), found.new_zeros((), dtype=torch.float32)
    # In pieces: a vocabulary's width of float32 for every token would be the largest tensor of the whole run.
    for some_truth, some_found in zip(truth.split(_PIECE), found.split(_PIECE), strict=True):
        total = total + distance(answers, some_truth, some_found).sum()
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
        for (inputs, keep), (truth, before) in zip(self._batches, self._dense_truths(), strict=True):
            for block in known:
                block.output = before
            found = self._answer(smaller, shell, inputs, keep)
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
            for inputs, keep in self._batches:
                answer = self._answer(self._dense, self._dense.model, inputs, keep)
                self._truths.append((answer, after[0]))
        return self._truths

    def _answer(self, loaded: Loaded, model: Any, inputs: Inputs, keep: Tensor) -> Tensor:
        """Last hidden states of models with a head for words, else what `divergence` compares."""
        if not self._by_head:
            return _outputs(dataclasses.replace(loaded, model=model), inputs, keep, None)[0]
        return last_states(dataclasses.replace(loaded, model=model), inputs, keep)


def _outputs(loaded: Loaded, batch: Inputs, keep: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits or last hidden states, and the positions they stand for (None for all)."""
    if answers_of(loaded) == "states":
        hidden = last_states(loaded, batch, keep)
        if hidden.dim() == 3 and hidden.shape[:2] != keep.shape:
            raise UnsupportedArchitectureError(
                f"`{type(loaded.model).__name__}` answers {tuple(keep.shape)} places with {tuple(hidden.shape)}, not a "
                "state of each, so how far a repair is from it is not defined. Leave out `--compensate`."
            )
        return (hidden, None) if places is None else (hidden[:, places.to(hidden.device)], places)
    inputs = model_inputs(loaded, batch, keep)
    # A classifier may take it too (BioGPT's), and then looks for its last token among those kept.
    if places is not None and loaded.head != "classifier" and takes(loaded.model, "logits_to_keep"):
        return loaded.model(**inputs, logits_to_keep=places.to(loaded.device))["logits"], places
    logits = loaded.model(**inputs)["logits"]
    if places is None or logits.dim() < 3:
        return logits, None
    return logits[:, places.to(logits.device)], places
