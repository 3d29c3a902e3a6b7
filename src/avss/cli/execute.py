"""Runs a `RunConfig` and prints its end: shared by `avss run` and `avss demo`."""

from pathlib import Path
from typing import Any

import typer

from avss.cli import options as opt
from avss.config import TARGETS, RunConfig, TaskConfig, build, read_toml
from avss.errors import ConfigError
from avss.record import RunRecord


def merge_flags(
    config: Path | None, flags: dict[str, Any], *, tasks: list[str], task_settings: dict[str, Any]
) -> RunConfig:
    """The run that a TOML file and the flags beside it describe; a flag wins over the file.

    Raises:
        ConfigError: No model or no output folder, or a setting that is not allowed.
    """
    raw: dict[str, Any] = read_toml(config) if config else {}
    for key, value in [*flags.items(), ("task_settings", task_settings)]:
        if isinstance(value, dict) and not isinstance(raw.get(key, {}), dict):
            raise ConfigError(f"`{key}` in `{config}` must be a table: write `[{key}]`, and its settings below it.")
    for key, value in flags.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    plan = raw["plan"]
    ways = {*TARGETS, "min_retention"}
    if ways & flags["plan"].keys():  # the flag replaces the file's way of saying how many
        for other in ways - flags["plan"].keys():
            plan.pop(other, None)
        if "min_retention" not in flags["plan"] and "retention_task" not in flags["plan"]:
            plan.pop("retention_task", None)
    if not ways & plan.keys():
        plan["fraction"] = 0.25
    if "seed" in flags["data"]:  # of every draw: the flag replaces the file's seeds
        for part in (raw.get("search"), raw.get("heal")):
            if isinstance(part, dict):
                part.pop("seed", None)
    for name in ("augment", "forms"):  # of a repair and of healing
        if name in flags["data"] and isinstance(raw.get("heal"), dict):
            raw["heal"].pop(name, None)
    if tasks:
        raw["tasks"] = [TaskConfig.parse(task, **task_settings).model_dump() for task in tasks]
    elif isinstance(raw.get("tasks"), list):
        raw["tasks"] = [{**task, **task_settings} if isinstance(task, dict) else task for task in raw["tasks"]]
    else:
        raw["task_settings"] = {**raw.get("task_settings", {}), **task_settings}
    if not raw["model"].get("source"):
        raise ConfigError("No model was named. Give `avss run MODEL`, or `[model] source` in the config file.")
    if not raw.get("out"):
        raise ConfigError("No output folder was named. Give `--out DIR`, or `out` in the config file.")
    return build(RunConfig, raw)


def execute(config: RunConfig, *, command: str, as_json: bool, quiet: bool) -> RunRecord:
    """Runs it, prints the tables, and says where everything is."""
    from avss import composer

    with opt.shown_stages(quiet=quiet) as stages:
        record = composer.run(config, command=command, stages=stages)
    if as_json:
        typer.echo(record.to_json())
        return record
    if quiet:
        return record
    from avss.cli.show import show_path
    from avss.cli.summary import show_record

    show_record(record)
    out = Path(config.out)
    show_path("Smaller model", out / "model")
    show_path("Report", out / "report.html")
    return record
