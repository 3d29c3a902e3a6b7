"""The images to heal on: what is trained on and what is held out, drawn from a seed and opened when they are read."""

import numpy as np

from avss.config import HealConfig, refuse_unread
from avss.data.batches import check_one_size
from avss.data.images import ImageFiles, Images, check_images, image_facts
from avss.errors import DataError
from avss.healing.text import HealingText
from avss.models.images import count_places, image_processor
from avss.models.load import Loaded
from avss.record import DataFacts

STEP_IMAGES = 16
"""Images in a step of the optimiser, where no number is asked for."""
HELD_OUT_IMAGES = 128
"""Images held out, at most a fifth of all, likewise."""

_LOOKED_AT = 32
"""Training images whose size is looked at beforehand."""
_OF_TEXT = ("seq_len", "short", "augment", "forms", "written")


def prepare_images(loaded: Loaded, images: Images, config: HealConfig) -> HealingText:
    """Sets a part of the images aside.

    Args:
        loaded: The model.
        images: Where from.
        config: `batch_size`, `held_out` and `seed` count.

    Raises:
        ConfigError: It asks for what only a text has.
        DataError: Fewer than two images, a file that is none, images that come in different sizes, or no image
            processor.
    """
    usual = HealConfig()
    changed = {name: value for name in _OF_TEXT if (value := getattr(config, name)) != getattr(usual, name)}
    refuse_unread(changed, "text, and this model reads images")
    total = len(images.files)
    if total < 2:
        raise DataError(
            f"`{images.source}` gives {total} image{'s' if total != 1 else ''}, and healing needs one to train on and "
            "one held out at least. Give more images."
        )
    check_images(images.files)
    order = np.random.default_rng(config.seed).permutation(total)
    num_held_out = min(config.held_out or HELD_OUT_IMAGES, max(1, total // 5))
    process = image_processor(loaded)
    held_out, train = (
        ImageFiles([images.files[index] for index in sorted(chosen)], process)
        for chosen in (order[:num_held_out], order[num_held_out:])
    )
    # Those of another shape, if there are any, are most likely among the first.
    first, *others = (train[index] for index in range(min(_LOOKED_AT, len(train))))
    check_one_size([tuple(one.shape[1:]) for one in (first, *others)], images.source)
    num_places = count_places(loaded, first)

    def facts(some: ImageFiles) -> DataFacts:
        return image_facts(
            images.source,
            first,
            num_places,
            len(some),
            batch_size=config.batch_size or STEP_IMAGES,
            seed=config.seed,
            content_hash=some.content_hash(),
        )

    return HealingText(
        train=train,
        held_out=held_out,
        train_labels=None,
        held_out_labels=None,
        mask_id=None,
        special_ids=(),
        pad_id=0,
        seed=config.seed,
        augmentation=None,
        facts=facts(train),
        held_out_facts=facts(held_out),
    )
