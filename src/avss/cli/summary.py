"""The readable end of a run."""

from avss.cli.show import show_plan, show_results, show_scores, show_search, show_verification, show_warnings
from avss.record import RunRecord, ScoreTable


def show_record(record: RunRecord) -> None:
    """Scores with the blocks of each cut marked, plans, proof, results and warnings, as far as the record has them."""
    # The states of one cut (raw, repaired, healed) share its plan.
    plans = {cut.plan.removed: cut.plan for cut in record.cuts if cut.plan.removed}
    if record.scores:
        show_scores(ScoreTable(scores=record.scores), plans=tuple(plans.values()))
    if record.search is not None:
        show_search(record.search)
    for cut in record.cuts:
        if plans.pop(cut.plan.removed, None) is not None:
            show_plan(cut.plan)
        if cut.verification is not None:
            show_verification(cut.verification)
    show_results(record)
    show_warnings(record.warnings)
