"""The prompts of the forms: who writes them, who reads them, and when."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from avss.compensation import split
from avss.data.augment import Asked
from avss.data.batches import Batches
from avss.forms import Rows, choosing_forms
from avss.models.load import Loaded
from avss.models.writing import NUM_WRITTEN, can_write, keep_rows, read_rows, write_rows
from avss.progress import MayGoOn, Timed, always


class Asking:
    """The prompts of the forms, of sentences that the dense model writes when they are needed.

    Args:
        loaded: The dense model.
        batches: The text, whose forms count.
        wanted: Prompts of each form; None for the usual number.
        timed: Where progress goes.
        may_go_on: Asked before each batch of them but the first of each form.
        kept: A file that keeps them for a run that is killed and goes on, and gives them back to it; None for none.
    """

    def __init__(
        self,
        loaded: Loaded,
        batches: Batches,
        wanted: int | None,
        timed: Timed,
        may_go_on: MayGoOn = always,
        kept: Path | None = None,
    ) -> None:
        self._loaded, self._batches, self._timed, self._may_go_on, self._kept = loaded, batches, timed, may_go_on, kept
        self._count = NUM_WRITTEN if wanted is None else wanted

    @functools.cached_property
    def rows(self) -> Rows:
        """The sentences; none where there is no form, or the model cannot write."""
        rewriting, loaded = self._batches.augmentation, self._loaded
        forms = rewriting.forms if rewriting is not None else ()
        if not (forms and self._count and can_write(loaded)):
            return {}
        rows = read_rows(self._kept) if self._kept is not None else None
        if rows is not None:
            return rows
        how = {"count": self._count, "seed": self._batches.facts.seed, "may_go_on": self._may_go_on}
        with self._timed("Writing prompts") as advance:
            rows = write_rows(loaded, forms, **how, on_step=advance)
        if self._kept is not None:
            keep_rows(rows, self._kept)
        return rows

    def prompts(self) -> Sequence[Asked]:
        """Those that ask for one of several answers, up to these."""
        rewriting = self._batches.augmentation
        if rewriting is None or not choosing_forms(rewriting.forms) or not self.rows:
            return ()
        return rewriting.with_rows(self.rows).asked((self._batches.facts.seed,))

    def read(self) -> Batches:
        """The text as a repair reads it.

        What is fitted has these sentences in its prompts, but for those that judge; the rest has its own.
        """
        plain, rewriting = self._batches.rewritten(), self._batches.augmentation
        if not self.rows or rewriting is None or len(plain.sequences) < 3:
            return plain
        num_fitted = len(split(plain)[0].sequences)
        filled = dataclasses.replace(self._batches, augmentation=rewriting.with_rows(self.rows)).rewritten()
        return plain.with_sequences((*filled.sequences[:num_fitted], *plain.sequences[num_fitted:]))
