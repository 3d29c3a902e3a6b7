"""How much of the dense model's result a smaller model keeps, and how sure that is."""

import math

import numpy as np

from avss.evaluation.base import TaskResult, standard_error
from avss.record import Measurement, Retention

RELATIVE_METRICS = frozenset({"kl", "top1_agreement", "cosine", "neighbour_agreement"})
"""Metrics that compare with the dense model already; their value is the answer."""


def retention(dense: TaskResult, other: TaskResult) -> tuple[Retention, ...]:
    r"""Compares a smaller model with the dense one, metric by metric. Both from one `evaluate_task` call.

    With the items' values $x_i$ (dense) and $y_i$ (smaller), their means $\bar x$, $\bar y$, and chance $c$:

    - **ratio** $R = \bar y / \bar x$. Both models saw the same items, so the standard error is that of paired items
      (delta method): the items' influences are $u_i = (y_i - R x_i) / \bar x$, and
      $s_R = \sqrt{\sum (u_i - \bar u)^2 / (n (n - 1))}$. It is far below the error of two separate measurements
      wherever the models mostly agree.
    - **perplexity**: $R = e^{\bar d}$ with the losses' differences $d_i = y_i - x_i$, and $s_R = R s_{\bar d}$.
    - **speed**, whose medians have no items: $s_R = R \sqrt{(s_y / \bar y)^2 + (s_x / \bar x)^2}$.
    - **chance-corrected** $C = (\bar y - c) / (\bar x - c)$, for accuracies; the influences are
      $((y_i - c) - C (x_i - c)) / (\bar x - c)$. None where $\bar x - c < 2 s_x$: the dense model does not know either.
    - **kept**: the ratio for accuracies, dense loss / loss for losses and perplexities, None for speed.
    - **flips**: share of items whose answer changed, right or wrong.

    A ratio to 0 is nan. Metrics that compare with the dense model already (`kl`, `top1_agreement`, `cosine`,
    `neighbour_agreement`) are left out.

    Raises:
        ValueError: The results are not of the same items.
    """
    measured = {measurement.metric: measurement for measurement in dense.measurements}
    return tuple(
        _retention(dense, other, measured[after.metric], after)
        for after in other.measurements
        if after.metric in measured and after.metric not in RELATIVE_METRICS
    )


def _retention(dense: TaskResult, other: TaskResult, before: Measurement, after: Measurement) -> Retention:
    metric = after.metric
    is_perplexity = metric.endswith("perplexity")
    loss = metric.replace("perplexity", "loss")
    x, y = (result.samples.get(loss if is_perplexity else metric) for result in (dense, other))
    if x is not None and y is not None and len(x) != len(y):
        raise ValueError(f"`{metric}` rests on {len(x)} items for one model and {len(y)} for the other.")
    if is_perplexity and x is not None and y is not None:
        ratio, error = _ratio_of_exponentials(x, y)
    elif x is not None and y is not None:
        ratio, error = _paired_ratio(x, y)
    else:
        ratio, error = _separate_ratio(before, after)
    corrected, corrected_error = _above_chance(before, x, y)
    first, second = dense.predictions.get(metric), other.predictions.get(metric)
    return Retention(
        task=after.task,
        metric=metric,
        dense=before.value,
        value=after.value,
        ratio=ratio,
        ratio_stderr=error,
        chance_corrected=corrected,
        chance_corrected_stderr=corrected_error,
        kept=_kept(metric, ratio, x, y),
        flips=float(np.mean(first != second)) if first is not None and second is not None else None,
    )


def _paired_ratio(x: np.ndarray, y: np.ndarray) -> tuple[float, float | None]:
    base = float(np.mean(x))
    if base == 0:
        return math.nan, None
    ratio = float(np.mean(y)) / base
    return ratio, standard_error((y - ratio * x) / base)


def _ratio_of_exponentials(x: np.ndarray, y: np.ndarray) -> tuple[float, float | None]:
    difference = float(np.mean(y - x))
    ratio = math.exp(difference) if difference < 700 else math.inf if difference == difference else math.nan
    error = standard_error(y - x)
    return ratio, None if error is None else ratio * error


def _separate_ratio(before: Measurement, after: Measurement) -> tuple[float, float | None]:
    if before.value == 0:
        return math.nan, None
    ratio = after.value / before.value
    if before.stderr is None or after.stderr is None or after.value == 0:
        return ratio, None
    return ratio, abs(ratio) * math.hypot(before.stderr / before.value, after.stderr / after.value)


def _above_chance(before: Measurement, x: np.ndarray | None, y: np.ndarray | None) -> tuple[float | None, float | None]:
    if before.chance is None or before.stderr is None or x is None or y is None:
        return None, None
    if before.value - before.chance < 2 * before.stderr or before.value == before.chance:
        return None, None
    return _paired_ratio(x - before.chance, y - before.chance)


def _kept(metric: str, ratio: float, x: np.ndarray | None, y: np.ndarray | None) -> float | None:
    if x is None or y is None:
        return None
    if not metric.endswith(("loss", "perplexity")):
        return ratio
    after = float(np.mean(y))
    return float(np.mean(x)) / after if after else math.nan
