"""Clips drawn block by block, by a network that sees no later block.

Such a network has `block` in its pattern. The sampler denoises every block from noise, while a
cache holds the keys and values of the blocks before it. Then the network reads the clean block
once more, at time 0, which writes its own keys and values to the cache (Yin et al. 2024, CausVid;
Huang et al. 2025, Self-Forcing). One program serves every block: the position of a block is an
argument of it. With a `window` the cache does not grow, and a clip may continue without end.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vdx.config.build import ConfigError
from vdx.diffusion.guidance import Guidance, guided_denoiser, stack_branches
from vdx.diffusion.samplers import SAMPLERS, run_steps
from vdx.generate.generator import Generator, constrain_batch
from vdx.models.adapters.lora import Adapted
from vdx.models.mixers.context import CachePosition
from vdx.parallel import BATCH
from vdx.seeds import seed_keys, seed_words
from vdx.types import Array, Batch, Params, Ports, PRNGKeyArray

Cache = Any  # a tree of keys and values [layers b t h w n d]
CACHE = P(None, BATCH, None, None, None, "tensor", None)


class ClipState(NamedTuple):
    """The inputs of a clip's blocks: what all of them share, and the cache."""

    conditions: list[Ports]  # of each guidance branch, for the frames of the whole clip
    cross_kv: Any  # keys and values of the text, the same for all blocks
    cache: Cache  # keys and values of the blocks so far


