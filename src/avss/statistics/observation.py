"""What statistics are shown: one batch at one block, at all blocks together, its gradients, or the weights.

For one batch at one block, these are the per-token numbers that statistics share, each computed once.

The hidden state after block i is the one before block i + 1, so its numbers are carried over rather than computed twice
(`Site` values are handed on by `collect`). Work on `[B, T, D]` is what a hook costs; everything after it is `[B, T]`.

Shape letters: B batch, T token, D hidden unit.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from avss.statistics.base import Part, Site


class Hidden:
    """A hidden state `[B, T, D]` and its per-token numbers, all `[B, T]`, in float32 or wider, computed on demand.

    Attributes:
        source: The tensor as the model holds it, to know it again.
        values: The same in float32 or wider.
    """

    def __init__(self, values: Tensor) -> None:
        self.source = values
        # float32, not the model's dtype: bfloat16 keeps fewer than three digits.
        self.values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        self._below: dict[tuple[float, bool], Tensor] = {}

    @property
    def width(self) -> int:
        """Hidden units, D."""
        return self.values.shape[-1]

    @functools.cached_property
    def token_mean(self) -> Tensor:
        """Mean over the hidden units of each token."""
        return self.values.mean(-1)

    @functools.cached_property
    def token_m2(self) -> Tensor:
        """Sum over the hidden units of squared deviations from the token's mean.

        Centred first: `E[x^2] - E[x]^2` in float32 loses every digit where the mean is large against the spread.
        """
        centred = self.values - self.token_mean.unsqueeze(-1)
        return torch.linalg.vecdot(centred, centred)

    @functools.cached_property
    def token_square(self) -> Tensor:
        """Sum of squares over the hidden units of each token."""
        return torch.linalg.vecdot(self.values, self.values)

    @functools.cached_property
    def magnitude(self) -> Tensor:
        """Absolute values, `[B, T, D]`: shared by all thresholds."""
        return self.values.abs()

    def count_below(self, threshold: float, *, relative: bool) -> Tensor:
        """Hidden units of each token with an absolute value below the threshold; nan for a token that is not finite.

        Args:
            threshold: In activation units, or as a share of the token's root mean square if `relative`.
            relative: Whether the threshold scales with the token.
        """
        key = (threshold, relative)
        if key not in self._below:
            limit: Tensor | float = threshold
            if relative:
                limit = (self.token_square / self.width).sqrt().mul(threshold).unsqueeze(-1)
            # Summing floats is several times faster than summing booleans on a CPU; counts below 2**24 are exact.
            below = (self.magnitude < limit).to(torch.float32).sum(-1)
            self._below[key] = torch.where(self.token_square.isfinite(), below, torch.nan)
        return self._below[key]


class Observation:
    """What a hook sees of one block in one forward pass.

    Attributes:
        input: Residual stream before the block.
        output: Residual stream after the block.
        keep: `[B, T]`, True for real tokens.
        first: `[B, T]`, True at the first real token of each sequence.
        inside: States of its sub-layers by site, and the residual stream between them as `middle`, where there is one;
            empty where nobody asked.
    """

    def __init__(
        self, hidden_in: Hidden, hidden_out: Hidden, keep: Tensor, inside: Mapping[str, Tensor] | None = None
    ) -> None:
        self.inside = {name: Hidden(state) for name, state in (inside or {}).items()}
        self._parts: dict[Part, Observation] = {}
        self.input = hidden_in
        self.output = hidden_out
        self.keep = keep
        self.first = keep & (keep.cumsum(-1) == 1)

    @functools.cached_property
    def update(self) -> Hidden:
        """What the block adds: output minus input."""
        return Hidden(self.output.values - self.input.values)

    def at(self, site: Site) -> Hidden:
        """The hidden state at a site."""
        if site in self.inside:
            return self.inside[site]
        return self.input if site == "input" else self.output if site == "output" else self.update

    def around(self, part: Part) -> "Observation":
        """The residual stream before and after a part of the block.

        Where the block has a stream between its parts, the attention lies before it and the feed-forward part after it;
        in blocks with norms after their parts, the norms belong to them. In a parallel block both parts read its input,
        and each is taken as if it were the only one: the input, and the input plus what the part adds.
        """
        if part == "block":
            return self
        if part not in self._parts:
            before, after = self.input, self.output
            if "middle" in self.inside:
                middle = self.inside["middle"]
                before, after = (before, middle) if part == "attention" else (middle, after)
            else:
                after = Hidden(before.values + self.inside[part].values)
            self._parts[part] = Observation(before, after, self.keep)
        return self._parts[part]

    @functools.cached_property
    def token_dot(self) -> Tensor:
        """Dot product of input and output of each token."""
        return torch.linalg.vecdot(self.input.values, self.output.values)

    def count_unchanged(self, threshold: float) -> Tensor:
        """Hidden units of each token that the block changes by less than this share of what they were, `[B, T]`."""
        small = self.update.magnitude < self.input.magnitude * threshold
        return small.to(torch.float32).sum(-1)

    @functools.cached_property
    def num_tokens(self) -> Tensor:
        """Real tokens of each sequence by part, `[B, 2]`: the first one, and the rest."""
        return self.by_part(torch.ones_like(self.keep, dtype=torch.float64))

    def by_part(self, token_values: Tensor) -> Tensor:
        """Sums `[B, T]` over the real tokens of each sequence: `[B, 2]` float64, first token apart.

        Masked by selection, not multiplication: nan in padding must not survive.
        """
        zero = torch.zeros((), dtype=torch.float64, device=token_values.device)
        wide = token_values.double()
        first = torch.where(self.first, wide, zero).sum(-1)
        rest = torch.where(self.keep & ~self.first, wide, zero).sum(-1)
        return torch.stack([first, rest], dim=-1)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Angles across all runs of neighbours that begin at one block, for one batch.

    Attributes:
        angles: `[B, 2, W]` float64 (W runs: of 1 block, of 2, ...): summed over the chosen tokens of each sequence, the
            first token apart, in units of pi.
        tokens: `[B, 2]` float64: how many tokens these are.
    """

    angles: Tensor
    tokens: Tensor


