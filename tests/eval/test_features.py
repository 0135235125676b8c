"""Feature extractors by name, against the classifier itself and torch-fidelity's own entry points."""

from __future__ import annotations

import os
import urllib.error

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors.torch import load_file

from grafting.errors import UserError
from grafting.eval import features
from grafting.eval.digits import DigitClassifier


def random_images(n: int, channels: int = 1, seed: int = 0, size: int = 28) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, size, size, channels), generator=draw, dtype=torch.uint8)


def test_digits_features_are_the_classifiers_own() -> None:
    images = random_images(5)
    model = DigitClassifier().eval()
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(features.DIGITS_WEIGHTS).items()}
    )
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected, logits = model.features(pixels), model(pixels)
    got = features.extract(images, "digits")
    assert got.shape == (5, features.feature_size("digits")) == (5, 64)
    assert got.dtype == np.float64
    # float32 convolutions in another batch layout: a few units in the last place of values of order 10.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features.extract(images, "digits", layer="logits"), logits, rtol=1e-4, atol=1e-4)


def test_grey_and_repeated_grey_and_any_batch_size_agree() -> None:
    grey = random_images(7)
    whole = features.extract(grey, "digits")
    np.testing.assert_allclose(features.extract(grey.expand(-1, -1, -1, 3), "digits"), whole, rtol=1e-6)
    np.testing.assert_allclose(features.extract(grey, "digits", batch_size=2), whole, rtol=1e-4, atol=1e-4)


def test_torch_fidelity_scores_with_the_registered_extractor() -> None:
    class Pixels(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, seed: int) -> None:
            self.images = random_images(80, 3, seed).permute(0, 3, 1, 2).contiguous()

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.images[index]

    metrics = torch_fidelity.calculate_metrics(
        input1=Pixels(1), input2=Pixels(2), fid=True, feature_extractor="digits", cuda=False, cache=False,
        verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    assert metrics["frechet_inception_distance"] > 0


def test_unknown_extractor_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'digits'"):
        features.extract(random_images(2), "digit")
    with pytest.raises(UserError, match="unknown feature extractor 'resnet'"):
        features.feature_size("resnet")


@pytest.mark.parametrize(
    "images",
    [
        random_images(2, size=32),
        random_images(2).float(),
        random_images(2).permute(0, 3, 1, 2),
        random_images(0),
    ],
    ids=["size", "dtype", "layout", "empty"],
)
def test_images_that_do_not_fit_are_one_line(images: torch.Tensor) -> None:
    with pytest.raises(UserError) as error:
        features.extract(images, "digits")
    assert "\n" not in str(error.value)


def test_missing_inception_weights_are_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as error:
        features.extract(random_images(2, 3), "inception")
    message = str(error.value)
    assert "\n" not in message
    assert "torch-fidelity" in message
    assert str(tmp_path / "checkpoints") in message


def test_inception_weights_never_run_code(tmp_path, monkeypatch) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / features.URL_INCEPTION_V3.rsplit("/", 1)[1]
    torch.save({"weight": Attack()}, path)
    with pytest.raises(UserError, match="do not load"):
        features.extract(random_images(2, 3), "inception")
    assert not (tmp_path / "ran").exists()


def test_damaged_digit_weights_are_one_line(tmp_path, monkeypatch) -> None:
    damaged = tmp_path / "classifier.safetensors"
    damaged.write_bytes(features.DIGITS_WEIGHTS.read_bytes()[:1000])
    monkeypatch.setattr(features, "DIGITS_WEIGHTS", damaged)
    with pytest.raises(UserError, match=r"do not load: .*classifier\.safetensors"):
        features.extract(random_images(2), "digits")
