"""Is the search worth its passes? Sets of one size by search, by scores, by windows and by a plain greedy search.

Every set is chosen on one text and judged by perplexity on another. What choosing took is counted in blocks and told as
passes of the whole model over the choosing text. The plain greedy search is that of SLEB (2402.09025): every remaining
block is tried in each step on all of the text, by its loss, the ends excepted; its effort is told as SLEB spends it,
each model from its first block, although the prefixes are shared here to save time.

    python benchmarks/search.py --data TEXT --evaluate TEXT [--count 8] [--samples 24] [--seq-len 128]

Searches keep what they measured, so a benchmark that was cut off goes on where it was.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch

from avss import composer
from avss.ablation import Judge
from avss.cli.demo import find_demo_model
from avss.composer.searching import passes_of_all, search_loaded
from avss.config import PlanConfig, SearchConfig, TaskConfig
from avss.cut import cut
from avss.evaluation import evaluate_task
from avss.progress import silent
from avss.record import Plan
from avss.search import Ledger


def _plan(num_blocks, removed):
    return Plan(num_blocks=num_blocks, removed=tuple(sorted(removed)), method="benchmark", rule="by the benchmark")


def _by_scores(loaded, batches, criterion, options, *, contiguous=False):
    from avss.composer.scores import score_loaded
    from avss.criteria import find_criteria
    from avss.plan import make_plan

    table, _ = score_loaded(loaded, batches, find_criteria(criterion), True, 0.25, silent)
    plan = make_plan(table.scores[0], PlanConfig(count=options.count, contiguous=contiguous))
    return plan.removed, 1.0


def _window_by_cosine(loaded, batches, options):
    """The run whose input and output are closest by angle, ends excepted (2403.17887, over all tokens)."""
    from avss.models.forward import run_body
    from avss.models.stack import hooked

    num, count = len(loaded.stack), options.count
    sums = dict.fromkeys(range(1, num - count), 0.0)
    total = 0
    for token_ids, keep in batches:
        states = {}

        def note(index, before, after, states=states):
            states[index] = before.detach()
            states[index + 1] = after.detach()

        with hooked(loaded.stack, note):
            run_body(loaded, token_ids, keep)
        for start in sums:
            one, other = states[start].float(), states[start + count].float()
            angle = torch.arccos(torch.cosine_similarity(one, other, dim=-1).clamp(-1, 1)) / math.pi
            sums[start] += float(angle[keep].sum())
        total += int(keep.sum())
    start = min(sums, key=sums.get)
    return tuple(range(start, start + count)), 1.0


def _sleb(loaded, batches, options):
    """All remaining blocks in each step; resumable."""
    num = len(loaded.stack)
    judge = Judge(loaded, batches, holds_all=True)

    def measure(sets, chosen):
        return [(one.loss - one.dense_loss)[:, None] for one in judge.judge(sets, batches=chosen)]

    key = f"sleb-{batches.facts.content_hash}-{loaded.facts().fingerprint}-{loaded.facts().compute_dtype}"
    ledger = Ledger(measure, num_blocks=num, num_batches=len(judge), path=Path(options.cache) / f"{key}.jsonl", key=key)
    removed = frozenset()
    for _ in range(options.count):
        tried = [removed | {block} for block in range(1, num - 1) if block not in removed]
        ledger.ask(tried, range(len(judge)))
        removed = min(tried, key=ledger.mean)
        print(f"  SLEB {len(removed)}: {sorted(removed)}", flush=True)
    return removed, passes_of_all(num, num - 2, options.count)


def _search(loaded, batches, method, options):
    found = search_loaded(
        loaded,
        batches,
        PlanConfig(select=method, count=options.count),
        SearchConfig(max_passes=options.max_passes, cache=options.cache),
        count=options.count,
        protected=(0, len(loaded.stack) - 1),
        prior=None,
        stages=silent,
    )
    for row in found.rows():
        print(f"  {method} {row['size']}: {row['blocks']} kl {row['distance']:.4f} by {row['how']}", flush=True)
    return found.points[-1].removed, found.passes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the demo's model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", default="builtin", help="text to choose on")
    parser.add_argument("--evaluate", default="builtin", help="text to judge by")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-passes", type=float, default=None, help="default: a fifth of SLEB's")
    parser.add_argument("--methods", default="block-influence,cosine-window,greedy,evolution,window,sleb")
    parser.add_argument(
        "--cache",
        default=str(Path(tempfile.gettempdir()) / "avss-search-benchmark"),
        help="folder for what was measured",
    )
    options = parser.parse_args()

    loaded = composer.load(options.model or str(find_demo_model()), dtype=options.dtype)
    num = len(loaded.stack)
    options.max_passes = options.max_passes or passes_of_all(num, num - 2, options.count) / 5
    batches = composer.calibration(
        loaded, options.data, samples=options.samples, seq_len=options.seq_len, batch_size=options.batch_size
    )
    chosen = {"dense": ((), 0.0, 0.0)}
    for method in options.methods.split(","):
        start = time.perf_counter()
        if method == "sleb":
            removed, passes = _sleb(loaded, batches, options)
        elif method == "cosine-window":
            removed, passes = _window_by_cosine(loaded, batches, options)
        elif method in ("greedy", "evolution", "window"):
            removed, passes = _search(loaded, batches, method, options)
        else:
            removed, passes = _by_scores(loaded, batches, method, options)
        chosen[method] = (tuple(sorted(removed)), passes, time.perf_counter() - start)
        print(f"{method}: {chosen[method][0]}, {passes:.1f} passes", flush=True)

    task = TaskConfig(kind="perplexity", data=options.evaluate, limit=options.windows, batch_size=1)
    sets = list(dict.fromkeys(removed for removed, _, _ in chosen.values()))
    perplexity = {}
    for removed in sets:
        model = cut(loaded, _plan(num, removed)) if removed else loaded
        perplexity[removed] = evaluate_task([model], task)[0]["perplexity"]
    dense = perplexity[()].value
    print(f"\n{options.count} of {num} blocks; chosen on {options.samples} x {options.seq_len} tokens, {options.dtype}")
    print(f"{'chosen by':<17}{'passes':>8}{'blocks':>9}{'seconds':>9}{'perplexity':>12}{'ratio':>7}  removed")
    for method, (removed, passes, seconds) in chosen.items():
        found = perplexity[removed]
        text = _plan(num, removed).describe() or "none"
        print(
            f"{method:<17}{passes:8.1f}{passes * num * len(batches):9.0f}{seconds:9.0f}{found.value:12.1f}"
            f"{found.value / dense:7.2f}  {text}"
        )


if __name__ == "__main__":
    main()
