"""Fréchet distance between images (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017).

Every score names its number of images, its extractor and the hash of its reference: they are not comparable
across any of the three. Legend: N images, F features.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from grafting.errors import UserError
from grafting.eval import features as feature_extractors
from grafting.files import replacing_file

Array = NDArray[np.float64]
# Beyond this width an eigenvalue problem per resample costs more than the score itself.
BOOTSTRAP_FEATURES = 128
_FORMAT = 1


class FidScore(BaseModel):
    """A Fréchet distance with all that it depends on. `interval` is the 95% interval, see `score`."""

    model_config = ConfigDict(frozen=True)

    value: float
    n: int
    n_reference: int
    extractor: str
    reference_hash: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean `mu [F]` and covariance `sigma [F, F]` of features, in float64, and where they come from.

    `inputs_hash` identifies what the features were computed from: the images, or else the features.
    """

    mu: Array
    sigma: Array
    n: int
    extractor: str
    inputs_hash: str

    @classmethod
    def of(cls, features: Array | Tensor, *, extractor: str, inputs_hash: str | None = None) -> Statistics:
        """Statistics of features `[N, F]`.

        Raises UserError for fewer than F + 1 samples (the covariance would be rank deficient) and for
        features that are not finite.
        """
        rows = _as_rows(features)
        n, size = rows.shape
        if n < size + 1:
            raise UserError(
                f"a Fréchet distance in {size} features needs at least {size + 1} images, got {n}; give more images"
            )
        if not np.isfinite(rows).all():
            raise UserError("features for a Fréchet distance are not finite; look at the images they come from")
        mu, sigma = _moments(rows)
        return cls(mu, sigma, n, extractor, inputs_hash or hash_array(rows))

    def save(self, path: str | Path) -> None:
        """Write an `.npz`, atomically. Raises UserError when the path cannot be written."""
        path = Path(path)
        try:
            with replacing_file(path) as temporary, temporary.open("wb") as file:
                np.savez(
                    file,
                    format=np.array(_FORMAT),
                    mu=self.mu,
                    sigma=self.sigma,
                    n=np.array(self.n),
                    extractor=np.array(self.extractor),
                    inputs_hash=np.array(self.inputs_hash),
                )
        except OSError as error:
            raise UserError(f"statistics cannot be written to {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote, bit for bit. Raises UserError when the file is missing or damaged."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"statistics file not found: {path}")
        try:
            with np.load(path, allow_pickle=False) as archive:
                held = {key: archive[key] for key in ("format", "mu", "sigma", "n", "extractor", "inputs_hash")}
            read = cls(held["mu"], held["sigma"], int(held["n"]), str(held["extractor"]), str(held["inputs_hash"]))
            sound = (
                int(held["format"]) == _FORMAT
                and read.mu.dtype == read.sigma.dtype == np.float64
                and read.mu.ndim == 1
                and read.sigma.shape == (len(read.mu), len(read.mu))
                and bool(np.isfinite(read.mu).all() and np.isfinite(read.sigma).all())
            )
        except Exception as error:  # a damaged archive fails in zip, zlib, numpy's header or a missing key
            raise UserError(f"statistics file is damaged: {path}; delete it and compute it again") from error
        if not sound:
            raise UserError(f"statistics file is damaged: {path}; delete it and compute it again")
        return read


def hash_array(values: Array | NDArray[np.uint8] | Tensor) -> str:
    """SHA-256 (first 16 hexadecimal digits) of an array's type, shape and bytes."""
    array = np.ascontiguousarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values)
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(array.data)
    return digest.hexdigest()[:16]


def distance(a: Statistics, b: Statistics) -> float:
    """`|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)` in float64.

    Raises UserError for statistics of different extractors.
    """
    if a.extractor != b.extractor or a.mu.shape != b.mu.shape:
        raise UserError(
            f"statistics of different features cannot be compared: {a.extractor!r} ({len(a.mu)}) against"
            f" {b.extractor!r} ({len(b.mu)})"
        )
    return _frechet(a.mu, a.sigma, b.mu, b.sigma)


def frechet_distance(features_a: Array | Tensor, features_b: Array | Tensor) -> float:
    """Fréchet distance between two sets of features `[N, F]`, from float64 statistics.

    Raises UserError when a set has fewer than F + 1 samples.
    """
    a, b = Statistics.of(features_a, extractor="features"), Statistics.of(features_b, extractor="features")
    return distance(a, b)


