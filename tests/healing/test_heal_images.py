"""Healing models that read images: the objective against transformers, an image at a time; and what is read when."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from avss.config import HealConfig
from avss.cut import cut
from avss.data.images import Images, find_images
from avss.errors import ConfigError, DataError
from avss.healing import heal
from avss.healing.images import prepare_images
from avss.healing.objectives import find_objective
from avss.healing.pair import Pair
from avss.healing.weights import choose_weights
from avss.models.load import Loaded, load_model
from avss.record import Plan
from tests.support.images import VISION, draw_images
from tests.support.oracles import state_copy

SEEING = [name for name, family in VISION.items() if not family.tower]
NUM_IMAGES = 40


@dataclasses.dataclass(frozen=True)
class Patient:
    """A dense model, its folder, the plan, and the smaller one."""

    folder: Path
    dense: Loaded
    smaller: Loaded
    plan: Plan


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Patient]:
    root = tmp_path_factory.mktemp("vision")

    def make(name: str) -> Patient:
        folder = root / name
        if not folder.exists():
            VISION[name].save(folder)
        dense = load_model(str(folder))
        plan = Plan(num_blocks=len(dense.stack), removed=(2,), method="explicit", rule="by hand")
        return Patient(folder, dense, cut(dense, plan), plan)

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return find_images(draw_images(tmp_path_factory.mktemp("data") / "pictures", NUM_IMAGES))


def settings(**more: object) -> HealConfig:
    common = {"budget": "2k", "batch_size": 4, "precision": "float32", "validations": 2}
    return HealConfig(**(common | more))


def test_images_are_dealt_out_once_and_held_out_ones_are_never_trained_on(seeing, pictures):
    one = seeing("vit")
    prepared = prepare_images(one.smaller, pictures, settings())
    assert (len(prepared.train), len(prepared.held_out)) == (32, 8)
    processor = transformers.AutoImageProcessor.from_pretrained(one.folder)
    known = [
        processor(images=Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        for file in pictures.files
    ]
    found = [next(place for place, one in enumerate(known) if torch.equal(one, pixels))
             for pixels in (*prepared.train, *prepared.held_out)]  # fmt: skip
    assert sorted(found) == list(range(NUM_IMAGES))
    assert prepared.facts.num_tokens == 32 * prepared.facts.seq_len == 32 * 17
    drawn = prepared.drawn(0, 32)
    assert sorted(draw.index for draw in drawn) == list(range(32))
    batch = prepared.batch(drawn[:3])
    assert torch.equal(batch.inputs["pixel_values"], torch.stack([prepared.train[draw.index] for draw in drawn[:3]]))
    assert batch.num_tokens == 3 * 17


@pytest.mark.parametrize("name", SEEING)
def test_the_objective_is_what_transformers_answers(seeing, pictures, name):
    one = seeing(name)
    prepared = prepare_images(one.smaller, pictures, settings())
    trained = choose_weights(one.dense, one.smaller, one.plan, "after", rank=4)
    pair = Pair(
        one.dense, one.smaller, one.plan,
        num_shared=trained.num_shared, needs_states=False, recompute=True, precision=None,
    )  # fmt: skip
    batch = prepared.batch(prepared.drawn(0, 5))
    with torch.no_grad():
        found = find_objective(pair, one.smaller, settings(), has_labels=False).loss(pair.run(batch), batch, 1 / 5)
    expected = []
    for index in range(5):
        with torch.no_grad():
            pixels = batch.inputs["pixel_values"][index : index + 1]
            d, s = (side.model(pixel_values=pixels) for side in (one.dense, one.smaller))
        if "logits" in d:
            p, q = (side.logits[0].double().softmax(-1) for side in (d, s))
            expected.append(float((p * (p / q).log()).sum()))
            continue
        d, s = (side.last_hidden_state[0].double().numpy() for side in (d, s))
        near = d.mean(0) @ s.mean(0) / np.linalg.norm(d.mean(0)) / np.linalg.norm(s.mean(0))
        expected.append(np.mean(((s - d) ** 2).sum(-1) / (d**2).sum(-1)) + 1 - near)
    assert found.value == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", SEEING)
def test_healing_brings_held_out_images_nearer(seeing, pictures, name):
    one = seeing(name)
    before = state_copy(one.smaller.model)
    healed, healing, _ = heal(
        one.dense, one.smaller, one.plan, pictures, settings(budget="12k", learning_rate=1e-3, validations=6)
    )
    assert healing.kept
    assert healing.num_tokens >= 12_000
    assert min(point.loss for point in healing.validation) < healing.validation[0].loss
    assert healing.data.layout == "images"
    for key, tensor in before.items():
        torch.testing.assert_close(one.smaller.model.state_dict()[key], tensor, rtol=0, atol=0)
    changed = {key for key, tensor in healed.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert any(key.startswith(f"{one.smaller.stack.path}.2.") for key in changed)
    assert not any("embedding" in key for key in changed)


def test_the_same_images_and_seed_give_the_same_weights(seeing, pictures):
    one = seeing("vit")
    first, second = (
        heal(one.dense, one.smaller, one.plan, pictures, settings(budget="1k", learning_rate=1e-3))[0] for _ in "ab"
    )
    for key, tensor in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("more", [{"seq_len": 32}, {"augment": 0.5}, {"forms": ("It is {text}.",)}])
def test_what_only_a_text_has_is_refused(seeing, pictures, more):
    one = seeing("vit")
    with pytest.raises(ConfigError, match="images"):
        heal(one.dense, one.smaller, one.plan, pictures, settings(**more))


def test_one_image_is_too_few(seeing, pictures):
    one = seeing("vit")
    with pytest.raises(DataError, match="gives 1 image"):
        heal(one.dense, one.smaller, one.plan, Images(pictures.files[:1], "one"), settings())


def test_a_file_that_is_no_image_is_told_before_healing(seeing, tmp_path):
    folder = draw_images(tmp_path / "pictures", 12)
    (folder / "zebra.png").write_text("no image")
    one = seeing("vit")
    with pytest.raises(DataError, match=r"zebra\.png` cannot be read as an image"):
        heal(one.dense, one.smaller, one.plan, find_images(folder), settings())


def test_images_of_several_sizes_are_told_before_healing(seeing, pictures):
    one = seeing("vit")
    file = one.folder / "preprocessor_config.json"
    whole = file.read_text()
    try:
        file.write_text(whole[:-1] + ', "do_resize": false}')
        with pytest.raises(DataError, match="differ"):
            heal(one.dense, one.smaller, one.plan, pictures, settings())
    finally:
        file.write_text(whole)
