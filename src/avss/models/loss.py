"""The loss whose gradient says what a block is worth, for every kind of head."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from avss.models.forward import model_inputs
from avss.models.load import Loaded
from avss.models.predictions import Answers, label_answers
from avss.models.stack import body_of

MASK_EVERY, MASK_FROM = 7, 3
"""A masked language model predicts every seventh real token, from the fourth on: 14 %, near the 15 % of its training.
Fixed places rather than drawn ones, so that the loss depends on the text alone."""

_IGNORED = -100


def own_loss(loaded: Loaded, batch: Tensor | Mapping[str, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """The model's loss on a batch without labels, with its graph.

    - `causal`: cross entropy of each next real token, in nats.
    - `masked`: cross entropy of masked real tokens (see `MASK_EVERY`), in nats. Without a mask token in the tokenizer
      the same tokens are predicted unmasked.
    - `classifier`, `image-classifier`, and any other head with logits over text: cross entropy of the label that the
      model itself finds most likely (of each real token, where it labels tokens). The model's answer is what a cut must
      keep. Where each label is there or not, binary cross entropy of what the model finds likelier; a regression's
      numbers are taken themselves.
    - `encoder`, and any other head over images: nothing to predict; the mean over sequences of the dot product of the
      normalised mean-pooled embedding with a fixed random direction. The expected square of its gradient is that of the
      embedding's Jacobian, so it says how much the embedding moves.

    Args:
        loaded: The model.
        batch: Token ids `[B, T]`, or the model's own keyword arguments (images).
        keep: `[B, T]`, True for real tokens.

    Returns:
        The loss, a mean over targets, and their number: predicted tokens, or sequences. Where the number is 0 the loss
        is not a number.
    """
    keep = keep.to(loaded.device)
    if isinstance(batch, Mapping):
        if loaded.head == "image-classifier":
            logits = loaded.model(**model_inputs(loaded, batch, keep))["logits"]
            return _own_answer(logits, keep, label_answers(loaded.model.config))
        body = body_of(loaded.model)
        return _embedding_move(body(**model_inputs(loaded, batch, keep, part=body))["last_hidden_state"], keep)
    token_ids = batch.to(loaded.device)
    if loaded.head == "causal":
        labels = token_ids.masked_fill(~keep, _IGNORED)
        loss = loaded.model(**model_inputs(loaded, token_ids, keep), labels=labels).loss
        return loss, (labels[:, 1:] != _IGNORED).sum()
    if loaded.head == "masked":
        chosen = keep & (keep.cumsum(-1) % MASK_EVERY == MASK_FROM + 1)
        mask_id = getattr(loaded.tokenizer, "mask_token_id", None)
        asked = token_ids if mask_id is None else token_ids.masked_fill(chosen, mask_id)
        labels = token_ids.masked_fill(~chosen, _IGNORED)
        return loaded.model(**model_inputs(loaded, asked, keep), labels=labels).loss, chosen.sum()
    outputs = loaded.model(**model_inputs(loaded, token_ids, keep))
    if "logits" in outputs:
        answers = label_answers(loaded.model.config) if loaded.head != "seq2seq" else "choice"
        return _own_answer(outputs["logits"], keep, answers)
    return _embedding_move(outputs[0], keep)


def _own_answer(logits: Tensor, keep: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
    rows = logits[keep] if logits.dim() == 3 else logits
    num = torch.tensor(len(rows), device=rows.device)
    if answers == "numbers" or rows.shape[-1] == 1:
        return rows.float().mean(), num
    if answers == "labels":
        return functional.binary_cross_entropy_with_logits(rows.float(), (rows.detach() > 0).float()), num
    return functional.cross_entropy(rows.float(), rows.detach().argmax(-1)), num


def _embedding_move(hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    real = keep.unsqueeze(-1)
    pooled = torch.where(real, hidden.float(), 0).sum(1) / real.sum(1).clamp(min=1)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(pooled.shape, generator=generator).to(pooled.device)
    moved = (functional.normalize(pooled, dim=-1) * direction).sum(-1)
    return moved.mean(), torch.tensor(len(moved), device=moved.device)