def check_sample_count(n: int, extractor: str) -> None:
    """Refuse a number of images that is too few for FID with this extractor, before any work is done.

    Raises UserError for fewer than F + 1 images and for an unknown extractor.
    """
    size = feature_extractors.feature_size(extractor)
    if n < size + 1:
        raise UserError(
            f"FID with extractor {extractor!r} ({size} features) needs at least {size + 1} images, got {n};"
            " give more images"
        )


def reference_statistics(
    images: Tensor,
    extractor: str,
    cache_dir: str | Path | None = None,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Statistics:
    """Statistics of reference images, uint8 `[N, H, W, C]`, computed once per cache folder.

    The cache file is named by the hash of the images, the extractor and its weights; a damaged one is
    computed again. Raises UserError as `features.extract` and `Statistics.of` do.
    """
    inputs_hash = hash_array(images)
    path = None
    if cache_dir is not None:
        key = f"{_FORMAT} {inputs_hash} {extractor} {feature_extractors.weights_hash(extractor)}"
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        path = Path(cache_dir).expanduser() / f"{extractor}-{name}.npz"
        if path.exists():
            try:
                cached = Statistics.load(path)
                found = cached.extractor, cached.inputs_hash, cached.n, len(cached.mu)
                if found == (extractor, inputs_hash, len(images), feature_extractors.feature_size(extractor)):
                    return cached
            except UserError:
                pass  # damaged: computed again below and written over
    check_sample_count(len(images), extractor)
    features = feature_extractors.extract(images, extractor, batch_size=batch_size, device=device)
    statistics = Statistics.of(features, extractor=extractor, inputs_hash=inputs_hash)
    if path is not None:
        statistics.save(path)
    return statistics


def fid(
    images: Tensor,
    reference: Statistics,
    extractor: str | None = None,
    *,
    resamples: int = 100,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> FidScore:
    """Score uint8 images `[N, H, W, C]` against reference statistics, in the reference's extractor.

    Naming another extractor than the reference's is a UserError, as are fewer than F + 1 images.
    """
    extractor = extractor or reference.extractor
    if extractor != reference.extractor:
        raise UserError(f"reference statistics are of extractor {reference.extractor!r}, not {extractor!r}")
    check_sample_count(len(images), extractor)
    features = feature_extractors.extract(images, extractor, batch_size=batch_size, device=device)
    return score(features, reference, resamples=resamples, seed=seed)


def score(features: Array | Tensor, reference: Statistics, *, resamples: int = 100, seed: int = 0) -> FidScore:
    """`fid` for features `[N, F]` that were extracted already, with the reference's extractor.

    The interval is a bootstrap over the samples, the reference held fixed; it is None beyond 128 features or
    without resamples. The distance of a resample is biased upwards (its covariance has lost the directions of
    the images not drawn), so the interval is centred: value + (quantile − mean of the resamples) at 2.5% and
    97.5%, never below 0. It covers the noise of sampling N images, not FID's own bias at finite N.
    Where that bias is most of the value (few images, near-equal distributions) it is conservative: twice too
    wide for 64 features, 500 images and a distance of 3, measured on Gaussians.
    """
    rows = _as_rows(features)
    statistics = Statistics.of(rows, extractor=reference.extractor)
    value = distance(statistics, reference)
    interval = None
    if rows.shape[1] <= BOOTSTRAP_FEATURES and resamples > 0:
        rng = np.random.default_rng(seed)
        draws = []
        for _ in range(resamples):
            mu, sigma = _moments(rows[rng.integers(len(rows), size=len(rows))])
            draws.append(_frechet(mu, sigma, reference.mu, reference.sigma))
        low, high = value + np.quantile(draws, [0.025, 0.975]) - np.mean(draws)
        interval = max(0.0, float(low)), max(0.0, float(high))
    return FidScore(
        value=value,
        n=len(rows),
        n_reference=reference.n,
        extractor=reference.extractor,
        reference_hash=reference.inputs_hash,
        interval=interval,
    )


def _as_rows(features: Array | Tensor) -> Array:
    array = features.detach().cpu().double().numpy() if isinstance(features, Tensor) else features
    rows = np.asarray(array, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"features must be [N, F], not {rows.shape}")
    return rows


def _moments(rows: Array) -> tuple[Array, Array]:
    return rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))


def _frechet(mu_a: Array, sigma_a: Array, mu_b: Array, sigma_b: Array) -> float:
    a, b = {"mu": mu_a, "sigma": sigma_a}, {"mu": mu_b, "sigma": sigma_b}
    # Equal sets come out at about −1e−13 by rounding.
    return max(0.0, fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID])
