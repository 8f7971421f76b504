"""Clips made block by block, by a network that sees no later block (`block` in its pattern).

Every block is denoised from noise by the sampler, while what its tokens see of the blocks before
lies in a cache of keys and values; then the network reads the clean block once more, at time 0,
which puts its own keys and values there (Yin et al. 2024, CausVid; Huang et al. 2025,
Self-Forcing). One program serves every block: where the block stands is an argument of it.
With a `window` the cache does not grow, and a clip may go on without end.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vdx.config.build import ConfigError
from vdx.diffusion.guidance import Guidance, guided_denoiser, stack_branches
from vdx.diffusion.samplers import SAMPLERS, run_steps
from vdx.generate.pipeline import Generator, laid_out
from vdx.models.mixers.context import CachePosition
from vdx.parallel import BATCH
from vdx.types import Array, Batch, Params, Ports, PRNGKeyArray

Cache = Any  # a tree of keys and values [layers b t h w n d]
CACHE = P(None, BATCH, None, None, None, "tensor", None)


@dataclasses.dataclass(frozen=True)
class BlockwiseGenerator(Generator):
    """A Generator that makes clips block by block, all of a clip at once or as they come.

    The noise of a block depends on the seed and its number alone, so a clip begins as a shorter
    one does. Raises ConfigError for a network whose tokens see later blocks.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.sampling.cache_threshold:
            raise ConfigError(
                f"sample.reuse = {self.sampling.cache_threshold}: a clip that is made block by "
                "block asks the network in every step; set it to 0."
            )
        if self.model.block is None:
            raise ConfigError(
                "A clip is made block by block by a transformer whose mixers in "
                "config.model.backbone.pattern all have the same block, such as "
                "{'name': 'full', 'block': 3}; "
                f"config.model.backbone = {dict(self.model.backbone)}."
            )

    @property
    def network(self) -> Any:
        return self.model.backbone

    @property
    def frames(self) -> int:
        """Frames of a block."""
        return self.network.block() * self.network.patch[0]

    def check(self, shape: tuple[int, ...]) -> None:
        if shape[0] % self.frames:
            raise ConfigError(
                f"{shape[0]} frames are no number of blocks; ask for a multiple of {self.frames}."
            )
        super().check(shape)

    def noise(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        blocks = jax.vmap(functools.partial(self.block_noise, key))(
            jnp.arange(shape[0] // self.frames)
        )
        return blocks.reshape(shape)

    def block_noise(self, key: PRNGKeyArray, index: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), (self.frames, *self.frame_shape))

    def draw(
        self,
        params: Params,
        batch: Batch,
        noise: Array,
        key: PRNGKeyArray,
        threshold: float | Array | None = None,
    ) -> tuple[Array, Array]:
        if threshold is not None:
            raise ConfigError(
                "A clip that is made block by block asks the network in every step: "
                "there is nothing to calibrate."
            )
        b, t = noise.shape[:2]
        blocks = t // self.frames
        conditions, guidance = (
            self.conditions(params, batch, None, noise.shape),
            self.guidance(batch),
        )
        cross_kv, cache = self.begin(params, conditions, guidance, blocks)
        parts = jnp.moveaxis(noise.reshape(b, blocks, self.frames, *noise.shape[2:]), 1, 0)

        def one(cache, part):
            index, noise = part
            x0, cache = self.draw_block(
                params, conditions, guidance, cross_kv, cache, index, noise, key, blocks
            )
            return cache, x0

        _, out = jax.lax.scan(one, cache, (jnp.arange(blocks), parts))
        asked = jnp.ones(blocks * len(self.step_table()["t"]), bool)
        return jnp.moveaxis(out, 0, 1).reshape(noise.shape) + self.mean, asked

    def stream(
        self,
        params: Params,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_frames: int | None,
        fps: float,
        controls: Mapping[str, np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """The clips that a call draws, float32 [n t h w c] a block, each as soon as it is made.

        num_frames: None for clips without end, whose cache must not grow: a `window` in every
        mixer; what `steer` says of the frames of one block then holds for all. Raises ValueError
        if they are not to be had, or not at once.
        """
        bounded = all(mixer.window for mixer in self.network.over_time())
        if num_frames is None and (not bounded or "num_frames" in self.model.signals):
            raise ConfigError(
                "A clip without end needs a window in every mixer that has a block, "
                "and a model that is not told its length, the signal num_frames."
            )
        self.check((num_frames or self.frames, *self.frame_shape))
        self.check_controls(controls := controls or {})
        chunk = self.at_once(len(prompts))
        if len(prompts) > chunk:
            raise ValueError(f"{len(prompts)} clips at once are too many, sample.batch = {chunk}.")
        rows = [min(i, len(prompts) - 1) for i in range(chunk)]
        batch = self.batch([prompts[i] for i in rows], num_frames or 0, fps)
        batch |= {k: np.asarray(v)[rows] for k, v in controls.items()}
        return self._stream(
            params, batch, [seeds[i] for i in rows], num_frames, bounded, len(prompts)
        )

    def _stream(self, params, batch, seeds, num_frames, bounded, clips):
        seeds, guidance = np.asarray(seeds), self.guidance(batch)
        numbers = itertools.count() if num_frames is None else range(num_frames // self.frames)
        # With windows alone the cache is of one size, and the program is that of every length.
        blocks = 1 if bounded else (num_frames or 0) // self.frames
        conditions, cross_kv, cache = self._begin(
            params, batch, guidance, blocks, num_frames or self.frames
        )
        for index in numbers:
            x0, cache = self._next(
                params, conditions, cross_kv, cache, np.int32(index), seeds, guidance, blocks
            )
            yield np.asarray(x0)[:clips]

    @functools.cached_property
    def _begin(self):
        def begin(params, batch, guidance, blocks, frames):
            shape = (len(batch["text"]), frames, *self.frame_shape)
            conditions = self.conditions(params, laid_out(batch), None, shape)
            return conditions, *self.begin(params, conditions, guidance, blocks)

        return jax.jit(begin, static_argnums=(2, 3, 4), out_shardings=_shardings(None, None, CACHE))

    @functools.cached_property
    def _next(self):
        def step(params, conditions, cross_kv, cache, index, seeds, guidance, blocks):
            keys = jax.vmap(jax.random.key)(seeds)
            noise = jax.vmap(self.block_noise, in_axes=(0, None))(keys, index)
            x0, cache = self.draw_block(
                params, conditions, guidance, cross_kv, cache, index, noise, keys[0], blocks
            )
            return x0 + self.mean, cache

        return jax.jit(
            step, static_argnums=(6, 7), donate_argnums=3, out_shardings=_shardings(P(), CACHE)
        )

    def begin(
        self, params: Params, conditions: list[Ports], guidance: Guidance, blocks: int
    ) -> tuple[Any, Cache]:
        """(what stays the same in all blocks, a cache of zeros). blocks: how many a mixer without
        a window holds."""
        past, conditions = CachePosition(jnp.int32(0), blocks), self.of_block(conditions, 0)
        ports = stack_branches(conditions, guidance)
        b = len(jax.tree.leaves(ports)[0])
        x = jnp.zeros((b, self.frames, *self.frame_shape))
        shapes = jax.eval_shape(
            lambda p: self.model.run(p, x, jnp.zeros(b), ports, past, mutable=["cache"])[1][
                "cache"
            ],
            params,
        )
        cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return self.model.precompute_cross_kv(
            params, x, jnp.zeros(b), ports, past, cache=cache
        ), cache

    def draw_block(
        self,
        params: Params,
        conditions: list[Ports],
        guidance: Guidance,
        cross_kv: Any,
        cache: Cache,
        index: Array,
        noise: Array,
        key: PRNGKeyArray,
        blocks: int,
    ) -> tuple[Array, Cache]:
        """(x0 [b t h w c] of block number `index`, the cache with it). Pure."""
        past = CachePosition(index * self.network.block(), blocks)
        conditions = self.of_block(conditions, index)
        denoise = guided_denoiser(
            lambda x, t, ports: self.model.run(
                params, x, self.network_time(t), ports, past, cross_kv=cross_kv, cache=cache
            ),
            conditions,
            guidance,
        )
        x0 = run_steps(
            denoise,
            self.process,
            SAMPLERS[self.sampling.sampler](),
            self.start(noise),
            self.step_table(),
            jax.random.fold_in(key, index),
        )[0][0]
        return x0, self.remember(params, conditions, guidance, cross_kv, cache, past, x0)

    def of_block(self, conditions: list[Ports], index: Array | int) -> list[Ports]:
        """What is told of the frames of a block, if frames are told of one by one. A block
        beyond the last is told what the last is."""

        def at(x: Array | None, frames: int = self.frames) -> Array | None:
            return x if x is None else jax.lax.dynamic_slice_in_dim(x, index * frames, frames, 1)

        return [
            ports.replace(
                concat=at(ports.concat),
                control=at(ports.control),
                add=at(ports.add, self.network.block()),
                vector=ports.vector
                if ports.vector is None or ports.vector.ndim == 2
                else at(ports.vector),
            )
            for ports in conditions
        ]

    def remember(
        self,
        params: Params,
        conditions: list[Ports],
        guidance: Guidance,
        cross_kv: Any,
        cache: Cache,
        past: CachePosition,
        x0: Array,
    ) -> Cache:
        """The cache after the clean block is read, by all branches of guidance."""
        ports, x0 = stack_branches(conditions, guidance), jnp.repeat(x0, guidance.num_branches, 0)
        time = self.network_time(jnp.zeros(len(x0)))
        return self.model.run(
            params, x0, time, ports, past, cross_kv=cross_kv, cache=cache, mutable=["cache"]
        )[1]["cache"]


def _shardings(*specs: P | None) -> Any:
    """Of what a program returns: the cache leaves as it came. None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else specs
