"""Healing: training a smaller model to answer as the dense one does, within a budget of time or tokens."""

import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from avss.compensation import Workpiece, Yardstick, settle_answers
from avss.compensation.answers import MOST_TEXT
from avss.config import HealConfig, as_given, refuse_unread
from avss.data.images import Images
from avss.data.sources import Texts
from avss.errors import InvalidPlanError, UnsupportedArchitectureError
from avss.forms import Rows, choosing_forms
from avss.healing.images import prepare_images
from avss.healing.loop import Loop, Report
from avss.healing.objectives import find_objective
from avss.healing.pace import Clock
from avss.healing.pair import Pair
from avss.healing.state import Checkpoint, run_key
from avss.healing.team import Team
from avss.healing.text import HealingText, prepare_text
from avss.healing.weights import Choice, choose_weights, is_as_cut, merge
from avss.models.load import Loaded, dtype_name, has_bfloat16, in_dtype
from avss.models.predictions import label_answers
from avss.models.projections import find_projections
from avss.models.writing import NUM_WRITTEN, can_write, keep_rows, read_rows, write_rows
from avss.record import Healing, Plan

LEARNING_RATES: dict[Choice, float] = {"all": 3e-4, "blocks": 3e-4, "after": 3e-4, "lora": 1e-3}
"""Peak learning rate by what is trained. That of `after` rests on measurements (docs/log.md), `all` and `blocks` follow
it; adapters take the usual factor more."""

REPAIRED = 0.5
"""Of these rates, for a model whose weights were solved for or trained before, and which is not healed for a task: the
first steps at the whole rate undo a part of that (docs/log.md)."""

TASK_LEARNING_RATES: dict[Choice, float] = {"all": 3e-5, "blocks": 3e-5, "after": 3e-5, "lora": 1e-4}
"""The same for classifiers, whose answers are few and whose sentences are short (docs/log.md)."""

_JUDGING_TOKENS = 8192
"""Of the held-out text, that judge the last solve, at most."""
_SHARE_OF_TIME, _LAST_SOLVE = 0.1, 0.05
"""Shares of a budget of time: for writing, at most, and set aside for the last solve."""


