"""The options that several verbs share, declared once, so that they mean and are called the same everywhere."""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from avss.progress import Stages

Model = Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.", show_default=False)]

Out = Annotated[Path | None, typer.Option("--out", help="Folder to write; it appears whole or not at all.")]
RequiredOut = Annotated[
    Path, typer.Option("--out", help="Folder to write; it appears whole or not at all.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder that avss wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no tables.")]

_LOADING = "Loading"
Head = Annotated[
    str,
    typer.Option(
        help="auto, causal, masked, classifier, encoder, seq2seq or image-classifier.", rich_help_panel=_LOADING
    ),
]
Dtype = Annotated[
    str, typer.Option(help="To compute in: auto, float32, bfloat16 or float16.", rich_help_panel=_LOADING)
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:N, map (all GPUs), disk (a block at a time: scores, damage, evaluation), or "
        "mps (no scores, damage or repair).",
        rich_help_panel=_LOADING,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_LOADING)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=_LOADING)
]
Stack = Annotated[
    str,
    typer.Option(
        help="Stack of blocks to work on: auto, or a name or path that `avss inspect` lists (encoder, decoder, text, "
        "vision, ...).",
        rich_help_panel=_LOADING,
    ),
]

_TEXT = "Calibration data"
Data = Annotated[
    str,
    typer.Option(
        help="txt, csv, json, jsonl or parquet file, folder, hub data set (name:config@split#column), or builtin; "
        "several with commas between are mixed. For a stack that reads images: a folder of images, or an image file.",
        rich_help_panel=_TEXT,
    ),
]
TrainingData = Annotated[
    str,
    typer.Option(
        help="Text to train on: txt, csv, json, jsonl or parquet file, folder, hub data set, or builtin; for a model "
        "that reads images a folder of them. A part of it is held out.",
    ),
]
Augment = Annotated[
    float | None,
    typer.Option(
        help="Share of the sequences that a repair (and healing) reads in another writing: case, punctuation, line "
        "breaks, missing words. Scores read the text as it is.",
        show_default="0.5 for models that continue text, else 0",
        rich_help_panel=_TEXT,
    ),
]
Form = Annotated[
    list[str] | None,
    typer.Option(
        help="Prompt that a repair (and healing) puts sentences of the text into, e.g. "
        "'Review: {text}\\nSentiment: {negative|positive}'. Repeatable; none for none.",
        show_default="those of the tasks in avss run, else none",
        rich_help_panel=_TEXT,
    ),
]
Written = Annotated[
    int | None,
    typer.Option(
        help="Prompts that the dense model writes itself for each --form; a repair reads them, and ends with a solve "
        "for the answers of those that have some; healing trains on them too.",
        show_default="512; 0 for none",
        rich_help_panel=_TEXT,
    ),
]
Short = Annotated[
    float | None,
    typer.Option(
        help="Share of the text that a repair by auto (and healing) reads in short windows of 64 tokens, from all over "
        "it: nearer in short answers, less near in long texts.",
        show_default="repair 0; healing 0.5 for models that continue text, else 0",
        rich_help_panel=_TEXT,
    ),
]
Samples = Annotated[int, typer.Option(help="Sequences, or images.", rich_help_panel=_TEXT)]
SeqLen = Annotated[int, typer.Option(help="Tokens in a sequence.", rich_help_panel=_TEXT)]
AnySamples = Annotated[
    int | None,
    typer.Option(help="Sequences, or images.", rich_help_panel=_TEXT, show_default="64; all with --reference"),
]
AnySeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens in a sequence.", rich_help_panel=_TEXT, show_default="512; 128 with --reference"),
]
AnySeed = Annotated[
    int | None, typer.Option(help="Of every draw.", rich_help_panel=_TEXT, show_default="0; 42 with --reference")
]
BatchSize = Annotated[int, typer.Option(help="Sequences in a forward pass.", rich_help_panel=_TEXT)]
Seed = Annotated[int, typer.Option(help="Of every draw.", rich_help_panel=_TEXT)]
FirstToken = Annotated[
    str,
    typer.Option(help="keep or drop: whether the first token of each sequence counts.", rich_help_panel=_TEXT),
]

