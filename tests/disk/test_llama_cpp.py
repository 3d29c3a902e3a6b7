"""The pruned GGUF file runs in llama.cpp, and says what the pruned model says in transformers.

Optional: `pip install llama-cpp-python` compiles for minutes. It may live in another environment, whose interpreter
`AVSS_LLAMA_CPP_PYTHON` names. `pytest -m slow -s tests/disk/test_llama_cpp.py` prints the figures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from avss.composer.gguf_pruning import prune_gguf
from avss.config import PlanConfig
from avss.data.batches import make_batches
from avss.data.sources import read_texts
from avss.models.forward import run_outputs
from avss.models.load import Loaded, load_model
from avss.models.stack import bypassed

pytestmark = [pytest.mark.slow, pytest.mark.real]

BLOCKS = "3,12-15,17,25-26"
PYTHON = os.environ.get("AVSS_LLAMA_CPP_PYTHON", sys.executable)

SCRIPT = """
import json, sys
import llama_cpp, numpy as np
path, rows, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = llama_cpp.Llama(path, n_ctx=512, logits_all=True, n_threads=1, verbose=False)
logits = []
for row in rows:
    model.reset()
    model.eval(row)
    logits.append(np.array(model.scores[: len(row)], dtype=np.float32))
np.save(out, np.stack(logits))
print(model.create_completion("The capital of France is", max_tokens=16, temperature=0)["choices"][0]["text"])
"""


@pytest.fixture(scope="module")
def llama_cpp() -> str:
    """An interpreter that has llama.cpp."""
    code = "import llama_cpp; print(llama_cpp.__version__)"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("llama-cpp-python is not installed")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def pruned(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct without eight blocks, as a GGUF file."""
    out = tmp_path_factory.mktemp("gguf") / "out"
    prune_gguf(smollm2_file, PlanConfig(blocks=BLOCKS), out=out, max_memory=1)
    return out / "model.gguf"


def in_llama_cpp(file: Path, rows: list[list[int]], folder: Path) -> tuple[np.ndarray, str]:
    """Logits `[rows, T, V]` and a greedy continuation."""
    out = folder / f"{file.stem}.npy"
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", SCRIPT, str(file), json.dumps(rows), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.load(out), done.stdout


def agreement(one: torch.Tensor, other: np.ndarray) -> dict[str, float]:
    """How far two sets of logits are apart: differences of log-probabilities, same best token, KL in nats."""
    left = torch.log_softmax(one.double(), dim=-1)
    right = torch.log_softmax(torch.from_numpy(other).double(), dim=-1)
    difference = (left - right).abs()
    return {
        "max": float(difference.max()),
        "mean": float(difference.mean()),
        "top1": float((left.argmax(-1) == right.argmax(-1)).double().mean()),
        "kl": float((left.exp() * (left - right)).sum(-1).mean()),
    }


def test_the_pruned_file_says_in_llama_cpp_what_it_says_in_transformers(llama_cpp, pruned, smollm2_file, tmp_path):
    dense: Loaded = load_model(smollm2_file, device="cpu")
    plan_removed = (3, 12, 13, 14, 15, 17, 25, 26)
    batches = make_batches(
        read_texts("builtin:evaluation"), dense.tokenizer, layout="packed", samples=4, seq_len=256, batch_size=4, seed=0
    )
    token_ids, keep = next(iter(batches))
    rows = token_ids.tolist()
    expected = {"dense": run_outputs(dense, token_ids, keep)}
    with bypassed(dense.stack, plan_removed):
        expected["pruned"] = run_outputs(dense, token_ids, keep)
    figures = {}
    for name, file in (("dense", smollm2_file), ("pruned", pruned)):
        logits, text = in_llama_cpp(file, rows, tmp_path)
        figures[name] = agreement(expected[name], logits)
        print(f"\nllama-cpp-python {llama_cpp}, {name}, {token_ids.numel()} tokens: {figures[name]}; writes {text!r}")
        assert text.strip()
    crossed = agreement(expected["pruned"], logits * 0 + np.asarray(expected["dense"], dtype=np.float32))
    print(f"dense against pruned, both in transformers: {crossed}")
    # The dense file shows what llama.cpp's own arithmetic (activations in eight bits) does; the cut may add little.
    assert figures["pruned"]["kl"] < max(0.02, 5 * figures["dense"]["kl"])
    assert figures["pruned"]["top1"] > 0.9
    assert crossed["kl"] > 20 * figures["pruned"]["kl"]  # another model would be noticed
