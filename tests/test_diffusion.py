"""The diffusion process against the golden replay of the original, and against closed forms."""

from __future__ import annotations

import pytest
import torch

from grafting.diffusion import DiffusionProcess, respaced_timesteps
from grafting.hosts.dit import DiT

RUNS = {  # respacing, guidance scale, tolerance of the golden README
    "ddpm.plain": ("10", None, 2e-5),
    "ddpm.cfg4.0": ("10", 4.0, 1e-4),
    "ddim.plain": ("10", None, 1e-4),
    "ddim.cfg4.0": ("10", 4.0, 1e-4),
    "ddim.ddimstride_cfg1.5": ("ddim10", 1.5, 1e-4),
}


@pytest.fixture(scope="module")
def model(golden, golden_json):
    model = DiT(**golden_json("dit_model")["model_config"])
    model.load_state_dict(golden("dit_model"))
    return model.eval()


@pytest.fixture(scope="module")
def loss_case(golden, model):
    """Golden tensors, and our losses of the same inputs with their graph."""
    case = golden("diffusion_training_loss")
    process = DiffusionProcess()
    losses = process.losses(lambda x, t: model(x, t, case["y"]), case["x_start"], case["t"], case["noise"])
    return case, losses


def test_noised_latents_match(loss_case, relative_error):
    case, _ = loss_case
    noised = DiffusionProcess().q_sample(case["x_start"], case["t"], case["noise"])
    assert relative_error(noised, case["x_t"]) <= 1e-5


@pytest.mark.parametrize("name", ["loss", "mse", "vb"])
def test_losses_match_per_sample(loss_case, name):
    case, losses = loss_case
    ours, expected = losses[name].detach(), case[name]
    assert ours.shape == expected.shape
    if name == "mse":
        allowed = 1e-5 * expected.abs()
    else:  # vb is a difference of numbers of order 1, and its decoder term at t == 0 cancels further
        relative = torch.where(case["t"] == 0, 1e-4, 1e-5)
        allowed = 2e-6 + relative * expected.abs()
    assert ((ours - expected).abs() <= allowed).all()
    assert (case["t"] == 0).any()


def test_loss_gradients_match(loss_case, model, relative_error):
    case, losses = loss_case
    names = [key.removeprefix("grad.") for key in case if key.startswith("grad.")]
    parameters = dict(model.named_parameters())
    objective = losses["loss"][case["t"] > 0].mean()
    gradients = torch.autograd.grad(objective, [parameters[name] for name in names], retain_graph=True)
    assert len(names) == 5
    for name, gradient in zip(names, gradients, strict=True):
        assert relative_error(gradient, case[f"grad.{name}"]) <= 1e-5, name


@pytest.mark.parametrize("run", RUNS)
def test_sampling_replay_matches_every_step_and_half(golden, model, relative_error, run):
    respacing, scale, tolerance = RUNS[run]
    case = golden("dit_ddpm_sampling")
    seen = []

    def model_fn(x, t):
        seen.append(int(t[0]))
        assert (t == t[0]).all()
        if scale is None:
            return model(x, t, case["y"])
        return model.forward_with_cfg(x, t, case["y"], scale)

    process = DiffusionProcess(respacing=respacing)
    noises = case.get(f"{run}.noise")
    states = list(process.trajectory(model_fn, case["z"], noises, ddim=run.startswith("ddim")))
    expected = case[f"{run}.trajectory"]
    assert seen == case[f"{run}.timesteps"].tolist()
    assert len(states) == len(expected)
    half = len(case["z"]) // 2
    for step, state in enumerate(states):
        for part in (slice(None, half), slice(half, None)):
            assert relative_error(state[part], expected[step][part]) <= tolerance, (step, part)


def test_ancestral_and_ddim_return_the_last_state(golden, model):
    case = golden("dit_ddpm_sampling")
    process = DiffusionProcess(respacing="10")

    def model_fn(x, t):
        return model(x, t, case["y"])

    noises = case["ddpm.plain.noise"]
    assert torch.equal(
        process.ancestral(model_fn, case["z"], noises),
        list(process.trajectory(model_fn, case["z"], noises))[-1],
    )
    assert torch.equal(process.ddim(model_fn, case["z"]), list(process.trajectory(model_fn, case["z"], ddim=True))[-1])


