"""Proves that a saved model is the one that was promised: loaded afresh, compared, generated from."""

from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from avss.errors import VerificationError
from avss.models.forward import can_generate, generate, run_outputs
from avss.models.load import Loaded, quiet_transformers
from avss.models.proof import TOLERANCE
from avss.models.stack import bypassed
from avss.record import Plan, Verification

NUM_GENERATED = 16

def verify(folder: str, smaller: Loaded, original: Loaded, plan: Plan, batch: tuple[Tensor, Tensor]) -> Verification:
    """Checks a saved model against the one in memory and against the original with the removed blocks bypassed.

    Args:
        folder: Where it was saved.
        smaller: The model in memory.
        original: The model it was cut from.
        plan: The blocks removed.
        batch: Token ids `[B, T]` and keep mask `[B, T]`.

    Raises:
        VerificationError: A check failed; the message says which, and by how much.
    """
    token_ids, keep = batch
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
    fresh = Loaded(model=model.to(smaller.device).eval(), tokenizer=smaller.tokenizer, head=smaller.head, source=folder)
    expected = _comparable(run_outputs(smaller, token_ids, keep), keep)
    with bypassed(original.stack, plan.removed):
        reference = _comparable(run_outputs(original, token_ids, keep), keep)
    actual = _comparable(run_outputs(fresh, token_ids, keep), keep)
    tolerance = TOLERANCE.get(smaller.model.dtype, 1e-4) * max(1.0, float(expected.abs().max()))
    result = Verification(
        reload_strict=not problems,
        max_diff_memory=_max_diff(actual, expected),
        max_diff_bypass=_max_diff(actual, reference),
        tolerance=tolerance,
        cached_generation=_cached_equals_uncached(fresh, token_ids, keep) if can_generate(fresh.head) else None,
        num_generated=NUM_GENERATED if can_generate(fresh.head) else 0,
    )
    if not result.passed:
        raise VerificationError(_explain(result, problems))
    return result


def _comparable(outputs: Tensor, keep: Tensor) -> Tensor:
    """Outputs at real tokens: what a model computes on padding is its own affair."""
    if outputs.dim() == 3 and outputs.shape[:2] == keep.shape:
        return outputs[keep.to(outputs.device)].float()
    return outputs.float()


def _max_diff(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else float("inf")


def _cached_equals_uncached(loaded: Loaded, token_ids: Tensor, keep: Tensor) -> bool:
    prompt = token_ids[:1, : min(16, int(keep[0].sum()))].to(loaded.device)
    cached = generate(loaded.model, prompt, num_tokens=NUM_GENERATED)
    uncached = generate(loaded.model, prompt, num_tokens=NUM_GENERATED, use_cache=False)
    return bool((cached == uncached).all())


def _explain(result: Verification, problems: dict[str, list[str]]) -> str:
    failed = [f"{kind.replace('_', ' ')} {keys[:4]}" for kind, keys in problems.items()]
    if not result.max_diff_memory <= result.tolerance:
        failed.append(f"its outputs differ from the model in memory by {result.max_diff_memory:.3g}")
    if not result.max_diff_bypass <= result.tolerance:
        failed.append(f"its outputs differ from the original with the blocks bypassed by {result.max_diff_bypass:.3g}")
    if result.cached_generation is False:
        failed.append("it generates other tokens with its cache than without")
    return (
        f"The saved model failed verification and has been withdrawn: {'; '.join(failed)} "
        f"(allowed {result.tolerance:.3g}). "
        "Nothing was published. This is a bug in avss or in the architecture's facts: please report it."
    )
