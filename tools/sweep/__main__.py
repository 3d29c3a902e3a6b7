"""`python -m tools.sweep`: goes over the architectures of transformers and writes `docs/architectures.md`.

Each model type is built tiny from its config, loses its first, a middle, its last and two scattered blocks, and is held
against every law (`tools.sweep.laws`). Each runs in a process of its own with a time limit, so that a crash or a hang
ends that one alone. Exit code 1 if any law is broken.

With `--mend` cuts are repaired and healed instead (`tools.sweep.mending`), where they read text; no table is written.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tools.sweep.laws import PLACES, BrokenLawError, VacuousProbeError, judge
from tools.sweep.mending import mend
from tools.sweep.shrink import small_model
from tools.sweep.table import render
from transformers.models.auto import modeling_auto

from avss.errors import UnsupportedArchitectureError

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "speech-to-text": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
READ_TEXT = ("causal", "masked", "encoder-decoder", "classifier")
SECONDS = 240
ROOT = Path(__file__).resolve().parents[2]


def candidates(kinds: list[str], types: list[str]) -> Iterator[dict[str, str]]:
    """Every (kind, model type, class) of the auto classes."""
    for kind in kinds:
        for model_type, names in sorted(getattr(modeling_auto, KINDS[kind]).items()):
            if not types or model_type in types:
                yield {"kind": kind, "type": model_type, "class": names if isinstance(names, str) else names[0]}


def examine(candidate: dict[str, str], *, mends: bool = False) -> dict[str, Any]:
    """The outcome for one class, in this process: of its cuts, or of mending one."""
    try:
        model = small_model(getattr(transformers, candidate["class"]), candidate["type"])
    except Exception as error:
        return {"outcome": "unbuilt", "reason": _sentence(error)}
    try:
        if mends:
            return {"outcome": "mended", **mend(model)}
        verdicts = judge(model, tried=PLACES if candidate["kind"] != "classifier" else ("scattered",))
    except UnsupportedArchitectureError as error:
        return {"outcome": "refused", "reason": _sentence(error)}
    except VacuousProbeError as error:
        return {"outcome": "unbuilt", "reason": str(error)}
    except BrokenLawError as error:
        return {"outcome": "broken", "reason": str(error)}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"outcome": "broken", "reason": f"{_sentence(error)} ({Path(place.filename).name}:{place.lineno})"}
    return {
        "outcome": "judged",
        "stacks": [{"name": one.stack, "path": one.path, "chosen": one.chosen, "cuts": one.cuts} for one in verdicts],
    }


def _sentence(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if isinstance(error, UnsupportedArchitectureError) else f"{type(error).__name__}: {text}"[:300]


@dataclasses.dataclass
class _Child:
    """A forked process that examines one class, and may crash or hang."""

    candidate: dict[str, str]
    process: int
    answer: int
    deadline: float
    text: bytes = b""

    def result(self, *, in_time: bool) -> dict[str, Any]:
        """What it found, once it has ended."""
        if not in_time:
            os.kill(self.process, signal.SIGKILL)
        os.close(self.answer)
        os.waitpid(self.process, 0)
        if in_time and self.text:
            return {**self.candidate, **json.loads(self.text)}
        what = "crashed" if in_time else f"took more than {SECONDS} seconds"
        return {**self.candidate, "outcome": "unbuilt", "reason": f"building and running it {what}, even small"}


def _start(candidate: dict[str, str], *, mends: bool) -> _Child:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w", encoding="utf-8") as answer:
            answer.write(json.dumps(examine(candidate, mends=mends)))
        os._exit(0)
    os.close(writing)
    return _Child(candidate, child, reading, time.monotonic() + SECONDS)


def examine_apart(todo: list[dict[str, str]], *, jobs: int, mends: bool) -> Iterator[dict[str, Any]]:
    """The outcomes as they come, each from a process of its own. No threads: a fork would inherit their locks."""
    waiting, running = list(reversed(todo)), list[_Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(waiting.pop(), mends=mends))
        ready, _, _ = select.select([child.answer for child in running], [], [], 1)
        for child in list(running):
            part = os.read(child.answer, 65536) if child.answer in ready else None
            child.text += part or b""
            if part == b"" or time.monotonic() > child.deadline:
                running.remove(child)
                yield child.result(in_time=part == b"")


def main() -> int:
    """Runs the sweep. Results are kept as they come, so a run that was stopped goes on where it was."""
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated: " + ", ".join(KINDS))
    parser.add_argument("--types", default="", help="model types, comma-separated; all by default")
    parser.add_argument("--results", type=Path, help="where outcomes are kept; by default under runs/")
    parser.add_argument("--mend", action="store_true", help="repair and heal cuts instead of judging them")
    parser.add_argument("--fresh", action="store_true", help="forget earlier outcomes of what is asked for")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "architectures.md", help="the table to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.mend and options.kinds == ",".join(KINDS):
        options.kinds = ",".join(READ_TEXT)
    options.results = options.results or ROOT / "runs" / ("mending.jsonl" if options.mend else "sweep.jsonl")
    wanted = list(candidates(options.kinds.split(","), [name for name in options.types.split(",") if name]))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = _read(options.results)
    todo = [one for one in wanted if options.fresh or _key(one) not in known]
    with options.results.open("a") as kept:
        for place, result in enumerate(examine_apart(todo, jobs=options.jobs, mends=options.mend), start=1):
            known[_key(result)] = result
            kept.write(json.dumps(result) + "\n")
            kept.flush()
            print(f"{place}/{len(todo)} {result['kind']} {result['type']}: {result['outcome']}", flush=True)
    everything = [known[_key(one)] for one in candidates(list(KINDS), []) if _key(one) in known]
    if options.mend:
        _show_mended(everything)
    else:
        options.table.write_text(render(everything, transformers.__version__), encoding="utf-8")
    broken = [one for one in everything if one["outcome"] == "broken"]
    for one in broken:
        print(f"BROKEN {one['kind']} {one['type']}: {one['reason']}", file=sys.stderr)
    return 1 if broken else 0


def _show_mended(results: list[dict[str, Any]]) -> None:
    """How many of what, and why not."""
    mended = [one for one in results if one["outcome"] == "mended"]
    print(f"{len(results)} classes, {len(mended)} with a cut to mend")
    for what in ("repair", "healing"):
        told = collections.Counter(one[what].partition(":")[0] for one in mended)
        print(f"{what}: " + ", ".join(f"{kind} {count}" for kind, count in told.most_common()))
        reasons = collections.Counter(one[what] for one in mended if one[what] != "passed")
        for reason, count in reasons.most_common():
            print(f"  {count:>4} {reason}")


def _key(result: dict[str, Any]) -> str:
    return f"{result['kind']} {result['type']}"


def _read(file: Path) -> dict[str, dict[str, Any]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return {_key(result): result for result in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(main())
