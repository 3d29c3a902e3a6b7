"""The frozen values that travel between stages, and the record of a run.

Every value is a typed, immutable pydantic model that can be written to disk and read back unchanged. No torch here:
a record opens anywhere. Block indices always refer to the *original* model, 0-based.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from avss.errors import DataError, InvalidPlanError

SCHEMA_VERSION = 1
"""Raised when a field changes its meaning or goes away; new optional fields do not raise it."""


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _none_to_nan(value: Any) -> Any:
    return math.nan if value is None else value


JsonFloat = Annotated[
    float, BeforeValidator(_none_to_nan), PlainSerializer(_finite_or_none, return_type=float | None, when_used="json")
]
"""A float whose nan or infinity is JSON `null`, which has no word for them; `null` is read back as nan."""


class FrozenValue(BaseModel):
    """An immutable value with no room for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="null")


class ModelFacts(FrozenValue):
    """What a model is, in numbers.

    Attributes:
        source: Hub id, folder or file, as the user named it (a folder is given by its last part).
        revision: Hub revision, where one was asked for.
        architecture: Class that computes it, e.g. `LlamaForCausalLM`.
        model_type: `config.model_type`, e.g. `llama`.
        head: What it is used as: `causal`, `masked`, `classifier`, `encoder`, `seq2seq` or `image-classifier`.
        stack: Dotted path of the block stack, e.g. `model.layers`.
        num_blocks: Length of that stack.
        hidden_size: Width of the residual stream.
        num_parameters: All parameters, tied ones once.
        num_block_parameters: Those of the stack.
        checkpoint_bytes: Size of the stored weights: parameters times the stored dtype's width.
        dtype: Dtype in which the weights are stored, e.g. `bfloat16`.
        compute_dtype: Dtype in which this run computed.
        device: Where it ran, e.g. `cpu`.
        fingerprint: SHA-256 over config and weights, shortened to 16 hex digits: same fingerprint, same model.
    """

    source: str
    revision: str | None = None
    architecture: str
    model_type: str
    head: str
    stack: str
    num_blocks: int = Field(ge=1)
    hidden_size: int
    num_parameters: int
    num_block_parameters: int
    checkpoint_bytes: int
    dtype: str
    compute_dtype: str
    device: str
    fingerprint: str


class DataFacts(FrozenValue):
    """What text, or which images, were used.

    Attributes:
        source: As the user named it.
        column: Column read, where there was a choice.
        layout: `packed` (one stream of tokens cut into equal windows), `padded` (one row a text), or `images`.
        image_size: Height and width of the images as the model reads them; None for text.
        num_sequences: Sequences, or images, seen.
        seq_len: Tokens in a sequence (the most, for padded rows); places of the hidden state that an image takes.
        num_tokens: Real tokens, padding not counted; places of all images.
        batch_size: Sequences in a forward pass.
        seed: Seed of the sampling.
        content_hash: SHA-256 over token ids, or pixels as the model reads them, shortened to 16 hex digits.
    """

    source: str
    column: str | None = None
    layout: Literal["packed", "padded", "images"]
    image_size: tuple[int, int] | None = None
    num_sequences: int
    seq_len: int
    num_tokens: int
    batch_size: int
    seed: int
    content_hash: str

    @property
    def unit(self) -> Literal["images", "sequences"]:
        """What it is counted in."""
        return "images" if self.layout == "images" else "sequences"

    def describe(self) -> str:
        """How much of what, e.g. `64 sequences of up to 512 tokens, 32,768 in all`."""
        if self.image_size is not None:
            height, width = self.image_size
            return (
                f"{self.num_sequences:,} images of {width} x {height} pixels, {self.seq_len:,} places of the stack each"
            )
        return f"{self.num_sequences:,} sequences of up to {self.seq_len:,} tokens, {self.num_tokens:,} in all"


