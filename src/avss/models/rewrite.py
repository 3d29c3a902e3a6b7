"""Rewrites a config for a model that lost some of its blocks, and says what changed.

No model is needed: `rewrite_config` turns (config, stack, plan) into the new config, or refuses.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from avss.errors import UnsupportedArchitectureError
from avss.models.families import Family, InexpressibleError, Pinned, facts_of
from avss.models.fields import rewritten_fields
from avss.models.stack import NUM_LAYERS_FIELD, BlockStack, config_tree
from avss.record import FieldChange, Plan

_LINKS = ("deepstack_layer_map", "spatial_target_layers")
"""Fields of a whole model's config that name blocks of its towers."""


def find_family(config: PretrainedConfig, stack: BlockStack) -> Family:
    """The facts about the part of a config that owns a stack.

    Raises:
        UnsupportedArchitectureError: This config has an obstacle, whatever the plan.
    """
    owner = stack.owner(config)
    family = facts_of(owner.model_type)
    reason = family.obstacle(owner.to_dict())
    if reason:
        raise UnsupportedArchitectureError(f"This `{owner.model_type}` model cannot be cut: {reason}.")
    return family


def pinned_blocks(config: PretrainedConfig, stack: BlockStack) -> tuple[Pinned, ...]:
    """The blocks that cannot go, by non-negative index, each with its reason."""
    owner, count = stack.owner(config), len(stack)
    pins = facts_of(owner.model_type).pinned(owner.to_dict(), count)
    found = {pin.block % count: pin.reason for pin in pins}
    reason = "features of an image are added to what it returns (each of the first blocks takes its own)"
    found = dict.fromkeys(range(min(count, _num_deepstack(config, owner))), reason) | found
    return tuple(Pinned(block, reason) for block, reason in sorted(found.items()))


def _num_deepstack(config: PretrainedConfig, owner: PretrainedConfig) -> int:
    """How many leading blocks of a text tower take features of an image (DeepStack, of Qwen3-VL and its kin)."""
    if getattr(owner, "vocab_size", None) is None:
        return 0
    towers = [inner for inner in config_tree(config).values() if inner is not owner]
    return max((len(getattr(inner, "deepstack_visual_indexes", None) or ()) for inner in towers), default=0)


def rewrite_config(config: PretrainedConfig, stack: BlockStack, plan: Plan) -> PretrainedConfig:
    """The config of the smaller model. The given one is left alone.

    Args:
        config: The whole model's config; the part that owns the stack is rewritten inside it.
        stack: Where the stack is, and what counts it.
        plan: The blocks removed.

    Raises:
        UnsupportedArchitectureError: The config cannot be cut, a block cannot go, the smaller config cannot say which
            kind
            each of its blocks is, or a field looks as if it spoke of blocks and nothing is known about it.
    """
    family = find_family(config, stack)
    for pin in pinned_blocks(config, stack):
        if pin.block in plan.removed:
            raise UnsupportedArchitectureError(
                f"Block {pin.block} of a `{stack.owner(config).model_type}` model cannot be removed: {pin.reason}. "
                f"Choose others, or protect it with `--protect {pin.block}`."
            )
    smaller = copy.deepcopy(config)
    owner = stack.owner(smaller)
    raw = owner.to_dict()
    kind = owner.model_type
    try:
        fields = rewritten_fields(raw, family, plan, count_field=stack.count_field, side=stack.side, kind=kind)
        changes = fields | family.adjust(raw, plan)
        if stack.config_path:
            for field, value in _features_of_tower(config, stack, plan).items():
                setattr(smaller, field, value)
            if isinstance(raw.get("feature_layer"), int):
                changes["feature_layer"] = _shifted(raw["feature_layer"], plan, "feature_layer")
            _refuse_unknown_around(config, stack)
    except InexpressibleError as reason:
        raise UnsupportedArchitectureError(f"This `{kind}` model cannot lose these blocks: {reason}.") from reason
    for field, value in changes.items():
        _set(owner, field, value)
    if isinstance(raw.get("stage_names"), list) and len(raw["stage_names"]) == plan.num_blocks + 1:
        _renumber_stages(owner, raw, plan)
    _refuse_without_attention(stack.owner(config), owner)
    _refuse_short_cache(smaller, stack)
    _refuse_forgetful(smaller, stack, plan)
    return smaller


