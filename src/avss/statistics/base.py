"""What every statistic promises: rows of float64, one per sequence, that add up in any order.

A statistic is a frozen value that says *what* is observed (`NearZero(site="update", threshold=0.01)`). What it has seen
is a separate frozen value, `Rows`: one row per sequence and column. One class holds the algebra for all statistics:

- `Rows.empty` is the identity of `merge`;
- `merge` is associative, and commutes up to the order of rows, which no summary depends on;
- splitting the data into other batches gives the same rows.

Rows are kept per sequence because a confidence interval then needs no second pass: resample rows, summarise again.

No module of this room but `observation` imports torch: a criterion can name its statistics without it.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from avss.errors import NoObservationsError

if TYPE_CHECKING:
    from torch import Tensor

Site = Literal["input", "output", "update", "attention", "mlp", "mlp-activation"]
"""Where a block is observed: the residual stream before it, after it, or what it adds (output minus input); inside it,
the output of its attention, of its feed-forward part, or the activations inside the latter."""

Part = Literal["block", "attention", "mlp"]
"""What is between two states of the residual stream: the whole block, its attention, or its feed-forward part."""

INSIDE = frozenset({"attention", "mlp", "mlp-activation"})
"""Sites and parts inside a block."""

Probe = Literal["block", "stack", "backward", "weights"]
"""What feeds a statistic: each block's states in the forward pass, the states of all blocks of a batch together, the
backward pass of a batch, or the weights alone."""

FloatArray = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """What one statistic has seen of one block: float64 columns with one row per sequence.

    A backward pass gives one row per batch, since it has one loss; weights give a single row.

    Attributes:
        columns: Name -> array of shape `[S]` or `[S, 2]` (S sequences), possibly with more axes behind. Where there are
            two parts, part 0 is the first real token of each sequence and part 1 the rest, so that scores come with
            and without it.
    """

    columns: Mapping[str, FloatArray]

    @classmethod
    def empty(cls) -> Self:
        """Nothing seen: the identity of `merge`."""
        return cls(columns={})

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, one after the other."""
        filled = [part for part in parts if part.columns]
        if not filled:
            return cls.empty()
        return cls(
            columns={name: np.concatenate([part.columns[name] for part in filled]) for name in filled[0].columns}
        )

    def resample(self, rows: NDArray[np.intp]) -> Self:
        """The rows at these positions, with repetition: one bootstrap draw."""
        return type(self)(columns={name: column[rows] for name, column in self.columns.items()})

    @property
    def num_sequences(self) -> int:
        """Sequences seen."""
        return len(next(iter(self.columns.values()))) if self.columns else 0


@dataclasses.dataclass(frozen=True)
class AbstractStatistic(abc.ABC):
    """One thing that can be observed of a block. Subclasses are frozen dataclasses; their fields are their settings.

    Attributes:
        probe: What feeds it, and so what `observe` is given.
        counts_padding: Whether padding enters the numbers, as it does in the published script; False elsewhere.
        has_first_token: Whether its rows tell the first token of each sequence from the rest.
        row_is: What a row stands for. Resampling sequences means something for rows of sequences only.
    """

    probe: ClassVar[Probe] = "block"
    counts_padding: ClassVar[bool] = False
    has_first_token: ClassVar[bool] = True
    row_is: ClassVar[Literal["sequence", "batch", "model"]] = "sequence"

    @property
    def looks_inside(self) -> bool:
        """Whether it needs the states of a block's sub-layers."""
        return any(value in INSIDE for value in dataclasses.astuple(self) if isinstance(value, str))

    @abc.abstractmethod
    def observe(self, seen: Any) -> "dict[str, Tensor]":
        """The rows of one batch at one block, as float64 tensors on the batch's device.

        Called inside a hook: nothing here may wait for the device (`.item()`, boolean indexing, `.cpu()`).
        Tokens outside `seen.keep` must not matter, whatever they hold, nan included.

        Args:
            seen: By probe, from `avss.statistics.observation`: an `Observation`, a `Passage`, `GradientNumbers` or
                `WeightNumbers`.

        Returns:
            Column name -> tensor of shape `[B]` or `[B, 2]` (B sequences of the batch; parts as in `Rows`), possibly
            with more axes behind; `[1]` for a backward pass and for weights.
        """

    @abc.abstractmethod
    def summarise(self, rows: Rows, *, first_token: bool) -> dict[str, float]:
        """The statistic over all sequences.

        Args:
            rows: Everything seen of one block.
            first_token: Whether the first real token of each sequence counts.

        Raises:
            NoObservationsError: Nothing was kept. Usually the mask is inverted or the text is empty.
        """


def total(rows: Rows, name: str, *, first_token: bool) -> float:
    """Sum of an additive column over sequences, with or without the first tokens; 0 where nothing was seen."""
    if not rows.columns:
        return 0.0
    column = rows.columns[name]
    return float(column.sum() if first_token else column[:, 1].sum())


def require(count: float, what: str) -> None:
    """Refuses to divide by nothing.

    Raises:
        NoObservationsError: `count` is zero.
    """
    if count == 0:
        raise NoObservationsError(
            f"The {what} is undefined: no token was kept. The mask must be True for real tokens, and sequences need "
            "at least two tokens when the first is left out; check the text and `--seq-len`."
        )
