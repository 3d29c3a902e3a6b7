"""`avss.stability`: does the choice depend on the seed, the amount or the kind of text?"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avss.collect import collect
from avss.composer.inputs import AnyModel, calibration, load
from avss.composer.records import now, versions, write_record
from avss.composer.scores import DEFAULT_CRITERIA, guarded, without_gradients
from avss.criteria import AbstractCriterion, find_criteria
from avss.errors import ConfigError, DegenerateStatisticError
from avss.models.load import Loaded
from avss.output import fresh_folder
from avss.plan import count_of_fraction, rounded_half_up
from avss.progress import Stages, silent
from avss.record import RunRecord, StabilityStudy, StabilityTrial
from avss.scoring import score_blocks
from avss.statistics.agreement import kendall
from avss.statistics.base import FloatArray
from avss.statistics.resampling import lowest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def stability(
    model: AnyModel,
    data: str | Sequence[str] = ("builtin",),
    *,
    criteria: str | Sequence[str] = DEFAULT_CRITERIA,
    fraction: float = 0.25,
    num_seeds: int = 3,
    sizes: Sequence[int] = (),
    samples: int = 64,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stack: str = "auto",
    stages: Stages = silent,
    **settings: Any,
) -> StabilityStudy:
    """Scores the model on several draws, amounts and kinds of text, and compares the orders and the choices.

    Smaller amounts are parts of the larger ones, so each draw of each text takes one pass.

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        data: One source or several; everything is compared with the first draw of the first.
        criteria: Names from `avss.CRITERIA`, or `all`.
        fraction: Share of blocks whose choice is compared.
        num_seeds: Draws of each text. Of a text with no more than `samples` sequences every draw is the same: all of it
            is scored on once, and the draws are of a half and of a quarter.
        sizes: Sequences to score on, beside all of them; by default a quarter and a half. Of a text with fewer than
            `samples`, the same shares.
        samples: Sequences in a draw.
        tokenizer: For a model object.
        stack: Which stack of blocks: `auto`, or its name or path.
        stages: Where progress goes.
        **settings: `seq_len`, `batch_size`, `layout`.

    Raises:
        UserError: Anything the caller can fix, in one sentence. A criterion that is undefined on one of the texts is
            left out with a warning; if none is left, that is an error.
    """
    wanted = tuple(one for one in find_criteria(criteria if isinstance(criteria, str) else list(criteria)) if one.needs)
    if not wanted:
        raise ConfigError("These criteria read no data, so data cannot change them. Name one that does, e.g. `avss`.")
    if num_seeds < 1:
        raise ConfigError(f"`--seeds {num_seeds}` must be at least 1.")
    if samples < 1:
        raise ConfigError(f"`--samples {samples}` must be at least 1.")
    amounts = sorted({size for size in (*(sizes or (samples // 4, samples // 2)), samples) if size > 0}, reverse=True)
    if amounts[0] > samples:
        raise ConfigError(f"`--sizes {amounts[0]}` is more than the {samples} sequences of a draw (`--samples`).")
    shares = [amount / samples for amount in amounts]
    loaded = load(model, tokenizer, stack=stack, or_disk=True)
    if loaded.files is not None:
        wanted, left_out = without_gradients(wanted)
        for said in filter(None, (None if isinstance(model, Loaded) else loaded.note, *left_out)):
            _log.warning(said)
    count = count_of_fraction(fraction, len(loaded.stack))
    trials: list[StabilityTrial] = []
    reference: dict[str, FloatArray] = {}
    sources = [data] if isinstance(data, str) else list(data)
    shared = Counter(Path(source).name for source in sources)
    undefined: dict[str, str] = {}
    drawn: set[frozenset[bytes]] = set()
    needs = [need for criterion in wanted for need in criterion.needs]
    with stages("Scoring on every draw") as advance:
        done, total = 0, len(sources) * num_seeds
        for source in sources:
            for seed in range(num_seeds):
                advance(done, total)
                batches = calibration(loaded, source, samples=samples, seed=seed, **settings)
                num = len(batches.sequences)
                whole = frozenset(sequence.numpy().tobytes() for sequence in batches.sequences)
                # Of a short text, the same shares of what there is.
                for size in dict.fromkeys(max(1, rounded_half_up(share * num)) for share in shares):
                    if size == num and whole in drawn:
                        continue  # an earlier seed drew the same sequences: it would agree with itself
                    part = batches if size == num else batches.split(size)[0]
                    collected = collect(loaded, part, needs)
                    name = batches.facts.source
                    if shared[name] > 1:  # files of one name in several folders
                        name = f"{Path(source).parent.name}/{name}"
                    for criterion in wanted:
                        if criterion.name in undefined:
                            continue
                        try:
                            values = np.array(score_blocks(collected, (criterion,))[0].values)
                        except DegenerateStatisticError as error:
                            undefined[criterion.name] = str(error)
                            continue
                        is_reference = criterion.name not in reference
                        reference.setdefault(criterion.name, values)
                        trial = _trial(criterion, values, reference[criterion.name], count, name, seed, size)
                        trials.append(trial.model_copy(update={"is_reference": is_reference}))
                drawn.add(whole)
                done += 1
                advance(done, total)
    for name, why in undefined.items():
        _log.warning("Left out of the study: `%s`. %s", name, why)
    trials = [trial for trial in trials if trial.criterion not in undefined]
    if not trials:
        raise DegenerateStatisticError(next(iter(undefined.values())))
    if all(trial.is_reference for trial in trials):
        raise ConfigError(
            "One draw of one text and of one size is compared with nothing. Name more seeds, texts or sizes; a text "
            "with no more sequences than `--samples` has one draw."
        )
    return StabilityStudy(count=count, trials=tuple(trials), model=loaded.facts())


def _trial(
    criterion: AbstractCriterion,
    values: FloatArray,
    reference: FloatArray,
    count: int,
    source: str,
    seed: int,
    num_sequences: int,
) -> StabilityTrial:
    free = [block for block in range(len(values)) if block not in guarded(criterion.name, len(values))]
    chosen, expected = lowest(values, count, free), lowest(reference, count, free)
    return StabilityTrial(
        criterion=criterion.name,
        source=source,
        seed=seed,
        num_sequences=num_sequences,
        kendall=kendall(values, reference),
        overlap=len(set(chosen) & set(expected)) / len(expected),
        chosen=chosen,
    )


def write_stability(study: StabilityStudy, out: str | Path, *, command: str, force: bool = False) -> RunRecord:
    """Writes the study as a record with its table and page to a new folder.

    Raises:
        OutputExistsError: The folder exists.
    """
    if study.model is None:
        raise ConfigError("This study names no model; make it with `avss.stability`.")
    record = RunRecord(created=now(), command=command, versions=versions(), model=study.model, study=study)
    with fresh_folder(Path(out), force=force) as folder:
        write_record(record, folder)
    return record
