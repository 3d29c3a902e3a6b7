r"""An image classifier to try avss on: a small vision transformer, trained from scratch on pictures, in minutes.

    python examples/train_pictures.py --write-digits digits
    python examples/train_pictures.py --train digits/train --out classifier
    avss run classifier --fraction 0.25 --select greedy --data digits/train --samples 512 --compensate auto --heal 2m \
        --task classification=digits/validation --out smaller

The folder holds a folder for each label. `--write-digits` writes one: the 1,797 handwritten digits, 8 pixels wide, that
come with scikit-learn (`pip install scikit-learn`), every fifth of them for validation.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    get_linear_schedule_with_warmup,
)


def write_digits(folder: Path) -> None:
    """Writes scikit-learn's digits as PNG files, a folder for each label, in `train` and `validation`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("The digits come with scikit-learn. Run `pip install scikit-learn`.") from None
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("train" if number % 5 else "validation") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9375).astype(np.uint8)).convert("RGB").save(place / f"{number}.png")


def read(folder: Path) -> list[tuple[Path, str]]:
    """Image files with their labels."""
    return [(file, file.parent.name) for file in sorted(folder.glob("*/*")) if file.is_file()]


def main() -> None:
    """Trains, and saves model and image processor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-digits", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=int, default=16, help="pixels of a side")
    parser.add_argument("--patch", type=int, default=4, help="pixels of a patch")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    if options.write_digits:
        write_digits(options.write_digits)
        return
    if not options.train or not options.out:
        parser.error("give --train and --out, or --write-digits")
    torch.manual_seed(0)
    rows = read(options.train)
    names = sorted({name for _, name in rows})
    side = {"height": options.size, "width": options.size}
    processor = ViTImageProcessor(size=side)
    config = ViTConfig(
        image_size=options.size,
        patch_size=options.patch,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=options.blocks,
        num_attention_heads=4,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
    )
    model = ViTForImageClassification(config)
    images = [Image.open(file).convert("RGB") for file, _ in rows]
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])
    labels = torch.tensor([names.index(name) for _, name in rows])
    steps = options.epochs * -(-len(rows) // options.batch_size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = get_linear_schedule_with_warmup(optimiser, steps // 10, steps)
    model.train()
    for epoch in range(options.epochs):
        total = 0.0
        for chosen in torch.randperm(len(rows)).split(options.batch_size):
            loss = model(pixel_values=pixels[chosen], labels=labels[chosen]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            total += float(loss.detach()) * len(chosen)
        print(f"epoch {epoch + 1} of {options.epochs}: loss {total / len(rows):.3f}", flush=True)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"saved to {options.out}")


if __name__ == "__main__":
    main()
