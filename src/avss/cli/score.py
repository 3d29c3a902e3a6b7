"""`avss score`: how important is each block, by every criterion?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from avss.cli import options as opt

DEFAULT_CRITERIA = "avss,avss-paper,avss-product,block-influence,update-norm"

_REFERENCE = "The published script"
_FRACTION = 0.25


def command(
    model: opt.Model,
    data: opt.Data = "builtin",
    criteria: str = typer.Option(
        DEFAULT_CRITERIA,
        help="Names, comma-separated, or all: avss, avss-paper, avss-product, avss-reference, variance, sparsity, "
        "block-influence, update-norm, angular, angular-all, taylor, gradient-l1, gradient-l2, magnitude, "
        "magnitude-l2, first, last, random.",
    ),
    out: opt.Out = None,
    samples: opt.AnySamples = None,
    seq_len: opt.AnySeqLen = None,
    batch_size: opt.BatchSize = 8,
    seed: opt.AnySeed = None,
    first_token: opt.FirstToken = "keep",
    fraction: float = typer.Option(_FRACTION, help="Share of blocks whose choice the warnings speak of."),
    sites: Annotated[
        str,
        typer.Option(help="Where in the blocks to look: block, attention, mlp, mlp-activation (a list), or all."),
    ] = "block",
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            help="Measure what the published script measures, on its batches (padded to 128, seed 42), instead of "
            "criteria.",
            rich_help_panel=_REFERENCE,
        ),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Whose gradients and weights it measures: ffn, attention or all.",
            rich_help_panel=_REFERENCE,
            show_default="ffn",
        ),
    ] = None,
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
    """Score every block of MODEL by each criterion, from one forward pass over the text or the images."""
    from avss import composer
    from avss.config import refuse_unread
    from avss.criteria import find_criteria
    from avss.criteria.sites import find_sites
    from avss.errors import ConfigError
    from avss.output import check_free

    loading = {
        "head": head,
        "dtype": dtype,
        "device": device,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "stack": stack,
    }
    count_first_token = opt.first_token(first_token)
    if out is not None:
        check_free(out, force=force, sources=(model, data))
    if reference:
        if criteria != DEFAULT_CRITERIA or first_token != "keep":
            raise ConfigError(
                "`--reference` measures what the published script does; leave out `--criteria` and `--first-token`."
            )
        elsewhere = {
            "sites": None if sites == "block" else sites,
            "fraction": None if fraction == _FRACTION else fraction,
        }
        refuse_unread(elsewhere, "criteria, which `--reference` measures none of")
        drawn = opt.given(samples=samples, seq_len=seq_len, seed=seed, weights=weights)
        _reproduce(model, data, {**loading, **drawn, "batch_size": batch_size}, out, force, json=json, quiet=quiet)
        return
    if weights is not None:
        raise ConfigError("`--weights` belongs to `--reference`; add it, or leave `--weights` out.")
    find_criteria(criteria)
    find_sites(sites)
    with opt.shown_stages(quiet=quiet) as stages:
        with stages("Loading the model"):
            loaded = composer.load(model, or_disk=True, **loading)
        table = composer.score(
            loaded,
            data,
            criteria=criteria,
            first_token=count_first_token,
            fraction=fraction,
            sites=sites,
            stages=stages,
            batch_size=batch_size,
            **opt.given(samples=samples, seq_len=seq_len, seed=seed),
        )
        if out is not None:
            with stages("Drawing the report"):
                composer.write_scores(table, out, command=opt.this_command(), force=force)
    if json:
        typer.echo(table.model_dump_json(indent=2))
        return
    if quiet:
        return
    from avss.cli.show import show_path, show_scores, show_sites, show_warnings

    show_scores(table)
    if table.sites:
        show_sites(table.sites)
    show_warnings(table.warnings)
    if out is not None:
        show_path("Scores", out / "scores.csv")
        show_path("Report", out / "report.html")


def _reproduce(
    model: str, data: str, settings: dict[str, Any], out: Path | None, force: bool, *, json: bool, quiet: bool
) -> None:
    from avss import composer

    with opt.shown_stages(quiet=quiet) as stages:
        metrics = composer.reproduce(model, data, stages=stages, **settings)
        if out is not None:
            with stages("Drawing the report"):
                composer.write_reproduction(metrics, out, command=opt.this_command(), force=force)
    if json:
        typer.echo(metrics.model_dump_json(indent=2))
        return
    if quiet:
        return
    from avss.cli.show import show_path, show_published

    show_published(metrics)
    if out is not None:
        show_path("Table", out / "published.csv")
        show_path("Figure", out / "figures" / "published.png")
        show_path("Report", out / "report.html")
