"""Embeddings against plain loops."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from avss.config import TaskConfig
from avss.data.sources import read_texts
from avss.errors import DataError, TaskError
from avss.evaluation import evaluate_task, retention
from avss.evaluation.embedding import cosine, embed, encode_texts
from avss.evaluation.similarity import nearest
from avss.models.load import adopt
from tests.support.architectures import VOCAB, randomise, stored
from tests.support.tokenizers import word_tokenizer


def task(prose, **settings):
    return TaskConfig(**({"kind": "similarity", "data": prose, "batch_size": 4} | settings))


def plain_embeddings(loaded, prose, pooling="mean"):
    """One text at a time, so that nothing is padded."""
    vectors = []
    for text in read_texts(prose).paragraphs():
        with torch.no_grad():
            outputs = loaded.model.base_model(input_ids=torch.tensor([loaded.tokenizer(text)["input_ids"]]))
        hidden = outputs.last_hidden_state[0].double().numpy()
        vectors.append({"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling])
    return vectors


def plain_cosine(left, right):
    return sum(left * right) / (sum(left**2) * sum(right**2)) ** 0.5


def plain_nearest(vectors):
    found = []
    for index, one in enumerate(vectors):
        others = [(plain_cosine(one, other), -place) for place, other in enumerate(vectors) if place != index]
        found.append(-max(others)[1])
    return found


def test_a_body_may_end_in_another_width_than_its_blocks(prose):
    """Small OPT models project from and to embeddings narrower than their blocks."""
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, do_layer_norm_before=False, pad_token_id=0,
    )  # fmt: skip
    loaded = adopt(randomise(OPTForCausalLM(config)), word_tokenizer(adds="bos"))
    assert loaded.hidden_size == 32
    same, _ = evaluate_task([loaded, loaded], task(prose, batch_size=4))
    (vectors,) = embed([loaded], encode_texts([loaded], ["the cat", "a dog sees"]), batch_size=2)
    assert vectors.shape == (2, 16)
    assert same.measurements


@pytest.mark.parametrize("head", ["encoder", "masked", "classifier", "causal"])
@pytest.mark.parametrize("batch_size", [1, 9])
def test_matches_a_loop_without_batches(head, batch_size, prose, request, shorter):
    loaded = request.getfixturevalue(head)
    small = shorter(loaded, 1, 2)
    dense, other = evaluate_task([loaded, small], task(prose, batch_size=batch_size))
    p, q = plain_embeddings(loaded, prose), plain_embeddings(small, prose)
    cosines = [plain_cosine(left, right) for left, right in zip(p, q, strict=True)]
    agreement = [a == b for a, b in zip(plain_nearest(p), plain_nearest(q), strict=True)]
    assert other.samples["cosine"] == pytest.approx(cosines, abs=1e-5)
    assert other["cosine"].value == pytest.approx(np.mean(cosines), abs=1e-5)
    assert other["cosine"].stderr == pytest.approx(np.std(cosines, ddof=1) / 30**0.5, rel=1e-3)
    assert other["neighbour_agreement"].value == pytest.approx(np.mean(agreement))
    assert 0 < other["neighbour_agreement"].value < 1
    assert dense["cosine"].value == dense["neighbour_agreement"].value == 1
    assert dense["cosine"].num_samples == 30
    # They are comparisons with the dense model already.
    assert retention(dense, other) == ()


def test_an_identical_model_is_exactly_the_same(encoder, prose, shorter):
    _, same = evaluate_task([encoder, shorter(encoder)], task(prose))
    assert same.samples["cosine"].tolist() == [1.0] * 30
    assert same["neighbour_agreement"].value == 1


@pytest.mark.parametrize("style", ["switches", "name"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pooling_is_the_one_in_the_models_files(pooling, style, encoder, prose, tmp_path, shorter):
    switches = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
    config = {f"pooling_mode_{name}": key == pooling for key, name in switches.items()}
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config if style == "switches" else {"pooling_mode": pooling}))
    loaded = dataclasses.replace(encoder, companions=tmp_path)
    small = shorter(loaded, 1)
    p, q = plain_embeddings(loaded, prose, pooling), plain_embeddings(small, prose, pooling)
    expected = [plain_cosine(left, right) for left, right in zip(p, q, strict=True)]
    assert evaluate_task([loaded, small], task(prose))[1].samples["cosine"] == pytest.approx(expected, abs=1e-5)


def test_unknown_pooling_is_refused(encoder, prose, tmp_path, no_forward):
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    (folder / "config.json").write_text('{"pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": true}')
    with pytest.raises(
        TaskError, match=r"`1_Pooling/config.json` asks for the pooling `max \+ mean`. Allowed: mean, cls"
    ):
        evaluate_task([dataclasses.replace(encoder, companions=tmp_path)], task(prose))


def test_long_texts_are_cut(encoder, tmp_path):
    text = " ".join(["the cat sees a dog"] * 40)
    path = tmp_path / "long.txt"
    path.write_text(f"{text}\n\n{text} fish\n\nthe bird")
    result = evaluate_task([encoder, encoder], task(str(path)))[1]
    assert result["cosine"].value == 1


def test_gpt2_needs_no_padding_token(prose, causal, shorter):
    loaded = adopt(stored("gpt2"), causal.tokenizer)
    assert 0 < evaluate_task([loaded, shorter(loaded, 1)], task(prose))[1]["cosine"].value < 1


def test_a_zero_vector_has_no_direction():
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert cosine(zero, one).tolist() == cosine(zero, zero).tolist() == [0]
    assert nearest(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1]])).tolist() == [1, 2, 1]


def test_refuses_too_few_texts(encoder, tmp_path, prose, no_forward):
    path = tmp_path / "two.txt"
    path.write_text("the cat\n\na dog")
    with pytest.raises(DataError, match=r"`two.txt` gives 2 texts to compare. At least three"):
        evaluate_task([encoder], task(str(path)))
    with pytest.raises(DataError, match=r"`prose.txt` gives 2 texts"):
        evaluate_task([encoder], task(prose, limit=2))
    with pytest.raises(DataError, match="has no tokenizer"):
        evaluate_task([dataclasses.replace(encoder, tokenizer=None)], task(prose))
