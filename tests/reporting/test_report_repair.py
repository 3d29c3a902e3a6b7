"""A repair told in sentences, on the card and on the page."""

import pytest

from avss.record import AnswerFit, Compensation, CutRepair, Healing
from avss.reporting.card import render_card
from avss.reporting.page import render_page
from avss.reporting.repair import (
    COMPENSATION_COLUMNS,
    answers_sentence,
    as_healed,
    compensation_rows,
    compensation_sentences,
)

HELPED = CutRepair(
    start=12, stop=19, method="refit", ridge=0.01, error_before=0.61, error_after=0.31, divergence_before=1.04,
    divergence_after=0.64, applied=True,
)  # fmt: skip
SKIPPED = CutRepair(start=0, stop=1, note="There is no block before the cut that could make up for it.")


@pytest.fixture
def repair() -> Compensation:
    return Compensation(
        method="auto", before=1.04, after=0.64, fit_tokens=24576, choose_tokens=4096, judge_tokens=4096,
        cuts=(SKIPPED, HELPED), steps=(0.1, 0.0), weights=("model.layers.10.mlp.down_proj.weight",),
    )  # fmt: skip


def test_the_sentence_holds_both_figures_and_the_tokens(repair):
    (sentence,) = compensation_sentences(repair)
    assert "1 of 2 cuts" in sentence
    assert "from 1.040 to 0.6400" in sentence
    assert "24,576 tokens" in sentence
    assert "1 round towards" in sentence


def test_a_rejected_repair_says_why(repair):
    rejected = repair.model_copy(update={"weights": (), "note": "The repair was thrown away: it did harm."})
    assert compensation_sentences(rejected) == ["The repair was thrown away: it did harm."]


def test_rows_have_one_cell_a_column(repair):
    rows = compensation_rows(repair)
    assert all(len(row) == len(COMPENSATION_COLUMNS) for row in rows)
    assert rows[0][0] == "0"
    assert rows[1] == ("12-18", "refit", "0.01", "0.6100 -> 0.3100", "1.040 -> 0.6400", "yes")


def test_page_and_card_tell_it_and_the_raw_cut_does_not(record, repair):
    raw = render_page(record)
    assert 'id="repair"' not in raw
    cut = record.cuts[0].model_copy(update={"compensation": repair})
    repaired = record.model_copy(update={"cuts": (cut, *record.cuts[1:])})
    page, card = render_page(repaired), render_card(repaired, cut)
    assert 'id="repair"' in page
    assert "12-18" in page
    assert page.count("(<code>auto</code>: 1 of 2 cuts") == 2  # in the opening words and in its section
    assert "from 1.040 to 0.6400" in page
    assert "from 1.040 to 0.6400" in card
    assert "they are not the base model's" in card
    assert "No weight was trained" not in card


@pytest.mark.parametrize(("settings", "share"), [({}, "25%"), ({"form_share": 0.15}, "15%")])
def test_a_record_from_before_the_share_was_kept_is_told_too(settings, share):
    healing = Healing.model_construct(settings={"augment": 0.5, "forms": ["Topic of {text}:"], **settings})
    assert as_healed(healing).startswith(f" ({share} of the sequences drawn for the prompt `Topic of {{text}}:`")


def test_short_windows_of_healing_are_told():
    healing = Healing.model_construct(settings={"augment": 0.5, "short": 0.25})
    assert as_healed(healing) == " (50% of the sequences drawn for another writing, 25% of the steps in short windows)"


@pytest.mark.parametrize("kept", [True, False])
def test_the_last_solve_is_told_with_what_became_of_it(kept):
    fit = AnswerFit(num_prompts=512, before=0.066, after=0.0463, text_before=1.3765, text_after=1.3768, kept=kept)
    said = answers_sentence(fit)
    for part in ("512 prompts", "0.066 -> 0.0463", "1.377"):
        assert part in said
    assert ("solved for" in said) == kept
    assert ("thrown away" in said) == (not kept)
    assert answers_sentence(None) == ""
