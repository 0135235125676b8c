"""Stage 2, lightweight finetuning: the hybrid end to end, with the host's own diffusion loss.

Optionally plus distillation from the host: the squared difference of predicted noise and variance values.
The hybrid ends with the exponential moving average of its weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grafting.config import FinetuneConfig
from grafting.data import Batch, Data
from grafting.distill import single_process
from grafting.errors import UserError
from grafting.hosts.base import Host
from grafting.progress import track

Log = Callable[[dict[str, Any]], None]


@dataclass
class FinetuneResult:
    """What stage 2 did."""

    samples: int
    seconds: float
    final_loss: float


def parameter_groups(hybrid: Host, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Optimizer groups: the operators in every grafted slot, and the host's own layers (absent when frozen)."""
    new = {id(p) for slot in hybrid.grafts for p in hybrid.operator(slot).parameters()}
    grafted = [p for p in hybrid.model.parameters() if id(p) in new and p.requires_grad]
    old = [p for p in hybrid.model.parameters() if id(p) not in new and p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": grafted, "peak_lr": config.lr_new, "name": "new"},
        {"params": old, "peak_lr": config.lr_old, "name": "old"},
    ]
    return [{**group, "lr": group["peak_lr"]} for group in groups if group["params"] and group["peak_lr"] > 0]


def finetune(
    hybrid: Host,
    data: Data,
    config: FinetuneConfig | None = None,
    *,
    teacher: Host | None = None,
    seed: int = 0,
    log: Log | None = None,
) -> FinetuneResult:
    """Train the hybrid in place. `teacher` is needed when `teacher_weight` is positive.

    Raises UserError for a config that does not fit, and when the loss stops being finite.
    """
    config = config or FinetuneConfig()
    if config.batch_size % config.accumulate:
        raise UserError(
            f"finetune.accumulate: batch_size {config.batch_size} does not divide into {config.accumulate} parts"
        )
    if config.teacher_weight > 0 and teacher is None:
        raise UserError("finetune.teacher_weight: needs the host as teacher (finetune(..., teacher=host))")
    torch.set_flush_denormal(True)
    accelerator = single_process(config.mixed_precision)
    hybrid.to(accelerator.device)
    hybrid.model.requires_grad_(True).train()
    if teacher is not None and config.teacher_weight > 0:
        teacher.to(accelerator.device)
        teacher.model.eval().requires_grad_(False)
    groups = parameter_groups(hybrid, config)
    if not groups:
        raise UserError("finetune: lr_old is 0 and nothing is grafted, so there is nothing to train")
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, foreach=True)
    model, optimizer = accelerator.prepare(hybrid.model, optimizer)
    average = copy.deepcopy(hybrid.model)
    dropout = hybrid.class_dropout_prob if config.label_dropout is None else config.label_dropout
    train = data.train.subset(config.images, seed)
    record = log or (lambda _: None)
    started = time.perf_counter()
    recent: list[dict[str, Tensor]] = []
    final_loss = float("nan")

    def loss_of(batch: Batch) -> dict[str, Tensor]:
        xt = hybrid.process.q_sample(batch.x0, batch.t, batch.noise)
        with accelerator.autocast():
            output = model(xt, batch.t, batch.labels)
        parts = {
            k: v.mean() for k, v in hybrid.process.losses_of_output(output, batch.x0, xt, batch.t, batch.noise).items()
        }
        if teacher is not None and config.teacher_weight > 0:
            with torch.no_grad(), accelerator.autocast():
                target = teacher.denoise(xt, batch.t, batch.labels)
            parts["teacher"] = nn.functional.mse_loss(output.float(), target.float())
            parts["loss"] = parts["loss"] + config.teacher_weight * parts["teacher"]
        return parts

    with track(config.steps, "finetuning") as progress:
        for step in range(config.steps):
            batch = train.batch(
                "finetune",
                step,
                config.batch_size,
                seed=seed,
                null_class=hybrid.null_class,
                label_dropout=dropout,
            )
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * config.rate(step)
            optimizer.zero_grad(set_to_none=True)
            pieces = []
            for micro in batch.split(config.accumulate):
                parts = loss_of(micro.to(accelerator.device))
                accelerator.backward(parts["loss"] / config.accumulate)
                pieces.append({key: value.detach() for key, value in parts.items()})
            norm = accelerator.clip_grad_norm_(trained, config.clip)
            means = {key: torch.stack([piece[key] for piece in pieces]).mean() for key in pieces[0]}
            scaled = accelerator.scaler is not None
            if not torch.isfinite(means["loss"]) or (norm is not None and not scaled and not torch.isfinite(norm)):
                raise UserError(
                    f"finetune: the loss is not finite at step {step + 1}; lower finetune.lr_new and lr_old, or use"
                    " mixed_precision: bf16 or no"
                )
            optimizer.step()
            update_average(average, hybrid.model, min(config.ema_decay, (step + 1) / (step + 10)))
            recent.append({**means, "gradient_norm": norm} if norm is not None else means)
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                values = {key: torch.stack([item[key] for item in recent]).mean().item() for key in recent[0]}
                final_loss = values["loss"]
                record({"stage": "finetune", "step": step + 1, **values, "lr": optimizer.param_groups[0]["lr"]})
                recent = []
            progress.advance(note=f"loss {final_loss:.4f}" if final_loss == final_loss else "")
    hybrid.model.load_state_dict(average.state_dict())
    optimizer.zero_grad(set_to_none=True)
    hybrid.model.eval()
    return FinetuneResult(config.steps * config.batch_size, time.perf_counter() - started, final_loss)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move every averaged weight towards the model's: `a ← decay · a + (1 − decay) · w`; buffers are copied."""
    pairs = [(a, w) for a, w in zip(average.parameters(), model.parameters(), strict=True) if w.requires_grad]
    torch._foreach_lerp_([a for a, _ in pairs], [w for _, w in pairs], 1 - decay)
    for a, w in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(w)
