"""The fields of a config that speak of blocks, and what a cut makes of them. On the config as it is stored: no class.

A field is known by its name (`avss.models.families`), or it is refused if it looks like one: a list with an entry for
each block, small integers under a name that speaks of layers.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from avss.errors import UnsupportedArchitectureError
from avss.models.families import (
    INDEX_LISTS,
    LAYER_DICTS,
    LEADING_COUNTS,
    NOT_PER_LAYER,
    PER_LAYER_LISTS,
    TRAILING_COUNTS,
    Family,
)
from avss.record import Plan

# Names under which a list of small integers is taken for a list of block indices.
_INDEX_NAME = re.compile(r".*(layer|block|idx|indices|indexes|indexs|_ids_per).*")


def rewritten_fields(
    raw: Mapping[str, Any], family: Family, plan: Plan, *, count_field: str, side: str | None, kind: str
) -> dict[str, Any]:
    """New values of the fields that speak of blocks, by their stored names.

    Args:
        raw: The config that owns the stack, as stored.
        family: What is known about its model type.
        plan: The blocks removed.
        count_field: The field that counts the blocks.
        side: Which stack of an encoder-decoder is cut; None where there is one stack.
        kind: The model type, for messages.

    Raises:
        UnsupportedArchitectureError: A field looks as if it spoke of blocks, and nothing is known about it.
    """
    changes: dict[str, Any] = {}
    unknown: list[str] = []
    for field, value in raw.items():
        if field == count_field and not isinstance(value, list):
            changes[field] = len(plan.kept)
        elif field in NOT_PER_LAYER or field in family.not_per_layer:
            continue
        elif isinstance(value, int) and not isinstance(value, bool):
            if field in LEADING_COUNTS or field in family.leading_counts:
                changes[field] = value - sum(block < value for block in plan.removed)
            elif field in TRAILING_COUNTS:
                changes[field] = value - sum(block >= plan.num_blocks - value for block in plan.removed)
        elif isinstance(value, list | tuple):
            if field in family.encoder_per_layer and side == "decoder":
                continue
            new = _rewritten_list(field, value, family, plan)
            if new is None:
                unknown.append(field)
            elif list(new) != list(value):
                changes[field] = type(value)(new)
        elif isinstance(value, dict):
            if field in LAYER_DICTS:
                changes[field] = _renumbered_keys(value, plan)
            unknown += [f"{field}.{name}" for name in _unknown_in(field, value, plan)]
    if unknown:
        several = len(unknown) > 1
        raise UnsupportedArchitectureError(
            f"The config field{'s' if several else ''} {', '.join(f'`{field}`' for field in unknown)} "
            f"{'speak' if several else 'speaks'} of blocks (one entry per block, or indices of blocks), and how a cut "
            f"must change {'them' if several else 'it'} is not known for `{kind}`. Refused rather than guessed; see "
            "CONTRIBUTING to add the fact."
        )
    return changes


def _rewritten_list(field: str, value: list[Any] | tuple[Any, ...], family: Family, plan: Plan) -> list[Any] | None:
    """The list after the cut; None where it is not known what it means."""
    if field in PER_LAYER_LISTS or field in family.per_layer or field in family.encoder_per_layer:
        return [value[block] for block in plan.kept] if len(value) >= plan.num_blocks else list(value)
    if field in INDEX_LISTS or field in family.index_lists:
        # Negative indices count from the end; what lies beyond the stack names no block.
        blocks = [block + plan.num_blocks if block < 0 else block for block in value]
        return [plan.index_map[block] for block in blocks if block in plan.index_map]
    if _speaks_of_blocks(field, value, plan.num_blocks):
        return None
    return list(value)


def _speaks_of_blocks(field: str, value: Any, num_blocks: int) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    if len(value) == num_blocks:
        return True
    numbers = all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    # Up to the number of blocks: some lists count from 1. One entry that fits is enough to ask.
    return numbers and bool(_INDEX_NAME.fullmatch(field)) and any(-num_blocks <= entry <= num_blocks for entry in value)


def _unknown_in(field: str, value: Mapping[Any, Any], plan: Plan) -> Iterator[str]:
    """Names in a nested dictionary that seem to speak of blocks. Sub-configs own other stacks and are left alone."""
    if field in LAYER_DICTS or "model_type" in value:
        return
    for name, inner in value.items():
        if _speaks_of_blocks(str(name), inner, plan.num_blocks):
            yield str(name)
        elif isinstance(inner, dict):
            yield from _unknown_in(str(name), inner, plan)
    keys = [_as_index(key) for key in value]
    if len(keys) == plan.num_blocks and keys == list(range(plan.num_blocks)):
        yield "*"


def _as_index(key: Any) -> int | None:
    return int(key) if isinstance(key, int) or (isinstance(key, str) and key.isdecimal()) else None


def _renumbered_keys(value: Mapping[Any, Any], plan: Plan) -> dict[Any, Any]:
    return {
        type(key)(plan.index_map[index]): entry
        for key, entry in value.items()
        if (index := _as_index(key)) is not None and index in plan.index_map
    }
