"""Feature extractors by name: what an image score is computed in.

All of them are torch-fidelity extractors; `digits` is registered there on import, so that `fidelity` and
`torch_fidelity.calculate_metrics` know it too. Legend: N images, H × W pixels, C channels, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

import grafting.hosts.embedded as embedded
from grafting.errors import UserError, nearest
from grafting.eval.digits import DigitClassifier

DIGITS_WEIGHTS = Path(embedded.__file__).parent / "digits_dit" / "classifier.safetensors"


@dataclass(frozen=True)
class Extractor:
    """What a name stands for: torch-fidelity's own name, the layer that scores are computed in, and sizes."""

    registered_name: str
    layer: str
    size: int
    logits: str | None = None
    classes: int = 0
    image_size: int | None = None


EXTRACTORS: dict[str, Extractor] = {
    "digits": Extractor("digits", "features", 64, logits="logits", classes=10, image_size=28),
    # Heusel et al. 2017: the pooled features of the 2015 TensorFlow Inception, ported by torch-fidelity.
    "inception": Extractor("inception-v3-compat", "2048", 2048),
}


class DigitsFeatureExtractor(FeatureExtractorBase):
    """torch-fidelity extractor around `DigitClassifier`: layers `features` [B, 64] and `logits` [B, 10].

    Takes uint8 images `[B, 3, 28, 28]`, whose grey value is the mean of the channels. The packaged weights
    are fp16 on disk and run in fp32. Raises UserError for another image size and for weights that do not
    load.
    """

    SIZE = 28

    def __init__(
        self,
        name: str,
        features_list: Sequence[str],
        feature_extractor_weights_path: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, list(features_list))
        path = Path(feature_extractor_weights_path or DIGITS_WEIGHTS)
        self.classifier = DigitClassifier()
        try:
            state = load_file(path)
            self.classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"digit classifier weights do not load: {path} ({type(error).__name__}); reinstall the package"
            ) from error
        self.requires_grad_(False)
        self.eval()

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """uint8 images `[B, 3, 28, 28]` to the requested layers, in the order they were requested."""
        if input.dtype != torch.uint8 or input.ndim != 4 or input.shape[1] != 3:
            raise ValueError(f"expected uint8 [B, 3, 28, 28], got {input.dtype} {tuple(input.shape)}")
        _check_image_size("digits", self.SIZE, input.shape[2], input.shape[3])
        grey = input.float().mean(dim=1, keepdim=True) / 127.5 - 1
        features = self.classifier.features(grey)
        layers = {"features": features, "logits": self.classifier.head(features.relu())}
        return tuple(layers[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "features", "kid": "features", "prc": "features"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, DigitsFeatureExtractor.SIZE, DigitsFeatureExtractor.SIZE, dtype=torch.uint8)


if "digits" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("digits", DigitsFeatureExtractor)


def describe(extractor: str) -> Extractor:
    """The entry of an extractor's name. Raises UserError naming the nearest known one."""
    if extractor not in EXTRACTORS:
        raise UserError(f"unknown feature extractor {extractor!r}; {nearest(extractor, EXTRACTORS)}")
    return EXTRACTORS[extractor]


def feature_size(extractor: str) -> int:
    """Number of features F of an extractor. Raises UserError for an unknown name."""
    return describe(extractor).size


def weights_file(extractor: str) -> Path:
    """The file an extractor's weights are read from, fetched first where the extractor has a public release.

    Raises UserError when the file is missing and cannot be fetched.
    """
    describe(extractor)
    return DIGITS_WEIGHTS if extractor == "digits" else _inception_weights()


def weights_hash(extractor: str) -> str:
    """SHA-256 (hexadecimal) of an extractor's weights file: scores of other weights are other scores."""
    digest = hashlib.sha256()
    path = weights_file(extractor)
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"weights of extractor {extractor!r} cannot be read: {path}; reinstall the package") from error
    return digest.hexdigest()


def load(extractor: str, layer: str | None = None, device: torch.device | str | None = None) -> nn.Module:
    """The extractor as a frozen module: uint8 `[B, 3, H, W]` to a tuple holding one tensor `[B, F]`.

    `layer` defaults to the one scores are computed in. Raises UserError as `weights_file` does, and for
    weights that do not load.
    """
    entry = describe(extractor)
    path = weights_file(extractor)
    if extractor == "inception":
        # torch-fidelity unpickles the file unrestricted: let it see only a file that loads as plain tensors.
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"inception weights do not load: {path} ({type(error).__name__}); delete the file to fetch it again"
            ) from error
    module = create_feature_extractor(
        entry.registered_name,
        [layer or entry.layer],
        cuda=False,
        feature_extractor_weights_path=str(path),
        verbose=False,
    )
    return module.to(device or "cpu")


def extract(
    images: Tensor,
    extractor: str,
    *,
    layer: str | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> NDArray[np.float64]:
    """Features of uint8 images `[N, H, W, C]` (C of 1 or 3; grey is repeated) as float64 `[N, F]`.

    The network itself runs in fp32 with TF32 off. `device` defaults to the images' own. Raises UserError for
    an unknown extractor, an image size it does not take, and weights that are missing.
    """
    entry = describe(extractor)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            "images to extract features from must be uint8 [N, H, W, 1 or 3], not"
            f" {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        )
    if entry.image_size is not None:
        _check_image_size(extractor, entry.image_size, images.shape[1], images.shape[2])
    if len(images) == 0:
        raise UserError("there are no images to extract features from")
    device = torch.device(device) if device is not None else images.device
    module = load(extractor, layer, device)
    rows = []
    with torch.no_grad(), _full_precision():
        for batch in images.split(batch_size):
            pixels = batch.to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
            rows.append(module(pixels)[0].cpu())
    return torch.cat(rows).numpy().astype(np.float64)


class _full_precision:
    """TF32 off for matrix products and convolutions inside the block: scores must not depend on the GPU."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


def _check_image_size(extractor: str, expected: int, height: int, width: int) -> None:
    if (height, width) != (expected, expected):
        raise UserError(
            f"feature extractor {extractor!r} takes images of {expected}x{expected} pixels, not"
            f" {width}x{height}; name another extractor or give images of that size"
        )


def _inception_weights() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            raise UserError(
                f"the inception extractor needs {path.name}, and it could not be downloaded: get that file"
                f" from torch-fidelity's releases on a machine with network and put it at {path}"
            ) from error
    return path
