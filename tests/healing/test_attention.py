"""Attention as products of matrices against a slow one, and against PyTorch's, with its gradients."""

import math

import pytest
import torch
from torch.nn import functional

from avss.healing import attention as room
from avss.healing.attention import ProductAttention, attention

SHAPES = [(2, 4, 4, 7, 7), (1, 6, 2, 300, 300), (3, 2, 1, 5, 9), (2, 3, 3, 1, 1)]


def tensors(num_batch, num_heads, num_groups, num_queries, num_keys, dtype=torch.float64, value_width=6):
    draw = torch.Generator().manual_seed(0)
    sizes = [(num_heads, num_queries, 8), (num_groups, num_keys, 8), (num_groups, num_keys, value_width)]
    return [torch.randn(num_batch, *size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]


def by_hand(query, key, value, seen, scale):
    """One query of one head at a time; `seen` says what is added to a score."""
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    shared = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for place in range(query.shape[2]):
                scores = [float(query[row, head, place] @ key[row, head // shared, other]) * scale
                          + seen(row, head, place, other) for other in range(key.shape[2])]  # fmt: skip
                weights = [math.exp(score - max(scores)) for score in scores]
                for other, weight in enumerate(weights):
                    output[row, head, place] += weight / sum(weights) * value[row, head // shared, other]
    return output


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] < 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_key_that_is_seen_counts_by_its_score(shape, scale):
    query, key, value = tensors(*shape)
    draw = torch.Generator().manual_seed(1)
    seen = torch.rand(shape[0], 1, shape[3], shape[4], generator=draw) < 0.6
    seen[..., 0] = True
    bias = torch.randn(1, shape[1], shape[3], shape[4], generator=draw, dtype=torch.float64)
    size = 8**-0.5 if scale is None else scale
    masks = {
        None: lambda row, head, place, other: 0.0,
        seen: lambda row, head, place, other: 0.0 if seen[row, 0, place, other] else -math.inf,
        bias: lambda row, head, place, other: float(bias[0, head, place, other]),
    }
    for mask, adds in masks.items():
        found = attention(query, key, value, mask, scale=scale)
        assert torch.allclose(found, by_hand(query, key, value, adds, size), rtol=1e-5, atol=1e-6)
    if shape[3] == shape[4]:
        found = attention(query, key, value, is_causal=True, scale=scale)
        expected = by_hand(query, key, value, lambda row, head, t, s: 0.0 if s <= t else -math.inf, size)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["causal", "bool", "float", "none"])
def test_outputs_and_gradients_are_pytorchs(shape, kind):
    if kind == "causal" and shape[3] != shape[4]:
        pytest.skip("a causal mask is for queries and keys of one text")
    draw = torch.Generator().manual_seed(2)
    mask = torch.rand(shape[0], 1, shape[3], shape[4], generator=draw) < 0.7
    mask[..., 0] = True
    settings = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(mask.shape, generator=draw)},
        "none": {},
    }[kind]
    results = []
    for way in (attention, functional.scaled_dot_product_attention):
        inputs = [tensor.requires_grad_() for tensor in tensors(*shape, dtype=torch.float32, value_width=8)]
        output = way(*inputs, **settings, enable_gqa=True)
        results.append([output, *torch.autograd.grad(output.sin().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_spoils_no_gradient():
    inputs = [tensor.requires_grad_() for tensor in tensors(1, 2, 2, 4, 4)]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 3, :] = False
    output = attention(*inputs, mask)
    for gradient in torch.autograd.grad(output[:, :, :3].sum(), inputs):
        assert bool(torch.isfinite(gradient).all())


def test_only_what_suits_is_taken_over(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return attention(*args, **kwargs)

    monkeypatch.setattr(room, "attention", counted)
    query, key, value = tensors(2, 4, 4, 7, 7, value_width=8)
    ask = functional.scaled_dot_product_attention
    ask(query, key, value)
    assert not calls
    with ProductAttention():
        expected = ask(query, key, value, is_causal=True)
        assert len(calls) == 1
        # Dropout, a causal mask of another shape, three dimensions: PyTorch's.
        ask(query, key, value, dropout_p=0.1)
        ask(query, key[:, :, :5], value[:, :, :5], is_causal=True)
        ask(query[0], key[0], value[0])
        monkeypatch.setattr(room, "MAX_SCORES", 48)
        ask(query, key, value)
        assert len(calls) == 1
    assert torch.allclose(expected, ask(query, key, value, is_causal=True), rtol=1e-5)
