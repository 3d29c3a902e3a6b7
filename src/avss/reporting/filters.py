"""What the templates of the page and of the model card both ask for. No chart library: a cut on disk writes a card."""

import itertools
from collections.abc import Sequence
from urllib.parse import urlsplit

from avss.record import Plan


def index_runs(plan: Plan) -> list[tuple[str, str]]:
    """The index map in runs, e.g. `[("0-11", "0-11"), ("12-18", "removed"), ("19-29", "12-22")]`."""
    runs = []
    for _, group in itertools.groupby(enumerate(range(plan.num_blocks)), lambda pair: pair[1] in plan.index_map):
        old = [block for _, block in group]
        new = [plan.index_map[block] for block in old if block in plan.index_map]
        runs.append((_span(old), _span(new) if new else "removed"))
    return runs


def safe_url(url: str | None) -> str | None:
    """The address if it is a web address, else None: a link in a report runs no script."""
    return url if url and urlsplit(url).scheme in ("http", "https") else None


def _span(blocks: Sequence[int]) -> str:
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
