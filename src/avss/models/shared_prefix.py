"""Runs a model with sets of blocks left out, and never computes the same prefix twice in a row.

Blocks before the first difference from the run before answer from memory, left-out blocks hand on what they were given,
and the model's own forward does everything else: embeddings, masks, positions, the head. So any architecture works
whose blocks are called once each, in order.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from avss.errors import UnsupportedArchitectureError
from avss.models.forward import run_body, run_outputs
from avss.models.load import Loaded
from avss.models.probe import brief_inputs
from avss.models.stack import BlockStack, hidden_from_call, hidden_from_output, replace_hidden

Removed = frozenset[int]
"""Blocks left out, original indices."""

Around = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called with (block index, the block's own forward, positional and keyword arguments); its result is the block's."""

Notes = dict[tuple[int | str, Any], Any]
"""What a block wrote into mappings that all blocks are handed: (which argument, key) -> value. The last blocks of Gemma
4 read there the keys and values of earlier ones."""


@contextlib.contextmanager
def around_blocks(stack: BlockStack, around: Around) -> Iterator[None]:
    """Puts `around` in place of each block's forward while the context is open; hooks of others stay in force."""
    missing = object()
    before = [block.__dict__.get("forward", missing) for block in stack.blocks]

    def attach(index: int, block: nn.Module) -> None:
        own = block.forward
        # An instance attribute hides the class's method, as accelerate's dispatch does; it is removed again below.
        block.forward = lambda *args, **kwargs: around(index, own, args, kwargs)

    try:
        for index, block in enumerate(stack.blocks):
            attach(index, block)
        yield
    finally:
        for block, forward in zip(stack.blocks, before, strict=True):
            if forward is missing:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _run_noting(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Notes]:
    """The block's result, and what it wrote for later blocks."""
    shared = _mappings(args, kwargs)
    before = {place: dict(mapping) for place, mapping in shared.items()}
    result = forward(*args, **kwargs)
    nothing = object()
    return result, {
        (place, key): value
        for place, mapping in shared.items()
        for key, value in mapping.items()
        if before[place].get(key, nothing) is not value
    }


def _write_again(notes: Notes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    shared = _mappings(args, kwargs)
    for (place, key), value in notes.items():
        shared[place][key] = value


def _mappings(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, MutableMapping[Any, Any]]:
    given = itertools.chain(enumerate(args), kwargs.items())
    return {place: value for place, value in given if isinstance(value, MutableMapping)}


@torch.no_grad()
def num_alone(loaded: Loaded) -> int:
    """Leading blocks that hand on nothing but the hidden state: what stands in for these need not compute them."""
    notes: dict[int, Notes] = {}

    def note(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result, notes[index] = _run_noting(forward, args, kwargs)
        return result

    with around_blocks(loaded.stack, note):
        run_body(loaded, brief_inputs(loaded))
    return next((index for index in sorted(notes) if notes[index]), len(loaded.stack))


class SharedPrefix:
    """One batch through one model, again and again, with other blocks left out each time.

    The first run is of the whole model. Each later run computes only from the first block that is left out in it and
    not in the run before, or the other way round. In the order of `in_sharing_order` the fewest are computed: the
    models that lack one of L blocks take L (L - 1) / 2 blocks instead of L (L - 1).

    Holds the hidden states of one run, `L + 1` tensors `[B, T, D]`: use small batches for large models.

    Args:
        loaded: The model; left as it was after each run.
        batch: Token ids `[B, T]`, or the model's own keyword arguments (images).
        keep: `[B, T]`, True for real tokens.
        share: False runs every model from its first block: the slow way, for checks.

    Attributes:
        dense: What the whole model answers, see `avss.models.forward.run_outputs`.
        num_blocks_run: Blocks computed so far, those of the whole model included.
    """

    def __init__(
        self, loaded: Loaded, batch: Tensor | Mapping[str, Tensor], keep: Tensor, *, share: bool = True
    ) -> None:
        self._loaded = loaded
        self._share = share
        self._batch = (batch, keep)
        self._results: list[Any] = [None] * len(loaded.stack)
        self._notes: list[Notes] = [{}] * len(loaded.stack)
        self._templates: list[Any] = []
        self._removed: Removed = frozenset()
        self._num_valid = len(loaded.stack)
        self.num_blocks_run = 0
        calls: list[int] = []

        def compute(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(index)
            self.num_blocks_run += 1
            self._results[index], self._notes[index] = _run_noting(forward, args, kwargs)
            return self._results[index]

        with around_blocks(loaded.stack, compute):
            self.dense = run_outputs(loaded, batch, keep)
        if calls != list(range(len(loaded.stack))):
            raise UnsupportedArchitectureError(
                f"`{type(loaded.model).__name__}` does not call its {len(loaded.stack)} blocks once each in order (it "
                f"called {calls[:12]}{' ...' if len(calls) > 12 else ''}), so blocks cannot be left out one by one."
            )
        self._templates, self._notes_of_all = list(self._results), list(self._notes)

    def rewind(self) -> None:
        """Goes back to the whole model's states: what the next run shares is then the same whatever ran before."""
        self._results, self._notes, self._removed = list(self._templates), list(self._notes_of_all), frozenset()
        self._num_valid = len(self._templates)

    def without(self, removed: Iterable[int]) -> Tensor:
        """What the model answers without these blocks.

        Raises:
            UnsupportedArchitectureError: A block returns another shape than it takes.
        """
        wanted = frozenset(removed)
        start = min(wanted ^ self._removed, default=self._num_valid) if self._share else 0
        # Only what this run has reached is a prefix for the next, also when it raises halfway.
        self._removed, self._num_valid = wanted, min(start, self._num_valid)

        def shortcut(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index < self._num_valid:
                _write_again(self._notes[index], args, kwargs)
                return self._results[index]
            result = None
            # A left-out block that later ones read from computes for them alone, as in `avss.models.stack.bypassed`.
            if index not in wanted or self._notes_of_all[index]:
                self.num_blocks_run += 1
                result, self._notes[index] = _run_noting(forward, args, kwargs)
            self._results[index] = self._skip(index, args, kwargs) if index in wanted else result
            self._num_valid += 1
            return self._results[index]

        with around_blocks(self._loaded.stack, shortcut):
            return run_outputs(self._loaded, *self._batch)

    def _skip(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The kind of value the block returns (what it hands on beside the hidden state too), with its input inside."""
        template, hidden = self._templates[index], hidden_from_call(args, kwargs)
        if hidden.shape != hidden_from_output(template).shape:
            raise UnsupportedArchitectureError(
                f"Block {index} takes {tuple(hidden.shape)} and returns {tuple(hidden_from_output(template).shape)}; a "
                "removable block returns the shape it takes."
            )
        return replace_hidden(template, hidden)


def in_sharing_order(sets: Iterable[Iterable[int]], num_blocks: int) -> list[Removed]:
    """The sets, each once, in the order in which neighbours share the longest prefixes; the whole model comes first.

    Read as binary numbers, block 0 leading, they ascend: a walk through the tree of prefixes, depth first.

    Example:
        >>> [sorted(one) for one in in_sharing_order([[0], [2], [1, 2], []], num_blocks=3)]
        [[], [2], [1, 2], [0]]
    """
    unique = {frozenset(one) for one in sets}
    return sorted(unique, key=lambda one: tuple(block in one for block in range(num_blocks)))
