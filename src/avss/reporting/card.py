"""The README.md of a smaller model: what it is, how it was made, what it costs, and how far to trust it."""

import json
import re
from typing import Any

import jinja2

from avss.record import Cut, RunRecord
from avss.reporting import numbers, tables, verdict
from avss.reporting.filters import index_runs, safe_url
from avss.reporting.repair import answers_sentence, as_healed, rewritten

_CLASSES = {
    "causal": ("AutoModelForCausalLM", "text-generation"),
    "masked": ("AutoModelForMaskedLM", "fill-mask"),
    "classifier": ("AutoModelForSequenceClassification", "text-classification"),
    "encoder": ("AutoModel", "feature-extraction"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "image-classifier": ("AutoModelForImageClassification", "image-classification"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

BIBTEX = """@misc{song2024avss,
    title={AVSS: Layer Importance Evaluation in Large Language Models via Activation Variance-Sparsity Analysis},
    author={Zichen Song and Yuxin Wu and Sitan Huang and Zhongfeng Kang},
    year={2024},
    eprint={2411.02117},
    archivePrefix={arXiv},
    primaryClass={cs.CL}
}"""
"""The paper that the tool is named for."""


def render_card(record: RunRecord, cut: Cut) -> str:
    """The model card of one cut, as Markdown with the YAML front matter that hubs read.

    Args:
        record: The run.
        cut: One of its cuts.

    Raises:
        ValueError: The cut is not one of the record's.
    """
    place = record.cuts.index(cut)
    _, rows = tables.comparison_texts(record)
    auto_class, _ = _CLASSES.get(cut.model.head, _CLASSES["encoder"])
    return _TEMPLATES.get_template("card.md.jinja").render(
        front_matter=_front_matter(record, cut),
        record=record,
        cut=cut,
        name=record.model.source.rsplit("/", 1)[-1],
        sentences=verdict.sentences(record, cut),
        criterion=next((scores for scores in record.scores if scores.criterion == cut.plan.method), None),
        auto_class=auto_class,
        reader="AutoImageProcessor" if _reads_images(record, cut) else "AutoTokenizer",
        rows=[[row[0], row[1], row[place + 2]] for row in rows],
        retention=[
            (row, cell)
            for row in tables.comparison_rows(record)
            if row.kind != "cost" and (cell := row.cells[place]) is not None and cell.retention is not None
        ],
        mean=verdict.mean_retention(record, cut),
        costs=tables.cut_rows(record)[place],
        bibtex=BIBTEX,
    )


def _reads_images(record: RunRecord, cut: Cut) -> bool:
    seen = record.data is not None and record.data.layout == "images"
    return seen or cut.model.head == "image-classifier"


def _front_matter(record: RunRecord, cut: Cut) -> str:
    """YAML by way of JSON, which is YAML: no string of the record can break out of it."""
    fields: dict[str, Any] = {"library_name": "transformers"}
    if _HUB_ID.fullmatch(record.model.source):
        fields["base_model"] = record.model.source
    fields["pipeline_tag"] = _CLASSES.get(cut.model.head, _CLASSES["encoder"])[1]
    fields["tags"] = ["avss", "depth-pruning", "pruned"]
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())


def _plain(text: object) -> str:
    """A string of the record inside Markdown prose or a table cell: on one line, and nothing in it is markup."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def _prose(text: object) -> str:
    """As `_plain`, but `code` in backticks stays code."""
    parts = re.split(r"(`[^`<>]+`)", " ".join(str(text).split()))
    return "".join(part if place % 2 else re.sub(r"([\\`*\[\]<>|])", r"\\\1", part) for place, part in enumerate(parts))


def _code(text: object) -> str:
    """A string of the record as a code span, whose ticks outnumber any inside."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("avss.reporting", "."),
    autoescape=False,  # Markdown: `plain` and `prose` escape what comes from the record
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {
    "plain": _plain,
    "answers_sentence": answers_sentence,
    "as_healed": as_healed,
    "rewritten": rewritten,
    "prose": _prose,
    "code": _code,
    "fenced": _fenced,
    "safe_url": safe_url,
    "index_runs": index_runs,
    "checks": verdict.verification_rows,
    "size": numbers.size,
    "percent": numbers.percent,
}
