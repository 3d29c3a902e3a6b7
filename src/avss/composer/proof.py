"""Proves what was written from file to file, by running it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avss.composer.inputs import probe_batch, text_batch
from avss.cut import cut
from avss.errors import VerificationError
from avss.models.forward import can_generate, generate
from avss.models.load import Loaded, first_line, load_model
from avss.models.stack import bypassed
from avss.models.verify import largest_difference, outputs_at_tokens, verify
from avss.output import scratch_folder
from avss.record import Plan, Verification

NUM_GENERATED = 16
_FEW = 2
"""Tokens generated where each takes reading the whole model."""
_RELATIVE_TOLERANCE = 1e-4
"""Of the largest output, in float32: the weights are the same and run through the same kernels; rounding only."""


def prove_saved(source: Path, folder: Path, plan: Plan, **loading: Any) -> Verification:
    """Loads original and result, and compares them as `avss.models.verify` does after a cut in memory.

    Args:
        source: The original.
        folder: The result.
        plan: The blocks removed.
        **loading: `head`, `device`, `trust_remote_code`; see `avss.models.load.load_model`.

    Raises:
        VerificationError: A check failed.
    """
    original = load_model(source, **loading)
    smaller = cut(original, plan)
    return verify(str(folder), smaller, original, plan, probe_batch(smaller))


def prove_at_rest(source: Path, folder: Path, plan: Plan, **loading: Any) -> Verification:
    """Runs original and result one after the other, a block at a time, for models that memory does not hold.

    On the CPU in float32, whatever else there is. Where they cannot be run so, the outputs are not compared, and the
    result says why: bytes that were copied right are not thrown away for that.

    Args:
        source: The original.
        folder: The result.
        plan: The blocks removed.
        **loading: `head`, `trust_remote_code`; see `avss.models.load.load_model`.

    Raises:
        VerificationError: A check failed.
    """
    same_text: bool | None = None
    try:
        with _at_rest(folder, **loading) as fresh:
            num_blocks, batch = len(fresh.stack), probe_batch(fresh)
            actual = outputs_at_tokens(fresh.tower(), batch)
            if fresh.tower() is fresh and can_generate(fresh.head) and fresh.model.can_generate():
                same_text = _cached_equals_uncached(fresh, text_batch(fresh), num_tokens=_FEW)
        del fresh  # one of the two is held at a time
        with _at_rest(source, **loading) as original:
            with bypassed(original.stack, plan.removed):
                reference = outputs_at_tokens(original.tower(), batch)
            if same_text is False and not _cached_equals_uncached(original, text_batch(original), num_tokens=_FEW):
                same_text = None  # nor does the original: not the cut's doing
    except Exception as error:  # not every architecture runs so, nor every machine has room for it
        return Verification(reload_strict=None, outputs_compared=False, note=first_line(error))
    proof = Verification(
        reload_strict=num_blocks == len(plan.kept),
        max_diff_memory=None,
        max_diff_bypass=largest_difference(actual, reference),
        tolerance=tolerance_of(reference),
        cached_generation=same_text,
        num_generated=0 if same_text is None else _FEW,
    )
    if not proof.passed:
        raise VerificationError(
            f"The copy failed verification and has been withdrawn: {proof.model_dump_json()}. Nothing was published. "
            "This is a bug in avss or in the architecture's facts: please report it."
        )
    return proof


@contextlib.contextmanager
def _at_rest(folder: Path, **loading: Any) -> Iterator[Loaded]:
    loaded = load_model(folder, device="disk:cpu", scratch=scratch_folder("blocks"), **loading)
    assert loaded.files is not None
    try:
        yield loaded
    finally:
        loaded.files.close()


def prove_gguf(result: Path, original: Loaded, plan: Plan) -> Verification:
    """Loads a cut GGUF file, and compares it with the cut of the loaded original and with its bypassed blocks.

    Both come out of the same quantised weights, so they are equal up to rounding.

    Raises:
        VerificationError: A check failed.
    """
    smaller = cut(original, plan)
    batch = text_batch(smaller)
    fresh = load_model(result, head=original.head, device=str(original.device))
    actual, expected = outputs_at_tokens(fresh, batch), outputs_at_tokens(smaller, batch)
    with bypassed(original.stack, plan.removed):
        reference = outputs_at_tokens(original, batch)
    proof = Verification(
        reload_strict=len(fresh.stack) == len(plan.kept),
        max_diff_memory=largest_difference(actual, expected),
        max_diff_bypass=largest_difference(actual, reference),
        tolerance=tolerance_of(expected),
        cached_generation=_cached_equals_uncached(fresh, batch) if can_generate(fresh.head) else None,
        num_generated=NUM_GENERATED if can_generate(fresh.head) else 0,
        bytes_equal=True,
    )
    if not proof.passed:
        raise VerificationError(
            f"The written file failed verification and has been withdrawn: {proof.model_dump_json()}. Nothing was "
            "published. This is a bug in avss or in the architecture's facts: please report it."
        )
    return proof


def tolerance_of(expected: Tensor) -> float:
    """The difference in float32 that rounding explains."""
    return _RELATIVE_TOLERANCE * max(1.0, float(expected.abs().max()))


def _cached_equals_uncached(loaded: Loaded, batch: tuple[Tensor, Tensor], *, num_tokens: int = NUM_GENERATED) -> bool:
    token_ids, keep = batch
    prompt = token_ids[:1, : min(16, int(keep[0].sum()))].to(loaded.device)
    texts = [generate(loaded.model, prompt, num_tokens=num_tokens, use_cache=use_cache) for use_cache in (True, False)]
    return torch.equal(*texts)
