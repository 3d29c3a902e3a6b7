"""Proves a cut in memory: every kept block is built as it was, and the smaller model computes what a bypass computes.

The first is exact and needs no input: a block of the smaller model must have the modules, settings and computed buffers
of the block it came from. That finds whatever is built by position (a norm that the first block lacks, a bias that only
the last one adds, a decay computed from the index), in any architecture, listed or not. The second runs both models on
a few tokens and finds what is decided by position only while computing.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PretrainedConfig, PreTrainedModel

from avss.errors import AvssError, UnsupportedArchitectureError
from avss.models.families import Family, facts_of
from avss.models.forward import run_outputs
from avss.models.load import Loaded, empty_model
from avss.models.probe import probe_inputs
from avss.models.stack import BlockStack, bypassed, hooked
from avss.record import Plan

# Attributes in which a block keeps its own place; they may change by the places that it moved.
_PLACE_NAME = re.compile(r"_?(\w+_)?(idx|id|index|number|num|i)")

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float64: 1e-6}
"""Relative to the largest output: rounding only. The same weights run through the same kernels in the same shapes, so
the two are usually bit-equal, in half precision too."""

_COARSE_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The same where one computes in another way: its buffers were cast with it (`model.half()`), or it attends by other
kernels (`attn_implementation`), which no file holds."""

_Settings = bool | int | float | str | torch.dtype | tuple[Any, ...] | None


def build_smaller(old: PreTrainedModel, config: PretrainedConfig, stack: BlockStack, plan: Plan) -> PreTrainedModel:
    """The smaller model as its config builds it, without weights, once its blocks are known to be the old ones.

    Args:
        old: The original as its config builds it.
        config: Of the smaller model.
        stack: The original's stack.
        plan: The blocks removed.

    Raises:
        UnsupportedArchitectureError: The class cannot be built so, or builds other blocks.
    """
    try:
        smaller = empty_model(type(old), config)
    except Exception as error:  # whatever a stranger's constructor raises
        raise UnsupportedArchitectureError(
            f"transformers cannot build this `{stack.owner(config).model_type}` model without these blocks: "
            f"{' '.join(str(error).split())[:300]}."
        ) from error
    refuse_other_blocks(old, smaller, stack, plan)
    return smaller


def refuse_other_blocks(old: PreTrainedModel, new: PreTrainedModel, stack: BlockStack, plan: Plan) -> None:
    """Refuses a cut whose blocks are not built as the ones they came from.

    Args:
        old: The original as its config builds it; a model in use may have changed itself (BigBird does).
        new: The smaller one as its config builds it. Weights play no part.
        stack: The original's stack.
        plan: The blocks removed.

    Raises:
        UnsupportedArchitectureError: A block, or a module around the stack, would be built differently; the message
            says which, and how.
    """
    before, blocks = old.get_submodule(stack.path), new.get_submodule(stack.path)
    assert isinstance(before, nn.ModuleList)
    assert isinstance(blocks, nn.ModuleList)
    kind = stack.owner(old.config).model_type
    if len(blocks) != len(plan.kept):
        raise UnsupportedArchitectureError(
            f"The smaller config of this `{kind}` model builds {len(blocks)} blocks instead of {len(plan.kept)}: its "
            "number of blocks comes from elsewhere. Its blocks cannot be removed this way."
        )
    family = facts_of(kind)
    for index, original in enumerate(plan.kept):
        exempt = family if index == 0 and original != 0 else None
        difference = next(_differences(before[original], blocks[index], plan, (original, index), family, exempt), None)
        if difference:
            raise UnsupportedArchitectureError(
                f"This `{kind}` model cannot lose these blocks: block {original} would become block {index} and be "
                f"built differently there: {difference}. The architecture decides that by position; keep such blocks "
                "in place."
            )
    inside = f"{stack.path}."
    others = {
        path: module for path, module in new.named_modules() if path != stack.path and not path.startswith(inside)
    }
    counts = (plan.num_blocks, len(plan.kept))
    for path, module in old.named_modules():
        if path == stack.path or path.startswith(inside):
            continue
        if path not in others:
            raise UnsupportedArchitectureError(
                f"This `{kind}` model cannot lose these blocks: `{path}` outside the stack would be gone with them. It "
                "belongs to a block, and which one is not known."
            )
        if path and any(family.packed_axis(f"{path}.{name}") is not None for name in _own_keys(module)):
            continue
        difference = next(_module_differences(module, others[path], plan, counts, only_shared=True), None)
        if difference:
            raise UnsupportedArchitectureError(
                f"This `{kind}` model cannot lose these blocks: `{path or type(old).__name__}` outside the stack would "
                f"be built differently: {difference}."
            )


