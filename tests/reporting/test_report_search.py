"""A search in every form it is shown in: chart, table, page, notebook, CSV."""

import csv
import io
import math

import pytest

from avss.errors import InvalidPlanError
from avss.record import RunRecord, SearchResult
from avss.reporting import charts, page, tables
from avss.reporting.damage_charts import search_chart
from tests.reporting.conftest import make_record, search_result


@pytest.fixture(scope="module")
def search():
    return search_result()


def test_the_chart_holds_the_curve(search):
    spec = search_chart(search).to_dict()
    rows = spec["datasets"]["search"]
    assert [row["size"] for row in rows] == list(range(1, 9))
    assert [row["value"] for row in rows[:-1]] == [point.distance for point in search.points[:-1]]
    assert rows[2]["upper"] - rows[2]["value"] == pytest.approx(2 * search.points[2].stderr)
    assert rows[2]["blocks"] == "16-18"
    # The set that was never measured has no dot.
    assert rows[-1]["value"] is None


@pytest.mark.parametrize("changes", [{}, {"measure": "cosine", "dense_loss": None}, {"objective": "accuracy"}])
def test_every_kind_of_search_becomes_a_picture(changes, tmp_path):
    record = make_record().model_copy(update={"search": search_result(**changes)})
    assert "search" in charts.figures(record)
    files = charts.save_figures(record, tmp_path)
    assert "search.svg" in [file.name for file in files]
    header, rows = tables.search_texts(record.search)
    assert all(len(row) == len(header) for row in rows)
    assert ("perplexity" in header) == (record.search.dense_loss is not None)


def test_the_table_tells_sizes_blocks_and_how(search):
    header, rows = tables.search_texts(search)
    assert header == ["size", "blocks", "KL, nats", "perplexity", "found by"]
    assert rows[6][:2] == ["7", "12-18"]
    assert rows[6][-1] == "window"
    assert rows[7][2] == "n/a"
    effort = tables.search_effort(search)
    assert "33.3 passes" in effort
    assert "168" in effort
    assert "ended it early" in effort


def test_the_csv_reads_back_exactly(search):
    rows = list(csv.DictReader(io.StringIO(tables.search_csv(search))))
    assert [float(row["distance"]) for row in rows[:-1]] == [point.distance for point in search.points[:-1]]
    assert rows[-1]["distance"] == ""
    assert rows[6]["blocks"] == "12 13 14 15 16 17 18"


def test_page_and_notebook_show_it(search):
    record = make_record().model_copy(update={"search": search})
    html = page.render_page(record)
    assert 'id="search"' in html
    assert "12-18" in html
    assert "The best sets of 1 to 8 of 30 blocks" in search._repr_html_()
    assert "found by greedy search" in record._repr_html_()
    assert 'id="search"' not in page.render_page(make_record())


def test_a_search_reads_back_what_was_written(search):
    again = SearchResult.model_validate_json(search.to_json())
    assert again.points[:-1] == search.points[:-1]
    assert math.isnan(again.points[-1].distance)
    record = make_record().model_copy(update={"search": search})
    assert RunRecord.model_validate_json(record.to_json()).search.points[:-1] == search.points[:-1]


def test_every_size_is_a_plan(search):
    assert search.plan(7).removed == tuple(range(12, 19))
    assert "window" in search.plan(7).rule
    assert "protected: 0, 29" in search.plan(7).rule
    assert "not measured" in search.plan(8).rule
    for count in (0, 9):
        with pytest.raises(InvalidPlanError, match="sets of 1 to 8"):
            search.plan(count)


def test_a_curve_with_a_gap_is_refused(search):
    with pytest.raises(InvalidPlanError, match="every size"):
        search_result(points=search.points[1:])
