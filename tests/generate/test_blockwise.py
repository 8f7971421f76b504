"""Block-causal attention, its cache, and clips made block by block, against the whole clip."""

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.diffusion.guidance import guided_denoiser
from vdx.diffusion.process import RectifiedFlow
from vdx.diffusion.samplers import SAMPLERS, sample
from vdx.generate.blockwise import BlockwiseGenerator
from vdx.generate.cache_calibration import calibrate
from vdx.generate.generator import Sampling
from vdx.models import transformer
from vdx.models.denoiser import Denoiser
from vdx.models.mixers.context import CachePosition, MixContext
from vdx.models.mixers.table import MIXERS
from vdx.models.positions import rope_table, shift_rope
from vdx.models.transformer import Transformer
from vdx.parallel import MeshSpec
from vdx.types import Ports

RNG = np.random.default_rng(0)
BLOCKS = {
    "all": {"block": 2},
    "window": {"block": 2, "window": 1},
    "sink": {"block": 1, "window": 2, "sink": 1},
    "one": {"block": 1, "window": 3},
}


def sees(spec, query: int, key: int) -> bool:
    """Whether a frame sees another: the definition, written independently."""
    a, b = query // spec["block"], key // spec["block"]
    return b <= a and (b >= a - spec.get("window", 99) or b < spec.get("sink", 0))


@pytest.mark.parametrize(
    ("spec", "mixer"),
    [
        ("window", "full"),
        ("sink", "time"),
        *(pytest.param(spec, "full", marks=pytest.mark.slow) for spec in ("all", "sink", "one")),
    ],
)
def test_a_token_sees_its_block_and_those_before(spec, mixer, randomise):
    """Seven frames: the last block is not whole."""
    grid, spec = (7, 1, 2), BLOCKS[spec]
    module = MIXERS[mixer](heads=1, **spec)
    x, context = RNG.normal(size=(1, *grid, 8)).astype(np.float32), MixContext(rope_table(grid, 8))
    params = randomise(jax.eval_shape(module.init, jax.random.key(0), x, context)["params"])
    out = lambda x: module.apply({"params": params}, x, context).sum((0, -1))
    touched = np.abs(jax.jit(jax.jacrev(out))(x)).max((3, -1)) > 0
    for (t, _, w), (s, _, v) in itertools.product(np.ndindex(grid), repeat=2):
        place = mixer == "full" or w == v
        assert touched[t, 0, w, s, 0, v] == (place and sees(spec, t, s)), (t, w, s, v)


