"""Which weights are trained, and which blocks of the smaller model therefore stay the dense model's."""

import dataclasses
from typing import Any, Literal

import torch
from torch import nn

from avss.errors import ConfigError
from avss.models.forward import run_body
from avss.models.load import Loaded, quiet_transformers
from avss.models.probe import brief_inputs
from avss.models.shared_prefix import num_alone
from avss.record import Plan

Choice = Literal["all", "blocks", "after", "lora"]

_TITLES: dict[str, str] = {
    "all": "all weights",
    "blocks": "the blocks and what follows them, not the embeddings and the head",
    "after": "the blocks from {lead} before the first cut on and what follows them, not the embeddings and the head",
    "lora": "adapters of rank {rank} on the matrices of the blocks from {lead} before the first cut on, merged",
}

LEAD = 5
"""Blocks before the first cut that `after` and `lora` train with those after it (measured, see docs/log.md)."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is trained of a model.

    Attributes:
        parameters: By name. Only these require a gradient.
        num_shared: Leading blocks that compute what the dense model's do, and will.
        title: In words.
        adapters: peft's wrapper, which merges the adapters in the end; None without adapters.
    """

    parameters: dict[str, nn.Parameter]
    num_shared: int
    title: str
    adapters: Any = None

    @property
    def num_values(self) -> int:
        """Parameters trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def choose_weights(dense: Loaded, model: Loaded, plan: Plan, choice: Choice, *, rank: int) -> Trained:
    """Marks what is trained; every other parameter of the model is frozen.

    Args:
        dense: The dense model.
        model: The smaller one, in memory of its own.
        plan: The blocks removed.
        choice: See `avss.config.HealConfig.weights`.
        rank: Of the adapters.

    Raises:
        ConfigError: Adapters are asked for, and peft is not installed or finds no matrix in the blocks.
    """
    frozen = max(0, min(plan.removed, default=0) - LEAD) if choice in ("after", "lora") else 0
    shared = min(_count_shared(dense, model, frozen), num_alone(dense)) if frozen else 0
    title = _TITLES[choice].format(rank=rank, lead=LEAD)
    if choice == "lora":
        adapters = _attach(model, range(frozen, len(model.stack)), rank)
        chosen = {name: value for name, value in model.model.named_parameters() if value.requires_grad}
        return Trained(parameters=chosen, num_shared=shared, title=title, adapters=adapters)
    before, blocks, after = _in_order(model)
    wanted = {name: value for index in range(frozen, len(blocks)) for name, value in blocks[index].items()} | after
    if choice == "all":
        wanted |= before
    else:
        words = _word_parameters(model)
        wanted = {name: value for name, value in wanted.items() if id(value) not in words}
    for value in model.model.parameters():
        value.requires_grad_(False)
    for value in wanted.values():
        value.requires_grad_(True)
    return Trained(parameters=wanted, num_shared=shared, title=title)


Named = dict[str, nn.Parameter]


def _in_order(model: Loaded) -> tuple[Named, list[Named], Named]:
    """Parameters before the stack, of each block, and after it, in the order in which data pass them.

    What a run of the body does not tell (heads) comes in the order in which a model registers its parts. A tied head is
    met with the embeddings, before.
    """
    passed = _passed(model)
    path = f"{model.stack.path}."
    before: Named = {}
    blocks: list[Named] = [{} for _ in range(len(model.stack))]
    after: Named = {}
    reached = False
    for name, value in model.model.named_parameters():
        if name.startswith(path):
            reached = True
            blocks[int(name.removeprefix(path).partition(".")[0])][name] = value
        else:
            (after if passed.get(id(value), reached) else before)[name] = value
    return before, blocks, after


def _passed(model: Loaded) -> dict[int, bool]:
    """Parameters outside the stack that a run of the body meets: whether that is after the first block.

    Gemma 3n registers the embeddings that feed every block after its blocks, OPT its last norm before them.
    """
    blocks = model.stack.blocks
    inside = set(blocks.modules())
    found: dict[int, bool] = {}
    begun = False

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = True

    def meet(module: nn.Module, *_: Any) -> None:
        for value in module.parameters(recurse=False):
            found.setdefault(id(value), begun)

    handles = [blocks[0].register_forward_pre_hook(begin)]
    handles += [
        module.register_forward_pre_hook(meet)
        for module in model.model.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    try:
        with torch.no_grad():
            run_body(model, brief_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _word_parameters(model: Loaded) -> set[int]:
    """The embeddings, and the head that predicts words, if there is one."""
    head: Any = model.model.get_output_embeddings()
    modules = [model.model.get_input_embeddings(), *([head] if isinstance(head, nn.Module) else [])]
    return {id(value) for module in modules for value in module.parameters()}


def _count_shared(dense: Loaded, model: Loaded, frozen: int) -> int:
    """Of the frozen leading blocks, those that equal the dense model's bit for bit, with all that comes before them."""
    (before, blocks, _), (theirs, their_blocks, _) = _in_order(model), _in_order(dense)
    if not _equal(before, theirs):
        return 0
    for index in range(frozen):
        if not _equal(blocks[index], their_blocks[index]):
            return index
    return frozen


def is_as_cut(dense: Loaded, model: Loaded, plan: Plan) -> bool:
    """Whether the blocks of a smaller model are the dense model's own, neither repaired nor trained."""
    pairs = zip(model.stack.blocks, (dense.stack.blocks[index] for index in plan.kept), strict=True)
    return all(_equal(dict(one.named_parameters()), dict(other.named_parameters())) for one, other in pairs)


def _equal(ours: Named, theirs: Named) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(theirs[name].detach().to(value), value.detach()) for name, value in ours.items()
    )


# --- adapters ---


def _attach(model: Loaded, blocks: range, rank: int) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "Healing with `lora` needs peft, which is not installed. Run `pip install peft`, or choose "
            "`--weights after`."
        ) from error
    from transformers.pytorch_utils import Conv1D

    stack = model.stack
    found = {
        f"{stack.path}.{index}.{name}": module
        for index in blocks
        for name, module in stack.blocks[index].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    if not found:
        raise ConfigError(
            f"The blocks of `{type(model.model).__name__}` hold no linear layer to adapt. Choose `--weights after`."
        )
    transposed = any(isinstance(module, Conv1D) for module in found.values())
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(found), fan_in_fan_out=transposed)
    with quiet_transformers():
        return peft.get_peft_model(model.model, config)


def merge(trained: Trained) -> None:
    """Folds adapters into the matrices they adapt; the model is a stock one again. Nothing to do without adapters."""
    if trained.adapters is not None:
        trained.adapters.merge_and_unload()