def _own_keys(module: nn.Module) -> Iterator[str]:
    """Keys of a module's parameters and of those one level below: a head knows the size of the table inside it."""
    return (name for name, _ in module.named_parameters() if name.count(".") <= 1)


def _differences(
    old: nn.Module, new: nn.Module, plan: Plan, places: tuple[int, int], family: Family, exempt: Family | None
) -> Iterator[str]:
    """What differs between a block and its twin in the smaller model."""
    mine, theirs = dict(old.named_modules()), dict(new.named_modules())
    led = {path for path in mine.keys() ^ theirs.keys() if exempt and exempt.leads(f"{path}.weight")}
    for path in sorted((mine.keys() | theirs.keys()) - led):
        if path not in theirs or path not in mine:
            yield f"`{path}` is {'missing' if path not in theirs else 'new'}"
            continue
        parents_of_led = any(other.rpartition(".")[0] == path for other in led)
        found = _module_differences(mine[path], theirs[path], plan, places, skip_flags=parents_of_led)
        for text in (text for text in found if not any(text.startswith(f"`{role}` ") for role in family.roles)):
            yield f"`{path}` {text}" if path else text


def _module_differences(
    old: nn.Module,
    new: nn.Module,
    plan: Plan,
    counts: tuple[int, int],
    *,
    skip_flags: bool = False,
    only_shared: bool = False,
) -> Iterator[str]:
    """What differs between two modules themselves, their children left out.

    Args:
        old: In the original.
        new: In the smaller model.
        plan: The blocks removed.
        counts: Old and new place of the block, or old and new number of blocks: integers may go from one to the other.
        skip_flags: Whether truth values may differ.
        only_shared: Whether only what both have is compared: what serves one kind of block is not built once no block
            of that kind is left (rotary tables for full attention).
    """
    if any("Drop" in type(module).__name__ for module in (old, new)):
        return  # only training drops anything
    # A parametrised module (weight norm) has a class of its own: what it was before counts, and the children do.
    if type_before_parametrizations(old) is not type_before_parametrizations(new):
        yield f"is a `{type(new).__name__}` instead of a `{type(old).__name__}`"
        return
    mine, theirs = _settings(old), _settings(new)
    for name in sorted(mine.keys() & theirs.keys() if only_shared else mine.keys() | theirs.keys()):
        one, other = mine.get(name), theirs.get(name)
        if _equal(one, other) or (only_shared and isinstance(one, tuple | bool)):
            # Lists and flags around the stack (which kinds of blocks there are) follow from the config's lists, which
            # are rewritten; what they do is seen in the outputs.
            continue
        if skip_flags and isinstance(one, bool) and isinstance(other, bool):
            continue
        if _moved_with_the_block(name, one, other, counts) or _mirrors(one, other, plan):
            continue
        yield f"`{name}` is {other!r} instead of {one!r}"
    for name in sorted(set(old._parameters) | set(new._parameters)):
        one, other = old._parameters.get(name), new._parameters.get(name)
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (one, other)]
        if shapes[0] != shapes[1]:
            yield f"`{name}` has the shape {shapes[1]} instead of {shapes[0]}"
    yield from _buffer_differences(old, new, only_shared=only_shared)


def _moved_with_the_block(name: str, one: _Settings, other: _Settings, counts: tuple[int, int]) -> bool:
    if not isinstance(one, int) or not isinstance(other, int) or isinstance(one, bool) or isinstance(other, bool):
        return False
    moved = counts[1] - counts[0]
    is_place = bool(_PLACE_NAME.fullmatch(name)) and (
        # LongCat gives each block two places in the cache, 2i and 2i + 1; another number may be one to compute with.
        other - one == moved or (other - one == 2 * moved and one - 2 * counts[0] in (0, 1))
    )
    return is_place or ((one, other) == counts and ("layer" in name or "block" in name or "depth" in name))


def _mirrors(one: _Settings, other: _Settings, plan: Plan) -> bool:
    """Whether a list that a block keeps of the whole stack lost the entries of the removed blocks, and nothing else."""
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return False
    if len(one) == plan.num_blocks and other == tuple(one[block] for block in plan.kept):
        return True
    return other == tuple(plan.index_map[block] for block in one if block in plan.index_map)


def _equal(one: _Settings, other: _Settings) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6) or (math.isnan(one) and math.isnan(other))
    return type(one) is type(other) and one == other


