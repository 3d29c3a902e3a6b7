"""Tiny random models of the common text architectures, built from config objects: no download, a few milliseconds.

Every weight is drawn anew, norms and biases included, and large enough that each block changes the result: a cut that
takes the wrong block, or mixes two of them up, cannot go unnoticed.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 99
HIDDEN = 32
HEADS = 4
POSITIONS = 64
PAD, BOS, EOS = 0, 1, 2

SLIDING, FULL = "sliding_attention", "full_attention"
MIXED_5 = [SLIDING, FULL, SLIDING, SLIDING, FULL]
"""No period and no symmetry: any removal by position alone gives another list."""

Builder = Callable[[], PreTrainedModel]


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draws every parameter from a fixed seed and sets the model to evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            # Matrices anew; norms and biases around what they are.
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model.eval()


def build(class_name: str, config: PretrainedConfig) -> PreTrainedModel:
    """A random model of a class of transformers."""
    torch.manual_seed(0)
    return randomise(getattr(transformers, class_name)(config))


def decoder(config_class: str, model_class: str, **settings: Any) -> Builder:
    """A builder for a decoder whose config uses today's common names."""
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return lambda: build(model_class, getattr(transformers, config_class)(**(common | settings)))


def encoder(config_class: str, model_class: str, **settings: Any) -> Builder:
    """A builder for an encoder of the BERT kind."""
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        # RoBERTa counts positions from the padding id + 1 on.
        "max_position_embeddings": POSITIONS + 2,
        "pad_token_id": PAD,
        "num_labels": 3,
    }
    return lambda: build(model_class, getattr(transformers, config_class)(**(common | settings)))


