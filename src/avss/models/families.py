"""What must be known about configs and architectures to cut them right, as data.

Most architectures need no entry: the stack is found by structure, config fields that speak of blocks are known by their
names, and every cut is proven (`avss.models.proof`). A model type is listed here where structure does not say enough: a
block that cannot go, a weight that must move, a rule that types blocks by their position.

To add one: a line in `FAMILIES`, a tiny config in the tests' list of architectures, and the laws decide.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from avss.record import Plan

PER_LAYER_LISTS = frozenset(
    {
        "attention_layers",
        "block_types_per_layer",
        "ffn_intermediate_sizes",
        "indexer_types",
        "hybrid_layer_pattern",
        "kv_sharing_modes",
        "layer_rope_theta",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "moe_layer_freq",
        "no_rope_layers",
        "num_attention_heads_per_layer",
        "num_key_value_heads_per_layer",
        "sliding_windows",
        "swiglu_limits",
        "swiglu_limits_shared",
    }
)
"""Config lists with one entry per block: the entries of the kept blocks stay."""

INDEX_LISTS = frozenset(
    {
        "attn_layer_indices",
        "cross_attention_layers",
        "dense_layers",
        "full_attn_idxs",
        "fullatt_block_indexes",
        "global_attn_indexes",
        "hybrid_layer_ids",
        "local_layer_ids",
        "mlp_only_layers",
        "moe_layers",
        "rope_scaling_layers",
        "sparse_attention_layers",
    }
)
"""Config lists of block indices: the kept blocks' indices are renumbered, the others go."""

LAYER_DICTS = frozenset({"per_layer_config", "pruned_heads"})
"""Config dictionaries keyed by block index: as index lists."""

LEADING_COUNTS = frozenset(
    {"first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers", "num_hash_layers"}
)
"""Config numbers of leading blocks that are of another kind: they lose the removed blocks among them."""

TRAILING_COUNTS = frozenset({"num_kv_shared_layers"})
"""Config numbers of trailing blocks that are of another kind."""

