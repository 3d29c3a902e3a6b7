"""What one run is: every setting with its meaning and its range, from flags or from a TOML file. No torch here."""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from avss.errors import ConfigError, unknown_name
from avss.forms import Form

_Model = TypeVar("_Model", bound=BaseModel)

TASK_KINDS = ("perplexity", "choice", "classification", "similarity", "speed")
TaskKind = Literal["perplexity", "choice", "classification", "similarity", "speed"]


CompensationMethod = Literal["auto", "scale", "linear", "cosine", "refit", "sweep", "steer", "none"]
COMPENSATION_METHODS: tuple[CompensationMethod, ...] = get_args(CompensationMethod)
"""Ways to repair a cut without training, `auto` first; see `avss.compensation`."""


def check_compensation(method: str, *, in_memory: bool = True) -> CompensationMethod:
    """The method of that name.

    Args:
        method: As the user wrote it.
        in_memory: Whether the model will be in memory, which every method but `none` needs.

    Raises:
        ConfigError: There is no such method, or the model is not in memory.
    """
    if method not in COMPENSATION_METHODS:
        raise ConfigError(unknown_name("--compensate", method, COMPENSATION_METHODS))
    found = cast(CompensationMethod, method)
    if found != "none" and not in_memory:
        raise ConfigError(
            f"`--compensate {method}` runs the model, and a cut from file to file does not have it in memory. Leave it "
            "out, or cut in memory: without `--format gguf`, with `--in-memory`."
        )
    return found


def check_rewriting(given: Mapping[str, Any], *, repairs: bool) -> None:
    """Whether another writing, the form of prompts, or short windows can be meant for some of the text.

    Args:
        given: `augment`, `forms`, `written` and `short` of `DataConfig`, so far as the user gave them.
        repairs: Whether anything is repaired or healed, which is all that reads them.

    Raises:
        ConfigError: A share is none, a form is none, or nothing would read it.
    """
    for name in ("augment", "short"):
        if (share := given.get(name)) is not None and not 0 <= share <= 1:
            raise ConfigError(f"`--{name} {share:g}` must be a share between 0 and 1.")
    forms = as_forms(given.get("forms"))
    if not repairs:
        refuse_unread(
            {**given, "forms": forms or None},
            "the text of a repair or of healing, and neither was asked for",
            "`--compensate auto`",
        )


def check_written(written: int | None, forms: Sequence[str] | None, compensate: str) -> None:
    """Whether prompts that the dense model is to write would be read, in a cut that is not healed.

    Args:
        written: As the user gave it; None for nothing given.
        forms: Likewise.
        compensate: The repair.

    Raises:
        ConfigError: They would not.
    """
    asked = {"written": written}
    if not as_forms(forms):
        refuse_unread(asked, "the forms of prompts, and none were named", "`--form`")
    if compensate != "auto":
        refuse_unread(asked, "a repair by `auto`, which was not asked for", "`--compensate auto`")


def check_short(short: float | None, compensate: str) -> None:
    """Whether short windows would be read, in a cut that is not healed.

    Args:
        short: Their share as the user gave it; None for none given.
        compensate: The repair.

    Raises:
        ConfigError: They would not.
    """
    if compensate != "auto":
        refuse_unread({"short": short}, "a repair by `auto`, which was not asked for", "`--compensate auto`")


_FLAGS = {"task": "--objective-task", "forms": "--form", "seconds": "--search-time", "resume": "--no-resume"}
"""Settings whose flag has another name."""


def refuse_unread(settings: Mapping[str, Any], what: str, remedy: str | None = None) -> None:
    """Refuses settings that nothing would read: who gave them would believe that they counted.

    Args:
        settings: Name -> value as given; None for none given.
        what: What they are for, and that this is not it.
        remedy: What to add so that they count; None where nothing makes them.

    Raises:
        ConfigError: One was given.
    """
    for name, value in settings.items():
        if value is not None:
            flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
            number = f"{value:g}" if isinstance(value, float) else value
            if isinstance(value, tuple | list):
                number = repr(value[0])
            shown = "" if isinstance(value, bool | BaseModel) else f" {number}"
            add = f", or add {remedy}" if remedy else ""
            raise ConfigError(f"`{flag}{shown}` is for {what}. Leave it out{add}.")


