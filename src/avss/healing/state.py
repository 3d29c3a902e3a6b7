"""What a killed run needs to go on: written whole or not at all, and found again only by the very same run."""

import dataclasses
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avss.models.load import Loaded, fingerprint

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A file for the state of one run.

    Attributes:
        path: The file. Its name holds the key, so that a run of other models, text or settings never meets it.
        seconds_between: Least time between two writes.
    """

    path: Path
    seconds_between: float = 300.0

    def write(self, state: Mapping[str, Any]) -> None:
        """Writes the state beside the file and renames it into place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            torch.save({"format": _FORMAT, **state}, partial)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """The state of the run that was interrupted; None where there is none that can be read."""
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
            # Damaged by something else than us: starting over is the cure.
            return None
        return state if isinstance(state, dict) and state.get("format") == _FORMAT else None

    @property
    def rows_path(self) -> Path:
        """Where what the dense model wrote for the run is kept beside it."""
        return self.path.with_suffix(".json")

    def remove(self) -> None:
        """Forgets the run, once its result is safe."""
        self.path.unlink(missing_ok=True)
        self.rows_path.unlink(missing_ok=True)


def run_key(dense: Loaded, smaller: Loaded, hashes: Mapping[str, Any]) -> str:
    """16 hex digits over both models, the text and the settings: same key, same run."""
    content = {"dense": fingerprint(dense.model), "smaller": fingerprint(smaller.model), **hashes}
    content["torch"] = torch.__version__
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def copy_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the values, in the machine's main memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in parameters.items()}
