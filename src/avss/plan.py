"""Scores -> Plan: which blocks go. No torch, no model: a plan is arithmetic on one list of numbers."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence

from avss.config import TARGETS, PlanConfig, SearchConfig, as_given, refuse_unread
from avss.errors import ConfigError, InvalidPlanError
from avss.record import BlockScores, Plan


def parse_blocks(text: str, num_blocks: int) -> tuple[int, ...]:
    """Block indices from `3,12-15,-1`: single blocks, ranges with both ends included, negative from the end.

    Raises:
        InvalidPlanError: It is not such a list, or names a block that is not there.

    Example:
        >>> parse_blocks("1, 3-5, -1", 10)
        (1, 3, 4, 5, 9)
    """
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(-?\d+)(?:\s*-\s*(\d+))?", part)
        if match is None:
            raise InvalidPlanError(
                f"`{part}` is not a block. Write blocks as `3,12-15,-1`: both ends of a range count."
            )
        start = int(match[1])
        stop = int(match[2]) if match[2] else start
        if match[2] and start < 0:
            raise InvalidPlanError(
                f"The range `{part}` begins before the first block. Count both of its ends from the front, as in "
                "`3-5`; negative numbers name single blocks."
            )
        if stop < start:
            raise InvalidPlanError(f"The range `{part}` runs backwards. Write the smaller block first.")
        for block in (start, stop):
            if not -num_blocks <= block < num_blocks:
                raise InvalidPlanError(
                    f"There is no block `{block}`: the model has {num_blocks} blocks, 0 to {num_blocks - 1}."
                )
        found.update(block % num_blocks for block in range(start, stop + 1))
    return tuple(sorted(found))


def rounded_half_up(value: float) -> int:
    """To the nearest whole number, halves up, whatever the last bit of a product says: 0.29 * 50 is 14.5.

    Example:
        >>> rounded_half_up(0.29 * 50), rounded_half_up(0.7 * 45), rounded_half_up(7.4)
        (15, 32, 7)
    """
    return math.floor(round(value, 9) + 0.5)


def count_of_fraction(fraction: float, num_blocks: int) -> int:
    """Blocks in a share of the stack, rounded half up: 25 % of 30 is 8.

    Raises:
        InvalidPlanError: The share is not between 0 and 1, or rounds to no block or to all of them.

    Example:
        >>> count_of_fraction(0.25, 30), count_of_fraction(0.25, 6)
        (8, 2)
    """
    if not 0 < fraction < 1:  # nan fails both comparisons
        raise InvalidPlanError(f"The fraction `{fraction}` must lie between 0 and 1, both excluded; 0.25 is a quarter.")
    count = rounded_half_up(fraction * num_blocks)
    if count == 0:
        raise InvalidPlanError(
            f"The fraction `{fraction}` of {num_blocks} blocks rounds to none. Use at least {0.5 / num_blocks:.2g}, or "
            "`--count 1`."
        )
    return count


def protected_blocks(protect: str, num_blocks: int, *, protects_ends: bool) -> tuple[int, ...]:
    """The blocks a setting keeps out of the choice.

    Args:
        protect: `auto`, `none`, or a list as for `parse_blocks`.
        num_blocks: Length of the stack.
        protects_ends: Whether the criterion guards the first and the last block under `auto`.
    """
    if protect == "auto":
        return (0, num_blocks - 1) if protects_ends and num_blocks > 2 else ()
    return () if protect == "none" else parse_blocks(protect, num_blocks)


def protecting(config: PlanConfig, pinned: Iterable[int], num_blocks: int, *, protects_ends: bool) -> PlanConfig:
    """The settings with some more blocks protected, whatever `protect` says."""
    more = set(pinned)
    if not more:
        return config
    asked = protected_blocks(config.protect, num_blocks, protects_ends=protects_ends)
    return config.model_copy(update={"protect": ",".join(map(str, sorted({*asked, *more})))})


def explicit_plan(config: PlanConfig, num_blocks: int) -> Plan:
    """The plan of a list of blocks given by hand."""
    removed = parse_blocks(config.blocks or "", num_blocks)
    if not removed:
        raise InvalidPlanError("The list of blocks is empty. Name at least one, e.g. `--blocks 3,12-15`.")
    rule = f"{len(removed)} of {num_blocks} blocks ({len(removed) / num_blocks:.1%}), named by hand"
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule=rule)


def make_plan(scores: BlockScores, config: PlanConfig, *, protects_ends: bool = True) -> Plan:
    """The plan that a criterion's scores and the settings give.

    The lowest scores go; ties go by index. `contiguous` takes a run of neighbours instead: the one across which the
    measured distance is smallest where the criterion measured runs (`scores.windows`), else the one with the lowest
    sum. Under the rule `mass` the fraction is a share of the sum of scores, not of the number of blocks.

    Args:
        scores: One score per block, higher = keep.
        config: How many, and which may not go.
        protects_ends: The criterion's habit under `protect = auto`.

    Raises:
        ConfigError: None or several of fraction, count and blocks are given.
        InvalidPlanError: Nothing can be removed that way.
    """
    check_one_target(config)
    num_blocks = scores.num_blocks
    if config.blocks is not None:
        return explicit_plan(config, num_blocks)
    protected = protected_blocks(config.protect, num_blocks, protects_ends=protects_ends)
    free = [block for block in range(num_blocks) if block not in protected]
    if config.rule == "mass":
        return _plan_by_mass(scores, config, free, protected)
    count = config.count or count_of_fraction(config.fraction or 0, num_blocks)
    if count > len(free) or count >= num_blocks:
        raise InvalidPlanError(
            f"{count} blocks cannot be removed: {len(free)} of {num_blocks} may go"
            + (f", {len(protected)} are protected" if protected else " and one must stay")
            + ". Remove fewer, or protect fewer (`--protect none`)."
        )
    bad = [block for block in free if not math.isfinite(scores.values[block])]
    if bad:
        raise InvalidPlanError(
            f"`{scores.criterion}` gave block {bad[0]} the score {scores.values[bad[0]]}, which ranks nowhere. "
            "Use another criterion or more text."
        )
    removed = _lowest_run(scores, free, count) if config.contiguous else _lowest(scores, free, count)
    share = f"{count} of {num_blocks} blocks ({count / num_blocks:.1%})"
    measured = "the smallest distance across it by" if scores.windows else "the lowest sum of"
    how = f"the run of neighbours with {measured}" if config.contiguous else "the lowest scores of"
    guard = f"; protected: {', '.join(map(str, protected))}" if protected else ""
    return Plan(
        num_blocks=num_blocks,
        removed=removed,
        method=scores.criterion,
        rule=f"{share}, {how} {scores.criterion}{guard}",
        protected=protected,
    )


@dataclasses.dataclass(frozen=True)
class Room:
    """How large a model may be, and what its blocks take: how many of them must go follows.

    Attributes:
        limit: The most that may be left.
        total: What the whole model takes.
        blocks: What each block takes.
        unit: Of all three: `parameters`, or `bytes` as they are stored.
    """

    limit: int
    total: int
    blocks: tuple[int, ...]
    unit: str = "parameters"

    @classmethod
    def of(
        cls, config: PlanConfig, parameters: tuple[int, Sequence[int]], num_bytes: tuple[int, Sequence[int]]
    ) -> "Room | None":
        """What the settings ask for; None where they name no size.

        Args:
            config: The settings.
            parameters: Of the whole model, and of each block.
            num_bytes: The same in bytes.
        """
        if config.max_params is not None:
            return cls(config.max_params, parameters[0], tuple(parameters[1]))
        if config.max_bytes is not None:
            return cls(config.max_bytes, num_bytes[0], tuple(num_bytes[1]), unit="bytes")
        return None

    def fits(self, removed: Iterable[int]) -> bool:
        """Whether what is left without these blocks is small enough."""
        return self.total - sum(self.blocks[block] for block in removed) <= self.limit

    def most(self, free: Sequence[int]) -> int:
        """So many blocks are enough, whichever of the free ones they are not.

        Raises:
            InvalidPlanError: The model is small enough already, or too large without all that may go.
        """
        self.refuse_fitting()
        left = self.total
        # The smallest blocks first: then as many of any others are enough too.
        for count, block in enumerate(sorted(free, key=lambda block: self.blocks[block]), start=1):
            left -= self.blocks[block]
            if left <= self.limit and count < len(self.blocks):
                return count
        raise InvalidPlanError(
            f"Without all {len(free)} blocks that may go, {left:,} {self.unit} are left, more than {self.limit:,}. "
            "Allow more, or protect fewer blocks (`--protect none`)."
        )

    def refuse_fitting(self) -> None:
        """Refuses a size that the model is not above.

        Raises:
            InvalidPlanError: It is not.
        """
        if self.total <= self.limit:
            raise InvalidPlanError(
                f"The model has {self.total:,} {self.unit} and so fits into {self.limit:,} already. Ask for fewer."
            )

    def smallest(self, plan_of: Callable[[int], Plan], sizes: Iterable[int]) -> Plan | None:
        """The plan of the fewest blocks that is enough; None where none is."""
        plans = (plan_of(size) for size in sizes)
        plan = next((plan for plan in plans if self.fits(plan.removed)), None)
        return None if plan is None else with_rule(plan, f"the fewest that leave at most {self.limit:,} {self.unit}")


def with_rule(plan: Plan, why: str) -> Plan:
    """The plan with a further reason for its size."""
    return plan.model_copy(update={"rule": f"{plan.rule}; {why}"})


def plan_within(scores: BlockScores, config: PlanConfig, room: Room | None, *, protects_ends: bool = True) -> Plan:
    """`make_plan`, for a target that may be a size too.

    Raises:
        InvalidPlanError: Nothing can be removed that way.
    """
    if room is None:
        return make_plan(scores, config, protects_ends=protects_ends)
    protected = protected_blocks(config.protect, scores.num_blocks, protects_ends=protects_ends)
    most = room.most([block for block in range(scores.num_blocks) if block not in protected])

    def plan_of(size: int) -> Plan:
        return make_plan(scores, config.sized(size), protects_ends=protects_ends)

    plan = room.smallest(plan_of, range(1, most + 1))
    assert plan is not None, "as many as `most` are always enough"
    return plan


def check_one_target(config: PlanConfig) -> None:
    """Exactly one way of saying how many blocks go must be given; a retention needs none, and allows one as its limit.

    Raises:
        ConfigError: None or several are, or they do not go with the way of choosing.
    """
    given = [name for name in TARGETS if getattr(config, name) is not None]
    allowed = given in ([], ["fraction"], ["count"]) if config.min_retention is not None else len(given) == 1
    if not allowed:
        retention = [] if config.min_retention is None else ["min_retention"]
        named = " and ".join(f"`--{name.replace('_', '-')}`" for name in [*given, *retention]) or "nothing"
        raise ConfigError(
            "Say how many blocks go by exactly one of `--fraction`, `--count`, `--blocks`, `--max-params`, "
            "`--max-bytes`, `--speedup`, or by `--min-retention` alone or with a `--fraction` or `--count` as its "
            f"limit; got {named}."
        )
    if config.blocks is not None:
        guarded = None if config.protect in ("auto", "none") else config.protect
        refuse_unread(
            {"contiguous": config.contiguous or None, "protect": guarded},
            "a choice of blocks, and `--blocks` names them",
        )
    if config.select != "scores" or config.from_search is not None:
        searching = f"`--select {config.select}`" if config.from_search is None else "`--from-search`"
        at_odds = {"--blocks": config.blocks is not None, "--contiguous": config.contiguous}
        if config.from_search is not None:
            at_odds[f"--select {config.select}"] = config.select != "scores"
            at_odds[f"--score-rounds {config.score_rounds}"] = config.score_rounds > 1
            at_odds[f"--protect {config.protect}"] = config.protect != "auto"
        for flag in (flag for flag, is_given in at_odds.items() if is_given):
            raise ConfigError(f"`{flag}` does not go with {searching}, which chooses itself. Leave one of them out.")
    if config.rule == "mass" and (
        given != ["fraction"]
        or config.contiguous
        or config.select != "scores"
        or config.from_search is not None
        or config.min_retention is not None
        or config.score_rounds > 1
    ):
        raise ConfigError(
            "`--rule mass` takes the lowest scores up to a share of their sum. Give that share as `--fraction`, "
            "without `--contiguous` or another way of choosing."
        )
    if config.score_rounds > 1 and (
        config.select != "scores" or config.min_retention or config.blocks or config.contiguous
    ):
        raise ConfigError(
            "`--score-rounds` rescores between removals, so it goes with `--select scores` and a number of blocks "
            "only, without `--contiguous`. Leave it out."
        )
    if config.min_retention is None:
        unread = {"retention_task": config.retention_task}
        refuse_unread(unread, "`--min-retention`, which was not given", "`--min-retention 0.95`")


_READ_BY = {"width": ("greedy",), "beam": ("greedy",), "screen": ("greedy", "evolution")}
"""Settings that not every way of searching reads."""


def check_search(search: SearchConfig, plan: PlanConfig, *, repairs: bool) -> None:
    """What a search is told must fit together, and be read by one.

    Args:
        search: As given.
        plan: Whether there will be a search, and for what.
        repairs: Whether its cut will be repaired without training.

    Raises:
        ConfigError: The objective lacks its task or has one too many, or a setting is given that nothing reads.
    """
    if search.objective == "accuracy" and (search.task is None or search.task.kind not in ("choice", "classification")):
        raise ConfigError(
            "`--objective accuracy` counts right answers of a task: name one, choice or classification, e.g. "
            "`--objective-task choice=questions.jsonl`."
        )
    if search.objective != "accuracy" and search.task is not None:
        raise ConfigError(
            f"`--objective-task` goes with `--objective accuracy`, not with `{search.objective}`. Leave one out."
        )
    given = as_given(search)
    given.pop("seed", None)  # of every draw, in whatever run
    if plan.select == "scores":
        refuse_unread(given, "a search by measured damage, and none was asked for", "`--select greedy`")
    for name, methods in _READ_BY.items():
        if plan.select not in methods:
            what = " or ".join(f"`--select {method}`" for method in methods)
            refuse_unread({name: given.get(name)}, f"{what}, not for `--select {plan.select}`")
    aims = ("max_params", "max_bytes", "min_retention")
    aim = next((f"--{name.replace('_', '-')}" for name in aims if getattr(plan, name) is not None), None)
    if aim is not None:
        finalists = {"finalists": given.get("finalists")}
        refuse_unread(finalists, f"a number of blocks, and `{aim}` is reached by one set and not by another")
    if not repairs or search.objective != "kl":
        finalists = {"finalists": given.get("finalists")}
        refuse_unread(finalists, "a search by `kl` whose cut is repaired, and this is none", "`--compensate auto`")


def files_of(config: PlanConfig, search: SearchConfig) -> list[str | None]:
    """What choosing blocks reads besides the model and its text: an earlier search, the data of tasks."""
    tasks = [task for task in (config.retention_task, search.task) if task is not None]
    return [config.from_search, *(source for task in tasks for source in (task.data, task.shots_data))]


def check_plain(config: PlanConfig, *, stack: str = "auto") -> None:
    """A cut from file to file has no model to measure, so it takes scores, or the blocks themselves, only.

    Nor does it look for another stack of blocks than the one that avss takes by itself.

    Raises:
        ConfigError: Something else is asked for.
    """
    measuring = {
        f"--select {config.select}": config.select != "scores",
        "--from-search": config.from_search is not None,
        "--score-rounds": config.score_rounds > 1,
        **{f"--{name.replace('_', '-')}": getattr(config, name) is not None for name in ("speedup", "min_retention")},
    }
    asked = [flag for flag, is_asked in measuring.items() if is_asked]
    if asked:
        raise ConfigError(
            f"`{asked[0]}` needs the model in memory, and this cut goes from file to file. Say how many by "
            "`--fraction`, `--count`, `--max-params` or `--max-bytes`, or name the blocks that a search found by "
            "`--blocks`."
        )
    if stack != "auto":
        raise ConfigError(
            "`--stack` works in memory only: from file to file the stack that avss takes by itself is cut. Leave out "
            "`--stack`, or cut in memory (`--in-memory`)."
        )


def in_rounds(count: int, num_rounds: int) -> list[int]:
    """Blocks to remove in each round: as equal as can be, the larger rounds first, none empty.

    Example:
        >>> in_rounds(8, 3), in_rounds(2, 5)
        ([3, 3, 2], [1, 1])
    """
    each, rest = divmod(count, num_rounds)
    return [part for part in (each + (place < rest) for place in range(num_rounds)) if part]


def _lowest(scores: BlockScores, free: list[int], count: int) -> tuple[int, ...]:
    return tuple(sorted([block for block in scores.ranking() if block in set(free)][:count]))


def _lowest_run(scores: BlockScores, free: list[int], count: int) -> tuple[int, ...]:
    allowed = set(free)
    runs = [range(start, start + count) for start in range(scores.num_blocks - count + 1)]
    runs = [run for run in runs if allowed.issuperset(run)]
    if not runs:
        raise InvalidPlanError(
            f"No {count} neighbouring blocks are free of protected ones. Remove fewer, or protect fewer."
        )
    if scores.windows is None:
        return tuple(min(runs, key=lambda run: (sum(scores.values[block] for block in run), run.start)))
    across = scores.windows[count - 1]
    bad = [run.start for run in runs if not math.isfinite(across[run.start])]
    if bad:
        raise InvalidPlanError(
            f"`{scores.criterion}` gave the {count} blocks from {bad[0]} on the distance {across[bad[0]]}, which ranks "
            "nowhere. Use another criterion or more text."
        )
    return tuple(min(runs, key=lambda run: (across[run.start], run.start)))


def lowest_by_mass(values: Sequence[float], share: float, allowed: Sequence[int] | None = None) -> tuple[int, ...]:
    """The lowest scores whose sum stays within a share of the sum of all: ascending first, then cumulated.

    Args:
        values: One score per block, none negative.
        share: Of the sum of all scores, 0 to 1.
        allowed: Blocks that may go; all of them if None. Those that may not still count in the sum of all.

    Returns:
        Positions, ascending; ties go by position. Possibly none.

    Example:
        >>> lowest_by_mass((4.0, 1.0, 3.0, 2.0), 0.3)
        (1, 3)
    """
    total = math.fsum(values)
    order = sorted(range(len(values)) if allowed is None else allowed, key=lambda place: (values[place], place))
    sums = itertools.accumulate(values[place] for place in order)
    most = share * total * (1 + 1e-12)  # 1 + 2 of 10 is 0.3, whatever the last bit says
    return tuple(sorted(place for place, reached in zip(order, sums, strict=True) if reached <= most))


def published_by_mass(values: Sequence[float], share: float) -> tuple[int, ...]:
    """What the published script flags: cumulated in block order, sorted only afterwards.

    The running sum belongs to the block order, so the rule takes the first blocks until their sum passes the share,
    whatever their scores. Kept for reproduction.

    Example:
        >>> published_by_mass((4.0, 1.0, 3.0, 2.0), 0.5)
        (0, 1)
    """
    total = math.fsum(values)
    sums = itertools.accumulate(value / total for value in values)
    return tuple(place for place, reached in enumerate(sums) if reached <= share)


def _plan_by_mass(scores: BlockScores, config: PlanConfig, free: list[int], protected: tuple[int, ...]) -> Plan:
    share = config.fraction or 0
    bad = [block for block, value in enumerate(scores.values) if not math.isfinite(value) or value < 0]
    if bad or not any(scores.values):
        found = f"block {bad[0]} has {scores.values[bad[0]]}" if bad else "all are 0"
        raise InvalidPlanError(
            f"The scores of `{scores.criterion}` have no sum to take a share of: {found}. They must be finite, none "
            "negative and one positive; use another criterion or `--rule count`."
        )
    removed = lowest_by_mass(scores.values, share, free)
    if not removed:
        least = min(scores.values[block] for block in free) / math.fsum(scores.values) if free else math.nan
        raise InvalidPlanError(
            f"No block fits into {share:.3g} of the sum of `{scores.criterion}`: the smallest that may go "
            f"holds {least:.3g} of it. Use a larger `--fraction` or `--rule count`."
        )
    guard = f"; protected: {', '.join(map(str, protected))}" if protected else ""
    num = scores.num_blocks
    return Plan(
        num_blocks=num,
        removed=removed,
        method=scores.criterion,
        rule=f"{len(removed)} of {num} blocks ({len(removed) / num:.1%}), the lowest scores that hold together at most "
        f"{share:.3g} of the sum of {scores.criterion}{guard}",
        protected=protected,
    )
