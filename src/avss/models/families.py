"""What must be known about an architecture to cut it, as data.

A model type is listed here once its cuts have been proven by the law tests: cut = bypass, reload = memory, cached =
uncached generation. Anything else is refused with what was found; scoring needs no entry.

To add one: a line in `FAMILIES`, a tiny config in the tests' list of architectures, and the laws decide.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def _no_obstacle(config: Mapping[str, Any]) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Family:
    """Facts about one model type.

    Attributes:
        per_layer: Config fields that hold one entry per block.
        thresholds: Config fields that hold a block index below which blocks are of another kind: they shrink by the
            number of removed blocks below them.
        reserved_positions: Entries of the position table that no token can use.
        obstacle: The reason why a config cannot be cut, or None.
    """

    per_layer: tuple[str, ...] = ()
    thresholds: tuple[str, ...] = ()
    reserved_positions: int = 0
    obstacle: Callable[[Mapping[str, Any]], str | None] = _no_obstacle


def _gpt2_obstacle(config: Mapping[str, Any]) -> str | None:
    if config.get("scale_attn_by_inverse_layer_idx"):
        return (
            "`scale_attn_by_inverse_layer_idx` divides each block's attention by its index + 1, which a shorter model "
            "would compute anew for every block after the cut"
        )
    return None


_PLAIN = Family()
# Positions start after the padding id, which is 1.
_ROBERTA = Family(reserved_positions=2)
_LAYER_TYPES = Family(per_layer=("layer_types",))

FAMILIES: dict[str, Family] = {
    "bert": _PLAIN,
    "distilbert": _PLAIN,
    "electra": _PLAIN,
    "gemma": _PLAIN,
    "gemma2": _LAYER_TYPES,
    "gemma3_text": _LAYER_TYPES,
    "gpt2": Family(obstacle=_gpt2_obstacle),
    "granite": _PLAIN,
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": _PLAIN,
    "phi3": _PLAIN,
    "qwen2": Family(per_layer=("layer_types",), thresholds=("max_window_layers",)),
    "qwen3": Family(per_layer=("layer_types",), thresholds=("max_window_layers",)),
    "roberta": _ROBERTA,
    "stablelm": _PLAIN,
    "xlm-roberta": _ROBERTA,
}
"""`config.model_type` -> what a cut must know."""
