"""`avss evaluate`: figures with standard errors, beside the dense model."""

from pathlib import Path
from typing import Annotated

import typer

from avss.cli import options as opt

_PROMPT = "Prompts and columns"


def command(
    model: opt.Model,
    baseline: Annotated[str | None, typer.Option(help="The dense model, measured in the same run.")] = None,
    task: opt.Task = None,
    data: Annotated[
        str | None, typer.Option(help="Data of the task: file, hub data set or builtin.", show_default="builtin")
    ] = None,
    limit: opt.Limit = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a perplexity window.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    template: Annotated[
        str | None, typer.Option(help="Prompt with {text} or {question}; \\n is a new line.", rich_help_panel=_PROMPT)
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Words for labels 0, 1, ...: negative,positive; or neg=terrible,pos=great.", rich_help_panel=_PROMPT
        ),
    ] = None,
    shots: Annotated[int, typer.Option(help="Solved examples before each item.", rich_help_panel=_PROMPT)] = 0,
    shots_data: Annotated[
        str | None, typer.Option(help="Where these come from; by default the data.", rich_help_panel=_PROMPT)
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.", rich_help_panel=_PROMPT)] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels.", rich_help_panel=_PROMPT)] = None,
    out: opt.Out = None,
    stack: opt.Stack = "auto",
    head: opt.Head = "auto",
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure MODEL on perplexity, choice, classification, similarity or speed, beside its baseline."""
    from avss import composer
    from avss.config import TaskConfig
    from avss.errors import ConfigError
    from avss.output import check_free, fresh_folder

    kinds = task or []
    if data is not None and len(kinds) != 1:
        raise ConfigError(
            "`--data` belongs to exactly one `--task`. With several tasks write `--task kind=FILE` for each."
        )
    if data is not None and "=" in kinds[0]:
        raise ConfigError(f"`--task {kinds[0]}` already names its data; leave `--data` out.")
    settings = opt.given(
        limit=limit,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        template=template.replace("\\n", "\n") if template else None,
        labels=tuple(labels.split(",")) if labels else None,
        shots=shots,
        shots_data=shots_data,
        text_column=text_column,
        label_column=label_column,
        data=data,
    )
    tasks = [TaskConfig.parse(kind, **settings) for kind in kinds]
    if out is not None:
        read = (source for one in tasks for source in (one.data, one.shots_data))
        check_free(out, force=force, sources=(model, baseline, *read))
    loading = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    loading["stack"] = stack
    with opt.shown_stages(quiet=quiet) as stages:
        record = composer.evaluate(
            model,
            tasks,
            baseline=baseline,
            command=opt.this_command(),
            stages=stages,
            loading={"head": head, **loading},
            **({} if tasks else settings),
        )
        if out is not None:
            with stages("Drawing the report"), fresh_folder(Path(out), force=force) as folder:
                composer.write_record(record, folder)
    if json:
        typer.echo(record.to_json())
        return
    if quiet:
        return
    from avss.cli.show import show_path, show_results, show_warnings

    show_results(record)
    show_warnings(record.warnings)
    if out is not None:
        show_path("Report", out / "report.html")
