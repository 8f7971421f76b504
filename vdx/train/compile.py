"""Programs of the training step, one a shape of batch, compiled ahead."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdx.config.build import ConfigError
from vdx.data.pipeline import Loader
from vdx.hardware import chip_of
from vdx.models.denoiser import Denoiser
from vdx.parallel import BATCH, abstract_batch, batch_sharding, replicated
from vdx.train.job import TrainJob
from vdx.train.state import TrainState, state_shardings, with_shardings
from vdx.train.step import Metrics, make_train_step
from vdx.types import Batch, Params

__all__ = [
    "CompiledStep",
    "Shapes",
    "StepCompiler",
    "StepCost",
    "TrainProgram",
    "abstract_train_batch",
    "peak_flops",
    "train_program",
    "with_text_length",
]

StepFunction: TypeAlias = Callable[..., tuple[TrainState, Metrics]]
Shapes: TypeAlias = dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape of a clip, dtype)


class TrainProgram(NamedTuple):
    """The training step of a job on a mesh, before it is compiled."""

    step: jax.stages.Wrapped  # jitted step(state, batch, frozen); it takes over the state's memory
    abstract_state: TrainState  # shapes, types and shardings


def train_program(job: TrainJob, mesh: Mesh) -> TrainProgram:
    """Build the step that the loop runs, and that the planner compiles without data."""
    abstract = jax.eval_shape(job.init_state, None)
    shardings = state_shardings(mesh, abstract, job.sharding_rules)
    step = make_train_step(
        job.objective,
        job.tx,
        job.settings.ema,
        job.optimizer.grad_accum_steps,
        job.settings.max_grad_norm_ratio,
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    return TrainProgram(jitted, with_shardings(abstract, shardings))


class StepCost(NamedTuple):
    """The size of one step, for the speeds in the log."""

    clips: int = 0  # of the whole batch
    tokens: int = 0  # of the whole batch
    # Operations of the model: three forward passes, since a backward pass costs two, whatever
    # remat repeats. 0 where the chip's peak is unknown, so that there is no MFU.
    flops: float = 0.0


class CompiledStep(NamedTuple):
    """A compiled step and its cost."""

    run: StepFunction
    cost: StepCost


def peak_flops(mesh: Mesh) -> float:
    """Return the peak operations a second of all devices; 0 for an unknown chip."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return 0.0 if chip is None else chip.flops * mesh.size


class StepCompiler:
    """Compiler of the step, once for every shape of batch, in a thread of its own.

    The program of the first batch comes first; those of the other shapes, which `samples`
    lists, are compiled while the first steps run.

    Raises ConfigError for a batch that the mesh cannot split, and ValueError for a bucket that
    does not divide into patches.
    """

    def __init__(
        self,
        program: TrainProgram,
        frozen: Params | None,
        model: Denoiser,
        loader: Loader,
        mesh: Mesh,
        samples: Callable[[], Iterable[tuple[int, Mapping]]],
    ):
        check_batches(model, loader, mesh)
        self.program = program
        self.frozen = frozen
        self.model = model
        self.mesh = mesh
        self.samples = samples  # see Batches.samples
        self.programs: dict[frozenset, Future[CompiledStep]] = {}
        self.thread = ThreadPoolExecutor(1, "compile")

    def __call__(self, batch: Batch) -> CompiledStep:
        """Return the program for a batch; wait for it if it is still being compiled."""
        is_first = not self.programs
        future = self.begin(batch)
        if is_first:
            for local_size, example in self.samples():
                self.begin(abstract_batch(self.mesh, example, local_size))
        return future.result()

    def begin(self, batch: Mapping[str, Any]) -> Future[CompiledStep]:
        """Start to compile for a batch, which may be abstract, unless that has begun."""
        shapes = frozenset((name, array.shape, array.dtype) for name, array in batch.items())
        if shapes not in self.programs:
            self.programs[shapes] = self.thread.submit(self.compile, batch)
        return self.programs[shapes]

    def compile(self, batch: Mapping[str, Any]) -> CompiledStep:
        """Compile the step for a batch."""
        with jax.set_mesh(self.mesh):  # the mesh is a setting of each thread
            cost = self.cost(batch)
            lowered = self.program.step.lower(self.program.abstract_state, batch, self.frozen)
            return CompiledStep(lowered.compile(), cost)

    def cost(self, batch: Mapping[str, Any]) -> StepCost:
        """Return the clips, tokens and operations of one step."""
        video = batch["latents" if "latents" in batch else "video"]
        clips, *clip = video.shape
        tokens = clips * self.model.num_tokens((clips, *clip))
        if not peak_flops(self.mesh):
            return StepCost(clips, tokens)

        text_tokens = batch["text"].shape[1] if "text" in batch else None
        forward = self.model.flops((*clip[:3], self.model.channels), text_tokens)
        return StepCost(clips, tokens, 3 * clips * forward)

    def close(self) -> None:
        """Drop what waits to be compiled; a compilation under way is left to end."""
        self.thread.shutdown(wait=False, cancel_futures=True)


