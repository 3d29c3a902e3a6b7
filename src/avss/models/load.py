"""Loads a model from a hub id, a folder or a GGUF file, with the head it was made for; saves stock checkpoints."""

import contextlib
import copy
import dataclasses
import fnmatch
import functools
import hashlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import accelerate
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from avss.errors import ConfigError, ModelLoadError, unknown_name
from avss.models.blockwise import BlockFiles, device_map
from avss.models.families import facts_of
from avss.models.gguf import shared_reader
from avss.models.shards import copy_companions, module_names
from avss.models.stack import AUTO, BlockStack, config_tree, find_stack
from avss.record import ModelFacts

Head = Literal["causal", "masked", "classifier", "encoder", "seq2seq", "image-classifier", "other"]

AUTO_CLASSES: dict[str, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classifier": "AutoModelForImageClassification",
}
"""What a model is used as -> the class of transformers that loads it so."""
HEADS = tuple(AUTO_CLASSES)

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = ("auto", *_DTYPES)

_SAMPLED_VALUES = 1024

# How configs call the part that reads something else than text.
_SENSES = ("vision", "visual", "image", "video", "audio", "speech", "sound", "acoustic")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to be scored, cut or evaluated.

    Attributes:
        model: In evaluation mode.
        tokenizer: None where the source has none; then text cannot be read, token ids can.
        head: What the model is used as.
        source: As the user named it.
        revision: Hub revision, where one was asked for.
        stored_dtype: Dtype in which the weights are stored and will be saved. Computing in float32 what is stored in
            bfloat16 loses nothing, and saving it as bfloat16 gives the same values back.
        companions: Folder whose other files (pooling, sentence-transformers modules) belong to the model.
        stack_name: Which stack to work on: `auto`, or its name or path.
        limits: How the tokenizer cut and padded texts when it came; every call to it changes that.
        files: Where the blocks' weights are, for a model whose blocks are read when they run; None for one in memory.
        note: A sentence on how it was loaded that the user should read.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    head: Head
    source: str
    revision: str | None = None
    stored_dtype: torch.dtype = torch.float32
    companions: Path | None = None
    stack_name: str = AUTO
    limits: "_Limits | None" = None
    files: BlockFiles | None = None
    note: str | None = None

    @functools.cached_property
    def stack(self) -> BlockStack:
        """The block stack; an error says why there is none."""
        return find_stack(self.model, self.stack_name)

    def tower(self) -> "Loaded":
        """The part of the model that runs the stack: the model itself, or the tower that reads images or sound.

        A vision-language model reads text without running its vision tower; the tower alone can be run on an image.
        """
        stack = self.stack
        if self.reads_text or not stack.config_path or self.model.main_input_name != "input_ids":
            return self
        parent = stack.path
        while parent:
            parent = parent.rpartition(".")[0]
            part = self.model.get_submodule(parent)
            if isinstance(part, PreTrainedModel) and parent:
                inner = stack.path.removeprefix(f"{parent}.")
                return dataclasses.replace(self, model=part, head="encoder", stack_name=inner)
        return self

    @functools.cached_property
    def blueprint(self) -> PreTrainedModel:
        """The model as its config builds it, without weights: what the blocks of a smaller model are compared with."""
        return empty_model(type(self.model), self.model.config)

    def with_model(self, model: PreTrainedModel) -> "Loaded":
        """The same with another model, and with the same stack of it."""
        return dataclasses.replace(self, model=model, stack_name=self.stack.path)

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        embeddings = self.embeddings
        if embeddings is not None:
            return embeddings.weight.device
        return next(one.device for one in self.model.parameters() if one.device.type != "meta" or self.files is None)

    @property
    def embeddings(self) -> torch.nn.Embedding | None:
        """The table of token embeddings; None for a model that reads no text."""
        try:
            found = self.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            return None
        return cast(torch.nn.Embedding, found) if hasattr(found, "num_embeddings") else None

    @property
    def vocabulary(self) -> int:
        """Number of token embeddings: every token id lies below; 0 for a model that reads no text."""
        embeddings = self.embeddings
        if embeddings is not None:
            return embeddings.num_embeddings
        text = getattr(self.model.config.get_text_config(decoder=True), "vocab_size", None)
        return text if isinstance(text, int) else 0

    @property
    def owner(self) -> PretrainedConfig:
        """The part of the model's config that owns the stack; of a tower, the tower's."""
        return self.stack.owner(self.model.config)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream of the stack."""
        widths = (getattr(self.owner, name, None) for name in ("hidden_size", "d_model", "embed_dim", "dim"))
        return next((width for width in widths if isinstance(width, int)), 0)

    @property
    def pad_id(self) -> int | None:
        """Token id that fills up a batch; None where a batch must hold one sequence alone.

        Padding is masked, so for most models any id will do. A classifier on a decoder finds the last token of a text
        by the id in its own config: it takes any other for text, and refuses a batch where there is none.
        """
        own = getattr(self.model.config.get_text_config(decoder=True), "pad_token_id", None)
        if isinstance(own, int) and 0 <= own < self.vocabulary:
            return own
        if self.head == "classifier":
            return None
        others = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((other for other in others if isinstance(other, int)), 0)

    @property
    def reads_text(self) -> bool:
        """Whether the stack works on text alone: token ids in, nothing else needed."""
        if self.embeddings is None or self.model.main_input_name != "input_ids":
            return False
        return not any(sense in name for name in self.stack.config_path for sense in _SENSES)

    @property
    def reads_images(self) -> bool:
        """Whether the part of the model that runs the stack takes images for its main input."""
        return not self.reads_text and self.tower().model.main_input_name == "pixel_values"

    @property
    def is_vision(self) -> bool:
        """Whether the model as a whole reads images and nothing else: no decoder that writes about them."""
        is_both = getattr(self.model.config, "is_encoder_decoder", False)
        return self.model.main_input_name == "pixel_values" and self.reads_images and not is_both

    def check_float64(self) -> None:
        """Refuses a device that does not compute in float64, in which statistics, damage and repairs add up.

        Raises:
            ConfigError: The model is on an Apple GPU.
        """
        if self.device.type == "mps":
            raise ConfigError(
                "Scores, damage and repairs are added up in float64, which Apple GPUs (`mps`) do not compute. Use the "
                "CPU (`--device cpu`, or `model.to('cpu')`); healing and evaluation need no float64."
            )

    def check_one_device(self) -> None:
        """Refuses a model that is spread over several devices: the smaller one is built on one.

        Raises:
            ConfigError: It is.
        """
        places = set(map(str, (getattr(self.model, "hf_device_map", None) or {}).values()))
        self.check_in_memory("A cut, a repair or healing")
        if len(places) > 1:
            raise ConfigError(
                f"The model is spread over {', '.join(sorted(places))}, and a cut builds the smaller one on one. "
                "Load it on one (`--device cpu`), or score it here (`avss score MODEL --device map --out scores`) and "
                "cut it from file to file (`avss prune MODEL --on-disk --scores scores`)."
            )

    def check_in_memory(self, what: str) -> None:
        """Refuses a model whose blocks stay in their files for what needs all of them at once.

        Args:
            what: Begins the sentence, e.g. `Healing`.

        Raises:
            ConfigError: They do.
        """
        if self.files is not None:
            raise ConfigError(
                f"{what} needs the whole model in memory, and the blocks of this one stay on disk (`--device disk`, or "
                "for lack of room). Use `--device cpu` or a GPU. On disk there are scores without gradients, `avss "
                "damage`, `avss compare` and `avss evaluate`, and `avss prune MODEL --on-disk` cuts by such scores."
            )

    def check_reads_text(self, what: str) -> None:
        """Refuses what reads text alone for a stack that reads images.

        Args:
            what: Begins the sentence, e.g. `Healing`.

        Raises:
            ConfigError: The stack reads images.
        """
        if self.reads_images:
            raise ConfigError(
                f"{what} reads text, and the stack `{self.stack.path}` of `{type(self.model).__name__}` reads images. "
                "For such a tower there are `avss score`, `avss damage`, `avss compare`, `avss stability`, `avss "
                "prune` and `avss verify`."
            )

    @property
    def max_len(self) -> int | None:
        """The most tokens in a sequence; None where neither model nor tokenizer sets a limit."""
        config = self.model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        limits = (
            [positions - facts_of(config.model_type).reserved_positions]
            if isinstance(positions, int) and positions > 0
            else []
        )
        tokenizer_limit = getattr(self.tokenizer, "model_max_length", None)
        # Tokenizers without a limit say 1e30.
        if isinstance(tokenizer_limit, int) and 0 < tokenizer_limit < 10**9:
            limits.append(tokenizer_limit)
        return min(limits, default=None)

    def facts(self) -> ModelFacts:
        """The model in numbers, for the record."""
        unique = {id(parameter): parameter for parameter in self.model.parameters()}
        num_parameters = sum(parameter.numel() for parameter in unique.values())
        return ModelFacts(
            source=_short_source(self.source),
            revision=self.revision,
            architecture=type(self.model).__name__,
            model_type=self.model.config.model_type,
            head=self.head,
            stack=self.stack.path,
            num_blocks=len(self.stack),
            hidden_size=self.hidden_size,
            num_parameters=num_parameters,
            num_block_parameters=sum(parameter.numel() for parameter in self.stack.blocks.parameters()),
            checkpoint_bytes=num_parameters * self.stored_dtype.itemsize,
            dtype=dtype_name(self.stored_dtype),
            compute_dtype=dtype_name(self.model.dtype),
            device=str(self.device),
            fingerprint=fingerprint(self.model, self.files),
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the machine multiplies in bfloat16, rather than imitates it, which is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16") or abilities.get("bf16"))
    return False


def _short_source(source: str) -> str:
    path = Path(source)
    return path.name if path.exists() else source


def fingerprint(model: PreTrainedModel, files: BlockFiles | None = None) -> str:
    """SHA-256, 16 hex digits, over the config and up to 1,024 evenly spaced values of every weight.

    Args:
        model: The model.
        files: Where the weights of its blocks are, if they are not in memory.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where it lies is no part of what it is
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        held = tensor if files is None or tensor.device.type != "meta" else files.weight(name)
        flat = held.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences progress bars and notices of transformers and accelerate: avss reports what matters itself."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    accelerated = logging.getLogger("accelerate")
    level = accelerated.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    accelerated.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        accelerated.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_model(
    source: str | Path,
    *,
    head: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    stack: str = AUTO,
    scratch: Path | None = None,
) -> Loaded:
    """Loads a model and its tokenizer.

    Args:
        source: Hub id (`owner/name`), local folder, or a `.gguf` file (local, or on the hub as `owner/name/file.gguf`).
        head: `auto` takes the class named in the config; otherwise one of `HEADS`.
        dtype: Dtype to compute in. `auto`: the stored one on an accelerator; float32 on a CPU, where half precision is
            slow and nothing is lost by widening.
        device: `auto` (CUDA, else the CPU), a torch device, `map` to spread the model over all GPUs, or `disk` to leave
            its blocks in their files and compute as for `auto`: each is read when it runs (`avss.models.blockwise`).
            `disk:cpu` or `disk:cuda:1` compute there.
        revision: Hub branch, tag or commit.
        trust_remote_code: Whether code that comes with the model may run.
        stack: Which stack of blocks to work on: `auto`, or its name or path; see `avss.models.stack.find_stack`.
        scratch: An empty folder for blocks that are stored otherwise than they are computed (mixtures of experts),
            which `disk` writes anew; removed with the model, or by `files.close`. By default a temporary one.

    Raises:
        ConfigError: `head`, `dtype` or `device` is unknown.
        ModelLoadError: The source does not exist or is not a model; the message says what was tried.
    """
    _check_choices(head, dtype)
    target = _find_device(device)
    location = _locate(str(source), revision)
    on_disk = device.partition(":")[0] == "disk"
    if on_disk and location.gguf_file:
        raise ConfigError("A GGUF file is decoded in memory, as a whole. Leave out `--device disk`.")
    # A GGUF file is decoded in one place.
    is_placed = (device == "map" or on_disk) and not location.gguf_file
    with quiet_transformers(), shared_reader() if location.gguf_file else contextlib.nullcontext():
        config = _read_config(location, revision=revision, trust_remote_code=trust_remote_code)
        model_class, found_head = _model_class(config, head, trust_remote_code=trust_remote_code)
        options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        if revision and not location.is_local:
            options["revision"] = revision
        placed: dict[str, Any] = {}
        if is_placed:
            placed = {"dtype": _DTYPES.get(dtype, "auto"), "device_map": "auto"}
        if on_disk:
            empty = _empty_of(str(source), model_class, config, trust_remote_code=trust_remote_code)
            find_stack(empty, stack)  # refused before anything is read
            placed["device_map"] = device_map(empty, target)
            placed["offload_folder"] = tempfile.mkdtemp(prefix="avss-") if scratch is None else str(scratch)
            if dtype == "auto" and target.type == "cpu":
                placed["dtype"] = torch.float32
        files = None
        try:
            model = _read_weights(location, model_class, config, placed=placed, options=options)
            if on_disk:
                computed = placed["dtype"] if isinstance(placed["dtype"], torch.dtype) else None
                wide = _kept_wide(model, computed or model.dtype)
                files = BlockFiles(model, Path(placed["offload_folder"]), computed, wide)
        finally:
            if files is None and "offload_folder" in placed:
                shutil.rmtree(placed["offload_folder"], ignore_errors=True)
        tokenizer = _read_tokenizer(location, options)
    if location.gguf_file:
        model, stored = _unquantise(model, file_bytes=Path(location.gguf_file).stat().st_size)
    elif files is not None:
        stored = files.dtype
    else:
        stored = _stored_dtype(config, model) if is_placed else model.dtype
    compute = model.dtype if is_placed else _compute_dtype(dtype, stored, target)
    if not is_placed:
        model = cast(Any, in_dtype(model, compute)).to(target)
    return Loaded(
        model=model.eval(),
        tokenizer=tokenizer,
        head=found_head,
        source=str(source),
        revision=revision,
        # As it was, where what was computed in holds all its values: float16 and bfloat16 do not hold each other's.
        stored_dtype=stored if torch.promote_types(stored, compute) == compute else compute,
        companions=_companions(location, options),
        stack_name=stack,
        limits=_limits_of(tokenizer),
        files=files,
    )


