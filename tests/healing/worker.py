"""One of the processes that heal together, for `test_team`: `python worker.py FOLDER NUM_PROCESSES`."""

import sys
from pathlib import Path

import torch

from avss.config import HealConfig
from avss.cut import cut
from avss.data.sources import Texts
from avss.healing import heal
from avss.healing.team import Team
from avss.models.load import adopt
from avss.record import Plan
from tests.support.architectures import ARCHITECTURES
from tests.support.tokenizers import WORDS, word_tokenizer


def work(folder: Path, size: int) -> None:
    """Heals a tiny model and saves its weights and curve under the number of this process."""
    dense = adopt(ARCHITECTURES["llama"](), word_tokenizer(adds="bos"))
    plan = Plan(num_blocks=5, removed=(2,), method="explicit", rule="by hand")
    texts = Texts(texts=(" ".join(WORDS * 12),), source="words", is_prose=True)
    settings = {"seq_len": 16, "batch_size": 4, "held_out": 5, "precision": "float32", "learning_rate": 1e-3}
    config = HealConfig(budget="400 tokens", validations=2, **settings)
    healed, healing, _ = heal(dense, cut(dense, plan), plan, texts, config)
    assert healing.settings["num_processes"] == size
    validation = [point.loss for point in healing.validation]
    torch.save({"state": healed.model.state_dict(), "validation": validation}, folder / f"{Team().rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]), int(sys.argv[2]))
