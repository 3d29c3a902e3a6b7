"""Figures: which ones there are, that they become pictures, and that their data is the record's."""

import json
import math
import struct
import xml.etree.ElementTree as ElementTree

from avss.reporting import charts, theme
from avss.reporting.block_charts import cuts_chart, ranks_chart, scores_chart

PNG = b"\x89PNG\r\n\x1a\n"


def png_size(data):
    return struct.unpack(">II", data[16:24])


def test_every_figure_becomes_a_picture(any_edge, any_record, specs_of, tmp_path):
    drawn = specs_of(any_edge)
    files = charts.save_figures(any_record, tmp_path / "figures")
    assert [file.name for file in files] == [f"{name}.{end}" for name in drawn for end in ("png", "svg")]
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".png":
            assert data.startswith(PNG)
            width, height = png_size(data)
            assert width <= 2 * 1150
            assert height > 100
        else:
            ElementTree.fromstring(data)


def test_only_figures_with_data_are_drawn(specs_of, bare_record):
    assert list(specs_of("realistic")) == ["language", "retention", "scores", "ranks", "cuts", "cost"]
    assert list(specs_of("without_cuts")) == ["scores", "ranks"]
    assert list(specs_of("with_nan")) == ["scores", "cuts", "cost"]
    assert charts.figures(bare_record.model_copy(update={"scores": ()})) == {}


def test_score_bars_hold_the_scores(record, specs_of):
    spec = specs_of("realistic")["scores"]
    for place, scores in enumerate(record.scores):
        rows = spec["datasets"][f"scores-{place}"]
        assert [row["score"] for row in rows] == list(scores.values)
        assert [row["rank"] for row in rows] == list(scores.ranks())
        assert {row["block"] for row in rows if "|avss|" in row["removed"]} == set(range(7))


def test_a_span_beyond_one_scale_is_drawn_on_a_log_scale(specs_of):
    drawn = {name: json.dumps(spec) for name, spec in specs_of("realistic").items()}
    assert "AVSS (log scale)" in drawn["scores"]
    assert "Block Influence (log scale)" not in drawn["scores"]
    assert "perplexity (log scale)" in drawn["language"]


def test_a_score_that_is_not_a_number_is_shown_as_unknown(nan_record):
    (scores,) = nan_record.scores
    spec = scores_chart([scores]).to_dict()
    rows = spec["datasets"]["scores-0"]
    assert [row["score"] is None for row in rows] == [not math.isfinite(value) for value in scores.values]
    assert theme.svg(spec).count(">?<") == 2


def test_a_hundred_blocks_and_twenty_criteria_fit_a_page(largest_record):
    for chart in (
        scores_chart(largest_record.scores[:3], largest_record.cuts),
        ranks_chart(largest_record.scores, largest_record.cuts),
        cuts_chart(largest_record.cuts),
    ):
        picture = theme.png(theme.svg(chart.to_dict()), scale=1)
        assert picture.startswith(PNG)
        assert png_size(picture)[0] <= 940


def test_a_drawing_inside_a_page_has_ids_of_its_own(specs_of):
    one, two = (theme.inline_svg(specs_of("realistic")[name]) for name in ("language", "retention"))
    ids = [{piece.split('"')[0] for piece in drawing.split(' id="')[1:]} for drawing in (one, two)]
    assert not ids[0] & ids[1]
    ElementTree.fromstring(one)
