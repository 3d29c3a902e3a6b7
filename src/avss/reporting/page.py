"""A record as one HTML page that needs nothing else: no server, no network, no second file.

Charts are drawn twice: as SVG inside the page, for print, mail and readers without JavaScript, and by Vega in the
browser, which puts tooltips and choices in their place. A content security policy forbids the page to load anything.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from avss.record import Cut, Healing, RunRecord, ScoreTable, Verification
from avss.reporting import charts, numbers, repair, tables, theme, verdict
from avss.reporting.filters import index_runs, safe_url

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)
_LONGEST_VALUE = 160


def render_page(record: RunRecord) -> str:
    """The report of a run as one self-contained HTML document.

    It opens with what was found, in sentences, and ends with how to repeat it; the record itself is inside, as a
    download. Every string of the record is escaped: a model or a text may be called anything.
    """
    drawn = {name: chart.to_dict() for name, chart in charts.figures(record).items()}
    return _TEMPLATES.get_template("template.html.jinja").render(
        record=record,
        policy=_POLICY,
        headline=verdict.headline(record),
        sentences=verdict.sentences(record),
        tiles=_tiles(record),
        comparison=tables.comparison_rows(record),
        sizes=_size_rows(record),
        means=[verdict.mean_retention(record, cut) for cut in record.cuts],
        figures=[(name, Markup(theme.inline_svg(spec)), charts.CAPTIONS.get(name)) for name, spec in drawn.items()],
        specs=_script_json(drawn),
        dark=_script_json({"config": theme.DARK, "colors": theme.DARK_COLORS}),
        cuts=list(zip(tables.cut_labels(record.cuts), record.cuts, strict=True)),
        score_rows=tables.score_rows(record),
        findings=_findings(record),
        samples=_samples(record),
        facts=_facts(record),
        javascript=Markup(theme.javascript()) if drawn else "",
        record_link=_data_link("application/json", record.to_json()),
        csv_link=_data_link("text/csv", tables.scores_csv(ScoreTable(scores=record.scores))) if record.scores else None,
    )


def _findings(record: RunRecord) -> list[tuple[str, str, str, list[str], list[list[str]]]]:
    """Tables that a record may hold, as (anchor, title, how to read it, column titles, rows)."""
    found: list[tuple[str, str, str, tuple[list[str], list[list[str]]]]] = []
    if record.search is not None:
        words = (
            "The best set found of every size, measured without any repair, ± one standard error. "
            f"{tables.search_effort(record.search)} `avss prune --from-search` cuts another of these sizes without "
            "a new search."
        )
        found.append(("search", "Search", words, tables.search_texts(record.search)))
    if record.comparison:
        words = (
            "What each criterion is worth on this model: the measured damage of the blocks it would remove, together "
            "and before any repair. Agreement: Spearman's correlation of its scores with the damage of leaving out "
            "each block alone; overlap: of its lowest blocks with the cheapest; depth: correlation of its scores with "
            "the index. Damage was measured on other sequences than the scores."
        )
        found.append(("verdicts", "Criteria against measured damage", words, tables.verdict_texts(record.comparison)))
    if record.stability:
        words = (
            "Whether the text suffices to choose. The choice is settled where the last block that goes and the first "
            "that stays are two standard errors apart; halves of the text share no sequence."
        )
        found.append(("stability", "How sure is the choice?", words, tables.stability_texts(record.stability)))
    if record.study:
        words = "Scores from other draws, amounts and kinds of text, against the largest draw of the first text."
        found.append(("study", "Stability over seeds, amounts and texts", words, tables.study_texts(record.study)))
    if record.sites:
        words = (
            "Inside the blocks, for analysis: what each part writes (before any norm or scale of the architecture), "
            "and how much it turns and changes the residual stream."
        )
        found.append(("sites", "Sub-layers", words, tables.site_texts(record.sites)))
    if record.damage:
        words = "What leaving out each block costs, measured. Rank 0 is the cheapest to lose."
        found.append(("damage", "Measured damage of each block", words, tables.damage_texts(record.damage)))
    return [(anchor, title, words, *texts) for anchor, title, words, texts in found]


def brief(value: Any) -> str:
    """A config value as JSON on one line, shortened with the number of its entries where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= _LONGEST_VALUE:
        return text
    entries = f" ({len(value)} entries)" if isinstance(value, Sequence | Mapping) and not isinstance(value, str) else ""
    return f"{text[: _LONGEST_VALUE - 20]} …{entries}"


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """The few figures to see first, as (label, figure, remark)."""
    model = record.model
    if not record.cuts:
        return [
            ("Blocks", str(model.num_blocks), model.architecture),
            ("Parameters", numbers.count(model.num_parameters), model.dtype),
            ("Criteria", str(len(record.scores)), "higher score: keep"),
        ]
    cut = record.cuts[0]
    after = cut.model
    tiles = [
        ("Blocks", f"{model.num_blocks} → {after.num_blocks}", numbers.change(model.num_blocks, after.num_blocks)),
        (
            "Parameters",
            f"{numbers.count(model.num_parameters)} → {numbers.count(after.num_parameters)}",
            numbers.change(model.num_parameters, after.num_parameters),
        ),
    ]
    for row in tables.comparison_rows(record):
        if row.metric in tables.PERPLEXITIES and row.dense and row.cells[0]:
            after_text = numbers.number(row.cells[0].estimate.value)
            tiles.append(
                (
                    tables.PERPLEXITIES[row.metric],
                    f"{numbers.number(row.dense.value)} → {after_text}",
                    row.cells[0].ratio_text,
                )
            )
            break
    mean = verdict.mean_retention(record, cut)
    if mean:
        tasks = "one task" if mean.num_tasks == 1 else f"mean of {mean.num_tasks} tasks"
        tiles.append(("Retention", mean.text, tasks))
    proof = cut.verification
    state = "none" if proof is None else "passed" if proof.passed else "FAILED"
    missing = "measured in memory" if cut.path is None else "saved, not verified"
    missing = "measured as loaded" if verdict.is_as_loaded(cut) else missing
    tiles.append(("Verification", state, _how_proven(proof) if proof else missing))
    return tiles


