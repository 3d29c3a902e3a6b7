r"""Repair of everything from the first cut on: each kept block in turn is fitted to the dense stream at its depth.

`least_squares.refit` mends the stream at a cut, as far as one matrix can. What is left travels on, and the blocks after
the cut read it and add to it. The sweep lets each of them take its share: block by block, on the stream as repaired so
far, the MLP's output projection is solved for so that the stream comes nearest to the dense model's after the same
block (before a cut: after its last removed block). The same regression, the same ridge towards the weights that are
there, the same anchors.

One walk through the blocks does it all. The hidden states of the calibration text are held for both models and passed
from block to block, so that the cost is that of a few forward passes, however many blocks are fitted. Memory: two
hidden states for every token.
"""

from torch import Tensor

from avss.compensation.equations import NormalEquations, choose_ridge
from avss.compensation.streams import Text, ordinary
from avss.compensation.workpiece import Workpiece
from avss.data.batches import Batches
from avss.models.projections import bias_of, by_token, matrix_of
from avss.models.walk import Walk


def sweep(work: Workpiece, fit: Text, choose: Batches) -> int:
    """Fits the MLP's output projection of each kept block from the first cut on; returns how many were changed.

    A block is left as it is where no ridge lowers the error on the choosing text. Post-norm blocks are all left.
    """
    facts = work.facts
    assert facts is not None
    if facts.obstacle or facts.closing_norm:
        return 0
    first = max(work.plan.removed[0] - 1, work.plan.kept[0])
    walks = [
        [
            (Walk.begin(work.original, first, *batch), Walk.begin(work.smaller, work.place(first), *batch))
            for batch in text
        ]
        for text in (fit, choose)
    ]
    changed = 0
    chain = [block for block in work.plan.kept if block >= first]
    for block, following in zip(chain, [*chain[1:], work.plan.num_blocks], strict=True):
        place = work.place(block)
        for dense, _ in (pair for text in walks for pair in text):
            for passed in range(block, following):
                dense.hidden = dense.through(work.original, passed)
        if _fit_block(work, block, walks):
            changed += 1
        for _, patched in (pair for text in walks for pair in text):
            patched.hidden = patched.through(work.smaller, place)
    return changed


def _fit_block(work: Workpiece, block: int, walks: list[list[tuple[Walk, Walk]]]) -> bool:
    """Solves for one block, whose dense walks have passed it and whose patched walks stand before it."""
    assert work.facts is not None
    path = work.facts.last
    module, place = work.linear(block, path), work.place(block)
    width, affine = matrix_of(module).shape[1], bias_of(module) is not None
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    equations = []
    try:
        for text in walks:
            sums = NormalEquations.empty((width,), matrix_of(module).shape[0], affine=affine)
            for dense, patched in text:
                seen.clear()
                state = patched.through(work.smaller, place)
                missing, features = dense.hidden.to(state.device) - state, by_token(seen[0], dense.keep.shape)
                usual = ordinary(dense.hidden, dense.keep).to(state.device)
                anchor = dense.keep.to(state.device) & ~usual
                sums.add(features[usual], missing[usual])
                sums.add_anchors(features[anchor], missing[anchor])
            equations.append(sums)
    finally:
        handle.remove()
    fitted, held = equations
    _, solution = choose_ridge(fitted, held)
    if not held.error(solution) < held.error():
        return False
    work.write(block, solution[:width].T.clone(), solution[-1].clone() if affine else None)
    return True
