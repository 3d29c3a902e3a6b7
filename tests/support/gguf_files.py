"""Small GGUF files, written by the gguf library: a quantised Llama that transformers loads, and variants."""

import string
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCAB, WIDTH, HIDDEN, HEADS, GROUPS = 96, 32, 64, 4, 2
"""Sizes that divide into quantisation blocks of 32."""


def block_tensors(draw: np.random.Generator) -> dict[str, np.ndarray]:
    """The tensors of one Llama block, by the end of their names."""
    narrow = WIDTH // HEADS * GROUPS
    shapes = {
        "attn_q.weight": (WIDTH, WIDTH),
        "attn_k.weight": (narrow, WIDTH),
        "attn_v.weight": (narrow, WIDTH),
        "attn_output.weight": (WIDTH, WIDTH),
        "ffn_gate.weight": (HIDDEN, WIDTH),
        "ffn_up.weight": (HIDDEN, WIDTH),
        "ffn_down.weight": (WIDTH, HIDDEN),
        "attn_norm.weight": (WIDTH,),
        "ffn_norm.weight": (WIDTH,),
    }
    return {
        name: (1 + 0.2 * draw.standard_normal(shape) if len(shape) == 1 else 0.3 * draw.standard_normal(shape)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    num_blocks: int = 5,
    quantised: str = "Q8_0",
    metadata: dict[str, Any] | None = None,
    general: dict[str, Any] | None = None,
    without_block: int | None = None,
    alignment: int | None = None,
) -> Path:
    """Writes a file; `metadata` are further values of the architecture, whose type is told by the value."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch=architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    sizes: dict[str, Any] = {
        "block_count": num_blocks,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS,
        "rope.dimension_count": WIDTH // HEADS,
        "vocab_size": VOCAB,
    }
    for name, value in (sizes | (metadata or {})).items():
        add(writer, f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    writer.add_name("tiny")
    writer.add_file_type(7)
    for name, value in (general or {}).items():
        add(writer, name, value)
    words = ["<unk>", "<s>", "</s>", "Ġ", *string.ascii_letters, *string.digits, "th", "in"]
    words += [f"<{number}>" for number in range(VOCAB - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, *[1] * (VOCAB - 3)])
    writer.add_token_merges(["t h", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    table = (0.5 * draw.standard_normal((VOCAB, WIDTH))).astype(np.float32)
    tensors = {"token_embd.weight": table, "output_norm.weight": np.ones(WIDTH, dtype=np.float32)}
    tensors["output.weight"] = (0.5 * draw.standard_normal((VOCAB, WIDTH))).astype(np.float32)
    for block in range(num_blocks):
        inside = block_tensors(draw)
        if block != without_block:
            tensors |= {f"blk.{block}.{name}": tensor for name, tensor in inside.items()}
    kind = gguf.GGMLQuantizationType[quantised]
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a value as the type that converters give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
