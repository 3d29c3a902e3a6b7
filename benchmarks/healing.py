"""What a step of healing costs on SmolLM2-135M-Instruct without 8 of 30 blocks, by precision and what is trained.

Tokens per second of processor time, so that other work on the machine changes little. Run it with `make bench`.
"""

import argparse
import time
from typing import Any

import torch

from avss.cli.demo import find_demo_model
from avss.config import HealConfig
from avss.cut import cut
from avss.data.sources import read_texts
from avss.healing import heal
from avss.models.load import load_model
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


def main() -> None:
    """Prints one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="steps of 2 x 512 tokens, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="variants whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense = load_model(str(find_demo_model()))
    plan = Plan(num_blocks=30, removed=REMOVED, method="explicit", rule="by hand")
    smaller = cut(dense, plan)
    texts = read_texts("builtin")
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    for name, settings in VARIANTS.items():
        if arguments.only not in name:
            continue
        marks: list[tuple[float, float, int]] = []

        def note(done: int, total: int | None, words: str, marks: list[tuple[float, float, int]] = marks) -> None:
            del total, words
            marks.append((time.process_time(), time.perf_counter(), done))

        tokens = 1024 * (arguments.steps + 1)
        config = HealConfig(
            **{"budget": f"{tokens} tokens", "batch_size": 2, "held_out": 1, "validations": 1, **settings}
        )
        heal(dense, smaller, plan, texts, config, report=note)
        # The first report is of the model before healing, the second of the step that warms up, the last of the end.
        (cpu, wall, done), (later_cpu, later_wall, later) = marks[1], marks[-2]
        count = later - done
        print(
            f"{name:<34} {count / (later_cpu - cpu):7.1f} tokens a second of processor time, "
            f"{count / (later_wall - wall):7.1f} a second",
            flush=True,
        )


if __name__ == "__main__":
    main()
