"""How much a block changes each token."""

import dataclasses
from typing import TYPE_CHECKING, final

from avss.statistics.base import AbstractStatistic, Part, Rows, require, total

if TYPE_CHECKING:
    from torch import Tensor

    from avss.statistics.observation import Observation


@final
@dataclasses.dataclass(frozen=True)
class CosineSimilarity(AbstractStatistic):
    r"""Mean over tokens of the cosine between a block's input and output.

    $$\frac1N \sum_t \frac{x_t \cdot y_t}{\|x_t\| \|y_t\|}$$

    A token whose input and output are both zero counts as unchanged (1); one of them zero, as 0.

    Attributes:
        part: What is between the two states; see `Observation.around` for sub-layers.

    References:
        Men et al. (2024), ShortGPT, arXiv 2403.03853.
    """

    part: Part = "block"

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
        seen = seen.around(self.part)
        norms = seen.input.token_square.double() * seen.output.token_square.double()
        cosine = seen.token_dot.double() / norms.sqrt()
        both_zero = (seen.input.token_square == 0) & (seen.output.token_square == 0)
        # `norms != 0` rather than `> 0`: a nan must show, not pass for an unchanged token.
        cosine = cosine.where(norms != 0, both_zero.double())
        return {"cosine": seen.by_part(cosine.clamp(-1, 1)), "tokens": seen.num_tokens}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        tokens = total(rows, "tokens", first_token=first_token)
        require(tokens, "cosine between a block's input and output")
        return {"cosine": total(rows, "cosine", first_token=first_token) / tokens}


@final
@dataclasses.dataclass(frozen=True)
class RelativeUpdate(AbstractStatistic):
    r"""Mean over tokens of the length of the update over the length of the input.

    $$\frac1N \sum_t \frac{\|y_t - x_t\|}{\|x_t\|}$$

    A token with a zero input has no ratio and is left out of the mean.

    Attributes:
        part: What is between the two states; see `Observation.around` for sub-layers.
    """

    part: Part = "block"

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
        seen = seen.around(self.part)
        has_input = seen.input.token_square != 0
        ratio = (seen.update.token_square.double() / seen.input.token_square.double()).sqrt()
        zero = ratio.new_zeros(())
        return {"ratio": seen.by_part(ratio.where(has_input, zero)), "tokens": seen.by_part(has_input.double())}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        tokens = total(rows, "tokens", first_token=first_token)
        require(tokens, "relative length of a block's update")
        return {"ratio": total(rows, "ratio", first_token=first_token) / tokens}


@final
@dataclasses.dataclass(frozen=True)
class RelativeVariance(AbstractStatistic):
    r"""Mean over tokens of the variance of the update over the variance of the input, both over the hidden units.

    $$\frac1N \sum_t \frac{\operatorname{Var}_d(y_t - x_t)}{\operatorname{Var}_d(x_t)}$$

    Token by token, so that a few tokens with massive activations weigh no more than others. A token whose input does
    not vary has no ratio and is left out.
    """

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
        varies = seen.input.token_m2 != 0
        ratio = seen.update.token_m2.double() / seen.input.token_m2.double()
        zero = ratio.new_zeros(())
        return {"ratio": seen.by_part(ratio.where(varies, zero)), "tokens": seen.by_part(varies.double())}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        tokens = total(rows, "tokens", first_token=first_token)
        require(tokens, "relative variance of a block's update")
        return {"ratio": total(rows, "ratio", first_token=first_token) / tokens}


@final
@dataclasses.dataclass(frozen=True)
class Unchanged(AbstractStatistic):
    r"""Share of activations that a block leaves nearly as they were: $|y - x| < \varepsilon |x|$.

    The sparsity of an update, each unit measured by what it changes.

    Attributes:
        threshold: $\varepsilon$, as a share of the unit's own value before the block.
    """

    threshold: float = 0.03

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
        below = seen.count_unchanged(self.threshold)
        return {"below": seen.by_part(below), "count": seen.num_tokens * seen.input.width}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        below = total(rows, "below", first_token=first_token)
        count = total(rows, "count", first_token=first_token)
        require(count, "share of unchanged activations")
        # Smoothed as in `NearZero`.
        return {"below": below, "count": count, "share": below / count, "smoothed_share": (below + 1) / (count + 2)}
