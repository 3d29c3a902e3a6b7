"""The time of `--quality best`: how much there is, and what it decided, for when the run is killed and goes on."""

import contextlib
import json
import os
import time
from pathlib import Path

from avss.progress import MayGoOn, always, until


class Clock:
    """The time for search, repair and healing, from the moment at which they begin, and what it decided.

    A run that was killed in its healing finds this again only from the same repaired model: what there was time for
    then is what there is time for when it goes on, though the clock starts anew.

    Args:
        seconds: The time.
        counts: Whether it bounds anything: only `quality = best` has such a time.
        notes: Where the decisions are kept until the run is done.
    """

    def __init__(self, seconds: float, *, counts: bool, notes: Path) -> None:
        self.began, self.seconds, self._counts, self._notes = time.monotonic(), seconds, counts, notes
        self._decided: list[bool] = []
        self._earlier = _read_decisions(notes) if counts else []

    @property
    def left(self) -> float:
        """Seconds left; negative where more were taken."""
        return self.began + self.seconds - time.monotonic()

    def in_time(self, share: float) -> MayGoOn:
        """Whether no more than this share of the time is over: for what keeps its own result for a run that goes on."""
        return until(self.began + share * self.seconds) if self._counts else always

    def until(self, share: float) -> MayGoOn:
        """Whether no more than this share of the time is over, or was the first time it was asked."""
        in_time = self.in_time(share)

        def may_go_on() -> bool:
            place = len(self._decided)
            self._decided.append(self._earlier[place] if place < len(self._earlier) else in_time())
            return self._decided[-1]

        return may_go_on if self._counts else always

    def write_down(self) -> None:
        """Keeps what was decided, from here on, until `forget`."""
        if self._counts:
            self._notes.parent.mkdir(parents=True, exist_ok=True)
            partial = self._notes.with_name(f"{self._notes.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(self._decided), encoding="utf-8")
            partial.replace(self._notes)

    def forget(self) -> None:
        """Removes what was kept, once the result is safe."""
        self._notes.unlink(missing_ok=True)


def _read_decisions(notes: Path) -> list[bool]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(notes.read_text(encoding="utf-8"))
        if isinstance(found, list) and all(isinstance(one, bool) for one in found):
            return found
    return []
