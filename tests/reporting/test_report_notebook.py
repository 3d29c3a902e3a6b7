"""What a notebook shows needs neither JavaScript nor a network, and runs no string of the record."""

import re
import xml.etree.ElementTree as ElementTree

from avss.record import ScoreTable
from avss.reporting import notebook


def drawings(fragment):
    return re.findall(r"<svg.*?</svg>", fragment, flags=re.DOTALL)


def test_scores_are_a_drawing_and_a_table(table):
    fragment = table._repr_html_()
    assert len(drawings(fragment)) == 1
    assert fragment.count("<tr>") == 31


def test_a_record_shows_its_verdict_and_its_figures(record):
    fragment = record._repr_html_()
    assert "7 of 30 blocks removed" in fragment
    assert "121.7 ± 3.9 (3.374 ± 0.067x)" in fragment
    assert len(drawings(fragment)) == 3


def test_fragments_are_well_formed_and_static(any_edge, any_record):
    fragments = [notebook.record_html(any_record)]
    if any_edge in ("with_nan", "hostile"):
        fragments.append(notebook.scores_html(ScoreTable(scores=any_record.scores)))
    for fragment in fragments:
        ElementTree.fromstring(fragment.replace("<br>", "<br/>"))
        outside = fragment
        for drawing in drawings(fragment):
            outside = outside.replace(drawing, "")
        assert "<script" not in fragment
        assert "<img" not in fragment
        assert "http" not in outside
