"""What a run found, in plain sentences: the page, the model card and the notebook open with them."""

import dataclasses
import math

from avss.record import Comparison, Cut, Measurement, ModelFacts, RunRecord, Verification, describe_blocks
from avss.reporting import numbers, tables
from avss.reporting.repair import answers_sentence, as_healed, compensation_sentences, form_share_of

PROMISE = 0.9
_NEAR_A_QUARTER = 0.2
"""Share of the dense model's result that the AVSS paper promises at about a quarter of the blocks removed."""


@dataclasses.dataclass(frozen=True, slots=True)
class MeanRetention:
    """The mean over tasks of the share kept: each task counts once, with the first metric measured on it.

    Only results where higher is better count; language modelling has no agreed share and is told apart.

    Attributes:
        ratio: Mean of `value / dense`, 0 to about 1.
        stderr: Standard error, tasks taken as independent; None where a task has none.
        chance_corrected: Mean of the chance-corrected shares; None unless every task has one.
        num_tasks: Tasks in the mean.
    """

    ratio: float
    stderr: float | None
    chance_corrected: float | None
    num_tasks: int

    @property
    def text(self) -> str:
        """For people, e.g. `93.1 ± 1.2 %`."""
        return numbers.percent(self.ratio, self.stderr)


def mean_retention(record: RunRecord, cut: Cut) -> MeanRetention | None:
    """The mean share kept over the tasks of a cut; None where no such task was measured."""
    up = {(one.task, one.metric) for one in (*record.dense, *cut.measurements) if _is_answer(one)}
    entries = {}
    for entry in cut.retention:
        if (entry.task, entry.metric) in up and math.isfinite(entry.ratio):
            entries.setdefault(entry.task, entry)
    if not entries:
        return None
    errors = [entry.ratio_stderr for entry in entries.values()]
    shares = [entry.chance_corrected for entry in entries.values()]
    known_errors = [error for error in errors if error is not None and math.isfinite(error)]
    known_shares = [share for share in shares if share is not None and math.isfinite(share)]
    total = len(entries)
    return MeanRetention(
        ratio=math.fsum(entry.ratio for entry in entries.values()) / total,
        stderr=math.hypot(*known_errors) / total if len(known_errors) == total else None,
        chance_corrected=math.fsum(known_shares) / total if len(known_shares) == total else None,
        num_tasks=total,
    )


def headline(record: RunRecord) -> str:
    """The run in a line, e.g. `7 of 30 blocks removed from SmolLM2-135M-Instruct`."""
    name = record.model.source.rsplit("/", 1)[-1]
    if record.cuts:
        cut, plan = record.cuts[0], record.cuts[0].plan
        if is_as_loaded(cut):
            return f"{_size(cut.model)} beside {_size(record.model)}"
        return f"{len(plan.removed)} of {_blocks(plan.num_blocks)} removed from {name}"
    return f"{name}: {_blocks(record.model.num_blocks)} {_what_was_done(record)}"


def is_as_loaded(cut: Cut) -> bool:
    """Whether this is a model of which nobody said which blocks it lacks: it was measured as it was given."""
    return cut.plan.method == "model"


def _size(model: ModelFacts) -> str:
    return f"{model.source.rsplit('/', 1)[-1]} ({_blocks(model.num_blocks)})"


def _what_was_done(record: RunRecord) -> str:
    if record.scores:
        return "scored, none removed"
    if record.study is not None:
        return "scored on several draws"
    if record.damage is not None or record.search is not None:
        return "left out in turn and measured"
    return "measured as they are" if record.dense else "and nothing measured"


def sentences(record: RunRecord, cut: Cut | None = None) -> list[str]:
    """The findings on one cut: what went, what it did to the text, what is left of the tasks, whether it was proven.

    Args:
        record: The run.
        cut: One of its cuts; the one that was asked for when left out. Without any, the scores are summed up.
    """
    if cut is None and not record.cuts:
        return _score_sentences(record)
    cut = cut or record.cuts[0]
    return [
        _removal_sentence(record, cut),
        *(compensation_sentences(cut.compensation) if cut.compensation else ()),
        *_healing_sentences(cut),
        *_language_sentences(record, cut),
        *_retention_sentences(record, cut),
        verification_sentence(cut),
    ]


