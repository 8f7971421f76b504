"""The generator: conditioning, guidance, one scan over sampler steps, pixels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError, check_fields, lookup
from vdx.config.ranges import Count, Finite, Fraction, NonNegative, OneOf, Positive
from vdx.diffusion.guidance import Guidance, guided_denoiser, stack_branches
from vdx.diffusion.process import Process
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
from vdx.models.adapters.lora import Adapted
from vdx.models.conditioning.text_signals import TEXT
from vdx.models.denoiser import Denoiser
from vdx.parallel import constrain
from vdx.seeds import seed_keys, seed_words
from vdx.types import Array, Batch, Key, Params, Ports, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The `sample` section of a config: how clips are drawn.

    Raises ConfigError for unknown names and values out of range.
    """

    sampler: Annotated[str, OneOf(lambda: SAMPLERS)] = (
        "dpmpp_2m"  # a row of SAMPLERS; second order for one evaluation a step
    )
    steps: Count = 20  # network evaluations of a first-order sampler
    guidance: Finite = 3.0  # scale of classifier-free guidance on the text; 1 is none
    # Scales of other signals; their branches come before that of the text, in this order.
    signal_guidance: Mapping[str, Finite] = dataclasses.field(default_factory=dict)
    guidance_rescale: Fraction = 0.0  # see vdx.diffusion.guidance; 0 is none
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)  # times at which the scales hold
    timesteps: Annotated[str, OneOf(lambda: ("", *TIMESTEPS))] = (
        ""  # a row of TIMESTEPS (rectified flow only); empty: uniform times
    )
    shift: Positive = 1.0  # time shift; above 1, more steps at high noise
    batch: Count = 16  # clips drawn at once
    # Largest relative change of a prediction for which the step cache replaces an evaluation.
    cache_threshold: NonNegative = 0.0  # 0: every evaluation is made

    def __post_init__(self) -> None:
        check_fields(self, "config.sample")
        low, high = self.guidance_interval
        if low > high:
            raise ConfigError(
                f"config.sample.guidance_interval = {self.guidance_interval}: the lower time is "
                "the first one."
            )


class ClampedFrames(NamedTuple):
    """Frames that the sampler keeps as they are (see `clamp_known_frames`)."""

    known: Array | np.ndarray  # float32 [b t h w c]; read where is_generated is 0
    is_generated: Array | np.ndarray  # float32 [b t]; 0: the frame is known


