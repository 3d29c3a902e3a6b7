"""`avss from-csv`: AVSS and the layers to remove from tables of variance and sparsity; no model, no torch."""

from pathlib import Path
from typing import Annotated

import typer

from avss.cli import options as opt


def command(
    variance: Annotated[
        Path,
        typer.Argument(help="CSV with a Layer and a variance column (or both values, then alone).", show_default=False),
    ],
    sparsity: Annotated[
        Path | None, typer.Argument(help="CSV with a Layer and a sparsity column.", show_default=False)
    ] = None,
    fraction: Annotated[float, typer.Option(help="Share of the layers; of the sum of scores with --rule mass.")] = 0.25,
    reference: Annotated[
        bool,
        typer.Option("--reference", help="As the published script: cumulated before the sort, threshold on that sum."),
    ] = False,
    rule: Annotated[str, typer.Option(help="count, or mass: the lowest within a share of the sum.")] = "count",
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compute AVSS, normalised and cumulated, and the layers to remove, from tables of variance and sparsity."""
    from avss.composer.layer_table import from_csv, published_note, write_layer_table
    from avss.output import check_free

    if out is not None:
        check_free(out, force=force, sources=(variance, sparsity))
    table = from_csv(variance, sparsity, fraction=fraction, reference=reference, rule=opt.mass_rule(rule))
    if out is not None:
        write_layer_table(table, out, force=force)
    if json:
        typer.echo(table.model_dump_json(indent=2))
        return
    if quiet:
        return
    from avss.cli.show import show_layer_table, show_path

    show_layer_table(table, note=published_note(table) if reference else None)
    if out is not None:
        show_path("Table", out / "avss.csv")
