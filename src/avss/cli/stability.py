"""`avss stability`: does the choice depend on the text?"""

from typing import Annotated

import typer

from avss.cli import options as opt


def command(
    model: opt.Model,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Text; repeat for several. The first is what the others are compared with."),
    ] = None,
    criteria: Annotated[
        str, typer.Option(help="Names, comma-separated, or all.")
    ] = "avss,avss-paper,avss-product,block-influence,update-norm",
    fraction: Annotated[float, typer.Option(help="Share of blocks whose choice is compared.")] = 0.25,
    seeds: Annotated[int, typer.Option(help="Draws of each text.")] = 3,
    sizes: Annotated[
        str | None,
        typer.Option(help="Amounts to compare, e.g. 8,16,32.", show_default="a quarter, a half, all"),
    ] = None,
    samples: opt.Samples = 64,
    seq_len: opt.SeqLen = 512,
    batch_size: opt.BatchSize = 8,
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
    """Score MODEL on several draws, amounts and kinds of text, and compare what they would remove."""
    from avss import composer
    from avss.criteria import find_criteria
    from avss.errors import ConfigError
    from avss.output import check_free

    find_criteria(criteria)
    try:
        amounts = tuple(int(size) for size in sizes.split(",")) if sizes else ()
    except ValueError as error:
        raise ConfigError(f"`--sizes {sizes}` is not a list of numbers. Write it as 8,16,32.") from error
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
        study = composer.stability(
            loaded,
            data or ["builtin"],
            criteria=criteria,
            fraction=fraction,
            num_seeds=seeds,
            sizes=amounts,
            samples=samples,
            stages=stages,
            seq_len=seq_len,
            batch_size=batch_size,
        )
        if out is not None:
            with stages("Drawing the report"):
                composer.write_stability(study, out, command=opt.this_command(), force=force)
    if json:
        typer.echo(study.model_dump_json(indent=2))
        return
    if quiet:
        return
    from avss.cli.show import show_path, show_texts
    from avss.reporting.tables import study_texts

    show_texts("Stability (against the largest draw of the first text)", study_texts(study))
    if out is not None:
        show_path("Report", out / "report.html")