def _how_proven(proof: Verification) -> str:
    if proof.outputs_compared:
        return "loaded again, compared"
    return "its bytes, not run" if proof.reload_strict else "its bytes, not loaded"


def _size_rows(record: RunRecord) -> list[tuple[str, str, list[tuple[str, str]]]]:
    dense, models = record.model, [cut.model for cut in record.cuts]
    return [
        (title, text(getattr(dense, name)), [
            (text(getattr(model, name)), numbers.change(getattr(dense, name), getattr(model, name)))
            for model in models
        ])
        for title, name, text in (
            ("blocks", "num_blocks", str),
            ("parameters", "num_parameters", numbers.count),
            ("checkpoint", "checkpoint_bytes", numbers.size),
        )
    ]  # fmt: skip


def _samples(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Per prompt, what each model wrote: (prompt, [(model, text)])."""
    written = [("dense", record.samples)]
    written += [(label, cut.samples) for label, cut in zip(tables.cut_labels(record.cuts), record.cuts, strict=True)]
    return [
        (prompt, [(label, texts[place]) for label, texts in written if place < len(texts)])
        for place, prompt in enumerate(record.prompts)
    ]


def _facts(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """How it was done, in groups of (name, value)."""
    model, data = record.model, record.data
    groups = [
        ("Model", [
            ("source", model.source + (f" @ {model.revision}" if model.revision else "")),
            ("architecture", f"{model.architecture} ({model.model_type}, {model.head})"),
            ("block stack", f"{model.stack}, {model.num_blocks} blocks, width {model.hidden_size:,}"),
            ("parameters", f"{model.num_parameters:,}, of them {model.num_block_parameters:,} in the stack"),
            ("weights", f"{model.dtype}, {numbers.size(model.checkpoint_bytes)}"),
            ("computed in", f"{model.compute_dtype} on {model.device}"),
            ("fingerprint", model.fingerprint),
        ]),
    ]  # fmt: skip
    if data:
        layout = {
            "packed": "one stream cut into equal windows",
            "padded": "one text a row, padding not counted",
            "images": "all of one size, as the model's image processor makes them",
        }
        groups.append(("Calibration images" if data.layout == "images" else "Calibration text", [
            ("source", data.source + (f", column {data.column}" if data.column else "")),
            ("amount", data.describe()),
            ("layout", f"{data.layout}: {layout[data.layout]}"),
            ("batch size, seed", f"{data.batch_size}, {data.seed}"),
            ("content hash", data.content_hash),
        ]))  # fmt: skip
    if record.cuts and record.cuts[0].healing:
        groups.append(("Healing", _healing_facts(record.cuts[0].healing)))
    groups.append(("Versions", [*record.versions.items(), ("recorded", record.created)]))
    if record.seconds:
        spent = [(stage, numbers.duration(seconds)) for stage, seconds in record.seconds.items()]
        groups.append(("Time", [*spent, ("total", numbers.duration(sum(record.seconds.values())))]))
    return groups


def _healing_facts(healing: Healing) -> list[tuple[str, str]]:
    data, held_out = healing.data, healing.held_out
    return [
        ("objective", healing.objective),
        ("trained", f"{healing.weights}; {healing.num_trained:,} parameters"),
        ("trained on", f"{data.source}, {data.num_sequences:,} {data.unit} of up to {data.seq_len:,} {healing.unit}"),
        ("held out", f"{held_out.num_sequences:,} {held_out.unit}, {held_out.num_tokens:,} {healing.unit}"),
        ("done", f"{healing.num_tokens:,} {healing.unit} in {healing.num_steps:,} steps, "
                 f"{numbers.duration(healing.seconds)}"),
        ("stopped by", healing.stopped),
        ("held-out objective", f"{numbers.number(healing.before.loss)} → {numbers.number(healing.after.loss)}, "
                               f"kept: step {healing.best_step:,}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in sorted(healing.settings.items()))),
    ]  # fmt: skip


def inline_code(text: str) -> Markup:
    """The text escaped, with what stands in backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return Markup.escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


def _script_json(value: Any) -> Markup:
    """JSON that can stand inside a script element: no `<`, `>` or `&`, and no line separator of JavaScript's."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)


def _data_link(media_type: str, text: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(text.encode()).decode()}"


def _failed(cuts: Iterable[Cut]) -> bool:
    return any(cut.verification is not None and not cut.verification.passed for cut in cuts)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("avss.reporting", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "number": numbers.number,
    "percent": numbers.percent,
    "brief": brief,
    "inline_code": inline_code,
    "safe_url": safe_url,
    "index_runs": index_runs,
    "checks": verdict.verification_rows,
    "verification": verdict.verification_sentence,
    "repair_sentences": repair.compensation_sentences,
    "repair_rows": repair.compensation_rows,
    "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str),
}
_TEMPLATES.tests |= {"failed": _failed}
