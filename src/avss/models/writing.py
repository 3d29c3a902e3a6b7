"""Sentences for prompts, written by the model that will be asked: what a text of another kind has none of.

Shown the form of a prompt, dots where a sentence belongs, with an answer drawn, the model continues with another one of
the same kind: `Review: ...`, `Sentiment: negative`, a blank line, `Review:`. What it writes there is closer to what it
will be asked than sentences of an article are, and needs no data. Its sense matters little, since it is never taught:
the dense model says what is right behind it (as LLM-QAT does for quantisation: Liu et al., 2023, arXiv 2305.17888).
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from avss.forms import Form, Rows, is_fit
from avss.models.load import Loaded, has_bfloat16
from avss.models.shell import with_narrow_maps

NUM_WRITTEN = 512
"""Prompts of each form, where no number is asked for."""
BATCH = 64
"""Prompts written side by side."""
NUM_TOKENS = 40
"""Of a sentence, at most."""
TEMPERATURE, TOP_K = 0.9, 50
"""Of the draws. At a temperature of one, a small model often leaves the subject."""
_TRIES = 4
"""Prompts written for each one wanted, at most: some are too short, or no sentence."""


def can_write(loaded: Loaded) -> bool:
    """Whether a model continues text, and has a tokenizer that knows where a text ends."""
    ends = loaded.tokenizer is not None and loaded.tokenizer.eos_token_id is not None
    return loaded.head == "causal" and ends and bool(loaded.model.can_generate())


@torch.no_grad()
def write_rows(
    loaded: Loaded,
    wanted: Mapping[str, int],
    *,
    seed: int,
    may_go_on: Callable[[], bool] = lambda: True,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Sentences for each form.

    Args:
        loaded: Writes; see `can_write`.
        wanted: Form (`avss.forms.Form`) -> prompts of it, at most.
        seed: Of the draws.
        may_go_on: Asked before each batch but the first of each form.
        on_step: Called with (prompts written, prompts wanted).

    Returns:
        As many as there was time for; a form that the model wrote nothing fit for is missing.
    """
    draw = np.random.default_rng(seed)
    found: dict[str, list[tuple[str, ...]]] = {form: [] for form in wanted}
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _padding_left(loaded.tokenizer), _fast(loaded) as loaded:
        torch.manual_seed(seed)
        sizes = {form: min(BATCH, count) for form, count in wanted.items() if count}
        for turn in range(max((-(-_TRIES * wanted[form] // size) for form, size in sizes.items()), default=0)):
            for name, size in sizes.items():
                count = wanted[name]
                if len(found[name]) >= count or turn * size >= _TRIES * count or (turn and not may_go_on()):
                    continue
                rows = _write(loaded, Form.parse(name), size, draw)
                found[name] = [*found[name], *rows][:count]
                on_step(sum(map(len, found.values())), sum(wanted.values()))
    return {name: tuple(dict.fromkeys(rows)) for name, rows in found.items() if rows}


def keep_rows(rows: Rows, path: Path) -> None:
    """Keeps what was written, whole or not at all: it is not written anew by a run that goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(rows), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_rows(path: Path) -> dict[str, tuple[tuple[str, ...], ...]] | None:
    """The same, of the run that was interrupted; None where there is nothing that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {form: tuple(tuple(row) for row in rows) for form, rows in found.items()}
    except (OSError, ValueError, AttributeError):
        return None


def _write(loaded: Loaded, form: Form, count: int, draw: np.random.Generator) -> list[tuple[str, ...]]:
    """A batch of prompts, sentence by sentence; those of them whose sentences are all fit."""
    texts = [f"{form.shown(draw)}\n\n" for _ in range(count)]
    sentences: list[list[str]] = [[] for _ in range(count)]
    for part in form.parts:
        if isinstance(part, str):
            texts = [text + part for text in texts]
        elif part:
            break  # nothing behind an answer is the model's to write
        else:
            # A blank belongs to the word behind it.
            new = _lines(loaded, [text.rstrip(" ") for text in texts])
            texts = [f"{text.rstrip(' ')} {line}" for text, line in zip(texts, new, strict=True)]
            for row, line in zip(sentences, new, strict=True):
                row.append(line)
    whole = [tuple(row) for row in sentences if len(row) == form.num_sentences]
    # An answer may be one word.
    return [row for row in whole if is_fit(row[0]) and all(is_fit(sentence, least=1) for sentence in row[1:])]


def _lines(loaded: Loaded, texts: Sequence[str]) -> list[str]:
    """What the model writes behind each text, up to the end of the line."""
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    encoded = tokenizer(list(texts), return_tensors="pt", padding=True, verbose=False)
    token_ids, keep = encoded["input_ids"].to(loaded.device), encoded["attention_mask"].to(loaded.device)
    if bool((token_ids[:, -1] == tokenizer.eos_token_id).all()):  # this tokenizer ends every text, and none ends here
        token_ids, keep = token_ids[:, :-1], keep[:, :-1]
    model: Any = loaded.model
    written = model.generate(
        input_ids=token_ids,
        attention_mask=keep,
        generation_config=GenerationConfig(
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            top_p=1.0,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=loaded.pad_id if loaded.pad_id is not None else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
    )
    special = set(tokenizer.all_special_ids)
    lines = []
    for row in written[:, token_ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in special), len(row))
        text = str(tokenizer.decode(row[:end], clean_up_tokenization_spaces=False)).strip("\ufffd").strip()
        lines.append(text.partition("\n")[0].strip())
    return lines


@contextlib.contextmanager
def _fast(loaded: Loaded) -> Iterator[Loaded]:
    """The model in the precision that the machine is fast in: no word of it is a measurement."""
    if not has_bfloat16(loaded.device):
        yield loaded
        return
    narrow: Any = with_narrow_maps(loaded.model, torch.bfloat16, lambda _: True)
    with torch.autocast(loaded.device.type, dtype=torch.bfloat16):
        yield dataclasses.replace(loaded, model=narrow)


@contextlib.contextmanager
def _padding_left(tokenizer: PreTrainedTokenizerBase | None) -> Iterator[None]:
    """Texts of several lengths end side by side, so that all go on from there."""
    assert tokenizer is not None
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if pad is None:
            tokenizer.pad_token = None
