"""The dense model and the smaller one side by side: what both compute on a batch, and nothing of it twice.

Shape letters: B batch, T token, D hidden.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from avss.healing.attention import ProductAttention
from avss.healing.text import Batch
from avss.models.forward import model_inputs, takes
from avss.models.load import Loaded
from avss.models.shell import HeadShell, KnownBlock, RecomputedBlock, with_blocks, with_narrow_maps
from avss.models.stack import BlockStack, body_of, hidden_from_output, hooked, replace_hidden
from avss.record import Plan


@dataclasses.dataclass(frozen=True)
class Sides:
    """What both models made of a batch.

    Attributes:
        output: The smaller model's answer: last hidden states `[B, T, D]` of language models and encoders, else logits.
        dense: The dense model's, without gradient.
        states: Hidden states after the same original block, (smaller, dense), each `[B, T, D]`.
    """

    output: Tensor
    dense: Tensor
    states: list[tuple[Tensor, Tensor]]


class Pair:
    """Runs both models. Leading blocks that are the dense model's still, and stay so, are computed once for both.

    Args:
        dense: The dense model; read only.
        model: The smaller model, which is trained.
        plan: The blocks removed.
        num_shared: Leading blocks whose output is the dense model's.
        needs_states: Whether the hidden states after the kept blocks are wanted.
        recompute: Whether the insides of blocks are computed again in the backward pass.
        precision: Dtype of the products; None to leave them as they are.
    """

    def __init__(
        self,
        dense: Loaded,
        model: Loaded,
        plan: Plan,
        *,
        num_shared: int,
        needs_states: bool,
        recompute: bool,
        precision: torch.dtype | None,
    ) -> None:
        self._precision, self._model = precision, model
        self._dense = dataclasses.replace(dense, model=self._narrowed(dense.model, is_frozen=lambda _: True))
        self._dense_stack = dataclasses.replace(
            dense.stack, blocks=cast(nn.ModuleList, self._dense.model.get_submodule(dense.stack.path))
        )
        stack = model.stack
        self._known = [KnownBlock(block) for block in stack.blocks[:num_shared]]
        # What is computed again in the backward pass must be computed as it was.
        rest = [RecomputedBlock(block, ProductAttention) if recompute else block for block in stack.blocks[num_shared:]]
        blocks: list[nn.Module] = [*self._known, *rest]
        self._shell = dataclasses.replace(model, model=with_blocks(model.model, stack, blocks))
        self._stack = BlockStack(path=stack.path, blocks=nn.ModuleList(blocks), count_field=stack.count_field)
        self._device = model.device
        compared = plan.kept[num_shared:] if needs_states else ()
        # (index in the smaller model, original index): the state after an original block is compared with itself.
        self._compared = [(plan.index_map[block], block) for block in compared]

    def run_dense(self, batch: Batch) -> Tensor:
        """The dense model's answer alone, without gradient."""
        with self.autocast(), torch.no_grad():
            return self._answer(self._dense, batch).to(self._device)

    def run_beside(self, batch: Batch, dense: Tensor) -> Sides:
        """The smaller model beside an answer of the dense one that is known already; no states are compared."""
        with self.autocast():
            return Sides(output=self._answer(self._model, batch), dense=dense, states=[])

    def run(self, batch: Batch) -> Sides:
        """Both models on a batch. Gradients reach the smaller one unless they are switched off around the call."""
        dense_states: dict[int, Tensor] = {}
        states: dict[int, Tensor] = {}
        with self.autocast(), ProductAttention():
            with torch.no_grad(), self._watching(self._dense_stack, dense_states, {old for _, old in self._compared}):
                dense = self._answer(self._dense, batch)
            with self._watching(self._stack, states, {new for new, _ in self._compared}):
                output = self._answer(self._shell, batch)
        for known in self._known:
            known.output = None
        pairs = [(states[new], dense_states[old].to(self._device)) for new, old in self._compared]
        return Sides(output=output, dense=dense.to(self._device), states=pairs)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the products, for what is computed beside the bodies too."""
        if self._precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._precision)

    def heads(self) -> tuple[HeadShell, HeadShell]:
        """What turns last hidden states into logits, in the smaller model and in the dense one."""
        # The heads pass no block: a narrow copy of one would lie there unused.
        inside = {id(value) for value in self._model.stack.blocks.parameters()}
        ours = self._narrowed(
            self._model.model, is_frozen=lambda value: not value.requires_grad and id(value) not in inside
        )
        return HeadShell(ours), HeadShell(self._dense.model)

    def _narrowed(self, model: Any, *, is_frozen: Callable[[Tensor], bool]) -> Any:
        if self._precision is None:
            return model
        return with_narrow_maps(model, self._precision, is_frozen)

    def _answer(self, loaded: Loaded, batch: Batch) -> Tensor:
        by_body = loaded.head in ("causal", "masked", "encoder")
        runs: Any = body_of(loaded.model) if by_body else loaded.model
        inputs = model_inputs(loaded, batch.inputs, batch.keep, part=runs if by_body else None)
        # A cache would be filled twice where blocks are computed again.
        if takes(runs, "use_cache"):
            inputs["use_cache"] = False
        outputs: Any = runs(**inputs)
        return outputs["logits"] if not by_body and "logits" in outputs else outputs[0]

    @contextlib.contextmanager
    def _watching(self, stack: BlockStack, states: dict[int, Tensor], wanted: set[int]) -> Iterator[None]:
        """Keeps the states after the wanted blocks, and hands the last shared block's output to the smaller model."""
        shares = bool(self._known) and stack is self._dense_stack
        if not wanted and not shares:
            yield
            return

        def keep(index: int, _: Tensor, after: Tensor) -> None:
            if index in wanted:
                states[index] = after

        def share(_: nn.Module, __: Any, output: Any) -> None:
            # In the dtype that the trained copy computes in: without autocast nothing else would turn it.
            hidden = hidden_from_output(output)
            known = replace_hidden(output, hidden.to(self._device, self._model.model.dtype))
            for block in self._known:
                block.output = known

        with contextlib.ExitStack() as hooks:
            if wanted:
                hooks.enter_context(hooked(stack, keep))
            if shares:
                handle = stack.blocks[len(self._known) - 1].register_forward_hook(share)
                hooks.callback(handle.remove)
            yield
