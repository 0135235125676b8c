"""Images to latents to batches.

A batch is a function of (seed, stage, step) alone: which images, which latents of their posteriors, which
timesteps, which noise, which dropped labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import save_file
from torch import Tensor

from grafting.config import DataConfig
from grafting.errors import UserError, nearest
from grafting.files import replacing_file
from grafting.hosts import embedded
from grafting.hosts.base import Host
from grafting.progress import track
from grafting.seeding import generator
from grafting.surgery import load_weights

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def cache_folder() -> Path:
    """Where latents and reference statistics are kept between runs."""
    import os

    return Path(os.environ.get("GRAFTING_CACHE", Path.home() / ".cache" / "grafting")).expanduser()


@dataclass(frozen=True)
class Batch:
    """`x0 [B, C, H, W]` clean latents, `labels [B]` (dropped ones are the null class), `t [B]`, `noise` like `x0`."""

    x0: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.x0.to(device), self.labels.to(device), self.t.to(device), self.noise.to(device))

    def split(self, parts: int) -> list[Batch]:
        """Equal micro-batches."""
        pieces = zip(*(part.chunk(parts) for part in (self.x0, self.labels, self.t, self.noise)), strict=True)
        return [Batch(*piece) for piece in pieces]


@dataclass(frozen=True)
class LatentSet:
    """Posterior `mean` and `std [N, C, H, W]` of N images, their labels `[N]`, and the images themselves on demand."""

    mean: Tensor
    std: Tensor
    labels: Tensor
    image_source: Tensor | list[Path]
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.labels)

    def images(self) -> Tensor:
        """All images, uint8 `[N, H, W, C]`."""
        if isinstance(self.image_source, Tensor):
            return self.image_source
        return torch.stack([read_image(path, self.image_size, self.channels) for path in self.image_source])

    def subset(self, count: int | None, seed: int) -> LatentSet:
        """At most `count` images, drawn by seed, as evenly over the classes as they allow."""
        if count is None or count >= len(self):
            return self
        order = torch.randperm(len(self), generator=generator(seed, "subset"))
        labels = self.labels[order]
        rank = torch.empty(len(self), dtype=torch.long)
        for label in labels.unique():
            members = labels == label
            rank[members] = torch.arange(int(members.sum()))
        keep = order[torch.argsort(rank, stable=True)[:count]]
        source = (
            self.image_source[keep]
            if isinstance(self.image_source, Tensor)
            else [self.image_source[i] for i in keep.tolist()]
        )
        return LatentSet(self.mean[keep], self.std[keep], self.labels[keep], source, self.image_size, self.channels)

    def batch(
        self,
        stage: str,
        step: int,
        size: int,
        *,
        seed: int,
        null_class: int,
        label_dropout: float,
        timesteps: int = 1000,
    ) -> Batch:
        """The global batch of a step. Each pass over the images takes every one once, in an order of its own."""
        positions = np.arange(step * size, (step + 1) * size)
        index = torch.empty(size, dtype=torch.long)
        for epoch in np.unique(positions // len(self)):
            order = torch.randperm(len(self), generator=generator(seed, stage, "epoch", int(epoch)))
            inside = positions // len(self) == epoch
            index[torch.from_numpy(inside)] = order[torch.from_numpy(positions[inside] % len(self))]
        draw = generator(seed, stage, "step", step)
        shape = (size, *self.mean.shape[1:])
        x0 = self.mean[index] + self.std[index] * torch.randn(shape, generator=draw)
        t = torch.randint(timesteps, (size,), generator=draw)
        noise = torch.randn(shape, generator=draw)
        dropped = torch.rand(size, generator=draw) < label_dropout
        labels = torch.where(dropped, torch.tensor(null_class), self.labels[index])
        return Batch(x0, labels, t, noise)


@dataclass(frozen=True)
class Data:
    """Training images and images held out from it."""

    train: LatentSet
    held_out: LatentSet
    source: str


def load_data(config: DataConfig, host: Host) -> Data:
    """Images of a source as the host's latents; latents are cached by the hash of images and codec.

    Raises UserError when the source is missing, empty, or has other classes than the host.
    """
    if host.codec is None:
        raise UserError(f"host {host.card.name!r} has no codec; name its VAE with vae: FOLDER or hub id")
    size = host.latent_shape[1] * host.codec.downsampling
    if config.source.startswith(embedded.PREFIX):
        sets = {}
        for part, (images, labels) in embedded_images(config.source).items():
            if tuple(images.shape[1:]) != (size, size, host.codec.channels):
                raise UserError(
                    f"data.source: {config.source} holds {tuple(images.shape[1:])} images and {host.card.name} needs"
                    f" {(size, size, host.codec.channels)}"
                )
            sets[part] = _encode(images, labels, host, size)
        return Data(sets["train"], sets["held_out"], config.source)
    paths, labels = list_images(Path(config.source).expanduser())
    if int(labels.max()) >= host.num_classes:
        raise UserError(
            f"data.source: {config.source} has {int(labels.max()) + 1} classes (sub-folders) and {host.card.name} knows"
            f" {host.num_classes}"
        )
    # A share of every class is held out; which files is decided by their names' hash, so adding files moves none.
    scores = [int.from_bytes(hashlib.blake2b(p.name.encode(), digest_size=8).digest(), "big") / 2**64 for p in paths]
    held_out = torch.tensor([score < config.held_out for score in scores])
    if held_out.all() or not held_out.any():
        raise UserError(
            f"data.source: {config.source} has too few images ({len(paths)}) to hold out {config.held_out:.0%}"
        )
    parts = []
    for chosen in (~held_out, held_out):
        kept = [path for path, keep in zip(paths, chosen.tolist(), strict=True) if keep]
        parts.append(_encode(kept, labels[chosen], host, size))
    return Data(parts[0], parts[1], config.source)


def embedded_images(source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """`train` and `held_out` images uint8 `[N, H, W, C]` and labels `[N]` of `embedded:NAME`."""
    if source.removeprefix(embedded.PREFIX) not in embedded.DATA:
        raise UserError(f"{source!r} is not embedded data; {nearest(source, map('embedded:{}'.format, embedded.DATA))}")
    arrays = np.load(embedded.folder(source) / "data.npz")
    return {
        part: (
            torch.from_numpy(arrays[f"{part}_images"])[..., None],
            torch.from_numpy(arrays[f"{part}_labels"]).long(),
        )
        for part in ("train", "held_out")
    }


def list_images(folder: Path) -> tuple[list[Path], Tensor]:
    """Image files of a folder with one sub-folder per class, sorted, and their labels (order of the names)."""
    if not folder.is_dir():
        raise UserError(f"data.source: {folder} is no folder; name a folder with one sub-folder of images per class")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths, labels = [], []
    for label, sub in enumerate(classes):
        files = sorted(path for path in sub.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise UserError(f"data.source: {folder} holds no sub-folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths, torch.tensor(labels)


def read_image(path: Path, size: int, channels: int) -> Tensor:
    """One image as uint8 `[size, size, C]`, resized and centre-cropped as ADM does: box halvings, then bicubic."""
    try:
        image = Image.open(path).convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UserError(f"data.source: {path} is not a readable image ({error}); mend or remove it") from error
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    array = np.asarray(image)[top : top + size, left : left + size]
    return torch.from_numpy(array.copy()).reshape(size, size, channels)


def _encode(images: Tensor | list[Path], labels: Tensor, host: Host, size: int, chunk: int = 64) -> LatentSet:
    """Latents from the cache, or encoded now."""
    assert host.codec is not None
    digest = hashlib.sha256(f"{host.codec.fingerprint()} {size}".encode())
    if isinstance(images, Tensor):
        digest.update(images.numpy().tobytes())
    else:
        for path in images:
            status = path.stat()
            digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    cached = cache_folder() / "latents" / f"{digest.hexdigest()[:32]}.safetensors"
    channels = host.codec.channels
    if cached.is_file():
        try:
            state = load_weights(cached)
            return LatentSet(state["mean"], state["std"], labels, images, size, channels)
        except (UserError, KeyError):
            cached.unlink()  # a damaged cache is made again
    means, stds = [], []
    with track(len(images), "encoding images") as progress:
        for start in range(0, len(images), chunk):
            part = images[start : start + chunk]
            pixels = part if isinstance(part, Tensor) else torch.stack([read_image(p, size, channels) for p in part])
            mean, std = host.codec.encode(pixels)
            means.append(mean)
            stds.append(std)
            progress.advance(len(pixels))
    mean, std = torch.cat(means).contiguous(), torch.cat(stds).contiguous()
    if tuple(mean.shape[1:]) != host.latent_shape:
        raise UserError(
            f"vae: {host.codec.spec} makes latents {tuple(mean.shape[1:])}, {host.card.name} needs {host.latent_shape}"
        )
    with replacing_file(cached) as temporary:
        save_file({"mean": mean, "std": std}, temporary)
    return LatentSet(mean, std, labels, images, size, channels)
