r"""Is the promise kept? A quarter of the blocks gone: raw, repaired and healed, beside the dense model, from one run.

    python benchmarks/quality.py --data wikipedia.txt --out quality \
        --perplexity wikitext.txt --choice piqa.jsonl --choice socialiqa.jsonl --sentiment sst2.csv \
        [--heal 30m] [--blocks 12-18,26] [--compare block-influence] [--limit 500] [--set learning_rate=5e-4] ...

One `avss.run` chooses the blocks by search on the calibration text (or as `--choose` or `--blocks` say), repairs
without training, heals on that text, and measures every stage on the evaluation data: the same items for all models.
The table ends with what the promise is counted by: the ratio of perplexities, the mean over tasks of accuracy kept, and
the mean of what is kept above chance, over the tasks where the dense model is ten points or more above it. Nothing is
chosen by the evaluation data, but a quarter of the repair's windows of calibration text, 15 % of healing's, are read as
sentences in the prompts of these tasks, and finalists of the search are judged on them too (`--form none`: as text).
With `--from FOLDER` a finished run is printed again.

Sentiment is asked zero-shot: `Review: {text}\nSentiment:` with ` negative` or ` positive`. Accuracy of a choice is by
the sum over its tokens.
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import avss
from avss.cli.demo import find_demo_model
from avss.config import DataConfig, HealConfig, PlanConfig, RunConfig, SearchConfig, TaskConfig, build
from avss.progress import bars
from avss.record import RunRecord

AIMS = {"repaired": (2.0, 0.92, None), "healed": (1.35, 0.96, 0.85)}
"""Perplexity ratio at most; mean share of accuracy kept, and mean share kept above chance, at least."""
CLEAR_OF_CHANCE = 0.1


def _tasks(options):
    tasks = [
        TaskConfig(kind="perplexity", data=data, limit=options.windows, seq_len=512) for data in options.perplexity
    ]
    tasks += [TaskConfig(kind="choice", data=data, limit=options.limit) for data in options.choice]
    tasks += [
        TaskConfig(
            kind="classification",
            data=data,
            limit=options.limit,
            template="Review: {text}\nSentiment:",
            labels=("negative", "positive"),
        )
        for data in options.sentiment
    ]
    return tuple(tasks)


def measure(options) -> RunRecord:
    """The whole path, once."""
    heal = {"source": options.data, "budget": options.heal, **dict(item.split("=", 1) for item in options.set)}
    plan: dict[str, object] = {"fraction": options.fraction}
    if options.blocks:
        plan = {"blocks": options.blocks}
    elif options.choose == "greedy":
        plan["select"] = "greedy"
    else:
        plan["criterion"] = options.choose
    config = RunConfig(
        model={"source": options.model or str(find_demo_model())},
        data=build(
            DataConfig,
            {
                "source": options.data,
                "samples": options.samples,
                "seq_len": options.seq_len,
                "augment": options.augment,
                "forms": options.form or None,
            },
        ),
        criteria=("avss", "block-influence"),
        plan=build(PlanConfig, plan),
        search=(SearchConfig(max_passes=options.max_passes, max_tokens=8192) if "select" in plan else SearchConfig()),
        compensate=options.compensate,
        heal=None if options.heal == "none" else build(HealConfig, heal),
        compare=tuple(options.compare),
        tasks=_tasks(options),
        out=str(options.out),
    )
    with bars() as stages:
        return avss.run(config, stages=stages)


def _stage(cut):
    if cut.healing is not None:
        return "healed"
    if cut.compensation is not None and cut.compensation.applied:
        return "repaired"
    return "raw"


def _name(cut):
    return f"{_stage(cut)} ({cut.plan.method})"


def show(record: RunRecord) -> None:
    """The table, and what was aimed at."""
    cuts = record.cuts
    blocks = dict.fromkeys(f"{cut.plan.method}: {cut.plan.describe()}" for cut in cuts)
    print("removed by " + "; by ".join(blocks))
    width = max(len(_name(cut)) for cut in cuts) + 2
    print(f"{'task, metric':<46} {'dense':>8}" + "".join(f"{_name(cut):>{width}}" for cut in cuts))
    chance = {(one.task, one.metric): one.chance for one in record.dense}
    for place, first in enumerate(cuts[0].retention):
        values = "".join(f"{cut.retention[place].value:>{width}.4g}" for cut in cuts)
        print(f"{f'{first.task}, {first.metric}':<46} {first.dense:>8.4g}{values}")
    print()
    forms = next((cut.compensation.forms for cut in cuts if cut.compensation is not None), ())
    print(
        "repaired on text in the prompts " + ", ".join(repr(form) for form in forms) if forms else "no prompts",
        end="\n\n",
    )
    for cut in cuts:
        ratios = [one.ratio for one in cut.retention if one.metric == "perplexity"]
        kept = [one for one in cut.retention if one.metric == "accuracy"]
        clear = [
            (one.value - chance[one.task, one.metric]) / (one.dense - chance[one.task, one.metric])
            for one in kept
            if one.dense - chance[one.task, one.metric] >= CLEAR_OF_CHANCE
        ]
        figures = (
            max(ratios, default=None),
            mean(one.ratio for one in kept) if kept else None,
            mean(clear) if clear else None,
        )
        told = [
            f"perplexity x{figures[0]:.2f}" if ratios else "",
            f"accuracy kept {figures[1]:.1%}" if kept else "",
            f"above chance {figures[2]:.1%} ({len(clear)} tasks)" if clear else "",
        ]
        print(f"{_name(cut)}: {', '.join(text for text in told if text)}{_verdict(_stage(cut), figures)}")
        if cut.healing is not None:
            healing = cut.healing
            print(f"  {healing.num_tokens:,} tokens in {healing.seconds:,.0f} s, {healing.num_steps} steps; "
                  f"{healing.objective}; trained: {healing.weights}")  # fmt: skip
            for point in healing.validation:
                text = f", text {point.text_loss:.4f}" if point.text_loss is not None else ""
                print(f"    {point.num_tokens:>9,} tokens {point.seconds:>6,.0f} s: held out {point.loss:.4f}{text}")
        if _stage(cut) == "repaired":
            story = cut.compensation
            solved = ", ".join(f"{one.start}-{one.stop - 1}: {one.method} (ridge {one.ridge:g})" for one in story.cuts)
            print(f"  {solved}; {len(story.steps)} rounds; {story.before:.3f} -> {story.after:.3f} {story.measure}")


def _verdict(stage, figures):
    if stage not in AIMS:
        return ""
    words = []
    for value, aim, sign in zip(figures, AIMS[stage], (-1, 1, 1), strict=True):
        if value is not None and aim is not None:
            words.append("reached" if sign * (value - aim) >= 0 else f"missed (aim {aim:g})")
    return f" -- {', '.join(words)}" if words else ""


def main():
    """Reads the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="finished", type=Path, help="print a finished run again")
    parser.add_argument("--model", help="by default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--data", default="builtin", help="calibration and healing text")
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument("--perplexity", action="append", default=[], metavar="TEXT")
    parser.add_argument("--choice", action="append", default=[], metavar="FILE")
    parser.add_argument("--sentiment", action="append", default=[], metavar="FILE")
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, for perplexity: a draw")
    parser.add_argument("--limit", type=int, help="items a task")
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--choose", default="greedy", help="greedy (a search), or a criterion")
    parser.add_argument("--blocks", help="instead of choosing")
    parser.add_argument("--max-passes", type=float, default=33.6, help="of the search: a fifth of trying every block")
    parser.add_argument("--compensate", default="auto")
    parser.add_argument("--samples", type=int, default=192, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--augment", type=float, help="share of repair's and healing's text in another writing")
    parser.add_argument("--form", action="append", default=[], help="prompt that some of that text is put into; "
                        "by default those of the tasks, none for none")  # fmt: skip
    parser.add_argument("--heal", default="30m", help="budget, or none")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of HealConfig")
    parser.add_argument("--compare", action="append", default=[], metavar="CRITERION")
    options = parser.parse_args()
    began = time.perf_counter()
    record = RunRecord.read(options.finished) if options.finished else measure(options)
    show(record)
    stages = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in record.seconds.items() if seconds >= 1)
    print(f"\n{time.perf_counter() - began:,.0f} s in all: {stages}")


if __name__ == "__main__":
    main()
