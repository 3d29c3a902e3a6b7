"""Runs a model on a batch of token ids, in the three ways the house needs: body only, logits, and greedy text."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avss.models.load import Head, Loaded


def model_inputs(loaded: Loaded, token_ids: Tensor, keep: Tensor | None) -> dict[str, Any]:
    """The arguments of a forward pass, on the model's device; no cache for a language model."""
    inputs: dict[str, Any] = {"input_ids": token_ids.to(loaded.device)}
    # Without padding no mask: attention then takes its fastest path.
    if keep is not None and not bool(keep.all()):
        inputs["attention_mask"] = keep.to(loaded.device, torch.long)
    if loaded.head == "causal":
        inputs["use_cache"] = False
    return inputs


@torch.inference_mode()
def run_body(loaded: Loaded, token_ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """The last hidden state, `[B, T, D]`, without computing the head (a sixth of the time for small models).

    Args:
        loaded: The model.
        token_ids: `[B, T]`.
        keep: `[B, T]`, True for real tokens; None if all are.
    """
    return loaded.model.base_model(**model_inputs(loaded, token_ids, keep))[0]


@torch.inference_mode()
def run_outputs(loaded: Loaded, token_ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """What the model answers: logits `[B, T, V]` or `[B, classes]`, or the last hidden state of a bare encoder."""
    outputs = loaded.model(**model_inputs(loaded, token_ids, keep))
    return outputs["logits"] if "logits" in outputs else outputs[0]


@torch.inference_mode()
def generate(model: PreTrainedModel, token_ids: Tensor, *, num_tokens: int, use_cache: bool = True) -> Tensor:
    """Greedy continuation of one prompt, `[num_tokens]`, with the model's own cache or without any.

    Goes on past the end-of-text token, so that two models can be compared token by token.
    """
    tokens, past, step = token_ids, None, token_ids
    new: list[Tensor] = []
    for _ in range(num_tokens):
        outputs = model(input_ids=step, past_key_values=past, use_cache=use_cache)
        chosen = outputs.logits[:, -1:].argmax(-1)
        new.append(chosen)
        tokens = torch.cat([tokens, chosen], dim=1)
        past, step = (outputs.past_key_values, chosen) if use_cache else (None, tokens)
    return torch.cat(new, dim=1)[0]


def can_generate(head: Head) -> bool:
    """Whether a model with this head continues text."""
    return head == "causal"
