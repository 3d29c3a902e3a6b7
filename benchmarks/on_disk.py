"""What does a cut on disk cost? Peak memory of the fresh processes it runs in, and time against `cp` of the same files.

A Llama checkpoint of random bfloat16 bytes is made in a temporary folder and removed at the end. Each round copies it
and cuts it, in turn, so that the state of the disk hits both alike; both are followed by a `sync` that counts.

    python benchmarks/on_disk.py [--gigabytes 2] [--rounds 3] [--folder DIR]

Memory is sampled every 20 ms. `resident` is what the kernel maps for a process, shared libraries included; `own` is
what would be freed if it ended. The command runs two processes: one that cuts, and one that reads the architecture
with torch and transformers and ends before a weight is copied. The table shows each, and the most that both together
held at one moment.
"""

import argparse
import json
import os
import shutil
import statistics as st
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

HIDDEN, BETWEEN, VOCAB = 2048, 5504, 32000
MEGABYTE = 1_000_000


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes config, shards and index; returns the number of blocks."""
    block = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (BETWEEN, HIDDEN),
        "mlp.up_proj.weight": (BETWEEN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, BETWEEN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    ends = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    size = 2 * sum(int(np.prod(shape)) for shape in block.values())
    num_blocks = max(4, round((gigabytes * 1e9 - 2 * sum(int(np.prod(shape)) for shape in ends.values())) / size))
    shapes = {f"model.layers.{index}.{name}": shape for index in range(num_blocks) for name, shape in block.items()}
    shapes |= ends
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": BETWEEN,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": num_blocks,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names, groups = list(shapes), 4
    files = {f"model-{n + 1:05d}-of-{groups:05d}.safetensors": names[n::groups] for n in range(groups)}
    draw = np.random.default_rng(0)
    for file, members in files.items():
        entries, offset = {}, 0
        for name in members:
            count = 2 * int(np.prod(shapes[name]))
            entries[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + count]}
            offset += count
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            for name in members:
                out.write(draw.bytes(2 * int(np.prod(shapes[name]))))
    index = {"metadata": {}, "weight_map": {name: file for file, members in files.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_blocks


def clock(command: list[str]) -> float:
    """Seconds that a command takes until its output is on the disk."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the command failed: {done.stderr}")
    os.sync()
    return time.perf_counter() - start


def watch(command: list[str]) -> dict[str, tuple[float, float]]:
    """Runs a command; peak (resident, own) MB of its process, of its children, and of all at one moment."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    peak = {"cuts": (0.0, 0.0), "reads the architecture": (0.0, 0.0), "together": (0.0, 0.0)}
    while process.poll() is None:
        total = [0.0, 0.0]
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.Error:
            continue
        for one in family:
            try:
                memory = one.memory_full_info()
            except psutil.Error:
                continue
            found = memory.rss / MEGABYTE, memory.uss / MEGABYTE
            place = "cuts" if one.pid == root.pid else "reads the architecture"
            peak[place] = (max(peak[place][0], found[0]), max(peak[place][1], found[1]))
            total = [total[0] + found[0], total[1] + found[1]]
        peak["together"] = (max(peak["together"][0], total[0]), max(peak["together"][1], total[1]))
        time.sleep(0.02)
    if process.returncode:
        sys.exit("the command failed")
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to make the checkpoint; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        root = Path(place)
        (root / "model").mkdir()
        num_blocks = make_checkpoint(root / "model", options.gigabytes)
        num_bytes = sum(path.stat().st_size for path in (root / "model").iterdir())
        removed = ",".join(str(block) for block in range(1, num_blocks, 4))
        cut = [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'avss'; from avss.cli.main import main; main()",
            "prune",
        ]
        cut += [str(root / "model"), "--blocks", removed, "--on-disk", "--max-memory", "500MB", "--quiet"]
        print(
            f"{num_bytes / 1e9:.2f} GB, {num_blocks} blocks, without blocks {removed}; {options.rounds} rounds",
            flush=True,
        )
        copies, commands, stages = [], [], []
        for _ in range(options.rounds):
            copies.append(clock(["cp", "-r", str(root / "model"), str(root / "copy")]))
            shutil.rmtree(root / "copy")
            commands.append(clock([*cut, "--out", str(root / "out")]))
            record = json.loads((root / "out" / "record.json").read_text())
            stages.append(record["seconds"])
            written = sum(path.stat().st_size for path in (root / "out").glob("*.safetensors"))
            shutil.rmtree(root / "out")
        # In a run of its own: watching memory takes time.
        peak = watch([*cut, "--out", str(root / "out")])
    print(f"{'':<44}{'seconds':>9}{'x cp':>8}{'min':>8}{'max':>8}")
    rows = {
        f"cp of the whole checkpoint ({num_bytes / 1e9:.2f} GB)": copies,
        f"copying and checking ({written / 1e9:.2f} GB)": [
            stage["Copying the weights"] + stage["Verifying it"] for stage in stages
        ],
        "reading the architecture": [stage["Reading the architecture"] for stage in stages],
        "the whole command": commands,
    }
    for name, seconds in rows.items():
        ratios = [one / other for one, other in zip(seconds, copies, strict=True)]
        print(f"{name:<44}{st.median(seconds):9.2f}{st.median(ratios):8.2f}{min(seconds):8.2f}{max(seconds):8.2f}")
    print(f"\n{'peak memory of the process that':<44}{'resident MB':>12}{'own MB':>9}")
    for name, (resident, own) in peak.items():
        print(f"{name:<44}{resident:12.0f}{own:9.0f}")


if __name__ == "__main__":
    main()