@pytest.mark.parametrize("spec", ["25", "50", "100", "250", "ddim25", "ddim50", "ddim250"])
def test_respaced_timesteps_match(golden, spec):
    assert respaced_timesteps(1000, spec) == golden("dit_ddpm_sampling")[f"timestep_map.{spec}"].tolist()


def test_respacing_takes_integers_and_none():
    assert respaced_timesteps(1000, 250) == respaced_timesteps(1000, "250")
    assert respaced_timesteps(1000, None) == respaced_timesteps(1000, 1000) == list(range(1000))
    assert respaced_timesteps(1000, 1) == [0]


@pytest.mark.parametrize("spec", [0, 1001, -3, "", "ten", "ddim", "ddim0", "ddim999", "2.5"])
def test_impossible_respacing_is_refused(spec):
    with pytest.raises(ValueError, match="sampling steps"):
        DiffusionProcess(respacing=spec)


@pytest.mark.parametrize("respacing", [1, 7, "ddim10", None])
def test_ddim_with_the_true_noise_recovers_the_latent(respacing):
    # With epsilon exactly that of one x0, every DDIM step stays on the line through x0 (Song et al., eq. 12).
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 4, 3, 5, generator=generator)
    process, full = DiffusionProcess(respacing=respacing), DiffusionProcess()
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0).float()

    def model_fn(x, t):
        alpha = alphas[t].view(-1, 1, 1, 1)
        return (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()

    t = torch.full((2,), process.timesteps[-1])
    z = full.q_sample(x0, t, torch.randn(x0.shape, generator=generator))
    # 1000 float32 steps, the last of which divides by √(1−ᾱ_0) = 0.01.
    torch.testing.assert_close(process.ddim(model_fn, z), x0, rtol=0, atol=2e-4)


def test_ddim_noise_matters_only_with_eta(golden):
    z = golden("dit_ddpm_sampling")["z"]
    process = DiffusionProcess(respacing=5)

    def model_fn(x, t):
        return 0.1 * x

    torch.manual_seed(1)
    first = process.ddim(model_fn, z)
    torch.manual_seed(2)
    assert torch.equal(process.ddim(model_fn, z), first)
    noisy = [process.ddim(model_fn, z, eta=1.0, noises=torch.full((4, *z.shape), value)) for value in (0.0, 1.0)]
    assert not torch.allclose(*noisy)


def test_losses_and_ancestral_sampling_need_the_variance_channels(golden):
    z = golden("dit_ddpm_sampling")["z"]
    process = DiffusionProcess(respacing=5)
    with pytest.raises(ValueError, match="8 channels"):
        process.losses(lambda x, t: x, z, torch.zeros(len(z), dtype=torch.long), z)
    with pytest.raises(ValueError, match="8 channels"):
        process.ancestral(lambda x, t: x, z)


def test_the_variational_bound_sends_no_gradient_to_epsilon(golden):
    z = golden("dit_ddpm_sampling")["z"]
    output = torch.zeros(len(z), 8, 8, 8, requires_grad=True)
    t = torch.full((len(z),), 500)
    vb = DiffusionProcess().losses(lambda x, t: output, z, t, torch.randn_like(z))["vb"]
    (gradient,) = torch.autograd.grad(vb.sum(), output)
    assert (gradient[:, :4] == 0).all()
    assert (gradient[:, 4:] != 0).any()


def test_dpm_solver_follows_the_probability_flow_to_second_order():
    # Gaussian data of standard deviation s has the flow x_t = x_0 √(ᾱ s² + 1 − ᾱ) / s, and this epsilon.
    s = 0.5
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)

    def model_fn(x, t):
        alpha = alphas[t].view(-1, 1, 1, 1)
        epsilon = (1 - alpha).sqrt() * x / (alpha * s**2 + 1 - alpha)
        return torch.cat([epsilon, torch.zeros_like(epsilon)], 1)

    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = z * s / (alphas[-1] * s**2 + 1 - alphas[-1]).sqrt()

    def error(sampler, steps):
        found = getattr(DiffusionProcess(respacing=steps), sampler)(model_fn, z)
        return ((found - expected).norm() / expected.norm()).item()

    assert error("dpm_solver", 40) < 0.3 * error("dpm_solver", 20)  # second order: a quarter
    assert error("dpm_solver", 40) < 0.3 * error("ddim", 40)
