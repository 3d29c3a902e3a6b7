"""Images -> what a model reads: which files, which of them, and what is said where there are none."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from avss.data.batches import interleave
from avss.data.images import find_images, image_batches, open_image
from avss.errors import ConfigError, DataError, UnsupportedArchitectureError
from avss.models.images import count_places, image_processor
from avss.models.load import adopt, load_model
from tests.support.architectures import stored
from tests.support.images import VISION, draw_images


def pixels_of(image: Image.Image) -> torch.Tensor:
    """The image itself, for a processor: `[channel, height, width]`."""
    return torch.tensor(np.array(image)).permute(2, 0, 1).float()


def batches_of(images, process=pixels_of, **changes):
    settings = {"samples": 8, "batch_size": 2, "seed": 0}
    return image_batches(images, process, lambda pixels: 5, **(settings | changes))


def square(image: Image.Image) -> torch.Tensor:
    return pixels_of(image.resize((8, 8)))


# --- files ---


def test_a_folder_is_read_in_one_order_with_the_folders_inside(tmp_path):
    folder = draw_images(tmp_path / "pictures", 6)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes((folder / "1.png").read_bytes())
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes((folder / "1.png").read_bytes())
    found = find_images(folder)
    names = [file.relative_to(folder).as_posix() for file in found.files]
    assert names == ["1.png", "2.JPG", "4.JPG", "5.png", "inside/0.JPG", "inside/3.png"]
    assert found.source == "pictures"


def test_one_file_or_a_list_of_files(tmp_path):
    folder = draw_images(tmp_path / "pictures", 3)
    assert find_images(str(folder / "1.png")).files == (folder / "1.png",)
    listed = find_images([folder / "2.JPG", str(folder / "1.png")])
    assert listed.files == (folder / "2.JPG", folder / "1.png")
    assert listed.source == "2 images"


def test_no_images_are_said_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    for source, reason in (
        (tmp_path / "empty", "`empty` holds no image"),
        (tmp_path / "notes.txt", "`notes.txt` is no image"),
        (tmp_path / "missing", "There is no file or folder"),
        ([], "The list of images is empty"),
    ):
        with pytest.raises(DataError, match=reason):
            find_images(source)


# --- one image ---


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(np.array(image), k=-1)
    assert np.array_equal(np.array(open_image(tmp_path / "turned.png")), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_kind_of_image_becomes_red_green_and_blue(tmp_path, mode):
    Image.new(mode, (3, 2)).save(tmp_path / "one.png")
    assert (open_image(tmp_path / "one.png").mode, open_image(tmp_path / "one.png").size) == ("RGB", (3, 2))


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(DataError, match=r"broken.png` cannot be read as an image"):
        open_image(tmp_path / "broken.png")


def test_without_pillow_its_name_is_told(tmp_path, monkeypatch):
    folder = draw_images(tmp_path / "pictures", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install pillow"):
        find_images(folder)


# --- batches ---


def test_batches_hold_the_drawn_images(tmp_path):
    found = find_images(draw_images(tmp_path / "pictures", 5))
    batches = batches_of(found, square, samples=3)
    order = np.random.default_rng(0).permutation(5)[:3]
    expected = torch.stack([square(Image.open(found.files[index]).convert("RGB")) for index in order])
    assert torch.equal(torch.cat([inputs["pixel_values"] for inputs, _ in batches]), expected)
    assert [tuple(keep.shape) for _, keep in batches] == [(2, 5), (1, 5)]
    assert all(bool(keep.all()) for _, keep in batches)
    facts = batches.facts
    assert (facts.num_sequences, facts.seq_len, facts.num_tokens, facts.image_size) == (3, 5, 15, (8, 8))
    assert facts.describe() == "3 images of 8 x 8 pixels, 5 places of the stack each"


def test_parts_of_images_are_counted_anew(tmp_path):
    batches = batches_of(find_images(draw_images(tmp_path / "pictures", 5)), square)
    first, rest = batches.split(2)
    assert [(one.facts.num_sequences, one.facts.num_tokens, one.facts.seq_len) for one in (first, rest)] == [
        (2, 10, 5),
        (3, 15, 5),
    ]
    assert len({one.facts.content_hash for one in (batches, first, rest)}) == 3
    assert len(batches.first(11).sequences) == 2
    with pytest.raises(DataError, match="gives 5 images"):
        batches.split(5)


def test_folders_of_images_take_turns(tmp_path):
    parts = [batches_of(find_images(draw_images(tmp_path / name, 2, seed=seed)), square) for seed, name in
             enumerate(("one", "other"))]  # fmt: skip
    both = interleave(parts)
    assert both.facts.source == "one, other"
    assert (both.facts.num_sequences, both.facts.num_tokens) == (4, 20)
    assert torch.equal(both.sequences[1], parts[1].sequences[0])


def test_every_part_of_unequal_texts_is_a_mixture(tmp_path):
    parts = [batches_of(find_images(draw_images(tmp_path / name, num, seed=seed)), square) for seed, (name, num) in
             enumerate({"one": 2, "other": 8}.items())]  # fmt: skip
    both = interleave(parts)
    first = {tuple(one.flatten().tolist()) for one in parts[0].sequences}
    places = [place for place, one in enumerate(both.sequences) if tuple(one.flatten().tolist()) in first]
    assert len(both.sequences) == 10
    assert [place // 5 for place in places] == [0, 1]


def test_images_of_two_shapes_fit_into_no_batch(tmp_path):
    one, other = (find_images(draw_images(tmp_path / name, num)) for name, num in (("one", 1), ("other", 2)))
    with pytest.raises(DataError, match="24 x 18 and 24 x 20"):
        batches_of(other)
    with pytest.raises(DataError, match="`one, one` differ"):
        interleave([batches_of(one), batches_of(one, square)])


def test_images_are_no_text(tmp_path):
    batches = batches_of(find_images(draw_images(tmp_path / "pictures", 2)), square)
    with pytest.raises(DataError, match="holds images, and text is needed"):
        list(batches.tokens())


@pytest.mark.parametrize("name", ["samples", "batch_size"])
def test_counts_are_positive(tmp_path, name):
    with pytest.raises(ConfigError, match="must be at least 1"):
        batches_of(find_images(draw_images(tmp_path / "pictures", 1)), square, **{name: 0})


# --- what the model makes of them ---


def test_a_model_object_has_no_image_processor_beside_it():
    model = adopt(stored("bert"))
    with pytest.raises(DataError, match="no image processor beside it"):
        image_processor(model)


@pytest.mark.parametrize("content", [None, "{", '{"image_processor_type": "NoSuchImageProcessor"}'])
def test_an_image_processor_that_is_missing_or_broken(tmp_path, content):
    folder = VISION["clip"].save(tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    if content:
        (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(DataError, match=r"preprocessor_config.json` beside the model"):
        image_processor(load_model(folder))


def test_an_image_processor_that_makes_tiles_is_refused(tmp_path):
    folder = VISION["clip"].save(tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16, '
        '"image_grid_pinpoints": [[16, 32]]}'
    )
    process = image_processor(load_model(folder))
    with pytest.raises(UnsupportedArchitectureError, match=r"not \[1, channel, height, width\].*--blocks"):
        process(Image.new("RGB", (20, 20)))


def test_the_processor_inside_a_whole_models_processor_is_found(tmp_path):
    folder = VISION["clip"].save(tmp_path / "clip")
    inner = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(
        f'{{"image_processor": {inner}, "processor_class": "LlavaProcessor"}}'
    )
    assert image_processor(load_model(folder))(Image.new("RGB", (20, 30))).shape == (3, 16, 16)


def test_a_stack_that_does_not_run_on_images_alone_is_refused(tmp_path):
    loaded = load_model(VISION["clip"].save(tmp_path / "clip"))
    assert count_places(loaded, torch.zeros(3, 16, 16)) == 17
    with pytest.raises(UnsupportedArchitectureError, match=r"cannot be scored on images: .*--blocks"):
        count_places(loaded, torch.zeros(3, 12, 16))
