"""What can be told of a checkpoint without its model's class: of types whose blocks are all alike, from files alone.

For these the answers of `avss.models.outline` follow from config and headers: where the blocks are, which fields speak
of them, that each block has the weights of every other. So neither torch nor transformers is imported, which takes
longer and more memory than copying a checkpoint of two gigabytes does. A test holds each type's answers against those
of its class. Whatever is not plain (another class, a field nothing is known about, a block unlike the others) is left
to the class: this module declines, it never refuses.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from avss.errors import ModelLoadError, UnsupportedArchitectureError
from avss.models.families import Family, facts_of
from avss.models.fields import rewritten_fields
from avss.models.shards import Checkpoint, find_stack_path, read_checkpoint
from avss.record import FieldChange, Plan

Problems = dict[str, list[str]]
"""Kind of problem (`missing_keys`, ...) -> the keys that have it."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """A model in words.

    Attributes:
        architecture: Class that computes it.
        model_type: `config.model_type`.
        head: What it is used as.
        stack: Path of its block stack in the model.
        num_blocks: Length of the stack.
        hidden_size: Width of the residual stream.
        pinned: Blocks that the architecture cannot lose.
        class_asked: Whether the model's class was asked, or the table of known types was enough.
    """

    architecture: str
    model_type: str
    head: str
    stack: str
    num_blocks: int
    hidden_size: int
    pinned: tuple[int, ...] = ()
    class_asked: bool = True


class Answers(Protocol):
    """What can be asked of a model without its weights."""

    def outline(self) -> Outline:
        """What it is."""
        ...

    def write_config(self, plan: Plan, folder: Path) -> tuple[FieldChange, ...]:
        """Writes the config of the smaller model, and returns what changed."""
        ...

    def problems(self, folder: Path) -> Problems:
        """What a load of a folder would complain about."""
        ...


@dataclasses.dataclass(frozen=True)
class KnownType:
    """A model type whose cut is told by its config and the names of its weights.

    Attributes:
        architecture: The one class that this is known of.
        stack: Path of the blocks in it.
        count_field: The config field that counts them.
        width_field: The config field with the width of the residual stream.
        lists: Config lists with an entry for each block, which the class computes from its position where the config
            has none: without them, another block of the smaller model would be of another kind.
        alike_unless: A field; where it is not set, all blocks are of one kind and `lists` need not be there.
    """

    architecture: str
    stack: str = "model.layers"
    count_field: str = "num_hidden_layers"
    width_field: str = "hidden_size"
    lists: tuple[str, ...] = ()
    alike_unless: str | None = None


_KINDS = ("layer_types",)
_GPT: dict[str, Any] = {"stack": "transformer.h", "count_field": "n_layer", "width_field": "n_embd"}

KNOWN_TYPES: dict[str, KnownType] = {
    "apertus": KnownType("ApertusForCausalLM"),
    "arcee": KnownType("ArceeForCausalLM"),
    "bloom": KnownType("BloomForCausalLM", stack="transformer.h", count_field="n_layer"),
    "codegen": KnownType("CodeGenForCausalLM", **_GPT),
    "cohere": KnownType("CohereForCausalLM"),
    "cohere2": KnownType("Cohere2ForCausalLM", lists=_KINDS),
    "ernie4_5": KnownType("Ernie4_5ForCausalLM"),
    "exaone4": KnownType("Exaone4ForCausalLM", lists=_KINDS),
    "falcon": KnownType("FalconForCausalLM", stack="transformer.h"),
    "gemma": KnownType("GemmaForCausalLM"),
    "gemma2": KnownType("Gemma2ForCausalLM", lists=_KINDS),
    "gemma3_text": KnownType("Gemma3ForCausalLM", lists=_KINDS),
    "glm": KnownType("GlmForCausalLM"),
    "glm4": KnownType("Glm4ForCausalLM"),
    "gpt2": KnownType("GPT2LMHeadModel", **_GPT),
    "gpt_bigcode": KnownType("GPTBigCodeForCausalLM", **_GPT),
    "gpt_neox": KnownType("GPTNeoXForCausalLM", stack="gpt_neox.layers"),
    "gpt_oss": KnownType("GptOssForCausalLM", lists=_KINDS),
    "gptj": KnownType("GPTJForCausalLM", **_GPT),
    "granite": KnownType("GraniteForCausalLM"),
    "granitemoe": KnownType("GraniteMoeForCausalLM"),
    "helium": KnownType("HeliumForCausalLM"),
    "llama": KnownType("LlamaForCausalLM"),
    "ministral": KnownType("MinistralForCausalLM", lists=_KINDS),
    "mistral": KnownType("MistralForCausalLM"),
    "mixtral": KnownType("MixtralForCausalLM"),
    "nemotron": KnownType("NemotronForCausalLM"),
    "olmo": KnownType("OlmoForCausalLM"),
    "olmo2": KnownType("Olmo2ForCausalLM"),
    "olmo3": KnownType("Olmo3ForCausalLM", lists=_KINDS),
    "olmoe": KnownType("OlmoeForCausalLM"),
    "opt": KnownType("OPTForCausalLM", stack="model.decoder.layers"),
    "persimmon": KnownType("PersimmonForCausalLM"),
    "phi": KnownType("PhiForCausalLM"),
    "phi3": KnownType("Phi3ForCausalLM"),
    "phimoe": KnownType("PhimoeForCausalLM"),
    "qwen2": KnownType("Qwen2ForCausalLM", lists=_KINDS, alike_unless="use_sliding_window"),
    "qwen3": KnownType("Qwen3ForCausalLM", lists=_KINDS, alike_unless="use_sliding_window"),
    "seed_oss": KnownType("SeedOssForCausalLM"),
    "smollm3": KnownType("SmolLM3ForCausalLM", lists=("no_rope_layers", *_KINDS)),
    "stablelm": KnownType("StableLmForCausalLM"),
    "starcoder2": KnownType("Starcoder2ForCausalLM"),
}
"""`config.model_type` -> what is known of it."""

HEAD = "causal"
_COUNTS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})
_UNPLAIN = ("auto_map", "quantization_config", "pruned_heads", "per_layer_config", "text_config", "is_encoder_decoder")
"""Fields that, where they are set, make a model one that its class must be asked about."""


class KnownModel:
    """A model folder of a known type, with the answers that `avss.models.outline.EmptyModel` gives by its class.

    Build it by `find_known`, which tells whether that can be done.
    """

    def __init__(self, folder: Path, raw: Mapping[str, Any], known: KnownType) -> None:
        self._folder, self._raw, self._known = folder, raw, known

    def outline(self) -> Outline:
        """What it is."""
        raw, known = self._raw, self._known
        return Outline(
            architecture=known.architecture,
            model_type=raw["model_type"],
            head=HEAD,
            stack=known.stack,
            num_blocks=raw[known.count_field],
            hidden_size=raw[known.width_field],
            class_asked=False,
        )

    def write_config(self, plan: Plan, folder: Path) -> tuple[FieldChange, ...]:
        """Writes the config as it is stored, but for the fields that a cut changes, and returns these."""
        new = self._changes(plan)
        text = json.dumps(dict(self._raw) | new, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        changed = sorted(field for field in new if new[field] != self._raw[field])
        return tuple(FieldChange(field=field, before=self._raw[field], after=new[field]) for field in changed)

    def problems(self, folder: Path) -> Problems:
        """None: each block has the names and shapes of every other, and no other name speaks of a block."""
        return {}

    def _changes(self, plan: Plan) -> dict[str, Any]:
        field = self._known.count_field
        kind = self._raw["model_type"]
        return rewritten_fields(self._raw, Family(), plan, count_field=field, side=None, kind=kind)

    def is_plain(self) -> bool:
        """Whether config and headers hold nothing that the class must be asked about."""
        raw, known = self._raw, self._known
        count, width = _count(raw.get(known.count_field)), _count(raw.get(known.width_field))
        if count is None or count < 2 or width is None or any(field in raw for field in _COUNTS - {known.count_field}):
            return False
        if any(raw.get(field) for field in _UNPLAIN):
            return False
        needed = () if known.alike_unless and not raw.get(known.alike_unless) else known.lists
        given = [raw.get(field) for field in known.lists]
        if any(raw.get(field) is None for field in needed):
            return False
        if any(value is not None and (not isinstance(value, list) or len(value) != count) for value in given):
            return False
        if not _is_free_of_obstacles(raw):
            return False
        try:
            self._changes(Plan(num_blocks=count, removed=(count - 1,), method="explicit", rule="a trial"))
            checkpoint = read_checkpoint(self._folder)
            path = find_stack_path(list(checkpoint.tensors), count, known.stack)
        except (UnsupportedArchitectureError, ModelLoadError):  # the class says it better
            return False
        return are_alike(checkpoint, path, count)


def find_known(folder: Path) -> KnownModel | None:
    """The model of a folder, where nothing but its files need be read; None where its class must be asked."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = KNOWN_TYPES.get(str(raw.get("model_type"))) if isinstance(raw, dict) else None
    if known is None or raw.get("architectures") != [known.architecture]:
        return None
    model = KnownModel(folder, raw, known)
    return model if model.is_plain() else None


