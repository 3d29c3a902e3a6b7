"""`avss inspect`: what is in there, and what would a cut change?"""

import dataclasses
import json as json_module

import typer

from avss.cli import options as opt


def command(
    model: opt.Model,
    stack: opt.Stack = "auto",
    head: opt.Head = "auto",
    device: opt.Device = "cpu",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show the block stacks found in MODEL, why one was chosen, and every config field that a cut would change."""
    from avss import composer

    with opt.shown_stages(quiet=quiet or json) as stages, stages("Loading the model"):
        found = composer.inspect(
            model, head=head, device=device, revision=revision, trust_remote_code=trust_remote_code, stack=stack
        )
    if json:
        raw = {
            **dataclasses.asdict(found),
            "model": found.model.model_dump(mode="json"),
            "example": found.example.model_dump(mode="json"),
            "changes": [change.model_dump(mode="json") for change in found.changes],
        }
        typer.echo(json_module.dumps(raw, indent=2))
        return
    if quiet:
        return
    from avss.cli.show import show_inspection

    show_inspection(found)
