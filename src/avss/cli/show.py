"""Prints values as tables. Everything shown is read from a record; nothing is computed here."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avss.plan import rounded_half_up
from avss.record import (
    CheckReport,
    Compensation,
    Healing,
    Plan,
    PublishedMetrics,
    RunRecord,
    ScoreTable,
    SearchResult,
    SiteFigures,
    Verification,
)
from avss.reporting.repair import compensation_rows, compensation_sentences
from avss.reporting.tables import ComparisonCell, comparison_rows, cut_labels, search_effort, search_texts

if TYPE_CHECKING:
    from avss.composer import Inspection
    from avss.composer.layer_table import LayerTable

_MAX_BLOCKS_ON_SCREEN = 200


def _console() -> Console:
    return Console(highlight=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def show_warnings(warnings: tuple[str, ...]) -> None:
    """One paragraph a warning."""
    for warning in warnings:
        _console().print(f"[yellow]![/yellow] {escape(warning)}")


def show_scores(table: ScoreTable, *, plans: tuple[Plan, ...] = ()) -> None:
    """Blocks by criteria; the blocks a plan removes are marked, the lowest quarter of each criterion is red."""
    console = _console()
    grid = _table("Scores (higher = keep; red = the lowest quarter of a criterion)")
    grid.add_column("block", justify="right")
    for scores in table.scores:
        grid.add_column(scores.criterion.replace("-", "-\n"), justify="right", no_wrap=True)
    for plan in plans:
        grid.add_column("cut by\n" + plan.method.replace("-", "-\n"), justify="center", no_wrap=True)
    lowest = max(1, rounded_half_up(table.num_blocks / 4))
    ranks = [scores.ranks() for scores in table.scores]
    for block in range(min(table.num_blocks, _MAX_BLOCKS_ON_SCREEN)):
        cells = []
        for scores, places in zip(table.scores, ranks, strict=True):
            text = f"{scores.values[block]:.3g}"
            cells.append(f"[red]{text}[/red]" if places[block] < lowest else text)
        marks = ["[red]x[/red]" if block in plan.removed else "" for plan in plans]
        grid.add_row(str(block), *cells, *marks)
    console.print(grid)


def show_sites(sites: Sequence[SiteFigures]) -> None:
    """The figures of sub-layers, one table a site."""
    for one in sites:
        grid = _table(f"{one.title} of each block")
        for name in ("block", *one.values):
            grid.add_column(name, justify="right")
        for block, row in enumerate(zip(*one.values.values(), strict=True)):
            if block < _MAX_BLOCKS_ON_SCREEN:
                grid.add_row(str(block), *(f"{value:.3g}" for value in row))
        _console().print(grid)


def show_published(metrics: PublishedMetrics) -> None:
    """The table of the published script, and how it was made."""
    rows = metrics.rows()
    grid = _table("As the published script measures (blocks are layers)")
    for name in rows[0]:
        grid.add_column(name, justify="right")
    for row in rows[:_MAX_BLOCKS_ON_SCREEN]:
        grid.add_row(*(str(value) if name == "Layer" else f"{value:.6g}" for name, value in row.items()))
    console = _console()
    console.print(grid)
    for note in metrics.notes:
        console.print(f"[dim]{escape(note)}[/dim]")


def show_layer_table(table: "LayerTable", *, note: str | None) -> None:
    """Layers by ascending AVSS, those that go in red, and the list of these."""
    grid = _table("AVSS by layer, lowest first" + (" (cumulated in layer order)" if table.reference else ""))
    for column in ("layer", "variance", "sparsity", "AVSS", "normalised", "cumulative", "removed"):
        grid.add_column(column, justify="right")
    for row in table.rows:
        values = (row.variance, row.sparsity, row.avss, row.normalized, row.cumulative)
        cells = [f"{value:.4g}" for value in values]
        grid.add_row(str(row.layer), *cells, "[red]x[/red]" if row.removed else "")
    console = _console()
    console.print(grid)
    if note is not None:
        console.print(f"[yellow]![/yellow] {escape(note)}")
    console.print(
        f"[bold]Removed[/bold]: {', '.join(map(str, table.removed)) or 'none'}  [dim]({escape(table.rule)})[/dim]"
    )


def show_search(search: SearchResult) -> None:
    """The best set of every size, what it costs, and what finding it took."""
    header, rows = search_texts(search)
    grid = _table(f"Search ({search.method}): the best set of every size (± standard error)")
    for title in header:
        grid.add_column(title, justify="left" if title in ("blocks", "found by") else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    _console().print(grid)
    _console().print(f"[dim]{escape(search_effort(search))}[/dim]")


def show_plan(plan: Plan) -> None:
    """The rule, the blocks that go, and where the others land."""
    console = _console()
    console.print(f"[bold]Removed[/bold]: blocks {plan.describe()}  [dim]({escape(plan.rule)})[/dim]")
    console.print(f"[bold]Original -> new[/bold]: {', '.join(f'{old}->{new}' for old, new in plan.index_map.items())}")


def show_compensation(repair: Compensation) -> None:
    """What a repair brought, at each cut and in all."""
    console = _console()
    for sentence in compensation_sentences(repair):
        console.print(f"[bold]Repair[/bold]: {escape(sentence)}")
    if not repair.cuts:
        return
    grid = _table("Repair at each cut (error: share of the variance of the dense stream after it)")
    for column in ("cut", "method", "ridge", "error", "divergence", "kept"):
        grid.add_column(column, justify="left" if column in ("cut", "method") else "right", no_wrap=True)
    for row in compensation_rows(repair):
        grid.add_row(*map(escape, row))
    console.print(grid)


def show_healing(healing: Healing) -> None:
    """What was trained on how much, and what it brought on held-out text."""
    console = _console()
    before, after = healing.before, healing.after
    console.print(
        f"[bold]Healed[/bold]: {healing.objective}: {before.loss:.4g} -> {after.loss:.4g} on held-out text"
        + (
            f" (perplexity {math.exp(before.text_loss):,.1f} -> {math.exp(after.text_loss):,.1f})"
            if before.text_loss is not None and after.text_loss is not None and before.text_loss < 700
            else ""
        )
    )
    console.print(
        f"[dim]{healing.num_tokens:,} tokens in {healing.num_steps} steps, {healing.seconds:,.0f} s; trained: "
        f"{escape(healing.weights)}; best at step {healing.best_step}; stopped by: {healing.stopped}[/dim]"
    )


def show_verification(proof: Verification) -> None:
    """What was checked, in a line."""
    if not proof.outputs_compared:
        found = "names, shapes and bytes are those of the original's kept blocks. It was neither loaded nor run"
        if proof.reload_strict:
            found = (
                "names and shapes are those of the smaller model's class, the bytes those of the original. It was not "
                "run"
            )
        _console().print(f"[green]Verified[/green]: {found}{f': {escape(proof.note)}' if proof.note else ''}.")
        if not proof.reload_strict:
            _console().print("[dim]`avss verify` loads and runs it where there is memory for that.[/dim]")
        return
    memory = "" if proof.max_diff_memory is None else f"{proof.max_diff_memory:.2g} from memory and "
    generation = {True: f", cached = uncached generation over {proof.num_generated} tokens", False: "", None: ""}
    _console().print(
        "[green]Verified[/green]: strict reload, outputs differ by "
        f"{memory}{'the raw cut by ' if proof.of_raw_cut else ''}"
        f"{proof.max_diff_bypass:.2g} from the bypassed original"
        f"{generation[proof.cached_generation]}."
    )


def show_checks(report: CheckReport) -> None:
    """One line a check, then what could not be checked."""
    console = _console()
    for check in report.checks:
        mark = "[green]held[/green]  " if check.passed else "[red]FAILED[/red]"
        console.print(f"{mark} {check.what}  [dim]({escape(check.found)})[/dim]", soft_wrap=True)
    for note in report.notes:
        console.print(f"[yellow]![/yellow] {escape(note)}", soft_wrap=True)


def show_results(record: RunRecord) -> None:
    """Every measurement of the dense model and of each cut, with standard errors, and what was kept."""
    rows = comparison_rows(record)
    if not rows:
        return
    grid = _table("Results (± standard error; in brackets: against the dense model)")
    grid.add_column("task", overflow="fold")
    grid.add_column("dense" if record.cuts else "value", justify="right")
    for label, cut in zip(cut_labels(record.cuts), record.cuts, strict=True):
        gone = f"-{len(cut.plan.removed)} blocks" if cut.plan.removed else "as loaded"
        grid.add_column(f"{label}\n{gone}", justify="right")
    for row in rows:
        grid.add_row(row.title, row.dense_text, *(_cell_text(cell) for cell in row.cells))
    _console().print(grid)


def _cell_text(cell: ComparisonCell | None) -> str:
    if cell is None:
        return "n/a"
    return cell.estimate.text + (f"  ({cell.ratio_text})" if cell.retention is not None else "")


def show_inspection(inspection: "Inspection") -> None:
    """The stack that was found and what a cut would change."""
    console = _console()
    model = inspection.model
    console.print(f"[bold]{escape(model.source)}[/bold]: {model.architecture}, used as {model.head}")
    share = model.num_block_parameters / model.num_parameters
    console.print(
        f"Stack `{model.stack}`: {model.num_blocks} x {inspection.block_class}, {model.num_block_parameters:,} of "
        f"{model.num_parameters:,} parameters ({share:.1%}), stored as {model.dtype}, hidden size {model.hidden_size}"
    )
    if inspection.reason:
        console.print(f"Chosen because: {escape(inspection.reason)}")
    if len(inspection.stacks) > 1:
        grid = _table("Stacks of blocks (choose one with --stack)")
        for column in ("name", "path", "blocks", "counted by", "parameters"):
            grid.add_column(column, overflow="fold")
        for found in inspection.stacks:
            mark = "[bold]*[/bold] " if found.path == model.stack else ""
            what = f"{found.num_blocks} x {found.block_class}"
            grid.add_row(mark + found.name, found.path, what, found.count_field, f"{found.num_parameters:,}")
        console.print(grid)
    for rejected in inspection.rejected:
        console.print(f"[dim]Not a stack: `{rejected.path}` ({rejected.description}): {escape(rejected.reason)}[/dim]")
    for block, reason in inspection.pinned.items():
        console.print(f"Block {block} cannot go: {escape(reason)}")
    sizes = sorted(set(inspection.block_parameters))
    console.print(f"Parameters in a block: {' to '.join(f'{size:,}' for size in {sizes[0]: 0, sizes[-1]: 0})}")
    if inspection.refusal:
        console.print(f"[yellow]It can be scored and evaluated, not cut.[/yellow] {escape(inspection.refusal)}")
        return
    grid = _table(f"Config fields a cut changes (shown for removing block {inspection.example.describe()})")
    for column in ("field", "before", "after"):
        grid.add_column(column, overflow="fold")
    for change in inspection.changes:
        grid.add_row(change.field, escape(str(change.before)), escape(str(change.after)))
    console.print(grid)


def show_texts(title: str, texts: tuple[list[str], list[list[str]]]) -> None:
    """Column titles and rows as they are."""
    header, rows = texts
    grid = _table(title)
    for place, column in enumerate(header):
        grid.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(escape, row))
    _console().print(grid)


def show_path(what: str, path: object) -> None:
    """Where something is."""
    _console().print(f"[bold]{what}[/bold]: {escape(str(path))}", soft_wrap=True)
