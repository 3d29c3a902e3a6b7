"""Finds the block stack of a model by its structure, and says how hidden states enter and leave a block.

The stack is the `nn.ModuleList` whose length is the number of layers in the config. Names play no part: `model.layers`,
`transformer.h`, `bert.encoder.layer` and `distilbert.transformer.layer` are found the same way.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from avss.errors import UnsupportedArchitectureError

NUM_LAYERS_FIELD = "num_hidden_layers"
"""The name every config answers to, whatever it stores (`n_layer`, `n_layers`, ...)."""


@dataclasses.dataclass(frozen=True)
class BlockStack:
    """The removable blocks of a model, in the order data passes them.

    Attributes:
        path: Dotted path of the module list, e.g. `model.layers`.
        blocks: The blocks.
        count_field: Config field that holds their number, under the name it is stored by.
    """

    path: str
    blocks: nn.ModuleList
    count_field: str

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def block_class(self) -> str:
        """Class names of the blocks, e.g. `LlamaDecoderLayer`."""
        return ", ".join(dict.fromkeys(type(block).__name__ for block in self.blocks))


def find_stack(model: PreTrainedModel) -> BlockStack:
    """The block stack of a model.

    Raises:
        UnsupportedArchitectureError: None or several module lists fit; the message lists what was found.
    """
    config = model.config
    name = type(model).__name__
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = ", ".join(
        f"`{path}` ({len(module)} x {type(module[0]).__name__})" for path, module in lists.items() if module
    )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitectureError(
            f"`{name}` has an encoder and a decoder stack, which this version cannot cut. Found: {found or 'nothing'}. "
            "Use a decoder-only or an encoder-only model."
        )
    count = getattr(config, NUM_LAYERS_FIELD, None)
    if not isinstance(count, int):
        raise UnsupportedArchitectureError(
            f"The config of `{name}` does not say how many layers it has (no `{NUM_LAYERS_FIELD}`), so the block stack "
            f"cannot be told from other lists. Found: {found or 'no module list'}. Models with several towers are not "
            "supported by this version."
        )
    fitting = [path for path, module in lists.items() if len(module) == count]
    # A list inside a block (experts, heads) is not the stack, however long it is.
    outermost = [path for path in fitting if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    if len(outermost) != 1:
        raise UnsupportedArchitectureError(
            f"`{name}` has {count} layers by its config, and {len(outermost)} module lists of that length: "
            f"{', '.join(f'`{path}`' for path in outermost) or 'none'}. Found: {found or 'no module list'}. "
            "A stack must be one list of that length."
        )
    field = getattr(config, "attribute_map", {}).get(NUM_LAYERS_FIELD, NUM_LAYERS_FIELD)
    return BlockStack(path=outermost[0], blocks=lists[outermost[0]], count_field=field)


def hidden_from_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state a block was called with, by position or as the keyword `hidden_states`.

    Raises:
        UnsupportedArchitectureError: It was called with neither.
    """
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise UnsupportedArchitectureError(
            f"A block was called without a hidden state (position 0 or `hidden_states`): {len(args)} positional "
            f"arguments, keywords {sorted(kwargs)}. This architecture is not supported."
        )
    return value


def hidden_from_output(output: Any) -> Tensor:
    """The hidden state a block returned: the value itself, the first of a tuple, or a model output's first field.

    Raises:
        UnsupportedArchitectureError: There is no tensor there.
    """
    value = output
    if isinstance(output, ModelOutput):
        value = output.get("last_hidden_state", output[0])
    elif isinstance(output, tuple | list):
        value = output[0]
    if not isinstance(value, Tensor):
        raise UnsupportedArchitectureError(
            f"A block returned a `{type(output).__name__}` without a hidden state in first place. This architecture is "
            "not supported."
        )
    return value


def replace_hidden(output: Any, hidden: Tensor) -> Any:
    """The same kind of value a block returned, with another hidden state in it."""
    if isinstance(output, ModelOutput):
        copy = dataclasses.replace(output) if dataclasses.is_dataclass(output) else output
        copy["last_hidden_state" if "last_hidden_state" in output else next(iter(output))] = hidden
        return copy
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return hidden


BlockHook = Callable[[int, Tensor, Tensor], Tensor | None]
"""Called with (block index, hidden state in, hidden state out); a returned tensor takes the output's place."""


@contextlib.contextmanager
def hooked(stack: BlockStack, hook: BlockHook) -> Iterator[None]:
    """Calls `hook` after every block while the context is open. No hook survives it, even when the forward raises.

    Raises:
        UnsupportedArchitectureError: A block's output has another shape than its input: not a residual block.
    """
    handles: list[RemovableHandle] = []

    def attach(index: int, block: nn.Module) -> None:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before, result = hidden_from_call(args, kwargs), hidden_from_output(output)
            if before.shape != result.shape or before.dim() != 3:
                raise UnsupportedArchitectureError(
                    f"Block {index} (`{type(block).__name__}`) takes {tuple(before.shape)} and returns "
                    f"{tuple(result.shape)}; a removable block returns the shape it takes, [batch, token, hidden]."
                )
            replacement = hook(index, before, result)
            return None if replacement is None else replace_hidden(output, replacement)

        handles.append(block.register_forward_hook(after, with_kwargs=True))

    try:
        for index, block in enumerate(stack.blocks):
            attach(index, block)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def bypassed(stack: BlockStack, removed: tuple[int, ...]) -> Iterator[None]:
    """Makes blocks return what they were given while the context is open: the reference for a cut.

    The blocks still compute (their result is thrown away), so this saves no time; it only defines the truth.
    """
    gone = frozenset(removed)
    with hooked(stack, lambda index, before, _: before if index in gone else None):
        yield
