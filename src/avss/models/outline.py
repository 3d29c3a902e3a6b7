"""What can be told of a model without its weights: its stack, its smaller config, whether a checkpoint fits its class.

Answers come as plain values, so that another process can ask (`avss.models.apart`): this one imports torch and the
model's code, which costs more memory than copying a checkpoint does.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from avss.errors import AvssError, UnsupportedArchitectureError
from avss.models.families import facts_of
from avss.models.known import Outline, Problems, answer
from avss.models.load import Loaded, load_empty, quiet_transformers
from avss.models.proof import build_smaller
from avss.models.rewrite import config_changes, pinned_blocks, rewrite_config, rewrite_generation
from avss.record import FieldChange, Plan


class EmptyModel:
    """A model folder, read as far as it can be without weights."""

    def __init__(self, source: str, *, head: str = "auto", trust_remote_code: bool = False) -> None:
        self._loaded: Loaded = load_empty(source, head=head, trust_remote_code=trust_remote_code)
        self._options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        if getattr(self._loaded.model.config, "quantization_config", None) is not None:
            raise UnsupportedArchitectureError(
                f"The weights of `{source}` are stored in a quantised format, and a cut of those is not proven. "
                "Cut the full-precision checkpoint, then quantise the result; or cut a GGUF file with `--format gguf`."
            )

    @property
    def loaded(self) -> Loaded:
        """The model without weights."""
        return self._loaded

    def outline(self) -> Outline:
        """What it is.

        Raises:
            UnsupportedArchitectureError: No block stack was found.
        """
        loaded = self._loaded
        return Outline(
            architecture=type(loaded.model).__name__,
            model_type=loaded.model.config.model_type,
            head=loaded.head,
            stack=loaded.stack.path,
            num_blocks=len(loaded.stack),
            hidden_size=loaded.hidden_size,
            pinned=tuple(pin.block for pin in pinned_blocks(loaded.model.config, loaded.stack)),
        )

    def write_config(self, plan: Plan, folder: Path) -> tuple[FieldChange, ...]:
        """Writes the config of the smaller model, and returns what changed.

        Raises:
            UnsupportedArchitectureError: The cut is not proven, or cannot be expressed.
        """
        config = self._loaded.model.config
        stack = self._loaded.stack
        smaller = rewrite_config(config, stack, plan)
        self.check_movable(plan)
        # The blocks that the smaller config builds must be the old ones, in kind and settings.
        build_smaller(self._loaded.model, smaller, stack, plan)
        changes = config_changes(config, smaller)
        smaller.architectures = [type(self._loaded.model).__name__]
        with quiet_transformers():
            smaller.save_pretrained(folder)
            source = Path(self._loaded.source)
            # Old configs hold the settings of generation, which a config is written without today.
            if self._loaded.model.can_generate() and not (source / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(source, config_file_name="config.json").save_pretrained(folder)
            elif (source / "generation_config.json").is_file():
                given = GenerationConfig.from_pretrained(source)
                generation = rewrite_generation(given, stack, plan)
                if generation is not given:  # else the file is copied as it is
                    generation.save_pretrained(folder)
        return changes

    def check_movable(self, plan: Plan) -> None:
        """A copy from file to file moves whole tensors of whole blocks, and nothing else.

        Raises:
            UnsupportedArchitectureError: This plan needs more.
        """
        stack, model = self._loaded.stack, self._loaded.model
        family = facts_of(stack.owner(model.config).model_type)
        first = f"{stack.path}.0."
        keys = list(model.state_dict())
        led = [key for key in keys if key.startswith(first) and family.leads(key.removeprefix(first))]
        packed = [key for key in keys if family.packed_axis(key) is not None]
        moved = packed + (led if 0 in plan.removed else [])
        if moved:
            raise UnsupportedArchitectureError(
                f"These blocks cannot go from file to file: `{moved[0]}` holds something for all blocks, which a cut "
                "must move or slice. Cut in memory (`--in-memory`)."
            )

    def problems(self, folder: Path) -> Problems:
        """What a fresh load of a folder would complain about, without reading its weights: keys and shapes.

        transformers does it itself, into a model on the meta device, so that its own renaming of keys applies.
        """
        with quiet_transformers():
            loading: Any = type(self._loaded.model).from_pretrained(
                folder,
                device_map="meta",
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                **self._options,
            )
        info: Mapping[str, Any] = loading[1]
        return {kind: sorted(map(_key, keys)) for kind, keys in info.items() if keys}


def _key(entry: Any) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry)


def serve(source: str, *, head: str = "auto", trust_remote_code: bool = False) -> None:
    """Answers questions from standard input, one JSON value a line, until it is closed."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    model: EmptyModel | None = None
    for line in sys.stdin:
        try:
            model = model or EmptyModel(source, head=head, trust_remote_code=trust_remote_code)
            reply: dict[str, Any] = {"answer": answer(model, json.loads(line))}
        except AvssError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(reply), file=replies, flush=True)
