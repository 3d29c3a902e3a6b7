"""The sentences a reader sees first."""

import math

import pytest

from avss.record import Measurement, Plan, Retention, Verification
from avss.reporting import page, tables, verdict


def test_the_mean_is_of_ratios_one_per_task_and_leaves_language_modelling_out(record):
    mean = verdict.mean_retention(record, record.cuts[0])
    ratios = (0.6275 / 0.6825, 0.7733 / 0.82)
    assert mean.num_tasks == 2
    assert mean.ratio == pytest.approx(sum(ratios) / 2, rel=1e-12)
    assert mean.stderr == pytest.approx(math.sqrt(2 * 0.021**2) / 2, rel=1e-12)
    corrected = (0.1275 / 0.1825, 0.2733 / 0.32)
    assert mean.chance_corrected == pytest.approx(sum(corrected) / 2, rel=1e-12)


def test_a_second_metric_of_a_task_does_not_count_twice(record):
    cut = record.cuts[0]
    norm = Retention(task="choice:piqa", metric="accuracy_norm", dense=0.7, value=0.1, ratio=0.1 / 0.7)
    measured = cut.measurements[2].model_copy(update={"metric": "accuracy_norm", "value": 0.1})
    both = cut.model_copy(update={"retention": (*cut.retention, norm), "measurements": (*cut.measurements, measured)})
    assert verdict.mean_retention(record, both) == verdict.mean_retention(record, cut)


def test_the_mean_has_no_error_where_a_task_has_none(record):
    cut = record.cuts[0]
    blind = tuple(entry.model_copy(update={"ratio_stderr": None}) for entry in cut.retention)
    assert verdict.mean_retention(record, cut.model_copy(update={"retention": blind})).stderr is None


def test_sentences_say_what_went_what_it_did_and_what_is_left(record):
    text = " ".join(verdict.sentences(record))
    assert "7 of 30 blocks (23.3 %) were removed, chosen by block-influence: 12-15, 17, 25-26." in text
    assert "rose from 36.07 ± 0.81 to 121.7 ± 3.9 (3.374 ± 0.067x)" in text
    assert "above the 90 %" in text
    assert "loaded again and verified" in text
    published = " ".join(verdict.sentences(record, record.cuts[1]))
    assert "below the 90 %" in published
    assert "nothing to verify" in published


@pytest.mark.parametrize(
    ("ratio", "stderr", "says"),
    [
        (0.93, 0.01, "above the 90 %"),
        (0.87, 0.01, "below the 90 %"),
        (0.93, 0.02, "too uncertain"),
        (0.87, None, "below"),
    ],
)
def test_the_promise_is_judged_only_where_two_standard_errors_allow_it(record, ratio, stderr, says):
    (entry,) = [one for one in record.cuts[0].retention if (one.task, one.metric) == ("choice:piqa", "accuracy")]
    entry = entry.model_copy(update={"ratio": ratio, "ratio_stderr": stderr})
    only = record.cuts[0].model_copy(update={"retention": (entry,)})
    assert says in " ".join(verdict.sentences(record.model_copy(update={"cuts": (only,)})))


def test_the_promise_is_not_compared_with_what_few_blocks_cost(record):
    """The paper speaks of a quarter of the layers."""
    few = record.cuts[0].model_copy(update={"plan": record.cuts[0].plan.model_copy(update={"removed": (12,)})})
    loaded = record.cuts[0].plan.model_copy(update={"removed": (), "method": "model"})
    for cut in (few, record.cuts[0].model_copy(update={"plan": loaded})):
        text = " ".join(verdict.sentences(record.model_copy(update={"cuts": (cut,)})))
        assert "it keeps" in text
        assert "90 %" not in text


