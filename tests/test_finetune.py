import pytest
import torch

from grafting import FinetuneConfig, GraftPlan, UserError, finetune, graft

CONFIG = FinetuneConfig(steps=5, batch_size=8, log_every=1)


@pytest.fixture
def hybrid(tiny_host):
    group = {"slots": {"indices": [1, 3]}, "operator": "hyena_x"}
    return graft(tiny_host, GraftPlan.from_config([group], tiny_host))


def test_the_loss_falls(hybrid, latents):
    records = []
    config = CONFIG.model_copy(update={"steps": 40, "log_every": 10})
    result = finetune(hybrid, latents, config, log=records.append)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert result.samples == 40 * 8


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(hybrid, latents):
    weights = []
    for seed in (0, 0, 1):
        trained = hybrid.copy()
        finetune(trained, latents, CONFIG, seed=seed)
        weights.append(trained.model.blocks[0].attn.qkv.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_accumulation_agrees_with_one_batch(hybrid, latents, relative_error):
    whole, parts = hybrid.copy(), hybrid.copy()
    finetune(whole, latents, CONFIG)
    finetune(parts, latents, CONFIG.model_copy(update={"accumulate": 4}))
    # Adam divides by the gradient's own size, so rounding shows at 1e-4 of the weights rather than 1e-7.
    assert relative_error(parts.model.blocks[1].attn.in_proj.weight, whole.model.blocks[1].attn.in_proj.weight) < 1e-3


def test_frozen_old_layers_do_not_move(hybrid, latents):
    old, new = hybrid.model.blocks[0].attn.qkv.weight.clone(), hybrid.model.blocks[1].attn.in_proj.weight.clone()
    finetune(hybrid, latents, CONFIG.model_copy(update={"lr_old": 0.0}))
    assert torch.equal(hybrid.model.blocks[0].attn.qkv.weight, old)
    assert not torch.equal(hybrid.model.blocks[1].attn.in_proj.weight, new)


def test_the_teacher_pulls_towards_the_host(tiny_host, hybrid, latents):
    distances = []
    for weight in (1e-6, 10.0):
        records = []
        config = CONFIG.model_copy(update={"steps": 40, "log_every": 10, "teacher_weight": weight})
        finetune(hybrid.copy(), latents, config, teacher=tiny_host, log=records.append)
        distances.append(records[-1]["teacher"])
    assert distances[1] < 0.5 * distances[0]


def test_misuse_is_an_error(hybrid, latents):
    with pytest.raises(UserError, match="does not divide into 3"):
        finetune(hybrid, latents, CONFIG.model_copy(update={"accumulate": 3}))
    with pytest.raises(UserError, match="teacher"):
        finetune(hybrid, latents, CONFIG.model_copy(update={"teacher_weight": 1.0}))
    with torch.no_grad():
        hybrid.model.blocks[0].attn.qkv.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite at step 1"):
        finetune(hybrid, latents, CONFIG)
