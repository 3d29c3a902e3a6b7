"""Tells a person how far a stage is. The stages know only two callables; what is drawn is decided here."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

MayGoOn = Callable[[], bool]
"""Whether there is time to begin something more; asked before each part of a stage that could be left out."""


def always() -> bool:
    """There is."""
    return True


def until(moment: float) -> MayGoOn:
    """There is until a moment of `time.monotonic`."""
    return lambda: time.monotonic() < moment


class Advance(Protocol):
    """Called with (done, total); a total of None means: unknown. A note says in a few words how it goes."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Reports how far the stage is."""
        ...


class Stages(Protocol):
    """Opens a stage by its name, and hands out the callable that reports how far it is."""

    def __call__(self, name: str) -> AbstractContextManager[Advance]:
        """Opens the stage."""
        ...


@contextlib.contextmanager
def silent(name: str) -> Iterator[Advance]:
    """Draws nothing."""
    del name
    yield lambda done, total, note="": None


class Timed:
    """Wraps `Stages` and notes the seconds each stage took.

    Attributes:
        seconds: Stage name -> wall time; a stage opened twice adds up.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Advance]:
        """Opens the stage and times it."""
        start = time.perf_counter()
        with self._stages(name) as advance:
            yield advance
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


@contextlib.contextmanager
def bars() -> Iterator[Stages]:
    """Progress bars on the standard error stream, one a stage, with the time taken and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        @contextlib.contextmanager
        def stage(name: str) -> Iterator[Advance]:
            task = progress.add_task(name, total=None, note="")

            def advance(done: int, total: int | None, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)

            yield advance
            total = progress.tasks[task].total
            progress.update(task, total=total or 1, completed=total or 1)
            progress.stop_task(task)

        yield stage
