"""Fréchet distance against closed forms and scipy, its refusals, its interval, and the reference cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from grafting.errors import UserError
from grafting.eval import features, fid


def gaussian(n: int, size: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, size))


def with_moments(mu: np.ndarray, sigma: np.ndarray, n: int = 500) -> np.ndarray:
    """Samples whose mean and covariance are exactly these."""
    x = gaussian(n, len(mu), 0)
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T
    return mu + x @ np.linalg.cholesky(sigma).T


def test_diagonal_gaussians_have_a_closed_form() -> None:
    mu_a, mu_b = np.zeros(4), np.array([1.0, 2.0, 0.0, -1.0])
    var_a, var_b = np.array([1.0, 4.0, 9.0, 0.25]), np.array([1.0, 1.0, 16.0, 4.0])
    expected = np.sum((mu_a - mu_b) ** 2) + np.sum((np.sqrt(var_a) - np.sqrt(var_b)) ** 2)
    got = fid.frechet_distance(with_moments(mu_a, np.diag(var_a)), with_moments(mu_b, np.diag(var_b)))
    assert got == pytest.approx(expected, rel=1e-9)


def test_one_feature_is_the_wasserstein_distance_of_normals() -> None:
    a, b = with_moments(np.array([3.0]), np.array([[4.0]])), with_moments(np.array([1.0]), np.array([[25.0]]))
    assert fid.frechet_distance(a, b) == pytest.approx(4.0 + 9.0, rel=1e-9)


def test_agrees_with_the_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    a, b = (
        gaussian(300, 20, 2) @ rng.normal(size=(20, 20)),
        gaussian(250, 20, 3, 0.3) @ rng.normal(size=(20, 20)),
    )
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(sigma_a + sigma_b - 2 * sqrtm(sigma_a @ sigma_b).real)
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert fid.frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == fid.frechet_distance(a, b)


def test_symmetric_and_zero_on_itself_with_float32_features_far_from_zero() -> None:
    # Statistics in float32 would lose this distance beside means of 1e4.
    a = (gaussian(400, 8, 4) + 1e4).astype(np.float32)
    b = (a + np.float32(0.5)).astype(np.float32)
    assert fid.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert fid.frechet_distance(a, b) == pytest.approx(8 * 0.25, rel=1e-6)
    assert fid.frechet_distance(a, b) == pytest.approx(fid.frechet_distance(b, a), rel=1e-9)


def test_fewer_samples_than_features_plus_one_are_refused() -> None:
    enough = gaussian(9, 8, 0)
    fid.frechet_distance(enough, enough)
    with pytest.raises(UserError, match="8 features needs at least 9 images, got 8"):
        fid.frechet_distance(enough, enough[:8])


def test_a_count_can_be_refused_before_any_image_exists() -> None:
    fid.check_sample_count(65, "digits")
    with pytest.raises(UserError, match="at least 2049 images, got 1000"):
        fid.check_sample_count(1000, "inception")
    with pytest.raises(UserError, match="unknown feature extractor"):
        fid.check_sample_count(1000, "inceptoin")


def test_features_that_are_not_finite_are_refused() -> None:
    bad = gaussian(20, 3, 0)
    bad[4, 1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fid.frechet_distance(bad, gaussian(20, 3, 1))


def test_statistics_round_trip_bit_for_bit(tmp_path) -> None:
    one = fid.Statistics.of(gaussian(30, 5, 0), extractor="digits")
    one.save(tmp_path / "deep" / "s.npz")
    two = fid.Statistics.load(tmp_path / "deep" / "s.npz")
    assert np.array_equal(one.mu, two.mu)
    assert np.array_equal(one.sigma, two.sigma)
    assert (one.n, one.extractor, one.inputs_hash) == (two.n, two.extractor, two.inputs_hash)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.npz"]


@pytest.mark.parametrize("damage", ["truncated", "random", "other", "nan"])
def test_damaged_statistics_are_one_line(tmp_path, damage) -> None:
    path = tmp_path / "s.npz"
    statistics = fid.Statistics.of(gaussian(30, 5, 0), extractor="digits")
    statistics.save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "random":
        path.write_bytes(np.random.default_rng(0).bytes(400))
    elif damage == "other":
        np.savez(path, mu=np.zeros(3))
    else:
        statistics.mu[0] = np.nan
        statistics.save(path)
    with pytest.raises(UserError, match=r"s\.npz") as error:
        fid.Statistics.load(path)
    assert "\n" not in str(error.value)


def test_different_extractors_are_not_compared() -> None:
    a = fid.Statistics.of(gaussian(30, 5, 0), extractor="digits")
    b = fid.Statistics.of(gaussian(30, 5, 0), extractor="inception")
    with pytest.raises(UserError, match="'digits'"):
        fid.distance(a, b)


def test_the_interval_is_seeded_and_covers_the_value() -> None:
    reference = fid.Statistics.of(gaussian(2000, 6, 1), extractor="digits")
    sample = gaussian(300, 6, 2, shift=0.2)
    one, again, other = (fid.score(sample, reference, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.value == other.value
    assert one.interval != other.interval
    assert one.interval is not None
    assert one.interval[0] < one.value < one.interval[1]
    assert (one.n, one.n_reference, one.extractor) == (300, 2000, "digits")
    assert one.reference_hash == reference.inputs_hash


def test_the_interval_covers_the_mean_score_of_fresh_samples_about_as_often_as_it_says() -> None:
    reference = fid.Statistics.of(gaussian(5000, 8, 1), extractor="digits")
    scores = [fid.score(gaussian(200, 8, 100 + i, shift=0.15), reference, resamples=60) for i in range(60)]
    centre = np.mean([s.value for s in scores])
    covered = np.mean([s.interval is not None and s.interval[0] <= centre <= s.interval[1] for s in scores])
    # 95% nominal; 60 trials have a standard error of 3%, and 60 resamples narrow the quantiles a little.
    assert covered >= 0.84


def test_many_features_have_no_interval() -> None:
    reference = fid.Statistics.of(gaussian(200, 130, 1), extractor="wide")
    assert fid.score(gaussian(200, 130, 2), reference).interval is None


def digits(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 28, 28, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_fid_of_images_names_all_it_depends_on() -> None:
    reference = fid.reference_statistics(digits(90, 0), "digits")
    score = fid.fid(digits(80, 1), reference, "digits", resamples=10)
    expected = fid.frechet_distance(
        features.extract(digits(80, 1), "digits"), features.extract(digits(90, 0), "digits")
    )
    assert score.value == pytest.approx(expected, rel=1e-9)
    assert (score.n, score.n_reference, score.extractor) == (80, 90, "digits")
    assert fid.fid(digits(90, 0), reference, resamples=0).value == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UserError, match="at least 65 images, got 64"):
        fid.fid(digits(64, 1), reference)
    with pytest.raises(UserError, match="'digits'"):
        fid.fid(digits(80, 1), reference, "inception")


class TestCache:
    @pytest.fixture
    def calls(self, monkeypatch) -> list[int]:
        """Image counts of the calls that extracted features."""
        counts: list[int] = []
        extract = features.extract

        def counted(images: torch.Tensor, *args: object, **kwargs: object) -> np.ndarray:
            counts.append(len(images))
            return extract(images, *args, **kwargs)

        monkeypatch.setattr(features, "extract", counted)
        return counts

    def test_the_same_images_are_computed_once(self, tmp_path, calls) -> None:
        one = fid.reference_statistics(digits(70, 0), "digits", tmp_path)
        two = fid.reference_statistics(digits(70, 0), "digits", tmp_path)
        assert calls == [70]
        assert np.array_equal(one.sigma, two.sigma)

    def test_other_images_are_not_taken_for_them(self, tmp_path, calls) -> None:
        one = fid.reference_statistics(digits(70, 0), "digits", tmp_path)
        changed = digits(70, 0)
        changed[3, 4, 5, 0] ^= 1
        two = fid.reference_statistics(changed, "digits", tmp_path)
        assert calls == [70, 70]
        assert one.inputs_hash != two.inputs_hash

    def test_other_weights_are_not_taken_for_them(self, tmp_path, calls, monkeypatch) -> None:
        fid.reference_statistics(digits(70, 0), "digits", tmp_path)
        monkeypatch.setattr(features, "weights_hash", lambda name: "other")
        fid.reference_statistics(digits(70, 0), "digits", tmp_path)
        assert calls == [70, 70]

    def test_a_damaged_file_is_computed_again(self, tmp_path, calls) -> None:
        one = fid.reference_statistics(digits(70, 0), "digits", tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:500])
        two = fid.reference_statistics(digits(70, 0), "digits", tmp_path)
        assert calls == [70, 70]
        assert np.array_equal(one.sigma, two.sigma)
        fid.reference_statistics(digits(70, 0), "digits", tmp_path)
        assert calls == [70, 70]
