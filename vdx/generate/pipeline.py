"""From prompts to videos: conditioning, guidance, one scan over sampler steps, pixels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import lookup
from vdx.diffusion.guidance import Guidance, guided_denoiser, stack_branches
from vdx.diffusion.samplers import (
    SAMPLERS,
    Carry,
    StepTable,
    clamp_known_frames,
    run_steps,
    step_table,
)
from vdx.diffusion.step_cache import StepCache
from vdx.diffusion.timesteps import TIMESTEPS, Timesteps, uniform_timesteps
from vdx.models.conditioning.text_signals import TEXT
from vdx.models.denoiser import Denoiser
from vdx.parallel import constrain
from vdx.types import Array, Batch, Params, Ports, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How clips are drawn: the `sample` section of a config.

    steps: network evaluations of a first-order sampler. guidance: scale of classifier-free
    guidance on the text. guide: scales of other signals, which come before the text in that
    order. rescale, interval: see vdx.diffusion.guidance. grid: a row of GRIDS
    for models of rectified flow; empty: uniform times that the process has. shift: time shift
    of the grid. batch: clips drawn at once. reuse: the network is not asked while its answer
    would change by less than this share (vdx.diffusion.step_cache); 0: it is asked in every step.
    """

    sampler: str = "dpmpp_2m"
    steps: int = 20
    guidance: float = 3.0
    signal_guidance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    timesteps: str = ""
    shift: float = 1.0
    batch: int = 16
    cache_threshold: float = 0.0

    def __post_init__(self):
        lookup(self.sampler, SAMPLERS, "config.sample.sampler")
        if self.timesteps:
            lookup(self.timesteps, TIMESTEPS, "config.sample.timesteps")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(
                f"sample.steps = {self.steps} and sample.batch = {self.batch} must be positive."
            )
        if self.cache_threshold < 0:
            raise ValueError(
                f"sample.cache_threshold = {self.cache_threshold} must not be negative."
            )


