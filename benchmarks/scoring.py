"""What does scoring cost? All forward criteria against the bare forward pass on the same batches, as a ratio.

Each round times every way once, in turn, so that drift of the machine hits all alike; the ratio is taken within a
round. Peak memory is measured in a fresh process per way.

    python benchmarks/scoring.py [--model MODEL] [--sequences 8] [--seq-len 512] [--batch-size 4] [--rounds 5]
"""

import argparse
import multiprocessing
import resource
import statistics as st
import time

from avss.cli.demo import find_demo_model
from avss.criteria import CRITERIA as ALL_CRITERIA

FORWARD = ",".join(
    name for name, one in ALL_CRITERIA.items() if one.needs and all(need.probe == "block" for need in one.needs)
)
"""Those that a forward pass with a look at each block serves: no gradients, no angles across runs."""

CRITERIA = {
    "body alone (= 1)": None,
    "block-influence": "block-influence",
    "update-norm": "update-norm",
    "avss": "avss",
    "avss-paper": "avss-paper",
    "avss-reference": "avss-reference",
    "all of these kinds": FORWARD,
    "angular": "angular",
    "taylor (backward)": "taylor",
}


def _prepare(options):
    from avss import composer

    loaded = composer.load(options.model)
    batches = list(
        composer.calibration(
            loaded, "builtin", samples=options.sequences, seq_len=options.seq_len, batch_size=options.batch_size
        )
    )
    return loaded, batches


def _work(loaded, batches, names):
    from avss.collect import collect
    from avss.criteria import find_criteria
    from avss.models.forward import run_body

    if names is None:
        for token_ids, keep in batches:
            run_body(loaded, token_ids, keep)
    else:
        collect(loaded, batches, [need for criterion in find_criteria(names) for need in criterion.needs])


def _peak(options, names, answer):
    loaded, batches = _prepare(options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _work(loaded, batches, names)
    answer.put((before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the demo's model")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    options = parser.parse_args()
    options.model = options.model or str(find_demo_model())

    loaded, batches = _prepare(options)
    _work(loaded, batches, None)  # warm up
    seconds = {label: [] for label in CRITERIA}
    for _ in range(options.rounds):
        for label, names in CRITERIA.items():
            start = time.perf_counter()
            _work(loaded, batches, names)
            seconds[label].append(time.perf_counter() - start)
    base = seconds["body alone (= 1)"]

    print(f"{options.sequences} x {options.seq_len} tokens, batch {options.batch_size}, {options.rounds} rounds")
    print(f"{'criteria':<20}{'seconds':>9}{'ratio':>8}{'min':>7}{'max':>7}{'peak MB':>9}")
    context = multiprocessing.get_context("spawn")
    for label, names in CRITERIA.items():
        ratios = [one / bare for one, bare in zip(seconds[label], base, strict=True)]
        peak = ""
        if not options.no_memory:
            answer = context.Queue()
            process = context.Process(target=_peak, args=(options, names, answer))
            process.start()
            before, after = answer.get()
            process.join()
            peak = f"{(after - before) / 1024:9.0f}"
        print(
            f"{label:<20}{st.median(seconds[label]):9.2f}{st.median(ratios):8.3f}{min(ratios):7.3f}{max(ratios):7.3f}{peak}"
        )


if __name__ == "__main__":
    main()
