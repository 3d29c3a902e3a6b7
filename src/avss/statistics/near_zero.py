"""How many activations are close to zero."""

import dataclasses
from typing import TYPE_CHECKING, final

from avss.statistics.base import AbstractStatistic, Rows, Site, require, total

if TYPE_CHECKING:
    from torch import Tensor

    from avss.statistics.observation import Observation


@final
@dataclasses.dataclass(frozen=True)
class NearZero(AbstractStatistic):
    r"""Share of activations with $|a| < \varepsilon$.

    At the published absolute threshold of 1e-5 a residual stream of unit scale has about eight such values in a
    million, and the share measures little but the inverse of the scale. A threshold relative to the token's root mean
    square does not move when the stream grows.

    Attributes:
        site: Where to look.
        threshold: In activation units, or as a share of the token's root mean square if `relative`.
        relative: Whether the threshold scales with the token.
    """

    site: Site = "output"
    threshold: float = 1e-2
    relative: bool = True

    def observe(self, seen: "Observation") -> "dict[str, Tensor]":
        hidden = seen.at(self.site)
        below = hidden.count_below(self.threshold, relative=self.relative)
        return {"below": seen.by_part(below), "count": seen.num_tokens * hidden.width}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        below = total(rows, "below", first_token=first_token)
        count = total(rows, "count", first_token=first_token)
        require(count, "share of near-zero activations")
        # Laplace's rule: never exactly zero or one, so a ratio with it stays finite; no effect on large counts.
        return {"below": below, "count": count, "share": below / count, "smoothed_share": (below + 1) / (count + 2)}
