"""The programs that a job can be, and the operations that they need."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vdx.config.build import ConfigError
from vdx.flops import traced
from vdx.interop.load import abstract_params
from vdx.models.shapes import init_shapes
from vdx.models.transformer import Transformer
from vdx.models.vae.image_vae import ImageVAE
from vdx.models.vae.video_vae import VideoVAE
from vdx.parallel import MeshSpec, replicated
from vdx.planning.job import Job
from vdx.train.compile import (
    abstract_train_batch,
    signal_shapes,
    train_program,
    with_text_length,
)
from vdx.types import Params

# Channels of the latents -> the VAE that makes them: that of Stable Diffusion, of Wan 2.1, of
# Wan 2.2.
VAES: dict[int, Callable[..., ImageVAE | VideoVAE]] = {
    4: ImageVAE,
    16: VideoVAE,
    48: functools.partial(
        VideoVAE,
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
    ),
}
# Pixels of a frame, times the latent frames that are decoded at once: a frame of 1024 x 1024, as
# in vdx.generate.pretrained.
PIXELS_AT_ONCE = 2**20


class ShapedProgram(NamedTuple):
    """A program that can be compiled without data."""

    function: Any  # jitted
    args: tuple[Any, ...]  # shapes, sharded on the mesh


def shaped_program(job: Job, mesh: Mesh) -> ShapedProgram:
    """Return the program of a job, its arguments laid out on a mesh."""
    return PROGRAMS[job.what](job, mesh)


def _train(job: Job, mesh: Mesh) -> ShapedProgram:
    """Return the step that vdx.main runs."""
    experiment = job.experiment
    step, abstract_state = train_program(experiment.job(), mesh)
    batch = abstract_train_batch(
        experiment.model,
        mesh,
        job.clip,
        global_batch=experiment.loader.global_batch,
        cached=experiment.clip is None,
        text=job.text,
    )
    frozen = experiment.weights.abstract_frozen(mesh)
    return ShapedProgram(step, (abstract_state, batch, frozen))


def _sample(job: Job, mesh: Mesh) -> ShapedProgram:
    """Return the sampler: parameters, a batch and seeds to latents."""
    # The batch is filled up to the shares of the mesh.
    experiment = job.experiment
    generator = experiment.generator(size=(job.clip[1], job.clip[2]))
    chunk = generator.batch_size(job.clips)

    # The key too is made inside eval_shape: no operation can run on chips that are not here.
    shapes = jax.eval_shape(lambda: experiment.new_params(jax.random.key(0)))
    trained = abstract_params(shapes, mesh)
    params = experiment.objective.network_params(trained, experiment.weights.abstract_frozen(mesh))

    @jax.jit
    def draw(params: Params, batch: dict[str, jax.Array], seeds: jax.Array) -> jax.Array:
        clips, _ = generator.from_seeds(params, batch, seeds, None, None, job.clip)
        return clips

    seeds = jax.ShapeDtypeStruct((chunk, 2), jnp.uint32)
    return ShapedProgram(draw, (params, _conditions(job, chunk), seeds))


def _decode(job: Job, mesh: Mesh) -> ShapedProgram:
    """Return the decoder of one clip, as vdx.generate.pretrained runs it."""
    network = job.experiment.model.backbone
    make = VAES.get(network.channels)
    if make is None:
        raise ConfigError(
            f"--what=decode: latents of {network.channels} channels are of no known VAE; those of "
            f"{', '.join(map(str, VAES))} channels are."
        )

    vae = make(dtype=network.dtype)
    latents = jax.ShapeDtypeStruct((1, *job.clip), jnp.float32)
    chunk: tuple[int, ...] = ()  # an image VAE decodes frame by frame
    if isinstance(vae, VideoVAE):
        _, height, width, _ = job.clip
        pixels = height * width * vae.rates[1] ** 2
        chunk = (max(1, PIXELS_AT_ONCE // pixels),)

    # Parameters depend on no size of the clip.
    shapes = init_shapes(vae, jax.ShapeDtypeStruct((1, 1, 16, 16, 3), jnp.float32))
    params = abstract_params(shapes, mesh, network.dtype)

    def decode(params: Params, latents: jax.Array) -> Any:
        return vae.apply({"params": params}, latents, *chunk, method="decode")

    return ShapedProgram(jax.jit(decode, out_shardings=replicated(mesh)), (params, latents))


PROGRAMS: dict[str, Callable[[Job, Mesh], ShapedProgram]] = {
    "train": _train,
    "sample": _sample,
    "decode": _decode,
}


def _conditions(job: Job, clips: int) -> dict[str, Any]:
    """Return a generator's batch, which is on every device.

    Its entries are shapes, which the generator takes for arrays.
    """
    model = job.experiment.model
    shapes = with_text_length(model, signal_shapes(model, job.clip), job.text)
    return {
        name: jax.ShapeDtypeStruct((clips, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }


def model_flops(job: Job) -> float:
    """Return the operations that the result of one call needs, of all devices.

    A step that trains a whole network needs three forward passes, since a backward pass costs
    two. A sampler needs one for each evaluation and each guidance branch. Any other program needs
    what it states when nothing is recomputed.
    """
    experiment = job.experiment
    if job.what == "sample":
        forwards = _evaluations(job)
    elif job.what == "train" and experiment.trained_part is None:
        forwards = 3
    else:
        return stated_flops(job.with_backbone(remat="none"))
    return forwards * job.clips * experiment.model.flops(job.clip, job.text)


def _evaluations(job: Job) -> int:
    """Return how often the sampler evaluates the network for one clip."""
    generator = job.experiment.generator()
    branches = 1 + len(generator.guidance_branches(_conditions(job, 1)))
    return len(generator.step_table()["t"]) * branches


def stated_flops(job: Job) -> float:
    """Return the operations that the traced program states, of all devices together.

    They include what remat recomputes, but not what an attention kernel recomputes inside.
    """
    mesh = MeshSpec().make(jax.devices()[:1])
    if isinstance(job.experiment.model.backbone, Transformer):
        job = job.with_backbone(attention="xla")  # which has no kernel
    with jax.set_mesh(mesh):
        program = shaped_program(job, mesh)
        return traced(program.function, *program.args)
