r"""Repair towards the dense model's *predictions*: a few rounds, each one backward pass and one solve per matrix.

Matching the hidden state at a cut is not the aim; the output is. A round asks every output projection of the kept
blocks, from the one before the first cut on, how its outputs should move so that the predictions come nearer to the
dense model's. The answer is the gradient $g_t$ of the divergence $\ell$ by the projection's output at token $t$, and
the projection learns it from its inputs $f_t$ by ridge regression:

$$\Delta_p = -\eta\, s_p \Bigl(\tfrac1N \sum_t f_t f_t^\top + \lambda I\Bigr)^{-1} \tfrac1N \sum_t f_t g_t^\top .$$

$s_p$ is the mean square of the stream the block writes to: norms read the stream, so a step counts in units of it. The
sum on the right is the gradient by the weight, so this is a gradient step preconditioned by the inputs' second moment,
a half of the Kronecker-factored natural gradient. The step size $\eta$ is one number for all matrices, found by a line
search on text of its own. Every round reads text of its own as well, so far as there is enough.

Memory: besides the pass itself, one square float32 matrix of its input width for every output projection, e.g. 13 GB
for a 7 B model from its eighth block on, 130 MB for SmolLM2-135M from its eleventh.

This is not training in the usual sense: no learning rate, no schedule, no draw, a bounded number of passes. It is no
closed form either, and the record says how many rounds were kept.

References:
    Gradient descent on neurons (FOOF), arXiv 2201.12250: the same preconditioner, for training from scratch.
    K-FAC, arXiv 1503.05671: with the second factor, of output gradients, which we leave out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from avss.compensation.divergence import Yardstick, divergence
from avss.compensation.streams import Mixed, Text, ordinary
from avss.compensation.workpiece import Workpiece
from avss.data.batches import Batches
from avss.models.projections import by_token, oriented
from avss.models.stack import hooked

RIDGE = 1e-2
"""Relative ridge of the inputs' second moment."""
STRIDE = 2
"""Predictions are compared at every second position: neighbours tell much the same, and the head costs a third."""
STEPS = 5
"""The most trials of one line search."""

Key = tuple[int, str]
"""A matrix: block (original index) and path within it."""


@dataclasses.dataclass(frozen=True)
class Round:
    """One round's outcome: the step taken (0 where none helped) and the divergence on the choosing text after it."""

    step: float
    divergence: float


def steer(
    work: Workpiece,
    fit: Text,
    measure: Yardstick,
    *,
    rounds: int,
    on_step: Callable[[], None] = lambda: None,
    may_go_on: Callable[[], bool] = lambda: True,
) -> list[Round]:
    """Takes up to `rounds` rounds; stops at the first that no step size makes useful.

    Args:
        work: The cut under repair.
        fit: Text whose predictions are brought nearer; shared out among the rounds.
        measure: What the line search goes by, on text of its own.
        rounds: At most.
        on_step: Called after each round, for progress.
        may_go_on: Asked before each round.
    """
    keys = targets(work)
    done: list[Round] = []
    best = measure(work.smaller)
    for text in _shares(fit, rounds):
        if not may_go_on():
            break
        aim = _aim(work, keys, text)
        step, best = _line_search(work, aim, measure, best=best)
        done.append(Round(step=step, divergence=best))
        on_step()
        if not step:
            break
    return done


def targets(work: Workpiece) -> list[Key]:
    """The matrices that a round changes: output projections from the block before the first cut on."""
    assert work.facts is not None
    first = work.plan.removed[0] - 1
    return [(block, path) for block in work.plan.kept if block >= first for path in work.facts.writers]


def _shares(text: Text, rounds: int) -> list[Text]:
    """The text dealt out to the rounds, of each kind as much; read again from the start where there is too little."""
    if isinstance(text, Mixed):
        dealt = zip(*(_shares_of(part, rounds) for part in text.parts), strict=True)
        return [Mixed(parts) for parts in dealt]
    return list(_shares_of(text, rounds))


