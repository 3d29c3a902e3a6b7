"""Proves a checkpoint that was written without a model in memory."""

from pathlib import Path

from avss.composer.inputs import probe_batch
from avss.cut import cut
from avss.models.load import load_model
from avss.models.verify import verify
from avss.record import Plan, Verification


def prove_saved(
    source: Path, folder: Path, plan: Plan, *, head: str = "auto", trust_remote_code: bool = False
) -> Verification:
    """Loads original and result, and compares them as `avss.models.verify` does after a cut in memory.

    Raises:
        VerificationError: A check failed.
    """
    original = load_model(source, head=head, trust_remote_code=trust_remote_code)
    smaller = cut(original, plan)
    return verify(str(folder), smaller, original, plan, probe_batch(smaller))