def distilbert(model_class: str) -> Builder:
    """A builder for DistilBERT, whose config has names of its own."""
    settings = {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": 48, "n_layers": 4, "n_heads": HEADS}
    return lambda: build(
        model_class,
        transformers.DistilBertConfig(**settings, max_position_embeddings=POSITIONS, pad_token_id=PAD, num_labels=3),
    )


def gpt2(model_class: str, **settings: Any) -> Builder:
    """A builder for GPT-2, whose config has names of its own."""
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_inner": 48, "n_layer": 5, "n_head": HEADS}
    ids = {"n_positions": POSITIONS} | {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "num_labels": 3}
    return lambda: build(model_class, transformers.GPT2Config(**(sizes | ids | settings)))


ARCHITECTURES: dict[str, Builder] = {
    "bert": encoder("BertConfig", "BertModel"),
    "bert-masked": encoder("BertConfig", "BertForMaskedLM"),
    "bert-classifier": encoder("BertConfig", "BertForSequenceClassification"),
    "bert-tokens": encoder("BertConfig", "BertForTokenClassification"),
    "distilbert": distilbert("DistilBertModel"),
    "distilbert-masked": distilbert("DistilBertForMaskedLM"),
    "distilbert-classifier": distilbert("DistilBertForSequenceClassification"),
    "electra": encoder("ElectraConfig", "ElectraModel", embedding_size=16),
    "electra-masked": encoder("ElectraConfig", "ElectraForMaskedLM", embedding_size=16),
    "electra-classifier": encoder("ElectraConfig", "ElectraForSequenceClassification", embedding_size=HIDDEN),
    "gemma": decoder("GemmaConfig", "GemmaForCausalLM", head_dim=8),
    "gemma2": decoder(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=list(MIXED_5),
    ),
    "gemma3": decoder(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=list(MIXED_5),
    ),
    "gpt2": gpt2("GPT2LMHeadModel"),
    "gpt2-classifier": gpt2("GPT2ForSequenceClassification"),
    "granite": decoder(
        "GraniteConfig",
        "GraniteForCausalLM",
        residual_multiplier=0.7,
        embedding_multiplier=2.0,
        attention_multiplier=0.3,
        logits_scaling=1.5,
    ),
    "llama": decoder("LlamaConfig", "LlamaForCausalLM"),
    "llama-tied": decoder("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True, num_hidden_layers=6),
    "llama-classifier": decoder("LlamaConfig", "LlamaForSequenceClassification", num_labels=3),
    "mistral": decoder("MistralConfig", "MistralForCausalLM", sliding_window=4),
    "olmo": decoder("OlmoConfig", "OlmoForCausalLM"),
    "olmo2": decoder("Olmo2Config", "Olmo2ForCausalLM"),
    "phi3": decoder("Phi3Config", "Phi3ForCausalLM"),
    "qwen2": decoder("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen2-sliding": decoder(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        num_hidden_layers=6,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=3,
        layer_types=[FULL, FULL, FULL, SLIDING, FULL, SLIDING],
    ),
    "qwen3": decoder("Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    "qwen3-sliding": decoder(
        "Qwen3Config", "Qwen3ForCausalLM", head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "qwen3-body": decoder("Qwen3Config", "Qwen3Model", head_dim=8),
    "roberta": encoder("RobertaConfig", "RobertaModel"),
    "roberta-masked": encoder("RobertaConfig", "RobertaForMaskedLM"),
    "roberta-classifier": encoder("RobertaConfig", "RobertaForSequenceClassification"),
    "stablelm": decoder("StableLmConfig", "StableLmForCausalLM"),
    "xlm-roberta": encoder("XLMRobertaConfig", "XLMRobertaModel"),
    "xlm-roberta-masked": encoder("XLMRobertaConfig", "XLMRobertaForMaskedLM"),
    "xlm-roberta-classifier": encoder("XLMRobertaConfig", "XLMRobertaForSequenceClassification"),
}
"""Name -> builder of a tiny model. Architectures of other kinds are in `tests/laws/test_every_architecture.py`."""


def seq2seq(name: str, **settings: Any) -> Builder:
    """A builder for an encoder-decoder whose stacks differ in length."""
    sizes = {"vocab_size": VOCAB, "d_model": HIDDEN, "pad_token_id": PAD, "eos_token_id": EOS}
    config_class, model_class = f"{name}Config", f"{name}ForConditionalGeneration"
    return lambda: build(model_class, getattr(transformers, config_class)(**(sizes | settings)))


OTHER_HEADS: dict[str, Builder] = {
    "t5": seq2seq("T5", d_kv=8, d_ff=48, num_heads=HEADS, num_layers=5, num_decoder_layers=4),
    "bart": seq2seq(
        "Bart",
        encoder_layers=3,
        decoder_layers=4,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=POSITIONS,
        bos_token_id=BOS,
        forced_eos_token_id=None,
        decoder_start_token_id=EOS,
    ),
    "bert-reward": encoder("BertConfig", "BertForSequenceClassification", num_labels=1),
    "bert-labels": encoder(
        "BertConfig", "BertForSequenceClassification", problem_type="multi_label_classification", num_labels=3
    ),
    "llama-reward": decoder("LlamaConfig", "LlamaForSequenceClassification", num_labels=1),
    "gpt2-padless": gpt2("GPT2ForSequenceClassification", pad_token_id=None),
    "llama-padless": decoder("LlamaConfig", "LlamaForSequenceClassification", pad_token_id=None, num_labels=3),
}
"""Models that answer, or are padded, in another way than those of `ARCHITECTURES`, which every law is held against."""


@functools.cache
def stored(name: str) -> PreTrainedModel:
    """The tiny model of that name, built once. Do not change it; its builder gives one of your own."""
    return (ARCHITECTURES | OTHER_HEADS)[name]()


def token_batch(
    num_sequences: int = 3, length: int = 12, *, padded: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Token ids `[B, T]` and keep `[B, T]`; with padding on the right, row i lacks its last 2 i tokens."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(5, VOCAB, (num_sequences, length), generator=generator)
    keep = torch.ones_like(token_ids, dtype=torch.bool)
    if padded:
        for row in range(num_sequences):
            keep[row, length - 2 * row :] = False
        token_ids[~keep] = PAD
    return token_ids, keep