def refusal(config: PretrainedConfig, stack: BlockStack, plan: Plan) -> str | None:
    """Why no config can express the smaller model; None where one can. What its weights say is not asked."""
    try:
        rewrite_config(config, stack, plan)
    except UnsupportedArchitectureError as error:
        return str(error)
    return None


def _renumber_stages(owner: PretrainedConfig, raw: Mapping[str, Any], plan: Plan) -> None:
    """A backbone names the state after each block, `stem`, `stage1`, ...; its outputs stay after the same blocks."""
    taken = [place % (plan.num_blocks + 1) for place in raw.get("out_indices") or [plan.num_blocks]]
    moved = [place - sum(block < place for block in plan.removed) for place in taken]
    if len(set(moved)) < len(moved):
        raise UnsupportedArchitectureError(
            f"This `{owner.model_type}` model cannot lose these blocks: two of its outputs (`out_indices` {taken}) "
            "would be the same. Keep a block between them."
        )
    stages: Any = owner
    stages.stage_names = raw["stage_names"][: len(plan.kept) + 1]
    stages.set_output_features_output_indices(out_features=None, out_indices=moved)


def _kinds(config: PretrainedConfig) -> list[str]:
    """The kinds of a config's blocks, stored or computed; empty where they are all alike."""
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and kinds:
            return [str(kind) for kind in kinds]
    return []


def _refuse_without_attention(before: PretrainedConfig, after: PretrainedConfig) -> None:
    """A hybrid asks an attention block how far a text has come: without one it cannot generate."""
    counts = [
        sum("attention" in kind and "linear" not in kind for kind in _kinds(config)) for config in (before, after)
    ]
    if counts[0] and not counts[1]:
        raise UnsupportedArchitectureError(
            f"This `{before.model_type}` model cannot lose these blocks: no block with attention would be left, and "
            "its cache counts the tokens by one. Keep at least one."
        )


def _refuse_short_cache(smaller: PretrainedConfig, stack: BlockStack) -> None:
    """Transformers sizes the decoder's cache of T5 and its kin by the number of encoder blocks."""
    if stack.side != "encoder" or not getattr(smaller, "is_encoder_decoder", False):
        return
    raw = smaller.to_dict()
    needed = next(
        (raw[field] for field in ("num_decoder_layers", "decoder_layers") if isinstance(raw.get(field), int)), 0
    )
    entries = getattr(smaller.get_text_config(decoder=True), NUM_LAYERS_FIELD, needed)
    if isinstance(entries, int) and entries < needed:
        raise UnsupportedArchitectureError(
            f"The encoder of this `{smaller.model_type}` model cannot become shorter ({entries} blocks) than its "
            f"decoder ({needed}): transformers sizes the decoder's cache by the encoder, and could not generate. Cut "
            "the decoder first (`--stack decoder`)."
        )


def _set(owner: PretrainedConfig, field: str, value: Any) -> None:
    try:
        setattr(owner, field, value)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedArchitectureError(
            f"The config of `{owner.model_type}` does not let `{field}` be set to {value!r}: {error}. Its smaller "
            "model cannot be expressed."
        ) from error


def _features_of_tower(config: PretrainedConfig, stack: BlockStack, plan: Plan) -> dict[str, Any]:
    """`vision_feature_layer` of the whole model says after which block of a tower its features are taken."""
    changes: dict[str, Any] = {}
    part = stack.config_path[0].removesuffix("_config")
    for field in (f"{part}_feature_layer", f"{part}_feature_layers", f"{part}_feature_select_layer"):
        value = getattr(config, field, None)
        if value is None:
            continue
        new = [_shifted(place, plan, field) for place in (value if isinstance(value, list | tuple) else [value])]
        changes[field] = type(value)(new) if isinstance(value, list | tuple) else new[0]
    return changes