def seeded(settings: _Model, seed: int) -> _Model:
    """The settings, drawn by this seed unless they name one."""
    return settings if "seed" in settings.model_fields_set else settings.model_copy(update={"seed": seed})


def as_given(settings: BaseModel) -> dict[str, Any]:
    """The settings that somebody gave, whatever the value; what is left at its default is not among them."""
    return {name: getattr(settings, name) for name in settings.model_fields_set}


_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_SIZES = {
    **{"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12},
}
_TIME = re.compile(
    r"(?:(?P<h>\d+(?:\.\d+)?)\s*(?:h|hours?))?\s*(?:(?P<m>\d+(?:\.\d+)?)\s*(?:m|min|minutes?))?\s*"
    r"(?:(?P<s>\d+(?:\.\d+)?)\s*(?:s|sec|seconds?))?"
)


def _number(value: Any, units: Mapping[str, int]) -> Any:
    """A number with a unit as a plain one, rounded down; anything else as it is."""
    match = re.fullmatch(r"\s*([\d_.]+)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if match is None:
        return value
    if match[2].lower() not in units:
        raise ValueError(f"the unit `{match[2]}` is not one of {', '.join(filter(None, units))}")
    number = float(match[1].replace("_", "")) * units[match[2].lower()]
    if not math.isfinite(number):
        raise ValueError("there is no such number")
    return int(number)


def parse_bytes(text: str) -> int:
    """Bytes from `300MB`, `16G`, `1.5 GiB` or a plain number.

    Raises:
        ConfigError: It is no amount of memory.

    Example:
        >>> parse_bytes("300MB"), parse_bytes("1.5 GiB")
        (300000000, 1610612736)
    """
    try:
        value = _number(text, _SIZES)
    except ValueError:
        value = None
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(
            f"`{text}` is no amount of memory that a program could use. Write `300MB`, `16GB` or `1.5GiB`."
        )
    return value


def _seconds(value: Any) -> Any:
    """`90s`, `10m` or `1h30m` in seconds; anything else as it is."""
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or not any(match.groups()):
        return value
    return sum(float(match[unit] or 0) * seconds for unit, seconds in (("h", 3600), ("m", 60), ("s", 1)))


TARGETS = ("fraction", "count", "blocks", "max_params", "max_bytes", "speedup")
"""Settings of which one says how many blocks go."""


class Settings(BaseModel):
    """Immutable settings; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Settings):
    """Which model, and how to hold it."""

    source: str = Field(min_length=1)
    """Hub id, folder or GGUF file."""
    head: str = "auto"
    """`auto`, or what to load it as: causal, masked, classifier, encoder, seq2seq."""
    dtype: str = "auto"
    """Dtype to compute in: `auto`, float32, bfloat16, float16."""
    device: str = "auto"
    """`auto`, cpu, cuda, cuda:N, mps, `map` to spread over all GPUs, or `disk` to read each block when it runs."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    stack: str = "auto"
    """Which stack of blocks: `auto`, or its name or path (`encoder`, `decoder`, `text`, `vision`, ...)."""


def as_forms(value: Any) -> Any:
    """A list of forms as it is, one form as a list of it, `none` as an empty one.

    Raises:
        ConfigError: One is none.
    """
    if value == "none" or value == ["none"] or value == ("none",):
        return ()
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, list | tuple):
        for form in value:
            if isinstance(form, str):
                Form.parse(form)
    return value


Forms = Annotated[tuple[str, ...] | None, BeforeValidator(as_forms)]


class DataConfig(Settings):
    """The calibration text, or the images for a stack that reads those."""

    source: str = "builtin"
    """File, folder, hub data set or `builtin`; see `avss.data.sources`. Images: a folder or a file; see
    `avss.data.images`."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """`packed` windows for language models, `padded` rows for the rest."""
    samples: int = Field(default=64, ge=1)
    """Sequences, or images."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens in a sequence."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences in a forward pass."""
    seed: int = Field(default=0, ge=0)
    """Of the draw, and of every other that names no seed: the search's, and healing's in a whole run."""
    augment: float | None = Field(default=None, ge=0, le=1)
    """Share of the sequences that a repair reads in another writing, and healing too where its own settings say
    nothing (`HealConfig.augment`). Scores and searches read the text as it is; the finalists of a search are repaired
    and judged on text rewritten likewise."""
    forms: Forms = None
    """Prompts that a quarter of the sequences is read in by a repair (fewer by healing, where its own settings say
    nothing): sentences of the text in forms such as `Review: {text}\\nSentiment: {negative|positive}`
    (`avss.forms`). By default those of the tasks in a run, of whose data nothing gets in but the names of labels,
    else none; `none` for none. For models that continue text. The finalists of a search are judged on them too."""
    written: int | None = Field(default=None, ge=0)
    """Prompts that the dense model writes the sentences of itself, for each form (`avss.models.writing`): a repair by
    `auto` reads them in place of sentences of the text and, where a form asks for one of several answers, ends with a
    solve for the choice among them (`avss.compensation.answers`); healing likewise, where its own settings say nothing;
    and the finalists of a search are judged by these choices. 0 for none. By default 512 for models that can, and no
    more than the text has room for where a form has no answers and healing does not read it."""
    short: float | None = Field(default=None, ge=0, le=1)
    """Share of what a repair by `auto` is fitted to that is read in short windows of 64 tokens, from all over the text
    (`avss.data.short`): as many tokens. By default none: they bring short answers nearer and long texts less near than
    whole windows do (docs/log.md). Healing likewise, where its own settings say nothing (`HealConfig.short`, which has
    a default of its own)."""


class PlanConfig(Settings):
    """How many blocks go, and which may not."""

    criterion: str = "block-influence"
    """The criterion that chooses."""
    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the blocks to remove; the count is rounded half up."""
    count: int | None = Field(default=None, ge=1)
    """Number of blocks to remove."""
    blocks: str | None = None
    """The blocks themselves, e.g. `3,12-15`."""
    contiguous: bool = False
    """Whether the blocks must be neighbours: the run with the lowest sum of scores, or with the smallest measured
    distance across it where the criterion measures runs (`angular`)."""
    rule: Literal["count", "mass"] = "count"
    """What `fraction` is a share of: the number of blocks, or the sum of all scores (the lowest go while their sum
    stays within it, the published threshold)."""
    protect: str = "auto"
    """Blocks that stay, e.g. `0,1,-1`; `none`; or `auto`: the first and the last, unless the criterion reproduces a
    published selection or is a baseline."""
    select: Literal["scores", "window", "greedy", "evolution"] = "scores"
    """Who chooses: the criterion's scores, or a search by measured damage."""
    max_params: Annotated[int | None, BeforeValidator(lambda value: _number(value, _COUNTS))] = Field(
        default=None, ge=1
    )
    """Instead of a count: the most parameters that may be left, e.g. `100M`."""
    max_bytes: Annotated[int | None, BeforeValidator(lambda value: _number(value, _SIZES))] = Field(default=None, ge=1)
    """Instead of a count: the largest checkpoint, e.g. `200MB`."""
    speedup: float | None = Field(default=None, gt=1)
    """Instead of a count: how many times faster a forward pass must be, estimated from measured latency."""
    min_retention: float | None = Field(default=None, gt=0, le=1)
    """The most blocks that keep this share of a task's result; a count or a fraction beside it is the most that go."""
    retention_task: "TaskConfig | None" = None
    """The task that `min_retention` speaks of."""
    score_rounds: int = Field(default=1, ge=1)
    """For `scores`: rounds of removing, each scored anew on what is left, repaired first where a repair follows."""
    from_search: str | None = None
    """A folder or record with a search, to take the blocks from instead of choosing anew."""

    def share(self, num_blocks: int) -> float:
        """The share of the blocks that the warnings of scores speak of: those to go, or one where a size decides."""
        return self.fraction or (self.count or 1) / num_blocks

    @property
    def takes_the_lowest(self) -> bool:
        """Whether the blocks with the lowest scores go, a number of them: what resampling the scores speaks of."""
        by_score = self.select == "scores" and self.blocks is None and self.from_search is None
        return by_score and not self.contiguous and self.rule == "count" and self.score_rounds == 1

    def sized(self, count: int) -> Self:
        """The same with a count as the only target."""
        targets = dict.fromkeys((*TARGETS, "min_retention", "retention_task"))
        return self.model_copy(update={**targets, "count": count, "rule": "count"})


class TaskSettings(Settings):
    """What every evaluation task has."""

    limit: int | None = Field(default=None, ge=1)
    """Windows or items at most; a seeded draw."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens in a perplexity window, and of a text compared by `similarity`."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences in a forward pass."""
    seed: int = Field(default=0, ge=0)
    """Of every draw."""


class TaskConfig(TaskSettings):
    """One evaluation task."""

    kind: TaskKind
    """perplexity, choice, classification, similarity or speed."""
    data: str = "builtin"
    """File, hub data set, or `builtin`: the data of this kind that come with avss."""
    name: str | None = None
    """What tables call it; by default the kind and the data's name."""
    template: str | None = None
    """Prompt with `{text}` (classification) or `{question}` (choice)."""
    labels: tuple[str, ...] | None = None
    """Words for the labels 0, 1, ... of a classification by a language model: those of the data, in any case, where the
    data have words; `neg=terrible` asks the model for another word than the data's."""
    text_column: str | None = None
    """Column of the texts."""
    label_column: str | None = None
    """Column of the labels."""
    shots: int = Field(default=0, ge=0)
    """Solved examples before each item of a classification."""
    shots_data: str | None = None
    """Where these come from; by default the evaluation data, never the item itself."""

    @classmethod
    def parse(cls, text: str, **settings: Any) -> Self:
        """`kind` or `kind=data`, as on the command line.

        Raises:
            ConfigError: The kind is unknown.

        Example:
            >>> TaskConfig.parse("choice=piqa.jsonl").data
            'piqa.jsonl'
        """
        kind, _, data = text.partition("=")
        return build(cls, {"kind": kind.strip(), **({"data": data} if data else {}), **settings})


class Budget(Settings):
    """How long healing may take: a time, a number of tokens, or both; then whichever ends first.

    Example:
        >>> Budget.parse("1h30m,2M")
        Budget(seconds=5400.0, tokens=2000000)
        >>> str(Budget.parse("500k tokens"))
        '500,000 tokens'
    """

    seconds: float | None = Field(default=None, gt=0)
    """Wall time, validation included."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens trained on, padding not counted; of images, the places that they take."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """`30m`, `1h30m`, `90s` are times; `500k`, `2M`, `1B`, `250000 tokens` are tokens; a comma joins the two.

        `m` is minutes and `M` is million: the one place where a capital matters, so both are printed in full.

        Raises:
            ConfigError: It is neither, or says the same thing twice.
        """
        found: dict[str, Any] = {}
        for part in text.split(","):
            kind, value = _budget_part(part.strip(), text)
            if kind in found:
                raise ConfigError(
                    f"The budget `{text}` has two {kind}. Give a time, a number of tokens, or one of each."
                )
            found[kind] = value
        return build(cls, found)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seconds is None and self.tokens is None:
            raise ValueError("a budget needs a time or a number of tokens")
        return self

    def __str__(self) -> str:
        """In words, e.g. `30 minutes` or `2,000,000 tokens`."""
        time = [] if self.seconds is None else [_time_in_words(self.seconds)]
        tokens = [] if self.tokens is None else [f"{self.tokens:,} token{'s' if self.tokens != 1 else ''}"]
        return " or ".join(time + tokens)


_TOKENS = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?:(?P<unit>[kKMB])(?:\s*tokens?)?|tokens?)")
_THOUSANDS = re.compile(r"(?<=\d)_(?=\d)")


def _budget_part(part: str, whole: str) -> tuple[str, float | int]:
    plain = _THOUSANDS.sub("", part)
    tokens, time = _TOKENS.fullmatch(plain), _seconds(plain)
    if tokens is not None:
        unit = {None: 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}[tokens["unit"]]
        return "tokens", round(float(tokens["number"]) * unit)
    if isinstance(time, float):
        return "seconds", time
    hint = " `m` is minutes; millions are `M`." if re.fullmatch(r"[\d.]+\s*m\s*tokens?", plain) else ""
    raise ConfigError(
        f"The budget `{whole}` is neither a time nor a number of tokens.{hint} Write a time such as `30m` or `1h30m`, "
        "tokens such as `500k` or `2M`, or both: `30m,2M`."
    )


def _time_in_words(seconds: float) -> str:
    parts = []
    for name, size in (("hour", 3600), ("minute", 60)):
        count = int(seconds // size)
        seconds -= count * size
        if count:
            parts.append(f"{count} {name}{'s' if count != 1 else ''}")
    if seconds or not parts:
        parts.append(f"{seconds:g} second{'s' if seconds != 1 else ''}")
    return " ".join(parts)


def _as_budget(value: Any) -> Any:
    return Budget.parse(value) if isinstance(value, str) else value


class HealConfig(Settings):
    """Repair by training: distillation from the dense model."""

    source: str | None = None
    """Text to train on: file, folder, hub data set or `builtin`, or several with commas between. By default the
    calibration text in a run, else `builtin`."""
    budget: Annotated[Budget, BeforeValidator(_as_budget)] = Budget(seconds=1800.0)
    """When to stop, e.g. `30m`, `2M` tokens; see `Budget.parse`."""
    weights: Literal["auto", "all", "blocks", "after", "lora"] = "auto"
    """What is trained. `all`: every weight. `blocks`: all blocks and the last norm, not the embeddings and the head.
    `after`: of these, the blocks from five before the first cut on; those before are the dense model's still and are
    computed once for both. `lora`: adapters of low rank on the matrices of the blocks, merged at the end (needs
    peft). `auto`: `after`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak; by default 3e-4 (after a repair or an earlier healing half of that), for `lora` 1e-3; for classifiers a
    tenth."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences in a step of the optimiser, over all processes; by default what holds about 1,024 tokens, 2 to 32."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences in memory at once, by default the whole batch; without effect on the result."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens in a sequence at most."""
    short: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps that read short windows, of 64 tokens and each from another place, in place of sequences: as
    many tokens, of which more stand at the beginning of a context. By default 0.5 for models that continue text; 0 for
    none, as for all others."""
    augment: float | None = Field(default=None, ge=0, le=1)
    """Share of the training sequences that is read in another writing: other case, punctuation apart or missing, lines
    joined, words missing (`avss.data.augment`). By default 0.5 for models that continue text, 0 for others."""
    forms: Forms = None
    """Prompts that 15 % of the training sequences are read in (`DataConfig.forms`); no loss is on their own tokens.
    By default none; in a run, those of the calibration text."""
    written: int | None = Field(default=None, ge=0)
    """Prompts that the dense model writes the sentences of itself, for each form (`avss.models.writing`): trained on,
    and at the end the last map is solved for by those that ask for one of several answers
    (`avss.compensation.answers`). 0 for none, and the sentences of the text. By default 512 for models that can; of a
    budget of time in a tenth at most. In a run, those of the repair."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the budget in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW, on matrices."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a step's gradient."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both models' predictions."""
    label_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss on the text's own next tokens, or on a classifier's labels; the rest is the dense model's
    prediction."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the distance between the hidden states after the same original block, in both models."""
    rank: int = Field(default=32, ge=1)
    """Of the adapters."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products in training; `auto`: bfloat16 where the machine computes it in hardware. Weights are trained in
    float32 always."""
    recompute: bool = False
    """Whether the insides of the blocks are computed again in the backward pass: less memory, a third more time."""
    validations: int = Field(default=8, ge=1)
    """How often the held-out text is measured, evenly over the budget."""
    held_out: int | None = Field(default=None, ge=1)
    """Sequences held out for that; by default what holds about 8,192 tokens, 16 to 512. A fifth of the text at most."""
    patience: int = Field(default=4, ge=1)
    """Validations without a new best after which healing stops."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the text, and of masks; in a whole run the calibration text's, where none is named."""


class SearchConfig(Settings):
    """How hard a search by measured damage looks."""

    objective: Literal["kl", "loss", "accuracy"] = "kl"
    """What must stay small: the KL divergence from the dense model (one minus the cosine for encoders), the next-token
    loss, or the wrong answers of a task."""
    task: TaskConfig | None = None
    """For `accuracy`: the task, choice or classification."""
    max_passes: float | None = Field(default=None, gt=0)
    """Most passes of the whole model over the text."""
    seconds: Annotated[float | None, BeforeValidator(_seconds)] = Field(default=None, gt=0)
    """Most seconds of measuring; `10m` and `1h30m` are understood."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the calibration text to measure on, at most; by default all. Less text and more passes choose better
    than the other way round, where time is short."""
    screen: str = "damage"
    """What says which blocks to try first: a criterion, or `damage`: each block alone is measured on one batch."""
    width: int = Field(default=6, ge=1)
    """Blocks tried in a step before it is asked whether that was enough."""
    beam: int = Field(default=1, ge=1)
    """Sets of each size that the next size is built from."""
    windows: int = Field(default=2, ge=0)
    """Runs of neighbours of each size that compete."""
    exchanges: int = Field(default=2, ge=0)
    """Rounds of exchanging single blocks at the end."""
    error: float = Field(default=0.1, gt=0, lt=1)
    """Bound on the probability that a race drops its true best."""
    finalists: int = Field(default=3, ge=1)
    """Where the cut is repaired and `objective` is `kl`: sets that are repaired and judged again before the last
    choice; 1 for none."""
    seed: int = Field(default=0, ge=0)
    """Of the evolution's draws; by default the calibration text's."""
    resume: bool = True
    """Whether measurements are kept, so that a killed search goes on where it was."""
    cache: str | None = None
    """Folder for them, if not the user's cache."""


class RunConfig(Settings):
    """A whole run: score, choose, cut, verify, evaluate, report."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    criteria: tuple[str, ...] = ("avss", "avss-paper", "avss-product", "block-influence", "update-norm")
    """What to score by; the plan's criterion is added if missing."""
    first_token: bool = True
    """Whether the first token of each sequence counts in the scores."""
    plan: PlanConfig = PlanConfig(fraction=0.25)
    search: SearchConfig = SearchConfig()
    """How hard to look, where `plan.select` names a search."""
    compensate: CompensationMethod = "none"
    """Repair without training; see `avss.compensation`."""
    heal: HealConfig | None = None
    """Repair by training, after that; None for none. Its text is the calibration text, unless it names another."""
    quality: Literal["plain", "best"] = "plain"
    """`best`: choose by search, repair and heal, within `time`; settings given for any of the three stay."""
    time: Annotated[float | None, BeforeValidator(_seconds)] = Field(default=None, gt=0)
    """Seconds for search, repair and healing together under `best`, 30 minutes by default; `40m` is understood."""
    compare: tuple[str, ...] = ()
    """Criteria whose cut of the same size is evaluated beside the plan's, in memory."""
    tasks: tuple[TaskConfig, ...] = ()
    """What both models are measured on; by default what suits the model, with `task_settings`."""
    task_settings: TaskSettings = TaskSettings()
    """Of the tasks that are run by default: `limit`, `seq_len`, `batch_size`, `seed`."""
    prompts: tuple[str, ...] = ()
    """Texts that the models continue, for the reader's eye."""
    out: str
    """Folder to write."""
    force: bool = False
    """Whether an existing folder may be replaced."""

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Self:
        """Reads a TOML file; `overrides` replace whole top-level keys.

        Raises:
            ConfigError: Missing, not TOML, or with a key or value that is not allowed. All problems at once.
        """
        return build(cls, {**read_toml(path), **overrides})


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of a TOML file.

    Raises:
        ConfigError: Missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"There is no config file `{path}`.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{path}` is not TOML: {error}.") from error


def build(cls: type[_Model], values: dict[str, Any]) -> _Model:
    """Builds settings from plain values.

    Raises:
        ConfigError: Every problem in one message, with near names for unknown keys.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(cls, item) for item in error.errors()) + ".") from error


def _problem(cls: type[BaseModel], item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        owner = _owner(cls, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), owner.model_fields, n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        return f"Unknown setting `{place}`{hint}; allowed: {', '.join(owner.model_fields)}"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"`{place.replace('_', '-')}` = `{item['input']}` is not allowed: {message}"


def _owner(cls: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The settings class that a key stands in, through nested settings and lists of them."""
    for part in place:
        if isinstance(part, str) and part in cls.model_fields:
            annotation = cls.model_fields[part].annotation
            for found in (annotation, *get_args(annotation)):
                if isinstance(found, type) and issubclass(found, BaseModel):
                    cls = found
    return cls
