"""Proves that a saved model is the one that was promised: loaded afresh, compared, generated from."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from avss.errors import VerificationError
from avss.models.forward import cache_error, generate, run_outputs
from avss.models.load import Loaded, quiet_transformers
from avss.models.proof import allowed_difference, noise_of
from avss.models.stack import bypassed
from avss.record import Plan, Verification

NUM_GENERATED = 16
CACHE_TOLERANCE = 1e-2
"""Difference of logits up to which a model computes the same with its cache and without."""

Batch = tuple[Tensor, Tensor] | Mapping[str, Tensor]
"""Token ids `[B, T]` with their keep mask, or a model's own keyword arguments."""


def verify(
    folder: str,
    smaller: Loaded,
    original: Loaded,
    plan: Plan,
    batch: Batch,
    *,
    raw: Loaded | None = None,
) -> Verification:
    """Checks a saved model against the one in memory and against the original with the removed blocks bypassed.

    A model whose weights were changed after the cut equals no bypassed original. Then the proof has two halves: the raw
    cut equals the bypassed original, and the saved model equals the changed one in memory.

    Args:
        folder: Where it was saved.
        smaller: The model in memory.
        original: The model it was cut from.
        plan: The blocks removed.
        batch: Token ids `[B, T]` and keep mask `[B, T]`, or the model's own keyword arguments (images, sound).
        raw: The cut before its weights were changed, in memory; None where they were not.

    Raises:
        VerificationError: A check failed; the message says which, and by how much.
    """
    try:
        with quiet_transformers():
            loading: Any = type(smaller.model).from_pretrained(
                folder, dtype=smaller.model.dtype, output_loading_info=True, use_safetensors=True
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise VerificationError(
            f"The saved model cannot be loaded again and has been withdrawn: {error}. Nothing was published. Is the "
            "disk full?"
        ) from error
    model, info = loading
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    fresh = smaller.with_model(model.to(smaller.device).eval())
    towers = original.tower() is not original
    expected = outputs_at_tokens(smaller.tower(), batch)
    with bypassed(original.stack, plan.removed):
        reference = outputs_at_tokens(original.tower(), batch)
    actual = outputs_at_tokens(fresh.tower(), batch)
    unchanged = actual if raw is None else outputs_at_tokens(raw.tower(), batch)
    differences = largest_difference(actual, expected), largest_difference(unchanged, reference)
    tolerance = allowed_difference(expected, smaller.model, fresh.model, original.model)
    if max(differences) > tolerance:
        tolerance += noise_of(expected, lambda: outputs_at_tokens(smaller.tower(), batch))
    generation = None if towers else _cached_equals_uncached(fresh, original, batch)
    result = Verification(
        reload_strict=not problems,
        max_diff_memory=differences[0],
        max_diff_bypass=differences[1],
        of_raw_cut=raw is not None,
        tolerance=tolerance,
        cached_generation=generation,
        num_generated=0 if generation is None else NUM_GENERATED,
    )
    if not result.passed:
        raise VerificationError(_explain(result, problems))
    return result


def outputs_at_tokens(loaded: Loaded, batch: Batch) -> Tensor:
    """Outputs at real tokens, in float32: what a model computes on padding is its own affair."""
    outputs = run_outputs(loaded, batch) if isinstance(batch, Mapping) else run_outputs(loaded, *batch)
    return at_tokens(outputs, keep_of(batch))


def keep_of(batch: Batch) -> Tensor | None:
    """Which tokens of a batch are real, `[B, T]`; None where all are, or where it has none."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else batch[1]


def at_tokens(outputs: Tensor, keep: Tensor | None) -> Tensor:
    """The outputs `[N, ...]` of the tokens that are real, where there is one per token; else all of them."""
    if keep is not None and outputs.dim() == 3 and outputs.shape[:2] == keep.shape:
        return outputs[keep.to(outputs.device, torch.bool)].float()
    return outputs.float()


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ, nan where a value is."""
    return float((one.cpu() - other.cpu()).abs().max()) if one.shape == other.shape else float("inf")


def _cached_equals_uncached(fresh: Loaded, original: Loaded, batch: Batch) -> bool | None:
    """Whether both ways give the same text; None where there is no text, or where not even the original agrees."""
    prompt = _prompt(fresh, batch)
    if prompt is None:
        return None

    def agrees(loaded: Loaded) -> bool:
        tokens, more = prompt
        texts = [
            generate(loaded.model, tokens, num_tokens=NUM_GENERATED, use_cache=use_cache, more=more)
            for use_cache in (True, False)
        ]
        return torch.equal(*texts)

    if agrees(fresh):
        return True
    # Some models compute another thing with a cache before any cut: then that is not the cut's doing.
    return False if agrees(original) and cache_error(original.model, *prompt) <= CACHE_TOLERANCE else None


def _prompt(loaded: Loaded, batch: Batch) -> tuple[Tensor, dict[str, Tensor]] | None:
    """What generation starts from: tokens to continue, and an encoder's inputs. None where nothing generates."""
    if not loaded.model.can_generate() or loaded.head not in ("causal", "seq2seq"):
        return None
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch[0], "attention_mask": batch[1].long()}
    first = {name: tensor[:1].to(loaded.device) for name, tensor in inputs.items()}
    if loaded.head == "causal":
        if "input_ids" not in first:
            return None
        keep = first.get("attention_mask")
        length = min(16, int(keep.sum()) if keep is not None else first["input_ids"].shape[1])
        return first["input_ids"][:, :length], {}
    first.pop("decoder_input_ids", None)
    start = getattr(loaded.model.generation_config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(loaded.model.config.get_text_config(decoder=True), "bos_token_id", None)
    return torch.full((1, 1), start or 0, device=loaded.device), first


def _explain(result: Verification, problems: dict[str, list[str]]) -> str:
    failed = [f"{kind.replace('_', ' ')} {keys[:4]}" for kind, keys in problems.items()]
    differs = result.max_diff_memory
    if differs is not None and not differs <= result.tolerance:
        failed.append(f"its outputs differ from the model in memory by {differs:.3g}")
    if not result.max_diff_bypass <= result.tolerance:
        failed.append(f"its outputs differ from the original with the blocks bypassed by {result.max_diff_bypass:.3g}")
    if result.cached_generation is False:
        failed.append("it generates other tokens with its cache than without")
    return (
        f"The saved model failed verification and has been withdrawn: {'; '.join(failed)} (allowed "
        f"{result.tolerance:.3g}). Nothing was published. This is a bug in avss or in the architecture's facts: please "
        "report it."
    )
