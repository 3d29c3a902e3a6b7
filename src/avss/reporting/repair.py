"""What a repair did to a cut, in sentences and as a table."""

from collections.abc import Sequence

from avss.forms import SHARE
from avss.record import AnswerFit, Compensation, CutRepair, Healing
from avss.reporting import numbers

COMPENSATION_COLUMNS = ("cut", "method", "ridge", "error", "divergence", "kept")
"""Titles of `compensation_rows`."""

_MEASURES = {
    "kl": "KL divergence from the dense model (nats)",
    "cosine": "cosine distance from the dense model",
    "squared": "squared difference from the dense model's output",
}


def compensation_sentences(repair: Compensation) -> list[str]:
    """What came of a repair, in a sentence or two."""
    said = []
    if repair.applied:
        rounds = sum(step > 0 for step in repair.steps)
        by_hand = f", {rounds} round{'s' if rounds != 1 else ''} towards the dense predictions" if rounds else ""
        swept = f", {repair.num_swept} blocks fitted in a sweep" if repair.num_swept else ""
        short = f" ({repair.short:.0%} in short windows)" if repair.short else ""
        kept = sum(cut.applied for cut in repair.cuts)
        said.append(
            f"Repaired without training (`{repair.method}`: {kept} of {len(repair.cuts)} cuts solved for"
            f"{swept}{by_hand}; {len(repair.weights)} weights changed), fitted to {repair.fit_tokens:,} "
            f"{repair.unit}{short}: the {_MEASURES[repair.measure]} went from {numbers.number(repair.before)} to "
            f"{numbers.number(repair.after)} on {repair.judge_tokens:,} {repair.unit} that it had not seen"
            f"{rewritten(repair.augment, repair.forms)}."
        )
    if repair.answers is not None:
        said.append(answers_sentence(repair.answers))
    if repair.note:
        said.append(repair.note)
    return said


def rewritten(share: float, forms: Sequence[str] = (), form_share: float = SHARE, short: float = 0.0) -> str:
    """What is said behind texts of which some sequences were drawn to be read in another writing, or as prompts.

    Args:
        share: Of the sequences that are no prompts, those drawn for another writing.
        forms: Of the prompts.
        form_share: Of all sequences, those drawn for them.
        short: Of the steps of a training, those that read short windows.

    Example:
        >>> rewritten(0.5), rewritten(0.0)
        (' (50% of the sequences drawn for another writing)', '')
        >>> rewritten(0.0, ["Topic of {text}:"])
        ' (25% of the sequences drawn for the prompt `Topic of {text}:`)'
        >>> rewritten(0.0, short=0.5)
        ' (50% of the steps in short windows)'
    """
    parts = []
    if forms:
        named = ", ".join(f"`{form.replace(chr(10), ' / ')}`" for form in forms)
        parts.append(f"{form_share:.0%} of the sequences drawn for the prompt{'s' if len(forms) > 1 else ''} {named}")
    if share:
        parts.append(f"{share:.0%} of the {'rest' if forms else 'sequences'} drawn for another writing")
    if short:
        parts.append(f"{short:.0%} of the steps in short windows")
    return f" ({', '.join(parts)})" if parts else ""


def as_healed(healing: Healing) -> str:
    """The same about the text of a healing."""
    settings = healing.settings
    return rewritten(
        settings.get("augment") or 0.0,
        settings.get("forms") or (),
        form_share_of(healing),
        settings.get("short") or 0.0,
    )


def answers_sentence(answers: AnswerFit | None) -> str:
    """What is said of the last solve; empty where there was none."""
    if answers is None:
        return ""
    kept = "its last map was then solved for" if answers.kept else "a last solve was thrown away"
    return (
        f"For the choice among the answers of {answers.num_prompts} prompts of sentences by the dense model, {kept}: "
        f"KL {answers.before:.3g} -> {answers.after:.3g} nats on those held out, on held-out text "
        f"{answers.text_before:.4g} -> {answers.text_after:.4g}."
    )


def form_share_of(healing: Healing) -> float:
    """Share of a healing's sequences drawn for prompts; records before it was kept had a repair's."""
    return healing.settings.get("form_share", SHARE)


def compensation_rows(repair: Compensation) -> list[tuple[str, ...]]:
    """One row per run of removed blocks, as text; see `COMPENSATION_COLUMNS`."""
    return [
        (
            str(cut.start) if cut.stop - cut.start == 1 else f"{cut.start}-{cut.stop - 1}",
            cut.method or numbers.MISSING,
            _ridge(cut),
            _change(cut.error_before, cut.error_after),
            _change(cut.divergence_before, cut.divergence_after),
            "yes" if cut.applied else "no",
        )
        for cut in repair.cuts
    ]


def _ridge(cut: CutRepair) -> str:
    return f"{cut.ridge:g}" if numbers.is_number(cut.ridge) else numbers.MISSING


def _change(before: float | None, after: float | None) -> str:
    if not numbers.is_number(before):
        return numbers.MISSING
    return f"{numbers.number(before)} -> {numbers.number(after)}"
