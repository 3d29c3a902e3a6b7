"""Shells: models that share every weight of another one, with one part replaced. The other is never touched.

A shell answers cheaply what a whole forward pass would answer dearly: what the head makes of hidden states that are
known already, and what the later blocks make of what the earlier ones are known to return.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from avss.errors import UnsupportedArchitectureError
from avss.models.stack import BlockStack, body_of, body_path


def with_part(module: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """A shell of a module with the part at a dotted path replaced.

    Only the containers on the way to the part are copied, and only they themselves: parameters, buffers and all other
    modules are the module's own.
    """
    name, _, rest = path.partition(".")
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin._modules[name] = with_part(cast(nn.Module, module._modules[name]), rest, part) if rest else part
    return twin


def with_blocks(model: PreTrainedModel, stack: BlockStack, blocks: Sequence[nn.Module]) -> PreTrainedModel:
    """A shell of a model with other blocks in its stack, as many as there are."""
    return cast(PreTrainedModel, with_part(model, stack.path, nn.ModuleList(blocks)))


def with_narrow_maps(module: nn.Module, dtype: torch.dtype, is_frozen: Callable[[Tensor], bool]) -> nn.Module:
    """A shell whose linear maps hold their frozen weights in a narrower dtype, where they are wider.

    Under autocast it answers what the module does, to the bit, and spares narrowing every frozen weight again in every
    call: autocast remembers those of trained weights only.

    Args:
        module: Left as it is.
        dtype: The autocast dtype.
        is_frozen: Which weights are not trained; the others are the module's own.
    """
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else with_narrow_maps(child, dtype, is_frozen)
        for name, child in module._modules.items()
    }
    if type(module) is nn.Linear:
        twin._parameters = {
            name: nn.Parameter(value.detach().to(dtype), requires_grad=False)
            if value is not None and value.is_floating_point() and value.itemsize > dtype.itemsize and is_frozen(value)
            else value
            for name, value in module._parameters.items()
        }
    return twin


class HeadShell:
    """What a model's own head makes of last hidden states, for any architecture: scales, soft caps and all.

    The head is not singled out by name. The model's own `forward` runs, over a body that returns what it is given.

    Raises:
        UnsupportedArchitectureError: Body and head cannot be told apart.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        path = body_path(model)
        if not path:
            raise UnsupportedArchitectureError(
                f"`{type(model).__name__}` does not say which part of it is without the head, so its head cannot be "
                "run alone, which repair and healing need."
            )
        self._kind = model.config.model_type
        self._body = _GivenBody(body_of(model))
        self._shell = with_part(model, path, self._body)

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Logits `[B, T, V]` of last hidden states `[B, T, D]`; gradients reach the states and the head."""
        self._body.hidden = hidden_BTD
        try:
            placeholder = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden_BTD.device)
            return self._shell(input_ids=placeholder)["logits"]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise UnsupportedArchitectureError(
                f"The head of this `{self._kind}` model asks its body for more than last hidden states, so it cannot "
                f"be run alone, which repair and healing need ({type(error).__name__}: {error})."
            ) from error
        finally:
            self._body.hidden = None


class _Stand(nn.Module):
    """Stands in for a block, and answers to every other question as the block would."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own bookkeeping: the block is no part of the shell's tree.
        object.__setattr__(self, "block", block)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)


class _GivenBody(_Stand):
    """A body that returns what it was given beforehand, and so does the part of it that a head may run (OPT's)."""

    hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self if isinstance(found, PreTrainedModel) else found

    def forward(self, *_: Any, **__: Any) -> "_GivenOutput":
        return _GivenOutput(last_hidden_state=cast(Any, self.hidden))


class _GivenOutput(BaseModelOutput):
    """The last hidden state; whatever else a head passes on (a cache, a router's logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class KnownBlock(_Stand):
    """A block that computes nothing: it returns `output`, which was computed elsewhere.

    Attributes:
        output: What to return, in the form this architecture's blocks answer in.
    """

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        """The known output, whatever it is called with."""
        return self.output


class RecomputedBlock(_Stand):
    """A block whose inside is not kept for the backward pass but computed again there: less memory, more time.

    Args:
        block: The block.
        around: A context that it runs in, the second time too.
    """

    def __init__(self, block: nn.Module, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        super().__init__(block)
        self._around = around

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        return checkpoint(self._inside, *args, use_reentrant=False, **kwargs)

    def _inside(self, *args: Any, **kwargs: Any) -> Any:
        with self._around():
            return self.block(*args, **kwargs)
