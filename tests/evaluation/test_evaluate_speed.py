"""Timing: what is timed, in which order, and how sure the median is."""

import copy

import numpy as np
import pytest
import torch
import transformers
from tools.sweep.shrink import small_config, small_model
from transformers import BartForSequenceClassification, LlamaForSequenceClassification

from avss.config import TaskConfig
from avss.evaluation import evaluate_task, retention, speed
from avss.evaluation.base import Steps
from avss.models.forward import generate
from avss.models.load import adopt
from tests.support.architectures import stored


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS_PER_MODEL", 0.0)


def test_measures_all_models_in_their_units(causal, quick, shorter):
    seen = []
    task = TaskConfig(kind="speed", batch_size=3)
    results = evaluate_task([causal, shorter(causal, 1, 2, 3)], task, on_step=lambda *step: seen.append(step))
    for result in results:
        units = {m.metric: (m.unit, m.higher_is_better, m.num_samples) for m in result.measurements}
        assert units == {
            "latency_ms": ("ms", False, 3),
            "throughput": ("tokens/s", True, 3),
            "decode_ms_per_token": ("ms", False, 3),
        }
        assert all(m.value > 0 and m.stderr >= 0 and m.task == "speed" for m in result.measurements)
    assert seen[-1] == (18, 18)
    entries = {entry.metric: entry for entry in retention(*results)}
    assert entries["latency_ms"].ratio == results[1]["latency_ms"].value / results[0]["latency_ms"].value
    assert entries["latency_ms"].kept is entries["latency_ms"].flips is None


@pytest.mark.parametrize("head", ["masked", "encoder", "classifier"])
def test_only_causal_models_decode(head, quick, request):
    result = evaluate_task([request.getfixturevalue(head)], TaskConfig(kind="speed", batch_size=2))[0]
    assert [m.metric for m in result.measurements] == ["latency_ms", "throughput"]


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("FalconMambaForCausalLM", "falcon_mamba"),
        ("LlamaForCausalLM", "llama"),
        ("Mamba2ForCausalLM", "mamba2"),
        ("MambaForCausalLM", "mamba"),
        ("RwkvForCausalLM", "rwkv"),
    ],
)
def test_a_model_decodes_with_the_cache_it_has(name, model_type, quick, monkeypatch):
    """Each step reads one token, and the tokens are those that are generated without any cache."""
    model = small_model(getattr(transformers, name), model_type)
    monkeypatch.setattr(speed, "MAX_REPEATS", 3)
    calls: list[tuple[torch.Tensor, int]] = []
    handle = model.register_forward_hook(
        lambda _, __, kwargs, outputs: calls.append((kwargs["input_ids"], int(outputs.logits[0, -1].argmax()))),
        with_kwargs=True,
    )
    result = evaluate_task([adopt(model)], TaskConfig(kind="speed", batch_size=2))[0]
    handle.remove()
    assert [m.metric for m in result.measurements] == ["latency_ms", "throughput", "decode_ms_per_token"]
    assert result["decode_ms_per_token"].value > 0
    repeat = calls[-(speed.DECODED_TOKENS + 1) :]
    prompt = repeat[0][0]
    assert prompt.shape[1] > speed.DECODED_TOKENS
    assert all(token_ids.shape == (1, 1) for token_ids, _ in repeat[1:])
    expected = generate(model, prompt, num_tokens=speed.DECODED_TOKENS + 1, use_cache=False)
    assert [token for _, token in repeat] == expected.tolist()


def test_decoding_is_left_out_for_all_where_one_model_has_no_cache(causal, quick):
    """The first GPT reads everything again for each token, and so does an encoder with a causal head."""
    bare = adopt(small_model(transformers.OpenAIGPTLMHeadModel, "openai-gpt"))
    for models in ([bare], [bare, causal], [causal, bare]):
        for result in evaluate_task(models, TaskConfig(kind="speed", batch_size=2)):
            assert [m.metric for m in result.measurements] == ["latency_ms", "throughput"]
            assert all(m.value > 0 for m in result.measurements)
    both_ways = transformers.BertLMHeadModel(small_config("bert"))
    result = evaluate_task([adopt(both_ways, head="causal")], TaskConfig(kind="speed", batch_size=2))[0]
    assert [m.metric for m in result.measurements] == ["latency_ms", "throughput"]


def test_a_decoder_that_classifies_needs_no_padding_token(quick):
    config = copy.deepcopy(stored("llama-classifier").config)
    config.pad_token_id = None
    result = evaluate_task([adopt(LlamaForSequenceClassification(config))], TaskConfig(kind="speed", batch_size=2))[0]
    assert result["throughput"].value > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_classifier_that_counts_ends_of_text_finds_as_many_in_every_sequence(quick, seed):
    """Random tokens hold this one now and then, and Bart refuses a batch in which it stands unequally often."""
    model = small_model(BartForSequenceClassification, "bart", eos_token_id=3, vocab_size=16, pad_token_id=1)
    task = TaskConfig(kind="speed", batch_size=4, seed=seed)
    assert evaluate_task([adopt(model)], task)[0]["throughput"].value > 0


def test_figures_follow_from_the_clock(causal, quick, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(speed, "_now", lambda model: 0.5 * next(ticks))
    result = evaluate_task([causal], TaskConfig(kind="speed", batch_size=3))[0]
    assert result["latency_ms"].value == 500
    assert result["throughput"].value == 3 * causal.max_len / 0.5
    assert result["decode_ms_per_token"].value == 500 / speed.DECODED_TOKENS
    assert result["latency_ms"].stderr == 0


def test_models_take_turns_and_warm_up(causal, shorter, quick):
    models = [causal, shorter(causal, 1)]
    order = []

    def timer(model):
        order.append(models.index(model))
        return 1.0 + len(order)

    seconds = speed._take_turns(models, timer, 0.0, Steps(10, lambda done, total: None))
    assert order == [0, 1] * 4  # the first round does not count
    assert [own.tolist() for own in seconds] == [[4, 6, 8], [5, 7, 9]]


def test_repeats_go_on_while_there_is_time(causal):
    seconds = speed._take_turns([causal], lambda model: 1.0, 60.0, Steps(1, lambda done, total: None))
    assert len(seconds[0]) == speed.MAX_REPEATS


def test_error_of_the_median_matches_simulation():
    random = np.random.default_rng(0)
    draws = random.normal(10, 2, size=(4000, 40))
    truth = np.median(draws, axis=1).std()
    assert np.mean([speed.median_error(draw) for draw in draws]) == pytest.approx(truth, rel=0.05)
    assert speed.median_error(np.array([1.0])) is None
