"""Rewrites a config for a model that lost some of its blocks, and says what changed."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from avss.errors import UnsupportedArchitectureError
from avss.models.families import FAMILIES, Family
from avss.models.stack import BlockStack
from avss.record import FieldChange, Plan

# Lists of any length that have nothing to do with blocks, though their length may equal the number of blocks.
_NOT_PER_LAYER = frozenset({"architectures", "eos_token_id", "bad_words_ids", "id2label", "label2id"})


def find_family(config: PretrainedConfig) -> Family:
    """The facts about a config's model type.

    Raises:
        UnsupportedArchitectureError: The type is not in the list of proven ones, or this config has an obstacle.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedArchitectureError(
            f"Cutting `{config.model_type}` models has not been proven, and an unproven cut may load as a different "
            f"model. Scoring and evaluating work. Proven: {', '.join(sorted(FAMILIES))}. To add one, see CONTRIBUTING."
        )
    reason = family.obstacle(config.to_dict())
    if reason:
        raise UnsupportedArchitectureError(f"This `{config.model_type}` model cannot be cut: {reason}.")
    return family


def rewrite_config(config: PretrainedConfig, stack: BlockStack, plan: Plan) -> PretrainedConfig:
    """The config of the smaller model. The given one is left alone.

    Raises:
        UnsupportedArchitectureError: The model type is unproven, or a field looks as if it held one entry per block
            and nothing is known about it.
    """
    family = find_family(config)
    raw = config.to_dict()
    _refuse_unknown_lists(raw, family, num_blocks=plan.num_blocks)
    smaller = copy.deepcopy(config)
    # The attribute map carries the write to the stored name (`n_layer`, `n_layers`).
    smaller.num_hidden_layers = len(plan.kept)
    for field in family.per_layer:
        entries = raw.get(field)
        if entries is not None:
            setattr(smaller, field, [entries[block] for block in plan.kept])
    for field in family.thresholds:
        limit = raw.get(field)
        if isinstance(limit, int):
            setattr(smaller, field, limit - sum(block < limit for block in plan.removed))
    return smaller


def _refuse_unknown_lists(raw: Mapping[str, Any], family: Family, *, num_blocks: int) -> None:
    """A list as long as the stack that nobody has explained would be silently wrong afterwards."""
    unknown = [
        field
        for field, value in raw.items()
        if isinstance(value, list | tuple)
        and len(value) == num_blocks
        and field not in family.per_layer
        and field not in _NOT_PER_LAYER
    ]
    if unknown:
        raise UnsupportedArchitectureError(
            f"The config field{'s' if len(unknown) > 1 else ''} {', '.join(f'`{field}`' for field in unknown)} "
            f"{'have' if len(unknown) > 1 else 'has'} one entry per block, and how a cut must change it is not "
            f"known for `{raw.get('model_type')}`. Refused rather than guessed; see CONTRIBUTING to add the fact."
        )


def config_changes(before: PretrainedConfig, after: PretrainedConfig) -> tuple[FieldChange, ...]:
    """The fields in which two configs differ, by name."""
    old, new = before.to_dict(), after.to_dict()
    return tuple(
        FieldChange(field=field, before=old.get(field), after=new.get(field))
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    )
