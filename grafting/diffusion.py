"""The noise process DiT was trained with.

Linear betas over 1000 steps, epsilon prediction, learned-range variance and the hybrid loss of improved
diffusion (Ho et al. 2020; Nichol & Dhariwal 2021; Peebles & Xie 2023), with respaced ancestral sampling, DDIM
(Song et al. 2021) and DPM-Solver++ (Lu et al. 2022). Latents are `[B, C, H, W]`; a learned-range model returns
`[B, 2C, H, W]`: epsilon, then the values that interpolate the log variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

ModelFn = Callable[[Tensor, Tensor], Tensor]


def respaced_timesteps(steps: int, respacing: int | str | None) -> list[int]:
    """Ascending timesteps of the full chain that a respaced chain keeps.

    `None` keeps all. An integer N (or its string) takes N steps at a fractional stride from the first to the
    last. `"ddimN"` is `range(0, steps, s)` with the smallest integer stride that gives exactly N steps.

    Raises ValueError when no such chain exists.
    """
    if respacing is None:
        return list(range(steps))
    text = str(respacing)
    digits = text.removeprefix("ddim")
    if not digits.isdecimal() or not 1 <= int(digits) <= steps:
        raise ValueError(f"sampling steps {respacing!r}: expected 1 to {steps}, or 'ddimN'")
    count = int(digits)
    if text.startswith("ddim"):
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise ValueError(f"sampling steps {respacing!r}: no integer stride gives exactly {count} of {steps} steps")
    fraction = (steps - 1) / (count - 1) if count > 1 else 1.0
    return [round(index * fraction) for index in range(count)]  # Python rounds half to even, as the original


class DiffusionProcess:
    """A (possibly respaced) diffusion chain.

    Timesteps `t [B]` of `q_sample` and `losses` index this chain: 0..steps−1 without respacing. `model_fn`
    always receives the timestep of the full chain, 0..999.
    """

    def __init__(self, steps: int = 1000, respacing: int | str | None = None) -> None:
        scale = 1000 / steps
        self.full_betas = np.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=np.float64)
        full = np.cumprod(1.0 - self.full_betas)
        self.timesteps = respaced_timesteps(steps, respacing)
        alphas_cumprod = full[self.timesteps]
        previous = np.append(1.0, alphas_cumprod[:-1])
        betas = 1.0 - alphas_cumprod / previous
        posterior_variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
        # The first posterior variance is 0: its log is clipped to the second's.
        clipped = np.append(posterior_variance[1], posterior_variance[1:]) if len(betas) > 1 else betas
        self._tables: dict[str, Tensor] = {
            name: torch.from_numpy(values)
            for name, values in {
                "alphas_cumprod": alphas_cumprod,
                "alphas_cumprod_previous": previous,
                "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
                "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod - 1.0),
                "log_betas": np.log(betas),
                "posterior_log_variance": np.log(clipped),
                "posterior_mean_x0": betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
                "posterior_mean_xt": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
            }.items()
        }

    def __len__(self) -> int:
        return len(self.timesteps)

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Table values of timesteps `t [B]`, in float32, shaped to broadcast over `like`."""
        values = self._tables[table].to(t.device)[t].float()
        return values.view(-1, *([1] * (like.ndim - 1)))

    def full_timestep(self, t: Tensor) -> Tensor:
        """The timesteps of the full chain for timesteps `t [B]` of this one."""
        return torch.tensor(self.timesteps, device=t.device)[t]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noised latents `√ᾱ_t x0 + √(1−ᾱ_t) noise`."""
        return self._at("sqrt_alphas_cumprod", t, x0) * x0 + self._at("sqrt_one_minus_alphas_cumprod", t, x0) * noise

    def losses(self, model_fn: ModelFn, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Hybrid training loss per sample: `{"loss", "mse", "vb"}`, each `[B]`, with loss = mse + vb.

        `vb` is in bits per dimension and sends no gradient to epsilon (Nichol & Dhariwal 2021, section 3.1).
        """
        xt = self.q_sample(x0, t, noise)
        return self.losses_of_output(model_fn(xt, self.full_timestep(t)), x0, xt, t, noise)

    def losses_of_output(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """`losses` for a model output `[B, 2C, H, W]` that was computed already."""
        epsilon, values = _split(output, x0)
        mse = _mean((noise - epsilon) ** 2)
        vb = self._variational_bound(epsilon.detach(), values, x0, xt, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(self, epsilon: Tensor, values: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        true_mean = self._posterior_mean(x0, xt, t)
        true_log_variance = self._at("posterior_log_variance", t, xt)
        mean = self._posterior_mean(self._predict_x0(epsilon, xt, t), xt, t)
        log_variance = self._log_variance(values, t)
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        decoder = -_discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(t == 0, _mean(decoder), _mean(kl)) / math.log(2.0)

    def _predict_x0(self, epsilon: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return (
            self._at("sqrt_recip_alphas_cumprod", t, xt) * xt - self._at("sqrt_recipm1_alphas_cumprod", t, xt) * epsilon
        )

    def _posterior_mean(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return self._at("posterior_mean_x0", t, xt) * x0 + self._at("posterior_mean_xt", t, xt) * xt

    def _log_variance(self, values: Tensor, t: Tensor) -> Tensor:
        low, high = self._at("posterior_log_variance", t, values), self._at("log_betas", t, values)
        fraction = (values + 1) / 2
        return fraction * high + (1 - fraction) * low

    @torch.no_grad()
    def trajectory(
        self,
        model_fn: ModelFn,
        z: Tensor,
        noises: Iterable[Tensor] | None = None,
        *,
        ddim: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Tensor]:
        """Yield the state after each sampling step, from the highest timestep down.

        `noises` gives one tensor shaped like `z` per step, the highest timestep first; without it noise comes
        from torch's global generator. DDIM at eta 0 takes none.
        """
        draws = iter(noises) if noises is not None else None
        for step in reversed(range(len(self))):
            t = torch.full((z.shape[0],), step, device=z.device, dtype=torch.long)
            output = model_fn(z, self.full_timestep(t))
            # The last step draws noise that is multiplied by zero: spare it.
            noisy = step > 0 and (not ddim or eta > 0)
            noise = (next(draws) if draws is not None else torch.randn_like(z)) if noisy else None
            z = self._ddim_step(output, z, t, noise, eta) if ddim else self._ancestral_step(output, z, t, noise)
            yield z

    def _ancestral_step(self, output: Tensor, z: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        epsilon, values = _split(output, z)
        mean = self._posterior_mean(self._predict_x0(epsilon, z, t), z, t)
        return mean if noise is None else mean + torch.exp(0.5 * self._log_variance(values, t)) * noise

    def _ddim_step(self, output: Tensor, z: Tensor, t: Tensor, noise: Tensor | None, eta: float) -> Tensor:
        epsilon = output.float()[:, : z.shape[1]]
        x0 = self._predict_x0(epsilon, z, t)
        alpha, previous = self._at("alphas_cumprod", t, z), self._at("alphas_cumprod_previous", t, z)
        sigma = eta * torch.sqrt((1 - previous) / (1 - alpha)) * torch.sqrt(1 - alpha / previous)
        mean = torch.sqrt(previous) * x0 + torch.sqrt(1 - previous - sigma**2) * epsilon
        return mean if noise is None else mean + sigma * noise

    def ancestral(self, model_fn: ModelFn, z: Tensor, noises: Iterable[Tensor] | None = None) -> Tensor:
        """Sample down the whole chain from `z` with the learned variances (Nichol & Dhariwal, equation 15)."""
        return _last(self.trajectory(model_fn, z, noises), z)

    def ddim(self, model_fn: ModelFn, z: Tensor, eta: float = 0.0, noises: Iterable[Tensor] | None = None) -> Tensor:
        """Sample down the whole chain from `z` by DDIM (Song et al., equation 12)."""
        return _last(self.trajectory(model_fn, z, noises, ddim=True, eta=eta), z)

    @torch.no_grad()
    def dpm_solver(self, model_fn: ModelFn, z: Tensor) -> Tensor:
        """Sample from `z` by DPM-Solver++ (2M) in as many model calls as this chain has steps.

        Second order, so that 10 steps do what DDIM needs more than 20 for. The solver spaces its own timesteps
        (Karras et al. 2022, equation 5): densely where little noise is left.
        """
        from diffusers import DPMSolverMultistepScheduler

        scheduler: Any = DPMSolverMultistepScheduler(
            num_train_timesteps=len(self.full_betas),
            trained_betas=self.full_betas,
            algorithm_type="dpmsolver++",
            solver_order=2,
            final_sigmas_type="zero",
            use_karras_sigmas=True,
        )
        scheduler.set_timesteps(len(self))
        for t in scheduler.timesteps.tolist():
            output = model_fn(z, torch.full((z.shape[0],), t, device=z.device, dtype=torch.long))
            z = scheduler.step(output.float()[:, : z.shape[1]], t, z).prev_sample
        return z


def _last(states: Iterator[Tensor], z: Tensor) -> Tensor:
    for z in states:  # noqa: B007 - only the final state is wanted
        pass
    return z


def _split(output: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    channels = like.shape[1]
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"the model returned {output.shape[1]} channels for {channels} latent channels; the hybrid loss and"
            f" ancestral sampling need a learned variance ({2 * channels} channels)"
        )
    epsilon, values = output.float().split(channels, dim=1)
    return epsilon, values


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def _approx_standard_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood of `x` rounded to bins of half width 1/255 under a Gaussian; the outer bins are open."""
    centred = x - mean
    inverse = torch.exp(-log_scale)
    upper = _approx_standard_normal_cdf(inverse * (centred + 1.0 / 255.0))
    lower = _approx_standard_normal_cdf(inverse * (centred - 1.0 / 255.0))
    log = lambda value: torch.log(value.clamp(min=1e-12))  # noqa: E731
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1.0 - lower), log(upper - lower)))
