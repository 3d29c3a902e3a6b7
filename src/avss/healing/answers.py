r"""The last solve: a healed model's choice among the answers of prompts, brought to the dense model's in closed form.

A step of training sees one or two places where an answer is asked for, and what they teach is lost in the noise of the
rest: after half an hour all answers may still lie on one side. What would tell them apart is there, though, in what the
last block's last linear map $W$ reads. So it is solved for, from all prompts at once:

$$V = \arg\min_V \frac1N \sum_i |V m_i - (d_i - z_i)|^2 + \frac{\gamma}{M} \sum_j |V m_j|^2 + \lambda |V|^2,
\qquad W' = W + P^+ V$$

with $m$ what the map reads at the places of answers ($i$) and everywhere in running text ($j$), $z$ and $d$ both
models' logits of the answers' first tokens, and $P$ the mean derivative of these with respect to what the map writes;
logits are taken less their mean, since only differences choose. $\gamma$ keeps running text as it is, $\lambda$ is
chosen on a quarter of the prompts. Another quarter, which nothing is fitted to, judges: what does not bring the choices
nearer there, or harms the held-out text, is undone.

Shape letters: N prompts, M tokens of text, A answers, F inputs of the map, D hidden, T tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from avss.data.augment import Asked
from avss.healing.objectives import AbstractObjective
from avss.healing.pair import Pair
from avss.healing.text import Batch, HealingText
from avss.models.load import Loaded
from avss.models.predictions import distance
from avss.models.projections import by_token, find_projections, matrix_of
from avss.models.shell import HeadShell
from avss.record import AnswerFit

GAMMA = 10.0
"""How much more running text counts than prompts: its tokens are many, and none of them is asked."""
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of features scaled to a mean square of one, tried."""
LEAST = 32
"""Prompts of a kind below which nothing is solved for."""
MOST_INPUTS = 16_384
"""Inputs of the map above which the normal equations take too much memory."""
_EVERY = 4
"""Every fourth prompt judges, the one behind it chooses the ridge."""
_TEXT = 16
"""Sequences of running text, at most."""
_HARM = 0.01
"""What the objective on held-out text may rise by, as a share of itself."""
_ROWS = 32


def fit_answers(
    pair: Pair,
    dense: Loaded,
    model: Loaded,
    objective: AbstractObjective,
    text: HealingText,
    prompts: Sequence[Asked],
) -> AnswerFit | None:
    """Solves for the last map of a trained model, in place.

    Args:
        pair: Of both models.
        dense: The dense model.
        model: Trained; no parameter of it may want a gradient.
        objective: Of healing.
        text: Sequences of its training part are kept as they are; its held-out part judges.
        prompts: What asks for answers.

    Returns:
        What came of it; None where there is nothing to solve for, or no such map is known.
    """
    module = _last_map(model)
    kinds: dict[tuple[int, ...], list[Asked]] = {}
    for one in prompts:
        kinds.setdefault(one.words, []).append(one)
    kinds = {words: some for words, some in kinds.items() if len(some) >= LEAST}
    if module is None or not kinds:
        return None
    reader = _Reader(pair, dense, model, module)
    kept_text = reader.inputs_of_text([text.train[index] for _, index in text.drawn(0, min(_TEXT, len(text.train)))])
    held_out_text = _Text(pair, objective, text)
    before_text = held_out_text.measured()
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    start = weight.detach().clone()
    found = {words: reader.read(some) for words, some in kinds.items()}
    before = _mean(one.part(_judges(one)).divergence() for one in found.values())
    for words, one in found.items():
        others = [other.part(~_judges(other)).inputs for name, other in found.items() if name != words]
        _add(module, _solution(one, torch.cat([kept_text, *others])))
    after = _mean(reader.read(some[::_EVERY]).divergence() for some in kinds.values())
    after_text = held_out_text.measured()
    kept = after < before and after_text <= (1 + _HARM) * before_text
    if not kept:
        with torch.no_grad():
            weight.copy_(start)
    return AnswerFit(
        num_prompts=sum(map(len, kinds.values())),
        before=before,
        after=after,
        text_before=before_text,
        text_after=after_text,
        kept=kept,
    )


@dataclasses.dataclass(frozen=True)
class _Read:
    """What was read at the places of answers of one kind.

    Attributes:
        inputs: Of the map, `[N, F]`.
        logits: Of the answers, less their mean, `[N, A]`.
        dense: The dense model's.
        derivative: Mean derivative of the logits with respect to what the map writes, `[A, D]`.
    """

    inputs: Tensor
    logits: Tensor
    dense: Tensor
    derivative: Tensor

    def part(self, chosen: Tensor) -> "_Read":
        """Some of the prompts, by a mask `[N]`."""
        return dataclasses.replace(
            self, inputs=self.inputs[chosen], logits=self.logits[chosen], dense=self.dense[chosen]
        )

    def divergence(self) -> float:
        """Mean KL divergence of the choices among the answers from the dense model's, nats."""
        return float(distance("choice", self.dense, self.logits).mean())


