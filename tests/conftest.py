"""What the tests share: the golden tensors, and one thread so that results do not depend on the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

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
