"""`avss.inspect`: what is in there, and what would a cut change?"""

import dataclasses
from typing import TYPE_CHECKING, Any

from avss.composer.inputs import AnyModel, load
from avss.errors import UnsupportedArchitectureError
from avss.models.rewrite import config_changes, rewrite_config
from avss.record import FieldChange, ModelFacts, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `avss` sees in a model before anything is cut.

    Attributes:
        model: The model in numbers.
        block_class: Class of the blocks.
        block_parameters: Parameters of each block.
        refusal: Why it cannot be cut; None where it can.
        example: The plan the changes are shown for.
        changes: Config fields that plan would change.
    """

    model: ModelFacts
    block_class: str
    block_parameters: tuple[int, ...]
    refusal: str | None
    example: Plan
    changes: tuple[FieldChange, ...]


def inspect(model: AnyModel, *, tokenizer: "PreTrainedTokenizerBase | None" = None, **settings: Any) -> Inspection:
    """The block stack found in a model, and every config field that a cut would change.

    Raises:
        ModelLoadError: The model cannot be read.
        UnsupportedArchitectureError: No block stack was found; the message lists what was.
    """
    loaded = load(model, tokenizer, **settings)
    stack = loaded.stack
    plan = example_plan(len(stack))
    refusal, changes = None, ()
    try:
        changes = config_changes(loaded.model.config, rewrite_config(loaded.model.config, stack, plan))
    except UnsupportedArchitectureError as error:
        refusal = str(error)
    return Inspection(
        model=loaded.facts(),
        block_class=stack.block_class,
        block_parameters=tuple(sum(p.numel() for p in block.parameters()) for block in stack.blocks),
        refusal=refusal,
        example=plan,
        changes=changes,
    )


def example_plan(num_blocks: int) -> Plan:
    """One block in the middle: what any cut changes, it changes."""
    removed = (num_blocks // 2,) if num_blocks > 1 else ()
    return Plan(num_blocks=num_blocks, removed=removed, method="explicit", rule="an example")
