"""Batches of random hidden states, and the slow way to get every statistic of them."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avss.statistics import (
    AbstractStatistic,
    CosineSimilarity,
    Moments,
    NearZero,
    PublishedAverages,
    RelativeUpdate,
    RelativeVariance,
    Rows,
    Site,
    Unchanged,
    WindowAngles,
)
from avss.statistics.observation import Hidden, Observation, Passage

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Batch:
    """A block's input and output `[B, T, D]` and which tokens are real `[B, T]`."""

    before: Tensor
    after: Tensor
    keep: Tensor

    def part(self, start: int, stop: int) -> "Batch":
        """Some of the sequences."""
        return Batch(self.before[start:stop], self.after[start:stop], self.keep[start:stop])

    def split(self, sizes: Sequence[int]) -> list["Batch"]:
        """The same sequences in batches of other sizes."""
        edges = np.cumsum([0, *sizes])
        assert edges[-1] == len(self.keep)
        return [self.part(int(start), int(stop)) for start, stop in itertools.pairwise(edges)]


def random_batch(
    lengths: Sequence[int],
    *,
    width: int = 8,
    seed: int = 0,
    offset: float = 0.0,
    left: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Random hidden states with as many real tokens per sequence as asked for; the padding holds numbers too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), width)
    before = torch.randn(shape, generator=generator) + offset
    after = 0.7 * before + torch.randn(shape, generator=generator) + 0.3 * offset
    # Some values below any threshold worth testing.
    after = torch.where(torch.rand(shape, generator=generator) < 0.1, after * 1e-7, after)
    keep = torch.arange(shape[1])[None, :] < torch.tensor(lengths)[:, None]
    return Batch(before.to(dtype), after.to(dtype), keep.flip(1) if left else keep)


def observe(statistic: AbstractStatistic, batches: Sequence[Batch]) -> Rows:
    """What the statistic sees of these batches, as `collect` would put it together."""
    parts = []
    for batch in batches:
        seen = statistic.observe(shown(statistic, batch))
        parts.append(Rows({name: column.numpy() for name, column in seen.items()}))
    return Rows.merge(parts)


def shown(statistic: AbstractStatistic, batch: Batch) -> Any:
    """What the statistic is given of a batch at a stack of one block."""
    if isinstance(statistic, WindowAngles):
        passage = Passage(1, statistic.token)
        passage.record(0, batch.before, batch.after, batch.keep)
        return passage.windows_from(0)
    return Observation(Hidden(batch.before), Hidden(batch.after), batch.keep)


def angle(one: Array, other: Array) -> float:
    """Angle between two vectors in units of pi, by way of their difference: no cancellation near 0."""
    if not one.any() or not other.any():
        return 0.5 * (one.any() != other.any())
    one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
    return 2 * math.atan2(np.linalg.norm(one - other), np.linalg.norm(one + other)) / math.pi


def _last_kept(batch: Batch, first_token: bool) -> list[tuple[Array, Array]]:
    """(input, output) of the last real token of each sequence that has one."""
    rows = [batch.part(row, row + 1) for row in range(len(batch.keep))]
    return [kept[-1] for row in rows if (kept := _kept(row, first_token))]


def _kept(batch: Batch, first_token: bool) -> list[tuple[Array, Array]]:
    """(input, output) of every real token, in float64."""
    pairs = []
    for before, after, keep in zip(batch.before.double(), batch.after.double(), batch.keep, strict=True):
        places = [place for place in range(len(keep)) if keep[place]]
        pairs += [(before[place].numpy(), after[place].numpy()) for place in (places if first_token else places[1:])]
    return pairs


def _at(site: Site, before: Array, after: Array) -> Array:
    return {"input": before, "output": after, "update": after - before}[site]


def oracle(statistic: AbstractStatistic, batches: Sequence[Batch], *, first_token: bool = True) -> dict[str, float]:
    """The statistic by its definition, token by token."""
    tokens = [pair for batch in batches for pair in _kept(batch, first_token)]
    if isinstance(statistic, Moments):
        values = np.stack([_at(statistic.site, *pair) for pair in tokens])
        return {"count": values.size, "mean": values.mean(), "variance": values.var()}
    if isinstance(statistic, NearZero):
        below = count = 0
        for pair in tokens:
            value = _at(statistic.site, *pair)
            limit = statistic.threshold * (np.sqrt((value**2).mean()) if statistic.relative else 1.0)
            below += int((np.abs(value) < limit).sum())
            count += value.size
        share = {"share": below / count, "smoothed_share": (below + 1) / (count + 2)}
        return {"below": below, "count": count, **share}
    if isinstance(statistic, CosineSimilarity):
        cosines = []
        for before, after in tokens:
            norms = np.linalg.norm(before) * np.linalg.norm(after)
            cosines.append(before @ after / norms if norms else float(not before.any() and not after.any()))
        return {"cosine": float(np.mean(cosines))}
    if isinstance(statistic, RelativeUpdate):
        ratios = [np.linalg.norm(after - before) / np.linalg.norm(before) for before, after in tokens if before.any()]
        return {"ratio": float(np.mean(ratios))}
    if isinstance(statistic, WindowAngles):
        if statistic.token == "last":
            tokens = [pair for batch in batches for pair in _last_kept(batch, first_token)]
        return {"window_1": float(np.mean([angle(before, after) for before, after in tokens]))}
    if isinstance(statistic, RelativeVariance):
        ratios = [(after - before).var() / before.var() for before, after in tokens if before.var()]
        return {"ratio": float(np.mean(ratios))}
    if isinstance(statistic, Unchanged):
        kept = [np.abs(after - before) < statistic.threshold * np.abs(before) for before, after in tokens]
        below, count = int(np.sum(kept)), int(np.size(kept))
        share = {"share": below / count, "smoothed_share": (below + 1) / (count + 2)}
        return {"below": below, "count": count, **share}
    if isinstance(statistic, PublishedAverages):
        return _published([batch.after for batch in batches])
    raise NotImplementedError(f"write the slow way to get {type(statistic).__name__}")


def _published(layer_outputs: Sequence[Tensor]) -> dict[str, float]:
    """The published script's two functions and its mean over batches, line by line."""
    variances, sparsities = [], []
    for layer_output in layer_outputs:
        pooled_output = layer_output.mean(dim=1)
        variance = pooled_output.var(dim=1)
        variances.append(variance.mean().item())
        sparsities.append((layer_output.abs() < 1e-5).float().mean().item())
    below = sum(int((output.abs() < 1e-5).sum()) for output in layer_outputs)
    return {
        "variance": float(np.mean(variances)),
        "sparsity": float(np.mean(sparsities)),
        "below": below,
        "count": sum(output.numel() for output in layer_outputs),
    }
