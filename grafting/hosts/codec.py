"""Between images and latents: the VAE a latent diffusion transformer was trained with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grafting.errors import UserError
from grafting.hosts import embedded


class Codec:
    """A diffusers `AutoencoderKL`, loaded when first used.

    `spec` is a folder, a hub id, or `embedded:NAME`. Latents are scaled by the VAE's `scaling_factor`.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._device = torch.device("cpu")
        self._vae: Any = None  # an AutoencoderKL; diffusers is imported when it is needed

    @property
    def vae(self) -> Any:
        """The VAE in float32. Raises UserError when it cannot be loaded."""
        if self._vae is None:
            from diffusers import AutoencoderKL  # seconds of imports that a mere plan does not need

            where = embedded.folder(self.spec) / "vae" if self.spec.startswith("embedded:") else self.spec
            local = Path(where).expanduser()
            if local.is_dir() and (local / "vae").is_dir():
                local = local / "vae"
            try:
                vae = AutoencoderKL.from_pretrained(str(local if local.is_dir() else where), torch_dtype=torch.float32)
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise UserError(
                    f"vae: cannot load {self.spec!r} ({reason[:200]}); name a folder saved by diffusers' AutoencoderKL"
                ) from error
            self._vae = vae.eval().requires_grad_(False).to(self._device)
        return self._vae

    def fingerprint(self) -> str:
        """Hash of the VAE's config and weights."""
        digest = hashlib.sha256(
            repr(sorted(item for item in self.vae.config.items() if not item[0].startswith("_"))).encode()
        )
        for key, value in self.vae.state_dict().items():
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        if self._vae is not None:
            self._vae.to(self._device)

    @property
    def channels(self) -> int:
        """Image channels: 1 for grey, 3 for colour."""
        return int(self.vae.config.in_channels)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
        """Images uint8 `[N, H, W, C]` to mean and standard deviation of their scaled latents, on the CPU."""
        means, deviations = [], []
        scale = self.vae.config.scaling_factor
        for chunk in images.split(batch_size):
            x = chunk.to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = self.vae.encode(x).latent_dist
            means.append(posterior.mean.cpu() * scale)
            deviations.append(posterior.std.cpu() * scale)
        return torch.cat(means), torch.cat(deviations)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Scaled latents `[N, C, H, W]` to images uint8 `[N, H, W, C]` on the CPU."""
        out = []
        for chunk in latents.split(batch_size):
            x = self.vae.decode(chunk.to(self._device) / self.vae.config.scaling_factor).sample
            out.append((127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu())
        return torch.cat(out)
