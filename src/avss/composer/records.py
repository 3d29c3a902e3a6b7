"""Records: begun, written, drawn again."""

import tempfile
from pathlib import Path

from avss.composer.provenance import now, versions
from avss.errors import OutputExistsError
from avss.models.load import Loaded
from avss.output import check_free, fresh_folder
from avss.progress import Timed
from avss.record import RunRecord, ScoreTable
from avss.reporting.charts import save_figures
from avss.reporting.page import render_page
from avss.reporting.tables import damage_csv, published_csv, scores_csv, search_csv, sites_csv


def begin_record(loaded: Loaded, command: str, timed: Timed, table: ScoreTable | None) -> RunRecord:
    """A record with what is known before anything is cut or measured."""
    return RunRecord(
        created=now(),
        command=command,
        versions=versions(),
        model=loaded.facts(),
        data=table.data if table else None,
        scores=table.scores if table else (),
        warnings=table.warnings if table else (),
        stability=table.stability if table else (),
        seconds=timed.seconds,
    )


def places_of(record: RunRecord, folder: Path) -> list[Path]:
    """Where the dense model of a record in `folder` may be at hand: beside it, or in the working directory."""
    name = record.model.source
    places = (folder.parent / name, folder.parent.parent / name, Path(name))
    return [place for place in places if place.exists() and place.resolve() != folder.resolve()]


def write_record(record: RunRecord, folder: Path) -> None:
    """Writes `record.json` and all that can be made from it: the tables as CSV, `report.html`, `figures/`."""
    (folder / "record.json").write_text(record.to_json(), encoding="utf-8")
    if record.scores:
        table = ScoreTable(scores=record.scores, model=record.model, data=record.data)
        (folder / "scores.csv").write_text(scores_csv(table), encoding="utf-8")
    if record.damage:
        (folder / "damage.csv").write_text(damage_csv(record.damage), encoding="utf-8")
    if record.sites:
        (folder / "sites.csv").write_text(sites_csv(record.sites), encoding="utf-8")
    if record.published:
        (folder / "published.csv").write_text(published_csv(record.published), encoding="utf-8")
    if record.search is not None:
        (folder / "search.csv").write_text(search_csv(record.search), encoding="utf-8")
    (folder / "report.html").write_text(render_page(record), encoding="utf-8")
    (folder / "figures").mkdir(exist_ok=True)
    save_figures(record, folder / "figures")


def report(record: RunRecord | str | Path, out: str | Path | None = None, *, force: bool = False) -> Path:
    """Draws a record again.

    Args:
        record: The record, its file, or the folder that holds it.
        out: A new folder for record, tables, figures and page; by default those beside the record are replaced.
        force: Whether an existing `out` that avss wrote may be replaced.

    Returns:
        The page.

    Raises:
        OutputExistsError: `out` may not be replaced; or, without it, the record lies beside another one.
    """
    value = record if isinstance(record, RunRecord) else RunRecord.read(Path(record))
    if out is not None:
        check_free(Path(out), force=force, sources=(record,))
        with fresh_folder(Path(out), force=force) as folder:
            write_record(value, folder)
        return Path(out) / "report.html"
    if isinstance(record, RunRecord):
        raise OutputExistsError("A record in memory has no folder to be drawn in. Give `out`.")
    path = Path(record)
    folder, name = (path, "record.json") if path.is_dir() else (path.parent, path.name)
    if name != "record.json" and (folder / "record.json").exists():
        raise OutputExistsError(
            f"`{path}` lies beside another record, and the report there is that one's. Give `--out`."
        )
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as fresh:
        write_record(value, Path(fresh))
        (Path(fresh) / "record.json").unlink()  # the one that was read is the better one
        (folder / "figures").mkdir(exist_ok=True)
        for drawn in [file for file in Path(fresh).rglob("*") if file.is_file()]:
            drawn.replace(folder / drawn.relative_to(fresh))
    return folder / "report.html"
