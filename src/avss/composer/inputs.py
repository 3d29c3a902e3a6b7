"""Models and texts as users name them -> what the stages take."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import psutil
import torch
from torch import Tensor

from avss.composer.disk import OVERHEAD_BYTES, memory_to_load, size_text, stored_size
from avss.config import DataConfig, ModelConfig, build
from avss.data.augment import augmentation
from avss.data.batches import Batches, Layout, interleave, make_batches, need_tokenizer
from avss.data.images import find_images, image_batches
from avss.data.sources import read_texts, split_sources
from avss.errors import ConfigError, DataError
from avss.models.images import count_places, image_processor
from avss.models.load import Loaded, adopt, load_model
from avss.models.probe import probe_inputs
from avss.models.stack import AUTO
from avss.models.verify import Batch
from avss.output import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AnyModel = Union[str, Path, "PreTrainedModel", Loaded]
"""A hub id, a folder, a GGUF file, a transformers model object, or what `load` returned."""


def checkpoint_folder(source: str | Path) -> Path:
    """A folder as it is named, or, of what `avss run` wrote, the one with the smaller model."""
    folder = Path(source).expanduser()
    inner = folder / "model"
    return inner if not (folder / "config.json").is_file() and (inner / "config.json").is_file() else folder


def load(
    model: AnyModel,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    head: str = "auto",
    or_disk: bool = False,
    **settings: Any,
) -> Loaded:
    """Loads a model by name, or wraps one that is loaded already.

    Args:
        model: Hub id, folder (of a checkpoint, or what `avss run` wrote), GGUF file, a model object, or what this
            function returned, of which `stack` alone can still be chosen.
        tokenizer: For a model object: its tokenizer.
        head: `auto`, or what to use it as: causal, masked, classifier, image-classifier, encoder, seq2seq.
        or_disk: Whether a model that does not fit is left on disk, to be read a block at a time, where `device` is
            `auto`; for what can be done so (`avss.models.load.Loaded.check_in_memory`).
        **settings: `dtype`, `device`, `revision`, `trust_remote_code`, `stack`; see `avss.config.ModelConfig`.

    Raises:
        ModelLoadError: It cannot be read.
    """
    if isinstance(model, Loaded):
        stack = settings.get("stack", AUTO)
        return model if stack == AUTO else dataclasses.replace(model, stack_name=stack)
    if isinstance(model, torch.nn.Module):
        return adopt(model, tokenizer, head=head, stack=settings.get("stack", AUTO))
    folder = checkpoint_folder(model)
    config = build(ModelConfig, {"source": str(folder if folder.is_dir() else model), "head": head, **settings})
    note = too_large(config) if or_disk and config.device == "auto" else None
    device = "disk" if note else config.device
    loaded = load_model(
        config.source,
        head=config.head,
        dtype=config.dtype,
        device=device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        stack=config.stack,
        scratch=scratch_folder("blocks") if device.partition(":")[0] == "disk" else None,
    )
    return dataclasses.replace(loaded, note=note)


def too_large(config: ModelConfig) -> str | None:
    """None where a model fits the machine; otherwise a sentence that says why its blocks stay on disk."""
    stored = stored_size(config.source, config.revision)
    if stored is None:
        return None
    num_values, num_bytes = stored
    free = psutil.virtual_memory().available
    if torch.cuda.is_available():
        # Through memory as it is stored, and then to the GPU.
        width = 4 if config.dtype == "float32" else 2 if config.dtype != "auto" else round(num_bytes / num_values)
        asked = [(width * num_values, torch.cuda.mem_get_info()[0], "on the GPU")]
        asked.append((OVERHEAD_BYTES + num_bytes, free, "in memory"))
    else:
        width = 2 if config.dtype in ("bfloat16", "float16") else 4
        asked = [(memory_to_load(num_values, num_bytes, width=width), free, "in memory")]
    for needed, there, where in asked:
        if needed > there:
            return (
                f"The model takes about {size_text(needed)} {where} and {size_text(there)} are free: its blocks stay "
                "on disk, and each is read when it runs. Larger batches (`--batch-size`) read them less often."
            )
    return None


def calibration(loaded: Loaded, data: DataConfig | str | Sequence[str] = "builtin", **settings: Any) -> Batches:
    """The batches a model is scored on.

    Args:
        loaded: The model.
        data: A source (`avss.data.sources`), several separated by commas, a list of texts, or a whole `DataConfig`.
            Several sources give equal shares, and their sequences take turns. For a stack that reads images: folders
            of images or image files, or a list of files (`avss.data.images`).
        **settings: `samples`, `seq_len`, `batch_size`, `seed`, `layout`, `augment`, `forms`, and
            `written`, which a repair reads.

    Raises:
        DataError: The text cannot be read or is too short, or there is no image.
    """
    if isinstance(data, DataConfig):
        if settings:
            names = ", ".join(f"`{name}`" for name in settings)
            raise ConfigError(f"{names} stands beside a whole `DataConfig`, which says it already. Set it in there.")
        config, source = data, data.source
    else:
        is_name = isinstance(data, str | Path)
        config = build(DataConfig, {**({"source": str(data)} if is_name else {}), **settings})
        source = config.source if is_name else data
    parts = split_sources(source) if isinstance(source, str | Path) else ()
    if len(parts) > 1:
        return interleave(
            [
                calibration(
                    loaded, config.model_copy(update={"source": part, "samples": _share(config.samples, place, parts)})
                )
                for place, part in enumerate(parts)
                if _share(config.samples, place, parts)
            ]
        )
    if loaded.reads_images:
        return _images(loaded, source, config)
    layout: Layout = config.layout if config.layout != "auto" else "packed" if loaded.head == "causal" else "padded"
    tokenizer = need_tokenizer(loaded.tokenizer, loaded.source)
    batches = make_batches(
        read_texts(source),
        tokenizer,
        layout=layout,
        samples=config.samples,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        max_len=loaded.max_len,
    )
    rewriting = augmentation(tokenizer, loaded.head, config.augment, layout, forms=config.forms or ())
    return dataclasses.replace(batches.padded_with(loaded.pad_id), augmentation=rewriting)


def _images(loaded: Loaded, source: str | Sequence[str], config: DataConfig) -> Batches:
    """The batches of images that a tower is scored on."""
    reader = f"The stack `{loaded.stack.path}` of `{type(loaded.model).__name__}` reads images"
    usual = DataConfig()
    if config.forms:
        raise ConfigError(f"{reader}, and `--form` is for text. Leave it out.")
    for name in ("seq_len", "layout", "augment", "short"):
        if getattr(config, name) != getattr(usual, name):
            raise ConfigError(f"{reader}, and `--{name.replace('_', '-')}` is for text. Leave it out.")
    if isinstance(source, str) and source.partition(":")[0] == "builtin" and not Path(source).exists():
        raise DataError(
            f"{reader}, and none come with avss. Give a folder of images, or one image file: `--data DIR`. "
            "Blocks that you name (`--blocks`) need none."
        )
    return image_batches(
        find_images(source),
        image_processor(loaded),
        lambda pixels: count_places(loaded, pixels),
        samples=config.samples,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _share(samples: int, place: int, parts: Sequence[str]) -> int:
    each, rest = divmod(samples, len(parts))
    return each + (place < rest)


def model_settings(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `load` that a `ModelConfig` stands for."""
    settings = config.model_dump()
    return {"model": settings.pop("source"), **settings}


def probe_batch(loaded: Loaded) -> Batch:
    """A small batch with padding in it, for verification: text, or images or sound for a stack that reads those."""
    return text_batch(loaded) if loaded.reads_text else probe_inputs(loaded.tower(), num_sequences=3)


def text_batch(loaded: Loaded) -> tuple[Tensor, Tensor]:
    """Token ids and keep mask of a few texts: real text where there is a tokenizer, drawn ids otherwise."""
    length = min(48, loaded.max_len or 48)
    if loaded.tokenizer is not None:
        # A folder without tokenizer files still gets a tokenizer from transformers, one that knows no words.
        with contextlib.suppress(DataError):
            batches = make_batches(
                read_texts("builtin"),
                loaded.tokenizer,
                layout="padded",
                samples=3,
                seq_len=length,
                batch_size=3,
                seed=0,
            )
            token_ids, keep = next(batches.padded_with(loaded.pad_id).tokens())
            if int(token_ids.max()) < loaded.vocabulary:
                return token_ids, keep
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(loaded.vocabulary, (1 if loaded.pad_id is None else 3, length), generator=generator)
    keep = torch.ones_like(token_ids, dtype=torch.bool)
    return token_ids, keep
