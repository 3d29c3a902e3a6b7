"""Repair without training: weights of the kept blocks are solved for, and the checkpoint stays a stock one.

    original + plan + text or images --cut--> raw cut --solve at each cut--> --rounds towards the predictions-->
        --last solve for the answers of prompts, where there are some--> repaired model

The calibration text is dealt out in three: most of it is fitted, an eighth chooses ridges and steps, an eighth judges.
Nothing is kept that does not bring the predictions nearer to the dense model's on text it was not fitted to.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from avss.compensation.answers import ChoiceYardstick, evenly, settle_answers
from avss.compensation.divergence import Yardstick
from avss.compensation.least_squares import (
    Readings,
    Run,
    Solved,
    cosine,
    dense_states,
    linear,
    refit,
    residual_error,
)
from avss.compensation.magnitude import scale
from avss.compensation.rounds import steer
from avss.compensation.streams import Mixed, Text, num_tokens, split
from avss.compensation.sweep import sweep as sweep_blocks
from avss.compensation.workpiece import Workpiece
from avss.config import COMPENSATION_METHODS, CompensationMethod, check_compensation
from avss.data.augment import Asked
from avss.data.batches import Batches
from avss.models.load import Loaded
from avss.models.predictions import measure_of
from avss.models.projections import PROJECTIONS, find_projections
from avss.models.shared_prefix import num_alone
from avss.record import Compensation, CutRepair, Plan, runs_of

METHODS = COMPENSATION_METHODS
"""What `compensate` knows, `auto` first."""

ROUNDS = 6
"""Rounds towards the dense model's predictions, at most, on text of the default length."""
TOKENS_A_ROUND = 6144
"""More text gives more rounds: one for so many tokens that are fitted, each on tokens of its own."""
MOST_ROUNDS = 24

Solve = Callable[[Workpiece, Run, Text, Batches, Readings], CutRepair]


