"""Classification of texts or images: by a classifier's own labels, or by a model of language that picks a word."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from avss.config import TaskConfig
from avss.data.sources import read_table, split_column
from avss.errors import TaskError
from avss.evaluation.base import (
    OnStep,
    Steps,
    TaskResult,
    data_source,
    draw,
    measure,
    need_placeholder,
    short_source,
    shots_source,
    text_column_of,
)
from avss.evaluation.embedding import encode_texts
from avss.evaluation.items import AbstractItems, image_items, image_rows
from avss.evaluation.labelled import Labelled, label_words, match_classifier, read_labelled
from avss.evaluation.probes import num_batches
from avss.evaluation.scoring import score_continuations
from avss.evaluation.shots import Shots
from avss.models.forward import run_outputs
from avss.models.load import Loaded

DEFAULT_TEMPLATE = "Review: {text}\nSentiment:"
ENCODER_TEMPLATE = "This text is {label}."
EXAMPLE_BREAK = "\n\n"


def evaluate_classification(models: Sequence[Loaded], task: TaskConfig, on_step: OnStep) -> list[TaskResult]:
    """Accuracy on labelled texts or images. What answers depends on the head.

    - `classifier`, `image-classifier`: the label with the largest logit. Further metrics: `loss`, the mean of
      -ln p(right label) in nats, and `kl`, the mean KL divergence from the dense model's label probabilities in nats
      (not for `models[0]`).
    - `causal`, `masked`: the label word that, after one blank, scores highest as the continuation of the text in the
      template, see `scoring.score_continuations`. A sum over tokens: choose words of about the same length. Before it
      may stand `task.shots` solved examples, from `task.shots_data` or the evaluation data; an item never sees a text
      equal to its own.
    - `encoder`: the label whose sentence `This text is {label}.` has the largest cosine with the text.

    Equal scores go to the first label. `chance` is 1 / number of labels. Of two labels, `auroc` says how well the texts
    of one are told from those of the other wherever the line is drawn, see `placements`: a cut often shifts all answers
    to one side, which costs accuracy and loses no knowledge.

    Raises:
        TaskError: The model, the label words or the template do not fit the task.
        DataError: The data are missing, or a row has no text or no label that is allowed.
    """
    if models[0].head in ("classifier", "image-classifier"):
        return _by_labels(models, task, on_step)
    data = read(task)
    words = label_words(data, task.labels)
    chosen = draw(len(data.texts), task.limit, task.seed)
    contexts, continuations = _prompts(models[0], task, data, words, chosen)
    pairs = [(context, continuation) for context in contexts for continuation in continuations]
    scores = score_continuations(models, pairs, batch_size=task.batch_size, on_step=on_step)
    labels = np.array([data.labels[index] for index in chosen])
    return [_result(task, labels, one.reshape(len(chosen), len(words))) for one in scores]


def read(task: TaskConfig) -> Labelled:
    """The task's texts and labels.

    Raises:
        DataError: The data are missing, or a row has no text or no label that is allowed.
    """
    return read_labelled(
        read_table(data_source(task)),
        short_source(task),
        text_column=text_column_of(task),
        label_column=task.label_column,
        names=task.labels,
    )


def _read_shots(task: TaskConfig, data: Labelled, words: tuple[str, ...]) -> Labelled:
    """The texts that the solved examples come from, their labels numbered as those of the evaluation data."""
    source = shots_source(task)
    if source is None:
        return data
    pool = read_labelled(
        read_table(source),
        source,
        text_column=split_column(source)[1] or text_column_of(task),
        label_column=task.label_column,
        names=data.names or words,
    )
    label_words(pool, words)
    return pool


def _prompts(
    model: Loaded, task: TaskConfig, data: Labelled, words: tuple[str, ...], chosen: Sequence[int]
) -> tuple[list[str], list[str]]:
    """What is read before the label of each chosen item, and the labels as they are written after it."""
    if model.head == "encoder":
        if task.shots:
            raise TaskError(f"An encoder cannot use examples; `shots` is `{task.shots}`. Leave it at 0.")
        sentences = [ENCODER_TEMPLATE.replace("{label}", word) for word in words]
        return [data.texts[index] for index in chosen], sentences
    template = need_placeholder(task.template or DEFAULT_TEMPLATE, "{text}")
    # Plain replacement: texts may hold braces.
    asked = [template.replace("{text}", data.texts[index]) for index in chosen]
    if not task.shots:
        return asked, [f" {word}" for word in words]
    pool = _read_shots(task, data, words)
    shots = Shots(pool.texts, pool.labels, task.seed)
    contexts = []
    for index, question in zip(chosen, asked, strict=True):
        examples = [
            f"{template.replace('{text}', pool.texts[shot])} {words[pool.labels[shot]]}"
            for shot in shots.take(task.shots, exclude=data.texts[index])
        ]
        contexts.append(EXAMPLE_BREAK.join([*examples, question]))
    return contexts, [f" {word}" for word in words]


def _by_labels(models: Sequence[Loaded], task: TaskConfig, on_step: OnStep) -> list[TaskResult]:
    num_labels = _num_labels(models, task)
    sees = models[0].is_vision
    data = read_labelled(image_rows(task), short_source(task), names=task.labels) if sees else read(task)
    data = match_classifier(data, num_labels, models[0].model.config.label2id or {}, task.labels)
    chosen = draw(len(data.texts), task.limit, task.seed)
    labels = np.array([data.labels[index] for index in chosen])
    texts = [data.texts[index] for index in chosen]
    items = image_items(models, list(map(Path, texts))) if sees else encode_texts(models, texts)
    logits = _label_logits(models, items, num_labels, task.batch_size, on_step)
    dense, *others = [torch.log_softmax(one, dim=-1).numpy() for one in logits]
    return [_result(task, labels, dense, probabilities=True)] + [
        _result(task, labels, one, probabilities=True, dense=dense) for one in others
    ]


def _num_labels(models: Sequence[Loaded], task: TaskConfig) -> int:
    """How many labels the classifiers choose from; that they do choose one is checked."""
    config = models[0].model.config
    counts = [model.model.config.num_labels or 0 for model in models]
    if len(set(counts)) > 1:
        raise TaskError(
            f"The classifiers have {', '.join(map(str, counts))} labels, so they do not answer the same question. "
            "Evaluate them one by one."
        )
    if counts[0] < 2 or config.problem_type == "multi_label_classification":
        raise TaskError(
            f"`{models[0].source}` does not choose one of several labels (it has {counts[0]}, problem type "
            f"`{config.problem_type}`). Allowed: classifiers with one right label of two or more."
        )
    if task.shots:
        raise TaskError(f"A classifier cannot use examples; `shots` is `{task.shots}`. Leave it at 0.")
    return counts[0]


def _label_logits(
    models: Sequence[Loaded], items: AbstractItems, num_labels: int, batch_size: int, on_step: OnStep
) -> list[torch.Tensor]:
    """The logits of every item, `[N, K]`, float64, for each model."""
    logits = [torch.empty(len(items), num_labels, dtype=torch.float64) for _ in models]
    steps = Steps(num_batches(len(items), batch_size) * len(models), on_step)
    for chosen, inputs, keep in items.batches(batch_size):
        for model, own in zip(models, logits, strict=True):
            own[chosen] = run_outputs(model, inputs, keep).cpu().double()
            steps.advance()
    return logits


def _result(
    task: TaskConfig,
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    probabilities: bool = False,
    dense: np.ndarray | None = None,
) -> TaskResult:
    """The result from one score an item and label, `[N, K]`; log-probabilities give a loss, and a divergence."""
    # A model whose scores are no numbers answers nothing.
    predicted = np.where(np.isnan(scores).any(axis=1), -1, scores.argmax(1))
    samples = {"accuracy": (predicted == labels).astype(np.float64)}
    measure_nats = functools.partial(measure, task, higher_is_better=False, unit="nats")
    measurements = [measure(task, "accuracy", samples["accuracy"], higher_is_better=True, chance=1 / scores.shape[1])]
    if scores.shape[1] == 2 and len(set(labels.tolist())) == 2:
        samples["auroc"] = placements(labels, scores[:, 1] - scores[:, 0])
        measurements.append(measure(task, "auroc", samples["auroc"], higher_is_better=True, chance=0.5))
    if probabilities:
        samples["loss"] = -scores[np.arange(len(labels)), labels]
        measurements.append(measure_nats(metric="loss", samples=samples["loss"]))
    if dense is not None:
        samples["kl"] = (np.exp(dense) * (dense - scores)).sum(1)
        measurements.append(measure_nats(metric="kl", samples=samples["kl"]))
    return TaskResult(measurements=tuple(measurements), samples=samples, predictions={"accuracy": predicted})


def placements(labels: np.ndarray, margins: np.ndarray) -> np.ndarray:
    r"""The area under the ROC curve, shared out among the items, `[N]`: their mean is the area.

    The area $A$ is the probability that an item labelled 1 has a larger margin than one labelled 0, ties counted half.
    With an item's placement $V_i$, the share of the $N - n_i$ items of the other label on whose right side it lies, and
    $n_i$ items of its own label, the value is $A + (V_i - A) N / n_i$. The standard error of their mean so is that of
    the area (DeLong et al. 1988, doi:10.2307/2531595) up to a factor of $1 + O(1 / n_i)$.

    Args:
        labels: 0 or 1, both of them, `[N]`.
        margins: What speaks for 1 over 0, `[N]`; an item where it is no number lies on the wrong side of all others.
    """
    worst = np.where(labels == 1, -np.inf, np.inf)
    margins = np.where(np.isnan(margins), worst, margins)
    found = np.empty(len(labels))
    for label, sign in ((1, 1), (0, -1)):
        own, others = sign * margins[labels == label], np.sort(sign * margins[labels != label])
        below, not_above = (np.searchsorted(others, own, side=side) for side in ("left", "right"))  # type: ignore[call-overload]
        found[labels == label] = (below + not_above) / (2 * len(others))
    area = found[labels == 1].mean()
    return area + (found - area) * len(labels) / np.where(labels == 1, (labels == 1).sum(), (labels == 0).sum())
