"""Texts or images -> one vector each: the hidden state after the last block, pooled over the real tokens or all places.

Shape letters: B batch, T token, D hidden, N items.
"""

from collections.abc import Sequence

import numpy as np
import torch

from avss.errors import DataError
from avss.evaluation.base import OnStep, Steps, max_len, shared_tokenizer
from avss.evaluation.items import AbstractItems, TextItems
from avss.evaluation.probes import num_batches
from avss.models.forward import run_body
from avss.models.load import Loaded
from avss.models.pooling import find_pooling


def encode_texts(models: Sequence[Loaded], texts: Sequence[str], *, limit: int | None = None) -> TextItems:
    """Token ids of each text, special tokens included, cut to what the models take (and to `limit`, if given).

    Raises:
        DataError: There is no tokenizer, or a text has no token.
        TaskError: The models' vocabularies differ, or a pooling is not known.
    """
    for model in models:
        find_pooling(model)
    tokenizer = shared_tokenizer(models)
    longest = min((length for length in (max_len(models), limit) if length is not None), default=None)
    cut = {"truncation": True, "max_length": longest} if longest is not None else {}
    encoded = tokenizer(list(texts), **cut, verbose=False)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise DataError(
                f"`{text[:60]}` has no token, so it has no embedding. Remove it, or give a text with words."
            )
    return TextItems([torch.tensor(ids, dtype=torch.long) for ids in encoded], models[0].pad_id)


def embed(
    models: Sequence[Loaded],
    items: AbstractItems,
    *,
    batch_size: int,
    on_step: OnStep = lambda done, total: None,
) -> list[np.ndarray]:
    """The embeddings `[N, D]` by each model, float64, not normalised."""
    vectors: list[np.ndarray | None] = [None] * len(models)
    poolings = [find_pooling(model) for model in models]
    steps = Steps(num_batches(len(items), batch_size) * len(models), on_step)
    for chosen, inputs, keep in items.batches(batch_size):
        for place, (model, pooling) in enumerate(zip(models, poolings, strict=True)):
            hidden_BTD = run_body(model, inputs, keep).float()
            counted_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool) if keep is None else keep
            pooled_BD = pooling(hidden_BTD, counted_BT.to(hidden_BTD.device)).cpu().numpy()
            rows_ND = vectors[place]
            if rows_ND is None:  # a body may end in a projection to another width than its blocks'
                rows_ND = vectors[place] = np.empty((len(items), pooled_BD.shape[1]))
            rows_ND[chosen] = pooled_BD
            steps.advance()
    return [rows_ND for rows_ND in vectors if rows_ND is not None]


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The cosine of each row of `left` with the same row of `right`; both `[N, D]`. 0 where a vector is zero.

    Exactly 1 for equal rows; nan where a vector holds one.
    """
    # The root of the product, not the product of the roots: for equal rows it is the sum of squares itself.
    norms = np.sqrt((left * left).sum(1) * (right * right).sum(1))
    return np.divide((left * right).sum(1), norms, out=np.zeros(len(left)), where=norms != 0)
