"""The paired denoising loss: what it depends on, its strata, and its statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grafting.diffusion import DiffusionProcess
from grafting.errors import UserError
from grafting.eval.denoising import denoising_loss, items, paired_difference, summary
from grafting.seeding import generator


class Recorder:
    """A denoiser with a known loss that remembers what it was asked."""

    def __init__(self, epsilon: float = 0.0) -> None:
        self.process = DiffusionProcess()
        self.epsilon = epsilon
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def denoise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((z, t, condition))
        return torch.full((len(z), 2 * z.shape[1], *z.shape[2:]), self.epsilon)

    def seen(self) -> list[Tensor]:
        return [torch.cat(part) for part in zip(*self.calls, strict=True)]


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(10, 2, 3, 3, generator=draw), torch.arange(10) % 4


def test_a_model_that_predicts_zero_pays_the_power_of_its_noise(data) -> None:
    losses = denoising_loss(Recorder(), *data, seed=3)
    expected = torch.stack(
        [torch.randn(2, 3, 3, generator=generator(3, "denoising", i)).square().mean() for i in range(10)]
    )
    torch.testing.assert_close(losses, expected)


def test_every_model_and_batch_size_meets_the_same_items(data) -> None:
    one, two = Recorder(), Recorder(0.5)
    denoising_loss(one, *data, seed=3, repeats=3, batch_size=64)
    denoising_loss(two, *data, seed=3, repeats=3, batch_size=7)
    for a, b in zip(one.seen(), two.seen(), strict=True):
        assert torch.equal(a, b)
    other = Recorder()
    denoising_loss(other, *data, seed=4, repeats=3)
    assert not torch.equal(one.seen()[0], other.seen()[0])


def test_items_are_grouped_by_image(data) -> None:
    recorder = Recorder()
    losses = denoising_loss(recorder, *data, seed=0, repeats=3, batch_size=4)
    assert losses.shape == (30,)
    assert torch.equal(recorder.seen()[2], data[1].repeat_interleave(3))


@pytest.mark.parametrize("count", [1, 7, 40, 1000, 3000])
def test_timesteps_cover_the_range_evenly(count) -> None:
    t, _ = items(count, 1000, seed=1)
    assert 0 <= int(t.min()) <= int(t.max()) <= 999
    sorted_t = t.sort().values
    index = torch.arange(count)
    assert bool(((sorted_t >= index * 1000 // count) & (sorted_t <= (index + 1) * 1000 // count)).all())
    if count >= 40:
        assert not torch.equal(t, sorted_t)


def test_labels_must_fit(data) -> None:
    with pytest.raises(UserError, match="10 latents"):
        denoising_loss(Recorder(), data[0], data[1][:4], seed=0)


def test_summary_is_the_mean_and_its_standard_error() -> None:
    found = summary(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found.mean == 2.5
    assert found.standard_error == pytest.approx((5 / 3) ** 0.5 / 2)
    assert found.interval == pytest.approx(
        (2.5 - 1.96 * found.standard_error, 2.5 + 1.96 * found.standard_error), rel=1e-4
    )


def test_visits_to_one_image_are_not_independent() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert summary(losses.repeat_interleave(5), repeats=5).standard_error == pytest.approx(
        summary(losses).standard_error
    )


def test_pairs_cancel_what_they_share(data) -> None:
    a = denoising_loss(Recorder(), *data, seed=0, repeats=8)
    b = denoising_loss(Recorder(0.05), *data, seed=0, repeats=8)
    difference = paired_difference(a, b, repeats=8)
    assert difference.mean == pytest.approx(summary(a).mean - summary(b).mean)
    assert difference.standard_error < 0.3 * summary(a, repeats=8).standard_error
    assert paired_difference(a, a).interval == (0.0, 0.0)


def test_unequal_or_single_items_are_one_line() -> None:
    with pytest.raises(UserError, match="differ in number"):
        paired_difference(torch.zeros(3), torch.zeros(4))
    with pytest.raises(UserError, match="at least 2"):
        summary(torch.zeros(1))