_CHOICE = "Which blocks go"
Criterion = Annotated[str, typer.Option(help="The criterion that chooses.", rich_help_panel=_CHOICE)]
Fraction = Annotated[
    float | None,
    typer.Option(help="Share of blocks, rounded half up. This or another target is needed.", rich_help_panel=_CHOICE),
]
Count = Annotated[int | None, typer.Option(help="Number of blocks.", rich_help_panel=_CHOICE)]
Blocks = Annotated[
    str | None, typer.Option(help="The blocks themselves, e.g. 3,12-15 (both ends count).", rich_help_panel=_CHOICE)
]
Contiguous = Annotated[
    bool,
    typer.Option(
        "--contiguous", help="Neighbours only: the run with the lowest sum, or distance.", rich_help_panel=_CHOICE
    ),
]
Rule = Annotated[
    str,
    typer.Option(help="count, or mass: --fraction is then a share of the sum of scores.", rich_help_panel=_CHOICE),
]
PROTECT = "Blocks that stay: auto (both ends, but for published selections), none, or a list such as 0,1,-1."
Protect = Annotated[
    str,
    typer.Option(
        help=PROTECT,
        rich_help_panel=_CHOICE,
    ),
]

Scores = Annotated[
    Path | None,
    typer.Option("--scores", help="Choose by the scores in this folder (avss score --out).", rich_help_panel=_CHOICE),
]

_FILES = "From file to file"
OnDisk = Annotated[
    bool | None,
    typer.Option(
        "--on-disk/--in-memory",
        help="Copy the kept weights from file to file; score and verify a block at a time.",
        show_default="on disk where the model does not fit in memory",
        rich_help_panel=_FILES,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="safetensors: an ordinary checkpoint. gguf: cut a GGUF file as it lies, for llama.cpp and Ollama.",
        rich_help_panel=_FILES,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="Memory that may be used, e.g. 16GB: decides what is cut on disk, and what is run to verify it.",
        show_default="what is free",
        rich_help_panel=_FILES,
    ),
]
Select = Annotated[
    str,
    typer.Option(
        help="Who chooses: scores (of the criterion), or a search by measured damage: greedy, window, evolution.",
        rich_help_panel=_CHOICE,
    ),
]
MaxParams = Annotated[
    str | None, typer.Option(help="Remove until at most so many parameters are left: 100M.", rich_help_panel=_CHOICE)
]
MaxBytes = Annotated[
    str | None, typer.Option(help="Remove until the checkpoint is at most so large: 200MB.", rich_help_panel=_CHOICE)
]
Speedup = Annotated[
    float | None,
    typer.Option(help="Remove until a forward pass is so many times faster (estimated).", rich_help_panel=_CHOICE),
]
MinRetention = Annotated[
    float | None,
    typer.Option(help="Remove as many as keep this share of a task's result: 0.95.", rich_help_panel=_CHOICE),
]
RetentionTask = Annotated[
    str | None, typer.Option(help="That task: choice=FILE, perplexity=FILE, ...", rich_help_panel=_CHOICE)
]
ScoreRounds = Annotated[
    int | None,
    typer.Option(
        help="Remove in so many rounds, scored (with --compensate: repaired and scored) anew before each.",
        rich_help_panel=_CHOICE,
    ),
]
FromSearch = Annotated[
    Path | None,
    typer.Option(help="Take the blocks from the search in this output of avss.", rich_help_panel=_CHOICE),
]