def test_rotary_positions_shift_exactly():
    for width, start in itertools.product((24, 128), (0, 7, 1000, 2**20)):
        rope = rope_table((3, 2, 2), width)
        features = width - 4 * (width // 6)
        angles = np.arange(start, start + 3)[:, None] * 1e4 ** (
            -np.arange(0, features, 2) / features
        )
        cos, sin = shift_rope(rope, jnp.int32(start), width)
        for got, old, want in ((cos, rope[0], np.cos(angles)), (sin, rope[1], np.sin(angles))):
            atol = 1e-6 + start * 2**-32 * np.pi
            np.testing.assert_allclose(got[:, 1, 1, 0, : features // 2], want, atol=atol)
            np.testing.assert_allclose(got[..., features // 2 :], old[..., features // 2 :])


# A network, block by block with a cache, and on the whole clip.

PORTS = Ports(
    tokens=RNG.normal(size=(2, 3, 24)).astype(np.float32),
    vector=RNG.normal(size=(2, 24)).astype(np.float32),
)


class Cached:
    """Six blocks through a transformer. Every frame has its own time but within a patch."""

    def __init__(self, spec, pt, randomise, pattern=()):
        self.net = Transformer(
            width=24,
            depth=2 * (1 + len(pattern)),
            heads=2,
            patch=(pt, 2, 2),
            absolute=True,
            pattern=({"name": "full", **spec}, *pattern),
        )
        self.frames = spec["block"] * pt
        self.x = RNG.normal(size=(2, 6 * self.frames, 4, 4, 3)).astype(np.float32)
        self.time = np.repeat(RNG.uniform(0, 1e3, size=(2, 6 * spec["block"])), pt, 1)
        self.params = randomise(
            jax.eval_shape(self.net.init, jax.random.key(0), self.x, self.time, PORTS)["params"]
        )

    @functools.cached_property
    def whole(self):
        return self.now_whole()

    def now_whole(self):
        run = lambda p: self.net.apply({"params": p}, self.x, self.time, PORTS)
        return jax.jit(run)(self.params)

    @functools.cached_property
    def step(self):
        def run(cache, x, time, start):
            return self.net.apply(
                {"params": self.params, **cache},
                x,
                time,
                PORTS,
                CachePosition(start, 6),
                mutable=["cache"],
            )

        return jax.jit(run)

    def by_block(self):
        parts = [np.split(a, 6, 1) for a in (self.x, self.time)]
        empty = jax.eval_shape(self.step, {}, parts[0][0], parts[1][0], jnp.int32(0))[1]
        cache, out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), empty), []
        for i, (x, time) in enumerate(zip(*parts, strict=True)):
            y, cache = self.step(cache, x, time, jnp.int32(i * self.net.block()))
            out.append(y)
        return np.concatenate(out, 1)

    def error(self):
        return np.abs(self.by_block() - self.whole).max()


@pytest.fixture(scope="module")
def cached(randomise):
    return functools.cache(lambda spec, pt: Cached(BLOCKS[spec], pt, randomise))


CASES = [("sink", 1)]
SLOW = [("all", 2), ("all", 1), ("window", 1), ("sink", 2), ("one", 2)]


@pytest.mark.parametrize(
    ("spec", "pt"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_block_by_block_it_is_the_whole_clip(spec, pt, cached):
    case = cached(spec, pt)
    assert case.error() < 1e-5
    assert case.whole.std() > 0.3 and case.step._cache_size() == 1


@pytest.mark.slow
def test_with_mixers_of_one_frame_and_of_one_place(randomise):
    case = Cached(BLOCKS["all"], 1, randomise, ("space", {"name": "time", "block": 2}))
    assert case.error() < 1e-5


def test_positions_that_do_not_shift_are_detected(cached, monkeypatch):
    monkeypatch.setattr(transformer, "shift_rope", lambda rope, *_: rope)
    case = copy.copy(cached("sink", 1))
    vars(case).pop("step", None)
    assert case.error() > 1e-3


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "context": 2, "tensor": 2}])
def test_on_eight_devices_it_is_that_of_one(sizes, cached):
    case = cached("sink", 1)
    with jax.set_mesh(MeshSpec(data=1, **sizes).make()):
        np.testing.assert_allclose(case.now_whole(), case.whole, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "space", "block": 2}, "of a mixer that attends over time"),
        ({"name": "full", "block": 0}, r"block = 0 is out of range, expected int >= 1"),
        ({"name": "full", "window": 2}, "block"),
        ({"name": "full", "block": 2, "sink": 1}, "a sink needs a window"),
        (
            {"name": "full", "block": 2, "window": 0},
            r"window = 0 is out of range, expected int >= 1",
        ),
    ],
)
def test_blocks_that_cannot_be(spec, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(pattern=(spec,)).dims()


# Clips.

TEXT = {
    "text": {
        "encoder": {
            "name": "bytes",
            "length": 16,
            "width": 12,
            "depth": 1,
            "heads": 2,
            "words": 6,
            "buckets": 64,
        }
    }
}
SHAPE = (4, 4, 3)
PROMPTS, SEEDS = ["a red ball", "blue"], [5, 6]


def model_of(spec, **backbone):
    return Denoiser(
        {
            "name": "transformer",
            "width": 24,
            "depth": 2,
            "heads": 2,
            "patch": (1, 2, 2),
            "pattern": ({"name": "full", **spec},),
            **backbone,
        },
        TEXT,
    )


def generator_of(spec, cls=BlockwiseGenerator, guidance=2.0, sampler="euler", **backbone):
    return cls(
        model_of(spec, **backbone), RectifiedFlow(), Sampling(sampler, 3, guidance), SHAPE, mean=0.1
    )


@pytest.fixture(scope="module")
def weights(randomise):
    """Parameters of every model here: blocks have none."""
    return randomise(jax.eval_shape(model_of({"block": 2}).new_params, jax.random.key(0)))


@pytest.fixture(scope="module")
def drawn(weights):
    """spec -> (generator, its clips of three blocks)."""

    @functools.cache
    def make(spec):
        generator = generator_of(BLOCKS[spec])
        return generator, generator(weights, PROMPTS, SEEDS, num_frames=6, fps=8.0)

    return make


def by_definition(generator, params, noise, **controls):
    """Draw each block with a network that reads the whole clip.

    The blocks before it are clean and at time 0, itself is at the sampler's time, and the later
    blocks, which it must not see, are noise."""
    g, b, t = generator, len(noise), noise.shape[1]
    batch = {**g.text_batch(PROMPTS, t, 8.0), **controls}

    def one(clip, first):
        def network(x, time, ports):
            every = jnp.repeat(clip, len(x) // b, 0)
            every = jax.lax.dynamic_update_slice_in_dim(every, x, first, 1)
            times = jnp.where(jnp.arange(t) < first, 0, time[:, None])
            out = g.model.run(params, every, g.network_time(times), ports)
            return jax.lax.dynamic_slice_in_dim(out, first, 2, 1)

        denoise = guided_denoiser(
            network, g.conditions(params, batch, None, noise.shape), g.guidance(batch)
        )
        x = jax.lax.dynamic_slice_in_dim(clip, first, 2, 1)
        x = sample(denoise, g.process, SAMPLERS[g.sampling.sampler](), x, np.linspace(1, 0, 4))
        return jax.lax.dynamic_update_slice_in_dim(clip, x, first, 1)

    one = jax.jit(one)
    return functools.reduce(one, range(0, t, 2), noise) + g.mean


def noise_of(generator):
    return np.stack([generator.noise(jax.random.key(s), (6, *SHAPE)) for s in SEEDS])


@pytest.fixture(scope="module")
def defined(weights):
    generator = generator_of(BLOCKS["window"])
    return by_definition(generator, weights, noise_of(generator))


def test_clips_are_their_definition(drawn, defined):
    generator, clips = drawn("window")
    noise = noise_of(generator)
    assert abs(np.corrcoef(noise[:, :2].ravel(), noise[:, 2:4].ravel())[0, 1]) < 0.3
    np.testing.assert_allclose(clips, defined, atol=2e-5)
    assert np.abs(clips).std() > 0.3


class Noisy(BlockwiseGenerator):
    def append_block(self, *args):
        *others, x0 = args
        return super().append_block(*others, x0 + 0.1)


class Late(BlockwiseGenerator):
    def network_time(self, t):
        # No sampler evaluates the network at time 0.
        return super().network_time(jnp.where(t == 0, 0.1, t))


@pytest.mark.slow
def test_there_is_nothing_to_calibrate(weights):
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        calibrate(
            generator_of(BLOCKS["window"]),
            weights,
            PROMPTS,
            seed=0,
            num_frames=6,
            fps=8.0,
            floor=0.9,
            weights="abc",
            log=lambda _: None,
        )


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Noisy, Late])
def test_a_cache_of_blocks_that_are_not_clean_is_detected(fault, weights, defined):
    clips = generator_of(BLOCKS["window"], fault)(weights, PROMPTS, SEEDS, num_frames=6, fps=8.0)
    np.testing.assert_allclose(clips[:, :2], defined[:, :2], atol=2e-5)  # it has no past
    assert np.abs(clips - defined)[:, 2:].max() > 1e-3


