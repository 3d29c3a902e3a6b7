"""What one run is: every setting with its meaning and its range, from flags or from a TOML file. No torch here."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from avss.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)

TASK_KINDS = ("perplexity", "choice", "classification", "similarity", "speed")
TaskKind = Literal["perplexity", "choice", "classification", "similarity", "speed"]


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
    """`auto`, cpu, cuda, cuda:N, mps, or `map` to spread over all GPUs."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    stack: str = "auto"
    """Which stack of blocks: `auto`, or its name or path (`encoder`, `decoder`, `text`, `vision`, ...)."""


class DataConfig(Settings):
    """The calibration text."""

    source: str = "builtin"
    """File, folder, hub data set or `builtin`; see `avss.data.sources`."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """`packed` windows for language models, `padded` rows for the rest."""
    samples: int = Field(default=64, ge=1)
    """Sequences."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens in a sequence."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences in a forward pass."""
    seed: int = Field(default=0, ge=0)
    """Of the draw."""


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
    """Whether the blocks must be neighbours: the run with the lowest sum of scores."""
    protect: str = "auto"
    """Blocks that stay, e.g. `0,1,-1`; `none`; or `auto`: the first and the last, unless the criterion reproduces a
    published selection or is a baseline."""


class TaskConfig(Settings):
    """One evaluation task."""

    kind: TaskKind
    """perplexity, choice, classification, similarity or speed."""
    data: str = "builtin"
    """File, hub data set, or `builtin`: the data of this kind that come with avss."""
    name: str | None = None
    """What tables call it; by default the kind and the data's name."""
    limit: int | None = Field(default=None, ge=1)
    """Windows or items at most; a seeded draw."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens in a perplexity window."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences in a forward pass."""
    template: str | None = None
    """Prompt with `{text}` (classification) or `{question}` (choice)."""
    labels: tuple[str, ...] | None = None
    """Words for the labels 0, 1, ... of a classification by a language model."""
    text_column: str | None = None
    """Column of the texts."""
    label_column: str | None = None
    """Column of the labels."""
    shots: int = Field(default=0, ge=0)
    """Solved examples before each item of a classification."""
    shots_data: str | None = None
    """Where these come from; by default the evaluation data, never the item itself."""
    seed: int = Field(default=0, ge=0)
    """Of every draw."""

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


class RunConfig(Settings):
    """A whole run: score, choose, cut, verify, evaluate, report."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    criteria: tuple[str, ...] = ("avss", "avss-product", "avss-update", "block-influence", "update-norm")
    """What to score by; the plan's criterion is added if missing."""
    first_token: bool = True
    """Whether the first token of each sequence counts in the scores."""
    plan: PlanConfig = PlanConfig(fraction=0.25)
    compare: tuple[str, ...] = ()
    """Criteria whose cut of the same size is evaluated beside the plan's, in memory."""
    tasks: tuple[TaskConfig, ...] = ()
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
