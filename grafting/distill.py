"""Stage 1, activation distillation: each new operator learns to regress the output of the layer it replaces.

One forward of the frozen host serves all slots at once: a hook at each slot runs the new operator on the
slot's input, computes its loss against the slot's output, steps its own optimizer and lets the tensors go.
Nothing is written to disk and memory does not grow with the number of slots beyond the operators' weights
and optimizer state. Seed, clipping and optimizer are per slot, so a slot trained alone or with all the
others gets identical weights (arXiv 2506.05340, section 3.1, there with features on disk).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from grafting.config import DistillConfig
from grafting.data import Data
from grafting.errors import UserError
from grafting.hosts.base import Host
from grafting.operators import Grid, Operator
from grafting.progress import track

Log = Callable[[dict[str, Any]], None]
HELD_OUT_BATCHES = 4


@dataclass
class DistillResult:
    """What stage 1 did: `relative_error` per slot is ‖ŷ − y‖ / ‖y‖ on held-out images, before and after."""

    samples: int
    host_forwards: int
    seconds: float
    relative_error_fresh: dict[str, float] = field(default_factory=dict)
    relative_error: dict[str, float] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)


class SlotTrainer:
    """Trains one operator from the inputs and outputs of the layer it replaces.

    When the loss or a gradient stops being finite the slot stops and keeps its last good weights: those of
    the last time its held-out error was measured and finite.
    """

    def __init__(self, slot: str, operator: Operator, config: DistillConfig, accelerator: Accelerator) -> None:
        self.slot, self.operator, self.config = slot, operator, config
        self._autocast = accelerator.autocast
        self._scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")
        self.optimizer = torch.optim.AdamW(
            operator.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        self._ring: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.reuse)
        self._good = self._copy_weights()
        self.step = 0
        self.loss_sum, self.loss_count = torch.zeros((), device=accelerator.device), 0
        self.stopped: str | None = None
        self.squared_error, self.squared_norm = 0.0, 0.0

    def _copy_weights(self) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in self.operator.state_dict().items()}

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The objective between `[B, N, D]` outputs, averaged over all elements, in float32."""
        predicted, target = predicted.float(), target.float()
        if self.config.objective == "l1":
            return F.l1_loss(predicted, target)
        if self.config.objective == "l2":
            return F.mse_loss(predicted, target)
        return F.huber_loss(predicted, target, delta=self.config.huber_delta)

    def observe(self, x: Tensor, y: Tensor, grid: Grid) -> None:
        """Take the optimizer steps that one host forward allows: one, or `reuse` on the ring of batches."""
        if self.stopped is not None:
            return
        self._ring.append((x, y))
        for turn in range(self.config.reuse):
            if self.step < self.config.steps and self.stopped is None:
                self._train(*self._ring[turn % len(self._ring)], grid)
        if self.config.reuse == 1:
            self._ring.clear()

    def _train(self, x: Tensor, y: Tensor, grid: Grid) -> None:
        with torch.enable_grad(), self._autocast():
            loss = self.loss(self.operator(x, grid), y)
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.operator.parameters(), self.config.clip)
        # A GradScaler copes with overflowing gradients itself; without one they end the slot.
        if not torch.isfinite(loss) or (not self._scaler.is_enabled() and not torch.isfinite(norm)):
            self._stop(f"{'loss' if not torch.isfinite(loss) else 'gradient'} is not finite")
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.rate(self.step)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # now, so that only one slot's gradients are ever alive
        self.step += 1
        self.loss_sum += loss.detach()
        self.loss_count += 1

    def _stop(self, reason: str) -> None:
        self.operator.load_state_dict(self._good)
        self.optimizer.zero_grad(set_to_none=True)
        self.stopped = f"{reason} at step {self.step + 1}; kept the last good weights. Lower distill.lr"
        self._ring.clear()

    def take_loss(self) -> float | None:
        """Mean training loss since the last call."""
        mean = (self.loss_sum / self.loss_count).item() if self.loss_count else None
        self.loss_sum.zero_()
        self.loss_count = 0
        return mean

    @torch.no_grad()
    def measure(self, x: Tensor, y: Tensor, grid: Grid) -> None:
        """Add a held-out batch to the relative error."""
        with self._autocast():
            difference = self.operator(x, grid).float() - y.float()
        self.squared_error += difference.square().sum().item()
        self.squared_norm += y.float().square().sum().item()

    def take_relative_error(self) -> float:
        """‖ŷ − y‖ / ‖y‖ over the measured batches; a finite one makes the present weights the last good ones."""
        error = (self.squared_error / max(self.squared_norm, 1e-30)) ** 0.5
        self.squared_error = self.squared_norm = 0.0
        if error == error and error != float("inf"):
            if self.stopped is None:
                self._good = self._copy_weights()
        elif self.stopped is None:
            self._stop("held-out error is not finite")
        return error


