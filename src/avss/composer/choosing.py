"""Which blocks go: the target as a number of blocks, and the plan by scores or by search."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from avss.compensation import compensate
from avss.composer.disk import differences
from avss.composer.finals import TOKENS, judge_finalists
from avss.composer.scores import score_loaded
from avss.composer.searching import search_loaded
from avss.config import PlanConfig, SearchConfig, TaskConfig
from avss.criteria import AbstractCriterion, find_criteria
from avss.cut import cut
from avss.data.augment import Asked
from avss.data.batches import Batches
from avss.errors import (
    ConfigError,
    DataError,
    DegenerateStatisticError,
    InvalidPlanError,
    TaskError,
    UnsupportedArchitectureError,
)
from avss.evaluation import evaluate_task, retention
from avss.models.load import Loaded
from avss.models.rewrite import pinned_blocks, refusal
from avss.plan import (
    Room,
    count_of_fraction,
    explicit_plan,
    in_rounds,
    make_plan,
    protected_blocks,
    protecting,
    with_rule,
)
from avss.progress import MayGoOn, Timed, always
from avss.record import BlockScores, Finalist, Plan, RunRecord, ScoreTable, SearchResult, runs_of

MOST = 0.5
"""Share of the blocks up to which a retention is kept, where no other is named."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What was chosen, and what it rests on.

    Attributes:
        plan: The blocks that go.
        search: The search, where there was one.
        warnings: What the reader should know, one sentence each.
    """

    plan: Plan
    search: SearchResult | None = None
    warnings: tuple[str, ...] = ()


def choose(
    loaded: Loaded,
    config: PlanConfig,
    search: SearchConfig,
    timed: Timed,
    *,
    batches: Batches | None,
    table: ScoreTable | None = None,
    task: TaskConfig | None = None,
    repairs: bool = False,
    first_token: bool = True,
    may_go_on: MayGoOn = always,
    prompts: Callable[[], Sequence[Asked]] = tuple,
    command: str = "",
) -> Chosen:
    """The plan that the settings ask for.

    Args:
        loaded: The model; left as it was.
        config: Who chooses, and how many.
        search: How hard a search looks.
        timed: Where progress goes.
        batches: The text; None only where nothing is to be measured: named blocks, an earlier search, or given scores.
        table: The scores, where there are some already; else the criterion's are made if needed.
        task: What `min_retention` speaks of, if the settings name none.
        repairs: Whether the cut will be repaired: the best sets of a search are then judged after a repair, and scores
            in rounds are made of repaired models.
        first_token: Whether the first token of each sequence counts in scores.
        may_go_on: Asked before each of those repairs of a search's best sets.
        prompts: Makes what asks for one of several answers: the best sets of a search are then judged by these choices
            too.
        command: The command to note in a search.

    Raises:
        ConfigError: The settings do not fit together.
        InvalidPlanError: No plan does what is asked.
    """
    num_blocks = len(loaded.stack)
    if config.blocks is not None:
        return Chosen(explicit_plan(config, num_blocks))
    if config.from_search is not None:
        earlier = read_search(Path(config.from_search), loaded)
        sized = _Sized(loaded, config, tuple(earlier.protected), timed, task)
        chosen = sized.chosen(earlier.plan, most=sized.most_of(earlier), search=earlier)
        return _as_repaired_before(chosen, earlier) if repairs and _goes_by_count(config) else chosen
    criterion = find_criteria([config.criterion])[0]
    protects_ends = criterion.protects_ends or config.select != "scores"
    config = with_pinned(config, loaded, protects_ends=protects_ends)
    protected = protected_blocks(config.protect, num_blocks, protects_ends=protects_ends)

    def made(wanted: AbstractCriterion) -> BlockScores:
        return _scores(wanted, loaded, batches, table, first_token, timed)

    if config.rule == "mass":  # how many go is the scores' own answer
        scores = made(criterion)
        return Chosen(make_plan(scores, config, protects_ends=criterion.protects_ends))
    sized = _Sized(loaded, config, protected, timed, task)
    most = sized.most()
    if config.select == "scores":
        scores = made(criterion)
        if config.score_rounds > 1:
            how = {"repairs": repairs, "first_token": first_token, "is_enough": sized.is_enough}
            return Chosen(_by_rounds(loaded, config, most, criterion, _need(batches), scores, timed, **how))

        def by_scores(count: int) -> Plan:
            return make_plan(scores, config.sized(count), protects_ends=criterion.protects_ends)

        by_scores(most)  # refuses before anything is measured
        return sized.chosen(by_scores, most=most)
    text = _need(batches)
    if config.min_retention is not None:
        sized.retention_task()  # refused before anything is measured
    prior = None if search.screen == "damage" else made(find_criteria([search.screen])[0]).values
    found = search_loaded(
        loaded,
        text.first(search.max_tokens),
        config,
        search,
        count=most,
        protected=protected,
        prior=prior,
        fallback=(criterion.name, lambda: made(criterion).values),
        stages=timed,
        command=command,
    )
    chosen = sized.chosen(found.plan, most=most, search=found)
    if (screen := found.settings["screen"]) != search.screen:
        told = f"The budget of the search was too small to measure each block alone first: it went by `{screen}`."
        chosen = dataclasses.replace(chosen, warnings=(told, *chosen.warnings))
    if repairs and _goes_by_count(config) and search.objective == "kl" and search.finalists > 1:
        return _after_repair(
            loaded, chosen, found, text, table, config, search.finalists, timed, may_go_on, prompts, protected
        )
    return chosen


def _goes_by_count(config: PlanConfig) -> bool:
    """Whether any set of that size will do: what was measured or counted for one says nothing of another."""
    return config.min_retention is None and config.max_params is None and config.max_bytes is None


def _as_repaired_before(chosen: Chosen, earlier: SearchResult) -> Chosen:
    """The set that was best once it was repaired, where the earlier search repaired sets of this size."""
    best = next(iter(earlier.finalists), None)
    if best is None or len(best.removed) != len(chosen.plan.removed):
        return chosen
    return dataclasses.replace(chosen, plan=_best_of(chosen.plan, earlier.finalists))


def _best_of(plan: Plan, finalists: Sequence[Finalist]) -> Plan:
    return plan.model_copy(
        update={
            "removed": finalists[0].removed,
            "rule": f"{plan.rule}; the best of {len(finalists)} sets after a repair ({finalists[0].source})",
        }
    )


def _after_repair(
    loaded: Loaded,
    chosen: Chosen,
    found: SearchResult,
    batches: Batches,
    table: ScoreTable | None,
    config: PlanConfig,
    num_finalists: int,
    timed: Timed,
    may_go_on: MayGoOn,
    prompts: Callable[[], Sequence[Asked]],
    protected: Sequence[int],
) -> Chosen:
    """Of the searched set, those that came close, those that scores choose and those beside them, the best repaired."""
    size = len(chosen.plan.removed)
    sets = {chosen.plan.removed: "search"}
    for scores in table.scores if table is not None else ():
        with contextlib.suppress(InvalidPlanError):
            sized = config.sized(size).model_copy(update={"contiguous": config.select == "window"})
            sets.setdefault(make_plan(scores, sized.model_copy(update={"select": "scores"})).removed, scores.criterion)
    for other in found.others:
        if len(other.removed) == size:
            sets.setdefault(other.removed, "runner-up")
    sets = _with_shifted(sets, len(loaded.stack), protected)
    finalists = judge_finalists(loaded, sets, batches, num_finalists, timed, may_go_on, prompts)
    if not finalists:
        return chosen
    plan = _best_of(chosen.plan, finalists)
    return dataclasses.replace(chosen, plan=plan, search=found.model_copy(update={"finalists": finalists}))


_MOST_SETS = 16
"""Sets that are measured before the last choice, where not so many are at hand: others beside them fill up."""

Sources = dict[tuple[int, ...], str]
"""Set of blocks -> where it comes from."""


def _with_shifted(sets: Sources, num_blocks: int, protected: Sequence[int]) -> Sources:
    """Sets, each followed by those with one of its gaps moved by a block, as far as there is room.

    A search goes block by block, and a gap that has closed in on its place moves as a whole or not at all.

    Example:
        >>> _with_shifted({(2, 5, 6): "search"}, 8, (7,))
        {(2, 5, 6): 'search', (2, 4, 5): 'shifted'}
    """
    room = _MOST_SETS - len(sets)
    found: Sources = {}
    for removed, source in sets.items():
        found[removed] = source
        for moved in _shifted(removed, num_blocks, protected):
            if room > 0 and moved not in sets and moved not in found:
                found[moved] = "shifted"
                room -= 1
    return found


def _shifted(removed: tuple[int, ...], num_blocks: int, protected: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for start, stop in runs_of(removed):
        for leaves, joins in ((start, stop), (stop - 1, start - 1)):
            if stop - start > 1 and 0 <= joins < num_blocks and joins not in protected:
                yield tuple(sorted({*removed, joins} - {leaves}))


def with_pinned(config: PlanConfig, loaded: Loaded, *, protects_ends: bool) -> PlanConfig:
    """The settings with the blocks protected that the architecture cannot lose, whatever `protect` says."""
    pinned = [pin.block for pin in pinned_blocks(loaded.model.config, loaded.stack)]
    return protecting(config, pinned, len(loaded.stack), protects_ends=protects_ends)


def read_search(path: Path, loaded: Loaded) -> SearchResult:
    """The search in a record.

    Raises:
        DataError: There is none.
        InvalidPlanError: It was of another model, or of another stack of this one.
    """
    record = RunRecord.read(path)
    found = record.search
    if found is None:
        raise DataError(f"`{path}` holds no search. Give the output of a run with `--select greedy` or another search.")
    facts = loaded.facts()
    differing = {} if found.model is None else differences(found.model, facts, record.versions)
    if "stack" in differing:
        raise InvalidPlanError(
            f"The search in `{path}` was of the stack `{differing['stack'][0]}`, and this cut is of `{facts.stack}`. "
            "Name that stack with `--stack`, or search this one."
        )
    for what, (searched, here) in differing.items():
        raise InvalidPlanError(
            f"The search in `{path}` was of another model, whose {what} is `{searched}`; that of this one is `{here}`. "
            "Its blocks mean nothing here. Search this model."
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Sized:
    """A target, and how many blocks it takes."""

    loaded: Loaded
    config: PlanConfig
    protected: tuple[int, ...]
    timed: Timed
    task: TaskConfig | None

    def most(self) -> int:
        """The most blocks that the target can take, whichever they are.

        Raises:
            InvalidPlanError: The target cannot be reached.
        """
        config, num_blocks = self.config, len(self.loaded.stack)
        free = [block for block in range(num_blocks) if block not in self.protected]
        if config.speedup is not None:
            most = self._count_for_speedup(config.speedup, free)
        elif self._room is not None:
            most = self._room.most(free)
        else:
            at_most = min(count_of_fraction(MOST, num_blocks), len(free), num_blocks - 1)
            if config.contiguous:
                at_most = min(at_most, max((stop - start for start, stop in runs_of(free)), default=0))
            most = self._named_count or max(at_most, 1)
        if most > len(free) or most >= num_blocks:
            guarded = f", {len(self.protected)} are protected" if self.protected else " and one must stay"
            raise InvalidPlanError(
                f"{most} blocks cannot be removed: {len(free)} of {num_blocks} may go{guarded}. Remove fewer, or "
                "protect fewer (`--protect none`)."
            )
        return most

    def most_of(self, search: SearchResult) -> int:
        """The same, of the sizes that an earlier search knows.

        Raises:
            InvalidPlanError: The target takes more blocks than it knows.
        """
        known = len(search.points)
        if self.config.speedup is None:
            if self._room is not None:
                self._room.refuse_fitting()
            return known
        wanted = self.most()
        if wanted > known:
            raise InvalidPlanError(
                f"A speedup of {self.config.speedup:g} takes {wanted} blocks by the latency measured, and the search "
                f"knows sets of 1 to {known}. Ask for less, or search again with a larger `--count`."
            )
        return wanted

    def chosen(self, plan_of: Callable[[int], Plan], *, most: int, search: SearchResult | None = None) -> Chosen:
        """The plan of the right size.

        Args:
            plan_of: The plan of each size from 1 to `most`.
            most: The largest.
            search: What the plans come from.
        """
        config = self.config
        if config.min_retention is not None:
            sizes = self._sizes(plan_of, min(self._named_count or most, most))
            plan = self._largest_that_keeps(config.min_retention, plan_of, sizes)
        elif (room := self._room) is not None:
            fitting = room.smallest(plan_of, self._sizes(plan_of, most))
            if fitting is None:
                raise InvalidPlanError(
                    f"None of the plans up to {most} blocks gets below {room.limit:,} {room.unit}. Search with a "
                    "larger `--count`."
                )
            plan = fitting
        else:
            plan = plan_of(self._named_count or most)
            if search is not None:
                self._refuse_uncut(plan, search)
            if config.speedup is not None:
                plan = with_rule(plan, f"for a speedup of {config.speedup:g}, estimated from measured latency")
        return Chosen(plan, search, _search_warnings(search, plan) if search is not None else ())

    def _sizes(self, plan_of: Callable[[int], Plan], most: int) -> list[int]:
        """The sizes whose plan can be cut out, as far as the config tells.

        Raises:
            UnsupportedArchitectureError: None of them can.
        """
        config, stack = self.loaded.model.config, self.loaded.stack
        reasons = {size: refusal(config, stack, plan_of(size)) for size in range(1, most + 1)}
        sizes = [size for size, reason in reasons.items() if reason is None]
        if not sizes:
            raise UnsupportedArchitectureError(f"None of the plans of 1 to {most} blocks can be cut: {reasons[1]}")
        return sizes

    def _refuse_uncut(self, plan: Plan, search: SearchResult) -> None:
        """Refuses what the search could not find: a set of this size that can be cut out."""
        count = len(plan.removed)
        reason = search.points[count - 1].refusal
        if reason is None:
            return
        sizes = [str(len(point.removed)) for point in search.points if point.refusal is None]
        remedy = f"Sets of these sizes were found that can be: {', '.join(sizes)}" if sizes else "Ask for more"
        raise UnsupportedArchitectureError(
            f"None of the sets of {count} block{'s' if count > 1 else ''} that were tried can be cut; of the best of "
            f"them: {reason} {remedy}."
        )

    @property
    def _named_count(self) -> int | None:
        if self.config.fraction is not None:
            return count_of_fraction(self.config.fraction, len(self.loaded.stack))
        return self.config.count

    @functools.cached_property
    def _room(self) -> Room | None:
        if self.config.max_params is None and self.config.max_bytes is None:
            return None
        facts = self.loaded.facts()  # hashes the whole model
        blocks = [sum(p.numel() for p in block.parameters()) for block in self.loaded.stack.blocks]
        width = facts.checkpoint_bytes / facts.num_parameters
        in_bytes = facts.checkpoint_bytes, [round(width * size) for size in blocks]
        return Room.of(self.config, (facts.num_parameters, blocks), in_bytes)

    def is_enough(self, removed: tuple[int, ...]) -> bool:
        """Whether a target in size is reached without these blocks; never where the target is a count."""
        return self._room is not None and self._room.fits(removed)

    def _count_for_speedup(self, wanted: float, free: list[int]) -> int:
        half = Plan(
            num_blocks=len(self.loaded.stack),
            removed=tuple(sorted(free[: max(1, len(free) // 2)])),
            method="speed",
            rule="half of the blocks, to measure what one takes",
        )
        with self.timed("Timing blocks") as advance:
            dense, shorter = evaluate_task(
                [self.loaded, cut(self.loaded, half)], TaskConfig(kind="speed", batch_size=1), on_step=advance
            )
        whole, part = dense["latency_ms"].value, shorter["latency_ms"].value
        by_block = (whole - part) / len(half.removed)
        # Time falls in proportion to the blocks: whole / (whole - n by_block) >= wanted.
        count = math.ceil(whole * (1 - 1 / wanted) / by_block) if by_block > 0 else len(free) + 1
        if count > len(free) or count >= len(self.loaded.stack):
            at_most = whole / max(whole - by_block * len(free), 1e-9) if by_block > 0 else 1.0
            raise InvalidPlanError(
                f"A speedup of {wanted:g} cannot be had from the {len(free)} blocks that may go: by the latency "
                f"measured with {len(half.removed)} of them removed, all of them give {at_most:.3g}. Ask for less."
            )
        return max(1, count)

    def retention_task(self) -> TaskConfig:
        """What the retention speaks of.

        Raises:
            ConfigError: Nothing does, or it speaks of something that has none.
        """
        task = self.config.retention_task or self.task
        if task is None:
            raise ConfigError(
                "`--min-retention` needs a task to speak of. Name one, e.g. `--retention-task choice=questions.jsonl`."
            )
        if task.kind in ("speed", "similarity"):
            raise ConfigError(f"The task `{task.kind}` has no retention. Use choice, classification or perplexity.")
        return task

    def _largest_that_keeps(self, wanted: float, plan_of: Callable[[int], Plan], sizes: Sequence[int]) -> Plan:
        """The largest size whose cut keeps what is wanted, found by halving: retention is taken to fall with size."""
        task = self.retention_task()
        kept: dict[int, float] = {}
        with self.timed(f"Measuring what is kept of {task.kind}") as advance:
            dense = evaluate_task([self.loaded], task)[0]

            def keeps(size: int) -> bool:
                other = evaluate_task([cut(self.loaded, plan_of(size))], task)[0]
                found = [entry.kept for entry in retention(dense, other) if entry.kept is not None]
                if not found:
                    raise TaskError(
                        f"The task `{task.kind}` has no retention. Use choice, classification or perplexity."
                    )
                kept[size] = found[0]
                advance(len(kept), None, f"{size} blocks: {found[0]:.1%}")
                return found[0] >= wanted

            low, high = 0, len(sizes) + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if keeps(sizes[middle - 1]) else (low, middle)
        if low == 0:
            plan = plan_of(sizes[0])
            number = "one block" if sizes[0] == 1 else f"{sizes[0]} blocks"
            raise InvalidPlanError(
                f"No cut keeps {wanted:.1%} of `{task.kind}`: the best of {number} ({plan.describe()}) keeps "
                f"{kept[sizes[0]]:.1%}. Lower `--min-retention`, or cut it by `--blocks {plan.describe()}` and heal it."
            )
        size = sizes[low - 1]
        return with_rule(plan_of(size), f"the most that keep {wanted:.1%} of {task.kind}: {kept[size]:.1%} measured")


def _scores(
    criterion: AbstractCriterion,
    loaded: Loaded,
    batches: Batches | None,
    table: ScoreTable | None,
    first_token: bool,
    timed: Timed,
) -> BlockScores:
    if table is not None:
        with contextlib.suppress(KeyError):
            return table[criterion.name]
        problem = next((text for text in table.warnings if f"`{criterion.name}`" in text), None)
        if problem is not None:
            raise DegenerateStatisticError(problem.removeprefix("Left out: "))
    return score_loaded(loaded, _need(batches), (criterion,), first_token, 0.25, timed)[0].scores[0]


def _need(batches: Batches | None) -> Batches:
    if batches is None:
        raise ConfigError(
            "Scores of an earlier run hold no text to measure on. Leave out `--scores`, or choose by these scores "
            "alone: `--select scores`, without `--score-rounds`."
        )
    return batches


def _by_rounds(
    loaded: Loaded,
    config: PlanConfig,
    count: int,
    criterion: AbstractCriterion,
    batches: Batches,
    scores: BlockScores,
    timed: Timed,
    *,
    repairs: bool,
    first_token: bool,
    is_enough: Callable[[tuple[int, ...]], bool],
) -> Plan:
    """Removes in rounds, and scores what is left before each; repaired by least squares first, where a repair follows.

    The repairs of the rounds serve the scores alone: that of the whole cut is solved for anew.
    """
    protected = protected_blocks(config.protect, len(loaded.stack), protects_ends=criterion.protects_ends)
    removed: tuple[int, ...] = ()
    num_rounds, num_repaired = 0, 0
    for more in in_rounds(count, config.score_rounds):
        if is_enough(removed):
            break
        num_rounds += 1
        if removed:
            plan = _partial(loaded, removed)
            smaller = cut(loaded, plan)
            if repairs:
                with timed(f"Repairing the cut of {len(removed)} blocks"):
                    text = batches.first(TOKENS).rewritten()
                    smaller, story = compensate(loaded, smaller, plan, text, method="refit")
                num_repaired += story.applied
            scores = score_loaded(smaller, batches, (criterion,), first_token, 0.25, timed)[0].scores[0]
        kept = [block for block in range(len(loaded.stack)) if block not in removed]
        guard = ",".join(str(kept.index(block)) for block in protected) or "none"
        # With blocks of several sizes, fewer may reach a target in parameters than are enough whichever they are.
        before = removed
        for size in range(1, more + 1):
            step = config.sized(size).model_copy(update={"protect": guard})
            plan = make_plan(scores, step, protects_ends=False)
            removed = tuple(sorted([*before, *(kept[place] for place in plan.removed)]))
            if is_enough(removed):
                break
    num, count = len(loaded.stack), len(removed)
    return Plan(
        num_blocks=num,
        removed=removed,
        method=criterion.name,
        rule=f"{count} of {num} blocks ({count / num:.1%}), the lowest scores of {criterion.name}, scored again before "
        f"each of {num_rounds} rounds"
        + (f", {num_repaired} of the {num_rounds - 1} cuts between them repaired" if repairs else "")
        + (f"; protected: {', '.join(map(str, protected))}" if protected else ""),
        protected=protected,
    )


def _partial(loaded: Loaded, removed: tuple[int, ...]) -> Plan:
    return Plan(num_blocks=len(loaded.stack), removed=removed, method="explicit", rule="the rounds so far")


def _search_warnings(search: SearchResult, plan: Plan) -> tuple[str, ...]:
    point = search.points[len(plan.removed) - 1]
    if point.how.startswith("prior"):
        return (
            f"The budget of the search ended before sets of {len(plan.removed)} blocks were compared; the likeliest "
            "blocks were added. Give it more time or passes: it goes on where it ended.",
        )
    if search.data is not None and search.objective != "accuracy" and point.num_sequences < search.data.num_sequences:
        return (
            f"The budget of the search ended early: its set of {len(plan.removed)} blocks was measured on "
            f"{point.num_sequences} of {search.data.num_sequences} sequences.",
        )
    return ()
