"""The randomness of a clip comes from its own seed, wherever it is drawn."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.diffusion.process import RectifiedFlow
from vdx.diffusion.samplers import fresh_noise
from vdx.generate import pretrained
from vdx.generate.blockwise import BlockwiseGenerator
from vdx.generate.generator import Generator, Sampling
from vdx.models.denoiser import Denoiser
from vdx.parallel import MeshSpec
from vdx.seeds import seed_words

TEXT = {"encoder": {"name": "bytes", "length": 16, "width": 12, "depth": 1, "heads": 2}}
SHAPE = (4, 4, 3)
PROMPTS = ["a", "b", "c", "d", "e"]
SEEDS = [4, 9, 1, 7, 4]


def model_of(pattern):
    backbone = {"width": 24, "depth": 2, "heads": 2, "patch": (1, 2, 2), "pattern": pattern}
    return Denoiser({"name": "transformer", **backbone}, {"text": TEXT})


@dataclasses.dataclass(frozen=True)
class Echo(Generator):
    """Returns the noise of each clip, and what its key draws in step 3, without a network."""

    def draw(self, params, batch, noise, keys, threshold=None):
        return noise + 10 * fresh_noise(keys, jnp.int32(3), noise.shape[1:]), jnp.ones(1, bool)


@pytest.fixture(scope="module")
def alone():
    """Clip i, drawn as the only one."""
    make = lambda i: echo(5)({}, PROMPTS[i : i + 1], SEEDS[i : i + 1], num_frames=2, fps=8.0)
    return np.concatenate([make(i) for i in range(len(PROMPTS))])


def echo(batch):
    sampling = Sampling("ddpm", 3, 1.0, batch=batch)
    return Echo(model_of("full"), RectifiedFlow(), sampling, SHAPE)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
def test_keys_are_of_the_clip_in_every_batch(batch, alone):
    clips = echo(batch)({}, PROMPTS, SEEDS, num_frames=2, fps=8.0)
    np.testing.assert_array_equal(clips, alone)
    np.testing.assert_array_equal(clips[0], clips[4])  # one seed
    assert len(np.unique(clips, axis=0)) == 4


def test_keys_are_of_the_clip_on_every_mesh(alone):
    for shape in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        with jax.set_mesh(MeshSpec(**shape).make(jax.devices())):
            clips = echo(4)({}, PROMPTS, SEEDS, num_frames=2, fps=8.0)
        np.testing.assert_array_equal(clips, alone)


def test_given_noise_leaves_the_keys():
    noise = np.zeros((5, 2, *SHAPE), np.float32)
    clips = echo(2)({}, PROMPTS, SEEDS, num_frames=2, fps=8.0, noise=noise)
    key = jax.random.fold_in(jax.random.key(7), 3)
    np.testing.assert_allclose(clips[3], 10 * jax.random.normal(key, (2, *SHAPE)), rtol=1e-6)


def test_pretrained_steps_have_a_key_for_each_clip():
    generator = SimpleNamespace(run_steps=lambda *args: args[-2])
    keys = pretrained._run_steps(generator, {}, {}, {}, (), {}, seed_words(SEEDS), None)
    expected = [jax.random.key_data(jax.random.key(seed)) for seed in SEEDS]
    np.testing.assert_array_equal(jax.random.key_data(keys), expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Generator, BlockwiseGenerator])
def test_a_stochastic_clip_of_a_network_is_the_same_alone_and_in_a_batch(make, randomise):
    """Up to the rounding of products of another batch; without keys of its own it is another."""
    model = model_of(({"name": "full", "block": 2},))
    params = randomise(jax.eval_shape(model.new_params, jax.random.key(0)))
    generator = make(model, RectifiedFlow(), Sampling("ddpm", 3, 2.0), SHAPE)
    clips = generator(params, PROMPTS, SEEDS, num_frames=4, fps=8.0)
    one = generator(params, PROMPTS[3:4], SEEDS[3:4], num_frames=4, fps=8.0)
    np.testing.assert_allclose(clips[3:4], one, atol=1e-5)
    if make is BlockwiseGenerator:
        stream = generator.stream(params, PROMPTS, SEEDS, num_frames=4, fps=8.0)
        np.testing.assert_allclose(np.concatenate(list(stream), axis=1), clips, atol=1e-5)