def load_empty(
    source: str | Path,
    *,
    head: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    with_tokenizer: bool = False,
    stack: str = AUTO,
) -> Loaded:
    """The model as its config describes it, without any weight: what can be told of it without reading them.

    Args:
        source: As for `load_model`.
        head: As for `load_model`.
        revision: As for `load_model`.
        trust_remote_code: As for `load_model`.
        with_tokenizer: Whether to read the tokenizer.
        stack: As for `load_model`.

    Raises:
        ConfigError: `head` is unknown.
        ModelLoadError: The config cannot be read, or no model built from it.
    """
    _check_choices(head, "auto")
    location = _locate(str(source), revision)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if revision and not location.is_local:
        options["revision"] = revision
    with quiet_transformers(), shared_reader() if location.gguf_file else contextlib.nullcontext():
        config = _read_config(location, revision=revision, trust_remote_code=trust_remote_code)
        model_class, found = _model_class(config, head, trust_remote_code=trust_remote_code)
        model = _empty_of(str(source), model_class, config, trust_remote_code=trust_remote_code)
        tokenizer = _read_tokenizer(location, options) if with_tokenizer else None
    return Loaded(
        model=model.eval(), tokenizer=tokenizer, head=found, source=str(source), revision=revision, stack_name=stack
    )