class BlockScores(FrozenValue):
    """One criterion's score of every block. Higher always means: keep.

    Attributes:
        criterion: Its name, e.g. `block-influence`.
        title: Its name for people, e.g. `Block Influence`.
        values: One score per block, in block order.
        without_first_token: The same with the first token of each sequence left out (attention sinks and massive
            activations live there); None where the criterion reads no tokens.
        lower: Lower end of each score's 95 % interval over texts of this kind and size, from leaving out sequences;
            None where the criterion reads no text, or there are fewer than three sequences.
        upper: Its upper end.
        factors: The parts the score is made of, one list per factor, e.g. variance and near-zero share.
        windows: Distances across runs of neighbours, where the criterion measures them: `windows[n - 1][l]` is that
            between the input of block l and the input of block l + n (the output of the last block at the end), so
            what the run of blocks l to l + n - 1 changes. Row n - 1 has one entry per run.
        paper: Citation of the method.
        reference_url: Where it was published, if it was.
        note: What the reader must know to trust the numbers, in a sentence.

    Example:
        >>> BlockScores(criterion="toy", title="Toy", values=(0.3, 0.1, 0.2)).ranking()
        (1, 2, 0)
    """

    criterion: str
    title: str
    values: tuple[JsonFloat, ...] = Field(min_length=1)
    without_first_token: tuple[JsonFloat, ...] | None = None
    lower: tuple[JsonFloat, ...] | None = None
    upper: tuple[JsonFloat, ...] | None = None
    factors: dict[str, tuple[JsonFloat, ...]] = Field(default_factory=dict)
    windows: tuple[tuple[JsonFloat, ...], ...] | None = None
    paper: str | None = None
    reference_url: str | None = None
    note: str | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks scored."""
        return len(self.values)

    def ranking(self) -> tuple[int, ...]:
        """Block indices from the least important to the most; ties by index, scores that are no number last."""
        return tuple(sorted(range(len(self.values)), key=lambda b: (math.isnan(self.values[b]), self.values[b], b)))

    def ranks(self) -> tuple[int, ...]:
        """Place of each block in `ranking()`: 0 is the first to go."""
        places = [0] * len(self.values)
        for place, block in enumerate(self.ranking()):
            places[block] = place
        return tuple(places)

    def _repr_html_(self) -> str:
        return ScoreTable(scores=(self,))._repr_html_()


class Stability(FrozenValue):
    """Whether the text suffices to say which blocks score lowest under one criterion.

    Attributes:
        criterion: Its name.
        count: How many blocks would go.
        chosen: The lowest `count`, ascending.
        inclusion: For each block, the share of resampled texts in which it is among the lowest `count`.
        agreement: Mean of that share over the chosen blocks: 1 means that every resampled text chooses the same.
        half_kendall: Kendall's tau between scores from two halves of the text that share no sequence, mean over splits.
        half_overlap: Share of the lowest `count` that two such halves have in common.
        closest: The pair (goes, stays) that is hardest to tell apart.
        closest_gap: Their difference in standard errors.
        num_sequences: Sequences of the text.
        num_sequences_needed: Sequences from which that pair would be two standard errors apart; None for a tie.
        unit: What they are: `sequences` of text, or `images`.
    """

    criterion: str
    count: int
    chosen: tuple[int, ...]
    inclusion: tuple[float, ...]
    agreement: float
    half_kendall: float | None = None
    half_overlap: float | None = None
    closest: tuple[int, int]
    closest_gap: JsonFloat
    num_sequences: int
    num_sequences_needed: int | None
    unit: Literal["images", "sequences"] = "sequences"

    @property
    def settled(self) -> bool:
        """Whether more text of this kind would very likely leave the choice as it is."""
        return self.num_sequences_needed is not None and self.num_sequences_needed <= self.num_sequences

    def describe(self) -> str:
        """The finding in a sentence."""
        low, high = self.closest
        if self.settled:
            return (
                f"`{self.criterion}`: the choice of {self.count} blocks is settled on {self.num_sequences} {self.unit}."
            )
        remedy = (
            f"about {self.num_sequences_needed:,} {self.unit} would tell (there are {self.num_sequences:,})"
            if self.num_sequences_needed
            else "they are as good as tied, and more data will hardly tell"
        )
        return (
            f"`{self.criterion}` cannot settle its lowest {self.count} on these data: block {low} goes and block "
            f"{high} stays by {max(self.closest_gap, 0):.1f} standard errors, and resampled data keep "
            f"{100 * self.agreement:.0f} % of the choice; {remedy}."
        )


class StabilityTrial(FrozenValue):
    """Scores of one criterion from one draw of one text, against those from all that was seen.

    Attributes:
        criterion: Its name.
        source: The text.
        seed: Of the draw.
        num_sequences: Sequences scored on.
        kendall: Kendall's tau with the criterion's scores from the largest draw of the first text, -1 to 1.
        overlap: Share of that draw's lowest `count` blocks that are lowest here too, 0 to 1.
        chosen: The lowest `count` here.
        is_reference: Whether it is that draw itself.
    """

    criterion: str
    source: str
    seed: int
    num_sequences: int
    kendall: float
    overlap: float
    chosen: tuple[int, ...]
    is_reference: bool = False


class StabilityStudy(FrozenValue):
    """How a choice depends on the seed, the amount and the kind of text.

    Attributes:
        count: Blocks that would go.
        trials: One per criterion, text, seed and size.
        model: What was scored.
    """

    count: int
    trials: tuple[StabilityTrial, ...] = Field(min_length=1)
    model: ModelFacts | None = None

    def summary(self) -> list[dict[str, Any]]:
        """One row per criterion, text and size: mean and lowest tau, and mean overlap, over the seeds.

        The draw that all are compared with is left out: it would be compared with itself. (Smaller amounts of the same
        seed are parts of its text, which flatters them.)
        """
        groups: dict[tuple[str, str, int], list[StabilityTrial]] = {}
        for trial in self.trials:
            if trial.is_reference:
                continue
            groups.setdefault((trial.criterion, trial.source, trial.num_sequences), []).append(trial)
        return [
            {
                "criterion": criterion,
                "source": source,
                "num_sequences": num,
                "num_seeds": len(found),
                "kendall": sum(trial.kendall for trial in found) / len(found),
                "kendall_min": min(trial.kendall for trial in found),
                "overlap": sum(trial.overlap for trial in found) / len(found),
            }
            for (criterion, source, num), found in groups.items()
        ]

    def _repr_html_(self) -> str:
        from avss.reporting.notebook import study_html  # see ScoreTable._repr_html_

        return study_html(self)


class SiteFigures(FrozenValue):
    """What a site inside every block carries, for analysis.

    Attributes:
        site: `block`, `attention`, `mlp` or `mlp-activation`.
        title: For people.
        values: Figure -> one value per block; see `avss.criteria.sites.site_values`.
    """

    site: str
    title: str
    values: dict[str, tuple[JsonFloat, ...]]


class ScoreTable(FrozenValue):
    """The scores of several criteria on one model and text, in the order asked for.

    Attributes:
        scores: One entry per criterion, all over the same blocks.
        model: What was scored.
        data: The text it was scored on.
        warnings: What the reader should know, one sentence each.
        stability: Whether the text suffices, one entry per criterion that reads text.
        sites: Figures of sub-layers, where these were asked for.
    """

    scores: tuple[BlockScores, ...] = Field(min_length=1)
    model: ModelFacts | None = None
    data: DataFacts | None = None
    sites: tuple[SiteFigures, ...] = ()
    stability: tuple[Stability, ...] = ()
    warnings: tuple[str, ...] = ()

    def __getitem__(self, criterion: str) -> BlockScores:
        """The scores of one criterion.

        Raises:
            KeyError: It was not computed; the message lists those that were.
        """
        for scores in self.scores:
            if scores.criterion == criterion:
                return scores
        raise KeyError(f"`{criterion}` was not scored. Scored: {', '.join(s.criterion for s in self.scores)}.")

    @property
    def num_blocks(self) -> int:
        """Number of blocks scored."""
        return self.scores[0].num_blocks

    def rows(self) -> list[dict[str, Any]]:
        """One row per block: index, then for each criterion its score, its rank (0 goes first) and its factors."""
        rows: list[dict[str, Any]] = [{"block": block} for block in range(self.num_blocks)]
        for scores in self.scores:
            name, ranks = scores.criterion, scores.ranks()
            for block, row in enumerate(rows):
                row[name] = scores.values[block]
                row[f"{name}.rank"] = ranks[block]
                if scores.without_first_token is not None:
                    row[f"{name}.without_first_token"] = scores.without_first_token[block]
                if scores.lower is not None and scores.upper is not None:
                    row[f"{name}.lower"], row[f"{name}.upper"] = scores.lower[block], scores.upper[block]
                for factor, values in scores.factors.items():
                    row[f"{name}.{factor}"] = values[block]
        return rows

    def _repr_html_(self) -> str:
        # The one import that points up the house (docs/decisions): a notebook asks the value, not the report.
        from avss.reporting.notebook import scores_html

        return scores_html(self)


class PublishedMetrics(FrozenValue):
    """What the published AVSS script measures of every block, in block order.

    Attributes:
        variance: `Average_Variance`: variance over hidden units of the mean over positions, padding included.
        l1_norm: `Average_L1Norm`: sum of absolute gradients of the named matrices.
        l2_norm: `Average_L2Norm`: L2 norms of the gradients of the named matrices, added up.
        frobenius_norm: `Average_FrobeniusNorm`: Frobenius norms of the named matrices, added up.
        sparsity: `Average_Sparsity`: share of activations below 1e-5, padding included.
        weights: Which matrices are named: `ffn`, `attention` or `all`.
        matrices: Their paths inside a block.
        model: What was measured.
        data: The text it was measured on.
        notes: How it was measured, one sentence each.
    """

    variance: tuple[float, ...] = Field(min_length=1)
    l1_norm: tuple[float, ...]
    l2_norm: tuple[float, ...]
    frobenius_norm: tuple[float, ...]
    sparsity: tuple[float, ...]
    weights: str
    matrices: tuple[str, ...] = ()
    model: ModelFacts | None = None
    data: DataFacts | None = None
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, float]]:
        """One row per layer, under the column names of the published table."""
        names = ("Average_Variance", "Average_L1Norm", "Average_L2Norm", "Average_FrobeniusNorm", "Average_Sparsity")
        columns = (self.variance, self.l1_norm, self.l2_norm, self.frobenius_norm, self.sparsity)
        return [
            {"Layer": layer, **dict(zip(names, values, strict=True))}
            for layer, values in enumerate(zip(*columns, strict=True))
        ]


class Plan(FrozenValue):
    """Which blocks go.

    Attributes:
        num_blocks: Blocks of the original model.
        removed: Blocks to remove, ascending, original indices.
        method: How they were chosen: a criterion's name, `explicit` or `window`.
        rule: The rule in words, e.g. `8 of 30 (25 %) lowest, blocks 0 and 29 protected`.
        protected: Blocks that could not be chosen.

    Example:
        >>> plan = Plan(num_blocks=4, removed=(1,), method="explicit", rule="by hand")
        >>> plan.index_map
        {0: 0, 2: 1, 3: 2}
    """

    num_blocks: int = Field(ge=1)
    removed: tuple[int, ...]
    method: str
    rule: str
    protected: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        wrong = [block for block in self.removed if not 0 <= block < self.num_blocks]
        if wrong:
            raise InvalidPlanError(
                f"There is no block {', '.join(f'`{block}`' for block in wrong)}: the model has "
                f"{self.num_blocks} blocks, 0 to {self.num_blocks - 1}. Name blocks in that range."
            )
        if list(self.removed) != sorted(set(self.removed)):
            raise InvalidPlanError(f"The removed blocks {list(self.removed)} must be ascending, each named once.")
        if len(self.removed) >= self.num_blocks:
            raise InvalidPlanError(f"The plan removes all {self.num_blocks} blocks; keep at least one.")
        return self

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks that stay, ascending, original indices."""
        gone = set(self.removed)
        return tuple(block for block in range(self.num_blocks) if block not in gone)

    @property
    def index_map(self) -> dict[int, int]:
        """Original index -> index in the smaller model, for the blocks that stay."""
        return {old: new for new, old in enumerate(self.kept)}

    def rename(self, key: str, stack: str) -> str | None:
        """The name that a weight has in the smaller model; None if it goes with its block.

        Args:
            key: Its name in the original, e.g. `model.layers.3.mlp.up_proj.weight`.
            stack: Dotted path of the block stack. Anchored: a list of that name elsewhere is left alone.

        Example:
            >>> plan = Plan(num_blocks=3, removed=(1,), method="explicit", rule="by hand")
            >>> [plan.rename(key, "h") for key in ("h.1.w", "h.2.w", "x.h.2.w", "h.norm")]
            [None, 'h.1.w', 'x.h.2.w', 'h.norm']
        """
        index, dot, rest = key.removeprefix(f"{stack}.").partition(".")
        if not key.startswith(f"{stack}.") or not dot or not index.isdecimal():
            return key
        new = self.index_map.get(int(index))
        return None if new is None else f"{stack}.{new}.{rest}"

    @property
    def fraction(self) -> float:
        """Share of the blocks removed, 0 to 1."""
        return len(self.removed) / self.num_blocks

    def describe(self) -> str:
        """The removed blocks in a line, e.g. `3, 12-15, 17`."""
        return describe_blocks(self.removed)


