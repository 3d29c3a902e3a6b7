"""`avss damage`: what leaving out each block truly costs."""

from typing import Annotated

import typer

from avss.cli import options as opt


def command(
    model: opt.Model,
    data: opt.Data = "builtin",
    samples: Annotated[int, typer.Option(help="Sequences, or images.")] = 16,
    seq_len: opt.SeqLen = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass; small ones save memory.")] = 2,
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
    """Measure what leaving out each block of MODEL costs: KL to the whole model, loss, perplexity."""
    from avss import composer
    from avss.output import check_free

    if out is not None:
        check_free(out, force=force, sources=(model, data))
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
        if loaded.note and not quiet:
            typer.echo(loaded.note, err=True)
        table = composer.damage(
            loaded, data, stages=stages, samples=samples, seq_len=seq_len, batch_size=batch_size, seed=seed
        )
        if out is not None:
            with stages("Drawing the report"):
                composer.write_damage(table, out, command=opt.this_command(), force=force)
    if json:
        typer.echo(table.model_dump_json(indent=2))
        return
    if quiet:
        return
    from avss.cli.show import show_path, show_texts
    from avss.reporting.tables import damage_texts

    show_texts("Measured damage of leaving out each block (rank 0: cheapest to lose)", damage_texts(table))
    share = table.num_blocks_run / table.num_blocks_naive
    typer.echo(f"Computed {table.num_blocks_run:,} blocks instead of {table.num_blocks_naive:,} ({share:.0%}).")
    if out is not None:
        show_path("Damage", out / "damage.csv")
        show_path("Report", out / "report.html")