def _empty_of(source: str, model_class: Any, config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with accelerate.init_empty_weights(include_buffers=True):
            # An auto class builds from a config by a method of its own.
            return (
                model_class.from_config(config, trust_remote_code=trust_remote_code)
                if hasattr(model_class, "from_config")
                else model_class(config)
            )
    except Exception as error:  # the class of a model may raise anything at values it does not know
        raise ModelLoadError(
            f"`{source}` cannot be built as its config says: `{model_class.__name__}` stops with "
            f"{type(error).__name__}: {first_line(error)}. Was the config made by another version of transformers, "
            "or changed by hand?"
        ) from error


def adopt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    head: str = "auto",
    stack: str = AUTO,
) -> Loaded:
    """Wraps a model object that the caller already has. It is put in evaluation mode and otherwise left alone."""
    _check_choices(head, "auto")
    found = head if head != "auto" else _head_of_class(type(model).__name__, model.config)
    source = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Loaded(
        model=model.eval(),
        tokenizer=tokenizer,
        head=cast(Head, found),
        source=source,
        stored_dtype=model.dtype,
        stack_name=stack,
        limits=_limits_of(tokenizer),
    )


# --- where it is ---


@dataclasses.dataclass(frozen=True)
class _Location:
    """Where a model is.

    A GGUF file has its whole path: transformers takes a file of that name in the working directory before the one in
    the folder that it is told of.
    """

    name: str
    gguf_file: str | None
    is_local: bool

    @property
    def arguments(self) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"pretrained_model_name_or_path": self.name, **gguf}


