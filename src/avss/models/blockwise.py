"""Models that memory does not hold: the blocks stay in their files, each is read when it runs and let go afterwards.

transformers lays out such a model (its `device_map` with `disk`), renames and converts weights and checks that none is
missing; accelerate reads them. What runs a block is ours: a whole block is read at a time, so that one whose parts use
each other's weights works too, and what it is given is handed on as it is.
"""

import contextlib
import fnmatch
import functools
import inspect
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from avss.errors import ModelLoadError
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
        dtype: What the model computes in; None for the dtype that it came in.
        wide: Patterns of the weights that are held in float32 all the same.

    Attributes:
        dtype: In which the blocks are stored; the dtype computed in may be wider.
        close: Called when no block will run any more, removes what was written for that.

    Raises:
        ModelLoadError: A block has a weight that is in no file.
    """

    def __init__(
        self, model: PreTrainedModel, scratch: Path, dtype: torch.dtype | None = None, wide: Sequence[str] = ()
    ) -> None:
        self.close = weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        self._weights = _weights_of(model)
        self._device = next(one.device for one in model.parameters() if one.device.type != "meta")
        self.dtype = _stored_dtype(self._weights.index)
        _undo_dispatch(model)
        if dtype is not None:
            self._cast(model, dtype, wide)
        self._names: dict[int, str] = {}
        for stack in find_stacks(model)[0]:
            for index, block in enumerate(stack.blocks):
                self._names[id(block)] = f"{stack.path}.{index}."
                self._check_stored(block)
                self._read_when_run(block)

    def weight(self, name: str) -> Tensor:
        """One weight of a block, by its name in the model, in the dtype and on the device that it is computed in."""
        with torch.inference_mode(mode=False):  # as the weights of a model in memory, whoever asks
            return self._weights[name].to(self._device)

    @contextlib.contextmanager
    def at_hand(self, block: nn.Module) -> Iterator[None]:
        """Holds the weights of one block in memory while the context is open. A module that is no block is left."""
        prefix = self._names.get(id(block))
        empty = [] if prefix is None else _empty_weights(block)
        try:
            for module, leaf, path, _ in empty:
                # What asks for a gradient is multiplied by another kernel, even where none is taken.
                asks = module._parameters[leaf].requires_grad  # type: ignore[union-attr]
                weight = self.weight(f"{prefix}{path}")
                with torch.inference_mode(mode=False):
                    module._parameters[leaf] = nn.Parameter(weight, requires_grad=asks)
            yield
        finally:
            for module, leaf, _, parameter in empty:
                module._parameters[leaf] = parameter

    def _cast(self, model: PreTrainedModel, dtype: torch.dtype, wide: Sequence[str]) -> None:
        """As `avss.models.load.in_dtype` does: by themselves some weights come as their class creates them (XLNet)."""

        def wanted(name: str) -> torch.dtype:
            return torch.float32 if any(fnmatch.fnmatchcase(name, pattern) for pattern in wide) else dtype

        for name, place in self._weights.index.items():
            if getattr(torch, place["dtype"]).is_floating_point:
                place["dtype"] = str(wanted(name)).removeprefix("torch.")
        for name, parameter in model.named_parameters():
            if parameter.device.type != "meta" and parameter.is_floating_point():
                parameter.data = parameter.data.to(wanted(name))

    def _check_stored(self, block: nn.Module) -> None:
        prefix = self._names[id(block)]
        lacking = [path for _, _, path, _ in _empty_weights(block) if f"{prefix}{path}" not in self._weights]
        if lacking:
            raise ModelLoadError(
                f"`{prefix}{lacking[0]}` is in no file, so that it cannot be read when its block runs. Load the model "
                "in memory (`--device cpu`), which sets such a weight as its class says."
            )

    def _read_when_run(self, block: nn.Module) -> None:
        # No reference to the block itself: a model that is not needed any more shall go at once.
        own, this = type(block).forward, weakref.ref(block)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            module = this()
            assert module is not None
            with self.at_hand(module):
                return own(module, *args, **kwargs)

        # As a bound method would show itself.
        signature = inspect.signature(own)
        forward.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
        # An instance attribute hides the class's method. A hook would read a block that is left out, too.
        block.forward = forward


def _undo_dispatch(model: PreTrainedModel) -> None:
    """Takes off what accelerate put on the model to read its weights one by one.

    A part that uses another's weights would miss them, and what blocks share would be handed on as copies. Its hooks
    are not told: they would read buffers again.
    """
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            module.__dict__["_hf_hook"] = ModelHook()
    remove_hook_from_submodules(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    for name in ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa"):
        model.__dict__.pop(name, None)


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
