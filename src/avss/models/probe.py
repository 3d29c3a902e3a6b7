"""Inputs that any model can be run on: drawn token ids, images or sound, of the shapes its config asks for."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from avss.errors import UnsupportedArchitectureError
from avss.models.load import Loaded
from avss.models.stack import config_tree

Inputs = dict[str, Tensor]
"""Keyword arguments of a model's forward."""

_GRID = 3
"""Patches on a side of an image that is given as patches."""

LENGTH = 12
"""Tokens of a probe: beyond the windows of tiny models, and cheap for large ones."""


def probe_inputs(loaded: Loaded, *, num_sequences: int = 2, length: int = LENGTH, seed: int = 0) -> Inputs:
    """Inputs on which every block of the chosen stack runs, the last sequence padded where the model reads a mask.

    Args:
        loaded: The model, and the stack that must run.
        num_sequences: Sequences, images or sounds.
        length: Tokens of each.
        seed: Of the draw.

    Raises:
        UnsupportedArchitectureError: The model asks for something that avss cannot make up.
    """
    model = loaded.model
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    main = _main_input(model, accepted)
    inputs: Inputs = {}
    length = min(length, loaded.max_len or length)
    if loaded.pad_id is None:
        num_sequences = 1
    if main in ("input_ids", "decoder_input_ids"):
        inputs["input_ids"] = _token_ids(loaded, num_sequences, length, generator)
        keep = _keep(num_sequences, length)
        if "attention_mask" in accepted:
            inputs["attention_mask"] = keep
        if loaded.head == "classifier":
            _end(inputs["input_ids"], keep, loaded)
    elif main == "pixel_values":
        inputs |= _image(model, accepted, num_sequences, generator)
    elif main in ("input_features", "input_values"):
        inputs[main] = _sound(model, main, num_sequences, generator)
        if "input_features_mask" in accepted:
            inputs["input_features_mask"] = torch.ones((num_sequences, inputs[main].shape[-1]), dtype=torch.long)
    else:
        raise UnsupportedArchitectureError(
            f"`{type(model).__name__}` reads `{main}`, which avss cannot make up, so a cut could not be proven. Text, "
            "images and sound can be."
        )
    if "input_ids" not in inputs and _must_have(accepted, "input_ids"):
        inputs["input_ids"] = _token_ids(loaded, num_sequences, length, generator)
    if "pixel_values" not in inputs and _needs_pixels(model, loaded):
        inputs["pixel_values"] = _pixels(model, num_sequences, generator)
    if (
        "decoder_input_ids" in accepted
        and getattr(model.config, "is_encoder_decoder", False)
        and (loaded.head != "classifier")
    ):
        inputs["decoder_input_ids"] = _token_ids(loaded, num_sequences, length, generator)
    device = loaded.device if loaded.device.type != "meta" else "cpu"
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def brief_inputs(loaded: Loaded) -> Tensor | Inputs:
    """The cheapest that runs the blocks: a few token ids `[1, T]`, or drawn images where the stack reads those."""
    return probe_inputs(loaded) if loaded.reads_images else torch.arange(min(4, loaded.vocabulary))[None]


def _main_input(model: PreTrainedModel, accepted: Any) -> str:
    """What the model reads, by its own word; towers often inherit that word and read something else."""
    if model.main_input_name in accepted:
        return model.main_input_name
    others = ("pixel_values", "input_features", "input_values")
    return next((name for name in others if name in accepted), model.main_input_name)


def _must_have(accepted: Any, name: str) -> bool:
    return name in accepted and accepted[name].default is inspect.Parameter.empty


def _needs_pixels(model: PreTrainedModel, loaded: Loaded) -> bool:
    """CLIP and its kin compare text with images, and run on nothing less than both."""
    return (
        "pixel_values" in inspect.signature(model.forward).parameters
        and hasattr(model, "get_image_features")
        and (hasattr(model, "logit_scale"))
    )


def _token_ids(loaded: Loaded, num_sequences: int, length: int, generator: torch.Generator) -> Tensor:
    special = _special_ids(loaded.model.config)
    # A model without a table of tokens (CANINE) reads characters.
    usual = [token for token in range(min(loaded.vocabulary, 50_000) or 128) if token not in special]
    chosen = torch.randint(len(usual), (num_sequences, length), generator=generator)
    return torch.tensor(usual)[chosen]


def _special_ids(config: PretrainedConfig) -> set[int]:
    """Ids that stand for something else than text: padding, image places, ends."""
    found: set[int] = set()
    for inner in config_tree(config).values():
        for name, value in vars(inner).items():
            if name.endswith(("token_id", "token_index")):
                found |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return found


def _keep(num_sequences: int, length: int) -> Tensor:
    keep = torch.ones((num_sequences, length), dtype=torch.long)
    if num_sequences > 1:
        keep[-1, length - max(1, length // 4) :] = 0
    return keep


def _end(token_ids: Tensor, keep: Tensor, loaded: Loaded) -> None:
    """Ends every text as a classifier expects: with the end token, then padding."""
    text = loaded.model.config.get_text_config(decoder=True)
    end, pad = getattr(text, "eos_token_id", None), loaded.pad_id
    if isinstance(end, int):
        token_ids[torch.arange(len(keep)), keep.sum(1) - 1] = end
    if pad is not None:
        token_ids[keep == 0] = pad


def _size(config: PretrainedConfig, *names: str, default: int) -> int:
    for inner in config_tree(config).values():
        for name in names:
            value = getattr(inner, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return default


def _image(model: PreTrainedModel, accepted: Any, num_sequences: int, generator: torch.Generator) -> Inputs:
    """Images, whole or, where the model reads images of any shape, as a list of patches with their rows and columns."""
    if "spatial_shapes" not in accepted:
        return {"pixel_values": _pixels(model, num_sequences, generator)}
    values = _size(model.config, "num_channels", default=3) * _size(model.config, "patch_size", default=16) ** 2
    shape = (num_sequences, _GRID * _GRID, values)
    return {
        "pixel_values": torch.randn(shape, generator=generator).to(model.dtype),
        "pixel_attention_mask": torch.ones(shape[:2], dtype=torch.long),
        "spatial_shapes": torch.full((num_sequences, 2), _GRID),
    }


def _pixels(model: PreTrainedModel, num_sequences: int, generator: torch.Generator) -> Tensor:
    side = _size(model.config, "image_size", "img_size", default=32)
    channels = _size(model.config, "num_channels", "in_channels", "num_image_channels", default=3)
    return torch.randn((num_sequences, channels, side, side), generator=generator).to(model.dtype)


def _sound(model: PreTrainedModel, name: str, num_sequences: int, generator: torch.Generator) -> Tensor:
    config = model.config
    # Convolutions over the raw wave come before the blocks, whatever bins the model writes.
    if name == "input_values" and (hasattr(config, "conv_kernel") or not hasattr(config, "num_mel_bins")):
        return torch.randn((num_sequences, 2000), generator=generator).to(model.dtype)
    names = ("num_mel_bins", "input_feat_per_channel", "input_dim", "feature_projection_input_dim")
    bins = _size(config, *names, default=80)
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        # Whisper reads windows of one fixed length, two frames a position, bins first.
        return torch.randn((num_sequences, bins, 2 * config.max_source_positions), generator=generator).to(model.dtype)
    # Spectrogram transformers cut a picture of one fixed length into patches.
    frames = config.max_length if hasattr(config, "time_stride") else 64
    return torch.randn((num_sequences, frames, bins), generator=generator).to(model.dtype)
