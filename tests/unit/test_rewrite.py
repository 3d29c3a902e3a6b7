"""Config in, config out: every kind of field that speaks of blocks."""

from typing import Any

import pytest
import transformers
from tools.sweep.shrink import small_config
from torch import nn
from transformers import PretrainedConfig

from avss.errors import UnsupportedArchitectureError
from avss.models.families import InexpressibleError, facts_of, progression
from avss.models.rewrite import config_changes, pinned_blocks, rewrite_config, rewrite_generation
from avss.models.stack import BlockStack
from avss.record import Plan


def stack(
    num_blocks: int, field: str = "num_hidden_layers", path: tuple[str, ...] = (), at: str = "layers"
) -> BlockStack:
    blocks = nn.ModuleList(nn.Identity() for _ in range(num_blocks))
    return BlockStack(path=at, blocks=blocks, count_field=field, config_path=path)


def plan(num_blocks: int, *removed: int) -> Plan:
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule="by hand")


def rewritten(config: PretrainedConfig, *removed: int, **where: Any) -> dict[str, Any]:
    """The fields that change, with their new values."""
    found = stack(6, **where)
    smaller = rewrite_config(config, found, plan(6, *removed))
    return {change.field: change.after for change in config_changes(config, smaller)}


def llama(**settings: Any) -> PretrainedConfig:
    return transformers.LlamaConfig(num_hidden_layers=6, **settings)


LISTS: list[tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = [
    ({"layer_types": ["a", "b", "c", "d", "e", "f"]}, (0, 4), {"layer_types": ["b", "c", "d", "f"]}),
    ({"no_rope_layers": [1, 0, 1, 1, 0, 1]}, (1,), {"no_rope_layers": [1, 1, 1, 0, 1]}),
    # A list of block indices, even where it is as long as the stack.
    ({"moe_layers": [1, 3, 5]}, (0, 3), {"moe_layers": [0, 3]}),
    ({"moe_layers": [0, 1, 2, 3, 4, 5]}, (2,), {"moe_layers": [0, 1, 2, 3, 4]}),
    ({"mlp_only_layers": []}, (2,), {}),
    ({"cross_attention_layers": [-1, 2]}, (0,), {"cross_attention_layers": [4, 1]}),
    ({"full_attn_idxs": [4, 9]}, (1,), {"full_attn_idxs": [3]}),
    ({"first_k_dense_replace": 3}, (0, 2, 4), {"first_k_dense_replace": 1}),
    ({"num_kv_shared_layers": 2}, (0, 5), {"num_kv_shared_layers": 1}),
    ({"pruned_heads": {"1": [0], "4": [1]}}, (1, 2), {"pruned_heads": {"2": [1]}}),
    ({"swiglu_limits": [0, 1, 2, 3, 4, 5]}, (1, 2), {"swiglu_limits": [0, 3, 4, 5]}),
    ({"local_layer_ids": [0, 1, 3]}, (1,), {"local_layer_ids": [0, 2]}),
    ({"mtp_local_layer_ids": [0, 1, 3]}, (1,), {}),
    ({"some_sizes": [1, 2, 3]}, (1,), {}),
    ({"some_number": 6}, (1,), {}),
]


@pytest.mark.parametrize(("settings", "removed", "expected"), LISTS)
def test_fields_that_speak_of_blocks_follow_the_cut(settings, removed, expected):
    config = llama()
    for field, value in settings.items():
        setattr(config, field, value)
    if "layer_types" in settings:
        config.layer_types = [
            {"a": "full_attention"}.get(kind, "sliding_attention") for kind in settings["layer_types"]
        ]
        config.layer_types[1] = "full_attention"
        before = list(config.layer_types)
        expected = {"layer_types": [before[block] for block in range(6) if block not in removed]}
    found = rewritten(config, *removed)
    assert found.pop("num_hidden_layers") == 6 - len(removed)
    assert {
        key: (value if not isinstance(value, dict) else {str(k): v for k, v in value.items()})
        for key, value in found.items()
    } == expected


def test_the_given_config_is_left_alone():
    config = llama()
    config.moe_layers = [1, 3]
    before = config.to_dict()
    rewritten(config, 0)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperatures", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        ("temperatures", (1, 2, 3, 4, 5, 6)),
        ("special_layer_ids", [1, 4]),
        ("boosted_blocks", [0, -1]),
        ("settings_by_block", {str(block): "x" for block in range(6)}),
        ("nested", {"inner": {"scales": [1, 2, 3, 4, 5, 6]}}),
    ],
)
def test_unknown_fields_that_speak_of_blocks_are_refused_by_name(field, value):
    config = llama()
    setattr(config, field, value)
    with pytest.raises(UnsupportedArchitectureError, match=rf"`{field}[^`]*` speaks of blocks.*`llama`.*CONTRIBUTING"):
        rewritten(config, 1)


