"""`avss.inspect`: what is in there, and what would a cut change?"""

import dataclasses
from typing import TYPE_CHECKING, Any

from avss.composer.inputs import AnyModel, load
from avss.errors import UnsupportedArchitectureError
from avss.models.load import Loaded
from avss.models.proof import build_smaller
from avss.models.rewrite import config_changes, find_family, pinned_blocks, rewrite_config
from avss.models.stack import RejectedList, find_stacks
from avss.record import FieldChange, ModelFacts, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class FoundStack:
    """One stack of blocks in a model.

    Attributes:
        name: What `--stack` calls it.
        path: Dotted path of its module list.
        num_blocks: Its length.
        block_class: Class of the blocks.
        count_field: Config field that counts the blocks, e.g. `text_config.num_hidden_layers`.
        num_parameters: Parameters of all its blocks.
    """

    name: str
    path: str
    num_blocks: int
    block_class: str
    count_field: str
    num_parameters: int


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
        stacks: Every stack found, the chosen one among them.
        reason: Why that one was chosen.
        rejected: Other module lists, each with the reason why it is no stack.
        pinned: Blocks that cannot go -> why.
    """

    model: ModelFacts
    block_class: str
    block_parameters: tuple[int, ...]
    refusal: str | None
    example: Plan
    changes: tuple[FieldChange, ...]
    stacks: tuple[FoundStack, ...] = ()
    reason: str = ""
    rejected: tuple[RejectedList, ...] = ()
    pinned: dict[int, str] = dataclasses.field(default_factory=dict)


def inspect(model: AnyModel, *, tokenizer: "PreTrainedTokenizerBase | None" = None, **settings: Any) -> Inspection:
    """The block stacks found in a model, and every config field that a cut of the chosen one would change.

    Args:
        model: Hub id, folder, GGUF file, or a model object.
        tokenizer: For a model object.
        **settings: For a model named: `head`, `dtype`, `device`, `revision`, `trust_remote_code`; and `stack`.

    Returns:
        What was found, and why; it holds no model.

    Raises:
        ModelLoadError: The model cannot be read.
        UnsupportedArchitectureError: No block stack was found; the message lists what was.
    """
    loaded = load(model, tokenizer, **settings)
    stack, config = loaded.stack, loaded.model.config
    stacks, rejected = find_stacks(loaded.model)
    plan = example_plan(loaded)
    refusal, changes = None, ()
    try:
        changes = config_changes(config, _try_cut(loaded, plan))
    except UnsupportedArchitectureError as error:
        refusal = str(error)
    return Inspection(
        model=loaded.facts(),
        block_class=stack.block_class,
        block_parameters=tuple(sum(p.numel() for p in block.parameters()) for block in stack.blocks),
        refusal=refusal,
        example=plan,
        changes=changes,
        stacks=tuple(
            FoundStack(
                name=found.name,
                path=found.path,
                num_blocks=len(found),
                block_class=found.block_class,
                count_field=".".join((*found.config_path, found.count_field)),
                num_parameters=found.num_parameters,
            )
            for found in stacks
        ),
        reason=stack.reason,
        rejected=rejected,
        pinned={pin.block: pin.reason for pin in pinned_blocks(config, stack)},
    )


def refuse_uncuttable(loaded: Loaded) -> None:
    """Refuses a model from which not even the example block can be removed, before any work is spent on it.

    Raises:
        ConfigError: It is spread over several devices.
        UnsupportedArchitectureError: With the reason.
    """
    loaded.check_one_device()
    find_family(loaded.model.config, loaded.stack)
    rewrite_config(loaded.model.config, loaded.stack, example_plan(loaded, removed=0))


def _try_cut(loaded: Loaded, plan: Plan) -> "PretrainedConfig":
    """The smaller config, once the blocks that it builds are known to be the old ones."""
    config = rewrite_config(loaded.model.config, loaded.stack, plan)
    build_smaller(loaded.blueprint, config, loaded.stack, plan)
    return config


def example_plan(loaded: Loaded, *, removed: int = 1) -> Plan:
    """One block near the middle that may go: what any cut changes, it changes."""
    num_blocks = len(loaded.stack)
    pinned = {pin.block for pin in pinned_blocks(loaded.model.config, loaded.stack)}
    free = sorted(set(range(num_blocks)) - pinned, key=lambda block: abs(block - num_blocks // 2))
    chosen = tuple(free[:removed]) if num_blocks > 1 else ()
    return Plan(num_blocks=num_blocks, removed=chosen, method="explicit", rule="an example")
