"""The program of a training step: what the loop runs, and the planner compiles without data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vdx.parallel import batch_sharding, replicated
from vdx.train.state import TrainState, state_shardings
from vdx.train.step import make_train_step


def train_program(experiment: Any, mesh: Mesh) -> tuple[Callable[..., tuple], TrainState]:
    """(step(state, batch, frozen), jitted, which takes the state's memory over; the abstract
    state, every leaf with the place where it lies)."""
    abstract = jax.eval_shape(experiment.init)
    shardings = state_shardings(mesh, abstract)
    like = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    t = experiment.training
    step = make_train_step(
        experiment.objective,
        experiment.tx,
        t.ema,
        experiment.optimizer.accumulate,
        t.max_grad_norm_ratio,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh))), like


def abstract_batch(
    experiment: Any, mesh: Mesh, clip: tuple[int, ...], text: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step reads, without data: shapes of the batches of `config.data`, laid out.

    clip: [t h w c] of the model's space. text: tokens of cached text, in place of those that the
    signal has by itself. Cached arrays are float16, as vdx.data.records writes them.
    """
    conditioning, cached = experiment.model.conditioning, experiment.clip is None
    example = jax.eval_shape(lambda: conditioning.dummy_batch(clip))
    x0 = jax.ShapeDtypeStruct((1, *clip), jnp.float32)
    made = jax.eval_shape(lambda x: conditioning.from_clip(jax.random.key(0), x), x0)
    shapes = {k: (v.shape[1:], v.dtype) for k, v in example.items() if k not in made}
    if cached:
        shapes = {
            k: (shape, jnp.float16 if dtype == jnp.float32 else dtype)
            for k, (shape, dtype) in shapes.items()
        }
        shapes["latents"] = clip, jnp.float16
    else:
        shapes["video"] = clip, jnp.uint8
    shapes = with_text(experiment, shapes, text) | {
        "fps": ((), jnp.float32),
        "num_frames": ((), jnp.int32),
    }
    rows = experiment.data.loader["global_batch"]
    return {
        k: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))
        for k, (shape, dtype) in shapes.items()
    }


def with_text(experiment: Any, shapes: dict[str, tuple], text: int | None) -> dict[str, tuple]:
    """name -> (shape, type) of a batch's entries, with so many tokens of cached text."""
    if text is None or "embeddings" not in experiment.model.signals:
        return shapes
    return {
        k: ((text, *shape[1:]) if k in ("text", "text_mask") else shape, dtype)
        for k, (shape, dtype) in shapes.items()
    }
