"""What a program will need on a slice of chips that is not here: compiled for it, or estimated.

For TPUs the real compiler runs ahead of time, on any machine (`jax.experimental.topologies` and
libtpu). For GPUs, whose compiler wants a GPU, the traced program and the layout of its arguments
are all that is known.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from vdx.config.build import ConfigError, lookup
from vdx.experiment import Experiment
from vdx.flops import traced
from vdx.hardware import CHIPS, Chip
from vdx.interop.load import abstract_params
from vdx.models.transformer import Transformer
from vdx.models.vae.image_vae import ImageVAE
from vdx.models.vae.video_vae import VideoVAE
from vdx.parallel import AXES, MeshSpec, replicated
from vdx.planning.hlo import Program, by_kind
from vdx.train.compile import abstract_batch, signal_shapes, train_program, with_text_length

TWICE = {"all-reduce": 2.0}  # what others send once is sent there, and the sum sent back
# The VAEs whose latents have so many channels: Stable Diffusion's, that of Wan 2.1, of Wan 2.2.
VAES: dict[int, Callable[..., Any]] = {
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
PIXELS = 2**20  # of a frame, times the latent frames decoded at once


def abstract_mesh(spec: MeshSpec, devices: int) -> AbstractMesh:
    """A mesh of no devices in particular. Raises ConfigError."""
    return AbstractMesh(spec.shape(devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to plan for: "v5e:4x4", a row of CHIPS and a topology, or "h100:8", a number."""

    name: str

    @functools.cached_property
    def chip(self) -> Chip:
        return lookup(self.name.partition(":")[0], CHIPS, "--topology")

    @property
    def compiles(self) -> bool:
        return self.chip.kind.startswith("TPU")

    @property
    def devices(self) -> int:
        """Raises ConfigError for what is not a slice."""
        sizes = self.name.partition(":")[2]
        if not re.fullmatch(r"\d+(x\d+)*" if self.compiles else r"\d+", sizes):
            raise ConfigError(
                f"--topology={self.name} is not like v5e:4x4 or h100:8. Known chips: "
                f"{', '.join(CHIPS)}."
            )
        return math.prod(map(int, sizes.split("x"))) * self.chip.per_chip

    def mesh(self, spec: MeshSpec) -> Mesh | AbstractMesh:
        """The mesh of a config over these chips. Raises ConfigError."""
        if not self.compiles:
            return abstract_mesh(spec, self.devices)
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                "Planning for a TPU runs its compiler, libtpu, which is not here. No "
                "TPU is needed for it: pip install 'vdx[tpu]'"
            )
        assert self.devices  # or it says what is wrong with the name
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name).devices
        except Exception as error:
            raise ConfigError(
                f"--topology={self.name}: the TPU compiler does not know this slice. There are "
                f"v5e:2x2, v5e:4x4, v5p:2x2x2, v6e:4x4 and others like them. It said: {error}"
            ) from error
        return spec.make(found)


@dataclasses.dataclass(frozen=True)
class Job:
    """A program of an experiment. what: a row of PROGRAMS. clip: [t h w c] of the model's space;
    text: tokens of cached text."""

    experiment: Experiment
    what: str
    clip: tuple[int, ...]
    text: int | None

    def program(self, mesh: Any) -> tuple[Any, tuple]:
        """(jitted function, its arguments as shapes laid out on the mesh)."""
        return PROGRAMS[self.what](self, mesh)

    @property
    def clips(self) -> int:
        """Of one call."""
        e = self.experiment
        return {"train": e.data.loader["global_batch"], "sample": e.sampling.batch, "decode": 1}[
            self.what
        ]

    @functools.cached_property
    def model_flops(self) -> float:
        """Operations that the result of one call needs, of all devices together: to train a whole
        network three times the forward pass; to sample one for each evaluation and each condition;
        else what the program states when nothing is recomputed."""
        e = self.experiment
        if self.what == "sample":
            generator = e.generator()
            branches = 1 + len(generator.guidance_branches(_conditions(self, 1)))
            forwards = len(generator.step_table()["t"]) * branches
        elif self.what == "train" and e.trained_part is None:
            forwards = 3
        else:
            return self.with_backbone(remat="none").stated_flops
        return forwards * self.clips * e.model.flops(self.clip, self.text)

    @functools.cached_property
    def stated_flops(self) -> float:
        """Operations that the traced program states, what remat recomputes included, but not what
        an attention kernel does again by itself."""
        mesh, job = MeshSpec().make(jax.devices()[:1]), self
        if isinstance(self.experiment.model.backbone, Transformer):
            job = self.with_backbone(attention="xla")
        with jax.set_mesh(mesh):
            function, args = job.program(mesh)
            return traced(function, *args)

    def with_backbone(self, **fields: Any) -> "Job":
        model = self.experiment.config["model"]
        return self.changed(model={**model, "backbone": {**model["backbone"], **fields}})

    def changed(self, **sections: Any) -> "Job":
        """The same with other sections of the config."""
        config = {**self.experiment.config, **sections}
        return dataclasses.replace(self, experiment=Experiment(config))


