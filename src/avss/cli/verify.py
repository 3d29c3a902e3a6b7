"""`avss verify`: is a saved model what it should be?"""

from typing import Annotated

import typer

from avss.cli import options as opt


def command(
    model: Annotated[
        str, typer.Argument(help="Folder with a checkpoint, or a GGUF file.", show_default=False, metavar="DIR")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="The model it was cut from: folder, GGUF file or hub id.", show_default="the one in its record.json"
        ),
    ] = None,
    head: opt.Head = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    max_memory: opt.MaxMemory = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check a saved model in a fresh process, and that it is the original without its blocks. Exit code 1 if not."""
    from avss import composer

    with opt.shown_stages(quiet=quiet or json) as stages:
        report = composer.verify(
            model,
            against=against,
            head=head,
            trust_remote_code=trust_remote_code,
            max_memory=max_memory,
            stages=stages,
        )
    if json:
        typer.echo(report.to_json())
    elif not quiet:
        from avss.cli.show import show_checks

        show_checks(report)
    if not report.passed:
        raise typer.Exit(1)
