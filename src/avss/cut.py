"""Cuts blocks out of a model: new config -> empty model -> remapped weights. Never patches a live module."""

import dataclasses
import re
from collections.abc import Mapping

from torch import Tensor

from avss.errors import InvalidPlanError, UnsupportedArchitectureError
from avss.models.load import Loaded, assemble
from avss.models.rewrite import rewrite_config
from avss.record import Plan


def cut(loaded: Loaded, plan: Plan) -> Loaded:
    """The smaller model. The given one is left as it was.

    The kept blocks' weights are *shared* with the given model, not copied: a cut costs no memory, and several cuts can
    be measured side by side. Copy the model (`copy.deepcopy`) before training either.

    Raises:
        InvalidPlanError: The plan was made for another number of blocks.
        UnsupportedArchitectureError: This architecture's cut is not proven, or not possible.
    """
    stack = loaded.stack
    if plan.num_blocks != len(stack):
        raise InvalidPlanError(
            f"The plan was made for {plan.num_blocks} blocks; this model has {len(stack)}. Make a plan for this model."
        )
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise UnsupportedArchitectureError(
            "The model is loaded in a quantised format, and a cut would save the quantised weights as if they were the "
            "model. Load the full-precision checkpoint."
        )
    config = rewrite_config(loaded.model.config, stack, plan)
    state = remap(loaded.model.state_dict(), stack.path, plan)
    model = assemble(type(loaded.model), config, state)
    if getattr(loaded.model, "generation_config", None) is not None:
        model.generation_config = loaded.model.generation_config
    return dataclasses.replace(loaded, model=model)


def remap(state: Mapping[str, Tensor], path: str, plan: Plan) -> dict[str, Tensor]:
    """Drops the removed blocks' keys and renumbers the rest. Anchored at the stack's path: other lists are left alone.

    Example:
        >>> plan = Plan(num_blocks=3, removed=(1,), method="explicit", rule="by hand")
        >>> sorted(remap({"h.0.w": 0, "h.1.w": 1, "h.2.w": 2, "x.h.2.w": 3}, "h", plan).items())
        [('h.0.w', 0), ('h.1.w', 2), ('x.h.2.w', 3)]
    """
    inside = re.compile(rf"{re.escape(path)}\.(\d+)\.(.*)", re.DOTALL)
    remapped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = inside.fullmatch(key)
        if match is None:
            remapped[key] = tensor
        elif int(match[1]) in plan.index_map:
            remapped[f"{path}.{plan.index_map[int(match[1])]}.{match[2]}"] = tensor
    return remapped
