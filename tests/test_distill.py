import math

import pytest
import torch

from grafting import DistillConfig, GraftPlan, UserError, distill, graft
from grafting.operators import Operator, register


def hybrid_of(host, *indices, operator="hyena_x"):
    group = {"slots": {"indices": list(indices)}, "operator": operator}
    return graft(host, GraftPlan.from_config([group], host))


CONFIG = DistillConfig(steps=6, batch_size=8, evaluate_every=3, log_every=2)


def test_a_slot_alone_and_with_all_others_gets_identical_weights(tiny_host, latents):
    alone, together = hybrid_of(tiny_host, 2), hybrid_of(tiny_host, 0, 1, 2, 3)
    distill(tiny_host, alone, latents, CONFIG)
    distill(tiny_host, together, latents, CONFIG)
    expected = alone.operator("mixer.2").state_dict()
    actual = together.operator("mixer.2").state_dict()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("objective", ["l1", "l2", "huber"])
def test_the_error_falls_and_the_host_stays(tiny_host, latents, objective):
    before = {key: value.clone() for key, value in tiny_host.model.state_dict().items()}
    hybrid = hybrid_of(tiny_host, 1, 3)
    untouched = hybrid.model.blocks[0].attn.qkv.weight.clone()
    result = distill(tiny_host, hybrid, latents, CONFIG.model_copy(update={"steps": 60, "objective": objective}))
    for slot in ("mixer.1", "mixer.3"):
        assert result.relative_error[slot] < 0.9 * result.relative_error_fresh[slot]
    assert all(torch.equal(value, before[key]) for key, value in tiny_host.model.state_dict().items())
    assert torch.equal(hybrid.model.blocks[0].attn.qkv.weight, untouched)
    assert result.samples == 60 * 8


def test_reuse_takes_several_steps_per_forward(tiny_host, latents):
    records = []
    hybrid = hybrid_of(tiny_host, 1)
    result = distill(tiny_host, hybrid, latents, CONFIG.model_copy(update={"reuse": 3}), log=records.append)
    assert (result.host_forwards, result.samples) == (2, 16)
    assert {record["slot"] for record in records} == {"mixer.1"}


def test_a_slot_that_stops_being_finite_keeps_its_last_good_weights(tiny_host, latents):
    @register("test_explodes", kind="mixer")
    class Explodes(Operator):
        def __init__(self, dim, num_heads, config):
            super().__init__(dim, num_heads, config)
            self.scale = torch.nn.Parameter(torch.zeros(dim))
            self.calls = 0

        def forward(self, x, grid):
            if self.training:
                self.calls += 1
                if self.calls == 5:
                    return x * self.scale * math.inf
            return x * self.scale

    groups = [
        {"slots": {"indices": [0]}, "operator": "test_explodes"},
        {"slots": {"indices": [1]}, "operator": "hyena_x"},
    ]
    hybrid = graft(tiny_host, GraftPlan.from_config(groups, tiny_host))
    result = distill(tiny_host, hybrid, latents, CONFIG)
    assert set(result.stopped) == {"mixer.0"}
    assert "not finite" in result.stopped["mixer.0"]
    assert torch.isfinite(hybrid.operator("mixer.0").scale).all()
    assert hybrid.operator("mixer.0").scale.abs().sum() > 0  # the weights of step 3, not the initial ones
    alone = hybrid_of(tiny_host, 1)
    distill(tiny_host, alone, latents, CONFIG)
    assert torch.equal(hybrid.operator("mixer.1").in_proj.weight, alone.operator("mixer.1").in_proj.weight)


def test_nothing_to_distill_is_an_error(tiny_host, latents):
    with pytest.raises(UserError, match="no new slots"):
        distill(tiny_host, tiny_host.copy(), latents, CONFIG)