@pytest.mark.slow
def test_streamed_blocks_are_those_of_the_clip_by_one_program(drawn, weights):
    generator, clips = drawn("window")
    stream = lambda frames: generator.stream(weights, PROMPTS, SEEDS, num_frames=frames, fps=8.0)
    blocks = list(stream(6))
    assert [b.shape for b in blocks] == [(2, 2, *SHAPE)] * 3
    np.testing.assert_allclose(np.concatenate(blocks, 1), clips, atol=1e-5)
    again = list(stream(6))
    np.testing.assert_array_equal(again, blocks)
    longer = list(itertools.islice(stream(None), 5))  # and of a clip without end
    np.testing.assert_array_equal(longer[:3], blocks)
    assert generator._next_block._cache_size() == 1


@pytest.mark.slow
def test_a_clip_begins_as_a_shorter_one(drawn, weights):
    generator, clips = drawn("window")
    short = generator(weights, PROMPTS[:1], SEEDS[:1], num_frames=2, fps=8.0)
    np.testing.assert_allclose(short, clips[:1, :2], atol=1e-5)


@pytest.mark.slow
def test_conditions_of_frames_reach_their_block(randomise):
    model = Denoiser(
        model_of(BLOCKS["all"]).backbone_config,
        {**TEXT, "actions": {}, "known_frames": {}, "depth": {"port": "control"}},
    )
    params = randomise(jax.eval_shape(model.new_params, jax.random.key(0)))
    generator = BlockwiseGenerator(model, RectifiedFlow(), Sampling("euler", 3, 2.0), SHAPE)
    controls = {
        "actions": RNG.integers(0, 5, (2, 6)).astype(np.int32),
        "known": RNG.normal(size=(2, 6, *SHAPE)).astype(np.float32),
        "known_mask": RNG.integers(0, 2, (2, 6)).astype(np.float32),
        "depth": RNG.uniform(size=(2, 6, *SHAPE[:2], 1)).astype(np.float32),
    }
    request = dict(num_frames=6, fps=8.0, controls=controls)
    clips = generator(params, PROMPTS, SEEDS, **request)
    blocks = list(generator.stream(params, PROMPTS, SEEDS, **request))
    want = by_definition(generator, params, noise_of(generator), **controls)
    np.testing.assert_allclose(clips, want, atol=2e-5)
    np.testing.assert_allclose(np.concatenate(blocks, 1), want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_streams(sampler, weights):
    """Without a window the cache has a place for every block."""
    generator = generator_of(BLOCKS["all"], sampler=sampler, guidance=1.0)
    clips = generator(weights, PROMPTS, SEEDS, num_frames=4, fps=8.0)
    blocks = list(generator.stream(weights, PROMPTS, SEEDS, num_frames=4, fps=8.0))
    np.testing.assert_allclose(np.concatenate(blocks, 1), clips, atol=1e-5)
    assert generator._next_block._cache_size() == 1


@pytest.mark.slow
def test_clips_of_four_devices_are_those_of_one(drawn, weights):
    generator, clips = drawn("window")
    fresh = dataclasses.replace(generator)
    with jax.set_mesh(MeshSpec(data=1, fsdp=2, tensor=2).make(jax.devices()[:4])):
        blocks = list(fresh.stream(weights, PROMPTS, SEEDS, num_frames=6, fps=8.0))
        whole = fresh(weights, PROMPTS, SEEDS, num_frames=6, fps=8.0)
        assert fresh._next_block._cache_size() == 1
    np.testing.assert_allclose(np.concatenate(blocks, 1), clips, atol=1e-5)
    np.testing.assert_allclose(whole, clips, atol=1e-5)


def test_what_cannot_be_streamed(weights):
    with pytest.raises(ConfigError, match=r"mixers in .* all have the same block"):
        generator_of({})
    with pytest.raises(ConfigError, match="have the same block"):
        generator_of({}, pattern=({"name": "full", "block": 2}, "time"))
    with pytest.raises(ValueError, match=r"7 frames are no number of blocks.*multiple of 2"):
        generator_of({"block": 2})(weights, PROMPTS, SEEDS, num_frames=7, fps=8.0)
    with pytest.raises(ConfigError, match="needs a window"):
        generator_of(BLOCKS["all"]).stream(weights, PROMPTS, SEEDS, num_frames=None, fps=8.0)
    with pytest.raises(ConfigError, match="This model's signals"):
        generator_of({"block": 2}).stream(
            weights, PROMPTS, SEEDS, num_frames=4, fps=8.0, controls={"actions": np.zeros((2, 4))}
        )
