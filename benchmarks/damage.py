"""What does measured damage cost? All blocks left out one by one, with shared prefixes against the naive way.

The naive way runs the head and the same comparison, but every model from its first block. Both ways run in turn in each
round, batch by batch, so that drift of the machine hits them alike; the figures of both are compared to the bit.

    python benchmarks/damage.py [--model MODEL] [--sequences 8] [--seq-len 512] [--batch-size 2] [--rounds 1]
"""

import argparse
import statistics as st
import time

import numpy as np
import torch

from avss.cli.demo import find_demo_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the demo's model")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from avss import composer
    from avss.ablation import Judge

    loaded = composer.load(options.model or str(find_demo_model()))
    num_blocks = len(loaded.stack)
    singles = [(block,) for block in range(num_blocks)]
    sizes = {"samples": options.sequences, "seq_len": options.seq_len, "batch_size": options.batch_size}
    batches = composer.calibration(loaded, "builtin", **sizes)
    Judge(loaded, batches).judge(singles[:1], batches=[0])  # warm up
    ways = {"shared prefixes": Judge(loaded, batches), "from the start": Judge(loaded, batches, share=False)}

    seconds = dict.fromkeys(ways, 0.0)
    ratios, different = [], 0
    for _ in range(options.rounds):
        for batch in range(len(batches)):
            found, spent = {}, {}
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way.judge(singles, batches=[batch])
                spent[name] = time.perf_counter() - start
                seconds[name] += spent[name]
            ratios.append(spent["shared prefixes"] / spent["from the start"])
            for one, other in zip(found["shared prefixes"], found["from the start"], strict=True):
                different += not (np.array_equal(one.distance, other.distance) and np.array_equal(one.loss, other.loss))

    print(f"{num_blocks} blocks, {options.sequences} x {options.seq_len} tokens, batch {options.batch_size}")
    print(f"{'way':<18}{'seconds':>10}{'blocks run':>12}")
    for name, way in ways.items():
        print(f"{name:<18}{seconds[name]:>10.1f}{way.num_blocks_run:>12,}")
    shared, slow = ways.values()
    print(
        f"ratio of times: median {st.median(ratios):.3f} over batches ({min(ratios):.3f} to {max(ratios):.3f}); "
        f"of blocks {shared.num_blocks_run / slow.num_blocks_run:.3f}; figures that differ: {different}"
    )


if __name__ == "__main__":
    main()