def _train(job: Job, mesh: Any) -> tuple[Any, tuple]:
    e = job.experiment
    step, abstract_state = train_program(e.job(), mesh)
    batch = abstract_batch(
        e.model,
        mesh,
        job.clip,
        global_batch=e.loader.global_batch,
        cached=e.clip is None,
        text=job.text,
    )
    return step, (abstract_state, batch, e.weights.abstract_frozen(mesh))


def _conditions(job: Job, rows: int) -> dict[str, Any]:
    """What a generator is told, as shapes that lie on every device."""
    model = job.experiment.model
    shapes = with_text_length(model, signal_shapes(model, job.clip), job.text)
    return {k: jax.ShapeDtypeStruct((rows, *shape), dtype) for k, (shape, dtype) in shapes.items()}


def _sample(job: Job, mesh: Any) -> tuple[Any, tuple]:
    e = job.experiment
    generator = e.generator(size=(job.clip[1], job.clip[2]))
    # All inside eval_shape: no operation can run on chips that are not here.
    trained = abstract_params(jax.eval_shape(lambda: e.new_params(jax.random.key(0))), mesh)
    params = e.objective.network_params(trained, e.weights.abstract_frozen(mesh))
    draw = jax.jit(
        lambda params, batch, seeds: generator.from_seeds(
            params, batch, seeds, None, None, job.clip
        )[0]
    )
    rows = generator.at_once(job.clips)
    return draw, (params, _conditions(job, rows), jax.ShapeDtypeStruct((rows,), jnp.int32))


def _decode(job: Job, mesh: Any) -> tuple[Any, tuple]:
    """As vdx.generate.pretrained decodes a clip."""
    network = job.experiment.model.backbone
    if (make := VAES.get(network.channels)) is None:
        raise ConfigError(
            f"--what=decode: latents of {network.channels} channels are of no VAE "
            f"that is known; those of {', '.join(map(str, VAES))} channels are."
        )
    vae, latents = make(dtype=network.dtype), jax.ShapeDtypeStruct((1, *job.clip), jnp.float32)
    chunk: tuple[int, ...] = ()
    if isinstance(vae, VideoVAE):
        sides = job.clip[1] * job.clip[2] * vae.rates[1] ** 2
        chunk = (max(1, PIXELS // sides),)
    shapes = jax.eval_shape(lambda: vae.init(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3))))
    function = jax.jit(
        lambda params, z: vae.apply({"params": params}, z, *chunk, method="decode"),
        out_shardings=replicated(mesh),
    )
    return function, (abstract_params(shapes["params"], mesh, network.dtype), latents)


PROGRAMS: dict[str, Callable[[Job, Any], tuple[Any, tuple]]] = {
    "train": _train,
    "sample": _sample,
    "decode": _decode,
}


def bytes_held(args: Any) -> float:
    """Of one device, by shapes and where they lie."""

    def one(leaf: Any) -> float:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return 0.0  # a key
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return float(math.prod(shape) * leaf.dtype.itemsize)

    return sum(map(one, jax.tree.leaves(args)))


@functools.lru_cache(maxsize=1)
def _arguments(job: Job, mesh: Any) -> tuple:
    return job.program(mesh)[1]


# Features that stay for the backward pass, in widths of a token, of every block: the operands of
# its products, or their results. Other policies keep what a period of the pattern begins with.
KEPT = {"none": 16, "dots": 11}


def least_memory(
    job: Job, mesh: Any, clips: int | None = None, remat: str | None = None
) -> dict[str, float]:
    """About the bytes of one device that no compiler can do without: arguments, and to train
    gradients and what the backward pass begins from. clips: of a call, and remat, if others than
    the job's."""
    args, clips = _arguments(job, mesh), clips or job.clips
    if job.what != "train":
        return {"arguments": bytes_held(args)}
    state, batch, frozen = args
    least = {
        "arguments": bytes_held((state, frozen)) + bytes_held(batch) * clips / job.clips,
        "gradients": bytes_held(state.params),
        "kept": 0.0,
    }
    network = job.experiment.model.backbone
    if isinstance(network, Transformer):
        dims = network.dims()
        least["kept"] = (
            _token_bytes(job, mesh, clips)
            / job.experiment.optimizer.grad_accum_steps
            * (dims.periods + dims.depth * KEPT.get(remat or network.remat, 0))
        )
    return least


def _token_bytes(job: Job, mesh: Any, clips: int) -> float:
    """Of all tokens of one device, once."""
    network, parts = job.experiment.model.backbone, dict(mesh.shape)
    return (
        math.prod(network.grid(job.clip))
        * network.dims().width
        * jnp.dtype(network.dtype).itemsize
        * clips
        / (parts["context"] * parts["data"] * parts["fsdp"])
    )


