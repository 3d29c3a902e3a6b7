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

import torch
from torch import Tensor

from avss.compensation.equations import NormalEquations, choose_ridge
from avss.compensation.streams import Written, ordinary, read_block
from avss.compensation.workpiece import Workpiece
from avss.data.batches import Batches
from avss.models.projections import Projections, bias_of, matrix_of

Run = tuple[int, int]
"""Removed blocks, half-open, original indices."""

COSINE_ROUNDS = 4
"""Reweighted solves of the `cosine` variant; the angle has settled by then."""


def refit(work: Workpiece, run: Run, fit: Batches, choose: Batches) -> float:
    """Solves for the MLP's output projection of the block before a cut; returns the ridge."""
    facts = _facts(work)
    block = run[0] - 1
    _take_closing_norm(work, run)
    module = work.linear(block, facts.mlp)
    matrix = matrix_of(module)
    gain = facts.gain(work.smaller.model.config)
    affine = bias_of(module) is not None
    equations = []
    for text in (fit, choose):
        sums = NormalEquations.empty((matrix.shape[1],), matrix.shape[0], affine=affine)
        for patched, wanted, usual, anchor in _pairs(work, run, (facts.mlp,), text):
            features, missing = gain * patched.features[0], wanted - patched.state
            sums.add(features[usual], missing[usual])
            sums.add_anchors(features[anchor], missing[anchor])
        equations.append(sums)
    ridge, solution = choose_ridge(*equations)
    constant = solution[-1] / gain if affine else None
    work.add(block, facts.mlp, solution[: matrix.shape[1]].T, constant)
    return ridge


def linear(work: Workpiece, run: Run, fit: Batches, choose: Batches, *, cosine: bool = False) -> float:
    r"""Folds a linear map $T$ of the MLP's output into the MLP's projection of the block before a cut.

    Args:
        work: The cut under repair; its block before the cut is changed.
        run: The cut.
        fit: Text to fit on.
        choose: Text to choose the ridge on.
        cosine: Maximise the cosine between $T^\top m_t$ and what it should be, rather than minimise the distance: the
            tokens' lengths then do not matter. Solved by reweighting: with $p_t$ the last round's $T^\top m_t$,
            $1 - \cos = \tfrac12 \lVert T^\top m_t / |p_t| - z_t / |z_t| \rVert^2$ is again a least-squares problem.

    Returns:
        The ridge.
    """
    facts = _facts(work)
    block = run[0] - 1
    _take_closing_norm(work, run)
    module = work.linear(block, facts.mlp)
    matrix, old_bias = matrix_of(module).double(), bias_of(module)
    gain = facts.gain(work.smaller.model.config)
    solution: Tensor | None = None
    ridge = 0.0
    for _ in range(COSINE_ROUNDS if cosine else 1):
        equations = []
        for text in (fit, choose):
            sums = NormalEquations.empty(
                (matrix.shape[0],), matrix.shape[0], affine=old_bias is not None and not cosine
            )
            for patched, wanted, usual, anchor in _pairs(work, run, (facts.mlp,), text):
                outputs, anchors = (
                    gain * _apply(patched.features[0][chosen].double(), matrix, old_bias) for chosen in (usual, anchor)
                )
                missing, anchors_missing = ((wanted - patched.state)[chosen].double() for chosen in (usual, anchor))
                if solution is None:
                    sums.add(outputs, missing)
                    sums.add_anchors(anchors, anchors_missing)
                    continue
                aim = outputs + missing
                mapped = outputs + outputs @ solution[: matrix.shape[0]]
                lengths = mapped.norm(dim=1).clamp_min(1e-12)
                scaled = aim * (lengths / aim.norm(dim=1).clamp_min(1e-12))[:, None]
                sums.add(outputs, scaled - outputs, lengths**-2)
                # Anchors stay where the dense model has them, length included.
                sums.add_anchors(anchors, anchors_missing, lengths.median() ** -2 * torch.ones_like(anchors[:, 0]))
            equations.append(sums)
        ridge, solution = choose_ridge(*equations)
    assert solution is not None
    change = solution[: matrix.shape[0]].T.to(matrix.device)
    bias_change = None
    if old_bias is not None:
        bias_change = change @ old_bias.double()
        if len(solution) > matrix.shape[0]:
            bias_change = bias_change + solution[-1].to(matrix.device) / gain
    work.add(block, facts.mlp, change @ matrix, bias_change)
    return ridge


def residual_error(work: Workpiece, run: Run, text: Batches) -> float:
    """How far the stream after a cut is from the dense model's: mean square of the difference over the variance.

    0 is equal, 1 is as bad as the dense stream's mean would be. Over ordinary tokens (`streams.ordinary`).
    """
    distance, total, square, count = 0.0, 0.0, 0.0, 0
    mean: Tensor | float = 0.0
    for patched, wanted, usual, _ in _pairs(work, run, (), text):
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
    work: Workpiece, run: Run, paths: Sequence[str], text: Batches
) -> Iterator[tuple[Written, Tensor, Tensor, Tensor]]:
    """For each batch what the block before the cut read and wrote, the dense stream, and which tokens are which.

    Yields:
        What was written; the dense model's state `[B, T, D]`; ordinary tokens `[B, T]`; anchors `[B, T]`.
    """
    facts = _facts(work)
    for token_ids, keep in text:
        wanted = read_block(work.original, run[1] - 1, facts, (), token_ids, keep).state
        patched = read_block(work.smaller, work.place(run[0] - 1), facts, paths, token_ids, keep)
        wanted = wanted.to(patched.state.device)
        usual = ordinary(wanted, keep)
        yield patched, wanted, usual, keep.to(usual.device) & ~usual


def _apply(features: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    outputs = features @ matrix.T
    return outputs if bias is None else outputs + bias.double()