_SEARCH = "How hard a search looks"
Objective = Annotated[
    str | None,
    typer.Option(
        help="What must stay small: kl (to the dense model), loss, or accuracy (of --objective-task).",
        show_default="kl",
        rich_help_panel=_SEARCH,
    ),
]
ObjectiveTask = Annotated[str | None, typer.Option(help="choice=FILE or classification=FILE.", rich_help_panel=_SEARCH)]
SearchTime = Annotated[
    str | None, typer.Option("--search-time", help="Most time of measuring: 10m.", rich_help_panel=_SEARCH)
]
MaxPasses = Annotated[
    float | None, typer.Option(help="Most passes of the whole model over the data.", rich_help_panel=_SEARCH)
]
Screen = Annotated[
    str | None,
    typer.Option(
        help="Which blocks to try first: by a criterion, or damage (each alone, on one batch).",
        show_default="damage",
        rich_help_panel=_SEARCH,
    ),
]
Width = Annotated[
    int | None,
    typer.Option(help="Blocks tried in a step before more are.", show_default="6", rich_help_panel=_SEARCH),
]
Beam = Annotated[
    int | None,
    typer.Option(help="Sets of each size to build the next on.", show_default="1", rich_help_panel=_SEARCH),
]
Finalists = Annotated[
    int | None,
    typer.Option(
        help="With a repair: best sets that are repaired and judged again; 1 for none.",
        show_default="3",
        rich_help_panel=_SEARCH,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Go on where a killed search of the same was.", rich_help_panel=_SEARCH),
]

Compensate = Annotated[
    str,
    typer.Option(
        help="Repair without training, kept only where it helps on held-out text: none, auto, or one of refit, linear, "
        "cosine, scale, sweep, steer.",
        rich_help_panel="Repair",
    ),
]

Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="perplexity, choice, classification, similarity or speed; with its own data as kind=FILE, "
        "images as kind=DIR. Repeatable. Language models classify by the prompt of reviews; another stands in a config "
        "file, or in `avss evaluate`.",
        show_default="what suits the model",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Windows or items at most, per task.")]


def first_token(value: str) -> bool:
    """`keep` or `drop` as a truth value.

    Raises:
        ConfigError: It is neither.
    """
    from avss.errors import ConfigError, unknown_name

    if value not in ("keep", "drop"):
        raise ConfigError(unknown_name("--first-token", value, ["keep", "drop"]))
    return value == "keep"


def mass_rule(value: str) -> "Literal['count', 'mass']":
    """`count` or `mass`.

    Raises:
        ConfigError: It is neither.
    """
    from avss.errors import ConfigError, unknown_name

    if value not in ("count", "mass"):
        raise ConfigError(unknown_name("--rule", value, ["count", "mass"]))
    return "mass" if value == "mass" else "count"


def plan_settings(
    *,
    select: str | None,
    max_params: str | None,
    max_bytes: str | None,
    speedup: float | None,
    min_retention: float | None,
    retention_task: str | None,
    score_rounds: int | None,
    from_search: Path | None,
    task_settings: dict[str, Any],
) -> dict[str, Any]:
    """The flags about which blocks go as settings of `avss.config.PlanConfig`, those given only."""
    return given(
        select=select,
        max_params=max_params,
        max_bytes=max_bytes,
        speedup=speedup,
        min_retention=min_retention,
        retention_task=_task(retention_task, task_settings),
        score_rounds=score_rounds,
        from_search=str(from_search) if from_search else None,
    )


def search_settings(
    *,
    objective: str | None,
    objective_task: str | None,
    search_time: str | None,
    max_passes: float | None,
    screen: str | None,
    width: int | None,
    beam: int | None,
    finalists: int | None,
    resume: bool,
    task_settings: dict[str, Any],
) -> dict[str, Any]:
    """The flags about a search as settings of `avss.config.SearchConfig`, those given only."""
    return given(
        objective=objective,
        task=_task(objective_task, task_settings),
        seconds=search_time,
        max_passes=max_passes,
        screen=screen,
        width=width,
        beam=beam,
        finalists=finalists,
        resume=None if resume else False,
    )


def _task(text: str | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    from avss.config import TaskConfig

    return None if text is None else TaskConfig.parse(text, **settings).model_dump()


def given(**settings: Any) -> dict[str, Any]:
    """The settings that were given: those that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def forms(typed: list[str] | None) -> list[str] | None:
    """Forms of prompts as they are meant: a typed backslash-n breaks the line."""
    return [form.replace("\\n", "\n") for form in typed] if typed else None


def this_command() -> str:
    """The command line as it was typed."""
    return shlex.join(["avss", *sys.argv[1:]])


@contextlib.contextmanager
def shown_stages(*, quiet: bool) -> "Iterator[Stages]":
    """Progress bars, or none."""
    from avss.progress import bars, silent

    if quiet:
        yield silent
    else:
        with bars() as stages:
            yield stages
