"""Hidden states -> one vector a text, as the model's sentence-transformers files ask for.

Shape letters: B batch, T token, D hidden.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from avss.errors import TaskError
from avss.models.load import Loaded

Pooling = Callable[[Tensor, Tensor], Tensor]
"""Hidden states `[B, T, D]` and keep `[B, T]` -> one vector a text, `[B, D]`."""


def mean_pooling(hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """The mean over the real tokens; padding does not count."""
    weights = keep_BT.to(hidden_BTD.dtype)[..., None]
    return (hidden_BTD * weights).sum(1) / weights.sum(1)


def first_token(hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """The first token, `[CLS]` of a BERT."""
    del keep_BT
    return hidden_BTD[:, 0]


def last_token(hidden_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """The last real token; padding is on the right."""
    rows = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
    return hidden_BTD[rows, keep_BT.sum(1) - 1]


POOLINGS: dict[str, Pooling] = {"mean": mean_pooling, "cls": first_token, "lasttoken": last_token}


def find_pooling(loaded: Loaded) -> Pooling:
    """What the model's `1_Pooling/config.json` (sentence-transformers) asks for; the mean where there is none.

    Raises:
        TaskError: It asks for a pooling that is not known here, or for several at once.
    """
    path = loaded.companions / "1_Pooling" / "config.json" if loaded.companions else None
    if path is None or not path.is_file():
        return mean_pooling
    config = json.loads(path.read_text(encoding="utf-8"))
    # Older files have one switch a mode, newer ones the mode's name.
    switched = [name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for name, on in
                config.items() if name.startswith("pooling_mode_") and on is True]  # fmt: skip
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else switched
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise TaskError(
            f"`{path.parent.name}/{path.name}` asks for the pooling `{' + '.join(map(str, modes)) or 'none'}`. "
            f"Allowed: {', '.join(POOLINGS)}. Such a model's embeddings cannot be compared by this version."
        )
    return POOLINGS[modes[0]]
