"""Reads tables with one row per layer, as the published scripts write them, and checks every cell.

Two files with a layer column and one value column each, or one file with both values.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from avss.errors import DataError

LAYER_COLUMNS = ("layer", "block", "index")
VARIANCE_COLUMNS = ("average_variance", "variance", "activation_variance")
SPARSITY_COLUMNS = ("average_sparsity", "sparsity", "activation_sparsity")
"""Names under which a column is known, without regard to case."""


def read_layer_tables(variance: Path, sparsity: Path | None = None) -> tuple[list[int], list[float], list[float]]:
    """Layers in ascending order with their variance and sparsity.

    Args:
        variance: Table with a layer column and a variance column; the sparsity too where it is the only file.
        sparsity: Table with a layer column and a sparsity column.

    Raises:
        DataError: A file is missing or no table; a column is missing; a layer is missing, doubled or in one file only;
            a value is no number, not finite, negative, or a sparsity that is 0 or above 1. The message names the place.
    """
    if sparsity is None:
        rows = _rows(variance)
        variances = _values(rows, variance, VARIANCE_COLUMNS, "variance")
        sparsities = _values(rows, variance, SPARSITY_COLUMNS, "sparsity")
        name = variance.name
    else:
        variances = _values(_rows(variance), variance, VARIANCE_COLUMNS, "variance", alone=True)
        sparsities = _values(_rows(sparsity), sparsity, SPARSITY_COLUMNS, "sparsity", alone=True)
        name = sparsity.name
    _check_same_layers(variances, sparsities, variance.name, name)
    layers = sorted(variances)
    missing = sorted(set(range(layers[0], layers[-1] + 1)) - set(layers))
    if missing:
        raise DataError(
            f"`{variance.name}` has no layer `{missing[0]}` between {layers[0]} and {layers[-1]}. Every layer of the "
            "model must be there: shares of the sum mean nothing without it."
        )
    _check_range(layers, variances, sparsities, variance.name, name)
    return layers, [variances[layer] for layer in layers], [sparsities[layer] for layer in layers]


def _rows(path: Path) -> list[Mapping[str, str]]:
    if not path.is_file():
        raise DataError(f"There is no file `{path}`. Give a CSV file with one row per layer.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [line for line in reader if any(cell.strip() for cell in line)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"`{path}` is not a CSV file ({error}). Give a table of text with commas.") from error
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror}.") from error
    if len(lines) < 2:
        raise DataError(f"`{path.name}` has no rows. Give a header line and one row per layer.")
    header = [cell.strip() for cell in lines[0]]
    if len(set(header)) < len(header):
        raise DataError(f"`{path.name}` names a column twice: {', '.join(header)}. Each column needs its own name.")
    if all(_is_number(cell) for cell in header):
        raise DataError(f"`{path.name}` begins with numbers. Its first line must name the columns: `Layer,Variance`.")
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise DataError(f"Row {number} of `{path.name}` has {len(line)} cells, the header {len(header)}.")
    return [dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines[1:]]


def _values(
    rows: Sequence[Mapping[str, str]], path: Path, known: tuple[str, ...], what: str, *, alone: bool = False
) -> dict[int, float]:
    """Layer -> value of one column."""
    header = list(rows[0])
    layer_column = next((name for name in header if name.casefold() in LAYER_COLUMNS), header[0] if alone else None)
    value_column = next((name for name in header if name.casefold() in known), None)
    if value_column is None and alone and len(header) == 2:
        # The published script renames the two columns of each file, whatever they are called.
        value_column = next(name for name in header if name != layer_column)
    if layer_column is None or value_column is None or layer_column == value_column:
        lacking = "layer" if layer_column is None else what
        allowed = LAYER_COLUMNS if layer_column is None else known
        raise DataError(
            f"`{path.name}` has no {lacking} column. Columns: {', '.join(header)}; known names: "
            f"{', '.join(f'`{name}`' for name in allowed)}, in any case."
        )
    values: dict[int, float] = {}
    for number, row in enumerate(rows, start=1):
        layer = _layer(row[layer_column], path.name, number)
        if layer in values:
            raise DataError(f"`{path.name}` has layer `{layer}` twice, again in row {number}. One row a layer.")
        values[layer] = _number(row[value_column], f"layer `{layer}` of `{path.name}`", what)
    return values


def _layer(cell: str, name: str, number: int) -> int:
    value = float(cell) if _is_number(cell) else math.nan
    if not value.is_integer() or value < 0:
        raise DataError(f"Row {number} of `{name}` has the layer `{cell}`. Layers are whole numbers from 0 on.")
    return int(value)


def _number(cell: str, where: str, what: str) -> float:
    if not _is_number(cell) or not math.isfinite(float(cell)):
        raise DataError(f"The {what} of {where} is `{cell}`, which is no finite number. Fill it, or measure it again.")
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _check_same_layers(one: Mapping[int, float], other: Mapping[int, float], name: str, other_name: str) -> None:
    for here, there, place in ((one, other, other_name), (other, one, name)):
        lacking = sorted(here.keys() - there.keys())
        if lacking:
            raise DataError(
                f"`{place}` has no layer `{lacking[0]}`, which the other table has. Both must hold the same layers."
            )


def _check_range(
    layers: Sequence[int], variances: Mapping[int, float], sparsities: Mapping[int, float], name: str, other: str
) -> None:
    for layer in layers:
        if variances[layer] < 0:
            raise DataError(
                f"The variance of layer `{layer}` of `{name}` is `{variances[layer]}`; it cannot be negative."
            )
        if not 0 <= sparsities[layer] <= 1:
            raise DataError(
                f"The sparsity of layer `{layer}` of `{other}` is `{sparsities[layer]}`. It is a share, from 0 to 1."
            )
        if sparsities[layer] == 0:
            raise DataError(
                f"The sparsity of layer `{layer}` of `{other}` is 0, so its AVSS would be infinite: nothing was below "
                "the threshold there. Measure with more text or a larger threshold, or use `avss score "
                "--criteria avss`, which smooths the count."
            )
        if not math.isfinite(variances[layer] / sparsities[layer]):
            raise DataError(
                f"The AVSS of layer `{layer}` overflows: `{variances[layer]}` over `{sparsities[layer]}`. Check both."
            )
    if not any(variances[layer] for layer in layers):
        raise DataError(f"Every variance of `{name}` is 0, so there is no sum to divide by. Check the measurement.")
