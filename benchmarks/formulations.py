"""Which formulation of AVSS predicts measured damage best? Rank agreement over blocks, on several texts.

For each text: statistics from one pass over some sequences, the damage of leaving out each block on others, and for
each formulation Spearman's correlation with that damage and the overlap of the lowest quarter.

    python benchmarks/formulations.py [--model MODEL] --data TEXT [--data TEXT ...] [--samples 16] [--damage-samples 8]
"""

import argparse

import numpy as np

from avss.cli.demo import find_demo_model
from avss.plan import count_of_fraction
from avss.statistics import (
    CosineSimilarity,
    Moments,
    NearZero,
    RelativeUpdate,
    RelativeVariance,
    Unchanged,
)
from avss.statistics.agreement import overlap, spearman

THRESHOLDS = (0.003, 0.01, 0.03, 0.1, 0.3)


def formulations(collected, *, first_token):
    """Name -> one value a block, higher = keep."""

    def value(statistic, field):
        return collected.summarise(statistic, first_token=first_token)[field]

    output, near_output = value(Moments("output"), "variance"), value(NearZero("output", 0.01), "smoothed_share")
    pooled = value(Moments("update"), "variance") / value(Moments("input"), "variance")
    by_token = value(RelativeVariance(), "ratio")
    found = {
        "variance / near-zero share of the output (paper)": output / near_output,
        "the same multiplied (the paper's figure)": output * near_output,
        "variance of the update": value(Moments("update"), "variance"),
        "variance of update / of input, pooled": pooled,
        "  pooled / near-zero share of the update": pooled / value(NearZero("update", 0.01), "smoothed_share"),
        "variance of update / of input, by token": by_token,
        "  by token / near-zero share of the update": by_token / value(NearZero("update", 0.01), "smoothed_share"),
    }
    for threshold in THRESHOLDS:
        unchanged = value(Unchanged(threshold), "smoothed_share")
        found[f"  by token / unchanged share, {threshold}"] = by_token / unchanged
    found["  by token * changed share, 0.1"] = by_token * (1 - value(Unchanged(0.1), "share"))
    found["Block Influence"] = 1 - value(CosineSimilarity(), "cosine")
    found["relative update norm"] = value(RelativeUpdate(), "ratio")
    return found


def needs():
    return [
        *(Moments(site) for site in ("input", "output", "update")),
        *(NearZero(site, 0.01) for site in ("output", "update")),
        *(Unchanged(threshold) for threshold in THRESHOLDS),
        RelativeVariance(),
        CosineSimilarity(),
        RelativeUpdate(),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the demo's model")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--damage-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()

    from avss import composer
    from avss.ablation import Judge, leave_one_out
    from avss.collect import collect

    loaded = composer.load(options.model or str(find_demo_model()))
    num_blocks = len(loaded.stack)
    count = count_of_fraction(0.25, num_blocks)
    rows = {}
    for source in options.data:
        sizes = {"samples": options.samples + options.damage_samples, "seq_len": options.seq_len, "batch_size": 2}
        scoring, judging = composer.calibration(loaded, source, **sizes).split(options.samples)
        collected = collect(loaded, scoring, needs())
        damage = np.array([one.mean for one in leave_one_out(Judge(loaded, judging), num_blocks)])
        rows.setdefault("depth alone", []).append((np.arange(num_blocks), damage))
        for first_token in (True, False):
            for name, values in formulations(collected, first_token=first_token).items():
                rows.setdefault(name + ("" if first_token else " (first token out)"), []).append((values, damage))

    print(
        f"{num_blocks} blocks; Spearman with measured damage, overlap of the lowest {count}; per text: {options.data}"
    )
    for name, per_text in rows.items():
        cells = []
        for values, damage in per_text:
            lowest = sorted(np.argsort(values, kind="stable")[:count])
            cells.append(f"{spearman(values, damage):+.2f}, {overlap(lowest, damage)}")
        print(f"{name:<68}" + "   ".join(f"{cell:>9}" for cell in cells))


if __name__ == "__main__":
    main()
