"""The DiT module against the golden tensors of the original."""

from __future__ import annotations

import pytest
import torch

from grafting.hosts.dit import SIZES, DiT, DiTBlock, FinalLayer

# Millions of parameters at 32×32×4 latents, position table included: table 4 of the DiT paper's appendix.
PAPER_MILLIONS = {
    "DiT-S/8": 33,
    "DiT-S/4": 33,
    "DiT-S/2": 33,
    "DiT-B/8": 131,
    "DiT-B/4": 130,
    "DiT-B/2": 130,
    "DiT-L/8": 459,
    "DiT-L/4": 458,
    "DiT-L/2": 458,
    "DiT-XL/8": 676,
    "DiT-XL/4": 675,
    "DiT-XL/2": 675,
}
SMALL = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def model(golden, golden_json):
    model = DiT(**golden_json("dit_model")["model_config"])
    model.load_state_dict(golden("dit_model"))
    return model.eval()


@torch.no_grad()
def test_forward_matches(golden, model, relative_error):
    case = golden("dit_forward")
    assert relative_error(model(case["x"], case["t"], case["y"]), case["out"]) <= 1e-5


@torch.no_grad()
def test_intermediate_states_match(golden, model, relative_error):
    case = golden("dit_forward")
    conditioning = model.t_embedder(case["t"]) + model.y_embedder(case["y"])
    tokens = model.x_embedder(case["x"]) + model.pos_embed
    # An angle is a timestep up to 999 times a frequency below 1: one rounding of exp moves it by up to
    # 999 · 2⁻²⁴ = 6e-5 (the golden table itself is 3e-5 from the float64 one). 127 for 128 gives order 1.
    assert relative_error(model.t_embedder.sinusoid(case["t"]), case["t_embedding"]) <= 6e-5
    assert relative_error(conditioning, case["conditioning"]) <= 1e-5
    assert relative_error(tokens, case["tokens_in"]) <= 1e-5
    for index, block in enumerate(model.blocks):
        tokens = block(tokens, conditioning, model.grid)
        assert relative_error(tokens, case[f"tokens_after_block.{index}"]) <= 1e-5


@pytest.mark.parametrize("scale", ["1.5", "4.0"])
@torch.no_grad()
def test_guided_forward_matches(golden, model, relative_error, scale):
    case = golden("dit_forward")
    guided = model.forward_with_cfg(case["cfg.x"], case["cfg.t"], case["cfg.y"], float(scale))
    assert relative_error(guided, case[f"cfg.out_scale_{scale}"]) <= 1e-5


@torch.no_grad()
def test_guidance_channels_are_the_leading_ones(golden, model):
    case = golden("dit_forward")
    inputs = case["cfg.x"], case["cfg.t"], case["cfg.y"]
    plain = model.forward_with_cfg(*inputs, 1.0)
    three = model.forward_with_cfg(*inputs, 4.0)
    four = model.forward_with_cfg(*inputs, 4.0, guidance_channels=4)
    changed = [(three[:2, channel] - plain[:2, channel]).abs().max() > 1e-3 for channel in range(8)]
    assert changed == [True, True, True] + [False] * 5
    torch.testing.assert_close(four[:, :3], three[:, :3])
    assert (four[:2, 3] - plain[:2, 3]).abs().max() > 1e-3


@torch.no_grad()
def test_block_matches_on_low_variance_tokens(golden, relative_error):
    # Here the LayerNorm eps is visible: with 1e-5 instead of 1e-6 the block is off by 7%.
    case = golden("dit_block")
    block = DiTBlock(32, 4)
    block.load_state_dict(_below(case, "block.state_dict."))
    assert relative_error(block(case["x"], case["c"]), case["block.out"]) <= 1e-5
    assert relative_error(block.mlp(case["mlp.x"], (1, 16)), case["mlp.out"]) <= 1e-5


@torch.no_grad()
def test_final_layer_matches_on_low_variance_tokens(golden, relative_error):
    case = golden("dit_block")
    final = FinalLayer(32, 2, 8)
    final.load_state_dict(_below(case, "final.state_dict."))
    assert relative_error(final(case["x"], case["c"]), case["final.out"]) <= 1e-5


def test_position_table_is_the_original_one(golden, golden_json, relative_error):
    fresh = DiT(**golden_json("dit_model")["model_config"])
    assert relative_error(fresh.pos_embed.detach(), golden("dit_model")["pos_embed"]) <= 1e-5
    assert not fresh.pos_embed.requires_grad


def test_all_sizes_are_tested():
    assert set(SIZES) == set(PAPER_MILLIONS)


@pytest.mark.parametrize("name", SIZES)
def test_standard_sizes_have_the_papers_parameter_counts(name):
    depth, width, patch, heads = SIZES[name]
    with torch.device("meta"):
        model = DiT(hidden_size=width, depth=depth, patch_size=patch, num_heads=heads)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6) == PAPER_MILLIONS[name]


def test_fresh_model_predicts_zero():
    # adaLN-Zero: gates and the output projection start at zero (section 3.2 of the paper).
    model = DiT(**SMALL).eval()
    out = model(torch.randn(2, 4, 4, 4), torch.tensor([0, 999]), torch.tensor([0, 3]))
    assert out.shape == (2, 8, 4, 4)
    assert (out == 0).all()


def test_output_channels_without_learned_variance():
    out = DiT(**SMALL, learn_sigma=False)(torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([1]))
    assert out.shape == (1, 4, 4, 4)


def test_null_class_is_the_row_after_the_classes():
    assert DiT(**SMALL).null_class == 3
    with pytest.raises(ValueError, match="no null class"):
        _ = DiT(**SMALL, class_dropout_prob=0.0).null_class


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"input_size": 5}, "input_size 5"), ({"num_heads": 3}, "num_heads 3"), ({"hidden_size": 18}, "18")],
)
def test_sizes_that_do_not_divide_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        DiT(**{**SMALL, **wrong})


def _below(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
