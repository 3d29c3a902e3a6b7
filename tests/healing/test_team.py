"""Two processes heal as one does: the same steps, the same weights in both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from tests.healing import worker


def start(folder: Path, size: int) -> None:
    """Runs the worker in so many processes and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    processes = []
    for rank in range(size):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
        environment |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        command = [sys.executable, str(Path(worker.__file__)), str(folder), str(size)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    endings = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert [code for _, code in endings] == [0] * size, endings


def test_two_processes_heal_as_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    worker.work(tmp_path / "one", 1)
    start(tmp_path / "two", 2)
    alone, first, second = (
        torch.load(tmp_path / file, weights_only=True) for file in ("one/0.pt", "two/0.pt", "two/1.pt")
    )
    assert first["validation"] == second["validation"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    torch.testing.assert_close(torch.tensor(first["validation"]), torch.tensor(alone["validation"]))
    for name, value in alone["state"].items():
        torch.testing.assert_close(first["state"][name], value, atol=2e-4, rtol=1e-3)
