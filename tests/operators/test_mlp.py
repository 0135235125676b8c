"""The MLP at any width."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grafting import operators
from grafting.operators import OperatorError


def test_matches_the_blocks_mlp(golden, relative_error):
    case = golden("dit_block")
    operator = operators.build("mlp", dim=32)
    prefix = "block.state_dict.mlp."
    operator.load_reference({k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)})
    # The exact GELU instead of the tanh form would be off by 1.4e-4.
    assert relative_error(operator(case["mlp.x"], (4, 4)).detach(), case["mlp.out"]) <= 1e-5


@pytest.mark.parametrize(("ratio", "hidden"), [(0.5, 3), (3, 18), (4.0, 24), (0.4, 2)])
def test_expansion_ratio_sets_the_width(ratio, hidden):
    operator = operators.build("mlp", dim=6, expansion_ratio=ratio)
    assert operator.fc1.weight.shape == (hidden, 6)
    assert operator(torch.randn(2, 4, 6), (2, 2)).shape == (2, 4, 6)


@pytest.mark.parametrize("ratio", [0, -1, 0.1])
def test_a_ratio_without_a_hidden_unit_is_refused(ratio):
    with pytest.raises(OperatorError, match="expansion_ratio"):
        operators.build("mlp", dim=6, expansion_ratio=ratio)


def test_start_from_the_host_is_exact_at_its_width():
    old = operators.build("mlp", dim=6, expansion_ratio=3)
    new = operators.get("mlp").from_host(operators.parse_config("mlp", {"expansion_ratio": 3}), old)
    x = torch.randn(2, 4, 6)
    assert new is not old
    assert torch.equal(new(x, (2, 2)), old(x, (2, 2)))


def test_start_from_the_host_at_another_width_is_refused():
    old = operators.build("mlp", dim=6, expansion_ratio=3)
    with pytest.raises(OperatorError, match=r"expansion_ratio 3\); use init: fresh"):
        operators.get("mlp").from_host(operators.parse_config("mlp", {"expansion_ratio": 4}), old)


def test_start_from_attention_is_refused():
    old = operators.build("attention", dim=6)
    with pytest.raises(OperatorError, match="not Attention"):
        operators.get("mlp").from_host(operators.parse_config("mlp", {}), old)


def test_flops_are_those_of_its_products():
    operator = operators.build("mlp", dim=6, expansion_ratio=3)
    with FlopCounterMode(display=False) as counted:
        operator(torch.randn(1, 10, 6), (2, 5))
    assert operator.flops(10) == counted.get_total_flops()
