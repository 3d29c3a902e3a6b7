"""Which solved examples stand before an item."""

from collections.abc import Iterator, Sequence

import numpy as np

from avss.errors import DataError


class Shots:
    """A seeded order of the examples, from which each item takes the first that are not itself.

    Labels take turns, so the examples are as balanced as they can be; the order within a prompt is shuffled, so that it
    does not end on the same label every time. All items see the same examples, but for those they must leave out.

    Args:
        texts: Of the examples.
        labels: Of the examples.
        seed: Of both shuffles.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int], seed: int) -> None:
        random = np.random.default_rng(seed)
        self._texts = texts
        self._seed = seed
        classes = random.permutation(sorted(set(labels)))
        queues = {
            int(one): random.permutation([i for i, label in enumerate(labels) if label == one]) for one in classes
        }
        self._queues = [[int(index) for index in queue] for queue in queues.values()]

    def take(self, count: int, exclude: str) -> list[int]:
        """Indices of `count` examples; none has the text `exclude`, so that no item is told its own answer.

        Raises:
            DataError: There are not enough.
        """
        chosen: list[int] = []
        rounds = [self._usable(queue, exclude) for queue in self._queues]
        while len(chosen) < count:
            turn = [index for queue in rounds if (index := next(queue, None)) is not None]
            if not turn:
                raise DataError(
                    f"{count} solved examples are wanted, and there are {len(chosen)} besides the item itself. Ask for "
                    "fewer `shots` or give more data in `shots-data`."
                )
            chosen += turn
        return [int(index) for index in np.random.default_rng(self._seed).permutation(chosen[:count])]

    def _usable(self, queue: list[int], exclude: str) -> Iterator[int]:
        return (index for index in queue if self._texts[index] != exclude)