@dataclasses.dataclass(frozen=True)
class BlockwiseGenerator(Generator):
    """A Generator that draws clips block by block, as a whole or as a stream.

    The noise of a block depends on the seed and the block's number alone, so that a long clip
    begins as a shorter one does. Raises ConfigError for a network whose tokens see later blocks.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling.cache_threshold:
            raise ConfigError(
                f"sample.cache_threshold = {self.sampling.cache_threshold}: a clip that is drawn "
                "block by block evaluates the network in every step; set it to 0."
            )
        if self.model.block is None:
            raise ConfigError(
                "A clip is drawn block by block by a transformer whose mixers in "
                "config.model.backbone.pattern all have the same block, such as "
                "{'name': 'full', 'block': 3}; "
                f"config.model.backbone = {dict(self.model.backbone_config)}."
            )

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.model.backbone

    @property
    def block_frames(self) -> int:
        """Frames of a block."""
        return self.network.block() * self.network.patch[0]

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for a clip [t h w c] that is not a number of whole blocks."""
        if shape[0] % self.block_frames:
            raise ConfigError(
                f"{shape[0]} frames are no number of blocks; take a multiple of "
                f"{self.block_frames}."
            )
        super().check(shape)

    def noise(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        """Return the noise that a clip of shape [t h w c] starts from."""
        numbers = jnp.arange(shape[0] // self.block_frames)
        blocks = jax.vmap(functools.partial(self.block_noise, key))(numbers)
        return blocks.reshape(shape)

    def block_noise(self, key: PRNGKeyArray, index: Array) -> Array:
        """Return the noise [t h w c] of block number `index` []."""
        shape = (self.block_frames, *self.frame_shape)
        return jax.random.normal(jax.random.fold_in(key, index), shape)

    def draw(
        self,
        params: Params | Adapted,
        batch: Batch,
        noise: Array,
        key: PRNGKeyArray,
        threshold: float | Array | None = None,
    ) -> tuple[Array, Array]:
        """Return (x0 [b t h w c], bool [evaluations]: all were made). Pure.

        Raises ConfigError for a threshold: there is no step cache.
        """
        if threshold is not None:
            raise ConfigError(
                "A clip that is drawn block by block evaluates the network in every step: "
                "there is nothing to calibrate."
            )

        # Shared by all blocks.
        b, t = noise.shape[:2]
        count = t // self.block_frames
        guidance = self.guidance(batch)
        conditions = self.conditions(params, batch, None, noise.shape)
        start = self.start_clip(params, conditions, guidance, count)

        # [b (blocks t) h w c] -> [blocks b t h w c]
        blocks = noise.reshape(b, count, self.block_frames, *noise.shape[2:])
        blocks = jnp.moveaxis(blocks, 1, 0)

        def draw_one(cache: Cache, block: tuple[Array, Array]) -> tuple[Cache, Array]:
            index, noise = block
            state = start._replace(cache=cache)
            x0, cache = self.draw_block(params, state, guidance, index, noise, key, count)
            return cache, x0

        _, clips = jax.lax.scan(draw_one, start.cache, (jnp.arange(count), blocks))

        # [blocks b t h w c] -> [b (blocks t) h w c]
        x0 = jnp.moveaxis(clips, 0, 1).reshape(noise.shape) + self.mean
        return x0, jnp.ones(count * len(self.step_table()["t"]), bool)

    def stream(
        self,
        params: Params | Adapted,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_frames: int | None,
        fps: float,
        controls: Mapping[str, np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """Return an iterator over the blocks of clips, float32 [n t h w c].

        num_frames: None for clips without end, which need a `window` in every mixer, so that the
        cache does not grow; the controls of the frames of one block then serve all blocks. Raises
        ValueError for clips that the model cannot draw, or not all at once.
        """
        controls = controls or {}

        # Everything that is wrong is raised here, not at the first block.
        bounded = all(mixer.window for mixer in self.network.over_time())
        if num_frames is None and (not bounded or "num_frames" in self.model.signals):
            raise ConfigError(
                "A clip without end needs a window in every mixer that has a block, "
                "and a model without the signal num_frames, which reads the clip's length."
            )
        self.check((num_frames or self.block_frames, *self.frame_shape))
        self.check_controls(controls)

        chunk = self.batch_size(len(prompts))
        if len(prompts) > chunk:
            raise ValueError(f"{len(prompts)} clips at once are too many, sample.batch = {chunk}.")

        # Repetition fills the mesh.
        rows = [min(i, len(prompts) - 1) for i in range(chunk)]
        batch = self.text_batch([prompts[i] for i in rows], num_frames or 0, fps)
        batch |= {name: np.asarray(value)[rows] for name, value in controls.items()}
        blocks = self._blocks(params, batch, [seeds[i] for i in rows], num_frames, bounded)
        return (block[: len(prompts)] for block in blocks)

    def _blocks(
        self,
        params: Params | Adapted,
        batch: Batch,
        seeds: Sequence[int],
        num_frames: int | None,
        bounded: bool,
    ) -> Iterator[np.ndarray]:
        """Yield blocks [b t h w c]. bounded: every mixer has a window."""
        guidance = self.guidance(batch)
        count = (num_frames or 0) // self.block_frames
        # Without a length the numbers never end.
        numbers = itertools.count() if num_frames is None else range(count)

        # With windows alone the cache has one size, and one program serves every length.
        cached = 1 if bounded else count
        frames = num_frames or self.block_frames
        state = ClipState(*self._start_clip(params, batch, guidance, cached, frames))

        for index in numbers:
            x0, cache = self._next_block(
                params, *state, np.int32(index), seed_words(seeds), guidance, cached
            )
            state = state._replace(cache=cache)
            yield np.asarray(x0)

    @functools.cached_property
    def _start_clip(self) -> Callable[..., tuple[list[Ports], Any, Cache]]:
        """Compiled `start_clip` that also computes the conditions."""

        def start(
            params: Params | Adapted, batch: Batch, guidance: Guidance, blocks: int, frames: int
        ) -> tuple[list[Ports], Any, Cache]:
            shape = (len(batch["text"]), frames, *self.frame_shape)
            conditions = self.conditions(params, constrain_batch(batch), None, shape)
            return tuple(self.start_clip(params, conditions, guidance, blocks))

        return jax.jit(start, static_argnums=(2, 3, 4), out_shardings=_shardings(None, None, CACHE))

    @functools.cached_property
    def _next_block(self) -> Callable[..., tuple[Array, Cache]]:
        """Compiled `draw_block` that starts from seeds; it reuses the memory of the cache."""

        def draw(
            params: Params | Adapted,
            conditions: list[Ports],
            cross_kv: Any,
            cache: Cache,
            index: Array,
            seeds: Array,
            guidance: Guidance,
            blocks: int,
        ) -> tuple[Array, Cache]:
            # As `draw` does from the same seeds: a block has the bits that it has in a clip.
            keys = seed_keys(seeds)
            noise = jax.vmap(self.block_noise, in_axes=(0, None))(keys, index)
            state = ClipState(conditions, cross_kv, cache)
            x0, cache = self.draw_block(params, state, guidance, index, noise, keys[0], blocks)
            return x0 + self.mean, cache

        return jax.jit(
            draw, static_argnums=(6, 7), donate_argnums=3, out_shardings=_shardings(P(), CACHE)
        )

    def start_clip(
        self,
        params: Params | Adapted,
        conditions: list[Ports],
        guidance: Guidance,
        blocks: int,
    ) -> ClipState:
        """Return the state before the first block; its cache is zero.

        blocks: how many blocks the cache of a mixer without a window holds.
        """
        # Inputs of the first block, of all guidance branches.
        position = CachePosition(jnp.int32(0), blocks)
        ports = stack_branches(self.block_conditions(conditions, 0), guidance)
        b = len(jax.tree.leaves(ports)[0])
        x = jnp.zeros((b, self.block_frames, *self.frame_shape))
        time = jnp.zeros(b)

        def evaluate(params: Params | Adapted) -> Cache:
            return self.model.run(params, x, time, ports, position, mutable=["cache"])[1]["cache"]

        # Only the shapes of the cache are computed: the network is not evaluated.
        shapes = jax.eval_shape(evaluate, params)
        cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        cross_kv = self.model.precompute_cross_kv(params, x, time, ports, position, cache=cache)
        return ClipState(conditions, cross_kv, cache)

    def draw_block(
        self,
        params: Params | Adapted,
        state: ClipState,
        guidance: Guidance,
        index: Array,
        noise: Array,
        key: PRNGKeyArray,
        blocks: int,
    ) -> tuple[Array, Cache]:
        """Return (x0 [b t h w c] of block number `index`, the cache with it). Pure."""
        position = CachePosition(index * self.network.block(), blocks)
        state = state._replace(conditions=self.block_conditions(state.conditions, index))

        def network(x: Array, t: Array, ports: Ports) -> Array:
            time = self.network_time(t)
            return self.model.run(
                params, x, time, ports, position, cross_kv=state.cross_kv, cache=state.cache
            )

        # Samplers that draw noise have a key of their own for each block.
        carry, _ = run_steps(
            guided_denoiser(network, state.conditions, guidance),
            self.process,
            SAMPLERS[self.sampling.sampler](),
            self.start(noise),
            self.step_table(),
            jax.random.fold_in(key, index),
        )

        x0 = carry[0]
        return x0, self.append_block(params, state, guidance, position, x0)

    def block_conditions(self, conditions: list[Ports], index: Array | int) -> list[Ports]:
        """Return the ports of block number `index`: of what is given by frame, its frames.

        A block beyond the last has the frames of the last.
        """

        def frames_of(x: Array | None, frames: int = self.block_frames) -> Array | None:
            if x is None:
                return None
            return jax.lax.dynamic_slice_in_dim(x, index * frames, frames, 1)

        def ports_of(ports: Ports) -> Ports:
            vector = ports.vector
            if vector is not None and vector.ndim == 3:  # [b t d]: one for each frame
                vector = frames_of(vector)
            return ports.replace(
                concat=frames_of(ports.concat),
                control=frames_of(ports.control),
                add=frames_of(ports.add, self.network.block()),  # frames of tokens
                vector=vector,
            )

        return [ports_of(ports) for ports in conditions]

    def append_block(
        self,
        params: Params | Adapted,
        state: ClipState,
        guidance: Guidance,
        position: CachePosition,
        x0: Array,
    ) -> Cache:
        """Return the cache after all guidance branches have read the clean block x0."""
        # The same clean block in each branch, clip-major as `stack_branches` has them.
        ports = stack_branches(state.conditions, guidance)
        x0 = jnp.repeat(x0, guidance.num_branches, 0)

        # A clean block is at time 0 of the process.
        time = self.network_time(jnp.zeros(len(x0)))
        _, collections = self.model.run(
            params,
            x0,
            time,
            ports,
            position,
            cross_kv=state.cross_kv,
            cache=state.cache,
            mutable=["cache"],
        )
        return collections["cache"]


def _shardings(*specs: P | None) -> tuple[P | None, ...] | None:
    """Return the shardings of a program's results, so that the cache keeps its own.

    None without a mesh.
    """
    return None if jax.sharding.get_abstract_mesh().empty else specs