def compensate(
    original: Loaded,
    smaller: Loaded,
    plan: Plan,
    batches: Batches,
    *,
    method: str = "auto",
    fitted: Sequence[Batches] = (),
    prompts: Sequence[Asked] = (),
    running: Sequence[Tensor] = (),
    rounds: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    may_go_on: Callable[[], bool] = lambda: True,
) -> tuple[Loaded, Compensation]:
    """Repairs a cut by one of these methods.

    - `refit`: output projections of the block before each cut, by least squares to the dense stream after it.
    - `linear`: a linear map folded into the MLP's projection there (ReplaceMe); `cosine`: the same by angle.
    - `scale`: one number a cut (Prune&Comp).
    - `sweep`: the MLP's output projection of every kept block from the first cut on, each to the dense stream.
    - `steer`: a few rounds that bring the predictions nearer, over all output projections from the first cut on.
    - `auto`: at each cut the better of `refit` and `linear`, or neither; then `steer`; then, where there are prompts,
      a last solve for the choice among their answers. Not `sweep`: it lowers every error of the stream and, as
      measured, brings the answers no nearer (docs/log.md).

    Args:
        original: The dense model.
        smaller: Its cut by `plan`. Left as it was: changed weights are new tensors of the returned model.
        plan: The blocks removed.
        batches: Calibration text, dealt out in three.
        method: One of `METHODS`.
        fitted: What is fitted in place of the first of the three (`split`), e.g. some of it in short windows.
        prompts: What asks for one of several answers, for the last solve of `auto` (`avss.compensation.answers`).
        running: Sequences of running text, no prompts among them, which that solve is to leave as they are; by default
            those that are fitted.
        rounds: Rounds of `steer`, at most; by default six, and more where there is more text for them.
        on_step: Called with steps done and steps in all, for progress.
        may_go_on: Asked before each round and before the last solve: what is not begun is left out.

    Returns:
        The repaired model, or `smaller` itself where nothing helped; and what was done.

    Raises:
        ConfigError: An unknown method, or a device that does not compute in float64.
        DataError: Too little text to fit to some of it and judge by the rest.
    """
    wanted = check_compensation(method)
    original.check_float64()
    facts = find_projections(smaller)
    reason = _reason_against(wanted, smaller, plan)
    if reason or facts is None:
        return smaller, Compensation(method=method, note=reason)
    work = Workpiece.begin(original, smaller, plan, facts)
    first, choose, judge = split(batches)
    fit: Text = Mixed(tuple(fitted)) if fitted else first
    num_shared = min(max(0, plan.removed[0] - 1), num_alone(original))
    by_choice, by_judge = (Yardstick(original, text, num_shared) for text in (choose, judge))
    before = by_judge(smaller)
    runs = runs_of(plan.removed)
    num_rounds = (rounds_for(fit) if rounds is None else rounds) if wanted in ("auto", "steer") else 0
    sweeps = wanted == "sweep"
    settles = wanted == "auto" and bool(prompts)
    total = len(runs) + sweeps + num_rounds + settles
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    repairs: list[CutRepair] = []
    if wanted in _CANDIDATES:
        for run in runs:
            repairs.append(_repair_cut(work, run, wanted, fit, choose, judge, by_choice))
            advance()
    num_swept = 0
    if sweeps:
        num_swept = _swept(work, fit, choose, by_choice)
        advance()
    steps = (
        [step.step for step in steer(work, fit, by_choice, rounds=num_rounds, on_step=advance, may_go_on=may_go_on)]
        if num_rounds
        else []
    )
    answers = None
    if settles and may_go_on():
        answers = settle_answers(work, prompts, running or fit.sequences, by_choice)
    on_step(total, total)
    story = Compensation(
        method=method,
        measure=measure_of(original),
        before=before,
        after=before,
        unit="places" if batches.facts.layout == "images" else "tokens",
        fit_tokens=num_tokens(fit),
        choose_tokens=num_tokens(choose),
        judge_tokens=num_tokens(judge),
        cuts=tuple(repairs),
        num_swept=num_swept,
        steps=tuple(steps),
        answers=answers,
    )
    if not work.changed:
        return smaller, story.model_copy(update={"note": "No repair brought the predictions nearer; the cut is raw."})
    after = by_judge(work.smaller)
    if not after < before:
        note = f"The repair was thrown away: on held-out text it took the divergence from {before:.4g} to {after:.4g}."
        kept_out = tuple(repair.model_copy(update={"applied": False}) for repair in repairs)
        undone = None if answers is None else answers.model_copy(update={"kept": False})
        return smaller, story.model_copy(update={"note": note, "cuts": kept_out, "answers": undone})
    return work.smaller, story.model_copy(update={"after": after, "weights": tuple(work.changed)})


