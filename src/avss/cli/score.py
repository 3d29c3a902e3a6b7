"""`avss score`: how important is each block, by every criterion?"""

import typer

from avss.cli import options as opt


def command(
    model: opt.Model,
    data: opt.Data = "builtin",
    criteria: str = typer.Option(
        "avss,avss-product,avss-update,block-influence,update-norm",
        help="Names, comma-separated, or all: avss, avss-reference, avss-product, avss-update, variance, sparsity, "
        "block-influence, update-norm, first, last, random.",
    ),
    out: opt.Out = None,
    samples: opt.Samples = 64,
    seq_len: opt.SeqLen = 512,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
    first_token: opt.FirstToken = "keep",
    fraction: float = typer.Option(0.25, help="Share of blocks whose choice the warnings speak of."),
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
    """Score every block of MODEL by each criterion, from one forward pass over the text."""
    from avss import composer
    from avss.criteria import find_criteria
    from avss.output import check_free

    find_criteria(criteria)
    count_first_token = opt.first_token(first_token)
    if out is not None:
        check_free(out, force=force)
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
            )
        table = composer.score(
            loaded,
            data,
            criteria=criteria,
            first_token=count_first_token,
            fraction=fraction,
            stages=stages,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
        )
        if out is not None:
            with stages("Drawing the report"):
                composer.write_scores(table, out, command=opt.this_command(), force=force)
    if json:
        typer.echo(table.model_dump_json(indent=2))
        return
    if quiet:
        return
    from avss.cli.show import show_path, show_scores, show_warnings

    show_scores(table)
    show_warnings(table.warnings)
    if out is not None:
        show_path("Scores", out / "scores.csv")
        show_path("Report", out / "report.html")
