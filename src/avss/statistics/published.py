"""The averages of the published AVSS script, its quirks included."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, final

from avss.statistics.base import AbstractStatistic, Probe, Rows, require

if TYPE_CHECKING:
    from torch import Tensor

    from avss.statistics.observation import GradientNumbers, Observation

PUBLISHED_THRESHOLD = 1e-5


@final
@dataclasses.dataclass(frozen=True)
class PublishedAverages(AbstractStatistic):
    r"""`Average_Variance` and `Average_Sparsity` as the published script computes them.

    For a batch of B sequences padded to T tokens of D hidden units, with $\bar a_{bd}$ the mean over *all* T positions,

    $$\text{variance} = \frac1B \sum_b \operatorname{Var}_d(\bar a_{bd}), \qquad
      \text{sparsity} = \frac{1}{BTD} \sum_{btd} 1[|a_{btd}| < 10^{-5}]$$

    with the unbiased variance (D - 1), both averaged over batches with equal weight. Padding counts, a short last
    batch counts as much as a full one, and the two factors look at different things: the numerator at mean-pooled
    vectors, the denominator at raw tokens. Kept for reproduction; use `Moments` and `NearZero` to measure.

    Rows carry the weight 1/B, so that the mean over batches is a weighted mean over rows and merging stays exact.

    References:
        Song et al. (2024), AVSS, arXiv 2411.02117, and the script in its repository.
    """

    counts_padding: ClassVar[bool] = True
    has_first_token: ClassVar[bool] = False

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
        hidden = seen.output
        num_sequences, num_positions, width = hidden.values.shape
        pooled = hidden.values.mean(1)
        below = hidden.count_below(PUBLISHED_THRESHOLD, relative=False).double().sum(-1)
        return {
            "weight": below.new_full((num_sequences,), 1 / num_sequences),
            "variance": pooled.var(dim=1).double(),
            "below": below,
            "count": below.new_full((num_sequences,), num_positions * width),
        }

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        require(rows.num_sequences, "published average")
        weight = rows.columns["weight"]
        share = rows.columns["below"] / rows.columns["count"]
        norm = float(weight.sum())
        return {
            "variance": float((weight * rows.columns["variance"]).sum()) / norm,
            "sparsity": float((weight * share).sum()) / norm,
            "below": float(rows.columns["below"].sum()),
            "count": float(rows.columns["count"].sum()),
        }


@final
@dataclasses.dataclass(frozen=True)
class PublishedGradients(AbstractStatistic):
    r"""`Average_L1Norm` and `Average_L2Norm` as the published script computes them.

    For the gradient $g_m$ of a batch's loss with respect to each named matrix $m$ of a block,

    $$\text{l1} = \sum_m \sum_{ij} |g_{mij}|, \qquad \text{l2} = \sum_m \Big(\sum_{ij} g_{mij}^2\Big)^{1/2}$$

    averaged over batches with equal weight. The second is a sum of norms, not the norm of all matrices together; use
    `GradientNorms` for that.

    References:
        The script in the repository of Song et al. (2024), AVSS, arXiv 2411.02117.
    """

    probe: ClassVar[Probe] = "backward"
    has_first_token: ClassVar[bool] = False
    row_is: ClassVar[Literal["sequence", "batch", "model"]] = "batch"

    def observe(self, seen: "GradientNumbers") -> "dict[str, Tensor]":
        return {"l1": seen.l1.sum().reshape(1), "l2": seen.l2.sum().reshape(1)}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        require(rows.num_sequences, "published average of gradients")
        return {name: float(rows.columns[name].mean()) for name in ("l1", "l2")}