def _judges(read: _Read) -> Tensor:
    """The prompts that nothing is fitted to, as a mask `[N]`."""
    return torch.arange(len(read.inputs)) % _EVERY == 0


class _Reader:
    """Runs both models on prompts and looks at what the map reads and what follows from what it writes."""

    def __init__(self, pair: Pair, dense: Loaded, model: Loaded, module: nn.Module) -> None:
        self._pair, self._module = pair, module
        # Not in the precision of training: in bfloat16 two logits differ by eighths.
        self._ours, self._theirs = HeadShell(model.model), HeadShell(dense.model)
        self._dtype = dense.model.dtype

    def inputs_of_text(self, sequences: Sequence[Tensor]) -> Tensor:
        """What the map reads at every token, `[M, F]`."""
        found = []
        for sequence in sequences:
            batch = _batch([sequence])
            with torch.no_grad(), _Watched(self._module) as watched:
                self._pair.run_beside(batch, batch.token_ids)
            found.append(by_token(watched.inputs, batch.token_ids.shape)[0].double().cpu())
        return torch.cat(found)

    def read(self, prompts: Sequence[Asked]) -> _Read:
        """Both models at the places of answers, `prompts` all of one kind."""
        inputs, logits, dense, total = [], [], [], torch.zeros(())
        for start in range(0, len(prompts), _ROWS):
            some = prompts[start : start + _ROWS]
            batch = _batch([one.token_ids for one in some])
            rows, last = torch.arange(len(some)), batch.keep.sum(1) - 1
            words = list(some[0].words)
            with torch.no_grad():
                hidden = self._pair.run_dense(batch)[rows, last][None]
                theirs = self._theirs(hidden.to(self._dtype))[0][:, words]
            with torch.enable_grad(), _Watched(self._module, writes=True) as watched:
                hidden = self._pair.run_beside(batch, batch.token_ids).output[rows, last][None]
                answers = _centred(self._ours(hidden.float())[0][:, words])
                slopes = [
                    by_token(torch.autograd.grad(answers[:, place].sum(), watched.written, retain_graph=True)[0],
                             batch.token_ids.shape)[rows, last].double().sum(0).cpu()
                    for place in range(len(words))
                ]  # fmt: skip
            inputs.append(by_token(watched.inputs, batch.token_ids.shape)[rows, last].double().cpu())
            logits.append(answers.detach().double().cpu())
            dense.append(_centred(theirs).double().cpu())
            total = total + torch.stack(slopes)
        return _Read(torch.cat(inputs), torch.cat(logits), torch.cat(dense), total / len(prompts))


class _Watched:
    """Keeps what a map read and wrote in one run; with `writes`, the gradient can be asked of what it wrote."""

    inputs: Tensor
    written: Tensor

    def __init__(self, module: nn.Module, *, writes: bool = False) -> None:
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
    judges = _judges(read)
    chooses = judges.roll(1)
    fit, choose = read.part(~judges & ~chooses), read.part(chooses)

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
    answers_FA = solved(read.part(~judges))(best) / scale[:, None]
    return torch.linalg.pinv(read.derivative, rtol=1e-6) @ answers_FA.T


def _gram(features: Tensor) -> Tensor:
    return features.T @ features / len(features)


def _centred(logits_NA: Tensor) -> Tensor:
    logits = logits_NA.float()
    return logits - logits.mean(-1, keepdim=True)


def _add(module: nn.Module, delta_DF: Tensor) -> None:
    with torch.no_grad():
        weight = matrix_of(module)
        weight += delta_DF.to(weight.device, weight.dtype)


def _last_map(model: Loaded) -> nn.Module | None:
    """The linear map that the last block writes with last; None where none is known, or it is too wide."""
    facts = find_projections(model)
    if facts is None:
        return None
    module = model.stack.blocks[-1].get_submodule(facts.last)
    return module if matrix_of(module).shape[1] <= MOST_INPUTS else None


def _batch(sequences: Sequence[Tensor]) -> Batch:
    size = max(map(len, sequences))
    token_ids = torch.zeros((len(sequences), size), dtype=torch.long)
    keep = torch.zeros((len(sequences), size), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        token_ids[row, : len(sequence)] = sequence
        keep[row, : len(sequence)] = True
    return Batch(token_ids, keep, keep, torch.full_like(token_ids, -100), None)


class _Text:
    """The held-out text with the dense model's answers, which are computed once."""

    @torch.no_grad()
    def __init__(self, pair: Pair, objective: AbstractObjective, text: HealingText) -> None:
        self._pair, self._objective = pair, objective
        batches = [text.held_out_batch([index]) for index in range(min(_TEXT, len(text.held_out)))]
        self._batches = [(batch, pair.run_dense(batch)) for batch in batches]

    @torch.no_grad()
    def measured(self) -> float:
        """The objective, a mean."""
        total = sum(self._objective.loss(self._pair.run_beside(*one), one[0], 1.0).value for one in self._batches)
        return total / sum(self._objective.count(batch) for batch, _ in self._batches)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