def rounds_for(fit: Text) -> int:
    """How many rounds a text is good for: one for every 6,144 tokens, not below six and not above 24."""
    return min(MOST_ROUNDS, max(ROUNDS, num_tokens(fit) // TOKENS_A_ROUND))


def _swept(work: Workpiece, fit: Text, choose: Batches, by_choice: Yardstick) -> int:
    """Sweeps, and undoes it where the answers are no nearer afterwards; returns how many blocks it changed."""
    before, begin = by_choice(work.smaller), work.snapshot()
    changed = sweep_blocks(work, fit, choose)
    if changed and by_choice(work.smaller) < before:
        return changed
    work.restore(begin)
    return 0


def _reason_against(method: CompensationMethod, smaller: Loaded, plan: Plan) -> str:
    """Why nothing can be done; empty where something can."""
    if method == "none":
        return "No repair was asked for."
    if not plan.removed:
        return "No block was removed, so there is nothing to repair."
    model_type = smaller.owner.model_type
    facts = find_projections(smaller)
    if facts is None and model_type in PROJECTIONS:
        return (
            f"Text alone does not reach the blocks of this `{model_type}` where it stands, beside another part that "
            "must be given its own, so the cut was left raw."
        )
    if facts is None:
        return (
            f"Where the blocks of `{model_type}` write to the residual stream is not known, and a trial found no "
            f"linear map that does, so the cut was left raw. Known: {', '.join(sorted(PROJECTIONS))}."
        )
    if (facts.attention is None or not facts.is_complete) and method == "scale":
        return f"`scale` must know everything that the blocks of `{model_type}` write, and does not. `refit` can."
    if facts.obstacle and method not in ("auto", "steer"):
        return f"`{method}` cannot repair `{model_type}`: {facts.obstacle}. `steer` can."
    if facts.closing_norm and method == "sweep":
        return f"`sweep` does not repair the post-norm blocks of `{model_type}`. `refit` and `steer` do."
    if facts.closing_norm and method == "scale":
        return f"`scale` cannot repair `{model_type}`: the norm at the end of each block undoes any scale. `refit` can."
    return ""


def _repair_cut(
    work: Workpiece,
    run: Run,
    method: CompensationMethod,
    fit: Text,
    choose: Batches,
    judge: Batches,
    by_choice: Yardstick,
) -> CutRepair:
    """Repairs one cut by the best of the method's candidates, or not at all."""
    start, stop = run
    if start == 0:
        return CutRepair(start=start, stop=stop, note="There is no block before the cut that could make up for it.")
    assert work.facts is not None
    if work.facts.obstacle:
        return CutRepair(start=start, stop=stop, note=f"Nothing to solve for here: {work.facts.obstacle}.")
    raw = by_choice(work.smaller)
    readings, aims = Readings(work, run, _SOLVED.get(method, ())), dense_states(work, run, judge)
    untouched = CutRepair(
        start=start,
        stop=stop,
        error_before=residual_error(work, run, judge, aims),
        divergence_before=raw,
        note="Thrown away: it did not bring the predictions nearer on held-out text.",
    )
    best, best_value, raw_state = untouched, raw, work.snapshot()
    best_state = raw_state
    for solve in _CANDIDATES[method]:
        work.restore(raw_state)
        solved = solve(work, run, fit, choose, readings)
        value = by_choice(work.smaller)
        tried = untouched.model_copy(
            update={
                **solved.model_dump(include={"method", "ridge", "factor"}),
                "error_after": residual_error(work, run, judge, aims),
                "divergence_after": value,
            }
        )
        if value < best_value:
            best, best_value = tried.model_copy(update={"applied": True, "note": ""}), value
            best_state = work.snapshot()
        elif not best.applied:
            best = tried
    work.restore(best_state)
    return best


def _refit(work: Workpiece, run: Run, fit: Text, choose: Batches, readings: Readings) -> CutRepair:
    return CutRepair(start=run[0], stop=run[1], method="refit", ridge=refit(work, run, fit, choose, readings))


def _linear(work: Workpiece, run: Run, fit: Text, choose: Batches, readings: Readings) -> CutRepair:
    return CutRepair(start=run[0], stop=run[1], method="linear", ridge=linear(work, run, fit, choose, readings))


def _cosine(work: Workpiece, run: Run, fit: Text, choose: Batches, _: Readings) -> CutRepair:
    return CutRepair(start=run[0], stop=run[1], method="cosine", ridge=cosine(work, run, fit, choose))


def _scale(work: Workpiece, run: Run, fit: Text, _: Batches, __: Readings) -> CutRepair:
    return CutRepair(start=run[0], stop=run[1], method="scale", factor=scale(work, run, fit))


_CANDIDATES: dict[CompensationMethod, tuple[Solve, ...]] = {
    "scale": (_scale,),
    "linear": (_linear,),
    "cosine": (_cosine,),
    "refit": (_refit,),
    "auto": (_refit, _linear),
}
_SOLVED: dict[CompensationMethod, tuple[Solved, ...]] = {
    "linear": ("linear",),
    "refit": ("refit",),
    "auto": ("refit", "linear"),
}

__all__ = [
    "METHODS",
    "ROUNDS",
    "ChoiceYardstick",
    "Workpiece",
    "Yardstick",
    "compensate",
    "evenly",
    "rounds_for",
    "settle_answers",
    "split",
]
