"""Builds a tiny random model of any transformers class from its config: shrunk by the names of its fields.

What the rules of names do not get right is in `OVERRIDES`, as data.
"""

import inspect
import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from avss.models.stack import config_tree

LAYERS = 5
VOCAB = 99

# First match wins; each pattern must match the whole name.
_RULES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCAB),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|forced_eos_token_id", 2),
    (r"sep_token_id|cls_token_id|unk_token_id|mask_token_id", 3),
    (r"(image|video|audio|speech|vision|img)_(token_id|token_index|token)", 90),
    (
        r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_(encoder|decoder)_layers|depth",
        LAYERS,
    ),
    (r"(encoder|decoder)_num_hidden_layers|num_hidden_layers_per_stack|(en|de)coder_depth", LAYERS),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|num_query_groups|num_global_key_value_heads|n_kv_heads?", 2),
    (r"(encoder|decoder)_num_key_value_heads|swa_num_key_value_heads", 2),
    (r"(num_attention|num_query|num_self_attention|num_cross_attention|n|num|nhead)_?heads?", 4),
    (r"(encoder|decoder)_(attention|num_attention|n)_?heads|num_(encoder|decoder)_(attention_)?heads", 4),
    (r"linear_num_(key|value)_heads|num_lightning_heads|swa_num_attention_heads", 4),
    (r"intermediate_size(_mlp)?|ffn_dim|d_ff|n_inner|dim_feedforward|(encoder|decoder)_ffn_dim|ffn_hidden_size", 48),
    (r"moe_intermediate_size|shared_expert_intermediate_size|expert_ffn_hidden_size|dense_intermediate_size", 24),
    (r"moe_shared_expert_intermediate_size|shared_intermediate_size|expert_dim|encoder_ffn_size|decoder_ffn_size", 24),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|encoder_embed_dim|emb_dim|word_embed_proj_dim", 32),
    (r"(encoder_|decoder_|text_|vision_)?(hidden_size|embed_dim|hidden_dim)|attention_hidden_size|lru_width", 32),
    (r"projection_dim|out_hidden_size|output_dim|projection_hidden_size|proj_dim|shared_embedding_dim", 32),
    (r"head_dim|global_head_dim|d_kv|v_head_dim|attention_head_size|linear_(key|value)_head_dim|kv_channels", 8),
    (r"qk_nope_head_dim|qk_rope_head_dim|index_head_dim|mamba_d_head|mamba_head_dim|swa_head_dim|d_head", 8),
    (r"query_pre_attn_scalar|rotary_dim", 8),
    (r"(q|kv|o)_lora_rank|index_topk|index_n_heads|low_rank_dim", 16),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_local_experts|n_shared_experts_total", 4),
    (
        r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k(_experts)?|num_selected_experts|num_experts_per_token|moe_top_k",
        2,
    ),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"(max_)?(.*_)?position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_position|seq_length", 64),
    (r"max_(source|target|encoder|decoder)_positions?|max_seq_length|model_max_length", 64),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|window_size|attention_window_size", 4),
    (r"(image_size|img_size)", 16),
    (r"patch_size", 4),
    (r"num_mel_bins|input_feat_per_channel|n_mels|num_bins", 16),
    (r"state_size|mamba_d_state|ssm_state_size|conv_dimension", 8),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads)", 8),
    (r"mamba_n_groups|n_groups|num_hash_heads", 1),
    (r"context_size|chunk_size|mamba_chunk_size|time_step_rank|mamba_dt_rank", 8),
    (r"num_labels", 3),
    (r"num_image_tokens|num_query_tokens|mm_tokens_per_image|image_seq_length|num_latents", 4),
)
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _RULES)

_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_ALL_HEADS = {"num_key_value_heads": 4}
# transformers sizes the decoder's cache by the encoder: an encoder that may lose blocks must be the longer one.
_SHORT_DECODER = {"num_decoder_layers": 3, "decoder_start_token_id": 0}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("longt5", "mt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5"), _SHORT_DECODER),
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "speech-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "dots3_note": _ALL_HEADS,
    "dots3_note_text": _ALL_HEADS,
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": _ALL_HEADS,
    "gemma2": {"layer_types": _MIXED},
    "gemma3_text": {"layer_types": _MIXED},
    "gemma3n_text": {
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "got_ocr2_vision": {"global_attn_indexes": [1, 4]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {"moe_layers": [1, 3], "no_rope_layers": [1, 1, 0, 1, 0]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "led": {"attention_window": 4},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "sam_vision_model": {"global_attn_indexes": [1, 4]},
    "rwkv": {"rescale_every": 0},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0]},
    **{name: {"vocab_size": VOCAB} for name in ("wav2vec2-bert", "wav2vec2-conformer")},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
    },
}
"""Model type of a config -> fields that the rules of names do not get right."""


def small_value(name: str, default: Any) -> Any:
    """The tiny value for a config field, or None to leave it."""
    if isinstance(default, bool):
        return None
    if isinstance(default, int) or default is None:
        for pattern, value in _COMPILED:
            if pattern.fullmatch(name):
                if name == "pad_token_id":
                    return value if default is None or default > VOCAB else None
                if default is None and not name.endswith(("hidden_size", "embed_dim", "head_dim")):
                    return None
                return None if isinstance(default, int) and 0 <= default <= value and "layers" not in name else value
    return None


def small_settings(config_class: type[PretrainedConfig], default: PretrainedConfig | None = None) -> dict[str, Any]:
    """Keyword arguments that make a config of this class tiny, its sub-configs included."""
    default = default or config_class()
    settings: dict[str, Any] = {}
    accepted = inspect.signature(config_class.__init__).parameters
    for name, value in {**default.__dict__}.items():
        if name.startswith("_"):
            continue
        if isinstance(value, PretrainedConfig):
            settings[name] = {**small_settings(type(value), value), "model_type": value.model_type}
            continue
        small = small_value(name, value)
        if small is not None and (name in accepted or not isinstance(value, type(None))):
            settings[name] = small
    rope = default.__dict__.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    if "kv_lora_rank" in default.__dict__ and "num_key_value_heads" in default.__dict__:
        settings["num_key_value_heads"] = 4  # latent attention has a key for each head
    return _merged(settings, OVERRIDES.get(config_class.model_type, {}))


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    inner = {
        name: _merged(settings[name], value) for name, value in more.items() if isinstance(settings.get(name), dict)
    }
    return settings | more | inner


def small_config(model_type: str, **more: Any) -> PretrainedConfig:
    """A tiny config of a model type."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**(small_settings(config_class) | more))


def small_model(model_class: type[PreTrainedModel], model_type: str, **more: Any) -> PreTrainedModel:
    """A tiny random model of a class; a class that computes one part of a config's model gets that part."""
    causal = model_class.__name__.endswith(("ForCausalLM", "LMHeadModel", "WithLMHead"))
    config = small_config(model_type, **more)
    if causal and "is_decoder" in vars(config):
        config = small_config(model_type, **more, is_decoder=True)
    wanted = model_class.config_class
    if isinstance(wanted, type) and not isinstance(config, wanted):
        config = next((part for part in config_tree(config).values() if isinstance(part, wanted)), config)
    torch.manual_seed(0)
    return randomise(model_class(config))


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draws every parameter anew, so that each block matters, and sets the model to evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model.eval()
