"""What models are given one by one: texts, or images. In batches that they can read.

Shape letters: B batch, T token.
"""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from avss.config import TaskConfig
from avss.data.batches import Inputs
from avss.data.images import ImageFiles, check_images, find_images
from avss.data.sources import Row
from avss.errors import DataError
from avss.evaluation.base import data_source
from avss.evaluation.probes import in_batches
from avss.models.images import image_processor
from avss.models.load import Loaded

Batch = tuple[list[int], Inputs, Tensor | None]
"""Which items they are, what the model reads, and keep `[B, T]`; None where every place counts."""


class AbstractItems(abc.ABC):
    """Items in an order; a batch tells which of them it holds."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All items, each once, so many side by side at most."""


@final
@dataclasses.dataclass(frozen=True)
class TextItems(AbstractItems):
    """Texts.

    Attributes:
        sequences: Token ids `[T]` of each.
        pad_id: Fills up a batch; None where every batch is one text.
    """

    sequences: Sequence[Tensor]
    pad_id: int | None

    def __len__(self) -> int:
        """How many there are."""
        return len(self.sequences)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The longest first."""
        return in_batches(self.sequences, 1 if self.pad_id is None else batch_size, self.pad_id or 0)


@final
@dataclasses.dataclass(frozen=True)
class ImageItems(AbstractItems):
    """Images, opened when they are wanted.

    Attributes:
        images: As the model reads them.
    """

    images: ImageFiles

    def __len__(self) -> int:
        """How many there are."""
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """In order; images that come in another size than those beside them, in a batch of their own."""
        for start in range(0, len(self.images), batch_size):
            chosen = list(range(start, min(start + batch_size, len(self.images))))
            pixels = [self.images[index] for index in chosen]
            for size in dict.fromkeys(one.shape for one in pixels):
                alike = [place for place, one in enumerate(pixels) if one.shape == size]
                stacked = torch.stack([pixels[place] for place in alike])
                yield [chosen[place] for place in alike], {"pixel_values": stacked}, None


def image_items(models: Sequence[Loaded], files: Sequence[Path]) -> ImageItems:
    """Images for models that share the first one's image processor.

    Raises:
        DataError: There is none beside it.
    """
    return ImageItems(ImageFiles(files, image_processor(models[0])))


def image_files(task: TaskConfig) -> tuple[Path, ...]:
    """The image files of a task.

    Raises:
        DataError: None were named, there are none, or a file is no image.
    """
    if task.data == "builtin":
        raise DataError(
            f"The model reads images, and none come with avss. Give a folder of images: `--task {task.kind}=DIR`."
        )
    files = find_images(data_source(task)).files
    check_images(files)
    return files


def image_rows(task: TaskConfig) -> list[Row]:
    """The image files of a task with the label of each: the folder inside the data that it lies in.

    Raises:
        DataError: As `image_files`, or an image lies in no such folder.
    """
    root = Path(data_source(task)).expanduser()
    rows: list[Row] = []
    for file in image_files(task):
        inside = file.relative_to(root).parts if root.is_dir() else ()
        if len(inside) < 2:
            raise DataError(
                f"`{file}` has no label. Give a folder that holds a folder for each label, with its images inside: "
                f"`{root.name}/cat/1.png`."
            )
        rows.append({"text": str(file), "label": inside[0]})
    return rows
