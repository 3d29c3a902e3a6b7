"""`avss prune`: a smaller checkpoint, verified."""

from typing import TYPE_CHECKING, Any

import typer

from avss.cli import options as opt

if TYPE_CHECKING:
    from avss.record import RunRecord


def command(
    model: opt.Model,
    out: opt.RequiredOut,
    criterion: opt.Criterion = "block-influence",
    fraction: opt.Fraction = None,
    count: opt.Count = None,
    blocks: opt.Blocks = None,
    contiguous: opt.Contiguous = False,
    rule: opt.Rule = "count",
    protect: opt.Protect = "auto",
    select: opt.Select = "scores",
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
    scores: opt.Scores = None,
    compensate: opt.Compensate = "none",
    data: opt.Data = "builtin",
    samples: opt.Samples = 64,
    seq_len: opt.SeqLen = 512,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
    augment: opt.Augment = None,
    form: opt.Form = None,
    written: opt.Written = None,
    short: opt.Short = None,
    stack: opt.Stack = "auto",
    head: opt.Head = "auto",
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    on_disk: opt.OnDisk = None,
    file_format: opt.Format = "safetensors",
    max_memory: opt.MaxMemory = None,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Remove blocks from MODEL and save a stock checkpoint, proven by loading it again."""
    from avss.composer import disk
    from avss.config import (
        PlanConfig,
        SearchConfig,
        build,
        check_compensation,
        check_rewriting,
        check_short,
        check_written,
        parse_bytes,
    )
    from avss.criteria import find_criteria
    from avss.errors import ConfigError, unknown_name
    from avss.output import check_free
    from avss.plan import check_one_target, check_plain, check_search, files_of
    from avss.progress import Timed

    choice = opt.given(fraction=fraction, count=count, blocks=blocks)
    for_tasks = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed}
    targets = opt.plan_settings(
        select=select,
        max_params=max_params,
        max_bytes=max_bytes,
        speedup=speedup,
        min_retention=min_retention,
        retention_task=retention_task,
        score_rounds=score_rounds,
        from_search=from_search,
        task_settings=for_tasks,
    )
    search = opt.search_settings(
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
    )
    # Refused before the model is loaded.
    chosen_by = {"criterion": criterion, "contiguous": contiguous, "rule": opt.mass_rule(rule), "protect": protect}
    plan = build(PlanConfig, chosen_by | choice | targets)
    check_one_target(plan)
    check_search(build(SearchConfig, search), plan, repairs=compensate != "none")
    find_criteria([criterion])
    check_compensation(compensate)
    rewriting = opt.given(augment=augment, forms=opt.forms(form), written=written, short=short)
    check_rewriting(rewriting, repairs=compensate != "none")
    check_written(written, opt.forms(form), compensate)
    check_short(short, compensate)
    if file_format not in ("safetensors", "gguf"):
        raise ConfigError(unknown_name("--format", file_format, ["safetensors", "gguf"]))
    if on_disk and file_format == "gguf":
        raise ConfigError("`--format gguf` cuts from file to file anyway. Leave out `--on-disk`.")
    allowed = parse_bytes(max_memory) if max_memory is not None else None
    check_free(out, force=force, sources=(model, data, scores, *files_of(plan, build(SearchConfig, search))))
    reason = None
    if on_disk is None and file_format == "safetensors":
        reason = disk.fits_memory(model, max_memory=allowed, dtype=dtype, revision=revision)
        if reason and not quiet:
            typer.echo(reason, err=True)
    in_memory = not (on_disk or reason or file_format == "gguf")
    if not in_memory:
        check_plain(plan, stack=stack)
        if dtype != "auto":
            raise ConfigError("A cut from file to file keeps every weight as it is stored. Leave out `--dtype`.")
    check_compensation(compensate, in_memory=in_memory)
    common: dict[str, Any] = {"out": out, "force": force, "scores": scores, "command": opt.this_command()}
    text: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "batch_size": batch_size, "seed": seed}
    text |= rewriting
    loading: dict[str, Any] = {"head": head, "revision": revision}
    with opt.shown_stages(quiet=quiet) as stages:
        if on_disk or reason:
            timed = Timed(stages)
            loading |= {"trust_remote_code": trust_remote_code, "device": device}
            if disk.wants_scores(plan, scores):
                from avss.composer.pruning import score_on_disk

                common["scores"] = score_on_disk(
                    model, plan, data=data, settings=text, loading=loading, max_memory=allowed, stages=timed
                )
            record = disk.prune_on_disk(
                model, plan, seed=seed, max_memory=allowed, note=reason, stages=timed, **common, **loading
            )
        elif file_format == "gguf":
            from avss.composer.gguf_pruning import prune_gguf

            record = prune_gguf(
                model, plan, data=data, device=device, max_memory=allowed, stages=stages, **common, **loading, **text
            )
        else:
            from avss import composer

            with stages("Loading the model"):
                loaded = composer.load(
                    model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, stack=stack, **loading
                )
            record = composer.prune(
                loaded,
                criterion=criterion,
                **choice,
                contiguous=contiguous,
                rule=plan.rule,
                protect=protect,
                compensate=compensate,
                plan=targets,
                search=search,
                data=data,
                stages=stages,
                **common,
                **text,
            ).record
    if json:
        typer.echo(record.to_json())
    elif not quiet:
        _show(record, out)


def _show(record: "RunRecord", out: opt.Path) -> None:
    from avss.cli.show import (
        show_compensation,
        show_path,
        show_plan,
        show_search,
        show_verification,
        show_warnings,
    )

    cut = record.cuts[0]
    show_warnings(record.warnings)
    if record.search is not None:
        show_search(record.search)
    show_plan(cut.plan)
    if cut.compensation is not None:
        show_compensation(cut.compensation)
    if cut.verification is not None:
        show_verification(cut.verification)
    show_path("Smaller model", out)
    if cut.file_format == "gguf":
        name = out.absolute().name.lower()
        show_path("Run it", f"llama-cli -m {out / 'model.gguf'}")
        show_path("Or with Ollama", f"ollama create {name} -f {out / 'Modelfile'} && ollama run {name}")
