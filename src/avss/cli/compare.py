"""`avss compare`: every criterion against measured damage."""

from typing import Annotated

import typer

from avss.cli import options as opt


def command(
    model: opt.Model,
    data: opt.Data = "builtin",
    damage_data: Annotated[
        str | None,
        typer.Option(help="Text or images to measure damage on.", show_default="other parts of the same"),
    ] = None,
    criteria: Annotated[str, typer.Option(help="Names, comma-separated, or all.")] = "all",
    fraction: Annotated[
        float | None, typer.Option(help="Share of blocks, rounded half up.", show_default="0.25, without --count")
    ] = None,
    count: opt.Count = None,
    protect: opt.Protect = "auto",
    samples: opt.Samples = 64,
    damage_samples: Annotated[int, typer.Option(help="Sequences to measure damage on.")] = 16,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Search by measured damage as well: the ceiling. Takes longest.")
    ] = False,
    seq_len: opt.SeqLen = 512,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
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
    """Judge every criterion on MODEL by the measured damage of the blocks it would remove."""
    from avss import composer
    from avss.criteria import find_criteria
    from avss.errors import ConfigError
    from avss.output import check_free

    find_criteria(criteria)
    if fraction is not None and count is not None:
        raise ConfigError("Say how many blocks go by one of `--fraction` and `--count`; got both.")
    if out is not None:
        check_free(out, force=force, sources=(model, data, damage_data))
    with opt.shown_stages(quiet=quiet) as stages:
        with stages("Loading the model"):
            loaded = composer.load(
                model,
                head=head,
                dtype=dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
                stack=stack,
                or_disk=True,
            )
        record = composer.compare(
            loaded,
            data,
            damage_data=damage_data,
            criteria=criteria,
            fraction=fraction,
            count=count,
            protect=protect,
            damage_samples=damage_samples,
            greedy=greedy,
            stages=stages,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
        )
        if out is not None:
            with stages("Drawing the report"):
                record = composer.write_comparison(record, out, command=opt.this_command(), force=force)
    if json:
        typer.echo(record.to_json())
        return
    if quiet or record.comparison is None:
        return
    from avss.cli.show import show_path, show_texts, show_warnings
    from avss.reporting.tables import verdict_texts

    show_texts(
        "Criteria against measured damage (agreement, depth: rank correlation with damage, index)",
        verdict_texts(record.comparison),
    )
    show_warnings(record.warnings)
    if out is not None:
        show_path("Report", out / "report.html")