def _locate(source: str, revision: str | None) -> _Location:
    if not source.strip():
        raise ModelLoadError("The name of the model is empty. There is no file or folder without a name.")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"`{source}` is a file, but not a `.gguf` file. Give a hub id, a folder or a GGUF file."
            )
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelLoadError(f"`{source}` is not a GGUF file: it does not begin with `GGUF`. Is it whole?")
        return _Location(name=str(path.parent), gguf_file=str(path.absolute()), is_local=True)
    if path.is_dir():
        return _Location(name=str(path), gguf_file=_only_gguf(path), is_local=True)
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 2
    parts = source.split("/")
    if looks_local or (source.endswith(".gguf") and len(parts) != 3):
        raise ModelLoadError(f"There is no file or folder `{source}`. Give a hub id, a folder or a GGUF file.")
    if source.endswith(".gguf"):
        name = "/".join(parts[:2])
        try:
            found = cached_file(name, parts[2], revision=revision)
        except Exception as error:  # as many as there are ways not to reach a hub
            raise ModelLoadError(
                f"Cannot get `{parts[2]}` of `{name}`: {first_line(error)}. Check the hub id, the network and your "
                "access."
            ) from error
        assert found is not None  # it raises where it finds nothing
        return _Location(name=str(Path(found).parent), gguf_file=found, is_local=True)
    return _Location(name=source, gguf_file=None, is_local=False)


