"""`avss.score`: every criterion on one model, from one pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss.collect import collect, num_passes
from avss.composer.inputs import AnyModel, calibration, load
from avss.composer.provenance import now, versions
from avss.composer.records import write_record
from avss.config import DataConfig
from avss.criteria import CRITERIA, AbstractCriterion, find_criteria
from avss.criteria.sites import SITES, find_sites, site_needs, site_values
from avss.data.batches import Batches
from avss.errors import ConfigError, DegenerateStatisticError
from avss.models.load import Loaded
from avss.models.rewrite import pinned_blocks
from avss.output import fresh_folder
from avss.plan import protected_blocks, rounded_half_up
from avss.progress import Stages, silent
from avss.record import BlockScores, RunRecord, ScoreTable, SiteFigures
from avss.scoring import score_blocks, score_warnings, with_certainty
from avss.statistics.collected import Collected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CRITERIA = ("avss", "avss-paper", "avss-product", "block-influence", "update-norm")


def score(
    model: AnyModel,
    data: DataConfig | str | Sequence[str] = "builtin",
    *,
    criteria: str | Sequence[str] = DEFAULT_CRITERIA,
    first_token: bool = True,
    fraction: float = 0.25,
    sites: str | Sequence[str] = "block",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stack: str = "auto",
    stages: Stages = silent,
    **settings: Any,
) -> ScoreTable:
    """Scores every block by every criterion, from one forward pass.

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        data: The calibration text: a source, a list of texts, or a `DataConfig`. For a stack that reads images: a
            folder of images, an image file, or a list of them.
        criteria: Names from `avss.CRITERIA`, or `all`.
        first_token: Whether the first token of each sequence counts.
        fraction: Share of blocks whose choice the warnings speak of.
        sites: Where in the blocks to look as well: `attention`, `mlp`, `mlp-activation`, `block`, or `all`. Anything
            but `block` alone gives the figures of each site in the table's `sites`.
        tokenizer: For a model object.
        stack: Which stack of blocks: `auto`, or its name or path.
        stages: Where progress goes.
        **settings: `samples`, `seq_len`, `batch_size`, `seed`, `layout`.

    Returns:
        A table that shows itself in a notebook; `table["block-influence"].values` are the numbers.

    Raises:
        UserError: Anything the caller can fix, in one sentence.
    """
    wanted = find_criteria(criteria if isinstance(criteria, str) else list(criteria))
    looked_at = find_sites(sites)
    if not 0 < fraction < 1:  # nan fails both comparisons
        raise ConfigError(f"The fraction `{fraction}` must lie between 0 and 1, both excluded; 0.25 is a quarter.")
    loaded = load(model, tokenizer, stack=stack, or_disk=True)
    batches = calibration(loaded, data, **settings)
    return score_loaded(loaded, batches, wanted, first_token, fraction, stages, sites=looked_at)[0]


def score_loaded(
    loaded: Loaded,
    batches: Batches,
    criteria: tuple[AbstractCriterion, ...],
    first_token: bool,
    fraction: float,
    stages: Stages,
    *,
    protect: str = "auto",
    chooses: bool = True,
    sites: tuple[str, ...] = (),
) -> tuple[ScoreTable, Collected]:
    """Scores a loaded model; also returns what was collected, for whoever wants to score again or save it.

    Args:
        loaded: The model.
        batches: What it reads.
        criteria: What to score by.
        first_token: Whether the first token of each sequence counts.
        fraction: Share of blocks whose choice the warnings speak of.
        stages: Where progress goes.
        protect: Blocks that stay in that choice, see `avss.plan.protected_blocks`; those that the architecture cannot
            lose stay too.
        chooses: Whether the lowest scores are what goes; else nothing is said about how sure that choice is.
        sites: Where in the blocks to look as well.
    """
    criteria, left_out = without_gradients(criteria) if loaded.files is not None else (criteria, ())
    with stages("Scoring blocks") as advance:
        done = 0
        sites = () if sites == ("block",) else sites
        needs = [need for criterion in criteria for need in criterion.needs]
        needs += [need for site in sites for need in site_needs(site)]
        total = len(batches) * num_passes(needs)

        def on_batch() -> None:
            nonlocal done
            done += 1
            advance(done, total)

        advance(0, total)
        collected = collect(loaded, batches, needs, on_batch=on_batch)
    scores, problems = _defined(collected, criteria, first_token=first_token, seed=batches.facts.seed)
    count = max(1, rounded_half_up(fraction * len(loaded.stack)))  # as plans round
    pinned = {pin.block for pin in pinned_blocks(loaded.model.config, loaded.stack)}
    stay = {
        one.criterion: tuple(sorted(pinned.union(guarded(one.criterion, len(loaded.stack), protect)))) for one in scores
    }
    with stages("Resampling the data"):
        sure = [
            with_certainty(
                collected,
                CRITERIA[one.criterion],
                one,
                count=count,
                protected=stay[one.criterion],
                first_token=first_token,
                seed=batches.facts.seed,
            )
            for one in scores
        ]
    unit = {"unit": batches.facts.unit}
    stability = tuple(one.model_copy(update=unit) for _, one in sure if one is not None and chooses)
    unsettled = (one.describe() for one in stability if not one.settled)
    table = ScoreTable(
        scores=tuple(one for one, _ in sure),
        model=loaded.facts(),
        data=batches.facts,
        warnings=(
            *_said(loaded),
            *left_out,
            *problems,
            *score_warnings(scores, collected, count=count, protected=stay),
            *unsettled,
        ),
        stability=stability,
        sites=tuple(_figures(site, collected, first_token=first_token) for site in sites),
    )
    return table, collected


def _said(loaded: Loaded) -> tuple[str, ...]:
    return () if loaded.note is None else (loaded.note,)


def without_gradients(
    criteria: tuple[AbstractCriterion, ...],
) -> tuple[tuple[AbstractCriterion, ...], tuple[str, ...]]:
    """The criteria for which no whole model must be in memory, and a sentence on the others; all, if none is left."""
    possible = tuple(one for one in criteria if not any(need.probe == "backward" for need in one.needs))
    left = ", ".join(f"`{one.name}`" for one in criteria if one not in possible)
    if not possible or not left:
        return criteria, ()
    return possible, (f"Left out: {left}: gradients need the whole model in memory.",)


def _figures(site: str, collected: Collected, *, first_token: bool) -> SiteFigures:
    values = site_values(site, lambda statistic: collected.summarise(statistic, first_token=first_token))
    return SiteFigures(
        site=site,
        title=SITES[site][0],
        values={name: tuple(float(value) for value in column) for name, column in values.items()},
    )


def guarded(criterion: str, num_blocks: int, protect: str = "auto") -> tuple[int, ...]:
    """The blocks that a plan by this criterion leaves alone."""
    return protected_blocks(protect, num_blocks, protects_ends=CRITERIA[criterion].protects_ends)


def _defined(
    collected: Collected, criteria: tuple[AbstractCriterion, ...], *, first_token: bool, seed: int
) -> tuple[tuple[BlockScores, ...], tuple[str, ...]]:
    """The scores that exist, and a sentence for each that does not; an error if none does."""
    scores: list[BlockScores] = []
    problems: list[DegenerateStatisticError] = []
    for criterion in criteria:
        try:
            scores += score_blocks(collected, (criterion,), first_token=first_token, seed=seed)
        except DegenerateStatisticError as error:
            problems.append(error)
    if not scores:
        raise problems[0]
    return tuple(scores), tuple(f"Left out: {problem}" for problem in problems)


def write_scores(table: ScoreTable, out: str | Path, *, command: str, force: bool = False) -> RunRecord:
    """Writes scores as a record with its tables, figures and page to a new folder.

    Raises:
        OutputExistsError: The folder exists.
    """
    if table.model is None:
        raise ConfigError("These scores name no model; make them with `avss.score`.")
    record = RunRecord(
        created=now(),
        command=command,
        versions=versions(),
        model=table.model,
        data=table.data,
        scores=table.scores,
        warnings=table.warnings,
        stability=table.stability,
        sites=table.sites,
    )
    with fresh_folder(Path(out), force=force) as folder:
        write_record(record, folder)
    return record
