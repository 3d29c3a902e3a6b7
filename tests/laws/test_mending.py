"""Repair and healing over architectures of every kind; `python -m tools.sweep --mend` goes over all of transformers."""

import pytest
import transformers
from tools.sweep.mending import mend
from tools.sweep.shrink import small_model


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("BertForMaskedLM", "bert"),
        ("BloomForCausalLM", "bloom"),
        ("DeepseekV3ForCausalLM", "deepseek_v3"),
        ("Gemma2ForCausalLM", "gemma2"),
        ("GptOssForCausalLM", "gpt_oss"),
        ("Llama4ForCausalLM", "llama4_text"),
        ("MambaForCausalLM", "mamba"),
        ("ModernBertForMaskedLM", "modernbert"),
        ("OPTForCausalLM", "opt"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("T5ForConditionalGeneration", "t5"),
    ],
)
def test_a_cut_is_mended_or_left_as_it_was_and_said(class_name, model_type):
    found = mend(small_model(getattr(transformers, class_name), model_type))
    assert found["healing"] == "passed" or found["healing"].startswith("raw: ")
    assert found["repair"] == "passed" or found["repair"].startswith("raw: ")