def _only_gguf(folder: Path) -> str | None:
    if (folder / "config.json").is_file():
        return None
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) == 1:
        return str(folder.absolute() / files[0])
    if files:
        raise ModelLoadError(f"`{folder}` holds {len(files)} GGUF files: {', '.join(files)}. Name one of them.")
    raise ModelLoadError(f"`{folder}` holds no `config.json` and no GGUF file: it is not a model.")


# --- what it is ---


def _check_choices(head: str, dtype: str) -> None:
    if head not in ("auto", *HEADS):
        raise ConfigError(unknown_name("head", head, ["auto", *HEADS]))
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, DTYPES))


def _find_device(device: str) -> torch.device:
    kind, _, place = device.partition(":")
    if kind == "disk":
        device = place or "auto"
    if device in ("auto", "map"):  # not `mps`, see `Loaded.check_float64`
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"The device `{device}` is not there ({first_line(error)}). Allowed: auto, cpu, cuda, cuda:N, map, disk, "
            "disk:cpu, disk:cuda:N, mps."
        ) from error
    return found


def _compute_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return _DTYPES[dtype]
    return torch.float32 if device.type == "cpu" else stored


def first_line(error: BaseException) -> str:
    """What an error says first, or its name: the reason inside a sentence of our own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


def _read_config(location: _Location, *, revision: str | None, trust_remote_code: bool) -> PretrainedConfig:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision and not location.is_local:
        options["revision"] = revision
    if location.gguf_file:
        options["gguf_file"] = location.gguf_file
    # transformers raises whatever its many readers raise; to the user they all mean: this is not a readable model.
    try:
        return AutoConfig.from_pretrained(location.name, **options)
    except Exception as error:
        raise ModelLoadError(
            f"Cannot read the config of `{location.name}`: {first_line(error)}. "
            + ("Is it a model folder?" if location.is_local else "Check the hub id, the network and your access.")
        ) from error


def _head_of_class(architecture: str, config: PretrainedConfig) -> Head:
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    if architecture.endswith("ForImageClassification"):
        return "image-classifier"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if architecture.endswith("ForMaskedLM"):
        return "masked"
    return "encoder" if architecture.endswith("Model") else "other"


def _model_class(config: PretrainedConfig, head: str, *, trust_remote_code: bool) -> tuple[Any, Head]:
    """The class named in the config, so that no head is lost; the auto class where the user asks for another head."""
    architecture = (getattr(config, "architectures", None) or [None])[0]
    if head == "auto" and architecture is None:
        head = _head_by_type(config)
    if head == "auto" and architecture is not None:
        found = _head_of_class(architecture, config)
        exact = getattr(transformers, architecture, None)
        has_own_code = trust_remote_code and getattr(config, "auto_map", None)
        if exact is not None and not has_own_code:
            return exact, found
        own_class = _own_auto_class(config) if has_own_code else None
        if found == "other" and own_class is not None:
            return own_class, found
        if exact is not None and found == "other":
            return exact, found
        if found == "other":
            raise ModelLoadError(
                f"`{architecture}` is not a class of transformers {transformers.__version__}. "
                "If its code comes with the model, add `--trust-remote-code`; or name a head with `--head`."
            )
        head = found
    return getattr(transformers, AUTO_CLASSES[head]), cast(Head, head)


def _own_auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers by which code that comes with a model loads it, by its own `auto_map`."""
    names = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)