@dataclasses.dataclass(frozen=True)
class Generator:
    """Draws clips from a trained denoiser."""

    model: Denoiser
    process: Process
    sampling: Sampling
    frame_shape: tuple[int, int, int]  # (h, w, c) of a frame in the model's space
    mean: float = 0.0  # of the training pixels; training subtracts it, sampling adds it
    # The model continues a first frame at time 0: the batch entry "first_frame" [b h w c].
    first_frame: bool = False

    def __post_init__(self) -> None:
        for name in self.sampling.signal_guidance:
            lookup(name, self.model.signals, "config.sample.signal_guidance")

    def __call__(
        self,
        params: Params | Adapted,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_frames: int,
        fps: float,
        noise: np.ndarray | None = None,
        controls: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Draw one clip a prompt: float32 [n t h w c], at most `sampling.batch` at a time.

        Clip i starts from noise drawn from seeds[i] alone, or from noise[i] if given
        (float32 [n t h w c]). controls: batch entries of other signals, each [n ...]; a signal
        without an entry is dropped. Runs under the current mesh; every process gets all clips.
        Raises ConfigError for entries that no signal of the model reads, or that one needs.
        """
        # What is wrong with the arguments.
        controls = controls or {}
        count = len(prompts)
        shape = (num_frames, *self.frame_shape)
        if noise is not None and noise.shape != (count, *shape):
            raise ValueError(
                f"noise is {noise.shape}; {count} clips need {(count, *shape)} [b t h w c]."
            )
        self.check(shape)
        self.check_controls(controls)

        chunk = self.batch_size(count)
        clips = []
        for start in range(0, count, chunk):
            # Repetition fills the last chunk, so that one program serves all.
            rows = [min(i, count - 1) for i in range(start, start + chunk)]
            batch = self.text_batch([prompts[i] for i in rows], num_frames, fps)
            batch |= {name: np.asarray(value)[rows] for name, value in controls.items()}

            x0, _ = self.from_seeds(
                params,
                batch,
                seed_words(seeds[i] for i in rows),
                None if noise is None else noise[np.asarray(rows)],
                None,
                shape,
            )
            # Without the repetitions of the last chunk.
            clips.append(np.asarray(x0)[: count - start])
        return np.concatenate(clips)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for a clip [t h w c] that the model cannot draw."""
        self.model.num_tokens((1, *shape))

    def check_controls(self, controls: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for batch entries that no signal of the model reads."""
        known = [*self.model.conditioning.dummy_batch()]
        if self.first_frame:
            known.append("first_frame")
        for key in controls:
            lookup(key, dict.fromkeys(known), "This model's signals")

    def text_batch(self, prompts: Sequence[str], num_frames: int, fps: float) -> dict[str, Any]:
        """Return the batch entries of the text, the frame rate and the length."""
        tokenize = self.model.tokenizer()
        ids, mask = zip(*map(tokenize, prompts), strict=True)
        return {
            "text": np.stack(ids),
            "text_mask": np.stack(mask),
            "fps": np.full(len(prompts), fps, np.float32),
            "num_frames": np.full(len(prompts), num_frames, np.int32),
        }

    def batch_size(self, clips: int) -> int:
        """Return how many clips one call draws: up to `sampling.batch`, filling the mesh."""
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        wanted = min(clips, self.sampling.batch)
        return -(-wanted // shards) * shards

    @functools.cached_property
    def from_seeds(self) -> Callable[..., tuple[Array, Array]]:
        """Compiled `draw` that starts from seeds.

        (params, batch, `seed_words` [b 2], noise [b t h w c] or None, threshold, shape [t h w c] of
        a clip) -> the result of `draw`, whole on every device.
        """
        # Every process receives all clips.
        mesh = jax.sharding.get_abstract_mesh()
        replicated = None if mesh.empty else jax.sharding.PartitionSpec()

        def draw(
            params: Params | Adapted,
            batch: Batch,
            seeds: Array,
            noise: Array | None,
            threshold: Array | None,
            shape: tuple[int, ...],
        ) -> tuple[Array, Array]:
            # One key a clip, for its noise and that of stochastic samplers.
            keys = seed_keys(seeds)
            if noise is None:
                noise = jax.vmap(lambda key: self.noise(key, shape))(keys)
            return self.draw(params, constrain_batch(batch), noise, keys, threshold)

        return jax.jit(draw, static_argnums=5, out_shardings=replicated)

    def noise(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        """Return the noise that a clip of shape [t h w c] starts from."""
        return jax.random.normal(key, shape)

    def draw(
        self,
        params: Params | Adapted,
        batch: Batch,
        noise: Array,
        keys: Key[Array, "b"],
        threshold: float | Array | None = None,
    ) -> tuple[Array, Array]:
        """Return (x0 [b t h w c], bool [steps b]: evaluations of each clip). Pure.

        noise: [b t h w c]. keys: [b], one a clip, of stochastic samplers. threshold: replaces
        `sampling.cache_threshold`.
        """
        # A given first frame stays as it is, at time 0.
        conditions = dict(batch)
        first = conditions.pop("first_frame", None)
        clamped = None
        if first is not None:
            is_generated = (jnp.arange(noise.shape[1]) > 0).astype(jnp.float32)
            clamped = ClampedFrames(
                jnp.zeros_like(noise).at[:, 0].set(first),
                jnp.broadcast_to(is_generated, noise.shape[:2]),
            )

        carry, evaluated = self.run_steps(
            params, conditions, None, self.start(noise), self.step_table(), keys, clamped, threshold
        )

        # The first array of the carry is the clip [b t h w c].
        x0 = carry[0]
        if first is not None:
            x0 = x0.at[:, 0].set(first)
        return x0 + self.mean, evaluated

    @functools.cached_property
    def timesteps(self) -> Timesteps | None:
        """The row of TIMESTEPS that `sampling` names, or None."""
        s = self.sampling
        return TIMESTEPS[s.timesteps](s.steps, s.shift) if s.timesteps else None

    def step_table(self) -> StepTable:
        """Return the coefficients of the network evaluations that make a clip."""
        s = self.sampling
        if self.timesteps:
            times = self.timesteps.times
        else:
            times = uniform_timesteps(self.process, s.steps, s.shift)
        return step_table(self.process, SAMPLERS[s.sampler](), times)

    def start(self, noise: Array | np.ndarray) -> Carry:
        """Return the sampler's carry before the first step."""
        return SAMPLERS[self.sampling.sampler]().start(jnp.asarray(noise, jnp.float32))

    def run_steps(
        self,
        params: Params | Adapted,
        batch: Batch,
        negative: Batch | None,
        carry: Carry,
        table: StepTable,
        keys: Key[Array, "b"],
        clamped: ClampedFrames | None = None,
        threshold: float | Array | None = None,
    ) -> tuple[Carry, Array]:
        """Return (carry after the steps of `table`, bool [steps b]: evaluated). Pure.

        The clip is the first array of the carry. Guidance leads from the conditions `negative`
        to those of `batch`; None: to those of `batch` from the same without their text. keys:
        [b], one a clip.
        threshold: replaces `sampling.cache_threshold`.
        """
        conditions = self.conditions(params, batch, negative, carry[0].shape)
        guidance = self.guidance(batch, negative)

        # Keys and values of the text, once for all steps. XLA does not move them out of the loop
        # over steps by itself: the layers are a loop of their own.
        ports = stack_branches(conditions, guidance)
        x = jnp.repeat(carry[0], guidance.num_branches, 0)
        cross_kv = self.model.precompute_cross_kv(params, x, jnp.zeros(len(x)), ports)

        def network(x: Array, t: Array, ports: Ports) -> Array:
            return self.model.run(params, x, self.network_time(t), ports, cross_kv=cross_kv)

        denoise = guided_denoiser(network, conditions, guidance)
        if clamped is not None:
            known = jnp.asarray(clamped.known)
            denoise = clamp_known_frames(denoise, known, jnp.asarray(clamped.is_generated))

        return run_steps(
            denoise,
            self.process,
            SAMPLERS[self.sampling.sampler](),
            carry,
            table,
            keys,
            self.step_cache(threshold),
        )

    def step_cache(self, threshold: float | Array | None) -> StepCache | None:
        """Return the step cache of a threshold (None: that of `sampling`); None for 0."""
        if threshold is None:
            threshold = self.sampling.cache_threshold
        # A traced threshold always has a cache: its value is not known here.
        if isinstance(threshold, int | float) and threshold == 0:
            return None
        return StepCache(threshold, self.sampling.guidance_interval)

    def guidance_branches(self, batch: Batch) -> list[tuple[set[str], float]]:
        """Return (signals, scale) of each guidance branch, from fewer conditions to all.

        The text is last.
        """
        missing = self.model.missing_signals(batch)
        branches = [({name}, scale) for name, scale in self.sampling.signal_guidance.items()]
        branches.append((set(TEXT), self.sampling.guidance))
        return [(names, scale) for names, scale in branches if scale != 1.0 and names - missing]

    def guidance(self, batch: Batch, negative: Batch | None = None) -> Guidance:
        """Return the guidance from `negative` to `batch`, as `run_steps` takes it."""
        s = self.sampling
        if negative:
            scales = [s.guidance]
        else:
            scales = [scale for _, scale in self.guidance_branches(batch)]
        return Guidance(tuple(scales), s.guidance_rescale, s.guidance_interval)

    def conditions(
        self,
        params: Params | Adapted,
        batch: Batch,
        negative: Batch | None,
        shape: tuple[int, ...],
    ) -> list[Ports]:
        """Return the ports of each guidance branch for clips of `shape` [b t h w c].

        The first has the fewest conditions, the last has all.
        """
        missing = self.model.missing_signals(batch)
        complete = self.model.fill_missing(batch, shape)

        def ports(batch: Batch, dropped: set[str]) -> Ports:
            drop = {
                name: mask | (name in missing | dropped)
                for name, mask in self.model.drop_masks(shape[0], False).items()
            }
            return self.model.run(params, batch, drop, method="condition")

        # A negative prompt takes the place of the dropped text.
        if negative:
            return [ports({**complete, **negative}, set()), ports(complete, set())]

        # Branch i drops the signals that guidance strengthens from step i on.
        guided = [names for names, _ in self.guidance_branches(batch)]
        return [ports(complete, set().union(*guided[i:])) for i in range(len(guided) + 1)]

    def network_time(self, t: Array) -> Array:
        """Return the time that the network reads at time t of the process."""
        return (self.timesteps or self.process).network_time(t)


def constrain_batch(batch: Batch) -> dict[str, Array]:
    """Shard every entry of a batch over its leading axis."""
    return {name: constrain(x, " ".join("bthwc"[: x.ndim])) for name, x in batch.items()}