def check_batches(model: Denoiser, loader: Loader, mesh: Mesh) -> None:
    """Raise for batches that the mesh cannot split, and buckets without whole patches."""
    shares = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    sizes = [bucket[-1] for bucket in loader.buckets] or [loader.global_batch]
    for batch in sizes:
        if batch % shares:
            raise ConfigError(
                f"A batch of {batch} clips does not divide over the mesh axes "
                f"{' and '.join(BATCH)}, {shares} parts: take a multiple."
            )
    for *clip, batch in loader.buckets:
        model.num_tokens((batch, *clip, model.channels))


def abstract_train_batch(
    model: Denoiser,
    mesh: Mesh,
    clip: tuple[int, ...],
    *,
    global_batch: int,
    cached: bool,
    text: int | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes that a step reads, sharded, without any data.

    Args:
      clip: [t h w c] in the model's space.
      cached: latents and signals come from a cache, as float16 (see vdx.data.records).
      text: tokens of a cached caption, in place of the signal's own length.
    """
    conditioning = model.conditioning
    shapes = signal_shapes(model, clip)

    # The step makes some signals from the clip itself: no batch has them.
    made = jax.eval_shape(
        lambda x0: conditioning.from_clip(jax.random.key(0), x0),
        jax.ShapeDtypeStruct((1, *clip), jnp.float32),
    )
    shapes = {name: entry for name, entry in shapes.items() if name not in made}

    # The clip
    if cached:
        shapes = {name: (shape, _as_cached(dtype)) for name, (shape, dtype) in shapes.items()}
        shapes["latents"] = clip, jnp.float16
    else:
        shapes["video"] = clip, jnp.uint8

    # Captions, and the entries that every batch has
    shapes = with_text_length(model, shapes, text)
    shapes |= {"fps": ((), jnp.float32), "num_frames": ((), jnp.int32)}

    return {
        name: jax.ShapeDtypeStruct((global_batch, *shape), dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }


def signal_shapes(model: Denoiser, clip: tuple[int, ...]) -> Shapes:
    """Return the shape and type of every signal of one clip [t h w c]."""
    conditioning = model.conditioning
    dummy = jax.eval_shape(lambda: conditioning.dummy_batch(clip))
    return {name: (array.shape[1:], array.dtype) for name, array in dummy.items()}


def with_text_length(model: Denoiser, shapes: Shapes, text: int | None) -> Shapes:
    """Replace the number of tokens of cached text by `text`; None leaves it."""
    if text is None or "embeddings" not in model.signals:
        return shapes
    replaced = dict(shapes)
    for name in {"text", "text_mask"} & shapes.keys():
        (_, *features), dtype = shapes[name]
        replaced[name] = ((text, *features), dtype)
    return replaced


def _as_cached(dtype: Any) -> Any:
    """Return the type that a cache stores arrays of `dtype` in."""
    return jnp.float16 if dtype == jnp.float32 else dtype
