"""`avss prune`: a smaller checkpoint, verified."""

import typer

from avss.cli import options as opt


def command(
    model: opt.Model,
    out: opt.RequiredOut,
    criterion: opt.Criterion = "block-influence",
    fraction: opt.Fraction = None,
    count: opt.Count = None,
    blocks: opt.Blocks = None,
    contiguous: opt.Contiguous = False,
    protect: opt.Protect = "auto",
    data: opt.Data = "builtin",
    samples: opt.Samples = 64,
    seq_len: opt.SeqLen = 512,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
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
    """Remove blocks from MODEL and save a stock checkpoint, proven by loading it again."""
    from avss import composer
    from avss.config import PlanConfig, build
    from avss.criteria import find_criteria
    from avss.output import check_free
    from avss.plan import check_one_target

    choice = opt.given(fraction=fraction, count=count, blocks=blocks)
    check_one_target(
        build(PlanConfig, {"criterion": criterion, "contiguous": contiguous, "protect": protect, **choice})
    )
    find_criteria([criterion])
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
        pruned = composer.prune(
            loaded,
            criterion=criterion,
            **choice,
            contiguous=contiguous,
            protect=protect,
            data=data,
            out=out,
            force=force,
            command=opt.this_command(),
            stages=stages,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
        )
    if json:
        typer.echo(pruned.record.to_json())
        return
    if quiet:
        return
    from avss.cli.show import show_path, show_plan, show_verification, show_warnings

    show_warnings(pruned.record.warnings)
    show_plan(pruned.plan)
    proof = pruned.record.cuts[0].verification
    if proof is not None:
        show_verification(proof)
    show_path("Smaller model", out)