def heal(
    dense: Loaded,
    smaller: Loaded,
    plan: Plan,
    texts: Texts | Images | HealingText,
    config: HealConfig,
    *,
    labels: Sequence[int] | None = None,
    rows: Rows | None = None,
    checkpoint_folder: Path | None = None,
    budget_name: str | None = None,
    report: Report = lambda done, total, note: None,
    clock: Clock = time.monotonic,
) -> tuple[Loaded, Healing, Checkpoint | None]:
    """Trains a smaller model to answer as the dense one does.

    Both given models are left as they were: the smaller one, which may share its weights with the dense one, is copied
    first. The weights that come back are rounded to the dtype they will be stored in, so that what is measured is what
    is saved.

    Args:
        dense: The model it was cut from: the teacher.
        smaller: The smaller model.
        plan: The blocks removed.
        texts: Text or images to train on, a part of which is held out; or what `prepare` made of them.
        config: Budget, weights, learning rate ...
        labels: For classifiers: one a text; `config.label_weight` says how much they count.
        rows: What the dense model wrote for `config.forms` already; None to let it write what is wanted.
        checkpoint_folder: Where the state of an unfinished run is kept, and looked for; None to keep none.
        budget_name: What the budget is called in the name of that state, where it is what a clock has left: a run that
            was killed is found again though less is left.
        report: Called with seconds or tokens done, their total and a note.
        clock: Seconds from any fixed moment on.

    Returns:
        The healed model, what was done, and the checkpoint, to be removed once the result is safe.

    Raises:
        InvalidPlanError: Plan and models do not belong together.
        UnsupportedArchitectureError: The models' vocabularies or widths differ, or their head cannot be trained.
        DataError: The text is too short, or cannot be read by this model.
        ConfigError: Adapters are asked for, and peft is not installed.
        NumericalError: The loss is no number.
    """
    _check_pair(dense, smaller, plan)
    text = texts if isinstance(texts, HealingText) else prepare(smaller, texts, config, labels=labels)
    found = {"batch_size": text.facts.batch_size, "held_out": len(text.held_out)}
    if smaller.pad_id is None:
        found["micro_batch_size"] = 1
    share = text.augmentation.share if text.augmentation is not None else 0.0
    writes = bool(config.forms) and can_write(dense)
    written = (NUM_WRITTEN if config.written is None else config.written) if writes else 0
    config = config.model_copy(update=found | {"augment": share, "short": text.short, "written": written})
    choice: Choice = "after" if config.weights == "auto" else config.weights
    of_task = smaller.head not in ("causal", "masked", "encoder", "seq2seq")
    rate = config.learning_rate or (TASK_LEARNING_RATES if of_task else LEARNING_RATES)[choice]
    if config.learning_rate is None and not of_task and choice != "lora" and not is_as_cut(dense, smaller, plan):
        rate *= REPAIRED
    precision = _precision(config.precision, smaller.device)
    checkpoint = None
    if checkpoint_folder is not None:
        settings = config.model_dump(mode="json") | ({"budget": budget_name} if budget_name else {})
        hashes = {"text": text.facts.content_hash, "held_out": text.held_out_facts.content_hash, "plan": plan.removed,
                  "labels": text.train_labels, "config": settings, **({"rows": rows} if rows else {}),
                  "team": Team().size, "precision": precision}  # fmt: skip
        checkpoint = Checkpoint(checkpoint_folder / f"{run_key(dense, smaller, hashes)}.pt")
    model = dataclasses.replace(smaller, model=_own_copy(smaller))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # adapters begin at random
        trained = choose_weights(dense, model, plan, choice, rank=config.rank)
    pair = Pair(
        dense,
        model,
        plan,
        num_shared=trained.num_shared,
        needs_states=config.hidden_weight > 0,
        recompute=config.recompute,
        precision=precision,
    )
    begun = clock()
    if written:
        if rows is None:
            rows = _written(dense, config.forms or (), config, checkpoint, report, clock)
        text = text.with_rows(rows)
    set_aside = _LAST_SOLVE * (config.budget.seconds or 0.0) if written and choosing_forms(config.forms or ()) else 0.0
    objective = find_objective(pair, model, config, has_labels=labels is not None)
    loop = Loop(
        pair,
        objective,
        trained,
        text,
        config,
        learning_rate=rate,
        checkpoint=checkpoint,
        spent=clock() - begun + set_aside,
        report=report,
        clock=clock,
    )
    outcome = loop.run()
    merge(trained)
    answers = None
    if prompts := text.asked():
        work = Workpiece.begin(dense, model, plan, find_projections(model))
        kept_text = [text.train[draw.index] for draw in text.drawn(0, min(MOST_TEXT, len(text.train)))]
        measure = Yardstick(dense, text.held_out_batches().first(_JUDGING_TOKENS), 0)
        answers = settle_answers(work, prompts, kept_text, measure, precision=pair.autocast)
        model = work.smaller
    settings = config.model_dump(mode="json") | {
        "weights": choice,
        "learning_rate": rate,
        "precision": dtype_name(precision or model.model.dtype),
        "form_share": text.augmentation.form_share if text.augmentation is not None and config.forms else 0.0,
        "num_shared_blocks": trained.num_shared,
        "num_processes": Team().size,
    }
    healing = Healing(
        objective=objective.title,
        weights=trained.title,
        num_trained=trained.num_values,
        data=text.facts,
        held_out=text.held_out_facts,
        settings=settings,
        answers=answers,
        **{field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)},
    )
    return _rounded(model, smaller), healing, checkpoint


def prepare(
    loaded: Loaded, texts: Texts | Images, config: HealConfig, *, labels: Sequence[int] | None = None
) -> HealingText:
    """What a model is healed on, and a refusal of whatever its healing would not read or could not.

    Args:
        loaded: The smaller model, or the dense one: they read alike.
        texts: Text or images.
        config: The healing.
        labels: For classifiers: one a text.

    Raises:
        DataError: The text is too short, or cannot be read by this model.
        ConfigError: A setting has no part in the healing of such a model.
    """
    _check_read(loaded, config, has_labels=labels is not None)
    if isinstance(texts, Images):
        return prepare_images(loaded, texts, config)
    return prepare_text(loaded, texts, config, labels=labels)