def verification_sentence(cut: Cut) -> str:
    """Whether the saved model was proven to be what it should be."""
    proof = cut.verification
    if is_as_loaded(cut):
        return "It was measured as it was loaded; `avss verify` checks a saved model."
    if proof is None and cut.path is None:
        return "It was measured in memory, not saved, so there is nothing to verify."
    if proof is None:
        return "The saved model was NOT verified."
    if proof.passed and not proof.outputs_compared:
        found = "was found to load, but not run" if proof.reload_strict else "was neither loaded nor run"
        why = f": {proof.note}" if proof.note else ""
        return f"The saved model was compared with the original byte by byte and {found}{why}."
    if proof.passed:
        return "The saved model was loaded again and verified."
    return "Verification FAILED: the saved model is not what it should be. Do not use it."


def verification_rows(proof: Verification) -> list[tuple[str, bool, str]]:
    """Each check as (what was asked, whether it held, what was found)."""
    allowed = f"allowed: {numbers.number(proof.tolerance)}"
    rows = []
    if proof.reload_strict is not None:
        rows.append(("A fresh load finds every weight and no other", proof.reload_strict, "strict load"))
    if proof.bytes_equal is not None:
        what = "The weights of the kept blocks are those of the original, byte for byte"
        rows.append((what, proof.bytes_equal, "compared with the original's files"))
    if not proof.outputs_compared:
        return rows
    if proof.max_diff_memory is not None:
        within = proof.max_diff_memory <= proof.tolerance
        found = f"largest difference {numbers.number(proof.max_diff_memory)}, {allowed}"
        rows.append(("Outputs equal those of the model in memory", within, found))
    rows.append(
        (
            "Outputs equal the original model's with the removed blocks bypassed"
            + (", before the weights were changed" if proof.of_raw_cut else ""),
            proof.max_diff_bypass <= proof.tolerance,
            f"largest difference {numbers.number(proof.max_diff_bypass)}, {allowed}",
        )
    )
    if proof.cached_generation is not None:
        found = f"{proof.num_generated} greedy tokens compared"
        rows.append(("Generation with the cache equals generation without", proof.cached_generation, found))
    return rows


def _removal_sentence(record: RunRecord, cut: Cut) -> str:
    plan, dense, model = cut.plan, record.model, cut.model
    if is_as_loaded(cut):
        change = numbers.change(dense.num_parameters, model.num_parameters)
        return (
            f"{_size(model)} has {numbers.count(model.num_parameters)} parameters, {_size(dense)} "
            f"{numbers.count(dense.num_parameters)} ({change}); which blocks it lacks is not recorded."
        )
    if not plan.removed:
        return "No block was removed."
    return (
        f"{len(plan.removed)} of {_blocks(plan.num_blocks)} ({numbers.percent(plan.fraction)}) "
        f"{'was' if len(plan.removed) == 1 else 'were'} removed, chosen by {plan.method}: {plan.describe()}. "
        f"{numbers.count(dense.num_parameters)} parameters became {numbers.count(model.num_parameters)} "
        f"({numbers.change(dense.num_parameters, model.num_parameters)})."
    )


def _healing_sentences(cut: Cut) -> list[str]:
    healing = cut.healing
    if healing is None:
        return []
    tokens, time = numbers.count(healing.num_tokens), numbers.duration(healing.seconds)
    other = as_healed(healing)
    repair = cut.compensation
    if other and repair is not None and repair.applied:
        forms = tuple(healing.settings.get("forms") or ())
        if (healing.settings.get("augment") or 0.0, forms) == (repair.augment, tuple(repair.forms)):
            prompts = f", {form_share_of(healing):.0%} of the sequences as prompts" if forms else ""
            short = healing.settings.get("short") or 0.0
            windows = f", {short:.0%} of the steps in short windows" if short else ""
            other = f" (read in the same ways{prompts}{windows})"
    spent = f"on {tokens} {healing.unit} of {healing.data.source}{other} in {time}"
    held_out = "held-out images" if healing.unit == "places" else "held-out text"
    if healing.num_steps == 0:
        return ["There was no time for a single step of healing; the weights are as they were before it."]
    told = [answers_sentence(healing.answers)] if healing.answers is not None else []
    if healing.best_step == 0:
        weights = "its weights were thrown away" if healing.kept else "the weights are as they were before it"
        return [f"Healing {spent} made {held_out} no better; {weights}.", *told]
    before, after = healing.before, healing.after
    found = f"{numbers.number(before.loss)} -> {numbers.number(after.loss)} on {held_out}"
    return [f"It was healed by training {healing.weights}, {spent}: {healing.objective}, {found}.", *told]


