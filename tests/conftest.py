"""What the tests share: the golden tensors, and one thread so that results do not depend on the machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from grafting.data import Data, LatentSet
from grafting.hosts.base import HostCard
from grafting.hosts.codec import Codec
from grafting.hosts.dit import DiT, DiTHost

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_path() -> Callable[[str], Path]:
    """`golden_path(NAME)`: the path of `tests/golden/NAME.safetensors`."""
    return lambda name: GOLDEN / f"{name}.safetensors"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """`golden(NAME)`: the tensors of `tests/golden/NAME.safetensors`."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], dict[str, Any]]:
    """`golden_json(NAME)`: what `tests/golden/NAME.json` says about the tensors."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """`max|a − b| / max|b|`, the measure of the golden files' tolerances; shapes must agree."""

    def measure(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        return ((a - b).abs().max() / b.abs().max()).item()

    return measure


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latents and reference statistics of a test run stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFTING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny_host() -> DiTHost:
    """A DiT of four narrow blocks with random, non-zero weights, on the latents of the embedded digits."""
    torch.manual_seed(0)
    model = DiT(
        input_size=7, patch_size=1, in_channels=4, hidden_size=32, depth=4, num_heads=2, mlp_ratio=2.0, num_classes=10
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    card = HostCard(name="tiny", guidance=1.5, guidance_channels=None, sampler="ddim", sampling_steps=3)
    card = card.model_copy(update={"feature_extractor": "digits", "pretraining_samples": 1000})
    return DiTHost(model, card=card, codec=Codec("embedded:digits-dit"), source="tests")


@pytest.fixture(scope="session")
def latents() -> Data:
    """Random latents of the digits' shape, with labels: no codec runs."""
    draw = torch.Generator().manual_seed(1)

    def part(n: int) -> LatentSet:
        images = torch.zeros(n, 28, 28, 1, dtype=torch.uint8)
        mean = torch.randn(n, 4, 7, 7, generator=draw)
        return LatentSet(mean, torch.full_like(mean, 0.1), torch.arange(n) % 10, images, 28, 1)

    return Data(part(64), part(32), "random")
