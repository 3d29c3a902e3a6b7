"""What a repair reads while text passes: a block's inputs to its output projections, and the sum they write to."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from avss.data.batches import Batches, Inputs
from avss.errors import DataError
from avss.models.forward import run_body
from avss.models.load import Loaded
from avss.models.projections import Projections, by_token
from avss.models.stack import hidden_from_output

MASSIVE = 10.0
"""How many times the median norm a token's hidden state may have: beyond, it is a massive activation (2402.17762)."""


class _Seen(Exception):
    """Everything wanted has been computed; the rest of the forward pass is not needed."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What one block read and wrote, for one batch.

    Attributes:
        features: For each projection, its inputs `[B, T, F]`.
        state: What the projections' outputs are added to: the block's output, or its closing norm's input,
            `[B, T, D]`.
    """

    features: tuple[Tensor, ...]
    state: Tensor


def read_block(
    loaded: Loaded, index: int, facts: Projections, paths: Sequence[str], inputs: Inputs, keep: Tensor
) -> Written:
    """Runs a model up to the end of one block, and no further.

    Args:
        loaded: The model.
        index: Place of the block in this model's own stack.
        facts: Where its blocks write.
        paths: Projections whose inputs are wanted.
        inputs: Token ids `[B, T]`, or the model's own keyword arguments (images).
        keep: `[B, T]`.
    """
    return read_blocks(loaded, {index: paths}, facts, inputs, keep)[index]


def read_blocks(
    loaded: Loaded, wanted: Mapping[int, Sequence[str]], facts: Projections, inputs: Inputs, keep: Tensor
) -> dict[int, Written]:
    """The same for several blocks in one run: each block's place -> what it read and wrote."""
    features: dict[tuple[int, str], Tensor] = {}
    states: dict[int, Tensor] = {}
    last = max(wanted)

    def finish(index: int) -> Any:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            if not facts.closing_norm:
                states[index] = hidden_from_output(output)
            if index == last:
                raise _Seen

        return after

    def before_norm(index: int) -> Any:
        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            states[index] = args[0]

        return read

    def reader(index: int, path: str) -> Any:
        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            features[index, path] = by_token(args[0], keep.shape)

        return read

    with contextlib.ExitStack() as hooks:
        for index, paths in wanted.items():
            block = loaded.stack.blocks[index]
            handles = [block.register_forward_hook(finish(index))]
            if facts.closing_norm:
                norm = block.get_submodule(facts.closing_norm)
                handles.append(norm.register_forward_pre_hook(before_norm(index)))
            handles += [block.get_submodule(path).register_forward_pre_hook(reader(index, path)) for path in paths]
            for handle in handles:
                hooks.callback(handle.remove)
        with contextlib.suppress(_Seen):
            run_body(loaded, inputs, keep)
    return {
        index: Written(features=tuple(features[index, path] for path in paths), state=states[index])
        for index, paths in wanted.items()
    }


def ordinary(state: Tensor, keep: Tensor) -> Tensor:
    """`[B, T]`: True for tokens whose error counts.

    Not padding, not the first token of a sequence (the attention sink), and no massive activation: a handful of tokens
    a thousand times larger than the rest would decide everything. Where nothing else is left, all real tokens.
    """
    norms = state.float().norm(dim=-1)
    usual = keep.to(state.device).clone()
    usual[:, 0] = False
    if bool(usual.any()):
        usual &= norms <= MASSIVE * norms[usual].median()
        return usual
    return keep.to(state.device)


def split(batches: Batches, *, share: float = 0.125) -> tuple[Batches, Batches, Batches]:
    """Calibration text or images in three: to fit, to choose a ridge or a step by, and to judge by.

    The last two are `share` of the sequences each, at least one. Fewer than three sequences of text are halved until
    there are enough, so that no token is in two of the three.

    Raises:
        DataError: There are too few tokens or images for that.
    """
    sequences = batches.sequences
    if batches.facts.layout == "images" and len(sequences) < 3:
        raise DataError(
            f"A repair is fitted to some images, chosen by others and judged by others still, and "
            f"`{batches.facts.source}` gives {len(sequences)}. Give three or more, or leave out `--compensate`."
        )
    while len(sequences) < 3:
        if min(map(len, sequences), default=0) < 4:
            raise DataError(
                f"`{batches.facts.source}` gives {num_tokens(batches)} tokens, too few to fit a repair to some of them "
                "and judge it by others. Give more text."
            )
        sequences = tuple(half for one in sequences for half in one.tensor_split(2))
    total = len(sequences)
    held = max(1, round(share * total))
    cuts = (0, total - 2 * held, total - held, total)
    parts = [sequences[start:stop] for start, stop in itertools.pairwise(cuts)]
    fit, choose, judge = (dataclasses.replace(batches, sequences=part) for part in parts)
    return fit, choose, judge


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Batches of one length after batches of another: windows and short windows.

    Attributes:
        parts: At least one.
    """

    parts: tuple[Batches, ...]

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        """The batches of each part, see `Batches`."""
        return itertools.chain.from_iterable(self.parts)

    def __len__(self) -> int:
        """Number of batches."""
        return sum(map(len, self.parts))

    @property
    def sequences(self) -> tuple[Tensor, ...]:
        """Those of all parts."""
        return tuple(itertools.chain.from_iterable(part.sequences for part in self.parts))

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [length for part in self.parts for length in part.lengths()]


Text = Batches | Mixed
"""What is fitted."""


def num_tokens(text: Text) -> int:
    """Real tokens, or places of images."""
    return sum(text.lengths())