def _language_sentences(record: RunRecord, cut: Cut) -> list[str]:
    place = record.cuts.index(cut)
    said = []
    for row in tables.comparison_rows(record):
        cell = row.cells[place]
        if row.metric not in tables.PERPLEXITIES or row.dense is None or cell is None:
            continue
        named, where = tables.PERPLEXITIES[row.metric], f" on {row.source}" if row.source else ""
        if not math.isfinite(cell.estimate.value):
            said.append(f"{named}{where} was {row.dense_text} and is no number now: the model's outputs are broken.")
            continue
        verb = "rose" if cell.estimate.value > row.dense.value else "fell"
        ratio = f" ({cell.ratio_text})" if cell.retention else ""
        said.append(f"{named}{where} {verb} from {row.dense_text} to {cell.estimate.text}{ratio}.")
    return said


def _retention_sentences(record: RunRecord, cut: Cut) -> list[str]:
    mean = mean_retention(record, cut)
    if mean is None:
        return []
    stricter = ""
    if mean.chance_corrected is not None:
        stricter = f", {numbers.percent(mean.chance_corrected)} once guessing is subtracted"
    tasks = "the one task" if mean.num_tasks == 1 else f"{mean.num_tasks} tasks"
    kept = f"Over {tasks} it keeps {mean.text} of the dense model's result{stricter}"
    # The paper speaks of a quarter of the layers: what a smaller share keeps is no match for that.
    compares = not is_as_loaded(cut) and cut.plan.fraction >= _NEAR_A_QUARTER
    return [f"{kept}; that is {_against_promise(mean)}." if compares else f"{kept}."]


def _against_promise(mean: MeanRetention) -> str:
    """Above or below only where two standard errors do not reach across: a small sample proves neither."""
    if mean.stderr is not None and abs(mean.ratio - PROMISE) < 2 * mean.stderr:
        return "too uncertain to tell from the 90 % that the AVSS paper reports (more items would tell)"
    return f"{'above' if mean.ratio >= PROMISE else 'below'} the 90 % that the AVSS paper reports"


def _comparison_sentences(comparison: Comparison) -> list[str]:
    """Which choice costs least by measurement, and which criterion does no better than looking at nothing."""
    unit = {"kl": "nats", "cosine": "in cosine", "squared": "in squared difference"}[comparison.damage.measure]
    told = [one for one in comparison.verdicts if one.kind != "baseline"]
    floor = [one.damage.distance for one in comparison.verdicts if one.kind == "baseline"]
    said = []
    if told:
        best = told[0]
        cost = numbers.with_error(best.damage.distance, best.damage.stderr)
        said.append(
            f"By measured damage, {best.method} chooses best here: removing its {_blocks(comparison.count)} "
            f"({describe_blocks(best.damage.removed)}) costs {cost} {unit}, before any repair."
        )
    poor = [one.method for one in told if floor and one.damage.distance >= min(floor)]
    if poor:
        said.append(f"No better than choosing without looking: {', '.join(poor)}.")
    return said


def _score_sentences(record: RunRecord) -> list[str]:
    if not record.scores:
        return [f"The {_blocks(record.model.num_blocks)} of the model were {_what_was_done(record)}; none was removed."]
    said = [f"{_blocks(record.model.num_blocks)} were scored; nothing was removed."]
    if record.comparison:
        return said + _comparison_sentences(record.comparison)
    for scores in record.scores[:4]:
        places = tables.ranks(scores)
        first = sorted((rank, block) for block, rank in enumerate(places) if rank is not None)[:4]
        if first:
            said.append(f"{scores.title} would remove first: {', '.join(str(block) for _, block in first)}.")
    return said


def _blocks(total: int) -> str:
    return f"{total} block" if total == 1 else f"{total} blocks"


def _is_answer(measurement: Measurement) -> bool:
    return measurement.higher_is_better and tables.kind_of(measurement) == "quality"
