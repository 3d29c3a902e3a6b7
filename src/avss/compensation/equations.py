"""Ridge regression from a stream of tokens: float64 normal equations that never hold more than one batch of them."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Relative ridges to choose from: a share of the mean square of a feature."""


@dataclasses.dataclass
class NormalEquations:
    r"""The sums that a least-squares problem $\min_W \sum_t w_t \lVert r_t - W^\top f_t \rVert^2$ consists of.

    Everything about it, the residual of *any* $W$ included, follows from three sums over tokens, so that a ridge is
    chosen on held-out text without a further pass.

    Some tokens are *anchors*: they take part in the fit, but are no part of its error nor of the features' scale. The
    attention sink is one. It is a thousand times larger than the rest, so it would hide their error and blow up the
    ridge; left out of the fit, it is moved at random, and every later attention with it.

    Attributes:
        gram: $\sum_t w_t f_t f_t^\top$, `[F, F]`.
        cross: $\sum_t w_t f_t r_t^\top$, `[F, D]`.
        anchor_gram: The first sum over the anchors.
        anchor_cross: The second sum over the anchors.
        power: $\sum_t w_t \lVert r_t \rVert^2$.
        weight: $\sum_t w_t$.
        num_tokens: Tokens added, anchors not counted.
        groups: Sizes of the feature groups; each has its own scale, to which the ridge is relative. A last feature
            beyond them is the constant of an affine map and is not shrunk.
    """

    gram: Tensor
    cross: Tensor
    anchor_gram: Tensor
    anchor_cross: Tensor
    groups: tuple[int, ...]
    power: float = 0.0
    weight: float = 0.0
    num_tokens: int = 0

    @classmethod
    def empty(cls, groups: Sequence[int], num_outputs: int, *, affine: bool) -> Self:
        """No token yet.

        Args:
            groups: Sizes of the feature groups.
            num_outputs: Width of the residual.
            affine: Whether a constant is added to the features.
        """
        size = sum(groups) + affine
        grams = [torch.zeros(size, size, dtype=torch.float64) for _ in range(2)]
        crosses = [torch.zeros(size, num_outputs, dtype=torch.float64) for _ in range(2)]
        return cls(grams[0], crosses[0], grams[1], crosses[1], tuple(groups))

    def add(self, features: Tensor, residuals: Tensor, weights: Tensor | None = None) -> None:
        """Adds tokens: features `[N, F]` (without the constant), residuals `[N, D]`, weights `[N]` or all one."""
        gram, cross, residuals, scaled = self._sums(features, residuals, weights)
        self.gram += gram
        self.cross += cross
        self.power += float((residuals * scaled).sum())
        self.weight += float(len(features) if weights is None else weights.sum())
        self.num_tokens += len(features)

    def add_anchors(self, features: Tensor, residuals: Tensor, weights: Tensor | None = None) -> None:
        """Adds anchors, shaped as in `add`."""
        gram, cross, _, _ = self._sums(features, residuals, weights)
        self.anchor_gram += gram
        self.anchor_cross += cross

    def _sums(
        self, features: Tensor, residuals: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Apple's GPU has no float64.
        device = torch.device("cpu") if features.device.type == "mps" else features.device
        features, residuals = features.detach().to(device, torch.float64), residuals.detach().to(device, torch.float64)
        if features.shape[1] < len(self.gram):
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        scaled = residuals if weights is None else residuals * weights.to(device, torch.float64)[:, None]
        weighted = features if weights is None else features * weights.to(device, torch.float64)[:, None]
        return (features.T @ weighted).cpu(), (features.T @ scaled).cpu(), residuals, scaled

    def solve(self, ridge: float) -> Tensor:
        r"""The minimiser of $\sum_t w_t \lVert r_t - W^\top f_t \rVert^2 + \sum_i \lambda_i \lVert W_i \rVert^2$.

        Args:
            ridge: $\lambda_i$ as a share of the mean $\sum_t w_t f_{ti}^2$ of its group, anchors not counted.

        Returns:
            $W$, `[F, D]`.
        """
        diagonal = self.gram.diagonal()
        shrink = torch.zeros_like(diagonal)
        start = 0
        for size in self.groups:
            # A group that is always zero has nothing to say; any positive number keeps its weights at zero.
            scale = float(diagonal[start : start + size].mean()) or 1.0
            shrink[start : start + size] = max(ridge, 1e-12) * scale
            start += size
        if len(diagonal) > start:
            shrink[start] = 1e-12 * max(float(diagonal[start]), 1.0)
        system = self.gram + self.anchor_gram + torch.diag(shrink)
        cross = self.cross + self.anchor_cross
        factor, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            return torch.linalg.lstsq(system, cross, driver="gelsd").solution
        return torch.cholesky_solve(cross, factor)

    def error(self, solution: Tensor | None = None) -> float:
        r"""Mean squared residual a token under a solution; of the residuals themselves where there is none."""
        if not self.weight:
            return float("nan")
        if solution is None:
            return self.power / self.weight
        fitted = float((solution * (self.gram @ solution)).sum()) - 2 * float((solution * self.cross).sum())
        return max(0.0, self.power + fitted) / self.weight


def choose_ridge(fit: NormalEquations, held: NormalEquations, ridges: Sequence[float] = RIDGES) -> tuple[float, Tensor]:
    """The ridge with the least residual on held-out tokens, and its solution on the fitted ones."""
    solutions = {ridge: fit.solve(ridge) for ridge in ridges}
    best = min(solutions, key=lambda ridge: (held.error(solutions[ridge]), -ridge))
    return best, solutions[best]