def answer(model: Answers, question: Mapping[str, Any]) -> Any:
    """Answers one question in plain values: the name of a method, and its arguments."""
    match question["what"]:
        case "outline":
            return dataclasses.asdict(model.outline())
        case "write_config":
            changes = model.write_config(Plan.model_validate(question["plan"]), Path(question["folder"]))
            return [change.model_dump(mode="json") for change in changes]
        case "problems":
            return model.problems(Path(question["folder"]))
        case other:
            raise ValueError(other)


def are_alike(checkpoint: Checkpoint, path: str, num_blocks: int) -> bool:
    """Whether each block of a stack has weights of the same names, shapes and dtypes as every other."""
    blocks: list[set[tuple[str, tuple[int, ...], str]]] = [set() for _ in range(num_blocks)]
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(f"{path}."):
            continue
        index, _, rest = name.removeprefix(f"{path}.").partition(".")
        if not index.isdecimal() or int(index) >= num_blocks:
            return False
        blocks[int(index)].add((rest, tensor.shape, tensor.dtype))
    return all(block == blocks[0] for block in blocks)


def _is_free_of_obstacles(raw: Mapping[str, Any]) -> bool:
    """Whether the facts about this type ask for nothing but what fields of known names say."""
    family = facts_of(raw["model_type"])
    plain = dataclasses.replace(family, obstacle=Family().obstacle) == Family()
    return plain and family.obstacle(raw) is None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