@pytest.mark.parametrize("value", [[2, 9], [1, 3, 6]], ids=["beyond the stack too", "counted from 1"])
def test_one_entry_that_fits_the_stack_makes_a_list_of_indices(value):
    config = llama()
    config.tap_layers = value
    with pytest.raises(UnsupportedArchitectureError, match="`tap_layers` speaks of blocks"):
        rewritten(config, 1)


def test_only_the_own_side_of_an_encoder_decoder_is_counted_down():
    config = transformers.BartConfig(encoder_layers=6, decoder_layers=6)
    assert rewritten(config, 0, 1, field="decoder_layers", at="model.decoder.layers") == {"decoder_layers": 4}
    config = transformers.T5Config(num_layers=6, num_decoder_layers=4)
    assert rewritten(config, 0, 1, field="num_layers", at="encoder.block") == {"num_layers": 4}


def test_an_encoder_shorter_than_the_decoder_whose_cache_it_sizes_is_refused():
    config = transformers.T5Config(num_layers=6, num_decoder_layers=6)
    with pytest.raises(UnsupportedArchitectureError, match=r"sizes the decoder's cache.*--stack decoder"):
        rewritten(config, 0, field="num_layers", at="encoder.block")


def llava(layer: Any) -> PretrainedConfig:
    vision, text = transformers.CLIPVisionConfig(num_hidden_layers=6), transformers.LlamaConfig(num_hidden_layers=6)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=layer)


@pytest.mark.parametrize(
    ("layer", "removed", "expected"),
    [(-2, (1,), None), (-3, (5,), -2), (3, (0, 4), 2), (3, (4,), None), ([-3, 2], (0, 5), [-2, 1])],
)
def test_features_are_taken_after_the_same_block_of_a_tower(layer, removed, expected):
    found = rewritten(llava(layer), *removed, path=("vision_config",))
    assert found.pop("vision_config.num_hidden_layers") == 6 - len(removed)
    assert found == ({} if expected is None else {"vision_feature_layer": expected})


def test_features_before_the_last_block_cannot_become_the_last_state():
    with pytest.raises(UnsupportedArchitectureError, match="`vision_feature_layer` takes features before the removed"):
        rewritten(llava(-2), 5, path=("vision_config",))


def test_the_text_tower_is_cut_in_its_own_config():
    assert rewritten(llava(-2), 1, path=("text_config",)) == {"text_config.num_hidden_layers": 5}


def test_a_config_that_types_blocks_anew_is_refused():
    """Gemma 4 makes its last block a full one when the config is read."""
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = transformers.Gemma4TextConfig(num_hidden_layers=6, layer_types=kinds)
    assert [pin.block for pin in pinned_blocks(config, stack(6))] == [5]
    with pytest.raises(UnsupportedArchitectureError, match=r"Block 5 .*cannot be removed"):
        rewritten(config, 5)


def test_a_hybrid_keeps_a_block_with_attention():
    config = transformers.JambaConfig(
        num_hidden_layers=6, attn_layer_period=6, attn_layer_offset=2, expert_layer_period=1, expert_layer_offset=0
    )
    with pytest.raises(UnsupportedArchitectureError, match="no block with attention would be left"):
        rewritten(config, 2)


@pytest.mark.parametrize("period", range(1, 7))
@pytest.mark.parametrize("offset", range(3))
@pytest.mark.parametrize("length", [1, 4, 9])
def test_progression_finds_flags_again(period, offset, length):
    flags = [index % period == offset for index in range(length)]
    found = progression(flags)
    assert found is not None
    assert [index % found[0] == found[1] for index in range(length)] == flags


