"""Drawn images, and tiny vision models saved with an image processor, as they come from the hub."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tools.sweep.shrink import small_model

SIDE = 16


def draw_images(folder: Path, num: int = 6, *, seed: int = 0) -> Path:
    """A folder with so many images of noise, of unequal sizes, some in a folder inside."""
    draw = np.random.default_rng(seed)
    (folder / "inside").mkdir(parents=True)
    for number in range(num):
        pixels = draw.integers(0, 256, (18 + 2 * number, 24, 3), dtype=np.uint8)
        name = f"{number}.{'png' if number % 2 else 'JPG'}"
        Image.fromarray(pixels).save(folder / ("inside" if number % 3 == 0 else ".") / name)
    return folder


@dataclasses.dataclass(frozen=True)
class Vision:
    """A vision model or a model with a vision tower.

    Attributes:
        class_name: Of transformers.
        model_type: Its config's.
        processor: Its image processor, as `preprocessor_config.json` tells it.
        tower: Path of the part that runs on images alone; empty for the whole.
        blocks: Path of the blocks inside that part.
        stack: What `--stack` must be called with.
        settings: Of the config.
    """

    class_name: str
    model_type: str
    processor: Mapping[str, Any]
    blocks: str
    tower: str = ""
    stack: str = "auto"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> transformers.PreTrainedModel:
        """A tiny model with drawn weights."""
        return small_model(getattr(transformers, self.class_name), self.model_type, **self.settings)

    def save(self, folder: Path) -> Path:
        """Writes model and image processor."""
        self.build().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(dict(self.processor)), encoding="utf-8")
        return folder


_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
_CLIP = {"image_processor_type": "CLIPImageProcessor", **_CROPPED}

VISION: dict[str, Vision] = {
    "vit": Vision(
        "ViTForImageClassification", "vit", {"image_processor_type": "ViTImageProcessor", **_SQUARE}, "vit.layers"
    ),
    "dinov2": Vision(
        "Dinov2Model", "dinov2", {"image_processor_type": "BitImageProcessor", **_CROPPED}, "encoder.layer"
    ),
    "clip": Vision("CLIPVisionModel", "clip_vision_model", _CLIP, "encoder.layers"),
    "clip-both": Vision("CLIPModel", "clip", _CLIP, "encoder.layers", tower="vision_model", stack="vision"),
    "siglip": Vision(
        "SiglipVisionModel",
        "siglip_vision_model",
        {"image_processor_type": "SiglipImageProcessor", **_SQUARE},
        "encoder.layers",
    ),
    "llava": Vision(
        "LlavaForConditionalGeneration", "llava", _CLIP, "encoder.layers", tower="model.vision_tower", stack="vision"
    ),
}
"""Name -> a family."""
