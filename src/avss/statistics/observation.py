"""One batch at one block: the per-token numbers that statistics share, each computed once.

The hidden state after block i is the one before block i + 1, so its numbers are carried over rather than computed twice
(`Site` values are handed on by `collect`). Work on `[B, T, D]` is what a hook costs; everything after it is `[B, T]`.

Shape letters: B batch, T token, D hidden unit.
"""

import functools

import torch
from torch import Tensor

from avss.statistics.base import Site


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
        """Hidden units of each token with an absolute value below the threshold.

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
            self._below[key] = (self.magnitude < limit).to(torch.float32).sum(-1)
        return self._below[key]


class Observation:
    """What a hook sees of one block in one forward pass.

    Attributes:
        input: Residual stream before the block.
        output: Residual stream after the block.
        keep: `[B, T]`, True for real tokens.
        first: `[B, T]`, True at the first real token of each sequence.
    """

    def __init__(self, hidden_in: Hidden, hidden_out: Hidden, keep: Tensor) -> None:
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
        return self.input if site == "input" else self.output if site == "output" else self.update

    @functools.cached_property
    def token_dot(self) -> Tensor:
        """Dot product of input and output of each token."""
        return torch.linalg.vecdot(self.input.values, self.output.values)

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
