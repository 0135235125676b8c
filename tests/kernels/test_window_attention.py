"""The window attention's reference against explicit loops and a full mask in float64."""

from __future__ import annotations

import math

import pytest
import torch

from grafting.kernels.window_attention import window_attention

# B, h, N, d, window: one token, window 0, windows around the switch to the mask at 2w + 1 = N, wider than N.
SHAPES = [
    (2, 3, 11, 5, 2),
    (1, 1, 1, 4, 0),
    (1, 2, 6, 3, 0),
    (1, 2, 9, 3, 3),
    (1, 2, 9, 3, 4),
    (2, 1, 10, 3, 4),
    (1, 2, 7, 1, 20),
]


def random_qkv(batch, heads, tokens, width):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(3, batch, heads, tokens, width, generator=generator, dtype=torch.float64).unbind(0)


def slow(q, k, v, window):
    out = torch.empty_like(v)
    tokens, width = q.shape[-2:]
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(tokens):
                seen = range(max(0, i - window), min(tokens, i + window + 1))
                scores = [math.exp(float(q[batch, head, i] @ k[batch, head, j]) / math.sqrt(width)) for j in seen]
                values = [score * v[batch, head, j] for score, j in zip(scores, seen, strict=True)]
                out[batch, head, i] = torch.stack(values).sum(0) / sum(scores)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_explicit_loops(shape):
    *sizes, window = shape
    q, k, v = random_qkv(*sizes)
    torch.testing.assert_close(window_attention(q, k, v, window), slow(q, k, v, window), rtol=1e-11, atol=1e-11)


def test_matches_a_full_mask_at_length():
    q, k, v = random_qkv(1, 2, 65, 8)
    position = torch.arange(65)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(
        (position[:, None] - position).abs() > 5, float("-inf")
    )
    torch.testing.assert_close(window_attention(q, k, v, 5), scores.softmax(-1) @ v, rtol=1e-11, atol=1e-11)


def test_a_window_over_all_tokens_is_full_attention():
    q, k, v = random_qkv(2, 2, 9, 4)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(window_attention(q, k, v, 8), full, rtol=1e-12, atol=1e-12)


def test_window_zero_passes_the_values():
    q, k, v = random_qkv(2, 2, 9, 4)
    torch.testing.assert_close(window_attention(q, k, v, 0), v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_scores_stay_finite(scale):
    q, k, v = random_qkv(1, 2, 20, 4)
    out = window_attention(scale * q.float(), scale * k.float(), v.float(), 3)
    assert out.isfinite().all()


@pytest.mark.parametrize(("tokens", "window"), [(7, 1), (5, 2), (4, 9), (1, 0)])
def test_gradients(tokens, window):
    q, k, v = (tensor.requires_grad_() for tensor in random_qkv(1, 2, tokens, 3))
    assert torch.autograd.gradcheck(lambda *qkv: window_attention(*qkv, window), (q, k, v))


def test_float32_stays_near_float64():
    q, k, v = random_qkv(2, 2, 50, 16)
    exact = window_attention(q, k, v, 4)
    single = window_attention(q.float(), k.float(), v.float(), 4)
    assert single.dtype == torch.float32
    # Dot products of 16 terms, an exponential and a sum of 9: some ten roundings of 6e-8.
    assert (single - exact).abs().max() / exact.abs().max() <= 2e-6
