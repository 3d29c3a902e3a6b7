"""The laws of a cut for architectures of every kind, their awkward settings switched on.

`make sweep` holds the same laws against all of transformers; these are the ones that must never break unseen.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from tools.sweep.laws import judge
from tools.sweep.shrink import small_model
from transformers import PreTrainedModel

from tests.support.architectures import FULL, MIXED_5


def tiny(class_name: str, model_type: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    return lambda: small_model(getattr(transformers, class_name), model_type, **settings)


ROPE_5 = [1, 0, 1, 1, 0]

NAMED: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, str]]] = {
    "ast": (tiny("ASTForAudioClassification", "audio-spectrogram-transformer"), {}),
    "bamba": (tiny("BambaForCausalLM", "bamba", attn_layer_indices=[1, 3]), {"scattered": "no block with attention"}),
    "bart": (tiny("BartForConditionalGeneration", "bart", encoder_layers=4, decoder_layers=3), {}),
    "bloom": (tiny("BloomForCausalLM", "bloom", n_layer=4), {}),
    "canine": (tiny("CanineForSequenceClassification", "canine"), {}),
    "deberta-v2": (
        tiny(
            "DebertaV2ForMaskedLM",
            "deberta-v2",
            conv_kernel_size=3,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
        ),
        {"first": "Block 0.*convolution"},
    ),
    "deepseek-v3": (tiny("DeepseekV3ForCausalLM", "deepseek_v3", first_k_dense_replace=2), {}),
    "falcon": (tiny("FalconForCausalLM", "falcon"), {}),
    "gemma4": (
        tiny("Gemma4ForCausalLM", "gemma4_text", layer_types=MIXED_5, hidden_size_per_layer_input=8),
        {"last": "Block 4.*last block with full attention"},
    ),
    "gpt-neo": (tiny("GPTNeoForCausalLM", "gpt_neo"), {}),
    "gpt-neox": (tiny("GPTNeoXForCausalLM", "gpt_neox"), {}),
    "gpt-oss": (tiny("GptOssForCausalLM", "gpt_oss", layer_types=MIXED_5), {}),
    "jamba": (
        tiny(
            "JambaForCausalLM",
            "jamba",
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=5,
            expert_layer_offset=2,
        ),
        {"middle": "uneven distances|built differently", "scattered": "no block with attention"},
    ),
    "llama4": (tiny("Llama4ForCausalLM", "llama4_text", moe_layers=[1, 3], no_rope_layers=ROPE_5), {}),
    "llava": (tiny("LlavaForConditionalGeneration", "llava"), {}),
    "mamba": (tiny("MambaForCausalLM", "mamba"), {}),
    "minicpm3": (tiny("MiniCPM3ForCausalLM", "minicpm3"), {}),
    "mixtral": (tiny("MixtralForCausalLM", "mixtral"), {}),
    "modernbert": (tiny("ModernBertForMaskedLM", "modernbert"), {"first": "Block 0.*no norm of its own"}),
    "moonshine": (tiny("MoonshineForConditionalGeneration", "moonshine"), {}),
    "opt": (tiny("OPTForCausalLM", "opt"), {}),
    "qwen3-moe": (tiny("Qwen3MoeForCausalLM", "qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]), {}),
    "qwen3-next": (
        tiny(
            "Qwen3NextForCausalLM", "qwen3_next", layer_types=["linear_attention", FULL, "linear_attention", FULL, FULL]
        ),
        {},
    ),
    "siglip2": (tiny("Siglip2ForImageClassification", "siglip2"), {}),
    "smollm3": (tiny("SmolLM3ForCausalLM", "smollm3", no_rope_layers=ROPE_5), {}),
    "t5": (tiny("T5ForConditionalGeneration", "t5", num_layers=5, num_decoder_layers=3), {}),
    "vit": (tiny("ViTForImageClassification", "vit"), {}),
    "wav2vec2-bert": (tiny("Wav2Vec2BertForCTC", "wav2vec2-bert"), {}),
    "whisper": (tiny("WhisperForConditionalGeneration", "whisper", encoder_layers=3, decoder_layers=3), {}),
    "xlnet": (tiny("XLNetLMHeadModel", "xlnet"), {}),
}
"""Name -> builder, and the cuts that must be refused, with what the reason must say."""


@pytest.mark.parametrize("name", NAMED)
def test_every_law_holds(name):
    builder, refused = NAMED[name]
    tried = {"first", "scattered", *refused}
    for verdict in judge(builder(), tried=tried):
        for place, outcome in verdict.cuts.items():
            if place in refused and verdict.chosen:
                assert re.search(refused[place], outcome), (name, verdict.stack, place, outcome)
            elif verdict.stack != "vision":
                assert outcome == "passed", (name, verdict.stack, place, outcome)
