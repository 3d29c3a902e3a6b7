"""How much a block changes each token."""

import dataclasses
from typing import TYPE_CHECKING, final

from avss.statistics.base import AbstractStatistic, Rows, require, total

if TYPE_CHECKING:
    from torch import Tensor

    from avss.statistics.observation import Observation


@final
@dataclasses.dataclass(frozen=True)
class CosineSimilarity(AbstractStatistic):
    r"""Mean over tokens of the cosine between a block's input and output.

    $$\frac1N \sum_t \frac{x_t \cdot y_t}{\|x_t\| \|y_t\|}$$

    A token whose input and output are both zero counts as unchanged (1); one of them zero, as 0.

    References:
        Men et al. (2024), ShortGPT, arXiv 2403.03853.
    """

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
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
    """

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
        has_input = seen.input.token_square != 0
        ratio = (seen.update.token_square.double() / seen.input.token_square.double()).sqrt()
        zero = ratio.new_zeros(())
        return {"ratio": seen.by_part(ratio.where(has_input, zero)), "tokens": seen.by_part(has_input.double())}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        tokens = total(rows, "tokens", first_token=first_token)
        require(tokens, "relative length of a block's update")
        return {"ratio": total(rows, "ratio", first_token=first_token) / tokens}
