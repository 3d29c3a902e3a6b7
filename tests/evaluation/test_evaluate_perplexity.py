"""Perplexity, loss and divergence against plain loops; what must not change them; what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avss.config import TaskConfig
from avss.data.batches import masked_places
from avss.data.sources import read_texts
from avss.errors import DataError, TaskError
from avss.evaluation import evaluate_task, perplexity, retention
from avss.evaluation.base import draw
from avss.evaluation.probes import divergence
from avss.models import predictions


def task(prose, **settings):
    return TaskConfig(**({"kind": "perplexity", "data": prose, "seq_len": 16, "batch_size": 4} | settings))


def plain_windows(loaded, prose, seq_len):
    """The protocol in the plainest words: BOS and the next 15 tokens, again and again, while they last."""
    ids = loaded.tokenizer(Path(prose).read_text(), add_special_tokens=False)["input_ids"]
    bos, body = loaded.tokenizer.bos_token_id, seq_len - 1
    return [torch.tensor([[bos, *ids[at : at + body]]]) for at in range(0, len(ids), body) if at + body <= len(ids)]


def logits_of(loaded, window):
    with torch.no_grad():
        return loaded.model(input_ids=window).logits[0]


def test_matches_a_plain_loop_over_windows(causal, prose):
    result = evaluate_task([causal], task(prose))[0]
    losses = []
    for window in plain_windows(causal, prose, 16):
        losses.append(F.cross_entropy(logits_of(causal, window)[:-1], window[0, 1:]).item())
    loss, error = np.mean(losses), np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert len(losses) > 20
    assert result["loss"].value == pytest.approx(loss, abs=1e-6)
    assert result["loss"].stderr == pytest.approx(error, rel=1e-5)
    assert result["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-6)
    assert result["perplexity"].stderr == pytest.approx(math.exp(loss) * error, rel=1e-5)
    assert result["loss"].num_samples == result["perplexity"].num_samples == len(losses)
    assert result.samples["loss"] == pytest.approx(losses, abs=1e-5)
    assert [m.metric for m in result.measurements] == ["perplexity", "loss"]
    assert (result["loss"].unit, result["perplexity"].unit) == ("nats", "")
    assert (result["loss"].task, result["loss"].source) == ("perplexity:prose", "prose.txt")


def test_divergence_and_agreement_match_explicit_softmax(causal, prose, shorter):
    small = shorter(causal, 1, 3)
    dense, other = evaluate_task([causal, small], task(prose))
    divergences, agreements = [], []
    for window in plain_windows(causal, prose, 16):
        p, q = (torch.softmax(logits_of(model, window)[:-1].double(), -1) for model in (causal, small))
        divergences.append((p * (p / q).log()).sum(-1).mean().item())
        agreements.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert other["kl"].value == pytest.approx(np.mean(divergences), rel=1e-4)
    assert other["kl"].stderr == pytest.approx(np.std(divergences, ddof=1) / math.sqrt(len(divergences)), rel=1e-4)
    assert other["top1_agreement"].value == pytest.approx(np.mean(agreements), abs=1e-12)
    assert other["kl"].value > 0.01
    assert [m.metric for m in dense.measurements] == ["perplexity", "loss"]


@pytest.mark.parametrize("head", ["causal", "masked"])
def test_batch_size_and_chunks_do_not_matter(head, prose, request, monkeypatch, shorter):
    loaded = request.getfixturevalue(head)
    models = [loaded, shorter(loaded, 1)]
    expected = evaluate_task(models, task(prose, batch_size=1))
    monkeypatch.setattr(predictions, "_VALUES_AT_ONCE", 99 * 3)
    for before, after in zip(expected, evaluate_task(models, task(prose, batch_size=7)), strict=True):
        for metric, values in before.samples.items():
            assert after.samples[metric] == pytest.approx(values, abs=2e-5), metric


def test_order_of_the_smaller_models_does_not_matter(causal, prose, shorter):
    one, two = shorter(causal, 1), shorter(causal, 2, 4)
    first = evaluate_task([causal, one, two], task(prose))
    second = evaluate_task([causal, two, one], task(prose))
    assert first[1].measurements == second[2].measurements
    assert first[2].measurements == second[1].measurements


@pytest.mark.parametrize("head", ["causal", "masked"])
def test_an_identical_model_keeps_exactly_everything(head, prose, request, shorter):
    loaded = request.getfixturevalue(head)
    dense, same = evaluate_task([loaded, shorter(loaded)], task(prose))
    assert same["kl"].value == 0
    assert same["top1_agreement"].value == 1
    entries = retention(dense, same)
    assert [entry.metric for entry in entries] == [m.metric for m in dense.measurements]
    for entry in entries:
        assert (entry.ratio, entry.ratio_stderr, entry.kept) == (1, 0, 1)


def test_limit_is_a_seeded_draw_in_order(causal, prose):
    everything = evaluate_task([causal], task(prose))[0].samples["loss"]
    for seed in (0, 1):
        drawn = evaluate_task([causal], task(prose, limit=5, seed=seed))[0]
        assert drawn.samples["loss"] == pytest.approx(everything[draw(len(everything), 5, seed)], abs=1e-5)
        assert drawn["loss"].num_samples == 5
    assert draw(100, 5, 0) != draw(100, 5, 1)


def test_a_single_window_has_no_standard_error(causal, prose):
    result = evaluate_task([causal], task(prose, limit=1))[0]
    assert result["loss"].stderr is None
    assert result["perplexity"].stderr is None


def test_windows_are_lowered_to_what_the_model_takes(causal, prose):
    lowered = evaluate_task([causal], task(prose, seq_len=4096))[0]
    assert lowered.measurements == evaluate_task([causal], task(prose, seq_len=causal.max_len))[0].measurements


def test_rows_of_a_running_text_are_joined_as_they_are(causal, tmp_path, monkeypatch):
    """The protocol of WikiText: its blank rows are lines of the text."""
    rows = ["", " the cat", "", "", "sees a dog", ""]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    seen = []
    real = perplexity.windows
    monkeypatch.setattr(perplexity, "windows", lambda *given: (seen.append(given[1]), real(*given))[1])
    evaluate_task([causal], task(str(table), seq_len=4))
    assert seen == ["\n\n".join(rows)]
    assert read_texts(str(table)).texts == (" the cat", "sees a dog")


def test_a_column_can_be_named(causal, tmp_path, prose):
    table = tmp_path / "rows.csv"
    table.write_text("id,text,body\n1,the,the cat sees a dog\n2,a,the dog sees a cat\n")
    ids = causal.tokenizer("the cat sees a dog\n\nthe dog sees a cat")["input_ids"]
    result = evaluate_task([causal], task(str(table), text_column="body", seq_len=len(ids)))[0]
    window = torch.tensor([ids])
    expected = F.cross_entropy(logits_of(causal, window)[:-1], window[0, 1:]).item()
    assert result["loss"].value == pytest.approx(expected, abs=1e-6)


def test_progress_reaches_its_end(causal, prose, shorter):
    seen = []
    evaluate_task([causal, shorter(causal, 1)], task(prose, limit=6), on_step=lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- masked ---


def test_masked_loss_matches_a_plain_loop(masked, prose, shorter):
    small = shorter(masked, 2)
    tokenizer = masked.tokenizer
    results = evaluate_task([masked, small], task(prose, seed=3))
    ids = tokenizer(Path(prose).read_text(), add_special_tokens=False)["input_ids"]
    losses, divergences = [], []
    for index, at in enumerate(range(0, len(ids) - 13, 14)):
        whole = torch.tensor([tokenizer.cls_token_id, *ids[at : at + 14], tokenizer.sep_token_id])
        places = masked_places(whole, tokenizer.all_special_ids, (3, index))
        seen = whole.clone()
        seen[places] = tokenizer.mask_token_id
        logits = [logits_of(model, seen[None])[places] for model in (masked, small)]
        losses.append(F.cross_entropy(logits[0], whole[places]).item())
        p, q = (torch.softmax(one.double(), -1) for one in logits)
        divergences.append((p * (p / q).log()).sum(-1).mean().item())
    assert results[0].samples["masked_loss"] == pytest.approx(losses, abs=1e-5)
    assert results[0]["masked_perplexity"].value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert results[1]["kl"].value == pytest.approx(np.mean(divergences), rel=1e-4)


def test_masks_are_seeded_and_leave_special_tokens_alone(masked):
    tokenizer = masked.tokenizer
    ids = torch.tensor([4, 9, 6, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 5])
    special = {0, 2, 22}  # [CLS], an unknown word, [SEP]
    drawn = [masked_places(ids, tokenizer.all_special_ids, (0, window)).tolist() for window in range(200)]
    assert all(places == sorted(set(places)) and len(places) == 3 for places in drawn)  # 15 % of 20
    assert not special & {place for places in drawn for place in places}
    assert {place for places in drawn for place in places} == set(range(23)) - special
    assert drawn[7] == masked_places(ids, tokenizer.all_special_ids, (0, 7)).tolist()


# --- corners ---


def test_a_token_that_the_dense_model_rules_out_adds_nothing():
    dense = torch.tensor([[-torch.inf, 0.0, 1.0]])
    other = torch.tensor([[5.0, 0.0, 1.0]])
    p = torch.softmax(dense, -1)[0, 1:]
    q = torch.softmax(other, -1)[0, 1:]
    divergences = divergence(dense, other, torch.tensor([0]))
    assert divergences == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


def test_a_ruined_model_has_an_infinite_perplexity_and_no_crash(causal, prose, shorter):
    ruined = shorter(causal)
    state = dict(ruined.model.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] * 1e4
    ruined.model.load_state_dict(state, assign=True)
    dense, other = evaluate_task([causal, ruined], task(prose, limit=4))
    assert other["perplexity"].value == math.inf
    entry = retention(dense, other)[0]
    assert entry.ratio == math.inf
    assert 0 < entry.kept < 0.01


@pytest.mark.parametrize("head", ["encoder", "classifier"])
def test_refuses_heads_without_words(head, prose, request, no_forward):
    with pytest.raises(TaskError, match=rf"`{head}` head predicts no words.*causal, masked.*`similarity`"):
        evaluate_task([request.getfixturevalue(head)], task(prose))


def test_refuses_models_that_differ(causal, masked, prose, no_forward):
    with pytest.raises(TaskError, match=r"2 different heads \(causal, masked\)"):
        evaluate_task([causal, masked], task(prose))
    with pytest.raises(TaskError, match="0 different heads"):
        evaluate_task([], task(prose))
    tokenizer = type(causal.tokenizer)(tokenizer_object=causal.tokenizer.backend_tokenizer, bos_token="[BOS]")
    tokenizer.add_tokens(["elephant"])
    with pytest.raises(TaskError, match="different vocabularies"):
        evaluate_task([causal, dataclasses.replace(causal, tokenizer=tokenizer)], task(prose))
    with pytest.raises(DataError, match="has no tokenizer"):
        evaluate_task([dataclasses.replace(causal, tokenizer=None)], task(prose))


@pytest.mark.parametrize("head", ["causal", "masked"])
def test_refuses_too_little_text(head, tmp_path, request, no_forward):
    short = tmp_path / "short.txt"
    short.write_text("the cat sees a dog")
    with pytest.raises(DataError, match="The text has 5 tokens and does not fill one window of 16"):
        evaluate_task([request.getfixturevalue(head)], task(str(short)))


def test_refuses_a_masked_model_without_a_mask(masked, prose, no_forward):
    tokenizer = type(masked.tokenizer)(tokenizer_object=masked.tokenizer.backend_tokenizer, cls_token="[CLS]")
    with pytest.raises(TaskError, match="has no mask token"):
        evaluate_task([dataclasses.replace(masked, tokenizer=tokenizer)], task(prose))


def test_refuses_a_text_of_unknown_words(masked, tmp_path, no_forward):
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("eins zwei drei vier " * 10)
    with pytest.raises(DataError, match="no token but special ones"):
        evaluate_task([masked], task(str(foreign)))
