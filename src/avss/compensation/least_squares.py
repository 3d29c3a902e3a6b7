r"""Repair at a cut by least squares: the block before it writes, besides its own, what the removed blocks wrote.

Blocks `start..stop-1` are gone. The block before the cut ends in a sum, $y = x + \sum_p W_p f_p$, and $y^*$ is the
dense model's stream after block `stop-1` on the same text. Both methods here solve

$$\min_{\Delta} \sum_t \lVert y^*_t - y_t - \Delta^\top \phi_t \rVert^2 + \lambda \lVert \Delta \rVert^2$$

in $\Delta$, a *change* of weights, so that the ridge pulls towards the weights the model has, not towards zero.

- `refit`: $\phi$ is the input of the MLP's output projection, $\Delta$ a change of that matrix.
- `linear`: $\phi$ is its output, $\Delta = T - I$; folded, $W \leftarrow T^\top W$. A special
  case of `refit` with fewer free numbers: it wants less text.

Post-norm blocks (BERT) end in $\mathrm{LN}(x' + W f)$: the block before the cut takes the closing norm of block
`stop-1` and its sum is fitted to that block's sum, which is exact where the sums agree.

References:
    ReplaceMe, arXiv 2505.02819 (`linear` and `cosine`; it fits $T$ with pads counted and a ridge towards zero, and the
    cosine by Adam; here padding and massive activations are left out and the cosine is solved by reweighting).
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from avss.compensation.equations import NormalEquations, choose_ridge
from avss.compensation.streams import Text, Written, ordinary, read_block, read_blocks
from avss.compensation.workpiece import Workpiece
from avss.data.batches import Batches
from avss.models.projections import Projections, bias_of, matrix_of

Run = tuple[int, int]
"""Removed blocks, half-open, original indices."""

COSINE_ROUNDS = 4
"""Reweighted solves of the `cosine` variant; the angle has settled by then."""


Solved = Literal["refit", "linear"]


class Readings:
    """The sums that repairs of one cut are solved from, read in one pass over each text for all of them.

    They are of the model as it stands when a text is read first: before any repair of this cut.

    Args:
        work: The cut under repair.
        run: The cut.
        methods: What will be solved for.
    """

    def __init__(self, work: Workpiece, run: Run, methods: Sequence[Solved]) -> None:
        self._work, self._run, self._methods = work, run, methods
        self._read: list[tuple[Text, dict[Solved, NormalEquations]]] = []

    def of(self, text: Text, method: Solved) -> NormalEquations:
        """The sums over a text."""
        for known, sums in self._read:
            if known is text:
                return sums[method]
        self._read.append((text, self._sums(text)))
        return self._read[-1][1][method]

    def _sums(self, text: Text) -> dict[Solved, NormalEquations]:
        work, facts = self._work, _facts(self._work)
        module = work.linear(self._run[0] - 1, facts.last)
        matrix, bias, gain = matrix_of(module), bias_of(module), work.gain(self._run[0] - 1)
        sizes: dict[Solved, int] = {"refit": matrix.shape[1], "linear": matrix.shape[0]}
        sums: dict[Solved, NormalEquations] = {
            method: NormalEquations.empty((sizes[method],), matrix.shape[0], affine=bias is not None)
            for method in self._methods
        }
        for patched, wanted, usual, anchor in _pairs(work, self._run, (facts.last,), text):
            missing = wanted - patched.state
            for method, equations in sums.items():
                features = patched.features[0]
                if method == "linear":
                    features = gain.to(features.device) * _apply(features.double(), matrix.double(), bias)
                equations.add(features[usual], missing[usual])
                equations.add_anchors(features[anchor], missing[anchor])
        return sums


def refit(work: Workpiece, run: Run, fit: Text, choose: Batches, readings: Readings | None = None) -> float:
    """Solves for the MLP's output projection of the block before a cut; returns the ridge."""
    facts = _facts(work)
    block = run[0] - 1
    _take_closing_norm(work, run)
    readings = readings or Readings(work, run, ("refit",))
    matrix, old_bias = matrix_of(work.linear(block, facts.last)), bias_of(work.linear(block, facts.last))
    ridge, solution = choose_ridge(readings.of(fit, "refit"), readings.of(choose, "refit"))
    work.write(block, solution[: matrix.shape[1]].T, None if old_bias is None else solution[-1])
    return ridge


def linear(work: Workpiece, run: Run, fit: Text, choose: Batches, readings: Readings | None = None) -> float:
    r"""Folds a linear map $T$ of the MLP's output into the MLP's projection of the block before a cut.

    Returns:
        The ridge.
    """
    _take_closing_norm(work, run)
    readings = readings or Readings(work, run, ("linear",))
    ridge, solution = choose_ridge(readings.of(fit, "linear"), readings.of(choose, "linear"))
    _fold(work, run, solution)
    return ridge


