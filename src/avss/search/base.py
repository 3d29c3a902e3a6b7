"""What all methods share: the rules of a search, the curve it draws, and the order in which blocks are tried."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from avss.errors import ConfigError
from avss.search.ledger import BudgetSpent, Ledger, Removed
from avss.search.race import race

BestSoFar = Callable[[int, Removed, float], None]
"""Called with (size, set, its cost) whenever a size has a new best set."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What may go, and how hard to look.

    Attributes:
        count: The largest number of blocks to remove.
        free: Blocks that may go.
        prior: A guess of each block's importance, lower goes first, `[num_blocks]`; None: the measured cost of leaving
            out each block alone, on the first batch.
        fallback: Makes such a guess where the budget does not reach for measuring each block alone; None: such a budget
            is refused.
        width: Blocks tried in each step before it is asked whether that was enough.
        beam: Sets of each size that the next size is built from.
        num_windows: Runs of neighbours of each size that compete with what was built; 0 for none.
        rounds: Rounds of exchanging single blocks at the end; 0 for none.
        error: Bound on the probability that a race drops its true best, 0 to 1.
        population: Sets of a generation of the evolution.
        generations: Most generations of the evolution.
        seed: Of the evolution's draws.
    """

    count: int
    free: tuple[int, ...]
    prior: tuple[float, ...] | None = None
    fallback: Callable[[], Sequence[float]] | None = dataclasses.field(default=None, compare=False)
    width: int = 6
    beam: int = 1
    num_windows: int = 2
    rounds: int = 2
    error: float = 0.1
    population: int = 8
    generations: int = 40
    seed: int = 0


class Curve:
    """The best set found of every size, and how it was found.

    Args:
        ledger: Knows the costs.
        on_best: Told of each improvement.

    Attributes:
        best: Size -> set.
        how: Size -> the step that found it: `greedy`, `window`, `exchange`, `evolution`, `put back` or, where the
            budget ended before, `prior`: such a set was not measured.
        is_complete: Whether the budget lasted to the end of the search.
    """

    def __init__(self, ledger: Ledger, on_best: BestSoFar) -> None:
        self.best: dict[int, Removed] = {}
        self.how: dict[int, str] = {}
        self.is_complete = True
        self._ledger = ledger
        self._on_best = on_best

    def put(self, removed: Removed, how: str) -> None:
        """Notes the best set of a size."""
        if self.best.get(len(removed)) == removed:
            return
        self.best[len(removed)], self.how[len(removed)] = removed, how
        self._on_best(len(removed), removed, self._ledger.mean(removed))

    def challenge(self, sets: Iterable[Removed], how: str, error: float, allowance: float = math.inf) -> bool:
        """Lets sets of one size race against the best of that size; True if one of them won."""
        challengers = [one for one in dict.fromkeys(sets) if one]
        if not challengers:
            return False
        holder = self.best.get(len(challengers[0]))
        runners = [*([holder] if holder else []), *challengers]
        winner = race(self._ledger, runners, error=error, allowance=allowance)[0]
        if winner == holder:
            return False
        self.put(winner, how)
        return True

    def finish(self, rules: Rules, order: Sequence[int]) -> "Curve":
        """Fills the sizes that the budget did not reach, and spends what is left on measuring all sets in full.

        Args:
            rules: Of the search.
            order: Free blocks, the likeliest to go first.
        """
        for size in range(1, rules.count + 1):
            if size in self.best:
                continue
            base = self.best.get(size - 1, frozenset())
            more = next(block for block in order if block not in base)
            self.best[size], self.how[size] = base | {more}, "prior"
            self.is_complete = False
        for size in range(rules.count, 0, -1):
            try:
                self._ledger.ask([self.best[size]], range(self._ledger.num_batches))
            except BudgetSpent:
                self.is_complete = False
        for size in range(1, rules.count + 1):
            if self.how[size] == "prior" and self._ledger.batches_of(self.best[size]):
                self.how[size] = "prior, then measured"
        return self


class Order:
    """Free blocks from the one that most likely goes next to the one that least likely does.

    Starts with the prior, and learns: what a block added to the cost when it was last tried takes the prior's place.

    Args:
        ledger: Knows the costs.
        rules: Which blocks are free, and the prior.

    Raises:
        ConfigError: The budget does not reach for measuring each block alone, and there is nothing to fall back on.
    """

    def __init__(self, ledger: Ledger, rules: Rules) -> None:
        self._free = rules.free
        self._added: dict[int, float] = {}
        prior: Sequence[float] | None = rules.prior
        if prior is None and not self._screen(ledger):
            if rules.fallback is None:
                raise ConfigError(
                    f"The budget of the search is too small to measure each of {len(rules.free)} blocks alone, which "
                    f"comes first and takes {ledger.price([frozenset({one}) for one in rules.free], 0)}. Give it more, "
                    "or try blocks in the order of a score, e.g. `--screen block-influence`."
                )
            prior = rules.fallback()
        self._rank = {block: float(place if prior is None else prior[block]) for place, block in enumerate(rules.free)}

    def _screen(self, ledger: Ledger) -> bool:
        """Measures each block alone on the first batch, if the budget reaches for all of them; whether it did."""
        alone = [frozenset({block}) for block in self._free]
        if not ledger.has_room(alone, 0):
            return False
        # The first shows how long the others will take.
        for some in (alone[:1], alone[1:]):
            if not ledger.has_room(some, 0):
                return False
            ledger.ask(some, [0])
        self._added = {block: ledger.mean(frozenset({block})) for block in self._free}
        return True

    def learn(self, ledger: Ledger, base: Removed, tried: Iterable[int]) -> None:
        """Notes what each tried block added to a base."""
        for block in tried:
            one = base | {block}
            shared = [batch for batch in ledger.batches_of(one) if not base or batch in ledger.batches_of(base)]
            if shared:
                before = ledger.costs([base], shared).mean() if base else 0.0
                self._added[block] = float(ledger.costs([one], shared).mean() - before)

    def __call__(self) -> list[int]:
        """The blocks in order. Those never tried stand where the prior puts them among those that were."""
        if len(self._added) in (0, len(self._free)):
            return sorted(self._free, key=lambda block: (self._added.get(block, 0.0), self._rank[block], block))
        by_prior = sorted(self._free, key=lambda block: (self._rank[block], block))
        tried = iter(sorted(self._added, key=lambda block: (self._added[block], block)))
        return [next(tried) if block in self._added else block for block in by_prior]

    def of_window(self, start: int, size: int) -> float:
        """A guess at what a run of neighbours costs: the sum over its blocks."""
        # Costs add up better than places do, where all are known.
        all_tried = len(self._added) == len(self._free)
        guess = self._added if all_tried else {block: float(place) for place, block in enumerate(self())}
        return sum(guess[block] for block in range(start, start + size))


def free_windows(rules: Rules, size: int) -> list[int]:
    """First blocks of the runs of neighbours of a size that are free of protected ones."""
    free = set(rules.free)
    return [start for start in rules.free if free.issuperset(range(start, start + size))]
