"""A model cut on disk and in memory, and what both must have in common."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from avss.composer.disk import prune_on_disk
from avss.config import PlanConfig
from avss.cut import cut
from avss.models.load import load_model, save_model
from avss.record import Plan

NOTHING_RUN = 1
"""Bytes of memory: too few to run any model, so that only names, shapes and bytes are checked."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def both_ways(folder: Path, tmp_path: Path, removed: tuple[int, ...]) -> tuple[Path, Path]:
    """The folder cut on disk and cut in memory."""
    on_disk, in_memory = tmp_path / "disk", tmp_path / "memory"
    blocks = ",".join(map(str, removed))
    prune_on_disk(str(folder), PlanConfig(blocks=blocks), out=on_disk, max_memory=NOTHING_RUN)
    loaded = load_model(folder, device="cpu")
    plan = Plan(num_blocks=len(loaded.stack), removed=removed, method="explicit", rule="by hand")
    save_model(cut(loaded, plan), in_memory)
    return on_disk, in_memory


def same(on_disk: Path, in_memory: Path) -> None:
    one, two = weights(on_disk), weights(in_memory)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name
    assert json.loads((on_disk / "config.json").read_text()) == json.loads((in_memory / "config.json").read_text())
