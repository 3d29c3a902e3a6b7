"""Models that memory does not hold: the blocks stay in their files, each is read when it runs and let go afterwards.

transformers lays out such a model (its `device_map` with `disk`), renames and converts weights and checks that none is
missing; accelerate reads them. What runs a block is ours: a whole block is read at a time, so that one whose parts use
each other's weights works too, and what it is given is handed on as it is.
"""

import contextlib
import functools
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from avss.models.stack import find_stacks


def device_map(empty: PreTrainedModel, device: torch.device) -> dict[str, str]:
    """Where each part of a model goes: blocks stay on disk, all else on a device.

    Args:
        empty: The model without weights.
        device: Where it is computed.

    Returns:
        Path of a module or a weight -> `disk`, or the device. No path is part of another: what reads such a map takes
        a parent's word for all of its children.
    """
    stacks = {stack.path: stack for stack in find_stacks(empty)[0]}

    def places(module: nn.Module, path: str) -> dict[str, str]:
        if path in stacks:
            return {f"{path}.{index}": "disk" for index in range(len(stacks[path]))}
        within = f"{path}." if path else ""
        if not any(stack.startswith(within) for stack in stacks):
            return {path: str(device)}
        own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        found = {f"{within}{name}": str(device) for name in own}
        for name, child in module.named_children():
            found |= places(child, f"{within}{name}")
        return found

    return places(empty, "")


class BlockFiles:
    """The weights of a model's blocks, in their files.

    Args:
        model: As transformers loaded it by `device_map`: its blocks have no weights. From now on each reads them when
            it runs, and lets them go however that ends.
        scratch: Folder of those that transformers wrote anew. It is removed with this, or by `close`.

    Attributes:
        dtype: In which the blocks are stored; the dtype computed in may be wider.
        close: Called when no block will run any more, removes what was written for that.
    """

    def __init__(self, model: PreTrainedModel, scratch: Path) -> None:
        self.close = weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        self._weights = _weights_of(model)
        self._device = next(one.device for one in model.parameters() if one.device.type != "meta")
        self.dtype = _stored_dtype(self._weights.index)
        # They read weights one by one, which a part that uses another's misses, and hand on copies of what is shared.
        remove_hook_from_submodules(model)
        self._names = {
            id(block): f"{stack.path}.{index}."
            for stack in find_stacks(model)[0]
            for index, block in enumerate(stack.blocks)
        }
        for stack in find_stacks(model)[0]:
            for block in stack.blocks:
                self._let_go(block)
                self._read_when_run(block)

    def weight(self, name: str) -> Tensor:
        """One weight of a block, by its name in the model, in the dtype and on the device that it is computed in."""
        return self._weights[name].to(self._device)

    @contextlib.contextmanager
    def at_hand(self, block: nn.Module) -> Iterator[None]:
        """Holds the weights of one block in memory while the context is open. A module that is no block is left."""
        prefix = self._names.get(id(block))
        empty = [] if prefix is None else _empty_weights(block)
        try:
            for module, leaf, path, _ in empty:
                module._parameters[leaf] = nn.Parameter(self.weight(f"{prefix}{path}"), requires_grad=False)
            yield
        finally:
            for module, leaf, _, parameter in empty:
                module._parameters[leaf] = parameter

    def _let_go(self, block: nn.Module) -> None:
        """Empties what was read though it lies on disk (XLNet's attention)."""
        prefix = self._names[id(block)]
        for path, module in block.named_modules():
            for leaf, parameter in module._parameters.items():
                name = f"{prefix}{path}.{leaf}" if path else f"{prefix}{leaf}"
                if parameter is not None and name in self._weights.index:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _read_when_run(self, block: nn.Module) -> None:
        own = block.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.at_hand(block):
                return own(*args, **kwargs)

        # An instance attribute hides the class's method. A hook would read a block that is left out, too.
        block.forward = forward


def _empty_weights(block: nn.Module) -> list[tuple[nn.Module, str, str, nn.Parameter]]:
    """A block's weights that are not in memory: whose, the name there, the path in the block, what stands for it."""
    return [
        (module, leaf, f"{path}.{leaf}" if path else leaf, parameter)
        for path, module in block.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.device.type == "meta"
    ]


def _weights_of(model: PreTrainedModel) -> OffloadedWeightsLoader:
    """What reads the weights that were left on disk, by their names in the model."""
    for module in model.modules():
        held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if isinstance(held, PrefixedDataset) and isinstance(held.dataset, OffloadedWeightsLoader):
            return held.dataset
    raise RuntimeError("transformers left no weight on disk")


def _stored_dtype(index: Mapping[str, Mapping[str, Any]]) -> torch.dtype:
    """The dtype of the first float among the files' weights."""
    for name, place in index.items():
        with safe_open(place["safetensors_file"], framework="pt") as file:
            tensor: Tensor = file.get_tensor(place.get("weight_name", name))
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
