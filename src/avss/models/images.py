"""Images as a model reads them: its own image processor, and the places of the hidden state that an image takes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import AutoImageProcessor

from avss.errors import DataError, UnsupportedArchitectureError
from avss.models.forward import run_body
from avss.models.load import Loaded, first_line, quiet_transformers
from avss.models.stack import hooked

if TYPE_CHECKING:
    from PIL.Image import Image


def image_processor(loaded: Loaded) -> Callable[["Image"], Tensor]:
    """What turns an image into what the model reads, `[channel, height, width]`: the image processor saved with it.

    Of the processor's two kinds the one made with torchvision is taken where that is installed, else the one that needs
    nothing but Pillow, as transformers chooses.

    Raises:
        DataError: There is no image processor beside the model, or it cannot be loaded.
        UnsupportedArchitectureError: It makes something else of an image than one tensor of pixels. Raised by what is
            returned.
    """
    place = str(loaded.companions or getattr(loaded.model.config, "_name_or_path", ""))
    options = {} if loaded.companions or not loaded.revision else {"revision": loaded.revision}
    if not place:
        raise DataError(
            f"`{loaded.source}` has no image processor beside it, so no image can be read for it. Name the folder or "
            "hub id that holds the model and its `preprocessor_config.json`."
        )
    try:
        with quiet_transformers():
            processor = cast(Any, AutoImageProcessor).from_pretrained(place, **options)
    except ImportError as error:
        raise DataError(f"The image processor of `{loaded.source}` cannot be loaded: {first_line(error)}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"`{loaded.source}` has no image processor that can be loaded ({first_line(error)}), so no image can be "
            "read for it. Put its `preprocessor_config.json` beside the model."
        ) from error

    def process(image: "Image") -> Tensor:
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        if pixels.dim() != 4 or len(pixels) != 1:
            raise UnsupportedArchitectureError(
                f"`{type(processor).__name__}` makes {tuple(pixels.shape)} of one image, not [1, channel, height, "
                "width], so images cannot score this stack. Name the blocks that go: `--blocks`."
            )
        return pixels[0]

    return process


def count_places(loaded: Loaded, pixels: Tensor) -> int:
    """The places of the stack's hidden state that an image takes: T of `[B, T, D]`, told by running it once.

    Args:
        loaded: The model; the tower of it that runs the stack is run.
        pixels: An image as the model reads it, `[channel, height, width]`.

    Raises:
        UnsupportedArchitectureError: The stack does not run on images alone, or not on places beside each other.
    """
    tower = loaded.tower()
    lengths: list[int] = []
    reason = ""
    # A model's own code raises whatever it likes at what it does not read.
    try:
        with hooked(tower.stack, lambda index, before, after: lengths.append(after.shape[1])):
            run_body(tower, {"pixel_values": pixels[None]})
    except UnsupportedArchitectureError:
        raise
    except Exception as error:
        reason = first_line(error)
    if not lengths or reason or len(set(lengths)) > 1:
        reason = reason or ("its blocks do not run" if not lengths else f"its blocks see {sorted(set(lengths))} places")
        raise UnsupportedArchitectureError(
            f"The stack `{loaded.stack.path}` of `{type(loaded.model).__name__}` cannot be scored on images: {reason}. "
            "Name the blocks that go (`--blocks`), or choose another stack (`avss inspect` lists them)."
        )
    return lengths[0]
