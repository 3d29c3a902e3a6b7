"""What the loss would feel if a block's weights changed, and how large these weights are."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, final

from avss.statistics.base import AbstractStatistic, Probe, Rows, require

if TYPE_CHECKING:
    from torch import Tensor

    from avss.statistics.observation import GradientNumbers, WeightNumbers


@final
@dataclasses.dataclass(frozen=True)
class GradientNorms(AbstractStatistic):
    r"""Size of the gradient of the loss with respect to a block's weight matrices, and its product with the weights.

    With all matrices of the block in one vector $w$, and $g_b$ the gradient of the mean loss of batch $b$ over its
    $n_b$ targets,

    $$\text{l1} = \frac{\sum_b n_b \|g_b\|_1}{\sum_b n_b}, \quad
      \text{l2} = \frac{\sum_b n_b \|g_b\|_2}{\sum_b n_b}, \quad
      \text{taylor} = \frac{\sum_b n_b \|w \odot g_b\|_1}{\sum_b n_b}$$

    Norms are taken batch by batch and then averaged, rather than of a gradient added up over all batches: one matrix's
    gradient is held at a time instead of a copy of the model, and each batch is a row, so the spread is known. The
    numbers depend on the batch size, since gradients of a larger batch cancel more; compare blocks, not runs. With all
    sequences in one batch both ways are the same.

    Biases and norms are left out: they are a thousandth of the weights, and the published formulas speak of matrices.

    References:
        Kim et al. (2024), Shortened LLaMA, arXiv 2402.02834 (`taylor`); Song et al. (2024), AVSS, arXiv 2411.02117 logs
        norms of gradients.
    """

    probe: ClassVar[Probe] = "backward"
    has_first_token: ClassVar[bool] = False
    row_is: ClassVar[Literal["sequence", "batch", "model"]] = "batch"

    def observe(self, seen: "GradientNumbers") -> "dict[str, Tensor]":
        return {
            "targets": seen.targets.double().reshape(1),
            "l1": seen.l1.sum().reshape(1),
            "l2": seen.l2.square().sum().sqrt().reshape(1),
            "taylor": seen.taylor.sum().reshape(1),
        }

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        targets = float(rows.columns["targets"].sum()) if rows.columns else 0.0
        require(targets, "gradient of the loss")
        return {
            name: float((rows.columns["targets"] * rows.columns[name]).sum()) / targets
            for name in ("l1", "l2", "taylor")
        }


@final
@dataclasses.dataclass(frozen=True)
class WeightNorms(AbstractStatistic):
    r"""$\sum |w|$ and $(\sum w^2)^{1/2}$ over all weight matrices of a block. Needs no text."""

    probe: ClassVar[Probe] = "weights"
    has_first_token: ClassVar[bool] = False
    row_is: ClassVar[Literal["sequence", "batch", "model"]] = "model"

    def observe(self, seen: "WeightNumbers") -> "dict[str, Tensor]":
        return {"l1": seen.l1.sum().reshape(1), "l2": seen.l2.square().sum().sqrt().reshape(1)}

    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        require(rows.num_sequences, "size of the weights")
        # Several processes see the same weights.
        return {name: float(rows.columns[name].mean()) for name in ("l1", "l2")}
