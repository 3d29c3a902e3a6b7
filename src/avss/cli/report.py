"""`avss report`: draws a record again."""

from pathlib import Path
from typing import Annotated

import typer

from avss.cli import options as opt


def command(
    record: Annotated[Path, typer.Argument(help="A record.json, or the folder that holds one.", show_default=False)],
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Draw the page, the figures and the tables of RECORD again, and print its results."""
    from avss import composer
    from avss.record import RunRecord

    value = RunRecord.read(record)
    page = composer.report(record, out, force=force)
    if json:
        typer.echo(value.to_json())
        return
    if quiet:
        return
    from avss.cli.show import show_path
    from avss.cli.summary import show_record

    show_record(value)
    show_path("Report", page)