def runs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending blocks as half-open runs.

    Example:
        >>> runs_of((3, 12, 13, 14))
        [(3, 4), (12, 15)]
    """
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def describe_blocks(blocks: Sequence[int]) -> str:
    """Ascending blocks in a line.

    Example:
        >>> describe_blocks((3, 12, 13, 14, 15, 17))
        '3, 12-15, 17'
    """
    return ", ".join(str(start) if stop - start == 1 else f"{start}-{stop - 1}" for start, stop in runs_of(blocks))


DamageMeasure = Literal["kl", "cosine", "squared"]
"""How far answers are apart: KL divergence from the dense model in nats, one minus the cosine of embeddings, or the
squared difference of a number that is predicted."""


class SetDamage(FrozenValue):
    """What leaving out one set of blocks costs, without any repair.

    Attributes:
        removed: The blocks, ascending.
        distance: How far the answers move, mean over sequences; see `DamageTable.measure`.
        stderr: Its standard error over sequences.
        loss_change: Next-token loss minus the dense model's, nats a token; None for models without such a loss.
        loss_change_stderr: Its standard error, from paired differences.
        perplexity: Of the model without these blocks.
    """

    removed: tuple[int, ...]
    distance: JsonFloat
    stderr: JsonFloat | None = None
    loss_change: JsonFloat | None = None
    loss_change_stderr: JsonFloat | None = None
    perplexity: JsonFloat | None = None


class DamageTable(FrozenValue):
    """The measured cost of leaving out each block alone: what every criterion guesses at.

    Attributes:
        measure: `kl`, `cosine` or `squared`.
        blocks: One entry per block, in block order.
        dense_loss: Next-token loss of the dense model on the same text, nats a token.
        num_blocks_run: Blocks that were computed for it, in units of one block on one batch.
        num_blocks_naive: Blocks that running every model from its first block would have taken.
        model: What was measured.
        data: The text it was measured on.
    """

    measure: DamageMeasure
    blocks: tuple[SetDamage, ...] = Field(min_length=1)
    dense_loss: JsonFloat | None = None
    num_blocks_run: int
    num_blocks_naive: int
    model: ModelFacts | None = None
    data: DataFacts | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """The distance that each block's absence causes, in block order."""
        return tuple(one.distance for one in self.blocks)

    @property
    def num_blocks(self) -> int:
        """Number of blocks measured."""
        return len(self.blocks)

    @property
    def dense_perplexity(self) -> float | None:
        """Perplexity of the dense model on the same text."""
        return None if self.dense_loss is None else math.exp(min(self.dense_loss, 700.0))

    def ranking(self) -> tuple[int, ...]:
        """Block indices from the cheapest to lose to the dearest; ties by index, damage that is no number last."""
        return tuple(sorted(range(self.num_blocks), key=lambda b: (math.isnan(self.values[b]), self.values[b], b)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per block: index, distance, loss change and perplexity with standard errors, and the rank."""
        places = {block: place for place, block in enumerate(self.ranking())}
        return [
            {"block": block, "rank": places[block], **one.model_dump(exclude={"removed"})}
            for block, one in enumerate(self.blocks)
        ]

    def _repr_html_(self) -> str:
        from avss.reporting.notebook import damage_html  # see ScoreTable._repr_html_

        return damage_html(self)


class CriterionVerdict(FrozenValue):
    """How far one way of choosing blocks can be trusted on this model and text.

    Attributes:
        method: The criterion's name, or `random`, `greedy` ...
        title: Its name for people.
        kind: `criterion`; `baseline` (looks at nothing: a floor); `search` (looks at measured damage: a ceiling).
        spearman: Rank correlation of its scores with the damage of leaving out each block, -1 to 1; None where it
            scores no single block.
        spearman_stderr: Its standard error, from resampling the sequences that damage was measured on.
        depth: Rank correlation of its scores with the block's index: near 1 or -1, it only ranks by depth.
        overlap: How many of its lowest `count` are among the `count` blocks of least damage.
        damage: What removing its lowest `count` blocks together costs; for draws, the draw in the middle.
        num_draws: Draws behind it; 1 unless it draws lots.
        spread: Standard deviation of the damage over the draws.
    """

    method: str
    title: str
    kind: Literal["criterion", "baseline", "search"] = "criterion"
    spearman: JsonFloat | None = None
    spearman_stderr: JsonFloat | None = None
    depth: JsonFloat | None = None
    overlap: int | None = None
    damage: SetDamage
    num_draws: int = 1
    spread: JsonFloat | None = None


class Comparison(FrozenValue):
    """Every criterion against measured damage.

    Attributes:
        count: Blocks that each removes.
        verdicts: One per criterion and baseline, from the least damage of its set to the most.
        damage: Of each block alone.
    """

    count: int
    verdicts: tuple[CriterionVerdict, ...] = Field(min_length=1)
    damage: DamageTable

    def __getitem__(self, method: str) -> CriterionVerdict:
        """The verdict on one method.

        Raises:
            KeyError: It was not compared; the message lists those that were.
        """
        for verdict in self.verdicts:
            if verdict.method == method:
                return verdict
        raise KeyError(f"`{method}` was not compared. Compared: {', '.join(v.method for v in self.verdicts)}.")

    def _repr_html_(self) -> str:
        from avss.reporting.notebook import comparison_html  # see ScoreTable._repr_html_

        return comparison_html(self)


class CurvePoint(SetDamage):
    """The best set of one size that a search found.

    Attributes:
        how: The step that found it: `greedy`, `window`, `exchange`, `evolution`, `put back`, or `prior`: the budget
            ended before, and the likeliest blocks were added.
        cost: What the search made small, see `SearchResult.objective`; mean over sequences or items.
        cost_stderr: Its standard error.
        num_sequences: Sequences it was measured on; 0 for none.
        refusal: Why this set cannot be cut out (the search found none of its size that can); None where it can be.
    """

    how: str
    cost: JsonFloat
    cost_stderr: JsonFloat | None = None
    num_sequences: int = 0
    refusal: str | None = None

    @property
    def found_by(self) -> str:
        """The step that found it, and whether it can be cut out."""
        return self.how if self.refusal is None else f"{self.how}; cannot be cut"


class Finalist(FrozenValue):
    """A set of blocks that was repaired and judged again before the last choice.

    Attributes:
        removed: Block indices in the original numbering.
        source: `search`, `runner-up`, the criterion whose choice it is, or `shifted`: a gap of one of these moved by a
            block.
        before: Divergence of the raw cut from the dense model on text that no repair saw, some of it in another writing
            (`Compensation.augment`); see `Compensation.measure`.
        after: The same after a repair by least squares.
        lost: Share of the dense model's choices among the answers of prompts that the repaired cut has lost, 0 to 1
            (`avss.compensation.ChoiceYardstick`); None where no prompts ask for a choice.
    """

    removed: tuple[int, ...]
    source: str
    before: JsonFloat
    after: JsonFloat
    lost: JsonFloat | None = None

    @property
    def damage(self) -> float:
        """What finalists are compared by: the divergence, times the share of the choices that is lost."""
        return self.after if self.lost is None else self.after * self.lost


class SearchResult(FrozenValue):
    """What a search by measured damage found: the best set of every size, and what that took.

    Attributes:
        schema_version: See `SCHEMA_VERSION`.
        created: UTC, ISO 8601.
        command: The exact command, or the Python call.
        method: `greedy`, `window` or `evolution`.
        objective: What was made small: `kl` (the distance in `measure`), `loss` (change of the next-token loss, nats)
            or `accuracy` (share of wrong answers).
        task: For `accuracy`: the task.
        measure: What the distances are.
        num_blocks: Blocks of the original model.
        protected: Blocks that could not be chosen.
        points: One entry per size, 1 first.
        others: Sets that came close: up to eight of each size, the best first.
        finalists: Sets of the size asked for that were repaired and judged again, the chosen one first; empty where
            no repair was asked for.
        dense_loss: Next-token loss of the dense model on the same text, nats a token.
        num_blocks_run: Blocks computed, in units of one block on one batch.
        passes: The same in passes of the whole model over the whole text.
        passes_of_all: Passes that trying every block in every step takes, each model from its first block.
        num_sets: Different sets measured.
        seconds: Time spent measuring.
        is_complete: Whether the budget lasted to the end.
        settings: As given.
        model: What was measured.
        data: The text it was measured on.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    command: str = ""
    method: str
    objective: Literal["kl", "loss", "accuracy"]
    task: str | None = None
    measure: DamageMeasure
    num_blocks: int = Field(ge=1)
    protected: tuple[int, ...] = ()
    points: tuple[CurvePoint, ...] = Field(min_length=1)
    others: tuple[CurvePoint, ...] = ()
    finalists: tuple[Finalist, ...] = ()
    dense_loss: JsonFloat | None = None
    num_blocks_run: int
    passes: float
    passes_of_all: float
    num_sets: int
    seconds: float
    is_complete: bool
    settings: dict[str, Any] = Field(default_factory=dict)
    model: ModelFacts | None = None
    data: DataFacts | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = [len(point.removed) for point in self.points]
        if sizes != list(range(1, len(sizes) + 1)):
            raise InvalidPlanError(f"A curve has one set of every size from 1 on; this one has the sizes {sizes}.")
        return self

    def plan(self, count: int) -> Plan:
        """The plan that removes `count` blocks.

        Raises:
            InvalidPlanError: The search did not go that far.
        """
        if not 1 <= count <= len(self.points):
            raise InvalidPlanError(
                f"The search knows sets of 1 to {len(self.points)} blocks, not of `{count}`. Choose one of these, or "
                "search again with a larger `--count`."
            )
        point = self.points[count - 1]
        share = f"{count} of {self.num_blocks} blocks ({count / self.num_blocks:.1%})"
        guard = f"; protected: {', '.join(map(str, self.protected))}" if self.protected else ""
        found = "not measured" if not point.num_sequences else f"{self.objective} {point.cost:.4g}"
        return Plan(
            num_blocks=self.num_blocks,
            removed=point.removed,
            method=self.method,
            rule=f"{share}, found by search ({point.how}; {found}){guard}",
            protected=self.protected,
        )

    def to_json(self) -> str:
        """The result as indented JSON; nan and infinities become null."""
        return self.model_dump_json(indent=2) + "\n"

    def rows(self) -> list[dict[str, Any]]:
        """One row per size: size, blocks, cost, distance and loss change with standard errors, perplexity, how."""
        return [
            {
                "size": len(point.removed),
                "blocks": " ".join(map(str, point.removed)),
                **point.model_dump(exclude={"removed"}),
            }
            for point in self.points
        ]

    def _repr_html_(self) -> str:
        from avss.reporting.notebook import search_html  # see ScoreTable._repr_html_

        return search_html(self)


class Measurement(FrozenValue):
    """One evaluation result with its standard error.

    Attributes:
        task: What was asked, e.g. `perplexity` or `choice:piqa`.
        metric: What was measured, e.g. `perplexity`, `accuracy`, `accuracy_norm`, `kl_nats`.
        value: The result.
        stderr: Its standard error, same unit; None where it is not a sample statistic.
        num_samples: Windows, items or repeats it rests on.
        higher_is_better: Direction of `value`.
        chance: What guessing would give, for accuracies.
        unit: `nats`, `ms`, `tokens/s`, `bytes` ... or empty.
        source: The evaluation data, as named by the user.
    """

    task: str
    metric: str
    value: JsonFloat
    stderr: JsonFloat | None = None
    num_samples: int = Field(ge=0)
    higher_is_better: bool
    chance: float | None = None
    unit: str = ""
    source: str | None = None


class Retention(FrozenValue):
    """How much of the dense model's result is left.

    Attributes:
        task: As in `Measurement`.
        metric: As in `Measurement`.
        dense: The dense model's value.
        value: The smaller model's value.
        ratio: `value / dense` (for a perplexity or a loss: how many times worse).
        ratio_stderr: Standard error of the ratio, from paired differences where both models saw the same items.
        chance_corrected: `(value - chance) / (dense - chance)`, for accuracies; None where the dense model is not
            above chance by two standard errors: there is nothing to retain.
        chance_corrected_stderr: Its standard error.
        kept: The share kept, higher is better: the ratio for accuracies, `dense loss / loss` for language modelling.
        flips: Share of items whose answer changed, right or wrong; accuracy alone hides them.
    """

    task: str
    metric: str
    dense: JsonFloat
    value: JsonFloat
    ratio: JsonFloat
    ratio_stderr: JsonFloat | None = None
    chance_corrected: JsonFloat | None = None
    chance_corrected_stderr: JsonFloat | None = None
    kept: JsonFloat | None = None
    flips: JsonFloat | None = None


class FieldChange(FrozenValue):
    """One field of the config that a cut changes.

    Attributes:
        field: Dotted name, e.g. `num_hidden_layers`.
        before: Value in the original config.
        after: Value in the smaller model's config.
    """

    field: str
    before: Any
    after: Any


class Verification(FrozenValue):
    """The proof that a saved model is what it should be.

    Attributes:
        reload_strict: A fresh load found no missing, unexpected or mismatched key. None where there was none: names and
            shapes follow from those of the original.
        max_diff_memory: Largest difference of its outputs from those of the model in memory; nan where outputs were
            not compared, None where memory does not hold the model.
        max_diff_bypass: Largest difference from the original model with the removed blocks bypassed; nan where outputs
            were not compared.
        of_raw_cut: Whether `max_diff_bypass` is that of the cut before its weights were changed, in memory.
        tolerance: What was allowed for both.
        cached_generation: Greedy tokens with cache equal those without; None for models that do not generate.
        num_generated: Tokens compared for that.
        bytes_equal: Every kept weight has the name, shape and bytes it should have; None where weights were saved from
            memory rather than copied.
        outputs_compared: Whether the model was run. False where not even a block at a time fits in memory.
        note: Why it was not run, where that is another reason.
    """

    reload_strict: bool | None
    max_diff_memory: JsonFloat | None = math.nan
    max_diff_bypass: JsonFloat = math.nan
    of_raw_cut: bool = False
    tolerance: float = 0.0
    cached_generation: bool | None = None
    num_generated: int = 0
    bytes_equal: bool | None = None
    outputs_compared: bool = True
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        differences = (self.max_diff_memory, self.max_diff_bypass)
        within = all(one <= self.tolerance for one in differences if one is not None)
        same = within or not self.outputs_compared
        held = (self.reload_strict, self.cached_generation, self.bytes_equal)
        return same and False not in held


class Check(FrozenValue):
    """One thing that was asked of a saved model.

    Attributes:
        what: What was asked, as a statement that should hold.
        passed: Whether it holds.
        found: What was found, in a few words.
    """

    what: str
    passed: bool
    found: str


class CheckReport(FrozenValue):
    """What `avss verify` found.

    Attributes:
        model: What was checked.
        against: The original it was compared with; None where there was none.
        plan: The blocks it lacks, where that is known.
        checks: In the order they were made.
        notes: What could not be checked, and why.
    """

    model: str
    against: str | None = None
    plan: Plan | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """The report as indented JSON, with `passed` in it."""
        return json.dumps({**self.model_dump(mode="json"), "passed": self.passed}, indent=2)


class CutRepair(FrozenValue):
    """What a repair did about one run of removed blocks.

    Attributes:
        start: First removed block of the run.
        stop: The block after its last.
        method: What was solved for: `refit`, `linear`, `cosine` or `scale`; empty where nothing was tried.
        ridge: Relative ridge chosen on held-out text; None where there is none (`scale`).
        factor: The number of `scale`; None elsewhere.
        error_before: Mean squared distance of the stream after the run from the dense model's, over the variance of
            the latter, on text that nothing was fitted to: 0 is equal, 1 as bad as a constant.
        error_after: The same with the repair.
        divergence_before: Divergence of the whole model's answers before this repair, on the choosing text.
        divergence_after: The same with the repair.
        applied: Whether the repair was kept: only where the divergence fell.
        note: Why nothing was tried, or why it was thrown away.
    """

    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    method: str = ""
    ridge: JsonFloat | None = None
    factor: JsonFloat | None = None
    error_before: JsonFloat | None = None
    error_after: JsonFloat | None = None
    divergence_before: JsonFloat | None = None
    divergence_after: JsonFloat | None = None
    applied: bool = False
    note: str = ""


class AnswerFit(FrozenValue):
    """What came of the last solve, for the choice among the answers of prompts.

    Attributes:
        num_prompts: That were asked, of sentences that the dense model wrote; a quarter of them is held out.
        before: Mean KL divergence of the choice from the dense model's on those held out, nats, before the solve.
        after: The same after it.
        text_before: Mean KL divergence on held-out text before it, nats a token.
        text_after: The same after it.
        kept: Whether the solution stayed: choices nearer, and the text no more than a hundredth further off.
    """

    num_prompts: int
    before: JsonFloat
    after: JsonFloat
    text_before: JsonFloat
    text_after: JsonFloat
    kept: bool


class Compensation(FrozenValue):
    """What repair without training did to a cut, and what it brought.

    Attributes:
        method: As asked for, e.g. `auto`.
        measure: What `before` and `after` are: `kl` (nats a token, text or image, to the dense model), `cosine`
            (distance of the last hidden states) or `squared` (difference of a predicted number).
        before: Divergence of the raw cut from the dense model, on text or images used for nothing else.
        after: The same after the repair.
        unit: What is counted below: `tokens` of text, or `places` of the stack that images take.
        fit_tokens: Tokens it was fitted to.
        choose_tokens: Tokens that ridges, step sizes and methods were chosen by.
        judge_tokens: Tokens that `before` and `after` were measured on.
        augment: Share of the sequences that were drawn to be read in another writing, in all three.
        forms: Of the prompts that a quarter of the sequences was drawn for, in all three.
        short: Share of what it was fitted to that was read in short windows.
        cuts: One entry per run of removed blocks, in order.
        num_swept: Blocks from the first cut on that were fitted to the dense stream, one after the other.
        steps: Step size of each round towards the dense model's predictions; empty where there was none.
        answers: The last solve; None where prompts ask for no choice, or the model wrote none.
        weights: Names of the smaller model's weights that changed.
        note: Why nothing was done or kept; else empty.
    """

    method: str
    measure: DamageMeasure = "kl"
    before: JsonFloat = math.nan
    after: JsonFloat = math.nan
    unit: Literal["tokens", "places"] = "tokens"
    fit_tokens: int = 0
    choose_tokens: int = 0
    judge_tokens: int = 0
    augment: float = 0.0
    forms: tuple[str, ...] = ()
    short: float = 0.0
    cuts: tuple[CutRepair, ...] = ()
    num_swept: int = 0
    steps: tuple[float, ...] = ()
    answers: AnswerFit | None = None
    weights: tuple[str, ...] = ()
    note: str = ""

    @property
    def applied(self) -> bool:
        """Whether any weight changed."""
        return bool(self.weights)


class HealingStep(FrozenValue):
    """How far healing was, and how good the model was then.

    Attributes:
        step: Steps of the optimiser done.
        num_tokens: Tokens trained on until then.
        seconds: Wall time until then.
        loss: The objective, in its own unit (nats for a KL).
        text_loss: Mean negative log-likelihood of the text's own tokens in nats, for language models on held-out text.
    """

    step: int
    num_tokens: int
    seconds: float
    loss: JsonFloat
    text_loss: JsonFloat | None = None


class Healing(FrozenValue):
    """What healing by training did.

    Attributes:
        objective: What was made small, in words.
        weights: What was trained, in words.
        num_trained: Parameters trained.
        num_steps: Steps of the optimiser.
        num_tokens: Tokens trained on, padding not counted; a token read in two epochs counts twice.
        seconds: Wall time, validation included; that before an interruption counts too.
        losses: The objective on the training text, as means over stretches of steps.
        validation: The objective on held-out text; the first entry is the model before healing.
        best_step: The step whose weights were kept, by the held-out text; 0 if training only did harm.
        stopped: Why it ended: `budget`, or `no improvement` on held-out text.
        data: The training text.
        held_out: The held-out text.
        settings: As given, with what `auto` became.
        answers: The last solve; None where prompts ask for no choice, or the model wrote none.
    """

    objective: str
    weights: str
    num_trained: int
    num_steps: int
    num_tokens: int
    seconds: float
    losses: tuple[HealingStep, ...] = ()
    validation: tuple[HealingStep, ...] = Field(min_length=1)
    best_step: int
    stopped: Literal["budget", "no improvement"]
    data: DataFacts
    held_out: DataFacts
    settings: dict[str, Any] = Field(default_factory=dict)
    answers: AnswerFit | None = None

    @property
    def unit(self) -> Literal["places", "tokens"]:
        """What `num_tokens` counts: tokens of text, or places that images take."""
        return "places" if self.data.layout == "images" else "tokens"

    @property
    def kept(self) -> bool:
        """Whether any weight changed: not where training only did harm."""
        return self.best_step > 0 or (self.answers is not None and self.answers.kept)

    @property
    def before(self) -> HealingStep:
        """The held-out text before healing."""
        return self.validation[0]

    @property
    def after(self) -> HealingStep:
        """The held-out text with the weights that were kept."""
        return next(point for point in self.validation if point.step == self.best_step)


class Cut(FrozenValue):
    """One smaller model and what became of it.

    Attributes:
        plan: The blocks removed.
        model: Facts of the smaller model.
        changes: Config fields the cut changed.
        compensation: The repair without training; None where none was asked for.
        path: Where it was saved, relative to the record; None where it was only measured.
        file_format: What it was saved as: `safetensors` or `gguf`.
        verification: Proof for the saved model; None where it was not saved.
        measurements: What it scored.
        retention: The same against the dense model.
        samples: What it writes, beside `RunRecord.samples`.
        healing: How it was trained after the cut; None where it was not.
    """

    plan: Plan
    model: ModelFacts
    changes: tuple[FieldChange, ...] = ()
    compensation: Compensation | None = None
    path: str | None = None
    file_format: Literal["safetensors", "gguf"] = "safetensors"
    verification: Verification | None = None
    measurements: tuple[Measurement, ...] = ()
    retention: tuple[Retention, ...] = ()
    samples: tuple[str, ...] = ()
    healing: Healing | None = None

    @property
    def name(self) -> str:
        """How tables call it: the method that chose its blocks, and what was done to it last."""
        if self.healing:
            return f"{self.plan.method}, healed"
        return f"{self.plan.method}, repaired" if self.compensation and self.compensation.applied else self.plan.method


class RunRecord(FrozenValue):
    """Everything one run knew and did. The report, the tables and the model card read only this.

    Attributes:
        schema_version: See `SCHEMA_VERSION`.
        created: UTC, ISO 8601.
        command: The exact command, or the Python call.
        versions: Of python, avss, torch, transformers.
        model: The dense model.
        data: The calibration text.
        scores: One entry per criterion.
        search: The search that chose the blocks; None where none did.
        warnings: What the reader should know, one sentence each.
        stability: Whether the text suffices to choose, one entry per criterion that reads text.
        study: How the choice depends on seed, amount and kind of text, where that was asked for.
        damage: What leaving out each block costs, where it was measured.
        comparison: Every criterion against that damage, where it was asked for.
        published: What the published script measures, where it was reproduced.
        sites: Figures of the blocks' sub-layers, where these were asked for.
        dense: Measurements of the dense model.
        cuts: The smaller models; the first one is the one that was asked for, the others are for comparison.
        prompts: What both models were asked to continue.
        samples: What the dense model wrote, one per prompt.
        seconds: Wall time by stage.
        settings: The run's configuration, as given.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    command: str
    versions: dict[str, str] = Field(default_factory=dict)
    model: ModelFacts
    data: DataFacts | None = None
    scores: tuple[BlockScores, ...] = ()
    search: SearchResult | None = None
    warnings: tuple[str, ...] = ()
    stability: tuple[Stability, ...] = ()
    study: StabilityStudy | None = None
    damage: DamageTable | None = None
    comparison: Comparison | None = None
    published: PublishedMetrics | None = None
    sites: tuple[SiteFigures, ...] = ()
    dense: tuple[Measurement, ...] = ()
    cuts: tuple[Cut, ...] = ()
    prompts: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def stack(self) -> str:
        """Path of the stack of blocks that the first cut is of; `auto` where none is named, as in a GGUF file."""
        return self.cuts[0].model.stack if self.cuts and self.cuts[0].file_format != "gguf" else "auto"

    def to_json(self) -> str:
        """The record as indented JSON; nan and infinities become null."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads a record from `record.json`, or from the folder that holds it.

        Raises:
            DataError: The file is missing, is not JSON, or is not a record of this schema.
        """
        path = Path(path)
        file = path / "record.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"There is no record at `{path}`. Give a `record.json` or the folder that `avss` wrote.")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(f"`{file}` is not JSON ({error}). Give the `record.json` of a run.") from error
        if not isinstance(raw, Mapping) or raw.get("schema_version") != SCHEMA_VERSION:
            found = raw.get("schema_version") if isinstance(raw, Mapping) else None
            raise DataError(
                f"`{file}` has schema version `{found}`; this avss reads version {SCHEMA_VERSION}. "
                "Write it again with this version, or read it with the version that wrote it."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"`{file}` is not a run record: `{where}`: {first['msg']}. It may be damaged.") from error

    def _repr_html_(self) -> str:
        from avss.reporting.notebook import record_html  # see ScoreTable._repr_html_

        return record_html(self)
