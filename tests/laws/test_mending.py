"""Repair and healing over architectures of every kind; `python -m tools.sweep --mend` goes over all of transformers."""

import pytest
import transformers
from tools.sweep.mending import mend
from tools.sweep.shrink import small_model


@pytest.mark.parametrize(
    ("class_name", "model_type", "repair"),
    [
        ("BertForMaskedLM", "bert", "passed"),
        ("BioGptForSequenceClassification", "biogpt", "passed"),
        ("BloomForCausalLM", "bloom", "passed"),
        ("DeepseekV3ForCausalLM", "deepseek_v3", "passed"),
        ("Gemma2ForCausalLM", "gemma2", "passed"),
        ("EncoderDecoderModel", "encoder-decoder", "raw: Text alone does not reach"),
        ("GptOssForCausalLM", "gpt_oss", "passed"),
        ("Gemma3ForSequenceClassification", "gemma3", "raw: The repair was thrown away"),
        ("JambaForCausalLM", "jamba", "raw: Where the blocks"),
        ("Llama4ForCausalLM", "llama4_text", "raw: The repair was thrown away"),
        ("MixtralForCausalLM", "mixtral", "passed"),
        ("MambaForCausalLM", "mamba", "passed"),
        ("ModernBertForMaskedLM", "modernbert", "passed"),
        ("OPTForCausalLM", "opt", "passed"),
        ("Qwen3MoeForCausalLM", "qwen3_moe", "passed"),
        ("T5ForConditionalGeneration", "t5", "passed"),
        ("VibeVoiceAsrForConditionalGeneration", "vibevoice_asr", "passed"),
    ],
)
def test_a_cut_is_mended_or_left_as_it_was_and_said(class_name, model_type, repair):
    """Mixtures of experts are repaired by what their attention writes; Jamba's blocks have no map in common."""
    found = mend(small_model(getattr(transformers, class_name), model_type))
    assert found["repair"].startswith(repair)
    assert found["healing"] == "passed"