def sent(job: Job, mesh: Any, clips: int | None = None) -> float:
    """A rough number of bytes that a device sends to train a step: weights gathered twice where
    they are split, gradients summed, tokens exchanged over context and tensor."""
    parts, (state, _, frozen) = dict(mesh.shape), _arguments(job, mesh)
    network, clips = job.experiment.model.backbone, clips or job.clips
    size = jnp.dtype(network.dtype).itemsize
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((state.params, frozen)))
    trained, total = bytes_held(state.params), 0.0
    if parts["fsdp"] > 1:
        total += 2 * size * weights / parts["tensor"] + trained * parts["fsdp"]
    if parts["data"] > 1:
        total += 2 * trained
    if isinstance(network, Transformer):
        # In a block three sums, or queries, keys, values and the result; in three passes.
        times = 6 * (parts["tensor"] > 1) + 4 * (parts["context"] > 1)
        total += 3 * times * network.dims().depth * _token_bytes(job, mesh, clips)
    return total


def compile_for(job: Job, mesh: Any) -> dict[str, Any]:
    """What the compiler says of the program for this mesh; see `estimated` for the keys."""
    with jax.set_mesh(mesh):
        function, args = job.program(mesh)
        lowered, begin = function.lower(*args), time.perf_counter()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(str(error)):
                raise
            return {
                "fits": False,
                "memory": out_of_memory(str(error)),
                "compile_seconds": time.perf_counter() - begin,
            }
    memory, text = program.memory_analysis(), program.as_text()
    counted = Program(text)
    collectives = counted.collectives
    return {
        "fits": True,
        "compile_seconds": time.perf_counter() - begin,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        "flops": counted.flops,
        "traffic": counted.traffic,
        "kernels": counted.kernels,
        "sent": sum(TWICE.get(c.kind, 1.0) * c.bytes * c.times for c in collectives),
        "collectives": by_kind(collectives),
    }


def estimated(job: Job, mesh: Any) -> dict[str, Any]:
    """Without a compiler: bytes and operations of one device that are certain to be needed, and a
    rough number of what is sent.

    fits: whether it may. memory: bytes by what they are for. flops, traffic, sent: operations,
    bytes to and from memory, bytes to other devices, in one call. collectives: see `by_kind`.
    """
    args, least = _arguments(job, mesh), least_memory(job, mesh)
    return {
        "fits": True,
        "memory": least,
        "flops": job.stated_flops / mesh.size,
        "traffic": 2.0 * bytes_held(args),
        "collectives": {},
        "sent": sent(job, mesh) if job.what == "train" else 0.0,
    }


def out_of_memory(message: str) -> dict[str, float]:
    """Bytes that a program needs and that there are, as the compiler says them; none if it does
    not."""
    size = r"\(?([\d.]+)([KMGT]?)\)?"
    used = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"temporaries {size} exceeds available HBM {size}", message
    )
    if used is None:
        return {}
    needs, needs_unit, has, has_unit = used.groups()
    unit = lambda letter: 1024.0 ** " KMGT".index(letter or " ")
    return {"needs": float(needs) * unit(needs_unit), "has": float(has) * unit(has_unit)}


def plan(job: Job, slice_: Slice) -> dict[str, Any]:
    """All that is known of a job on a slice, as JSON has it; times in seconds, sizes in bytes.
    Raises ConfigError for what cannot be."""
    e, chip = job.experiment, slice_.chip
    mesh = slice_.mesh(e.mesh_spec)
    facts = (compile_for if slice_.compiles else estimated)(job, mesh)
    has = facts["memory"].pop("has", chip.memory)
    if not slice_.compiles:
        facts["fits"] = sum(facts["memory"].values()) <= has
    if facts["fits"] or "flops" in facts:
        # What kernels do is stated, and not in the compiled text.
        hidden = job.stated_flops / mesh.size if facts.get("kernels") else 0.0
        facts["bounds"] = {
            "arithmetic": max(facts["flops"], hidden) / chip.flops,
            "memory": facts["traffic"] / chip.bandwidth,
            "interconnect": facts["sent"] / chip.interconnect,
        }
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    trained = count(jax.eval_shape(e.new_params, jax.random.key(0)))
    return {
        "what": job.what,
        "topology": slice_.name,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "compiled": slice_.compiles,
        "clip": list(job.clip),
        "text": job.text,
        "clips": job.clips,
        "tokens": e.model.num_tokens((1, *job.clip)),
        "remat": e.config["model"]["backbone"].get("remat", "none"),
        "parameters": count(e.shapes),
        "trained": trained,
        "model_flops": job.model_flops,
        "stated_flops": job.stated_flops,
        "memory_has": has,
        **facts,
    }
