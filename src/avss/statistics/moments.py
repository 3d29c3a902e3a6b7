r"""Moments of activations over tokens and hidden units."""

import dataclasses
from typing import TYPE_CHECKING, final

from avss.statistics.base import AbstractStatistic, Rows, Site, require

if TYPE_CHECKING:
    from torch import Tensor

    from avss.statistics.observation import Observation


@final
@dataclasses.dataclass(frozen=True)
class Moments(AbstractStatistic):
    r"""Count, mean and variance of every activation at a site, all tokens and hidden units pooled.

    Tokens are folded into sequences, and sequences into the whole, with the pairwise rule of Chan et al.: with
    counts $n_i$, means $\bar x_i$ and sums of squared deviations $M_i$,

    $$M = \sum_i M_i + \sum_i n_i (\bar x_i - \bar x)^2$$

    Every token weighs the same, whatever the length of its sequence or the size of its batch.

    Attributes:
        site: Where to look.

    References:
        Chan, Golub and LeVeque (1983), Algorithms for Computing the Sample Variance, The American Statistician 37(3).
    """

    site: Site = "output"

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
        hidden = seen.at(self.site)
        tokens = seen.num_tokens
        mean = seen.by_part(hidden.token_mean) / tokens.clamp(min=1)
        token_mean = hidden.token_mean.double()
        to_first = (token_mean - mean[:, :1]).square()
        to_rest = (token_mean - mean[:, 1:]).square()
        # Part 0 is one token: its mean is the part's mean and `to_first` adds nothing there.
        between = seen.by_part(to_rest)
        between[:, 0] = seen.by_part(to_first)[:, 0]
        m2 = seen.by_part(hidden.token_m2) + hidden.width * between
        return {"count": tokens * hidden.width, "mean": mean, "m2": m2}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        require(rows.num_sequences, "variance of activations")
        start = 0 if first_token else 1
        count, mean, m2 = (rows.columns[name][:, start:] for name in ("count", "mean", "m2"))
        num = float(count.sum())
        require(num, "variance of activations")
        centre = float((count * mean).sum()) / num
        spread = float(m2.sum() + (count * (mean - centre) ** 2).sum())
        return {"count": num, "mean": centre, "variance": spread / num}
