"""`avss run`: the whole path in one command."""

from pathlib import Path
from typing import Annotated

import typer

from avss.cli import options as opt


def command(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local folder, or GGUF file.", show_default="from --config")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the whole run; the flags given beside it win.")
    ] = None,
    out: opt.Out = None,
    data: Annotated[str | None, typer.Option(help="Calibration text.", show_default="builtin")] = None,
    criteria: Annotated[str | None, typer.Option(help="To score by, comma-separated, or all.")] = None,
    criterion: Annotated[
        str | None, typer.Option(help="The criterion that chooses.", show_default="block-influence")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of blocks, rounded half up.", show_default="0.25")
    ] = None,
    count: opt.Count = None,
    blocks: opt.Blocks = None,
    contiguous: opt.Contiguous = False,
    rule: Annotated[str | None, typer.Option(help="count, or mass: a share of the sum.", show_default="count")] = None,
    protect: Annotated[str | None, typer.Option(help=opt.PROTECT, show_default="auto")] = None,
    select: Annotated[
        str | None,
        typer.Option(help="scores, or a search: greedy, window, evolution.", show_default="scores"),
    ] = None,
    max_params: opt.MaxParams = None,
    max_bytes: opt.MaxBytes = None,
    speedup: opt.Speedup = None,
    min_retention: opt.MinRetention = None,
    retention_task: opt.RetentionTask = None,
    score_rounds: opt.ScoreRounds = None,
    from_search: opt.FromSearch = None,
    objective: opt.Objective = None,
    objective_task: opt.ObjectiveTask = None,
    search_time: opt.SearchTime = None,
    max_passes: opt.MaxPasses = None,
    screen: opt.Screen = None,
    width: opt.Width = None,
    beam: opt.Beam = None,
    finalists: opt.Finalists = None,
    resume: opt.Resume = True,
    compensate: Annotated[
        str | None, typer.Option(help="Repair without training: auto, refit, linear, ...", show_default="none")
    ] = None,
    heal: Annotated[
        str | None, typer.Option(help="Repair by training: a budget such as 30m or 2M.", show_default="none")
    ] = None,
    heal_data: Annotated[
        str | None,
        typer.Option(
            help="Text or images to train on; without --heal for 30m, or under --quality best for what is left of "
            "--time.",
            show_default="the calibration text",
        ),
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help="best: search, repair and heal within --time.", show_default="plain")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="For search, repair and healing under best, e.g. 40m.", show_default="30m")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Criteria whose cut of the same size is measured beside it, comma-separated.")
    ] = None,
    task: opt.Task = None,
    limit: opt.Limit = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text for both models to continue. Repeatable.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="64")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a sequence and a perplexity window.", show_default="512")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a forward pass.", show_default="8")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every draw.", show_default="0")] = None,
    augment: opt.Augment = None,
    form: opt.Form = None,
    written: opt.Written = None,
    short: opt.Short = None,
    first_token: Annotated[str | None, typer.Option(help="keep or drop.", show_default="keep")] = None,
    stack: Annotated[str | None, typer.Option(help="Stack of blocks to work on.", show_default="auto")] = None,
    head: Annotated[str | None, typer.Option(help="What to load it as.", show_default="auto")] = None,
    dtype: Annotated[str | None, typer.Option(help="To compute in.", show_default="auto")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute.", show_default="auto")] = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Score, choose, cut, repair, heal, verify, evaluate, report: MODEL -> a smaller model and its proof."""
    from avss.cli.execute import execute, merge_flags

    for_tasks = opt.given(limit=limit, seq_len=seq_len, batch_size=batch_size, seed=seed)
    settings = merge_flags(
        config,
        {
            "model": opt.given(
                source=model,
                head=head,
                dtype=dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code or None,
                stack=stack,
            ),
            "data": opt.given(
                source=data,
                samples=samples,
                seq_len=seq_len,
                batch_size=batch_size,
                seed=seed,
                augment=augment,
                forms=opt.forms(form),
                written=written,
                short=short,
            ),
            "plan": opt.given(
                criterion=criterion,
                fraction=fraction,
                count=count,
                blocks=blocks,
                contiguous=contiguous or None,
                rule=opt.mass_rule(rule) if rule else None,
                protect=protect,
            )
            | opt.plan_settings(
                select=select,
                max_params=max_params,
                max_bytes=max_bytes,
                speedup=speedup,
                min_retention=min_retention,
                retention_task=retention_task,
                score_rounds=score_rounds,
                from_search=from_search,
                task_settings=for_tasks,
            ),
            "search": opt.search_settings(
                objective=objective,
                objective_task=objective_task,
                search_time=search_time,
                max_passes=max_passes,
                screen=screen,
                width=width,
                beam=beam,
                finalists=finalists,
                resume=resume,
                task_settings=for_tasks,
            ),
            **opt.given(
                criteria=criteria.split(",") if criteria else None,
                compare=compare.split(",") if compare else None,
                prompts=prompt or None,
                first_token=opt.first_token(first_token) if first_token else None,
                compensate=compensate,
                heal=opt.given(budget=heal, source=heal_data) or None,
                quality=quality,
                time=time,
                out=str(out) if out else None,
                force=force or None,
            ),
        },
        tasks=task or [],
        task_settings=for_tasks,
    )
    execute(settings, command=opt.this_command(), as_json=json, quiet=quiet)
