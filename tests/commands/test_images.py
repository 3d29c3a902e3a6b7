"""Images on the command line: which verbs read them, what the record knows of them, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from tests.commands.test_bad_input import refused
from tests.support.images import VISION, draw_images


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VISION["vit"].save(tmp_path_factory.mktemp("models") / "tiny-vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data") / "pictures", 9)


def test_a_record_knows_the_images(avss_command, vit_folder, pictures, tmp_path):
    answer = avss_command("score", vit_folder, "--data", pictures, "--out", tmp_path / "scores")
    assert answer.code == 0, answer.err
    data = json.loads((tmp_path / "scores" / "record.json").read_text())["data"]
    assert len(data.pop("content_hash")) == 16
    assert data == {
        "source": "pictures",
        "column": None,
        "layout": "images",
        "image_size": [16, 16],
        "num_sequences": 9,
        "seq_len": 17,
        "num_tokens": 153,
        "batch_size": 8,
        "seed": 0,
    }
    page = (tmp_path / "scores" / "report.html").read_text()
    assert "Calibration images" in page
    assert "9 images of 16 x 16 pixels, 17 places of the stack each" in page


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "--count", 1, "--criterion", "avss"),
        ("prune", "--count", 1, "--criterion", "magnitude"),
        ("prune", "--count", 2, "--select", "greedy"),
        ("prune", "--count", 2, "--score-rounds", 2),
        ("prune", "--count", 1, "--compensate", "auto"),
        ("prune", "--count", 1, "--select", "greedy", "--compensate", "refit"),
        ("damage",),
        ("compare", "--greedy"),
        ("stability", "--criteria", "block-influence,avss", "--samples", 8),
    ],
)
def test_verbs_that_read_images(avss_command, vit_folder, pictures, tmp_path, arguments):
    verb, *rest = arguments
    answer = avss_command(verb, vit_folder, "--data", pictures, "--out", tmp_path / "out", *rest)
    assert answer.code == 0, answer.err
    if verb == "prune":
        card = (tmp_path / "out" / "README.md").read_text()
        assert 'pipeline_tag: "image-classification"' in card
        assert "**Calibration images**: pictures; 9 images of 16 x 16 pixels" in card
        assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_what_is_found_on_images_is_counted_in_images(avss_command, vit_folder, pictures):
    answer = avss_command("score", vit_folder, "--data", pictures, "--criteria", "sparsity", "--json")
    told = json.loads(answer.out)
    assert told["stability"][0]["unit"] == "images"
    assert "sequences" not in " ".join(told["warnings"])


def test_folders_of_images_are_mixed(avss_command, vit_folder, pictures, tmp_path):
    other = draw_images(tmp_path / "others", 3, seed=1)
    answer = avss_command("score", vit_folder, "--data", f"{pictures},{other}", "--samples", 4, "--json")
    data = json.loads(answer.out)["data"]
    assert (data["source"], data["num_sequences"]) == ("pictures, others", 4)


def test_the_tower_of_a_multimodal_model_is_scored_and_cut(avss_command, pictures, tmp_path):
    folder = VISION["llava"].save(tmp_path / "llava")
    arguments = ("--stack", "vision", "--data", pictures)
    for verb in ("score", "damage", "compare", "stability"):
        answer = avss_command(verb, folder, *arguments)
        assert answer.code == 0, (verb, answer.err)
    answer = avss_command("prune", folder, *arguments, "--count", 1, "--out", tmp_path / "smaller")
    assert answer.code == 0, answer.err
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 4
    assert (tmp_path / "smaller" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("score",), ("reads images", "none come with avss", "--data DIR")),
        (("prune", "--count", 1), ("reads images", "--data DIR", "--blocks")),
        (("damage",), ("reads images", "--data DIR")),
        (("score", "--data", "notes.txt"), ("`notes.txt` is no image", ".png")),
        (("score", "--data", "nowhere"), ("There is no file or folder `nowhere`", "images")),
        (("score", "--data", "PICTURES", "--seq-len", 16), ("`--seq-len` is for text",)),
        (("score", "--data", "PICTURES", "--samples", 0), ("samples",)),
        (("score", "--reference"), ("`--reference` reads text", "reads images", "avss score")),
        (("prune", "--count", 1, "--data", "ONE", "--compensate", "auto"), ("some images", "gives 1")),
        (("prune", "--count", 1, "--data", "PICTURES", "--augment", 0.5), ("--augment",)),
        (
            ("prune", "--min-retention", 0.9, "--retention-task", "similarity", "--data", "PICTURES"),
            ("none come with avss", "similarity=DIR"),
        ),
        (
            ("prune", "--count", 1, "--select", "greedy", "--objective", "loss", "--data", "PICTURES"),
            ("needs a causal language model",),
        ),
        (("evaluate", "--task", "perplexity"), ("`perplexity` reads text", "reads images", "classification=DIR")),
        (("evaluate", "--task", "similarity"), ("none come with avss", "similarity=DIR")),
        (("evaluate", "--task", "similarity=ONE"), ("gives 1 images",)),
        (("evaluate", "--task", "classification=PICTURES"), ("has no label", "a folder for each label")),
        (("evaluate", "--task", "classification=PICTURES", "--shots", 2), ("cannot use examples",)),
        (("heal", "--teacher", "MODEL", "--data", "PICTURES", "--budget", "1k"), ("carries no record",)),
        (("compare", "--data", "ONE"), ("gives 1 images, too few",)),
    ],
)
def test_what_has_no_meaning_for_images_is_refused(
    avss_command, vit_folder, pictures, tmp_path, monkeypatch, arguments, parts
):
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    names = {"PICTURES": pictures, "MODEL": vit_folder, "ONE": pictures / "1.png"}
    verb, *rest = (
        argument
        if not isinstance(argument, str)
        else re.sub("PICTURES|MODEL|ONE", lambda one: str(names[one[0]]), argument)
        for argument in arguments
    )
    out = () if verb in ("score", "damage", "evaluate", "compare") else ("--out", tmp_path / "out")
    refused(avss_command(verb, vit_folder, *rest, *out, "--quiet"), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_an_image_processor_what_is_missing_is_named(avss_command, pictures, tmp_path):
    folder = VISION["vit"].save(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    refused(avss_command("score", folder, "--data", pictures), "no image processor", "`preprocessor_config.json`")


def test_a_head_that_answers_with_pictures_has_no_damage(avss_command, pictures, tmp_path):
    folder = VISION["vit"].save(tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["ViTForMaskedImageModeling"], "encoder_stride": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert avss_command("score", folder, "--data", pictures, "--criteria", "avss,taylor").code == 0
    refused(avss_command("damage", folder, "--data", pictures), "neither logits of classes", "--head encoder")
    assert avss_command("damage", folder, "--data", pictures, "--head", "encoder").code == 0


def test_a_model_that_reads_images_goes_the_whole_way(avss_command, vit_folder, tmp_path):
    """Scored, cut, repaired, healed, verified, evaluated and reported."""
    pictures = tmp_path / "animals"
    for seed, label in enumerate(("LABEL_0", "LABEL_1")):
        draw_images(pictures / label, 12, seed=seed)
    out = tmp_path / "out"
    answer = avss_command(
        *("run", vit_folder, "--data", pictures, "--count", 1, "--compensate", "auto", "--heal", "2k"),
        *("--task", f"classification={pictures}", "--task", f"similarity={pictures}", "--task", "speed"),
        *("--out", out, "--quiet"),
    )
    assert answer.code == 0, answer.err
    record = json.loads((out / "record.json").read_text())
    assert record["data"]["layout"] == "images"
    assert record["cuts"][0]["verification"]["reload_strict"]
    assert record["cuts"][0]["healing"]["data"]["layout"] == "images"
    names = {(one["task"], one["metric"]) for one in record["cuts"][0]["measurements"]}
    assert {("classification:animals", "accuracy"), ("similarity:animals", "cosine"), ("speed", "throughput")} <= names
    assert "animals" in (out / "report.html").read_text()
    healed = avss_command(
        "evaluate", out / "model", "--baseline", vit_folder, "--task", f"similarity={pictures}", "--json"
    )
    kept = {one["metric"]: one["value"] for one in json.loads(healed.out)["cuts"][0]["measurements"]}
    told = {
        one["metric"]: one["value"] for one in record["cuts"][0]["measurements"] if one["task"] == "similarity:animals"
    }
    assert kept["cosine"] == pytest.approx(told["cosine"], abs=1e-6)


def test_a_folder_is_healed_on_images(avss_command, vit_folder, pictures, tmp_path):
    assert avss_command("prune", vit_folder, "--blocks", 2, "--out", tmp_path / "cut").code == 0
    answer = avss_command(
        "heal",
        tmp_path / "cut",
        "--teacher",
        vit_folder,
        "--data",
        pictures,
        "--budget",
        "1k",
        "--out",
        tmp_path / "healed",
    )
    assert answer.code == 0, answer.err
    assert avss_command("verify", tmp_path / "healed", "--against", vit_folder).code == 0
    assert (tmp_path / "healed" / "preprocessor_config.json").exists()


def test_the_best_quality_within_a_time(avss_command, vit_folder, pictures, tmp_path):
    answer = avss_command(
        *("run", vit_folder, "--data", pictures, "--fraction", 0.4, "--quality", "best", "--time", "12s"),
        *("--out", tmp_path / "out", "--quiet"),
    )
    assert answer.code == 0, answer.err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert len(record["cuts"][0]["plan"]["removed"]) == 2
    assert record["search"]["points"]
    assert record["cuts"][0]["healing"] is not None