def _written(
    dense: Loaded, forms: Sequence[str], config: HealConfig, checkpoint: Checkpoint | None, report: Report, clock: Clock
) -> Rows:
    """What the dense model writes into forms; of a budget of time, in a tenth of it at most."""
    rows = read_rows(checkpoint.rows_path) if checkpoint is not None else None
    if rows is not None:
        return rows
    limit = math.inf
    # Several processes must read the same prompts, so none of them stops at a time of its own.
    if config.budget.seconds is not None and Team().size == 1:
        limit = clock() + _SHARE_OF_TIME * config.budget.seconds
    rows = write_rows(
        dense,
        dict.fromkeys(forms, config.written or 0),
        seed=config.seed,
        may_go_on=lambda: clock() < limit,
        on_step=lambda done, total: report(0, None, f"{done} of {total} prompts written"),
    )
    if checkpoint is not None and Team().leads:
        keep_rows(rows, checkpoint.rows_path)
    return rows


def _check_pair(dense: Loaded, smaller: Loaded, plan: Plan) -> None:
    if plan.num_blocks != len(dense.stack) or len(plan.kept) != len(smaller.stack):
        raise InvalidPlanError(
            f"The plan keeps {len(plan.kept)} of {plan.num_blocks} blocks; the dense model has {len(dense.stack)} and "
            f"the smaller one {len(smaller.stack)}. Name the model it was cut from with `--teacher`."
        )
    sizes = [(one.vocabulary, one.hidden_size, one.head) for one in (dense, smaller)]
    if sizes[0] != sizes[1]:
        raise UnsupportedArchitectureError(
            f"The dense model has {sizes[0][0]} token embeddings, width {sizes[0][1]} and a `{sizes[0][2]}` head, the "
            f"smaller one {sizes[1][0]}, {sizes[1][1]} and `{sizes[1][2]}`; to be compared they must agree. Name the "
            "model it was cut from with `--teacher`."
        )


def _check_read(loaded: Loaded, config: HealConfig, *, has_labels: bool) -> None:
    """Refuses what was asked for and has no part in the healing of such a model.

    Raises:
        ConfigError: There is such a setting.
    """
    given = as_given(config)

    def refuse(name: str, what: str, remedy: str | None = None) -> None:
        refuse_unread({name: given.get(name)}, what, remedy)

    if config.weights != "lora":
        refuse("rank", f"adapters, and `--weights {config.weights}` trains none", "`--weights lora`")
    if not config.forms:
        refuse("written", "the forms of prompts, and none were named", "`--form`")
    head, predicts_words = loaded.head, loaded.head in ("causal", "masked")
    if head == "encoder" or (head == "classifier" and label_answers(loaded.model.config) == "numbers"):
        refuse("temperature", f"predicted words or labels, and this `{head}` predicts none")
    if not predicts_words and not has_labels:
        remedy = "`--labels COLUMN`" if head == "classifier" else None
        refuse("label_weight", f"the labels of a text, and this `{head}` is healed without", remedy)


def _precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """The dtype to compute products in; None for the weights' own."""
    if wanted == "auto":
        wanted = "bfloat16" if has_bfloat16(device) else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else None


def _own_copy(smaller: Loaded) -> torch.nn.Module:
    """The model in float32 and in memory of its own, in evaluation mode: without dropout, training repeats itself."""
    if smaller.model.dtype == torch.float32:
        return copy.deepcopy(smaller.model).eval()
    return in_dtype(smaller.model, torch.float32).eval()


def _rounded(model: Loaded, smaller: Loaded) -> Loaded:
    """The model with its weights rounded as they will be stored, in the dtype that the given model computes in."""
    for parameter in model.model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    stored = in_dtype(model.model, smaller.stored_dtype)
    return dataclasses.replace(smaller, model=in_dtype(stored, smaller.model.dtype))
