"""The laws of repair and healing, for any architecture that reads text: a cut is mended, or refused in a sentence."""

import dataclasses

import numpy as np
import torch
from tests.support.tokenizers import VOCABULARY, WORDS, word_tokenizer
from tools.sweep.laws import BrokenLawError
from torch import Tensor
from transformers import PreTrainedModel

from avss.compensation import compensate
from avss.config import HealConfig
from avss.cut import cut
from avss.data.batches import Batches
from avss.data.sources import Texts
from avss.errors import AvssError, UnsupportedArchitectureError
from avss.healing import heal
from avss.models.forward import run_outputs
from avss.models.load import Loaded, adopt
from avss.models.probe import probe_inputs
from avss.record import DataFacts, Plan

_BUDGET = "160 tokens"


def mend(model: PreTrainedModel) -> dict[str, str]:
    """Cuts a block out of the middle, repairs and heals the cut, and says what became of either.

    Args:
        model: Tiny, random.

    Returns:
        `repair` and `healing` -> `passed`, a note on why the raw cut was kept, or the reason for refusal.

    Raises:
        BrokenLawError: A law does not hold.
        UnsupportedArchitectureError: There is no stack, it reads no text, or no cut is possible.
    """
    loaded = adopt(model, word_tokenizer(adds="bos", end=_end_id(model)))
    if not loaded.reads_text:
        raise UnsupportedArchitectureError(f"`{type(model).__name__}` reads something else than text.")
    plan, smaller = _cut_somewhere(loaded)
    before = [_state(one) for one in (loaded, smaller)]
    found = {"repair": _repaired(loaded, smaller, plan), "healing": _healed(loaded, smaller, plan)}
    if any(_changed(old, _state(one)) for old, one in zip(before, (loaded, smaller), strict=True)):
        raise BrokenLawError("mending changed the model that it was given")
    return found


def _end_id(model: PreTrainedModel) -> int | None:
    """The token at which a classifier of the BART and T5 kind reads; None for models that look for none."""
    config = model.config.get_text_config()
    end = getattr(config, "eos_token_id", None)
    return end if model.config.is_encoder_decoder and isinstance(end, int) and end < len(VOCABULARY) else None


def _cut_somewhere(loaded: Loaded) -> tuple[Plan, Loaded]:
    count = len(loaded.stack)
    for block in (count // 2, count - 1, 0):
        plan = Plan(num_blocks=count, removed=(block,), method="explicit", rule="by hand")
        try:
            return plan, cut(loaded, plan)
        except UnsupportedArchitectureError as error:
            reason = error
    raise reason


def _state(loaded: Loaded) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def _repaired(loaded: Loaded, smaller: Loaded, plan: Plan) -> str:
    draw = torch.Generator().manual_seed(1)
    sequences = tuple(torch.randint(8, min(50, loaded.vocabulary), (16,), generator=draw) for _ in range(16))
    if (end := _end_id(loaded.model)) is not None:
        sequences = tuple(torch.cat([sequence[:-1], torch.tensor([end])]) for sequence in sequences)
    facts = DataFacts(
        source="drawn", layout="packed", num_sequences=16, seq_len=16, num_tokens=256, batch_size=4, seed=1,
        content_hash="drawn",
    )  # fmt: skip
    text = Batches(sequences=sequences, batch_size=4, pad_id=loaded.pad_id or 0, facts=facts)
    try:
        repaired, story = compensate(loaded, smaller, plan, text, method="auto", rounds=1)
    except AvssError as error:
        return f"refused: {error}"
    if not story.applied:
        if repaired is not smaller or not story.note:
            raise BrokenLawError("a repair that was not applied gave another model, or no reason")
        return f"raw: {story.note}"
    changed = _changed(_state(smaller), _state(repaired))
    # Tied weights go by several names; what is told is one of them.
    if not story.after < story.before or not set(story.weights) <= changed | set(story.weights) or not changed:
        raise BrokenLawError(f"a repair says {story.before:.4g} -> {story.after:.4g} and changed {sorted(changed)[:3]}")
    _expect_finite(repaired, "repaired")
    return "passed"


def _healed(loaded: Loaded, smaller: Loaded, plan: Plan) -> str:
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(WORDS, size=draw.integers(6, 14))) for _ in range(60)]
    texts = Texts(texts=("\n\n".join(lines),), source="drawn", is_prose=True)
    config = HealConfig(
        budget=_BUDGET, seq_len=16, batch_size=4, precision="float32", validations=1, augment=0.0, learning_rate=1e-3
    )
    try:
        healed, healing, _ = heal(loaded, smaller, plan, texts, config)
    except AvssError as error:
        return f"refused: {error}"
    losses = [point.loss for point in healing.validation]
    if not losses or not np.isfinite(losses).all() or healing.num_steps < 1:
        raise BrokenLawError(f"healing took {healing.num_steps} steps and its held-out losses are {losses}")
    changed = _changed(_state(smaller), _state(healed))
    if bool(changed) != healing.kept:
        raise BrokenLawError(
            f"healing says that it was {'' if healing.kept else 'not '}kept, and {len(changed)} changed"
        )
    _expect_finite(healed, "healed")
    return "passed" if healing.kept else "raw: no better than before"


def _expect_finite(loaded: Loaded, what: str) -> None:
    tower = dataclasses.replace(loaded, tokenizer=None).tower()
    if not bool(run_outputs(tower, probe_inputs(tower)).isfinite().all()):
        raise BrokenLawError(f"the outputs of the {what} model are not finite")
