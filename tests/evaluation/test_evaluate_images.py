"""Tasks on images: against transformers and NumPy, an image at a time; and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from avss.composer.evaluating import choose_tasks
from avss.config import TaskConfig
from avss.cut import cut
from avss.errors import ConfigError, DataError, TaskError
from avss.evaluation import TaskResult, evaluate_task
from avss.models.load import Loaded, load_model
from avss.record import Plan
from tests.support.images import VISION

SEEING = [name for name, family in VISION.items() if not family.tower]
WORDS = ("cat", "dog")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {name: VISION[name].save(root / name) for name in SEEING}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of unequal sizes, six of each label, in a folder for each."""
    root, draw = tmp_path_factory.mktemp("data") / "animals", np.random.default_rng(0)
    for number in range(12):
        folder = root / WORDS[number % 2] / ("more" if number > 8 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16 + number, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def both(folder: Path, labels: tuple[str, ...] = ()) -> list[Loaded]:
    """A model and its cut by one block; with label words, its classifier's are these."""
    loaded = load_model(str(folder))
    if labels:
        loaded.model.config.id2label = dict(enumerate(labels))
        loaded.model.config.label2id = {label: index for index, label in enumerate(labels)}
    return [loaded, cut(loaded, Plan(num_blocks=len(loaded.stack), removed=(2,), method="explicit", rule="by hand"))]


def run(models: list[Loaded], kind: str, data: Path, **settings: object) -> list[TaskResult]:
    return evaluate_task(models, TaskConfig(kind=kind, data=str(data), **settings))


@torch.no_grad()
def by_hand(loaded: Loaded, folder: Path, files: list[Path]) -> list[dict[str, np.ndarray]]:
    """What transformers makes of each image alone."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    found = []
    for file in files:
        outputs = loaded.model(
            **processor(images=Image.open(file).convert("RGB"), return_tensors="pt"), output_hidden_states=True
        )
        found.append({name: value[0].double().numpy() for name, value in outputs.items() if torch.is_tensor(value)})
    return found


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_classifier_is_right_where_its_largest_logit_is(folders, labelled, batch_size):
    models = both(folders["vit"], ("dog", "Cat"))
    files = sorted(labelled.rglob("*.png"), key=lambda file: file.relative_to(labelled).as_posix())
    truth = np.array([("dog", "cat").index(file.relative_to(labelled).parts[0]) for file in files])
    for model, result in zip(models, run(models, "classification", labelled, batch_size=batch_size), strict=True):
        logits = np.stack([one["logits"] for one in by_hand(model, folders["vit"], files)])
        expected = logits.argmax(1) == truth
        np.testing.assert_array_equal(result.samples["accuracy"], expected)
        assert result["accuracy"].value == expected.mean()
        assert result["accuracy"].chance == 0.5
        own = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert result["loss"].value == pytest.approx(-np.log(own[np.arange(12), truth]).mean(), rel=1e-5)


def test_labels_may_be_numbers_or_named_in_the_task(folders, tmp_path, labelled):
    models = both(folders["vit"])
    root = tmp_path / "numbered"
    for place, word in enumerate(WORDS):
        (root / str(place)).mkdir(parents=True)
        for file in (labelled / word).rglob("*.png"):
            (root / str(place) / file.name).write_bytes(file.read_bytes())
    numbered = run(models, "classification", root)
    named = run(models, "classification", labelled, labels=WORDS)
    for one, two in zip(numbered, named, strict=True):
        assert one["accuracy"].value == two["accuracy"].value
        assert one["loss"].value == pytest.approx(two["loss"].value)
    with pytest.raises(DataError, match="is not one of the classifier's"):
        run(models, "classification", labelled)


@pytest.mark.parametrize("name", SEEING)
def test_similarity_is_the_cosine_of_mean_states(folders, labelled, name):
    models = both(folders[name])
    files = sorted(labelled.rglob("*.png"), key=lambda file: file.relative_to(labelled).as_posix())
    vectors = []
    for model in models:
        body = getattr(model.model, "vit", model.model)
        processor = transformers.AutoImageProcessor.from_pretrained(folders[name])
        rows = []
        for file in files:
            inputs = processor(images=Image.open(file).convert("RGB"), return_tensors="pt")
            with torch.no_grad():
                rows.append(body(pixel_values=inputs["pixel_values"]).last_hidden_state[0].double().mean(0).numpy())
        vectors.append(np.stack(rows))
    dense, smaller = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in vectors)
    first, second = run(models, "similarity", labelled, batch_size=5)
    assert first["cosine"].value == pytest.approx(1.0)
    assert second["cosine"].value == pytest.approx((dense * smaller).sum(1).mean(), rel=1e-5)
    nearest = [np.where(np.eye(12) > 0, -np.inf, one @ one.T).argmax(1) for one in (dense, smaller)]
    assert second["neighbour_agreement"].value == (nearest[0] == nearest[1]).mean()


@pytest.mark.parametrize("name", SEEING)
def test_speed_counts_images(folders, name):
    result = run(both(folders[name]), "speed", Path("builtin"), batch_size=2)[0]
    assert {one.metric: one.unit for one in result.measurements} == {"latency_ms": "ms", "throughput": "images/s"}
    assert all(one.value > 0 for one in result.measurements)


@pytest.mark.parametrize("kind", ["perplexity", "choice"])
def test_what_reads_text_is_refused(folders, labelled, kind):
    with pytest.raises(TaskError, match=f"`{kind}` reads text"):
        run(both(folders["vit"]), kind, labelled)


def test_a_bare_encoder_gives_no_labels(folders, labelled):
    with pytest.raises(TaskError, match="gives no labels"):
        run(both(folders["clip"]), "classification", labelled)


def test_an_image_outside_all_folders_has_no_label(folders, labelled, tmp_path):
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "1.png").write_bytes(next(labelled.rglob("*.png")).read_bytes())
    with pytest.raises(DataError, match="has no label"):
        run(both(folders["vit"]), "classification", stray)


def test_a_model_that_decodes_what_it_sees_is_refused(folders, labelled):
    loaded = load_model(str(folders["vit"]))
    loaded.model.config.is_encoder_decoder = True
    with pytest.raises(TaskError, match="decodes them"):
        run([loaded], "similarity", labelled)


def test_columns_are_refused_where_no_table_is_read(folders, labelled):
    with pytest.raises(ConfigError, match="--label-column"):
        choose_tasks([f"similarity={labelled}"], load_model(str(folders["vit"])), {"label_column": "label"})


def test_a_file_that_is_no_image_is_told_before_anything_is_run(folders, labelled, tmp_path):
    data = tmp_path / "animals"
    shutil.copytree(labelled, data)
    (data / "dog" / "zebra.png").write_text("no image")
    with pytest.raises(DataError, match=r"zebra\.png` cannot be read as an image"):
        run(both(folders["vit"], WORDS), "classification", data, limit=3)
