"""The prompts of the forms: who writes them, who reads them, and when."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from avss.compensation import split
from avss.config import refuse_unread
from avss.data.augment import Asked, Augmentation
from avss.data.batches import Batches, leading_ids, need_tokenizer
from avss.data.short import can_divide, needed, shortened
from avss.forms import Rows, choosing_forms
from avss.models.load import Loaded
from avss.models.writing import NUM_WRITTEN, can_write, keep_rows, read_rows, write_rows
from avss.progress import MayGoOn, Timed, always

PROMPT_TOKENS = 40
"""Of a prompt, about: how many a text has room for."""


class Asking:
    """The prompts of the forms, of sentences that the dense model writes when they are needed.

    Args:
        loaded: The dense model.
        batches: The text, whose forms count.
        wanted: Prompts of each form; None for the usual number, but no more than the text has room for where a form
            asks for no answer and nothing but a repair reads them.
        timed: Where progress goes.
        may_go_on: Asked before each batch of them but the first of each form.
        kept: A file that keeps them for a run that is killed and goes on, and gives them back to it; None for none.
        heals: Whether healing reads them too.
        short: Share of what is fitted that is read in short windows; None for none given, and none.
    """

    def __init__(
        self,
        loaded: Loaded,
        batches: Batches,
        wanted: int | None,
        timed: Timed,
        may_go_on: MayGoOn = always,
        kept: Path | None = None,
        *,
        heals: bool = False,
        short: float | None = None,
    ) -> None:
        self._loaded, self._batches, self._timed, self._may_go_on, self._kept = loaded, batches, timed, may_go_on, kept
        self._wanted, self._heals, self._short = wanted, heals, short

    @functools.cached_property
    def rows(self) -> Rows:
        """The sentences; none where there is no form, or the model cannot write."""
        rewriting = self._batches.augmentation
        if rewriting is None or not rewriting.forms or self._wanted == 0 or not can_write(self._loaded):
            return {}
        rows = read_rows(self._kept) if self._kept is not None else None
        if rows is not None:
            return rows
        wanted = {form: self._count(form, rewriting) for form in rewriting.forms}
        how = {"seed": self._batches.facts.seed, "may_go_on": self._may_go_on}
        with self._timed("Writing prompts") as advance:
            rows = write_rows(self._loaded, wanted, **how, on_step=advance)
        if self._kept is not None:
            keep_rows(rows, self._kept)
        return rows

    def _count(self, form: str, rewriting: Augmentation) -> int:
        if self._wanted is not None:
            return self._wanted
        if self._heals or choosing_forms([form]):
            return NUM_WRITTEN
        num_tokens = rewriting.form_share * sum(map(len, self._batches.sequences)) / len(rewriting.forms)
        return min(NUM_WRITTEN, math.ceil(num_tokens / PROMPT_TOKENS))

    def prompts(self) -> Sequence[Asked]:
        """Those that ask for one of several answers, up to these."""
        rewriting = self._batches.augmentation
        if rewriting is None or not choosing_forms(rewriting.forms) or not self.rows:
            return ()
        return rewriting.with_rows(self.rows).asked((self._batches.facts.seed,))

    def fitted(self) -> tuple[Batches, ...]:
        """The part of the text that a repair is fitted to (`split`), as it reads that: some of it in short windows.

        Its prompts have these sentences, but for those that judge; the rest of the text has its own. Empty where the
        text is so short that its sequences must be halved.
        """
        batches, rewriting = self._batches, self._batches.augmentation
        if len(batches.sequences) < 3:
            return ()
        fitted = split(batches)[0]
        parts = shortened(fitted, self.short, self._num_leading) if self.short else (fitted,)
        if rewriting is not None and self.rows:
            rewriting = rewriting.with_rows(self.rows)
        return tuple(dataclasses.replace(part, augmentation=rewriting).rewritten() for part in parts)

    @property
    def short(self) -> float:
        """Share of what is fitted that is read in short windows; 0 where there can be none."""
        return self._short if self._short and self._divides else 0.0

    def check_short(self) -> None:
        """Refuses a share of short windows where there can be none.

        Raises:
            ConfigError: One was asked for.
        """
        if not self._divides:
            facts = self._batches.facts
            refuse_unread(
                {"short": self._short or None},
                needed(facts.seq_len if facts.layout == "packed" else None, self._loaded.head),
            )

    @property
    def _divides(self) -> bool:
        facts, pad_id = self._batches.facts, self._batches.pad_id
        return facts.layout == "packed" and can_divide(facts.seq_len, self._num_leading, pad_id)

    @functools.cached_property
    def _num_leading(self) -> int:
        return len(leading_ids(need_tokenizer(self._loaded.tokenizer, self._loaded.source)))
