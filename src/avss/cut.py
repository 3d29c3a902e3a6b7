"""Cuts blocks out of a model: new config -> empty model -> remapped weights -> proof. Never patches a live module."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from avss.errors import InvalidPlanError, UnsupportedArchitectureError
from avss.models.families import Family, facts_of
from avss.models.load import Loaded, fill
from avss.models.proof import build_smaller, refuse_other_outputs
from avss.models.rewrite import rewrite_config, rewrite_generation
from avss.record import Plan


def cut(loaded: Loaded, plan: Plan) -> Loaded:
    """The smaller model. The given one is left as it was.

    The kept blocks' weights are *shared* with the given model, not copied: a cut costs no memory, and several cuts can
    be measured side by side. Copy the model (`copy.deepcopy`) before training either.

    Raises:
        ConfigError: The model is spread over several devices.
        InvalidPlanError: The plan was made for another number of blocks.
        UnsupportedArchitectureError: This architecture's cut is not proven, or not possible.
    """
    stack = loaded.stack
    if plan.num_blocks != len(stack):
        raise InvalidPlanError(
            f"The plan was made for {plan.num_blocks} blocks; this model has {len(stack)}. Make a plan for this model."
        )
    loaded.check_one_device()
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise UnsupportedArchitectureError(
            "The model is loaded in a quantised format, and a cut would save the quantised weights as if they were the "
            "model. Load the full-precision checkpoint."
        )
    config = rewrite_config(loaded.model.config, stack, plan)
    family = facts_of(stack.owner(config).model_type)
    empty = build_smaller(loaded.blueprint, config, stack, plan)
    state = remap(loaded.model.state_dict(), stack.path, plan, family)
    try:
        model = fill(empty, state)
    except RuntimeError as error:
        raise UnsupportedArchitectureError(
            f"This `{stack.owner(config).model_type}` model cannot lose these blocks: the smaller model does not take "
            f"the weights of the kept ones: {' '.join(str(error).split())[:300]}."
        ) from error
    if getattr(loaded.model, "generation_config", None) is not None:
        model.generation_config = rewrite_generation(loaded.model.generation_config, stack, plan)
    smaller = loaded.with_model(model)
    refuse_other_outputs(loaded, smaller, plan)
    return smaller


def remap(state: Mapping[str, Tensor], path: str, plan: Plan, family: Family | None = None) -> dict[str, Tensor]:
    """Drops the removed blocks' keys and renumbers the rest. Anchored at the stack's path: other lists are left alone.

    Args:
        state: Keys and tensors.
        path: Of the stack.
        plan: The blocks removed.
        family: Facts about the architecture: what the first block holds for all goes to the new first block, and
            tensors that hold one slice per block lose the slices of the removed ones.

    Example:
        >>> plan = Plan(num_blocks=3, removed=(1,), method="explicit", rule="by hand")
        >>> sorted(remap({"h.0.w": 0, "h.1.w": 1, "h.2.w": 2, "x.h.2.w": 3}, "h", plan).items())
        [('h.0.w', 0), ('h.1.w', 2), ('x.h.2.w', 3)]
    """
    inside = re.compile(rf"{re.escape(path)}\.(\d+)\.(.*)", re.DOTALL)
    remapped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = inside.fullmatch(key)
        axis = family.packed_axis(key) if family else None
        if axis is not None:
            remapped[key] = _without_slices(tensor, axis, plan)
        elif match is None:
            remapped[key] = tensor
        elif family and int(match[1]) == 0 and family.leads(match[2]):
            remapped[f"{path}.0.{match[2]}"] = tensor
        elif int(match[1]) in plan.index_map:
            remapped[f"{path}.{plan.index_map[int(match[1])]}.{match[2]}"] = tensor
    return remapped


def _without_slices(tensor: Tensor, axis: int, plan: Plan) -> Tensor:
    """A tensor of equal slices per block along an axis, without those of the removed blocks."""
    slices = tensor.chunk(plan.num_blocks, dim=axis)
    return torch.cat([slices[block] for block in plan.kept], dim=axis).contiguous()