class Passage:
    """The states of chosen tokens of one batch before the first block and after every block.

    The hidden state after the last block is the block's own output, before any final norm.

    Args:
        num_blocks: L, length of the stack.
        token: `last` for the last real token of each sequence; `all` for every token, or every k-th, counted from the
            start of the batch, where the states of every token would take more than `MOST_BYTES`.
    """

    MOST_BYTES = 256 * 2**20
    _CHUNK_BYTES = 64 * 2**20

    def __init__(self, num_blocks: int, token: str) -> None:
        self._token = token
        self._num_blocks = num_blocks
        self._stride = 1
        self._keep = torch.empty(0)
        self._states: list[Tensor] = []

    def record(self, index: int, before: Tensor, after: Tensor, keep: Tensor) -> None:
        """Takes what it needs of the states around block `index`, blocks in order.

        Args:
            index: Of the block.
            before: State before it, `[B, T, D]`.
            after: State after it.
            keep: `[B, T]`, True for real tokens: of the states, which some models lengthen.
        """
        if index == 0:
            self._keep = keep
            wanted = before.numel() * before.element_size() * (self._num_blocks + 1)
            self._stride = max(1, -(-wanted // self.MOST_BYTES))
            self._states.append(self._chosen(before))
        self._states.append(self._chosen(after).to(self._states[0].device))

    def windows_from(self, start: int) -> Windows:
        """Angles between the input of block `start` and the outputs of blocks `start`, `start + 1`, ... to the last."""
        angles, tokens = self._angles
        return Windows(angles=angles[:, :, start, start + 1 :], tokens=tokens)

    def _chosen(self, hidden: Tensor) -> Tensor:
        """`[B, N, D]`: a copy, since the model may go on to write into its own tensor."""
        if self._token == "last":
            last = self._last_places(hidden.device)[:, :, None].expand(-1, 1, hidden.shape[-1])
            return hidden.gather(1, last)
        return hidden[:, :: self._stride].clone()

    def _last_places(self, device: torch.device) -> Tensor:
        """Position of the last real token of each sequence, `[B, 1]`; 0 where there is none."""
        keep = self._keep.to(device)
        return (keep * torch.arange(1, keep.shape[1] + 1, device=device)).argmax(1, keepdim=True)

    def _masks(self, device: torch.device) -> Tensor:
        """Chosen real tokens that are the first of their sequence, and the others: `[B, 2, N]`."""
        keep = self._keep.to(device)
        first = keep & (keep.cumsum(-1) == 1)
        parts = torch.stack([first, keep & ~first], dim=1)
        if self._token == "last":
            return parts.gather(2, self._last_places(device)[:, None, :].expand(-1, 2, 1))
        return parts[:, :, :: self._stride]

    @functools.cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        """Sums of angles between all pairs of states, `[B, 2, L + 1, L + 1]`, and tokens, `[B, 2]`."""
        num_sequences, num_chosen, width = self._states[0].shape
        masks = self._masks(self._states[0].device)
        num_states = len(self._states)
        chunk = max(1, self._CHUNK_BYTES // (8 * num_states * max(width, num_states)))
        total = masks.new_zeros((num_sequences, 2, num_states, num_states), dtype=torch.float64)
        for row in range(num_sequences):
            for start in range(0, num_chosen, chunk):
                part = slice(start, start + chunk)
                states = torch.stack([state[row, part] for state in self._states], dim=1)
                angles = _angles_between(states).flatten(1)
                # Selected, not multiplied: nan in padding must not survive.
                chosen = masks[row, :, part, None]
                total[row] += torch.where(chosen, angles, 0).sum(1).view(2, num_states, num_states)
        return total, masks.sum(-1, dtype=torch.float64)


def _angles_between(states: Tensor) -> Tensor:
    """Angles between all pairs of the states `[N, S, D]` of each token, `[N, S, S]` float64, in units of pi.

    In float64: near 1 the inverse cosine turns float32's rounding of 1e-7 into an angle of 1e-4.
    """
    wide = states.double()
    norms = wide.norm(dim=-1, keepdim=True)
    is_zero = (norms == 0).squeeze(-1)
    unit = torch.where(norms == 0, 0, wide / norms)
    cosine = (unit @ unit.transpose(1, 2)).clamp(-1, 1)
    # Two states of zeros are the same; one of zeros is at right angles to any other.
    cosine = torch.where(is_zero[:, :, None] & is_zero[:, None, :], 1.0, cosine)
    return cosine.arccos() / torch.pi


@dataclasses.dataclass(frozen=True)
class WeightNumbers:
    """Norms of a block's weight matrices, one entry per matrix, float64.

    Attributes:
        l1: Sum of absolute values.
        l2: Square root of the sum of squares.
    """

    l1: Tensor
    l2: Tensor

    @classmethod
    def of(cls, matrices: Iterable[Tensor]) -> Self:
        """The norms of these matrices."""
        found = [matrix.detach() for matrix in matrices]
        return cls(l1=_norms(found, 1), l2=_norms(found, 2))


@dataclasses.dataclass(frozen=True)
class GradientNumbers:
    """What a backward pass says of a block's weight matrices, one entry per matrix, float64; gradients do not last.

    Attributes:
        l1: Sum of absolute values of each gradient.
        l2: Square root of each gradient's sum of squares.
        taylor: Sum of absolute values of weight times gradient.
        targets: What the loss is a mean over: predicted tokens, or sequences; a scalar.
    """

    l1: Tensor
    l2: Tensor
    taylor: Tensor
    targets: Tensor

    @staticmethod
    def of_one(weight: Tensor, gradient: Tensor) -> Tensor:
        """L1 norm, L2 norm and Taylor sum of one matrix, `[3]`: what is kept of it."""
        wide = gradient if gradient.dtype in (torch.float32, torch.float64) else gradient.float()
        product = wide * weight
        return torch.cat([_norms([wide], 1), _norms([wide], 2), _norms([product], 1)])

    @classmethod
    def of(cls, kept: Iterable[Tensor], targets: Tensor) -> Self:
        """From the `of_one` of every matrix of a block that had a gradient; none is a block that does nothing."""
        found = [*kept] or [torch.zeros(3, dtype=torch.float64, device=targets.device)]
        device = found[0].device
        l1, l2, taylor = torch.stack([one.to(device) for one in found], dim=1)
        return cls(l1=l1, l2=l2, taylor=taylor, targets=targets)


def _norms(matrices: list[Tensor], order: int) -> Tensor:
    # Summed in float64: a large matrix has more terms than float32 has digits.
    norms = [torch.linalg.vector_norm(matrix, order, dtype=torch.float64) for matrix in matrices]
    return torch.stack([norm.to(norms[0].device) for norm in norms])
