"""The second step of the published method: from tables of variance and sparsity to AVSS and the layers to remove.

Composes reading and choosing without a model, so that it needs no torch.
"""

import csv
import io
import itertools
import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from avss.config import PlanConfig, build, refuse_unread
from avss.data.layer_csv import read_layer_tables
from avss.errors import InvalidPlanError
from avss.output import fresh_folder
from avss.plan import count_of_fraction, lowest_by_mass, published_by_mass
from avss.record import FrozenValue

Rule = Literal["count", "mass"]

COLUMNS = ("Layer", "Variance", "Sparsity", "AVSS", "Normalized_AVSS", "Cumulative_AVSS")
"""The columns of the published table, in its order and spelling."""


class LayerRow(FrozenValue):
    """One layer.

    Attributes:
        layer: Its number, as in the tables that were read.
        variance: Variance of its activations.
        sparsity: Share of its activations near zero.
        avss: `variance / sparsity`.
        normalized: `avss` over the sum of all.
        cumulative: Sum of `normalized` up to and including this layer, in the order that `LayerTable.reference` says.
        removed: Whether the rule removes it.
    """

    layer: int
    variance: float
    sparsity: float
    avss: float
    normalized: float
    cumulative: float
    removed: bool


class LayerTable(FrozenValue):
    """AVSS of every layer, and which layers a rule removes.

    Attributes:
        rows: By ascending AVSS, ties by layer.
        reference: Whether the sum was taken in layer order before the sort, as the published script does; otherwise it
            runs along `rows`.
        rule: The rule in words.
    """

    rows: tuple[LayerRow, ...] = Field(min_length=1)
    reference: bool
    rule: str

    @property
    def removed(self) -> tuple[int, ...]:
        """The layers to remove, ascending."""
        return tuple(sorted(row.layer for row in self.rows if row.removed))

    def to_csv(self) -> str:
        """One row a layer, with the columns of the published script and whether it goes; floats read back exactly."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*COLUMNS, "Removed"])
        for row in self.rows:
            values = (row.variance, row.sparsity, row.avss, row.normalized, row.cumulative)
            writer.writerow([row.layer, *map(repr, values), int(row.removed)])
        return out.getvalue()


def from_csv(
    variance: str | Path,
    sparsity: str | Path | None = None,
    *,
    fraction: float = 0.25,
    reference: bool = False,
    rule: Rule = "count",
) -> LayerTable:
    r"""AVSS from tables: $\text{AVSS}_i = \sigma^2_i / S_i$, normalised by its sum, cumulated, and the layers that go.

    By default the layers are sorted first, and the lowest `round(fraction * L)` go. The published script cumulates in
    layer order *before* it sorts, and removes where that sum is at most `fraction`: the first layers, whatever their
    scores. `reference` does the same.

    Args:
        variance: CSV with a layer and a variance column; with the sparsity as well where it is the only file, such as
            `published.csv` of `avss score --reference`.
        sparsity: CSV with a layer and a sparsity column.
        fraction: Share of the layers (`count`), or of the sum of all scores (`mass`, and `reference`).
        reference: Whether to do it as the published script does.
        rule: `count`, or `mass`: the lowest scores while their sum stays within the share. `reference` has its own.

    Raises:
        DataError: A table is not what it must be; see `avss.data.layer_csv.read_layer_tables`.
        UserError: The fraction or the rule is not allowed.
    """
    build(PlanConfig, {"fraction": fraction, "rule": rule})
    if reference and rule != "count":
        refuse_unread({"rule": rule}, "scores that are sorted before they are summed, which `--reference` does not")
    layers, variances, sparsities = read_layer_tables(Path(variance), Path(sparsity) if sparsity is not None else None)
    scores = [one / share for one, share in zip(variances, sparsities, strict=True)]
    total = math.fsum(scores)
    normalized = [score / total for score in scores]
    order = sorted(range(len(layers)), key=lambda place: (scores[place], place))
    summed = range(len(layers)) if reference else order
    cumulative = dict(zip(summed, itertools.accumulate(normalized[place] for place in summed), strict=True))
    gone, words = _choose(scores, fraction, reference=reference, rule=rule)
    rows = tuple(
        LayerRow(
            layer=layers[place],
            variance=variances[place],
            sparsity=sparsities[place],
            avss=scores[place],
            normalized=normalized[place],
            cumulative=cumulative[place],
            removed=place in gone,
        )
        for place in order
    )
    return LayerTable(rows=rows, reference=reference, rule=words)


def write_layer_table(table: LayerTable, out: str | Path, *, force: bool = False) -> None:
    """Writes `avss.csv` and `avss.json` to a new folder.

    Raises:
        OutputExistsError: The folder exists.
    """
    with fresh_folder(Path(out), force=force) as folder:
        (folder / "avss.csv").write_text(table.to_csv(), encoding="utf-8")
        (folder / "avss.json").write_text(table.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _choose(scores: list[float], fraction: float, *, reference: bool, rule: Rule) -> tuple[frozenset[int], str]:
    num = len(scores)
    if reference:
        gone = published_by_mass(scores, fraction)
        how = f"those whose sum in layer order, taken before the sort, is at most {fraction:.3g}"
    elif rule == "mass":
        gone = lowest_by_mass(scores, fraction)
        how = f"the lowest scores that hold together at most {fraction:.3g} of the sum"
    else:
        count = count_of_fraction(fraction, num)
        if count >= num:
            raise InvalidPlanError(f"The fraction `{fraction}` of {num} layers rounds to all of them; one must stay.")
        gone = tuple(sorted(range(num), key=lambda place: (scores[place], place))[:count])
        how = "the lowest scores"
    return frozenset(gone), f"{len(gone)} of {num} layers ({len(gone) / num:.1%}), {how}"


def published_note(table: LayerTable) -> str:
    """What the published order means for this table, in one line; for people who read its list as the lowest layers."""
    lowest = sorted(row.layer for row in table.rows[: len(table.removed)])
    right = "" if list(table.removed) == lowest else f"; the {len(lowest)} lowest are {', '.join(map(str, lowest))}"
    return (
        "Published order: the running sum is taken in layer order before the sort, so the first layers go, whatever "
        f"their scores{right}."
    )


__all__ = ["LayerRow", "LayerTable", "from_csv", "published_note", "write_layer_table"]