NOT_PER_LAYER = frozenset(
    {
        "architectures",
        "bad_words_ids",
        "conv_dim",
        "conv_kernel",
        "conv_stride",
        "eos_token_id",
        "id2label",
        "image_mean",
        "image_std",
        "label2id",
        "out_features",
        "out_indices",
        "stage_names",
        "suppress_tokens",
        "begin_suppress_tokens",
        "tdnn_dim",
        "tdnn_kernel",
        "tdnn_dilation",
        "quantile_levels",
        "input_modalities",
        "output_modalities",
        "ssm_multipliers",
        "supported_aspect_ratios",
        "mlp_multipliers",
        "mtp_local_layer_ids",
    }
)
"""Config lists and dictionaries that have nothing to do with blocks, though their length may equal their number."""


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A block that cannot go.

    Attributes:
        block: Its index; negative from the end.
        reason: Why.
    """

    block: int
    reason: str


Adjust = Callable[[Mapping[str, Any], Plan], dict[str, Any]]
"""(raw config, plan) -> further fields to set. Raises `InexpressibleError` where the smaller config cannot say it."""


class InexpressibleError(Exception):
    """A smaller config cannot say which kind each of its blocks is. The message is the reason."""


def _no_obstacle(config: Mapping[str, Any]) -> str | None:
    return None


def _nothing_pinned(config: Mapping[str, Any], num_blocks: int) -> tuple[Pinned, ...]:
    return ()


def _nothing_more(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """Facts about one model type, beyond those that hold for every config by the names of its fields.

    Attributes:
        per_layer: Config lists with one entry per block.
        encoder_per_layer: Config lists with one entry per block of the encoder; a decoder's cut leaves them alone.
        index_lists: Config lists of block indices.
        not_per_layer: Config lists that have nothing to do with blocks.
        leading_counts: Config numbers of leading blocks of another kind.
        reserved_positions: Entries of the position table that no token can use.
        first_block: Patterns of keys inside a block that only the first block has, on behalf of all: they move to the
            new
            first block.
        packed: Patterns of keys of tensors that hold one slice per block beside each other -> the axis.
        roles: Settings of a block that follow from the blocks around it; whether they do right is seen in the outputs.
        lengthens: Whether a batch is lengthened on the right, to whole windows or by further streams, between blocks.
        time_major: Whether hidden states are `[token, batch, hidden]` between blocks.
        obstacle: The reason why a config cannot be cut at all, or None.
        pinned: Blocks that cannot go.
        adjust: Further fields of the smaller config.
    """

    per_layer: tuple[str, ...] = ()
    encoder_per_layer: tuple[str, ...] = ()
    index_lists: tuple[str, ...] = ()
    not_per_layer: tuple[str, ...] = ()
    leading_counts: tuple[str, ...] = ()
    reserved_positions: int = 0
    first_block: tuple[str, ...] = ()
    packed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    roles: tuple[str, ...] = ()
    lengthens: bool = False
    time_major: bool = False
    obstacle: Callable[[Mapping[str, Any]], str | None] = _no_obstacle
    pinned: Callable[[Mapping[str, Any], int], tuple[Pinned, ...]] = _nothing_pinned
    adjust: Adjust = _nothing_more

    def leads(self, key: str) -> bool:
        """Whether a key inside a block belongs to the first block on behalf of all."""
        return any(re.fullmatch(pattern, key) for pattern in self.first_block)

    def packed_axis(self, key: str) -> int | None:
        """The axis along which a tensor holds one slice per block; None for any other tensor."""
        return next((axis for pattern, axis in self.packed.items() if re.fullmatch(pattern, key)), None)


# --- reasons ---


def _pins(*pins: Pinned) -> Callable[[Mapping[str, Any], int], tuple[Pinned, ...]]:
    return lambda config, num_blocks: pins


def _refused(reason: str) -> Callable[[Mapping[str, Any]], str | None]:
    return lambda config: reason


def _inverse_scaling(config: Mapping[str, Any]) -> str | None:
    if config.get("scale_attn_by_inverse_layer_idx"):
        return (
            "`scale_attn_by_inverse_layer_idx` divides each block's attention by its index + 1, which a shorter model "
            "would compute anew for every block after the cut"
        )
    return None


def _last_full_attention(config: Mapping[str, Any], num_blocks: int) -> tuple[Pinned, ...]:
    kinds = config.get("layer_types") or []
    full = [block for block, kind in enumerate(kinds) if kind == "full_attention"]
    if not full or len(kinds) != num_blocks:
        return ()
    return (Pinned(full[-1], "the last block with full attention; the config makes the last block one by force"),)


def _cache_owners(config: Mapping[str, Any], num_blocks: int) -> tuple[Pinned, ...]:
    """Without the block whose keys and values the last ones read, these would read those of another."""
    kinds, shared = config.get("layer_types") or [], config.get("num_kv_shared_layers") or 0
    if len(kinds) != num_blocks:
        return ()
    first = num_blocks - shared
    owners = {kind: block for block, kind in enumerate(kinds[:first])}
    read = [owners[kind] for kind in dict.fromkeys(kinds[first:]) if kind in owners]
    return tuple(Pinned(block, "the last blocks read its keys and values") for block in read)


def _all_of(*pins: Callable[[Mapping[str, Any], int], tuple[Pinned, ...]]) -> Callable[..., tuple[Pinned, ...]]:
    return lambda config, num_blocks: tuple(pin for one in pins for pin in one(config, num_blocks))


def _shared_caches(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The last `num_kv_shared_layers` blocks read the cache of an earlier block of their kind: one must be left."""
    kinds, shared = config.get("layer_types") or [], config.get("num_kv_shared_layers") or 0
    first = plan.num_blocks - shared
    owners = {kinds[block] for block in plan.kept if block < first}
    readers = {kinds[block] for block in plan.kept if block >= first}
    if readers and owners != owners | readers:
        raise InexpressibleError(
            f"its last blocks read the keys and values of an earlier block of their kind, and none of "
            f"{', '.join(sorted(readers - owners))} would be left"
        )
    return {}


