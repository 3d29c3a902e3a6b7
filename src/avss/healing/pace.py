"""How far a budget is used up, and what follows from it: the learning rate, when to measure, when to stop."""

import dataclasses
import math
from collections.abc import Callable

from avss.config import Budget

Clock = Callable[[], float]
"""Seconds from any fixed moment on."""


@dataclasses.dataclass
class Pace:
    """A budget and what has been used of it.

    The share used is that of time or of tokens, whichever is larger, so one schedule serves both. Of a time budget the
    seconds that the last validation takes are set aside, and no step is begun that would not end before them.

    Attributes:
        budget: The whole.
        num_tokens: Tokens trained on.
        seconds: Wall time used, that before an interruption too.
        reserve: Seconds set aside for the last validation.
        step_seconds: How long the slowest of the last steps took.
    """

    budget: Budget
    num_tokens: int = 0
    seconds: float = 0.0
    reserve: float = 0.0
    step_seconds: float = 0.0

    @property
    def used(self) -> float:
        """Share of the budget used, 0 to 1."""
        shares = [0.0]
        if self.budget.tokens is not None:
            shares.append(self.num_tokens / self.budget.tokens)
        if self.budget.seconds is not None:
            available = self.budget.seconds - self.reserve
            shares.append(self.seconds / available if available > 0 else 1.0)
        return min(1.0, max(shares))

    def middle_of_step(self, num_tokens: int) -> float:
        """Share of the budget used in the middle of the next step, which has so many tokens.

        A step larger than what is left of the tokens counts as what is left: the only one of a small budget must learn.
        """
        if self.budget.tokens is not None:
            num_tokens = min(num_tokens, max(0, self.budget.tokens - self.num_tokens))
        half = Pace(self.budget, self.num_tokens + num_tokens // 2, self.seconds + self.step_seconds / 2, self.reserve)
        return half.used

    def has_room(self) -> bool:
        """Whether another step fits."""
        if self.used >= 1:
            return False
        if self.budget.seconds is None:
            return True
        return self.seconds + self.step_seconds + self.reserve <= self.budget.seconds

    def num_validations(self, wanted: int) -> int:
        """How many equal parts of the budget end with a validation: of a time, a tenth is spent on them at most."""
        if self.budget.seconds is None or self.reserve <= 0:
            return wanted
        return min(wanted, max(1, int(0.1 * self.budget.seconds / self.reserve)))

    def note_step(self, seconds: float) -> None:
        """Learns how long a step takes; a slow one is forgotten by and by, since machines are shared."""
        self.step_seconds = max(seconds, 0.9 * self.step_seconds)


def learning_rate_factor(used: float, warmup: float) -> float:
    """Share of the peak learning rate: up in a line over the warm-up, then down to 0 along half a cosine.

    Example:
        >>> [round(learning_rate_factor(used, 0.1), 3) for used in (0.05, 0.1, 0.55, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if used < warmup:
        return used / warmup
    return 0.5 * (1 + math.cos(math.pi * (used - warmup) / (1 - warmup)))