def _settings(module: nn.Module) -> dict[str, _Settings]:
    """Plain values that a module was built with."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name == "training" or name.startswith("_"):
            continue
        if isinstance(value, bool | int | float | str | torch.dtype):
            found[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(entry, bool | int | float | str) for entry in value):
            found[name] = tuple(value)
    # None is a setting where the other has a value; what is None in both says nothing.
    return found | {name: None for name, value in vars(module).items() if value is None and not name.startswith("_")}


def _buffer_differences(old: nn.Module, new: nn.Module, *, only_shared: bool) -> Iterator[str]:
    """Buffers that are computed, not stored, must come out the same."""
    unsaved = old._non_persistent_buffers_set & new._non_persistent_buffers_set
    for name in sorted(set(old._buffers) | set(new._buffers)):
        one, other = old._buffers.get(name), new._buffers.get(name)
        if (one is None) != (other is None) and not only_shared:
            yield f"the buffer `{name}` is {'missing' if other is None else 'new'}"
        elif one is not None and other is not None:
            if one.shape != other.shape:
                yield f"the buffer `{name}` has the shape {tuple(other.shape)} instead of {tuple(one.shape)}"
            elif name in unsaved and "meta" not in (one.device.type, other.device.type) and not _same(one, other):
                yield f"the computed buffer `{name}` has other values"


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one.to(other.device, other.dtype), other)) or bool(
        torch.allclose(one.float().to(other.device), other.float(), rtol=1e-3, atol=1e-5, equal_nan=True)
    )


def refuse_other_outputs(original: Loaded, smaller: Loaded, plan: Plan) -> None:
    """Refuses a cut that computes something else than the original with the removed blocks bypassed.

    Raises:
        UnsupportedArchitectureError: The outputs differ, the blocks do not run on a probe, or the model cannot be run
            on inputs that avss can make up.
    """
    kind = original.stack.owner(original.model.config).model_type
    original, smaller = original.tower(), smaller.tower()
    try:
        inputs = probe_inputs(original)
        ran: set[int] = set()
        with hooked(original.stack, lambda index, before, after: ran.add(index), dims=(2, 3, 4)):
            run_outputs(original, inputs)

        def run_bypassed() -> Tensor:
            with bypassed(original.stack, plan.removed):
                return run_outputs(original, inputs).float()

        reference = run_bypassed()
        found = run_outputs(smaller, inputs).float()
        difference = float((found - reference).abs().max()) if found.shape == reference.shape else float("inf")
        tolerance = allowed_difference(reference, original.model, smaller.model)
        if difference > tolerance:
            tolerance += noise_of(reference, run_bypassed)
    except AvssError:
        raise
    except Exception as error:  # whatever a stranger's forward raises
        raise UnsupportedArchitectureError(
            f"The cut of this `{kind}` model cannot be proven: running it on a small probe failed with "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. Nothing unproven is handed out."
        ) from error
    if len(ran) != len(original.stack):
        raise UnsupportedArchitectureError(
            f"The cut of this `{kind}` model cannot be proven: {len(original.stack) - len(ran)} blocks of "
            f"`{original.stack.path}` do not run on inputs that avss can make up. Nothing unproven is handed out."
        )
    if not difference <= tolerance:
        raise UnsupportedArchitectureError(
            f"This `{kind}` model cannot lose these blocks: without them it computes something else than the original "
            f"with the blocks bypassed (largest difference {difference:.3g}, allowed {tolerance:.3g}). The "
            "architecture treats blocks by position."
        )


def allowed_difference(expected: Tensor, *models: PreTrainedModel) -> float:
    """The largest difference in the outputs of models with the same weights that rounding explains.

    Args:
        expected: The outputs of one.
        *models: All that are compared.
    """
    dtype = models[0].dtype
    relative = _TOLERANCE.get(dtype, 1e-4)
    if len({_way_of_computing(model) for model in models}) > 1:
        relative = _COARSE_TOLERANCE.get(dtype, relative)
    return relative * max(1.0, float(expected.abs().max()))


def _way_of_computing(model: PreTrainedModel) -> tuple[object, ...]:
    buffers = frozenset(buffer.dtype for buffer in model.buffers() if buffer.is_floating_point())
    kernels = (getattr(model.config, f"_{kind}_implementation", None) for kind in ("attn", "experts"))
    return (buffers, *map(str, kernels))


def noise_of(expected: Tensor, run: Callable[[], Tensor]) -> float:
    """How far one model may be from itself: sums on a GPU may come in any order. Twice what another run shows."""
    return 2 * float((run().to(expected) - expected).abs().max())