def test_progression_of_uneven_flags_is_none():
    assert progression([True, False, True, True]) is None


def test_the_first_blocks_of_a_text_tower_that_take_features_of_an_image_stay():
    """Qwen3-VL adds one set of features after each of its first text blocks; a probe of text does not see it."""
    config = small_config("qwen3_vl")
    found = stack(5, path=("text_config",), at="model.language_model.layers")
    count = len(config.vision_config.deepstack_visual_indexes)
    assert [pin.block for pin in pinned_blocks(config, found)] == list(range(count))
    with pytest.raises(UnsupportedArchitectureError, match="features of an image"):
        rewrite_config(config, found, plan(5, count - 1))
    assert rewrite_config(config, found, plan(5, count)).text_config.num_hidden_layers == 4
    assert pinned_blocks(config.text_config, stack(5)) == ()  # without a vision tower there is no image


def test_a_tower_that_names_its_own_feature_layer_keeps_it_after_the_same_block():
    config = small_config("phi4_multimodal")
    config.vision_config.feature_layer = -3
    found = stack(5, path=("vision_config",), at="model.embed_tokens_extend.image_embed.img_processor.encoder.layers")
    assert rewrite_config(config, found, plan(5, 4)).vision_config.feature_layer == -2
    assert rewrite_config(config, found, plan(5, 1)).vision_config.feature_layer == -3
    config.vision_config.feature_layer = -2
    with pytest.raises(UnsupportedArchitectureError, match="would be the last ones then"):
        rewrite_config(config, found, plan(5, 4))


def test_towers_that_are_linked_block_by_block_are_refused():
    config = transformers.LlavaConfig(text_config=llama(), vision_config=transformers.CLIPVisionConfig())
    found = stack(6, path=("text_config",))
    assert rewrite_config(config, found, plan(6, 1)).text_config.num_hidden_layers == 5
    config.deepstack_layer_map = [[1, 2], [3, 4]]
    with pytest.raises(UnsupportedArchitectureError, match="deepstack_layer_map"):
        rewrite_config(config, found, plan(6, 1))


def test_sources_of_keys_are_renumbered_and_stay():
    raw = {"kv_source_layers": [0, 1, 1, 3, 3], "indexer_types": ["full"] * 5}
    adjust = facts_of("mistral_large4_text").adjust
    assert adjust(raw, plan(5, 0, 2)) == {"kv_source_layers": [0, 1, 1]}
    with pytest.raises(InexpressibleError, match="block 4 reads the keys and values of block 3"):
        adjust(raw, plan(5, 3))


@pytest.mark.parametrize(
    ("removed", "allowed"), [((0,), True), ((1,), False), ((3,), False), ((3, 4), True), ((4,), True)]
)
def test_a_block_that_reads_anothers_selection_keeps_it(removed, allowed):
    """A short text selects everything, so that no probe could tell."""
    raw = {"indexer_types": ["full", "full", "shared", "full", "shared"]}
    adjust = facts_of("glm_moe_dsa").adjust
    if allowed:
        assert adjust(raw, plan(5, *removed)) == {}
    else:
        with pytest.raises(InexpressibleError, match="selected"):
            adjust(raw, plan(5, *removed))


def test_heads_that_time_words_follow_their_blocks():
    generation = transformers.GenerationConfig(alignment_heads=[[0, 1], [2, 0], [3, 1]])
    decoder = stack(4, "decoder_layers", at="model.decoder.layers")
    smaller = rewrite_generation(generation, decoder, plan(4, 1, 3))
    assert smaller.alignment_heads == [[0, 1], [1, 0]]
    assert generation.alignment_heads == [[0, 1], [2, 0], [3, 1]]
    assert not hasattr(rewrite_generation(generation, decoder, plan(4, 0, 2, 3)), "alignment_heads")
    encoder = stack(4, "encoder_layers", at="model.encoder.layers")
    assert rewrite_generation(generation, encoder, plan(4, 1)) is generation