def _refuse_unknown_around(config: PretrainedConfig, stack: BlockStack) -> None:
    """Refuses where a config around the one that owns the stack pairs blocks of one tower with blocks of another.

    Granite 4 Vision adds features from after certain vision blocks before certain text blocks. A probe of one tower
    does not see that.
    """
    tree = config_tree(config)
    for depth in range(len(stack.config_path)):
        around = tree[stack.config_path[:depth]]
        unknown = [field for field in _LINKS if getattr(around, field, None)]
        if unknown:
            raise InexpressibleError(
                f"`{unknown[0]}` of `{around.model_type}` says which of its blocks take features of which blocks of "
                "another tower, and how a cut must change that is not known"
            )


def rewrite_generation(generation: GenerationConfig, stack: BlockStack, plan: Plan) -> GenerationConfig:
    """The settings of generation for the smaller model: a copy where they speak of blocks, else the given ones.

    Whisper's `alignment_heads`, pairs of decoder block and head, time its words.
    """
    pairs = getattr(generation, "alignment_heads", None)
    if not pairs or stack.side != "decoder":
        return generation
    smaller: Any = copy.deepcopy(generation)
    smaller.alignment_heads = [[plan.index_map[block], head] for block, head in pairs if block in plan.index_map]
    if not smaller.alignment_heads:
        del smaller.alignment_heads
    return smaller


def _shifted(place: int, plan: Plan, field: str) -> int:
    """The same point between blocks after the cut. Place 0 is before the first block; negative from the end."""
    if place < 0:
        after = plan.num_blocks + 1 + place
        moved = place + sum(block >= after for block in plan.removed)
        if moved == -1 != place:
            # The last state is the one that some towers normalise.
            raise InexpressibleError(
                f"`{field}` takes features before the removed blocks, which would be the last ones then"
            )
        return moved
    return place - sum(block < place for block in plan.removed)


def _refuse_forgetful(smaller: PretrainedConfig, stack: BlockStack, plan: Plan) -> None:
    """A config that says something else after it was written and read would load as another model."""
    raw = smaller.to_dict()
    try:
        again = type(smaller).from_dict(copy.deepcopy(raw))
        differing = [change.field for change in config_changes(smaller, again)]
    except Exception as error:  # whatever a config's own checks raise
        raise UnsupportedArchitectureError(
            f"transformers refuses the smaller config of this `{smaller.model_type}` model: "
            f"{' '.join(str(error).split())[:300]}. Its blocks cannot be removed this way."
        ) from error
    if differing:
        raise UnsupportedArchitectureError(
            f"The smaller config of this `{smaller.model_type}` model does not survive being written and read: "
            f"{', '.join(f'`{field}`' for field in differing)} would be computed anew. Its blocks cannot be removed "
            "this way."
        )
    owner = stack.owner(again)
    counted = owner.to_dict().get(stack.count_field)
    if (len(counted) if isinstance(counted, list) else counted) != len(plan.kept):
        raise UnsupportedArchitectureError(
            f"The config of this `{smaller.model_type}` model does not take another number of blocks "
            f"(`{stack.count_field}` stays {counted!r}). Its blocks cannot be removed this way."
        )


def config_changes(before: PretrainedConfig, after: PretrainedConfig) -> tuple[FieldChange, ...]:
    """The fields in which two configs differ, by name; those of a sub-config as `text_config.num_hidden_layers`."""
    return tuple(_dict_changes(before.to_dict(), after.to_dict(), ""))


def _dict_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[FieldChange]:
    for field in sorted(old.keys() | new.keys(), key=str):
        one, other = old.get(field), new.get(field)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict) and "model_type" in one and "model_type" in other:
            yield from _dict_changes(one, other, f"{prefix}{field}.")
        else:
            yield FieldChange(field=f"{prefix}{field}", before=one, after=other)
