"""The gated convolution's reference against explicit loops in float64."""

from __future__ import annotations

import pytest
import torch

from grafting.kernels.gated_conv import causal_taps, gated_conv

# B, N, D, W: odd sizes, one token, one tap, more taps than tokens.
SHAPES = [(2, 7, 5, 4), (1, 1, 3, 4), (3, 2, 1, 5), (1, 13, 4, 1), (2, 49, 6, 3)]
FORMS = {
    "hyena_se": (True, True),
    "hyena_x": (True, False),
    "hyena_y": (False, True),
    "neither": (False, False),
}


def slow_taps(u, weight, bias):
    out = torch.empty_like(u)
    width = weight.shape[-1]
    for batch in range(u.shape[0]):
        for n in range(u.shape[1]):
            for channel in range(u.shape[2]):
                total = bias[channel].item()
                for j in range(width):
                    source = n - (width - 1) + j
                    if source >= 0:
                        total += weight[channel, 0, j].item() * u[batch, source, channel].item()
                out[batch, n, channel] = total
    return out


def random_case(shape, short, inner, dtype=torch.float64):
    batch, tokens, dim, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(batch, tokens, 3 * dim),
        draw(3 * dim, 1, width) if short else None,
        draw(3 * dim) if short else None,
        draw(dim, 1, width) if inner else None,
        draw(dim) if inner else None,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_explicit_loops(shape, form):
    projected, short_weight, short_bias, inner_weight, inner_bias = case = random_case(shape, *FORMS[form])
    u = projected if short_weight is None else slow_taps(projected, short_weight, short_bias)
    q, k, v = u.chunk(3, dim=-1)
    gated = k * v if inner_weight is None else slow_taps(k * v, inner_weight, inner_bias)
    torch.testing.assert_close(gated_conv(*case), q * gated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_float32_stays_near_float64(form):
    case = random_case((2, 49, 6, 4), *FORMS[form])
    exact = gated_conv(*case)
    single = gated_conv(*(None if tensor is None else tensor.float() for tensor in case))
    assert single.dtype == torch.float32
    # At most about ten roundings of 6e-8 in a row.
    assert (single - exact).abs().max() / exact.abs().max() <= 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 5, 2, 4), (1, 1, 2, 3), (1, 3, 1, 1)])
def test_gradients(shape, form):
    case = random_case(shape, *FORMS[form])
    tensors = [tensor.requires_grad_() for tensor in case if tensor is not None]

    def of_tensors(*given):
        rest = iter(given)
        return gated_conv(*(None if tensor is None else next(rest) for tensor in case))

    assert torch.autograd.gradcheck(of_tensors, tensors)


def test_taps_are_those_of_conv1d():
    u, weight, bias, _, _ = random_case((2, 11, 3, 4), True, False)
    conv = torch.nn.functional.conv1d(u.transpose(1, 2), weight, bias, padding=3, groups=9)[..., :11]
    torch.testing.assert_close(causal_taps(u, weight, bias), conv.transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(causal_taps(u, weight), causal_taps(u, weight, bias) - bias, rtol=1e-12, atol=1e-12)


def test_later_tokens_do_not_reach_earlier_ones():
    case = random_case((1, 10, 3, 4), True, True)
    changed = case[0].clone()
    changed[:, 6] += 1.0
    before, after = gated_conv(*case), gated_conv(changed, *case[1:])
    assert torch.equal(before[:, :6], after[:, :6])
    # Two convolutions of four taps in a row reach six tokens ahead.
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_non_contiguous_input():
    case = random_case((2, 7, 5, 4), True, True)
    strided = case[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(gated_conv(strided, *case[1:]), gated_conv(*case), rtol=1e-12, atol=1e-12)
