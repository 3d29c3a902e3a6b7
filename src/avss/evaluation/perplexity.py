"""How well a model predicts running text: perplexity and loss, and how far a smaller model is from the dense one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avss.config import TaskConfig
from avss.data.batches import DOCUMENT_BREAK, masked_places, pad, pad_id_of, windows
from avss.data.sources import read_texts
from avss.errors import DataError, TaskError
from avss.evaluation.base import (
    OnStep,
    Steps,
    TaskResult,
    data_source,
    draw,
    max_len,
    measure,
    shared_tokenizer,
    short_source,
    task_name,
)
from avss.evaluation.probes import Probe, ask, divergence, hidden_tokens, log_likelihood, next_tokens, num_batches
from avss.evaluation.scoring import mask_id_of, special_frame
from avss.models.asked import AskedLogits
from avss.models.load import Loaded
from avss.record import Measurement

_Samples = dict[str, list[float]]


def evaluate_perplexity(models: Sequence[Loaded], task: TaskConfig, on_step: OnStep) -> list[TaskResult]:
    r"""Perplexity by the protocol of the field.

    The texts, blank rows of a table too, are joined with a blank line, tokenised once and cut into windows of
    `task.seq_len` tokens that do not overlap (BOS included where the tokenizer adds it); the last, incomplete window is
    dropped. With a `limit`, a seeded draw of the windows. A window's loss is the mean of $-\ln p(x_t | x_{<t})$ over
    its tokens from the second on.

    Metrics of a causal model:

    - `perplexity`: $e^{\ell}$ with standard error $e^{\ell}\, s_\ell$ (delta method).
    - `loss`: $\ell$, the mean over windows, in nats per token; its standard error $s_\ell$ is that of the windows.
    - `kl`: KL divergence from the dense model's predictions, in nats per token, mean over windows. Not for `models[0]`.
    - `top1_agreement`: share of places where both models hold the same token for the most probable. Not for
      `models[0]`.

    A masked model has `masked_perplexity` and `masked_loss` instead: 15 % of each window's tokens, drawn by seed and
    window, the same for every model, are *all* replaced by the mask token (no 80/10/10 as in training), special tokens
    never; loss, `kl` and `top1_agreement` are over the masked places.

    The dense model's logits are computed once a batch, and no more than two batches of logits are held at a time.

    Raises:
        TaskError: The head does not predict words, or the vocabularies differ.
        DataError: The text is missing or does not fill one window.
    """
    head = models[0].head
    if head not in ("causal", "masked"):
        raise TaskError(
            f"A model with a `{head}` head predicts no words, so it has no perplexity. Allowed: causal, masked. Use "
            "the task `similarity`, or `classification` for a classifier."
        )
    tokenizer = shared_tokenizer(models)
    _need_one_width(models)
    probes = _probes(models, task, tokenizer)
    samples = _run(models, probes, pad_id_of(tokenizer), task.batch_size, on_step)
    return [_result(task, one, masked=head == "masked") for one in samples]


def _need_one_width(models: Sequence[Loaded]) -> None:
    widths = [model.model.config.get_text_config().vocab_size for model in models]
    if len(set(widths)) > 1:
        raise TaskError(
            f"The models predict over vocabularies of {', '.join(map(str, widths))} tokens, so their predictions "
            "cannot be compared. Evaluate them one by one."
        )


def _probes(models: Sequence[Loaded], task: TaskConfig, tokenizer: Any) -> list[Probe]:
    text = DOCUMENT_BREAK.join(read_texts(data_source(task), task.text_column, keep_blank=True).texts)
    seq_len = min(task.seq_len, max_len(models) or task.seq_len)
    if models[0].head == "causal":
        pieces = windows(tokenizer, text, seq_len)
        return [next_tokens(pieces[index]) for index in draw(len(pieces), task.limit, task.seed)]
    pieces = _framed_windows(tokenizer, text, seq_len)
    mask_id = mask_id_of(tokenizer, models[0].source)
    chosen = draw(len(pieces), task.limit, task.seed)
    return [
        hidden_tokens(pieces[index], _places_to_guess(tokenizer, pieces[index], seed=(task.seed, index)), mask_id)
        for index in chosen
    ]


def _framed_windows(tokenizer: Any, text: str, seq_len: int) -> list[Tensor]:
    """Windows of exactly `seq_len` tokens, the tokenizer's first and last tokens (`[CLS]`, `[SEP]`) around each."""
    before, after = (torch.tensor(ids, dtype=torch.long) for ids in special_frame(tokenizer))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    body = seq_len - len(before) - len(after)
    if body < 1 or len(ids) < body:
        raise DataError(
            f"The text has {len(ids)} tokens and does not fill one window of {seq_len}, {len(before) + len(after)} of "
            "them special. Give more text, or another `--seq-len`."
        )
    pieces = ids[: len(ids) // body * body].split(body)
    return [torch.cat([before, piece, after]) for piece in pieces]


def _places_to_guess(tokenizer: Any, token_ids: Tensor, *, seed: tuple[int, int]) -> Tensor:
    places = masked_places(token_ids, tokenizer.all_special_ids, seed)
    if not len(places):
        raise DataError("A window holds no token but special ones. Is the text in the model's language?")
    return places


def _run(
    models: Sequence[Loaded], probes: Sequence[Probe], pad_id: int, batch_size: int, on_step: OnStep
) -> list[_Samples]:
    """The values of each window, by model and metric."""
    samples: list[_Samples] = [{"loss": [], "kl": [], "top1_agreement": []} for _ in models]
    steps = Steps(num_batches(len(probes), batch_size) * len(models), on_step)
    askers = [AskedLogits(model) for model in models]
    for start in range(0, len(probes), batch_size):
        batch = probes[start : start + batch_size]
        token_ids, keep = pad([probe.token_ids for probe in batch], pad_id)
        asked, found = ask([[probe] for probe in batch], keep)
        places = [own for (own,) in found]
        dense_NV = askers[0](token_ids, keep, asked)
        steps.advance()
        _add(samples[0], batch, places, dense_NV, None)
        for asker, own in zip(askers[1:], samples[1:], strict=True):
            _add(own, batch, places, asker(token_ids, keep, asked), dense_NV)
            steps.advance()
    return samples


def _add(
    samples: _Samples, batch: Sequence[Probe], places: Sequence[Tensor], logits_NV: Tensor, dense_NV: Tensor | None
) -> None:
    words = None if dense_NV is None else [logits.argmax(-1).cpu() for logits in (dense_NV, logits_NV)]
    for probe, places_M in zip(batch, places, strict=True):
        samples["loss"].append(-float(log_likelihood(logits_NV, places_M, probe.targets).mean()))
        if dense_NV is not None and words is not None:
            samples["kl"].append(float(divergence(dense_NV, logits_NV, places_M).mean()))
            dense, other = (word[places_M] for word in words)
            samples["top1_agreement"].append(int((dense == other).sum()) / dense.numel())


def _result(task: TaskConfig, samples: _Samples, *, masked: bool) -> TaskResult:
    loss_name = "masked_loss" if masked else "loss"
    arrays = {
        loss_name if metric == "loss" else metric: np.array(values) for metric, values in samples.items() if values
    }
    loss = measure(task, loss_name, arrays[loss_name], higher_is_better=False, unit="nats")
    measurements = [_perplexity(task, loss), loss]
    if "kl" in arrays:
        measurements.append(measure(task, "kl", arrays["kl"], higher_is_better=False, unit="nats"))
        measurements.append(measure(task, "top1_agreement", arrays["top1_agreement"], higher_is_better=True))
    return TaskResult(measurements=tuple(measurements), samples=arrays)


def _perplexity(task: TaskConfig, loss: Measurement) -> Measurement:
    # A ruined model's loss can be too large for its exponential.
    value = math.exp(loss.value) if loss.value < 700 else math.inf if loss.value == loss.value else math.nan
    return Measurement(
        task=task_name(task),
        metric=loss.metric.replace("loss", "perplexity"),
        value=value,
        stderr=None if loss.stderr is None else value * loss.stderr,
        num_samples=loss.num_samples,
        higher_is_better=False,
        source=short_source(task),
    )
