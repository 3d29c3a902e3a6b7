"""Runs a model on a batch, in the three ways the house needs: body only, outputs, and greedy text.

A batch is a pair of token ids and keep mask, or a mapping of the model's own keyword arguments (images, sound).
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avss.models.load import Head, Loaded
from avss.models.stack import body_of


def model_inputs(
    loaded: Loaded,
    batch: Tensor | Mapping[str, Tensor],
    keep: Tensor | None,
    *,
    part: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """The arguments of a forward pass, on the model's device; no cache for a model that continues text.

    Args:
        loaded: The model.
        batch: Token ids `[B, T]`, or the model's own keyword arguments.
        keep: `[B, T]`, True for real tokens; None if all are.
        part: The part of the model that is run; by default the whole.
    """
    if isinstance(batch, Mapping):
        # Pixels are made in float32, whatever the model computes in.
        inputs: dict[str, Any] = {
            name: tensor.to(loaded.device, loaded.model.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }
    else:
        inputs = {"input_ids": batch.to(loaded.device)}
        # Without padding no mask: attention then takes its fastest path.
        if keep is not None and not bool(keep.all()):
            inputs["attention_mask"] = keep.to(loaded.device, torch.long)
        if _needs_decoder_ids(loaded, part):
            # Both sides read the same text; the decoder sees each token before it predicts it.
            inputs["decoder_input_ids"] = inputs["input_ids"]
    if loaded.head in ("causal", "seq2seq") and takes(part or loaded.model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _needs_decoder_ids(loaded: Loaded, part: PreTrainedModel | None) -> bool:
    """A classifier makes up what its decoder reads by itself; its body alone does not."""
    if loaded.head == "classifier" and part is None:
        return False
    is_both = getattr(loaded.model.config, "is_encoder_decoder", False)
    return bool(is_both) and takes(part or loaded.model, "decoder_input_ids")


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether a model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def cache_name(model: PreTrainedModel) -> str | None:
    """What a model calls its cache, in the arguments of its forward and in its outputs; None where it knows none."""
    return next((name for name in ("past_key_values", "cache_params", "state") if takes(model, name)), None)


def last_states(loaded: Loaded, batch: Tensor | Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
    """The last hidden state, `[B, T, D]`, without computing the head (a sixth of the time for small models).

    Args:
        loaded: The model.
        batch: Token ids `[B, T]`, or the model's own keyword arguments.
        keep: `[B, T]`, True for real tokens; None if all are.
    """
    body = body_of(loaded.model)
    return body(**model_inputs(loaded, batch, keep, part=body))[0]


@torch.inference_mode()
def run_body(loaded: Loaded, batch: Tensor | Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
    """`last_states` without a gradient: the fastest way to them."""
    return last_states(loaded, batch, keep)


OUTPUT_NAMES = ("logits", "logits_per_text", "prediction_logits", "last_hidden_state")
"""Where a model puts its answer, the best first; one that has none of them puts it first."""


@torch.inference_mode()
def run_outputs(loaded: Loaded, batch: Tensor | Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
    """What the model answers: logits `[B, T, V]` or `[B, classes]`, or the last hidden state of a bare body."""
    outputs = loaded.model(**model_inputs(loaded, batch, keep))
    if isinstance(outputs, tuple):  # a model whose own code knows no named outputs
        return outputs[0]
    for name in OUTPUT_NAMES:
        if outputs.get(name) is not None:
            return outputs[name]
    return outputs[0]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    num_tokens: int,
    use_cache: bool = True,
    more: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Greedy continuation of one prompt, `[num_tokens]`, with the model's own cache or without any.

    Goes on past the end-of-text token, so that two models can be compared token by token.

    Args:
        model: The model.
        token_ids: The prompt `[1, T]`; of an encoder-decoder, what the decoder starts with.
        num_tokens: How many to add.
        use_cache: Whether each step reads only the newest token.
        more: Further inputs, for all steps: those of an encoder.
    """
    prompt = "decoder_input_ids" if getattr(model.config, "is_encoder_decoder", False) else "input_ids"
    memory = cache_name(model)
    tokens, past, step = token_ids, None, token_ids
    new: list[Tensor] = []
    for _ in range(num_tokens):
        inputs: dict[str, Any] = {**(more or {}), prompt: step, "use_cache": use_cache}
        if memory is not None and past is not None:
            inputs[memory] = past
        outputs = model(**inputs)
        chosen = outputs.logits[:, -1:].argmax(-1)
        new.append(chosen)
        tokens = torch.cat([tokens, chosen], dim=1)
        past, step = (outputs[memory], chosen) if use_cache and memory is not None else (None, tokens)
    return torch.cat(new, dim=1)[0]


@torch.inference_mode()
def cache_error(model: PreTrainedModel, token_ids: Tensor, more: Mapping[str, Tensor] | None = None) -> float:
    """Largest difference between logits computed token by token with a cache and those of one pass without any.

    Args:
        model: The model.
        token_ids: `[1, T]`; of an encoder-decoder, what the decoder reads.
        more: Further inputs: those of an encoder.
    """
    prompt = "decoder_input_ids" if getattr(model.config, "is_encoder_decoder", False) else "input_ids"
    whole = model(**(more or {}), **{prompt: token_ids}, use_cache=False).logits
    memory = cache_name(model)
    past, steps = None, []
    for place in range(token_ids.shape[1]):
        step: dict[str, Any] = {**(more or {}), prompt: token_ids[:, place : place + 1], "use_cache": True}
        if memory is not None:
            step[memory] = past
        outputs = model(**step)
        past = outputs[memory] if memory is not None else None
        steps.append(outputs.logits)
    return float((torch.cat(steps, dim=1) - whole).abs().max())


def can_generate(head: Head) -> bool:
    """Whether a model with this head continues text."""
    return head == "causal"
