"""`avss.compare`: how far can each criterion be trusted, here?"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avss.ablation import Damage, Judge, leave_one_out, summarise, table_of
from avss.composer.choosing import with_pinned
from avss.composer.damages import DAMAGE_BATCH_SIZE, DAMAGE_SAMPLES
from avss.composer.inputs import AnyModel, calibration, load
from avss.composer.records import now, versions, write_record
from avss.composer.scores import score_loaded
from avss.composer.searching import search_loaded
from avss.config import DataConfig, PlanConfig, SearchConfig, build
from avss.criteria import CRITERIA, find_criteria
from avss.data.batches import Batches
from avss.errors import DataError
from avss.models.load import Loaded
from avss.output import fresh_folder
from avss.plan import make_plan, protected_blocks
from avss.progress import Stages, silent
from avss.record import BlockScores, Comparison, CriterionVerdict, Plan, RunRecord, ScoreTable, describe_blocks
from avss.statistics.agreement import agreement_with, depth_correlation, overlap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_DRAWS = 5
"""Random sets that make the floor."""


def compare(
    model: AnyModel,
    data: DataConfig | str | Sequence[str] = "builtin",
    *,
    damage_data: DataConfig | str | Sequence[str] | None = None,
    criteria: str | Sequence[str] = "all",
    fraction: float | None = None,
    count: int | None = None,
    protect: str = "auto",
    damage_samples: int = DAMAGE_SAMPLES,
    greedy: bool = False,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stack: str = "auto",
    stages: Stages = silent,
    **settings: Any,
) -> RunRecord:
    """Judges every criterion by measured damage, on text it was not computed on.

    For each: how its scores rank the blocks against what leaving out each block costs, how many of its lowest blocks
    are among the cheapest, what removing its lowest blocks together costs, and whether it only ranks by depth. The
    first blocks, the last and random draws are the floor; a greedy search is the ceiling.

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        data: The text, or the images, that scores are computed on.
        damage_data: The text that damage is measured on; by default other sequences of `data`.
        criteria: Names from `avss.CRITERIA`, or `all`.
        fraction: Share of blocks that each removes, rounded half up (a quarter by default); or
        count: their number.
        protect: Blocks that stay, see `avss.prune`; `auto` follows each criterion's own habit.
        damage_samples: Sequences that damage is measured on.
        greedy: Whether to search as well, on as many sequences of the scores' text: takes longer than all the rest.
        tokenizer: For a model object.
        stack: Which stack of blocks: `auto`, or its name or path.
        stages: Where progress goes.
        **settings: `samples`, `seq_len`, `batch_size`, `seed`, `layout` of the scores' text.

    Returns:
        A record with the scores and `record.comparison`, which shows itself in a notebook.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
    """
    wanted = find_criteria(criteria if isinstance(criteria, str) else list(criteria))
    size = {"count": count} if count is not None else {"fraction": 0.25 if fraction is None else fraction}
    config = build(PlanConfig, {**size, "protect": protect})
    loaded = load(model, tokenizer, stack=stack, or_disk=True)
    scoring, judging = _parts(loaded, data, damage_data, damage_samples, settings)
    share = config.fraction or (config.count or 1) / len(loaded.stack)
    table, _ = score_loaded(loaded, scoring, wanted, True, share, stages, protect=protect)
    plans = {one.criterion: _plan(one, config, loaded) for one in table.scores}
    draws = _draws(config, loaded, judging.facts.seed) if "random" in plans else []
    count = len(next(iter(plans.values())).removed)
    searched = _search(loaded, scoring, config, count, damage_samples, stages) if greedy else None
    comparison = _judge(loaded, judging, table, plans, draws, searched, stages)
    return RunRecord(
        created=now(),
        command=f"avss.compare({loaded.source!r}, ...)",
        versions=versions(),
        model=loaded.facts(),
        data=table.data,
        scores=table.scores,
        stability=table.stability,
        warnings=(*table.warnings, *_warnings(comparison)),
        damage=comparison.damage,
        comparison=comparison,
        settings={"plan": config.model_dump(mode="json")},
    )


def write_comparison(record: RunRecord, out: str | Path, *, command: str, force: bool = False) -> RunRecord:
    """Writes a comparison with its tables, figures and page to a new folder.

    Raises:
        OutputExistsError: The folder exists.
    """
    record = record.model_copy(update={"command": command})
    with fresh_folder(Path(out), force=force) as folder:
        write_record(record, folder)
    return record


def _parts(
    loaded: Loaded,
    data: DataConfig | str | Sequence[str],
    damage_data: DataConfig | str | Sequence[str] | None,
    damage_samples: int,
    settings: Mapping[str, Any],
) -> tuple[Batches, Batches]:
    """What to score on, and what else to measure damage on."""
    if damage_data is not None:
        scoring = calibration(loaded, data, **settings)
        return scoring, _unseen(loaded, damage_data, scoring, data, damage_samples, settings)
    if isinstance(data, DataConfig):
        data, settings = data.source, {**data.model_dump(exclude={"source"}), **settings}
    samples = int(settings.get("samples", DataConfig().samples))
    everything = calibration(loaded, data, **{**settings, "samples": samples + damage_samples})
    num = len(everything.sequences)
    if num < 6:
        raise DataError(
            f"`{everything.facts.source}` gives {num} {everything.facts.unit}, too few to score on some and measure "
            f"damage on others. Give more{'' if everything.facts.layout == 'images' else ', a smaller `--seq-len`'}, "
            "or other data with `--damage-data`."
        )
    # A text that is too short for both is shared out in the same proportion.
    share = samples if num >= samples + damage_samples else round(num * samples / (samples + damage_samples))
    scoring, judging = everything.split(share)
    return scoring, judging.in_batches_of(DAMAGE_BATCH_SIZE)


def _unseen(
    loaded: Loaded,
    damage_data: DataConfig | str | Sequence[str],
    scoring: Batches,
    data: DataConfig | str | Sequence[str],
    damage_samples: int,
    settings: Mapping[str, Any],
) -> Batches:
    """Sequences that are not scored on, read as those are unless `damage_data` has settings of its own."""
    taken = len(scoring.sequences)
    if isinstance(damage_data, DataConfig):
        num = damage_data.samples
        drawn = calibration(loaded, damage_data.model_copy(update={"samples": num + taken}))
    else:
        num = damage_samples
        same = data.model_dump(exclude={"source"}) if isinstance(data, DataConfig) else {}
        judged = {"samples": num + taken, "batch_size": DAMAGE_BATCH_SIZE}
        drawn = calibration(loaded, damage_data, **{**same, **settings, **judged})
    return drawn.other_than(scoring, num)


def _plan(scores: BlockScores, config: PlanConfig, loaded: Loaded) -> Plan:
    protects_ends = CRITERIA[scores.criterion].protects_ends
    return make_plan(scores, with_pinned(config, loaded, protects_ends=protects_ends), protects_ends=protects_ends)


def _draws(config: PlanConfig, loaded: Loaded, seed: int) -> list[Plan]:
    """Random plans of the same size."""
    random = CRITERIA["random"]
    plans = []
    for draw in range(NUM_DRAWS):
        values = np.random.default_rng((seed, draw)).random(len(loaded.stack))
        scores = BlockScores(criterion=random.name, title=random.title, values=tuple(values.tolist()))
        plans.append(_plan(scores, config, loaded))
    return plans


def _judge(
    loaded: Loaded,
    batches: Batches,
    table: ScoreTable,
    plans: Mapping[str, Plan],
    draws: Sequence[Plan],
    searched: tuple[int, ...] | None,
    stages: Stages,
) -> Comparison:
    judge = Judge(loaded, batches)
    with stages("Leaving out each block") as advance:
        alone = leave_one_out(judge, len(loaded.stack), on_step=advance)
    single = table_of(judge, alone, model=loaded.facts(), data=batches.facts)
    named = [name for name in plans if name != "random"]
    with stages("Removing each criterion's choice") as advance:
        wanted = [plan.removed for plan in (*(plans[name] for name in named), *draws)]
        sets = judge.judge([*wanted, *([searched] if searched else ())], on_step=advance)
    costs = dict(zip(named, sets, strict=False))
    verdicts = [_verdict(table[name], alone, costs[name]) for name in named]
    if draws:
        verdicts.append(_floor(table["random"].title, sets[len(named) : len(wanted)]))
    if searched:
        distances = [one.mean for one in alone]
        verdicts.append(
            CriterionVerdict(
                method="greedy",
                title="Greedy search by measured damage",
                kind="search",
                overlap=overlap(searched, distances),
                damage=summarise(sets[-1]),
            )
        )
    verdicts.sort(key=lambda verdict: (verdict.damage.distance != verdict.damage.distance, verdict.damage.distance))
    return Comparison(count=len(next(iter(plans.values())).removed), verdicts=tuple(verdicts), damage=single)


def _search(
    loaded: Loaded, scoring: Batches, config: PlanConfig, count: int, num_sequences: int, stages: Stages
) -> tuple[int, ...]:
    """What a greedy search finds on the text of the scores: what looking at damage is worth, fairly."""
    num = len(scoring.sequences)
    text = scoring if num <= num_sequences else scoring.split(num_sequences)[0]
    guarded = with_pinned(config, loaded, protects_ends=True)
    protected = protected_blocks(guarded.protect, len(loaded.stack), protects_ends=True)
    result = search_loaded(
        loaded,
        text.in_batches_of(DAMAGE_BATCH_SIZE),
        config.model_copy(update={"select": "greedy"}),
        SearchConfig(resume=False),
        count=count,
        protected=protected,
        prior=None,
        stages=stages,
    )
    return result.points[-1].removed


def _verdict(scores: BlockScores, alone: Sequence[Damage], cost: Damage) -> CriterionVerdict:
    baseline = scores.criterion in ("first", "last")
    distances = np.array([one.distance for one in alone])
    agreement, error = agreement_with(scores.values, distances)
    return CriterionVerdict(
        method=scores.criterion,
        title=scores.title,
        kind="baseline" if baseline else "criterion",
        spearman=agreement,
        spearman_stderr=error,
        depth=depth_correlation(scores.values),
        overlap=overlap(cost.removed, distances.mean(1)),
        damage=summarise(cost),
    )


def _floor(title: str, draws: Sequence[Damage]) -> CriterionVerdict:
    ordered = sorted(draws, key=lambda one: (math.isnan(one.mean), one.mean))
    return CriterionVerdict(
        method="random",
        title=title,
        kind="baseline",
        damage=summarise(ordered[len(ordered) // 2]),
        num_draws=len(draws),
        spread=float(np.std([one.mean for one in draws], ddof=1)),
    )


def _warnings(comparison: Comparison) -> tuple[str, ...]:
    """What the comparison shows about criteria that do no better than looking at nothing."""
    baselines = [verdict for verdict in comparison.verdicts if verdict.kind == "baseline"]
    if not baselines:
        return ()
    best = min(baselines, key=lambda verdict: verdict.damage.distance)
    return tuple(
        f"`{verdict.method}` chooses no better than a baseline here: its {comparison.count} blocks "
        f"({describe_blocks(verdict.damage.removed)}) cost {verdict.damage.distance:.3g}, those of `{best.method}` "
        f"{best.damage.distance:.3g}."
        for verdict in comparison.verdicts
        if verdict.kind == "criterion" and verdict.damage.distance >= best.damage.distance
    )
