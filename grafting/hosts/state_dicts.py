"""Weights files read into state dicts, and checked against a model key for key.

Nothing is executed: pickles that want to call anything are refused.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from grafting.errors import UserError

StateDict: TypeAlias = dict[str, Tensor]
Result = TypeVar("Result")

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def read_state_dict(path: str | Path) -> StateDict:
    """Tensors by name of a `.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin` file, on the CPU, as stored.

    Of a training checkpoint the `ema` weights are taken, else `model`, else `state_dict`; a prefix `module.`
    or `_orig_mod.` that all keys have is dropped. Pickles are read by torch's weights-only unpickler.

    Raises UserError when the file is missing, damaged, of another format, holds anything but tensors or would
    have to execute code.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"weights not found: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the weights file in it")
    if path.suffix == ".safetensors":
        try:
            loaded: Any = load_safetensors(path)
        except Exception as error:  # SafetensorError, OSError
            raise UserError(f"{path} is not a readable safetensors file ({first_line(error)})") from error
    elif path.suffix in PICKLE_SUFFIXES:
        loaded = _load_pickle(path)
    else:
        known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise UserError(f"{path} is not a weights file; expected one that ends in {known}")
    return _flat_state_dict(loaded, path)


def _load_pickle(path: Path) -> Any:
    load: Callable[..., Any] = torch.load
    try:
        # The original's training script stores its arguments as an argparse.Namespace: plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            with path.open("rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"  # only torch's own zip format can be memory-mapped
            return load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever a damaged pickle makes the unpickler stumble on
        forbidden = re.search(r"GLOBAL\s+`?([\w.]+)", str(error))
        if forbidden:
            raise UserError(
                f"{path} is refused: its pickle asks for {forbidden[1]}, and only tensors and plain data are"
                " read; save the state dict alone, best as safetensors"
            ) from error
        raise UserError(
            f"{path} is not a readable PyTorch weights file: truncated, or of another format; get it again"
        ) from error


def _flat_state_dict(loaded: Any, path: Path) -> StateDict:
    """The tensors of what a file holds, unwrapped."""
    while isinstance(loaded, Mapping):
        wrapper = next((key for key in ("ema", "model", "state_dict") if isinstance(loaded.get(key), Mapping)), None)
        if wrapper is None:
            break
        loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds no state dict but a {type(loaded).__name__}")
    odd = [str(key) for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise UserError(f"{path} holds no state dict: no tensor under {listed(odd)}")
    if not loaded:
        raise UserError(f"{path} holds no weights")
    state_dict = dict(loaded)
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def check_fit(expected: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    if missing or unexpected:
        grafted = any(re.match(r"blocks\.\d+\.(attn|mlp)\.", key) for key in unexpected)
        raise UserError(
            f"weights do not fit this DiT: missing {listed(missing)}, unexpected {listed(unexpected)}"
            + ("; a grafted checkpoint is read by grafting.import_reference" if grafted else "")
        )
    for key, shape in expected.items():
        value = state_dict[key]
        if tuple(value.shape) != shape:
            raise UserError(f"weights do not fit this DiT: {key} is {shape_of(value)}, expected {list(shape)}")
        if not value.is_floating_point():
            raise UserError(f"weights do not fit this DiT: {key} is {value.dtype}, not floating point")


def below(state_dict: Mapping[str, Tensor], prefix: str) -> StateDict:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def located(path: Path, action: Callable[[], Result]) -> Result:
    """The action's result; its UserError says which file it was about."""
    try:
        return action()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def listed(keys: Iterable[str], limit: int = 4) -> str:
    keys = list(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return (", ".join(keys[:limit]) or "none") + more


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