def test_a_failed_verification_is_said_aloud(record):
    cut = record.cuts[0]
    proof = cut.verification.model_copy(update={"max_diff_bypass": 0.5})
    failed = cut.model_copy(update={"verification": proof})
    assert "FAILED" in verdict.verification_sentence(failed)
    assert [held for _, held, _ in verdict.verification_rows(proof)] == [True, True, False, True]


def test_a_saved_model_without_proof_is_not_called_verified(record):
    unproven = record.cuts[0].model_copy(update={"verification": None})
    assert verdict.verification_sentence(unproven) == "The saved model was NOT verified."


def test_without_cuts_the_scores_are_summed_up(bare_record):
    assert verdict.headline(bare_record) == "SmolLM2-135M-Instruct: 30 blocks scored, none removed"
    text = " ".join(verdict.sentences(bare_record))
    first = ", ".join(str(block) for block in bare_record.scores[0].ranking()[:4])
    assert f"Block Influence would remove first: {first}." in text


def test_a_model_of_which_nobody_knows_what_it_lacks_is_put_beside_the_other(record):
    cut = record.cuts[0]
    plan = Plan(num_blocks=22, removed=(), method="model", rule="as loaded")
    other = cut.model_copy(update={"plan": plan, "path": None, "verification": None})
    beside = record.model_copy(update={"cuts": (other,), "scores": ()})
    name = cut.model.source.rsplit("/", 1)[-1]
    count = cut.model.num_blocks
    assert verdict.headline(beside) == f"{name} ({count} blocks) beside SmolLM2-135M-Instruct (30 blocks)"
    text = " ".join(verdict.sentences(beside))
    assert "which blocks it lacks is not recorded" in text
    assert "No block was removed" not in text
    assert "measured as it was loaded" in text
    html = page.render_page(beside)
    assert 'id="map"' not in html
    assert f"30 → {count}" in html


def test_what_was_only_measured_was_not_scored(bare_record):
    measured = bare_record.model_copy(
        update={
            "scores": (),
            "dense": (
                Measurement(task="speed", metric="latency_ms", value=1.0, num_samples=1, higher_is_better=False),
            ),
        }
    )
    assert verdict.headline(measured).endswith("30 blocks measured as they are")
    assert "Nothing was scored" not in " ".join(verdict.sentences(measured))


def test_masked_perplexity_is_told_as_perplexity_is(record):
    def renamed(entries):
        return tuple(
            one.model_copy(update={"metric": f"masked_{one.metric}"}) if one.metric in ("perplexity", "loss") else one
            for one in entries
        )

    cut = record.cuts[0]
    masked = cut.model_copy(update={"measurements": renamed(cut.measurements), "retention": renamed(cut.retention)})
    changed = record.model_copy(update={"dense": renamed(record.dense), "cuts": (masked,)})
    assert any(text.startswith("Masked perplexity") for text in verdict.sentences(changed))
    kinds = {row.metric: row.kind for row in tables.comparison_rows(changed)}
    assert kinds["masked_perplexity"] == "language"
    assert "Masked perplexity" in page.render_page(changed)


@pytest.mark.parametrize(
    ("loads", "note", "sentence"),
    [
        (None, "", "byte by byte and was neither loaded nor run."),
        (None, "no room", "byte by byte and was neither loaded nor run: no room."),
        (True, "no room", "byte by byte and was found to load, but not run: no room."),
    ],
)
def test_a_copy_that_was_not_run_says_what_it_rests_on(record, loads, note, sentence):
    proof = Verification(reload_strict=loads, bytes_equal=True, outputs_compared=False, note=note)
    cut = record.cuts[0].model_copy(update={"verification": proof})
    assert verdict.verification_sentence(cut).endswith(sentence)
    rows = verdict.verification_rows(proof)
    assert all(held for _, held, _ in rows)
    assert len(rows) == (2 if loads else 1)
    text = page.render_page(record.model_copy(update={"cuts": (cut,)}))
    assert ("its bytes, not run" if loads else "its bytes, not loaded") in text
    assert "loaded again" not in text
