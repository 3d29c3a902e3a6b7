"""How well a continuation fits a context, one number for each pair; what it is depends on the head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avss.data.batches import leading_ids, pad_id_of, tokenise
from avss.errors import TaskError
from avss.evaluation.base import OnStep, Steps, max_len, shared_tokenizer
from avss.evaluation.embedding import cosine, embed, encode_texts
from avss.evaluation.probes import Probe, ask, hidden_tokens, in_batches, log_likelihood, next_tokens, num_batches
from avss.models.asked import AskedLogits
from avss.models.load import Loaded


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A tokenised context and continuation: token ids `[T]`, and the half-open range that the continuation takes."""

    token_ids: Tensor
    start: int
    stop: int


def score_continuations(
    models: Sequence[Loaded],
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int,
    on_step: OnStep = lambda done, total: None,
) -> list[np.ndarray]:
    r"""Scores how well each continuation follows its context.

    - `causal`: the log-likelihood $\sum_t \ln p(x_t | x_{<t})$ over the continuation's tokens, in nats.
    - `masked`: the pseudo-log-likelihood $\sum_t \ln p(x_t | x_{\setminus t})$: each token of the continuation is
      masked in turn and everything else, both sides, is read.
    - `encoder`: the cosine between the embeddings of the two texts, which are embedded apart.

    The continuation's tokens are those of the whole text minus as many as the context has alone; blanks at the end of
    the context are moved to the continuation first. Both as in lm-evaluation-harness. What does not fit the model is
    cut off at the left, the tokenizer's own first tokens (BOS, `[CLS]`) excepted.

    Args:
        models: All of one head and one vocabulary.
        pairs: Context and continuation; what separates them belongs to the continuation.
        batch_size: Sequences in a forward pass; without effect on the result.
        on_step: Called after each forward pass.

    Returns:
        For each model, one score a pair, `[N]`; higher fits better.

    Raises:
        TaskError: The head cannot score text, or a continuation has no token or does not fit. Before any forward pass.
        DataError: There is no tokenizer.
    """
    head = models[0].head
    if head == "encoder":
        return _score_by_cosine(models, pairs, batch_size=batch_size, on_step=on_step)
    if head not in ("causal", "masked"):
        raise TaskError(
            f"A model with a `{head}` head gives no probabilities to words. Allowed: causal, masked, encoder. Load it "
            "with another `--head`, or use the task `classification` for a classifier."
        )
    tokenizer = shared_tokenizer(models)
    encoded = _encode(tokenizer, pairs, head=head, limit=max_len(models))
    probes, owners = _probes(encoded, models[0], tokenizer)
    return _sum_over_probes(models, probes, owners, len(pairs), pad_id_of(tokenizer), batch_size, on_step)


def mask_id_of(tokenizer: Any, source: str) -> int:
    """The id of the mask token.

    Raises:
        TaskError: The tokenizer has none.
    """
    if tokenizer.mask_token_id is None:
        raise TaskError(
            f"The tokenizer of `{source}` has no mask token, which a model with a `masked` head is asked with. Add it "
            "to the tokenizer's special tokens, or use the task `similarity`."
        )
    return tokenizer.mask_token_id


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that the tokenizer puts before and after a text, e.g. `[CLS]` and `[SEP]`."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def _encode(tokenizer: Any, pairs: Sequence[tuple[str, str]], *, head: str, limit: int | None) -> list[_Pair]:
    # A causal model must not read an end-of-text token between the parts, even where its tokenizer adds one.
    before, after = (leading_ids(tokenizer), []) if head == "causal" else special_frame(tokenizer)
    return [_encode_pair(tokenizer, *pair, before=before, after=after, limit=limit) for pair in pairs]


def _encode_pair(
    tokenizer: Any, context: str, continuation: str, *, before: list[int], after: list[int], limit: int | None
) -> _Pair:
    stripped = context.rstrip()
    whole = tokenise(tokenizer, context + continuation)
    num_context = len(tokenise(tokenizer, stripped)) if stripped else 0
    num_continuation = len(whole) - num_context
    if num_continuation < 1:
        raise TaskError(
            f"`{continuation}` has no token of its own after `…{context[-40:]}`, so it cannot be scored. Give a word "
            "that the tokenizer knows."
        )
    if not num_context and not before:
        raise TaskError(
            f"There is no token before `{continuation[:60]}`, and the first token of a text cannot be predicted. Write "
            "some words before it in the template."
        )
    room = len(whole) if limit is None else limit - len(before) - len(after)
    if num_continuation + (not before) > room:
        raise TaskError(
            f"`{continuation[:60]}…` has {num_continuation} tokens and does not fit the model, which takes {limit} "
            "with what comes before. Shorten it, or leave the item out."
        )
    kept = whole[max(0, len(whole) - room) :]
    stop = len(before) + len(kept)
    token_ids = torch.cat([torch.tensor(before, dtype=torch.long), kept, torch.tensor(after, dtype=torch.long)])
    return _Pair(token_ids=token_ids, start=stop - num_continuation, stop=stop)


def _probes(encoded: Sequence[_Pair], model: Loaded, tokenizer: Any) -> tuple[list[Probe], list[int]]:
    """The probes, and for each the index of the pair it belongs to."""
    if model.head == "causal":
        return [next_tokens(pair.token_ids, pair.start) for pair in encoded], list(range(len(encoded)))
    mask_id = mask_id_of(tokenizer, model.source)
    probes, owners = [], []
    for owner, pair in enumerate(encoded):
        for place in range(pair.start, pair.stop):
            probes.append(hidden_tokens(pair.token_ids, torch.tensor([place]), mask_id))
            owners.append(owner)
    return probes, owners


def _sum_over_probes(
    models: Sequence[Loaded],
    probes: Sequence[Probe],
    owners: Sequence[int],
    num_pairs: int,
    pad_id: int,
    batch_size: int,
    on_step: OnStep,
) -> list[np.ndarray]:
    # Continuations of one token after the same context read the same: one forward pass answers for all of them.
    sharers: dict[tuple[int, ...], list[int]] = {}
    for index, probe in enumerate(probes):
        sharers.setdefault(tuple(probe.token_ids.tolist()), []).append(index)
    groups = list(sharers.values())
    scores = [np.zeros(num_pairs) for _ in models]
    steps = Steps(num_batches(len(groups), batch_size) * len(models), on_step)
    askers = [AskedLogits(model) for model in models]
    for chosen, token_ids, keep in in_batches([probes[group[0]].token_ids for group in groups], batch_size, pad_id):
        asked, places = ask([[probes[index] for index in groups[group]] for group in chosen], keep)
        for asker, sums in zip(askers, scores, strict=True):
            logits_NV = asker(token_ids, keep, asked)
            for group, own in zip(chosen, places, strict=True):
                for index, places_M in zip(groups[group], own, strict=True):
                    sums[owners[index]] += log_likelihood(logits_NV, places_M, probes[index].targets).sum()
            steps.advance()
    return scores


def _score_by_cosine(
    models: Sequence[Loaded], pairs: Sequence[tuple[str, str]], *, batch_size: int, on_step: OnStep
) -> list[np.ndarray]:
    # Contexts and continuations come back many times; each text is embedded once.
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    place = {text: index for index, text in enumerate(texts)}
    encoded = encode_texts(models, texts)
    embedded = embed(models, encoded, batch_size=batch_size, on_step=on_step)
    left, right = ([place[pair[side]] for pair in pairs] for side in (0, 1))
    return [cosine(vectors[left], vectors[right]) for vectors in embedded]
