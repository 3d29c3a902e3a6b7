"""`avss heal`: a cut model trained to answer as the dense one does, saved and verified."""

from typing import Annotated

import typer

from avss.cli import options as opt

_TRAINING = "Training"


def command(
    model: Annotated[str, typer.Argument(help="Folder that `avss prune` or `avss run` wrote.", show_default=False)],
    out: opt.RequiredOut,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model.", show_default="the one named in the folder's record")
    ] = None,
    data: opt.TrainingData = "builtin",
    budget: Annotated[
        str, typer.Option(help="Time or tokens: 30m, 1h30m, 500k, 2M, or both: 30m,2M (whichever ends first).")
    ] = "30m",
    labels: Annotated[
        str | None,
        typer.Option(help="For classifiers: the column of the labels.", show_default="learn from the dense model"),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="What is trained: all, blocks (no embeddings, no head), after (from five blocks before the first "
            "cut on), lora, or auto (after).",
            rich_help_panel=_TRAINING,
        ),
    ] = "auto",
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak.",
            show_default="3e-4, repaired 1.5e-4, lora 1e-3; classifiers a tenth",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences in a step.", show_default="about 1,024 tokens", rich_help_panel=_TRAINING),
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences in memory at once.", show_default="the batch", rich_help_panel=_TRAINING),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.", rich_help_panel=_TRAINING)] = 512,
    short: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps that read short windows of 64 tokens, each from another place.",
            show_default="0.5 for models that continue text, else 0",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of both models' predictions.", show_default="1", rich_help_panel=_TRAINING),
    ] = None,
    label_weight: Annotated[
        float | None,
        typer.Option(
            help="Share of the loss on the text's own next tokens, or on the labels.",
            show_default="0, with --labels 0.5",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    hidden_weight: Annotated[
        float, typer.Option(help="Weight of the distance of hidden states.", rich_help_panel=_TRAINING)
    ] = 0.0,
    augment: Annotated[
        float | None,
        typer.Option(
            help="Share of the sequences read in another writing: case, punctuation, line breaks, missing words.",
            show_default="0.5 for models that continue text, else 0",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt that 15 % of the sequences are put into, e.g. "
            "'Review: {text}\\nSentiment: {negative|positive}'. Repeatable.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    written: Annotated[
        int | None,
        typer.Option(
            help="Prompts that the dense model writes itself for each --form; trained on, and those with answers "
            "solved for at the end.",
            show_default="512; 0 for none",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the adapters of lora.", show_default="32", rich_help_panel=_TRAINING)
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the products: auto, float32 or bfloat16.", rich_help_panel=_TRAINING)
    ] = "auto",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory, a third more time.", rich_help_panel=_TRAINING)
    ] = False,
    held_out: Annotated[
        int | None,
        typer.Option(help="Sequences held out.", show_default="about 8,192 tokens", rich_help_panel=_TRAINING),
    ] = None,
    validations: Annotated[int, typer.Option(help="Measurements of them.", rich_help_panel=_TRAINING)] = 8,
    patience: Annotated[
        int, typer.Option(help="Measurements without a new best before it stops.", rich_help_panel=_TRAINING)
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of the order of the text.", rich_help_panel=_TRAINING)] = 0,
    head: opt.Head = "auto",
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a cut MODEL to answer as the dense one does. Start a killed run again: it goes on."""
    from avss import composer
    from avss.config import HealConfig, build
    from avss.healing.team import Team

    settings = opt.given(
        weights=weights,
        learning_rate=learning_rate,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        short=short,
        temperature=temperature,
        label_weight=label_weight,
        hidden_weight=hidden_weight,
        augment=augment,
        forms=opt.forms(form),
        written=written,
        rank=rank,
        precision=precision,
        recompute=recompute,
        held_out=held_out,
        validations=validations,
        patience=patience,
        seed=seed,
    )
    config = build(HealConfig, {"source": data, "budget": budget, **settings})
    # Of several processes one talks.
    leads = Team().leads
    quiet = quiet or not leads
    if not quiet and not json:
        typer.echo(f"Healing for {config.budget}, validation included.", err=True)
    with opt.shown_stages(quiet=quiet) as stages:
        healed = composer.heal(
            model,
            teacher=teacher,
            data=data,
            budget=budget,
            labels=labels,
            out=out,
            force=force,
            loading={"head": head, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code},
            command=opt.this_command(),
            stages=stages,
            **settings,
        )
    if json and leads:
        typer.echo(healed.record.to_json())
        return
    if quiet:
        return
    from avss.cli.show import show_healing, show_path, show_verification, show_warnings

    show_warnings(healed.record.warnings)
    first = healed.record.cuts[0]
    if first.healing is not None:
        show_healing(first.healing)
    if first.verification is not None:
        show_verification(first.verification)
    show_path("Healed model", out)
