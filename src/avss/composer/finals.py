"""The last choice of a search: the sets that came closest are cut, repaired cheaply, and judged once more.

What is best raw need not be best repaired: a repair mends one long gap better than many short ones, or the other way
round, as the model has it. And what answers text best need not choose best among answers: of sets that are about as
near to the dense model on running text, some have lost what tells answers apart, and nothing in the text shows it. So
where prompts ask for a choice, finalists are judged by both.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

from avss.compensation import ChoiceYardstick, Yardstick, compensate, evenly, split
from avss.cut import cut
from avss.data.augment import Asked
from avss.data.batches import Batches
from avss.errors import UnsupportedArchitectureError
from avss.models.load import Loaded
from avss.progress import MayGoOn, Timed, always
from avss.record import Finalist, Plan

TOKENS = 24_576
"""Of the calibration text, at most: what a finalist is repaired with and judged by."""

PROMPTS = 384
"""Prompts that finalists are judged by too, at most."""

SCREENING = 192
"""Of these, that all sets are measured on raw."""

Removed = tuple[int, ...]


def judge_finalists(
    loaded: Loaded,
    sets: Mapping[Removed, str],
    batches: Batches,
    num_finalists: int,
    timed: Timed,
    may_go_on: MayGoOn = always,
    prompts: Callable[[], Sequence[Asked]] = tuple,
) -> tuple[Finalist, ...]:
    """The sets that are nearest to the dense model raw, repaired by least squares, the best one then first.

    What is compared is the divergence on text; with prompts, times the share of the choices that is lost
    (`ChoiceYardstick`), raw and repaired.

    All are judged on the same sequences, which no repair was fitted to.

    Args:
        loaded: The model; left as it was.
        sets: Sets of one size -> where each comes from.
        batches: Calibration text.
        num_finalists: How many of them are repaired.
        timed: Where progress goes.
        may_go_on: Asked before each set but the first is measured, and before each but the nearest is repaired.
        prompts: Makes what asks for one of several answers; `PROMPTS` of them are read, as many of each kind, and
            `SCREENING` of them by every set.

    Returns:
        Empty where nothing can be repaired in this model, or there was time for one set only: then raw is all there is.
    """
    text = batches.first(TOKENS).rewritten()
    asked = evenly(prompts(), PROMPTS)
    with timed("Judging the best sets after a repair") as advance:
        measure = Yardstick(loaded, split(text)[2], num_shared=0)
        lost = ChoiceYardstick(loaded, asked)
        # Of many kinds a few each would say nothing.
        lost_raw = ChoiceYardstick(loaded, evenly(asked, SCREENING)) or lost
        raw: dict[Removed, float] = {}
        for removed in sets:
            if not raw or may_go_on():
                with contextlib.suppress(UnsupportedArchitectureError):  # a set that cannot go is no finalist
                    smaller = cut(loaded, _plan(loaded, removed))
                    raw[removed] = measure(smaller) * (lost_raw(smaller) if lost_raw else 1.0)
        if len(raw) < 2:
            return ()  # nothing to choose from
        nearest = sorted(raw, key=lambda removed: raw[removed])[:num_finalists]
        found = []
        for place, removed in enumerate(nearest):
            if found and not may_go_on():
                break
            plan = _plan(loaded, removed)
            repaired, story = compensate(loaded, cut(loaded, plan), plan, text, method="refit")
            if math.isnan(story.before):
                return ()
            one = Finalist(removed=removed, source=sets[removed], before=story.before, after=story.after)
            found.append(one.model_copy(update={"lost": lost(repaired)}) if lost else one)
            advance(place + 1, len(nearest))
    return tuple(sorted(found, key=lambda one: one.damage))


def _plan(loaded: Loaded, removed: Removed) -> Plan:
    return Plan(num_blocks=len(loaded.stack), removed=removed, method="finalist", rule="judged after a repair")
