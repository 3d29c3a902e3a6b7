"""`avss score --reference` against a transcription of the published script, on the same model, seed and file."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import avss
from avss.composer.reproducing import published_scores
from avss.errors import DataError, DegenerateStatisticError, UnsupportedArchitectureError
from avss.models.load import adopt
from avss.record import RunRecord
from avss.reporting.published_chart import published_chart
from tests.commands.test_bad_input import refused
from tests.support.architectures import ARCHITECTURES, stored
from tests.support.tokenizers import word_tokenizer

COLUMNS = ["Average_Variance", "Average_L1Norm", "Average_L2Norm", "Average_FrobeniusNorm", "Average_Sparsity"]
LENGTH = 24


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def published_script(load: Any, tokenizer: Any, file: Path, layers: Any, weights: Any, *, length: int = LENGTH) -> Any:
    """The published loop, step by step: its seed, its order of calls, its functions, in float32.

    Only two things are brought up to date: blocks return tensors now, so the hook takes the whole output, and data are
    read by pandas.

    Args:
        load: Loads the model.
        tokenizer: Its tokenizer.
        file: CSV with `sentence` and `label`.
        layers: From the model to its blocks.
        weights: From a block to the named linear layers.
        length: Tokens in a row.
    """
    set_seed(42)
    model = load()
    table = pd.read_csv(file)
    encoded = tokenizer(table["sentence"].tolist(), padding="max_length", truncation=True, max_length=length)
    rows = [
        {
            "input_ids": torch.tensor(encoded["input_ids"][row]),
            "attention_mask": torch.tensor(encoded["attention_mask"][row]),
            "label": torch.tensor(table["label"][row]),
        }
        for row in range(len(table))
    ]
    loader = DataLoader(rows, batch_size=8, shuffle=True)
    activations: dict[int, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(
            lambda _m, _i, output, name=index: activations.__setitem__(
                name, (output[0] if isinstance(output, tuple) else output).detach()
            )
        )
        for index, layer in enumerate(layers(model))
    ]
    logged: dict[int, list[list[float]]] = {index: [] for index in range(len(layers(model)))}
    order = []
    for batch in loader:
        order += batch["input_ids"].tolist()
        is_classifier = type(model).__name__.endswith("SequenceClassification")
        labels = batch["label"] if is_classifier else batch["input_ids"]
        outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        outputs.loss.backward()
        for index, layer in enumerate(layers(model)):
            hidden, named = activations[index], weights(layer)
            logged[index].append(
                [
                    hidden.mean(dim=1).var(dim=1).mean().item(),
                    sum(one.weight.grad.abs().sum().item() for one in named),
                    sum(one.weight.grad.pow(2).sum().sqrt().item() for one in named),
                    sum(torch.norm(one.weight.detach(), p="fro").item() for one in named),
                    (hidden.abs() < 1e-5).float().mean().item(),
                ]
            )
        model.zero_grad()
    for handle in handles:
        handle.remove()
    return [dict(zip(COLUMNS, np.mean(logged[index], axis=0), strict=True)) for index in logged], order


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    """Twenty-one labelled sentences: the last batch of eight is short."""
    from tests.support.tokenizers import WORDS

    draw = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("data") / "validation.csv"
    lines = [f"{' '.join(draw.choice(WORDS[9:], size=draw.integers(3, 30)))},{draw.integers(2)}" for _ in range(21)]
    path.write_text("\n".join(["sentence,label", *lines]) + "\n", encoding="utf-8")
    return path


def sparse(model: Any) -> Any:
    """Silences a few hidden units of every block's output, so that the published sparsity is not 0."""
    model = model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "output_layer_norm" in name:
                parameter[:3] = 0
            elif name.endswith(("down_proj.weight", "o_proj.weight")) or "embed_tokens" in name:
                parameter[:3] = 0 if parameter.shape[0] == 32 else parameter[:3]
                if "embed_tokens" in name:
                    parameter[:, :3] = 0
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A classifier, the same checkpoint without a head, and a language model, all DistilBERT or Llama."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name, source in (
        ("classifier", "distilbert-classifier"),
        ("headless", "distilbert-masked"),
        ("llama", "llama"),
    ):
        found[name] = root / name
        model = sparse(ARCHITECTURES[source]())
        if name == "classifier":
            model = transformers.DistilBertForSequenceClassification(
                transformers.DistilBertConfig(**{**model.config.to_diff_dict(), "num_labels": 2})
            ).eval()
            sparse(model)
        model.config.num_labels = 2
        model.save_pretrained(found[name])
        word_tokenizer(adds="cls").save_pretrained(found[name])
    return found


