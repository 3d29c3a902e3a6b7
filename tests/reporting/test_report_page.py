"""One page that loads nothing, hides nothing and runs no string of the record."""

import base64
import html.parser
import json
import math
import re

import pytest

from avss.record import RunRecord
from avss.reporting import filters, page


class Reader(html.parser.HTMLParser):
    """Elements and the text of scripts, as a browser would find them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.words = [], [], []
        self._in = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._in != "style":
            self.words.append(data)

    def handle_endtag(self, tag):
        self._in = None

    def script(self, name):
        return next(text for attrs, text in self.scripts if attrs.get("id") == name)

    def download(self, name):
        link = next(attrs["href"] for tag, attrs in self.elements if tag == "a" and attrs.get("download") == name)
        return base64.b64decode(link.split(",", 1)[1]).decode()


@pytest.fixture(scope="module")
def rendered(page_of):
    return page_of("realistic")


@pytest.fixture(scope="module")
def reader(rendered):
    return Reader(rendered)


def test_the_page_loads_nothing(page_of, any_edge):
    found = Reader(page_of(any_edge))
    for tag, attrs in found.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "src" not in attrs
        if tag != "a" and "href" in attrs:
            assert attrs["href"].startswith("#")
    policy = next(attrs["content"] for tag, attrs in found.elements if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_the_script_is_in_the_page_once(rendered):
    assert rendered.count("window.vegaEmbed") == 1 + rendered.count("if (window.vegaEmbed)")
    assert "<!--" not in rendered.split("<body>")[1]


def test_the_record_can_be_taken_out_again(reader, record):
    assert RunRecord.model_validate_json(reader.download("record.json")) == record
    assert reader.download("scores.csv").startswith("block,block-influence,")


def test_the_chart_specs_hold_the_records_numbers(reader, record):
    specs = json.loads(reader.script("figure-specs"))
    assert list(specs) == ["language", "retention", "scores", "ranks", "cuts", "cost"]
    assert [row["score"] for row in specs["scores"]["datasets"]["scores-0"]] == list(record.scores[0].values)
    drawn = [attrs["data-figure"] for tag, attrs in reader.elements if "data-figure" in attrs]
    assert drawn == list(specs)


def test_the_page_opens_with_the_verdict_and_keeps_the_order(rendered):
    order = [
        "7 of 30 blocks removed from SmolLM2-135M-Instruct",
        "36.07 ± 0.81 to 121.7 ± 3.9",
        'id="warnings"',
        'id="comparison"',
        'id="charts"',
        'id="map"',
        'id="blocks"',
        'id="changes"',
        'id="verification"',
        'id="samples"',
        'id="method"',
        'id="citations"',
        'id="downloads"',
    ]
    body = rendered.split("<body>")[1]
    places = [body.index(piece) for piece in order]
    assert places == sorted(places)


def test_the_page_says_how_to_repeat_it(reader, record):
    words = "".join(reader.words)
    for fact in (record.command, record.data.content_hash, record.model.fingerprint, "2.13.0", "3 min 32 s"):
        assert fact in words
    links = [attrs["href"] for tag, attrs in reader.elements if tag == "a"]
    assert "https://arxiv.org/abs/2403.03853" in links


def test_no_string_of_the_record_becomes_markup(page_of, hostile_text):
    text = page_of("hostile")
    found = Reader(text)
    assert "<img src=x" not in text
    assert '<script>alert("x")' not in text
    assert len(found.scripts) == 4
    assert not any(attrs.get("href", "").startswith("javascript:") for _, attrs in found.elements)
    assert hostile_text in " ".join("".join(found.words).split())
    assert RunRecord.model_validate_json(found.download("record.json")).command == hostile_text
    json.loads(found.script("figure-specs"))


def test_a_failed_verification_stands_among_the_warnings(record):
    cut = record.cuts[0]
    proof = cut.verification.model_copy(update={"reload_strict": False})
    failed = record.model_copy(update={"cuts": (cut.model_copy(update={"verification": proof}),), "scores": ()})
    text = page.render_page(failed)
    assert "A saved model failed its verification" in text
    assert "✗ failed" in text


def test_without_cuts_there_are_only_scores(page_of):
    text = page_of("without_cuts")
    assert 'id="blocks"' in text
    for section in ("comparison", "map", "verification", "samples"):
        assert f'id="{section}"' not in text


def test_nan_reads_as_missing(page_of):
    body = re.sub(r"<script.*?</script>", "", page_of("with_nan"), flags=re.DOTALL)
    assert "n/a" in body
    assert ">nan<" not in body


def test_index_runs_are_the_index_map(record):
    for cut in record.cuts:
        listed = {}
        for old, new in filters.index_runs(cut.plan):
            olds = [int(part) for part in old.split("-")]
            if new != "removed":
                news = [int(part) for part in new.split("-")]
                listed |= dict(zip(range(olds[0], olds[-1] + 1), range(news[0], news[-1] + 1), strict=True))
        assert listed == cut.plan.index_map


def test_long_config_values_are_shortened_with_their_length():
    assert page.brief([1, 2]) == "[1, 2]"
    assert page.brief(["full_attention"] * 30).endswith("… (30 entries)")
    assert page.brief(math.pi) == "3.141592653589793"


def test_links_are_web_addresses_only():
    assert filters.safe_url("https://arxiv.org/abs/2411.02117") == "https://arxiv.org/abs/2411.02117"
    assert filters.safe_url("javascript:alert(1)") is None
    assert filters.safe_url(None) is None
