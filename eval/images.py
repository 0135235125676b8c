"""Images on disk: folders of PNG or JPG files, and `.npz` arrays. Legend: N images, H × W, C channels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from grafting.errors import UserError
from grafting.files import replacing_folder

SUFFIXES = (".png", ".jpg", ".jpeg")
LABELS = "labels.json"
IMAGE_KEYS, LABEL_KEYS = ("arr_0", "images"), ("arr_1", "labels")


def list_images(folder: str | Path) -> list[Path]:
    """The PNG and JPG files of a folder, sorted by name; subfolders and hidden files are not looked at.

    Raises UserError when the folder is missing or holds none.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise UserError(f"image folder not found: {folder}; give an existing folder of PNG or JPG files")
    if not folder.is_dir():
        raise UserError(f"not an image folder: {folder}; give a folder of PNG or JPG files, or an .npz file")
    files = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not files:
        raise UserError(f"image folder holds no PNG or JPG file: {folder}; put the images directly into it")
    return sorted(files, key=lambda p: p.name)


def read_images(path: str | Path) -> Tensor:
    """Read a folder of PNG/JPG files, or an `.npz` with `arr_0` or `images`, as uint8 `[N, H, W, C]`.

    C is 1 when every image is grey, else 3 (grey ones are repeated, alpha is dropped). Files come in the
    order of their names. Raises UserError naming the file that is missing, unreadable or of another size.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _check_pixels(_read_npz(path, IMAGE_KEYS, required=True), path)
    files = list_images(path)
    first = _read_file(files[0])
    images = np.empty((len(files), *first.shape[:2], 3), dtype=np.uint8)
    grey = True
    for index, file in enumerate(files):
        pixels = _read_file(file) if index else first
        if pixels.shape[:2] != first.shape[:2]:
            raise UserError(
                f"images differ in size: {file} is {pixels.shape[1]}x{pixels.shape[0]} pixels and "
                f"{files[0].name} is {first.shape[1]}x{first.shape[0]}; resize them to one size"
            )
        images[index] = pixels
        grey = grey and pixels.shape[2] == 1
    return torch.from_numpy(images[..., :1].copy() if grey else images)


def read_labels(path: str | Path, n: int | None = None) -> Tensor | None:
    """Labels `[N]` (int64): `labels.json` in a folder, `labels` or `arr_1` in an `.npz`; None without them.

    Raises UserError when they are not whole numbers, or are not `n` of them.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        source = path / LABELS
        if not source.exists():
            return None
        try:
            values = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"labels cannot be read: {source}; write a JSON list of whole numbers") from error
        whole = isinstance(values, list) and all(type(value) is int and abs(value) < 2**63 for value in values)
    else:
        source = path
        array = _read_npz(path, LABEL_KEYS, required=False)
        if array is None:
            return None
        whole = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
        values = array.tolist()
    if not whole:
        raise UserError(f"labels are not a list of whole numbers: {source}; write one class per image")
    if n is not None and len(values) != n:
        raise UserError(f"labels do not fit the images: {source} holds {len(values)} for {n} images")
    return torch.tensor(values, dtype=torch.int64)


def write_images(images: Tensor, folder: str | Path, labels: Tensor | Sequence[int] | None = None) -> None:
    """Write uint8 images `[N, H, W, C]` (C of 1 or 3) as 000000.png … and, with labels `[N]`, `labels.json`.

    They are written into a folder beside the target and renamed, so the target is never half written. An
    existing folder of images is replaced. Raises UserError when the target holds anything else, or when it
    cannot be written; ValueError when images or labels have the wrong form.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be uint8 [N, H, W, 1 or 3], not {images.dtype} {tuple(images.shape)}")
    numbers = None if labels is None else [int(label) for label in labels]
    if numbers is not None and len(numbers) != len(images):
        raise ValueError(f"{len(numbers)} labels for {len(images)} images")
    folder = Path(folder).expanduser().resolve()
    _refuse_to_replace(folder)
    try:
        with replacing_folder(folder) as temporary:
            for index, pixels in enumerate(images.cpu().numpy()):
                array = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
                Image.fromarray(array).save(temporary / f"{index:06d}.png")
            if numbers is not None:
                (temporary / LABELS).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"images cannot be written to {folder}: {error.strerror or error}") from error


def _refuse_to_replace(folder: Path) -> None:
    """Raise UserError unless the folder is absent or holds only what `write_images` may have written."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"images cannot be written to {folder}: it is a file; name a folder")
    for entry in folder.iterdir():
        if entry.is_dir() or (entry.suffix.lower() not in SUFFIXES and entry.name != LABELS):
            raise UserError(
                f"images cannot be written to {folder}: it holds {entry.name}, which is no image and would"
                " be lost; name another folder"
            )


def _read_file(file: Path) -> NDArray[np.uint8]:
    """One image file as uint8 `[H, W, 1 or 3]`."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"image has more than 8 bits per channel: {file}; convert it to an 8-bit PNG")
            grey = image.mode in ("1", "L", "LA", "La")
            pixels = np.array(image.convert("L" if grey else "RGB"), dtype=np.uint8)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged file: OSError, SyntaxError, struct.error …
        raise UserError(f"image cannot be read: {file}; replace or remove the file") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _read_npz(path: Path, keys: tuple[str, ...], *, required: bool) -> NDArray[np.generic] | None:
    if not path.is_file():
        raise UserError(f"image file not found: {path}; give an .npz file or a folder of PNG or JPG files")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = next((key for key in keys if key in archive.files), None)
            if found is not None:
                return archive[found]
            held = ", ".join(archive.files) or "nothing"
    except Exception as error:  # a damaged archive fails in zip, zlib or numpy's header
        raise UserError(f"array file cannot be read: {path}; write it with numpy.savez") from error
    if required:
        raise UserError(f"array file holds no {' or '.join(keys)}: {path} holds {held}")
    return None


def _check_pixels(array: NDArray[np.generic] | None, path: Path) -> Tensor:
    assert array is not None
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise UserError(f"images must be uint8 [N, H, W, 1 or 3], not {array.dtype} {list(array.shape)}: {path}")
    if len(array) == 0:
        raise UserError(f"array file holds no image: {path}")
    return torch.from_numpy(np.ascontiguousarray(array))
