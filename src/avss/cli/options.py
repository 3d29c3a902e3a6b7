"""The options that several verbs share, declared once, so that they mean and are called the same everywhere."""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from avss.progress import Stages

Model = Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.", show_default=False)]

Out = Annotated[Path | None, typer.Option("--out", help="Folder to write; it appears whole or not at all.")]
RequiredOut = Annotated[
    Path, typer.Option("--out", help="Folder to write; it appears whole or not at all.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder that avss wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no tables.")]

_LOADING = "Loading"
Head = Annotated[
    str,
    typer.Option(help="auto, causal, masked, classifier, encoder or seq2seq.", rich_help_panel=_LOADING),
]
Dtype = Annotated[
    str, typer.Option(help="To compute in: auto, float32, bfloat16 or float16.", rich_help_panel=_LOADING)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps, or map (all GPUs).", rich_help_panel=_LOADING)]
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

_TEXT = "Calibration text"
Data = Annotated[
    str,
    typer.Option(
        help="txt, csv, json, jsonl or parquet file, folder, hub data set (name:config@split#column), or builtin.",
        rich_help_panel=_TEXT,
    ),
]
Samples = Annotated[int, typer.Option(help="Sequences.", rich_help_panel=_TEXT)]
SeqLen = Annotated[int, typer.Option(help="Tokens in a sequence.", rich_help_panel=_TEXT)]
BatchSize = Annotated[int, typer.Option(help="Sequences in a forward pass.", rich_help_panel=_TEXT)]
Seed = Annotated[int, typer.Option(help="Of every draw.", rich_help_panel=_TEXT)]
FirstToken = Annotated[
    str,
    typer.Option(help="keep or drop: whether the first token of each sequence counts.", rich_help_panel=_TEXT),
]

_CHOICE = "Which blocks go"
Criterion = Annotated[str, typer.Option(help="The criterion that chooses.", rich_help_panel=_CHOICE)]
Fraction = Annotated[float | None, typer.Option(help="Share of blocks, rounded half up.", rich_help_panel=_CHOICE)]
Count = Annotated[int | None, typer.Option(help="Number of blocks.", rich_help_panel=_CHOICE)]
Blocks = Annotated[
    str | None, typer.Option(help="The blocks themselves, e.g. 3,12-15 (both ends count).", rich_help_panel=_CHOICE)
]
Contiguous = Annotated[
    bool, typer.Option("--contiguous", help="Neighbours only: the run with the lowest sum.", rich_help_panel=_CHOICE)
]
Protect = Annotated[
    str,
    typer.Option(
        help="Blocks that stay: auto (both ends, but for published selections), none, or a list such as 0,1,-1.",
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
        help="Copy the kept weights from file to file, without the model in memory.",
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

Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="perplexity, choice, classification, similarity or speed; with its own data as kind=FILE. Repeatable.",
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


def given(**settings: Any) -> dict[str, Any]:
    """The settings that were given: those that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


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
