import pytest
import torch

from grafting import UserError, sample
from grafting.sample import sample_latents


def test_image_i_depends_on_the_seed_and_i_alone(tiny_host, relative_error):
    whole = sample_latents(tiny_host, 6, sampler="ancestral", batch_size=6)
    parts = sample_latents(tiny_host, 6, sampler="ancestral", batch_size=4)
    assert relative_error(parts, whole) < 1e-4  # matrix products of another batch size round differently
    assert relative_error(sample_latents(tiny_host, 3, sampler="ancestral"), whole[:3]) < 1e-4
    assert relative_error(sample_latents(tiny_host, 6, sampler="ancestral", seed=1), whole) > 0.1


def test_guidance_channels(tiny_host):
    z, t, y = torch.randn(2, 4, 7, 7), torch.tensor([5, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        plain, guided = tiny_host.denoise(z, t, y), tiny_host.guided(z, t, y, 3.0, 3)
        null = tiny_host.denoise(z, t, torch.full_like(y, tiny_host.null_class))
    assert torch.allclose(guided[:, 3:], plain[:, 3:], atol=1e-5)
    assert torch.allclose(guided[:, :3], (null + 3 * (plain - null))[:, :3], atol=1e-5)


def test_images_are_uint8_on_the_requested_class(tiny_host):
    images = sample(tiny_host, 3, condition=7, steps=2)
    assert images.shape == (3, 28, 28, 1)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"condition": 10}, "0 to 9"),
        ({"condition": [1, 2]}, "2 classes"),
        ({"sampler": "euler"}, "use ancestral, ddim, dpm_solver"),
    ],
)
def test_misuse_is_an_error(tiny_host, arguments, words):
    with pytest.raises(UserError, match=words):
        sample(tiny_host, 3, **arguments)
