"""Costs of a denoiser: FLOPs against counts by hand, memory, interleaving, and the cost of each slot."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from grafting import operators
from grafting.errors import UserError
from grafting.eval import speed
from grafting.hosts.dit import DiT


@dataclass(frozen=True)
class Place:
    module_path: str


class Stand:
    """The parts of a host that speed asks for, around a tiny DiT."""

    def __init__(self, log: list[str] | None = None, name: str = "") -> None:
        torch.manual_seed(0)
        self.model = DiT(input_size=4, patch_size=1, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
        self.log, self.name = log, name

    @property
    def slots(self) -> dict[str, Place]:
        kinds = {"mixer": "attn", "mlp": "mlp"}
        return {f"{kind}.{i}": Place(f"blocks.{i}.{path}") for kind, path in kinds.items() for i in range(2)}

    latent_shape = (2, 4, 4)
    grid = (4, 4)
    num_classes = 3

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def denoise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        if self.log is not None:
            self.log.append(self.name)
        return self.model(z, t, condition)


N, D = 16, 16
# patch embedding, time embedder, two adaLN of 6 D, final adaLN of 2 D, output of 4 channels
OUTSIDE = 2 * (N * 2 * D + 256 * D + D * D + 2 * (D * 6 * D) + D * 2 * D + N * D * 4)


def test_flops_are_the_count_by_hand() -> None:
    attention = 2 * N * 4 * D**2 + 4 * N**2 * D
    mlp = 2 * N * 2 * D * 4 * D
    assert speed.flops(Stand()) == OUTSIDE + 2 * (attention + mlp)


def test_operators_answer_for_themselves_in_the_flops() -> None:
    host = Stand()
    before = speed.flops(host)
    new = operators.build("hyena_se", dim=D, num_heads=2)
    host.model.blocks[1].attn = new
    assert speed.flops(host) - before == new.flops(N) - host.model.blocks[0].attn.flops(N)


def test_counting_leaves_no_hooks_and_no_change() -> None:
    host = Stand()
    call = speed._call(host, 2)
    before = call()
    speed.flops(host)
    speed.per_slot(host, 2, repeats=1)
    assert torch.equal(call(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def test_measure_reports_consistent_numbers() -> None:
    found = speed.measure(Stand(), batch_size=3, repeats=5, steps=10, guidance=2.0)
    assert 0 < found.latency_p20_ms <= found.latency_ms <= found.latency_p80_ms
    assert found.images_per_second == pytest.approx(3 / (10 * 2 * found.latency_ms / 1e3))
    assert found.parameters == sum(p.numel() for p in Stand().model.parameters())
    assert found.peak_memory_bytes > speed.weight_bytes(Stand().model)
    assert found.threads == torch.get_num_threads()
    assert found.torch_version == torch.__version__
    assert found.device.startswith("cpu")


def test_memory_grows_with_the_batch_and_not_with_the_repeats() -> None:
    def activations(batch_size: int, repeats: int) -> int:
        host = Stand()
        found = speed.measure(host, batch_size=batch_size, repeats=repeats).peak_memory_bytes
        return found - speed.weight_bytes(host.model)

    small = activations(2, 1)
    assert small == activations(2, 4)
    assert 3.0 * small < activations(8, 1) <= 4.0 * small


def test_live_bytes_count_storages_that_live_together() -> None:
    x = torch.ones(1000)
    with speed.LiveBytes() as tracker:
        y = x * 2
        view = y.view(10, 100)
        y.add_(1)
        assert tracker.peak == tracker.live == 4000
        del y, view
        assert tracker.live == 0
        for _ in range(5):
            x + 1
    assert tracker.peak == 4000
    assert tracker.live == 0


def test_models_are_measured_in_turns() -> None:
    log: list[str] = []
    hosts = {"A": Stand(log, "A"), "B": Stand(log, "B")}
    found = speed.compare(hosts, batch_size=1, repeats=4)
    assert list(found) == ["A", "B"]
    assert found["A"].flops == found["B"].flops
    assert "AABB" + "AB" * 4 in "".join(log)


def test_each_slot_is_costed() -> None:
    host = Stand()
    found = speed.per_slot(host, 2, repeats=2)
    assert list(found) == ["mixer.0", "mixer.1", "mlp.0", "mlp.1"]
    for name, cost in found.items():
        operator = host.model.get_submodule(host.slots[name].module_path)
        assert cost.flops == operator.flops(N)
        assert cost.parameters == sum(p.numel() for p in operator.parameters())
        assert cost.latency_ms > 0
    assert speed.flops(host) == OUTSIDE + sum(cost.flops for cost in found.values())


def test_a_slot_may_hold_a_whole_block() -> None:
    class Blocks(Stand):
        @property
        def slots(self) -> dict[str, Place]:
            return {**super().slots, "pair.0": Place("blocks.0")}

    host = Blocks()
    assert speed.flops(host) == speed.flops(Stand())
    found = speed.per_slot(host, 1, repeats=1)
    # A module that is no operator costs what ran inside it: here its adaLN and its two operators.
    assert found["pair.0"].flops == found["mixer.0"].flops + found["mlp.0"].flops + 2 * D * 6 * D


def test_zero_repeats_are_one_line() -> None:
    with pytest.raises(UserError, match="repeats must be at least 1"):
        speed.measure(Stand(), repeats=0)
