r"""Healing SmolLM2-135M-Instruct without 8 of its 30 blocks: what it brings, or what a step costs.

    python benchmarks/healing.py brings --data wikipedia.txt --budget 30m --out healed \
        --task perplexity=wikitext.txt --task choice=piqa.jsonl [--from repaired] [--set learning_rate=5e-4] ...
    python benchmarks/healing.py costs [--steps 4] [--threads 2] [--only bfloat16]

`brings` prints the figures of the dense model, of the cut and of the healed model from one run, and goes on where it
stopped when it was killed. `--from` names a folder that `avss prune` wrote, repaired or not, to start from; `--set`
changes one setting of `avss.HealConfig`. `costs` gives tokens a second of processor time, so that other work on the
machine changes little.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import avss
from avss.cli.demo import find_demo_model
from avss.config import HealConfig
from avss.cut import cut
from avss.data.sources import read_texts
from avss.healing import heal
from avss.models.load import load_model
from avss.progress import bars
from avss.record import Plan

REMOVED = (5, 12, 13, 14, 15, 16, 17, 18)
VARIANTS: dict[str, dict[str, Any]] = {
    "after, bfloat16 (default)": {"precision": "bfloat16"},
    "after, float32": {"precision": "float32"},
    "all, bfloat16": {"weights": "all", "precision": "bfloat16"},
    "lora, bfloat16": {"weights": "lora", "precision": "bfloat16"},
    "after, bfloat16, hidden states": {"precision": "bfloat16", "hidden_weight": 1.0},
    "after, bfloat16, recomputed": {"precision": "bfloat16", "recompute": True},
}


def brings(options):
    """Heals for the whole budget and prints a table."""
    dense = str(find_demo_model())
    settings = dict(item.split("=", 1) for item in options.set)
    start = Path(options.start) if options.start else options.out.with_name(f"{options.out.name}-cut")
    if not start.is_dir():
        avss.prune(dense, blocks=REMOVED, out=start)
    if not options.out.is_dir():
        with bars() as stages:
            avss.heal(
                start,
                teacher=dense,
                data=options.data,
                budget=options.budget,
                out=options.out,
                stages=stages,
                **settings,
            )
    healing = avss.RunRecord.read(options.out).cuts[0].healing
    print(f"healed on {healing.num_tokens:,} tokens in {healing.seconds:,.0f} s, {healing.num_steps} steps")
    print(f"{healing.objective}; trained: {healing.weights}")
    for point in healing.validation:
        kept = " (kept)" if point.step == healing.best_step else ""
        print(f"  {point.num_tokens:>9,} tokens {point.seconds:>7,.0f} s: held out {point.loss:.4f}{kept}")
    print(f"{'task, metric':<44} {'dense':>10} {'cut':>10} {'healed':>10} {'healed / dense':>15}")
    for task in options.task:
        before, after = (
            avss.evaluate(folder, [task], baseline=dense, limit=options.limit) for folder in (start, options.out)
        )
        for old, new in zip(before.cuts[0].retention, after.cuts[0].retention, strict=True):
            name = f"{new.task}, {new.metric}"
            print(f"{name:<44} {new.dense:>10.4g} {old.value:>10.4g} {new.value:>10.4g} {new.ratio:>15.3f}", flush=True)


def costs(options):
    """Prints one line a variant."""
    torch.set_num_threads(options.threads)
    dense = load_model(str(find_demo_model()))
    plan = Plan(num_blocks=30, removed=REMOVED, method="explicit", rule="by hand")
    smaller, texts = cut(dense, plan), read_texts("builtin")
    print(f"torch {torch.__version__}, {options.threads} threads")
    for name, settings in VARIANTS.items():
        if options.only not in name:
            continue
        marks: list[tuple[float, float, int]] = []

        def note(done: int, total: int | None, words: str, marks: list[tuple[float, float, int]] = marks) -> None:
            del total, words
            marks.append((time.process_time(), time.perf_counter(), done))

        tokens = 1024 * (options.steps + 1)
        common = {"budget": f"{tokens} tokens", "batch_size": 2, "held_out": 1, "validations": 1}
        heal(dense, smaller, plan, texts, HealConfig(**common, **settings), report=note)
        # The first report is of the model before healing, the second of the step that warms up, the last of the end.
        (cpu, wall, done), (later_cpu, later_wall, later) = marks[1], marks[-2]
        of_cpu, of_wall = ((later - done) / spent for spent in (later_cpu - cpu, later_wall - wall))
        print(f"{name:<34} {of_cpu:7.1f} tokens a second of processor time, {of_wall:7.1f} a second", flush=True)


def main():
    """Chooses what to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("brings")
    verb.add_argument("--data", default="builtin")
    verb.add_argument("--budget", default="30m")
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--from", dest="start")
    verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    verb.add_argument("--task", action="append", default=[], metavar="KIND=DATA")
    verb.add_argument("--limit", type=int)
    verb.set_defaults(run=brings)
    verb = verbs.add_parser("costs")
    verb.add_argument("--steps", type=int, default=4, help="steps of 2 x 512 tokens, after one that warms up")
    verb.add_argument("--threads", type=int, default=torch.get_num_threads())
    verb.add_argument("--only", default="", help="variants whose name holds this")
    verb.set_defaults(run=costs)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