BLOCKS = {
    "ffn": lambda layer: [layer.ffn.lin1, layer.ffn.lin2],
    "attention": lambda layer: [getattr(layer.attention, f"{name}_lin") for name in ("q", "k", "v", "out")],
}
BLOCKS["all"] = lambda layer: [*BLOCKS["attention"](layer), *BLOCKS["ffn"](layer)]
LLAMA = {
    "ffn": lambda layer: [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj],
    "attention": lambda layer: [getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"],
}


def assert_equal(metrics: Any, expected: list[dict[str, float]]) -> None:
    for found, row in zip(metrics.rows(), expected, strict=True):
        for name, value in row.items():
            assert found[name] == pytest.approx(value, rel=1e-6), (found["Layer"], name)
    assert min(row["Average_L1Norm"] for row in expected) > 0
    assert min(row["Average_Sparsity"] for row in expected) > 0


@pytest.mark.parametrize("kind", ["ffn", "attention", "all"])
@pytest.mark.parametrize("name", ["classifier", "headless"])
def test_equals_the_published_script_on_distilbert(folders, sentences, name, kind):
    """`headless` has no classifier in its checkpoint: both draw the same one, and the same order after it."""

    def load() -> Any:
        # The class keeps quiet about the weights that it draws.
        transformers.utils.logging.set_verbosity_error()
        return transformers.AutoModelForSequenceClassification.from_pretrained(folders[name], num_labels=2)

    expected, order = published_script(
        load, word_tokenizer(adds="cls"), sentences, lambda model: model.distilbert.transformer.layer, BLOCKS[kind]
    )
    metrics = avss.reproduce(folders[name], sentences, weights=kind, seq_len=LENGTH)
    assert_equal(metrics, expected)
    assert metrics.model.architecture == "DistilBertForSequenceClassification"
    assert len(order) == metrics.data.num_sequences == 21
    assert metrics.data.content_hash == hash_of(order)


def hash_of(order: list[list[int]]) -> str:
    from avss.data.batches import content_hash

    return content_hash([torch.tensor(row) for row in order])


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_equals_the_published_script_on_a_decoder(folders, sentences, kind):
    expected, order = published_script(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]),
        word_tokenizer(adds="cls"),
        sentences,
        lambda model: model.model.layers,
        LLAMA[kind],
    )
    metrics = avss.reproduce(folders["llama"], sentences, weights=kind, seq_len=LENGTH)
    assert_equal(metrics, expected)
    assert metrics.data.content_hash == hash_of(order)
    assert any("padding included" in note for note in metrics.notes)


def test_the_callers_generator_and_model_are_left_alone(sentences):
    model = ARCHITECTURES["distilbert-classifier"]()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = avss.reproduce(model, sentences, tokenizer=word_tokenizer(adds="cls"), seq_len=LENGTH)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    torch.manual_seed(8)
    other = avss.reproduce(model, sentences, tokenizer=word_tokenizer(adds="cls"), seq_len=LENGTH)
    assert one == other


def test_a_decoder_that_classifies_learns_where_its_texts_end(sentences):
    model = ARCHITECTURES["gpt2-classifier"]()
    model.config.pad_token_id = None
    metrics = avss.reproduce(model, sentences, tokenizer=word_tokenizer(), seq_len=LENGTH)
    assert model.config.pad_token_id is None
    assert metrics.matrices == ("mlp.c_fc.weight", "mlp.c_proj.weight")
    assert min(metrics.l1_norm) > 0


