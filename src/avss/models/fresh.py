"""Runs a saved model in a process that never heard of avss: what a stranger would see."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto import modeling_auto

from avss.models.forward import OUTPUT_NAMES
from avss.models.load import AUTO_CLASSES

NUM_GENERATED = 16

_MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "encoder": "MODEL_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-classifier": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}

_SCRIPT = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file

ask = json.loads(sys.argv[1])
torch.set_num_threads(ask["num_threads"])
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
batch = load_file(ask["batch"])
kind = getattr(transformers, ask["class"])
model, info = kind.from_pretrained(ask["folder"], dtype=torch.float32, output_loading_info=True, **ask["options"])
model.eval()
if ask["by_name"]:
    inputs = batch
else:
    ids, keep = batch["ids"], batch["keep"]
    inputs = {"input_ids": ids}
    if not bool(keep.all()):
        inputs["attention_mask"] = keep
    if model.config.is_encoder_decoder and not ask["is_classifier"]:
        inputs["decoder_input_ids"] = ids
answer = {"class": type(model).__name__, "problems": {k: sorted(map(str, v)) for k, v in info.items() if v}}
with torch.inference_mode():
    outputs = model.get_submodule(ask["part"])(**inputs)
    by_place = isinstance(outputs, tuple)  # a model whose own code knows no named outputs
    names = [] if by_place else [name for name in ask["outputs_named"] if outputs.get(name) is not None]
    found = outputs[names[0]] if names else outputs[0]
    if ask["num_generated"]:
        prompt = ids[:1, : min(16, int(keep[0].sum()))]
        settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        settings |= {"min_new_tokens": ask["num_generated"], "max_new_tokens": ask["num_generated"]}
        texts = [model.generate(prompt, use_cache=use_cache, **settings) for use_cache in (True, False)]
        answer["cached_generation"] = torch.equal(*texts)
save_file({"outputs": found.float().contiguous()}, ask["outputs"])
answer["heard_of_avss"] = any(name.split(".")[0] == "avss" for name in sys.modules)
print("\\n" + json.dumps(answer))
"""


@dataclasses.dataclass(frozen=True)
class FreshRun:
    """What a saved model did for a stranger.

    Attributes:
        architecture: Class that it became.
        problems: What the load complained about: kind -> keys.
        outputs: Its outputs in float32: logits, or the last hidden state.
        cached_generation: Whether greedy tokens with cache equal those without; None where it does not generate.
    """

    architecture: str
    problems: dict[str, list[str]]
    outputs: Tensor
    cached_generation: bool | None


class FreshRunError(Exception):
    """The other process failed; the message is the last thing it said."""


def _class_name(head: str, architecture: str, *, by_name: bool) -> str:
    """The auto class of a head, as a stranger would write; the class itself where no auto class stands for it."""
    auto = AUTO_CLASSES.get(head)
    stands = auto is not None and architecture in _class_names(_MAPPINGS[head])
    if hasattr(transformers, architecture) and (by_name or not stands):
        return architecture
    return auto or architecture


def _class_names(mapping: str) -> set[str]:
    """The classes that an auto class may become."""
    named = getattr(modeling_auto, mapping).values()
    return {name for entry in named for name in ([entry] if isinstance(entry, str) else entry)}


def run_afresh(
    folder: Path,
    batch: tuple[Tensor, Tensor] | Mapping[str, Tensor],
    *,
    head: str,
    architecture: str,
    part: str = "",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    places: Mapping[str, str] | None = None,
    scratch: Path | None = None,
) -> FreshRun:
    """Loads a model by its auto class and runs it, on the CPU in float32, in a process that does not import avss.

    Args:
        folder: Where it is.
        batch: Token ids `[B, T]` and keep mask `[B, T]`, or keyword arguments (images, sound).
        head: What it is used as.
        architecture: Its class, for heads that have no auto class, and for other inputs than text.
        part: Path of the part that is run, e.g. a vision tower; the whole by default.
        gguf_file: Name of a GGUF file in the folder, for a model that is one.
        trust_remote_code: Whether code that comes with the model may run.
        places: For a model that memory does not hold, where its parts go (`avss.models.blockwise.device_map`):
            transformers then reads them from disk itself. Two tokens are generated instead of many.
        scratch: An empty folder for what it writes for that.

    Raises:
        FreshRunError: It could not be loaded or run.
    """
    # By its whole path: transformers would take a file of that name in the working directory first.
    by_path = {"gguf_file": str((folder / gguf_file).absolute())} if gguf_file else None
    options: dict[str, Any] = by_path or {"use_safetensors": True}
    if trust_remote_code:
        options["trust_remote_code"] = True
    if places is not None:
        options |= {"device_map": dict(places), "offload_folder": str(scratch)}
    num_generated = NUM_GENERATED if places is None else 2
    with tempfile.TemporaryDirectory() as place:
        files = {name: str(Path(place) / f"{name}.safetensors") for name in ("batch", "outputs")}
        by_name = isinstance(batch, Mapping)
        tensors = batch if isinstance(batch, Mapping) else {"ids": batch[0], "keep": batch[1].long()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, files["batch"])
        question = {
            **files,
            "folder": str(folder),
            "class": _class_name(head, architecture, by_name=by_name),
            "is_classifier": head == "classifier",
            "part": part,
            "by_name": by_name,
            "outputs_named": OUTPUT_NAMES,
            "options": options,
            "num_generated": num_generated if head == "causal" and not by_name else 0,
            "num_threads": torch.get_num_threads(),
        }
        command = [sys.executable, "-P", "-W", "ignore", "-c", _SCRIPT, json.dumps(question)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FreshRunError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        outputs = load_file(files["outputs"])["outputs"]
    if answer["heard_of_avss"]:
        raise FreshRunError("avss was imported in the process that must not know it")
    return FreshRun(
        architecture=answer["class"],
        problems=answer["problems"],
        outputs=outputs,
        cached_generation=answer.get("cached_generation"),
    )
