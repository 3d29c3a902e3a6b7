"""The parts inside a block: which weight matrices belong to its attention and which to its feed-forward part."""

import re
from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn

from avss.errors import ConfigError, UnsupportedArchitectureError, unknown_name

WeightChoice = Literal["ffn", "attention", "all"]
"""The feed-forward matrices of a block, those of its attention, or both."""

ATTENTION_NAMES = (
    "attention",  # BERT, RoBERTa, ELECTRA, DistilBERT, DeBERTa, GPT-NeoX, StableLM alpha
    "attn",  # GPT-2, GPT-J, MPT, ModernBERT
    "self_attn",  # Llama, Mistral, Qwen, Gemma, Phi, OLMo, StableLM, OPT, BART
    "self_attention",  # Bloom, Falcon
    "crossattention",  # BERT and GPT-2 as decoders
    "encoder_attn",  # BART decoders
    "multi_head_attention",  # CTRL
)
"""Well-known names of a block's attention module. Everything else with a weight matrix is feed-forward: two modules of
a gated unit, BERT's `intermediate` and `output`, OPT's `fc1` and `fc2`, GPT-2's Conv1D, experts and their router."""

_LIKE_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def is_attention(path: str) -> bool:
    """Whether a dotted path inside a block leads into its attention: by a well-known name, or one that says so.

    Example:
        >>> is_attention("self_attn.q_proj.weight"), is_attention("mlp.up_proj.weight")
        (True, False)
    """
    parts = path.split(".")
    return any(part in ATTENTION_NAMES or _LIKE_ATTENTION.search(part) for part in parts)


def weight_matrices(block: nn.Module, choice: WeightChoice = "all") -> dict[str, nn.Parameter]:
    """The weight matrices of a block by their path inside it, in the order the block holds them.

    A matrix is a parameter of two dimensions or more, so biases and norms are none; neither are tables of an
    `nn.Embedding` (relative positions). The stacked weights of several experts are one.

    Args:
        block: One block.
        choice: Which part.

    Raises:
        ConfigError: The choice is unknown.
        UnsupportedArchitectureError: The block has no such matrix; the message lists those it has.
    """
    if choice not in get_args(WeightChoice):
        raise ConfigError(unknown_name("--weights", choice, get_args(WeightChoice)))
    tables = {id(module.weight) for module in block.modules() if isinstance(module, nn.Embedding)}
    every = {
        path: weight for path, weight in block.named_parameters() if weight.dim() >= 2 and id(weight) not in tables
    }
    chosen = {path: weight for path, weight in every.items() if _belongs(path, choice)}
    if not chosen:
        raise UnsupportedArchitectureError(
            f"A block `{type(block).__name__}` has no weight matrix for `{choice}`. It has: {_listed(every)}. Choose "
            "another of ffn, attention and all."
        )
    return chosen


def _belongs(path: str, choice: WeightChoice) -> bool:
    return choice == "all" or is_attention(path) == (choice == "attention")


def _listed(weights: Mapping[str, nn.Parameter]) -> str:
    return ", ".join(f"`{path}`" for path in weights) or "none"
