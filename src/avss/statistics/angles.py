"""How far the residual stream turns across runs of neighbouring blocks."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, final

from avss.statistics.base import AbstractStatistic, Probe, Rows, require

if TYPE_CHECKING:
    from torch import Tensor

    from avss.statistics.observation import Windows


@final
@dataclasses.dataclass(frozen=True)
class WindowAngles(AbstractStatistic):
    r"""Angle between the input of block l and the input of block l + n, for every run [l, l + n) of the stack.

    $$d(l, n) = \frac1N \sum_t \frac1\pi \arccos \frac{x^{(l)}_t \cdot x^{(l+n)}_t}{\|x^{(l)}_t\| \|x^{(l+n)}_t\|}$$

    Here $x^{(l)}$ is what goes into block l, and $x^{(L)}$ what comes out of the last one, before any final norm. The
    run holds the n blocks l to l + n - 1: what removing exactly these would skip. 0 is the same direction, 0.5 a right
    angle, 1 the opposite one. Inverse cosines are averaged, not cosines: the order of runs may differ.

    All runs come from the one forward pass: L (L + 1) / 2 dot products a token.

    Attributes:
        token: `last`, as published: the last real token of each sequence; or `all` of them (but see `Passage`).

    References:
        Gromov et al. (2024), The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887.
    """

    token: Literal["last", "all"] = "last"

    probe: ClassVar[Probe] = "stack"

    def observe(self, seen: "Windows") -> "dict[str, Tensor]":
        return {"angles": seen.angles, "tokens": seen.tokens}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        """`window_1` to `window_n`: one value for each run that begins at this block and fits into the stack."""
        require(rows.num_sequences, "angle across a run of blocks")
        start = 0 if first_token else 1
        tokens = float(rows.columns["tokens"][:, start:].sum())
        require(tokens, "angle across a run of blocks")
        angles = rows.columns["angles"][:, start:].sum((0, 1)) / tokens
        return {f"window_{length}": float(angle) for length, angle in enumerate(angles, start=1)}
