r"""The last solve: the choice among the answers of prompts, brought to the dense model's in closed form.

Text hardly teaches which of a few answers to give: of a thousand tokens one or two stand where an answer is asked for,
and what they say is lost in the noise of the rest. After a repair, and after half an hour of training, all answers may
still lie on one side. What would tell them apart is there, though, in what the last block's last linear map $W$ reads.
So it is solved for, from all prompts at once:

$$V = \arg\min_V \frac1N \sum_i |V m_i - (d_i - z_i)|^2 + \frac{\gamma}{M} \sum_j |V m_j|^2 + \lambda |V|^2,
\qquad W' = W + P^+ V$$

with $m$ what the map reads at the places of answers ($i$) and everywhere in running text ($j$), $z$ and $d$ both
models' logits of the answers' first tokens, and $P$ the mean derivative of these with respect to what the map writes;
logits are taken less their mean, since only differences choose. $\gamma$ keeps running text as it is, $\lambda$ is
chosen on a quarter of the prompts. Another quarter, which nothing is fitted to, judges: what does not bring the choices
nearer there, or harms text that is not solved for, is undone.

Shape letters: N prompts, M tokens of text, A answers, F inputs of the map, D hidden, T tokens.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from avss.compensation.workpiece import Workpiece
from avss.data.augment import JUDGING, Asked
from avss.data.batches import pad
from avss.models.forward import last_states
from avss.models.load import Loaded
from avss.models.predictions import distance
from avss.models.projections import by_token, matrix_of
from avss.models.shell import HeadShell
from avss.record import AnswerFit

GAMMA = 10.0
"""How much more running text counts than prompts: its tokens are many, and none of them is asked."""
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of features scaled to a mean square of one, tried."""
LEAST = 32
"""Rows of a kind below which nothing is solved for."""
MOST_INPUTS = 16_384
"""Inputs of the map above which the normal equations take too much memory."""
MOST_TEXT = 16
"""Sequences of running text, at most."""
_HARM = 0.01
"""What the measure of the text may rise by, as a share of itself."""
_ROWS = 32


