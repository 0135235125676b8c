"""The Hyena family: golden tensors with gradients, reach, initialisation, misuse."""

from __future__ import annotations

import pytest
import torch

from grafting import operators
from grafting.operators import OperatorError

MIXERS = ["hyena_se", "hyena_x", "hyena_y"]


def build(name, **config):
    return operators.build(name, dim=6, num_heads=2, **config)


@pytest.mark.parametrize(
    ("name", "file", "config"),
    [*((name, name, {}) for name in MIXERS), ("hyena_x_mlp", "mlp_hyena_x", {"tokens": 16})],
)
def test_matches_with_gradients(golden, relative_error, name, file, config):
    case = golden(file)
    operator = operators.build(name, dim=case["x"].shape[-1], **config)  # kernel_size 4 is the default
    weights = {k.removeprefix("state_dict."): v for k, v in case.items() if k.startswith("state_dict.")}
    operator.load_reference(weights)
    assert operator.state_dict().keys() == weights.keys()
    x = case["x"].requires_grad_()
    out = operator(x, (1, x.shape[1]))
    assert relative_error(out, case["out"]) <= 1e-5
    (out * case["cotangent"]).sum().backward()
    assert relative_error(x.grad, case["grad.x"]) <= 1e-5
    for key, parameter in operator.named_parameters():
        assert relative_error(parameter.grad, case[f"grad.{key}"]) <= 1e-5, key


@pytest.mark.parametrize(("name", "reach"), [("hyena_x", 2), ("hyena_y", 2), ("hyena_se", 4)])
def test_a_token_reaches_the_next_taps_only(name, reach):
    operator = build(name, kernel_size=3).double()
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    moved = x.clone()
    moved[0, 4] += 1.0
    changed = (operator(x, (3, 4)) != operator(moved, (3, 4))).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(4, 4 + reach + 1))


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("kernel_size", [1, 7])
def test_kernel_size_sets_every_filter(name, kernel_size):
    operator = build(name, kernel_size=kernel_size)
    filters = {key: value.shape for key, value in operator.state_dict().items() if key.endswith("filter.weight")}
    assert filters
    assert all(shape[1:] == (1, kernel_size) for shape in filters.values())
    assert operator(torch.randn(2, 4, 6), (2, 2)).shape == (2, 4, 6)


def test_the_inner_filter_starts_as_identity():
    operator = build("hyena_y")
    x = torch.randn(2, 9, 6)
    q, k, v = operator.in_proj(x).chunk(3, dim=-1)
    torch.testing.assert_close(operator(x, (3, 3)), operator.out_proj(q * k * v))


def test_the_mlp_form_does_not_mix_tokens():
    operator = build("hyena_x_mlp", tokens=5)
    x = torch.randn(1, 5, 6)
    moved = x.clone()
    moved[0, 2] += 1.0
    changed = (operator(x, (1, 5)) != operator(moved, (1, 5))).any(-1)[0]
    assert changed.tolist() == [False, False, True, False, False]


def test_the_mlp_form_refuses_another_number_of_tokens():
    operator = build("hyena_x_mlp", tokens=5)
    with pytest.raises(OperatorError, match=r"built for 5 tokens and got 4.*tokens to 4"):
        operator(torch.randn(1, 4, 6), (2, 2))


@pytest.mark.parametrize(("ratio", "hidden"), [(1.0, 6), (2.5, 15)])
def test_the_mlp_forms_width(ratio, hidden):
    operator = build("hyena_x_mlp", tokens=4, expansion_ratio=ratio)
    assert operator.in_proj.out_features == 3 * hidden
    assert operator(torch.randn(2, 4, 6), (2, 2)).shape == (2, 4, 6)


@pytest.mark.parametrize("name", [*MIXERS, "hyena_x_mlp"])
def test_no_start_from_the_host(name):
    old = operators.build("attention", dim=6, num_heads=2)
    with pytest.raises(OperatorError, match="use init: fresh"):
        operators.get(name).from_host(operators.parse_config(name, {}), old)


@pytest.mark.parametrize(
    ("name", "per_token"),
    # Multiply-adds per token at width 6 with 4 taps: projections 6·18 + 6·6, taps 18·4 and 6·4, one gate (6).
    [("hyena_x", 144 + 72 + 6), ("hyena_y", 144 + 24 + 6), ("hyena_se", 144 + 72 + 24 + 6)],
)
def test_flops(name, per_token):
    assert build(name).flops(10) == 2 * 10 * per_token


@pytest.mark.parametrize("name", [*MIXERS, "hyena_x_mlp"])
def test_state_dict_round_trip(name):
    first, second = build(name), build(name)
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 256, 6)
    assert torch.equal(first(x, (16, 16)), second(x, (16, 16)))
