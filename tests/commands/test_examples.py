"""The example scripts do what they say, on tiny models."""

import runpy
import sys
from pathlib import Path

from PIL import Image

from avss.record import RunRecord

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_classifier_is_trained_and_avss_cuts_it(avss_command, encoder_folder, tmp_path, monkeypatch):
    data, trained = tmp_path / "train.csv", tmp_path / "classifier"
    rows = [("the cat sat on the mat", 1), ("the dog ran over the road", 0)] * 24
    data.write_text("sentence,label\n" + "\n".join(f"{text},{label}" for text, label in rows) + "\n")
    arguments = ["--train", data, "--out", trained, "--encoder", encoder_folder, "--epochs", 8, "--batch-size", 8]
    arguments += ["--learning-rate", 3e-3]
    monkeypatch.setattr(sys, "argv", ["train_sentiment.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / "train_sentiment.py"), run_name="__main__")
    answer = avss_command(
        "run", trained, "--criterion", "block-influence", "--fraction", 0.33, "--data", data, "--heal", "500 tokens",
        "--task", f"classification={data}", "--out", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    record = RunRecord.read(tmp_path / "out")
    assert record.cuts[0].healing is not None
    (dense,) = (one.value for one in record.dense if one.metric == "accuracy")
    assert dense == 1.0  # two sentences are learnt by heart


def test_a_classifier_of_pictures_is_trained_and_avss_cuts_it(avss_command, tmp_path, monkeypatch):
    data, trained = tmp_path / "pictures", tmp_path / "classifier"
    for label, shade in (("dark", 40), ("light", 210)):
        (data / label).mkdir(parents=True)
        for number in range(16):
            Image.new("RGB", (8, 8), (shade + number,) * 3).save(data / label / f"{number}.png")
    arguments = ["--train", data, "--out", trained, "--blocks", 4, "--width", 32, "--epochs", 10, "--batch-size", 8]
    monkeypatch.setattr(sys, "argv", ["train_pictures.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / "train_pictures.py"), run_name="__main__")
    answer = avss_command(
        "run", trained, "--fraction", 0.25, "--select", "greedy", "--data", data, "--compensate", "auto",
        "--heal", "1k tokens", "--task", f"classification={data}", "--out", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    record = RunRecord.read(tmp_path / "out")
    assert len(record.cuts[0].plan.removed) == 1
    (dense,) = (one.value for one in record.dense if one.metric == "accuracy")
    assert dense == 1.0  # bright or not