def _shared_selections(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """A `shared` block attends to what the nearest `full` block before it selected: that one must stay before it.

    On a text shorter than the selection nothing is left out, so that a probe would not see it.
    """
    kinds = config.get("indexer_types") or []
    if len(kinds) != plan.num_blocks:
        return {}
    for block in plan.kept:
        if kinds[block] != "shared":
            continue
        full = max((place for place in range(block) if kinds[place] == "full"), default=None)
        if full is not None and full in plan.removed:
            raise InexpressibleError(
                f"block {block} attends to the tokens that block {full} selected, and would take another block's "
                f"selection; keep block {full}, or remove block {block} too"
            )
    return {}


def _shared_sources(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """`kv_source_layers` names for each block the one whose keys and values it reads, itself or an earlier one."""
    sources = config.get("kv_source_layers") or []
    if len(sources) != plan.num_blocks:
        return {}
    for block in plan.kept:
        if sources[block] in plan.removed:
            raise InexpressibleError(
                f"block {block} reads the keys and values of block {sources[block]}; keep that one, or remove both"
            )
    return {"kv_source_layers": [plan.index_map[sources[block]] for block in plan.kept]}


def _only_the_last(reason: str) -> Adjust:
    """Blocks can go from the end only."""

    def adjust(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        if plan.kept != tuple(range(len(plan.kept))):
            raise InexpressibleError(f"{reason}; remove blocks from the end only")
        return {}

    return adjust


# --- rules that type blocks by position ---


def progression(flags: Sequence[bool]) -> tuple[int, int] | None:
    """The smallest (period, offset) with `flags[i] == (i % period == offset)` for all i; None if there is none.

    Example:
        >>> progression([False, True, False, True, False]), progression([False, True, True])
        ((2, 1), None)
    """
    for period in range(1, len(flags) + 2):
        for offset in range(period):
            if all(flag == (index % period == offset) for index, flag in enumerate(flags)):
                return period, offset
    return None


def _kept_flags(flags: Sequence[bool], plan: Plan) -> list[bool]:
    return [flags[block] for block in plan.kept]


def _periodic(period_field: str, offset_field: str, what: str) -> Adjust:
    """A block is of a kind if its index modulo a period is an offset, both of them in the config."""

    def adjust(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        period, offset = config.get(period_field), config.get(offset_field)
        if not isinstance(period, int) or not isinstance(offset, int):
            return {}
        flags = _kept_flags([block % period == offset for block in range(plan.num_blocks)], plan)
        found = progression(flags)
        if all(flag == (index % period == offset) for index, flag in enumerate(flags)):
            return {}
        if found is None:
            raise InexpressibleError(
                f"its config places {what} every `{period_field}` blocks (now {period}, from {offset} on), and after "
                "this cut they stand at uneven distances; remove whole periods, or blocks from one end"
            )
        return {period_field: found[0], offset_field: found[1]}

    return adjust


def _together(*adjusts: Adjust) -> Adjust:
    return lambda config, plan: {key: value for adjust in adjusts for key, value in adjust(config, plan).items()}


def _sparse_step(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Qwen: block i has experts if `(i + 1) % decoder_sparse_step == 0` and `mlp_only_layers` does not name it."""
    step = config.get("decoder_sparse_step")
    if not isinstance(step, int) or step <= 1:
        return {}
    only = config.get("mlp_only_layers") or []
    sparse = _kept_flags([(block + 1) % step == 0 and block not in only for block in range(plan.num_blocks)], plan)
    return {"decoder_sparse_step": 1, "mlp_only_layers": [index for index, flag in enumerate(sparse) if not flag]}


def _cyclic(field: str) -> Adjust:
    """A list of kinds that is repeated along the stack becomes the list itself."""

    def adjust(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        kinds = config.get(field)
        return {field: [kinds[block % len(kinds)] for block in plan.kept]} if kinds else {}

    return adjust


def _attention_types(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """GPT-Neo writes the kinds of its blocks as `[[kinds, repeats], ...]`."""
    kinds = [kind for group, repeats in config.get("attention_types") or [] for kind in list(group) * repeats]
    return {"attention_types": [[[kinds[block]], 1] for block in plan.kept]} if len(kinds) == plan.num_blocks else {}


def _interval(field: str, *, phase: int, what: str) -> Adjust:
    """Block i is of a kind if `(i + phase) % config[field] == 0`: only the period can be rewritten."""

    def adjust(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        period = config.get(field)
        if not isinstance(period, int) or period < 1:
            return {}
        flags = _kept_flags([(block + phase) % period == 0 for block in range(plan.num_blocks)], plan)
        for candidate in (period, *range(1, len(flags) + 2)):
            if all(flag == ((index + phase) % candidate == 0) for index, flag in enumerate(flags)):
                return {} if candidate == period else {field: candidate}
        raise InexpressibleError(
            f"its config places {what} by `{field}` (now {period}), and after this cut they stand where no value of it "
            "puts them; remove whole periods, or blocks from the end"
        )

    return adjust


def _residual_scale(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Branches are scaled by `scale_depth / sqrt(num_hidden_layers)`; another `scale_depth` keeps the scale."""
    scale = config.get("scale_depth")
    return {"scale_depth": scale * math.sqrt(len(plan.kept) / plan.num_blocks)} if scale else {}


# Positions start after the padding id, which is 1.
_ROBERTA = Family(reserved_positions=2)
_T5 = Family(first_block=(r"layer\.0\.\w+\.(global_)?relative_attention_bias\.weight",))
_PER_LAYER_EMBEDDINGS = {r"(.*\.)?embed_tokens_per_layer\.weight": 1, r"(.*\.)?per_layer_model_projection\.weight": 0}
# The last block of each kind before the shared ones keeps its keys and values for them.
_KEEPER = ("store_full_length_kv", "kv_shared_layer_index", "is_kv_shared_layer")
_WINDOWS = Family(lengthens=True)
_SPARSE_STEP = Family(adjust=_sparse_step)
_SELECTIONS = Family(adjust=_shared_selections)
_FIRST_NORM = "its attention has no norm of its own: the embeddings' norm stands in for it"

FAMILIES: dict[str, Family] = {
    "big_bird": _WINDOWS,
    "bigbird_pegasus": _WINDOWS,
    "camembert": _ROBERTA,
    "deberta-v2": Family(pinned=_pins(Pinned(0, "a convolution over the embeddings is added to its output"))),
    "decision_transformer": Family(obstacle=_inverse_scaling),
    "diffllama": Family(
        obstacle=_refused("its differential attention subtracts a share that is computed from each block's index")
    ),
    "beam": Family(adjust=_only_the_last("its blocks scale what they add by their index")),
    "esm": Family(packed={r"(.*\.)?contact_head\.regression\.weight": 1}),
    "flint": _SPARSE_STEP,
    "gemma3n_text": Family(
        roles=_KEEPER,
        per_layer=("intermediate_size", "activation_sparsity_pattern"),
        packed=_PER_LAYER_EMBEDDINGS,
        adjust=_shared_caches,
        pinned=_cache_owners,
    ),
    "gemma4_text": Family(
        roles=_KEEPER,
        packed=_PER_LAYER_EMBEDDINGS,
        adjust=_shared_caches,
        pinned=_all_of(_cache_owners, _last_full_attention),
    ),
    "gemma4_unified_text": Family(
        roles=_KEEPER, pinned=_all_of(_cache_owners, _last_full_attention), adjust=_shared_caches
    ),
    "glm5_next_text": _SELECTIONS,
    "glm_moe_dsa": _SELECTIONS,
    "gpt2": Family(obstacle=_inverse_scaling),
    "gpt_neo": Family(adjust=_attention_types),
    "gpt_neox_japanese": Family(pinned=_pins(Pinned(-1, "only its attention adds a bias"))),
    "hunyuan_v1_moe": Family(per_layer=("moe_topk", "num_experts")),
    "hy_v4": _SELECTIONS,
    "imagegpt": Family(obstacle=_inverse_scaling),
    "jamba": Family(
        adjust=_together(
            _periodic("attn_layer_period", "attn_layer_offset", "attention blocks"),
            _periodic("expert_layer_period", "expert_layer_offset", "blocks with experts"),
        )
    ),
    "led": Family(lengthens=True, encoder_per_layer=("attention_window",)),
    "longformer": Family(lengthens=True, per_layer=("attention_window",)),
    "longt5": _T5,
    "minicpm3": Family(adjust=_residual_scale),
    "minimax": Family(
        obstacle=_refused(
            "the decay of its linear attention is computed from each block's index and the number of blocks; "
            "transformers stores the result, other runtimes would compute another one"
        )
    ),
    "mistral_large4_text": Family(
        not_per_layer=("kv_source_layers",), adjust=_together(_shared_selections, _shared_sources)
    ),
    "modernbert": Family(pinned=_pins(Pinned(0, _FIRST_NORM))),
    "modernbert-decoder": Family(pinned=_pins(Pinned(0, _FIRST_NORM))),
    "mt5": _T5,
    "pop2piano": _T5,
    "prophetnet": _WINDOWS,
    "qwen2_moe": _SPARSE_STEP,
    "qwen3_moe": _SPARSE_STEP,
    "qwen3_next": _SPARSE_STEP,
    "qwen3_omni_moe_text": _SPARSE_STEP,
    "qwen3_vl_moe_text": _SPARSE_STEP,
    "recurrent_gemma": Family(adjust=_cyclic("block_types"), not_per_layer=("block_types",)),
    "roberta": _ROBERTA,
    "rwkv": Family(
        pinned=_pins(Pinned(0, "only it normalises the embeddings")),
        obstacle=lambda config: (
            "its weights are rescaled by their block's index every `rescale_every` blocks, set `rescale_every` to 0 "
            "first"
            if config.get("rescale_every")
            else None
        ),
    ),
    "switch_transformers": _T5,
    "t5": _T5,
    "udop": _T5,
    "xlm-roberta": _ROBERTA,
    "xlnet": Family(time_major=True),
    "xlstm": Family(adjust=lambda config, plan: {"num_blocks": len(plan.kept)}),
    "zaya": Family(adjust=_only_the_last("its experts are chosen with what the block before chose them by")),
}
"""`config.model_type` -> what a cut must know beyond the common names."""


def facts_of(model_type: str) -> Family:
    """The facts about a model type; none, where nothing special is known."""
    return FAMILIES.get(model_type, Family())