def settle_answers(
    work: Workpiece,
    prompts: Sequence[Asked],
    text: Sequence[Tensor],
    measure: Callable[[Loaded], float],
    *,
    precision: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> AnswerFit | None:
    """Solves for the last map of a smaller model.

    Args:
        work: The smaller model. It keeps the solution, or is left as it was.
        prompts: What asks for answers.
        text: Sequences of running text, which are to be answered as before.
        measure: How bad a model is on other text; for instance a `Yardstick`.
        precision: Of the models' passes: a context they run in.

    Returns:
        What came of it; None where there is nothing to solve for, or no such map is known.
    """
    kinds = _by_length(prompts)
    if work.facts is None or work.facts.mlp is None or not kinds:
        return None  # a mixture of experts has no one map that writes last
    block, path = work.plan.kept[-1], work.facts.last
    if matrix_of(work.linear(block, path)).shape[1] > MOST_INPUTS:
        return None
    reader = _Reader(work, block, path, precision)
    kept_text = reader.inputs_of_text(text[:MOST_TEXT])
    begin = work.snapshot()
    with precision():
        before_text = measure(work.smaller)
    found = {words: reader.read(some) for words, some in kinds.items()}
    before = _mean(one.part(one.judges).divergence() for one in found.values())
    for words, one in found.items():
        others = [other.part(~other.judges).inputs for name, other in found.items() if name != words]
        work.add(block, path, _solution(one, torch.cat([kept_text, *others])))
    after = _mean(
        _divergence(one.part(one.judges).dense, _logits(work.smaller, _judging(kinds[words]), precision))
        for words, one in found.items()
    )
    with precision():
        after_text = measure(work.smaller)
    kept = after < before and after_text <= (1 + _HARM) * before_text
    if not kept:
        work.restore(begin)
    return AnswerFit(
        num_prompts=sum(map(len, kinds.values())),
        before=before,
        after=after,
        text_before=before_text,
        text_after=after_text,
        kept=kept,
    )


class ChoiceYardstick:
    r"""The share of the dense model's choices among the answers of prompts that a smaller model has lost, 0 to 1.

    $1 - r^2$, with $r$ the correlation over all prompts of both models' logits of the answers (0 where it is negative),
    each less its mean over the answers of the prompt and over the prompts: the share of the variance that the best
    scale and shift of the smaller model's logits leave unexplained. Scale and shift are what `settle_answers` mends.
    Of several kinds of prompts, the mean.

    Args:
        dense: Its choices are the truth; it reads the prompts once.
        prompts: What asks for answers. Kinds with fewer rows than `LEAST` say nothing.
    """

    def __init__(self, dense: Loaded, prompts: Sequence[Asked]) -> None:
        self._kinds = list(_by_length(prompts).values())
        self._truths = [_spread(_logits(dense, some)) for some in self._kinds]

    def __bool__(self) -> bool:
        """Whether there is anything to go by."""
        return bool(self._kinds)

    def __call__(self, smaller: Loaded) -> float:
        """The share that a model has lost."""
        return _mean(
            1 - max(0.0, _correlation(truth, _spread(_logits(smaller, some)))) ** 2
            for some, truth in zip(self._kinds, self._truths, strict=True)
        )


def _judging(prompts: Sequence[Asked]) -> list[Asked]:
    return [one for one in prompts if one.row % JUDGING == 0]


def _divergence(dense_NA: Tensor, logits_NA: Tensor) -> float:
    return float(distance("choice", dense_NA, logits_NA).mean())


def evenly(prompts: Sequence[Asked], count: int) -> list[Asked]:
    """So many prompts at most, as many of each kind as there are, the first of each."""
    kinds = _kinds(prompts)
    return [one for some in kinds.values() for one in some[: max(1, count // len(kinds))]]


def _kinds(prompts: Sequence[Asked]) -> dict[tuple[int, ...], list[Asked]]:
    """Prompts by what they ask for, where there are enough of a kind."""
    kinds: dict[tuple[int, ...], list[Asked]] = {}
    for one in prompts:
        kinds.setdefault(one.words, []).append(one)
    return {words: some for words, some in kinds.items() if len({one.row for one in some}) >= LEAST}


def _by_length(prompts: Sequence[Asked]) -> dict[tuple[int, ...], list[Asked]]:
    """The same, the shortest first: prompts of about one length lie side by side, and little of a batch is padding."""
    return {words: sorted(some, key=lambda one: len(one.token_ids)) for words, some in _kinds(prompts).items()}


def _logits(
    loaded: Loaded,
    prompts: Sequence[Asked],
    precision: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Tensor:
    """A model's logits of the answers of prompts of one kind, less their mean, `[N, A]`."""
    head, words, found = HeadShell(loaded.model), list(prompts[0].words), []
    for token_ids, keep in _padded(loaded, prompts):
        rows, last = torch.arange(len(keep)), keep.sum(1) - 1
        with torch.no_grad():
            with precision():
                hidden = last_states(loaded, token_ids, keep)[rows, last][None]
            # Heads in the model's own dtype, not that of the passes: in bfloat16 two logits differ by eighths.
            found.append(_centred(head(hidden.to(loaded.model.dtype))[0][:, words]).cpu().double())
    return torch.cat(found)


def _padded(loaded: Loaded, prompts: Sequence[Asked]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of prompts; where no token can fill up a batch, each prompt is one."""
    size = 1 if loaded.pad_id is None else _ROWS
    for start in range(0, len(prompts), size):
        yield pad([one.token_ids for one in prompts[start : start + size]], loaded.pad_id or 0)


def _spread(logits_NA: Tensor) -> Tensor:
    return logits_NA - logits_NA.mean(0, keepdim=True)


def _correlation(one: Tensor, two: Tensor) -> float:
    sizes = float(one.norm() * two.norm())
    return float((one * two).sum()) / sizes if sizes else 0.0


@dataclasses.dataclass(frozen=True)
class _Read:
    """What was read at the places of answers of one kind.

    Attributes:
        inputs: Of the map, `[N, F]`.
        logits: Of the answers, less their mean, `[N, A]`.
        dense: The dense model's.
        derivative: Mean derivative of the logits with respect to what the map writes, `[A, D]`.
        rows: The row that fills each prompt, `[N]`.
    """

    inputs: Tensor
    logits: Tensor
    dense: Tensor
    derivative: Tensor
    rows: Tensor

    @property
    def judges(self) -> Tensor:
        """The prompts that nothing is fitted to, as a mask `[N]`."""
        return self.rows % JUDGING == 0

    @property
    def chooses(self) -> Tensor:
        """Those that the ridge is chosen by, as a mask `[N]`."""
        return self.rows % JUDGING == 1

    def part(self, chosen: Tensor) -> "_Read":
        """Some of the prompts, by a mask `[N]`."""
        return _Read(self.inputs[chosen], self.logits[chosen], self.dense[chosen], self.derivative, self.rows[chosen])

    def divergence(self) -> float:
        """Mean KL divergence of the choices among the answers from the dense model's, nats."""
        return _divergence(self.dense, self.logits)


class _Reader:
    """Runs both models on prompts and looks at what the map reads and what follows from what it writes."""

    def __init__(
        self,
        work: Workpiece,
        block: int,
        path: str,
        precision: Callable[[], contextlib.AbstractContextManager[object]],
    ) -> None:
        self._work, self._block, self._path, self._precision = work, block, path, precision

    def inputs_of_text(self, sequences: Sequence[Tensor]) -> Tensor:
        """What the map reads at every token, `[M, F]`."""
        found = []
        for sequence in sequences:
            token_ids, keep = pad([sequence], 0)
            with torch.no_grad(), self._precision(), self._watched() as watched:
                last_states(self._work.smaller, token_ids, keep)
            found.append(by_token(watched.inputs, token_ids.shape)[0].cpu().double())
        return torch.cat(found)

    def read(self, prompts: Sequence[Asked]) -> _Read:
        """Both models at the places of answers, `prompts` all of one kind."""
        smaller = self._work.smaller
        head, words = HeadShell(smaller.model), list(prompts[0].words)
        inputs, logits, total = [], [], torch.zeros(())
        for token_ids, keep in _padded(smaller, prompts):
            rows, last = torch.arange(len(keep)), keep.sum(1) - 1
            with torch.enable_grad(), self._watched(writes=True) as watched:
                with self._precision():
                    hidden = last_states(smaller, token_ids, keep)[rows, last][None]
                answers = _centred(head(hidden.to(smaller.model.dtype))[0][:, words])
                slopes = [
                    by_token(torch.autograd.grad(answers[:, place].sum(), watched.written, retain_graph=True)[0],
                             token_ids.shape)[rows, last].cpu().double().sum(0)
                    for place in range(len(words))
                ]  # fmt: skip
            inputs.append(by_token(watched.inputs, token_ids.shape)[rows, last].cpu().double())
            logits.append(answers.detach().cpu().double())
            total = total + torch.stack(slopes)
        return _Read(
            torch.cat(inputs),
            torch.cat(logits),
            _logits(self._work.original, prompts, self._precision),
            total / len(prompts),
            torch.tensor([one.row for one in prompts]),
        )

    def _watched(self, *, writes: bool = False) -> "_Watched":
        return _Watched(self._work.linear(self._block, self._path), writes=writes)


class _Watched:
    """Keeps what a map read and wrote in one run; with `writes`, the gradient can be asked of what it wrote."""

    inputs: Tensor
    written: Tensor

    def __init__(self, module: nn.Module, *, writes: bool) -> None:
        self._module, self._writes = module, writes

    def __enter__(self) -> "_Watched":
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.inputs, self.written = args[0].detach(), output.detach().requires_grad_(self._writes)
            return self.written

        self._handle = self._module.register_forward_hook(keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _solution(read: _Read, text_MF: Tensor) -> Tensor:
    """What to add to the map, `[D, F]`."""
    scale = (read.inputs.square().mean(0) + text_MF.square().mean(0)).sqrt().clamp(min=1e-12)
    ruled_out = GAMMA * _gram(text_MF / scale)
    fit, choose = read.part(~read.judges & ~read.chooses), read.part(read.chooses)

    def solved(one: _Read) -> Callable[[float], Tensor]:
        features = one.inputs / scale
        sums, values = _gram(features) + ruled_out, features.T @ (one.dense - one.logits) / len(features)
        return lambda ridge: torch.linalg.solve(sums + ridge * torch.eye(len(sums), dtype=sums.dtype), values)

    by_ridge = solved(fit)
    errors = {
        ridge: float((choose.dense - choose.logits - choose.inputs / scale @ by_ridge(ridge)).square().mean())
        for ridge in RIDGES
    }
    best = min(RIDGES, key=errors.__getitem__)
    answers_FA = solved(read.part(~read.judges))(best) / scale[:, None]
    return torch.linalg.pinv(read.derivative, rtol=1e-6) @ answers_FA.T


def _gram(features: Tensor) -> Tensor:
    return features.T @ features / len(features)


def _centred(logits_NA: Tensor) -> Tensor:
    logits = logits_NA.float()
    return logits - logits.mean(-1, keepdim=True)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
