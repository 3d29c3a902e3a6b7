"""The ledger of a search: every measurement once, what it cost, and the end of the budget.

A search is a deterministic function of what it measures, so the ledger is all that needs to be kept of it: a search
that was killed is run again from the start, its measurements are read from the file, and it goes on where it was cut
off. Time and passes that the dead search spent count as spent.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Removed = frozenset[int]
"""Blocks left out, original indices."""


class Measure(Protocol):
    """What measures: the one thing a search is given."""

    def __call__(self, sets: Sequence[Removed], batches: Sequence[int]) -> list[FloatArray]:
        """What each set costs on each sequence of some batches.

        Args:
            sets: Blocks to leave out; all different.
            batches: Which batches of the text.

        Returns:
            One array per set, `[S, C]`: the sequences in the order of the batches. Column 0 is the cost, lower =
            better; what the other columns are is the caller's business.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a search may spend.

    Attributes:
        passes: Most passes of the whole model over the whole text; inf for no limit. Blocks are counted, so half of
            the blocks on half of the text is a quarter of a pass.
        seconds: Most seconds of measuring; inf for no limit.
    """

    passes: float = math.inf
    seconds: float = math.inf


class BudgetSpent(Exception):
    """The next measurement would exceed the budget."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """One measurement as the file holds it."""

    sets: tuple[tuple[int, ...], ...]
    batch: int
    rows: list[FloatArray]
    seconds: float


_Calls = dict[tuple[tuple[tuple[int, ...], ...], int], _Call]


class Ledger:
    """Measures through `measure`, each set on each batch at most once.

    Args:
        measure: What measures.
        num_blocks: Length of the stack.
        num_batches: Batches of the text.
        budget: What may be spent.
        path: A file to keep the measurements in, written after each; None keeps them in memory only.
        key: What the measurements depend on, as a text: a file of another key is started anew.
        dense_each_time: Whether the whole model is run again for each measurement (its answers do not fit in memory).
        shares_prefixes: Whether `measure` computes common beginnings once; else every set costs all its kept blocks.

    Attributes:
        num_blocks_run: Blocks computed so far, in units of one block on one batch.
        num_sets: Different sets measured on at least one batch.
        seconds: Time spent measuring, by an earlier process too.
        on_call: Called after each measurement, for progress.
    """

    def __init__(
        self,
        measure: Measure,
        *,
        num_blocks: int,
        num_batches: int,
        budget: Budget | None = None,
        path: Path | None = None,
        key: str = "",
        dense_each_time: bool = False,
        shares_prefixes: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_batches = num_batches
        self.num_blocks_run = 0
        self.seconds = 0.0
        self.on_call: Callable[[], None] = lambda: None
        self._measure = measure
        self._budget = budget or Budget()
        self._rows: dict[Removed, dict[int, FloatArray]] = {}
        self._seen: set[int] = set()
        self._shares_prefixes = shares_prefixes
        self._path = path
        header = {"avss-search": 1, "key": key, "dense_each_time": dense_each_time}
        recorded, header = _read(path, header) if path is not None else ({}, header)
        self._recorded = recorded
        # On another machine more or less may fit into memory; the counts stay those of the search that was begun.
        self._dense_each_time = bool(header["dense_each_time"])

    @property
    def passes(self) -> float:
        """Passes of the whole model over the whole text that were spent."""
        return self.num_blocks_run / (self.num_blocks * self.num_batches)

    @property
    def num_blocks_left(self) -> float:
        """Blocks that the budget still allows, at the pace so far if it is in seconds; inf without a limit."""
        by_passes = self._budget.passes * self.num_blocks * self.num_batches - self.num_blocks_run
        by_time = (self._budget.seconds - self.seconds) / self._pace if self._pace else math.inf
        return max(0.0, min(by_passes, by_time))

    @property
    def num_sets(self) -> int:
        """Different sets measured on at least one batch."""
        return len(self._rows)

    @property
    def sets(self) -> list[Removed]:
        """These sets, in the order in which they were first measured."""
        return list(self._rows)

    @property
    def share_spent(self) -> float:
        """Share of the budget that is spent, 0 to 1; 0 where there is no limit."""
        return max(self.passes / self._budget.passes, self.seconds / self._budget.seconds)

    def known(self, removed: Removed) -> FloatArray:
        """What is known of a set, `[S, C]`: the sequences of all batches it was measured on, in batch order."""
        rows = self._rows.get(removed, {})
        return np.concatenate([rows[batch] for batch in sorted(rows)]) if rows else np.empty((0, 1))

    def batches_of(self, removed: Removed) -> tuple[int, ...]:
        """Batches that a set was measured on."""
        return tuple(sorted(self._rows.get(removed, ())))

    def mean(self, removed: Removed) -> float:
        """Mean cost over the sequences measured; inf for a set that was not, and for costs that are no numbers."""
        costs = self.known(removed)[:, 0]
        value = float(costs.mean()) if len(costs) else math.inf
        return value if math.isfinite(value) else math.inf

    def costs(self, sets: Iterable[Removed], batches: Sequence[int]) -> FloatArray:
        """Costs of measured sets on the same sequences, `[sets, S]`."""
        return np.stack([np.concatenate([self._rows[one][batch][:, 0] for batch in batches]) for one in sets])

    def ask(self, sets: Iterable[Removed], batches: Iterable[int]) -> None:
        """Makes sure that every set is measured on every one of the batches.

        Raises:
            BudgetSpent: That would exceed the budget. What fitted is kept.
        """
        wanted = list(dict.fromkeys(sets))
        for batch in batches:
            lacking = [one for one in wanted if batch not in self._rows.get(one, {})]
            # What shares nothing is measured, and kept, one by one.
            calls = [lacking] if self._shares_prefixes else [[one] for one in lacking]
            for call in calls:
                if call:
                    self._call(call, batch)

    def has_room(self, sets: Iterable[Removed], batch: int) -> bool:
        """Whether the budget reaches for measuring these sets on a batch, at the pace so far if it is in seconds."""
        cost = self._cost([one for one in sets if batch not in self._rows.get(one, {})], batch)
        passes = (self.num_blocks_run + cost) / (self.num_blocks * self.num_batches)
        return passes <= self._budget.passes and self.seconds + self._pace * cost <= self._budget.seconds

    def price(self, sets: Iterable[Removed], batch: int) -> str:
        """What measuring these sets on a batch takes, in words: passes, and seconds where a pace is known."""
        cost = self._cost(list(sets), batch)
        passes = f"{cost / (self.num_blocks * self.num_batches):.3g} passes"
        return f"{passes}, about {self._pace * cost:.3g} s" if self._pace else passes

    @property
    def _pace(self) -> float:
        """Seconds a block on a batch has taken so far; 0 before the first measurement."""
        return self.seconds / self.num_blocks_run if self.num_blocks_run else 0.0

    def _call(self, sets: list[Removed], batch: int) -> None:
        if not self.has_room(sets, batch):
            raise BudgetSpent
        cost = self._cost(sets, batch)
        names = tuple(tuple(sorted(one)) for one in sets)
        call = self._recorded.get((names, batch))
        if call is None:
            start = time.perf_counter()
            rows = self._measure(sets, [batch])
            call = _Call(names, batch, rows, time.perf_counter() - start)
            self._write(call)
        self.num_blocks_run += cost
        self.seconds += call.seconds
        self._seen.add(batch)
        for one, rows in zip(sets, call.rows, strict=True):
            self._rows.setdefault(one, {})[batch] = rows
        self.on_call()

    def _cost(self, sets: Sequence[Removed], batch: int) -> int:
        dense = self.num_blocks if self._dense_each_time or batch not in self._seen else 0
        apart = sum(self.num_blocks - len(one) for one in sets)
        return dense + (blocks_run(sets, self.num_blocks) if self._shares_prefixes else apart)

    def _write(self, call: _Call) -> None:
        if self._path is None:
            return
        line = {
            "sets": call.sets,
            "batch": call.batch,
            "rows": [one.tolist() for one in call.rows],
            "seconds": call.seconds,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def blocks_run(sets: Iterable[Removed], num_blocks: int) -> int:
    """Blocks that these sets take on one batch whose whole model was run, each shared beginning computed once.

    Example:
        >>> blocks_run([frozenset({1}), frozenset({2})], num_blocks=4)  # 3 after 2; then 2 and 3 after 1
        3
    """
    total, before = 0, frozenset[int]()
    for one in sorted(set(sets), key=lambda one: tuple(block in one for block in range(num_blocks))):
        start = min(one ^ before, default=num_blocks)
        total += sum(block not in one for block in range(start, num_blocks))
        before = one
    return total


def _read(path: Path, header: dict[str, Any]) -> tuple[_Calls, dict[str, Any]]:
    """The calls in a file, and its header; a new file where there is none of this key."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    parsed, good = [], []
    for line in lines:
        # A process that was killed while it wrote leaves half a line at the end.
        try:
            parsed.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith("\n"):
            parsed.pop()
            break
        good.append(line)
    is_same = bool(parsed) and isinstance(parsed[0], dict) and parsed[0].get("key") == header["key"]
    is_same = is_same and parsed[0].get("avss-search") == header["avss-search"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(good) if is_same else json.dumps(header) + "\n", encoding="utf-8")
    partial.replace(path)
    if not is_same:
        return {}, header
    calls = (
        _Call(
            sets=tuple(tuple(one) for one in line["sets"]),
            batch=line["batch"],
            rows=[np.array(rows, dtype=np.float64) for rows in line["rows"]],
            seconds=line["seconds"],
        )
        for line in parsed[1:]
    )
    return {(call.sets, call.batch): call for call in calls}, parsed[0]
