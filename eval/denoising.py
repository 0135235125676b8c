"""Held-out denoising loss, paired: every model meets the same images, timesteps and noises.

Far more sensitive than FID to small changes of a model, since the differences of images, timesteps and noises
cancel in a pair. Legend: N images, M = N · repeats items, B batch, C latent channels, H × W latent size.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from grafting.diffusion import DiffusionProcess
from grafting.errors import UserError
from grafting.seeding import generator

Z_95 = 1.959963984540054  # 97.5% quantile of the standard normal


class Denoiser(Protocol):
    """What is asked of a host here."""

    process: DiffusionProcess

    @property
    def device(self) -> torch.device: ...

    def denoise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor: ...


class Summary(BaseModel):
    """Mean of `n` numbers, its standard error, and the normal 95% interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    standard_error: float
    interval: tuple[float, float]
    n: int


def items(count: int, timesteps: int, seed: int) -> tuple[Tensor, list[torch.Generator]]:
    """Timesteps `[count]` in 0..timesteps−1 and the generator of each item's noise.

    The range is cut into `count` equal strata, one timestep is drawn in each, and a random permutation deals
    them to the items. The noise of item i depends on (seed, i) alone.
    """
    draw = generator(seed, "denoising", "timesteps")
    strata = torch.randperm(count, generator=draw).double()
    position = (strata + torch.rand(count, generator=draw, dtype=torch.float64)) / count
    t = (position * timesteps).long().clamp(max=timesteps - 1)
    return t, [generator(seed, "denoising", i) for i in range(count)]


@torch.no_grad()
def denoising_loss(
    host: Denoiser, latents: Tensor, labels: Tensor, seed: int, *, repeats: int = 1, batch_size: int = 64
) -> Tensor:
    """Mean squared error of epsilon per item, float32 `[N · repeats]` on the CPU.

    Takes clean latents `[N, C, H, W]` and labels `[N]`. Item `i · repeats + r` is the r-th visit to image i,
    so `.view(N, repeats)` groups by image. Timesteps and noises are functions of (seed, N, repeats) alone:
    losses of two models with the same arguments are pairs, whatever the batch size or device.

    Raises UserError when labels and latents differ in number or there are none.
    """
    if len(latents) == 0 or labels.shape != (len(latents),):
        raise UserError(
            f"the denoising loss needs one label per latent: {len(latents)} latents, labels {list(labels.shape)}"
        )
    count = len(latents) * repeats
    t, draws = items(count, len(host.process), seed)
    losses = []
    for index in torch.arange(count).split(batch_size):
        noise = torch.stack([torch.randn(latents.shape[1:], generator=draws[i]) for i in index.tolist()])
        image = (index // repeats).to(latents.device)
        condition = labels[image.to(labels.device)].to(host.device)

        def model(z: Tensor, timestep: Tensor, condition: Tensor = condition) -> Tensor:
            return host.denoise(z, timestep, condition)

        x0 = latents[image].to(host.device, torch.float32)
        losses.append(host.process.losses(model, x0, t[index].to(host.device), noise.to(host.device))["mse"].cpu())
    return torch.cat(losses).float()


def summary(losses: Tensor, repeats: int = 1) -> Summary:
    """Mean of `[N · repeats]` losses with its standard error and normal 95% interval.

    Visits to one image are averaged first, since they are not independent. Stratified timesteps make the mean
    steadier than the standard error of independent draws says: the interval is conservative.

    Raises UserError for fewer than two images.
    """
    values = losses.double().reshape(-1, repeats).mean(dim=1)
    if len(values) < 2:
        raise UserError(f"an interval needs at least 2 images, got {len(values)}")
    mean = values.mean().item()
    error = values.std().item() / math.sqrt(len(values))
    return Summary(mean=mean, standard_error=error, interval=(mean - Z_95 * error, mean + Z_95 * error), n=len(values))


def paired_difference(a: Tensor, b: Tensor, repeats: int = 1) -> Summary:
    """`summary` of a − b for losses of two models over the same items; negative where a is better.

    Raises UserError when they differ in number.
    """
    if a.shape != b.shape:
        raise UserError(f"paired losses differ in number: {len(a)} and {len(b)}; compute them over the same images")
    return summary(a.double() - b.double(), repeats)
