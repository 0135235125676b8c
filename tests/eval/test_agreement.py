"""Class agreement on real digits, and the nearest-neighbour check on copies and on fresh points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grafting.errors import UserError
from grafting.eval import features
from grafting.eval.agreement import class_agreement, nearest_neighbour_check


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    path = features.DIGITS_WEIGHTS.with_name("data.npz")
    if not path.exists():
        pytest.skip("the embedded digits are not here")
    data = np.load(path)
    images = torch.from_numpy(data["held_out_images"][::5])[..., None]
    return images, torch.from_numpy(data["held_out_labels"][::5]).long()


def test_real_digits_agree_with_their_labels(held_out) -> None:
    images, labels = held_out
    assert class_agreement(images, labels) > 0.97
    assert class_agreement(images, (labels + 1) % 10) < 0.03


def test_agreement_is_a_share(held_out) -> None:
    images, labels = held_out
    right = class_agreement(images, labels)
    half = labels.clone()
    half[: len(half) // 2] = (half[: len(half) // 2] + 1) % 10
    assert class_agreement(images, half) == pytest.approx(right / 2, abs=0.05)


def test_bad_requests_are_one_line() -> None:
    images = torch.zeros(3, 28, 28, 1, dtype=torch.uint8)
    for labels, extractor in (([0, 1], "digits"), ([0, 1, 10], "digits"), ([0, 1, 2], "inception")):
        with pytest.raises(UserError) as error:
            class_agreement(images, torch.tensor(labels), extractor)
        assert "\n" not in str(error.value)


def test_copies_are_found_and_fresh_points_are_not() -> None:
    rng = np.random.default_rng(0)
    train, held_out, fresh = (rng.normal(size=(n, 8)) for n in (600, 400, 400))
    honest = nearest_neighbour_check(fresh, train, held_out)
    assert honest.share_closer < 0.05
    assert honest.median_samples == pytest.approx(honest.median_held_out, rel=0.1)
    copied = nearest_neighbour_check(np.concatenate([fresh[:200], train[:200]]), train, held_out)
    assert copied.share_closer == pytest.approx(0.5, abs=0.03)


def test_distances_are_exact_on_a_line() -> None:
    train = torch.tensor([[0.0], [10.0]])
    found = nearest_neighbour_check(torch.tensor([[1.0], [8.0], [13.0]]), train, torch.tensor([[4.0], [6.0], [5.0]]))
    assert (found.median_samples, found.median_held_out) == (2.0, 4.0)
    # 1% of the way from 4 to the next distance, which is 4 too.
    assert found.threshold == pytest.approx(4.0)
    assert found.share_closer == 1.0


def test_a_copy_far_from_the_origin_is_at_distance_zero() -> None:
    train = np.random.default_rng(0).normal(size=(300, 64)) + 1e4
    found = nearest_neighbour_check(train[:50], train, train + 1e-3)
    assert found.median_samples == 0.0
    assert found.share_closer == 1.0
