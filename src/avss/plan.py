"""Scores -> Plan: which blocks go. No torch, no model: a plan is arithmetic on one list of numbers."""

import math
import re

from avss.config import PlanConfig
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
        if stop < start:
            raise InvalidPlanError(f"The range `{part}` runs backwards. Write the smaller block first.")
        for block in (start, stop):
            if not -num_blocks <= block < num_blocks:
                raise InvalidPlanError(
                    f"There is no block `{block}`: the model has {num_blocks} blocks, 0 to {num_blocks - 1}."
                )
        found.update(block % num_blocks for block in range(start, stop + 1))
    return tuple(sorted(found))


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
    count = math.floor(fraction * num_blocks + 0.5)
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


def explicit_plan(config: PlanConfig, num_blocks: int) -> Plan:
    """The plan of a list of blocks given by hand."""
    removed = parse_blocks(config.blocks or "", num_blocks)
    if not removed:
        raise InvalidPlanError("The list of blocks is empty. Name at least one, e.g. `--blocks 3,12-15`.")
    rule = f"{len(removed)} of {num_blocks} blocks ({len(removed) / num_blocks:.1%}), named by hand"
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule=rule)


def make_plan(
    scores: BlockScores, config: PlanConfig, *, protects_ends: bool = True, pinned: tuple[int, ...] = ()
) -> Plan:
    """The plan that a criterion's scores and the settings give.

    The lowest scores go; ties go by index. `contiguous` takes the run of neighbours with the lowest sum instead.

    Args:
        scores: One score per block, higher = keep.
        config: How many, and which may not go.
        protects_ends: The criterion's habit under `protect = auto`.
        pinned: Blocks that the architecture cannot lose, whatever `protect` says.

    Raises:
        ConfigError: None or several of fraction, count and blocks are given.
        InvalidPlanError: Nothing can be removed that way.
    """
    check_one_target(config)
    num_blocks = scores.num_blocks
    if config.blocks is not None:
        return explicit_plan(config, num_blocks)
    count = config.count or count_of_fraction(config.fraction or 0, num_blocks)
    asked = protected_blocks(config.protect, num_blocks, protects_ends=protects_ends)
    protected = tuple(sorted({*asked, *pinned}))
    free = [block for block in range(num_blocks) if block not in protected]
    if count > len(free) or count >= num_blocks:
        raise InvalidPlanError(
            f"{count} blocks cannot be removed: {len(free)} of {num_blocks} may go"
            + (f", {len(protected)} are protected" if protected else " and one must stay")
            + (f", {', '.join(map(str, pinned))} of them by the architecture" if pinned else "")
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
    how = "the run of neighbours with the lowest sum" if config.contiguous else "the lowest scores"
    guard = f"; protected: {', '.join(map(str, protected))}" if protected else ""
    return Plan(
        num_blocks=num_blocks,
        removed=removed,
        method=scores.criterion,
        rule=f"{share}, {how} of {scores.criterion}{guard}",
        protected=protected,
    )


def check_one_target(config: PlanConfig) -> None:
    """Exactly one of fraction, count and blocks must be given.

    Raises:
        ConfigError: None or several are.
    """
    given = [name for name in ("fraction", "count", "blocks") if getattr(config, name) is not None]
    if len(given) != 1:
        named = " and ".join(f"`--{name}`" for name in given) or "nothing"
        raise ConfigError(f"Say how many blocks go by exactly one of `--fraction`, `--count`, `--blocks`; got {named}.")


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
    return tuple(min(runs, key=lambda run: (sum(scores.values[block] for block in run), run.start)))