def _shares_of(text: Batches, rounds: int) -> list[Batches]:
    total = len(text.sequences)
    size = max(min(total, text.batch_size), total // rounds)
    shares = []
    for place in range(rounds):
        chosen = [(place * size + offset) % total for offset in range(size)]
        shares.append(dataclasses.replace(text, sequences=tuple(text.sequences[index] for index in chosen)))
    return shares


@dataclasses.dataclass(frozen=True)
class _Direction:
    """The change that one unit of step size makes: weight `[out, in]`, and bias `[out]` where there is one."""

    matrix: Tensor
    bias: Tensor | None


@dataclasses.dataclass(frozen=True)
class _Aim:
    """Where a round goes.

    Attributes:
        directions: For each matrix.
        divergence: Of the text the directions come from.
        slope: Change of that divergence for one unit of step size, by the gradient: negative.
    """

    directions: dict[Key, _Direction]
    divergence: float
    slope: float

    @property
    def first_step(self) -> float:
        """A step that would halve the divergence if it went on falling as it begins to."""
        return 0.5 * self.divergence / -self.slope if self.slope < 0 else 0.0


def _aim(work: Workpiece, keys: list[Key], text: Text) -> _Aim:
    modules = {key: work.linear(*key) for key in keys}
    moments: dict[Key, Tensor] = {}
    squares: dict[int, list[float]] = {}
    current_keep = torch.empty(0)
    num_tokens, num_places, whole = 0, 0, 0.0

    def reader(key: Key) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = by_token(args[0].detach(), current_keep.shape)
            inputs = inputs[current_keep.to(inputs.device)].float()
            moments[key] = moments.get(key, 0) + inputs.T @ inputs

        return read

    def observe(place: int, _: Tensor, after: Tensor) -> None:
        hidden = after.detach()
        usual = ordinary(hidden, current_keep)
        squares.setdefault(place, []).append(float(hidden[usual].float().square().mean()))

    parameters = {
        (key, name): parameter
        for key, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    gradients = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    handles = [module.register_forward_pre_hook(reader(key)) for key, module in modules.items()]
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with hooked(work.smaller.stack, observe), torch.enable_grad():
            for number, (inputs, keep) in enumerate(text):
                current_keep = keep
                places = torch.arange(number % STRIDE, keep.shape[1], STRIDE)
                total, count = divergence(work.original, work.smaller, inputs, keep, places=places)
                found = torch.autograd.grad(total, list(parameters.values()))
                for name, gradient in zip(parameters, found, strict=True):
                    gradients[name] += gradient
                num_tokens, num_places = num_tokens + int(keep.sum()), num_places + count
                whole += float(total.detach())
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    directions, slope = {}, 0.0
    for key, module in modules.items():
        size = sum(squares[work.place(key[0])]) / len(squares[work.place(key[0])])
        gradient = oriented(module, gradients[key, "weight"]).cpu().double() / num_places
        moment = moments[key].cpu().double() / num_tokens
        shrink = RIDGE * float(moment.diagonal().mean()) or 1.0
        factor = torch.linalg.cholesky(moment + shrink * torch.eye(len(moment), dtype=moment.dtype))
        matrix, bias = -size * torch.cholesky_solve(gradient.T, factor).T, None
        slope += float((matrix * gradient).sum())
        if (key, "bias") in gradients:
            pull = gradients[key, "bias"].cpu().double() / num_places
            bias = -size * pull
            slope += float((bias * pull).sum())
        directions[key] = _Direction(matrix=matrix, bias=bias)
    return _Aim(directions=directions, divergence=whole / num_places, slope=slope)


def _line_search(work: Workpiece, aim: _Aim, measure: Yardstick, *, best: float) -> tuple[float, float]:
    """Keeps the best step found: doubles the first while that helps, or divides it by three until it does.

    Returns:
        The step, 0 where none helped, and the divergence with it.
    """
    begin = work.snapshot()

    def take(step: float) -> None:
        work.restore(begin)
        for (block, path), direction in aim.directions.items():
            work.add(block, path, step * direction.matrix, None if direction.bias is None else step * direction.bias)

    chosen, step = 0.0, aim.first_step
    for _ in range(STEPS if step else 0):
        take(step)
        found = measure(work.smaller)
        if found < best:
            best, chosen, step = found, step, 2 * step
        elif chosen:
            break
        else:
            step /= 3
    if chosen:
        take(chosen)
    else:
        work.restore(begin)
    return chosen, best
