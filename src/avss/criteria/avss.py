r"""The activation variance-sparsity score, in four formulations.

The paper (arXiv 2411.02117) defines $\text{AVSS}_i = \sigma^2_i / S_i$: variance of a block's activations over the
share of them near zero. Its script computes something else in detail, its figure plots something else (a product), and
on pre-norm decoders the ratio mostly ranks blocks by depth, because the residual stream's variance grows with depth.
All four are here, in one file, so that nobody has to guess which one a table means:

    avss             the ratio of what the block *adds* to the residual stream, relative to what it received
    avss-paper       the paper's ratio, measured properly: masked, token-weighted, threshold relative to each token
    avss-product     the same two factors multiplied, each divided by its sum over blocks: what the figure plots
    avss-reference   to the digit what the published script computes, padding and quirks included
"""

import dataclasses
from typing import ClassVar, final

import numpy as np

from avss.criteria.base import AVSS_PAPER, AVSS_URL, AbstractCriterion, Evidence, Scored, ratio
from avss.statistics.base import AbstractStatistic
from avss.statistics.change import RelativeVariance, Unchanged
from avss.statistics.moments import Moments
from avss.statistics.near_zero import NearZero
from avss.statistics.published import PublishedAverages


@final
@dataclasses.dataclass(frozen=True)
class AvssReference(AbstractCriterion):
    r"""$\text{Average\_Variance} / \text{Average\_Sparsity}$ of the published script; see `PublishedAverages`.

    Raises an error where the script would print inf: no activation of a block below 1e-5.
    """

    name: ClassVar[str] = "avss-reference"
    title: ClassVar[str] = "AVSS (published script)"
    paper: ClassVar[str | None] = AVSS_PAPER
    reference_url: ClassVar[str | None] = AVSS_URL
    note: ClassVar[str | None] = (
        "Reproduces the published script: mean-pooled variance over raw-token sparsity at an absolute 1e-5, padding "
        "counted. Depends on batch size and padding."
    )
    protects_ends: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (PublishedAverages(),)

    def score(self, evidence: Evidence) -> Scored:
        averages = evidence.summaries[PublishedAverages()]
        values = ratio(
            averages["variance"],
            averages["sparsity"],
            criterion=self.name,
            remedy="The published threshold of 1e-5 found no activation there. Use more text (`--samples`, "
            "`--seq-len`), or `avss`, whose threshold follows the scale of the activations.",
        )
        return Scored(values, {"variance": averages["variance"], "sparsity": averages["sparsity"]})


@final
@dataclasses.dataclass(frozen=True)
class Avss(AbstractCriterion):
    r"""AVSS of what a block adds to the stream, relative to what it received.

    $$\frac{\mathbb E_t\left[\operatorname{Var}_d(y_t - x_t) / \operatorname{Var}_d(x_t)\right]}
           {P(|y - x| < \varepsilon |x|)}$$

    Both factors of the paper, asked of the block instead of the residual stream: the variance of the update over that
    of the input, token by token, over the share of activations that the block leaves nearly as they were. Dividing by
    the input takes out the growth of the stream with depth, which the published ratio takes for importance; a mean of
    ratios keeps massive activations of a few tokens from deciding alone. Our formulation, chosen by its agreement with
    measured damage among some 100 (docs/formulations.md), for pre-norm decoders and post-norm encoders alike.

    Attributes:
        threshold: Share of its own value below which a unit counts as unchanged; 0.003 to 0.1 order blocks alike.
    """

    threshold: float = 0.03

    name: ClassVar[str] = "avss"
    title: ClassVar[str] = "AVSS of the update"
    paper: ClassVar[str | None] = AVSS_PAPER + "; our reformulation on the block's relative update"
    reference_url: ClassVar[str | None] = AVSS_URL
    note: ClassVar[str | None] = (
        "Our reformulation: variance and sparsity of what the block adds, relative to its input. The paper's own "
        "definition is `avss-paper`."
    )

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (RelativeVariance(), Unchanged(self.threshold))

    def score(self, evidence: Evidence) -> Scored:
        variance = evidence.summaries[RelativeVariance()]["ratio"]
        sparsity = evidence.summaries[Unchanged(self.threshold)]["smoothed_share"]
        values = ratio(variance, sparsity, criterion=self.name, remedy="Check the model's activations for inf or nan.")
        return Scored(values, {"relative_variance": variance, "unchanged_share": sparsity})


@final
@dataclasses.dataclass(frozen=True)
class AvssPaper(AbstractCriterion):
    r"""$\sigma^2_i / S_i$ of the block's output, over all real tokens and hidden units.

    Differs from the published script in that padding never counts, every token weighs the same, variance and sparsity
    look at the same values, the threshold is a share of each token's root mean square, and $S$ is Laplace-smoothed.

    Attributes:
        threshold: Near-zero threshold as a share of the token's root mean square.
    """

    threshold: float = 1e-2

    name: ClassVar[str] = "avss-paper"
    title: ClassVar[str] = "AVSS (paper's ratio)"
    paper: ClassVar[str | None] = AVSS_PAPER
    reference_url: ClassVar[str | None] = AVSS_URL
    note: ClassVar[str | None] = (
        "The paper's ratio. On pre-norm decoders it mostly ranks blocks by depth; check it against measured damage."
    )
    protects_ends: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (Moments("output"), NearZero("output", self.threshold))

    def score(self, evidence: Evidence) -> Scored:
        variance = evidence.summaries[Moments("output")]["variance"]
        sparsity = evidence.summaries[NearZero("output", self.threshold)]["smoothed_share"]
        values = ratio(variance, sparsity, criterion=self.name, remedy="Check the model's activations for inf or nan.")
        return Scored(values, {"variance": variance, "sparsity": sparsity})


@final
@dataclasses.dataclass(frozen=True)
class AvssProduct(AbstractCriterion):
    r"""$\tilde\sigma^2_i \cdot \tilde S_i$: the factors of `avss-paper`, each over its sum of all blocks, multiplied.

    The curve in the paper's figure is labelled a normalised product and behaves like one; the formula beside it is a
    ratio. Both are offered.

    Attributes:
        threshold: Near-zero threshold as a share of the token's root mean square.
    """

    threshold: float = 1e-2

    name: ClassVar[str] = "avss-product"
    title: ClassVar[str] = "AVSS (product)"
    paper: ClassVar[str | None] = AVSS_PAPER
    reference_url: ClassVar[str | None] = AVSS_URL
    note: ClassVar[str | None] = "What the paper's figure plots; its formula is the ratio."
    protects_ends: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[AbstractStatistic, ...]:
        return (Moments("output"), NearZero("output", self.threshold))

    def score(self, evidence: Evidence) -> Scored:
        variance = evidence.summaries[Moments("output")]["variance"]
        sparsity = evidence.summaries[NearZero("output", self.threshold)]["smoothed_share"]
        # nansum: a block that is no number must be named itself, not spoil the norm of all.
        norm = np.full_like(variance, np.nansum(variance) * np.nansum(sparsity))
        normalised = ratio(
            variance * sparsity,
            norm,
            criterion=self.name,
            remedy="The activations do not vary at all, or are nan or infinite; check the model.",
        )
        return Scored(normalised, {"variance": variance, "sparsity": sparsity})
