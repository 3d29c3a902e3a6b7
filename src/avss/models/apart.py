"""Asks about a model without its weights: by its files where these tell all, else by its class.

The class is asked in a process of its own (`avss.models.outline`), so that this one needs no torch and gets its memory
back.
"""

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from avss import errors
from avss.errors import AvssError
from avss.models.known import HEAD, answer, find_known

Ask = Callable[..., Any]
"""Called with what to ask and its arguments, all plain values; see `avss.models.known.answer`."""

_SERVE = "import json, sys; from avss.models.outline import serve; serve(**json.loads(sys.argv[1]))"


@contextlib.contextmanager
def empty_model(source: str, *, head: str = "auto", trust_remote_code: bool = False) -> Iterator[Ask]:
    """Opens a model folder without its weights; what is yielded asks about it.

    A model of a known type is read here (`avss.models.known`). Else a process of its own answers, and ends with the
    context; in one that has imported torch already, that would save nothing, and the answers are computed here.

    Raises:
        UserError: Whatever the question raises there is raised here.
        RuntimeError: The other process died; the message holds its last words.
    """
    settings = {"source": source, "head": head, "trust_remote_code": trust_remote_code}
    known = find_known(Path(source)) if head in ("auto", HEAD) else None
    if known is not None:
        yield lambda what, **arguments: answer(known, {"what": what, **arguments})
        return
    if "torch" in sys.modules:
        outline = importlib.import_module("avss.models.outline")
        model = outline.EmptyModel(**settings)
        yield lambda what, **arguments: answer(model, {"what": what, **arguments})
        return
    # -P: a file in the working directory must not stand in for a module.
    command = [sys.executable, "-P", "-W", "ignore", "-c", _SERVE, json.dumps(settings)]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, encoding="utf-8")
        try:
            yield lambda what, **arguments: _ask(process, said, {"what": what, **arguments})
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.communicate()  # closes its input, at which it ends


def _ask(process: "subprocess.Popen[str]", said: IO[str], question: dict[str, Any]) -> Any:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    line = ""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    if not line:
        process.wait()
        said.seek(0)
        raise RuntimeError(f"the process that reads the model's config ended: {said.read().strip()[-2000:]}")
    reply = json.loads(line)
    if "error" in reply:
        kind: type[AvssError] = getattr(errors, reply["error"])
        raise kind(reply["message"])
    return reply["answer"]
