"""Rows hold the record's own numbers; the CSV reads back to them exactly."""

import csv
import io
import math

from avss.record import ScoreTable
from avss.reporting import tables


def test_csv_reads_back_to_the_exact_values(table):
    rows = list(csv.DictReader(io.StringIO(tables.scores_csv(table))))
    assert len(rows) == 30
    for scores in table.scores:
        assert [float(row[scores.criterion]) for row in rows] == list(scores.values)
        ordered = sorted(range(30), key=lambda block: scores.values[block])
        assert [int(row[f"{scores.criterion}.rank"]) for row in rows] == [ordered.index(block) for block in range(30)]
        if scores.without_first_token:
            found = [float(row[f"{scores.criterion}.without_first_token"]) for row in rows]
            assert found == list(scores.without_first_token)
    assert [float(row["avss.variance"]) for row in rows] == list(table["avss"].factors["variance"])


def test_csv_leaves_nan_empty_and_gives_it_no_rank(nan_record):
    rows = list(csv.DictReader(io.StringIO(tables.scores_csv(ScoreTable(scores=nan_record.scores)))))
    assert rows[0]["toy"] == ""
    assert rows[0]["toy.rank"] == ""
    assert float(rows[1]["toy"]) == math.inf
    assert sorted(int(row["toy.rank"]) for row in rows[1:]) == list(range(29))
    assert [int(row["toy.rank"]) for row in rows[2:]] == list(range(28))


def test_ranks_agree_with_the_record_where_all_scores_are_numbers(record):
    for scores in record.scores:
        assert tables.ranks(scores) == scores.ranks()


def test_score_rows_name_the_cuts_that_remove_a_block(record):
    rows = tables.score_rows(record)
    assert rows[13].removed_by == ("block-influence",)
    assert rows[0].removed_by == ("avss",)
    assert rows[20].removed_by == ()
    assert [row.cells[1].value for row in rows] == list(record.scores[1].values)


def test_every_comparison_figure_is_the_records(record):
    rows = {(row.task, row.metric): row for row in tables.comparison_rows(record)}
    for measurement in record.dense:
        estimate = rows[measurement.task, measurement.metric].dense
        assert (estimate.value, estimate.stderr) == (measurement.value, measurement.stderr)
    for place, cut in enumerate(record.cuts):
        for measurement in cut.measurements:
            estimate = rows[measurement.task, measurement.metric].cells[place].estimate
            assert (estimate.value, estimate.stderr) == (measurement.value, measurement.stderr)
        for entry in cut.retention:
            assert rows[entry.task, entry.metric].cells[place].retention == entry


def test_a_measurement_of_one_model_alone_leaves_the_others_out(record):
    (row,) = [row for row in tables.comparison_rows(record) if row.task == "divergence"]
    assert row.dense is None
    assert row.dense_text == "n/a"
    assert row.cells[1] is None


def test_texts_say_how_many_times_for_a_perplexity_and_what_share_for_an_accuracy(record):
    header, rows = tables.comparison_texts(record)
    texts = {row[0]: row for row in rows}
    assert header == ["task", "dense", "block-influence", "avss"]
    assert texts["perplexity"][1:] == ["36.07 ± 0.81", "121.7 ± 3.9 (3.374 ± 0.067x)", "71,418 ± 1,204 (1,980 ± 40x)"]
    assert texts["choice:piqa, accuracy"][2] == "0.627 ± 0.024 (91.9 ± 2.1 %)"
    assert "speed, prefill" not in texts


def test_cut_rows_say_what_is_gone_and_what_is_saved(record):
    first, _ = tables.cut_rows(record)
    assert first.cells == {
        "cut": "block-influence",
        "removed": "12-15, 17, 25-26",
        "blocks": "30 to 23",
        "parameters": "110 M (-18.4 %)",
        "checkpoint": "219 MB (-18.4 %)",
        "speed, prefill": "6,540 ± 109 tokens/s (+27.7 %)",
    }


def test_labels_are_unique_even_for_cuts_by_one_method(record):
    cut = record.cuts[0]
    fewer = cut.model_copy(update={"plan": cut.plan.model_copy(update={"removed": (12,)})})
    assert tables.cut_labels((cut, record.cuts[1])) == ("block-influence", "avss")
    assert tables.cut_labels((cut, fewer)) == ("block-influence-7", "block-influence-1")
    assert len(set(tables.cut_labels((cut, cut, fewer)))) == 3


def test_nothing_scored_gives_no_rows(bare_record):
    assert tables.score_rows(bare_record.model_copy(update={"scores": ()})) == []
    assert tables.comparison_rows(bare_record) == []
    assert tables.cut_rows(bare_record) == []
