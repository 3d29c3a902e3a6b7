"""Reads images from where users keep them: one file, several, or a folder with any folders inside."""

import contextlib
import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from torch import Tensor

from avss.data.batches import Batches, check_one_size, content_hash
from avss.errors import ConfigError, DataError
from avss.record import DataFacts

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Endings that are taken for images; of a moving image its first frame."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files and where they came from.

    Attributes:
        files: At least one, in a fixed order.
        source: As the user named it; a path by its last part.
    """

    files: tuple[Path, ...]
    source: str


def find_images(source: str | Path | Sequence[str | Path]) -> Images:
    """The image files of a source.

    Args:
        source: An image file, a folder (files and folders whose name begins with a dot are no part of it), or a list
            of image files.

    Raises:
        DataError: Missing, no image by its ending, or a folder without any; or Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise DataError("Reading images needs Pillow, which is not installed. Run `pip install pillow`.")
    if not isinstance(source, str | Path):
        files = tuple(file for one in source for file in find_images(one).files)
        if not files:
            raise DataError("The list of images is empty. Give at least one image file.")
        return Images(files=files, source=f"{len(files)} images")
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
        files = tuple(file for file in inside if _is_image(file) and not _is_hidden(file.relative_to(path)))
    elif path.exists():
        files = (path,) if _is_image(path) else ()
    else:
        raise DataError(
            f"There is no file or folder `{source}`. The model reads images: give a folder of them, or one file."
        )
    if not files:
        raise DataError(
            f"`{path.name}` {'holds' if path.is_dir() else 'is'} no image by its ending, and the model reads images. "
            f"Give a folder of them, or one file: {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return Images(files=files, source=path.name)


def holds_images(source: str | Path) -> bool:
    """Whether a source is an image file, or a folder with one in it; it may be a text's as well, or no file at all."""
    path = Path(source).expanduser()
    return _is_image(path) or (path.is_dir() and any(map(_is_image, path.rglob("*"))))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def open_image(path: Path) -> "Image":
    """The image in red, green and blue, turned as its camera says.

    Raises:
        DataError: The file is no image.
    """
    from PIL import Image, ImageOps  # only images need it

    with _readable(path), Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def check_images(files: Iterable[Path]) -> None:
    """Looks at the head of each file: what is no image shall not show after hours of other work.

    Raises:
        DataError: A file is none.
    """
    from PIL import Image  # only images need it

    for path in files:
        with _readable(path), Image.open(path) as image:
            image.verify()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    # Pillow raises whatever its many readers raise; to the user they all mean: this is no readable image.
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"`{path}` cannot be read as an image: {reason}. Replace it, or take it away.") from error


class ImageFiles(Sequence[Tensor]):
    """Images as a model reads them, `[channel, height, width]` each; a file is opened each time it is asked for.

    Args:
        files: The images.
        process: An image as the model reads it.
    """

    def __init__(self, files: Sequence[Path], process: "Callable[[Image], Tensor]") -> None:
        self._files, self._process = tuple(files), process

    def __len__(self) -> int:
        """How many there are."""
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageFiles": ...
    def __getitem__(self, index: int | slice) -> "Tensor | ImageFiles":
        """One image, or some of them unopened."""
        if isinstance(index, slice):
            return ImageFiles(self._files[index], self._process)
        return self._process(open_image(self._files[index]))

    def content_hash(self) -> str:
        """SHA-256 over the bytes of the files, 16 hex digits."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:16]


def image_facts(
    source: str, pixels: Tensor, num_places: int, count: int, *, batch_size: int, seed: int, content_hash: str
) -> DataFacts:
    """Images for the record.

    Args:
        source: Their name.
        pixels: One of them as the model reads it, `[channel, height, width]`; all have its size.
        num_places: Places of the hidden state that each takes.
        count: How many there are.
        batch_size: Images in a forward pass, or in a step of healing.
        seed: Of their draw.
        content_hash: Of all of them.
    """
    _, height, width = pixels.shape
    return DataFacts(
        source=source,
        layout="images",
        image_size=(height, width),
        num_sequences=count,
        seq_len=num_places,
        num_tokens=count * num_places,
        batch_size=batch_size,
        seed=seed,
        content_hash=content_hash,
    )


def image_batches(
    images: Images,
    process: Callable[["Image"], Tensor],
    count_places: Callable[[Tensor], int],
    *,
    samples: int,
    batch_size: int,
    seed: int,
) -> Batches:
    """Batches of a seeded draw of images.

    Args:
        images: Where from.
        process: An image as the model reads it, `[channel, height, width]`: its own image processor.
        count_places: How many places of the hidden state such an image takes.
        samples: Images wanted; all there are, if fewer.
        batch_size: Images in a forward pass.
        seed: Of the draw.

    Raises:
        ConfigError: A count is not positive.
        DataError: A file is no image, or the images come in different sizes.
    """
    for name, value in (("samples", samples), ("batch-size", batch_size)):
        if value < 1:
            raise ConfigError(f"`--{name} {value}` must be at least 1.")
    chosen = np.random.default_rng(seed).permutation(len(images.files))[:samples]
    pixels = tuple(process(open_image(images.files[index])) for index in chosen)
    check_one_size([tuple(one.shape[1:]) for one in pixels], images.source)
    facts = image_facts(
        images.source,
        pixels[0],
        count_places(pixels[0]),
        len(pixels),
        batch_size=batch_size,
        seed=seed,
        content_hash=content_hash(pixels),
    )
    return Batches(sequences=pixels, batch_size=batch_size, pad_id=0, facts=facts)