def _head_by_type(config: PretrainedConfig) -> str:
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked"
    return "causal" if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "encoder"


# --- its weights ---


def _read_weights(
    location: _Location,
    model_class: Any,
    config: PretrainedConfig,
    *,
    placed: Mapping[str, Any],
    options: dict[str, Any],
) -> PreTrainedModel:
    """The model as it is stored; or `placed`: arguments of transformers that say where its parts go, in which dtype."""
    arguments = {**location.arguments, **options, "dtype": torch.float32 if location.gguf_file else "auto"}
    if not location.gguf_file:
        arguments |= {"config": config, "use_safetensors": True}
    arguments |= placed
    try:
        model, info = model_class.from_pretrained(**arguments, output_loading_info=True)
    except Exception as error:
        if "offload_folder" in placed and "No space left" in str(error):
            raise ModelLoadError(
                f"There is no room in `{Path(placed['offload_folder']).parent}` for the blocks of `{location.name}`, "
                "which are computed otherwise than they are stored. Name a larger place with `AVSS_CACHE`."
            ) from error
        raise ModelLoadError(
            f"Cannot load the weights of `{location.name}` as `{model_class.__name__}`: {first_line(error)}. "
            "Only safetensors and GGUF weights are read; is the download whole?"
        ) from error
    _refuse_missing(model, info, location.name)
    if placed.get("device_map") == "auto" and any(value.device.type == "meta" for value in model.parameters()):
        raise ModelLoadError(
            f"`{location.name}` does not fit the GPUs: some of its weights would wait elsewhere (`--device map`), "
            "where they cannot be read. Use `--device disk` to score it, a block at a time; or `--device cpu`."
        )
    return model


def _stored_dtype(config: PretrainedConfig, model: PreTrainedModel) -> torch.dtype:
    """What the config says of a model that was widened or narrowed while it was read."""
    named = getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else model.dtype


