"""Does a sample show the class that was asked for, and is it more than a copy of a training image?"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from grafting.errors import UserError
from grafting.eval import features as feature_extractors

Features = Tensor | NDArray[np.float64]


class NearestNeighbours(BaseModel):
    """Euclidean distances to the nearest training image, for samples and for the held-out floor.

    `threshold` is the first percentile of the held-out images' distances and `share_closer` the share of
    samples below it: about 0.01 for samples that are as far from the training set as real new images.
    """

    model_config = ConfigDict(frozen=True)

    median_samples: float
    median_held_out: float
    threshold: float
    share_closer: float


def class_agreement(
    images: Tensor,
    labels: Tensor,
    extractor: str = "digits",
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> float:
    """Share (0..1) of uint8 images `[N, H, W, C]` whose classifier argmax is the asked class `[N]`.

    Raises UserError for an extractor without classes, labels that do not fit the images, and as
    `features.extract` does.
    """
    entry = feature_extractors.describe(extractor)
    if entry.logits is None:
        known = ", ".join(name for name, other in feature_extractors.EXTRACTORS.items() if other.logits)
        raise UserError(f"feature extractor {extractor!r} has no classes to agree with; use one of: {known}")
    if labels.shape != (len(images),):
        raise UserError(f"class agreement needs one label per image: {len(images)} images, labels {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < entry.classes:
        raise UserError(f"labels for extractor {extractor!r} must be in 0..{entry.classes - 1}")
    logits = feature_extractors.extract(images, extractor, layer=entry.logits, batch_size=batch_size, device=device)
    return float(np.mean(logits.argmax(axis=1) == labels.cpu().numpy()))


def nearest_neighbour_check(
    samples_features: Features, train_features: Features, held_out_features: Features
) -> NearestNeighbours:
    """Compare the samples' distances to their nearest training image with those of held-out images.

    All features are `[N, F]` of one extractor, with any N. A model that copies its training images puts many
    samples closer than real unseen images ever are.
    """
    train = _tensor(train_features)
    samples = _nearest_distances(_tensor(samples_features), train)
    held_out = _nearest_distances(_tensor(held_out_features), train)
    threshold = torch.quantile(held_out, 0.01)
    return NearestNeighbours(
        median_samples=torch.quantile(samples, 0.5).item(),
        median_held_out=torch.quantile(held_out, 0.5).item(),
        threshold=threshold.item(),
        share_closer=(samples < threshold).double().mean().item(),
    )


def _tensor(features: Features) -> Tensor:
    tensor = torch.as_tensor(features).double()
    if tensor.ndim != 2 or len(tensor) == 0:
        raise ValueError(f"features must be [N, F] with N of at least 1, not {tuple(tensor.shape)}")
    return tensor


def _nearest_distances(queries: Tensor, train: Tensor, rows: int = 512) -> Tensor:
    """Distance of each query `[Q, F]` to the nearest of `[N, F]`, `rows` queries at a time."""
    # Without the matrix-product shortcut, whose cancellation hides exact copies.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(q, train, compute_mode=mode).amin(dim=1) for q in queries.split(rows)])
