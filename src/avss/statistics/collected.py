"""Everything one pass saw: the rows of each statistic at each block, on disk and back."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from avss.errors import DataError
from avss.statistics.base import AbstractStatistic, FloatArray, Rows

Summary = Mapping[str, FloatArray]
"""A statistic's named values, each with one entry per block; nan where a block has no such value."""


@dataclasses.dataclass(frozen=True)
class Collected:
    """The rows of every statistic at every block.

    Attributes:
        num_blocks: Blocks observed.
        rows: Statistic -> one `Rows` per block.
    """

    num_blocks: int
    rows: Mapping[AbstractStatistic, tuple[Rows, ...]]

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """What several passes, batches or processes saw together. All must hold the same statistics and blocks."""
        statistics = parts[0].rows.keys()
        merged = {
            statistic: tuple(
                Rows.merge(blocks) for blocks in zip(*(part.rows[statistic] for part in parts), strict=True)
            )
            for statistic in statistics
        }
        return cls(num_blocks=parts[0].num_blocks, rows=merged)

    def summarise(
        self, statistic: AbstractStatistic, *, first_token: bool = True, resample: NDArray[np.intp] | None = None
    ) -> Summary:
        """The statistic over all sequences, for every block.

        Args:
            statistic: One of those collected.
            first_token: Whether the first real token of each sequence counts.
            resample: Positions of sequences to use instead, with repetition: one bootstrap draw.
        """
        per_block = self.rows[statistic]
        if resample is not None:
            per_block = tuple(rows.resample(resample) for rows in per_block)
        summaries = [statistic.summarise(rows, first_token=first_token) for rows in per_block]
        # A run of blocks that would reach past the end of the stack has no value.
        return {name: np.array([summary.get(name, np.nan) for summary in summaries]) for name in summaries[0]}

    def save(self, path: Path) -> None:
        """Writes everything to one safetensors file; `load` gives it back bit for bit."""
        arrays = {
            f"{index}/{block}/{name}": np.ascontiguousarray(column)
            for index, per_block in enumerate(self.rows.values())
            for block, rows in enumerate(per_block)
            for name, column in rows.columns.items()
        }
        specs = [{"statistic": type(spec).__name__, **dataclasses.asdict(spec)} for spec in self.rows]
        save_file(arrays, path, metadata={"num_blocks": str(self.num_blocks), "statistics": json.dumps(specs)})

    @classmethod
    def load(cls, path: Path, known: Sequence[type[AbstractStatistic]]) -> Self:
        """Reads what `save` wrote.

        Args:
            path: The file.
            known: The statistics there are (`avss.statistics.STATISTICS`).

        Raises:
            DataError: It is missing or not such a file.
        """
        classes = {statistic.__name__: statistic for statistic in known}
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                specs = [dict(spec) for spec in json.loads(metadata["statistics"])]
                num_blocks = int(metadata["num_blocks"])
                columns: dict[tuple[int, int], dict[str, FloatArray]] = {}
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    index, block, name = key.split("/")
                    columns.setdefault((int(index), int(block)), {})[name] = file.get_tensor(key)
            rows = {
                classes[spec.pop("statistic")](**spec): tuple(
                    Rows(columns=columns[index, block]) for block in range(num_blocks)
                )
                for index, spec in enumerate(specs)
            }
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"`{path}` does not hold collected statistics ({error}). Score the model again.") from error
        return cls(num_blocks=num_blocks, rows=rows)
