"""Logits at the places asked about, and at no others.

A large vocabulary makes the head of a small model a fifth of a forward pass and more, and a question about the last
word of a text wants a single row of it.

Shape letters: B batch, T token, N places asked about, V vocabulary.
"""

import torch
from torch import Tensor, nn

from avss.errors import AvssError
from avss.models.forward import run_outputs
from avss.models.load import Loaded
from avss.models.stack import body_of, hidden_from_output, replace_hidden

_TRIAL_ROWS, _TRIAL_TOKENS = 2, 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_COARSE_TOLERANCE = 0.02
_REFUSALS = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError, AvssError)


class AskedLogits:
    """What a model answers at some places of a batch; its head is run on these alone, where it can be.

    The body runs as always; of its last hidden states the model's own head is handed those asked about. Whether that
    gives what the whole forward pass gives there is tried on the first batch: a head that looks at its neighbours, or
    reads more than the last hidden states, is run on all of them.

    Args:
        loaded: A model that predicts words.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._is_local: bool | None = None

    def __call__(self, token_ids: Tensor, keep: Tensor, asked: Tensor) -> Tensor:
        """Logits `[N, V]`, sequence by sequence.

        Args:
            token_ids: `[B, T]`.
            keep: `[B, T]`, True for real tokens.
            asked: `[B, T]`, True where logits are wanted.
        """
        if bool(asked.all()):  # nothing to spare
            return run_outputs(self._loaded, token_ids, keep).flatten(0, 1)
        if self._is_local is None:
            self._is_local = self._try(token_ids[:_TRIAL_ROWS, :_TRIAL_TOKENS], keep[:_TRIAL_ROWS, :_TRIAL_TOKENS])
        if self._is_local:
            return self._narrowed(token_ids, keep, asked)[0]
        logits = run_outputs(self._loaded, token_ids, keep)
        return logits[asked.to(logits.device)]

    def _try(self, token_ids: Tensor, keep: Tensor) -> bool:
        """Whether the head, run on every other place, answers there what it answers in a whole pass."""
        if body_of(self._loaded.model) is self._loaded.model:
            return False
        asked = torch.zeros_like(keep)
        asked[:, ::2] = True
        whole = run_outputs(self._loaded, token_ids, keep)
        expected = whole[asked.to(whole.device)]
        try:
            found = self._narrowed(token_ids, keep, asked)
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS:  # a head that wants the shape of the whole batch
            return False
        if found.shape != (1, *expected.shape):
            return False
        # Some models rule words out with -inf, which equals itself; what is no number equals nothing.
        if bool(expected.isnan().any()):
            return False
        scale = float(expected.masked_fill(expected.isinf(), 0.0).abs().max())
        tolerance = scale * _TOLERANCE.get(expected.dtype, _COARSE_TOLERANCE)
        return torch.allclose(found[0], expected, rtol=0.0, atol=tolerance)

    def _narrowed(self, token_ids: Tensor, keep: Tensor, asked: Tensor) -> Tensor:
        def narrow(_: nn.Module, __: object, output: object) -> object:
            hidden = hidden_from_output(output)
            return replace_hidden(output, hidden[asked.to(hidden.device)][None])

        handle = body_of(self._loaded.model).register_forward_hook(narrow)
        try:
            return run_outputs(self._loaded, token_ids, keep)
        finally:
            handle.remove()
