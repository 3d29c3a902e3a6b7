r"""Repair by one number a cut (Prune&Comp): the stream reaches the blocks after a cut at the size they are used to.

With $X$ the dense model's stream before the removed blocks and $Y$ after them, per channel $k$ and over tokens $t$,

$$\alpha = \operatorname{mean}_k \frac{\sum_t |Y_{tk}|}{\sum_t |X_{tk}|}.$$

The paper multiplies the embeddings and everything the kept blocks before the cut write by $\alpha$. Here what the
blocks *after* the cut write is divided by it instead: the stream is then the same times a constant from the cut on, and
every norm that reads it, the last one included, undoes a constant. So tied embeddings stay tied, and no parameter is
added.

References:
    Prune&Comp, arXiv 2507.18212. It averages over all tokens; here padding and massive activations are left out.
"""

import torch
from torch import Tensor

from avss.compensation.least_squares import Run
from avss.compensation.streams import Text, ordinary, read_block
from avss.compensation.workpiece import Workpiece
from avss.models.projections import bias_of, matrix_of


def scale(work: Workpiece, run: Run, text: Text) -> float:
    r"""Divides what every kept block after a cut writes by $\alpha$, and returns $\alpha$."""
    factor = magnitude_ratio(work, run, text)
    assert work.facts is not None
    for block in work.plan.kept:
        if block >= run[1]:
            for path in work.facts.writers:
                module = work.linear(block, path)
                bias = bias_of(module)
                work.set(block, path, matrix_of(module).double() / factor, None if bias is None else bias / factor)
    return factor


def magnitude_ratio(work: Workpiece, run: Run, text: Text) -> float:
    r"""$\alpha$ of one cut, from the dense model's streams."""
    assert work.facts is not None
    before: Tensor | float = 0.0
    after: Tensor | float = 0.0
    for inputs, keep in text:
        entering = read_block(work.original, run[0] - 1, work.facts, (), inputs, keep).state
        leaving = read_block(work.original, run[1] - 1, work.facts, (), inputs, keep).state
        usual = ordinary(leaving, keep) & ordinary(entering, keep).to(leaving.device)
        before = before + entering[usual.to(entering.device)].double().abs().sum(0).cpu()
        after = after + leaving[usual].double().abs().sum(0).cpu()
    return float((torch.as_tensor(after) / torch.as_tensor(before).clamp_min(1e-300)).mean())