def _refuse_missing(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> None:
    """A block without its weights would be a random one. A new head over an old body is the user's choice."""
    stacks = tuple(path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    lacking = sorted(key for key in info["missing_keys"] if any(key.startswith(f"{path}.") for path in stacks))
    if lacking:
        raise ModelLoadError(
            f"The checkpoint `{name}` lacks {len(lacking)} weights of its blocks, `{lacking[0]}` first: they would be "
            "random. The config and the weights do not belong together, or a file is missing."
        )


def _read_tokenizer(location: _Location, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(**location.arguments, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        # Legitimate: a model of token ids. Whoever needs text says so (`data.calibration.need_tokenizer`).
        return None


def _unquantise(model: PreTrainedModel, *, file_bytes: int) -> tuple[PreTrainedModel, torch.dtype]:
    """A plain model from one that came out of a GGUF file, which transformers marks as quantised and will not save."""
    raw = model.config.to_dict()
    raw.pop("quantization_config", None)
    raw.pop("_name_or_path", None)
    config = type(model.config).from_dict(raw)
    config.architectures = [type(model).__name__]
    state = model.state_dict()
    stored = _gguf_dtype(state, file_bytes)
    rounded = {
        name: tensor.to(stored).to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    plain = assemble(type(model), config, rounded)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain, stored


def _gguf_dtype(state: Mapping[str, Tensor], file_bytes: int) -> torch.dtype:
    """The dtype in which to keep weights that came out of a GGUF file.

    Float formats keep theirs. Quantised weights become bfloat16: its rounding is far below the quantisation's, and
    float32 would double the size to store digits that were never there. Told by the bytes a weight takes in the file.
    """
    unique = {tensor.data_ptr(): tensor.numel() for tensor in state.values()}
    bytes_each = file_bytes / sum(unique.values())
    if bytes_each > 3:
        return torch.float32
    is_half = bytes_each > 1.5 and not all(bool((tensor == tensor.bfloat16()).all()) for tensor in state.values())
    return torch.float16 if is_half else torch.bfloat16


def empty_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights: parameters take no memory, buffers that the constructor computes are real."""
    with quiet_transformers(), no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
        return model_class(config)


def fill(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Gives an empty model its weights: the tensors themselves; no copy is made, and none is converted.

    Raises:
        RuntimeError: A key is missing or left over, or a tensor has another shape.
    """
    model.load_state_dict(dict(state), strict=True, assign=True)
    model.tie_weights()
    device = next(iter(state.values())).device
    for name, buffer in model.named_buffers():
        if name not in state and buffer.device != device:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    return model.eval()


def assemble(
    model_class: type[PreTrainedModel], config: PretrainedConfig, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Config -> empty model -> weights. Buffers and indices come from the config, so they are right by construction.

    Raises:
        RuntimeError: A key is missing or left over; that is a bug of whoever made `state`.
    """
    return fill(empty_model(model_class, config), state)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with its weights in another dtype; the model itself where it has that dtype already.

    Assembled anew rather than converted in place: buffers that the constructor computes (Gemma's embedding scale,
    rotary frequencies) must have the digits of the new dtype, as they have after a fresh load. What the class keeps in
    float32 beside half precision (the biases that route tokens to experts) is kept so, as a load would.
    """
    if model.dtype == dtype:
        return model
    wide = _kept_wide(model, dtype)
    # One tensor for each storage, so that tied weights stay tied.
    recast: dict[int, Tensor] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.data_ptr() not in recast:
            to = torch.float32 if any(fnmatch.fnmatchcase(name, pattern) for pattern in wide) else dtype
            recast[tensor.data_ptr()] = tensor.to(to) if tensor.is_floating_point() else tensor
    config = copy.deepcopy(model.config)
    for part in config_tree(config).values():  # of towers too, as a load would
        part.dtype = dtype
    other = assemble(type(model), config, {name: recast[tensor.data_ptr()] for name, tensor in state.items()})
    if getattr(model, "generation_config", None) is not None:
        other.generation_config = model.generation_config
    return other


def _kept_wide(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Patterns of the weights that transformers loads in float32 though the model is asked for in `dtype`."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [f"*{name}*" for name in names]


def save_model(loaded: Loaded, folder: Path) -> None:
    """Writes a stock checkpoint: weights in the stored dtype, config, generation config, tokenizer, companions."""
    model = in_dtype(loaded.model, loaded.stored_dtype)
    with quiet_transformers():
        model.save_pretrained(folder)
        if loaded.tokenizer is not None:
            _restore_limits(loaded.tokenizer, loaded.limits)
            loaded.tokenizer.save_pretrained(folder)
    if loaded.companions is not None:
        copy_companions(loaded.companions, folder)


@dataclasses.dataclass(frozen=True)
class _Limits:
    """How a tokenizer of the Rust library cuts and pads texts, in that library's words; None for not at all."""

    truncation: dict[str, Any] | None
    padding: dict[str, Any] | None


def _limits_of(tokenizer: PreTrainedTokenizerBase | None) -> _Limits | None:
    """The limits now; None where the tokenizer has none of these."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else _Limits(backend.truncation, backend.padding)


def _restore_limits(tokenizer: PreTrainedTokenizerBase, limits: _Limits | None) -> None:
    """Puts limits back: what is saved must not tell at which length this house read its texts."""
    if limits is None:
        return
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.no_truncation()
    backend.no_padding()
    if limits.truncation is not None:
        backend.enable_truncation(**limits.truncation)
    if limits.padding is not None:
        backend.enable_padding(**limits.padding)


def _companions(location: _Location, options: Mapping[str, Any]) -> Path | None:
    """The folder with the files that belong to a model but to no class that avss loads."""
    if location.gguf_file:
        return None
    if location.is_local:
        return Path(location.name)
    revision = options.get("revision")
    found = [
        cached_file(
            location.name,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        for name in _COMPANIONS
    ]
    folder = next((Path(path).parent for path in found if path), None)
    modules = [] if folder is None else module_names(folder)
    if folder is not None and modules:
        try:
            wanted = [f"{module}/*" for module in modules]
            snapshot_download(location.name, revision=revision, allow_patterns=wanted)
        except (OSError, HfHubHTTPError) as error:
            raise ModelLoadError(
                f"The modules of `{location.name}` ({', '.join(modules)}) cannot be had: {first_line(error)}. They are "
                "part of a sentence-transformers model; check the network and your access."
            ) from error
    return folder


# Processors, image processors and feature extractors say how images and sound become numbers, the others how a sentence
# becomes a vector. The files are copied: to load the classes would need libraries that cutting does not.
_COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
