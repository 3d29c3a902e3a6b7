"""The training loop: steps of AdamW, validation on held-out text, the best weights kept, the state written."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from avss.config import HealConfig
from avss.errors import NumericalError
from avss.healing.objectives import AbstractObjective, states_loss
from avss.healing.pace import Clock, Pace, learning_rate_factor
from avss.healing.pair import Pair
from avss.healing.state import Checkpoint, copy_of
from avss.healing.team import Team
from avss.healing.text import Batch, HealingText
from avss.healing.weights import Trained
from avss.record import HealingStep

Report = Callable[[int, int | None, str], None]
"""Called after each step with (done, total, a note): seconds or tokens, and the loss in words."""

_LOSS_POINTS = 100
_BETAS = (0.9, 0.95)
_MARGIN = 1.1
"""The next step and the last validation may take so much longer than those before: machines are shared."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the loop leaves behind; the best weights are in the model.

    Attributes:
        num_steps: Steps done.
        num_tokens: Tokens trained on.
        seconds: Wall time.
        losses: The objective on the training text, as means over stretches of steps.
        validation: The objective on the held-out text.
        best_step: The step whose weights are in the model now.
        stopped: Why it ended.
    """

    num_steps: int
    num_tokens: int
    seconds: float
    losses: tuple[HealingStep, ...]
    validation: tuple[HealingStep, ...]
    best_step: int
    stopped: Literal["budget", "no improvement"]


class Loop:
    """Trains the chosen weights of a model until the budget is used up or the held-out text stops getting better.

    Its state after any step is a function of the models, the text and the settings: nothing is drawn but from seeds,
    so a run that goes on from a checkpoint gives the same weights as one that was never interrupted. (The budget must
    be in tokens for that: how many steps fit a time is the machine's affair.)

    `spent` seconds of the budget are gone when it begins.
    """

    def __init__(
        self,
        pair: Pair,
        objective: AbstractObjective,
        trained: Trained,
        text: HealingText,
        config: HealConfig,
        *,
        learning_rate: float,
        checkpoint: Checkpoint | None = None,
        spent: float = 0.0,
        report: Report = lambda done, total, note: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._pair, self._objective, self._trained, self._text, self._config = pair, objective, trained, text, config
        self._learning_rate, self._checkpoint, self._report, self._clock = learning_rate, checkpoint, report, clock
        self._batch_size = text.facts.batch_size
        self._team = Team()
        self._optimiser = _optimiser(trained, config, learning_rate)
        self._pace = Pace(config.budget, seconds=spent)
        self._dense_held_out: list[tuple[Batch, Tensor]] = []
        self._steps = 0
        self._losses: list[HealingStep] = []
        self._validation: list[HealingStep] = []
        self._best: dict[str, Tensor] = {}
        self._best_step = 0
        self._last_measured = 0.0
        self._last_write = 0.0
        self._started = 0.0

    def run(self) -> Outcome:
        """Trains, and leaves the best weights in the model.

        Raises:
            NumericalError: The loss is no number any more.
        """
        self._started = self._last_write = self._clock()
        if not self._resume():
            self._validate()
        stopped: Literal["budget", "no improvement"] = "budget"
        while self._agreed_room():
            begun = self._pace.seconds
            self._step()
            self._tick()
            self._pace.note_step(_MARGIN * (self._pace.seconds - begun))
            if self._is_due():
                self._validate()
                if self._since_best() >= self._config.patience:
                    stopped = "no improvement"
                    break
            # After a validation that is due: a run that goes on from here does not make up for it a step later.
            self._write_if_due()
            self._tick()
        if stopped == "budget" and self._validation[-1].step != self._steps:
            self._validate()
        with torch.no_grad():
            for name, value in self._trained.parameters.items():
                value.copy_(self._best[name])
        return Outcome(
            num_steps=self._steps,
            num_tokens=self._pace.num_tokens,
            seconds=self._pace.seconds,
            losses=_thinned(self._losses),
            validation=tuple(self._validation),
            best_step=self._best_step,
            stopped=stopped,
        )

    # --- steps ---

    def _step(self) -> None:
        config = self._config
        drawn = self._text.step(self._steps)
        whole = self._text.batch(drawn)
        count, num_tokens = self._objective.count(whole), whole.num_tokens
        factor = learning_rate_factor(self._team.agree(self._pace.middle_of_step(num_tokens)), config.warmup)
        for group in self._optimiser.param_groups:
            group["lr"] = self._learning_rate * factor
        mine = self._team.share(drawn)
        # So many sequences are as much as so many times their short windows.
        size = (config.micro_batch_size or self._batch_size) * len(drawn) // self._batch_size
        loss = 0.0
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            loss += self._backward(whole if part == drawn else self._text.batch(part), count, num_tokens)
        parameters = list(self._trained.parameters.values())
        self._team.sum_gradients(parameters)
        (loss,) = self._team.sum([loss])
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        if not bool(torch.isfinite(norm)):
            raise NumericalError(
                f"The gradient of step {self._steps + 1} of healing is no number (loss {loss:.4g}). Use a smaller "
                f"`--learning-rate` than {self._learning_rate:g}, or `--precision float32`; if the model's own outputs "
                "are no numbers, there is nothing to heal."
            )
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._steps += 1
        self._pace.num_tokens += num_tokens
        self._tick()
        self._losses.append(self._point(loss))
        self._show()

    def _backward(self, batch: Batch, count: int, num_tokens: int) -> float:
        """Adds a part of the batch to the gradients; its share of the loss."""
        sides = self._pair.run(batch)
        loss = self._objective.loss(sides, batch, 1 / count)
        tensors: list[Tensor] = [loss.tensor]
        gradients: list[Tensor | None] = [loss.gradient]
        value = loss.value
        if self._config.hidden_weight and sides.states:
            states = self._config.hidden_weight * states_loss(sides, batch) / num_tokens
            tensors.append(states)
            gradients.append(None)
            value += float(states.detach())
        torch.autograd.backward(tensors, gradients)  # type: ignore[arg-type]
        return value

    # --- validation ---

    @torch.no_grad()
    def _validate(self) -> None:
        self._tick()
        begun = self._pace.seconds
        sums = [0.0, 0.0, 0.0, 0.0]
        for batch, dense in self._held_out():
            loss = self._objective.loss(self._pair.run_beside(batch, dense), batch, 1.0)
            found = (loss.value, self._objective.count(batch), loss.text_nats or 0.0, loss.num_words)
            sums = [before + new for before, new in zip(sums, found, strict=True)]
        total, count, nats, words = self._team.sum(sums)
        self._tick()
        self._pace.reserve = _MARGIN * self._team.agree(self._pace.seconds - begun)
        self._last_measured = self._team.agree(self._pace.used)
        point = self._point(total / count).model_copy(update={"text_loss": nats / words if words else None})
        if not self._validation and not math.isfinite(point.loss):
            raise NumericalError(
                f"The objective of healing is `{point.loss}` before the first step: one of the two models gives no "
                "numbers on the held-out text. Use another text or `--precision float32`."
            )
        self._validation.append(point)
        if not self._best or point.loss < self._best_point().loss:
            self._best, self._best_step = copy_of(self._trained.parameters), self._steps
        self._show()

    def _held_out(self) -> list[tuple[Batch, Tensor]]:
        """This process's held-out batches with the dense model's answers, which are computed once."""
        if not self._dense_held_out:
            size = self._config.micro_batch_size or self._batch_size
            indices = list(self._team.share(range(len(self._text.held_out))))
            for start in range(0, len(indices), size):
                batch = self._text.held_out_batch(indices[start : start + size])
                self._dense_held_out.append((batch, self._pair.run_dense(batch)))
        return self._dense_held_out

    def _best_point(self) -> HealingStep:
        return next(point for point in self._validation if point.step == self._best_step)

    def _since_best(self) -> int:
        return sum(point.step > self._best_step for point in self._validation)

    def _is_due(self) -> bool:
        """Whether an equal part of the budget is over since the last validation; the last one comes at the end."""
        parts = self._pace.num_validations(self._config.validations)
        used = self._team.agree(self._pace.used)
        return int(self._last_measured * parts) < int(used * parts) < parts

    # --- time ---

    def _tick(self) -> None:
        now = self._clock()
        self._pace.seconds += now - self._started
        self._started = now

    def _agreed_room(self) -> bool:
        self._tick()
        return bool(self._team.agree(float(self._pace.has_room())))

    def _point(self, loss: float) -> HealingStep:
        return HealingStep(
            step=self._steps, num_tokens=self._pace.num_tokens, seconds=round(self._pace.seconds, 3), loss=loss
        )

    def _show(self) -> None:
        budget, pace = self._config.budget, self._pace
        note = f"held out {self._validation[0].loss:.3f} -> {self._best_point().loss:.3f}" if self._validation else ""
        if self._losses:
            recent = self._losses[-20:]
            note = f"loss {sum(point.loss for point in recent) / len(recent):.3f}, {note}"
        if budget.seconds is not None and (budget.tokens is None or pace.used > pace.num_tokens / budget.tokens):
            self._report(min(int(pace.seconds), int(budget.seconds)), int(budget.seconds), note)
        else:
            self._report(min(pace.num_tokens, budget.tokens or 0), budget.tokens, note)

    # --- going on after an interruption ---

    def _write_if_due(self) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None or not self._team.leads:
            return
        if self._clock() - self._last_write < checkpoint.seconds_between:
            return
        checkpoint.write(
            {
                "weights": copy_of(self._trained.parameters),
                "best": self._best,
                "best_step": self._best_step,
                "optimiser": self._optimiser.state_dict(),
                "steps": self._steps,
                "last_measured": self._last_measured,
                "pace": {"num_tokens": self._pace.num_tokens, "seconds": self._pace.seconds,
                         "reserve": self._pace.reserve, "step_seconds": self._pace.step_seconds},
                "losses": [point.model_dump() for point in self._losses],
                "validation": [point.model_dump() for point in self._validation],
            }
        )  # fmt: skip
        self._last_write = self._clock()

    def _resume(self) -> bool:
        """Takes up the state of an interrupted run; whether there was one."""
        state = self._checkpoint.read() if self._checkpoint is not None else None
        if state is None:
            return False
        with torch.no_grad():
            for name, value in self._trained.parameters.items():
                value.copy_(state["weights"][name])
        self._best, self._best_step = state["best"], state["best_step"]
        self._optimiser.load_state_dict(state["optimiser"])
        self._steps, self._last_measured = state["steps"], state["last_measured"]
        self._pace = Pace(self._config.budget, **state["pace"])
        self._losses = [HealingStep(**point) for point in state["losses"]]
        self._validation = [HealingStep(**point) for point in state["validation"]]
        return True


def _optimiser(trained: Trained, config: HealConfig, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW in one fused pass over the weights; norms and biases do not decay."""
    values = list(trained.parameters.values())
    groups = [
        {"params": [value for value in values if value.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [value for value in values if value.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = all(value.device.type in ("cpu", "cuda") for value in values)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=_BETAS, fused=fused
    )


def _thinned(losses: Sequence[HealingStep]) -> tuple[HealingStep, ...]:
    """Means over stretches of steps: a curve that a record can hold, however long the run."""
    size = -(-len(losses) // _LOSS_POINTS) if losses else 1
    stretches = [losses[start : start + size] for start in range(0, len(losses), size)]
    return tuple(
        stretch[-1].model_copy(update={"loss": sum(point.loss for point in stretch) / len(stretch)})
        for stretch in stretches
    )
