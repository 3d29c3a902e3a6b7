"""A measure whose every cost is known: the search's stand-in for a model."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from avss.search.ledger import FloatArray, Removed


class KnownCosts:
    """Costs that add up block by block, with interactions between pairs, and noise that differs between sequences.

    Args:
        alone: Cost of each block alone.
        together: (block, block) -> what losing both costs beyond the sum; negative where they are redundant together.
        num_batches: Batches.
        batch_size: Sequences in each.
        spread: Standard deviation, over sequences, of how hard a sequence is: shared by all sets.
        noise: Standard deviation of what no two sets share.
        seed: Of all of it.

    Attributes:
        calls: (sets, batch) of every call.
    """

    def __init__(
        self,
        alone: Sequence[float],
        together: dict[tuple[int, int], float] | None = None,
        *,
        num_batches: int = 8,
        batch_size: int = 4,
        spread: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.alone = tuple(alone)
        self.together = together or {}
        self.num_batches, self.batch_size = num_batches, batch_size
        self._noise, self._seed = noise, seed
        draw = np.random.default_rng(seed)
        self._hardness = spread * draw.standard_normal((num_batches, batch_size))
        self.calls: list[tuple[tuple[Removed, ...], int]] = []

    def truth(self, removed: Iterable[int]) -> float:
        """The cost without noise."""
        blocks = sorted(removed)
        pairs = itertools.combinations(blocks, 2)
        return sum(self.alone[b] for b in blocks) + sum(self.together.get(pair, 0.0) for pair in pairs)

    def best(self, size: int, free: Iterable[int] | None = None) -> Removed:
        """The truly best set of a size: all of them are tried."""
        blocks = range(len(self.alone)) if free is None else free
        return frozenset(min(itertools.combinations(blocks, size), key=self.truth))

    def __call__(self, sets: Sequence[Removed], batches: Sequence[int]) -> list[FloatArray]:
        """See `avss.search.ledger.Measure`; column 1 is twice the cost."""
        found = []
        for batch in batches:
            self.calls.append((tuple(sets), batch))
        for one in sets:
            rows = []
            for batch in batches:
                own = np.random.default_rng([self._seed, batch, *sorted(one)]).standard_normal(self.batch_size)
                rows.append(self.truth(one) + self._hardness[batch] + self._noise * own)
            costs = np.concatenate(rows)
            found.append(np.stack([costs, 2 * costs], axis=1))
        return found