def distill(
    host: Host,
    hybrid: Host,
    data: Data,
    config: DistillConfig | None = None,
    *,
    seed: int = 0,
    slots: Sequence[str] | None = None,
    log: Log | None = None,
) -> DistillResult:
    """Distil the hybrid's new operators in place from the host's own activations.

    `slots` defaults to those the last graft filled. Inputs are the host's latents noised at uniform timesteps,
    with labels dropped as in pretraining. Raises UserError when there is nothing to distil.
    """
    config = config or DistillConfig()
    slots = list(hybrid.new_slots if slots is None else slots)
    if not slots:
        raise UserError("distill: the hybrid has no new slots; graft it first, or name slots")
    torch.set_flush_denormal(True)
    accelerator = single_process(config.mixed_precision)
    host.to(accelerator.device)
    hybrid.to(accelerator.device)
    host.model.eval().requires_grad_(False)
    trainers = {slot: SlotTrainer(slot, hybrid.operator(slot), config, accelerator) for slot in slots}
    train = data.train.subset(config.images, seed)
    record = log or (lambda _: None)
    started = time.perf_counter()
    forwards = -(-config.steps // config.reuse)
    result = DistillResult(samples=forwards * config.batch_size, host_forwards=forwards, seconds=0.0)

    def run_host(
        part: Any, stage: str, step: int, size: int, use: Callable[[SlotTrainer, Tensor, Tensor], None]
    ) -> None:
        batch = part.batch(
            stage, step, size, seed=seed, null_class=host.null_class, label_dropout=host.class_dropout_prob
        ).to(accelerator.device)
        xt = host.process.q_sample(batch.x0, batch.t, batch.noise)
        with ExitStack() as hooks, torch.no_grad(), accelerator.autocast():
            for slot, trainer in trainers.items():
                module = host.model.get_submodule(host.slot(slot).module_path)
                hooks.callback(module.register_forward_hook(_hook(trainer, use)).remove)
            host.denoise(xt, batch.t, batch.labels)

    def measure(step: int) -> dict[str, float]:
        for trainer in trainers.values():
            trainer.operator.eval()
        size = min(config.batch_size, len(data.held_out))
        for index in range(HELD_OUT_BATCHES):
            run_host(data.held_out, "distill held out", index, size, lambda t, x, y: t.measure(x, y, host.grid))
        errors = {}
        for slot, trainer in trainers.items():
            errors[slot] = trainer.take_relative_error()
            trainer.operator.train()
            finite = errors[slot] if errors[slot] == errors[slot] and errors[slot] != float("inf") else None
            record(
                {
                    "stage": "distill",
                    "slot": slot,
                    "step": step,
                    "loss": trainer.take_loss(),
                    "relative_error": finite,
                    "lr": config.lr * config.rate(max(trainer.step - 1, 0)),
                }
            )
        return errors

    result.relative_error_fresh = measure(0)
    done = 0
    with track(config.steps, f"distilling {len(slots)} slots") as progress:
        for forward in range(forwards):
            run_host(train, "distill", forward, config.batch_size, lambda t, x, y: t.observe(x, y, host.grid))
            before, done = done, min(config.steps, (forward + 1) * config.reuse)
            progress.advance(done - before)
            for slot, trainer in trainers.items():
                if trainer.stopped is not None and slot not in result.stopped:
                    result.stopped[slot] = trainer.stopped
                    record({"stage": "distill", "slot": slot, "step": done, "stopped": trainer.stopped})
            if len(result.stopped) == len(slots):
                break
            crossed = done // config.evaluate_every > before // config.evaluate_every
            if crossed and done < config.steps:
                measure(done)
            elif done // config.log_every > before // config.log_every and done < config.steps:
                for slot, trainer in trainers.items():
                    record({"stage": "distill", "slot": slot, "step": done, "loss": trainer.take_loss()})
    result.relative_error = measure(done)
    result.seconds = time.perf_counter() - started
    hybrid.model.eval()
    return result


def _hook(
    trainer: SlotTrainer, use: Callable[[SlotTrainer, Tensor, Tensor], None]
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        use(trainer, arguments[0].detach(), output.detach())

    return hook


def single_process(mixed_precision: str) -> Accelerator:
    """The accelerator of this process. Raises UserError under a launcher of several processes."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError(
            f"this version trains on one process and was launched with {accelerator.num_processes};"
            " start it without a multi-process launcher"
        )
    return accelerator
