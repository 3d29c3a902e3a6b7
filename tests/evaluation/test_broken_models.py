"""A model whose outputs are no numbers is measured, counted as wrong everywhere, and called broken."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from avss.composer.evaluating import wreck_warnings
from avss.config import TaskConfig
from avss.evaluation import evaluate_task, retention
from avss.record import Cut, Plan


@pytest.fixture
def broken(causal):
    model = copy.deepcopy(causal.model)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = torch.nan
    return dataclasses.replace(causal, model=model)


@pytest.mark.parametrize("kind", ["choice", "classification"])
def test_no_answer_is_right(causal, broken, kind):
    dense, other = evaluate_task([causal, broken], TaskConfig(kind=kind, limit=6, batch_size=2))
    assert set(other.predictions["accuracy"]) == {-1}
    assert other["accuracy"].value == 0
    kept = retention(dense, other)[0]
    assert kept.value == 0


def test_an_embedding_that_is_no_number_is_near_nothing(encoder, prose):
    model = copy.deepcopy(encoder.model)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    dense, other = evaluate_task(
        [encoder, dataclasses.replace(encoder, model=model)], TaskConfig(kind="similarity", data=prose, limit=6)
    )
    assert math.isnan(other["cosine"].value)
    choice = evaluate_task([dataclasses.replace(encoder, model=model)], TaskConfig(kind="choice", limit=6))[0]
    assert choice["accuracy"].value == 0
    assert np.isfinite(dense["neighbour_agreement"].value)


def test_a_perplexity_that_is_no_number_is_warned_of(causal, broken):
    task = TaskConfig(kind="perplexity", limit=2, seq_len=16)
    dense, other = evaluate_task([causal, broken], task)
    assert math.isnan(other["perplexity"].value)
    plan = Plan(num_blocks=5, removed=(1,), method="explicit", rule="by hand")
    cut = Cut(plan=plan, model=broken.facts(), retention=tuple(retention(dense, other)))
    (warning,) = wreck_warnings((cut,))
    assert "outputs that are no numbers" in warning
    assert np.isfinite(dense["perplexity"].value)
