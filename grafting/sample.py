"""Draw images from a host or hybrid.

The noise of image i depends on the seed and i alone, so the batch size and the number of processes change
nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from accelerate import Accelerator
from torch import Tensor

from grafting.config import Precision, Sampler
from grafting.diffusion import DiffusionProcess
from grafting.errors import UserError
from grafting.hosts.base import Host
from grafting.progress import track
from grafting.seeding import generator


def balanced_labels(n: int, num_classes: int) -> Tensor:
    """Labels `[n]` that go through the classes in turn."""
    return torch.arange(n) % num_classes


def sample(
    hybrid: Host,
    n: int = 16,
    *,
    condition: int | Sequence[int] | Tensor | None = None,
    steps: int | str | None = None,
    guidance: float | None = None,
    guidance_channels: int | str | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 128,
    mixed_precision: Precision = "no",
) -> Tensor:
    """Images uint8 `[n, H, W, C]` on the CPU.

    `condition` is a class, n classes, or None for all classes in turn. What is None follows the host's card;
    `guidance_channels="all"` guides every latent channel. Raises UserError for a class the host does not know.
    """
    if hybrid.codec is None:
        raise UserError(f"{hybrid.card.name!r} has no codec to decode its latents; load it with vae: FOLDER or hub id")
    latents = sample_latents(
        hybrid,
        n,
        condition=condition,
        steps=steps,
        guidance=guidance,
        guidance_channels=guidance_channels,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
    )
    return hybrid.codec.decode(latents)


@torch.no_grad()
def sample_latents(
    hybrid: Host,
    n: int,
    *,
    condition: int | Sequence[int] | Tensor | None = None,
    steps: int | str | None = None,
    guidance: float | None = None,
    guidance_channels: int | str | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 128,
    mixed_precision: Precision = "no",
) -> Tensor:
    """Latents `[n, C, H, W]` on the CPU; arguments as for `sample`."""
    torch.set_flush_denormal(True)
    card = hybrid.card
    labels = _labels(condition, n, hybrid)
    scale = card.guidance if guidance is None else guidance
    channels = card.guidance_channels if guidance_channels is None else guidance_channels
    kept = None if channels is None or channels == "all" else int(channels)
    sampler = sampler or card.sampler
    if sampler not in get_args(Sampler):
        raise UserError(f"sample.sampler: {sampler!r} is not known; use {', '.join(get_args(Sampler))}")
    process = DiffusionProcess(len(hybrid.process), steps or card.sampling_steps)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    device = hybrid.device
    out = []
    hybrid.model.eval()
    with track(n, "sampling") as progress:
        for start in range(0, n, batch_size):
            indices = range(start, min(start + batch_size, n))
            noises = _noises(hybrid, seed, indices, device)
            y = labels[start : start + batch_size].to(device)

            def predict(z: Tensor, t: Tensor, y: Tensor = y) -> Tensor:
                with accelerator.autocast():
                    return hybrid.guided(z, t, y, scale, kept)

            z = next(noises)
            if sampler == "dpm_solver":
                out.append(process.dpm_solver(predict, z).cpu())
            elif sampler == "ddim":
                out.append(process.ddim(predict, z).cpu())
            else:
                out.append(process.ancestral(predict, z, noises).cpu())
            progress.advance(len(indices))
    return torch.cat(out)


def _noises(hybrid: Host, seed: int, indices: range, device: torch.device) -> Iterator[Tensor]:
    """Starting latents, then the noise of every step; row i comes from a generator of (seed, i)."""
    draws = [generator(seed, "sample", index) for index in indices]
    while True:
        yield torch.stack([torch.randn(hybrid.latent_shape, generator=draw) for draw in draws]).to(device)


def _labels(condition: int | Sequence[int] | Tensor | None, n: int, host: Host) -> Tensor:
    if condition is None:
        return balanced_labels(n, host.num_classes)
    labels = torch.as_tensor(condition, dtype=torch.long)
    labels = labels.expand(n) if labels.ndim == 0 else labels
    if labels.shape != (n,):
        raise UserError(f"condition has {labels.numel()} classes for n = {n} images; give one, or one for each image")
    known = host.num_classes
    if n and not (int(labels.min()) >= 0 and int(labels.max()) < known):
        raise UserError(f"condition: classes of {host.card.name} are 0 to {known - 1}, got {int(labels.max())}")
    return labels