def test_command_writes_the_published_table_and_figure(avss_command, folders, sentences, tmp_path):
    out = tmp_path / "reference"
    small = ("--seq-len", LENGTH, "--samples", 16)
    answer = avss_command("score", folders["headless"], "--data", sentences, "--reference", "--out", out, *small)
    assert answer.code == 0, answer.err
    assert "Average_FrobeniusNorm" in answer.out
    assert "The attention mask is passed, as in the SST-2 script" in answer.out
    with (out / "published.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Layer", *COLUMNS]
    record = RunRecord.read(out)
    assert [float(row["Average_L1Norm"]) for row in rows] == list(record.published.l1_norm)
    assert record.scores[0].criterion == "avss-reference"
    assert (out / "figures" / "published.png").read_bytes().startswith(b"\x89PNG")
    drawing = (out / "figures" / "published.svg").read_text()
    for words in ("Activation Variance per Layer", "L1 Norm per Layer", "Frobenius Norm per Layer", "Sparsity"):
        assert words in drawing
    # What it writes is what the second step reads.
    chosen = avss.from_csv(out / "published.csv", reference=True)
    assert [row.avss for row in chosen.rows] == pytest.approx(sorted(record.scores[0].values))
    assert avss_command("report", out).code == 0
    shown = json.loads(
        avss_command("score", folders["llama"], "--data", sentences, "--reference", "--json", *small).out
    )
    assert shown["weights"] == "ffn"
    assert shown["data"]["seed"] == 42


def test_the_figure_has_five_panels_in_two_columns(folders, sentences):
    metrics = avss.reproduce(folders["llama"], sentences, seq_len=LENGTH, samples=4)
    chart = published_chart(metrics).to_dict()
    assert chart["columns"] == 2
    assert [panel["title"]["text"] for panel in chart["concat"]] == [
        "Activation Variance per Layer",
        "L1 Norm per Layer",
        "L2 Norm per Layer",
        "Frobenius Norm per Layer",
        "Activation Sparsity per Layer",
    ]
    assert [row["value"] for row in chart["concat"][1]["data"]["values"]] == list(metrics.l1_norm)


def test_no_activation_near_zero_is_said_and_gives_no_score(sentences, tmp_path):
    metrics = avss.reproduce(
        adopt(stored("bert-classifier"), word_tokenizer(adds="cls")), sentences, seq_len=LENGTH, samples=8
    )
    assert 0 in metrics.sparsity
    assert published_scores(metrics) is None
    assert any("divides by 0" in note for note in metrics.notes)
    avss.composer.write_reproduction(metrics, tmp_path / "out", command="test")
    assert RunRecord.read(tmp_path / "out").scores == ()


def test_what_cannot_be_reproduced_is_refused(sentences, text_file):
    cls = word_tokenizer(adds="cls")
    with pytest.raises(UnsupportedArchitectureError, match=r"bare encoder.*--head classifier"):
        avss.reproduce(stored("bert"), sentences, tokenizer=cls, seq_len=LENGTH)
    with pytest.raises(DataError, match="has no labels"):
        avss.reproduce(stored("bert-classifier"), text_file, tokenizer=cls, seq_len=LENGTH)
    broken = ARCHITECTURES["llama"]()
    broken.model.layers[2].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(DegenerateStatisticError, match="is nan"):
        avss.reproduce(broken, sentences, tokenizer=cls, seq_len=LENGTH, samples=2)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--reference", "--weights", "fnn"), ("`fnn`", "Did you mean `ffn`")),
        (("--weights", "ffn"), ("--reference",)),
        (("--reference", "--criteria", "avss"), ("--criteria",)),
        (("--reference", "--first-token", "drop"), ("--first-token",)),
        (("--reference", "--samples", 0), ("samples", "0")),
        (("--reference", "--seq-len", 9999), ("9999", "takes")),
        (("--reference", "--seq-len", 1), ("seq-len",)),
        (("--reference", "--batch-size", 0), ("batch-size",)),
        (("--reference", "--head", "encoder"), ("no loss",)),
        (("--reference", "--sites", "all"), ("`--sites all`", "`--reference`")),
        (("--reference", "--fraction", 0.5), ("`--fraction 0.5`", "`--reference`")),
    ],
)
def test_bad_settings_are_refused(avss_command, classifier_folder, review_file, arguments, parts):
    small = () if "--seq-len" in arguments else ("--seq-len", LENGTH)
    answer = avss_command("score", classifier_folder, "--data", review_file, "--quiet", *small, *arguments)
    refused(answer, *parts)
