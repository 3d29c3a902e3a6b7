"""The KL divergence against numpy, and its gradient against plain autograd."""

import numpy as np
import pytest
import torch

from avss.healing.divergence import chunk_size, divergence


def kl_by_hand(dense: np.ndarray, logits: np.ndarray, temperature: float) -> list[float]:
    """Row by row, word by word."""
    rows = []
    for dense_row, row in zip(dense / temperature, logits / temperature, strict=True):
        p = np.exp(dense_row - dense_row.max()) / np.exp(dense_row - dense_row.max()).sum()
        q = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        rows.append(temperature**2 * sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))
    return rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_equals_the_sum_over_words(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, dense = (5 * torch.randn((4, 9), generator=generator) for _ in range(2))
    found = divergence(logits, dense, temperature)
    assert found.numpy() == pytest.approx(kl_by_hand(dense.double().numpy(), logits.double().numpy(), temperature))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_gradient_equals_autograd_of_the_library(temperature):
    generator = torch.Generator().manual_seed(1)
    logits, dense = (3 * torch.randn((4, 9), generator=generator) for _ in range(2))
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    (divergence(ours, dense, temperature) * weights).sum().backward()
    rows = torch.nn.functional.kl_div(
        torch.log_softmax(theirs / temperature, -1),
        torch.log_softmax(dense / temperature, -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    (temperature**2 * rows * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_equal_predictions_have_none_and_no_gradient():
    logits = torch.randn((3, 7), generator=torch.Generator().manual_seed(2)).requires_grad_()
    rows = divergence(logits, logits.detach() + 4.0)
    rows.sum().backward()
    assert rows.detach().abs().max() < 1e-6
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_a_word_that_the_dense_model_rules_out_adds_nothing():
    dense = torch.tensor([[0.0, 1.0, -torch.inf]])
    logits = torch.tensor([[1.0, 0.0, 3.0]], requires_grad=True)
    rows = divergence(logits, dense)
    rows.sum().backward()
    p, q = torch.softmax(dense, -1), torch.softmax(logits.detach(), -1)
    assert rows.item() == pytest.approx(float((p[0, :2] * (p[0, :2] / q[0, :2]).log()).sum()))
    torch.testing.assert_close(logits.grad, q - p)


def test_the_inputs_are_left_alone():
    logits, dense = torch.randn(2, 5), torch.randn(2, 5)
    before = logits.clone(), dense.clone()
    divergence(logits, dense)
    assert torch.equal(logits, before[0])
    assert torch.equal(dense, before[1])


def test_the_logits_held_at_a_time_are_bounded():
    assert chunk_size(10**9, torch.device("cpu")) == 1
    assert chunk_size(50_000, torch.device("cpu")) * 50_000 <= 2**23
