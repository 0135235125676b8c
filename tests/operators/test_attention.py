"""Attention and sliding-window attention: golden tensors, starts from the host, costs, misuse."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grafting import operators
from grafting.operators import OperatorError

GRID = (5, 10)


def test_sliding_window_matches_with_gradients(golden, golden_json, relative_error):
    case, config = golden("swa"), golden_json("swa")["config"]
    operator = operators.build(
        "sliding_window",
        dim=config["embed_dim"],
        num_heads=config["num_heads"],
        window=config["window_size"][0],
    )
    operator.load_reference({k.removeprefix("state_dict."): v for k, v in case.items() if k.startswith("state_dict.")})
    x = case["x"].requires_grad_()
    out = operator(x, GRID)
    assert relative_error(out, case["out"]) <= 1e-5
    (out * case["cotangent"]).sum().backward()
    assert relative_error(x.grad, case["grad.x"]) <= 1e-5
    ours = {"Wqkv": operator.qkv, "out_proj": operator.proj}
    for name, layer in ours.items():
        assert relative_error(layer.weight.grad, case[f"grad.{name}.weight"]) <= 1e-5
        assert relative_error(layer.bias.grad, case[f"grad.{name}.bias"]) <= 1e-5


def test_the_window_changes_the_golden_output(golden, relative_error):
    case = golden("swa")
    operator = operators.build("sliding_window", dim=64, num_heads=4, window=3)
    operator.load_reference({k.removeprefix("state_dict."): v for k, v in case.items() if k.startswith("state_dict.")})
    assert relative_error(operator(case["x"], GRID).detach(), case["out"]) > 1e-2


def test_self_graft_from_the_host_is_exact_and_independent():
    old = operators.build("attention", dim=24, num_heads=3)
    new = operators.get("attention").from_host(operators.parse_config("attention", {}), old)
    x = torch.randn(2, 12, 24)
    assert torch.equal(new(x, (3, 4)), old(x, (3, 4)))
    with torch.no_grad():
        new.qkv.weight.zero_()
    assert (old.qkv.weight != 0).any()


def test_sliding_window_from_the_host_is_attention_when_the_window_covers_all_tokens():
    old = operators.build("attention", dim=24, num_heads=3)
    x = torch.randn(2, 12, 24)
    for window, same in ((11, True), (2, False)):
        config = operators.parse_config("sliding_window", {"window": window})
        new = operators.get("sliding_window").from_host(config, old)
        assert torch.allclose(new(x, (3, 4)), old(x, (3, 4)), atol=1e-6) is same


def test_fresh_builds_differ_and_self_graft_does_not_reuse_them():
    first, second = (operators.build("attention", dim=24, num_heads=3) for _ in range(2))
    assert not torch.equal(first.qkv.weight, second.qkv.weight)


def test_start_from_another_layer_is_refused():
    mlp = operators.build("mlp", dim=24)
    with pytest.raises(OperatorError, match=r"'sliding_window' starts from attention, not Mlp"):
        operators.get("sliding_window").from_host(operators.parse_config("sliding_window", {}), mlp)


def test_heads_must_divide_the_width():
    with pytest.raises(OperatorError, match="dim 10 is not divisible by num_heads 4"):
        operators.build("attention", dim=10, num_heads=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("proj.bias"), r"missing \['proj.bias'\]"),
        (lambda weights: weights.update(extra=torch.zeros(1)), r"unexpected \['extra'\]"),
        (
            lambda weights: weights.update({"proj.bias": torch.zeros(5)}),
            r"proj.bias is \(5,\), expected \(24,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, words):
    operator = operators.build("attention", dim=24, num_heads=3)
    weights = dict(operator.state_dict())
    change(weights)
    with pytest.raises(OperatorError, match=words):
        operator.load_reference(weights)


def test_attention_flops_are_those_of_its_products():
    operator = operators.build("attention", dim=24, num_heads=3)
    with FlopCounterMode(display=False) as linear:
        operator.proj(operator.qkv(torch.randn(1, 12, 24))[..., :24])
    scores_and_values = 2 * (2 * 12 * 12 * 24)
    assert operator.flops(12) == linear.get_total_flops() + scores_and_values


@pytest.mark.parametrize(("tokens", "window"), [(12, 0), (12, 3), (12, 11), (12, 30), (3, 1)])
def test_sliding_window_flops_count_the_visible_pairs(tokens, window):
    operator = operators.build("sliding_window", dim=24, num_heads=3, window=window)
    pairs = sum(abs(i - j) <= window for i in range(tokens) for j in range(tokens))
    assert operator.flops(tokens) == 2 * tokens * 4 * 24**2 + 4 * pairs * 24