@dataclasses.dataclass(frozen=True)
class Generator:
    """Draws clips from a trained denoiser. `frame_shape` is (h, w, c) of the model's space,
    `mean` what training subtracted from the pixels; holds: it was trained to go on from a first
    frame at time 0, the entry `held` [b h w c] of a batch."""

    model: Denoiser
    process: Any
    sampling: Sampling
    frame_shape: tuple[int, int, int]
    mean: float = 0.0
    first_frame: bool = False

    def __post_init__(self):
        for name in self.sampling.signal_guidance:
            lookup(name, self.model.signals, "config.sample.signal_guidance")

    def __call__(
        self,
        params: Params,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_frames: int,
        fps: float,
        noise: np.ndarray | None = None,
        controls: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """float32 [n t h w c], one clip a prompt, at most `sampling.batch` at a time.

        Clip i starts from noise drawn from seeds[i] alone, or from noise[i] if given
        (float32 [n t h w c]). steer: entries of the batch for other signals, each [n ...]; a
        signal without one is dropped. Runs under the current mesh; every process gets all clips.
        Raises ConfigError for entries that no signal of the model reads, or that one needs.
        """
        shape = (num_frames, *self.frame_shape)
        if noise is not None and noise.shape != (len(prompts), *shape):
            raise ValueError(
                f"noise is {noise.shape}; {len(prompts)} clips need "
                f"{(len(prompts), *shape)} [b t h w c]."
            )
        self.check(shape)
        self.check_controls(controls := controls or {})
        chunk, out = self.at_once(len(prompts)), []
        for start in range(0, len(prompts), chunk):
            # The last chunk is filled up by repetition, so that one program serves all.
            rows = [min(i, len(prompts) - 1) for i in range(start, start + chunk)]
            batch = self.batch([prompts[i] for i in rows], num_frames, fps)
            batch |= {k: np.asarray(v)[rows] for k, v in controls.items()}
            given = None if noise is None else noise[np.asarray(rows)]
            x0, _ = self.from_seeds(
                params, batch, np.asarray([seeds[i] for i in rows]), given, None, shape
            )
            out.append(np.asarray(x0)[: len(prompts) - start])
        return np.concatenate(out)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for a clip [t h w c] that cannot be drawn."""
        self.model.num_tokens((1, *shape))

    def check_controls(self, controls: Mapping[str, np.ndarray]) -> None:
        """Raises ConfigError for entries that no signal of the model reads."""
        known = {
            **self.model.conditioning.dummy_batch(),
            **({"first_frame": None} if self.first_frame else {}),
        }
        for key in controls:
            lookup(key, known, "This model's signals")

    def batch(self, prompts: Sequence[str], num_frames: int, fps: float) -> dict:
        """What the conditions of these clips are made of, besides `steer`."""
        ids, mask = zip(*map(self.model.tokenizer(), prompts), strict=True)
        return {
            "text": np.stack(ids),
            "text_mask": np.stack(mask),
            "fps": np.full(len(prompts), fps, np.float32),
            "num_frames": np.full(len(prompts), num_frames, np.int32),
        }

    def at_once(self, clips: int) -> int:
        """Clips at once: what is asked for, up to `batch`, rounded up to fill the mesh."""
        mesh = jax.sharding.get_abstract_mesh()
        parts = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        return -(-min(clips, self.sampling.batch) // parts) * parts

    @functools.cached_property
    def from_seeds(self) -> Callable[..., tuple[Array, Array]]:
        """(params, batch, seeds [b], noise [b t h w c] or None, threshold, shape) -> as `draw`,
        compiled; shape [t h w c] of a clip."""
        mesh = jax.sharding.get_abstract_mesh()
        whole = None if mesh.empty else jax.sharding.PartitionSpec()

        def draw(params, batch, seeds, noise, threshold, shape):
            if noise is None:
                noise = jax.vmap(lambda seed: self.noise(jax.random.key(seed), shape))(seeds)
            return self.draw(params, laid_out(batch), noise, jax.random.key(seeds[0]), threshold)

        return jax.jit(draw, static_argnums=5, out_shardings=whole)

    def noise(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        """What a clip of shape [t h w c] starts from."""
        return jax.random.normal(key, shape)

    def draw(
        self,
        params: Params,
        batch: Batch,
        noise: Array,
        key: PRNGKeyArray,
        threshold: float | Array | None = None,
    ) -> tuple[Array, Array]:
        """(x0 [b t h w c] for a batch of conditions from noise [b t h w c], which evaluations
        asked the network); threshold: as of `advance`. Pure."""
        carry, known, batch = self.start(noise), None, dict(batch)
        if (first := batch.pop("first_frame", None)) is not None:
            is_generated = (jnp.arange(noise.shape[1]) > 0).astype(jnp.float32)
            known = (
                jnp.zeros_like(noise).at[:, 0].set(first),
                jnp.broadcast_to(is_generated, noise.shape[:2]),
            )
        carry, asked = self.run_steps(
            params, batch, None, carry, self.step_table(), key, known, threshold
        )
        x0 = carry[0] if first is None else carry[0].at[:, 0].set(first)
        return x0 + self.mean, asked

    @functools.cached_property
    def timesteps(self) -> Timesteps | None:
        s = self.sampling
        return TIMESTEPS[s.timesteps](s.steps, s.shift) if s.timesteps else None

    def step_table(self) -> StepTable:
        """The evaluations of the network that make a clip."""
        s = self.sampling
        times = (
            self.timesteps.times
            if self.timesteps
            else uniform_timesteps(self.process, s.steps, s.shift)
        )
        return step_table(self.process, SAMPLERS[s.sampler](), times)

    def start(self, noise: Array) -> Carry:
        return SAMPLERS[self.sampling.sampler]().start(jnp.asarray(noise, jnp.float32))

    def run_steps(
        self,
        params: Params,
        batch: Batch,
        negative: Batch | None,
        carry: Carry,
        rows: StepTable,
        key: PRNGKeyArray,
        known: tuple[Array, Array] | None = None,
        threshold: float | Array | None = None,
    ) -> tuple[Carry, Array]:
        """(`carry` after the evaluations `rows`, which of them asked the network); the clip is
        the first array of the carry. Pure.

        Guidance leads from the conditions `negative` to those of `batch`; None: the same without
        their text. known: what `samplers.hold` takes. threshold: in the place of sampling.cache_threshold.
        """
        conditions = self.conditions(params, batch, negative, carry[0].shape)
        guidance = self.guidance(batch, negative)
        ports, x = (
            stack_branches(conditions, guidance),
            jnp.repeat(carry[0], guidance.num_branches, 0),
        )
        # XLA does not move this out of the loop over steps: the layers are a loop themselves.
        cross_kv = self.model.precompute_cross_kv(params, x, jnp.zeros(len(x)), ports)
        denoise = guided_denoiser(
            lambda x, t, ports: self.model.run(
                params, x, self.network_time(t), ports, cross_kv=cross_kv
            ),
            conditions,
            guidance,
        )
        if known is not None:
            denoise = clamp_known_frames(denoise, *known)
        threshold = self.sampling.cache_threshold if threshold is None else threshold
        plain = isinstance(threshold, int | float) and threshold == 0
        return run_steps(
            denoise,
            self.process,
            SAMPLERS[self.sampling.sampler](),
            carry,
            rows,
            key,
            None if plain else StepCache(threshold, self.sampling.guidance_interval),
        )

    def guidance_branches(self, batch: Batch) -> list[tuple[set[str], float]]:
        """(signals, scale) of what guidance strengthens one after the other, the text last."""
        s, absent = self.sampling, self.model.missing_signals(batch)
        known = [
            *(({name}, scale) for name, scale in s.signal_guidance.items()),
            (set(TEXT), s.guidance),
        ]
        return [(names, scale) for names, scale in known if scale != 1.0 and names - absent]

    def guidance(self, batch: Batch, negative: Batch | None = None) -> Guidance:
        """As `advance` guides from `negative` to `batch`."""
        s = self.sampling
        scales = [s.guidance] if negative else [scale for _, scale in self.guidance_branches(batch)]
        return Guidance(tuple(scales), s.guidance_rescale, s.guidance_interval)

    def conditions(
        self, params: Params, batch: Batch, negative: Batch | None, shape: tuple[int, ...]
    ) -> list[Ports]:
        """What the network is told of clips of `shape` [b t h w c], from the fewest conditions to
        all."""
        absent, whole = self.model.missing_signals(batch), self.model.fill_missing(batch, shape)

        def ports(batch: Batch, untold: set[str]) -> Ports:
            drop = {
                name: mask | (name in absent | untold)
                for name, mask in self.model.drop_masks(shape[0], False).items()
            }
            return self.model.run(params, batch, drop, method="condition")

        if negative:
            return [ports({**whole, **negative}, set()), ports(whole, set())]
        guides = [names for names, _ in self.guidance_branches(batch)]
        return [ports(whole, set().union(*guides[i:])) for i in range(len(guides) + 1)]

    def network_time(self, t: Array) -> Array:
        """What the network is fed at time t."""
        return (self.timesteps or self.process).network_time(t)


def laid_out(batch: Batch) -> Batch:
    return {k: constrain(v, " ".join("bthwc"[: v.ndim])) for k, v in batch.items()}