def cosine(work: Workpiece, run: Run, fit: Text, choose: Batches) -> float:
    r"""As `linear`, but maximises the cosine between $T^\top m_t$ and what it should be.

    The tokens' lengths then do not matter. Solved by reweighting: with $p_t$ the last round's $T^\top m_t$,
    $1 - \cos = \tfrac12 \lVert T^\top m_t / |p_t| - z_t / |z_t| \rVert^2$ is again a least-squares problem.

    Returns:
        The ridge.
    """
    facts = _facts(work)
    _take_closing_norm(work, run)
    module = work.linear(run[0] - 1, facts.last)
    matrix, bias, gain = matrix_of(module).double(), bias_of(module), work.gain(run[0] - 1)
    solution: Tensor | None = None
    ridge = 0.0
    for _ in range(COSINE_ROUNDS):
        equations = []
        for text in (fit, choose):
            sums = NormalEquations.empty((matrix.shape[0],), matrix.shape[0], affine=False)
            for patched, wanted, usual, anchor in _pairs(work, run, (facts.last,), text):
                outputs, anchors = (
                    gain.to(matrix.device) * _apply(patched.features[0][chosen].double(), matrix, bias)
                    for chosen in (usual, anchor)
                )
                missing, anchors_missing = ((wanted - patched.state)[chosen].double() for chosen in (usual, anchor))
                if solution is None:
                    sums.add(outputs, missing)
                    sums.add_anchors(anchors, anchors_missing)
                    continue
                aim = outputs + missing
                mapped = outputs + outputs @ solution.to(outputs.device)
                lengths = mapped.norm(dim=1).clamp_min(1e-12)
                scaled = aim * (lengths / aim.norm(dim=1).clamp_min(1e-12))[:, None]
                sums.add(outputs, scaled - outputs, lengths**-2)
                # Anchors stay where the dense model has them, length included.
                sums.add_anchors(anchors, anchors_missing, lengths.median() ** -2 * torch.ones_like(anchors[:, 0]))
            equations.append(sums)
        ridge, solution = choose_ridge(*equations)
    assert solution is not None
    _fold(work, run, solution)
    return ridge


def _fold(work: Workpiece, run: Run, solution: Tensor) -> None:
    """Multiplies what the block before a cut writes by one plus the map found; a last row of it is a constant."""
    facts = _facts(work)
    block = run[0] - 1
    module = work.linear(block, facts.last)
    matrix, bias = matrix_of(module).double(), bias_of(module)
    # The map is of what is written, which the block has multiplied by its gain.
    change = solution[: matrix.shape[0]].T.to(matrix.device) * work.gain(block).to(matrix.device)
    bias_change = None
    if bias is not None:
        bias_change = change @ bias.double()
        if len(solution) > matrix.shape[0]:
            bias_change = bias_change + solution[-1].to(matrix.device)
    work.write(block, change @ matrix, bias_change)


def dense_states(work: Workpiece, run: Run, text: Batches) -> list[Tensor]:
    """The dense model's stream after the last removed block of a cut, `[B, T, D]` for each batch."""
    facts = _facts(work)
    return [read_block(work.original, run[1] - 1, facts, (), *batch).state for batch in text]


def residual_error(work: Workpiece, run: Run, text: Batches, aims: Sequence[Tensor] | None = None) -> float:
    """How far the stream after a cut is from the dense model's: mean square of the difference over the variance.

    0 is equal, 1 is as bad as the dense stream's mean would be. Over ordinary tokens (`streams.ordinary`).

    Args:
        work: The cut under repair.
        run: The cut.
        text: What passes through.
        aims: `dense_states` of it, where they are known.
    """
    distance, total, square, count = 0.0, 0.0, 0.0, 0
    mean: Tensor | float = 0.0
    for patched, wanted, usual, _ in _pairs(work, run, (), text, aims):
        aim = wanted[usual].double()
        distance += float((aim - patched.state[usual].double()).square().sum())
        square += float(aim.square().sum())
        mean = mean + aim.sum(0)
        count += len(aim)
    total = square - float((torch.as_tensor(mean) ** 2).sum()) / max(count, 1)
    return distance / total if total > 0 else float("nan")


def _facts(work: Workpiece) -> Projections:
    assert work.facts is not None
    assert not work.facts.obstacle
    return work.facts


def _take_closing_norm(work: Workpiece, run: Run) -> None:
    """A post-norm block before a cut ends as the last removed block ended."""
    facts = _facts(work)
    if facts.closing_norm:
        source = work.original.stack.blocks[run[1] - 1].get_submodule(facts.closing_norm)
        work.copy_norm(run[0] - 1, facts.closing_norm, source)


def _pairs(
    work: Workpiece, run: Run, paths: Sequence[str], text: Text, aims: Sequence[Tensor] | None = None
) -> Iterator[tuple[Written, Tensor, Tensor, Tensor]]:
    """For each batch what the block before the cut read and wrote, the dense stream, and which tokens are which.

    Yields:
        What was written; the dense model's state `[B, T, D]`; ordinary tokens `[B, T]`; anchors `[B, T]`.
    """
    facts = _facts(work)
    before, last = run[0] - 1, run[1] - 1
    for number, (inputs, keep) in enumerate(text):
        batch = (facts, inputs, keep)
        if aims is None and not work.changed and before == work.place(before):
            # Up to its first cut, a raw one is the dense model: one run shows both ends of it.
            both = read_blocks(work.original, {before: paths, last: ()}, *batch)
            patched, wanted = both[before], both[last].state
        else:
            wanted = aims[number] if aims is not None else read_block(work.original, last, facts, (), *batch[1:]).state
            patched = read_block(work.smaller, work.place(before), facts, paths, inputs, keep)
        wanted = wanted.to(patched.state.device)
        usual = ordinary(wanted, keep)
        yield patched, wanted, usual, keep.to(usual.device) & ~usual


def _apply(features: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    outputs = features @ matrix.T
    return outputs if bias is None else outputs + bias.double()
